"""--method lora: peft's logits, gradients, loss curve and files; merging; mistakes."""

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import families
import pytest
import torch
import torch.nn.functional as F
from forking import fork_group
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_runs import losses, make_base
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

import align
import train
from elo.common.errors import exit_status
from elo.model.checkpoint import Checkpoint, load_model
from elo.model.decoder import build
from elo.runs.processes import process_group
from elo.runs.sharding import ParallelOptions, parallelize
from elo.variants import lora
from elo.variants.lora import LoraOptions

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = LoraOptions(lora_rank=4, lora_alpha=12.0)
TOKENS = torch.randint(0, 300, (3, 41), generator=torch.Generator().manual_seed(0))


@contextmanager
def ours(base, options=OPTIONS, seed=0):
    model = build(base.config)
    lora.attach(model, options)
    with process_group() as world:
        parallelize(model, world, ParallelOptions("fp32", compile=False))
        base.load_into(model, lora.unadapted_name)
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
def copy(source, destination):
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
    *((variant, OPTIONS) for variant in families.ONE_EACH),
    ("mistral-v0.1", LoraOptions(lora_rank=2, lora_target_modules=("q_proj", "v_proj"))),
    ("qwen2", OPTIONS),
    ("qwen2.5-tied", LoraOptions(lora_rank=16, lora_alpha=8.0, lora_target_modules=("down_proj",))),
]


@pytest.mark.parametrize(("small", "options"), CASES, indirect=["small"], ids=str)
def test_logits_gradients_and_loss_curve_are_those_of_peft(small, options):
    theirs = peft_model(small, options)
    with ours(small, options) as mine:
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


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("lora"))


def words(project, out, *options):
    text = ["--target", project / "ko.jsonl", "--source", project / "en.jsonl", "--model", project / "base"]
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
    ours, theirs = (
        load_file(tmp_path / "processes/adapter/adapter_model.safetensors"),
        load_file(plain / "adapter_model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)


def test_compiled_blocks_share_their_graphs(tmp_path):
    """On the backend that compiles fast."""
    base = Checkpoint(families.write("llama3", tmp_path))
    values = []
    for compiled in (False, True):
        with ours(base) as model:
            if compiled:
                torch._dynamo.reset()
                counters.clear()
                for block in model.model.layers:
                    block.compile(fullgraph=True, backend="aot_eager")
            value = loss(model)
            value.backward()
            values.append([value.item()] + [local(p.grad).norm().item() for p in adapters(model).values()])
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert counters["stats"]["unique_graphs"] <= 2


def test_a_resumed_run_is_the_same_to_the_last_bit(project, plain, monkeypatch):
    weights, before = (plain / "adapter_model.safetensors").read_bytes(), losses(plain)
    held = FileSystemReader(plain / "checkpoints/step-4").read_metadata().state_dict_metadata
    assert len([name for name in held if name.startswith("model.model.")]) == 56
    assert all("lora_" in name for name in held if name.startswith("model.model."))
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


def test_initialization_is_peft_s_and_the_seed_s(tmp_path):
    base = Checkpoint(families.write("llama3", tmp_path))
    seeds = []
    for seed in (0, 0, 1):
        with ours(base, seed=seed) as model:
            seeds.append({name: local(p).clone() for name, p in adapters(model).items()})
    first = next(iter(seeds[0]))
    assert torch.equal(seeds[0][first], seeds[1][first])
    assert not torch.equal(seeds[0][first], seeds[2][first])
    for name, parameter in adapters(peft_model(base)).items():
        value = seeds[0][name]
        if "lora_B" in name:
            assert not value.any()
            assert not parameter.any()
        else:
            assert value.abs().max() < value.shape[1] ** -0.5 * 1.0001
            assert value.std().item() == pytest.approx(parameter.std().item(), rel=0.15)


def test_gradients_are_those_of_plain_autograd():
    torch.manual_seed(0)
    linear = nn.Linear(24, 20)
    layer = lora.LoraLinear(linear, LoraOptions(4, 12.0))
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(3, 10, 24, requires_grad=True)
    weights = [x, layer.lora_A.weight, layer.lora_B.weight]
    expected = F.linear(x, linear.weight, linear.bias) + 12 / 4 * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    torch.testing.assert_close(layer(x), expected)
    gradient = torch.randn_like(expected)
    for ours_, theirs in zip(
        torch.autograd.grad(layer(x), weights, gradient), torch.autograd.grad(expected, weights, gradient), strict=True
    ):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-4)
