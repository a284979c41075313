"""Stage 2: put the trained layers back into the model and align: a short training of every parameter.

    torchrun --nproc_per_node=8 align.py --elo runs/elo --gb 1 --out runs/aligned

The documents are those that come after the ones stage 1 consumed. --gb 0 only puts the layers back. Without --elo the
unchanged model is trained: the control "alignment only", on the same documents if --after names the stage-1 run.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from elo import pretraining
from elo.common.errors import UserError, exit_status
from elo.common.options import Parser
from elo.model.checkpoint import Checkpoint
from elo.model.decoder import build
from elo.model.saving import export, save
from elo.optimizer import TrainingOptions
from elo.runs.directory import add_arguments, check_out, close_run, open_run
from elo.runs.processes import World, process_group
from elo.runs.sharding import ParallelOptions, parallelize
from elo.slicing import open_slice, slice_name
from elo.training import planned_steps, train


def main() -> None:
    arguments = parse_arguments()
    with process_group() as world:
        run(arguments, world)


def parse_arguments() -> Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--elo", type=Path, metavar="DIR", help="stage-1 result whose layers go into --model")
    parser.add_argument(
        "--after", type=Path, metavar="DIR", help="take the documents after this run's (default: --elo)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/aligned"), metavar="DIR", help="(%(default)s)")
    add_arguments(parser)
    pretraining.add_arguments(parser, gb=1.0)
    TrainingOptions.add_arguments(parser, lr=2e-5)
    ParallelOptions.add_arguments(parser)
    return parser.parse_args()


def run(arguments: Namespace, world: World) -> None:
    base = pretraining.open_base(arguments.model)
    trained, layers = open_slice(arguments.elo, base) if arguments.elo else (None, ())
    parallel = ParallelOptions.from_arguments(arguments, world)
    options = TrainingOptions.from_arguments(arguments)
    goes_on = check_out(arguments, world)
    held_out = pretraining.open_validation(arguments, base.config)
    if arguments.gb == 0:
        if held_out:
            raise UserError("--gb 0 only puts the layers back: python -m eval perplexity is what measures the result")
        open_run(arguments, world, goes_on, {})
        write_replaced(arguments, base, trained, layers)
        return close_run(arguments, world)

    after = arguments.after or arguments.elo
    windows = pretraining.open_windows(arguments, base.config, world, after, held_out)
    batches = pretraining.PackedBatches(windows, arguments.batch_tokens, arguments.micro_batch, world)
    open_run(arguments, world, goes_on, pretraining.data_of(base, trained, windows))

    model = parallelize(build(base.config), world, parallel)
    base.load_into(model)
    if trained:
        trained.load_into(model, partial(slice_name, layers=layers))
    after_step = pretraining.watch(held_out, model, arguments, planned_steps(batches, options), world)
    done = train(model, batches, options, world, arguments.out, after_step)
    notes = {"elo.json": pretraining.notes(arguments, layers, batches, done)}
    export(arguments.out, model, base, notes=notes, wait=world.wait)
    return close_run(arguments, world)


def write_replaced(arguments: Namespace, base: Checkpoint, trained: Checkpoint | None, layers: tuple[int, ...]) -> None:
    """--gb 0: the base's tensors as they are, but for the trained layers."""

    def origin(name: str) -> tuple[Checkpoint, str]:
        in_slice = slice_name(name, layers)
        return (base, name) if in_slice is None else (trained, in_slice)

    def tensor(name: str) -> Tensor:
        checkpoint, stored = origin(name)
        return checkpoint.tensor(stored)

    def dtype(name: str) -> torch.dtype:
        checkpoint, stored = origin(name)
        return checkpoint.dtype(stored)

    notes = {"elo.json": pretraining.notes(arguments, layers)}
    save(arguments.out, base.config, tensor, dtype, companions=base.directory, notes=notes)


if __name__ == "__main__":
    exit_status(main)
