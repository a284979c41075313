"""The list of what a run has written: right at any moment at which it is killed, and checked when it is read."""

import json
import os
import shutil
from pathlib import Path

import pytest
from put_files import put
from small_runs import Killed, interrupt, result, run_here

from elo.common.errors import UserError
from elo.common.fields import write_json
from elo.common.written import Written


def killed_at(monkeypatch, number, command):
    """Whether a run was killed at its so-manieth change of a directory: from there on there are no more of them."""
    left = number

    def once(change):
        def or_kill(*arguments, **settings):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return change(*arguments, **settings)

        return or_kill

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "mkdir", "rmdir"):
            patch.setattr(os, name, once(getattr(os, name)))
        patch.setattr(shutil, "rmtree", once(shutil.rmtree))
        patch.setattr("elo.common.fields.write_json", once(write_json))
        try:
            assert run_here(command) == 0
        except Killed:
            return True
        return False


@pytest.mark.parametrize("before", [None, "sft --keep every --epochs 1"])
def test_killed_at_any_moment(project, monkeypatch, before):
    """The same command goes on, from nothing or over another run, and no file of either is left."""
    assert run_here("align --gb 0", "alone") == 0
    command = "align --gb 0 --overwrite" if before else "align --gb 0"
    if before:
        assert run_here(before) == 0
    put("mine/notes", "epoch-1/notes")
    shutil.copytree("out", "before")
    for number in range(200):
        shutil.rmtree("out")
        shutil.copytree("before", "out")
        is_killed = killed_at(monkeypatch, number, command)
        is_done = is_killed and not before and Path("out/config.json").exists()  # but the list was being written
        if is_killed:
            assert run_here(command) == (2 if is_done else 0)
        found = {str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()}
        found -= {"run.json.new"} if is_done else set()
        assert found == {*os.listdir("base"), "elo.json", "run.json", "mine/notes", "epoch-1/notes"}
        assert Path("out/model.safetensors").read_bytes() == Path("alone/model.safetensors").read_bytes()
        if not is_killed:
            return
    raise AssertionError("it never ends")


def test_runs_that_kept_no_list(tuned):
    """What they have certainly written goes: the epochs that there were, and no adapter."""
    shutil.copytree(tuned / "epoch-1", tuned / "epoch-3")
    run = json.loads((tuned / "run.json").read_text())
    del run["written"]
    (tuned / "run.json").write_text(json.dumps(run))
    assert run_here("sft --epochs 1 --overwrite", "R") == 0
    assert [path.name for path in tuned.glob("epoch-*")] == ["epoch-3"]
    assert (tuned / "epoch-3/config.json").exists()


def test_a_run_that_kept_no_list_goes_on(project, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        assert run_here("sft --keep best") == 0
    run = json.loads(Path("out/run.json").read_text())
    del run["written"]
    Path("out/run.json").write_text(json.dumps(run))
    assert run_here("sft --keep best") == 0
    assert "going on from" in capfd.readouterr().out
    assert run_here("sft --keep best", "alone") == 0
    assert result(Path("out")) == result(Path("alone"))
    assert not list(Path("out").glob("epoch-*"))


@pytest.mark.parametrize("name", ["../base/config.json", "/etc/passwd", "a/../../base", ".", "..", "", "a\0b", 7, None])
def test_a_list_names_nothing_outside(tmp_path, name):
    (tmp_path / "run.json").write_text(json.dumps({"written": ["config.json", name]}))
    with pytest.raises(UserError, match="written must list files of this directory"):
        Written(tmp_path)


def test_a_run_json_that_is_no_run_s(project, capfd):
    put("run.json")
    for content, message in (("precious", "not valid JSON"), ("{}", "no options of a run there; mend it")):
        Path("out/run.json").write_text(content)
        assert run_here("train --overwrite") == 2
        assert message in capfd.readouterr().err
        assert Path("out/run.json").read_text() == content


def test_the_beginning_of_a_list_is_a_run_s(project, capfd):
    """A kill may leave it while the first one is written."""
    Path("out").mkdir()
    for part in ("", "{", '{\n  "written": [\n    "metr'):
        Path("out/run.json.new").write_text(part)
        assert run_here("train --max-steps 1 --overwrite") == 0
        shutil.rmtree("out/checkpoints", ignore_errors=True)
        assert not Path("out/run.json.new").exists()
