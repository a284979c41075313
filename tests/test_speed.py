"""`python -m eval speed` compares like with like. How fast, no test can say."""

import json
import sys

import families
import pytest
import torch

from elo.checkpoint import Checkpoint
from elo.distributed import process_group
from elo.errors import exit_status
from eval import __main__ as evaluation
from eval.speed import elo_step, transformers_step


def test_both_sides_take_the_same_steps(tmp_path):
    base = Checkpoint(families.write("llama3", tmp_path))
    text = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    with process_group() as world:
        ours = elo_step(base, (1, 4), "fp32", tokens, labels, world)
        theirs = transformers_step(base, (1, 4), torch.float32, tokens, labels, world)
        trained = [[name for name, p in step.model.named_parameters() if p.requires_grad] for step in (ours, theirs)]
        assert trained[0] == trained[1]
        for _ in range(3):
            assert ours.loss().item() == pytest.approx(theirs.loss().item(), rel=1e-5)
            ours()
            theirs()
        for mine, other in zip(ours.trained, theirs.trained, strict=True):
            torch.testing.assert_close(mine.to_local(), other, rtol=1e-4, atol=1e-6)


def test_report(tmp_path, monkeypatch, capsys):
    families.write("llama3", tmp_path)
    options = ["--batch", "2", "--seq-len", "16", "--rounds", "1", "--json", str(tmp_path / "speed.json")]
    monkeypatch.setattr(sys, "argv", ["eval", "speed", "--model", str(tmp_path), *options])
    with pytest.raises(SystemExit) as exit_:
        exit_status(evaluation.main)
    assert exit_.value.code == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    assert [(row["implementation"], row["dtype"]) for row in result["rows"]] == [
        ("elo", "bf16"),
        ("transformers", "bf16"),
        ("elo", "fp32"),
        ("transformers", "fp32"),
    ]
    for row in result["rows"]:
        assert row["method"] == "elo"
        assert row["tokens_per_second"] > 0
        assert row["memory_bytes"] > 0
    ratio = result["rows"][0]["memory_bytes"] / result["rows"][1]["memory_bytes"]
    assert result["ratios"]["memory_bytes bf16 elo/transformers"] == ratio
    assert "elo/transformers" in capsys.readouterr().out
