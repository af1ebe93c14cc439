"""LowDiff's efficiency cells (arXiv 2509.15342): EDM's U-Net for CIFAR-10 and FFHQ 64x64 with an entry and an exit for
each resolution, LightningDiT with two (Table 4), and what lowdiff.py's own sampler takes with them
(python results/ledger.py lowdiff)."""
import functools
import math
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import count_macs
from lowdiff import cascade_sample, effective_nfe, noise_levels, stop_level

# EDM's networks (DDPM++): resolution, multiples of the width 128 by level, level with attention; 4 blocks a level.
NETWORKS = {"CIFAR10": dict(R=32, mult=(2, 2, 2), attention=1), "FFHQ": dict(R=64, mult=(1, 2, 2, 2), attention=2)}
WIDTH, BLOCKS = 128, 4
# Steps N of each stage and evaluations K of each but the last (Tables 2, 3, 6, 7; of three and four stages N: D7).
SCHEDULES = {
    (32,): ([18], []), (16, 32): ([18, 9], [19]), (8, 16, 32): ([18, 12, 9], [18, 13]),
    (64,): ([40], []), (32, 64): ([40, 20], [49]), (8, 16, 32, 64): ([20, 20, 20, 20], [22, 23, 23]),
}
SIGMA_RANGE, COND_RANGE = (0.002, 80.0), (0.01, 50.0)          # of the first and of the other stages (Table 10)


# ---------------------------------------------------------------------------------------------
# EDM's U-Net with entries and exits (Sec. 3.3)
# ---------------------------------------------------------------------------------------------
def timestep_embedding(t, dim):
    """(B,) -> (B, dim): sine and cosine of t at `dim / 2` frequencies from 1 to 1 / 10000."""
    angle = t.float()[:, None] * torch.logspace(0, -4, dim // 2, device=t.device)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    """norm - SiLU - (resample) conv, plus the embedding, norm - SiLU - conv, plus the (resampled) input, times
    sqrt(1/2); then attention, times sqrt(1/2). resample: None, "down" (mean of 2x2) or "up" (repeat)."""

    def __init__(self, c_in, c_out, c_emb, resample=None, attention=False):
        super().__init__()
        self.resample, self.emb = resample, nn.Linear(c_emb, c_out)
        self.norm1, self.conv1 = nn.GroupNorm(32, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out or resample else nn.Identity()
        self.attention = Attention(c_out) if attention else None

    def change_size(self, x):
        if self.resample is None:
            return x
        box = x.new_ones(x.shape[1], 1, 2, 2)                  # convolutions, as in EDM: they count as MACs
        if self.resample == "down":
            return F.conv2d(x, box / 4, stride=2, groups=x.shape[1])
        return F.conv_transpose2d(x, box, stride=2, groups=x.shape[1])

    def forward(self, x, emb):
        h = self.conv1(self.change_size(F.silu(self.norm1(x)))) + self.emb(emb)[:, :, None, None]
        h = (self.skip(self.change_size(x)) + self.conv2(F.silu(self.norm2(h)))) * 0.5 ** 0.5
        return h if self.attention is None else self.attention(h) * 0.5 ** 0.5


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
    """EDM's U-Net with several entries: (B, 3, r, r) out for each r in `stages` (D1).

    xt (B, C_in, r, r), C_in = 3 at the resolution `lowest` and 6 (image and condition) above it; c_noise (B,).
    Level l works at R / 2^l; the network has no levels above its largest stage. Attention: in every encoder
    block of its level, the last decoder block, and at the bottom. classes: number of labels, told by one-hot y."""

    def __init__(self, R, mult, attention, stages, lowest, classes=0):
        super().__init__()
        widths, c_emb, bottom = [WIDTH * m for m in mult], 4 * WIDTH, len(mult) - 1
        self.stages, self.level = stages, {r: int(math.log2(R // r)) for r in stages}
        self.map1, self.map2 = nn.Linear(WIDTH, c_emb), nn.Linear(c_emb, c_emb)
        self.map_label = nn.Linear(classes, WIDTH) if classes else None
        self.map_augment = nn.Linear(9, WIDTH, bias=False)     # of training images; not called when sampling
        self.map_res = nn.Linear(len(stages), WIDTH) if len(stages) > 1 else None                  # D2
        self.entry, self.exit = nn.ModuleDict(), nn.ModuleDict()
        for r in stages:
            level = self.level[r]
            self.entry[str(r)] = nn.Conv2d(3 if r == lowest else 6, widths[level - 1] if level else WIDTH, 3, padding=1)
            self.exit[str(r)] = nn.Sequential(nn.GroupNorm(32, widths[level]), nn.SiLU(),
                                              nn.Conv2d(widths[level], 3, 3, padding=1))

        self.down, self.encoder, self.decoder, self.up = (nn.ModuleDict() for _ in range(4))       # by level
        top, skips = min(self.level.values()), []
        c = widths[top - 1] if top else WIDTH
        for level in range(top, bottom + 1):
            if level > top:
                self.down[str(level)] = ResBlock(c, c, c_emb, resample="down")
            skips.append(c)                                    # of the entry, or of the way down
            self.encoder[str(level)] = nn.ModuleList()
            for _ in range(BLOCKS):
                self.encoder[str(level)].append(ResBlock(c, widths[level], c_emb, attention=level == attention))
                c = widths[level]
                skips.append(c)
        self.mid = nn.ModuleList([ResBlock(c, c, c_emb, attention=True), ResBlock(c, c, c_emb)])
        for level in range(bottom, top - 1, -1):
            if level < bottom:
                self.up[str(level)] = ResBlock(c, c, c_emb, resample="up")
            self.decoder[str(level)] = nn.ModuleList()
            for i in range(BLOCKS + 1):
                last = i == BLOCKS and level == attention
                self.decoder[str(level)].append(ResBlock(c + skips.pop(), widths[level], c_emb, attention=last))
                c = widths[level]

    def forward(self, xt, c_noise, y=None):
        r = xt.shape[-1]
        emb = timestep_embedding(c_noise, WIDTH)
        if self.map_label is not None:
            emb = emb + self.map_label(y)
        if self.map_res is not None:
            emb = emb + self.map_res(one_hot(self.stages, xt))
        emb = F.silu(self.map2(F.silu(self.map1(emb))))
        top, h, skips = self.level[r], self.entry[str(r)](xt), []
        for level, blocks in self.encoder.items():
            if int(level) < top:                               # only the innermost blocks
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
        return self.exit[str(r)](h)


def one_hot(stages, x):
    """Which of the n `stages` x (B, C, r, r) has the size of: (1, n), times sqrt(n) (D2)."""
    hot = torch.zeros(1, len(stages), device=x.device)
    hot[:, stages.index(x.shape[-1])] = len(stages) ** 0.5
    return hot


# ---------------------------------------------------------------------------------------------
# LightningDiT-B/1 with entries and exits (Table 4, D17)
# ---------------------------------------------------------------------------------------------
DIT_WIDTH, DIT_DEPTH, DIT_HEADS, LATENT, DIT_CLASSES = 768, 12, 12, 32, 1000     # LATENT: channels of VA-VAE's latents


def axis_angles(side, n):
    """(side * side, 2n): row and column of each token times n frequencies, 1 down to nearly 1 / 10000."""
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    return (at[:, :, None] * 1e4 ** (-torch.arange(n) / n)).flatten(1)


def rotate(x, angle):
    """Rotary position embedding: x (B, heads, N, d), each pair of channels turned by angle (N, d / 2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class DiTBlock(nn.Module):
    """LightningDiT's block: attention with rotary positions, SwiGLU; RMS norms, scaled, shifted and gated by c."""

    def __init__(self, ch):
        super().__init__()
        hidden = int(8 * ch / 3)
        self.norm1, self.norm2 = nn.RMSNorm(ch), nn.RMSNorm(ch)
        self.qkv, self.out = nn.Linear(ch, 3 * ch), nn.Linear(ch, ch)
        self.w12, self.w3 = nn.Linear(ch, 2 * hidden), nn.Linear(hidden, ch)
        self.modulation = nn.Linear(ch, 6 * ch)

    def forward(self, x, c, angle):
        """x (B, N, ch), c (B, ch), angle (N, ch / heads / 2)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        h = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = h.unflatten(-1, (3, DIT_HEADS, -1)).permute(2, 0, 3, 1, 4)            # (B, heads, N, d) each
        h = F.scaled_dot_product_attention(rotate(q, angle), rotate(k, angle), v)
        x = x + gate1 * self.out(h.transpose(1, 2).flatten(2))
        gate, h = self.w12(self.norm2(x) * (1 + scale2) + shift2).chunk(2, dim=-1)
        return x + gate2 * self.w3(F.silu(gate) * h)


class DiTExit(nn.Module):
    """DiT's final layer: norm, scaled and shifted by c, linear."""

    def __init__(self, ch, channels):
        super().__init__()
        self.norm, self.modulation, self.linear = nn.RMSNorm(ch), nn.Linear(ch, 2 * ch), nn.Linear(ch, channels)

    def forward(self, x, c):
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """v_hat (B, C, r, r) for each r in `stages`, from xt (B, C_in, r, r), C_in = C at the lowest, 2C (with the
    condition) above it; t (B,), labels y (B,). A token is a latent pixel; own entry, positions and exit for each
    resolution, shared blocks."""

    def __init__(self, stages):
        super().__init__()
        ch, self.stages = DIT_WIDTH, stages
        self.map1, self.map2 = nn.Linear(256, ch), nn.Linear(ch, ch)
        self.map_label = nn.Embedding(DIT_CLASSES + 1, ch)     # the last one is no label
        self.map_res = nn.Linear(len(stages), ch) if len(stages) > 1 else None
        self.entry, self.exit, self.position = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterDict()
        for r in stages:
            self.entry[str(r)] = nn.Linear(LATENT * (1 if r == stages[0] else 2), ch)
            self.exit[str(r)] = DiTExit(ch, LATENT)
            angle = axis_angles(r, ch // 4)
            self.position[str(r)] = nn.Parameter(torch.cat([angle.sin(), angle.cos()], dim=1), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(ch) for _ in range(DIT_DEPTH))

    def forward(self, xt, t, y):
        r = xt.shape[-1]
        c = self.map2(F.silu(self.map1(timestep_embedding(t, 256)))) + self.map_label(y)
        if self.map_res is not None:
            c = c + self.map_res(one_hot(self.stages, xt))
        c, angle = F.silu(c), axis_angles(r, DIT_WIDTH // DIT_HEADS // 4).to(xt.device)
        h = self.entry[str(r)](xt.flatten(2).transpose(1, 2)) + self.position[str(r)]
        for block in self.blocks:
            h = block(h, c, angle)
        return self.exit[str(r)](h, c).transpose(1, 2).unflatten(2, (r, r))


# ---------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------
@functools.cache
def networks(data, arch, stages, classes):
    """The networks of a model, on the meta device: of edm (one stage) and lowdiff one, of cdm (Tables 8, 9) one for
    each stage (D11); of ImageNet's latents a DiT."""
    with torch.device("meta"):
        if data == "ImageNet":
            return [DiT(stages).eval()]
        parts = [(r,) for r in stages] if arch == "cdm" else [stages]
        return [UNet(**NETWORKS[data], stages=part, lowest=stages[0], classes=classes).eval() for part in parts]


def parameters(data, arch, stages, classes=0):
    return sum(p.numel() for net in networks(data, arch, stages, classes) for p in net.parameters())


@functools.cache
def evaluation_macs(data, arch, stages, res):
    """MACs of one network evaluation at res x res, without labels in pixels, with them in latents."""
    net = next(net for net in networks(data, arch, stages, 0) if res in net.stages)
    channels = (LATENT if data == "ImageNet" else 3) * (1 if res == stages[0] else 2)
    xt, t = torch.zeros(1, channels, res, res, device="meta"), torch.zeros(1, device="meta")
    with mock.patch.object(F, "group_norm", lambda x, *_: x):  # no MACs, but most of the time of counting
        return count_macs(net, xt, t, t.long() if data == "ImageNet" else None)


def image_cost(data, arch, stages, steps=None, truncate=None):
    """MACs of one image, evaluations at each stage, and sigma where each but the last stops: lowdiff.py's sampler,
    executed with a denoiser that counts instead of computing."""
    steps, truncate = (steps, truncate) if steps else SCHEDULES[stages]
    nfe = dict.fromkeys(stages, 0)
    levels = [noise_levels(N, *(COND_RANGE if i else SIGMA_RANGE)) for i, N in enumerate(steps)]

    def denoiser(xt, *condition):
        nfe[xt.shape[-1]] += 1
        return torch.zeros_like(xt)

    cascade_sample([(denoiser, torch.zeros(1, 3, r, r), sigmas, K)
                    for r, sigmas, K in zip(stages, levels, [*truncate, None])])
    macs = sum(n * evaluation_macs(data, arch, stages, r) for r, n in nfe.items())
    stops = [round(stop_level(sigmas, K), 6) for sigmas, K in zip(levels, truncate)]
    return macs, list(nfe.values()), stops


def training_macs(data, arch, stages):
    """MACs of one training image: a forward pass of every stage."""
    return sum(evaluation_macs(data, arch, stages, r) for r in stages)


def rows():
    """The cells of Tables 1 to 12, Appendices A and B, in the order sizes, pixels, CDM, latents, effective NFE."""
    found = []

    def row(table, cell, paper, ours, note=""):
        found.append(dict(table=table, cell=cell, paper=paper, ours=ours, note=note))

    # The paper prints one size for the networks with and without labels.
    for table, data, arch, stages, printed, note in (
            ("2, 6", "CIFAR10", "edm", (32,), 55.74e6, ""),
            ("2, 6", "CIFAR10", "lowdiff", (8, 16, 32), 55.77e6, ""),
            ("6, 8", "CIFAR10", "lowdiff", (16, 32), 55.76e6, "no rule gives both 55.76 and 55.77 (D1)"),
            ("8", "CIFAR10", "cdm", (16, 32), 93.89e6, ""),
            ("3", "FFHQ", "edm", (64,), 61.80e6, "61.81 if rounded"),
            ("3, 7", "FFHQ", "lowdiff", (8, 16, 32, 64), 61.86e6, ""),
            ("7, 9", "FFHQ", "lowdiff", (32, 64), 61.82e6, ""),
            ("9", "FFHQ", "cdm", (32, 64), 117.57e6, "no sensible shapes give it (D11)")):
        for classes in (0, 10) if data == "CIFAR10" else (0,):
            kind = f"{data} {arch} {'-'.join(map(str, stages))}" + (", labels" if classes else "")
            row(table, f"{kind}: parameters", printed, parameters(data, arch, stages, classes), note)

    # Evaluations and cost per image. The printed gains follow from latencies, ours from MACs.
    why = {60.5: "by MACs; the printed 2.22 s / 1.37 s give 62.0", 52.8: "by MACs; 64x64 layers are bound by memory"}
    for data, full_nfe, runs in (
            ("CIFAR10", 35, (((8, 16, 32), None, (18, 13, 17), 60.5), ((16, 32), None, (19, 17), None))),
            ("FFHQ", 79, (((8, 16, 32, 64), None, (22, 23, 23, 39), 52.8), ((32, 64), None, (49, 39), None),
                          ((32, 64), (30, 37), (37, 39), None), ((32, 64), (50, 61), (61, 39), None)))):
        R = NETWORKS[data]["R"]
        edm = data, "edm", (R,)
        full, nfe, _ = image_cost(*edm)
        row("2 - 9", f"{data} edm: NFE at {R}x{R}", full_nfe, nfe[0])
        row("2 - 9", f"{data} edm: GMAC per image", None, full / 1e9)
        row("2 - 9", f"{data} edm: GMAC per evaluation", None, evaluation_macs(*edm, R) / 1e9)
        for stages, low, printed, gain in runs:
            model, kind, table = (data, "lowdiff", stages), f"{data} {'-'.join(map(str, stages))}", "2 - 9"
            if low:                                            # N and K of the first of two stages
                table, kind = "12", f"{kind}, K = {low[1]} of {2 * low[0] - 1}"
            macs, nfe, stops = image_cost(*model, *(([low[0], 20], [low[1]]) if low else ()))
            for i, r in enumerate(stages):
                row(table, f"{kind}: NFE at {r}x{r}", printed[i], nfe[i])
                if not low:
                    row(table, f"{kind}: GMAC per evaluation at {r}x{r}", None, evaluation_macs(*model, r) / 1e9)
                if i < len(stops):
                    row(table, f"{kind}: sigma where {r}x{r} stops", None, stops[i],
                        "N is not printed (D7)" if len(stages) > 2 else "")
            row(table, f"{kind}: GMAC per image", None, macs / 1e9)
            row("5" if gain else table, f"{kind}: throughput gain, %", gain, 100 * (full / macs - 1),
                why.get(gain, "by MACs; the paper prints latencies"))
            if not low:
                row("App. A", f"{kind}: training MACs, % of EDM's", None,
                    75 * training_macs(*model) / training_macs(*edm), "with 75 % of the images, 'comparable'")
    for K in (17, 18, 19, 20, 21):
        stop = stop_level(noise_levels(18, *SIGMA_RANGE), K)
        row("11", f"CIFAR10 16-32, K = {K} of 35: sigma at the stop", None, round(stop, 6))

    for table, data, stages, printed in (("8", "CIFAR10", (16, 32), (19, 17)), ("9", "FFHQ", (32, 64), (49, 39))):
        macs, nfe, _ = image_cost(data, "cdm", stages)
        for r, a, b in zip(stages, printed, nfe):
            row(table, f"{data} cdm: NFE at {r}x{r}", a, b)
        row(table, f"{data} cdm: GMAC per image", None, macs / 1e9)

    # Latents: one conditional pass, without the autoencoder. Euler's method, an evaluation a step: the printed
    # numbers are taken as evaluations (D19).
    dit, two = ("ImageNet", "dit", (16,)), ("ImageNet", "lowdiff", (8, 16))
    images = []
    for kind, model, printed, nfe in (("LightningDiT", dit, 130.56e6, (100,)), ("LowDiff", two, 131.86e6, (45, 50))):
        row("4", f"ImageNet {kind}: parameters", printed, parameters(*model), "with the fixed position tables")
        for r, n in zip(model[2], nfe):
            row("4", f"ImageNet {kind}: NFE at {r}x{r}", n, n)
            row("4", f"ImageNet {kind}: GMAC per evaluation at {r}x{r}", None, evaluation_macs(*model, r) / 1e9)
        images.append(sum(n * evaluation_macs(*model, r) for r, n in zip(model[2], nfe)))
        row("4", f"ImageNet {kind}: GMAC per image", None, images[-1] / 1e9)
    row("4", "ImageNet LightningDiT, half the steps: NFE at 16x16", 50, 50)
    row("4", "ImageNet LightningDiT, half the steps: GMAC per image", None, 50 * evaluation_macs(*dit, 16) / 1e9)
    row("5", "ImageNet: throughput gain, %", 65.5, 100 * (images[0] / images[1] - 1),
        "by MACs; printed: 4.8 / 2.9 images/s")
    row("App. B", "ImageNet: effective NFE", None,
        effective_nfe([45, 50], [evaluation_macs(*two, r) for r in (8, 16)]), "by MACs")

    # Effective NFE, from the seconds of an evaluation that the printed latencies imply (Tables 5, 6), and from MACs.
    at_32 = 2.22 / 35
    at_16 = (1.39 - 17 * at_32) / 19
    at_8 = (1.37 - 17 * at_32 - 13 * at_16) / 18
    three, four = ("CIFAR10", "lowdiff", (8, 16, 32)), ("FFHQ", "lowdiff", (8, 16, 32, 64))
    for cost, note in (([at_8, at_16, at_32], "printed latencies"),
                       ([evaluation_macs(*three, r) for r in three[2]], "by MACs")):
        row("1", "CIFAR10 8-16-32: effective NFE", 22, effective_nfe([18, 13, 17], cost), note)
        row("App. B", "CIFAR10 16-32: effective NFE", None, effective_nfe([19, 17], cost[1:]), note)
    row("App. B", "FFHQ 8-16-32-64: effective NFE", None,
        effective_nfe([22, 23, 23, 39], [evaluation_macs(*four, r) for r in four[2]]), "by MACs")
    return found
