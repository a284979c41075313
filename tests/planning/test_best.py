"""`--best`: the fastest settings that fit, and the commands of README.md, which have them."""

import json
import shlex
from pathlib import Path

import pytest
from planner import run, write_config
from shown_commands import ROOT, commands, script_of

from elo.planning.best import OF_STAGES

SETTINGS = {"--micro-batch": 2, "--micro-batch-tokens": 2, "--shard": 2}  # words; the others are one
SETTINGS |= dict.fromkeys(("--activation-checkpointing", "--cpu-offload", "--gather-once"), 1)


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    """Models have the names that README.md gives them."""
    for model in ("Llama-3.1-8B", "Llama-3-70B", "Qwen2-7B"):
        write_config(tmp_path / "models" / model, model)
    monkeypatch.chdir(tmp_path)


def best(monkeypatch, capsys, options):
    """The command's words, and all plans."""
    status, out, error = run(monkeypatch, capsys, "--best", "--json", "best.json", *options)
    assert status == 0, error
    result = json.loads(Path("best.json").read_text())
    assert out.splitlines()[-1] == result["command"]
    return shlex.split(result["command"]), result["plans"]


def without_settings(words):
    left = list(words)
    for option, count in SETTINGS.items():
        if option in left:
            del left[left.index(option) : left.index(option) + count]
    return left


def stages_of(page):
    for words in commands(page.read_text()):
        script, arguments = script_of(words)
        if words[0] == "torchrun" and script.stem in OF_STAGES:
            yield script.stem, words, arguments


@pytest.mark.parametrize(("stage", "words", "arguments"), [*stages_of(ROOT / "README.md")])
def test_commands_of_the_readme(stage, words, arguments, monkeypatch, capsys):
    """They are what the planner prints for 8 H100."""
    model = next(word for word in [*arguments, "models/Llama-3.1-8B"] if word.startswith("models/") or "qwen" in word)
    options = without_settings(arguments)
    given = []
    for option in ("--layers", "--seq-len"):
        if option in options:
            at = options.index(option)
            given += options[at : at + 2]
            del options[at : at + 2]
    model = model if model.startswith("models/") else "models/Qwen2-7B"
    printed, _ = best(monkeypatch, capsys, ["--model", model, "--stage", stage, *given, "--", *options])
    assert sorted(printed) == sorted(words)


@pytest.mark.parametrize(
    ("model", "stage"),
    [("8B", "--stage train"), ("8B", "--stage align"), ("8B", "--method lora"), ("1B", "--stage align")],
)
def test_one_card_of_the_readme(model, stage, monkeypatch, capsys):
    path = Path("models/Llama-3.1-8B/config.json")
    if model == "1B":
        small = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
        path.write_text(json.dumps({**json.loads(path.read_text()), **small}))
    options = ["--model", str(path.parent), *stage.split(), "--gpu", "RTX-4090", "--gpus", "1"]
    words, _ = best(monkeypatch, capsys, [*options, "--gb", "0.1", "--bytes-per-token", "3.6"])
    told = next(text for text in (ROOT / "README.md").read_text().split("\n\n") if text.startswith("**One card of 24"))
    assert f"`{' '.join(words[words.index('--micro-batch') :])}`" in " ".join(told.split())


def test_it_is_the_fastest_of_those_that_fit(monkeypatch, capsys):
    """By the planner without --best."""
    options = ["--model", "models/Llama-3.1-8B", "--stage", "align", "--gpu", "A100-80GB", "--gpus", "4"]
    words, plans = best(monkeypatch, capsys, options)
    chosen = plans.index(next(plan for plan in plans if plan["fits"]))
    hours = [plan["hours"] for plan in plans]
    assert hours == sorted(hours) and 0 < chosen < len(plans) - 1
    status, _, _ = run(monkeypatch, capsys, *options, "--json", "one.json", *words[words.index("align.py") + 1 :])
    (one,) = json.loads(Path("one.json").read_text())["plans"]
    assert status == 0 and one["hours"] == hours[chosen]
    kinds = {
        (plan["run"]["shard"], plan["run"]["activation_checkpointing"], plan["run"]["cpu_offload"]) for plan in plans
    }
    assert len(kinds) == 3 * 2 * 2
    assert {plan["run"]["micro_batch"] for plan in plans} == {1, 2, 4, 8, 16, 32, 64}


def test_what_is_given_stays(monkeypatch, capsys):
    others = "--layers 1,16,32 --bridge --gb 9 --seq-len 4096 --batch-tokens 524288"
    settings = "--micro-batch 2 --shard 4 --activation-checkpointing --gather-once --optimizer-in-backward"
    options = f"--model models/Llama-3-70B/config.json --stage train {settings} {others} --bytes-per-token 3.6 -- --out"
    words, plans = best(monkeypatch, capsys, [*options.split(), "runs/my 70B"])
    expected = f"torchrun --nproc_per_node=8 train.py --model models/Llama-3-70B {others} {settings} --clip 0 --out"
    assert words == [*expected.split(), "runs/my 70B"]
    assert {plan["run"]["cpu_offload"] for plan in plans} == {False, True} and len(plans) == 2


def test_the_name_of_a_model_stays(monkeypatch, capsys):
    write_config(Path("models/Llama-v3.0"), "Llama-3.1-8B")
    options = ["--model", "models/Llama-v3.0", "--stage", "train", "--gb", "9.0", "--bytes-per-token", "4"]
    words, _ = best(monkeypatch, capsys, options)
    assert words[words.index("--model") + 1] == "models/Llama-v3.0" and words[words.index("--gb") + 1] == "9"


@pytest.mark.parametrize(
    ("options", "start"),
    [
        (
            "--gpus 16",
            "torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500 --nproc_per_node=8 train.py",
        ),
        ("--gpus 1 --gpu RTX-4090", "python train.py --micro-batch "),
        ("--gpus 4", "torchrun --nproc_per_node=4 train.py"),
        ("--gpus 8 --gpus-per-node 4", "torchrun --nnodes=2"),
    ],
)
def test_nodes(options, start, monkeypatch, capsys):
    base = ["--model", "models/Llama-3.1-8B", "--stage", "train", "--micro-batch", "4", *options.split()]
    assert shlex.join(best(monkeypatch, capsys, base)[0]).startswith(start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--stage align --gpu RTX-4090 --gpu-memory 4 --gpus 1", "align.py needs"),
        ("", "--best: of which stage? say --stage or --method"),
        ("--stage align --gpus 9", "--gpus 9: these are not 2 equal nodes of at most 8"),
        ("--stage align -- --micro-batch 2", "--micro-batch: give it before the --, where it is planned with"),
        ("--stage align -- --seq-len=64", "--seq-len: give it before the --"),
        ("--stage align elo", "elo: not an option"),
    ],
)
def test_mistakes_are_one_line(options, message, monkeypatch, capsys):
    status, out, error = run(monkeypatch, capsys, "--best", "--model", "models/Llama-3.1-8B", *options.split())
    assert (status, out) == (2, "")
    (line,) = error.splitlines()
    assert line.startswith(f"error: {message}")
