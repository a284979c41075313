"""The files of a state: damaged ones are passed over, those of other versions refused, and nothing in them is run."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_runs import interrupt, lines, result, run_here, states

from elo.runs.state_files import checksum


def cut(state):
    file = state / "part-0.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip(state):
    file = state / "part-0.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def remove(state):
    (state / "part-0.safetensors").unlink()


def garble(state):
    (state / "state.json").write_bytes(b"\x80\x04nonsense")


def empty(state):
    (state / "state.json").write_bytes(b"")


def cut_short(state):
    (state / "state.json").unlink()


@pytest.mark.parametrize("damage", [cut, flip, remove, garble, empty, cut_short])
def test_a_damaged_state_is_passed_over(project, alone, stopped, damage, capfd):
    shutil.copytree(stopped, "out")
    damage(Path("out/checkpoints/step-7"))
    assert run_here("train --save-every 3") == 0
    said = capfd.readouterr().out
    # One without state.json was being written when the run was killed: that is nothing to tell.
    assert (f"{Path('out/checkpoints/step-7')}: this state is damaged" in said) == (damage is not cut_short)
    assert f"going on from {Path('out/checkpoints/step-6')}" in said
    assert result(Path("out")) == alone("train --save-every 3")


def test_nothing_is_begun_anew_where_all_states_are_damaged(project, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert run_here("train") == 0
    cut(Path("out/checkpoints/step-3"))
    assert run_here("train") == 2
    assert "--restart begins anew" in capfd.readouterr().err
    assert states(Path("out")) == ["step-3"]
    assert run_here("train --restart --max-steps 4") == 0
    assert len(lines(Path("out"))) == 4


def be_of_before(state):
    """As torch.distributed.checkpoint wrote them."""
    (state / "state.json").rename(state / ".metadata")
    (state / "part-0.safetensors").rename(state / "__0_0.distcp")


def rewrite(state, change):
    """The tensors changed, and the right checksum."""
    file = state / "part-0.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    (state / "state.json").write_text(json.dumps({"checksums": [checksum(file)]}))


def have_other_tensors(state):
    rewrite(state, lambda tensors: {name.replace("exp_avg_sq", "square"): value for name, value in tensors.items()})


def have_other_shapes(state):
    rewrite(state, lambda tensors: {name: value[:-1].contiguous() for name, value in tensors.items()})


@pytest.mark.parametrize("change", [be_of_before, have_other_tensors, have_other_shapes])
def test_a_state_that_cannot_be_read_here_is_not_damaged(project, alone, stopped, change, capfd):
    """It is not passed over for the one before, and nobody is told to throw it away."""
    shutil.copytree(stopped, "out")
    state = Path("out/checkpoints/step-7")
    change(state)
    files = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert run_here("train --save-every 3") == 2
    said = capfd.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"error: {state}: this state is as it was written, but this version cannot read it (")
    assert "go on with the version that wrote it" in line
    assert "damaged" not in said.out + said.err
    assert "--restart" not in line
    assert all(path.read_bytes() == files[path] for path in files if path.name != "run.json")
    state.rename("elsewhere")
    assert run_here("train --save-every 3") == 0
    assert f"going on from {Path('out/checkpoints/step-6')}" in capfd.readouterr().out
    assert result(Path("out")) == alone("train --save-every 3")


def test_a_damaged_state_after_one_that_cannot_be_read_here(project, stopped, capfd):
    shutil.copytree(stopped, "out")
    cut(Path("out/checkpoints/step-7"))
    have_other_tensors(Path("out/checkpoints/step-6"))
    assert run_here("train --save-every 3") == 2
    assert "step-6: this state is as it was written" in capfd.readouterr().err
    assert states(Path("out")) == ["step-6", "step-7"]


def test_restart_removes_states_of_before(project, stopped):
    shutil.copytree(stopped, "out")
    be_of_before(Path("out/checkpoints/step-7"))
    assert run_here("train --save-every 3 --max-steps 2 --restart") == 0
    assert states(Path("out")) == ["step-2"]
    assert not Path("out/checkpoints/step-7").exists()
