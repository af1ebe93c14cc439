"""C2F-TRD: Efficient Coarse-to-Fine Diffusion Models with Time Step Sequence Redistribution (arXiv 2603.21348).

The first steps of a diffusion sampler produce blur: make a small image instead, up-sample it, add noise up to step t*
and go on from there at full resolution (C2F). One network does both resolutions, told which by a label; t* is where the
low-resolution images that it predicts have their lowest rank. Then choose the few steps worth taking (TRD): move one
step after the other, between its neighbours, whenever 16 images come closer to those of 100 steps.

    python c2f_trd.py --sample                               # 64 images from the shipped weights
    python c2f_trd.py --sample --method base --solver ddim --steps 100      # off switch: plain DDIM
    python c2f_trd.py --search --sample --steps 8            # the paper's search for 8 high-resolution steps
    python c2f_trd.py --train --out runs/base                # the base model, from scratch
    python c2f_trd.py --train --init runs/base/checkpoint.pt --low 8 --lr 3e-4 --sample --out runs/two     # C2F, TRD
    torchrun --nproc_per_node=2 -- c2f_trd.py --train        # two processes, or two GPUs

Symbols: t_T .. t_0 -> taus[0] .. taus[-1], K falling steps, all evaluated (D2); K: the paper's T, not our T = 1000; its
i runs the other way; after t_0 comes clean data, its x_t0, ours x0 at t = -1, alpha_bar[-1] = 1; T^c, T^f -> low_steps,
steps; t_T^f -> high_taus[0]; t* -> t_star; x_hat^i_t0 -> x0_hat; x_bar_t0 -> x0 between the stages; C_i, n ->
candidate_steps, n. (D1), (D2), ...: what the paper leaves open, or we change, results/c2f_trd/README.md.
"""
import copy
import itertools
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (LossModule, add_noise, autocast, begin_run, find_plan, gather, linear_alpha_bar, load_images,
                    load_weights, locked, noise_for, parse_config, progress, restore, run_main, save_grid, save_json,
                    save_run, save_samples, scale_and_sigma, start_device, to_float, to_uint8)

SCRIPT = "c2f_trd"
T = 1000                       # diffusion steps; linear beta 1e-4 .. 0.02 (DDPM)
CALIBRATION = 16               # samples of the TRD loss (Sec. IV)
CANDIDATES = 5                 # n of Eq. 3 (Sec. IV)
SWEEPS = 10                    # maximum iteration (Sec. IV)
REFERENCE_STEPS = 100          # of the reference model (Sec. III-B)
VARIANCE = 0.99                # share of the variance that defines the cut index (Fig. 5)
PCA = 1024                     # samples of the transition step's PCA (D3)
CALIBRATION_SEED, PCA_SEED = 10 ** 9, 3 * 10 ** 9              # far from usual seeds
ORDER = {"ddim": 1, "dpm2": 2}                                 # of the solvers; dpm2: DPM-Solver++ 2M
POWERS = {"inclusive": None, "exclusive": 1}                   # p of uniform_steps
BEST_OF = (None, 1, 1.25, 1.5, 1.75, 2, 2.5)                   # the powers that --start best compares (D12)
SHIPPED = {"base": "base.pt", "trd": "base.pt"}                # weights of a method, if not weights.pt
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
        "low":        (0, (0, 1024), "METHOD: side of the low resolution; 0: the base model, of one resolution"),
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
    },
    "method": {
        "method":     ("c2f+trd", ("base", "trd", "c2f", "c2f+trd"), "base (off switch), trd, c2f, c2f+trd"),
        "solver":     ("dpm2", tuple(ORDER), "ddim, dpm2 (DPM-Solver++ 2M)"),
        "steps":      (5, (1, T), "steps at full resolution, T^f"),
        "low_steps":  (10, (1, T), "steps at low resolution, T^c"),
        "t_star":     (0, (0, T - 1), "first step at full resolution, before TRD; 0: by PCA (III-A3)"),
        "start":      ("inclusive", tuple(POWERS) + ("best",), "initial steps: inclusive (D1), exclusive, best (D12)"),
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
        groups, c_emb = min(32, ch // 4), 4 * ch
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
    """v_hat (B, C, H, W) from xt (B, C, H, W) and t (B,). Fully convolutional: H and W are any multiples of
    patch * 2^(levels - 1). Attention is tied to levels, not to sizes, so that the same weights run at every
    resolution. labels: number of resolutions, told by y (B,)."""

    def __init__(self, channels, ch, mult, blocks, attention, patch, labels=0):
        super().__init__()
        self.ch = ch
        self.emb = nn.Sequential(nn.Linear(ch, 4 * ch), nn.SiLU(), nn.Linear(4 * ch, 4 * ch))
        self.encoder = Encoder(channels, ch, mult, blocks, attention, patch)
        self.decoder = Decoder(channels, self.encoder.widths, ch, mult, blocks, attention, patch)
        if labels:                                             # METHOD: III-A2, one embedding per resolution,
            self.label = nn.Embedding(labels, 4 * ch)          # METHOD: zero at first: the base model (D4)
            nn.init.zeros_(self.label.weight)

    def forward(self, xt, t, y=None):
        emb = self.emb(timestep_embedding(t, self.ch))
        if y is not None:                                      # METHOD: III-A2, added to the time embedding
            emb = emb + self.label(y)
        emb = F.silu(emb)
        return self.decoder(*self.encoder(xt, emb), emb)


def build_net(config):
    """The network of a configuration, on the CPU."""
    net = UNet(config["channels"], *(config[k] for k in ("ch", "mult", "blocks", "attention", "patch")),
               labels=2 if config["low"] else 0)               # METHOD: y: 0 low, 1 high resolution
    return net.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------
# Method: from one resolution to the other (Sec. III-A1), candidates of a step (Sec. III-B)
# ---------------------------------------------------------------------------------------------
def renoise(x0, eps, t, alpha_bar):
    """METHOD: III-A1: x0 of the low resolution (B, C, r, r) -> xt of the full one (B, C, R, R): up-sampled, bilinear
    (D6), then noised to step t (int or (B,)) with the given eps."""
    x0 = F.interpolate(x0, size=eps.shape[-2:], mode="bilinear", align_corners=False)
    return add_noise(x0, eps, torch.as_tensor(t).expand(len(eps)), alpha_bar)


def candidate_steps(taus, i, n=CANDIDATES):
    """METHOD: Eq. 3: n steps that divide the gap between the neighbours of taus[i], rounded half up, without neighbours
    and taus[i] itself (keeping it needs no evaluation). The first and the last step divide the gap to their only
    neighbour, so they can only move inwards (D2). A single step has the whole range."""
    above, below = taus[max(i - 1, 0)], taus[min(i + 1, len(taus) - 1)]
    if len(taus) == 1:
        above, below = T, -1
    steps = {math.floor(below + j * (above - below) / (n + 1) + 0.5) for j in range(1, n + 1)}
    return sorted(steps - {above, below, taus[i]})


# ---------------------------------------------------------------------------------------------
# Data and loss
# ---------------------------------------------------------------------------------------------
def check_config(config):
    """Raises ValueError if the sizes in config do not fit each other."""
    R, low, multiple = config["res"], config["low"] or config["res"], config["patch"] * 2 ** (len(config["mult"]) - 1)
    if R % low or low % multiple or low == R and config["low"]:
        told = f" and --low {low}, a smaller divisor of it," if config["low"] else ""
        raise ValueError(f"the resolution {R}{told} must be multiples of {multiple} (--mult, --patch)")


def load_data(config):
    """Images uint8 (N, C, R, R) and classes (N,) of --data; notes their shape in config."""
    x, y, _ = load_images(config["data"], config["res"])
    config.update(channels=x.shape[1], res=x.shape[-1])
    check_config(config)
    if config.get("search") or config.get("sample"):           # after this training
        check_method(config)
    return x, y


def draw_batch(config, x, y, step):
    """Every random input of a training step, on the CPU, for the whole batch; classes y are not used."""
    B, R, low = config["batch"], config["res"], config["low"]
    x0, t = to_float(x[torch.randint(0, len(x), (B,))]), torch.randint(0, T, (B,))
    if config["flip"]:
        x0 = torch.where(torch.rand(B, 1, 1, 1) < 0.5, x0.flip(-1), x0)
    if low and step % 2:                                       # METHOD: III-A2, in turn, area averages (D5)
        x0 = F.avg_pool2d(x0, R // low)
    return x0, t, torch.randn_like(x0)


def eps_of_v(v_hat, xt, t, alpha_bar):
    """eps_hat of a network that predicts v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (D11)."""
    scale, sigma = scale_and_sigma(t, alpha_bar, xt)
    return scale * v_hat + sigma * xt


def training_loss(net, config, x0, t, eps):
    """Mean squared error of v_hat. METHOD: III-A2, the label says high (1) or low resolution (0)."""
    alpha_bar, y = linear_alpha_bar(T), torch.full_like(t, int(x0.shape[-1] == config["res"]))
    scale, sigma = scale_and_sigma(t, alpha_bar, x0)
    v_hat = net(add_noise(x0, eps, t, alpha_bar), t, y if config["low"] else None)
    return F.mse_loss(v_hat.float(), scale * eps - sigma * x0)


def preview(net, config, device):
    """32 images of a network in training, by ten passes."""
    plan = dict(solver="dpm2", low_taus=[], high_taus=uniform_steps(T - 1, 10, 1))
    return generate(net, config, plan, range(32), device)


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------
def solver_step(xt, history, t_next, alpha_bar, order):
    """xt at the next step t_next (int64 (B,); -1 is clean data); history: [(t, x0_hat), ...], newest first.

    Order 1 is DDIM (eta = 0), which keeps the eps that x0_hat implies. Order 2 is DPM-Solver++ 2M: DDIM with x0_hat
    extrapolated, by half of the step in lambda = log(alpha / sigma), from its last two values (D7)."""
    t, x0_hat = history[0]
    a, a_next = (alpha_bar[s].view(-1, 1, 1, 1) for s in (t, t_next))          # float64, on the CPU
    c = ((1 - a_next) / (1 - a)).sqrt()                                        # sigma_next / sigma
    if order == 2:
        t_past, x0_past = history[1]
        lam_past, lam, lam_next = (alpha_bar[s].view(-1, 1, 1, 1).logit() / 2 for s in (t_past, t, t_next))
        x0_hat = x0_hat + ((lam_next - lam) / (lam - lam_past) / 2).to(xt) * (x0_hat - x0_past)
    return c.to(xt) * xt + (a_next.sqrt() - c * a.sqrt()).to(xt) * x0_hat


@torch.no_grad()
def dpm_solver_pp_sample(eps_model, xt, taus, alpha_bar, order=2, start=0, stop=None, history=(), trace=None):
    """DPM-Solver++ 2M from noise xt (B, C, H, W) at step taus[start] to clean data; order 1 is DDIM.

    eps_model(xt, t (B,) int64) -> eps_hat. taus: strictly descending steps in 0 .. T - 1, all evaluated, then t = -1;
    an entry may be a tensor (B,), a step for every sample. alpha_bar: linear_alpha_bar(T), which ends in 1. The first
    step and the last are of order 1 (D7). start, stop, history: to continue a run that was left before evaluation
    `start`, or to leave it before `stop`. trace(xt, history): called after each evaluation.
    Raises ValueError if the steps do not fall or alpha_bar does not end in 1."""
    plain = [int(t) for t in taus if not torch.is_tensor(t) or t.numel() == 1]
    if any(a <= b for a, b in zip(plain, plain[1:])):
        raise ValueError(f"the steps must fall strictly: {plain}")
    if plain and not 0 <= plain[-1] <= plain[0] < len(alpha_bar) - 1:
        raise ValueError(f"the steps must lie in 0 .. {len(alpha_bar) - 2}: {plain}")
    if alpha_bar[-1] != 1:
        raise ValueError("alpha_bar needs one more entry, 1, at its end: clean data (linear_alpha_bar)")
    for k in range(start, len(taus) if stop is None else stop):
        t, t_next = (torch.as_tensor(s).expand(len(xt)) for s in (taus[k], [*taus, -1][k + 1]))
        a = alpha_bar[t].view(-1, 1, 1, 1)
        eps_hat = eps_model(xt, t.to(xt.device))
        x0_hat = (1 / a).sqrt().to(xt) * xt - (1 / a - 1).sqrt().to(xt) * eps_hat      # not clipped (D9)
        history = [(t, x0_hat), *history][:2]
        if trace:
            trace(xt, history)
        xt = solver_step(xt, history, t_next, alpha_bar, 1 if k == len(taus) - 1 else min(order, len(history)))
    return xt


def c2f_sample(stages, sequences, alpha_bar, order=1, x0=None):
    """METHOD: III-A1, III-C: denoise at each resolution in turn. stages: [(eps_model, noise), ...], low to high;
    sequences: their taus. Between stages x0 is up-sampled and re-noised to the first step of the next sequence, and
    the solver's history starts anew (D7). x0: result of stages before, if any. One stage without x0 is plain sampling.
    Returns x0 at the last stage's resolution."""
    for (eps_model, noise), taus in zip(stages, sequences):
        xt = noise if x0 is None else renoise(x0, noise, taus[0], alpha_bar)
        x0 = dpm_solver_pp_sample(eps_model, xt, taus, alpha_bar, order)
    return x0


def uniform_steps(first, K, power=None):
    """K falling steps from `first` down: linspace to 0, both ends (D1), or, given a power p, first (1 - k / K)^p: p = 1
    is linspace(K + 1) without its 0, a larger p is denser next to the data (D12). Equal ones are pushed apart."""
    last = max(K - 1, 1)
    steps = [first * (K - k) ** power / K ** power if power else first * (last - k) / last for k in range(K)]
    steps = [int(step + 0.5) for step in steps]
    for k in reversed(range(K - 1)):
        steps[k] = max(steps[k], steps[k + 1] + 1)
    if steps[0] > first:
        raise ValueError(f"{K} different steps do not fit between {first} and 0")
    return steps


def model_of(net, config, label=None):
    """The network as an eps_model(xt, t) -> eps_hat, in parts of 256 images of 32x32; METHOD: told the resolution."""
    def eps_model(xt, t):
        eps_hat, part = [], max(1, 2 ** 18 // xt.shape[-1] ** 2)
        for x, s in zip(xt.split(part), t.split(part)):
            with autocast(xt.device, config["precision"]):
                v_hat = net(x.contiguous(memory_format=torch.channels_last), s,
                            None if label is None else torch.full_like(s, label))
            eps_hat.append(eps_of_v(v_hat.float(), x, s, linear_alpha_bar(T)))
        return torch.cat(eps_hat)
    return eps_model


def stages_of(net, config, plan, seeds, device):
    """The stages and sequences of c2f_sample for a plan."""
    high, low = ((config["channels"], r, r) for r in (config["res"], config["low"]))
    if not config["low"]:
        return [(model_of(net, config), noise_for(seeds, high).to(device))], [plan["high_taus"]]
    z_high, z_low = (z.to(device) for z in noise_for(seeds, high, low))        # METHOD: z_high: the base model's (D6)
    stages = [(model_of(net, config, 0), z_low), (model_of(net, config, 1), z_high)]
    sequences = [plan["low_taus"], plan["high_taus"]]
    return (stages, sequences) if plan["low_taus"] else (stages[1:], sequences[1:])        # preview: high only


def generate(net, config, plan, seeds, device):
    """Images (n, C, R, R) of a plan, one for each seed."""
    stages, sequences = stages_of(net, config, plan, seeds, device)
    return c2f_sample(stages, sequences, linear_alpha_bar(T), ORDER[plan["solver"]])


def sample(net, config, plan, seeds, device):
    """uint8 images (n, C, R, R) on the CPU, seed by seed: seed i makes image i, whatever the batch."""
    if not len(seeds):                                         # a process without a share of them
        return sample(net, config, plan, [0], device)[:0]
    batches = torch.tensor(list(seeds)).split(16 if str(device) == "cpu" else 250)
    return torch.cat([to_uint8(generate(net, config, plan, batch.tolist(), device)).cpu()
                      for batch in progress(batches, "sample", len(batches[0]))])


# ---------------------------------------------------------------------------------------------
# Search: transition step (Sec. III-A3) and time step sequence, TRD (Sec. III-B)
# ---------------------------------------------------------------------------------------------
def cut_index(x, share=VARIANCE):
    """METHOD: III-A3: smallest number of principal components with `share` of the variance of x (N, C, H, W)."""
    x = x.flatten(1).cpu().double()
    x = x - x.mean(0)
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T                     # same eigenvalues
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cumsum(0)
    return int((values < share * values[-1]).sum()) + 1


def transition_step(eps_model, noise, taus, alpha_bar, share=VARIANCE):
    """METHOD: III-A3: t*, the step at which the low-resolution prediction x0_hat has its lowest rank.

    eps_model: of the low resolution; noise (N, C, r, r), N >= 512 (fewer raise t*, D3); taus: 100 uniform
    steps. Returns t* (the first reached of equal ranks, D3) and the list of (t, cut index)."""
    ranks = []

    def note(xt, history):
        t, x0_hat = history[0]
        ranks.append((int(t[0]), cut_index(x0_hat, share)))

    dpm_solver_pp_sample(eps_model, noise, taus, alpha_bar, order=1, trace=note)
    return min(ranks, key=lambda pair: (pair[1], -pair[0]))[0], ranks


@torch.no_grad()
def trd_search(stages, sequences, x_ref, alpha_bar, order=1, x0=None, n=CANDIDATES, sweeps=SWEEPS):
    """METHOD: III-B, III-C: TRD. Substitutes step after step by the candidate whose samples come closest to the
    reference, if closer than before, until a sweep (the paper's iteration) changes nothing, or `sweeps` times.

    stages, sequences, x0: as in c2f_sample. An eps_model is called with up to n copies of the batch, one after the
    other: labels that it holds have to be repeated so.
    x_ref (B, C, R, R): samples of the reference model for the same noise. Loss: mean squared error.
    Steps are visited from the last one evaluated, t_0 of the last stage, to the first, t_T (D2), so one pass per sweep
    yields the states before all of them; only what follows the changed step is evaluated, all candidates in one batch.
    Returns the sequences and a report: loss after each sweep (the first entry: before), evaluations per sample of
    each stage, seconds of this function."""
    begun, B, S = time.time(), len(x_ref), len(stages)
    sequences, evaluations = [[int(t) for t in taus] for taus in sequences], [0] * S

    def counted(s, eps_model):
        def count(xt, t):
            evaluations[s] += len(xt) // B
            return eps_model(xt, t)
        return count

    def losses(x):                                                             # (m B, ...) -> (m,)
        return (x.view(-1, *x_ref.shape) - x_ref).square().flatten(1).mean(1).tolist()

    def tile(x, m):                                                            # m copies of the batch
        return x.repeat(m, *[1] * (x.dim() - 1))

    stages = [(counted(s, eps_model), noise) for s, (eps_model, noise) in enumerate(stages)]
    best = losses(c2f_sample(stages, sequences, alpha_bar, order, x0))[0]
    report = dict(loss=[best], evaluations=evaluations)
    for sweep in range(1, sweeps + 1):
        begins, states = [x0], []                              # x0 before stage s; (xt, history) at its evaluations
        for s, (eps_model, noise) in enumerate(stages):
            taus = sequences[s]
            states.append([])
            xt = noise if begins[s] is None else renoise(begins[s], noise, taus[0], alpha_bar)
            begins.append(dpm_solver_pp_sample(
                eps_model, xt, taus, alpha_bar, order, stop=len(taus) - 1 if s == S - 1 else None,
                trace=lambda *state: states[-1].append(state)))
        changed, positions = False, [(s, i) for s in reversed(range(S)) for i in reversed(range(len(sequences[s])))]
        for s, i in progress(positions, f"TRD sweep {sweep}", note=lambda: f"loss {best:.3e}"):
            taus, (eps_model, noise) = sequences[s], stages[s]                 # the list itself, changed below
            candidates = candidate_steps(taus, i, n)
            if not candidates:
                continue
            m, history = len(candidates), []
            t = torch.tensor(candidates).repeat_interleave(B)
            if i > 0:                                          # from the state before step i to each candidate
                xt, past = states[s][i - 1]
                xt, history = tile(xt, m), [(tile(t_past, m), tile(x, m)) for t_past, x in past]
                xt = solver_step(xt, history, t, alpha_bar, min(order, len(history)))
            elif begins[s] is None:
                xt = tile(noise, m)
            else:
                xt = renoise(tile(begins[s], m), tile(noise, m), t, alpha_bar)
            x = dpm_solver_pp_sample(eps_model, xt, [*taus[:i], t, *taus[i + 1:]], alpha_bar, order,
                                     start=i, history=history)
            later = [(model, tile(z, m)) for model, z in stages[s + 1:]]
            loss = losses(c2f_sample(later, sequences[s + 1:], alpha_bar, order, x0=x))
            j = min(range(m), key=loss.__getitem__)
            if loss[j] < best * (1 - 1e-6):                    # more than rounding (D2)
                best, taus[i], changed = loss[j], candidates[j], True
        report["loss"].append(best)
        if not changed:
            break
    return sequences, dict(report, seconds=round(time.time() - begun, 2))


def plan_name(config):
    """The file of a searched plan: its name says what made it."""
    keys = ["method", "solver", "start", "steps"] + ["low_steps", "t_star"] * ("c2f" in config["method"])
    return f"plan_{'_'.join(str(config[k]) for k in keys)}.json"


def check_method(config):
    """Raises ValueError if the network or an option does not fit --method."""
    if "c2f" not in config["method"] and config.get("given", set()) & {"low_steps", "t_star"}:
        raise ValueError("--low-steps and --t-star are of --method c2f and c2f+trd")
    if bool(config["low"]) != ("c2f" in config["method"]):
        kind = "the base model" if config["low"] else "two resolutions (--train --low 8 --init BASE)"
        raise ValueError(f"--method {config['method']} needs a network of {kind}: name its --checkpoint")


def search(net, config, device):
    """The plan of --method, written into --out and returned: METHOD: transition step (III-A3), uniform sequences
    (III-C), TRD (III-B)."""
    check_method(config)
    method, K, order, coarse = config["method"], config["steps"], ORDER[config["solver"]], bool(config["low"])
    alpha_bar, grid, spans = linear_alpha_bar(T), uniform_steps(T - 1, REFERENCE_STEPS), [(T - 1, K)]
    plan = dict(solver=config["solver"], step=config["step"], network=config.get("digest"))
    reference = dict(low_taus=[], high_taus=grid)
    if coarse:
        if not (t_star := config["t_star"]):
            seeds = range(PCA_SEED, PCA_SEED + PCA)
            stages, _ = stages_of(net, config, dict(low_taus=grid, high_taus=[]), seeds, device)
            t_star, plan["ranks"] = transition_step(*stages[0], grid, alpha_bar)
        plan["t_star"], spans = t_star, [(T - 1, config["low_steps"]), (t_star, K)]
        reference = dict(low_taus=grid, high_taus=[t for t in grid if t <= t_star])      # D10
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + CALIBRATION)
    stages, grids = stages_of(net, config, reference, seeds, device)
    if "trd" in method or config["start"] == "best":
        x_ref = c2f_sample(stages, grids, alpha_bar, order=1)  # DDIM, whatever --solver (D10)
    powers = BEST_OF if config["start"] == "best" else [POWERS[config["start"]]]
    starts = [[uniform_steps(*span, p) for span, p in zip(spans, ps)]
              for ps in itertools.product(powers, repeat=len(spans))]
    sequences = starts[0] if len(starts) == 1 else min(
        starts, key=lambda s: float((c2f_sample(stages, s, alpha_bar, order) - x_ref).square().mean()))
    if "trd" in method:
        sequences, report = trd_search(stages, sequences, x_ref, alpha_bar, order)
        print(f"TRD: loss {report['loss'][0]:.3e} -> {report['loss'][-1]:.3e} in {report['seconds']} s")
        plan.update(report)
    plan.update(low_taus=sequences[0] if coarse else [], high_taus=sequences[-1])
    save_json(Path(config["out"]) / plan_name(config), plan)
    return plan


def describe(plan):
    """A plan in words, as --sample prints it."""
    low = f"low {plan['low_taus']}, high " if plan["low_taus"] else ""
    return f"{plan['solver']}: {low}{plan['high_taus']}"


def make_plan(net, config, device):
    """The plan of --method: one that was searched with the same options and network, else it is searched now."""
    check_method(config)
    plan = find_plan(config, plan_name(config), dict(solver="", low_taus=[0], high_taus=[0]))
    return plan or search(net, config, device)


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
