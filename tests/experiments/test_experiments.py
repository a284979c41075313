"""`python -m experiments`: what is done once, chosen, resumed, reported; on a tiny model, or with made-up results."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from argparse import Namespace

import pytest
from forking import Fork
from small_runs import make_base

from benchmarks.training_step import report as training_step
from elo.common.errors import EarlyExit, exit_status
from elo.slicing import parse_layers
from experiments import __main__ as command
from experiments import figure2, report, table1, table2, table3
from experiments.chains import Best, Row, changed, needed
from experiments.engine import Doing, Engine
from experiments.kit import Kit

TRAINING = "--seq-len 32 --batch-tokens 64 --dtype fp32"
TINY = "table3 --model base --target ko.jsonl --source en.jsonl --held-out 4 --gb 0.00004 --rates elo=1e-2 align=1e-3"


@pytest.fixture(autouse=True)
def _same_signals():
    """An experiment takes them for itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def project(tmp_path, monkeypatch):
    make_base(tmp_path, documents=400)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(more, out="out"):
    return [*TINY.split(), "--training", TRAINING, "--out", out, *shlex.split(more)]


def run_here(monkeypatch, capsys, *arguments):
    """(status, stdout, stderr)"""
    monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
    with pytest.raises(SystemExit) as exit_:
        exit_status(command.main)
    return exit_.value.code, *capsys.readouterr()


def records(project, out):
    lines = [json.loads(line) for line in (project / out / "table3.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["figures"].pop("hours") > 0
        del line["commands"]  # name directories
    return lines


def test_killed_in_the_middle_and_run_again(project):
    """The records are those of an experiment that nothing disturbed, and no run is done twice."""
    rows = "--only 'layers 1,4'"
    undisturbed = Fork("experiments.__main__", words(rows), project)
    disturbed = Fork("experiments.__main__", words(rows, "killed"), project)
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in project.glob("killed/runs/train-*/metrics.jsonl")):
        assert disturbed.poll() is None and time.monotonic() < deadline, disturbed.communicate()
        time.sleep(0.01)
    disturbed.kill()
    disturbed.wait()
    assert not (project / "killed/table3.jsonl").exists()
    again = Fork("experiments.__main__", words(rows, "killed"), project)
    for process in (undisturbed, again):
        out, err = process.communicate()
        assert process.returncode == 0, out + err
    assert records(project, "killed") == records(project, "out")
    (train,) = project.glob("killed/runs/train-*/run.json")
    assert len(json.loads(train.read_text())["resumed"]) == 1
    (record,) = records(project, "out")
    assert 0 < record["figures"]["target"] < 20 and record["rates"] == "1e-2, 1e-3"
    # Nothing that was held out was trained on.
    (log,) = project.glob("out/runs/train-*.log")
    assert "documents are left out, which --validation has too" in log.read_text()


# ---- with commands that only write what a run would


def options(tmp_path, **changes):
    given = {"model": "base", "instruct": None, "target": ["ko"], "source": ["en"], "conversations": None}
    given |= {"benchmarks": None, "judge_model": None, "base_url": None, "gb": 10.0, "processes": 1, "out": tmp_path}
    given |= {"rates": {}, "training": [], "sft": [], "seeds": [0], "benches": [], "equal_time": False, "only": None}
    given |= {"held_out": [f"{tmp_path}/target.validation.jsonl", f"{tmp_path}/target.heldout.jsonl"]}
    return Namespace(**(given | changes))


def pretending(monkeypatch, bits, seconds=2.0):
    """Every command writes a model and its last step; bits: of the validation text, by learning rate."""
    done = []

    def make(self, run):
        given = [self.text(word, run) for word in run.words if isinstance(word, str)]
        lr = given[given.index("--lr") + 1] if "--lr" in given else ""
        done.append((run.script, lr, "--elo" in run.words))
        value = bits.get(lr, 1.0)
        if value is None:
            return [sys.executable, "-c", "raise SystemExit('no such thing')"]
        # What is held out for the results is best where the validation text is worst.
        numbers = [value, 10 - value]
        validation = [
            {"file": file, "bits_per_byte": number} for file, number in zip(self.options.held_out, numbers, strict=True)
        ]
        line = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "seconds": seconds, "tokens": 7, "validation": validation}
        texts = {"metrics.jsonl": json.dumps(line) + "\n", "config.json": "{}", "result.json": "{}"}
        here = self.directory(run)
        here.mkdir(parents=True, exist_ok=True)
        (here / "aside.json").write_text(json.dumps(texts))
        code = "import json, os; [open(n, 'w').write(t) for n, t in json.load(open('aside.json')).items()]"
        return [sys.executable, "-S", "-c", f"import os; os.chdir({str(here)!r}); {code}"]

    monkeypatch.setattr(Engine, "command", make)
    return done


def test_the_best_rate_is_that_of_the_first_seed(tmp_path, monkeypatch):
    done = pretending(monkeypatch, {"1e-1": 2.0, "1e-2": 1.5, "1e-3": float("nan")})
    kit = Kit(options(tmp_path, rates={"full": ["1e-1", "1e-3", "1e-2"]}, seeds=[4, 5]), 5)
    doing = Doing(kit.options, {})
    word = kit.baseline("full")
    doing.do(word)
    assert [lr for _, lr, _ in done] == ["1e-1", "1e-3", "1e-2", "1e-2"]  # three of seed 4, then one of seed 5
    (chosen,) = doing.training(word)
    assert "--seed=5" in chosen.words and chosen.words[chosen.words.index("--lr") + 1] == "1e-2"
    doing.do(word)
    assert len(done) == 4  # nothing twice


def test_a_failed_run_ends_its_rows_only(tmp_path, monkeypatch, capsys):
    pretending(monkeypatch, {"9": None})
    kit = Kit(options(tmp_path, name="table3", rates={"elo": ["9"], "align": ["1e-3"], "full": ["1e-3"]}), 0)
    doing, elo = Doing(kit.options, {}), kit.elo()
    rows = [
        Row("ELO", kit.align(elo)),
        Row("again", kit.align(elo, 2)),
        Row("FFT", kit.baseline("full")),
    ]
    found = [command.do_row(doing, kit, row) for row in rows]
    assert ["failed" in record for record in found] == [True, True, False]
    assert found[0]["failed"].endswith("ended with status 1: no such thing")
    assert capsys.readouterr().out.count("to do]") == 2  # the one that failed is not tried again
    assert found[2]["figures"] == {"hours": 2.0 / 3600, "tokens": 7, "target": 9.0}


def test_asked_to_stop(tmp_path, monkeypatch):
    """The run at work is asked too, and waited for."""
    monkeypatch.setattr(Engine, "command", lambda self, run: [sys.executable, "-S", "-c", WAITING.format(tmp_path)])
    kit = Kit(options(tmp_path), 0)
    doing = Doing(kit.options, {})
    threading.Thread(target=stop_when, args=[tmp_path / "ready"], daemon=True).start()
    with pytest.raises(EarlyExit, match="the same command goes on from there"):
        doing.do(kit.baseline("full"))
    assert (tmp_path / "saved").exists()


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


def test_equal_time(tmp_path, monkeypatch):
    """Stage 1 and alignment take 2 s each, the control 2 s for one unit: two units."""
    pretending(monkeypatch, {})
    kit = Kit(options(tmp_path), 0)
    doing, elo = Doing(kit.options, {}), kit.elo()
    word = kit.in_time_of(Row("ELO", kit.align(elo), kit.alignment_only(elo))).model
    doing.do(word)
    assert doing.text(word.words[word.words.index("--gb") + 1], word) == "2"
    assert "--after" not in word.words


@pytest.mark.parametrize("experiment", [table1, table2, table3, figure2])
def test_rows(experiment, tmp_path, monkeypatch):
    """What rows share is one run, all layers are the model's, and seeds share nothing."""
    monkeypatch.setattr(table3.ModelConfig, "load", lambda path: Namespace(num_hidden_layers=32))
    made = [experiment.rows(Kit(options(tmp_path, instruct="chat", seeds=[0, 1]), seed)) for seed in (0, 1)]
    runs = [{run.key: run for row in rows for run in needed(row.model)} for rows in made]
    assert not runs[0].keys() & runs[1].keys()
    assert {changed(run, seed=1).key for run in runs[0].values()} == runs[1].keys()
    trained = [run for run in runs[0].values() if run.script == "train.py"]
    for run in trained:
        if "--layers" in run.words:
            parse_layers(run.words[run.words.index("--layers") + 1], 32)
    counts = {table1: 4, table2: 4, table3: 7, figure2: 1}
    assert len(trained) == counts[experiment]
    names = [row.name for row in made[0]]
    assert len(set(names)) == len(names)
    if experiment is figure2:
        assert {row.name: row.model for row in made[0]}["alignment only, 0"] == "base"
    if experiment is table1:
        controls = {"alignment only", "LoRA", "selective layer tuning", "ELO without alignment"}
        assert controls | {"base", "instruct", "FFT", "ELO + alignment"} < set(names)


def test_rates_of_elo_are_judged_after_alignment(tmp_path):
    kit = Kit(options(tmp_path, rates={"elo": ["1", "2"], "align": ["3", "4"]}), 0)
    elo = kit.elo()
    assert isinstance(elo, Best)
    assert [(judge.script, judge.words[judge.words.index("--lr") + 1]) for judge in elo.judges] == [
        ("align.py", "3")
    ] * 2
    aligned = kit.align(elo)
    scripts = [run.script for run in {run.key: run for run in needed(aligned)}.values()]
    assert scripts == ["train.py", "align.py", "train.py", "align.py", "align.py"]  # the first judge is a candidate too


def test_chat_and_benchmarks(tmp_path):
    changes = {"instruct": "chat", "conversations": ["c.json"], "benchmarks": "bench", "judge_model": "gpt"}
    kit = Kit(options(tmp_path, **changes), 0)
    tuned = kit.chat("model")
    assert [run.script for run in needed(tuned)] == ["merge_chat_vector.py", "sft.py"]
    assert [run.script for run in needed(kit.chat("chat"))] == ["sft.py"]
    score = kit.benchmark("logickor", tuned)
    runs = list({run.key: run for run in needed(score)}.values())
    assert [run.script for run in runs][2:] == ["eval answers", "eval judge", "eval score"]
    engine, (answers, judge) = Engine(kit.options), runs[2:4]
    assert str(engine.directory(answers)) in engine.command(score)  # where judgments are
    assert str(engine.directory(judge)) not in engine.command(score)


# ---- what is told


def test_dry_run(project, monkeypatch, capsys):
    """Every command once, with the planner's figures and their sum; nothing is run or written."""
    monkeypatch.setattr(Doing, "__init__", None)
    status, out, _ = run_here(monkeypatch, capsys, *words("--only base 'layers 1,4' --dry-run --bytes-per-token 4"))
    *lines, total, _ = out.splitlines()
    assert status == 0 and not (project / "out").exists()
    commands = [shlex.split(line)[1:] for line in lines[::2]]
    assert [words[:2] if words[0] == "-m" else words[0].rpartition("/")[2] for words in commands] == [
        ["-m", "eval"],
        "train.py",
        "align.py",
    ]
    assert [line.split()[0] for line in lines[1::2]] == ["0", "9,000", "1,000"]
    assert total.startswith("together 10,000 tokens, ")


def test_a_plan_that_does_not_fit_says_what_would(tmp_path, monkeypatch, capsys):
    from benchmarks import planning_paper

    (tmp_path / "config.json").write_text(json.dumps(planning_paper.PUBLIC["Llama-3-70B"][0]))
    given = ["table2", "--model", str(tmp_path), "--bytes-per-token", "3.6", "--processes", "8", "--dry-run"]
    status, out, _ = run_here(monkeypatch, capsys, *given)
    assert status == 0
    assert "align.py does not fit on 8 x H100; it would with: --cpu-offload" in out


def test_table_and_picture(tmp_path):
    record = {"paper": {"logickor": 7.76}, "series": "", "at": 0.0, "rates": "1e-3", "device": "CPU", "date": "today"}
    record |= {"left_out": ["MMLU (not in --benchmarks)"]}
    found = [
        {**record, "row": "ELO", "seed": seed, "figures": {"target": value, "hours": 1.0}}
        for seed, value in enumerate((1.0, 1.1, 1.2))
    ]
    found.append({**record, "paper": {}, "row": "FFT", "seed": 0, "figures": {}, "failed": "it broke"})
    text = report.markdown("Table", found)
    assert "| ELO | 1.1 ± 0.1 |  | 1 | 7.76 | 1e-3 |" in text
    assert "| FFT |  |  |  |  | failed: it broke |" in text
    assert "Seeds 0, 1, 2; ± is the standard deviation" in text and "Left out: MMLU (not in --benchmarks)." in text
    report.draw("Table", found, tmp_path / "table.png")
    points = [{**line, "series": "ELO", "at": float(line["seed"])} for line in found[:3]]
    report.draw("Figure", points, tmp_path / "figure.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("table.png", "figure.png"))


def test_figure_3(tmp_path, capsys):
    row = {"implementation": "elo", "dtype": "bf16", "memory_bytes": 1, "slowest": 1.0, "fastest": 9.0}
    rates = {"elo": 1000.0, "full": 200.0, "lora": 250.0}
    rows = [{**row, "method": method, "tokens_per_second": rate} for method, rate in rates.items()]
    figures = {"rows": rows, "figure3": training_step.figure3(rows, "bf16", bytes_per_token=4.0)}
    record = {"figures": figures, "paper": {}, "row": "hours", "seed": 0}
    command.write_report(Namespace(name="figure3", out=tmp_path), "Figure 3", [record])
    assert "lora/elo, paper" in capsys.readouterr().out
    assert "full" in (tmp_path / "figure3.md").read_text()
    assert (tmp_path / "figure3.png").read_bytes().startswith(b"\x89PNG")
    failed = {**record, "figures": {}, "series": "", "device": "CPU", "date": "", "left_out": [], "failed": "it broke"}
    command.write_report(Namespace(name="figure3", out=tmp_path), "Figure 3", [failed])
    assert "failed: it broke" in (tmp_path / "figure3.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--only nothing", "--only nothing: the rows are base, alignment only, layers 1,4, "),
        ("--rates elo=fast", "--rates elo=fast: give METHOD=LR,... with methods of elo, align, "),
        ("--rates adam=1", "--rates adam=1: give METHOD=LR,..."),
        ("--held-out 300", "documents of 200 to 20000 bytes; of 900 and more --held-out 300 leaves enough"),
        ("--report", "table3.jsonl: "),
        ("--seeds 0,x", "--seeds: 'x' is not a whole number"),
        ('--sft "\'"', '--sft: "\'": No closing quotation'),
    ],
)
def test_mistakes(project, monkeypatch, capsys, more, message):
    status, _, error = run_here(monkeypatch, capsys, *words(more))
    assert status == 2 and message in error and error.count("\n") == 1
