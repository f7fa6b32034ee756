"""What tests share: no network, the user's cache out of reach, a small model, and the testbed loaded once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # here and in processes that tests start: the cores are shared out by `-n auto`

import pytest
import torch
from hypothesis import settings

import repe
from tests import zoo

settings.register_profile("shared machine", deadline=None, derandomize=True)
settings.load_profile("shared machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """As many processes as there are cores for this one, and no more than have room for a PyTorch each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 8)


def pytest_collection_modifyitems(items):
    """Names are the same in every process, so that tests can be shared out, and be named again tomorrow."""
    if unsteady := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"a parameter is named by its address: give it an id\n{unsteady[0]}")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("REPE_VECTORS", raising=False)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    """A small random model, for tests that need no other."""
    return zoo.build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.tokenizer()


@pytest.fixture(scope="session")
def loaded_testbed():
    return repe.load()


@pytest.fixture
def testbed(loaded_testbed):
    """The testbed's model and tokenizer; whatever a test attached must be gone when it ends."""
    model, tokenizer = loaded_testbed
    yield model, tokenizer
    assert repe.detach(model) == 0
