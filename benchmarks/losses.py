"""Head and loss beside torch's `linear_cross_entropy`: seconds of a forward and backward pass, and memory, on a CPU.

    python -m benchmarks.losses [--tokens 1024] [--vocabulary 49152] [--width 576]

Each form has a process of its own; they take turns. The shapes are SmolLM2-135M's.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.sides import Side, take_turns
from benchmarks.training_step.machine import Memory
from elo.common.errors import exit_status
from elo.common.options import Parser, positive_int
from elo.model.loss import LinearCrossEntropy
from elo.runs.devices import DTYPES, set_for_training
from elo.runs.sharding import CpuCrossEntropy

FORMS: dict[str, Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "as a CPU trains": CpuCrossEntropy,
    "by rows, in plain torch": LinearCrossEntropy,
    "torch's, in chunks": lambda: partial(
        F.linear_cross_entropy, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
    ),
    "torch's, whole logits": lambda: partial(F.linear_cross_entropy, reduction="sum"),
}


def make(form: str, tokens: int, vocabulary: int, width: int, dtype: str, trained: bool) -> Callable[[None], int]:
    """What computes loss and gradients, and returns the bytes that this takes beyond its inputs."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(DTYPES[dtype]).requires_grad_()
    weight = (torch.randn(vocabulary, width) / width**0.5).to(DTYPES[dtype]).requires_grad_(trained)
    labels = torch.randint(vocabulary, (tokens,))
    loss = FORMS[form]()
    set_for_training(torch.device("cpu"))  # from now on freed memory is kept
    memory = Memory(hidden.device)

    def measure(_: None) -> int:
        hidden.grad = weight.grad = None
        loss(hidden, weight, labels).backward()
        return memory.peak()

    return measure


def arguments() -> Namespace:
    parser = Parser(prog="python -m benchmarks.losses", description=__doc__)
    parser.add_argument("--tokens", type=positive_int, default=1024, help="(%(default)s)")
    parser.add_argument("--vocabulary", type=positive_int, default=49152, help="(%(default)s)")
    parser.add_argument("--width", type=positive_int, default=576, help="(%(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="(%(default)s)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    print("| head | dtype | form | seconds | of the first | MB | of the first |\n|---|---|---|---|---|---|---|")
    for trained in (False, True):
        for dtype in DTYPES:
            shape = options.tokens, options.vocabulary, options.width, dtype, trained
            sides = {form: Side(make, form, *shape) for form in FORMS}
            take_turns(sides, None, 1)  # warms up
            seconds, memory = take_turns(sides, None, options.rounds)
            for form in FORMS:
                time, space = (values[form] / next(iter(values.values())) for values in (seconds, memory))
                head = "trained" if trained else "frozen"
                numbers = f"{seconds[form]:.2f} | {time:.2f} | {memory[form] / 1e6:.0f} | {space:.2f}"
                print(f"| {head} | {dtype} | {form} | {numbers} |", flush=True)


if __name__ == "__main__":
    exit_status(main)
