"""Which files of a directory are a run's own: a list in its run.json, made before the files are.

Only what is listed is ever removed or replaced, file by file, and never through a link: what somebody keeps beside it
stays. Since a name is noted first, a kill at any moment leaves nothing that the same command cannot take for its own.
"""

import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import read_json_object, replace_json

RUN, NEW = "run.json", "run.json.new"  # of `replace_json`
LIST = "written"  # in run.json
BEGINNING = f'{{\n  "{LIST}": ['.encode()  # of every run.json, so that a part of one can be told from another file
SAVING = ".saving-"  # begins the name of a folder that is listed with all that is in it


class Written:
    """The list in `out`/run.json; `run` is what else that has, or None where there is none, and nothing is noted.

    Names are paths within `out`, with slashes. Raises UserError for a run.json that names anything outside of it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.run: dict[str, Any] | None = read_json_object(out / RUN) if os.path.lexists(out / RUN) else None
        names = (self.run or {}).pop(LIST, None)
        self.is_listed = names is not None
        if not isinstance(names or [], list) or not all(map(_is_inside, names or [])):
            raise UserError(f"{out / RUN}: {LIST} must list files of this directory; mend it or give another one")
        self.names: set[str] = set(names or [])

    @property
    def is_run(self) -> bool:
        """Whether a training run has begun there; what is made at once, as a merge, leaves only the list."""
        return self.run is not None and "options" in self.run

    def save(self) -> None:
        if self.run is None:
            return
        replace_json(self.out / RUN, {LIST: sorted(self.names), **self.run})

    def obstacle(self, name: str, allowed: Collection[str] = ()) -> str | None:
        """What keeps a file from its place: one that is neither listed nor allowed to go, or a link in a folder's."""
        path = Path(name)
        for folder in [*path.parents][-2::-1]:
            place = self.out / folder
            if place.is_symlink() or (place.exists() and not place.is_dir()):
                return folder.as_posix()
        place = self.out / path
        is_folder = place.is_dir() and not place.is_symlink()
        is_ours = name in self.names or name in allowed
        return name if is_folder or (os.path.lexists(place) and not is_ours) else None

    def check(self, names: Iterable[str]) -> None:
        """Raises UserError if a file may not be put there."""
        for obstacle in filter(None, map(self.obstacle, names)):
            raise UserError(f"{self.out / obstacle}: not this run's, but in its way; move it, and start again")

    def add(self, names: Iterable[str]) -> None:
        """Note files that are going to be there."""
        self.names.update(names)
        self.save()

    def remove(self, names: Iterable[str]) -> None:
        """Remove those of these files that are listed, in this order, and the folders that are empty then."""
        names = [name for name in names if name in self.names]
        for name in names:
            if name.startswith(SAVING):
                shutil.rmtree(self.out / name, ignore_errors=True)  # which leaves a link alone
            elif not self.obstacle(name):
                (self.out / name).unlink(missing_ok=True)
                with suppress(OSError):  # there is more in it
                    for folder in [*Path(name).parents][:-1]:
                        (self.out / folder).rmdir()
        self.names.difference_update(names)
        if names:
            self.save()


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder in `out` to write files in before they are moved to their places; gone afterwards."""
    name = f"{SAVING}{os.getpid()}-{time.time_ns()}"
    Written(out).add([name])
    (out / name).mkdir()
    try:
        yield out / name
    finally:
        shutil.rmtree(out / name, ignore_errors=True)
        Written(out).remove([name])


def is_begun(path: Path) -> bool:
    """Whether a file is a run.json, or a part of one that a kill left."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        return BEGINNING.startswith(file.read(len(BEGINNING)))


def _is_inside(name: object) -> bool:
    is_path = isinstance(name, str) and "\0" not in name and name == os.path.normpath(name)
    return is_path and not name.startswith("/") and name.split("/")[0] not in (".", "..")
