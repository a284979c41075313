"""What a step of continual pretraining consists of."""

from types import SimpleNamespace

import pytest
import torch

from elo.model.loss import IGNORE
from elo.pretraining import PackedBatches

SEQ_LEN = 4


class Numbered:
    """Window i has the tokens i, and as many labels."""

    seq_len, tokens = SEQ_LEN, 10**6

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.full((SEQ_LEN,), index),) * 2


@pytest.mark.parametrize(("windows", "a_step"), [(22, 7), (5, 7), (1, 1), (21, 7), (16, 8)])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_micro_batches_have_one_shape_and_every_window_once(windows, a_step, micro_batch, processes):
    """So that what is compiled for the first computes all of them."""
    shapes, seen, counts = set(), [], set()
    for rank in range(processes):
        world = SimpleNamespace(rank=rank, size=processes)
        batches = PackedBatches(Numbered(windows), a_step * SEQ_LEN, micro_batch, world)
        steps = [list(batches.micro_batches(step)) for step in range(len(batches))]
        counts.add(tuple(map(len, steps)))
        for tokens, labels in (pair for step in steps for pair in step):
            shapes.add((tokens.shape, labels.shape))
            seen += labels[labels[:, 0] != IGNORE, 0].tolist()
            assert (labels[labels[:, 0] != IGNORE] == tokens[labels[:, 0] != IGNORE]).all()
    assert sorted(seen) == list(range(windows))
    assert len(counts) == len(shapes) == 1
    ((rows, _),) = {shape for shape, _ in shapes}
    assert rows <= micro_batch
    # No more micro-batches than there have to be, and fewer empty windows in a step than there are of these.
    share = -(-min(a_step, windows) // processes)
    assert counts.pop()[0] == -(-share // micro_batch) > rows * (-(-share // micro_batch)) - share
