"""Byte-level BPE, the tokenizer of GPT-2, Llama 3, Qwen2 and SmolLM2, on tiktoken.

A text is cut into pieces by a regular expression, and each piece, as UTF-8 bytes, is merged pair by pair into tokens.
Hugging Face's tokenizer.json and tiktoken describe this differently:

- tokenizer.json lists the pairs that may merge, in order of priority;
- tiktoken merges ANY two neighbours whose bytes together are a token, the lowest id first, and takes a piece that is
  a token as a whole without merging at all.

`merges.mergeable_ranks` decides whether, and with which tokens, the two give the same ids for every text.
"""

import base64
import binascii
import re
import unicodedata
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import tiktoken

from elo.common.errors import UserError

# How each family cuts a text, in tiktoken's regular expressions.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

LONGEST_PATTERN = 4096  # characters; real ones have some hundred

# Above every real id; see ByteLevelBPE.
_NO_TOKEN = 1 << 31
# tiktoken's encode_to_numpy takes twice as long without any special token, so it gets one. A text that holds it is
# text like any other, since we never allow a special token.
_NOT_SPECIAL = {"\0no special token\0": _NO_TOKEN + 256}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, in which vocab.json and tokenizer.json write tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def token_bytes(token: str) -> bytes | None:
    """The bytes that a token of vocab.json stands for; None when it is not written in the byte alphabet."""
    try:
        return bytes(map(BYTE_ALPHABET.__getitem__, token))
    except KeyError:
        return None


class ByteLevelBPE:
    """Text to ids by `pattern` and `ranks` (token bytes -> id, which is also the merge priority).

    Bytes without a token of their own vanish, as in Hugging Face tokenizers. `nfc`: texts are brought into Unicode's
    composed normal form first (Qwen2). `source` is the file, for errors.
    """

    starts_with_space: frozenset[int] = frozenset()  # see `ids.StreamDecoder`; it puts no space before a text

    def __init__(self, ranks: dict[bytes, int], pattern: str, source: Path, nfc: bool = False) -> None:
        # tiktoken needs all 256 bytes. SmolLM2 has 235: the others get ids that are never used.
        self._missing = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        ranks = ranks | {bytes([byte]): _NO_TOKEN + byte for byte in self._missing}
        self._pattern = pattern
        self._nfc = nfc
        self._source = source
        try:
            self.encoding = tiktoken.Encoding(
                "elo", pat_str=pattern, mergeable_ranks=ranks, special_tokens=_NOT_SPECIAL
            )
        except ValueError as error:
            raise UserError(f"{source}: cannot use the pattern {pattern!r:.300}: {error}") from error

    def normalize(self, text: str) -> str:
        # Python's Unicode is newer than the 9.0 of Hugging Face's tokenizers. They differ only where one of some
        # 100 combining marks that are newer than that stands among other marks.
        if not self._nfc or unicodedata.is_normalized("NFC", text):
            return text
        return unicodedata.normalize("NFC", text)

    def encode_part(self, text: str, first: bool = True) -> np.ndarray:
        """The ids, as uint32, of normalized text without lone surrogates, which is encoded alike wherever it stands."""
        data = text.encode() if self._missing else b""
        if len(data.translate(None, delete=self._missing)) == len(data):
            try:
                return self.encoding.encode_to_numpy(text, disallowed_special=())
            except ValueError:  # its regex engine runs out of stack, as on a run of about 1,000,000 spaces
                if is_foreign(self._pattern):
                    raise UserError(
                        f"{self._source}: its Split pattern cannot cut the text that begins with {text[:40]!r}"
                    ) from None
        return np.array(self._encode_pieces(text), np.uint32)

    @staticmethod
    def shown(token: str) -> str:
        """What an added token is decoded to."""
        return token

    def merge(self, piece: bytes) -> list[int]:
        """The ids of a piece, whatever the pattern says; it need not be UTF-8.

        The method is private to tiktoken. Should it vanish, `tiktoken._educational.bpe_encode` does the same, slower.
        """
        return self.encoding._encode_single_piece(piece)

    def _encode_pieces(self, text: str) -> list[int]:
        """`_encode` with the pieces cut by Python's `re`: slower, but it has no limit, and a byte without a token can
        be taken out of its piece before the merges, so that its neighbours meet."""
        ids = []
        for match in self._python_pattern.finditer(text):
            piece = match.group().encode().translate(None, delete=self._missing)
            if piece:
                ids += self.merge(piece)
        return ids

    @cached_property
    def _python_pattern(self) -> re.Pattern[str]:
        return re.compile(_to_python(self._pattern))


# ---- Patterns


# What a Split pattern may consist of: the constructs that mean the same in Oniguruma (Hugging Face tokenizers), in
# fancy-regex (tiktoken) and, after `_to_python`, in Python's re. Properties are the general categories of Unicode.
_PROPERTY = r"\\p\{[A-Z][a-z]?\}|\\[sS]"
_BETWEEN = r"[\s\S])+"
_ESCAPE = r"\\[rnt]|\\[!-/:;=?@\[-`{-~]"  # \< and \> are the ends of a word to tiktoken
_PATTERN_PART = re.compile(
    rf"""
      (?P<set>\[\^?(?:{_PROPERTY}|{_ESCAPE}|(?!--|~~|&&)[^\\\[\]^])+\])
    | (?P<property>{_PROPERTY})
    | {_ESCAPE}
    | \(\?i:(?:'s\|'t\|'re\|'ve\|'m\|'ll\|'d|\[sdmt\]\|ll\|ve\|re)\)   # Ignoring case differs for other letters.
    | \(\?: | \(\?! | \) | \|
    | (?:[?*+]\+? | \{{\d{{1,3}}(?:,\d{{0,3}})?\}}) (?![?*+{{])
    | [^\\.^$()\[\]{{}}*+?|]
    """,
    re.VERBOSE,
)


def is_foreign(pattern: str) -> bool:
    """Whether it is no family's, but of `split_pattern`. tiktoken gives up on a pattern that takes for ever. Python's
    `re` does not: there, only ours are tried."""
    return pattern.endswith(_BETWEEN)


def split_pattern(expression: str, source: Path) -> str:
    """A tokenizer.json's Split (Isolated) expression as a tiktoken pattern. UserError where they could differ."""
    if len(expression) > LONGEST_PATTERN:
        raise UserError(f"{source}: a Split pattern of {len(expression):,} characters is not supported")
    position = 0
    while position < len(expression):
        part = _PATTERN_PART.match(expression, position)
        if part is None:
            raise UserError(
                f"{source}: the Split pattern uses {expression[position : position + 12]!r}, which may mean something "
                "else in tiktoken's regular expressions"
            )
        position = part.end()
    if expression in (GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN):
        return expression
    try:
        # Which characters a property has cannot matter here: an expression that can match nothing matches "".
        matches_nothing = re.match(re.sub(_PROPERTY, "x", expression), "")
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{source}: the Split pattern {expression!r:.300} is not valid: {error}") from error
    if matches_nothing:
        raise UserError(
            f"{source}: the Split pattern {expression!r:.300} can match an empty string, which is not supported"
        )
    # Split keeps the text between two matches as a piece; tiktoken would drop it.
    return rf"{expression}|(?:(?!{expression}){_BETWEEN}"


def _to_python(pattern: str) -> str:
    """A tiktoken pattern for Python's re: \\p{..} and \\s become the characters that tiktoken takes them for."""

    def spell(part: re.Match[str]) -> str:
        if part["property"]:
            return f"[{characters(part['property'])}]"
        if part["set"]:
            return re.sub(_PROPERTY, lambda match: characters(match.group()), part["set"])
        return part.group()

    return _PATTERN_PART.sub(spell, pattern)


@cache
def characters(one_character: str) -> str:
    """The characters that match in tiktoken, as ranges for a [set] of Python's re."""
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("elo", pat_str=one_character, mergeable_ranks=single_bytes, special_tokens={})
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    # tiktoken drops what does not match.
    codes = [ord(character) for character in bytes(encoding.encode_ordinary(everything)).decode()]
    starts = [code for previous, code in zip([-2, *codes], codes, strict=False) if code != previous + 1]
    ends = [code for code, following in zip(codes, [*codes[1:], -2], strict=False) if following != code + 1]
    return "".join(f"\\U{start:08x}-\\U{end:08x}" for start, end in zip(starts, ends, strict=True))


# ---- tiktoken's own format


def read_tiktoken(data: bytes, source: Path) -> dict[bytes, int]:
    """Llama 3's tokenizer.model: a line `base64 rank` for each token. UserError names the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            if int(rank) != number - 1 or token in ranks or not token:
                raise ValueError("tokens are numbered from 0 and differ")
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{source}, line {number}: not `base64 rank` as in Llama 3's tokenizer.model: {error}"
            ) from error
        ranks[token] = number - 1
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{source}: the file is not complete: it lacks tokens for single bytes")
    return ranks
