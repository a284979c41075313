"""`--model` may be the directory of a LoRA adapter: peft's logits, the merged run's results, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import families
import pytest
import torch
from commands import status_of
from forking import Fork
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_runs import make_base, result, run_here, states
from transformers import AutoModelForCausalLM

import align
from elo.common.errors import UserError
from elo.model.checkpoint import load_model
from elo.variants.adapted import Adapted, open_checkpoint

TOKENS = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(0))


def peft_adapter(base, out, **settings):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1, generator=generator)
    model.save_pretrained(out)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 12.0, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"},
        {"r": 9, "lora_alpha": 6.0, "target_modules": "all-linear", "use_rslora": True},
        {"r": 2, "target_modules": ["down_proj"], "layers_to_transform": [1, 3]},
    ],
)
@pytest.mark.parametrize("variant", families.ONE_EACH)
def test_an_adapter_of_peft(variant, settings, tmp_path):
    theirs = peft_adapter(families.write(variant, tmp_path / "base"), tmp_path / "adapter", **settings)
    ours = load_model(open_checkpoint(tmp_path / "adapter"), "cpu", torch.float32)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)
    plain = load_model(tmp_path / "base", "cpu", torch.float32)
    assert not torch.allclose(plain(TOKENS), ours(TOKENS), atol=1e-2)


def test_its_own_chat_template_is_not_read_without_a_word(tmp_path, capsys):
    base, adapter = families.write(families.ONE_EACH[0], tmp_path / "base"), tmp_path / "adapter"
    peft_adapter(base, adapter, r=2, target_modules=["q_proj"])
    capsys.readouterr()
    said = []
    for own in (None, "one", "two"):
        if own:
            (adapter / "chat_template.jinja").write_text(own)
            (base / "chat_template.jinja").write_text("one")
        open_checkpoint(adapter)
        said.append(capsys.readouterr().err)
    assert said == ["", "", f"{adapter}: its own chat template is not read, but that of its base, {base}\n"]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The same run as an adapter and merged."""
    make_base(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, option in (("adapter", ""), ("merged", "--merge")):
        assert run_here(f"train --method lora --max-steps 8 {option}", name) == 0
    return tmp_path


def test_it_gives_what_the_merged_run_gives(runs):
    adapted = open_checkpoint("adapter")
    merged = load_file("merged/model.safetensors")
    assert all(torch.equal(adapted.tensor(name), merged[name]) for name in adapted.names())
    assert adapted.fingerprint() != open_checkpoint("base").fingerprint()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32), "adapter")
    ours = load_model(adapted, "cpu", torch.float32)
    # The base is in bf16, and so are the sums.
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=0.1, rtol=0)


def test_a_finished_adapter_is_merged(runs, monkeypatch, capfd):
    """As --merge would have; what is trained takes the merged model, and says how to make it."""

    shutil.copy("base/config.json", "adapter")  # as some trainers do

    def align_with(*words):
        return status_of(monkeypatch, align.main, "align.py", *words)

    for model, said in (("base", "Without --elo nothing was put back: a copy of --model"), ("adapter", "The model")):
        assert align_with("--model", model, "--gb", "0", "--out", "later", "--overwrite") == 0
        assert f"{said} is in later.\n" in capfd.readouterr().out
    assert Path("later/model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()
    assert Path("later/tokenizer.json").read_bytes() == Path("base/tokenizer.json").read_bytes()
    text = ["--target", "ko.jsonl", "--source", "en.jsonl", "--seq-len", "32", "--out", "aligned"]
    for words in (text, [*text, "--gb", "0", "--elo", "merged"]):
        assert align_with("--model", "adapter", *words) == 2
        assert "align.py --model adapter --gb 0 --out MERGED" in capfd.readouterr().err


MERGE = "train --method lora --max-steps 8 --merge"


class Killed(BaseException):
    """Nothing catches it: like a kill, it leaves the files as they are."""


def kill_at(patch, number, moves):
    """After `number` moves to and removals from their places in OUT; all that happen are noted."""

    def counted(function):
        def move(*paths):
            if Path(paths[-1]).parts[0] != "adapter" or Path(paths[-1]).name == "run.json":
                return function(*paths)
            if len(moves) == number:
                raise Killed
            moves.append(Path(paths[-1]).name)
            return function(*paths)

        return move

    patch.setattr(os, "replace", counted(os.replace))
    patch.setattr(Path, "unlink", lambda path, missing_ok: path.exists() and unlink(path))
    unlink = counted(os.unlink)


def test_a_finished_run_is_merged_in_its_place(runs, monkeypatch, capfd):
    """As if --merge had been given before; and at every moment there is a model, of which nothing is lost."""
    shutil.copytree("adapter", "copy")
    with monkeypatch.context() as patch:
        kill_at(patch, None, moves := [])
        assert run_here(f"{MERGE} --resume", "adapter") == 0
    assert (
        "The adapter is merged: the model is in adapter, and the adapter in adapter/adapter." in capfd.readouterr().out
    )
    assert moves.index("config.json") == len(moves) - 3
    merged, weights = result(Path("merged")), load_file("merged/model.safetensors")
    assert result(Path("adapter")) == merged

    for number in (2, len(moves) - 3, len(moves) - 2):
        shutil.rmtree("adapter")
        shutil.copytree("copy", "adapter")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, number, [])
            run_here(MERGE, "adapter")
        model = open_checkpoint("adapter")
        assert isinstance(model, Adapted) == (number < len(moves) - 2)
        assert all(torch.equal(model.tensor(name), value) for name, value in weights.items())
        with monkeypatch.context() as patch:
            patch.delattr("elo.training.accumulate")  # no step is trained again
            assert run_here(MERGE, "adapter") == 0
        assert result(Path("adapter")) == merged
    assert run_here(f"{MERGE} --resume", "adapter") == 0
    assert "adapter: this run is finished" in capfd.readouterr().out
    assert run_here(MERGE, "adapter") == 2


def test_merging_a_finished_run_keeps_the_states_it_asked_for(runs):
    assert run_here("train --method lora --max-steps 1 --save-every 1", "kept") == 0
    assert run_here("train --method lora --max-steps 1 --merge", "kept") == 0
    assert states(Path("kept")) == ["step-1"]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("eval.__main__", ["perplexity", "--data", "ko.jsonl", "--seq-len", "32", "--dtype", "fp32"]),
        ("elo.generation.chat", ["--raw", "--prompt", "First of", "--max-new-tokens", "9", "--temperature", "0"]),
    ],
)
def test_the_commands_take_it(module, words, runs):
    said = []
    for model in ("adapter", "merged"):
        process = Fork(module, [*words, "--model", model], runs)
        said.append(process.communicate()[0])
        assert process.returncode == 0, process.said("err")
    assert said[0] == said[1] != ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "adapter_config.json: use_dora = True is not implemented"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is not implemented"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not implemented"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' is not implemented"),
        ({"layer_replication": [[0, 2], [1, 4]]}, "layer_replication = [[0, 2], [1, 4]] is not implemented"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config = {'beta': 1.0} is not implemented"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = {'q_proj': 2} is not implemented"),
        ({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}, "which is no directory here"),
        ({"r": 3}, "do not multiply to its"),
        ({"r": 0}, "r must be"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_adapters_that_are_refused(change, message, runs):
    path = Path("adapter/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="adapter_") as error:
        open_checkpoint("adapter")
    assert message in str(error.value)


def test_an_adapter_of_a_tied_head_is_refused(tmp_path):
    """It is not one of the embedding too, under whichever name the matrix of both is stored."""
    base, adapter = families.write("smollm2", tmp_path / "base"), tmp_path / "adapter/adapter_model.safetensors"
    peft_adapter(base, adapter.parent, r=2, target_modules=["q_proj"])
    tensors = load_file(base / "model.safetensors")
    rows, width = tensors["model.embed_tokens.weight"].shape
    save_file({"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), **tensors}, base / "model.safetensors")
    open_checkpoint(adapter.parent)  # the base's two copies are compared before there is an adapter
    save_file({"lm_head.weight": tensors.pop("model.embed_tokens.weight"), **tensors}, base / "model.safetensors")
    halves = {"A": torch.zeros(2, width), "B": torch.zeros(rows, 2)}
    save_file({f"base_model.model.lm_head.lora_{half}.weight": value for half, value in halves.items()}, adapter)
    with pytest.raises(UserError, match=r"lm_head\.lora_[AB]\.weight is no half of a product"):
        open_checkpoint(adapter.parent)


def test_damaged_weights(runs):
    path = Path("adapter/adapter_model.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_A" in name)
    for changed in (
        {other: value for other, value in tensors.items() if other != name},
        tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 2)},
        tensors | {name.replace("layers.0", "layers.9"): tensors[name].clone()},
        tensors | {f"base_model.model.model.norm.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"},
    ):
        save_file(changed, path)
        with pytest.raises(UserError, match=r"adapter_model.safetensors: tensor .* is no half of a product"):
            open_checkpoint("adapter")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        open_checkpoint("adapter")
    path.unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors: not found"):
        open_checkpoint("adapter")
    shutil.rmtree("adapter")
