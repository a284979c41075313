"""The files of a Hugging Face tokenizer, checked while they are read: every mistake in them is a UserError."""

import hashlib
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import Fields, is_texts, json_object
from elo.common.files import read_file

LARGEST = 64 * 2**20  # bytes of a file; the largest real tokenizer.json has half as many
LONGEST_TOKEN = 1024  # characters; real ones have up to 256, and some checks take the square of it

# Real ids are far below. A file that says otherwise must not make anyone allocate a table of that size.
MAX_ID = 1 << 24


class TokenizerFiles:
    """The files of a directory that a tokenizer is made from; remembers what was read, for the fingerprint."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory")
        self.directory = directory
        self._data: dict[str, bytes] = {}
        self._parsed: dict[str, dict[str, Any]] = {}
        self.config = self.json("tokenizer_config.json")

    def path(self, name: str) -> Path:
        return self.directory / name

    def read(self, name: str) -> bytes | None:
        """The content, None where there is no such file."""
        if name not in self._data:
            try:
                self._data[name] = read_file(self.path(name), LARGEST)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise UserError(f"{self.path(name)}: cannot be read: {error.strerror}") from error
        return self._data[name]

    def json(self, name: str) -> dict[str, Any]:
        """The content of a file that holds a JSON object, empty where there is no such file."""
        if name not in self._parsed:
            data = self.read(name)
            self._parsed[name] = {} if data is None else json_object(data, self.path(name))
        return self._parsed[name]

    def fields(self, name: str) -> Fields:
        return Fields(self.json(name), self.path(name))

    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of all files that were read."""
        digest = hashlib.sha256()
        for name, data in sorted(self._data.items()):
            digest.update(f"{name} {len(data)}\n".encode() + data)
        return digest.hexdigest()


def token_text(token: Any, key: str = "content") -> str | None:
    """A token of a config: its text, or an object that has it as `key`."""
    text = token.get(key) if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_vocabulary(vocab: dict[str, Any], source: Path | str) -> dict[str, int]:
    """A vocabulary, token -> id, with ids that are whole numbers, in range and different."""
    token_of: dict[int, str] = {}
    for token, id in vocab.items():
        check_id(token, id, source)
        if len(token) > LONGEST_TOKEN:
            raise UserError(f"{source}: a token of {len(token):,} characters; at most {LONGEST_TOKEN} are supported")
        if token_of.setdefault(id, token) != token:
            raise UserError(f"{source}: the tokens {token_of[id]!r:.60} and {token!r:.60} have the same id {id}")
    return vocab


def check_id(token: str, id: Any, source: Path | str) -> None:
    if type(id) is not int or not 0 <= id < MAX_ID:
        raise UserError(f"{source}: the token {token!r:.60} has the id {id!r:.40}; ids are from 0 to {MAX_ID - 1}")


def read_pair(merge: Any, source: Path | str) -> tuple[str, str]:
    """A merge, "a b" or ["a", "b"]."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not is_texts(parts) or len(parts) != 2:
        raise UserError(f"{source}: the merge {merge!r:.60} is not a pair of tokens")
    return parts[0], parts[1]


def read_merges_txt(data: bytes, source: Path) -> list[tuple[str, str]]:
    """merges.txt: a line "a b" for each merge, after a line with the version."""
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8: {error}") from error
    return [read_pair(line.rstrip("\r"), source) for line in lines if line.strip() and not line.startswith("#version")]
