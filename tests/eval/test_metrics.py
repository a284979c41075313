"""The figures of log-likelihood benchmarks on results made up for it."""

import pytest

from eval.likelihood.choice import summarize
from eval.likelihood.metrics import best, macro_f1
from eval.tasks import Question, Task


def test_acc_norm_divides_by_characters():
    """By bytes, or with the space in front of a choice, the other one would be the likeliest."""
    question = Question("Q", ["abcdefgh", "안녕"], 0)
    task = Task("made_up", lambda record: question, (), (), metrics=("acc", "acc_norm"))
    results = summarize([task], [], {"made_up": [question]}, {("made_up", 0): [-13.0, -3.3]})
    assert (results["made_up"]["acc"], results["made_up"]["acc_norm"]) == (0, 1)


def test_of_equals_the_first_is_taken():
    assert best([-2.0, -1.0, -1.0]) == 1


def test_macro_f1_by_hand():
    # Class 0: 1 hit, 1 missed, 0 wrong; class 1: 1 hit, 0 missed, 1 wrong; class 2: predicted once, never right.
    assert macro_f1([0, 0, 1], [0, 1, 1]) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert macro_f1([0, 0], [0, 2]) == pytest.approx((2 / 3 + 0) / 2)
