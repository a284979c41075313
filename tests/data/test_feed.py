"""The thread that reads ahead: in order, not far, while the device computes."""

import itertools
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from small_chats import chat, chatml, sharegpt, write_lines

from elo.data import feed as module
from elo.data.conversation_batches import ConversationBatches
from elo.data.conversations import load_conversations
from elo.data.feed import AHEAD, Feed, in_order
from elo.model.loss import IGNORE
from elo.runs.processes import process_group
from elo.training import accumulate

CPU = torch.device("cpu")


class Numbered:
    """Steps of 3, 1, 3, 1, ... micro-batches, that have their number as a token; `begun` and `read` count them."""

    def __init__(self):
        self.begun, self.condition = 0, threading.Condition()

    def micro_batches(self, step):
        for number in range(step // 2 * 4 + step % 2 * 3, step // 2 * 4 + 3 + step % 2):
            with self.condition:
                self.begun += 1
                self.condition.notify_all()
            yield torch.tensor([number]), torch.tensor([number, IGNORE])

    def wait_for(self, begun):
        with self.condition:
            assert self.condition.wait_for(lambda: self.begun >= begun, timeout=300)


def test_the_order_is_that_of_the_steps_from_any_of_them_on():
    for first in (0, 1, 2):
        with Feed(Numbered(), range(first, 7), CPU) as feed:
            ahead = [(*micro_batch.tokens.tolist(), *micro_batch[2:]) for micro_batch in feed]
        assert ahead == [(*read.tokens.tolist(), *read[2:]) for read in in_order(Numbered(), range(first, 7), CPU)]
        assert [number for number, *_ in ahead] == list(range(first // 2 * 4 + first % 2 * 3, 15))
        assert all(counted == 1 and is_last == (number % 4 > 1) for number, counted, is_last in ahead)


def test_the_next_ones_are_read_while_the_device_computes_and_not_all():
    """In both passes of every micro-batch, and at a step's end: they wait here for what comes after them."""
    batches, weight, computed = Numbered(), torch.nn.Parameter(torch.ones(1)), itertools.count(1)
    last = 11  # micro-batches

    def compute(tokens, labels, counted):
        batches.wait_for(min(next(computed) + AHEAD, last))
        assert batches.begun <= tokens.item() + 1 + AHEAD + 1  # the last one in the thread's hands
        return weight.sum()

    optimizer = SimpleNamespace(before_backward=lambda is_last: None)
    with process_group() as world, Feed(batches, range(5), CPU) as feed:
        for _ in range(5):
            assert accumulate(compute, feed, 1, optimizer, world) > 0
    assert next(computed) == last + 1


def test_what_waits_is_the_next_one(monkeypatch):
    monkeypatch.setattr(module.time, "perf_counter", itertools.count().__next__)
    with Feed(Numbered(), range(2), CPU) as feed:
        assert feed.waited == 0
        assert len(list(feed)) == 4
        assert feed.waited == 4


@pytest.mark.parametrize("fails", [True, False])
def test_no_thread_is_left(fails):
    def micro_batches(step):
        yield torch.zeros(1), torch.zeros(1)
        raise OSError("gone")

    feed = Feed(SimpleNamespace(micro_batches=micro_batches) if fails else Numbered(), itertools.count(), CPU)
    with pytest.raises(OSError if fails else KeyboardInterrupt, match="gone"), feed:
        next(feed)
        raise KeyboardInterrupt("gone")
    assert not any(thread.name.startswith("feed") for thread in threading.enumerate())


def test_batches_are_asked_while_a_thread_reads_those_of_another_epoch(tmp_path):
    records = [sharegpt(chat(f"question {number}", "answer " * (number % 7 + 1))) for number in range(20)]
    conversations, _ = load_conversations([write_lines(tmp_path / "x.jsonl", records)], chatml(tmp_path / "chat"), 128)

    def batches():
        return ConversationBatches(conversations, 3, 64, 300, 0, SimpleNamespace(rank=0, size=1))

    both, alone, interval = batches(), batches(), sys.getswitchinterval()
    steps = range(0, 2100, 6)
    sys.setswitchinterval(1e-6)
    try:
        with Feed(both, steps, CPU) as feed:
            asked = [(both.consumed(step + 1), both.documents(step)) for step in steps for _ in range(3)]
            read = [micro_batch.labels for micro_batch in feed]
    finally:
        sys.setswitchinterval(interval)
    assert asked == [(alone.consumed(step + 1), alone.documents(step)) for step in steps for _ in range(3)]
    assert all(map(torch.equal, read, (micro_batch.labels for micro_batch in in_order(alone, steps, CPU))))
