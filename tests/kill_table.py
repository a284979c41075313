"""The kill table: SIGKILL at random moments of small runs, resumed by the same command, to the last bit.

    make kill        # or: python tests/kill_table.py --kills 50 --seed 0

Every run is killed several times, in one stage of its life after the other: while it tokenizes, trains, writes a state
and writes the model. A moment is a random time after something shows in the run's directory. After each kill the same
command is given again; in the end it is left alone, and losses, metrics and every byte of the model are compared with
those of a run that was never killed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# Runs: the script, its options, its processes, and which of them are killed.
TEXT = "--model base --target ko.jsonl --source en.jsonl --seq-len 32 --batch-tokens 128 --workers 1"
TRAINING = f"{TEXT} --gb 0.00003 --lr 1e-3 --dtype fp32 --save-every 4 --micro-batch 2"
CHATS = (
    "--model base --data chats.json --chat-format chatml --seq-len 64 --batch-conversations 4 --micro-batch-tokens 99"
)
RUNS = {
    "train, 1 process": (f"train.py {TRAINING} --max-steps 40", 1, "it"),
    "train, 2 processes": (f"train.py {TRAINING} --max-steps 40", 2, "one"),
    "train, 2 processes and torchrun": (f"train.py {TRAINING} --max-steps 40", 2, "all"),
    "train, torchrun alone": (f"train.py {TRAINING} --max-steps 40", 2, "torchrun"),
    "full in backward": (f"train.py {TRAINING} --max-steps 30 --method full --optimizer-in-backward --clip 0", 1, "it"),
    "align": (f"align.py {TRAINING} --max-steps 30 --after elo --activation-checkpointing", 1, "it"),
    "sft, best epoch": (
        f"sft.py {CHATS} --epochs 5 --lr 3e-3 --dtype fp32 --save-every 3 --validation-fraction 0.2 --keep best",
        1,
        "it",
    ),
}
STAGES = ("tokenizing", "training", "saving", "exporting")


def make_project(directory: Path) -> None:
    """A base model, texts that take a second or two to tokenize, and conversations."""
    import families
    import torch
    from small_tokenizer import add_chat_tokens, write_tokenizer

    # Wide enough for writing it to take a while.
    wide = {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 450, "tie_word_embeddings": True}
    families.VARIANTS["wide"] = lambda: families.llama(**wide)
    families.write("wide", directory / "base", dtype=torch.bfloat16)
    write_tokenizer(directory / "base")
    add_chat_tokens(directory / "base")
    for name, text, lines in (
        ("ko", "둘째로 더 많은 글이 필요하다. 그리고 끝. ", 30_000),
        ("en", "First, some text. ", 5_000),
    ):
        records = (json.dumps({"text": f"{number} " + text * (number % 5 + 1)}) for number in range(lines))
        (directory / f"{name}.jsonl").write_text("\n".join(records) + "\n")
    chats = [
        [{"from": "human", "value": f"무엇 {number}?"}, {"from": "gpt", "value": "some text " * (number % 5 + 1)}]
        for number in range(30)
    ]
    (directory / "chats.json").write_text(json.dumps([{"conversations": chat} for chat in chats]))


class Process:
    """A run's command, started in a project."""

    def __init__(self, project: Path, name: str, out: str) -> None:
        command, processes, _ = RUNS[name]
        script, *options = command.split()
        launcher = TORCHRUN if processes > 1 else [sys.executable]
        self.out = project / out
        self.out.parent.mkdir(exist_ok=True)
        self.errors = open(project / f"{out}.stderr", "w+")  # noqa: SIM115
        self.popen = subprocess.Popen(
            [*launcher, str(ROOT / script), *options, "--out", out],
            cwd=project,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=self.errors,
            stderr=self.errors,
            stdin=subprocess.DEVNULL,
        )

    def workers(self) -> list[psutil.Process]:
        """Those that train."""
        if self.popen.args[: len(TORCHRUN)] != TORCHRUN:
            return [psutil.Process(self.popen.pid)]
        children = psutil.Process(self.popen.pid).children()
        return [child for child in children if any(word.endswith(".py") for word in child.cmdline())]

    def kill(self, which: str, choice: random.Random) -> None:
        workers = self.workers()
        victims = {"it": workers, "one": [choice.choice(workers)] if workers else []}.get(which, workers)
        if which in ("all", "torchrun"):
            os.kill(self.popen.pid, signal.SIGKILL)
        for victim in victims if which != "torchrun" else []:
            victim.kill()
        # The others end by themselves, and soon.
        self.popen.wait(40)
        psutil.wait_procs(workers, timeout=40)
        assert not any(worker.is_running() and worker.status() != "zombie" for worker in workers), "a worker lives on"

    def finish(self, seconds: float = 120) -> None:
        status = self.popen.wait(seconds)
        assert status == 0, f"exit status {status}: {self.said()[:2000]}"

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()


def appeared(out: Path, stage: str, steps: int = 0, since: float = 0) -> bool:
    """Whether what a stage shows in the files is there, and is not older than this process."""
    if stage == "training":
        return steps_in(out) >= steps
    if stage == "tokenizing":
        found = (out.parent / "token-cache").glob(".building-*")
    elif stage == "saving":
        found = (path for path in out.glob("checkpoints/step-*") if not (path / ".metadata").exists())
    else:
        found = (path for pattern in (".saving-*", "epoch-*/.saving-*") for path in out.glob(pattern))
    with suppress(FileNotFoundError):  # gone while we look
        return any(path.stat().st_mtime > since for path in found)
    return False


def steps_in(out: Path) -> int:
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def stage_of(out: Path) -> str:
    """In which stage a run was killed, as its files tell."""
    if not (out / "run.json").exists():
        return "tokenizing"
    if (out / "config.json").exists():
        return "finished"
    for stage in ("exporting", "saving"):
        if appeared(out, stage):
            return stage
    return "training"


def kill_once(project: Path, name: str, out: str, stage: str, choice: random.Random) -> str:
    """Start or resume a run and kill it in a stage; the stage in which it really was."""
    since = time.time()
    process = Process(project, name, out)
    steps = steps_in(process.out) + choice.randrange(1, 12)
    try:
        while process.popen.poll() is None and not appeared(process.out, stage, steps, since):
            time.sleep(0.0005)
        time.sleep(choice.random() * (1.2 if stage == "tokenizing" else 0.02))
        if process.popen.poll() is not None:
            process.finish()
            return "finished"
        process.kill(RUNS[name][2], choice)
        if RUNS[name][2] == "one":
            assert "another process of this run was killed" in process.said() or "stopped" in process.said()
        return stage_of(process.out)
    finally:
        if process.popen.poll() is None:
            for worker in process.workers():
                worker.kill()
            process.popen.kill()


def results(out: Path) -> tuple[dict[str, bytes], list[tuple]]:
    """Every file of the model, and what the metrics say of every step but times and memory."""
    names = [path.name for path in out.iterdir() if path.is_file() and path.name not in ("run.json", "metrics.jsonl")]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    varying = ("seconds", "tokens_per_second", "memory_bytes")
    kept = [tuple((name, str(line[name])) for name in line if name not in varying) for line in lines]
    return {name: (out / name).read_bytes() for name in sorted(names)}, kept


def chain(
    project: Path, name: str, stages: list[str], choice: random.Random, number: int = 0
) -> list[tuple[str, bool]]:
    """Kill a run once in each of these stages and let it finish: where it was killed, and whether it is the same."""
    alone = project / name.replace(" ", "-") / "alone"
    if not alone.exists():
        Process(project, name, str(alone.relative_to(project))).finish()
    out = f"{name.replace(' ', '-')}-{number}/out"
    killed: list[str] = []
    for stage in stages:
        if not (project / out / "config.json").exists():
            begun = time.perf_counter()
            killed.append(kill_once(project, name, out, stage, choice))
            print(f"{name}: {killed[-1]}, {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    if not (project / out / "config.json").exists():
        Process(project, name, out).finish()
    same = results(project / out) == results(alone)
    return [(stage, same) for stage in killed if stage != "finished"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    choice, table, number = random.Random(arguments.seed), Counter(), 0
    begun = time.perf_counter()
    with TemporaryDirectory() as folder:
        project = Path(folder)
        make_project(project)
        Process(project, "train, 1 process", "elo").finish()
        while sum(table.values()) < arguments.kills:
            name = list(RUNS)[number % len(RUNS)]
            # Those of a chain in the order of a run's life; only a run that has a token cache is seen to tokenize.
            possible = STAGES[1:] if name.startswith("sft") else STAGES
            stages = sorted(choice.choices(possible, k=5), key=STAGES.index)
            number += 1
            for stage, same in chain(project, name, stages, choice, number):
                table[name, stage, same] += 1
            print(f"{sum(table.values())} kills in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    print(f"{'run':34}{'killed':>10}" + "".join(f"{stage:>12}" for stage in STAGES) + f"{'identical':>12}")
    for name, (_, _, which) in RUNS.items():
        kills = [sum(table[name, stage, same] for same in (True, False)) for stage in STAGES]
        same = sum(table[name, stage, True] for stage in STAGES)
        print(f"{name:34}{which:>10}" + "".join(f"{count:12}" for count in kills) + f"{same:>8}/{sum(kills)}")
    same = sum(count for (_, _, is_same), count in table.items() if is_same)
    print(f"{same} of {sum(table.values())} kills survived, and the result bit-identical; seed {arguments.seed}")
    sys.exit(same < sum(table.values()))


if __name__ == "__main__":
    main()
