"""The KV cache and greedy answers, alone and in batches, against transformers."""

from pathlib import Path

import families
import pytest
import torch
from small_generation import CONTEXT, NO_STOPS, VOCABULARY, random_tokens
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from elo.common.errors import UserError
from elo.generation.engine import generate, stream
from elo.model.cache import KVCache
from elo.model.checkpoint import load_model
from elo.model.packed import pack_weights
from elo.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"


@pytest.mark.parametrize("lengths", [(4, 20, 11), (9, 9, 9)], ids=["ragged", "even"])
@pytest.mark.parametrize("variant", families.VARIANTS)
@torch.inference_mode()
def test_logits_with_the_cache_are_those_of_the_whole_sequence(variant, lengths, tmp_path):
    model = load_model(families.write(variant, tmp_path), "cpu", torch.float32)
    rows = [torch.tensor(row) for row in random_tokens(*(length + 20 for length in lengths))]
    expected = [model(row[None])[0] for row in rows]
    cache = KVCache(model.config, len(rows), torch.device("cpu"), torch.float32)

    prompts = pad_sequence([row[:length] for row, length in zip(rows, lengths, strict=True)], batch_first=True)
    logits = model(prompts, cache=cache, lengths=list(lengths))
    for new in (1, 1, 1, 5, 1, 6):  # a chat's next turn brings several tokens at once
        for row, length in enumerate(cache.lengths):
            torch.testing.assert_close(logits[row], expected[row][length - 1], atol=2e-5, rtol=0)
        tokens = [row[length : length + new] for row, length in zip(rows, cache.lengths, strict=True)]
        logits = model(torch.stack(tokens), cache=cache)

    cache.keep([2, 0])
    cache.truncate(12)
    cache.lengths[1] = 0
    again = [rows[row][length : length + 3] for row, length in zip((2, 0), cache.lengths, strict=True)]
    logits = model(torch.stack(again), cache=cache)
    for index, row in enumerate((2, 0)):
        torch.testing.assert_close(logits[index], expected[row][cache.lengths[index] - 1], atol=2e-5, rtol=0)


@torch.inference_mode()
def test_the_cache_grows_past_what_it_first_has_room_for(llama):
    (tokens,) = random_tokens(600)
    expected = llama(torch.tensor([tokens]))[0]
    cache = KVCache(llama.config, 1, torch.device("cpu"), torch.float32)
    for start, stop in ((0, 255), (255, 256), (256, 257), (257, 600)):
        logits = llama(torch.tensor([tokens[start:stop]]), cache=cache)
        torch.testing.assert_close(logits[0], expected[stop - 1], atol=2e-5, rtol=0)


def test_only_the_last_logits_of_a_prompt_are_computed(llama):
    shapes = []
    hook = llama.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    generate(llama, random_tokens(5, 30), NO_STOPS, 3)
    hook.remove()
    assert shapes == [(2, VOCABULARY)] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_packed_weights_give_the_same_logits(dtype, tmp_path):
    families.write("qwen2", tmp_path)  # with biases
    plain, packed = load_model(tmp_path, "cpu", dtype), pack_weights(load_model(tmp_path, "cpu", dtype))
    tokens = torch.tensor(random_tokens(40, 40, 40))
    tolerance = 2e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(packed(tokens), plain(tokens), atol=tolerance, rtol=0)


def transformers_greedy(model, prompts, new, stop):
    """In one batch, padded at the left as transformers wants it."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": stop, "pad_token_id": 0}
    rows = model.generate(tokens, attention_mask=mask, **settings)[:, width:].tolist()
    return [row[: row.index(stop) + 1] if stop in row else row for row in rows]


@pytest.mark.parametrize("variant", families.VARIANTS)
def test_greedy_equals_transformers(variant, tmp_path):
    families.write(variant, tmp_path)
    ours = load_model(tmp_path, "cpu", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompts = random_tokens(3, 33, 12, 20)
    # A stop token that one row comes to say, so that it leaves before the others.
    stop = generate(ours, prompts[:1], NO_STOPS, 24)[0][9]

    expected = [transformers_greedy(theirs, [prompt], 24, stop)[0] for prompt in prompts]
    assert len(expected[0]) <= 10
    assert generate(ours, prompts, [{stop}] * 4, 24) == expected
    assert [generate(ours, [prompt], [{stop}], 24)[0] for prompt in prompts] == expected
    packed = pack_weights(ours)
    assert generate(packed, prompts, [{stop}] * 4, 24) == expected
    assert [generate(packed, [prompt], [{stop}], 24)[0] for prompt in prompts] == expected


# fmt: off
PROMPTS = [
    "The capital of France is", "Once upon a time there was a little", "In 1905, Albert Einstein published",
    "Water boils at", "def fibonacci(n):\n", "The three branches of the government of the United States are",
    "My favourite recipe for bread starts with", "Dear Sir or Madam,", "To install the program on Linux, first",
    "Plants turn sunlight into energy. This takes place in the leaves, in organelles that are called",
    "대한민국의 수도는", "옛날 옛적에 어느 마을에", "안녕하세요. 저는", "물은 섭씨 100도에서", "한글은 세종대왕이",
    "오늘 날씨가 좋아서", "문서를 저장하려면 파일 메뉴에서", "인공지능은 사람의", "서울에서 부산까지 기차로 가면 약",
    "사랑하는 어머니께, 그동안 안녕하셨습니까? 저는 여기에서 잘 지내고 있으며",
]
# fmt: on
@pytest.mark.skipif(not SMOLLM2.exists(), reason=f"no {SMOLLM2.relative_to(ROOT)}; `make test` makes it")
def test_greedy_equals_transformers_on_a_real_model_alone_and_in_a_batch():
    tokenizer = load_tokenizer(SMOLLM2)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    stop = tokenizer.special_tokens["<|im_end|>"]
    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    expected = transformers_greedy(theirs, prompts, 24, stop)
    assert sum(len(answer) == 24 for answer in expected) >= 15

    ours = pack_weights(load_model(SMOLLM2, "cpu", torch.float32))
    assert generate(ours, prompts, [{stop}] * 20, 24) == expected
    assert [generate(ours, [prompt], [{stop}], 24)[0] for prompt in prompts[::5]] == expected[::5]


def test_each_step_gives_none_for_rows_that_have_ended(llama):
    prompts = random_tokens(6, 9)
    first, second = generate(llama, prompts, NO_STOPS[:2], 4)
    steps = list(stream(llama, prompts, [{first[0]}, {-1}], 4))
    assert steps == [[first[0], second[0]], *([None, token] for token in second[1:])]


def test_the_context_ends_a_row(llama):
    long, short = random_tokens(CONTEXT - 3, 4)
    answers = generate(llama, [long, short], NO_STOPS[:2], 10)
    assert [len(answer) for answer in answers] == [3, 10]
    assert generate(llama, [short], NO_STOPS[:1], 10) == answers[1:]
    assert generate(llama, [short], NO_STOPS[:1], 0) == [[]]
    for bad in (random_tokens(CONTEXT), [[]]):
        with pytest.raises(UserError, match=rf"prompt of {len(bad[0])} tokens; the model's context is {CONTEXT}"):
            generate(llama, bad, NO_STOPS[:1], 10)
