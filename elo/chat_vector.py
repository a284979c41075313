"""The chat vector (arXiv 2310.04799): add what instruction tuning changed in one model to another of the same shape.

theta + scale * (theta_instruct - theta_base)
"""

import math
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from elo.common.errors import UserError
from elo.model.checkpoint import EMBEDDING, HEAD, Checkpoint, are_equal
from elo.model.config import ModelConfig
from elo.slicing import LAYER_NAME, parse_layers
from elo.text.tokenizer import MODEL_FILES, load_tokenizer

# Elements computed at a time, so that fp32 copies of a whole tensor are never made.
BLOCK = 2**20

# The ids that end a text or fill a batch, which instruction tuning may have changed.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields of ModelConfig in which the models may differ: they change no hidden state.
MAY_DIFFER = ("vocab_size", "max_position_embeddings", "tie_word_embeddings")


@dataclass(frozen=True)
class ChatVector:
    """scale * (theta_instruct - theta_base)"""

    instruct: Checkpoint
    base: Checkpoint
    scale: float

    def rows(self, name: str) -> int:
        """How many rows of a tensor the vector has: as many as both models have."""
        return min(self.instruct.shape(name)[0], self.base.shape(name)[0])

    def added_to(self, theta: Tensor, name: str, start: int) -> Tensor:
        """theta, a tensor's rows from `start` on, plus the vector, in fp32; rows that it lacks stay as they are."""
        stop = min(start + len(theta), self.rows(name))
        if stop <= start:
            return theta
        instruct = self.instruct.rows(name, start, stop).float()
        base = self.base.rows(name, start, stop).float()
        return torch.cat([add(theta[: stop - start], instruct, base, self.scale), theta[stop - start :]])


def add(theta: Tensor, instruct: Tensor, base: Tensor, scale: float) -> Tensor:
    """theta + scale * (instruct - base), all fp32; with scale 1 exactly `instruct` wherever theta equals base.

    The sum alone would give `instruct` only up to rounding there: fp32 cannot hold the difference of 1 and 2^-30, which
    are bf16 values, and base + (instruct - base) turns -0 into 0.
    """
    result = theta + scale * (instruct - base)
    return torch.where(theta == base, instruct, result) if scale == 1 else result


@dataclass(frozen=True)
class Merge:
    """A model, the chat vectors to add, and the names of the tensors to which they are added."""

    model: Checkpoint
    vectors: tuple[ChatVector, ...]
    moved: Collection[str]

    @property
    def others(self) -> list[Checkpoint]:
        return [other for vector in self.vectors for other in (vector.base, vector.instruct)]

    def tensor(self, name: str) -> Tensor:
        """A tensor of the result, computed in fp32 and rounded once to the dtype in which the model stores it.

        It needs little more memory than the result. Raises UserError if a value is too large for the dtype.
        """
        if name not in self.moved:
            return self.model.tensor(name)
        shape, dtype = self.model.shape(name), self.model.dtype(name)
        result = torch.empty(shape, dtype=dtype)
        rows = max(1, BLOCK * shape[0] // math.prod(shape))
        for start in range(0, shape[0], rows):
            theta = self.model.rows(name, start, start + rows).float()
            for vector in self.vectors:
                theta = vector.added_to(theta, name, start)
            result[start : start + rows] = theta
            lowest, highest = result[start : start + rows].aminmax()  # NaN if there is one
            if not (math.isfinite(lowest) and math.isfinite(highest)):
                raise UserError(f"{name}: the sum has values that are not finite in {dtype}; is a --scale too large?")
        return result

    def config(self) -> ModelConfig:
        """The model's configuration, but with the first instruct model's token ids, one of which ends its answers."""
        instruct = self.vectors[0].instruct.config.json
        fields = {name: value for name, value in self.model.config.json.items() if name not in TOKEN_IDS}
        # An id that the instruct model does not give stays out of here too, and has the architecture's default.
        return ModelConfig.from_json(fields | {name: instruct[name] for name in TOKEN_IDS if name in instruct})


def moved_tensors(names: list[str], layers: tuple[int, ...] | None, skip_embeddings: bool) -> list[str]:
    """The tensors to add vectors to: those of `layers` (numbered from 1), else all, or all but embedding and head."""
    if layers is None:
        return [name for name in names if not (skip_embeddings and name in (EMBEDDING, HEAD))]
    matches = {name: LAYER_NAME.fullmatch(name) for name in names}
    return [name for name, match in matches.items() if match and int(match[1]) + 1 in layers]


def parse_ranges(text: str, num_hidden_layers: int) -> tuple[int, ...]:
    """`parse_layers` with ranges: 1-4,30."""
    layers = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)-(\d+)\s*", part)
        numbers = parse_layers(f"{match[1]},{match[2]}" if match else part, num_hidden_layers)
        layers += range(numbers[0], numbers[-1] + 1)
    return parse_layers(",".join(map(str, layers)), num_hidden_layers)


def check(merge: Merge, shared_vocabulary_rows: bool) -> tuple[Merge, list[str]]:
    """The merge, which moves nothing where no vector has anything to add, and warnings about what may not be intended.

    Raises UserError if the models do not fit together.
    """
    for other in merge.others:
        _check_fits(merge, other, shared_vocabulary_rows)
    warnings = [*_other_mathematics(merge), *_check_tokenizer(merge)]
    is_anything_added = False
    for vector in merge.vectors:
        names = f"{vector.instruct.directory} and {vector.base.directory}"
        if not vector.scale:
            warnings.append(f"--scale 0: the chat vector between {names} is not added")
        elif all(are_equal(vector.instruct, name, vector.base, name) for name in merge.moved):
            warnings.append(f"{names} have the same weights: between them there is no chat vector, and none is added")
        else:
            is_anything_added = True
    return merge if is_anything_added else replace(merge, moved=()), list(dict.fromkeys(warnings))


def _check_fits(merge: Merge, other: Checkpoint, shared_vocabulary_rows: bool) -> None:
    ours = merge.model
    _check_same(ours, other, "architecture", "num_hidden_layers", "qkv_bias", "o_bias")  # which tensors there are
    if {EMBEDDING, HEAD} & set(merge.moved):
        hint = "; --skip-embeddings leaves embedding and head as they are"
        _check_same(ours, other, "tie_word_embeddings", hint=hint)
    for name in merge.moved:
        here, there = ours.shape(name), other.shape(name)
        vocabulary = name in (EMBEDDING, HEAD) and here[1:] == there[1:]
        if here != there and vocabulary and not shared_vocabulary_rows:
            raise UserError(
                f"the vocabulary of {other.directory} has {there[0]} rows, that of {ours.directory} {here[0]}; "
                "--shared-vocabulary-rows adds the vector to the rows that all have, --skip-embeddings to none"
            )
        if here != there and not vocabulary:
            raise UserError(f"{name} has shape {there} in {other.directory}, but {here} in {ours.directory}")
    # Matrices of the same shape may still be divided into heads differently.
    _check_same(ours, other, "num_attention_heads", "num_key_value_heads", "head_dim")


def _check_same(ours: Checkpoint, other: Checkpoint, *names: str, hint: str = "") -> None:
    for name in names:
        here, there = getattr(ours.config, name), getattr(other.config, name)
        if here != there:
            raise UserError(f"{name} is {there} in {other.directory}, but {here} in {ours.directory}{hint}")


def _other_mathematics(merge: Merge) -> Iterator[str]:
    ours = merge.model
    for other in merge.others:
        for name in (field.name for field in fields(ModelConfig) if field.compare and field.name not in MAY_DIFFER):
            if getattr(other.config, name) != getattr(ours.config, name):
                yield f"{name} differs between {ours.directory}, whose the result has, and {other.directory}"


def _check_tokenizer(merge: Merge) -> Iterator[str]:
    """The result gets the first instruct model's tokenizer. Raises UserError if that has tokens without a row here."""
    instruct, ours = merge.vectors[0].instruct, merge.model
    here, there = ours.config.vocab_size, instruct.config.vocab_size
    if not any((instruct.directory / name).is_file() for name in ("tokenizer.json", "vocab.json", *MODEL_FILES)):
        yield f"{instruct.directory} has no tokenizer, so the result has none"
    elif here > there:
        yield (
            f"the result has the tokenizer of {instruct.directory}, which knows nothing of the tokens from {there} on "
            f"that {ours.directory} has in addition"
        )
    elif here < there:
        try:
            size = load_tokenizer(instruct.directory).vocab_size
        except UserError as error:
            yield f"whether all tokens have one of the {here} rows is not known: {error}"
            return
        if size > here:
            raise UserError(
                f"the tokenizer of {instruct.directory} has {size} tokens, but {ours.directory} has only {here} rows; "
                "give it more rows first (in transformers: resize_token_embeddings)"
            )
    with suppress(UserError):  # which another command finds, or there is none
        known, new = (load_tokenizer(checkpoint.directory).bytes_of for checkpoint in (ours, instruct))
        others = [id for id in known if new.get(id, known[id]) != known[id]]
        if others:
            yield (
                f"the result has the tokenizer of {instruct.directory}, in which {len(others):,} ids, such as "
                f"{others[0]}, are other tokens than in that of {ours.directory}"
            )
