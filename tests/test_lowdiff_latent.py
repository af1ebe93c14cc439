"""The latent version of lowdiff.py (Table 4): against the paper's numbers, closed forms and plain versions written
here; then by its command line, with the preset tiny.
"""
import json
import math

import pytest
import torch
import torch.nn.functional as F

import common
import lowdiff as c
from test_lowdiff import awake_net, equal, lines_of, load, one_line, only, preset, randn, slope, start

TINY = "--space latent --cond --preset tiny --precision fp32 --batch 8 --save-every 3".split()

@pytest.fixture(scope="module", autouse=True)
def few_images():
    """1,000 of the 10,000 images: a tenth of the time."""
    load_images = common.load_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_images", lambda *args: tuple(
            part[:1000] if torch.is_tensor(part) else part for part in load_images(*args)))
        yield


def config_of(arch="lowdiff", name="tiny", **changes):
    return dict(preset(name, arch, space="latent"), **changes)


# ---------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch, parameters, each, total", [
    ("dit", 130_556_192, [23.0082], 2300.82), ("lowdiff", 131_864_128, [5.5589, 23.0145], 1400.88)])
def test_table_4(arch, parameters, each, total):
    """LightningDiT-B/1 to the integer; the printed 131.86 M; GMAC as counted independently."""
    config = config_of(arch, "paper-dit", classes=1000)
    stages = config["stages"]
    assert c.parameters(config, 32) == parameters
    assert [c.network_macs(json.dumps(config), 32, r) / 1e9 for r in stages] == pytest.approx(each, abs=6e-5)
    macs, nfe = c.plan_macs(config, 32, c.make_plan(stages, space="latent"))
    assert nfe == ([100] if arch == "dit" else [45, 50]) and macs / 1e9 == pytest.approx(total, rel=1e-5)


def plain_dit(net, xt, t, y):
    """LightningDiT, written once more: one token at a time where it can be, rotary positions by complex numbers."""
    w, (B, _, r, _), ch = net.state_dict(), xt.shape, net.map2.out_features
    heads, k = max(1, ch // 64), net.stages.index(xt.shape[-1])

    def linear(name, v):
        return v @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(name, v):
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"]

    frequency = torch.tensor([10_000 ** (-i / 127) for i in range(128)], dtype=xt.dtype)
    wave = torch.cat([(t[:, None] * frequency).sin(), (t[:, None] * frequency).cos()], 1)
    emb = linear("map2", F.silu(linear("map1", wave))) + w["map_label.weight"][y]
    if len(net.stages) > 1:
        emb = emb + w["map_res.weight"][:, k] * len(net.stages) ** 0.5 + w["map_res.bias"]
    emb = F.silu(emb)
    places = [(i, j) for i in range(r) for j in range(r)]
    d = ch // heads
    turn = torch.tensor([[10_000 ** (-n / (d // 4)) * place for place in at for n in range(d // 4)] for at in places],
                        dtype=xt.dtype)
    turn = torch.polar(torch.ones_like(turn), turn)                            # (N, d / 2)
    h = torch.stack([linear(f"entry.{r}", xt[:, :, i, j]) for i, j in places], 1)
    table = []
    for at in places:
        angles = [[v * 10_000 ** (-n / (ch // 4)) for n in range(ch // 4)] for v in at]
        table.append([math.sin(a) for axis in angles for a in axis] + [math.cos(a) for axis in angles for a in axis])
    h = h + torch.tensor(table, dtype=xt.dtype)
    for i in range(len(net.blocks)):
        name = f"blocks.{i}"
        m = linear(f"{name}.modulation", emb).view(B, 6, 1, ch)
        q, k_, v = linear(f"{name}.qkv", norm(f"{name}.norm1", h) * (1 + m[:, 1]) + m[:, 0]).split(ch, -1)
        parts = []
        for head in range(heads):
            at = slice(head * d, head * d + d)
            a, b = (torch.view_as_real(torch.view_as_complex(u[..., at].reshape(B, r * r, d // 2, 2)) * turn).flatten(2)
                    for u in (q, k_))
            parts.append((a @ b.transpose(1, 2) / d ** 0.5).softmax(-1) @ v[..., at])
        h = h + m[:, 2] * linear(f"{name}.out", torch.cat(parts, -1))
        a, b = linear(f"{name}.w12", norm(f"{name}.norm2", h) * (1 + m[:, 4]) + m[:, 3]).chunk(2, -1)
        h = h + m[:, 5] * linear(f"{name}.w3", a * a.sigmoid() * b)
    m = linear(f"exit.{r}.modulation", emb).view(B, 2, 1, ch)
    h = linear(f"exit.{r}.linear", norm(f"exit.{r}.norm", h) * (1 + m[:, 1]) + m[:, 0])
    return h.transpose(1, 2).reshape(B, -1, r, r)


@pytest.mark.parametrize("arch, ch", [("lowdiff", 32), ("lowdiff", 128), ("dit", 32), ("cdm", 32)])
def test_network_is_the_plain_one(arch, ch):
    net = awake_net(config_of(arch, classes=3, ch=ch), 4)
    for one in (net.nets.values() if arch == "cdm" else [net]):
        for r in one.stages:                                   # awake_net has filled the fixed tables too
            angle = c.axis_angles(r, ch // 4)
            one.position[str(r)].data = torch.cat([angle.sin(), angle.cos()], 1)
    for r in ([8] if arch == "dit" else [4, 8]):
        channels = 8 if r == 8 and arch != "dit" else 4
        xt, t, y = randn(2, channels, r, r).float(), torch.tensor([0.2, 0.9]), torch.tensor([1, 3])
        one = net.nets[str(r)] if arch == "cdm" else net
        with torch.no_grad():
            v_hat, expected = net(xt, t, y), plain_dit(one, xt, t, y)
        assert v_hat.std() > 0.1 and torch.allclose(v_hat, expected, rtol=1e-4, atol=1e-4 * float(v_hat.std()))


def test_rotary_positions_are_relative():
    """q . k of two tokens depends on their distance only."""
    angle, q, k = c.axis_angles(6, 8), randn(16 * 2), randn(16 * 2, seed=1)
    q, k = (c.rotate(v.expand(1, 1, 36, 32), angle.double())[0, 0] for v in (q, k))
    dot = (q @ k.T).view(6, 6, 6, 6)
    assert torch.allclose(dot[1, 2, 3, 1], dot[2, 4, 4, 3]) and torch.allclose(dot[0, 0, 2, 5], dot[3, 0, 5, 5])
    assert not torch.allclose(dot[0, 0, 2, 5], dot[0, 0, 5, 2])


def test_only_what_is_active_gets_gradient_and_the_tables_stay():
    net, x0 = awake_net(config_of(classes=3), 4).train(), randn(4, 4, 8, 8).float()
    assert not any(p.requires_grad for p in net.position.values())
    draws = c.draw_noise(4, 4, [4, 8], c.logit_normal)
    c.flow_cascade_loss(net, c.downsample(x0), draws[:1], torch.zeros(4, dtype=torch.long)).backward()
    idle = {name.split(".")[0] + "." + name.split(".")[1] for name, p in net.named_parameters()
            if p.requires_grad and p.grad is None}
    assert idle == {"entry.8", "exit.8"}


def test_labels_resolution_and_no_label():
    net = awake_net(config_of(classes=3), 4)
    x, t = randn(1, 4, 4, 4).float(), torch.tensor([0.5])
    outs = [net(x, t, torch.tensor([y])) for y in range(4)]
    assert torch.equal(net(x, t), outs[3]) and not any(torch.allclose(outs[3], v) for v in outs[:3])
    for bad in (torch.zeros(1, 8, 16, 16), torch.zeros(1, 4, 4, 8)):
        with pytest.raises(ValueError, match="no entry"):
            net(bad, t)


def test_guidance_by_hand():
    config = config_of("dit", classes=3)
    net = awake_net(config, 4)
    model = c.model_of(net, config, torch.device("cpu"), "fp32")
    x, y = randn(2, 4, 8, 8), torch.tensor([0, 2])
    a, b = model(x, 0.4, None, None, y), model(x, 0.4, None, None)
    assert torch.allclose(model(x, 0.4, None, None, y, 2.5), 2.5 * a - 1.5 * b) and not torch.allclose(a, b)
    plan = c.make_plan([8], [7], space="latent")
    assert c.plan_macs(config, 4, dict(plan, guidance=2.0))[0] == 2 * c.plan_macs(config, 4, plan)[0]


# ---------------------------------------------------------------------------------------------
# Loss and sampler
# ---------------------------------------------------------------------------------------------
def test_draws_of_training():
    torch.manual_seed(0)
    (t, eps, *none), (t2, eps2, t_z, eps_z) = c.draw_noise(20_000, 1, [2, 4], c.logit_normal)
    assert none == [None, None] and eps.shape[1:] == (1, 2, 2) == eps_z.shape[1:] and eps2.shape[1:] == (1, 4, 4)
    for v in (t, t2, t_z):
        logit = (v / (1 - v)).log()
        assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1) < 0.03
    assert abs(torch.corrcoef(torch.stack([t2, t_z]))[0, 1]) < 0.03


def test_flow_cascade_loss_by_hand():
    """Squared error and cosine, each a mean over its places, of both stages, with a network that is a formula."""
    def net(xt, t, y):
        return xt[:, :2] * t.view(-1, 1, 1, 1) + (0.3 if xt.shape[1] == 4 else 0.1) * xt[:, -2:].flip(3)

    x0, draws = randn(3, 2, 4, 4), [[None if v is None else v.double() for v in d]
                                    for d in c.draw_noise(3, 2, [2, 4], c.logit_normal)]
    low = torch.stack([x0[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    expected = 0
    (t, eps, _, _), (t2, eps2, t_z, eps_z) = draws
    for b in range(3):
        z = t_z[b] * low[b] + (1 - t_z[b]) * eps_z[b]
        z = torch.stack([z[:, i // 2, j // 2] for i in range(4) for j in range(4)], 1).view(2, 4, 4)
        for x, t_, e, extra in ((low[b], t[b], eps[b], None), (x0[b], t2[b], eps2[b], z)):
            xt = t_ * x + (1 - t_) * e
            v_hat = xt * t_ + (0.1 * xt if extra is None else 0.3 * extra).flip(2)
            v = x - e
            cosine = (v_hat * v).sum(0) / (v_hat.square().sum(0) * v.square().sum(0)).sqrt()
            expected += ((v_hat - v).square().mean() + (1 - cosine).mean()) / 3
    assert float(c.flow_cascade_loss(net, x0.double(), draws)) == pytest.approx(float(expected), rel=1e-5)


def test_times():
    """LightningDiT's shift; where 45 of 50, 60, 70, 100 evaluations stop."""
    assert c.flow_times(4, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert c.flow_times(2, 0.3)[1] == pytest.approx(0.231, abs=5e-4)
    for steps, stop in ((50, 0.730), (60, 0.474), (70, 0.351), (100, 0.197)):
        plan = c.make_plan([8, 16], [steps, 50], [45], space="latent")
        assert plan["stages"][0]["t_stop"] == pytest.approx(stop, abs=6e-4)


def exact_velocity(std):
    """v of data N(0, std^2): the derivative of the exact path x(t) = x(0) sqrt(t^2 std^2 + (1 - t)^2)."""
    return lambda xt, t: xt * (t * std ** 2 - (1 - t)) / (t ** 2 * std ** 2 + (1 - t) ** 2)


def test_euler_is_of_first_order():
    noise, Ns, std = randn(4, 1, 2, 2), [40, 80, 160, 320], 0.6
    errors = [float((c.euler_sample(exact_velocity(std), noise, c.flow_times(N, 0.3)) - std * noise).abs().max())
              for N in Ns]
    assert slope(errors, Ns) == pytest.approx(-1, abs=0.1)


def test_truncated_euler_and_its_bounds():
    noise, ts, std = randn(2, 1, 2, 2), c.flow_times(2000, 0.3), 0.6
    x, t = c.euler_sample(exact_velocity(std), noise, ts, 1500), ts[1500]
    assert torch.allclose(x, noise * (t ** 2 * std ** 2 + (1 - t) ** 2) ** 0.5, atol=2e-3)
    for K in (0, 2001):
        with pytest.raises(ValueError, match="evaluations"):
            c.euler_sample(exact_velocity(std), noise, ts, K)


def test_cascade_by_hand():
    """Each stage's solver, and what is handed on: the image at its t, up-sampled."""
    heard = []

    def model(xt, t, z, s):
        heard.append((xt.shape[-1], t, s))
        return torch.full_like(xt, 1.0 if z is None else float(z.mean()))

    noise, ts = [randn(1, 1, 2, 2), randn(1, 1, 4, 4)], [[0, 0.25, 0.5, 1], [0, 0.4, 1]]
    low, high = c.cascade_sample([(model, noise[0], ts[0], 2), (model, noise[1], ts[1], 2)], "nearest",
                                 c.euler_sample, 1)
    assert torch.allclose(low, noise[0] + 0.5) and torch.allclose(high, noise[1] + low.mean())
    assert heard == [(2, 0, None), (2, 0.25, None), (4, 0, 0.5), (4, 0.4, 0.5)]


# ---------------------------------------------------------------------------------------------
# Autoencoder
# ---------------------------------------------------------------------------------------------
def test_autoencoder_loss_by_hand():
    torch.manual_seed(0)
    net, x, eps = c.Autoencoder(1, 2, 4, ch=8).double(), randn(3, 1, 16, 16), randn(3, 2, 4, 4, seed=1)
    mean, log_var = net.encoder(x).chunk(2, 1)
    q = torch.distributions.Normal(mean, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros(()).double(), 1.0)).mean()
    expected = (net.decoder(mean + q.scale * eps) - x).square().mean() + c.KL_WEIGHT * kl
    assert float(net.loss(x, eps).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    with pytest.raises(ValueError, match="power of 2"):
        c.Autoencoder(1, 2, 3)


def test_autoencoder_learns_a_few_images_and_normalises(monkeypatch):
    x = c.load_images("fashion10k", 32)[0][:8]
    torch.manual_seed(0)
    net = c.Autoencoder(1, 4, 4)
    monkeypatch.setattr(c, "AE_BATCH", 8)
    c.train_autoencoder(net, x, 150, torch.device("cpu"), "fp32")
    z = c.encode_all(net, x, torch.device("cpu"))
    assert z.shape == (8, 4, 8, 8)
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-4
    x0 = c.to_float(x)
    with torch.no_grad():
        assert F.mse_loss(net.decode(z), x0) < 0.1 * x0.var()
        assert net.decode(z[:, :, :4, :4]).shape == (8, 1, 16, 16)              # what a low stage makes


# ---------------------------------------------------------------------------------------------
# By the command line
# ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("latent")
    result = start("--train", *TINY, "--iters", 9, "--out", out)
    assert result.code == 0, result.err
    return only(out)


def test_train_and_its_files(trained):
    saved, weights = load(trained), load(trained.with_name("weights.pt"))
    assert saved["step"] == 9 and saved["autoencoder_shape"] == [1, 4, 4] and saved["args"]["space"] == "latent"
    assert weights["autoencoder"].keys() == saved["autoencoder"].keys() and "net" not in weights
    assert {"autoencoder.pt", "autoencoder.png", "samples.png", "log.jsonl", "args.json"} <= {
        p.name for p in trained.parent.iterdir()}


def test_a_tenth_of_the_labels_is_left_out(trained, tmp_path, monkeypatch):
    seen, loss = [], c.flow_cascade_loss
    monkeypatch.setattr(c, "flow_cascade_loss", lambda net, x0, draws, y, *more: (
        seen.extend(y.tolist()) or loss(net, x0, draws, y, *more)))
    result = start("--train", *TINY, "--autoencoder", trained.with_name("autoencoder.pt"), "--out", tmp_path, "--iters",
                   9, "--batch", 64)
    assert result.code == 0
    assert len(seen) == 9 * 64 and set(seen) == set(range(11))
    assert 30 <= seen.count(10) <= 90                                  # 58 +- 7


def test_the_autoencoder_of_a_file(trained, tmp_path):
    """The same weights as with the autoencoder trained on the way."""
    argv = [*TINY, "--autoencoder", trained.with_name("autoencoder.pt"), "--out", tmp_path]
    result = start("--train", *argv, "--iters", 9)
    assert result.code == 0 and equal(load(only(tmp_path))["ema"], load(trained)["ema"])


def test_kill_and_resume(trained, tmp_path, monkeypatch):
    """Stopped at a save, gone on with: the same weights, no second autoencoder."""
    argv = [*TINY, "--autoencoder", trained.with_name("autoencoder.pt"), "--iters", 9, "--out", tmp_path]
    real, calls = torch.save, []

    def stop(content, path):
        real(content, path)
        calls.append(path)
        if len(calls) == 2:                                    # the first is renamed, the second is not
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop)
    result = start("--train", *argv)
    monkeypatch.undo()
    assert result.code == 1 and load(only(tmp_path))["step"] == 3
    result = start("--train", "--resume", "--out", tmp_path)
    assert result.code == 0 and "autoencoder" not in result.err
    assert equal(load(only(tmp_path))["ema"], load(trained)["ema"])


def test_baseline_sample_and_evaluate(trained, tmp_path):
    """The off switch on the same autoencoder; both side by side; a line of results with what a reader asks for."""
    assert start("--train", *TINY, "--arch", "dit", "--iters", 2, "--autoencoder", trained, "--out", tmp_path).code == 0
    base = only(tmp_path)
    assert load(base)["args"]["stages"] == [8] and equal(load(base)["autoencoder"], load(trained)["autoencoder"])
    few = ["--steps", 4, 3, "--truncate", 2]
    result = start("--sample", "--n", 8, "--show-stages", *few, "--guidance", 1.5, "--checkpoint", trained, "--out",
                   tmp_path / "s")
    assert result.code == 0 and "4x4: 2 of 4 evaluations, t 0 to 0.2308" in result.out
    assert (tmp_path / "s" / "samples.png").exists()
    results = tmp_path / "results.jsonl"
    result = start("--evaluate", "--n", 150, *few, "--checkpoint", trained, "--results", results)
    assert result.code == 0, result.err
    line, = lines_of(results)
    config = load(trained)["args"]
    assert line["space"] == "latent" and line["solver"] == "euler" and line["nfe"] == [2, 3]
    assert line["macs_per_image"] == sum(n * c.network_macs(json.dumps(config), 4, r) for r, n in ((4, 2), (8, 3)))
    assert line["decoded_fd"] > 0 and line["decoder_macs"] > 0 and line["fd"] > 0 and line["edm_images_per_s"] > 0
    assert line["plan"]["guidance"] == 1 and "autoencoder" not in line["args"]


def test_found_out_before_the_autoencoder_is_trained(tmp_path):
    """A budget below a step; a folder that cannot be written."""
    result = start("--train", *TINY, "--budget", 1e6, "--out", tmp_path)
    one_line(result, "--budget 1e+06", "one step")
    assert "autoencoder" not in result.err and not list(tmp_path.rglob("*.pt"))
    (tmp_path / "file").write_text("")
    result = start("--train", *TINY, "--iters", 1, "--out", tmp_path / "file")
    assert result.code == 1 and "train autoencoder" not in result.err


@pytest.mark.parametrize("changes, words", [
    (dict(guidance="abc"), "guidance"), (dict(guidance=None), "guidance"), (dict(guidance=math.nan), "guidance"),
    (dict(shift=1e-17), "shift"), (dict(shift=math.nan), "shift")])
def test_bad_plans(changes, words):
    plan = c.make_plan([4, 8], space="latent")
    plan.update({k: v for k, v in changes.items() if k == "guidance"})
    plan["stages"][0].update({k: v for k, v in changes.items() if k == "shift"})
    with pytest.raises(ValueError, match=words):
        c.check_plan(plan)
    with pytest.raises(ValueError, match="guidance"):
        c.check_plan(dict(c.make_plan([16, 32]), guidance=2.0))


def test_guidance_needs_labels(trained, tmp_path):
    options = [v for v in TINY if v != "--cond"] + ["--autoencoder", trained]
    assert start("--train", *options, "--iters", 1, "--arch", "dit", "--out", tmp_path).code == 0
    one_line(start("--sample", "--guidance", 3, "--out", tmp_path), "--guidance", "--cond")


def test_truncation_sweep(trained, tmp_path):
    plan = c.make_plan([4, 8], [6, 2], [3], space="latent")
    assert [p["stages"][0]["evaluations"] for _, p in c.ablation(plan, "truncation")] == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="truncation"):
        c.ablation(plan, "steps")


@pytest.mark.parametrize("argv, words", [
    ("--arch edm", ["edm", "latent"]), ("--told", ["--told", "pixel"]), ("--preset paper", ["paper", "paper-dit"]),
    ("--stages 8 16", ["32x32", "64x64"]), ("--autoencoder /nope/x.pt", ["/nope/x.pt"]),
    ("--arch dit --stages 4 8", ["dit", "one stage"])])
def test_bad_training(tmp_path, argv, words):
    one_line(start("--train", *TINY, "--iters", 1, *argv.split(), "--out", tmp_path), *words)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("argv, words", [
    ("--sigma-max 80 50", ["--sigma-max", "latent"]), ("--truncate 61", ["61", "60"]),
    ("--truncate 0", ["whole numbers"]), ("--steps 4", ["--steps", "2 numbers"])])
def test_bad_sampling(trained, tmp_path, argv, words):
    one_line(start("--sample", *argv.split(), "--checkpoint", trained, "--out", tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_together(trained, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(c.make_plan([4, 8])))
    one_line(start("--sample", "--plan", plan, "--checkpoint", trained), "plan", "latent")
    plan.write_text(json.dumps(dict(stages=[dict(res=8, steps=3, evaluations=3, shift=-1)])))
    one_line(start("--sample", "--plan", plan, "--checkpoint", trained), "shift")
    alone = trained.with_name("autoencoder.pt")
    one_line(start("--sample", "--checkpoint", alone), "autoencoder only")
    one_line(start("--sample", "--autoencoder", alone, "--checkpoint", trained), "--autoencoder", "--train")
    one_line(start("--train", *TINY, "--data", "emoji", "--stages", 8, 16, "--autoencoder", alone, "--out", tmp_path),
             "autoencoder", "[1, 4, 4]", "[3, 4, 4]")
    with pytest.raises(ValueError, match="--guidance"):
        c.make_plan([16, 32], guidance=2)
