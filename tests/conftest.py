"""Settings of all tests. The scripts are imported from the project's root."""

import os
import random
import signal
import sys
from pathlib import Path

import pytest

# The models here are tiny: a second thread gains nothing, and costs much where other work wants the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # several processes share the machine, and are compared with a CPU's numbers
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "support")]
# A shell starts what runs in the background with Ctrl-C ignored, which processes hand down to those they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--random-order", type=int, metavar="SEED", help="files in random order, and the tests in each")


def pytest_collection_modifyitems(config, items):
    seed = config.getoption("--random-order")
    if seed is not None:
        numbers = random.Random(seed)
        place = {path: numbers.random() for path in dict.fromkeys(item.path for item in items)}
        items.sort(key=lambda item: (place[item.path], numbers.random()))


@pytest.fixture(scope="module", autouse=True)
def _same_directory():
    """Some files of tests work in a directory of their own."""
    before = Path.cwd()
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _same_numbers():
    """Whatever tests ran before."""
    import torch  # not before the environment is set

    torch.manual_seed(0)
