"""PostDiff on a diffusion transformer, in small: Table 2's PixArt-alpha (arXiv 2508.06160, 3.1; PixArt: 2310.00426).

The network is PixArt's kind: blocks of self-attention, cross-attention to the text and a feed-forward layer, at one
width and on tokens of patch x patch pixels. It has no skips, hence no deep features to cache (k = 1): PostDiff is mixed
resolution, at 3/4 of the side, the end of guidance after m = 3/4 of the steps and frozen cross-attentions.

    python variants/postdiff_dit.py --train                  # the text-to-image model, from scratch
    python variants/postdiff_dit.py --sample                 # PostDiff, 20 steps of DPM-Solver++ 2M
    python variants/postdiff_dit.py --sample --method base   # off switch: plain guidance, same seeds
    python variants/postdiff_dit.py --search --sample        # calibration

Everything else is postdiff.py's. (D7), (D15): results/postdiff/README.md.
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from changed import copy_of  # noqa: E402
import common  # noqa: E402
from common import run_main  # noqa: E402

script = copy_of("postdiff")


# ---------------------------------------------------------------------------------------------
# Network: PixArt's, with the text encoder of postdiff.py
# ---------------------------------------------------------------------------------------------
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


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and the last are scaled, shifted and gated
    by the time, through six vectors (B, 6, c) that all blocks share and each offsets by its own."""

    def __init__(self, c, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(c, elementwise_affine=False) for _ in range(2))
        self.self_attention, self.cross_attention = Attention(c, c, heads), Attention(c, script.C_TEXT, heads)
        self.ff_in, self.ff_out = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.offset = nn.Parameter(torch.randn(6, c) / c ** 0.5)

    def forward(self, h, text, six, size, cross=None):
        """h (B, N, c): an image of that many tokens, size = (height, width). cross: what the cross-attention gave
        before, (B, c, h, w), to be used instead, resized if that was at low resolution (D7). Returns both."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.offset + six)[:, :, None].unbind(1)
        y = self.norm1(h) * (1 + scale1) + shift1
        h = h + gate1 * self.self_attention(y, y)
        if cross is None:
            cross = self.cross_attention(h, text).transpose(1, 2).unflatten(2, size)
        elif cross.shape[-2:] != size:
            cross = F.interpolate(cross, size=size, mode="bilinear", align_corners=False)
        h = h + cross.flatten(2).transpose(1, 2)
        y = self.norm2(h) * (1 + scale2) + shift2
        return h + gate2 * self.ff_out(F.gelu(self.ff_in(y), approximate="tanh")), cross


def positions(h, w, c, device):
    """(h w, c): sine and cosine of row and column, which span 0 .. 16 at any size."""
    frequency = 1e4 ** (-torch.arange(c // 4, device=device) / (c // 4))
    row, column = (torch.arange(n, device=device)[:, None] * frequency * 16 / n for n in (h, w))
    row, column = (torch.cat([v.sin(), v.cos()], dim=1) for v in (row, column))
    return torch.cat([row[:, None].expand(-1, w, -1), column.expand(h, -1, -1)], dim=2).flatten(0, 1)


class DiT(nn.Module):
    """x0_hat (B, C, H, W) from xt (B, C, H, W), t (B,), text (B, L): called like UNet. H and W: any multiples of patch.
    There are no deep features: the second thing that it returns is None."""

    def __init__(self, channels, ch, blocks, heads, patch, words):
        super().__init__()
        self.ch, self.patch = ch, patch
        self.emb = nn.Sequential(nn.Linear(ch, ch), nn.SiLU(), nn.Linear(ch, ch))
        self.modulation = nn.Linear(ch, 6 * ch)
        self.text = script.TextEncoder(words)
        self.conv_in = nn.Conv2d(channels * patch ** 2, ch, 1)
        self.blocks = nn.ModuleList(Block(ch, heads) for _ in range(blocks))
        self.norm_out, self.shift_scale = nn.LayerNorm(ch, elementwise_affine=False), nn.Parameter(torch.zeros(2, ch))
        self.conv_out = nn.Conv2d(ch, channels * patch ** 2, 1)

    def forward(self, xt, t, text, deep=None, cross=None, depth=1):
        emb, text, used, cross = self.emb(script.timestep_embedding(t, self.ch)), self.text(text), {}, cross or {}
        six = self.modulation(F.silu(emb)).unflatten(1, (6, -1))
        h = self.conv_in(F.pixel_unshuffle(xt, self.patch))
        size = h.shape[-2:]
        h = h.flatten(2).transpose(1, 2) + positions(*size, self.ch, h.device)
        for i, block in enumerate(self.blocks):
            h, used[i] = block(h, text, six, size, cross.get(i))
        shift, scale = (self.shift_scale + emb[:, None])[:, :, None].unbind(1)
        h = (self.norm_out(h) * (1 + scale) + shift).transpose(1, 2).unflatten(2, size)
        return F.pixel_shuffle(self.conv_out(h), self.patch), None, used


def build_net(config):
    """The network of a configuration, on the CPU."""
    if config["ch"] % (4 * config["heads"]):
        raise ValueError(f"--ch {config['ch']} must be a multiple of four times --heads {config['heads']}")
    return DiT(config["channels"], *(config[k] for k in ("ch", "blocks", "heads", "patch")), words=len(config["words"]))


def begin_run(*args):
    """common's. What the script asks of sizes holds for one level: patch must divide them."""
    config, saved = common.begin_run(*args)
    return dict(config, mult=[1]), saved


script.SCRIPT, script.__doc__ = "postdiff_dit", __doc__
CONFIG = script.CONFIG
CONFIG["run"]["out"] = ("runs/postdiff_dit", *CONFIG["run"]["out"][1:])
CONFIG["network"] = dict(
    res=CONFIG["network"]["res"], ch=(96, (4, 4096), "width"), blocks=(6, (1, 64), "blocks"),
    heads=(4, (1, 64), "heads of attention"), patch=(4, (1, 16), "pixels per side of a token"))
CONFIG["method"].update(
    solver=("dpm2", *CONFIG["method"]["solver"][1:]), beta=(0.75, *CONFIG["method"]["beta"][1:]),
    k=(1, (1, 1), "every pass is a full one: there are no deep features to cache"))
script.build_net, script.begin_run = build_net, begin_run

if __name__ == "__main__":
    run_main(script.main, script.SCRIPT)
