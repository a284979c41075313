"""A small project on disk, and the scripts run on it: in this process, or as their users run them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import families
import pytest
import torch
from commands import instead
from forking import Fork, fork_group
from small_tokenizer import add_chat_tokens, write_tokenizer

import align
import sft
import train
from elo.common.errors import exit_status
from elo.runs.directory import Metrics

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
KOREAN = "둘째로 더 많은 글이 필요하다. 그리고 끝. "
ENGLISH = "First of all, a tokenizer needs some text. "

TEXT = "--model base --target ko.jsonl --source en.jsonl --seq-len 32 --batch-tokens 128 --lr 1e-2 --dtype fp32"
CHATS = (
    "--model base --data chats.json --chat-format chatml --seq-len 64 --batch-conversations 5"
    " --micro-batch-tokens 200 --lr 1e-2 --dtype fp32 --epochs 3 --validation-fraction 0.2"
)
SCRIPTS = {"train": train, "align": align, "sft": sft}


def make_base(directory: Path, vocab_size: int = 400, documents: int = 60) -> Path:
    """A small random Llama with a tokenizer in `base`, and texts in two languages beside it."""
    families.VARIANTS["small"] = lambda: families.llama(vocab_size=vocab_size, tie_word_embeddings=True)
    families.write("small", directory / "base", dtype=torch.bfloat16)
    write_tokenizer(directory / "base")
    for name, text in (("ko", KOREAN), ("en", ENGLISH)):
        records = [json.dumps({"text": f"{number} " + text * (number % 7 + 1)}) for number in range(documents)]
        (directory / f"{name}.jsonl").write_text("\n".join(records) + "\n")
    return directory


def make_project(directory: Path, documents: int = 60) -> Path:
    """The same with a chat format's tokens, and conversations; 60 documents are 22 steps."""
    make_base(directory, 450, documents)
    add_chat_tokens(directory / "base")
    chats = [
        [{"from": "human", "value": f"무엇 {number}?"}, {"from": "gpt", "value": "some text " * (number % 5 + 1)}]
        for number in range(20)
    ]
    (directory / "chats.json").write_text(json.dumps([{"conversations": chat} for chat in chats]))
    return directory


def words(command: str, out: str) -> list[str]:
    script, *options = command.split()
    return [script, *instead((CHATS if script == "sft" else TEXT).split(), options), "--out", out]


def run_here(command: str, out: str = "out") -> int:
    """`train --layers 1,4` and the like in this process, in the working directory; the exit status."""
    script, *options = words(command, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *options])
        with pytest.raises(SystemExit) as exit_:
            exit_status(SCRIPTS[script].main)
    return exit_.value.code


def start(
    project: Path, command: str, out: str = "out", torchrun: str = "", before: str = ""
) -> subprocess.Popen | Fork:
    """The same in a process of its own, or with `torchrun` as its options in several; `before` is that of a Fork."""
    script, *options = words(command, out)
    if not torchrun:
        return Fork(script, options, project, before=before)
    return subprocess.Popen(
        [*TORCHRUN, *torchrun.split(), str(script_with(before, script, project / f"{out}-{script}.py")), *options],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def script_with(before: str, script: str, file: Path) -> Path:
    """A script of the project with some Python before it, in `file`; or the script itself."""
    path = ROOT / f"{script}.py"
    if not before:
        return path
    file.write_text(f"{before}\nimport runpy\nrunpy.run_path({str(path)!r}, run_name='__main__')\n")
    return file


def start_group(project: Path, command: str, size: int, out: str = "out", before: str = "") -> list[Fork]:
    """The processes of one run as torchrun would start them, but without it."""
    script, *options = words(command, out)
    return fork_group(size, script, options, project, before)


def pausing(step: int, out: str | Path) -> str:
    """Python for `before`: a run waits after this step for a signal or `go_on`. No machine is too slow to meet it."""
    return f"""
import signal, time
from pathlib import Path
from elo.runs.directory import Metrics

def write_and_wait(self, line, write=Metrics.write):
    write(self, line)
    stop = signal.getsignal(signal.SIGTERM).__self__
    while line["step"] == {step} and not stop.requested and not Path("{out}-goes-on").exists():
        time.sleep(0.01)

Metrics.write = write_and_wait
"""


def go_on(out: str | Path) -> None:
    Path(f"{out}-goes-on").touch()


def finish(*processes: subprocess.Popen | Fork, status: int = 0) -> list[str]:
    """Wait for processes; what each said on stdout and stderr."""
    said = ["".join(process.communicate(timeout=600)) for process in processes]
    for process, output in zip(processes, said, strict=True):
        assert process.returncode == status, f"{process.returncode}: {output}"
    return said


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: str | Path) -> list[float]:
    return [line["loss"] for line in lines(Path(out))]


def result(out: Path) -> tuple[dict[str, bytes], list[dict]]:
    """Every file of the model, and what the metrics say but for times and memory."""
    varying = ("seconds", "data_seconds", "tokens_per_second", "memory_bytes")
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    own = ("run.json", "metrics.jsonl", "checkpoints")
    model = {name: path.read_bytes() for name, path in sorted(files.items()) if not name.startswith(own)}
    return model, [{name: line[name] for name in line if name not in varying} for line in lines(out)]


def states(out: Path) -> list[str]:
    found = [path.parent.name for path in out.glob("checkpoints/step-*/state.json")]
    return sorted(found, key=lambda name: int(name[5:]))


def interrupt(
    monkeypatch: pytest.MonkeyPatch, step: int, how: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGTERM)
) -> None:
    """Let something happen when a line of metrics has been written."""
    write = Metrics.write

    def write_and_interrupt(self, line):
        write(self, line)
        if line["step"] == step:
            how()

    monkeypatch.setattr(Metrics, "write", write_and_interrupt)


class Killed(BaseException):
    """Nothing catches it: like a kill, it leaves the files as they are."""


def kill() -> NoReturn:
    raise Killed
