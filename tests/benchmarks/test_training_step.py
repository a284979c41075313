"""`python -m benchmarks.training_step` compares like with like, and its report is right. How fast, no test can say."""

import json
import signal

import families
import pytest
import torch
from commands import status_of
from small_tokenizer import write_tokenizer

from benchmarks import training_step as speed
from benchmarks.sides import apart
from benchmarks.training_step import machine, report, steps, tokenization
from benchmarks.training_step.machine import Memory, Stopwatch
from elo.common.errors import UserError
from elo.model.checkpoint import Checkpoint
from elo.runs.processes import process_group
from elo.variants.lora import LoraOptions


@pytest.fixture
def base(tmp_path):
    families.VARIANTS["small"] = lambda: families.llama(vocab_size=450, tie_word_embeddings=True)
    families.write("small", tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    lines = [json.dumps({"text": f"{number} 둘째로 더 많은 글이 필요하다. " * 9}) for number in range(40)]
    (tmp_path / "ko.jsonl").write_text("\n".join(lines) + "\n")
    return Checkpoint(tmp_path / "base")


def case(base, method, implementation, **fields):
    settings = {"dtype": "fp32", "layers": (1, 4), "batch": 2, "seq_len": 16, "seconds": 1e-6}
    settings |= {"model": str(base.directory), "method": method, "implementation": implementation}
    settings |= {"adapters": LoraOptions(4, 12.0)}
    return steps.Case(**settings | fields)


def trained(model):
    names = (
        (name.removeprefix("base_model.model.").replace(".default", ""), p) for name, p in model.named_parameters()
    )
    return {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in names if p.requires_grad}


@torch.no_grad()
def start_equal(ours, theirs):
    """The same adapters, and a B that is not zero, so that both matrices learn."""
    for name, value in trained(theirs).items():
        if "lora_" in name:
            value.normal_(0, 0.1)
            ours.get_parameter(name).to_local().copy_(value)


@pytest.mark.parametrize(("method", "other"), speed.OTHERS.items())
def test_both_sides_take_the_same_steps(base, tmp_path, method, other):
    with process_group() as world:
        watch = Stopwatch(world.device)
        ours, theirs = (
            case(base, method, name, data=(str(tmp_path / "ko.jsonl"),), cache=str(tmp_path / "cache"), micro_batches=2)
            for name in ("elo", other)
        )
        batches = steps.TimedBatches(steps.open_windows(ours, base), ours.batch, world, watch, ours.micro_batches)
        model, step = steps.elo_step(ours, base, batches, world, watch)
        their_model, their_step = steps.transformers_step(theirs, base, batches, world, watch)
        start_equal(model, their_model)
        before = {name: value.clone() for name, value in trained(model).items()}
        for number in range(3):
            assert step(number) == pytest.approx(their_step(number), rel=1e-5)
        mine, others = trained(model), trained(their_model)
        assert mine.keys() == others.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-6, msg=name)
            assert not torch.equal(value, before[name])
        assert set(watch.seconds) == {"data", "forward", "optimizer"}


def test_where_transformers_has_fp32_masters(base):
    for implementation, dtype in (("transformers", torch.bfloat16), ("autocast", torch.float32)):
        model = steps.transformers_model(case(base, "full", implementation, dtype="bf16"), base, on_meta=True)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def run(monkeypatch, *options):
    return status_of(monkeypatch, speed.main, "training_step", *map(str, options))


def here(function, argument):
    if function is steps.matmul_peaks:
        return {"fp32": {"flops_per_second": 2e9, "product": "some"}}
    return function(argument)


def test_report(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenization, "EACH", 2000)
    monkeypatch.setattr(speed, "apart", here)  # in this process: the imports take the time of this test
    monkeypatch.setattr(Memory, "peak", lambda _: 12345)  # of this process, in which other tests leave and free memory
    options = ["--batch", 2, "--seq-len", 16, "--rounds", 1, "--seconds", 0.001, "--dtype", "fp32"]
    options += ["--methods", "elo,full,lora", "--figure3", "--tokenization", "--data", tmp_path / "ko.jsonl"]
    files = ["--json", tmp_path / "speed.json", "--plot", tmp_path / "speed.png"]
    assert run(monkeypatch, "--model", base.directory, *options, *files) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    rows = result["rows"]
    assert [(row["method"], row["implementation"]) for row in rows] == [
        pair for method, other in speed.OTHERS.items() for pair in ((method, "elo"), (method, other))
    ]
    for row in rows:
        assert row["dtype"] == "fp32"
        assert row["slowest"] == row["tokens_per_second"] == row["fastest"] > 0
        assert row["memory_bytes"] == 12345
        assert sum(row["parts"].values()) == pytest.approx(1)
        assert all(share > 0 for share in row["parts"].values())
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):  # one batch, two implementations
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    ratio = rows[0]["memory_bytes"] / rows[1]["memory_bytes"]
    assert result["ratios"]["memory_bytes fp32 elo elo/transformers"] == ratio
    peak = result["matmul_peak"]["fp32"]["flops_per_second"]
    assert rows[0]["peak_share"] == rows[0]["tokens_per_second"] * rows[0]["flops_per_token"] / peak
    tokens = result["tokenization"][0]
    assert tokens["bytes"] == sum(
        len(json.loads(line)["text"].encode()) for line in (tmp_path / "ko.jsonl").read_text().splitlines()
    )
    bars = {bar["bar"]: bar for bar in result["bars"]}
    bar = bars["fp32 elo/full: tokens/s, by count of FLOPs"]
    assert bar["least"] == rows[2]["flops_per_token"] / rows[0]["flops_per_token"]
    assert bar["passes"] == (bar["figure"] >= bar["least"])
    assert len(bars) == 9 + (tokens["processes"] > 1)
    assert result["figure3"]["bytes_per_token"] == result["bytes_per_token"] > 1
    shown = capsys.readouterr().out
    assert "falls short" in shown
    assert "full/elo, paper" in shown
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_measurements_are_processes_of_their_own(base):
    measured = apart(steps.measure, case(base, "elo", "transformers"))
    assert measured["steps"] == 1
    assert measured["seconds"] > 0
    assert measured["loss"] == pytest.approx(apart(steps.measure, case(base, "elo", "elo"))["loss"], rel=1e-5)
    with pytest.raises(UserError, match="absent: no such directory"):
        apart(steps.measure, case(base, "elo", "elo", model="absent"))
    with pytest.raises(UserError, match="a measuring process was killed; is there enough memory"):
        apart(signal.raise_signal, signal.SIGKILL)


def rows_of(**tokens_per_second):
    return [
        {"method": method, "implementation": "elo", "dtype": "bf16", "tokens_per_second": rate, "memory_bytes": 1}
        for method, rate in tokens_per_second.items()
    ]


def test_hours_of_figure_3():
    figure = report.figure3(rows_of(elo=1000.0, full=200.0, lora=250.0), "bf16", bytes_per_token=4.0)
    gb = 1e9 / 4 / 3600  # hours of a gigabyte at one token a second
    assert figure["gigabytes"] == [10, 50, 100, 150, 200]
    assert figure["hours"]["full"] == pytest.approx([gb / 200 * size for size in figure["gigabytes"]])
    assert figure["hours"]["elo"] == pytest.approx([gb / 1000 * (size - 1) + gb / 200 for size in figure["gigabytes"]])
    assert figure["faster_than"]["lora"][1] == pytest.approx((50 / 250) / (49 / 1000 + 1 / 200))
    assert figure["paper"]["elo"][0] == 3.5
    assert figure["paper"]["full"][0] == pytest.approx(19.8)
    assert figure["paper"]["lora"][:3] == [None, pytest.approx(99 / 6.04 * 5.29), None]


def test_bars():
    ours = {"implementation": "elo", "dtype": "fp32", "parts": {"data": 0.02}, "peak_share": 0.9}
    elo = {"method": "elo", "tokens_per_second": 100.0, "memory_bytes": 4, "flops_per_token": 10.0, **ours}
    full = {"method": "full", "tokens_per_second": 20.0, "memory_bytes": 12, "flops_per_token": 49.0, **ours}
    theirs = {**elo, "implementation": "transformers", "tokens_per_second": 60.0, "memory_bytes": 8}
    found = report.bars([elo, theirs, full], [{"file": "ko", "ratio": 0.95, "processes": 2, "scaling": 1.5}])
    assert [(round(bar["figure"], 3), bar["passes"]) for bar in found] == [
        (1.667, False),  # 100 / 60 of the 2.0 over transformers
        (0.5, True),
        (5.0, True),  # of 4.9 by count
        (0.333, True),
        (0.9, True),
        (0.02, False),
        (0.95, True),
        (0.75, False),
    ]


def test_memory_is_what_was_added_at_the_highest_point():
    size = 200 * 2**20
    memory = Memory(torch.device("cpu"))
    kept = torch.ones(size // 4)
    memory.restart()
    torch.ones(size // 4).sum()
    assert memory.peak() == pytest.approx(2 * size, rel=0.05)
    memory.restart()
    assert memory.peak() == pytest.approx(kept.nbytes, rel=0.05)


def test_peak_of_matrix_products(monkeypatch):
    monkeypatch.setattr(machine, "SHAPES", ((64, 64, 64), (128, 256, 128)))
    peak = machine.matmul_peak("fp32", torch.device("cpu"), seconds=1e-6)
    assert peak["flops_per_second"] > 1e6
    assert peak["product"].split()[0] in ("torch", "oneDNN")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "elo,fft"], "error: --methods elo,fft: 'fft' is none of elo, full, lora"),
        (["--figure3"], "error: --figure3 needs texts: give --data"),
        (["--figure3", "--data", "x"], "error: --figure3 needs every method: give --methods elo,full,lora"),
        (["--seq-len", "129"], "error: --seq-len 129: the model has 128 positions"),
        (["--plot", "x.gif"], "error: --plot x.gif: a figure's name ends in .png, .pdf, .svg"),
        (["--data", "absent.txt", "--seq-len", "16"], "error: absent.txt: no such file or directory"),
        (["--data", "KO", "--seq-len", "16", "--batch", "4096"], "error: --data: its 3190 tokens are no batch of"),
    ],
)
def test_mistakes_are_one_line(base, tmp_path, monkeypatch, capsys, options, message):
    options = [str(tmp_path / "ko.jsonl") if option == "KO" else option for option in options]
    assert run(monkeypatch, "--model", base.directory, "--rounds", 1, *options) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1
