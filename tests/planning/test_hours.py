"""How long a step takes, by hand and beside other estimates."""

from dataclasses import replace

import pytest

from benchmarks import planning_paper
from elo.methods import make
from elo.planning.costs import count_flops
from elo.planning.hours import predict
from elo.planning.run import GPUS, Run

MODELS = {method: make(planning_paper.config("Llama-3.1-8B"), method).model for method in ("elo", "full", "lora")}
LAYER, HEAD = 218_112_000, 128256 * 4096  # parameters
WHOLE = 32 * LAYER + 2 * HEAD + 4096
ALIGNMENT = Run(
    "align", "full", "H100", GPUS["H100"], gpus=8, gpus_per_node=8, shard=None, seq_len=4096, batch_windows=128,
    micro_batch=1, dtype="bf16", utilization=0.55, activation_checkpointing=False, cpu_offload=False,
    optimizer_in_backward=False, gather_once=False, tokens=None,
)  # fmt: skip


def step(run, method="full"):
    model = MODELS[method]
    return predict(model, run, count_flops(model, run.seq_len, run.activation_checkpointing))


def test_settings_beside_an_estimate_by_hand():
    """Tokens a second in each of 8 H100, from the same data sheets and published speeds of kernels, part by part."""
    estimated = {(1, True): 8_100, (4, True): 8_900, (1, False): 9_700, (2, False): 10_400}
    found = {}
    for micro_batch, checkpointing in estimated:
        run = replace(ALIGNMENT, micro_batch=micro_batch, activation_checkpointing=checkpointing)
        found[micro_batch, checkpointing] = 16 * 4096 / step(run).seconds
    assert list(found.values()) == sorted(found.values())
    assert found == pytest.approx(estimated, rel=0.03)


def test_parts_of_full_training():
    found = step(ALIGNMENT)
    memory = 0.8 * 3350e9
    # Blocks are gathered twice, the rest once: 2 bytes written, read, written; gradients: 2 read, 4 written, 4 read.
    assert found.copies == pytest.approx(16 * (6 * (2 * 32 * LAYER + 2 * HEAD) + 10 * WHOLE) / memory, rel=1e-4)
    assert found.optimizer == pytest.approx(40 * WHOLE / 8 / memory, rel=1e-4)
    assert found.waiting == 0
    flops = count_flops(MODELS["full"], 4096)
    assert found.products == pytest.approx(16 * 4096 * flops.total / (0.55 * 989e12))


def test_parts_of_stage_1():
    """The frozen embedding and head stay gathered."""
    found = step(replace(ALIGNMENT, stage="train", method="elo", micro_batch=4), "elo")
    assert found.copies == pytest.approx(4 * (2 * 6 + 10) * 2 * LAYER / (0.8 * 3350e9), rel=1e-4)


def test_gathered_once():
    """Weights once, but the gradients of all 16 micro-batches are added: read, and the sum read and written."""
    found, memory = step(replace(ALIGNMENT, gather_once=True)), 0.8 * 3350e9
    assert found.copies == pytest.approx((6 * WHOLE + (16 * 10 + 12) * WHOLE) / memory, rel=1e-4)
    one = step(replace(ALIGNMENT, micro_batch=16, gather_once=True))
    assert one.copies == pytest.approx((6 + 10) * WHOLE / memory, rel=1e-4)
    slow = replace(ALIGNMENT, gather_once=True, cpu_offload=True, kind=replace(GPUS["H100"], link=1.0))
    flops = count_flops(MODELS["full"], 4096)
    moved = (
        7 / 8 * 2 * WHOLE / 0.8e9 + 4 / 8 * WHOLE / (0.8 * 64e9),
        7 / 8 * 4 * WHOLE / 0.8e9 + 4 / 8 * WHOLE / (0.8 * 64e9),
    )
    computed = 4096 * (flops.forward + flops.backward) / (0.55 * 989e12) + (6 + 10) * WHOLE / memory
    assert step(slow).waiting == pytest.approx(sum(moved) - computed, rel=1e-3)
    assert step(slow).optimizer == pytest.approx(40 * WHOLE / 8 / 40e9, rel=1e-4)


def test_what_is_frozen_and_whole_is_not_copied():
    adapters = sum(parameter.numel() for parameter in MODELS["lora"].parameters() if parameter.requires_grad)
    found = step(replace(ALIGNMENT, method="lora", gpus=1, batch_windows=4), "lora")
    assert found.copies == pytest.approx(4 * (2 * 6 + 10) * adapters / (0.8 * 3350e9), rel=1e-4)
    sharded = step(replace(ALIGNMENT, method="lora"), "lora")
    assert sharded.copies > 16 * 12 * 32 * LAYER / (0.8 * 3350e9)


def test_products_of_few_tokens_wait_for_their_weights():
    """55% of 989 TFLOP/s are 203 FLOPs for each byte that an H100 reads."""
    costs = [step(replace(ALIGNMENT, seq_len=length, batch_windows=8)).products for length in (64, 128, 256, 512)]
    assert costs[1] == pytest.approx(costs[0], rel=0.01)
    assert costs[3] == pytest.approx(2 * costs[2], rel=0.02)


def test_slow_links_are_waited_for():
    # PCIe: all but the eighth that is there, at 0.8 of 32 GB/s; a larger micro-batch waits less.
    cards = replace(ALIGNMENT, kind=replace(GPUS["H100"], link=1.0))
    moved = 7 / 8 * (2 * (2 * 32 * LAYER + 2 * HEAD) + 4 * WHOLE) / 0.8e9
    found = step(cards)
    assert found.waiting == pytest.approx(16 * moved - found.products - found.copies, rel=1e-4)
    assert step(replace(cards, micro_batch=4)).waiting < found.waiting / 3


def test_nodes_are_apart():
    """8 cards of a node together, or each by itself where the model is whole in a node and only gradients are added."""
    slow = replace(GPUS["H100"], network=1.0)
    run = replace(ALIGNMENT, gpus=16, batch_windows=256, utilization=1.0, kind=slow)
    over_all, within = step(run), step(replace(run, shard=8))
    assert over_all.waiting > within.waiting > 0
    assert step(replace(run, gpus_per_node=16)).waiting == 0
    moved = 15 / 16 * (2 * (32 * LAYER + 2 * HEAD)) / (8 * 0.8e9), 15 / 16 * (2 * 32 * LAYER + 4 * WHOLE) / (8 * 0.8e9)
    together = 16 * sum(moved) - over_all.products - over_all.copies
    assert over_all.waiting == pytest.approx(together, rel=0.01)
    # The sum of two halves goes out and comes back, an eighth of the model in each card.
    network = 16 * 2 * 4 * WHOLE / 8 / 2 / 0.8e9
    links = 16 * 7 / 8 * (2 * 32 * LAYER + 4 * WHOLE) / (0.8 * 450e9)
    flops = count_flops(MODELS["full"], 4096)
    backward = 16 * 4096 * flops.backward / 989e12 + 16 * (6 * 32 * LAYER + 10 * WHOLE) / (0.8 * 3350e9)
    assert within.waiting == pytest.approx(network + links - backward, rel=0.01)


def test_offload():
    """AdamW on the host, which adds up micro-batches too; weights cross the bus in fp32."""
    on_host = step(replace(ALIGNMENT, cpu_offload=True))
    assert on_host.optimizer == pytest.approx((40 + 15 * 12) * WHOLE / 8 / 40e9, rel=1e-4)
    slow = step(replace(ALIGNMENT, cpu_offload=True, kind=replace(GPUS["H100"], host=1.0)))
    moved = 4 / 8 * (2 * 32 * LAYER + 2 * HEAD + WHOLE) / 0.8e9
    links = 7 / 8 * (2 * (2 * 32 * LAYER + 2 * HEAD) + 4 * WHOLE) / (0.8 * 450e9)
    assert slow.waiting == pytest.approx(16 * (moved + links) - slow.products - slow.copies, rel=1e-4)
