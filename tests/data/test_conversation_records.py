"""Records of conversations: fields that change what is learned are obeyed, or refused by name."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from small_chats import chat, sharegpt, write_lines

from elo.common.errors import UserError
from elo.data.conversation_records import MOST_UNREAD, SWITCHES, is_blank, read_messages
from elo.data.conversations import load_conversations

MESSAGES = chat("Hi", "Hello!", "And?", "And so.")


def both(messages=MESSAGES, **fields):
    """The record as OpenAI and as ShareGPT write it."""
    return {"messages": messages, **fields}, sharegpt(messages, **fields)


def with_fields(*each, record=None):
    """A record with more fields in each message."""
    return {"messages": [{**m, **more} for m, more in zip(MESSAGES, each, strict=True)], **(record or {})}


def ids_and_trained(conversations, index=0):
    row = conversations.table[index]
    where = slice(int(row["offset"]), int(row["offset"] + row["tokens"]))
    return conversations.ids[where].tolist(), conversations.trained[where].tolist()


def said(format, ids, trained):
    return format.tokenizer.decode(id for id, counts in zip(ids, trained, strict=True) if counts)


def read(record):
    """The messages, and the numbers of those that are trained."""
    messages = read_messages(record)
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    return plain, [at for at, message in enumerate(messages) if message["train"]]


# ---- the system message


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_records_system_message_is_its_first(name):
    expected = chat("Hi", "Hello!", "And?", "And so.", system=" Be kind. "), [2, 4]
    for record in (*both(**{name: " Be kind. "}), *both(expected[0], **{name: " Be kind. "})):
        assert read(record) == expected
    for record in (*both(**{name: ""}), *both(**{name: None})):
        assert read(record) == (MESSAGES, [1, 3])
    assert read(both(system="", system_prompt=" Be kind. ")[0]) == expected
    assert read(with_fields({}, {"weight": 0}, {}, {}, record={name: " Be kind. "})) == (expected[0], [4])


# ---- what is trained

SWITCHED_OFF = [
    *(with_fields({}, {name: 0.0}, {}, {name: ""}) for name in SWITCHES if name != "masked"),
    with_fields({}, {"masked": True}, {}, {"masked": False}),
    with_fields({"weight": 0}, {"weight": 0, "train": False, "masked": 1}, {"loss": False}, {"weight": 1}),
    {"messages": MESSAGES, "loss_mask": [0, 0, 0, 1]},
    {"messages": MESSAGES, "weights": [None, 0, None, 1.0]},
    {"messages": MESSAGES, "masked": [True, True, True, False]},
    with_fields({}, {"weight": 0}, {}, {}, record={"loss_mask": [0, 0, 0, 1]}),
]


@pytest.mark.parametrize("record", SWITCHED_OFF, ids=lambda record: json.dumps(record)[-60:])
def test_an_answer_that_is_switched_off_is_context_and_not_in_the_loss(record, format, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [record])
    conversations, report = load_conversations([path], format, 1000)
    ids, trained = ids_and_trained(conversations)
    assert ids == format.conversation(MESSAGES)[0]
    assert trained == [was and at > len(ids) // 2 for at, was in enumerate(format.conversation(MESSAGES)[1])]
    assert said(format, ids, trained) == "And so."
    assert sum(trained) == conversations.table["labels"][0]
    assert report.lines() == ["1 conversations: 1 of 1"]


@pytest.mark.parametrize("fields", [{"weight": 1}, {"train": True}, {"masked": False}, {"loss": None}, {"weights": []}])
def test_switches_of_a_record_that_change_nothing(fields, format, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", both(**fields))
    conversations, _ = load_conversations([path], format, 1000)
    for index in (0, 1):
        assert ids_and_trained(conversations, index) == tuple(format.conversation(MESSAGES))


def test_parquet_has_the_fields_too(format, tmp_path):
    records = [with_fields({}, {"weight": 0}, {}, {}, record={"system": "S", "tools": None, "id": 1})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "x.parquet")
    conversations, report = load_conversations([tmp_path / "x.parquet"], format, 1000)
    ids, trained = ids_and_trained(conversations)
    assert ids == format.conversation([{"role": "system", "content": "S"}, *MESSAGES])[0]
    assert said(format, ids, trained) == "And so."
    assert report.lines()[1:] == ["fields that are not read: id"]


# ---- what is refused

CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
REFUSED = [
    *((with_fields({}, {name: CALL}, {}, {}), f"field '{name}' is not supported") for name in ("tools", "tool_calls")),
    *(
        (with_fields({}, {}, {}, {name: "text"}), f"field '{name}' is not supported ('text' of message 4)")
        for name in ("function_call", "reasoning_content", "thinking", "refusal", "image", "audio", "train_detail")
    ),
    *(
        (both(**{name: ["x"]})[1], f"field '{name}' is not supported (['x'] of the record)")
        for name in ("tools", "functions", "images", "videos", "reasoning_content", "mask")
    ),
    (both(mask="Assistant")[1], "field 'mask' is not supported"),
    (with_fields({}, {"mask": False}, {}, {}), "field 'mask' is not supported (False of message 2)"),
    (with_fields({}, {"weight": 0.5}, {}, {}), "field 'weight' is neither 0 nor 1 (0.5)"),
    (with_fields({}, {"train": "no"}, {}, {}), "field 'train' is neither 0 nor 1 ('no')"),
    (both(loss=2)[0], "field 'loss' is neither"),
    (with_fields({"train": True}, {}, {}, {}), "only the assistant's messages can be trained (not message 1)"),
    (both(loss_mask=[0, 1])[0], "field 'loss_mask' has not one value for each message"),
    (both(loss_mask=[1, 1, 1, 1])[0], "only the assistant's messages can be trained (not message 1)"),
    (with_fields({}, {"train": True, "weight": 0}, {}, {}), "differ in whether a message is trained (message 2)"),
    (with_fields({}, {"train": True}, {}, {}, record={"train": False}), "differ in whether a message is trained"),
    (both(system="A", system_prompt="B")[0], "fields 'system' and 'system_prompt' differ"),
    (both(chat("Hi", "Ho", system="A"), system="B")[0], "two system messages that differ"),
    (both(system=["A"])[0], "a system message that is not a string (['A'])"),
    ({**both()[0], **sharegpt(chat("a", "b"))}, "fields 'conversations' and 'messages' differ"),
    ({"messages": chat("a", "b"), **sharegpt(chat("a", "c"))}, "fields 'conversations' and 'messages' differ"),
    ({"messages": [{"role": "user", "from": "gpt", "content": "x"}]}, "fields 'from' and 'role' differ"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "its content is [{'type': 'image_url'}]"),
    *(({"messages": [{"role": role, "content": "x"}]}, f"role '{role}'") for role in ("tool", "function", "developer")),
]


@pytest.mark.parametrize(("record", "mistake"), REFUSED, ids=[mistake for _, mistake in REFUSED])
def test_what_no_model_here_can_be_taught_is_refused_by_name(record, mistake, format, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [both()[0], record])
    with pytest.raises(UserError) as error:
        load_conversations([path], format, 1000)
    assert str(error.value).startswith(f"{path}:2: ")
    assert mistake in str(error.value)
    conversations, report = load_conversations([path], format, 1000, skip_malformed=True)
    assert len(conversations) == 1
    assert report.lines()[1].startswith("skipped 1: ")


def test_fields_without_a_value_say_nothing():
    nothing = [{"tool_calls": None, "function_call": {}}, {"tool_calls": [], "image": ""}, {"refusal": None}, {}]
    record = with_fields(*nothing, record={"tools": "[]", "images": [None], "system": None, "mask": "User"})
    assert read(record) == (MESSAGES, [1, 3])
    union = [{"from": None, "value": None, **message} for message in MESSAGES]  # as Parquet has both dialects
    assert read({"conversations": None, "messages": union}) == (MESSAGES, [1, 3])


def test_fields_that_nobody_knows_are_named():
    unread = set()
    read_messages(with_fields({"name": "A"}, {}, {}, {}, record={"id": 3, "language": "ko"}), unread)
    assert unread == {"id", "name of messages"}
    read_messages(both(**{f"x{number}": 1 for number in range(1000)})[0], unread)
    assert len(unread) == MOST_UNREAD


def test_what_is_blank():
    assert all(map(is_blank, ["", " \n\t", "\u200b", "\u3000\ufeff"]))
    assert not any(map(is_blank, [".", " 가 ", "\U0001f600", "\u200b-"]))
