"""Whether a run fits, for how long it is, and what would make it fit."""

from bisect import bisect_left
from collections import ChainMap
from dataclasses import dataclass, replace
from itertools import combinations, product

from elo.model.decoder import CausalLM
from elo.planning.costs import Flops, count_flops, parameters
from elo.planning.hours import Step, predict
from elo.planning.memory import Bytes, planned_memory
from elo.planning.run import GIB, Run

MOST_GPUS = 1024


@dataclass(frozen=True)
class Plan:
    run: Run
    computed: int  # parameters
    trained: int
    flops: Flops  # a token
    memory: Bytes  # a GPU
    step: Step
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.run.usable

    @property
    def hours(self) -> float:
        """For 10^9 tokens where none are named. GPUs that have fewer windows than others compute on empty ones."""
        return (self.run.tokens or 1e9) / (self.run.batch_windows * self.run.seq_len) * self.step.seconds / 3600


def predicted(model: CausalLM, run: Run) -> Plan:
    """model: see `methods.make`."""
    flops = count_flops(model, run.seq_len, run.activation_checkpointing)
    memory, step = planned_memory(model, run.setup), predict(model, run, flops)
    return Plan(run, parameters(model), parameters(model, trained=True), flops, memory, step)


def make_plan(model: CausalLM, run: Run) -> Plan:
    """With what would make it fit."""
    plan = predicted(model, run)
    return plan if plan.fits else replace(plan, remedies=tuple(remedies(model, run)))


def remedies(model: CausalLM, run: Run) -> list[str]:
    """Ways to make it fit, each with as few options as will do.

    --cpu-offload and more GPUs are named only where nothing else helps. Every way named has been planned and fits.
    """
    if found := fewest_options(model, run):
        return found
    if not run.cpu_offload:
        offloaded = replace(run, cpu_offload=True)
        host = planned_memory(model, offloaded.setup).host / GIB
        found = fewest_options(model, offloaded, f"--cpu-offload (with {host:,.1f} GiB of host memory for each GPU)")
    fewest = 1 if run.setup.shard < run.gpus else 2
    counts = range(fewest * run.gpus, MOST_GPUS + 1, run.gpus)

    def on(gpus: int) -> list[str]:
        name = f"{gpus} GPUs" if gpus > run.gpus else "no --shard"
        return fewest_options(model, replace(run, gpus=gpus, shard=None), name)

    at = bisect_left(counts, True, key=lambda gpus: bool(on(gpus)))  # whatever fits on some fits on more
    return found + on(counts[at])[:1] if at < len(counts) else found


def fewest_options(model: CausalLM, run: Run, given: str = "") -> list[str]:
    """Ways to make it fit with as few of the options that cost little time as will do."""
    smaller = [{"micro_batch": run.micro_batch >> halvings} for halvings in range(1, run.micro_batch.bit_length())]
    flags = {"optimizer_in_backward": True, "activation_checkpointing": True, "gather_once": False}
    ways: list[list[dict[str, int]]] = [[{name: value}] for name, value in flags.items() if getattr(run, name) != value]
    ways += [smaller] if smaller else []  # each an option, from the least change on
    for size in range(len(ways) + 1):
        found = []
        for chosen in combinations(ways, size):
            runs = (replace(run, **dict(ChainMap(*changes))) for changes in product(*chosen))
            fitting = next((way for way in runs if planned_memory(model, way.setup).total <= run.usable), None)
            if fitting:
                more = [option for option in fitting.settings if option not in run.settings]
                less = ["no --gather-once"] * (run.gather_once and not fitting.gather_once)
                found.append(" ".join([given, *less, *more]).strip())
        if found:
            break
    return found
