"""The files of the choice benchmarks: as their publishers and Hugging Face have them, and damaged."""

import csv
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from choice_runs import make_root, run

from elo.common.errors import UserError
from eval import tasks as benchmarks
from examples import questions

# The columns of SKT-LSL/KoBEST_datarepo's files, those that are not used among them.
UPSTREAM = {
    "boolq": ("BoolQ", ["ID", "Text", "Question", "Answer"]),
    "copa": ("COPA", ["ID", "sentence", "question", "1", "2", "Answer"]),
    "wic": ("WiC", ["ID", "Target", "SENTENCE1", "Dictionary 1", "Link 1", "SENTENCE2", "Link2", "ANSWER"]),
    "hellaswag": ("HellaSwag", ["ID", "context", "choice1", "choice2", "choice3", "choice4", "label"]),
    "sentineg": ("SentiNeg", ["ID", "Label_origin", "Text_origin", "Label", "Text", "Category_neg"]),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("choice"))


def write_tsv(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([columns, *rows])


def as_upstream(name, record, number):
    """A row of the upstream TSV file."""
    match name:
        case "boolq":
            return [number, record["paragraph"], record["question"], str(bool(record["label"]))]
        case "copa":
            return [number, *list(record.values())[:-1], record["label"] + 1]
        case "wic":
            word, first, second, label = record.values()
            return [number, word, first, 1, "link", second, "link", str(bool(label))]
        case "hellaswag":
            return [number, *record.values()]
        case "sentineg":
            return [number, 1 - record["label"], "다른 문장", record["label"], record["sentence"], 1]


def test_kobest_as_upstream_tsv(root, tmp_path, capsys):
    for name, split, records in questions.kobest_rows():
        folder, columns = UPSTREAM[name]
        rows = [as_upstream(name, record, number) for number, record in enumerate(records)]
        incomplete = ["", *rows[0][1:]]
        write_tsv(tmp_path / "kobest" / folder / f"{split}.tsv", columns, [rows[0], incomplete, *rows[1:]])
    for task in benchmarks.load()[0].values():
        if task.name.startswith("kobest"):
            assert task.questions(tmp_path, shots=2) == task.questions(root / "data", shots=2)
    assert "boolq/test.tsv:3: passed over, since a cell is empty".lower() in capsys.readouterr().err.lower()


@pytest.mark.parametrize("layout", ["test-{}-of-00002.parquet", "test/{}.parquet"])
def test_parquet_as_on_hugging_face(root, tmp_path, layout):
    """cais/mmlu and skt/kobest_v1; files in shards."""

    def write(folder, split, records):
        for shard, part in enumerate((records[:2], records[2:])):
            path = folder / layout.replace("test", split).format(f"{shard:05}")
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(part, pyarrow.Table.from_pylist(records).schema), path
            )

    for subject, split, rows in questions.mmlu_rows():
        records = [
            {"question": question, "subject": subject, "choices": choices, "answer": "ABCD".index(answer)}
            for question, *choices, answer in rows
        ]
        write(tmp_path / "mmlu" / subject, split, records)
    for name, split, records in questions.kobest_rows():
        write(tmp_path / "kobest" / name, split, records)
    for task in benchmarks.load()[0].values():
        if task.found(root / "data") and task.name != "marc_ja":
            assert task.questions(tmp_path, shots=2) == task.questions(root / "data", shots=2)
    if "-of-" in layout:
        (tmp_path / "kobest/wic/test-00000-of-00002.parquet").unlink()
        with pytest.raises(UserError, match="test-00001-of-00002.parquet: 1 shards of test are there, not as many"):
            benchmarks.load()[0]["kobest_wic"].questions(tmp_path)


def test_labels_that_count_from_1_are_numbers_too(root, tmp_path):
    """The upstream names in JSON lines or Parquet, where a label is no text."""
    task = benchmarks.load()[0]["kobest_copa"]
    for name, split, records in questions.kobest_rows():
        if name == "copa":
            columns = UPSTREAM[name][1]
            lines = [dict(zip(columns, as_upstream(name, record, 0), strict=True)) for record in records]
            questions.write_lines(tmp_path / f"kobest/COPA/{split}.jsonl", lines)
    assert task.questions(tmp_path) == task.questions(root / "data")
    assert {question.gold for question in task.questions(tmp_path)} == {0, 1}
    questions.write_lines(tmp_path / "kobest/COPA/test.jsonl", [lines[0] | {"Answer": 0}])
    with pytest.raises(UserError, match="the label 'Answer' is 0; it should be one of 1, 2$"):
        task.questions(tmp_path)


def replace(path, old, new):
    def change(data):
        text = (data / path).read_text()
        assert old in text
        (data / path).write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replace("kobest/boolq/test.jsonl", '"paragraph"', '"passage"'),
            "boolq/test.jsonl:1: no column 'paragraph' or 'Text'; it has 'passage', 'question', 'label'",
        ),
        (
            replace("kobest/boolq/test.jsonl", '"label": 0', '"label": 2'),
            "boolq/test.jsonl:2: the label 'label' is 2; it should be one of False, True (or 0 to 1)",
        ),
        (replace("kobest/copa/test.jsonl", "결과", "끝"), "copa/test.jsonl:1: 'question' must be 원인 (cause) or 결과"),
        (replace("kobest/copa/test.jsonl", "강물이 불어났다.", ""), "copa/test.jsonl:1: a choice is empty"),
        (replace("kobest/wic/test.jsonl", '{"word"', '{"word'), "wic/test.jsonl:1: not a line of JSON"),
        (replace("kobest/wic/test.jsonl", '"배"', "7"), "wic/test.jsonl:1: 'word' must be text, not 7"),
        (
            replace("marc_ja/valid-v1.0.json", "positive", "neutral"),
            "valid-v1.0.json:1: the label 'label' is 'neutral'; it should be one of positive, negative",
        ),
        (
            replace("mmlu/test/virology_test.csv", ",C\n", ",E\n"),
            "virology_test.csv:1: the label 'answer' is 'E'; it should be one of A, B, C, D",
        ),
        (replace("mmlu/dev/virology_dev.csv", ",a few", ""), "virology_dev.csv:1: 5 columns instead of 6 (question, A"),
        (
            lambda data: (data / "kobest/wic/test.jsonl").rename(data / "kobest/wic/test.tsv").write_text("a\tb\ta\n"),
            "wic/test.tsv:1: two columns are named 'a'",
        ),
        (lambda data: (data / "mmlu/test/virology_test.csv").write_text(""), "virology_test.csv: it has no records"),
        (lambda data: (data / "mmlu/dev/virology_dev.csv").unlink(), "virology_dev.*: not found; mmlu_virology needs"),
        (lambda data: (data / "kobest/wic/test.tsv").write_text("ID\n1\n"), "wic/test.jsonl and"),
        (lambda data: (data / "kobest/wic/test.jsonl").write_bytes(b'{"word": "\xff"}'), "wic/test.jsonl:1: not UTF-8"),
        (
            lambda data: (data / "kobest/wic/test.jsonl").rename(data / "kobest/wic/test.parquet"),
            "wic/test.parquet: damaged or incomplete",
        ),
        (lambda data: shutil.rmtree(data / "kobest"), "no file of kobest, such as "),
    ],
)
def test_bad_data_is_one_line(root, tmp_path, change, message, monkeypatch, capfd):
    data = shutil.copytree(root / "data", tmp_path / "data")
    change(data)
    assert run(monkeypatch, root, "--data", data, "--tasks", "mmlu_virology,kobest,marc_ja") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
