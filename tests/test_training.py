"""train.py: processes, micro-batches, interruptions and mistakes."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import instead, status_of
from forking import Fork, fork_group
from safetensors.torch import load_file
from small_runs import lines, losses, make_base, pausing, script_with
from transformers import AutoModelForCausalLM

import train
from elo.common.errors import UserError, exit_status
from elo.data.feed import Feed, MicroBatch
from elo.model.checkpoint import load_model
from elo.pretraining import PackedBatches
from elo.runs.processes import process_group
from elo.training import accumulate

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A small random Llama with a tokenizer, and a corpus in two languages beside it."""
    return make_base(tmp_path_factory.mktemp("base"))


def words(project, out, *options):
    text = ["--target", project / "ko.jsonl", "--source", project / "en.jsonl"]
    fixed = ["--model", project / "base", "--seq-len", "32", "--batch-tokens", "160", "--lr", "1e-2", "--dtype", "fp32"]
    return [str(word) for word in instead([*fixed, *text, "--out", out], options)]


def run(*arguments, processes=1, fails=False):
    """What rank 0 said on stderr, and its exit status, which is 0 unless it `fails`."""
    group = fork_group(processes, "train", words(*arguments)) if processes > 1 else [Fork("train", words(*arguments))]
    errors = [process.communicate()[1] for process in group]
    assert all((process.returncode != 0) == fails for process in group), errors
    return SimpleNamespace(stderr=errors[0], returncode=group[0].returncode)


@pytest.fixture(scope="module")
def plain(project, tmp_path_factory):
    """One process, micro-batches of 2 windows."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    run(project, out, "--micro-batch", "2")
    return out


def test_only_the_layers_learn(project, plain):
    assert losses(plain)[-1] < losses(plain)[0] - 1
    before = load_file(project / "base" / "model.safetensors")
    after = load_file(plain / "model.safetensors")
    for name, tensor in after.items():
        origin = name.replace("layers.1.", "layers.3.")
        assert torch.equal(tensor, before[origin]) == (".layers." not in name), name
    elo = json.loads((plain / "elo.json").read_text())
    assert elo["layers"] == [1, 4]
    assert elo["method"] == "elo"
    assert elo["consumed"]["target_bytes"] > 8 * elo["consumed"]["source_bytes"] > 0


def test_the_result_loads_in_transformers_with_the_same_logits(plain):
    tokens = torch.arange(90).view(3, 30)
    theirs, info = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert theirs.config.num_hidden_layers == 2
    torch.testing.assert_close(
        load_model(plain, "cpu", torch.float32)(tokens), theirs(tokens).logits, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 5), (2, 3), (3, 4)])
def test_the_same_losses_for_any_processes_and_micro_batch(project, plain, tmp_path, processes, micro_batch):
    run(project, tmp_path / "out", "--micro-batch", micro_batch, processes=processes)
    assert losses(tmp_path / "out") == pytest.approx(losses(plain), rel=2e-5)
    ours, theirs = (load_file(out / "model.safetensors") for out in (tmp_path / "out", plain))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-2, atol=2e-3)


def test_the_seed_decides(project, plain, tmp_path):
    """With the same one a run is the same to the last bit: tests/runs/test_resume.py."""
    run(project, tmp_path / "other", "--micro-batch", "2", "--seed", "1")
    assert losses(tmp_path / "other") != losses(plain)


def test_no_steps_write_the_plain_slice(project, tmp_path):
    run(project, tmp_path / "out", "--max-steps", "0")
    before = load_file(project / "base" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, before[name.replace("layers.1.", "layers.3.")])


def test_full_trains_every_parameter(project, tmp_path):
    run(project, tmp_path / "out", "--method", "full", "--max-steps", "5", processes=2)
    before, after = (load_file(d / "model.safetensors") for d in (project / "base", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    run(project, tmp_path / "one", "--method", "full", "--max-steps", "5")
    for name in ("loss", "grad_norm"):
        two, one = ([line[name] for line in lines(tmp_path / out)] for out in ("out", "one"))
        assert two == pytest.approx(one, rel=2e-5)


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_resume_ends_as_if_nothing_had_been(project, plain, tmp_path, processes, number):
    out = tmp_path / "out"
    options, before = words(project, out, "--micro-batch", "2"), pausing(3, out)
    if processes:
        launcher = [*TORCHRUN, f"--nproc_per_node={processes}", script_with(before, "train", tmp_path / "train.py")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([*launcher, *options], env=environment, stderr=subprocess.DEVNULL)
    else:
        process = Fork("train", options, before=before)
    while not (out / "metrics.jsonl").exists() or len(lines(out)) < 3:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    process.wait(600)
    # torchrun itself exits with 1 or 128 + the signal; the workers end by themselves.
    assert processes or process.returncode == 0
    assert not (out / "config.json").exists()
    assert len(lines(out)) == 3
    assert (out / "checkpoints" / "step-3" / "state.json").exists()

    run(project, out, "--micro-batch", "2", processes=processes or 1)  # the same command goes on
    assert [line["step"] for line in lines(out)] == list(range(1, len(losses(plain)) + 1))
    if processes:
        assert losses(out) == pytest.approx(losses(plain), rel=2e-5)
    else:
        assert losses(out) == losses(plain)
        assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_each_language_has_its_own_field(project, plain, tmp_path):
    """The same texts in other fields and other files, or in one, are the same stream; --text-field stays for who has no
    other."""
    records = [json.loads(line)["text"] for line in (project / "ko.jsonl").read_text().splitlines()]
    (tmp_path / "ko.json").write_text(json.dumps([{"body": text, "text": "no"} for text in records]))
    english = (project / "en.jsonl").read_text().replace('"text"', '"content"')
    (tmp_path / "en.ndjson").write_text(english)
    files = ["--target", tmp_path / "ko.json", "--source", tmp_path / "en.ndjson", "--max-steps", "1"]
    run(project, tmp_path / "a", *files, "--target-field", "body", "--source-field", "content")
    pairs = [{"body": text} | json.loads(line) for text, line in zip(records, english.splitlines(), strict=True)]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    files = ["--target", tmp_path / "both.jsonl", "--source", tmp_path / "both.jsonl", "--max-steps", "1"]
    run(project, tmp_path / "b", *files, "--target-field", "body", "--text-field", "content")
    for out in ("a", "b"):
        stream = json.loads((tmp_path / out / "elo.json").read_text())["stream"]
        assert stream == json.loads((plain / "elo.json").read_text())["stream"]


def test_a_loss_that_is_not_finite_stops_the_run(project, tmp_path):
    result = run(project, tmp_path / "out", "--lr", "1e30", "--save-every", "1", fails=True)
    assert result.returncode == 2
    message = result.stderr.strip().splitlines()[-1]
    assert "error: step 2: the loss is" in message
    assert "ko.jsonl:" in message
    assert "step-1;" in message
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-1"]
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_infinite_loss_is_known_before_the_backward_pass():
    """Which may step parameters already; gradients of an infinite loss may be finite."""
    weight = torch.nn.Parameter(torch.ones(1))
    feed = iter([MicroBatch(torch.ones(1), torch.ones(1), counted=1, is_last=True)])
    with process_group() as world:
        assert accumulate(lambda *_, **__: weight.sum() + math.inf, feed, 1, SimpleNamespace(), world) == math.inf
    assert weight.grad is None


def test_an_error_of_the_thread_that_reads_is_the_runs(project, tmp_path, monkeypatch, capfd):
    """In one line, after the step before it, and no thread is left."""
    out, read = tmp_path / "out", PackedBatches.micro_batches

    def fail_later(self, step):
        if step == 3:
            raise UserError("the disk is gone")
        return read(self, step)

    def wait(self, next_one=Feed.__next__):
        self.waited += 1000
        return next_one(self)

    monkeypatch.setattr(Feed, "__next__", wait)
    monkeypatch.setattr(PackedBatches, "micro_batches", fail_later)
    monkeypatch.setattr(sys, "argv", ["train.py", *words(project, out, "--save-every", "2")])
    threads = set(threading.enumerate())
    with pytest.raises(SystemExit) as exit_:
        exit_status(train.main)
    assert exit_.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1] == "error: the disk is gone"
    assert [line["step"] for line in lines(out)] == [1, 2, 3]
    assert [line["data_seconds"] // 1000 for line in lines(out)] == [2, 2, 2]  # each of two micro-batches
    assert (out / "checkpoints" / "step-2" / "state.json").exists()
    assert not any(thread.name.startswith("feed") for thread in set(threading.enumerate()) - threads)


MISTAKES = [
    (["--layers", "1,5"], "there is no layer 5; the model has 4 layers"),
    (["--method", "full", "--layers", "1,2"], "--layers"),
    (["--model", "nowhere"], "nowhere: no such directory"),
    (["--target", "nowhere"], "--target: nowhere: no such file or directory"),
    (["--gb", "0.5"], "--gb 0.5"),
    (["--gb", "-1"], "'-1' is not a number, 0 or more"),
    (["--seq-len", "4096"], "--seq-len 4096: the model has 128 positions"),
    (["--batch-tokens", "100"], "--batch-tokens 100 is not a multiple of --seq-len 32"),
    (["--seed", "-1"], "--seed: '-1' is not a whole number below 4294967296"),
    (["--seed", str(2**32)], "--seed: '4294967296' is not a whole number below"),
    (["--target-fraction", "2"], "'2' is not a number from 0 to 1"),
    (["--target-fraction", "0.000001"], "--target-fraction 1e-06: there would be nothing of the target language"),
    (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
    (["--text-field", "body"], "ko.jsonl:1: no field 'body'"),
    (["--target-field", "body"], "ko.jsonl:1: no field 'body'"),
    (["--source-field", "body"], "en.jsonl:1: no field 'body'"),
    (
        ["--source", "HERE/en.jsonl", "HERE/../*/ko.jsonl"],
        "ko.jsonl is in --target too; each language has texts of its",
    ),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES])
def test_mistakes_are_one_line(project, tmp_path, options, message, monkeypatch, capfd):
    options = [option.replace("HERE", str(project)) for option in options]
    assert status_of(monkeypatch, train.main, "train.py", *words(project, tmp_path / "out", *options)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_defaults_say_what_is_missing(tmp_path):
    process = Fork("train", ["--layers", "1,32"], tmp_path)
    (line,) = process.communicate()[1].splitlines()
    assert process.returncode == 2
    assert all(words in line for words in ("models/Llama-3.1-8B", "download", "--model"))
