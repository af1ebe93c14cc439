"""variants/c2f_trd_strategies.py, postdiff_lcm.py, postdiff_dit.py against oracles of their own, and by command."""
import importlib
import math

import pytest
import torch
import torch.nn.functional as F

import c2f_trd
import common
import postdiff
from common import count_macs, linear_alpha_bar
from in_process import start_script

strategies, lcm, dit = (importlib.import_module(f"variants.{name}") for name in (
    "c2f_trd_strategies", "postdiff_lcm", "postdiff_dit"))
ABAR = linear_alpha_bar(1000)
TRAIN = "--train --data fashion10k --batch 8 --precision fp32 --save-every 2 --iters 4".split()
SMALL = dict(res=32, ch=8, mult=[1, 2], blocks=1, attention=[1], patch=2, channels=1, precision="fp32")
PAPER = dict(channels=3, res=32, ch=128, mult=[1, 2, 2, 2], blocks=2, attention=[1], patch=1, low=16)
WORDS = [f"word{i}" for i in range(9)]
TEXT = torch.tensor([[1, 2] + 10 * [0], [3, 9, 4] + 9 * [0]])
NULL = torch.zeros_like(TEXT)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awake(net):
    """Random weights, biases and norms: no zero hides a path."""
    for i, w in enumerate(net.eval().requires_grad_(False).parameters()):
        w.data = randn(*w.shape, seed=i) * (w[0].numel() ** -0.5 if w.dim() > 1 else 0.3)
    return net


def config_of(module, **changes):
    config = {key: option[0] for group in module.script.CONFIG.values() for key, option in group.items()}
    return {**config, "precision": "fp32", "channels": 3, "words": WORDS, "captions": WORDS, **changes}


def good(module, *argv):
    result = start_script(module, *argv)
    assert result.code == 0, result.err
    return result


def refused(module, words, *argv):
    result = start_script(module, *argv)
    assert result.code == 1 and words in result.err and result.err.count("\n") == 1, result.err


def load(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def interrupted_equals_uninterrupted(module, out, folder, *options):
    """A run that was stopped half way, then resumed, gives the bits of the run in `out`."""
    begun, short, whole = module.script.train, [], load(out)
    original = module.script.save_run

    def stop_at_2(script, config, step, *more):
        original(script, config, step, *more)
        if step == 2 and not short:
            short.append(step)
            raise ValueError("stopped")

    module.script.save_run = stop_at_2
    try:
        refused_code = start_script(module, *TRAIN, *options, "--out", folder).code
    finally:
        module.script.save_run = original
    assert refused_code == 1 and load(folder)["step"] == 2 and begun is module.script.train
    good(module, "--train", "--resume", "--out", folder)
    resumed = load(folder)
    assert resumed["step"] == 4 and all(equal(resumed[key], whole[key]) for key in ("net", "ema"))


def test_variants_leave_the_scripts_alone():
    assert (c2f_trd.SCRIPT, postdiff.SCRIPT) == ("c2f_trd", "postdiff")
    assert "strategy" not in c2f_trd.CONFIG["network"] and "skip" not in postdiff.CONFIG["training"]
    assert not issubclass(lcm.UNet, postdiff.UNet) and postdiff.CONFIG["method"]["k"][0] == 2


# ---------------------------------------------------------------------------------------------
# C2F-TRD: Table I
# ---------------------------------------------------------------------------------------------
def net_of(strategy, base, **config):
    config = dict(SMALL, low=16, strategy=strategy, **config)
    net = strategies.build_net(config).eval()
    state = strategies.first_weights(base.state_dict(), strategy, config["patch"])
    assert set(net.load_state_dict(state, strict=False).missing_keys) == ({"label.weight"} if strategy == "label"
                                                                          else set())
    return net


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("strategy, sides", [("label", (16, 32)), ("xy", (16, 32)), ("2T", (32,)), ("2dms", (16, 32))])
@torch.no_grad()
def test_finetuning_starts_from_the_base_model(strategy, sides, patch):
    base = awake(c2f_trd.build_net(dict(SMALL, low=0, patch=patch, channels=3)))
    net, t = net_of(strategy, base, patch=patch, channels=3), torch.tensor([7, 900])
    for side in sides:
        xt, y = randn(2, 3, side, side), torch.full((2,), int(side == 32))
        assert torch.allclose(net(xt, t, y), base(xt, t), atol=1e-5)
    weight = base.encoder.conv_in.weight.clone()
    for w in net.parameters():
        w.add_(1)
    assert torch.equal(base.encoder.conv_in.weight, weight)                    # a copy, not the same tensor


@torch.no_grad()
def test_2T_moves_low_resolution_to_later_steps():
    base = awake(c2f_trd.build_net(dict(SMALL, low=0)))
    net, t = net_of("2T", base), torch.tensor([7, 900])
    low, high = randn(2, 1, 16, 16), randn(2, 1, 32, 32)
    for xt, s in ((high, t), (low, t + 1000)):
        assert torch.allclose(net(xt, t), base(xt, s), atol=1e-5)
    assert not torch.allclose(base(low, t), base(low, t + 1000), atol=1e-3)


@pytest.mark.parametrize("side", [2, 4])
@torch.no_grad()
def test_xy_are_pixel_centres(side):
    net = strategies.build_net(dict(SMALL, patch=1, mult=[1], attention=[], low=16, strategy="xy"))
    seen, xt = [], randn(2, 1, side, side)
    net.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(xt, torch.tensor([1, 2]))
    centres = {2: [-0.5, 0.5], 4: [-0.75, -0.25, 0.25, 0.75]}[side]
    x = torch.tensor(centres).expand(2, side, side)                            # x grows to the right
    assert torch.equal(seen[0], torch.cat([xt, x[:, None], x.transpose(1, 2)[:, None]], 1))
    assert torch.equal(strategies.coordinates(2, 4, xt)[:, 1, 3], torch.tensor([0.75, 0.5]))


def test_parameters_and_macs_of_the_paper():
    base = 35_746_307
    for strategy, size in (("label", base + 2 * 512), ("2T", base), ("2dms", 2 * base), ("xy", base + 2_304)):
        with torch.device("meta"):
            net = strategies.build_net(dict(PAPER, strategy=strategy))
        assert sum(p.numel() for p in net.parameters()) == size
    with torch.device("meta"):                                                 # of xy: 128 x 2 more 3x3 filters
        macs = count_macs(net, torch.zeros(1, 3, 32, 32), torch.zeros(1).long(), torch.ones(1).long())
    assert macs == 6_221_856_768 + 9 * 2 * 128 * 32 ** 2


@pytest.mark.parametrize("strategy", ["xy", "2dms"])
def test_macs_of_the_sampler_are_those_of_its_passes(strategy):
    config = dict(SMALL, low=16, strategy=strategy)
    with torch.device("meta"):
        net = strategies.build_net(config)
        low, high = (count_macs(net, torch.zeros(1, 1, r, r), torch.zeros(1).long(), torch.ones(1).long())
                     for r in (16, 32))
    plan = dict(solver="dpm2", low_taus=[999, 700], high_taus=[565])
    assert count_macs(strategies.script.generate, net, config, plan, [0], "meta") == 2 * low + high


def test_what_each_strategy_trains_on():
    x, y = torch.zeros(9, 1, 32, 32, dtype=torch.uint8), torch.zeros(9)
    for strategy in strategies.CHOICES:
        sides = [strategies.draw_batch(dict(SMALL, low=16, batch=2, flip=0, strategy=strategy), x, y, step)[0].shape[-1]
                 for step in (1, 2, 3, 4)]
        assert sides == ([16] * 4 if strategy == "2dms" else [16, 32, 16, 32])


@pytest.fixture(scope="module")
def base_of_c2f(tmp_path_factory):
    path = tmp_path_factory.mktemp("c2f") / "base.pt"
    torch.manual_seed(0)
    config = dict({k: v for k, v in SMALL.items() if k != "precision"}, low=0)
    torch.save(dict(script="c2f_trd", config=config, step=5, ema=c2f_trd.build_net(config).state_dict()), path)
    return path


@pytest.mark.parametrize("strategy", strategies.CHOICES)
def test_strategies_by_command(base_of_c2f, tmp_path, strategy):
    options = ["--init", base_of_c2f, "--low", 16, "--strategy", strategy]
    good(strategies, *TRAIN, *options, "--out", tmp_path / "run")
    saved, base = load(tmp_path / "run"), load(base_of_c2f.parent, "base.pt")["ema"]
    assert saved["script"] == "c2f_trd_strategies" and saved["config"]["strategy"] == strategy and saved["step"] == 4
    if strategy == "2dms":
        for part in (saved["ema"], saved["net"]):
            assert equal({k[5:]: v for k, v in part.items() if k.startswith("high.")}, base)
            assert not equal({k[4:]: v for k, v in part.items() if k.startswith("low.")}, base)
    if strategy == "xy":
        assert saved["net"]["encoder.conv_in.weight"][:, 4:].any()             # of x and y: zero at first
        interrupted_equals_uninterrupted(strategies, tmp_path / "run", tmp_path / "again", *options)
    result = good(strategies, "--sample", "--n", 4, "--method", "c2f", "--low-steps", 2, "--steps", 3, "--t-star", 565,
                  "--out", tmp_path / "run")
    assert "dpm2: low [999, 0], high [565, 283, 0]" in result.out and (tmp_path / "run" / "samples.png").exists()


def test_what_the_strategies_refuse(base_of_c2f, tmp_path):
    refused(strategies, "give --low", *TRAIN, "--low", 16, "--out", tmp_path)
    refused(strategies, "give --low", *TRAIN, "--init", base_of_c2f, "--out", tmp_path)
    refused(strategies, "choose from label", *TRAIN, "--strategy", "z", "--out", tmp_path)
    good(strategies, *TRAIN, "--init", base_of_c2f, "--low", 16, "--strategy", "2T", "--out", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    refused(strategies, "not of 'c2f_trd'", *TRAIN, "--init", path, "--low", 16, "--out", tmp_path / "b")


# ---------------------------------------------------------------------------------------------
# PostDiff: an LCM
# ---------------------------------------------------------------------------------------------
def lcm_config(**changes):
    return config_of(lcm, **{**SMALL, "channels": 3, "res": 16, **changes})


def config_of_postdiff(**changes):
    return dict({k: v for k, v in SMALL.items() if k != "precision"}, words=WORDS, captions=WORDS, **changes)


@torch.no_grad()
def test_a_student_begins_as_its_teacher_and_is_told_w():
    teacher = awake(postdiff.build_net(config_of_postdiff()))
    net = lcm.script.build_net(dict(config_of_postdiff()))
    assert net.load_state_dict(teacher.state_dict(), strict=False).missing_keys == ["guidance.weight"]
    xt, t, w = randn(2, 1, 16, 16), torch.tensor([3, 900]), torch.tensor([2.0, 4.5])
    x0_hat, _, _ = net(xt, t, TEXT, w=w)
    assert torch.allclose(x0_hat, teacher(xt, t, TEXT)[0], atol=1e-5)
    net.guidance.weight.copy_(randn(8, 256))
    told = net(xt, t, TEXT, w=w)[0]
    assert not torch.allclose(told, x0_hat, atol=1e-2)
    frequency = 1e4 ** (-torch.arange(128) / 127)
    angle = 1000 * w[:, None] * frequency
    more = torch.cat([angle.sin(), angle.cos()], 1) @ net.guidance.weight.T    # beside the time's
    teacher.emb.register_forward_pre_hook(lambda _, args: (args[0] + more,))
    assert torch.allclose(teacher(xt, t, TEXT)[0], told, atol=1e-4)


def test_lcm_sampler_by_hand():
    """x0_hat, re-noised, at each step; at the switch up-sampled first; one pass a step."""
    calls = []

    def net(xt, t, text, deep=None, cross=None, depth=1):
        calls.append((tuple(xt.shape), int(t[0]), text is TEXT))
        return 0.2 * xt, None, {}

    taus = [999, 600, 300]
    full, low, *fresh = [randn(2, 3, r, r, seed=r + i) for i, r in enumerate((8, 4, 4, 8, 8))]
    x = lcm.lcm_sample(net, full, taus, ABAR, TEXT, fresh, n_low=1, low_noise=low)

    def x0_of(xt, t):
        a = float(ABAR[t])
        return (xt - (1 - a) ** 0.5 * 0.2 * xt) / a ** 0.5

    def noisy(x0, eps, t):
        return float(ABAR[t]) ** 0.5 * x0 + (1 - float(ABAR[t])) ** 0.5 * eps

    up = F.interpolate(x0_of(low, 999), scale_factor=2, mode="bilinear", align_corners=False)
    xt = noisy(x0_of(noisy(up, full, 600), 600), fresh[1], 300)
    assert torch.allclose(x, x0_of(xt, 300), rtol=1e-4, atol=1e-4)
    assert calls == [((2, 3, 4, 4), 999, True), ((2, 3, 8, 8), 600, True), ((2, 3, 8, 8), 300, True)]
    for bad in (dict(taus=[5, 5]), dict(taus=[5], n_low=1), dict(taus=[5], n_guided=2)):
        with pytest.raises(ValueError, match="does not fit"):
            lcm.lcm_sample(net, full, **{"alpha_bar": ABAR, "text": TEXT, "fresh": fresh, "low_noise": low, **bad})


@torch.no_grad()
def test_seed_i_makes_image_i_of_the_networks_own_w():
    config = lcm_config(method="postdiff", steps=4)
    net = awake(lcm.script.build_net(config))
    plan = lcm.script.plan_of(config)
    assert (plan["n_low"], plan["low"], plan["k"], plan["n_guided"], plan["choice"]) == (2, 8, 1, 2, "cond")
    x, asked = lcm.generate(net, config, plan, [3, 4, 5], "cpu"), []
    assert torch.allclose(lcm.generate(net, config, plan, [5], "cpu")[0], x[2], atol=1e-4) and x.isfinite().all()
    layers = [m for m in net.modules() if isinstance(m, lcm.script.CrossAttention)]
    layers[0].kv.register_forward_hook(lambda *args: asked.append(1))
    lcm.generate(net, config, plan, [3], "cpu")
    assert len(asked) == 2                                                     # then it is frozen (D8)
    lcm.generate(net, config, dict(plan, choice="none"), [3], "cpu")
    assert len(asked) == 2 + 4
    assert not torch.allclose(lcm.generate(net, config, dict(plan, w=1.0), [3], "cpu")[0], x[0], atol=1e-3)


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
        e_null, e_text = ((xt - a ** 0.5 * x * xt) / (1 - a) ** 0.5 for x in (0.5, 0.5 + text))
        e = e_null + float(w[b]) * (e_text - e_null)                           # guidance, as usual, of eps
        goal = (xt - (1 - a) ** 0.5 * e) / a ** 0.5
        if b == 0:
            n = float(ABAR[499])
            goal = (0.2 + text + 0.05 * float(w[b])) * (n ** 0.5 * goal + (1 - n) ** 0.5 * e)
        expected.append((((0.3 + text + 0.05 * float(w[b])) * xt - goal) ** 2 + 1e-6).sqrt())
    loss = lcm.consistency_loss(student, target, teacher, x0, t, t_next, eps, ABAR, TEXT, NULL, w)
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def test_an_exact_student_has_no_loss():
    """Data that is one point: teacher, target and student know it; the loss is that of the pseudo-Huber at 0."""
    point, t = randn(1, 3, 4, 4).expand(2, -1, -1, -1), torch.tensor([519, 11])

    def net(xt, t, text, w=None):
        return (point,)

    loss = lcm.consistency_loss(net, net, net, point, t, (t - 20).clamp(min=-1), randn(2, 3, 4, 4), ABAR, TEXT, NULL,
                                torch.tensor([2.0, 4.0]))
    assert float(loss) == pytest.approx(1e-3, rel=1e-3)


def test_what_the_student_is_shown():
    x, y = torch.zeros(9, 3, 16, 16, dtype=torch.uint8), torch.arange(9)
    x0, t, eps, text, w = lcm.draw_batch(dict(batch=4000, captions=WORDS, words=WORDS), x, y, 1)
    assert x0.shape == eps.shape == (4000, 3, 16, 16) and text.any(1).all()     # no caption is dropped
    assert 1 <= w.min() < 1.01 and 4.99 < w.max() <= 5 and t.min() < 5 and t.max() > 994


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("postdiff") / "teacher.pt"
    words = sorted({word for name in common.FASHION_CLASSES for word in postdiff.words_of(name)})
    config = dict(config_of_postdiff(), words=words)
    torch.manual_seed(0)
    torch.save(dict(script="postdiff", config=config, step=5, ema=postdiff.build_net(config).state_dict()), path)
    return path


def test_an_lcm_by_command(teacher, tmp_path, monkeypatch):
    out, targets, original = tmp_path / "run", [], lcm.consistency_loss

    def spy(net, target, taught_by, *more):                                    # the target is the average that is saved
        if len(targets) == 2:
            assert equal(target.state_dict(), load(out)["ema"]) and net is not target
            assert equal(taught_by.state_dict(), load(teacher.parent, "teacher.pt")["ema"])
        targets.append(float(more[2].sum()))
        return original(net, target, taught_by, *more)

    with monkeypatch.context() as patch:
        patch.setattr(lcm, "consistency_loss", spy)
        good(lcm, *TRAIN, "--init", teacher, "--out", out)
    assert len(targets) == 4 and load(out)["net"]["guidance.weight"].any()
    interrupted_equals_uninterrupted(lcm, out, tmp_path / "again", "--init", teacher)
    result = good(lcm, "--sample", "--n", 4, "--out", out)
    assert "postdiff, lcm: [999, 874, 749, 624, 499, 374, 249, 124], 4 at size 16; k 1; told w 3.0; frozen after 4" in (
        result.out)
    for name, value in dict(CALIBRATION=2, BUDGET=1, STEPS=(2,), REFERENCE_STEPS=2, SHARES=(0, 0.5)).items():
        monkeypatch.setattr(lcm.script, name, value)
    result = good(lcm, "--search", "--method", "mixed", "--out", out)          # 2 of its own steps are 100 %
    assert result.out.count("of the MACs") == 2 and "100.0 % of the MACs" in result.out


def test_what_an_lcm_refuses(teacher, tmp_path):
    refused(lcm, "as --init", *TRAIN, "--out", tmp_path)
    good(lcm, *TRAIN, "--init", teacher, "--out", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    refused(lcm, "not of 'postdiff'", *TRAIN, "--init", path, "--out", tmp_path / "b")
    refused(lcm, "choose from lcm", "--sample", "--solver", "ddim", "--checkpoint", path, "--out", tmp_path)
    refused(lcm, "choose from cond, none", "--sample", "--choice", "ave", "--checkpoint", path, "--out", tmp_path)
    content = teacher.read_bytes()
    try:
        saved = load(teacher.parent, "teacher.pt")
        torch.save(dict(saved, step=6), teacher)
        refused(lcm, "no more the teacher", "--train", "--resume", "--iters", 6, "--out", tmp_path / "run")
    finally:
        teacher.write_bytes(content)


# ---------------------------------------------------------------------------------------------
# PostDiff: a DiT
# ---------------------------------------------------------------------------------------------
DIT = dict(res=16, ch=16, blocks=4, heads=2, patch=4, mult=[1])


@pytest.fixture(scope="module")
def transformer():
    return awake(dit.build_net(config_of(dit, **DIT)))


@torch.no_grad()
def test_dit_by_hand(transformer):
    """Written once more, with attention as softmax of dot products."""
    xt, t = randn(2, 3, 16, 24), torch.tensor([3, 700])
    w = transformer.state_dict()

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

    c, (H, W) = 16, (4, 6)
    angle = t[:, None] * 1e4 ** (-torch.arange(8) / 7)
    emb = linear("emb.2", F.silu(linear("emb.0", torch.cat([angle.sin(), angle.cos()], 1))))
    text = transformer.text(TEXT)
    six = linear("modulation", F.silu(emb)).view(2, 6, c)
    h = linear("conv_in", F.pixel_unshuffle(xt, 4).flatten(2).transpose(1, 2))
    place = []
    for i in range(H):
        for j in range(W):
            angles = [[16 * v / n * 1e4 ** (-k / (c // 4)) for k in range(c // 4)] for v, n in ((i, H), (j, W))]
            place.append([f(a) for axis in angles for f in (math.sin, math.cos) for a in axis])
    h, crosses = h + torch.tensor(place), {}
    for b in range(4):
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
    x0_hat, deep, used = transformer(xt, t, TEXT)
    assert deep is None and x0_hat.std() > 0.1
    assert torch.allclose(x0_hat, F.pixel_shuffle(h, 4), atol=1e-4)
    assert all(torch.allclose(used[b], crosses[b].transpose(1, 2).reshape(2, c, H, W), atol=1e-4) for b in crosses)


@torch.no_grad()
def test_dit_takes_the_cache_of_a_smaller_image(transformer):
    xt, t = randn(2, 3, 16, 16), torch.tensor([3, 700])
    x0_hat, _, used = transformer(xt, t, TEXT)
    again, _, _ = transformer(xt, t, NULL, cross=used)                         # the text is not asked any more
    assert torch.allclose(again, x0_hat, atol=1e-5)
    small = transformer(randn(2, 3, 8, 8, seed=1), t, TEXT)[2]
    assert small[0].shape[-2:] == (2, 2) and transformer(xt, t, TEXT, cross=small)[2][0].shape == used[0].shape


def test_macs_of_a_dits_sampler(transformer):
    config = config_of(dit, **DIT)
    with torch.device("meta"):
        net, t = dit.build_net(config), torch.zeros(1).long()
        low, high = (count_macs(net, torch.zeros(1, 3, r, r), t, TEXT[:1].to("meta")) for r in (12, 16))
        kept = net(torch.zeros(1, 3, 16, 16), t, TEXT[:1].to("meta"))[2]
        frozen = count_macs(lambda: net(torch.zeros(1, 3, 16, 16), t, TEXT[:1].to("meta"), cross=kept))
    plan = dit.script.plan_of(config)
    assert (plan["n_low"], plan["low"], plan["n_guided"], plan["solver"], plan["k"]) == (10, 12, 15, "dpm2", 1)
    plan = dit.script.plan_of(dict(config, steps=4))                           # 2 low; 2 full, 1 of them guided
    assert count_macs(dit.script.generate, net, config, plan, [0], "meta") == 4 * low + 2 * high + frozen
    assert frozen == high - 4 * (2 * 16 * 16 * 16 + 2 * 12 * 64 * 16 + 2 * 16 * 12 * 16)       # q, out; k, v; products


def test_the_size_that_the_readme_names():
    with torch.device("meta"):
        net = dit.build_net(config_of(dit))
        macs = count_macs(net, torch.zeros(1, 3, 32, 32), torch.zeros(1).long(), TEXT[:1].to("meta"))
    assert macs / 1e6 == pytest.approx(57, abs=0.5) and 0.9e6 < sum(p.numel() for p in net.parameters()) < 1.1e6


def test_a_dit_by_command(tmp_path):
    options = "--ch 16 --blocks 2 --heads 2".split()
    good(dit, *TRAIN, *options, "--out", tmp_path / "run")
    saved = load(tmp_path / "run")
    assert saved["script"] == "postdiff_dit" and not {"mult", "attention"} & set(dit.CONFIG["network"])
    interrupted_equals_uninterrupted(dit, tmp_path / "run", tmp_path / "again", *options)
    result = good(dit, "--sample", "--n", 4, "--steps", 4, "--out", tmp_path / "run")
    assert "postdiff, dpm2: [999, 749, 499, 249], 2 at size 24; k 1; 3 guided by 3.0, then cond" in result.out
    refused(dit, "must be in 1 .. 1", "--sample", "--k", 2, "--out", tmp_path / "run")
    refused(dit, "no multiple of 4", "--sample", "--beta", 0.55, "--out", tmp_path / "run")
    refused(dit, "multiple of four times", *TRAIN, "--ch", 20, "--out", tmp_path / "b")
