"""How a model is laid out over the processes: always by `fully_shard` (FSDP2), also with one process.

fully_shard does the mixed precision too, so there is one path through the code for any number of processes.
"""

from argparse import BooleanOptionalAction, Namespace
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from elo.common.errors import UserError
from elo.common.options import Options, Parser, option, positive_int
from elo.cpu import attention, linear, loss
from elo.model.decoder import CausalLM, ScaledDotProductAttention
from elo.model.loss import LinearCrossEntropy, softmax_
from elo.runs.compilation import compiled
from elo.runs.devices import DTYPES, inference_device, set_for_training
from elo.runs.fp32_gradients import shard_root
from elo.runs.processes import World


@dataclass(frozen=True)
class ParallelOptions(Options):
    """How a model is laid out over the processes and what is traded for memory."""

    TITLE = "computation and memory"
    dtype: str = option("of computation (%(default)s)", "bf16", choices=DTYPES)
    compile: bool = option(
        "blocks, on CUDA the loss's softmax too (default: on CUDA)", False, action=BooleanOptionalAction
    )
    activation_checkpointing: bool = option("recompute blocks in the backward", False)
    cpu_offload: bool = option("keep parameters and optimizer in host memory", False)
    gather_once: bool = option("a step: blocks stay gathered, and gradients whole, through its micro-batches", False)
    shard: int | None = option(
        "over N processes, and replicate such groups (default: over all)", None, type=positive_int, metavar="N"
    )

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        super().add_arguments(parser, compile=inference_device().type == "cuda")

    @classmethod
    def from_arguments(cls, arguments: Namespace, world: World) -> Self:
        """Raises UserError if --shard does not divide the number of processes."""
        if arguments.shard and world.size % arguments.shard:
            raise UserError(f"--shard {arguments.shard} does not divide the {world.size} processes of this run")
        return super().from_arguments(arguments)


def make_mesh(world: World, shard: int | None) -> DeviceMesh:
    """A mesh of all processes; with `shard`, of groups of that many consecutive ranks, each with a whole model."""
    if shard in (None, world.size):
        return init_device_mesh(world.device.type, (world.size,))
    return init_device_mesh(world.device.type, (world.size // shard, shard), mesh_dim_names=("replicate", "shard"))


class CpuRows(LinearCrossEntropy):
    """The decoder's loss with the operators of `elo.cpu`."""

    softmax_, matmul_t = staticmethod(loss.softmax_), staticmethod(linear.matmul_t)
    add_product_, product_dtype = staticmethod(linear.add_matmul), staticmethod(linear.product_dtype)


class CpuCrossEntropy(LinearCrossEntropy):
    """Replaces the decoder's loss for training on a CPU; outside of training it is the same."""

    def loss_and_gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        places: Tensor | None,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.training and needs_hidden and not needs_weight:
            return *loss.by_vocabulary(hidden, weight, labels, places), None
        rows = CpuRows() if self.training and needs_weight else super()
        return rows.loss_and_gradients(hidden, weight, labels, places, needs_hidden, needs_weight)


def use_faster_operators(model: nn.Module) -> None:
    """For training on a CPU: the same results from faster matrix products, attention and loss (`elo.cpu`)."""
    faster = {
        nn.Linear: linear.Linear,
        ScaledDotProductAttention: attention.ScaledDotProductAttention,
        LinearCrossEntropy: CpuCrossEntropy,
    }
    for module in model.modules():
        module.__class__ = faster.get(type(module), type(module))


def sharded_parts(model: CausalLM) -> list[FSDPModule]:
    """The modules that are gathered and reduced by themselves: blocks, perhaps the norm, and the model for the rest."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def parallelize(model: CausalLM, world: World, options: ParallelOptions, shapes_vary: bool = False) -> CausalLM:
    """Compile and shard a model on the meta device, and allocate its memory; its values are not set yet.

    Each block and the loss's softmax are compiled; each block is sharded, then the rest. Trained parameters are kept in
    fp32 and computed in `options.dtype`. Gradients are reduced in fp32; outside of the blocks they are also summed over
    tokens in fp32 (`elo.runs.fp32_gradients`). Frozen parameters are kept in `options.dtype`, since they need no
    precision for updates. If each process has the whole model, fully_shard ignores them, as it would copy them.

    With `options.gather_once` each block is gathered once per step; `optimizer.Optimizer` says when the step ends.
    shapes_vary: micro-batches have different shapes (`elo.runs.compilation`).
    """
    set_for_training(world.device)
    if world.device.type == "cpu":
        use_faster_operators(model)
    dtype = DTYPES[options.dtype]
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for parameter in frozen:
        parameter.data = parameter.data.to(dtype)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if options.cpu_offload else OffloadPolicy()
    shard = partial(
        fully_shard,
        mesh=make_mesh(world, options.shard),
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        offload_policy=offload,
        ignored_params=frozen if (options.shard or world.size) == 1 and not options.cpu_offload else None,
    )
    if options.compile and not isinstance(model.loss, CpuCrossEntropy):
        model.loss.softmax_, model.loss.one_shape = compiled(softmax_, world, shapes_vary), not shapes_vary
    for block in model.model.layers:
        block.activation_checkpointing = options.activation_checkpointing
        if options.compile:
            block.forward = compiled(block.forward, world, shapes_vary)
        shard(block)
    shard_root(model, shard, dtype)
    model.gathered_once = [part for part in sharded_parts(model) if part is not model] if options.gather_once else []
    for module in model.gathered_once:
        module.set_reshard_after_forward(False)
    if not any(p.requires_grad for name, p in model.named_parameters() if not name.startswith("model.layers.")):
        # A frozen embedding and head never change: gather them once and keep them.
        model.set_reshard_after_backward(False, recurse=False)
    elif options.gather_once:
        model.gathered_once.append(model)
    model.to_empty(device="cpu" if options.cpu_offload else world.device)
    model.tie_weights()
    return model
