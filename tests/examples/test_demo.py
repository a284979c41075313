"""examples/demo.py with a tiny model and texts in place of the real ones, and what it says of its table."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from forking import Fork
from small_runs import make_base

from elo.common.errors import EarlyExit, UserError
from examples import demo, texts
from examples.demo import Row

PNG = b"\x89PNG"


class Process(Fork):
    """In place of subprocess.Popen: the words after python, in a fork."""

    started: list[list[str]] = []

    def __init__(self, words, cwd, preexec_fn):
        Process.started.append(words[1:])
        module, arguments = ("eval.__main__", words[3:]) if words[1] == "-m" else (words[1][: -len(".py")], words[2:])
        super().__init__(module, arguments, cwd)

    def wait(self):
        status = super().wait()
        assert status == 0, self.said("err")
        return status

    def terminate(self):
        pass


@pytest.fixture
def place(tmp_path, monkeypatch):
    make_base(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "base").rename(tmp_path / demo.MODEL)
    (tmp_path / "examples").mkdir()
    shutil.copy2(demo.ROOT / "examples/texts.py", tmp_path / "examples")
    (tmp_path / demo.TEXTS).mkdir(parents=True)
    for language in demo.LANGUAGES:
        lines = (tmp_path / f"{language}.jsonl").read_text().splitlines(keepends=True)
        for part, some in {"heldout": lines[:2], "validation": lines[2:5], "train": lines[5:]}.items():
            (tmp_path / demo.TEXTS / f"{language}.{part}.jsonl").write_text("".join(some))
    for name, options in {
        "STAGE_1": "--gb 0.000004 --batch-tokens 128 --lr 1e-2",
        "ALIGNMENT": "--gb 0.000002 --batch-tokens 64 --lr 1e-2",
        "CONTROL": "--gb 0.000002 --batch-tokens 64 --lr 1e-2",
        "SEQ_LEN": 32,
        "ROOT": tmp_path,
    }.items():
        monkeypatch.setattr(demo, name, options)
    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(Popen=Process))
    Process.started = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_it_ends_with_table_verdict_picture_and_commands_and_does_nothing_twice(place, capfd):
    demo.main()
    said = capfd.readouterr().out
    rows = re.findall(r"^(\S.*?) +(\d+\.\d{3}) +(\d+\.\d{3})", said, re.MULTILINE)
    scale = json.loads((place / "runs/demo/scaled/elo.json").read_text())["scale"]
    assert [name for name, *_ in rows] == [
        "base",
        "ELO without alignment",
        f"ELO without alignment, --scale {scale[0]:g},{scale[1]:g}",
        "ELO + alignment",
        "alignment only",
    ]
    bits = {name: Row(name, float(korean), float(english)) for name, korean, english in rows}
    assert bits["ELO + alignment"].korean < bits["base"].korean  # the tiny model learns its tiny text
    assert "ELO + alignment needs" in said
    assert (place / "runs/demo/demo.png").read_bytes().startswith(PNG)
    aligned = json.loads((place / "runs/demo/aligned/elo.json").read_text())
    assert aligned["scale"] == scale
    # Stage 2 and its control read the documents after stage 1's, and no stage those held out or for validation.
    consumed = {
        name: json.loads((place / f"runs/demo/{name}/elo.json").read_text())["consumed"]["position"]
        for name in ("elo", "aligned", "control")
    }
    assert consumed["elo"] < consumed["aligned"] == consumed["control"]
    shown = [shlex.split(line)[1:] for line in said.splitlines() if re.match(r" {4}\S+ (-m|train.py|align.py)", line)]
    assert [words[:2] for words in shown][0] == ["-m", "elo.generation"]
    assert [words[0] for words in shown][1:] == ["train.py", "align.py"]
    ran = len(Process.started)
    assert ran == said.count("\n$ ") - 1  # the texts were there
    assert not list(place.glob("runs/demo/*/checkpoints"))

    demo.main()
    again = capfd.readouterr().out
    assert len(Process.started) == ran
    assert again.count("(it is done)") == ran + 1
    assert re.findall(r"^(\S.*?) +(\d+\.\d{3}) +(\d+\.\d{3})", again, re.MULTILINE) == rows

    # What is made of another stage 1 is made again, and nothing else.
    os.utime(place / "runs/demo/elo/config.json")
    demo.main()
    outs = [words[words.index("--out") + 1] for words in Process.started[ran:] if "--out" in words]
    assert outs == [f"runs/demo/{name}" for name in ("replaced", "scaled", "aligned", "control")]


def test_the_texts_have_three_parts(tmp_path, monkeypatch):
    try:
        distribution("konlpy")
    except PackageNotFoundError:
        pytest.skip("the package konlpy is not installed; `make test` installs it")
    monkeypatch.setattr(sys, "argv", ["texts.py", str(tmp_path)])
    texts.main()
    for language in demo.LANGUAGES:
        parts = {
            part: [json.loads(line)["text"] for line in (tmp_path / f"{language}.{part}.jsonl").open()]
            for part in ("heldout", "validation", "train")
        }
        sizes = {part: sum(len(text.encode()) for text in found) for part, found in parts.items()}
        every = sum(parts.values(), [])
        assert sorted(set(every)) == sorted(every)
        assert 9000 <= sizes["heldout"] < 12_000 and 9000 <= sizes["validation"] < 12_000 < 50_000 < sizes["train"]


@pytest.mark.parametrize(
    ("aligned", "english", "control", "expected"),
    [
        (1.7, 1.01, 1.705, ["0.90 bits a byte less than the base in Korean and 1.0% MORE in English", "level with"]),
        (1.7, 0.99, 1.8, ["1.0% less in English", "0.100 ahead of the control"]),
        (1.7, 1.00, 1.6, ["The control is ahead by 0.100 in Korean: on so little text", "docs/results.md"]),
        (2.7, 1.00, 2.8, ["0.10 bits a byte MORE", "worse than the model it began with", "ahead of the control"]),
        (1.7, 1.04, 1.8, ["4.0% MORE", "worse than the model it began with", "ahead of the control"]),
    ],
)
def test_a_table_that_disappoints_says_so_and_why(aligned, english, control, expected):
    said = demo.verdict(Row("base", 2.6, 1.0), Row("ELO", aligned, english), Row("control", control, 1.0))
    for part in expected:
        assert part in said
    for what in ("worse than", "docs/results.md"):
        assert (what in said) == any(what in part for part in expected)


def command(code):
    return f"-c {shlex.quote(code)}"


def test_a_command_that_fails_or_is_stopped_ends_the_demo(tmp_path):
    here = [Path("examples/demo.py")]
    with pytest.raises(UserError, match="exit status 3"):
        demo.make(tmp_path / "no", here, command("import sys; sys.exit(3)"))
    with pytest.raises(EarlyExit, match="the same command goes on"):
        demo.make(tmp_path / "no", here, command("pass"))


def test_a_signal_to_the_demo_stops_what_runs_in_good_order(tmp_path, monkeypatch):
    saves = f"""
import os, signal, sys, time
def save(*_):
    time.sleep(0.3)
    open({str(tmp_path / "saved")!r}, "w")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(600)
"""
    before = signal.signal(signal.SIGTERM, demo.stop)
    try:
        with pytest.raises(EarlyExit):
            demo.make(tmp_path / "no", [Path("examples/demo.py")], command(saves))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_killed_demo_leaves_nothing_that_runs(tmp_path):
    waits = command("import os, time; open('pid', 'w').write(f'{os.getpid()} '); time.sleep(600)")
    before = f"from examples import demo; demo.main = lambda: demo.make(demo.Path('no'), [], {waits!r})"
    killed = Fork("examples.demo", [], tmp_path, before=f"{before}; demo.ROOT = demo.Path({str(tmp_path)!r})")
    deadline = time.monotonic() + 300
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith(" ")):
        assert killed.poll() is None and time.monotonic() < deadline, killed.said("err")
        time.sleep(0.02)
    waiting = psutil.Process(int((tmp_path / "pid").read_text()))
    killed.kill()
    gone, alive = psutil.wait_procs([waiting], timeout=120)
    assert gone and not alive
