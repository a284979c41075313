"""The parts of a tokenizer.json around its model: normalizer, pre_tokenizer, post_processor, decoder.

What is not implemented exactly is a UserError. `truncation` and `padding` are left alone: they are how somebody called
the tokenizer before it was saved, and transformers does not apply them either.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.text.byte_level_bpe import GPT2_PATTERN, split_pattern
from elo.text.tokenizer_files import field, token_text

MOST_STEPS = 64  # of a normalizer or pre_tokenizer

SPACE = "\u2581"  # SentencePiece's stand-in for a space


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


@dataclass(frozen=True)
class Prefix:
    """Where SentencePiece's space goes in front of a text between added tokens.

    `where`: "prepend", before every one; "always", before every one that does not begin with a space; "first", the
    same, but only if nothing is before it; "never". `by_normalizer`: that happens before added tokens that are
    `normalized` are looked for.
    """

    where: str
    by_normalizer: bool = False


def read_prefix(content: dict[str, Any], source: Path, uncut: bool = True) -> Prefix:
    """The prefix of a tokenizer.json that writes spaces as ▁, as transformers makes them of Llama's and Mistral's
    tokenizer.model. UserError for any other, with `uncut` also where texts are cut at spaces."""
    normalizers = _steps(content.get("normalizer"), "normalizers")
    pre_tokenizers = _steps(content.get("pre_tokenizer"), "pretokenizers")
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
        f"{source}: the normalizer {content.get('normalizer')!r:.200} with the pre_tokenizer "
        f"{content.get('pre_tokenizer')!r:.200} is not implemented, only those of Llama and Mistral: Prepend and "
        "Replace, or Metaspace without split"
    )


def check_decoder(content: dict[str, Any], source: Path, prefix: Prefix | None) -> None:
    """UserError unless the decoder undoes what the rest does: with a `prefix` that of Llama, else ByteLevel."""
    steps = _steps(content.get("decoder"), "decoders")
    known = [[], [{"type": "ByteLevel"}]]
    if prefix is not None:
        known = [[{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]]
        known[0] += [{"type": "Fuse"}]
        if prefix.where != "never":
            known[0] += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    else:
        steps = [{"type": step.get("type")} for step in steps]  # the others are about offsets
    if steps not in known:
        raise UserError(f"{source}: the decoder {content.get('decoder')!r:.300} is not implemented")


def check_bpe(model: dict[str, Any], source: Path) -> None:
    """UserError for the options of a BPE model that change which tokens a text becomes, but are not implemented."""
    for option, supported in (
        ("type", ("BPE", None)),
        ("dropout", (None, 0)),
        ("continuing_subword_prefix", (None, "")),
        ("end_of_word_suffix", (None, "")),
    ):
        if model.get(option) not in supported:
            raise UserError(f"{source}: {option} = {model[option]!r:.100} in the model is not supported")
