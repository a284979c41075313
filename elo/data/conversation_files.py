"""Files of conversations to messages and their language: .json, .jsonl (plain, .gz, .zst) and .parquet.

A record has its messages as ShareGPT does, {"conversations": [{"from": "human", "value": ...}, ...]}, or as OpenAI
does, {"messages": [{"role": "user", "content": ...}, ...]}, and perhaps a "language", such as "Korean" or "ko".
"""

import argparse
import io
import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from elo.common.errors import UserError
from elo.common.files import open_file
from elo.data.documents import MAX_LINE, PARQUET_ROWS, MalformedError, read_records
from elo.text.chat_format import Messages, check_messages

ENDINGS = (".json", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
LISTS = ("conversations", "messages")
LANGUAGE = "language"
CHUNK = 2**20  # characters of a .json file that are read at a time
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}

_BLANK = re.compile(r"[ \t\r\n]*")

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


def place(path: str, number: int) -> str:
    """Where a record is: its line, its row in a Parquet file, its number in an array of JSON, all from 1."""
    return f"{path} record {number}" if path.lower().endswith(".json") else f"{path}:{number}"


def read_conversation_records(path: str) -> Iterator[tuple[int, Any]]:
    """The records of a file with their numbers; one that cannot be read is a `MalformedError`."""
    name = path.lower()
    if name.endswith(".json"):
        yield from _array(path)
    elif name.endswith(".parquet"):
        yield from enumerate(_rows(path), start=1)
    elif name.endswith(ENDINGS):
        for line in read_records(path, ""):
            try:
                yield line.line, line.raw if isinstance(line.raw, MalformedError) else json.loads(line.raw.rstrip())
            except (ValueError, RecursionError) as error:
                yield line.line, MalformedError(line.line, "not usable as JSON", str(error))
    else:
        raise UserError(f"{path}: not a file of conversations; supported are {', '.join(ENDINGS)}")


def _array(path: str) -> Iterator[tuple[int, Any]]:
    """The elements of an array in JSON, one by one with their numbers, since there are such files of gigabytes."""
    try:
        with open_file(path) as binary, io.TextIOWrapper(binary, "utf-8-sig") as file:
            yield from enumerate(_elements(file), start=1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not an array in JSON (one object a line is .jsonl): {error}") from None


def _elements(file: TextIO) -> Iterator[Any]:
    """Raises ValueError, and RecursionError for 1,000 brackets in each other."""
    decoder, text, at = json.JSONDecoder(), file.read(CHUNK), 0

    def blank(at: int) -> int:
        return _BLANK.match(text, at).end()

    at = blank(0)
    if text[at : at + 1] != "[":
        raise ValueError(f"it begins with {text[at : at + 20]!r}")
    at, number, is_whole = blank(at + 1), 0, False
    while number or text[at : at + 1] != "]":
        number += 1
        while True:
            mistake = "it ends within the array"
            try:
                value, end = decoder.raw_decode(text, at)
                end = blank(end)
                # Whole is only what something follows: a 1 at the end of the text may be the beginning of 12.
                is_whole = end < len(text)
            except json.JSONDecodeError as error:  # perhaps only for want of the rest
                mistake, is_whole = error.msg, False
            if is_whole:
                break
            if len(text) - at > MAX_LINE:
                raise ValueError(f"record {number} has a mistake, or more than {MAX_LINE} characters: {mistake}")
            more = file.read(max(CHUNK, len(text) - at))  # as much again, so that nothing is tried often
            if not more:
                raise ValueError(f"record {number}: {mistake}")
            text, at = text[at:] + more, 0
        yield value
        at = end
        if text[at] == "]":
            break
        if text[at] != ",":
            raise ValueError(f"record {number} is followed by {text[at]!r}")
        at = blank(at + 1)
    while rest := text[at + 1 :]:
        if rest.strip():
            raise ValueError(f"behind the array there is {rest.strip()[:20]!r}")
        text, at = file.read(CHUNK), -1


def _rows(path: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs `pip install pyarrow`") from None
    try:
        open_file(path).close()  # pyarrow would wait for a pipe
        # Without buffer_size a whole column of a row group is read at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
            names = table.schema_arrow.names
            if not set(LISTS) & set(names):
                raise UserError(f"{path}: needs a column {' or '.join(map(repr, LISTS))}, and has {', '.join(names)}")
            columns = [name for name in (*LISTS, LANGUAGE) if name in names]
            for batch in table.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
                yield from batch.to_pylist()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged or incomplete: {error}") from None


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
    messages = []
    for turn in record[name]:
        role, content = (turn.get(key, turn.get(other)) for key, other in (("from", "role"), ("value", "content")))
        if isinstance(role, str):
            role = SPEAKERS.get(role.lower(), role.lower())
        messages.append({"role": role, "content": content})
    try:
        check_messages(messages)
    except UserError as error:
        raise MalformedError(number, "not a conversation", str(error)) from None
    try:
        text_bytes(messages)
    except UnicodeEncodeError:  # JSON can write "\ud800", which no UTF-8 can hold
        raise MalformedError(number, "a lone surrogate, which is not text") from None
    return messages


def text_bytes(messages: Messages) -> int:
    return sum(len(message["content"].encode()) for message in messages)
