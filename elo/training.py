"""The training loop of every stage: schedule, accumulation, clipping, log, saving and resuming."""

import math
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from elo.distributed import DTYPES, StopSignal, World, peak_memory
from elo.errors import UserError
from elo.model import CausalLM
from elo.options import Parser, not_negative, not_negative_int, positive, positive_int, share
from elo.run import Metrics, States


class Batches(Protocol):
    """What a stage trains on: one global batch a step, the same for any number of processes and any micro-batch."""

    def __len__(self) -> int:
        """The number of steps."""

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of a step as (tokens, labels), equally many and of equal shape on every process."""

    def label_count(self, step: int) -> int:
        """Labels that count in the whole batch, over all processes."""

    def consumed(self, steps: int) -> dict[str, int]:
        """What the run has used up after so many steps: `tokens`, `bytes`, ..."""

    def documents(self, step: int) -> list[str]:
        """Where the batch's text comes from, as file:line."""


@dataclass(frozen=True)
class TrainingOptions:
    """Options of the loop. The defaults are this project's own: the paper gives no hyperparameters."""

    lr: float
    warmup: float
    min_lr_ratio: float
    weight_decay: float
    clip: float
    max_steps: int | None
    save_every: int | None
    resume: bool

    @staticmethod
    def add_arguments(parser: Parser, lr: float) -> None:
        group = parser.add_argument_group("training")
        group.add_argument("--lr", type=positive, default=lr, help="peak learning rate (%(default)s)")
        group.add_argument("--warmup", type=share, default=0.05, help="share of the steps with rising lr (%(default)s)")
        group.add_argument("--min-lr-ratio", type=share, default=0.1, help="the cosine ends at this x lr (%(default)s)")
        group.add_argument("--weight-decay", type=not_negative, default=0.1, help="of matrices (%(default)s)")
        group.add_argument("--clip", type=positive, default=1.0, help="largest norm of the gradient (%(default)s)")
        group.add_argument("--max-steps", type=not_negative_int, help="stop after this many steps (default: one epoch)")
        group.add_argument("--save-every", type=positive_int, metavar="STEPS", help="save a resumable state this often")
        cuda = torch.cuda.is_available()
        group.add_argument("--dtype", choices=DTYPES, default="bf16", help="of computation (%(default)s)")
        group.add_argument(
            "--compile", action=BooleanOptionalAction, default=cuda, help="each block (default: on CUDA)"
        )
        group.add_argument("--resume", action="store_true", help="go on from the newest state in --out")

    @staticmethod
    def from_arguments(arguments: Namespace) -> "TrainingOptions":
        names = TrainingOptions.__dataclass_fields__
        return TrainingOptions(**{name: getattr(arguments, name) for name in names})


def learning_rate(step: int, steps: int, options: TrainingOptions) -> float:
    """Linear warmup, then a cosine from `lr` down to `lr * min_lr_ratio` at the last step. Steps count from 0."""
    warmup = math.ceil(options.warmup * steps)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    floor = options.min_lr_ratio
    return options.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: CausalLM, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW over the trained parameters; norms and biases are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)


def step_gradients(model: CausalLM, batches: Batches, step: int, world: World) -> float:
    """Accumulate the gradient of the batch's mean loss; returns this process's part of that loss."""
    count = batches.label_count(step)
    total = torch.zeros((), device=world.device)
    for tokens, labels in batches.micro_batches(step):
        tokens, labels = (
            tokens.to(world.device, non_blocking=True),
            labels.to(world.device, non_blocking=True),
        )
        loss = model(tokens, labels) / count
        # fully_shard averages gradients over the processes; the batch's gradient is their sum.
        (loss * world.size).backward()
        total += loss.detach()
    return total.item()


def planned_steps(batches: Batches, options: TrainingOptions) -> int:
    """One epoch, or --max-steps."""
    return len(batches) if options.max_steps is None else min(options.max_steps, len(batches))


def train(model: CausalLM, batches: Batches, options: TrainingOptions, world: World, out: Path) -> int:
    """Train through `batches`; returns the number of steps done, fewer than planned after SIGTERM or Ctrl-C.

    Writes a line a step to `out`/metrics.jsonl and resumable states to `out`/checkpoints. Raises UserError when the
    loss or the gradient is not finite, before the parameters are touched.
    """
    steps = planned_steps(batches, options)
    optimizer = make_optimizer(model, options)
    states = States(out / "checkpoints", model, optimizer, world)
    step = states.load_newest() if options.resume else 0
    begun = time.perf_counter()
    bar = tqdm(total=steps, initial=step, unit="step", disable=world.rank > 0 or not sys.stderr.isatty())

    with StopSignal() as stop, Metrics(out, step, world) as metrics:
        while step < steps:
            started = time.perf_counter()
            lr = learning_rate(step, steps, options)
            for group in optimizer.param_groups:
                group["lr"] = lr
            part = step_gradients(model, batches, step, world)
            norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], options.clip)
            norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
            loss, stopping = world.sum(part, stop.requested)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise not_finite(step + 1, loss, norm, batches.documents(step), states)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            seconds = time.perf_counter() - started
            metrics.write(
                {
                    "step": step,
                    "loss": loss,
                    "lr": lr,
                    "grad_norm": norm,
                    **batches.consumed(step),
                    "tokens_per_second": batches.label_count(step - 1) / seconds,
                    "seconds": time.perf_counter() - begun,
                    "memory_bytes": peak_memory(world.device),
                }
            )
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", refresh=False)
            bar.update()
            if stopping or (options.save_every and step % options.save_every == 0 and step < steps):
                states.save(step)
            if stopping:
                break
    bar.close()
    return step


def not_finite(step: int, loss: float, norm: float, documents: list[str], states: States) -> UserError:
    saved = states.complete()
    named, more = documents[:20], len(documents) - 20
    return UserError(
        f"step {step}: the loss is {loss} and the gradient's norm {norm}; the parameters are as before this step; "
        f"the last saved state is {saved[-1] if saved else 'none, for want of --save-every'}; "
        f"the batch's documents are {', '.join(named)}{f' and {more} more' if more > 0 else ''}"
    )
