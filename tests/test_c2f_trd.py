"""c2f_trd.py against independent oracles: closed forms, diffusers, brute force.

Tests that compare with diffusers are skipped where it is not installed (`pip install diffusers==0.42.1`).
"""
import copy
import functools
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import c2f_trd as c
from common import count_macs, linear_alpha_bar, noise_for, to_uint8

ABAR = linear_alpha_bar(1000)
FINE = linear_alpha_bar(100_000, 1e-6, 2e-4)                # the same schedule in steps of a hundredth
TINY = dict(channels=1, res=16, ch=8, mult=[1, 2], blocks=1, attention=[1], patch=1, low=0, precision="fp32")
PAPER = dict(channels=3, ch=128, mult=[1, 2, 2, 2], blocks=2, attention=[1], patch=1, low=0)      # CIFAR-10
LSUN = dict(channels=3, ch=128, mult=[1, 1, 2, 2, 4, 4], blocks=2, attention=[4], patch=1, low=0)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ddim_sample(eps_model, xt, taus, alpha_bar):
    return c.dpm_solver_pp_sample(eps_model, xt, taus, alpha_bar, order=1)


def awake_net(seed=0, **changes):
    """A network of random weights, all of them: no zero hides a path."""
    torch.manual_seed(seed)
    net = c.build_net(dict(TINY, **changes)).eval().requires_grad_(False)
    if changes.get("low"):
        net.label.weight.normal_()
    return net


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


def plain_sample(eps_model, x, taus, order, table=ABAR):
    """DDIM and DPM-Solver++ 2M from the formulas of the papers, in Python floats and one loop."""
    alpha = [math.sqrt(table[t]) for t in taus]
    sigma = [math.sqrt(1 - table[t]) for t in taus]
    lam = [math.log(p / q) for p, q in zip(alpha, sigma)]
    D, K = [], len(taus)
    for k in range(K):
        eps_hat = eps_model(x, torch.full((len(x),), taus[k]))
        D.append((x - sigma[k] * eps_hat) / alpha[k])
        if k == K - 1:
            return D[k]
        h, mean = lam[k + 1] - lam[k], D[k]
        if order == 2 and k > 0:
            r = (lam[k] - lam[k - 1]) / h
            mean = D[k] + (D[k] - D[k - 1]) / (2 * r)
        x = sigma[k + 1] / sigma[k] * x - alpha[k + 1] * (math.exp(-h) - 1) * mean


def plain_c2f(stages, sequences, order, x0=None):
    """Stages in turn; up-sampling by 2 as two products with the bilinear matrix."""
    for (eps_model, noise), taus in zip(stages, sequences):
        x = noise
        if x0 is not None:
            up = bilinear_matrix(x0.shape[-1], noise.shape[-1]).to(x0)
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


def plain_candidates(taus, i, n):
    """Eq. 3 in exact fractions."""
    alone = len(taus) == 1
    above = taus[i - 1] if i > 0 else 1000 if alone else taus[i]
    below = taus[i + 1] if i + 1 < len(taus) else -1 if alone else taus[i]
    found = []
    for j in range(1, n + 1):
        step = math.floor(below + Fraction(j * (above - below), n + 1) + Fraction(1, 2))
        if step not in (above, below, taus[i], *found):
            found.append(step)
    return found


def plain_search(stages, sequences, x_ref, order, n=5, sweeps=10, x0=None):
    """TRD without any cache or batch: every candidate is a full run. Sequences and loss after each sweep."""
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
                for t in plain_candidates(sequences[s], i, n):
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
# Network
# ---------------------------------------------------------------------------------------------
def macs(config, *sides):
    """MACs of one evaluation at each side."""
    with torch.device("meta"):
        net, t = c.build_net(config), torch.zeros(1, dtype=torch.long)
        return [count_macs(net, torch.zeros(1, config["channels"], r, r), t) for r in sides]


@pytest.mark.parametrize("config, parameters, expected", [
    (PAPER, 35_746_307, {32: 6_221_856_768, 8: 381_731_328}),
    (LSUN, 113_673_219, {256: 248_513_757_184, 32: 3_883_156_480})])
def test_parameters_and_macs_of_the_paper(config, parameters, expected):
    assert macs(config, *expected) == list(expected.values())
    with torch.device("meta"):
        net = c.build_net(dict(config, low=8))                                 # one vector per resolution more
    assert sum(p.numel() for p in net.parameters()) == parameters + 2 * 512


@pytest.mark.parametrize("res", [16, 32])
@pytest.mark.parametrize("attention", [[7], [1]])
def test_macs_by_hand(res, attention):
    config = dict(TINY, channels=3, patch=2, attention=attention)
    n0, n1 = (res // 2) ** 2, (res // 4) ** 2                                 # pixels per level

    def block(c_in, c_out, n):
        return 9 * n * (c_in + c_out) * c_out + 32 * c_out + (n * c_in * c_out if c_in != c_out else 0)

    products = 2 * n1 * n1 * 16                                               # q k^T, and times v
    attend = 4 * n1 * 16 * 16 + products
    level1 = attend if attention == [1] else 0
    expected = (8 * 32 + 32 * 32                                              # time
                + 9 * n0 * 12 * 8                                             # 3 channels of 2 x 2 pixels
                + block(8, 8, n0) + 9 * n1 * 8 * 8 + block(8, 16, n1) + level1
                + 2 * block(16, 16, n1) + attend
                + block(16 + 16, 16, n1) + level1 + block(16 + 8, 16, n1) + level1
                + 9 * n0 * 16 * 16 + block(16 + 8, 8, n0) + block(8 + 8, 8, n0)
                + 9 * n0 * 8 * 12)
    assert macs(config, res) == macs(dict(config, low=8), res) == [expected]


@pytest.mark.parametrize("res, low, changes", [
    (9, 0, {}), (18, 0, dict(patch=2)), (20, 0, dict(mult=[1, 2, 2, 2])), (16, 3, {}), (16, 6, {}), (16, 16, {}),
    (16, 32, {}), (16, 2, dict(patch=2)), (24, 16, {})])
def test_sizes_that_do_not_divide(monkeypatch, res, low, changes):
    """Told before the training: the network cannot halve them, or one is no multiple of the other."""
    def load_images(name, *args):
        return torch.zeros(4, 1, res, res, dtype=torch.uint8), torch.zeros(4).long(), [""]

    monkeypatch.setattr(c, "load_images", load_images)
    with pytest.raises(ValueError, match=f"{res}.*multiple") as error:
        c.load_data(dict(TINY, data="folder", low=low, **changes))
    assert (f"--low {low}," in str(error.value)) == ("--low" in str(error.value)) == bool(low)   # named if it was given
    assert "\n" not in str(error.value)
    config = dict(TINY, data="folder", low=8, res=1)
    res = 16
    assert c.load_data(config)[0].shape == (4, 1, 16, 16) and (config["res"], config["channels"]) == (16, 1)


def test_network_sees_its_whole_input():
    """Every pixel of xt reaches the middle of the output, and so does t: nothing is left unconnected."""
    net = awake_net().requires_grad_()
    xt = randn(1, 1, 16, 16, dtype=torch.float32).requires_grad_()
    v_hat = net(xt, torch.tensor([500]))
    assert v_hat.shape == xt.shape
    v_hat[0, 0, 8, 8].backward()
    assert (xt.grad != 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert not torch.equal(v_hat, net(xt, torch.tensor([501])))


def test_network_treats_samples_alone():
    net, xt = awake_net(), randn(3, 1, 16, 16, dtype=torch.float32)
    t = torch.tensor([3, 999, 400])
    alone = torch.cat([net(xt[i:i + 1], t[i:i + 1]) for i in range(3)])
    assert torch.allclose(net(xt, t), alone, atol=1e-5)


@torch.no_grad()
def test_network_is_diffusers_ddpm():
    """The same weights in UNet2DModel (as in google/ddpm-cifar10-32) give the same output."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        in_channels=3, out_channels=3, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=2,
        norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")).eval()
    for p in theirs.parameters():                                             # norms are not the identity
        p.add_(0.1 * torch.randn_like(p))
    net = awake_net(channels=3, mult=[1, 2, 2], blocks=2)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in theirs.parameters())

    def layers(block, sampler):                                               # in the order of execution
        attentions = [*getattr(block, "attentions", [])] + 9 * [None]
        pairs = [layer for pair in zip(block.resnets, attentions) for layer in pair if layer]
        return pairs + list(getattr(block, sampler, None) or [])

    encoder, decoder = net.encoder, net.decoder
    ours = [layer for stage in [*encoder.down, encoder.mid, *decoder.up] for layer in stage]
    down = [layer for block in theirs.down_blocks for layer in layers(block, "downsamplers")]
    up = [layer for block in theirs.up_blocks for layer in layers(block, "upsamplers")]
    mid = [theirs.mid_block.resnets[0], theirs.mid_block.attentions[0], theirs.mid_block.resnets[1]]
    pairs = [(net.emb[0], [theirs.time_embedding.linear_1]), (net.emb[2], [theirs.time_embedding.linear_2]),
             (encoder.conv_in, [theirs.conv_in]), (decoder.norm_out, [theirs.conv_norm_out]),
             (decoder.conv_out, [theirs.conv_out])]
    for a, b in zip(ours, [*down, *mid, *up], strict=True):
        if isinstance(a, c.Attention):
            pairs += [(a.norm, [b.group_norm]), (a.qkv, [b.to_q, b.to_k, b.to_v]), (a.out, [b.to_out[0]])]
        elif isinstance(a, c.ResBlock):
            pairs += [(a.norm1, [b.norm1]), (a.conv1, [b.conv1]), (a.emb, [b.time_emb_proj]),
                      (a.norm2, [b.norm2]), (a.conv2, [b.conv2])]
            pairs += [(a.skip, [b.conv_shortcut])] if b.conv_shortcut is not None else []
        else:
            pairs.append((a[1], [b.conv]))                                    # up, down
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
# Fine-tuning on two resolutions (III-A2)
# ---------------------------------------------------------------------------------------------
def test_fine_tuning_starts_from_the_base_model():
    """The same tensors, and the same output for both labels: the new embedding begins at zero."""
    base, told = awake_net(), c.build_net(dict(TINY, low=8)).eval()
    told.load_state_dict(base.state_dict(), strict=False)
    assert told.state_dict().keys() - base.state_dict().keys() == {"label.weight"}
    assert all(v.equal(told.state_dict()[k]) for k, v in base.state_dict().items())
    assert told.label.weight.shape == (2, 32) and not told.label.weight.any()
    t = torch.tensor([7, 900])
    for res, y in itertools.product((8, 16), (0, 1)):
        xt = randn(2, 1, res, res, dtype=torch.float32)
        assert torch.equal(told(xt, t, torch.full((2,), y)), base(xt, t))


def test_label_tells_the_resolutions_apart():
    net, xt, t = awake_net(low=8), randn(2, 1, 16, 16, dtype=torch.float32), torch.tensor([7, 900])
    with torch.no_grad():
        low, high = (net(xt, t, torch.full((2,), y)) for y in (0, 1))
        assert not torch.allclose(low, high)
        assert torch.allclose(net(xt, t, torch.tensor([0, 1])), torch.stack([low[0], high[1]]), atol=1e-5)
        net.label.weight[0] += 1
        assert torch.equal(net(xt, t, torch.ones(2).long()), high)


@pytest.mark.parametrize("res, y", [(8, 0), (16, 1)])
def test_gradient_reaches_the_label_of_the_resolution(res, y):
    net = awake_net(low=8).requires_grad_()
    x0 = randn(2, 1, res, res, dtype=torch.float32)
    c.training_loss(net, dict(TINY, low=8), x0, torch.tensor([7, 900]), torch.randn_like(x0)).backward()
    norms = net.label.weight.grad.norm(dim=1)
    assert norms[y] > 0 and norms[1 - y] == 0


def test_training_loss_by_hand():
    """v = sqrt(abar) eps - sqrt(1 - abar) x0 of every image; a base network is told nothing else."""
    x0, eps, t = randn(2, 1, 4, 4), randn(2, 1, 4, 4, seed=1), torch.tensor([3, 800])
    a = [float(ABAR[s]) for s in t]
    xt = torch.stack([math.sqrt(a[i]) * x0[i] + math.sqrt(1 - a[i]) * eps[i] for i in range(2)])
    v = torch.stack([math.sqrt(a[i]) * eps[i] - math.sqrt(1 - a[i]) * x0[i] for i in range(2)])
    asked = []

    def net(xt, t, y):
        asked.append((xt, t, y))
        return xt.tanh()

    loss = float(c.training_loss(net, TINY, x0.float(), t, eps.float()))
    assert loss == pytest.approx(float((xt.tanh() - v).square().mean()), rel=1e-5)
    assert torch.allclose(asked[0][0].double(), xt, atol=1e-6) and asked[0][1] is t and asked[0][2] is None
    assert torch.allclose(c.eps_of_v(v, xt, t, ABAR), eps, atol=1e-9)          # and back
    for res, y in ((16, 1), (8, 0)):
        x0 = randn(2, 1, res, res, dtype=torch.float32)
        c.training_loss(net, dict(TINY, low=8), x0, t, x0)
        assert asked[-1][2].tolist() == [y, y]


def test_draw_batch():
    x = torch.randint(256, (50, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    config, y = dict(TINY, batch=12, low=8, flip=0), torch.arange(50)

    def draw(step, **changes):
        torch.manual_seed(step)
        return c.draw_batch(dict(config, **changes), x, y, step)

    for step, res in ((4, 16), (5, 8)):                                        # in turn
        x0, t, eps = draw(step)
        assert x0.shape == eps.shape == (12, 1, res, res) and t.shape == (12,) and t.dtype == torch.int64
        assert 0 <= t.min() and t.max() < 1000 and all(a.equal(b) for a, b in zip(draw(step), (x0, t, eps)))
        means = x.float().view(50, 1, res, 16 // res, res, 16 // res).mean((3, 5)) / 127.5 - 1
        assert all(any(torch.allclose(a, b, atol=1e-5) for b in means) for a in x0)        # area averages
        assert draw(step, low=0)[0].shape == (12, 1, 16, 16)
    plain, flipped = draw(4)[0], draw(4, flip=1)[0]
    turned = [not a.equal(b) for a, b in zip(plain, flipped)]
    assert 0 < sum(turned) < 12
    assert all(b.equal(a.flip(-1) if turn else a) for a, b, turn in zip(plain, flipped, turned))


def test_tiny_network_learns_eight_images():
    """Better than any estimate that knows the noise level but not the images: the best multiple of xt leaves
    p / (abar p + 1 - abar) of v, p the power of the images."""
    torch.manual_seed(0)
    row = torch.arange(8) / 7 * 2 - 1                                         # stripes, four each way
    x0 = torch.stack([torch.sin((k % 4 + 1) * (row if k < 4 else row[:, None])).sign().expand(8, 8)
                      for k in range(8)])[:, None] * 0.9
    net = c.build_net(TINY)
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(60):
        t = 125 * torch.arange(8) + torch.randint(0, 125, (8,))
        loss = c.training_loss(net, TINY, x0[torch.randperm(8)], t, torch.randn_like(x0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    p = float(x0.square().mean())
    linear = float((p / (ABAR[:-1] * p + 1 - ABAR[:-1])).mean())
    assert losses[0] > 0.8 and sum(losses[-20:]) / 20 < linear / 1.3, (linear, losses[::6])


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------
def random_steps(K, seed, to_zero, gap=1):
    """K random steps, at least `gap` apart."""
    rng = np.random.default_rng(seed)
    steps = sorted((gap * rng.choice(np.arange(1, 1000 // gap), K, False) + rng.integers(gap)).tolist())[::-1]
    return steps[:-1] + [0] if to_zero else steps


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("K", [1, 2, 3, 5, 20])
def test_samplers_against_their_formulas(K, order):
    for seed in range(4):
        taus, xt = random_steps(K, 10 * K + seed, seed % 2), randn(2, 1, 4, 4, seed=seed)
        ours = c.dpm_solver_pp_sample(fake_net, xt, taus, ABAR, order)
        assert torch.allclose(ours, plain_sample(fake_net, xt, taus, order), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("order", [1, 2])
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
    ours = ddim_sample(fake_net, xt, scheduler.timesteps.tolist(), ABAR)
    assert float((ours - x).norm() / x.norm()) < 1e-5


STD = torch.tensor([0.2, 0.5, 1.5], dtype=torch.float64)


@pytest.mark.parametrize("order", [1, 2])
def test_order_of_convergence(order):
    """The slope of the largest relative error on data N(0, STD^2). The exact path keeps xt / sqrt(variance of xt);
    the last, clean estimate is compared with the one at the end of that path (t = 10 of 1000). Steps are even in
    log(alpha / sigma)."""
    lam, last, Ks, errors = -(FINE[:-1].logit() / 2).numpy(), 1000, (20, 40, 80, 160), []
    root = (FINE[:, None] * STD ** 2 + 1 - FINE[:, None]).sqrt()
    for K in Ks:
        taus = np.interp(np.linspace(lam[-1], lam[last], K), lam, np.arange(len(lam))).round().astype(int)
        x0 = c.dpm_solver_pp_sample(gaussian(STD, FINE), root[-2].view(1, 1, 1, 3), taus.tolist(), FINE, order)
        exact = FINE[last].sqrt() * STD ** 2 / root[last]
        errors.append(float((x0 / exact - 1).abs().max()))
    assert -np.polyfit(np.log(Ks), np.log(errors), 1)[0] == pytest.approx(order, abs=0.08), errors


@pytest.mark.parametrize("order", [1, 2])
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


@pytest.mark.parametrize("order", [1, 2])
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


@pytest.mark.parametrize("kind", [np.array, torch.tensor, lambda taus: [np.int64(t) for t in taus],
                                  lambda taus: np.array(taus, np.int32), tuple])
def test_steps_of_other_kinds_of_integers(kind):
    xt, taus = randn(2, 1, 4, 4), [900, 500, 20]
    expected = c.dpm_solver_pp_sample(fake_net, xt, taus, ABAR)
    assert torch.equal(c.dpm_solver_pp_sample(fake_net, xt, kind(taus), ABAR), expected)
    for wrong in ([900, 500, 500], [20, 500, 900], [900, 900, 20]):
        with pytest.raises(ValueError, match="fall strictly"):
            c.dpm_solver_pp_sample(fake_net, xt, kind(wrong), ABAR)


@pytest.mark.parametrize("taus", [[1000, 500, 0], [999, 500, -1], [-1], [1000]])
def test_steps_out_of_range(taus):
    with pytest.raises(ValueError, match="steps"):
        ddim_sample(fake_net, randn(1, 1, 4, 4), taus, ABAR)


def test_a_schedule_without_clean_data_is_refused():
    """diffusers' alphas_cumprod has 1000 entries: t = -1 would be its noisiest one."""
    for sampler in (c.dpm_solver_pp_sample,
                    lambda model, xt, taus, abar: c.c2f_sample([(model, xt)], [taus], abar)):
        with pytest.raises(ValueError, match="alpha_bar.*1, at its end") as error:
            sampler(fake_net, randn(1, 1, 4, 4), [900, 300], ABAR[:-1])
        assert "\n" not in str(error.value)


def test_no_graph_is_built():
    """Samplers and searches take networks as they are: gradients would keep every evaluation in memory."""
    net, xt = awake_net().requires_grad_(), randn(2, 1, 16, 16, dtype=torch.float32)
    for x in (ddim_sample(net, xt, [900, 300], ABAR), c.c2f_sample([(net, xt)], [[900, 300]], ABAR, 2)):
        assert not x.requires_grad
    found, _ = c.trd_search([(net, xt)], [[900, 300]], x, ABAR, 2, sweeps=1)
    assert len(found[0]) == 2


def test_the_off_switch_is_plain_ddim():
    """--method base: the loop of DDIM's Eq. 12, sigma = 0, with eps_hat from v_hat, and nothing else."""
    net, config = awake_net(), dict(TINY, method="base", solver="ddim", steps=7)
    plan = dict(solver="ddim", low_taus=[], high_taus=c.uniform_steps(999, 7))
    ours = c.generate(net, config, plan, [3, 4], "cpu")
    assert torch.equal(ours, ddim_sample(c.model_of(net, config), noise_for([3, 4], (1, 16, 16)),
                                           plan["high_taus"], ABAR))
    xt, taus = noise_for([3, 4], (1, 16, 16)), [999, 833, 666, 500, 333, 167, 0]
    for t, t_next in zip(taus, [*taus[1:], None]):
        a, a_next = float(ABAR[t]), 1.0 if t_next is None else float(ABAR[t_next])
        eps_hat = math.sqrt(a) * net(xt, torch.full((2,), t)) + math.sqrt(1 - a) * xt
        x0_hat = (xt - math.sqrt(1 - a) * eps_hat) / math.sqrt(a)
        xt = math.sqrt(a_next) * x0_hat + math.sqrt(1 - a_next) * eps_hat
    assert float((ours - xt).norm() / xt.norm()) < 1e-5


@pytest.mark.parametrize("order", [1, 2])
def test_c2f_sample_by_hand(order):
    stages = [(mixture(4, 1), randn(3, 1, 4, 4)), (mixture(8, 2), randn(3, 1, 8, 8, seed=1))]
    sequences = [[999, 700, 300, 50], [565, 300, 100, 7]]
    x0 = c.c2f_sample(stages, sequences, ABAR, order)
    assert torch.allclose(x0, plain_c2f(stages, sequences, order), rtol=1e-9, atol=1e-9)
    low = c.c2f_sample(stages[:1], sequences[:1], ABAR, order)                # one stage after the other
    assert torch.equal(x0, c.c2f_sample(stages[1:], sequences[1:], ABAR, order, x0=low))
    alone = c.c2f_sample(stages[1:], sequences[1:], ABAR, order)              # one stage: the plain sampler
    assert torch.equal(alone, c.dpm_solver_pp_sample(*stages[1], sequences[1], ABAR, order))


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
    off = torch.corrcoef(xt.flatten(1).T) - torch.eye(64)
    assert float(off.abs().max()) < 6 / math.sqrt(n)                          # white


# ---------------------------------------------------------------------------------------------
# Images of a network
# ---------------------------------------------------------------------------------------------
PLAN = dict(solver="dpm2", low_taus=[999, 500, 0], high_taus=[565, 300, 10])


def test_stages_of_a_network():
    """The low resolution first, with label 0; every seed has a noise for each resolution, full resolution first."""
    net, config = awake_net(low=8), dict(TINY, low=8)
    stages, sequences = c.stages_of(net, config, PLAN, [5, 6], "cpu")
    z_high, z_low = noise_for([5, 6], (1, 16, 16), (1, 8, 8))
    assert sequences == [PLAN["low_taus"], PLAN["high_taus"]]
    for (eps_model, noise), y, z in zip(stages, (0, 1), (z_low, z_high)):
        assert noise.equal(z)
        t = torch.tensor([400, 900])
        eps_hat = c.eps_of_v(net(z, t, torch.full((2,), y)), z, t, ABAR)
        assert torch.allclose(eps_model(z, t), eps_hat, atol=1e-6)
    stages, sequences = c.stages_of(net, config, dict(PLAN, low_taus=[]), [5, 6], "cpu")
    assert sequences == [PLAN["high_taus"]] and len(stages) == 1 and stages[0][1].equal(z_high)
    (_, noise), = c.stages_of(awake_net(), TINY, dict(PLAN, low_taus=[]), [5, 6], "cpu")[0]
    assert noise.equal(z_high)                                                # the same images as without C2F


@pytest.mark.parametrize("low", [0, 8])
def test_seed_i_makes_image_i(low):
    net, config = awake_net(low=low), dict(TINY, low=low)
    plan = PLAN if low else dict(PLAN, low_taus=[])
    whole = c.sample(net, config, plan, range(3, 10), torch.device("cpu"))
    assert whole.shape == (7, 1, 16, 16) and whole.dtype == torch.uint8 and len(whole.unique(dim=0)) == 7
    assert whole.equal(to_uint8(c.generate(net, config, plan, range(3, 10), "cpu")))
    for share in ([3], [4, 6, 8], [9, 3, 5, 7]):
        part = c.sample(net, config, plan, share, torch.device("cpu"))
        assert (part.int() - whole[[s - 3 for s in share]].int()).abs().max() <= 1        # rounding at most
    assert c.sample(net, config, plan, [], torch.device("cpu")).shape == (0, 1, 16, 16)   # a process without a share


def test_a_batch_is_evaluated_in_parts(monkeypatch):
    """300 images of 32x32 are two calls: memory stays small; nothing else changes."""
    sizes = []

    def net(xt, t, y):
        sizes.append((len(xt), y if y is None else y.tolist()[:1]))
        return fake_net(xt, t)

    xt, t = randn(300, 1, 32, 32, dtype=torch.float32), torch.arange(300)
    eps_hat = c.model_of(net, TINY, 1)(xt, t)
    assert sizes == [(256, [1]), (44, [1])]
    assert torch.equal(eps_hat, c.eps_of_v(fake_net(xt, t), xt, t, ABAR))


@pytest.mark.parametrize("low", [0, 8])
def test_macs_are_those_of_the_executed_sampler(low):
    """generate runs on the meta device: as many MACs as steps times network."""
    config = dict(TINY, low=low)
    with torch.device("meta"):
        net = c.build_net(config)
    plan = PLAN if low else dict(PLAN, low_taus=[])
    assert c.generate(net, config, plan, [0], torch.device("meta")).shape == (1, 1, 16, 16)
    counted = count_macs(lambda: c.generate(net, config, plan, [0], torch.device("meta")))
    high, coarse = macs(config, 16, 8)
    assert counted == 3 * high + (3 * coarse if low else 0)


# ---------------------------------------------------------------------------------------------
# Uniform steps, candidates
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("power, first, K, expected", [
    (None, 999, 5, [999, 749, 500, 250, 0]), (None, 565, 3, [565, 283, 0]), (None, 999, 1, [999]),
    (None, 4, 5, [4, 3, 2, 1, 0]), (1, 999, 5, [999, 799, 599, 400, 200]), (1, 404, 5, [404, 323, 242, 162, 81]),
    (1, 999, 1, [999]), (2, 1000, 4, [1000, 563, 250, 63])])                  # 562.5 and 62.5: up
def test_uniform_steps_by_hand(power, first, K, expected):
    assert c.uniform_steps(first, K, power) == expected


def test_uniform_steps_are_numpys():
    assert 565 in c.uniform_steps(999, 100)                                   # the paper's t*
    for first, K in itertools.product((999, 565, 404), (2, 5, 7, 10, 20, 40, 100)):
        line = np.linspace(first, 0, K)
        assert c.uniform_steps(first, K) == np.floor(line + 0.5 + 1e-9).astype(int).tolist()
        line = np.linspace(first, 0, K + 1)[:-1]
        assert c.uniform_steps(first, K, 1) == np.floor(line + 0.5 + 1e-9).astype(int).tolist()


@pytest.mark.parametrize("power", [None, 1])
@pytest.mark.parametrize("first, K", [(4, 6), (999, 1001), (0, 2)])
def test_steps_that_do_not_fit(power, first, K):
    with pytest.raises(ValueError, match=f"{K} different steps do not fit between {first} and 0"):
        c.uniform_steps(first, K, power)


@pytest.mark.parametrize("taus, i, n, expected", [
    ([999, 500, 0], 1, 5, [167, 333, 666, 833]),                              # 500 is kept, not tried
    ([999, 400, 0], 1, 5, [167, 333, 500, 666, 833]),                         # 166.5, 499.5, 832.5: up
    ([999, 500, 0], 1, 4, [200, 400, 599, 799]),
    ([9, 7, 0], 1, 5, [2, 3, 5, 6, 8]),                                       # 1.5, 4.5, 7.5: up
    ([9, 5, 0], 1, 1, []),                                                    # 4.5 is the 5 that it has
    ([100, 40], 0, 5, [50, 60, 70, 80, 90]),                                  # the first can only fall
    ([100, 40], 1, 5, [50, 60, 70, 80, 90]),                                  # the last can only rise
    ([500], 0, 5, [166, 333, 666, 833]),                                      # one step: the whole range
    ([10, 9, 8], 1, 5, []),                                                   # no room
    ([10, 9], 0, 5, []), ([10, 9], 1, 5, []), ([10, 9, 7], 1, 5, [8]),
    ([10, 8, 6, 0], 1, 5, [7, 9])])                                           # 6.67, 7.33: one 7
def test_candidates_by_hand(taus, i, n, expected):
    assert c.candidate_steps(taus, i, n) == expected


def test_candidates_are_eq_3():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        K, n = int(rng.integers(1, 12)), int(rng.integers(1, 9))
        top = int(rng.choice([20, 100, 1000]))
        taus = sorted(rng.choice(top, K, replace=False).tolist(), reverse=True)
        for i in range(K):
            found = c.candidate_steps(taus, i, n)
            assert found == sorted(plain_candidates(taus, i, n))
            for t in found:                                                   # always a valid sequence
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
    """The same loss after every sweep, the same sequences after one, two and all of them."""
    stages, sequences, x_ref = case
    found, report = c.trd_search(stages, sequences, x_ref, ABAR, order, **options)
    history, losses = plain_search(stages, sequences, x_ref, order, **options)
    assert found == history[-1]
    assert report["loss"] == pytest.approx(losses, rel=1e-5)
    for sweeps in range(1, min(3, len(history) - 1)):
        assert c.trd_search(stages, sequences, x_ref, ABAR, order, **dict(options, sweeps=sweeps))[0] == history[sweeps]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]                                             # there was something to find
    return found


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_search_is_brute_force(K, order):
    assert_same_search(one_stage(K), order)


@pytest.mark.parametrize("order", [1, 2])
def test_search_is_brute_force_10_steps(order):
    assert_same_search(one_stage(10, B=2), order, sweeps=3)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_search_is_brute_force_other_n(n):
    assert_same_search(one_stage(4, start=[950, 500, 320, 40]), 2, n=n)


@pytest.mark.parametrize("order", [1, 2])
def test_joint_search_is_brute_force(order):
    case = two_stages(4, 5)
    found = assert_same_search(case, order)
    assert found[0] != case[1][0] and found[1] != case[1][1]                  # both stages moved


@pytest.mark.parametrize("order", [1, 2])
def test_second_stage_alone_is_brute_force(order):
    """From a given coarse image."""
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
    for taus, loss in ((sequences, report["loss"][0]), (found, report["loss"][-1])):
        x = c.c2f_sample(stages, taus, ABAR, 2)
        assert float((x - x_ref).square().mean()) == pytest.approx(loss, rel=1e-6)
    json.dumps([found, report])                                               # plain numbers: a plan is JSON


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
    assert found == planted and report["loss"][1] < 1e-20                     # in the first sweep


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
    assert report["evaluations"] == [K + sweep]
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
    assert len(logs[0]) + len(logs[1]) == 2 * 6 + 6 * 7 // 2 + 2 * 5 - 1 + 5 * 6 // 2 + 5 * 6


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
# search and its plans
# ---------------------------------------------------------------------------------------------
CPU = torch.device("cpu")


@pytest.fixture
def short(monkeypatch):
    """A reference of 21 steps, 48 samples for the PCA, 4 for TRD and one sweep, three powers."""
    monkeypatch.setattr(c, "trd_search", functools.partial(c.trd_search, sweeps=1))
    for name, value in dict(REFERENCE_STEPS=21, PCA=48, CALIBRATION=4, BEST_OF=(None, 1, 2.5)).items():
        monkeypatch.setattr(c, name, value)


def config_of(tmp_path, **changes):
    """What load_net makes of a checkpoint in tmp_path / run and a command line."""
    return {**TINY, "out": str(tmp_path / "out"), "checkpoint": str(tmp_path / "run" / "checkpoint.pt"), "step": 40,
            "method": "trd", "solver": "dpm2", "steps": 3, "low_steps": 4, "t_star": 0, "start": "inclusive", **changes}


@pytest.mark.parametrize("method, start", [("base", "inclusive"), ("base", "exclusive"), ("trd", "inclusive"),
                                           ("c2f", "inclusive"), ("c2f+trd", "exclusive")])
def test_search(tmp_path, short, method, start):
    low = 8 if "c2f" in method else 0
    net, config = awake_net(low=low), config_of(tmp_path, method=method, low=low, start=start)
    plan = c.search(net, config, CPU)
    assert json.loads((tmp_path / "out" / c.plan_name(config)).read_text()) == json.loads(json.dumps(plan))
    assert plan["solver"] == "dpm2" and plan["step"] == 40
    if low:
        ranks = dict(plan["ranks"])
        assert list(ranks) == np.floor(np.linspace(999, 0, 21) + 0.5).astype(int).tolist()
        assert plan["t_star"] == max(t for t in ranks if ranks[t] == min(ranks.values()))
        assert len(plan["low_taus"]) == 4 and len(plan["high_taus"]) == 3 and plan["high_taus"][0] <= plan["t_star"]
    else:
        assert plan["low_taus"] == [] and "t_star" not in plan
    if "trd" in method:
        assert plan["loss"] == sorted(plan["loss"], reverse=True) and len(plan["evaluations"]) == 1 + (low > 0)
    elif low:
        assert plan["low_taus"] == [999, 666, 333, 0] and plan["high_taus"] == c.uniform_steps(plan["t_star"], 3)
    else:
        assert plan["high_taus"] == ([999, 500, 0] if start == "inclusive" else [999, 666, 333])
    assert all(str(taus) in c.describe(plan) for taus in (plan["low_taus"] or plan["high_taus"], plan["high_taus"]))


def test_t_star_by_hand_is_not_searched(tmp_path, short, monkeypatch):
    monkeypatch.setattr(c, "transition_step", None)
    plan = c.search(awake_net(low=8), config_of(tmp_path, method="c2f", low=8, t_star=565), CPU)
    assert plan["t_star"] == 565 and plan["high_taus"] == [565, 283, 0] and "ranks" not in plan


@pytest.mark.parametrize("low", [0, 8])
def test_search_hands_over_what_the_paper_says(tmp_path, short, monkeypatch, low):
    """The reference: DDIM, from t* on at full resolution (D10); its noise; uniform steps."""
    def trd_search(*args):
        asked.extend(args)
        return [[7], [5]][-len(args[1]):], dict(loss=[2.0, 1.0], seconds=0)

    asked, net = [], awake_net(low=low)
    config = config_of(tmp_path, low=low, method="c2f+trd" if low else "trd", t_star=600)
    monkeypatch.setattr(c, "trd_search", trd_search)
    plan = c.search(net, config, CPU)
    assert plan["high_taus"] == [5] and plan["low_taus"] == ([7] if low else []) and plan["loss"] == [2.0, 1.0]
    stages, sequences, x_ref, alpha_bar, order = asked
    z_high, z_low = noise_for(range(10 ** 9, 10 ** 9 + 4), (1, 16, 16), (1, 8, 8))
    grid = np.floor(np.linspace(999, 0, 21) + 0.5).astype(int).tolist()
    assert order == 2 and torch.equal(alpha_bar, ABAR)
    assert [z.tolist() for _, z in stages] == [z_low.tolist(), z_high.tolist()][-len(stages):]
    if low:
        assert sequences == [[999, 666, 333, 0], [600, 300, 0]]
        expected = plain_c2f(stages, [grid, [t for t in grid if t <= 600]], 1)
    else:
        assert sequences == [[999, 500, 0]]
        expected = plain_sample(stages[0][0], z_high, grid, 1)
    assert float((x_ref - expected).norm() / expected.norm()) < 1e-3


def test_the_best_start_is_the_best_of_the_powers(tmp_path, short):
    net, config = awake_net(low=8), config_of(tmp_path, method="c2f", low=8, start="best", t_star=600)
    plan = c.search(net, config, CPU)
    grid = c.uniform_steps(999, 21)
    seeds = range(10 ** 9, 10 ** 9 + 4)
    x_ref = c.generate(net, config, dict(solver="ddim", low_taus=grid, high_taus=[t for t in grid if t <= 600]), seeds,
                       CPU)
    losses = {}
    for p, q in itertools.product(c.BEST_OF, repeat=2):
        low, high = c.uniform_steps(999, 4, p), c.uniform_steps(600, 3, q)
        x = c.generate(net, config, dict(solver="dpm2", low_taus=low, high_taus=high), seeds, CPU)
        losses[str([low, high])] = float((x - x_ref).square().mean())
    assert losses[str([plan["low_taus"], plan["high_taus"]])] == pytest.approx(min(losses.values()), rel=1e-3)


def test_best_start_of_many_steps(tmp_path, short, monkeypatch):
    """40 steps below 404: with the power 2.5 equal ones are pushed apart."""
    monkeypatch.setattr(c, "BEST_OF", (None, 2.5))
    config = config_of(tmp_path, method="c2f", low=8, start="best", low_steps=2, steps=40, t_star=404)
    assert len(c.search(awake_net(low=8), config, CPU)["high_taus"]) == 40


@pytest.mark.parametrize("method, low", [("c2f", 0), ("c2f+trd", 0), ("base", 8), ("trd", 8)])
def test_a_method_for_the_other_kind_of_network(tmp_path, method, low):
    with pytest.raises(ValueError, match="--method .* needs a network of .*--checkpoint") as error:
        c.search(awake_net(low=low), config_of(tmp_path, method=method, low=low), CPU)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_plan_is_found_again(tmp_path, short, monkeypatch):
    """In --out, or beside the checkpoint; of the same options and the same network only."""
    net, config, search = awake_net(), config_of(tmp_path), c.search
    plan = json.loads(json.dumps(c.make_plan(net, config, CPU)))              # nothing there: searched
    monkeypatch.setattr(c, "search", lambda *args: "searched")
    assert c.make_plan(net, config, CPU) == plan
    (tmp_path / "out").rename(tmp_path / "run")
    assert c.make_plan(net, config, CPU) == plan
    for other in (dict(step=80), dict(solver="ddim"), dict(steps=4), dict(start="exclusive"), dict(method="base"),
                  dict(checkpoint="elsewhere/checkpoint.pt")):
        assert c.make_plan(net, dict(config, **other), CPU) == "searched", other
    for unused in (dict(low_steps=7), dict(t_star=9)):                        # of C2F only
        assert c.make_plan(net, dict(config, **unused), CPU) == plan
    names = {c.plan_name(dict(config, method="c2f", **other)) for other in ({}, dict(low_steps=7), dict(t_star=9))}
    assert len(names) == 3
    monkeypatch.setattr(c, "search", search)
    (tmp_path / "run" / c.plan_name(config)).write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="plan_trd_dpm2_inclusive_3.json is damaged"):
        c.make_plan(net, config, CPU)
