"""PostDiff: Fewer Denoising Steps or Cheaper Per-Step Inference (arXiv 2508.06160).

A text-to-image model becomes cheaper without training by fewer steps or, in PostDiff, by cheaper ones.
Mixed resolution: the first share s of the steps runs on a smaller image, whose predicted x0 is up-sampled and
re-noised. Hybrid caching: the deep part of the U-Net runs every k-th step (DeepCache); after the share m of the
steps guidance ends, and every cross-attention gives what it last gave for the text.

    python postdiff.py --sample --prompt "cat face" "Rainbow flag!"         # a third of the MACs
    python postdiff.py --sample --method base                # off switch: plain guidance
    python postdiff.py --search --sample                     # calibration: steps, s, by caption score
    python postdiff.py --train --out runs/base               # from scratch
    python postdiff.py --train --init runs/base/checkpoint.pt --low-share 0.5 --lr 3e-4 --out runs/tuned     # App. F
    torchrun --nproc_per_node=2 -- postdiff.py --train       # two processes or GPUs

Symbols: T (denoising steps) -> K, their sequence -> taus; alpha_t -> alpha_bar; x_T^l -> low_noise; Eq. 5's eps ->
noise; c -> text; null text -> null; CA_cache -> frozen; beta, s, k, m, w as in the paper (s, m: shares, m = 15 of 20:
.75; n_low, n_guided: numbers); alpha_bar[-1] = 1: clean data. (D1), ...: open, or changed: results/postdiff/README.md.
"""
import copy
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (LossModule, add_noise, autocast, begin_run, caption_score, captions_of, count_macs, extract,
                    find_plan, gather, linear_alpha_bar, load_checkpoint, load_extractor, load_images, load_weights,
                    locked, noise_for, parse_config, progress, restore, run_main, save_grid, save_json, save_run,
                    save_samples, scale_and_sigma, start_device, to_float, to_uint8)

SCRIPT = "postdiff"
T = 1000                       # diffusion steps; linear beta 1e-4 .. 0.02 (DDPM)
WORDS, C_TEXT = 12, 64         # words of a caption; width of the text's features (D14)
DROP = 0.1                     # share of captions replaced by the null text, for guidance (D14)
BUDGET, REFERENCE_STEPS = 0.4, 20                      # calibration: share of 20 steps' MACs (D10)
STEPS, SHARES = (6, 8, 12, 16, 20), (0, 0.25, 0.5)     # tried: K, s
CALIBRATION, CALIBRATION_SEED = 250, 10 ** 9           # its images, first seed
ORDER = {"ddim": 1, "dpm2": 2}                         # of the solvers; dpm2: DPM-Solver++ 2M
CHOICES = ("cond", "ave", "uncond", "cfg", "none")     # Sec. 2.5; none: no cache
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
    },
    "training": {
        "data":       ("emoji", None, "emoji, twemoji, noto, fashion10k, fashion, cifar10 or a folder"),
        "init":       ("", None, "checkpoint whose averaged weights are trained further"),
        "batch":      (128, (1, 10 ** 6), "images per step, all processes together"),
        "lr":         (1e-3, (1e-9, 1), "Adam's learning rate"),
        "iters":      (5000, (1, 10 ** 8), "steps"),
        "ema":        (0.999, (0, 1), "decay of the averaged weights"),
        "low_share":  (0.0, (0, 0.99), "METHOD: s of Appendix F's fine-tuning; 0: none"),
        "save_every": (500, (1, 10 ** 8), "steps between checkpoints"),
    },
    "method": {
        "method":     ("postdiff", ("base", "mixed", "cache", "postdiff"), "base (off switch), mixed, cache, postdiff"),
        "solver":     ("ddim", tuple(ORDER), "ddim, dpm2 (DPM-Solver++ 2M)"),
        "prompt":     ([""], None, "texts, in turn; default: the captions"),
        "steps":      (20, (0, T), "steps, K; 0: steps and s as --search found them"),
        "s":          (0.5, (0, 0.99), "share of steps at low resolution, the first ones"),
        "beta":       (0.5, (0.01, 1), "low resolution, as a share of the full one"),
        "k":          (2, (1, T), "every k-th pass is a full one"),
        "m":          (0.75, (0, 1), "share of steps with guidance, the first ones"),
        "choice":     ("cond", CHOICES, f"cross-attention that is cached then: {', '.join(CHOICES)}"),
        "w":          (3.0, (0, 100), "guidance weight"),
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


class CrossAttention(nn.Module):       # METHOD: all of it
    """The pixels look at the text's features (B, L, C_TEXT), one head (D13); the output is noted in the dict `used`. An
    earlier one in `cross`, (B, c, h, w), is used instead, resized if made at low resolution (D7)."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm, self.q, self.kv = nn.GroupNorm(groups, c, eps=1e-6), nn.Conv2d(c, c, 1), nn.Linear(C_TEXT, 2 * c)
        self.out = nn.Conv2d(c, c, 1)

    def forward(self, h, text, cross, used):
        x = cross.get(self)
        if x is None:
            q, (k, v) = self.q(self.norm(h)).flatten(2).transpose(1, 2), self.kv(text).chunk(2, dim=-1)
            x = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])     # (B, 1, H W, C)
            x = self.out(x[:, 0].transpose(1, 2).reshape(h.shape))
        elif x.shape[-2:] != h.shape[-2:]:
            x = F.interpolate(x, size=h.shape[-2:], mode="bilinear", align_corners=False)
        used[self] = x
        return h + x


class TextEncoder(nn.Module):          # METHOD: all of it
    """Word numbers (B, L), 0 for padding, -> features (B, L, C_TEXT): word plus position (D14)."""

    def __init__(self, words):
        super().__init__()
        self.word, self.position = nn.Embedding(words + 1, C_TEXT), nn.Parameter(0.1 * torch.randn(WORDS, C_TEXT))
        self.norm = nn.LayerNorm(C_TEXT)

    def forward(self, text):
        return self.norm(self.word(text) + self.position)


def down(c):
    """Half the resolution by a strided convolution; padded on the right and below, as in the original DDPM."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2))


def up(c):
    """Twice the resolution: pixels repeated, then a convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1))


def run_layers(layers, h, emb):
    """The layers in turn. METHOD: emb is (emb, text, cross, used), see CrossAttention."""
    emb, *caches = emb                                         # METHOD
    for layer in layers:
        if isinstance(layer, CrossAttention):                  # METHOD
            h = layer(h, *caches)                              # METHOD
            continue                                           # METHOD
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
                attend += [CrossAttention(ch * m, groups) for _ in attend]     # METHOD
                self.down.append(nn.ModuleList([ResBlock(c, ch * m, c_emb, groups), *attend]))
                c = ch * m
                self.widths.append(c)
            if level < len(mult) - 1:
                self.down.append(nn.ModuleList([down(c)]))
                self.widths.append(c)
        self.mid = nn.ModuleList([ResBlock(c, c, c_emb, groups), Attention(c, groups), ResBlock(c, c, c_emb, groups)])
        self.mid.insert(2, CrossAttention(c, groups))          # METHOD

    def forward(self, xt, emb, deep=None, depth=1):        # METHOD
        skips = [self.conv_in(F.pixel_unshuffle(xt, self.patch))]
        for layers in self.down if deep is None else self.down[:depth]:         # METHOD: a shallow pass has fewer
            skips.append(run_layers(layers, skips[-1], emb))
        if deep is not None:                                   # METHOD
            return deep, skips                                 # METHOD
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
                attend += [CrossAttention(ch * m, groups) for _ in attend]     # METHOD
                rise = [up(ch * m)] if level > 0 and block == blocks else []
                self.up.append(nn.ModuleList([ResBlock(c + widths.pop(), ch * m, c_emb, groups), *attend, *rise]))
                c = ch * m
        self.norm_out, self.conv_out = nn.GroupNorm(groups, c, eps=1e-6), nn.Conv2d(c, channels * patch ** 2, 3, 1, 1)

    def forward(self, h, skips, emb, depth=1):             # METHOD
        for layers, skip in zip(self.up[-len(skips):], reversed(skips)):        # METHOD
            if layers is self.up[-1 - depth]:                  # METHOD: what DeepCache keeps enters it
                deep = h                                       # METHOD
            h = run_layers(layers, torch.cat([h, skip], dim=1), emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch), deep      # METHOD


class UNet(nn.Module):
    """x0_hat (B, C, H, W) from xt (B, C, H, W), t (B,), text (B, L). Fully convolutional: H and W are any multiples of
    patch * 2^(levels - 1). Attention is tied to levels, not sizes: the same weights run at every resolution."""

    def __init__(self, channels, ch, mult, blocks, attention, patch, words):           # METHOD
        super().__init__()
        self.ch = ch
        self.emb = nn.Sequential(nn.Linear(ch, 4 * ch), nn.SiLU(), nn.Linear(4 * ch, 4 * ch))
        self.encoder = Encoder(channels, ch, mult, blocks, attention, patch)
        self.decoder = Decoder(channels, self.encoder.widths, ch, mult, blocks, attention, patch)
        self.text = TextEncoder(words)                         # METHOD

    def forward(self, xt, t, text, deep=None, cross=None, depth=1):
        """Returns x0_hat, deep, cross. METHOD: Sec. 2.5: the caches go in and come out. deep: the last input of
        decoder.up[-1 - depth]: given, only conv_in, encoder.down[:depth] and decoder.up[-1 - depth:] run (D5). cross:
        {layer: output} of cross-attentions to be reused; out come all that took part."""
        emb = self.emb(timestep_embedding(t, self.ch))
        emb = F.silu(emb)
        emb = emb, self.text(text), cross or {}, (used := {})  # METHOD
        return *self.decoder(*self.encoder(xt, emb, deep, depth), emb, depth), used


def build_net(config):
    """The network of a configuration, on the CPU."""
    net = UNet(config["channels"], *(config[k] for k in ("ch", "mult", "blocks", "attention", "patch")),
               words=len(config["words"]))                     # METHOD
    return net.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------
# Method: hybrid caching (Sec. 2.5), switch of resolution (Sec. 2.2), one step each
# ---------------------------------------------------------------------------------------------
EMPTY = dict(size=None, age=0, deep=None, last={}, frozen={})


def cached_eps(net, xt, t, text, null, w, cache, k=1, depth=1):
    """METHOD: Sec. 2.5, Eq. 6: eps_hat of one step, and the cache for the next.

    net(xt, t, text, deep=, cross=, depth=) -> eps_hat, deep, cross: model_of a UNet. text, null: what it takes
    (B, L, ...). w: guidance weight; None: the text's half alone. cache: EMPTY at first, then what the last call
    returned; it is not changed. size: of the input; age: calls since (and with) the last full pass; deep: its deep
    features; last: all cross-attentions' last outputs; frozen: of these, CA_cache."""
    xt, t, text = (xt, t, text) if w is None else (torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([null, text]))
    full = cache["age"] == k or cache["size"] != xt.shape                      # D4, D6
    eps_hat, deep, used = net(xt, t, text, deep=None if full else cache["deep"], cross=cache["frozen"], depth=depth)
    cache = dict(size=xt.shape, age=1 if full else cache["age"] + 1, deep=deep, last={**cache["last"], **used},
                 frozen={i: used.get(i, old) for i, old in cache["frozen"].items()})    # resized once (D7)
    if w is not None:
        eps_null, eps_text = eps_hat.chunk(2)
        eps_hat = eps_null + w * (eps_text - eps_null)
    return eps_hat, cache


def choose(out, choice, w):
    """METHOD: CA_cache of Sec. 2.5 from a pair [null, text] of outputs (2 B, ...): one (B, ...)."""
    null, text = out.chunk(2)
    return {"cond": text, "uncond": null, "ave": (null + text) / 2, "cfg": null + w * (text - null)}[choice]


def freeze_cross(cache, choice, w):
    """METHOD: Sec. 2.5: from now on every cross-attention gives its last output. w None: there are no pairs (D8)."""
    return dict(cache, frozen={i: out if w is None else choose(out, choice, w) for i, out in cache["last"].items()})


def switch_resolution(x0_hat, eps, t, alpha_bar):
    """METHOD: Eq. 4, 5: x0_hat of the low resolution (B, C, r, r) -> xt of the full one (B, C, R, R): bilinear
    up-sampling, then fresh noise eps of step t (B,), the next one (D2)."""
    up = F.interpolate(x0_hat, size=eps.shape[-2:], mode="bilinear", align_corners=False)
    return add_noise(up, eps, t, alpha_bar)


# ---------------------------------------------------------------------------------------------
# Data and loss
# ---------------------------------------------------------------------------------------------
def words_of(text):
    """The words of a text: "Rainbow Flag!" -> ["rainbow", "flag"]."""
    return re.findall(r"[^\W_]+", text.lower().replace("'", ""))


def encode(captions, words):
    """Captions -> word numbers (N, WORDS), 1 for words[0], 0 for padding; and the words left out."""
    number, rows, left_out = {word: i for i, word in enumerate(words, 1)}, [], []
    for caption in captions:
        known = [word for word in words_of(caption) if word in number]
        left_out += [word for word in words_of(caption) if word not in known[:WORDS]]
        rows.append(([number[word] for word in known] + [0] * WORDS)[:WORDS])
    return torch.tensor(rows), list(dict.fromkeys(left_out))


def check_config(config):
    """Raises ValueError if the sizes in config do not fit each other."""
    multiple = config["patch"] * 2 ** (len(config["mult"]) - (config["low_share"] == 0))
    if config["res"] % multiple:
        raise ValueError(f"the resolution {config['res']} must be a multiple of {multiple} (--mult, --patch)")


def load_data(config):
    """Images uint8 (N, C, R, R), reduced to --res, and captions' numbers (N,) of --data; notes shape, captions and
    words (of --init, if given) in config."""
    x, y, captions = load_images(config["data"], config["res"])
    check_config(config)
    if config.get("search") or config.get("sample"):           # after this training
        check_options(config)
    if x.shape[-1] % (R := config["res"]):
        raise ValueError(f"--res {R} must divide {x.shape[-1]}")
    x = F.avg_pool2d(x.float(), x.shape[-1] // R).round().to(torch.uint8)
    words = sorted({word for caption in captions for word in words_of(caption)})
    if not words:
        raise ValueError(f"{config['data']} has no captions: put its images into folders named after them")
    if "words" not in config and config["init"]:
        words = load_checkpoint(config["init"], SCRIPT)["config"]["words"]
        if unknown := [s for s in captions if not set(words_of(s)) & set(words)]:
            raise ValueError(f"--init knows no word of '{unknown[0]}': train anew")
    config.update(channels=x.shape[1], captions=captions, words=config.get("words", words))
    return x, y


def draw_batch(config, x, y, step):
    """Every random input of a training step, on the CPU, for the whole batch."""
    B, first, last = config["batch"], 0, T
    i = torch.randint(0, len(x), (B,))
    x0, (text, _) = to_float(x[i]), encode([config["captions"][c] for c in y[i].tolist()], config["words"])
    text[torch.rand(B) < DROP] = 0                             # METHOD
    if s := config["low_share"]:                               # METHOD: App. F, a fixed schedule (D12)
        low, edge = torch.rand(()) < s, T - max(1, share_of(s, T))
        x0, first, last = (F.avg_pool2d(x0, 2), edge, T) if low else (x0, 0, edge)
    return x0, torch.randint(first, last, (B,)), torch.randn_like(x0), text


def eps_of_x0(x0_hat, xt, t, alpha_bar):
    """eps_hat of a network that predicts x0 (D16)."""
    scale, sigma = scale_and_sigma(t, alpha_bar, xt)
    return (xt - scale * x0_hat) / sigma


def training_loss(net, config, x0, t, eps, text):
    """Mean squared error of x0_hat over max(sigma, 0.1): that of v_hat, but for the last noise (D16)."""
    alpha_bar = linear_alpha_bar(T)
    _, sigma = scale_and_sigma(t, alpha_bar, x0)
    x0_hat, _, _ = net(add_noise(x0, eps, t, alpha_bar), t, text)
    return ((x0_hat.float() - x0) / sigma.clamp(min=0.1)).square().mean()


def preview(net, config, device):
    """32 images of a network in training, by ten passes."""
    config = dict(config, method="base", solver="dpm2", steps=10, prompt=[""])
    return generate(net, config, plan_of(config), range(32), device)


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------
def solver_step(xt, history, t_next, alpha_bar, order):
    """xt at the next step t_next (int64 (B,); -1 is clean data); history: [(t, x0_hat), ...], newest first.

    Order 1 is DDIM (eta = 0), which keeps the eps that x0_hat implies. Order 2 is DPM-Solver++ 2M: DDIM with x0_hat
    extrapolated, by half of the step in lambda = log(alpha / sigma), from its last two values (D3)."""
    t, x0_hat = history[0]
    a, a_next = (alpha_bar[s].view(-1, 1, 1, 1) for s in (t, t_next))          # float64, on the CPU
    c = ((1 - a_next) / (1 - a)).sqrt()
    if order == 2:
        t_past, x0_past = history[1]
        lam_past, lam, lam_next = (alpha_bar[s].view(-1, 1, 1, 1).logit() / 2 for s in (t_past, t, t_next))
        x0_hat = x0_hat + ((lam_next - lam) / (lam - lam_past) / 2).to(xt) * (x0_hat - x0_past)
    return c.to(xt) * xt + (a_next.sqrt() - c * a.sqrt()).to(xt) * x0_hat


@torch.no_grad()
def mixed_resolution_sample(net, noise, taus, alpha_bar, text, null, w, n_low=0, low_noise=None, k=1, depth=1,
                            n_guided=None, choice="cond", order=1, trace=None):
    """METHOD: PostDiff: K = len(taus) steps to clean data, the first n_low of them on low_noise's resolution.

    net, text, null, w: see cached_eps. noise (B, C, R, R): the start, or with n_low > 0 what is added at the switch;
    low_noise (B, C, r, r): the start then. taus: strictly descending steps in 0 .. T - 1, all evaluated, then t = -1.
    k, depth: every k-th step a full pass (D4, D6), else a shallow one (D5). n_guided: steps with guidance, the
    first ones (None: all); then cross-attentions are frozen by `choice` ("none": not). order: 1 DDIM, 2 DPM-Solver++
    2M. trace(i, xt, x0_hat, cache): called after each evaluation. n_low=0, k=1, n_guided=None: plain classifier-free
    guidance. Raises ValueError if a number does not fit."""
    K, n_guided, taus = len(taus), len(taus) if n_guided is None else n_guided, [int(t) for t in taus]
    if any(a <= b for a, b in zip([len(alpha_bar) - 1, *taus], [*taus, -1])):
        raise ValueError(f"the steps must fall strictly, in {len(alpha_bar) - 2} .. 0: {taus}")
    if not (0 <= n_low < K and 0 <= n_guided <= K and k >= 1 and k == int(k) and choice in CHOICES):
        raise ValueError(f"n_low {n_low} (--s), n_guided {n_guided}, k {k} or choice {choice} does not fit {K} steps")
    if alpha_bar[-1] != 1 or (n_low and low_noise is None):
        raise ValueError("alpha_bar must end in 1 (linear_alpha_bar), n_low > 0 needs low_noise")
    xt, history, cache = low_noise if n_low else noise, [], EMPTY
    for i in range(K):
        t, t_next = (torch.as_tensor(s).expand(len(xt)) for s in (taus[i], [*taus, -1][i + 1]))
        if i == n_guided and choice != "none":
            cache = freeze_cross(cache, choice, w)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        eps_hat, cache = cached_eps(net, xt, t.to(xt.device), text, null, w if i < n_guided else None, cache, k, depth)
        x0_hat = (1 / a).sqrt().to(xt) * xt - (1 / a - 1).sqrt().to(xt) * eps_hat      # not clipped (D9)
        history = [(t, x0_hat), *history][:2]
        if trace:
            trace(i, xt, x0_hat, cache)
        if i == n_low - 1:
            xt, history = switch_resolution(x0_hat, noise, t_next, alpha_bar), []      # D3
        else:
            xt = solver_step(xt, history, t_next, alpha_bar, 1 if i == K - 1 else min(order, len(history)))
    return xt


def uniform_steps(first, K):
    """K descending steps from `first` down, trailing: multiples of (first + 1) / K, less 1 (D1)."""
    return [int((first + 1) * (K - i) / K - 0.5) for i in range(K)]


def share_of(share, K):
    """round(share * K), half up (D1)."""
    return int(share * K + 0.5)


def model_of(net, config):
    """The network as cached_eps calls it."""
    def cached_net(xt, t, text, **caches):
        with autocast(xt.device, config["precision"]):
            x0_hat, deep, cross = net(xt.contiguous(memory_format=torch.channels_last), t, text, **caches)
        return eps_of_x0(x0_hat.float(), xt, t, linear_alpha_bar(T)), deep, cross
    return cached_net


def generate(net, config, plan, seeds, device):
    """Images (n, C, R, R) of a plan, one for each seed."""
    text, left_out = encode(captions_of(config, seeds), config["words"])
    if left_out:
        print(f"left out, unknown or beyond {WORDS} words: {', '.join(left_out[:5])}", file=sys.stderr)
    if any(config["prompt"]) and not text.any(1).all():
        raise ValueError("a --prompt has no word that this network knows")
    noise, low_noise = noise_for(seeds, *((config["channels"], r, r) for r in (config["res"], plan["low"])))
    text = text.to(device)
    return mixed_resolution_sample(
        model_of(net, config), noise.to(device), plan["taus"], linear_alpha_bar(T), text, torch.zeros_like(text),
        plan["w"], plan["n_low"], low_noise.to(device), plan["k"], plan["depth"], plan["n_guided"], plan["choice"],
        ORDER[plan["solver"]])


def sample(net, config, plan, seeds, device):
    """uint8 images (n, C, R, R) on the CPU, seed by seed: seed i makes image i, whatever the batch."""
    if not len(seeds):                                         # a process without a share of them
        return sample(net, config, plan, [0], device)[:0]
    batches = torch.tensor(list(seeds)).split(16 if str(device) == "cpu" else 250)
    return torch.cat([to_uint8(generate(net, config, plan, batch.tolist(), device)).cpu()
                      for batch in progress(batches, "sample", len(batches[0]))])


# ---------------------------------------------------------------------------------------------
# Search: calibration (Sec. 2.4)
# ---------------------------------------------------------------------------------------------
def calibrate(plans, cost, score, budget):
    """METHOD: Sec. 2.4, App. D: the plan of the best score(plan), on a small set, among those of cost(plan) <= budget;
    of equal scores the cheapest (D10). Returns it and [(plan, cost, score), ...]. ValueError if none fits."""
    tried = [(plan, cost(plan)) for plan in plans]
    tried = [(plan, c, score(plan)) for plan, c in tried if c <= budget]
    if not tried:
        raise ValueError(f"no setting is within budget {budget}")
    return max(tried, key=lambda row: (row[2], -row[1]))[0], tried


def plan_of(config):
    """The options as numbers of mixed_resolution_sample: a plan."""
    method, K, low = config["method"], config["steps"], config["res"] * config["beta"]
    mixed, cached = method in ("mixed", "postdiff"), method in ("cache", "postdiff")
    if mixed and low % (multiple := config["patch"] * 2 ** (len(config["mult"]) - 1)):
        raise ValueError(f"--beta {config['beta']} of {config['res']} pixels: {low} is no multiple of {multiple}")
    return dict(method=method, solver=config["solver"], w=config["w"], taus=uniform_steps(T - 1, K), low=int(low),
                n_low=share_of(config["s"], K) if mixed else 0, k=config["k"] if cached else 1, depth=1,
                n_guided=share_of(config["m"], K) if cached else K, choice=config["choice"] if cached else "none")


def check_options(config):
    """Raises ValueError for an option without use."""
    given, method = config.get("given", set()), config["method"]
    unused = {"base": "s beta k m choice", "mixed": "k m choice", "cache": "s beta"}.get(method, "")
    if found := given & set(unused.split()):
        raise ValueError(f"--{min(found)} is of no use to --method {method}")
    if "prompt" in given and not (config["sample"] and all(config["prompt"]) and len(config["prompt"]) <= config["n"]):
        raise ValueError(f"--prompt: with --sample, at most --n {config['n']} texts")
    told, search = config["steps"] and "steps" in given, config.get("search")
    if "s" in given and (search or not config["steps"]) or search and told:
        raise ValueError("--search finds --steps and --s")


def plan_name(config):
    """The name of a searched plan says what made it."""
    keys = ("method", "solver", "beta", "k", "m", "choice", "w")
    return f"plan_{'_'.join(str(config[k]) for k in keys)}.json"


def search(net, config, device):
    """METHOD: Sec. 2.4: K and s calibrated by caption score: the plan of --method, written into --out and returned."""
    check_options(config)
    extractor, name = load_extractor(config["data"], device)
    config, meta = dict(config, prompt=[""]), copy.deepcopy(net).to("meta")
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + CALIBRATION)

    def macs(plan):
        return count_macs(lambda: generate(meta, dict(config, precision="fp32"), plan, [0], "meta"))

    def score(plan):
        x = sample(net, config, plan, seeds, device)
        x = F.interpolate(x.float(), size=32 * extractor.patch, mode="bilinear").round().to(torch.uint8)
        return caption_score(extractor, extract(extractor, x)[1], captions_of(config, seeds))

    full = macs(plan_of(dict(config, method="base", steps=REFERENCE_STEPS)))
    plans = [plan_of(dict(config, steps=K, s=s)) for K in STEPS for s in SHARES]
    plans = [plan for i, plan in enumerate(plans) if plan not in plans[:i]]    # base, cache: no s
    plan, tried = calibrate(plans, lambda plan: macs(plan) / full, score, BUDGET)
    for found, cost, value in tried:
        print(f"{100 * cost:.1f} % of the MACs, caption score[{name}] {value:.4f}: {describe(found)}")
    plan.update(step=config["step"], network=config.get("digest"))
    save_json(Path(config["out"]) / plan_name(config), plan)
    return plan


def describe(plan):
    """A plan in words, as --sample prints it."""
    return (f"{plan['method']}, {plan['solver']}: {plan['taus']}, {plan['n_low']} at size {plan['low']}; "
            f"k {plan['k']}; {plan['n_guided']} guided by {plan['w']}, then {plan['choice']}")


def make_plan(net, config, device):
    """The plan of the options; --steps 0: one that was searched with them and this network, else it is searched now."""
    check_options(config)
    if config["steps"]:
        return plan_of(config)
    plan = find_plan(config, plan_name(config), plan_of(dict(config, method="base", steps=1)))
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
