"""`python -m experiments`: what is done once, stopped, resumed, reported; mistakes."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import instead
from experiment_runs import begun, options, pretending, run_here, words
from forking import Fork

from elo.common.errors import EarlyExit
from experiments import __main__ as command
from experiments import inputs
from experiments.rows import Kit, Row, align, alignment_only, baseline, elo
from experiments.runs import Runs


def records(project, out):
    lines = [json.loads(line) for line in (project / out / "table3.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["figures"].pop("hours") > 0
    return lines


def test_stopped_and_killed_in_the_middle_and_run_again(project):
    """The records are those of an experiment that nothing disturbed, and no run is done twice."""
    rows = "--only 'layers 1,4'"
    undisturbed = Fork("experiments.__main__", words(rows), project)
    for script, number in (("train", signal.SIGTERM), ("align", signal.SIGKILL)):
        disturbed, deadline = Fork("experiments.__main__", words(rows, "other"), project), time.monotonic() + 300
        while not any(path.stat().st_size for path in project.glob(f"other/runs/{script}-*/metrics.jsonl")):
            assert disturbed.poll() is None and time.monotonic() < deadline, disturbed.communicate()
            time.sleep(0.01)
        disturbed.send_signal(number)
        disturbed.wait()
        assert not (project / "other/table3.jsonl").exists()
    again = Fork("experiments.__main__", words(rows, "other"), project)
    for process in (undisturbed, again):
        out, err = process.communicate()
        assert process.returncode == 0, out + err
    assert records(project, "other") == records(project, "out")
    # What was stopped went on; what the killed experiment left at work was waited for.
    notes = {path.parent.name[:5]: json.loads(path.read_text()) for path in project.glob("other/runs/*/run.json")}
    assert {name: len(run["resumed"]) for name, run in notes.items()} == {"train": 1, "align": 0}
    (record,) = records(project, "out")
    assert 0 < record["figures"]["target"] < 20 and record["rates"] == "1e-2, 1e-3"
    assert not any(project.glob("o*/runs/*/checkpoints"))  # they would fill the disk, and the runs are finished
    # Nothing that was held out was trained on.
    (log,) = project.glob("out/runs/train-*.log")
    assert "documents are left out, which --validation has too" in log.read_text()


def test_a_failed_run_ends_its_rows_only(tmp_path, monkeypatch, capsys):
    pretending(monkeypatch, {"9": None})
    runs = Runs(options(tmp_path, rates={"elo": ["9"], "align": ["1e-3"], "full": ["1e-3"]}))
    kit = Kit(runs, 0)
    rows = [Row("ELO", align(elo())), Row("again", align(elo(), 2)), Row("FFT", baseline("full"))]
    for row in rows:
        row.model(kit)
    runs.begin()
    found = [command.do_row(kit, row) for row in rows]
    assert ["failed" in record for record in found] == [True, True, False]
    assert found[0]["failed"].endswith("ended with status 1: no such thing")
    assert capsys.readouterr().out.count("[4 training runs to do]") == 2  # the one that failed is not tried again
    assert found[2]["figures"] == {"hours": 2.0 / 3600, "tokens": 7, "target": 9.0, "source": 5.0}


def test_the_time_that_remains(tmp_path, monkeypatch, capsys):
    pretending(monkeypatch, {})
    runs = Runs(options(tmp_path))
    kit, chains = Kit(runs, 0), (alignment_only(elo()), alignment_only(elo(), 2))
    for chain in chains:
        chain(kit)
    runs.begin()
    costs = [plan.run.tokens * plan.flops.total for plan in runs.plans.values()]
    for chain in chains:
        chain(kit)
    assert runs.left == costs and runs.spent[1] == sum(costs)
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("[about 0.") and " min to go] " in last
    runs.left, runs.spent = [6.0, 12.0], [60.0, 6.0]
    assert runs.remaining() == "[about 2.0 min to go] "


def test_asked_to_stop(tmp_path, monkeypatch):
    """The run at work is asked too, and waited for."""
    monkeypatch.setattr(Runs, "command", lambda self, run: [sys.executable, "-S", "-c", WAITING.format(tmp_path)])
    runs = begun(options(tmp_path))
    threading.Thread(target=stop_when, args=[tmp_path / "ready"], daemon=True).start()
    with pytest.raises(EarlyExit, match="the same command goes on from there"):
        baseline("full")(Kit(runs, 0))
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("more", ["--dry-run --bytes-per-token 4", ""])
def test_asked_to_stop_while_planning(project, monkeypatch, capsys, more):
    monkeypatch.setattr(Runs, "plan", lambda self, run: os.kill(os.getpid(), signal.SIGINT) or time.sleep(60))
    assert run_here(monkeypatch, capsys, *words(more)) == (0, "stopped; the same command goes on from there\n", "")


WAITING = """
import signal, sys, time
def save(*_):
    open("{0}/saved", "w").close()
    sys.exit()
signal.signal(signal.SIGTERM, save)
open("{0}/ready", "w").close()
time.sleep(300)
"""


def stop_when(file):
    while not file.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def test_rates_of_a_method_that_is_named_twice(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments", "table3", "--rates", "elo=1e-3", "align=1,2", "elo=1e-4"])
    assert command.parse_arguments().rates == {"elo": ["1e-3", "1e-4"], "align": ["1", "2"]}


def test_dry_run(project, monkeypatch, capsys):
    """Every command once, with the planner's figures and their sum; nothing is run or written."""
    monkeypatch.setattr(Runs, "begin", None)
    given = words("--only base 'layers 1,4' --dry-run --bytes-per-token 4")
    status, out, _ = run_here(monkeypatch, capsys, *given)
    *lines, total, _ = out.splitlines()
    assert status == 0 and not (project / "out").exists()
    commands = [shlex.split(line)[1:] for line in lines[::2]]
    assert [words[:2] if words[0] == "-m" else words[0].rpartition("/")[2] for words in commands] == [
        ["-m", "eval"],
        "train.py",
        "align.py",
    ]
    assert [line.split()[0] for line in lines[1::2]] == ["0", "9,000", "1,000"]
    assert total.startswith("together 10,000 tokens, ") and "GB for the states of the run at work" in total


def test_what_is_held_out_is_measured_alike(tmp_path, monkeypatch):
    """In the runs and of the base by `eval perplexity`: in windows of the same length, and each file as a whole."""
    (tmp_path / "ko.jsonl").write_text("".join(json.dumps({"text": f"{n} " + "x" * 15_000}) + "\n" for n in range(620)))
    monkeypatch.chdir(tmp_path)
    options(tmp_path)
    told = "experiments table3 --model base --target ko.jsonl --held-out 200 --out out --training"
    monkeypatch.setattr(sys, "argv", [*told.split(), "--seq-len=64 --dtype fp32 --clip=0"])
    given = command.parse_arguments()
    given.contents = inputs.contents(given)
    inputs.check(given)
    inputs.hold_out(given)
    lines = [Path(file).read_text().splitlines() for file in given.held_out_files]
    texts = [sum(len(json.loads(line)["text"]) for line in of_file) for of_file in lines]
    assert texts[1] > 2_000_000
    runs = Runs(given)
    model = baseline("full")(Kit(runs, 0))
    (run,) = runs.made_of[model]
    (read,) = [float(word.split("=")[1]) for word in run.words if word.startswith("--validation-mb=")]
    assert read * 1e6 / len(texts) >= max(texts)
    Kit(runs, 0).measure(given.model, {})
    _, of_base = runs.plans
    for option in ("--seq-len", "--dtype"):
        assert of_base.option(option) == run.option(option) in ("64", "fp32")


def test_a_plan_that_does_not_fit_says_what_would(tmp_path, monkeypatch, capsys):
    from benchmarks import planning_paper

    (tmp_path / "config.json").write_text(json.dumps(planning_paper.PUBLIC["Llama-3-70B"][0]))
    given = ["figure2", "--model", str(tmp_path), "--bytes-per-token", "3.6", "--processes", "8", "--dry-run"]
    given += ["--only", "alignment only, 1"]
    status, out, _ = run_here(monkeypatch, capsys, *given)
    assert status == 0
    assert "does not fit on 8 x H100; it would with: --cpu-offload" in out


def test_other_rows_and_seeds_keep_their_records(project, monkeypatch, capsys):
    pretending(monkeypatch, {})
    for more in ("--only base", "--only 'alignment only'", "--only base --seeds 1", "--only base"):
        assert run_here(monkeypatch, capsys, *words(more))[0] == 0
    found = [(line["row"], line["seed"]) for line in read(project)]
    assert found == [("base", 0), ("alignment only", 0), ("base", 1)]
    before = (project / "out/table3.md").read_text()
    assert "| base | 9 | 5 |" in before and before.count("\n| ") == 3
    (project / "out/table3.md").unlink()
    assert run_here(monkeypatch, capsys, "table3", "--out", "out", "--report")[0] == 0
    assert (project / "out/table3.md").read_text() == before
    status, _, error = run_here(monkeypatch, capsys, *words("--only base --gb 0.00003"))
    assert (status, error) == (2, f"error: {OTHER} --gb{INSTEAD}")
    assert len(read(project)) == 3


def test_runs_are_told_apart_by_what_they_read(project, monkeypatch, capsys):
    """The same under another name is the same run, in a directory that was moved too; and another under that name is
    another one."""
    done, more = pretending(monkeypatch, {"1e-3": 2.0, "1e-2": 3.0}), "--only 'layers 1,4' --rates align=1e-2"
    assert run_here(monkeypatch, capsys, *words(more))[0] == 0
    before, ran = (project / "out/table3.md").read_text(), len(done)
    (project / "out").rename(project / "moved")
    (project / "base").rename(project / "model")
    (project / "ko.jsonl").rename(project / "korean.jsonl")
    given = instead(words(more, "moved"), ["--model", "model", "--target", f"{project}/korean.jsonl"])
    assert run_here(monkeypatch, capsys, *given)[0] == 0
    assert len(done) == ran and (project / "moved/table3.md").read_text() == before
    (record,) = [json.loads(line) for line in (project / "moved/table3.jsonl").read_text().splitlines()]
    assert (record["rates"], record["device"], record["date"]) == ("1e-2, 1e-3*", "here", "2026-01-02")  # of the runs
    planned = run_here(monkeypatch, capsys, *given, "--dry-run", "--bytes-per-token", "4")[1]
    assert planned.startswith("together 0 tokens") and f"; {ran} more are done\n" in planned
    lines = (project / "korean.jsonl").read_text().splitlines()
    (project / "korean.jsonl").write_text("\n".join([lines[0].replace("0", "9", 1), *lines[1:]]))
    inputs.digest.cache_clear()  # of a process, in which nothing changes
    texts = [path.read_text() for path in (project / "moved/texts").iterdir()]
    assert run_here(monkeypatch, capsys, *given)[2] == f"error: {OTHER} --target{INSTEAD}".replace("out/", "moved/")
    assert [path.read_text() for path in (project / "moved/texts").iterdir()] == texts
    (project / "moved/table3.jsonl").unlink()
    assert run_here(monkeypatch, capsys, *given)[0] == 0
    assert len(done) == 2 * ran
    tokenizer = project / "model/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    inputs.digest.cache_clear()
    assert "another --model;" in run_here(monkeypatch, capsys, *given)[2]


@pytest.mark.parametrize("wrong", [{"figures": {"target": "low"}}, {"date": None}, {"settings": None}])
def test_records_that_somebody_wrote(project, monkeypatch, capsys, wrong):
    pretending(monkeypatch, {})
    assert run_here(monkeypatch, capsys, *words("--only base"))[0] == 0
    (record,) = read(project)
    (project / "out/table3.jsonl").write_text(json.dumps({**record, **wrong}) + "\n")
    status, _, error = run_here(monkeypatch, capsys, "table3", "--out", "out", "--report")
    assert status == 2 and error.startswith("error: out/table3.jsonl") and error.count("\n") == 1


OTHER, INSTEAD = "out/table3.jsonl: its rows have another", "; move it away or give another --out\n"


def test_scores_of_two_judges_are_in_no_table(project, monkeypatch, capsys):
    """They may be added to rows that have none, and left out."""
    pretending(monkeypatch, {})
    (project / "logickor").mkdir()
    judged = "--only 'alignment only' --benchmarks . --judge-model"
    for more in ("--only base", f"{judged} a", "--only base"):
        assert run_here(monkeypatch, capsys, *words(more))[0] == 0
    assert run_here(monkeypatch, capsys, *words(f"{judged} b"))[::2] == (2, f"error: {OTHER} --judge-model{INSTEAD}")
    by_another_name = words(f"{judged} a --benchmarks {project}")
    assert run_here(monkeypatch, capsys, *by_another_name)[0] == 0
    (project / "logickor/questions.jsonl").write_text("{}")
    assert run_here(monkeypatch, capsys, *words(f"{judged} a"))[::2] == (2, f"error: {OTHER} --benchmarks{INSTEAD}")


def read(project):
    return [json.loads(line) for line in (project / "out/table3.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--only nothing", "--only nothing: the rows are base; alignment only; layers 1,4; "),
        ("--rates elo=fast", "--rates: 'fast' is not a number above 0"),
        ("--rates adam=1", "--rates: 'adam=1' is not METHOD=LR,... with a method of elo, full, "),
        ("--held-out 300", "documents of 200 to 20000 bytes; of 900 and more --held-out 300 leaves enough"),
        ("--report", "table3.jsonl: no records of an experiment; run it without --report"),
        ("--dry-run", "--dry-run needs --bytes-per-token"),
        ("--seeds 0,x", "--seeds: 'x' is not a whole number"),
        ('--sft "\'"', 'argument --sft: invalid split value: "\'"'),
        ("--training '--gb 3 --lr 1'", "--gb in --training or --sft: the experiment sets it itself"),
        ("--training=--method=lora", "--method in --training or --sft: the experiment sets it itself"),
        ("--training=--seq-len", "--seq-len: expected one argument"),
        ("--conversations c --sft '--seed 3'", "--seed in --training or --sft: the experiment sets it itself"),
        ("--sft '--epochs 3'", "--sft does nothing without --conversations"),
        ("--judge-model gpt", "--judge-model does nothing without --benchmarks"),
        ("--benchmarks . --base-url http://here", "--base-url does nothing without --judge-model"),
        ("--benchmarks nowhere", "--benchmarks nowhere: none of mmlu, kobest, marc_ja is a folder there"),
        ("--benchmarks base", "--benchmarks base: none of mmlu, kobest, marc_ja is a folder there"),
        ("--instruct nowhere", "--instruct nowhere: not found"),
        ("--conversations ko.jsonl chats.json", "--conversations chats.json: not found"),
        ("--out ko.jsonl", "--out ko.jsonl: Not a directory"),
    ],
)
def test_mistakes(project, monkeypatch, capsys, more, message):
    status, _, error = run_here(monkeypatch, capsys, *words(more))
    assert status == 2 and message in error and error.count("\n") == 1
