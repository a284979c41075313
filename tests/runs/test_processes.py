"""The paths of CUDA, without a GPU: what is asked of it, and what is done with the answers."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import elo
from elo.common.errors import EarlyExit, ProcessLostError, UserError
from elo.cpu import memory as cpu_memory
from elo.model.config import ModelConfig
from elo.model.decoder import build
from elo.runs import devices, sharding
from elo.runs.processes import process_group
from elo.runs.sharding import ParallelOptions
from elo.slicing import freeze_all_but_layers


@pytest.fixture
def gpus(monkeypatch):
    """torch.cuda as a node with two GPUs has it; what is set there is remembered."""
    seen = SimpleNamespace(device=None, state=torch.arange(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(seen, "device", device))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + device.index)
    return seen


def test_each_process_takes_its_gpu(gpus):
    assert devices.take_device(1) == torch.device("cuda", 1)
    assert gpus.device == 1
    assert devices.inference_device().type == "cuda"
    with pytest.raises(UserError, match="--nproc_per_node is more than the 2 GPUs"):
        devices.take_device(2)


@pytest.mark.parametrize("users", [{}, {"NCCL_ALGO": "Tree"}, {"NCCL_PROTO": "LL"}])
def test_the_group_is_of_nccl_and_gloo(users, gpus, monkeypatch):
    """NCCL's algorithm is settled before it starts, by the user or by one that adds in a fixed order."""
    backends, settled = [], []
    original = dist.init_process_group
    monkeypatch.setattr(os, "environ", {name: os.environ[name] for name in os.environ if "NCCL" not in name} | users)

    def without_nccl(backend, **settings):
        backends.append(backend)
        settled.append({name: value for name, value in os.environ.items() if "NCCL" in name})
        original("gloo", **settings)

    monkeypatch.setattr(dist, "init_process_group", without_nccl)
    with process_group() as world:
        assert world.device == torch.device("cuda", 0)
        assert world.sum(1.5) == [1.5]
    assert backends == ["cpu:gloo,cuda:nccl"]
    assert settled == [users or {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}]


def test_training_on_a_gpu_is_deterministic(monkeypatch):
    asked = []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    products = SimpleNamespace()
    monkeypatch.setattr(torch.backends.cuda, "matmul", products)
    devices.set_for_training(torch.device("cuda", 0))
    assert asked == [True]
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert products.allow_bf16_reduced_precision_reduction is False
    assert products.allow_fp16_reduced_precision_reduction is False


def test_what_is_asked_of_the_gpu(gpus):
    device = torch.device("cuda", 1)
    assert devices.device_name(device) == "GPU 1"
    assert devices.peak_memory(device) == 1001


def test_a_thread_pins_memory_for_its_processs_gpu(monkeypatch):
    taken, tensor = [], torch.arange(3)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(taken.append(device)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: ("pinned", self))
    assert devices.pinned(tensor, torch.device("cuda", 1)) == ("pinned", tensor)
    assert taken == [torch.device("cuda", 1)]
    assert devices.pinned(tensor, torch.device("cpu")) is tensor


def small_model(**fields):
    small = {**families.SMALL, "num_hidden_layers": 1, **fields}
    return build(ModelConfig.from_json({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **small}))


def test_one_process_computes_with_its_frozen_parameters_themselves():
    model = small_model(tie_word_embeddings=True)
    freeze_all_but_layers(model)
    with process_group() as world:
        sharding.parallelize(model, world, ParallelOptions("bf16", compile=False))
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor) == parameter.requires_grad
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        before = model.lm_head.weight
        tokens = torch.arange(6).view(1, 6)
        model(tokens, tokens).backward()
        assert model.lm_head.weight is before is model.model.embed_tokens.weight


def test_offloaded_parameters_are_pinned_for_a_gpu_only(monkeypatch):
    asked, devices = [], []
    monkeypatch.setattr(sharding, "fully_shard", lambda module, **settings: asked.append(settings["offload_policy"]))
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: None)
    monkeypatch.setattr(sharding, "set_for_training", lambda device: devices.append(device.type))
    for kind in ("cpu", "cuda"):
        world = SimpleNamespace(device=torch.device(kind), size=1)
        sharding.parallelize(small_model(), world, ParallelOptions("fp32", compile=False, cpu_offload=True))
    assert [policy.pin_memory for policy in asked] == [False, False, True, True]
    assert devices == ["cpu", "cuda"]


@pytest.mark.parametrize("variable", [None, "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_freed_memory_is_kept_unless_the_environment_sets_the_allocator(variable, monkeypatch):
    set_to = []
    monkeypatch.setattr(
        cpu_memory.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *setting: set_to.append(setting))
    )
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    if variable:
        monkeypatch.setenv(variable, "1")
    devices.set_for_training(torch.device("cpu"))
    # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h: large blocks come from the heap, and its end is never given back.
    assert set_to == ([] if variable else [(-4, 0), (-1, -1)])


def test_nothing_else_asks_for_cuda():
    """In elo/. The tables of loss.py are by kind of device and ask for nothing."""
    files = Path(elo.__file__).parent.rglob("*.py")
    assert [file.name for file in files if "torch.cuda" in file.read_text()] == ["devices.py"]


# ---- how a run ends


def test_a_signal_ends_what_is_going_on():
    with pytest.raises(EarlyExit, match="stopped by a signal"), process_group():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_deferred_signal_waits():
    reached = False
    with pytest.raises(EarlyExit), process_group() as world:
        with world.stop.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            assert world.stop.requested
            reached = True
        raise AssertionError("not reached")
    assert reached


@pytest.mark.parametrize(
    "lost",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        dist.DistBackendError("NCCL communicator was aborted on rank 0."),
    ],
    ids=["gloo", "NCCL"],
)
@pytest.mark.parametrize(
    ("word", "kind"), [(None, ProcessLostError), ("stopped", EarlyExit), ("--gb 7: too much", UserError)]
)
def test_a_lost_connection_has_the_reason_of_the_one_that_left(word, kind, lost, monkeypatch):
    destroy = dist.destroy_process_group
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("could wait for the process that is gone"))
    with pytest.raises((UserError, EarlyExit)) as raised, process_group() as world:
        if word:
            world.tell_why(word)
            world.tell_why("what a later one says")
        raise lost
    destroy()
    assert type(raised.value) is kind
    assert raised.value.at_once
    if kind is UserError:
        assert str(raised.value) == word


def test_an_error_on_rank_0_is_everybodys():
    def fail():
        raise UserError("no")

    with process_group() as world:
        with pytest.raises(UserError, match="no"):
            world.on_rank_0(fail)
        assert world.on_rank_0(lambda: 7) == 7
        assert world.gather("x") == ["x"]


def test_a_worker_ends_with_its_torchrun(tmp_path):
    """Linux tells it of the death of its parent, also by SIGKILL."""
    worker = "import time, elo.runs.signals as s; s.end_with_torchrun(); print('up', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys, os; subprocess.Popen([sys.executable, '-c', {worker!r}]); os.read(0, 1)"
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        env=os.environ | {"TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": os.path.dirname(os.path.dirname(elo.__file__))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"up\n"
    process.kill()
    assert process.stdout.read() == b""  # ends when the worker has, long before its 60 seconds
