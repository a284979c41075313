"""torch.compile: how many graphs there are, that equal input has equal results, and that no run dies of it.

With the compiler that users have, inductor, where its code matters; elsewhere with a backend that compiles fast.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import families
import pytest
import torch
from small_runs import lines, make_project, run_here
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from elo.model import loss
from elo.model.config import ModelConfig
from elo.model.decoder import CausalLM, build
from elo.runs import compilation, sharding
from elo.runs.compilation import compiled
from elo.runs.processes import process_group
from elo.runs.sharding import ParallelOptions
from elo.slicing import freeze_all_but_layers

WINDOWS = {
    "none": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "one of two": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    torch.compiler.set_stance("default")
    counters.clear()
    yield
    torch.compiler.reset()
    torch.compiler.set_stance("default")


@pytest.fixture
def fast_compiler(monkeypatch):
    """Traces, and runs torch's own operators then."""
    compile_ = torch.compile
    monkeypatch.setattr(
        compilation.torch, "compile", lambda f, options, **settings: compile_(f, backend="eager", **settings)
    )


@contextmanager
def model_of(windows: str, options: ParallelOptions, shapes_vary: bool, frozen: bool = False) -> Iterator[CausalLM]:
    config = {**families.SMALL, "num_hidden_layers": 2, **WINDOWS[windows]}
    model = build(ModelConfig.from_json(config))
    if frozen:
        freeze_all_but_layers(model)
    with process_group() as world:
        sharding.parallelize(model, world, options, shapes_vary)
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        yield model


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def train_and_validate(model: CausalLM, shapes: list[tuple[int, int]]) -> list[float]:
    losses = []
    for shape in shapes:
        tokens = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(shape[1]))
        value = model(tokens, tokens)
        value.backward()
        losses.append(value.item())
        with torch.no_grad():
            assert model(tokens, tokens).item() == pytest.approx(losses[-1], rel=1e-4)
        model.reshard()
    return losses


@pytest.mark.parametrize("loss_graphs", [0, 1], ids=["cpu", "plain"])
def test_any_shape_is_within_the_limit(loss_graphs, fast_compiler, capfd, monkeypatch):
    """In training and validation, with layers of both kinds; longer and shorter than the window, one row and several.

    A block's graphs are by grad mode, mask or none, one row or several; the loss that a GPU computes has one.
    """
    if loss_graphs:
        monkeypatch.setattr(sharding, "use_faster_operators", lambda model: None)
    shapes = [(2, 24), (3, 17), (1, 30), (2, 6), (1, 5), (4, 9), (5, 8), (1, 12)]
    with model_of("one of two", ParallelOptions("fp32", compile=True), shapes_vary=True) as model:
        train_and_validate(model, shapes)
    assert graphs() <= 8 + loss_graphs
    assert "--compile" not in capfd.readouterr().err


def test_any_shape_with_inductor(capfd):
    """The same by the code that users have, without one row: losses are those of the plain model."""
    shapes = [(2, 24), (3, 17), (2, 6), (4, 9)]
    with model_of("one of two", ParallelOptions("fp32", compile=True), shapes_vary=True) as model:
        compiled_losses = train_and_validate(model, shapes)
    assert graphs() == 4
    assert "--compile" not in capfd.readouterr().err
    with model_of("one of two", ParallelOptions("fp32", compile=False), shapes_vary=True) as model:
        assert train_and_validate(model, shapes) == pytest.approx(compiled_losses, rel=1e-4)


def test_a_step_has_the_graphs_of_its_first_micro_batch(monkeypatch):
    """With inductor and the loss that a GPU computes: one for the loss, whatever the number of its tiles, and one for a
    block; a frozen embedding's gradient is not asked for, which makes another of the first block's. And equal input has
    equal bits."""
    monkeypatch.setattr(sharding, "use_faster_operators", lambda model: None)
    monkeypatch.setitem(loss.TILE_BYTES, "cpu", 20 * 100 * 4)
    with model_of("none", ParallelOptions("fp32", compile=True), shapes_vary=False, frozen=True) as model:
        results = []
        for seed in (1, 2, 1):
            tokens = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(seed))
            model.zero_grad()
            value = model(tokens, tokens)
            value.backward()
            results.append([value.detach(), *(p.grad.to_local() for p in model.parameters() if p.grad is not None)])
            assert graphs() == 3
    assert all(torch.equal(first, third) for first, third in zip(results[0], results[2], strict=True))
    assert not torch.equal(results[0][0], results[1][0])


def test_each_shape_keeps_its_kernels(fast_compiler):
    """Of shapes that come later nothing changes for those that were there."""
    with model_of("none", ParallelOptions("fp32", compile=True), shapes_vary=False) as model:
        for number, shape in enumerate([(2, 24), (2, 12), (2, 18), (2, 24)]):
            tokens = torch.zeros(shape, dtype=torch.long)
            model(tokens, tokens).backward()
            assert graphs() == min(number + 1, 3)


def test_validation_adds_no_graphs(fast_compiler, tmp_path, monkeypatch):
    """Its shapes are others than those of training, and every one of them would be compiled."""
    monkeypatch.chdir(make_project(tmp_path, documents=20))
    (tmp_path / "held.txt").write_text("a few words\n" * 20)
    assert run_here("train --max-steps 2 --compile", "plain") == 0
    before = graphs()
    torch.compiler.reset()
    counters.clear()
    assert run_here("train --max-steps 2 --compile --validation held.txt --validate-every 1", "watched") == 0
    assert graphs() == before > 0


# ---- failures


WORLD = SimpleNamespace(rank=0)
NOTE = "--compile: the rest is computed uncompiled, slower: "


def double(x: torch.Tensor, flag: int) -> torch.Tensor:
    return 2 * x + flag


def test_beyond_the_limit_it_goes_on_uncompiled(fast_compiler, capfd):
    function = compiled(double, WORLD, shapes_vary=False)
    for flag in [*range(12), 3]:
        assert function(torch.ones(3), flag).tolist() == [2 + flag] * 3
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("--compile")]
    assert said == [NOTE + "torch allows 8 graphs of a block (torch._dynamo.config)"]
    assert graphs() == 8


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_c_compiler(rank, capfd, monkeypatch, tmp_path):
    """With inductor: the line is rank 0's, and nothing is tried again."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    function = compiled(double, SimpleNamespace(rank=rank), shapes_vary=False)
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        for flag in (1, 2):
            assert function(torch.ones(3, requires_grad=True), flag).tolist() == [2 + flag] * 3
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("--compile")]
    assert len(said) == (rank == 0)
    assert all("No working C++ compiler found" in line for line in said)


def test_a_mistake_is_not_the_compilers(fast_compiler, capfd):
    function = compiled(lambda a, b: a @ b, WORLD, shapes_vary=False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        function(torch.ones(2, 3), torch.ones(2, 3))
    assert "--compile" not in capfd.readouterr().err


def test_runs_do_not_die_of_it(tmp_path, monkeypatch, capfd):
    """Whole ones, with a backend that always fails."""

    def failing(*_: object) -> Callable:
        raise RuntimeError("no such GPU")

    compile_ = torch.compile
    monkeypatch.setattr(
        compilation.torch, "compile", lambda f, options, **settings: compile_(f, backend=failing, **settings)
    )
    monkeypatch.chdir(make_project(tmp_path, documents=20))
    for command in ("train --max-steps 2", "sft --epochs 1 --validation-fraction 0.2"):
        torch.compiler.set_stance("default")
        assert run_here(f"{command} --compile", "compiled") == 0
        said = capfd.readouterr().err
        assert said.count("--compile: the rest is computed uncompiled") == 1
        assert run_here(f"{command} --no-compile --overwrite", "compiled-not") == 0
        ours, theirs = ([line["loss"] for line in lines(tmp_path / out)] for out in ("compiled", "compiled-not"))
        assert ours == pytest.approx(theirs, rel=1e-5)
        (tmp_path / "compiled").rename(tmp_path / f"{command[:3]}-done")


def test_nothing_is_compiled_unless_asked(monkeypatch):
    monkeypatch.setattr(compilation.torch, "compile", lambda *_: pytest.fail("compiled"))
    with model_of("none", ParallelOptions("fp32", compile=False), shapes_vary=False) as model:
        assert model.loss.softmax_ is loss.softmax_


def test_kernels_are_not_chosen_by_timing(monkeypatch):
    asked = []
    monkeypatch.setattr(compilation.torch, "compile", lambda function, **settings: asked.append(settings))
    for shapes_vary in (False, True):
        compiled(double, WORLD, shapes_vary)
        assert asked[-1] == {"fullgraph": True, "dynamic": shapes_vary, "options": {"deterministic": True}}
