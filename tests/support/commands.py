"""Commands in this process."""

import sys

import pytest

from elo.common.errors import exit_status


def status_of(monkeypatch, main, *argv):
    """The exit status of a `main` with these words on its command line, its name first."""
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    with pytest.raises(SystemExit) as exit_:
        exit_status(main)
    return exit_.value.code
