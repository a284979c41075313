"""Batches of conversations: every one once an epoch, the same for any processes, and padding changes nothing."""

import json
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
from small_chats import chat, chatml, sharegpt, write_lines
from torch.nn.functional import cross_entropy

from elo.data.conversation_batches import SORTED_TOGETHER, ConversationBatches
from elo.data.conversations import load_conversations
from elo.model.checkpoint import load_model
from elo.model.loss import IGNORE


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """500 conversations of very different lengths, some with two answers."""
    random = np.random.RandomState(3)
    records = []
    for number in range(500):
        words = "word " * min(int(random.pareto(1.2) * 4), 14)
        more = ["and", "more"] if number % 3 == 0 else []
        records.append(sharegpt(chat(f"question {number}", f"answer {words}", *more)))
    path = write_lines(tmp_path_factory.mktemp("many") / "x.jsonl", records)
    conversations, _ = load_conversations([path], chatml(tmp_path_factory.mktemp("chatml")), 128)
    assert len(conversations) == 500
    return conversations


def batches_of(conversations, batch=16, micro_batch_tokens=256, epochs=3, seed=0, rank=0, size=1):
    world = SimpleNamespace(rank=rank, size=size)
    return ConversationBatches(conversations, batch, micro_batch_tokens, epochs, seed, world)


def test_every_epoch_has_every_conversation_once_in_another_order(many):
    batches = batches_of(many)
    assert len(batches) == 3 * 32 == 3 * batches.steps_per_epoch
    epochs = [[batches.documents(step) for step in range(32 * epoch, 32 * epoch + 32)] for epoch in range(3)]
    everything = sorted(many.place(index) for index in range(500))
    for epoch in epochs:
        assert sorted(name for batch in epoch for name in batch) == everything
        assert sorted(map(len, epoch)) == [4] + [16] * 31
    assert len({str(sorted(map(sorted, epoch))) for epoch in epochs}) == 3
    # Any step can be asked for, as in a resumed run, and another seed is another order.
    assert batches_of(many).documents(70) == epochs[2][6]
    assert batches_of(many, seed=1).documents(70) != epochs[2][6]
    # Batches do not come in the order of their lengths.
    lengths = [many.table["tokens"][batches._batch(step)[0]] for step in range(1, 32)]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)


def test_the_longest_conversation_is_in_the_first_batch(many):
    batches = batches_of(many)
    for epoch in range(3):
        assert many.table["tokens"][batches._batch(32 * epoch)].max() == many.table["tokens"].max()


def rows_of(batches, step):
    """(tokens, labels) without padding, of rows that are not empty."""
    rows = []
    for tokens, labels in batches.micro_batches(step):
        for row_tokens, row_labels in zip(tokens.tolist(), labels.tolist(), strict=True):
            trained = [index for index, label in enumerate(row_labels) if label != IGNORE]
            if trained:
                rows.append((row_tokens[: trained[-1] + 1], row_labels[: trained[-1] + 1]))
            else:
                assert not any(row_tokens)
    return rows


@pytest.mark.parametrize("size", [1, 2, 3, 20])
@pytest.mark.parametrize("micro_batch_tokens", [1, 300, 10_000])
def test_the_same_batch_for_any_processes_and_micro_batch(many, size, micro_batch_tokens):
    reference = batches_of(many)
    ranks = [batches_of(many, size=size, micro_batch_tokens=micro_batch_tokens, rank=rank) for rank in range(size)]
    for step in (0, 1, 31, 32, *(step for step in range(32) if len(reference.documents(step)) == 4)):
        assert sorted(row for rank in ranks for row in rows_of(rank, step)) == sorted(rows_of(reference, step))
        # Every process calls the model equally often, with equal shapes.
        shapes = [[(tokens.shape, labels.shape) for tokens, labels in rank.micro_batches(step)] for rank in ranks]
        assert all(shape == shapes[0] for shape in shapes)
        for tokens_shape, labels_shape in shapes[0]:
            assert tokens_shape == labels_shape
            assert tokens_shape[0] == 1 or tokens_shape.numel() <= micro_batch_tokens
        rows, length = shapes[0][0][0]
        share = -(-len(reference.documents(step)) // size)
        assert rows == min(max(1, micro_batch_tokens // length), share)  # each process is as full as it may be
        counted = sum(int((labels != IGNORE).sum()) for rank in ranks for _, labels in rank.micro_batches(step))
        assert counted == ranks[-1].label_count(step) == reference.label_count(step)
        assert len({str(rank.documents(step)) for rank in ranks}) == 1


def test_grouping_by_length_saves_padding(many):
    batches = batches_of(many, micro_batch_tokens=10_000, epochs=1)
    assert SORTED_TOGETHER > 32
    padded = sum(tokens.numel() for step in range(len(batches)) for tokens, _ in batches.micro_batches(step))
    real = int((many.table["tokens"] - 1).sum())
    shuffled = np.random.RandomState(0).permutation(many.table["tokens"] - 1)
    unsorted = sum(len(rows) * int(rows.max()) for rows in np.split(shuffled, range(16, 500, 16)))
    assert padded < 1.1 * real
    assert unsorted > 1.5 * real


def test_consumed(many):
    batches = batches_of(many)
    assert batches.consumed(0) == {"tokens": 0, "bytes": 0, "conversations": 0}
    labels = text = count = 0
    for step in range(len(batches)):
        table = many.table[batches._batch(step)]
        labels, text, count = labels + table["labels"].sum(), text + table["bytes"].sum(), count + len(table)
        assert batches.consumed(step + 1) == {"tokens": labels, "bytes": text, "conversations": count}
    assert batches_of(many).consumed(40)["conversations"] == 500 + sum(len(batches.documents(s)) for s in range(32, 40))
    json.dumps(batches.consumed(40))


# ---- the loss

MODELS = {
    "llama": lambda: families.llama(vocab_size=402, tie_word_embeddings=True),
    "mistral with a window": lambda: families.mistral(vocab_size=402, sliding_window=7),
    "qwen2": lambda: families.qwen2(vocab_size=402),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_a_batch_is_that_of_its_conversations_one_by_one(tmp_path, monkeypatch, many, name):
    monkeypatch.setitem(families.VARIANTS, name, MODELS[name])
    model = load_model(families.write(name, tmp_path), "cpu", torch.float32)
    embedding = model.model.embed_tokens.weight.requires_grad_()
    step = 2
    total, count = 0, 0
    for index in batches_of(many)._batch(step):
        row = many.table[index]
        tokens = slice(int(row["offset"]), int(row["offset"] + row["tokens"]))
        ids, trained = torch.from_numpy(many.ids[tokens].astype(np.int64)), torch.from_numpy(many.trained[tokens])
        predicted = model(ids[None, :-1])[0][trained[1:]]
        total = total + cross_entropy(predicted, ids[1:][trained[1:]], reduction="sum")
        count += len(predicted)
    (expected_gradient,) = torch.autograd.grad(total / count, embedding)

    for size, micro_batch_tokens in ((1, 10_000), (1, 200), (2, 10_000), (2, 200), (3, 1)):
        loss = torch.zeros(())
        for rank in range(size):
            batches = batches_of(many, micro_batch_tokens=micro_batch_tokens, rank=rank, size=size)
            for tokens, labels in batches.micro_batches(step):
                loss = loss + model(tokens, labels) / batches.label_count(step)
        (gradient,) = torch.autograd.grad(loss, embedding)
        assert loss.item() == pytest.approx((total / count).item(), rel=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
