"""The scripts lie in the folder above; their tests use tensors so small that one thread is fastest."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")                # for the processes that tests start, too
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
