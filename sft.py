"""Stage 3b: bilingual instruction tuning of every parameter on conversations, as many in each language.

    torchrun --nproc_per_node=8 sft.py --model runs/chat --data tagengo.parquet --languages ko,en \\
        --samples 31000 --epochs 10 --out runs/sft

The loss counts the assistant's words and its end-of-turn token, nothing else: no empty answers, and none that the data
take out of it, as by {"weight": 0} in a message. With --validation-fraction every epoch ends with the loss on held-out
conversations.
"""

import math
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from elo.common.errors import UserError, exit_status
from elo.common.options import Parser
from elo.common.written import Written
from elo.data import conversations
from elo.data.conversation_batches import ConversationBatches
from elo.data.conversations import load_conversations
from elo.model.checkpoint import CONFIG, Checkpoint
from elo.model.decoder import CausalLM, build
from elo.model.saving import copy, export, model_files
from elo.optimizer import TrainingOptions
from elo.runs.directory import add_arguments, check_out, close_run, open_run, option_values, read_metrics
from elo.runs.processes import World, process_group
from elo.runs.progress import tell_result
from elo.runs.replacing import read_written
from elo.runs.sharding import ParallelOptions, parallelize
from elo.text.built_in_formats import FORMATS
from elo.text.chat_format import ChatFormat, chat_format
from elo.text.chat_result import tuned_config, write_chat_files
from elo.text.tokenizer import load_tokenizer
from elo.training import train
from elo.validation import summed_losses

TIME = "time"  # in run.json's data


def main() -> None:
    arguments = parse_arguments()
    with process_group() as world:
        run(arguments, world)


def parse_arguments() -> Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint to tune")
    parser.add_argument("--out", type=Path, default=Path("runs/sft"), metavar="DIR", help="(%(default)s)")
    add_arguments(parser)
    parser.add_argument("--chat-format", choices=FORMATS, help="(default: the checkpoint's)")
    parser.add_argument(
        "--keep", choices=("last", "best", "every"), default="last", help="epoch whose model is kept (%(default)s)"
    )
    conversations.add_arguments(parser)
    TrainingOptions.add_arguments(parser, lr=1e-5)
    ParallelOptions.add_arguments(parser)
    return parser.parse_args()


def run(arguments: Namespace, world: World) -> None:
    base = Checkpoint(arguments.model)
    base.config.check_seq_len(arguments.seq_len)
    if arguments.keep == "best" and not arguments.validation_fraction:
        raise UserError("--keep best needs --validation-fraction, to tell which epoch is the best")
    if arguments.validate_every and not arguments.validation_fraction:
        raise UserError("--validate-every needs --validation-fraction, which holds conversations out")
    parallel = ParallelOptions.from_arguments(arguments, world)
    options = TrainingOptions.from_arguments(arguments)
    goes_on = check_out(arguments, world)
    now = world.on_rank_0(partial(time_of_run, arguments.out, goes_on))
    tokenizer = load_tokenizer(arguments.model, base.config.vocab_size)
    chat = chat_format(arguments.model, tokenizer, arguments.chat_format, now)
    every, report = load_conversations(
        arguments.data,
        chat,
        arguments.seq_len,
        arguments.languages,
        arguments.samples,
        arguments.seed,
        arguments.skip_malformed,
    )
    world.say(*report.lines())
    training, held_out = every.split(arguments.validation_fraction, arguments.seed)
    shape = arguments.batch_conversations, arguments.micro_batch_tokens
    batches = ConversationBatches(training, *shape, arguments.epochs, arguments.seed, world)
    validation = ConversationBatches(held_out, *shape, 1, arguments.seed, world) if len(held_out) else None
    data = {"conversations": every.digest(), "model": base.fingerprint(), **({TIME: now} if chat.needs_time else {})}
    open_run(arguments, world, goes_on, data)

    model = parallelize(build(tuned_config(base.config, chat)), world, parallel, shapes_vary=True)
    base.load_into(model)
    epochs = Epochs(arguments, model, base, chat, batches, validation, world)
    done = train(model, batches, options, world, arguments.out, after_step=epochs.after_step)
    epochs.finish(done)
    close_run(arguments, world)
    tell_result(world, arguments.out, model, ["-m", "elo.generation", "--model", arguments.out])


def time_of_run(out: Path, goes_on: bool) -> float:
    """What the chat template takes for now, in seconds since 1970: when the run began, or its texts would change."""
    began = read_written(out).run["data"].get(TIME) if goes_on else None
    return began if isinstance(began, float) else time.time()


class Epochs:
    """What happens at the end of an epoch: the held-out loss, and a checkpoint in OUT/epoch-N if it is to be kept."""

    def __init__(
        self,
        arguments: Namespace,
        model: CausalLM,
        base: Checkpoint,
        chat: ChatFormat,
        batches: ConversationBatches,
        validation: ConversationBatches | None,
        world: World,
    ) -> None:
        self.out, self.keep, self.model, self.base = arguments.out, arguments.keep, model, base
        self.batches, self.validation, self.world = batches, validation, world
        self.validate_every = arguments.validate_every
        self.chat_files = partial(write_chat_files, chat)
        self.best = world.on_rank_0(self.best_so_far)
        self.notes = {"base": str(Path(arguments.model).resolve()), "options": option_values(arguments)}

    def after_step(self, step: int, is_last: bool) -> dict[str, Any]:
        epoch, rest = divmod(step, self.batches.steps_per_epoch)
        is_due = not rest or (self.validate_every and (is_last or step % self.validate_every == 0))
        ended: dict[str, Any] = {} if rest else {"epoch": epoch}
        is_best = False
        if self.validation is not None and is_due:
            loss = ended["validation_loss"] = self.held_out_loss()
            self.world.say(f"{f'step {step}' if rest else f'epoch {epoch}'}: held-out loss {loss:.4f}")
        if rest:
            return ended
        if self.validation is not None:
            is_best = self.best is None or (number(loss), epoch) < self.best
            self.best = (number(loss), epoch) if is_best else self.best
        if self.keep == "every" or (self.keep == "best" and is_best):
            self.save(epoch)
        if self.keep == "best" and is_best and self.world.rank == 0:
            for directory in self.out.glob("epoch-*"):
                if directory != self.directory(epoch):
                    self.remove(directory)
        return ended

    def held_out_loss(self) -> float:
        """In nats a trained token, over all that is held out. Collective."""
        batches, steps = self.validation, range(len(self.validation))
        pairs = ((0, *pair) for step in steps for pair in batches.micro_batches(step))
        return summed_losses(self.model, pairs, 1, self.world)[0] / sum(map(batches.label_count, steps))

    def best_so_far(self) -> tuple[float, int] | None:
        """(loss, epoch) of the best epoch that an interrupted run saved."""
        lines = read_metrics(self.out)
        ended = [
            (number(line["validation_loss"]), line["epoch"])
            for line in lines
            if {"validation_loss", "epoch"} <= line.keys()
        ]
        return min((best for best in ended if (self.directory(best[1]) / CONFIG).exists()), default=None)

    def directory(self, epoch: int) -> Path:
        return self.out / f"epoch-{epoch}"

    def remove(self, directory: Path) -> None:
        """What this run has saved there, and nothing else."""
        Written(self.out).remove(f"{directory.name}/{name}" for name in model_files(directory))

    def save(self, epoch: int) -> None:
        notes = {"sft.json": {**self.notes, "epoch": epoch}}
        to = self.directory(epoch)
        export(to, self.model, self.base, notes=notes, beside=self.chat_files, wait=self.world.wait, out=self.out)

    def finish(self, steps: int) -> None:
        """The model of the run: the last one, or that of the best epoch, if one has ended."""
        best = self.world.on_rank_0(self.best_so_far) if self.keep == "best" else None
        if best:
            if self.world.rank == 0:
                # A copy first: of files that were moved, a kill half-way would leave a part here and a part there.
                copy(self.directory(best[1]), self.out)
                self.remove(self.directory(best[1]))
            return
        if self.keep == "best":
            self.world.say(f"no epoch's model is there: it is that after step {steps}")
        notes = {"sft.json": {**self.notes, "steps": steps}}
        export(self.out, self.model, self.base, notes=notes, beside=self.chat_files, wait=self.world.wait)


def number(loss: float) -> float:
    """A loss to compare: nan is worse than any other."""
    return math.inf if math.isnan(loss) else loss


if __name__ == "__main__":
    exit_status(main)
