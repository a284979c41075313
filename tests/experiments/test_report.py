"""What an experiment tells: tables and pictures of made-up records."""

import json

import pytest
from experiment_runs import options, run_here

from benchmarks import training_step
from experiments import figure2, report, table3
from experiments.runs import Runs


def test_table_and_picture(tmp_path):
    settings = {"instruct": [None], "conversations": ["c"], "source": ["en"]}
    record = {"model": "Llama-3.1-8B", "rates": "1e-3", "device": "CPU", "date": "today", "settings": settings}
    found = [
        {**record, "row": "layers 1,32", "seed": seed, "figures": {"target": value, "hours": 1.0, "kobest": 0.5}}
        for seed, value in enumerate((1.0, 1.1, 1.2))
    ]
    found[2]["rates"], found[2]["date"] = "1e-4", "later"  # of a run for another first seed, on another day
    found.append({**record, "row": "layers 1,2", "seed": 0, "figures": {}, "failed": "it broke", "device": "8 x H100"})
    files = tmp_path / "table3.md", tmp_path / "table3.png"
    text = report.write(table3, found, tmp_path / "table3.jsonl")
    assert "| layers 1,32 | 1.1 ± 0.1 | 0.5 | 1 | 7.76 | 1e-3 and 1e-4 | 0,1,2 |" in text
    assert "| layers 1,2 |  |  |  |  | failed: it broke | 0 |" in text
    assert "CPU and 8 x H100, today and later;" in text  # hours of both do not compare
    assert "Without --instruct, mmlu, marc_ja, mt_bench, logickor, japanese_mt_bench." in text
    assert files[0].read_text() == text and files[1].read_bytes().startswith(b"\x89PNG")
    rows = {"layers 1,32": found[:3], "layers 1,2": found[3:]}
    assert report.points(rows, "target", None) == {"": [("layers 1,32", pytest.approx(1.1), pytest.approx(0.1))]}


def test_series_of_a_figure(tmp_path):
    settings = {"instruct": [None], "conversations": [None], "source": [None]}
    record = {"model": "m", "seed": 0, "rates": "", "device": "CPU", "date": "today", "settings": settings}
    rows = {"ELO + 0.5": 2.0, "ELO + 4": 1.0, "alignment only, 4": 1.5, "alignment only, in the time of ELO + 4": 1.25}
    found = [{**record, "row": name, "figures": {"target": value}} for name, value in rows.items()]
    assert report.points({line["row"]: [line] for line in found}, "target", figure2.ALONG) == {
        "ELO": [(0.5, 2.0, 0.0), (4.0, 1.0, 0.0)],
        "alignment only": [(4.0, 1.5, 0.0)],
        "alignment only, in the time of ELO": [(4.0, 1.25, 0.0)],
    }
    report.write(figure2, found, tmp_path / "figure2.jsonl")
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")


def test_figure_3(tmp_path, monkeypatch, capsys):
    """Hours from what the benchmark measures, here made up."""
    rates = {"elo": 1000.0, "full": 200.0, "lora": 250.0}
    row = {"implementation": "elo", "dtype": "bf16", "memory_bytes": 1, "slowest": 1.0, "fastest": 9.0}
    rows = [{**row, "method": method, "tokens_per_second": rate} for method, rate in rates.items()]
    figures = {"rows": rows, "figure3": training_step.report.figure3(rows, "bf16", bytes_per_token=4.0)}

    def start(runs, run):
        assert run.script == "benchmarks.training_step" and run.option("--methods") == "elo,full,lora"
        assert (run.option("--dtype"), run.option("--seq-len")) == ("fp32", "64")
        run.directory.mkdir(parents=True)
        (run.directory / "result.json").write_text(json.dumps(figures))

    monkeypatch.setattr(Runs, "start", start)
    monkeypatch.chdir(tmp_path)
    options(tmp_path)
    lines = "".join(json.dumps({"text": f"{number} " + "글 " * 60}) + "\n" for number in range(40))
    (tmp_path / "ko.jsonl").write_text(lines)
    given = ["figure3", "--model", "base", "--target", "ko.jsonl", "--held-out", "4", "--out", "out"]
    given += ["--training=--lr 1 --dtype fp32 --seq-len=64"]
    status, out, error = run_here(monkeypatch, capsys, *given)
    assert status in (None, 0), error
    assert "lora/elo, paper" in out and "full" in (tmp_path / "out/figure3.md").read_text()
    assert (tmp_path / "out/figure3.png").read_bytes().startswith(b"\x89PNG")


def test_small(tmp_path, monkeypatch, capsys):
    """The model's configuration is enough to plan: the demo's texts are written by the run."""
    options(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "base").rename(tmp_path / "models/SmolLM2-135M-Instruct")
    given = ["table3", "--small", "--dry-run", "--gb", "0.00002", "--training", "--lr 7"]
    status, out, error = run_here(monkeypatch, capsys, *given)
    assert status in (None, 0), error
    trained = [line for line in out.splitlines() if "train.py" in line]
    assert trained and all("data/demo/ko.train.jsonl" in line and "--lr 1e-3" in line for line in trained)
    assert all("--gb 1.8e-05 " in line and "--seq-len 256 " in line and "--lr 7" in line for line in trained)


def test_the_crossover_is_of_seeds_that_both_have(tmp_path):
    """Seed 1 reads other documents, on which all losses are higher by 1: ELO's alone would be behind."""
    settings = {"instruct": [None], "conversations": [None], "source": [None]}
    record = {"model": "m", "rates": "1e-3*", "device": "CPU", "date": "today", "settings": settings}
    rows = [(f"{name}{units:g}", units) for name in ("ELO + ", "alignment only, ") for units in (0, 0.5, 1, 2)]
    found = [
        {**record, "row": name, "seed": seed, "figures": {"target": 2 - units / 4 + seed, "hours": 1 + units}}
        for name, units in rows
        for seed in (0, 1)
        if name[0] == "E" or seed == 0
    ]
    text = report.write(figure2, found, tmp_path / "figure2.jsonl")
    assert "| 1 | +0.000 |" in text and "* is at an end of --rates" in text
    lost = [{**line, "seed": 1, "figures": {}, "failed": "it broke"} for line in found if line["row"][0] == "a"]
    assert "| 1 | +0.000 |" in report.write(figure2, [*found, *lost], tmp_path / "f.jsonl")
    assert "ELO minus control" in text
    del found[-1]["figures"]["target"]  # of a loss that was none: a point less, and too few are left
    assert "ELO minus control" not in report.write(figure2, found, tmp_path / "figure2.jsonl")
