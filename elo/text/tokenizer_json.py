"""The parts of a tokenizer.json around its model: normalizer, pre_tokenizer, post_processor, decoder.

What is not implemented exactly is a UserError. `truncation` and `padding` are left alone: they are how somebody called
the tokenizer before it was saved, and transformers does not apply them either.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import Fields
from elo.text.byte_level_bpe import GPT2_PATTERN, split_pattern
from elo.text.tokenizer_files import token_text

# What a tokenizer.json has around its model, and what the steps are called if one is a Sequence.
PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
PARTS |= {"decoder": "decoders"}

SPACE = "\u2581"  # SentencePiece's stand-in for a space


def has_byte_level(content: Fields) -> bool:
    """Whether its pre-tokenizer writes texts in the byte alphabet."""
    return any(step.get("type") == "ByteLevel" for step in _steps(content, "pre_tokenizer"))


def _steps(content: Fields, part: str) -> list[dict[str, Any]]:
    """The steps of one of `PARTS`, which may be null, one, or a Sequence (of ...)."""

    def flat(step: Any) -> list[dict[str, Any]]:
        if not isinstance(step, dict):
            return [{"type": step}]  # for the refusal
        if step.get("type") == "Sequence" and isinstance(step.get(PARTS[part]), list):
            return [inner for one in step[PARTS[part]] for inner in flat(one)]
        return [step]

    whole = content.object(part, {}).fields
    return flat(whole) if whole else []


def is_nfc(content: Fields) -> bool:
    """Whether texts are normalized to NFC; UserError for any other normalizer."""
    steps = _steps(content, "normalizer")
    for step in steps:
        if step.get("type") != "NFC":
            raise UserError(f"{content.where}: the normalizer {step.get('type')!r:.60} is not supported, only NFC")
    return bool(steps)


def read_pattern(content: Fields) -> str:
    """The pre-tokenizer as one pattern of tiktoken; UserError where that cannot be."""
    steps, source = _steps(content, "pre_tokenizer"), content.where
    for step in steps:
        if step.get("type") not in ("Split", "Digits", "ByteLevel"):
            raise UserError(f"{source}: the pre_tokenizer {step.get('type')!r:.60} is not supported")
    kinds = [step["type"] for step in steps]
    byte_level = Fields(steps[-1] if kinds and kinds[-1] == "ByteLevel" else {}, source)
    # These two are true where they are not given.
    if byte_level.boolean("add_prefix_space", True):
        raise UserError(f"{source}: a ByteLevel pre_tokenizer with add_prefix_space is not supported")
    by_words = byte_level.boolean("use_regex", True)

    if kinds == ["ByteLevel"]:
        return GPT2_PATTERN if by_words else r"[\s\S]+"
    if kinds == ["Digits", "ByteLevel"]:
        digits = r"\p{N}" if Fields(steps[0], source).boolean("individual_digits", False) else r"\p{N}+"
        if not by_words:
            return rf"{digits}|[^\p{{N}}]+"
        # The text between digits is cut on its own, so that spaces before a digit are spaces at the end.
        return rf"'(?:[sdmt]|ll|ve|re)|{digits}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?![^\s\p{{N}}])|\s+"
    if kinds == ["Split", "ByteLevel"] and not by_words:
        split = steps[0]
        expression = Fields(split, source).object("pattern", {}).fields.get("Regex")
        if not isinstance(expression, str) or split.get("behavior") != "Isolated" or split.get("invert"):
            raise UserError(
                f"{source}: a Split pre_tokenizer is supported with a Regex, Isolated and not inverted only"
            )
        return split_pattern(expression, source)
    raise UserError(f"{source}: the pre_tokenizers {' + '.join(kinds)} are not supported in this combination")


def read_template_bos(content: Fields, ids: dict[str, int]) -> str | None:
    """The token that the post-processor puts in front of a text; `ids` of the added tokens."""
    front: list[str | None] = []
    for step in _steps(content, "post_processor"):
        if step.get("type") == "ByteLevel":  # It moves offsets only.
            continue
        if step.get("type") != "TemplateProcessing":
            raise UserError(f"{content.where}: the post_processor {step.get('type')!r:.60} is not supported")
        parts = Fields(step, content.where).array("single", [])
        tokens = takewhile(lambda part: isinstance(part, dict) and "SpecialToken" in part, parts)
        front += [token_text(token["SpecialToken"], key="id") for token in tokens]
        if len(front) > 1 or None in front:
            what = f"{len(front)} tokens" if len(front) > 1 else "None"
            raise UserError(f"{content.where}: its post_processor puts {what} before a text; one token is supported")
        means = Fields(step, content.where).object("special_tokens", {})
        for token in filter(means.given, front):
            if token in ids and means.object(token).array("ids", []) != [ids[token]]:
                raise UserError(f"{content.where}: its post_processor puts another id than that of {token!r:.60}")
    return front[0] if front else None


@dataclass(frozen=True)
class Prefix:
    """Where SentencePiece's space goes in front of a text between added tokens.

    `where`: "prepend", before every one; "always", before every one that does not begin with a space; "first", the
    same, but only if nothing is before it; "never". `by_normalizer`: that happens before added tokens that are
    `normalized` are looked for.
    """

    where: str
    by_normalizer: bool = False


def read_prefix(content: Fields, uncut: bool = True) -> Prefix:
    """The prefix of a tokenizer.json that writes spaces as ▁, as transformers makes them of Llama's and Mistral's
    tokenizer.model. UserError for any other, with `uncut` also where texts are cut at spaces."""
    normalizers, pre_tokenizers = _steps(content, "normalizer"), _steps(content, "pre_tokenizer")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if normalizers and normalizers[-1] == replace and not pre_tokenizers:
        if len(normalizers) == 1:
            return Prefix("never", by_normalizer=True)
        if normalizers[:-1] == [{"type": "Prepend", "prepend": SPACE}]:
            return Prefix("prepend", by_normalizer=True)
    if not normalizers and len(pre_tokenizers) == 1:
        step = pre_tokenizers[0]
        # Files of before `prepend_scheme` say `add_prefix_space`; `split` is true where it is not given.
        where = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
        is_metaspace = step.get("type") == "Metaspace" and step.get("replacement", SPACE) == SPACE
        if is_metaspace and where in ("always", "first", "never") and not (uncut and step.get("split", True)):
            return Prefix(where)
    raise UserError(
        f"{content.where}: the normalizer {content.fields.get('normalizer')!r:.200} with the pre_tokenizer "
        f"{content.fields.get('pre_tokenizer')!r:.200} is not implemented, only those of Llama and Mistral: Prepend "
        "and Replace, or Metaspace without split"
    )


def check_decoder(content: Fields, prefix: Prefix | None) -> None:
    """UserError unless the decoder undoes what the rest does: with a `prefix` that of Llama, else ByteLevel."""
    steps = _steps(content, "decoder")
    if prefix is None:
        is_known = [step.get("type") for step in steps] in ([], ["ByteLevel"])  # its options are about offsets
    else:
        known: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
        known += [{"type": "ByteFallback"}, {"type": "Fuse"}]
        if prefix.where != "never":
            known += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        is_known = steps == known
    if not is_known:
        raise UserError(f"{content.where}: the decoder {content.fields.get('decoder')!r:.300} is not implemented")


def check_bpe(model: Fields) -> None:
    """UserError for the options of a BPE model that change which tokens a text becomes, but are not implemented."""
    for option, supported in (
        ("type", ("BPE", None)),
        ("dropout", (None, 0)),
        ("continuing_subword_prefix", (None, "")),
        ("end_of_word_suffix", (None, "")),
    ):
        if model.fields.get(option) not in supported:
            raise UserError(f"{model.where}: {option} = {model.fields[option]!r:.100} is not supported")
