"""Files of conversations to records and their language: .jsonl, .ndjson, .json (plain, .gz, .zst) and .parquet.

A record has messages, see `elo.data.conversation_records`, and perhaps a "language", such as "Korean" or "ko".
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from elo.common.errors import UserError
from elo.data.conversation_records import LANGUAGE, LISTS, OF_RECORD, message_digest, read_messages, remember
from elo.data.json_records import JSON_ENDINGS, MalformedError, read_json_records
from elo.data.parquet import read_rows

SUPPORTED = ".jsonl, .ndjson, .json (each also as .gz or .zst) and .parquet"

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


def read_conversation_records(path: str, unread: set[str] | None = None) -> Iterator[tuple[int, Any]]:
    """The records of a file with their numbers, see `place`; one that cannot be read is a `MalformedError`.

    The names of a Parquet file's other columns, which are not read, go into `unread`.
    """
    if path.lower().endswith(".parquet"):
        yield from enumerate(read_rows(path, partial(_columns, path, unread)), start=1)
    elif path.lower().endswith(JSON_ENDINGS):
        for number, raw, _ in read_json_records(path):
            try:
                yield number, raw if isinstance(raw, MalformedError) else json.loads(raw)
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
