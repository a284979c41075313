"""Options as every command reads them: no empty values, values with a dash in front, ~."""

import importlib
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from elo.common.errors import UserError
from elo.common.options import Parser, positive, positive_int
from eval.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
# The options that are paths, whatever their parsers say of them.
PATHS = {"model", "base", "instruct", "elo", "after", "out", "cache", "target", "source", "data", "json", "plot"}
PATHS |= {"files", "paths", "answers", "references", "judge_prompts", "examples", "bench_dir", "tmp"}


def parser():
    made = Parser(prog="some")
    made.add_argument("--layers")
    made.add_argument("--system", type=str)
    made.add_argument("--scale", type=float)
    made.add_argument("--lr", type=positive)
    made.add_argument("--out", type=Path)
    made.add_argument("--target", nargs="+", metavar="PATH")
    made.add_argument("--exact", action="store_true")
    return made


@pytest.mark.parametrize("value", ["", " ", "\t"])
@pytest.mark.parametrize("option", ["--layers", "--scale", "--lr", "--out", "--target"])
def test_an_empty_value_is_an_error(option, value):
    for words in ([option, value], [f"{option}={value}"]):
        with pytest.raises(UserError, match=f"argument {option}: its value is empty"):
            parser().parse_args(words)
    assert parser().parse_args(["--system", ""]).system == ""


def test_values_with_a_dash_in_front():
    parsed = parser().parse_args(["--layers", "-2,-1", "--scale", "-0.5", "--target", "-a", "b", "--exact"])
    assert (parsed.layers, parsed.scale, parsed.target, parsed.exact) == ("-2,-1", -0.5, ["-a", "b"], True)
    with pytest.raises(UserError, match="unrecognized arguments: --layer "):
        parser().parse_args(["--layer", "1"])


def test_given_twice():
    """The last value counts, as everywhere; of a list nothing is lost, and its default makes room."""
    made = parser()
    made.add_argument("--source", nargs="+", default=["en"])
    read = made.parse_args(
        ["--target", "ko", "--lr", "1", "--target", "ja", "zh", "--lr", "2", "--source", "a", "--source", "b"]
    )
    assert (read.target, read.lr, read.source) == (["ko", "ja", "zh"], 2.0, ["a", "b"])
    made.set_defaults(target=["th"])
    assert vars(made.parse_args(["--target", "vi"])).items() >= {"target": ["vi"], "source": ["en"]}.items()
    assert made.parse_args([]).target == ["th"]


def test_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = parser().parse_args(["--out=~/runs", "--target", "~/a", "b~", "--layers", "~"])
    assert parsed.out == tmp_path / "runs"
    assert parsed.target == [f"{tmp_path}/a", "b~"]
    assert parsed.layers == "~"
    with pytest.raises(UserError, match=r"~nobody-here/x: there is no such user; write \./~nobody-here/x"):
        parser().parse_args(["--out", "~nobody-here/x"])


@pytest.mark.parametrize("value", ["1e101", "1e300", "inf", "nan"])
def test_numbers_that_are_no_amount_of_anything(value):
    """They would overflow where they are multiplied, or be other numbers than they were written."""
    with pytest.raises(UserError, match=f"argument --lr: '{value}' is not a number above 0"):
        parser().parse_args(["--lr", value])
    assert parser().parse_args(["--lr", "1e100"]).lr == 1e100
    with pytest.raises(ArgumentTypeError, match="is not a whole number above 0 and at most 1e\\+15"):
        positive_int("1e16")


PROGRAMS = ["train", "align", "merge_chat_vector", "sft", "elo.generation.chat", "elo.planning.plan"]
PROGRAMS += ["benchmarks.training_step", "benchmarks.gpu", *(f"eval.__main__ {name}" for name in COMMANDS)]
PROGRAMS += [f"benchmarks.{path.stem}" for path in ROOT.glob("benchmarks/*.py") if "def main" in path.read_text()]
PROGRAMS += [f"examples.{name}" for name in ("questions", "smollm2", "texts")]


class Parsed(Exception):  # noqa: N818
    """The parser of a program that is about to read its options."""


def parser_of(program, monkeypatch):
    name, *command = program.split()
    module = importlib.import_module(name)

    def capture(parser):
        raise Parsed(parser)

    with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(Parser, "parse_args", capture)
        getattr(module, "parse_arguments", module.main)()
    (parser,) = parsed.value.args
    for name in command:
        parser = next(action for action in parser._actions if action.dest == "command").choices[name]
    for action in parser._actions:
        action.required = False  # so that one can be tried alone
    return parser


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_of_every_command(program, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    parser = parser_of(program, monkeypatch)
    for action in parser._actions:
        if action.nargs == 0:
            continue
        name = action.option_strings[-1] if action.option_strings else action.metavar

        def value(text, action=action):
            parsed = getattr(parser.parse_args([*action.option_strings[-1:], text]), action.dest)
            return str(parsed[0] if isinstance(parsed, list) else parsed)

        if name == "--system":  # the user may want an empty one
            assert value("") == ""
            continue
        with pytest.raises(UserError, match=f"argument {name}: its value is empty"):
            value("")
        if action.dest in PATHS:
            assert value("~/a b") == "/home/somebody/a b"
        elif action.type is None and action.choices is None:
            assert value("-2,-1") == "-2,-1"
