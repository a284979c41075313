"""Files of conversations to messages: which fields of a record say what, and which something that a model here cannot
be taught. Files are .jsonl, .ndjson, .json (plain, .gz, .zst) and .parquet.

A record has its messages as ShareGPT does, {"conversations": [{"from": "human", "value": ...}, ...]}, or as OpenAI
does, {"messages": [{"role": "user", "content": ...}, ...]}, and perhaps a "language", such as "Korean" or "ko". Its
system message may be a field beside them. Answers can be told not to be trained, as by {"weight": 0} in a message, for
all of them by such a field beside the messages, or by a list there with a value for each message; they stay what later
answers follow. Fields without a value say nothing.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import shown, unique
from elo.data.json_records import JSON_ENDINGS, MalformedError, read_json_records
from elo.data.parquet import read_rows
from elo.text.chat_format import check_messages
from elo.text.chat_template import TRAIN, Messages

SUPPORTED = ".jsonl, .ndjson, .json (each also as .gz or .zst) and .parquet"
LISTS = ("conversations", "messages")
LANGUAGE = "language"
SYSTEM = ("system", "system_prompt", "system_message")
ROLE, CONTENT = ("from", "role"), ("value", "content")
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}

# True or 1: the answer is trained, false or 0: it is not. Of "masked" it is the other way round.
TRAINED = ("weight", "weights", "loss", "loss_mask", "loss_weight", "train", "trained", "training", "trainable")
SWITCHES = (*TRAINED, "train_on_turn", "masked")
MEDIA = ("image", "images", "audio", "audios", "video", "videos", "documents")
UNSUPPORTED = ("tools", "functions", "tool_calls", "function_call", "reasoning_content", *MEDIA)
# "mask" means what is trained to some and what is not to others; the details are of parts of an answer.
UNCLEAR = ("mask", "train_detail", "training_detail")
OF_RECORD = (*LISTS, LANGUAGE, *SYSTEM, *SWITCHES, *UNSUPPORTED, *UNCLEAR)
UNSUPPORTED_OF_MESSAGE = (*UNSUPPORTED, "tool_call_id", "reasoning", "thinking", "refusal")
OF_MESSAGE = {*ROLE, *CONTENT, *SWITCHES, *UNSUPPORTED_OF_MESSAGE, *UNCLEAR}

NOTHING = (None, "", [], {}, "[]", "{}", "null")
MOST_UNREAD = 100  # names that are remembered
_BLANK = re.compile(r"[\s\u00ad\u200b-\u200f\u2060\ufeff]*")  # also what has no width


# ---- messages


def read_messages(record: dict[str, Any], unread: set[str] | None = None) -> Messages:
    """The messages of a record, with TRAIN in each; the names of fields that nobody knows here go into `unread`.

    Raises `MalformedError` unless they are a conversation.
    """
    names = [name for name in LISTS if record.get(name) is not None]
    if not names:
        has = ", ".join(map(repr, list(record)[:5]))
        raise MalformedError(f"no field {' or '.join(map(repr, LISTS))}", f"it has {has or 'no fields'}")
    chats = [_read(record, name) for name in names]
    if chats[0] != chats[-1]:
        raise MalformedError(f"fields {' and '.join(map(repr, names))} differ")
    remember(unread, record.keys() - OF_RECORD)
    remember(unread, (f"{name} of messages" for turn in record[names[0]] for name in turn.keys() - OF_MESSAGE))
    return chats[0]


def remember(unread: set[str] | None, names: Iterable[str]) -> None:
    for name in names if unread is not None else ():
        if len(unread) < MOST_UNREAD:
            unread.add(name)


def _read(record: dict[str, Any], name: str) -> Messages:
    turns = record[name]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise MalformedError(f"field {name!r} is not a list of objects")
    _refuse(record, UNSUPPORTED, "of the record")
    mask = record.get("mask")
    if not isinstance(mask, str) or _role(mask) != "user":  # which is NeMo's: whose words are not trained
        _refuse(record, UNCLEAR, "of the record")
    messages = []
    for at, turn in enumerate(turns, start=1):
        _refuse(turn, (*UNSUPPORTED_OF_MESSAGE, *UNCLEAR), f"of message {at}")
        role, content = (_only(turn, keys) for keys in (ROLE, CONTENT))
        messages.append({"role": _role(role), "content": content})
    try:
        check_messages(messages)
    except UserError as error:
        raise MalformedError("not a conversation", str(error)) from None
    for message, is_trained in zip(messages, _trained(record, turns, messages), strict=True):
        message[TRAIN] = is_trained
    system = _only(record, SYSTEM)
    if system not in (None, ""):
        if not isinstance(system, str):
            raise MalformedError("a system message that is not a string", shown(system))
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system, TRAIN: False})
        elif messages[0]["content"] != system:
            raise MalformedError("two system messages that differ")
    try:
        text_bytes(messages)
    except UnicodeEncodeError:  # JSON can write "\ud800", which no UTF-8 can hold
        raise MalformedError("a lone surrogate, which is not text") from None
    return messages


def _role(role: Any) -> Any:
    return SPEAKERS.get(role.lower(), role.lower()) if isinstance(role, str) else role


def _refuse(fields: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    for name in names:
        value = fields.get(name)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        says_nothing = value in NOTHING or (bool(inner) and all(item in NOTHING for item in inner))
        if not says_nothing and (value is not False or name == "mask"):
            raise MalformedError(f"field {name!r} is not supported", f"{shown(value)} {where}")


def _only(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """What the one of these fields says that says something; several must agree."""
    given = {name: fields[name] for name in names if fields.get(name) is not None}
    spoken = {name: value for name, value in given.items() if value != ""} or given
    values = list(spoken.values())
    if any(not isinstance(value, str) or value != values[0] for value in values[1:]):
        raise MalformedError(f"fields {' and '.join(map(repr, spoken))} differ")
    return values[0] if values else None


def _trained(record: dict[str, Any], turns: list[Any], messages: Messages) -> list[bool]:
    """Of each message whether it is trained: the assistant's are, unless a switch says that they are not."""
    said: list[set[bool]] = [set(_switches(turn)) for turn in turns]
    for name in SWITCHES:
        value = record.get(name)
        if isinstance(value, list) and value:
            if len(value) != len(turns):
                raise MalformedError(f"field {name!r} has not one value for each message")
            values = value
        else:
            values = [value if message["role"] == "assistant" else None for message in messages]
        for meant, one in zip(said, values, strict=True):
            meant.update(_switches({name: one}))
    for at, (meant, message) in enumerate(zip(said, messages, strict=True), start=1):
        if len(meant) > 1:
            raise MalformedError("fields differ in whether a message is trained", f"message {at}")
        if True in meant and message["role"] != "assistant":
            raise MalformedError("only the assistant's messages can be trained", f"not message {at}")
    return [
        message["role"] == "assistant" and False not in meant for message, meant in zip(messages, said, strict=True)
    ]


def _switches(fields: Mapping[str, Any]) -> Iterator[bool]:
    """Whether to train, as each of `SWITCHES` says that is there."""
    for name in SWITCHES:
        value = fields.get(name)
        if value in NOTHING:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise MalformedError(f"field {name!r} is neither 0 nor 1", shown(value))
        yield bool(value) != (name == "masked")


def is_blank(text: str) -> bool:
    return _BLANK.fullmatch(text) is not None


def text_bytes(messages: Messages) -> int:
    return sum(len(message["content"].encode()) for message in messages)


def message_digest(messages: Messages) -> bytes:
    """Of what is said up to the last answer, without the system's message and space around what anyone says."""
    said = [(message["role"], message["content"].strip()) for message in messages if message["role"] != "system"]
    ends = [end for end, (role, text) in enumerate(said, start=1) if role == "assistant" and not is_blank(text)]
    return hashlib.sha256(json.dumps(said[: max(ends, default=None)]).encode()).digest()


# ---- languages

ISO_639_1 = """
af Afrikaans, am Amharic, ar Arabic, az Azerbaijani, be Belarusian, bg Bulgarian, bn Bengali, bs Bosnian, ca Catalan,
cs Czech, cy Welsh, da Danish, de German, el Greek, en English, eo Esperanto, es Spanish, et Estonian, eu Basque,
fa Persian, fi Finnish, fr French, ga Irish, gl Galician, gu Gujarati, ha Hausa, he Hebrew, hi Hindi, hr Croatian,
hu Hungarian, hy Armenian, id Indonesian, ig Igbo, is Icelandic, it Italian, ja Japanese, jv Javanese, ka Georgian,
kk Kazakh, km Khmer, kn Kannada, ko Korean, ku Kurdish, ky Kyrgyz, la Latin, lo Lao, lt Lithuanian, lv Latvian,
mg Malagasy, mk Macedonian, ml Malayalam, mn Mongolian, mr Marathi, ms Malay, mt Maltese, my Burmese, ne Nepali,
nl Dutch, no Norwegian, pa Punjabi, pl Polish, ps Pashto, pt Portuguese, ro Romanian, ru Russian, rw Kinyarwanda,
sd Sindhi, si Sinhala, sk Slovak, sl Slovenian, so Somali, sq Albanian, sr Serbian, su Sundanese, sv Swedish,
sw Swahili, ta Tamil, te Telugu, tg Tajik, th Thai, tk Turkmen, tl Tagalog, tr Turkish, tt Tatar, ug Uyghur,
uk Ukrainian, ur Urdu, uz Uzbek, vi Vietnamese, xh Xhosa, yi Yiddish, yo Yoruba, zh Chinese, zu Zulu
"""
LANGUAGES: dict[str, str] = dict(entry.split() for entry in ISO_639_1.split(","))


def language_name(text: str) -> str:
    """The name of a language given as a name or a code, in any case: "ko", "ko-KR" and "KOREAN" are "Korean"."""
    code = text.strip().lower().replace("_", "-").split("-")[0]
    return LANGUAGES.get(code, text.strip().title())


def language_list(text: str) -> list[str]:
    names = [language_name(part) for part in text.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different languages, such as ko,en")
    return names


# ---- files


def read_conversation_records(path: str, unread: set[str] | None = None) -> Iterator[tuple[int, Any]]:
    """The records of a file with their numbers, see `place`; one that cannot be read is a `MalformedError`.

    The names of a Parquet file's other columns, which are not read, go into `unread`.
    """
    if path.lower().endswith(".parquet"):
        yield from enumerate(read_rows(path, partial(_columns, path, unread)), start=1)
    elif path.lower().endswith(JSON_ENDINGS):
        for number, raw, _ in read_json_records(path):
            try:
                yield number, raw if isinstance(raw, MalformedError) else json.loads(raw, object_pairs_hook=unique)
            except (ValueError, RecursionError) as error:
                yield number, MalformedError("not usable as JSON", str(error))
    else:
        raise UserError(f"{path}: not a file of conversations; supported are {SUPPORTED}")


def _columns(path: str, unread: set[str] | None, names: list[str]) -> list[str]:
    if not set(LISTS) & set(names):
        raise UserError(f"{path}: needs a column {' or '.join(map(repr, LISTS))}, and has {', '.join(names)}")
    remember(unread, (name for name in names if name not in OF_RECORD))
    return [name for name in OF_RECORD if name in names]


def read_language(record: Any) -> str | None:
    """The language of a record, None where it does not say. Raises `MalformedError`."""
    if isinstance(record, MalformedError):
        raise record
    if not isinstance(record, dict):
        raise MalformedError("not a JSON object")
    language = record.get(LANGUAGE)
    if not isinstance(language, str | None):
        raise MalformedError(f"field {LANGUAGE!r} is not a string")
    return None if language is None else language_name(language)


def message_digests(paths: Iterable[str]) -> set[bytes]:
    """The `message_digest` of every conversation in these files that is not malformed."""
    digests = set()
    for path in paths:
        for _, record in read_conversation_records(path):
            with suppress(MalformedError):
                read_language(record)
                digests.add(message_digest(read_messages(record)))
    return digests
