"""`python -m eval choice`: continued runs, several processes, mistakes."""

import json
import shutil
import sys

import families
import pytest
from choice_runs import make_root, run
from forking import fork_group

from eval import __main__ as evaluation
from eval import tasks as benchmarks
from eval.likelihood import loglikelihood
from examples import questions

TASKS = "mmlu,kobest,marc_ja"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("choice"))


@pytest.fixture(scope="module")
def finished(root):
    """The samples and the result of a whole run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        files = ["--samples", root / "samples.jsonl", "--json", root / "result.json"]
        assert run(monkeypatch, root, "--data", root / "data", "--tasks", TASKS, *files) == 0
    return (root / "samples.jsonl").read_text(), json.loads((root / "result.json").read_text())


def by_question(text):
    """(task, index) -> its sample; each is there once"""
    samples = [json.loads(line) for line in text.splitlines()]
    found = {(sample["task"], sample["index"]): sample for sample in samples}
    assert len(found) == len(samples)
    return found


def test_a_context_is_computed_once(root, finished, monkeypatch):
    """The tokens that go through the model are those of the shared prefix, each context and each choice."""
    tokens = []
    forward = loglikelihood.Scorer.score

    def score(self, batch):
        tokens.append(len(batch.shared) + sum(len(row.tokens) for row in batch.rows))
        return forward(self, batch)

    monkeypatch.setattr(loglikelihood.Scorer, "score", score)
    words = ["--data", root / "data", "--tasks", "mmlu_abstract_algebra", "--batch-tokens", 10_000]
    assert run(monkeypatch, root, *words) == 0
    (task,) = [task for task in benchmarks.load()[0].values() if task.name == "mmlu_abstract_algebra"]
    asked = task.questions(root / "data")
    from elo.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(root / "model")
    lengths = [len(tokenizer.encode(question.context)) for question in asked]
    assert sum(tokens) < 1.7 * max(lengths)  # 4 questions with 5 examples each


def test_batches_do_not_change_results(root, finished, tmp_path, monkeypatch):
    words = ["--data", root / "data", "--tasks", TASKS, "--samples", tmp_path / "samples.jsonl", "--batch-tokens", 1]
    assert run(monkeypatch, root, *words) == 0
    one_by_one = by_question((tmp_path / "samples.jsonl").read_text())
    for key, sample in by_question(finished[0]).items():
        assert sample["loglikelihoods"] == pytest.approx(one_by_one[key]["loglikelihoods"], abs=1e-3, rel=0)


def test_a_killed_run_continues(root, finished, tmp_path, monkeypatch, capfd):
    """Killed between two batches and, later, in the middle of writing; nothing is asked twice or changes."""
    words = ["--data", root / "data", "--tasks", TASKS, "--samples", tmp_path / "samples.jsonl"]
    words += ["--json", tmp_path / "result.json"]
    forward, calls = loglikelihood.Scorer.score, []

    def dies(self, batch):
        calls.append(batch)
        if len(calls) == 5:
            raise ZeroDivisionError
        return forward(self, batch)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loglikelihood.Scorer, "score", dies)
        patch.setattr(sys, "argv", ["eval", "choice", "--model", str(root / "model"), "--dtype", "fp32"])
        patch.setattr(sys, "argv", [*sys.argv, "--batch-tokens", "600", *map(str, words)])
        evaluation.main()
    some = (tmp_path / "samples.jsonl").read_text()
    assert 0 < some.count("\n") < finished[0].count("\n")

    torn = finished[0][: finished[0].index("kobest_hellaswag") + 40]
    assert torn.count("\n") > some.count("\n")
    (tmp_path / "samples.jsonl").write_text(torn)
    assert run(monkeypatch, root, *words) == 0
    text = (tmp_path / "samples.jsonl").read_text()
    assert text.startswith(torn[: torn.rindex("\n") + 1])
    assert by_question(text) == by_question(finished[0])
    assert json.loads((tmp_path / "result.json").read_text()) == finished[1]

    monkeypatch.setattr(loglikelihood.Scorer, "score", None)  # all is there: the model is not asked at all
    capfd.readouterr()
    assert run(monkeypatch, root, *words) == 0
    assert f"{finished[1]['results']['kobest']['f1']:.4f}" in capfd.readouterr().out


def test_results_of_another_model_data_or_shots_are_refused(root, finished, tmp_path, monkeypatch, capfd):
    samples = tmp_path / "samples.jsonl"
    words = ["--data", root / "data", "--tasks", "kobest_copa", "--samples", samples]

    def refused(*words):
        samples.write_text(finished[0])
        assert run(monkeypatch, root, *words) == 2
        assert samples.read_text() == finished[0]
        return capfd.readouterr().err

    assert "samples.jsonl:1: a result of another model, --dtype or --batch-tokens" in refused(*words, "--dtype", "bf16")
    assert "another model, --dtype or --batch-tokens" in refused(*words, "--batch-tokens", 700)
    assert "a result of other data or another --shots" in refused(*words, "--shots", 1)
    other = shutil.copytree(root / "model", tmp_path / "other")
    families.write("small", other, seed=1)
    assert "samples.jsonl:1: a result of another model, --dtype or --batch-tokens" in refused(*words, "--model", other)
    data = shutil.copytree(root / "data", tmp_path / "data")
    path = data / "kobest" / "copa" / "test.jsonl"
    path.write_text(path.read_text().replace("강물이 불어났다.", "강물이 늘었다."))
    assert "a result of other data or another --shots" in refused("--data", data, *words[2:])

    samples.write_text("precious notes")
    assert run(monkeypatch, root, *words) == 2
    assert samples.read_text() == "precious notes"


def test_several_processes_give_the_same(root, finished, tmp_path):
    """Two processes continue what one has begun."""
    begun = "".join(finished[0].splitlines(keepends=True)[:7]) + '{"task": "mmlu_'
    (tmp_path / "samples.jsonl").write_text(begun)
    words = ["choice", "--model", root / "model", "--data", root / "data", "--tasks", TASKS, "--dtype", "fp32"]
    words += ["--samples", tmp_path / "samples.jsonl", "--json", tmp_path / "result.json", "--batch-tokens", "600"]
    pair = fork_group(2, "eval.__main__", words)
    said = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    samples = by_question((tmp_path / "samples.jsonl").read_text())
    expected = by_question(finished[0])
    assert samples.keys() == expected.keys()
    for key, sample in samples.items():
        assert sample["loglikelihoods"] == pytest.approx(expected[key]["loglikelihoods"], abs=1e-4, rel=0)
    assert json.loads((tmp_path / "result.json").read_text()) == finished[1]
    assert "".join(output for output, _ in said).count("marc_ja") == 1


def test_limit_takes_the_first_questions(root, finished, tmp_path, monkeypatch):
    files = ["--samples", tmp_path / "samples.jsonl", "--json", tmp_path / "result.json"]
    words = ["--data", root / "data", "--tasks", "kobest,marc_ja,mmlu_sociology", *files]
    assert run(monkeypatch, root, *words, "--limit", 2) == 0
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert {name: result["n"] for name, result in results.items()} == {
        **dict.fromkeys(["marc_ja", "mmlu_sociology", *(f"kobest_{name}" for name in questions.KOBEST)], 2),
        "kobest": 10,
    }
    expected = by_question(finished[0])
    for key, sample in by_question((tmp_path / "samples.jsonl").read_text()).items():
        assert sample["loglikelihoods"] == pytest.approx(expected[key]["loglikelihoods"], abs=1e-3, rel=0)
    # A longer run takes over what a shorter one has found.
    assert run(monkeypatch, root, *words) == 0
    assert len(by_question((tmp_path / "samples.jsonl").read_text())) == sum(
        results["n"]
        for name, results in finished[1]["results"].items()
        if name in ("kobest", "marc_ja", "mmlu_sociology")
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "kobest_boolk"], "--tasks: there is no 'kobest_boolk'; there are "),
        (["--tasks", ","], "--tasks: no task is named"),
        (["--tasks", "kobest", "--shots", "90"], "boolq/train.jsonl: 6 records are too few for 90 examples"),
        (["--tasks", "kobest", "--shots", "-1"], "--shots: '-1' is not a whole number"),
        (["--tasks", "kobest", "--data", "absent"], "--data absent: no such directory"),
        (["--tasks", "kobest", "--samples", "."], "--samples .: this is a directory"),
        (["--tasks", "kobest", "--json", "absent/result.json"], "--json absent/result.json: its directory"),
    ],
)
def test_mistakes_are_one_line(root, words, message, monkeypatch, capfd):
    assert run(monkeypatch, root, "--data", root / "data", *words) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error


def test_missing_subjects_are_named(root, finished, monkeypatch, capfd):
    assert run(monkeypatch, root, "--data", root / "data", "--tasks", "mmlu", "--limit", 1) == 0
    assert "mmlu: 6 of 57 tasks; no files of mmlu_anatomy, " in capfd.readouterr().err
