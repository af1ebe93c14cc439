"""What fine-tuning for two resolutions costs: FD at full resolution alone (DPM-Solver++ 2M, 10 uniform steps), of the
base model and of the fine-tuned ones told "high resolution".

    python results/finetuned.py [WEIGHTS]    # shipped weights, and those of another --low; writes finetuned.json
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from c2f_trd import T, dpm_solver_pp_sample, load_models, noises, uniform_steps  # noqa: E402
from common import (extract, feature_stats, frechet_distance, linear_alpha_bar, load_extractor,  # noqa: E402
                    load_images, progress, save_json, to_uint8)

N, SEEDS = 2000, 3
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
extractor, name = load_extractor("fashion10k", device)
reference, rows = feature_stats(extract(extractor, load_images("fashion10k")[0])[0]), []
for checkpoint in [ROOT / "weights" / "c2f_trd" / "weights.pt", *map(Path, sys.argv[1:])]:
    args = argparse.Namespace(checkpoint=checkpoint, plans=checkpoint.parent, compile=False)
    models = load_models(args, device)
    for model in ("high",) if rows else ("base", "high"):
        fds = []
        for seed in range(SEEDS):
            images = []
            for seeds in progress(torch.arange(seed * N, (seed + 1) * N).split(250), f"{model}, seed {seed}", 250):
                z = noises(args, seeds.tolist(), device)[0]
                images.append(to_uint8(dpm_solver_pp_sample(models[model], z, uniform_steps(T - 1, 10),
                                                            linear_alpha_bar(T))).cpu())
            fds.append(frechet_distance(feature_stats(extract(extractor, torch.cat(images))[0]), reference))
        rows.append(dict(model=model, low=args.config["low"] if model == "high" else None, n=N, extractor=name, fd=fds))
        print(rows[-1])
save_json(ROOT / "results" / "c2f_trd" / "finetuned.json", rows)
