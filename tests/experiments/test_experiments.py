"""`python -m experiments`: what is done once, chosen, resumed, reported; on a tiny model, or with made-up results."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from argparse import Namespace

import families
import pytest
from forking import Fork
from small_runs import make_base

from elo.common.errors import EarlyExit, exit_status
from elo.slicing import parse_layers
from experiments import __main__ as command
from experiments.rows import EXPERIMENTS, Kit, Row, align, alignment_only, baseline, elo, found_scale, in_time_of
from experiments.runs import Run, Runs

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
    # Nothing that was held out was trained on.
    (log,) = project.glob("out/runs/train-*.log")
    assert "documents are left out, which --validation has too" in log.read_text()


# ---- with commands that only write what a run would


def options(tmp_path, **changes):
    architecture, config = families.VARIANTS["llama3"]()
    (tmp_path / "base").mkdir(exist_ok=True)
    fields = {**config.to_dict(), "architectures": [architecture.__name__]}
    (tmp_path / "base/config.json").write_text(json.dumps(fields))
    given = {"model": f"{tmp_path}/base", "instruct": None, "target": ["ko"], "source": ["en"], "conversations": None}
    given |= {"benchmarks": None, "judge_model": None, "base_url": None, "gb": 10.0, "processes": 1, "out": tmp_path}
    given |= {"rates": {}, "training": [], "sft": [], "seeds": [0], "benches": [], "equal_time": False, "only": None}
    given |= {"held_out": [f"{tmp_path}/{language}.{part}.jsonl" for part, language in HELD_OUT]}
    given |= {"bytes_per_token": 4.0, "gpu": "H100"}
    return Namespace(**(given | changes))


HELD_OUT = [(part, language) for part in ("validation", "heldout") for language in ("target", "source")]


def begun(given):
    runs = Runs(given)
    runs.begin()
    return runs


def pretending(monkeypatch, bits, seconds=2.0):
    """Every command writes a model and its last step; bits: of the validation text, by learning rate."""
    done = []

    def make(self, run):
        lr = run.option("--lr") or ""
        done.append((run.script, lr, run.words))
        value = bits.get(lr, 1.0)
        if value is None:
            return [sys.executable, "-c", "raise SystemExit('no such thing')"]
        # What is held out for the results is best where the validation text is worst.
        numbers = [value, 1.0, 10 - value, 5.0]
        validation = [
            {"file": file, "bits_per_byte": number} for file, number in zip(self.options.held_out, numbers, strict=True)
        ]
        line = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "seconds": seconds, "tokens": 7, "validation": validation}
        result = {"files": validation}
        texts = {"metrics.jsonl": json.dumps(line) + "\n", "config.json": "{}", "result.json": json.dumps(result)}
        texts["elo.json"] = json.dumps({"scale": [0.1, 1.0]})
        run.directory.mkdir(parents=True, exist_ok=True)
        (run.directory / "aside.json").write_text(json.dumps(texts))
        code = "import json, os; [open(n, 'w').write(t) for n, t in json.load(open('aside.json')).items()]"
        return [sys.executable, "-S", "-c", f"import os; os.chdir({str(run.directory)!r}); {code}"]

    monkeypatch.setattr(Runs, "start", starting(make))
    return done


def starting(make, start=Runs.start):
    """The command is asked for once a run, where it is started."""

    def start_once(self, run):
        made = make(self, run)
        self.command = lambda run: made
        start(self, run)
        del self.command

    return start_once


def test_the_best_rate_is_that_of_the_first_seed(tmp_path, monkeypatch):
    done = pretending(monkeypatch, {"1e-1": 2.0, "1e-2": 1.5, "1e-3": float("nan")})
    runs = begun(options(tmp_path, rates={"full": ["1e-1", "1e-3", "1e-2"]}, seeds=[4, 5]))
    model = baseline("full")(Kit(runs, 5))
    assert [lr for _, lr, _ in done] == ["1e-1", "1e-3", "1e-2", "1e-2"]  # three of seed 4, then one of seed 5
    (chosen,) = runs.made_of[model]
    assert chosen.option("--seed") == "5" and chosen.option("--lr") == "1e-2"
    assert baseline("full")(Kit(runs, 5)) == model and len(done) == 4  # nothing twice


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


def test_equal_time(tmp_path, monkeypatch):
    """Stage 1 and alignment take 2 s each, the control 2 s for one unit: two units."""
    done = pretending(monkeypatch, {})
    kit = Kit(begun(options(tmp_path)), 0)
    in_time_of(Row("ELO", align(elo()), alignment_only(elo()))).model(kit)
    last = done[-1][2]
    assert last[last.index("--gb") + 1] == "2"
    assert "--after" not in last


def test_the_scale_is_found_on_validation_text_alone(tmp_path, monkeypatch):
    done = pretending(monkeypatch, {})
    given = options(tmp_path)
    kit = Kit(begun(given), 0)
    for units in (0, 1):
        align(elo(), units, "--scale", found_scale(elo()))(kit)
    stage_1, search, *both = (Run(script, words, tmp_path) for script, _, words in done)
    assert (search.option("--gb"), search.option("--scale")) == ("0", "auto")
    assert f"--validation={given.held_out[0]}" in search.words and not set(given.held_out) & set(search.words)
    assert [run.option("--scale") for run in both] == ["0.1,1.0"] * 2
    assert [run.option("--gb") for run in (stage_1, *both)] == ["9", "0", "1"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_rows(experiment, tmp_path):
    """What rows share is one run, all layers are the model's, and seeds share nothing."""
    given, made = options(tmp_path, instruct="chat", seeds=[0, 1]), []
    rows = EXPERIMENTS[experiment](given)
    for seed in (0, 1):
        runs = Runs(given)
        for row in rows:
            row.model(Kit(runs, seed))
        made.append(runs.plans)
    assert not made[0].keys() & made[1].keys() and len(made[0]) == len(made[1])
    trained = [run for run in made[0] if run.script == "train.py"]
    for run in trained:
        if layers := run.option("--layers"):
            parse_layers(layers, 4)
    counts = {"table1": 5, "table2": 4, "table3": 6, "figure2": 1}
    assert len(trained) == counts[experiment]
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    if experiment == "figure2":
        assert {row.name: row for row in rows}["alignment only, 0"].model(Kit(runs, 0)) == given.model
    if experiment == "table1":
        controls = {"alignment only", "LoRA", "selective layer tuning", "ELO without alignment"}
        scales = {f"ELO, scale {scale} + alignment" for scale in ("0.25", "0.5", "auto")}
        bridged = {f"ELO, bridge, scale {scale}, without alignment" for scale in ("0.5", "1")}
        assert controls | scales | bridged | {"base", "instruct", "FFT", "ELO + alignment"} < set(names)
        assert [run for run in trained if "--bridge" in run.words]


def test_rates_of_elo_are_judged_after_alignment(tmp_path, monkeypatch):
    done = pretending(monkeypatch, {"1": 1.0, "2": 2.0, "3": 3.0, "4": 2.0})
    kit = Kit(begun(options(tmp_path, rates={"elo": ["1", "2"], "align": ["3", "4"]})), 0)
    aligned = align(elo())(kit)
    # The first judge is a candidate too, and so is the same alignment at the other rate.
    assert [(script, lr) for script, lr, _ in done] == [
        ("train.py", "1"),
        ("align.py", "3"),
        ("train.py", "2"),
        ("align.py", "3"),
        ("align.py", "4"),
    ]
    assert [run.option("--lr") for run in kit.runs.made_of[aligned]] == ["1", "4"]


def test_chat_and_benchmarks(tmp_path):
    changes = {"instruct": "chat", "conversations": ["c.json"], "benchmarks": "bench", "judge_model": "gpt"}
    kit = Kit(Runs(options(tmp_path, **changes, benches=["kobest", "logickor"])), 0)
    assert kit.chat("chat") != "chat"
    assert [run.script for run in kit.runs.plans] == ["sft.py"]
    kit.measure("model")
    scripts = ["eval perplexity", "merge_chat_vector.py", "sft.py", "eval choice"]
    assert [run.script for run in kit.runs.plans][1:] == [*scripts, "eval answers", "eval judge", "eval score"]
    answers, judge, score = [*kit.runs.plans][-3:]
    assert str(answers.directory) in kit.runs.command(score)  # where judgments are
    assert str(judge.directory) not in kit.runs.command(score)


# ---- what is told


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
    assert total.startswith("together 10,000 tokens, ")


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
    assert (status, error) == (2, "error: out/table3.jsonl: its rows have another --gb; give another --out\n")
    assert len(read(project)) == 3


def read(project):
    return [json.loads(line) for line in (project / "out/table3.jsonl").read_text().splitlines()]


def test_table():
    settings = {"instruct": None, "conversations": ["c"], "source": ["en"]}
    record = {"rates": "1e-3", "device": "CPU", "date": "today", "settings": settings}
    found = [
        {**record, "row": "ELO", "seed": seed, "figures": {"target": value, "hours": 1.0, "kobest": 0.5}}
        for seed, value in enumerate((1.0, 1.1, 1.2))
    ]
    found.append({**record, "row": "FFT", "seed": 0, "figures": {}, "failed": "it broke"})
    text = command.markdown("Table", found)
    assert "| ELO | 1.1 ± 0.1 | 0.5 | 1 | 1e-3 | 0,1,2 |" in text
    assert "| FFT |  |  |  | failed: it broke | 0 |" in text
    assert "Without --instruct, mmlu, marc_ja, mt_bench, logickor, japanese_mt_bench." in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--only nothing", "--only nothing: the rows are base; alignment only; layers 1,4; "),
        ("--rates elo=fast", "--rates: 'fast' is not a number above 0"),
        ("--rates adam=1", "--rates: 'adam=1' is not METHOD=LR,... with a method of elo, align, "),
        ("--held-out 300", "documents of 200 to 20000 bytes; of 900 and more --held-out 300 leaves enough"),
        ("--report", "table3.jsonl: no records of an experiment; run it without --report"),
        ("--dry-run", "--dry-run needs --bytes-per-token"),
        ("--seeds 0,x", "--seeds: 'x' is not a whole number"),
        ('--sft "\'"', '--sft: "\'": No closing quotation'),
    ],
)
def test_mistakes(project, monkeypatch, capsys, more, message):
    status, _, error = run_here(monkeypatch, capsys, *words(more))
    assert status == 2 and message in error and error.count("\n") == 1
