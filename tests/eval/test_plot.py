"""`python -m eval plot`: what is drawn is what the files say, and every label can be read."""

import json
import math
import sys
import warnings

import numpy as np
import pytest
from bench_files import LOGICKOR_CATEGORIES, MT_CATEGORIES, scores_file

from elo.common.errors import exit_status
from eval import __main__ as evaluation
from eval.figures import charts
from eval.figures.plot import collect


@pytest.fixture
def plot(tmp_path, monkeypatch, capsys):
    """Runs the command; returns exit status, stderr, the figure and the JSON. A missing glyph is an error."""
    drawn = []
    for name in ("draw_scores", "draw_runs", "draw_speed"):
        original = getattr(charts, name)
        monkeypatch.setattr(charts, name, lambda data, text, draw=original: drawn.append(draw(data, text)) or drawn[-1])

    def run(*words, out="figure.png"):
        result, out = tmp_path / "series.json", tmp_path / out
        monkeypatch.setattr(sys, "argv", ["eval", "plot", *map(str, words), "--out", str(out), "--json", str(result)])
        with pytest.raises(SystemExit) as exit_, warnings.catch_warnings():
            warnings.simplefilter("error")
            exit_status(evaluation.main)
        err = capsys.readouterr().err
        if exit_.value.code:
            return exit_.value.code, err, None, None
        begins = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[out.suffix.lower()]
        assert out.read_bytes().startswith(begins)
        assert out.stat().st_size > 5000
        return 0, err, drawn[-1], json.loads(result.read_text())

    return run


def visible_text(figure):
    figure.draw_without_rendering()
    found = [text.get_text() for axes in figure.axes for text in [*axes.get_xticklabels(), *axes.texts, axes.title]]
    return found + [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_radar_and_bars_of_several_benchmarks(plot, tmp_path):
    files = [
        scores_file(tmp_path / "a.json", "mt_bench", MT_CATEGORIES, "base", "elo"),
        scores_file(tmp_path / "b.json", "logickor", LOGICKOR_CATEGORIES, "elo", "base"),
    ]
    status, err, figure, series = plot(*files)
    assert (status, err) == (0, "")
    radars = {axes.get_title(): axes for axes in figure.axes if axes.name == "polar"}
    assert list(radars) == ["MT-Bench", "LogicKor"]
    for axes, categories in zip(radars.values(), (MT_CATEGORIES, LOGICKOR_CATEGORIES), strict=True):
        assert len(axes.lines) == 2
        for shift, line in enumerate(axes.lines):
            expected = [1.0 + index + shift / 4 for index in range(len(categories))]
            assert list(line.get_ydata()) == [*expected, expected[0]]
    colors = {line.get_color() for axes in radars.values() for line in axes.lines}
    assert len(colors) == 2  # a model has one colour everywhere
    assert radars["MT-Bench"].lines[0].get_color() == radars["LogicKor"].lines[1].get_color()

    bars = [axes for axes in figure.axes if axes.name != "polar"]
    heights = [[[bar.get_height() for bar in bars] for bars in axes.containers] for axes in bars]
    assert heights == [[[5.0, 4.25, 4.5], [6.0, 4.25, 4.5]]] * 2
    shown = visible_text(figure)
    assert {"writing", "Reasoning", "Grammar", "first turn", "second turn", "average", "4.25", "base"} <= {*shown}
    assert "elo" in shown
    assert series["kind"] == "scores"
    assert list(series["benchmarks"]) == ["MT-Bench", "LogicKor"]
    assert series["benchmarks"]["LogicKor"]["categories"][0] == "Reasoning"
    assert series["benchmarks"]["MT-Bench"]["models"]["elo"]["categories"] == [1.25 + index for index in range(8)]


def test_models_of_one_benchmark_may_come_from_several_files(plot, tmp_path):
    files = [scores_file(tmp_path / f"{name}.json", "mt_bench", MT_CATEGORIES, name) for name in ("a", "b")]
    _, _, figure, series = plot(*files)
    assert len(figure.axes) == 2
    assert list(series["benchmarks"]["MT-Bench"]["models"]) == ["a", "b"]
    status, err, _, _ = plot(files[0], scores_file(tmp_path / "c.json", "mt_bench", MT_CATEGORIES, "a"))
    assert status == 2
    assert "MT-Bench of a is in" in err


def test_scores_without_categories_and_with_gaps(plot, tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"models": {"m": {"first": 3.0, "second": None, "average": 3.0}}}))
    _, _, figure, _ = plot(path)
    (axes,) = figure.axes
    (bars,) = axes.containers
    assert bars[0].get_height() == 3
    assert math.isnan(bars[1].get_height())
    assert axes.get_title() == "s"


@pytest.mark.parametrize(
    "names", [["모델", "日本語"], ["$x_1$ & <b>", "a" * 90], [f"m{n}" for n in range(30)]], ids=len
)
def test_any_names_can_be_drawn(names, plot, tmp_path):
    path = scores_file(tmp_path / "a.json", "mt_bench", MT_CATEGORIES, *names)
    status, err, figure, _ = plot(path, "--title", "점수 100% $5", out="figure.SVG")
    assert status == 0
    shown = [text for text in visible_text(figure) if text]
    if "no installed font" in err:  # where there is no Korean or Japanese one
        assert all(text.isascii() for text in shown)
    looks = [(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in figure.axes[0].containers]
    assert len(set(looks)) == min(len(names), 28)


def run_directory(path, steps, loss=2.0):
    path.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": n, "loss": loss + 1 / n, "tokens": 1000 * n, "tokens_per_second": 50.0 + n, "memory_bytes": 3 * 10**9}
        for n in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": ')
    return path


def test_curves_of_runs(plot, tmp_path):
    status, err, figure, series = plot(run_directory(tmp_path / "elo", 20), run_directory(tmp_path / "full", 300, 5.0))
    assert (status, err) == (0, "")
    loss, speed, memory = figure.axes
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 2]  # the long run has its mean too
    assert list(loss.lines[0].get_xdata()) == [1000 * n for n in range(1, 21)]
    assert list(loss.lines[0].get_ydata()) == [2 + 1 / n for n in range(1, 21)]
    assert list(loss.lines[1].get_ydata()) == [5 + 1 / n for n in range(1, 301)]
    assert speed.lines[0].get_ydata()[-1] == 70
    assert memory.lines[1].get_ydata()[0] == pytest.approx(3)
    assert series["runs"]["full"]["loss"][:2] == [6.0, 5.5]
    assert plot(run_directory(tmp_path / "one", 1))[0] == 0


def test_held_out_losses(plot, tmp_path):
    path = run_directory(tmp_path / "elo", 20)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()[:-1]]
    held_out = [line | ({"validation_loss": line["loss"] + 1} if line["step"] % 5 == 0 else {}) for line in lines]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held_out))
    status, err, figure, series = plot(path, run_directory(tmp_path / "full", 10))
    assert (status, err) == (0, "")
    _, circles, _ = figure.axes[0].lines
    assert list(circles.get_xdata()) == [5000, 10000, 15000, 20000]
    assert list(circles.get_ydata()) == [3 + 1 / n for n in (5, 10, 15, 20)]
    assert figure.axes[0].get_title() == "loss (nats a token), circles: held out"
    assert series["runs"]["elo"]["validation_loss"][3:5] == [None, 3.2]


def test_names_that_are_cut_stay_different(plot, tmp_path):
    beginning = "a-run-of-which-the-name-is-much-longer-than-a-legend-has-room-for-"
    names = [f"{beginning}seed-{n}{'-' * 10}" for n in (1, 2)] + [f"x{'y' * 40}{n}{'z' * 40}" for n in (1, 2)]
    paths = [run_directory(tmp_path / name, 3) for name in names]
    _, _, figure, _ = plot(*paths, run_directory(tmp_path / "a" / "same", 3), run_directory(tmp_path / "b" / "same", 3))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(labels)) == len(labels) == 6
    assert all(len(label) <= 52 for label in labels)
    assert "seed-1" in labels[0]
    assert "seed-2" in labels[1]


def test_a_figure_of_files_of_one_name(plot, tmp_path):
    paths = [tmp_path / folder / "speed.json" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps({"rows": ROWS}))
    assert len(plot(*paths)[3]["bars"]) == 4


def test_watch_draws_again(plot, tmp_path, monkeypatch):
    path = run_directory(tmp_path / "elo", 2)
    whole = (path / "metrics.jsonl").read_text()
    seen, drawn = [], []
    draw = charts.draw
    monkeypatch.setattr(charts, "draw", lambda data, *rest: drawn.append(data) or draw(data, *rest))

    def sleep(_):
        seen.append(len(drawn))
        if len(seen) == 1:
            run_directory(path, 5)
        elif len(seen) == 4:
            raise KeyboardInterrupt
        elif len(seen) == 3:
            (path / "metrics.jsonl").write_text(whole)

    monkeypatch.setattr("eval.figures.plot.time.sleep", sleep)
    status, _, _, series = plot(path, "--watch")
    assert (status, seen) == (0, [1, 2, 2, 3])
    assert [len(data["runs"]["elo"]["loss"]) for data in drawn] == [2, 5, 2]
    assert len(series["runs"]["elo"]["loss"]) == 2
    assert {file.name for file in tmp_path.iterdir()} == {"elo", "figure.png", "series.json"}
    (tmp_path / "speed.json").write_text(json.dumps({"rows": ROWS}))
    assert "--watch" in plot(tmp_path / "speed.json", "--watch")[1]


def test_the_running_mean_is_symmetric():
    values = np.arange(30.0)
    np.testing.assert_allclose(charts.running_mean(values, 4), values)
    values[7] = np.nan
    found = charts.running_mean(values, 2)
    assert found[7] == pytest.approx((5 + 6 + 8 + 9) / 4)
    assert found[0] == 0


ROWS = [
    {"method": "elo", "implementation": "elo", "dtype": "bf16", "tokens_per_second": 1400.0, "slowest": 1300.0,
     "fastest": 1500.0, "memory_bytes": 2 * 10**9},
    {"method": "elo", "implementation": "elo", "dtype": "fp32", "tokens_per_second": 700.0, "memory_bytes": 3 * 10**9},
    {"method": "lora", "implementation": "peft", "dtype": "fp32", "tokens_per_second": 99.5, "slowest": 90.0,
     "fastest": 99.0, "memory_bytes": None},
]  # fmt: skip
FIGURE3 = {
    "gigabytes": [10, 50, 200],
    "hours": {"ELO": [1.0, 5.0, 20.0], "FFT": [19.0, 90.0, 380.0]},
    "paper": {"ELO": [1.5, None, None], "FFT": [19.8, None, 300.0]},
}


def test_bars_of_speed_and_figure_3(plot, tmp_path):
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({"rows": ROWS, "ratios": {"x": 1.0}, "figure3": FIGURE3}))
    status, err, figure, series = plot(path, out="figure.pdf")
    assert (status, err) == (0, "")
    speed, memory, lines = figure.axes
    assert [label.get_text() for label in speed.get_yticklabels()] == ["elo", "lora (peft)"]
    widths = [[bar.get_width() for bar in bars] for bars in speed.containers if hasattr(bars, "patches")]
    assert widths[0][0] == 1400
    assert math.isnan(widths[0][1])
    assert widths[1] == [700, 99.5]
    assert {"1,400", "700", "99.50"} == {text.get_text() for text in speed.texts}
    assert {"2.00", "3.00"} == {text.get_text() for text in memory.texts}
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines.lines}
    assert drawn == {
        "ELO": ([10, 50, 200], [1, 5, 20]),
        "ELO, paper": ([10], [1.5]),
        "FFT": ([10, 50, 200], [19, 90, 380]),
        "FFT, paper": ([10, 200], [19.8, 300]),
    }
    assert series["figure3"]["paper"]["ELO"] == [1.5, None, None]
    assert series["bars"]["lora (peft)"]["fp32"]["tokens_per_second"] == 99.5
    path.write_text(json.dumps({"rows": [], "figure3": FIGURE3}))
    assert len(plot(path)[2].axes) == 1
    (tmp_path / "other.json").write_text(json.dumps({"rows": ROWS}))
    assert len(collect([tmp_path / "other.json", path])["bars"]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "bad.json: not valid JSON"),
        ("{}", "bad.json: JSON of eval score ('models'), JSON of benchmarks.training_step ('rows'), or the"),
        ('{"models": {}}', "bad.json: no models"),
        ('{"models": {"m": 3}}', "bad.json: models.m must have figures"),
        ('{"models": {"m": {"first": "7"}}}', "bad.json: models.m: '7' is not a number"),
        ('{"models": {"m": {"first": 85}}}', "bad.json: models.m: 85 is not from 0 to 10"),
        ('{"models": {"m": {"categories": {"a": -3}}}}', "bad.json: models.m.a: -3 is not from 0 to 10"),
        ('{"models": {"m": {"categories": {"수학(Math)": 3, "Math": 4}}}}', "two categories are called 'Math'"),
        ('{"rows": [{"tokens_per_second": -1}]}', "rows[0].tokens_per_second: -1 is not from 0 to 1e+300"),
        ('{"rows": [{"tokens_per_second": 1}, {"tokens_per_second": 2}]}', "rows[1]: another row has the same method"),
        ('{"rows": [], "figure3": {"gigabytes": [1, NaN]}}', "figure3: gigabytes must be numbers"),
        ('{"rows": [], "figure3": {"gigabytes": [1], "hours": {"a": [0]}}}', "hours.a: 0 hours have no place"),
        ('{"rows": []}', "bad.json: no rows"),
        ('{"rows": [{"method": "elo"}]}', "bad.json: rows[0]: no tokens_per_second"),
        ('{"rows": [3]}', "bad.json: rows[0] must be an object"),
        ('{"rows": [], "figure3": []}', "bad.json: figure3: gigabytes must be a list"),
        ('{"rows": [], "figure3": {"gigabytes": [1, 2], "hours": {"a": [1]}}}', "hours.a: 1 hours for 2 gigabytes"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(content, message, plot, tmp_path):
    (tmp_path / "bad.json").write_text(content)
    status, err, _, _ = plot(tmp_path / "bad.json")
    assert (status, len(err.splitlines())) == (2, 1)
    assert message in err


def test_other_mistakes(plot, tmp_path, monkeypatch):
    scores = scores_file(tmp_path / "a.json", "mt_bench", MT_CATEGORIES, "m")
    run = run_directory(tmp_path / "run", 3)
    assert "one figure shows one kind of results, not scores and runs" in plot(scores, run)[1]
    assert "a figure's name ends in .png, .pdf, .svg" in plot(scores, out="figure.gif")[1]
    (run / "metrics.jsonl").write_text("")
    assert "metrics.jsonl: no step was written yet" in plot(run)[1]
    (run / "metrics.jsonl").unlink()
    assert "no metrics.jsonl is here" in plot(run)[1]
    assert "absent.json: cannot be read" in plot(tmp_path / "absent.json")[1]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "eval.figures.charts")
    monkeypatch.delattr("eval.figures.charts")
    assert plot(scores)[1] == "error: eval plot draws with matplotlib: pip install matplotlib\n"
