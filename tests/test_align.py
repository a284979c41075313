"""align.py: the layers back in place, new documents only, and every parameter trained."""

import json
import shutil

import families
import pytest
import torch
from commands import status_of
from safetensors.torch import load_file, save_file
from small_tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM

import align
import train
from elo.model.checkpoint import load_model

COMMON = ["--seq-len", "32", "--batch-tokens", "128", "--lr", "1e-2", "--dtype", "fp32"]


def run(script, monkeypatch, *words):
    return status_of(monkeypatch, script.main, script.__name__, *COMMON, *words)


@pytest.fixture(params=["llama3.2-tied", "mistral-v0.3", "qwen2-sliding"])
def project(request, tmp_path, monkeypatch):
    """A base model of each family, two corpora, and a stage-1 result on 4 kB of them."""
    variant = families.VARIANTS[request.param]

    def sized():
        architecture, config = variant()
        config.vocab_size = 400
        return architecture, config

    monkeypatch.setitem(families.VARIANTS, "sized", sized)
    base = families.write("sized", tmp_path / "base", dtype=torch.bfloat16)
    write_tokenizer(base)
    for name in ("ko", "en", "ja"):
        texts = [f"{name} {number} " * (number % 9 + 2) for number in range(300)]
        lines = [json.dumps({"text": text, "upper": text.upper()}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    text = ["--model", base, "--target", tmp_path / "ko.jsonl", "--source", tmp_path / "en.jsonl"]
    assert run(train, monkeypatch, *text, "--gb", "0.000004", "--out", tmp_path / "elo", "--layers", "1,4") == 0
    return tmp_path, text


def test_replacement_changes_the_trained_layers_only(project, monkeypatch):
    directory, text = project
    out = directory / "replaced"
    assert run(align, monkeypatch, *text, "--elo", directory / "elo", "--gb", "0", "--out", out) == 0
    base, elo, replaced = (load_file(directory / name / "model.safetensors") for name in ("base", "elo", "replaced"))
    assert replaced.keys() == base.keys()
    for name, tensor in replaced.items():
        in_slice = name.replace("layers.3.", "layers.1.")
        trained = "layers.0." in name or "layers.3." in name
        assert torch.equal(tensor, elo[in_slice] if trained else base[name])
    assert not torch.equal(replaced["model.layers.3.mlp.up_proj.weight"], base["model.layers.3.mlp.up_proj.weight"])
    tokens = torch.arange(60).view(2, 30)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(load_model(out, "cpu", torch.float32)(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


def test_alignment_trains_everything_on_new_documents(project, monkeypatch):
    directory, text = project
    seen = []
    original = align.pretraining.PackedBatches.__init__

    def spy(self, windows, *rest):
        original(self, windows, *rest)
        seen.append({name for index in range(len(windows)) for name in windows.documents(index)})

    monkeypatch.setattr(align.pretraining.PackedBatches, "__init__", spy)
    again = [*text, "--gb", "0.000004"]
    assert run(train, monkeypatch, *again, "--out", directory / "again") == 0
    aligned = [*text, "--elo", directory / "elo", "--gb", "0.000003", "--out", directory / "aligned"]
    assert run(align, monkeypatch, *aligned) == 0
    control = [*text, "--after", directory / "elo", "--gb", "0.000003", "--out", directory / "control"]
    assert run(align, monkeypatch, *control) == 0
    adapters = [*text, "--method=lora", "--after", directory / "elo", "--gb", "0.000003", "--out", directory / "lora"]
    assert run(train, monkeypatch, *adapters) == 0
    stage_1, stage_2, stage_2_control, stage_2_adapters = seen
    assert stage_1
    assert stage_2
    assert not stage_1 & stage_2
    assert stage_2 == stage_2_control == stage_2_adapters

    base, aligned, control = (load_file(directory / d / "model.safetensors") for d in ("base", "aligned", "control"))
    assert all(not torch.equal(aligned[name], base[name]) for name in base)
    assert not torch.equal(aligned["model.layers.0.mlp.up_proj.weight"], control["model.layers.0.mlp.up_proj.weight"])
    losses = [json.loads(line)["loss"] for line in (directory / "aligned" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_memory_options_change_no_number(project, monkeypatch):
    directory, text = project
    runs = {
        "plain": [],
        "in-backward": ["--optimizer-in-backward"],
        "checkpointing": ["--activation-checkpointing"],
        "offload": ["--cpu-offload"],
    }
    for name, options in runs.items():
        fixed = ["--gb", "0.000003", "--clip", "0", "--micro-batch", "4", "--max-steps", "4"]
        assert (
            run(align, monkeypatch, *text, *fixed, "--after", directory / "elo", "--out", directory / name, *options)
            == 0
        )
    plain = (directory / "plain" / "model.safetensors").read_bytes()
    for name in runs:
        assert (directory / name / "model.safetensors").read_bytes() == plain, name


def edit_tensors(elo, change):
    tensors = load_file(elo / "model.safetensors")
    change(tensors)
    save_file(tensors, elo / "model.safetensors")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


UP, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
DAMAGE = {
    # what is said: what is done to the result of stage 1
    f"{EMBEDDING}, which stage 1 froze, differs": (
        lambda elo: edit_tensors(elo, lambda tensors: tensors[EMBEDDING][3, 3].add_(1))
    ),
    "rms_norm_eps is 0.5": lambda elo: edit_json(elo / "config.json", rms_norm_eps=0.5),
    "there is no layer 9; the model has 4 layers": lambda elo: edit_json(elo / "elo.json", layers=[1, 9]),
    "num_hidden_layers is 2, but of layers 1 of": lambda elo: edit_json(elo / "elo.json", layers=[1]),
    f"tensor {UP} of shape (112, 48) is missing": lambda elo: edit_tensors(elo, lambda tensors: tensors.pop(UP)),
    "has shape (112, 47), config.json says (112, 48)": (
        lambda elo: edit_tensors(elo, lambda tensors: tensors.update({UP: torch.zeros(112, 47)}))
    ),
    "elo.json: cannot be read": lambda elo: (elo / "elo.json").unlink(),
}


@pytest.mark.parametrize("project", ["llama3.2-tied"], indirect=True)
def test_what_does_not_fit_is_refused(project, monkeypatch, capfd):
    directory, text = project
    for number, (expected, damage) in enumerate(DAMAGE.items()):
        broken = directory / f"broken-{number}"
        shutil.copytree(directory / "elo", broken)
        damage(broken)
        capfd.readouterr()
        assert run(align, monkeypatch, *text, "--elo", broken, "--gb", "0.000003", "--out", directory / "out") == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert expected in line
    shutil.copytree(directory / "elo", directory / "less")
    edit_json(directory / "less/elo.json", consumed={"position": 0})
    for options, message in {
        ("--seed", "7"): "other seed",
        ("--after", directory / "less"): "it ended before the run of --elo, whose documents would come again",
        ("--target", directory / "ja.jsonl"): "other documents",
        ("--target-field", "upper"): "other documents",
        ("--source-field", "upper"): "other documents",
        ("--gb", "1"): "GB of an earlier stage: 0.9",
        ("--optimizer-in-backward",): "give --clip 0",
    }.items():
        capfd.readouterr()
        fixed = [*text, "--elo", directory / "elo", "--gb", "0.000003", "--out", directory / "out", *options]
        assert run(align, monkeypatch, *fixed) == 2
        assert message in capfd.readouterr().err
    assert not (directory / "out").exists()
    # A sibling of the base that another training made of it, without its embedding, norm and head.
    put_back = [*text, "--elo", directory / "elo", "--gb", "0", "--overwrite", "--out", directory / "out"]
    for is_sibling in (False, True):
        if is_sibling:
            edit_tensors(directory / "base", lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].neg_())
        capfd.readouterr()
        assert run(align, monkeypatch, *put_back) == 0
        assert ("its layers were trained for another model, which has the same" in capfd.readouterr().err) == is_sibling
