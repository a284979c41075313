"""What is sampled from, against transformers; each row of a batch as if it were alone."""

import pytest
import torch
from small_generation import NO_STOPS, random_tokens
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from elo.common.errors import UserError
from elo.generation.engine import generate
from elo.generation.sampling import GREEDY, Sampler, Sampling, warp


@pytest.mark.parametrize("scale", [0.01, 1, 8], ids=["flat", "soft", "peaked"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=20),
        Sampling(temperature=1.0, top_k=5000),
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=1.0, top_p=0.0),
        Sampling(temperature=1.3, top_k=50, top_p=0.8, repetition_penalty=1.4),
        Sampling(temperature=0.9, min_p=0.1),
        Sampling(temperature=1.2, min_p=1.0),
        Sampling(temperature=1.3, top_k=30, top_p=0.9, min_p=0.05),
        Sampling(repetition_penalty=0.8),
    ],
    ids=str,
)
def test_what_is_sampled_from_equals_transformers(sampling, scale):
    generator = torch.Generator().manual_seed(2)
    logits = scale * torch.randn(3, 3000, generator=generator)
    prompts = torch.randint(0, 3000, (3, 700), generator=generator)
    processors = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    if sampling.temperature:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        processors += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        processors += [TopPLogitsWarper(sampling.top_p), MinPLogitsWarper(sampling.min_p)]
    expected = logits
    for processor in processors:
        expected = processor(prompts, expected)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, prompts, True)
    found = warp(logits, sampling, seen if sampling.repetition_penalty != 1 else None)
    torch.testing.assert_close(found, expected)


def test_tokens_are_drawn_with_their_probabilities():
    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(3))
    sampling, draws = Sampling(temperature=1.5, top_k=8), 20000
    tokens = Sampler(sampling, [[]] * draws, range(draws)).draw(logits.expand(draws, -1))
    found = torch.bincount(tokens, minlength=12) / draws
    expected = warp(logits[None], sampling)[0].softmax(-1)
    assert (expected == 0).sum() == 4
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=2, repetition_penalty=1.1)], ids=str)
def test_logits_that_are_not_finite_make_no_token(sampling):
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 2.0, 1.0]])
    assert Sampler(GREEDY, [[]] * 2, range(2)).draw(logits).tolist() == [1, 1]
    for wrong in (torch.nan, torch.inf):
        logits[1, 2] = wrong
        with pytest.raises(UserError, match="logits are not finite numbers"):
            Sampler(sampling, [[0]] * 2, range(2)).draw(logits)


def test_a_row_is_sampled_as_if_it_were_alone(llama):
    prompts = random_tokens(3, 40, 17, 8, 25)
    sampling = Sampling(temperature=1.2, top_k=60, top_p=0.95, repetition_penalty=1.3, seed=4)
    free = generate(llama, prompts, NO_STOPS[:5], 20, sampling)
    stops = [{answer[3 * row + 1]} for row, answer in enumerate(free)]  # each row has its own, and leaves at its time

    together = generate(llama, prompts, stops, 20, sampling)
    assert [len(answer) for answer in together] == [
        next(n for n, token in enumerate(answer, start=1) if token in stop)
        for answer, stop in zip(free, stops, strict=True)
    ]
    assert all(answer == whole[: len(answer)] for answer, whole in zip(together, free, strict=True))
    for row, prompt in enumerate(prompts):
        assert generate(llama, [prompt], [stops[row]], 20, sampling, names=[row]) == [together[row]]

    other_seed = Sampling(temperature=1.2, seed=5)
    same_prompt = generate(llama, [prompts[0]] * 2, NO_STOPS[:2], 20, other_seed)
    assert same_prompt[0] != same_prompt[1]
    assert generate(llama, [prompts[0]] * 2, NO_STOPS[:2], 20, Sampling(temperature=1.2, seed=6)) != same_prompt


def test_the_repetition_penalty_meets_the_prompt_and_the_answer(llama):
    (prompt,) = random_tokens(30)
    (answer,) = generate(llama, [prompt], NO_STOPS[:1], 60, Sampling(repetition_penalty=1e6))
    assert len({*prompt, *answer}) == len({*prompt}) + len(answer)


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-7])
def test_a_temperature_by_which_nothing_can_be_divided_is_greedy(temperature):
    """The quotients would be infinite, and the token drawn from them one that no vocabulary has."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    tokens = Sampler(Sampling(temperature=temperature), [[1], [2]], [0, 1]).draw(logits)
    assert torch.equal(tokens, logits.argmax(-1))
