"""A model's answers to MT-Bench, Japanese MT-Bench or LogicKor, in FastChat's model_answer format.

Two turns a question; the second sees the model's own first answer. Answers are written as they come to
OUT/model_answer/NAME.jsonl, and a run that was stopped goes on with the questions that are missing there. Batches are
made of all questions, whichever are missing, and under torchrun divided over the processes: the same command gives the
same answers after any interruption and for any number of processes, on one kind of machine. The random numbers of an
answer depend on the seed, the question and the turn alone. In fp32 so does the answer; in bf16 the rounding of matrix
products depends on the shape of a batch, and with another --batch-size or --limit two tokens that are almost equally
likely may change places. So a file has answers of one --batch-size only; those of a smaller --limit are kept.
"""

import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from elo.common.errors import UserError
from elo.common.fields import check_output, read_json_object, write_json
from elo.common.options import Parser, not_negative_int, positive, positive_int, share
from elo.common.terminal import note, show
from elo.generation.engine import generate
from elo.generation.sampling import Sampling
from elo.model.checkpoint import load_model
from elo.model.decoder import CausalLM
from elo.model.packed import pack_weights
from elo.runs.devices import DTYPES
from elo.runs.processes import process_group
from elo.text.chat_format import ChatFormat, Messages, chat_format, check_messages
from elo.text.tokenizer import load_tokenizer
from elo.variants.adapted import open_checkpoint
from eval.jsonl import JsonLines, digest
from eval.judged.benchmarks import BENCHMARKS, Benchmark, Question, question_id, read_questions
from eval.judged.sampling import sampling_options
from eval.tables import table

EXAMPLES = Path(__file__).parent / "data" / "logickor_examples.json"
CUT = ("length", "context")  # why an answer may have ended before the model ended it

Record = dict[str, Any]


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--bench", required=True, choices=BENCHMARKS, help="which benchmark")
    parser.add_argument("--bench-dir", required=True, type=Path, metavar="DIR", help="has its question.jsonl")
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint with a chat format")
    parser.add_argument("--name", help="of the model in the results (default: that of its directory)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="gets model_answer/NAME.jsonl (default: --bench-dir)")
    parser.add_argument("--overwrite", action="store_true", help="answer anew what the file has already")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N questions of each category")
    parser.add_argument("--chat-format", metavar="NAME", help="instead of the checkpoint's")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="questions at a time (%(default)s)")
    defaults = ", ".join(f"{benchmark.name} {benchmark.max_new_tokens}" for benchmark in BENCHMARKS.values())
    parser.add_argument("--max-new-tokens", type=positive_int, metavar="N", help=f"in an answer (default: {defaults})")
    group = parser.add_argument_group(
        "sampling",
        "The temperature is the benchmark's. The rest is by default what transformers takes, and so FastChat: the "
        "model's generation_config.json, and a top-k of 50; for LogicKor, which is greedy, nothing.",
    )
    group.add_argument("--top-k", type=not_negative_int, metavar="K", help="likeliest tokens; 0: all")
    group.add_argument("--top-p", type=share, metavar="P", help="likeliest tokens of this probability")
    group.add_argument("--min-p", type=share, metavar="P", help="tokens at least this times as likely as the likeliest")
    group.add_argument("--repetition-penalty", type=positive, metavar="R", help="above 1: less repetition")
    group.add_argument("--seed", type=not_negative_int, default=0, help="of the random numbers (%(default)s)")
    group = parser.add_argument_group("LogicKor")
    group.add_argument("--setting", default="default", help="default, 1-shot or cot-1-shot (%(default)s)")
    group.add_argument("--examples", type=Path, default=EXAMPLES, metavar="FILE", help=(
        'the messages in front of each question, {"1-shot": [{"role": ..., "content": ...}, ...], "cot-1-shot": '
        "[...]} (default: this project's own; LogicKor's are in its templates.py)"))  # fmt: skip


def main(arguments: Namespace) -> None:
    benchmark = BENCHMARKS[arguments.bench]
    questions = read_questions(benchmark, arguments.bench_dir, arguments.limit)
    examples = read_examples(benchmark, arguments.setting, arguments.examples)
    name = model_name(arguments.name or Path(arguments.model).resolve().name, arguments.setting)
    path = (arguments.out or arguments.bench_dir) / "model_answer" / f"{name}.jsonl"
    check_output("--json", arguments.json, [path])

    checkpoint = open_checkpoint(arguments.model)
    tokenizer = load_tokenizer(checkpoint.directory, checkpoint.config.vocab_size)
    format = chat_format(checkpoint.directory, tokenizer, arguments.chat_format)
    options = sampling_options(benchmark, arguments, checkpoint.directory)
    parameters = {
        "max_new_tokens": arguments.max_new_tokens or benchmark.max_new_tokens,
        **options,
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "batch_size": arguments.batch_size,
        "chat_format": format.name,
        "stops": sorted(format.stop_ids),
        "setting": arguments.setting,
        "model": digest(checkpoint.fingerprint(), tokenizer.fingerprint),
    }
    settings = {
        q.id: {"temperature": benchmark.temperature(q.category), **parameters, "questions": digest(examples, q.turns)}
        for q in questions
    }

    # Rank 0 has the file; the others send it their answers.
    with process_group() as world, JsonLines(path) if world.rank == 0 else nullcontext() as results:
        answered: dict[int | str, Record] = {}
        if results is not None:
            answered = {} if arguments.overwrite else answers_so_far(results, settings)
        done = world.from_rank_0(set(answered))
        if format.needs_time:  # all answers have that of the first, or a run that goes on would ask in another way
            times = [record["generate_params"].get("time") for record in answered.values()]
            now = world.from_rank_0(next((at for at in times if isinstance(at, float)), format.template.now))
            format = replace(format, template=replace(format.template, now=now))
            settings = {id: {**made, "time": now} for id, made in settings.items()}
        groups = batches(questions, benchmark, arguments.batch_size)
        missing = [batch for batch in groups if any(question.id not in done for question in batch)]
        world.say(f"{path}: {len(done)} of {len(questions)} questions were answered before")
        if missing:
            model = pack_weights(load_model(checkpoint, world.device, DTYPES[arguments.dtype]))
            hidden = world.rank > 0 or not sys.stderr.isatty()
            bar = tqdm(total=len(questions), initial=len(done), unit="question", disable=hidden)
            for start in range(0, len(missing), world.size):
                records = []
                for batch in missing[start + world.rank : start + world.rank + 1]:
                    temperature = benchmark.temperature(batch[0].category)
                    sampling = Sampling(temperature=temperature, seed=arguments.seed, **options)
                    answers = answer(model, format, batch, examples, parameters["max_new_tokens"], sampling)
                    for question, given in zip(batch, answers, strict=True):
                        if question.id not in done:
                            records.append(to_record(question, name, given, settings[question.id]))
                records = world.gather(records)
                if results is not None and arguments.overwrite and start == 0:
                    results.clear()  # only now: what was there is not lost to a model that cannot answer
                for record in chain.from_iterable(records):
                    if results is not None:
                        results.append(record)
                    answered[record["question_id"]] = record
                    bar.update()
            bar.close()
        if results is not None:
            report(questions, answered, arguments.json, {"bench": benchmark.name, "model": name, "file": str(path)})


def model_name(name: str, setting: str) -> str:
    """What a model is called in files and tables; LogicKor's settings count as models of their own."""
    if not name or name.startswith(".") or "/" in name or not name.isprintable():
        raise UserError(f"--name {name!r}: it becomes the name of a file")
    return name if setting == "default" else f"{name}-{setting}"


def read_examples(benchmark: Benchmark, setting: str, path: Path) -> Messages:
    """The messages that a setting puts in front of every question."""
    if setting not in benchmark.settings:
        raise UserError(f"--setting {setting}: {benchmark.name} has {', '.join(benchmark.settings)}")
    if setting == "default":
        return []
    messages = read_json_object(path).get(setting)
    try:
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError("it must be a list of messages")
        check_messages(messages)
    except UserError as error:
        raise UserError(f"{path}: {setting!r}: {error}") from None
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{path}: {setting!r}: its last message must be the assistant's; the question follows it")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def answers_so_far(results: JsonLines, settings: dict[int | str, Record]) -> dict[int | str, Record]:
    """The answers in the file by question; UserError if they were made in another way than this run's would be."""
    answered = {}
    for line in results.lines:
        where, record = line
        if (id := question_id(line.fields)) not in settings:
            continue  # with a smaller --limit than before
        before = record.get("generate_params")
        if not isinstance(before, dict):
            raise UserError(f"{where}: an answer that does not say how it was made; give another --out or --name")
        changed = [name for name, value in settings[id].items() if before.get(name) != value]
        if changed:
            was = ", ".join(f"{name} was {before.get(name)}, is {settings[id][name]}" for name in changed)
            raise UserError(f"{where}: made in another way: {was}; use --overwrite, another --out or another --name")
        if not is_complete(record):
            raise UserError(f"{where}: not an answer as this command writes it; use --overwrite, or another --out")
        answered[id] = record
    return answered


def is_complete(record: Record) -> bool:
    """Whether a line has what `report` counts: for each turn a text, its tokens and why it ended."""
    match record:
        case {"choices": [{"turns": list(turns)}, *_], "tokens": list(tokens), "finish": list(finish)}:
            kinds = ((turns, str), (tokens, int), (finish, str))
            return bool(turns) and all(
                len(values) == len(turns) and all(isinstance(value, kind) for value in values) for values, kind in kinds
            )
    return False


def batches(questions: Sequence[Question], benchmark: Benchmark, size: int) -> list[list[Question]]:
    """All questions in batches of one temperature, whichever of them are answered and by how many processes."""
    groups: dict[float, list[Question]] = {}
    for question in questions:
        groups.setdefault(benchmark.temperature(question.category), []).append(question)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def random_name(id: int | str, turn: int) -> int:
    """Names the random numbers of an answer, so that they do not depend on what else is being answered."""
    return int(digest(id, turn), 16)


class Answer(NamedTuple):
    """A question's answers, one a turn, each with its tokens and why it ended.

    That is "stop" if the model ended it, "length" if max_new_tokens did, "context" if the model's context was full; an
    answer is empty if its prompt alone fills the context.
    """

    turns: list[str]
    tokens: list[int]
    finish: list[str]


def answer(
    model: CausalLM,
    format: ChatFormat,
    questions: Sequence[Question],
    examples: Messages,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[Answer]:
    """Answer some questions together, a batch a turn."""
    conversations, answers = [list(examples) for _ in questions], [Answer([], [], []) for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        rows = [row for row, question in enumerate(questions) if turn < len(question.turns)]
        for row in rows:
            conversations[row].append({"role": "user", "content": questions[row].turns[turn]})
        prompts = {row: format.prompt(conversations[row]) for row in rows}
        fitting = {row: prompt for row, prompt in prompts.items() if len(prompt) < model.config.context}
        names = [random_name(questions[row].id, turn) for row in fitting]
        generated: list[list[int]] = []
        if fitting:
            stops = [format.stop_ids] * len(fitting)
            generated = generate(model, list(fitting.values()), stops, max_new_tokens, sampling, names)
        ids_of = dict(zip(fitting, generated, strict=True))
        for row in rows:
            ids = ids_of.get(row, [])
            # FastChat and LogicKor strip answers too, and the second turn sees the stripped one.
            text = format.tokenizer.decode([id for id in ids if id not in format.stop_ids]).strip()
            conversations[row].append({"role": "assistant", "content": text})
            answers[row].turns.append(text)
            answers[row].tokens.append(len(ids))
            cut = "length" if len(ids) == max_new_tokens else "context"
            answers[row].finish.append("stop" if ids and ids[-1] in format.stop_ids else cut)
    return answers


def to_record(question: Question, name: str, answer: Answer, parameters: Record) -> Record:
    """A line of FastChat's model_answer; `tokens` and `finish` are ours."""
    return {
        "question_id": question.id,
        "answer_id": uuid.uuid4().hex,
        "model_id": name,
        "choices": [{"index": 0, "turns": answer.turns}],
        "tstamp": time.time(),
        "generate_params": parameters,
        "tokens": answer.tokens,
        "finish": answer.finish,
    }


def report(questions: Sequence[Question], answered: dict[int | str, Record], path: str | None, about: Record) -> None:
    """A table of the answers, of each category and all; what was cut off is said in words too."""
    figures: dict[str, Any] = {}
    for category in [*dict.fromkeys(question.category for question in questions), "all"]:
        records = [answered[q.id] for q in questions if category in (q.category, "all")]
        finish = [reason for record in records for reason in record["finish"]]
        tokens = [count for record in records for count in record["tokens"]]
        texts = [text for record in records for text in record["choices"][0]["turns"]]
        figures[category] = {
            "questions": len(records),
            "answers": len(texts),
            "tokens": sum(tokens) / len(tokens),
            "characters": sum(map(len, texts)) / len(texts),
            **{reason: finish.count(reason) for reason in ("stop", *CUT)},
        }
    rows = [["category", *figures["all"]]]
    for category, row in figures.items():
        rows.append([category, *(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values())])
    show(table(rows))
    for reason, explanation in (("length", "--max-new-tokens"), ("context", "the end of the model's context")):
        if cut := figures["all"][reason]:
            note(f"{cut} of {figures['all']['answers']} answers were cut off at {explanation}")
    if path:
        write_json(Path(path), {**about, "categories": figures})
