"""Stage 3b: bilingual instruction tuning of every parameter on conversations, as many in each language.

    torchrun --nproc_per_node=8 sft.py --model runs/chat --data tagengo.parquet --languages ko,en \\
        --samples 31000 --epochs 10 --out runs/sft

The loss counts the assistant's words and its end-of-turn token, nothing else: no empty answers, and none that the data
take out of it, as by {"weight": 0} in a message. With --validation or --validation-fraction every epoch ends with the
loss of held-out conversations.
"""

import math
import time
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from elo.common.errors import UserError, exit_status
from elo.common.options import Parser
from elo.common.written import Written
from elo.data import conversations
from elo.data.conversation_batches import ConversationBatches, Conversations
from elo.data.conversation_records import message_digests
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
from elo.validation import HeldOut, held_out_conversations

TIME = "time"  # in run.json's data


def main() -> None:
    arguments = parse_arguments()
    with process_group() as world:
        run(arguments, world)


def parse_arguments() -> Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint to tune")
    add_arguments(parser, out="runs/sft")
    parser.add_argument("--chat-format", choices=FORMATS, help="(default: the checkpoint's)")
    keeps = ("last", "best", "every")
    parser.add_argument("--keep", choices=keeps, default="last", help="epoch whose model is kept (%(default)s)")
    conversations.add_arguments(parser)
    TrainingOptions.add_arguments(parser, lr=1e-5)
    ParallelOptions.add_arguments(parser)
    return parser.parse_args()


def run(arguments: Namespace, world: World) -> None:
    base = Checkpoint(arguments.model)
    base.config.check_seq_len(arguments.seq_len)
    needs = "--keep best" if arguments.keep == "best" else "--validate-every" if arguments.validate_every else None
    if needs and not (arguments.validation or arguments.validation_fraction):
        raise UserError(f"{needs} needs --validation FILE or --validation-fraction, conversations that are held out")
    parallel = ParallelOptions.from_arguments(arguments, world)
    options = TrainingOptions.from_arguments(arguments)
    goes_on = check_out(arguments, world)
    now = world.on_rank_0(time_of_run, arguments.out, goes_on)
    tokenizer = load_tokenizer(arguments.model, base.config.vocab_size)
    chat = chat_format(arguments.model, tokenizer, arguments.chat_format, now)
    watched = load_validation(arguments, chat, world)
    every, report = load_conversations(
        arguments.data,
        chat,
        arguments.seq_len,
        arguments.languages,
        arguments.samples,
        arguments.seed,
        arguments.skip_malformed,
        message_digests(arguments.validation or ()),
    )
    world.say(*report.lines())
    training, split_off = every.split(arguments.validation_fraction, arguments.seed)
    watched = watched or split_off
    held_out = held_out_conversations(watched, arguments.micro_batch_tokens) if len(watched) else None
    shape = arguments.batch_conversations, arguments.micro_batch_tokens
    batches = ConversationBatches(training, *shape, arguments.epochs, arguments.seed, world)
    data = {"conversations": every.digest(), "model": base.fingerprint(), **({TIME: now} if chat.needs_time else {})}
    if arguments.validation and arguments.keep == "best":
        data["conversations of --validation"] = watched.digest()
    open_run(arguments, world, goes_on, data)

    model = parallelize(build(tuned_config(base.config, chat)), world, parallel, shapes_vary=True)
    base.load_into(model)
    epochs = Epochs(arguments, model, base, chat, batches, held_out, world)
    done = train(model, batches, options, world, arguments.out, after_step=epochs.after_step)
    epochs.finish(done)
    close_run(arguments, world)
    tell_result(world, arguments.out, model, ["-m", "elo.generation", "--model", arguments.out])


def load_validation(arguments: Namespace, chat: ChatFormat, world: World) -> Conversations | None:
    """All conversations of the files of --validation, if it is given, each of which has one at least."""
    if not arguments.validation:
        return None
    fitting = {"seq_len": arguments.seq_len, "skip_malformed": arguments.skip_malformed}
    try:
        held_out, report = load_conversations(arguments.validation, chat, **fitting)
    except UserError as error:
        raise UserError(f"--validation: {error}") from None
    for number, file in enumerate(held_out.files):
        if number not in held_out.table["file"]:
            raise UserError(f"--validation {file}: no conversation there has an answer that fits into --seq-len")
    world.say(*(f"held out: {line}" for line in report.lines()))
    return held_out


def time_of_run(out: Path, goes_on: bool) -> float:
    """What the chat template takes for now, in seconds since 1970: when the run began, or its texts would change."""
    began = read_written(out).run["data"].get(TIME) if goes_on else None
    return began if isinstance(began, float) else time.time()


@dataclass
class Epochs:
    """What happens at the end of an epoch: the held-out loss, and a checkpoint in OUT/epoch-N if it is to be kept."""

    arguments: Namespace
    model: CausalLM
    base: Checkpoint
    chat: ChatFormat
    batches: ConversationBatches
    held_out: HeldOut | None
    world: World

    def __post_init__(self) -> None:
        self.out, self.keep = self.arguments.out, self.arguments.keep
        self.best = self.world.on_rank_0(self.best_so_far)

    def after_step(self, step: int, is_last: bool) -> dict[str, Any]:
        epoch, rest = divmod(step, self.batches.steps_per_epoch)
        every = self.arguments.validate_every
        ended: dict[str, Any] = {} if rest else {"epoch": epoch}
        if self.held_out and (not rest or is_last or (every and step % every == 0)):
            ended |= self.held_out.measure(self.model, f"step {step}" if rest else f"epoch {epoch}", self.world)
        if rest:
            return ended
        is_best = False
        if self.held_out:
            this = number(ended["validation_loss"]), epoch
            is_best = self.best is None or this < self.best
            self.best = this if is_best else self.best
        if self.keep == "every" or (self.keep == "best" and is_best):
            self.save(self.directory(epoch), epoch=epoch)
        if self.keep == "best" and is_best and self.world.rank == 0:
            for directory in self.out.glob("epoch-*"):
                if directory != self.directory(epoch):
                    self.remove(directory)
        return ended

    def best_so_far(self) -> tuple[float, int] | None:
        """(loss, epoch) of the best epoch that an interrupted run saved."""
        ended = [line for line in read_metrics(self.out) if {"validation_loss", "epoch"} <= line.keys()]
        losses = [(number(line["validation_loss"]), line["epoch"]) for line in ended]
        return min((best for best in losses if (self.directory(best[1]) / CONFIG).exists()), default=None)

    def directory(self, epoch: int) -> Path:
        return self.out / f"epoch-{epoch}"

    def remove(self, directory: Path) -> None:
        """What this run has saved there, and nothing else."""
        Written(self.out).remove(f"{directory.name}/{name}" for name in model_files(directory))

    def save(self, to: Path, **how_far: int) -> None:
        notes = {"base": str(self.base.directory.resolve()), "options": option_values(self.arguments), **how_far}
        chat_files = partial(write_chat_files, self.chat)
        export(
            to, self.model, self.base, notes={"sft.json": notes}, beside=chat_files, wait=self.world.wait, out=self.out
        )

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
        self.save(self.out, steps=steps)


def number(loss: float | None) -> float:
    """A loss to compare: one that is no number is worse than any other."""
    return math.inf if loss is None or math.isnan(loss) else loss


if __name__ == "__main__":
    exit_status(main)
