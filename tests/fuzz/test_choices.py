"""Hostile files of benchmarks of choices, and hostile samples of a run that goes on."""

import pytest
from artifacts import parquet
from harness import case_directory, cases, make_what_is_no_file, result_or_user_error
from hypothesis import given
from hypothesis import strategies as st
from mutations import changed_bytes, changed_lines

from eval import tasks
from eval.jsonl import JsonLines
from eval.likelihood.samples import FIRST, scores_so_far, to_record
from examples import questions

KOBEST = {name: records for name, split, records in questions.kobest_rows() if split == "test"}
MMLU = next(rows for _, split, rows in questions.mmlu_rows() if split == "test")
SUBJECT = next(subject for subject, _, _ in questions.mmlu_rows())


def in_columns(records):
    return {name: [record[name] for record in records] for name in records[0]}


def separated(rows, mark):
    return "".join(mark.join(map(str, row)) + "\n" for row in rows).encode()


@st.composite
def choice_files(draw):
    """A task, its file's name, and a content."""
    task = draw(st.sampled_from([*KOBEST, "marc_ja", "mmlu"]))
    if task == "mmlu":
        if draw(st.booleans()):
            return f"mmlu_{SUBJECT}", f"mmlu/test/{SUBJECT}_test.csv", draw(changed_bytes(separated(MMLU, ",")))
        columns = {"question": ["1?"] * 3, "choices": [list("abcd")] * 3, "answer": [0, 1, 3]}
        name = f"mmlu/{SUBJECT}/test-00000-of-00001.parquet"
        return f"mmlu_{SUBJECT}", name, draw(changed_bytes(parquet(columns)))
    if task == "marc_ja":
        records = [{"sentence": text, "label": label} for text, label in questions.MARC_JA]
        return task, "marc_ja/valid-v1.0.json", draw(changed_lines(records))
    match draw(st.sampled_from(["jsonl", "jsonl", "tsv", "parquet"])):
        case "jsonl":
            return f"kobest_{task}", f"kobest/{task}/test.jsonl", draw(changed_lines(KOBEST[task]))
        case "tsv":
            rows = [list(KOBEST[task][0]), *(list(record.values()) for record in KOBEST[task])]
            return f"kobest_{task}", f"kobest/{task}/test.tsv", draw(changed_bytes(separated(rows, "\t")))
    return f"kobest_{task}", f"kobest/{task}/test.parquet", draw(changed_bytes(parquet(in_columns(KOBEST[task]))))


def read_task(directory, task):
    found = tasks.load()[0][task].questions(directory, shots=0)
    for question in found:
        assert 0 <= question.gold < len(question.choices)
        "".join([question.context, *question.choices]).encode()
    return found


@cases(80, share=1.5)
@given(choice_files())
def test_choices(case):
    task, name, content = case
    with case_directory() as directory:
        (directory / name).parent.mkdir(parents=True)
        (directory / name).write_bytes(content)
        result_or_user_error(lambda: read_task(directory, task))


@pytest.mark.parametrize("name", ["test.jsonl", "test.tsv", "test.csv", "test.parquet", "test.json"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "link to /dev/zero", "a line of 300 MB", "2 GB of nothing"])
def test_what_is_no_file_of_choices(name, kind):
    with case_directory() as directory:
        path = directory / "kobest/copa" / name
        path.parent.mkdir(parents=True)
        make_what_is_no_file(path, kind)
        result_or_user_error(lambda: read_task(directory, "kobest_copa"))


def test_parquet_bomb():
    import pyarrow

    column = pyarrow.DictionaryArray.from_arrays([0] * 40, ["x" * (20 << 20)])
    with case_directory() as directory:
        path = directory / "marc_ja/valid-v1.0.parquet"
        path.parent.mkdir()
        columns = {"sentence": column, "label": ["positive"] * 40}
        path.write_bytes(parquet(columns, compression="zstd", store_schema=False))
        result_or_user_error(lambda: read_task(directory, "marc_ja"))


QUESTION = {"kobest_copa": [tasks.Question("context", ["a", "b"], 0)] * 2}


@cases(40, share=0.7)
@given(st.data())
def test_samples(data):
    with case_directory() as directory:
        path = directory / "samples.jsonl"
        (name, asked), *_ = QUESTION.items()
        lines = [to_record("model", name, index, asked[index], [-1.5, -2.0]) for index in (0, 1)]
        path.write_bytes(data.draw(changed_lines(lines)))

        def read():
            with JsonLines(path, FIRST) as results:
                return scores_so_far(results, "model", QUESTION)

        found = result_or_user_error(read, writes=directory)
        for values in (found or {}).values():
            assert [type(value) for value in values] == [float, float]
