"""What an experiment would take, from the planner, before anything is spent."""

import shlex
from argparse import Namespace
from pathlib import Path

from elo import methods
from elo.common.errors import UserError
from elo.common.terminal import say
from elo.data.documents import read_documents
from elo.data.finding import find_files
from elo.model.config import ModelConfig
from elo.planning.budget import Plan, make_plan
from elo.planning.costs import parameters
from elo.planning.plan import make_parser, planned_runs, would_fit
from elo.pretraining import FEWEST_STEPS, LARGEST_BATCH
from elo.slicing import parse_layers
from elo.text.tokenizer import load_tokenizer
from experiments.chains import Run, Word, needed
from experiments.engine import Engine
from experiments.kit import PRETRAINING

SAMPLE = 200  # documents whose tokens are counted


class Planning(Engine):
    """The runs by the planner's figures instead of their results; the first of several rates stands for the chosen."""

    def __init__(self, options: Namespace) -> None:
        super().__init__(options)
        self.config = ModelConfig.load(Path(options.model))
        self.parameters = parameters(methods.make(self.config, "full").model)
        self.bytes_per_token = options.bytes_per_token or bytes_per_token(options)

    def plan(self, run: Run) -> Plan | None:
        """None for a run that trains on nothing. The options of the scripts are the planner's too."""
        words = [self.text(word, run) for word in run.words]
        if (gb := float(words[words.index("--gb") + 1])) == 0:
            return None
        machine = ["--gpu", self.options.gpu, "--gpus", str(self.options.processes), "--dtype", "bf16"]
        tokens = gb * 1e9 / self.bytes_per_token
        parser = make_parser()
        parser.set_defaults(batch_tokens=LARGEST_BATCH)
        asked, _ = parser.parse_known_args([*words, "--stage", run.script.removesuffix(".py"), *machine])
        asked.gb, asked.tokens = None, tokens
        while "--batch-tokens" not in words and asked.batch_tokens > max(asked.seq_len, tokens / FEWEST_STEPS):
            asked.batch_tokens //= 2
        (planned,) = planned_runs(asked)
        layers = parse_layers(asked.layers or methods.DEFAULT_LAYERS, self.config.num_hidden_layers)
        return make_plan(methods.make(self.config, planned.method, layers).model, planned)

    def seconds(self, word: Word) -> float:
        plans = [self.plan(run) for run in self.training(word) if run.script in PRETRAINING]
        return sum(3600 * plan.hours for plan in plans if plan)

    def runs(self, words: list[Word]) -> list[Run]:
        """Each once."""
        return list({run.key: run for word in words for run in needed(word)}.values())

    def flops(self, words: list[Word]) -> dict[str, float]:
        """Of the pretraining runs that are not done, by their keys."""
        runs = [run for run in self.runs(words) if run.script in PRETRAINING and not self.is_done(run)]
        plans = {run.key: self.plan(run) for run in runs}
        return {key: plan.run.tokens * plan.flops.total for key, plan in plans.items() if plan}

    def show(self, words: list[Word]) -> None:
        """--dry-run."""
        sums, unfit, gpus = [0.0, 0.0, 0.0], dict[str, str](), f"{self.options.processes} x {self.options.gpu}"
        for run in self.runs(words):
            say(shlex.join(self.command(run)))
            plan = self.plan(run) if run.script in PRETRAINING else None
            size = (plan.computed if plan else self.parameters) if run.script.endswith(".py") else 0
            spent = [plan.run.tokens, plan.hours * self.options.processes] if plan else [0.0, 0.0]
            spent.append(2 * size / 1e9)
            say("    {:,.0f} tokens, {:,.4g} GPU hours, {:,.2f} GB on disk".format(*spent))
            sums = [total + part for total, part in zip(sums, spent, strict=True)]
            if plan and not plan.fits:
                unfit[plan.name] = would_fit(plan)
        say("together {:,.0f} tokens, {:,.4g} GPU hours, {:,.1f} GB on disk".format(*sums))
        say(f"on {gpus} at the planner's utilization and {self.bytes_per_token:.2f} bytes a token; tuning on "
            "conversations and evaluation are not counted")  # fmt: skip
        for name, ways in unfit.items():
            say(f"{name} does not fit on {gpus}; it would with: {ways}")


def bytes_per_token(options: Namespace) -> float:
    try:
        tokenizer = load_tokenizer(options.model, ModelConfig.load(Path(options.model)).vocab_size)
        texts = [text.text for text, _ in zip(read_documents(find_files(options.target)), range(SAMPLE))]  # noqa: B905
    except UserError as error:
        raise UserError(f"{error}; or say --bytes-per-token, to plan without model and texts") from None
    return sum(len(text.encode()) for text in texts) / sum(len(tokenizer.encode(text)) for text in texts)
