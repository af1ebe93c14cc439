"""Multistage: the other ways to cut the noise levels into stages, before any training: Go et al.'s three (Table 4), the
other readings of the paper's Algorithms 1 and 2, and the decoders' widths for any stages (Eq. 23, Table 7).

    python variants/multistage_clusterings.py time --stages 3          # equal steps of t; snr: of log SNR
    python variants/multistage_clusterings.py gradient --checkpoint weights/multistage/unified.pt    # two minutes
    python variants/multistage_clusterings.py optimal                  # Algorithm 1, four readings: a minute
    python variants/multistage_clusterings.py optimal2 --stages 5      # Algorithm 2, four readings: four minutes
    python variants/multistage_clusterings.py optimal --unit-range     # images in [0, 1], as the official code (D3)

Prints the edges and the command that trains a network with them, and writes OUT/plan_METHOD_N.json. D1, D2, ...:
results/multistage/README.md. Go et al.: Addressing Negative Transfer in Diffusion Models (arXiv 2306.00354).
"""
import argparse
import itertools
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from changed import copy_of  # noqa: E402
from common import (load_checkpoint, load_images, load_weights, progress, run_main, save_json,    # noqa: E402
                    start_device, to_float)
from multistage import (ALPHA, CLUSTER_SEED, CONFIG, ETA, SAMPLES, T_FIRST, build_net, first_crossing,     # noqa: E402
                        optimal_denoiser, sigma_of, similarity_map, similarity_to_ends, training_loss)

METHODS = ("time", "snr", "gradient", "optimal", "optimal2")
PAPER_EDGES = (0.442, 0.631)           # of the stages that multistage.py's three widths are meant for (Table 4)
LEVELS, GRADIENT_BATCH = 100, 128      # noise levels and images of the gradient clustering (D6)


# ---------------------------------------------------------------------------------------------
# Cutting a sequence of levels into runs
# ---------------------------------------------------------------------------------------------
def best_runs(cost, n, smallest=1, largest=None):
    """The n - 1 indices that cut 0 .. G-1 into n runs of least total cost, exactly, by dynamic programming.

    cost (G, G + 1): cost[i, j] of the run i .. j-1; smallest, largest: allowed lengths of a run. Raises ValueError if
    no n such runs fit."""
    G = len(cost)
    length = torch.arange(G + 1) - torch.arange(G)[:, None]
    cost = cost.masked_fill((length < smallest) | (length > (largest or G)), math.inf)
    best, froms = cost[0], []                                  # best[j]: of 0 .. j-1 in the runs so far
    for _ in range(n - 1):
        best, i = (best[:G, None] + cost).min(0)
        froms.append(i)
    if not best[G] < math.inf:
        raise ValueError(f"{n} stages do not fit on {G} noise levels")
    cuts = [G]
    for i in reversed(froms):
        cuts.insert(0, int(i[cuts[0]]))
    return cuts[:-1]


def similarity_cost(similarity, mean=False):
    """Cost of each run i .. j-1, (G, G + 1), by a similarity (G, G): the sum of 1 - S over its square (Eq. 22 with its
    sign put right, D5); mean: minus the mean of S, as in the official code, which favours runs of one level."""
    G = len(similarity)
    s = F.pad(similarity.cumsum(0).cumsum(1), (1, 0, 1, 0))
    i, j = torch.arange(G)[:, None], torch.arange(G + 1)
    total, size = s[j, j] - s[i, j] - s[j, i] + s[i, i], (j - i).clamp(min=1) ** 2
    return -total / size if mean else size - total


def affinity_cost(affinity):
    """Go et al.: cost of each run i .. j-1, (G, G + 1): minus the sum of the affinity (G, G) of its levels to its
    middle one."""
    G = len(affinity)
    s = F.pad(affinity.double().cumsum(1), (1, 0))
    i, j = torch.arange(G)[:, None], torch.arange(G + 1)
    centre = (i + (j - i) // 2).clamp(0, G - 1)
    return s[centre, i] - s[centre, j]


# ---------------------------------------------------------------------------------------------
# Go et al. (Table 4): by time, by signal-to-noise ratio, by gradients
# ---------------------------------------------------------------------------------------------
def go_edges(affinity, n):
    """Edges [t1 .. t_(n-1)] of n stages by the affinity (G, G) of the levels t = 1 / G, 2 / G, ... 1: stages of 1 / 2n
    to 3 / 2n of the levels (D7)."""
    G = len(affinity)
    return [(c + 1) / G for c in best_runs(affinity_cost(affinity), n, G // (2 * n), -(-3 * G // (2 * n)))]


def level_affinity(method, levels=1000):
    """time: -|t - t'|; snr: -|log SNR - log SNR'|, (levels, levels) float64."""
    t = torch.arange(1, levels + 1).double() / levels
    level = t if method == "time" else 2 * sigma_of(t).log()
    return -(level[:, None] - level).abs()


def gradient_affinity(net, loss, x, levels=LEVELS, batch=GRADIENT_BATCH, seed=CLUSTER_SEED):
    """Cosine similarities (levels, levels) of the gradients of a network's loss at t = 1 / levels .. 1, each with the
    same images of x (N, C, R, R) and the same eps (D6); float64, on the CPU.

    loss(x0, t, eps) -> scalar, t (B,). Memory: levels times the network's parameters, in floats."""
    g, device = torch.Generator().manual_seed(seed), next(net.parameters()).device
    x0 = x[torch.randint(0, len(x), (batch,), generator=g)].to(device)
    eps = torch.randn(x0.shape, generator=g).to(device)
    rows = []
    for k in progress(range(levels), "gradients", batch):
        found = torch.autograd.grad(loss(x0, torch.full((batch,), (k + 1) / levels, device=device), eps),
                                    list(net.parameters()))
        rows.append(F.normalize(torch.cat([v.flatten() for v in found]), dim=0))
    rows = torch.stack(rows)
    return (rows @ rows.T).cpu().double()


def load_unified(path, device):
    """A network with one decoder, and its configuration, of a checkpoint of multistage.py. Raises OSError or ValueError
    with one line."""
    if not path:
        raise ValueError("gradient needs --checkpoint of a network with one decoder: multistage.py --train --widths 32")
    saved = load_checkpoint(path, "multistage")
    if len(saved["config"]["widths"]) > 1:
        raise ValueError(f"{path} has {len(saved['config']['widths'])} decoders: gradients are compared in a network "
                         "with one, trained with one of --widths")
    net = build_net(saved["config"])
    load_weights(net, saved["ema"], path)
    return net.to(device).eval(), saved["config"]


# ---------------------------------------------------------------------------------------------
# Other readings of Algorithms 1 and 2
# ---------------------------------------------------------------------------------------------
def last_crossing(t, similarity, alpha=ALPHA):
    """Eq. 7 as printed, the arg max: the largest tau at which the running mean of the similarity is at least alpha, be
    it below before (D2; ours: first_crossing)."""
    enough = similarity.cumsum(0) / torch.arange(1, len(t) + 1) >= alpha
    return float(t[int(enough.nonzero().max()) if enough.any() else 0])


@torch.no_grad()
def similarity_to_last(data, samples, eta=ETA, seed=CLUSTER_SEED):
    """Algorithm 1 as printed (D3): the shares of pixels (K,) in which eps*_t(x_t) agrees with eps*_1(x_1) of the same
    image and eps. The draws are those of similarity_to_ends, whose S1 is of eps*_1(x_t)."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, len(data), (samples,), generator=g)
    t = (T_FIRST + (1 - T_FIRST) * torch.rand(samples, generator=g, dtype=torch.float64)).sort().values
    found = []
    for i in progress(torch.arange(samples).split(250), "cluster", 250):
        x0, eps = data[index[i]], torch.randn(len(i), *data.shape[1:], generator=g).to(data)
        eps_t, eps_1 = (optimal_denoiser(x0 + s.view(-1, 1, 1, 1) * eps, 1.0, s, data)
                        for s in (sigma_of(t[i]).to(data), sigma_of(torch.ones(len(i))).to(data)))
        found.append(((eps_t - eps_1).abs() <= eta).flatten(1).float().mean(1).cpu())
    return torch.cat(found).double()


def algorithm1_readings(data, samples=SAMPLES):
    """{reading: [t1, t2]}, ours first. Eq. 8 is Eq. 7 seen from t = 1. data (N, C, R, R), floats."""
    t, s0, s1 = similarity_to_ends(data, samples)
    sides, back = {"xt": s1, "x_1": similarity_to_last(data, samples)}, (1 - t).flip(0)
    return {f"{name}, eps*_1 of {of}": [rule(t, s0), 1 - rule(back, s.flip(0))] for of, s in sides.items()
            for name, rule in (("first crossing", first_crossing), ("arg max", last_crossing))}


def similarity_map_of_x0(data, samples, nodes, **options):
    """similarity_map of the x0_hat that belongs to eps*."""
    module = copy_of("multistage")
    module.optimal_denoiser = lambda xt, scale, sigma, data: xt - sigma * optimal_denoiser(xt, scale, sigma, data)
    return module.similarity_map(data, samples, nodes, **options)


def algorithm2_readings(data, n, samples=SAMPLES):
    """{reading: [t1 .. t_(n-1)]}, ours first: by the similarities of eps* (the text) or of its x0_hat (the official
    code), cut by either rule of similarity_cost. data (N, C, R, R), floats."""
    nodes, samples = torch.cat([T_FIRST + 0.05 * torch.arange(20), torch.ones(1)]).double(), max(1, samples // 20)
    maps = {"eps": similarity_map(data, samples, nodes), "x0": similarity_map_of_x0(data, samples, nodes)}
    return {f"{rule}, {of}": [float(nodes[c - 1] + nodes[c]) / 2 for c in best_runs(similarity_cost(s, mean), n)]
            for mean, rule in enumerate(("least sum of 1 - S", "largest mean of S")) for of, s in maps.items()}


# ---------------------------------------------------------------------------------------------
# Widths of the decoders (Eq. 23)
# ---------------------------------------------------------------------------------------------
def tailored_widths(edges, widths=tuple(CONFIG["network"]["widths"][0]), edges_of_widths=PAPER_EDGES):
    """Decoder widths for the stages between `edges`: over each stage the mean, by length, of `widths`, which belong to
    the stages of `edges_of_widths`; in multiples of 4. Three stages keep the three widths (D13)."""
    if len(edges) + 1 == len(widths):
        return list(widths)
    found, known = [], [0, *edges_of_widths, 1]
    for a, b in itertools.pairwise([0, *edges, 1]):
        shares = [max(0, min(b, d) - max(a, c)) for c, d in itertools.pairwise(known)]
        found.append(max(4, round(sum(s * w for s, w in zip(shares, widths)) / (b - a) / 4) * 4))
    return found


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------
def cluster(method, n, data=None, samples=SAMPLES, affinity=None):
    """Edges [t1 .. t_(n-1)] of n stages, and {reading: edges} of the paper's own methods. data (N, C, R, R), floats:
    of optimal and optimal2; affinity: of gradient. Raises ValueError for wrong data, or if the stages are not n."""
    if method in ("optimal", "optimal2") and len(data) < 2:
        raise ValueError("clustering needs at least two images: for one, every noise level is alike")
    readings = {}
    if method == "optimal" and n == 3:
        readings = algorithm1_readings(data, samples)
    elif method in ("optimal", "optimal2"):
        readings = algorithm2_readings(data, n, samples)
    edges = next(iter(readings.values())) if readings else go_edges(
        level_affinity(method) if affinity is None else affinity, n)
    edges = [round(edge, 4) for edge in edges]
    if any(a >= b for a, b in itertools.pairwise([0, *edges, 1])):
        raise ValueError(f"'{method}' finds edges {edges} for these images, not {n} stages: take more images")
    return edges, {name: [round(edge, 4) for edge in found] for name, found in readings.items()}


def main(argv=None):
    p = argparse.ArgumentParser("multistage_clusterings.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        raise ValueError(f"{message} (python variants/multistage_clusterings.py --help)")

    p.error = fail
    p.add_argument("method", choices=METHODS)
    p.add_argument("--stages", type=int, default=3, help="2 to 20 [3]")
    p.add_argument("--data", help="data set or folder [fashion10k; gradient: the checkpoint's]")
    p.add_argument("--res", type=int, default=32, help="side to which a folder's images are reduced [32]")
    p.add_argument("--samples", type=int, default=SAMPLES, help=f"K of Algorithms 1 and 2 [{SAMPLES}]")
    p.add_argument("--unit-range", action="store_true", help="optimal, optimal2: images in [0, 1]")
    p.add_argument("--checkpoint", default="", help="gradient: of a network with one decoder")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    p.add_argument("--out", default="runs/multistage", help="folder of the plan [runs/multistage]")
    args = p.parse_args(argv)
    if not 2 <= args.stages <= 20 or args.samples < 20:
        fail(f"--stages {args.stages}, --samples {args.samples}: 2 to 20 stages, at least 20 samples")
    if args.unit_range and args.method not in ("optimal", "optimal2") or args.checkpoint and args.method != "gradient":
        fail("--unit-range goes with optimal and optimal2, --checkpoint with gradient")
    begun, device, x, affinity = time.time(), start_device(args.device)[0], None, None
    if args.method == "gradient":
        net, config = load_unified(args.checkpoint, device)
        args.data, args.res = args.data or config["data"], config["res"]
    name = args.data or "fashion10k"
    if args.method not in ("time", "snr"):
        x = to_float(load_images(name, args.res)[0]).to(device)
        x = (x + 1) / 2 if args.unit_range else x
    if args.method == "gradient":
        if x.shape[1:] != (config["channels"], config["res"], config["res"]):
            fail(f"--data {name} has images of {list(x.shape[1:])}, {args.checkpoint} was trained on others")
        affinity = gradient_affinity(net, lambda *batch: training_loss(net, config, *batch), x)
    edges, readings = cluster(args.method, args.stages, x, args.samples, affinity)
    sigmas = [round(float(sigma_of(edge)), 4) for edge in edges]
    path = Path(args.out) / f"plan_{args.method}_{args.stages}{'_unit' * args.unit_range}.json"
    save_json(path, dict(
        clustering=args.method, n=args.stages, edges=edges, sigmas=sigmas, readings=readings, samples=args.samples,
        data=name, images=None if x is None else len(x), unit_range=args.unit_range, checkpoint=args.checkpoint,
        seconds=round(time.time() - begun, 2)))
    for reading, found in readings.items():
        print(f"  {reading}: {found}")
    print(f"{args.method}: edges {edges}, sigma {sigmas}, {time.time() - begun:.1f} s: {path}")
    print(f"python multistage.py --train --edges {' '.join(map(str, edges))} --widths "
          f"{' '.join(map(str, tailored_widths(edges)))}")


if __name__ == "__main__":
    run_main(main, "multistage_clusterings")
