"""The ids of byte-level BPE against Hugging Face's tokenizers and tiktoken."""

import itertools
import json
import unicodedata

import pytest
import tiktoken
from hypothesis import given, settings
from small_tokenizer import TRAINING_TEXT
from tokenizer_styles import PIECES, STYLES, texts, trained, without_added_tokens, write

from elo.text.byte_level_bpe import LLAMA3_PATTERN
from elo.text.tokenizer import load_tokenizer


@pytest.mark.parametrize("style", STYLES)
def test_ids_equal_those_of_hugging_face_tokenizers(loaded, style):
    ours, reference = loaded[style]

    @settings(max_examples=250, deadline=None)
    @given(texts)
    def check(text):
        ids = ours.encode(text)
        assert ids == reference.encode(text).ids
        if style != "smollm2":
            assert ours.decode(ids) == (unicodedata.normalize("NFC", text) if style == "qwen2" else text)
        assert not set(ids) & set(ours.special_tokens.values())

    check()


@pytest.mark.parametrize("style", STYLES)
def test_the_slow_path_gives_the_same_ids(loaded, style):
    ours, reference = loaded[style]
    bpe = ours.model

    @settings(max_examples=100, deadline=None)
    @given(texts)
    def check(text):
        assert bpe._encode_pieces(unicodedata.normalize("NFC", text) if style == "qwen2" else text) == (
            reference.encode(text).ids
        )

    check()


@pytest.mark.parametrize("style", ["qwen2", "smollm2"])
def test_a_million_spaces(loaded, style, capfd):
    ours, reference = loaded[style]
    text = "a" + " " * 1_100_000 + "1"
    assert ours.encode(text) == reference.encode(text).ids
    assert "panicked" not in capfd.readouterr().err


def test_neighbours_of_a_byte_without_a_token_meet(loaded):
    ours, reference = loaded["smollm2"]
    assert ours.encode("th\x04e") == reference.encode("th\x04e").ids != ours.encode("the")
    assert ours.encode("<\x04|im") == reference.encode("<\x04|im").ids == ours.encode("<|im")


def test_ids_of_llama_3s_own_format(llama3_directory):
    directory, ranks = llama3_directory
    ours = load_tokenizer(directory)
    reference = tiktoken.Encoding("x", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in [*TRAINING_TEXT, " olmayan", *("".join(pair) for pair in itertools.product(PIECES, PIECES))]:
        assert ours.encode(text) == reference.encode_ordinary(text)
    first = len(ranks)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (first, first + 1, first + 256)
    named = {"finetune_right_pad_id": 4, "start_header_id": 6, "end_header_id": 7, "eom_id": 8, "eot_id": 9}
    named |= {"python_tag": 10, "reserved_special_token_0": 2, "reserved_special_token_247": 255}
    assert {name: ours.special_tokens[f"<|{name}|>"] - first for name in named} == named


def test_entries_that_no_merge_makes_are_not_tokens_of_text(tmp_path):
    content = json.loads(trained("qwen2"))
    content["model"]["vocab"] |= {"[PAD700]": 700, "fox'": 701, "한": 702}
    ours, reference = (
        load_tokenizer(write(tmp_path, tokenizer__json=content)),
        without_added_tokens(json.dumps(content)),
    )
    for text in ("[PAD700]", "fox'", " fox'"):
        assert ours.encode(text) == reference.encode(text).ids
    assert ours.decode([700, 702]) == "[PAD700]한" and ours.vocab_size == 703
    content["model"]["vocab"] |= {"\ud800": 703}  # JSON can say this
    assert load_tokenizer(write(tmp_path, tokenizer__json=content)).vocab_size == 704
