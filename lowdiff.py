"""LowDiff: Efficient Diffusion Sampling with Low-Resolution Condition (arXiv 2509.15342).

Few evaluations at full resolution are enough if a low-resolution image shows the way: make an 8x8 image, stop while
it is still noisy, make the 16x16 image with it as a condition, then the 32x32 one, each from its own noise. The 8x8
and 16x16 networks are the inside of the 32x32 U-Net with an entry and an exit of their own: one network, trained at
all resolutions in each step, as fast as a cascade and as small as its largest member.

    python lowdiff.py --sample                               # 64 images from the shipped weights, in seconds
    python lowdiff.py --sample --checkpoint weights/lowdiff/edm.pt          # off switch: plain EDM
    python lowdiff.py --sample --steps 18 12 5 --truncate 18 13 --sigma-min 0 0 0.3     # another plan: better (D23)
    python lowdiff.py --train --mult 1 1 1 --out runs/lowdiff               # 8 -> 16 -> 32, from scratch (D16)
    python lowdiff.py --train --stages 32 --mult 1 1 1 --out runs/edm       # off switch: EDM is one stage
    python lowdiff.py --search --sample                      # Appendix C: where to stop each stage, by FD
    torchrun --nproc_per_node=2 -- lowdiff.py --train        # two processes, or two GPUs

Symbols: res_1 < .. < res_n -> stages; y_i -> x0 at each of them; D -> x0_hat; sigma, e -> sigma, eps of the image; s,
e' -> s, eps_z of the condition z; N -> steps (Heun's, of a stage); K -> evaluations, --truncate (of the network, of the
2N - 1 there are). METHOD: there because of the paper. (D1), ...: it is silent, or we differ: results/lowdiff/README.md.
"""
import copy
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (LossModule, autocast, begin_run, extract, feature_stats, find_plan, frechet_distance, gather,
                    load_extractor, load_images, load_weights, locked, noise_for, parse_config, progress, restore,
                    run_main, save_grid, save_json, save_run, save_samples, start_device, to_float, to_uint8)

SCRIPT = "lowdiff"
SIGMA_DATA = 0.5               # EDM's, at every resolution (Sec. 4.1: settings retained, its "VP": D16; D9)
P_MEAN, P_STD, RHO = -1.2, 1.2, 7      # EDM: ln sigma of training is normal (Table 1); curvature of the levels (Eq. 5)
SIGMA_RANGE = (0.002, 80.0)    # of the first stage: EDM's (Table 10)
COND_RANGE = (0.01, 50.0)      # METHOD: of a conditioned stage (Table 10, D8)
# METHOD: steps N of each stage, evaluations K of each but the last (Tables 2, 3, 6, 7, 12; N of 3, 4 stages: D7).
SCHEDULES = {
    (32,): ([18], []), (16, 32): ([18, 9], [19]), (8, 16, 32): ([18, 12, 9], [18, 13]),
    (64,): ([40], []), (32, 64): ([40, 20], [49]), (8, 16, 32, 64): ([20, 20, 20, 20], [22, 23, 23]),
}
SHIFTS = (-4, -2, -1, 0, 1, 2, 4)                              # of K, in the search; Appendix C: -2 .. 2 (D22)
SEARCH_N, REFERENCE_N, SEARCH_SEED = 1000, 10_000, 2 * 10 ** 9     # samples, images compared with, first seed
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
        "stages":     ([8, 16, 32], (1, 1024), "METHOD: resolutions, low to high; 32: one stage, EDM (off switch)"),
        "labels":     (1, (0, 1), "1: the network is told the image's class"),
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
        "s_mean":     (["plan"], None, "METHOD: mean of ln s per conditioned stage; plan: where the one below stops"),
        "s_std":      (0.3, (0, 10), "METHOD: deviation of ln s (D3)"),
    },
    "method": {
        "steps":      ([0], (0, 1000), "Heun steps N of each stage, low to high; 0 alone: as searched, or the paper's"),
        "truncate":   ([0], (0, 10 ** 4), "METHOD: evaluations K of each stage but the last; 0 alone: as --steps"),
        "sigma_min":  ([0.0], (0, 10), "METHOD: last level above 0 of each stage, low to high; 0: the paper's"),
        "classes":    ([-1], (-1, 10 ** 6), "numbers of the classes to draw, in turn; -1: all"),
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

    def __init__(self, channels, ch, mult, blocks, attention, patch, stages):  # METHOD: resolutions, low to high
        super().__init__()
        groups, c_emb = min(32, ch // 4), 4 * ch
        self.patch = patch
        self.conv_in, self.first = nn.ModuleDict(), {}                         # METHOD: 3.3, an entry for each (D1)
        c, self.widths, self.down = ch, [ch], nn.ModuleList()
        for level, m in enumerate(mult):
            if (r := stages[-1] >> level) in stages:                           # METHOD: in place of the way down to it
                c_in = channels * (1 if r == stages[0] else 2)                 # METHOD: image; image and condition
                self.conv_in[str(r)] = nn.Conv2d(c_in * patch ** 2, c, 3, padding=1)       # METHOD
                self.first[r] = len(self.down)                                 # METHOD: the first step down after it
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
        r = xt.shape[-1]                                                       # METHOD
        skips = [self.conv_in[str(r)](F.pixel_unshuffle(xt, self.patch))]      # METHOD
        for layers in self.down[self.first[r]:]:                               # METHOD: 3.3, only the inner levels
            skips.append(run_layers(layers, skips[-1], emb))
        return run_layers(self.mid, skips[-1], emb), skips


class Decoder(nn.Module):
    """Way up and output: h, skips -> (B, C, H, W); every step up takes one skip, the last one first."""

    def __init__(self, channels, widths, ch, mult, blocks, attention, patch, stages):       # METHOD: stages
        super().__init__()
        groups, c_emb = min(32, ch // 4), 4 * ch
        self.patch = patch
        c, widths, self.up = widths[-1], list(widths), nn.ModuleList()
        self.norm_out, self.conv_out = nn.ModuleDict(), nn.ModuleDict()        # METHOD: 3.3, an exit for each (D1)
        for level, m in reversed(list(enumerate(mult))):
            for block in range(blocks + 1):
                attend = [Attention(ch * m, groups)] if level in attention else []
                rise = [up(ch * m)] if level > 0 and block == blocks else []
                self.up.append(nn.ModuleList([ResBlock(c + widths.pop(), ch * m, c_emb, groups), *attend, *rise]))
                c = ch * m
            if (r := stages[-1] >> level) in stages:                           # METHOD: with a norm of its own
                self.norm_out[str(r)] = nn.GroupNorm(groups, c, eps=1e-6)      # METHOD
                self.conv_out[str(r)] = nn.Conv2d(c, channels * patch ** 2, 3, padding=1)  # METHOD

    def forward(self, h, skips, emb):
        for layers, skip in zip(self.up, reversed(skips)):
            if skip is skips[0] and isinstance(layers[-1], nn.Sequential):      # METHOD: 3.3, out before the way up
                layers = layers[:-1]                                           # METHOD
            h = run_layers(layers, torch.cat([h, skip], dim=1), emb)
        r = str(h.shape[-1] * self.patch)                                      # METHOD: 3.3, by its own exit
        return F.pixel_shuffle(self.conv_out[r](F.silu(self.norm_out[r](h))), self.patch)  # METHOD


class UNet(nn.Module):
    """F (B, C, r, r) of EDM's Eq. 7 for each r in `stages` (low to high, each twice the one before) from t (B,) and xt:
    the image (B, C, r, r), above the lowest stage image and condition (B, 2C, r, r). Level l works at R / (2^l patch);
    a resolution activates the levels from its own to the bottom. labels: number of classes, told by y (B,)."""

    def __init__(self, channels, ch, mult, blocks, attention, patch, labels=0, stages=(32,)):       # METHOD: stages
        super().__init__()
        self.ch = ch
        self.emb = nn.Sequential(nn.Linear(ch, 4 * ch), nn.SiLU(), nn.Linear(4 * ch, 4 * ch))
        self.encoder = Encoder(channels, ch, mult, blocks, attention, patch, stages)                           # METHOD
        self.decoder = Decoder(channels, self.encoder.widths, ch, mult, blocks, attention, patch, stages)      # METHOD
        if labels:
            self.label = nn.Embedding(labels, 4 * ch)
            nn.init.zeros_(self.label.weight)
        self.stages = list(stages)                             # METHOD: 3.3, resolution embedding (D2)
        if len(stages) > 1:                                    # METHOD
            self.resolution = nn.Embedding(len(stages), 4 * ch)            # METHOD
            nn.init.zeros_(self.resolution.weight)             # METHOD

    def forward(self, xt, t, y=None):
        if xt.shape[-1] not in self.stages or xt.shape[-2] != xt.shape[-1]:    # METHOD
            raise ValueError(f"no entry for {[*xt.shape[-2:]]}, only for {self.stages}")   # METHOD
        emb = self.emb(timestep_embedding(t, self.ch))
        if y is not None:
            emb = emb + self.label(y)
        if len(self.stages) > 1:                               # METHOD: 3.3, added to the other embeddings
            emb = emb + self.resolution.weight[self.stages.index(xt.shape[-1])]            # METHOD
        emb = F.silu(emb)
        return self.decoder(*self.encoder(xt, emb), emb)


def build_net(config):
    """The network of a configuration, on the CPU."""
    net = UNet(config["channels"], *(config[k] for k in ("ch", "mult", "blocks", "attention", "patch")),
               labels=len(config["captions"]) if config["labels"] else 0, stages=config["stages"])     # METHOD: stages
    return net.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------
# Method: EDM's denoiser, the low-resolution condition (Sec. 3.1 - 3.4), effective NFE (Appendix B)
# ---------------------------------------------------------------------------------------------
def downsample(x):
    """METHOD: Down: (B, C, 2r, 2r) -> (B, C, r, r): the mean of 2x2 pixels (D5)."""
    return F.avg_pool2d(x, 2)


def pyramid_of(x0, n):
    """METHOD: x0 (B, C, R, R) at n resolutions, low to high."""
    return [x0] if n == 1 else [*pyramid_of(downsample(x0), n - 1), x0]


def upsample(x):
    """METHOD: Up: (B, C, r, r) -> (B, C, 2r, 2r): every pixel four times, so that its noise keeps its level (D5)."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def denoise(net, xt, sigma, z=None, s=None, y=None):
    """x0_hat = D(xt; sigma) (B, C, r, r), EDM's Eq. 7: c_skip xt + c_out F(c_in xt; c_noise).

    xt = x0 + sigma * eps, sigma (B,); y (B,) class or None. F is told 1000 c_noise = 250 ln sigma (D21).
    METHOD: 3.2: z (B, C, r, r), the up-sampled image of the stage below, with noise of level s (B,), enters as further
    channels, scaled by its own 1 / sqrt(s^2 + sigma_data^2) (D4). c_skip acts on the image alone."""
    t, sigma = 250 * sigma.log(), sigma.view(-1, 1, 1, 1)
    total = (sigma ** 2 + SIGMA_DATA ** 2).sqrt()              # 1 / c_in
    c_skip, c_out, x = (SIGMA_DATA / total) ** 2, sigma * SIGMA_DATA / total, xt / total
    if z is not None:                                          # METHOD
        x = torch.cat([x, z / (s.view(-1, 1, 1, 1) ** 2 + SIGMA_DATA ** 2).sqrt()], dim=1)     # METHOD
    return c_skip * xt + c_out * net(x, t, y).to(xt.dtype)


def edm_loss(net, x0, sigma, eps, z=None, s=None, y=None):
    """EDM's loss: weighted squared error of x0_hat, summed over pixels, a mean over the batch. x0, eps
    (B, C, r, r), sigma (B,); z, s, y: as in denoise."""
    x0_hat = denoise(net, x0 + sigma.view(-1, 1, 1, 1) * eps, sigma, z, s, y)
    weight = (sigma ** 2 + SIGMA_DATA ** 2) / (sigma * SIGMA_DATA) ** 2
    return (weight * (x0_hat - x0).square().flatten(1).sum(1)).mean()


def effective_nfe(nfe, seconds):
    """METHOD: Appendix B: evaluations at all resolutions, in evaluations at the last one. nfe: evaluations of each
    stage, low to high; seconds: of one evaluation of each. The low ones' sum is rounded up (D10). For results/."""
    return nfe[-1] + math.ceil(sum(n * t / seconds[-1] for n, t in zip(nfe[:-1], seconds)) - 1e-9)     # 1e-9: rounding


# ---------------------------------------------------------------------------------------------
# Data and loss
# ---------------------------------------------------------------------------------------------
def check_config(config):
    """Raises ValueError if the sizes in config do not fit each other."""
    R, stages, multiple = config["res"], config["stages"], config["patch"] * 2 ** (len(config["mult"]) - 1)
    if stages != [R >> i for i in reversed(range(len(stages)))] or len(stages) > len(config["mult"]) or R % multiple:
        raise ValueError(f"--stages {' '.join(map(str, stages))}: each must be twice the one before, the last one the "
                         f"images' {R}, a multiple of {multiple}; no more of them than levels in --mult")


def load_data(config):
    """Images uint8 (N, C, R, R) and classes (N,) of --data; notes shape, classes, the condition's levels in config."""
    x, y, captions = load_images(config["data"], config["res"])
    if config.get("resume") and config["labels"] and config["captions"] != captions:
        raise ValueError(f"--data {config['data']} has not the classes of the run: train anew, or from it with --init")
    config.update(channels=x.shape[1], res=x.shape[-1], captions=captions)
    check_config(config)
    if config["s_mean"] == ["plan"]:                           # METHOD: around the level of the paper's plan (D3)
        config["s_mean"] = [math.log(s) for s in stops_of(paper_plan(config["stages"]))[:-1]]
    n = len(config["stages"]) - 1
    try:
        config["s_mean"] = [float(s) for s in config["s_mean"]]
        assert len(config["s_mean"]) == n and math.isfinite(sum(config["s_mean"]))
        assert n or "s_std" not in config.get("given", ())     # there is no condition
    except (AssertionError, ValueError):
        raise ValueError(f"--s-mean {config['s_mean']}, --s-std: {n + 1} stages have {n} conditions") from None
    return x, y


def draw_batch(config, x, y, step):
    """Every random input of a training step, on the CPU, for the whole batch: x0, y, sigma (B, n) and s (B, n - 1) of
    the n stages, then eps of each and eps_z, at half their size, of all but the first. step: not used here."""
    B, C, stages = config["batch"], config["channels"], config["stages"]
    index = torch.randint(0, len(x), (B,))
    x0 = to_float(x[index])
    if config["flip"]:
        x0 = torch.where(torch.rand(B, 1, 1, 1) < 0.5, x0.flip(-1), x0)
    sigma = (P_MEAN + P_STD * torch.randn(B, len(stages))).exp()
    s = (torch.tensor(config["s_mean"]) + config["s_std"] * torch.randn(B, len(stages) - 1)).exp()     # METHOD: D3
    eps = [torch.randn(B, C, r, r) for r in stages]
    eps_z = [torch.randn(B, C, r, r) for r in stages[:-1]]     # METHOD: 3.2, drawn at the lower resolution
    return x0, y[index], sigma, s, *eps, *eps_z


def training_loss(net, config, x0, y, sigma, s, *noise):
    """METHOD: 3.2, 3.4, Algorithm 1: EDM's losses of all resolutions, added; above the lowest with the image below as a
    condition, with noise of a level of its own (truncation augmentation). Divided by the last image's size (D9)."""
    n, y = len(config["stages"]), y if config["labels"] else None
    images, eps, eps_z = pyramid_of(x0, n), noise[:n], noise[n:]
    loss = edm_loss(net, images[0], sigma[:, 0], eps[0], y=y)
    for i in range(1, n):                                      # METHOD
        z = upsample(images[i - 1] + s[:, i - 1].view(-1, 1, 1, 1) * eps_z[i - 1])             # METHOD
        loss = loss + edm_loss(net, images[i], sigma[:, i], eps[i], z, s[:, i - 1], y)         # METHOD
    return loss / x0[0].numel()


def preview(net, config, device):
    """32 images of a network in training, by the paper's plan."""
    return generate(net, config, paper_plan(config["stages"]), range(32), device)


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------
def noise_levels(steps, sigma_min, sigma_max):
    """EDM's Eq. 5: `steps` levels from sigma_max down to sigma_min, and 0: a list of steps + 1 floats."""
    a, b = sigma_max ** (1 / RHO), sigma_min ** (1 / RHO)
    return [(a + i / max(steps - 1, 1) * (b - a)) ** RHO for i in range(steps)] + [0.0]


def stop_level(sigmas, evaluations, per_step=2):
    """METHOD: the level reached after `evaluations` (None: all) at `per_step` a step; a step begun counts (D6)."""
    return sigmas[-1] if evaluations is None else sigmas[math.ceil(evaluations / per_step)]


@torch.no_grad()
def heun_sample(denoiser, noise, sigmas, evaluations=None):
    """EDM's Algorithm 1: Heun's method from sigmas[0] to sigmas[-1] = 0, where the last step is Euler's.

    denoiser(xt, sigma float) -> x0_hat, called in the noise's own type. noise (B, C, r, r), standard normal. The state
    is float64, as EDM's, but on MPS, which has none.
    METHOD: 3.4, truncation: `evaluations` K of the 2N - 1, then the noisy image as it is, at stop_level. An odd K
    ends in an Euler step (D6). Raises ValueError if K is not in 1 .. 2N - 1, or sigmas do not fall to 0."""
    if sigmas[-1] != 0 or any(a <= b for a, b in zip(sigmas, sigmas[1:])):
        raise ValueError("sigmas must fall strictly, to 0 at the end")
    N, K = len(sigmas) - 1, 2 * len(sigmas) - 3 if evaluations is None else evaluations
    if not 1 <= K < 2 * N:
        raise ValueError(f"{K} evaluations: a schedule of {N} steps has 1 .. {2 * N - 1}")
    xt = (noise if noise.device.type == "mps" else noise.double()) * sigmas[0]
    for i in range((K + 1) // 2):
        h = sigmas[i + 1] - sigmas[i]
        slope = (xt - denoiser(xt.to(noise.dtype), sigmas[i])) / sigmas[i]
        x_next = xt + h * slope
        if 2 * (i + 1) <= K:                                   # the correction is the second evaluation
            slope_next = (x_next - denoiser(x_next.to(noise.dtype), sigmas[i + 1])) / sigmas[i + 1]
            x_next = xt + h * (slope + slope_next) / 2
        xt = x_next
    return xt


def cascade_sample(parts, solver=heun_sample, per_step=2):
    """METHOD: 3.4, Algorithm 2: from the lowest resolution up, each stage but the last truncated and handed on,
    noisy as it is, as the condition of the next.

    parts: [(denoiser, noise (B, C, r, r), sigmas, evaluations), ...], low to high;
    denoiser(xt, sigma, z, s) -> x0_hat; z, s: up-sampled image and level of the stage below, None in the first;
    evaluations: None for all of the schedule; solver, per_step: another one (latents: Euler's), its evaluations a step.
    One stage is EDM. Returns the images of every stage, the last one clean."""
    images, z, s = [], None, None
    for denoiser, noise, sigmas, evaluations in parts:
        images.append(solver(lambda xt, sigma: denoiser(xt, sigma, z, s), noise, sigmas, evaluations))
        z, s = upsample(images[-1]).to(noise.dtype), stop_level(sigmas, evaluations, per_step)
    return images


def paper_plan(stages, steps=(0,), truncate=(0,), sigma_min=(0,)):
    """METHOD: what is sampled: steps N, evaluations K, noise range of each stage, low to high. steps, truncate,
    sigma_min: of each stage (truncate: but the last); 0s: the paper's (N: D7). ValueError if they do not fit."""
    n = len(stages)
    usual = *SCHEDULES.get(tuple(stages), ([18] * (n - 1) + [9 if n > 1 else 18], [19] * (n - 1))), [0] * n
    steps, truncate, sigma_min = (a if any(a) else b for a, b in zip((steps, truncate, sigma_min), usual))
    if (len(steps), len(truncate), len(sigma_min)) != (n, n - 1, n):
        raise ValueError(f"--steps, --truncate, --sigma-min: {list(stages)} need {n}, {n - 1} and {n} numbers")
    low, high = zip(SIGMA_RANGE, *[COND_RANGE] * (n - 1))
    plan = dict(stages=list(stages), steps=list(steps), evaluations=[*truncate, 2 * steps[-1] - 1],
                sigma_min=[told or paper for told, paper in zip(sigma_min, low)], sigma_max=list(high))
    for r, N, K in zip(stages, steps, plan["evaluations"]):
        if not 1 <= K < 2 * N:
            raise ValueError(f"--truncate: {K} evaluations at {r}x{r}, but its {N} steps have 1 .. {2 * N - 1}")
    return plan


def levels_of(plan):
    """The noise levels of each stage of a plan."""
    return [noise_levels(*p) for p in zip(plan["steps"], plan["sigma_min"], plan["sigma_max"])]


def stops_of(plan):
    """METHOD: the noise level at which each stage of a plan stops; the last one's is 0."""
    return [stop_level(sigmas, K) for sigmas, K in zip(levels_of(plan), plan["evaluations"])]


def classes_of(config, seeds):
    """The classes (len(seeds),) of the seeds: those of --classes in turn (D14)."""
    known, chosen = len(config["captions"]), config["classes"]
    chosen = range(known) if chosen == [-1] else chosen
    if not set(chosen) <= set(range(known)):
        raise ValueError(f"--classes {' '.join(map(str, chosen))}: the checkpoint has the classes 0 .. {known - 1}")
    return torch.tensor([chosen[i % len(chosen)] for i in seeds])


def generate(net, config, plan, seeds, device):
    """Images (n, C, R, R) of a plan, one for each seed."""
    noise = noise_for(seeds, *((config["channels"], r, r) for r in reversed(plan["stages"])))  # R first, as EDM's
    noise = [noise] if torch.is_tensor(noise) else noise[::-1]
    y = classes_of(config, seeds).to(device) if config["labels"] else None

    def denoiser(xt, sigma, z, s):
        sigma, s = (None if v is None else torch.full((len(xt),), v, device=xt.device) for v in (sigma, s))
        with autocast(xt.device, config["precision"]):
            return denoise(net, xt, sigma, z, s, y)

    return cascade_sample([(denoiser, eps.to(device), sigmas, K) for eps, sigmas, K in zip(
        noise, levels_of(plan), plan["evaluations"])])[-1]


def sample(net, config, plan, seeds, device):
    """uint8 images (n, C, R, R) on the CPU, seed by seed: seed i makes image i, whatever the batch."""
    if not len(seeds):                                         # a process without a share of them
        return sample(net, config, plan, [0], device)[:0]
    batches = torch.tensor(list(seeds)).split(16 if str(device) == "cpu" else 250)
    return torch.cat([to_uint8(generate(net, config, plan, batch.tolist(), device)).cpu()
                      for batch in progress(batches, "sample", len(batches[0]))])


# ---------------------------------------------------------------------------------------------
# Search: where to stop each stage (Appendix C)
# ---------------------------------------------------------------------------------------------
def plan_name(config):
    """The file of a searched plan: its name says of which stages."""
    return f"plan_{'-'.join(map(str, config['stages']))}.json"


def search(net, config, device):
    """METHOD: Appendix C: the evaluations K of each stage but the last, stage by stage, whose thousand samples have the
    lowest FD from the training images (D22). Writes the plan into --out and returns it."""
    plan = plan_of(config)
    if len(plan["stages"]) == 1:
        raise ValueError("--search: one stage (EDM) has no truncation to search")
    (extractor, name), x = load_extractor(config["data"], device), load_images(config["data"], config["res"])[0]
    reference = feature_stats(extract(extractor, x[::math.ceil(len(x) / REFERENCE_N)])[0])
    config = dict(config, classes=[-1])                        # all classes: x has them
    plan.update(step=config["step"], network=config.get("digest"), searched=[])
    for i, (r, N) in enumerate(zip(plan["stages"][:-1], plan["steps"])):
        found, before = {}, plan["evaluations"]
        for K in (before[i] + shift for shift in SHIFTS):
            if 1 <= K < 2 * N:
                tried = dict(plan, evaluations=[*before[:i], K, *before[i + 1:]])
                images = sample(net, config, tried, range(SEARCH_SEED, SEARCH_SEED + SEARCH_N), device)
                fd = frechet_distance(reference, feature_stats(extract(extractor, images)[0]))
                found[fd] = tried["evaluations"]
                plan["searched"].append(dict(res=r, evaluations=K, stop=round(stops_of(tried)[i], 4), fd=round(fd, 4)))
                print(f"{r}x{r}: {K} evaluations, to sigma {stops_of(tried)[i]:.4g}: FD[{name}]@{SEARCH_N} {fd:.3f}")
        plan["evaluations"] = found[min(found)]
    save_json(Path(config["out"]) / plan_name(config), plan)
    return plan


def describe(plan):
    """A plan in words, as --sample prints it."""
    parts = zip(*(plan[k] for k in ("stages", "evaluations", "steps", "sigma_max")), stops_of(plan))
    return ", then ".join(f"{r}x{r}: {K} of {2 * N - 1} evaluations, sigma {first:g} to {stop:.4g}"
                          for r, K, N, first, stop in parts)


def plan_of(config):
    """The paper's plan, with what --steps, --truncate and --sigma-min say."""
    if config["classes"] != [-1] and not config["labels"]:
        raise ValueError("--classes: the checkpoint has no classes (train with --labels 1)")
    return paper_plan(*(config[k] for k in ("stages", "steps", "truncate", "sigma_min")))


def make_plan(net, config, device):
    """The plan of the command line; else one that was searched with the same network; else the paper's."""
    plan, told = plan_of(config), any(config["steps"] + config["truncate"] + config.get("sigma_min", []))
    found = None if told else find_plan(config, plan_name(config), plan)
    for ranges in ("sigma_min", "sigma_max") if found else ():                     # raises if they do not fit
        paper_plan(plan["stages"], found["steps"], found["evaluations"][:-1], found.get(ranges, ()))
    return found or plan


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
