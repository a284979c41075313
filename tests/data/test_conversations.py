"""Which conversations are drawn, what of them is trained, where long ones end, what is held out."""

import math
import shutil
from itertools import pairwise

import pytest
from small_chats import CHATS, all_ids, chat, sharegpt, tagengo, texts_of, write_lines
from tokenizer_styles import MISTRAL_V3

from elo.common.errors import UserError
from elo.data.conversations import load_conversations
from elo.model.loss import IGNORE
from elo.text.chat_format import chat_format
from elo.text.tokenizer import load_tokenizer


def mistral_format(directory):
    shutil.copy(MISTRAL_V3, directory / "tokenizer.model")
    return chat_format(directory, load_tokenizer(directory))


def test_labels_are_the_answers_and_their_ends(tmp_path, format):
    conversations, _ = load_conversations([write_lines(tmp_path / "x.jsonl", map(sharegpt, CHATS))], format, 1000)
    for index, messages in enumerate(CHATS):
        tokens, labels = conversations[index]
        ids, trained = format.conversation(messages)
        assert tokens.tolist() == ids[:-1]
        assert labels.tolist() == [id if counts else IGNORE for id, counts in pairwise_labels(ids, trained)]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert format.tokenizer.decode(labels[labels != IGNORE]) == "".join(answers)
        assert int((labels != IGNORE).sum()) == conversations.table["labels"][index] == sum(trained)
        assert conversations.table["bytes"][index] == sum(len(message["content"].encode()) for message in messages)


def pairwise_labels(ids, trained):
    return [next_pair for _, next_pair in pairwise(zip(ids, trained, strict=True))]


def test_a_conversation_ends_with_an_answer_that_is_trained(tmp_path, format):
    messages = chat("one", "first", "two", "second", "three", "third")
    messages[1]["weight"] = messages[5]["weight"] = 0
    path = write_lines(tmp_path / "x.jsonl", [{"messages": messages}])
    conversations, report = load_conversations([path], format, 1000)
    assert texts_of(conversations, format)[0].count("third") == 0
    _, labels = conversations[0]
    assert format.tokenizer.decode(labels[labels != IGNORE]) == "second"
    assert report.unanswered == 0


def test_answers_without_text_are_not_trained(tmp_path, format):
    records = [chat("a", "", "b", "c"), chat("a", "b", "c", " \n"), chat("a", ""), chat("a", "b")]
    path = write_lines(tmp_path / "x.jsonl", map(sharegpt, records))
    conversations, report = load_conversations([path], format, 1000)
    assert len(conversations) == 3
    trained = []
    for index in range(3):
        _, labels = conversations[index]
        trained.append(format.tokenizer.decode(labels[labels != IGNORE]))
    assert trained == ["c", "b", "b"]
    assert report.lines()[1:] == ["dropped 3: an answer without text", "dropped 1: no answer in it is to be trained"]


LONG = chat("one", "first", "two", "second", "three", "third, " * 9, system="Be short.")
# A last turn without an answer, answers in two messages, and no answer at all.
UNEVEN = [*chat("one", "first"), *chat("two", "second")[::-1][:1], *chat("three", "third", "four")]


@pytest.mark.parametrize("family", ["chatml", "mistral"])
@pytest.mark.parametrize("messages", [LONG, UNEVEN])
def test_long_conversations_end_at_the_last_answer_that_fits(tmp_path, format, family, messages):
    if family == "mistral":
        format = mistral_format(tmp_path)
    path = write_lines(tmp_path / "x.jsonl", [sharegpt(messages)])
    # A turn of the assistant ends where the user, or nobody, goes on.
    roles = [*(message["role"] for message in messages), "nobody"]
    ends = [end for end in range(1, len(roles)) if roles[end - 1] == "assistant" != roles[end]]
    fitting = {end: format.conversation(messages[:end])[0] for end in ends}
    seen = set()
    for seq_len in range(1, len(fitting[ends[-1]]) + 3):
        expected = [end for end in ends if len(fitting[end]) <= seq_len]
        if not expected:
            with pytest.raises(UserError, match="1 dropped: no answer fits into --seq-len"):
                load_conversations([path], format, seq_len)
            continue
        conversations, report = load_conversations([path], format, seq_len)
        assert all_ids(conversations, 0) == fitting[expected[-1]]
        assert report.cut == (expected != ends)
        assert report.unanswered == (expected == ends and messages is UNEVEN)
        seen.add(expected[-1])
    assert seen == set(ends)


def test_what_is_cut_and_dropped_is_reported(tmp_path, format):
    records = [LONG, chat("only a question"), chat("x" * 500, "y"), UNEVEN, CHATS[0], CHATS[2]]
    path = write_lines(tmp_path / "x.jsonl", map(sharegpt, records))
    conversations, report = load_conversations([path], format, seq_len=100)
    assert report.lines() == [
        "4 conversations: 4 of 6",
        "1 of them end early, with the last answer that fits into --seq-len",
        "1 of them without the last message, which has no answer",
        "dropped 1: no answer in it",
        "dropped 1: no answer fits into --seq-len",
    ]
    assert [conversations.place(index)[-2:] for index in range(4)] == [":1", ":4", ":5", ":6"]


def test_the_held_out_part_is_stratified(tmp_path, format):
    path = tagengo(tmp_path / "t.jsonl", {"Korean": 100, "English": 50, "Thai": 3, "Lao": 1})
    conversations, _ = load_conversations([path], format, 1000)
    training, held_out = conversations.split(0.1, seed=0)
    counts = {name: 0 for name in conversations.languages}
    for number in held_out.table["language"]:
        counts[held_out.languages[number]] += 1
    assert counts == {"Korean": 10, "English": 5, "Thai": 1, "Lao": 0}
    assert sorted(texts_of(training, format) + texts_of(held_out, format)) == sorted(texts_of(conversations, format))
    assert texts_of(conversations.split(0.1, seed=0)[1], format) == texts_of(held_out, format)
    assert texts_of(conversations.split(0.1, seed=1)[1], format) != texts_of(held_out, format)
    assert len(conversations.split(0, seed=0)[1]) == 0


def test_one_conversation_cannot_be_split(tmp_path, format):
    conversations, _ = load_conversations([write_lines(tmp_path / "x.jsonl", [sharegpt(CHATS[0])])], format, 1000)
    with pytest.raises(UserError, match=r"--validation-fraction 0.5: 1 conversations cannot be split"):
        conversations.split(0.5, seed=0)


# ---- which are drawn: of each language the same number, and always the same ones


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
