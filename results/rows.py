"""Fig. 7: rows of samples from the same seeds, from the shipped weights and plans.

    python results/rows.py             # writes results/c2f_trd/rows.png

From the top: DDIM, 100 steps; the C2F reference (100 low steps, then those of 100 up to t*); C2F with DDIM,
10 + 5 steps; C2F+TRD with DDIM; C2F with DPM-Solver++ 2M; C2F+TRD with DPM-Solver++ 2M, 10 + 5 steps each.
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from c2f_trd import T, load_models, load_plan, make_plan, sample, transition_of, uniform_steps  # noqa: E402
from common import save_grid  # noqa: E402

folder, device = ROOT / "weights" / "c2f_trd", torch.device("cuda" if torch.cuda.is_available() else "cpu")
args = argparse.Namespace(checkpoint=folder / "weights.pt", plans=folder, compile=False, precision="auto",
                          transition=None, data=None)
models = load_models(args, device)
t_star, grid = transition_of(args), uniform_steps(T - 1, 100)
plans = [make_plan("base", "ddim", 0, 100),
         dict(make_plan("c2f", "ddim", 100, 5, t_star), high_taus=[t for t in grid if t <= t_star])]
for solver in ("ddim", "dpm2"):
    plans += [make_plan("c2f", solver, 10, 5, t_star), load_plan(folder / f"plan_c2f+trd_{solver}_5.json")]
save_grid(ROOT / "results" / "c2f_trd" / "rows.png",
          torch.cat([sample(args, models, plan, range(16), device) for plan in plans]), columns=16)
