"""C2F-TRD: Efficient Coarse-to-Fine Diffusion Models with Time Step Sequence Redistribution
(arXiv 2603.21348), in one file. The paper has no public code.

The first steps of a diffusion sampler produce blur: run them at low resolution (C2F). One network does
both resolutions, told which by a label; t*, the step at which to go from low to high, is where the
predicted images have their lowest rank. Then choose the few steps worth taking (TRD): move one step after
the other, between its neighbours, whenever 16 images come closer to those of 100 steps. Minutes, not days.

Run (README.md has more):
    python c2f_trd.py --sample                               # 64 images from the shipped weights
    python c2f_trd.py --sample --method base --solver ddim --steps 100      # off switch: plain DDIM
    python c2f_trd.py --train --search --sample --evaluate --transition 706  # the whole paper (D3)
    torchrun --nproc_per_node=2 -- c2f_trd.py --train           # two processes (or GPUs)
    python c2f_trd.py --ledger                               # the paper's networks, parameters and MACs

Expect (small preset, fashion10k, two CPU cores, torch 2.13): --sample in seconds; --train about an hour (6,500
    steps, 832,000 images); clear garments after half of it; FD[small-fashion]@2000 of 1.10 for 100-step
    DDIM, 1.17 for C2F+TRD with DPM-Solver++ at 10 low and 5 high steps, 5.6 % of the MACs (results/c2f_trd).

Symbols: t_T .. t_0 -> taus (descending, all evaluated; the paper's T is our K); T^c, T^f -> low-steps,
steps; x_hat^i_t0 -> x0_hat; x_bar_t0 -> x0 of the coarse stage; C_i, n -> candidate_steps, n;
t* -> t_star; alpha_bar[-1] = 1 is clean data (t = -1).

Differences from the paper, and what it leaves open:
D1  "Uniform" is linspace(999, 0, K) with both ends: its t* = 565 is on that grid of 100 and on no other
    usual one. It spends an evaluation at t = 0; --spacing has the alternatives, which change FD more
    than TRD does.
D2  TRD: steps are visited from t_0 to t_T, replaced at once, if the loss falls by more than rounding
    (1e-6). Candidates are rounded half up. Eq. 3's ends have one neighbour, so t_T can only fall and
    t_0 only rise: --ends bounded gives them virtual neighbours at 1000 and -1.
D3  Rank: of 1024 unclipped x0_hat with the averaged weights, on the 100-step grid; the first reached
    of equal minima. The dip comes from the network's error: an exact denoiser's rank only rises,
    its minimum is the plateau at t = 999 (tests/test_c2f_trd.py shows both); the larger the error, the
    lower t*. The shipped network, small and briefly trained, gives 151, far below the plateau of FD
    (results/c2f_trd/fig5.png): its plans use --transition 706, found by --evaluate --sweep-transition.
D4  The label embedding (and xy's input weights) start at zero: fine-tuning starts at the base model.
D5  Fine-tuning goes on with the pre-training's settings; odd steps are low, even steps high resolution,
    both counted; low-resolution images are area averages. 2dms: every step is low, the base model
    stays the high one.
D6  Bilinear up-sampling between the stages (at t = 565 what it loses is 0.15 % of the noise).
D7  DPM-Solver++ is 2M (midpoint), first order at the start and to clean data, which ends at
    alpha_bar = 1; its history starts anew at the resolution switch. dpm3 is the published 3M, equal to
    diffusers', which converges at second order only (its D2 is half of what a third order takes).
D8  --two-phase searches the low steps against 100 low ones, then the high steps: a quarter of the cost.
D9  Nothing is clipped while sampling or in the loss; images are at the end.
D10 The reference of both solvers is DDIM: 100 steps; with C2F 100 low ones and those of the same 100
    that do not exceed t*.
D11 Preset small is not the paper's network: 2x2 pixels a token, a decaying learning rate, no flips (shoes
    point left), no zero-initialised convolutions, Fashion-MNIST's 10,000 test images. Its FD is no FID
    and compares with itself only.
Not here: Diff-Pruning and AutoDiffusion, which the paper compares with.
"""
import argparse
import copy
import functools
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (HERE, add_noise, class_logits, count_macs, extract, feature_stats,
                    frechet_distance, gather, has_fast_bf16, inception_score, linear_alpha_bar,
                    load_extractor, load_images, noise_for, progress, save_grid, save_json, sha256_of,
                    start_device, to_float, to_uint8, write_atomically)

SCRIPT = "c2f_trd"

# ---------------------------------------------------------------------------------------------
# Hyper-parameters
# ---------------------------------------------------------------------------------------------
T = 1000                       # training steps; linear beta 1e-4 .. 0.02 (DDPM)
CALIBRATION = 16               # samples of the TRD loss (Sec. IV)
CANDIDATES = 5                 # n of Eq. 3 (Sec. IV)
SWEEPS = 10                    # maximum iteration (Sec. IV)
LOW_STEPS = 10                 # T^c (Sec. IV-A)
REFERENCE_STEPS = 100          # of the reference model (Sec. III-B)
VARIANCE = 0.99                # share of the variance that defines the cut index (Fig. 5)
STRATEGIES = ("label", "xy", "2T", "2dms")                     # Table I
METHODS = ("base", "trd", "c2f", "c2f+trd")                    # base: the off switch
SOLVERS = {"ddim": 1, "dpm2": 2, "dpm3": 3}                    # order; dpm: DPM-Solver++ multistep
SPACINGS = ("inclusive", "exclusive", "leading", "trailing")   # of uniform steps, see uniform_steps
CALIBRATION_SEED, HELD_OUT_SEED, PCA_SEED = 10 ** 9, 2 * 10 ** 9, 3 * 10 ** 9   # far from samples' seeds
ARCHITECTURE = ("ch", "mult", "blocks", "attention", "patch", "dropout", "res")

# A preset is a network and how it is trained. paper: the DDPM networks for CIFAR-10 and LSUN-Church.
#                        tiny       small         paper           paper-lsun
PRESETS = {
    "res":              (32,        32,           32,             256),         # R, of a folder's images
    "low":              (16,        8,            8,              32),          # low resolution (Sec. IV)
    "ch":               (8,         24,           128,            128),         # base width
    "mult":             ([1, 2],    [1, 2, 3],    [1, 2, 2, 2],   [1, 1, 2, 2, 4, 4]),  # width per level
    "blocks":           (1,         1,            2,              2),           # residual blocks per level
    "attention":        ([1],       [2],          [1],            [4]),         # levels with attention
    "patch":            (2,         2,            1,              1),           # pixels per side of a token
    "dropout":          (0.0,       0.0,          0.1,            0.0),
    "flip":             (False,     False,        True,           True),        # random horizontal flips
    "batch":            (16,        128,          128,            64),          # global, all processes
    "lr":               (2e-3,      1e-3,         2e-4,           2e-5),        # Adam
    "warmup":           (10,        200,          5000,           5000),        # steps, linear
    "decay":            (0.3,       0.3,          0.0,            0.0),         # last share: lr falls
    "ema":              (0.9,       0.999,        0.9999,         0.9999),      # decay
    "iters":            (20,        5000,         800_000,        4_400_000),   # steps of the base model
    "finetune_iters":   (20,        1500,         100_000,        375_000),     # steps of Sec. III-A2
}
PRESET_NAMES = ("tiny", "small", "paper", "paper-lsun")


# ---------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------
def timestep_embedding(t, dim):
    """(B,) -> (B, dim): sine and cosine of t at `dim / 2` frequencies from 1 to 1 / 10000 (DDPM)."""
    frequency = torch.logspace(0, -4, dim // 2, device=t.device)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    """norm - SiLU - conv, plus the time embedding, norm - SiLU - conv, plus the input."""

    def __init__(self, c_in, c_out, c_emb, groups, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


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


class UNet(nn.Module):
    """DDPM's U-Net: eps_hat (B, C, H, W) from xt (B, C_in, H, W) and t (B,).

    Fully convolutional: H and W are any multiples of patch * 2^(levels - 1). Attention is tied to
    levels, not to sizes, so that the same weights run at every resolution. patch > 1 folds
    patch x patch pixels into channels first: a quarter of the cost at patch 2, for small machines.
    c_extra: input channels beyond the image's; labels: number of classes, told by y (B,).
    """

    def __init__(self, channels, ch, mult, blocks, attention, patch=1, dropout=0.0, c_extra=0, labels=0):
        super().__init__()
        groups, c_emb = min(32, ch // 4), 4 * ch
        self.ch, self.patch, self.multiple = ch, patch, patch * 2 ** (len(mult) - 1)
        self.emb = nn.Sequential(nn.Linear(ch, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        if labels:                                      # METHOD: III-A2, one embedding per resolution,
            self.label = nn.Embedding(labels, c_emb)    # zero at first: the pre-trained net (D4)
            nn.init.zeros_(self.label.weight)
        self.conv_in = nn.Conv2d((channels + c_extra) * patch ** 2, ch, 3, padding=1)

        c, skips, self.down = ch, [ch], nn.ModuleList()
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.down.append(ResBlock(c, ch * m, c_emb, groups, dropout))
                c = ch * m
                if level in attention:
                    self.down.append(Attention(c, groups))
                skips.append(c)
            if level < len(mult) - 1:
                self.down.append(Down(c))
                skips.append(c)
        self.mid = nn.ModuleList([ResBlock(c, c, c_emb, groups, dropout), Attention(c, groups),
                                  ResBlock(c, c, c_emb, groups, dropout)])
        self.up = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.up.append(ResBlock(c + skips.pop(), ch * m, c_emb, groups, dropout))
                c = ch * m
                if level in attention:
                    self.up.append(Attention(c, groups))
            if level > 0:
                self.up.append(Up(c))
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, channels * patch ** 2, 3, padding=1)

    def forward(self, xt, t, y=None):
        if xt.shape[-1] % self.multiple or xt.shape[-2] % self.multiple:
            raise ValueError(f"the network halves its input: {xt.shape[-2]}x{xt.shape[-1]} is not a "
                             f"multiple of {self.multiple}")
        emb = self.emb(timestep_embedding(t, self.ch))
        if y is not None:                               # METHOD: III-A2, added to the time embedding
            emb = emb + self.label(y)
        emb = F.silu(emb)
        h = self.conv_in(F.pixel_unshuffle(xt, self.patch))
        skips = [h]
        for layer in self.down:
            if isinstance(layer, Attention):
                h = skips.pop()
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for layer in self.mid:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = layer(torch.cat([h, skips.pop()], dim=1), emb)
            else:
                h = layer(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch)


# ---------------------------------------------------------------------------------------------
# Method: coarse-to-fine denoising, C2F (Sec. III-A)
# ---------------------------------------------------------------------------------------------
def predict_eps(net, strategy, xt, t, high):
    """METHOD: III-A2 and IV-B: eps_hat of a network that is told in one of the ways of Table I
    whether xt (B, C, res, res) is of high or low resolution. strategy None: the plain base model."""
    if strategy == "label":
        return net(xt, t, torch.full_like(t, int(high)))
    if strategy == "2T":                                       # low resolution lives at T + t
        return net(xt, t if high else t + T)
    if strategy == "xy":                                       # pixel centres: their spacing tells
        u = (2 * torch.arange(xt.shape[-1], device=xt.device) + 1) / xt.shape[-1] - 1
        xy = torch.stack(torch.meshgrid(u, u, indexing="xy")).to(xt.dtype)
        return net(torch.cat([xt, xy.expand(len(xt), -1, -1, -1)], dim=1), t)
    return net(xt, t)                                          # base; 2dms: `net` is the right one


def build_net(config, channels, strategy=None):
    """The U-Net of a preset (config: ch, mult, blocks, attention, patch, dropout) for a strategy."""
    arch = {k: config[k] for k in ("ch", "mult", "blocks", "attention", "patch", "dropout")}
    net = UNet(channels, **arch, c_extra=2 * (strategy == "xy"), labels=2 * (strategy == "label"))
    return net.to(memory_format=torch.channels_last)


def finetune_start(config, channels, strategy, base):
    """METHOD: III-A2: the network of a strategy with the pre-trained weights `base` (a state dict);
    what the base has not (label embedding, inputs for x and y) starts at zero (D4)."""
    net = build_net(config, channels, strategy)
    state = {**net.state_dict(), **base}
    if strategy == "xy":
        w = base["conv_in.weight"]
        state["conv_in.weight"] = torch.cat([w, w.new_zeros(len(w), 2 * config["patch"] ** 2, 3, 3)], 1)
    net.load_state_dict(state)
    return net


def renoise(x0, eps, t, alpha_bar):
    """METHOD: III-A1: x0 of the coarse stage (B, C, r, r) -> xt of the fine one (B, C, R, R):
    bilinear up-sampling (D6), then noised to step t (int or (B,)) with the given eps."""
    up = F.interpolate(x0, size=eps.shape[-2:], mode="bilinear", align_corners=False)
    return add_noise(up, eps, torch.as_tensor(t, device=eps.device).expand(len(eps)), alpha_bar)


# ---------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------
def diffusion_loss(net, x0, t, eps, alpha_bar, strategy=None, high=True):
    """DDPM's simple loss: mean squared error of eps_hat."""
    xt = add_noise(x0, eps, t, alpha_bar)
    return F.mse_loss(predict_eps(net, strategy, xt, t, high).float(), eps)


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------
def predict_x0(xt, t, eps_hat, alpha_bar):
    """x0_hat from eps_hat: the forward process solved for x0. Not clipped (D9)."""
    a = alpha_bar.to(xt.device)[t].view(-1, 1, 1, 1)
    return ((1 / a).sqrt().to(xt.dtype) * xt - (1 / a - 1).sqrt().to(xt.dtype) * eps_hat)


def ddim_step(xt, x0_hat, t, t_next, alpha_bar):
    """DDIM, eta = 0, from t to t_next (int64 (B,); -1 is clean): keeps the eps that x0_hat implies."""
    a, a_next = (alpha_bar.to(xt.device)[s].view(-1, 1, 1, 1) for s in (t, t_next))
    c = ((1 - a_next) / (1 - a)).sqrt()
    return c.to(xt.dtype) * xt + (a_next.sqrt() - c * a.sqrt()).to(xt.dtype) * x0_hat


def dpm_solver_pp_step(xt, history, t_next, alpha_bar):
    """DPM-Solver++ multistep (2M midpoint, 3M) to t_next. history: [(t, x0_hat), ...], newest first;
    its length, 2 or 3, is the order. lambda = log(alpha / sigma)."""
    a, a_next = (alpha_bar.to(xt.device)[s].view(-1, 1, 1, 1) for s in (history[0][0], t_next))
    lam_next = (a_next / (1 - a_next)).log() / 2
    lam = [(alpha_bar.to(xt.device)[t].view(-1, 1, 1, 1).logit() / 2) for t, _ in history]
    D, h = [x0_hat.double() for _, x0_hat in history], lam_next - lam[0]
    phi = -torch.expm1(-h)                                                     # 1 - e^-h
    x = ((1 - a_next) / (1 - a)).sqrt() * xt + a_next.sqrt() * phi * D[0]
    r0 = (lam[0] - lam[1]) / h
    D1_0 = (D[0] - D[1]) / r0
    if len(history) == 2:
        x = x + a_next.sqrt() * phi / 2 * D1_0
    else:
        r1 = (lam[1] - lam[2]) / h
        D1_1 = (D[1] - D[2]) / r1
        D1 = D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1)
        D2 = (D1_0 - D1_1) / (r0 + r1)
        x = x + a_next.sqrt() * ((1 - phi / h) * D1 - ((h - phi) / h ** 2 - 0.5) * D2)
    return x.to(xt.dtype)


def solver_step(xt, history, t_next, alpha_bar, k, K, order):
    """Step k of K with a solver of the given order: order 1 while the history is short and at the end
    (to clean data), 2 at the last but one if K < 15 (as diffusers' scheduler does)."""
    order = 1 if k == K - 1 else min(order, k + 1, 2 if k == K - 2 and K < 15 else 3)
    if order == 1:
        t, x0_hat = history[0]
        return ddim_step(xt, x0_hat, t, t_next, alpha_bar)
    return dpm_solver_pp_step(xt, history[:order], t_next, alpha_bar)


def dpm_solver_pp_sample(eps_model, xt, taus, alpha_bar, order=2, start=0, stop=None, history=(), trace=None):
    """Integrates from xt (B, C, H, W), at step taus[start], to clean data.

    eps_model(xt, t (B,) int64) -> eps_hat. taus: strictly descending steps in 0 .. T-1, all evaluated,
    then t = -1; an entry may be a tensor (B,) that gives every sample its own. order: 1 (DDIM), 2, 3.
    start, stop, history: to continue a run that was left before evaluation `start`, or to leave it
    before `stop`. trace(xt, history): called after each evaluation; history holds (t, x0_hat).
    """
    K, plain = len(taus), [t for t in taus if isinstance(t, int)]
    if any(a <= b for a, b in zip(plain, plain[1:])):
        raise ValueError(f"the steps must fall strictly: {plain}")
    for k in range(start, K if stop is None else stop):
        t = torch.as_tensor(taus[k], device=xt.device).expand(len(xt))
        x0_hat = predict_x0(xt, t, eps_model(xt, t), alpha_bar)
        history = [(t, x0_hat), *history][:3]
        if trace:
            trace(xt, history)
        t_next = torch.as_tensor(taus[k + 1] if k + 1 < K else -1, device=xt.device).expand(len(xt))
        xt = solver_step(xt, history, t_next, alpha_bar, k, K, order)
    return xt


def ddim_sample(eps_model, xt, taus, alpha_bar):
    """DDIM (eta = 0) over the descending steps taus: DPM-Solver++ of order 1 is DDIM."""
    return dpm_solver_pp_sample(eps_model, xt, taus, alpha_bar, order=1)


def c2f_sample(stages, sequences, alpha_bar, order=1, x0=None):
    """METHOD: III-A1, III-C: denoise at each resolution in turn. stages: [(eps_model, noise), ...] from
    low to high; sequences: their taus. Between stages x0 is up-sampled and re-noised to the first step
    of the next sequence, and the solver's history starts anew. x0: result of the stages before, if any.
    One stage without x0 is plain sampling. Returns x0 at the last stage's resolution."""
    for (eps_model, noise), taus in zip(stages, sequences):
        xt = noise if x0 is None else renoise(x0, noise, taus[0], alpha_bar)
        x0 = dpm_solver_pp_sample(eps_model, xt, taus, alpha_bar, order)
    return x0


# ---------------------------------------------------------------------------------------------
# Search: transition step (Sec. III-A3) and time step sequence, TRD (Sec. III-B)
# ---------------------------------------------------------------------------------------------
def uniform_steps(first, K, spacing="inclusive"):
    """K descending steps from `first` down. inclusive: linspace to 0, both ends (C2F-TRD's paper);
    exclusive: linspace to 0 in K + 1 points, without the 0; leading: first + 1 divided by
    K, from below (DDIM's); trailing: the same from above (diffusers' recommended)."""
    if spacing == "inclusive":
        steps = [first * (K - 1 - k) / max(K - 1, 1) for k in range(K)] if K > 1 else [first]
    elif spacing == "exclusive":
        steps = [first * (K - k) / K for k in range(K)]
    elif spacing == "leading":
        steps = [(first + 1) * (K - 1 - k) // K for k in range(K)]
    elif spacing == "trailing":
        steps = [(first + 1) * (K - k) / K - 1 for k in range(K)]
    else:
        raise ValueError(f"no spacing '{spacing}': inclusive, exclusive, leading, trailing")
    steps = [int(s + 0.5) for s in steps]
    if K < 1 or len(set(steps)) < K or min(steps) < 0:
        raise ValueError(f"{K} different steps do not fit between {first} and 0")
    return steps


def cut_index(x, share=VARIANCE):
    """Smallest number of principal components that hold `share` of the variance of x (n, C, H, W)."""
    x = x.flatten(1).double()
    x = x - x.mean(0)
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T                     # same eigenvalues
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cumsum(0)
    return int((values < share * values[-1]).sum()) + 1


def transition_step(eps_model, noise, taus, alpha_bar, share=VARIANCE):
    """METHOD: III-A3: t*, the step at which the low-resolution prediction x0_hat has its lowest rank.

    eps_model: of the low resolution; noise (n, C, r, r), n >= 512 (with few samples t* comes out too
    high: the rank cannot exceed n - 1); taus: 100 uniform steps. Returns t* (the first reached of equal
    ranks, D3) and the list of (t, cut index)."""
    ranks = []

    def trace(xt, history):
        ranks.append((int(history[0][0][0]), cut_index(history[0][1], share)))

    dpm_solver_pp_sample(eps_model, noise, taus, alpha_bar, order=1, trace=trace)
    return min(ranks, key=lambda pair: (pair[1], -pair[0]))[0], ranks


def candidate_steps(taus, i, n=CANDIDATES, ends="paper"):
    """METHOD: Eq. 3: n steps that divide the gap between the neighbours of taus[i], rounded half up,
    without duplicates, neighbours and taus[i] itself (keeping it needs no evaluation).
    ends: the first and last step have one neighbour; 'paper' divides the gap between them and it,
    'bounded' gives them virtual neighbours at T and -1, so that they can move both ways (D2)."""
    above = taus[i - 1] if i > 0 else T if ends == "bounded" or len(taus) == 1 else taus[i]
    below = taus[i + 1] if i + 1 < len(taus) else -1 if ends == "bounded" or len(taus) == 1 else taus[i]
    steps = {(2 * (below * (n + 1) + j * (above - below)) + n + 1) // (2 * n + 2) for j in range(1, n + 1)}
    return sorted(steps - {above, below, taus[i]})


def trd_search(stages, sequences, x_ref, alpha_bar, order=1, x0=None, n=CANDIDATES, sweeps=SWEEPS,
               ends="paper", title="TRD"):
    """METHOD: III-B, III-C: time step sequence redistribution. Substitutes one step after the other by
    the candidate whose samples come closest to the reference, until a sweep changes nothing.

    stages, sequences, x0: as in c2f_sample; one stage [(eps_model, noise)] searches a plain sampler.
    x_ref (B, C, R, R): samples of the reference model for the same noise. Loss: mean squared error.
    Steps are visited from the last one evaluated, t_0, to the first, t_T (D2), so one pass per sweep
    yields the states before all of them; only what follows the changed step is evaluated, for all its
    candidates in one batch. Returns the sequences and a report: loss after each sweep (the first
    entry: before), evaluations per sample for each stage, network calls, seconds."""
    begun, B, S = time.time(), len(x_ref), len(stages)
    sequences = [[int(t) for t in taus] for taus in sequences]
    evaluations, calls = [0] * S, [0]

    def counted(s):
        def eps_model(xt, t):
            evaluations[s] += len(xt) // B
            calls[0] += 1
            return stages[s][0](xt, t)
        return eps_model

    def losses(x):                                                             # (m B, ...) -> (m,)
        return (x.view(-1, *x_ref.shape) - x_ref).square().flatten(1).mean(1).tolist()

    def tile(x, m):                                                            # m copies of the batch
        return x.repeat(m, 1, 1, 1)

    stages_n = [(counted(s), noise) for s, (_, noise) in enumerate(stages)]
    best = losses(c2f_sample(stages_n, sequences, alpha_bar, order, x0))[0]
    report = dict(loss=[best], sequences=[[list(taus) for taus in sequences]])
    positions = [(s, i) for s in reversed(range(S)) for i in reversed(range(len(sequences[s])))]
    for sweep in range(1, sweeps + 1):
        images, states = [x0], []                  # before stage s; after each of its evaluations
        for s, (eps_model, noise) in enumerate(stages_n):
            trace, taus = [], sequences[s]
            xt = noise if images[s] is None else renoise(images[s], noise, taus[0], alpha_bar)
            stop = len(taus) - 1 if s == S - 1 else None
            images.append(dpm_solver_pp_sample(eps_model, xt, taus, alpha_bar, order, stop=stop,
                                               trace=lambda x, past: trace.append((x, past))))
            states.append(trace)
        changed = False
        for s, i in progress(positions, f"{title} sweep {sweep}", note=lambda: f"loss {best:.3e}"):
            taus, (eps_model, noise) = sequences[s], stages_n[s]
            candidates = candidate_steps(taus, i, n, ends)
            if not candidates:
                continue
            m = len(candidates)
            t = torch.tensor(candidates, device=noise.device).repeat_interleave(B)
            later = [(model, tile(z, m)) for model, z in stages_n[s + 1:]]
            history = []
            if i > 0:
                xt, history = states[s][i - 1]
                xt, history = tile(xt, m), [(t_past.repeat(m), tile(d, m)) for t_past, d in history]
                xt = solver_step(xt, history, t, alpha_bar, i - 1, len(taus), order)
            elif images[s] is None:
                xt = tile(noise, m)
            else:
                xt = renoise(tile(images[s], m), tile(noise, m), t, alpha_bar)
            x = dpm_solver_pp_sample(eps_model, xt, [*taus[:i], t, *taus[i + 1:]], alpha_bar, order,
                                     start=i, history=history)
            loss = losses(c2f_sample(later, sequences[s + 1:], alpha_bar, order, x0=x))
            j = min(range(m), key=loss.__getitem__)
            if loss[j] < best * (1 - 1e-6):                       # more than rounding (D2)
                best, taus[i], changed = loss[j], candidates[j], True
        report["loss"].append(best)
        report["sequences"].append([list(taus) for taus in sequences])
        if not changed:
            break
    report.update(evaluations=evaluations, calls=calls[0], seconds=round(time.time() - begun, 2))
    return sequences, report


# ---------------------------------------------------------------------------------------------
# Plans: what is sampled, as a small dict; models; samples
# ---------------------------------------------------------------------------------------------
def make_plan(method, solver, low_steps, steps, t_star=None, spacing="inclusive"):
    """Uniform sequences. base: one stage, T-1 to 0 (the off switch: DDPM with DDIM or DPM-Solver++).
    c2f: METHOD: III-C: T^c low-resolution steps from T-1, T^f high-resolution ones from t*."""
    coarse = "c2f" in method
    return dict(method=method, solver=solver, spacing=spacing,
                low_taus=uniform_steps(T - 1, low_steps, spacing) if coarse else [],
                high_taus=uniform_steps(t_star if coarse else T - 1, steps, spacing))


def check_plan(plan, name="plan"):
    """The plan itself, or ValueError if its steps are not strictly descending in 0 .. T-1."""
    for key in ("low_taus", "high_taus"):
        taus = plan.get(key)
        if not isinstance(taus, list) or any(type(t) is not int or not 0 <= t < T for t in taus):
            raise ValueError(f"{name}: {key} must be a list of integers in 0 .. {T - 1}")
        if any(a <= b for a, b in zip(taus, taus[1:])):
            raise ValueError(f"{name}: {key} must fall strictly: {taus}")
    if not plan["high_taus"] or plan.get("solver") not in list(SOLVERS) or plan.get("method") not in METHODS:
        raise ValueError(f"{name}: needs high_taus, a solver of {list(SOLVERS)}, a method of {METHODS}")
    if bool(plan["low_taus"]) != ("c2f" in plan["method"]):
        raise ValueError(f"{name}: low_taus belong to the c2f methods, and to these only")
    return plan


def load_plan(path):
    """A plan from JSON. Raises OSError or ValueError with one line."""
    try:
        return check_plan(json.loads(Path(path).read_text()), path)
    except (json.JSONDecodeError, AttributeError):
        raise ValueError(f"{path} is no plan (not JSON, or not an object)") from None


def get_plan(args, method, solver, steps):
    """The plan to run: --plan FILE; the file that --search wrote; or uniform steps if nothing is to be
    searched. Prints it."""
    if args.plan:
        plan = load_plan(args.plan)
    elif "trd" in method:
        names = [folder / f"plan_{method}_{solver}_{steps}.json" for folder in (args.plans, args.run)]
        path = next((p for p in names if p.is_file()), None)
        if path is None:
            raise ValueError(f"no {names[0]}: run --search with the same --method, --solver and --steps")
        plan = load_plan(path)
    else:
        t_star = transition_of(args) if method == "c2f" else None
        plan = make_plan(method, solver, args.low_steps, steps, t_star, args.spacing)
    low = f"low {plan['low_taus']} " if plan["low_taus"] else ""
    print(f"{plan['method']} {plan['solver']}: {low}high {plan['high_taus']}")
    return plan


def transition_of(args):
    """t*: --transition, or what --search found."""
    if args.transition is not None:
        return args.transition
    for folder in (args.plans, args.run):
        path = folder / "transition.json"
        if path.is_file():
            found = json.loads(path.read_text())
            if found.get("t_star") not in range(T):
                raise ValueError(f"{path}: t_star must be an integer in 0 .. {T - 1}")
            return found["t_star"]
    raise ValueError(f"no {args.plans / 'transition.json'}: run --search, or give --transition T_STAR")


def load_models(args, device, precision="auto"):
    """eps-models {base, low, high} of a checkpoint's EMA weights, each a callable (xt, t) -> eps_hat
    that works through large batches in parts; sets args.run, args.config, args.images_seen."""
    saved = load_checkpoint(args.checkpoint)
    config, channels = saved["args"], saved["channels"]
    args.run, args.config, args.channels = Path(args.checkpoint).parent, config, channels
    args.data = getattr(args, "data", None) or config["data"]
    shipped = args.run.resolve() == HERE / "weights" / SCRIPT          # their plans stay as they are
    args.plans = Path(args.plans or (args.out if shipped else args.run))
    args.images_seen, strategy = saved["images_seen"], config["strategy"]

    def eps_model_of(state, strategy, high):
        net = build_net(config, channels, strategy)
        net.load_state_dict(state)
        net = net.to(device).eval().requires_grad_(False)
        net = torch.compile(net) if args.compile else net

        def eps_model(xt, t):
            part = max(1, 2 ** 18 // xt.shape[-1] ** 2)                    # 256 images of 32x32 at a time
            with torch.no_grad(), autocast(device, precision):
                return torch.cat([predict_eps(net, strategy, x.contiguous(memory_format=torch.channels_last),
                                              s, high).float() for x, s in zip(xt.split(part), t.split(part))])
        return eps_model

    if saved["phase"] == "base":                                       # stopped before the fine-tuning
        return {"base": eps_model_of(saved["ema"], None, True)}
    models = {"base": eps_model_of(saved["base"], None, True),
              "low": eps_model_of(saved["ema"], None if strategy == "2dms" else strategy, False)}
    models["high"] = models["base"] if strategy == "2dms" else eps_model_of(saved["ema"], strategy, True)
    return models


def stages_of(plan, models, z_high, z_low):
    """The stages and sequences of c2f_sample for a plan."""
    if plan["low_taus"]:
        if "low" not in models:
            raise ValueError("this checkpoint is not fine-tuned yet: --train --resume, or --method base")
        return [(models["low"], z_low), (models["high"], z_high)], [plan["low_taus"], plan["high_taus"]]
    return [(models["base"], z_high)], [plan["high_taus"]]


def noises(args, seeds, device):
    """Noise of the full and of the low resolution for each seed; the first does not depend on --low."""
    R, low = args.config["res"], args.config["low"]
    return [z.to(device) for z in noise_for(seeds, (args.channels, R, R), (args.channels, low, low))]


def sample(args, models, plan, seeds, device):
    """uint8 images (n, C, R, R), seed by seed, of this process's share of the seeds."""
    if not len(seeds):
        raise ValueError("--n is smaller than the number of processes")
    alpha_bar, parts = linear_alpha_bar(T), []
    batches = torch.tensor(list(seeds)).split(250)
    for batch in progress(batches, f"sample {plan['method']} {plan['solver']}", len(batches[0])):
        stages, sequences = stages_of(plan, models, *noises(args, batch.tolist(), device))
        parts.append(to_uint8(c2f_sample(stages, sequences, alpha_bar, SOLVERS[plan["solver"]])).cpu())
    return torch.cat(parts)


def search(args, models, device):
    """Transition step (III-A3), then TRD (III-B, III-C) for every --method, --solver and --steps that
    asks for it; writes transition.json and plan_*.json, and a line of results per plan."""
    alpha_bar, grid = linear_alpha_bar(T), uniform_steps(T - 1, REFERENCE_STEPS)
    torch.backends.cudnn.allow_tf32 = False        # ranks and small differences of losses need float32
    if any("c2f" in m for m in args.method):
        if "low" not in models:
            raise ValueError("this checkpoint ends before the fine-tuning: --train --resume")
        begun, (_, z_low) = time.time(), noises(args, range(PCA_SEED, PCA_SEED + args.pca), device)
        t_star, ranks = transition_step(models["low"], z_low, grid, alpha_bar)
        print(f"transition step t* = {t_star}: rank {min(r for _, r in ranks)} of {z_low[0].numel()}, "
              f"{args.pca} samples, {time.time() - begun:.0f} s")
        error = models["low"](z_low, torch.full((args.pca,), T - 1, device=device)) - z_low   # xt is all noise
        found = dict(t_star=t_star if args.transition is None else args.transition, pca=t_star, samples=args.pca,
                     eps_error=round(float(error.square().mean().sqrt()), 5), ranks=ranks)
        save_json(args.plans / "transition.json", found)
        t_star = found["t_star"]
    for method, solver, steps in itertools.product(args.method, args.solver, args.steps):
        if "trd" not in method:
            continue
        order, coarse = SOLVERS[solver], "c2f" in method
        plan = make_plan(method, solver, args.low_steps, steps, t_star if coarse else None, args.spacing)
        reference = dict(plan, low_taus=grid if coarse else [],
                         high_taus=[t for t in grid if t <= t_star] if coarse else grid)

        def run(plan, seeds, order=order):
            stages, sequences = stages_of(plan, models, *noises(args, seeds, device))
            return c2f_sample(stages, sequences, alpha_bar, order)

        calibration = range(CALIBRATION_SEED, CALIBRATION_SEED + args.calibration)
        held_out = range(HELD_OUT_SEED, HELD_OUT_SEED + 128)
        stages, sequences = stages_of(plan, models, *noises(args, calibration, device))
        x_ref = run(reference, calibration, order=1)                   # 100-step DDIM for both solvers
        options = dict(alpha_bar=alpha_bar, order=order, sweeps=args.sweeps, ends=args.ends)
        if args.two_phase and coarse:                                  # METHOD: low first, then high (D8)
            low_ref = ddim_sample(*stages[0], grid, alpha_bar)
            low, first = trd_search(stages[:1], sequences[:1], low_ref, title="TRD low", **options)
            x0 = c2f_sample(stages[:1], low, alpha_bar, order)
            high, report = trd_search(stages[1:], sequences[1:], x_ref, x0=x0, title="TRD high", **options)
            sequences = low + high
            report["evaluations"] = first["evaluations"] + report["evaluations"]
            report["calls"] += first["calls"]
            report["seconds"] = round(report["seconds"] + first["seconds"], 2)
        else:
            sequences, report = trd_search(stages, sequences, x_ref, **options)
        found = dict(plan, low_taus=sequences[0] if coarse else [], high_taus=sequences[-1])
        x_ref = run(reference, held_out, order=1)
        loss = {"trd": float((run(found, held_out) - x_ref).square().mean())}
        for spacing in SPACINGS:
            other = make_plan(method, solver, args.low_steps, steps, t_star if coarse else None, spacing)
            loss[spacing] = float((run(other, held_out) - x_ref).square().mean())
        found.update(loss=report["loss"], held_out=loss, calibration=args.calibration,
                     two_phase=bool(args.two_phase and coarse), ends=args.ends)
        save_json(args.plans / f"plan_{method}_{solver}_{steps}.json", found)
        print(f"{method} {solver} {steps} steps, {len(report['loss']) - 1} sweeps, {report['seconds']} s, "
              f"{report['evaluations']} evaluations a sample, {report['calls']} calls; loss "
              f"{report['loss'][0]:.3e} -> {report['loss'][-1]:.3e}, held out "
              + ", ".join(f"{k} {v:.3e}" for k, v in loss.items()))
        print(f"paste into diffusers{' (high resolution)' if coarse else ''}: scheduler = DPMSolverMultistepScheduler("
              f"solver_order={order}, final_sigmas_type='zero'); "
              f"scheduler.set_timesteps(timesteps={found['high_taus']})")
        append_result(args, device, found, args.experiment or "search", seed=CALIBRATION_SEED,
                      loss=report["loss"], held_out=loss, evaluations=report["evaluations"],
                      calls=report["calls"], seconds=report["seconds"], calibration=args.calibration)


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
    for key in ("net", "ema", "base"):
        if isinstance(saved.get(key), dict):
            saved[key] = {k: v.float() if v.is_floating_point() else v for k, v in saved[key].items()}
    return saved


def train(args, device, rank, world):
    """Base model (DDPM), then multi-resolution fine-tuning (III-A2). Returns the run's checkpoint.

    Every random draw of step k comes from a seed made of --seed and k: a resumed run needs no generator
    state and equals an uninterrupted one. Every process draws the global batch and keeps its share:
    the weights do not depend on the number of processes (up to rounding and dropout)."""
    saved = load_checkpoint(args.checkpoint) if args.checkpoint else {}
    if args.resume:                                                    # its arguments, its folder
        run = Path(args.checkpoint).parent
        if "optimizer" not in saved:
            raise ValueError(f"--resume: {args.checkpoint} has weights only; fine-tune without --resume")
        args = argparse.Namespace(**{**vars(args), **saved["args"]})
    else:
        name = [f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"]          # two runs may begin at once
        if world > 1:
            dist.broadcast_object_list(name)                           # the clocks may differ
        run = Path(args.out) / name[0]
        for key in ("iters", *ARCHITECTURE) if saved else ():          # the checkpoint decides
            setattr(args, key, saved["args"][key])
    args.data = args.data or "fashion10k"
    x, _, _ = load_images(args.data, args.res)
    channels, R, strategy = x.shape[1], x.shape[-1], args.strategy
    args.res = R
    if saved.get("channels", channels) != channels:
        raise ValueError(f"--data {args.data} has {channels} channels, the checkpoint {saved['channels']}")
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} does not divide among {world} processes")
    if R % args.low or args.low >= R:
        raise ValueError(f"--low {args.low} is no fraction of the resolution {R}")
    config = {k: getattr(args, k) for k in (*PRESETS, "data", "preset", "strategy", "seed")}
    alpha_bar, mine = linear_alpha_bar(T), slice(rank, None, world)
    if rank == 0:
        save_json(run / "args.json", config)                           # an unwritable folder fails here
    base = saved.get("base")
    if saved and not args.resume and base is None:                     # left in its first phase
        base, args.iters, config["iters"] = saved["ema"], saved["step"], saved["step"]
    torch.manual_seed(args.seed)
    phases = ("base", "finetune") if base is None else ("finetune",)
    for phase in phases:
        begin, end = (0, args.iters) if phase == "base" else (args.iters, args.iters + args.finetune_iters)
        kind = None if phase == "base" else strategy
        net = finetune_start(config, channels, kind, base) if kind else build_net(config, channels)
        if R % net.multiple or args.low % net.multiple:
            raise ValueError(f"the network halves its input: the resolution {R} and --low {args.low} must be "
                             f"multiples of {net.multiple}")
        ema = copy.deepcopy(net).to(device).eval().requires_grad_(False)
        net = net.to(device).train()
        optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
        step = begin
        if args.resume and saved["phase"] == phase:
            net.load_state_dict(saved["net"])
            ema.load_state_dict(saved["ema"])
            optimizer.load_state_dict(saved["optimizer"])
            step = saved["step"]
        model = DistributedDataParallel(net) if world > 1 else net
        model = torch.compile(model) if args.compile else model
        loss_sum, count, begun = torch.zeros((), device=device), 0, time.time()
        fall = max(1, args.decay * (end - begin))

        def fail(what):
            good = run / "checkpoint.pt"
            raise ValueError(f"the {what} not finite: stopped at step {step}; "
                             + (f"the last good checkpoint is {good}; " if good.exists() else "") + "try a lower --lr")

        def mean_loss():
            if not math.isfinite(loss_sum):
                fail("loss is")
            return float(loss_sum) / max(count, 1)

        def save():
            mean, rate = mean_loss(), count * args.batch / (time.time() - begun)
            if not all(w.isfinite().all() for w in net.parameters()):
                fail("weights are")
            if rank == 0:
                common = dict(phase=phase, step=step, channels=channels, args=config,
                              images_seen=step * args.batch)
                if phase == "finetune" and step == end:                # what is shipped: 4 MB
                    half = [{k: v.half() for k, v in d.items()} for d in (base, ema.state_dict())]
                    save_checkpoint(run / "weights.pt", **common, base=half[0], ema=half[1])
                save_checkpoint(run / "checkpoint.pt", **common, base=base, ema=ema.state_dict(),
                                net=net.state_dict(), optimizer=optimizer.state_dict())
                z = noise_for(range(32), (channels, R, R)).to(device)
                with torch.no_grad(), autocast(device, args.precision):
                    x = dpm_solver_pp_sample(lambda xt, t: predict_eps(ema, kind, xt, t, True).float(), z,
                                             uniform_steps(T - 1, 10, "exclusive"), alpha_bar)
                save_grid(run / "samples.png", x)
                line = dict(phase=phase, step=step, images_seen=step * args.batch, loss=round(mean, 5),
                            images_per_s=round(rate, 1))
                with open(run / "log.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")

        todo = range(step + 1, end + 1)
        for step in progress(todo, f"train {phase}", args.batch, note=lambda: f"loss {mean_loss():.4f}"):
            torch.manual_seed(args.seed * 10_000_019 + step)
            high = phase == "base" or (strategy != "2dms" and step % 2 == 0)   # alternating (D5)
            i, t = torch.randint(0, len(x), (args.batch,)), torch.randint(0, T, (args.batch,))
            x0 = to_float(x[i[mine]])
            if args.flip:
                x0 = torch.where(torch.rand(args.batch)[mine, None, None, None] < 0.5, x0.flip(-1), x0)
            if not high:
                x0 = F.avg_pool2d(x0, R // args.low)                   # METHOD: III-A2, area averages (D5)
            eps = torch.randn(args.batch, *x0.shape[1:])[mine]
            x0, t, eps = x0.to(device), t[mine].to(device), eps.to(device)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, (step - begin) / args.warmup, (end + 1 - step) / fall)
            with autocast(device, args.precision):
                loss = diffusion_loss(model, x0, t, eps, alpha_bar, kind, high)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            decay = min(args.ema, (step - begin) / (9 + step - begin))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
            if count and (step - 1) % args.save_every == 0:            # a new window
                loss_sum, count, begun = torch.zeros((), device=device), 0, time.time()
            loss_sum, count = loss_sum + loss.detach(), count + 1
            if step % 50 == 0:
                mean_loss()                                            # stops at a NaN
            if step % args.save_every == 0 or step == end:
                save()
        base = ema.state_dict() if phase == "base" else base
    return run / "checkpoint.pt"


# ---------------------------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------------------------
def plan_macs(config, channels, plan):
    """MACs per image of a plan and its network evaluations [low, high]: the sampler itself is run on the
    meta device with networks that are counted at their first call of each size and kind."""
    total, strategy, models = [0], config["strategy"], {}
    for name, kind, high in (("base", None, True), ("low", strategy, False), ("high", strategy, True)):
        kind = None if kind == "2dms" else kind

        def eps_model(xt, t, kind=kind, high=high):
            total[0] += network_macs(json.dumps(config), channels, kind, high, xt.shape[-1])
            return torch.zeros_like(xt)
        models[name] = eps_model
    z_high, z_low = (torch.zeros(1, channels, r, r, device="meta") for r in (config["res"], config["low"]))
    stages, sequences = stages_of(plan, models, z_high, z_low)
    c2f_sample(stages, sequences, linear_alpha_bar(T), SOLVERS[plan["solver"]])
    return total[0], [len(plan["low_taus"]), len(plan["high_taus"])]


@functools.cache
def network_macs(config, channels, strategy, high, res):
    """MACs of one network evaluation at res x res, counted on the meta device; config as JSON."""
    with torch.device("meta"):
        net = build_net(json.loads(config), channels, strategy).eval()
        xt, t = torch.zeros(1, channels, res, res), torch.zeros(1, dtype=torch.long)
    return count_macs(predict_eps, net, strategy, xt, t, high)


def append_result(args, device, plan, experiment, **measured):
    """One line of results.jsonl: what was measured, under which conditions, by which source."""
    macs, nfe = plan_macs(args.config, args.channels, plan)
    full = plan_macs(args.config, args.channels, make_plan("base", "ddim", 0, REFERENCE_STEPS))[0]
    cpu = "" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {cpu}"
    plain = {k: str(v).replace(f"{HERE}/", "") if isinstance(v, (str, Path)) else v
             for k, v in vars(args).items() if k != "config"}
    line = dict(experiment=experiment, method=plan["method"], solver=plan["solver"], data=args.data,
                preset=args.config["preset"], strategy=args.config["strategy"], low=args.config["low"],
                **measured, nfe=nfe, macs_per_image=macs, relative_macs=macs / full, device=name,
                torch=torch.__version__, images_seen=args.images_seen,
                source_sha256=sha256_of(__file__), plan=plan, args=plain)
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    with open(args.results, "a") as file:
        file.write(json.dumps(line) + "\n")


def evaluate(args, models, device, rank, world):
    """FD, inception score, MACs and seconds for every --method, --solver, --steps and seed; image i of
    seed s comes from seed s * n + i. One line of results each."""
    x, y, captions = load_images(args.data, args.config["res"])
    extractor, name = load_extractor(args.data, device, args.inception)
    if args.n <= extractor.width:
        raise ValueError(f"--n {args.n} is too small for FD with {extractor.width} features")
    if x.shape[1:] != (args.channels, args.config["res"], args.config["res"]):
        raise ValueError(f"--data {args.data} has images of {list(x.shape[1:])}, the checkpoint was trained on "
                         f"'{args.config['data']}'")
    features, _ = extract(extractor, x)
    reference = feature_stats(features)
    if args.per_class and name == "inception":
        raise ValueError("--per-class needs the small extractor, which knows the classes: leave --inception out")
    jobs = []
    if not args.sweep_transition:
        jobs = [(get_plan(args, *job), {}) for job in itertools.product(args.method, args.solver, args.steps)]
    else:                                                              # Fig. 5(a): FD against t*
        for solver, steps, t in itertools.product(args.solver, args.steps, range(91, T, 151)):
            plan = make_plan("c2f", solver, steps, steps, T - 1)
            plan["high_taus"] = [s for s in plan["high_taus"] if s <= t]
            jobs.append((plan, dict(t_star=plan["high_taus"][0])))
    for plan, extra in jobs:
        pooled = []                                                    # of all seeds, for --per-class
        for seed in range(args.seed, args.seed + args.seeds):
            seeds, begun = range(seed * args.n, (seed + 1) * args.n), time.time()
            images = sample(args, models, plan, seeds[rank::world], device)
            seconds = time.time() - begun
            mine, second = (gather(part, world) for part in extract(extractor, images))
            if rank > 0:
                continue
            logits = second if name == "inception" else class_logits(extractor, second, captions)
            pooled.append((mine, logits.argmax(1)))
            fd, (score, _) = frechet_distance(feature_stats(mine), reference), inception_score(logits)
            append_result(args, device, plan, args.experiment or "evaluate", seed=seed, n=args.n,
                          extractor=name, fd=fd, inception_score=score,
                          seconds_per_image=seconds / args.n, processes=world, **extra)
            print(f"{plan['method']} {plan['solver']} {len(plan['low_taus'])}+{len(plan['high_taus'])} "
                  f"steps, seed {seed}: FD[{name}]@{args.n} {fd:.3f}, score {score:.2f}, {seconds:.0f} s")
        if args.per_class and rank == 0:                               # where does it fail?
            mine, chosen = (torch.cat(p) for p in zip(*pooled))
            classes = []
            for c, caption in enumerate(captions):
                enough = min((chosen == c).sum(), (y == c).sum()) > extractor.width
                classes.append(dict(caption=caption, n=int((chosen == c).sum()), fd=frechet_distance(
                    feature_stats(mine[chosen == c]), feature_stats(features[y == c])) if enough else None))
            append_result(args, device, plan, "per class", seed=args.seed, n=len(mine), extractor=name,
                          fd=frechet_distance(feature_stats(mine), reference), classes=classes)


# ---------------------------------------------------------------------------------------------
# Ledger
# ---------------------------------------------------------------------------------------------
def ledger(path):
    """The paper's efficiency cells, computed now on the meta device, beside the printed values."""
    rows = []

    def row(table, cell, paper, ours, note=""):
        rows.append(dict(table=table, cell=cell, paper=paper, ours=ours, note=note))
        printed, value = ("-" if v is None else f"{v:,.4f}".rstrip("0").rstrip(".") if isinstance(v, float)
                          else f"{v:,}" if isinstance(v, int) else v for v in (paper, ours))
        print(f"{table:9} {cell:45} {printed:>15} {value:>17}  {note}")

    for preset, data, steps_of, published in (
            ("paper", "CIFAR10", (5, 10, 20, 40), (35.7e6, 6.1e9, 90.0, 10)),
            ("paper-lsun", "LSUN-Church", (5, 7, 10, 20), (113.7e6, 248.7e9, 80.0, 20))):
        config = dict({k: v[PRESET_NAMES.index(preset)] for k, v in PRESETS.items()}, strategy="label")
        with torch.device("meta"):
            base, tuned = build_net(config, 3), build_net(config, 3, "label")
        row("Sec. IV", f"{data}: parameters", published[0], sum(p.numel() for p in base.parameters()),
            "printed by Diff-Pruning" if preset == "paper" else "printed by others, rounded")
        row("Sec. IV", f"{data}: parameters with labels", None, sum(p.numel() for p in tuned.parameters()))
        for strategy in ("xy", "2T", "2dms"):
            with torch.device("meta"):
                size = sum(p.numel() for p in build_net(config, 3, strategy).parameters())
            row("Table I", f"{data}: parameters, {strategy}", None, size * (1 + (strategy == "2dms")))
        full, _ = plan_macs(config, 3, make_plan("base", "ddim", 0, REFERENCE_STEPS))
        row("Sec. IV", f"{data}: MACs, {config['res']}x{config['res']}", published[1], full // 100,
            "their counter adds bias and norm and leaves out the attention products: 6.07 G"
            if preset == "paper" else "their counter: 248.69 G, without the attention products")
        for low in {"paper": (8, 16), "paper-lsun": (32,)}[preset]:
            config["low"] = low
            for steps in steps_of:
                macs, _ = plan_macs(config, 3, make_plan("c2f", "ddim", LOW_STEPS, steps, 565))
                claim = low == {"paper": 8, "paper-lsun": 32}[preset] and steps == published[3]
                row("Fig. 6", f"{data} {low}->{config['res']}, T_f={steps}: relative MACs, %",
                    100 - published[2] if claim else None, 100 * macs / full,
                    f"the text's '{published[2]:.0f} % reduction': {100 - 100 * macs / full:.1f} %"
                    if claim else "")
        share = 100 * config["finetune_iters"] / config["iters"]
        row("Sec. IV", f"{data}: fine-tuning, % of training steps", "< 10", share,
            "100k of DDPM's 800k steps is not below 10 %" if share > 10 else "")
    for data, minutes in (("CIFAR10", 1.4), ("LSUN-Church", 8.8)):
        row("Table II", f"{data}: search, minutes, RTX 4090", minutes, None, "no such GPU, no trained "
            "network of that size: results/c2f_trd has the small preset's time on its device")
    save_json(path, rows)


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------
def get_args(argv=None):
    """The command line; what a preset sets is None here and filled in from it."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    do = p.add_argument_group("what to do, any subset, in this order")
    for name, text in (("train", "base model, then multi-resolution fine-tuning"),
                       ("search", "transition step and TRD: writes plans"), ("sample", "a PNG of images"),
                       ("evaluate", "FD, MACs, seconds: a line of results each"),
                       ("ledger", "the paper's efficiency cells beside ours")):
        do.add_argument(f"--{name}", action="store_true", help=text)
    run = p.add_argument_group("run")
    run.add_argument("--data", help="fashion10k (default: the checkpoint's), fashion, cifar10, emoji, or a folder")
    run.add_argument("--preset", default="small", choices=PRESET_NAMES)
    run.add_argument("--iters", type=int, help="training steps of the base model")
    run.add_argument("--batch", type=int, help="images per training step, all processes together")
    run.add_argument("--lr", type=float)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--n", type=int, default=None, help="images (sample: 64, evaluate: 2000)")
    run.add_argument("--steps", type=int, nargs="+", default=[5], help="high-resolution steps T_f")
    run.add_argument("--out", default=f"runs/{SCRIPT}", help="folder of runs and samples")
    run.add_argument("--checkpoint", help="default: the newest run under --out, else the shipped weights; "
                     "with --train: fine-tune its base model anew")
    run.add_argument("--resume", action="store_true", help="with --train: go on with the newest run")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    run.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    run.add_argument("--compile", action="store_true", help="torch.compile")
    run.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    run.add_argument("--seeds", type=int, default=1, help="evaluate: this many, from --seed on")
    run.add_argument("--results", default=str(HERE / "results" / SCRIPT / "results.jsonl"))
    run.add_argument("--experiment", help="name of the table or figure in the results")
    run.add_argument("--inception", help="FD with Inception-v3: path of its weights, or 'download'")
    run.add_argument("--per-class", action="store_true", help="evaluate: FD of each class as well")
    m = p.add_argument_group("METHOD")
    m.add_argument("--method", nargs="+", default=["c2f+trd"], choices=METHODS, help="base: the off switch")
    m.add_argument("--solver", nargs="+", default=["dpm2"], choices=SOLVERS)
    m.add_argument("--spacing", default="inclusive", choices=SPACINGS, help="of uniform steps (D1)")
    m.add_argument("--strategy", default="label", choices=STRATEGIES, help="Table I")
    m.add_argument("--low", type=int, help="low resolution")
    m.add_argument("--low-steps", type=int, default=LOW_STEPS, help="T_c")
    m.add_argument("--finetune-iters", type=int, help="steps of the fine-tuning")
    m.add_argument("--transition", type=int, help="t* instead of the PCA's")
    m.add_argument("--pca", type=int, default=1024, help="samples of the PCA")
    m.add_argument("--calibration", type=int, default=CALIBRATION, help="samples of the TRD loss")
    m.add_argument("--sweeps", type=int, default=SWEEPS, help="maximum of TRD sweeps")
    m.add_argument("--ends", default="paper", choices=("paper", "bounded"), help="TRD's end rule (D2)")
    m.add_argument("--two-phase", action="store_true", help="TRD: low steps first, then high (D8)")
    m.add_argument("--plan", help="sample, evaluate: a plan.json instead of a searched one")
    m.add_argument("--plans", help="folder of the plans (default: the run's; --out for the shipped weights)")
    m.add_argument("--sweep-transition", action="store_true", help="evaluate: FD against t* (Fig. 5a), "
                   "--steps 20 or more: the members of that many uniform steps that do not exceed t*")
    args = p.parse_args(argv)
    for key, values in PRESETS.items():
        if getattr(args, key, None) is None:
            setattr(args, key, values[PRESET_NAMES.index(args.preset)])
    for key in ("n", "iters", "batch", "seeds", "low", "low_steps", "pca", "calibration", "save_every"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} must be at least 1")
    if args.finetune_iters < 0:
        raise ValueError(f"--finetune-iters {args.finetune_iters} is negative")
    if args.transition is not None and not 0 <= args.transition < T:
        raise ValueError(f"--transition {args.transition} is not in 0 .. {T - 1}")
    if args.resume and not args.train:
        raise ValueError("--resume goes with --train")
    if not any((args.train, args.search, args.sample, args.evaluate, args.ledger)):
        p.error("nothing to do: give --train, --search, --sample, --evaluate or --ledger")
    return args


def find_checkpoint(args):
    """--checkpoint, else the newest run under --out, else the shipped weights; printed."""
    if args.checkpoint is None:
        runs = sorted(Path(args.out).glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        if args.resume and not runs:
            raise ValueError(f"--resume: no run under {args.out}")
        args.checkpoint = str(runs[-1] if runs else HERE / "weights" / SCRIPT / "weights.pt")
    print(f"checkpoint: {args.checkpoint}")


def main():
    args = get_args()
    device, rank, world = start_device(args.device)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")                             # one process speaks
    if args.train:
        if args.resume:
            find_checkpoint(args)
        args.checkpoint = str(train(args, device, rank, world))
        if world > 1:
            dist.barrier()                                             # until it is written
    if args.search or args.sample or args.evaluate:
        find_checkpoint(args)
        models = load_models(args, device, args.precision)
    if args.search and rank == 0:
        search(args, load_models(args, device, "fp32"), device)
    if world > 1:
        dist.barrier()
    if args.sample:
        plans = [get_plan(args, *job) for job in itertools.product(args.method, args.solver, args.steps)]
        n, begun = args.n or 64, time.time()
        seeds, columns = range(args.seed, args.seed + n), 8 if len(plans) == 1 else n
        rows = []
        for plan in plans:
            rows.append(gather(sample(args, models, plan, seeds[rank::world], device), world))
        if rank == 0:
            path = Path(args.out) / "samples.png"
            save_grid(path, torch.cat(rows), columns)
            print(f"{len(plans)} x {n} images, {time.time() - begun:.1f} s: {path}")
    if args.evaluate:
        args.n = args.n or 2000
        evaluate(args, models, device, rank, world)
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
