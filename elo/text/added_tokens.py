"""Added tokens, which a Hugging Face tokenizer takes out of a text before its model sees what is left.

Those that are not special are text: Qwen's `<tool_call>`, or the words by which `add_tokens` extended a vocabulary.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import Fields
from elo.text.byte_level_bpe import characters
from elo.text.tokenizer_files import TokenizerFiles, check_id, token_text

# Unicode's White_Space, as `\s` in Rust; Python's `isspace` has four control characters more.
_SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
_WHITE_SPACE = frozenset(_SPACES).union(map(chr, range(0x2000, 0x200B)))

_WORD = r"\w"

# The fields of tokenizer_config.json and special_tokens_map.json that list special tokens.
_LISTED = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """`special`: never made from text. The others are as in tokenizers: `normalized`: looked for, in its normalized
    form, in the normalized text, not in the text itself; `lstrip`, `rstrip`: it takes the white space on that side;
    `single_word`: not inside of a word."""

    id: int
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class AddedTokenSplitter:
    """Cuts texts at added tokens exactly as tokenizers does with `encode_special_tokens`: what a special token matches
    stays text, but no other token is found in it. `normalize` is what the tokenizer does to a text."""

    def __init__(self, added: dict[str, AddedToken], normalize: Callable[[str], str], source: Path) -> None:
        self._normalize = normalize
        self._raw = {text: token for text, token in added.items() if not token.normalized}
        self._normalized: dict[str, AddedToken] = {}
        for text, token in added.items():
            if token.normalized and self._normalized.setdefault(normalize(text), token) is not token:
                raise UserError(
                    f"{source}: the added token {text!r:.60} is the same as another one after normalization"
                )
        self._patterns = [_leftmost_longest(tokens) for tokens in (self._raw, self._normalized)]

    def split(self, text: str) -> list[str | int]:
        """The normalized text between added tokens, and the ids of these."""
        raw, normalized = self._patterns
        parts: list[str | int] = []
        for part in _cut(text, raw, self._raw):
            parts += [part] if isinstance(part, int) else _cut(self._normalize(part), normalized, self._normalized)
        return parts


def _leftmost_longest(tokens: dict[str, AddedToken]) -> re.Pattern[str] | None:
    """A pattern that finds the longest token at the first place where there is one; None if all are special."""
    if all(token.special for token in tokens.values()):
        return None
    rests = defaultdict(list)  # by the first character: `re` would try thousands of alternatives one after the other
    for text in sorted(tokens, key=len, reverse=True):
        rests[text[0]].append(re.escape(text[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in rests.items()))


def _cut(text: str, pattern: re.Pattern[str] | None, tokens: dict[str, AddedToken]) -> list[str | int]:
    """`find_matches` in tokenizers' added_vocabulary.rs, with its order of steps."""
    parts: list[str | int] = []
    done = 0
    for match in pattern.finditer(text) if pattern else ():
        token, (start, stop) = tokens[match.group()], match.span()
        around = text[start - 1 : start] + text[stop : stop + 1]
        if token.special or (token.single_word and around and re.search(word_character(), around)):
            continue
        if token.lstrip:
            start = max(start, done)
            while start > done and text[start - 1] in _WHITE_SPACE:
                start -= 1
        while token.rstrip and stop < len(text) and text[stop] in _WHITE_SPACE:
            stop += 1
        if done < start:
            parts.append(text[done:start])
        if start < stop:  # else the one before has taken all of it
            parts.append(token.id)
        done = stop
    if done < len(text):
        parts.append(text[done:])
    return parts


@cache
def word_character() -> str:
    return f"[{characters(_WORD)}]"


def read_added_tokens(files: TokenizerFiles, vocab: dict[str, int]) -> dict[str, AddedToken]:
    """Text -> token, from the files that may add to `vocab`; UserError where they contradict each other's ids.

    As in transformers: what `added_tokens_decoder` of tokenizer_config.json says of a token goes before tokenizer.json,
    added_tokens.json counts where there is no such entry, and a token that is special anywhere is special.
    """
    added: dict[str, AddedToken] = {}
    text_of = {id: text for text, id in vocab.items()}
    config = files.path("tokenizer_config.json")
    special = _named_special(files.config)

    def add(text: Any, id: Any, record: dict[str, Any], source: Path) -> None:
        if not isinstance(text, str) or not text:
            raise UserError(f"{source}: an added token has the text {text!r:.60}")
        check_id(text, id, source)
        known = added[text].id if text in added else vocab.get(text, id)
        if known != id:
            raise UserError(f"{source}: its token {text!r:.60} has the id {id}, but elsewhere the id {known!r:.20}")
        if text_of.setdefault(id, text) != text:
            raise UserError(f"{source}: its token {id} is {text!r:.60}, but elsewhere {text_of[id]!r:.60}")
        says = Fields(record, source)
        is_special = says.boolean("special", False)
        flags = {
            "normalized": says.boolean("normalized", not is_special),
            **{name: says.boolean(name, False) for name in ("lstrip", "rstrip", "single_word")},
        }
        is_special |= text in special or (text in added and added[text].special)
        added[text] = AddedToken(id, is_special, **flags)

    source = files.path("tokenizer.json")
    for token in files.fields("tokenizer.json").array("added_tokens", []):
        if not isinstance(token, dict):
            raise UserError(f"{source}: an added token is {token!r:.60}")
        add(token.get("content"), token.get("id"), token, source)
    newer = files.fields("tokenizer_config.json")
    for id, token in newer.object("added_tokens_decoder", {}).fields.items():
        number = int(id) if id.isdecimal() and len(id) < 12 else id
        add(token_text(token), number, token if isinstance(token, dict) else {}, config)
    if not (is_newer := newer.given("added_tokens_decoder")):
        special |= _named_special(files.json("special_tokens_map.json"))
    for text, id in files.json("added_tokens.json").items():
        if text not in added or added[text].id != id:
            add(text, id, {"special": is_newer}, files.path("added_tokens.json"))
    return added


def named_tokens(record: dict[str, Any]) -> dict[str, str]:
    """The tokens that a configuration calls its bos_token, eos_token, image_token, ..."""
    named = {name: token for name, token in record.items() if name.endswith("_token")}
    for listed in map(record.get, _LISTED):
        named |= listed if isinstance(listed, dict) else {}
    return {name: text for name, token in named.items() if (text := token_text(token)) is not None}


def _named_special(record: dict[str, Any]) -> set[str]:
    """The texts of the tokens that a configuration names, or lists as special."""
    listed = [token for tokens in map(record.get, _LISTED) if isinstance(tokens, list) for token in tokens]
    return {text for text in [*named_tokens(record).values(), *map(token_text, listed)] if text}
