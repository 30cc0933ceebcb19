"""The modules lie beside tests/; small tensors are fastest on one thread, in subprocesses too."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
