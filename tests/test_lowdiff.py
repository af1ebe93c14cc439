"""lowdiff.py against independent oracles: the paper's numbers, closed forms, plain versions written here; then by
its command line, with the preset tiny: train, kill, resume, search, sample, evaluate, and every bad input.
"""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import lowdiff as c
from in_process import start_script

ROOT = Path(common.__file__).resolve().parent
SCRIPT = ROOT / "lowdiff.py"


def preset(name, arch="lowdiff", stages=None, **changes):
    space = "latent" if changes.get("space") == "latent" or name == "paper-dit" else "pixel"
    config = c.preset_of(name, space)
    stages = stages or (config["stages"][-1:] if arch in ("edm", "dit") else config["stages"])
    return dict(config, arch=arch, stages=stages, classes=0, told=False, up="nearest", **dict(changes, space=space))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def awake_net(config, channels=1):
    """A net of random weights, biases and norms: no zero hides a path."""
    net = c.build_net(config, channels).eval()
    for i, p in enumerate(net.parameters()):
        p.data = randn(*p.shape, seed=i).float() * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.3)
    return net


# ---------------------------------------------------------------------------------------------
# Network: parameters and MACs of the paper, and a plain version
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, arch, stages, classes, expected", [
    ("paper", "edm", [32], 0, 55_733_891), ("paper", "edm", [32], 10, 55_735_299),
    ("paper", "lowdiff", [16, 32], 0, 55_752_326), ("paper", "lowdiff", [16, 32], 10, 55_753_734),
    ("paper", "lowdiff", [8, 16, 32], 0, 55_773_961), ("paper", "lowdiff", [8, 16, 32], 10, 55_775_369),
    ("paper", "cdm", [16, 32], 0, 93_887_366), ("paper", "cdm", [16, 32], 10, 93_890_182),
    ("paper-ffhq", "edm", [64], 0, 61_805_571), ("paper-ffhq", "lowdiff", [32, 64], 0, 61_820_422),
    ("paper-ffhq", "lowdiff", [8, 16, 32, 64], 0, 61_860_236), ("paper-ffhq", "cdm", [32, 64], 0, 117_542_918)])
def test_parameters_of_the_paper(name, arch, stages, classes, expected):
    config = dict(preset(name, arch, stages), classes=classes)
    assert c.parameters(config, 3) == expected
    if arch == "edm":                                          # EDM without augmentation, as published
        assert c.parameters(dict(config, augment=0.0), 3) == expected - 1_152
    if arch == "lowdiff":                                      # --told: one more layer, 128 x 128
        assert c.parameters(dict(config, told=True), 3) == expected + 128 * 128 + 128


@pytest.mark.parametrize("name, arch, stages, res, gmacs", [
    ("paper", "edm", [32], 32, 21.1915), ("paper", "lowdiff", [8, 16, 32], 8, 1.0827),
    ("paper", "lowdiff", [8, 16, 32], 16, 5.6312), ("paper", "lowdiff", [8, 16, 32], 32, 21.1951),
    ("paper", "lowdiff", [16, 32], 16, 5.6295), ("paper", "cdm", [16, 32], 16, 5.6295),
    ("paper", "cdm", [16, 32], 32, 21.1951), ("paper-ffhq", "edm", [64], 64, 41.8659),
    ("paper-ffhq", "lowdiff", [8, 16, 32, 64], 8, 1.0827), ("paper-ffhq", "lowdiff", [8, 16, 32, 64], 16, 5.6312),
    ("paper-ffhq", "lowdiff", [8, 16, 32, 64], 32, 21.1951), ("paper-ffhq", "lowdiff", [32, 64], 32, 21.1915),
    ("paper-ffhq", "lowdiff", [8, 16, 32, 64], 64, 41.8801)])
def test_macs_of_the_paper(name, arch, stages, res, gmacs):
    assert c.network_macs(json.dumps(preset(name, arch, stages)), 3, res) / 1e9 == pytest.approx(gmacs, abs=6e-5)


@pytest.mark.parametrize("name, stages, steps, truncate, nfe, gmacs", [
    ("paper", [32], None, None, [35], 741.70), ("paper", [8, 16, 32], None, None, [18, 13, 17], 453.01),
    ("paper", [16, 32], None, None, [19, 17], 467.28), ("paper-ffhq", [64], None, None, [79], 3307.41),
    ("paper-ffhq", [8, 16, 32, 64], None, None, [22, 23, 23, 39], 2274.15),
    ("paper-ffhq", [32, 64], None, None, [49, 39], 2671.71),
    ("paper-ffhq", [32, 64], [30, 20], [37], [37, 39], 2417.41),
    ("paper-ffhq", [32, 64], [50, 20], [61], [61, 39], 2926.01)])
def test_sampling_macs_of_the_paper(name, stages, steps, truncate, nfe, gmacs):
    config = preset(name, "edm" if len(stages) == 1 else "lowdiff", stages)
    macs, counted = c.plan_macs(config, 3, c.make_plan(stages, steps, truncate))
    assert counted == nfe and macs / 1e9 == pytest.approx(gmacs, abs=0.006)


@pytest.mark.parametrize("arch", ["edm", "lowdiff", "cdm"])
def test_plan_macs_is_the_whole_sampler(arch):
    """The networks counted one by one against the whole sampler with real networks on the meta device."""
    config = dict(preset("tiny", arch, cond_scale="own"), classes=3)
    stages = config["stages"]
    plan = c.make_plan(stages, [2] * len(stages), [1] * (len(stages) - 1))
    with torch.device("meta"):
        net, y = c.build_net(config, 1).eval(), torch.zeros(1, dtype=torch.long)
        noise = [torch.zeros(1, 1, r, r) for r in stages]
    denoiser = c.model_of(net, config, torch.device("cpu"), "fp32")
    whole = common.count_macs(c.cascade_sample, c.stages_of(plan, denoiser, noise, y))
    assert c.plan_macs(config, 1, plan) == (whole, [1] * (len(stages) - 1) + [3])


def plain_unet(w, config, res, lowest, x, c_noise, y=None, aug=None):
    """The U-Net from its weights `w`, with matrices and loops in place of modules, as the paper's Fig. 2 and 4 have
    it: all blocks in one list, those above the resolution skipped."""
    ch, patch, L = config["ch"], config["patch"], len(config["mult"])
    stages, R = config["stages"], config["stages"][-1]

    def linear(name, v):
        return v @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def conv(name, v):
        k = w[name + ".weight"]
        return F.conv2d(v, k, w[name + ".bias"], padding=k.shape[-1] // 2)

    def norm(name, v):
        g = min(32, v.shape[1] // 4)
        u = v.reshape(len(v), g, -1)
        u = (u - u.mean(2, keepdim=True)) / (u.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
        return u.reshape(v.shape) * w[name + ".weight"][:, None, None] + w[name + ".bias"][:, None, None]

    def silu(v):
        return v / (1 + torch.exp(-v))

    def size(v, kind):
        if kind == "down":
            return (v[..., ::2, ::2] + v[..., 1::2, ::2] + v[..., ::2, 1::2] + v[..., 1::2, 1::2]) / 4
        return v.repeat_interleave(2, 2).repeat_interleave(2, 3) if kind == "up" else v

    def block(name, v, kind=None):
        h = conv(name + ".conv1", size(silu(norm(name + ".norm1", v)), kind))
        h = h + linear(name + ".emb", emb)[:, :, None, None]
        h = conv(name + ".conv2", silu(norm(name + ".norm2", h)))
        v = size(v, kind)
        v = conv(name + ".skip", v) if name + ".skip.weight" in w else v
        h = (v + h) / math.sqrt(2)
        if name + ".attention.qkv.weight" in w:
            q, k, u = conv(name + ".attention.qkv", norm(name + ".attention.norm", h)).flatten(2).chunk(3, 1)
            weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(-1)
            h = (h + conv(name + ".attention.out", (u @ weights.transpose(1, 2)).view(h.shape))) / math.sqrt(2)
        return h

    frequency = torch.tensor([10000 ** (-i / (ch // 2 - 1)) for i in range(ch // 2)], dtype=torch.float64)
    angle = c_noise.double()[:, None] * frequency
    emb = torch.cat([angle.sin(), angle.cos()], 1)
    if y is not None:
        emb = emb + math.sqrt(config["classes"]) * w["map_label.weight"].T[y] + w["map_label.bias"]
    if aug is not None:
        emb = emb + aug @ w["map_augment.weight"].T
    if len(stages) > 1:
        emb = emb + math.sqrt(len(stages)) * w["map_res.weight"][:, stages.index(res)] + w["map_res.bias"]
    emb = silu(linear("map2", silu(linear("map1", emb))))

    top = [R // 2 ** i for i in range(L)].index(res)
    x = torch.cat([x[:, :, i::patch, j::patch, None] for i in range(patch) for j in range(patch)], -1)
    h = conv(f"entry.{res}", x.permute(0, 1, 4, 2, 3).flatten(1, 2))
    skips = [h]
    for level in range(top, L):
        if level > top:
            h = block(f"down.{level}", h, "down")
            skips.append(h)
        for i in range(config["blocks"]):
            h = block(f"encoder.{level}.{i}", h)
            skips.append(h)
    h = block("mid.1", block("mid.0", h))
    for level in reversed(range(top, L)):
        if level < L - 1:
            h = block(f"up.{level}", h, "up")
        for i in range(config["blocks"] + 1):
            h = block(f"decoder.{level}.{i}", torch.cat([h, skips.pop()], 1))
    h = conv(f"exit.{res}.2", silu(norm(f"exit.{res}.0", h)))
    B, n, H, W = h.shape
    return h.view(B, n // patch ** 2, patch, patch, H, W).permute(0, 1, 4, 2, 5, 3).reshape(B, -1, H * patch, W * patch)


@pytest.mark.parametrize("arch, patch", [("edm", 1), ("lowdiff", 1), ("lowdiff", 2), ("cdm", 2)])
@torch.no_grad()
def test_network_is_the_plain_one(arch, patch):
    """At every resolution, with labels and augmentation; widths differ from level to level."""
    config = dict(preset("tiny", arch), mult=[1, 2, 3], blocks=2, patch=patch, classes=3, augment=0.1)
    net = awake_net(config)
    for res in config["stages"]:
        lowest = config["stages"][0]
        x, c_noise = randn(2, 1 if res == lowest else 2, res, res), torch.tensor([-0.7, 0.4], dtype=torch.float64)
        y, aug = torch.tensor([2, 0]), randn(2, 9, seed=5)
        w = {k: v.double() for k, v in net.state_dict().items()}
        one = config
        if arch == "cdm":                                      # one of its networks: one stage, its own weights
            w = {k[len(f"nets.{res}."):]: v for k, v in w.items() if k.startswith(f"nets.{res}.")}
            top = [32 // 2 ** i for i in range(3)].index(res)
            one = dict(config, stages=[32])
            w = {k.replace(f".{res}.", ".32.") if res == 32 else k: v for k, v in w.items()}
            expected = plain_unet(w, dict(one, stages=[32]), res, lowest, x, c_noise, y, aug)
            assert sorted({int(k.split(".")[1]) for k in w if k.startswith("encoder")}) == list(range(top, 3))
        else:
            expected = plain_unet(w, one, res, lowest, x, c_noise, y, aug)
        found = net(x.float(), c_noise.float(), y, aug.float())
        assert found.shape == (2, 1, res, res) and expected.std() > 0.02
        assert torch.allclose(found, expected.float(), atol=2e-4), (arch, res)


def test_sub_networks_are_nested():
    """Each resolution activates the blocks of its level and below, and its own entry and exit: the parameters that
    the loss of one resolution reaches, of the paper's networks (on the meta device)."""
    config, stages, reached = preset("paper"), [8, 16, 32], []
    for r, channels, expected in zip(stages, (3, 6, 6), (18.653e6, 38.156e6, 55.737e6)):
        with torch.device("meta"):
            net = c.build_net(config, 3)
            net(torch.zeros(1, channels, r, r), torch.zeros(1)).sum().backward()
        found = {name: p.numel() for name, p in net.named_parameters() if p.grad is not None}
        assert sum(found.values()) == pytest.approx(expected, abs=600)
        for other in stages:
            assert any(name.startswith((f"entry.{other}.", f"exit.{other}.")) for name in found) == (other == r)
        reached.append({name for name in found if not name.startswith(("entry", "exit"))})
    assert all(a < b for a, b in zip(reached, reached[1:]))    # with all blocks of the lower one


def test_only_what_is_active_gets_gradient():
    """In figures, on random weights: nothing of the higher stages moves, everything of the lower ones does."""
    config = preset("tiny")
    for i, r in enumerate(config["stages"]):
        net = awake_net(config)
        net(randn(2, 1 + (i > 0), r, r).float(), torch.tensor([0.1, 0.2])).square().sum().backward()
        for name, p in net.named_parameters():
            kind, key = name.split(".")[:2]
            active = key == str(r) if kind in ("entry", "exit") else True
            if kind in ("down", "up", "encoder", "decoder"):
                level = int(key)
                active = level > net.level[r] if kind == "down" else level >= net.level[r]
            assert active == (p.grad is not None and bool((p.grad != 0).any())), name


def test_resolution_embedding_and_label_reach_the_image():
    config = dict(preset("tiny", stages=[16, 32]), classes=4)
    net, x, t = awake_net(config), randn(1, 1, 16, 16).float(), torch.zeros(1)
    a, b = (net(x, t, torch.tensor([y])) for y in (1, 2))
    assert (a - b).abs().max() > 1e-6
    net.map_res.weight.data[:, 0] += 1
    assert (net(x, t, torch.tensor([1])) - a).abs().max() > 1e-6
    a = net(x, t, torch.tensor([1]))
    net.map_res.weight.data[:, 1] += 1                         # that of 32 does not act at 16
    assert torch.equal(net(x, t, torch.tensor([1])), a)


def test_told_network_hears_the_level():
    for told in (False, True):
        net = awake_net(dict(preset("tiny", stages=[16, 32]), told=told))
        x, z, one = randn(1, 1, 32, 32, dtype=torch.float32), randn(1, 1, 32, 32, dtype=torch.float32), torch.ones(1)
        z_scaled = z * (4 + 0.25) ** 0.5 / (1 + 0.25) ** 0.5   # the same input to the net at s = 1 and s = 2
        with torch.no_grad():
            a, b = c.denoise(net, x, one, z, one), c.denoise(net, x, one, z_scaled, 2 * one)
        assert torch.allclose(a, b, atol=1e-4) != told


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 1, 4, 4), (1, 1, 12, 12), (1, 1, 16, 32)])
def test_sizes_without_an_entry(shape):
    with pytest.raises(ValueError, match="no entry"):
        c.build_net(preset("tiny"), 1)(torch.zeros(shape), torch.zeros(1))


@pytest.mark.parametrize("stages", [[4, 8, 16, 32], [2, 32], [10, 20], [9]])
def test_stages_that_the_network_has_not(stages):
    with pytest.raises(ValueError, match="--stages"):
        c.build_net(preset("tiny", stages=stages), 1)


def test_initial_weights_are_edms():
    """Xavier-uniform, residual branches and exits near zero: at first D is c_skip x."""
    torch.manual_seed(0)
    net = c.build_net(preset("small"), 1)
    assert net.map1.weight.abs().max() <= math.sqrt(6 / (32 + 128)) and not net.map1.bias.any()
    block = net.encoder["0"][0]
    bound = math.sqrt(6 / (2 * 9 * 32))
    assert 0.99 * bound < block.conv1.weight.abs().max() <= bound
    assert block.conv2.weight.abs().max() <= 1e-5 * bound
    qkv = net.encoder["1"][0].attention.qkv.weight
    assert 0.98 * math.sqrt(0.2 * 6 / (32 + 96)) < qkv.abs().max() <= math.sqrt(0.2 * 6 / (32 + 96))
    x, sigma = randn(2, 1, 8, 8, dtype=torch.float32), torch.tensor([0.1, 3.0])
    with torch.no_grad():
        x0_hat = c.denoise(net, x, sigma)
    assert torch.allclose(x0_hat, x * (0.25 / (sigma ** 2 + 0.25)).view(-1, 1, 1, 1), atol=1e-3)


# ---------------------------------------------------------------------------------------------
# Preconditioning, training
# ---------------------------------------------------------------------------------------------
def plain_edm_loss(net, x0, sigma, eps):
    """EDM's Eq. 7, 8 and Table 1, letter by letter."""
    sd, s = 0.5, sigma[:, None, None, None]
    c_skip, c_out = sd ** 2 / (s ** 2 + sd ** 2), s * sd / (s ** 2 + sd ** 2) ** 0.5
    c_in, c_noise = 1 / (s ** 2 + sd ** 2) ** 0.5, sigma.log() / 4
    y = x0 + s * eps
    D = c_skip * y + c_out * net(c_in * y, c_noise)
    return ((s ** 2 + sd ** 2) / (s * sd) ** 2 * (D - x0) ** 2).sum() / len(x0)


def test_the_off_switch_trains_as_edm():
    """--arch edm: the same loss and gradients as EDM's written here, for the same draws."""
    config, x0 = preset("tiny", "edm"), randn(3, 1, 32, 32).float() / 2
    torch.manual_seed(1)
    (sigma, eps, s, eps_z), = c.draw_noise(3, 1, [32])
    assert s is None and eps_z is None and eps.shape == (3, 1, 32, 32)
    grads, losses = [], []
    for loss_of in (lambda net: c.cascade_loss(net, x0, [(sigma, eps, None, None)]),
                    lambda net: plain_edm_loss(net, x0, sigma, eps)):
        net = awake_net(config)
        loss = loss_of(net)
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.allclose(*losses, rtol=1e-5) and (grads[0] - grads[1]).norm() < 1e-4 * grads[0].norm()


def test_preconditioning_has_unit_variance():
    """For data of standard deviation sigma_data the network's input and its ideal output have variance 1."""
    x0 = 0.5 * randn(1, 1, 300, 300)
    for sigma in (0.02, 0.3, 5.0):
        seen, eps = [], randn(1, 1, 300, 300, seed=1)

        def net(x, c_noise, *rest):
            seen.append((x, c_noise))
            return torch.zeros_like(x)
        xt, level = x0 + sigma * eps, torch.tensor([sigma], dtype=torch.float64)
        skipped = c.denoise(net, xt, level)                    # c_skip xt
        assert seen[0][0].var() == pytest.approx(1, abs=0.02)
        assert float(seen[0][1]) == pytest.approx(math.log(sigma) / 4)
        c_out = c.denoise(lambda x, *rest: torch.ones_like(x), xt, level) - skipped
        target = (x0 - skipped) / c_out
        assert target.var() == pytest.approx(1, abs=0.02)
        weight = (sigma ** 2 + 0.25) / (sigma * 0.5) ** 2      # lambda = 1 / c_out^2
        assert float(c_out[0, 0, 0, 0]) ** -2 == pytest.approx(weight)


@pytest.mark.parametrize("cond_scale", ["own", "input"])
def test_the_condition_enters_scaled_and_unskipped(cond_scale):
    xt, z = randn(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1)
    sigma, s = torch.tensor([50.0, 0.01]).double(), torch.tensor([1.0, 0.3]).double()
    seen = []

    def net(x, *rest):
        seen.append(x)
        return torch.zeros(2, 3, 8, 8).double()
    x0_hat = c.denoise(net, xt, sigma, z, s, cond_scale=cond_scale)
    level = s if cond_scale == "own" else sigma
    for b in range(2):
        assert torch.allclose(seen[0][b, :3], xt[b] / math.sqrt(sigma[b] ** 2 + 0.25))
        assert torch.allclose(seen[0][b, 3:], z[b] / math.sqrt(level[b] ** 2 + 0.25))
        assert torch.allclose(x0_hat[b], xt[b] * 0.25 / (sigma[b] ** 2 + 0.25))      # z is not in it


def test_draws_of_training():
    """The log-normal's percentiles; image and condition independent, in level and in noise."""
    torch.manual_seed(0)
    (sigma, eps, none, _), (sigma2, eps2, s, eps_z) = c.draw_noise(200_000, 1, [1, 2])
    assert none is None and eps2.shape == (200_000, 1, 2, 2) and eps_z.shape == (200_000, 1, 1, 1)
    for level in (sigma, sigma2, s):
        found = level.quantile(torch.tensor([0.01, 0.05, 0.16, 0.5, 0.84, 0.95, 0.99]))
        assert found.tolist() == pytest.approx([0.0185, 0.042, 0.091, 0.301, 1.0, 2.17, 4.91], rel=0.04)
    columns = torch.stack([sigma.log(), eps.flatten(), sigma2.log(), *eps2.flatten(1).T, s.log(), eps_z.flatten()])
    correlation = torch.corrcoef(columns) - torch.eye(len(columns))
    assert correlation.abs().max() < 0.012


def test_cascade_loss_by_hand():
    """Truncation augmentation: the condition is the clean image halved, plus noise of its own level drawn at that
    size, repeated; losses are summed over pixels and resolutions and averaged over the batch."""
    x0, stages = randn(2, 1, 8, 8), [2, 4, 8]
    torch.manual_seed(3)
    draws = [[None if v is None else v.double() for v in d] for d in c.draw_noise(2, 1, stages)]
    seen = {}

    def net(x, c_noise, *rest):
        seen[x.shape[-1]] = x
        return x[:, :1] * 0.5 + c_noise.view(-1, 1, 1, 1)
    found = c.cascade_loss(net, x0, draws)
    total, y = 0, {8: x0}
    for r in (4, 2):
        y[r] = y[2 * r].view(2, 1, r, 2, r, 2).mean((3, 5))
    for r, (sigma, eps, s, eps_z) in zip(stages, draws):
        for b in range(2):
            v, n = float(sigma[b]), y[r][b] + sigma[b] * eps[b]
            F_x = 0.5 * n / math.sqrt(v ** 2 + 0.25) + math.log(v) / 4
            D = 0.25 / (v ** 2 + 0.25) * n + v * 0.5 / math.sqrt(v ** 2 + 0.25) * F_x
            total += (v ** 2 + 0.25) / (v * 0.5) ** 2 * float((D - y[r][b]).square().sum()) / 2
            if r > 2:
                z = (y[r // 2][b] + s[b] * eps_z[b]).repeat_interleave(2, 1).repeat_interleave(2, 2)
                assert torch.allclose(seen[r][b, 1:], z / math.sqrt(float(s[b]) ** 2 + 0.25))
        assert seen[r].shape[1] == (1 if r == 2 else 2)
    assert float(found) == pytest.approx(total, rel=1e-10)


def test_down_and_up():
    x = randn(1, 1, 256, 256)
    assert torch.allclose(c.downsample(x), F.interpolate(x, size=(128, 128), mode="area"))
    assert c.downsample(x).std() == pytest.approx(0.5, abs=0.01)                # D5: sigma at r/2 is 2 sigma at r
    assert torch.equal(c.downsample(c.upsample(x)), x)
    assert c.upsample(x).std() == pytest.approx(1, abs=0.01)
    assert c.upsample(x, "bilinear").std() == pytest.approx(0.625, abs=0.01)    # the docstring's


def test_augment_matrices():
    """Chance, sizes and labels of EDM's augmentations; each matrix against one made of its label."""
    torch.manual_seed(0)
    theta, told = c.draw_augment(20_000, 0.12)
    assert told.shape == (20_000, 9) and theta.shape == (20_000, 2, 3)
    share = (told != 0).float().mean(0)
    assert share[0] == pytest.approx(0.5, abs=0.02) and share[1] == pytest.approx(0.06, abs=0.01)
    assert share[2:].tolist() == pytest.approx([0.12] * 3 + [0.12, 0.06, 0.12, 0.12], abs=0.012)
    some = ((told[:, 2:] != 0).sum(1) > 5).nonzero()[:20, 0].tolist()           # several at once
    for i in some:
        fx, fy, scale, cos, sin, a, b, tx, ty = told[i].tolist()
        turn = math.atan2(sin, cos + 1)
        first, size = math.atan2(b, a), math.hypot(a, b)       # (w, axis) and (-w, axis + pi) are told alike, and ...
        candidates = []
        for w, axis in ((size, first), (-size, first + math.pi)):    # ... only one of them was drawn
            def rot(t):
                return np.array([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]])
            m = np.diag([1 - 2 * fx, 1 - 2 * fy]) @ np.diag([2 ** (-0.2 * scale)] * 2) @ rot(turn)
            m = m @ rot(-axis) @ np.diag([2 ** (-0.2 * w), 2 ** (0.2 * w)]) @ rot(axis)
            candidates.append(np.column_stack([m, m @ [-0.25 * tx, -0.25 * ty]]))
        assert min(abs(theta[i].numpy() - m).max() for m in candidates) < 1e-4


def test_a_flip_is_exact_and_nothing_is_nothing():
    torch.manual_seed(0)
    theta, told = c.draw_augment(64, 0.0)                      # p = 0: flips only
    x = torch.rand(64, 3, 8, 8)
    out = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode="reflection",
                        align_corners=False)
    flipped = told[:, 0] == 1
    assert 20 < flipped.sum() < 44 and not told[:, 1:].any()
    assert torch.allclose(out[flipped], x[flipped].flip(-1), atol=1e-5)
    assert torch.allclose(out[~flipped], x[~flipped], atol=1e-5)


def test_tiny_preset_learns_eight_images():
    """At every stage better than any estimate that knows the noise level but not the images."""
    torch.manual_seed(0)
    row = torch.arange(16) / 15 * 2 - 1
    x0 = torch.stack([torch.sin((k % 4 + 1) * (row if k < 4 else row[:, None])).sign().expand(16, 16)
                      for k in range(8)])[:, None] * 0.9
    config = preset("tiny", stages=[8, 16])
    net, losses = c.build_net(config, 1), []
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)

    def estimate(draws):                                       # loss of the best multiple of xt, at each stage
        total = 0
        for (sigma, *_), x in zip(draws, (c.downsample(x0), x0)):
            p = float(x.square().mean())
            weight = (sigma ** 2 + 0.25) / (sigma * 0.5) ** 2
            total += (weight * p * sigma ** 2 / (p + sigma ** 2)).mean() * x[0].numel()
        return float(total)
    for _ in range(60):
        draws = c.draw_noise(8, 1, [8, 16])
        loss = c.cascade_loss(net, x0[torch.randperm(8)], draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), estimate(draws)))
    mine, theirs = (sum(v[-20:]) for v in zip(*losses))
    assert losses[0][0] > 0.9 * losses[0][1] and mine < 0.7 * theirs, losses[::10]


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------
def gaussian(variance):
    """Exact denoiser of data N(0, variance), pixel by pixel."""
    return lambda xt, sigma: xt * variance / (variance + sigma ** 2)


def plain_heun(denoiser, noise, sigmas, K=None):
    """EDM's Algorithm 1 with a budget of K calls; the ladder's last entry is 0."""
    x, spent, K = noise.double() * sigmas[0], 0, K or 10 ** 9
    for t, t_next in zip(sigmas, sigmas[1:]):
        if spent == K:
            break
        d = (x - denoiser(x, t)) / t
        spent += 1
        x_next = x + (t_next - t) * d
        if t_next != 0 and spent < K:
            d_next = (x_next - denoiser(x_next, t_next)) / t_next
            spent += 1
            x_next = x + (t_next - t) * (0.5 * d + 0.5 * d_next)
        x = x_next
    return x, spent


def test_noise_levels_of_the_paper():
    n18 = [80, 57.59, 40.79, 28.37, 19.35, 12.91, 8.401, 5.315, 3.257, 1.923, 1.088, 0.5853, 0.2964, 0.1395, 0.0599,
           0.0229, 0.0075, 0.002, 0]
    assert c.noise_levels(18, 0.002, 80) == pytest.approx(n18, rel=1e-3, abs=6e-5)
    n9 = [50, 26.24, 12.90, 5.854, 2.401, 0.8649, 0.2615, 0.0617, 0.01, 0]
    assert c.noise_levels(9, 0.01, 50) == pytest.approx(n9, rel=1e-3)
    assert c.noise_levels(1, 0.01, 50) == pytest.approx([50, 0])


def test_noise_levels_are_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for steps in (2, 9, 18, 40):
        scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_schedule="karras", rho=7)
        scheduler.set_timesteps(steps)
        assert c.noise_levels(steps, 0.002, 80) == pytest.approx(scheduler.sigmas.tolist(), rel=1e-5)


@pytest.mark.parametrize("N", [1, 2, 5, 18])
@pytest.mark.parametrize("evaluations", [None, 1, 2, 3, 6, 9, 35])
def test_heun_is_the_plain_one(N, evaluations):
    sigmas, noise = c.noise_levels(N, 0.01, 50), randn(2, 1, 4, 4)
    calls = []

    def denoiser(xt, sigma):
        calls.append(sigma)
        return torch.tanh(xt / (1 + sigma)) + 0.1 * math.cos(sigma)
    if evaluations and evaluations > 2 * N - 1:
        with pytest.raises(ValueError, match=f"1 .. {2 * N - 1}"):
            c.heun_sample(denoiser, noise, sigmas, evaluations)
        return
    found, n = c.heun_sample(denoiser, noise, sigmas, evaluations), len(calls)
    expected, spent = plain_heun(denoiser, noise, sigmas, evaluations)
    assert torch.equal(found, expected) and found.dtype == torch.float64
    assert n == spent == (evaluations or 2 * N - 1)            # NFE


@pytest.mark.parametrize("N, smin, smax, K, stop", [
    (18, 0.002, 80, 17, 1.9233), (18, 0.002, 80, 18, 1.9233), (18, 0.002, 80, 19, 1.0882),
    (18, 0.002, 80, 20, 1.0882), (18, 0.002, 80, 21, 0.5853), (30, 0.002, 80, 37, 0.5350),
    (40, 0.002, 80, 49, 0.6254), (50, 0.002, 80, 61, 0.6849), (12, 0.01, 50, 13, 0.782),
    (20, 0.01, 50, 23, 0.816), (20, 0.002, 80, 22, 1.194), (9, 0.01, 50, 17, 0)])
def test_where_truncation_stops(N, smin, smax, K, stop):
    sigmas = c.noise_levels(N, smin, smax)
    assert c.stop_level(sigmas, K) == pytest.approx(stop, abs=6e-4)
    levels = []                                                # for data of variance 0 the image is its noise
    x = c.heun_sample(lambda xt, sigma: levels.append(sigma) or torch.zeros_like(xt), torch.ones(1, 1, 1, 1), sigmas, K)
    assert float(x) == pytest.approx(c.stop_level(sigmas, K), abs=1e-9) and len(levels) == K


def slope(errors, Ns):
    return np.polyfit(np.log(Ns), np.log(errors), 1)[0]


def test_heun_is_of_second_order():
    """Gaussian data: x(sigma) = x(sigma_max) sqrt((v + sigma^2) / (v + sigma_max^2)); Euler is of first order."""
    v, smin, smax, Ns, noise = 0.3, 0.05, 20, (40, 80, 160, 320), randn(1, 1, 2, 2)
    exact = noise * smax * math.sqrt((v + smin ** 2) / (v + smax ** 2))
    heun, euler = [], []
    for N in Ns:
        sigmas = c.noise_levels(N, smin, smax)
        heun.append(float((c.heun_sample(gaussian(v), noise, sigmas, 2 * N - 2) - exact).abs().max()))
        x = noise * smax
        for a, b in zip(sigmas[:-1], sigmas[1:-1]):
            x = x + (b - a) * (x - gaussian(v)(x, a)) / a
        euler.append(float((x - exact).abs().max()))
    assert slope(heun, Ns) == pytest.approx(-2, abs=0.1) and slope(euler, Ns) == pytest.approx(-1, abs=0.1)
    sigmas = c.noise_levels(300, 0.002, 80)                    # to the end: the data's distribution
    end = c.heun_sample(gaussian(v), noise, sigmas)
    assert torch.allclose(end, noise * 80 * math.sqrt(v / (v + 80 ** 2)), rtol=1e-3)


def test_a_cascade_of_exact_denoisers_is_exact():
    """Images of 2x2 pixels with mean m ~ N(0, 1) and differences of variance v, the low-resolution image being m: with
    the exact denoisers the cascade draws from the data's distribution, and in its image is the condition's. Any
    other level than that of the noise handed on, or z changed on the way, would show."""
    v = 0.09

    def low(xt, sigma, z, s):
        assert z is None and s is None
        return xt / (1 + sigma ** 2)

    def high(xt, sigma, z, s):
        assert torch.equal(z, z[..., :1, :1].expand_as(z))
        prior, mean = s ** 2 / (1 + s ** 2), z / (1 + s ** 2)  # of m given z
        average = xt.mean((2, 3), keepdim=True)
        m = (mean / prior + 4 * average / sigma ** 2) / (1 / prior + 4 / sigma ** 2)
        return m + v / (v + sigma ** 2) * (xt - average)

    N, n = 40, 60_000
    for K in (40, 49):
        sigmas = c.noise_levels(N, 0.002, 80)
        first, x = c.cascade_sample([(low, randn(n, 1, 1, 1), sigmas, K),
                                     (high, randn(n, 1, 2, 2, seed=1), c.noise_levels(N, 0.01, 50), 2 * N - 1)])
        s = c.stop_level(sigmas, K)
        m, difference = x.mean((2, 3)).flatten(), x - x.mean((2, 3), keepdim=True)
        # Noise of 50 without the condition's mean under it loses that share of the mean (0 for infinite noise):
        prior = s ** 2 / (1 + s ** 2)
        kept = 1 - math.sqrt(prior / (prior + 25 ** 2))
        assert 0.95 < kept < 1
        assert first.var() == pytest.approx(1 + s ** 2, rel=0.02)
        assert (m * first.flatten()).mean() == pytest.approx(kept, rel=0.015)    # z = m + s e
        assert m.var() == pytest.approx(kept ** 2 / (1 + s ** 2) + prior, rel=0.015)
        assert difference.square().mean() == pytest.approx(0.75 * v, rel=0.02)


@pytest.mark.parametrize("up", ["nearest", "bilinear"])
def test_cascade_sample_by_hand(up):
    """Three stages: the noisy image of one is the condition of the next, unchanged in all its evaluations."""
    ladders = [c.noise_levels(5, 0.002, 80), c.noise_levels(4, 0.01, 50), c.noise_levels(3, 0.01, 50)]
    counts, noise = [4, 3, 5], [randn(2, 1, r, r, seed=r) for r in (4, 8, 16)]

    def denoiser(xt, sigma, z, s):
        return torch.tanh(xt) / (1 + sigma) + (0 if z is None else 0.3 * z.sin() / (1 + s))
    found = c.cascade_sample(list(zip([denoiser] * 3, noise, ladders, [4, 3, None])), up)       # None: all 5
    z = s = None
    for x, e, sigmas, K in zip(found, noise, ladders, counts):
        expected, spent = plain_heun(lambda xt, sigma, z=z, s=s: denoiser(xt, sigma, z, s), e, sigmas, K)
        assert torch.equal(x, expected) and spent == K
        z, s = F.interpolate(expected, scale_factor=2, mode=up), sigmas[math.ceil(K / 2)]


def test_the_off_switch_samples_as_edm():
    """--arch edm with its plan: the same tensors as EDM's sampler written here."""
    config = preset("tiny", "edm", cond_scale="own")
    net, noise = awake_net(config), randn(2, 1, 32, 32, dtype=torch.float32)
    denoiser, plan = c.model_of(net, config, torch.device("cpu"), "fp32"), c.make_plan([32])
    assert plan["stages"] == [dict(res=32, steps=18, evaluations=35, sigma_min=0.002, sigma_max=80.0, sigma_stop=0.0)]
    found, = c.cascade_sample(c.stages_of(plan, denoiser, [noise]))
    sigmas = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)] + [0.0]

    @torch.no_grad()
    def edm(xt, sigma):
        return c.denoise(net, xt.float(), torch.full((2,), sigma)).double()
    expected, nfe = plain_heun(edm, noise, sigmas)
    assert torch.equal(found, expected) and nfe == 35


def test_effective_nfe():
    at_32 = 2.22 / 35                                          # seconds as the printed latencies imply them
    at_16 = (1.39 - 17 * at_32) / 19
    at_8 = (1.37 - 17 * at_32 - 13 * at_16) / 18
    assert c.effective_nfe([18, 13, 17], [at_8, at_16, at_32]) == 22             # Table 1
    assert c.effective_nfe([19, 17], [at_16, at_32]) == 22
    assert c.effective_nfe([19, 17], [5.6295, 21.1951]) == 23                    # by MACs
    assert c.effective_nfe([45, 50], [0.233, 1]) == 61 and c.effective_nfe([35], [0.1]) == 35
    assert c.effective_nfe([10, 10, 5], [0.1, 0.3, 1.0]) == 9                    # exactly 4: no rounding up to 5


# ---------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------
GOOD = dict(stages=[dict(res=16, steps=18, evaluations=19, sigma_min=0.002, sigma_max=80),
                    dict(res=32, steps=9, evaluations=17, sigma_min=0.01, sigma_max=50)])


def test_plans_of_the_paper():
    assert c.make_plan([16, 32]) == c.check_plan(json.loads(json.dumps(GOOD)))
    for stages, steps in (([8, 16, 32], [18, 12, 9]), ([32, 64], [40, 20]), ([8, 16, 32, 64], [20] * 4),
                          ([64, 128], [18, 9]), ([128], [18])):
        plan = c.make_plan(stages)["stages"]
        assert [p["steps"] for p in plan] == steps and [p["res"] for p in plan] == stages
        assert plan[-1]["evaluations"] == 2 * steps[-1] - 1 and plan[-1]["sigma_stop"] == 0
        assert (plan[0]["sigma_min"], plan[0]["sigma_max"]) == (0.002, 80)
        assert all((p["sigma_min"], p["sigma_max"]) == (0.01, 50) for p in plan[1:])
        assert all(0.5 < p["sigma_stop"] < 2 for p in plan[:-1])


def test_ablations_of_the_paper():
    """Tables 11, 12 and 10 from the adopted plans."""
    counts = [p["stages"][0]["evaluations"] for _, p in c.ablation(c.make_plan([16, 32]), "truncation")]
    assert {17, 18, 19, 20, 21} <= set(counts) and counts == sorted(set(counts))
    rows = [(p["stages"][0]["steps"], p["stages"][0]["evaluations"])
            for _, p in c.ablation(c.make_plan([32, 64]), "steps")]
    assert rows == [(30, 37), (40, 49), (50, 61)]
    ranges = [[(s["sigma_min"], s["sigma_max"]) for s in p["stages"]]
              for _, p in c.ablation(c.make_plan([32, 64]), "range")]
    wide, narrow = (0.002, 80), (0.01, 50)
    assert ranges == [[wide, narrow], [narrow, narrow], [wide, wide]]
    small = c.ablation(c.make_plan([16, 32], [3, 2], [2]), "truncation")        # only what the schedule holds
    assert [p["stages"][0]["evaluations"] for _, p in small] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="one stage"):
        c.ablation(c.make_plan([32]), "truncation")


@pytest.mark.parametrize("stage, changes, told", [
    (0, dict(evaluations=36), "36 evaluations"), (0, dict(evaluations=0), "whole numbers"),
    (0, dict(steps=9.5), "whole"), (0, dict(steps="9"), "whole"), (0, dict(steps=True), "whole"),
    (0, dict(sigma_min=0), "sigma_min"), (0, dict(sigma_min=90), "sigma_min"), (1, dict(sigma_max=math.nan), "sigma"),
    (1, dict(sigma_max=math.inf), "sigma"), (1, dict(sigma_max="50"), "sigma"), (1, dict(res=48), "twice"),
    (0, dict(res=32), "twice"), (1, dict(evaluations=16), "to the end"), (0, dict(res=None), "whole")])
def test_bad_plans(stage, changes, told, tmp_path):
    plan = json.loads(json.dumps(GOOD))
    plan["stages"][stage].update(changes)
    with pytest.raises(ValueError, match=told):
        c.check_plan(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="plan.json"):
        c.load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", '{"stages": 3}', '{"stages": []}', '{"stages": [1, 2]}'])
def test_files_that_are_no_plan(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="plan.json"):
        c.load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("option", [dict(steps=[18]), dict(steps=[18, 9, 9]), dict(truncate=[]), dict(truncate=[1, 2]),
                                    dict(sigma_min=[0.1]), dict(sigma_max=[80.0] * 3)])
def test_schedules_of_the_wrong_length(option):
    with pytest.raises(ValueError, match=f"--{next(iter(option)).replace('_', '-')} .*need [12] numbers"):
        c.make_plan([16, 32], **option)


# ---------------------------------------------------------------------------------------------
# By the command line
# ---------------------------------------------------------------------------------------------
TINY = "--preset tiny --precision fp32 --batch 8 --iters 9 --save-every 3".split()
FEW = "--steps 3 2 2 --truncate 3 2".split()                    # 3 + 2 + 3 evaluations


def start(*argv):
    """`python lowdiff.py ARGV` in this process: exit code, stdout, stderr."""
    return start_script(c, *argv)


def spawn(*command, **options):
    """A process with the same number of threads (for equal bits), stopped by Ctrl-C even if pytest's own shell
    ignores it."""
    env = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()))
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def load(path):
    return torch.load(path, weights_only=True)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def only(folder, pattern="*/checkpoint.pt"):
    """The one file that fits the pattern."""
    found = list(Path(folder).glob(pattern))
    assert len(found) == 1, (pattern, sorted(map(str, Path(folder).rglob("*"))))
    return found[0]


def equal(a, b):
    """Are two checkpoints, or parts of them, equal bit for bit?"""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def one_line(result, *words):
    """The result of a bad input: exit code 1, one line of the script's, with these words in it."""
    lines = [s for s in result.err.splitlines() if not re.match(r"(train|sample)\b.* left ", s)]
    assert result.code == 1 and len(lines) == 1, result
    assert lines[0].startswith("lowdiff: error: ") and "Traceback" not in result.err + result.out
    for word in words:
        assert str(word) in lines[0], (word, lines[0])
    return lines[0]


def tiles(path, n, columns=8, side=32):
    """The first n images of a grid, pixel by pixel (each is drawn at twice its size)."""
    a = np.asarray(Image.open(path))
    k = 2 * side + 2
    return [a[i // columns * k + 1:, i % columns * k + 1:][:2 * side:2, :2 * side:2] for i in range(n)]


@pytest.fixture(scope="module", autouse=True)
def repository_is_left_alone(tmp_path_factory):
    """No test may write into the results of the repository."""
    yield
    for path in (ROOT / "results").rglob("*.jsonl"):
        assert str(tmp_path_factory.getbasetemp()) not in path.read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with labels that nothing interrupts."""
    out = tmp_path_factory.mktemp("trained")
    result = start("--train", *TINY, "--cond", "--out", out)
    assert result.code == 0, result.err
    return SimpleNamespace(out=out, checkpoint=only(out), run=only(out).parent, result=result)


@pytest.fixture(scope="module")
def edm(tmp_path_factory):
    """EDM without labels, three steps."""
    out = tmp_path_factory.mktemp("edm")
    result = start("--train", "--arch", "edm", *TINY, "--iters", 3, "--out", out)
    assert result.code == 0, result.err
    return only(out)


@pytest.fixture
def few_images(monkeypatch):
    """1,000 of the 10,000 images as the reference: a tenth of the time."""
    load_images = common.load_images
    monkeypatch.setattr(common, "load_images", lambda *args: tuple(
        part[:1000] if torch.is_tensor(part) else part for part in load_images(*args)))


def test_train(trained):
    saved = load(trained.checkpoint)
    assert saved["script"] == "lowdiff" and saved["step"] == 9 and saved["images_seen"] == 72
    assert saved["args"]["stages"] == [8, 16, 32] and saved["args"]["classes"] == 10
    assert {"net", "ema", "optimizer", "args", "channels"} <= saved.keys() and not equal(saved["net"], saved["ema"])
    assert all(v.isfinite().all() for part in ("net", "ema") for v in saved[part].values())
    log = lines_of(trained.run / "log.jsonl")
    assert [line["step"] for line in log] == [3, 6, 9] and log[-1]["loss"] < log[0]["loss"]
    assert not list(trained.out.rglob("*.part"))
    size = {name: (trained.run / name).stat().st_size for name in ("checkpoint.pt", "weights.pt")}
    assert size["weights.pt"] < size["checkpoint.pt"] / 3
    assert load(trained.run / "weights.pt")["ema"]["map1.weight"].dtype == torch.float16


def test_equal_budgets(tmp_path):
    """--budget in MACs gives each architecture its steps; the default is what EDM's steps cost."""
    steps = {}
    for arch, stages in (("edm", [32]), ("lowdiff", [8, 16, 32]), ("cdm", [16, 32])):
        config = preset("tiny", arch, stages)
        cost = sum(c.network_macs(json.dumps(config), 1, r) for r in stages)
        assert c.training_macs(config, 1) == cost
        steps[arch] = int(1e8 // (8 * cost))
        result = start("--train", "--arch", arch, "--stages", *stages, "--preset", "tiny", "--batch", 8, "--budget",
                       1e8, "--out", tmp_path / arch)
        assert result.code == 0, result.err
        saved = load(only(tmp_path / arch))
        assert saved["step"] == steps[arch] and saved["args"]["budget"] == 1e8
        assert 0 <= 1e8 - saved["images_seen"] * cost < 8 * cost
    assert steps["edm"] > steps["lowdiff"] > 2
    args = c.get_args(["--train", "--preset", "tiny"])
    assert args.budget is None and args.edm_iters == 20 and args.stages == [8, 16, 32]


def test_sample(trained, edm, tmp_path):
    """Seed i makes image i; a row for each stage and checkpoint; classes in turn, or those asked for."""
    options = ("--precision", "fp32", *FEW)
    result = start("--sample", "--n", 6, *options, "--checkpoint", trained.checkpoint, "--out", tmp_path)
    assert result.code == 0, result.err
    assert "8x8: 3 of 5 evaluations, sigma 80 to 0.002, then 16x16: 2 of 3 evaluations" in result.out
    assert "32x32: 3 of 3 evaluations, sigma 50 to 0" in result.out
    before = tiles(tmp_path / "samples.png", 6)
    assert len({tile.tobytes() for tile in before}) == 6
    result = start("--sample", "--n", 3, "--seed", 2, *options, "--checkpoint", trained.checkpoint, "--out", tmp_path)
    for a, b in zip(tiles(tmp_path / "samples.png", 3), before[2:]):
        assert abs(a.astype(int) - b).max() <= 1
    result = start("--sample", "--n", 3, "--classes", 2, 3, 4, *options, "--checkpoint", trained.checkpoint, "--out",
                   tmp_path)
    a, b, _ = tiles(tmp_path / "samples.png", 3)
    assert result.code == 0 and (a != before[0]).any()         # seed 0 as class 2
    args = SimpleNamespace(config=dict(classes=10), chosen=[7, 1])
    assert c.labels_of(args, [0, 1, 2, 5], "cpu").tolist() == [7, 1, 7, 1]

    result = start("--sample", "--show-stages", "--n", 2, "--precision", "fp32", "--checkpoint", trained.checkpoint,
                   edm, "--out", tmp_path)
    assert result.code == 0, result.err
    assert Image.open(tmp_path / "samples.png").size == (2 * 66, 4 * 66)
    rows = tiles(tmp_path / "samples.png", 8, columns=2)
    for i, side in ((0, 4), (1, 4), (2, 2), (3, 2)):           # 8x8 and 16x16 in large pixels
        small = rows[i][::side, ::side]
        assert (np.kron(small, np.ones((side, side), np.uint8)) == rows[i]).all()
    assert len({row.tobytes() for row in rows}) == 8


def test_bilinear_cdm_told_and_a_plan(tmp_path):
    """Switches come from the checkpoint; --plan FILE is the plan."""
    result = start("--train", "--arch", "cdm", "--stages", 16, 32, "--told", "--up", "bilinear", "--cond-scale",
                   "input", *TINY, "--iters", 3, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    saved = load(only(tmp_path / "run"))
    assert [saved["args"][k] for k in ("up", "cond_scale", "told")] == ["bilinear", "input", True]
    assert {k.split(".")[1] for k in saved["net"]} == {"16", "32"} and "nets.32.map_told.weight" in saved["net"]
    plan = c.make_plan([16, 32], [3, 2], [2])
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    images = []
    for argv in (["--plan", tmp_path / "plan.json"], ["--steps", 3, 2, "--truncate", 2]):
        result = start("--sample", "--n", 2, *argv, "--out", tmp_path / "run")
        assert result.code == 0 and f"checkpoint: {only(tmp_path / 'run')}" in result.out, result.err
        images.append((tmp_path / "run" / "samples.png").read_bytes())
    assert images[0] == images[1]


KEYS = ("experiment method solver data preset seed n extractor fd nfe macs_per_image seconds_per_image device torch "
        "images_seen source_sha256 args plan parameters effective_nfe images_per_s edm_images_per_s").split()


def test_evaluate(trained, tmp_path, few_images):
    results = tmp_path / "new folder" / "results.jsonl"
    options = (*FEW, "--n", 150, "--precision", "fp32", "--checkpoint", trained.checkpoint, "--out", tmp_path)
    result = start("--evaluate", "--sample", *options, "--results", results, "--experiment", "Table 2")
    assert result.code == 0, result.err
    line, = lines_of(results)
    assert not set(KEYS) - line.keys()
    expected = dict(experiment="Table 2", method="lowdiff", data="fashion10k", preset="tiny", seed=0, n=150, cond=True,
                    extractor="small-fashion", nfe=[3, 2, 3], images_seen=72, source_sha256=common.sha256_of(SCRIPT))
    assert {k: line[k] for k in expected} == expected
    config = load(trained.checkpoint)["args"]
    costs = [c.network_macs(json.dumps(config), 1, r) for r in (8, 16, 32)]
    assert line["macs_per_image"] == 3 * costs[0] + 2 * costs[1] + 3 * costs[2]
    edm = c.network_macs(json.dumps(dict(config, arch="edm", stages=[32])), 1, 32)
    assert line["relative_macs"] == pytest.approx(line["macs_per_image"] / (35 * edm))
    assert line["train_macs"] == 72 * sum(costs) and line["parameters"] == c.parameters(config, 1)
    slowest, fastest = line["speedup_range"]
    assert slowest <= line["speedup"] <= fastest and line["speedup"] > 1
    assert slowest <= line["images_per_s"] / line["edm_images_per_s"] <= fastest
    assert line["effective_nfe"] == c.effective_nfe([3, 2, 3], line["seconds_per_evaluation"])
    assert re.search(rf"FD\[small-fashion\]@150 {line['fd']:.1f}", result.out)
    # The same distance from the pixels of the grid.
    pixels = torch.tensor(np.stack(tiles(tmp_path / "samples.png", 150)))[:, None]
    extractor, _ = common.load_extractor("fashion10k", torch.device("cpu"))
    stats = [common.feature_stats(common.extract(extractor, x)[0]) for x in
             (pixels, common.load_images("fashion10k")[0])]
    assert line["fd"] == pytest.approx(common.frechet_distance(*stats), rel=1e-4)


def test_search(trained, tmp_path, few_images):
    """The sweep of Table 11: a line each, and the best as a plan that --sample takes."""
    results = tmp_path / "results.jsonl"
    options = ("--precision", "fp32", "--checkpoint", trained.checkpoint, "--out", tmp_path)
    result = start("--search", "--sweep", "truncation", *FEW, "--n", 130, *options, "--results", results, "--plans",
                   tmp_path)
    assert result.code == 0, result.err
    lines, plan = lines_of(results), json.loads((tmp_path / "plan_truncation.json").read_text())
    assert [line["nfe"] for line in lines] == [[3, 1, 3], [3, 2, 3]]
    assert [line["variant"] for line in lines] == ["K = 1", "K = 2"] and lines[0]["experiment"] == "truncation"
    best = min(lines, key=lambda line: line["fd"])
    assert plan["stages"] == best["plan"]["stages"] and plan["fd"] == best["fd"]
    result = start("--sample", "--n", 1, "--plan", tmp_path / "plan_truncation.json", *options)
    assert result.code == 0, result.err


def resumed_equals(trained, out, steps_before):
    """--resume goes on from the checkpoint and ends where the uninterrupted run does."""
    checkpoint = only(out)
    result = start("--train", "--resume", "--save-every", 3, "--precision", "fp32", "--out", out)
    assert result.code == 0, result.err
    assert only(out) == checkpoint                             # no second run
    steps = [line["step"] for line in lines_of(checkpoint.parent / "log.jsonl")]
    assert steps[-1] == 9 and steps == sorted(set(steps)) and set(range(steps_before + 3, 10, 3)) <= set(steps)
    a, b = load(checkpoint), load(trained.checkpoint)
    for key in ("net", "ema", "optimizer", "step", "images_seen", "args"):
        assert equal(a[key], b[key]), key


KILLED_WHILE_WRITING = """
import io, os, runpy, signal, sys, torch
save, calls = torch.save, []
def killed(value, path):
    calls.append(path)
    if len(calls) == 2:                                        # steps 3, 6
        whole = io.BytesIO()
        save(value, whole)
        with open(path, "wb") as file:
            file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    save(value, path)
torch.save = killed
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_kill_while_writing_and_resume(trained, tmp_path):
    process = spawn("-c", KILLED_WHILE_WRITING, SCRIPT, "--train", *TINY, "--cond", "--out", tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, err
    assert load(only(tmp_path))["step"] == 3
    resumed_equals(trained, tmp_path, 3)
    before = only(tmp_path).read_bytes()                       # a finished run has nothing left to do
    assert start("--train", "--resume", "--out", tmp_path).code == 0
    assert only(tmp_path).read_bytes() == before


def test_ctrl_c_in_an_empty_folder(tmp_path):
    """The script and common.py alone, a folder of colour images, augmentation and dropout; then Ctrl-C."""
    for file in (SCRIPT, ROOT / "common.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "images" / "cats").mkdir(parents=True)
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 33, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "cats" / f"{i}.png")
    source = (tmp_path / "lowdiff.py").read_text()
    changed = re.sub(r'("(?:augment|dropout)": +)\(0.0,', r"\1(0.2,", source)
    assert changed != source
    (tmp_path / "lowdiff.py").write_text(changed)
    process = spawn("lowdiff.py", "--train", "--data", "images", *TINY, "--stages", 16, 32, "--iters", 5000,
                    cwd=tmp_path)
    deadline = time.time() + 300
    while not list(tmp_path.glob("runs/lowdiff/*/log.jsonl")) and process.poll() is None:
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None) and "Traceback" not in err, err
    lines = [line for line in err.splitlines() if not line.startswith("train ")]
    assert len(lines) == 1 and lines[0].startswith("lowdiff: interrupted"), err
    saved = load(only(tmp_path, "runs/lowdiff/*/checkpoint.pt"))
    assert saved["channels"] == 3 and saved["net"]["map_augment.weight"].any()


# Rank 1's clock is 5 s fast (the folder of a run is named after the time); each rank keeps its network.
TWO_PROCESSES = """
import copy, os, runpy, sys, time, torch
out, script = sys.argv[1:3]
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(script))
import common
rank, kept, deepcopy, strftime, save = int(os.environ["RANK"]), [], copy.deepcopy, time.strftime, torch.save
load_images, loads = common.load_images, []
def fewer(*args):                          # evaluate's reference: 1,000 images, as few_images does
    loads.append(args)
    parts = load_images(*args)
    return parts if len(loads) == 1 else tuple(p[:1000] if torch.is_tensor(p) else p for p in parts)
common.load_images = fewer
def keep(net):
    kept.append(net)
    return deepcopy(net)
copy.deepcopy = keep
if rank == 1:
    time.strftime = lambda f, t=None: strftime(f, t or time.localtime(time.time() + 5))
runpy.run_path(script, run_name="__main__")
save(kept[0].state_dict(), f"{out}/rank{rank}.pt")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes(trained, tmp_path, few_images):
    driver, out = tmp_path / "driver.py", tmp_path / "out"
    driver.write_text(TWO_PROCESSES)
    process = spawn("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", driver, tmp_path, SCRIPT,
                    "--train", "--cond", "--sample", "--evaluate", "--n", 131, *TINY, "--save-every", 9, *FEW,
                    "--device", "cpu", "--out", out, "--results", tmp_path / "two.jsonl")
    printed, err = process.communicate(timeout=300)
    assert process.returncode == 0, printed + err
    ranks = [load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    two, one = load(only(out)), load(trained.checkpoint)
    assert equal(*ranks) and equal(two["net"], ranks[0])       # same weights on both, one run folder
    for k in one["net"]:                                       # as with one process
        assert torch.allclose(two["net"][k], one["net"][k], atol=3e-4), k
    result = start("--sample", "--evaluate", "--n", 131, *FEW, "--precision", "fp32", "--checkpoint", only(out),
                   "--out", tmp_path, "--results", tmp_path / "one.jsonl")
    assert result.code == 0, result.err
    assert (out / "samples.png").read_bytes() == (tmp_path / "samples.png").read_bytes()
    (a,), (b,) = lines_of(tmp_path / "one.jsonl"), lines_of(tmp_path / "two.jsonl")
    assert (a["processes"], b["processes"]) == (1, 2) and a["fd"] == pytest.approx(b["fd"], rel=1e-4)


def test_ledger(tmp_path, monkeypatch, capsys):
    """Every printed size and count, beside ours, in the file. In this module: its networks are counted already."""
    monkeypatch.setattr(c, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--ledger"])
    c.main()
    rows = json.loads((tmp_path / "results" / "lowdiff" / "ledger.json").read_text())
    assert all(set(row) == {"table", "cell", "paper", "ours", "note"} for row in rows)
    nfe = [row for row in rows if "NFE at" in row["cell"]]
    assert len(nfe) == 25 and all(row["paper"] == row["ours"] for row in nfe)
    sizes = [row for row in rows if "parameters" in row["cell"]]
    assert len(sizes) == 14 and all(row["note"] or abs(row["ours"] - row["paper"]) <= 10_000 for row in sizes)
    assert all(abs(row["ours"] / row["paper"] - 1) < 3e-4 for row in sizes)
    assert [row["ours"] for row in rows if "effective" in row["cell"]] == [61, 22, 22, 22, 23, 55]
    assert capsys.readouterr().out.count("\n") == len(rows)


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("argv, words", [
    ("--stages 8 24 32", ["twice", "8, 24, 32"]), ("--stages 32 16", ["twice"]), ("--stages 16 16", ["twice"]),
    ("--stages 0 0", ["twice"]), ("--stages 16", ["16", "32x32"]), ("--stages 4 8 16 32", ["--stages", "levels"]),
    ("--stages 32 64", ["64", "32x32"]), ("--arch edm --stages 16 32", ["edm", "one stage"]),
    ("--data nonexist", ["nonexist", "fashion10k"]), ("--data emoji", ["emoji", "64x64", "--stages"]),
    ("--batch 0", ["--batch"]), ("--iters 0", ["--iters"]), ("--save-every 0", ["--save-every"]),
    ("--budget 0", ["--budget"]), ("--budget nan", ["--budget"]), ("--lr -1", ["-1"]), ("--resume", ["--resume"]),
    ("--budget 1e9", ["--iters and --budget"]), ("--lr 0", ["--lr 0"])])
def test_bad_training(tmp_path, argv, words):
    """Found out before the first step: nothing is trained, nothing written but arguments."""
    one_line(start("--train", *TINY, *argv.split(), "--out", tmp_path / "out"), *words)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".part", ".jsonl")]


def test_a_budget_below_one_step(tmp_path):
    argv = [v for v in TINY if v not in ("--iters", "9")]
    one_line(start("--train", *argv, "--budget", 1e6, "--out", tmp_path / "out"), "--budget 1e+06", "one step")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, words", [
    ("--evaluate --n 128", ["--n 128", "128"]), ("--evaluate --data nonexist", ["nonexist"]),
    ("--evaluate --inception /nope/inception.pth", ["/nope/inception.pth"]),
    ("--sample --truncate 36 13", ["36 evaluations", "35", "8x8"]), ("--sample --truncate 18 24", ["24", "23"]),
    ("--sample --truncate 0 13", ["whole numbers"]), ("--sample --truncate 18", ["--truncate", "2 numbers"]),
    ("--sample --steps 18 9", ["--steps", "3 numbers"]), ("--sample --steps 0 3 3 --truncate 1 1", ["whole numbers"]),
    ("--sample --sigma-min 0 0.01 0.01", ["sigma_min"]), ("--sample --sigma-max 80 50", ["--sigma-max", "3"]),
    ("--sample --sigma-max 80 50 0.001", ["sigma_max"]),
    ("--sample --classes 10", ["--classes 10", "0 .. 9"]), ("--sample --classes 3 -1", ["-1", "0 .. 9"]),
    ("--sample --n 0", ["--n"]), ("--evaluate --seeds 0", ["--seeds"]), ("--sample --plan /nope.json", ["/nope.json"]),
    ("--sample --plan /nope.json --steps 3 2 2", ["--plan has --steps"]),
    ("--sample --resume", ["--resume goes with"])])
def test_bad_sampling(trained, tmp_path, few_images, argv, words):
    one_line(start(*argv.split(), "--checkpoint", trained.checkpoint, "--out", tmp_path, "--results",
                   tmp_path / "results.jsonl"), *words)
    assert not list(tmp_path.iterdir()) and not list(trained.out.rglob("*.part"))


def test_a_plan_of_other_stages(trained, edm, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(GOOD))
    for checkpoint, stages in ((trained.checkpoint, "[8, 16, 32]"), (edm, "[32]")):
        one_line(start("--sample", "--plan", tmp_path / "plan.json", "--checkpoint", checkpoint, "--out", tmp_path),
                 "[16, 32]", stages)
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    one_line(start("--sample", "--plan", tmp_path / "plan.json", "--checkpoint", edm, "--out", tmp_path))
    assert os.listdir(tmp_path) == ["plan.json"]


def test_what_a_checkpoint_has_not(edm, tmp_path):
    options = ("--checkpoint", edm, "--out", tmp_path, "--results", tmp_path / "results.jsonl")
    one_line(start("--sample", "--classes", 3, *options), "--classes 3", "no classes")
    one_line(start("--search", "--sweep", "steps", *options), "one stage")
    one_line(start("--train", *TINY, *options), "--resume")
    assert not list(tmp_path.iterdir())


def test_bad_checkpoints(trained, tmp_path):
    content, path = trained.checkpoint.read_bytes(), tmp_path / "checkpoint.pt"
    for damaged in (content[:len(content) // 2], b"", b"text\n" * 50):
        path.write_bytes(damaged)
        for action in (["--sample"], ["--train", "--resume"]):
            one_line(start(*action, "--checkpoint", path, "--out", tmp_path / "out"), path)
    for value, word in ((dict(load(trained.checkpoint), script="c2f_trd"), "c2f_trd"), ([1, 2], "lowdiff")):
        torch.save(value, path)
        one_line(start("--sample", "--checkpoint", path, "--out", tmp_path / "out"), path, word)
    one_line(start("--sample", "--checkpoint", tmp_path / "none.pt", "--out", tmp_path / "out"), "none.pt", "--train")
    shutil.copy(trained.run / "weights.pt", path)
    one_line(start("--train", "--resume", "--checkpoint", path, "--out", tmp_path / "out"), path, "weights only")
    one_line(start("--train", "--resume", "--checkpoint", path, path, "--out", tmp_path / "out"), "one checkpoint")
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_bad_input_in_a_process(tmp_path):
    process = spawn(SCRIPT, "--train", "--stages", 8, 24, "--out", tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.startswith("lowdiff: error: --stages") and err.count("\n") == 1


def test_out_that_cannot_be_written(trained, tmp_path):
    (tmp_path / "file").write_text("a file, no folder")
    for argv in (["--sample", "--n", 1, *FEW, "--checkpoint", trained.checkpoint], ["--train", *TINY]):
        one_line(start(*argv, "--out", tmp_path / "file"), "cannot write", tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_data_of_other_channels_than_the_checkpoint(trained, tmp_path, monkeypatch):
    """The small extractor would compare any images: the mistake must be told, not measured."""
    monkeypatch.setattr(common, "load_extractor", lambda *args: (common.Extractor(3, ["a"]).eval(), "small"))
    for x in (torch.zeros(140, 3, 32, 32, dtype=torch.uint8), torch.zeros(140, 1, 64, 64, dtype=torch.uint8)):
        monkeypatch.setattr(common, "load_images", lambda *args, x=x: (x, torch.zeros(140).long(), ["a"]))
        one_line(start("--evaluate", "--data", "emoji", "--n", 130, *FEW, "--checkpoint", trained.checkpoint, "--out",
                       tmp_path, "--results", tmp_path / "results.jsonl"), "emoji")


@pytest.mark.parametrize("argv, words", [
    ("", "nothing to do"), ("--sample --preset huge", "huge"), ("--sample --steps ten", "ten"),
    ("--sample --nope", "--nope"), ("--train --arch ddpm", "ddpm"), ("--train --up cubic", "cubic")])
def test_bad_options(argv, words):
    result = start(*argv.split())
    assert result.code == 2 and words in result.err.splitlines()[-1] and "Traceback" not in result.err


def test_help():
    result = start("--help")
    assert result.code == 0 and result.err == ""
    for option in ("--data --preset --iters --batch --lr --seed --n --steps --out --checkpoint --resume --device "
                   "--precision --train --search --sample --evaluate --ledger --budget --arch --stages").split():
        assert f"{option} " in result.out or f"{option}\n" in result.out


def test_not_a_number(tmp_path, monkeypatch):
    """A learning rate that explodes saves nothing; a NaN later keeps the last good checkpoint."""
    line = one_line(start("--train", *TINY, "--lr", 1e30, "--out", tmp_path / "a"), "not finite", "step 3", "--lr")
    assert not list(tmp_path.rglob("*.pt*")) and "checkpoint.pt" not in line
    to_float, calls = common.to_float, []

    def broken(x):
        calls.append(1)
        return to_float(x) * (float("nan") if len(calls) > 4 else 1)
    monkeypatch.setattr(common, "to_float", broken)
    result = start("--train", *TINY, "--out", tmp_path / "b")
    checkpoint = only(tmp_path / "b")
    one_line(result, "not finite", checkpoint)
    saved = load(checkpoint)
    assert saved["step"] == 3 and all(v.isfinite().all() for part in ("net", "ema") for v in saved[part].values())
