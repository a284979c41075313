"""AdamW, learning rate schedule and clipping; the step comes after a batch's backward passes or inside the last one."""

import math
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from elo.common.errors import UserError
from elo.common.options import Interval, Options, not_negative, not_negative_int, option, positive, positive_int, share
from elo.model.decoder import CausalLM
from elo.runs.event_files import check_package
from elo.runs.processes import World


@dataclass(frozen=True)
class TrainingOptions(Options):
    """Options of the training loop.

    The defaults are this project's own: the paper's are in its Table 7, whose cells are missing from our text of it.
    """

    TITLE = "training"
    lr: float = option("peak learning rate (%(default)s)", type=positive)
    warmup: float = option("share of the steps with rising lr (%(default)s)", 0.05, type=share)
    min_lr_ratio: float = option("the cosine ends at this x lr (%(default)s)", 0.1, type=share)
    weight_decay: float = option("of matrices (%(default)s)", 0.1, type=not_negative)
    clip: float = option("largest gradient norm, 0: any (%(default)s)", 1.0, type=not_negative)
    optimizer_in_backward: bool = option("free each gradient at once; needs --clip 0", False)
    max_steps: int | None = option("stop after this many steps (default: one epoch)", None, type=not_negative_int)
    save_every: Interval | None = option(
        "save a resumable state every N steps, or 15m, or 2h", None, type=Interval.parse, metavar="N"
    )
    keep_checkpoints: int = option("the newest states (%(default)s)", 2, type=positive_int, metavar="K")
    stop_on_spike: bool = option("stop where a loss or gradient norm is out of range", False)
    tensorboard: bool = option("metrics.jsonl as TensorBoard's event files too", False)

    @classmethod
    def from_arguments(cls, arguments: Namespace) -> Self:
        if arguments.optimizer_in_backward and arguments.clip:
            raise UserError("--optimizer-in-backward cannot clip by the gradient's norm: give --clip 0 with it")
        if arguments.tensorboard:
            check_package()
        return super().from_arguments(arguments)


def learning_rate(step: int, steps: int, options: TrainingOptions) -> float:
    """Linear warmup, then a cosine from `lr` down to `lr * min_lr_ratio` at the last step. Steps count from 0."""
    warmup = math.ceil(options.warmup * steps)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    floor = options.min_lr_ratio
    return options.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: CausalLM, options: TrainingOptions) -> list[dict[str, Any]]:
    """The trained parameters in two groups: matrices with weight decay, norms and biases without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


class Optimizer:
    """AdamW and clipping: after a batch's backward passes, or with --optimizer-in-backward inside the last of them.

    In backward, each parameter is updated and its gradient freed as soon as that gradient is complete, so that all
    gradients never exist at once. The result is that of the ordinary step. The global norm is known only after the
    updates, so it cannot clip. With several micro-batches gradients wait for the last one and take their full memory:
    to save it, use one micro-batch per step.
    """

    def __init__(self, model: CausalLM, options: TrainingOptions) -> None:
        self.in_backward, self.clip = options.optimizer_in_backward, options.clip
        self.groups = parameter_groups(model, options)
        self.parameters = [parameter for group in self.groups for parameter in group["params"]]
        # With --shard each gradient exists in every group of processes, so sums over all of them count it that often.
        self.replicas = self.parameters[0].device_mesh.size(0) if self.parameters[0].device_mesh.ndim == 2 else 1
        self.last_micro_batch = False
        self.gathered_once = model.gathered_once  # by `sharding.parallelize`
        adamw = partial(torch.optim.AdamW, lr=options.lr, betas=(0.9, 0.95), fused=True)
        if not self.in_backward:
            self.adamws = [adamw(self.groups)]
            return
        self.adamws = []
        for group in self.groups:
            for parameter in group["params"]:
                own = adamw([parameter], weight_decay=group["weight_decay"])
                self.adamws.append(own)
                parameter.register_post_accumulate_grad_hook(partial(self._step_one, own))
        self.square_norms: list[Tensor] = []

    def set_learning_rate(self, lr: float) -> None:
        for adamw in self.adamws:
            for group in adamw.param_groups:
                group["lr"] = lr

    def before_backward(self, is_last: bool) -> None:
        """To be called before each micro-batch's backward pass; the gradients are complete after that of the last one.

        Until then, modules that are gathered once per step stay gathered, and their gradients are added up unreduced.
        """
        self.last_micro_batch = is_last
        for module in self.gathered_once:
            module.set_reshard_after_backward(is_last, recurse=False)
            module.set_requires_gradient_sync(is_last, recurse=False)

    def _step_one(self, adamw: torch.optim.AdamW, parameter: Tensor) -> None:
        if self.last_micro_batch:
            self.square_norms.append(torch.linalg.vector_norm(parameter.grad.to_local()).square())
            adamw.step()
            parameter.grad = None

    def gradient_norm(self, world: World) -> float:
        """The norm of the whole batch's gradient before clipping, which is done here too. Collective."""
        if self.in_backward:
            (square,) = world.sum(torch.stack(self.square_norms).sum().item())
            self.square_norms.clear()
            return math.sqrt(square / self.replicas)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def step(self) -> None:
        if not self.in_backward:
            self.adamws[0].step()
            self.adamws[0].zero_grad(set_to_none=True)
