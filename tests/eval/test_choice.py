"""`python -m eval choice` against lm-eval: prompts, log-likelihoods and figures, with three families' tokenizers."""

import json
import subprocess
import sys
from pathlib import Path

import families
import lm_eval_reference
import pytest
import sentencepiece
import yaml
from commands import status_of
from small_tokenizer import write_tokenizer
from tokenizers import Tokenizer, models, normalizers, processors
from transformers.convert_slow_tokenizer import generate_merges

from eval import __main__ as evaluation
from eval import tasks as benchmarks
from examples import questions as data_files

TEXT = "\n".join(
    [str(value) for record in [*data_files.BOOLQ, *data_files.MARC_JA, *data_files.HELLASWAG] for value in record]
    + [question for questions in data_files.SUBJECTS.values() for question, *_ in questions]
)
ALL = ["mmlu", "kobest", "marc_ja"]
# Contexts: in 4096 all fits but one paragraph, in 314 not every two-shot prompts do.
RUNS = {
    "llama3": {"shots": None, "tasks": ALL},
    "mistral": {"shots": 2, "tasks": ALL},
    "qwen2": {"shots": 1, "tasks": ["mmlu_sociology", "kobest_wic", "kobest_hellaswag", "marc_ja"]},
}


def byte_level(directory, bos):
    write_tokenizer(directory, TEXT, vocab_size=500)
    if bos:
        path = directory / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        tokenizer.save(str(path))


def sentencepiece_with_json(directory):
    """tokenizer.model, and the tokenizer.json that restates it as Mistral's does."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    pieces = {processor.id_to_piece(id): id for id in range(processor.get_piece_size())}
    scores = {p: processor.get_score(id) for p, id in pieces.items() if not p.startswith("<") or p == "<"}
    merges = generate_merges(pieces, scores)
    tokenizer = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Three random models with their tokenizers; Mistral's attention is cut to a window and its context short."""
    root = tmp_path_factory.mktemp("checkpoints")
    rope = {"rope_parameters": families.LLAMA3_ROPE}
    made = {
        "llama3": lambda: families.llama(vocab_size=500, max_position_embeddings=4096, **rope),
        "mistral": lambda: families.mistral(vocab_size=500, max_position_embeddings=314, sliding_window=64),
        "qwen2": lambda: families.qwen2(vocab_size=500, max_position_embeddings=4096, tie_word_embeddings=True),
    }
    for name, variant in made.items():
        families.VARIANTS["small"] = variant
        families.write("small", root / name)
    byte_level(root / "llama3", bos=True)
    byte_level(root / "qwen2", bos=False)
    sentencepiece_with_json(root / "mistral")
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return data_files.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory, checkpoints):
    """What lm-eval finds: {run: {"results", "samples"}}."""
    root = tmp_path_factory.mktemp("lm-eval")
    for subject, split, rows in data_files.mmlu_rows():
        records = [{"question": q, "choices": choices, "answer": "ABCD".index(a)} for q, *choices, a in rows]
        data_files.write_lines(root / "data" / f"mmlu_{subject}" / f"{split}.json", records)
    for name, split, records in data_files.kobest_rows():
        data_files.write_lines(root / "data" / f"kobest_{name}" / f"{split}.json", records)
        data_files.write_lines(root / "data" / f"kobest_{name}" / "validation.json", records)
    reviews = [{"sentence": text, "label": ["positive", "negative"].index(label)} for text, label in data_files.MARC_JA]
    data_files.write_lines(root / "data" / "marc_ja" / "train.json", reviews[::-1] + reviews[:2])
    data_files.write_lines(root / "data" / "marc_ja" / "validation.json", reviews)
    runs = {name: {"model": str(checkpoints / name), **run} for name, run in RUNS.items()}
    spec = {"data": str(root / "data"), "out": str(root / "out.json"), "runs": runs}
    (root / "spec.json").write_text(json.dumps(spec))
    script = Path(lm_eval_reference.__file__)
    run = subprocess.run([sys.executable, script, root / "spec.json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((root / "out.json").read_text())


def evaluate(monkeypatch, *words):
    return status_of(monkeypatch, evaluation.main, "eval", "choice", *words)


def read_samples(path):
    """task -> its samples in the order of their indices"""
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["index"])
    return {task: [s for s in samples if s["task"] == task] for task in {s["task"] for s in samples}}


@pytest.mark.parametrize("name", RUNS)
def test_equals_lm_eval(name, reference, checkpoints, data, tmp_path, monkeypatch, capfd):
    run, theirs = RUNS[name], reference[name]
    words = ["--model", checkpoints / name, "--data", data, "--tasks", ",".join(run["tasks"]), "--dtype", "fp32"]
    words += [] if run["shots"] is None else ["--shots", run["shots"]]
    files = ["--samples", tmp_path / "samples.jsonl", "--json", tmp_path / "result.json", "--batch-tokens", 700]
    assert evaluate(monkeypatch, *words, *files) == 0

    tasks = benchmarks.load()[0]
    samples = read_samples(tmp_path / "samples.jsonl")
    assert samples.keys() == theirs["samples"].keys()
    for task, expected in theirs["samples"].items():
        questions = tasks[task].questions(data, run["shots"])
        delimiter = tasks[task].delimiter
        assert [question.context for question in questions] == [sample["context"] for sample in expected], task
        assert [[delimiter + c for c in q.choices] for q in questions] == [s["choices"] for s in expected], task
        assert [sample["index"] for sample in samples[task]] == list(range(len(expected)))
        for ours, sample in zip(samples[task], expected, strict=True):
            assert ours["loglikelihoods"] == pytest.approx(sample["loglikelihoods"], abs=1e-3, rel=0), task
            best = max(range(len(sample["choices"])), key=sample["loglikelihoods"].__getitem__)
            assert ours["prediction"] == best
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    for task, figures in theirs["results"].items():
        compared = [metric for metric in ("acc", "acc_norm", "f1") if metric in figures]
        assert compared, task
        for metric in compared:
            assert results[task][metric] == pytest.approx(figures[metric], abs=1e-9), (task, metric)
    assert results.keys() == theirs["results"].keys()
    out = capfd.readouterr().out
    for task in results:
        assert task in out


def test_the_categories_of_mmlu_are_those_of_lm_eval():
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    files = [yaml.safe_load(path.read_text()) for path in folder.glob("mmlu_*.yaml")]
    tasks, groups = benchmarks.load()
    assert {name for name in tasks if name.startswith("mmlu_")} == {file["task"] for file in files}
    assert sum(len(group.tasks) for group in groups.values() if group.name.startswith("mmlu_")) == len(files) == 57
    for file in files:
        assert file["task"] in groups[file["tag"].removesuffix("_tasks")].tasks
        assert tasks[file["task"]].description == file["description"]
