"""What README.md and docs/ say of this repository is there: files, functions, commands, options, links."""

import argparse
import ast
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest
from shown_commands import PAGES, ROOT, commands, in_backticks, script_of

from elo.common.errors import UserError

README = PAGES[0].read_text()
ROOMS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"models", "data", "runs"}  # not what users make
OTHERS = {"--max-restarts"}  # options of torchrun
PARSE = argparse.ArgumentParser.parse_args


@pytest.fixture(scope="module", params=PAGES, ids=lambda path: path.stem)
def page(request):
    return request.param.read_text()


def here(path: str) -> bool:
    return (ROOT / path).exists()


@cache
def file_names() -> set[str]:
    return {path.name for room in ROOMS if room[0] != "." for path in (ROOT / room).rglob("*.py")}


def test_files(page):
    named = {name for name in in_backticks(page) if re.fullmatch(r"[\w.-]+/[\w./-]*|[\w-]+\.(py|md)", name)}
    ours = {name for name in named if name.endswith(".py") or "/" not in name or name.split("/")[0] in ROOMS}
    assert {name for name in ours if not here(name) and name not in file_names()} == set()


def test_links(page):
    for target in re.findall(r"\]\(([^)]+)\)", page):
        path, _, heading = target.partition("#")
        if path.startswith("http"):
            continue
        folder = ROOT if page == README else ROOT / "docs"
        assert (folder / path).exists(), target
        text = (folder / path).read_text(errors="replace")  # a picture, too
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
        assert not heading or heading in anchors, target


def tree() -> list[str]:
    """The paths in README's tree, each under the directories that it is indented below."""
    (block,) = re.findall(r"((?:^    .+\n)+)", README[: README.index("\n## ")], re.MULTILINE)[1:]
    paths, above = [], {}
    for line in block.splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        above = {level: folder for level, folder in above.items() if level < depth}
        paths.append("".join(above.values()) + name)
        above[depth] = name
    return paths


def test_tree():
    """It has all of the method and all rooms, and nothing else."""
    paths = tree()
    assert [path for path in paths if not here(path)] == []
    modules = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *ROOT.glob("elo/*.py")]}
    assert {path for path in paths if path.endswith(".py")} == modules - {"elo/__init__.py"}
    rooms = {f"elo/{path.parent.name}/" for path in ROOT.glob("elo/*/__init__.py")}
    assert {path for path in paths if path.startswith("elo/") and path.endswith("/")} - {"elo/"} == rooms


def test_paper_and_code():
    rows = re.findall(r"^\| .+ \| `(\S+\.py)` \| (.+) \|$", README, re.MULTILINE)
    assert len(rows) > 20
    for path, names in rows:
        defined = {node.name for node in ast.parse((ROOT / path).read_text()).body if hasattr(node, "name")}
        assert set(re.findall(r"`(\w+)`", names)) <= defined, path


def test_new_benchmark(tmp_path):
    """The file that docs/evaluation.md shows is a whole one."""
    text = (ROOT / "docs/evaluation.md").read_text().partition("## A new benchmark")[2]
    module = {}
    exec("\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") or not line), module)
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/valid.jsonl").write_text(
        '{"goal": "Dry a cup", "sol1": "wipe it", "sol2": "fill it", "label": 0}'
    )
    (question,) = module["TASKS"][0].questions(tmp_path)
    assert question == ("Question: Dry a cup\nAnswer:", ["wipe it", "fill it"], 0)


def test_diff_of_an_architecture():
    """The lines that docs/architectures.md adds are in the files that it names."""
    text, checked = "", 0
    for line in re.findall(r"^    (\+.+)$", (ROOT / "docs/architectures.md").read_text(), re.MULTILINE):
        if line.startswith("+++ "):
            text = (ROOT / line[4:]).read_text()
        else:
            assert f"{line[1:]}\n" in text, line
            checked += 1
    assert checked > 20


# ---- commands


class ParsedError(Exception):
    """A script has read its command line, and is to do nothing else."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def read_command_line(monkeypatch, path: Path, arguments: list[str]) -> argparse.ArgumentParser:
    """Run a script until it has read its arguments; what is wrong with them is raised."""

    def parse_args(parser, *_):
        try:
            PARSE(parser, arguments)
        except UserError as error:
            raise AssertionError(f"{path.name} {' '.join(arguments)}: {error}") from None
        raise ParsedError(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises(ParsedError) as parsed:
        runpy.run_path(str(path), run_name="__main__")
    return parsed.value.parser


def test_commands_are_found():
    scripts = {str(script_of(words)[0].relative_to(ROOT)) for words in commands(README)}
    assert {"train.py", "align.py", "merge_chat_vector.py", "sft.py", "eval/__main__.py"} <= scripts


def test_make(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([\w-]+)", page, re.MULTILINE)) <= targets


def test_commands(page, monkeypatch):
    """Each is one that its script takes: known options with values of the right kind, and none missing."""
    for words in commands(page):
        path, arguments = script_of(words)
        assert path.exists(), " ".join(words)
        if path.name == "questions.py" or not arguments or {"...", "--help"} & set(arguments):
            continue
        read_command_line(monkeypatch, path, arguments)


def test_options(page, monkeypatch):
    """Options that are named by themselves are somebody's."""
    parsers = []
    eval_parser = read_command_line(monkeypatch, ROOT / "eval/__main__.py", ["score", "x"])
    for action in eval_parser._subparsers._group_actions:
        parsers += action.choices.values()
    for script, arguments in {
        "train.py": [],
        "align.py": [],
        "merge_chat_vector.py": ["--model=a", "--instruct=a", "--base=a", "--out=a"],
        "sft.py": ["--model=a", "--data=a"],
        "elo/planning/__main__.py": ["--model=a"],
        "elo/generation/__main__.py": ["--model=a"],
        "benchmarks/training_step/__main__.py": ["--model=a"],
        "experiments/__main__.py": ["table1"],
    }.items():
        parsers.append(read_command_line(monkeypatch, ROOT / script, arguments))
    known = {option for parser in parsers for option in parser._option_string_actions} | OTHERS
    quoted = [quoted for quoted in in_backticks(page) if not re.match(r"(python|torchrun) ", quoted)]
    assert {option for text in quoted for option in re.findall(r"--[\w-]+", text)} - known == set()
