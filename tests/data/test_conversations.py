"""Conversations from files: what is drawn, what is trained, what is held out."""

import argparse
import gzip
import json
import math
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import mistral_common
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from small_chats import chat, chatml, sharegpt, write_lines

from elo.common.errors import UserError
from elo.data.conversation_files import language_list, language_name
from elo.data.conversations import load_conversations
from elo.model.loss import IGNORE
from elo.text.chat_format import chat_format
from elo.text.tokenizer import load_tokenizer

MISTRAL_V3 = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"


@pytest.fixture(scope="module")
def format(tmp_path_factory):
    return chatml(tmp_path_factory.mktemp("chatml"))


def mistral_format(directory):
    shutil.copy(MISTRAL_V3, directory / "tokenizer.model")
    return chat_format(directory, load_tokenizer(directory))


CHATS = [
    chat("Hi", "Hello!", "And?", "And so."),
    chat("둘째로", "더 많은 글이 필요하다.", system="S"),
    chat("a\n\nb", "c"),
]


def tagengo(path, counts):
    """A file with so many conversations of each language, mixed."""
    records = [
        sharegpt(chat(f"{language} {number}", "답 " + "x " * (number % 9)), language=language)
        for language, count in counts.items()
        for number in range(count)
    ]
    np.random.RandomState(0).shuffle(records)
    return write_lines(path, records)


def texts_of(conversations, format):
    """The text of every conversation, special tokens left out."""
    return [format.tokenizer.decode(all_ids(conversations, index)) for index in range(len(conversations))]


def all_ids(conversations, index):
    row = conversations.table[index]
    return conversations.ids[int(row["offset"]) : int(row["offset"] + row["tokens"])].tolist()


# ---- files


def write_all_formats(directory):
    """The same conversations as every tool writes them; the paths."""
    openai = [{"messages": messages} for messages in CHATS]
    lines = "".join(json.dumps(record) + "\n" for record in map(sharegpt, CHATS)).encode()
    files = {
        "a.json": json.dumps([sharegpt(messages) for messages in CHATS], ensure_ascii=False).encode(),
        "bom.json": b"\xef\xbb\xbf" + json.dumps(openai).encode(),
        "b.jsonl": lines,
        "blank.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\n"),
        "c.jsonl.gz": gzip.compress("".join(json.dumps(record) + "\n" for record in openai).encode()),
        "d.jsonl.zst": zstandard.compress(lines),
        "lines.json": lines,
        "g.json.gz": gzip.compress(json.dumps(openai).encode()),
        "h.ndjson.zst": zstandard.compress(lines),
        "names.jsonl": lines.replace(b'"human"', b'"User"').replace(b'"gpt"', b'"ChatGPT"'),
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)
    for name, records in (("e.parquet", list(map(sharegpt, CHATS))), ("F.PARQUET", openai)):
        records = [{"id": number, **record} for number, record in enumerate(records)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), directory / name)
    return [directory / name for name in (*files, "e.parquet", "F.PARQUET")]


def test_every_format_gives_the_same_conversations(tmp_path, format):
    expected = [format.conversation(messages)[0] for messages in CHATS]
    for path in write_all_formats(tmp_path):
        conversations, _ = load_conversations([path], format, seq_len=1000)
        assert [all_ids(conversations, index) for index in range(3)] == expected, path
    both, report = load_conversations([tmp_path / "a.json", tmp_path / "blank.jsonl"], format, seq_len=1000)
    assert [both.place(index) for index in range(6)] == [
        *(f"{tmp_path}/a.json record {number}" for number in (1, 2, 3)),
        *(f"{tmp_path}/blank.jsonl:{line}" for line in (1, 3, 5)),
    ]
    assert report.lines() == ["6 conversations: 6 of 6"]


def test_conversations_that_the_template_refuses(tmp_path):
    """Named by their place, or passed over and counted."""
    chatml(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        "{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    )
    format = chat_format(tmp_path, load_tokenizer(tmp_path))
    path = write_lines(tmp_path / "chats.jsonl", map(sharegpt, CHATS))
    with pytest.raises(UserError, match=r"chats.jsonl:2: the chat template does not take it .*No system role"):
        load_conversations([path], format, seq_len=1000)
    conversations, report = load_conversations([path], format, seq_len=1000, skip_malformed=True)
    assert len(conversations) == 2
    assert report.malformed == {"the chat template does not take it": [1, f"{path}:2"]}


GOOD = json.dumps(sharegpt(CHATS[0]))
MALFORMED = [
    ("{", "not usable as JSON"),
    ("[1]", "not a JSON object"),
    ("[" * 100_000, "not usable as JSON"),
    ('{"text": "x"}', "no field 'conversations' or 'messages' (it has 'text')"),
    ('{"conversations": "x"}', "field 'conversations' is not a list of objects"),
    ('{"messages": ["x"]}', "field 'messages' is not a list of objects"),
    ('{"messages": []}', "not a conversation (a conversation without messages)"),
    ('{"messages": [{"role": "user"}]}', "message 1: its content is None, not a string"),
    ('{"messages": [{"role": ["user"], "content": ""}]}', "message 1 has the role ['user']"),
    ('{"conversations": [{"from": "bing", "value": ""}]}', "message 1 has the role 'bing'; roles are system, user"),
    ('{"conversations": [{"from": "gpt", "value": ""}]}', "the assistant speaks first"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "a lone surrogate"),
    ('{"language": 3, "messages": []}', "field 'language' is not a string"),
]


@pytest.mark.parametrize(("line", "mistake"), MALFORMED, ids=[mistake[:40] for _, mistake in MALFORMED])
def test_malformed_records(tmp_path, format, line, mistake):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(UserError) as error:
        load_conversations([path], format, seq_len=1000)
    assert str(error.value).startswith(f"{path}:3: ")
    assert mistake in str(error.value)
    assert "--skip-malformed" in str(error.value)
    conversations, report = load_conversations([path], format, seq_len=1000, skip_malformed=True)
    assert len(conversations) == 2
    assert f"(first at {path}:3)" in report.lines()[1]


def test_malformed_records_of_other_formats(tmp_path, format):
    (tmp_path / "x.json").write_text(f"[{GOOD}, {{}}]")
    records = [sharegpt(CHATS[0]), {"conversations": [{"from": "human", "value": None}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "x.parquet")
    for name, place in (("x.json", " record 2: no field"), ("x.parquet", ":2: not a conversation (message 1")):
        with pytest.raises(UserError) as error:
            load_conversations([tmp_path / name], format, seq_len=1000)
        assert str(error.value).startswith(f"{tmp_path / name}{place}")


def test_files_that_cannot_be_used(tmp_path, format):
    (tmp_path / "x.txt").write_text(GOOD)
    (tmp_path / "cut.json").write_text(f"[{GOOD}, {GOOD}")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD.encode())[:-9])
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "text": ["x"]}), tmp_path / "columns.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "columns.parquet").read_bytes()[:-9])
    mistakes = {
        "x.txt": "not a file of conversations; supported are .jsonl, .ndjson, .json (each also",
        "cut.json": "damaged or incomplete: it ends within its array",
        "empty.jsonl": "too few conversations: 1 needed, 0 usable; in the files there are none",
        "cut.jsonl.gz": "damaged or incomplete",
        "columns.parquet": "needs a column 'conversations' or 'messages', and has id, text",
        "cut.parquet": "damaged or incomplete",
        "missing.json": "No such file",
        "missing.jsonl": "No such file",
        "missing.parquet": "cannot be read",
    }
    for name, mistake in mistakes.items():
        with pytest.raises(UserError) as error:
            load_conversations([tmp_path / name], format, seq_len=1000)
        assert mistake in str(error.value)
        assert str(tmp_path / name) in str(error.value) or name == "empty.jsonl"


def test_parquet_without_pyarrow(tmp_path, format, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"x.parquet: reading Parquet needs `pip install pyarrow`"):
        load_conversations([tmp_path / "x.parquet"], format, seq_len=1000)


# ---- languages and samples


def test_names_and_codes_of_languages():
    assert language_list("ko,EN, japanese ,pt-BR") == ["Korean", "English", "Japanese", "Portuguese"]
    assert language_name("Haitian creole") == language_name("HAITIAN Creole")
    for text in ("ko,Korean", "ko,,en", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="such as ko,en"):
            language_list(text)


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
    path = tagengo(tmp_path / "t.jsonl", {"Korean": 40})
    texts = [text for seed in range(100) for text in drawn(path, format, samples=10, seed=seed)[0]]
    counts = [texts.count(text) for text in set(texts)]
    assert len(counts) == 40
    assert max(abs(count - 25) for count in counts) < 5 * math.sqrt(100 * 0.25 * 0.75)


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


def test_a_file_without_languages(tmp_path, format):
    for path in write_all_formats(tmp_path):
        with pytest.raises(UserError, match=r"(:| record )1: no 'language', which --languages needs"):
            load_conversations([path], format, seq_len=1000, languages=["Korean"], skip_malformed=True)


def test_tagengo_as_it_is_published(tmp_path, format):
    records = [
        sharegpt(messages, conversation_id=str(number), language=language, response=["x", "stop"])
        for number, (messages, language) in enumerate(zip(CHATS, ["Korean", "English", None], strict=True))
    ]
    path = tmp_path / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    conversations, report = load_conversations([path], format, 1000, ["English", "Korean"], samples=2)
    assert report.drawn == {"English": 1, "Korean": 1}
    assert [conversations.place(index) for index in (0, 1)] == [f"{path}:1", f"{path}:2"]
    assert [conversations.languages[number] for number in conversations.table["language"]] == ["Korean", "English"]


# ---- what is trained


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
    ends = [
        end
        for end in range(1, len(messages) + 1)
        if messages[end - 1]["role"] == "assistant" and [m["role"] for m in messages[end : end + 1]] != ["assistant"]
    ]
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


def test_dropped_conversations_are_not_drawn(tmp_path, format):
    """The numbers stay equal: another one of that language is drawn instead."""
    path = tagengo(tmp_path / "t.jsonl", {"Korean": 90, "English": 90})
    fits = len(format.conversation(chat("Korean 80", "답 " + "x " * 4))[0])
    conversations, report = load_conversations([path], format, fits, ["Korean", "English"], samples=60)
    assert report.drawn == {"Korean": 30, "English": 30}
    assert report.dropped["no answer fits into --seq-len"] > 0
    assert conversations.table["tokens"].max() <= fits


# ---- held out


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
