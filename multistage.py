"""Multistage: Improving Efficiency of Diffusion Models via Multi-Stage Framework and Tailored
Multi-Decoder Architectures (Zhang, Lu et al., CVPR 2024; arXiv 2312.09181), in one file.

Denoising is not one task: next to the noise a small network is enough, next to the data it takes a large
one, and the gradients of the two disturb each other. So cut the noise levels into stages where the best
possible denoiser hardly changes; give all stages one encoder and each stage a decoder of its own, of the
width it needs. The best possible denoiser of a data set is known in closed form: the stages are found
before anything is trained, in a minute.

Run (README.md has more):
    python multistage.py --sample                            # 64 images from the shipped weights: seconds
    python multistage.py --cluster                           # the edges of three stages, from the images
    python multistage.py --train --sample --evaluate         # clusters first if there is no plan yet; over an hour
    python multistage.py --train --arch unified              # off switch: a plain U-Net and DPM-Solver
    python multistage.py --train --arch unified --diffusion edm     # off switch of EDM
    python multistage.py --train --arch separate --widths 24 24 24 --budget 2e13    # Table 3, equal MACs
    python multistage.py --train --space latent              # Table 1, LDM: an autoencoder, its latents' stages
    torchrun --nproc_per_node=2 -- multistage.py --train        # two processes (or GPUs)
    python multistage.py --ledger                            # Tables 2, 4, 5, 6, 7: parameters, MACs, edges

Expect (small preset, fashion10k): --cluster finds edges .517 and .706 in 20 s of one CPU core; --ledger takes
    as long. --train: 5,000 steps, 640,000 images, 80 minutes; the shipped weights saw a third (--mixed-batches
    --budget 30e12): FD 2.00; 3.31 without mixed batches, the unified network's 2.83 (lower is better).

Symbols: t in [0, 1] -> t; s_t, sigma_t -> scale_of, sigma_of (xt = scale (x0 + sigma eps)); t_1, t_2 -> edges,
stage 0 is next to the data; D, S -> similarity; eta, alpha, K -> ETA, ALPHA, samples; lambda -> lam = -log sigma;
x0_hat, eps_hat -> predictions. NFE: an evaluation of the network, in the stage of its own t.

Differences from the paper, and what it leaves open:
D1  The text swaps s_t and sigma_t and loses a t (s_0 = .638). The usual VP schedule of the official code.
D2  Algorithm 1 takes the largest tau with a running mean of at least alpha; where the similarity rises again
    that may lie beyond a deep dip. Ours: the tau at which the mean falls below alpha first. --cluster prints both; on
    fashion10k the similarity rises again, too, but not enough: the two are equal.
D3  Similarity to eps*_1: the text compares with eps*_1(x_1), the official code with what eps*_1 makes of xt.
    The text's is .15 later on fashion10k. Ours: the code's; --cluster prints both. The code clusters images in
    [0, 1] but trains on [-1, 1]; ours: [-1, 1] for both (--unit-range: the code's).
D4  Similarity map of Algorithm 2: each image with one eps at all 21 levels .001, .051, ... .951, 1 (the code's;
    the text has 41), samples / 20 images; cuts lie midway between levels.
D5  Eq. 22 minimises the sum of S, a similarity: its sign is wrong. The official code maximises the stages' mean
    of S, which on fashion10k cuts off single levels. Ours minimises the sum of 1 - S, exactly, by
    dynamic programming: with --unit-range n = 2 gives the paper's .476. --cluster prints all readings.
D6  Gradient clustering: one checkpoint of a unified network and 128 images; the paper averages checkpoints.
D7  Time and SNR clustering: Go et al.'s, on 1000 levels, stages of 1/2n to 3/2n of them (n = 3: the official bounds).
D8  A batch is of one stage, VP: each with probability 1 / n, whatever its length, as the official training
    (--stage-probability). Adam and its momentum leave the decoders of the other stages alone. --mixed-batches
    draws the stage image by image, so that every step trains every decoder, at the same MACs.
D9  EDM's stage has the probability of its sigmas (.961, .035, .004 at the paper's edges), and the sigmas
    of a batch are drawn by the inverse CDF instead of rejection: the same distribution. The last decoder
    hardly trains; that is the paper's. The bottleneck is shared here, the official EDM code has one per decoder.
D10 Early stopping: every tenth image (at most 1000) is not trained on; each network's
    average is kept where its loss on them was lowest at a save. Training goes on: equal budgets stay equal.
D11 Preset paper: the official DDPM++ with FIR resampling and input pyramid: parameters to the integer. One
    number of groups per decoder (official: per layer); edges are edges (official: 999 t against 1000 t_1).
D12 --t-end 1e-4 is the official command's, 1e-3 its configuration's; nothing follows the last step.
D13 Preset small is c2f_trd.py's network (but D19), its decoders 1.5, 1 and 1/3 as wide as the encoder (the paper:
    1.5, 1 and 1/8). For other numbers of stages Eq. 23, on widths: the paper's own Table 7 does not follow Eq. 23.
D14 Constant learning rate, as the paper: points of one curve compare (--decay lets it fall at the end).
D15 Preset paper-ldm has attention in the first decoder only, as the official class by an oversight (a variable
    is not reset); Table 6 is of this network. One attention head here (official: 32 channels each).
D16 --space latent: the autoencoder is small and trained here, on all images (D10's too); the clustering is of its
    latents with the same thresholds. The paper takes its pixel edges over, as indices 442, 631 of LDM's sqrt-linear
    schedule, which are not of the same SNR; here the schedule is DPM-Solver's. LDM's code trains each stage on a GPU.
D17 DPM-Solver++ 2M takes its last step at first order: evenly spaced in t, it is so long that the multistep
    extrapolation makes N(0, 1) data 1.15 times too wide (official: multistep to the end, t_end 1e-3, 1.10).
D18 EDM here has the VP preset's learning rate, EMA, dropout, flips and gradient clipping, not EDM's own.
D19 A decoder 8 wide cannot hand xt through to eps_hat, which needs it next to the noise most precisely of all: preset
    small trained on eps gave noise. Its VP networks, the unified one too,
    predict v = s (eps - sigma x0) and are trained on it; the samplers get eps_hat = s (v_hat + sigma xt). Presets
    of the paper: eps, as the official code.
Not here: the paper's Fig. 2; EDM's own network.
"""
import argparse
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from bisect import bisect_right
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (HERE, class_logits, count_macs, extract, feature_stats, frechet_distance, gather,
                    has_fast_bf16, inception_score, load_extractor, load_images, noise_for, progress,
                    save_curves, save_grid, save_json, sha256_of, start_device, to_float, to_uint8,
                    write_atomically)

SCRIPT = "multistage"

# ---------------------------------------------------------------------------------------------
# Hyper-parameters
# ---------------------------------------------------------------------------------------------
BETA_D, BETA_MIN = 19.9, 0.1   # VP schedule (Sec. 5; Song et al.)
T_FIRST = 1e-3                 # eps_t: smallest t of the clustering (Sec. 5)
T_END = 1e-4                   # last t of DPM-Solver (the official command line)
ETA, ALPHA = 2 / 256, 0.9      # thresholds of Algorithm 1 (Sec. 5)
P_MEAN, P_STD = -1.2, 1.2      # log-normal noise levels of EDM's training
SIGMA_DATA, RHO = 0.5, 7       # EDM
SIGMA_MIN, SIGMA_MAX = 0.002, 80
PAPER_EDGES = (0.442, 0.631)   # t1, t2 of Table 4: the stages that the three widths of a preset belong to
ARCHS = ("multistage", "unified", "separate")                  # unified: the off switch
CLUSTERINGS = ("optimal", "optimal2", "time", "snr", "gradient")       # Table 4; optimal2: Algorithm 2
SOLVERS = {"dpm1": 1, "dpm2": 2, "dpm3": 3, "dpm2m": 2, "heun": 2}     # order; dpm: DPM-Solver singlestep, 2m: ++ 2M
CLUSTER_SEED = 10 ** 9                                         # far from samples' seeds
ARCHITECTURE = ("ch", "mult", "blocks", "attention", "patch", "dropout", "plus", "groups", "attended")

# A preset is a network and how it is trained. paper: Table 5, architecture 1; paper-ldm: Table 6,
# architecture 4, a network for 64x64x3 latents (its autoencoder is not here).
#                        tiny        small          paper             paper-ldm
PRESETS = {
    "res":              (32,         32,            32,               64),           # R, of a folder's images
    "ch":               (8,          24,            128,              224),          # width of the encoder
    "widths":           ([12, 8, 4], [36, 24, 8],   [192, 128, 16],   [256, 192, 128]),  # of the decoders (TP)
    "mult":             ([1, 2],     [1, 2, 3],     [1, 2, 2, 2],     [1, 2, 3, 4]),     # width per level
    "blocks":           (1,          1,             8,                2),            # residual blocks per level
    "attention":        ([1],        [2],           [1],              [1, 2, 3]),    # levels with attention
    "attended":         (None,       None,          None,             1),            # decoders with it (D15)
    "patch":            (2,          2,             1,                1),            # pixels per side of a token
    "plus":             (False,      False,         True,             False),        # DDPM++ instead of DDPM (D11)
    "groups":           (32,         32,            16,               32),           # of GroupNorm, at most
    "predict":          ("v",        "v",           "eps",            "eps"),        # what a VP network gives (D19)
    "dropout":          (0.0,        0.0,           0.1,              0.0),
    "flip":             (False,      False,         True,             False),        # random horizontal flips
    "batch":            (16,         128,           128,              48),           # global, all processes
    "lr":               (2e-3,       1e-3,          2e-4,             9.6e-5),       # Adam
    "warmup":           (10,         200,           5000,             1),            # steps, linear
    "decay":            (0.0,        0.0,           0.0,              0.0),          # last share: lr falls
    "ema":              (0.9,        0.999,         0.9999,           0.9999),       # decay
    "iters":            (20,         5000,          450_000,          500_000),      # steps
    "samples":          (200,        10_000,        50_000,           50_000),       # K of Algorithms 1 and 2
}
PRESET_NAMES = ("tiny", "small", "paper", "paper-ldm")

# --space latent: what a preset changes; latent, factor: channels of the latents, pixels per side of a latent pixel
LATENT_PRESETS = {
    "tiny": dict(res=8, patch=1, latent=4, factor=4, ae_iters=20),
    "small": dict(res=8, patch=1, ch=32, widths=[48, 32, 12], mult=[1, 2], attention=[0, 1], latent=4, factor=4,
                  ae_iters=1500),
    "paper-ldm": dict(latent=3, factor=4, ae_iters=100_000),
}
KL_WEIGHT = 1e-4               # of the autoencoder: keeps the latents near a normal distribution
AE_BATCH, AE_LR = 64, 2e-3     # of the autoencoder


# ---------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------
def timestep_embedding(t, dim):
    """(B,) -> (B, dim): sine and cosine of t at `dim / 2` frequencies from 1 to 1 / 10000 (DDPM)."""
    frequency = torch.logspace(0, -4, dim // 2, device=t.device)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# differs: it can resample between its halves, as DDPM++ does
class ResBlock(nn.Module):
    """norm - SiLU - (resample) - conv, plus the time embedding, norm - SiLU - conv, plus the input."""

    def __init__(self, c_in, c_out, c_emb, groups, dropout, resample=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.resample = resample or nn.Identity()
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out or resample else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        h = h + self.emb(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(self.resample(x)) + h


class Attention(nn.Module):
    """Self-attention over the pixels, one head."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v)                            # (B, 1, H W, C)
        return x + self.out(h[:, 0].transpose(1, 2).reshape(B, C, H, W))


class Down(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))          # right and bottom, as in the original DDPM


class Up(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Fir(nn.Module):
    """DDPM++'s resampling by 2 with the filter [1, 3, 3, 1] in both directions; no parameters."""

    def __init__(self, up):
        super().__init__()
        row = torch.tensor([1., 3., 3., 1.]) / 8
        self.up = up
        self.register_buffer("kernel", torch.outer(row, row) * (4 if up else 1), persistent=False)

    def forward(self, x):
        resample = F.conv_transpose2d if self.up else F.conv2d
        return resample(x, self.kernel.expand(x.shape[1], 1, 4, 4), stride=2, padding=1, groups=x.shape[1])


class PyramidDown(nn.Module):
    """DDPM++'s input pyramid: the filter, then a strided convolution to the width of the next level."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride=2)
        self.fir = Fir(up=False)

    def forward(self, x):
        kernel = self.fir.kernel.expand(x.shape[1], 1, 4, 4)
        return self.conv(F.conv2d(x, kernel, padding=2, groups=x.shape[1]))


def run_layers(layers, h, emb, scale):
    """The layers in turn; DDPM++ divides every sum by sqrt 2 (scale), DDPM does not (scale 1)."""
    for layer in layers:
        h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        h = h * scale if isinstance(layer, (ResBlock, Attention)) else h
    return h


class Encoder(nn.Module):
    """Time embedding, input, way down and bottleneck: (xt, label) -> h, skips, emb."""

    def __init__(self, channels, ch, mult, blocks, attention, patch, dropout, plus, groups):
        super().__init__()
        groups, c_emb = math.gcd(ch, min(groups, ch // 4)), 4 * ch
        self.ch, self.patch, self.scale = ch, patch, 0.5 ** 0.5 if plus else 1
        self.emb = nn.Sequential(nn.Linear(ch, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.conv_in = nn.Conv2d(channels * patch ** 2, ch, 3, padding=1)
        c, c_pyramid, self.widths = ch, channels * patch ** 2, [ch]            # widths of the skips
        self.down = nn.ModuleList()                                            # a skip after each step
        self.pyramid = nn.ModuleDict()                                         # by step: only some have one (DDPM++)
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.down.append(nn.ModuleList([ResBlock(c, ch * m, c_emb, groups, dropout)]))
                c = ch * m
                if level in attention:
                    self.down[-1].append(Attention(c, groups))
                self.widths.append(c)
            if level < len(mult) - 1:
                self.down.append(nn.ModuleList(
                    [ResBlock(c, c, c_emb, groups, dropout, Fir(up=False)) if plus else Down(c)]))
                if plus:
                    self.pyramid[str(len(self.down) - 1)] = PyramidDown(c_pyramid, c)
                    c_pyramid = c
                self.widths.append(c)
        self.mid = nn.ModuleList([ResBlock(c, c, c_emb, groups, dropout), Attention(c, groups),
                                  ResBlock(c, c, c_emb, groups, dropout)])

    def forward(self, xt, label):
        emb = F.silu(self.emb(timestep_embedding(label, self.ch)))
        pyramid = F.pixel_unshuffle(xt, self.patch)
        h = self.conv_in(pyramid)
        skips = [h]
        for i, step in enumerate(self.down):
            h = run_layers(step, h, emb, self.scale)
            if str(i) in self.pyramid:
                h = pyramid = (self.pyramid[str(i)](pyramid) + h) * self.scale
            skips.append(h)
        return run_layers(self.mid, h, emb, self.scale), skips, emb


class Decoder(nn.Module):
    """Way up and output, of a width of its own; the first convolution that sees a skip adapts it."""

    def __init__(self, channels, width, skips, ch, mult, blocks, attention, patch, dropout, plus, groups):
        super().__init__()
        groups, c_emb = math.gcd(ch, width, min(groups, ch // 4, width // 4)), 4 * ch
        self.patch, self.scale = patch, 0.5 ** 0.5 if plus else 1
        c, skips, self.up = skips[-1], list(skips), nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                self.up.append(nn.ModuleList([ResBlock(c + skips.pop(), width * m, c_emb, groups, dropout)]))
                c = width * m
                if level in attention and (i == blocks or not plus):           # DDPM++: once a level
                    self.up[-1].append(Attention(c, groups))
            if level > 0:
                self.up.append(nn.ModuleList(
                    [ResBlock(c, c, c_emb, groups, dropout, Fir(up=True)) if plus else Up(c)]))
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, channels * patch ** 2, 3, padding=1)
        self.takes_skip = [isinstance(step[0], ResBlock) and isinstance(step[0].resample, nn.Identity)
                           for step in self.up]

    def forward(self, h, skips, emb):
        skips = list(skips)
        for step, takes_skip in zip(self.up, self.takes_skip):
            h = run_layers(step, torch.cat([h, skips.pop()], dim=1) if takes_skip else h, emb, self.scale)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


def by_stage(stage, n, run):
    """METHOD: each sample's own stage. stage: an int for the whole batch (no look at the device), or
    int64 (B,). run(s, rows) -> (len(rows), ...) for the samples `rows` of stage s; the parts are put
    back in order. Raises ValueError if a stage has no decoder."""
    if isinstance(stage, int):
        if not 0 <= stage < n:
            raise ValueError(f"there is no decoder for stage {stage}: the network has {n}")
        return run(stage, slice(None))
    rows = [(s, (stage == s).nonzero()[:, 0]) for s in stage.unique().tolist()]
    if not 0 <= rows[0][0] <= rows[-1][0] < n:
        bad = rows[0][0] if rows[0][0] < 0 else rows[-1][0]
        raise ValueError(f"there is no decoder for stage {bad}: the network has {n}")
    parts = torch.cat([run(s, r) for s, r in rows])
    return parts[torch.cat([r for _, r in rows]).argsort()]


# differs: METHOD: one encoder, a decoder per stage, of different widths; label and stage instead of t and y
class UNet(nn.Module):
    """METHOD: Sec. 3.1: one encoder for all stages and a decoder for each: (B, C, H, W) from xt
    (B, C, H, W), label (B,) float and stage (int, or int64 (B,)).

    widths: base width of each decoder, stage 0 (next to the data) first; one width is a plain U-Net.
    H and W are any multiples of patch * 2^(levels - 1). plus: DDPM++ (D11) instead of DDPM.
    attended: how many decoders, from the first, have attention (None: all)."""

    def __init__(self, channels, widths, ch, mult, blocks, attention, patch=1, dropout=0.0, plus=False,
                 groups=32, attended=None):
        super().__init__()
        self.multiple = patch * 2 ** (len(mult) - 1)
        self.encoder = Encoder(channels, ch, mult, blocks, attention, patch, dropout, plus, groups)
        self.decoders = nn.ModuleList(
            Decoder(channels, width, self.encoder.widths, ch, mult, blocks,
                    attention if attended is None or s < attended else [], patch, dropout, plus, groups)
            for s, width in enumerate(widths))
        if plus:                                        # DDPM++ starts with blocks that do nothing
            last = [m.conv2 for m in self.modules() if isinstance(m, ResBlock)]
            last += [m.out for m in self.modules() if isinstance(m, Attention)]
            for layer in last + [decoder.conv_out for decoder in self.decoders]:
                nn.init.zeros_(layer.weight)

    def forward(self, xt, label, stage=0):
        if xt.shape[-1] % self.multiple or xt.shape[-2] % self.multiple:
            raise ValueError(f"the network halves its input: {xt.shape[-2]}x{xt.shape[-1]} is not a "
                             f"multiple of {self.multiple}")
        h, skips, emb = self.encoder(xt, label)
        return by_stage(stage, len(self.decoders), lambda s, rows: self.decoders[s](
            h[rows], [skip[rows] for skip in skips], emb[rows]))


class Separate(nn.Module):
    """A whole U-Net for each stage (Table 3), called like the multi-decoder one."""

    def __init__(self, nets):
        super().__init__()
        self.nets, self.multiple = nn.ModuleList(nets), nets[0].multiple

    def forward(self, xt, label, stage=0):
        return by_stage(stage, len(self.nets), lambda s, rows: self.nets[s](xt[rows], label[rows]))


# differs: METHOD: one network, several decoders, or several networks
def build_net(config, channels):
    """The network of a configuration: ARCHITECTURE's entries, arch and widths (one per stage)."""
    options = {k: config[k] for k in ARCHITECTURE}
    if config["arch"] == "separate":
        net = Separate([UNet(channels, [width], **options) for width in config["widths"]])
    else:
        net = UNet(channels, config["widths"], **options)
    return net.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------
# Autoencoder of --space latent: lowdiff.py's
# ---------------------------------------------------------------------------------------------
# differs: norms of the autoencoder only
def group_norm(c):
    """GroupNorm of the autoencoder: 32 groups, fewer where a group would have less than 4 channels."""
    return nn.GroupNorm(min(32, c // 4), c, eps=1e-6)


class Residual(nn.Module):
    """norm - SiLU - conv, twice, plus the input."""

    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = group_norm(c), group_norm(c)
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Autoencoder(nn.Module):
    """A small variational autoencoder: images (B, channels, H, W) in [-1, 1] <-> latents (B, latent, H / factor,
    W / factor), which have mean 0 and deviation 1 in each channel by two buffers that train_autoencoder sets."""

    def __init__(self, channels, latent, factor, ch=32):
        super().__init__()
        if factor < 2 or factor & (factor - 1):
            raise ValueError(f"the autoencoder's factor must be a power of 2: {factor}")
        self.channels, self.latent, self.factor = channels, latent, factor
        self.register_buffer("mean", torch.zeros(latent, 1, 1))
        self.register_buffer("std", torch.ones(latent, 1, 1))
        widths = [channels] + [ch * min(2 ** i, 4) for i in range(int(math.log2(factor)))]
        encoder, decoder = [], [nn.Conv2d(latent, widths[-1], 3, padding=1)]
        for c, c_next in zip(widths, widths[1:]):              # halve: 2x2 pixels become channels
            encoder += [nn.PixelUnshuffle(2), nn.Conv2d(4 * c, c_next, 3, padding=1), Residual(c_next)]
        for c, c_next in zip(widths[::-1], widths[-2::-1]):
            decoder += [Residual(c), group_norm(c), nn.SiLU(), nn.Conv2d(c, 4 * c_next, 3, padding=1),
                        nn.PixelShuffle(2)]
        c = widths[-1]
        encoder += [group_norm(c), nn.SiLU(), nn.Conv2d(c, 2 * latent, 3, padding=1)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def encode(self, x):
        return (self.encoder(x)[:, :self.latent] - self.mean) / self.std

    def decode(self, z):
        return self.decoder(z * self.std + self.mean)

    def loss(self, x, eps):
        """Squared error, per pixel, of the image decoded from a random latent, plus the KL term; eps: like a latent."""
        mean, log_var = self.encoder(x).float().chunk(2, dim=1)
        log_var = log_var.clamp(-20, 10)
        kl = (mean ** 2 + log_var.exp() - 1 - log_var).mean() / 2
        return F.mse_loss(self.decoder(mean + (log_var / 2).exp() * eps).float(), x) + KL_WEIGHT * kl


@torch.no_grad()
def encode_all(autoencoder, x, device, batch=500):
    """uint8 images (n, C, H, W) -> float32 latents on the CPU, in batches."""
    return torch.cat([autoencoder.encode(to_float(part.to(device))).cpu() for part in x.split(batch)])


def train_autoencoder(autoencoder, x, iters, device, precision="auto", seed=0):
    """Trains it on uint8 images x (n, C, H, W) and sets the mean and std of its latents. Not resumed: minutes.
    Raises ValueError if the loss is not finite."""
    optimizer, loss = torch.optim.Adam(autoencoder.parameters(), lr=AE_LR), torch.zeros(())
    side = x.shape[-1] // autoencoder.factor
    todo = range(1, iters + 1)
    for step in progress(todo, "train autoencoder", AE_BATCH, note=lambda: f"loss {float(loss.detach()):.5f}"):
        torch.manual_seed(seed * 10_000_019 + step)
        x0 = to_float(x[torch.randint(0, len(x), (AE_BATCH,))].to(device))
        eps = torch.randn(AE_BATCH, autoencoder.latent, side, side).to(device)
        for group in optimizer.param_groups:
            group["lr"] = AE_LR * min(1, step / 100, 2 * (1 - (step - 1) / iters))     # the second half: falling
        with autocast(device, precision):
            loss = autoencoder.loss(x0, eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step % 50 == 0 or step == iters) and not loss.isfinite():
            raise ValueError(f"the autoencoder's loss is not finite: stopped at step {step}")
    autoencoder.mean.zero_()
    autoencoder.std.fill_(1)
    latents = encode_all(autoencoder, x, device)
    autoencoder.mean.copy_(latents.mean((0, 2, 3)).view(-1, 1, 1))
    autoencoder.std.copy_(latents.std((0, 2, 3)).view(-1, 1, 1))


def load_autoencoder(saved, path):
    """The autoencoder in a loaded checkpoint, ready to use."""
    if "autoencoder" not in saved:
        raise ValueError(f"{path} holds no autoencoder: name a checkpoint of --space latent")
    autoencoder = Autoencoder(*saved["autoencoder_shape"])
    autoencoder.load_state_dict(saved["autoencoder"])
    return autoencoder.eval().requires_grad_(False)


def to_image(x, autoencoder):
    """Samples (B, C, r, r) as uint8 images on the CPU, decoded first if they are latents."""
    return to_uint8(x if autoencoder is None else autoencoder.decode(x.float())).cpu()


# differs: of the folder --out, for the clustering and all networks trained there
def get_autoencoder(args, device, rank, world):
    """That of the file --autoencoder, else of OUT/autoencoder.pt, else a new one, trained on --data and written
    there, with a picture: a row of images, a row of what comes back. Prints which."""
    args.data = args.data or "fashion10k"
    R, path = args.res * args.factor, Path(args.out) / "autoencoder.pt"
    x = load_images(args.data, R)[0]
    shape, made = [x.shape[1], args.latent, args.factor], dict(data=args.data, ae_iters=args.ae_iters)
    if x.shape[-1] != R:
        raise ValueError(f"--data {args.data} has images of {x.shape[-1]}x{x.shape[-1]}, the latents need {R}x{R}")
    if len(x) < 2:
        raise ValueError(f"--data {args.data} has {len(x)} image: nothing to cluster or to learn from")
    there = [path.is_file()]
    if world > 1:
        dist.broadcast_object_list(there)
    if args.autoencoder or there[0]:
        path = args.autoencoder or path
        saved = load_checkpoint(path)
        autoencoder = load_autoencoder(saved, path).to(device)
        found = [autoencoder.channels, autoencoder.latent, autoencoder.factor]
        if found != shape:
            raise ValueError(f"{path}: its autoencoder has channels, latent channels, factor {found}, wanted {shape}")
        if not args.autoencoder and saved.get("made") != made:
            raise ValueError(f"{path} was made with {saved.get('made')}, not {made}: choose another --out, or name it "
                             "by --autoencoder to use it all the same")
        print(f"autoencoder: {path}")
        return autoencoder
    torch.manual_seed(args.seed)
    autoencoder = Autoencoder(*shape).to(device)
    if rank == 0:
        train_autoencoder(autoencoder, x, args.ae_iters, device, args.precision, args.seed)
    if world > 1:                                                      # one for all processes
        for value in autoencoder.state_dict().values():
            dist.broadcast(value, 0)
    autoencoder.eval().requires_grad_(False)
    if rank == 0:
        back = to_image(autoencoder.encode(to_float(x[:16].to(device))), autoencoder)
        save_grid(path.with_suffix(".png"), torch.cat([x[:16], back]), len(back))
        save_checkpoint(path, autoencoder=autoencoder.state_dict(), autoencoder_shape=shape, made=made)
    return autoencoder


def model_data(args, device):
    """What is modelled, on the CPU: the images of --data, uint8 (n, C, R, R), or their latents, float."""
    name = args.data or "fashion10k"
    x = load_images(name, args.res * (args.factor if args.space == "latent" else 1))[0]
    if len(x) < 2:
        raise ValueError(f"--data {name} has {len(x)} image: nothing to cluster or to learn from")
    return x if args.autoencoder is None else encode_all(args.autoencoder, x, device)


def digest(autoencoder):
    """A short name of an autoencoder's weights, by which a plan knows whose latents it is of; None without one."""
    if not isinstance(autoencoder, Autoencoder):
        return None
    flat = torch.cat([v.detach().flatten().cpu() for v in autoencoder.state_dict().values()])
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------
# Noise levels and stages
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
    """Inverse of sigma_of: the t of the same signal-to-noise ratio; float64. METHOD: footnote 4: so the
    edges of VP serve EDM as well."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return ((BETA_MIN ** 2 + 2 * BETA_D * torch.log1p(sigma ** 2)).sqrt() - BETA_MIN) / BETA_D


def check_edges(edges, name="--edges"):
    """The edges as a list of floats, or ValueError if they do not rise strictly inside (0, 1)."""
    if not isinstance(edges, (list, tuple)) or any(type(e) not in (int, float) for e in edges):
        raise ValueError(f"{name}: the edges of the stages must be a list of numbers")
    if any(not 0 < e < 1 for e in edges) or any(a >= b for a, b in zip(edges, edges[1:])):
        raise ValueError(f"{name}: the edges of the stages must rise strictly inside (0, 1): {list(edges)}")
    return [float(e) for e in edges]


def stage_of(t, edges):
    """METHOD: Sec. 3.1: the stage of a noise level: 0 for [0, t1), 1 for [t1, t2), ... t: a float gives an
    int; a float tensor (B,) gives int64 (B,), each sample its own. Raises ValueError for a tensor of integers."""
    if isinstance(t, torch.Tensor):
        if not t.is_floating_point():
            raise ValueError("stage_of takes t in [0, 1] as a float, not the number of a step")
        return torch.bucketize(t, torch.tensor(edges, dtype=t.dtype, device=t.device), right=True)
    return bisect_right(edges, t)


def tailored_widths(edges, widths, edges_of_widths=PAPER_EDGES):
    """METHOD: Eq. 23: decoder widths for the stages between `edges`: over each stage the mean, by
    length, of `widths`, which belong to the stages of `edges_of_widths`; rounded to multiples of 4."""
    found, known = [], [0, *edges_of_widths, 1]
    for a, b in itertools.pairwise([0, *edges, 1]):
        shares = [max(0, min(b, d) - max(a, c)) for c, d in itertools.pairwise(known)]
        found.append(max(4, round(sum(s * w for s, w in zip(shares, widths)) / (b - a) / 4) * 4))
    return found


# ---------------------------------------------------------------------------------------------
# Method: clustering the noise levels by the optimal denoiser (Sec. 3.2, Appendix B)
# ---------------------------------------------------------------------------------------------
@torch.no_grad()
def optimal_denoiser(xt, scale, sigma, data, part=2 ** 22):
    """METHOD: Proposition 1: eps*(xt), the best eps_hat there is for the data set itself.

    xt (B, ...) at scale and sigma ((B,) or floats) of any kernel N(scale x0, scale^2 sigma^2 I); data (N, ...).
    Returns (B, ...). xt / scale - x0 is Gaussian, so the weights of the images are the softmax of
    -|xt / scale - y|^2 / 2 sigma^2, and two matrix products do it all. The softmax is in float64: for small
    sigma its arguments are in the millions. Memory: `part` weights at a time."""
    B, device = len(xt), xt.device
    scale, sigma = (torch.as_tensor(v, dtype=torch.float64, device=device).expand(B)[:, None]
                    for v in (scale, sigma))
    y = data.flatten(1).to(device, xt.dtype)
    mean = y.mean(0)
    y = y - mean                                         # smaller numbers, smaller rounding errors
    half = y.square().sum(1) / 2
    xhat, means = xt.flatten(1) / scale.to(xt.dtype), []
    for x, s in zip(xhat.split(max(1, part // len(y))), sigma.split(max(1, part // len(y)))):
        score = torch.addmm(half, x - mean, y.T, beta=-1).double()             # |x|^2 / 2 cancels
        means.append((score / s ** 2).softmax(1).to(xt.dtype) @ y + mean)
    return ((xhat - torch.cat(means)) / sigma.to(xt.dtype)).view_as(xt)


def similarity_to_ends(data, samples, eta=ETA, seed=CLUSTER_SEED):
    """METHOD: Algorithm 1, lines 3-9: similarity D of eps*_t to eps*_0 and eps*_1, sample by sample.

    data (N, C, R, R) float. Returns t (K,), sorted, and the shares of pixels S0, S1, S1_xt (K,) that agree
    within eta. eps*_0 is eps itself, exactly: at t = 0 only the own image is left. S1 compares with
    eps*_1(x_1), as printed; S1_xt with what eps*_1 would say to xt, as the official code does (D3)."""
    if len(data) < 2:
        raise ValueError("clustering needs at least two images: for one, every noise level is alike")
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, len(data), (samples,), generator=g)
    t = (T_FIRST + (1 - T_FIRST) * torch.rand(samples, generator=g, dtype=torch.float64)).sort().values
    eps = torch.randn(samples, *data.shape[1:], generator=g)
    mean, last, found = data.mean(0), sigma_of(1.0), []
    rows = torch.arange(samples).split(1000)
    for i in progress(rows, "cluster", 1000):
        x0, z, sigma = data[index[i]], eps[i].to(data.device), sigma_of(t[i]).to(data.device)
        xhat = x0 + sigma.to(x0.dtype).view(-1, 1, 1, 1) * z                   # scale 1: any scale gives the same
        eps_t = optimal_denoiser(xhat, 1, sigma, data)
        eps_1 = optimal_denoiser(x0 + float(last) * z, 1, last, data)
        eps_mean = (xhat - mean) / sigma.to(x0.dtype).view(-1, 1, 1, 1)
        found.append(torch.stack([((eps_t - other).abs() <= eta).flatten(1).double().mean(1).cpu()
                                  for other in (z, eps_1, eps_mean)]))
    return t, *torch.cat(found, 1)


def first_and_last_crossing(t, similarity, alpha=ALPHA):
    """METHOD: Eq. 7: two readings of "the largest tau with a running mean of at least alpha over [0, tau]"
    where similarity (K,), at the rising t (K,), is not monotone: the tau at which the mean falls below
    alpha for the first time (ours, D2), and the largest of all (the text's arg max)."""
    enough = similarity.cumsum(0) / torch.arange(1, len(t) + 1) >= alpha
    first = len(t) if enough.all() else int((~enough).int().argmax())          # samples before the first fall
    last = int(enough.nonzero().max()) + 1 if enough.any() else 0
    return [float(t[max(k - 1, 0)]) for k in (first, last)]


def algorithm1(t, s0, s1, alpha=ALPHA):
    """METHOD: Algorithm 1, lines 10-11: readings [(t1, t2) at the first crossing, (t1, t2) by arg max / min].
    Eq. 8 is Eq. 7 seen from t = 1. The inputs are those that similarity_to_ends returns."""
    low = first_and_last_crossing(t, s0, alpha)
    high = [1 - v for v in first_and_last_crossing((1 - t).flip(0), s1.flip(0), alpha)]
    return list(zip(low, high))


@torch.no_grad()
def similarity_map(data, samples, nodes, what="eps", eta=ETA, seed=CLUSTER_SEED):
    """METHOD: Eq. 6: S(t_a, t_b) between all `nodes` (G,), float64 (G, G): mean over `samples` images of
    the share of pixels that agree within eta; each image with one eps at all nodes (D4).
    what: eps, the optimal eps_hat (the text); x0, the optimal x0_hat (the official code)."""
    if len(data) < 2:
        raise ValueError("clustering needs at least two images: for one, every noise level is alike")
    g, G = torch.Generator().manual_seed(seed), len(nodes)
    total, sigmas = torch.zeros(G, G, dtype=torch.float64), sigma_of(nodes)
    index = torch.randint(0, len(data), (samples,), generator=g)
    for i in progress(index.split(100), "similarity", 100):
        x0, eps = data[i], torch.randn(len(i), *data.shape[1:], generator=g).to(data.device)
        found = []
        for sigma in sigmas:
            xhat = x0 + sigma.to(x0) * eps
            eps_hat = optimal_denoiser(xhat, 1, sigma, data)
            found.append(eps_hat if what == "eps" else xhat - sigma.to(x0) * eps_hat)
        for a, one in enumerate(found):
            near = [((one - other).abs() <= eta).double().mean() for other in found[a:]]
            total[a, a:] += torch.stack(near).cpu() * len(i)
    return (total.triu() + total.triu(1).T) / samples


def best_partition(cost, n, smallest=1, largest=None):
    """METHOD: Algorithm 2, line 9, without a commercial solver: the n - 1 indices that cut 0 .. G-1 into n
    runs of least total cost, exactly, by dynamic programming. cost (G, G + 1) float64: cost[i, j] of the
    run i .. j-1. smallest, largest: allowed lengths of a run."""
    G = len(cost)
    length = torch.arange(G + 1) - torch.arange(G)[:, None]
    allowed = (length >= smallest) & (length <= (largest or G))
    cost = cost.where(allowed, torch.full_like(cost, math.inf))
    best, froms = cost[0], []                            # best[j]: of 0 .. j-1 in the runs so far
    for _ in range(n - 1):
        best, i = (best[:G, None] + cost).min(0)
        froms.append(i)
    if not best[G] < math.inf:
        raise ValueError(f"{n} stages do not fit on {G} noise levels")
    cuts, j = [], G
    for i in reversed(froms):
        j = int(i[j])
        cuts.insert(0, j)
    return cuts


def similarity_cost(similarity, mean=False):
    """METHOD: Eq. 22 with its sign put right (D5): cost[i, j] = sum of 1 - S over the square i .. j-1.
    similarity (G, G) in [0, 1]. mean: -mean of S over it, as the official code has it, which favours stages of a
    single level."""
    G = len(similarity)
    s = torch.zeros(G + 1, G + 1, dtype=torch.float64)
    s[1:, 1:] = similarity.cumsum(0).cumsum(1)
    i, j = torch.arange(G)[:, None], torch.arange(G + 1)[None]
    square, size = s[j, j] - s[i, j] - s[j, i] + s[i, i], (j - i).clamp(min=1) ** 2
    return -square / size if mean else size - square


def centre_affinity_cost(affinity):
    """Go et al. (Table 4): cost[i, j] (G, G + 1) = -sum of the affinity (G, G), higher: more alike, of i .. j-1 to
    their middle element."""
    G = len(affinity)
    s = F.pad(affinity.double().cumsum(1), (1, 0))
    i, j = torch.arange(G)[:, None], torch.arange(G + 1)[None]
    centre = (i + (j - i) // 2).clamp(0, G - 1)
    return s[centre, i] - s[centre, j]


def optimal_edges_of_three(data, samples):
    """METHOD: Algorithm 1 on data (N, C, R, R), float: ([t1, t2], report)."""
    t, s0, s1, s1_xt = similarity_to_ends(data, samples)
    readings = algorithm1(t, s0, s1_xt) + algorithm1(t, s0, s1)
    names = ("first crossing, eps*_1 of xt", "arg max, eps*_1 of xt", "first crossing, eps*_1 of x_1",
             "arg max, eps*_1 of x_1")
    bins = [(k * t.numel() // 100, (k + 1) * t.numel() // 100) for k in range(100)]
    return readings[0], dict(samples=samples, readings=dict(zip(names, readings)), curves=[
        [round(float(v[a:b].mean()), 5) for v in (t, s0, s1_xt, s1)] for a, b in bins if b > a])


def optimal_edges(data, samples, n):
    """METHOD: Algorithm 2 on data (N, C, R, R), float: ([t1 .. t_(n-1)], report)."""
    nodes = torch.cat([T_FIRST + 0.05 * torch.arange(20), torch.ones(1)]).double()
    samples = max(1, samples // 20)
    maps = {what: similarity_map(data, samples, nodes, what) for what in ("eps", "x0")}
    middle = (nodes[1:] + nodes[:-1]) / 2
    rules = ("least sum of 1 - S", "largest mean of S")
    readings = {f"{rule}, {what}": [float(middle[c - 1]) for c in best_partition(similarity_cost(s, mean), n)]
                for mean, rule in enumerate(rules) for what, s in maps.items()}
    return readings["least sum of 1 - S, eps"], dict(
        samples=samples, readings=readings, nodes=nodes.tolist(),
        map=[[round(v, 4) for v in row] for row in maps["eps"].tolist()])


def go_edges(t, affinity, n):
    """Go et al. (Table 4): n stages of the levels t (G,) by their affinity (G, G): [t1 .. t_(n-1)] (D7)."""
    G = len(t)
    cuts = best_partition(centre_affinity_cost(affinity), n, G // (2 * n), -(-3 * G // (2 * n)))
    return [float(t[c]) for c in cuts]


def cluster_timesteps(method, n, data=None, samples=10_000, affinity=None):
    """METHOD: Table 4: edges [t1 .. t_(n-1)] of n stages, and a report (a dict of what was found).

    optimal: Algorithm 1 (n = 3) or 2; optimal2: Algorithm 2; both need data (N, C, R, R), float. time, snr
    (Go et al.): no data. gradient (Go et al.): affinity (G, G) between G even noise levels, see
    gradient_affinity. Raises ValueError for what is missing, and if no n stages are found."""
    t, report = torch.arange(1, 1001).double() / 1000, {}
    if n == 1:
        edges = []
    elif method == "optimal" and n == 3:
        edges, report = optimal_edges_of_three(data, samples)
    elif method in ("optimal", "optimal2"):
        edges, report = optimal_edges(data, samples, n)
    elif method in ("time", "snr"):
        level = t if method == "time" else 2 * sigma_of(t).log()
        edges = go_edges(t, -(level[:, None] - level).abs(), n)
    elif method == "gradient" and affinity is not None:
        edges = go_edges(torch.arange(1, len(affinity) + 1).double() / len(affinity), affinity, n)
    else:
        raise ValueError(f"no clustering '{method}', or no affinity for it")
    edges = [round(e, 4) for e in edges]
    if len(check_edges(edges, f"clustering '{method}'")) != n - 1:
        raise ValueError(f"clustering '{method}' found {len(edges) + 1} stages, not {n}")
    return edges, dict(clustering=method, n=n, edges=edges, **report)


def gradient_affinity(net, config, x, levels=100, batch=128, seed=CLUSTER_SEED):
    """Go et al.: cosine similarities (levels, levels) of the gradients of a unified network's loss at even
    noise levels t = 1 / levels .. 1, each with the same images of x (N, C, R, R) and the same eps (D6). Float64, on
    the CPU. Memory: levels x parameters floats, which is 43 GB for preset paper."""
    if config["arch"] != "unified":
        raise ValueError("gradient clustering needs a checkpoint of --arch unified: one set of weights")
    g, device = torch.Generator().manual_seed(seed), next(net.parameters()).device
    x0 = x[torch.randint(0, len(x), (batch,), generator=g)].to(device)
    eps = torch.randn(x0.shape, generator=g).to(device)
    rows = torch.empty(levels, sum(p.numel() for p in net.parameters()), device=device)
    for k in progress(range(levels), "gradients", batch):
        t = torch.full((batch,), (k + 1) / levels, dtype=torch.float64, device=device)
        level = sigma_of(t) if config["diffusion"] == "edm" else t
        net.zero_grad(set_to_none=True)
        diffusion_loss(net, x0, level, eps, config["diffusion"], 0, config["predict"]).backward()
        rows[k] = F.normalize(torch.cat([p.grad.flatten() for p in net.parameters()]), dim=0)
    return (rows @ rows.T).double().cpu()


# ---------------------------------------------------------------------------------------------
# Loss; first what a network's output means
# ---------------------------------------------------------------------------------------------
def vp_eps(net, xt, t, stage, predict="eps"):
    """eps_hat of a VP network that gives eps_hat or v_hat (D19); t float or float64 (B,)."""
    t = torch.as_tensor(t, dtype=torch.float64, device=xt.device).expand(len(xt))
    out, sigma = net(xt, (999 * t).float(), stage), sigma_of(t).view(-1, 1, 1, 1)
    return out if predict == "eps" else (scale_of(sigma) * (out + sigma * xt)).to(xt.dtype)


def edm_x0(net, x, sigma, stage):
    """x0_hat of an EDM network with its preconditioning, x = x0 + sigma eps; sigma float or float64 (B,)."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
    s = sigma.view(-1, 1, 1, 1)
    total = s ** 2 + SIGMA_DATA ** 2
    c_skip, c_out, c_in = (c.to(x.dtype) for c in (SIGMA_DATA ** 2 / total, s * SIGMA_DATA / total.sqrt(),
                                                   1 / total.sqrt()))
    return c_skip * x + c_out * net(c_in * x, (sigma.log() / 4).float(), stage)


# differs: two parameterisations, continuous noise levels
def diffusion_loss(net, x0, level, eps, diffusion, stage, predict="eps"):
    """VP: mean squared error of eps_hat, or of v_hat, at t = level. EDM: weighted one of x0_hat at sigma = level.
    level float64 (B,). METHOD: stage an int, the batch's one stage: no other decoder runs; or (B,)."""
    sigma = level if diffusion == "edm" else sigma_of(level)
    s = sigma.view(-1, 1, 1, 1).to(x0.dtype)
    if diffusion == "edm":
        weight = (s ** 2 + SIGMA_DATA ** 2) / (s * SIGMA_DATA) ** 2
        return (weight * (edm_x0(net, x0 + s * eps, level, stage).float() - x0) ** 2).mean()
    error = vp_eps(net, scale_of(s) * (x0 + s * eps), level, stage, predict).float() - eps
    return (error if predict == "eps" else error / scale_of(s)).square().mean()


def stage_levels(u, stage, edges, diffusion):
    """METHOD: Sec. 5, the official training: the noise levels of one stage at the quantiles u (B,), float64.
    VP: t even in the stage, then t (1 - 1e-5) + 1e-5. EDM: its log-normal sigma, cut to the stage (D9)."""
    low, high = ([0.0, *edges, 1.0][stage + i] for i in (0, 1))
    if diffusion == "vp":
        return (low + (high - low) * u) * (1 - 1e-5) + 1e-5
    low, high = (v if v in (0.0, 1.0) else lognormal_cdf(v) for v in (low, high))
    z = torch.special.ndtri((low + (high - low) * u).clamp(1e-12, 1 - 1e-12))
    return (P_MEAN + P_STD * z).exp()


def lognormal_cdf(t):
    """Share of EDM's training noise levels below the sigma of t."""
    return float(torch.special.ndtr((sigma_of(t).log() - P_MEAN) / P_STD))


def stage_probabilities(edges, diffusion):
    """METHOD: how often a training batch is of each stage: VP 1 / n each, EDM its log-normal's share, both
    as in the official training (D8, D9)."""
    if diffusion == "vp":
        return [1 / (len(edges) + 1)] * (len(edges) + 1)
    cdf = [0.0, *(lognormal_cdf(e) for e in edges), 1.0]
    return [b - a for a, b in itertools.pairwise(cdf)]


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------
def solver_orders(nfe, order):
    """Orders of DPM-Solver's singlestep steps that spend exactly `nfe` evaluations (the paper's DPM-Solver-
    fast for order 3: 20 = 6 x 3 + 2)."""
    if nfe < 1:
        raise ValueError(f"{nfe} evaluations: at least one is needed")
    if order == 3:
        tail = {0: [2, 1], 1: [1], 2: [2]}[nfe % 3]
        return [3] * ((nfe - sum(tail)) // 3) + tail
    return [order] * (nfe // order) + [1] * (nfe % order)


def dpm_solver_step(eps_model, x, lam, lam_next, order):
    """DPM-Solver-1, -2 or -3 from lambda to lambda_next, lambda = -log sigma, in x = xt / s_t: there the
    exact solution is x - integral of eps d(sigma). eps_model(x, lambda)."""
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


def dpm_solver_sample(eps_model, xt, nfe=20, order=3, t_end=T_END):
    """DPM-Solver, singlestep, noise prediction: steps even in lambda (log SNR / 2) from t = 1 to t_end.

    eps_model(xt, t) -> eps_hat, t a float, the same for the batch; xt (B, C, H, W): N(0, 1) at t = 1. The
    result is at t_end: no last step to clean data, nothing clipped. METHOD: each evaluation, also those
    inside a step, is of its own t and so of its own stage; no step is shortened at an edge."""
    def at(x, lam):
        sigma = math.exp(-lam)
        return eps_model(x * scale_of(sigma), min(float(t_of(sigma)), 1.0))

    first, last = -math.log(sigma_of(1.0)), -math.log(sigma_of(t_end))
    orders, x = solver_orders(nfe, order), xt / scale_of(float(sigma_of(1.0)))
    for k, p in enumerate(orders):
        lam, lam_next = (first + (last - first) * i / len(orders) for i in (k, k + 1))
        x = dpm_solver_step(at, x, lam, lam_next, p)
    return x * scale_of(float(sigma_of(t_end)))


# differs: continuous time
def dpm_solver_pp_sample(eps_model, xt, steps=20, t_end=T_END):
    """DPM-Solver++ 2M, the solver of the paper's latent models: `steps` steps even in t from 1 to t_end, an evaluation
    each, the last of first order (D17). eps_model(xt, t) -> eps_hat, t a float; xt (B, C, H, W): N(0, 1) at t = 1. The
    result is at t_end."""
    ts = [1 + (t_end - 1) * k / steps for k in range(steps + 1)]
    x, before = xt / scale_of(float(sigma_of(1.0))), None                      # in x = xt / s_t
    for t, t_next in itertools.pairwise(ts):
        sigma, sigma_next = float(sigma_of(t)), float(sigma_of(t_next))
        h = math.log(sigma / sigma_next)
        x0_hat = x - sigma * eps_model(x * scale_of(sigma), t)
        x0_mid = x0_hat if before is None or t_next == ts[-1] else x0_hat + (x0_hat - before[0]) * h / (2 * before[1])
        x, before = sigma_next / sigma * x - math.expm1(-h) * x0_mid, (x0_hat, h)
    return x * scale_of(float(sigma_of(t_end)))


def edm_sigmas(steps):
    """EDM's ladder: `steps` noise levels from SIGMA_MAX down to SIGMA_MIN, then 0."""
    a, b = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return [(a + (b - a) * k / max(steps - 1, 1)) ** RHO for k in range(steps)] + [0.0]


# differs: no truncation
def heun_sample(denoiser, noise, sigmas):
    """EDM's Algorithm 1: Heun's method from sigmas[0] to sigmas[-1] = 0, where the last step is Euler's;
    2 len(sigmas) - 3 evaluations. denoiser(xt, sigma float) -> x0_hat. noise (B, C, H, W), standard normal. The state
    is float64, as EDM's."""
    xt = noise.double() * sigmas[0]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        h, slope = sigma_next - sigma, (xt - denoiser(xt, sigma)) / sigma
        x_next = xt + h * slope
        if sigma_next > 0:
            x_next = xt + h * (slope / 2 + (x_next - denoiser(x_next, sigma_next)) / sigma_next / 2)
        xt = x_next
    return xt


# ---------------------------------------------------------------------------------------------
# Search: the edges of the stages
# ---------------------------------------------------------------------------------------------
def plan_path(args):
    """Where --search leaves its plan, and --train looks for it."""
    unit = "_unit" if args.unit_range else ""
    space = "_latent" if args.space == "latent" else ""
    return Path(args.out) / f"plan_{args.clustering}_{args.stages}{unit}{space}.json"


# differs: another method
def search(args, device):
    """METHOD: Sec. 3.2, Table 4: clusters the noise levels of --data, writes plan.json and pictures."""
    begun, affinity, data = time.time(), None, None
    name = args.data or "fashion10k"
    if args.clustering == "gradient":                                  # of the checkpoint's own latents
        find_checkpoint(args)
        saved = load_checkpoint(args.checkpoint)
        if "ema" not in saved or saved["args"]["space"] != args.space:
            raise ValueError(f"{args.checkpoint} is not of a network in {args.space} space")
        args.autoencoder = load_autoencoder(saved, args.checkpoint).to(device) if args.space == "latent" else None
    if args.clustering not in ("time", "snr"):
        data = model_data(args, device).to(device)
        data = to_float(data) if args.space == "pixel" else data
    if args.clustering == "gradient":
        if data.shape[1] != saved["channels"]:
            raise ValueError(f"--data {name} has {data.shape[1]} channels, the checkpoint {saved['channels']}")
        net = build_net(saved["args"], saved["channels"])
        net.load_state_dict(saved["net"] if "net" in saved else saved["ema"])
        affinity = gradient_affinity(net.to(device).eval(), saved["args"], data)
    elif args.unit_range and data is not None:
        data = (data + 1) / 2
    edges, plan = cluster_timesteps(args.clustering, args.stages, data, args.samples, affinity)
    seconds = round(time.time() - begun, 2)
    plan = dict(plan, data=name, images=None if data is None else len(data), unit_range=args.unit_range,
                wanted_samples=args.samples, autoencoder=digest(args.autoencoder),
                sigmas=[round(float(sigma_of(e)), 4) for e in edges], seconds=seconds)
    path = plan_path(args)
    save_json(path, plan)
    for reading, value in plan.get("readings", {}).items():
        print(f"  {reading}: {[round(v, 4) for v in value]}")
    if "curves" in plan:
        names = ("S0: to eps", "S1: to eps*_1 of xt", "S1: to eps*_1 of x_1")
        save_curves(path.with_suffix(".png"), plan["curves"], names, edges)
    if "map" in plan:
        picture = torch.tensor(plan["map"]).flip(0)[None, None] * 2 - 1        # S(0, 0) at the lower left
        save_grid(path.with_suffix(".png"), picture, columns=1, scale=12)
    if args.experiment:                                                # the shipped results are not for every try
        write_line(args, dict(
            experiment=args.experiment, method=args.clustering, solver=None, data=name,
            preset=args.preset, seed=CLUSTER_SEED, n=args.samples, extractor=None, fd=None, nfe=None,
            macs_per_image=None, seconds_per_image=None, seconds=seconds, device=device_name(device),
            torch=torch.__version__, images_seen=None, source_sha256=sha256_of(__file__),
            plan={k: v for k, v in plan.items() if k not in ("curves", "map")}, args=plain_args(args)))
    print(f"{args.clustering}: edges {edges} (sigma {plan['sigmas']}), {seconds} s: {path}")


def find_edges(args):
    """(edges, where they come from) for training: --edges, --plan FILE, or what --search left under --out for the same
    images, settings and autoencoder; None if there is nothing yet."""
    if args.arch == "unified":                                         # whatever --edges say: one stage
        return [], "none"
    if args.edges is not None:
        return check_edges(args.edges), "by hand"
    path = Path(args.plan) if args.plan else plan_path(args)
    if not args.plan and not path.is_file():
        return None
    try:
        plan = json.loads(path.read_text())
        edges = plan["edges"]
        known = [plan.get(k) for k in ("data", "wanted_samples", "autoencoder")]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is no plan (not JSON, or without edges)") from None
    if not args.plan and known != [args.data or "fashion10k", args.samples, digest(args.autoencoder)]:
        return None                                                    # of other images or settings
    print(f"edges: {path}")
    return check_edges(edges, path), plan.get("clustering", "by hand")


# ---------------------------------------------------------------------------------------------
# Plans: what is sampled, as a small dict; the network; samples
# ---------------------------------------------------------------------------------------------
def run_sampler(net, config, z, solver, steps, t_end=T_END, trace=lambda t, stage: None):
    """From noise z (B, C, R, R), N(0, 1), to images, with net(x, label, stage). steps: evaluations of
    DPM-Solver, noise levels of Heun (2 steps - 1 evaluations). trace(t, stage): called at each evaluation."""
    def stage_at(t):
        stage = stage_of(t, config["edges"])                           # METHOD: of each evaluation by itself
        trace(t, stage)
        return stage

    if solver == "heun":
        return heun_sample(lambda x, sigma: edm_x0(net, x.float(), sigma, stage_at(float(t_of(sigma)))), z,
                           edm_sigmas(steps))
    def eps_model(xt, t):
        return vp_eps(net, xt, t, stage_at(t), config["predict"])
    if solver == "dpm2m":
        return dpm_solver_pp_sample(eps_model, z, steps, t_end)
    return dpm_solver_sample(eps_model, z, steps, SOLVERS[solver], t_end)


# differs: one plan per solver and number of steps
def make_plan(config, solver, steps, t_end=T_END):
    """What is run: edges, and t and stage of each evaluation, taken from the executed sampler."""
    if (solver == "heun") != (config["diffusion"] == "edm"):
        raise ValueError(f"--solver {solver} is not for a network of --diffusion {config['diffusion']}: "
                         "heun goes with edm, the others with vp")
    if steps < 1:
        raise ValueError(f"--steps {steps} must be at least 1")
    seen = []
    run_sampler(lambda x, label, stage: torch.zeros_like(x), config, torch.zeros(1, 1, 1, 1), solver, steps,
                t_end, lambda t, stage: seen.append((round(t, 6), stage)))
    stages = [stage for _, stage in seen]
    return dict(arch=config["arch"], solver=solver, steps=steps, t_end=None if solver == "heun" else t_end,
                edges=config["edges"], widths=config["widths"], taus=[t for t, _ in seen], stages=stages,
                nfe=[stages.count(s) for s in range(len(config["widths"]))])


# differs: the solver of the checkpoint's kind
def get_plan(args, solver, steps):
    """The plan for the loaded checkpoint; printed."""
    plan = make_plan(args.config, solver, steps, args.t_end)
    print(f"{method_name(args.config)} {solver}: {plan['nfe']} evaluations per stage, t {plan['taus']}")
    return plan


def default_solver(config):
    return "heun" if config["diffusion"] == "edm" else "dpm2m" if config["space"] == "latent" else "dpm3"


def method_name(config):
    """Row of Table 3: multistage, unified, separate with +ES (early stopping), +TP (tailored parameters); and how it
    was trained, if not as the paper."""
    name = config["arch"] + "+ES" * config["early_stopping"]
    name += "+TP" * (config["arch"] == "separate" and len(set(config["widths"])) > 1)
    if config["stage_probability"]:
        name += f", shares {' '.join(f'{p:.2f}' for p in config['stage_probability'])}"
    return name + ", mixed batches" * config.get("mixed_batches", False)


def load_net(args, device):
    """The averaged network of the checkpoint; with early stopping, each stage's best."""
    saved = load_checkpoint(args.checkpoint)
    args.config, args.channels = saved.get("args"), saved.get("channels")
    if "ema" not in saved:
        raise ValueError(f"{args.checkpoint} holds an autoencoder only: name a checkpoint of --train")
    args.autoencoder = load_autoencoder(saved, args.checkpoint).to(device) if "autoencoder" in saved else None
    args.data = args.data or args.config["data"]
    args.solver = args.solver or [default_solver(args.config)]
    args.steps = args.steps or [18 if args.solver == ["heun"] else 20]
    args.seen = {k: saved[k] for k in ("images_seen", "step", "training_macs", "forward_macs")}
    net = build_net(args.config, args.channels)
    net.load_state_dict(saved["ema"] if saved.get("best") is None else saved["best"])
    net = net.to(device).eval().requires_grad_(False)
    return torch.compile(net) if args.compile else net


# differs: one network, stages
def sample(args, net, plan, seeds, device):
    """uint8 images (n, C, R, R), seed by seed, of this process's share of the seeds."""
    if not len(seeds):
        raise ValueError("--n is smaller than the number of processes")
    config, shape, parts = args.config, (args.channels, args.config["res"], args.config["res"]), []

    def fast(x, label, stage):
        with torch.no_grad(), autocast(device, args.precision):
            return net(x.contiguous(memory_format=torch.channels_last), label, stage).float()

    batches = torch.tensor(list(seeds)).split(250)
    for batch in progress(batches, f"sample {plan['solver']}", len(batches[0])):
        z = noise_for(batch.tolist(), shape).to(device)
        x = run_sampler(fast, config, z, plan["solver"], plan["steps"], plan["t_end"])
        parts.append(to_image(x, args.autoencoder))
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------
def autocast(device, precision):
    """Context of bfloat16 arithmetic where it is wanted, or (auto) where the hardware has it."""
    fast = precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def save_checkpoint(path, **content):
    """A plain dict of tensors and plain values, written to a temporary name and renamed."""
    write_atomically(path, lambda part: torch.save(dict(script=SCRIPT, **content), part))


# differs: the states have other names
def load_checkpoint(path):
    """A checkpoint or shipped weights of this script, on the CPU, floats as float32.
    Raises OSError or ValueError with one line if it is missing, damaged or of another script."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise OSError(f"no checkpoint {path}: run --train first, or name one with --checkpoint") from None
    except Exception as error:                       # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from None
    if not isinstance(saved, dict) or saved.get("script") != SCRIPT:
        other = saved.get("script", "unknown") if isinstance(saved, dict) else "unknown"
        raise ValueError(f"{path} is a checkpoint of '{other}', not of '{SCRIPT}'")
    for key in ("net", "ema", "best"):
        if isinstance(saved.get(key), dict):
            saved[key] = {k: v.float() if v.is_floating_point() else v for k, v in saved[key].items()}
    return saved


def without_norms(net):
    """The network with its norms left out: they cost no MACs, but most of the time of counting."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return net


# differs: of each stage, with the backward pass
@functools.cache
def network_macs(config, channels):
    """MACs of one image in each stage: [(an evaluation, a training step with its backward pass), ...],
    counted on the meta device; config as JSON."""
    config = json.loads(config)
    with torch.device("meta"):
        net = without_norms(build_net(dict(config, dropout=0.0), channels))
        x, t = torch.zeros(1, channels, config["res"], config["res"]), torch.zeros(1, dtype=torch.float64)

    @torch.enable_grad()
    def step(stage):
        net.zero_grad(set_to_none=True)
        diffusion_loss(net, x, t, x, config["diffusion"], stage).backward()
    return [(count_macs(net, x, t, s), count_macs(step, s)) for s in range(len(config["widths"]))]


# differs: METHOD: one stage per batch; budgets in MACs; early stopping
def train(args, device, rank, world):
    """METHOD: the official training: each batch is of one stage, drawn at random (D8). Returns the run's
    checkpoint.

    Every random draw of step k comes from a seed made of --seed and k: a resumed run needs no generator
    state and equals an uninterrupted one. Every process draws the global batch and keeps its share:
    the weights do not depend on the number of processes (up to rounding and dropout)."""
    saved = {}
    if args.resume:                                                    # its arguments, its folder
        saved, run = load_checkpoint(args.checkpoint), Path(args.checkpoint).parent
        if "optimizer" not in saved:
            raise ValueError(f"--resume: {args.checkpoint} has weights only")
        args = argparse.Namespace(**{**vars(args), **saved["args"]})
    else:
        name = [f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"]          # two runs may begin at once
        if world > 1:
            dist.broadcast_object_list(name)                           # the clocks may differ
        run = Path(args.out) / name[0]
        args.edges, args.clustering = find_edges(args)
        args.widths = decoder_widths(args)
    args.data, latent = args.data or "fashion10k", args.space == "latent"
    if latent and args.resume:
        args.autoencoder = load_autoencoder(saved, args.checkpoint).to(device)
    x = model_data(args, device)
    channels, args.res, n = x.shape[1], x.shape[-1], len(args.widths)
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} does not divide among {world} processes")
    probability = args.stage_probability or stage_probabilities(args.edges, args.diffusion)
    if len(probability) != n or not (min(probability) >= 0 and abs(sum(probability) - 1) <= 1e-6):
        raise ValueError(f"--stage-probability: {n} shares that add up to 1 are needed, not {probability}")
    config = {k: getattr(args, k) for k in (*PRESETS, "data", "preset", "arch", "diffusion", "edges", "seed",
                                            "early_stopping", "stage_probability", "mixed_batches", "budget",
                                            "clustering", "space")}
    config.update({k: getattr(args, k) for k in ("latent", "factor", "ae_iters") if latent})
    macs = network_macs(json.dumps(config), channels)
    if args.budget and not args.resume:                                # METHOD: equal training MACs for all arms
        a_step = sum(p * step for p, (_, step) in zip(probability, macs)) * args.batch
        args.iters = config["iters"] = round(args.budget / a_step)
        if args.iters < 1:
            raise ValueError(f"--budget {args.budget:g} is less than one step of {a_step:.2g} MACs")
    if args.fd_every:                                                  # found out now, not at the first FD
        width = load_extractor(args.data, device, args.inception)[0].width
        if args.fd_n <= width:
            raise ValueError(f"--fd-n {args.fd_n} is too small for FD with {width} features")
    held_out, mine = None, slice(rank, None, world)
    if args.early_stopping:                                            # every tenth image, at most 1000 (D10)
        every = min(len(x), max(10, -(-len(x) // 1000)))
        rest = torch.arange(len(x)) % every < every - 1
        x, held_out = x[rest], x[~rest]
        held_out = (held_out if latent else to_float(held_out)).to(device)
        z = noise_for(range(len(held_out)), tuple(held_out.shape[1:])).to(device)
    torch.manual_seed(args.seed)
    net = build_net(config, channels)
    if args.res % net.multiple:
        raise ValueError(f"the network halves its input: the resolution {args.res} must be a multiple of "
                         f"{net.multiple}")
    if rank == 0:
        save_json(run / "args.json", config)                           # an unwritable folder fails here
    print(f"{method_name(config)}: edges {args.edges}, widths {args.widths}, batches per stage "
          f"{[round(p, 4) for p in probability]}, {args.iters} steps")
    ema = copy.deepcopy(net).to(device).eval().requires_grad_(False)
    best = copy.deepcopy(ema) if args.early_stopping else None
    net = net.to(device).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    step, spent, best_loss = 0, [0, 0], [math.inf] * n                 # spent: forward, with backward
    if args.resume:
        net.load_state_dict(saved["net"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent, best_loss = saved["step"], [saved["forward_macs"], saved["training_macs"]], saved["best_loss"]
        if best is not None:
            best.load_state_dict(saved["best"])
    # The decoders of the other stages have no gradient in a step.
    model = DistributedDataParallel(net, find_unused_parameters=n > 1) if world > 1 else net
    model = torch.compile(model) if args.compile else model
    loss_sum, count, begun = torch.zeros(n, device=device), [0] * n, time.time()
    fall = max(1, args.decay * args.iters)

    def fail(what):
        good = run / "checkpoint.pt"
        raise ValueError(f"the {what} not finite: stopped at step {step}; "
                         + (f"the last good checkpoint is {good}; " if good.exists() else "") + "try a lower --lr")

    def mean_loss():
        if not loss_sum.isfinite().all():
            fail("loss is")
        return float(loss_sum.sum()) / max(sum(count), 1)

    def keep_best():
        for s in range(n):                                             # METHOD: ES, each stage by itself
            u = (torch.arange(len(held_out)) + 0.5) / len(held_out)
            levels = stage_levels(u.double(), s, args.edges, args.diffusion).to(device)
            with torch.no_grad():
                losses = [diffusion_loss(ema, *part, args.diffusion, s, args.predict) * len(part[0])
                          for part in zip(held_out.split(250), levels.split(250), z.split(250))]
            loss = float(sum(losses)) / len(held_out)
            if loss < best_loss[s]:
                best_loss[s] = loss
                best.nets[s].load_state_dict(ema.nets[s].state_dict())

    def save():
        mean = mean_loss()
        if not all(w.isfinite().all() for w in net.parameters()):
            fail("weights are")
        if best is not None:
            keep_best()
        rate = round(sum(count) * args.batch / (time.time() - begun), 1)
        common = dict(step=step, channels=channels, args=config, images_seen=step * args.batch,
                      forward_macs=spent[0], training_macs=spent[1])
        if latent:
            common.update(autoencoder=args.autoencoder.state_dict(), autoencoder_shape=[
                args.autoencoder.channels, args.autoencoder.latent, args.autoencoder.factor])
        state = ema.state_dict()
        if rank == 0 and step == args.iters:                           # what is shipped
            half = {k: v.half() for k, v in (state if best is None else best.state_dict()).items()}
            save_checkpoint(run / "weights.pt", **common, ema=half)
        if rank == 0:
            save_checkpoint(run / "checkpoint.pt", **common, ema=state, net=net.state_dict(),
                            optimizer=optimizer.state_dict(), best=best and best.state_dict(), best_loss=best_loss)
        result = measure_while_training() if args.fd_every and (step % args.fd_every == 0 or step == args.iters) else {}
        if rank > 0:
            return
        grid = argparse.Namespace(config=config, channels=channels, precision=args.precision,
                                  autoencoder=args.autoencoder)
        plan = make_plan(config, default_solver(config), 6 if args.diffusion == "edm" else 10)
        save_grid(run / "samples.png", sample(grid, best or ema, plan, range(32), device))
        each = [round(float(v) / c, 5) if c else None for v, c in zip(loss_sum, count)]
        line = dict(step=step, images_seen=step * args.batch, loss=round(mean, 5),
                    stages=None if args.mixed_batches else each,
                    training_macs=spent[1], images_per_s=rate,
                    **result, **({"held_out": [round(v, 6) for v in best_loss]} if best else {}))
        with open(run / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")

    def measure_while_training():                                      # Fig. 1(d): FD against training compute
        now = argparse.Namespace(**{**vars(args), "config": config, "channels": channels, "seeds": 1, "seed": 0,
                                    "n": args.fd_n, "experiment": "curve", "solver": None, "steps": None})
        now.solver = [default_solver(config)]
        now.steps = [18 if args.diffusion == "edm" else 20]
        now.seen = dict(images_seen=step * args.batch, step=step, training_macs=spent[1], forward_macs=spent[0])
        return dict(fd=evaluate(now, best or ema, device, rank, world))

    todo, last = range(step + 1, args.iters + 1), max(s for s in range(n) if probability[s])
    shares = torch.tensor(list(itertools.accumulate(probability))[:-1])
    for step in progress(todo, f"train {method_name(config)}", args.batch, note=lambda: f"loss {mean_loss():.4f}"):
        torch.manual_seed(args.seed * 10_000_019 + step)
        stage = torch.bucketize(torch.rand(args.batch if args.mixed_batches else 1), shares, right=True).clamp(max=last)
        i, u = torch.randint(0, len(x), (args.batch,)), torch.rand(args.batch, dtype=torch.float64)
        level = torch.stack([stage_levels(u, s, args.edges, args.diffusion) for s in range(n)])
        level = level[stage, torch.arange(args.batch)][mine].to(device)
        each = [args.batch * v / len(stage) for v in stage.bincount(minlength=n).tolist()]     # images of each stage
        stage = stage[mine] if args.mixed_batches else int(stage)      # METHOD: an int: one decoder runs
        x0 = x[i[mine]] if latent else to_float(x[i[mine]])
        if args.flip and not latent:
            x0 = torch.where(torch.rand(args.batch)[mine, None, None, None] < 0.5, x0.flip(-1), x0)
        eps = torch.randn(args.batch, *x0.shape[1:])[mine]
        x0, eps = x0.to(device), eps.to(device)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / args.warmup, (args.iters + 1 - step) / fall)
        with autocast(device, args.precision):
            loss = diffusion_loss(model, x0, level, eps, args.diffusion, stage, args.predict)
        optimizer.zero_grad(set_to_none=True)                          # Adam leaves the other decoders alone
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        spent = [v + sum(int(k) * m[i] for k, m in zip(each, macs)) for i, v in enumerate(spent)]
        if sum(count) and (step - 1) % args.save_every == 0:           # a new window
            loss_sum, count, begun = torch.zeros(n, device=device), [0] * n, time.time()
        slot = 0 if args.mixed_batches else stage
        loss_sum[slot] += loss.detach()
        count[slot] += 1
        if step % 50 == 0:
            mean_loss()                                                # stops at a NaN
        if step % args.save_every == 0 or step == args.iters:
            save()
    return run / "checkpoint.pt"


def decoder_widths(args):
    """One width for each stage: --widths; the preset's for three stages; else Eq. 23 of the preset's."""
    stages = len(args.edges) + 1
    if args.own_widths:
        if len(args.own_widths) != stages:
            raise ValueError(f"--widths {args.own_widths}: {stages} stages need {stages} decoders, not "
                             f"{len(args.own_widths)}")
        return args.own_widths
    if args.arch == "unified":
        return [args.ch]
    return args.widths if stages == len(args.widths) else tailored_widths(args.edges, args.widths)


# ---------------------------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------------------------
# differs: MACs of each stage
def plan_macs(config, channels, plan):
    """MACs per image of a plan: the sampler itself is run on the meta device; each evaluation counts what
    its stage's decoder costs."""
    total = [0]

    def net(x, label, stage):
        total[0] += network_macs(json.dumps(config), channels)[stage][0]
        return torch.zeros_like(x)
    z = torch.zeros(1, channels, config["res"], config["res"], device="meta")
    run_sampler(net, config, z, plan["solver"], plan["steps"], plan["t_end"])
    return total[0]


def device_name(device):
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def plain_args(args):
    return {k: str(v).replace(f"{HERE}/", "") if isinstance(v, (str, Path)) else v
            for k, v in vars(args).items() if k not in ("config", "seen", "autoencoder")}


def write_line(args, line):
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    with open(args.results, "a") as file:
        file.write(json.dumps(line) + "\n")


# differs: stages, training compute
def append_result(args, device, plan, experiment, **measured):
    """One line of results.jsonl: what was measured, under which conditions, by which source."""
    config, macs = args.config, plan_macs(args.config, args.channels, plan)
    per_evaluation = macs / sum(plan["nfe"])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_net(config, args.channels).parameters())
    if args.autoencoder is not None:
        with torch.device("meta"):
            measured["decoder_macs"] = count_macs(copy.deepcopy(args.autoencoder).to("meta").decode, torch.zeros(
                1, args.channels, config["res"], config["res"]))
    write_line(args, dict(
        experiment=experiment, method=method_name(config), solver=plan["solver"], data=args.data,
        preset=config["preset"], space=config["space"], clustering=config["clustering"], edges=config["edges"],
        widths=config["widths"], training_seed=config["seed"], **measured, nfe=plan["nfe"], macs_per_image=macs,
        macs_per_evaluation=per_evaluation, parameters=parameters, **args.seen,
        table2_pmacs=per_evaluation * args.seen["step"] / 1e15,        # Table 2's way: one image a step, no backward
        training=config,
        device=device_name(device), torch=torch.__version__, source_sha256=sha256_of(__file__), plan=plan,
        args=plain_args(args)))


# differs: stages
def evaluate(args, net, device, rank, world):
    """FD, inception score, MACs and seconds for every --solver, --steps and seed; image i of seed s comes
    from seed s * n + i. One line of results each. Returns the last FD."""
    R = args.config["res"] * args.config.get("factor", 1)
    x, _, captions = load_images(args.data, R)
    extractor, name = load_extractor(args.data, device, args.inception)
    if args.n <= extractor.width:
        raise ValueError(f"--n {args.n} is too small for FD with {extractor.width} features")
    if x.shape[1:] != (args.channels if args.autoencoder is None else args.autoencoder.channels, R, R):
        raise ValueError(f"--data {args.data} has images of {list(x.shape[1:])}, the checkpoint was trained on "
                         f"'{args.config['data']}'")
    reference, fd, floor = feature_stats(extract(extractor, x)[0]), None, {}
    if args.autoencoder is not None:                                   # what no latent model can be better than
        some = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:args.n]]
        back = to_image(encode_all(args.autoencoder, some, device).to(device), args.autoencoder)
        floor = dict(decoded_fd=frechet_distance(feature_stats(extract(extractor, back)[0]), reference))
        print(f"{len(some)} images through the autoencoder: FD[{name}]@{len(some)} {floor['decoded_fd']:.3f}")
    for plan in [get_plan(args, *job) for job in itertools.product(args.solver, args.steps)]:
        for seed in range(args.seed, args.seed + args.seeds):
            seeds, begun = range(seed * args.n, (seed + 1) * args.n), time.time()
            images = sample(args, net, plan, seeds[rank::world], device)
            seconds = time.time() - begun
            mine, second = (gather(part, world) for part in extract(extractor, images))
            if rank > 0:
                continue
            logits = second if name == "inception" else class_logits(extractor, second, captions)
            fd, (score, _) = frechet_distance(feature_stats(mine), reference), inception_score(logits)
            append_result(args, device, plan, args.experiment or "evaluate", seed=seed, n=args.n,
                          extractor=name, fd=fd, inception_score=score, seconds_per_image=seconds / args.n,
                          processes=world, **floor)
            print(f"{method_name(args.config)} {plan['solver']} {plan['nfe']} evaluations, seed {seed}: "
                  f"FD[{name}]@{args.n} {fd:.3f}, score {score:.2f}, {seconds:.0f} s")
    return fd


# ---------------------------------------------------------------------------------------------
# Ledger
# ---------------------------------------------------------------------------------------------
# Architectures: width of the encoder, widths of the decoders, printed parameters (M) and GFLOPs per stage,
# of the shared part, in total. Table 7's shared parts are not printed. None: not printed.
TABLE5 = ((128, [192, 128, 16], (169, 108, 47, 43, 237), (29.95, 17.65, 6.31, 5.75, 18.65)),
          (160, [160, 128, 16], (168, 138, 72, 68, 242), (27.57, 21.73, 9.65, 8.98, 19.7)),
          (192, [144, 112, 16], (189, 160, 103, 98, 256), (29.43, 23.91, 13.7, 12.93, 22.45)),
          (192, [128, 64, 16], (174, 126, 103, 98, 207), (26.54, 17.62, 13.7, 12.93, 22.45)))
TABLE6 = ((192, [224, 192, 160], (238, 189, 161, 79, 428), (80.03, 64.95, 51.87, 16.69, 65.75)),
          (160, [224, 192, 128], (206, 158, 108, 55, 361), (72.61, 57.85, 34.38, 11.6, 54.37)),
          (224, [224, 192, 128], (274, 224, 170, 108, 452), (88.39, 72.97, 48.17, 22.71, 69.22)),
          (224, [256, 192, 128], (316, 224, 170, 108, 494), (105.82, 72.97, 48.17, 22.71, 76.19)))
TABLE7 = ((128, [128], (108, None, None), (17.65, None, None)),
          (64, [208, 128], (136, 95, None, 188), (26.59, 16.85, None, 21.49)),
          (128, [192, 128, 16], (169, 108, 47, None, 230), (29.95, 17.65, 6.31, None, 18.65)),
          (96, [208, 144, 112, 32], (159, 95, 71, 32, None, 284), (29.78, 16.85, 11.97, 4.41, None, 17.33)),
          (64, [224, 160, 160, 64, 48], (154, 88, 88, 27, 21, None, 336),
           (30.38, 16.82, 16.82, 4.42, 3.28, None, 17.03)))
TABLE7_EDGES = ([], [0.476], [0.426, 0.626], [0.376, 0.526, 0.726], [0.376, 0.476, 0.626, 0.776])
NOTES = {("Table 5, 4", "total", "G"): "the printed one is architecture 3's",
         ("Table 7, 2", "stage 2", "M"): "the printed cell is stage 2 of n = 4 (width 144 on an encoder of 96); "
                                         "136 M, 26.59 G and 188 M together fit widths 208, 128",
         ("Table 7, 2", "stage 2", "G"): "as above", ("Table 7, 2", "total", "G"): "with 16.85: 21.49",
         ("Table 7, 3", "total", "M"): "Table 5 prints 237 for the same network",
         ("Table 7, 3", "total", "G"): "by .426/.626, as Table 5; by the text's .442/.631 it is 18.90"}


def count_both(layer, *inputs):
    """(operations by the paper's rule, all MACs) of layer(*inputs) on the meta device. The paper's rule is
    that of the torchstat package: multiply-accumulates and bias additions of nn.Conv2d, multiply-accumulates
    of nn.Linear; not the attention layers and not the input pyramid (in the official code neither is an
    nn.Conv2d), no norms."""
    total, hooks = [0], []
    left_out = {m for a in layer.modules() if isinstance(a, (Attention, PyramidDown)) for m in a.modules()}

    def count(module, _, y):
        total[0] += y.numel() * (module.weight[0].numel() + isinstance(module, nn.Conv2d))

    for module in layer.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in left_out:
            hooks.append(module.register_forward_hook(count))
    macs = count_macs(layer, *inputs)
    for hook in hooks:
        hook.remove()
    return total[0], macs


def paper_config(preset, ch, widths, **more):
    """Configuration of one of the paper's networks."""
    config = {k: v[PRESET_NAMES.index(preset)] for k, v in PRESETS.items()}
    return dict(config, ch=ch, widths=widths, arch="multistage", diffusion="vp", **more)


@functools.cache
def measure_network(config, channels=3):
    """For a configuration as JSON: (parameters, the paper's operations, all MACs) of each stage, then of the
    shared part; and the parameters in total."""
    config = json.loads(config)
    with torch.device("meta"):
        net = build_net(config, channels).eval()
        x, label = torch.zeros(1, channels, config["res"], config["res"]), torch.zeros(1)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (net.encoder, *net.decoders)]
    inputs = without_norms(net).encoder(x, label)
    calls = [(net.encoder, (x, label)), *((decoder, inputs) for decoder in net.decoders)]
    shared, *found = [[size, *count_both(part, *given)] for size, (part, given) in zip(sizes, calls)]
    return [[a + b for a, b in zip(shared, part)] for part in found] + [shared], sum(sizes)


# differs: other tables
def ledger(path):
    """The paper's efficiency cells, computed now on the meta device, beside the printed values."""
    rows = []

    def row(table, cell, paper, ours, note=""):
        rows.append(dict(table=table, cell=cell, paper=paper, ours=ours, note=note))
        printed, value = ("-" if v is None else f"{v:,.3f}".rstrip("0").rstrip(".") if isinstance(v, float)
                          else f"{v:,}" for v in (paper, ours))
        print(f"{table:11} {cell:42} {printed:>10} {value:>14}  {note}")

    def network(table, config, weights, printed_m, printed_g, weighted_by):
        found, total = measure_network(json.dumps(config))
        names = [f"stage {s + 1}" for s in range(len(config["widths"]))] + ["shared"]
        for name, (parameters, flops, macs), m, g in zip(names, found, printed_m, printed_g):
            row(table, f"{name}: parameters, M", m, parameters / 1e6, NOTES.get((table, name, "M"), ""))
            row(table, f"{name}: GFLOPs", g, flops / 1e9,
                f"{macs / 1e9:.3f} GMACs in all  {NOTES.get((table, name, 'G'), '')}".strip())
        weighted = [sum(w * f[i] for w, f in zip(weights, found)) / sum(weights) / 1e9 for i in (1, 2)]
        if len(names) > 2:
            row(table, "total: parameters, M", printed_m[-1], total / 1e6, NOTES.get((table, "total", "M"), ""))
            row(table, f"total: GFLOPs by {weighted_by}", printed_g[-1], weighted[0],
                f"{weighted[1]:.3f} GMACs in all  {NOTES.get((table, 'total', 'G'), '')}".strip())
        return [f[1] for f in found], weighted[0]

    def lengths(edges):
        return [b - a for a, b in itertools.pairwise([0, *edges, 1])]

    totals = []
    for i, (ch, widths, m, g) in enumerate(TABLE5, 1):
        config = paper_config("paper", ch, widths)
        flops, total = network(f"Table 5, {i}", config, lengths(TABLE7_EDGES[2]), m, g, "length")
        totals.append(total)
        nfe = make_plan(dict(config, edges=PAPER_EDGES), "dpm3", 20)["nfe"]
        row(f"Table 5, {i}", f"total: GFLOPs by NFE {nfe}", None, sum(n * f for n, f in zip(nfe, flops)) / 20 / 1e9,
            "what the caption says; the printed cells are by length of .426/.626" if i == 1 else "")
    for i, (ch, widths, m, g) in enumerate(TABLE6, 1):
        config = paper_config("paper-ldm", ch, widths)
        nfe = make_plan(dict(config, edges=PAPER_EDGES), "dpm2m", 20)["nfe"]
        _, total = network(f"Table 6, {i}", config, nfe, m, g, f"NFE {nfe}")
        totals.append(total)
    row("Table 6, 4", "total with attention in all decoders, M", None,
        measure_network(json.dumps(paper_config("paper-ldm", *TABLE6[3][:2], attended=None)))[1] / 1e6,
        "the official class leaves it out of decoders 2 and 3 (D15)")
    for n, ((ch, widths, m, g), edges) in enumerate(zip(TABLE7, TABLE7_EDGES), 1):
        network(f"Table 7, {n}", paper_config("paper", ch, widths), lengths(edges), m, g, "length")

    def training(name, thousands, published, gflops, printed, batch, config, note=""):
        row("Table 2", f"{name}: GFLOPs", published, gflops, note)
        row("Table 2", f"{name}: PFLOPs as printed", printed, thousands * gflops / 1e3,
            "GFLOPs x iterations: one image a step, no backward pass")
        macs = [step for _, step in network_macs(json.dumps(config), 3)]
        row("Table 2", f"{name}: training, EMACs", None, thousands * 1e3 * batch * sum(macs) / len(macs) / 1e18,
            f"backward included, every image: batch {batch}, stages in equal shares")

    unified = paper_config("paper", 128, [128])
    flops = measure_network(json.dumps(unified))[0][0][1] / 1e9
    training("CIFAR-10, DPM-Solver", 450, 17.65, flops, 7.94, 128, unified)
    training("CIFAR-10, multistage", 250, 18.65, totals[0], 4.66, 128, paper_config("paper", *TABLE5[0][:2]))
    row("Table 2", "CelebA 32, EDM: PFLOPs as printed", 10.06, 570 * flops / 1e3,
        "17.65 is the DPM-Solver network; EDM's own has 21.03 G")
    row("Table 2", "CelebA 32, multistage EDM: PFLOPs", 8.28, None,
        "430 of the printed 19.25 G, which no weighting of either network gives")
    ldm = paper_config("paper-ldm", 224, [224], attended=None)
    training("CelebA-HQ 256, LDM", 490, 88.39, measure_network(json.dumps(ldm))[0][0][1] / 1e9, 43.31, 48, ldm)
    training("CelebA-HQ 256, multistage", 170, 76.19, totals[7], 12.95, 48, paper_config("paper-ldm", *TABLE6[3][:2]))
    for method, printed in (("time", (0.330, 0.670)), ("snr", (0.348, 0.709))):
        edges, _ = cluster_timesteps(method, 3)
        for name, paper, ours in zip(("t1", "t2"), printed, edges):
            row("Table 4", f"{method}: {name}", paper, ours)
    for name, edge in (("sigma_1 of t1 = .442", 0.442), ("sigma_2 of t2 = .631", 0.631)):
        row("footnote 4", name, None, float(sigma_of(edge)),
            "the official EDM code has 7.6577, the sigma of .636" if edge > 0.5 else "as in the official code")
    save_json(path, rows)


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------
# differs: other options
def get_args(argv=None):
    """The command line; what a preset sets is None here and filled in from it."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    do = p.add_argument_group("what to do, any subset, in this order")
    do.add_argument("--search", "--cluster", action="store_true", help="cluster the noise levels: writes a plan")
    for name, text in (("train", "one run"), ("sample", "a PNG of images"),
                       ("evaluate", "FD, MACs, seconds: a line of results each"),
                       ("ledger", "the paper's efficiency cells beside ours")):
        do.add_argument(f"--{name}", action="store_true", help=text)
    run = p.add_argument_group("run")
    run.add_argument("--data", help="fashion10k (default: the checkpoint's), fashion, cifar10, emoji, or a folder")
    run.add_argument("--preset", default="small", choices=PRESET_NAMES)
    run.add_argument("--iters", type=int, help="training steps")
    run.add_argument("--batch", type=int, help="images per training step, all processes together")
    run.add_argument("--lr", type=float)
    run.add_argument("--decay", type=float, help="last share of the steps, in which the learning rate falls")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--n", type=int, default=None, help="images (sample: 64, evaluate: 2000)")
    run.add_argument("--steps", type=int, nargs="+", help="evaluations of DPM-Solver (20), noise levels of Heun (18)")
    run.add_argument("--out", default=f"runs/{SCRIPT}", help="folder of runs, plans and samples")
    run.add_argument("--checkpoint", help="default: the newest run under --out, else the shipped weights")
    run.add_argument("--resume", action="store_true", help="with --train: go on with the newest run")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    run.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    run.add_argument("--compile", action="store_true", help="torch.compile")
    run.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    run.add_argument("--fd-every", type=int, help="train: FD of --fd-n images every so many steps (Fig. 1d), "
                     "a multiple of --save-every")
    run.add_argument("--fd-n", type=int, default=2000)
    run.add_argument("--seeds", type=int, default=1, help="evaluate: this many, from --seed on")
    run.add_argument("--results", default=str(HERE / "results" / SCRIPT / "results.jsonl"))
    run.add_argument("--experiment", help="name of the table or figure in the results")
    run.add_argument("--inception", help="FD with Inception-v3: path of its weights, or 'download'")
    m = p.add_argument_group("METHOD")
    m.add_argument("--space", default="pixel", choices=("pixel", "latent"), help="latent: LDM's, with an autoencoder")
    m.add_argument("--autoencoder", help="latent: a checkpoint whose autoencoder to use (default: OUT/autoencoder.pt, "
                   "else one is trained)")
    m.add_argument("--arch", default="multistage", choices=ARCHS, help="unified: the off switch")
    m.add_argument("--diffusion", default="vp", choices=("vp", "edm"), help="vp: DPM-Solver's; edm: EDM's")
    m.add_argument("--solver", nargs="+", choices=SOLVERS, help="vp: dpm3 (default), dpm2, dpm1, dpm2m "
                   "(DPM-Solver++ 2M, default of latent models); edm: heun")
    m.add_argument("--t-end", type=float, default=T_END, help="last t of DPM-Solver")
    m.add_argument("--clustering", default="optimal", choices=CLUSTERINGS, help="Table 4; gradient needs a "
                   "checkpoint of a unified network")
    m.add_argument("--stages", type=int, help="number of stages (3, or as --edges say)")
    m.add_argument("--edges", type=float, nargs="+", help="of the stages, instead of a clustering's")
    m.add_argument("--plan", help="a plan.json with the edges, instead of OUT/plan_CLUSTERING_STAGES.json")
    m.add_argument("--samples", type=int, help="K of Algorithms 1 and 2 (its 21 levels count as 20)")
    m.add_argument("--unit-range", action="store_true", help="cluster images in [0, 1], as the official code (D3)")
    m.add_argument("--ch", type=int, help="width of the encoder")
    m.add_argument("--widths", dest="own_widths", type=int, nargs="+", help="base width of each decoder (TP), "
                   "next to the data first; default: the preset's, or Eq. 23 of them")
    m.add_argument("--early-stopping", action="store_true", help="ES, with --arch separate (D10)")
    m.add_argument("--stage-probability", type=float, nargs="+", help="share of the batches of each stage (D8)")
    m.add_argument("--mixed-batches", action="store_true", help="each image of a batch its own stage (D8)")
    m.add_argument("--budget", type=float, help="training MACs, backward included: sets --iters")
    args = p.parse_args(argv)
    preset = {key: values[PRESET_NAMES.index(args.preset)] for key, values in PRESETS.items()}
    if args.space == "latent":
        if args.preset not in LATENT_PRESETS or args.diffusion == "edm" or args.unit_range:
            raise ValueError("--space latent goes with --diffusion vp, without --unit-range, and with --preset "
                             f"{', '.join(LATENT_PRESETS)}")
        preset.update(LATENT_PRESETS[args.preset])
    elif args.autoencoder:
        raise ValueError("--autoencoder goes with --space latent")
    if args.budget is not None and not 0 < args.budget < math.inf:
        raise ValueError(f"--budget {args.budget} must be a positive number of MACs")
    if args.iters is not None and args.budget is not None:
        raise ValueError("--iters and --budget both set the length of the training: give one")
    for key, value in preset.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    for key in ("n", "iters", "batch", "seeds", "save_every", "fd_every", "fd_n", "stages", "samples"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} must be at least 1")
    if args.edges is not None and (args.plan or args.stages not in (None, len(check_edges(args.edges)) + 1)):
        raise ValueError(f"--edges {args.edges} contradicts --plan or --stages")
    args.stages = args.stages or (3 if args.edges is None else len(args.edges) + 1)
    if args.stages > 20:
        raise ValueError(f"--stages {args.stages}: the noise levels are clustered into 20 stages at most")
    if args.own_widths and not args.plan and len(args.own_widths) != (1 if args.arch == "unified" else args.stages):
        raise ValueError(f"--widths {args.own_widths}: {args.stages} stages need {args.stages} decoders, not "
                         f"{len(args.own_widths)} (--arch unified: one)")
    if not 0 < args.lr < math.inf or not 0 <= args.decay <= 1:
        raise ValueError(f"--lr {args.lr} must be a positive number, --decay {args.decay} a share")
    if min([args.ch, *(args.own_widths or [])]) < 4:
        raise ValueError(f"--ch {args.ch}, --widths {args.own_widths}: widths must be at least 4")
    if not 1e-5 <= args.t_end < 1:                                     # 1e-5: the smallest t of the training
        raise ValueError(f"--t-end {args.t_end} is not in [1e-5, 1)")
    if args.early_stopping and args.arch != "separate":
        raise ValueError("--early-stopping needs --arch separate: stages that share an encoder cannot stop apart")
    if args.fd_every and args.fd_every % args.save_every:
        raise ValueError(f"--fd-every {args.fd_every} is no multiple of --save-every {args.save_every}")
    if args.resume and not args.train:
        raise ValueError("--resume goes with --train")
    if not any((args.train, args.search, args.sample, args.evaluate, args.ledger)):
        p.error("nothing to do: give --search, --train, --sample, --evaluate or --ledger")
    return args


def find_checkpoint(args):
    """--checkpoint, else the newest run under --out, else the shipped weights; printed."""
    if args.checkpoint is None:
        runs = sorted(Path(args.out).glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        if args.resume and not runs:
            raise ValueError(f"--resume: no run under {args.out}")
        args.checkpoint = str(runs[-1] if runs else HERE / "weights" / SCRIPT / "weights.pt")
    print(f"checkpoint: {args.checkpoint}")


# differs: the search comes before the training
def main():
    args = get_args()
    device, rank, world = start_device(args.device)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")                             # one process speaks
    data_based = args.search and args.clustering not in ("time", "snr")
    if args.space == "latent" and (data_based or args.train) and not args.resume:
        args.autoencoder = get_autoencoder(args, device, rank, world)
    if args.train and not args.resume and find_edges(args) is None:
        args.search = True                                             # no edges yet
    if args.search and rank == 0:
        search(args, device)
    if world > 1:
        dist.barrier()                                                 # until the plan is written
    if args.train:
        if args.resume:
            find_checkpoint(args)
        args.checkpoint = str(train(args, device, rank, world))
        if world > 1:
            dist.barrier()                                             # until it is written
    if args.sample or args.evaluate:
        find_checkpoint(args)
        net = load_net(args, device)
    if args.sample:
        plans = [get_plan(args, *job) for job in itertools.product(args.solver, args.steps)]
        n, begun = args.n or 64, time.time()
        seeds, columns = range(args.seed, args.seed + n), 8 if len(plans) == 1 else n
        rows = [gather(sample(args, net, plan, seeds[rank::world], device), world) for plan in plans]
        if rank == 0:
            path = Path(args.out) / "samples.png"
            save_grid(path, torch.cat(rows), columns)
            print(f"{len(plans)} x {n} images, {time.time() - begun:.1f} s: {path}")
    if args.evaluate:
        args.n = args.n or 2000
        evaluate(args, net, device, rank, world)
    if args.ledger and rank == 0:
        ledger(HERE / "results" / SCRIPT / "ledger.json")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{SCRIPT}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{SCRIPT}: interrupted; a training run goes on with --train --resume")
