"""`train.py --bridge`: a map fitted on the base stands for the layers that the slice leaves out."""

import json
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_runs import finish, losses, result, run_here, start_group
from transformers import AutoModelForCausalLM

from elo import methods
from elo.common.errors import UserError
from elo.model.checkpoint import Checkpoint
from elo.model.loss import IGNORE
from elo.runs.processes import process_group
from elo.runs.sharding import ParallelOptions, parallelize
from elo.variants import bridge

HERE = Namespace(device=torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("in_project")
ONLY = "train --method elo --bridge --max-steps 6"


class Texts:
    """Windows of random tokens."""

    def __init__(self, count, seq_len, vocab_size):
        self.seq_len, self.tokens = seq_len, count * seq_len + 1
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randint(vocab_size, (count, seq_len), generator=generator)

    def __getitem__(self, index):
        return self.inputs[index], torch.full((self.seq_len,), IGNORE)


def by_numpy(lower, upper):
    """Rows divided by the upper hidden states' norms, first positions left out: the solution and its squared error."""
    x, y = (states[:, 1:].flatten(0, 1).double().numpy() for states in (lower, upper))
    norms = np.linalg.norm(y, axis=1, keepdims=True)
    x, y = np.concatenate([x, np.ones_like(norms)], axis=1) / norms, y / norms
    solution, *_ = np.linalg.lstsq(x, y, rcond=None)
    return solution, ((x @ solution - y) ** 2).sum() / len(y)


@pytest.mark.parametrize("layers", [(1, 4), (1, 3, 4), (2, 4), (1, 3)])
def test_the_fit_is_that_of_least_squares(layers):
    base = Checkpoint("base")
    texts = Texts(60, 16, base.config.vocab_size)
    count = -(-16 * base.config.hidden_size // 15)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
        found = theirs(texts.inputs[:count], output_hidden_states=True).hidden_states
    maps = bridge.fit_all(layers, base, texts, torch.float32, HERE)
    gaps = [(lower, upper) for lower, upper in pairwise(layers) if upper > lower + 1]
    for (lower, upper), (weight, bias, missed) in zip(gaps, maps, strict=True):
        solution, error = by_numpy(found[lower], found[upper - 1])
        np.testing.assert_allclose(weight.numpy().T, solution[:-1], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(bias.numpy(), solution[-1], rtol=1e-3, atol=1e-4)
        assert missed == pytest.approx(error, rel=1e-4)


def test_the_slice_computes_with_it_and_passes_gradients_through():
    """Against transformers' layers with the map between them."""
    base = Checkpoint("base")
    texts = Texts(60, 16, base.config.vocab_size)
    theirs = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    ((weight, bias, _),) = bridge.fit_all((1, 4), base, texts, torch.float32, HERE)
    theirs.model.layers = torch.nn.ModuleList([theirs.model.layers[0], theirs.model.layers[3]])
    theirs.model.layers[1].self_attn.layer_idx = 1
    theirs.model.layers[1].register_forward_pre_hook(lambda _, inputs: (inputs[0] @ weight.T + bias, *inputs[1:]))
    theirs.config.num_hidden_layers = 2
    tokens, labels = texts.inputs[:2], texts.inputs[2:4]
    expected = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    with process_group() as world:
        method = methods.make(base.config, "elo", (1, 4), bridged=True)
        model = parallelize(method.model, world, ParallelOptions("fp32", compile=False))
        base.load_into(model, method.base_name)
        bridge.fit(model, (1, 4), base, texts, "fp32", world)
        loss = model(tokens, labels)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-4)
        for name, parameter in theirs.model.layers.named_parameters():
            ours = model.model.layers.get_parameter(name).grad.full_tensor()
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-4)
    assert not any("bridge" in name for name, _ in model.named_parameters())


def test_a_run(capsys):
    """It learns something else than the plain slice; what it writes has the plain slice's files, names and notes."""
    assert run_here(ONLY) == 0
    assert "of the upper layer's input" in capsys.readouterr().out
    assert run_here(ONLY.replace("--bridge", ""), "plain") == 0
    assert losses("out")[0] != pytest.approx(losses("plain")[0], rel=1e-4)
    files = [{path.name for path in Path(out).iterdir()} for out in ("out", "plain")]
    assert files[0] == files[1]
    bridged, plain, base = (load_file(f"{out}/model.safetensors") for out in ("out", "plain", "base"))
    assert bridged.keys() == plain.keys()
    assert all(torch.equal(bridged[name], base[name]) for name in bridged if ".layers." not in name)
    for file, options in (("elo.json", "options"), ("run.json", "options")):
        assert json.loads(Path("out", file).read_text())[options]["bridge"] is True
    assert run_here("align --elo out --gb 0", "aligned") == 0
    AutoModelForCausalLM.from_pretrained("out")


def test_goes_on_with_the_map_that_it_began_with(tmp_path, monkeypatch):
    """The state's; another machine would fit another one."""
    assert run_here(f"{ONLY} --save-every 3 --keep-checkpoints 9", "whole") == 0
    assert run_here(f"{ONLY} --save-every 3 --keep-checkpoints 9") == 0
    for name in ("config.json", "checkpoints/step-6/state.json"):
        (tmp_path / "out" / name).unlink()
    monkeypatch.setattr(bridge, "fit_all", lambda *_: pytest.fail("the state has the map, and a fit takes minutes"))
    assert run_here(f"{ONLY} --save-every 3 --keep-checkpoints 9") == 0
    assert losses("out") == losses("whole")
    assert result(Path("out"))[0] == result(Path("whole"))[0]


def test_beside_other_options():
    assert run_here(ONLY) == 0
    assert run_here(f"{ONLY} --cpu-offload --activation-checkpointing", "less") == 0
    assert losses("less") == pytest.approx(losses("out"), rel=1e-5)
    assert run_here(f"{ONLY} --active-vocabulary", "narrow") == 0
    assert all(narrow < whole for narrow, whole in zip(losses("narrow"), losses("out"), strict=True))


def test_two_processes(tmp_path):
    """One fits, all have it, and each has a part of the slice."""
    assert run_here(ONLY) == 0
    finish(*start_group(tmp_path, ONLY, 2, "two"))
    assert losses("two") == pytest.approx(losses("out"), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--bridge --method full", "--bridge goes with --method elo, not with full"),
        ("--bridge --method selective", "--bridge goes with --method elo, not with selective"),
        ("--bridge --layers 2,3", "--bridge: no layers are left out between those of --layers 2,3"),
        ("--bridge --layers 4", "--bridge: no layers are left out between those of --layers 4"),
        ("--bridge --gb 0.000001", "--bridge: its fit takes 800 tokens, and the text has "),
        ("--bridge --seq-len 1 --batch-tokens 8", "--bridge: its fit takes "),
    ],
)
def test_mistakes(options, message, capsys):
    assert run_here(f"train {options}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_hidden_states_that_cannot_be_fitted(monkeypatch):
    with pytest.raises(UserError, match="not finite"):
        bridge.least_squares(torch.ones(1, 9, 4), torch.full((1, 9, 4), torch.nan))

    def fail(*_, **__):  # as CUDA's solver may, where nearly all eigenvalues are equal
        raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "pinv", fail)
    with pytest.raises(UserError, match="--bridge: no map can be fitted .*: the algorithm failed to converge"):
        bridge.least_squares(torch.ones(1, 9, 4), torch.ones(1, 9, 4))
