"""The tokenizer of a Hugging Face checkpoint directory, on tiktoken and sentencepiece.

    tokenizer = load_tokenizer("models/Llama-3.1-8B")
    ids = tokenizer.encode("Text.")    # [1199, 13]

Text never becomes a special token: `encode("<|im_end|>")` are the ids of these ten characters. Special tokens are added
by code, with the ids in `special_tokens`. Added tokens that are not special are text like any other. So the ids are
those of Hugging Face's tokenizer with `encode_special_tokens`, of `sp.encode` in SentencePiece, and of
`encode_ordinary` in tiktoken.
"""

from itertools import count
from pathlib import Path

from elo.common.errors import UserError
from elo.common.fields import Fields
from elo.text.added_tokens import AddedToken, read_added_tokens
from elo.text.byte_level_bpe import (
    BYTE_ALPHABET,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    ByteLevelBPE,
    is_foreign,
    read_tiktoken,
    token_bytes,
)
from elo.text.ids import Tokenizer
from elo.text.merges import mergeable_ranks
from elo.text.sentencepiece_bpe import SentencePieceModel, sentencepiece_of
from elo.text.tokenizer_files import TokenizerFiles, read_merges_txt, read_pair, read_vocabulary, token_text
from elo.text.tokenizer_json import (
    Prefix,
    check_bpe,
    check_decoder,
    has_byte_level,
    is_nfc,
    read_pattern,
    read_prefix,
    read_template_bos,
)

# SentencePiece, or Llama 3's lines of `base64 rank`; the content tells which.
MODEL_FILES = ("tokenizer.model", "tokenizer.model.v3", "original/tokenizer.model")
# Classes of transformers that go by tokenizer.json alone.
BY_TOKENIZER_JSON = (None, "PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(directory: str | Path, embeddings: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint directory. UserError naming the file when it cannot be represented exactly.

    With the number of the model's `embeddings` also if it makes tokens for which there is none.

    The first of these that is there:
    1. tokenizer.json, if it is a byte-level BPE (Llama 3, Qwen2, SmolLM2);
    2. tokenizer.model, tokenizer.model.v3 or original/tokenizer.model: SentencePiece (Llama 2, Mistral, whose
       tokenizer.json restates it) or Llama 3's own format;
    3. tokenizer.json, if it is a BPE with byte fallback (Llama 2, Mistral as transformers 5 saves them);
    4. vocab.json with merges.txt, of a tokenizer_class that tells how to cut text (Qwen2, GPT-2).

    Added tokens come from tokenizer.json, tokenizer_config.json and added_tokens.json together.
    """
    files = TokenizerFiles(Path(directory))
    if has_byte_level(files.fields("tokenizer.json")):
        tokenizer = _from_tokenizer_json(files)
    elif name := next((name for name in MODEL_FILES if files.read(name) is not None), None):
        # A SentencePiece model starts with a protobuf tag that no line of base64 starts with.
        kind = _from_sentencepiece if files.read(name)[:1] == b"\n" else _from_llama3_model
        tokenizer = kind(files, name)
    elif files.read("tokenizer.json") is not None:
        tokenizer = _from_sentencepiece_json(files)
    elif files.read("vocab.json") is not None and files.read("merges.txt") is not None:
        tokenizer = _from_vocab_json(files)
    else:
        raise UserError(
            f"{directory}: no tokenizer here; looked for tokenizer.json, {', '.join(MODEL_FILES)}, and vocab.json with "
            "merges.txt"
        )
    tokenizer.embeddings = embeddings
    if embeddings is not None:
        # Fine-tunes may add a padding token without a row for it; it is never made from text.
        beyond = sum(token.special and token.id >= embeddings for token in tokenizer.added.values())
        if tokenizer.vocab_size - beyond > embeddings:
            raise UserError(
                f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {embeddings}; "
                "they do not belong together"
            )
        for text, id in tokenizer.special_tokens.items():
            if id in (tokenizer.bos_id, tokenizer.eos_id):
                tokenizer.special_id(text)
    return tokenizer


# ---- Byte-level BPE: Llama 3, Qwen2, SmolLM2


def _read_bpe(content: Fields) -> tuple[Fields, dict[str, int], list[tuple[str, str]]]:
    """The model of a tokenizer.json, its vocabulary and its merges."""
    model = content.object("model", {})
    check_bpe(model)
    vocab = read_vocabulary(model.object("vocab", {}).fields, model.where)
    return model, vocab, [read_pair(merge, model.where) for merge in model.array("merges", [])]


def _from_tokenizer_json(files: TokenizerFiles) -> Tokenizer:
    source, content = files.path("tokenizer.json"), files.fields("tokenizer.json")
    model, vocab, merges = _read_bpe(content)
    check_decoder(content, None)
    ignore_merges = model.boolean("ignore_merges", False)
    nfc, pattern = is_nfc(content), read_pattern(content)
    _agreed(files, Prefix("never"))
    beside = [option for option in ("unk_token", "byte_fallback", "ignore_merges") if model.fields.get(option)]
    beside += ["a Split pattern that no known family has"] if is_foreign(pattern) else []
    if beside and (missing := BYTE_ALPHABET.keys() - vocab.keys()):
        raise UserError(f"{source}: {len(missing)} of 256 bytes have no token, which is not supported with {beside[0]}")
    return _byte_level(files, source, vocab, merges, pattern, nfc, None, ignore_merges)


def _from_vocab_json(files: TokenizerFiles) -> Tokenizer:
    source = files.path("vocab.json")
    # These two files do not tell how a text is cut.
    kind = files.config.get("tokenizer_class") or files.json("config.json").get("model_type")
    match str(kind).lower().removesuffix("fast").removesuffix("tokenizer"):
        case "qwen2":
            pattern, nfc, bos = QWEN2_PATTERN, True, None
        case "gpt2":
            pattern, nfc, bos = GPT2_PATTERN, False, "<|endoftext|>"
        case _:
            raise UserError(
                f"{source}: without a tokenizer.json, the tokenizer_class in tokenizer_config.json must be "
                f"Qwen2Tokenizer or GPT2Tokenizer; it is {kind!r:.100}"
            )
    if files.fields("tokenizer_config.json").boolean("add_prefix_space", False):
        raise UserError(f"{files.path('tokenizer_config.json')}: add_prefix_space is not supported with vocab.json")
    vocab = read_vocabulary(files.json("vocab.json"), source)
    merges = read_merges_txt(files.read("merges.txt") or b"", files.path("merges.txt"))
    bos = token_text(files.config.get("bos_token", bos))
    return _byte_level(files, files.path("merges.txt"), vocab, merges, pattern, nfc, bos)


def _byte_level(
    files: TokenizerFiles,
    source: Path,
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    pattern: str,
    nfc: bool,
    bos: str | None,
    ignore_merges: bool = False,
) -> Tokenizer:
    added = read_added_tokens(files, vocab)
    ranks = mergeable_ranks(vocab, merges, source, ignore_merges, not_text=added)
    bytes_of = {id: spelled for spelled, id in ranks.items()}
    for token, id in vocab.items():
        if id not in bytes_of and token not in added:
            # No text becomes this token, but a model might say it.
            bytes_of[id] = token_bytes(token) or token.encode(errors="replace")
    bpe = ByteLevelBPE(ranks, pattern, source, nfc)
    return Tokenizer(bpe, bytes_of, added, files, _put_before_texts(files, added, bos, unless_told=False))


def _from_llama3_model(files: TokenizerFiles, name: str) -> Tokenizer:
    ranks = read_tiktoken(files.read(name) or b"", files.path(name))
    added = read_added_tokens(files, {}) or _llama3_added_tokens(len(ranks))
    bpe = ByteLevelBPE(ranks, LLAMA3_PATTERN, files.path(name))
    bos = _put_before_texts(files, added, "<|begin_of_text|>")
    return Tokenizer(bpe, {id: spelled for spelled, id in ranks.items()}, added, files, bos)


def _llama3_added_tokens(first: int) -> dict[str, AddedToken]:
    """The 256 tokens that Llama 3.1 counts on from the last of its tokenizer.model, which does not name them."""
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
    named |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    reserved = count()
    names = (named.get(index) or f"reserved_special_token_{next(reserved)}" for index in range(256))
    return {f"<|{name}|>": AddedToken(first + index) for index, name in enumerate(names)}


# ---- SentencePiece: Llama 2, Mistral


def _from_sentencepiece(files: TokenizerFiles, name: str) -> Tokenizer:
    model = SentencePieceModel(files.read(name) or b"", files.path(name))
    added = read_added_tokens(files, model.text)
    _check_restated(model, added, files, files.path(name))
    model.forbid(token.id for token in added.values() if token.special)
    # A fine-tune may have renamed a control token ([control_8] -> <|im_start|>): then only the new name counts.
    renamed = {token.id for token in added.values()}
    added |= {piece: AddedToken(id, special=True) for piece, id in model.control.items() if id not in renamed}

    model.prefix = _prefix(files, model)
    if not all(token.special for token in added.values()):
        model.cut_at_added_tokens()
    return Tokenizer(model, model.bytes_of, added, files, _put_before_texts(files, added, model.bos), model.eos)


def _prefix(files: TokenizerFiles, model: SentencePieceModel) -> Prefix:
    if files.read("tokenizer.json") is not None:
        return _agreed(files, read_prefix(files.fields("tokenizer.json"), uncut=False))
    config = files.fields("tokenizer_config.json")
    if not config.boolean("add_prefix_space", model.adds_prefix):
        return Prefix("never")
    return Prefix("prepend" if config.boolean("legacy", True) else "first")


def _agreed(files: TokenizerFiles, prefix: Prefix) -> Prefix:
    """The prefix of tokenizer.json. UserError where the tokenizer_class, as some do, goes by another one."""
    says = files.fields("tokenizer_config.json").boolean("add_prefix_space", prefix.where != "never")
    if says != (prefix.where != "never") and files.config.get("tokenizer_class") not in BY_TOKENIZER_JSON:
        raise UserError(
            f"{files.path('tokenizer_config.json')}: add_prefix_space is {str(says).lower()}, but tokenizer.json says "
            "otherwise of a space in front of a text; make them agree"
        )
    return prefix


def _from_sentencepiece_json(files: TokenizerFiles) -> Tokenizer:
    source, content = files.path("tokenizer.json"), files.fields("tokenizer.json")
    try:
        model, vocab, merges = _read_bpe(content)
        unknown = model.fields.get("unk_token") or token_text(files.config.get("unk_token")) or "<unk>"
        added = read_added_tokens(files, vocab)
        if not model.fields.get("byte_fallback") or model.fields.get("ignore_merges"):
            raise UserError(f"{source}: neither byte-level, nor with byte_fallback and without ignore_merges")
        prefix = _agreed(files, read_prefix(content))
        check_decoder(content, prefix)
        sentencepiece = sentencepiece_of(vocab, merges, unknown, prefix, added, source)
    except UserError as error:
        raise UserError(
            f"{error}. If it restates a SentencePiece model, put that, tokenizer.model, next to it"
        ) from error
    return Tokenizer(sentencepiece, sentencepiece.bytes_of, added, files, _put_before_texts(files, added, None))


def _check_restated(
    model: SentencePieceModel, added: dict[str, AddedToken], files: TokenizerFiles, source: Path
) -> None:
    """UserError when tokenizer.json has another vocabulary, as when only that file was extended."""
    path = files.path("tokenizer.json")
    restated = files.fields("tokenizer.json").object("model", {})
    if isinstance(restated.fields.get("vocab"), list):  # Unigram: [piece, score] in the order of the ids
        pieces = enumerate(restated.array("vocab"))
        vocab = {str(entry[0]): id for id, entry in pieces if isinstance(entry, list) and entry}
    else:
        vocab = read_vocabulary(restated.object("vocab", {}).fields, path)
    piece_of = {id: piece for piece, id in model.text.items()}
    for token, id in vocab.items():
        extends = id >= model.size and token not in added
        if extends or model.text.get(token, id) != id or piece_of.get(id, token) != token:
            raise UserError(
                f"{path}: its token {id}, {token!r}, is not in {source}: one of the two is of another model"
            )


def _put_before_texts(
    files: TokenizerFiles, added: dict[str, AddedToken], bos: str | None, unless_told: bool = True
) -> str | None:
    """The BOS, if one is put before a text: tokenizer.json alone says so where it is there, as in transformers 5, else
    add_bos_token, or `unless_told`, of the family's `bos`."""
    if files.read("tokenizer.json") is not None:
        return read_template_bos(files.fields("tokenizer.json"), {text: token.id for text, token in added.items()})
    return bos if files.fields("tokenizer_config.json").boolean("add_bos_token", unless_told) else None
