"""The memory that the planner foresees, against that of real steps."""

from dataclasses import replace

import families
import pytest
import torch
from planner import SEQ_LEN, family

from benchmarks import planning_checks, planning_paper
from elo.methods import METHODS, make
from elo.model.decoder import sliding_window_mask
from elo.model.rotary import rotary_table
from elo.planning import plan as planning
from elo.planning.costs import count_flops, parameters
from elo.planning.memory import Setup, attention_work, block_activations, moments, planned_memory
from elo.runs.sharding import use_faster_operators
from elo.variants.active_vocabulary import narrow as narrow_head


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


@pytest.mark.parametrize(("shard", "micro_batches"), [(1, 2), (2, 2), (2, 1)])
def test_what_the_host_holds(shard, micro_batches):
    """With --cpu-offload: weights, gradients and AdamW's two moments, all in fp32."""
    model = make(family("llama3"), "full").model
    planned = planned_memory(model, Setup(64, 32, micro_batches=micro_batches, shard=shard, cpu_offload=True))
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


def test_the_largest_model_of_each_way():
    """Whoever cannot train all of a model can still train its first and last layer."""
    sizes = [planning_paper.largest("A100-40GB", 1, way, 2048).split(",")[0] for way in ("elo", "lora", "full")]
    assert sizes == ["70B", "8B", "1B"]
