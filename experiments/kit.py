"""The chains of the paper in the words of the stages' own commands, for one seed."""

from argparse import Namespace
from pathlib import Path

from elo.methods import DEFAULT_LAYERS
from experiments.chains import SEED, Best, EqualTime, Needs, Row, Run, Word, changed, needed

LIKELIHOOD = ("mmlu", "kobest", "marc_ja")
PRETRAINING = ("train.py", "align.py")
JUDGED = ("mt_bench", "logickor", "japanese_mt_bench")
UNITS = 10  # that --gb has: nine of stage 1 and one of alignment, or ten of a baseline
JSON = ("--json", "{here}/result.json")


class Kit:
    def __init__(self, options: Namespace, seed: int) -> None:
        self.options, self.seed = options, seed

    @property
    def model_name(self) -> str:
        """By which the paper's figures of the same model are found."""
        return Path(self.options.model).name

    # ---- pretraining

    def elo(self, layers: str = DEFAULT_LAYERS, units: float = UNITS - 1, more: tuple[str, ...] = ()) -> Word:
        """Stage 1; of several rates the one that is best after one unit of alignment at the first of its rates."""
        runs = self._pretrain("elo", "train.py", units, "--layers", layers, *more)
        return self._best(runs, tuple(self._pretrain("align", "align.py", 1, "--elo", run, *more)[0] for run in runs))

    def align(self, elo: Word, units: float = 1, after: Word | None = None, more: tuple[str, ...] = ()) -> Word:
        """Stage 2; 0 units only put the layers back."""
        words = ("--elo", elo, *(("--after", after) if after else ()), *more)
        return self._best(self._pretrain("align", "align.py", units, *words))

    def alignment_only(self, after: Word, units: float = 1) -> Word:
        """The control: the documents that stage 2 takes after the run `after`, without stage 1."""
        return self._best(self._pretrain("align", "align.py", units, "--after", after)) if units else self.options.model

    def in_time_of(self, row: Row) -> Row:
        """Its control for as long as all of the row's chain took, from the first document on."""
        model = self._best(self._pretrain("align", "align.py", EqualTime(row.model, row.control)))
        series = row.series and "alignment only, equal time"
        return Row(f"alignment only, in the time of {row.name}", model, series=series, at=row.at)

    def baseline(self, method: str, units: float = UNITS) -> Word:
        """full, lora or selective, on the documents of stages 1 and 2 together."""
        more = ("--method", method, *["--merge"] * (method == "lora"))
        return self._best(self._pretrain(method, "train.py", units, *more))

    def _pretrain(self, method: str, script: str, units: float | EqualTime, *more: Word) -> tuple[Run, ...]:
        """A run for each of the method's rates."""
        options = self.options
        gb = units if isinstance(units, EqualTime) else f"{units * options.gb / UNITS:.9g}"
        words = ("--model", options.model, "--target", *options.target)
        words += ("--source", *options.source) if options.source else ("--target-fraction", "1")
        words += ("--gb", gb, f"{SEED}{self.seed}", *options.training, *more)
        if units:
            words += ("--validation", *options.held_out, "--validation-mb=4", "--validate-every=1000000")
        rates = [("--lr", rate) for rate in options.rates.get(method, ()) if units] or [()]
        return tuple(self._training(script, *words, *rate) for rate in rates)

    def _training(self, script: str, *words: Word) -> Run:
        return Run(script, (*words, "--save-every", "5m", "--out", "{here}"))

    def _best(self, runs: tuple[Run, ...], judges: tuple[Run, ...] = ()) -> Word:
        """Rates are chosen once, for the first seed."""
        first = tuple(changed(judge, seed=self.options.seeds[0]) for judge in judges or runs)
        return Best(runs, first) if len(runs) > 1 else runs[0]

    # ---- after it

    def chat(self, model: Word) -> Word:
        """Chat vector, with --instruct, and SFT, with --conversations."""
        options = self.options
        if options.instruct and model != options.instruct:
            words = ("--model", model, "--base", options.model, "--instruct", options.instruct, "--out", "{here}")
            model = Run("merge_chat_vector.py", words)
        if options.conversations:
            words = ("--model", model, "--data", *options.conversations, f"{SEED}{self.seed}")
            model = self._training("sft.py", *words, *options.sft)
        return model

    def measures(self, model: Word) -> dict[str, Word]:
        """What is done with a row's model: the bits a byte of one that no run with --validation made, and benchmarks
        after chat vector and SFT."""
        last = [*needed(model, judges=False)][-1:]
        if last and last[0].script not in PRETRAINING:
            return {}
        found = {} if last and "--validation" in last[0].words else {"perplexity": self.perplexity(model)}
        chat = self.chat(model)
        return found | {"chat": chat} | {name: self.benchmark(name, chat) for name in self.options.benches}

    def perplexity(self, model: Word) -> Run:
        training = self.options.training
        same = [word for name in ("--seq-len", "--dtype") if name in training
                for word in training[training.index(name) :][:2]]  # fmt: skip
        return Run("eval perplexity", ("--model", model, "--data", *self.options.held_out, *same, *JSON))

    def benchmark(self, name: str, model: Word) -> Run:
        options = self.options
        if name in LIKELIHOOD:
            words = ("--model", model, "--tasks", name, "--data", options.benchmarks)
            return Run("eval choice", (*words, "--samples", "{here}/samples.jsonl", *JSON))
        bench = ("--bench", name, "--bench-dir", f"{options.benchmarks}/{name}")
        answers = Run("eval answers", (*bench, "--model", model, "--name", "row", "--out", "{here}", *JSON))
        asked = ("--judge-model", options.judge_model, *(["--base-url", options.base_url] if options.base_url else []))
        judge = Run("eval judge", (*bench, *asked, "--out", answers, *JSON))
        return Run("eval score", (answers, *JSON, Needs(judge)))  # judgments are where the answers are
