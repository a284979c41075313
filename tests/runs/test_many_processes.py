"""Any number of processes gives the same: sharded, on two nodes, resumed by others, with few documents."""

import json
import random
import signal
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from many_processes import SMALL_STEPS, same_within_rounding, steps_done, wait_for
from small_runs import finish, interrupt, lines, losses, pausing, run_here, start, start_group, states


@pytest.fixture
def project(crowded, monkeypatch):
    monkeypatch.chdir(crowded)
    return crowded


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


def run_and_stop(project, out, size, step, options=""):
    """SIGTERM to all processes after this step."""
    group = start_group(project, f"{SMALL_STEPS} {options}", size, out, before=pausing(step, out))
    wait_for(steps_done(out, step), *group)
    for process in group:
        process.send_signal(signal.SIGTERM)
    assert f"stopped after step {step}" in finish(*group)[0]


def test_other_numbers_of_processes_go_on(project, monkeypatch):
    """1 -> 2 -> 4, of which two hold a model together -> 1: the same data, and losses within rounding."""
    with monkeypatch.context() as patch:
        interrupt(patch, 8)
        assert run_here(SMALL_STEPS, "resized") == 0
    run_and_stop(project, "resized", 2, 12)
    run_and_stop(project, "resized", 4, 15, "--shard 2")
    assert len(list(Path("resized/checkpoints/step-15").iterdir())) == 3  # two parts, and state.json
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
