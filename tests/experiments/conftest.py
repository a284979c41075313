"""A project for experiments, whose signals are given back."""

import signal

import pytest
from small_runs import make_base


@pytest.fixture(autouse=True)
def _same_signals():
    """An experiment takes them for itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def project(tmp_path, monkeypatch):
    make_base(tmp_path, documents=400)
    monkeypatch.chdir(tmp_path)
    return tmp_path
