"""MMLU, KoBEST and MARC-ja: which choice does the model find likeliest? Scores are those of lm-eval 0.4.13.

Tasks are mmlu, mmlu_stem (humanities, social_sciences, other), mmlu_SUBJECT, kobest, kobest_boolq (copa, wic,
hellaswag, sentineg) and marc_ja. Their files, as published or as the Parquet files of cais/mmlu and skt/kobest_v1:

    mmlu/{dev,test}/SUBJECT_{dev,test}.csv          or mmlu/SUBJECT/{dev,test}-00000-of-00001.parquet
    kobest/{boolq,copa,wic,hellaswag,sentineg}/{train,test}.{jsonl,tsv,parquet}
    marc_ja/{train,valid}-v1.0.json

With --samples a run that was stopped goes on where it was. Under torchrun the questions are divided over the processes.
The same command gives the same figures either way; with another --limit or --batch-tokens they agree within rounding.
"""

import math
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from elo.common.errors import UserError
from elo.common.fields import write_json
from elo.common.options import Parser, not_negative_int, positive_int
from elo.common.terminal import note, show
from elo.model.checkpoint import load_model
from elo.model.packed import pack_weights
from elo.runs.devices import DTYPES
from elo.runs.processes import World, process_group
from elo.text.tokenizer import Tokenizer, load_tokenizer
from elo.variants.adapted import open_checkpoint
from eval import tasks as benchmarks
from eval.jsonl import JsonLines, digest
from eval.likelihood.loglikelihood import Batch, Scorer, encode, make_batches
from eval.likelihood.metrics import METRICS, figures, weighted
from eval.likelihood.samples import FIRST, Scores, scores_so_far, to_record
from eval.tables import table
from eval.tasks import Group, Question, Task


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint")
    parser.add_argument("--tasks", required=True, metavar="NAME,...", help="such as mmlu,kobest_copa,marc_ja")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="the benchmarks' files")
    parser.add_argument(
        "--shots", type=not_negative_int, metavar="N", help="examples before a question (mmlu 5, kobest 0, marc_ja 3)"
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first questions of each task")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="write each question's result here as it comes")
    parser.add_argument(
        "--batch-tokens", type=positive_int, default=8192, metavar="N", help="in a batch, for memory (%(default)s)"
    )


def main(arguments: Namespace) -> None:
    if arguments.samples and arguments.samples.is_dir():
        raise UserError(f"--samples {arguments.samples}: this is a directory; give a file")
    tasks, groups = select(arguments.tasks, arguments.data)
    questions = {task.name: task.questions(arguments.data, arguments.shots, arguments.limit) for task in tasks}
    checkpoint = open_checkpoint(arguments.model)
    tokenizer = load_tokenizer(checkpoint.directory, checkpoint.config.vocab_size)
    made_with = digest(checkpoint.fingerprint(), tokenizer.fingerprint, arguments.dtype, arguments.batch_tokens)
    with process_group() as world, samples_of(arguments, world) as samples:
        done = world.from_rank_0(scores_so_far(samples, made_with, questions) if samples else {})
        scorer = Scorer(pack_weights(load_model(checkpoint, world.device, DTYPES[arguments.dtype])))
        total = sum(map(len, questions.values()))
        with tqdm(total=total, initial=len(done), unit="question", disable=world.rank > 0) as bar:
            for task in tasks:
                bar.set_description(task.name)
                asked, finished = questions[task.name], {index for name, index in done if name == task.name}
                batches = prepare(task, asked, finished, tokenizer, scorer, arguments.batch_tokens)
                for found in score(batches, scorer, task, asked, world):
                    # Of a batch that was cut short in the middle of writing some are there.
                    new = {index: values for index, values in found.items() if index not in finished}
                    done |= {(task.name, index): values for index, values in new.items()}
                    if samples:
                        samples.append(*(to_record(made_with, task.name, n, asked[n], new[n]) for n in new))
                    bar.update(len(new))
        if world.rank == 0:
            results = summarize(tasks, groups, questions, done)
            report(results, {entry.name: entry.metrics for entry in (*tasks, *groups)})
            if arguments.json:
                write_json(Path(arguments.json), {"results": results})


def samples_of(arguments: Namespace, world: World) -> AbstractContextManager[JsonLines | None]:
    """The file of --samples, which rank 0 has; None without it."""
    has_it = arguments.samples and world.rank == 0
    return JsonLines(arguments.samples, FIRST) if has_it else nullcontext()


def select(names: str, data: Path) -> tuple[list[Task], list[Group]]:
    """The tasks that a comma-separated list names, and the groups to report.

    A group is of those of its tasks whose files are there; which are not is said on stderr.
    """
    tasks, groups = benchmarks.load()
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in chosen if name not in tasks and name not in groups]
    if unknown or not chosen:
        known = [*groups, *(name for name in tasks if not name.startswith("mmlu_"))]
        problem = f"there is no {unknown[0]!r}" if unknown else "no task is named"
        raise UserError(f"--tasks: {problem}; there are {', '.join(known)}, and mmlu_SUBJECT for each subject")
    if not data.is_dir():
        raise UserError(f"--data {data}: no such directory")
    selected: dict[str, Task] = {}
    for name in chosen:
        members = [tasks[name]] if name in tasks else [tasks[member] for member in groups[name].tasks]
        found = members if name in tasks else [task for task in members if task.found(data)]
        if not found:
            raise UserError(f"--data {data}: no file of {name}, such as {data / members[0].test[0]}.*")
        if missing := [task.name for task in members if task not in found]:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            note(f"{name}: {len(found)} of {len(members)} tasks; no files of {shown}")
        selected |= {task.name: task for task in found}
    asked = [set(groups[name].tasks) for name in chosen if name in groups]
    inside = [group for group in groups.values() if any(members.issuperset(group.tasks) for members in asked)]
    return list(selected.values()), [group for group in inside if selected.keys() & set(group.tasks)]


def prepare(
    task: Task, questions: Sequence[Question], finished: set[int], tokenizer: Tokenizer, scorer: Scorer, tokens: int
) -> list[Batch]:
    """The batches that have a question which is not finished."""
    if len(finished) == len(questions):
        return []
    texts = [(question.context, [task.delimiter + choice for choice in question.choices]) for question in questions]
    try:
        encoded = encode(tokenizer, texts, scorer.model.config.max_position_embeddings)
    except UserError as error:
        raise UserError(f"{task.name}, {error}") from None
    rope = scorer.model.config.rope
    if rope.varies:  # a row's beginning, which it may share with others, is turned before its length is known
        longest = max(len(continuation.ids) - 1 for question in encoded for continuation in question)
        if longest > rope.original_max_position_embeddings:
            raise UserError(
                f"{task.name}: rotary embeddings of type {rope.type} are implemented here up to the original length of "
                f"{rope.original_max_position_embeddings} tokens, and a question has {longest}; give fewer --shots"
            )
    batches = make_batches(encoded, tokens)
    return [batch for batch in batches if any(row.question not in finished for row in batch.rows)]


def score(
    batches: Sequence[Batch], scorer: Scorer, task: Task, questions: Sequence[Question], world: World
) -> Iterator[dict[int, list[float]]]:
    """Questions' indices and their choices' log-likelihoods, as soon as all of them are there."""
    parts: dict[int, dict[int, float]] = defaultdict(dict)
    for start in range(0, len(batches), world.size):
        mine = batches[start + world.rank : start + world.rank + 1]
        scored = world.gather([result for batch in mine for result in scorer.score(batch)])
        found = {}
        for index, choice, value in chain.from_iterable(scored):
            if not math.isfinite(value):
                raise UserError(f"{task.name}, question {index}: the model's logits are not finite numbers")
            parts[index][choice] = value
            if len(parts[index]) == len(questions[index].choices):
                found[index] = [value for _, value in sorted(parts.pop(index).items())]
        yield found


def summarize(
    tasks: Sequence[Task], groups: Sequence[Group], questions: dict[str, list[Question]], done: Scores
) -> dict[str, dict[str, float]]:
    """The figures of every task, then of every group, whose figures are of the tasks for which a metric counts."""
    results: dict[str, dict[str, float]] = {}
    for task in tasks:
        asked = questions[task.name]
        results[task.name] = figures(asked, [done[task.name, index] for index in range(len(asked))])
    for group in groups:
        inside = [task for task in tasks if task.name in group.tasks]
        counted = {
            metric: [results[task.name] for task in inside if metric in task.metrics] for metric in group.metrics
        }
        results[group.name] = {
            **{metric: weighted(of_tasks, metric) for metric, of_tasks in counted.items() if of_tasks},
            "n": sum(results[task.name]["n"] for task in inside),
        }
    return results


def report(results: dict[str, dict[str, float]], metrics: dict[str, tuple[str, ...]]) -> None:
    """The table of what counts."""
    rows = [["task", "n", *METRICS]]
    for name, found in results.items():
        cells = (f"{found[metric]:.4f}" if metric in metrics[name] and metric in found else "" for metric in METRICS)
        rows.append([name, str(found["n"]), *cells])
    show(table(rows))
