"""Files of conversations to messages and their language: .jsonl, .ndjson, .json (plain, .gz, .zst) and .parquet.

A record has its messages as ShareGPT does, {"conversations": [{"from": "human", "value": ...}, ...]}, or as OpenAI
does, {"messages": [{"role": "user", "content": ...}, ...]}, and perhaps a "language", such as "Korean" or "ko", and a
"system" message beside them. A message of the assistant with "weight": 0, or another of `SWITCHES` that is false, is
context and not trained. What would change the meaning and is not supported, as calls of tools, is refused.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import shown
from elo.data.json_records import ENDINGS as JSON_ENDINGS
from elo.data.json_records import MalformedError, read_json_records
from elo.data.parquet import read_rows
from elo.text.chat_format import check_messages
from elo.text.chat_template import TRAIN, Messages

SUPPORTED = ".jsonl, .ndjson, .json (each also as .gz or .zst) and .parquet"
LISTS = ("conversations", "messages")
LANGUAGE = "language"
SYSTEMS = ("system", "system_prompt")
SWITCHES = ("weight", "train", "trainable", "training", "train_on_turn", "loss", "loss_mask")
# Refused unless empty: of a message, and of a record.
UNSUPPORTED = (
    *(
        "tools",
        "tool_calls",
        "tool_call_id",
        "functions",
        "function_call",
        "reasoning_content",
        "reasoning",
        "thinking",
    ),
    *("image", "images", "image_url", "audio", "audios", "video", "videos", "mask", "masked"),
)
EMPTY = (None, "", [], {})
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}

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


def read_conversation_records(path: str) -> Iterator[tuple[int, Any]]:
    """The records of a file with their numbers, see `place`; one that cannot be read is a `MalformedError`."""
    if path.lower().endswith(".parquet"):
        yield from enumerate(read_rows(path, partial(_columns, path)), start=1)
    elif path.lower().endswith(JSON_ENDINGS):
        for number, raw, _ in read_json_records(path):
            try:
                yield number, raw if isinstance(raw, MalformedError) else json.loads(raw)
            except (ValueError, RecursionError) as error:
                yield number, MalformedError(number, "not usable as JSON", str(error))
    else:
        raise UserError(f"{path}: not a file of conversations; supported are {SUPPORTED}")


def _columns(path: str, names: list[str]) -> list[str]:
    if not set(LISTS) & set(names):
        raise UserError(f"{path}: needs a column {' or '.join(map(repr, LISTS))}, and has {', '.join(names)}")
    return [name for name in (*LISTS, LANGUAGE, *SYSTEMS, *SWITCHES, *UNSUPPORTED) if name in names]


def read_language(record: Any, number: int) -> str | None:
    """The language of a record, None where it does not say. Raises `MalformedError`."""
    if isinstance(record, MalformedError):
        raise record
    if not isinstance(record, dict):
        raise MalformedError(number, "not a JSON object")
    language = record.get(LANGUAGE)
    if not isinstance(language, str | None):
        raise MalformedError(number, f"field {LANGUAGE!r} is not a string")
    return None if language is None else language_name(language)


def read_messages(record: dict[str, Any], number: int) -> Messages:
    """The messages of a record. Raises `MalformedError` unless they are a conversation."""
    name = next((name for name in LISTS if record.get(name) is not None), None)
    if name is None:
        names = ", ".join(map(repr, list(record)[:5]))
        raise MalformedError(number, f"no field {' or '.join(map(repr, LISTS))}", f"it has {names or 'no fields'}")
    if not isinstance(record[name], list) or not all(isinstance(turn, dict) for turn in record[name]):
        raise MalformedError(number, f"field {name!r} is not a list of objects")
    _refuse(record, (*UNSUPPORTED, *SWITCHES), number, "beside the messages ")
    messages = []
    for turn in record[name]:
        _refuse(turn, UNSUPPORTED, number)
        role, content = (turn.get(key, turn.get(other)) for key, other in (("from", "role"), ("value", "content")))
        if isinstance(role, str):
            role = SPEAKERS.get(role.lower(), role.lower())
        messages.append({"role": role, "content": content, TRAIN: _is_trained(turn, role, number)})
    for system in (record[key] for key in SYSTEMS if record.get(key) not in EMPTY):
        if messages and messages[0]["role"] == "system":
            if messages[0]["content"] != system:
                raise MalformedError(number, "two system messages", "one beside the messages and another among them")
        else:
            messages.insert(0, {"role": "system", "content": system, TRAIN: False})
    try:
        check_messages(messages)
    except UserError as error:
        raise MalformedError(number, "not a conversation", str(error)) from None
    try:
        text_bytes(messages)
    except UnicodeEncodeError:  # JSON can write "\ud800", which no UTF-8 can hold
        raise MalformedError(number, "a lone surrogate, which is not text") from None
    return messages


def _refuse(fields: dict[str, Any], names: tuple[str, ...], number: int, where: str = "") -> None:
    for name in names:
        if fields.get(name) not in EMPTY:
            raise MalformedError(number, f"field {name!r} {where}is not supported", f"it is {shown(fields[name])}")


def _is_trained(turn: dict[str, Any], role: object, number: int) -> bool:
    """Whether a message is trained as far as its switches tell: the assistant's are, if they have none."""
    told = {name: turn[name] for name in SWITCHES if turn.get(name) is not None}
    for name, value in told.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise MalformedError(number, f"field {name!r} of a message is neither 0 nor 1", f"it is {shown(value)}")
        if value and role != "assistant":
            raise MalformedError(number, f"field {name!r} of a message of the {role}: only the assistant's are trained")
    if len(set(map(bool, told.values()))) > 1:
        raise MalformedError(number, f"fields {' and '.join(told)} of a message do not agree")
    return role == "assistant" and all(told.values())


def text_bytes(messages: Messages) -> int:
    return sum(len(message["content"].encode()) for message in messages)
