"""LowDiff: Efficient Diffusion Sampling with Low-Resolution Condition (arXiv 2509.15342), in one file.
The paper has no public code, and most copies of it have lost the formulas.

Few evaluations at full resolution are enough if a low-resolution image shows the way: make an 8x8 image, stop
while it is still noisy, make the 16x16 image with it as a condition, then the 32x32 one. The 8x8 and 16x16
networks are the inside of the 32x32 U-Net, with an entry and an exit convolution of their own: one network,
trained at all resolutions in each step, as fast as a cascade and with the parameters of its largest member.

Run (README.md has more):
    python lowdiff.py --train --sample --evaluate            # 8 -> 16 -> 32 on Fashion-MNIST
    python lowdiff.py --train --arch edm                     # off switch: EDM, for the same training MACs
    python lowdiff.py --train --arch cdm --stages 16 32      # Table 8: a network per resolution
    python lowdiff.py --sample --show-stages                 # what comes out of 8, of 16, of 32
    python lowdiff.py --train --space latent --cond          # Table 4: an autoencoder, then LightningDiT in two stages
    python lowdiff.py --search --sweep truncation            # Appendix C: FD against the truncation point
    torchrun --nproc_per_node=2 -- lowdiff.py --train        # two processes (or GPUs)
    python lowdiff.py --ledger                               # the paper's networks: parameters, MACs, NFE

Expect (small preset, fashion10k, one CPU core, torch 2.13): --train about 75 minutes (3,752 steps, 480,000 images,
    110 a second) and as long for --arch edm. The shipped weights had 0.4 of that (--budget 9.4e12): garments, 1.6
    times as many a second as EDM, FD twice EDM's (results/lowdiff). 64 images take 4 seconds.

Symbols: res_1 < ... < res_n -> stages; y_i -> x0 at each of them; D -> x0_hat; sigma, e -> sigma, eps of the
image; s, e' -> s, eps_z of the condition z; N -> steps (Heun steps of a stage's schedule); K (not the K of the
other files) -> evaluations (network evaluations done of the 2N - 1 there are); NFE counts evaluations, a Heun step
being two. In the latent version t, t' -> t, t_z (0 is noise, 1 data); v -> v_hat = x0 - eps; their sequence -> ts.

Training budget: --budget is the number of multiply-accumulates of one forward pass of every stage (each training
image goes through each of them once), times images. It sets the number of steps, so that EDM, LowDiff and CDM
are compared at equal cost; its default is what EDM's steps of the preset cost. A backward pass costs about two
forward ones for all of them.

Differences from the paper, and what it leaves open:
D1  The cut. The sub-network of a resolution is every block at that level and below, with an entry convolution in
    place of the block that leads down into the level: nothing is left on the skip stack. The lowest stage's
    entry takes the image, the others' image and condition; each exit has its own norm. This gives the printed
    61.82 M, 61.86 M, 93.89 M, and 55.77 M, which is without labels (EDM's 55.74 is with); the printed 55.76 M
    (ours 55.75) fits no natural rule that also gives 55.77.
D2  Resolution embedding: one-hot times sqrt(n) (as EDM scales labels), one linear layer, added to the noise
    embedding.
D3  The level s of the condition is drawn like sigma and independently of it. The network is not told s (the
    printed sizes leave no room for a learned map); --told tells it, by one linear layer.
D4  The condition is scaled by its own 1 / sqrt(s^2 + sigma_data^2). --cond-scale input scales it like the image,
    which hides it (times 0.02) while the image is noise. c_skip acts on the image alone.
D5  Down is the mean of 2x2 pixels, Up repeats pixels, which keeps the noise at its level; bilinear (--up)
    shrinks it to 0.63.
D6  Truncation counts evaluations: only so do Tables 6 to 12 and their latencies fit. An odd count ends in an
    Euler step without correction. Handed on is the noisy image, not the prediction; each stage starts from its
    own noise at its full sigma_max.
D7  Of three and four stages the paper prints K, not N: 12 steps at 16x16 on CIFAR-10, 20 on FFHQ put the
    truncation (sigma 0.78, 0.82) near those of the two-stage models (1.09, 0.63). The first stage has EDM's own
    18 steps (1.92), 20 on FFHQ (1.19). Other --stages get 18 steps and K = 19, 9 steps in the last.
D8  Conditioned stages run from sigma 50 to 0.01 (Table 10's best) on all data; that table's prose
    calls its third row narrow, the numbers say wide: the numbers are used.
D9  Losses are summed over pixels, as EDM does, and over resolutions with equal weight, for one Adam step on the sum;
    the paper's "loss independently for each resolution" could also mean a step each. sigma_data is .5 at all.
D10 Effective NFE: one ceiling of the sum over the low resolutions; by the printed latencies a ceiling each would
    give 23, not the printed 22. Images/s: medians of runs in turn with EDM's; the paper averages 10.
D11 CDM: for each stage a network of the same shape as LowDiff's sub-network (the printed 93.89 M), trained in
    the same steps. The printed 117.57 M is 117.54 M.
D12 EDM's augmentations (paper presets) are done by one bilinear resampling with reflection, not by EDM's wavelet
    filters; once, at full resolution, before the image is reduced, and all stages are told the same.
D13 A loss or weights that are not finite stop the training (checked every 50 steps and when saving); EDM sets
    such gradients to zero and goes on. bf16 where the device has it (--precision); EDM trains in fp32.
D14 Classes are sampled in turn (seed i: class i modulo their number), not at random.
D15 Preset paper trains for EDM's 200 M images and LowDiff for equal MACs, 151.9 M images on CIFAR-10 (the paper:
    150 M), 120 M on FFHQ (150 M, a quarter more MACs than EDM), 64,400 steps of the DiT (about 52,500).
D16 Preset small is not the paper's network: 2x2 pixels a token, one block a level, a decaying learning rate, no
    augmentation (shoes point left), Fashion-MNIST's 10,000 test images; small-64, narrower and deeper, is for
    emoji. Its FD is no FID and compares with itself only. D17 to D20 and the block "Latent version" are Table 4 only.
D17 Latent version (Table 4): a resolution has its own entry, sine positions, rotary positions from 0 and final
    layer, all blocks are shared: this gives the printed 131.86 M, sharing the final layer does not. Low-resolution
    latents are 2x2 means of the high ones.
D18 Its condition is t' Down(x0) + (1 - t') eps, t' drawn like t, beside xt and unscaled; means over positions, as in
    LightningDiT's loss, so both resolutions weigh the same; a label is left out for both. Unlike LightningDiT's
    code: no flipped latents, EMA with EDM's ramp, EDM's frequencies of the time embedding.
D19 The printed 100, 50 and 45 are taken as evaluations; 45 of 60, so that it stops at t = .47 with LightningDiT's
    shift, .3, which the paper does not name; of 50 it would be .73, nearly clean. The paper prints no guidance, its
    scores suggest some. Ours: --guidance 1, none; else on all channels at all times (LightningDiT: on 3 of 32,
    from t = .1 on).
D20 Its autoencoder: a small VAE trained here on the same images (paper: VA-VAE's, 16x16x32, ImageNet).
Not here: the paper's FID and IS, which take 8 GPUs.
"""
import argparse
import copy
import functools
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (HERE, class_logits, count_macs, extract, feature_stats, frechet_distance, gather,
                    has_fast_bf16, inception_score, load_extractor, load_images, noise_for, progress, save_grid,
                    save_json, sha256_of, start_device, to_float, to_uint8, write_atomically)

SCRIPT = "lowdiff"

# ---------------------------------------------------------------------------------------------
# Hyper-parameters
# ---------------------------------------------------------------------------------------------
SIGMA_DATA = 0.5               # EDM's, at every resolution (Sec. 4.1: settings retained; D9)
P_MEAN, P_STD = -1.2, 1.2      # ln sigma of training is normal (EDM, Table 1)
RHO = 7                        # curvature of the ladder of noise levels (EDM, Eq. 5)
SIGMA_RANGE = (0.002, 80.0)    # of the first stage: EDM's (Table 10)
COND_RANGE = (0.01, 50.0)      # of a conditioned stage (Table 10, D8)
EMA_RAMP = 0.05                # the EMA's half-life is at most this share of the images seen (EDM)
ARCHS = ("lowdiff", "edm", "dit", "cdm")                       # edm, dit: the off switches in pixels, in latents
SWEEPS = ("truncation", "steps", "range")                      # Appendix C, Tables 11, 12 (both captioned 12), 10
SPEED_BATCH, SPEED_RUNS = 64, 3                                # images/s: Table 5 has 10 runs (D10)

# A preset is a network and how it is trained. paper, paper-ffhq: EDM's networks for CIFAR-10 and FFHQ 64x64.
#                        tiny         small        small-64         paper        paper-ffhq
PRESETS = {
    "stages":           ([8, 16, 32], [8, 16, 32], [8, 16, 32, 64], [8, 16, 32], [8, 16, 32, 64]),  # resolutions
    "ch":               (8,           32,          16,              128,         128),      # base width
    "mult":             ([1, 1, 1],   [1, 1, 1],   [1, 2, 2, 2],    [2, 2, 2],   [1, 2, 2, 2]),  # width per level
    "blocks":           (1,           1,           1,               4,           4),        # residual blocks per level
    "attention":        ([1],         [1],         [2],             [1],         [2]),      # levels with attention
    "patch":            (2,           2,           2,               1,           1),        # pixels per side of a token
    "dropout":          (0.0,         0.0,         0.0,             0.13,        0.05),
    "augment":          (0.0,         0.0,         0.0,             0.12,        0.15),     # probability of each kind
    "batch":            (16,          128,         64,              512,         256),      # global, all processes
    "lr":               (2e-3,        1e-3,        1e-3,            1e-3,        2e-4),     # Adam
    "warmup":           (10,          200,         200,             19_531,      39_063),   # steps, linear: 10 M images
    "decay":            (0.3,         0.3,         0.3,             0.0,         0.0),      # last share: lr falls
    "ema":              (100,         50_000,      50_000,          500_000,     500_000),  # half-life in images
    "edm_iters":        (20,          5000,        5000,            390_625,     781_250),  # EDM's steps: the budget
}
PRESET_NAMES = ("tiny", "small", "small-64", "paper", "paper-ffhq")

# --space latent: LightningDiT, between an autoencoder's ends. paper-dit: LightningDiT-B/1 for ImageNet 256x256.
#                        tiny         small        paper-dit
LATENT_PRESETS = {
    "stages":           ([4, 8],      [4, 8],      [8, 16]),      # sides of the latent images
    "ch":               (32,          128,         768),          # width; heads have 64 channels
    "blocks":           (2,           4,           12),           # depth
    "latent":           (4,           4,           32),           # channels of the latent images
    "factor":           (4,           4,           16),           # pixels per side of a latent pixel
    "ae_iters":         (20,          1500,        100_000),      # steps of the autoencoder
    "batch":            (16,          128,         1024),
    "lr":               (2e-3,        1e-3,        2e-4),         # Adam
    "warmup":           (10,          200,         1),
    "decay":            (0.3,         0.3,         0.0),
    "ema":              (100,         50_000,      7_097_472),    # half-life in images; 0.9999 a step
    "edm_iters":        (20,          3000,        80_000),       # LightningDiT's steps: the budget
}
LATENT_NAMES = ("tiny", "small", "paper-dit")
SHIFT = 0.3                    # of the Euler sampler's times (LightningDiT)
LABEL_DROP = 0.1               # labels left out in training, for guidance (LightningDiT)
KL_WEIGHT = 1e-4               # of the autoencoder: keeps the latents near a normal distribution
AE_BATCH, AE_LR = 64, 2e-3     # of the autoencoder
BETAS = {"pixel": (0.9, 0.999), "latent": (0.9, 0.95)}         # Adam: EDM's, LightningDiT's

CONFIG = (*{**PRESETS, **LATENT_PRESETS}, "space", "data", "preset", "seed", "arch", "cond", "classes", "up",
          "cond_scale", "told")                                        # in a checkpoint, beside iters and budget


def preset_of(name, space):
    """The values of a preset of --space pixel or latent, as a dict."""
    presets, names = (LATENT_PRESETS, LATENT_NAMES) if space == "latent" else (PRESETS, PRESET_NAMES)
    if name not in names:
        raise ValueError(f"--preset {name}: --space {space} has {', '.join(names)}")
    return {key: values[names.index(name)] for key, values in presets.items()}


# Steps N of each stage and evaluations K of each but the last (Tables 2, 3, 6, 7; of three and four stages N: D7).
SCHEDULES = {
    (32,): ([18], []), (16, 32): ([18, 9], [19]), (8, 16, 32): ([18, 12, 9], [18, 13]),
    (64,): ([40], []), (32, 64): ([40, 20], [49]), (8, 16, 32, 64): ([20, 20, 20, 20], [22, 23, 23]),
}


# ---------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------
def timestep_embedding(t, dim):
    """(B,) -> (B, dim): sine and cosine of t at `dim / 2` frequencies from 1 to 1 / 10000 (DDPM)."""
    frequency = torch.logspace(0, -4, dim // 2, device=t.device)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def resolution_one_hot(stages, x):
    """METHOD: 3.3: which of the n `stages` x (B, C, r, r) has the size of: (1, n), times sqrt(n) (D2).
    Raises ValueError if none."""
    r = x.shape[-1]
    if r not in stages or x.shape[-2] != r:
        raise ValueError(f"the network has no entry for {x.shape[-2]}x{r}, only for {list(stages)}")
    one_hot = torch.zeros(1, len(stages), device=x.device)
    one_hot[:, stages.index(r)] = len(stages) ** 0.5
    return one_hot


def group_norm(c):
    """GroupNorm of EDM: 32 groups, fewer where a group would have less than 4 channels."""
    return nn.GroupNorm(min(32, c // 4), c, eps=1e-6)


# differs: EDM's block: it also resamples, holds the attention, and its sums keep their variance
class ResBlock(nn.Module):
    """norm - SiLU - (resample) conv, plus the embedding, norm - SiLU - conv, plus the (resampled) input, times
    sqrt(1/2); then attention, times sqrt(1/2). resample: None, "down" (mean of 2x2) or "up" (repeat)."""

    def __init__(self, c_in, c_out, c_emb, dropout, resample=None, attention=False):
        super().__init__()
        self.resample = resample
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out or resample else nn.Identity()
        self.attention = Attention(c_out, min(32, c_out // 4)) if attention else None

    def change_size(self, x):
        if self.resample is None:
            return x
        box = x.new_ones(x.shape[1], 1, 2, 2)                  # convolutions, as in EDM: they count as MACs
        if self.resample == "down":
            return F.conv2d(x, box / 4, stride=2, groups=x.shape[1])
        return F.conv_transpose2d(x, box, stride=2, groups=x.shape[1])

    def forward(self, x, emb):
        h = self.conv1(self.change_size(F.silu(self.norm1(x))))
        h = h + self.emb(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        h = (self.skip(self.change_size(x)) + h) * 0.5 ** 0.5
        return h if self.attention is None else self.attention(h) * 0.5 ** 0.5


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


# differs: EDM's DDPM++ U-Net; METHOD: an entry and an exit for each resolution
class UNet(nn.Module):
    """EDM's U-Net (DDPM++ of Song et al.) with several entries: (B, C, r, r) out for each r in `stages`.

    xt (B, C_in, r, r), C_in = C at the resolution `lowest` and 2C (image and condition) above it; c_noise (B,).
    Level l works at R / 2^l; the network has no levels above its largest stage. Attention: in every encoder
    block of its levels, the last decoder block, and at the bottom. patch > 1 folds patch x patch pixels into
    channels first. classes: number of labels, told by y (B,); augment: takes aug (B, 9); told: takes c_noise_z (B,).
    """

    def __init__(self, channels, R, stages, lowest, ch, mult, blocks, attention, patch=1, dropout=0.0, classes=0,
                 augment=False, told=False):
        super().__init__()
        widths, c_emb, bottom = [ch * m for m in mult], 4 * ch, len(mult) - 1
        self.ch, self.patch, self.classes, self.stages = ch, patch, classes, tuple(stages)
        self.level = {r: int(math.log2(R // r)) for r in stages}
        if any(R != r * 2 ** self.level[r] or self.level[r] > bottom or r % (patch * 2 ** (bottom - self.level[r]))
               for r in stages):
            raise ValueError(f"--stages {' '.join(map(str, stages))}: a network of {len(mult)} levels and "
                             f"{patch}x{patch} pixels a token cannot enter at them")
        self.map1, self.map2 = nn.Linear(ch, c_emb), nn.Linear(c_emb, c_emb)
        self.map_label = nn.Linear(classes, ch) if classes else None
        self.map_augment = nn.Linear(9, ch, bias=False) if augment else None
        # METHOD: 3.3, resolution embedding (D2); and the level of the condition (D3)
        self.map_res = nn.Linear(len(stages), ch) if len(stages) > 1 else None
        self.map_told = nn.Linear(ch, ch) if told and max(stages) > lowest else None

        def block(c_in, c_out, **options):
            return ResBlock(c_in, c_out, c_emb, dropout, **options)

        # METHOD: 3.3, resolution-specific I/O convolutions (D1)
        self.entry, self.exit = nn.ModuleDict(), nn.ModuleDict()
        for r in stages:
            c_in, level = channels * (1 if r == lowest else 2), self.level[r]
            self.entry[str(r)] = nn.Conv2d(c_in * patch ** 2, widths[level - 1] if level else ch, 3, padding=1)
            self.exit[str(r)] = nn.Sequential(group_norm(widths[level]), nn.SiLU(), nn.Conv2d(
                widths[level], channels * patch ** 2, 3, padding=1))

        self.down, self.encoder, self.decoder, self.up = (nn.ModuleDict() for _ in range(4))   # by level
        top, skips = min(self.level.values()), []
        c = widths[top - 1] if top else ch
        for level in range(top, bottom + 1):
            if level > top:
                self.down[str(level)] = block(c, c, resample="down")
            skips.append(c)                                    # of the entry, or of the way down
            self.encoder[str(level)] = nn.ModuleList()
            for _ in range(blocks):
                self.encoder[str(level)].append(block(c, widths[level], attention=level in attention))
                c = widths[level]
                skips.append(c)
        self.mid = nn.ModuleList([block(c, c, attention=True), block(c, c)])
        for level in range(bottom, top - 1, -1):
            if level < bottom:
                self.up[str(level)] = block(c, c, resample="up")
            self.decoder[str(level)] = nn.ModuleList()
            for i in range(blocks + 1):
                last = i == blocks and level in attention
                self.decoder[str(level)].append(block(c + skips.pop(), widths[level], attention=last))
                c = widths[level]

        for module in self.modules():                          # EDM: Xavier, its residual branches near zero
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, ResBlock):
                    module.conv2.weight.mul_(1e-5)
                elif isinstance(module, Attention):
                    module.qkv.weight.mul_(0.2 ** 0.5)
                    module.out.weight.mul_(1e-5)
            for out in self.exit.values():
                out[-1].weight.mul_(1e-5)

    def forward(self, xt, c_noise, y=None, aug=None, c_noise_z=None):
        r, one_hot = xt.shape[-1], resolution_one_hot(self.stages, xt)
        emb = timestep_embedding(c_noise, self.ch)
        if self.map_label is not None:
            emb = emb + self.map_label(F.one_hot(y, self.classes) * self.classes ** 0.5)
        if self.map_augment is not None and aug is not None:
            emb = emb + self.map_augment(aug)
        if self.map_res is not None:                           # METHOD: 3.3, added to the other embeddings
            emb = emb + self.map_res(one_hot)
        if self.map_told is not None and c_noise_z is not None:
            emb = emb + self.map_told(timestep_embedding(c_noise_z, self.ch))
        emb = F.silu(self.map2(F.silu(self.map1(emb))))

        top, h = self.level[r], self.entry[str(r)](F.pixel_unshuffle(xt, self.patch))
        skips = []
        for level, blocks in self.encoder.items():
            if int(level) < top:                               # METHOD: 3.3, only the innermost blocks
                continue
            if int(level) > top:
                h = self.down[level](h, emb)
            skips.append(h)
            for block in blocks:
                h = block(h, emb)
                skips.append(h)
        for block in self.mid:
            h = block(h, emb)
        for level, blocks in self.decoder.items():
            if int(level) < top:
                break
            if level in self.up:
                h = self.up[level](h, emb)
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
        assert not skips
        return F.pixel_shuffle(self.exit[str(r)](h), self.patch)


class Cascade(nn.Module):
    """CDM (Tables 8, 9): for each resolution a U-Net of its own; called like the one of all resolutions."""

    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleDict({str(net.stages[0]): net for net in nets})

    def forward(self, xt, *args):
        return self.nets[str(xt.shape[-1])](xt, *args)


# differs: one network for all stages, or (CDM) one for each
def build_net(config, channels):
    """The network of a preset (config: stages, ch, mult, blocks, attention, patch, dropout, augment, classes,
    told) for config["arch"]: edm, dit have one stage, lowdiff one network for all, cdm a network for each."""
    stages = config["stages"]
    if config["space"] == "latent":
        one = functools.partial(DiT, channels, lowest=stages[0], **{k: config[k] for k in ("ch", "blocks", "classes")})
    else:
        options = {k: config[k] for k in ("ch", "mult", "blocks", "attention", "patch", "dropout", "classes", "told")}
        one = functools.partial(UNet, channels, stages[-1], lowest=stages[0], augment=config["augment"] > 0, **options)
    net = Cascade([one([r]) for r in stages]) if config["arch"] == "cdm" else one(stages)
    return net.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------
# Method: EDM's denoiser, the low-resolution condition (Sec. 3.1 - 3.4), effective NFE (Appendix B)
# ---------------------------------------------------------------------------------------------
def downsample(x):
    """METHOD: Down: (B, C, 2r, 2r) -> (B, C, r, r): the mean of 2x2 pixels (D5)."""
    return F.avg_pool2d(x, 2)


def pyramid_of(x0, n):
    """x0 at n resolutions, low to high."""
    return [x0] if n == 1 else [*pyramid_of(downsample(x0), n - 1), x0]


def upsample(x, up="nearest"):
    """METHOD: Up: (B, C, r, r) -> (B, C, 2r, 2r): nearest or bilinear (D5)."""
    return F.interpolate(x, scale_factor=2, mode=up, align_corners=None if up == "nearest" else False)


def denoise(net, xt, sigma, z=None, s=None, y=None, aug=None, cond_scale="own"):
    """x0_hat = D(xt; sigma) (B, C, r, r), EDM's Eq. 7. xt = x0 + sigma * eps, sigma (B,); y (B,) class or None.

    METHOD: 3.1: z (B, C, r, r), the up-sampled image of the stage before, with noise of level s (B,), enters
    beside xt, scaled by its own 1 / sqrt(s^2 + sigma_data^2) (cond_scale "own") or by xt's ("input"; D4)."""
    sigma = sigma.to(xt.dtype)
    c_noise, sigma = sigma.log() / 4, sigma.view(-1, 1, 1, 1)
    total = (sigma ** 2 + SIGMA_DATA ** 2).sqrt()
    x, c_noise_z = xt / total, None
    if z is not None:
        s = s.to(xt.dtype)
        c_noise_z = s.clamp(min=SIGMA_RANGE[0]).log() / 4      # a stage that was not truncated has s = 0
        own = (s.view(-1, 1, 1, 1) ** 2 + SIGMA_DATA ** 2).sqrt()
        x = torch.cat([x, z / (own if cond_scale == "own" else total)], dim=1)
    raw = net(x, c_noise, y, aug, c_noise_z).to(xt.dtype)
    return (SIGMA_DATA / total) ** 2 * xt + sigma * SIGMA_DATA / total * raw       # c_skip xt + c_out F


def effective_nfe(nfe, seconds):
    """METHOD: Appendix B: evaluations at all resolutions, in evaluations at the last one. nfe: evaluations of each
    stage, low to high; seconds: of one evaluation of each. The low ones are summed, then rounded up (D10)."""
    return nfe[-1] + math.ceil(sum(n * t / seconds[-1] for n, t in zip(nfe[:-1], seconds)) - 1e-9)


# ---------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------
def log_normal(B):
    """EDM's noise levels sigma of B training images."""
    return (P_MEAN + P_STD * torch.randn(B)).exp()


def draw_noise(B, channels, stages, draw_level=log_normal):
    """What a training step draws for each stage: [(sigma (B,), eps (B, C, r, r), s (B,), eps_z (B, C, r/2, r/2))];
    s and eps_z are None in the first.
    METHOD: 3.2, truncation augmentation: the condition has its own level and its own noise, drawn at its own, lower
    resolution (D3)."""
    draws = []
    for i, r in enumerate(stages):
        sigma, eps = draw_level(B), torch.randn(B, channels, r, r)
        s = draw_level(B) if i else None
        draws.append((sigma, eps, s, torch.randn(B, channels, r // 2, r // 2) if i else None))
    return draws


def edm_loss(net, x0, sigma, eps, z=None, s=None, y=None, aug=None, cond_scale="own"):
    """EDM's loss of each sample (B,): weighted squared error of x0_hat, summed over pixels."""
    x0_hat = denoise(net, x0 + sigma.view(-1, 1, 1, 1) * eps, sigma, z, s, y, aug, cond_scale)
    weight = (sigma ** 2 + SIGMA_DATA ** 2) / (sigma * SIGMA_DATA) ** 2
    return weight * (x0_hat - x0).square().flatten(1).sum(1)


def cascade_loss(net, x0, draws, y=None, aug=None, up="nearest", cond_scale="own"):
    """METHOD: 3.4, Algorithm 1: the losses of all resolutions, each conditioned on a noisy image of the one below,
    added together; each activates its own part of the network. x0 (B, C, R, R); draws: of draw_noise, low to
    high. One stage is EDM's loss. Returns the sum, a mean over the batch."""
    pyramid, total = pyramid_of(x0, len(draws)), 0
    for i, (sigma, eps, s, eps_z) in enumerate(draws):
        z = upsample(pyramid[i - 1] + s.view(-1, 1, 1, 1) * eps_z, up) if i else None
        total = total + edm_loss(net, pyramid[i], sigma, eps, z, s, y, aug, cond_scale).mean()
    return total


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------
def noise_levels(steps, sigma_min, sigma_max):
    """EDM's Eq. 5: `steps` levels from sigma_max down to sigma_min, and 0: a list of steps + 1 floats."""
    a, b = sigma_max ** (1 / RHO), sigma_min ** (1 / RHO)
    return [(a + i / max(steps - 1, 1) * (b - a)) ** RHO for i in range(steps)] + [0.0]


def stop_level(sigmas, evaluations, per_step=2):
    """The noise level at which a solver of that many evaluations per step ends after `evaluations` (D6; None: all)."""
    return sigmas[-1] if evaluations is None else sigmas[math.ceil(evaluations / per_step)]


def heun_sample(denoiser, noise, sigmas, evaluations=None):
    """EDM's Algorithm 1: Heun's method from sigmas[0] to sigmas[-1] = 0, where the last step is Euler's.

    denoiser(xt, sigma float) -> x0_hat. noise (B, C, r, r), standard normal. The state is float64, as EDM's.
    METHOD: 3.4, truncation: `evaluations` K of the 2N - 1, then the noisy image as it is, at stop_level. An odd K
    ends in an Euler step (D6). Raises ValueError if K is not in 1 .. 2N - 1."""
    full = 2 * (len(sigmas) - 1) - 1
    K = full if evaluations is None else evaluations
    if not 1 <= K <= full:
        raise ValueError(f"{K} evaluations: a schedule of {len(sigmas) - 1} steps has 1 .. {full}")
    xt = noise.double() * sigmas[0]
    for i in range((K + 1) // 2):
        h = sigmas[i + 1] - sigmas[i]
        slope = (xt - denoiser(xt, sigmas[i])) / sigmas[i]
        x_next = xt + h * slope
        if 2 * (i + 1) <= K:                                   # the correction is the second evaluation
            x_next = xt + h * (slope / 2 + (x_next - denoiser(x_next, sigmas[i + 1])) / sigmas[i + 1] / 2)
        xt = x_next
    return xt


def cascade_sample(stages, up="nearest", solver=heun_sample, per_step=2):
    """METHOD: 3.4, Algorithm 2: from the lowest resolution up, each stage truncated but the last and handed on,
    noisy as it is, as the condition of the next.

    stages: [(denoiser, noise (B, C, r, r), sigmas, evaluations), ...], low to high;
    denoiser(xt, sigma, z, s) -> x0_hat; z, s: up-sampled image and level of the stage before, None in the first;
    evaluations: None for all that the schedule has.
    solver, per_step: heun_sample and its 2 evaluations a step, or (latent version) euler_sample and its 1.
    One stage is EDM. Returns the images of every stage (float64), the last one clean."""
    images, z, s = [], None, None
    for denoiser, noise, sigmas, evaluations in stages:
        images.append(solver(lambda xt, sigma: denoiser(xt, sigma, z, s), noise, sigmas, evaluations))
        z, s = upsample(images[-1], up), stop_level(sigmas, evaluations, per_step)
    return images


# ---------------------------------------------------------------------------------------------
# Plans: what is sampled, as a small dict; models; samples
# ---------------------------------------------------------------------------------------------
# differs: a stage's plan is its schedule and where it is truncated
def make_plan(stages, steps=None, truncate=None, sigma_min=None, sigma_max=None, space="pixel", guidance=1.0):
    """Schedules of the stages, low to high: steps N of each, evaluations K of each but the last, noise ranges; what
    is None is the paper's (Tables 2, 3, 6, 7, 10; space "latent": 4). One stage is EDM (LightningDiT), the off
    switch. guidance: classifier-free, of latent models; 1 is none."""
    n = len(stages)
    default = SCHEDULES.get(tuple(stages), ([18] * (n - 1) + [9 if n > 1 else 18], [19] * (n - 1)))
    if space == "latent":
        default = [60] * (n - 1) + [50 if n > 1 else 100], [45] * (n - 1)      # D19
        if sigma_min or sigma_max:
            raise ValueError("--sigma-min, --sigma-max: latent models have times 0 .. 1, no noise range")
    elif guidance != 1:
        raise ValueError("--guidance: pixel models are trained without leaving labels out")
    steps, truncate = steps or default[0], default[1] if truncate is None else truncate
    sigma_min = sigma_min or [SIGMA_RANGE[0]] + [COND_RANGE[0]] * (n - 1)
    sigma_max = sigma_max or [SIGMA_RANGE[1]] + [COND_RANGE[1]] * (n - 1)
    for option, values, m in (("steps", steps, n), ("truncate", truncate, n - 1), ("sigma-min", sigma_min, n),
                              ("sigma-max", sigma_max, n)):
        if len(values) != m:
            raise ValueError(f"--{option} {' '.join(map(str, values))}: the stages {list(stages)} need {m} numbers")
    if space == "latent":
        parts = zip(stages, steps, [*truncate, steps[-1]])
        return check_plan(dict(guidance=float(guidance), stages=[dict(res=r, steps=N, evaluations=K, shift=SHIFT)
                                                                 for r, N, K in parts]))
    parts = zip(stages, steps, [*truncate, 2 * steps[-1] - 1], sigma_min, sigma_max)
    return check_plan(dict(stages=[dict(res=r, steps=N, evaluations=K, sigma_min=low, sigma_max=high)
                                   for r, N, K, low, high in parts]))


def levels_of(p):
    """The noise levels of a stage of a plan, from noise to data: sigma of Heun's, t of Euler's method."""
    return flow_times(p["steps"], p["shift"]) if "shift" in p else noise_levels(p["steps"], p["sigma_min"],
                                                                                p["sigma_max"])


def evaluations_of(p):
    """The evaluations of a stage of a plan if it is not truncated."""
    return p["steps"] if "shift" in p else 2 * p["steps"] - 1


# differs: other plans
def check_plan(plan, name="plan"):
    """The plan itself, with sigma_stop (t_stop) filled in, or ValueError if it cannot be run."""
    stages = plan.get("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(p, dict) for p in stages):
        raise ValueError(f"{name}: stages must be a list of schedules")
    for i, p in enumerate(stages):
        whole, real = [p.get(k) for k in ("res", "steps", "evaluations")], [p.get("sigma_min"), p.get("sigma_max")]
        euler = "shift" in p
        if any(type(v) is not int or v < 1 for v in whole):
            raise ValueError(f"{name}: stage {i + 1}: res, steps and evaluations must be whole numbers from 1")
        if euler and (type(p["shift"]) not in (int, float) or not 1e-3 <= p["shift"] <= 1e3):
            raise ValueError(f"{name}: stage {i + 1}: shift must be a number in 0.001 .. 1000: {p['shift']}")
        if not euler and (any(type(v) not in (int, float) for v in real) or not 0 < real[0] < real[1] < math.inf):
            raise ValueError(f"{name}: stage {i + 1}: 0 < sigma_min < sigma_max must hold: {real}")
        full = evaluations_of(p)
        if p["evaluations"] > full:
            raise ValueError(f"{name}: stage {i + 1} ({p['res']}x{p['res']}) is truncated after {p['evaluations']} "
                             f"evaluations, but its {p['steps']} steps have {full}")
        stop = stop_level(levels_of(p), p["evaluations"], 1 if euler else 2)
        p["t_stop" if euler else "sigma_stop"] = round(stop, 6)
    check_stages([p["res"] for p in stages], name)
    if len({"shift" in p for p in stages} | {"guidance" in plan}) > 1:
        raise ValueError(f"{name}: guidance, and a shift in all stages, for latent models, or none of them")
    if type(plan.get("guidance", 1.0)) not in (int, float) or not math.isfinite(plan.get("guidance", 1.0)):
        raise ValueError(f"{name}: guidance must be a number: {plan['guidance']}")
    if stages[-1].get("sigma_stop") or stages[-1].get("t_stop", 1) < 1:
        raise ValueError(f"{name}: the last stage must run to the end: {evaluations_of(stages[-1])} evaluations")
    return plan


def check_stages(stages, name="--stages"):
    """ValueError if the resolutions do not double from stage to stage."""
    if any(b != 2 * a for a, b in zip(stages, stages[1:])) or stages[0] < 1:
        raise ValueError(f"{name}: each stage must have twice the resolution of the one before: {list(stages)}")


def load_plan(path):
    """A plan from JSON. Raises OSError or ValueError with one line."""
    try:
        return check_plan(json.loads(Path(path).read_text()), path)
    except (json.JSONDecodeError, AttributeError):
        raise ValueError(f"{path} is no plan (not JSON, or not an object)") from None


# differs: other plans
def get_plan(args):
    """The plan to run, printed: --plan FILE, or the paper's schedule with what --steps, --truncate, --sigma-min
    and --sigma-max (and --guidance) say."""
    stages, space = args.config["stages"], args.config["space"]
    plan = load_plan(args.plan) if args.plan else make_plan(stages, args.steps, args.truncate, args.sigma_min,
                                                            args.sigma_max, space, args.guidance)
    if [p["res"] for p in plan["stages"]] != stages:
        raise ValueError(f"the plan has the stages {[p['res'] for p in plan['stages']]}, the checkpoint {stages}")
    if (space == "latent") != ("shift" in plan["stages"][0]):
        raise ValueError(f"{args.plan} is a plan of the other space: the checkpoint works in {space} space")
    if plan.get("guidance", 1) != 1 and not args.config["classes"]:
        raise ValueError("--guidance needs a network with labels (train with --cond)")
    guided = f", guidance {plan['guidance']:g}" if plan.get("guidance", 1) != 1 else ""
    print(f"{args.config['arch']}{guided}: " + ", then ".join(
        f"{p['res']}x{p['res']}: {p['evaluations']} of {evaluations_of(p)} evaluations, "
        + (f"t 0 to {p['t_stop']:.4g}" if "shift" in p else f"sigma {p['sigma_max']:g} to {p['sigma_stop']:.4g}")
        for p in plan["stages"]))
    return plan


def model_of(net, config, device, precision):
    """The network as a denoiser(xt, sigma float, z, s float, y) -> x0_hat for cascade_sample, float64 outside;
    of a latent model: (xt, t, z, its t, y, guidance) -> v_hat."""
    def denoiser(xt, sigma, z, s, y=None, guidance=1.0):
        def level(value):
            return torch.full((len(xt),), value, device=xt.device)

        x = xt.float().contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), autocast(device, precision):
            if config["space"] == "latent":
                z = None if z is None else z.float()
                v_hat = velocity(net, x, level(sigma), z, y).double()
                if guidance != 1:
                    null = velocity(net, x, level(sigma), z).double()
                    v_hat = null + guidance * (v_hat - null)
                return v_hat
            if z is None:
                return denoise(net, x, level(sigma), y=y).double()
            return denoise(net, x, level(sigma), z.float(), level(s), y, cond_scale=config["cond_scale"]).double()
    return denoiser


# differs: one network, called at every resolution
def load_models(args, device, precision="auto"):
    """The denoiser of a checkpoint's EMA weights; sets args.run, args.config, args.channels, args.images_seen, and
    args.autoencoder (None in pixels)."""
    saved = load_checkpoint(args.checkpoint)
    args.autoencoder = load_autoencoder(saved, args.checkpoint).to(device) if "autoencoder" in saved else None
    if "ema" not in saved:
        raise ValueError(f"{args.checkpoint} holds an autoencoder only: name a checkpoint of --train")
    args.run, args.channels = Path(args.checkpoint).parent, saved["channels"]
    args.config, args.images_seen = saved["args"], saved["images_seen"]
    net = build_net(args.config, args.channels)
    net.load_state_dict(saved["ema"])
    net = net.to(device).eval().requires_grad_(False)
    return model_of(torch.compile(net) if args.compile else net, args.config, device, precision)


# differs: a noise for each stage
def noises(args, seeds, device):
    """Noise of each stage for each seed, low to high; that of the full resolution does not depend on the others."""
    shapes = [(args.channels, r, r) for r in reversed(args.config["stages"])]
    drawn = noise_for(seeds, *shapes)
    return [noise.to(device) for noise in reversed(drawn if len(shapes) > 1 else [drawn])]


def labels_of(args, seeds, device):
    """Classes (len(seeds),) in turn: those of --classes, else all; None for a network without classes."""
    known = args.config["classes"]
    chosen = args.chosen or list(range(known))
    if args.chosen and not all(0 <= y < known for y in chosen):
        raise ValueError(f"--classes {' '.join(map(str, chosen))}: the checkpoint has " + (
            f"the classes 0 .. {known - 1}" if known else "no classes (train with --cond)"))
    return torch.tensor([chosen[i % len(chosen)] for i in seeds], device=device) if known else None


# differs: any number of stages of one network
def stages_of(plan, denoiser, noise, y=None):
    """The stages of cascade_sample for a plan; noise: of each stage."""
    options = dict(y=y, guidance=plan["guidance"]) if "guidance" in plan else dict(y=y)
    return [(functools.partial(denoiser, **options), z, levels_of(p), p["evaluations"])
            for p, z in zip(plan["stages"], noise)]


def run_stages(stages, config):
    """cascade_sample with the solver of the configuration's space."""
    return cascade_sample(stages, config["up"], *((euler_sample, 1) if config["space"] == "latent" else ()))


def to_image(x, autoencoder):
    """Samples (B, C, r, r) as uint8 images on the CPU, decoded first if they are latents."""
    return to_uint8(x if autoencoder is None else autoencoder.decode(x.float())).cpu()


# differs: returns the images of all stages
def sample(args, denoiser, plan, seeds, device):
    """uint8 images [(n, C, r, r), ...], of each stage with --show-stages, else of the last, seed by seed, of this
    process's share of the seeds."""
    if not len(seeds):
        raise ValueError("--n is smaller than the number of processes")
    parts, batches = [], torch.tensor(list(seeds)).split(250)
    for batch in progress(batches, f"sample {args.config['arch']}", len(batches[0])):
        batch = batch.tolist()
        stages = stages_of(plan, denoiser, noises(args, batch, device), labels_of(args, batch, device))
        images = run_stages(stages, args.config)
        parts.append([to_image(x, args.autoencoder) for x in (images if args.show_stages else images[-1:])])
    return [torch.cat(stage) for stage in zip(*parts)]


# ---------------------------------------------------------------------------------------------
# Search: the paper's own, by FD (Appendix C)
# ---------------------------------------------------------------------------------------------
def ablation(plan, sweep):
    """METHOD: Appendix C: the plans of an ablation table around `plan`, changed in its last truncated stage,
    [(name, plan), ...].

    truncation (Table 11): K from 8 below to 8 above the plan's, its five in single steps; steps (Table 12): 3/4, 1
    and 5/4 of the N, with the K of the same parity that stops nearest to the plan's noise level; range (Table 10): the
    noise ranges of the first and of the other stages. Latent models have the truncation only."""
    if len(plan["stages"]) < 2:
        raise ValueError(f"--sweep {sweep}: one stage (EDM) has no truncation to search")
    found, old = [], plan["stages"][-2]
    if "shift" in old and sweep != "truncation":
        raise ValueError(f"--sweep {sweep} is for pixel models: use --sweep truncation")

    def add(name, **changes):
        new = copy.deepcopy(plan)
        new["stages"][-2].update(changes)
        found.append((name, check_plan(new)))

    if sweep == "truncation":
        for shift in (-8, -6, -4, -2, -1, 0, 1, 2, 4, 6, 8):
            if 1 <= old["evaluations"] + shift < evaluations_of(old):
                add(f"K = {old['evaluations'] + shift}", evaluations=old["evaluations"] + shift)
    elif sweep == "steps":
        for share in (0.75, 1, 1.25):
            N = int(share * old["steps"] + 0.5)
            sigmas = noise_levels(N, old["sigma_min"], old["sigma_max"])
            K = min(range(2 - old["evaluations"] % 2, 2 * N, 2),
                    key=lambda K: abs(stop_level(sigmas, K) - old["sigma_stop"]))
            add(f"N = {N}, K = {K}", steps=N, evaluations=K)
    else:
        for first, others in ((SIGMA_RANGE, COND_RANGE), (COND_RANGE, COND_RANGE), (SIGMA_RANGE, SIGMA_RANGE)):
            new = copy.deepcopy(plan)
            for i, p in enumerate(new["stages"]):
                p["sigma_min"], p["sigma_max"] = others if i else first
            found.append((f"first {first}, others {others}", check_plan(new)))
    return found


# differs: the paper has no search but its ablations: the best plan is the one of the lowest FD
def search(args, denoiser, device, rank, world):
    """Appendix C: FD of every plan of each --sweep, a line of results each, and the best as plan_SWEEP.json."""
    for sweep in args.sweep:
        jobs = ablation(get_plan(args), sweep)
        fds = evaluate(args, denoiser, device, rank, world, jobs, args.experiment or sweep)
        if rank == 0:
            best = min(range(len(jobs)), key=fds.__getitem__)
            save_json(Path(args.plans or args.run) / f"plan_{sweep}.json", dict(jobs[best][1], fd=fds[best]))
            print(f"best of {sweep}: {jobs[best][0]}, FD {fds[best]:.3f}: {args.plans or args.run}/plan_{sweep}.json")


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


def draw_augment(B, p):
    """EDM's augmentations of a batch, each with probability p (a horizontal flip: 1/2): matrices (B, 2, 3) from
    output to input positions for affine_grid, and what the network is told, (B, 9) (D12)."""
    def chance(value, p=p):
        keep = torch.rand(B) < p
        return torch.where(keep if value.dim() == 1 else keep[:, None], value, 0.0)

    def matrix(a, b, c, d):
        return torch.stack([a, b, c, d], 1).view(B, 2, 2)

    def turn(angle):
        return matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())

    flip_x, flip_y = chance(torch.randint(2, (B,)).float(), 1), chance(torch.randint(2, (B,)).float())
    scale, angle = chance(torch.randn(B)), chance((2 * torch.rand(B) - 1) * math.pi)
    stretch, axis = chance(torch.randn(B)), chance((2 * torch.rand(B) - 1) * math.pi, 0.5)
    shift, zero = chance(torch.randn(B, 2)), torch.zeros(B)
    size, longer = torch.exp2(-0.2 * scale), torch.exp2(-0.2 * stretch)
    linear = matrix(1 - 2 * flip_x, zero, zero, 1 - 2 * flip_y) @ matrix(size, zero, zero, size) @ turn(angle) \
        @ turn(-axis) @ matrix(longer, zero, zero, 1 / longer) @ turn(axis)
    offset = linear @ (-2 * 0.125 * shift)[:, :, None]         # an eighth of the image; its side is 2 here
    told = torch.stack([flip_x, flip_y, scale, angle.cos() - 1, angle.sin(), stretch * axis.cos(),
                        stretch * axis.sin(), *shift.unbind(1)], 1)
    return torch.cat([linear, offset], 2), told


def training_macs(config, channels):
    """MACs of one training image: one forward pass of every stage."""
    return sum(network_macs(json.dumps(config), channels, r) for r in config["stages"])


# differs: one phase; all resolutions in each step; its length comes from the budget
def train(args, device, rank, world):
    """Sec. 3.4, Algorithm 1: every step trains all stages. Returns the run's checkpoint.

    Every random draw of step k comes from a seed made of --seed and k: a resumed run needs no generator
    state and equals an uninterrupted one. Every process draws the global batch and keeps its share:
    the weights do not depend on the number of processes (up to rounding and dropout)."""
    saved = load_checkpoint(args.checkpoint) if args.checkpoint else {}
    if saved and not args.resume:
        raise ValueError("--train starts anew: leave --checkpoint out, or go on with it by --resume")
    if args.resume:                                                    # its arguments, its folder
        run = Path(args.checkpoint).parent
        if "optimizer" not in saved:
            raise ValueError(f"--resume: {args.checkpoint} has weights only")
        args = argparse.Namespace(**{**vars(args), **saved["args"]})
    else:
        name = [f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"]          # two runs may begin at once
        if world > 1:
            dist.broadcast_object_list(name)                           # the clocks may differ
        run = Path(args.out) / name[0]
    args.data, latent = args.data or "fashion10k", args.space == "latent"
    stages, R = args.stages, args.stages[-1] * (args.factor if latent else 1)
    x, labels, captions = load_images(args.data, R)
    channels, autoencoder = x.shape[1], None
    if x.shape[-1] != R:
        raise ValueError(f"--data {args.data} has images of {x.shape[-1]}x{x.shape[-1]}, the last stage makes {R}x{R}: "
                         "choose --stages or --preset to fit")
    channels = args.latent if latent else channels
    if saved.get("channels", channels) != channels:
        raise ValueError(f"--data {args.data} has {channels} channels, the checkpoint {saved['channels']}")
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} does not divide among {world} processes")
    if not args.resume:
        args.classes = len(captions) if args.cond else 0
        config = {k: getattr(args, k) for k in CONFIG if hasattr(args, k)}
        cost = training_macs(config, channels)
        if args.budget is None:                                        # what EDM's steps cost
            batch = preset_of(args.preset, args.space)["batch"]
            args.budget = float(args.edm_iters * batch * training_macs(edm_of(config), channels))
        if args.iters:
            args.budget = float(args.iters * args.batch * cost)
        args.iters = args.iters or int(args.budget // (args.batch * cost))
        if args.iters < 1:
            raise ValueError(f"--budget {args.budget:g} MACs is less than one step: {args.batch * cost:.3g}")
    config = saved["args"] if args.resume else {
        k: getattr(args, k) for k in (*CONFIG, "iters", "budget") if hasattr(args, k)}
    mine, plan = slice(rank, None, world), make_plan(stages, space=args.space)
    if rank == 0:
        save_json(run / "args.json", config)                           # an unwritable folder fails here
    if latent:                                                         # from here on, x are latents
        autoencoder = get_autoencoder(args, x, saved, run, device, rank, world)
        x = encode_all(autoencoder, x, device)
    torch.manual_seed(args.seed)
    net = build_net(config, channels)
    if rank == 0:
        print(f"{args.arch} {stages}: {sum(p.numel() for p in net.parameters()):,} parameters, {args.iters} steps of "
              f"{args.batch} images, {args.iters * args.batch * training_macs(config, channels):.3g} MACs forward")
    ema = copy.deepcopy(net).to(device).eval().requires_grad_(False)
    net = net.to(device).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, betas=BETAS[args.space])
    step = 0
    if args.resume:
        net.load_state_dict(saved["net"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    model = DistributedDataParallel(net) if world > 1 else net
    model = torch.compile(model) if args.compile else model
    denoiser = model_of(ema, config, device, args.precision)
    shown = argparse.Namespace(channels=channels, config=config, chosen=None)
    loss_sum, count, begun = torch.zeros((), device=device), 0, time.time()
    fall = max(1, args.decay * args.iters)

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
            common = dict(step=step, channels=channels, args=config, images_seen=step * args.batch)
            if latent:
                common.update(autoencoder=autoencoder.state_dict(), autoencoder_shape=[
                    autoencoder.channels, autoencoder.latent, autoencoder.factor])
            if step == args.iters:                                     # what is shipped
                save_checkpoint(run / "weights.pt", **common, ema={k: v.half() for k, v in ema.state_dict().items()})
            save_checkpoint(run / "checkpoint.pt", **common, ema=ema.state_dict(), net=net.state_dict(),
                            optimizer=optimizer.state_dict())
            y = labels_of(shown, range(32), device)
            images = run_stages(stages_of(plan, denoiser, noises(shown, range(32), device), y), config)
            save_grid(run / "samples.png", to_image(images[-1], autoencoder))
            line = dict(step=step, images_seen=step * args.batch, loss=round(mean, 5), images_per_s=round(rate, 1))
            with open(run / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")

    todo = range(step + 1, args.iters + 1)
    for step in progress(todo, f"train {args.arch}", args.batch, note=lambda: f"loss {mean_loss():.4f}"):
        torch.manual_seed(args.seed * 10_000_019 + step)
        i = torch.randint(0, len(x), (args.batch,))
        draws = [[None if v is None else v[mine].to(device) for v in draw]
                 for draw in draw_noise(args.batch, channels, stages, logit_normal if latent else log_normal)]
        x0, aug = x[i[mine]].to(device), None
        x0 = x0 if latent else to_float(x0)
        y = labels[i[mine]].to(device) if args.classes else None
        if latent and args.classes:                                    # class number `classes`: no label
            y = torch.where((torch.rand(args.batch) < LABEL_DROP)[mine].to(device), args.classes, y)
        if not latent and args.augment:
            theta, aug = (v[mine].to(device) for v in draw_augment(args.batch, args.augment))
            x0 = F.grid_sample(x0, F.affine_grid(theta, x0.shape, align_corners=False), padding_mode="reflection",
                               align_corners=False)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / args.warmup, (args.iters + 1 - step) / fall)
        with autocast(device, args.precision):
            if latent:
                loss = flow_cascade_loss(model, x0, draws, y, args.up)
            else:
                loss = cascade_loss(model, x0, draws, y, aug, args.up, args.cond_scale)   # METHOD: Algorithm 1
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        half_life = min(args.ema, EMA_RAMP * step * args.batch)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()),
                                 1 - 0.5 ** (args.batch / max(half_life, 1e-8)))
        if count and (step - 1) % args.save_every == 0:                # a new window
            loss_sum, count, begun = torch.zeros((), device=device), 0, time.time()
        loss_sum = loss_sum + loss.detach() / (1 if latent else x0[0].numel())    # shown per full-size pixel
        count += 1
        if step % 50 == 0:
            mean_loss()                                                # stops at a NaN
        if step % args.save_every == 0 or step == args.iters:
            save()
    return run / "checkpoint.pt"


# ---------------------------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------------------------
# differs: counts at each resolution
def plan_macs(config, channels, plan):
    """MACs per image of a plan and its network evaluations at each stage: the sampler itself is run on the meta
    device with a network that is counted at its first call of each size."""
    total, nfe = [0], {p["res"]: 0 for p in plan["stages"]}

    def denoiser(xt, sigma, z, s, y=None, guidance=1.0):
        total[0] += network_macs(json.dumps(config), channels, xt.shape[-1]) * (1 if guidance == 1 else 2)
        nfe[xt.shape[-1]] += 1
        return torch.zeros_like(xt)

    noise = [torch.zeros(1, channels, r, r, device="meta") for r in nfe]
    run_stages(stages_of(plan, denoiser, noise), config)
    return total[0], list(nfe.values())


# differs: the network's conditions depend on the resolution
@functools.cache
def network_macs(config, channels, res):
    """MACs of one evaluation at res x res of a network, counted on the meta device; config as JSON."""
    config = json.loads(config)
    with torch.device("meta"):
        net, xt = build_net(config, channels).eval(), torch.zeros(1, channels, res, res)
        one, y = torch.zeros(1), torch.zeros(1, dtype=torch.long) if config["classes"] else None
        z = (None, None) if res == config["stages"][0] else (xt, one)
    if config["space"] == "latent":
        return count_macs(velocity, net, xt, one, z[0], y)
    return count_macs(denoise, net, xt, one, *z, y)


def parameters(config, channels):
    """Number of parameters of a configuration's network."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_net(config, channels).parameters())


def edm_of(config):
    """The configuration of EDM (LightningDiT), the baseline, with the same levels and widths."""
    return dict(config, arch="dit" if config["space"] == "latent" else "edm", stages=config["stages"][-1:])


def edm_plan(edm, plan):
    """The baseline's schedule, with the guidance of a plan."""
    return make_plan(edm["stages"], space=edm["space"], guidance=plan.get("guidance", 1.0))


def speed(args, denoiser, plan, device):
    """images/s at batch 64 (Table 5) of a plan and, in turn with it, of EDM with its own schedule (an untrained
    network of the same widths: time does not depend on weights), and effective NFE from the measured seconds
    of one evaluation at each stage. Medians of SPEED_RUNS runs; speedup: of the ratios of neighbouring runs."""
    edm = edm_of(args.config)
    net = build_net(edm, args.channels).to(device).eval().requires_grad_(False)
    net = torch.compile(net) if args.compile else net
    both = ((args.config, plan, denoiser), (edm, edm_plan(edm, plan), model_of(net, edm, device, args.precision)))
    runs = []
    for config, p, model in both:
        here = argparse.Namespace(config=config, channels=args.channels, chosen=None)
        seeds = range(SPEED_BATCH)
        runs.append(stages_of(p, model, noises(here, seeds, device), labels_of(here, seeds, device)))

    def seconds(call):
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    def evaluation(stage, first):                                      # SPEED_RUNS evaluations of a stage
        denoiser, noise, _, _ = stage

        def call():
            for _ in range(SPEED_RUNS):
                denoiser(noise, 1.0, None if first else noise, None if first else 1.0)
        return call

    calls = [lambda stages=stages: to_image(run_stages(stages, args.config)[-1], args.autoencoder) for stages in runs]
    calls += [evaluation(stage, i == 0) for i, stage in enumerate(runs[0])]
    for call in (*calls[2:], evaluation(runs[1][0], True)):
        seconds(call)                                                  # warm-up
    times = [[seconds(call) for call in calls] for _ in range(SPEED_RUNS)]
    ours, base, *each = map(statistics.median, zip(*times))
    ratios = [b / a for a, b, *_ in times]
    each = [t / SPEED_RUNS for t in each]
    nfe = [p["evaluations"] for p in plan["stages"]]
    return dict(images_per_s=SPEED_BATCH / ours, edm_images_per_s=SPEED_BATCH / base,
                speedup=statistics.median(ratios), speedup_range=[min(ratios), max(ratios)],
                seconds_per_evaluation=each, effective_nfe=effective_nfe(nfe, each))


# differs: other plans and conditions
def append_result(args, device, plan, experiment, **measured):
    """One line of results.jsonl: what was measured, under which conditions, by which source."""
    config, edm = args.config, edm_of(args.config)
    macs, nfe = plan_macs(config, args.channels, plan)
    full = plan_macs(edm, args.channels, edm_plan(edm, plan))[0]
    cpu = "" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {cpu}"
    plain = {k: str(v).replace(f"{HERE}/", "") if isinstance(v, (str, Path)) else v
             for k, v in vars(args).items() if k not in ("config", "autoencoder")}
    if args.autoencoder is not None:
        r = config["stages"][-1]
        with torch.device("meta"):
            measured["decoder_macs"] = count_macs(copy.deepcopy(args.autoencoder).to("meta").decode, torch.zeros(
                1, args.channels, r, r))
    line = dict(experiment=experiment, method=config["arch"], space=config["space"], data=args.data,
                solver="euler" if config["space"] == "latent" else "heun", preset=config["preset"],
                stages=config["stages"], cond=config["cond"], up=config["up"],
                cond_scale=config["cond_scale"], told=config["told"], **measured, nfe=nfe, macs_per_image=macs,
                relative_macs=macs / full, parameters=parameters(config, args.channels), device=name,
                torch=torch.__version__, images_seen=args.images_seen, budget=config["budget"],
                train_macs=args.images_seen * training_macs(config, args.channels),
                source_sha256=sha256_of(__file__), plan=plan, args=plain)
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    with open(args.results, "a") as file:
        file.write(json.dumps(line) + "\n")


# differs: other plans; measures speed beside EDM's
def evaluate(args, denoiser, device, rank, world, jobs=None, experiment=None):
    """FD, inception score, MACs, images/s (without jobs: beside EDM's) for every plan and seed, a line of results
    each; image i of seed s comes from seed s * n + i. jobs: [(name, plan), ...], else the plan of the command
    line. Returns the mean FD of each."""
    data, R = args.data or args.config["data"], args.config["stages"][-1] * args.config.get("factor", 1)
    x, _, captions = load_images(data, R)
    channels = args.channels if args.autoencoder is None else args.autoencoder.channels
    extractor, name = load_extractor(data, device, args.inception)
    if args.n <= extractor.width:
        raise ValueError(f"--n {args.n} is too small for FD with {extractor.width} features")
    if x.shape[1:] != (channels, R, R):
        raise ValueError(f"--data {data} has images of {list(x.shape[1:])}, the checkpoint was trained on "
                         f"'{args.config['data']}'")
    reference, means, floor = feature_stats(extract(extractor, x)[0]), [], {}
    if args.autoencoder is not None:                                   # what no latent model can be better than
        some = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:args.n]]
        back = to_image(encode_all(args.autoencoder, some, device).to(device), args.autoencoder)
        floor = dict(decoded_fd=frechet_distance(feature_stats(extract(extractor, back)[0]), reference))
        print(f"{len(some)} images through the autoencoder: FD[{name}]@{len(some)} {floor['decoded_fd']:.3f}")
    here = argparse.Namespace(**{**vars(args), "data": data})
    for label, plan in jobs or [(None, get_plan(args))]:
        extra = dict(variant=label) if label else speed(args, denoiser, plan, device) if rank == 0 else {}
        fds = []
        for seed in range(args.seed, args.seed + args.seeds):
            seeds, begun = range(seed * args.n, (seed + 1) * args.n), time.time()
            images = sample(args, denoiser, plan, seeds[rank::world], device)[-1]
            seconds = time.time() - begun
            mine, second = (gather(part, world) for part in extract(extractor, images))
            if rank > 0:
                continue
            logits = second if name == "inception" else class_logits(extractor, second, captions)
            fd, (score, _) = frechet_distance(feature_stats(mine), reference), inception_score(logits)
            fds.append(fd)
            append_result(here, device, plan, experiment or args.experiment or "evaluate", seed=seed, n=args.n,
                          extractor=name, fd=fd, inception_score=score, seconds_per_image=seconds / args.n,
                          processes=world, **floor, **extra)
            print(f"{args.config['arch']} {label or ''} {'+'.join(str(p['evaluations']) for p in plan['stages'])} "
                  f"evaluations, seed {seed}: FD[{name}]@{args.n} {fd:.3f}, score {score:.2f}, {seconds:.0f} s"
                  + (f"; {extra['images_per_s']:.1f} images/s, {edm_of(args.config)['arch']} "
                     f"{extra['edm_images_per_s']:.1f}; effective NFE "
                     f"{extra['effective_nfe']}" if not label else ""))
        means.append(statistics.mean(fds) if fds else math.nan)
    return means


# ---------------------------------------------------------------------------------------------
# Latent version (Sec. 4.1, Table 4): autoencoder, LightningDiT, rectified flow
# ---------------------------------------------------------------------------------------------
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


def get_autoencoder(args, x, saved, run, device, rank, world):
    """That of the checkpoint to go on with, or of --autoencoder, else a new one, trained on the images x; written to
    `run` with a picture: a row of images, a row of what comes back."""
    shape = [x.shape[1], args.latent, args.factor]
    path = args.checkpoint if saved else args.autoencoder
    if path:
        autoencoder = load_autoencoder(saved or load_checkpoint(path), path).to(device)
        found = [autoencoder.channels, autoencoder.latent, autoencoder.factor]
        if found != shape:
            raise ValueError(f"{path}: its autoencoder has channels, latent channels, factor {found}, wanted {shape}")
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
        some = x[:16]
        back = to_image(autoencoder.encode(to_float(some.to(device))), autoencoder)
        save_grid(run / "autoencoder.png", torch.cat([some, back]), len(some))
        save_checkpoint(run / "autoencoder.pt", autoencoder=autoencoder.state_dict(), autoencoder_shape=shape)
    return autoencoder


def axis_angles(side, n):
    """(side * side, 2n): row and column of each token times n frequencies, 1 down to nearly 1 / 10000."""
    frequency = 1e4 ** (-torch.arange(n) / n)
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    return (at[:, :, None] * frequency).flatten(1)


def rotate(x, angle):
    """Rotary position embedding: x (B, heads, N, d), each pair of channels turned by angle (N, d / 2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class DiTBlock(nn.Module):
    """LightningDiT's block: attention with rotary positions, SwiGLU; RMS norms, scaled, shifted and gated by c."""

    def __init__(self, ch, heads):
        super().__init__()
        self.heads, hidden = heads, int(8 * ch / 3)
        self.norm1, self.norm2 = nn.RMSNorm(ch, eps=1e-6), nn.RMSNorm(ch, eps=1e-6)
        self.qkv, self.out = nn.Linear(ch, 3 * ch), nn.Linear(ch, ch)
        self.w12, self.w3 = nn.Linear(ch, 2 * hidden), nn.Linear(hidden, ch)
        self.modulation = nn.Linear(ch, 6 * ch)

    def forward(self, x, c, angle):
        """x (B, N, ch), c (B, ch), angle (N, ch / heads / 2)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        h = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = h.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)           # (B, heads, N, d) each
        h = F.scaled_dot_product_attention(rotate(q, angle), rotate(k, angle), v)
        x = x + gate1 * self.out(h.transpose(1, 2).flatten(2))
        gate, h = self.w12(self.norm2(x) * (1 + scale2) + shift2).chunk(2, dim=-1)
        return x + gate2 * self.w3(F.silu(gate) * h)


class DiTExit(nn.Module):
    """DiT's final layer: norm, scaled and shifted by c, linear."""

    def __init__(self, ch, channels):
        super().__init__()
        self.norm, self.modulation = nn.RMSNorm(ch, eps=1e-6), nn.Linear(ch, 2 * ch)
        self.linear = nn.Linear(ch, channels)

    def forward(self, x, c):
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """LightningDiT with several entries: v_hat (B, C, r, r) for each r in `stages`; a token is a latent pixel.

    xt (B, C_in, r, r), C_in = C at the resolution `lowest` and 2C above it; t (B,) in 0 .. 1; y (B,), class number
    `classes` (or None) is no label.
    METHOD: own entry, positions and exit for each resolution, shared blocks (D17)."""

    def __init__(self, channels, stages, lowest, ch, blocks, classes=0):
        super().__init__()
        self.stages, self.classes, heads = tuple(stages), classes, max(1, ch // 64)
        self.map1, self.map2 = nn.Linear(256, ch), nn.Linear(ch, ch)
        self.map_label = nn.Embedding(classes + 1, ch) if classes else None
        self.map_res = nn.Linear(len(stages), ch) if len(stages) > 1 else None
        self.entry, self.exit, self.position = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterDict()
        for r in stages:
            self.entry[str(r)] = nn.Linear(channels * (1 if r == lowest else 2), ch)
            self.exit[str(r)] = DiTExit(ch, channels)
            angle = axis_angles(r, ch // 4)
            self.position[str(r)] = nn.Parameter(torch.cat([angle.sin(), angle.cos()], dim=1), requires_grad=False)
            self.register_buffer(f"angle{r}", axis_angles(r, ch // heads // 4), persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(ch, heads) for _ in range(blocks))

        for module in self.modules():                          # DiT: blocks start as the identity, v_hat as 0
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for part in (self.map1, self.map2, *([self.map_label] if classes else [])):
            nn.init.normal_(part.weight, std=0.02)
        for part in (*(block.modulation for block in self.blocks), *(out.modulation for out in self.exit.values()),
                     *(out.linear for out in self.exit.values())):
            nn.init.zeros_(part.weight)

    def forward(self, xt, t, y=None):
        r, one_hot = xt.shape[-1], resolution_one_hot(self.stages, xt)
        c = self.map2(F.silu(self.map1(timestep_embedding(t, 256))))
        if self.map_label is not None:
            c = c + self.map_label(torch.full_like(t, self.classes, dtype=torch.long) if y is None else y)
        if self.map_res is not None:                           # METHOD: resolution embedding (D2)
            c = c + self.map_res(one_hot)
        c = F.silu(c)
        h = self.entry[str(r)](xt.flatten(2).transpose(1, 2)) + self.position[str(r)]
        for block in self.blocks:
            h = block(h, c, self.get_buffer(f"angle{r}"))
        return self.exit[str(r)](h, c).transpose(1, 2).unflatten(2, (r, r))


def velocity(net, xt, t, z=None, y=None):
    """v_hat, the network's estimate of x0 - eps (B, C, r, r), for xt = t x0 + (1 - t) eps, t (B,).
    METHOD: z, the up-sampled image of the stage before with noise, enters beside xt, as it is (D18)."""
    return net(xt if z is None else torch.cat([xt, z], dim=1), t.to(xt.dtype), y)


def logit_normal(B):
    """LightningDiT's times t of B training images: sigmoid of a normal number."""
    return torch.randn(B).sigmoid()


def flow_cascade_loss(net, x0, draws, y=None, up="nearest"):
    """METHOD: cascade_loss for LightningDiT: of each stage the squared error of v, a mean over its elements, plus
    1 - cosine between v_hat and v, a mean over its positions; the stages' are added together (D18)."""
    pyramid, total, of_image = pyramid_of(x0, len(draws)), 0, (-1, 1, 1, 1)
    for i, (t, eps, t_z, eps_z) in enumerate(draws):
        a, b = t.view(of_image), None if t_z is None else t_z.view(of_image)
        z = upsample(b * pyramid[i - 1] + (1 - b) * eps_z, up) if i else None
        v_hat, v = velocity(net, a * pyramid[i] + (1 - a) * eps, t, z, y).float(), pyramid[i] - eps
        total = total + F.mse_loss(v_hat, v) + (1 - F.cosine_similarity(v_hat, v, dim=1)).mean()
    return total


def flow_times(steps, shift):
    """LightningDiT's times: `steps` + 1 floats from 0 (noise) to 1 (data), closer together near 0 if shift < 1."""
    return [shift * i / (steps + (shift - 1) * i) for i in range(steps + 1)]


def euler_sample(model, noise, ts, evaluations=None):
    """Euler's method from ts[0] = 0 to ts[-1] = 1, an evaluation each; model(xt, t float) -> v_hat. noise (B, C, r, r).
    METHOD: truncation after `evaluations` K of them. Raises ValueError if K is not in 1 .. len(ts) - 1."""
    K = len(ts) - 1 if evaluations is None else evaluations
    if not 1 <= K <= len(ts) - 1:
        raise ValueError(f"{K} evaluations: a schedule of {len(ts) - 1} steps has 1 .. {len(ts) - 1}")
    xt = noise.double()
    for t, t_next in zip(ts[:K], ts[1:]):
        xt = xt + (t_next - t) * model(xt, t)
    return xt


# ---------------------------------------------------------------------------------------------
# Ledger
# ---------------------------------------------------------------------------------------------
# differs: the cells of another paper
def ledger(path):
    """The paper's efficiency cells, computed now on the meta device, beside the printed values."""
    rows = []

    def row(table, cell, paper, ours, note=""):
        rows.append(dict(table=table, cell=cell, paper=paper, ours=ours, note=note))
        printed, value = ("-" if v is None else f"{v:,.4f}".rstrip("0").rstrip(".") if isinstance(v, float)
                          else f"{v:,}" if isinstance(v, int) else v for v in (paper, ours))
        print(f"{table:13} {cell:50} {printed:>15} {value:>17}  {note}")

    def case(preset, arch, stages, classes=0):
        return dict(preset_of(preset, "pixel"), space="pixel", arch=arch, stages=stages, classes=classes, told=False,
                    up="nearest")

    # Sizes. The paper prints one for the networks with and without labels.
    for table, data, preset, arch, stages, printed, note in (
            ("2, 6", "CIFAR10", "paper", "edm", [32], 55.74e6, ""),
            ("2, 6", "CIFAR10", "paper", "lowdiff", [8, 16, 32], 55.77e6, ""),
            ("6, 8", "CIFAR10", "paper", "lowdiff", [16, 32], 55.76e6, "no rule gives both 55.76 and 55.77 (D1)"),
            ("8", "CIFAR10", "paper", "cdm", [16, 32], 93.89e6, ""),
            ("3", "FFHQ", "paper-ffhq", "edm", [64], 61.80e6, "61.81 if rounded"),
            ("3, 7", "FFHQ", "paper-ffhq", "lowdiff", [8, 16, 32, 64], 61.86e6, ""),
            ("7, 9", "FFHQ", "paper-ffhq", "lowdiff", [32, 64], 61.82e6, ""),
            ("9", "FFHQ", "paper-ffhq", "cdm", [32, 64], 117.57e6, "no sensible shapes give it (D11)")):
        for classes in (0, 10) if data == "CIFAR10" else (0,):
            kind = f"{data} {arch} {'-'.join(map(str, stages))}" + (", labels" if classes else "")
            row(table, f"{kind}: parameters", printed, parameters(case(preset, arch, stages, classes), 3), note)

    # Evaluations and cost per image: the sampler executed. The printed gains follow from latencies, ours from MACs.
    why = {60.5: "by MACs; the printed 2.22 s / 1.37 s give 62.0", 52.8: "by MACs; 64x64 layers are bound by memory"}
    for preset, full_nfe, runs in (
            ("paper", 35, (([8, 16, 32], None, [18, 13, 17], 60.5), ([16, 32], None, [19, 17], None))),
            ("paper-ffhq", 79, (([8, 16, 32, 64], None, [22, 23, 23, 39], 52.8), ([32, 64], None, [49, 39], None),
                                ([32, 64], (30, 37), [37, 39], None), ([32, 64], (50, 61), [61, 39], None)))):
        data, R = ("CIFAR10", 32) if preset == "paper" else ("FFHQ", 64)
        edm = case(preset, "edm", [R])
        full, nfe = plan_macs(edm, 3, make_plan([R]))
        row("2 - 9", f"{data} edm: NFE at {R}x{R}", full_nfe, nfe[0])
        row("2 - 9", f"{data} edm: GMAC per image", None, full / 1e9)
        row("2 - 9", f"{data} edm: GMAC per evaluation", None, network_macs(json.dumps(edm), 3, R) / 1e9)
        for stages, low, printed, gain in runs:
            config, kind = case(preset, "lowdiff", stages), f"{data} {'-'.join(map(str, stages))}"
            plan = make_plan(stages, [low[0], 20], [low[1]]) if low else make_plan(stages)
            table, kind = ("12", f"{kind}, K = {low[1]} of {2 * low[0] - 1}") if low else ("2 - 9", kind)
            macs, nfe = plan_macs(config, 3, plan)
            for p, a, b in zip(plan["stages"], printed, nfe):
                r = p["res"]
                row(table, f"{kind}: NFE at {r}x{r}", a, b)
                if not low:
                    row(table, f"{kind}: GMAC per evaluation at {r}x{r}", None,
                        network_macs(json.dumps(config), 3, r) / 1e9)
                if p["sigma_stop"]:
                    row(table, f"{kind}: sigma where {r}x{r} stops", None, p["sigma_stop"],
                        "N is not printed (D7)" if len(stages) > 2 else "")
            row(table, f"{kind}: GMAC per image", None, macs / 1e9)
            row("5" if gain else table, f"{kind}: throughput gain, %", gain, 100 * (full / macs - 1),
                why.get(gain, "by MACs; the paper prints latencies"))
            if not low:
                row("App. A", f"{kind}: training MACs, % of EDM's", None,
                    75 * training_macs(config, 3) / training_macs(edm, 3), "with 75 % of the images, 'comparable'")
    for K in (17, 18, 19, 20, 21):
        plan = make_plan([16, 32], [18, 9], [K])
        row("11", f"CIFAR10 16-32, K = {K} of 35: sigma at the stop", None, plan["stages"][0]["sigma_stop"])

    for preset, stages, printed in (("paper", [16, 32], [19, 17]), ("paper-ffhq", [32, 64], [49, 39])):     # CDM
        macs, nfe = plan_macs(case(preset, "cdm", stages), 3, make_plan(stages))
        table, kind = ("8", "CIFAR10") if preset == "paper" else ("9", "FFHQ")
        for r, a, b in zip(stages, printed, nfe):
            row(table, f"{kind} cdm: NFE at {r}x{r}", a, b)
        row(table, f"{kind} cdm: GMAC per image", None, macs / 1e9)

    # Latent space: LightningDiT-B/1, one conditional pass, without the autoencoder
    latent = dict(preset_of("paper-dit", "latent"), space="latent", up="nearest", classes=1000)
    dit, two = dict(latent, arch="dit", stages=[16]), dict(latent, arch="lowdiff", stages=[8, 16])
    for kind, config, printed, nfe in (("LightningDiT", dit, 130.56e6, [100]), ("LowDiff", two, 131.86e6, [45, 50])):
        macs, counted = plan_macs(config, 32, make_plan(config["stages"], space="latent"))
        row("4", f"ImageNet {kind}: parameters", printed, parameters(config, 32), "with the fixed position tables")
        for r, a, b in zip(config["stages"], nfe, counted):
            row("4", f"ImageNet {kind}: NFE at {r}x{r}", a, b)
            row("4", f"ImageNet {kind}: GMAC per evaluation at {r}x{r}", None,
                network_macs(json.dumps(config), 32, r) / 1e9)
        row("4", f"ImageNet {kind}: GMAC per image", None, macs / 1e9)
    half, nfe = plan_macs(dit, 32, make_plan([16], [50], space="latent"))
    row("4", "ImageNet LightningDiT, half the steps: NFE at 16x16", 50, nfe[0])
    row("4", "ImageNet LightningDiT, half the steps: GMAC per image", None, half / 1e9)
    full = plan_macs(dit, 32, make_plan([16], space="latent"))[0]
    row("5", "ImageNet: throughput gain, %", 65.5, 100 * (full / macs - 1), "by MACs; printed: 4.8 / 2.9 images/s")
    each = [network_macs(json.dumps(two), 32, r) for r in (8, 16)]
    row("App. B", "ImageNet: effective NFE", None, effective_nfe([45, 50], each), "by MACs")

    # Effective NFE, from the seconds of an evaluation that the printed latencies imply (Tables 5, 6), and from MACs.
    at_32 = 2.22 / 35
    at_16 = (1.39 - 17 * at_32) / 19
    at_8 = (1.37 - 17 * at_32 - 13 * at_16) / 18
    macs = [network_macs(json.dumps(case("paper", "lowdiff", [8, 16, 32])), 3, r) for r in (8, 16, 32)]
    for cost, note in (([at_8, at_16, at_32], "printed latencies"), (macs, "by MACs")):
        row("1", "CIFAR10 8-16-32: effective NFE", 22, effective_nfe([18, 13, 17], cost), note)
        row("App. B", "CIFAR10 16-32: effective NFE", None, effective_nfe([19, 17], cost[1:]), note)
    macs = [network_macs(json.dumps(case("paper-ffhq", "lowdiff", [8, 16, 32, 64])), 3, r) for r in (8, 16, 32, 64)]
    row("App. B", "FFHQ 8-16-32-64: effective NFE", None, effective_nfe([22, 23, 23, 39], macs), "by MACs")
    save_json(path, rows)


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------
# differs: other options
def get_args(argv=None):
    """The command line; what a preset sets is None here and filled in from it."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    do = p.add_argument_group("what to do, any subset, in this order")
    for name, text in (("train", "all stages in each step"),
                       ("search", "FD of the plans of --sweep: writes the best, for --plan"),
                       ("sample", "a PNG of images"), ("evaluate", "FD, MACs, seconds: a line of results each"),
                       ("ledger", "the paper's efficiency cells beside ours")):
        do.add_argument(f"--{name}", action="store_true", help=text)
    run = p.add_argument_group("run")
    run.add_argument("--data", help="fashion10k (default: the checkpoint's), fashion, cifar10, emoji, or a folder")
    run.add_argument("--preset", default="small", choices=dict.fromkeys(PRESET_NAMES + LATENT_NAMES))
    run.add_argument("--iters", type=int, help="training steps (default: what --budget pays for)")
    run.add_argument("--batch", type=int, help="images per training step, all processes together")
    run.add_argument("--lr", type=float)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--n", type=int, default=None, help="images (sample: 64, evaluate, search: 2000)")
    run.add_argument("--steps", type=int, nargs="+", help="Heun steps N of each stage, low to high")
    run.add_argument("--out", default=f"runs/{SCRIPT}", help="folder of runs and samples")
    run.add_argument("--checkpoint", nargs="+", help="default: the newest run under --out, else the shipped weights; "
                     "several: one row, or line of results, each")
    run.add_argument("--resume", action="store_true", help="with --train: go on with the newest run")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    run.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    run.add_argument("--compile", action="store_true", help="torch.compile")
    run.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    run.add_argument("--seeds", type=int, default=1, help="evaluate, search: this many, from --seed on")
    run.add_argument("--results", default=str(HERE / "results" / SCRIPT / "results.jsonl"))
    run.add_argument("--experiment", help="name of the table or figure in the results")
    run.add_argument("--inception", help="FD with Inception-v3: path of its weights, or 'download'")
    m = p.add_argument_group("the method")
    m.add_argument("--arch", default="lowdiff", choices=ARCHS, help="edm, in latents dit: the off switch, the last "
                   "stage only; cdm: a network for each stage")
    m.add_argument("--space", default=None, choices=("pixel", "latent"), help="train: latent: LightningDiT (Table 4)")
    m.add_argument("--autoencoder", help="train: a latent checkpoint whose autoencoder to use (default: train one)")
    m.add_argument("--guidance", type=float, default=1.0, help="classifier-free, of latent models (1: none)")
    m.add_argument("--stages", type=int, nargs="+", help="resolutions, each twice the one before")
    m.add_argument("--budget", type=float, help="training MACs, forward (default: of EDM's steps of the preset)")
    m.add_argument("--cond", action=argparse.BooleanOptionalAction, default=False, help="train with class labels")
    m.add_argument("--classes", dest="chosen", type=int, nargs="+", help="to sample, in turn (default: all)")
    m.add_argument("--truncate", type=int, nargs="+", help="evaluations K of each stage but the last")
    m.add_argument("--sigma-min", type=float, nargs="+", help="last noise level of each stage")
    m.add_argument("--sigma-max", type=float, nargs="+", help="first noise level of each stage")
    m.add_argument("--plan", help="a plan.json instead of --steps, --truncate, --sigma-min, --sigma-max, "
                   "--guidance")
    m.add_argument("--plans", help="search: folder of the plans (default: the checkpoint's)")
    m.add_argument("--sweep", nargs="+", default=["truncation"], choices=SWEEPS, help="search: Tables 11, 12, 10")
    m.add_argument("--show-stages", action="store_true", help="sample: a row for each stage")
    m.add_argument("--up", default="nearest", choices=("nearest", "bilinear"), help="train: of the condition (D5)")
    m.add_argument("--cond-scale", default="own", choices=("own", "input"), help="train: of the condition (D4)")
    m.add_argument("--told", action="store_true", help="train: tell the network the condition's level (D3)")
    args = p.parse_args(argv)
    single = args.arch in ("edm", "dit")
    if single and len(args.stages or [0]) > 1:
        raise ValueError(f"--arch {args.arch} has one stage: the last resolution")
    args.space = args.space or ("latent" if args.arch == "dit" or args.preset == "paper-dit" else "pixel")
    if args.arch == ("edm" if args.space == "latent" else "dit"):
        raise ValueError(f"--arch {args.arch} does not work in {args.space} space")
    if args.space == "latent" and (args.told or args.cond_scale != "own"):
        raise ValueError("--told and --cond-scale are for pixel models")
    if args.autoencoder and not (args.train and args.space == "latent"):
        raise ValueError("--autoencoder goes with --train --space latent")
    for key, value in preset_of(args.preset, args.space).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value[-1:] if key == "stages" and single else value)
    check_stages(args.stages)
    for key in ("n", "iters", "batch", "seeds", "save_every"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} must be at least 1")
    if args.iters and args.budget:
        raise ValueError("--iters and --budget both set the length of the training: give one")
    if args.plan and (args.steps or args.truncate or args.sigma_min or args.sigma_max or args.guidance != 1):
        raise ValueError("--plan has --steps, --truncate, --sigma-min, --sigma-max and --guidance in it: give one")
    if args.resume and not args.train:
        raise ValueError("--resume goes with --train")
    if not 0 < args.lr < math.inf:
        raise ValueError(f"--lr {args.lr:g} must be a positive number")
    if args.budget is not None and not 0 < args.budget < math.inf:
        raise ValueError(f"--budget {args.budget:g} must be a positive number of MACs")
    if not any((args.train, args.search, args.sample, args.evaluate, args.ledger)):
        p.error("nothing to do: give --train, --search, --sample, --evaluate or --ledger")
    return args


# differs: several checkpoints, side by side
def find_checkpoint(args):
    """--checkpoint, else the newest run under --out, else the shipped weights, as a list; printed."""
    if args.checkpoint is None:
        runs = sorted(Path(args.out).glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        if args.resume and not runs:
            raise ValueError(f"--resume: no run under {args.out}")
        args.checkpoint = [str(runs[-1] if runs else HERE / "weights" / SCRIPT / "weights.pt")]
    print(f"checkpoint: {' '.join(args.checkpoint)}")
    return args.checkpoint


# differs: goes through the checkpoints
def main():
    args = get_args()
    device, rank, world = start_device(args.device)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")                             # one process speaks
    if args.train:
        if args.resume or args.checkpoint:
            args.checkpoint, *others = find_checkpoint(args)
            if args.resume and others:
                raise ValueError("--resume goes on with one checkpoint, not with several")
        args.checkpoint = [str(train(args, device, rank, world))]
        if world > 1:
            dist.barrier()                                             # until it is written
    paths, rows, seconds = find_checkpoint(args) if args.search or args.sample or args.evaluate else (), [], 0.0

    def opened(path):
        here = argparse.Namespace(**{**vars(args), "checkpoint": path, "n": args.n or 2000})
        return here, load_models(here, device, args.precision)

    for path in paths if args.search or args.sample else ():
        here, denoiser = opened(path)
        if args.search:
            search(here, denoiser, device, rank, world)
        if args.sample:
            n, begun = args.n or 64, time.time()
            images = sample(here, denoiser, get_plan(here), range(args.seed, args.seed + n)[rank::world], device)
            seconds += time.time() - begun
            for x in images:
                x = gather(x, world)
                rows.append(x.repeat_interleave(images[-1].shape[-1] // x.shape[-1], 2).repeat_interleave(
                    images[-1].shape[-1] // x.shape[-1], 3))
    if args.sample and rank == 0:
        if len({x.shape[1:] for x in rows}) > 1:
            raise ValueError("--sample: the checkpoints make images of different sizes")
        path = Path(args.out) / "samples.png"
        save_grid(path, torch.cat(rows), 8 if len(rows) == 1 else len(rows[0]))
        print(f"{len(rows)} x {len(rows[0])} images, {seconds:.1f} s: {path}")
    for path in paths if args.evaluate else ():
        evaluate(*opened(path), device, rank, world)
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
