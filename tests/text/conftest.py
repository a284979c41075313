"""Tokenizers that several files of tests read; nothing changes them."""

import base64
import json
import shutil

import pytest
from chat_checkpoints import open_format
from tokenizer_styles import MISTRAL_V3, SPECIALS, STYLES, train_sentencepiece, trained, without_added_tokens, write

from elo.text.byte_level_bpe import BYTE_ALPHABET
from elo.text.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """style -> (our tokenizer, the reference)"""
    made = {}
    for style in STYLES:
        directory = write(tmp_path_factory.mktemp(style), tokenizer__json=trained(style))
        made[style] = load_tokenizer(directory), without_added_tokens(trained(style))
    return made


@pytest.fixture(scope="session")
def sentencepiece_directory(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sp"), control_symbols="[INST],[/INST]")


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def mistral(tmp_path_factory):
    """(The tokenizer of Mistral v0.3, which mistral-common brings along; its chat format)"""
    directory = tmp_path_factory.mktemp("mistral")
    shutil.copy(MISTRAL_V3, directory / "tokenizer.model")
    return open_format(directory)
