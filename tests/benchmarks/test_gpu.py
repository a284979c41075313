"""`python -m benchmarks.gpu` answers every question on a CPU, or says what it needs; its rules decide as they say."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest
import torch
from commands import status_of
from forking import Fork

from benchmarks import gpu
from benchmarks.gpu import candidates, kernels, rules, steps
from benchmarks.gpu.measuring import attempt, split
from benchmarks.gpu.shapes import TINY


@pytest.fixture(autouse=True)
def as_before():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.use_deterministic_algorithms(False)


def here(answers, shape, folder, limit):
    """A question in this process."""
    name, function = answers.split(".")
    yield from getattr(getattr(gpu, name, None) or sys.modules[f"benchmarks.gpu.{name}"], function)(shape, folder)


def test_a_case_that_fails_is_the_commands_status(tmp_path, monkeypatch, capsys):
    answers = [{"case": "well", "product": "square", "tflops": 1.0}, {"case": "badly", "error": "it broke"}]
    monkeypatch.setattr(gpu, "ask", lambda *_: iter(answers))
    words = "gpu", "--only", "A", "--json", tmp_path / "gpu.json"
    assert status_of(monkeypatch, gpu.main, *words) == 2
    shown = capsys.readouterr()
    assert "| well | tflops 1.0000 |" in shown.out
    assert shown.err == "error: 1 of 2 cases failed, the others are answered: badly\n"
    monkeypatch.setattr(gpu, "ask", lambda *_: iter(answers[:1]))
    assert status_of(monkeypatch, gpu.main, *words[:3], "--json", tmp_path / "third.json") == 0


def test_every_question_is_answered(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "ask", here)
    monkeypatch.setattr(steps, "apart", lambda function, *arguments: function(*arguments))
    assert status_of(monkeypatch, gpu.main, "gpu", "--json", str(tmp_path / "gpu.json")) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    rows = {(row["question"], row["case"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"])
    assert "".join(dict.fromkeys(row["question"] for row in result["rows"])) == "ABCDEFG"  # "": a checkpoint
    away = {(row["question"], row["case"]): row["left_out"] for row in result["rows"] if "left_out" in row}
    assert [row for row in result["rows"] if "error" in row] == []
    assert {why.rsplit(" is not installed")[0] for why in away.values()} <= {
        "needs a GPU", "transformers", "liger_kernel", "cut_cross_entropy", "flash_attn_interface"
    }  # fmt: skip
    # What a CPU has is not left out.
    assert {question for question, _ in rows.keys() - away.keys()} == set("ABCEFG") | {""}
    for (question, case), row in rows.items():
        if question in "ABD" and (question, case) not in away:
            assert row["ms"] > 0
        if question == "B" and "ms" in row:
            assert row["equal_bits"]
            assert row["relative_error"] < (0.05 if "fp8" in case else 0.005)
        if "split" in row:
            assert sum(row["split"].values()) == pytest.approx(1)
            assert row["split"]["attention"] > 0
    for question in "EF":  # of one batch, whatever computes it
        losses = {row["loss"] for row in result["rows"] if row["question"] == question and "loss" in row}
        assert max(losses) == pytest.approx(min(losses), rel=1e-3)
    (resumed,) = (row for row in result["rows"] if row["question"] == "G")
    assert resumed["equal_bits"]
    assert len(resumed["losses"]) == 6
    assert len({*resumed["losses"], *resumed["weights"]}) == 7
    out = capsys.readouterr().out
    assert "\n| D | square | left out needs a GPU |\n" in out
    assert [decision["rule"] for decision in result["decisions"]] == [rule for rule, *_ in rules.RULES]
    assert "| two calls or a resumed run give unequal bits | all equal | all is well |" in out
    assert "| fp8 is above 1.5 times bf16 in the head | D has no answer | not decided |" in out


def test_what_fails_or_takes_too_long_is_one_line(tmp_path, monkeypatch):
    (row,) = gpu.ask("kernels.nothing", TINY, tmp_path, 600)
    assert row["error"] == "AttributeError: module 'benchmarks.gpu.kernels' has no attribute 'nothing'"
    begun = time.monotonic()
    (row,) = gpu.ask("kernels.losses", TINY, tmp_path, 0)
    assert row == {"case": "the rest", "error": "cut after 0 s; --minutes gives more"}
    assert time.monotonic() - begun < 60

    monkeypatch.setattr(gpu, "answer", lambda *arguments: os._exit(7))
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(gpu, "multiprocessing", SimpleNamespace(get_context=lambda name: fork))
    assert [row["error"] for row in gpu.ask("", TINY, tmp_path, 600)] == ["its process ended with status 7"]

    def fails():
        raise RuntimeError("a message\nof two lines")

    assert attempt("x", fails) == {"case": "x", "error": "RuntimeError: a message of two lines"}


# A question that starts a process of its own, as some do, and waits for it.
SLEEPS = """
import multiprocessing, subprocess, tempfile
from types import SimpleNamespace
from benchmarks import gpu

def in_bf16(shape, folder):
    (folder / "large").touch()
    process = subprocess.Popen(["sleep", "600"])
    yield {"case": str(process.pid)}
    process.wait()

tempfile.tempdir = "tmp"
gpu.importlib = SimpleNamespace(import_module=lambda name: SimpleNamespace(in_bf16=in_bf16))
fork = multiprocessing.get_context("fork")
gpu.multiprocessing = SimpleNamespace(get_context=lambda name: fork)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_benchmark_that_is_ended(tmp_path, number):
    (tmp_path / "tmp").mkdir()
    benchmark = Fork("benchmarks.gpu", ["--only", "A"], tmp_path, before=SLEEPS)
    out = benchmark.files["out"]
    while not (said := re.search(r"\| A \| (\d+) \|", out.read_text() if out.exists() else "")):
        assert benchmark.poll() is None, benchmark.said("err")
        time.sleep(0.01)
    assert [path.name for path in (tmp_path / "tmp").glob("*/*")] == ["large"]
    sleeping = psutil.Process(int(said[1]))
    benchmark.send_signal(number)
    assert benchmark.wait() == (128 + number if number == signal.SIGTERM else -number)
    deadline = time.monotonic() + 60
    with suppress(psutil.NoSuchProcess):
        while sleeping.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    if number == signal.SIGTERM:
        assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("compiled", [False, True])
def test_candidates_for_the_loss_are_the_loss(monkeypatch, compiled):
    torch.manual_seed(0)
    if compiled:  # as far as a CPU can say: one graph
        compile = lambda function, device: torch.compile(function, fullgraph=True, backend="eager")  # noqa: E731
        monkeypatch.setattr(candidates, "fast", compile)
    hidden, weight = torch.randn(48, 32).bfloat16(), torch.randn(96, 32).bfloat16()
    labels = torch.randint(96, (48,))
    exact = hidden.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(exact @ weight.double().T, labels, reduction="sum")
    truth.backward()
    for compute, error in (
        (candidates.row_blocks(weight, 16), 0.01),
        (candidates.column_tiles(weight, 32), 0.01),
        (candidates.fp8_head(weight, 16, 32), 0.06),
        (candidates.whole_logits(weight), 0.01),
    ):
        loss, gradient = compute(hidden, labels)
        assert loss.item() == pytest.approx(truth.item(), rel=error)
        assert (gradient - exact.grad).norm() < error * exact.grad.norm()
        assert gradient.dtype == torch.bfloat16


def test_work_of_attention():
    """By hand: 3 + 6 pairs of query and key for lengths 2 and 3, 4 heads, whether padded or packed."""
    for is_packed in (False, True):
        qkv = kernels.heads(TINY.config, [2, 3], torch.device("cpu"), is_packed)
        attend = lambda q, k, v: q * k.mean() * v.mean()  # noqa: E731
        row = kernels.measured_attention(lambda: attend, qkv, [2, 3], False)  # noqa: B023
        assert row["forward_tflops"] * row["forward_ms"] * 1e9 == pytest.approx(4 * 9 * 4 * TINY.config.head_dim)


def kernel(name, start, length):
    return {"name": name, "ts": start, "dur": length}


def test_split_of_a_step():
    shares = split(
        [
            kernel("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", 10.0, 20.0),
            kernel("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT", 0.0, 8.0),
            kernel("Memcpy DtoD (Device -> Device)", 4.0, 5.0),  # 4 of its 5 are the product's
            kernel("triton_red_fused__to_copy_flash_mm_0", 30.0, 10.0),
            kernel("void at::native::chunk_cat_cuda_kernel<float, c10::BFloat16>", 42.0, 8.0),
            kernel("ncclDevKernel_AllGather", 43.0, 2.0),  # all of it beside the one before
        ]
    )
    assert shares == {"other": 0.2, "attention": 0.4, "products": 0.16, "copies": 0.18, "idle": 0.06}


def answers(**changed):
    """Rows after which every rule says that nothing is to be done, but for what is changed."""
    given = {"present_ms": 60.0, "other_ms": 56.0, "error": 0.002, "equal": True, "resumed": True, "flash": 210.0}
    given |= {"fp8": 1000.0, "idle": 0.01, "copies": 0.03} | changed
    rows = [
        {"question": "A", "case": "logits", "product": "logits", "tflops": 700.0},
        {"question": "A", "case": "square", "product": "square", "tflops": 100.0},
        {"question": "D", "case": "square", "product": "square", "tflops": 900.0},  # the head has no such product
        {"question": "D", "case": "logits, fast sums", "product": "logits", "tflops": given["fp8"]},
        {"question": "C", "case": "flash, not deterministic", "backward_tflops": 100.0},
        {"question": "C", "case": "flash, deterministic", "backward_tflops": given["flash"]},
        {"question": "E", "case": "transformers", "split": {"idle": 0.5, "copies": 0.5}},
        {"question": "E", "case": "ELO, 4 x 4", "split": {"idle": given["idle"], "copies": given["copies"]}},
        {"question": "G", "case": "train.py", "equal_bits": given["resumed"]},
    ]
    for tokens, times in ((8192, 0.5), (16384, 1.0)):
        common = {"question": "B", "tokens": tokens, "equal_bits": given["equal"], "relative_error": 0.002}
        rows += [
            {**common, "case": "present", "form": "present form", "ms": given["present_ms"] * times},
            {**common, "case": "rows", "form": "rows", "ms": given["other_ms"] * times, "equal_bits": True}
            | {"relative_error": given["error"]},
            {**common, "case": "unequal", "form": "unequal", "ms": 1.0, "equal_bits": False},
            {**common, "case": "whole", "form": "torch, whole logits", "ms": 1.0, "equal_bits": True},
        ]
    return rows


@pytest.mark.parametrize(
    ("changed", "decision"),
    [
        ({"equal": False}, "equal tiles before anything else"),
        ({"resumed": False}, "equal tiles before anything else"),
        ({"other_ms": 54.9}, "adopt it"),
        ({"flash": 199.0}, "offer FA3"),
        ({"fp8": 1051.0}, "offer the fp8 head"),
        ({"idle": 0.016}, "find what the GPU waits for"),
        ({"copies": 0.041}, "give --gather-once"),
        ({"other_ms": 20.0, "error": 0.01}, None),
        ({}, None),
    ],
)
def test_rules(changed, decision):
    usual = {"all is well", "leave the loss as it is", "leave attention as it is", "keep the head in bf16"}
    usual |= {"nothing to gain"}
    found = {row["decision"] for row in rules.decide(answers(**changed))}
    assert found - usual == ({decision} if decision else set())


def test_rules_without_answers():
    assert {row["decision"] for row in rules.decide([])} == {"not decided"}
    assert "off by" not in str(rules.decide(answers()))
    fp8 = {"question": "B", "case": "", "form": "row blocks, fp8", "relative_error": 0.0123}
    assert rules.decide([*answers(), fp8])[3]["found"] == (
        "logits, fast sums: 1.43 times; the head's gradient is off by 1.2%"
    )
    unequal = [row for row in answers(equal=False) if row["question"] == "B"]
    assert rules.decide(unequal)[0]["decision"] == "equal tiles before anything else"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "A,H"], "argument --only: 'A,H' is not some of A, B, C, D, E, F, G"),
        (["--json", "absent/gpu.json"], "--json absent/gpu.json: its directory does not exist"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, options, message):
    assert status_of(monkeypatch, gpu.main, "gpu", *options) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
