"""What `parallelize` promises of precision and memory, on one process and on two."""

import json
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file
from small_runs import finish, lines, make_base, start_group
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from elo.model.checkpoint import Checkpoint
from elo.model.decoder import build
from elo.model.saving import export
from elo.runs.processes import process_group
from elo.runs.sharding import ParallelOptions, parallelize
from elo.slicing import freeze_all_but_layers
from elo.validation import summed_losses

TOKENS = torch.arange(60).view(2, 30)


def sharded(base, world, dtype, **options):
    model = parallelize(build(base.config), world, ParallelOptions(dtype, compile=False, **options))
    base.load_into(model)
    return model


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dtype_is_what_is_computed_in(dtype, tmp_path):
    """Weights are held and gradients arrive in fp32 whatever it is; the logits are as far off as transformers'."""
    base = Checkpoint(families.write("llama3", tmp_path))
    exact, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=kind)(TOKENS).logits.double()
                     for kind in (torch.float64, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]))  # fmt: skip
    with process_group() as world:
        model = sharded(base, world, dtype)
        logits = model(TOKENS)
        assert logits.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        assert 0.3 < (logits - exact).norm() / (theirs - exact).norm() < 1.5
        model(TOKENS, TOKENS).backward()
        for parameter in model.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_what_was_frozen_is_written_as_the_base_has_it(tmp_path):
    """It is computed in bf16, and nothing of that is left in the result."""
    base = Checkpoint(families.write("llama3", tmp_path / "base"))
    with process_group() as world:
        model = build(base.config)
        freeze_all_but_layers(model)
        parallelize(model, world, ParallelOptions("bf16", compile=False))
        base.load_into(model)
        (tmp_path / "out").mkdir()
        export(tmp_path / "out", model, base)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_checkpointed_blocks_are_computed_again_for_the_backward_pass(tmp_path):
    base = Checkpoint(families.write("llama3", tmp_path))
    counts, gradients = {}, {}
    for again in (False, True):
        with process_group() as world:
            model = sharded(base, world, "fp32", activation_checkpointing=again)
            calls = []
            model.model.layers[2].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            model(TOKENS, TOKENS).backward()
            counts[again] = len(calls)
            gradients[again] = [parameter.grad.full_tensor() for parameter in model.parameters()]
    assert counts == {False: 1, True: 2}
    assert all(map(torch.equal, *gradients.values()))


KEEP_GRADIENTS = """
import os, torch
from elo.optimizer import Optimizer
step = Optimizer.step
def keep_and_step(self):
    torch.save([parameter.grad.to_local() for parameter in self.parameters], f"gradients-{os.environ['RANK']}")
    step(self)
Optimizer.step = keep_and_step
"""


def test_gradients_of_two_processes_are_summed_in_fp32(tmp_path):
    """The sum of two bf16 numbers seldom is one."""
    make_base(tmp_path, documents=10)
    command = "train --method full --max-steps 1 --dtype bf16 --clip 0"
    finish(*start_group(tmp_path, command, 2, before=KEEP_GRADIENTS))
    for rank in range(2):
        gradients = torch.cat([part.flatten() for part in torch.load(Path(tmp_path, f"gradients-{rank}"))])
        assert gradients.dtype == torch.float32
        assert (gradients != gradients.bfloat16().float()).float().mean() > 0.2


COUNT_COLLECTIVES = """
import json, os, elo.training
from collections import Counter
from torch.utils._python_dispatch import TorchDispatchMode

class Counting(TorchDispatchMode):
    counts = Counter()
    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.counts[operator._opname] += operator.namespace == "c10d"
        return operator(*arguments, **(options or {}))

def counted(*arguments, accumulate=elo.training.accumulate):
    Counting.counts.clear()
    with Counting():
        loss = accumulate(*arguments)
    with open(f"collectives-{os.environ['RANK']}", "w") as file:
        json.dump(+Counting.counts, file)
    return loss

elo.training.accumulate = counted
"""


def test_gather_once_gathers_and_reduces_once_a_step(tmp_path):
    """3 micro-batches of 4 blocks and what is around them, on two processes: the same losses and norms."""
    make_base(tmp_path, documents=10)
    found = []
    others = ["--activation-checkpointing", "--shard 1 --optimizer-in-backward --cpu-offload"]
    for number, options in enumerate(["", *(f"--gather-once {other}" for other in others)]):
        command = f"train --method full --batch-tokens 192 --micro-batch 1 --max-steps 2 --clip 0 {options}"
        finish(*start_group(tmp_path, command, 2, f"out-{number}", before=COUNT_COLLECTIVES))
        counts = [json.loads(Path(tmp_path, f"collectives-{rank}").read_text()) for rank in range(2)]
        assert counts[0] == counts[1]
        found.append(counts[0])
        for name in ("loss", "grad_norm"):
            ours, plain = ([line[name] for line in lines(tmp_path / f"out-{which}")] for which in (number, 0))
            assert ours == pytest.approx(plain, rel=1e-5)
    # Else each block is gathered for its forward and for its backward pass, and the root once a micro-batch.
    assert found[0] == {"_allgather_base_": 27, "_reduce_scatter_base_": 15, "allreduce_": 1}
    assert found[1] == {"_allgather_base_": 5, "_reduce_scatter_base_": 5, "allreduce_": 1}  # the last one of the loss
    assert found[2] == {"allreduce_": 6}  # each process has the whole model


def test_what_is_gathered_once_goes_after_a_forward_pass_without_a_backward_one(tmp_path):
    base = Checkpoint(families.write("llama3", tmp_path))
    with process_group() as world:
        model = sharded(base, world, "bf16", gather_once=True)  # the norm is sharded by itself then
        summed_losses(model, [(0, TOKENS, TOKENS)], 1, world)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
