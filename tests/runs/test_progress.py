"""What a run shows: lines in a log, a bar on a terminal, and at the end what came of it and the next command."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forking import Fork, fork_group
from shown_commands import main_of
from small_runs import finish, lines, make_project, run_here, start_group

from elo.runs import progress


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path))
    return tmp_path


def steps_said(text):
    return [line for line in text.splitlines() if re.match(r"step [\d,]+ of ", line)]


def test_a_log_gets_a_line_a_minute(project, monkeypatch, capfd):
    assert run_here("train --max-steps 5", "short") == 0
    assert [line.split(":")[0] for line in steps_said(capfd.readouterr().out)] == ["step 1 of 5", "step 5 of 5"]

    clock = iter(range(0, 10_000, 25))  # seconds; it is looked at once a step
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert run_here("train --max-steps 7 --validation en.jsonl --validate-every 1 --target-fraction 1", "long") == 0
    said = steps_said(capfd.readouterr().out)
    found = {int(line.split()[1]): line for line in said}
    assert list(found)[0] == 1 and list(found)[-1] == 7 and 2 < len(found) < 7
    record = lines(Path("long"))[0]
    assert f"loss {record['loss']:.4f}, lr {record['lr']:.2e}, " in found[1]
    assert f"held-out {record['validation_bits_per_byte']:.4f}" in found[1]
    assert re.search(r" [\d,]+ tokens/s", found[1])
    assert re.search(r"\d:\d\d:\d\d to go$", found[1])
    assert found[7].endswith("0:00:00 to go")


def test_a_terminal_gets_the_bar_alone(project, monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run_here("train --max-steps 3") == 0
    out, err = capfd.readouterr()
    assert steps_said(out) == []
    assert re.search(r"3/3 .*tokens/s", err)


def test_a_run_that_goes_on_counts_from_where_it_was(monkeypatch):
    """Speed and time to go are of the steps since then, not of those before."""
    said, clock = [], iter([100.0, 110.0, 180.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    world = SimpleNamespace(rank=0, say=said.append)
    shown = progress.Progress(20, done=10, tokens=1000, world=world)
    for step, tokens in ((11, 1100), (12, 1240)):
        shown.step({"step": step, "tokens": tokens, "loss": 2.0, "lr": 1e-3, "tokens_per_second": 1.0})
    assert said == [
        "step 11 of 20: loss 2.0000, lr 1.00e-03, 10 tokens/s, 0:01:30 to go",
        "step 12 of 20: loss 2.0000, lr 1.00e-03, 2 tokens/s, 0:05:20 to go",
    ]


def next_command(text):
    (line,) = [line for line in text.splitlines() if line.startswith("Next: ")]
    return shlex.split(line.removeprefix("Next: "))


def run_next(command):
    """Run it as it stands, but for how Python is started; returns what it says."""
    module, arguments = main_of(command)
    if command[0] == "torchrun":
        count = int(command[1].removeprefix("--nproc_per_node="))
        return finish(*fork_group(count, module, arguments, Path.cwd()))[0]
    process = Fork(module, arguments, Path.cwd(), stdin="some text\n")
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return out


@pytest.mark.parametrize("amount", ["--gb 0.000006", "--max-steps 3", ""])
def test_the_next_command_works(project, amount, capfd):
    """From stage 1 to the model that continues a text; with all of the text used up the layers are only put back."""
    assert run_here(f"train {amount}", "a run") == 0
    out = capfd.readouterr().out
    told = next(line for line in out.splitlines() if "parameters were trained" in line)
    last = lines(Path("a run"))[-1]
    for part in (f"on {last['tokens']:,} tokens in {last['step']} steps", "GiB of memory", "The result is in a run."):
        assert part in told
    command = next_command(out)
    assert command[:2] == ["python", "align.py"]
    assert (command[command.index("--gb") + 1] == "0") == (amount == "")
    said = run_next(command)
    command = next_command(said)
    assert command == ["python", "-m", "elo.generation", "--model", "a run-aligned", "--raw", "--prompt", "Hello,"]
    assert run_next([*command, "--max-new-tokens", "3"])


def test_without_a_step_nothing_was_trained(tmp_path, capfd):
    world = SimpleNamespace(rank=0, say=lambda *lines: print(*lines))
    progress.tell_result(world, tmp_path, torch.nn.Linear(1000, 1000), ["x.py"])
    assert "0.0 M of 1.0 M parameters were trained. The" in capfd.readouterr().out


def test_the_next_command_asks_for_no_byte_more_than_is_left(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    used, left = 100 * 10**9, 1_234_567_896
    shard = SimpleNamespace(documents={"bytes": np.array([1000])})
    mixture = SimpleNamespace(shards=[shard], shares=[0.9], end=lambda gigabytes: used + left)
    windows = SimpleNamespace(mixture=mixture)
    batches = SimpleNamespace(windows=windows, consumed=lambda steps: {"position": used, "bytes": used})
    command = progress.alignment_after(Path("out"), batches, 9)
    assert round(float(command[command.index("--gb") + 1]) * 10**9) == left


def test_the_next_command_of_several_processes(project, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = finish(*start_group(project, "train --max-steps 3", 2))[0]
    command = next_command(said)
    assert command[:3] == ["torchrun", "--nproc_per_node=2", "align.py"]
    run_next(command)


def test_the_next_command_after_tuning(project, capfd):
    assert run_here("sft --epochs 1 --max-steps 2") == 0
    assert run_next([*next_command(capfd.readouterr().out), "--max-new-tokens", "3"])


def test_no_next_command_where_it_could_not_run(project, capfd):
    """What is put together without training may have no tokenizer, or one of another model."""
    merge = ["--model", "base", "--base", "base", "--instruct", "base", "--overwrite", "--out", "merged"]

    def ends():
        assert run_here("align --gb 0 --overwrite") == 0
        out, err = Fork("merge_chat_vector", merge, project).communicate()
        return [text.splitlines()[-1].split("--model")[0] for text in (capfd.readouterr().out, out)]

    Path("base/tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    assert ends() == ["Next: python -m elo.generation "] * 2
    tokenizer = json.loads(Path("base/tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][-1], "id": 450, "content": "<more>", "special": False}
    )
    Path("base/tokenizer.json").write_text(json.dumps(tokenizer))
    said = [
        f"It takes no text yet: {out}: the tokenizer has 451 tokens, the model only 450" for out in ("out", "merged")
    ]
    assert [line.split(";")[0] for line in ends()] == said
    Path("base/tokenizer.json").unlink()
    assert [line.split(";")[0] for line in ends()] == [
        f"It takes no text yet: {out}: no tokenizer here" for out in ("out", "merged")
    ]
