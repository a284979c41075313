"""fp32 gradients for the trained embedding, norm and head, from their sums over tokens on.

Under mixed precision autograd rounds the gradient of a weight to the dtype of computation before it is reduced. These
are the largest gradients of a model, summed over all tokens of a micro-batch, and lose the most by that.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from elo.model.decoder import CausalLM


class Embedding(nn.Embedding):
    """torch's embedding with a gradient in fp32."""

    def forward(self, tokens: Tensor) -> Tensor:
        return _Embedding.apply(tokens, self.weight, -1 if self.padding_idx is None else self.padding_idx)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor, padding_idx: int) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(tokens)
        ctx.shape = len(weight), padding_idx
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, None]:  # noqa: ANN001
        (tokens,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(grad.float(), tokens, *ctx.shape, False), None


def shard_root(model: CausalLM, shard: Callable[..., object], dtype: torch.dtype) -> None:
    """`shard` a model whose blocks are sharded already, and keep gradients of its other trained weights in fp32.

    shard: fully_shard, which computes in `dtype`.
    """
    embedding, norm, head = model.model.embed_tokens, model.model.norm, model.lm_head
    if norm.weight.requires_grad and dtype != torch.float32:
        # It is so small that its weight is gathered and computed with in fp32.
        shard(norm, mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32, output_dtype=dtype))
    shard(model)
    trained = [module for module in (embedding, head) if module.weight.requires_grad and dtype != torch.float32]
    if embedding in trained:
        embedding.__class__ = Embedding

    def give_dtype(*_: object) -> None:
        """To the weights that are computed with, which are there when fully_shard has gathered them."""
        for module in trained:
            module.weight.grad_dtype = torch.float32

    model.register_forward_pre_hook(give_dtype)
