"""A judge's ratings of answers, in FastChat's model_judgment format.

The judge is a model behind any OpenAI-compatible endpoint; its key is OPENAI_API_KEY of the environment and is written
nowhere. Judgments are written as they come to OUT/model_judgment/JUDGE_single.jsonl. What is judged there already,
the same answer with the same prompt by the same judge, is never asked again; a changed answer is. A judgment without
a rating is kept with the score -1, counted, and asked again only with --retry-unparsed; so is a reply without a text,
since it is paid for too, with its finish_reason. Of a judge that thinks aloud what follows the thought is its judgment.

Prompts come from the benchmark's judge_prompts.jsonl. The project has its own for LogicKor, in eval/judged/data, and
for the second turn of Japanese MT-Bench; --judge-prompts replaces both.
"""

import argparse
import json
import re
import sys
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elo.common.errors import UserError
from elo.common.fields import check_output, write_json
from elo.common.options import Parser, not_negative, not_negative_int, positive, positive_int
from elo.common.terminal import note, say, show
from eval.jsonl import JsonLines
from eval.judged.benchmarks import BENCHMARKS, question_id, read_questions
from eval.judged.endpoint import OPENAI, Endpoint, GaveUpError, StoppedError
from eval.judged.judge_prompts import UNPARSED, read_prompts
from eval.judged.matches import Match, plan, read_answers, read_references
from eval.tables import table

Record = dict[str, Any]
# As FastChat asks; LogicKor asks the same without max_tokens.
REQUEST = {"temperature": 0, "max_tokens": 2048}
ENOUGH_FAILURES = 3  # in a row, or as many as are asked at a time: then it is the endpoint


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--bench", required=True, choices=BENCHMARKS, help="which benchmark")
    parser.add_argument("--bench-dir", required=True, type=Path, metavar="DIR", help="has its question.jsonl")
    parser.add_argument("--judge-model", required=True, metavar="NAME", help="as the endpoint calls it")
    parser.add_argument("--base-url", default=OPENAI, metavar="URL", help="of the endpoint (%(default)s)")
    parser.add_argument("--answers", nargs="+", type=Path, metavar="FILE", help="(default: all in OUT/model_answer)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="gets model_judgment (default: --bench-dir)")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N questions of each category")
    parser.add_argument(
        "--judge-prompts", type=Path, metavar="FILE", help="(default: judge_prompts.jsonl in --bench-dir, if there)"
    )
    parser.add_argument(
        "--references", type=Path, metavar="FILE", help="answers to compare with (default: reference_answer.jsonl in "
        "--bench-dir, or reference_answer/JUDGE.jsonl, or the only file there)"
    )  # fmt: skip
    parser.add_argument("--retry-unparsed", action="store_true", help="ask again where no rating is")
    group = parser.add_argument_group("requests")
    group.add_argument("--concurrency", type=positive_int, default=8, metavar="N", help="at a time (%(default)s)")
    group.add_argument("--timeout", type=positive, default=300.0, metavar="S", help="of a request (%(default)g s)")
    group.add_argument("--retries", type=not_negative_int, default=8, metavar="N", help="of a request (%(default)s)")
    group.add_argument(
        "--retry-wait", type=not_negative, default=1.0, metavar="S", help="before the first retry (%(default)g s)"
    )
    fields = f"fields to add to {json.dumps(REQUEST)}, or with null to leave out"
    group.add_argument("--request", type=request_fields, default={}, metavar="JSON", help=fields)


def request_fields(text: str) -> Record:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.100} is not a JSON object")
    return value


def main(arguments: Namespace) -> None:
    benchmark = BENCHMARKS[arguments.bench]
    out = arguments.out or arguments.bench_dir
    questions = read_questions(benchmark, arguments.bench_dir, arguments.limit)
    answer_files = arguments.answers or sorted((out / "model_answer").glob("*.jsonl"))
    answers = read_answers(answer_files, questions)
    if not answers:
        raise UserError(f"{out / 'model_answer'}: no answers to judge (--answers, --out)")
    published = arguments.bench_dir / "judge_prompts.jsonl"
    prompts = read_prompts(benchmark, arguments.judge_prompts or (published if published.is_file() else None))
    references = read_references(benchmark, questions, arguments.references, arguments.bench_dir, arguments.judge_model)
    matches = plan(benchmark, questions, answers, prompts, references)

    # First of all what can be wrong with it, before the file is made.
    request, retries = REQUEST | arguments.request, (arguments.retries, arguments.retry_wait)
    endpoint = Endpoint(arguments.judge_model, arguments.base_url, request, arguments.timeout, *retries)
    judge = re.sub(r"[^\w.-]", "_", arguments.judge_model)
    file = out / "model_judgment" / f"{judge}_single.jsonl"
    check_output("--json", arguments.json, [file, *answer_files])
    with JsonLines(file) as results, closing(endpoint):
        judged = judgments_so_far(results, matches, arguments.judge_model)
        done = {match for match in judged if is_rated(judged[match]) or not arguments.retry_unparsed}
        asked = [match for match in matches if match not in done]
        say(f"{file}: {len(matches) - len(asked)} of {len(matches)} judgments are there")
        failure = run(asked, endpoint, arguments, results, judged)
    report(matches, judged, len(asked), arguments, file)
    if failure:
        raise UserError(failure)


# ---- judging


def judgments_so_far(results: JsonLines, matches: Sequence[Match], judge: str) -> dict[Match, Record]:
    """The judgments in the file of exactly what is to be judged.

    The last line of a model, question and turn is the one that counts, to `eval score` and to all who read the file.
    So if an answer has become again what it was before, its old judgment is written once more.
    """
    found: dict[tuple[str, int | str, str], list[Record]] = defaultdict(list)
    for line in results.lines:
        record = line.record
        judged_by = record.get("judge")
        if not isinstance(judged_by, list) or len(judged_by) != 2 or "score" not in record:
            raise UserError(f"{line.where}: not a judgment of a single answer in FastChat's format")
        if judged_by[0] == judge:
            found[(str(record.get("model")), question_id(line.fields), str(record.get("turn")))].append(record)
    judged = {}
    for match in matches:
        records = found[(match.model, match.question.id, str(match.turn))]
        same = [
            record
            for record in records
            if record["judge"][1] == match.prompt.name
            and record.get("user_prompt") == match.user_prompt
            and record.get("system_prompt", match.prompt.system) == match.prompt.system
        ]
        if same:
            judged[match] = same[-1]
            if same[-1] is not records[-1]:
                results.append(same[-1])
    return judged


def is_rated(record: Record) -> bool:
    return record["score"] not in (UNPARSED, None)


def run(
    matches: Sequence[Match],
    endpoint: Endpoint,
    arguments: Namespace,
    results: JsonLines,
    judged: dict[Match, Record],
) -> str | None:
    """Ask for all of them and write what comes; returns what to say if some could not be had."""

    def judge(match: Match) -> Record:
        judgment, finish = endpoint.ask(match.prompt.system, match.user_prompt)
        record = {
            "question_id": match.question.id,
            "model": match.model,
            "judge": [arguments.judge_model, match.prompt.name],
            "user_prompt": match.user_prompt,
            "judgment": judgment,
            "score": match.prompt.rating(judgment),
            "turn": match.turn,
            "tstamp": time.time(),
            "bench": arguments.bench,
            "category": match.question.category,
            "system_prompt": match.prompt.system,
            "finish_reason": finish,
        }
        results.append(record)  # by the thread that asked, before it asks for another
        return record

    failed: list[str] = []
    in_a_row = 0
    pool = ThreadPoolExecutor(arguments.concurrency)
    futures = {pool.submit(judge, match): match for match in matches}
    bar = tqdm(total=len(matches), unit="judgment", disable=not sys.stderr.isatty())
    try:
        for future in as_completed(futures):
            error = future.exception()
            in_a_row = in_a_row + 1 if error else 0
            bar.update()
            if in_a_row >= max(ENOUGH_FAILURES, arguments.concurrency) or isinstance(error, UserError):
                break
    except KeyboardInterrupt:
        failed.append("stopped by Ctrl-C")
    finally:
        # What has been asked is waited for and kept: it is paid for.
        endpoint.stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()
    had = 0
    for future, match in futures.items():
        if future.cancelled():
            continue
        error = future.exception()
        if error is None:
            judged[match] = future.result()
            had += 1
        elif isinstance(error, GaveUpError):
            failed.append(f"{match}: {error}")
        elif not isinstance(error, StoppedError):
            raise error
    if not failed:
        return None
    return f"{failed[0]}; {len(matches) - had} judgments are missing, the others are saved: the same command goes on"


def report(
    matches: Sequence[Match], judged: Mapping[Match, Record], asked: int, arguments: Namespace, file: Path
) -> None:
    unparsed = [match for match in matches if match in judged and not is_rated(judged[match])]
    answers, had, without = (Counter(match.model for match in some) for some in (matches, judged, unparsed))
    models = {name: {"answers": n, "judged": had[name], "unparsed": without[name]} for name, n in answers.items()}
    rows = [["model", "answers", "judged", "without a rating"]]
    show(table([*rows, *([name, *map(str, counts.values())] for name, counts in models.items())]))
    if unparsed:
        named = "; ".join(map(str, unparsed[:5])) + ("; ..." if len(unparsed) > 5 else "")
        reasons = Counter(judged[match].get("finish_reason", "stop") for match in unparsed)
        why = ", ".join(f"{count} ended with {reason}" for reason, count in reasons.items() if reason != "stop")
        again = f" ({why}; --retry-unparsed asks again, --request changes what is asked)" if why else ""
        note(f"{len(unparsed)} judgments have no rating and count for nothing: {named}{again}")
    if arguments.json:
        summary = {"bench": arguments.bench, "judge": arguments.judge_model, "file": str(file), "asked": asked}
        write_json(Path(arguments.json), {**summary, "models": models})
