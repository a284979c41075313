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


def instead(fixed, options):
    """The options, behind those of `fixed` that are not among them: a list that is given twice would be both."""
    named, kept, is_kept = {word for word in options if str(word).startswith("--")}, [], True
    for word in fixed:
        is_kept = word not in named if str(word).startswith("--") else is_kept
        kept += [word] if is_kept else []
    return [*kept, *options]
