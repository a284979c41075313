"""Stage 1: ELO pretraining. Detach layers of a model, train them on a new language, save them as a small model.

    torchrun --nproc_per_node=8 train.py --layers 1,32

The paper's baselines: --method full trains the whole model, --method lora adapters beside its frozen weights. One that
the paper does not measure: --method selective trains the same layers inside the frozen rest of the model.
"""

from argparse import Namespace

from elo import methods, pretraining
from elo.common.errors import UserError, exit_status
from elo.common.options import Parser
from elo.held_out_texts import open_validation, watch
from elo.methods import DEFAULT_LAYERS, METHODS, OF_LAYERS, Method
from elo.model.checkpoint import Checkpoint
from elo.model.config import ModelConfig
from elo.model.saving import ADAPTER, ADAPTER_CONFIG, export
from elo.runs.directory import add_arguments, check_out, close_run, open_run, option_values
from elo.runs.processes import World, process_group
from elo.runs.progress import alignment_after, continued, next_of_untrained, tell_result
from elo.runs.replacing import CHECKPOINTS, read_written
from elo.runs.sharding import ParallelOptions, parallelize
from elo.runs.states import complete
from elo.slicing import parse_layers
from elo.training import TrainingOptions, planned_steps, train
from elo.variants import active_vocabulary, adapted, bridge, lora
from elo.variants.active_vocabulary import ActiveVocabulary
from elo.variants.lora import LoraOptions


def main() -> None:
    arguments = parse_arguments()
    with process_group() as world:
        run(arguments, world)


def parse_arguments() -> Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--layers", help=f"to train, from 1; -1 is the last (default: {DEFAULT_LAYERS})")
    parser.add_argument("--method", choices=METHODS, default="elo", help="train (%(default)s)")
    add_arguments(parser, out="runs/elo")
    pretraining.add_arguments(parser)
    LoraOptions.add_arguments(parser)
    parser.add_argument("--bridge", action="store_true", help="a frozen map for the layers left out by --method elo")
    active_vocabulary.add_arguments(parser)
    TrainingOptions.add_arguments(parser, lr=3e-4)
    ParallelOptions.add_arguments(parser)
    return parser.parse_args()


def run(arguments: Namespace, world: World) -> None:
    adapters = LoraOptions.from_arguments(arguments)
    base = pretraining.open_base(arguments.model)
    method = choose_method(arguments, base.config, adapters)
    model = method.model  # on the meta device; `parallelize` gives it memory
    narrows = active_vocabulary.is_wanted(arguments)
    parallel = ParallelOptions.from_arguments(arguments, world)
    options = TrainingOptions.from_arguments(arguments)
    goes_on = check_out(arguments, world)
    if goes_on and arguments.merge and world.on_rank_0((arguments.out / ADAPTER_CONFIG).exists):
        merge_finished(arguments, base, world)
        return

    held_out = open_validation(arguments, base.config.vocab_size)
    windows = pretraining.open_windows(arguments, base.config, world, arguments.after, held_out)
    active = None
    if narrows:
        coverage = arguments.active_vocabulary_coverage
        active = ActiveVocabulary.of(windows.mixture.shards, model.config.vocab_size, coverage)
        active.narrow(model, keep=held_out is not None)
        world.say(str(active))
    batches = pretraining.PackedBatches(windows, arguments.batch_tokens, arguments.micro_batch, world, active)
    open_run(arguments, world, goes_on, pretraining.data_of(base, windows=windows))

    parallelize(model, world, parallel)
    if active:
        active.load_into(model, base, method.base_name)
    else:
        base.load_into(model, method.base_name)
    if adapters:
        lora.initialize(model, arguments.seed)
    if arguments.bridge:
        has_state = bool(world.from_rank_0(complete(arguments.out / CHECKPOINTS)))
        bridge.fit(model, method.layers, base, windows, arguments.dtype, world, has_state)
    after_step = watch(held_out, model, arguments, planned_steps(batches, options), world)
    done = train(model, batches, options, world, arguments.out, after_step)
    notes = pretraining.notes(arguments, method.layers, batches, done)
    if adapters:
        lora.export_adapter(arguments.out, model, base, adapters, notes, world.wait)
        if arguments.merge:
            world.on_rank_0(adapted.merge, arguments.out, base, option_values(arguments))
    else:
        export(arguments.out, model, base, method.base_name, {"elo.json": notes}, wait=world.wait)
    close_run(arguments, world)
    is_slice = arguments.method == "elo"
    after = alignment_after(arguments.out, batches, done) if is_slice else continued(arguments.out)
    tell_result(world, arguments.out, model, after)


def merge_finished(arguments: Namespace, base: Checkpoint, world: World) -> None:
    """--merge where the adapter is finished already: by a run without --merge, or one that was killed while merging."""
    open_run(arguments, world, True, pretraining.data_of(base))
    world.on_rank_0(adapted.merge, arguments.out, base, option_values(arguments))
    if not read_written(arguments.out).run["options"].get("save_every"):  # the run's, which asked for its states
        close_run(arguments, world)
    world.say(f"The adapter is merged: the model is in {arguments.out}, and the adapter in {arguments.out / ADAPTER}.")
    world.say(next_of_untrained(arguments.out, base.config.vocab_size))


def choose_method(arguments: Namespace, config: ModelConfig, adapters: LoraOptions | None) -> Method:
    if arguments.method not in OF_LAYERS and arguments.layers is not None:
        raise UserError(f"--layers {arguments.layers}: --method {arguments.method} trains all layers")
    if arguments.bridge and arguments.method != "elo":
        raise UserError(f"--bridge goes with --method elo, not with {arguments.method}")
    layers = arguments.layers and parse_layers(arguments.layers, config.num_hidden_layers)
    return methods.make(config, arguments.method, layers, adapters, arguments.bridge)


if __name__ == "__main__":
    exit_status(main)
