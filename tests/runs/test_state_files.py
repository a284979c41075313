"""The files of a state: damaged ones are passed over, those of other versions refused, and nothing in them is run."""

import os
import pickle
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_runs import interrupt, lines, result, run_here, states

from elo.runs.state_files import write_checksum


def cut(state):
    file = next(state.glob("*.distcp"))
    os.truncate(file, file.stat().st_size // 2)


def flip(state):
    file = next(state.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def remove(state):
    next(state.glob("*.distcp")).unlink()


def garble(state):
    (state / ".metadata").write_bytes(b"\x80\x04nonsense")


def empty(state):
    (state / ".metadata").write_bytes(b"")


def cut_short(state):
    (state / ".metadata").unlink()


@pytest.mark.parametrize("damage", [cut, flip, remove, garble, empty, cut_short])
def test_a_damaged_state_is_passed_over(project, alone, stopped, damage, capfd):
    shutil.copytree(stopped, "out")
    damage(Path("out/checkpoints/step-7"))
    assert run_here("train --save-every 3") == 0
    said = capfd.readouterr().out
    # One without .metadata was being written when the run was killed: that is nothing to tell.
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


def rewrite(state, change):
    """`.metadata` with its pickle changed, and the right checksum."""
    file = state / ".metadata"
    file.write_bytes(change(file.read_bytes()))
    write_checksum(file)


def older(state):
    """`.metadata` as it was written before it had a checksum, when it named the state's path."""
    (state / ".metadata.crc32").unlink()
    metadata = pickle.loads((state / ".metadata").read_bytes())
    metadata.storage_meta = dcp.metadata.StorageMeta(state)
    (state / ".metadata").write_bytes(pickle.dumps(metadata, protocol=2))  # names are lines


@pytest.mark.parametrize("name", ["pathlib\nPosixPath", "pathlib._local\nPosixPath", "pathlib._local\nWindowsPath"])
def test_a_state_that_another_python_wrote(project, alone, stopped, name, capfd):
    """Python 3.13 has another name for a path."""
    shutil.copytree(stopped, "out")
    state = Path("out/checkpoints/step-7")
    older(state)
    written = (state / ".metadata").read_bytes()
    assert written.count(b"pathlib\nPosixPath") == 1
    (state / ".metadata").write_bytes(written.replace(b"pathlib\nPosixPath", name.encode()))
    assert run_here("train --save-every 3") == 0
    assert f"going on from {state}" in capfd.readouterr().out
    assert result(Path("out")) == alone("train --save-every 3")


def test_a_state_names_no_path_and_is_read_by_torch_itself(stopped):
    for state in stopped.glob("checkpoints/step-*"):
        assert b"pathlib" not in (state / ".metadata").read_bytes()
        assert dcp.FileSystemReader(state).read_metadata().storage_data


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruded",)


def intrude(state):
    rewrite(state, lambda _: pickle.dumps(Intruder()))


def intrude_by_a_number(state):
    """In place of a value that is no tensor."""
    metadata = pickle.loads((state / ".metadata").read_bytes())
    key, entry = next((key, entry) for key, entry in metadata.storage_data.items() if "lr" in key.fqn)
    file, hostile = state / entry.relative_path, BytesIO()
    torch.save(Intruder(), hostile)
    entry = replace(entry, offset=file.stat().st_size, length=hostile.tell())
    file.write_bytes(file.read_bytes() + hostile.getvalue())
    write_checksum(file)
    metadata.storage_data[key] = entry
    rewrite(state, lambda _: pickle.dumps(metadata))


def name_what_is_not_known(state):
    rewrite(state, lambda data: data.replace(b"TensorStorageMetadata", b"TensorStorageMetadat2"))


def name_what_is_not_known_without_a_checksum(state):
    name_what_is_not_known(state)
    (state / ".metadata.crc32").unlink()


def have_another_protocol(state):
    rewrite(state, lambda data: b"\x80\x09" + data[2:])


def have_other_tensors(state):
    rewrite(state, lambda data: data.replace(b"exp_avg_sq", b"exp_avg_s2"))


VERSIONS = [intrude, intrude_by_a_number, have_another_protocol, have_other_tensors]
VERSIONS += [name_what_is_not_known, name_what_is_not_known_without_a_checksum]


@pytest.mark.parametrize("change", VERSIONS)
def test_a_state_that_cannot_be_read_here_is_not_damaged(project, alone, stopped, change, capfd):
    """It is not passed over for the one before, nothing in it is run, and nobody is told to throw it away."""
    shutil.copytree(stopped, "out")
    state = Path("out/checkpoints/step-7")
    change(state)
    files = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert run_here("train --save-every 3") == 2
    said = capfd.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"error: {state}: this state is as it was written, but Python 3.")
    assert "go on with the versions that wrote it, which run.json names" in line
    assert "damaged" not in said.out + said.err
    assert "--restart" not in line
    assert all(path.read_bytes() == files[path] for path in files if path.name != "run.json")
    assert not Path("intruded").exists()
    state.rename("elsewhere")
    assert run_here("train --save-every 3") == 0
    assert f"going on from {Path('out/checkpoints/step-6')}" in capfd.readouterr().out
    assert result(Path("out")) == alone("train --save-every 3")


def test_a_damaged_state_after_one_that_cannot_be_read_here(project, stopped, capfd):
    shutil.copytree(stopped, "out")
    cut(Path("out/checkpoints/step-7"))
    name_what_is_not_known(Path("out/checkpoints/step-6"))
    assert run_here("train --save-every 3") == 2
    assert "step-6: this state is as it was written" in capfd.readouterr().err
    assert states(Path("out")) == ["step-6", "step-7"]
