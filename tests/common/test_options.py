"""Options as every command reads them: no empty values, values with a dash in front, ~."""

import importlib
import sys
from pathlib import Path

import pytest

from elo.common.errors import UserError, exit_status
from elo.common.options import Parser, positive


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


def test_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = parser().parse_args(["--out=~/runs", "--target", "~/a", "b~", "--layers", "~"])
    assert parsed.out == tmp_path / "runs"
    assert parsed.target == [f"{tmp_path}/a", "b~"]
    assert parsed.layers == "~"
    with pytest.raises(UserError, match=r"~nobody-here/x: there is no such user; write \./~nobody-here/x"):
        parser().parse_args(["--out", "~nobody-here/x"])


COMMANDS = [
    "train --layers",
    "train --model",
    "align --elo",
    "align --out",
    "merge_chat_vector --layers",
    "sft --chat-format",
    "elo.generation.chat --prompt",
    "elo.planning.plan --layers",
    "eval.__main__ plot --out",
    "benchmarks.training_step --methods",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command(command, monkeypatch, capsys):
    program, *words = command.split()
    monkeypatch.setattr(sys, "argv", [program, *words, ""])
    with pytest.raises(SystemExit) as status:
        exit_status(importlib.import_module(program).main)
    assert status.value.code == 2
    assert f"{words[-1]}: its value is empty" in capsys.readouterr().err
