"""The figures of log-likelihood benchmarks on results made up for it."""

from eval.likelihood.choice import summarize
from eval.likelihood.metrics import best
from eval.tasks import Question, Task


def test_acc_norm_divides_by_characters():
    """By bytes, or with the space in front of a choice, the other one would be the likeliest."""
    question = Question("Q", ["abcdefgh", "안녕"], 0)
    task = Task("made_up", lambda record: question, (), (), metrics=("acc", "acc_norm"))
    results = summarize([task], [], {"made_up": [question]}, {("made_up", 0): [-13.0, -3.3]})
    assert (results["made_up"]["acc"], results["made_up"]["acc_norm"]) == (0, 1)


def test_of_equals_the_first_is_taken():
    assert best([-2.0, -1.0, -1.0]) == 1
