"""PostDiff: Fewer Denoising Steps or Cheaper Per-Step Inference? (arXiv 2508.06160, ICCV 2025), in one
file. The paper's repository holds no code.

A pretrained text-to-image model can be made cheaper without training: take fewer steps, or make each step
cheaper. PostDiff does the second, in two ways. Mixed resolution: the first s of the steps run on a smaller
image, whose predicted x0 is then up-sampled and re-noised. Hybrid caching: the deep half of the U-Net is run
every k-th step only (DeepCache); after the share m of the steps, guidance is dropped and every cross-attention
gives what it gave last. The weights stay as they are.

Run (README.md has more):
    python postdiff.py --sample --prompt "cat face"          # PostDiff: 20 steps, a third of their MACs
    python postdiff.py --sample --method base mixed postdiff --n 16     # one row each; base: the off switch
    python postdiff.py --search --budget 0.4                 # calibration: steps and s, by caption score
    python postdiff.py --pipeline PATH_OR_ID --prompt "a fox"           # a diffusers pipeline, PostDiff applied
    python postdiff.py --ledger                              # Tables 1 and 2, FLOPs, at the real sizes
    python postdiff.py --train                               # the text-to-image model itself, from scratch
    python postdiff.py --train --distill --checkpoint CHECKPOINT    # an LCM of it

Expect (small preset, emoji at 32x32, attention's products included): 1.67 million parameters, 60 MMACs a pass; of
    the MACs of 20 guided steps, mixed resolution takes 62.7 %, DeepCache 61.6 %, all of PostDiff 33.5 %, and 8
    plain steps 40 %. What that does to FD and caption score: results/postdiff. Training: 80 images/s on one busy CPU
    core; the shipped weights saw 460,800 images (--iters 3600). 1,000 images of 20 plain steps take two minutes.

Symbols: T (denoising steps) -> K, their sequence -> taus; x^l, x^f -> low and full resolution; beta, s, k, m, w as in
the paper (s, m: shares of the steps; n_low, n_guided: their numbers); CA_cache -> frozen; null text -> null.

Differences from the paper, and what it leaves open:
D1  "Step t = sT" counts from the start: the first n_low = round(s K) steps are low (the FLOPs cells say so), half up;
    so is the number of guided steps, the first round(m K); of 0 of them (m = 0) nothing is frozen. The paper names
    no spacing of its steps; ours is trailing (inclusive is C2F-TRD's).
D2  Eq. 5 lands on the next step, K evaluations in all: re-noising at the same step would need one more, and the
    FLOPs cells leave no room for it.
D3  A multistep solver's history starts anew at the switch (it has the wrong size).
D4  "Reuse for the subsequent k steps", k = 2, is interval 2: full, shallow, full ... (the cells).
D5  --depth 1 is DeepCache's default cut: conv_in, the first residual and attention block, and the two up blocks
    that mirror them are recomputed. One tensor is cached: what enters the first of those up blocks.
D6  A change of size or batch (switch, end of guidance) forces a full pass and restarts the interval.
D7  What is cached of a cross-attention is its output after the output projection, as last computed (on a
    shallow step deep layers are not). It is reused in all steps from n_guided on; if it was made at low
    resolution, it is resized once, bilinear.
D8  An LCM is told w and has no pair [null, text] to choose from: its single output is frozen.
D9  Nothing is clipped while sampling or in the loss; images are at the end.
D10 Calibration: the highest mean caption score of --calibration images within --budget of the MACs of 20 guided
    steps; the cheaper one of equal scores.
D11 Appendix A: guided full-resolution sampling; the L2 distance is per element (root mean square), since
    layers of one kind differ in size.
D12 Appendix F: a fine-tuning step (a whole batch, reduced by area averages) is low with probability s, its t uniform
    in [T (1 - s), T), else full, its t below. Rate and steps are the preset's (finetune_lr), not --lr.
D13 Preset small is no latent model: pixels, 32x32 by area averages, 2x2 a token, trained on 3,821 emoji with
    their captions. Its FD is no FID and compares with itself only.
D14 The text encoder is an embedding of words and positions; the null text is all padding. Captions are dropped with
    probability 0.1 in training. Unknown words are named and left out.
D15 LCM in small (--train --distill): LCM's distillation with our network's x0_hat as the consistency function (no
    c_skip, c_out), its errors times sqrt(alpha_bar) if it predicts eps; w uniform in 1 .. 2w - 1, captions not
    dropped; with fewer than lcm_skip training steps left, the goal is the teacher's x0_hat. Its sampler: x0_hat,
    re-noised. It is told 1000 w as a sine embedding. A DiT in small (--arch dit): PixArt's blocks without their
    biases in attention and its caption layers, 4x4 pixels a token, 96 wide; positions span 0 .. 16 at any size.
D16 24 channels cannot hand the 12 colours of a noisy token on, as eps_hat (and v) need them: trained so, preset small
    still left noise on its samples after 100,000 images. A clean token is simpler: it predicts x0, and its loss is that
    of v but for the last noise (weight 1 / max(1 - alpha_bar, 0.01)). The network turns x0_hat into eps_hat
    itself, so nothing else knows. Preset paper: eps, as Stable Diffusion.
Not here: SDXL's kind in small (it is in --ledger and --pipeline; its and PixArt's size conditions stay those of the
full size); Fig. 3, App. E; the methods that the paper compares with.
"""
import argparse
import copy
import functools
import inspect
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

from common import (HERE, add_noise, caption_score, extract, feature_stats, frechet_distance, gather,
                    has_fast_bf16, linear_alpha_bar, load_extractor, load_images, macs_by_operator, noise_for,
                    progress, save_grid, save_json, sha256_of, start_device, to_float, to_uint8, write_atomically)

SCRIPT = "postdiff"

# ---------------------------------------------------------------------------------------------
# Hyper-parameters
# ---------------------------------------------------------------------------------------------
T = 1000                       # training steps; linear beta 1e-4 .. 0.02 (DDPM)
REFERENCE_STEPS = 20           # what relative MACs compare with (Table 2)
BETA, S, K_CACHE, M = 0.5, 0.5, 2, 0.75                        # Sec. 3.1, SD v1.5
DEFAULTS = {"unet": dict(solver="ddim", steps=20, beta=BETA, s=S, k=K_CACHE, m=M),     # Table 2's settings for SD,
            "lcm": dict(solver="lcm", steps=8, beta=BETA, s=S, k=1, m=0.5),            # for LCM
            "dit": dict(solver="dpm2", steps=20, beta=0.75, s=S, k=1, m=M),            # PixArt and SDXL (the
            "sdxl": dict(solver="ddim", steps=20, beta=0.75, s=0.2, k=K_CACHE, m=M)}   # solvers are ours)
METHODS = ("base", "mixed", "cache", "postdiff")               # base: the off switch
CHOICES = ("cond", "ave", "uncond", "cfg", "none")             # Sec. 2.5; none: no cross-attention cache
SOLVERS = {"ddim": 1, "dpm2": 2, "lcm": 0}                     # order; dpm2: DPM-Solver++ 2M; lcm: of LCM nets
ARCHS = ("unet", "dit")                                        # dit: PixArt's kind, which DeepCache cannot cut
SPACINGS = ("inclusive", "exclusive", "leading", "trailing")   # of uniform steps, see uniform_steps
W_EMBEDDING = 256                                              # width of an LCM's guidance embedding
CALIBRATION_SEED = 10 ** 9                                     # far from samples' seeds
ARCHITECTURE = ("res", "ch", "mult", "blocks", "attention", "heads", "c_text", "tokens", "patch", "dropout", "predict",
                "arch")

# A preset is a network and how it is trained. paper: the U-Net of Stable Diffusion v1.5 at 768x768.
#                        tiny       small         paper
PRESETS = {
    "res":              (16,        32,           96),           # R; paper: of the latent image
    "ch":               (8,         24,           320),          # base width
    "mult":             ([1, 2],    [1, 2, 3],    [1, 2, 4, 4]),  # width per level
    "blocks":           (1,         1,            2),            # residual blocks per level
    "attention":        ([0, 1],    [1, 2],       [0, 1, 2]),    # levels with self- and cross-attention
    "heads":            (2,         4,            8),
    "c_text":           (8,         64,           768),          # width of the text features
    "tokens":           (6,         12,           77),           # words of a caption at most
    "patch":            (2,         2,            1),            # pixels per side of a token
    "dropout":          (0.0,       0.0,          0.0),
    "predict":          ("x0",      "x0",         "eps"),        # what the network gives before it is eps_hat (D16)
    "drop":             (0.1,       0.1,          0.1),          # share of captions dropped for guidance
    "w":                (2.0,       3.0,          7.5),          # guidance weight
    "batch":            (16,        128,          2048),         # global, all processes
    "lr":               (2e-3,      1e-3,         1e-4),         # Adam
    "warmup":           (10,        200,          10_000),       # steps, linear
    "decay":            (0.3,       0.3,          0.0),          # last share: lr falls
    "ema":              (0.9,       0.999,        0.9999),       # decay
    "iters":            (20,        5000,         1_000_000),    # steps
    "finetune_iters":   (10,        1000,         15_000),       # of Appendix F
    "finetune_lr":      (1e-3,      2e-4,         1e-5),
    "lcm_iters":        (10,        2000,         20_000),       # of the distillation to an LCM
    "lcm_lr":           (1e-3,      2e-4,         8e-6),
    "lcm_skip":         (20,        20,           20),           # training steps that the teacher's step spans
}
PRESET_NAMES = ("tiny", "small", "paper")


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


# differs: several heads, queries and keys of different tokens
class Attention(nn.Module):
    """Tokens x (B, N, c) look at tokens y (B, M, c_y); several heads."""

    def __init__(self, c, c_y, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(c, c, False), nn.Linear(c_y, c, False), nn.Linear(c_y, c, False)
        self.out = nn.Linear(c, c)

    def forward(self, x, y):
        q, k, v = (h.unflatten(-1, (self.heads, -1)).transpose(1, 2) for h in (self.q(x), self.k(y), self.v(y)))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def cross_output(attention, y, text, size, cross):
    """What a cross-attention of the tokens y (B, H W, c) gives, as an image (B, c, H, W), size = (H, W).
    METHOD: or what it gave before, `cross` (B, c, h, w), resized if that was at low resolution (D7)."""
    if cross is None:
        return attention(y, text).transpose(1, 2).unflatten(2, size)
    return cross if cross.shape[-2:] == size else F.interpolate(cross, size=size, mode="bilinear", align_corners=False)


class Transformer(nn.Module):
    """Stable Diffusion's: on the pixels as tokens, self-attention, cross-attention to the text, GEGLU.

    x (B, c, H, W), text (B, L, c_text). cross: what the cross-attention gave before (B, c, h, w), to be
    used instead of it. Returns the result and what the cross-attention gave, both (B, c, H, W)."""

    def __init__(self, c, c_text, heads, groups):
        super().__init__()
        self.norm, self.proj_in = nn.GroupNorm(groups, c, eps=1e-6), nn.Conv2d(c, c, 1)
        self.norm1, self.self_attention = nn.LayerNorm(c), Attention(c, c, heads)
        self.norm2, self.cross_attention = nn.LayerNorm(c), Attention(c, c_text, heads)
        self.norm3, self.ff_in, self.ff_out = nn.LayerNorm(c), nn.Linear(c, 8 * c), nn.Linear(4 * c, c)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x, text, cross=None):
        size = x.shape[-2:]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2).contiguous()         # (B, H W, c)
        y = self.norm1(h)
        h = h + self.self_attention(y, y)
        cross = cross_output(self.cross_attention, self.norm2(h), text, size, cross)
        h = h + cross.flatten(2).transpose(1, 2)
        a, gate = self.ff_in(self.norm3(h)).chunk(2, dim=-1)
        h = h + self.ff_out(a * F.gelu(gate))
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, size)), cross


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


class TextEncoder(nn.Module):
    """Word numbers (B, L), 0 for padding, -> features (B, L, c_text): word plus position."""

    def __init__(self, words, length, c):
        super().__init__()
        self.word, self.position = nn.Embedding(words + 1, c), nn.Parameter(0.1 * torch.randn(length, c))
        self.norm = nn.LayerNorm(c)

    def forward(self, tokens):
        return self.norm(self.word(tokens) + self.position)


def eps_of_x0(x0_hat, xt, t):
    """eps_hat of a network that predicts x0 (D16), at step t (B,)."""
    a = linear_alpha_bar(T).to(xt.device)[t].view(-1, 1, 1, 1)
    return ((xt - a.sqrt() * x0_hat) / (1 - a).sqrt()).to(xt.dtype)


# differs: text by cross-attention, and a forward pass that can start from a cache
class UNet(nn.Module):
    """Stable Diffusion's U-Net: eps_hat (B, C, H, W) from xt (B, C, H, W), t (B,) and text.

    Fully convolutional: H and W are any multiples of patch * 2^(levels - 1). text: word numbers (B, L) for the
    net's own encoder, or, in a net without one (words = 0), features (B, L, c_text).
    The down path is a list of stages, each giving one skip connection; the up path has one stage for each, in
    the opposite order. patch > 1 folds patch x patch pixels into channels first.
    """

    def __init__(self, channels, ch, mult, blocks, attention, heads, c_text, patch=1, dropout=0.0, words=0, tokens=0,
                 guided=False, predict="eps"):
        super().__init__()
        groups, c_emb = min(32, ch // 4), 4 * ch
        self.ch, self.patch, self.multiple, self.predict = ch, patch, patch * 2 ** (len(mult) - 1), predict
        self.guidance = nn.Linear(W_EMBEDDING, ch, bias=False) if guided else None
        self.emb = nn.Sequential(nn.Linear(ch, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.text = TextEncoder(words, tokens, c_text) if words else nn.Identity()
        made = itertools.count()

        def stage(c_in, c, attend, *more):
            layers = [ResBlock(c_in, c, c_emb, groups, dropout)]
            if attend:
                layers.append(Transformer(c, c_text, heads, groups))
                layers[-1].index = next(made)                                  # its name in the cache
            return nn.ModuleList([*layers, *more])

        c, skips = ch, [ch]
        self.down = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels * patch ** 2, ch, 3, padding=1)])])
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.down.append(stage(c, ch * m, level in attention))
                c = ch * m
                skips.append(c)
            if level < len(mult) - 1:
                self.down.append(nn.ModuleList([Down(c)]))
                skips.append(c)
        self.mid = nn.ModuleList([*stage(c, c, True), ResBlock(c, c, c_emb, groups, dropout)])
        self.up = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for block in range(blocks + 1):
                up = [Up(ch * m)] if level > 0 and block == blocks else []
                self.up.append(stage(c + skips.pop(), ch * m, level in attention, *up))
                c = ch * m
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, channels * patch ** 2, 3, padding=1)

    def forward(self, xt, t, text, deep=None, cross=None, depth=1, w=None):
        """Returns eps_hat, deep, cross. w (B,): guidance weight, for an LCM, which is told it.

        METHOD: Sec. 2.5, both caches are values that go in and come out. deep: what entered up stage
        -(depth + 1) when that was last computed: given, only the outermost depth + 1 down and up stages run (D5).
        cross: {index: output} of cross-attentions to be reused; what comes out holds all that took part."""
        if xt.shape[-1] % self.multiple or xt.shape[-2] % self.multiple:
            raise ValueError(f"the network halves its input: {xt.shape[-2]}x{xt.shape[-1]} is not a "
                             f"multiple of {self.multiple}")
        emb = timestep_embedding(t, self.ch)
        if self.guidance is not None:
            emb = emb + self.guidance(timestep_embedding(1000 * w, W_EMBEDDING))
        emb, text, used, cross = F.silu(self.emb(emb)), self.text(text), {}, cross or {}

        def run(stage, h):
            for layer in stage:
                if isinstance(layer, Transformer):
                    h, used[layer.index] = layer(h, text, cross.get(layer.index))
                else:
                    h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            return h

        n = len(self.down)
        if not 0 <= depth < n:
            raise ValueError(f"depth {depth}: this network has the depths 0 .. {n - 1}")
        first = 0 if deep is None else n - 1 - depth                           # of the up stages
        h, skips = F.pixel_unshuffle(xt, self.patch), []
        for stage in self.down[:n - first]:
            h = run(stage, h)
            skips.append(h)
        h = run(self.mid, h) if deep is None else deep
        for i in range(first, n):
            if i == n - 1 - depth:
                deep = h
            h = run(self.up[i], torch.cat([h, skips.pop()], dim=1))
        h = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)
        return h if self.predict == "eps" else eps_of_x0(h, xt, t), deep, used


# differs: PixArt's, with text
class DiTBlock(nn.Module):
    """PixArt's block: self-attention, cross-attention to the text, feed-forward; the first and the last are scaled,
    shifted and gated by the time, through six vectors (B, 6, c) that all blocks share and each offsets by its own."""

    def __init__(self, c, c_text, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(c, elementwise_affine=False) for _ in range(2))
        self.self_attention, self.cross_attention = Attention(c, c, heads), Attention(c, c_text, heads)
        self.ff_in, self.ff_out = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.offset = nn.Parameter(torch.randn(6, c) / c ** 0.5)

    def forward(self, h, text, six, size, cross=None):
        """h (B, N, c) of an image of that many tokens (height, width); cross: see Transformer. Returns both."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.offset + six)[:, :, None].unbind(1)
        y = self.norm1(h) * (1 + scale1) + shift1
        h = h + gate1 * self.self_attention(y, y)
        cross = cross_output(self.cross_attention, h, text, size, cross)
        h = h + cross.flatten(2).transpose(1, 2)
        y = self.norm2(h) * (1 + scale2) + shift2
        return h + gate2 * self.ff_out(F.gelu(self.ff_in(y), approximate="tanh")), cross


# differs: PixArt's, with text
class DiT(nn.Module):
    """PixArt's kind in small: called like UNet, of any height and width that patch divides; there are no deep
    features to cache, the second thing that it returns is None."""

    def __init__(self, channels, ch, blocks, heads, c_text, patch, words=0, tokens=0, guided=False, predict="eps"):
        super().__init__()
        self.ch, self.patch, self.multiple, self.predict = ch, patch, patch, predict
        self.guidance = nn.Linear(W_EMBEDDING, ch, bias=False) if guided else None
        self.emb = nn.Sequential(nn.Linear(ch, ch), nn.SiLU(), nn.Linear(ch, ch))
        self.modulation = nn.Linear(ch, 6 * ch)
        self.text = TextEncoder(words, tokens, c_text) if words else nn.Identity()
        self.conv_in = nn.Conv2d(channels * patch ** 2, ch, 1)
        self.blocks = nn.ModuleList(DiTBlock(ch, c_text, heads) for _ in range(blocks))
        self.norm_out, self.shift_scale = nn.LayerNorm(ch, elementwise_affine=False), nn.Parameter(torch.zeros(2, ch))
        self.conv_out = nn.Conv2d(ch, channels * patch ** 2, 1)

    def forward(self, xt, t, text, deep=None, cross=None, depth=1, w=None):
        if xt.shape[-1] % self.patch or xt.shape[-2] % self.patch:
            raise ValueError(f"{xt.shape[-2]}x{xt.shape[-1]} is not a multiple of the network's patch {self.patch}")
        emb = timestep_embedding(t, self.ch)
        if self.guidance is not None:
            emb = emb + self.guidance(timestep_embedding(1000 * w, W_EMBEDDING))
        emb, text, used, cross = self.emb(emb), self.text(text), {}, cross or {}
        six = self.modulation(F.silu(emb)).unflatten(1, (6, -1))
        h = self.conv_in(F.pixel_unshuffle(xt, self.patch))
        size, quarter = h.shape[-2:], self.ch // 4
        frequency = 1e4 ** (-torch.arange(quarter, device=h.device) / quarter)
        row, column = (torch.arange(n, device=h.device)[:, None] * frequency * 16 / n for n in size)   # of any size:
        row, column = (torch.cat([v.sin(), v.cos()], dim=1) for v in (row, column))    # positions span 0 .. 16
        place = torch.cat([row[:, None].expand(-1, size[1], -1), column.expand(size[0], -1, -1)], dim=2)
        h = h.flatten(2).transpose(1, 2) + place.flatten(0, 1)
        for i, block in enumerate(self.blocks):
            h, used[i] = block(h, text, six, size, cross.get(i))
        shift, scale = (self.shift_scale + emb[:, None])[:, :, None].unbind(1)
        h = (self.norm_out(h) * (1 + scale) + shift).transpose(1, 2).unflatten(2, size)
        h = F.pixel_shuffle(self.conv_out(h), self.patch)
        return h if self.predict == "eps" else eps_of_x0(h, xt, t), None, used


# differs: its arguments are those of this network
def build_net(config, channels, words=0):
    """The U-Net (or DiT) of a preset (config: what they take, arch, phase); words: of the vocabulary, 0 for none.
    A network of phase "lcm" is told the guidance weight."""
    options = {k: config[k] for k in ARCHITECTURE if k not in ("res", "arch")}
    options.update(words=words, guided=config.get("phase") == "lcm")
    if config["arch"] == "dit":                                # a quarter of the tokens, four times the width
        options = {k: v for k, v in options.items() if k not in ("mult", "attention", "dropout")}
        depth = 2 * len(config["mult"]) * config["blocks"]
        options.update(ch=4 * config["ch"], patch=2 * config["patch"], blocks=depth)
        return DiT(channels, **options)
    return UNet(channels, **options).to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------
# Method: hybrid caching (Sec. 2.5) and the resolution switch (Sec. 2.2), one step each
# ---------------------------------------------------------------------------------------------
EMPTY = dict(size=None, age=0, deep=None, cross={}, frozen={})


def cached_eps(net, xt, t, text, null, w, cache, k=1, depth=1):
    """METHOD: Sec. 2.5, Eq. 6: eps_hat of one step, and the cache for the next.

    net(xt, t, text, deep=, cross=, depth=) -> eps_hat, deep, cross, as UNet.forward. text, null: word numbers
    (B, L) or features (B, L, c_text). w: guidance weight; None: no guidance, the text's half alone. cache: EMPTY
    at first, then what the last call returned; it is not changed. size: of the network's input; age: calls since
    (and with) the last full pass; deep: its deep features; cross: the last outputs of all cross-attentions;
    frozen: those to be reused, see freeze_cross."""
    x, s, y = (xt, t, text) if w is None else (torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([null, text]))
    full = cache["age"] in (0, k) or cache["size"] != x.shape                  # D4, D6
    eps_hat, deep, used = net(x, s, y, deep=None if full else cache["deep"], cross=cache["frozen"], depth=depth)
    cache = dict(size=x.shape, age=1 if full else cache["age"] + 1, deep=deep, cross={**cache["cross"], **used},
                 frozen={i: used.get(i, old) for i, old in cache["frozen"].items()})    # resized once (D7)
    if w is not None:
        eps_null, eps_text = eps_hat.chunk(2)
        eps_hat = eps_null + w * (eps_text - eps_null)
    return eps_hat, cache


def choose(out, choice, w):
    """METHOD: CA_cache of Sec. 2.5 from a pair [null, text] of outputs (2 B, ...): one (B, ...)."""
    null, text = out.chunk(2)
    if choice == "cfg":
        return null + w * (text - null)
    return {"cond": text, "uncond": null, "ave": (null + text) / 2}[choice]


def freeze_cross(cache, choice, w):
    """METHOD: Sec. 2.5: from now on every cross-attention gives its last output, see choose."""
    return dict(cache, frozen={i: out if w is None else choose(out, choice, w)                     # D8
                               for i, out in cache["cross"].items()})


def switch_resolution(x0_hat, eps, t, alpha_bar):
    """METHOD: Eq. 4, 5: x0_hat of the low resolution (B, C, r, r) -> xt (B, C, R, R): bilinear up-sampling,
    then fresh noise eps (B, C, R, R) of step t (B,), the next one (D2)."""
    up = F.interpolate(x0_hat, size=eps.shape[-2:], mode="bilinear", align_corners=False)
    return add_noise(up, eps, t, alpha_bar)


# ---------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------
# differs: the network takes text and returns caches
def diffusion_loss(net, x0, t, eps, alpha_bar, text, predict="eps"):
    """DDPM's simple loss: mean squared error of eps_hat; of a network that predicts x0: of v_hat, nearly (D16)."""
    error = (net(add_noise(x0, eps, t, alpha_bar), t, text)[0].float() - eps).square()
    if predict == "x0":
        a = alpha_bar.to(t.device)[t].view(-1, 1, 1, 1)
        error = error * (1 - a) / a / (1 - a).clamp(min=0.01)          # of x0_hat, then the weight
    return error.mean()


def consistency_loss(net, target, teacher, x0, t, t_next, eps, alpha_bar, text, null, w, predict="eps"):
    """Latent consistency distillation (Luo et al. 2023): from xt, the net's x0_hat shall be the target's (its EMA)
    after a DDIM step of the teacher, guided by w (B,), to t_next (-1: clean, the teacher's own x0_hat; D15)."""
    xt, of_image = add_noise(x0, eps, t, alpha_bar), (-1, 1, 1, 1)
    with torch.no_grad():
        eps_null, eps_text = teacher(xt, t, null)[0].float(), teacher(xt, t, text)[0].float()
        x0_teacher = predict_x0(xt, t, eps_null + w.view(of_image) * (eps_text - eps_null), alpha_bar)
        x_next, s = ddim_step(xt, x0_teacher, t, t_next, alpha_bar), t_next.clamp(min=0)
        goal = predict_x0(x_next, s, target(x_next, s, text, w=w)[0].float(), alpha_bar)
        goal = torch.where((t_next < 0).view(of_image), x0_teacher, goal)
    x0_hat = predict_x0(xt, t, net(xt, t, text, w=w)[0].float(), alpha_bar)
    a = alpha_bar.to(x0.device)[t].view(of_image).float() if predict == "eps" else torch.ones((), device=x0.device)
    return (a.sqrt() * ((x0_hat - goal).square() + 1e-6).sqrt()).mean()        # pseudo-Huber, as LCM's


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


def mixed_resolution_sample(net, noise, taus, alpha_bar, text, null, w, n_low=0, low_noise=None, k=1, depth=1,
                            n_guided=None, choice="cond", order=1, trace=None, fresh=None):
    """METHOD: PostDiff: K = len(taus) steps to clean data, the first n_low of them on low_noise's resolution.

    net: see cached_eps; noise (B, C, R, R): the start, or with n_low > 0 what is added at the switch; low_noise
    (B, C, r, r): the start then. taus: strictly descending steps in 0 .. T-1. text, null, w: guidance (w None: a
    network that needs none). k, depth: full pass at every k-th step, else the outermost depth + 1 stages.
    n_guided: guidance in the first n_guided steps (None: all); after these the cross-attentions are frozen by
    `choice` ('none': they are not). order: 1 DDIM, 2 DPM-Solver++ 2M, 0 LCM's (x0_hat, re-noised with fresh[i], a
    noise of the size of step i). trace(i, xt, x0_hat, cache): called after each evaluation. n_low=0, k=1,
    n_guided=None: plain sampling with classifier-free guidance.
    Raises ValueError if a number does not fit."""
    K, n_guided = len(taus), len(taus) if n_guided is None else n_guided
    if any(a <= b for a, b in zip(taus, taus[1:])):
        raise ValueError(f"the steps must fall strictly: {taus}")
    if not (0 <= n_low < K and 0 <= n_guided <= K and k >= 1 and k == int(k) and choice in CHOICES):
        raise ValueError(f"needs 0 <= n_low < {K}, 0 <= n_guided <= {K}, a whole k >= 1, a choice of {CHOICES}; not "
                         f"{n_low}, {n_guided}, {k}, {choice}")
    if n_low and low_noise is None or order == 0 and fresh is None:
        raise ValueError("n_low > 0 needs low_noise, order 0 needs fresh")
    xt, history, cache, begin = low_noise if n_low else noise, [], EMPTY, 0
    for i, tau in enumerate(taus):
        t, t_next = (xt.new_full((len(xt),), s, dtype=torch.long) for s in (tau, [*taus, -1][i + 1]))
        if i == n_guided and choice != "none":
            cache = freeze_cross(cache, choice, w)
        eps_hat, cache = cached_eps(net, xt, t, text, null, w if i < n_guided else None, cache, k, depth)
        x0_hat = predict_x0(xt, t, eps_hat, alpha_bar)
        if trace:
            trace(i, xt, x0_hat, cache)
        if i == n_low - 1:
            xt, history, begin = switch_resolution(x0_hat, noise, t_next, alpha_bar), [], i + 1       # D3
        elif order == 0:
            xt = add_noise(x0_hat, fresh[i], t_next, alpha_bar)
        else:
            history = [(t, x0_hat), *history][:2]
            xt = solver_step(xt, history, t_next, alpha_bar, i - begin, K - begin, order)
    return xt


# ---------------------------------------------------------------------------------------------
# Search: calibration (Sec. 2.4, App. D); profile (App. A)
# ---------------------------------------------------------------------------------------------
def calibrate(plans, cost, score, budget):
    """METHOD: Sec. 2.4, App. D: the plan with the best score on a small set, among those within the budget.

    plans: list of anything; cost(plan) -> float; score(plan) -> float, called only for plans whose cost does not
    exceed `budget`. Of equal scores the cheapest wins (D10). Returns the best plan and [(plan, cost, score), ...].
    Raises ValueError if no plan is within the budget."""
    tried = [(plan, cost(plan)) for plan in plans]
    tried = [(plan, c, score(plan)) for plan, c in tried if c <= budget]
    if not tried:
        raise ValueError(f"no setting is within the budget of {budget}")
    return max(tried, key=lambda row: (row[2], -row[1]))[0], tried


def ranked_alike(a, b):
    """Share of the pairs of settings that two lists of scores put in the same order (Fig. 9's claim)."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    return sum((a[i] - a[j]) * (b[i] - b[j]) > 0 for i, j in pairs) / max(len(pairs), 1)


def profile(unet, run):
    """METHOD: App. A, Fig. 7: runs plain sampling, `run()`, and returns {"blocks": {name: K - 1 relative L1
    distances}, "kinds": {name: K - 1 RMS distances}} of outputs in consecutive steps (D11). Its hooks only measure."""
    stages = {f"{part} {i}": stage for part in ("down", "up") for i, stage in enumerate(getattr(unet, part))}
    blocks = {name: stage[-1] for name, stage in {**stages, "mid": unet.mid}.items()}
    kinds = {"convolution": ("conv1", "conv2"), "self-attention": ("self_attention",),
             "cross-attention": ("cross_attention",), "feed-forward": ("ff_out",)}
    layers = {(kind, name): m for name, m in unet.named_modules() for kind, ends in kinds.items()
              if name.split(".")[-1] in ends}
    last, rows = {}, {name: [] for name in (*blocks, *layers)}

    def watch(name):
        def hook(module, inputs, output):
            now = (output[0] if isinstance(output, tuple) else output).float()
            if name in last:
                gap = now - last[name]
                rows[name].append((float(gap.abs().sum() / last[name].abs().sum()),
                                   float(gap.square().mean().sqrt())))
            last[name] = now
        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in (*blocks.items(), *layers.items())]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return dict(blocks={name: [relative for relative, _ in rows[name]] for name in blocks},
                kinds={kind: [sum(rms for _, rms in step) / len(step)
                              for step in zip(*(rows[key] for key in layers if key[0] == kind))] for kind in kinds})


# ---------------------------------------------------------------------------------------------
# Plans: what is sampled, as a small dict; models; samples
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


def share_of(share, K):
    """round(share * K), half up (D1)."""
    return int(share * K + 0.5)


# differs: this method's numbers
def make_plan(method, config, solver="ddim", steps=REFERENCE_STEPS, s=S, beta=BETA, k=K_CACHE, m=M, choice="cond",
              w=None, depth=1, spacing="trailing"):
    """base: plain guidance (the off switch). mixed: s, beta. cache: k, m, choice. postdiff: all of them."""
    mixed, cached = method in ("mixed", "postdiff"), method in ("cache", "postdiff")
    low = round(config["res"] * beta) if mixed else config["res"]
    if not (0 <= s < 1 and 0 <= m <= 1 and 0 < beta <= 1 and k >= 1):
        raise ValueError(f"needs 0 <= s < 1, 0 <= m <= 1, 0 < beta <= 1, k >= 1: not s {s}, m {m}, beta {beta}, k {k}")
    if mixed and abs(low - config["res"] * beta) > 1e-6:
        raise ValueError(f"--beta {beta} of the resolution {config['res']} is not whole")
    plan = dict(method=method, solver=solver, taus=uniform_steps(T - 1, steps, spacing),
                n_low=share_of(s, steps) if mixed else 0, low=low, k=k if cached else 1, depth=depth,
                n_guided=share_of(m, steps) if cached else steps, w=config["w"] if w is None else w)
    plan["choice"] = choice if 0 < plan["n_guided"] < steps else "none"
    if mixed and s > 0 and plan["n_low"] in (0, steps):
        raise ValueError(f"--s {s} of {steps} steps is {plan['n_low']}: there must be low and full steps")
    return plan


# differs: this method's numbers
def check_plan(plan, config, name="plan"):
    """The plan itself, or ValueError if a number is out of range or does not fit the network."""
    def whole(key, low, high):
        if type(plan.get(key)) is not int or not low <= plan[key] <= high:
            raise ValueError(f"{name}: {key} must be an integer in {low} .. {high}, not {plan.get(key)}")

    taus, levels, patch = plan.get("taus"), len(config["mult"]), config["patch"]
    if not isinstance(taus, list) or not taus or any(type(t) is not int or not 0 <= t < T for t in taus):
        raise ValueError(f"{name}: taus must be a list of integers in 0 .. {T - 1}")
    if any(a <= b for a, b in zip(taus, taus[1:])):
        raise ValueError(f"{name}: taus must fall strictly: {taus}")
    whole("n_low", 0, len(taus) - 1)
    whole("n_guided", 0, len(taus))
    whole("low", 1, config["res"])
    whole("k", 1, T)
    whole("depth", 0, levels * (config["blocks"] + 1) - 1)                     # last of the stages
    multiple = patch * (2 if config["arch"] == "dit" else 2 ** (levels - 1))      # see build_net
    if plan["low"] % multiple:
        raise ValueError(f"{name}: the low resolution {plan['low']} must be a multiple of {multiple} for this network")
    lcm = config["phase"] == "lcm"
    if (plan.get("solver") == "lcm") != lcm:
        raise ValueError(f"{name}: an LCM (--train --distill) needs --solver lcm, another network {list(SOLVERS)[:2]}")
    if config["arch"] == "dit" and plan["k"] > 1:
        raise ValueError(f"{name}: k must be 1: a DiT has no deep features to cache")
    if any(plan.get(key) not in known for key, known in (("solver", list(SOLVERS)), ("method", METHODS),
                                                         ("choice", CHOICES))):
        raise ValueError(f"{name}: needs a solver of {list(SOLVERS)}, a method of {METHODS}, a choice of {CHOICES}")
    if type(plan.get("w")) not in (int, float) or not math.isfinite(plan["w"]):
        raise ValueError(f"{name}: w must be a number, not {plan.get('w')}")
    return plan


# differs: a plan is checked against the network
def load_plan(path, config):
    """A plan from JSON. Raises OSError or ValueError with one line."""
    try:
        return check_plan(json.loads(Path(path).read_text()), config, path)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        raise ValueError(f"{path} is no plan (not JSON, or not an object)") from None


def get_plans(args):
    """The plans to run, printed: --plan FILE, or one for each combination of the options' values."""
    if args.plan:
        plans = [load_plan(args.plan, args.config)]
    else:
        plans = [make_plan(method, args.config, *job, args.guidance, args.depth, args.spacing)
                 for method, *job in itertools.product(args.method, args.solver, args.steps, args.s, args.beta,
                                                       args.k, args.m, args.choice)]
        plans = [plan for i, plan in enumerate(plans) if plan not in plans[:i]]      # base has no s, k, m
        plans = [check_plan(plan, args.config) for plan in plans]
    for plan in plans:
        print(describe(plan))
    return plans


def describe(plan):
    """A plan in one line."""
    K, choice = len(plan["taus"]), f", then cross-attention of {plan['choice']}" if plan["choice"] != "none" else ""
    guided = f"told w {plan['w']}; fresh caches" if plan["solver"] == "lcm" else f"guidance {plan['w']}"
    return (f"{plan['method']} {plan['solver']}: {K} steps, {plan['n_low']} at {plan['low']}x{plan['low']}; full pass "
            f"every {plan['k']}; {guided} in the first {plan['n_guided']}{choice}; steps {plan['taus']}")


def encode(captions, words, length):
    """Captions -> word numbers (N, length), 1 for words[0], 0 for padding, and the list of unknown words, which
    are left out, as is what exceeds the length."""
    number, rows, unknown = {word: i for i, word in enumerate(words, 1)}, [], []
    for caption in captions:
        known = [number[word] for word in caption.lower().split() if word in number]
        unknown += [word for word in caption.lower().split() if word not in number]
        rows.append((known + [0] * length)[:length])
    return torch.tensor(rows), list(dict.fromkeys(unknown))


def check_prompts(prompts, words, length):
    """Names the words that are unknown or beyond `length`; raises ValueError for a prompt that is empty or has no
    known word."""
    for prompt in prompts:
        tokens, unknown = encode([prompt], words, len(prompt))
        if not prompt.split():
            raise ValueError("--prompt is empty: give some words, such as \"cat face\"")
        if not tokens.any():
            raise ValueError(f"--prompt '{prompt}': no word of it is in the model's vocabulary of {len(words)}")
        if unknown:
            print(f"unknown words left out: {', '.join(unknown)}", file=sys.stderr)
        known = [word for word in prompt.lower().split() if word not in unknown]
        if len(known) > length:
            print(f"the model reads {length} words; left out: {', '.join(known[length:])}", file=sys.stderr)


@functools.cache
def load_data(data, res):
    """load_images, with area averages where the images are larger than res: x, captions of each image."""
    x, y, captions = load_images(data, res)
    if x.shape[-1] % res:
        raise ValueError(f"--data {data} has images of {x.shape[-1]} pixels: the resolution {res} does not divide that")
    if x.shape[-1] > res:
        x = F.avg_pool2d(x.float(), x.shape[-1] // res).round().to(torch.uint8)
    return x, [captions[i] for i in y.tolist()]


def captions_of(args, seeds):
    """The caption of each seed: the prompts in turn, else the data's captions in a fixed random order."""
    if args.prompt:
        return [args.prompt[i % len(args.prompt)] for i in seeds]
    _, captions = load_data(args.data, args.config["res"])
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
    return [captions[order[i % len(order)]] for i in seeds]


def as_net(unet, device, precision):
    """A UNet as mixed_resolution_sample takes it: no gradients, the precision of the device, eps_hat in float32. w: a
    number, for an LCM."""
    def net(xt, t, text, deep=None, cross=None, depth=1, w=None):
        w = None if w is None else torch.full((len(xt),), float(w), device=xt.device)
        with torch.no_grad(), autocast(device, precision):
            eps_hat, deep, cross = unet(xt.contiguous(memory_format=torch.channels_last), t, text, deep, cross, depth,
                                        w)
        return eps_hat.float(), deep, cross
    return net


# differs: one network with text, whose caches pass through
def load_models(args, device, precision="auto"):
    """The network of a checkpoint's EMA weights as a callable net(xt, t, text, deep, cross, depth), and the UNet
    itself; sets args.run, args.config, args.words, args.channels, args.images_seen."""
    saved = load_checkpoint(args.checkpoint)
    args.run, args.config, args.words = Path(args.checkpoint).parent, saved["args"], saved["words"]
    args.channels, args.images_seen = saved["channels"], saved["images_seen"]
    args.data = getattr(args, "data", None) or args.config["data"]
    args.plans = Path(args.plans or args.run)
    set_defaults(args, "lcm" if args.config["phase"] == "lcm" else args.config["arch"])
    unet = build_net(args.config, args.channels, len(args.words))
    unet.load_state_dict(saved["ema"])
    unet = unet.to(device).eval().requires_grad_(False)
    return as_net(torch.compile(unet) if args.compile else unet, device, precision), unet


def set_defaults(args, kind):
    """The options that were left out, as the paper has them for that kind of network (Sec. 3.1)."""
    for key, value in DEFAULTS[kind].items():
        if getattr(args, key) is None:
            setattr(args, key, [value])


# differs: captions and one network
def sample(args, net, plan, seeds, device):
    """uint8 images (n, C, R, R), seed by seed, of this process's share of the seeds."""
    if not len(seeds):
        raise ValueError("--n is smaller than the number of processes")
    alpha_bar, config, parts = linear_alpha_bar(T).to(device), args.config, []
    batches = torch.tensor(list(seeds)).split(125)
    for batch in progress(batches, f"sample {plan['method']} {plan['solver']}", len(batches[0])):
        text, _ = encode(captions_of(args, batch.tolist()), args.words, config["tokens"])
        noise = [z.to(device) for z in noise_for(batch.tolist(), *noise_shapes(plan, config, args.channels))]
        parts.append(to_uint8(run_plan(net, plan, noise, text.to(device), alpha_bar)).cpu())
    return torch.cat(parts)


def noise_shapes(plan, config, channels):
    """Of the full and the low resolution; for an LCM also of each step."""
    sizes = [config["res"], plan["low"]]
    if plan["solver"] == "lcm":
        sizes += [plan["low"] if i < plan["n_low"] else config["res"] for i in range(len(plan["taus"]))]
    return [(channels, r, r) for r in sizes]


def run_plan(net, plan, noise, text, alpha_bar):
    """mixed_resolution_sample with the numbers of a plan; noise: see noise_shapes; the null text is all padding. An
    LCM is told w instead of being guided by it."""
    w, (full, low, *fresh) = plan["w"], noise
    if plan["solver"] == "lcm":
        net, w = functools.partial(net, w=w), None
    return mixed_resolution_sample(net, full, plan["taus"], alpha_bar, text, torch.zeros_like(text), w, plan["n_low"],
                                   low, plan["k"], plan["depth"], plan["n_guided"], plan["choice"],
                                   SOLVERS[plan["solver"]], fresh=fresh)


# differs: calibration instead of TRD
def search(args, net, device):
    """Calibration over the combinations of --method, --steps, --s, ...: writes plan.json, and a line of results for
    each setting with its score on growing parts of the set (Fig. 9)."""
    extractor, name = small_extractor(args, device)
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + args.calibration)
    full, captions, found = reference_macs(args), captions_of(args, seeds), []
    sizes = [n for n in (args.calibration // 4, args.calibration // 2, args.calibration) if n]

    def cost(plan):
        return plan_macs(args.config, args.channels, len(args.words), plan)[1] / full

    def score(plan):
        begun, images = time.time(), sample(args, net, plan, seeds, device)
        seconds = (time.time() - begun) / len(images)
        _, embeddings = extract(extractor, fit_extractor(images, extractor))
        scores = [caption_score(extractor, embeddings[:n], captions[:n]) for n in sizes]
        found.append(scores)
        append_result(args, device, plan, args.experiment or "calibration", seed=CALIBRATION_SEED, n=args.calibration,
                      extractor=name, caption_score=scores[-1], scores=dict(zip(sizes, scores)),
                      seconds_per_image=seconds)
        print(f"caption score {scores[-1]:.4f}, {100 * cost(plan):.1f} % of the MACs: {describe(plan)}")
        return scores[-1]

    best, _ = calibrate(get_plans(args), cost, score, args.budget)
    for n, scores in zip(sizes[:-1], zip(*found)) if len(found) > 1 else ():
        alike = ranked_alike(scores, [s[-1] for s in found])
        print(f"the first {n} images rank {100 * alike:.0f} % of the pairs of settings as all {args.calibration} do")
    path = args.plans / "plan.json"
    save_json(path, best)
    print(f"best within {100 * args.budget:.0f} % of the MACs of {REFERENCE_STEPS} guided steps: {path}")


def save_profile(args, net, unet, device):
    """Fig. 7's data: profile.json beside the results; results/report.py draws it."""
    if args.config["arch"] == "dit":
        raise ValueError("--profile is of a U-Net's blocks: the checkpoint is a DiT")
    plan = check_plan(make_plan("base", args.config, args.solver[0], args.steps[0], w=args.guidance,
                                spacing=args.spacing), args.config)
    seeds = range(args.seed, args.seed + min(args.n or 64, 125))               # one batch
    found = dict(plan=plan, n=len(seeds), **profile(unet, lambda: sample(args, net, plan, seeds, device)))
    path = Path(args.results).parent / "profile.json"
    save_json(path, found)
    print(f"profile of {len(seeds)} images: {path}")


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


# differs: captions; one phase, the model itself or the fine-tuning of App. F
def train(args, device, rank, world):
    """The text-to-image model, or, from a checkpoint, its fine-tuning on a fixed resolution schedule (App. F) or its
    distillation to an LCM (--distill). Returns the run's checkpoint.

    Every random draw of step k comes from a seed made of --seed and k: a resumed run needs no generator
    state and equals an uninterrupted one. Every process draws the global batch and keeps its share:
    the weights do not depend on the number of processes (up to rounding and dropout)."""
    saved = load_checkpoint(args.checkpoint) if args.checkpoint else {}
    if args.resume:                                                    # its arguments, its folder
        run = Path(args.checkpoint).parent
        if "optimizer" not in saved:
            raise ValueError(f"--resume: {args.checkpoint} has weights only; fine-tune without --resume")
        if args.distill and saved["phase"] != "lcm":
            raise ValueError(f"--resume: {args.checkpoint} is no distillation: leave --distill out")
        args = argparse.Namespace(**{**vars(args), **saved["args"]})
    else:
        name = [f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"]          # two runs may begin at once
        if world > 1:
            dist.broadcast_object_list(name)                           # the clocks may differ
        run = Path(args.out) / name[0]
        for key in ARCHITECTURE if saved else ():                      # the checkpoint decides
            setattr(args, key, saved["args"][key])
        args.phase, args.begin = ("lcm" if args.distill else "finetune", saved["step"]) if saved else ("base", 0)
        args.before = saved.get("images_seen", 0)
        if args.distill and not saved:
            raise ValueError("--distill needs the model to distil: name its --checkpoint")
        if saved.get("phase") == "lcm":
            raise ValueError(f"{args.checkpoint} is an LCM: it is sampled, not fine-tuned or distilled (no --distill)")
        args.finetune_s, args.finetune_beta = (
            (getattr(args, key) or [DEFAULTS[args.arch][key]])[0] for key in ("s", "beta"))
        args.data = args.data or (saved["args"]["data"] if saved else "emoji")
    x, captions = load_data(args.data, args.res)
    words = saved.get("words") or sorted({word for caption in captions for word in caption.lower().split()})
    if not words:
        raise ValueError(f"--data {args.data} has no captions: put the images into sub-folders named after them")
    channels, R, finetune, lcm = x.shape[1], x.shape[-1], args.phase == "finetune", args.phase == "lcm"
    if saved.get("channels", channels) != channels:
        raise ValueError(f"--data {args.data} has {channels} channels, the checkpoint {saved['channels']}")
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} does not divide among {world} processes")
    config = {k: getattr(args, k) for k in (*PRESETS, "arch", "data", "preset", "seed", "phase", "begin", "before",
                                            "finetune_s", "finetune_beta")}
    torch.manual_seed(args.seed)
    net = build_net(config, channels, len(words))
    low = make_plan("mixed", config, s=args.finetune_s, beta=args.finetune_beta)["low"] if finetune else R
    if R % net.multiple or low % net.multiple:
        raise ValueError(f"the resolutions {R} and {low} must be multiples of {net.multiple} for this network")
    alpha_bar, mine = linear_alpha_bar(T).to(device), slice(rank, None, world)
    tokens, _ = encode(captions, words, args.tokens)
    if rank == 0:
        save_json(run / "args.json", config)                           # an unwritable folder fails here
    begin, lr = args.begin, {"base": args.lr, "finetune": args.finetune_lr, "lcm": args.lcm_lr}[args.phase]
    end = {"base": args.iters, "finetune": begin + args.finetune_iters, "lcm": begin + args.lcm_iters}[args.phase]
    teacher = None
    if lcm:
        teacher = build_net(dict(config, phase="base"), channels, len(words))
        teacher.load_state_dict(saved["teacher" if args.resume else "ema"])
        teacher = teacher.to(device).eval().requires_grad_(False)
        nn.init.zeros_(net.guidance.weight)                            # at first the same as the teacher
    if saved:
        net.load_state_dict(saved["net" if args.resume else "ema"], strict=args.resume or not lcm)
    ema = copy.deepcopy(net).to(device).eval().requires_grad_(False)
    net = net.to(device).train()
    optimizer, step = torch.optim.Adam(net.parameters(), lr=lr), begin
    if args.resume:
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
            common = dict(phase=args.phase, step=step, channels=channels, args=config, words=words,
                          images_seen=args.before + (step - begin) * args.batch)
            if step == end:                                            # what is shipped
                save_checkpoint(run / "weights.pt", **common, ema={k: v.half() for k, v in ema.state_dict().items()})
            more = dict(teacher=teacher.state_dict()) if lcm else {}
            save_checkpoint(run / "checkpoint.pt", **common, **more, ema=ema.state_dict(), net=net.state_dict(),
                            optimizer=optimizer.state_dict())
            plan = make_plan("base", config, *(("lcm", 4) if lcm else ("dpm2", 10)))
            z = [v.to(device) for v in noise_for(range(32), *noise_shapes(plan, config, channels))]
            text = tokens[torch.linspace(0, len(tokens) - 1, 32).long()].to(device)
            images = run_plan(as_net(ema, device, args.precision), plan, z, text, alpha_bar)
            save_grid(run / "samples.png", images)
            line = dict(phase=args.phase, step=step, images_seen=common["images_seen"], loss=round(mean, 5),
                        images_per_s=round(rate, 1))
            with open(run / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")

    todo = range(step + 1, end + 1)
    for step in progress(todo, f"train {args.phase}", args.batch, note=lambda: f"loss {mean_loss():.4f}"):
        torch.manual_seed(args.seed * 10_000_019 + step)
        i = torch.randint(0, len(x), (args.batch,))
        x0, text, first, last = to_float(x[i[mine]]), tokens[i], 0, T
        if finetune:                                                   # METHOD: App. F, a fixed schedule (D12)
            edge = T - share_of(args.finetune_s, T)
            small = torch.rand(()) < args.finetune_s
            first, last = (edge, T) if small else (0, edge)
            x0 = F.interpolate(x0, size=low, mode="area") if small else x0
        t = torch.randint(first, last, (args.batch,))
        if lcm:
            w = (1 + 2 * (args.w - 1) * torch.rand(args.batch))[mine].to(device)        # around the preset's
        else:
            text = torch.where(torch.rand(args.batch)[:, None] < args.drop, 0, text)   # for guidance (D14)
        eps = torch.randn(args.batch, *x0.shape[1:])
        x0, t, eps, text = x0.to(device), t[mine].to(device), eps[mine].to(device), text[mine].to(device)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step - begin) / args.warmup, (end + 1 - step) / fall)
        with autocast(device, args.precision):
            if lcm:
                t_next = (t - args.lcm_skip).clamp(min=-1)
                loss = consistency_loss(model, ema, teacher, x0, t, t_next, eps, alpha_bar, text,
                                        torch.zeros_like(text), w, args.predict)
            else:
                loss = diffusion_loss(model, x0, t, eps, alpha_bar, text, args.predict)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(args.ema, (step - begin) / (9 + step - begin))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        if count and (step - 1) % args.save_every == 0:                # a new window
            loss_sum, count, begun = torch.zeros((), device=device), 0, time.time()
        loss_sum, count = loss_sum + loss.detach(), count + 1
        if step % 50 == 0:
            mean_loss()                                                # stops at a NaN
        if step % args.save_every == 0 or step == end:
            save()
    return run / "checkpoint.pt"


# ---------------------------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------------------------
def counting(net, total):
    """net as mixed_resolution_sample takes it, on the meta device: adds each call's MACs to total = [without the
    products of attention, with them], counted by execution at the first call of each kind."""
    seen = {}

    def call(xt, t, text, deep=None, cross=None, depth=1, w=None):
        told = {} if w is None else dict(w=torch.zeros(len(xt), device=xt.device))
        key = xt.shape, text.shape, deep is None, depth, tuple((i, out.shape) for i, out in (cross or {}).items())
        if key not in seen:
            kept = []
            macs = macs_by_operator(lambda: kept.append(net(xt, t, text, deep, cross, depth, **told)))
            seen[key] = without_attention(macs), sum(macs.values()), kept[0]
        total[0], total[1] = total[0] + seen[key][0], total[1] + seen[key][1]
        return seen[key][2]
    return call


def without_attention(macs):
    """The sum of macs_by_operator without attention's products, as the paper's counter has it (it adds biases and
    norms, 0.1 %)."""
    return sum(n for name, n in macs.items() if name in ("aten.convolution", "aten.mm", "aten.addmm"))


@functools.cache
def counted_net(config, channels, words):
    """counting() of a preset's network; config as JSON."""
    total = [0, 0]
    with torch.device("meta"):
        return counting(build_net(json.loads(config), channels, words).eval(), total), total


# differs: caches count themselves
def plan_macs(config, channels, words, plan):
    """MACs per image of a plan [without the products of attention, with them]: the sampler itself is run on the meta
    device. words: 0 for a net that takes text features."""
    net, total = counted_net(json.dumps(config), channels, words)
    total[:] = 0, 0
    with torch.device("meta"):
        noise = [torch.zeros(1, *shape) for shape in noise_shapes(plan, config, channels)]
        text = torch.zeros(1, config["tokens"], dtype=torch.long) if words else torch.zeros(
            1, config["tokens"], config["c_text"])
    run_plan(net, plan, noise, text, linear_alpha_bar(T))
    return list(total)


def reference_macs(args):
    """MACs of plain sampling with guidance in every one of REFERENCE_STEPS steps (LCM: of its teacher's)."""
    teacher = dict(args.config, phase="base")
    return plan_macs(teacher, args.channels, len(args.words), make_plan("base", teacher))[1]


# differs: this method's numbers
def append_result(args, device, plan, experiment, **measured):
    """One line of results.jsonl: what was measured, under which conditions, by which source."""
    macs = plan_macs(args.config, args.channels, len(args.words), plan)[1]
    cpu = "" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {cpu}"
    plain = {k: str(v).replace(f"{HERE}/", "") if isinstance(v, (str, Path)) else v
             for k, v in vars(args).items() if k not in ("config", "words")}
    line = dict(experiment=experiment, method=plan["method"], solver=plan["solver"], data=args.data,
                preset=args.config["preset"], phase=args.config["phase"], **measured,
                nfe=[plan["n_low"], len(plan["taus"]) - plan["n_low"]], macs_per_image=macs,
                relative_macs=macs / reference_macs(args), device=name, torch=torch.__version__,
                images_seen=args.images_seen, source_sha256=sha256_of(__file__), plan=plan, args=plain)
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    with open(args.results, "a") as file:
        file.write(json.dumps(line) + "\n")


def fit_extractor(x, extractor):
    """uint8 images at the size that the small extractor was trained on: smaller ones are enlarged, bilinear."""
    size = 32 * extractor.patch
    if x.shape[-1] >= size:
        return x
    return F.interpolate(x.float(), size=size, mode="bilinear", align_corners=False).round().to(torch.uint8)


def small_extractor(args, device):
    """The small extractor, which knows captions, and its name in results, which says what was enlarged for it."""
    extractor, name = load_extractor(args.data, device)
    res = args.config["res"]
    return extractor, f"{name} of {res}x{res}" if res < 32 * extractor.patch else name


# differs: caption score; no classes
def evaluate(args, net, device, rank, world):
    """FD, caption score, MACs and seconds for every plan and seed; image i of seed s comes from seed s * n + i, its
    caption as captions_of. One line of results each."""
    x, captions = load_data(args.data, args.config["res"])
    extractor, name = small_extractor(args, device)
    if args.n <= extractor.width:
        raise ValueError(f"--n {args.n} is too small for FD with {extractor.width} features")
    if x.shape[1] != args.channels:
        raise ValueError(f"--data {args.data} has images of {list(x.shape[1:])}, the checkpoint was trained on "
                         f"'{args.config['data']}'")
    features, embeddings = extract(extractor, fit_extractor(x, extractor))
    reference = feature_stats(features)
    print(f"the data's own caption score: {caption_score(extractor, embeddings, captions):.4f}")
    for plan in get_plans(args):
        for seed in range(args.seed, args.seed + args.seeds):
            seeds, begun = range(seed * args.n, (seed + 1) * args.n), time.time()
            images = sample(args, net, plan, seeds[rank::world], device)
            seconds = time.time() - begun
            mine, embeddings = (gather(part, world) for part in extract(extractor, fit_extractor(images, extractor)))
            if rank > 0:
                continue
            fd = frechet_distance(feature_stats(mine), reference)
            score = caption_score(extractor, embeddings, captions_of(args, seeds))
            append_result(args, device, plan, args.experiment or "evaluate", seed=seed, n=args.n, extractor=name, fd=fd,
                          caption_score=score, seconds_per_image=seconds / args.n, processes=world)
            print(f"{describe(plan).split('; steps')[0]}; seed {seed}: FD[{name}]@{args.n} {fd:.3f}, caption score "
                  f"{score:.4f}, {seconds:.0f} s")


# ---------------------------------------------------------------------------------------------
# Real pipelines: the same method applied to four pipelines of diffusers, by wrapping instances
# ---------------------------------------------------------------------------------------------
PIPELINES = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline", "StableDiffusionXLPipeline",
             "PixArtAlphaPipeline")
SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
              "LCMScheduler", "DPMSolverMultistepScheduler")           # whose x0_hat can be had in every step


class CrossAttentionCache:
    """A processor for one cross-attention of diffusers: notes what the real processor gives, or gives what is
    frozen, resized to the tokens of the present latent size."""

    def __init__(self, name, processor, state):
        self.name, self.processor, self.state = name, processor, state

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        state = self.state
        if self.name not in state["frozen"]:
            out = self.processor(attn, hidden_states, encoder_hidden_states=encoder_hidden_states,
                                 attention_mask=attention_mask, temb=temb)
            state["cross"][self.name] = out, state["size"]
            return out
        out, size = state["frozen"][self.name]
        if size != state["size"]:                                              # D7
            h, w = token_grid(out.shape[1], *size)
            out = F.interpolate(out.transpose(1, 2).unflatten(2, (h, w)), mode="bilinear", align_corners=False,
                                size=token_grid(hidden_states.shape[1], *state["size"])).flatten(2).transpose(1, 2)
            state["frozen"][self.name] = out, state["size"]
        return out


def token_grid(n, h, w):
    """(height, width) of n tokens that come from an h x w latent image by halving, rounded up, some times."""
    while h * w > n and h * w > 1:
        h, w = (h + 1) // 2, (w + 1) // 2
    if h * w != n:
        raise ValueError(f"{n} tokens are no halving of the latent image")
    return h, w


def shallow_pass(unet, deep, sample, timestep, encoder_hidden_states, timestep_cond=None, added_cond_kwargs=None, **_):
    """METHOD: DeepCache's shallow pass of a UNet2DConditionModel, depth 1 (D5): eps_hat from the deep features."""
    emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), timestep_cond)
    more = unet.get_aug_embed(emb=emb, encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added_cond_kwargs)
    emb = emb if more is None else emb + more
    text = unet.process_encoder_hidden_states(encoder_hidden_states=encoder_hidden_states,
                                              added_cond_kwargs=added_cond_kwargs)

    def run(block, j, h):
        h = block.resnets[j](h, emb)
        attend = getattr(block, "attentions", None)
        return attend[j](h, encoder_hidden_states=text, return_dict=False)[0] if attend else h

    first, up = unet.conv_in(sample), unet.up_blocks[-1]
    skip = run(unet.down_blocks[0], 0, first)
    n = len(up.resnets)
    h = run(up, n - 2, torch.cat([deep, skip], dim=1))
    h = run(up, n - 1, torch.cat([h, first], dim=1))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def wrap_denoiser(denoiser, state, k, choice, w=None):
    """METHOD: Sec. 2.5 on a UNet2DConditionModel or PixArtTransformer2DModel: its forward, on this instance only.

    state: see new_state; batch, n_guided are read at each call, log gets one entry (step, batch, height, width, full
    pass?, cross-attention reused?) a call. k > 1 needs a U-Net. Returns a function that takes it all off again."""
    forward, is_unet = denoiser.forward, hasattr(denoiser, "up_blocks")
    signature, handle, processors = inspect.signature(forward), None, denoiser.attn_processors
    if choice != "none":
        denoiser.set_attn_processor({name: CrossAttentionCache(name, p, state) if ".attn2." in name else p
                                     for name, p in processors.items()})
    if is_unet and k > 1:
        c_skip, inner = denoiser.down_blocks[0].resnets[0].out_channels, denoiser.up_blocks[-1].resnets[-2]
        handle = inner.register_forward_pre_hook(lambda module, inputs: state.update(deep=inputs[0][:, :-c_skip]))

    def half(value, n):
        """The text's half of everything that comes in pairs [null, text]."""
        if isinstance(value, dict):
            return {key: half(v, n) for key, v in value.items()}
        return value[n // 2:] if torch.is_tensor(value) and value.ndim and len(value) == n else value

    @functools.wraps(forward)
    def postdiff_forward(*args, **kwargs):
        bound = dict(signature.bind(*args, **kwargs).arguments)
        name = next(iter(signature.parameters))                                # sample or hidden_states
        n, i = len(bound[name]), state["i"]
        pairs, late = n == 2 * state["batch"], i >= state["n_guided"]
        if i == state["n_guided"] and choice != "none":
            state["frozen"] = {key: (choose(out, choice, w) if pairs else out, size)
                               for key, (out, size) in state["cross"].items()}
        if late and pairs:
            bound = {key: half(value, n) for key, value in bound.items()}
        x = bound[name]
        full = not is_unet or state["age"] in (0, k) or state["input"] != x.shape
        state.update(i=i + 1, size=tuple(x.shape[-2:]), input=x.shape, age=1 if full else state["age"] + 1)
        state["log"].append((i, *x.shape[:1], *x.shape[-2:], full, bool(state["frozen"])))
        out = forward(**bound)[0] if full else shallow_pass(denoiser, state["deep"], **bound)
        return (torch.cat([out, out]) if late and pairs else out,)             # u + w (c - u) = c

    before = vars(denoiser).get("forward")                     # accelerate's offloading puts one there

    def remove():
        if before is None:
            del denoiser.forward
        else:
            denoiser.forward = before
        if choice != "none":
            denoiser.set_attn_processor(processors)
        if handle:
            handle.remove()

    denoiser.forward = postdiff_forward
    return remove


def new_state(batch=1, n_guided=0):
    """What wrap_denoiser keeps between the steps of one run."""
    return dict(i=0, batch=batch, n_guided=n_guided, age=0, input=None, size=None, deep=None, cross={}, frozen={},
                log=[])


def apply_postdiff(pipe, beta=BETA, s=S, k=K_CACHE, m=M, choice="cond", w=None):
    """METHOD: PostDiff on a pipeline of diffusers (PIPELINES), whose weights and code stay as they are.

    Afterwards pipe(prompt, ...) samples the first share s of its steps at beta times the size, runs the U-Net's deep
    part every k-th step (PixArt: k has no effect), drops guidance after the share m of the steps and freezes
    the cross-attentions by `choice` (w: the guidance scale, needed for 'cfg' only). s=0, k=1, m=1: the pipeline's
    own output. s > 0 needs one of SCHEDULERS, set before this call. The defaults are the paper's for SD v1.5; SDXL:
    beta 0.75, s 0.2; PixArt: beta 0.75; LCM: m 0.5, k 1.
    Returns the state, whose `log` lists the last run's steps, and a function that removes everything.
    Raises ValueError for another pipeline or scheduler, or numbers out of range; in a call, for a size or number of
    steps that does not fit."""
    if type(pipe).__name__ not in PIPELINES:
        raise ValueError(f"PostDiff knows {', '.join(PIPELINES)}, not {type(pipe).__name__}")
    if not (0 <= s < 1 and 0 <= m <= 1 and 0 < beta <= 1 and k >= 1 and k == int(k) and choice in CHOICES):
        raise ValueError(f"needs 0 <= s < 1, 0 <= m <= 1, 0 < beta <= 1, a whole k >= 1, a choice of {CHOICES}: "
                         f"not s {s}, m {m}, beta {beta}, k {k}, {choice}")
    if choice == "cfg" and m < 1 and w is None:
        raise ValueError("choice 'cfg' needs w, the guidance scale (--guidance)")
    if "step" in vars(pipe.scheduler):
        raise ValueError("PostDiff is on this pipeline already: call its remove first")
    from diffusers.utils.torch_utils import randn_tensor
    scheduler, denoiser, state = pipe.scheduler, getattr(pipe, "unet", None) or pipe.transformer, new_state()
    multistep = hasattr(scheduler, "model_outputs")
    if s and (type(scheduler).__name__ not in SCHEDULERS or multistep and
              scheduler.config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++")):
        raise ValueError("mixed resolution needs x0 in every step: pipe.scheduler must be one of "
                         f"{', '.join(SCHEDULERS)} (dpmsolver++), not {type(scheduler).__name__}")
    set_timesteps, step, prepare = scheduler.set_timesteps, scheduler.step, pipe.prepare_latents

    @functools.wraps(set_timesteps)                                            # pipelines look at signatures
    def postdiff_set_timesteps(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        K = len(scheduler.timesteps)
        state.update(new_state(n_guided=share_of(m, K)), n_low=share_of(s, K))
        if s and state["n_low"] in (0, K):
            raise ValueError(f"s {s} of {K} steps is {state['n_low']}: there must be low and full steps")

    @functools.wraps(prepare)
    def postdiff_prepare(batch_size, channels, height, width, dtype, device, generator, latents=None):
        state.update(batch=batch_size, generator=generator)
        if state["n_low"] == 0:
            return prepare(batch_size, channels, height, width, dtype, device, generator, latents)
        unit = pipe.vae_scale_factor * (1 if hasattr(denoiser, "up_blocks") else denoiser.config.patch_size)
        low = [side * beta for side in (height, width)]
        if latents is not None or any(side % unit for side in low):
            raise ValueError("latents= does not go with s > 0" if latents is not None else
                             f"beta {beta} of {height}x{width}: the sides must be multiples of {unit}")
        state["full_size"] = [int(side) // pipe.vae_scale_factor for side in (height, width)]
        return prepare(batch_size, channels, *map(int, low), dtype, device, generator)

    @functools.wraps(step)
    def postdiff_step(model_output, timestep, sample, *args, return_dict=True, **kwargs):
        if state["i"] != state["n_low"]:
            return step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
        result = step(model_output, timestep, sample, *args, return_dict=True, **kwargs)
        told = result.get("pred_original_sample", result.get("denoised"))
        x0_hat = scheduler.model_outputs[-1] if multistep else told
        up = F.interpolate(x0_hat, size=state["full_size"], mode="bilinear", align_corners=False)      # Eq. 4
        z = randn_tensor(up.shape, generator=state["generator"], device=up.device, dtype=up.dtype)
        xt = scheduler.add_noise(up, z, scheduler.timesteps[state["i"]][None].to(up.device))           # Eq. 5, D2
        if multistep:                                                                                  # D3
            scheduler.model_outputs, scheduler.lower_order_nums = [None] * len(scheduler.model_outputs), 0
        return (xt, x0_hat) if not return_dict else type(result)(**{**result, "prev_sample": xt})

    remove_denoiser = wrap_denoiser(denoiser, state, k, choice if m < 1 else "none", w)
    scheduler.set_timesteps, scheduler.step = postdiff_set_timesteps, postdiff_step
    pipe.prepare_latents = postdiff_prepare

    def remove():
        remove_denoiser()
        del scheduler.set_timesteps, scheduler.step, pipe.prepare_latents

    return state, remove


def sample_pipeline(args, device):
    """--pipeline: images of the prompts by a diffusers pipeline with PostDiff (or --method base: without)."""
    if not args.prompt or not all(prompt.split() for prompt in args.prompt):
        raise ValueError("--pipeline needs a --prompt that is not empty")
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise ValueError("--pipeline needs diffusers: pip install diffusers transformers") from None
    try:
        half = torch.float16 if device.type == "cuda" else torch.float32
        pipe = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=half).to(device)
    except Exception as error:                        # diffusers raises many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise ValueError(f"no pipeline {args.pipeline} ({reason})") from None
    set_defaults(args, {"PixArtAlphaPipeline": "dit", "LatentConsistencyModelPipeline": "lcm",
                        "StableDiffusionXLPipeline": "sdxl"}.get(type(pipe).__name__, "unet"))
    if type(pipe.scheduler).__name__ not in SCHEDULERS:                # such as SD v1.5's own, PNDM
        from diffusers import DDIMScheduler
        print(f"{type(pipe.scheduler).__name__} is replaced by DDIMScheduler")
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    mixed, cached = args.method[0] in ("mixed", "postdiff"), args.method[0] in ("cache", "postdiff")
    state, remove = apply_postdiff(pipe, args.beta[0], args.s[0] if mixed else 0, args.k[0] if cached else 1,
                              args.m[0] if cached else 1, args.choice[0], args.guidance)
    for j, prompt in enumerate(args.prompt):
        options = {} if args.guidance is None else dict(guidance_scale=args.guidance)
        seeds = [torch.Generator().manual_seed(args.seed + i) for i in range(args.n or 1)]
        begun = time.time()
        images = pipe(prompt, num_inference_steps=args.steps[0], num_images_per_prompt=len(seeds), generator=seeds,
                      **options).images
        passes = [f"{h}x{w}{'' if full else ' shallow'}{' frozen' if frozen else ''}"
                  for _, _, h, w, full, frozen in state["log"]]
        print(f"{prompt}: {time.time() - begun:.1f} s; "
              + ", ".join(f"{len(list(run))} x {kind}" for kind, run in itertools.groupby(passes)))
        for i, image in enumerate(images):
            path = Path(args.out) / f"pipeline_{j}_{args.seed + i}.png"
            write_atomically(path, lambda part, image=image: image.save(part, "PNG"))
            print(path)
    remove()


# ---------------------------------------------------------------------------------------------
# Ledger
# ---------------------------------------------------------------------------------------------
def diffusers_denoiser(kind):
    """Random weights of SD v1.5's or SDXL's U-Net or PixArt-alpha's transformer, in diffusers' classes. Raises
    ImportError without diffusers."""
    import diffusers
    if kind == "PixArt":
        return diffusers.PixArtTransformer2DModel(sample_size=128, caption_channels=4096)
    if kind == "SD":
        return diffusers.UNet2DConditionModel(cross_attention_dim=768)         # diffusers' defaults
    return diffusers.UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)


def diffusers_macs(kind):
    """MACs of SDXL's U-Net or PixArt-alpha at 1024x1024, [without attention's products, with them] for each of 20
    steps, in three settings of Table 2: {"plain": ..., "mix": ..., "postdiff": ...}; and its parameters. The real
    classes on the meta device, wrapped as in a pipeline. Raises ImportError without diffusers."""
    with torch.device("meta"):
        denoiser = diffusers_denoiser(kind)
        if kind == "SDXL":
            inputs = dict(encoder_hidden_states=torch.zeros(2, 77, 2048),
                          added_cond_kwargs=dict(text_embeds=torch.zeros(2, 1280), time_ids=torch.zeros(2, 6)))
        else:
            inputs = dict(encoder_hidden_states=torch.zeros(2, 120, 4096),     # 120 text tokens fit all cells
                          added_cond_kwargs=dict(resolution=torch.zeros(2, 2), aspect_ratio=torch.zeros(2, 1)))
        inputs["timestep"] = torch.zeros(2, dtype=torch.long)
        settings = dict(plain=(0, 1, 20, "none"), mix=(4 if kind == "SDXL" else 10, 1, 20, "none"),
                        postdiff=(4 if kind == "SDXL" else 10, 2, 15, "cond"))
        found, name = {}, "sample" if kind == "SDXL" else "hidden_states"
        for setting, (n_low, k, n_guided, choice) in settings.items():
            remove = wrap_denoiser(denoiser, new_state(1, n_guided), k, choice)
            rows, seen = [], {}
            for i in range(20):
                r = 96 if i < n_low else 128                                   # beta = 3/4
                if k > 1 or r not in seen:                       # without caches equal calls cost the same
                    macs = macs_by_operator(lambda: denoiser(**{name: torch.zeros(2, 4, r, r)}, **inputs))
                    seen[r] = without_attention(macs), sum(macs.values())
                rows.append(seen[r])
            found[setting] = rows
            remove()
    return found, sum(p.numel() for p in denoiser.parameters())


# differs: this paper's cells
def ledger(path):
    """The paper's efficiency cells, computed now on the meta device, beside the printed values. ours: in the
    paper's counting rule, T MACs of convolutions and linear layers (the paper adds biases and norms: 0.1 %);
    with_attention: all that is executed, attention's products included. Written to `path` if diffusers is there
    for the cells of SDXL and PixArt."""
    rows = []

    def row(table, cell, paper, ours, executed=None, note=""):
        rows.append(dict(table=table, cell=cell, paper=paper, ours=ours, with_attention=executed, note=note))
        printed, value, more = ("-" if v is None else f"{v:,.3f}" if isinstance(v, float) else f"{v:,}"
                                if isinstance(v, int) else v for v in (paper, ours, executed))
        print(f"{table:8} {cell:38} {printed:>13} {value:>13} {more:>10}  {note}")

    print(f"{'':47} {'paper':>13} {'ours':>13} {'+attention':>10}")
    config = dict({k: v[PRESET_NAMES.index("paper")] for k, v in PRESETS.items()}, arch="unet", phase="base")

    def cells(**options):
        """[without, with attention] in T of a plan of Stable Diffusion's U-Net."""
        plan = make_plan(config=config, **{"depth": 1, **options})
        return [n / 1e12 for n in plan_macs(config, 4, 0, plan if options.get("w", 1) else dict(plan, w=None))]

    with torch.device("meta"):
        unet = build_net(config, 4)
    row("Sec. 3.1", "SD v1.5: parameters", None, sum(p.numel() for p in unet.parameters()),
        note="diffusers': 859,520,964")
    row("Table 1", "Original", 30.420, *cells(method="base"))
    row("Table 1", "Original w/o CFG", 15.210, *cells(method="cache", k=1, m=0.0, choice="none"))
    row("Table 1", "DC", 17.787, *cells(method="cache", m=1.0))

    def forward(**caches):
        return without_attention(macs_by_operator(lambda: kept.append(unet(*inputs, **caches)))) / 1e12

    with torch.device("meta"):
        kept, inputs = [], (torch.zeros(1, 4, 96, 96), torch.zeros(1, dtype=torch.long), torch.zeros(1, 77, 768))
    full = forward()
    _, deep, cross = kept[0]
    saved_full, saved_shallow = full - forward(cross=cross), forward(deep=deep) - forward(deep=deep, cross=cross)
    for m, paper, late in ((5, 11.610, 7), (10, "15.061?", 5), (15, 16.360, 2)):
        ours, executed = cells(method="cache", m=m / 20)
        row("Table 1", f"DC+CA, m = {m}: the cell's accounting", paper,
            ours - late * (saved_full - saved_shallow), None,
            "15.061 or 13.001 in copies of the text; no rule that fits m = 5, 15 gives either" if m == 10 else
            f"takes all cross-attentions off the {late} shallow passes too, which hold 3 of the 16")
        row("Table 1", f"DC+CA, m = {m}: executed", None, ours, executed)
    for steps, paper in ((8, 12.168), (16, 24.336), (20, 30.420)):
        row("Table 2", f"SD v1.5, {steps} steps", paper, *cells(method="base", steps=steps))
    row("Table 2", "SD v1.5, mix", 19.035, *cells(method="mixed"))
    row("Table 2", "SD v1.5, PostDiff: the cell's accounting", 11.129, *cells(method="postdiff", m=1.0),
        note="mix and DC, guidance in all 20 steps, no cross-attention cache")
    row("Table 2", "SD v1.5, PostDiff: executed", None, *cells(method="postdiff"),
        note="with m = 15 and the cache, as described: not the cell's 11.129")
    for steps, paper in ((4, 3.042), (8, 6.084)):
        row("Table 2", f"LCM, {steps} steps", paper, *cells(method="base", steps=steps, w=0),
            note="Stable Diffusion's U-Net without guidance; LCM's own embedding of w adds 0.0001 G")
    row("Table 2", "LCM, mix", 3.807, *cells(method="mixed", steps=8, w=0))
    row("Table 2", "LCM, PostDiff", 3.686, *cells(method="postdiff", steps=8, k=1, m=0.5, w=0),
        note="the low-resolution cross-attentions serve the full-resolution steps")
    for kind, papers in (("SDXL", (47.856, 95.712, 119.641, 109.264, 52.682)),
                         ("PixArt", (34.256, 68.512, 85.640, 66.990, 54.718))):
        try:
            found, size = diffusers_macs(kind)
        except ImportError:
            row("Table 2", kind, papers[2], None, note="not counted: pip install diffusers")
            path = None                                                # keeps the file, which has these cells
            continue
        row("Sec. 3.1", f"{kind}: parameters", None, size)
        steps = [(f"{n} steps", found["plain"][:n]) for n in (8, 16, 20)]
        for (name, counts), paper in zip([*steps, ("mix", found["mix"]), ("PostDiff", found["postdiff"])], papers):
            row("Table 2", f"{kind}, {name}", paper, *(sum(c) / 1e12 for c in zip(*counts)),
                note="0.04 % of the paper's count is not explained" if kind == "SDXL" and name == "8 steps" else "")
    if path:
        save_json(path, rows)
    else:
        print("ledger.json is left as it was: the cells of SDXL and PixArt need diffusers (pip install diffusers)")


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------
# differs: this method's options
def get_args(argv=None):
    """The command line; what a preset sets is None here and filled in from it."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    do = p.add_argument_group("what to do, any subset, in this order")
    for name, text in (("train", "the text-to-image model; with --checkpoint: fine-tuning (App. F)"),
                       ("search", "calibration of steps and s: writes plan.json"), ("sample", "a PNG of images"),
                       ("evaluate", "FD, caption score, MACs, seconds: a line of results each"),
                       ("profile", "distances of features from step to step (Fig. 7)"),
                       ("ledger", "the paper's efficiency cells beside ours")):
        do.add_argument(f"--{name}", action="store_true", help=text)
    do.add_argument("--pipeline", help="folder or id of a diffusers pipeline: images of --prompt, PostDiff applied")
    run = p.add_argument_group("run")
    run.add_argument("--data", help="emoji (default: the checkpoint's), fashion10k, fashion, cifar10, or a folder")
    run.add_argument("--preset", default="small", choices=PRESET_NAMES)
    run.add_argument("--res", type=int, help="resolution to train at; larger images are averaged down to it")
    run.add_argument("--iters", type=int, help="training steps of the model itself")
    run.add_argument("--batch", type=int, help="images per training step, all processes together")
    run.add_argument("--lr", type=float)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--n", type=int, default=None, help="images (sample: 64, evaluate: 2000, pipeline: 1)")
    run.add_argument("--steps", type=int, nargs="+", help="denoising steps (20; LCM: 8)")
    run.add_argument("--prompt", nargs="+", help="sample, pipeline: one or more prompts (default: the data's)")
    run.add_argument("--out", default=f"runs/{SCRIPT}", help="folder of runs and samples")
    run.add_argument("--checkpoint", help="default: the newest run under --out, else the shipped weights; "
                     "with --train: fine-tune it")
    run.add_argument("--resume", action="store_true", help="with --train: go on with the newest run")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    run.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    run.add_argument("--compile", action="store_true", help="torch.compile")
    run.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    run.add_argument("--seeds", type=int, default=1, help="evaluate: this many, from --seed on")
    run.add_argument("--results", default=str(HERE / "results" / SCRIPT / "results.jsonl"))
    run.add_argument("--experiment", help="name of the table or figure in the results")
    m = p.add_argument_group("METHOD (several values: every combination)")
    m.add_argument("--method", nargs="+", default=["postdiff"], choices=METHODS, help="base: the off switch; mixed: "
                   "--s, --beta; cache: --k, --m, --choice; postdiff: all")
    m.add_argument("--arch", default="unet", choices=ARCHS, help="train: dit: PixArt's kind in small")
    m.add_argument("--distill", action="store_true", help="train: make an LCM of --checkpoint")
    m.add_argument("--solver", nargs="+", choices=SOLVERS, help="ddim (default), dpm2 (a DiT's); an LCM's: lcm")
    m.add_argument("--spacing", default="trailing", choices=SPACINGS, help="of the steps")
    m.add_argument("--s", type=float, nargs="+", help="share of the steps at low resolution")
    m.add_argument("--beta", type=float, nargs="+", help="low / full resolution")
    m.add_argument("--k", type=int, nargs="+", help="a full pass every k-th step; 1: always")
    m.add_argument("--m", type=float, nargs="+", help="share of the steps with guidance; 1: all")
    m.add_argument("--choice", nargs="+", default=["cond"], choices=CHOICES, help="what is frozen after m")
    m.add_argument("--depth", type=int, default=1, help="stages that a shallow pass recomputes, less one (D5)")
    m.add_argument("--guidance", type=float, help="w (default: the preset's; pipeline: its own)")
    m.add_argument("--finetune-iters", type=int, help="steps of the fine-tuning")
    m.add_argument("--lcm-iters", type=int, help="steps of the distillation")
    m.add_argument("--calibration", type=int, default=500, help="images of the calibration")
    m.add_argument("--budget", type=float, default=1.0, help="calibration: relative MACs at most")
    m.add_argument("--plan", help="sample, evaluate: a plan.json")
    m.add_argument("--plans", help="folder for the calibration's plan (default: the checkpoint's)")
    args = p.parse_args(argv)
    for key, values in PRESETS.items():
        if getattr(args, key, None) is None:
            setattr(args, key, values[PRESET_NAMES.index(args.preset)])
    if args.steps and min(args.steps) < 1:
        raise ValueError(f"--steps must be at least 1, not {min(args.steps)}")
    for key in ("n", "res", "iters", "batch", "seeds", "calibration", "save_every", "finetune_iters",
                "lcm_iters"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} must be at least 1")
    if not all(1 <= k for k in args.k or []):
        raise ValueError("--k must be at least 1: a full pass at every k-th step")
    if not all(0 <= s < 1 for s in args.s or []):
        raise ValueError("--s must be in 0 .. 1, below 1: the last steps are of full resolution")
    if not all(0 <= m <= 1 for m in args.m or []):
        raise ValueError("--m must be in 0 .. 1: a share of the steps")
    if not all(0 < beta <= 1 for beta in args.beta or []):
        raise ValueError("--beta must be above 0 and at most 1")
    for option in ("resume", "distill"):
        if getattr(args, option) and not args.train:
            raise ValueError(f"--{option} goes with --train")
    if not any((args.train, args.search, args.sample, args.evaluate, args.profile, args.ledger, args.pipeline)):
        p.error("nothing to do: give --train, --search, --sample, --evaluate, --profile, --ledger or --pipeline")
    return args


def find_checkpoint(args):
    """--checkpoint, else the newest run under --out, else the shipped weights; printed."""
    if args.checkpoint is None:
        runs = sorted(Path(args.out).glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        if args.resume and not runs:
            raise ValueError(f"--resume: no run under {args.out}")
        args.checkpoint = str(runs[-1] if runs else HERE / "weights" / SCRIPT / "weights.pt")
    print(f"checkpoint: {args.checkpoint}")


# differs: calibration, profile and pipelines
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
    if args.search:                                                    # what Sec. 2.4 calibrates
        args.steps, args.s = args.steps or [8, 12, 16, 20], args.s or [0, 0.3, 0.5, 0.6]
    if args.search or args.sample or args.evaluate or args.profile:
        find_checkpoint(args)
        net, unet = load_models(args, device, args.precision)
        if args.prompt:
            check_prompts(args.prompt, args.words, args.config["tokens"])
    by_data = argparse.Namespace(**{**vars(args), "prompt": None})       # measured on the data's captions
    if args.search and rank == 0:
        search(by_data, net, device)
    if world > 1:
        dist.barrier()
    if args.search:
        args.plan = by_data.plan = args.plans / "plan.json"
    if args.sample:
        plans, n, begun = get_plans(args), args.n or 64, time.time()
        seeds, columns = range(args.seed, args.seed + n), 8 if len(plans) == 1 else n
        rows = [gather(sample(args, net, plan, seeds[rank::world], device), world) for plan in plans]
        if rank == 0:
            path = Path(args.out) / "samples.png"
            save_grid(path, torch.cat(rows), columns)
            print(f"{len(plans)} x {n} images, {time.time() - begun:.1f} s: {path}")
    if args.evaluate:
        by_data.n = args.n or 2000
        evaluate(by_data, net, device, rank, world)
    if args.profile and rank == 0:
        save_profile(args, net, unet, device)
    if args.ledger and rank == 0:
        ledger(HERE / "results" / SCRIPT / "ledger.json")
    if args.pipeline and rank == 0:
        sample_pipeline(args, device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{SCRIPT}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{SCRIPT}: interrupted; a training run goes on with --train --resume")
