"""What a run shows while it works, and when it is done."""

import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from elo.common.errors import UserError
from elo.runs.directory import read_metrics
from elo.runs.processes import World
from elo.text.chat_format import chat_format
from elo.text.tokenizer import load_tokenizer

EVERY = 60.0  # seconds between two lines of a log
# Options of stage 1 that stage 2 is to be given too.
OF_BOTH_STAGES = (
    *("--model", "--target", "--source", "--target-fraction", "--text-field", "--target-field", "--source-field"),
    *("--skip-malformed", "--cache", "--workers", "--seed", "--seq-len", "--batch-tokens", "--micro-batch", "--dtype"),
    *("--validation", "--validation-mb", "--validation-field", "--compile", "--no-compile", "--shard"),
)


class Progress:
    """A bar on a terminal. In a log, which has none, a line after the first step, then one a minute, and the last."""

    def __init__(self, steps: int, done: int, tokens: int, world: World) -> None:
        """done, tokens: of the run before it was interrupted."""
        self.steps, self.first, self.world = steps, done, world
        self.is_log = not sys.stderr.isatty()
        self.begun = self.told = time.monotonic()
        self.tokens = tokens
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=world.rank > 0 or self.is_log)

    def step(self, line: dict[str, Any]) -> None:
        """A step is done; line: its line in metrics.jsonl."""
        self.bar.set_postfix_str(_figures(line, line["tokens_per_second"]), refresh=False)
        self.bar.update()
        now, step = time.monotonic(), line["step"]
        if self.is_log and (step in (self.first + 1, self.steps) or now >= self.told + EVERY):
            speed = (line["tokens"] - self.tokens) / max(now - self.told, 1e-9)
            left = timedelta(seconds=round((now - self.begun) / (step - self.first) * (self.steps - step)))
            self.world.say(f"step {step:,} of {self.steps:,}: {_figures(line, speed)}, {left} to go")
            self.told, self.tokens = now, line["tokens"]

    def close(self) -> None:
        self.bar.close()


def _figures(line: dict[str, Any], tokens_per_second: float) -> str:
    held_out = line.get("validation_bits_per_byte", line.get("validation_loss"))
    return f"loss {line['loss']:.4f}, lr {line['lr']:.2e}, {tokens_per_second:,.0f} tokens/s" + (
        "" if held_out is None else f", held-out {held_out:.4f}"
    )


# ---- the end of a stage


def tell_result(world: World, out: Path, model: nn.Module, next_command: Sequence[object]) -> None:
    """What has been trained, how long, in how much memory, where it is, and what comes next, ready to paste."""
    if world.rank:
        return
    lines = read_metrics(out)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad and lines)
    every = sum(parameter.numel() for parameter in model.parameters())
    said = f"{trained / 1e6:,.1f} M of {every / 1e6:,.1f} M parameters were trained"
    if lines:
        first, last = lines[0], lines[-1]
        memory = max(line.get("memory_bytes", 0) for line in lines) / 2**30
        said += f" on {last['tokens']:,} tokens in {len(lines):,} steps and {timedelta(seconds=round(last['seconds']))}"
        said += f", with {memory:,.1f} GiB of memory in a process"
        said += f"; the loss went from {first['loss']:.4f} to {last['loss']:.4f}"
        measured = (line["validation_loss"] for line in lines if "validation_loss" in line)
        if held_out := [math.nan if loss is None else loss for loss in measured]:
            since = f"from {held_out[0]:.4f} to" if len(held_out) > 1 else "is"
            said += f", the held-out one {since} {held_out[-1]:.4f}"
    world.say(f"{said}. The result is in {out}.", f"Next: {shown_command(next_command)}")


def next_of_untrained(out: Path, vocab_size: int, may_chat: bool = False) -> str:
    """What comes after a model was put together: the command that takes it, or what is missing for that.

    Nobody has read its tokenizer, if there is one. may_chat: where it has a chat format too.
    """
    try:
        tokenizer = load_tokenizer(out, vocab_size)
    except UserError as error:
        return f"It takes no text yet: {error}"
    command = continued(out)
    with suppress(UserError):
        if may_chat and chat_format(out, tokenizer):
            command = ["-m", "elo.generation", "--model", out]
    return f"Next: {shown_command(command)}"


def continued(out: Path) -> list[object]:
    """The command with which a model that is not tuned for chats continues a text."""
    return ["-m", "elo.generation", "--model", out, "--raw", "--prompt", "Hello,"]


def alignment_after(out: Path, batches: Any, steps: int) -> list[object]:
    """The command that aligns a stage-1 run's result: on a ninth of what that had, or on what is left of the texts.

    batches: a `pretraining.PackedBatches`.
    """
    used, mixture = batches.consumed(steps), batches.windows.mixture
    left = mixture.end(None) - used["position"]
    document = int(mixture.shards[0].documents["bytes"].max() / mixture.shares[0])  # so much has at least one of them
    size = min(max(used["bytes"] // 9, document), left)
    size = 0 if size < document else size  # 0: nothing is left, and the layers are only put back
    aligned = out.with_name(f"{out.name}-aligned")
    return ["align.py", "--elo", out, *given(*OF_BOTH_STAGES), "--gb", f"{size / 1e9:.15g}", "--out", aligned]


def shown_command(words: Sequence[object]) -> str:
    """A command for a shell. One that begins with a script of a stage runs as this one does, under torchrun or not."""
    first = str(words[0])
    launcher = ["python"]
    if first.endswith(".py") and "LOCAL_WORLD_SIZE" in os.environ:
        launcher = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    return shlex.join([*launcher, *map(str, words)])


def given(*options: str) -> list[str]:
    """Those of these options that this command was given, with their values, to be given to the next one."""
    words, takes = [], False
    for word in sys.argv[1:]:
        takes = word.split("=")[0] in options if word.startswith("--") else takes
        words += [word] if takes else []
    return words
