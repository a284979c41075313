"""Of what the rows of an experiment are made: chains of the stages' own commands."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from elo.common.fields import read_json_object
from elo.common.terminal import note
from elo.methods import DEFAULT_LAYERS
from experiments.runs import Runs

LIKELIHOOD = ("mmlu", "kobest", "marc_ja")
JUDGED = ("mt_bench", "logickor", "japanese_mt_bench")
BENCHMARKS = (*LIKELIHOOD, *JUDGED)
UNITS = 10  # that --gb has: nine of stage 1 and one of alignment, or ten of a baseline
ALONE = ("--target-fraction", "1")  # without English
JSON = ("--json", "{here}/result.json")

Chain = Callable[["Kit"], str]  # does what is needed; the model's directory
Word = str | Chain


@dataclass(frozen=True)
class Kit:
    runs: Runs
    seed: int

    def pretrain(self, script: str, units: float, rate: str | None, words: tuple[Word, ...]) -> str:
        """train.py or align.py on so much text; its directory."""
        options = self.runs.options
        given = ["--model", options.model, "--target", *options.target]
        given += ["--source", *options.source] if options.source else ["--target-fraction", "1"]
        given += ["--gb", f"{units * options.gb / UNITS:.9g}", "--seed", str(self.seed), *options.training]
        given += [word if isinstance(word, str) else word(self) for word in words]
        if units:
            given += ["--validation", *options.held_out, f"--validation-mb={options.validation_mb:g}"]
            given += ["--validate-every=1000000"]
            given += ["--lr", rate] if rate else []
        return self.runs.do(script, *given, "--save-every", "5m", "--out", "{here}")

    def chat(self, model: str) -> str:
        """Chat vector, with --instruct, and SFT, with --conversations."""
        options = self.runs.options
        if options.instruct and model != options.instruct:
            words = ("--model", model, "--base", options.model, "--instruct", options.instruct, "--out", "{here}")
            model = self.runs.do("merge_chat_vector.py", *words)
        if options.conversations:
            words = ("--model", model, "--data", *options.conversations, "--seed", str(self.seed), *options.sft)
            model = self.runs.do("sft.py", *words, "--save-every", "5m", "--out", "{here}")
        return model

    def measure(self, model: str) -> dict[str, float]:
        """Bits a byte of the pretrained model on what is held out, and benchmarks after chat vector and SFT."""
        options, made = self.runs.options, self.runs.made_of.get(model, [])
        if made and made[-1].option("--validation"):
            files = made[-1].last_step.get("validation", [])
        else:
            given = zip(options.training, options.training[1:], strict=False)
            same = [word for pair in given if pair[0] in ("--seq-len", "--dtype") for word in pair]
            found = self.result("eval perplexity", "--model", model, "--data", *options.held_out, *same)
            files = found.get("files", [])
        held_out = [(Path(line["file"]).name.split("."), line["bits_per_byte"]) for line in files]
        figures = {language: bits for (language, part, _), bits in held_out if part == "heldout"}
        chat = self.chat(model)
        for name in options.benches:
            if name in JUDGED:
                found = self.judged(name, chat).get("models", {}).get("row", {})
                if found.get("unparsed"):
                    note(f"{name}: {found['unparsed']} of {found['judgments']} judgments have no rating")
            else:
                words = ("--model", chat, "--tasks", name, "--data", options.benchmarks)
                made = self.result("eval choice", *words, "--samples", "{here}/samples.jsonl")
                found = made.get("results", {}).get(name, {})
            if (score := found.get("acc", found.get("average"))) is not None:  # no judgment could be read
                figures[name] = score
        return figures

    def judged(self, name: str, model: str) -> dict[str, Any]:
        options, bench = self.runs.options, ("--bench", name, "--bench-dir", f"{self.runs.options.benchmarks}/{name}")
        answers = self.runs.do("eval answers", *bench, "--model", model, "--name", "row", "--out", "{here}", *JSON)
        asked = ("--judge-model", options.judge_model, *(["--base-url", options.base_url] if options.base_url else []))
        made = self.result("eval judge", *bench, *asked, "--out", answers)
        # Judgments are where the answers are, those of other judges too.
        return self.result("eval score", str(Path(answers, "model_judgment", Path(made.get("file", "")).name)))

    def result(self, command: str, *words: str) -> dict[str, Any]:
        """Empty where nothing is done yet."""
        here = self.runs.do(command, *words, *JSON)
        return read_json_object(Path(here, "result.json")) if self.runs.lock else {}


@dataclass(frozen=True)
class Row:
    name: str
    model: Chain  # after pretraining, before the chat vector
    control: Chain | None = None  # of ELO: alignment only, which --equal-time makes as long
    measure: Callable[[Kit, str], dict[str, Any]] = Kit.measure  # the model's figures


def stage(method: str, script: str, units: float | Callable[[Kit], float], *words: Word) -> Chain:
    """A command at the rate that is best for the first seed; of stage 1 after one unit of alignment."""

    def attempt(kit: Kit, rate: str | None) -> str:
        return kit.pretrain(script, units(kit) if callable(units) else units, rate, words)

    def bits(kit: Kit, rate: str) -> float:
        made = attempt(kit, rate)
        if method == "elo":
            same, first = [word for word in words if word in ALONE], kit.runs.options.rates.get("align", [None])[0]
            made = kit.pretrain("align.py", 1, first, ("--elo", made, *same))
        return kit.runs.bits(made)

    def do(kit: Kit) -> str:
        rates, first = kit.runs.options.rates.get(method, [None]), replace(kit, seed=kit.runs.options.seeds[0])
        return attempt(kit, min(rates, key=partial(bits, first)) if len(rates) > 1 else rates[0])

    return do


def base(kit: Kit) -> str:
    return kit.runs.options.model


def instruct(kit: Kit) -> str:
    return kit.runs.options.instruct


def elo(layers: str = DEFAULT_LAYERS, units: float = UNITS - 1, *more: str) -> Chain:
    return stage("elo", "train.py", units, "--layers", layers, *more)


def align(stage_1: Chain, units: float = 1, *more: Word) -> Chain:
    """Stage 2; 0 units only put the layers back."""
    return stage("align", "align.py", units, "--elo", stage_1, *more)


def found_scale(stage_1: Chain) -> Chain:
    """What --scale auto finds on the target language's validation text."""

    def found(kit: Kit) -> str:
        validation = f"--validation={kit.runs.options.held_out[0]}"
        here = kit.pretrain("align.py", 0, None, ("--elo", stage_1, "--scale", "auto", validation))
        return ",".join(map(str, read_json_object(Path(here, "elo.json"))["scale"])) if kit.runs.lock else "auto"

    return found


def alignment_only(stage_1: Chain, units: float = 1) -> Chain:
    """The control: the documents that stage 2 takes after the run `stage_1`, without stage 1."""
    return stage("align", "align.py", units, "--after", stage_1) if units else base


def baseline(method: str, units: float | Callable[[Kit], float] = UNITS) -> Chain:
    """full, lora or selective, on the documents of stages 1 and 2 together."""
    return stage(method, "train.py", units, "--method", method, *["--merge"] * (method == "lora"))


def in_time_of(row: Row, name: str = "alignment only", method: str = "") -> Row:
    """A baseline, or else the row's control, for as long as all of its chain took, from the first document on."""

    def units(kit: Kit) -> float:
        other, runs = (baseline(method) if method else row.control)(kit), kit.runs
        units = UNITS * float(runs.made_of[other][-1].option("--gb")) / runs.options.gb
        own, others = runs.seconds(row.model(kit), other)
        return units * own / others

    chain = baseline(method, units) if method else stage("align", "align.py", units)
    return Row(f"{name}, in the time of {row.name}", chain)
