"""Stage 2: put the trained layers back into the model and align: a short training of every parameter.

    torchrun --nproc_per_node=8 align.py --elo runs/elo --gb 1 --out runs/aligned

It trains on the documents that follow those of stage 1. --gb 0 only puts the layers back. The control "alignment only"
is --after with the stage-1 run instead of --elo: the unchanged model is trained on the same documents. --model with the
directory of a LoRA adapter, --gb 0 and no --elo merge the adapter into its base.

--scale A puts back a part of what stage 1 has learned, theta_0 + A (theta_ELO - theta_0): 1, the default, is what the
paper does; auto chooses A for each layer on the text of --validation before the alignment.
"""

from argparse import Namespace
from pathlib import Path

from elo import pretraining
from elo.common.errors import UserError, exit_status
from elo.common.options import Parser
from elo.held_out_texts import open_validation, watch
from elo.model.decoder import build
from elo.model.saving import export, save
from elo.optimizer import TrainingOptions
from elo.runs.directory import add_arguments, check_out, close_run, open_run
from elo.runs.processes import World, process_group
from elo.runs.progress import continued, next_of_untrained, tell_result
from elo.runs.sharding import ParallelOptions, parallelize
from elo.scaling import AUTO, load_best, scales
from elo.slicing import Replaced
from elo.training import planned_steps, train
from elo.variants.adapted import Adapted, open_checkpoint


def main() -> None:
    arguments = parse_arguments()
    with process_group() as world:
        run(arguments, world)


def parse_arguments() -> Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--elo", type=Path, metavar="DIR", help="stage-1 result whose layers go into --model")
    parser.add_argument("--scale", type=scales, metavar="A[,A...]", help=(
        "of their update, for all or for each of them, or auto (default: 1)"))  # fmt: skip
    add_arguments(parser, out="runs/aligned")
    pretraining.add_arguments(parser, gb=1.0)
    TrainingOptions.add_arguments(parser, lr=2e-5)
    ParallelOptions.add_arguments(parser)
    return parser.parse_args()


def run(arguments: Namespace, world: World) -> None:
    is_merge = arguments.gb == 0 and not arguments.elo
    base = open_checkpoint(arguments.model) if is_merge else pretraining.open_base(arguments.model)
    replaced = Replaced(base, arguments.elo, arguments.scale) if arguments.elo else None
    start, trained = replaced or base, replaced and replaced.trained
    if arguments.scale and not replaced:
        raise UserError("--scale is of the layers of --elo DIR, which is not given")
    is_auto = arguments.scale == AUTO
    if is_auto and not arguments.validation:
        raise UserError("--scale auto needs --validation PATH, text to choose by")
    parallel = ParallelOptions.from_arguments(arguments, world)
    options = TrainingOptions.from_arguments(arguments)
    goes_on = check_out(arguments, world)
    held_out = open_validation(arguments, base.config.vocab_size)
    if arguments.gb == 0:
        if held_out and not is_auto:
            raise UserError("--gb 0 only puts the layers back: python -m eval perplexity is what measures the result")
        open_run(arguments, world, goes_on, pretraining.data_of(base, trained))
        if is_auto:
            load_best(replaced, parallelize(build(base.config), world, parallel), held_out, arguments.out, world)
        save(arguments.out, base.config, start.tensor, start.dtype, base.directory, notes(arguments, replaced))
        close_run(arguments, world)
        is_same = not replaced and not isinstance(base, Adapted)
        what = "Without --elo nothing was put back: a copy of --model" if is_same else "The model"
        world.say(f"{what} is in {arguments.out}.", next_of_untrained(arguments.out, base.config.vocab_size))
        return

    if arguments.elo and arguments.after:
        (read, stream), (until, same) = map(pretraining.read_consumed, (arguments.elo, arguments.after))
        if stream == same and until < read:
            raise UserError(
                f"--after {arguments.after}: it ended before the run of --elo, whose documents would come again"
            )
    windows = pretraining.open_windows(arguments, base.config, world, arguments.after or arguments.elo, held_out)
    batches = pretraining.PackedBatches(windows, arguments.batch_tokens, arguments.micro_batch, world)
    open_run(arguments, world, goes_on, pretraining.data_of(base, trained, windows))

    model = parallelize(build(base.config), world, parallel)
    if is_auto:
        load_best(replaced, model, held_out, arguments.out, world)
    else:
        start.load_into(model)
    after_step = watch(held_out, model, arguments, planned_steps(batches, options), world)
    done = train(model, batches, options, world, arguments.out, after_step)
    export(arguments.out, model, base, notes=notes(arguments, replaced, batches, done), wait=world.wait)
    close_run(arguments, world)
    tell_result(world, arguments.out, model, continued(arguments.out))


def notes(arguments: Namespace, replaced: Replaced | None, *trained: object) -> dict[str, dict]:
    layers, scale = (replaced.layers, {"scale": replaced.scales}) if replaced else ((), {})
    return {"elo.json": pretraining.notes(arguments, layers, *trained) | scale}


if __name__ == "__main__":
    exit_status(main)
