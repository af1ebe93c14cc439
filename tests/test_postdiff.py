"""postdiff.py against independent oracles: plain guidance, diffusers, a naive PostDiff, hand counts, exact denoisers.

Tests that compare with diffusers are skipped where it is not installed (`pip install diffusers==0.42.1`).
"""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import c2f_trd
import common
import postdiff as p
from common import count_macs, linear_alpha_bar
from in_process import start_script

ABAR = linear_alpha_bar(1000)
TAUS = [999, 800, 640, 500, 380, 250, 130, 40]
TEXT = torch.tensor([[1, 2] + 10 * [0], [3, 9, 4] + 9 * [0]])
NULL = torch.zeros_like(TEXT)
META = torch.device("meta")


def config_of(**changes):
    """A configuration of a tiny network, as load_data leaves it: 16x16, two levels, a vocabulary of nine words."""
    config = {key: option[0] for group in p.CONFIG.values() for key, option in group.items()}
    words = ["cat", "dog", "face", "flag", "heart", "house", "rainbow", "red", "tree"]
    return dict(config, ch=8, mult=[1, 2], attention=[0, 1], res=16, channels=3, precision="fp32", step=7, words=words,
                captions=["cat face", "rainbow flag", "red heart"]) | changes


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def awake_net(seed=0, **changes):
    """A net of random weights, biases and norms: no zero hides a path."""
    net = p.build_net(config_of(**changes)).eval().requires_grad_(False)
    for i, w in enumerate(net.parameters()):
        w.data = randn(*w.shape, seed=100 * seed + i) * (w[0].numel() ** -0.5 if w.dim() > 1 else 0.3)
    return net


def eps_net(net):
    """A network as mixed_resolution_sample takes it."""
    return p.model_of(net, config_of())


# ---------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------
@torch.no_grad()
def test_without_text_it_is_the_network_of_c2f_trd():
    net, xt, t = awake_net(), randn(2, 3, 16, 16), torch.tensor([5, 900])
    other = c2f_trd.build_net(config_of(low=0)).eval()
    mine = [w for name, w in net.named_parameters() if "text" not in name and not any(
        name.startswith(cross + ".") for cross, m in net.named_modules() if isinstance(m, p.CrossAttention))]
    for a, b in zip(other.parameters(), mine, strict=True):
        a.copy_(b)
    _, _, cross = net(xt, t, TEXT)
    silent = {layer: torch.zeros_like(out) for layer, out in cross.items()}
    assert torch.allclose(net(xt, t, TEXT, cross=silent)[0], other(xt, t), atol=1e-5)
    assert not torch.allclose(net(xt, t, TEXT)[0], other(xt, t), atol=1e-2)


@torch.no_grad()
def test_cross_attention_is_torchs():
    torch.manual_seed(0)
    layer, h, text, used = p.CrossAttention(8, 2), randn(2, 8, 4, 6), randn(2, p.WORDS, p.C_TEXT), {}
    theirs = torch.nn.MultiheadAttention(8, 1, kdim=p.C_TEXT, vdim=p.C_TEXT, batch_first=True)
    weights, biases = layer.kv.weight.chunk(2), layer.kv.bias.chunk(2)
    theirs.q_proj_weight.copy_(layer.q.weight[:, :, 0, 0])
    theirs.k_proj_weight.copy_(weights[0])
    theirs.v_proj_weight.copy_(weights[1])
    theirs.in_proj_bias.copy_(torch.cat([layer.q.bias, *biases]))
    theirs.out_proj.weight.copy_(layer.out.weight[:, :, 0, 0])
    theirs.out_proj.bias.copy_(layer.out.bias)
    expected = theirs(layer.norm(h).flatten(2).transpose(1, 2), text, text)[0].transpose(1, 2).reshape(h.shape)
    assert torch.allclose(layer(h, text, {}, used), h + expected, atol=1e-5)
    assert torch.allclose(used[layer], expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_shallow_pass_with_fresh_features_is_the_full_pass(depth):
    net, xt, t, ran = awake_net(), randn(2, 3, 16, 16), torch.tensor([5, 900]), []
    for name, stages in (("down", net.encoder.down), ("up", net.decoder.up), ("mid", [net.encoder.mid])):
        for i, stage in enumerate(stages):
            stage[0].register_forward_hook(lambda *a, tag=(name, i): ran.append(tag))
    full, deep, cross = net(xt, t, TEXT, depth=depth)
    n = len(net.decoder.up)
    assert len(ran) == 2 * n and len(cross) == 7
    ran.clear()
    shallow, again, used = net(xt, t, TEXT, deep=deep, depth=depth)
    assert ran == [("down", i) for i in range(depth)] + [("up", n - 1 - depth + i) for i in range(depth + 1)]
    assert torch.equal(full, shallow) and torch.equal(again, deep) and set(used) < set(cross)
    assert not torch.equal(full, net(xt, t, TEXT, deep=deep + 1, depth=depth)[0])


@torch.no_grad()
def test_frozen_cross_attention():
    net, xt, t = awake_net(), randn(2, 3, 16, 16), torch.tensor([5, 900])
    full, _, cross = net(xt, t, TEXT)
    assert torch.equal(net(xt, t, TEXT, cross=cross)[0], full)
    assert torch.equal(net(xt, t, NULL, cross=cross)[0], full)                 # the text matters no more
    assert not torch.equal(net(xt, t, NULL)[0], full)
    _, _, resized = net(randn(2, 3, 32, 32, seed=1), t, TEXT, cross=cross)     # made at 16, used at 32
    for layer, out in resized.items():
        expected = F.interpolate(cross[layer], scale_factor=2, mode="bilinear", align_corners=False)
        assert out.shape[-1] == 2 * cross[layer].shape[-1] and torch.equal(out, expected)


def test_network_sees_its_whole_input():
    torch.manual_seed(0)
    net, xt = p.build_net(config_of()), randn(2, 3, 16, 16).requires_grad_()
    net(xt, torch.tensor([500, 500]), TEXT)[0][:, 0, 8, 8].sum().backward()
    assert (xt.grad != 0).all()
    rows = net.text.word.weight.grad.abs().sum(1)
    assert (rows[[0, 1, 2, 3, 4, 9]] > 0).all() and (rows[5:9] == 0).all()
    assert all(w.grad is not None for w in net.parameters())


def macs_by_hand(ch, mult, blocks, attention, res, depth=None, frozen=False, batch=1):
    """Multiply-accumulates of a pass of the network (depth: a shallow one) from its sizes alone."""
    time, L, C = 4 * ch, p.WORDS, p.C_TEXT

    def block(c_in, c, r):
        return r * r * (9 * c * (c_in + c) + (c_in * c if c_in != c else 0)) + time * c

    def attend(c, r):
        cross = 0 if frozen else 2 * r * r * c * c + L * C * 2 * c + 2 * r * r * L * c
        return 4 * r * r * c * c + 2 * r ** 4 * c + cross

    down, up, c, widths, r = [], [], ch, [ch], res
    for level, m in enumerate(mult):
        for _ in range(blocks):
            down.append(block(c, ch * m, r) + (attend(ch * m, r) if level in attention else 0))
            c = ch * m
            widths.append(c)
        if level < len(mult) - 1:
            r //= 2
            down.append(r * r * 9 * c * c)
            widths.append(c)
    mid = 2 * block(c, c, r) + attend(c, r)
    for level, m in reversed(list(enumerate(mult))):
        for i in range(blocks + 1):
            up.append(block(c + widths.pop(), ch * m, r) + (attend(ch * m, r) if level in attention else 0))
            c = ch * m
            if level > 0 and i == blocks:
                r *= 2
                up[-1] += r * r * 9 * c * c
    ends = 2 * res * res * 9 * 3 * ch + ch * time + time * time
    parts = sum(down) + mid + sum(up) if depth is None else sum(down[:depth]) + sum(up[-1 - depth:])
    return batch * (ends + parts)


def meta_net(config):
    """A network on the meta device without its norms, which cost no MACs but most of the time of counting."""
    with META:
        net = p.build_net(config).eval()
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    return net


SIZES = [dict(ch=8, mult=[1, 2], blocks=1, attention=[0, 1]), dict(ch=16, mult=[1, 3, 2], blocks=2, attention=[1])]


@pytest.mark.parametrize("sizes", SIZES)
def test_macs_of_a_pass_by_hand(sizes):
    """A hit of the cache skips what it is said to skip, to the operation."""
    net = meta_net(config_of(**sizes))
    with META:
        xt, t, text = torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, p.WORDS, dtype=torch.long)
    full, last = macs_by_hand(**sizes, res=16), len(net.encoder.down)
    assert count_macs(net, xt, t, text) == full
    for depth in (0, 1, last):
        _, deep, cross = net(xt, t, text, depth=depth)
        assert count_macs(net, xt, t, text, deep, None, depth) == macs_by_hand(**sizes, res=16, depth=depth) < full
    assert count_macs(net, xt, t, text, None, cross) == macs_by_hand(**sizes, res=16, frozen=True) < full


@pytest.mark.parametrize("method", ["base", "mixed", "cache", "postdiff"])
def test_macs_of_a_plan_by_hand(method):
    """generate on the meta device: 8 steps, 4 of them low, full at 0, 2, 4, 6 (guidance ends), guided up to 5."""
    sizes = SIZES[0]
    config = config_of(**sizes, steps=8, method=method)
    plan, net = p.plan_of(config), meta_net(config)
    mixed, cached, expected = method in ("mixed", "postdiff"), method in ("cache", "postdiff"), 0
    for i in range(8):
        late = cached and i >= 6
        expected += macs_by_hand(
            **sizes, res=8 if mixed and i < 4 else 16, depth=1 if cached and i % 2 else None, frozen=late,
            batch=1 if late else 2)
    assert count_macs(lambda: p.generate(net, config, plan, [0], "meta")) == expected


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
    net = eps_net(awake_net())
    expected = c2f_trd.dpm_solver_pp_sample(guided(net), randn(2, 3, 16, 16), TAUS, ABAR, order)
    for off in ({}, dict(n_guided=8, k=1, depth=0, choice="cfg", n_low=0)):
        assert torch.equal(p.mixed_resolution_sample(net, **options(order=order, **off)), expected)
    for on in (dict(n_low=1), dict(k=2), dict(n_guided=7), dict(w=1.0)):
        found = p.mixed_resolution_sample(net, **options(order=order, **on))
        assert found.shape == expected.shape and found.isfinite().all() and not torch.equal(found, expected)
    alone = c2f_trd.dpm_solver_pp_sample(lambda xt, t: net(xt, t, TEXT)[0], randn(2, 3, 16, 16), TAUS, ABAR, order)
    for off in (dict(n_guided=0, choice="none"), dict(w=None)):    # without guidance at all
        assert torch.equal(p.mixed_resolution_sample(net, **options(order=order, **off)), alone)


@torch.no_grad()
def test_base_is_plain_sampling():
    """--method base, through generate: noise, text and steps of the command line."""
    net, config = awake_net(), config_of(method="base", steps=5, prompt=["Cat!", "red tree"], w=2.0)
    text = torch.tensor([[1] + 11 * [0], [8, 9] + 10 * [0]])
    noise = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in (4, 5)])

    def eps_model(xt, t):
        a = ABAR[t].float().view(-1, 1, 1, 1)
        x0_hat = [net(xt, t, words)[0] for words in (0 * text, text)]
        x0_hat = x0_hat[0] + 2 * (x0_hat[1] - x0_hat[0])
        return (xt - a.sqrt() * x0_hat) / (1 - a).sqrt()

    expected = c2f_trd.dpm_solver_pp_sample(eps_model, noise, [999, 799, 599, 399, 199], ABAR, order=1)
    found = p.generate(net, config, p.plan_of(config), [4, 5], "cpu")
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("order", [1, 2])
def test_mixed_resolution_is_two_plain_runs(order):
    """n low steps; x0_hat of the last one, up-sampled, noised to the next step; a new history from there (D2, D3)."""
    net, n, seen = eps_net(awake_net()), 3, []
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
    """D4, D6: | the size changes, ! guidance ends and cross-attentions are frozen, ? it ends and they are not."""
    calls, size, batch, frozen, wanted = [], 8 if n_low else 16, 4, 0, []
    for c in expected:
        if c == "|":
            size = 16
        elif c in "!?":
            batch, frozen = 2, 2 * (c == "!")
        else:
            wanted.append((batch, size, c == "F", frozen))
    p.mixed_resolution_sample(spy(calls), **options(taus=p.uniform_steps(999, K), n_low=n_low, k=k, n_guided=n_guided,
                                                    choice=choice))
    assert calls == wanted


@torch.no_grad()
@pytest.mark.parametrize("choice, depth", [("cond", 1), ("cond", 2), ("uncond", 1), ("ave", 1), ("cfg", 1)])
def test_caches_against_a_naive_sampler(choice, depth):
    """DeepCache and the frozen cross-attention written out step by step, with a net whose caches are real."""
    net, m, w, kept = eps_net(awake_net()), 5, 2.5, None
    text2, xt, latest = torch.cat([NULL, TEXT]), randn(2, 3, 16, 16), {}
    for i, tau in enumerate(TAUS):
        t = torch.full((2,), tau)
        if i < m:
            x2, t2 = torch.cat([xt, xt]), torch.cat([t, t])
            eps, kept, used = net(x2, t2, text2, deep=None if i % 2 == 0 else kept, depth=depth)
            latest.update(used)
            eps = eps[:2] + w * (eps[2:] - eps[:2])
        else:
            if i == m:
                frozen = {j: {"cond": o[2:], "uncond": o[:2], "ave": 0.5 * (o[:2] + o[2:]),
                              "cfg": o[:2] + w * (o[2:] - o[:2])}[choice] for j, o in latest.items()}
            eps, kept, _ = net(xt, t, TEXT, deep=None if (i - m) % 2 == 0 else kept, cross=frozen, depth=depth)
        a, b = float(ABAR[tau]), float(ABAR[[*TAUS, -1][i + 1]])
        x0 = (xt - (1 - a) ** 0.5 * eps) / a ** 0.5
        xt = b ** 0.5 * x0 + (1 - b) ** 0.5 * eps
    found = p.mixed_resolution_sample(net, **options(k=2, n_guided=m, choice=choice, depth=depth))
    assert float((found - xt).norm() / xt.norm()) < 1e-3


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
    found = p.mixed_resolution_sample(exact_net(images), randn(5, 3, 16, 16), p.uniform_steps(999, 12), ABAR, text,
                                      0 * text, 1.5, low_noise=randn(5, 3, 8, 8, seed=1), order=order, **more)
    assert torch.allclose(found, images, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("solver, K", [("ddim", 5), ("dpm2", 5), ("dpm2", 20)])
def test_solvers_are_diffusers(solver, K):
    """The off switch against diffusers' schedulers on their own trailing steps, which are ours (D1)."""
    diffusers = pytest.importorskip("diffusers")
    more = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                timestep_spacing="trailing")
    ddim = diffusers.DDIMScheduler(set_alpha_to_one=True, clip_sample=False, **more)
    ddim.set_timesteps(K)
    taus = p.uniform_steps(999, K)
    assert ddim.timesteps.tolist() == taus
    if solver == "dpm2":
        scheduler = diffusers.DPMSolverMultistepScheduler(**more, lower_order_final=True, final_sigmas_type="zero")
        scheduler.set_timesteps(timesteps=taus)
    else:
        scheduler = ddim
    net = eps_net(awake_net())
    x = randn(2, 3, 16, 16)
    for t in scheduler.timesteps:
        x = scheduler.step(guided(net)(x, t.expand(2)), t, x).prev_sample
    found = p.mixed_resolution_sample(net, **options(taus=taus, order=p.ORDER[solver]))
    assert float((found - x).norm() / x.norm()) < 1e-3


@torch.no_grad()
def test_the_cache_is_a_value():
    """The same cache given twice gives the same result: nothing is kept in the net, nothing changed in the cache."""
    net, xt, t = eps_net(awake_net()), randn(2, 3, 16, 16), torch.tensor([700, 700])
    _, cache = p.cached_eps(net, xt, t, TEXT, NULL, 2.0, p.EMPTY, k=2)
    later = t - 100
    first = p.cached_eps(net, xt, later, TEXT, NULL, 2.0, cache, k=2)[0]
    p.cached_eps(net, randn(2, 3, 8, 8), later, TEXT, NULL, 2.0, cache, k=2)
    assert torch.equal(p.cached_eps(net, xt, later, TEXT, NULL, 2.0, cache, k=2)[0], first)
    assert p.EMPTY == dict(size=None, age=0, deep=None, last={}, frozen={})


def test_choose_by_hand():
    out = torch.tensor([[1.0], [2.0], [10.0], [20.0]])                         # null, null, text, text
    for choice, expected in (("cond", [10, 20]), ("uncond", [1, 2]), ("ave", [5.5, 11]), ("cfg", [28, 56])):
        assert p.choose(out, choice, 3.0)[:, 0].tolist() == expected
    cache = dict(p.EMPTY, last={0: out})
    assert p.freeze_cross(cache, "ave", 3.0)["frozen"][0][:, 0].tolist() == [5.5, 11]
    assert p.freeze_cross(cache, "ave", None)["frozen"][0] is out              # without guidance no pairs (D8)


def test_samples_do_not_depend_on_the_batch():
    net, config = awake_net(), config_of(steps=6)
    plan = p.plan_of(config)
    assert plan["n_low"] == 3 and plan["n_guided"] == 5 and plan["k"] == 2
    some = p.generate(net, config, plan, range(3, 7), "cpu")
    one = p.generate(net, config, plan, [5], "cpu")
    assert float((some[2:3] - one).norm() / one.norm()) < 1e-4


@pytest.mark.parametrize("bad", [dict(n_low=8), dict(n_low=-1), dict(n_guided=9), dict(n_guided=-1), dict(k=0),
                                 dict(k=1.5), dict(choice="best"), dict(taus=[5, 5]), dict(taus=[1, 2]), dict(taus=[]),
                                 dict(n_low=2, low_noise=None), dict(alpha_bar=ABAR[:-1])])
def test_bad_numbers(bad):
    with pytest.raises(ValueError):
        p.mixed_resolution_sample(spy([]), **options(**bad))


# ---------------------------------------------------------------------------------------------
# Plans, calibration
# ---------------------------------------------------------------------------------------------
GRID = {8: "12.168 11.029 9.891 9.891 8.752 7.614 6.475", 10: "15.210 14.071 12.933 11.794 10.656 9.517 8.379",
        12: "18.252 17.113 15.975 13.698 12.559 11.421 10.282", 14: "21.294 20.155 17.878 16.740 14.463 13.324 12.186",
        16: "24.336 22.059 20.920 18.643 17.505 15.228 12.951", 18: "27.378 25.101 22.824 21.685 19.408 17.131 14.854",
        20: "30.420 28.143 25.866 23.589 21.312 19.035 16.758"}


@pytest.mark.parametrize("K", GRID)
def test_number_of_low_steps(K):
    """D1, Fig. 4's grid at beta = 1/2, s = 0 ... 0.6: 2 [(K - n) F + n f] with F, f of one pass in T."""
    for i, expected in enumerate(GRID[K].split()):
        plan = p.plan_of(config_of(res=96, mult=[1, 2, 4, 4], method="mixed", steps=K, s=i / 10))
        n = plan["n_low"]
        assert 2 * ((K - n) * 0.76049 + n * 0.19125) == pytest.approx(float(expected), abs=2e-3)
        assert plan["low"] == 48 and plan["taus"] == p.uniform_steps(999, K)


def test_settings_of_a_plan():
    plan = {method: p.plan_of(config_of(method=method, choice="ave")) for method in p.CONFIG["method"]["method"][1]}
    assert [(q["n_low"], q["k"], q["n_guided"], q["choice"]) for q in plan.values()] == [
        (0, 1, 20, "none"), (10, 1, 20, "none"), (0, 2, 15, "ave"), (10, 2, 15, "ave")]
    for m, n in ((0.45, 9), (0.6, 12), (0.75, 15), (0.9, 18), (0.0, 0), (1.0, 20), (0.125, 3), (0.12, 2)):   # Table 5
        assert p.plan_of(config_of(m=m))["n_guided"] == n
    assert p.plan_of(config_of(beta=0.75))["low"] == 12
    with pytest.raises(ValueError, match="multiple of 2"):
        p.plan_of(config_of(beta=0.45))
    assert p.plan_of(config_of(beta=0.45, method="cache"))["n_low"] == 0       # has no beta


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


def test_search_finds_a_planted_optimum(tmp_path, monkeypatch, capsys):
    """Images that say which plan made them, and a score that likes 8 steps, 2 of them low; it is used again.
    Costs: a step 1 of 20, a low one a quarter of that; 7 plans are within .4."""
    config = config_of(out=str(tmp_path), checkpoint=str(tmp_path / "x" / "weights.pt"), steps=0, data="emoji", seed=0,
                       n=2, prompt=["zebra"], k=3, precision="bf16")   # the meta device has no autocast
    extractor, asked = torch.nn.Identity(), []
    extractor.patch = 2

    def paint(net, config, plan, seeds, device):
        asked.append((len(plan["taus"]), plan["n_low"]))
        assert config["prompt"] == [""] and len(seeds) == p.CALIBRATION and min(seeds) >= 10 ** 9
        return torch.full((2, 3, 16, 16), 10 * len(plan["taus"]) + plan["n_low"], dtype=torch.uint8)

    def judge(extractor, embeddings, captions):
        assert len(captions) == p.CALIBRATION and "red heart" in captions and embeddings.shape[-1] == 64
        return -abs(int(embeddings[0, 0, 0, 0]) - 82)

    def cost(net, config, plan, seeds, device):
        assert device == "meta" and next(net.parameters()).is_meta and config["precision"] == "fp32"
        return len(plan["taus"]) - 0.75 * plan["n_low"]

    monkeypatch.setattr(p, "generate", cost)
    monkeypatch.setattr(p, "count_macs", lambda fn: fn())
    monkeypatch.setattr(p, "load_extractor", lambda data, device: (extractor, "planted"))
    monkeypatch.setattr(p, "sample", paint)
    monkeypatch.setattr(p, "extract", lambda extractor, x: (None, x))
    monkeypatch.setattr(p, "caption_score", judge)
    net = awake_net()
    plan = p.search(net, config, torch.device("cpu"))
    assert (len(plan["taus"]), plan["n_low"]) == (8, 2) and plan["k"] == 3 and plan["step"] == 7
    assert asked == [(6, 0), (6, 2), (6, 3), (8, 0), (8, 2), (8, 4), (12, 6)]
    assert "% of the MACs, caption score[planted]" in capsys.readouterr().out
    n = len(asked)
    assert p.make_plan(net, config, "cpu") == plan == json.loads((tmp_path / p.plan_name(config)).read_text())
    assert len(asked) == n                                     # found, not searched
    p.make_plan(net, dict(config, step=8), "cpu")              # of another network
    assert len(asked) == 2 * n
    assert p.make_plan(net, dict(config, steps=6), "cpu") == p.plan_of(dict(config, steps=6))


# ---------------------------------------------------------------------------------------------
# Words, data, loss
# ---------------------------------------------------------------------------------------------
def test_words_of_a_prompt():
    assert p.words_of("Rainbow Flag!") == ["rainbow", "flag"] and p.words_of("  ") == []
    assert p.words_of("twelve o'clock, T-shirt_top (2)") == ["twelve", "oclock", "t", "shirt", "top", "2"]
    words = ["cat", "face", "red"]
    rows, left_out = p.encode(["Red CAT.", "cat zork face zork", "", "quux"], words)
    assert rows.shape == (4, p.WORDS) and left_out == ["zork", "quux"]
    assert [[n for n in row if n] for row in rows.tolist()] == [[3, 1], [1, 2], [], []]
    rows, left_out = p.encode(["cat " * p.WORDS + "face"], words)
    assert rows.tolist() == [p.WORDS * [1]] and left_out == ["face"]


def test_captions_of_seeds():
    config = config_of(captions=[str(i) for i in range(1910)])
    assert sorted(map(int, p.captions_of(config, range(1910)))) == list(range(1910))       # each once in a round
    first = sorted(map(int, p.captions_of(config, range(16))))
    assert max(b - a for a, b in zip([0, *first], [*first, 1910])) < 4 * 1910 / 16         # spread
    assert p.captions_of(dict(config, prompt=["a", "b"]), range(1, 4)) == ["b", "a", "b"]


def test_prompts(capsys):
    net = awake_net()
    config = config_of(steps=2, prompt=["Red Heart!", "a b c d e f cat"], method="base")
    images = p.generate(net, config, p.plan_of(config), [0, 1], "cpu")
    assert "left out, unknown or beyond 12 words: a, b, c, d, e\n" in capsys.readouterr().err
    same = p.generate(net, dict(config, prompt=["red heart", "cat"]), p.plan_of(config), [0, 1], "cpu")
    assert torch.equal(images, same) and capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="no word that this network knows"):
        p.generate(net, dict(config, prompt=["cat", "?!"]), p.plan_of(config), [0, 1], "cpu")


@pytest.fixture(scope="module")
def emoji():
    config = config_of(data="emoji", res=32)
    del config["words"]
    return config, *p.load_data(config)


def test_emoji(emoji):
    config, x, y = emoji
    big, y_big, captions = common.load_images("emoji")
    assert x.shape == (3821, 3, 32, 32) and torch.equal(y, y_big) and config["captions"] == captions
    assert abs(float(big[9, 1, 20:22, 40:42].float().mean()) - int(x[9, 1, 10, 20])) <= 0.5    # area averages
    assert config["channels"] == 3 and len(config["words"]) == len({w for s in captions for w in s.split()})
    for prompt in ("cat face", "rainbow flag", "red heart", "Rainbow Flag!"):
        assert p.encode([prompt], config["words"])[1] == []
    assert p.encode(captions, config["words"])[1] == []        # no caption is too long
    with pytest.raises(ValueError, match="24"):
        p.load_data(dict(config, res=24))
    with pytest.raises(ValueError, match="multiple of 64"):
        p.load_data(dict(config, mult=[1] * 6, low_share=0.5))


def test_a_batch(emoji):
    config, x, y = emoji
    torch.manual_seed(0)
    x0, t, eps, text = p.draw_batch(dict(config, batch=400), x, y, 1)
    assert x0.shape == eps.shape == (400, 3, 32, 32) and text.shape == (400, p.WORDS) and t.max() > 900 > 100 > t.min()
    dropped = (text == 0).all(1)
    assert 0.05 < dropped.float().mean() < 0.16
    words = ["", *config["words"]]
    for i in (~dropped).nonzero()[:40, 0].tolist():            # a caption is that of its image
        shown = " ".join(words[n] for n in text[i] if n)
        mine = [j for j in range(len(y)) if config["captions"][y[j]] == shown]
        assert min(float((common.to_float(x[j]) - x0[i]).abs().max()) for j in mine) < 1e-6


def test_batches_of_the_fixed_schedule(emoji):
    """Appendix F (D12): low for the first s of the steps, full for the others."""
    config, x, y = emoji
    config, seen = dict(config, batch=50, low_share=0.3), []
    for step in range(200):
        torch.manual_seed(step)
        x0, t, eps, _ = p.draw_batch(config, x, y, step)
        assert x0.shape == eps.shape and x0.shape[-1] in (16, 32)
        assert (t >= 700).all() if x0.shape[-1] == 16 else (t < 700).all()
        seen.append(x0.shape[-1])
    assert 0.2 < seen.count(16) / 200 < 0.4


def test_smallest_share_of_the_schedule(emoji, monkeypatch):
    """A share of less than a step still has one: t = T - 1 in the low batches."""
    config, x, y = emoji
    monkeypatch.setattr(torch, "rand", lambda size: torch.zeros(size))         # every batch is low
    x0, t, _, _ = p.draw_batch(dict(config, batch=5, low_share=1e-4), x, y, 0)
    assert x0.shape[-1] == 16 and (t == p.T - 1).all()


def test_words_come_with_the_checkpoint(tmp_path):
    """--init: its words, though the new data have others."""
    (tmp_path / "a" / "blue cat").mkdir(parents=True)
    (tmp_path / "a" / "red zork").mkdir()
    for i, name in enumerate(("blue cat", "red zork")):
        Image.new("RGB", (20, 30), (80 * i, 9, 0)).save(tmp_path / "a" / name / "1.png")
    config = config_of(data=str(tmp_path / "a"))
    torch.save(dict(script="postdiff", config=config, step=1, ema={}), tmp_path / "old.pt")
    old = config.pop("words")
    p.load_data(config)
    assert config["words"] == ["blue", "cat", "red", "zork"] and config["captions"] == ["blue cat", "red zork"]
    config.pop("words")
    p.load_data(dict(config, init=str(tmp_path / "old.pt")))
    assert p.load_data(other := dict(config, init=str(tmp_path / "old.pt"))) and other["words"] == old
    Image.new("RGB", (20, 30)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="no captions"):
        (tmp_path / "b").mkdir()
        (tmp_path / "1.png").rename(tmp_path / "b" / "1.png")
        p.load_data(config_of(data=str(tmp_path / "b")))


def test_eps_of_x0_and_loss():
    """The noise comes back from the clean image; the loss is that of v, but for sigma below 0.1 (D16)."""
    t = torch.tensor([0, 1, 50, 500, 999])
    x0, eps, wrong = (randn(5, 3, 8, 8, seed=i) for i in range(3))
    xt = common.add_noise(x0, eps, t, ABAR)
    assert torch.allclose(p.eps_of_x0(x0, xt, t, ABAR), eps, atol=1e-3)
    a = ABAR[t].view(-1, 1, 1, 1)
    v, v_hat = a.sqrt() * eps - (1 - a).sqrt() * x0, (a.sqrt() * xt - wrong) / (1 - a).sqrt()
    errors = (v_hat - v).square().flatten(1).mean(1)
    assert (1 - ABAR[1]).sqrt() < 0.1 < (1 - ABAR[50]).sqrt()
    for i in range(5):
        one = slice(i, i + 1)
        loss = p.training_loss(lambda *inputs: (wrong[one], None, {}), None, x0[one], t[one], eps[one], None)
        share = min(1, float(1 - a[i]) / 0.01)
        assert float(loss) == pytest.approx(float(errors[i]) * share, rel=1e-3)


def test_it_learns_what_words_say():
    """Two flat images with a word each: after a second of training, guidance draws the word's."""
    torch.manual_seed(0)
    config = config_of(words=["black", "white"], captions=["black", "white"], batch=8, mult=[1, 1], attention=[1],
                       res=8, channels=1, steps=8, method="base", w=1.0)
    x, y = torch.tensor([20, 235], dtype=torch.uint8).view(2, 1, 1, 1).expand(-1, 1, 8, 8), torch.tensor([0, 1])
    net = p.build_net(config)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(70):
        loss = p.training_loss(net, config, *p.draw_batch(config, x, y, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for method in ("base", "postdiff"):
        chosen = dict(config, method=method, prompt=["black", "white", "White!", "BLACK"])
        images = p.sample(net.eval(), chosen, p.plan_of(chosen), range(8), "cpu").float().mean((1, 2, 3))
        assert ((images > 128) == torch.tensor([0, 1, 1, 0] * 2).bool()).all(), (method, images)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------
def test_command_line(tmp_path):
    for i, name in enumerate(("blue cat", "red dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for j in range(2):
            Image.new("RGB", (16, 16), (99 * i, 40 * j, 0)).save(tmp_path / "data" / name / f"{j}.png")
    out = tmp_path / "run"
    train = ("--train", "--data", tmp_path / "data", "--res", 16, "--ch", 8, "--mult", 1, 2, "--batch", 4, "--iters", 2,
             "--out", out)
    run = start_script(p, *train, "--sample", "--n", 3, "--prompt", "Red CAT!", "blue zork", "--steps", 4)
    assert run.code == 0, run.err
    assert "3 images" in run.out and "zork" in run.err and (out / "preview.png").is_file()
    assert "postdiff, ddim: [999, 749, 499, 249], 2 at size 8; k 2; 3 guided by 3.0, then cond" in run.out
    images = Image.open(out / "samples.png")
    for more, code, told in (((), 0, "3 images"), (("--method", "base", "--solver", "dpm2"), 0, "base, dpm2"),
                             (("--prompt", "zork"), 1, "no word"), (("--s", 0.99), 1, "n_low 20"),
                             (("--choice", "best"), 1, "choose from"), (("--beta", 0.3), 1, "multiple of 2"),
                             (("--steps", 0), 1, "no small extractor")):
        run = start_script(p, "--sample", "--out", out, "--n", 3, *more)
        assert run.code == code and told in run.out + run.err, (more, run.out, run.err)
        assert "Traceback" not in run.err
    assert images.mode == "RGB"
    tuned = start_script(p, "--train", "--init", out / "checkpoint.pt", "--low-share", 0.5, "--iters", 2, "--batch", 4,
                         "--data", tmp_path / "data", "--res", 16, "--out", tmp_path / "tuned")
    assert tuned.code == 0, tuned.err
    saved = torch.load(tmp_path / "tuned" / "weights.pt", weights_only=True)
    assert saved["config"]["words"] == ["blue", "cat", "dog", "red"] and math.isclose(saved["config"]["low_share"], 0.5)


def test_a_prompt_is_for_samples():
    config = dict(method="base", given={"prompt"}, prompt=["cat"], n=2, steps=4, search=True, sample=False)
    with pytest.raises(ValueError, match="--prompt: with --sample, at most --n 2"):
        p.check_options(config)
    p.check_options(dict(config, sample=True, search=False))
