"""Text to ids and back."""

import codecs
from collections.abc import Iterable, Iterator

import numpy as np

from elo.common.errors import UserError
from elo.text.added_tokens import AddedToken, AddedTokenSplitter
from elo.text.byte_level_bpe import ByteLevelBPE
from elo.text.sentencepiece_bpe import SentencePieceModel
from elo.text.tokenizer_files import TokenizerFiles, token_text

# What pretraining puts after a document. Not `eos_token`: in an instruct checkpoint that ends a turn of a chat.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>")


class Tokenizer:
    """Text to ids and back; made by `tokenizer.load_tokenizer`. Can be pickled.

    vocab_size: 1 + the largest id. special_tokens: text -> id of all added and control tokens. bytes_of: what the id of
    any other token decodes to. bos_id and eos_id: what the family puts before (None: nothing) and after a document in
    pretraining. fingerprint: SHA-256 (hex) of the files.
    """

    embeddings: int | None = None  # rows of the model's embedding, where that is known

    def __init__(
        self,
        model: ByteLevelBPE | SentencePieceModel,
        bytes_of: dict[int, bytes],
        added: dict[str, AddedToken],
        files: TokenizerFiles,
        bos: str | None,
        eos: str | None = None,
    ) -> None:
        """`bytes_of`: what the ids of ordinary tokens decode to. `files`: those that all of it is from. `bos`: what
        they ask to put before a text; `eos`: the end that the model itself names."""
        self.model = model
        self.added = added
        self.special_tokens = {text: token.id for text, token in added.items()}
        self.vocab_size = 1 + max([*bytes_of, *self.special_tokens.values()])
        as_text = {text: token for text, token in added.items() if not token.special}
        self._splitter = AddedTokenSplitter(added if as_text else {}, model.normalize, files.directory)
        shown = {
            token.id: model.shown(model.normalize(text) if token.normalized else text).encode(errors="replace")
            for text, token in as_text.items()
        }
        self.bytes_of = bytes_of | shown
        self._starts_with_space = model.starts_with_space
        if model.starts_with_space:
            self._starts_with_space |= {id for id, spelled in shown.items() if spelled[:1] == b" "}

        candidates = [eos, *END_OF_DOCUMENT, token_text(files.config.get("eos_token"))]
        eos = next((text for text in candidates if text in added), None)
        if eos is None:
            raise UserError(
                f"{files.directory}: no token ends a document: none of {', '.join(END_OF_DOCUMENT)} and no eos_token "
                "of tokenizer_config.json is among the added tokens"
            )
        if bos is not None and bos not in added:
            raise UserError(f"{files.directory}: the BOS token {bos!r:.100} is not among the added tokens")
        self.bos_id, self.eos_id = None if bos is None else added[bos].id, added[eos].id
        self.fingerprint = files.fingerprint()

    def special_id(self, text: str) -> int:
        """The id of an added token that code puts among those of texts. UserError if the model has no row for it."""
        id = self.special_tokens[text]
        if self.embeddings is not None and id >= self.embeddings:
            raise UserError(
                f"the special token {text} has the id {id}, but the model only {self.embeddings} rows of embeddings; "
                "give it more first (in transformers: resize_token_embeddings)"
            )
        return id

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never one of a special token. UserError for lone surrogates: they are not Unicode text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts, in this thread."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """The same as arrays of uint32: 4 bytes a token, and no list of Python's integers on the way from tiktoken."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"cannot tokenize a text with the lone surrogate {text[error.start]!r} (character {error.start})"
                ) from error
        return [np.concatenate([np.array([], np.uint32), *self._parts(text)]) for text in texts]

    def _parts(self, text: str) -> Iterator[np.ndarray]:
        for number, part in enumerate(self._splitter.split(text)):
            is_token = isinstance(part, int)
            yield np.array([part], np.uint32) if is_token else self.model.encode_part(part, first=number == 0)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; the inverse of `encode`. Special and unknown ids give nothing, broken UTF-8 U+FFFD."""
        stream = self.stream_decoder()
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder that takes one id at a time."""
        return StreamDecoder(self.bytes_of, self._starts_with_space)


class StreamDecoder:
    """`push` returns the characters that an id completes, `flush` what is left at the end; together: `decode`.

    `starts_with_space`: SentencePiece puts a space before a text, so one is taken off these if they come first.
    """

    def __init__(self, bytes_of: dict[int, bytes], starts_with_space: frozenset[int]) -> None:
        self._bytes_of = bytes_of
        self._starts_with_space = starts_with_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True

    def push(self, id: int) -> str:
        data = self._bytes_of.get(int(id), b"")
        if self._at_start and data:
            self._at_start = False
            if int(id) in self._starts_with_space:
                data = data[1:]
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)
