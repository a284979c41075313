"""A training step of this project, and the same one of transformers or peft: timed in a process of its own."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.training_step.machine import Memory, Stopwatch, matmul_peak, synchronize
from elo import methods
from elo.data.corpus import Mixture, Windows
from elo.data.encoding import DOCUMENT
from elo.data.feed import Feed, in_order
from elo.data.finding import find_files
from elo.data.shards import TokenShard, tokenize
from elo.model.checkpoint import Checkpoint
from elo.optimizer import Optimizer, TrainingOptions, parameter_groups
from elo.pretraining import PackedBatches
from elo.runs.devices import DTYPES, take_device
from elo.runs.processes import World, process_group
from elo.runs.sharding import ParallelOptions, parallelize
from elo.training import accumulate
from elo.variants import lora
from elo.variants.lora import LoraOptions

VARIANTS = ("compiled", "Liger", "autocast")  # the last one with fp32 masters, as elo has
PARTS = ("data", "forward", "backward", "optimizer")
# The same on both sides; a small learning rate, so that both go through the same numbers.
OPTIONS = TrainingOptions(lr=1e-5, warmup=0.0, min_lr_ratio=1.0, weight_decay=0.1, clip=1.0)


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    model: str
    method: str  # elo, full or lora
    implementation: str  # elo, or transformers or one of its VARIANTS, or for method lora peft
    dtype: str
    layers: tuple[int, ...]  # of method elo, from 1
    batch: int  # windows in a step
    seq_len: int
    seconds: float  # steps are taken until so much time has passed, after three that warm up
    adapters: LoraOptions = LoraOptions()
    data: tuple[str, ...] = ()  # text files; none: random tokens
    text_field: str = "text"
    cache: str = ""  # where their tokens are
    micro_batches: int = 1  # equal parts of a step
    activation_checkpointing: bool = False  # this and the next ones of elo
    gather_once: bool = False
    reads_ahead: bool = False  # by a thread, as training does; then steps are numbered from 0 and not timed by parts


Step = Callable[[int], float]  # takes the step of this number, and returns its loss


def measure(case: Case) -> dict[str, Any]:
    """{"seconds" of a step, mean; "parts": {part: share}, "memory_bytes", "steps", "loss" of the first one}."""
    base = Checkpoint(case.model)
    with process_group() as world:
        watch = Stopwatch(world.device)
        batches = TimedBatches(open_windows(case, base), case.batch, world, watch)
        make = elo_step if case.implementation == "elo" else transformers_step
        import_all(case, base)
        memory = Memory(world.device)
        _, step = make(case, base, batches, world, watch)
        loss = step(0)  # makes the optimizer's state and the libraries' buffers
        memory.restart()
        step(1)
        peak = memory.peak()
        step(2)  # what the measurement of memory has taken from the process is back
        watch.seconds.clear()
        synchronize(world.device)
        steps, started = 0, time.perf_counter()
        while time.perf_counter() - started < case.seconds or not steps:
            steps += 1
            step(2 + steps)
        synchronize(world.device)
        seconds = time.perf_counter() - started
        parts = {name: watch.seconds.get(name, 0.0) / seconds for name in PARTS}
        parts["backward"] = 1 - sum(parts.values())  # and the little that is between
        return {
            "seconds": seconds / steps,
            "parts": parts,
            "memory_bytes": peak,
            "steps": steps,
            "loss": loss,
        }


def import_all(case: Case, base: Checkpoint) -> None:
    """Import what a step would: code is not what its memory is measured for."""
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True).zero_grad()
    if case.implementation != "elo":
        with torch.device("meta"):
            transformers_model(case, base, on_meta=True)


# ---- data


def open_windows(case: Case, base: Checkpoint) -> Windows:
    """Of the text's tokens, as training reads them, or of random ones in memory."""
    if case.data:
        files = find_files(case.data)
        shard = tokenize(files, case.model, case.cache, text_field=case.text_field, progress=False)
    else:
        shard = random_shard(base.config.vocab_size, 16 * case.batch * case.seq_len + 1)
    return Windows(Mixture([shard], 1.0, seed=0), case.seq_len)


def random_shard(vocab_size: int, count: int, length: int = 1000) -> TokenShard:
    random = np.random.RandomState(0)
    tokens = random.randint(vocab_size, size=count).astype("<u4")
    offsets = np.arange(0, count, length)
    documents = np.zeros(len(offsets), DOCUMENT)
    documents["offset"], documents["line"] = offsets, 1 + np.arange(len(offsets))
    documents["tokens"] = documents["bytes"] = np.minimum(length, count - offsets)
    return TokenShard(tokens, documents, np.bincount(tokens), ["random tokens"], count, "random", {})


class TimedBatches(PackedBatches):
    """The batches of training, again from the first one when all whole ones were there."""

    def __init__(self, windows: Windows, batch: int, world: World, watch: Stopwatch, micro_batches: int = 1) -> None:
        super().__init__(windows, batch * windows.seq_len, batch // micro_batches, world)
        self.watch = watch
        self.whole = (windows.tokens - 1) // (batch * windows.seq_len)

    def _window_range(self, step: int) -> range:
        return super()._window_range(step % self.whole)

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        with self.watch.part("data"):
            return iter(list(super().micro_batches(step)))


# ---- the two sides


def elo_step(
    case: Case, base: Checkpoint, batches: TimedBatches, world: World, watch: Stopwatch
) -> tuple[nn.Module, Step]:
    """This project's: the path of `elo.training.train`, without its files."""
    method = methods.make(base.config, case.method, case.layers, case.adapters)
    model = method.model
    layout = {name: getattr(case, name) for name in ("dtype", "activation_checkpointing", "gather_once")}
    parallelize(model, world, ParallelOptions(**layout, compile=world.device.type == "cuda"))
    base.load_into(model, method.base_name)
    if case.method == "lora":
        lora.initialize(model, seed=0)
    optimizer = Optimizer(model, OPTIONS)
    forward = watch.timed("forward", model)
    ahead = Feed(batches, count(), world.device) if case.reads_ahead else None

    def step(number: int) -> float:
        feed = ahead or in_order(batches, [number], world.device)
        loss = accumulate(forward, feed, batches.label_count(number), optimizer, world)
        with watch.part("optimizer"):
            optimizer.gradient_norm(world)
            optimizer.step()
        return loss

    return model, step


def transformers_step(
    case: Case, base: Checkpoint, batches: TimedBatches, world: World, watch: Stopwatch
) -> tuple[nn.Module, Step]:
    """A plain loop around transformers' model, or peft's: fused AdamW, SDPA, no cache.

    In bf16 its trained parameters and their optimizer state are bf16 throughout, its fastest and leanest way, although
    that rounds small updates away; ours keep fp32 masters, and so does its variant "autocast". peft keeps adapters in
    fp32 by itself.
    """
    model = transformers_model(case, base).to(world.device).train()
    if case.implementation == "compiled":
        model.compile(dynamic=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(model, OPTIONS), lr=OPTIONS.lr, betas=(0.9, 0.95), fused=True)
    autocast = torch.autocast(world.device.type, DTYPES[case.dtype], enabled=case.implementation == "autocast")

    def step(number: int) -> float:
        whole = torch.zeros((), device=world.device)
        for tokens, labels in batches.micro_batches(number):
            tokens, labels = tokens.to(world.device), labels.to(world.device)
            with watch.part("forward"), autocast:
                loss = model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss
            (loss / case.micro_batches).backward()
            whole += loss.detach() / case.micro_batches
        with watch.part("optimizer"):
            nn.utils.clip_grad_norm_(trained, OPTIONS.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return whole.item()

    return model, step


def transformers_model(case: Case, base: Checkpoint, on_meta: bool = False) -> nn.Module:
    """The same model of transformers, with the same parts frozen. `on_meta`: without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = torch.float32 if case.implementation == "autocast" else DTYPES[case.dtype]
    how = {"dtype": dtype, "attn_implementation": "sdpa"}
    if on_meta:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.directory), **how)
    else:
        model = AutoModelForCausalLM.from_pretrained(base.directory, **how)
    if case.implementation == "Liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False, model=model)  # leaves its loss
    if case.method == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(
            model,
            LoraConfig(
                r=case.adapters.lora_rank,
                lora_alpha=case.adapters.lora_alpha,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    if case.method == "elo":
        model.model.layers = nn.ModuleList(model.model.layers[number - 1] for number in case.layers)
        model.requires_grad_(False)
        model.model.layers.requires_grad_(True)
    return model


def matmul_peaks(dtypes: list[str]) -> dict[str, dict[str, float | str]]:
    device = take_device(0)
    return {dtype: matmul_peak(dtype, device) for dtype in dtypes}
