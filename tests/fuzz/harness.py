"""What every case of hostile input must satisfy: a result or a UserError in one line, in little time and memory.

And nothing else: no other exception, no hang, no file written outside of the directory that was given for it, no
process started, no code run that the input brought along. Linux only, as far as memory is measured.
"""

import faulthandler
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from elo.common.errors import UserError, message_line
from elo.common.terminal import printable
from elo.text import template_process

SECONDS = 15  # of computing; a case takes milliseconds
WAITING = 300  # seconds by the clock, which a loaded machine may need, and what waits for ever does not end in
MEMORY = 1 << 30  # bytes that a case may add to the process
ADDRESSES = 6 << 30  # bytes of addresses that it may add: what asks for more gets a MemoryError
LINE = 4096  # characters of an error

# `make fuzz` sets it: so many new random cases of each kind. Else a few, always the same.
CASES = int(os.environ.get("FUZZ_CASES", 0))

totals: dict[str, Counter[str]] = {}  # of each test: what became of its cases


class Hang(BaseException):
    """Not an Exception, so that nothing on the way takes it for one of the input's."""


def cases(few: int, share: float = 1.0) -> settings:
    """How many cases a test has: `few` of `make test`, `share` of FUZZ_CASES in `make fuzz`."""
    return settings(
        max_examples=max(1, round(CASES * share)) if CASES else few,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if CASES else [])],
        print_blob=True,
    )


def result_or_user_error(call: Callable[[], Any], writes: Path | None = None) -> Any:
    """The result of `call`, or None after a UserError. Everything else that it does fails the test.

    It may write into the directory `writes` and nowhere else.
    """
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split("[")[0].split(" ")[0]
    count = totals.setdefault(test, Counter())
    started, held = time.monotonic(), _resident("VmRSS")
    _reset_peak()
    watch = _Watch(writes)
    result, outcome = None, "results"
    try:
        with watch, _limits():
            result = call()
    except UserError as error:
        outcome = "errors"
        line = message_line(error)
        assert line, "an error without a message"
        assert len(line) <= LINE, f"an error of {len(line)} characters: {line[:200]}"
        assert printable(line) == line, f"an error that is not one line of text: {line!r}"
    except Hang:
        raise AssertionError(f"still at work after {time.monotonic() - started:.0f} s") from None
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of a Rust library, and not an Exception
            raise AssertionError(f"a panic: {error}") from error
        raise
    assert not watch.seen, f"it did more than it may: {watch.seen[:5]}"
    grown = _resident("VmHWM") - held
    assert grown < MEMORY, f"it needed {grown >> 20} MiB"
    count["cases"] += 1  # hypothesis may end one before, from inside of `call`
    count[outcome] += 1
    count["MiB"] = max(count["MiB"], grown >> 20)
    return result


@contextmanager
def _limits() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, WAITING)}
    previous = {number: signal.signal(number, ring) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    faulthandler.dump_traceback_later(2 * WAITING, exit=True)  # for C code, which lets no signal through
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _resident(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


@contextmanager
def bounded_addresses() -> Iterator[None]:
    """Who asks for far more memory than any case may have gets an error, and the machine keeps running."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_resident("VmSize") + ADDRESSES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# ---- what a case does to the rest of the world

FORBIDDEN = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "pickle.find_class",
    "socket.connect",
    "socket.bind",
}
CHANGES = {
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
}
RENDERER = [sys.executable, "-P", Path(template_process.__file__)]
FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HOSTILE = "elo-fuzz-"  # in the name of every directory with hostile files


class _Watch:
    """What Python's audit hooks tell of a case: `seen` are events that no input may cause."""

    active: "_Watch | None" = None

    def __init__(self, writes: Path | None) -> None:
        self.writes = None if writes is None else os.path.realpath(writes)
        self.seen: list[str] = []
        # Of other tests in the same process: they do not belong to the case.
        self.others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}

    def __enter__(self) -> "_Watch":
        _Watch.active = self
        return self

    def __exit__(self, *_: object) -> None:
        _Watch.active = None

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and isinstance(flags, int) and flags & FOR_WRITING:
                self.written(event, path)
        elif event in CHANGES:
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                # A removal relative to an open directory, as shutil.rmtree does it, is not followed.
                if isinstance(path, str | bytes | os.PathLike) and os.path.isabs(os.fsdecode(path)):
                    self.written(event, path)
        elif event == "subprocess.Popen" and list(arguments[1]) == RENDERER:
            return  # it renders chat templates, with limits of its own
        elif event in FORBIDDEN or event == "exec" and HOSTILE in getattr(arguments[0], "co_filename", ""):
            self.seen.append(f"{event} {arguments!r:.200}")

    def written(self, event: str, path: str | bytes | os.PathLike) -> None:
        parent, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        real = os.path.join(os.path.realpath(parent), name)
        allowed = self.writes is not None and (real + os.sep).startswith(self.writes + os.sep)
        if not allowed and real != os.devnull:
            self.seen.append(f"{event} {real}")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _Watch.active is not None and threading.get_ident() not in _Watch.active.others:
        _Watch.active.hear(event, arguments)


sys.addaudithook(_hook)  # it cannot be taken away again, but listens during a case only


@contextmanager
def case_directory() -> Iterator[Path]:
    """A new directory for the files of one case."""
    with tempfile.TemporaryDirectory(prefix=HOSTILE) as name:
        yield Path(name)


def make_what_is_no_file(path: Path, kind: str) -> None:
    """Something in a file's place, or a file that is far too large."""
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "link to /dev/zero":
            path.symlink_to("/dev/zero")
        case "broken link":
            path.symlink_to("absent")
        case "loop":
            path.symlink_to(path.name)
        case _:
            with open(path, "wb") as file:
                file.truncate({"a line of 300 MB": 3 * 10**8, "2 GB of nothing": 2 * 10**9}[kind])
