"""`python -m eval score` against published scores and upstream's arithmetic."""

import json
from statistics import fmean

import pytest
from bench_files import LOGICKOR_CATEGORIES, MT_CATEGORIES, write_bench, write_jsonl
from commands import status_of

from eval import __main__ as evaluation

# id, category, first and second judge_score of LogicKor's evaluated/Qwen/Qwen2-72B-Instruct/1-shot.jsonl, in its order.
# fmt: off
QWEN2_72B = [
    (34, 4, 9, 10), (26, 3, 10, 10), (13, 1, 10, 10), (6, 0, 10, 10), (24, 3, 10, 10), (38, 5, 10, 9), (28, 3, 10, 10),
    (41, 5, 2, 2), (27, 3, 10, 10), (31, 4, 10, 10), (35, 4, 8, 10), (5, 0, 7, 10), (3, 0, 10, 7), (21, 2, 10, 10),
    (37, 5, 10, 10), (16, 2, 9, 10), (18, 2, 8, 7), (39, 5, 10, 2), (40, 5, 2, 6), (29, 4, 10, 10), (11, 1, 10, 10),
    (25, 3, 9, 10), (42, 5, 9, 10), (12, 1, 10, 6), (30, 4, 10, 10), (32, 4, 10, 10), (8, 1, 0, 5), (33, 4, 10, 10),
    (1, 0, 9, 10), (36, 5, 10, 10), (14, 1, 10, 10), (4, 0, 6, 7), (7, 0, 9, 10), (9, 1, 7, 10), (2, 0, 7, 0),
    (15, 2, 9, 9), (19, 2, 9, 8), (22, 3, 9, 10), (10, 1, 6, 10), (23, 3, 10, 10), (20, 2, 9, 10), (17, 2, 9, 10),
]
# fmt: on
# Its row of LogicKor's leaderboard, 1-shot, as it was on 2024-07-31; figures are cut there, not rounded.
PUBLISHED = {"Reasoning": 8.00, "Math": 8.14, "Writing": 9.07, "Coding": 9.85, "Understanding": 9.78, "Grammar": 7.28}
PUBLISHED_TURNS = {"first": 8.61, "second": 8.76, "average": 8.69}


@pytest.fixture
def score(tmp_path, monkeypatch, capsys):
    """Runs the command; returns exit status, stdout, stderr and the models of its JSON."""

    def run(*words):
        result = tmp_path / "result.json"
        result.unlink(missing_ok=True)
        status = status_of(monkeypatch, evaluation.main, "eval", "score", *words, "--json", str(result))
        shown = capsys.readouterr()
        models = json.loads(result.read_text())["models"] if result.exists() else None
        return status, shown.out, shown.err, models

    return run


def judgment(question, turn, score, model="m", judge="gpt-4", **fields):
    """A line as FastChat writes it."""
    return {
        "question_id": question,
        "model": model,
        "judge": [judge, "single-v1"],
        "user_prompt": "...",
        "judgment": "...",
        "score": score,
        "turn": turn,
        "tstamp": 1.0,
        **fields,
    }


def evaluated(rows):
    """Lines as LogicKor's evaluator.py writes them."""
    return [
        {
            "id": id,
            "category": LOGICKOR_CATEGORIES[category],
            "questions": ["?", "?"],
            "outputs": ["!", "!"],
            "references": [None, None],
            "query_single": {"judge_message": "...", "judge_score": float(first)},
            "query_multi": {"judge_message": "...", "judge_score": float(second)},
        }
        for id, category, first, second in rows
    ]


def test_logickors_published_file_gives_its_published_scores(score, tmp_path):
    path = write_jsonl(tmp_path / "evaluated" / "Qwen" / "Qwen2-72B-Instruct" / "1-shot.jsonl", evaluated(QWEN2_72B))
    path.write_text("\ufeff" + path.read_text())  # its files begin so
    for given in (path, tmp_path / "evaluated"):
        status, out, err, models = score(given)
        assert (status, err) == (0, "")
        (model,) = models.values()
        assert list(model["categories"]) == [*LOGICKOR_CATEGORIES]
        assert list(models) == ["Qwen2-72B-Instruct-1-shot"]
        assert {name: int(model[name] * 100) / 100 for name in PUBLISHED_TURNS} == PUBLISHED_TURNS
        for category, published in zip(LOGICKOR_CATEGORIES, PUBLISHED.values(), strict=True):
            assert int(model["categories"][category]["average"] * 100) / 100 == published
        assert (model["judgments"], model["unparsed"]) == (84, 0)
        for text in ("Reasoning", "Understanding", "8.62", "8.76", "8.69"):
            assert text in out


def test_fastchats_arithmetic(score, tmp_path):
    """show_result.py: -1 is left out, and the average is over all judgments, not over the two turns."""
    lines = [
        judgment(81, 1, 8),
        judgment(82, 1, 5.5),
        judgment(83, 1, -1),
        judgment(81, 2, 3),
        judgment(82, 2, None),
        judgment(83, 2, -1),
        *(judgment(question, turn, 9, model="better") for question in (81, 82) for turn in (1, 2)),
    ]
    status, out, err, models = score(write_jsonl(tmp_path / "gpt-4_single.jsonl", lines))
    assert status == 0
    assert list(models) == ["better", "m"]  # the best first
    expected = {"first": 6.75, "second": 3.0, "average": 16.5 / 3, "judgments": 6, "unparsed": 3, "categories": {}}
    assert models["m"] == expected
    assert "m: 3 judgments have no rating and count for nothing" in err
    assert "the models are not judged on the same questions and turns" in err
    assert "--bench-dir" in err
    assert out.splitlines()[0].split() == ["model", "turn", "all", "judgments", "unparsed"]


def test_logickors_arithmetic(score, tmp_path):
    """score.py: the average is over the two turns, however many of a turn have a rating."""
    lines = [judgment(1, 1, 8), judgment(2, 1, 4), judgment(1, 2, 9), judgment(2, 2, -1)]
    models = score(write_jsonl(tmp_path / "a.jsonl", [line | {"bench": "logickor"} for line in lines]))[3]
    assert (models["m"]["first"], models["m"]["second"], models["m"]["average"]) == (6, 9, 7.5)


def test_categories_come_from_the_questions_or_from_the_judgments(score, tmp_path):
    bench = write_bench(tmp_path / "mt", "mt_bench")
    plain = [judgment(81 + index, turn, index + turn) for index in range(8) for turn in (1, 2)]
    named = [line | {"category": MT_CATEGORIES[line["question_id"] - 81], "bench": "mt_bench"} for line in plain]
    files = [write_jsonl(tmp_path / f"{n}.jsonl", lines) for n, lines in enumerate((plain, named))]
    results = [score(files[0], "--bench-dir", bench), score(files[1])]
    for status, out, err, models in results:
        assert (status, err) == (0, "")
        for index, category in enumerate(MT_CATEGORIES):
            found = models["m"]["categories"][category]
            assert (found["first"], found["second"], found["average"]) == (index + 1, index + 2, index + 1.5)
        assert models["m"]["average"] == fmean(line["score"] for line in plain)
        assert [line.split()[-1] for line in out.splitlines()[1:3]] == ["8.00", "9.00"]  # humanities
    assert results[0][3] == results[1][3]


def test_the_last_judgment_of_a_turn_counts_and_judges_are_kept_apart(score, tmp_path):
    lines = [judgment(81, 1, 2), judgment(81, 2, 4), judgment("81", 1, 6)]
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    assert score(path)[3]["m"]["first"] == 6
    path.write_text(path.read_text() + '{"question_id": 8')  # a run that was killed
    assert score(path)[3]["m"]["average"] == 5
    other = write_jsonl(tmp_path / "b.jsonl", [judgment(81, 1, 1, judge="claude")])
    assert list(score(path, other)[3]) == ["m (gpt-4)", "m (claude)"]


def test_models_that_are_judged_on_other_questions(score, tmp_path):
    lines = [
        judgment(question, 1, 5, model=model) for model, question in (("a", 81), ("a", 82), ("b", 82), ("b", "81"))
    ]
    assert "same questions" not in score(write_jsonl(tmp_path / "same.jsonl", lines))[2]
    lines[-1]["question_id"] = "83"
    assert "not judged on the same questions and turns" in score(write_jsonl(tmp_path / "other.jsonl", lines))[2]


def test_korean_and_japanese_names(score, tmp_path):
    lines = [judgment(1, 1, 7, model="모델"), judgment(1, 1, 6, model="日本語モデル"), judgment(1, 1, 5, model="m")]
    _, out, _, _ = score(write_jsonl(tmp_path / "a.jsonl", [line | {"category": "추론"} for line in lines]))
    assert out.splitlines()[0] == "model         turn      all  추론  judgments  unparsed"
    assert out.splitlines()[4] == "日本語モデル  first    6.00  6.00"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "bad.jsonl: no judgments"),
        ("[1]\n", "bad.jsonl:1: a JSON object was expected"),
        ("{\n{}", "bad.jsonl:1: not a line of JSON"),
        ('{"question_id": 1}', "bad.jsonl:1: no 'model': neither FastChat's model_judgment nor LogicKor's evaluated"),
        ('{"question_id": 81, "choices": []}', "bad.jsonl:1: an answer that nobody has judged"),
        ('{"question_id": 81, "model_1": "a"}', "bad.jsonl:1: a comparison of two models"),
        (json.dumps(judgment(81, 3, 1)), "bad.jsonl:1: judge must be the judge and its prompt, and turn 1 or 2"),
        (json.dumps(judgment(81, 1, "7")), "bad.jsonl:1: score must be a number from 0 to 10, not '7'"),
        (json.dumps(judgment(81, 1, float("nan"))), "bad.jsonl:1: score must be a number from 0 to 10, not nan"),
        (json.dumps(judgment(81, 1, 85)), "bad.jsonl:1: score must be a number from 0 to 10, not 85"),
        (json.dumps(judgment(81, 1, -2)), "bad.jsonl:1: score must be a number from 0 to 10, not -2"),
        (json.dumps(judgment([], 1, 1)), "bad.jsonl:1: the id of a question is a number or a text"),
        ('{"id": 1, "query_single": {"judge_score": 1}}', "bad.jsonl:1: query_multi must be an object, not None"),
    ],
)
def test_bad_files_are_one_line(line, message, score, tmp_path):
    (tmp_path / "bad.jsonl").write_text(line)
    status, _, err, _ = score(tmp_path / "bad.jsonl")
    assert (status, len(err.splitlines())) == (2, 1)
    assert message in err


def test_what_cannot_be_scored_together(score, tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", [judgment(1, 1, 1)])
    again = write_jsonl(tmp_path / "b.jsonl", [judgment(1, 1, 2)])
    assert "judged in" in score(first, again)[2]
    assert score(first, first)[0] == 0  # once
    one = write_jsonl(tmp_path / "c.jsonl", [judgment(1, 1, 1, bench="japanese_mt_bench")])
    other = write_jsonl(tmp_path / "d.jsonl", [judgment(90, 1, 1, bench="mt_bench")])
    assert "of japanese_mt_bench and mt_bench; score one benchmark at a time" in score(one, other)[2]
    bench = write_bench(tmp_path / "mt", "mt_bench")
    assert "question 1, which is judged, is not here" in score(first, "--bench-dir", bench)[2]
    (tmp_path / "empty").mkdir()
    assert "no .jsonl file is here" in score(tmp_path / "empty")[2]
