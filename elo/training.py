"""The training loop of every stage: schedule, accumulation, clipping, log, saving and resuming."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from elo.common.errors import UserError
from elo.data.feed import Batches, Feed, MicroBatch
from elo.model.decoder import CausalLM
from elo.optimizer import Optimizer, TrainingOptions, learning_rate
from elo.runs.devices import peak_memory
from elo.runs.directory import CHECKPOINTS, Metrics
from elo.runs.health import Health
from elo.runs.processes import World
from elo.runs.progress import Progress
from elo.runs.states import States


def accumulate(model: CausalLM, feed: Iterator[MicroBatch], count: int, optimizer: Optimizer, world: World) -> float:
    """Run the backward passes of one step over this process's micro-batches; returns the mean loss of the whole batch.

    Collective: every process calls it. feed: yields the micro-batches and marks the step's last one; count: the labels
    that count in the batch, over all processes. If the loss is not finite, the last backward pass is left out.
    """
    total = torch.zeros((), device=world.device)
    for tokens, labels, counted, is_last in feed:
        tokens = tokens.to(world.device, non_blocking=True)
        labels = labels.to(world.device, non_blocking=True)
        loss = model(tokens, labels, counted) / count
        total += loss.detach()
        if is_last:
            # Checked before the last backward pass, which changes parameters with --optimizer-in-backward.
            (whole,) = world.sum(total.item())
            if not math.isfinite(whole):
                break
        optimizer.before_backward(is_last)
        # fully_shard averages gradients over the processes, but each `loss` is a part of the batch's mean: sum them.
        (loss * world.size).backward()
        if is_last:
            break
    return whole


def planned_steps(batches: Batches, options: TrainingOptions) -> int:
    """One epoch, or --max-steps if that is less."""
    return len(batches) if options.max_steps is None else min(options.max_steps, len(batches))


def train(
    model: CausalLM,
    batches: Batches,
    options: TrainingOptions,
    world: World,
    out: Path,
    after_step: Callable[[int, bool], dict[str, Any]] = lambda step, is_last: {},
) -> int:
    """Train on `batches`, resuming from the newest state in `out`/checkpoints; returns the number of steps done.

    Writes one line per step to `out`/metrics.jsonl, with what `after_step(step, is_last)` returns. Saves a state every
    `save_every`, after the last step, and on SIGTERM or Ctrl-C, where it then raises EarlyExit. Raises UserError if the
    loss or the gradient norm is not finite, or out of range with `stop_on_spike`, before the step changes parameters;
    only with `optimizer_in_backward` it has changed them by the time the norm is known.
    """
    steps = planned_steps(batches, options)
    optimizer = Optimizer(model, options)
    kept = options.save_every, options.keep_checkpoints
    states = States(out / CHECKPOINTS, model, optimizer.adamws, world, *kept)
    with world.stop.deferred(), states:
        step = states.load_newest()
        metrics = Metrics(out, step, world, options.tensorboard)
        with metrics, Feed(batches, range(step, steps), world.device) as feed:
            health = Health((line["loss"], line["grad_norm"]) for line in metrics.before)
            begun = time.perf_counter() - (metrics.before[-1]["seconds"] if metrics.before else 0)
            progress = Progress(steps, step, metrics.before[-1]["tokens"] if metrics.before else 0, world)
            states.between_steps(step, step == steps)

            while step < steps:
                # ---- one training step ------------------------------------------------------------------------------
                started, feed.waited = time.perf_counter(), 0.0
                torch.manual_seed(step * world.size + world.rank)  # a run that is resumed draws the same numbers
                lr = learning_rate(step, steps, options)
                optimizer.set_learning_rate(lr)
                loss = accumulate(model, feed, batches.label_count(step), optimizer, world)
                norm = optimizer.gradient_norm(world) if math.isfinite(loss) else math.nan
                wrong = health.judge(loss, norm)
                is_finite = math.isfinite(loss) and math.isfinite(norm)
                if not is_finite or (wrong and options.stop_on_spike):
                    what = f"{' and '.join(wrong)} out of range" if is_finite else "not finite"
                    raise bad_step(step + 1, what, loss, norm, batches.documents(step), states, optimizer)
                optimizer.step()
                step += 1
                # ---- its record, and perhaps a state ----------------------------------------------------------------
                seconds = time.perf_counter() - started
                line = {
                    "step": step,
                    "loss": loss,
                    "lr": lr,
                    "grad_norm": norm,
                    **batches.consumed(step),
                    "tokens_per_second": batches.label_count(step - 1) / seconds,
                    "data_seconds": feed.waited,
                    "seconds": time.perf_counter() - begun,
                    "memory_bytes": peak_memory(world.device),
                    **({"spike": wrong} if wrong else {}),
                    **after_step(step, step == steps),
                }
                metrics.write(line)
                if wrong and world.rank == 0:
                    note = f"step {step}: {' and '.join(wrong)} out of range: loss {loss:.4f}, norm {norm:.4g}"
                    tqdm.write(note, file=sys.stderr)
                progress.step(line)
                states.between_steps(step, step == steps)
            progress.close()
    return step


def bad_step(
    step: int, what: str, loss: float, norm: float, documents: list[str], states: States, optimizer: Optimizer
) -> UserError:
    """The error for a loss or norm that is not finite, or out of range. Collective."""
    states.finish_saving()
    saved = states.complete()
    changed = optimizer.in_backward and math.isfinite(loss)
    named, more = documents[:20], len(documents) - 20
    return UserError(
        f"step {step}: the loss is {loss} and the gradient's norm {norm}, {what}; "
        f"the parameters are {'lost' if changed else 'as before this step'}; "
        f"the last saved state is {saved[-1] if saved else 'none, for want of --save-every'}; "
        f"the batch's documents are {', '.join(named)}{f' and {more} more' if more > 0 else ''}"
    )
