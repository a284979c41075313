"""--validation: held-out loss while training, as `python -m eval perplexity` has it, of text that is not trained on."""

import gzip
import json
import re
import shutil
from pathlib import Path

import families
import pytest
import small_runs
import torch
from commands import status_of
from small_runs import KOREAN, finish, lines, make_project, result, run_here, start_group
from small_tokenizer import add_chat_tokens, write_tokenizer

from eval import __main__ as evaluation

FIGURES = ("loss", "bits_per_byte")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project whose base is stored in fp32, so that a result has what was trained, and two files to hold out."""
    directory = make_project(tmp_path_factory.mktemp("made"), documents=30)
    families.VARIANTS["fp32"] = lambda: families.llama(vocab_size=450, tie_word_embeddings=False)
    shutil.rmtree(directory / "base")
    families.write("fp32", directory / "base", dtype=torch.float32)
    write_tokenizer(directory / "base")
    add_chat_tokens(directory / "base")
    texts = [f"{number} 다른 글이다. " * (number + 1) for number in range(9)]
    (directory / "held.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (directory / "held.txt").write_text("something else\n" * 40)
    return directory


@pytest.fixture(autouse=True)
def project(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def perplexity(model, *files, seq_len=32):
    words = ["--model", model, "--data", *files, "--seq-len", seq_len, "--dtype", "fp32", "--json", "found.json"]
    with pytest.MonkeyPatch.context() as patch:
        status = status_of(patch, evaluation.main, "eval", "perplexity", *words)
    assert status == 0
    return json.loads(Path("found.json").read_text())["files"]


def validations(out):
    return [line for line in lines(Path(out)) if "validation" in line]


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "train --active-vocabulary-coverage 0.9",
        "train --method full",
        "train --method lora --merge",
        "align --target-fraction 1 --gb 0.000005",
    ],
)
def test_figures_are_those_of_eval(command, capfd):
    assert run_here(f"{command} --validation held.jsonl held.txt --validate-every 4 --max-steps 6") == 0
    assert [line["step"] for line in validations("out")] == [4, 6]
    ours, theirs = validations("out")[-1], perplexity("out", "held.jsonl", "held.txt")
    assert [line["file"] for line in ours["validation"]] == ["held.jsonl", "held.txt"]
    for mine, other in zip(ours["validation"], theirs, strict=True):
        assert [mine[name] for name in FIGURES] == pytest.approx([other[name] for name in FIGURES], rel=2e-5)
    tokens, size = (sum(file[name] for file in theirs) for name in ("tokens", "bytes"))
    assert ours["validation_loss"] == pytest.approx(sum(f["loss"] * f["tokens"] for f in theirs) / tokens, rel=2e-5)
    bits = sum(file["bits_per_byte"] * file["bytes"] for file in theirs) / size
    assert ours["validation_bits_per_byte"] == pytest.approx(bits, rel=2e-5)
    said = f"bits per byte {bits:.4f} (held.jsonl {theirs[0]['bits_per_byte']:.4f}, held.txt"
    assert said in capfd.readouterr().out


def test_nothing_else_changes():
    """Neither what is trained nor a state: an interrupted run ends as the one without validation."""
    assert run_here("train --max-steps 6", "plain") == 0
    assert run_here("train --max-steps 6 --validation held.txt --validate-every 1", "watched") == 0
    plain, watched = result(Path("plain")), result(Path("watched"))
    assert watched[0]["model.safetensors"] == plain[0]["model.safetensors"]
    bare = [{name: value for name, value in line.items() if "validation" not in name} for line in watched[1]]
    assert bare == plain[1]


@pytest.mark.parametrize("command", ["train --active-vocabulary", "align --target-fraction 1 --gb 0.000005"])
def test_any_number_of_processes_and_micro_batch(project, command):
    command = f"{command} --validation held.jsonl held.txt --max-steps 2 --validate-every 1 --lr 1e-9"
    assert run_here(command, "one") == 0
    finish(*start_group(project, f"{command} --micro-batch 1", 2, "two"))
    one, two = ([line["validation"] for line in validations(out)] for out in ("one", "two"))
    for mine, other in zip(sum(one, []), sum(two, []), strict=True):
        assert mine["file"] == other["file"]
        assert [mine[name] for name in FIGURES] == pytest.approx([other[name] for name in FIGURES], rel=1e-7)


def test_no_more_than_the_megabytes():
    Path("long.txt").write_text("글 " * 300_000)
    Path("part.txt").write_text("글 " * 250)
    assert run_here("train --validation long.txt held.txt --validation-mb 0.002 --max-steps 0", "none") == 0
    assert validations("none") == []
    assert run_here("train --validation long.txt held.txt --validation-mb 0.002 --max-steps 1") == 0
    (part,) = perplexity("out", "part.txt")
    assert validations("out")[0]["validation"][1]["loss"] == pytest.approx(part["loss"], rel=2e-5)


def consumed(out):
    return json.loads(Path(out, "elo.json").read_text())["consumed"]


@pytest.mark.parametrize("name", ["copy.jsonl", "other.jsonl.gz"])
def test_what_is_held_out_is_not_trained_on(name, capfd):
    """A copy as a whole; its documents in other files, also those that --validation-mb does not measure."""
    Path("texts").mkdir()
    Path("ko.jsonl").rename("texts/ko.jsonl")
    assert run_here("train --target texts --target-fraction 1", "plain") == 0
    held = [json.dumps({"text": f"{number} 더 " + KOREAN * 3}) + "\n" for number in range(6)]
    Path("valid.jsonl").write_text("".join(held))
    if name.endswith(".gz"):
        with gzip.open(f"texts/{name}", "wt") as file:
            file.write("".join(reversed(held)))
    else:
        Path(f"texts/{name}").write_text("".join(held))
    capfd.readouterr()
    assert run_here("train --target texts --target-fraction 1 --validation valid.jsonl --validation-mb 0.0001") == 0
    said = capfd.readouterr().err
    what = "6 documents are" if name.endswith(".gz") else f"texts/{name} is"
    assert f"--target: {what} left out, which --validation has too\n" in said
    assert consumed("out")["target_documents"] == consumed("plain")["target_documents"] == 30
    assert consumed("out")["target_bytes"] == consumed("plain")["target_bytes"]


def test_the_next_stage_has_to_hold_out_the_same(capfd):
    """Else the documents would stand at other places of the stream, and some be trained on twice."""
    records = Path("ko.jsonl").read_text().splitlines(keepends=True)
    Path("valid.jsonl").write_text("".join(records[:3]))
    assert run_here("train --gb 0.000003 --validation valid.jsonl") == 0
    assert run_here("align --elo out --gb 0.000001", "aligned") == 2
    assert "that run had other left out; its documents can only be told" in capfd.readouterr().err
    assert run_here("align --elo out --gb 0.000001 --validation valid.jsonl", "aligned") == 0


def test_a_run_that_goes_on_may_be_watched_in_another_way(capfd):
    records = Path("ko.jsonl").read_text().splitlines(keepends=True)
    Path("valid.jsonl").write_text("".join(records[:3]))
    command = "train --save-every 1 --validation"
    assert run_here(f"{command} valid.jsonl --max-steps 4") == 0
    for name in ("config.json", "model.safetensors"):
        Path("out", name).unlink()
    assert run_here(f"{command} held.txt --max-steps 4") == 2
    assert "since the run there began, its documents of --validation changed" in capfd.readouterr().err
    assert run_here(f"{command} valid.jsonl held.txt --validate-every 2 --max-steps 4") == 0


# ---- conversations


def chat(number):
    answer = f"{number} some text " * (number % 3 + 1)
    return [{"from": "human", "value": f"다른 {number}?"}, {"from": "gpt", "value": answer}]


def write_chats(name, numbers, record=lambda chat: {"conversations": chat}):
    Path(name).write_text("".join(json.dumps(record(chat(number))) + "\n" for number in numbers))


@pytest.fixture
def files_only(monkeypatch):
    """sft.py without --validation-fraction."""
    monkeypatch.setattr(small_runs, "CHATS", small_runs.CHATS.replace(" --validation-fraction 0.2", ""))


def test_conversations_every_few_steps(capfd):
    assert run_here("sft --epochs 2 --validate-every 3 --max-steps 7") == 0
    judged = [(line["step"], line.get("epoch")) for line in lines(Path("out")) if "validation_loss" in line]
    assert judged == [(3, None), (4, 1), (6, None), (7, None)]
    said = capfd.readouterr().out
    first, *_, last = (line["validation_loss"] for line in validations("out"))
    assert f"step 3: held-out loss {first:.4f} (chats.json {first:.4f})\n" in said
    assert f"the held-out one from {first:.4f} to {last:.4f}. The result" in said


def test_the_loss_of_conversations_is_that_of_training(files_only, capfd):
    """Of each file, whatever micro-batches it is in; a conversation of several languages' files, as they come."""
    write_chats("a.jsonl", range(7))
    write_chats("b.jsonl", range(50, 53))
    named = "./a.jsonl b.jsonl a.jsonl"  # one of them twice
    assert run_here(f"sft --validation {named} --max-steps 1 --lr 1e-12 --validate-every 1") == 0
    assert f"the held-out one is {validations('out')[0]['validation_loss']:.4f}. The" in capfd.readouterr().out
    (found,) = validations("out")
    assert [line["file"] for line in found["validation"]] == ["a.jsonl", "b.jsonl"]
    tokens = nats = 0
    for name, mine in zip("ab", found["validation"], strict=True):
        assert run_here(f"sft --data {name}.jsonl --batch-conversations 10 --epochs 1", name) == 0
        (line,) = lines(Path(name))
        assert mine["loss"] == pytest.approx(line["loss"], rel=2e-6)
        tokens, nats = tokens + line["tokens"], nats + line["tokens"] * line["loss"]
    assert found["validation_loss"] == pytest.approx(nats / tokens, rel=2e-6)
    assert run_here("sft --validation a.jsonl b.jsonl --max-steps 1 --lr 1e-12 --micro-batch-tokens 30", "small") == 0
    assert validations("small")[0]["validation_loss"] == pytest.approx(nats / tokens, rel=2e-6)


SAME = {
    "as it is": lambda chat: {"conversations": chat},
    "other names": lambda chat: {
        "messages": [
            {"role": role, "content": f"{turn['value']} "}
            for role, turn in zip(("user", "assistant"), chat, strict=True)
        ]
    },
    "with more": lambda chat: {
        "language": "ko",
        "system": "Be kind.",
        "conversations": [*chat, {"from": "human", "value": "?"}],
    },
}


@pytest.mark.parametrize("written", SAME)
def test_held_out_conversations_are_not_trained_on(files_only, written, capfd):
    write_chats("held.jsonl", range(6))
    write_chats("more.jsonl", range(9), SAME[written])
    write_chats("rest.jsonl", range(6, 9), SAME[written])
    command = "sft --epochs 1 --samples 22 --data chats.json"
    assert run_here(f"{command} more.jsonl --validation held.jsonl") == 0
    assert "--data: 6 conversations of more.jsonl are left out, which --validation has too\n" in capfd.readouterr().err
    assert run_here(f"{command} rest.jsonl", "plain") == 0
    assert result(Path("out"))[0]["model.safetensors"] == result(Path("plain"))[0]["model.safetensors"]


def test_what_is_there_twice_is_not_held_out_and_trained_on(capfd):
    """Whichever is held out: nothing of it is left to train on."""
    write_chats("once.jsonl", range(20))
    write_chats("again.jsonl", range(20))
    assert run_here("sft --epochs 1 --data once.jsonl again.jsonl once.jsonl") == 0
    left_out = int(re.search(r"--data: (\d+) conversations are left out, the same as", capfd.readouterr().err)[1])
    assert 2 < left_out <= 8
    assert lines(Path("out"))[-1]["conversations"] == 40 - 8 - left_out


def test_the_best_epoch_is_that_of_the_files(files_only, capfd):
    """Then another file of --validation would choose otherwise, and does not go with the epochs before."""
    write_chats("held.jsonl", range(6))
    write_chats("other.jsonl", range(6, 9))
    command = "sft --epochs 2 --keep best --validation"
    assert run_here(f"{command} held.jsonl") == 0
    best = min(validations("out"), key=lambda line: line["validation_loss"])
    assert json.loads(Path("out/sft.json").read_text())["epoch"] == best["epoch"]
    Path("out/config.json").unlink()
    assert run_here(f"{command} other.jsonl") == 2
    assert "since the run there began, its conversations of --validation changed" in capfd.readouterr().err
    assert run_here(f"{command} held.jsonl") == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("absent.jsonl", "--validation: absent.jsonl"),
        ("held.jsonl long.jsonl", "--validation long.jsonl: no conversation there has an answer that fits"),
        ("long.jsonl", "--validation: too few conversations: 1 needed, 0 usable"),
        ("chats.json", "20 dropped: --validation has it too"),
        ("bad.jsonl", "--validation: bad.jsonl:1: no field 'conversations' or 'messages'"),
    ],
)
def test_mistakes_in_held_out_conversations(files_only, files, message, capfd):
    write_chats("held.jsonl", range(6))
    write_chats("long.jsonl", [1], lambda chat: {"conversations": [chat[0] | {"value": "글 " * 99}, chat[1]]})
    Path("bad.jsonl").write_text('{"text": "x"}\n')
    assert run_here(f"sft --validation {files}") == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert message in error


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --validation absent.txt", "--validation: absent.txt: no such file or directory"),
        ("train --validate-every 3", "--validate-every needs --validation PATH"),
        ("align --gb 0 --validation-mb 1", "--validation-mb needs --validation PATH"),
        ("align --gb 0 --validation held.txt", "--gb 0 only puts the layers back"),
        ("train --validation held.txt --seq-len 1", "--seq-len 1: a window needs at least 2 tokens"),
        ("train --validation held.txt --validation-mb 0.000001", "held.txt: no token has a predecessor"),
        ("train --validation ko.jsonl", "--target: --validation has all of it"),
        ("sft --validate-every 3 --validation-fraction 0", "--validate-every needs --validation FILE or"),
        ("sft --validation chats.json", "--validation: not allowed with"),
    ],
)
def test_mistakes_are_one_line(command, message, capfd):
    assert run_here(command) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert message in error
