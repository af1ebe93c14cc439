"""C2F-TRD's efficiency cells (arXiv 2603.21348): DDPM's networks for CIFAR-10 and LSUN-Church, with the paper's two
resolutions, and the MACs that c2f_trd.py's own sampler takes with them (python results/ledger.py c2f_trd)."""
import functools
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

from c2f_trd import c2f_sample, uniform_steps
from common import count_macs, linear_alpha_bar

# DDPM's networks: width, its multiples by level, level with attention; R: resolution (Sec. IV).
NETWORKS = {"CIFAR10": dict(R=32, ch=128, mult=(1, 2, 2, 2), attention=1),
            "LSUN-Church": dict(R=256, ch=128, mult=(1, 1, 2, 2, 4, 4), attention=4)}
T, T_STAR, LOW_STEPS, REFERENCE_STEPS = 1000, 565, 10, 100             # Sec. IV-A; of the reference, Sec. III-B


# ---------------------------------------------------------------------------------------------
# DDPM's U-Net
# ---------------------------------------------------------------------------------------------
class ResBlock(nn.Module):
    """norm - SiLU - conv, plus the time embedding, norm - SiLU - conv, plus the input."""

    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(32, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.emb(emb)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention over the pixels, one head."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(32, c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v)                            # (B, 1, H W, C)
        return x + self.out(h[:, 0].transpose(1, 2).reshape(x.shape))


class UNet(nn.Module):
    """DDPM's U-Net: eps_hat (B, 3, H, W) from xt (B, c_in, H, W) and t (B,); two residual blocks a level.
    labels: number of embeddings (high and low resolution, Sec. III-A2), told by y (B,)."""

    def __init__(self, ch, mult, attention, c_in=3, labels=0):
        super().__init__()
        c_emb, self.ch = 4 * ch, ch
        self.emb = nn.Sequential(nn.Linear(ch, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(labels, c_emb) if labels else None
        self.conv_in = nn.Conv2d(c_in, ch, 3, padding=1)
        c, skips, self.down, self.up = ch, [ch], nn.ModuleList(), nn.ModuleList()

        def block(c_in, level):
            layers = [ResBlock(c_in, ch * mult[level], c_emb)]
            return nn.ModuleList(layers + [Attention(ch * mult[level])] * (level == attention))

        for level in range(len(mult)):
            for _ in range(2):
                self.down.append(block(c, level))
                c = ch * mult[level]
                skips.append(c)
            if level < len(mult) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2))
                skips.append(c)
        self.mid = nn.ModuleList([ResBlock(c, c, c_emb), Attention(c), ResBlock(c, c, c_emb)])
        for level in reversed(range(len(mult))):
            for _ in range(3):
                self.up.append(block(c + skips.pop(), level))
                c = ch * mult[level]
            if level > 0:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))
        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, xt, t, y=None):
        frequency = torch.logspace(0, -4, self.ch // 2, device=t.device)
        angle = t.float()[:, None] * frequency
        emb = self.emb(torch.cat([angle.sin(), angle.cos()], dim=1))
        if y is not None:
            emb = emb + self.label(y)
        emb = F.silu(emb)

        def run(layers, h):
            for layer in layers:
                h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            return h

        h = self.conv_in(xt)
        skips = [h]
        for layer in self.down:
            h = run(layer, h) if isinstance(layer, nn.ModuleList) else layer(F.pad(h, (0, 1, 0, 1)))
            skips.append(h)
        h = run(self.mid, h)
        for layer in self.up:
            if isinstance(layer, nn.ModuleList):
                h = run(layer, torch.cat([h, skips.pop()], dim=1))
            else:
                h = layer(F.interpolate(h, scale_factor=2, mode="nearest"))
        return self.out(h)


@functools.cache
def build_net(data, kind=None):
    """The network of a data set on the meta device. kind: how it is told the resolution (Table I): label: an embedding;
    xy: two more input channels; None (also 2T: steps beyond T, 2dms: two networks): as DDPM's."""
    shape = {key: NETWORKS[data][key] for key in ("ch", "mult", "attention")}
    with torch.device("meta"):
        return UNet(**shape, c_in=5 if kind == "xy" else 3, labels=2 if kind == "label" else 0).eval()


# ---------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------
def parameters(data, kind=None):
    return sum(p.numel() for p in build_net(data, kind).parameters())


@functools.cache
def evaluation_macs(data, kind, res):
    """MACs of one network evaluation at res x res."""
    xt, t = torch.zeros(1, 3, res, res, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
    with mock.patch.object(F, "group_norm", lambda x, *_: x):  # no MACs, but most of the time of counting
        return count_macs(build_net(data, kind), xt, t, t if kind == "label" else None)


def image_macs(data, kind, resolutions, sequences):
    """MACs of one image: c2f_trd.py's sampler, executed over the steps of each resolution, low to high, with a
    network that counts instead of computing."""
    total = 0

    def eps_model(xt, t):
        nonlocal total
        total += evaluation_macs(data, kind, xt.shape[-1])
        return torch.zeros_like(xt)

    stages = [(eps_model, torch.zeros(1, 3, r, r)) for r in resolutions]
    c2f_sample(stages, sequences, linear_alpha_bar(T))
    return total


def rows():
    """The cells of Sec. IV, Table I, Fig. 6 and Table II."""
    found = []

    def row(table, cell, paper, ours, note=""):
        found.append(dict(table=table, cell=cell, paper=paper, ours=ours, note=note))

    for data, printed, macs_note, size_note, lows, steps_of, claim, training in (
            ("CIFAR10", (35.7e6, 6.1e9),
             "their counter adds bias and norm and leaves out the attention products: 6.07 G",
             "printed by Diff-Pruning", (8, 16), (5, 10, 20, 40), (8, 10, 90), (100_000, 800_000)),
            ("LSUN-Church", (113.7e6, 248.7e9),
             "their counter: 248.69 G, without the attention products",
             "printed by others, rounded", (32,), (5, 7, 10, 20), (32, 20, 80), (375_000, 4_400_000))):
        R = NETWORKS[data]["R"]
        row("Sec. IV", f"{data}: parameters", printed[0], parameters(data), size_note)
        row("Sec. IV", f"{data}: parameters with labels", None, parameters(data, "label"))
        for strategy, networks in (("xy", 1), ("2T", 1), ("2dms", 2)):
            row("Table I", f"{data}: parameters, {strategy}", None, networks * parameters(data, strategy))
        full = image_macs(data, None, [R], [uniform_steps(T - 1, REFERENCE_STEPS)])
        row("Sec. IV", f"{data}: MACs, {R}x{R}", printed[1], full // REFERENCE_STEPS, macs_note)
        for low in lows:
            for steps in steps_of:
                sequences = [uniform_steps(T - 1, LOW_STEPS), uniform_steps(T_STAR, steps)]
                share = 100 * image_macs(data, "label", [low, R], sequences) / full
                printed_here = (low, steps) == claim[:2]               # the text's "90 % reduction", "80 %"
                row("Fig. 6", f"{data} {low}->{R}, T_f={steps}: relative MACs, %",
                    100.0 - claim[2] if printed_here else None, share,
                    f"the text's '{claim[2]} % reduction': {100 - share:.1f} %" if printed_here else "")
        finetuning, base = training
        share = 100 * finetuning / base
        row("Sec. IV", f"{data}: fine-tuning, % of training steps", "< 10", share,
            "100k of DDPM's 800k steps is not below 10 %" if share > 10 else "")
    for data, minutes in (("CIFAR10", 1.4), ("LSUN-Church", 8.8)):
        row("Table II", f"{data}: search, minutes, RTX 4090", minutes, None, "no such GPU, no trained "
            "network of that size: results/c2f_trd has the small preset's time on its device")
    return found
