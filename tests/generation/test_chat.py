"""The chat through a pipe and a terminal."""

import io
import json
import os
import pty
import select
import shutil
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

from elo.common.errors import UserError
from elo.common.terminal import printable
from elo.generation import chat as generation
from elo.generation.chat import Writer
from elo.generation.engine import generate, stream
from elo.generation.sampling import GREEDY, Sampling
from elo.model.checkpoint import load_model
from elo.text.chat_format import chat_format
from elo.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


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
    monkeypatch.setattr(generation, "stream", lambda *arguments, **settings: ([id] for id in (*ids, 0)))
    assert writer.answer([5], {0}) == text
    assert capsys.readouterr().out == text + "\n"


def test_the_token_that_ends_an_answer_is_not_said(writer, monkeypatch, capsys):
    """Not if it is text either, as an added token is that is not special."""
    *said, end = writer.tokenizer.encode("some text!")
    monkeypatch.setattr(generation, "stream", lambda *_, **__: ([id] for id in (*said, end)))
    assert writer.answer([0], {end}) == "some text" and capsys.readouterr().out == "some text\n"


def test_an_answer_cannot_command_the_terminal(writer, monkeypatch, capsys):
    """Escaped piece by piece; newlines and tabs are the answer's own, and what goes on is the answer as it is."""
    text = "a\n\tb \x1b[2J\x9b1m \u202eb\x07"
    ids = writer.tokenizer.encode(text)
    monkeypatch.setattr(generation, "stream", lambda *arguments, **settings: ([id] for id in (*ids, 0)))
    assert writer.answer([5], {0}) == text
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
    generation.chat(writer, chat_format(chat_model, writer.tokenizer, "chatml"), [])
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


@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_one_answer_that_fills_the_context(chat_model, raw):
    set_context(chat_model, 60)
    assert run(chat_model, "--prompt", "글", *raw).stderr == "[the model's context of 60 tokens is full]\n"


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


def test_a_raw_continuation_ends_as_generation_config_says(chat_model, tmp_path, monkeypatch, capsys):
    directory = shutil.copytree(chat_model, tmp_path / "model")
    tokenizer, model = load_tokenizer(directory), load_model(directory, "cpu", torch.float32)
    (ids,) = generate(model, [tokenizer.encode("First of")], [{tokenizer.eos_id}], 16, GREEDY)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ids[9]]}))
    words = ["--raw", "--prompt", "First of", "--max-new-tokens", "16", "--dtype", "fp32", "--temperature", "0"]
    monkeypatch.setattr(sys, "argv", ["elo.generation", "--model", str(directory), *words])
    generation.main()
    assert capsys.readouterr().out == printable(tokenizer.decode(ids[: ids.index(ids[9])]), keep="\n\t") + "\n"


@pytest.mark.parametrize("options", [("--raw",), ("--raw", "--prompt", "a", "--system", "b")], ids=" ".join)
def test_raw_needs_a_prompt_and_nothing_of_a_chat(chat_model, options, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["elo.generation", "--model", str(chat_model), *options])
    with pytest.raises(UserError, match="--raw needs --prompt and takes neither"):
        generation.main()


def test_a_system_message_that_the_template_leaves_out(chat_model, tmp_path, monkeypatch):
    directory = shutil.copytree(chat_model, tmp_path / "model")
    template = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    for question in ([], ["--prompt", "글"]):
        words = ["elo.generation", "--model", str(directory), "--system", "Be brief", *question]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(UserError, match="--system: the chat format of .*model has no system message"):
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
