"""The projects on which several files of tests run."""

import json
import os
import shutil
from pathlib import Path

import pytest
from many_processes import SMALL_STEPS
from small_runs import make_project, run_here


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
    return make_project(tmp_path_factory.mktemp("project"), documents=30)


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
