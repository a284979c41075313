"""What every tokenizer does: special tokens, ends of documents, decoding, streaming, copies of itself."""

import json
import pickle
import re
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_styles import PIECES, begin_of_text, texts, trained, write

from elo.common.errors import UserError
from elo.text.tokenizer import Tokenizer, load_tokenizer


def test_documents(loaded, sentencepiece_directory):
    for style, bos, eos in (("qwen2", [], 0), ("smollm2", [], 0), ("llama3", [0], 1)):
        ours, _ = loaded[style]
        assert ([] if ours.bos_id is None else [ours.bos_id], ours.eos_id) == (bos, eos)
        assert ours.decode([*bos, *ours.encode("fox"), eos]) == "fox"
    ours = load_tokenizer(sentencepiece_directory)
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    assert {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4}.items() <= ours.special_tokens.items()


def test_the_end_of_a_document_is_not_the_end_of_a_turn(tmp_path):
    directory = write(tmp_path, tokenizer__json=trained("qwen2"), tokenizer_config__json={"eos_token": "<|im_end|>"})
    assert load_tokenizer(directory).eos_id == 0
    content = json.loads(trained("qwen2"))
    content["added_tokens"] = content["added_tokens"][1:]
    content["post_processor"] = json.loads(begin_of_text(1, "<|im_start|>").__getstate__())
    config = {"eos_token": {"content": "<|im_end|>"}}
    ours = load_tokenizer(write(directory, tokenizer__json=content, tokenizer_config__json=config))
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    with pytest.raises(UserError, match="no token ends a document"):
        load_tokenizer(write(directory, tokenizer_config__json={}))
    content["post_processor"] = json.loads(begin_of_text(1, "<s>").__getstate__())
    with pytest.raises(UserError, match="BOS token '<s>'"):
        load_tokenizer(write(directory, tokenizer__json=content, tokenizer_config__json=config))


def test_added_tokens_of_a_fine_tune(sentencepiece_directory, tmp_path):
    directory = shutil.copytree(sentencepiece_directory, tmp_path / "sp")
    config = {"added_tokens_decoder": {"3": {"content": "<|im_start|>", "special": True}}, "eos_token": "<|im_end|>"}
    write(directory, added_tokens__json={"<|im_end|>": 500}, tokenizer_config__json=config)
    ours = load_tokenizer(directory)
    assert ours.special_tokens["<|im_end|>"] == 500 and ours.vocab_size == 501
    assert ours.special_tokens["<|im_start|>"] == 3 and "[INST]" not in ours.special_tokens
    assert ours.eos_id == 2


@pytest.mark.parametrize("style", ["qwen2", "llama3", "sentencepiece"])
def test_streaming_gives_whole_characters(loaded, sentencepiece_directory, style):
    ours = load_tokenizer(sentencepiece_directory) if style == "sentencepiece" else loaded[style][0]

    @settings(max_examples=150, deadline=None)
    @given(texts, st.integers(0, 10))
    def check(text, cut):
        ids = ours.encode(text)
        stream = ours.stream_decoder()
        parts = [stream.push(id) for id in ids]
        assert "".join(parts) + stream.flush() == ours.decode(ids)
        assert "�" not in "".join(parts) or "�" in text
        stream = ours.stream_decoder()  # cut anywhere, what has come is a beginning of the text
        assert ours.decode(ids).startswith("".join(map(stream.push, ids[:cut])))

    check()


def test_streaming_a_character_of_several_tokens(loaded):
    ours, _ = loaded["gpt2"]
    ids = ours.encode("🦊")
    assert len(ids) > 1
    stream = ours.stream_decoder()
    assert [stream.push(id) for id in ids] == [*[""] * (len(ids) - 1), "🦊"]
    assert stream.push(ids[0]) == "" and stream.flush() == "\ufffd"
    assert ours.decode([*ids, ours.vocab_size, 10**6, -1]) == "🦊"


def test_a_lone_surrogate_is_an_error(loaded, sentencepiece_directory):
    for ours in (loaded["qwen2"][0], load_tokenizer(sentencepiece_directory)):
        with pytest.raises(UserError, match=r"lone surrogate '\\ud83d' \(character 2\)"):
            ours.encode_batch(["fine", "ab\ud83d"])


def test_pickle_and_fingerprint(loaded, sentencepiece_directory, tmp_path):
    for ours in (loaded["smollm2"][0], load_tokenizer(sentencepiece_directory)):
        ours.encode("\x04")
        copy: Tokenizer = pickle.loads(pickle.dumps(ours))
        assert copy.encode_batch(PIECES) == ours.encode_batch(PIECES)
        assert (copy.bos_id, copy.eos_id) == (ours.bos_id, ours.eos_id)
    directory = write(tmp_path, tokenizer__json=trained("smollm2"))
    assert re.fullmatch("[0-9a-f]{64}", load_tokenizer(directory).fingerprint)
    assert load_tokenizer(directory).fingerprint == loaded["smollm2"][0].fingerprint
    write(directory, tokenizer_config__json={"eos_token": "<|im_end|>"})
    assert load_tokenizer(directory).fingerprint != loaded["smollm2"][0].fingerprint
