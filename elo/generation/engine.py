"""The engine: token ids in, token ids out."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from elo.common.errors import UserError
from elo.generation.sampling import GREEDY, Sampler, Sampling
from elo.model.cache import KVCache
from elo.model.decoder import CausalLM


@torch.inference_mode()
def stream(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[Collection[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    names: Sequence[int] | None = None,
    cache: KVCache | None = None,
) -> Iterator[list[int | None]]:
    """Continue prompts together. Each step yields the new token of every row, None for rows that have ended.

    A row ends with the first token that is in its `stops`, which is yielded too, after `max_new_tokens`, or when it
    fills the model's context. No row sees another, and the same batch gives the same; but in bf16 the rounding of
    matrix products depends on a batch's shape, so that in another batch two tokens that are almost equally likely may
    change places. In fp32 that takes a tie. names: tell the random numbers of rows apart (default: their indices).
    cache: already holds the first `cache.lengths[row]` tokens of each prompt, not all.
    """
    context = model.config.context
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(f"a prompt of {len(prompt)} tokens; the model's context is {context} and has to hold more")
    embedding = model.model.embed_tokens.weight
    cache = cache or KVCache(model.config, len(prompts), embedding.device, embedding.dtype)
    sampler = Sampler(sampling, prompts, names or range(len(prompts)))
    left = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    rows = list(range(len(prompts))) if max_new_tokens > 0 else []  # those that go on
    new = [torch.tensor(prompt[held:]) for prompt, held in zip(prompts, cache.lengths, strict=True)]
    while rows:
        # Right padding: the real tokens are where they would be without it, and none of them looks at it.
        tokens = pad_sequence(new, batch_first=True).to(embedding.device)
        drawn = sampler.draw(model(tokens, cache=cache, lengths=[len(ids) for ids in new])).cpu()
        step: list[int | None] = [None] * len(prompts)
        for row, token in zip(rows, drawn.tolist(), strict=True):
            step[row] = token
            left[row] -= 1
        yield step
        going = [index for index, row in enumerate(rows) if left[row] > 0 and step[row] not in stops[row]]
        if 0 < len(going) < len(rows):
            cache.keep(going)
            sampler.keep(going)
            drawn = drawn[going]
        rows = [rows[index] for index in going]
        new = list(drawn[:, None])


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[Collection[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    names: Sequence[int] | None = None,
) -> list[list[int]]:
    """The new tokens of each row, a stop token included; the arguments are those of `stream`."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, stops, max_new_tokens, sampling, names):
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
    return answers
