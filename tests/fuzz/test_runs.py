"""Hostile directories of runs: what a run goes on from, and what a later stage reads of an earlier one."""

import json
import os
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from artifacts import LLAMA, json_lines
from harness import case_directory, cases, result_or_user_error
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import changed_bytes, changed_json, changed_json_file, dumped
from small_tokenizer import write_tokenizer

from elo import pretraining
from elo.common.written import RUN
from elo.model.config import ModelConfig
from elo.runs.directory import METRICS, Metrics, check_out, open_run, option_values
from elo.runs.health import Health
from elo.runs.states import States

WORLD = SimpleNamespace(
    rank=0,
    local_rank=0,
    size=1,
    device=torch.device("cpu"),
    wait=lambda: None,
    say=str,
    on_rank_0=lambda function, *arguments: function(*arguments),
    locked=[],
    from_rank_0=lambda value: value,
    gather=lambda value: [value],
)
TRAINING = {"resume": False, "restart": False, "overwrite": False, "lr": 0.1, "micro_batch": 4, "save_every": None}
DATA = {"target texts": "a" * 64, "first document": 0}
STEPS = [
    {"step": step, "loss": 2.5, "grad_norm": 1.0, "seconds": step * 0.1, "epoch": step, "validation_loss": 2.0}
    for step in (1, 2, 4)
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tokenizer, texts of two languages and a token cache, and the arguments of a stage that reads them."""
    directory = write_tokenizer(tmp_path_factory.mktemp("project") / "model").parent
    for name in ("ko", "en"):
        (directory / f"{name}.jsonl").write_bytes(
            json_lines([{"text": f"{name} {number} " * 9} for number in range(9)])
        )
    arguments = Namespace(
        model=directory / "model",
        target=[directory / "ko.jsonl"],
        source=[directory / "en.jsonl"],
        target_fraction=0.9,
        gb=None,
        text_field="text",
        target_field=None,
        source_field=None,
        skip_malformed=False,
        cache=directory / "cache",
        workers=1,
        seed=0,
        seq_len=8,
    )
    windows = pretraining.open_windows(arguments, ModelConfig.from_json(LLAMA), WORLD)
    notes = {"stream": windows.mixture.identity, "consumed": windows.consumed(2), "layers": [1, 3]}
    return arguments, json.loads(json.dumps(notes))


@cases(60)
@given(st.data())
def test_elo_json(project, data):
    arguments, notes = project

    def read():
        windows = pretraining.open_windows(arguments, ModelConfig.from_json(LLAMA), WORLD, after=directory)
        return windows[0]

    with case_directory() as directory:
        (directory / "elo.json").write_bytes(data.draw(changed_json_file(notes) | changed_json(notes).map(dumped)))
        result_or_user_error(read)


@cases(60)
@given(st.data(), st.sampled_from([{}, {"restart": True}, {"overwrite": True}, {"resume": True}]))
def test_run_json(data, how):
    with case_directory() as directory:
        arguments = Namespace(out=directory / "out", **TRAINING | how)

        def begin():
            goes_on = check_out(arguments, WORLD)
            open_run(arguments, WORLD, goes_on, DATA)
            os.close(WORLD.locked.pop())

        begin()
        run = json.loads((arguments.out / RUN).read_bytes())
        assert run["options"] == option_values(arguments)
        (arguments.out / RUN).write_bytes(data.draw(changed_json_file(run)))
        result_or_user_error(begin, writes=arguments.out)


@cases(60)
@given(st.data(), st.sampled_from([0, 2, 9]))
def test_metrics(data, step):
    lines = [dumped(line) for line in STEPS]
    number = data.draw(st.integers(0, len(lines) - 1))
    changed = changed_json(STEPS[number]).map(dumped)
    lines[number] = data.draw(st.one_of(changed, changed, changed_bytes(lines[number]), st.just(b"[" * 50_000)))

    def go_on():
        with Metrics(directory, step, WORLD) as metrics:
            Health((line["loss"], line["grad_norm"]) for line in metrics.before * 9).judge(2.5, 1.0)
            ended = [(line["validation_loss"], line["epoch"]) for line in metrics.before if "validation_loss" in line]
            min(ended, default=None)
            metrics.write({"step": step + 1})
        *kept, last = (directory / METRICS).read_bytes().splitlines()
        assert json.loads(last) == {"step": step + 1}
        assert all(json.loads(line)["step"] <= step for line in kept)

    with case_directory() as directory:
        (directory / RUN).write_text(json.dumps({"written": [METRICS]}))
        (directory / METRICS).write_bytes(b"\n".join([*lines, b""]))
        result_or_user_error(go_on, writes=directory)


@cases(30, share=0.5)
@given(
    st.lists(st.sampled_from(["step-3", "step-03", "step-12", "step-", "step-x", "step--1", "step-3 copy", "step-٣"]))
)
@example(["step-3", "step-3 copy", "step-x"])
def test_names_of_states(names):
    """What is no state of the run is neither taken for one nor removed."""
    with case_directory() as directory:
        for name in names:
            (directory / name).mkdir(exist_ok=True)
            (directory / name / "state.json").touch()
        states = States(directory, None, [], WORLD, None, keep=1)
        result_or_user_error(states._remove_all_but_newest, writes=directory)
        others = {name for name in names if name not in ("step-3", "step-12")}
        assert others <= {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("name", [RUN, METRICS, "elo.json"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "/dev/zero"])
def test_what_is_no_file(project, name, kind):
    with case_directory() as directory:
        match kind:
            case "fifo":
                os.mkfifo(directory / name)
            case "directory":
                (directory / name).mkdir()
            case _:
                (directory / name).symlink_to(kind)
        arguments = Namespace(out=directory, **TRAINING)
        result_or_user_error(lambda: check_out(arguments, WORLD))
        result_or_user_error(lambda: Metrics(directory, 3, WORLD).__exit__() if name == METRICS else None)
        result_or_user_error(lambda: pretraining.read_consumed(directory))
