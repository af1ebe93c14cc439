"""Rows of samples from the same prompts and seeds, from the shipped weights.

    python results/postdiff/rows.py        # writes results/postdiff/rows.png, prints the prompts

From the top: plain guidance, 20 steps; plain, 8 steps; mixed resolution, 20 steps; PostDiff, 20 steps.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from common import save_grid  # noqa: E402
from postdiff import captions_of, describe, get_args, load_models, make_plan, sample  # noqa: E402

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
args = get_args(["--sample", "--checkpoint", str(ROOT / "weights" / "postdiff" / "weights.pt")])
net, _ = load_models(args, device)
plans = [make_plan(method, args.config, steps=steps)
         for method, steps in (("base", 20), ("base", 8), ("mixed", 20), ("postdiff", 20))]
for plan in plans:
    print(describe(plan))
print(", ".join(captions_of(args, range(16))))
save_grid(ROOT / "results" / "postdiff" / "rows.png",
          torch.cat([sample(args, net, plan, range(16), device) for plan in plans]), columns=16)
