"""What one architecture differs in from the others: a record each, the only place that knows their names.

docs/architectures.md says how to add one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import Fields

Windows = tuple[int | None, ...]  # each layer's attention window in tokens, None where it sees all of the past


@dataclass(frozen=True, eq=False)
class Architecture:
    name: str  # of its class in transformers, as in config.json's `architectures`
    model_type: str
    defaults: dict[str, Any]  # of transformers, for fields that config.json leaves out; these need not be NEUTRAL
    windows: Callable[[Fields, int], Windows]  # of config.json and the number of layers
    qkv_bias: bool = False  # whatever `attention_bias` says, which counts where `defaults` has it
    query_key_norm: bool = False  # an RMSNorm of each head's query and key before they are rotated
    windows_by_index: bool = False  # a layer's index tells whether it has a window

    def __str__(self) -> str:
        return self.name

    def renumbered(self, fields: dict[str, Any], windows: Windows, layers: tuple[int, ...]) -> dict[str, Any]:
        """config.json of the slice that has only these layers, from 1; `windows` are the whole model's."""
        kept = [windows[number - 1] for number in layers]
        sliced = {**fields, "num_hidden_layers": len(layers)}
        if self.windows_by_index and any(kept):
            sliced["layer_types"] = ["sliding_attention" if window else "full_attention" for window in kept]
            sliced["max_window_layers"] = kept.count(None)
        elif fields.get("layer_types") is not None:
            sliced["layer_types"] = [fields["layer_types"][number - 1] for number in layers]
        return sliced


def no_windows(read: Fields, layers: int) -> Windows:
    if read.given("sliding_window"):
        raise UserError(f"{read.where}: sliding_window is not implemented for this architecture")
    return layer_types(read, None, (None,) * layers)


def equal_windows(read: Fields, layers: int) -> Windows:
    """Mistral: v0.1 leaves nothing out, but a missing field means the default and only an explicit null means none."""
    window = read.integer("sliding_window") if read.given("sliding_window") else None
    windows = (window,) * layers
    if layer_types(read, window, windows) != windows:  # of which transformers takes no notice
        raise UserError(f"{read.where}: layer_types without the window are not implemented for this architecture")
    return windows


def upper_windows(read: Fields, layers: int) -> Windows:
    """Qwen: with use_sliding_window, the layers from max_window_layers on."""
    used = read.boolean("use_sliding_window", default=False) and read.given("sliding_window")
    window = read.integer("sliding_window") if used else None
    first = read.integer("max_window_layers", minimum=0)
    return layer_types(read, window, tuple(window if layer >= first else None for layer in range(layers)))


def layer_types(read: Fields, window: int | None, otherwise: Windows) -> Windows:
    """The windows as `layer_types` has them, where it is there."""
    types = read.fields.get("layer_types")
    if types is None:
        return otherwise
    known, layers = ("full_attention", "sliding_attention"), len(otherwise)
    if not isinstance(types, list) or len(types) != layers or not all(kind in known for kind in types):
        raise UserError(
            f"{read.where}: layer_types must name full_attention or sliding_attention for each of the {layers} layers"
        )
    if window is None and "sliding_attention" in types:
        raise UserError(f"{read.where}: layer_types has sliding_attention, but no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
QWEN = {
    **COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
ARCHITECTURES = (
    Architecture(
        name="LlamaForCausalLM",
        model_type="llama",
        defaults={
            **COMMON,
            "vocab_size": 32000,
            "intermediate_size": 11008,
            "num_key_value_heads": None,  # as many as query heads
            "max_position_embeddings": 2048,
            "attention_bias": False,
        },
        windows=no_windows,
    ),
    Architecture(
        name="MistralForCausalLM",
        model_type="mistral",
        defaults={
            **COMMON,
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        windows=equal_windows,
    ),
    Architecture(
        name="Qwen2ForCausalLM",
        model_type="qwen2",
        defaults=QWEN,
        windows=upper_windows,
        qkv_bias=True,
        windows_by_index=True,
    ),
    Architecture(
        name="Qwen3ForCausalLM",
        model_type="qwen3",
        defaults={**QWEN, "head_dim": 128, "attention_bias": False},
        windows=upper_windows,
        query_key_norm=True,
        windows_by_index=True,
    ),
)

# Fields by which relatives of these architectures change the mathematics, beside the values that change nothing.
# `None` is a value of its own: a field that is there and null.
_NEUTRAL: list[tuple[tuple[Any, ...], str]] = [
    ((None, False), """
        use_bidirectional_attention is_encoder_decoder add_cross_attention attention_bias attention_out_bias
        attention_in_bias mlp_bias use_bias use_qkv_bias qkv_bias bias rope_interleaved use_mrope alibi
        attn_temperature_tuning scale_embedding qk_norm use_qk_norm qk_layernorm use_parallel_residual parallel_attn
    """),
    ((None,), """
        quantization_config compression_config rope_local_base_freq attention_chunk_size attention_multiplier
        query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping sliding_window_pattern scale_depth
        clip_qkv swiglu_limit kv_lora_rank q_lora_rank
    """),
    ((None, 0), """
        attention_dropout hidden_dropout resid_pdrop embd_pdrop no_rope_layer_interval attention_sink_size
        n_routed_experts
    """),
    ((None, 1), """
        partial_rotary_factor rotary_pct logit_scale logits_scaling embedding_multiplier residual_multiplier scale_emb
    """),
    ((None, 0, 1), "num_experts num_local_experts"),
    (("silu", "swish"), "hidden_act"),
    ((None, "silu", "swish"), "hidden_activation"),
    ((None, True), "is_causal"),
    ((None, {}), "pruned_heads"),
    ((None, []), "no_rope_layers"),
    ((None, "rope"), "position_embedding_type"),
    ((None, "rmsnorm", "rms_norm"), "norm_type"),
]  # fmt: skip
NEUTRAL = {name: values for values, names in _NEUTRAL for name in names.split()}

# Fields that change no logit: what else these architectures read, and what transformers and trainers write.
_HARMLESS = """
architectures model_type head_dim rope_theta rope_scaling rope_parameters original_max_position_embeddings
use_sliding_window layer_types sliding_window max_window_layers

_name_or_path name_or_path _commit_hash _attn_implementation _attn_implementation_autoset attn_implementation
transformers_version torch_dtype dtype use_bfloat16 torchscript use_cache initializer_range pretraining_tp
bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
return_dict output_attentions output_hidden_states output_scores return_dict_in_generate
chunk_size_feed_forward cross_attention_hidden_size is_decoder tie_encoder_decoder tf_legacy_loss
id2label label2id num_labels problem_type finetuning_task task_specific_params gradient_checkpointing
unsloth_version unsloth_fixed

do_sample temperature top_k top_p typical_p min_p repetition_penalty length_penalty diversity_penalty
max_length min_length max_new_tokens early_stopping num_beams num_beam_groups num_return_sequences
no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens
forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty remove_invalid_values
"""
HARMLESS = frozenset(_HARMLESS.split())
