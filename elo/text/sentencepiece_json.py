"""SentencePiece's model file written from a tokenizer.json, all that transformers 5 saves of Llama 2 or Mistral.

SentencePiece merges any two neighbours that are a piece together, the highest score first, the leftmost of equals.
With the rank of a token's merges as its score, and without the tokens that listed merges do not make, these are the
merges of the file, in its order: `merges.first_parts` says why, and which tokens these are.
"""

import struct
from pathlib import Path

from elo.common.errors import UserError
from elo.text.added_tokens import AddedToken
from elo.text.merges import first_parts, numbered_merges
from elo.text.sentencepiece_bpe import SentencePieceModel
from elo.text.tokenizer_json import SPACE, Prefix

# `Type` in sentencepiece_model.proto
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def sentencepiece_of(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    unknown: str,
    prefix: Prefix,
    added: dict[str, AddedToken],
    source: Path,
) -> SentencePieceModel:
    """The model that gives each text the ids of a BPE with byte fallback. UserError where no such model exists."""
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
