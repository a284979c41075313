"""The published tokenizers: the same ids for real texts."""

import base64
import itertools
import random
import unicodedata

import pytest
import tiktoken
import tokenizers
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from small_tokenizer import llama_json
from tokenizer_styles import LLAMA3, MISTRAL_V3, PIECES, corpus, needs_shared, published, without_added_tokens, write

from elo.text.byte_level_bpe import LLAMA3_PATTERN
from elo.text.tokenizer import load_tokenizer


@needs_shared
@pytest.mark.parametrize(
    ("name", "bos_id", "eos_id", "size"), [("qwen2", None, 151643, 151936), ("smollm2", None, 0, 49152)]
)
def test_published_tokenizer_json(tmp_path, name, bos_id, eos_id, size):
    directory = published(name, tmp_path)
    ours = load_tokenizer(directory)
    reference = without_added_tokens((directory / "tokenizer.json").read_text(encoding="utf-8"))
    documents = [*corpus(), *("".join(pair) for pair in itertools.product(PIECES, PIECES))]
    ids = ours.encode_batch(documents)
    assert ids == [encoding.ids for encoding in reference.encode_batch(documents)]
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (bos_id, eos_id, size)
    expected = [unicodedata.normalize("NFC", text) if name == "qwen2" else text for text in corpus()]
    assert [ours.decode(document) for document in ids[: len(expected)]] == expected


def test_published_llama3():
    ours = load_tokenizer(LLAMA3)
    lines = (LLAMA3 / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    reference = tiktoken.Encoding("x", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert ours.encode_batch(corpus()) == reference.encode_ordinary_batch(corpus())
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (128000, 128001, 128256)
    assert ours.special_tokens["<|eot_id|>"] == 128009


def test_published_mistral(tmp_path):
    mistral = MistralTokenizer.v3()
    ours = load_tokenizer(write(tmp_path, tokenizer__model=MISTRAL_V3.read_bytes()))
    reference = mistral.instruct_tokenizer.tokenizer
    documents = [*corpus(), *("".join(pair) for pair in itertools.product(PIECES, PIECES))]
    assert ours.encode_batch(documents) == [reference.encode(text, bos=False, eos=False) for text in documents]
    assert ours.encode("[REFERENCE_DOC_1]") == reference.encode("[REFERENCE_DOC_1]", bos=False, eos=False)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 32768)
    assert ours.special_tokens["[/INST]"] == 4


@pytest.mark.parametrize("scheme", ["first", "prepend"])
def test_published_mistral_without_its_model_file(tmp_path, scheme):
    model = MISTRAL_V3.read_bytes()
    directory = write(tmp_path, tokenizer__json=llama_json(scheme, model))
    ours, reference = load_tokenizer(directory), tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    reference.encode_special_tokens = True
    rnd, pieces = random.Random(0), [*llama_json(scheme, model)["model"]["vocab"], *PIECES]
    documents = [*corpus(), *("".join(rnd.choices(pieces, k=6)).replace("▁", rnd.choice("▁ ")) for _ in range(5000))]
    expected = [encoding.ids for encoding in reference.encode_batch(documents, add_special_tokens=False)]
    assert ours.encode_batch(documents) == expected
