"""SentencePiece, the tokenizer of Llama 2 and Mistral."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from elo.common.errors import UserError
from elo.text.added_tokens import AddedToken
from elo.text.merges import first_parts, numbered_merges
from elo.text.tokenizer_json import SPACE, Prefix

Piece = ModelProto.SentencePiece


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
        # ValueError: a piece that is not UTF-8, a byte piece that is not <0x..>. IndexError: no unknown token.
        except (DecodeError, ValueError, IndexError) as error:
            raise UserError(f"{source}: a damaged SentencePiece model: {error}") from error

    def _load(self, data: bytes) -> sentencepiece.SentencePieceProcessor:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(data)
        except (RuntimeError, ValueError) as error:  # ValueError: a complaint about a piece that is not UTF-8
            raise UserError(f"{self._source}: not a SentencePiece model: {error}") from error
        return processor

    def _read_pieces(self) -> None:
        processor, proto = self._processor, ModelProto.FromString(self._data)
        pieces = [processor.id_to_piece(id) for id in range(processor.get_piece_size())]
        kinds = [piece.type for piece in proto.pieces]
        self._user_defined = {id for id, kind in enumerate(kinds) if kind == Piece.USER_DEFINED}

        def is_text(id: int) -> bool:
            # SentencePiece finds user-defined ones in any text. Mistral's [REFERENCE_DOC_0] is text, <|im_end|> is not.
            is_special = id in self._user_defined and re.fullmatch(r"<\|.*\|>", pieces[id])
            return kinds[id] not in (Piece.CONTROL, Piece.UNKNOWN) and not is_special

        normalizer = proto.normalizer_spec
        self.adds_prefix = normalizer.add_dummy_prefix
        self._normalizes = bool(normalizer.precompiled_charsmap) or normalizer.remove_extra_whitespaces
        self.size = len(pieces)
        self.text = {piece: id for id, piece in enumerate(pieces) if is_text(id)}
        self.control = {piece: id for id, piece in enumerate(pieces) if piece not in self.text}
        self.bytes_of = {id: piece.replace(SPACE, " ").encode() for piece, id in self.text.items()}
        self.bytes_of |= {id: bytes([int(pieces[id][3:-1], 16)]) for id in self.bytes_of if kinds[id] == Piece.BYTE}
        self.bytes_of[processor.unk_id()] = processor.decode([processor.unk_id()]).encode()
        spaced = [id for piece, id in self.text.items() if piece.startswith(SPACE)]
        # Whether this model puts a space before a text shows in what it decodes.
        removed = processor.decode(spaced[:1]).encode() != b"".join(self.bytes_of[id] for id in spaced[:1])
        self.starts_with_space = frozenset(spaced if removed else [])
        self.bos = pieces[processor.bos_id()] if processor.bos_id() >= 0 else None
        self.eos = pieces[processor.eos_id()] if processor.eos_id() >= 0 else None

    def forbid(self, ids: Iterable[int]) -> None:
        """No text may become one of these user-defined symbols: from now on they are control tokens."""
        if forbidden := self._user_defined.intersection(ids):
            proto = ModelProto.FromString(self._data)
            for id in forbidden:
                proto.pieces[id].type = Piece.CONTROL
                self.bytes_of.pop(id, None)
            self._data = proto.SerializeToString()
            self._processor = self._load(self._data)

    def cut_at_added_tokens(self, also_whole: bool = False) -> None:
        """From now on texts come in parts; with `also_whole`, the first part and a whole text get a space in front as
        the other parts do, not as in SentencePiece. UserError where the model itself normalizes texts."""
        if self._normalizes:
            raise UserError(f"{self._source}: added tokens that are text are not supported beside its normalization")
        if (self.prefix.where != "never") != self.adds_prefix:
            raise UserError(
                f"{self._source}: whether a text gets a space in front is said differently there than in "
                "tokenizer.json or tokenizer_config.json"
            )
        self._also_whole = also_whole
        plain = ModelProto.FromString(self._data)
        plain.normalizer_spec.add_dummy_prefix = False
        self._plain = self._load(plain.SerializeToString())

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

    proto = ModelProto()
    for token in sorted(vocab, key=vocab.__getitem__):
        is_byte, is_unknown = token in _BYTES, token == unknown
        kind = Piece.BYTE if is_byte else Piece.UNKNOWN if is_unknown else Piece.CONTROL
        piece = token.encode(errors="replace").decode()
        proto.pieces.add(piece=piece, score=-1.0 - rank.get(token, 0), type=Piece.NORMAL if token in kept else kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback = TrainerSpec.BPE, True
    trainer.unk_id, trainer.unk_piece = vocab[unknown], unknown
    trainer.bos_id = trainer.eos_id = trainer.pad_id = -1
    normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = prefix.where != "never", False
    model = SentencePieceModel(proto.SerializeToString(), source)
    model.prefix = prefix
    model.cut_at_added_tokens(also_whole=True)

    # No text becomes the others, but a model might say them.
    model.control = {}
    model.bytes_of.pop(vocab[unknown])
    said = {token: id for token, id in vocab.items() if token not in model.text and token not in added}
    model.bytes_of |= {id: token.replace(SPACE, " ").encode(errors="replace") for token, id in said.items()}
    spaced = (id for id, spelled in model.bytes_of.items() if spelled[:1] == b" ")
    model.starts_with_space = frozenset(spaced if prefix.where != "never" else ())

    # Would the kept ones, after all, arrive at a pair that makes one of the others?
    listed = {(vocab[x], vocab[y]) for x, y in merges}
    for token in rank.keys() - kept:
        end = tuple(model.encode_plain(token))
        if len(end) == 2 and end in listed:
            raise UserError(f"{source}: SentencePiece cannot reproduce the merge of tokens {end[0]} and {end[1]}")
    return model
