"""Write small files for `python -m eval choice`, in the schemas of MMLU, KoBEST and MARC-ja.

    python -m examples.questions data/questions

The sentences are this project's own, in English, Korean and Japanese. They show that everything works; no figure from
them says anything about a model.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elo.common.errors import exit_status
from elo.common.options import Parser

NUMBERS = [(7, 5), (12, 9), (3, 18), (40, 2), (11, 11), (6, 27), (90, 14), (25, 8), (1, 99)]
CAPITALS = [
    ("France", "Paris"),
    ("Korea", "Seoul"),
    ("Japan", "Tokyo"),
    ("Egypt", "Cairo"),
    ("Peru", "Lima"),
    ("Kenya", "Nairobi"),
    ("Norway", "Oslo"),
    ("Cuba", "Havana"),
]
DEV = 5  # the examples, in front of the test's
# Of four categories, two of them with more than one subject, and of different sizes: (question, choices, answer).
SUBJECTS = {
    "abstract_algebra": [
        (f"  In the integers, what is {a} + {b}?", [a + b, a - b, a * b, a + b + 1], "A") for a, b in NUMBERS
    ],
    "college_mathematics": [
        (f'Which number is the "larger" one,\n{a} or {b}, doubled? ', [2 * min(a, b), a + b, 2 * max(a, b), 1], "C")
        for a, b in NUMBERS[:7]
    ],
    "us_foreign_policy": [
        (f"Where does the government of {country} meet?", [city, f"near {city}", "Nowhere, it writes", "London"], "A")
        for country, city in CAPITALS
    ],
    "sociology": [
        (f"People who live in {city} are said to be from", ["the sea", f"{country}", "", "no country"], "B")
        for country, city in CAPITALS
    ],
    "philosophy": [
        (f"Is it right that all people of {country} count to {a}?", ["Yes, always", "No", "é, ü, ñ", "서울"], letter)
        for (country, _), (a, _), letter in zip(CAPITALS, NUMBERS, "DABCDDBC", strict=False)
    ],
    "virology": [
        (f"A virus infects {a} cells, and each makes {b} more. How many cells?", [a, b, a * b, "a few"], "C")
        for a, b in NUMBERS[:6]
    ],
}
# One that no small model's context holds.
LONG = "먼 옛날 어느 마을에 책을 좋아하는 사람이 살았다. 그는 매일 저녁 등불 아래에서 글을 읽었다. " * 30

BOOLQ = [
    ("강아지는 네 발로 걷는 동물이다. 꼬리를 흔들며 반가움을 나타낸다.", "강아지는 꼬리를 흔드는가?", 1),
    ("이 도서관은 월요일에 문을 닫는다.", "도서관은 월요일에도 문을 여는가?", 0),
    ("사과는 가을에 익는 과일로, 빨간 것과 푸른 것이 있다.", "사과는 모두 빨간색인가?", 0),
    (LONG, "그 사람은 책을 좋아했는가?", 1),
    ("기차는 오전 아홉 시에 떠나 열한 시에 도착한다.", "기차는 두 시간 걸리는가?", 1),
    ("그 섬에는 학교가 하나뿐이다 🏫.", "섬에 학교가 있는가?", 1),
]
COPA = [
    ("비가 많이 내렸다.", "결과", "강물이 불어났다.", "강물이 말라 버렸다.", 0),
    ("민수는 우산을 폈다.", "원인", "해가 떴다.", "비가 오기 시작했다.", 1),
    ("그는 물을 마셨다.", " 원인 ", "목이 말랐다.", "배가 불렀다.", 0),
    ("전등이 꺼졌다.", "결과", "방이 어두워졌다.", "방이 밝아졌다.", 0),
    ("아이가 넘어졌다.", "결과", "웃었다.", "울었다.", 1),
]
WIC = [
    ("배", "배가 고파서 밥을 먹었다.", "배를 타고 섬에 갔다.", 0),
    ("눈", "눈이 내려 길이 하얗다.", "어젯밤에 눈이 쌓였다.", 1),
    ("다리", "다리를 건너 학교에 간다.", "오래 걸어 다리가 아프다.", 0),
    ("말", "말이 들판을 달린다.", "말에게 풀을 먹였다.", 1),
]
HELLASWAG = [
    (
        "할머니가 시장에 가서 채소를 샀다.",
        ["집에 와서 국을 끓였다.", "채소가 날아갔다.", "시장을 샀다.", "자동차를 끓였다."],
        0,
    ),
    ("학생이 시험지를 받았다. ", ["시험지를 먹었다.", "이름을 쓰고 문제를 풀었다.", "잤다.", "창문이 되었다."], 1),
    (
        "요리사가 불을 켰다.",
        ["불이 노래했다.", "냄비가 걸어갔다.", "팬을 올리고 기름을 둘렀다.", "겨울이 왔다가 갔다."],
        2,
    ),
    ("공이 굴러갔다.", ["하늘이 되었다.", "공이 책을 읽었다.", "공이 공이 되었다.", "아이가 뛰어가 잡았다."], 3),
    (
        "문이 열렸다.",
        ["손님이 들어왔다.", "문이 손님에게 인사하고 물을 마셨다.", "열렸다.", "닫혔다 열렸다 닫혔다."],
        0,
    ),
]
SENTINEG = [
    ("음식이 맛있고 친절해요.", 1),
    ("다시는 가고 싶지 않아요", 0),
    ("배송이 빨라서 좋았습니다.", 1),
    ("화면이 어둡고 느려요.", 0),
    ("값이 싸지는 않지만 만족합니다.", 1),
]
MARC_JA = [
    ("とても使いやすく、毎日使っています。", "positive"),
    ("すぐに壊れてしまい、残念でした。", "negative"),
    ("音がきれいで、値段も手ごろです。", "positive"),
    ("説明書が分かりにくい。もう買いません。", "negative"),
    ("思ったより大きかったが、気に入りました😊", "positive"),
    ("色が写真と違いました。\n返品したいです。", "negative"),
    ("子供が喜んで遊んでいます。", "positive"),
    ("期待したほどではありませんでした。", "negative"),
]
KOBEST = {
    "boolq": (("paragraph", "question", "label"), BOOLQ),
    "copa": (("premise", "question", "alternative_1", "alternative_2", "label"), COPA),
    "wic": (("word", "context_1", "context_2", "label"), WIC),
    "hellaswag": (
        ("context", "ending_1", "ending_2", "ending_3", "ending_4", "label"),
        [(context, *endings, label) for context, endings, label in HELLASWAG],
    ),
    "sentineg": (("sentence", "label"), SENTINEG),
}


def mmlu_rows() -> Iterator[tuple[str, str, list[list[str]]]]:
    """Subject, split and rows: question, four choices, the answer's letter."""
    for subject, questions in SUBJECTS.items():
        rows = [[question, *map(str, choices), letter] for question, choices, letter in questions]
        yield subject, "dev", rows[:DEV]
        yield subject, "test", rows[DEV:]


def kobest_rows() -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Name, split and records; the training split has the test's in another order, and one more."""
    for name, (columns, rows) in KOBEST.items():
        records = [dict(zip(columns, row, strict=True)) for row in rows]
        short = [record for record in records if LONG not in record.values()]
        yield name, "test", records
        yield name, "train", [*short[::-1], short[0]]


def write(data: Path) -> Path:
    """The files as published: CSV without a header, JSON lines, JGLUE's JSON lines."""
    for subject, split, rows in mmlu_rows():
        write_csv(data / "mmlu" / split / f"{subject}_{split}.csv", rows)
    for name, split, records in kobest_rows():
        write_lines(data / "kobest" / name / f"{split}.jsonl", records)
    records = [{"sentence": text, "label": label, "review_id": f"R{n}"} for n, (text, label) in enumerate(MARC_JA)]
    write_lines(data / "marc_ja" / "train-v1.0.json", records[::-1] + records[:2])
    write_lines(data / "marc_ja" / "valid-v1.0.json", records)
    return data


def write_csv(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    parser = Parser(prog="python -m examples.questions", description=__doc__)
    parser.add_argument("out", type=Path, metavar="DIR", help="the directory to write")
    print(write(parser.parse_args().out))


if __name__ == "__main__":
    exit_status(main)
