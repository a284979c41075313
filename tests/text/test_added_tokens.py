"""Added tokens that are not special come out of text as in tokenizers; `encode_special_tokens` is the reference."""

import json
import pickle
import unicodedata
from functools import cache

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizer import TRAINING_TEXT, llama_json, sentencepiece_model
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from elo.common.errors import UserError
from elo.text.tokenizer import load_tokenizer

# Where matches overlap, begin alike, have spaces in and around them, or change in normalization.
CONTENTS = ["<tool>", "<tool>x", "ol>", " a", "a b", "ab", "b", "안녕", "안녕하세요", "e\u0301", "é", "▁a", "<s", " "]
PIECES = [*CONTENTS, *"<>_1½ⓐ😀\u0301\n\t\u3000\x1c\u200d", "tool", "  ", "The quick", "</s>"]
FLAGS = ["normalized", "lstrip", "rstrip", "single_word", "special"]
texts = st.lists(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), min_size=10, max_size=20)


def token(content: str, *flags: str) -> dict:
    return {"content": content} | {name: name in flags for name in FLAGS}


added_tokens = st.lists(
    st.builds(
        lambda content, flags: token(content, *flags), st.sampled_from(CONTENTS), st.sets(st.sampled_from(FLAGS))
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda token: unicodedata.normalize("NFC", token["content"].replace(" ", "▁")),
)


@cache
def base(style: str) -> str:
    """A tokenizer.json in the style of a family, or of Llama with this scheme of spaces in front of texts."""
    if style not in ("qwen2", "smollm2"):
        return json.dumps(llama_json(style))
    tokenizer = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.pre_tokenizer = byte_level if style == "qwen2" else digits
    if style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = byte_level.alphabet() if style == "qwen2" else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer.to_str()


STYLES = ["qwen2", "smollm2", "first", "always", "never", "prepend"]


def with_added(style: str, tokens: list[dict]) -> tokenizers.Tokenizer:
    reference = tokenizers.Tokenizer.from_str(base(style))
    reference.add_tokens([tokenizers.AddedToken(**token) for token in tokens])
    reference.encode_special_tokens = True
    return reference


def expected_ids(reference: tokenizers.Tokenizer, text: str) -> list[int] | None:
    """None where tokenizers itself breaks down, as it rarely does for several added tokens."""
    try:
        return reference.encode(text, add_special_tokens=False).ids
    except BaseException as error:  # of Rust, and not an Exception
        if str(error) != "AddedVocabulary bad split":
            raise
        return None


def load(directory, **files):
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return load_tokenizer(directory)


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_texts_equal_those_of_tokenizers(style, tmp_path):
    @settings(max_examples=60, deadline=None)
    @given(added_tokens, texts)
    @example([token(" a", "lstrip"), token("b", "rstrip"), token(" ", "normalized")], ["x  a a  ab   <tool>", "b  a"])
    @example([token(" ", "lstrip", "rstrip")], ["  ", "a   b"])
    @example([token("<tool>", "special"), token("ol>"), token("<s")], ["<tool>ol></s>"])
    @example(
        [token("안녕", "single_word"), token("ab", "rstrip")],
        ["안녕하 안녕", "ⓐ안녕", "½안녕\u200d", "ab\x1c ", "ab\u3000"],
    )
    def check(tokens, samples):
        reference = with_added(style, tokens)
        ours = load(tmp_path, tokenizer__json=json.loads(reference.to_str()))
        for text in samples:
            ids = ours.encode(text)
            if (expected := expected_ids(reference, text)) is None:
                return
            assert ids == expected
            # A special token of one letter is what a text becomes nevertheless, and then tokenizers hides it. And é is
            # in ByteLevel's alphabet: its decoder takes it for the byte that it stands for there.
            hidden = {token["content"] for token in tokens if token["special"]} & {"b", " "}
            if not hidden and not {"é", "e\u0301"} & {token["content"] for token in tokens}:
                stream = ours.stream_decoder()
                streamed = "".join([*map(stream.push, ids), stream.flush()])
                assert streamed == ours.decode(ids) == reference.decode(ids)

    check()


@pytest.mark.parametrize("style", ["qwen2", "first"])
def test_a_vocabulary_that_add_tokens_extended(style, tmp_path):
    words = [f"단어{number}" for number in range(3000)] + ["안녕하세요", "café"]
    reference = with_added(style, [token(word, "normalized") for word in words])
    ours = load(tmp_path, tokenizer__json=json.loads(reference.to_str()))
    text = "안녕하세요 단어12 단어1234, café 단어."
    ids = ours.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False).ids
    assert {ours.special_tokens[word] for word in ("안녕하세요", "단어12", "단어1234", "café", "단어1")} - set(ids) == {
        ours.special_tokens["단어1"]
    }
    assert ours.decode(ids) == text
    assert pickle.loads(pickle.dumps(ours)).encode(text) == ids
    with pytest.raises(UserError, match="tokens, the model only"):  # a row is missing, and text asks for it
        load_tokenizer(tmp_path, embeddings=ours.vocab_size - 1)


@pytest.mark.parametrize(
    ("config", "scheme"), [({}, "prepend"), ({"legacy": True}, "prepend"), ({"legacy": False}, "first")]
)
def test_beside_a_sentencepiece_model(tmp_path, config, scheme):
    """The texts between added tokens get a space in front as in transformers; the first one as in SentencePiece."""
    reference = with_added(scheme, [token("안녕"), token("<tool>", "lstrip")])
    added = {str(id): token("안녕" if id == 500 else "<tool>", "lstrip" if id == 501 else "") for id in (500, 501)}
    config = {"tokenizer_config__json": config | {"added_tokens_decoder": added}}
    ours = load(tmp_path, tokenizer__model=sentencepiece_model(), **config)
    for text in ("fox안녕fox", "안녕 fox <tool> The quick<tool>안녕", "안녕", "a안녕\n"):
        ids = ours.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == reference.decode(ids)
    assert ours.encode(" fox")[:2] == [*ours.encode(" ")[:1], *ours.encode("fox")[:1]]
    # A tokenizer.json beside it says it itself.
    reference = with_added("prepend", [token("안녕", "normalized"), token("<tool>", "lstrip")])
    (tmp_path / "tokenizer_config.json").unlink()
    ours = load(tmp_path, tokenizer__json=json.loads(reference.to_str()))
    for text in ("fox안녕fox", "fox 안녕 fox <tool>fox"):
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids
    with pytest.raises(UserError, match="a space in front is said differently"):
        load(tmp_path, tokenizer__json=json.loads(with_added("never", [token("안녕")]).to_str()))


def test_files_that_say_different_things(tmp_path):
    """tokenizer_config.json goes before tokenizer.json; what either calls special is special."""
    content = json.loads(with_added("qwen2", [token("aa"), token("bb", "special"), token("cc")]).to_str())
    first = content["added_tokens"][-3]["id"]
    config = {"added_tokens_decoder": {first: token("aa", "single_word"), first + 1: token("bb")}, "eos_token": "cc"}
    ours = load(tmp_path, tokenizer__json=content, tokenizer_config__json=config)
    assert first in ours.encode("aa") and first not in ours.encode("xaa")
    assert not {first + 1, first + 2} & set(ours.encode("bb cc"))
    # added_tokens.json counts without added_tokens_decoder only; there, special is what is called so.
    content = json.loads(base("qwen2"))
    files = {"tokenizer__json": content, "added_tokens__json": {"dd..": 500, "ee..": 501}}
    ours = load(
        tmp_path, **files, tokenizer_config__json={}, special_tokens_map__json={"pad_token": {"content": "ee.."}}
    )
    assert 500 in ours.encode("dd.. ee..") and 501 not in ours.encode("dd.. ee..")
    ours = load(tmp_path, **files, tokenizer_config__json={"added_tokens_decoder": {}})
    assert 500 not in ours.encode("dd.. ee..") and ours.special_tokens["dd.."] == 500


@pytest.mark.parametrize("is_special", [False, True])
def test_what_a_record_leaves_out(is_special, tmp_path):
    """As in tokenizers: `normalized` unless it is special, and none of the rest."""
    record = {"content": "e\u0301x", "special": is_special}
    reference = with_added("qwen2", [])
    reference.add_tokens([tokenizers.AddedToken(**record)])
    id = reference.token_to_id("e\u0301x")
    ours = load(
        tmp_path,
        tokenizer__json=json.loads(base("qwen2")),
        tokenizer_config__json={"added_tokens_decoder": {str(id): record}},
    )
    for text in ("éx", "a e\u0301x b"):
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids
        assert (id in ours.encode(text)) == (not is_special)


def test_what_is_refused(tmp_path):
    content = json.loads(with_added("qwen2", [token("é", "normalized")]).to_str())
    content["added_tokens"] += [token("e\u0301", "normalized") | {"id": 900}]
    with pytest.raises(UserError, match=f"{tmp_path}: the added token 'e.*after normalization"):
        load(tmp_path, tokenizer__json=content)
    content["added_tokens"][-1] |= {"content": "<x>", "lstrip": "yes"}
    with pytest.raises(UserError, match="tokenizer.json: lstrip must be true or false"):
        load(tmp_path, tokenizer__json=content)
    for options, message in (
        ({"normalization_rule_name": "nmt_nfkc"}, "beside its normalization"),
        ({"add_dummy_prefix": False}, "a space in front is said differently"),
    ):
        directory = tmp_path / message
        directory.mkdir()
        config = {"added_tokens_decoder": {"500": token("안녕")}, "add_prefix_space": True}
        with pytest.raises(UserError, match=f"tokenizer.model: .*{message}"):
            load(directory, tokenizer__model=sentencepiece_model(**options), tokenizer_config__json=config)


def test_another_added_token_is_another_fingerprint(tmp_path):
    """The cache of tokens is named after it."""
    config = {"tokenizer__json": json.loads(base("qwen2"))}
    prints = {
        load(tmp_path, **config, added_tokens__json=added, special_tokens_map__json=named).fingerprint
        for added, named in (({}, {}), ({"dd..": 500}, {}), ({"dd..": 500}, {"pad_token": "dd.."}))
    }
    assert len(prints) == 3
