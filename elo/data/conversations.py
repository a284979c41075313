"""Files of conversations to masked examples, for bilingual instruction tuning.

conversations, report = load_conversations(["tagengo.parquet"], format, seq_len=2048,
                                           languages=["Korean", "English"], samples=31_000)
training, held_out = conversations.split(0.01, seed=0)
batches = ConversationBatches(training, 64, 8192, epochs=10, seed=0, world=world)  # of elo.data.conversation_batches
"""

import heapq
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from elo.common.errors import UserError
from elo.common.options import Parser, positive_int, seed, share
from elo.common.terminal import note
from elo.data.conversation_batches import Conversations, Example, random_numbers, store
from elo.data.conversation_records import (
    LANGUAGE,
    SUPPORTED,
    is_blank,
    language_list,
    message_digest,
    read_conversation_records,
    read_language,
    read_messages,
    text_bytes,
)
from elo.data.json_records import MalformedError, Skipped, place
from elo.text.chat_format import ChatFormat
from elo.text.chat_template import TRAIN, Messages, TemplateError


def add_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", required=True, metavar="FILE", help=f"conversations: {SUPPORTED}")
    group.add_argument(
        "--languages", type=language_list, metavar="A,B", help="as many of each, names or codes such as ko,en"
    )
    group.add_argument("--samples", type=positive_int, help="conversations in all (default: as many as there are)")
    held_out = group.add_mutually_exclusive_group()
    held_out.add_argument("--validation", nargs="+", metavar="FILE", help=(
        "held-out conversations, never trained on: the loss of their answers after every epoch"))  # fmt: skip
    held_out.add_argument("--validation-fraction", type=share, default=0.0, help="or so many of --data (%(default)s)")
    group.add_argument("--validate-every", type=positive_int, metavar="N", help="and every N steps")
    group.add_argument("--skip-malformed", action="store_true", help="count and report malformed records")
    group.add_argument("--seed", type=seed, default=0, help="of draw, split and shuffle (%(default)s)")
    group.add_argument("--seq-len", type=positive_int, default=2048, help="tokens of the longest one (%(default)s)")
    group.add_argument(
        "--batch-conversations", type=positive_int, default=64, help="in a step, over all processes (%(default)s)"
    )
    group.add_argument(
        "--micro-batch-tokens", type=positive_int, default=8192, help="at a time in a process (%(default)s)"
    )
    group.add_argument("--epochs", type=positive_int, default=10, help="(%(default)s)")


@dataclass
class Report:
    """What happened to the conversations in the files; counts are by language unless a comment says otherwise."""

    found: Counter[str] = field(default_factory=Counter)
    drawn: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    unanswered: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)  # by file
    malformed: Skipped = field(default_factory=Skipped)
    unread: set[str] = field(default_factory=set)  # fields

    def lines(self) -> list[str]:
        drawn = (f"{count:,} of {self.found[name]:,} {name}".strip() for name, count in self.drawn.items())
        lines = [f"{sum(self.drawn.values()):,} conversations: {', '.join(drawn)}"]
        if self.cut:
            lines.append(f"{self.cut:,} of them end early, with the last answer that fits into --seq-len")
        if self.unanswered:
            lines.append(f"{self.unanswered:,} of them without the last message, which has no answer")
        lines += [f"dropped {count:,}: {reason}" for reason, count in self.dropped.items()]
        lines += [f"skipped {count:,}: {kind} (first at {first})" for kind, (count, first) in self.malformed.items()]
        if self.unread:
            lines.append(f"fields that are not read: {', '.join(sorted(self.unread))}")
        return lines


def load_conversations(
    paths: Sequence[str | Path],
    format: ChatFormat,
    seq_len: int,
    languages: Sequence[str] | None = None,
    samples: int | None = None,
    seed: int = 0,
    skip_malformed: bool = False,
    held_out: Collection[bytes] = (),
) -> tuple[Conversations, Report]:
    """Draw and tokenize conversations.

    With `languages` (names, see `language_name`) it draws equally many of each: `samples` in all, the remainder from
    the first languages, or without `samples` as many as the rarest language has. Without `languages` all are one pool.
    Conversations whose `message_digest` is in `held_out` are left out, and counted for each file on stderr.

    Raises UserError with file and line for a malformed record, unless `skip_malformed`; if there are too few
    conversations; and for records without a language if `languages` are asked for.
    """
    files = [str(path) for path in {os.path.realpath(path): path for path in paths}.values()]  # each once
    report, found_languages = Report(), {name: number for number, name in enumerate(languages or [])}
    if samples is not None and samples < len(found_languages):
        raise UserError(f"--samples {samples} are fewer than the {len(found_languages)} languages")
    pools = _pools(languages, samples, seed)
    records = (
        (file, *record) for file, path in enumerate(files) for record in read_conversation_records(path, report.unread)
    )
    for file, number, record in records:
        try:
            language = read_language(record)
            if languages and LANGUAGE not in record:
                raise UserError(f"{place(files[file], number)}: no {LANGUAGE!r}, which --languages needs")
            report.found[language or ""] += 1
            pool = pools.get(language) if languages else pools[None]
            if pool is None:
                continue
            messages = read_messages(record, report.unread)
            if held_out and message_digest(messages) in held_out:
                report.left_out[files[file]] += 1
                continue
            head = file, number, found_languages.setdefault(language or "", len(found_languages))
            pool.offer(partial(make_example, format, messages, seq_len, head, report.dropped))
        except MalformedError as error:
            report.malformed.add(error, files[file], number, skip_malformed)

    for path, count in report.left_out.items():
        note(f"--data: {count:,} conversations of {path} are left out, which --validation has too")
    examples = sorted(_draw(pools, samples, report), key=lambda example: example.row)
    conversations = store(examples, files, list(found_languages))
    counts = np.bincount(conversations.table["language"], minlength=len(found_languages))
    report.drawn = {name: int(counts[number]) for name, number in found_languages.items()}
    report.cut = int(conversations.table["is_cut"].sum())
    report.unanswered = int(conversations.table["is_unanswered"].sum())
    return conversations, report


def make_example(
    format: ChatFormat, messages: Messages, seq_len: int, head: tuple[int, int, int], dropped: Counter[str]
) -> Example | None:
    """A conversation up to its last whole trained answer that fits into `seq_len`; None if none does, with the reason
    counted in `dropped`.

    Answers without text are not trained, or the model would learn to stop at once. Answers that are not trained stay as
    context for later ones.

    Raises `MalformedError` for what the checkpoint's chat template refuses; many refuse a system message.
    """
    blank = [message for message in messages if message["role"] == "assistant" and is_blank(message["content"])]
    if blank:
        dropped["an answer without text"] += len(blank)
        messages = [{**message, TRAIN: message[TRAIN] and message not in blank} for message in messages]
    following = [message["role"] for message in messages[1:]] + ["user"]
    ends, is_trained = [], False
    for number, (message, next_role) in enumerate(zip(messages, following, strict=True), start=1):
        is_trained = message["role"] == "assistant" and (is_trained or message[TRAIN])
        if is_trained and next_role != "assistant":
            ends.append(number)
    if not ends:
        has_answers = any(message["role"] == "assistant" for message in messages)
        dropped["no answer in it is to be trained" if has_answers else "no answer in it"] += 1
        return None
    # Encoded anew for every end: where Mistral's system message stands depends on it.
    try:
        ids, trained = format.conversation(messages[: ends[-1]])
    except TemplateError as error:
        raise MalformedError("the chat template does not take it", str(error)) from None
    kept, is_cut = ends[-1], len(ids) > seq_len
    if is_cut:
        fitting = bisect_right(ends, seq_len, key=lambda end: len(format.conversation(messages[:end])[0]))
        if fitting == 0:
            dropped["no answer fits into --seq-len"] += 1
            return None
        kept = ends[fitting - 1]
        ids, trained = format.conversation(messages[:kept])
    is_unanswered = not is_cut and messages[-1]["role"] == "user"
    row = (*head, is_cut, is_unanswered, sum(trained), text_bytes(messages[:kept]), len(ids))
    return Example(np.array(ids, np.uint32), np.array(trained), row)


class Pool:
    """Draws `size` examples in one pass, or all: those with the smallest of random numbers.

    An example is made only if it is among the smallest so far, so that of a large file little is tokenized. None: it
    cannot be made.
    """

    def __init__(self, size: int | None, random: np.random.RandomState) -> None:
        self.size, self.random = size, random
        self.heap: list[tuple[float, int, Any]] = []  # the largest number first, as its negative
        self.offered = self.refused = 0

    def offer(self, make: Callable[[], Any]) -> None:
        key = -self.random.random_sample()
        self.offered += 1
        is_full = self.size is not None and len(self.heap) >= self.size
        if is_full and key < self.heap[0][0]:
            return
        self.refused += 1  # unless it can be made
        example = make()
        if example is None:
            return
        self.refused -= 1
        heapq.heappush(self.heap, (key, self.offered, example))
        if is_full:
            heapq.heappop(self.heap)

    def draw(self, size: int) -> list[Any]:
        """The `size` examples with the smallest numbers."""
        return [example for *_, example in heapq.nlargest(size, self.heap)]


def _pools(languages: Sequence[str] | None, samples: int | None, seed: int) -> dict[str | None, Pool]:
    if not languages:
        return {None: Pool(samples, random_numbers(seed, "draw"))}
    each, rest = divmod(samples, len(languages)) if samples is not None else (None, 0)
    sizes = [each if each is None else each + (number < rest) for number in range(len(languages))]
    return {name: Pool(size, random_numbers(seed, "draw", name)) for name, size in zip(languages, sizes, strict=True)}


def _draw(pools: dict[str | None, Pool], samples: int | None, report: Report) -> list[Example]:
    """The examples of every pool; without `samples`, as many of each as the smallest has. UserError for too few."""
    if any(len(pool.heap) < (pool.size or 1) for pool in pools.values()):
        needed = (f"{pool.size or 1:,} {name or ''}".strip() for name, pool in pools.items())
        usable = (f"{pool.offered - pool.refused:,} {name or ''}".strip() for name, pool in pools.items())
        found = (f"{count:,} {name or 'of no language'}" for name, count in report.found.most_common(12))
        dropped = report.dropped + Counter({"--validation has it too": report.left_out.total()})
        raise UserError(
            f"too few conversations: {' and '.join(needed)} needed, {' and '.join(usable)} usable"
            + "".join(f", {count:,} dropped: {reason}" for reason, count in dropped.items())
            + f"; in the files there are {', '.join(found) or 'none'}"
        )
    fewest = min(len(pool.heap) for pool in pools.values())
    return [example for pool in pools.values() for example in pool.draw(pool.size or fewest)]
