"""What an experiment reads: texts in other fields, names of files, losses that are none."""

import json

from experiment_runs import pretending, run_here, words

from experiments import inputs


def test_texts_in_another_field(project, monkeypatch, capsys):
    """What is held out has it too, so that the runs and `eval perplexity` find it."""
    done = pretending(monkeypatch, {})
    text = (project / "ko.jsonl").read_text().replace('"text"', '"body"')
    (project / "ko.jsonl").write_text(text)
    english = (project / "en.jsonl").read_text().replace('"text"', '"said"')
    (project / "en.jsonl").write_text(english)
    given = words("--only base 'alignment only' --training '--text-field body --source-field said'")
    status, _, error = run_here(monkeypatch, capsys, *given)
    assert status == 0, error
    assert all("body" in json.loads(path.read_text().splitlines()[0]) for path in project.glob("out/texts/*"))
    (measured,) = [words for script, _, words in done if script == "eval perplexity"]
    assert measured[measured.index("--text-field") + 1] == "body"


def test_names_count_in_a_directory(project):
    """A chat template by another name is none."""
    before = inputs.hashed("model", "base")
    (project / "base/tokenizer.json").rename(project / "base/tokenizer.json.off")
    assert inputs.hashed("model", "base") != before


def test_a_row_without_a_finite_loss_has_failed(project, monkeypatch, capsys):
    """Though every command of it succeeded."""
    pretending(monkeypatch, {"1e-3": float("nan"), "1e-2": float("nan")})
    status, _, error = run_here(monkeypatch, capsys, *words("--only 'alignment only' --rates align=1e-2"))
    assert status == 2 and "1 rows failed, the rest is done" in error and "a finite loss" in error


def test_a_held_out_loss_that_is_no_number(project, monkeypatch, capsys):
    """The row has the other figures."""
    pretending(monkeypatch, {"1e-3": float("nan")})
    assert run_here(monkeypatch, capsys, *words("--only 'alignment only'"))[0] == 0
    (record,) = [json.loads(line) for line in (project / "out/table3.jsonl").read_text().splitlines()]
    assert record["figures"].keys() == {"source", "hours", "tokens"}


def test_other_held_out_text_is_measured_again(project, monkeypatch, capsys):
    """Of the base too, whose command names but the files."""
    done = pretending(monkeypatch, {})
    for number in ("4", "5", "5"):
        assert run_here(monkeypatch, capsys, *words(f"--only base --held-out {number}"))[0] == 0
        (project / "out/table3.jsonl").unlink()
    assert len(done) == 2
