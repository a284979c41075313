"""The LoRA baseline (arXiv 2106.09685): two thin trained matrices beside each frozen weight W.

    y = W x + alpha / rank * B A x      A: (rank, in), B: (out, rank), B = 0 at first

Names, initialization and files are those of peft, so adapters work in both.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elo.common.errors import UserError
from elo.common.fields import write_json
from elo.common.options import Options, Parser, option, positive, positive_int
from elo.cpu.linear import matmul_t
from elo.model.checkpoint import Checkpoint, local_rows
from elo.model.decoder import CausalLM
from elo.model.saving import ADAPTER_CONFIG, ADAPTER_WEIGHTS, new_files, save_file, whole, writes

PREFIX = "base_model.model."  # what peft puts in front of a checkpoint's names
THIN = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class LoraOptions(Options):
    """peft's r, lora_alpha and target_modules."""

    TITLE = "LoRA (--method lora)"
    lora_rank: int = option("of the adapters (default: 8)", 8, type=positive_int)
    lora_alpha: float = option("adapters count alpha / rank times (default: 16)", 16.0, type=positive)
    lora_target_modules: tuple[str, ...] = option(
        "layers with an adapter, such as q_proj v_proj (default: all linear layers of the blocks)",
        (), nargs="+", metavar="NAME",
    )  # fmt: skip
    merge: bool = option(
        "write the whole model to --out, the adapter in its folder `adapter`; of a finished run too", False
    )

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """None stands for an option that is not given."""
        super().add_arguments(parser, **{one.name: None for one in fields(cls)})

    @classmethod
    def from_arguments(cls, arguments: Namespace) -> "LoraOptions | None":
        """None for another method. Puts the defaults into `arguments`, so that the run's records have them.

        Raises UserError for options of LoRA with another method.
        """
        given = {one.name: value for one in fields(cls) if (value := getattr(arguments, one.name)) is not None}
        if arguments.method != "lora":
            for name in given:
                raise UserError(f"--{name.replace('_', '-')} is an option of --method lora, not {arguments.method}")
            return None
        options = cls(**{**given, "lora_target_modules": tuple(given.get("lora_target_modules", ()))})
        vars(arguments).update(asdict(options))
        return options


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + scaling * x A^T B^T, without a gradient of W.

    x: (tokens, in); weight: (out, in); a: (rank, in); b: (out, rank). The scaling goes into b. Thin products are
    added in place or taken with the thin side as rows: on a CPU up to 8 times faster than otherwise.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float):  # noqa: ANN001, ANN205
        thin = matmul_t(x, a)  # (tokens, rank)
        ctx.save_for_backward(x, weight, a, b, thin)
        ctx.scaling = scaling
        return matmul_t(x, weight, bias).addmm_(thin, (b * scaling).T)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205
        x, weight, a, b, thin = ctx.saved_tensors
        thin_grad = matmul_t(grad, (b * ctx.scaling).T)  # (tokens, rank)
        x_grad = matmul_t(grad, weight.T).addmm_(thin_grad, a) if ctx.needs_input_grad[0] else None
        a_grad = matmul_t(thin_grad.T, x.T)
        b_grad = matmul_t(thin.T, grad.T).T * ctx.scaling
        return x_grad, None, None, a_grad, b_grad, None


class LoraLinear(nn.Linear):
    """A frozen linear layer with its adapter; the names of both are peft's."""

    def __init__(self, linear: nn.Linear, options: LoraOptions) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(linear.in_features, options.lora_rank, bias=False, device=linear.weight.device)
        self.lora_B = nn.Linear(options.lora_rank, linear.out_features, bias=False, device=linear.weight.device)
        self.scaling = options.lora_alpha / options.lora_rank

    def forward(self, x: Tensor) -> Tensor:
        y = _LoraLinear.apply(
            x.flatten(0, -2), self.weight, self.bias, self.lora_A.weight, self.lora_B.weight, self.scaling
        )
        return y.unflatten(0, x.shape[:-1])


def attach(model: CausalLM, options: LoraOptions) -> None:
    """Freeze the model and add trained adapters to the linear layers of its blocks.

    Call it before `parallelize`; `initialize` fills the adapters. Raises UserError for a target module that is unknown.
    """
    linears = {name: m for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}
    there = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    for name in options.lora_target_modules:
        if name not in there:
            raise UserError(f"--lora-target-modules {name}: the blocks' linear layers are {', '.join(there)}")
    model.requires_grad_(False)
    for name, linear in linears.items():
        parent, _, kind = name.rpartition(".")
        if kind in (options.lora_target_modules or there):
            setattr(model.model.layers.get_submodule(parent), kind, LoraLinear(linear, options))


def unadapted_name(name: str) -> str | None:
    """The base checkpoint's tensor for a parameter (`Checkpoint.load_into`): an adapter has none."""
    return None if name.endswith(THIN) else name


@torch.no_grad()
def initialize(model: CausalLM, seed: int) -> None:
    """A uniform in +-1 / sqrt(in), as peft (and nn.Linear), B zero; the same for any number of processes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(THIN):
            value = torch.zeros(parameter.shape)
            if name.endswith(THIN[0]):
                nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
            start, stop = local_rows(parameter)
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).copy_(value[start:stop])


def export_adapter(
    directory: Path,
    model: CausalLM,
    base: Checkpoint,
    options: LoraOptions,
    notes: dict[str, Any],
    wait: Callable[[], None],
) -> None:
    """Save what was trained in peft's files, adapter_config.json last. Collective; `wait` as in `saving.export`."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    tensors = {PREFIX + name: whole(name, value, value.dtype, wait) for name, value in trained}  # collective
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.directory.resolve()),
        "r": options.lora_rank,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.split(".")[-3] for name, _ in trained}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    if writes():
        with new_files(directory, last=ADAPTER_CONFIG) as aside:
            headers = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
            save_file(aside / ADAPTER_WEIGHTS, headers, tensors.__getitem__)
            write_json(aside / ADAPTER_CONFIG, config)
            write_json(aside / "elo.json", notes)
    wait()
