"""The KV cache, sampling and batches against transformers; the chat through a pipe and a terminal."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import families
import psutil
import pytest
import torch
from forking import Fork
from small_tokenizer import add_chat_tokens, write_tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from elo.common.errors import UserError
from elo.common.terminal import printable
from elo.generation import chat as generation
from elo.generation.chat import Writer
from elo.generation.engine import generate, stream
from elo.generation.sampling import GREEDY, Sampler, Sampling, warp
from elo.model.cache import KVCache
from elo.model.checkpoint import load_model
from elo.model.packed import pack_weights
from elo.text.chat_format import chat_format
from elo.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
VOCABULARY, CONTEXT = families.SMALL["vocab_size"], families.SMALL["max_position_embeddings"]
NO_STOPS = [()] * 20


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Single tokens are too little work to share: threads that wait for each other on a busy machine cost more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_tokens(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_model(families.write("llama3", tmp_path_factory.mktemp("llama")), "cpu", torch.float32)


# ---- the cache


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


# ---- greedy, against transformers


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


# ---- sampling


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


# ---- the chat


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A random model that talks ChatML, and never stops by itself."""
    directory = write_tokenizer(tmp_path_factory.mktemp("chat"), vocab_size=300)
    add_chat_tokens(directory)
    families.write("llama3", directory)
    (directory / "generation_config.json").unlink()
    return directory


def set_context(directory, length):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": length}))


def command(directory, *options):
    start = [sys.executable, "-m", "elo.generation", "--model", str(directory), "--dtype", "fp32"]
    return [*start, *(() if "--raw" in options else ("--chat-format", "chatml")), *options]


def run(directory, *options, messages=""):
    process = Fork("elo.generation.chat", command(directory, *options)[3:], stdin=messages)
    return SimpleNamespace(stdout=process.communicate()[0], stderr=process.said("err"), returncode=process.returncode)


@pytest.fixture
def writer(chat_model):
    set_context(chat_model, 600)
    model = load_model(chat_model, "cpu", torch.float32)
    return Writer(model, load_tokenizer(chat_model), 30, GREEDY)


def test_the_next_turn_gives_only_new_tokens_to_the_model(chat_model, writer, capsys):
    format = chat_format(chat_model, writer.tokenizer, "chatml")
    fed = []
    writer.model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: fed.append(inputs[0].shape[1]))
    first = format.prompt([{"role": "user", "content": "First of all"}])
    writer.answer(first, format.stop_ids)
    second = [*writer.ids, *writer.tokenizer.encode("And a third sentence")]
    written = writer.answer(second, format.stop_ids)
    assert (fed[0], fed[30]) == (len(first), len(second) - len(first) - 29)

    # Asked again, and asked something else: what differs is replaced in the cache.
    assert writer.answer(second, format.stop_ids) == written
    assert fed[60] == 1
    writer.answer(first[:3] + second[9:], format.stop_ids)
    assert writer.answer(second, format.stop_ids) == written
    capsys.readouterr()


def test_characters_of_several_tokens_are_written_whole(writer, monkeypatch, capsys):
    text = "둘째로 🙂 끝"
    ids = writer.tokenizer.encode(text)
    assert len(ids) > len(text)
    monkeypatch.setattr(generation, "stream", lambda *arguments, **settings: ([id] for id in ids))
    assert writer.answer([5], {ids[-1]}) == text
    assert capsys.readouterr().out == text + "\n"


def test_an_answer_cannot_command_the_terminal(writer, monkeypatch, capsys):
    """Escaped piece by piece; newlines and tabs are the answer's own, and what goes on is the answer as it is."""
    text = "a\n\tb \x1b[2J\x9b1m \u202eb\x07"
    ids = writer.tokenizer.encode(text)
    monkeypatch.setattr(generation, "stream", lambda *arguments, **settings: ([id] for id in ids))
    assert writer.answer([5], {ids[-1]}) == text
    assert capsys.readouterr().out == "a\n\tb \\x1b[2J\\x9b1m \\u202eb\\x07\n"


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(writer, monkeypatch, capsys):
    expected = writer.answer([5, 6], ())
    token = iter(range(4))

    def interrupted(*arguments, **settings):
        for step in stream(*arguments, **settings):
            if next(token) == 3:
                raise KeyboardInterrupt
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(generation, "stream", interrupted)
        writer.answer([5, 7], ())
    assert len(writer.ids) == 5
    assert writer.answer([5, 6], ()) == expected
    capsys.readouterr()


@pytest.mark.parametrize("more", [[], ["글" * 300]], ids=["in the answer", "in the question"])
def test_a_full_context_ends_the_chat_with_one_line(chat_model, writer, monkeypatch, capsys, more):
    writer.max_new_tokens = 2 if more else 10_000
    monkeypatch.setattr(generation, "read_messages", lambda: iter(["First", *more]))
    generation.chat(writer, chat_format(chat_model, writer.tokenizer, "chatml"), None)
    cut_off = "[cut off after 2 tokens: --max-new-tokens]\n" if more else ""
    full = "[the conversation has filled the model's context of 600 tokens; start a new one]\n"
    assert capsys.readouterr().err == cut_off + full


def test_messages_are_lines_that_are_not_empty(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("첫\n\n \n둘\n".encode() + b"\xff"), "utf-8"))
    assert list(generation.read_messages()) == ["첫", "둘", "\ufffd"]


def test_messages_through_a_pipe_until_the_context_is_full(chat_model):
    set_context(chat_model, 150)
    done = run(chat_model, "--max-new-tokens", "12", messages="First\n\n둘째로\n" + "no\n" * 20)
    assert done.returncode == 0
    notes = done.stderr.splitlines()
    assert notes[:2] == ["[cut off after 12 tokens: --max-new-tokens]"] * 2
    assert notes[-1] == "[the conversation has filled the model's context of 150 tokens; start a new one]"


def test_one_answer_and_a_raw_continuation(chat_model):
    set_context(chat_model, 150)
    model, tokenizer = load_model(chat_model, "cpu", torch.float32), load_tokenizer(chat_model)
    format = chat_format(chat_model, tokenizer, "chatml")
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "글"}]
    for options, prompt in (
        (("--system", "Be brief", "--prompt", "글"), format.prompt(messages)),
        (("--raw", "--prompt", "First of"), tokenizer.encode("First of")),
    ):
        sampling = Sampling(temperature=1.5, top_k=40, top_p=0.9, repetition_penalty=1.2, seed=3)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(sampling).items()]
        done = run(chat_model, *options, *flags, "--max-new-tokens=16")
        (answer,) = generate(model, [prompt], [format.stop_ids | {tokenizer.eos_id}], 16, sampling)
        assert done.stdout == printable(tokenizer.decode(answer), keep="\n\t") + "\n", done.stderr


@pytest.mark.parametrize("options", [("--raw",), ("--raw", "--prompt", "a", "--system", "b")], ids=" ".join)
def test_raw_needs_a_prompt_and_nothing_of_a_chat(chat_model, options, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["elo.generation", "--model", str(chat_model), *options])
    with pytest.raises(UserError, match="--raw needs --prompt and takes neither"):
        generation.main()


# Makes stdin the terminal whose Ctrl-C this process gets, and becomes the command.
AT_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("end", [b"\x04", b"\x03"], ids=["ctrl-d", "ctrl-c"])
def test_at_a_terminal_ctrl_c_stops_an_answer_and_then_the_chat_ends(chat_model, end):
    set_context(chat_model, 100_000)
    terminal, other_side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", AT_A_TERMINAL, *command(chat_model, "--max-new-tokens", "90000")],
        cwd=ROOT,
        stdin=other_side,
        stdout=other_side,
        stderr=other_side,
        start_new_session=True,
    )
    os.close(other_side)
    shown = read_until(terminal, lambda shown: shown.endswith(b"> "))
    os.write(terminal, "둘째로\n".encode())
    read_until(terminal, lambda shown: len(shown) > 300)  # echo, and the start of an answer without end
    os.write(terminal, b"\x03")
    shown = read_until(terminal, lambda shown: shown.endswith(b"\n> "))
    assert b"^C" in shown
    # Python does not see a Ctrl-C between showing its prompt and starting to read.
    for _ in range(10):
        while psutil.Process(process.pid).status() != psutil.STATUS_SLEEPING:
            time.sleep(0.01)
        time.sleep(0.05)
    os.write(terminal, end)
    assert b"Traceback" not in read_until(terminal, lambda shown: False)
    assert process.wait(600) == 0


def read_until(terminal, enough, seconds=600):
    """What a terminal shows from now on, until it is enough or the program has ended."""
    shown, deadline = b"", time.monotonic() + seconds
    while not enough(shown):
        assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], shown[-300:]
        try:
            data = os.read(terminal, 1024)
        except OSError:  # Linux, when the other side is closed
            data = b""
        if not data:
            break
        shown += data
    return shown
