"""Stage 1: ELO pretraining. Detach layers of a model, train them on a new language, save the small model.

    torchrun --nproc_per_node=8 train.py --layers 1,32

--method full trains the whole model instead and --method lora adapters beside its frozen weights: the baselines that
the paper compares with.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

from elo import pretraining
from elo.common.errors import UserError, exit_status
from elo.common.options import Parser
from elo.model.decoder import build
from elo.model.saving import export
from elo.runs.directory import add_arguments, check_out, close_run, open_run
from elo.runs.processes import World, process_group
from elo.runs.sharding import ParallelOptions, parallelize
from elo.slicing import base_name, detach, freeze_all_but_layers, parse_layers
from elo.training import TrainingOptions, train
from elo.variants import active_vocabulary, lora
from elo.variants.active_vocabulary import ActiveVocabulary
from elo.variants.lora import LoraOptions


def main() -> None:
    arguments = parse_arguments()
    with process_group() as world:
        run(arguments, world)


def parse_arguments() -> Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--layers", help="to detach and train, from 1; -1 is the last (default: 1,-1)")
    parser.add_argument("--method", choices=("elo", "full", "lora"), default="elo", help="train (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/elo"), metavar="DIR", help="the run's directory (%(default)s)"
    )
    add_arguments(parser)
    pretraining.add_arguments(parser)
    LoraOptions.add_arguments(parser)
    active_vocabulary.add_arguments(parser)
    TrainingOptions.add_arguments(parser, lr=3e-4)
    ParallelOptions.add_arguments(parser)
    return parser.parse_args()


def run(arguments: Namespace, world: World) -> None:
    adapters = LoraOptions.from_arguments(arguments)
    base = pretraining.open_base(arguments.model)
    layers, config, source = None, base.config, lambda name: name
    if arguments.method == "elo":
        layers = parse_layers(arguments.layers or "1,-1", base.config.num_hidden_layers)
        config, source = detach(base.config, layers), partial(base_name, layers=layers)
    elif arguments.layers:
        raise UserError(f"--layers {arguments.layers}: --method {arguments.method} trains all layers")
    model = build(config)  # without memory yet
    if arguments.method == "elo":
        freeze_all_but_layers(model)
    elif adapters:
        lora.attach(model, adapters, arguments.seed)
        source = lora.base_name
    narrows = active_vocabulary.is_wanted(arguments)
    parallel = ParallelOptions.from_arguments(arguments, world)
    options = TrainingOptions.from_arguments(arguments)
    goes_on = check_out(arguments, world)
    windows = pretraining.open_windows(arguments, config, world)
    active = None
    if narrows:
        active = ActiveVocabulary.of(windows.mixture.shards, config.vocab_size, arguments.active_vocabulary_coverage)
        active.narrow(model)
        world.say(str(active))
    batches = pretraining.PackedBatches(windows, arguments.batch_tokens, arguments.micro_batch, world, active)
    open_run(arguments, world, goes_on, pretraining.data_of(base, None, windows))

    parallelize(model, world, parallel)
    if active:
        active.load_into(model, base, source)
    else:
        base.load_into(model, source)
    if adapters:
        lora.initialize(model, arguments.seed)
    done = train(model, batches, options, world, arguments.out)
    notes = pretraining.notes(arguments, layers, batches, done)
    if adapters:
        lora.export(arguments.out, model, base, adapters, notes, arguments.merge, world.wait)
    else:
        export(arguments.out, model, base, source, {"elo.json": notes}, wait=world.wait)
    close_run(arguments, world)


if __name__ == "__main__":
    exit_status(main)
