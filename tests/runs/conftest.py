"""The projects on which several files of tests run."""

import json
import os
import shutil
from functools import cache
from pathlib import Path

import pytest
from many_processes import SMALL_STEPS
from small_runs import interrupt, make_project, result, run_here, states


@pytest.fixture(scope="session")
def crowded(tmp_path_factory):
    """A working directory of runs of many processes; `alone` in it is that of a single one."""
    directory = make_project(tmp_path_factory.mktemp("project"), documents=30)
    big = [json.dumps({"text": f"{number} " + "둘째로 더 많은 글이 필요하다. " * 9}) for number in range(30_000)]
    (directory / "big.jsonl").write_text("\n".join(big))
    os.chdir(directory)
    assert run_here(SMALL_STEPS, "alone") == 0
    return directory


@pytest.fixture(scope="session")
def module_project(tmp_path_factory):
    """Among its files is the result of a stage 1, `elo`."""
    directory = make_project(tmp_path_factory.mktemp("project"), documents=30)
    os.chdir(directory)
    assert run_here("train --max-steps 2", "elo") == 0
    return directory


@pytest.fixture
def project(module_project, monkeypatch):
    """The working directory; what a test leaves in it is removed."""
    monkeypatch.chdir(module_project)
    kept = set(module_project.iterdir())
    yield module_project
    for path in set(module_project.iterdir()) - kept:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.fixture
def tuned(project):
    """A finished run that keeps the models of epochs."""
    assert run_here("sft --keep every --epochs 2", "R") == 0
    return Path("R")


@pytest.fixture(scope="session")
def alone():
    """What a command leaves that nobody interrupts. Each runs once."""

    @cache
    def result_of(command):
        assert run_here(command, "alone") == 0
        found = result(Path("alone"))
        shutil.rmtree("alone")
        return found

    return result_of


@pytest.fixture(scope="session")
def stopped(module_project):
    """A run of `train --save-every 3` that was stopped after step 7, for tests to copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(module_project)
        interrupt(patch, 7)
        assert run_here("train --save-every 3", "stopped") == 0
    assert states(module_project / "stopped") == ["step-6", "step-7"]
    return module_project / "stopped"
