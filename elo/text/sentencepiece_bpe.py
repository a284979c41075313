"""SentencePiece, the tokenizer of Llama 2 and Mistral."""

import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from elo.common.errors import UserError
from elo.text.added_tokens import AddedToken
from elo.text.merges import first_parts, numbered_merges
from elo.text.tokenizer_json import SPACE, Prefix

# `Type` of a piece in sentencepiece_model.proto
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6


class SentencePieceModel:
    """A tokenizer.model. `source` is the file, for errors; UserError if it is not one.

    text: piece -> id of what texts are made of. control: piece -> id of the control tokens, the unknown token, and the
    user-defined symbols, as far as they are not text. bytes_of: id -> what it decodes to. starts_with_space: the ids
    that lose their space when they come first, because encoding put it there. bos, eos: pieces, None without one.
    prefix: where the space goes between added tokens, which the file does not tell.
    """

    prefix: Prefix

    def __init__(self, data: bytes, source: Path) -> None:
        self._data = data
        self._source = source
        self._processor = self._load(data)
        self._plain: sentencepiece.SentencePieceProcessor | None = None
        try:
            self._read_pieces()
            self.forbid(self.control.values())
        # ValueError: a piece that is not UTF-8, a byte piece that is not <0x..>. The others: no unknown token, or
        # messages that SentencePiece, but not `_protobuf_fields`, can make something of.
        except (ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{source}: a damaged SentencePiece model: {error}") from error

    def _load(self, data: bytes) -> sentencepiece.SentencePieceProcessor:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(data)
        except (RuntimeError, ValueError) as error:  # ValueError: a complaint about a piece that is not UTF-8
            raise UserError(f"{self._source}: not a SentencePiece model: {error}") from error
        return processor

    def _read_pieces(self) -> None:
        processor = self._processor
        pieces = [processor.id_to_piece(id) for id in range(processor.get_piece_size())]
        self._user_defined = dict(_user_defined_symbols(self._data))

        def is_text(id: int) -> bool:
            if pieces[id] in self._user_defined:
                # SentencePiece finds these in any text. Mistral's [REFERENCE_DOC_0] is text, <|im_end|> is not.
                return not re.fullmatch(r"<\|.*\|>", pieces[id])
            return not (processor.is_control(id) or processor.is_unknown(id))

        specs = [spec for number, spec in _protobuf_fields(self._data) if number == 3]
        self._normalizer = dict(field for spec in specs for field in _protobuf_fields(spec))
        self.adds_prefix = bool(self._normalizer.get(3, 1))  # add_dummy_prefix
        self.size = len(pieces)
        self.text = {piece: id for id, piece in enumerate(pieces) if is_text(id)}
        self.control = {piece: id for id, piece in enumerate(pieces) if piece not in self.text}
        self.bytes_of = {id: piece.replace(SPACE, " ").encode() for piece, id in self.text.items()}
        self.bytes_of |= {id: bytes([int(pieces[id][3:-1], 16)]) for id in self.bytes_of if processor.is_byte(id)}
        self.bytes_of[processor.unk_id()] = processor.decode([processor.unk_id()]).encode()
        spaced = [id for piece, id in self.text.items() if piece.startswith(SPACE)]
        # Whether this model puts a space before a text shows in what it decodes.
        removed = processor.decode(spaced[:1]).encode() != b"".join(self.bytes_of[id] for id in spaced[:1])
        self.starts_with_space = frozenset(spaced if removed else [])
        self.bos = pieces[processor.bos_id()] if processor.bos_id() >= 0 else None
        self.eos = pieces[processor.eos_id()] if processor.eos_id() >= 0 else None

    def forbid(self, ids: Iterable[int]) -> None:
        """No text may become one of these user-defined symbols: from now on they are control tokens."""
        ids = set(ids)
        all_pieces = self.text | self.control
        data = self._data
        for symbol, message in self._user_defined.items():
            if all_pieces[symbol] in ids:
                kind = _number(3, _USER_DEFINED)  # the last field of a piece
                if not message.endswith(kind):
                    raise UserError(f"{self._source}: the piece {symbol!r} is not as SentencePiece writes it")
                data = data.replace(message, message.removesuffix(kind) + _number(3, _CONTROL))
                self.bytes_of.pop(all_pieces[symbol], None)
        if data != self._data:
            self._data = data
            self._processor = self._load(data)

    def cut_at_added_tokens(self, also_whole: bool = False) -> None:
        """From now on texts come in parts; with `also_whole`, the first part and a whole text get a space in front as
        the other parts do, not as in SentencePiece. UserError where the model itself normalizes texts."""
        if self._normalizer.get(2) or self._normalizer.get(4, 1):  # precompiled_charsmap, remove_extra_whitespaces
            raise UserError(f"{self._source}: added tokens that are text are not supported beside its normalization")
        if (self.prefix.where != "never") != self.adds_prefix:
            raise UserError(
                f"{self._source}: whether a text gets a space in front is said differently there than in "
                "tokenizer.json or tokenizer_config.json"
            )
        self._also_whole = also_whole
        # Of a field that comes twice the last one counts: normalizer_spec = {add_dummy_prefix = false}.
        self._plain = self._load(self._data + _bytes(3, _number(3, 0)))

    def normalize(self, text: str) -> str:
        """What is done to a text before the added tokens that are `normalized` are looked for."""
        if self._plain is None or not self.prefix.by_normalizer:
            return text
        return (SPACE if text and self.prefix.where == "prepend" else "") + text.replace(" ", SPACE)

    def encode_part(self, text: str, first: bool) -> np.ndarray:
        """The ids, as uint32, of normalized text that stands between added tokens; `first`: before all of them."""
        if self._plain is None:
            return np.array(self._processor.encode(text), np.uint32)
        where = "never" if self.prefix.by_normalizer else self.prefix.where
        # SentencePiece itself puts a space before any text, also one that begins with a space.
        has_one = where != "prepend" and text.startswith((" ", SPACE)) and (self._also_whole or not first)
        if text and not has_one and (where in ("prepend", "always") or (first and where == "first")):
            text = SPACE + text
        return np.array(self.encode_plain(text), np.uint32)

    def encode_plain(self, text: str) -> list[int]:
        """The ids of exactly this text, without a space in front."""
        return self._plain.encode(text)

    @staticmethod
    def shown(token: str) -> str:
        """What an added token is decoded to."""
        return token.replace(SPACE, " ")


# ---- a model written from a tokenizer.json, all that transformers 5 saves of Llama 2 or Mistral


_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def sentencepiece_of(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    unknown: str,
    prefix: Prefix,
    added: dict[str, AddedToken],
    source: Path,
) -> SentencePieceModel:
    """The model that gives each text the ids of a BPE with byte fallback. UserError where no such model exists.

    SentencePiece merges any two neighbours that are a piece together, the highest score first, the leftmost of equals.
    With the rank of a token's merges as its score, and without the tokens that listed merges do not make, these are the
    merges of the file, in its order: `merges.first_parts` says why, and which tokens these are.
    """
    if missing := _BYTES - vocab.keys():
        raise UserError(f"{source}: {len(missing)} of the 256 tokens <0x00> to <0xFF> are missing, as {min(missing)}")
    if max(vocab.values()) >= len(vocab):
        raise UserError(f"{source}: {len(vocab)} tokens have ids up to {max(vocab.values())}; gaps are not supported")
    rank = {made: number for number, made in enumerate(dict.fromkeys(x + y for x, y in merges))}
    single = {token: -1 - id for token, id in vocab.items() if len(token) == 1}
    order = {token: rank.get(token, -1 - id) for token, id in vocab.items()} | single
    numbered = numbered_merges(merges, order, source, "an earlier merge")
    if in_merges := _BYTES & {token for x, y in merges for token in (x, y, x + y)}:
        raise UserError(f"{source}: merges of {min(in_merges)}, which stands for a byte, are not supported")
    left = first_parts(numbered, set(single.values()))
    kept = single.keys() | {token for token, number in rank.items() if number in left}
    if unknown not in vocab or unknown in kept | _BYTES:
        raise UserError(f"{source}: the unk_token {unknown!r:.60} must be a token that no text becomes")

    pieces = {}
    for token, id in vocab.items():
        kind = _NORMAL if token in kept else _BYTE if token in _BYTES else _UNKNOWN if token == unknown else _CONTROL
        score = struct.pack("<f", -1.0 - rank.get(token, 0))
        pieces[id] = _bytes(1, _bytes(1, token.encode(errors="replace")) + b"\x15" + score + _number(3, kind))
    bpe, dummy_prefix = 2, int(prefix.where != "never")
    trainer = _number(3, bpe) + _number(35, 1) + _number(40, vocab[unknown])  # model_type, byte_fallback, unk_id
    trainer += b"".join(_number(id, -1) for id in (41, 42, 43)) + _bytes(45, unknown.encode())  # no BOS, EOS, PAD
    normalizer = _number(3, dummy_prefix) + _number(4, 0)  # remove_extra_whitespaces
    data = b"".join(pieces[id] for id in range(len(pieces))) + _bytes(2, trainer) + _bytes(3, normalizer)
    model = SentencePieceModel(data, source)
    model.prefix = prefix
    model.cut_at_added_tokens(also_whole=True)

    # No text becomes the others, but a model might say them.
    model.control = {}
    model.bytes_of.pop(vocab[unknown])
    said = {token: id for token, id in vocab.items() if token not in model.text and token not in added}
    model.bytes_of |= {id: token.replace(SPACE, " ").encode(errors="replace") for token, id in said.items()}
    spaced = (id for id, spelled in model.bytes_of.items() if spelled[:1] == b" ")
    model.starts_with_space = frozenset(spaced if dummy_prefix else ())

    # Would the kept ones, after all, arrive at a pair that makes one of the others?
    listed = {(vocab[x], vocab[y]) for x, y in merges}
    for token in rank.keys() - kept:
        end = tuple(model.encode_plain(token))
        if len(end) == 2 and end in listed:
            raise UserError(f"{source}: SentencePiece cannot reproduce the merge of tokens {end[0]} and {end[1]}")
    return model


# ---- sentencepiece_model.proto


def _user_defined_symbols(model: bytes) -> Iterator[tuple[str, bytes]]:
    """Text and message of the user-defined symbols in a ModelProto, whose field 1 are the pieces:
    message SentencePiece { string piece = 1; float score = 2; Type type = 3; }"""
    for number, message in _protobuf_fields(model):
        if number == 1:
            fields = dict(_protobuf_fields(message))
            if fields.get(3) == _USER_DEFINED:
                yield fields.get(1, b"").decode(), message


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message that is known to be valid."""

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value

    at = 0
    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}.get(wire_type) or varint()
        yield number, message[at : at + length]
        at += length


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # a negative number as protobuf writes it
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
