"""The modules lie beside tests/; small tensors are fastest on one thread, in subprocesses too. Only test_gpu.py, run by
itself, sees GPUs: the other tests fork, and compare to the bit."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not any("test_gpu" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
