"""The kill table: SIGKILL at random moments of small runs, resumed by the same command, to the last bit.

    make kill        # or: python -m benchmarks.kill_table --kills 50 --seed 0

Every run is killed several times, in one stage of its life after the other: while it tokenizes, trains, writes a state
and writes the model. A moment is a random time after something shows in the run's directory. After each kill the same
command is given again; in the end it is left alone, and losses, metrics and every byte of the model are compared with
those of a run that was never killed. Of two processes one is killed, and the other has to end by itself, or both.
"""

import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from elo.common.errors import exit_status
from elo.common.options import Parser, positive_int, seed

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/support"))  # the runs are those of the tests
import small_runs  # noqa: E402
from forking import Fork, fork_group  # noqa: E402

TEXT = "--model base --target ko.jsonl --source en.jsonl --seq-len 32 --batch-tokens 128 --workers 1"
TRAINING = f"{TEXT} --gb 0.00003 --lr 1e-3 --dtype fp32 --save-every 4 --micro-batch 2 --max-steps 30"
IN_BACKWARD = "--optimizer-in-backward --clip 0"
CHATS = (
    "--model base --data chats.json --chat-format chatml --seq-len 64 --batch-conversations 4 --micro-batch-tokens 99"
    " --epochs 4 --lr 3e-3 --dtype fp32 --save-every 3 --validation-fraction 0.2"
)
# The script, its options, its processes, and which of them are killed.
RUNS = {
    "elo": (f"train {TRAINING}", 1, "it"),
    "elo, 2 processes": (f"train {TRAINING}", 2, "one"),
    "elo, 2 processes, all": (f"train {TRAINING}", 2, "all"),
    "full": (f"train {TRAINING} --method full", 1, "it"),
    "full, in backward": (f"train {TRAINING} --method full {IN_BACKWARD}", 1, "it"),
    "full, in backward, 2": (f"train {TRAINING} --method full {IN_BACKWARD}", 2, "one"),
    "lora": (f"train {TRAINING} --method lora --merge", 1, "it"),
    "align": (f"align {TRAINING} --elo elo --activation-checkpointing", 1, "it"),
    "align, 2 processes": (f"align {TRAINING} --elo elo", 2, "all"),
    "sft, best epoch": (f"sft {CHATS} --keep best", 1, "it"),
    "sft, 2 processes": (f"sft {CHATS} --keep every", 2, "one"),
}
STAGES = ("tokenizing", "training", "saving", "exporting")


def make_project(directory: Path) -> None:
    """The tests' project, with texts that take a while to tokenize and a model that takes a while to write."""
    import families
    import torch

    small_runs.make_project(directory, documents=6_000)
    wide = {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 450, "tie_word_embeddings": True}
    families.VARIANTS["wide"] = lambda: families.llama(**wide)
    families.write("wide", directory / "base", dtype=torch.bfloat16)
    finish(start(directory, "elo", "elo"))


def start(project: Path, name: str, out: str) -> list[Fork]:
    """The processes of a run."""
    command, size, _ = RUNS[name]
    script, *words = command.split()
    (project / out).parent.mkdir(exist_ok=True)
    return fork_group(size, script, [*words, "--out", out], project)


def finish(processes: list[Fork]) -> None:
    for process in processes:
        assert process.wait() == 0, f"exit status {process.returncode}: {process.said('err')[:2000]}"


def kill(processes: list[Fork], which: str, choice: random.Random) -> None:
    victims = [choice.choice(processes)] if which == "one" else processes
    for victim in victims:
        victim.kill()
    for process in processes:
        process.wait()  # the other one ends by itself, and soon
        if process.returncode not in (0, -signal.SIGKILL):
            last = process.said("err").splitlines()[-1]
            assert process.returncode == 2, f"exit status {process.returncode}: {last}"
            assert "another process of this run was killed" in last, last


def appeared(out: Path, stage: str, steps: int = 0, since: float = 0) -> bool:
    """Whether what a stage shows in the files is there, and is not older than this process."""
    if stage == "training":
        return steps_in(out) >= steps
    if stage == "tokenizing":
        found = (out.parent / "token-cache").glob(".building-*")
    elif stage == "saving":
        found = (path for path in out.glob("checkpoints/step-*") if not (path / "state.json").exists())
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


def is_finished(out: Path) -> bool:
    return (out / "config.json").exists()


def stage_of(out: Path) -> str:
    """In which stage a run was killed, as its files tell."""
    if not (out / "run.json").exists():
        return "tokenizing"
    if is_finished(out):
        return "finished"
    for stage in ("exporting", "saving"):
        if appeared(out, stage):
            return stage
    return "training"


def kill_once(project: Path, name: str, out: str, stage: str, choice: random.Random) -> str:
    """Start or resume a run and kill it in a stage; the stage in which it really was."""
    since, directory = time.time(), project / out
    steps = steps_in(directory) + choice.randrange(1, 9)
    processes = start(project, name, out)
    try:
        while all(process.poll() is None for process in processes) and not appeared(directory, stage, steps, since):
            time.sleep(0.0005)
        time.sleep(choice.random() * (0.4 if stage == "tokenizing" else 0.02))
        if all(process.poll() is not None for process in processes):
            finish(processes)
            return "finished"
        kill(processes, RUNS[name][2], choice)
        return stage_of(directory)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def chain(
    project: Path, name: str, stages: list[str], choice: random.Random, number: int = 0
) -> list[tuple[str, bool]]:
    """Kill a run once in each of these stages and let it finish: where it was killed, and whether it is the same."""
    alone = project / name.replace(" ", "-") / "alone"
    if not alone.exists():
        finish(start(project, name, str(alone.relative_to(project))))
    out = f"{name.replace(' ', '-')}-{number}/out"
    killed: list[str] = []
    for stage in stages:
        if not is_finished(project / out):
            begun = time.perf_counter()
            killed.append(kill_once(project, name, out, stage, choice))
            print(f"{name}: {killed[-1]}, {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    if not is_finished(project / out):
        finish(start(project, name, out))
    same = small_runs.result(project / out) == small_runs.result(alone)
    return [(stage, same) for stage in killed if stage != "finished"]


def main() -> None:
    parser = Parser(prog="python -m benchmarks.kill_table", description=__doc__)
    parser.add_argument("--kills", type=positive_int, default=50, help="at least (%(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="of the moments (%(default)s)")
    arguments = parser.parse_args()
    choice, table, number = random.Random(arguments.seed), Counter(), 0
    begun = time.perf_counter()
    with TemporaryDirectory() as folder:
        project = Path(folder)
        make_project(project)
        while sum(table.values()) < arguments.kills:
            name = list(RUNS)[number % len(RUNS)]
            # Those of a chain in the order of a run's life; only a run that has a token cache is seen to tokenize.
            possible = STAGES[1:] if name.startswith("sft") else STAGES
            stages = sorted(choice.choices(possible, k=4), key=STAGES.index)
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
    if same < sum(table.values()):
        sys.exit(1)


if __name__ == "__main__":
    exit_status(main)
