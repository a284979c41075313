"""Every command that README.md and docs/ show runs, in the order of its page, in a tiny form.

The words are the page's; models and texts of those names are made small, and values of `TINY` take the place of those
that would take hours. torchrun's eight processes are two.
"""

import shutil

import pytest
from forking import Fork, fork_group
from judge_server import JudgeServer
from shown_commands import PAGES, commands, main_of, script_of
from shown_place import write_place

TINY = {
    "--seq-len": "32",
    "--samples": "12",
    "--epochs": "1",
    "--rounds": "1",
    "--limit": "1",
    "--seconds": "0.001",
    "--batch-tokens": "64",
    "--max-new-tokens": "4",
    "--methods": "lora",
}
LEFT_OUT = ("--figure3",)  # needs all methods, each in processes of its own; tests/benchmarks has it
GB = 3e-6  # for each of the command's
# For scripts whose defaults are for models and texts of a real size.
ADDED = {
    "train": "--seq-len 32 --batch-tokens 256 --dtype fp32 --workers 1",
    "align": "--seq-len 32 --batch-tokens 256 --dtype fp32 --workers 1",
    "sft": "--seq-len 64 --epochs 1 --dtype fp32",
    "elo.generation.chat": "--prompt 무엇? --max-new-tokens 3",
    "eval answers": "--max-new-tokens 4 --dtype fp32",
    "eval choice": "--dtype fp32",
    "eval perplexity": "--seq-len 32 --dtype fp32",
    "benchmarks.training_step": "--dtype fp32 --batch 1 --seconds 0.001",
    "benchmarks.ideas": "--only oneDNN's --batch 1 --seq-len 32",
    "benchmarks.losses": "--tokens 32 --vocabulary 1000 --width 64",
    "benchmarks.generation_speed": "--dtype fp32 --batch 1 --prompt-tokens 4 --new-tokens 2 --rounds 1",
    "benchmarks.lm_eval_speed": "--tasks kobest_copa",
}
# What benchmarks measure in fresh processes, forks measure here: all import what they compare with, once.
FORKING = """
import multiprocessing, benchmarks.sides, lm_eval, peft, transformers
benchmarks.sides.get_context = lambda _: multiprocessing.get_context("fork")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("shown"))


def tiny(words):
    """A command's module, and its words with other values."""
    name, arguments = main_of([word for word in words if word not in LEFT_OUT])
    values = [TINY.get(option, value) for option, value in zip([None, *arguments], arguments, strict=False)]
    if "--gb" in values and name in ("train", "align"):
        at = values.index("--gb") + 1
        values[at] = f"{float(values[at]) * GB:g}"
    added = ADDED.get(f"eval {arguments[0]}" if name == "eval.__main__" else name, "").split()
    for option, value in zip(added[::2], added[1::2], strict=True):
        values += [] if option in values else [option, value]
    if name == "experiments.__main__" and "--only" not in values:
        values += [
            "--only",
            "alignment only, 0" if arguments[0] == "figure2" else "base",
        ]  # which nothing is trained for
    return name, values


def run(place, words, judge):
    name, arguments = tiny(words)
    if arguments[:1] == ["judge"]:
        arguments += ["--base-url", judge.url]
    if "*" in " ".join(arguments):
        arguments = [str(path) for word in arguments for path in (sorted(place.glob(word)) if "*" in word else [word])]
    if words[0] == "torchrun":
        processes = fork_group(2, name, arguments, place)
    else:
        processes = [Fork(name, arguments, place, before=FORKING if name.startswith("benchmarks.") else "")]
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, f"{' '.join(words)}\n{out}{err}"
    return out


def shown(page):
    """The page's commands that are whole: without those that are only named."""
    for words in commands(page.read_text()):
        arguments = script_of(words)[1]
        if arguments and not {"...", "--help"} & set(arguments):
            yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_run(page, place, monkeypatch):
    shutil.rmtree(place / "runs", ignore_errors=True)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    with JudgeServer() as judge:
        for words in shown(page):
            run(place, words, judge)


OTHERS = {"Mistral-7B-v0.3": "Mistral-7B-Instruct-v0.3", "Qwen3-8B-Base": "Qwen3-8B"}


@pytest.mark.parametrize("base", OTHERS)
def test_the_pipeline_of_other_models(base, place):
    """Qwen2's commands with other names, as README.md promises."""
    text = PAGES[0].read_text()
    assert f"`mistralai/{base}`" in text or f"`Qwen/{base}`" in text
    chain = [words for words in shown(PAGES[0]) if any("qwen" in word for word in words)]
    assert len(chain) == 4
    names = {"Qwen2-7B-Instruct": OTHERS[base], "Qwen2-7B": base, "qwen": base}
    for command in chain:
        line = "\n".join(command)
        for name, other in names.items():
            line = line.replace(name, other)
        run(place, line.split("\n"), None)
    assert (place / f"runs/{base}-sft/sft.json").exists()
