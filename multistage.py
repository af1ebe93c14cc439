"""Multistage: Improving Efficiency of Diffusion Models via Multi-Stage Framework and Tailored Multi-Decoder
Architectures (CVPR 2024, arXiv 2312.09181).

Denoising is not one task: next to pure noise a small network is enough, next to the data it takes a large one, and the
gradients of the two disturb each other. So cut off the two ends of the noise levels in which the best possible denoiser
hardly changes; give all stages one encoder and each stage a decoder of its own, as wide as it needs. The best possible
denoiser of a data set is known in closed form: the stages are found before anything is trained, in seconds.

    python multistage.py --sample                            # 64 images from the shipped weights, in seconds
    python multistage.py --sample --checkpoint weights/multistage/unified.pt       # off switch: a plain U-Net
    python multistage.py --search --stages 4 --images emoji  # the edges of four stages of other images
    python multistage.py --train --out runs/mine             # clusters first, then trains
    python multistage.py --train --widths 32 --out runs/off  # off switch: one decoder
    torchrun --nproc_per_node=2 -- multistage.py --train     # two processes, or two GPUs

Symbols: t in [0, 1] -> t; s_t, sigma_t -> scale_of(sigma), sigma_of(t): xt = scale (x0 + sigma eps); eps*_t ->
optimal_denoiser; D, S -> similarity; eta, alpha, K -> ETA, ALPHA, SAMPLES; t_1, t_2 -> edges; Interval 0 -> stage 0,
next to the data; NFE -> nfe; lambda -> lam = -log sigma. METHOD: there because of the paper. (D1), (D2), ...: where the
paper leaves something open, or we differ: results/multistage/README.md.
"""
import copy
import itertools
import math
import time
from bisect import bisect_right
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (LossModule, autocast, begin_run, gather, load_images, load_weights, locked, noise_for,
                    parse_config, progress, restore, run_main, save_grid, save_json, save_run, save_samples,
                    start_device, to_float, to_uint8)

SCRIPT = "multistage"
BETA_D, BETA_MIN = 19.9, 0.1   # VP schedule (Sec. 5; Song et al.)
T_FIRST = 1e-3                 # eps_t: smallest t of the clustering (Sec. 5)
T_TRAIN = 1e-5                 # smallest t of the training (the official code)
T_END = 1e-4                   # last t of DPM-Solver (D12)
ETA, ALPHA = 2 / 256, 0.9      # thresholds of Algorithm 1 (Sec. 5)
SAMPLES = 10_000               # K of Algorithms 1 and 2 (D4; the paper: 50,000)
SHORTEST = 0.02                # length of a stage, below which a clustering is refused (D20)
CLUSTER_SEED = 10 ** 9         # far from usual seeds
SHIPPED = {}                   # weights of a method, if not weights.pt
WARMUP, DECAY = 200, 0.3       # steps in which the learning rate rises; last share of all, in which it falls

# Every entry is an option: its default, what is allowed, what it is.
CONFIG = {
    "run": {
        "out":        (f"runs/{SCRIPT}", None, "folder of a run: checkpoint, log, plans, samples"),
        "checkpoint": ("", None, "weights to search and sample; default: the run in --out, else the shipped ones"),
        "device":     ("auto", ("auto", "cpu", "cuda", "mps"), "auto, cpu, cuda, mps"),
        "precision":  ("auto", ("auto", "fp32", "bf16"), "auto: bf16 in training if the hardware has it, else fp32"),
        "seed":       (0, (0, 10 ** 12), "of the training; of the first image"),
        "n":          (64, (1, 10 ** 7), "images of --sample"),
    },
    "network": {
        "res":        (32, (4, 1024), "side R to which a folder's images are resized"),
        "ch":         (32, (4, 1024), "base width"),
        "mult":       ([1, 2, 4], (1, 64), "width of each level, in base widths"),
        "blocks":     (1, (1, 16), "residual blocks per level"),
        "attention":  ([2], (-1, 16), "levels with attention beside the bottom; -1: none"),
        "patch":      (1, (1, 8), "pixels per side that are folded into channels"),
        "widths":     ([48, 32, 12], (4, 1024), "METHOD: base width of each stage's decoder (D13); one: off switch"),
        "edges":      ([0.0], (0, 1), "METHOD: of the stages, one less than widths; 0: clustered from the images"),
    },
    "training": {
        "data":       ("fashion10k", None, "fashion10k, fashion, cifar10, emoji or a folder of images"),
        "init":       ("", None, "checkpoint whose averaged weights are trained further"),
        "batch":      (128, (1, 10 ** 6), "images per step, all processes together"),
        "lr":         (1e-3, (1e-9, 1), "Adam's learning rate"),
        "iters":      (5000, (1, 10 ** 8), "steps"),
        "ema":        (0.999, (0, 1), "decay of the averaged weights"),
        "flip":       (0, (0, 1), "1: random horizontal flips"),
        "save_every": (500, (1, 10 ** 8), "steps between checkpoints"),
        "shares":     ([1.0], (0, 1), "METHOD: each stage's share of the draws of t, stage 0 first; 1: equal (D8)"),
    },
    "method": {
        "nfe":        (20, (1, 1000), "evaluations of the network"),
        "order":      (3, (1, 3), "of DPM-Solver"),
    },
    "search": {
        "stages":     (3, (2, 20), "into how many to cluster"),
        "images":     ("", None, "data set or folder to cluster; default: the checkpoint's"),
    },
}


# ---------------------------------------------------------------------------------------------
# Network: DDPM's U-Net, compact
# ---------------------------------------------------------------------------------------------
def timestep_embedding(t, dim):
    """(B,) -> (B, dim): sine and cosine of t at `dim / 2` frequencies from 1 to 1 / 10000 (DDPM)."""
    frequency = torch.logspace(0, -4, dim // 2, device=t.device)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    """norm - SiLU - conv, plus the time embedding, norm - SiLU - conv, plus the input."""

    def __init__(self, c_in, c_out, c_emb, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-6), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=1e-6), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, h, emb):
        x = self.conv1(F.silu(self.norm1(h)))
        x = x + self.emb(emb)[:, :, None, None]
        return self.skip(h) + self.conv2(F.silu(self.norm2(x)))


class Attention(nn.Module):
    """Self-attention over the pixels, one head."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(groups, c, eps=1e-6), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, h):
        q, k, v = self.qkv(self.norm(h)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        x = F.scaled_dot_product_attention(q, k, v)                            # (B, 1, H W, C)
        return h + self.out(x[:, 0].transpose(1, 2).reshape(h.shape))


def down(c):
    """Half the resolution by a strided convolution; padded on the right and below, as in the original DDPM."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2))


def up(c):
    """Twice the resolution: pixels repeated, then a convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1))


def run_layers(layers, h, emb):
    """The layers in turn."""
    for layer in layers:
        h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
    return h


class Encoder(nn.Module):
    """Input, way down and bottom: xt (B, C, H, W) -> h, and what each step down gave, of `widths` channels."""

    def __init__(self, channels, ch, mult, blocks, attention, patch):
        super().__init__()
        groups, c_emb = min(32, ch // 4), 4 * ch
        self.patch = patch
        self.conv_in = nn.Conv2d(channels * patch ** 2, ch, 3, padding=1)
        c, self.widths, self.down = ch, [ch], nn.ModuleList()
        for level, m in enumerate(mult):
            for _ in range(blocks):
                attend = [Attention(ch * m, groups)] if level in attention else []
                self.down.append(nn.ModuleList([ResBlock(c, ch * m, c_emb, groups), *attend]))
                c = ch * m
                self.widths.append(c)
            if level < len(mult) - 1:
                self.down.append(nn.ModuleList([down(c)]))
                self.widths.append(c)
        self.mid = nn.ModuleList([ResBlock(c, c, c_emb, groups), Attention(c, groups), ResBlock(c, c, c_emb, groups)])

    def forward(self, xt, emb):
        skips = [self.conv_in(F.pixel_unshuffle(xt, self.patch))]
        for layers in self.down:
            skips.append(run_layers(layers, skips[-1], emb))
        return run_layers(self.mid, skips[-1], emb), skips


class Decoder(nn.Module):
    """Way up and output: h, skips -> (B, C, H, W); every step up takes one skip, the last one first."""

    def __init__(self, channels, widths, ch, mult, blocks, attention, patch):
        super().__init__()
        groups, c_emb = common_groups(ch, widths[0]), 4 * widths[0]            # METHOD: widths[0] is the encoder's ch
        self.patch = patch
        c, widths, self.up = widths[-1], list(widths), nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for block in range(blocks + 1):
                attend = [Attention(ch * m, groups)] if level in attention else []
                rise = [up(ch * m)] if level > 0 and block == blocks else []
                self.up.append(nn.ModuleList([ResBlock(c + widths.pop(), ch * m, c_emb, groups), *attend, *rise]))
                c = ch * m
        self.norm_out, self.conv_out = nn.GroupNorm(groups, c, eps=1e-6), nn.Conv2d(c, channels * patch ** 2, 3, 1, 1)

    def forward(self, h, skips, emb):
        for layers, skip in zip(self.up, reversed(skips)):
            h = run_layers(layers, torch.cat([h, skip], dim=1), emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


class UNet(nn.Module):
    """v_hat (B, C, H, W) (D19) from xt (B, C, H, W), 999 t (B,) (the official label) and stage, an int or int64 (B,). H
    and W are any multiples of patch * 2^(levels - 1). METHOD: Sec. 3.1: one encoder, with the embedding of t and the
    bottom (D9), for all stages; for each a decoder of the base width in `widths`, stage 0 first; [ch]: plain U-Net."""

    def __init__(self, channels, ch, mult, blocks, attention, patch, widths):              # METHOD: widths
        super().__init__()
        self.ch = ch
        self.emb = nn.Sequential(nn.Linear(ch, 4 * ch), nn.SiLU(), nn.Linear(4 * ch, 4 * ch))
        self.encoder = Encoder(channels, ch, mult, blocks, attention, patch)
        self.decoders = nn.ModuleList(                         # METHOD: instead of one `decoder` of width ch
            Decoder(channels, self.encoder.widths, width, mult, blocks, attention, patch) for width in widths)  # METHOD

    def forward(self, xt, t, stage=0):                         # METHOD: stage
        emb = self.emb(timestep_embedding(t, self.ch))
        emb = F.silu(emb)
        h, skips = self.encoder(xt, emb)                       # METHOD

        def decode(s, h, emb, *skips):                         # METHOD: instead of self.decoder(h, skips, emb)
            return self.decoders[s](h, skips, emb)             # METHOD

        return by_stage(stage, len(self.decoders), decode, h, emb, *skips)     # METHOD


def build_net(config):
    """The network of a configuration, on the CPU."""
    net = UNet(config["channels"], *(config[k] for k in ("ch", "mult", "blocks", "attention", "patch")),
               widths=config["widths"])                        # METHOD: a decoder each
    return net.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------
# Method: noise levels and stages (Sec. 3.1), the optimal denoiser and its clustering (Sec. 3.2)
# ---------------------------------------------------------------------------------------------
def sigma_of(t):
    """VP: sigma_t of xt = s_t (x0 + sigma_t eps), for t in [0, 1] (float or tensor); float64. s_t is
    scale_of(sigma_t), log SNR = -2 log sigma_t. The paper's text has the two garbled (D1)."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return torch.expm1(BETA_D * t ** 2 / 2 + BETA_MIN * t).sqrt()


def scale_of(sigma):
    """VP: s_t, which keeps the variance: 1 / sqrt(1 + sigma_t^2)."""
    return (1 + sigma ** 2) ** -0.5


def t_of(sigma):
    """Inverse of sigma_of: the t of the same signal-to-noise ratio; float64 (footnote 4)."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return ((BETA_MIN ** 2 + 2 * BETA_D * torch.log1p(sigma ** 2)).sqrt() - BETA_MIN) / BETA_D


def stage_of(t, edges):
    """METHOD: Sec. 3.1: the stage of a noise level: 0 for [0, t1), 1 for [t1, t2), ... t: a float gives an int; a float
    tensor (B,) gives int64 (B,), each sample its own. Raises ValueError for a tensor of integers."""
    if isinstance(t, torch.Tensor):
        if not t.is_floating_point():
            raise ValueError("stage_of takes t in [0, 1] as a float, not the number of a step")
        return torch.bucketize(t, torch.tensor(edges, dtype=t.dtype, device=t.device), right=True)
    return bisect_right(edges, t)


def common_groups(ch, width):
    """METHOD: groups of a decoder's norms, which see multiples of the widths' gcd (D11): at most 32, of 4 or more."""
    return max(g for g in range(1, 33) if math.gcd(ch, width) % g == 0 and 4 * g <= min(ch, width))


def by_stage(stage, n, run, *inputs):
    """METHOD: Sec. 3.1: each sample by its own stage. stage: an int for the whole batch, or int64 (B,), best on the CPU
    and sorted (draw_batch). run(s, *inputs) -> (b, ...) gets those samples of the inputs (B, ...) that are of stage s;
    its results are put back in order. Raises ValueError for a stage outside 0 .. n - 1."""
    stages = [stage] if isinstance(stage, int) else stage.tolist()
    if not 0 <= min(stages) <= max(stages) < n:
        raise ValueError(f"no decoder for stage {min(stages)} or {max(stages)}: the network has {n}")
    if isinstance(stage, int):
        return run(stage, *inputs)
    order = None if stages == sorted(stages) else stage.argsort()
    counts = [stages.count(s) for s in range(n)]
    parts = zip(*((v if order is None else v[order]).split(counts) for v in inputs))
    out = torch.cat([run(s, *part) for s, part in enumerate(parts) if counts[s]])
    return out if order is None else out[order.argsort()]


@torch.no_grad()
def optimal_denoiser(xt, scale, sigma, data, part=2 ** 22):
    """METHOD: Proposition 1: eps*(xt), the best eps_hat there is for the data set itself.

    xt (B, ...) at scale and sigma ((B,) or floats) of any kernel N(scale x0, scale^2 sigma^2 I); data (N, ...).
    Returns (B, ...). xt / scale - x0 is Gaussian, so the weights of the images are the softmax of
    -|xt / scale - y|^2 / 2 sigma^2, and two matrix products do it all. The largest argument is subtracted before the
    division by sigma^2, after which they are in the millions. Memory: `part` weights at a time."""
    scale, sigma = (torch.as_tensor(v).to(xt).expand(len(xt))[:, None] for v in (scale, sigma))
    y = data.flatten(1).to(xt)
    mean = y.mean(0)
    y = y - mean                                               # smaller numbers, smaller rounding errors
    half, rows = y.square().sum(1) / 2, max(1, part // len(y))
    xhat, means = xt.flatten(1) / scale, []
    for x, std in zip(xhat.split(rows), sigma.split(rows)):
        score = torch.addmm(half, x - mean, y.T, beta=-1)                      # |x|^2 / 2 is the same for all y
        means.append(((score - score.amax(1, True)) / std ** 2).softmax(1) @ y + mean)
    return ((xhat - torch.cat(means)) / sigma).view_as(xt)


@torch.no_grad()
def similarity_to_ends(data, samples, eta=ETA, seed=CLUSTER_SEED):
    """METHOD: Algorithm 1, lines 3-9: similarity of eps*_t to eps*_0 and to eps*_1, sample by sample.

    data (N, C, R, R). Returns t (K,), sorted, and the shares of pixels S0, S1 (K,) that agree within eta. eps*_0 is eps
    itself: at t = 0 only the own image is left. eps*_1 is what the denoiser of pure noise, which knows only the mean
    image, makes of xt, as in the official code; the text takes it at x_1 (D3)."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, len(data), (samples,), generator=g)
    t = (T_FIRST + (1 - T_FIRST) * torch.rand(samples, generator=g, dtype=torch.float64)).sort().values
    mean, found = data.mean(0), []
    for i in progress(torch.arange(samples).split(250), "cluster", 250):
        x0, sigma = data[index[i]], sigma_of(t[i]).to(data).view(-1, 1, 1, 1)
        eps = torch.randn(x0.shape, generator=g).to(data)
        xt = x0 + sigma * eps                                  # scale 1: any scale gives the same
        eps_t = optimal_denoiser(xt, 1.0, sigma.flatten(), data)
        found.append(torch.stack([((eps_t - other).abs() <= eta).flatten(1).float().mean(1).cpu()
                                  for other in (eps, (xt - mean) / sigma)]))
    return t, *torch.cat(found, 1).double()


def first_crossing(t, similarity, alpha=ALPHA):
    """METHOD: Eq. 7 (Algorithm 1): the tau at which the mean of the similarity (K,) over all t (K,), rising, up to tau
    falls below alpha for the first time (D2)."""
    below = similarity.cumsum(0) / torch.arange(1, len(t) + 1) < alpha
    k = int(below.int().argmax()) if below.any() else len(t)                   # samples before the first fall
    return float(t[max(k - 1, 0)])


@torch.no_grad()
def similarity_map(data, samples, nodes, eta=ETA, seed=CLUSTER_SEED):
    """METHOD: Eq. 6: S(t_a, t_b) between all `nodes` (G,), float64 (G, G): mean over `samples` images of the share of
    pixels in which eps*_ta and eps*_tb agree within eta; each image with one eps at all nodes (D4)."""
    g, G = torch.Generator().manual_seed(seed), len(nodes)
    total = torch.zeros(G, G, dtype=torch.float64)
    index = torch.randint(0, len(data), (samples,), generator=g)
    for i in progress(index.split(100), "similarity", 100):
        x0, eps = data[i], torch.randn(len(i), *data.shape[1:], generator=g).to(data)
        found = [optimal_denoiser(x0 + float(sigma) * eps, 1.0, sigma, data) for sigma in sigma_of(nodes)]
        for a, one in enumerate(found):
            near = [((one - other).abs() <= eta).float().mean() for other in found[a:]]
            total[a, a:] += torch.stack(near).cpu() * len(i)
    return (total.triu() + total.triu(1).T) / samples


def best_partition(similarity, n):
    """METHOD: Algorithm 2, line 9: the n - 1 indices that cut 0 .. G-1 into n runs with the least sum of 1 - S over the
    squares of the runs: Eq. 22 with the distance 1 - S for S (D5). Exact, by dynamic programming. similarity (G, G)."""
    G = len(similarity)
    s = F.pad((1 - similarity).cumsum(0).cumsum(1), (1, 0, 1, 0))
    i, j = torch.arange(G)[:, None], torch.arange(G + 1)
    cost = s[j, j] - s[i, j] - s[j, i] + s[i, i]               # cost[i, j]: of the run i .. j-1
    cost = cost.masked_fill(j <= i, math.inf)
    best, froms = cost[0], []                                  # best[j]: of 0 .. j-1 in the runs so far
    for _ in range(n - 1):
        best, i = (best[:G, None] + cost).min(0)
        froms.append(i)
    cuts = [G]
    for i in reversed(froms):
        cuts.insert(0, int(i[cuts[0]]))
    return cuts[:-1]


def cluster_timesteps(method, n, data, samples=SAMPLES):
    """METHOD: Sec. 3.2: edges [t1 .. t_(n-1)] of n stages, and a report (a dict of what was found).

    method: optimal: Algorithm 1 (n = 3) or 2 (App. B); optimal2: 2 for any n. data (N, C, R, R): floats as the network
    sees them, images in [-1, 1]. Raises ValueError for other data and if a stage would be shorter than SHORTEST."""
    if not data.is_floating_point() or not data.abs().max() < 100 or data.min() >= 0:
        raise ValueError(f"data of {data.dtype}, {data.min()} .. {data.max()}: give floats in [-1, 1], not [0, 1]")
    if len(data) < 2 or not 2 <= n <= 20 or method not in ("optimal", "optimal2"):
        raise ValueError(f"{method}, {len(data)} images, {n} stages: optimal(2), at least two images, 2 to 20 stages")
    if method == "optimal" and n == 3:                         # Algorithm 1; its Eq. 8 is Eq. 7 seen from t = 1
        t, s0, s1 = similarity_to_ends(data, samples)
        edges = [first_crossing(t, s0), 1 - first_crossing((1 - t).flip(0), s1.flip(0))]
        bins = [v.tensor_split(min(100, samples)) for v in (t, s0, s1)]
        found = dict(samples=samples, curves=[[round(float(v.mean()), 5) for v in row] for row in zip(*bins)])
    else:                                                      # Algorithm 2: each image at all 21 levels (D4)
        nodes, samples = torch.cat([T_FIRST + 0.05 * torch.arange(20), torch.ones(1)]).double(), max(1, samples // 20)
        similarity = similarity_map(data, samples, nodes)
        edges = [float(nodes[c - 1] + nodes[c]) / 2 for c in best_partition(similarity, n)]
        found = dict(samples=samples, nodes=nodes.tolist(), map=[[round(v, 4) for v in s] for s in similarity.tolist()])
    edges = [round(edge, 4) for edge in edges]
    if min(b - a for a, b in itertools.pairwise([0, *edges, 1])) < SHORTEST:
        raise ValueError(f"clustering {len(data)} images into {n} stages gives edges {edges}, a stage shorter than "
                         f"{SHORTEST}: more images, fewer stages (--stages; in training --widths), or --edges")
    return edges, dict(clustering=method, n=n, edges=edges, **found)


# ---------------------------------------------------------------------------------------------
# Data and loss
# ---------------------------------------------------------------------------------------------
def check_config(config):
    """Raises ValueError if the sizes in config do not fit each other."""
    multiple = config["patch"] * 2 ** (len(config["mult"]) - 1)
    if config["res"] % multiple:
        raise ValueError(f"the resolution {config['res']} must be a multiple of {multiple} (--mult, --patch)")
    n, edges = len(config["widths"]), config["edges"]
    if edges != [0.0] and (len(edges) != n - 1 or any(a >= b for a, b in itertools.pairwise([0, *edges, 1]))):
        raise ValueError(f"--edges {' '.join(map(str, edges))}: {n} decoders (--widths) need {n - 1} edges that rise "
                         "strictly inside (0, 1)")
    if config["shares"] != [1.0] and (n == 1 or len(config["shares"]) != n or not any(config["shares"])):
        raise ValueError(f"--shares: one for each of {n} decoders (--widths), if there are several, and not all 0")


def load_data(config):
    """Images uint8 (N, C, R, R) and classes (N,) of --data; notes their shape, METHOD: and the edges, in config."""
    x, y, _ = load_images(config["data"], config["res"])
    config.update(channels=x.shape[1], res=x.shape[-1])
    check_config(config)
    if config["edges"] == [0.0]:                               # METHOD: not given
        n = len(config["widths"])
        config["edges"] = cluster(config, x, n, start_device(config["device"])[0]) if n > 1 else []
    return x, y


def draw_batch(config, x, y, step):
    """Every random input of a training step, on the CPU, for the whole batch."""
    B, bounds = config["batch"], torch.tensor([T_TRAIN, *config["edges"], 1.0])
    i = torch.randint(0, len(x), (B,))
    x0 = to_float(x[i])
    if config["flip"]:
        x0 = torch.where(torch.rand(B, 1, 1, 1) < 0.5, x0.flip(-1), x0)
    shares = torch.tensor(config["shares"]).expand(len(bounds) - 1)
    stage = shares.multinomial(B, replacement=True)            # METHOD: of all stages in every batch (D8)
    t = bounds[stage].lerp(bounds[stage + 1], torch.rand(B))                   # METHOD: uniform in its stage
    return x0, t.sort().values, torch.randn_like(x0)           # METHOD: sorted: stage by stage (by_stage)


def training_loss(net, config, x0, t, eps):
    """Mean squared error of v_hat, v = s (eps - sigma x0) (D19). METHOD: by the decoder of each sample's own stage."""
    level = t.cpu()                                            # float64 from here, and stages are counted there
    sigma = sigma_of(level).view(-1, 1, 1, 1)
    scale, sigma = scale_of(sigma).to(x0), sigma.to(x0)
    v_hat = net(scale * (x0 + sigma * eps), 999 * t, stage_of(level, config["edges"]))
    return F.mse_loss(v_hat.float(), scale * (eps - sigma * x0))


def preview(net, config, device):
    """32 images of a network in training, by ten passes."""
    return generate(net, config, dict(nfe=10, order=3), range(32), device)


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------
def solver_orders(nfe, order):
    """Orders of DPM-Solver's singlestep steps that spend `nfe` evaluations (DPM-Solver-fast: 20 = 6 x 3 + 2)."""
    if nfe < 1:
        raise ValueError(f"{nfe} evaluations: at least one is needed")
    if order == 3:
        tail = {0: [2, 1], 1: [1], 2: [2]}[nfe % 3]
        return [3] * ((nfe - sum(tail)) // 3) + tail
    return [order] * (nfe // order) + [1] * (nfe % order)


def dpm_solver_step(eps_model, x, lam, lam_next, order):
    """DPM-Solver-1, -2 or -3 from lambda to lambda_next, lambda = -log sigma, in x = xt / s_t, for which the ODE is
    dx = eps dsigma. eps_model(x, lambda)."""
    h, sigma = lam_next - lam, lambda v: math.exp(-v)
    eps = eps_model(x, lam)
    if order == 1:
        return x - sigma(lam_next) * math.expm1(h) * eps
    r1, r2 = (1 / 3, 2 / 3) if order == 3 else (1 / 2, None)
    lam1 = lam + r1 * h
    eps1 = eps_model(x - sigma(lam1) * math.expm1(r1 * h) * eps, lam1)
    if order == 2:
        return x - sigma(lam_next) * math.expm1(h) * (eps + (eps1 - eps) / (2 * r1))
    lam2, phi = lam + r2 * h, math.expm1(r2 * h)
    eps2 = eps_model(x - sigma(lam2) * (phi * eps + r2 / r1 * (phi / (r2 * h) - 1) * (eps1 - eps)), lam2)
    phi = math.expm1(h)
    return x - sigma(lam_next) * (phi * eps + (phi / h - 1) / r2 * (eps2 - eps))


@torch.no_grad()
def dpm_solver_sample(eps_model, xt, nfe=20, order=3, t_end=T_END):
    """DPM-Solver, singlestep, noise prediction: steps even in lambda (log SNR / 2) from t = 1 to t_end.

    eps_model(xt, t) -> eps_hat, t a float, the same for the batch; xt (B, C, H, W): N(0, 1) at t = 1. The result is at
    t_end: no last step to clean data, nothing clipped. METHOD: each evaluation, also those inside a step, is of its own
    t and so of its own stage; no step is shortened at an edge."""
    def at(x, lam):
        sigma = math.exp(-lam)
        return eps_model(x * scale_of(sigma), min(float(t_of(sigma)), 1.0))

    first, last = -math.log(sigma_of(1.0)), -math.log(sigma_of(t_end))
    orders, x = solver_orders(nfe, order), xt / scale_of(float(sigma_of(1.0)))
    for k, p in enumerate(orders):
        lam, lam_next = (first + (last - first) * i / len(orders) for i in (k, k + 1))
        x = dpm_solver_step(at, x, lam, lam_next, p)
    return x * scale_of(float(sigma_of(t_end)))


def model_of(net, config):
    """The network as an eps_model(xt, t) -> eps_hat, in parts of 256 images of 32x32; METHOD: in the stage of t."""
    def eps_model(xt, t):
        eps_hat, part = [], max(1, 2 ** 18 // xt.shape[-1] ** 2)
        stage, sigma = stage_of(t, config["edges"]), float(sigma_of(t))
        for x in xt.split(part):
            with autocast(xt.device, config["precision"]):
                v_hat = net(x.contiguous(memory_format=torch.channels_last),
                            torch.full((len(x),), 999 * t, device=x.device), stage)
            eps_hat.append(scale_of(sigma) * (v_hat.float() + sigma * x))      # (D19)
        return torch.cat(eps_hat)
    return eps_model


def generate(net, config, plan, seeds, device):
    """Images (n, C, R, R) of a plan, one for each seed."""
    noise = noise_for(seeds, (config["channels"], config["res"], config["res"])).to(device)
    return dpm_solver_sample(model_of(net, config), noise, plan["nfe"], plan["order"])


def sample(net, config, plan, seeds, device):
    """uint8 images (n, C, R, R) on the CPU, seed by seed: seed i makes image i, whatever the batch."""
    if not len(seeds):                                         # a process without a share of them
        return sample(net, config, plan, [0], device)[:0]
    batches = torch.tensor(list(seeds)).split(16 if str(device) == "cpu" else 250)
    return torch.cat([to_uint8(generate(net, config, plan, batch.tolist(), device)).cpu()
                      for batch in progress(batches, "sample", len(batches[0]))])


# ---------------------------------------------------------------------------------------------
# Search: the edges of the stages (Sec. 3.2)
# ---------------------------------------------------------------------------------------------
def cluster(config, x, n, device):
    """Edges of n stages for the images x (uint8), printed; what was found is written into --out."""
    begun, path = time.time(), Path(config["out"]) / f"plan_optimal_{n}.json"
    edges, plan = cluster_timesteps("optimal", n, to_float(x).to(device))
    plan.update(data=config["data"], images=len(x), sigmas=[round(float(sigma_of(edge)), 4) for edge in edges],
                seconds=round(time.time() - begun, 2))
    save_json(path, plan)
    print(f"{n} stages of {config['data']}: edges {edges}, sigma {plan['sigmas']}, {plan['seconds']} s: {path}")
    return edges


def search(net, config, device):
    """METHOD: Sec. 3.2: clusters the noise levels of --images into --stages; what was found is written into --out. The
    plan that is returned, and sampled, has the stages that the network was trained with."""
    config = dict(config, data=config["images"] or config["data"])
    cluster(config, load_images(config["data"], config["res"])[0], config["stages"], device)
    return make_plan(net, config, device)


def describe(plan):
    """A plan in words, as --sample prints it."""
    return (f"DPM-Solver-{plan['order']}, {plan['nfe']} evaluations, {' + '.join(map(str, plan['by_stage']))} from the "
            f"data's stage on, edges {plan['edges']}, t {plan['taus']}")


def make_plan(net, config, device):
    """What is run: evaluations, order of DPM-Solver; from a run of it their t, and their number in each stage."""
    taus, edges = [], config["edges"]

    def note(xt, t):                                           # a model that only notes its t
        taus.append(t)
        return xt

    dpm_solver_sample(note, torch.zeros(1, 1, 1, 1), config["nfe"], config["order"])
    stages = [stage_of(t, edges) for t in taus]
    return dict(order=config["order"], nfe=config["nfe"], edges=edges, taus=[round(t, 6) for t in taus],
                by_stage=[stages.count(s) for s in range(len(edges) + 1)])


# ---------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------
def train(config, device, rank, world):
    """Trains for --iters steps, anew or from --init, or goes on (--resume); writes checkpoint.pt, weights.pt, log.jsonl
    and preview.png into --out. Returns the checkpoint's path.

    Every random draw of a step comes from a seed made of --seed and the step: a resumed run equals an uninterrupted
    one. Every process draws the whole batch and keeps its share: their number does not matter, up to rounding."""
    config, saved = begin_run(SCRIPT, config, CONFIG, device, world)
    out, (x, y), resume = Path(config["out"]), load_data(config), config["resume"]
    torch.manual_seed(config["seed"])
    net = build_net(config).to(device)
    if saved:
        load_weights(net, saved["net" if resume else "ema"], out if resume else config["init"], partial=not resume)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=config["lr"])
    if resume:
        load_weights(ema, saved["ema"], out)
        optimizer.load_state_dict(saved["optimizer"])
    model = LossModule(net, config, training_loss)
    model = DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    losses, begun, steps = [], time.time(), range(saved["step"] + 1 if resume else 1, config["iters"] + 1)
    with locked(out, rank):
        for step in progress(steps, "train", config["batch"], note=lambda: f"loss {float(loss):.4f}"):
            torch.manual_seed(config["seed"] * 10_000_019 + step)
            batch = [v[rank::world].to(device) for v in draw_batch(config, x, y, step)]
            with autocast(device, config["precision"]):
                loss = model(*batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            loss = loss.detach()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = config["lr"] * min(
                1, step / WARMUP, (config["iters"] + 1 - step) / (DECAY * config["iters"]))
            optimizer.step()
            with torch.no_grad():
                decay = min(config["ema"], step / (9 + step))
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
            losses.append(loss)
            if step % config["save_every"] == 0 or step == config["iters"]:
                save_run(SCRIPT, config, step, net, ema, optimizer, losses, begun, rank)
                if rank == 0:
                    save_grid(out / "preview.png", preview(ema, dict(config, precision="fp32"), device))
                losses, begun = [], time.time()
    return out / "checkpoint.pt"


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------
def load_net(config, device):
    """The averaged network of --checkpoint, else of the run in --out, else the shipped one; and the configuration with
    what the checkpoint decides."""
    net, config = restore(SCRIPT, CONFIG, config, check_config, build_net, SHIPPED)
    return net.to(device).eval().requires_grad_(False), config


def main():
    config = parse_config(SCRIPT, CONFIG, __doc__)
    device, rank, world = start_device(config["device"])
    if config["train"]:
        config["checkpoint"] = train(config, device, rank, world)
        dist.barrier() if world > 1 else None                  # until it is written
    if config["search"] or config["sample"]:
        net, config = load_net(config, device)
        plan = [(search if config["search"] else make_plan)(net, config, device) if rank == 0 else None]
        dist.broadcast_object_list(plan) if world > 1 else None
        print(f"plan: {describe(plan[0])}")
    if config["sample"]:
        begun, seeds = time.time(), range(config["seed"], config["seed"] + config["n"])
        images = gather(sample(net, config, plan[0], seeds[rank::world], device), world)
        if rank == 0:
            save_samples(config, images, seeds, time.time() - begun)


if __name__ == "__main__":
    run_main(main, SCRIPT)
