"""Write the demo's corpora: Korean law and English documentation, about 80 and 450 KB.

    python -m examples.texts data/demo

Korean, the target language: the constitution of the Republic of Korea and ten bills of its National Assembly,
from the package konlpy. It is never imported, only its text files are read (`pip install --no-deps konlpy`).
English, the source language: the language reference that every Python carries for `help()`.

For each language three files, one document a line, its text in the field `text`: `ko.heldout.jsonl`, for results only;
`ko.validation.jsonl`, to choose settings by; `ko.train.jsonl`, the rest. The same packages give the same files.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from elo.common.errors import UserError, exit_status
from elo.common.options import Parser

PART_BYTES = 9_000  # held out, and for validation, of each language: a tenth of the Korean
SEED = 1


def konlpy_texts(folder: str) -> Iterator[str]:
    """The texts of konlpy's corpus `folder` ("kolaw" or "kobill"), by file name."""
    try:
        files = distribution("konlpy").files or []
    except PackageNotFoundError:
        raise UserError(
            "the package konlpy, which carries the Korean text, is not installed: pip install --no-deps konlpy==0.6.0"
        ) from None
    texts = sorted(file for file in files if file.match(f"corpus/{folder}/*.txt"))
    if not texts:
        raise UserError(f"the installed package konlpy has no corpus {folder}: version 0.6.0 has it")
    return (file.read_text(encoding="utf-8") for file in texts)


def articles(constitution: str) -> list[str]:
    """One document an article, which begins with its number: 제1조, Article 1."""
    return [article.strip() for article in re.split(r"\n\s*(?=제\d+조)", constitution)]


def bill_paragraphs(bill: str) -> list[str]:
    """The paragraphs of a bill, put together from the lines of a printed page.

    What follows the bill proper is left out: tables that set the old law beside the new, and lists of costs.
    """
    bill = re.split(r"신\s*[·ㆍ]\s*구조문대비표|비용추계서", bill)[0]
    paragraphs: list[str] = []
    line_before = ""
    for line in bill.splitlines():
        if not line.strip() or re.fullmatch(r"\s*- \d+ -\s*", line):  # a page number
            continue
        line = re.sub(r"\s+", " ", line)
        # A full line goes on in the next one, which is not indented. Words are broken at the end of a line
        # without a hyphen; where a whole word ends there, the line has kept its space.
        if len(line_before) > 30 and not line_before.endswith((".", ". ")) and not line.startswith(" "):
            paragraphs[-1] += line
        else:
            paragraphs.append(line)
        line_before = line
    return [paragraph.strip() for paragraph in paragraphs]


def documents(paragraphs: Iterable[str], separator: str, size: int = 1500) -> list[str]:
    """Consecutive paragraphs, joined to documents of about `size` bytes each."""
    joined: list[str] = []
    room = 0
    for paragraph in paragraphs:
        if room <= 0:
            joined.append(paragraph)
            room = size
        else:
            joined[-1] += separator + paragraph
        room -= len(paragraph.encode())
    return joined


def korean() -> list[str]:
    (constitution,) = konlpy_texts("kolaw")
    found = articles(constitution)
    seen: set[str] = set()
    for bill in konlpy_texts("kobill"):
        # Some bills repeat each other. Headings apart, a paragraph is kept once, so that nothing held out is
        # also trained on.
        paragraphs = [text for text in bill_paragraphs(bill) if len(text) < 40 or text not in seen]
        seen.update(paragraphs)
        found += documents(paragraphs, "\n")
    return found


def english() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python has no pydoc_data, its own documentation: use a complete Python") from None
    return [document for topic in topics.values() for document in documents(topic.split("\n\n"), "\n\n")]


def write(texts: list[str], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    size = sum(len(text.encode()) for text in texts)
    print(f"{path}: {len(texts)} documents, {size / 1000:.1f} KB of text")


def main() -> None:
    parser = Parser(prog="python -m examples.texts", description="Write the demo's Korean and English corpora.")
    parser.add_argument("out", type=Path, metavar="DIR", help="the directory to write")
    write_all(parser.parse_args().out)


def write_all(out: Path) -> None:
    for language, texts in {"ko": korean(), "en": english()}.items():
        random.Random(SEED).shuffle(texts)
        texts = list(dict.fromkeys(texts))  # Python has some topics under two names
        out.mkdir(parents=True, exist_ok=True)
        for part in ("heldout", "validation"):
            size, count = 0, 0
            while size < PART_BYTES:
                size += len(texts[count].encode())
                count += 1
            write(texts[:count], out / f"{language}.{part}.jsonl")
            texts = texts[count:]
        write(texts, out / f"{language}.train.jsonl")


if __name__ == "__main__":
    exit_status(main)
