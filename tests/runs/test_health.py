"""What is marked as a spike, what is not, and what --stop-on-spike does."""

import json
import os
import statistics
from pathlib import Path

import numpy as np
import pytest
from small_runs import lines, make_project, run_here, states

from elo import training
from elo.runs.health import FEWEST, WINDOW, Health, middle_and_spread


def test_the_spread_of_normal_numbers_is_their_deviation():
    numbers = np.random.RandomState(0).normal(5, 2, 100_000).tolist()
    middle, spread = middle_and_spread(numbers)
    assert middle == pytest.approx(5, abs=0.03)
    assert spread == pytest.approx(statistics.stdev(numbers), rel=0.02)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
def test_an_ordinary_run_is_never_marked(noise):
    """A loss that falls from 10 to 2, norms with a long tail, a warmup: 5,000 steps of two seeds."""
    for seed in range(2):
        random, health = np.random.RandomState(seed), Health()
        for step in range(5000):
            loss = (2 + 8 * np.exp(-step / 300)) * (1 + noise * random.normal())
            norm = 0.5 * (1 + 4 * np.exp(-step / 50)) * np.exp(0.4 * random.normal())
            assert health.judge(loss, norm) == []


@pytest.mark.parametrize(
    ("loss", "norm", "wrong"),
    [
        (2.0, 1.0, []),
        (2.3, 1.0, ["loss"]),
        (2.0, 4.0, ["grad_norm"]),
        (2.0, 0.01, ["grad_norm"]),
        (9.0, 50.0, ["loss", "grad_norm"]),
        (1.0, 1.0, []),  # a loss may fall as it likes
    ],
)
def test_what_is_marked(loss, norm, wrong):
    health = Health([(2 + 0.01 * (step % 5), 1 + 0.05 * (step % 7)) for step in range(WINDOW)])
    assert health.judge(loss, norm) == wrong


def test_a_loss_that_has_jumped_for_good_is_news_for_half_a_window():
    health = Health([(2 + 0.01 * (step % 5), 1.0) for step in range(5 * WINDOW)])
    marked = [step for step in range(WINDOW) if health.judge(9 + 0.01 * (step % 5), 1.0)]
    assert marked == [*range(WINDOW // 2)]


def test_no_judgment_of_the_first_steps():
    health = Health()
    assert not any(health.judge(10.0**step, 10.0**step) for step in range(FEWEST))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    directory = make_project(tmp_path_factory.mktemp("project"))
    os.chdir(directory)
    return directory


@pytest.fixture
def spike(project, monkeypatch):
    """The loss of step 31 is tripled, and so is its gradient."""
    monkeypatch.chdir(project)
    accumulate, learning_rate, begun = training.accumulate, training.learning_rate, []

    def noted(step, *rest):
        begun.append(step)
        return learning_rate(step, *rest)

    def tripled(*arguments):
        loss = accumulate(*arguments)
        return 3 * loss if begun[-1] == 30 else loss

    monkeypatch.setattr(training, "learning_rate", noted)
    monkeypatch.setattr(training, "accumulate", tripled)


def test_a_spike_is_marked_and_the_run_goes_on(spike, capfd):
    command = "train --batch-tokens 32 --max-steps 40 --lr 1e-4"
    assert run_here(command, "marked") == 0
    marked = {line["step"]: line["spike"] for line in lines(Path("marked")) if "spike" in line}
    assert marked == {31: ["loss"]}
    assert "step 31: loss out of range" in capfd.readouterr().err


def test_stop_on_spike(spike, capfd):
    command = "train --batch-tokens 32 --max-steps 40 --lr 1e-4 --save-every 7"
    assert run_here(f"{command} --stop-on-spike", "stopped") == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "error: step 31: the loss is" in error
    assert "loss out of range" in error
    assert "jsonl:" in error
    assert "step-28;" in error
    assert states(Path("stopped")) == ["step-21", "step-28"]
    assert len(lines(Path("stopped"))) == 30
    assert not Path("stopped/config.json").exists()
    assert run_here(command, "stopped") == 0  # without it the run goes on, and what it knows of its past is kept
    assert [line["step"] for line in lines(Path("stopped")) if "spike" in line] == [31]
    assert json.loads(Path("stopped/run.json").read_text())["resumed"][0]["command"][-1] == "stopped"
