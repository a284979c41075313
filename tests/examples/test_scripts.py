"""examples/*.sh, with a tiny model of the names that they expect, and stand-ins for what a cluster has."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from forking import Fork, fork_group
from shown_commands import main_of
from shown_place import write_place

ROOT = Path(__file__).resolve().parents[2]
# Where there are forks that have imported torch, they run what does not come on stdin.
STAND_INS = {
    "python": '[ -n "$FORKS" ] && [ "$1" != - ] && exec {python} -S {client} python "$@"\nexec {python} "$@"',
    "torchrun": '[ -n "$FORKS" ] && exec {python} -S {client} torchrun "$@"\n'
    'exec {python} -m torch.distributed.run "$@"',
    "hf": 'echo "hf has been called: $*" >&2; exit 1',
    "scontrol": '[ "$*" = "show hostnames nodes[1-2]" ] && echo localhost && sleep 0.2 && echo other',
    # Every node runs the command; here both are this machine.
    "srun": 'for node in 1 2; do "$@" & pids="$pids $!"; done; for pid in $pids; do wait $pid || status=$?; done\n'
    "exit ${{status:-0}}",
}


CLIENT = """
import json, os, socket, sys
with socket.create_connection(("127.0.0.1", int(os.environ["FORKS"]))) as server, server.makefile("rw") as stream:
    print(json.dumps(sys.argv[1:]), file=stream, flush=True)
    status, out, err = json.loads(stream.readline())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(status)
"""


@contextmanager
def forks():
    """The port at which CLIENT has commands run, one after the other."""

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:  # closed
                return
            with connection, connection.makefile("rw") as stream:
                words = json.loads(stream.readline())
                module, arguments = main_of(words)
                process = fork_group(1, module, arguments)[0] if words[0] == "torchrun" else Fork(module, arguments)
                out, err = process.communicate()
                print(json.dumps([process.returncode, out, err]), file=stream, flush=True)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield str(listening.getsockname()[1])
        listening.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("scripts"))
    (place / "bin").mkdir()
    (place / "client.py").write_text(CLIENT)
    for name, body in STAND_INS.items():
        file = place / "bin" / name
        file.write_text("#!/bin/bash\n" + body.format(python=sys.executable, client=place / "client.py") + "\n")
        file.chmod(0o755)
    return place


def run(place, script, *words, **environment):
    own = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "examples" / script), *map(str, words)]
    return subprocess.run(command, cwd=place, env=os.environ | own | environment, capture_output=True, text=True)


def test_the_pipeline_goes_on_after_what_stopped_it(place):
    settings = {
        "GPUS": "1",
        "MODELS": place / "models",
        "DATA": place / "data",
        "RUNS": place / "runs",
        "GB": "0.00002",
        "ALIGNMENT_GB": "0.000006",
        "SEQ_LEN": "64",
        "EPOCHS": "1",
        "OPTIONS": "--dtype fp32 --lr 1e-2 --max-steps 8",
    }
    settings = {name: str(value) for name, value in settings.items()}
    held_out = place / "data/heldout.en.jsonl"
    held_out.rename(place / "elsewhere.jsonl")
    with forks() as port:
        stopped = run(place, "llama31_korean.sh", FORKS=port, **settings)
    assert stopped.returncode == 2, stopped.stderr
    assert "heldout.en.jsonl" in stopped.stderr.splitlines()[-1]
    assert not (place / "runs/chat").exists()
    model = place / "runs/aligned/model.safetensors"
    written = model.stat().st_mtime_ns

    (place / "elsewhere.jsonl").rename(held_out)
    with forks() as port:
        finished = run(place, "llama31_korean.sh", FORKS=port, **settings)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("this run is finished") == 2
    assert model.stat().st_mtime_ns == written
    assert (place / "runs/sft/sft.json").exists()
    assert "Korean: " in finished.stdout and "bits a byte before" in finished.stdout


def test_a_job_of_two_nodes(place):
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "nodes[1-2]"}
    job |= {"SLURM_GPUS_ON_NODE": "1", "PORT": str(random.SystemRandom().randrange(20_000, 30_000))}
    texts = ["--target", place / "data/target", "--source", place / "data/source", "--seq-len", 64]
    command = ["train.py", "--model", place / "models/Qwen2-7B", *texts, "--gb", "0.00001", "--max-steps", 3]
    command = [ROOT / command[0], *command[1:], "--dtype", "fp32", "--out", place / "job"]
    for said in ("", "this run is finished"):
        ended = run(place, "slurm.sh", *command, **job)
        assert ended.returncode == 0, ended.stderr
        assert said in ended.stdout
    assert '"processes": 2' in (place / "job/run.json").read_text()
