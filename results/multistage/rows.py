"""Rows of samples from the same seeds, from the shipped weights.

    python results/multistage/rows.py      # writes results/multistage/rows.png

From the top: unified; multistage, each batch of one stage; multistage, mixed batches. 20 evaluations of DPM-Solver
each.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from common import save_grid  # noqa: E402
from multistage import get_args, get_plan, load_net, sample  # noqa: E402

device, rows = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
for name in ("unified", "by-stage", "weights"):
    args = get_args(["--sample", "--checkpoint", str(ROOT / "weights" / "multistage" / f"{name}.pt")])
    net = load_net(args, device)
    rows.append(sample(args, net, get_plan(args, args.solver[0], args.steps[0]), range(16), device))
save_grid(ROOT / "results" / "multistage" / "rows.png", torch.cat(rows), columns=16)
