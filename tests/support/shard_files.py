"""Small texts for token shards, and what a cache has."""

import json

import pytest

from elo.common.errors import UserError

TEXTS = ["First of all.", "둘째로 더 많은 글이\n필요하다.", "And <|endoftext|> is text."]


def write_json_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def error_of(function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def finished_shards(cache):
    return [path for path in cache.iterdir() if not path.name.startswith(".")]
