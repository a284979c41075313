"""`python -m elo.planning`: hours, tables, what would fit; mistakes."""

import json
import re
from argparse import Namespace
from types import SimpleNamespace

import pytest
from planner import run, write_config

import train
from elo.methods import METHODS
from elo.model.config import ModelConfig
from elo.pretraining import PackedBatches


def test_hours(tmp_path, monkeypatch, capsys):
    """Table 1 of the paper: ELO on 2.5 * 10^9 tokens took 1.5 hours of 8 H100, with the utilization it implies."""
    result = tmp_path / "plan.json"
    options = ["--gb", "9", "--bytes-per-token", "3.6", "--utilization", "0.283", "--json", str(result)]
    status, out, _ = run(monkeypatch, capsys, *write_config(tmp_path), "--method", "elo", *options)
    assert status == 0
    (plan,) = json.loads(result.read_text())["plans"]
    assert plan["hours"] == pytest.approx(1.5, rel=0.03)
    by_hand = 2.5e9 * plan["flops"]["total"] / (8 * 989e12 * 0.283) / 3600
    others = (plan["step"]["copies"] + plan["step"]["optimizer"]) * 2.5e9 / 524288 / 3600
    assert plan["hours"] == pytest.approx(by_hand + others, rel=1e-9)
    assert f"{plan['hours']:.2f} for 2.50 * 10^9 tokens" in out
    assert plan["trained"] == 2 * 218_112_000


@pytest.mark.parametrize(
    ("tokens", "seq_len", "micro_batch"), [(12_500_000, 1024, 5), (1e9, 3000, 4), (1e9, 2048, 3), (5_000, 4096, 4)]
)
def test_a_step_is_that_of_training(tokens, seq_len, micro_batch, tmp_path, monkeypatch, capsys):
    """As many windows as `train.py` takes for so much text, in as many micro-batches of one size."""
    options = ["--tokens", str(tokens), "--seq-len", str(seq_len), "--micro-batch", str(micro_batch)]
    status, out, _ = run(monkeypatch, capsys, *write_config(tmp_path), "--method", "elo", *options)
    windows = range(int(tokens) // seq_len)
    text = type("Text", (), {"tokens": tokens, "seq_len": seq_len, "__len__": lambda self: len(windows)})()
    batches = PackedBatches(text, None, micro_batch, SimpleNamespace(size=8, rank=0))
    times = -(-batches.windows_per_step // 8 // batches.rows) if batches.windows_per_step > 8 else 1
    told = (
        f"a step      {batches.windows_per_step} windows of {seq_len} tokens, in a GPU {times} times {batches.rows}\n"
    )
    assert status == 0 and told in out


def test_a_model_of_one_layer(tmp_path, monkeypatch, capsys):
    """It has no layers 1,-1, but trains as a whole."""
    options = write_config(tmp_path)
    fields = {**json.loads((tmp_path / "config.json").read_text()), "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert run(monkeypatch, capsys, *options, "--stage", "align")[0] == 0
    chosen = train.choose_method(Namespace(method="full", layers=None, bridge=False), ModelConfig.load(tmp_path), None)
    assert len(chosen.model.model.layers) == 1


def test_windows_that_are_empty_cost_time(tmp_path, monkeypatch, capsys):
    hours = []
    for gpus in ("64", "96"):  # of 64 windows a step
        result = tmp_path / "plan.json"
        options = ["--gpus", gpus, "--seq-len", "8192", "--method", "elo", "--json", str(result)]
        assert run(monkeypatch, capsys, *write_config(tmp_path), *options)[0] == 0
        hours.append(json.loads(result.read_text())["plans"][0]["hours"])
    assert hours[0] == pytest.approx(hours[1], rel=0.02)


def test_table_of_all_stages(tmp_path, monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, *write_config(tmp_path, "Llama-3-70B"), "--tokens", "1e9")
    assert status == 0
    lines = {line[:27].strip(): line[27:] for line in out.splitlines()[2:]}
    assert list(lines) == [*(f"train.py --method {method}" for method in METHODS), "align.py", "sft.py"]
    assert "does not fit" not in lines["train.py --method elo"]
    assert "does not fit; would with: --activation-checkpointing" in lines["train.py --method lora"]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("Llama-3.1-8B", "--stage align --gpu A100-40GB"),
        ("Llama-3.1-8B", "--method full --gpu A100-40GB --seq-len 4096 --batch-tokens 131072"),
        ("Llama-3.1-8B", "--stage sft --gpu RTX-4090"),
        ("Llama-3.1-8B", "--method full --gpus 16 --shard 4"),
        ("Llama-3-70B", "--method lora"),
        ("Llama-3-70B", "--stage align"),
        ("Llama-3-70B", "--stage align --gpus 64 --gather-once"),
    ],
)
def test_what_a_refusal_names_would_fit(model, options, tmp_path, monkeypatch, capsys):
    base = [*write_config(tmp_path, model), *options.split()]
    status, out, error = run(monkeypatch, capsys, *base)
    assert (status, out) == (2, "")
    (line,) = error.splitlines()
    for way in line.split("it would fit with ")[1].split(", or "):
        words = re.sub(r"\(.*?\)|--clip 0", "", way).split()
        changed = list(base)
        if "GPUs" in words:
            words = ["--gpus", *words[:1], *words[2:]]
        while "no" in words:
            place = words.index("no")
            option = words[place + 1]
            del words[place : place + 2]
            place = changed.index(option)
            del changed[place : place + (2 if option == "--shard" else 1)]
        for name, value in (("--micro-batch", "4"), ("--micro-batch-tokens", "8192")):
            assert name not in words or int(words[words.index(name) + 1]) < int(value)
        assert run(monkeypatch, capsys, *changed, *words)[0] == 0, way


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model nowhere", "--model nowhere: not found"),
        ("--stage align --method lora", "--method lora is an option of train.py"),
        ("--stage sft --layers 1,2", "--layers 1,2: only train.py --method elo"),
        ("--layers 1,99", "--layers 1,99: there is no layer 99"),
        ("--stage align --bridge", "--bridge goes with train.py --method elo"),
        ("--method full --bridge", "--bridge goes with train.py --method elo"),
        ("--stage sft --active-vocabulary 9", "--active-vocabulary goes with train.py --method elo"),
        ("--active-vocabulary 999999", "--active-vocabulary 999999: the model's vocabulary has 128256"),
        ("--validation", "--validation changes a plan with --active-vocabulary only"),
        ("--gpus 8 --shard 3", "--shard 3 does not divide the 8 GPUs"),
        ("--gb 9", "--gb needs --bytes-per-token"),
        ("--bytes-per-token 3", "--bytes-per-token goes with --gb"),
        ("--gb 9 --bytes-per-token 3 --tokens 5", "--tokens and --gb say the same"),
        ("--dtype fp32", "--dtype fp32: the GPUs' peaks are known here for bf16"),
        ("--gpu-memory 64", "--gpu-memory: with --gpu KIND, or the nearest to a kind that is not in its list"),
        ("--gpu-network 5", "--gpu-network: with --gpu KIND"),
        ("--utilization 0", "--utilization: '0' is not a number above 0 and at most 1"),
        ("--method full --lora-rank 4", "--lora-rank goes with train.py --method lora"),
        ("--batch-tokens 524288 --seq-len 3000", "--batch-tokens 524288 is not a multiple of --seq-len 3000"),
        ("--stage sft --micro-batch 2", "--micro-batch is no option of sft.py"),
        ("--stage sft --batch-tokens 65536", "--batch-tokens is no option of sft.py"),
        ("--method lora --micro-batch-tokens 65536", "--micro-batch-tokens is no option of train.py"),
        ("--stage align --batch-conversations 2", "--batch-conversations is no option of align.py"),
        ("--seq-len 262144", "--seq-len 262144: the model has 131072 positions"),
        ("--json nowhere/plan.json", "--json nowhere/plan.json: its directory does not exist"),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    base = [] if "--model" in options else write_config(tmp_path)
    status, out, error = run(monkeypatch, capsys, *base, *options.split())
    assert (status, out) == (2, "")
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
