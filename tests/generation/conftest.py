"""A small model that several files of tests read; nothing changes it."""

import families
import pytest
import torch

from elo.model.checkpoint import load_model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Single tokens are too little work to share: threads that wait for each other on a busy machine cost more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_model(families.write("llama3", tmp_path_factory.mktemp("llama")), "cpu", torch.float32)
