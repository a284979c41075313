"""Which runs make a row of a table, and with which learning rates, scales and sizes."""

from importlib import import_module

import pytest
from experiment_runs import begun, options, pretending

from elo.slicing import parse_layers
from experiments.__main__ import NAMES
from experiments.rows import Kit, Row, align, alignment_only, baseline, elo, found_scale, in_time_of
from experiments.runs import FailedError, Run, Runs


def test_the_best_rate_is_that_of_the_first_seed(tmp_path, monkeypatch):
    done = pretending(monkeypatch, {"1e-1": 2.0, "1e-2": 1.5, "1e-3": float("nan")})
    runs = begun(options(tmp_path, rates={"full": ["1e-1", "1e-3", "1e-2"]}, seeds=[4, 5]))
    runs.options.training = ["--lr", "7"]  # of which the rates tried take the place
    model = baseline("full")(Kit(runs, 5))
    assert [lr for _, lr, _ in done] == ["1e-1", "1e-3", "1e-2", "1e-2"]  # three of seed 4, then one of seed 5
    (chosen,) = runs.made_of[model]
    assert chosen.option("--seed") == "5" and chosen.option("--lr") == "1e-2"
    assert baseline("full")(Kit(runs, 5)) == model and len(done) == 4  # nothing twice


def test_equal_time(tmp_path, monkeypatch):
    """Stage 1 and alignment take 2 s each, the control 2 s for one unit, LoRA 2 s for ten: two units and twenty."""
    done = pretending(monkeypatch, {})
    kit = Kit(begun(options(tmp_path)), 0)
    row = Row("ELO", align(elo()), alignment_only(elo()))
    for other, name, units in (((), "alignment only", "2"), (("LoRA", "lora"), "LoRA", "20")):
        (same_time := in_time_of(row, *other)).model(kit)
        last = done[-1][2]
        assert same_time.name == f"{name}, in the time of ELO"
        assert last[last.index("--gb") + 1] == units
        assert "--after" not in last and ("lora" in last) == (name == "LoRA")


def test_equal_time_is_planned_by_one_clock(tmp_path, monkeypatch):
    """Seconds that ELO took here are not divided by those that the planner predicts for LoRA on a GPU."""
    planned = []
    for _ in range(2):
        row = Row("ELO", align(elo()), alignment_only(elo()))
        in_time_of(row, "LoRA", "lora").model(Kit(runs := Runs(options(tmp_path)), 0))
        planned.append([run.words for run in runs.plans])
        pretending(monkeypatch, {})
        row.model(Kit(begun(options(tmp_path)), 0))  # now ELO is done and LoRA is not
    assert planned[0] == planned[1]


def test_the_scale_is_found_on_validation_text_alone(tmp_path, monkeypatch):
    done = pretending(monkeypatch, {})
    given = options(tmp_path)
    kit = Kit(begun(given), 0)
    for units in (0, 1):
        align(elo(), units, "--scale", found_scale(elo()))(kit)
    stage_1, search, *both = (Run(script, words, tmp_path) for script, _, words in done)
    assert (search.option("--gb"), search.option("--scale")) == ("0", "auto")
    assert search.option("--validation") == given.held_out_files[0]
    assert len(set(given.held_out_files) & set(search.words)) == 1
    assert [run.option("--scale") for run in both] == ["0.1,1.0"] * 2
    assert [run.option("--gb") for run in (stage_1, *both)] == ["9", "0", "1"]


@pytest.mark.parametrize("experiment", NAMES)
def test_rows(experiment, tmp_path):
    """What rows share is one run, all layers are the model's, and seeds share nothing."""
    given, made = options(tmp_path, instruct="chat", seeds=[0, 1]), []
    rows = import_module(f"experiments.{experiment}").rows(given)
    for seed in (0, 1):
        runs = Runs(given)
        for row in rows:
            row.model(Kit(runs, seed))
        made.append(runs.plans)
    assert len(made[0]) == len(made[1])
    assert experiment == "figure3" or not made[0].keys() & made[1].keys()
    trained = [run for run in made[0] if run.script == "train.py"]
    for run in trained:
        if layers := run.option("--layers"):
            parse_layers(layers, 4)
    counts = {"table1": 6, "table2": 4, "table3": 6, "figure2": 1, "figure3": 0}
    assert len(trained) == counts[experiment]
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    if experiment == "figure2":
        assert {row.name: row for row in rows}["alignment only, 0"].model(Kit(runs, 0)) == given.model
    if experiment == "table1":
        controls = {"alignment only", "LoRA", "selective layer tuning", "ELO without alignment"}
        controls |= {f"{name}, in the time of ELO + alignment" for name in ("alignment only", "LoRA")}
        scales = {f"ELO, scale {scale} + alignment" for scale in ("0.25", "0.5", "auto")}
        bridged = {f"ELO, bridge, scale {scale}, without alignment" for scale in ("0.5", "1")}
        assert controls | scales | bridged | {"base", "instruct", "FFT", "ELO + alignment"} < set(names)
        assert [run for run in trained if "--bridge" in run.words]


def test_rates_of_a_small_model(tmp_path, monkeypatch):
    """Layer 1 alone is no share of the target language."""
    done = pretending(monkeypatch, {})
    align(elo("1"))(Kit(begun(options(tmp_path, rates={"elo": ["1", "2"]})), 0))
    assert all(words.count("1") == 1 for script, _, words in done if script == "align.py")  # of --gb


def test_a_rate_that_fails_is_not_taken(tmp_path, monkeypatch):
    """It ends no row as long as another one is left."""
    pretending(monkeypatch, {"1": None, "2": 2.0, "3": float("nan"), "4": 2.5})
    kit = Kit(begun(options(tmp_path, rates={"elo": ["1", "2"], "align": ["4"], "full": ["3", "1"]})), 0)
    aligned = align(elo())(kit)
    assert [run.option("--lr") for run in kit.runs.made_of[aligned]] == ["2", "4"]
    kit.runs.options.rates["align"] = ["4", "5"]
    (*_, put_back) = kit.runs.made_of[align(elo(), 0)(kit)]  # at no rate: nothing is trained
    assert put_back.option("--gb") == "0" and not put_back.option("--lr")
    with pytest.raises(FailedError, match="--rates full=3,1: with none of them a run ends with a finite loss"):
        baseline("full")(kit)


def test_a_benchmark_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def chosen(kit, name, model):
        if name == "mmlu":
            raise FailedError("no such thing")
        return 0.5

    monkeypatch.setattr(Kit, "chosen", chosen)
    kit = Kit(Runs(options(tmp_path, benches=["mmlu", "kobest"])), 0)
    with pytest.raises(FailedError, match="no such thing"):
        kit.measure("model", figures := {})
    assert figures == {"kobest": 0.5}


def test_rates_of_elo_are_judged_after_alignment(tmp_path, monkeypatch):
    done = pretending(monkeypatch, {"1": 1.0, "2": 2.0, "3": 3.0, "4": 2.0})
    kit = Kit(begun(options(tmp_path, rates={"elo": ["1", "2"], "align": ["3", "4"]})), 0)
    aligned = align(elo())(kit)
    # The first judge is a candidate too, and so is the same alignment at the other rate.
    assert [(script, lr) for script, lr, _ in done] == [
        ("train.py", "1"),
        ("align.py", "3"),
        ("train.py", "2"),
        ("align.py", "3"),
        ("align.py", "4"),
    ]
    assert [run.option("--lr") for run in kit.runs.made_of[aligned]] == ["1", "4"]


def test_chat_and_benchmarks(tmp_path):
    changes = {"instruct": "chat", "conversations": ["c.json"], "benchmarks": "bench", "judge_model": "gpt"}
    kit = Kit(Runs(options(tmp_path, **changes, benches=["kobest", "logickor"])), 0)
    assert kit.chat("chat") != "chat"
    assert [run.script for run in kit.runs.plans] == ["sft.py"]
    kit.measure("model", figures := {})
    assert figures == {}  # neither a figure nor None, which has no mean
    scripts = ["eval perplexity", "merge_chat_vector.py", "sft.py", "eval choice"]
    assert [run.script for run in kit.runs.plans][1:] == [*scripts, "eval answers", "eval judge", "eval score"]
    answers, judge, score = [*kit.runs.plans][-3:]
    assert f"{answers.directory}/model_judgment" in kit.runs.command(score)  # where judgments are
    assert str(judge.directory) not in kit.runs.command(score)


def test_judgments_without_a_rating_are_told(tmp_path, monkeypatch, capsys):
    found = {"models": {"row": {"average": 5.0, "judgments": 2, "unparsed": 1}}}
    monkeypatch.setattr(Kit, "result", lambda *_: found)
    Kit(Runs(options(tmp_path, benches=["logickor"])), 0).measure("model", figures := {})
    assert figures == {"logickor": 5.0}
    assert "logickor: 1 of 2 judgments have no rating" in capsys.readouterr().err


def test_the_scores_are_those_of_the_judge(tmp_path, monkeypatch):
    done = pretending(monkeypatch, {})
    kit = Kit(begun(options(tmp_path, benchmarks="bench")), 0)
    for kit.runs.options.judge_model in ("a", "b", "a"):
        kit.judged("logickor", "model")
    scored = [words[0] for script, _, words in done if script == "eval score"]
    judged = [Run(script, words, tmp_path).option("--out") for script, _, words in done if script == "eval judge"]
    assert scored == [f"{out}/model_judgment/{judge}_single.jsonl" for out, judge in zip(judged, "ab", strict=True)]
