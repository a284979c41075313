"""tokenizer.model: ids and text as SentencePiece gives them."""

import pytest
from hypothesis import given, settings
from tokenizer_styles import processor_of, texts, train_sentencepiece, write

from elo.text.tokenizer import load_tokenizer


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
