"""Of what the rows of an experiment are made: chains of the stages' own commands."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elo.common.fields import read_json_object
from elo.common.terminal import note
from elo.methods import DEFAULT_LAYERS
from experiments.runs import FailedError, Runs, option

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
            given += ["--validation", *options.held_out_files, f"--validation-mb={options.validation_mb:g}"]
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

    def measure(self, model: str, figures: dict[str, Any]) -> None:
        """Bits a byte of the pretrained model on what is held out, and benchmarks after chat vector and SFT.

        Raises FailedError, after all figures that do not fail.
        """
        options, made, failed = self.runs.options, self.runs.made_of.get(model, []), []
        if made and made[-1].option("--validation"):
            bits = bits_of(made[-1].last_step.get("validation", []))
        else:
            words = ("--model", model, "--data", *options.held_out_files, *shared(options.training))
            bits = bits_of(self.result("eval perplexity", *words).get("files", []))
        figures |= {name.partition(".")[0]: value for name, value in bits.items() if name.endswith(".heldout")}
        chat = self.chat(model)
        for name in options.benches:
            try:
                score = self.judged(name, chat) if name in JUDGED else self.chosen(name, chat)
                figures |= {} if score is None else {name: score}
            except FailedError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def chosen(self, name: str, model: str) -> float | None:
        words = ("--model", model, "--tasks", name, "--data", self.runs.options.benchmarks)
        made = self.result("eval choice", *words, "--samples", "{here}/samples.jsonl")
        return made.get("results", {}).get(name, {}).get("acc")

    def judged(self, name: str, model: str) -> float | None:
        """None if no judgment could be read."""
        options, bench = self.runs.options, ("--bench", name, "--bench-dir", f"{self.runs.options.benchmarks}/{name}")
        answers = self.runs.do("eval answers", *bench, "--model", model, "--name", "row", "--out", "{here}", *JSON)
        asked = ("--judge-model", options.judge_model, *(["--base-url", options.base_url] if options.base_url else []))
        made = self.result("eval judge", *bench, *asked, "--out", answers)
        # Judgments are where the answers are, those of other judges too.
        score = self.result("eval score", str(Path(answers, "model_judgment", Path(made.get("file", "")).name)))
        found = score.get("models", {}).get("row", {})
        if found.get("unparsed"):
            note(f"{name}: {found['unparsed']} of {found['judgments']} judgments have no rating")
        return found.get("average")

    def result(self, command: str, *words: str) -> dict[str, Any]:
        """Empty where nothing is done yet."""
        here = self.runs.do(command, *words, *JSON)
        return read_json_object(Path(here, "result.json")) if self.runs.lock else {}


@dataclass(frozen=True)
class Row:
    name: str
    model: Chain  # after pretraining, before the chat vector
    control: Chain | None = None  # of ELO: alignment only, which --equal-time makes as long
    measure: Callable[[Kit, str, dict[str, Any]], None] = Kit.measure  # adds the model's figures


def bits_of(files: list[dict[str, Any]]) -> dict[str, float]:
    """By their names without folder and .jsonl: a directory may have been moved. Of NaN, which is null, none."""
    return {Path(line["file"]).stem: bits for line in files if (bits := line.get("bits_per_byte")) is not None}


def shared(training: list[str]) -> list[str]:
    """What evaluation takes of --training."""
    names = ("--seq-len", "--dtype", "--text-field")
    return [word for name in names if (value := option(training, name)) for word in (name, value)]


def stage(method: str, script: str, units: float | Callable[[Kit], float], *words: Word) -> Chain:
    """A command at the rate that is best for the first seed; of stage 1 after one unit of alignment."""

    def attempt(kit: Kit, rate: str | None) -> str:
        return kit.pretrain(script, units(kit) if callable(units) else units, rate, words)

    def bits(kit: Kit, rate: str) -> float:
        """On the validation text of the target language: what is held out for the results has no say."""
        try:
            made = attempt(kit, rate)
            if method == "elo":
                same, first = ALONE if ALONE[0] in words else (), kit.runs.options.rates.get("align", [None])[0]
                made = kit.pretrain("align.py", 1, first, ("--elo", made, *same))
        except FailedError:  # reported, and as bad as it can be
            return math.inf
        return bits_of(kit.runs.made_of[made][-1].last_step.get("validation", [])).get("target.validation", math.inf)

    def do(kit: Kit) -> str:
        rates = kit.runs.options.rates.get(method, [None]) if units else [None]
        first = replace(kit, seed=kit.runs.options.seeds[0])
        found = {rate: bits(first, rate) for rate in rates} if len(rates) > 1 else {rates[0]: 0.0}
        if kit.runs.lock and min(found.values()) == math.inf:
            raise FailedError(f"--rates {method}={','.join(rates)}: with none of them a run ends with a finite loss")
        return attempt(kit, min(found, key=found.get))

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
        validation = ("--validation", kit.runs.options.held_out_files[0])
        here = kit.pretrain("align.py", 0, None, ("--elo", stage_1, "--scale", "auto", *validation))
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
