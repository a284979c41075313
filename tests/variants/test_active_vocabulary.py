"""`train.py --active-vocabulary`: the loss of a head that has only the tokens of the texts."""

import json
from pathlib import Path

import families
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_runs import finish, lines, run_here, start
from transformers import AutoModelForCausalLM

from elo.data.encoding import DOCUMENT
from elo.data.shards import TokenShard
from elo.model.checkpoint import Checkpoint
from elo.model.decoder import build
from elo.runs.processes import process_group
from elo.runs.sharding import ParallelOptions, parallelize
from elo.variants.active_vocabulary import ActiveVocabulary

pytestmark = pytest.mark.usefixtures("in_project")
ONLY = "train --method elo --max-steps 6"


def shard(tokens, tokenizer_size=0):
    return TokenShard(tokens, np.zeros(0, DOCUMENT), np.bincount(tokens, minlength=tokenizer_size), [], 0, "", {})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("coverage", [None, 0.7])
def test_loss_and_gradients_are_those_of_fewer_logits(tied, coverage, tmp_path):
    families.VARIANTS["small"] = lambda: families.llama(tie_word_embeddings=tied)
    base = Checkpoint(families.write("small", tmp_path))
    size = base.config.vocab_size
    text = torch.randint(10, (2, 15), generator=torch.Generator().manual_seed(0)) ** 2 * 2
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    # The tokenizer may have special tokens beyond the rows.
    active = ActiveVocabulary.of([shard(part.numpy(), size + 3) for part in text], size, coverage)
    assert len(active.row_of) == size

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    head = theirs.lm_head.weight.detach()
    counts = torch.bincount(text.flatten(), minlength=size)
    by_frequency = sorted(counts.nonzero().flatten().tolist(), key=lambda token: -counts[token])
    kept = len(by_frequency)
    if coverage:
        kept = next(n for n in range(kept) if counts[by_frequency[:n]].sum() >= coverage * text.numel())
        assert kept < len(by_frequency) - 1
    ids, rest = sorted(by_frequency[:kept]), by_frequency[kept:]
    rows = head[ids]
    if rest:
        rows = torch.cat([rows, (head[rest] * counts[rest, None]).sum(0, keepdim=True) / counts[rest].sum()])
    place = {token: ids.index(token) if token in ids else kept for token in by_frequency}
    labels = torch.tensor([[place[int(token)] for token in row] for row in targets])
    hidden = theirs.model(tokens).last_hidden_state
    expected = F.cross_entropy((hidden @ rows.T).flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()

    with process_group() as world:
        model = build(base.config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".layers." in name)
        active.narrow(model)
        parallelize(model, world, ParallelOptions("fp32", compile=False))
        active.load_into(model, base, lambda name: name)
        assert torch.equal(active.row_of[targets], labels)
        loss = model(tokens, active.row_of[targets])
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-4)
        for name, parameter in theirs.model.layers.named_parameters():
            ours = model.model.layers.get_parameter(name).grad.full_tensor()
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-4)


def test_a_run(capsys):
    assert run_here(f"{ONLY} --active-vocabulary") == 0
    notes = json.loads(Path("out/elo.json").read_text())["active_vocabulary"]
    assert f"active vocabulary: {notes['kept']} of 450 tokens, 100.0000% of the text\n" in capsys.readouterr().out
    assert 0 < notes["kept"] < 450
    assert notes["coverage"] == 1
    before, after = load_file("base/model.safetensors"), load_file("out/model.safetensors")
    for name in after:
        origin = name.replace("layers.1.", "layers.3.")
        assert torch.equal(after[name], before[origin]) == ("layers" not in name), name
    assert run_here(ONLY, "whole") == 0
    # The terms that are missing can only make it smaller.
    assert all(a["loss"] < b["loss"] for a, b in zip(lines(Path("out")), lines(Path("whole")), strict=True))
    assert run_here(f"{ONLY} --active-vocabulary-coverage 1", "covered") == 0
    assert [line["loss"] for line in lines(Path("covered"))] == [line["loss"] for line in lines(Path("out"))]


def test_two_processes(tmp_path):
    command = f"{ONLY} --active-vocabulary-coverage 0.8"
    assert run_here(command) == 0
    assert json.loads(Path("out/elo.json").read_text())["active_vocabulary"]["sharing"] > 1
    finish(start(tmp_path, command, "two", "--standalone --nproc_per_node=2"))
    for one, two in zip(lines(Path("out")), lines(Path("two")), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method full --active-vocabulary", "--active-vocabulary goes with --method elo, not with full"),
        ("--method lora --active-vocabulary-coverage 0.9", "--active-vocabulary-coverage goes with --method elo"),
        ("--active-vocabulary-coverage 0", "'0' is not a number above 0 and at most 1"),
    ],
)
def test_mistakes(options, message, capsys):
    assert run_here(f"train {options}") == 2
    assert message in capsys.readouterr().err
