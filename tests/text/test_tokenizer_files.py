"""Which of a checkpoint's files is the tokenizer, and what is said of files that are damaged or disagree."""

import itertools
import json
import shutil

import pytest
import tokenizers
from small_tokenizer import llama_json, sentencepiece_model
from tokenizer_styles import PIECES, SPECIALS, begin_of_text, processor_of, trained, without_added_tokens, write
from transformers import AutoTokenizer

from elo.common.errors import UserError
from elo.text.tokenizer import load_tokenizer


def test_ids_of_vocab_json_and_merges_txt(tmp_path):
    for style, kind in (("qwen2", "Qwen2Tokenizer"), ("gpt2", "GPT2TokenizerFast")):
        tokenizer = tokenizers.Tokenizer.from_str(trained(style))
        (tmp_path / style).mkdir()
        tokenizer.model.save(str(tmp_path / style))
        added = {str(id): {"content": text, "special": True} for id, text in enumerate(SPECIALS)}
        write(tmp_path / style, tokenizer_config__json={"tokenizer_class": kind, "added_tokens_decoder": added})
        ours, reference = load_tokenizer(tmp_path / style), without_added_tokens(trained(style))
        for text in ["".join(pair) for pair in itertools.product(PIECES, PIECES)]:
            assert ours.encode(text) == reference.encode(text).ids
        assert ours.special_tokens == {text: id for id, text in enumerate(SPECIALS)}
        assert (ours.bos_id, ours.eos_id) == (None, 0)


def test_vocab_json_needs_to_know_the_family(tmp_path):
    tokenizers.Tokenizer.from_str(trained("qwen2")).model.save(str(tmp_path))
    with pytest.raises(UserError, match=r"vocab.json.*tokenizer_class.*None"):
        load_tokenizer(tmp_path)
    write(tmp_path, config__json={"model_type": "qwen2"}, added_tokens__json={"<|endoftext|>": 0})
    assert load_tokenizer(tmp_path).eos_id == 0


def test_what_is_put_before_a_text(tmp_path):
    """By tokenizer.json alone where it is there; else as add_bos_token says."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    restated = llama_json() | {"post_processor": json.loads(begin_of_text(1, "<s>").__getstate__())}
    for case, (content, says, bos) in enumerate([(restated, False, 1), (llama_json(), True, None)]):
        directory = write(tmp_path / str(case), tokenizer__json=content)
        write(directory, tokenizer_config__json=named | {"add_bos_token": says})
        theirs = AutoTokenizer.from_pretrained(directory).encode("fox")
        assert load_tokenizer(directory).bos_id == bos and (theirs[0] == bos) == (bos is not None)
        assert load_tokenizer(write(directory, tokenizer__model=sentencepiece_model())).bos_id == bos
        (directory / "tokenizer.json").unlink()
        assert load_tokenizer(directory).bos_id == (1 if says else None)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_what_is_put_before_a_text_by_vocab_json(tmp_path, kind):
    """GPT-2's BOS is <|endoftext|> where no other is named; Qwen2 has none."""
    tokenizers.Tokenizer.from_str(trained("qwen2")).model.save(str(tmp_path))
    added = {str(id): {"content": text, "special": True} for id, text in enumerate(SPECIALS)}
    config = {"tokenizer_class": kind, "added_tokens_decoder": added, "add_bos_token": True}
    for more in ({}, {"bos_token": None}, {"bos_token": SPECIALS[1]}):
        ours = load_tokenizer(write(tmp_path, tokenizer_config__json=config | more))
        bos = [] if ours.bos_id is None else [ours.bos_id]
        assert [*bos, *ours.encode("fox")] == AutoTokenizer.from_pretrained(tmp_path).encode("fox")
    with pytest.raises(UserError, match=r"tokenizer_config.json: add_prefix_space is not supported with vocab.json"):
        load_tokenizer(write(tmp_path, tokenizer_config__json=config | {"add_prefix_space": True}))


def test_which_file_is_used(sentencepiece_directory, tmp_path):
    """Mistral's tokenizer.json restates its tokenizer.model; an added token that only it names is known."""
    reference = processor_of(sentencepiece_directory)
    vocab = {reference.id_to_piece(id): id for id in range(reference.get_piece_size())}
    content = {
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True},
        "added_tokens": [{"id": 500, "content": "<|im_end|>", "special": True}],
        "pre_tokenizer": {"type": "Metaspace"},
    }
    directory = write(tmp_path / "mistral", tokenizer__json=content)
    with pytest.raises(UserError, match=r"tokenizer.json.*Metaspace.*put that, tokenizer.model, next to it"):
        load_tokenizer(directory)
    shutil.copy(sentencepiece_directory / "tokenizer.model", directory / "tokenizer.model.v3")
    ours = load_tokenizer(directory)
    assert ours.encode("fox") == reference.encode("fox") and ours.special_tokens["<|im_end|>"] == 500
    vocab["새로운"] = 501  # an extended vocabulary, with the old tokenizer.model
    with pytest.raises(UserError, match=r"tokenizer.json.*501, '새로운'.*tokenizer.model.v3"):
        load_tokenizer(write(directory, tokenizer__json=content))
    write(directory, tokenizer__json=trained("qwen2"))  # byte-level: comes first
    assert load_tokenizer(directory).eos_id == 0


def test_an_end_of_documents_beyond_the_models_rows(tmp_path):
    content = json.loads(trained("qwen2"))
    size = 1 + max(content["model"]["vocab"].values())
    content["added_tokens"] = [{"id": size, "content": "<|end_of_text|>", "special": True}]
    directory = write(tmp_path, tokenizer__json=content)
    assert load_tokenizer(directory, size + 1).eos_id == size
    message = rf"the special token <\|end_of_text\|> has the id {size}, but the model only {size} rows of embeddings"
    with pytest.raises(UserError, match=message):
        load_tokenizer(directory, size)


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"looked for tokenizer.json, tokenizer.model, .*vocab.json with merges.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such directory"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match="tokenizer.json: cannot be read"):
        load_tokenizer(tmp_path)


def test_files_that_contradict_each_other(tmp_path):
    directory = write(tmp_path, tokenizer__json=trained("qwen2"), added_tokens__json={"<|im_end|>": 7})
    with pytest.raises(
        UserError, match=r"added_tokens.json: its token '<\|im_end\|>' has the id 7, but elsewhere the id 2"
    ):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b'{"model": {"vocab"', b"[" * 100_000, b"7", b"\x00" * 99]
)
def test_files_that_are_not_json(tmp_path, content):
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        directory = tmp_path / name
        write(directory, tokenizer__json=trained("qwen2"))
        (directory / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_tokenizer(directory)


def test_damaged_models(sentencepiece_directory, llama3_directory, tmp_path):
    for model in (sentencepiece_directory / "tokenizer.model", llama3_directory[0] / "original" / "tokenizer.model"):
        data = model.read_bytes()
        for damaged in (b"", data[:100], data[: len(data) // 2 - 1], b"\n" + data[50:], b"garbage 1\n", b"\n\x00"):
            with pytest.raises(UserError, match="tokenizer.model"):
                load_tokenizer(write(tmp_path, tokenizer__model=damaged))


def test_damaged_merges(tmp_path):
    tokenizers.Tokenizer.from_str(trained("gpt2")).model.save(str(tmp_path))
    write(tmp_path, tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer"})
    for damaged, message in ((b"\xff", "not UTF-8"), (b"#version: 0.2\na", "'a' is not a pair"), (b"Z QQ", "merge 1")):
        with pytest.raises(UserError, match=f"merges.txt.*{message}"):
            load_tokenizer(write(tmp_path, merges__txt=damaged))
