"""Devices: everything that asks for CUDA."""

import os
import platform

import torch
from torch import Tensor

from elo.common.errors import UserError
from elo.cpu.memory import keep_freed_memory, peak_resident_memory

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def inference_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def take_device(local_rank: int) -> torch.device:
    """This process's GPU, or the CPU where there is none. Raises UserError if the node has fewer GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of this node")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def set_for_training(device: torch.device) -> None:
    """What this process does from now on to compute the same numbers every time, and fast."""
    if device.type == "cuda":
        make_deterministic()
    else:
        keep_freed_memory()


def make_deterministic() -> None:
    """Let CUDA give the same numbers every time, without which no resumed run equals the uninterrupted one.

    cuDNN's attention is ruled out by that, and the flash kernel takes its place: the backward pass of the former adds
    in whatever order its blocks end.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    torch.use_deterministic_algorithms(True)
    # Sums over tokens that are split between blocks of threads stay in fp32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # a search for errors that costs time


def fix_collectives() -> None:
    """Let NCCL add in one order, unless the environment names its algorithm or protocol: before it starts.

    By itself it chooses by size and topology, and NVLS, which adds in the switch, does so in no fixed order.
    """
    if not {"NCCL_ALGO", "NCCL_PROTO"} & os.environ.keys():
        os.environ |= {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host in memory from which a GPU copies it while it computes."""
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):  # or a thread would take the node's first one for its own
        return tensor.pin_memory()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest point so far: of the GPU's allocator, or of the resident process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_memory()
