"""Hostile tokenizer directories: every file that a tokenizer or a chat format is made from."""

import json

import pytest
from artifacts import TEMPLATE, sentencepiece_model, tiktoken_file, vocab_and_merges, write_chat_tokenizer
from harness import case_directory, cases, result_or_user_error
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import TEXTS, changed_bytes, changed_json, changed_json_file, dumped, values
from small_tokenizer import llama_json

from elo.text.chat_format import chat_format
from elo.text.tokenizer import load_tokenizer

WORDS = ["First of all, 둘째 123", "", " ", "\0\n\t", "<|im_end|>[INST]</s>", "a" * 3000, " " * 3000, "😀é\u0301" * 50]
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "뭐?"}]


def use(directory):
    """All that is done with a tokenizer."""
    tokenizer = load_tokenizer(directory, embeddings=420)
    for words in WORDS:
        ids = tokenizer.encode(words)
        assert all(0 <= id < tokenizer.vocab_size for id in ids)
        tokenizer.decode(ids)
    tokenizer.decode([-1, 0, 419, 10**9])
    chat_format(directory, tokenizer).prompt(MESSAGES)
    return tokenizer


@pytest.fixture(scope="module")
def chat_files(tmp_path_factory):
    """name -> content of the files of a valid directory."""
    directory = write_chat_tokenizer(tmp_path_factory.mktemp("chat"))
    use(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def try_with(files, use=use):
    with case_directory() as directory:
        for name, content in files.items():
            (directory / name).write_bytes(content)
        return result_or_user_error(lambda: use(directory))


# ---- byte-level BPE

PATTERNS = [
    r"(?:(?!x)(?:[a-z]|[a-y]{2}))+b",
    r"(?:(?! )a|(?! )a)+(?!a)b",
    r"(?:\s+)+x",
    r"(?:a|aa)+b",
    r"(?:(?:(?:a{999}){999}){999})",
    r"(?:[a-z]+)*\d",
    r"\p{L}{1,3}|(?!\S)\s",
    r"(?:",
    r"[",
    r"\p{Zz}",
    "(?:x|" * 3000 + ")" * 3000,
    "|" * 10_000,
]


def tokenizer_json(files):
    return json.loads(files["tokenizer.json"])


@st.composite
def tokenizers(draw, document):
    """Changes of a tokenizer.json, more often of the parts that decide what is done with texts."""
    part = draw(st.sampled_from(["whole", "model", "pre_tokenizer", "added_tokens", "pattern", "vocab"]))
    if part == "whole":
        return draw(changed_json(document))
    document = json.loads(json.dumps(document))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    match part:
        case "pattern":
            split = {"type": "Split", "pattern": {"Regex": draw(st.sampled_from(PATTERNS))}, "behavior": "Isolated"}
            document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
        case "vocab":
            vocab = document["model"]["vocab"]
            for token in draw(st.lists(st.sampled_from(sorted(vocab)), min_size=1, max_size=4)):
                vocab[draw(st.sampled_from([token, *TEXTS, "Ġ" * 2000]))] = draw(st.integers(-2, 500) | values)
            document["model"]["ignore_merges"] = draw(st.booleans())
        case _:
            if part == "pre_tokenizer" and draw(st.booleans()):
                digits = {"type": "Digits", "individual_digits": draw(st.booleans() | values)}
                document[part] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
            document[part] = draw(changed_json(document[part]))
    return document


@cases(50)
@given(st.data())
def test_tokenizer_json(chat_files, data):
    document = tokenizer_json(chat_files)
    content = data.draw(st.one_of(tokenizers(document).map(dumped), changed_json_file(document)))
    try_with(chat_files | {"tokenizer.json": content})


@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
def test_patterns(chat_files, pattern):
    document = tokenizer_json(chat_files)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    try_with(chat_files | {"tokenizer.json": dumped(document)})


OTHERS = ["tokenizer_config.json", "generation_config.json", "added_tokens.json", "chat_template.jinja", "config.json"]
JINJA = [b"", b"\xff", TEMPLATE.encode() * 2, b"<|im_start|>system\n" * 20_000, b"[INST]<|im_start|>", b"{" * 100_000]


@cases(50)
@given(st.data())
def test_files_beside_it(chat_files, data):
    files = dict(chat_files)
    for name in data.draw(st.lists(st.sampled_from(OTHERS), min_size=1, max_size=2)):
        if name == "chat_template.jinja":
            files[name] = data.draw(st.sampled_from(JINJA) | changed_bytes(TEMPLATE.encode()))
        else:
            document = json.loads(chat_files.get(name, b'{"<|im_start|>": 401, "x": 402}'))
            files[name] = data.draw(changed_json_file(document))
    try_with(files)


@cases(30, share=0.7)
@given(st.data())
def test_vocab_and_merges(chat_files, tmp_path_factory, data):
    directory = tmp_path_factory.getbasetemp() / "chat0"
    vocab, merges = vocab_and_merges(directory)
    files = {name: content for name, content in chat_files.items() if name != "tokenizer.json"}
    lines = "\n".join(["#version: 0.2", *merges]).encode()
    files["vocab.json"] = data.draw(st.just(dumped(vocab)) | changed_json_file(vocab))
    files["merges.txt"] = data.draw(st.one_of(st.just(lines), changed_bytes(lines), changed_bytes(lines)))
    try_with(files)


# ---- Llama 3's lines


@st.composite
def lines(draw, data):
    found = data.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(0, len(found) - 1))
        token, rank = found[number].split() if len(found[number].split()) == 2 else (b"YQ==", b"0")
        strange = [b"", b"=", token + b"=", b"YQ", b"!!", "한".encode(), b"\xff", token, b"A" * 100_000]
        ranks = [b"", b"-1", b"0", b"1e3", b"1_0", b"9" * 30, b"9" * 5000, b"\xd9\xa3", rank, b"NaN"]
        separators = [b" ", b"  ", b"", b"\t", b"\x0b"]
        found[number] = b"".join(draw(st.sampled_from(choices)) for choices in (strange, separators, ranks))
    return draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r"])).join(found)


@cases(30, share=0.7)
@given(st.one_of(lines(tiktoken_file()), changed_bytes(tiktoken_file())))
@example(tiktoken_file())
def test_llama3_lines(data):
    try_with({"tokenizer.model": data})


# ---- SentencePiece


@cases(40)
@given(st.data())
def test_a_tokenizer_json_that_restates_sentencepiece(data):
    document = json.loads(json.dumps(llama_json(data.draw(st.sampled_from(["first", "prepend"])))))
    added = {"id": 500, "content": "뭐?", "special": False, "normalized": True, "lstrip": False, "rstrip": True}
    document["added_tokens"].append(added | {"single_word": False})
    part = data.draw(st.sampled_from(["added_tokens", "normalizer", "pre_tokenizer", "decoder", "model", "vocab"]))
    if part == "vocab":
        vocab = document["model"]["vocab"]
        for token in data.draw(st.lists(st.sampled_from(sorted(vocab)), min_size=1, max_size=4)):
            vocab[data.draw(st.sampled_from([token, *TEXTS, "▁" * 2000]))] = data.draw(st.integers(-2, 600) | values)
    else:
        document[part] = data.draw(changed_json(document[part]))
    try_with({"tokenizer.json": dumped(document)}, lambda directory: load_tokenizer(directory).encode_batch(WORDS))


@cases(60, share=1.5)
@given(st.data())
def test_sentencepiece(data):
    model = sentencepiece_model()
    files = {"tokenizer.model": data.draw(changed_bytes(model, most=6) | changed_bytes(model, most=1))}
    if data.draw(st.booleans()):
        config = {"add_bos_token": True, "added_tokens_decoder": {"5": {"content": "[DOC]", "special": True}}}
        files["tokenizer_config.json"] = data.draw(st.just(dumped(config)) | changed_json_file(config))
    try_with(files)
