"""What of conversations is trained, where long ones end, what is held out."""

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


@pytest.mark.parametrize("off", [0, False, 0.0])
@pytest.mark.parametrize("name", ["weight", "loss_mask"])
def test_a_switch_leaves_an_answer_as_context(tmp_path, format, name, off):
    messages = chat("one", "first", "two", "second", "three", "third")
    plain = write_lines(tmp_path / "plain.jsonl", [{"messages": messages}])
    messages[1][name], messages[3][name], messages[5][name] = off, not off, None
    messages[0][name] = off  # as it is anyway
    path = write_lines(tmp_path / "x.jsonl", [{"messages": messages, "tools": [], "images": None}])
    conversations, _ = load_conversations([path], format, 1000)
    whole, _ = load_conversations([plain], format, 1000)
    assert all_ids(conversations, 0) == all_ids(whole, 0)
    _, labels = conversations[0]
    assert format.tokenizer.decode(labels[labels != IGNORE]) == "secondthird"
    assert conversations.table["labels"][0] == int((labels != IGNORE).sum())
    # The conversation ends with an answer that is trained.
    messages[5][name] = off
    conversations, report = load_conversations([write_lines(path, [{"messages": messages}])], format, 1000)
    assert texts_of(conversations, format)[0].count("third") == 0
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
