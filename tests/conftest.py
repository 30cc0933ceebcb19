"""What all tests share.

The modules lie beside tests/. Small tensors are fastest on one thread, in subprocesses, too. Only
test_gpu.py, run by itself, sees GPUs: the other tests fork, and compare to the bit.
"""
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not any("test_gpu" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data                                                          # noqa: E402
import train                                                         # noqa: E402


def pytest_configure(config):
    # torch's `record` would write stack traces to stderr, which pytest has replaced.
    config.addinivalue_line("filterwarnings", "ignore:Unable to enable fault handler")


def shapes(root, split, **options):
    return data.Shapes(root, split, length=3 if split == "val" else None, **options)


@pytest.fixture(autouse=True)
def warnings_are_told_again():
    data.warn.cache_clear()


@pytest.fixture
def short_tests(monkeypatch):
    """Three held-out shapes instead of 100, and no pictures: half a second for a whole tiny run."""
    monkeypatch.setitem(data.DATASETS, "shapes", shapes)
    monkeypatch.setattr(train, "draw_predictions", lambda *_, **__: None)
    monkeypatch.setattr(train, "draw_queries", lambda *_, **__: None)


@pytest.fixture
def signals_as_before():
    """A run takes signals over; the tests, and the processes that they start, get them back."""
    names = [name for name in ("SIGTERM", "SIGUSR1", "SIGCHLD") if hasattr(signal, name)]
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in names}
    yield
    for name, handler in handlers.items():
        signal.signal(getattr(signal, name), handler)
