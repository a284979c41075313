"""Files of conversations in every format, what is wrong with one named with its line, and names of languages."""

import argparse
import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from small_chats import CHATS, all_ids, chatml, sharegpt, write_lines

from elo.common.errors import UserError
from elo.data.conversation_records import language_list, language_name
from elo.data.conversations import load_conversations
from elo.text.chat_format import chat_format
from elo.text.tokenizer import load_tokenizer


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
    link = tmp_path / "link.json"
    link.symlink_to("a.json")
    once, _ = load_conversations([link, tmp_path / "a.json"], format, seq_len=1000)
    assert len(once) == len(CHATS) and once.files == [f"{tmp_path}/a.json"]


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
    ('{"messages": [], "messages": []}', "not usable as JSON ('messages' is there twice)"),
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
    (tmp_path / "empty.jsonl").write_text("")
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "text": ["x"]}), tmp_path / "columns.parquet")
    columns = [pyarrow.array([CHATS[0]]), pyarrow.array([CHATS[1]])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, ["messages"] * 2), tmp_path / "twice.parquet")
    turn = pyarrow.StructArray.from_arrays([pyarrow.array(["x"])] * 3, ["role", "content", "content"])
    turns = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1], pyarrow.int32()), turn)
    pyarrow.parquet.write_table(pyarrow.table({"messages": turns}), tmp_path / "within.parquet")
    mistakes = {
        "twice.parquet": "twice.parquet: column 'messages' is there twice",
        "within.parquet": "within.parquet: damaged or incomplete: Converting to Python dictionary is not supported",
        "x.txt": "x.txt: not a file of conversations; supported are .jsonl, .ndjson, .json (each also",
        "empty.jsonl": "too few conversations: 1 needed, 0 usable; in the files there are none",
        "columns.parquet": "columns.parquet: needs a column 'conversations' or 'messages', and has id, text",
        "missing.jsonl": "missing.jsonl: cannot be read: No such file",
        "missing.parquet": "missing.parquet: cannot be read: No such file",
    }
    for name, mistake in mistakes.items():
        with pytest.raises(UserError, match=re.escape(mistake)):
            load_conversations([tmp_path / name], format, seq_len=1000)


def test_names_and_codes_of_languages():
    assert language_list("ko,EN, japanese ,pt-BR") == ["Korean", "English", "Japanese", "Portuguese"]
    assert language_name("Haitian creole") == language_name("HAITIAN Creole")
    for text in ("ko,Korean", "ko,,en", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="such as ko,en"):
            language_list(text)


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
