"""A project that tests only read, each in a directory of its own."""

import pytest
from small_runs import make_project


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def in_project(project, tmp_path, monkeypatch):
    for path in project.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
