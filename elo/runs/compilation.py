"""torch.compile, and never what a run dies of: what cannot be compiled is computed as it is."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from elo.common.errors import message_line
from elo.runs.processes import World


def compiled(function: Callable[..., Any], world: World, shapes_vary: bool) -> Callable[..., Any]:
    """`function` in one graph; all blocks of a model share theirs.

    shapes_vary: from the first call on one graph serves every shape. Else each shape gets its own: a graph that torch
    made more general on meeting another shape would then compute the first one too, with other sums than before.

    Kernels are not chosen by timing, which could change them. Where the compiler fails, or reaches torch's limit of
    graphs, a line on rank 0's stderr says so; what is compiled by then stays in use, and nothing more is compiled.
    """
    # The backward pass is compiled with the forward one, where a failure is still no harm.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    fast = torch.compile(function, fullgraph=True, dynamic=shapes_vary, options={"deterministic": True})

    def call(*arguments: Any) -> Any:
        try:
            return fast(*arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            torch.compiler.set_stance("eager_on_recompile")
            result = function(*arguments)  # if that fails as well, the compiler was right
            if world.rank == 0:
                sys.stderr.write(f"--compile: the rest is computed uncompiled, slower: {_reason(error)}\n")
            return result

    return call


def _reason(error: Exception) -> str:
    if isinstance(error, FailOnRecompileLimitHit):
        return f"torch allows {torch._dynamo.config.recompile_limit} graphs of a block (torch._dynamo.config)"
    cause = getattr(error, "inner_exception", error)
    return f"{type(cause).__name__}: {message_line(cause)[:200]}"
