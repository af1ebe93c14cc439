"""Tables 2, 4, 5, 6 and 7 of Multistage (arXiv 2312.09181): parameters, operations and edges, with the paper's own
networks, which are here and nowhere else. `python results/ledger.py multistage` prints them.

The networks are the official code's: DDPM++ with FIR resampling and input pyramid (CIFAR-10) and LDM's (CelebA-HQ 256),
each with one encoder and a decoder per stage. The evaluations of a stage are counted in a run of multistage.py's
sampler.
"""
import functools
import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import count_macs
from multistage import dpm_solver_sample, sigma_of, stage_of

T_END = 1e-4                                   # last t of the samplers (the official command line)
EDGES = (0.442, 0.631)                         # t1, t2 of Table 4
# attended: how many decoders, from the first, have attention (None: all; 1 is the official class's oversight, D15)
NETWORKS = {"ddpm++": dict(res=32, mult=(1, 2, 2, 2), blocks=8, attention=(1,), groups=16, attended=None),
            "ldm": dict(res=64, mult=(1, 2, 3, 4), blocks=2, attention=(1, 2, 3), groups=32, attended=1)}
BATCH = {"ddpm++": 128, "ldm": 48}             # training images a step

# Architectures: width of the encoder, widths of the decoders, printed parameters (M) and GFLOPs per stage,
# of the shared part, in total. Table 7's shared parts are not printed. None: not printed.
TABLE5 = ((128, (192, 128, 16), (169, 108, 47, 43, 237), (29.95, 17.65, 6.31, 5.75, 18.65)),
          (160, (160, 128, 16), (168, 138, 72, 68, 242), (27.57, 21.73, 9.65, 8.98, 19.7)),
          (192, (144, 112, 16), (189, 160, 103, 98, 256), (29.43, 23.91, 13.7, 12.93, 22.45)),
          (192, (128, 64, 16), (174, 126, 103, 98, 207), (26.54, 17.62, 13.7, 12.93, 22.45)))
TABLE6 = ((192, (224, 192, 160), (238, 189, 161, 79, 428), (80.03, 64.95, 51.87, 16.69, 65.75)),
          (160, (224, 192, 128), (206, 158, 108, 55, 361), (72.61, 57.85, 34.38, 11.6, 54.37)),
          (224, (224, 192, 128), (274, 224, 170, 108, 452), (88.39, 72.97, 48.17, 22.71, 69.22)),
          (224, (256, 192, 128), (316, 224, 170, 108, 494), (105.82, 72.97, 48.17, 22.71, 76.19)))
TABLE7 = ((128, (128,), (108, None, None), (17.65, None, None)),
          (64, (208, 128), (136, 95, None, 188), (26.59, 16.85, None, 21.49)),
          (128, (192, 128, 16), (169, 108, 47, None, 230), (29.95, 17.65, 6.31, None, 18.65)),
          (96, (208, 144, 112, 32), (159, 95, 71, 32, None, 284), (29.78, 16.85, 11.97, 4.41, None, 17.33)),
          (64, (224, 160, 160, 64, 48), (154, 88, 88, 27, 21, None, 336),
           (30.38, 16.82, 16.82, 4.42, 3.28, None, 17.03)))
TABLE7_EDGES = ((), (0.476,), (0.426, 0.626), (0.376, 0.526, 0.726), (0.376, 0.476, 0.626, 0.776))
NOTES = {("Table 5, 1", "shared", "M"): "printed in whole millions: 43.48 rounds to 43",
         ("Table 5, 4", "total", "G"): "the printed one is architecture 3's",
         ("Table 7, 2", "stage 2", "M"): "the printed cell is stage 2 of n = 4 (width 144 on an encoder of 96); "
                                         "136 M, 26.59 G and 188 M together fit widths 208, 128",
         ("Table 7, 2", "stage 2", "G"): "as above", ("Table 7, 2", "total", "G"): "with 16.85: 21.49",
         ("Table 7, 3", "total", "M"): "Table 5 prints 237 for the same network",
         ("Table 7, 3", "total", "G"): "by .426/.626, as Table 5; by the text's .442/.631 it is 18.90",
         ("Table 7, 4", "stage 4", "M"): "printed in whole millions: 31.50 rounds to 32"}
THIRDS = ("the thirds of 1000 levels; printed to two places. On the 100 levels 0, .01 ... .99 the printed pair is one "
          "of three equal optima")


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------
class NormSiLU(nn.GroupNorm):
    def forward(self, x):
        return F.silu(super().forward(x))


class ResBlock(nn.Module):
    """norm - SiLU - (resample) - conv, plus the time embedding, norm - SiLU - conv, plus the input."""

    def __init__(self, c_in, c_out, c_emb, groups, resample=None):
        super().__init__()
        self.norm1, self.norm2 = NormSiLU(groups, c_in, eps=1e-6), NormSiLU(groups, c_out, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.resample = resample or nn.Identity()
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out or resample else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(self.resample(self.norm1(x))) + self.emb(emb)[..., None, None]
        return self.skip(self.resample(x)) + self.conv2(self.norm2(h))


class Attention(nn.Module):
    """Self-attention over the pixels, one head (LDM's code: 32 channels a head, which costs the same)."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.qkv, self.out = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v)                            # (B, 1, H W, C)
        return x + self.out(h[:, 0].transpose(1, 2).view_as(x))


class Fir(nn.Module):
    """DDPM++'s resampling by 2 with the filter [1, 3, 3, 1] in both directions; no parameters."""

    def __init__(self, up):
        super().__init__()
        row = torch.tensor([1., 3., 3., 1.]) / 8
        self.up = up
        self.register_buffer("kernel", torch.outer(row, row) * (4 if up else 1))

    def forward(self, x):
        resample = F.conv_transpose2d if self.up else F.conv2d
        return resample(x, self.kernel.expand(x.shape[1], 1, 4, 4), stride=2, padding=1, groups=x.shape[1])


class PyramidDown(nn.Module):
    """DDPM++'s input pyramid: the filter, then a strided convolution to the width of the next level."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv, self.fir = nn.Conv2d(c_in, c_out, 3, stride=2), Fir(up=False)

    def forward(self, x):
        kernel = self.fir.kernel.expand(x.shape[1], 1, 4, 4)
        return self.conv(F.conv2d(x, kernel, padding=2, groups=x.shape[1]))


def run_layers(layers, h, emb, scale):
    """The layers in turn; DDPM++ divides every sum by sqrt 2 (scale), LDM does not (scale 1)."""
    for layer in layers:
        h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        h = h * scale if isinstance(layer, (ResBlock, Attention)) else h
    return h


class Encoder(nn.Module):
    """Time embedding, input, way down and bottleneck: (xt, label) -> h, skips, emb."""

    def __init__(self, kind, ch):
        super().__init__()
        net, plus = NETWORKS[kind], kind == "ddpm++"
        groups, c_emb, self.ch, self.scale = math.gcd(ch, net["groups"]), 4 * ch, ch, 0.5 ** 0.5 if plus else 1
        self.emb = nn.Sequential(nn.Linear(ch, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        c, c_pyramid, self.widths = ch, 3, [ch]                                # widths of the skips
        self.down, self.pyramid = nn.ModuleList(), nn.ModuleDict()             # a skip after each step of down
        for level, m in enumerate(net["mult"]):
            for _ in range(net["blocks"]):
                self.down.append(nn.ModuleList([ResBlock(c, ch * m, c_emb, groups)]))
                c = ch * m
                if level in net["attention"]:
                    self.down[-1].append(Attention(c, groups))
                self.widths.append(c)
            if level < len(net["mult"]) - 1:
                halve = ResBlock(c, c, c_emb, groups, Fir(up=False)) if plus else nn.Conv2d(c, c, 3, 2, padding=1)
                self.down.append(nn.ModuleList([halve]))
                if plus:
                    self.pyramid[str(len(self.down) - 1)] = PyramidDown(c_pyramid, c)
                    c_pyramid = c
                self.widths.append(c)
        self.mid = nn.ModuleList([ResBlock(c, c, c_emb, groups), Attention(c, groups), ResBlock(c, c, c_emb, groups)])

    def forward(self, xt, label):
        angle = label[:, None] * torch.logspace(0, -4, self.ch // 2, device=label.device)
        emb = F.silu(self.emb(torch.cat([angle.sin(), angle.cos()], dim=1)))
        h, pyramid = self.conv_in(xt), xt
        skips = [h]
        for i, step in enumerate(self.down):
            h = run_layers(step, h, emb, self.scale)
            if str(i) in self.pyramid:
                h = pyramid = (self.pyramid[str(i)](pyramid) + h) * self.scale
            skips.append(h)
        return run_layers(self.mid, h, emb, self.scale), skips, emb


class Decoder(nn.Module):
    """Way up and output, of a width of its own; the first convolution that sees a skip adapts it."""

    def __init__(self, kind, encoder, width, attended):
        super().__init__()
        net, plus = NETWORKS[kind], kind == "ddpm++"
        groups, c_emb = math.gcd(encoder.ch, width, min(net["groups"], width // 4)), 4 * encoder.ch
        c, skips, self.up, self.scale = encoder.widths[-1], list(encoder.widths), nn.ModuleList(), encoder.scale
        self.takes_skip = []
        for level, m in reversed(list(enumerate(net["mult"]))):
            for i in range(net["blocks"] + 1):
                self.up.append(nn.ModuleList([ResBlock(c + skips.pop(), width * m, c_emb, groups)]))
                c = width * m
                if attended and level in net["attention"] and (i == net["blocks"] or not plus):    # ++: once a level
                    self.up[-1].append(Attention(c, groups))
                self.takes_skip.append(True)
            if level > 0:
                double = [ResBlock(c, c, c_emb, groups, Fir(up=True))] if plus else [
                    nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)]
                self.up.append(nn.ModuleList(double))
                self.takes_skip.append(False)
        self.norm_out, self.conv_out = NormSiLU(groups, c, eps=1e-6), nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, h, skips, emb):
        skips = list(skips)
        for step, takes_skip in zip(self.up, self.takes_skip):
            h = run_layers(step, torch.cat([h, skips.pop()], dim=1) if takes_skip else h, emb, self.scale)
        return self.conv_out(self.norm_out(h))


# ---------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------
def count_both(layer, *inputs):
    """(operations by the paper's rule, all MACs, outputs) of layer(*inputs) on the meta device. The paper's rule is
    that of the torchstat package: multiply-accumulates and bias additions of nn.Conv2d, multiply-accumulates of
    nn.Linear; not the attention layers and not the input pyramid (in the official code neither is an nn.Conv2d), no
    norms."""
    total, hooks, outputs = [0], [], []
    left_out = {m for a in layer.modules() if isinstance(a, (Attention, PyramidDown)) for m in a.modules()}

    def count(module, _, y):
        total[0] += y.numel() * (module.weight[0].numel() + isinstance(module, nn.Conv2d))

    for module in layer.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in left_out:
            hooks.append(module.register_forward_hook(count))
    macs = count_macs(lambda: outputs.append(layer(*inputs)))
    for hook in hooks:
        hook.remove()
    return total[0], macs, outputs[0]


def without_norms(net):
    """The network with its norms and what follows them left out: no MACs, but most of the time of counting."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return net


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@functools.cache
def shared_part(kind, ch):
    """An encoder, its input, what it puts out, and [parameters, the paper's operations, all MACs]."""
    with torch.device("meta"):
        encoder, res = Encoder(kind, ch), NETWORKS[kind]["res"]
        inputs = torch.zeros(1, 3, res, res), torch.zeros(1)
    size = parameters(encoder)
    flops, macs, outputs = count_both(without_norms(encoder), *inputs)
    return encoder, inputs, outputs, [size, flops, macs]


@functools.cache
def own_part(kind, ch, width, attended):
    """A decoder and its [parameters, the paper's operations, all MACs]."""
    encoder, _, outputs, _ = shared_part(kind, ch)
    with torch.device("meta"):
        decoder = Decoder(kind, encoder, width, attended)
    size = parameters(decoder)
    return decoder, [size, *count_both(without_norms(decoder), *outputs)[:2]]


def decoders_of(kind, widths, attended=None):
    """(width, has attention) of each stage's decoder; attended: how many have (default: the official class's)."""
    attended = attended or NETWORKS[kind]["attended"] or len(widths)
    return [(width, s < attended) for s, width in enumerate(widths)]


def measure(kind, ch, widths, attended=None):
    """[parameters, the paper's operations, all MACs] of each stage, then of the shared part; parameters in total."""
    shared = shared_part(kind, ch)[-1]
    own = [own_part(kind, ch, *decoder)[1] for decoder in decoders_of(kind, widths, attended)]
    return [[a + b for a, b in zip(shared, part)] for part in own] + [shared], shared[0] + sum(p[0] for p in own)


@functools.cache
def step_macs(part):
    """MACs of an encoder's or a decoder's share in a training step of one image: forward and backward."""
    kind, ch, *decoder = part
    encoder, inputs, (h, skips, emb), _ = shared_part(kind, ch)
    leaves = [v.detach().requires_grad_() for v in (h, *skips, emb)]

    @torch.enable_grad()
    def step():
        if decoder:
            own_part(*part)[0](leaves[0], leaves[1:-1], leaves[-1]).sum().backward()
        else:
            h, skips, emb = encoder(*inputs)
            torch.autograd.backward([h, *skips, emb], leaves)
    return count_macs(step)


def training_macs(kind, ch, widths):
    """MACs of a training step of one image, backward pass included, as a mean over the stages."""
    own = [step_macs((kind, ch, *decoder)) for decoder in decoders_of(kind, widths)]
    return step_macs((kind, ch)) + sum(own) / len(own)


def evaluations(kind):
    """Of the 20 of the paper's sampler, those in each stage. DDPM++: DPM-Solver of order 3, executed. LDM:
    DPM-Solver++ 2M, which takes steps even in t, one evaluation each."""
    if kind == "ldm":
        seen = [1 + (T_END - 1) * k / 20 for k in range(20)]
    else:
        seen = []

        def eps_model(xt, t):
            seen.append(t)
            return torch.zeros_like(xt)
        dpm_solver_sample(eps_model, torch.zeros(1, 1, 1, 1), 20, 3, T_END)
    stages = [stage_of(t, EDGES) for t in seen]
    return [stages.count(s) for s in range(3)]


def best_thirds(level):
    """Go et al. (Table 4, D7): the two edges that cut the levels (1000,) at t = .001 .. 1 into three runs with the
    least sum of distances to each run's middle level. By trying all cuts; of equal ones the first."""
    G = len(level)
    i, j = torch.arange(G + 1)[:, None], torch.arange(G + 1)[None]
    gaps = F.pad((level[:, None] - level).abs().cumsum(1), (1, 0))             # gaps[c, j]: of c to levels 0 .. j-1
    centre = (i + (j - i) // 2).clamp(0, G - 1)
    cost = (gaps[centre, j] - gaps[centre, i]).double().masked_fill(j <= i, math.inf)      # of the run i .. j-1
    first, second = divmod(int((cost[0][:, None] + cost + cost[:, -1]).argmin()), G + 1)
    return (first + 1) / G, (second + 1) / G


# ---------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------
def rows():
    """The paper's cells and ours: list of dicts {table, cell, paper, ours, note}."""
    found = []

    def row(table, cell, paper, ours, note=""):
        found.append(dict(table=table, cell=cell, paper=paper, ours=ours, note=note))

    def network(table, architecture, kind, weights, weighted_by):
        """The cells of an architecture; returns its stages' operations and their weighted mean in G."""
        ch, widths, printed_m, printed_g = architecture
        counts, total = measure(kind, ch, widths)
        names = [f"stage {s + 1}" for s in range(len(widths))] + ["shared"]
        for name, (size, flops, macs), m, g in zip(names, counts, printed_m, printed_g):
            row(table, f"{name}: parameters, M", m, size / 1e6, NOTES.get((table, name, "M"), ""))
            row(table, f"{name}: GFLOPs", g, flops / 1e9,
                f"{macs / 1e9:.3f} GMACs in all  {NOTES.get((table, name, 'G'), '')}".strip())
        flops, macs = (sum(w * c[i] for w, c in zip(weights, counts)) / sum(weights) / 1e9 for i in (1, 2))
        if len(widths) > 1:
            row(table, "total: parameters, M", printed_m[-1], total / 1e6, NOTES.get((table, "total", "M"), ""))
            row(table, f"total: GFLOPs by {weighted_by}", printed_g[-1], flops,
                f"{macs:.3f} GMACs in all  {NOTES.get((table, 'total', 'G'), '')}".strip())
        return [c[1] for c in counts], flops

    def lengths(edges):
        return [b - a for a, b in itertools.pairwise([0, *edges, 1])]

    nfe, totals5, totals6 = evaluations("ddpm++"), [], []
    for i, architecture in enumerate(TABLE5, 1):
        flops, total = network(f"Table 5, {i}", architecture, "ddpm++", lengths(TABLE7_EDGES[2]), "length")
        totals5.append(total)
        row(f"Table 5, {i}", f"total: GFLOPs by NFE {nfe}", None, sum(n * f for n, f in zip(nfe, flops)) / 20 / 1e9,
            "what the caption says; the printed cells are by length of .426/.626" if i == 1 else "")
    nfe = evaluations("ldm")
    for i, architecture in enumerate(TABLE6, 1):
        totals6.append(network(f"Table 6, {i}", architecture, "ldm", nfe, f"NFE {nfe}")[1])
    row("Table 6, 4", "total with attention in all decoders, M", None,
        measure("ldm", *TABLE6[3][:2], attended=3)[1] / 1e6,
        "the official class leaves it out of decoders 2 and 3 (D15)")
    for i, (architecture, edges) in enumerate(zip(TABLE7, TABLE7_EDGES), 1):
        network(f"Table 7, {i}", architecture, "ddpm++", lengths(edges), "length")

    def training(name, thousands, published, gflops, printed, kind, ch, widths):
        row("Table 2", f"{name}: GFLOPs", published, gflops)
        row("Table 2", f"{name}: PFLOPs as printed", printed, thousands * gflops / 1e3,
            "GFLOPs x iterations: one image a step, no backward pass")
        row("Table 2", f"{name}: training, EMACs", None,
            thousands * 1e3 * BATCH[kind] * training_macs(kind, ch, widths) / 1e18,
            f"backward included, every image: batch {BATCH[kind]}, stages in equal shares")

    unified, ldm = (measure(kind, ch, (ch,))[0][0][1] / 1e9 for kind, ch in (("ddpm++", 128), ("ldm", 224)))
    training("CIFAR-10, DPM-Solver", 450, 17.65, unified, 7.94, "ddpm++", 128, (128,))
    training("CIFAR-10, multistage", 250, 18.65, totals5[0], 4.66, "ddpm++", *TABLE5[0][:2])
    row("Table 2", "CelebA 32, EDM: PFLOPs as printed", 10.06, 570 * unified / 1e3,
        "17.65 is the DPM-Solver network; EDM's own has 21.03 G")
    row("Table 2", "CelebA 32, multistage EDM: PFLOPs", 8.28, None,
        "430 of the printed 19.25 G, which no weighting of either network gives")
    training("CelebA-HQ 256, LDM", 490, 88.39, ldm, 43.31, "ldm", 224, (224,))
    training("CelebA-HQ 256, multistage", 170, 76.19, totals6[3], 12.95, "ldm", *TABLE6[3][:2])

    index = torch.arange(1, 1001)
    for method, level, printed, note in (("time", index, (0.330, 0.670), THIRDS),
                                         ("snr", 2 * sigma_of(index.double() / 1000).log(), (0.348, 0.709), "")):
        for name, paper, ours in zip(("t1", "t2"), printed, best_thirds(level)):
            row("Table 4", f"{method}: {name}", paper, ours, note)
    for name, edge in zip(("sigma_1 of t1 = .442", "sigma_2 of t2 = .631"), EDGES):
        row("footnote 4", name, None, float(sigma_of(edge)),
            "the official EDM code has 7.6577, the sigma of .636" if edge > 0.5 else "as in the official code")
    return found
