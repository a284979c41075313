"""The decoder of all architectures in plain torch: embedding, blocks, norm, head.

Modules and parameters have the names of the Hugging Face checkpoint. Nothing here knows about devices, processes or
files: `build` makes a model on the meta device, and `elo.model.checkpoint` fills it. For training on a CPU,
`elo.runs.sharding` replaces some operators by faster ones with the same results.
"""

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elo.model.cache import Extend, KVCache
from elo.model.config import ModelConfig
from elo.model.loss import LinearCrossEntropy
from elo.model.rotary import rotary_table, rotate


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ScaledDotProductAttention(nn.Module):
    """softmax(q k^T / sqrt(head_dim) + mask) v; causal if there is no mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q: (batch, heads, sequence, head_dim); k, v: (batch, kv_heads, sequence, head_dim); the result is as q."""
        if mask is None:  # a mask, even a causal one, would keep CUDA from the flash kernel
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        # With a mask, the only CUDA kernel for grouped queries keeps all scores, so keys and values are repeated.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Causal self-attention with grouped queries: several query heads share one key-value head.

    queries   1 2 3   4 5 6        num_attention_heads = 6
               \\|/     \\|/
    keys        1       2          num_key_value_heads = 2; likewise the values
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.o_bias)
        # Of each head by itself, as Qwen3 has them.
        has_norms, eps = config.architecture.query_key_norm, config.rms_norm_eps
        self.q_norm = RMSNorm(config.head_dim, eps) if has_norms else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps) if has_norms else nn.Identity()
        self.attend = ScaledDotProductAttention()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, (batch, sequence, heads x head_dim); keys and values, (batch, sequence, kv_heads x head_dim)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def split_heads(self, x: Tensor) -> Tensor:
        """(batch, heads, sequence, head_dim)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, extend: Extend | None = None) -> Tensor:
        q, k, v = (self.split_heads(part) for part in self.project(x))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if extend is not None:
            k, v = extend(k, v)
            if x.shape[1] == 1:
                # One new token needs no causal mask, so the queries that share a key-value head can take the place of
                # the sequence: (batch, kv_heads, queries, head_dim). No key or value is copied.
                x = F.scaled_dot_product_attention(q.view(*k.shape[:2], -1, self.head_dim), k, v, attn_mask=mask)
                return self.o_proj(x.flatten(1)[:, None])
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gate and what it multiplies, each (batch, sequence, intermediate_size)."""
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """One decoder layer; `layer` is its index in the model, from 0.

    x --+-- input_layernorm -- self_attn --(+)--+-- post_attention_layernorm -- mlp --(+)--> x
        |                                   |   |                                      |
        +-----------------------------------+   +--------------------------------------+
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.sliding_window = config, config.sliding_windows[layer]
        self.activation_checkpointing = False  # keep only the input, and compute the rest again in the backward pass
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, extend: Extend | None = None) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, cos, sin, mask, use_reentrant=False)
        return self._forward(x, cos, sin, mask, extend)

    def _forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, extend: Extend | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, extend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Everything but the head: tokens (batch, sequence) to hidden states (batch, sequence, hidden_size), normed.

    The checkpoint calls it `model`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rope, self.head_dim = config.rope, config.head_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.padding_idx)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.embed_tokens(tokens)  # (batch, sequence, hidden)
        if cache is not None:
            return self.norm(self._extend(x, cache))
        length = tokens.shape[1]
        rope = self.rope.at(length, self.head_dim)
        cos, sin = rotary_table(rope, self.head_dim, length, x.device, x.dtype)
        for block in self.layers:
            window = block.sliding_window
            cuts = window is not None and window < length
            x = block(x, cos, sin, sliding_window_mask(length, window, x.device, x.dtype) if cuts else None)
        return self.norm(x)

    def _extend(self, x: Tensor, cache: KVCache) -> Tensor:
        """Run the blocks on tokens that follow those in the cache, and add them to it."""
        positions = cache.new_positions(x.shape[1])  # (batch, sequence)
        rope = self.rope.at(int(positions.max()) + 1, self.head_dim) if self.rope.varies else self.rope
        table = rotary_table(rope, self.head_dim, cache.capacity, x.device, x.dtype)
        cos, sin = (angles[positions][:, None] for angles in table)  # (batch, 1, sequence, head_dim / 2)
        masks = {window: cache.mask(positions, window) for window in {block.sliding_window for block in self.layers}}
        for layer, block in enumerate(self.layers):
            x = block(x, cos, sin, masks[block.sliding_window], partial(cache.extend, layer, positions))
        return x


class CausalLM(nn.Module):
    """A decoder with its head.

    `forward(tokens)` returns logits (batch, sequence, vocabulary) in the dtype of computation.

    With `labels` (batch, sequence), the next token at each position or IGNORE, it returns the summed cross-entropy in
    nats as an fp32 scalar, without ever holding all logits. `counted`: how many labels are not IGNORE, if the caller
    knows; counting them here would wait for the GPU.

    With a cache, the tokens follow those in it and are added to it; the logits are those of each row's last token only,
    (batch, vocabulary). `lengths` says how many tokens of each row are real; the rest is padding at its end.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss = LinearCrossEntropy()
        self.is_tied = config.tie_word_embeddings
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight if they are tied; again after `to_empty`, which unties them."""
        if self.is_tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        counted: int | None = None,
        cache: KVCache | None = None,
        lengths: list[int] | None = None,
    ) -> Tensor:
        hidden = self.model(tokens, cache)
        if cache is not None:
            lengths = lengths or [tokens.shape[1]] * tokens.shape[0]
            cache.lengths = [held + new for held, new in zip(cache.lengths, lengths, strict=True)]
            return self.lm_head(hidden[range(len(lengths)), [new - 1 for new in lengths]])
        if labels is None:
            return self.lm_head(hidden)
        return self.loss(hidden.flatten(0, 1), self.lm_head.weight, labels.flatten(), counted)


def build(config: ModelConfig) -> CausalLM:
    """A model on the meta device: parameters have shapes, but no memory yet."""
    with torch.device("meta"):
        return CausalLM(config)


@lru_cache(maxsize=8)
def sliding_window_mask(length: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(length, length): 0 where a query may look, at itself and the window - 1 positions before it, else -infinity.

    It is added to the scores. Given booleans instead, attention would make and keep such a mask in every layer.
    """
    with torch.inference_mode(False):
        past = torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)
        return torch.zeros(length, length, dtype=dtype, device=device).masked_fill_(~past, -torch.inf)
