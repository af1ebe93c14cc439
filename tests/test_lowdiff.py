"""lowdiff.py against independent oracles: the paper's numbers, closed forms, plain versions written here."""
import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import lowdiff as c

CONFIG = {key: option[0] for group in c.CONFIG.values() for key, option in group.items()}


def config_of(**changes):
    """A configuration of a tiny network, as load_data leaves it."""
    stages = changes.get("stages", [8, 16, 32])
    levels = [math.log(s) for s in c.stops_of(c.paper_plan(stages))[:-1]]
    return dict(CONFIG, ch=8, mult=[1, 1, 2], channels=1, captions=["a", "b", "c"], labels=0, precision="fp32", step=0,
                s_mean=levels) | changes


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def awake_net(config):
    """A net of random weights, biases and norms: no zero hides a path."""
    net = c.build_net(config).eval()
    for i, p in enumerate(net.parameters()):
        p.data = randn(*p.shape, seed=i).float() * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.3)
    return net


# ---------------------------------------------------------------------------------------------
# Network: one for all resolutions (3.3)
# ---------------------------------------------------------------------------------------------
def plain_unet(w, config, x, t, y=None):
    """The U-Net from its weights `w`, with matrices and loops in place of modules, as the paper's Fig. 2 and 4 have it:
    its levels in a row, those above the resolution skipped."""
    ch, patch, mult, stages = config["ch"], config["patch"], config["mult"], config["stages"]
    res, L = x.shape[-1], len(config["mult"])

    def conv(name, v, **options):
        k = w[name + ".weight"]
        return F.conv2d(v, k, w[name + ".bias"], **(options or dict(padding=k.shape[-1] // 2)))

    def norm(name, v):
        g = min(32, ch // 4)
        u = v.reshape(len(v), g, -1)
        u = (u - u.mean(2, keepdim=True)) / (u.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
        return u.reshape(v.shape) * w[name + ".weight"][:, None, None] + w[name + ".bias"][:, None, None]

    def silu(v):
        return v / (1 + torch.exp(-v))

    def block(name, v):
        h = conv(name + ".conv1", silu(norm(name + ".norm1", v)))
        h = h + (emb @ w[name + ".emb.weight"].T + w[name + ".emb.bias"])[:, :, None, None]
        h = conv(name + ".conv2", silu(norm(name + ".norm2", h)))
        return h + (conv(name + ".skip", v) if name + ".skip.weight" in w else v)

    def attention(name, v):
        if name + ".qkv.weight" not in w:
            return v
        q, k, u = conv(name + ".qkv", norm(name + ".norm", v)).flatten(2).chunk(3, 1)
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(-1)
        return v + conv(name + ".out", (u @ weights.transpose(1, 2)).view(v.shape))

    angle = t.double()[:, None] * torch.tensor([10000 ** (-i / (ch // 2 - 1)) for i in range(ch // 2)]).double()
    emb = torch.cat([angle.sin(), angle.cos()], 1) @ w["emb.0.weight"].T + w["emb.0.bias"]
    emb = silu(emb) @ w["emb.2.weight"].T + w["emb.2.bias"]
    if y is not None:
        emb = emb + w["label.weight"][y]
    if len(stages) > 1:
        emb = emb + w["resolution.weight"][stages.index(res)]
    emb = silu(emb)

    top = [stages[-1] // 2 ** i for i in range(L)].index(res)
    x = torch.cat([x[:, :, i::patch, j::patch, None] for i in range(patch) for j in range(patch)], -1)
    h = conv(f"encoder.conv_in.{res}", x.permute(0, 1, 4, 2, 3).flatten(1, 2))
    skips, k = [h], 0                                          # k: number of the stage in encoder.down
    for level in range(L):
        if level > top:
            h = conv(f"encoder.down.{k - 1}.0.1", F.pad(h, (0, 1, 0, 1)), stride=2)
            skips.append(h)
        for _ in range(config["blocks"]):
            if level >= top:
                h = attention(f"encoder.down.{k}.1", block(f"encoder.down.{k}.0", h))
                skips.append(h)
            k += 1
        k += 1                                                 # the way down
    h = block("encoder.mid.2", attention("encoder.mid.1", block("encoder.mid.0", h)))
    k = 0
    for level in reversed(range(top, L)):
        for i in range(config["blocks"] + 1):
            h = attention(f"decoder.up.{k}.1", block(f"decoder.up.{k}.0", torch.cat([h, skips.pop()], 1)))
            if i == config["blocks"] and level > top:
                last = 2 if level in config["attention"] else 1
                h = conv(f"decoder.up.{k}.{last}.1", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
            k += 1
    assert not skips and h.shape[1] == ch * mult[top]
    h = conv(f"decoder.conv_out.{res}", silu(norm(f"decoder.norm_out.{res}", h)))
    B, n, H, W = h.shape
    return h.view(B, n // patch ** 2, patch, patch, H, W).permute(0, 1, 4, 2, 5, 3).reshape(B, -1, H * patch, W * patch)


@pytest.mark.parametrize("stages, patch", [([32], 1), ([16, 32], 1), ([8, 16, 32], 1), ([8, 16, 32], 2)])
@torch.no_grad()
def test_network_is_the_plain_one(stages, patch):
    """At every resolution, with labels; widths differ from level to level."""
    config = config_of(mult=[1, 2, 3], blocks=2, patch=patch, labels=1, stages=stages, attention=[1])
    net = awake_net(config)
    w = {k: v.double() for k, v in net.state_dict().items()}
    for res in stages:
        x, t = randn(2, 1 if res == stages[0] else 2, res, res), torch.tensor([-70.5, 400.0], dtype=torch.float64)
        y = torch.tensor([2, 0])
        found, expected = net(x.float(), t.float(), y), plain_unet(w, config, x, t, y)
        assert found.shape == (2, 1, res, res) and expected.std() > 0.02
        assert torch.allclose(found, expected.float(), atol=2e-4), res


def test_only_what_is_active_gets_gradient():
    """A resolution moves all of the levels from its own to the bottom, its own entry, exit and embedding, and nothing
    else; so the sub-networks are nested, and their parameters shared."""
    config, reached = config_of(), []
    for i, r in enumerate(config["stages"]):
        net = awake_net(config)
        net(randn(2, 1 + (i > 0), r, r).float(), torch.tensor([10.0, 20.0])).square().sum().backward()
        moved = {name for name, p in net.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
        own = {name for name in moved if name.split(".")[1] in ("conv_in", "norm_out", "conv_out")}
        assert {name.split(".")[2] for name in own} == {str(r)} and len(own) == 6
        assert (net.resolution.weight.grad != 0).any(1).tolist() == [j == i for j in range(3)]
        down = {int(name.split(".")[2]) for name in moved if name.startswith("encoder.down")}
        up = {int(name.split(".")[2]) for name in moved if name.startswith("decoder.up")}
        first = 2 * (2 - i)                                    # a level is a block and a way down
        assert down == set(range(first, 5)) and up == set(range(2 * (i + 1)))
        assert {name for name in moved if name.startswith(("emb", "encoder.mid"))} == {
            name for name, _ in net.named_parameters() if name.startswith(("emb", "encoder.mid"))}
        reached.append(moved - own)
    assert all(a < b for a, b in zip(reached, reached[1:]))    # with all blocks of the lower one
    assert reached[-1] | {f"encoder.conv_in.{r}.weight" for r in (8, 16, 32)} < dict(net.named_parameters()).keys()


def test_parameters_are_shared():
    """Three stages have one stage's network, and for each further one an entry, an exit, an embedding, and the
    entries' channels of the condition."""
    count = [sum(p.numel() for p in c.build_net(config_of(stages=s)).parameters()) for s in ([32], [8, 16, 32])]
    ch, mult = 8, [1, 1, 2]
    extra = 9 * ch * (1 + 2 + 1) + 2 * ch                      # entries at 8 (1 channel) and 16 (2), one more at 32
    extra += sum(2 * ch * m + 9 * ch * m + 1 for m in mult[1:]) + 3 * 4 * ch
    assert count[1] - count[0] == extra


def test_macs_of_a_sub_network_are_those_inside():
    """Counted by hand, in units of ch^2 a pixel: what a level adds to the sub-network below it, without attention."""
    config, macs = config_of(ch=32, mult=[1, 1, 1], attention=[]), []
    with torch.device("meta"):
        net = c.build_net(config)
        for r in config["stages"]:
            macs.append(common.count_macs(net, torch.zeros(1, 1 + (r > 8), r, r), torch.zeros(1)))
    level = 2 * 9 + 2 * (2 * 9 + 9 + 2)                        # a block, two of 2 ch with their skips
    ways = 9 / 4 + 9                                           # down to the level below, up from it
    ends = (2 * 9 + 9) / 32                                    # entry and exit; a quarter of the pixels lower down
    for r, a, b, below in ((32, macs[1], macs[2], 2 * 9 + 9), (16, macs[0], macs[1], 9 + 9)):
        found = (b - a) / r ** 2 / 32 ** 2
        assert found == pytest.approx(level + ways + ends - below / 32 / 4, rel=0.002)


def test_resolution_embedding_and_label_reach_the_image():
    config = config_of(stages=[16, 32], labels=1)
    net, x, t = awake_net(config), randn(1, 1, 16, 16).float(), torch.zeros(1)
    a, b = (net(x, t, torch.tensor([y])) for y in (1, 2))
    assert (a - b).abs().max() > 1e-6
    net.resolution.weight.data[0] += 1
    assert (net(x, t, torch.tensor([1])) - a).abs().max() > 1e-6
    a = net(x, t, torch.tensor([1]))
    net.resolution.weight.data[1] += 1                         # that of 32 does not act at 16
    assert torch.equal(net(x, t, torch.tensor([1])), a)


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 1, 4, 4), (1, 1, 12, 12), (1, 1, 16, 32)])
def test_sizes_without_an_entry(shape):
    with pytest.raises(ValueError, match="no entry"):
        c.build_net(config_of())(torch.zeros(shape), torch.zeros(1))


# ---------------------------------------------------------------------------------------------
# Preconditioning, training
# ---------------------------------------------------------------------------------------------
def plain_edm_loss(net, x0, sigma, eps):
    """EDM's Eq. 7, 8 and Table 1, letter by letter; the network is told 1000 c_noise."""
    sd, s = 0.5, sigma[:, None, None, None]
    c_skip, c_out = sd ** 2 / (s ** 2 + sd ** 2), s * sd / (s ** 2 + sd ** 2) ** 0.5
    c_in, c_noise = 1 / (s ** 2 + sd ** 2) ** 0.5, sigma.log() / 4
    y = x0 + s * eps
    D = c_skip * y + c_out * net(c_in * y, 1000 * c_noise)
    return ((s ** 2 + sd ** 2) / (s * sd) ** 2 * (D - x0) ** 2).sum() / len(x0)


def test_the_off_switch_trains_as_edm():
    """--stages 32: the same loss and gradients as EDM's written here, for the same draws; a mean over pixels."""
    config, x = config_of(stages=[32], batch=3), torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8)
    torch.manual_seed(1)
    x0, y, sigma, s, eps = c.draw_batch(config, x, torch.arange(5), 1)
    assert sigma.shape == (3, 1) and s.shape == (3, 0) and eps.shape == x0.shape == (3, 1, 32, 32)
    grads, losses = [], []
    for loss_of in (lambda net: c.training_loss(net, config, x0, y, sigma, s, eps),
                    lambda net: plain_edm_loss(net, x0, sigma[:, 0], eps) / 32 ** 2):
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

        def net(x, t, y):
            seen.append((x, t))
            return torch.zeros_like(x)
        xt, level = x0 + sigma * eps, torch.tensor([sigma], dtype=torch.float64)
        skipped = c.denoise(net, xt, level)                    # c_skip xt
        assert seen[0][0].var() == pytest.approx(1, abs=0.02)
        assert float(seen[0][1]) == pytest.approx(250 * math.log(sigma))
        c_out = c.denoise(lambda x, *rest: torch.ones_like(x), xt, level) - skipped
        target = (x0 - skipped) / c_out
        assert target.var() == pytest.approx(1, abs=0.02)
        weight = (sigma ** 2 + 0.25) / (sigma * 0.5) ** 2      # lambda = 1 / c_out^2
        assert float(c_out[0, 0, 0, 0]) ** -2 == pytest.approx(weight)


def test_the_condition_enters_scaled_and_unskipped():
    xt, z = randn(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1)
    sigma, s, seen = torch.tensor([50.0, 0.01]).double(), torch.tensor([1.0, 0.3]).double(), []

    def net(x, *rest):
        seen.append(x)
        return torch.zeros(2, 3, 8, 8).double()
    x0_hat = c.denoise(net, xt, sigma, z, s)
    for b in range(2):
        assert torch.allclose(seen[0][b, :3], xt[b] / math.sqrt(sigma[b] ** 2 + 0.25))
        assert torch.allclose(seen[0][b, 3:], z[b] / math.sqrt(s[b] ** 2 + 0.25))
        assert torch.allclose(x0_hat[b], xt[b] * 0.25 / (sigma[b] ** 2 + 0.25))      # z is not in it


def test_draws_of_training():
    """sigma: EDM's percentiles; s: a normal ln s of its own mean and deviation for each stage; all independent."""
    torch.manual_seed(0)
    config = config_of(stages=[1, 2, 4], batch=100_000, s_mean=[0.65, -0.25], s_std=0.3)
    x0, y, sigma, s, *noise = c.draw_batch(config, torch.zeros(9, 1, 4, 4, dtype=torch.uint8), torch.arange(9), 1)
    assert [v.shape[-1] for v in noise] == [1, 2, 4, 1, 2] and sigma.shape == (100_000, 3) and s.shape == (100_000, 2)
    found = sigma.quantile(torch.tensor([0.01, 0.05, 0.16, 0.5, 0.84, 0.95, 0.99]), dim=0)
    for column in found.T:
        assert column.tolist() == pytest.approx([0.0185, 0.042, 0.091, 0.301, 1.0, 2.17, 4.91], rel=0.06)
    assert s.log().mean(0).tolist() == pytest.approx([0.65, -0.25], abs=0.005)
    assert s.log().std(0).tolist() == pytest.approx([0.3, 0.3], abs=0.005)
    columns = torch.cat([sigma.log(), s.log(), *[v.flatten(1) for v in noise]], 1).T
    assert (torch.corrcoef(columns) - torch.eye(len(columns))).abs().max() < 0.018


def test_levels_of_the_condition_are_the_plans():
    """The default: each stage around the level at which the paper's plan stops the stage below (D3)."""
    for stages, levels in (([32], []), ([16, 32], [1.0882]), ([8, 16, 32], [1.923, 0.782])):
        config = dict(config_of(stages=stages), s_mean=["plan"], data="fashion10k")
        x, y = c.load_data(config)
        assert np.exp(config["s_mean"]).tolist() == pytest.approx(levels, rel=1e-3)
        assert len(config["captions"]) == 10 and config["channels"] == 1 and config["res"] == 32
        again = dict(config)
        c.load_data(again)                                     # as --resume does
        assert again["s_mean"] == config["s_mean"]
    config.update(s_mean=["-1.2", "0.5"])
    c.load_data(config)
    assert config["s_mean"] == [-1.2, 0.5]


@pytest.mark.parametrize("changes, told", [
    (dict(stages=[8, 32]), "twice"), (dict(stages=[16]), "images' 32"), (dict(stages=[4, 8, 16, 32]), "levels"),
    (dict(stages=[16, 32], patch=16), "multiple"), (dict(stages=[16, 32], s_mean=["1", "2"]), "1 conditions"),
    (dict(stages=[32, 64]), "images' 32"), (dict(stages=[16, 32], s_mean=["x"]), "x"),
    (dict(stages=[32], given={"s_std"}), "--s-std: 1 stages have 0 conditions"),
    (dict(resume=True, labels=1, captions=["a", "b"]), "not the classes of the run")])
def test_options_that_do_not_fit(changes, told):
    with pytest.raises(ValueError, match=told):
        c.load_data(dict(config_of(), data="fashion10k", s_mean=["plan"]) | changes)


@pytest.mark.parametrize("channels", [1, 3])
def test_training_loss_by_hand(channels):
    """Truncation augmentation: the condition is the clean image halved, plus noise of its own level drawn at that
    size, repeated; losses are summed over pixels and resolutions, averaged over the batch, divided by the pixels."""
    config = config_of(stages=[2, 4, 8], channels=channels, batch=2, labels=1, s_mean=[0.1, -0.4])
    torch.manual_seed(3)
    x = torch.randint(0, 256, (5, channels, 8, 8), dtype=torch.uint8)
    batch = c.draw_batch(config, x, torch.arange(5), 1)
    x0, y, sigma, s, *noise = [v if v.dtype == torch.int64 else v.double() for v in batch]
    assert all(len(v) == 2 for v in batch) and torch.allclose(x0, x[y].double() / 127.5 - 1, atol=1e-6)
    seen = {}

    def net(x, t, label):
        seen[x.shape[-1]] = x
        assert label is y
        return x[:, :channels] * 0.5 + t.view(-1, 1, 1, 1) / 1000
    found = c.training_loss(net, config, x0, y, sigma, s, *noise)
    total, images = 0, {8: x0}
    for r in (4, 2):
        images[r] = images[2 * r].view(2, channels, r, 2, r, 2).mean((3, 5))
    for i, r in enumerate(config["stages"]):
        for b in range(2):
            v, n = float(sigma[b, i]), images[r][b] + sigma[b, i] * noise[i][b]
            F_x = 0.5 * n / math.sqrt(v ** 2 + 0.25) + math.log(v) / 4
            D = 0.25 / (v ** 2 + 0.25) * n + v * 0.5 / math.sqrt(v ** 2 + 0.25) * F_x
            total += (v ** 2 + 0.25) / (v * 0.5) ** 2 * float((D - images[r][b]).square().sum()) / 2
            if r > 2:
                z = images[r // 2][b] + s[b, i - 1] * noise[3 + i - 1][b]
                z = z.repeat_interleave(2, 1).repeat_interleave(2, 2)
                assert torch.allclose(seen[r][b, channels:], z / math.sqrt(float(s[b, i - 1]) ** 2 + 0.25))
        assert seen[r].shape[1] == channels * (1 if r == 2 else 2)
    assert float(found) == pytest.approx(total / (channels * 64), rel=1e-10)


def test_down_and_up():
    x = randn(1, 1, 256, 256)
    assert torch.allclose(c.downsample(x), F.interpolate(x, size=(128, 128), mode="area"))
    assert c.downsample(x).std() == pytest.approx(0.5, abs=0.01)                # D5: sigma at r/2 is 2 sigma at r
    assert torch.equal(c.downsample(c.upsample(x)), x)
    assert c.upsample(x).std() == pytest.approx(1, abs=0.01)
    assert [v.shape[-1] for v in c.pyramid_of(x, 3)] == [64, 128, 256]


def test_it_learns_eight_images():
    """All stages together better than any estimate that knows the noise level but not the images."""
    torch.manual_seed(0)
    row = torch.arange(16) / 15 * 2 - 1
    x = torch.stack([torch.sin((k % 4 + 1) * (row if k < 4 else row[:, None])).sign().expand(16, 16)
                     for k in range(8)])[:, None]
    x = ((x * 0.9 + 1) * 127.5).to(torch.uint8)
    config = config_of(stages=[8, 16], batch=8, mult=[1, 1], attention=[1])
    net, losses = c.build_net(config), []
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(60):
        batch = c.draw_batch(config, x, torch.zeros(8, dtype=torch.long), step)
        best = 0                                               # loss of the best multiple of xt
        for sigma, image in zip(batch[2].T, c.pyramid_of(batch[0], 2)):
            p = float(image.square().mean())
            weight = (sigma ** 2 + 0.25) / (sigma * 0.5) ** 2
            best += float((weight * p * sigma ** 2 / (p + sigma ** 2)).mean()) * image[0].numel() / 256
        loss = c.training_loss(net, config, *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), best))
    mine, theirs = (sum(v[-20:]) for v in zip(*losses))
    assert losses[0][0] > 0.9 * losses[0][1] and mine < 0.7 * theirs, losses[::10]


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------
def gaussian(variance):
    """Exact denoiser of data N(0, variance), pixel by pixel."""
    return lambda xt, sigma: xt * variance / (variance + sigma ** 2)


def plain_heun(denoiser, noise, sigmas, K=None):
    """EDM's Algorithm 1 with a budget of K calls; the sequence's last entry is 0."""
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
    sigmas, noise, calls = c.noise_levels(N, 0.01, 50), randn(2, 1, 4, 4), []

    def denoiser(xt, sigma):
        calls.append(sigma)
        return torch.tanh(xt / (1 + sigma)) + 0.1 * math.cos(sigma)
    if evaluations and evaluations > 2 * N - 1:
        with pytest.raises(ValueError, match=f"1 .. {2 * N - 1}"):
            c.heun_sample(denoiser, noise, sigmas, evaluations)
        return
    found, n = c.heun_sample(denoiser, noise, sigmas, evaluations), len(calls)
    expected, spent = plain_heun(denoiser, noise, sigmas, evaluations)
    assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13) and found.dtype == torch.float64
    assert n == spent == (evaluations or 2 * N - 1)            # NFE


def test_the_state_is_float64_and_the_network_sees_float32():
    """float32 noise: an intermediate state in float32 would lose the digits that are asserted here."""
    seen, noise, sigmas = [], randn(1, 1, 4, 4).float(), c.noise_levels(9, 0.002, 80)

    def denoiser(xt, sigma):
        seen.append(xt.dtype)
        return torch.tanh(xt)
    found = c.heun_sample(denoiser, noise, sigmas, 11)
    expected, _ = plain_heun(lambda xt, sigma: torch.tanh(xt.float()), noise, sigmas, 11)
    assert set(seen) == {torch.float32} and torch.equal(found, expected)

    class OnMPS(torch.Tensor):
        device = SimpleNamespace(type="mps")                   # which has no float64
    state = c.heun_sample(lambda xt, sigma: xt * 0, noise.as_subclass(OnMPS), sigmas, 2)
    assert state.dtype == torch.float32


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


def test_cascade_sample_by_hand():
    """Three stages: the noisy image of one is the condition of the next, unchanged in all its evaluations."""
    ladders = [c.noise_levels(5, 0.002, 80), c.noise_levels(4, 0.01, 50), c.noise_levels(3, 0.01, 50)]
    counts, noise = [4, 3, 5], [randn(2, 1, r, r, seed=r) for r in (4, 8, 16)]

    def denoiser(xt, sigma, z, s):
        return torch.tanh(xt) / (1 + sigma) + (0 if z is None else 0.3 * z.sin() / (1 + s))
    found = c.cascade_sample(list(zip([denoiser] * 3, noise, ladders, [4, 3, None])))              # None: all 5
    z = s = None
    for x, e, sigmas, K in zip(found, noise, ladders, counts):
        expected, spent = plain_heun(lambda xt, sigma, z=z, s=s: denoiser(xt, sigma, z, s), e, sigmas, K)
        assert torch.allclose(x, expected, rtol=1e-12, atol=1e-12) and spent == K
        z, s = expected.repeat_interleave(2, 2).repeat_interleave(2, 3), sigmas[math.ceil(K / 2)]


@torch.no_grad()
def test_the_off_switch_samples_as_edm():
    """--stages 32: the same tensors as EDM's sampler written here."""
    config = config_of(stages=[32], labels=1)
    net, plan = awake_net(config), c.make_plan(None, dict(config, checkpoint="", out="/nowhere"), "cpu")
    assert plan == dict(stages=[32], steps=[18], evaluations=[35], sigma_min=[0.002], sigma_max=[80.0])
    found = c.generate(net, config, plan, range(2, 4), "cpu")
    sigmas = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)] + [0.0]

    def edm(xt, sigma):
        return c.denoise(net, xt.float(), torch.full((2,), sigma), y=torch.tensor([2, 0])).double()
    expected, nfe = plain_heun(edm, common.noise_for(range(2, 4), (1, 32, 32)), sigmas)
    assert torch.equal(found, expected) and nfe == 35


def test_generate_is_the_cascade_of_the_network():
    """Seed i makes image i; noise of the full resolution does not depend on the stages; classes in turn; the condition
    is the noisy image of the stage below."""
    config = config_of(labels=1, stages=[16, 32])
    net, plan, calls = awake_net(config), c.paper_plan([16, 32], [3, 2], [3]), []

    def spy(x, t, y):
        calls.append((x, t, y))
        return net(x, t, y)
    images = c.generate(spy, config, plan, [4, 5, 6], "cpu")
    assert [x.shape[1:] for x, _, _ in calls] == [(1, 16, 16)] * 3 + [(2, 32, 32)] * 3
    assert all(y.tolist() == [1, 2, 0] for _, _, y in calls)
    sigma, s = (c.noise_levels(3, 0.002, 80) + [50.0])[-1], c.stops_of(plan)[0]
    assert calls[3][1].tolist() == pytest.approx([250 * math.log(sigma)] * 3)
    noise = common.noise_for([4, 5, 6], (1, 32, 32))
    assert torch.allclose(calls[3][0][:, :1], 50 * noise / math.sqrt(50 ** 2 + 0.25))
    z = calls[3][0][:, 1:] * math.sqrt(s ** 2 + 0.25)
    assert torch.equal(z, c.upsample(c.downsample(z))) and all(torch.equal(x[:, 1:], calls[3][0][:, 1:])
                                                              for x, _, _ in calls[3:])
    alone = c.generate(net, config, plan, [5], "cpu")
    assert torch.allclose(alone[0], images[1], atol=1e-4)
    assert not torch.allclose(c.generate(net, dict(config, classes=[0]), plan, [5], "cpu"), alone, atol=1e-4)
    with pytest.raises(ValueError, match="0 .. 2"):
        c.generate(net, dict(config, classes=[3]), plan, [5], "cpu")


def test_generate_counts_on_the_meta_device(monkeypatch):
    """The whole sampler's MACs are the evaluations of the plan times the networks' own."""
    monkeypatch.setattr(c, "autocast", lambda *args: contextlib.nullcontext())
    config, plan = config_of(labels=1), c.paper_plan([8, 16, 32], [3, 2, 2], [3, 2])
    with torch.device("meta"):
        net, each = c.build_net(config).eval(), []
        for r in config["stages"]:
            xt, y = torch.zeros(1, 1 + (r > 8), r, r), torch.zeros(1, dtype=torch.long)
            each.append(common.count_macs(net, xt, torch.zeros(1), y))
    whole = common.count_macs(lambda: c.generate(net, config, plan, [0], torch.device("meta")))
    assert whole == 3 * each[0] + 2 * each[1] + 3 * each[2]


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
# Plans and search
# ---------------------------------------------------------------------------------------------
def test_plans_of_the_paper():
    """Evaluations of Tables 2, 3, 6, 7 and 10; levels near those of the two-stage optima (D7)."""
    for stages, steps, nfe in (([16, 32], [18, 9], [19, 17]), ([8, 16, 32], [18, 12, 9], [18, 13, 17]),
                               ([32, 64], [40, 20], [49, 39]), ([8, 16, 32, 64], [20] * 4, [22, 23, 23, 39]),
                               ([64], [40], [79]), ([64, 128], [18, 9], [19, 17]), ([128], [18], [35])):
        plan = c.paper_plan(stages)
        assert plan["stages"] == stages and plan["steps"] == steps and plan["evaluations"] == nfe
        assert plan["sigma_min"] == [0.002] + [0.01] * (len(stages) - 1)
        assert plan["sigma_max"] == [80] + [50] * (len(stages) - 1)
        stops = c.stops_of(plan)
        assert stops[-1] == 0 and all(0.5 < s < 2 for s in stops[:-1])
    assert "16x16: 19 of 35 evaluations, sigma 80 to 1.088, then 32x32: 17 of 17 evaluations, sigma 50 to 0" in (
        c.describe(c.paper_plan([16, 32])))


@pytest.mark.parametrize("steps, truncate, told", [
    ([18], [0], "2, 1 and 2"), ([18, 9, 9], [0], "2, 1 and 2"), ([0], [1, 2], "2, 1 and 2"), ([3, 2], [6], "1 .. 5"),
    ([3, 2], [-1], "1 .. 5")])
def test_plans_that_do_not_fit(steps, truncate, told):
    with pytest.raises(ValueError, match=told):
        c.paper_plan([16, 32], steps, truncate)


def test_the_last_noise_level_of_a_stage():
    """--sigma-min: of each stage; 0: the paper's; levels from sigma_max down to it; not above sigma_max."""
    plan = c.paper_plan([16, 32], [4, 3], [3], [0, 0.3])
    assert plan["sigma_min"] == [0.002, 0.3] and plan["sigma_max"] == [80, 50]
    assert c.levels_of(plan)[-1] == [pytest.approx(50), pytest.approx(((50 ** (1 / 7) + 0.3 ** (1 / 7)) / 2) ** 7),
                                     pytest.approx(0.3), 0]
    with pytest.raises(ValueError, match="2, 1 and 2"):
        c.paper_plan([16, 32], sigma_min=[0.3])
    with pytest.raises(ValueError, match="fall strictly"):
        c.heun_sample(None, None, c.levels_of(c.paper_plan([16, 32], sigma_min=[0, 60]))[-1])


def test_make_plan_finds_what_was_searched(tmp_path):
    config = config_of(stages=[16, 32], out=str(tmp_path), checkpoint="", step=7)
    paper, path = c.paper_plan([16, 32]), tmp_path / c.plan_name(config)
    assert c.make_plan(None, config, "cpu") == paper
    found = dict(paper, evaluations=[21, 17], step=7)
    common.save_json(path, found)
    assert c.make_plan(None, config, "cpu") == found
    assert c.make_plan(None, dict(config, step=8), "cpu") == paper               # of another network
    assert c.make_plan(None, dict(config, truncate=[17]), "cpu")["evaluations"] == [17, 17]
    for damage, told in ((dict(steps=[18]), "--steps"), (dict(evaluations=[40, 17]), "--truncate"),
                         (dict(evaluations=[19, 17, 3]), "--truncate"), (dict(sigma_max=[80.0]), "--sigma-min"),
                         (dict(sigma_max=[80.0, 50.0, 50.0]), "--sigma-min")):
        common.save_json(path, {**found, **damage})
        with pytest.raises(ValueError, match=told):
            c.make_plan(None, config, "cpu")
    path.write_text(json.dumps(dict(step=7)))
    with pytest.raises(ValueError, match="no plan"):
        c.make_plan(None, config, "cpu")
    with pytest.raises(ValueError, match="--labels"):
        c.make_plan(None, dict(config, classes=[1]), "cpu")


def test_search_takes_the_lowest_fd(tmp_path, monkeypatch):
    """Stage by stage, each K against the best of the stages below: with a sampler whose FD is known."""
    config = config_of(out=str(tmp_path), checkpoint="", step=3, data="fashion10k", classes=[2], labels=1)
    best, tried = [20, 11], []

    def sample(net, config, plan, seeds, device):
        tried.append(plan["evaluations"])
        assert config["classes"] == [-1]                       # whatever is sampled afterwards
        assert len(seeds) == c.SEARCH_N == 1000
        far = sum(abs(a - b) for a, b in zip(plan["evaluations"], best))
        return torch.full((len(seeds), 1, 32, 32), far, dtype=torch.uint8)
    monkeypatch.setattr(c, "sample", sample)
    monkeypatch.setattr(c, "extract", lambda extractor, x: (x.double().mean((1, 2, 3)), None))
    monkeypatch.setattr(c, "feature_stats", lambda features: float(features.mean()))
    monkeypatch.setattr(c, "frechet_distance", lambda reference, mean: mean)
    plan = c.search(None, config, "cpu")
    assert plan["evaluations"] == [20, 11, 17] and c.make_plan(None, config, "cpu") == plan
    assert [t[0] for t in tried[:7]] == [14, 16, 17, 18, 19, 20, 22] and {t[0] for t in tried[7:]} == {20}
    assert [t[1] for t in tried[7:]] == [9, 11, 12, 13, 14, 15, 17] and plan["step"] == 3
    assert len(plan["searched"]) == 14 and min(row["fd"] for row in plan["searched"]) == 0
    with pytest.raises(ValueError, match="one stage"):
        c.search(None, config_of(stages=[32]), "cpu")
    with pytest.raises(ValueError, match="--labels"):
        c.search(None, config_of(classes=[1], labels=0), "cpu")


def test_search_compares_with_all_classes(tmp_path, monkeypatch):
    """A folder's images come class by class: those that are compared with are spread over all of them."""
    x, seen = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 32, 32), []
    monkeypatch.setattr(c, "load_images", lambda name, res: (x, None, None))
    monkeypatch.setattr(c, "extract", lambda extractor, x: (seen.append(x[:, 0, 0, 0].tolist()), None))
    monkeypatch.setattr(c, "feature_stats", lambda features: None)
    monkeypatch.setattr(c, "frechet_distance", lambda reference, other: 0.0)
    monkeypatch.setattr(c, "sample", lambda *args: x[:2])
    for most, step in ((60, 1), (50, 1), (20, 3)):
        monkeypatch.setattr(c, "REFERENCE_N", most)
        c.search(None, config_of(out=str(tmp_path), checkpoint="", step=3, data="fashion10k"), "cpu")
        assert seen[0] == list(range(0, 50, step)) and len(seen[0]) <= most
        seen.clear()


# ---------------------------------------------------------------------------------------------
# By the command line
# ---------------------------------------------------------------------------------------------
def run(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["lowdiff.py", *map(str, argv)])
    c.main()


def test_train_search_and_sample(tmp_path, monkeypatch, capsys):
    """Two stages with labels; searched with real features of few samples; the plan is found by --sample."""
    run(monkeypatch, "--train", "--stages", 16, 32, "--ch", 8, "--mult", 1, 1, "--attention", 1, "--batch", 8,
        "--iters", 4, "--save-every", 4, "--s-std", 0.5, "--out", tmp_path)
    saved = common.load_checkpoint(tmp_path / "checkpoint.pt", "lowdiff")
    assert saved["config"]["s_mean"] == pytest.approx([math.log(1.0882)], abs=1e-3) and saved["config"]["labels"] == 1
    assert {key.split(".")[2] for key in saved["ema"] if "conv_in" in key} == {"16", "32"}
    assert (tmp_path / "preview.png").exists()
    monkeypatch.setattr(c, "SEARCH_N", 130)
    monkeypatch.setattr(c, "REFERENCE_N", 130)
    monkeypatch.setattr(c, "SHIFTS", (-1, 0))
    run(monkeypatch, "--search", "--sample", "--n", 4, "--steps", 3, 2, "--truncate", 3, "--out", tmp_path)
    assert "FD[small-fashion]@130" in capsys.readouterr().out
    found = json.loads((tmp_path / "plan_16-32.json").read_text())
    assert found["step"] == 4 and found["evaluations"][0] in (2, 3)
    run(monkeypatch, "--sample", "--n", 4, "--classes", 3, "--out", tmp_path)
    assert f"16x16: {found['evaluations'][0]} of 5 evaluations" in capsys.readouterr().out
