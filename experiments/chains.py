"""What an experiment is made of: commands of the stages' scripts, each one's inputs the results of others."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Union

Word = Union[str, "Run", "Best", "EqualTime", "Needs"]
SEED = "--seed="


def digest(*words: object) -> str:
    text = "\0".join(word if isinstance(word, str) else word.key for word in words)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """A command. A run among its words stands for that run's directory, `{here}` for its own."""

    script: str
    words: tuple[Word, ...]

    @cached_property
    def key(self) -> str:
        """The same command has the same directory, whichever row or experiment it belongs to."""
        return digest(self.script, *self.words)

    @property
    def name(self) -> str:
        return f"{self.script.removesuffix('.py').replace(' ', '-')}-{self.key}"


@dataclass(frozen=True)
class Best:
    """The candidate whose judge, a run with --validation, comes to the fewest bits a byte."""

    candidates: tuple[Word, ...]
    judges: tuple[Word, ...]

    @cached_property
    def key(self) -> str:
        return digest("best", *self.candidates, *self.judges)


@dataclass(frozen=True)
class EqualTime:
    """A --gb: that of `like`, made larger until training takes as long as the whole chain of `chain` did."""

    chain: Word
    like: Word

    @cached_property
    def key(self) -> str:
        return digest("equal time", self.chain, self.like)


@dataclass(frozen=True)
class Needs:
    """No word of the command: a run that has to be done before it."""

    run: Run

    @property
    def key(self) -> str:
        return self.run.key


@dataclass(frozen=True)
class Row:
    """A row of a table, or a point of a figure: series and place in it."""

    name: str
    model: Word  # after pretraining, before the chat vector
    control: Word | None = None  # of ELO: alignment only, which --equal-time makes as long
    paper: dict[str, float] = field(default_factory=dict)  # column -> what the paper has for this model and language
    series: str = ""
    at: float = 0.0


Choose = Callable[[Best], int]


def choose_first(best: Best) -> int:
    return 0


def needed(word: Word, choose: Choose = choose_first, judges: bool = True) -> Iterator[Run]:
    """The runs that a word needs, each after those that it needs itself, without choices in them.

    Lazily: who takes a run from here has done it before the next one, which may be a choice by its result. Without
    `judges` only those that a model is made of.
    """
    if isinstance(word, Run):
        for option, part in zip(("", *word.words), word.words, strict=False):
            if judges or option != "--after":
                yield from needed(part, choose, judges)
        yield changed(word, choose)
    elif isinstance(word, Best):
        for judge in word.judges if judges else ():
            yield from needed(judge, choose)
        yield from needed(word.candidates[choose(word)], choose, judges)
    elif isinstance(word, Needs):
        yield from needed(word.run, choose, judges)
    elif isinstance(word, EqualTime) and judges:
        yield from needed(word.chain, choose)
        yield from needed(word.like, choose)


def changed(word: Word, choose: Choose | None = None, seed: int | None = None) -> Word:
    """The same with every choice made, or of another seed."""
    if isinstance(word, str):
        return f"{SEED}{seed}" if seed is not None and word.startswith(SEED) else word
    if isinstance(word, Best) and choose:
        return changed(word.candidates[choose(word)], choose, seed)
    change = partial(changed, choose=choose, seed=seed)
    parts = {item.name: getattr(word, item.name) for item in fields(word)}
    return replace(word, **{
        name: tuple(map(change, part)) if isinstance(part, tuple) else change(part) for name, part in parts.items()
    })  # fmt: skip
