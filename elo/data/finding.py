"""Names on the command line to files of text."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from elo.common.errors import UserError
from elo.common.terminal import note
from elo.data.documents import DOCUMENT_ENDINGS, SUPPORTED

PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")  # of the ending before it one wants to know too
MOST_KINDS = 8


def find_files(patterns: Sequence[str | Path]) -> list[Path]:
    """The text files that files, directories and globs (`**` too) name, sorted, each once.

    Directories are searched to any depth, without hidden entries. Linked directories are followed, but none is searched
    twice. Other files in directories or globs are left out, and one line on stderr counts them by ending; another one
    tells of files that are there packed and unpacked. A pattern without any text file is a `UserError`, and so is a
    link that may have led to a folder.
    """
    found: dict[str, str] = {}  # from where a file is, without links to directories, to how it is called
    left_out: set[str] = set()
    for pattern in map(str, patterns):
        is_glob = not os.path.exists(pattern)
        names = sorted(_matches(pattern)) if is_glob else [pattern]
        if not names:
            raise UserError(f"{pattern}: no such file or directory")
        texts = []
        for name in names:
            for path in _entries_below(name) if os.path.isdir(name) else [name]:
                if path.lower().endswith(DOCUMENT_ENDINGS) and (path == name or not _is_hidden(path)):
                    texts.append(path)
                elif not (os.path.exists(path) or _is_hidden(path) or os.path.splitext(path)[1]):
                    raise UserError(
                        f"{path}: a link that leads nowhere, perhaps to a folder of texts; mend or remove it"
                    )
                else:
                    left_out.add(_place(path))
        if not texts:
            raise UserError(f"{pattern}: no text file there; supported are {SUPPORTED}")
        for path in texts:
            found[_place(path)] = min(path, found.get(_place(path), path), key=_rank)
    if left_out := left_out - set(found):
        more = f" and {len(patterns) - 1} more" if len(patterns) > 1 else ""
        note(f"{patterns[0]}{more}: left out, as no texts: {_counted(left_out)}")
    names = set(found.values())
    if twice := sorted(name for name in names if name.endswith(PACKED) and os.path.splitext(name)[0] in names):
        more = f"; so are {len(twice)} such pairs in all" if len(twice) > 1 else ""
        note(f"{twice[0]}: it is there without {os.path.splitext(twice[0])[1]} too, and both are read{more}")
    return sorted(map(Path, names), key=os.path.abspath)


def _matches(pattern: str) -> Iterator[str]:
    """What a glob names, and with `**` all files below it: `glob` itself goes round in circles of links there."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    head, wanted = os.sep.join(parts[: parts.index("**")]), parts[parts.index("**") :]
    for top in glob.glob(head or (os.sep if pattern.startswith(os.sep) else os.curdir)):
        for path in _entries_below(top):
            if not _is_hidden(path) and _fits(os.path.relpath(path, top).split(os.sep), wanted):
                yield path


def _fits(parts: list[str], wanted: list[str]) -> bool:
    """Whether a glob's parts fit a path's, or those of a folder in which it is."""
    if not wanted or not parts:
        return not any(part != "**" for part in wanted)
    if wanted[0] == "**":
        return any(_fits(parts[skipped:], wanted[1:]) for skipped in range(len(parts) + 1))
    return fnmatchcase(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def _entries_below(top: str) -> Iterator[str]:
    """All files below, and folders that are hidden.

    Linked folders come last and sorted, so that a file's name does not depend on the order in which a disk lists them.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}")

    seen, tops = set(), [top]
    while tops:
        tops.sort()
        for folder, folders, files in os.walk(tops.pop(0), onerror=fail):
            real = os.path.realpath(folder)
            paths = [os.path.join(folder, name) for name in folders]
            folders[:] = [name for name in folders if real not in seen and not name.startswith(".")]
            if real in seen:
                continue
            seen.add(real)
            tops += [path for path in paths if os.path.islink(path) and not _is_hidden(path)]
            yield from filter(_is_hidden, paths)
            yield from (os.path.join(folder, name) for name in files)


def _is_hidden(path: str) -> bool:
    return os.path.basename(path).startswith(".")


def _place(path: str) -> str:
    """A file without the links that lead to its folder. A link to a file stays: it is a file of its own name."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _rank(path: str) -> tuple[bool, str]:
    """The smallest is the name that a file goes by: one without links, if it was found by several."""
    whole = os.path.abspath(path)
    return whole != _place(path), whole


def _counted(paths: Iterable[str]) -> str:
    """`3 .md, 1 .csv.gz, 2 hidden`."""
    kinds: Counter[str] = Counter()
    for path in sorted(paths):
        endings = Path(path.lower()).suffixes
        ending = "".join(endings[-2:] if endings[-1:] and endings[-1] in PACKED else endings[-1:])
        kinds["hidden" if _is_hidden(path) else ending or "without an ending"] += 1
    rest = sum(count for _, count in kinds.most_common()[MOST_KINDS:])
    shown = [f"{count:,} {kind}" for kind, count in kinds.most_common(MOST_KINDS)]
    return ", ".join(shown + ([f"{rest:,} others"] if rest else []))
