"""--validation: held-out loss while training, as `python -m eval perplexity` has it, of text that is not trained on."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import families
import pytest
import torch
from small_runs import KOREAN, finish, lines, make_project, result, run_here, start_group
from small_tokenizer import add_chat_tokens, write_tokenizer

from elo.common.errors import exit_status
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
        patch.setattr(sys, "argv", ["eval", "perplexity", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            exit_status(evaluation.main)
    assert exit_.value.code == 0
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
    """A copy as a whole, whatever part of it is looked at; its documents in other files."""
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
    command = "train --target texts --target-fraction 1 --validation valid.jsonl"
    assert run_here(f"{command}{'' if name.endswith('.gz') else ' --validation-mb 0.0001'}") == 0
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


def test_conversations_every_few_steps(capfd):
    assert run_here("sft --epochs 2 --validate-every 3") == 0
    judged = [(line["step"], line.get("epoch")) for line in lines(Path("out")) if "validation_loss" in line]
    assert judged == [(3, None), (4, 1), (6, None), (8, 2)]
    assert "step 3: held-out loss" in capfd.readouterr().out


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
        ("sft --validate-every 3 --validation-fraction 0", "--validate-every needs --validation-fraction"),
    ],
)
def test_mistakes_are_one_line(command, message, capfd):
    assert run_here(command) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert message in error
