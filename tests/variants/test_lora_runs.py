"""train.py --method lora: peft's files, merging, any layout, going on; mistakes."""

import json
import shutil

import pytest
import torch
from commands import status_of
from forking import fork_group
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import losses, make_base
from transformers import AutoModelForCausalLM

import align
import train
from elo.model.checkpoint import load_model

TOKENS = torch.randint(0, 300, (3, 41), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("lora"))


def words(project, out, *options):
    text = ["--target", project / "ko.jsonl", "--source", project / "en.jsonl", "--model", project / "base"]
    fixed = ["--seq-len", "32", "--batch-tokens", "160", "--lr", "1e-2", "--dtype", "fp32", "--method", "lora"]
    return [str(word) for word in [*fixed, *text, "--out", out, *options]]


def run(monkeypatch, script, *options):
    return status_of(monkeypatch, script.main, script.__name__, *options)


def test_the_adapter_is_peft_s_and_merges(project, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(monkeypatch, train, *words(project, out, "--max-steps", "6")) == 0
    written = {"adapter_config.json", "adapter_model.safetensors", "elo.json", "metrics.jsonl", "run.json"}
    assert {path.name for path in out.iterdir()} == written
    adapter = load_file(out / "adapter_model.safetensors")
    assert len(adapter) == 4 * 7 * 2
    assert adapter["base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"].shape == (8, 48)
    base = AutoModelForCausalLM.from_pretrained(project / "base", dtype=torch.float32)
    plain = base(TOKENS).logits
    theirs = PeftModel.from_pretrained(base, out)
    for name, parameter in theirs.named_parameters():
        if "lora" in name:
            assert torch.equal(parameter, adapter[name.replace(".default", "")])
    with_adapter = theirs(TOKENS).logits
    assert (with_adapter - plain).abs().max() > 0.1
    # transformers finds the base by itself
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(TOKENS).logits, with_adapter
    )

    assert run(monkeypatch, train, *words(project, tmp_path / "merged", "--max-steps", "6", "--merge")) == 0
    assert load_file(tmp_path / "merged/adapter/adapter_model.safetensors").keys() == adapter.keys()
    merged, expected = load_file(tmp_path / "merged/model.safetensors"), theirs.merge_and_unload().state_dict()
    before = load_file(project / "base" / "model.safetensors")
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        if "_proj" in name:
            torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-8, atol=1e-7)
        else:
            assert torch.equal(tensor, before[name])
    # and it is a checkpoint for all that follows
    tokens = TOKENS[:, :30]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(load_model(tmp_path / "merged", "cpu", torch.float32)(tokens), whole(tokens).logits)


SHORT = ["--max-steps", "6", "--micro-batch", "2"]


@pytest.fixture
def plain(project, tmp_path, monkeypatch):
    assert run(monkeypatch, train, *words(project, tmp_path / "plain", *SHORT, "--save-every", "2")) == 0
    return tmp_path / "plain"


def test_any_layout_gives_the_same_run(project, plain, tmp_path, monkeypatch):
    one = losses(plain)
    layouts = {
        "micro-batch": ["--micro-batch", "5", "--activation-checkpointing"],
        "in-backward": ["--micro-batch", "5", "--clip", "0", "--optimizer-in-backward"],
        "unclipped": ["--micro-batch", "5", "--clip", "0"],
        "offload": ["--cpu-offload"],
    }
    for name, options in layouts.items():
        assert run(monkeypatch, train, *words(project, tmp_path / name, *SHORT, *options)) == 0
    for process in fork_group(2, "train", words(project, tmp_path / "processes", *SHORT, "--merge")):
        assert process.wait() == 0
    for name in ("micro-batch", "offload", "processes"):
        assert losses(tmp_path / name) == pytest.approx(one, rel=2e-5), name
    assert losses(tmp_path / "in-backward") == losses(tmp_path / "unclipped")
    found = load_file(tmp_path / "processes/adapter/adapter_model.safetensors")
    expected = load_file(plain / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-3)


def test_a_resumed_run_is_the_same_to_the_last_bit(project, plain, monkeypatch):
    weights, before = (plain / "adapter_model.safetensors").read_bytes(), losses(plain)
    held = load_file(plain / "checkpoints/step-4/part-0.safetensors")
    assert len([name for name in held if name.endswith(".weight")]) == 56
    assert all("lora_" in name for name in held)
    # as if it had been killed in its last step
    shutil.rmtree(plain / "checkpoints/step-6")
    for file in ("adapter_config.json", "adapter_model.safetensors", "elo.json"):
        (plain / file).unlink()
    assert run(monkeypatch, train, *words(project, plain, *SHORT, "--save-every", "2")) == 0
    assert losses(plain) == before
    assert (plain / "adapter_model.safetensors").read_bytes() == weights


def test_alignment_goes_on_after_it(project, tmp_path, monkeypatch, capfd):
    assert run(monkeypatch, train, *words(project, tmp_path / "lora", "--gb", "0.000003")) == 0
    notes = json.loads((tmp_path / "lora/elo.json").read_text())
    assert notes["method"] == "lora"
    assert notes["options"]["lora_alpha"] == 16
    options = words(project, tmp_path / "after", "--after", tmp_path / "lora", "--gb", "0.000001")
    del options[options.index("--method") :][:2]
    options = [word for word in options if word not in ("--method", "lora")]
    assert run(monkeypatch, align, *options) == 0
    consumed = json.loads((tmp_path / "after/elo.json").read_text())["consumed"]
    assert consumed["position"] > notes["consumed"]["position"]
    options[options.index("--after")] = "--elo"
    options[options.index("--out") + 1] = str(tmp_path / "elo")
    assert run(monkeypatch, align, *options) == 2
    assert "takes a result of train.py --method elo" in capfd.readouterr().err


def test_another_run_leaves_no_adapter_behind(project, tmp_path, monkeypatch):
    """transformers would add it to the new model."""
    for merge in ([], ["--merge"]):
        assert (
            run(monkeypatch, train, *words(project, tmp_path / "out", "--max-steps", "1", "--overwrite", *merge)) == 0
        )
        plain = words(project, tmp_path / "out", "--max-steps", "1", "--overwrite", "--method", "elo")
        assert run(monkeypatch, train, *plain) == 0
        left = {path.name for path in (tmp_path / "out").iterdir()}
        assert not {name for name in left if "adapter" in name}
        assert "config.json" in left


MISTAKES = [
    (["--lora-target-modules", "q_proj", "qkv"], "--lora-target-modules qkv: the blocks' linear layers are q_proj, k_"),
    (["--lora-target-modules", "lm_head"], "--lora-target-modules lm_head: the blocks' linear layers are"),
    (["--layers", "1,2"], "--layers 1,2: --method lora trains all layers"),
    (["--lora-rank", "0"], "'0' is not a whole number above 0"),
    (["--lora-alpha", "-1"], "'-1' is not a number above 0"),
    (["--method", "elo", "--lora-rank", "8"], "--lora-rank is an option of --method lora, not elo"),
    (["--method", "full", "--merge"], "--merge is an option of --method lora, not full"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES])
def test_mistakes_are_one_line(project, tmp_path, monkeypatch, capfd, options, message):
    assert run(monkeypatch, train, *words(project, tmp_path / "out", *options)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()
