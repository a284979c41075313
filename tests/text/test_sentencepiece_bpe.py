"""SentencePiece: ids and text as it gives them; a tokenizer.json that restates its model is exact, or refused."""

import itertools
import json
import pickle
import random
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from small_tokenizer import llama_json
from tokenizer_styles import PIECES, begin_of_text, processor_of, texts, train_sentencepiece, write
from tokenizers import models

from elo.common.errors import UserError
from elo.text.sentencepiece_bpe import sentencepiece_of
from elo.text.tokenizer import load_tokenizer
from elo.text.tokenizer_json import Prefix


def test_ids_equal_those_of_sentencepiece(sentencepiece_directory):
    ours, reference = load_tokenizer(sentencepiece_directory), processor_of(sentencepiece_directory)
    control = {id for id in range(reference.get_piece_size()) if reference.is_control(id)}

    @settings(max_examples=300, deadline=None)
    @given(texts)
    def check(text):
        ids = ours.encode(text)
        assert ids == reference.encode(text)
        assert ours.decode(ids) == reference.decode(ids) == text.replace("▁", " ")
        assert not set(ids) & control

    check()


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_sentencepiece_decodes_as_its_model_says(tmp_path, add_dummy_prefix):
    directory = train_sentencepiece(tmp_path / "sp", add_dummy_prefix=add_dummy_prefix)
    ours, reference = load_tokenizer(directory), processor_of(directory)
    for text in ("fox", " fox", "  fox", "", " ", "\x00 fox"):
        assert ours.decode(ours.encode(text)) == reference.decode(reference.encode(text)) == text
    space = reference.piece_to_id("▁")
    for ids in ([1, space], [1, space, space], [reference.piece_to_id("<0x20>"), space], [0]):
        assert ours.decode(ids) == reference.decode(ids)


def test_user_defined_symbols_that_are_special_are_not_found_in_text(tmp_path):
    symbols = ["<|im_end|>", "[DOC_1]", "[CALL]"]
    directory = train_sentencepiece(tmp_path / "sp", user_defined_symbols=",".join(symbols))
    reference = processor_of(directory)
    call = reference.piece_to_id("[CALL]")
    write(directory, tokenizer_config__json={"added_tokens_decoder": {call: {"content": "[CALL]", "special": True}}})
    ours = load_tokenizer(directory)
    text = "a <|im_end|> [CALL]"
    assert not {reference.piece_to_id("<|im_end|>"), call} & set(ours.encode(text))
    assert ours.decode(ours.encode(text)) == text
    assert ours.special_tokens["<|im_end|>"] == reference.piece_to_id("<|im_end|>")
    assert ours.decode([call, ours.special_tokens["<|im_end|>"], *ours.encode("fox")]) == "fox"
    assert ours.encode("a [DOC_1]") == reference.encode("a [DOC_1]")  # plain text to SentencePiece, and to us


# ---- a tokenizer.json


@pytest.mark.parametrize("scheme", ["first", "always", "never", "prepend"])
def test_a_tokenizer_json_that_restates_sentencepiece(tmp_path, scheme):
    """As transformers 5 saves Llama 2 and Mistral, and with the normalizer of transformers 4."""
    directory = write(tmp_path, tokenizer__json=llama_json(scheme))
    ours, reference = load_tokenizer(directory), tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    reference.encode_special_tokens = True

    @settings(max_examples=300, deadline=None)
    @given(texts)
    def check(text):
        ids = ours.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == reference.decode(ids)

    check()
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (None, 2, 500)
    assert pickle.loads(pickle.dumps(ours)).encode_batch(PIECES) == ours.encode_batch(PIECES)
    every = range(reference.get_vocab_size())
    assert [ours.decode([id]) for id in every] == [reference.decode([id]) for id in every]
    content = llama_json(scheme) | {"post_processor": json.loads(begin_of_text(500).__getstate__())}
    content["added_tokens"] = content["added_tokens"] + [{"id": 500, "content": "<|begin_of_text|>", "special": True}]
    assert load_tokenizer(write(tmp_path, tokenizer__json=content)).bos_id == 500


LLAMA_REFUSED = {
    "byte_fallback": {"model": lambda model: {"byte_fallback": False}},
    "ignore_merges": {"model": lambda model: {"ignore_merges": True}},
    "type = 'Unigram'": {"model": lambda model: {"type": "Unigram"}},
    "dropout = 0.5": {"model": lambda model: {"dropout": 0.5}},
    "continuing_subword_prefix = '##'": {"model": lambda model: {"continuing_subword_prefix": "##"}},
    "merges out of order": {"model": lambda model: {"merges": [*model["merges"], model["merges"][0]]}},
    "merge 1 needs 'zzz'": {"model": lambda model: {"merges": [["zzz", "t"]]}},
    "1 of the 256 tokens <0x00> to <0xFF> are missing": {
        "model": lambda model: {"vocab": {"x" if t == "<0x41>" else t: id for t, id in model["vocab"].items()}}
    },
    "gaps": {"model": lambda model: {"vocab": model["vocab"] | {"zzz": 600}}},
    "unk_token 't'": {"model": lambda model: {"unk_token": "t"}},
    "'NFKC'": {"normalizer": lambda _: {"type": "NFKC"}},
    "'Lowercase'": {"normalizer": lambda _: {"type": "Lowercase"}},
    "'split': True": {"pre_tokenizer": lambda old: {"split": True}},
    "'Whitespace'": {"pre_tokenizer": lambda _: {"type": "Whitespace"}},
    "decoder {'type': 'ByteFallback'}": {"decoder": lambda _: {"type": "ByteFallback"}},
    "post_processor 'BertProcessing'": {"post_processor": lambda _: {"type": "BertProcessing"}},
}


@pytest.mark.parametrize("message", LLAMA_REFUSED)
def test_what_a_tokenizer_json_that_restates_sentencepiece_may_not_say(tmp_path, message):
    content = dict(llama_json())
    for name, change in LLAMA_REFUSED[message].items():
        new = change(content[name])
        content[name] = new if name == "decoder" else (content[name] or {}) | new
    with pytest.raises(UserError, match=r"tokenizer.json.*" + re.escape(message)):
        load_tokenizer(write(tmp_path, tokenizer__json=content))


def test_merges_of_characters_are_exact_or_refused(tmp_path):
    """Random vocabularies over two letters, as above; here several merges may make one token."""
    rnd = random.Random(1)
    short_texts = ["".join(letters) for n in range(1, 8) for letters in itertools.product("ab", repeat=n)]
    source, accepted = Path("tokenizer.json"), 0
    for _ in range(60):
        vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"a": 257, "b": 258}
        merges: dict[tuple[str, str], None] = {}
        for _ in range(rnd.randint(1, 9)):
            tokens = list(vocab)[257:]
            made = rnd.choice(tokens) + rnd.choice(tokens)
            if len(made) < 7:
                vocab.setdefault(made, len(vocab))
                cuts = [(made[:cut], made[cut:]) for cut in range(1, len(made))]
                merges |= dict.fromkeys(cut for cut in cuts if set(cut) <= vocab.keys() and rnd.random() < 0.8)
        vocab.setdefault("".join(rnd.choices("ab", k=4)), len(vocab))
        reference = tokenizers.Tokenizer(models.BPE(vocab, list(merges), byte_fallback=True))
        try:
            ours = sentencepiece_of(vocab, list(merges), "<unk>", Prefix("never"), {}, source)
        except UserError:
            continue
        accepted += 1
        for text in short_texts:
            assert ours.encode_part(ours.normalize(text), first=True).tolist() == reference.encode(text).ids
    assert accepted > 20
