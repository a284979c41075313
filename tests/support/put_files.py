"""Files of others that a run must leave alone."""

from pathlib import Path


def put(*names, out="out"):
    for name in names:
        Path(out, name).parent.mkdir(parents=True, exist_ok=True)
        Path(out, name).write_text("precious")


def all_there(*names, out="out"):
    return all(Path(out, name).read_text() == "precious" for name in names)
