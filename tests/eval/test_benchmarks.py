"""The questions of the judged benchmarks and the temperatures of their answers."""

import pytest
from bench_files import LOGICKOR_CATEGORIES, MT_CATEGORIES, SHARED

from elo.common.errors import UserError
from eval.judged.benchmarks import BENCHMARKS, read_questions, short_category


@pytest.mark.parametrize("name", BENCHMARKS)
def test_published_questions(name):
    if not SHARED.exists():
        pytest.skip(f"no {SHARED}")
    questions = read_questions(BENCHMARKS[name], SHARED / name)
    expected = {"mt_bench": (80, 8, 10), "japanese_mt_bench": (60, 6, 10), "logickor": (42, 6, 7)}[name]
    categories = [question.category for question in questions]
    assert (len(questions), len(set(categories)), categories.count(categories[0])) == expected
    assert all(len(question.turns) == 2 for question in questions)
    assert len(read_questions(BENCHMARKS[name], SHARED / name, limit=2)) == 2 * expected[1]
    if name == "logickor":
        assert questions[2].references == ("다섯 벌", None)
        assert short_category(questions[0].category) == "Reasoning"
    else:
        assert all(question.references == (None, None) for question in questions)


def test_temperatures_are_fastchats():
    for name in ("mt_bench", "japanese_mt_bench"):
        found = [BENCHMARKS[name].temperature(category) for category in (*MT_CATEGORIES, "another")]
        assert found == [0.7, 0.7, 0.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.7]
    assert {BENCHMARKS["logickor"].temperature(category) for category in LOGICKOR_CATEGORIES} == {0.0}


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("mt_bench", '{"question_id": 1, "category": "math"}', "1: no 'turns'"),
        ("mt_bench", '{"question_id": 1, "category": "math", "turns": []}', "1: turns must be a list of texts"),
        ("mt_bench", '{"question_id": 1, "category": "math", "turns": ["a", 2]}', "1: turns must be a list of texts"),
        ("mt_bench", '{"question_id": 1, "category": "", "turns": ["a"]}', "1: category must be a text"),
        ("mt_bench", '{"question_id": 1, "category": "math", "turns": ["a", "b", "c"]}', "1: 3 turns"),
        ("mt_bench", '{"question_id": true, "category": "math", "turns": ["a"]}', "1: the id of a question is"),
        ("mt_bench", '{"question_id": 1, "category": "math", "turns": ["a"]}\n' * 2, "two questions have the"),
        ("mt_bench", '{"question_id": 1, "category": "ma', "1: not a line of JSON"),
        ("mt_bench", '{"question_id": 1, "category": "a", "turns": ["\\ud83d"]}', "1: a lone surrogate"),
        ("mt_bench", "[]", "1: a JSON object was expected"),
        ("mt_bench", "\n", "no questions"),
        ("logickor", '{"question_id": 1, "category": "math", "turns": ["a"]}', "1: no 'id', which each"),
        ("logickor", '{"id": 1, "category": "c", "questions": ["a"], "references": [1]}', "1: references must be"),
    ],
)  # fmt: skip
def test_bad_questions_are_one_line(name, line, message, tmp_path):
    (tmp_path / "question.jsonl").write_text(line)
    with pytest.raises(UserError, match="question.jsonl") as error:
        read_questions(BENCHMARKS[name], tmp_path)
    assert message in str(error.value)
    with pytest.raises(UserError, match=f"no question.jsonl of {name}"):
        read_questions(BENCHMARKS[name], tmp_path / "absent")
