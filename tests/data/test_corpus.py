"""The stream of both languages and its windows, against what a few lines of plain Python make of the same documents."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import error_of

from elo.common.errors import UserError
from elo.data.corpus import BLOCK, LANGUAGES, Mixture, Windows
from elo.data.encoding import DOCUMENT
from elo.data.shards import TokenShard
from elo.model.loss import IGNORE


def make_shard(sizes, name="ko.jsonl", first_token=0):
    """Documents of these bytes, each of 1 to 5 tokens; all tokens of a shard are different."""
    documents = np.zeros(len(sizes), DOCUMENT)
    documents["bytes"] = sizes
    documents["tokens"] = np.arange(len(sizes)) % 5 + 1
    documents["offset"] = np.cumsum(documents["tokens"]) - documents["tokens"]
    documents["line"] = np.arange(len(sizes)) + 1
    tokens = np.arange(documents["tokens"].sum(), dtype=np.uint32) + first_token
    return TokenShard(tokens, documents, np.bincount(tokens), [name], sum(sizes), digest=name, skipped={})


def make_mixture(target_sizes, source_sizes, fraction=0.9, seed=0, size=None, start=0):
    """`size` in bytes instead of gigabytes."""
    shards = make_shard(target_sizes), make_shard(source_sizes, "en.jsonl", 1_000_000)
    return Mixture(shards, fraction, seed, None if size is None else size / 1e9, start)


def places(mixture):
    """`file:line` of every document in the order of the stream."""
    return [shard.place(number) for _, shard, number in map(mixture.document, range(len(mixture.stream)))]


def bytes_of(mixture):
    """(language, bytes) of every document in the order of the stream."""
    entries = map(mixture.document, range(len(mixture.stream)))
    return [(LANGUAGES[language], int(shard.documents["bytes"][number])) for language, shard, number in entries]


def tokens_of(mixture):
    """All tokens of the stream: the documents end to end."""
    tokens = []
    for _, shard, number in map(mixture.document, range(len(mixture.stream))):
        document = shard.documents[number]
        tokens += shard.tokens[document["offset"] : document["offset"] + document["tokens"]].tolist()
    return tokens


document_sizes = st.lists(st.integers(1, 1000), min_size=1, max_size=60)
fractions = st.sampled_from([0.9, 0.5, 1 / 3, 0.99, 0.05, 0.123456789])
seeds = st.integers(0, 2**32 - 1)
SIZES = np.random.RandomState(0).randint(1, 1000, 300).tolist(), np.random.RandomState(1).randint(1, 1000, 300).tolist()


# ---- the ratio and the size


@given(document_sizes, document_sizes, fractions, seeds, st.integers(0, 20_000))
def test_at_every_point_each_language_has_its_share_to_within_one_document(target, source, fraction, seed, start):
    try:
        mixture = make_mixture(target, source, fraction, seed, start=start)
    except UserError as error:
        assert "no text is left" in str(error)
        return
    largest = max(target + source)
    taken = dict.fromkeys(LANGUAGES, 0)
    for language, size in bytes_of(mixture):
        taken[language] += size
        for inside in (size - 1, 0):  # after its first byte and after its last: points between are between
            target_bytes = taken["target"] - inside * (language == "target")
            all_bytes = sum(taken.values()) - inside
            assert abs(target_bytes - fraction * all_bytes) <= largest + 1e-5 * all_bytes


def test_an_odd_ratio_is_kept_over_many_documents():
    windows = Windows(make_mixture([1] * 5000, [1] * 40_000, fraction=0.12345), 16)
    consumed = windows.consumed(len(windows))
    assert consumed["target_bytes"] == 5000
    assert consumed["source_bytes"] == pytest.approx(5000 / 0.12345 - 5000, abs=1)


@given(document_sizes, document_sizes, fractions, seeds)
def test_by_default_one_language_is_used_up(target, source, fraction, seed):
    mixture = make_mixture(target, source, fraction, seed)
    counts = [sum(language == name for language, _ in bytes_of(mixture)) for name in LANGUAGES]
    assert counts[0] == len(target) or counts[1] == len(source)
    assert len(set(places(mixture))) == len(mixture.stream)


def test_gb_takes_that_much():
    for size in (10_000, 20_000, 100_000):
        mixture = make_mixture(*SIZES, size=size)
        taken = dict.fromkeys(LANGUAGES, 0)
        for language, bytes_ in bytes_of(mixture):
            taken[language] += bytes_
        assert 0.9 * size <= taken["target"] < 0.9 * size + 1000
        assert 0.1 * size <= taken["source"] < 0.1 * size + 1000


def test_gb_can_be_exactly_what_there_is():
    assert len(make_mixture([100] * 90, [10] * 100, size=10_000).stream) == 190


def test_more_than_there_is():
    target, source = [1000] * 900, [1000] * 100
    with_more = "--gb 0.0011: 0.00099 GB of target text are needed and 0.0009 GB are there"
    assert error_of(make_mixture, target, source * 2, size=1_100_000) == with_more
    assert error_of(make_mixture, target * 2, source, size=1_100_000) == (
        "--gb 0.0011: 0.00011 GB of source text are needed and 0.0001 GB are there"
    )
    assert error_of(make_mixture, target, source, size=1_100_000) == (
        f"{with_more}; 0.00011 GB of source text are needed and 0.0001 GB are there"
    )
    assert error_of(make_mixture, target, source, size=200_000, start=900_000) == (
        "--gb 0.0002 after the 0.0009 GB of an earlier stage: 0.00099 GB of target text are needed and "
        "0.0009 GB are there; 0.00011 GB of source text are needed and 0.0001 GB are there"
    )
    for start in (999_999, 1_000_000, 2_000_000):
        message = error_of(make_mixture, target, source, start=start)
        assert message == f"no text is left after the {start / 1e9:.6g} GB of an earlier stage"
    assert error_of(make_mixture, target, source, size=0.4) == "--gb 4e-10 is less than a document"


def test_a_single_language():
    target = make_shard([10, 20, 30])
    for source in ([], [make_shard([5], "en.jsonl")]):
        mixture = Mixture([target, *source], target_fraction=1.0, seed=0)
        assert sorted(places(mixture)) == ["ko.jsonl:1", "ko.jsonl:2", "ko.jsonl:3"]


# ---- the order


def test_the_seed_decides_the_order():
    same = [places(make_mixture(*SIZES, seed=1)) for _ in range(2)]
    other = places(make_mixture(*SIZES, seed=2))
    assert same[0] == same[1] != other
    assert places(make_mixture(*SIZES, seed=1))[:100] != sorted(same[0][:100])


def test_the_order_stays_what_it_is():
    """Stage 2 may run years after stage 1, with another numpy, and must not meet the same documents."""
    mixture = make_mixture([10] * 18, [10] * 2, seed=7)
    lines = [place.removesuffix(".jsonl").replace(".jsonl:", "") for place in places(mixture)]
    assert " ".join(lines) == (
        "ko11 en2 ko16 ko6 ko18 ko1 ko8 ko10 ko5 ko2 ko15 en1 ko4 ko17 ko14 ko7 ko13 ko12 ko3 ko9"
    )


# ---- stages


@given(document_sizes, document_sizes, fractions, seeds, st.integers(0, 10_000), st.integers(1, 7), st.data())
def test_a_second_stage_goes_on_where_the_first_stopped(target, source, fraction, seed, start, seq_len, data):
    everything = places(make_mixture(target, source, fraction, seed))
    try:
        first = make_mixture(target, source, fraction, seed, start=start)
    except UserError:
        return
    windows = Windows(first, seq_len)
    steps = data.draw(st.integers(0, len(windows)))
    consumed = windows.consumed(steps)
    begun = {place for window in range(steps) for place in windows.documents(window)}
    try:
        second = places(make_mixture(target, source, fraction, seed, start=consumed["position"]))
    except UserError:
        second = []
    assert not begun & set(second)
    # Nothing is lost between them but perhaps one that stands within the same byte of the stream as the last.
    lost = set(everything[everything.index(places(first)[0]) :]) - begun - set(second)
    assert len(lost) <= 1


@pytest.mark.parametrize("fraction", [0.9, 1 / 3])
def test_two_stages_are_one_long_one(fraction):
    first = make_mixture(*SIZES, fraction, size=30_000)
    position = Windows(first, 16).consumed(len(Windows(first, 16)))["position"]
    assert position <= 30_000
    second = make_mixture(*SIZES, fraction, size=20_000, start=30_000)
    assert places(first) + places(second) == places(make_mixture(*SIZES, fraction, size=50_000))
    assert places(make_mixture(*SIZES, fraction, size=50_000 - position, start=position)) == places(second)


def test_runs_of_the_same_stream_can_be_told():
    identity = make_mixture(*SIZES, seed=1, size=10_000).identity
    assert identity == json.loads(json.dumps(identity))
    assert identity == make_mixture(*SIZES, seed=1, size=20_000, start=10_000).identity
    assert identity != make_mixture(*SIZES, seed=2).identity
    assert identity != make_mixture(*SIZES, seed=1, fraction=0.8).identity


# ---- windows


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64, 5000])
def test_windows_are_the_documents_end_to_end(seq_len):
    mixture = make_mixture(*SIZES)
    windows, tokens = Windows(mixture, seq_len), tokens_of(mixture)
    assert len(mixture.stream) > 3 * BLOCK
    inputs, labels = (torch.cat(part).tolist() for part in zip(*windows, strict=True))
    count = len(tokens) - 1
    assert len(inputs) == len(labels) == len(windows) * seq_len
    assert len(inputs) - count < seq_len
    assert inputs[:count] == tokens[:-1]
    assert labels[:count] == tokens[1:]
    assert set(labels[count:]) <= {IGNORE}
    assert windows.tokens == len(tokens)
    assert windows.label_count(0, len(windows)) == count


def test_any_window_at_any_time():
    windows = Windows(make_mixture(*SIZES), 16)
    in_order = list(windows)
    for index in (len(windows) - 1, 0, 17, 16):
        assert torch.equal(torch.stack(windows[index]), torch.stack(in_order[index]))
        assert windows.label_count(index, index + 1) == (in_order[index][1] != IGNORE).sum()
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[index]


@settings(max_examples=30)
@given(document_sizes, document_sizes, st.integers(1, 20))
def test_what_a_window_consists_of(target, source, seq_len):
    mixture = make_mixture(target, source)
    windows, names = Windows(mixture, seq_len), places(mixture)
    lengths = [int(shard.documents["tokens"][n]) for _, shard, n in map(mixture.document, range(len(names)))]
    ends = list(itertools.accumulate(lengths))
    owners = [name for name, length in zip(names, lengths, strict=True) for _ in range(length)]
    for index in range(len(windows)):
        stop = min((index + 1) * seq_len + 1, ends[-1])  # the last label included
        assert windows.documents(index) == list(dict.fromkeys(owners[index * seq_len : stop]))
        begun = 1 + sum(end < stop for end in ends)
        consumed = windows.consumed(index + 1)
        for language in LANGUAGES:
            taken = [size for name, size in bytes_of(mixture)[:begun] if name == language]
            assert consumed[f"{language}_documents"] == len(taken)
            assert consumed[f"{language}_bytes"] == sum(taken)
    assert windows.consumed(0) == {
        "target_bytes": 0,
        "target_documents": 0,
        "source_bytes": 0,
        "source_documents": 0,
        "position": 0,
    }


def test_no_text_is_no_windows():
    assert len(Windows(make_mixture(*SIZES, size=0), 16)) == 0
