"""postdiff.py against independent oracles: the paper's cells, diffusers' own classes and pipelines, plain guidance, a
naive PostDiff; then its command line with the preset tiny.

Tests that need diffusers are skipped where it is not installed (`pip install diffusers==0.42.1`).
"""
import functools
import importlib.machinery
import importlib.util
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import c2f_trd
import common
import postdiff as p
from common import linear_alpha_bar, macs_by_operator
from in_process import start_script

ABAR = linear_alpha_bar(1000)
ROOT = Path(common.__file__).resolve().parent
SCRIPT = ROOT / "postdiff.py"
TAUS = [999, 800, 640, 500, 380, 250, 130, 40]


def preset(name, **changes):
    config = {k: v[p.PRESET_NAMES.index(name)] for k, v in p.PRESETS.items()}
    return dict(config, **dict(dict(arch="unet", phase="base"), **changes))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def awake_net(config=None, channels=3, words=9, seed=0):
    """A net of random weights, all of them."""
    torch.manual_seed(seed)
    return p.build_net(config or preset("tiny"), channels, words).eval().requires_grad_(False)


TEXT = torch.tensor([[1, 2, 0, 0, 0, 0], [3, 9, 4, 0, 0, 0]])
NULL = torch.zeros_like(TEXT)


# ---------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sd():
    """Stable Diffusion's U-Net on the meta device, and its MACs (without, with attention's products) per call."""
    with torch.device("meta"):
        net = p.build_net(preset("paper"), 4)
        inputs = [torch.zeros(1, 4, 96, 96), torch.zeros(1, dtype=torch.long), torch.zeros(1, 77, 768)]

    def count(res=96, **caches):
        kept = []
        inputs[0] = torch.zeros(1, 4, res, res, device="meta")
        macs = macs_by_operator(lambda: kept.append(net(*inputs, **caches)))
        return p.without_attention(macs), sum(macs.values()), kept[0]
    return SimpleNamespace(net=net, count=count)


def test_stable_diffusions_network(sd):
    """Parameters and MACs of one pass, to the integer; the cross-attentions' share; DeepCache's cut at some depths."""
    assert sum(x.numel() for x in sd.net.parameters()) == 859_520_964
    full, executed, (_, deep, cross) = sd.count()
    assert (full, executed) == (759_993_958_400, 1_074_060_861_440)
    assert len(cross) == 16 and deep.shape == (1, 320, 96, 96)
    late, _, _ = sd.count(cross=cross)
    assert (full - late) / 1e9 == pytest.approx(30.2595, rel=1e-3)
    shallow = sd.count(deep=deep)[0]
    assert shallow == 128_674_856_960
    assert (shallow - sd.count(deep=deep, cross=cross)[0]) / 1e9 == pytest.approx(5.7759, rel=1e-3)
    for depth, expected in ((0, .0466), (4, .3768)):                           # measured on DeepCache's own helper
        deep = sd.count(depth=depth)[2][1]
        assert sd.count(deep=deep, depth=depth)[0] / 1e12 == pytest.approx(expected, rel=3e-3)


@torch.no_grad()
def test_network_is_diffusers():
    """The same weights in UNet2DConditionModel give the same eps_hat."""
    diffusers = pytest.importorskip("diffusers")
    config = preset("tiny", ch=16, mult=[1, 2, 2], attention=[0, 1], heads=2, c_text=12, patch=1, blocks=2,
                    predict="eps")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=4, norm_eps=1e-6, cross_attention_dim=12,
        attention_head_dim=2, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")).eval()
    for w in theirs.parameters():
        w.add_(0.1 * torch.randn_like(w))
    net = awake_net(config, 4, 0)

    def stages(blocks, sampler):
        for block in blocks:
            attentions = [*getattr(block, "attentions", [])] + 9 * [None]
            for resnet, attention in zip(block.resnets, attentions):
                yield [x for x in (resnet, attention) if x is not None]
            for extra in getattr(block, sampler, None) or []:
                yield [extra]

    flat = [layer for stage in stages(theirs.down_blocks, "downsamplers") for layer in stage]
    mid = theirs.mid_block
    flat += [mid.resnets[0], mid.attentions[0], mid.resnets[1]]
    flat += [layer for stage in stages(theirs.up_blocks, "upsamplers") for layer in stage]
    ours = [layer for stage in [*net.down[1:], net.mid, *net.up] for layer in stage]
    pairs = [(net.emb[0], theirs.time_embedding.linear_1), (net.emb[2], theirs.time_embedding.linear_2),
             (net.down[0][0], theirs.conv_in), (net.norm_out, theirs.conv_norm_out), (net.conv_out, theirs.conv_out)]
    for a, b in zip(ours, flat, strict=True):
        if isinstance(a, p.ResBlock):
            pairs += [(a.norm1, b.norm1), (a.conv1, b.conv1), (a.emb, b.time_emb_proj), (a.norm2, b.norm2),
                      (a.conv2, b.conv2)] + ([(a.skip, b.conv_shortcut)] if b.conv_shortcut is not None else [])
        elif isinstance(a, p.Transformer):
            block = b.transformer_blocks[0]
            pairs += [(a.norm, b.norm), (a.proj_in, b.proj_in), (a.proj_out, b.proj_out), (a.norm1, block.norm1),
                      (a.norm2, block.norm2), (a.norm3, block.norm3), (a.ff_in, block.ff.net[0].proj),
                      (a.ff_out, block.ff.net[2])]
            for mine, other in ((a.self_attention, block.attn1), (a.cross_attention, block.attn2)):
                pairs += [(mine.q, other.to_q), (mine.k, other.to_k), (mine.v, other.to_v), (mine.out, other.to_out[0])]
        else:
            pairs.append((a.conv, b.conv))
    for a, b in pairs:
        assert a.weight.shape == b.weight.shape and (a.bias is None) == (b.bias is None)
        a.load_state_dict(b.state_dict())
    assert sum(w.numel() for a, _ in pairs for w in a.parameters()) == sum(w.numel() for w in theirs.parameters())
    t, text = torch.tensor([3, 700]), randn(2, 5, 12)
    for res in (8, 12):
        xt = randn(2, 4, res, res, seed=res)
        expected = theirs(xt, t, text).sample
        assert float((net(xt, t, text)[0] - expected).norm() / expected.norm()) < 1e-5
    # and its shallow pass, from deep features of another input, is the adapter's
    grabbed = []
    inner = theirs.up_blocks[-1].resnets[-2]
    handle = inner.register_forward_pre_hook(lambda m, args: grabbed.append(args[0][:, :-16]))
    theirs(xt, t, text)
    handle.remove()
    _, deep, _ = net(xt, t, text)
    assert torch.allclose(grabbed[0], deep, atol=1e-4)
    other = randn(2, 4, 12, 12, seed=9)
    a, b = net(other, t, text, deep=deep)[0], p.shallow_pass(theirs, deep, other, t, text)
    assert float((a - b).norm() / b.norm()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_shallow_pass_with_fresh_features_is_the_full_pass(depth):
    net, xt, t = awake_net(), randn(2, 3, 16, 16), torch.tensor([5, 900])
    ran = []
    for name in ("down", "up"):
        for i, stage in enumerate(getattr(net, name)):
            stage[0].register_forward_hook(lambda *a, tag=(name, i): ran.append(tag))
    net.mid[0].register_forward_hook(lambda *a: ran.append("mid"))
    full, deep, cross = net(xt, t, TEXT, depth=depth)
    assert len(ran) == 2 * len(net.down) + 1 and len(cross) == 7
    ran.clear()
    shallow, again, used = net(xt, t, TEXT, deep=deep, depth=depth)
    n = len(net.down)
    assert ran == [("down", i) for i in range(depth + 1)] + [("up", n - 1 - depth + i) for i in range(depth + 1)]
    assert torch.equal(full, shallow) and again is deep and set(used) < set(cross)
    assert not torch.equal(full, net(xt, t, TEXT, deep=deep + 1, depth=depth)[0])


@torch.no_grad()
def test_frozen_cross_attention():
    net, xt, t = awake_net(), randn(2, 3, 16, 16), torch.tensor([5, 900])
    full, _, cross = net(xt, t, TEXT)
    assert torch.equal(net(xt, t, TEXT, cross=cross)[0], full)
    assert torch.equal(net(xt, t, NULL, cross=cross)[0], full)                 # the text matters no more
    assert not torch.equal(net(xt, t, NULL)[0], full)
    big = randn(2, 3, 32, 32, seed=1)
    _, _, resized = net(big, t, TEXT, cross=cross)                             # made at 16, used at 32
    for i, out in resized.items():
        expected = F.interpolate(cross[i], scale_factor=2, mode="bilinear", align_corners=False)
        assert out.shape[-1] == 2 * cross[i].shape[-1] and torch.equal(out, expected)


def test_network_sees_its_whole_input():
    torch.manual_seed(0)
    net, xt = p.build_net(preset("tiny"), 3, 9), randn(2, 3, 16, 16).requires_grad_()
    eps_hat, _, _ = net(xt, torch.tensor([500, 500]), TEXT)
    eps_hat[:, 0, 8, 8].sum().backward()
    assert (xt.grad != 0).all()
    rows = net.text.word.weight.grad.abs().sum(1)
    assert (rows[[0, 1, 2, 3, 4, 9]] > 0).all() and (rows[5:9] == 0).all()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in net.parameters())
    for shape in ((2, 3, 6, 16), (2, 3, 16, 2)):
        with pytest.raises(ValueError, match="multiple"):
            net(torch.zeros(shape), torch.tensor([1, 1]), TEXT)


# ---------------------------------------------------------------------------------------------
# Sampler: the off switch, the schedule, the switch
# ---------------------------------------------------------------------------------------------
def options(**more):
    return dict(dict(noise=randn(2, 3, 16, 16), taus=TAUS, alpha_bar=ABAR, text=TEXT, null=NULL, w=2.5,
                     low_noise=randn(2, 3, 8, 8, seed=1)), **more)


def guided(net, w=2.5):
    """Plain classifier-free guidance, Eq. 6."""
    def eps_model(xt, t):
        both = net(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([NULL, TEXT]))[0]
        return both[:2] + w * (both[2:] - both[:2])
    return eps_model


@torch.no_grad()
@pytest.mark.parametrize("order", [1, 2])
def test_off_is_plain_sampling(order):
    """No low steps, interval 1, guidance throughout: c2f_trd's DDIM and DPM-Solver++ to equal tensors."""
    net = awake_net()
    expected = c2f_trd.dpm_solver_pp_sample(guided(net), randn(2, 3, 16, 16), TAUS, ABAR, order)
    for off in ({}, dict(n_guided=8), dict(k=1, depth=0, choice="cfg"), dict(n_low=0, choice="none")):
        assert torch.equal(p.mixed_resolution_sample(net, **options(order=order, **off)), expected)
    for on in (dict(n_low=1), dict(k=2), dict(n_guided=7), dict(w=1.0)):
        found = p.mixed_resolution_sample(net, **options(order=order, **on))
        assert found.shape == expected.shape and found.isfinite().all() and not torch.equal(found, expected)
    alone = c2f_trd.dpm_solver_pp_sample(lambda xt, t: net(xt, t, TEXT)[0], randn(2, 3, 16, 16), TAUS, ABAR, order)
    for off in (dict(n_guided=0), dict(n_guided=0, choice="none"), dict(w=None)):       # without guidance at all
        assert torch.equal(p.mixed_resolution_sample(net, **options(order=order, **off)), alone)


@torch.no_grad()
@pytest.mark.parametrize("order", [1, 2])
def test_mixed_resolution_is_two_plain_runs(order):
    """n low steps; x0_hat of the last one, up-sampled, noised to the next step; a new history from there."""
    net, n, seen = awake_net(), 3, []
    low = randn(2, 3, 8, 8, seed=1)
    c2f_trd.dpm_solver_pp_sample(guided(net), low, TAUS, ABAR, order, stop=n,
                                 trace=lambda xt, history: seen.append(history[0][1]))
    up = F.interpolate(seen[-1], size=16, mode="bilinear", align_corners=False)
    a = float(ABAR[TAUS[n]])
    xt = a ** 0.5 * up + (1 - a) ** 0.5 * randn(2, 3, 16, 16)
    expected = c2f_trd.dpm_solver_pp_sample(guided(net), xt, TAUS[n:], ABAR, order)
    rows = []
    found = p.mixed_resolution_sample(net, **options(n_low=n, order=order, trace=lambda i, xt, x0_hat, cache:
                                                     rows.append((i, xt.shape[-1], x0_hat))))
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert [row[:2] for row in rows] == [(i, 8 if i < n else 16) for i in range(8)]
    assert torch.equal(rows[n - 1][2], seen[-1])


def test_switch_resolution_by_hand():
    x0, eps = torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]]), torch.ones(1, 1, 4, 4)
    xt = p.switch_resolution(x0, eps, torch.tensor([300]), ABAR)
    rows = torch.tensor([0.0, 0.25, 0.75, 1.0])                                # half-pixel centres, clamped
    up = 8 * rows[:, None] + 4 * rows
    a = float(ABAR[300])
    assert torch.allclose(xt[0, 0], a ** 0.5 * up + (1 - a) ** 0.5)


def spy(calls):
    """A net that notes what it is asked for: (batch, size, full?, number of frozen cross-attentions)."""
    def net(xt, t, text, deep=None, cross=None, depth=1):
        assert deep is None or deep.shape == (len(xt), 1, *xt.shape[-2:])
        calls.append((len(xt), xt.shape[-1], deep is None, len(cross)))
        size = xt.shape[-1]
        return (0.1 * xt, xt[:, :1] if deep is None else deep,
                {0: xt.new_ones(len(xt), 1, size, size)} if deep is not None else
                {i: xt.new_ones(len(xt), 1, size, size) for i in range(2)})
    return net


@pytest.mark.parametrize("K, n_low, k, n_guided, choice, expected", [
    (20, 10, 2, 15, "cond", "FcFcFcFcFc|FcFcF!FcFcF"),     # Table 2, SD v1.5: full at 10 and again at 15
    (20, 4, 2, 15, "cond", "FcFc|FcFcFcFcFcF!FcFcF"),      # SDXL
    (20, 0, 2, 5, "cond", "FcFcF!FcFcFcFcFcFcFcF"),        # Table 1, m = 5
    (20, 0, 2, 10, "ave", "FcFcFcFcFc!FcFcFcFcFc"), (20, 0, 2, 20, "cond", "FcFcFcFcFcFcFcFcFcFc"),
    (8, 4, 1, 4, "cond", "FFFF|!FFFF"), (9, 0, 3, 4, "uncond", "FccF!FccFc"), (6, 3, 5, 6, "none", "Fcc|Fcc"),
    (6, 0, 2, 3, "none", "FcF?FcF"), (7, 3, 4, 2, "cond", "Fc!F|Fccc")])
def test_schedule(K, n_low, k, n_guided, choice, expected):
    """| the size changes, ! guidance ends and cross-attentions are frozen, ? it ends and they are not."""
    calls, size, batch, frozen, wanted = [], 8 if n_low else 16, 4, 0, []
    for c in expected:
        if c == "|":
            size = 16
        elif c in "!?":
            batch, frozen = 2, 2 * (c == "!")
        else:
            wanted.append((batch, size, c == "F", frozen))
    p.mixed_resolution_sample(spy(calls), **options(taus=p.uniform_steps(999, K, "trailing"), n_low=n_low, k=k,
                                                    n_guided=n_guided, choice=choice))
    assert calls == wanted


@torch.no_grad()
def test_caches_against_a_naive_sampler():
    """DeepCache and the frozen cross-attention written out step by step, with a net whose caches are real."""
    net, m, w, kept = awake_net(), 5, 2.5, None
    text2 = torch.cat([NULL, TEXT])
    for choice in ("cond", "uncond", "ave", "cfg"):
        xt, latest = randn(2, 3, 16, 16), {}
        for i, tau in enumerate(TAUS):
            t = torch.full((2,), tau)
            if i < m:
                x2, t2 = torch.cat([xt, xt]), torch.cat([t, t])
                eps, kept, used = net(x2, t2, text2, deep=None if i % 2 == 0 else kept)
                latest.update(used)
                eps = eps[:2] + w * (eps[2:] - eps[:2])
            else:
                if i == m:
                    frozen = {j: {"cond": o[2:], "uncond": o[:2], "ave": 0.5 * (o[:2] + o[2:]),
                                  "cfg": o[:2] + w * (o[2:] - o[:2])}[choice] for j, o in latest.items()}
                eps, kept, _ = net(xt, t, TEXT, deep=None if (i - m) % 2 == 0 else kept, cross=frozen)
            a, b = float(ABAR[tau]), float(ABAR[[*TAUS, -1][i + 1]])
            x0 = (xt - (1 - a) ** 0.5 * eps) / a ** 0.5
            xt = b ** 0.5 * x0 + (1 - b) ** 0.5 * eps
        found = p.mixed_resolution_sample(net, **options(k=2, n_guided=m, choice=choice))
        assert float((found - xt).norm() / xt.norm()) < 1e-3, choice


def exact_net(images):
    """The exact denoiser of five images at 16x16 and of their area averages at 8x8: word k is image k - 1, none any."""
    data = {16: images, 8: F.avg_pool2d(images, 2)}

    def net(xt, t, text, deep=None, cross=None, depth=1):
        x, a = data[xt.shape[-1]], ABAR[t].view(-1, 1).float()
        gap = torch.stack([(xt[i] - a[i].sqrt() * x).square().flatten(1).sum(1) for i in range(len(xt))])
        logits = -gap / (2 * (1 - a))
        other = (text[:, :1] > 0) & (text[:, :1] != torch.arange(1, 6))
        x0_hat = torch.einsum("bn,nchw->bchw", logits.masked_fill(other, -1e9).softmax(1), x)
        a = a.view(-1, 1, 1, 1)
        return (xt - a.sqrt() * x0_hat) / (1 - a).sqrt(), xt[:, :1] if deep is None else deep, {}
    return net


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("more", [{}, dict(n_low=4), dict(n_low=6, n_guided=9, choice="none"), dict(n_guided=0)])
def test_an_exact_model_draws_what_the_prompt_says(more, order):
    """With exact denoisers every variant of the sampler ends at the prompted image, whatever the noise."""
    images, text = randn(5, 3, 16, 16, seed=5).sign() * 0.8, torch.arange(1, 6)[:, None]
    taus = p.uniform_steps(999, 12, "trailing")
    found = p.mixed_resolution_sample(exact_net(images), randn(5, 3, 16, 16), taus, ABAR, text,
                                      0 * text, 1.5, low_noise=randn(5, 3, 8, 8, seed=1), order=order, **more)
    assert torch.allclose(found, images, atol=1e-2)


def test_the_cache_is_a_value():
    """The same cache given twice gives the same result: nothing is kept in the net, nothing changed in the cache."""
    net, xt, t = awake_net(), randn(2, 3, 16, 16), torch.tensor([700, 700])
    _, cache = p.cached_eps(net, xt, t, TEXT, NULL, 2.0, p.EMPTY, k=2)
    later = t - 100
    first = p.cached_eps(net, xt, later, TEXT, NULL, 2.0, cache, k=2)[0]
    p.cached_eps(net, randn(2, 3, 8, 8), later, TEXT, NULL, 2.0, cache, k=2)
    assert torch.equal(p.cached_eps(net, xt, later, TEXT, NULL, 2.0, cache, k=2)[0], first)
    assert p.EMPTY == dict(size=None, age=0, deep=None, cross={}, frozen={})


def test_choose_by_hand():
    out = torch.tensor([[1.0], [2.0], [10.0], [20.0]])                         # null, null, text, text
    for choice, expected in (("cond", [10, 20]), ("uncond", [1, 2]), ("ave", [5.5, 11]), ("cfg", [28, 56])):
        assert p.choose(out, choice, 3.0)[:, 0].tolist() == expected


def test_samples_do_not_depend_on_the_batch():
    net = awake_net()
    more = dict(n_low=3, k=2, n_guided=5)
    both = p.mixed_resolution_sample(net, **options(**more))
    one = p.mixed_resolution_sample(net, **options(noise=randn(2, 3, 16, 16)[1:], text=TEXT[1:], null=NULL[1:],
                                                   low_noise=randn(2, 3, 8, 8, seed=1)[1:], **more))
    assert float((both[1:] - one).norm() / one.norm()) < 1e-4


@pytest.mark.parametrize("bad", [dict(n_low=8), dict(n_low=-1), dict(n_guided=9), dict(n_guided=-1), dict(k=0),
                                 dict(choice="best"), dict(taus=[5, 5]), dict(taus=[1, 2])])
def test_bad_numbers(bad):
    with pytest.raises(ValueError):
        p.mixed_resolution_sample(spy([]), **options(**bad))


# ---------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------
GRID = {8: "12.168 11.029 9.891 9.891 8.752 7.614 6.475", 10: "15.210 14.071 12.933 11.794 10.656 9.517 8.379",
        12: "18.252 17.113 15.975 13.698 12.559 11.421 10.282", 14: "21.294 20.155 17.878 16.740 14.463 13.324 12.186",
        16: "24.336 22.059 20.920 18.643 17.505 15.228 12.951", 18: "27.378 25.101 22.824 21.685 19.408 17.131 14.854",
        20: "30.420 28.143 25.866 23.589 21.312 19.035 16.758"}


@pytest.mark.parametrize("K", GRID)
def test_number_of_low_steps(K):
    """Fig. 4's grid at beta = 1/2, s = 0 ... 0.6: 2 [(K - n) F + n f] with F, f of one pass in T."""
    for i, expected in enumerate(GRID[K].split()):
        plan = p.make_plan("mixed", preset("paper"), steps=K, s=i / 10)
        n = plan["n_low"]
        assert 2 * ((K - n) * 0.76049 + n * 0.19125) == pytest.approx(float(expected), abs=2e-3)
        assert plan["low"] == 48


@pytest.mark.parametrize("method, more, paper", [                              # T, without attention's products
    ("cache", dict(m=1.0), 17.787), ("mixed", {}, 19.035), ("postdiff", dict(m=1.0), 11.129),
    ("cache", dict(m=0.25), 11.7816), ("postdiff", {}, 9.7506)])               # the last two: executed, not printed
def test_cells_of_stable_diffusion(method, more, paper):
    ours, executed = p.plan_macs(preset("paper"), 4, 0, p.make_plan(method, preset("paper"), **more))
    assert ours / 1e12 == pytest.approx(paper, rel=1.2e-3) and executed > ours


def test_macs_of_a_plan_are_those_of_its_calls():
    """Counted once for each kind of call, the sum is that of a run in which every call is counted."""
    config = preset("tiny")
    for method in ("cache", "postdiff"):
        plan = p.make_plan(method, config, steps=4)
        with torch.device("meta"):
            net = p.build_net(config, 3, 9).eval()
            noise, low = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 8, 8)
            text = torch.zeros(1, 6, dtype=torch.long)
        macs = common.count_macs(p.run_plan, net, plan, [noise, low], text, ABAR)
        assert p.plan_macs(config, 3, 9, plan)[1] == macs
    assert macs < 0.5 * p.plan_macs(config, 3, 9, p.make_plan("base", config, steps=4))[1]


@pytest.mark.parametrize("kind, papers", [("PixArt", (85.640, 66.990, 54.718))])
def test_cells_of_diffusers_models(kind, papers, monkeypatch):
    """PixArt with 2 of its 28 layers counted for all: what is no layer costs little and is counted apart."""
    diffusers = pytest.importorskip("diffusers")
    real, found = diffusers.PixArtTransformer2DModel, {}
    for layers in (1, 2):
        monkeypatch.setattr(diffusers, "PixArtTransformer2DModel",
                            lambda n=layers, **options: real(num_layers=n, **options))
        found[layers] = {k: sum(a for a, _ in v) for k, v in p.diffusers_macs(kind)[0].items()}
    for setting, paper in zip(("plain", "mix", "postdiff"), papers):
        one, two = found[1][setting], found[2][setting]
        assert (one + 27 * (two - one)) / 1e12 == pytest.approx(paper, rel=1e-3)


# ---------------------------------------------------------------------------------------------
# Calibration, profile, captions, plans
# ---------------------------------------------------------------------------------------------
def test_calibrate():
    asked, scores = [], {"a": 0.3, "b": 0.5, "c": 0.5, "d": 0.9}
    costs = {"a": 0.1, "b": 0.4, "c": 0.3, "d": 0.8}

    def score(plan):
        asked.append(plan)
        return scores[plan]

    best, tried = p.calibrate("abcd", costs.get, score, 0.5)
    assert best == "c" and asked == ["a", "b", "c"] and tried[1] == ("b", 0.4, 0.5)
    assert p.calibrate("abcd", costs.get, score, 1.0)[0] == "d"
    with pytest.raises(ValueError, match="budget"):
        p.calibrate("abcd", costs.get, score, 0.05)


def test_ranked_alike():
    assert p.ranked_alike([1, 2, 3], [10, 20, 30]) == 1 and p.ranked_alike([1, 2, 3], [3, 2, 1]) == 0
    assert p.ranked_alike([1, 3, 2], [1, 2, 3]) == pytest.approx(2 / 3)


def test_profile_by_hand():
    net = awake_net()
    t, inputs = torch.tensor([500, 500]), [randn(2, 3, 16, 16, seed=i) for i in range(3)]
    outs = []
    handle = net.up[-1][-1].register_forward_hook(lambda m, i, o: outs.append(o[0] if isinstance(o, tuple) else o))
    found = p.profile(net, lambda: [net(x, t, TEXT) for x in inputs])
    handle.remove()
    expected = [float((b - a).abs().sum() / a.abs().sum()) for a, b in zip(outs, outs[1:])]
    assert found["blocks"][f"up {len(net.up) - 1}"] == pytest.approx(expected)
    assert len(found["blocks"]) == 2 * len(net.down) + 1 and set(map(len, found["blocks"].values())) == {2}
    assert len(found["kinds"]) == 4 and all(len(row) == 2 and min(row) > 0 for row in found["kinds"].values())
    assert not any(m._forward_hooks for m in net.modules())


def test_encode():
    words = ["cat", "face", "red"]
    tokens, unknown = p.encode(["Red cat", "cat zork face zork", "", "cat face red cat face"], words, 4)
    assert tokens.tolist() == [[3, 1, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [1, 2, 3, 1]] and unknown == ["zork"]


def test_what_a_prompt_loses_is_said(capsys):
    p.check_prompts(["Red cat zork face", "cat"], ["cat", "face", "red"], 2)
    assert capsys.readouterr().err.split("\n") == ["unknown words left out: zork",
                                                   "the model reads 2 words; left out: face", ""]


def test_a_pixels_colour_of_area_averages():
    x, captions = p.load_data("emoji", 32)
    big, y, names = common.load_images("emoji")
    assert x.shape == (len(big), 3, 32, 32) and captions[7] == names[y[7]]
    assert abs(float(big[9, 1, 20:22, 40:42].float().mean()) - int(x[9, 1, 10, 20])) <= 0.5
    with pytest.raises(ValueError, match="24"):
        p.load_data("emoji", 24)


@pytest.mark.parametrize("changes", [
    dict(taus=[]), dict(taus=[5, 9]), dict(taus=[1000, 3]), dict(taus=[9.0, 3]), dict(taus=None), dict(n_low=20),
    dict(n_low=-1), dict(n_low=1.5), dict(n_guided=21), dict(low=6), dict(low=0), dict(low=32), dict(k=0), dict(k=None),
    dict(depth=4), dict(depth=-1), dict(choice="x"), dict(solver="euler"), dict(method="x"), dict(w="3"), dict(w=None),
    dict(w=float("nan"))])
def test_bad_plans(changes, tmp_path):
    config = preset("tiny")
    plan, path = p.make_plan("postdiff", config), tmp_path / "plan.json"
    assert p.check_plan(dict(plan), config) == plan
    path.write_text(json.dumps({**plan, **changes}))
    with pytest.raises(ValueError, match="plan.json") as error:
        p.load_plan(path, config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [dict(s=1.0), dict(s=-0.1), dict(m=1.5), dict(m=-1), dict(beta=0), dict(beta=1.2),
                                     dict(beta=0.3), dict(k=0), dict(s=0.01), dict(steps=2, s=0.9), dict(steps=0)])
def test_bad_settings(options):
    with pytest.raises(ValueError):
        p.make_plan("postdiff", preset("small"), **options)


def test_x0_prediction():
    """The same weights as x0 and as eps (D16), of both kinds of network; the loss is that of v, less at the end."""
    t, x0, eps = torch.tensor([10, 990]), randn(2, 3, 16, 16), randn(2, 3, 16, 16, seed=1)
    a = ABAR[t].view(-1, 1, 1, 1)
    xt = a.sqrt() * x0 + (1 - a).sqrt() * eps
    assert torch.allclose(p.eps_of_x0(x0, xt, t), eps.double(), atol=1e-6)
    assert p.diffusion_loss(lambda *_: (p.eps_of_x0(x0, xt, t), None, None), x0, t, eps, ABAR, None, "x0") < 1e-9
    found = p.diffusion_loss(lambda xt, *_: (p.eps_of_x0(0 * xt, xt, t), None, None), x0, t, eps, ABAR, None, "x0")
    v, guess = ((a.sqrt() * xt - x) / (1 - a).sqrt() for x in (x0, 0 * x0))              # v = (a xt - x0) / b
    weight = torch.tensor([float(1 - a[0]) / 0.01, 1]).view(-1, 1, 1, 1)                     # below 0.01: less
    assert weight[0] < 1
    assert float(found) == pytest.approx(float((weight * (v - guess).square()).mean()), rel=1e-3)
    for arch in p.ARCHS:
        nets = [awake_net(dict(preset("tiny"), arch=arch, predict=kind)) for kind in ("eps", "x0")]
        plain, ours = (net(xt.float(), t, TEXT)[0] for net in nets)
        assert torch.allclose(ours, ((xt - a.sqrt() * plain) / (1 - a).sqrt()).float(), atol=1e-4)


def test_loss_by_hand_and_it_learns_from_text():
    """Two images that only their captions tell apart: better than without the captions' help."""
    x0, eps, t = randn(2, 1, 4, 4), randn(2, 1, 4, 4, seed=1), torch.tensor([3, 800])
    assert float(p.diffusion_loss(lambda xt, t, text: (eps, None, None), x0, t, eps, ABAR, None)) == 0
    torch.manual_seed(0)
    net, losses = p.build_net(preset("tiny"), 1, 2), []
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x0 = torch.ones(16, 1, 4, 4) * (2 * (torch.arange(16) % 2) - 1).view(-1, 1, 1, 1)         # white or black
    text = F.pad((1 + torch.arange(16) % 2)[:, None], (0, 5))
    t = torch.full((16,), 500)                                                 # 16 noisy pixels leave it open which
    for _ in range(80):
        loss = p.diffusion_loss(net, x0, t, torch.randn_like(x0), ABAR, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        z = torch.randn(16, 1, 4, 4)
        swapped = p.diffusion_loss(net, x0, t, z, ABAR, text.roll(1, 0)).item()
        right = p.diffusion_loss(net, x0, t, z, ABAR, text).item()
    assert losses[-1] < 0.3 * losses[0] and right < 0.7 * swapped, (losses[-1], right, swapped)


# ---------------------------------------------------------------------------------------------
# Real pipelines
# ---------------------------------------------------------------------------------------------
class StandIn(types.ModuleType):
    """Stands for transformers, of which diffusers' pipelines only want names here: prompts come as embeddings."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (torch.nn.Module,), {}))
        return getattr(self, name)


def put_stand_in():
    """In place before anything imports diffusers, which looks for transformers once."""
    import diffusers.utils.import_utils as available
    for name in ("transformers", "transformers.utils", "tokenizers"):
        stand_in = StandIn(name)
        stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        stand_in.__path__, stand_in.__version__ = [], "4.57.6"
        sys.modules[name] = stand_in
    available._transformers_available, available._transformers_version = True, "4.57.6"


if importlib.util.find_spec("diffusers") and not importlib.util.find_spec("transformers"):
    put_stand_in()


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def unet(diffusers, **more):
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=4, cross_attention_dim=12, **{
            "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **more})


KINDS = ("sd", "lcm", "sdxl", "pixart")


def tiny_pipeline(diffusers, kind, folder):
    """A pipeline of random weights without text encoders, saved to disk and loaded again; and its arguments."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                                  down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2)
    parts = dict(vae=vae, text_encoder=None, tokenizer=None)
    call = dict(prompt_embeds=randn(2, 7, 12), num_inference_steps=8, height=32, width=48, output_type="pt")
    null = dict(negative_prompt_embeds=randn(2, 7, 12, seed=1))
    nothing = dict(safety_checker=None, image_encoder=None, feature_extractor=None, requires_safety_checker=False)
    if kind == "sd":
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline as Pipeline
        parts.update(unet=unet(diffusers), scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
                     **nothing)
        call.update(null)
    elif kind == "lcm":
        from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
            LatentConsistencyModelPipeline as Pipeline)
        parts.update(unet=unet(diffusers, time_cond_proj_dim=8), scheduler=diffusers.LCMScheduler(),
                     **nothing)
    elif kind == "sdxl":
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
            StableDiffusionXLPipeline as Pipeline)
        parts.update(unet=unet(diffusers, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                               up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
                               use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
                               projection_class_embeddings_input_dim=6 * 8 + 12),
                     scheduler=diffusers.EulerDiscreteScheduler(), text_encoder_2=None, tokenizer_2=None)
        call.update(null, pooled_prompt_embeds=randn(2, 12, seed=2), negative_pooled_prompt_embeds=randn(2, 12, seed=3))
    else:
        from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline as Pipeline
        parts.update(transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            caption_channels=12), scheduler=diffusers.DPMSolverMultistepScheduler())
        mask = dict(prompt_attention_mask=torch.ones(2, 7), negative_prompt_attention_mask=torch.ones(2, 7))
        call.update(null, **mask, negative_prompt=None, use_resolution_binning=False)
    Pipeline(**parts).save_pretrained(folder)
    more = dict(nothing, text_encoder=None, tokenizer=None) if kind in ("sd", "lcm") else {}
    pipe = Pipeline.from_pretrained(folder, local_files_only=True, **more)
    pipe.set_progress_bar_config(disable=True)

    def run(steps=8, **options):
        generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
        out = pipe(**{**call, "num_inference_steps": steps, **options}, generator=generators)
        return torch.as_tensor(np.asarray(out.images)) if not torch.is_tensor(out.images) else out.images
    return pipe, run


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request, diffusers, tmp_path_factory):
    pipe, run = tiny_pipeline(diffusers, request.param, tmp_path_factory.mktemp(request.param))
    return SimpleNamespace(kind=request.param, pipe=pipe, run=run, plain=run())


def test_all_flags_off_is_the_pipelines_own_output(pipeline):
    state, remove = p.apply_postdiff(pipeline.pipe, s=0, k=1, m=1)
    assert torch.equal(pipeline.run(), pipeline.plain) and len(state["log"]) == 8
    remove()
    assert torch.equal(pipeline.run(), pipeline.plain)


def test_interval_1_and_a_cache_that_is_not_used(pipeline):
    """m = 1 with any choice, k = 1: nothing may change, although the forward is wrapped."""
    _, remove = p.apply_postdiff(pipeline.pipe, s=0, k=1, m=1, choice="ave")
    assert torch.equal(pipeline.run(), pipeline.plain)
    remove()


def test_steps_of_a_pipeline(pipeline):
    """s = 1/2, k = 2, m = 3/4 of 8 steps: sizes, batches, full and shallow passes, reuse; then as it was."""
    lcm, has_deep = pipeline.kind == "lcm", pipeline.kind != "pixart"
    state, remove = p.apply_postdiff(pipeline.pipe)
    image = pipeline.run()
    remove()
    assert image.shape == pipeline.plain.shape and image.isfinite().all() and not torch.equal(image, pipeline.plain)
    expected, full = [], "FcFcFcFc" if has_deep else "FFFFFFFF"
    for i in range(8):
        h, w = (8, 12) if i < 4 else (16, 24)
        expected.append((i, 2 if lcm or i >= 6 else 4, h, w, full[i] == "F", i >= 6))
    assert state["log"] == expected
    assert torch.equal(pipeline.run(), pipeline.plain)


def test_low_cross_attentions_are_resized(pipeline):
    """m = 1/2 = s: what was made at low resolution serves the high one; the second run starts anew."""
    state, remove = p.apply_postdiff(pipeline.pipe, m=0.5, k=1)
    first, second = pipeline.run(), pipeline.run()
    remove()
    assert torch.equal(first, second) and first.isfinite().all()
    assert [(row[2], row[5]) for row in state["log"]] == [(8, False)] * 4 + [(16, True)] * 4
    assert {size for _, size in state["frozen"].values()} == {(16, 24)}


def test_guidance_dropped_alone(pipeline):
    """choice none: after m the pipeline's own guidance of weight 1."""
    if pipeline.kind == "lcm":
        pytest.skip("LCM has no pairs")
    _, remove = p.apply_postdiff(pipeline.pipe, s=0, k=1, m=0, choice="none")
    dropped = pipeline.run()
    remove()
    if pipeline.kind == "pixart":
        expected = pipeline.run(guidance_scale=1.0, negative_prompt_embeds=None, negative_prompt_attention_mask=None)
    else:
        expected = pipeline.run(guidance_scale=1.0)
    assert torch.allclose(dropped, expected, atol=1e-4)


def test_mixed_resolution_of_a_pipeline_is_ours(diffusers, tmp_path):
    """Stable Diffusion's pipeline with DDIM against mixed_resolution_sample on its own U-Net."""
    pipe, run = tiny_pipeline(diffusers, "sd", tmp_path)
    state, remove = p.apply_postdiff(pipe, m=0.75)
    latents = run(output_type="latent", guidance_scale=4.0)
    remove()
    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    low = torch.stack([torch.randn(1, 4, 8, 12, generator=g)[0] for g in generators])
    z = torch.stack([torch.randn(1, 4, 16, 24, generator=g)[0] for g in generators])
    names = [name for name in pipe.unet.attn_processors if ".attn2." in name]

    def net(xt, t, text, deep=None, cross=None, depth=1):
        """The U-Net with caches as explicit values, by the processors of the adapter."""
        size, before, kept = tuple(xt.shape[-2:]), pipe.unet.attn_processors, []
        store = dict(cross={}, size=size, frozen={n: (cross[n].flatten(2).transpose(1, 2), size)
                                                  for n in names if n in cross})
        pipe.unet.set_attn_processor({n: p.CrossAttentionCache(n, f, store) if n in names else f
                                      for n, f in before.items()})
        inner = pipe.unet.up_blocks[-1].resnets[-2]
        handle = inner.register_forward_pre_hook(lambda m, a: kept.append(a[0][:, :-16]))
        with torch.no_grad():
            eps = (pipe.unet(xt, t, text).sample if deep is None else
                   p.shallow_pass(pipe.unet, deep, xt, t, text))
        handle.remove()
        pipe.unet.set_attn_processor(before)
        made = {n: out.transpose(1, 2).unflatten(2, p.token_grid(out.shape[1], *size))
                for n, (out, size) in store["cross"].items()}
        return eps, kept[0], {**{n: cross[n] for n in cross}, **made}

    abar = torch.cat([pipe.scheduler.alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])
    taus = pipe.scheduler.timesteps.tolist()
    ours = p.mixed_resolution_sample(net, z, taus, abar, randn(2, 7, 12), randn(2, 7, 12, seed=1), 4.0, n_low=4,
                                     low_noise=low, k=2, n_guided=6)
    assert float((ours - latents).norm() / latents.norm()) < 1e-3


def test_bad_pipelines(diffusers, tmp_path):
    with pytest.raises(ValueError, match="StableDiffusionPipeline"):
        p.apply_postdiff(SimpleNamespace())
    pipe, run = tiny_pipeline(diffusers, "sd", tmp_path)
    for bad in (dict(s=1), dict(s=-1), dict(m=2), dict(k=0), dict(beta=0), dict(choice="x"), dict(choice="cfg")):
        with pytest.raises(ValueError):
            p.apply_postdiff(pipe, **bad)
    for bad, call in ((dict(beta=0.3), {}), (dict(s=0.01), {}), ({}, dict(latents=torch.zeros(2, 4, 16, 24)))):
        _, remove = p.apply_postdiff(pipe, **bad)
        with pytest.raises(ValueError):
            run(**call)
        remove()
    pipe.scheduler = diffusers.PNDMScheduler()
    with pytest.raises(ValueError, match="PNDMScheduler"):
        p.apply_postdiff(pipe)


def test_token_grid():
    assert p.token_grid(60, 24, 40) == (6, 10)                                # not 7x8, as the ratio would have it
    assert p.token_grid(5 * 8, 9, 15) == (5, 8) and p.token_grid(135, 9, 15) == (9, 15)
    with pytest.raises(ValueError):
        p.token_grid(7, 8, 8)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------
# ---------------------------------------------------------------------------------------------
# The two other kinds of network in small: a DiT and an LCM
# ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def dit():
    net = awake_net(preset("tiny", arch="dit", predict="eps"))
    for i, w in enumerate(net.parameters()):
        if not w.any():                                                        # zeros hide a path
            w.copy_(0.3 * randn(*w.shape, seed=i))
    return net


def test_dit_by_hand(dit):
    """Written once more, with attention as softmax of dot products."""
    xt, t = randn(2, 3, 16, 24), torch.tensor([3, 700])
    w = dit.state_dict()

    def linear(name, v):
        return v @ w[name + ".weight"].flatten(1).T + w.get(name + ".bias", 0)

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()

    def attend(name, x, y, heads=2):
        out = []
        for q, k, v in zip(*(linear(f"{name}.{part}", z).chunk(heads, -1) for part, z in
                             (("q", x), ("k", y), ("v", y)))):
            out.append((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v)
        return linear(f"{name}.out", torch.cat(out, -1))

    c, (H, W) = dit.ch, (4, 6)
    emb = linear("emb.2", F.silu(linear("emb.0", p.timestep_embedding(t, c))))
    text = dit.text(TEXT)
    six = linear("modulation", F.silu(emb)).view(2, 6, c)
    h = linear("conv_in", F.pixel_unshuffle(xt, 4).flatten(2).transpose(1, 2))
    place = []
    for i in range(H):
        for j in range(W):
            angles = [[16 * v / n * 1e4 ** (-k / (c // 4)) for k in range(c // 4)] for v, n in ((i, H), (j, W))]
            place.append([f(a) for axis in angles for f in (math.sin, math.cos) for a in axis])
    h, crosses = h + torch.tensor(place), {}
    for b in range(len(dit.blocks)):
        name = f"blocks.{b}"
        m = (six + w[f"{name}.offset"])[:, :, None]
        y = norm(h) * (1 + m[:, 1]) + m[:, 0]
        h = h + m[:, 2] * attend(f"{name}.self_attention", y, y)
        crosses[b] = attend(f"{name}.cross_attention", h, text)
        h = h + crosses[b]
        y = norm(h) * (1 + m[:, 4]) + m[:, 3]
        h = h + m[:, 5] * linear(f"{name}.ff_out", F.gelu(linear(f"{name}.ff_in", y), approximate="tanh"))
    shift, scale = (w["shift_scale"] + emb[:, None])[:, :, None].unbind(1)
    h = linear("conv_out", norm(h) * (1 + scale) + shift).transpose(1, 2).reshape(2, -1, H, W)
    eps_hat, deep, used = dit(xt, t, TEXT)
    assert deep is None and eps_hat.std() > 0.1
    assert torch.allclose(eps_hat, F.pixel_shuffle(h, 4), atol=1e-4)
    assert all(torch.allclose(used[b], crosses[b].transpose(1, 2).reshape(2, c, H, W), atol=1e-4) for b in crosses)


def test_dit_takes_the_cache_of_a_smaller_image(dit):
    xt, t = randn(2, 3, 16, 16), torch.tensor([3, 700])
    eps_hat, _, used = dit(xt, t, TEXT)
    again, _, _ = dit(xt, t, NULL, cross=used)                                 # the text is not asked any more
    assert torch.allclose(again, eps_hat, atol=1e-5)
    small = dit(randn(2, 3, 8, 8, seed=1), t, TEXT)[2]
    assert dit(xt, t, TEXT, cross=small)[2][0].shape == used[0].shape
    with pytest.raises(ValueError, match="patch"):
        dit(randn(1, 3, 7, 8), t[:1], TEXT[:1])


def test_what_a_dit_and_an_lcm_can_run():
    dit, lcm = preset("tiny", arch="dit"), preset("tiny", phase="lcm")
    p.check_plan(p.make_plan("postdiff", dit, k=1), dit)
    p.check_plan(p.make_plan("postdiff", lcm, "lcm", 8, k=1), lcm)
    for plan, config, words in ((p.make_plan("cache", dit, k=2), dit, "DiT"),
                                (p.make_plan("base", lcm), lcm, "lcm"),
                                (p.make_plan("base", preset("tiny"), "lcm", 4), preset("tiny"), "distill")):
        with pytest.raises(ValueError, match=words):
            p.check_plan(plan, config)


def test_lcm_sampler_by_hand():
    """x0_hat, re-noised, at each step; at the switch up-sampled first; w reaches the network; no second half."""
    calls = []

    def net(xt, t, text, deep=None, cross=None, depth=1, w=None):
        calls.append((tuple(xt.shape), int(t[0]), w))
        return 0.2 * xt, None, {}

    taus, w = [999, 600, 300], 2.5
    plan = dict(taus=taus, w=w, n_low=1, k=1, depth=1, n_guided=3, choice="none", solver="lcm")
    full, low, *fresh = [randn(2, 3, r, r, seed=r + i) for i, r in enumerate((8, 4, 4, 8, 8))]
    x = p.run_plan(net, plan, [full, low, *fresh], TEXT, ABAR)

    def x0_of(xt, t):
        a = float(ABAR[t])
        return (xt - (1 - a) ** 0.5 * 0.2 * xt) / a ** 0.5

    def noisy(x0, eps, t):
        return float(ABAR[t]) ** 0.5 * x0 + (1 - float(ABAR[t])) ** 0.5 * eps

    up = F.interpolate(x0_of(low, 999), scale_factor=2, mode="bilinear", align_corners=False)
    xt = noisy(x0_of(noisy(up, full, 600), 600), fresh[1], 300)
    assert torch.allclose(x, x0_of(xt, 300), rtol=1e-4, atol=1e-4)
    assert calls == [((2, 3, 4, 4), 999, w), ((2, 3, 8, 8), 600, w), ((2, 3, 8, 8), 300, w)]


def test_consistency_loss_by_hand():
    """Teacher guided sample by sample, one DDIM step, the target's x0_hat there; at the first step the teacher's."""
    def net(scale):
        def call(xt, t, text, w=None):
            told = 0 if w is None else 0.05 * w.view(-1, 1, 1, 1)
            return ((scale + 0.1 * text.float().mean(1).view(-1, 1, 1, 1) + told) * xt,)
        return call

    student, target, teacher, x0, eps = net(0.3), net(0.2), net(0.5), randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    t, t_next, w = torch.tensor([519, 11]), torch.tensor([499, -1]), torch.tensor([2.0, 4.0])
    expected = []
    for b in range(2):
        a, text = float(ABAR[t[b]]), float(TEXT[b].float().mean()) * 0.1
        xt = a ** 0.5 * x0[b] + (1 - a) ** 0.5 * eps[b]
        e = 0.5 * xt + float(w[b]) * text * xt
        goal = (xt - (1 - a) ** 0.5 * e) / a ** 0.5
        if b == 0:
            n = float(ABAR[499])
            xn = n ** 0.5 * goal + (1 - n) ** 0.5 * e
            goal = (xn - (1 - n) ** 0.5 * (0.2 + text + 0.05 * float(w[b])) * xn) / n ** 0.5
        x0_hat = (xt - (1 - a) ** 0.5 * (0.3 + text + 0.05 * float(w[b])) * xt) / a ** 0.5
        expected.append(a ** 0.5 * ((x0_hat - goal) ** 2 + 1e-6).sqrt())
    loss = p.consistency_loss(student, target, teacher, x0, t, t_next, eps, ABAR, TEXT, NULL, w)
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    loss = p.consistency_loss(student, target, teacher, x0, t, t_next, eps, ABAR, TEXT, NULL, w, "x0")     # unweighted
    plain = [row / float(ABAR[step]) ** 0.5 for row, step in zip(expected, t)]
    assert float(loss) == pytest.approx(float(torch.stack(plain).mean()), rel=1e-4)


def test_a_ledger_without_diffusers_leaves_the_file_alone(tmp_path, monkeypatch, capsys):
    def missing(kind):
        raise ImportError

    monkeypatch.setattr(p, "diffusers_macs", missing)
    for key, value in dict(mult=[1, 2], attention=[0, 1], blocks=1).items():    # a smaller network counts as well
        monkeypatch.setitem(p.PRESETS, key, (*p.PRESETS[key][:2], value))
    (tmp_path / "ledger.json").write_text("[]")
    p.ledger(tmp_path / "ledger.json")
    assert (tmp_path / "ledger.json").read_text() == "[]" and "left as it was" in capsys.readouterr().out


TINY = "--preset tiny --precision fp32 --batch 8 --iters 20 --save-every 5".split()
FEW = "--steps 4 --precision fp32".split()


@pytest.fixture(scope="module", autouse=True)
def data_is_read_once():
    load_images, common.load_images = common.load_images, functools.cache(common.load_images)
    yield
    common.load_images = load_images


def start(*argv):
    """`python postdiff.py ARGV` in this process: exit code, stdout, stderr."""
    return start_script(p, *argv)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def load(path):
    return torch.load(path, weights_only=True)


def only(folder, pattern):
    found = list(Path(folder).glob(pattern))
    assert len(found) == 1, (pattern, found)
    return found[0]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


def one_line(result, *words):
    lines = [s for s in result.err.splitlines() if not re.match(r"(train|sample)\b.* left ", s)]
    assert result.code == 1 and len(lines) == 1 and "Traceback" not in result.err + result.out, result
    assert lines[0].startswith("postdiff: error: ")
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    result = start("--train", *TINY, "--out", out)
    assert result.code == 0, result.err
    checkpoint = only(out, "*/checkpoint.pt")
    return SimpleNamespace(out=out, run=checkpoint.parent, checkpoint=checkpoint)


def test_train(trained):
    saved = load(trained.checkpoint)
    assert (saved["script"], saved["phase"], saved["step"], saved["images_seen"]) == ("postdiff", "base", 20, 160)
    assert len(saved["words"]) == 1791 and "cat" in saved["words"] and not equal(saved["net"], saved["ema"])
    log = lines_of(trained.run / "log.jsonl")
    assert [line["step"] for line in log] == [5, 10, 15, 20] and 0 < log[-1]["loss"] < log[0]["loss"] < 20
    assert not list(trained.out.rglob("*.part"))
    small, large = ((trained.run / name).stat().st_size for name in ("weights.pt", "checkpoint.pt"))
    assert small < large / 3


def test_kill_and_resume(trained, tmp_path):
    """Killed in mid-run, resumed: bit for bit the run that nothing interrupted."""
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--train", *TINY, "--out", str(tmp_path)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 200
    while not list(tmp_path.glob("*/log.jsonl")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    checkpoint = only(tmp_path, "*/checkpoint.pt")
    assert 5 <= load(checkpoint)["step"] < 20, "the run was over before it was killed"
    torch.rand(5)
    result = start("--train", "--resume", "--save-every", 5, "--precision", "fp32", "--out", tmp_path)
    assert result.code == 0, result.err
    a, b = load(checkpoint), load(trained.checkpoint)
    for key in ("net", "ema", "optimizer", "step", "words", "args"):
        assert equal(a[key], b[key]), key


def test_fine_tuning(trained, tmp_path):
    """App. F on half the steps at half the resolution; the checkpoint decides the architecture."""
    argv = ("--train", "--checkpoint", trained.run / "weights.pt", "--finetune-iters", 6, "--batch", 8, "--lr", 9,
            "--precision", "fp32", "--out", tmp_path)
    result = start(*argv)                                            # --preset small does not matter
    assert result.code == 0, result.err
    saved = load(only(tmp_path, "*/checkpoint.pt"))
    assert saved["phase"] == "finetune" and saved["step"] == 26 and saved["args"]["ch"] == 8
    assert saved["args"]["finetune_s"] == 0.5 and saved["words"] == load(trained.checkpoint)["words"]
    before = load(trained.run / "weights.pt")["ema"]
    moved = [float((saved["net"][k] - v.float()).abs().max()) for k, v in before.items()]
    assert 0 < max(moved) < 0.1


def test_distillation(trained, tmp_path):
    """To an LCM: trained and sampled in one command, with its own solver and settings; what it refuses."""
    options = "--precision fp32 --batch 8 --save-every 5 --preset tiny --out".split() + [tmp_path]
    result = start("--train", "--distill", "--sample", "--n", 2, "--checkpoint", trained.checkpoint, *options)
    assert result.code == 0, result.err
    path = only(tmp_path, "*/checkpoint.pt")
    saved, teacher = load(path), load(trained.checkpoint)
    assert saved["phase"] == "lcm" and saved["step"] == teacher["step"] + 10 and equal(saved["teacher"], teacher["ema"])
    assert saved["net"]["guidance.weight"].any() and not equal(saved["ema"]["conv_out.weight"],
                                                               teacher["ema"]["conv_out.weight"])
    result = start("--sample", "--n", 4, "--checkpoint", path, "--out", tmp_path / "s")
    assert result.code == 0 and "postdiff lcm: 8 steps, 4 at 8x8; full pass every 1; told w 2.0" in result.out
    assert saved["images_seen"] == teacher["images_seen"] + 80
    one_line(start("--train", "--checkpoint", path, *options), "is an LCM")
    one_line(start("--train", "--resume", "--distill", "--checkpoint", trained.checkpoint), "no distillation")
    one_line(start("--sample", "--solver", "ddim", "--checkpoint", path, "--out", tmp_path / "s"), "--solver lcm")
    one_line(start("--train", "--distill", "--checkpoint", path, *options), "--distill")
    one_line(start("--train", "--distill", *options), "--distill")


def test_a_dit_by_command(tmp_path):
    options = "--precision fp32 --batch 8 --iters 4 --save-every 4 --preset tiny --arch dit --out".split() + [tmp_path]
    assert start("--train", *options).code == 0
    result = start("--sample", "--n", 4, "--steps", 4, "--out", tmp_path)
    assert result.code == 0 and "postdiff dpm2: 4 steps, 2 at 12x12; full pass every 1" in result.out
    one_line(start("--sample", "--k", 2, "--out", tmp_path), "k must be 1")


def test_fine_tuning_draws_its_schedule(trained, tmp_path, monkeypatch):
    """Low resolution with t in [T (1 - s), T), full below."""
    seen, add_noise = [], common.add_noise

    def noted(x0, eps, t, alpha_bar):
        seen.append((x0.shape[-1], int(t.min()), int(t.max())))
        return add_noise(x0, eps, t, alpha_bar)

    monkeypatch.setattr(common, "add_noise", noted)
    result = start("--train", "--checkpoint", trained.checkpoint, "--finetune-iters", 40, "--batch", 8, "--s", 0.2,
                   "--save-every", 100, "--precision", "fp32", "--out", tmp_path)
    assert result.code == 0, result.err
    steps = [row for row in seen if len(row) == 3][:40]
    low = [row for row in steps if row[0] == 8]
    assert 1 <= len(low) <= 18 and all(row[1] >= 800 for row in low)
    assert all(row[0] == 16 and row[2] < 800 for row in steps if row not in low)


def test_sample(trained, tmp_path):
    argv = ("--sample", *FEW, "--out", tmp_path, "--checkpoint", trained.checkpoint)
    result = start(*argv, "--n", 4, "--method", *p.METHODS, "--prompt", "cat face zork")
    assert result.code == 0 and "unknown words left out: zork" in result.err, result.err
    image = np.asarray(Image.open(tmp_path / "samples.png"))
    assert image.shape == (4 * 34, 4 * 34, 3)
    assert "postdiff ddim: 4 steps, 2 at 8x8; full pass every 2; guidance 2.0 in the first 3" in result.out
    again = start(*argv, "--n", 2, "--seed", 2, "--prompt", "cat face")                # seed i makes image i
    assert again.code == 0
    mine = np.asarray(Image.open(tmp_path / "samples.png"))
    assert abs(mine[:34, :68].astype(int) - image[3 * 34:, 68:]).max() <= 2
    # the weights to ship give the same but for half precision; other prompts other images
    start(*argv[:-1], trained.run / "weights.pt", "--n", 2, "--seed", 2, "--prompt", "cat face")
    assert abs(np.asarray(Image.open(tmp_path / "samples.png")).astype(int) - mine).mean() < 2
    start(*argv, "--n", 2, "--seed", 2, "--prompt", "red heart")
    assert (np.asarray(Image.open(tmp_path / "samples.png")) != mine).any()


def test_off_switch_by_options(trained, tmp_path):
    """postdiff with every flag off is base, pixel by pixel."""
    images = []
    for method in (("base",), ("postdiff", "--s", 0, "--k", 1, "--m", 1)):
        assert start("--sample", "--n", 3, *FEW, "--out", tmp_path, "--checkpoint", trained.checkpoint, "--method",
                     *method).code == 0
        images.append((tmp_path / "samples.png").read_bytes())
    assert images[0] == images[1]


@pytest.fixture
def few_images(monkeypatch):
    """400 of the images as the reference."""
    load_images = common.load_images
    monkeypatch.setattr(common, "load_images", lambda *args: tuple(
        part[:400] if torch.is_tensor(part) else part for part in load_images(*args)))


def test_evaluate(trained, tmp_path, few_images):
    results = tmp_path / "new" / "results.jsonl"
    result = start("--evaluate", "--n", 130, "--steps", 2, "--precision", "fp32", "--method", "base", "postdiff",
                   "--checkpoint", trained.checkpoint, "--results", results, "--out", tmp_path, "--experiment", "fig5")
    assert result.code == 0, result.err
    base, ours = lines_of(results)
    keys = ("experiment method solver data preset seed n extractor fd caption_score nfe macs_per_image relative_macs "
            "seconds_per_image device torch images_seen source_sha256 args plan").split()
    assert not set(keys) - base.keys() and base["experiment"] == "fig5" and base["n"] == 130
    assert base["relative_macs"] == pytest.approx(0.1) and ours["relative_macs"] < 0.1 and ours["nfe"] == [1, 1]
    assert base["extractor"] == "small-emoji of 16x16" and base["fd"] > 0 and -1 <= base["caption_score"] <= 1
    assert base["source_sha256"] == common.sha256_of(SCRIPT) and base["images_seen"] == 160
    assert f"FD[small-emoji of 16x16]@130 {base['fd']:.3f}" in result.out


def test_search_and_profile(trained, tmp_path):
    """Calibration writes the plan that --sample then runs."""
    results = tmp_path / "results.jsonl"
    result = start("--search", "--sample", "--profile", "--n", 2, "--calibration", 8, "--method", "mixed",
                   "--s", 0, 0.5, "--steps", 2, 4, "--budget", 0.15, "--checkpoint", trained.checkpoint,
                   "--plans", tmp_path, "--results", results, "--out", tmp_path, "--precision", "fp32")
    assert result.code == 0, result.err
    lines, best = lines_of(results), json.loads((tmp_path / "plan.json").read_text())
    assert [(len(s["plan"]["taus"]), s["nfe"][0]) for s in lines] == [(2, 0), (2, 1), (4, 2)]  # (4, 0) costs 20 %
    assert best == max(lines, key=lambda s: s["caption_score"])["plan"] and list(lines[0]["scores"]) == ["2", "4", "8"]
    assert str(best["taus"]) in result.out.split("plan.json")[-1]
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["n"] == 2 and len(found["kinds"]["convolution"]) == 1


def test_two_processes(trained, tmp_path):
    """torchrun: the weights of one process, the images of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", SCRIPT,
               "--train", "--sample", "--n", "5", *FEW, *TINY, "--save-every", 20, "--device", "cpu", "--out",
               tmp_path / "two"]
    run = subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    checkpoint = only(tmp_path / "two", "*/checkpoint.pt")
    a, b = load(checkpoint), load(trained.checkpoint)
    for key, value in a["ema"].items():
        assert torch.allclose(value, b["ema"][key], atol=3e-4), key
    assert start("--sample", "--n", 5, *FEW, "--checkpoint", checkpoint, "--out", tmp_path).code == 0
    assert (tmp_path / "samples.png").read_bytes() == (tmp_path / "two" / "samples.png").read_bytes()


def test_bad_checkpoints(trained, tmp_path):
    path, content = tmp_path / "checkpoint.pt", trained.checkpoint.read_bytes()
    one_line(start("--sample", "--checkpoint", path, "--out", tmp_path), "no checkpoint", path)
    for damaged in (content[:len(content) // 2], b"", b"text"):
        path.write_bytes(damaged)
        for action in (["--sample"], ["--train", *TINY]):
            one_line(start(*action, "--checkpoint", path, "--out", tmp_path / "out"), path)
    torch.save(dict(load(trained.checkpoint), script="c2f_trd"), path)
    one_line(start("--sample", "--checkpoint", path, "--out", tmp_path / "out"), "c2f_trd")
    shutil.copy(trained.run / "weights.pt", path)
    one_line(start("--train", "--resume", "--checkpoint", path, "--out", tmp_path / "out"), "weights only")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, words", [
    (["--sample", "--prompt", ""], ["--prompt is empty"]),
    (["--sample", "--prompt", "cat", "  "], ["--prompt is empty"]),
    (["--sample", "--prompt", "zork gnarf"], ["zork gnarf", "vocabulary"]), ("--sample --s 1", ["--s"]),
    ("--sample --s -0.5", ["--s"]), ("--sample --s 0.01", ["0.01"]), ("--sample --m 1.5", ["--m"]),
    ("--sample --m -1", ["--m"]), ("--sample --k 0", ["--k"]), ("--sample --beta 0.625", ["10", "multiple"]),
    ("--sample --beta 0.3", ["0.3", "16"]), ("--sample --beta 0", ["--beta"]), ("--sample --depth 4", ["depth"]),
    ("--sample --steps 0", ["0"]), ("--sample --steps 2000", ["2000"]), ("--sample --n 0", ["--n"]),
    ("--sample --plan /nope.json", ["/nope.json"]), ("--evaluate --n 128", ["--n 128", "128"]),
    ("--evaluate --data nonexist", ["nonexist"]), ("--evaluate --data fashion10k", ["fashion10k"]),
    ("--search --calibration 4 --budget 0.01", ["budget"]), ("--search --calibration 0", ["--calibration"]),
    ("--sample --distill", ["--distill goes with --train"])])
def test_bad_sampling(trained, tmp_path, argv, words):
    argv = argv if isinstance(argv, list) else argv.split()
    one_line(start(*argv, "--checkpoint", trained.checkpoint, "--out", tmp_path, "--results", tmp_path / "r.jsonl",
                   "--plans", tmp_path), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, words", [
    ("--res 24", ["24"]), ("--res 2", ["2", "4"]), ("--data nonexist", ["nonexist"]), ("--batch 0", ["--batch"]),
    ("--iters 0", ["--iters"]), ("--resume", ["--resume"])])
def test_bad_training(tmp_path, argv, words):
    one_line(start("--train", *TINY, *argv.split(), "--out", tmp_path / "out"), *words)
    assert not list(tmp_path.rglob("*.pt"))


def test_nan_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    add_noise, calls = common.add_noise, []

    def broken(*args):
        calls.append(1)
        return add_noise(*args) * (float("nan") if len(calls) > 7 else 1)

    monkeypatch.setattr(common, "add_noise", broken)
    result = start("--train", *TINY, "--out", tmp_path)
    checkpoint = only(tmp_path, "*/checkpoint.pt")
    one_line(result, "not finite", checkpoint)
    assert load(checkpoint)["step"] == 5


def test_pipeline_by_command(tmp_path, monkeypatch):
    """Without a prompt, without diffusers, without such a pipeline: one line each."""
    one_line(start("--pipeline", tmp_path), "--prompt")
    one_line(start("--pipeline", tmp_path, "--prompt", " "), "--prompt")
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "diffusers", None)                    # an import of it fails
        one_line(start("--pipeline", tmp_path, "--prompt", "cat"), "pip install diffusers")
    if importlib.util.find_spec("diffusers"):
        one_line(start("--pipeline", tmp_path, "--prompt", "cat"), tmp_path)


def test_pipeline_by_command_makes_images(diffusers, tmp_path, monkeypatch):
    """Stable Diffusion's pipeline with a stand-in for its text encoder; --method base is the pipeline alone."""
    pipe, _ = tiny_pipeline(diffusers, "sd", tmp_path / "pipe")
    pipe.encode_prompt = lambda prompt, device, n, guided, *args, **kw: (
        randn(1, 7, 12, seed=len(prompt)).expand(n, -1, -1), randn(1, 7, 12).expand(n, -1, -1))
    asked = []
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *a, **kw: asked.append(a) or pipe)
    argv = ("--pipeline", tmp_path / "pipe", "--prompt", "cat", "red heart", "--steps", 4, "--n", 2, "--device", "cpu")
    step = pipe.scheduler.step
    result = start(*argv, "--out", tmp_path / "out")
    assert result.code == 0 and asked[0] == (str(tmp_path / "pipe"),), result.err
    assert "1 x 4x4, 1 x 4x4 shallow, 1 x 8x8, 1 x 8x8 frozen" in result.out
    images = [np.asarray(Image.open(tmp_path / "out" / f"pipeline_{j}_{i}.png")) for j in (0, 1) for i in (0, 1)]
    assert all(a.shape == (16, 16, 3) for a in images) and len({a.tobytes() for a in images}) == 4
    assert "forward" not in vars(pipe.unet) and pipe.scheduler.step == step    # it is as it was
    assert start(*argv, "--method", "base", "--out", tmp_path / "base").code == 0
    base = np.asarray(Image.open(tmp_path / "base" / "pipeline_0_1.png"))
    assert (base != images[1]).any()


def test_help_and_nothing_to_do():
    result = start("--help")
    assert result.code == 0 and all(f"{o} " in result.out or f"{o}\n" in result.out for o in (
        "--data --preset --iters --batch --lr --seed --n --steps --out --checkpoint --resume --device --precision "
        "--train --search --sample --evaluate --ledger --pipeline --prompt").split())
    assert start().code == 2
