"""A model's dimensions, read from `config.json`.

Anything that would change the mathematics and is not implemented is refused by name: a checkpoint gives either the
logits of transformers or an error.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import Fields, read_json_object, shown
from elo.common.files import is_file
from elo.common.terminal import note
from elo.model.architectures import ARCHITECTURES, HARMLESS, NEUTRAL, Architecture, Windows
from elo.model.not_a_model import instead_of_a_model
from elo.model.rotary import RopeConfig, read_rope


@dataclass(frozen=True)
class ModelConfig:
    """One decoder, or a slice of one."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool  # of the projections to queries, keys and values
    o_bias: bool  # of attention's output projection
    sliding_windows: Windows
    rope: RopeConfig
    json: dict[str, Any] = field(compare=False, repr=False)  # config.json as read; saving starts from it

    @property
    def context(self) -> int:
        """The longest sequence in tokens; dynamic rotary embeddings extend the positions by their factor."""
        stretch = self.rope.factor if self.rope.type == "dynamic" else 1
        return int(self.max_position_embeddings * stretch)

    @property
    def padding_idx(self) -> int | None:
        """The token whose row of a trained embedding learns nothing from where it is read, as in transformers."""
        token = self.json.get("pad_token_id")
        return token if type(token) is int and -self.vocab_size <= token < self.vocab_size else None

    def check_seq_len(self, seq_len: int) -> None:
        """Raises UserError for a --seq-len beyond `context`."""
        if seq_len > self.context:
            raise UserError(f"--seq-len {seq_len}: the model has {self.context} positions")

    @staticmethod
    def load(path: str | Path) -> "ModelConfig":
        """Read a checkpoint's config.json, or that of a directory. Raises UserError naming the file and the field.

        Unknown fields are named on stderr.
        """
        path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        if not is_file(path):
            hint = instead_of_a_model(path.parent) or "; a checkpoint is a Hugging Face directory with a config.json"
            raise UserError(f"{path}: not found{hint}")
        fields = read_json_object(path)
        config = ModelConfig.from_json(fields, str(path))
        unknown = fields.keys() - HARMLESS - NEUTRAL.keys() - config.architecture.defaults.keys()
        if unknown:
            tell_once(f"{path}: {', '.join(sorted(unknown))}: not known here, and taken to change no logits")
        return config

    @staticmethod
    def from_json(fields: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Both dialects: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5)."""
        architecture = _architecture(fields, where)
        for name, neutral in NEUTRAL.items():
            if name in fields and fields[name] not in neutral and name not in architecture.defaults:
                raise UserError(f"{where}: {name} = {shown(fields[name])} is not implemented for {architecture.name}")

        read = Fields({**architecture.defaults, **fields}, where)
        bias = read.boolean("attention_bias", default=False)
        # The maxima are far beyond any model, but such that nobody waits for a model of a million layers to be built.
        hidden_size = read.integer("hidden_size", maximum=2**20)
        heads = read.integer("num_attention_heads", maximum=2**12)
        key_value_heads = read.integer("num_key_value_heads", default=heads, maximum=2**12)
        layers = read.integer("num_hidden_layers", maximum=2**10)
        if heads % key_value_heads:
            raise UserError(
                f"{where}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {key_value_heads}"
            )
        head_dim = read.integer("head_dim", default=hidden_size // heads, maximum=2**16)
        if not read.given("head_dim") and hidden_size % heads:
            raise UserError(f"{where}: hidden_size = {hidden_size} is not a multiple of num_attention_heads = {heads}")
        if head_dim % 2:
            raise UserError(f"{where}: head_dim = {head_dim} is odd; rotary embeddings turn pairs of dimensions")
        max_position_embeddings = read.integer("max_position_embeddings")
        return ModelConfig(
            architecture=architecture,
            vocab_size=read.integer("vocab_size", maximum=2**24),
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size", maximum=2**22),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=read.number("rms_norm_eps"),
            tie_word_embeddings=read.boolean("tie_word_embeddings", default=False),
            qkv_bias=architecture.qkv_bias or bias,
            o_bias=bias,
            sliding_windows=architecture.windows(read, layers),
            rope=read_rope(read, max_position_embeddings, head_dim),
            json=fields,
        )


tell_once = cache(note)  # once, however often a checkpoint is opened


def _architecture(fields: dict[str, Any], where: str) -> Architecture:
    model_type, named = fields.get("model_type"), fields.get("architectures")
    if named is None:
        found, matches = model_type, [known for known in ARCHITECTURES if known.model_type == model_type]
    else:
        found, matches = named, [known for known in ARCHITECTURES if named == [known.name]]
    if not matches:
        names = ", ".join(known.name for known in ARCHITECTURES)
        raise UserError(f"{where}: architecture {shown(found)} is not implemented; implemented are {names}")
    (architecture,) = matches
    if model_type not in (None, architecture.model_type):
        raise UserError(
            f"{where}: model_type {shown(model_type)} does not belong to the architecture {architecture.name}"
        )
    return architecture
