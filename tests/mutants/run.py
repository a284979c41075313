"""Which deliberate faults do the tests notice?

    python tests/mutants/run.py [WORD...]     all of faults.txt, or those whose line has one of these words

Each fault is put into a copy of the project, in which the tests named beside it are run until one fails. Faults that
none notices are survivors: then the exit status is 1. First the same tests must pass without any fault. One that takes
ten times as long as without a fault has hung and is noticed by that.
"""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("faults.txt")
SHORTEST_LIMIT = 180.0  # seconds that tests may take in any case
SERVE = "--serve"
IMPORTED = (
    *("torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.testing"),
    *("transformers.models.llama.modeling_llama", "transformers.models.mistral.modeling_mistral"),
    *("transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen3.modeling_qwen3"),
    *("peft", "lm_eval", "hypothesis", "pytest", "tokenizers", "openai"),
)
LEFT_OUT = (".", "models", "data", "runs")  # starts of names in the project's root


class Fault(NamedTuple):
    group: str  # the list's last comment line
    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file}: {self.old!r} -> {self.new!r}"

    def text(self, root: Path) -> str:
        """The file with the fault in it. Raises ValueError unless the old text is there exactly once."""
        whole = (root / self.file).read_text()
        if (count := whole.count(self.old)) != 1:
            raise ValueError(f"{self}: {count} times there, not once")
        return whole.replace(self.old, self.new)


def read_faults(path: Path = LIST) -> list[Fault]:
    faults, group = [], ""
    for line in path.read_text().splitlines():
        if line.startswith("# "):
            group = line[2:]
        elif line:
            file, old, new, tests = (part.replace("\\n", "\n") for part in line.split(" ¦ "))
            faults.append(Fault(group, file, old, new, tests))
    return faults


class Run(NamedTuple):
    passes: bool
    seconds: float
    said: str


class Copy:
    """A copy of the project, without what is large or made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "project"

        def made(where: str, names: list[str]) -> list[str]:
            at_root = Path(where) == ROOT
            return [name for name in names if name == "__pycache__" or (at_root and name.startswith(LEFT_OUT))]

        copytree(ROOT, self.root, ignore=made)
        if (ROOT / "models").exists():
            (self.root / "models").symlink_to((ROOT / "models").resolve())

        # No compiled files: of two versions of a file in one second and of one size, the first one's would be taken.
        own = {
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(folder),
        }
        self.server = subprocess.Popen(
            [sys.executable, __file__, SERVE],
            cwd=self.root,
            env=os.environ | own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, tests: str, limit: float) -> Run:
        said = self.folder / "said"
        self.server.stdin.write(json.dumps([shlex.split(tests), limit, str(said)]) + "\n")
        self.server.stdin.flush()
        status, seconds = json.loads(self.server.stdout.readline())
        return Run(status == 0, seconds, said.read_text(errors="replace"))

    def run_with(self, fault: Fault, limit: float) -> Run:
        file = self.root / fault.file
        right = file.read_text()
        file.write_text(fault.text(self.root))
        try:
            return self.run(fault.tests, limit)
        finally:
            file.write_text(right)


def serve() -> None:
    """Runs tests in forks of this process, which has what takes seconds to import, and nothing of the project."""
    sys.path[0] = ""  # as in `python -m pytest`
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        words, limit, said = json.loads(line)
        begun, child = time.monotonic(), os.fork()
        if child == 0:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC * (stream == 1) | os.O_APPEND), stream)
            os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *words]))
        ended = 0
        while not ended and time.monotonic() < begun + limit:
            time.sleep(0.02)
            ended, status = os.waitpid(child, os.WNOHANG)
        with suppress(ProcessLookupError):  # else what the tests have started is still there, or they are themselves
            os.killpg(child, signal.SIGKILL)
        if not ended:
            _, status = os.waitpid(child, 0)
        print(json.dumps([status, time.monotonic() - begun]), flush=True)


def main(words: list[str]) -> int:
    faults = [fault for fault in read_faults() if not words or any(word in " ".join(fault) for word in words)]
    for fault in faults:
        fault.text(ROOT)
    begun, workers = time.monotonic(), len(os.sched_getaffinity(0))
    copies: SimpleQueue[Copy] = SimpleQueue()

    def in_a_copy(what: Callable[[Copy], Run]) -> Run:
        copy = copies.get()
        try:
            return what(copy)
        finally:
            copies.put(copy)

    with ExitStack() as stack, ThreadPoolExecutor(workers) as pool:
        for _ in range(workers):
            copy = Copy(Path(stack.enter_context(TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True))))
            stack.callback(copy.server.stdin.close)  # which ends it
            copies.put(copy)
        tests = sorted({fault.tests for fault in faults})
        print(f"{len(faults)} faults; {len(tests)} choices of tests without any of them", flush=True)
        right = dict(zip(tests, pool.map(lambda t: in_a_copy(lambda copy: copy.run(t, 3600)), tests), strict=True))
        for name, run in right.items():
            if not run.passes:
                print(f"{run.said[-3000:]}\nthe tests fail without a fault: {name}")
                return 2

        def attempt(fault: Fault) -> bool:
            limit = SHORTEST_LIMIT + 10 * right[fault.tests].seconds
            run = in_a_copy(lambda copy: copy.run_with(fault, limit))
            print(f"{'SURVIVES' if run.passes else 'noticed '} {run.seconds:4.0f} s  {fault}", flush=True)
            return run.passes

        survives = dict(zip(faults, pool.map(attempt, faults), strict=True))
    print("\n| what | faults | noticed | survivors |\n|---|---|---|---|")
    for group in [*dict.fromkeys(fault.group for fault in faults), "all"]:
        of_group = [survives[fault] for fault in faults if group in (fault.group, "all")]
        print(f"| {group} | {len(of_group)} | {len(of_group) - sum(of_group)} | {sum(of_group)} |")
    print(f"\n{time.monotonic() - begun:.0f} s with {workers} at a time")
    return any(survives.values())


if __name__ == "__main__":
    if sys.argv[1:] == [SERVE]:
        serve()
    else:
        sys.exit(main(sys.argv[1:]))
