"""--method lora: peft's logits, gradients, loss curve and files; dropout; merging; mistakes."""

import json
import sys

import families
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM

import train
from elo import lora
from elo.checkpoint import Checkpoint, load_model
from elo.distributed import ParallelOptions, parallelize, process_group
from elo.errors import exit_status
from elo.lora import LoraOptions
from elo.model import build

OPTIONS = LoraOptions(lora_rank=4, lora_alpha=12.0)
TOKENS = torch.randint(0, 300, (3, 41), generator=torch.Generator().manual_seed(0))


def ours(base, options=OPTIONS, dtype="fp32", seed=0, **parallel):
    model = build(base.config)
    lora.attach(model, options, seed)
    with process_group() as world:
        parallelize(model, world, ParallelOptions(dtype, compile=parallel.pop("compile", False), **parallel))
        base.load_into(model, lora.base_name)
        lora.initialize(model, seed)
        yield model


@pytest.fixture
def small(request, tmp_path):
    return Checkpoint(families.write(request.param, tmp_path / "base"))


def peft_model(base, options=OPTIONS):
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    targets = list(options.lora_target_modules) or "all-linear"
    config = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=targets)
    return get_peft_model(model, config)


def adapters(model):
    """Of either side, by the name in the checkpoint."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def local(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def copy(source, destination, b=True):
    there = adapters(destination)
    assert there.keys() == adapters(source).keys()
    for name, parameter in adapters(source).items():
        value = local(parameter)
        (there[name].to_local() if hasattr(there[name], "to_local") else there[name]).copy_(value)


def loss(model, tokens=TOKENS):
    labels = tokens[:, 1:].contiguous()
    if isinstance(model, PeftModel):
        return model(input_ids=tokens[:, :-1], shift_labels=labels, labels=labels, use_cache=False).loss
    return model(tokens[:, :-1].contiguous(), labels) / labels.numel()


CASES = [
    ("llama3", OPTIONS),
    ("mistral-v0.1", LoraOptions(lora_rank=2, lora_target_modules=("q_proj", "v_proj"))),
    ("qwen2", OPTIONS),
    ("qwen2.5-tied", LoraOptions(lora_rank=16, lora_alpha=8.0, lora_target_modules=("down_proj",))),
]


@pytest.mark.parametrize(("small", "options"), CASES, indirect=["small"], ids=str)
def test_logits_gradients_and_loss_curve_are_those_of_peft(small, options):
    theirs = peft_model(small, options)
    for mine in ours(small, options):
        with torch.no_grad():  # an adapter that does something
            for parameter in adapters(theirs).values():
                parameter.normal_(0, 0.1)
        copy(theirs, mine)
        torch.testing.assert_close(mine(TOKENS), theirs(TOKENS, use_cache=False).logits, atol=2e-5, rtol=1e-5)

        trained = [list(adapters(model).values()) for model in (mine, theirs)]
        optimizers = [torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.1) for parameters in trained]
        curves = ([], [])
        for step in range(20):
            for model, curve in zip((mine, theirs), curves, strict=True):
                value = loss(model, TOKENS.roll(step, 0) + step % 5)
                value.backward()
                curve.append(value.item())
            if step == 0:
                for name, parameter in adapters(theirs).items():
                    gradient = local(adapters(mine)[name].grad)
                    torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert curves[0] == pytest.approx(curves[1], rel=1e-4)
        assert curves[0][-1] < curves[0][0]


KOREAN, ENGLISH = "둘째로 더 많은 글이 필요하다. 그리고 끝. ", "First of all, a tokenizer needs some text. "


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora")
    families.VARIANTS["small"] = lambda: families.llama(vocab_size=400, tie_word_embeddings=True)
    families.write("small", directory / "model", dtype=torch.bfloat16)
    write_tokenizer(directory / "model")
    for name, text in (("ko", KOREAN), ("en", ENGLISH)):
        lines = [json.dumps({"text": f"{number} " + text * (number % 7 + 1)}) for number in range(60)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def words(project, out, *options):
    text = ["--target", project / "ko.jsonl", "--source", project / "en.jsonl", "--model", project / "model"]
    fixed = ["--seq-len", "32", "--batch-tokens", "160", "--lr", "1e-2", "--dtype", "fp32", "--method", "lora"]
    return [str(word) for word in [*fixed, *text, "--out", out, *options]]


def run(monkeypatch, script, *options):
    monkeypatch.setattr(sys, "argv", [script.__name__, *options])
    with pytest.raises(SystemExit) as exit_:
        exit_status(script.main)
    return exit_.value.code


def test_the_adapter_is_peft_s_and_merges(project, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(monkeypatch, train, *words(project, out, "--max-steps", "6")) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "elo.json",
        "metrics.jsonl",
        "run.json",
    ]
    adapter = load_file(out / "adapter_model.safetensors")
    assert len(adapter) == 4 * 7 * 2
    assert adapter["base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"].shape == (8, 48)
    base = AutoModelForCausalLM.from_pretrained(project / "model", dtype=torch.float32)
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
    before = load_file(project / "model" / "model.safetensors")
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
