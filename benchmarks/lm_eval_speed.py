"""Questions a second of `python -m eval choice` beside lm-eval, with the same model on the same questions.

    python -m benchmarks.lm_eval_speed --model models/SmolLM2-135M-Instruct --dtype fp32

Both get the same contexts and choices as text, and the time is from there to the log-likelihoods: tokenization and
model, without loading anything. They take turns, so that the machine's moods hit both alike, and the largest
difference of their log-likelihoods is shown. Without --data the questions are cut from the prose of
examples/texts.py in about the lengths of the real benchmarks; what they ask is nonsense.
"""

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from benchmarks.sides import Side, compared_options, take_turns
from elo.common.errors import UserError, exit_status
from elo.common.fields import write_json
from elo.common.options import Parser, positive_int
from elo.model.checkpoint import load_model
from elo.model.packed import pack_weights
from elo.runs.devices import DTYPES, inference_device
from elo.text.tokenizer import load_tokenizer
from eval import tasks as benchmarks
from eval.likelihood.choice import select
from eval.likelihood.loglikelihood import Scorer, encode, make_batches
from examples import questions, texts

Texts = list[tuple[str, list[str]]]  # context and choices


def arguments() -> Namespace:
    parser = Parser(prog="python -m benchmarks.lm_eval_speed", description=__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="benchmark files (default: made of prose)")
    parser.add_argument("--tasks", default="mmlu,kobest,marc_ja", metavar="NAME,...", help="(%(default)s)")
    parser.add_argument("--limit", type=positive_int, default=32, help="questions of a task (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="(%(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="of each (%(default)s)")
    parser.add_argument("--batch-tokens", type=positive_int, default=8192, help="ours (%(default)s)")
    parser.add_argument("--lm-eval-batch-size", default="8", help="sequences, or auto (%(default)s)")
    return compared_options(parser)


def main() -> None:
    options = arguments()
    if find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: pip install -r requirements-dev.txt")
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or write_prose(Path(folder), options.limit)
        tasks, _ = select(options.tasks, data)
        asked = {task.name: as_texts(task, data, options.limit) for task in tasks}
    sides = {"ours": Side(ours_of, options), "lm-eval": Side(lm_eval_of, options)}
    for side in sides.values():
        side.run(asked[tasks[0].name][:2])  # the first call makes the libraries' buffers
    rows = []
    total = dict.fromkeys(sides, 0.0)
    print(f"{'task':<22} {'questions':>9} {'ours/s':>8} {'lm-eval/s':>9} {'ratio':>6} {'difference':>11}")
    for name, asked_here in asked.items():
        seconds, values = take_turns(sides, asked_here, options.rounds)
        total = {who: total[who] + seconds[who] for who in sides}
        per_second = {who: len(asked_here) / taken for who, taken in seconds.items()}
        rows.append(
            {
                "task": name,
                "questions": len(asked_here),
                "ours": per_second["ours"],
                "lm_eval": per_second["lm-eval"],
                "ratio": per_second["ours"] / per_second["lm-eval"],
                "difference": max(abs(a - b) for a, b in zip(values["ours"], values["lm-eval"], strict=True)),
            }
        )
        line = "{task:<22} {questions:9} {ours:8.2f} {lm_eval:9.2f} {ratio:6.2f} {difference:11.2g}"
        print(line.format(**rows[-1]), flush=True)
    print(f"the time of all: lm-eval's is {total['lm-eval'] / total['ours']:.2f} of ours")
    if options.json:
        write_json(options.json, {"rows": rows, "dtype": options.dtype})


def as_texts(task: benchmarks.Task, data: Path, limit: int) -> Texts:
    asked = task.questions(data, limit=limit)
    return [(question.context, [task.delimiter + choice for choice in question.choices]) for question in asked]


def ours_of(options: Namespace) -> Callable[[Texts], list[float]]:
    """A function from questions to the log-likelihoods of all their choices."""
    model = pack_weights(load_model(options.model, inference_device(), DTYPES[options.dtype]))
    tokenizer, scorer = load_tokenizer(options.model), Scorer(model)

    def run(asked: Texts) -> list[float]:
        encoded = encode(tokenizer, asked, model.config.max_position_embeddings)
        batches = make_batches(encoded, options.batch_tokens)
        found = {(question, choice): value for b in batches for question, choice, value in scorer.score(b)}
        return [value for _, value in sorted(found.items())]

    return run


def lm_eval_of(options: Namespace) -> Callable[[Texts], list[float]]:
    """The same by lm-eval's HFLM, with the tokenizer as tokenizer.json describes it."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype])
    size = options.lm_eval_batch_size
    lm = HFLM(
        pretrained=model.to(inference_device()),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(options.model),
        backend="causal",
        batch_size=size if size == "auto" else int(size),
    )

    def run(asked: Texts) -> list[float]:
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=(context, choice), idx=index)
            for context, choices in asked
            for index, choice in enumerate(choices)
        ]
        with torch.inference_mode():
            return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]

    return run


# ---- questions of the real benchmarks' lengths


class Prose:
    """A text, handed out piece by piece."""

    def __init__(self, documents: list[str]) -> None:
        self.text, self.position = " ".join(" ".join(documents).split()), 0

    def take(self, characters: int) -> str:
        if self.position + characters > len(self.text):
            self.position = 0
        self.position += characters
        return self.text[self.position - characters : self.position].strip()


def write_prose(data: Path, count: int) -> Path:
    """MMLU, KoBEST and MARC-ja files of which everything but the lengths is nonsense."""
    english, korean = Prose(texts.english()).take, Prose(texts.korean()).take
    for subject in ("astronomy", "sociology"):
        for split, rows in (("dev", 5), ("test", count)):
            records = [[english(250), *(english(35) for _ in range(4)), "ABCD"[n % 4]] for n in range(rows)]
            questions.write_csv(data / "mmlu" / split / f"{subject}_{split}.csv", records)
    lengths = {
        "boolq": {"paragraph": 220, "question": 25},
        "copa": {"premise": 17, "alternative_1": 17, "alternative_2": 17},
        "wic": {"word": 2, "context_1": 28, "context_2": 28},
        "hellaswag": {"context": 70, "ending_1": 30, "ending_2": 30, "ending_3": 30, "ending_4": 30},
        "sentineg": {"sentence": 20},
    }
    for name, fields in lengths.items():
        for split in ("train", "test"):
            records = [{key: korean(size) for key, size in fields.items()} | {"label": n % 2} for n in range(count)]
            if name == "copa":
                records = [record | {"question": "원인"} for record in records]
            questions.write_lines(data / "kobest" / name / f"{split}.jsonl", records)
    for split in ("train", "valid"):
        reviews = [{"sentence": korean(100), "label": ("positive", "negative")[n % 2]} for n in range(count)]
        questions.write_lines(data / "marc_ja" / f"{split}-v1.0.json", reviews)
    return data


if __name__ == "__main__":
    exit_status(main)
