"""Tokenizers against their references: the same ids for every text, exact decoding, and errors that name the file."""

import base64
import gzip
import itertools
import json
import pickle
import random
import re
import shutil
import unicodedata
from functools import cache
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from small_tokenizer import TRAINING_TEXT, llama_json, sentencepiece_model
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from elo.common.errors import UserError
from elo.text.byte_level_bpe import (
    _NOT_SPECIAL,
    BYTE_ALPHABET,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    ByteLevelBPE,
)
from elo.text.merges import mergeable_ranks
from elo.text.sentencepiece_json import sentencepiece_of
from elo.text.tokenizer import Tokenizer, load_tokenizer
from elo.text.tokenizer_json import Prefix

SHARED = Path(__file__).parents[2] / "../shared/data"
MISTRAL_V3 = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real tokenizers of ../shared/data are not here")

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# Pieces where the rules of the families meet: digits after spaces, contractions, marks, bytes without a token.
PIECES = [
    *"ab1 2\n\t'\r=한각日é😀٣½Ⅷſ\x00\x04\x1d\x85\xa0\u0301\u1100\u1161\u2028\u3000\ufeff\U00041000\U0010ffff",
    *("  ", "   ", "'s", "'LL", "don't", " the", "\r\n", "\n\n ", "한국어", "</s>", "[/INST]", "<0x0A>", "▁"),
    *SPECIALS,
    *_NOT_SPECIAL,
]
texts = st.one_of(st.lists(st.sampled_from(PIECES), max_size=25).map("".join), st.text(st.characters(codec="utf-8")))


# ---------------------------------------------------------------------------------------------------------------------
# Small tokenizers in the styles of the families


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def digits(individual: bool, use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    by_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=individual), by_words])


def begin_of_text(id: int) -> processors.PostProcessor:
    template = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", id)])
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])


TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STYLES = {
    "qwen2": split(QWEN2_PATTERN),
    "llama3": split(LLAMA3_PATTERN),
    "tekken": split(TEKKEN_PATTERN),
    "smollm2": digits(individual=True),
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digit-runs": digits(individual=False),
    "digits-only": digits(individual=True, use_regex=False),
    "uncut": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "words-and-gaps": split(r"\p{L}+"),  # what a Split pattern does not match is a piece as well
}


@cache
def trained(style: str) -> str:
    """A tokenizer.json of the style."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = STYLES[style]
    if style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    # SmolLM2 has no token for a byte that its training data lacked.
    alphabet = [] if style == "smollm2" else pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|begin_of_text|>", "<|end_of_text|>"] if style == "llama3" else SPECIALS
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    if style == "llama3":
        tokenizer.model.ignore_merges = True
        tokenizer.post_processor = begin_of_text(0)
    return tokenizer.to_str()


def without_added_tokens(tokenizer_json: str) -> tokenizers.Tokenizer:
    """The reference: Hugging Face's tokenizer as it would be if it knew no added tokens."""
    content = json.loads(tokenizer_json) | {"added_tokens": [], "post_processor": None}
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def write(directory: Path, **files: object) -> Path:
    """Files in a directory, their dots written as __; what is not text or bytes becomes JSON."""
    directory.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        content = content if isinstance(content, str | bytes) else json.dumps(content)
        path = directory / name.replace("__", ".")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return directory


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """style -> (our tokenizer, the reference)"""
    made = {}
    for style in STYLES:
        directory = write(tmp_path_factory.mktemp(style), tokenizer__json=trained(style))
        made[style] = load_tokenizer(directory), without_added_tokens(trained(style))
    return made


def train_sentencepiece(directory: Path, **options: object) -> Path:
    return write(directory, tokenizer__model=sentencepiece_model(**options))


@pytest.fixture(scope="module")
def sentencepiece_directory(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sp"), control_symbols="[INST],[/INST]")


def processor_of(directory: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


# ---------------------------------------------------------------------------------------------------------------------
# The ids


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


@pytest.fixture(scope="module")
def llama3_directory(tmp_path_factory):
    """original/tokenizer.model in Llama 3's format, with a token that only the look-up of whole pieces reaches."""
    tokenizer = json.loads(trained("tekken"))
    ids = sorted((id, token) for token, id in tokenizer["model"]["vocab"].items() if token not in SPECIALS)
    spelled = [bytes(BYTE_ALPHABET[character] for character in token) for _, token in ids]
    spelled = sorted(spelled, key=lambda token: len(token) > 1) + [b" olmayan"]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(spelled))
    directory = tmp_path_factory.mktemp("llama3")
    (directory / "original").mkdir()
    (directory / "original" / "tokenizer.model").write_bytes(lines)
    return directory, {token: rank for rank, token in enumerate(spelled)}


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


def test_a_tokenizer_json_converted_from_tiktoken(llama3_directory, tmp_path):
    """As Llama 3's: every pair that makes a token is listed, also from parts that come after it."""
    _, ranks = llama3_directory
    last = len(ranks)
    ranks = ranks | {b"ZQX": last, b"ZQ": last + 1}
    character = {byte: character for character, byte in BYTE_ALPHABET.items()}
    token_of = {spelled: "".join(character[byte] for byte in spelled) for spelled in ranks}
    cuts = [(t[:i], t[i:], t) for t in ranks for i in range(1, len(t)) if t[:i] in ranks and t[i:] in ranks]
    cuts.sort(key=lambda cut: (ranks[cut[2]], ranks[cut[0]], ranks[cut[1]]))
    content = json.loads(trained("llama3"))
    content["model"]["vocab"] = {token_of[spelled]: rank for spelled, rank in ranks.items()}
    content["model"]["merges"] = [f"{token_of[left]} {token_of[right]}" for left, right, _ in cuts]
    content["added_tokens"] = [
        {"id": last + 2 + i, "content": token, "special": True}
        for i, token in enumerate(["<|begin_of_text|>", "<|end_of_text|>"])
    ]
    ours = load_tokenizer(write(tmp_path, tokenizer__json=content))
    reference = without_added_tokens(json.dumps(content))
    for text in [*TRAINING_TEXT, " olmayan", "x olmayan", "ZQX", "ZQXa", "aZQX", "ZQZQXQX"]:
        assert ours.encode(text) == reference.encode(text).ids


def merged(ranks, texts):
    """The ids of texts that are not cut into pieces."""
    bpe = ByteLevelBPE(ranks, r"[\s\S]+", Path("tokenizer.json"))
    return [ids.tolist() for ids in bpe.encode_arrays(texts)]


def test_accepted_merges_are_exact_and_nothing_else_is_accepted():
    """Random vocabularies over two letters, on every text of up to eight letters."""
    rnd = random.Random(0)
    short_texts = ["".join(letters) for n in range(1, 9) for letters in itertools.product("ab", repeat=n)]
    accepted = 0
    for _ in range(300):
        vocab, merges = {"a": 0, "b": 1}, []
        for _ in range(rnd.randint(1, 9)):
            left, right = rnd.choice(list(vocab)), rnd.choice(list(vocab))
            if len(left + right) < 7:
                vocab.setdefault(left + right, len(vocab))
                merges.append((left, right))
        vocab.setdefault("".join(rnd.choices("ab", k=4)), len(vocab))
        merges = sorted(dict.fromkeys(merges), key=lambda merge: vocab["".join(merge)])
        ignore_merges = rnd.random() < 0.5
        reference = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
        wanted = [reference.encode(text).ids for text in short_texts]
        try:
            ranks = mergeable_ranks(vocab, merges, Path("tokenizer.json"), ignore_merges)
        except UserError:
            ranks = {token.encode(): id for token, id in vocab.items()}
            assert merged(ranks, short_texts) != wanted, "refused, although tiktoken gives the same ids"
        else:
            accepted += 1
            assert merged(ranks, short_texts) == wanted
    assert 100 < accepted < 300


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
    content = llama_json(scheme) | {"post_processor": json.loads(begin_of_text(0).__getstate__())}
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
            assert ours.encode_arrays([text])[0].tolist() == reference.encode(text).ids
    assert accepted > 20


# ---------------------------------------------------------------------------------------------------------------------
# Special tokens, documents, decoding


@pytest.mark.parametrize("style", ["qwen2", "llama3", "smollm2"])
def test_specials_in_text_inject_nothing(loaded, style):
    ours, _ = loaded[style]
    for text, id in ours.special_tokens.items():
        for around in (text, f"a{text}b", f" {text}\n{text}"):
            assert id not in ours.encode(around)
            assert ours.decode(ours.encode(around)) == around


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
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>", "add_bos_token": True}
    ours = load_tokenizer(write(directory, tokenizer__json=content, tokenizer_config__json=config))
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    with pytest.raises(UserError, match="no token ends a document"):
        load_tokenizer(write(directory, tokenizer_config__json={}))
    with pytest.raises(UserError, match="BOS token '<s>'"):
        load_tokenizer(write(directory, tokenizer_config__json=config | {"bos_token": "<s>"}))


def test_added_tokens_of_a_fine_tune(sentencepiece_directory, tmp_path):
    directory = shutil.copytree(sentencepiece_directory, tmp_path / "sp")
    config = {"added_tokens_decoder": {"3": {"content": "<|im_start|>", "special": True}}, "eos_token": "<|im_end|>"}
    write(directory, added_tokens__json={"<|im_end|>": 500}, tokenizer_config__json=config)
    ours = load_tokenizer(directory)
    assert ours.special_tokens["<|im_end|>"] == 500 and ours.vocab_size == 501
    assert ours.special_tokens["<|im_start|>"] == 3 and "[INST]" not in ours.special_tokens
    assert ours.eos_id == 2


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


# ---------------------------------------------------------------------------------------------------------------------
# Which file, and what is refused


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


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def split_json(**changes: object) -> dict:
    step = {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated", "invert": False} | changes
    return {"type": "Sequence", "pretokenizers": [step, BYTE_LEVEL]}


REFUSED = {
    "normalizer 'NFKC'": {"normalizer": {"type": "NFKC"}},
    "normalizer 'Lowercase'": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}},
    "pre_tokenizer 'Punctuation'": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, BYTE_LEVEL]}
    },
    "pre_tokenizer 'x'": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": ["x", BYTE_LEVEL]}},
    "Digits + Digits": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "Digits"}, BYTE_LEVEL]}
    },
    "add_prefix_space": {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
    "Isolated": {"pre_tokenizer": split_json(behavior="Removed")},
    "not inverted": {"pre_tokenizer": split_json(invert=True)},
    "with a Regex": {"pre_tokenizer": split_json(pattern={"String": " "})},
    r"'\\w": {"pre_tokenizer": split_json(pattern={"Regex": r"\w+|\W+"})},
    "'[[:alpha:]]": {"pre_tokenizer": split_json(pattern={"Regex": "[[:alpha:]]+"})},
    "'(?i:k)": {"pre_tokenizer": split_json(pattern={"Regex": "(?i:k)|."})},
    "not valid": {"pre_tokenizer": split_json(pattern={"Regex": "(?:a"})},
    "empty string": {"pre_tokenizer": split_json(pattern={"Regex": r"\s*"})},
    "post_processor 'BertProcessing'": {"post_processor": {"type": "BertProcessing"}},
    "post_processor puts None": {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": 1}]}},
    "puts 2 tokens": {
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_end|>"}}] * 2}
    },
    "type = 'WordPiece'": {"model": {"type": "WordPiece"}},
    "dropout = 0.1": {"model": {"dropout": 0.1}},
    "end_of_word_suffix": {"model": {"end_of_word_suffix": "</w>"}},
    "same id 0": {"model": {"vocab": {"a": 0, "b": 0}}},
    "a token of 1,025 characters": {"model": {"vocab": {"a" * 1025: 0}}},
    "id 1000000000000": {"model": {"vocab": {"a": 10**12}}},
    "id -1": {"model": {"vocab": {"a": -1}}},
    "id '1'": {"model": {"vocab": {"a": "1"}}},
    "id True": {"model": {"vocab": {"a": True}}},
    "byte-level alphabet": {"model": {"vocab": {"한": 10}, "merges": []}},
    "merge 1 needs 'zz'": {"model": {"vocab": {"z": 10}, "merges": ["z z"]}},
    "merges out of id order": {"model": {"vocab": dict(a=10, b=11, ab=13, ba=12), "merges": ["a b", "b a"]}},
    "from a part with a larger id": {
        "model": {"vocab": dict(a=10, b=11, c=12, bc=19, abc=15), "merges": [["a", "bc"], ["b", "c"]]}
    },
    "'a b c' is not a pair": {"model": {"merges": ["a b c"]}},
    "merge 7 is not a pair": {"model": {"merges": [7]}},
    "vocab must be an object, not": {"model": {"vocab": [1]}},
    "merges must be a list, not": {"model": {"merges": {"a": "b"}}},
    "model must be an object, not": {"model": 3},
    "normalizer must be an object, not": {"normalizer": "NFC"},
    "an added token is 5": {"added_tokens": [5]},
    "has the text None": {"added_tokens": [{"id": 3}]},
    "id 99999999999": {"added_tokens": [{"id": 99999999999, "content": "<x>"}]},
    "its token 5 is": {"added_tokens": [{"id": 5, "content": "<x>"}]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_tokenizer_json_may_not_say(tmp_path, message):
    content = json.loads(trained("qwen2"))
    for name, change in REFUSED[message].items():
        content[name] = content[name] | change if name == "model" and isinstance(change, dict) else change
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_tokenizer(write(tmp_path, tokenizer__json=content))
    assert "tokenizer.json" in str(error.value)


def test_bytes_without_a_token_and_an_unknown_token(tmp_path):
    content = json.loads(trained("smollm2"))
    content["model"]["unk_token"] = "<|endoftext|>"
    with pytest.raises(UserError, match="of 256 bytes have no token"):
        load_tokenizer(write(tmp_path, tokenizer__json=content))


def test_a_merge_by_one_rule_only(tmp_path):
    """`ignore_merges` lets [PAD] be a whole piece; tiktoken would also merge `[` and `PAD]` in other pieces."""
    content = json.loads(trained("llama3"))
    vocab, size = content["model"]["vocab"], len(content["model"]["vocab"])
    vocab |= {"PA": size, "D]": size + 1, "PAD]": size + 2, "[PAD]": size + 3}
    content["model"]["merges"] += [["P", "A"], ["D", "]"], ["PA", "D]"]]
    with pytest.raises(UserError, match=r"\[PAD\].*not a listed pair"):
        load_tokenizer(write(tmp_path, tokenizer__json=content))


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


# ---------------------------------------------------------------------------------------------------------------------
# The published tokenizers


@cache
def corpus() -> list[str]:
    """Real texts, where they are."""
    documents = []
    for path in sorted((SHARED / "corpus").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            documents += [json.loads(line)["text"] for line in lines]
    return documents


def published(name: str, directory: Path) -> Path:
    for path in (SHARED / "tokenizers" / name).iterdir():
        data = path.read_bytes()
        (directory / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(data) if path.suffix == ".gz" else data)
    return directory


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


@needs_shared
def test_published_llama3(tmp_path):
    ours = load_tokenizer(published("llama3", tmp_path))
    lines = (tmp_path / "tokenizer.model").read_bytes().splitlines()
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
