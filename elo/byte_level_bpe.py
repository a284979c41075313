"""Byte-level BPE, the tokenizer of GPT-2, Llama 3, Qwen2 and SmolLM2, on tiktoken.

A text is cut into pieces by a regular expression, and each piece, as UTF-8 bytes, is merged pair by pair into tokens.
Hugging Face's tokenizer.json and tiktoken describe this differently:

- tokenizer.json lists the pairs that may merge, in order of priority;
- tiktoken merges ANY two neighbours whose bytes together are a token, the lowest id first, and takes a piece that is
  a token as a whole without merging at all.

`mergeable_ranks` decides whether, and with which tokens, the two give the same ids for every text.
"""

import base64
import binascii
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import tiktoken

from elo.errors import UserError

# How each family cuts a text, in tiktoken's regular expressions.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

# Stand-ins for bytes that have no token start here, above every real id.
_NO_TOKEN = 1 << 31


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

    Bytes without a token of their own vanish, as in Hugging Face tokenizers. `source` is the file, for errors.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str, source: Path) -> None:
        # tiktoken needs all 256 bytes. SmolLM2 has 235: the others get ids that no token has.
        self._missing = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        ranks = ranks | {bytes([byte]): _NO_TOKEN + byte for byte in self._missing}
        self._pattern = pattern
        try:
            self._encoding = tiktoken.Encoding("elo", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        except ValueError as error:
            raise UserError(f"{source}: cannot use the pattern {pattern!r}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, which must be valid Unicode (no lone surrogates)."""
        # tiktoken's regex engine runs out of stack on a run of about 1,000,000 spaces.
        if len(text) > 100_000 and re.search(r"(?<!\s)\s{100000}", text):
            return self._encode_pieces(text)
        try:
            ids = self._encoding.encode_ordinary(text)
        except BaseException as error:  # pyo3's PanicException is not an Exception
            if type(error).__name__ != "PanicException":
                raise
            return self._encode_pieces(text)
        if self._missing and max(ids, default=0) >= _NO_TOKEN:
            return self._encode_pieces(text)
        return ids

    def merge(self, piece: bytes) -> list[int]:
        """The ids of a piece, whatever the pattern says."""
        return self._encoding._encode_single_piece(piece)

    def _encode_pieces(self, text: str) -> list[int]:
        """`encode` with the pieces cut by Python's `re`: slower, but it has no limit, and a byte without a token can
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


# ---------------------------------------------------------------------------------------------------------------------
# Patterns


# What a Split pattern may consist of: the constructs that mean the same in Oniguruma (Hugging Face tokenizers), in
# fancy-regex (tiktoken) and, after `_to_python`, in Python's re. Properties are the general categories of Unicode.
_PROPERTY = r"\\p\{[A-Z][a-z]?\}|\\[sS]"
_ESCAPE = r"\\[rnt]|\\[!-/:-@\[-`{-~]"
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


def split_pattern(expression: str, source: Path) -> str:
    """A tokenizer.json's Split (Isolated) expression as a tiktoken pattern. UserError where they could differ."""
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
    except (re.error, OverflowError) as error:
        raise UserError(f"{source}: the Split pattern {expression!r} is not valid: {error}") from error
    if matches_nothing:
        raise UserError(f"{source}: the Split pattern {expression!r} can match an empty string, which is not supported")
    # Split keeps the text between two matches as a piece; tiktoken would drop it.
    return rf"{expression}|(?:(?!{expression})[\s\S])+"


def _to_python(pattern: str) -> str:
    """A tiktoken pattern for Python's re: \\p{..} and \\s become the characters that tiktoken takes them for."""

    def spell(part: re.Match[str]) -> str:
        if part["property"]:
            return f"[{_characters(part['property'])}]"
        if part["set"]:
            return re.sub(_PROPERTY, lambda match: _characters(match.group()), part["set"])
        return part.group()

    return _PATTERN_PART.sub(spell, pattern)


def _characters(one_character: str) -> str:
    """The characters that match in tiktoken, as ranges for a [set] of Python's re."""
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("elo", pat_str=one_character, mergeable_ranks=single_bytes, special_tokens={})
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    # tiktoken drops what does not match.
    codes = [ord(character) for character in bytes(encoding.encode_ordinary(everything)).decode()]
    starts = [code for previous, code in zip([-2, *codes], codes, strict=False) if code != previous + 1]
    ends = [code for code, following in zip(codes, [*codes[1:], -2], strict=False) if following != code + 1]
    return "".join(f"\\U{start:08x}-\\U{end:08x}" for start, end in zip(starts, ends, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Merges


def mergeable_ranks(
    vocab: dict[str, int],
    merges: Iterable[tuple[str, str]],
    source: Path,
    ignore_merges: bool = False,
    not_text: Iterable[str] = (),
) -> dict[bytes, int]:
    """The tokens with which tiktoken's rule gives the ids of the listed merges. UserError where none do.

    `ignore_merges`: a piece that is in the vocabulary is one token, however its merges end (Llama 3).
    `not_text`: the added tokens, which no piece may become by that rule.

    Why it is exact: within a stretch of text whose ends nothing has crossed yet, merging goes as if the stretch stood
    alone. So if two neighbours x, y together have the bytes of a token t, then merging t's bytes alone arrives at
    [x, y] too. We keep the tokens whose own bytes merge into them: for those, [x, y] is the listed pair, the only one
    that ever meets, and tiktoken merges it because it is listed and for no other reason. Every other token is left
    out, since no text merges into it.
    """
    single = {token: vocab[token] for token in BYTE_ALPHABET if token in vocab}
    left, right = _splits(vocab, merges_in_order := _numbered(vocab, merges, source), set(single.values()))
    bytes_of = {id: spelled for token, id in vocab.items() if (spelled := token_bytes(token))}
    ranks = {bytes_of[id]: id for id in [*single.values(), *left] if id in bytes_of}
    if not ranks:
        raise UserError(f"{source}: no token is written in the byte-level alphabet")

    # The tokens left out: would the kept ones arrive at a pair that makes one after all?
    rest = {id for id in bytes_of if len(bytes_of[id]) > 1 and id not in left}
    listed = {(x, y) for x, y, made in merges_in_order if made in rest}
    if not ignore_merges:
        rest = {made for _, _, made in merges_in_order if made in rest}
    rest -= {vocab[token] for token in not_text if token in vocab}
    if rest:
        bpe = ByteLevelBPE(ranks, GPT2_PATTERN, source)
        for id in rest:
            end = bpe.merge(bytes_of[id])
            if len(end) == 2 and (ignore_merges or tuple(end) in listed):
                raise UserError(
                    f"{source}: token {id} ({bytes_of[id]!r}) is merged from {end[0]} and {end[1]} by one rule and not "
                    "by the other (merges out of id order, or a merge that is not listed): tiktoken cannot reproduce it"
                )
    return ranks | {bytes_of[id]: id for id in rest} if ignore_merges else ranks


def _numbered(vocab: dict[str, int], merges: Iterable[tuple[str, str]], source: Path) -> list[tuple[int, int, int]]:
    """The merges as ids (left, right, made), checked to be in the order of the made ids."""
    numbered = []
    last = -1
    for number, (x, y) in enumerate(merges, 1):
        try:
            made = vocab[x + y]
            numbered.append((vocab[x], vocab[y], made))
        except KeyError as error:
            raise UserError(
                f"{source}: merge {number} needs {error.args[0]!r}, which is not in the vocabulary"
            ) from error
        if made < last:
            raise UserError(
                f"{source}: merges out of id order: merge {number} makes token {made} after token {last}; tiktoken "
                "merges in the order of the ids"
            )
        last = made
    return numbered


def _splits(
    vocab: dict[str, int], merges: list[tuple[int, int, int]], single: set[int]
) -> tuple[dict[int, int], dict[int, int]]:
    """The last merge (left part, right part) of every token that its own bytes merge into.

    Merging makes tokens in the order of their ids, each from smaller ones. So x and y arrive at [x, y] unless, on the
    way, something merges across the boundary between them. The tokens at the boundary are known for every moment: going
    back in time from [x, y], the later made of the two is undone, again and again.
    """
    left: dict[int, int] = {}
    right: dict[int, int] = {}
    made_from: dict[tuple[int, int], int] = {}
    for x, y, made in merges:
        # A part that is made later than the whole is no way to make the whole; `mergeable_ranks` looks at it again.
        if not (x in left or x in single) or not (y in left or y in single):
            continue
        at_left, at_right = x, y
        while True:
            parts_left = right.get(at_left)
            parts_right = left.get(at_right)
            # Until when these two neighbours existed. Of equal merges the leftmost is first, hence the + 1.
            if parts_left is not None and (parts_right is None or at_left > at_right):
                until, at_left = at_left, parts_left
            elif parts_right is not None:
                until, at_right = at_right + 1, parts_right
            else:
                left[made], right[made] = x, y
                made_from[x, y] = made
                break
            if made_from.get((at_left, at_right), until) < until:
                break
    return left, right


# ---------------------------------------------------------------------------------------------------------------------
# tiktoken's own format


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
