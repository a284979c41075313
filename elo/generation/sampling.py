"""The next token from the logits: greedy, temperature, top-k, top-p, min-p, repetition penalty."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elo.common.errors import UserError
from elo.common.options import Options, not_negative, not_negative_int, option, positive, share


@dataclass(frozen=True)
class Sampling(Options):
    """How the next token is drawn; the steps, their order and their meaning are those of transformers."""

    TITLE = "sampling"
    repetition_penalty: float = option(
        "above 1: tokens of prompt and answer become less likely (%(default)s)", 1.0, type=positive, metavar="R"
    )
    temperature: float = option("0: always the likeliest token (%(default)s)", 0.0, type=not_negative)
    top_k: int = option("only the likeliest tokens; 0: all (%(default)s)", 0, type=not_negative_int, metavar="K")
    top_p: float = option("only the fewest that have this probability (%(default)s)", 1.0, type=share, metavar="P")
    min_p: float = option("only those of this x the likeliest's (%(default)s)", 0.0, type=share, metavar="P")
    seed: int = option("of the random numbers (%(default)s)", 0, type=not_negative_int)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-6  # by less the logits cannot be divided in fp32


GREEDY = Sampling()


def warp(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The logits that a token is drawn from: (batch, vocabulary), -inf for what is cut off.

    `seen`, of the logits' shape, tells which tokens the repetition penalty meets.
    """
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.is_greedy:
        return logits
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        logits = logits.masked_fill(logits < _least_likely_of_top_p(logits, sampling.top_p), -torch.inf)
    if sampling.min_p > 0:
        # Of the probabilities that top-k and top-p leave: their ratios are those of all.
        probabilities = logits.softmax(-1)
        cut = probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(cut, -torch.inf)
    return logits


def _least_likely_of_top_p(logits: Tensor, top_p: float) -> Tensor:
    """(batch, 1): the logit of the last token that top-p lets in."""
    total = logits.logsumexp(-1, keepdim=True)
    count = 64
    while True:
        # Sorting a vocabulary takes longer than all else in a step, and most of the time few tokens are enough.
        count = min(count, logits.shape[-1])
        best = logits.topk(count).values
        probability = (best - total).exp()
        inside = probability.cumsum(-1) - probability < top_p
        if count == logits.shape[-1] or not inside[:, -1].any():
            return best.gather(-1, (inside.sum(-1, keepdim=True) - 1).clamp(min=0))
        count *= 8


class Sampler:
    """Draws the next tokens of a batch. Each row has its own random numbers, from the seed and the row's name."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], names: Sequence[int]) -> None:
        self.sampling = sampling
        self.prompts = prompts
        self.random = [np.random.default_rng((sampling.seed, name)) for name in names]
        self.seen: Tensor | None = None  # (batch, vocabulary), with a repetition penalty

    def draw(self, logits: Tensor) -> Tensor:
        """(batch,): a token a row. UserError for logits that are not finite, among which no token is the likeliest."""
        if not logits.amax(-1).isfinite().all():
            raise UserError("the model's logits are not finite numbers")
        if self.seen is None and self.sampling.repetition_penalty != 1:
            self.seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in zip(self.seen, self.prompts, strict=True):
                row[list(prompt)] = True
        logits = warp(logits.float(), self.sampling, self.seen)
        if self.sampling.is_greedy:
            tokens = logits.argmax(-1)
        else:
            # The first token at which the cumulative probability exceeds a uniform number; a token that is cut off
            # adds nothing. In fp64, because the rounding of 100,000 sums in fp32 is of the order of a probability.
            cumulative = logits.double().softmax(-1).cumsum(-1)
            uniform = torch.tensor([[random.random()] for random in self.random], dtype=torch.float64)
            tokens = torch.searchsorted(cumulative, uniform.to(logits.device) * cumulative[:, -1:], right=True)[:, 0]
        if self.seen is not None:
            self.seen[range(len(tokens)), tokens] = True
        return tokens

    def keep(self, rows: list[int]) -> None:
        """Drop the other rows."""
        self.random = [self.random[row] for row in rows]
        self.seen = None if self.seen is None else self.seen[rows]
