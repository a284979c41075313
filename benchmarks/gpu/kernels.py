"""A: the best matrix products. B: head and cross-entropy with a frozen head. C: attention. D: products in fp8."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from benchmarks.gpu import candidates
from benchmarks.gpu.candidates import Attend, Loss, by_autograd, scaled_mm, to_fp8
from benchmarks.gpu.measuring import Row, attempt, call_seconds, need_gpu, relative_error, seconds
from benchmarks.gpu.rules import FLASH, FP8, PRESENT, WHOLE
from benchmarks.gpu.shapes import Shape
from benchmarks.training_step.machine import Memory
from elo.model.config import ModelConfig
from elo.model.decoder import CausalLM, build
from elo.runs.devices import inference_device, set_for_training
from elo.runs.processes import World, process_group
from elo.runs.sharding import ParallelOptions, parallelize

CALLS = 5
CHECKED = 512  # tokens whose gradient is compared with that in fp32
CONVERSATIONS = 16


def products(shape: Shape, folder: Path, fp8: bool) -> Iterator[Row]:
    device = inference_device()
    set_for_training(device)
    tokens, width, vocabulary = shape.loss_tokens[1], shape.config.hidden_size, shape.config.vocab_size

    def measure(rows: int, inner: int, columns: int, fast_sums: bool) -> Row:
        a, b = (torch.randn(count, inner, device=device, dtype=torch.bfloat16) for count in (rows, columns))
        product = partial(torch.matmul, a, b.T)
        if fp8:
            need_gpu(device)
            product = partial(scaled_mm, *to_fp8(a), *to_fp8(b), fast_sums)
        spent = seconds(product, device)
        return {"ms": spent * 1e3, "tflops": 2 * rows * inner * columns / spent / 1e12}

    for name, sizes in {
        "square": (shape.square,) * 3,
        "logits": (tokens, width, vocabulary),
        "logits of a block": (shape.rows, width, vocabulary),
        "logits of a tile": (tokens, width, shape.columns),
        "gradient of a block": (shape.rows, vocabulary, width),
        "gradient of a tile": (tokens, shape.columns, width),
    }.items():
        for fast_sums in (True, False) if fp8 else (False,):
            case = f"{name}, fast sums" if fast_sums else name
            yield {**attempt(case, partial(measure, *sizes, fast_sums)), "product": name}


in_bf16, in_fp8 = partial(products, fp8=False), partial(products, fp8=True)


# ---- the loss


class Given(nn.Module):
    """In a decoder's place: the hidden states are its input."""

    def forward(self, hidden: Tensor, cache: None) -> Tensor:
        return hidden


def head(shape: Shape, world: World) -> CausalLM:
    """This project's head and loss as training has them, without blocks."""
    model = build(shape.config).requires_grad_(False)
    model.model.layers = nn.ModuleList()
    parallelize(model, world, ParallelOptions("bf16", compile=world.device.type == "cuda"))
    model.model = Given()
    nn.init.normal_(model.lm_head.weight, 0, 0.02)
    return model


def losses(shape: Shape, folder: Path) -> Iterator[Row]:
    torch.manual_seed(0)
    with process_group() as world:
        model = head(shape, world)
        weight = model.lm_head.weight.detach()
        forms: dict[str, Callable[[], Loss]] = {
            PRESENT: lambda: by_autograd(lambda hidden, labels: model(hidden[None], labels[None], len(labels))),
            "column tiles, equal": lambda: candidates.column_tiles(weight, shape.columns),
            "row blocks, exp2 unnormalized": lambda: candidates.row_blocks(weight, shape.rows),
            FP8: lambda: candidates.fp8_head(weight, shape.rows, shape.columns),
            "Liger": lambda: candidates.liger(weight),
            "Apple's cut cross-entropy": lambda: candidates.apple(weight),
            WHOLE: lambda: candidates.whole_logits(weight),
        }
        for tokens in shape.loss_tokens:
            hidden = torch.randn(tokens, weight.shape[1], device=world.device).bfloat16()
            labels = torch.randint(len(weight), (tokens,), device=world.device)
            truth = gradient_in_fp32(hidden[:CHECKED], weight.float(), labels[:CHECKED])
            for name, make in forms.items():
                row = attempt(f"{name}, {tokens} tokens", partial(measured_loss, make, hidden, labels, truth))
                yield {**row, "form": name, "tokens": tokens}


def gradient_in_fp32(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch.softmax(hidden.float() @ weight.T, 1) @ weight - weight[labels]


def measured_loss(make: Callable[[], Loss], hidden: Tensor, labels: Tensor, truth: Tensor) -> Row:
    compute, calls, kept, equal = make(), [], [], True
    for _ in range(CALLS):  # the first one compiles
        calls.append(1e3 * call_seconds(lambda: kept.append(compute(hidden, labels)), hidden.device))
        equal &= all(map(torch.equal, kept[0], kept[-1]))
        del kept[1:]
    row = {"calls_ms": calls, "equal_bits": equal, "relative_error": relative_error(kept.pop()[1][: len(truth)], truth)}
    memory = Memory(hidden.device)
    row["ms"] = 1e3 * seconds(lambda: compute(hidden, labels), hidden.device)
    return row | {"memory_gb": memory.peak() / 1e9}


# ---- attention


def attention(shape: Shape, folder: Path) -> Iterator[Row]:
    torch.manual_seed(0)
    device, config, length = inference_device(), shape.config, shape.seq_len
    set_for_training(device)
    equal = [length] * shape.windows
    choice = random.Random(0)
    lengths = [choice.randrange(length // 16, length + 1) for _ in range(CONVERSATIONS)]

    def cudnn() -> Attend:
        need_gpu(device)
        return candidates.fused(SDPBackend.CUDNN_ATTENTION)

    for name, make, of, is_deterministic in (
        (FLASH, candidates.fused, equal, True),
        ("flash, not deterministic", candidates.fused, equal, False),
        ("cuDNN, not deterministic", cudnn, equal, False),
        ("FlexAttention, deterministic", lambda: candidates.flex(length, device), equal, True),
        ("conversations, padded", candidates.fused, lengths, True),
        ("conversations, packed", lambda: candidates.packed(lengths, device), lengths, True),
        ("FA3, deterministic", candidates.flash_3, equal, True),
        ("FA3, not deterministic", candidates.flash_3, equal, False),
    ):
        qkv = heads(config, of, device, is_packed="packed" in name)
        yield attempt(name, partial(measured_attention, make, qkv, of, is_deterministic))


def heads(config: ModelConfig, lengths: list[int], device: torch.device, is_packed: bool) -> list[Tensor]:
    """Queries, keys and values: (batch, heads, sequence, head_dim), or packed (tokens, heads, head_dim)."""
    counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    padded, together = (len(lengths), max(lengths)), (sum(lengths),)
    sizes = [(*together, n) if is_packed else (padded[0], n, padded[1]) for n in counts]
    make = partial(torch.randn, device=device, dtype=torch.bfloat16, requires_grad=True)
    return [make(*size, config.head_dim) for size in sizes]


def measured_attention(
    make: Callable[[], Attend], qkv: list[Tensor], lengths: list[int], is_deterministic: bool
) -> Row:
    """A query and a key that it sees take two products of head_dim in a head, and five in the backward pass."""
    attend, device, gradient = make(), qkv[0].device, torch.randn_like(qkv[0])

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*qkv), qkv, gradient)

    torch.use_deterministic_algorithms(is_deterministic)  # else as `set_for_training` has it
    equal = all(map(torch.equal, both(), both()))
    forward = seconds(lambda: attend(*qkv), device)
    backward = seconds(both, device) - forward
    width = qkv[0].shape[-1] * qkv[0].shape[-3 if qkv[0].ndim == 4 else -2]  # of all heads together
    flops = 4 * width * sum(length * (length + 1) // 2 for length in lengths)
    row = {"equal_bits": equal, "forward_ms": forward * 1e3, "backward_ms": backward * 1e3}
    return row | {"forward_tflops": flops / forward / 1e12, "backward_tflops": 2.5 * flops / backward / 1e12}
