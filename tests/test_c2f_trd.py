"""c2f_trd.py against independent oracles: the paper's numbers, closed forms, diffusers, brute force.

Tests that compare with diffusers are skipped where it is not installed (`pip install diffusers==0.42.1`).
"""
import argparse
import copy
import json
import math
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import c2f_trd as c
from common import count_macs, linear_alpha_bar

SHIPPED = c.HERE / "weights" / "c2f_trd" / "weights.pt"
ABAR = linear_alpha_bar(1000)
FINE = linear_alpha_bar(100_000, 1e-6, 2e-4)                # the same schedule in steps of a hundredth


def preset(name, **changes):
    return dict({k: v[c.PRESET_NAMES.index(name)] for k, v in c.PRESETS.items()},
                preset=name, strategy="label", **changes)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def awake_net(config, channels=1, strategy=None, seed=0):
    """A net of random weights, all of them: no zero hides a path."""
    torch.manual_seed(seed)
    return c.build_net(config, channels, strategy).eval()


# ---------------------------------------------------------------------------------------------
# Oracles
# ---------------------------------------------------------------------------------------------
def mixture(res, seed, modes=4, std=0.3, table=ABAR):
    """eps_hat of the exact denoiser of a mixture of `modes` Gaussians N(mu, std^2 I) at res x res."""
    mu = randn(modes, 1, res, res, seed=seed)

    def eps_model(xt, t):
        a = table[t].view(-1, 1, 1, 1, 1)
        gap = xt[:, None] - a.sqrt() * mu                                          # (B, modes, 1, r, r)
        v = a * std ** 2 + 1 - a
        weight = (-gap.square().sum((2, 3, 4), keepdim=True) / (2 * v)).softmax(1)
        x0_hat = (weight * (mu + a.sqrt() * std ** 2 / v * gap)).sum(1)
        return (xt - a[:, 0].sqrt() * x0_hat) / (1 - a[:, 0]).sqrt()
    return eps_model


def gaussian(std, table):
    """eps_hat for data N(0, std^2), pixel by pixel: linear in xt."""
    def eps_model(xt, t):
        a = table[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * xt / (a * std ** 2 + 1 - a)
    return eps_model


def fake_net(xt, t):
    """Nonlinear in xt, smooth in t; any shape."""
    s = (t.to(xt.dtype) / 1000).view(-1, 1, 1, 1)
    return torch.tanh(0.8 * xt + 0.3 * torch.sin(3 * xt.roll(1, -1)) * (1 - s)) + 0.1 * torch.cos(5 * s)


def plain_sample(eps_model, x, taus, order, table=ABAR, second=1):
    """DDIM and DPM-Solver++ from the formulas of the papers, in Python floats and one loop. second:
    factor of 3M's last term, see test_3M_is_not_of_third_order."""
    alpha = [math.sqrt(table[t]) for t in taus]
    sigma = [math.sqrt(1 - table[t]) for t in taus]
    lam = [math.log(p / q) for p, q in zip(alpha, sigma)]
    D, K = [], len(taus)
    for k in range(K):
        eps_hat = eps_model(x, torch.full((len(x),), taus[k]))
        D.append((x - sigma[k] * eps_hat) / alpha[k])
        if k == K - 1:
            return D[k]
        h, p = lam[k + 1] - lam[k], min(order, k + 1)
        p = min(p, 2) if k == K - 2 and K < 15 else p
        shift = math.exp(-h) - 1
        mean = D[k]
        if p == 2:
            r = (lam[k] - lam[k - 1]) / h
            mean = D[k] + (D[k] - D[k - 1]) / (2 * r)
        x_next = sigma[k + 1] / sigma[k] * x - alpha[k + 1] * shift * mean
        if p == 3:
            r0, r1 = (lam[k] - lam[k - 1]) / h, (lam[k - 1] - lam[k - 2]) / h
            first, older = (D[k] - D[k - 1]) / r0, (D[k - 1] - D[k - 2]) / r1
            D1 = first + r0 / (r0 + r1) * (first - older)
            D2 = second * (older - first) / (r0 + r1)
            x_next = x_next + alpha[k + 1] * ((shift / h + 1) * D1 + ((shift + h) / h ** 2 - 0.5) * D2)
        x = x_next


def plain_c2f(stages, sequences, order, x0=None):
    """Stages in turn; up-sampling by 2 as two products with the bilinear matrix."""
    for (eps_model, noise), taus in zip(stages, sequences):
        x = noise
        if x0 is not None:
            up = bilinear_matrix(x0.shape[-1], noise.shape[-1])
            a = float(ABAR[taus[0]])
            x = math.sqrt(a) * (up @ x0 @ up.T) + math.sqrt(1 - a) * noise
        x0 = plain_sample(eps_model, x, taus, order)
    return x0


def bilinear_matrix(n, m):
    """(m, n): output i looks at input (i + 1/2) n / m - 1/2, clamped to the border."""
    out = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        at = max((i + 0.5) * n / m - 0.5, 0)
        low = int(at)
        out[i, low] += 1 - (at - low)
        out[i, min(low + 1, n - 1)] += at - low
    return out


def plain_candidates(taus, i, n, ends="paper"):
    """Eq. 3 in exact fractions."""
    virtual = ends == "bounded" or len(taus) == 1
    above = taus[i - 1] if i > 0 else 1000 if virtual else taus[i]
    below = taus[i + 1] if i + 1 < len(taus) else -1 if virtual else taus[i]
    found = []
    for j in range(1, n + 1):
        step = math.floor(below + Fraction(j * (above - below), n + 1) + Fraction(1, 2))
        if step not in (above, below, taus[i], *found):
            found.append(step)
    return found


def plain_search(stages, sequences, x_ref, order, n=5, sweeps=10, ends="paper", x0=None):
    """TRD without any cache or batch: every candidate is a full run. Sequences and loss per sweep."""
    def loss_of(sequences):
        return float((plain_c2f(stages, sequences, order, x0) - x_ref).square().mean())

    sequences = copy.deepcopy(sequences)
    best = loss_of(sequences)
    history, losses = [copy.deepcopy(sequences)], [best]
    for _ in range(sweeps):
        before = copy.deepcopy(sequences)
        for s in reversed(range(len(sequences))):
            for i in reversed(range(len(sequences[s]))):
                tries = []
                for t in plain_candidates(sequences[s], i, n, ends):
                    trial = copy.deepcopy(sequences)
                    trial[s][i] = t
                    tries.append((loss_of(trial), t))
                if tries and min(tries)[0] < best * (1 - 1e-6):
                    best, sequences[s][i] = min(tries)
        history.append(copy.deepcopy(sequences))
        losses.append(best)
        if sequences == before:
            break
    return history, losses


# ---------------------------------------------------------------------------------------------
# Network: parameters and MACs
# ---------------------------------------------------------------------------------------------
def parameters(config, strategy=None):
    with torch.device("meta"):
        return sum(p.numel() for p in c.build_net(config, 3, strategy).parameters())


def macs(config, res, strategy=None, high=True, channels=3):
    return c.network_macs(json.dumps(config), channels, strategy, high, res)


@pytest.mark.parametrize("name, base", [("paper", 35_746_307), ("paper-lsun", 113_673_219)])
def test_parameters_of_the_paper(name, base):
    config = preset(name)
    assert parameters(config) == base
    assert parameters(config, "label") == base + 2 * 512
    assert parameters(config, "xy") == base + 2_304
    assert parameters(config, "2T") == parameters(config, "2dms") == base


@pytest.mark.parametrize("name, res, expected", [
    ("paper", 32, 6_221_856_768), ("paper", 16, 1_526_145_024), ("paper", 8, 381_731_328),
    ("paper-lsun", 256, 248_513_757_184), ("paper-lsun", 128, 62_068_817_920),
    ("paper-lsun", 64, 15_517_302_784), ("paper-lsun", 32, 3_883_156_480)])
def test_macs_of_the_paper(name, res, expected):
    config = preset(name)
    assert macs(config, res) == expected
    assert macs(config, res, "xy") == expected + 9 * 2 * 128 * res ** 2      # 2.36 M at 32


@pytest.mark.parametrize("res", [16, 32])
@pytest.mark.parametrize("attention", [[], [1]])
def test_macs_by_hand(res, attention):
    config = dict(preset("tiny"), attention=attention)
    assert (config["ch"], config["mult"], config["blocks"], config["patch"]) == (8, [1, 2], 1, 2)
    n0, n1 = (res // 2) ** 2, (res // 4) ** 2                                 # pixels per level

    def block(c_in, c_out, n):
        return 9 * n * (c_in + c_out) * c_out + 32 * c_out + (n * c_in * c_out if c_in != c_out else 0)

    products = 2 * n1 * n1 * 16                                               # q k^T, and times v
    attend = 4 * n1 * 16 * 16 + products
    level1 = attend if attention else 0
    expected = (8 * 32 + 32 * 32                                              # time
                + 9 * n0 * 12 * 8                                             # 3 channels of 2 x 2 pixels
                + block(8, 8, n0) + 9 * n1 * 8 * 8 + block(8, 16, n1) + level1
                + 2 * block(16, 16, n1) + attend
                + block(16 + 16, 16, n1) + level1 + block(16 + 8, 16, n1) + level1
                + 9 * n0 * 16 * 16 + block(16 + 8, 8, n0) + block(8 + 8, 8, n0)
                + 9 * n0 * 8 * 12)
    for strategy in (None, "label", "2T"):
        assert macs(config, res, strategy, high=False) == expected
    assert macs(dict(config, attention=[1]), res) - macs(dict(config, attention=[]), res) == 3 * attend


@pytest.mark.parametrize("name, res", [("paper", 4), ("paper", 12), ("paper", 33), ("paper-lsun", 16),
                                       ("paper-lsun", 48), ("tiny", 2), ("tiny", 18)])
def test_sizes_that_do_not_divide(name, res):
    with torch.device("meta"):
        net, t = c.build_net(preset(name), 3), torch.zeros(1, dtype=torch.long)
        for shape in ((1, 3, res, res), (1, 3, 32, res), (1, 3, res, 32)):
            with pytest.raises(ValueError, match="multiple"):
                net(torch.zeros(shape), t)


@pytest.mark.parametrize("strategy", c.STRATEGIES)
def test_plan_macs_is_the_whole_sampler(strategy):
    config = dict(preset("tiny"), strategy=strategy)
    kind = None if strategy == "2dms" else strategy
    with torch.device("meta"):
        nets = {"base": (c.build_net(config, 1), None, True), "low": (c.build_net(config, 1, kind), kind, False),
                "high": (c.build_net(config, 1, kind), kind, True)}
        z_high, z_low = torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 16, 16)
    models = {k: lambda xt, t, net=net, kind=kind, high=high: c.predict_eps(net, kind, xt, t, high)
              for k, (net, kind, high) in nets.items()}
    for method, solver, steps in (("base", "ddim", 3), ("c2f", "dpm3", 4)):
        plan = c.make_plan(method, solver, 2, steps, 565)
        stages, sequences = c.stages_of(plan, models, z_high, z_low)
        total, nfe = c.plan_macs(config, 1, plan)
        assert total == count_macs(c.c2f_sample, stages, sequences, ABAR, c.SOLVERS[solver])
        assert nfe == ([0, steps] if method == "base" else [2, steps])


@pytest.mark.parametrize("name, steps, fine, coarse, percent", [
    ("paper", 10, 6_221_856_768, 381_731_328, 10.6),                          # "90 % reduction"
    ("paper-lsun", 20, 248_513_757_184, 3_883_156_480, 20.2)])                # "80 % reduction"
def test_relative_macs_of_the_paper(name, steps, fine, coarse, percent):
    config = preset(name)
    full, _ = c.plan_macs(config, 3, c.make_plan("base", "ddim", 0, 100))
    ours, _ = c.plan_macs(config, 3, c.make_plan("c2f", "ddim", 10, steps, 565))
    assert (full, ours) == (100 * fine, steps * fine + 10 * coarse)
    assert 100 * ours / full == pytest.approx(percent, abs=0.05)


def test_network_sees_its_whole_input():
    """Every pixel of xt reaches the middle of eps_hat, and so does t: nothing is left unconnected."""
    net = awake_net(preset("tiny"))
    xt = randn(1, 1, 16, 16, dtype=torch.float32).requires_grad_()
    out = net(xt, torch.tensor([500]))
    assert out.shape == xt.shape
    out[0, 0, 8, 8].backward()
    assert (xt.grad != 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert not torch.equal(out, net(xt, torch.tensor([501])))


def test_network_treats_samples_alone():
    net, xt = awake_net(preset("tiny")), randn(3, 1, 16, 16, dtype=torch.float32)
    t = torch.tensor([3, 999, 400])
    with torch.no_grad():
        together = net(xt, t)
        alone = torch.cat([net(xt[i:i + 1], t[i:i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


@torch.no_grad()
def test_network_is_diffusers_ddpm():
    """The same weights in UNet2DModel (as in google/ddpm-cifar10-32) give the same eps_hat."""
    diffusers = pytest.importorskip("diffusers")
    config = dict(preset("tiny"), mult=[1, 2, 2], blocks=2, attention=[1], patch=1)
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        in_channels=3, out_channels=3, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=2,
        norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")).eval()
    for p in theirs.parameters():                                             # norms are not the identity
        p.add_(0.1 * torch.randn_like(p))
    net = awake_net(config, 3)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in theirs.parameters())

    def layers(block, sampler):                                               # in the order of execution
        attentions = [*getattr(block, "attentions", [])] + 9 * [None]
        pairs = [layer for pair in zip(block.resnets, attentions) for layer in pair if layer]
        return pairs + list(getattr(block, sampler, None) or [])

    down = [layer for block in theirs.down_blocks for layer in layers(block, "downsamplers")]
    up = [layer for block in theirs.up_blocks for layer in layers(block, "upsamplers")]
    mid = [theirs.mid_block.resnets[0], theirs.mid_block.attentions[0], theirs.mid_block.resnets[1]]
    pairs = [(net.emb[0], [theirs.time_embedding.linear_1]), (net.emb[2], [theirs.time_embedding.linear_2]),
             (net.conv_in, [theirs.conv_in]), (net.norm_out, [theirs.conv_norm_out]),
             (net.conv_out, [theirs.conv_out])]
    for a, b in zip([*net.down, *net.mid, *net.up], [*down, *mid, *up], strict=True):
        if isinstance(a, c.Attention):
            pairs += [(a.norm, [b.group_norm]), (a.qkv, [b.to_q, b.to_k, b.to_v]), (a.out, [b.to_out[0]])]
        elif isinstance(a, c.ResBlock):
            pairs += [(a.norm1, [b.norm1]), (a.conv1, [b.conv1]), (a.emb, [b.time_emb_proj]),
                      (a.norm2, [b.norm2]), (a.conv2, [b.conv2])]
            pairs += [(a.skip, [b.conv_shortcut])] if b.conv_shortcut is not None else []
        else:
            pairs.append((a.conv, [b.conv]))
    for a, parts in pairs:
        a.weight.copy_(torch.cat([b.weight for b in parts]).view_as(a.weight))
        a.bias.copy_(torch.cat([b.bias for b in parts]))

    t = torch.tensor([0, 565, 999])
    for res in (8, 16):
        xt = randn(3, 3, res, res, dtype=torch.float32)
        expected = theirs(xt, t).sample
        assert float((net(xt, t) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("dim", [8, 128])
def test_timestep_embedding(dim):
    """DDPM's: sines, then cosines, frequencies 10000^(-k / (half - 1))."""
    half, steps = dim // 2, torch.tensor([0, 1, 77, 999, 1500])
    rows = [[f(t * 10000 ** (-k / (half - 1))) for f in (math.sin, math.cos) for k in range(half)]
            for t in steps.tolist()]
    assert torch.allclose(c.timestep_embedding(steps, dim), torch.tensor(rows), atol=2e-4)


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------
def random_steps(K, seed, to_zero, gap=1):
    """K random steps, at least `gap` apart."""
    rng = np.random.default_rng(seed)
    steps = sorted((gap * rng.choice(np.arange(1, 1000 // gap), K, False) + rng.integers(gap)).tolist())[::-1]
    return steps[:-1] + [0] if to_zero else steps


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("K", [1, 2, 3, 5, 14, 15, 20])
def test_samplers_against_their_formulas(K, order):
    for seed in range(4):
        taus, xt = random_steps(K, 10 * K + seed, seed % 2), randn(2, 1, 4, 4, seed=seed)
        ours = c.dpm_solver_pp_sample(fake_net, xt, taus, ABAR, order)
        assert torch.allclose(ours, plain_sample(fake_net, xt, taus, order), rtol=1e-9, atol=1e-9)
    if order == 1:
        assert torch.equal(ours, c.ddim_sample(fake_net, xt, taus, ABAR))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("K", [3, 5, 14, 15, 20])
def test_samplers_against_diffusers(K, order):
    """In float32, as diffusers is; a gap of 1 after a wide one would multiply the rounding of both."""
    diffusers = pytest.importorskip("diffusers")
    for seed in range(4):
        taus = random_steps(K, 10 * K + seed, seed % 2, gap=25)
        xt = x = randn(2, 1, 8, 8, seed=seed, dtype=torch.float32)
        scheduler = diffusers.DPMSolverMultistepScheduler(
            num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
            prediction_type="epsilon", solver_order=order, algorithm_type="dpmsolver++",
            solver_type="midpoint", lower_order_final=True, final_sigmas_type="zero")
        scheduler.set_timesteps(timesteps=taus)
        for t in scheduler.timesteps:
            x = scheduler.step(fake_net(x, t.expand(len(x))), t, x).prev_sample
        ours = c.dpm_solver_pp_sample(fake_net, xt, taus, ABAR, order)
        assert float((ours - x).norm() / x.norm()) < 1e-4, taus


STD = torch.tensor([0.2, 0.5, 1.5], dtype=torch.float64)


def convergence(sample, Ks):
    """Largest relative error of sample(eps_model, xT, taus) on data N(0, STD^2) at each number of steps, and
    the slope of its logarithm. The exact path keeps xt / sqrt(variance of xt); the last, clean estimate is
    compared with the one at the end of that path (t = 10 of 1000). Steps are even in log(alpha / sigma)."""
    lam, last, errors = -(FINE[:-1].logit() / 2).numpy(), 1000, []
    root = (FINE[:, None] * STD ** 2 + 1 - FINE[:, None]).sqrt()
    for K in Ks:
        taus = np.interp(np.linspace(lam[-1], lam[last], K), lam, np.arange(len(lam))).round().astype(int)
        x0 = sample(gaussian(STD, FINE), root[-2].view(1, 1, 1, 3), taus.tolist())
        exact = FINE[last].sqrt() * STD ** 2 / root[last]
        errors.append(float((x0 / exact - 1).abs().max()))
    return errors, -np.polyfit(np.log(Ks), np.log(errors), 1)[0]


@pytest.mark.parametrize("order", [1, 2])
def test_order_of_convergence(order):
    errors, slope = convergence(lambda model, xT, taus: c.dpm_solver_pp_sample(model, xT, taus, FINE, order),
                                (20, 40, 80, 160))
    assert slope == pytest.approx(order, abs=0.08), errors


def test_3M_is_not_of_third_order():
    """The published 3M (the authors' code, diffusers, this file) halves the second derivative of x0_hat: the
    term (e^-h - 1 + h) / h^2 - 1/2 multiplies D2 = h^2 x0_hat'' / 2. So it ends at second order, with a
    smaller error than 2M; only with twice that term is the order three. This file keeps to diffusers."""
    Ks = (80, 160, 320)
    two, _ = convergence(lambda model, xT, taus: c.dpm_solver_pp_sample(model, xT, taus, FINE, 2), Ks)
    ours, slope = convergence(lambda model, xT, taus: c.dpm_solver_pp_sample(model, xT, taus, FINE, 3), Ks)
    assert slope == pytest.approx(2, abs=0.15) and all(2 * a < b for a, b in zip(ours, two))
    same, _ = convergence(lambda model, xT, taus: plain_sample(model, xT, taus, 3, FINE), Ks)
    assert ours == pytest.approx(same, rel=1e-6)
    errors, slope = convergence(lambda model, xT, taus: plain_sample(model, xT, taus, 3, FINE, second=2), Ks)
    assert slope == pytest.approx(3, abs=0.3) and errors[-1] < ours[-1] / 10


def test_predict_x0_undoes_noise():
    x0, eps, t = randn(3, 1, 4, 4), randn(3, 1, 4, 4, seed=1), torch.tensor([0, 400, 999])
    a = ABAR[t].view(-1, 1, 1, 1)
    assert torch.allclose(c.predict_x0(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, eps, ABAR), x0, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_each_sample_can_have_its_own_steps(order):
    K, xt = 16, randn(3, 1, 8, 8)
    runs = [random_steps(K, seed, seed == 1) for seed in range(3)]
    for columns in ([torch.tensor(column) for column in zip(*runs)],
                    [*runs[0][:4], torch.tensor([runs[0][4], runs[0][3] - 1, runs[0][5] + 1]), *runs[0][5:]]):
        together = c.dpm_solver_pp_sample(mixture(8, 1), xt, columns, ABAR, order)
        for i in range(3):
            own = [int(t[i]) if isinstance(t, torch.Tensor) else t for t in columns]
            alone = c.dpm_solver_pp_sample(mixture(8, 1), xt[i:i + 1], own, ABAR, order)
            assert torch.allclose(together[i:i + 1], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("K", [5, 16])
def test_a_run_can_be_left_and_continued(K, order):
    model, taus, xt = mixture(8, 1), random_steps(K, 3, True), randn(2, 1, 8, 8)
    whole = []
    x0 = c.dpm_solver_pp_sample(model, xt, taus, ABAR, order, trace=lambda *state: whole.append(state))
    assert [int(history[0][0][0]) for _, history in whole] == taus
    assert torch.equal(whole[0][0], xt)
    for stop in range(K + 1):
        part = []
        x = c.dpm_solver_pp_sample(model, xt, taus, ABAR, order, stop=stop, trace=lambda *s: part.append(s))
        assert len(part) == stop and (stop == K or torch.equal(x, whole[stop][0]))
        history = part[-1][1] if part else ()
        assert torch.equal(x0, c.dpm_solver_pp_sample(model, x, taus, ABAR, order, start=stop, history=history))


@pytest.mark.parametrize("spacing", c.SPACINGS)
def test_the_off_switch_is_plain_ddim(spacing):
    net, z = awake_net(preset("tiny")), randn(2, 1, 16, 16, dtype=torch.float32)
    models = {"base": torch.no_grad()(lambda xt, t: c.predict_eps(net, None, xt, t, True))}
    plan = c.make_plan("base", "ddim", 10, 7, 565, spacing)
    assert plan["low_taus"] == []
    stages, sequences = c.stages_of(plan, models, z, None)
    ours = c.c2f_sample(stages, sequences, ABAR, c.SOLVERS[plan["solver"]])
    assert torch.equal(ours, c.ddim_sample(models["base"], z, plan["high_taus"], ABAR))

    xt, taus = z, c.uniform_steps(999, 7, spacing)                            # DDIM, Eq. 12, sigma = 0
    for t, t_next in zip(taus, [*taus[1:], None]):
        with torch.no_grad():
            eps_hat = net(xt, torch.full((2,), t))
        a, a_next = float(ABAR[t]), 1.0 if t_next is None else float(ABAR[t_next])
        x0_hat = (xt - math.sqrt(1 - a) * eps_hat) / math.sqrt(a)
        xt = math.sqrt(a_next) * x0_hat + math.sqrt(1 - a_next) * eps_hat
    assert float((ours - xt).norm() / xt.norm()) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_c2f_sample_by_hand(order):
    stages = [(mixture(4, 1), randn(3, 1, 4, 4)), (mixture(8, 2), randn(3, 1, 8, 8, seed=1))]
    sequences = [[999, 700, 300, 50], [565, 300, 100, 7]]
    x0 = c.c2f_sample(stages, sequences, ABAR, order)
    assert torch.allclose(x0, plain_c2f(stages, sequences, order), rtol=1e-9, atol=1e-9)
    low = c.c2f_sample(stages[:1], sequences[:1], ABAR, order)                # one stage after the other
    assert torch.equal(x0, c.c2f_sample(stages[1:], sequences[1:], ABAR, order, x0=low))


def test_renoise_places_pixels_by_hand():
    x0, eps = randn(2, 3, 2, 2), randn(2, 3, 8, 8, seed=1)
    up = bilinear_matrix(2, 8)
    for t in (0, 565, torch.tensor([999, 100])):
        a = ABAR[torch.as_tensor(t).expand(2)].view(2, 1, 1, 1)
        expected = a.sqrt() * (up @ x0 @ up.T) + (1 - a).sqrt() * eps
        assert torch.allclose(c.renoise(x0, eps, t, ABAR), expected, atol=1e-12)
    assert torch.equal(c.renoise(x0, eps, torch.tensor([565, 565]), ABAR), c.renoise(x0, eps, 565, ABAR))


def test_renoise_has_the_forward_process_statistics():
    n, t = 20_000, 565
    x0 = torch.full((1, 1, 4, 4), 0.7).expand(n, -1, -1, -1)
    xt = c.renoise(x0, randn(n, 1, 8, 8, dtype=torch.float32), t, ABAR)
    a = float(ABAR[t])
    assert torch.allclose(xt.mean(0), torch.tensor(0.7 * math.sqrt(a)), atol=5 / math.sqrt(n))
    assert torch.allclose(xt.var(0), torch.tensor(1 - a), atol=5 * math.sqrt(2 / n))
    flat = xt.flatten(1).T
    off = torch.corrcoef(flat) - torch.eye(64)
    assert float(off.abs().max()) < 6 / math.sqrt(n)                          # white


# ---------------------------------------------------------------------------------------------
# Uniform steps, candidates
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spacing, first, K, expected", [
    ("inclusive", 999, 5, [999, 749, 500, 250, 0]), ("inclusive", 565, 3, [565, 283, 0]),
    ("inclusive", 999, 1, [999]), ("inclusive", 4, 5, [4, 3, 2, 1, 0]),
    ("exclusive", 999, 5, [999, 799, 599, 400, 200]), ("exclusive", 404, 5, [404, 323, 242, 162, 81]),
    ("exclusive", 999, 1, [999]), ("leading", 999, 5, [800, 600, 400, 200, 0]),
    ("leading", 999, 3, [666, 333, 0]), ("trailing", 999, 5, [999, 799, 599, 399, 199]),
    ("trailing", 999, 3, [999, 666, 332]), ("trailing", 3, 4, [3, 2, 1, 0])])
def test_uniform_steps_by_hand(spacing, first, K, expected):
    assert c.uniform_steps(first, K, spacing) == expected


def test_uniform_steps_are_numpys():
    assert 565 in c.uniform_steps(999, 100)                                   # the paper's t*
    for first in (999, 565, 404):
        for K in (2, 5, 7, 10, 20, 40, 100):
            line = np.linspace(first, 0, K)
            assert c.uniform_steps(first, K) == np.floor(line + 0.5 + 1e-9).astype(int).tolist()
            line = np.linspace(first, 0, K + 1)[:-1]
            assert c.uniform_steps(first, K, "exclusive") == np.floor(line + 0.5 + 1e-9).astype(int).tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_uniform_steps_are_diffusers(spacing):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing)
    for K in (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500, 1000):
        scheduler.set_timesteps(K)
        assert c.uniform_steps(999, K, spacing) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("K", [5, 10, 20])
def test_ddim_is_diffusers_ddim(K, spacing):
    """Where its implied steps are the listed ones (K divides 1000), DDIMScheduler gives the same images."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02,
                                        beta_schedule="linear", clip_sample=False, set_alpha_to_one=True,
                                        timestep_spacing=spacing)
    scheduler.set_timesteps(K)
    xt = x = randn(2, 1, 8, 8, dtype=torch.float32)
    for t in scheduler.timesteps:
        x = scheduler.step(fake_net(x, t.expand(len(x))), t, x, eta=0.0).prev_sample
    ours = c.ddim_sample(fake_net, xt, c.uniform_steps(999, K, spacing), ABAR)
    assert float((ours - x).norm() / x.norm()) < 1e-5


@pytest.mark.parametrize("spacing", c.SPACINGS)
@pytest.mark.parametrize("first, K", [(999, 0), (999, -1), (4, 6), (999, 1001), (0, 2)])
def test_steps_that_do_not_fit(spacing, first, K):
    with pytest.raises(ValueError):
        c.uniform_steps(first, K, spacing)


def test_unknown_spacing():
    with pytest.raises(ValueError, match="spacing"):
        c.uniform_steps(999, 5, "linear")


@pytest.mark.parametrize("taus, i, n, ends, expected", [
    ([999, 500, 0], 1, 5, "paper", [167, 333, 666, 833]),                     # 500 is kept, not tried
    ([999, 400, 0], 1, 5, "paper", [167, 333, 500, 666, 833]),                # 166.5, 499.5, 832.5: up
    ([999, 400, 0], 1, 5, "bounded", [167, 333, 500, 666, 833]),              # an interior step
    ([999, 500, 0], 1, 4, "paper", [200, 400, 599, 799]),
    ([9, 7, 0], 1, 5, "paper", [2, 3, 5, 6, 8]),                              # 1.5, 4.5, 7.5: up
    ([9, 5, 0], 1, 1, "paper", []),                                           # 4.5 is the 5 that it has
    ([100, 40], 0, 5, "paper", [50, 60, 70, 80, 90]),                         # the first can only fall
    ([100, 40], 1, 5, "paper", [50, 60, 70, 80, 90]),                         # the last can only rise
    ([100, 40], 0, 5, "bounded", [200, 360, 520, 680, 840]),
    ([100, 40], 1, 5, "bounded", [16, 33, 50, 66, 83]),
    ([500], 0, 5, "paper", [166, 333, 666, 833]),                             # T = 1: the whole range
    ([500], 0, 5, "bounded", [166, 333, 666, 833]),
    ([10, 9, 8], 1, 5, "paper", []),                                          # no room
    ([10, 9], 0, 5, "paper", []),
    ([10, 9], 1, 5, "paper", []),
    ([10, 9, 7], 1, 5, "paper", [8]),
    ([10, 8, 6, 0], 1, 5, "paper", [7, 9]),                                   # 6.67, 7.33: one 7
    ([5, 0], 1, 5, "bounded", [1, 2, 3, 4]),                                  # never -1
    ([999, 998], 0, 5, "bounded", [])])                                       # never 1000
def test_candidates_by_hand(taus, i, n, ends, expected):
    assert c.candidate_steps(taus, i, n, ends) == expected


def test_candidates_are_eq_3():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        K, n = int(rng.integers(1, 12)), int(rng.integers(1, 9))
        top = int(rng.choice([20, 100, 1000]))
        taus = sorted(rng.choice(top, K, replace=False).tolist(), reverse=True)
        for i in range(K):
            for ends in ("paper", "bounded"):
                found = c.candidate_steps(taus, i, n, ends)
                assert sorted(found) == sorted(plain_candidates(taus, i, n, ends))
                for t in found:                                               # always a valid sequence
                    new = [*taus[:i], t, *taus[i + 1:]]
                    assert 0 <= min(new) and max(new) < 1000 and new == sorted(set(new), reverse=True)


# ---------------------------------------------------------------------------------------------
# TRD
# ---------------------------------------------------------------------------------------------
def one_stage(K, B=4, start=None):
    stages = [(mixture(4, 1), randn(B, 1, 4, 4, seed=7))]
    x_ref = c.c2f_sample(stages, [c.uniform_steps(999, 100)], ABAR)
    return stages, [start or c.uniform_steps(999, K)], x_ref


def two_stages(low_K, high_K, B=3):
    stages = [(mixture(4, 1), randn(B, 1, 4, 4, seed=7)), (mixture(8, 2), randn(B, 1, 8, 8, seed=8))]
    grid = c.uniform_steps(999, 100)
    x_ref = c.c2f_sample(stages, [grid, [t for t in grid if t <= 565]], ABAR)
    return stages, [c.uniform_steps(999, low_K), c.uniform_steps(565, high_K)], x_ref


def assert_same_search(case, order, **options):
    stages, sequences, x_ref = case
    found, report = c.trd_search(stages, sequences, x_ref, ABAR, order, **options)
    history, losses = plain_search(stages, sequences, x_ref, order, **options)
    assert report["sequences"] == history
    assert found == history[-1]
    assert report["loss"] == pytest.approx(losses, rel=1e-5)
    assert all(b <= a for a, b in zip(report["loss"], report["loss"][1:]))
    assert losses[-1] < losses[0]                                             # there was something to find
    return report


@pytest.mark.parametrize("ends", ["paper", "bounded"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_search_is_brute_force(K, order, ends):
    assert_same_search(one_stage(K), order, ends=ends)


@pytest.mark.parametrize("order", [1, 2])
def test_search_is_brute_force_10_steps(order):
    assert_same_search(one_stage(10, B=2), order, sweeps=3)


def test_search_is_brute_force_16_steps():
    """From 15 steps on the last but one has the full order."""
    assert_same_search(one_stage(16, B=2), 3, sweeps=1)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_search_is_brute_force_other_n(n):
    assert_same_search(one_stage(4, start=[950, 500, 320, 40]), 2, n=n)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("ends", ["paper", "bounded"])
def test_joint_search_is_brute_force(order, ends):
    report = assert_same_search(two_stages(4, 5), order, ends=ends)
    first, last = report["sequences"][0], report["sequences"][-1]
    assert first[0] != last[0] and first[1] != last[1]                        # both stages moved


@pytest.mark.parametrize("order", [1, 2])
def test_second_phase_is_brute_force(order):
    """--two-phase: the high-resolution stage alone, from a given coarse image."""
    stages, sequences, x_ref = two_stages(4, 5)
    x0 = c.c2f_sample(stages[:1], sequences[:1], ABAR, order)
    assert_same_search((stages[1:], sequences[1:], x_ref), order, x0=x0)


def test_search_is_the_same_in_float32():
    """Rounding depends on the batch; the search must not (only a gain of more than 1e-6 counts)."""
    def single(model):
        return lambda xt, t: model(xt.double(), t).float()

    stages, sequences, x_ref = two_stages(4, 5)
    small = [(single(model), z.float()) for model, z in stages]
    exact, report = c.trd_search(stages, sequences, x_ref, ABAR, 2)
    found, report32 = c.trd_search(small, sequences, x_ref.float(), ABAR, 2)
    assert found == exact
    assert report32["loss"] == pytest.approx(report["loss"], rel=1e-4)


def test_search_repeats_itself_and_leaves_its_input_alone():
    stages, sequences, x_ref = two_stages(4, 5)
    before, z = copy.deepcopy(sequences), [z.clone() for _, z in stages]
    one, two = (c.trd_search(stages, sequences, x_ref, ABAR, 2) for _ in range(2))
    assert one[0] == two[0]
    assert {**one[1], "seconds": 0} == {**two[1], "seconds": 0}
    assert sequences == before and all(torch.equal(a, b) for a, (_, b) in zip(z, stages))


def test_reported_loss_is_that_of_the_sequences():
    stages, sequences, x_ref = two_stages(4, 5)
    found, report = c.trd_search(stages, sequences, x_ref, ABAR, 2)
    for taus, loss in zip(report["sequences"], report["loss"]):
        x = c.c2f_sample(stages, taus, ABAR, 2)
        assert float((x - x_ref).square().mean()) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("planted, start", [
    ([900, 600, 200], [900, 600, 120]),                                       # 120 + 1 / 6 of 480
    ([900, 600, 300], [900, 600, 0]),                                         # 0 + 3 / 6 of 600
    ([666], [10])])                                                           # -1 + 4 / 6 of 1001
@pytest.mark.parametrize("order", [1, 2])
def test_search_recovers_a_planted_optimum(planted, start, order):
    stages, _, _ = one_stage(3)
    x_ref = c.c2f_sample(stages, [planted], ABAR, order)
    found, report = c.trd_search(stages, [start], x_ref, ABAR, order)
    assert found == [planted]
    assert report["loss"][0] > 1e-4 and report["loss"][-1] < 1e-20


def test_search_recovers_a_planted_pair_of_stages():
    stages, _, _ = two_stages(3, 3)
    planted = [[999, 600, 0], [600, 300, 100]]
    x_ref = c.c2f_sample(stages, planted, ABAR, 2)
    found, report = c.trd_search(stages, [[999, 600, 0], [600, 300, 60]], x_ref, ABAR, 2)
    assert found == planted and report["loss"][-1] < 1e-20
    assert report["sequences"][1] == planted                                  # in the first sweep


def test_search_nears_a_planted_optimum():
    """Two steps of three are wrong at the start; every step is a candidate."""
    stages, _, _ = one_stage(3)
    x_ref = c.c2f_sample(stages, [[900, 500, 100]], ABAR)
    (found,), report = c.trd_search(stages, [[999, 500, 0]], x_ref, ABAR, n=998)
    assert report["loss"][-1] < report["loss"][0] / 1000
    assert abs(found[1] - 500) < 10 and abs(found[2] - 100) < 10


def test_no_sweep_when_none_is_allowed():
    stages, sequences, x_ref = one_stage(4)
    found, report = c.trd_search(stages, sequences, x_ref, ABAR, 1, sweeps=0)
    assert found == sequences and len(report["loss"]) == 1 and report["evaluations"] == [4]


def counting(model, log):
    def eps_model(xt, t):
        log.append(len(xt))
        return model(xt, t)
    return eps_model


@pytest.mark.parametrize("K, ratio", [(5, 0.632), (7, 0.596), (10, 0.568), (20, 0.534), (40, 0.517)])
def test_cost_of_a_sweep(K, ratio):
    """The start is the reference, so that nothing moves; its gaps alternate, so that no step of it is
    among its own candidates: n K (K + 1) / 2 + (K - 1) evaluations, K more for the starting loss."""
    gap, B, n, log = 900 // K, 2, 5, []
    taus = [980 - gap * k - (gap // 5) * (k % 2) for k in range(K)]
    assert all(len(plain_candidates(taus, i, n)) == n for i in range(K))
    stages = [(counting(fake_net, log), randn(B, 1, 2, 2))]
    x_ref = c.c2f_sample(stages, [taus], ABAR)
    log.clear()
    found, report = c.trd_search(stages, [taus], x_ref, ABAR, n=n)
    assert found == [taus] and len(report["loss"]) == 2
    sweep, calls = n * K * (K + 1) // 2 + K - 1, K * (K + 1) // 2 + K - 1
    assert sum(log) == B * (K + sweep) and len(log) == K + calls              # what was really run
    assert report["evaluations"] == [K + sweep] and report["calls"] == K + calls
    assert sweep / (n * K ** 2) == pytest.approx(ratio, abs=6e-4)             # naive: n K^2


def test_cost_with_dropped_candidates():
    """Uniform steps are their own middle candidate: those evaluations are saved."""
    stages, sequences, _ = two_stages(6, 5)
    B, (low, high), logs = 3, sequences, ([], [])
    stages = [(counting(model, log), z) for (model, z), log in zip(stages, logs)]
    x_ref = c.c2f_sample(stages, sequences, ABAR)
    for log in logs:
        log.clear()
    _, report = c.trd_search(stages, sequences, x_ref, ABAR)
    m_low = [len(plain_candidates(low, i, 5)) for i in range(6)]
    m_high = [len(plain_candidates(high, i, 5)) for i in range(5)]
    assert min(m_low) < 5 and min(m_high) < 5
    low_evaluations = 2 * 6 + sum(m * (6 - i) for i, m in enumerate(m_low))
    high_evaluations = 2 * 5 - 1 + sum(m * (5 - i) for i, m in enumerate(m_high)) + 5 * sum(m_low)
    assert report["evaluations"] == [low_evaluations, high_evaluations] == [sum(log) // B for log in logs]
    calls = 2 * 6 + 6 * 7 // 2 + 2 * 5 - 1 + 5 * 6 // 2 + 5 * 6
    assert report["calls"] == calls == len(logs[0]) + len(logs[1])


def test_search_on_a_diffusers_network():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
                                 block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
                                 down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                 up_block_types=("AttnUpBlock2D", "UpBlock2D")).double().eval()

    @torch.no_grad()
    def eps_model(xt, t):
        return unet(xt, t).sample

    stages = [(eps_model, randn(2, 1, 8, 8))]
    x_ref = c.c2f_sample(stages, [c.uniform_steps(999, 20)], ABAR)
    assert_same_search((stages, [c.uniform_steps(999, 3)], x_ref), 2, sweeps=2)


# ---------------------------------------------------------------------------------------------
# Transition step
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, shape", [(40, (1, 3, 4)), (300, (1, 3, 4)), (12, (3, 4, 4)), (48, (3, 4, 4))])
def test_cut_index_is_numpys(n, shape):
    """n < D and n > D, and n = D; shares that hit the edges."""
    D = math.prod(shape)
    scale = 0.8 ** torch.arange(D)
    x = (randn(n, D, seed=n) * scale @ randn(D, D, seed=1) + 5).view(n, *shape)
    values = np.linalg.svd((x.flatten(1) - x.flatten(1).mean(0)).numpy(), compute_uv=False) ** 2
    held = np.cumsum(values) / values.sum()
    for share in (0.1, 0.5, 0.9, 0.99, 0.999):
        expected = next(k for k, h in enumerate(held, 1) if h >= share)
        assert c.cut_index(x, share) == expected
        assert c.cut_index(x.float(), share) == expected


def test_cut_index_by_hand():
    x = torch.zeros(8, 1, 2, 2)
    for i, size in enumerate((6.0, 3.0, 1.0, 0.0)):                           # variances 36 : 9 : 1 : 0
        x.view(8, 4)[2 * i, i], x.view(8, 4)[2 * i + 1, i] = size, -size
    x += 100                                                                  # the mean does not count
    assert [c.cut_index(x, share) for share in (0.5, 0.78, 0.79, 0.97, 0.98, 1 - 1e-9)] == [1, 1, 2, 2, 3, 3]


SPECTRUM = 1.5 * torch.arange(1, 65, dtype=torch.float64) ** -0.8             # standard deviations, 8x8


def noisy(model, delta):
    g = torch.Generator().manual_seed(0)
    return lambda xt, t: model(xt, t) + delta * torch.randn(xt.shape, generator=g, dtype=xt.dtype)


def test_transition_ranks_in_closed_form():
    """Gaussian data: x0_hat at t has variances abar s^4 / (abar s^2 + 1 - abar), for exact denoising."""
    model, z = gaussian(SPECTRUM.view(8, 8), ABAR), randn(2048, 1, 8, 8)
    t_star, ranks = c.transition_step(model, z, c.uniform_steps(999, 100), ABAR)
    assert [t for t, _ in ranks] == c.uniform_steps(999, 100)
    for t, rank in ranks:
        values = ABAR[t] * SPECTRUM ** 4 / (ABAR[t] * SPECTRUM ** 2 + 1 - ABAR[t])
        held = values.sort(descending=True).values.cumsum(0) / values.sum()
        assert held[rank - 1] > 0.985 and held[rank - 2] < 0.994, t           # 0.99, but for sampling
    assert t_star == 999                                                      # no dip without an error


def empirical(x):
    """eps_hat of the exact denoiser of a finite set of images."""
    def eps_model(xt, t):
        a, flat = ABAR[t].view(-1, 1), xt.flatten(1)
        gap = flat.square().sum(1, keepdim=True) - 2 * a.sqrt() * flat @ x.T + a * x.square().sum(1)
        x0_hat = (-gap / (2 * (1 - a))).softmax(1) @ x
        return ((flat - a.sqrt() * x0_hat) / (1 - a).sqrt()).view_as(xt)
    return eps_model


@pytest.mark.parametrize("kind", ["gaussian", "empirical"])
def test_transition_dip_is_an_error_of_the_network(kind):
    """Exact eps: the rank only grows towards t = 0, t* is the first step. With 1 % of error x0_hat is
    noise at first, and the dip appears."""
    model = gaussian(SPECTRUM.view(8, 8), ABAR) if kind == "gaussian" else empirical(randn(300, 64) * SPECTRUM)
    taus, z = c.uniform_steps(999, 100), randn(512, 1, 8, 8, seed=1)
    t_star, ranks = c.transition_step(model, z, taus, ABAR)
    rank = [r for _, r in ranks]
    assert t_star == 999 and rank[0] == min(rank) and rank[-1] > 2 * rank[0]
    if kind == "gaussian":
        assert rank == sorted(rank)
    t_star, ranks = c.transition_step(noisy(model, 0.01), z, taus, ABAR)
    rank = dict(ranks)
    assert 150 < t_star < 850
    assert rank[999] > 2 * rank[t_star] and rank[0] > rank[t_star]
    assert t_star == max(t for t in rank if rank[t] == min(rank.values()))    # the first of equals
    if kind == "gaussian":
        worse, _ = c.transition_step(noisy(model, 0.05), z, taus, ABAR)
        assert worse < t_star                                                 # a better net: earlier


# ---------------------------------------------------------------------------------------------
# Strategies of Table I
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("strategy, highs", [("label", (True, False)), ("xy", (True, False)),
                                             ("2T", (True,)), ("2dms", (True, False))])
@torch.no_grad()
def test_finetuning_starts_from_the_base_model(strategy, highs, patch):
    config = dict(preset("tiny"), patch=patch)
    base = awake_net(config, 3)
    net = c.finetune_start(config, 3, strategy, base.state_dict()).eval()
    t = torch.tensor([7, 900])
    for high in highs:
        res = 32 if high else 16
        xt = randn(2, 3, res, res, dtype=torch.float32)
        expected = c.predict_eps(base, None, xt, t, high)
        assert torch.allclose(c.predict_eps(net, strategy, xt, t, high), expected, atol=1e-5)
    weight = base.conv_in.weight.clone()
    net.conv_in.weight.add_(1)                                                # a copy, not the same tensor
    assert torch.equal(base.conv_in.weight, weight)


@torch.no_grad()
def test_2T_moves_low_resolution_to_later_steps():
    config = preset("tiny")
    net, xt, t = awake_net(config), randn(2, 1, 16, 16, dtype=torch.float32), torch.tensor([7, 900])
    assert torch.equal(c.predict_eps(net, "2T", xt, t, True), net(xt, t))
    assert torch.equal(c.predict_eps(net, "2T", xt, t, False), net(xt, t + 1000))
    assert not torch.allclose(net(xt, t), net(xt, t + 1000))


@torch.no_grad()
def test_label_tells_the_resolutions_apart():
    config = preset("tiny")
    net = c.finetune_start(config, 1, "label", awake_net(config).state_dict()).eval()
    xt, t = randn(2, 1, 16, 16, dtype=torch.float32), torch.tensor([7, 900])
    assert torch.equal(c.predict_eps(net, "label", xt, t, True), c.predict_eps(net, "label", xt, t, False))
    before = c.predict_eps(net, "label", xt, t, True)
    net.label.weight[0].normal_()                                             # 0 is low, 1 is high
    assert torch.equal(c.predict_eps(net, "label", xt, t, True), before)
    assert not torch.allclose(c.predict_eps(net, "label", xt, t, False), before)


def test_gradient_reaches_the_label():
    config = preset("tiny")
    net = c.finetune_start(config, 1, "label", awake_net(config).state_dict())
    xt, t = randn(2, 1, 16, 16, dtype=torch.float32), torch.tensor([7, 900])
    for high in (False, True):
        net.zero_grad()
        c.diffusion_loss(net, xt, t, torch.randn_like(xt), ABAR, "label", high).backward()
        norms = net.label.weight.grad.norm(dim=1)
        assert norms[int(high)] > 0 and norms[1 - int(high)] == 0


@pytest.mark.parametrize("res", [2, 4])
def test_xy_are_pixel_centres(res):
    seen = []
    xt = randn(2, 1, res, res, dtype=torch.float32)
    c.predict_eps(lambda x, t: seen.append(x), "xy", xt, torch.tensor([1, 2]), True)
    centres = {2: [-0.5, 0.5], 4: [-0.75, -0.25, 0.25, 0.75]}[res]
    x = torch.tensor(centres).expand(2, res, res)                             # x grows to the right
    assert torch.equal(seen[0], torch.cat([xt, x[:, None], x.transpose(1, 2)[:, None]], 1))


# ---------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------
GOOD = dict(method="c2f+trd", solver="dpm2", low_taus=[999, 400, 0], high_taus=[565, 200, 3])


def test_a_good_plan_comes_back(tmp_path):
    assert c.check_plan(dict(GOOD)) == GOOD
    base = dict(GOOD, method="base", low_taus=[], high_taus=[999])
    assert c.check_plan(base) == base
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(GOOD))
    assert c.load_plan(path) == GOOD
    for method in c.METHODS:
        for solver in c.SOLVERS:
            c.check_plan(c.make_plan(method, solver, 10, 5, 565))


@pytest.mark.parametrize("changes", [
    dict(high_taus=[200, 565]), dict(low_taus=[0, 400]), dict(high_taus=[565, 565, 3]),
    dict(low_taus=[400, 400]), dict(high_taus=[1000, 3]), dict(high_taus=[565, -1]), dict(low_taus=[1000]),
    dict(high_taus=[565.0, 3]), dict(high_taus=["565"]), dict(high_taus="565"), dict(high_taus=565),
    dict(high_taus=None), dict(high_taus=[]), dict(low_taus=None), dict(solver="euler"), dict(solver=None),
    dict(solver=["dpm2"]), dict(method="trd2"), dict(method=None), dict(method=["base"])])
def test_bad_plans(changes, tmp_path):
    plan = {**GOOD, **changes}
    with pytest.raises(ValueError):
        c.check_plan(plan)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="plan.json") as error:
        c.load_plan(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", GOOD)
def test_plans_that_lack_a_key(key):
    with pytest.raises(ValueError):
        c.check_plan({k: v for k, v in GOOD.items() if k != key})


@pytest.mark.parametrize("text", ["", "{", "not json", "[1, 2]", "3", "null", '"plan"'])
def test_files_that_are_no_plan(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="plan.json") as error:
        c.load_plan(path)
    assert "\n" not in str(error.value)


def test_a_plan_that_is_missing(tmp_path):
    with pytest.raises(OSError):
        c.load_plan(tmp_path / "none.json")


def test_stages_of_a_checkpoint_before_finetuning():
    with pytest.raises(ValueError, match="--train --resume"):
        c.stages_of(GOOD, {"base": None}, None, None)


def test_plans_of_each_method():
    assert c.make_plan("base", "ddim", 10, 5)["high_taus"] == [999, 749, 500, 250, 0]
    plan = c.make_plan("c2f", "dpm2", 3, 2, 565)
    assert (plan["low_taus"], plan["high_taus"]) == ([999, 500, 0], [565, 0])
    plan = c.make_plan("trd", "dpm2", 3, 2, None, "trailing")
    assert (plan["low_taus"], plan["high_taus"]) == ([], [999, 499])


@pytest.mark.skipif(not SHIPPED.exists(), reason="no shipped weights")
def test_a_search_with_the_shipped_weights_leaves_their_plans_alone(tmp_path):
    """Plans are written to args.plans: --out for the shipped weights, the run's folder for a run, or --plans."""
    shutil.copy(SHIPPED, tmp_path / "weights.pt")
    for checkpoint, given, expected in ((SHIPPED, None, "runs"), (os.path.relpath(SHIPPED), None, "runs"),
                                        (tmp_path / "weights.pt", None, tmp_path), (SHIPPED, "mine", "mine")):
        args = argparse.Namespace(checkpoint=checkpoint, plans=given, out="runs", compile=False)
        c.load_models(args, torch.device("cpu"), "fp32")
        assert args.plans == Path(expected)


def test_results_name_files_without_the_folder_of_the_machine(tmp_path):
    args = argparse.Namespace(config=preset("tiny"), channels=1, data="fashion10k", images_seen=0,
                              run=c.HERE / "weights", checkpoint=str(SHIPPED),
                              results=tmp_path / "new" / "results.jsonl")
    c.append_result(args, torch.device("cpu"), c.make_plan("base", "ddim", 0, 5), "test", fd=1.0)
    line = json.loads(args.results.read_text())
    assert line["args"]["checkpoint"] == "weights/c2f_trd/weights.pt" and line["args"]["run"] == "weights"
    assert line["fd"] == 1.0 and line["nfe"] == [0, 5] and str(c.HERE) not in json.dumps(line)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------
def test_diffusion_loss_by_hand():
    x0, eps, t = randn(2, 1, 4, 4), randn(2, 1, 4, 4, seed=1), torch.tensor([3, 800])
    xt = torch.stack([math.sqrt(ABAR[s]) * x0[i] + math.sqrt(1 - ABAR[s]) * eps[i] for i, s in enumerate(t)])
    expected = (xt.tanh().float() - eps).square().mean()
    assert float(c.diffusion_loss(lambda xt, t: xt.tanh(), x0, t, eps, ABAR)) == pytest.approx(float(expected))
    assert float(c.diffusion_loss(lambda xt, t: eps, x0, t, eps, ABAR)) < 1e-12


def test_tiny_preset_learns_eight_images():
    """Better than any estimate that knows the noise level but not the images: abar p / (abar p + 1 - abar)
    is the loss of the best multiple of xt, p the power of the images."""
    torch.manual_seed(0)
    row = torch.arange(16) / 15 * 2 - 1                                       # stripes, four each way
    x0 = torch.stack([torch.sin((k % 4 + 1) * (row if k < 4 else row[:, None])).sign().expand(16, 16)
                      for k in range(8)])[:, None] * 0.9
    net = c.build_net(preset("tiny"), 1)
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(100):
        t = 125 * torch.arange(8) + torch.randint(0, 125, (8,))
        loss = c.diffusion_loss(net, x0[torch.randperm(8)], t, torch.randn_like(x0), ABAR)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    p = float(x0.square().mean())
    linear = float((ABAR[:-1] * p / (ABAR[:-1] * p + 1 - ABAR[:-1])).mean())
    assert losses[0] > 0.8 and sum(losses[-20:]) / 20 < linear, (linear, losses[::10])
