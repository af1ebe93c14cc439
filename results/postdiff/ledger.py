"""Tables 1 and 2 of PostDiff (arXiv 2508.06160): T FLOPs of an image, with the papers' own networks, which are here and
nowhere else: Stable Diffusion v1.5's U-Net at 768x768, and diffusers' SDXL and PixArt-alpha at 1024x1024 (the rows of
these two need `pip install diffusers`). `python results/ledger.py postdiff` prints them.

Each cell is a run of postdiff.py's sampler on the meta device. ours: in the paper's counting rule, MACs of convolutions
and linear layers (the paper adds biases and norms: 0.1 %); with_attention: all that is executed, attention's products
included.
"""
import functools
import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from common import linear_alpha_bar
from postdiff import mixed_resolution_sample, uniform_steps

# numbers of mixed_resolution_sample: DC is DeepCache, CA the frozen cross-attentions, m of 20 steps guided
DC = dict(k=2, depth=1)
CA = dict(choice="cond")


# ---------------------------------------------------------------------------------------------
# Stable Diffusion's U-Net, latents of 96x96
# ---------------------------------------------------------------------------------------------
class ResBlock(nn.Module):
    """norm - SiLU - conv, plus the time embedding, norm - SiLU - conv, plus the input."""

    def __init__(self, c_in, c_out, c_emb=1280):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, c_in, eps=1e-6), nn.GroupNorm(32, c_out, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.emb(emb)[..., None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Tokens x (B, N, c) look at tokens y (B, M, c_y); 8 heads."""

    def __init__(self, c, c_y):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(c, c, False), nn.Linear(c_y, c, False), nn.Linear(c_y, c, False)
        self.out = nn.Linear(c, c)

    def forward(self, x, y):
        q, k, v = (h.unflatten(-1, (8, -1)).transpose(1, 2) for h in (self.q(x), self.k(y), self.v(y)))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Self-attention, cross-attention to the text (B, L, 768), GEGLU. cross: what the cross-attention gave before
    (B, c, h, w), used instead of it, resized if need be (D7). Returns the result and what the cross-attention gave."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.proj_in, self.proj_out = nn.GroupNorm(32, c, eps=1e-6), nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(c), nn.LayerNorm(c), nn.LayerNorm(c)
        self.self_attention, self.cross_attention = Attention(c, c), Attention(c, 768)
        self.ff_in, self.ff_out = nn.Linear(c, 8 * c), nn.Linear(4 * c, c)

    def forward(self, x, text, cross=None):
        size = x.shape[-2:]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)              # (B, H W, c)
        y = self.norm1(h)
        h = h + self.self_attention(y, y)
        if cross is None:
            cross = self.cross_attention(self.norm2(h), text).transpose(1, 2).unflatten(2, size)
        elif cross.shape[-2:] != size:
            cross = F.interpolate(cross, size=size, mode="bilinear", align_corners=False)
        h = h + cross.flatten(2).transpose(1, 2)
        a, gate = self.ff_in(self.norm3(h)).chunk(2, dim=-1)
        h = h + self.ff_out(a * F.gelu(gate))
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, size)), cross


class Resample(nn.Module):
    """A convolution that halves, or one after doubling."""

    def __init__(self, c, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(c, c, 3, stride=1 if up else 2, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class UNet(nn.Module):
    """Called as mixed_resolution_sample calls its net: returns eps_hat, deep, cross (see postdiff.py)."""

    def __init__(self, ch=320, mult=(1, 2, 4, 4), blocks=2, attention=(0, 1, 2)):
        super().__init__()
        self.ch, made = ch, itertools.count()
        self.emb = nn.Sequential(nn.Linear(ch, 4 * ch), nn.SiLU(), nn.Linear(4 * ch, 4 * ch))

        def stage(c_in, c, attend, *more):
            layers = [ResBlock(c_in, c)]
            if attend:
                layers.append(Transformer(c))
                layers[-1].index = next(made)                                  # its name in the cache
            return nn.ModuleList([*layers, *more])

        c, skips = ch, [ch]
        self.down = nn.ModuleList([nn.ModuleList([nn.Conv2d(4, ch, 3, padding=1)])])
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.down.append(stage(c, ch * m, level in attention))
                c = ch * m
                skips.append(c)
            if level < len(mult) - 1:
                self.down.append(nn.ModuleList([Resample(c, up=False)]))
                skips.append(c)
        self.mid = stage(c, c, True, ResBlock(c, c))
        self.up = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for block in range(blocks + 1):
                double = [Resample(ch * m, up=True)] if level > 0 and block == blocks else []
                self.up.append(stage(c + skips.pop(), ch * m, level in attention, *double))
                c = ch * m
        self.norm_out, self.conv_out = nn.GroupNorm(32, c, eps=1e-6), nn.Conv2d(c, 4, 3, padding=1)

    def forward(self, xt, t, text, deep=None, cross=None, depth=1):
        angle = t.float()[:, None] * torch.logspace(0, -4, self.ch // 2, device=t.device)
        emb, used, cross = F.silu(self.emb(torch.cat([angle.sin(), angle.cos()], dim=1))), {}, cross or {}

        def run(stage, h):
            for layer in stage:
                if isinstance(layer, Transformer):
                    h, used[layer.index] = layer(h, text, cross.get(layer.index))
                else:
                    h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            return h

        n = len(self.down)
        first = 0 if deep is None else n - 1 - depth                           # of the up stages
        h, skips = xt, []
        for stage in self.down[:n - first]:
            h = run(stage, h)
            skips.append(h)
        h = run(self.mid, h) if deep is None else deep
        for i in range(first, n):
            if i == n - 1 - depth:
                deep = h
            h = run(self.up[i], torch.cat([h, skips.pop()], dim=1))
        return self.conv_out(F.silu(self.norm_out(h))), deep, used


# ---------------------------------------------------------------------------------------------
# SDXL and PixArt-alpha: diffusers' own classes, called as mixed_resolution_sample calls its net
# ---------------------------------------------------------------------------------------------
class CrossAttentionCache:
    """A processor for one cross-attention of diffusers: notes in `used` what the real one gives, or gives `cross`."""

    def __init__(self, name, processor, state):
        self.name, self.processor, self.state = name, processor, state

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        out = self.state["cross"].get(self.name)
        if out is None:
            out = self.processor(attn, hidden_states, encoder_hidden_states=encoder_hidden_states,
                                 attention_mask=attention_mask, temb=temb)
        self.state["used"][self.name] = out
        return out


def shallow_pass(unet, deep, sample, timestep, encoder_hidden_states, added_cond_kwargs):
    """DeepCache's shallow pass of a UNet2DConditionModel, depth 1 (D5): eps_hat from the deep features."""
    emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    emb = emb + unet.get_aug_embed(emb=emb, encoder_hidden_states=encoder_hidden_states,
                                   added_cond_kwargs=added_cond_kwargs)
    first, up = unet.conv_in(sample), unet.up_blocks[-1]                       # SDXL's have no attention
    skip = unet.down_blocks[0].resnets[0](first, emb)
    h = up.resnets[-2](torch.cat([deep, skip], dim=1), emb)
    h = up.resnets[-1](torch.cat([h, first], dim=1), emb)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def diffusers_net(kind):
    """(net, text features, denoiser) of SDXL's U-Net or of PixArt-alpha. Raises ImportError without diffusers."""
    import diffusers
    if kind == "PixArt":
        denoiser = diffusers.PixArtTransformer2DModel(sample_size=128, caption_channels=4096)
        text = torch.zeros(1, 120, 4096)                                       # 120 text tokens fit all cells
        more = dict(resolution=torch.zeros(2, 2), aspect_ratio=torch.zeros(2, 1))
    else:
        denoiser = diffusers.UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
        text, more = torch.zeros(1, 77, 2048), dict(text_embeds=torch.zeros(2, 1280), time_ids=torch.zeros(2, 6))
        c_skip, inner = denoiser.down_blocks[0].resnets[0].out_channels, denoiser.up_blocks[-1].resnets[-2]
        inner.register_forward_pre_hook(lambda module, inputs: state.update(deep=inputs[0][:, :-c_skip]))
    state = {}
    denoiser.set_attn_processor({name: CrossAttentionCache(name, p, state) if ".attn2." in name else p
                                 for name, p in denoiser.attn_processors.items()})

    def net(xt, t, text, deep=None, cross=None, depth=1):
        state.update(used={}, cross=cross or {}, deep=deep)
        inputs = dict(timestep=t, encoder_hidden_states=text,
                      added_cond_kwargs={key: value[:len(xt)] for key, value in more.items()})
        eps_hat = denoiser(xt, **inputs)[0] if deep is None else shallow_pass(denoiser, deep, xt, **inputs)
        return eps_hat[:, :4], state["deep"], state["used"]                    # PixArt gives a variance, too
    return net, text, denoiser


# ---------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------
def macs_by_operator(fn):
    """Multiply-accumulates of the call fn(), executed under torch's own counter: {name of its operator: MACs}."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fn()
    counts = counter.get_flop_counts().get("Global", {})                       # none, if nothing was counted
    return {str(op): n // 2 for op, n in counts.items()}                       # 2 FLOPs a MAC


def without_attention(macs):
    """The sum of macs_by_operator without attention's products, as the paper's counter has it."""
    return sum(n for name, n in macs.items() if name in ("aten.convolution", "aten.mm", "aten.addmm"))


def counting(net, total):
    """net, on the meta device: adds each call's MACs to total = [without the products of attention, with them],
    counted by execution at the first call of each kind."""
    seen = {}

    def call(xt, t, text, deep=None, cross=None, depth=1):
        key = xt.shape, text.shape, deep is None, depth, tuple((i, out.shape) for i, out in (cross or {}).items())
        if key not in seen:
            kept = []
            macs = macs_by_operator(lambda: kept.append(net(xt, t, text, deep, cross, depth)))
            seen[key] = without_attention(macs), sum(macs.values()), kept[0]
        total[0], total[1] = total[0] + seen[key][0], total[1] + seen[key][1]
        return seen[key][2]
    return call


@functools.cache
def counted(kind):
    """(net that counts, its total, text features (1, L, c), parameters) of SD, SDXL or PixArt, on the meta device."""
    with torch.device("meta"):
        unet = UNet() if kind == "SD" else None
        net, text, modules = diffusers_net(kind) if unet is None else (unet, torch.zeros(1, 77, 768), unet)
    size, total = sum(p.numel() for p in modules.parameters()), [0, 0]
    for module in list(modules.modules()):                     # no MACs, but most of the time of counting
        for name, child in module.named_children():
            if isinstance(child, (nn.GroupNorm, nn.LayerNorm, nn.SiLU)):
                setattr(module, name, nn.Identity())
    return counting(net, total), total, text, size


@functools.cache
def cells(kind="SD", steps=20, low=None, w=7.5, **numbers):
    """[without, with attention's products] in T MACs of an image in `steps` steps. low: side of the low resolution;
    numbers: of mixed_resolution_sample; w None: a network that needs no guidance (LCM)."""
    net, total, text, _ = counted(kind)
    total[:] = 0, 0
    full = 96 if kind == "SD" else 128
    with torch.device("meta"):
        noise, low_noise = torch.zeros(1, 4, full, full), low and torch.zeros(1, 4, low, low)
    mixed_resolution_sample(net, noise, uniform_steps(999, steps), linear_alpha_bar(1000), text,
                            torch.zeros_like(text), w, low_noise=low_noise, **numbers)
    return [n / 1e12 for n in total]


def cross_attention_savings():
    """What freezing the cross-attentions of Stable Diffusion's U-Net saves in a full and in a shallow pass, T MACs."""
    net, total, text, _ = counted("SD")
    with torch.device("meta"):
        inputs = torch.zeros(1, 4, 96, 96), torch.zeros(1), text

    def macs(**caches):
        total[:] = 0, 0
        kept = net(*inputs, **caches)
        return total[0] / 1e12, kept
    full, (_, deep, cross) = macs()
    return full - macs(cross=cross)[0], macs(deep=deep)[0] - macs(deep=deep, cross=cross)[0]


# ---------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------
def rows():
    """The paper's cells and ours: list of dicts {table, cell, paper, ours, with_attention, note}."""
    found = []

    def row(table, cell, paper, ours, executed=None, note=""):
        found.append(dict(table=table, cell=cell, paper=paper, ours=ours, with_attention=executed, note=note))

    row("Sec. 3.1", "SD v1.5: parameters", None, counted("SD")[-1], note="diffusers': 859,520,964")
    row("Table 1", "Original", 30.420, *cells())
    row("Table 1", "Original w/o CFG", 15.210, *cells(w=None))
    row("Table 1", "DC", 17.787, *cells(**DC))
    saved_full, saved_shallow = cross_attention_savings()
    for m, paper, late in ((5, 11.610, 7), (10, "15.061?", 5), (15, 16.360, 2)):
        ours, executed = cells(n_guided=m, **DC, **CA)
        row("Table 1", f"DC+CA, m = {m}: the cell's accounting", paper,
            ours - late * (saved_full - saved_shallow), None,
            "15.061 or 13.001 in copies of the text; no rule that fits m = 5, 15 gives either" if m == 10 else
            f"takes all cross-attentions off the {late} shallow passes too, which hold 3 of the 16")
        row("Table 1", f"DC+CA, m = {m}: executed", None, ours, executed)
    for steps, paper in ((8, 12.168), (16, 24.336), (20, 30.420)):
        row("Table 2", f"SD v1.5, {steps} steps", paper, *cells(steps=steps))
    mix = dict(n_low=10, low=48)                                               # s = beta = 1/2
    row("Table 2", "SD v1.5, mix", 19.035, *cells(**mix))
    row("Table 2", "SD v1.5, PostDiff: the cell's accounting", 11.129, *cells(**mix, **DC),
        note="mix and DC, guidance in all 20 steps, no cross-attention cache")
    row("Table 2", "SD v1.5, PostDiff: executed", None, *cells(**mix, n_guided=15, **DC, **CA),
        note="with m = 15 and the cache, as described: not the cell's 11.129")
    for steps, paper in ((4, 3.042), (8, 6.084)):
        row("Table 2", f"LCM, {steps} steps", paper, *cells(steps=steps, w=None),
            note="Stable Diffusion's U-Net without guidance; LCM's own embedding of w adds 0.0001 G")
    mix = dict(steps=8, n_low=4, low=48, w=None)
    row("Table 2", "LCM, mix", 3.807, *cells(**mix))
    row("Table 2", "LCM, PostDiff", 3.686, *cells(**mix, n_guided=4, **CA),
        note="the low-resolution cross-attentions serve the full-resolution steps")

    for kind, n_low, cache, papers in (("SDXL", 4, DC, (47.856, 95.712, 119.641, 109.264, 52.682)),
                                       ("PixArt", 10, {}, (34.256, 68.512, 85.640, 66.990, 54.718))):
        try:
            row("Sec. 3.1", f"{kind}: parameters", None, counted(kind)[-1])
        except ImportError:
            row("Table 2", kind, papers[2], None, note="not counted: pip install diffusers")
            continue
        mix = dict(n_low=n_low, low=96)                                        # beta = 3/4
        runs = [(f"{n} steps", dict(steps=n)) for n in (8, 16, 20)]
        runs += [("mix", mix), ("PostDiff", dict(mix, n_guided=15, **cache, **CA))]
        for (name, numbers), paper in zip(runs, papers):
            row("Table 2", f"{kind}, {name}", paper, *cells(kind, **numbers),
                note="0.04 % of the paper's count is not explained" if kind == "SDXL" and name == "8 steps" else "")
    return found
