"""The model is the authors': on equal weights, everything equals what their code gave."""
import os
from pathlib import Path

import pytest
import torch

from tools.exactness import LIMITS, measure

GOLDEN_ROOT = Path(os.environ.get("GOLDEN_ROOT", "none"))
GOLDEN = [path.parent for path in sorted(GOLDEN_ROOT.glob("*/summary.json"))]


@pytest.fixture
def all_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not GOLDEN, reason="GOLDEN_ROOT, outputs of the authors' code, is not set")
@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_outputs_losses_and_gradients_are_the_authors(folder, all_threads):
    found = measure(folder)
    always = {"features", "pixel embeddings", "mask logits", "class scores", "class map, pixels"}
    assert always <= set(found)
    too_large = {name: value for name, value in found.items() if not value <= LIMITS[name]}
    assert not too_large
