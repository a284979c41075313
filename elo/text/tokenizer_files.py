"""The files of a Hugging Face tokenizer, checked while they are read: every mistake in them is a UserError."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import json_object, shown
from elo.common.files import read_file
from elo.text.byte_level_bpe import GPT2_PATTERN, split_pattern

LARGEST = 64 * 2**20  # bytes of a file; the largest real tokenizer.json has half as many
LONGEST_TOKEN = 1024  # bytes; real ones have up to 256, and some checks take the square of it
MOST_STEPS = 64  # of a normalizer or pre_tokenizer

# Real ids are far below. A file that says otherwise must not make anyone allocate a table of that size.
MAX_ID = 1 << 24


@dataclass(frozen=True)
class AddedToken:
    id: int
    special: bool
    # Whether white space before or after it goes with it.
    lstrip: bool = False
    rstrip: bool = False


class TokenizerFiles:
    """The files of a directory that a tokenizer is made from; remembers what was read, for the fingerprint."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory")
        self.directory = directory
        self._data: dict[str, bytes] = {}
        self._parsed: dict[str, dict[str, Any]] = {}
        self.config: dict[str, Any] = self.json("tokenizer_config.json") or {}

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

    def json(self, name: str) -> dict[str, Any] | None:
        """The content of a file that holds a JSON object, None where there is no such file."""
        if name in self._parsed:
            return self._parsed[name]
        data = self.read(name)
        if data is None:
            return None
        self._parsed[name] = json_object(data, self.path(name))
        return self._parsed[name]

    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of all files that were read."""
        digest = hashlib.sha256()
        for name, data in sorted(self._data.items()):
            digest.update(f"{name} {len(data)}\n".encode() + data)
        return digest.hexdigest()


def field(record: dict[str, Any], key: str, kind: type | tuple[type, ...], source: Path, default: Any) -> Any:
    """record[key], or `default` where it is missing or null. UserError if it is not of that kind."""
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise UserError(f"{source}: {key!r} has a value of the wrong type: {shown(value)}")
    return value


def has_byte_level(tokenizer_json: dict[str, Any]) -> bool:
    """Whether its pre-tokenizer writes texts in the byte alphabet."""
    steps = _steps(tokenizer_json.get("pre_tokenizer"), "pretokenizers")
    return any(step.get("type") == "ByteLevel" for step in steps)


def _steps(record: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre_tokenizer or post_processor, which may be null, one, or a Sequence (of ...)."""
    steps = []
    pending = [record] if record else []
    while pending:
        step = pending.pop(0)
        if not isinstance(step, dict):
            step = {"type": step}  # for the refusal
        if step.get("type") == "Sequence" and isinstance(step.get(key), list):
            pending = step[key] + pending
        else:
            steps.append(step)
        if len(pending) + len(steps) > MOST_STEPS:
            raise UserError(f"a tokenizer.json with more than {MOST_STEPS} {key} is not supported")
    return steps


def is_nfc(normalizer: dict[str, Any], source: Path) -> bool:
    """Whether texts are normalized to NFC; UserError for any other normalizer."""
    steps = _steps(normalizer, "normalizers")
    for step in steps:
        if step.get("type") != "NFC":
            raise UserError(f"{source}: the normalizer {step.get('type')!r:.60} is not supported, only NFC")
    return bool(steps)


def read_pattern(pre_tokenizer: dict[str, Any], source: Path) -> str:
    """The pre-tokenizer as one pattern of tiktoken; UserError where that cannot be."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    for step in steps:
        if step.get("type") not in ("Split", "Digits", "ByteLevel"):
            raise UserError(f"{source}: the pre_tokenizer {step.get('type')!r:.60} is not supported")
    kinds = [step["type"] for step in steps]
    byte_level = steps[-1] if kinds and kinds[-1] == "ByteLevel" else {}
    # These two are true where they are not given.
    if field(byte_level, "add_prefix_space", bool, source, True):
        raise UserError(f"{source}: a ByteLevel pre_tokenizer with add_prefix_space is not supported")
    by_words = field(byte_level, "use_regex", bool, source, True)

    if kinds == ["ByteLevel"]:
        return GPT2_PATTERN if by_words else r"[\s\S]+"
    if kinds == ["Digits", "ByteLevel"]:
        digits = r"\p{N}" if field(steps[0], "individual_digits", bool, source, False) else r"\p{N}+"
        if not by_words:
            return rf"{digits}|[^\p{{N}}]+"
        # The text between digits is cut on its own, so that spaces before a digit are spaces at the end.
        return rf"'(?:[sdmt]|ll|ve|re)|{digits}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?![^\s\p{{N}}])|\s+"
    if kinds == ["Split", "ByteLevel"] and not by_words:
        split = steps[0]
        expression = field(split, "pattern", dict, source, {}).get("Regex")
        if not isinstance(expression, str) or split.get("behavior") != "Isolated" or split.get("invert"):
            raise UserError(
                f"{source}: a Split pre_tokenizer is supported with a Regex, Isolated and not inverted only"
            )
        return split_pattern(expression, source)
    raise UserError(f"{source}: the pre_tokenizers {' + '.join(kinds)} are not supported in this combination")


def read_template_bos(post_processor: dict[str, Any], source: Path) -> str | None:
    """The token that the post-processor puts in front of a text."""
    for step in _steps(post_processor, "processors"):
        if step.get("type") == "ByteLevel":  # It moves offsets only.
            continue
        if step.get("type") != "TemplateProcessing":
            raise UserError(f"{source}: the post_processor {step.get('type')!r:.60} is not supported")
        front = []
        for part in field(step, "single", list, source, []):
            if not isinstance(part, dict) or "SpecialToken" not in part:
                break
            front.append(token_text(part["SpecialToken"], key="id"))
        if len(front) > 1 or None in front:
            what = f"{len(front)} tokens" if len(front) > 1 else "None"
            raise UserError(f"{source}: its post_processor puts {what} before a text; one token is supported")
        if front:
            return front[0]
    return None


def token_text(token: Any, key: str = "content") -> str | None:
    """A token of a config: its text, or an object that has it as `key`."""
    text = token.get(key) if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_vocabulary(vocab: dict[str, Any], source: Path) -> dict[str, int]:
    """A vocabulary, token -> id, with ids that are whole numbers, in range and different."""
    for token, id in vocab.items():
        _check_id(token, id, source)
    if len(set(vocab.values())) < len(vocab):
        seen: dict[int, str] = {}
        for token, id in vocab.items():
            if seen.setdefault(id, token) != token:
                raise UserError(f"{source}: the tokens {seen[id]!r:.60} and {token!r:.60} have the same id {id}")
    return vocab


def _check_id(token: str, id: Any, source: Path) -> None:
    if type(id) is not int or not 0 <= id < MAX_ID:
        raise UserError(f"{source}: the token {token!r:.60} has the id {id!r:.40}; ids are from 0 to {MAX_ID - 1}")


def read_pair(merge: Any, source: Path) -> tuple[str, str]:
    """A merge, "a b" or ["a", "b"]."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise UserError(f"{source}: the merge {merge!r:.60} is not a pair of tokens")
    return parts[0], parts[1]


def read_merges_txt(data: bytes, source: Path) -> list[tuple[str, str]]:
    """merges.txt: a line "a b" for each merge, after a line with the version."""
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8: {error}") from error
    return [read_pair(line.rstrip("\r"), source) for line in lines if line.strip() and not line.startswith("#version")]


def read_added_tokens(files: TokenizerFiles, vocab: dict[str, int]) -> dict[str, AddedToken]:
    """Text -> token, from the three files that may add to `vocab`; UserError where they contradict each other."""
    added: dict[str, AddedToken] = {}
    text_of = {id: text for text, id in vocab.items()}

    def add(text: Any, id: Any, special: Any, name: str, flags: Any = None) -> None:
        source = files.path(name)
        if not isinstance(text, str) or not text:
            raise UserError(f"{source}: an added token has the text {text!r:.60}")
        _check_id(text, id, source)
        known = added[text].id if text in added else vocab.get(text, id)
        if known != id:
            raise UserError(f"{source}: its token {text!r:.60} has the id {id}, but elsewhere the id {known!r:.20}")
        if text_of.setdefault(id, text) != text:
            raise UserError(f"{source}: its token {id} is {text!r:.60}, but elsewhere {text_of[id]!r:.60}")
        strips = {side: bool(flags.get(side)) for side in ("lstrip", "rstrip")} if isinstance(flags, dict) else {}
        added.setdefault(text, AddedToken(id, bool(special), **strips))

    source = files.path("tokenizer.json")
    for token in field(files.json("tokenizer.json") or {}, "added_tokens", list, source, []):
        if not isinstance(token, dict):
            raise UserError(f"{source}: an added token is {token!r:.60}")
        add(token.get("content"), token.get("id"), token.get("special"), "tokenizer.json", token)
    decoder = field(files.config, "added_tokens_decoder", dict, files.path("tokenizer_config.json"), {})
    for id, token in decoder.items():
        number = int(id) if id.isdecimal() and len(id) < 12 else id
        special = isinstance(token, dict) and token.get("special")
        add(token_text(token), number, special, "tokenizer_config.json", token)
    for text, id in (files.json("added_tokens.json") or {}).items():
        # This file does not tell; where it stands alone, its tokens are those of a chat format.
        add(text, id, True, "added_tokens.json")
    return added
