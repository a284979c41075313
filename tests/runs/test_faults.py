"""Many processes, and what can happen to them: kills, signals, restarts, a full disk."""

import json
import os
import random
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from small_runs import finish, go_on, lines, losses, make_project, pausing, result, run_here, start, start_group, states
from test_resume import interrupt

from benchmarks import kill_table

SMALL_STEPS = "train --batch-tokens 32 --method full"  # many of them


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The working directory of all tests here; `alone` has the losses of one process."""
    directory = make_project(tmp_path_factory.mktemp("project"), documents=30)
    big = [json.dumps({"text": f"{number} " + "둘째로 더 많은 글이 필요하다. " * 9}) for number in range(30_000)]
    (directory / "big.jsonl").write_text("\n".join(big))
    os.chdir(directory)
    assert run_here(SMALL_STEPS, "alone") == 0
    return directory


@pytest.fixture(autouse=True)
def here(project, monkeypatch):
    monkeypatch.chdir(project)


def same_within_rounding(out):
    """What sums in another order differ by grows from step to step, and most where a loss has nearly gone."""
    ours, alone = losses(out), losses("alone")
    assert ours[:20] == pytest.approx(alone[:20], rel=1e-4)
    assert ours == pytest.approx(alone, rel=1e-3, abs=1e-3)
    ours, theirs = (load_file(Path(directory, "model.safetensors")) for directory in (out, "alone"))
    for name in theirs:
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=5e-2, atol=5e-3)


def wait_for(condition, *processes):
    while not condition():
        time.sleep(0.002)
        assert all(process.poll() is None for process in processes)


def steps_done(out, steps):
    return lambda: Path(out, "metrics.jsonl").exists() and Path(out, "metrics.jsonl").read_bytes().count(b"\n") >= steps


# ---- many processes


@pytest.mark.parametrize("options", ["--shard 2", "--shard 2 --optimizer-in-backward --clip 0 --micro-batch 9"])
def test_hybrid_sharding_has_the_same_losses(project, options):
    """4 processes, of which some get no window of a step: it has one."""
    out = f"hybrid-{len(options)}"
    if "--clip 0" in options:
        assert run_here(f"{SMALL_STEPS} --clip 0 --batch-tokens 96 --max-steps 9", "unclipped") == 0
        finish(*start_group(project, f"{SMALL_STEPS} --batch-tokens 96 --max-steps 9 {options}", 4, out))
        for name in ("loss", "grad_norm"):
            ours, theirs = ([line[name] for line in lines(Path(d))] for d in (out, "unclipped"))
            assert ours == pytest.approx(theirs, rel=1e-4)
        return
    finish(*start_group(project, f"{SMALL_STEPS} {options}", 4, out))
    same_within_rounding(out)


def test_shard_must_divide(project, capfd):
    assert run_here(f"{SMALL_STEPS} --shard 3", "undivided") == 2
    assert "--shard 3 does not divide the 1 processes" in capfd.readouterr().err


def free_port():
    """One that the kernel gives to nobody who does not ask for it by number."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with suppress(OSError), socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            return port


def test_two_nodes_share_an_empty_cache(project):
    """Two agents on one machine; both nodes tokenize, and into the same place."""
    rendezvous = "--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id {0} --rdzv_endpoint 127.0.0.1:{0}"
    torchrun = rendezvous.format(free_port())
    finish(*(start(project, f"{SMALL_STEPS} --cache shared-cache", "nodes", torchrun) for _ in range(2)))
    same_within_rounding("nodes")
    assert len(list(Path("shared-cache").iterdir())) == 2


def run_and_stop(project, out, size, step):
    """SIGTERM to all processes after this step."""
    group = start_group(project, SMALL_STEPS, size, out, before=pausing(step, out))
    wait_for(steps_done(out, step), *group)
    for process in group:
        process.send_signal(signal.SIGTERM)
    assert f"stopped after step {step}" in finish(*group)[0]


def test_other_numbers_of_processes_go_on(project, monkeypatch):
    """1 -> 2 -> 4 -> 1: the same data, and losses within rounding."""
    with monkeypatch.context() as patch:
        interrupt(patch, 8)
        assert run_here(SMALL_STEPS, "resized") == 0
    run_and_stop(project, "resized", 2, 12)
    run_and_stop(project, "resized", 4, 15)
    assert len(losses("alone")) > 15
    assert states(Path("resized"))[-2:] == ["step-12", "step-15"]
    assert run_here(SMALL_STEPS, "resized") == 0
    same_within_rounding("resized")
    assert [line["bytes"] for line in lines(Path("resized"))] == [line["bytes"] for line in lines(Path("alone"))]


@pytest.mark.parametrize(
    "command",
    [
        "train --target few.jsonl --target-fraction 1",
        "train --target few.jsonl --target-fraction 1 --method lora",
        "sft --data few.json --batch-conversations 3 --validation-fraction 0.34",
    ],
)
def test_fewer_documents_than_processes(project, command):
    """Three for four processes: one of them has an empty share in every step, and of the held-out one three have."""
    texts = [json.dumps({"text": "둘째로 더 많은 글이"}) for _ in range(3)]
    Path("few.jsonl").write_text("\n".join(texts) + "\n")
    Path("few.json").write_text(json.dumps(json.loads(Path("chats.json").read_text())[:3]))
    out = command.split()[0] + str(len(command))
    assert run_here(command, f"{out}-alone") == 0
    finish(*start_group(project, command, 4, out))
    assert losses(out) == pytest.approx(losses(f"{out}-alone"), rel=1e-4)
    held_out = [[line.get("validation_loss", 0) for line in lines(Path(name))] for name in (out, f"{out}-alone")]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-3)


# ---- signals and kills


def test_a_process_whose_fellow_dies_says_so(project):
    first, second = start_group(project, SMALL_STEPS, 2, "bereft", before=pausing(3, "bereft"))
    wait_for(steps_done("bereft", 3), first, second)
    second.kill()
    go_on("bereft")
    said = finish(first, status=2)[0]
    assert said.splitlines()[-1].startswith("error: process 0: another process of this run was killed")
    assert "Traceback" not in said
    finish(second, status=-signal.SIGKILL)


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


def load_bytes(out):
    return Path(out, "model.safetensors").read_bytes()


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


# ---- a slow disk, and a full one


SLOW_DISK = """
import time
from datetime import timedelta
from torch.distributed.distributed_c10d import _set_pg_timeout
import elo.model.saving as saving, sft

def after(first, function):
    return lambda *arguments, **options: (first(), function(*arguments, **options))[1]

def slow_file(path, tensors, tensor):
    def value_of(name):
        value = tensor(name)
        if "embed" in name:
            time.sleep(3)
        return value
    write(path, tensors, value_of)

write, saving.save_file = saving.save_file, slow_file
saving.adopt = after(lambda: time.sleep(3), saving.adopt)
sft.export = after(lambda: _set_pg_timeout(timedelta(seconds=1.5)), sft.export)
"""


def test_the_others_wait_for_a_slow_disk(project):
    """Twice as long as a collective may take, between two tensors; and none ends before the model is there."""
    pair = start_group(project, "sft --epochs 2", 2, "slow-disk", before=SLOW_DISK)
    pair[1].wait()
    assert Path("slow-disk/config.json").exists()
    finish(*pair)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of a size."""
    mounted = []

    def mount(size):
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a tmpfs cannot be mounted here: that needs root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_leaves_the_last_state(project, small_disk, capfd):
    """Room for two states and not for a third, which is found out before the last step, however slow the disk is."""
    assert run_here("train --save-every 2 --max-steps 10", "roomy") == 0
    size = sum(path.stat().st_size for path in Path("roomy/checkpoints/step-10").iterdir())
    disk = small_disk(int(2.6 * size))
    command = "train --save-every 2 --max-steps 10 --cache cache"
    assert run_here(command, str(disk / "out")) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert "No space left on device" in line
    assert "the last saved state is step-4" in line
    assert states(disk / "out") == ["step-2", "step-4"]
    assert sorted(path.name for path in (disk / "out/checkpoints").iterdir()) == ["step-2", "step-4"]
    subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
    assert run_here(command, str(disk / "out")) == 0
    assert load_bytes(disk / "out") == load_bytes("roomy")
    assert result(disk / "out")[1] == result(Path("roomy"))[1]


def test_a_full_disk_while_the_model_is_written(project, small_disk, capfd):
    disk = small_disk("100m")
    command = "train --max-steps 3 --cache cache"
    with pytest.MonkeyPatch.context() as patch:
        original = run_here.__globals__["train"].export

        def fill_and_export(*arguments, **options):
            free = os.statvfs(disk)
            (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize - 100_000))
            original(*arguments, **options)

        patch.setattr("train.export", fill_and_export)
        assert run_here(command, str(disk / "out")) == 2
    assert "the model cannot be written: No space left on device" in capfd.readouterr().err
    assert states(disk / "out") == ["step-3"]
    (disk / "filler").unlink()
    assert run_here(command, str(disk / "out")) == 0
    assert not (disk / "out/checkpoints").exists()
