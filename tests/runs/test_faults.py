"""What can happen to processes: signals, kills, restarts."""

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from many_processes import SMALL_STEPS, load_bytes, same_within_rounding, steps_done, wait_for
from small_runs import finish, go_on, losses, pausing, result, run_here, start, start_group, states

from benchmarks import kill_table
from elo import training
from elo.common.errors import message_line
from elo.runs import states as states_module


@pytest.fixture
def project(crowded, monkeypatch):
    monkeypatch.chdir(crowded)
    return crowded


def test_a_process_whose_fellow_dies_says_so(project):
    first, second = start_group(project, SMALL_STEPS, 2, "bereft", before=pausing(3, "bereft"))
    wait_for(steps_done("bereft", 3), first, second)
    second.kill()
    go_on("bereft")
    said = finish(first, status=2)[0]
    assert said.splitlines()[-1].startswith("error: process 0: another process of this run was killed")
    assert "Traceback" not in said
    finish(second, status=-signal.SIGKILL)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried."), MemoryError()], ids=repr)
def test_out_of_memory(project, error, monkeypatch, capfd):
    """One line; the state that is being written is waited for."""
    accumulate, write_part = training.accumulate, states_module.write_part
    steps = iter(range(9))

    def fail(*arguments):
        if next(steps) == 3:
            raise error
        return accumulate(*arguments)

    out = f"full-{type(error).__name__}"
    with monkeypatch.context() as patch:
        patch.setattr(training, "accumulate", fail)
        patch.setattr(states_module, "write_part", lambda *part: time.sleep(0.5) or write_part(*part))
        assert run_here("train --save-every 3 --max-steps 4", out) == 2
    said = capfd.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: process 0: {message_line(error) or 'out of memory'}; smaller batches need less")
    assert "python -m elo.planning --best" in line
    assert "Traceback" not in said and states(Path(out)) == ["step-3"]


def test_sigterm_to_one_process_while_tokenizing(project):
    """Both leave with 0, and nothing stays behind."""
    cache = Path("big-cache")
    pair = start_group(project, f"{SMALL_STEPS} --target big.jsonl --cache {cache}", 2, "untokenized")
    wait_for(lambda: any(cache.glob(".building-*/tokens.bin")), *pair)
    pair[0].send_signal(signal.SIGTERM)
    assert "stopped" in finish(*pair)[0]
    assert not list(cache.iterdir())
    assert not Path("untokenized").exists()


def test_sigterm_through_torchrun_while_tokenizing(project):
    """torchrun gives its workers 30 s and itself ends with 1, or the signal; no worker is killed or says a word."""
    cache = Path("torchrun-cache")
    command = f"{SMALL_STEPS} --target big.jsonl --cache {cache}"
    torchrun = start(project, command, "untokenized", "--standalone --nproc_per_node=2")
    wait_for(lambda: any(cache.glob(".building-*/tokens.bin")), torchrun)
    workers = psutil.Process(torchrun.pid).children()
    torchrun.send_signal(signal.SIGTERM)
    output, errors = torchrun.communicate(timeout=600)
    assert "stopped by a signal" in output
    assert "error:" not in errors
    assert "SIGKILL" not in errors
    assert not any(worker.is_running() for worker in workers)
    assert not list(cache.iterdir())
    assert not Path("untokenized").exists()


SIGTERM_AT_EXPORT = """
import os, signal
import elo.model.saving
elo.model.saving.adopt = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
"""


def test_sigterm_to_one_of_two_while_the_model_is_written(project):
    """Rank 0 moves the files to their place and is told to stop: both end with 0, and nothing half is left."""
    pair = start_group(project, SMALL_STEPS, 2, "unexported", before=SIGTERM_AT_EXPORT)
    assert "stopped by a signal; the same command goes on" in finish(*pair)[0]
    assert not Path("unexported/config.json").exists()
    assert not list(Path("unexported").glob(".saving-*"))
    steps = Path("unexported/metrics.jsonl").read_bytes()
    finish(*start_group(project, SMALL_STEPS, 2, "unexported", before="import elo.training as t; del t.accumulate"))
    assert Path("unexported/metrics.jsonl").read_bytes() == steps
    same_within_rounding("unexported")


def test_sigterm_while_the_model_is_written(project, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr("elo.model.saving.adopt", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert run_here(SMALL_STEPS, "unwritten") == 0
    assert "stopped by a signal; the same command goes on" in capfd.readouterr().out
    assert not Path("unwritten/config.json").exists()
    assert not list(Path("unwritten").glob(".saving-*"))
    with monkeypatch.context() as patch:
        patch.delattr("elo.training.accumulate")  # no step is trained again
        assert run_here(SMALL_STEPS, "unwritten") == 0
    assert result(Path("unwritten"))[1] == result(Path("alone"))[1]
    assert load_bytes("unwritten") == load_bytes("alone")


def test_torchrun_restarts_a_run_where_it_was(project):
    """A worker is killed: torchrun starts all anew, and they go on from the last state by themselves."""
    finish(*start_group(project, f"{SMALL_STEPS} --save-every 3", 2, "undisturbed"))
    elastic = start(
        project,
        f"{SMALL_STEPS} --save-every 3 --overwrite",
        "elastic",
        "--standalone --nproc_per_node=2 --max-restarts 1",
        before=pausing(10, "elastic"),
    )
    wait_for(steps_done("elastic", 10), elastic)
    workers = psutil.Process(elastic.pid).children()
    next(worker for worker in workers if any(word.endswith("train.py") for word in worker.cmdline())).kill()
    go_on("elastic")
    said = finish(elastic)[0]
    assert "going on from" in said
    assert losses("elastic") == losses("undisturbed")
    assert load_bytes("elastic") == load_bytes("undisturbed")


@pytest.fixture(scope="module")
def kill_project(tmp_path_factory):
    project = tmp_path_factory.mktemp("kills")
    kill_table.make_project(project)
    return project


def test_kills(kill_project):
    """A few of `make kill`."""
    stages = ["tokenizing", "saving", "exporting"]
    killed = kill_table.chain(kill_project, "elo, 2 processes", stages, random.Random(0))
    assert killed
    assert all(same for _, same in killed)


def test_workers_save_and_end_when_torchrun_is_killed(project):
    torchrun = start(project, SMALL_STEPS, "orphaned", "--standalone --nproc_per_node=2", pausing(3, "orphaned"))
    wait_for(steps_done("orphaned", 3), torchrun)
    workers = psutil.Process(torchrun.pid).children()
    torchrun.kill()
    _, alive = psutil.wait_procs(workers, timeout=600)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]
    assert len(losses("orphaned")) == 3
    assert states(Path("orphaned")) == ["step-3"]
