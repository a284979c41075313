"""`eval judge` with the answers of one model to MT-Bench's questions."""

import pytest
from bench_files import read_jsonl, write_answers, write_bench
from commands import status_of
from judge_server import SECRET

from eval import __main__ as evaluation


@pytest.fixture
def bench(tmp_path):
    directory = write_bench(tmp_path / "mt_bench", "mt_bench")
    write_answers(directory, "mt_bench")
    return directory


@pytest.fixture
def judge(bench, monkeypatch, capfd):
    """Runs the command; returns its exit status, its stderr and the judgments in its file."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)

    def run(url, *words, name="mt_bench", directory=bench, read=True):
        start = ["eval", "judge", "--bench", name, "--bench-dir", directory, "--judge-model", "gpt-4"]
        options = [*start, "--base-url", url, "--retry-wait", "0.01", "--concurrency", "1", *words]
        status = status_of(monkeypatch, evaluation.main, *options)
        shown = capfd.readouterr()
        path = directory / "model_judgment" / "gpt-4_single.jsonl"
        written = path.read_text(encoding="utf-8") if path.exists() else ""
        assert SECRET not in shown.out + shown.err + written
        return status, shown.err, read_jsonl(path) if written and read else []

    return run
