"""The decoder of Llama, Mistral and Qwen2: embedding, blocks, norm, head.

Modules and parameters carry the names of the Hugging Face checkpoint. Nothing here knows of devices, processes or
files; a model is built on the meta device and filled by `elo.checkpoint`.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elo.config import ModelConfig
from elo.loss import linear_cross_entropy
from elo.rotary import rotary_table, rotate


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped queries: several query heads share one key-value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads).transpose(1, 2), cos, sin)  # (batch, heads, sequence, head_dim)
        k = rotate(self.k_proj(x).view(heads).transpose(1, 2), cos, sin)  # (batch, kv_heads, sequence, head_dim)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        # Without a mask tensor CUDA takes the flash kernel.
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer; `layer` is its index in the model, from 0."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.sliding_window = config.sliding_windows[layer]
        self.activation_checkpointing = False  # keep only a block's input, and compute the rest again for the backward
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, cos, sin, mask, use_reentrant=False)
        return self._forward(x, cos, sin, mask)

    def _forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """What the checkpoint's names call `model`: everything but the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rope, self.head_dim = config.rope, config.head_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)  # (batch, sequence, hidden)
        length = tokens.shape[1]
        cos, sin = rotary_table(self.rope, self.head_dim, length, x.device, x.dtype)
        for block in self.layers:
            window = block.sliding_window
            cuts = window is not None and window < length
            x = block(x, cos, sin, sliding_window_mask(length, window, x.device) if cuts else None)
        return self.norm(x)


class CausalLM(nn.Module):
    """A decoder with its head.

    `forward(tokens)` gives logits of shape (batch, sequence, vocabulary) in the dtype of computation. With `labels`
    of the tokens' shape (the next token at each position, or IGNORE) it gives the summed cross-entropy in nats as an
    fp32 scalar, and tokens x vocabulary logits never exist (`elo.loss`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head be the embedding where the configuration says so; again after `to_empty`, which parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.model(tokens)
        if labels is None:
            return self.lm_head(hidden)
        return linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, labels.flatten())


def build(config: ModelConfig) -> CausalLM:
    """The model without memory, on the meta device."""
    with torch.device("meta"):
        return CausalLM(config)


@lru_cache(maxsize=8)
def sliding_window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """(length, length), True where a query may look: at itself and the window - 1 positions before it."""
    with torch.inference_mode(False):
        past = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return past.triu(1 - window)
