"""variants/lowdiff_cdm.py, lowdiff_latent.py and their autoencoder.py: against the paper's numbers, lowdiff.py, closed
forms and plain versions written here; then by their command lines, with tiny networks."""
import importlib
import math
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import lowdiff
from in_process import start_script

ROOT = Path(common.__file__).resolve().parent
sys.path[:0] = [str(ROOT / "variants"), str(ROOT / "results")]
autoencoder = importlib.import_module("autoencoder")
cdm = importlib.import_module("lowdiff_cdm")
c = importlib.import_module("lowdiff_latent")

COMMON = "--data fashion10k --batch 8 --save-every 3 --iters 6 --precision fp32".split()
TINY = {cdm: [*"--ch 8 --mult 1 2 --attention 1 --patch 4".split(), *COMMON],
        c: [*"--ch 32 --blocks 2 --ae-iters 5".split(), *COMMON]}
CONFIG = dict(latent=4, ch=32, blocks=2, stages=[4, 8], captions=list("abc"), labels=1, channels=1, factor=4,
              precision="fp32", classes=[-1], guidance=1.0)


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """500 of the 10,000 images: a twentieth of the time."""
    x, y, captions = common.load_images("fashion10k")

    def first(*_, **__):
        return x[:500].clone(), y[:500].clone(), list(captions)

    with mock.patch.object(common, "load_images", first), mock.patch.object(cdm.script, "load_images", first), \
            mock.patch.object(c.script, "load_images", first), mock.patch.object(c, "load_images", first), \
            mock.patch.object(autoencoder, "BATCH", 8):
        yield


def start(module, *argv, preview=False):
    """preview: draw the real one at each save."""
    script = getattr(module, "script", module)
    with mock.patch.object(script, "preview", script.preview if preview else lambda *_: torch.zeros(1, 1, 4, 4)):
        return start_script(module, *argv)


def good(module, *argv, **options):
    result = start(module, *argv, **options)
    assert result.code == 0, result.err
    return result


def refused(module, *argv):
    """The one line with which a wrong use ends."""
    result = start(module, *argv)
    assert result.code == 1 and result.err.count("error:") == 1, result.err
    return result.err.splitlines()[-1]


def ema(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["ema"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def awake_net(**changes):
    """A DiT of random weights, biases and norms: no zero hides a path."""
    net = c.build_net(dict(CONFIG, **changes)).eval()
    for i, (name, p) in enumerate(net.named_parameters()):
        if not name.startswith("autoencoder"):
            p.data = randn(*p.shape, seed=i).float() * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.3)
    return net


# ---------------------------------------------------------------------------------------------
# CDM
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stages, mult, attention, patch", [
    ([8, 16], [1, 2, 4], [2], 1), ([8, 16, 32], [2, 1, 1], [1], 2), ([8, 16], [2, 2, 2], [0, 2], 1),
    ([16], [1, 2], [], 1)])
def test_each_network_is_what_lowdiff_activates(stages, mult, attention, patch):
    """With LowDiff's weights, whose resolution embedding is zero at first, the same output; all are active."""
    config = dict(channels=1, ch=8, mult=mult, blocks=2, attention=attention, patch=patch, labels=1,
                  captions=list("abc"), stages=stages)
    torch.manual_seed(0)
    one, cascade = lowdiff.build_net(config), cdm.build_net(config)
    for r, net in cascade.nets.items():
        first, state = one.encoder.first[int(r)], {}
        for key in net.state_dict():
            part = key.split(".")
            if key.startswith("encoder.down."):
                part[2] = str(int(part[2]) + first)
            state[key] = one.state_dict()[".".join(part)]
        net.load_state_dict(state)
        x = randn(2, 1 if int(r) == stages[0] else 2, int(r), int(r)).float()
        t, y = torch.rand(2) * 9, torch.tensor([0, 2])
        assert torch.equal(cascade(x, t, y), one(x, t, y))
        one.zero_grad()
        one(x, t, y).sum().backward()
        cascade(x, t, y).sum().backward()
        active = sum(p.numel() for n, p in one.named_parameters() if p.grad is not None and n != "resolution.weight")
        assert sum(p.numel() for p in net.parameters()) == active
        assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ValueError, match="no network for"):
        cascade(torch.zeros(1, 1, 64, 64), torch.ones(1))


def test_cdm_of_one_stage_trains_as_edm(tmp_path):
    """The off switch: one network, lowdiff.py's."""
    few = [*TINY[cdm], "--stages", 32, "--iters", 3]
    good(cdm, "--train", *few, "--out", tmp_path / "cdm")
    with mock.patch.object(lowdiff, "load_images", common.load_images):
        good(lowdiff, "--train", *few, "--out", tmp_path / "edm")
    assert list(ema(tmp_path / "cdm")) != list(ema(tmp_path / "edm"))
    assert all(torch.equal(a, b) for a, b in zip(ema(tmp_path / "cdm").values(), ema(tmp_path / "edm").values()))


@pytest.mark.parametrize("module", [cdm, c])
def test_stopped_and_resumed_equals_uninterrupted(module, tmp_path):
    argv = [*TINY[module], "--out", tmp_path / "a"]
    good(module, "--train", *argv)
    out, save = tmp_path / "b", torch.save
    argv[-1] = out
    if module is c:
        (out / "autoencoder.pt").parent.mkdir()
        (out / "autoencoder.pt").write_bytes((tmp_path / "a" / "autoencoder.pt").read_bytes())

    def stop(content, path):
        save(content, path)
        if "optimizer" in content and content["step"] == 6:        # written, not renamed
            raise KeyboardInterrupt

    with mock.patch.object(torch, "save", stop):
        assert "interrupted" in start(module, "--train", *argv).err
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 3
    (out / "autoencoder.pt").unlink(missing_ok=True)               # the checkpoint has it
    good(module, "--train", "--resume", "--out", out)
    assert equal(ema(out), ema(tmp_path / "a")) and not (out / "autoencoder.pt").exists()


def test_cdm_by_its_command_line(tmp_path):
    good(cdm, "--train", *TINY[cdm], "--iters", 1, "--out", tmp_path, preview=True)
    result = good(cdm, "--sample", "--n", 4, "--steps", 3, 2, "--truncate", 2, "--out", tmp_path)
    assert "16x16: 2 of 5 evaluations" in result.out and (tmp_path / "samples.png").exists()
    assert "lowdiff_cdm" in refused(lowdiff, "--sample", "--checkpoint", tmp_path / "checkpoint.pt", "--out", tmp_path)
    for module in (cdm, c):
        assert "weights" in refused(module, "--sample", "--out", tmp_path / "empty")
    assert "--guidance" in good(c, "--help").out and "--mult" not in good(c, "--help").out


# ---------------------------------------------------------------------------------------------
# LightningDiT
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stages, parameters, each, total", [
    ([16], 130_556_192, [23.0082], 2300.82), ([8, 16], 131_864_128, [5.5589, 23.0145], 1400.88)])
def test_table_4(stages, parameters, each, total):
    """LightningDiT-B/1 to the integer, the printed 131.86 M with the bias of its resolution embedding; GMAC as counted
    independently. Sine positions are parameters in LightningDiT's code, here buffers."""
    config = dict(CONFIG, latent=32, ch=768, blocks=12, stages=stages, captions=range(1000))
    with torch.device("meta"):
        net = c.build_net(config).eval()
        del net.autoencoder
        found = sum(p.numel() for p in net.parameters()) + sum(768 * r * r for r in stages) + 768 * (len(stages) > 1)
        t, y = torch.zeros(1), torch.zeros(1, dtype=torch.long)
        macs = [common.count_macs(net, torch.zeros(1, 32 * (1 + (r != stages[0])), r, r), t, y) / 1e9 for r in stages]
    assert found == parameters and macs == pytest.approx(each, abs=6e-5)
    plan = c.paper_plan(stages)
    assert plan["evaluations"] == ([100] if len(stages) == 1 else [45, 50])
    assert sum(n * m for n, m in zip(plan["evaluations"], macs)) == pytest.approx(total, rel=1e-5)


def plain_dit(net, xt, t, y):
    """LightningDiT, written once more: one token at a time where it can be, rotary positions by complex numbers."""
    w, (B, _, r, _), ch = net.state_dict(), xt.shape, net.emb[2].out_features
    heads = max(1, ch // 64)

    def linear(name, v):
        return v @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(name, v):
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"]

    frequency = torch.tensor([10_000 ** (-i / 127) for i in range(128)], dtype=xt.dtype)
    wave = torch.cat([(t[:, None] * frequency).sin(), (t[:, None] * frequency).cos()], 1)
    emb = linear("emb.2", F.silu(linear("emb.0", wave))) + w["label.weight"][y]
    if len(net.stages) > 1:
        emb = emb + w["resolution.weight"][net.stages.index(r)]
    emb = F.silu(emb)
    places, d = [(i, j) for i in range(r) for j in range(r)], ch // heads
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
        q, k, v = linear(f"{name}.qkv", norm(f"{name}.norm1", h) * (1 + m[:, 1]) + m[:, 0]).split(ch, -1)
        parts = []
        for head in range(heads):
            at = slice(head * d, head * d + d)
            a, b = (torch.view_as_real(torch.view_as_complex(u[..., at].reshape(B, r * r, d // 2, 2)) * turn).flatten(2)
                    for u in (q, k))
            parts.append((a @ b.transpose(1, 2) / d ** 0.5).softmax(-1) @ v[..., at])
        h = h + m[:, 2] * linear(f"{name}.out", torch.cat(parts, -1))
        a, b = linear(f"{name}.w12", norm(f"{name}.norm2", h) * (1 + m[:, 4]) + m[:, 3]).chunk(2, -1)
        h = h + m[:, 5] * linear(f"{name}.w3", a * a.sigmoid() * b)
    m = linear(f"exit.{r}.modulation", emb).view(B, 2, 1, ch)
    h = linear(f"exit.{r}.linear", norm(f"exit.{r}.norm", h) * (1 + m[:, 1]) + m[:, 0])
    return h.transpose(1, 2).reshape(B, -1, r, r)


@pytest.mark.parametrize("stages, ch", [([4, 8], 32), ([4, 8], 128), ([8], 32)])
def test_network_is_the_plain_one(stages, ch):
    net = awake_net(stages=stages, ch=ch)
    for r in stages:
        xt, t, y = randn(2, 4 if r == stages[0] else 8, r, r).float(), torch.tensor([0.2, 0.9]), torch.tensor([1, 3])
        with torch.no_grad():
            v_hat, expected = net(xt, t, y), plain_dit(net, xt, t, y)
        assert v_hat.std() > 0.1 and torch.allclose(v_hat, expected, rtol=1e-4, atol=1e-4 * float(v_hat.std()))


def test_rotary_positions_are_relative():
    """q . k of two tokens depends on their distance only."""
    angle, q, k = c.axis_angles(6, 8), randn(16 * 2), randn(16 * 2, seed=1)
    q, k = (c.rotate(v.expand(1, 1, 36, 32), angle.double())[0, 0] for v in (q, k))
    dot = (q @ k.T).view(6, 6, 6, 6)
    assert torch.allclose(dot[1, 2, 3, 1], dot[2, 4, 4, 3]) and torch.allclose(dot[0, 0, 2, 5], dot[3, 0, 5, 5])
    assert not torch.allclose(dot[0, 0, 2, 5], dot[0, 0, 5, 2])


def test_the_network_begins_as_dits():
    """v_hat is 0 whatever it is told, and the frozen autoencoder has no gradient."""
    net = c.build_net(CONFIG)
    v_hat = net(torch.randn(2, 8, 8, 8), torch.rand(2), torch.tensor([0, 1]))
    v_hat.sum().backward()
    assert not v_hat.any() and not any(p.requires_grad for p in net.autoencoder.parameters())


def test_labels_no_label_and_sizes_without_an_entry():
    net = awake_net()
    x, t = randn(1, 4, 4, 4).float(), torch.tensor([0.5])
    outs = [net(x, t, torch.tensor([y])) for y in range(4)]
    assert torch.equal(net(x, t), outs[3]) and not any(torch.allclose(outs[3], v) for v in outs[:3])
    for bad in (torch.zeros(1, 8, 16, 16), torch.zeros(1, 4, 4, 8)):
        with pytest.raises(ValueError, match="no entry"):
            net(bad, t)


# ---------------------------------------------------------------------------------------------
# Loss and sampler
# ---------------------------------------------------------------------------------------------
def test_draws_of_training():
    torch.manual_seed(0)
    config = dict(CONFIG, batch=20_000, latent=1, stages=[2, 4])
    y = torch.arange(99) % 3
    x = y.float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    x0, labels, t, t_z, eps, eps_high, eps_z = c.draw_batch(config, x, y, 1)
    assert eps.shape == eps_z.shape == (20_000, 1, 2, 2) and eps_high.shape == x0.shape == (20_000, 1, 4, 4)
    for v in (t[:, 0], t[:, 1], t_z[:, 0]):
        logit = (v / (1 - v)).log()
        assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1) < 0.03
    assert abs(torch.corrcoef(torch.stack([t[:, 1], t_z[:, 0]]))[0, 1]) < 0.03
    assert abs((labels == 3).float().mean() - 0.1) < 0.01              # a tenth of the labels is left out
    assert torch.equal(labels[labels < 3], x0[labels < 3][:, 0, 0, 0].long())


def test_loss_by_hand():
    """Squared error and cosine, each a mean over its places, of both stages, with a network that is a formula."""
    def net(xt, t, y):
        return xt[:, :2] * t.view(-1, 1, 1, 1) + (0.3 if xt.shape[1] == 4 else 0.1) * xt[:, -2:].flip(3)

    x0, eps_high = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=2)
    eps, eps_z = randn(3, 2, 2, 2, seed=1), randn(3, 2, 2, 2, seed=3)
    t, t_z = randn(3, 2, seed=4).sigmoid(), randn(3, 1, seed=5).sigmoid()
    low, expected = torch.stack([x0[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0), 0
    for b in range(3):
        z = t_z[b] * low[b] + (1 - t_z[b]) * eps_z[b]
        z = torch.stack([z[:, i // 2, j // 2] for i in range(4) for j in range(4)], 1).view(2, 4, 4)
        for x, t_, e, extra in ((low[b], t[b, 0], eps[b], None), (x0[b], t[b, 1], eps_high[b], z)):
            xt = t_ * x + (1 - t_) * e
            v_hat = xt * t_ + (0.1 * xt if extra is None else 0.3 * extra).flip(2)
            v = x - e
            cosine = (v_hat * v).sum(0) / (v_hat.square().sum(0) * v.square().sum(0)).sqrt()
            expected += ((v_hat - v).square().mean() + (1 - cosine).mean()) / 3
    found = c.training_loss(net, CONFIG, x0, torch.zeros(3), t, t_z, eps, eps_high, eps_z)
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


def test_times_and_where_the_first_stage_stops():
    """LightningDiT's shift; where 45 of 50, 60, 70, 100 evaluations stop."""
    assert c.flow_times(4, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert c.flow_times(2)[1] == pytest.approx(0.231, abs=5e-4)
    for steps, stop in ((50, 0.730), (60, 0.474), (70, 0.351), (100, 0.197)):
        assert c.stops_of(c.paper_plan([8, 16], [steps, 50], [45])) == [pytest.approx(stop, abs=6e-4), 1]


def exact_velocity(std):
    """v of data N(0, std^2): the derivative of the exact path x(t) = x(0) sqrt(t^2 std^2 + (1 - t)^2)."""
    return lambda xt, t: xt * (t * std ** 2 - (1 - t)) / (t ** 2 * std ** 2 + (1 - t) ** 2)


def test_euler_is_of_first_order():
    noise, Ns, std = randn(4, 1, 2, 2), [40, 80, 160, 320], 0.6
    errors = [float((c.euler_sample(exact_velocity(std), noise, c.flow_times(N)) - std * noise).abs().max())
              for N in Ns]
    assert np.polyfit(np.log(Ns), np.log(errors), 1)[0] == pytest.approx(-1, abs=0.1)


def test_truncated_euler_and_its_bounds():
    noise, ts, std = randn(2, 1, 2, 2), c.flow_times(2000), 0.6
    x, t = c.euler_sample(exact_velocity(std), noise, ts, 1500), ts[1500]
    assert torch.allclose(x, noise * (t ** 2 * std ** 2 + (1 - t) ** 2) ** 0.5, atol=2e-3)
    for K in (0, 2001):
        with pytest.raises(ValueError, match="evaluations"):
            c.euler_sample(exact_velocity(std), noise, ts, K)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_generate_by_hand(guidance):
    """Both stages in plain loops: what is handed on, guidance, decoding; and what the meta device counts of it."""
    net, seeds = awake_net(), [3, 1]
    net.autoencoder.mean.fill_(0.3)
    net.autoencoder.std.fill_(2.0)
    plan = dict(c.paper_plan([4, 8], [5, 3], [2]), guidance=guidance)
    high, low = common.noise_for(seeds, (4, 8, 8), (4, 4, 4))
    y, null = torch.tensor([0, 1]), torch.tensor([3, 3])

    def steps(x, z, ts, K):
        for t, t_next in list(zip(ts, ts[1:]))[:K]:
            xt, told = torch.cat([x, z], 1).float(), torch.full((2,), t)
            with torch.no_grad():
                v = guidance * net(xt, told, y).double() - (guidance - 1) * net(xt, told, null).double()
            x = x + (t_next - t) * v
        return x

    x = steps(low.double(), low[:, :0], c.flow_times(5), 2)
    x = steps(high.double(), x.repeat_interleave(2, 2).repeat_interleave(2, 3), c.flow_times(3), 3)
    found = c.generate(net, CONFIG, plan, seeds, "cpu")
    assert torch.allclose(found, net.autoencoder.decoder(x.float() * 2 + 0.3), atol=2e-5) and found.std() > 0.01
    with torch.device("meta"):
        net, t = c.build_net(CONFIG).eval().requires_grad_(False), torch.zeros(1)
        parts = [common.count_macs(net, torch.zeros(1, *shape), t, t.long()) for shape in ((4, 4, 4), (8, 8, 8))]
        decoder = common.count_macs(net.autoencoder.decode, torch.zeros(1, 4, 8, 8))
    macs = common.count_macs(lambda: c.generate(net, CONFIG, plan, [0], torch.device("meta")))
    assert macs == decoder + (1 + (guidance != 1)) * (2 * parts[0] + 3 * parts[1])


# ---------------------------------------------------------------------------------------------
# Autoencoder
# ---------------------------------------------------------------------------------------------
def test_autoencoder_loss_by_hand():
    torch.manual_seed(0)
    net, x, eps = autoencoder.Autoencoder(1, 2, 4, ch=8).double(), randn(3, 1, 16, 16), randn(3, 2, 4, 4, seed=1)
    mean, log_var = net.encoder(x).chunk(2, 1)
    q = torch.distributions.Normal(mean, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros(()).double(), 1.0)).mean()
    expected = (net.decoder(mean + q.scale * eps) - x).square().mean() + autoencoder.KL_WEIGHT * kl
    assert float(net.loss(x, eps).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    with pytest.raises(ValueError, match="power of 2"):
        autoencoder.Autoencoder(1, 2, 3)


def test_autoencoder_learns_a_few_images_and_normalises(tmp_path, monkeypatch):
    """And comes back from its file, which no other shape may use."""
    monkeypatch.setattr(autoencoder, "WARMUP", 10)
    x, path = common.load_images("fashion10k")[0][:8], tmp_path / "new" / "ae.pt"
    net = autoencoder.get_autoencoder(path, 1, 4, 4, x, 70, "cpu", 0)
    z = autoencoder.encode_all(net, x, "cpu", batch=3)
    assert z.shape == (8, 4, 8, 8) and not any(p.requires_grad for p in net.parameters())
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-4
    x0 = common.to_float(x)
    assert F.mse_loss(net.decode(z), x0) < 0.2 * x0.var()
    assert net.decode(z[:, :, :4, :4]).shape == (8, 1, 16, 16)                 # what a low stage makes
    again = autoencoder.get_autoencoder(path, 1, 4, 4, None, 70, "cpu", 0)
    assert equal(again.state_dict(), net.state_dict()) and path.with_suffix(".png").exists()
    with pytest.raises(ValueError, match=r"\[1, 4, 4\], wanted \[1, 2, 4\]"):
        autoencoder.get_autoencoder(path, 1, 2, 4, None, 70, "cpu", 0)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        autoencoder.load(path)


# ---------------------------------------------------------------------------------------------
# Latents by the command line
# ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("latent")
    good(c, "--train", *TINY[c], "--out", out)
    return out


def test_files_of_a_training(trained):
    assert {"autoencoder.pt", "autoencoder.png", "checkpoint.pt", "weights.pt", "preview.png", "log.jsonl"} <= {
        p.name for p in trained.iterdir()}
    inside = {k[12:]: v for k, v in ema(trained).items() if k.startswith("autoencoder.")}
    assert equal(inside, autoencoder.load(trained / "autoencoder.pt").state_dict())


def test_off_switch_on_the_same_latents(trained, tmp_path):
    file = trained / "autoencoder.pt"
    result = good(c, "--train", *TINY[c], "--stages", 8, "--autoencoder", file, "--out", tmp_path)
    assert "train autoencoder" not in result.err and not (tmp_path / "autoencoder.pt").exists()
    a, b = ema(trained), ema(tmp_path)
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith("autoencoder.")) and "entry.4.weight" not in b
    result = good(c, "--sample", "--n", 4, "--steps", 3, "--out", tmp_path)
    assert "plan: 8x8: 3 of 3 evaluations, t 0 to 1" in result.out and (tmp_path / "samples.png").exists()
    assert "one stage" in refused(c, "--search", "--out", tmp_path)


def test_init_brings_its_autoencoder(trained, tmp_path):
    few = [*COMMON, "--iters", 1, "--init", trained / "checkpoint.pt", "--out", tmp_path]
    good(c, "--train", *few, preview=True)
    a, b = ema(trained), ema(tmp_path)
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith("autoencoder.")) and not equal(a, b)
    few[-1] = tmp_path / "other"
    assert "--init" in refused(c, "--train", *few, "--ae-iters", 9)


def test_sample_search_and_the_found_plan(trained, tmp_path, monkeypatch):
    few, here = ["--steps", 4, 3, "--truncate", 2], ["--out", tmp_path, "--checkpoint", trained / "checkpoint.pt"]
    result = good(c, "--sample", "--n", 4, *few, "--guidance", 1.5, *here[:3], trained / "weights.pt")
    assert "4x4: 2 of 4 evaluations, t 0 to 0.2308, then 8x8: 3 of 3" in result.out and "guidance 1.5" in result.out
    monkeypatch.setattr(c.script, "SEARCH_N", 140)
    monkeypatch.setattr(c, "SHIFTS", (0, 1, 4))                        # 6 of 4 evaluations there are not
    result = good(c, "--search", "--steps", 4, 3, "--truncate", 3, *here)
    assert result.out.count("FD[") == 2
    found = result.out.splitlines()[-1]
    assert found in good(c, "--sample", "--n", 2, *here).out
    assert found not in good(c, "--sample", "--n", 2, "--classes", 3, "--guidance", 2, *few, *here).out


def test_measured_by_evaluate(trained):
    """On images, not on latents."""
    evaluate = importlib.import_module("evaluate")
    module = evaluate.load_script("variants/lowdiff_latent.py")
    assert module is c.script and evaluate.load_script("lowdiff_cdm") is cdm.script
    with mock.patch.object(evaluate, "load_images", common.load_images):
        net, config, plan, _ = evaluate.load_all(module, f"--steps 3 2 --truncate 2 --out {trained}".split())
        row = evaluate.measure(module, net, config, plan, n=140)
    assert row["method"] == "lowdiff_latent" and row["nfe_by_res"] == {4: 2, 8: 2} and row["fd"] > 0
    assert row["extractor"] == "small-fashion"


@pytest.mark.parametrize("argv, words", [
    ("--stages 8 16", "images' 32"), ("--stages 2 8", "twice"), ("--factor 2", "images' 32"), ("--mult 1 2", "--mult"),
    ("--latent 2 --autoencoder AE", "wanted [1, 2, 4]"), ("--ch 130 --autoencoder AE", "multiple of 4")])
def test_bad_training(trained, tmp_path, argv, words):
    argv = argv.replace("AE", str(trained / "autoencoder.pt")).split()
    assert words in refused(c, "--train", *TINY[c], *argv, "--out", tmp_path) and not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("argv, words", [
    ("--truncate 61", "1 .. 60"), ("--steps 4", "need 2 and 1"), ("--classes 10", "0 .. 9"),
    ("--guidance nan", "--guidance")])
def test_bad_sampling(trained, tmp_path, argv, words):
    assert words in refused(c, "--sample", *argv.split(), "--checkpoint", trained / "checkpoint.pt", "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_guidance_needs_labels(trained, tmp_path):
    few = [*TINY[c], "--iters", 1, "--autoencoder", trained / "autoencoder.pt", "--out", tmp_path]
    good(c, "--train", *few, "--labels", 0)
    assert "--labels 1" in refused(c, "--sample", "--guidance", 3, "--out", tmp_path)
