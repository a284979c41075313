"""`elo.planning` says beforehand what a run takes; here it is held against runs."""

import json
import re
from dataclasses import replace
from statistics import fmean

import families
import flops
import pytest
import torch
from planner import run, write_config
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import planning_checks, planning_paper
from elo.common.errors import UserError
from elo.cpu import linear
from elo.methods import METHODS, make
from elo.model.config import ModelConfig
from elo.model.decoder import sliding_window_mask
from elo.model.rotary import rotary_table
from elo.planning import plan as planning
from elo.planning.costs import count_flops, parameters
from elo.planning.memory import Setup, attention_work, block_activations, moments, planned_memory
from elo.runs.sharding import use_faster_operators
from elo.variants.active_vocabulary import narrow as narrow_head
from elo.variants.lora import LoraOptions

SEQ_LEN = 32


def family(variant, **changes):
    architecture, config = families.VARIANTS[variant]()
    return ModelConfig.from_json({**config.to_dict(), "architectures": [architecture.__name__], **changes})


# ---- FLOPs, against torch's count of real steps


def counted(model):
    """torch's FLOPs of a step, a token: (attention, everything else)."""
    model.to_empty(device="cpu").tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(0, 300, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False, custom_mapping=flops.FORMULAS) as counter:
        model(tokens, tokens).backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "dot_product" in str(op))
    return attention / tokens.numel(), (sum(counts.values()) - attention) / tokens.numel()


@pytest.mark.parametrize("method", [*METHODS, "bridged"])
@pytest.mark.parametrize("variant", families.VARIANTS)
def test_flops(variant, method):
    config = family(variant)
    model = make(config, "elo", bridged=True).model if method == "bridged" else make(config, method).model
    planned = count_flops(model, SEQ_LEN)
    attention, rest = counted(model)
    assert planned.total - planned.attention == pytest.approx(rest, rel=1e-9)
    # torch counts the whole square of tokens, also where only the past is computed: (n + 1) / 2 of its n columns.
    # Where a window cuts there is a mask, and the whole is computed.
    shares = [1 if block.sliding_window else (SEQ_LEN + 1) / (2 * SEQ_LEN) for block in model.model.layers]
    assert planned.attention == pytest.approx(attention * fmean(shares), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_flops_of_activation_checkpointing(method, monkeypatch):
    # F.linear, as on a GPU: the product of our own function for CPUs is recomputed although nothing needs it.
    monkeypatch.setattr(linear, "ONEDNN", False)
    model = make(family("llama3"), method, (2, 4)).model  # nothing is recomputed below what is trained
    planned = count_flops(model, SEQ_LEN, activation_checkpointing=True)
    for block in model.model.layers:
        block.activation_checkpointing = True
    attention, rest = counted(model)
    assert planned.total - planned.attention == pytest.approx(rest, rel=1e-9)
    assert planned.attention == pytest.approx(attention * (SEQ_LEN + 1) / (2 * SEQ_LEN), rel=1e-9)
    assert planned.recomputed > 0


def test_flops_of_options():
    config = family("llama3")
    layer_and_head = [
        count_flops(make(config, "elo", layers).model, SEQ_LEN).total for layers in ((1,), (1, 4), (1, 2, 4))
    ]
    assert layer_and_head[2] - layer_and_head[1] == layer_and_head[1] - layer_and_head[0] > 0
    thick = make(config, "lora", options=LoraOptions(lora_rank=20)).model
    planned = count_flops(thick, SEQ_LEN).total
    attention, rest = counted(thick)
    assert planned == pytest.approx(rest + attention * (SEQ_LEN + 1) / (2 * SEQ_LEN))


# ---- parameters


@pytest.mark.parametrize("model", planning_paper.PUBLIC)
def test_parameters_are_those_published(model):
    assert parameters(make(planning_paper.config(model), "full").model) == planning_paper.PUBLIC[model][1]


def test_parameters_of_methods():
    config = planning_paper.config("Llama-3.1-8B")
    layer, vocabulary = 218_112_000, 128256 * 4096
    elo = make(config, "elo", (1, 16, 32)).model
    assert parameters(elo, trained=True) == 3 * layer
    assert parameters(elo) == 3 * layer + 2 * vocabulary + 4096
    lora = make(config, "lora", options=LoraOptions(lora_rank=16)).model
    widths = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)  # q, o; k, v; gate, up, down
    assert parameters(lora, trained=True) == 32 * 16 * widths


# ---- memory, against that of real steps


@pytest.mark.parametrize(
    ("method", "setup"),
    [
        ("elo", Setup(1024, 512, dtype="fp32", device="cpu")),
        ("full", Setup(512, 512, dtype="fp32", device="cpu", activation_checkpointing=True)),
        ("selective", Setup(512, 512, dtype="fp32", device="cpu")),
        ("full", Setup(512, 512, dtype="fp32", device="cpu", micro_batches=2, gather_once=True)),
        ("elo", Setup(1024, 1024, dtype="fp32", device="cpu")),
    ],
)
def test_peak_memory(method, setup):
    """Some of the cases of docs/planning.md, with a smaller model."""
    fields = planning_paper.PUBLIC["Llama-3.1-8B"][0]
    small = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 4}
    fields = {**fields, **small, "vocab_size": 16384, "num_key_value_heads": 2}
    planned = planning_checks.planned(fields, method, setup).total
    assert planned == pytest.approx(planning_checks.measure(fields, method, setup), rel=0.1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", [*families.ONE_EACH, "qwen2", "qwen3"])
def test_activations_are_what_autograd_keeps(variant, method, dtype):
    """Of the last block; of method selective of one that is frozen, which passes gradients on."""
    config, dtype_ = family(variant), planning.DTYPES[dtype]
    model, cpu = make(config, method).model, torch.device("cpu")
    block = model.model.layers[1 if method == "selective" else -1]
    planned = block_activations(block, Setup(2 * SEQ_LEN, SEQ_LEN, dtype=dtype, device="cpu"))
    use_faster_operators(model.to(dtype_).to_empty(device=cpu))
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage, storage.nbytes()
        return tensor

    table = rotary_table(config.rope, config.head_dim, SEQ_LEN, cpu, dtype_)
    window = block.sliding_window
    mask = sliding_window_mask(SEQ_LEN, window, cpu, dtype_) if window else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = torch.zeros(2, SEQ_LEN, config.hidden_size, dtype=table[0].dtype, requires_grad=True)
        result = block(x, *table, mask)
    assert result.requires_grad
    found = sum(size for _, size in kept.values()) - sum(tensor.nbytes for tensor in table)
    found -= mask.nbytes if window else 0
    assert planned == found


def test_a_mask_is_kept_once_and_no_scores_are():
    """Grouped queries with a window, as CUDA gets them: nothing as large as the scores of all heads is kept."""
    config = family("mistral-v0.1", max_position_embeddings=512)
    model = make(config, "full").model.to_empty(device="cpu")
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(1, 512, dtype=torch.long))
    mask = 512 * 512 * 4
    assert [size for _, size in kept.values() if size >= mask] == [mask]


@pytest.mark.parametrize(
    ("windows", "seq_len", "multiprocessors", "sums"),
    [(4, 4096, 132, 2), (1, 4096, 132, 5), (1, 4096, 108, 4), (8, 4096, 132, 1), (1, 1000, 132, 5)],
)
def test_sums_of_the_deterministic_attention(windows, seq_len, multiprocessors, sums):
    """As mha_bwd of FlashAttention-2 allocates them: 0.5 GB at 16,384 tokens of 32 heads of 128."""
    model = make(planning_paper.config("Llama-3.1-8B"), "full").model
    setup = Setup(windows * seq_len, seq_len, multiprocessors=multiprocessors)
    rows, each = windows * -(-seq_len // 128) * 128, 2 * windows * seq_len * 128
    gradients = each * (4 * 32 + 2 * 8)  # of the result, queries, keys and values for 32 heads; of the latter for 8
    assert attention_work(model.model.layers[0], setup) == gradients + 4 * rows * 32 * (sums * 128 + 1)


def test_few_heads_on_one_window_make_attention_the_highest_moment():
    """6 heads of 8 on 4,096 tokens: 22 sums of 32 columns each in fp32. A kernel that takes a mask needs one."""
    flash, masked = (
        make(family(name, max_position_embeddings=4096), "full").model for name in ("llama3", "mistral-v0.1")
    )
    setup = Setup(4096, 4096)
    planned = planned_memory(flash, setup)
    assert planned.moment == "attention in the backward pass of block 4"
    assert planned.total > 22 * 32 * 6 * 4096 * 4
    saved = attention_work(flash.model.layers[0], setup) - attention_work(masked.model.layers[0], setup)
    assert saved == 21 * 32 * 6 * 4096 * 4
    assert planned_memory(flash, replace(setup, device="cpu")).moment != planned.moment


@pytest.mark.parametrize("shard", [1, 2])
def test_what_the_host_holds(shard):
    """With --cpu-offload: weights, gradients and AdamW's two moments, all in fp32."""
    model = make(family("llama3"), "full").model
    planned = planned_memory(model, Setup(64, 32, micro_batches=2, shard=shard, cpu_offload=True))
    held = 4 * 4 * sum(parameter.numel() for parameter in model.parameters())
    assert planned.host == pytest.approx(held / shard, rel=0.01)
    assert planned.optimizer == 0


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_is_gathered_once(micro_batches):
    """All weights, in the dtype of computation, and with several micro-batches whole gradients in fp32."""
    model = make(family("llama3"), "full").model
    setup = Setup(64, 32, micro_batches=micro_batches, shard=8, gather_once=True)
    at_the_loss = next(moments(model, setup))
    assert at_the_loss.gathered == 2 * parameters(model)
    assert at_the_loss.gradients == 4 * parameters(model) * (micro_batches > 1)


@pytest.mark.parametrize("offload", [False, True])
def test_a_bridge_is_whole_in_every_process(offload):
    """A square matrix and a vector, in the dtype of computation, whatever else is sharded or on the host."""
    config, setup = family("llama3"), Setup(64, 32, shard=4, cpu_offload=offload)
    plain, bridged = (planned_memory(make(config, "elo", bridged=on).model, setup) for on in (False, True))
    assert bridged.total - plain.total == 2 * (config.hidden_size**2 + config.hidden_size)
    assert (bridged.weights > plain.weights) and bridged.host == plain.host


@pytest.mark.parametrize("variant", ["llama3", "llama3.2-tied"])
def test_an_active_vocabulary(variant):
    """A head of its own, also where the whole one is the embedding; for held-out text the whole one stays beside it."""
    config, rows, setup = family(variant), 60, Setup(64, 32)
    plain, narrow, kept = (make(config, "elo").model for _ in range(3))
    narrow_head(narrow, rows)
    narrow_head(kept, rows, keep=True)
    head = 2 * config.hidden_size * config.vocab_size  # bytes in bf16
    of_rows = 2 * config.hidden_size * rows
    is_tied = config.tie_word_embeddings
    whole, part, both = (planned_memory(model, setup).weights for model in (plain, narrow, kept))
    assert part - whole == of_rows - (0 if is_tied else head)
    assert both - part == (0 if is_tied else head)
    assert count_flops(narrow, SEQ_LEN) == count_flops(kept, SEQ_LEN)
    assert count_flops(narrow, SEQ_LEN).head == count_flops(plain, SEQ_LEN).head * rows / config.vocab_size


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_gradients_outside_of_blocks_are_in_fp32(dtype, size):
    """Whatever the dtype of computation, and as much again where they are reduced."""
    model = make(family("llama3"), "full").model
    embedding, head = model.model.embed_tokens.weight.numel(), model.lm_head.weight.numel()
    setup = Setup(64, 32, dtype=dtype, optimizer_in_backward=True)  # so that no shards of gradients are kept
    by_name = {moment.moment: moment for moment in moments(model, setup)}
    hidden = 64 * model.config.hidden_size * size
    assert by_name["gradient of the head"].loss == 2 * hidden + 4 * head
    of_embedding = by_name["gradient of the embedding"]
    assert of_embedding.gradients == 4 * (embedding + parameters(model.model.layers[0]))  # these are being reduced
    assert of_embedding.loss == 4 * head
    both = by_name["reduction of the gradients of embedding and head"]
    assert both.gradients == 2 * 4 * (embedding + head + model.config.hidden_size)


def test_a_module_that_is_not_known_is_refused():
    model = make(family("llama3"), "full").model
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    with pytest.raises(UserError, match="layer's mlp.act_fn: a GELU is not known to the planner"):
        count_flops(model, SEQ_LEN)
    model = make(family("llama3"), "full").model
    model.model.embed_norm = torch.nn.Identity()
    with pytest.raises(UserError, match="model.embed_norm: a Identity is not known to the planner"):
        count_flops(model, SEQ_LEN)
    model = make(family("llama3"), "full").model
    model.model.layers[2].mlp.down_proj = torch.nn.Linear(112, 48, bias=True, device="meta")
    with pytest.raises(UserError, match="layers of different sizes are not known"):
        count_flops(model, SEQ_LEN)


# ---- the command


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
        ("--utilization 0", "--utilization 0: such a run never ends"),
        ("--seq-len 3000", "--batch-tokens 524288 is not a multiple of --seq-len 3000"),
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
