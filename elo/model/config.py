"""What Llama, Mistral and Qwen2 checkpoints differ in, read from `config.json`.

Whatever would change the mathematics and is not implemented here is refused by its name: a checkpoint either gives
the logits of transformers or an error.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import Fields, read_json_object, shown
from elo.common.files import is_file
from elo.model.rotary import RopeConfig, read_rope

# The defaults of transformers for fields that config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
    "MistralForCausalLM": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "Qwen2ForCausalLM": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# Fields by which relatives of the three architectures change the mathematics, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": (None, "silu", "swish"),
    "quantization_config": (None,),
    "compression_config": (None,),
    "attention_bias": (None, False),
    "attention_out_bias": (None, False),
    "mlp_bias": (None, False),
    "attention_dropout": (None, 0),
    "hidden_dropout": (None, 0),
    "resid_pdrop": (None, 0),
    "embd_pdrop": (None, 0),
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "no_rope_layers": (None, []),
    "position_embedding_type": (None, "rope"),
    "alibi": (None, False),
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "clip_qkv": (None,),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "use_parallel_residual": (None, False),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
}


@dataclass(frozen=True)
class ModelConfig:
    """One decoder: a Llama, Mistral or Qwen2 model, or a slice of one."""

    architecture: str  # "LlamaForCausalLM", ...
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
    qkv_bias: bool  # Qwen2
    sliding_windows: tuple[int | None, ...]  # a layer's window in tokens: Mistral v0.1, Qwen2 with use_sliding_window
    rope: RopeConfig
    json: dict[str, Any] = field(compare=False, repr=False)  # config.json as read; saving starts from it

    @staticmethod
    def load(directory: str | Path) -> "ModelConfig":
        """Read `directory`/config.json. Raises UserError naming the file and the field."""
        path = Path(directory) / "config.json"
        if not is_file(path):
            raise UserError(f"{path}: not found; a checkpoint is a Hugging Face directory with a config.json")
        return ModelConfig.from_json(read_json_object(path), str(path))

    @staticmethod
    def from_json(fields: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Both dialects: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5)."""
        architecture = _architecture(fields, where)
        for name, neutral in NEUTRAL.items():
            if name in fields and fields[name] not in neutral:
                raise UserError(f"{where}: {name} = {shown(fields[name])} is not implemented for {architecture}")

        read = Fields({**DEFAULTS[architecture], **fields}, where)
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
            rms_norm_eps=read.number("rms_norm_eps", default=1e-6),
            tie_word_embeddings=read.boolean("tie_word_embeddings", default=False),
            qkv_bias=architecture == "Qwen2ForCausalLM",
            sliding_windows=_sliding_windows(read, architecture, layers),
            rope=read_rope(read, max_position_embeddings),
            json=fields,
        )


def _architecture(fields: dict[str, Any], where: str) -> str:
    model_type, named = fields.get("model_type"), fields.get("architectures")
    by_type = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    architecture = by_type if named is None else named[0] if isinstance(named, list) and len(named) == 1 else None
    if not isinstance(architecture, str) or architecture not in DEFAULTS:
        found = shown(model_type if named is None else named)
        raise UserError(f"{where}: architecture {found} is not implemented; implemented are {', '.join(DEFAULTS)}")
    if model_type is not None and by_type != architecture:
        raise UserError(f"{where}: model_type {shown(model_type)} does not belong to the architecture {architecture}")
    return architecture


def _sliding_windows(read: Fields, architecture: str, layers: int) -> tuple[int | None, ...]:
    """Each layer's attention window, None where it sees all of the past."""
    window: int | None
    if architecture == "MistralForCausalLM":
        # v0.1 leaves nothing out, but a missing field means 4096 and only an explicit null means none.
        missing = "sliding_window" not in read.fields
        window = read.integer("sliding_window", default=4096) if missing or read.given("sliding_window") else None
        windows = (window,) * layers
    elif architecture == "Qwen2ForCausalLM":
        window = None
        if read.boolean("use_sliding_window", default=False):
            missing = "sliding_window" not in read.fields
            window = read.integer("sliding_window", default=4096) if missing or read.given("sliding_window") else None
        first = read.integer("max_window_layers", default=28, minimum=0)
        windows = tuple(window if layer >= first else None for layer in range(layers))
    else:
        if read.given("sliding_window"):
            raise UserError(f"{read.where}: sliding_window is not implemented for {architecture}")
        window, windows = None, (None,) * layers

    types = read.fields.get("layer_types")
    if types is None:
        return windows
    if (
        not isinstance(types, list)
        or len(types) != layers
        or not all(t in ("full_attention", "sliding_attention") for t in types)
    ):
        raise UserError(
            f"{read.where}: layer_types must name full_attention or sliding_attention for each of the {layers} layers"
        )
    if window is None and "sliding_attention" in types:
        raise UserError(f"{read.where}: layer_types has sliding_attention, but no sliding_window is in use")
    named = tuple(window if t == "sliding_attention" else None for t in types)
    if architecture == "MistralForCausalLM" and named != windows:
        raise UserError(f"{read.where}: layer_types that mix windows are not implemented for {architecture}")
    return named
