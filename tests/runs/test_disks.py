"""A slow disk, and a full one."""

import os
import subprocess
from pathlib import Path

import pytest
from many_processes import load_bytes
from small_runs import finish, result, run_here, start_group, states


@pytest.fixture
def project(crowded, monkeypatch):
    monkeypatch.chdir(crowded)
    return crowded


SLOW_DISK = """
import time
from datetime import timedelta
from torch.distributed.distributed_c10d import _set_pg_timeout
import elo.model.saving as saving, sft

def after(first, function):
    return lambda *arguments, **options: (first(), function(*arguments, **options))[1]

def slow_file(path, tensors, tensor):
    def value_of(name):
        value = tensor(name)
        if "embed" in name:
            time.sleep(3)
        return value
    write(path, tensors, value_of)

write, saving.save_file = saving.save_file, slow_file
saving.adopt = after(lambda: time.sleep(3), saving.adopt)
sft.export = after(lambda: _set_pg_timeout(timedelta(seconds=1.5)), sft.export)
"""


def test_the_others_wait_for_a_slow_disk(project):
    """Twice as long as a collective may take, between two tensors; and none ends before the model is there."""
    pair = start_group(project, "sft --epochs 2", 2, "slow-disk", before=SLOW_DISK)
    pair[1].wait()
    assert Path("slow-disk/config.json").exists()
    finish(*pair)


ONE_SLOW_DISK = """
import os, time
from datetime import timedelta
from torch.distributed.distributed_c10d import _set_pg_timeout
from elo.slicing import Replaced

def load_slowly(self, *arguments, load=Replaced.load_into):
    _set_pg_timeout(timedelta(seconds=2.5))
    time.sleep(4 * (os.environ["RANK"] == "1" and self.scales[0] == 0))
    load(self, *arguments)

Replaced.load_into = load_slowly
"""


def test_a_slow_disk_of_one_is_waited_for_between_two_scales(project):
    Path("held.txt").write_text("무엇 하나 둘 셋 some text. " * 5)
    assert run_here("train --max-steps 1", "slice") == 0
    command = "align --elo slice --gb 0 --scale auto --validation held.txt"
    finish(*start_group(project, command, 2, "one-slow-disk", before=ONE_SLOW_DISK))


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of a size."""
    mounted = []

    def mount(size):
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a tmpfs cannot be mounted here: that needs root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_leaves_the_last_state(project, small_disk, capfd):
    """Room for two states and not for a third, which is found out before the last step, however slow the disk is."""
    assert run_here("train --save-every 2 --max-steps 10", "roomy") == 0
    size = sum(path.stat().st_size for path in Path("roomy/checkpoints/step-10").iterdir())
    disk = small_disk(int(2.6 * size))
    command = "train --save-every 2 --max-steps 10 --cache cache"
    assert run_here(command, str(disk / "out")) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert "No space left on device" in line
    assert "the last saved state is step-4" in line
    assert states(disk / "out") == ["step-2", "step-4"]
    assert sorted(path.name for path in (disk / "out/checkpoints").iterdir()) == ["step-2", "step-4"]
    subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
    assert run_here(command, str(disk / "out")) == 0
    assert load_bytes(disk / "out") == load_bytes("roomy")
    assert result(disk / "out")[1] == result(Path("roomy"))[1]


def test_a_full_disk_while_the_model_is_written(project, small_disk, capfd):
    disk = small_disk("100m")
    command = "train --max-steps 3 --cache cache"
    with pytest.MonkeyPatch.context() as patch:
        original = run_here.__globals__["train"].export

        def fill_and_export(*arguments, **options):
            free = os.statvfs(disk)
            (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize - 100_000))
            original(*arguments, **options)

        patch.setattr("train.export", fill_and_export)
        assert run_here(command, str(disk / "out")) == 2
    assert "the model cannot be written: No space left on device" in capfd.readouterr().err
    assert states(disk / "out") == ["step-3"]
    (disk / "filler").unlink()
    assert run_here(command, str(disk / "out")) == 0
    assert not (disk / "out/checkpoints").exists()
