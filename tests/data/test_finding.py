"""Which files are texts, by what names they go, and what is said of the others."""

import errno
import os
from pathlib import Path

import pytest

from elo.common.errors import UserError
from elo.data.documents import SUPPORTED
from elo.data.finding import find_files


def test_find_files(tmp_path, monkeypatch):
    for name in ["b.jsonl", "a.txt", "deep/er/c.parquet", "deep/d.JSONL.GZ", "README.md", ".hidden.txt", ".git/e.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    everything = [tmp_path / name for name in ["a.txt", "b.jsonl", "deep/d.JSONL.GZ", "deep/er/c.parquet"]]
    assert find_files([tmp_path]) == everything
    assert find_files([tmp_path / "deep", tmp_path, tmp_path / "a.txt"]) == everything  # each once
    assert find_files([f"{tmp_path}/*"]) == everything  # a glob that matches directories and other files too
    assert find_files([f"{tmp_path}/**/*.parquet"]) == everything[-1:]
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in find_files(["deep/../a.txt", "b.jsonl", tmp_path / "b.jsonl"])] == [
        "deep/../a.txt",
        str(tmp_path / "b.jsonl"),
    ]


def test_a_name_with_glob_characters(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    assert find_files([tmp_path / "a[1].txt"]) == [tmp_path / "a[1].txt"]


def test_endings_in_any_case(tmp_path):
    names = [
        f"{stem}{packing}" for stem in ("a.txt", "b.jsonl", "c.json", "d.ndjson") for packing in ("", ".gz", ".zst")
    ]
    names = sorted([*names, *map(str.upper, names), "e.parquet", "E.PARQUET"])
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in find_files([tmp_path])] == names


def test_linked_folders_are_followed_once_each(tmp_path):
    """By the name without a link if there is one, whatever the order of entries and patterns; circles are no trap."""
    for name in ["in/a.txt", "in/deep/b.txt", "out/c.txt", "out/more/d.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    here = tmp_path / "in"
    for name, target in [("0", "deep"), ("round", "."), ("deep/up", ".."), ("out", "../out"), ("x", "../out/more")]:
        (here / name).symlink_to(target)
    (tmp_path / "out/back").symlink_to(here)
    (here / ".hidden").symlink_to(tmp_path / "out")
    (here / "e.txt").symlink_to("a.txt")  # a linked file is a file of its own
    own = [here / name for name in ("a.txt", "deep/b.txt", "e.txt")]
    linked = [here / name for name in ("out/c.txt", "out/more/d.txt")]
    assert find_files([here]) == own + linked
    assert find_files([f"{here}/**"]) == find_files([f"{here}/**/*.txt"]) == own + linked
    assert find_files([f"{here}/**/more/*"]) == [here / "out/more/d.txt"]
    assert find_files([here / "round"]) == [here / "round" / path.relative_to(here) for path in own + linked]
    outside = [tmp_path / name for name in ("out/c.txt", "out/more/d.txt")]
    for patterns in ([here, tmp_path / "out"], [tmp_path / "out", here], [tmp_path], [here / "out", tmp_path]):
        assert find_files(patterns) == own + outside


def test_a_link_to_a_folder_that_is_gone(tmp_path):
    """As of a disk that is not mounted: its texts would be missing without a word."""
    (tmp_path / "a.txt").touch()
    (tmp_path / "disk").symlink_to("/absent/texts")
    for pattern in (tmp_path, f"{tmp_path}/*", f"{tmp_path}/**", tmp_path / "disk"):
        with pytest.raises(UserError, match="disk: a link that leads nowhere, perhaps to a folder of texts"):
            find_files([pattern])
    (tmp_path / "disk").rename(tmp_path / ".disk")
    (tmp_path / "README.md").symlink_to("absent.md")
    assert find_files([tmp_path]) == [tmp_path / "a.txt"]


def test_the_files_left_out_are_counted(tmp_path, capsys, monkeypatch):
    names = "a.jsonl README.md b.md .c.txt .git/d.txt checksums e.CSV.gz f.tar.gz g.v1.bin h\x1b[1m"
    for name in [*names.split(" "), *(f"part.{number}" for number in range(9))]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_files([tmp_path]) == find_files([f"{tmp_path}/*", f"{tmp_path}/*.jsonl"]) == [tmp_path / "a.jsonl"]
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        f"{tmp_path}: left out, as no texts: 2 hidden, 2 .md, 2 without an ending, "
        "1 .csv.gz, 1 .tar.gz, 1 .bin, 1 .0, 1 .1, 7 others"
    )
    assert second.startswith(f"{tmp_path}/* and 1 more: left out, as no texts: 2 .md, ")
    find_files([tmp_path / "a.jsonl"])
    monkeypatch.setenv("RANK", "1")
    find_files([tmp_path])
    assert capsys.readouterr().err == ""


def test_files_that_are_packed_and_unpacked_are_told(tmp_path, capsys):
    """Their texts would be trained on twice."""
    for name in ("a.jsonl", "a.jsonl.gz", "b.txt", "b.txt.zst", "c.jsonl.gz", "d/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert len(find_files([tmp_path])) == 6
    told = f"{tmp_path}/a.jsonl.gz: it is there without .gz too, and both are read; so are 2 such pairs in all\n"
    assert capsys.readouterr().err == told
    find_files([tmp_path / "a.jsonl.gz", tmp_path / "b.txt"])
    assert capsys.readouterr().err == ""


def test_a_pattern_without_text_files(tmp_path):
    (tmp_path / "a.csv").touch()
    supported = f"no text file there; supported are {SUPPORTED}"
    for pattern, message in [
        (f"{tmp_path}/missing.txt", "no such file or directory"),
        (f"{tmp_path}/*.txt", "no such file or directory"),
        (f"{tmp_path}/a.csv", supported),
        (f"{tmp_path}", supported),
        (f"{tmp_path}/*", supported),
    ]:
        with pytest.raises(UserError) as caught:
            find_files([pattern])
        assert str(caught.value) == f"{pattern}: {message}"


def test_a_directory_that_may_not_be_read(tmp_path, monkeypatch):
    """Refused by the system's call itself, since root may read everything."""
    closed = tmp_path / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="closed: cannot be read: Permission denied"):
        find_files([tmp_path])
