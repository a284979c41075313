"""Which conversations are drawn: of each language the same number, and always the same ones."""

import math

import pytest
from small_chats import chat, tagengo, texts_of

from elo.common.errors import UserError
from elo.data.conversations import load_conversations


def drawn(path, format, **options):
    conversations, report = load_conversations([path], format, seq_len=1000, **options)
    return texts_of(conversations, format), report


def test_the_same_number_of_each_language(tmp_path, format):
    path = tagengo(tmp_path / "t.jsonl", {"Korean": 40, "ENGLISH": 70, "ja": 50})
    both = ["Korean", "English"]
    texts, report = drawn(path, format, languages=both, samples=31)
    assert report.drawn == {"Korean": 16, "English": 15}
    assert sum("Korean" in text for text in texts) == 16
    assert sum("ENGLISH" in text for text in texts) == 15
    assert len(set(texts)) == 31
    assert report.lines() == ["31 conversations: 16 of 40 Korean, 15 of 70 English"]

    assert drawn(path, format, languages=both, samples=31)[0] == texts
    assert drawn(path, format, languages=both, samples=31, seed=1)[0] != texts
    # The same ones whatever the order and the number.
    assert set(drawn(path, format, languages=both[::-1], samples=30)[0]) < set(texts)

    assert drawn(path, format, languages=both)[1].drawn == {"Korean": 40, "English": 40}
    assert drawn(path, format)[1].drawn == {"Korean": 40, "English": 70, "Japanese": 50}
    assert sum(drawn(path, format, samples=50)[1].drawn.values()) == 50


def test_a_draw_is_uniform(tmp_path, format):
    path = tagengo(tmp_path / "t.jsonl", {"Korean": 24})
    texts = [text for seed in range(50) for text in drawn(path, format, samples=12, seed=seed)[0]]
    counts = [texts.count(text) for text in set(texts)]
    assert len(counts) == 24
    assert max(abs(count - 25) for count in counts) < 5 * math.sqrt(50 * 0.5 * 0.5)


def test_too_few_is_an_error_with_the_counts(tmp_path, format):
    path = tagengo(tmp_path / "t.jsonl", {"Korean": 4, "English": 10, "Thai": 2})
    cases = {
        (("Korean", "English"), 12): "6 Korean and 6 English needed, 4 Korean and 10 English usable; "
        "in the files there are 10 English, 4 Korean, 2 Thai",
        (("Korean", "Lao"), None): "1 Korean and 1 Lao needed, 4 Korean and 0 Lao usable; in the files",
        (("Korean", "English"), 1): "--samples 1 are fewer than the 2 languages",
        (None, 17): "17 needed, 16 usable; in the files there are 10 English",
    }
    for (languages, samples), mistake in cases.items():
        with pytest.raises(UserError) as error:
            drawn(path, format, languages=languages, samples=samples)
        assert mistake in str(error.value)


def test_dropped_conversations_are_not_drawn(tmp_path, format):
    """The numbers stay equal: another one of that language is drawn instead."""
    path = tagengo(tmp_path / "t.jsonl", {"Korean": 90, "English": 90})
    fits = len(format.conversation(chat("Korean 80", "답 " + "x " * 4))[0])
    conversations, report = load_conversations([path], format, fits, ["Korean", "English"], samples=60)
    assert report.drawn == {"Korean": 30, "English": 30}
    assert report.dropped["no answer fits into --seq-len"] > 0
    assert conversations.table["tokens"].max() <= fits
