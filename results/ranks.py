"""Fig. 5(b, c): the rank of the predicted images along the 100-step trajectory, for the base model at full
resolution and for the fine-tuned ones at low resolution; and their error in eps where the exact answer is known.

    python results/ranks.py [WEIGHTS]    # shipped weights, and those of another --low; writes ranks.json
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from c2f_trd import PCA_SEED, T, load_models, noises, transition_step, uniform_steps  # noqa: E402
from common import linear_alpha_bar, save_json  # noqa: E402

SAMPLES = 1024
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
rows = []
for checkpoint in [ROOT / "weights" / "c2f_trd" / "weights.pt", *map(Path, sys.argv[1:])]:
    args = argparse.Namespace(checkpoint=checkpoint, plans=checkpoint.parent, compile=False)
    models = load_models(args, device, "fp32")
    full, low = noises(args, range(PCA_SEED, PCA_SEED + SAMPLES), device)
    for model, z in (("low", low), ("base", full)) if not rows else (("low", low),):
        t_star, ranks = transition_step(models[model], z, uniform_steps(T - 1, 100), linear_alpha_bar(T))
        error = models[model](z, torch.full((SAMPLES,), T - 1, device=device)) - z       # at T - 1 xt is all noise
        rows.append(dict(model=model, res=z.shape[-1], samples=SAMPLES, t_star=t_star,
                         eps_error=float(error.square().mean().sqrt()), ranks=ranks))
        print({k: v for k, v in rows[-1].items() if k != "ranks"})
save_json(ROOT / "results" / "c2f_trd" / "ranks.json", rows)
