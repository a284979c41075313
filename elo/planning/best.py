"""The fastest settings that fit: what decides on speed and memory alone is tried, and the rest is the user's."""

import shlex
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import ceil

from elo.common.errors import UserError
from elo.model.decoder import CausalLM
from elo.planning.budget import Plan, predicted
from elo.planning.run import GIB, Run
from elo.pretraining import DEFAULT_MODEL

ROWS = 10  # that are shown
NAMED_ALIKE = ("--model", "--gb", "--active-vocabulary", "--validation")  # may be the stage's own, after --
# The scripts, and which options of the planner are theirs too, beside settings.
OF_STAGES = {
    "train": "method model layers bridge active_vocabulary lora_rank gb seq_len batch_tokens dtype",
    "align": "model gb seq_len batch_tokens dtype",
    "sft": "model seq_len batch_conversations dtype",
}


def considered(model: CausalLM, run: Run, given: Namespace) -> list[Plan]:
    """Plans for all settings beside those that are given, the fastest first."""
    sizes = {2**power for power in range(run.windows.bit_length())} | {run.windows}
    if given.micro_batch_tokens if run.stage == "sft" else given.micro_batch:
        sizes = {run.micro_batch}
    options = {
        "micro_batch": sorted(sizes),
        "shard": [run.shard] if run.shard else [n for n in range(1, run.gpus + 1) if run.gpus % n == 0],
        "activation_checkpointing": {run.activation_checkpointing, True},
        "cpu_offload": {run.cpu_offload, True},
        "gather_once": {run.gather_once, True},
    }
    ways = (replace(run, **dict(zip(options, values, strict=True))) for values in product(*options.values()))
    # --gather-once is for steps of several micro-batches.
    runs = [way for way in ways if way.setup.micro_batches > 1 or way.gather_once == run.gather_once]
    return sorted((predicted(model, run) for run in runs), key=lambda plan: (plan.step.seconds, plan.memory.total))


def table(plans: list[Plan]) -> Iterator[str]:
    """Of each combination of options the fastest that fits, whatever its micro-batch."""
    run, fitting = plans[0].run, [plan for plan in plans if plan.fits]
    fastest = {replace(plan.run, micro_batch=0): plan for plan in reversed(fitting)}
    found = sorted(fastest.values(), key=lambda plan: plan.step.seconds)
    told = f"{len(fitting)} of {len(plans)} settings fit, of each kind the fastest:"
    yield f"{run.name} on {run.gpus} x {run.gpu}, {run.usable / GIB:,.1f} GiB usable in each; {told}"
    rows, more = found[:ROWS], len(found[ROWS:])
    width = max(len(" ".join(plan.run.settings)) for plan in rows)
    yield f"{'':<{width}}{'GiB/GPU':>9}{'GiB/host':>10}  predicted hours for {run.amount}"
    for plan in rows:
        host = f"{plan.memory.host * min(run.gpus, run.gpus_per_node) / GIB:,.0f}" if plan.memory.host else ""
        line = f"{' '.join(plan.run.settings):<{width}}{plan.memory.total / GIB:>9,.1f}{host:>10}"
        yield f"{line}  {plan.hours:,.2f}"
    if more:
        yield f"and {more} slower ones"


def command(run: Run, given: Namespace) -> str:
    """Of the stage, with these settings and all that was given. Raises UserError for what cannot be in it."""
    others = given.words or []
    named = [word.split("=")[0] for word in others if word.startswith("--")]
    if others and not others[0].startswith("--"):
        raise UserError(f"{others[0]}: not an option; after -- are those that the command of --best has beside")
    for option in named:
        if option.removeprefix("--").replace("-", "_") in vars(given) and option not in NAMED_ALIKE:
            raise UserError(f"{option}: give it before the --, where it is planned with")
    nodes = ceil(run.gpus / run.gpus_per_node)
    if run.gpus % nodes:
        raise UserError(f"--gpus {run.gpus}: these are not {nodes} equal nodes of at most {run.gpus_per_node}")
    words = ["torchrun", f"--nproc_per_node={run.gpus // nodes}"] if run.gpus > 1 else ["python"]
    if nodes > 1:
        words[1:1] = [f"--nnodes={nodes}", "--rdzv-backend=c10d", "--rdzv-endpoint=FIRST_NODE:29500"]
    words.append(f"{run.stage}.py")
    for name in OF_STAGES[run.stage].split():
        option, value = f"--{name.replace('_', '-')}", getattr(given, name)
        if name == "model":
            value = value.parent if value.name == "config.json" else value
            value = None if str(value) == DEFAULT_MODEL and run.stage != "sft" else value
        if value is not None and option not in named:
            value = int(value) if isinstance(value, float) and value.is_integer() else value
            words += [option] if value is True or name == "active_vocabulary" else [option, str(value)]
    return shlex.join([*words, *" ".join(run.settings).split(), *others])
