"""torch.compile that cannot end a run: what fails to compile is computed uncompiled."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from elo.common.errors import message_line
from elo.runs.processes import World


def compiled(function: Callable[..., Any], world: World, shapes_vary: bool) -> Callable[..., Any]:
    """`function` compiled as one graph, which all blocks of a model share.

    shapes_vary: one graph serves every shape from the first call on. Otherwise each shape gets its own graph, because
    torch would make a graph general on meeting a second shape, and then compute the first shape with other sums.

    Kernels are not chosen by timing, so they are the same in every run. If the compiler fails or reaches torch's limit
    of graphs, rank 0 says so on stderr; what is compiled by then stays in use, and nothing more is compiled.
    """
    # Compile the backward pass together with the forward pass, where a failure can still be handled.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    fast = torch.compile(function, fullgraph=True, dynamic=shapes_vary, options={"deterministic": True})

    def call(*arguments: Any) -> Any:
        try:
            return fast(*arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            torch.compiler.set_stance("eager_on_recompile")
            result = function(*arguments)  # raises if the function itself is at fault
            if world.rank == 0:
                sys.stderr.write(f"--compile: the rest is computed uncompiled, slower: {_reason(error)}\n")
            return result

    return call


def _reason(error: Exception) -> str:
    if isinstance(error, FailOnRecompileLimitHit):
        return f"torch allows {torch._dynamo.config.recompile_limit} graphs of a block (torch._dynamo.config)"
    cause = getattr(error, "inner_exception", error)
    return f"{type(cause).__name__}: {message_line(cause)[:200]}"
