"""A chat format that nothing changes, and token shards in a cache of the test's own."""

import pytest
from small_chats import chatml
from small_tokenizer import write_tokenizer

from elo.data.finding import find_files
from elo.data.shards import tokenize


@pytest.fixture(scope="session")
def format(tmp_path_factory):
    return chatml(tmp_path_factory.mktemp("chatml"))


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def build(tmp_path, tokenizer):
    """`tokenize` of the small tokenizer with a cache of its own."""

    def build(*paths, tokenizer=tokenizer, **options):
        return tokenize(find_files(paths), tokenizer, tmp_path / "cache", progress=False, **options)

    return build
