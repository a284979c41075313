"""The commands that README.md and docs/ show."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def in_backticks(text: str) -> list[str]:
    return [quoted for line in text.splitlines() if line[:4].strip() for quoted in re.findall(r"`([^`]+)`", line)]


def commands(text: str) -> list[list[str]]:
    """The words of each line of code that runs this project; a loop's variable has the first of its values."""
    lines = re.findall(r"^ {4,}(.+)$", text.replace("\\\n", " "), re.MULTILINE)
    lines += [quoted for quoted in in_backticks(text) if re.match(r"(python|torchrun) ", quoted)]
    found, variables = [], {}
    for line in lines:
        line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line.removeprefix("$ "))
        if loop := re.match(r"for (\w+) in (\S+)", line):
            variables[loop[1]] = loop[2]
        if re.match(r"([A-Z_]+=\S+ )*(python|torchrun) ", line):
            found.append(shlex.split(line.replace("[", "").replace("]", ""), comments=True))
    return found


# The module with the `main` of a package that runs as `python -m`.
MAIN = {
    "experiments": "experiments.__main__",
    "elo.generation": "elo.generation.chat",
    "elo.planning": "elo.planning.plan",
    "eval": "eval.__main__",
}


def main_of(words: list[str]) -> tuple[str, list[str]]:
    """The module whose `main` a command runs, and its arguments."""
    script, arguments = script_of(words)
    name = ".".join(script.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    return MAIN.get(name, name), arguments


def script_of(words: list[str]) -> tuple[Path, list[str]]:
    """The file that a command runs, and its arguments."""
    module = words.index("-m") if "python" in words and "-m" in words else None
    if module is not None:
        base = ROOT / words[module + 1].replace(".", "/")
        return base / "__main__.py" if base.is_dir() else base.with_suffix(".py"), words[module + 2 :]
    at = next(number for number, word in enumerate(words) if word.endswith(".py"))
    return ROOT / words[at], words[at + 1 :]
