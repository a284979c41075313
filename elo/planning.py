"""FLOPs of a run before its GPUs are rented."""

from elo.costs import flops_per_token

__all__ = ["flops_per_token"]
