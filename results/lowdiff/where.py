"""Where LowDiff's FD is lost: EDM with fewer steps; the high-resolution stage with more steps, and with conditions made
of real images instead of the low-resolution stage's.

    python results/lowdiff/where.py        # writes results/lowdiff/where.json, 20 minutes of one CPU core

FD[small-fashion]@1000, models with labels, seeds 7000 .. 7999 as in the ablations.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import lowdiff as low  # noqa: E402
from common import (class_logits, extract, feature_stats, frechet_distance, inception_score, load_extractor,  # noqa: E402
                    load_images, save_json, to_float, to_uint8)

N, FIRST, DATA = 1000, 7000, "fashion10k"
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
x, y, captions = load_images(DATA, 32)
extractor, name = load_extractor(DATA, device)
reference, rows = feature_stats(extract(extractor, x)[0]), []


def measure(label, checkpoint, real=None, **options):
    """FD of N images; real: the last stage alone, its condition a real image of the class with noise of that sigma."""
    args = argparse.Namespace(checkpoint=ROOT / "weights" / "lowdiff" / f"{checkpoint}.pt", compile=False, chosen=None)
    denoiser = low.load_models(args, device)
    plan = low.make_plan(args.config["stages"], **options)
    parts, begun = [], time.time()
    for batch in torch.arange(FIRST, FIRST + N).split(250):
        batch = batch.tolist()
        classes = low.labels_of(args, batch, device)
        stages = low.stages_of(plan, denoiser, low.noises(args, batch, device), classes)
        if real is None:
            parts.append(to_uint8(low.cascade_sample(stages)[-1]).cpu())
            continue
        g = torch.Generator().manual_seed(batch[0])
        of_class = [(y == c).nonzero().flatten() for c in classes.tolist()]
        i = torch.stack([some[torch.randint(len(some), (), generator=g)] for some in of_class])
        small = low.downsample(to_float(x[i]).double())
        z = low.upsample(small + real * torch.randn(small.shape, generator=g, dtype=torch.float64)).to(device)
        denoise, noise, sigmas, evaluations = stages[-1]
        parts.append(to_uint8(low.heun_sample(lambda xt, s, z=z: denoise(xt, s, z, real), noise, sigmas,
                                              evaluations)).cpu())
    features, second = extract(extractor, torch.cat(parts))
    score = inception_score(class_logits(extractor, second, captions))[0]
    rows.append(dict(what=label, checkpoint=checkpoint, nfe=[p["evaluations"] for p in plan["stages"]][real and -1:],
                     condition=real, fd=frechet_distance(feature_stats(features), reference), inception_score=score,
                     n=N, extractor=name, device=str(device), threads=torch.get_num_threads(),
                     seconds=round(time.time() - begun, 1)))
    print(f"{label}: FD[{name}]@{N} {rows[-1]['fd']:.3f}, score {score:.2f}, {rows[-1]['seconds']} s", flush=True)
    save_json(ROOT / "results" / "lowdiff" / "where.json", rows)


measure("as it is", "edm-cond")
measure("half the steps", "edm-cond", steps=[9])
measure("the paper's plan", "two-cond")
measure("twice the steps at 32x32", "two-cond", steps=[18, 18])
measure("low stage to its end", "two-cond", truncate=[35])
measure("condition: real images, the plan's noise", "two-cond", real=1.088)
measure("condition: real images, noise 0.14", "two-cond", real=0.14)
measure("condition: real images, noise 0.01", "two-cond", real=0.01)
measure("condition: real images, noise 0.14", "cdm-cond", real=0.14)
