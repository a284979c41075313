"""Processes that start at once: forks of one that has imported torch and the project.

What runs in them is what `python SCRIPT` runs, and they are signalled and killed like all processes. Only the seconds
of imports are saved, which tests that start dozens would spend again and again.
"""

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]
_stores: list[TCPStore] = []  # a store ends with its object
MODULES = ("align", "elo.generation.chat", "eval.__main__", "experiments.__main__", "merge_chat_vector", "sft", "train")


class Fork:
    """The `main` of a module with these words on its command line; like subprocess.Popen, as far as tests need it.

    before: Python that runs in the process first, such as one that puts something in a function's place.
    """

    def __init__(
        self,
        module: str,
        words: list[str],
        cwd: Path = ROOT,
        stdin: str = "",
        before: str = "",
        **environment: str,
    ) -> None:
        folder = mkdtemp(dir=_folder().name)
        self.files = {name: Path(folder, name) for name in ("in", "out", "err", "status")}
        self.files["in"].write_text(stdin, encoding="utf-8")
        request = {
            "module": module,
            "words": [str(word) for word in words],
            "cwd": str(cwd),
            "before": before,
            "environment": os.environ | environment,
            "files": {name: str(path) for name, path in self.files.items()},
        }
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self.files["status"].exists():
            self.returncode = os.waitstatus_to_exitcode(int(self.files["status"].read_text()))
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.002)
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        self.wait(timeout)
        return self.said("out"), self.said("err")

    def said(self, name: str) -> str:
        """What is on its stdout ("out") or stderr ("err") by now."""
        return self.files[name].read_text(errors="replace")

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork_group(size: int, module: str, words: list[str], cwd: Path = ROOT, before: str = "") -> list[Fork]:
    """The processes of one run, as torchrun would start them on a node."""
    # As torchrun's agent does, this process has the store: it takes its port at once, so that nobody else can.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _stores.append(store)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(size)}
    place["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return [Fork(module, words, cwd, before=before, **place, **rank) for rank in ranks]


@cache
def _folder() -> TemporaryDirectory:
    """What the processes say; goes with this one."""
    return TemporaryDirectory(ignore_cleanup_errors=True)


@cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.stdin.close)  # which ends it
    return server


def serve() -> None:
    import torch._dynamo  # noqa: F401  what the first step of an optimizer would import

    for name in MODULES:
        importlib.import_module(name)
    status_files: dict[int, str] = {}

    def ended(*_: object) -> None:
        # Another child may end meanwhile, and this function interrupt itself.
        with suppress(ChildProcessError):
            pid, status = os.waitpid(-1, os.WNOHANG)
            while pid:
                path = Path(status_files.pop(pid))
                path.with_suffix(".new").write_text(str(status))
                os.replace(path.with_suffix(".new"), path)
                pid, status = os.waitpid(-1, os.WNOHANG)

    signal.signal(signal.SIGCHLD, ended)
    for line in sys.stdin:
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        child = os.fork()
        if child:
            status_files[child] = request["files"]["status"]
        else:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        if not child:
            break
        print(child, flush=True)
    else:
        return
    for number, name in enumerate(("in", "out", "err")):
        os.dup2(os.open(request["files"][name], os.O_RDWR | os.O_CREAT, 0o600), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  the server's has read ahead
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["module"], *request["words"]]
    exec(request["before"], {})
    from elo.common.errors import exit_status

    exit_status(importlib.import_module(request["module"]).main)


if __name__ == "__main__":
    serve()
