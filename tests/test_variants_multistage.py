"""The variants of multistage.py against independent oracles (definitions, loops, brute force, lowdiff.py, c2f_trd.py),
and by their command lines with tiny networks."""
import contextlib
import functools
import io
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import c2f_trd
import common
import lowdiff
import multistage as m

ROOT = Path(common.__file__).resolve().parent
sys.path[:0] = [str(ROOT / "variants"), str(ROOT / "results")]
import evaluate  # noqa: E402
import multistage_clusterings as clusterings  # noqa: E402
import multistage_edm as edm  # noqa: E402
import multistage_latent as latent  # noqa: E402
import multistage_separate as separate  # noqa: E402

MODULES = (edm, separate, latent)
TINY = "--ch 8 --mult 1 2 --attention 1 --widths 12 8 --batch 8 --iters 6 --save-every 3 --precision fp32".split()


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny(module=m, **changes):
    module = getattr(module, "script", module)
    config = {key: option[0] for group in module.CONFIG.values() for key, option in group.items()}
    config.update({action: False for action in common.ACTIONS}, ch=8, widths=[12, 8, 4], mult=[1, 2], attention=[1],
                  patch=2, edges=[0.4, 0.6], channels=1, res=16, batch=16, precision="fp32", given=set())
    return dict(config, **changes)


def net_of(config, module=m, seed=0):
    torch.manual_seed(seed)
    return getattr(module, "script", module).build_net(config).eval()


@pytest.fixture(scope="module")
def garments():
    return common.to_float(common.load_images("fashion10k")[0][:500])


@functools.cache
def few(name, res=32):
    """160 images of half the side: 16x16 in Fashion-MNIST."""
    x, y, captions = common.load_images(name, res)
    return F.avg_pool2d(x[:160].float(), 2).round().to(torch.uint8), y[:160], captions


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    for module in (separate.script, edm.script, latent.script, latent, clusterings):
        monkeypatch.setattr(module, "load_images", few)


@pytest.fixture
def start(monkeypatch):
    """`python variants/VARIANT.py ARGV` in this process: what it prints. Errors are raised."""
    def run(module, *argv):
        out = io.StringIO()
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            getattr(module, "script", module).main()
        return out.getvalue()
    return run


def load(path):
    return torch.load(path, weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ---------------------------------------------------------------------------------------------
# Clusterings
# ---------------------------------------------------------------------------------------------
def test_partition_is_the_best():
    """Dynamic programming against all partitions, for both rules of Eq. 22, with and without bounds."""
    root = randn(9, 3, dtype=torch.float64)
    similarity = (root @ root.T).tanh().abs()
    similarity.fill_diagonal_(1)
    for mean, n, (low, high) in itertools.product((False, True), (1, 2, 3, 4), ((1, None), (2, 5))):
        cost = clusterings.similarity_cost(similarity, mean)

        def total(cuts):
            parts = [similarity[a:b, a:b] for a, b in itertools.pairwise([0, *cuts, 9])]
            if any(not low <= len(p) <= (high or 9) for p in parts):
                return math.inf
            return float(sum(-p.mean() if mean else (1 - p).sum() for p in parts))

        options = {cuts: total(cuts) for cuts in itertools.combinations(range(1, 9), n - 1)}
        if min(options.values()) == math.inf:
            with pytest.raises(ValueError, match="do not fit"):
                clusterings.best_runs(cost, n, low, high)
        else:
            found = clusterings.best_runs(cost, n, low, high)
            assert options[tuple(found)] == pytest.approx(min(options.values()))
        if not mean and not high:
            assert found == m.best_partition(similarity, n)
    with pytest.raises(ValueError, match="stages do not fit"):
        clusterings.best_runs(clusterings.similarity_cost(similarity), 10)


def test_clusterings_of_go_et_al():
    assert clusterings.cluster("snr", 3)[0] == [0.348, 0.709]  # Table 4, to the digit
    assert clusterings.cluster("time", 3)[0] == pytest.approx([1 / 3, 2 / 3], abs=0.002)
    blocks = torch.block_diag(*(torch.ones(n, n) for n in (30, 20, 50))).double()
    assert clusterings.cluster("gradient", 3, affinity=blocks) == ([0.31, 0.51], {})       # first t of a cluster
    for n, method in itertools.product((2, 4, 5), ("time", "snr")):            # D7: of 1 / 2n to 3 / 2n of the levels
        sizes = [b - a for a, b in itertools.pairwise([0, *clusterings.cluster(method, n)[0], 1])]
        assert len(sizes) == n and min(sizes) >= 0.5 / n - 0.002 and max(sizes) <= 1.5 / n + 0.002


def test_affinity_cost_by_loops():
    affinity = randn(7, 7)
    cost = clusterings.affinity_cost(affinity)
    for i, j in itertools.combinations(range(8), 2):
        assert float(cost[i, j]) == pytest.approx(-float(affinity[i + (j - i) // 2, i:j].sum()), abs=1e-5)


@pytest.mark.parametrize("loss", ["vp", "edm"])
def test_gradient_affinity(loss):
    """One entry by its definition; and the clustering is of multistage.py's loss as well as of EDM's."""
    config, x = tiny(widths=[8], edges=[]), randn(20, 1, 16, 16)
    net = net_of(config)

    def loss_of(x0, t, eps):
        if loss == "vp":
            return m.training_loss(net, config, x0, t, eps)
        return edm.training_loss(net, config, x0, m.sigma_of(t).float(), eps)

    found = clusterings.gradient_affinity(net, loss_of, x, levels=6, batch=4)
    assert torch.allclose(found, found.T) and torch.allclose(found.diagonal(), torch.ones(6).double())
    g = torch.Generator().manual_seed(m.CLUSTER_SEED)
    x0 = x[torch.randint(0, 20, (4,), generator=g)]
    eps, gradients = torch.randn(x0.shape, generator=g), []
    for t in (2 / 6, 5 / 6):
        net.zero_grad()
        loss_of(x0, torch.full((4,), t), eps).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert float(found[1, 4]) == pytest.approx(float(F.cosine_similarity(*gradients, dim=0)), abs=1e-4)


def test_last_crossing():
    """Both readings of Eq. 7 by loops."""
    t = torch.linspace(0.001, 1, 400).double()
    for seed, shape in enumerate((lambda t: 1 - t, lambda t: 1 - 2 * t * (t < 0.5), lambda t: t * 0 + 1,
                                  lambda t: t * 0)):
        s = (shape(t) + 0.05 * randn(400, seed=seed)).clamp(0, 1)
        good = [k for k in range(400) if sum(s.tolist()[:k + 1]) / (k + 1) >= 0.9]
        assert clusterings.last_crossing(t, s) == pytest.approx(float(t[good[-1] if good else 0]))
    dip = torch.where((t > 0.3) & (t < 0.4), 0.0, 1.0).double()                # falls to .75, rises above .9 at the end
    assert clusterings.last_crossing(t, dip) == 1 and m.first_crossing(t, dip) < 0.35


def naive_denoiser(xt, sigma, data):
    """Proposition 1 as printed at scale 1, one sample at a time, in float64."""
    out = []
    for x in xt.double():
        w = torch.stack([-((x - y.double()) ** 2).sum() / (2 * sigma ** 2) for y in data]).softmax(0)
        out.append((x - (w.view(-1, 1, 1, 1) * data.double()).sum(0)) / sigma)
    return torch.stack(out)


def test_similarities_by_definition(garments):
    data = garments[:40]
    s1, (t, _, other) = clusterings.similarity_to_last(data, 30, seed=3), m.similarity_to_ends(data, 30, seed=3)
    g = torch.Generator().manual_seed(3)                       # the same draws
    index = torch.randint(0, 40, (30,), generator=g)
    assert torch.equal((1e-3 + (1 - 1e-3) * torch.rand(30, generator=g, dtype=torch.float64)).sort().values, t)
    eps = torch.randn(30, 1, 32, 32, generator=g)
    for k in range(0, 30, 7):
        hats = [naive_denoiser((data[index[k]] + sigma * eps[k])[None], sigma, data)
                for sigma in (float(m.sigma_of(t[k])), float(m.sigma_of(1.0)))]
        assert float(s1[k]) == pytest.approx(float(((hats[0] - hats[1]).abs() <= 2 / 256).double().mean()), abs=0.01)
    assert not torch.allclose(s1, other, atol=0.1)             # the official code's

    nodes = torch.tensor([0.01, 0.3, 0.5]).double()
    g = torch.Generator().manual_seed(1)
    x0, eps = data[torch.randint(0, 40, (6,), generator=g)], torch.randn(6, 1, 32, 32, generator=g)
    s, both = clusterings.similarity_map_of_x0(data, 6, nodes, seed=1), []
    for sigma in m.sigma_of(nodes[1:]).tolist():
        xt = (x0 + sigma * eps).double()
        both.append(xt - sigma * naive_denoiser(xt, sigma, data))
    near = ((both[0] - both[1]).abs() <= 2 / 256).double().mean()
    assert 0.05 < near < 0.95 and abs(float(s[1, 2] - near)) < 0.01
    assert not torch.equal(s, m.similarity_map(data, 6, nodes, seed=1))


@pytest.mark.parametrize("method, n", [("optimal", 3), ("optimal2", 3)])
def test_the_first_reading_is_ours(garments, method, n):
    edges, readings = clusterings.cluster(method, n, garments[:200], 200)
    assert edges == m.cluster_timesteps(method, n, garments[:200], 200)[0] == next(iter(readings.values()))
    assert len(readings) == 4 and all(len(found) == n - 1 for found in readings.values())
    if method == "optimal":
        assert readings["first crossing, eps*_1 of x_1"][1] > edges[1] + 0.05  # D3


def test_tailored_widths():
    widths = functools.partial(clusterings.tailored_widths, edges_of_widths=(0.442, 0.631))
    assert widths([0.442, 0.631], [192, 128, 16]) == [192, 128, 16] == widths([0.1, 0.2], [192, 128, 16])
    assert widths([], [36, 24, 8]) == [24]                     # .442 * 36 + .189 * 24 + .369 * 8 = 23.4
    assert widths([0.221, 0.442, 0.631], [36, 24, 8]) == [36, 36, 24, 8]
    assert widths([0.631], [36, 24, 8]) == [32, 8]             # (.442 * 36 + .189 * 24) / .631 = 32.4


def test_the_command_of_the_clusterings(tmp_path, monkeypatch):
    def run(*argv):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            clusterings.main([*map(str, argv), "--out", str(tmp_path)])
        return out.getvalue()
    out = run("time", "--stages", 4)
    edges = json.loads((tmp_path / "plan_time_4.json").read_text())["edges"]
    assert f"python multistage.py --train --edges {' '.join(map(str, edges))} --widths 48" in out
    config, plan = tiny(widths=[8], edges=[]), tmp_path / "plan_optimal_3_unit.json"
    assert "arg max, eps*_1 of x_1" in run("optimal", "--samples", 200, "--unit-range") and plan.exists()
    state = dict(script="multistage", step=1)
    torch.save(dict(state, config=config, ema=net_of(config).state_dict()), tmp_path / "one.pt")
    torch.save(dict(state, config=tiny(), ema=net_of(tiny()).state_dict()), tmp_path / "three.pt")
    monkeypatch.setattr(clusterings, "gradient_affinity", functools.partial(
        clusterings.gradient_affinity, levels=8, batch=4))
    assert "gradient: edges [" in run("gradient", "--checkpoint", tmp_path / "one.pt")
    for argv, words in ((["gradient"], "needs --checkpoint"), (["time", "--stages", 1], "2 to 20"),
                        (["gradient", "--checkpoint", tmp_path / "three.pt"], "3 decoders"), (["x"], "invalid choice"),
                        (["snr", "--unit-range"], "--unit-range"), (["optimal", "--data", "nonexist"], "nonexist"),
                        (["gradient", "--data", "emoji", "--checkpoint", tmp_path / "one.pt"], "emoji has images of")):
        with pytest.raises(ValueError, match=words) as error:
            run(*argv)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------
# EDM
# ---------------------------------------------------------------------------------------------
@torch.no_grad()
def test_one_width_is_lowdiffs_edm():
    """Off switch: with the same weights the images and the loss of lowdiff.py's one stage, bit for bit."""
    config = tiny(edm, widths=[8], edges=[], steps=4)
    net = net_of(config, edm)
    theirs = dict(tiny(lowdiff), stages=[16], labels=0, s_mean=[])
    other = net_of(theirs, lowdiff)
    ours = list(net.state_dict().values())
    assert [v.shape for v in other.state_dict().values()] == [v.shape for v in ours]
    other.load_state_dict(dict(zip(other.state_dict(), ours)))
    plan = edm.make_plan(net, config, "cpu")
    assert plan["by_stage"] == [plan["nfe"]] == [7]
    assert torch.equal(edm.generate(net, config, plan, range(3), "cpu"), lowdiff.generate(
        other, theirs, lowdiff.paper_plan([16], [4]), range(3), "cpu"))
    x0, eps, sigma = randn(4, 1, 16, 16), randn(4, 1, 16, 16, seed=1), torch.tensor([0.01, 0.3, 2.0, 50.0])
    assert torch.equal(edm.training_loss(net, config, x0, sigma, eps), lowdiff.training_loss(
        other, theirs, x0, None, sigma[:, None], None, eps))


@pytest.mark.parametrize("edges, shares", [([0.2, 0.3], None), ([0.442, 0.631], [0.96139, 0.03511, 0.00350])])
def test_noise_levels_of_edm(edges, shares):
    """ln sigma is N(-1.2, 1.2^2), rising in a batch; each stage has its share: of the official code's batches (D9)."""
    x, config, sigmas = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), tiny(edm, batch=64, edges=edges), []
    for step in range(400):
        torch.manual_seed(step)
        x0, sigma, eps = edm.draw_batch(config, x, None, step)
        assert sigma.shape == (64,) and sigma.dtype == torch.float32 and torch.equal(sigma, sigma.sort().values)
        sigmas.append(sigma.double())
    sigma, normal = torch.cat(sigmas), torch.distributions.Normal(-1.2, 1.2)
    u = normal.cdf(sigma.log()).sort().values                  # Kolmogorov-Smirnov: even between the quantiles
    assert float((u - (torch.arange(len(u)) + 0.5) / len(u)).abs().max()) < 1.95 / len(u) ** 0.5
    bounds = [0, *(float(normal.cdf(m.sigma_of(t).log())) for t in edges), 1]
    stages = edm.sigma_stage(sigma, edges)
    for s, (low, high) in enumerate(itertools.pairwise(bounds)):
        p = high - low
        assert abs(float((stages == s).double().mean()) - p) < 4 * (p * (1 - p) / len(sigma)) ** 0.5
        assert shares is None or p == pytest.approx(shares[s], abs=3e-4)
    with pytest.raises(ValueError, match="--shares"):          # these are EDM's: others are refused
        common.parse_config("multistage_edm", edm.script.CONFIG, "", ["--train", "--shares", "0.7", "0.2", "0.1"])


@torch.no_grad()
def test_evaluations_of_edm():
    """Whose decoder each of Heun's evaluations is; as planned, with the MACs of those."""
    config, seen = tiny(edm, edges=[0.442, 0.631]), []
    plan = edm.make_plan(None, config, "cpu")
    assert plan["by_stage"] == [18, 4, 13] and plan["nfe"] == 35 and "18 + 4 + 13" in edm.describe(plan)
    net, plan = net_of(config, edm), edm.make_plan(None, dict(config, steps=4), "cpu")
    for s, decoder in enumerate(net.decoders):
        decoder.register_forward_hook(lambda *_, s=s: seen.append(s))
    edm.generate(net, config, plan, [0], "cpu")
    assert seen == [edm.sigma_stage(sigma, config["edges"]) for sigma in plan["sigmas"]]
    assert edm.preview(net, config, "cpu").shape == (32, 1, 16, 16)


# ---------------------------------------------------------------------------------------------
# Separate networks
# ---------------------------------------------------------------------------------------------
@torch.no_grad()
def test_separate_networks():
    """Each sample by its own network; with one width it is multistage.py's plain network, bit for bit."""
    config, x = tiny(separate), randn(7, 1, 16, 16)
    net, t = net_of(config, separate), torch.tensor([0.5, 0.05, 0.99, 0.39, 0.61, 0.1, 0.45])
    stage = m.stage_of(t, config["edges"])
    assert [n.decoders[0].conv_out.in_channels for n in net.nets] == [12, 8, 4]
    assert torch.allclose(net(x, 999 * t, stage), torch.cat(
        [net.nets[s](x[i:i + 1], 999 * t[i:i + 1]) for i, s in enumerate(stage.tolist())]), atol=1e-5)
    assert torch.equal(net(x, 999 * t, 1), net.nets[1](x, 999 * t))
    with pytest.raises(ValueError, match="no decoder for stage"):
        net(x, t, 3)
    config = tiny(separate, widths=[8], edges=[])
    net, plain, plan = net_of(config, separate), net_of(config), dict(nfe=4, order=3)
    assert equal([*net.state_dict().values()], [*plain.state_dict().values()])
    assert torch.equal(separate.script.generate(net, config, plan, range(2), "cpu"),
                       m.generate(plain, config, plan, range(2), "cpu"))


def test_early_stopping(tmp_path, start, monkeypatch):
    """Of each network the average is kept that was best, at a save, on images that no step has seen; sampling takes
    it."""
    options = [*TINY, "--patch", 2, "--edges", 0.5, "--early-stopping", 1, "--lr", 0.1, "--ema", 0, "--save-every", 1]
    seen, whole = [], tmp_path / "whole"
    loss, runs, keep = separate.script.training_loss, [], separate.Separate.keep
    monkeypatch.setattr(separate.script, "training_loss", lambda net, config, x0, *rest: (
        seen.append(x0), loss(net, config, x0, *rest))[1])
    monkeypatch.setattr(separate.Separate, "keep", lambda net, losses, step: (
        keep(net, losses, step), runs.append((losses, [separate.vector_of(n) for n in net.nets])))[0])
    monkeypatch.setattr(separate.script, "WARMUP", 1)          # so fast that it is not always getting better
    monkeypatch.setattr(separate.script, "DECAY", 1e-6)
    monkeypatch.setattr(separate.script, "preview", lambda *_: torch.zeros(1, 1, 4, 4))
    start(separate, "--train", *options, "--out", whole)
    saved, config = load(whole / "checkpoint.pt"), tiny(separate, checkpoint=str(whole / "checkpoint.pt"))
    held_out = common.to_float(few("fashion10k")[0][9::10])
    assert len(separate.held_out[0]) == 16 and torch.equal(separate.held_out[0], held_out)
    assert not any((x == held_out[:, None]).flatten(2).all(2).any() for x in seen)
    best = [min(range(6), key=lambda k: runs[k][0][s]) for s in range(2)]
    assert saved["ema"]["best_step"].tolist() == [k + 1 for k in best] and min(best) < 5
    with contextlib.redirect_stdout(io.StringIO()):
        net, config = separate.script.load_net(config, torch.device("cpu"))
    eps = common.noise_for(range(16), (1, 16, 16))
    for s, (low, high) in enumerate(((1e-5, 0.5), (0.5, 1.0))):
        assert torch.equal(separate.vector_of(net.nets[s]), runs[best[s]][1][s])
        t = low + (high - low) * (torch.arange(16) + 0.5) / 16                 # the loss by its definition
        sigma = m.sigma_of(t).float().view(-1, 1, 1, 1)
        a = m.scale_of(sigma)
        with torch.no_grad():
            v_hat = net.nets[s](a * (held_out + sigma * eps), 999 * t)
        expected = float((v_hat - a * (eps - sigma * held_out)).square().mean())
        assert float(saved["ema"]["best_loss"][s]) == pytest.approx(expected, rel=1e-4)
    start(separate, "--train", "--init", whole / "checkpoint.pt", "--data", "fashion10k", "--iters", 1, "--lr", 1e-9,
          "--precision", "fp32", "--batch", 8, "--out", tmp_path / "on")
    assert load(tmp_path / "on" / "checkpoint.pt")["ema"]["best_step"].tolist() == [1, 1]    # not the other run's


def interrupted_after(steps, module, monkeypatch):
    """The next training stops with Ctrl-C after its save at `steps`."""
    script = module.script
    save = script.save_run

    def save_run(name, config, step, *rest):
        save(name, config, step, *rest)
        if step == steps:
            raise KeyboardInterrupt
    monkeypatch.setattr(script, "save_run", save_run)
    return lambda: monkeypatch.setattr(script, "save_run", save)


@pytest.mark.parametrize("module, argv", [
    (edm, "--patch 2 --edges 0.4"), (separate, "--patch 2 --edges 0.5 --early-stopping 1"),
    (latent, "--edges 0.5 --ae-iters 3")])
def test_train_resume_sample(tmp_path, start, monkeypatch, module, argv):
    """A training that is interrupted and goes on equals one that is not; it is sampled, and measured."""
    argv = [*TINY, *argv.split(), "--seed", 3]
    monkeypatch.setattr(module.script, "preview", lambda net, config, device: module.script.generate(
        net, config, dict(steps=2, nfe=2, order=1), range(2), device))
    out = start(module, "--train", "--sample", "--n", 3, *argv, "--out", tmp_path / "a")
    assert "3 images" in out and Image.open(tmp_path / "a" / "samples.png").size == (8 * 34, 34)
    again = interrupted_after(3, module, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        start(module, "--train", *argv, "--out", tmp_path / "b")
    again()
    start(module, "--train", "--resume", "--out", tmp_path / "b")
    a, b = (load(tmp_path / run / "checkpoint.pt") for run in "ab")
    assert a["script"] == module.script.SCRIPT and a["step"] == b["step"] == 6
    for key in ("net", "ema", "optimizer"):
        assert equal(a[key], b[key]), key
    script = evaluate.load_script(module.__file__)
    assert script is module.script
    with contextlib.redirect_stdout(io.StringIO()):
        net, config, plan, _ = evaluate.load_all(script, ["--checkpoint", str(tmp_path / "a" / "weights.pt"),
                                                          "--steps" if module is edm else "--nfe", "3"])
    cost = evaluate.cost_of(script, config, plan)
    assert cost["shape"] == (1, 16, 16) and cost["nfe"] == plan["nfe"] == sum(plan["by_stage"])
    meta, side = script.build_net(config).to("meta"), 4 if module is latent else 16
    x, t = torch.zeros(1, config["channels"], side, side, device="meta"), torch.zeros(1, device="meta")
    each = [common.count_macs(meta, x, t, s) for s in range(2)]
    decode = common.count_macs(meta.autoencoder.decode, x) if module is latent else 0
    assert cost["macs_per_image"] == decode + sum(n * macs for n, macs in zip(plan["by_stage"], each))
    images = getattr(script, "reference_images", script.load_data)(config)[0]
    assert images.shape == (160, 1, 16, 16) and images.dtype == torch.uint8


# ---------------------------------------------------------------------------------------------
# Latents
# ---------------------------------------------------------------------------------------------
def gaussian_error(steps, t_end=0.01, std=0.5):
    """Error of DPM-Solver++ 2M for data N(0, std^2), whose exact path is xt ~ its own standard deviation."""
    def eps_model(xt, t):
        sigma = float(m.sigma_of(t))
        return xt / m.scale_of(sigma) * sigma / (std ** 2 + sigma ** 2)

    def spread(t):
        sigma = float(m.sigma_of(t))
        return m.scale_of(sigma) * math.hypot(std, sigma)
    exact = spread(t_end) / spread(1.0)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return abs(float(latent.dpm_solver_pp_sample(eps_model, x, steps, t_end)) - exact) / exact


def test_dpm_solver_pp_is_of_second_order_and_c2f_trds():
    """By slope; 20 steps are near the truth; and it is c2f_trd's sampler on the same noise levels."""
    coarse, fine = (gaussian_error(k, t_end=0.1) for k in (1000, 2000))
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.2)
    assert gaussian_error(20, t_end=1e-4, std=1.0) < 0.01
    times, x = [0.1 + 0.9 * k / 8 for k in range(9)], randn(2, 1, 2, 2, dtype=torch.float64)
    alpha_bar = torch.tensor([m.scale_of(float(m.sigma_of(t))) ** 2 for t in times], dtype=torch.float64)

    def ours(xt, t):
        return (0.3 * xt).tanh() * t

    def theirs(xt, t):                                         # t: number of a level; the lowest is where ours ends
        return ours(xt, times[int(t[0])])

    x_end = latent.dpm_solver_pp_sample(ours, x, 8, 0.1)
    steps = list(range(8, 0, -1))
    xt, history = x, []
    for k, t in enumerate(steps):
        x0_hat = (xt - (1 - alpha_bar[t]).sqrt() * theirs(xt, torch.tensor([t]))) / alpha_bar[t].sqrt()
        history = [(torch.tensor([t, t]), x0_hat), *history][:2]
        order = 1 if k == 7 else min(2, len(history))
        xt = c2f_trd.solver_step(xt, history, torch.tensor([t - 1] * 2), alpha_bar, order)
    assert torch.allclose(x_end, xt)


@torch.no_grad()
def test_evaluations_in_latents():
    config, seen = tiny(latent, image_channels=1, channels=4, patch=1, res=32), []
    net, plan = net_of(config, latent), latent.make_plan(None, config, "cpu")
    assert plan["taus"] == pytest.approx([1 - 0.9999 * k / 20 for k in range(20)], abs=1e-6)
    assert plan["by_stage"] == [7, 4, 9] and "7 + 4 + 9" in latent.describe(plan)        # .6 and .4 are just below
    for s, decoder in enumerate(net.decoders):
        decoder.register_forward_hook(lambda *_, s=s: seen.append(s))
    assert latent.generate(net, config, plan, [0, 1], "cpu").shape == (2, 1, 32, 32)
    assert seen == [m.stage_of(t, config["edges"]) for t in plan["taus"]]


def test_latents(tmp_path, start, monkeypatch):
    """One autoencoder for the clustering, the network and other arms; --init brings its own."""
    argv, found, asked = [*TINY, "--iters", 2, "--ae-iters", 3], [], latent.script.cluster_timesteps
    monkeypatch.setattr(latent.script, "cluster_timesteps", lambda method, n, data: (
        found.append(data), asked(method, n, data, 200))[1])
    monkeypatch.setattr(latent.script, "SHORTEST", -1.0)       # 160 images are few
    start(latent, "--train", *argv, "--out", tmp_path / "a")
    saved, file = load(tmp_path / "a" / "checkpoint.pt"), tmp_path / "a" / "autoencoder.pt"
    config, z = saved["config"], found[0]
    assert z.shape == (160, 4, 4, 4) and config["channels"] == 4 and config["res"] == 16
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-3
    plan = json.loads((tmp_path / "a" / "plan_optimal_2.json").read_text())
    assert config["edges"] == plan["edges"] and len(plan["edges"]) == 1
    of_file = load(file)["ema"]
    assert all(torch.equal(saved["ema"][f"autoencoder.{k}"], v) and torch.equal(saved["net"][f"autoencoder.{k}"], v)
               for k, v in of_file.items())
    start(latent, "--search", "--stages", 3, "--checkpoint", tmp_path / "a" / "checkpoint.pt", "--out", tmp_path / "s")
    assert (tmp_path / "s" / "plan_optimal_3.json").exists() and torch.allclose(found[1], z, atol=1e-5)
    start(latent, "--train", *argv, "--widths", 8, "--autoencoder", file, "--out", tmp_path / "one")
    one = load(tmp_path / "one" / "checkpoint.pt")
    assert one["config"]["edges"] == [] and torch.equal(one["ema"]["autoencoder.mean"], of_file["mean"])
    drawn, batch = [], latent.script.draw_batch
    monkeypatch.setattr(latent.script, "draw_batch", lambda config, x, *rest: (
        drawn.append(x), batch(config, x, *rest))[1])
    start(latent, "--train", *argv[-10:], "--init", tmp_path / "a" / "checkpoint.pt", "--edges", 0.5, "--seed", 9,
          "--out", tmp_path / "on")
    on = load(tmp_path / "on" / "checkpoint.pt")
    assert torch.equal(on["ema"]["autoencoder.mean"], of_file["mean"]) and torch.allclose(drawn[0], z, atol=1e-5)
    assert not (tmp_path / "on" / "autoencoder.pt").exists()
    for wrong, words in ((["--factor", 3], "--factor 3|power of 2"), (["--latent", 2, "--autoencoder", file], "wanted"),
                         (["--autoencoder", file, "--init", tmp_path / "a" / "checkpoint.pt"], "brings its own"),
                         (["--flip", 1], "unrecognized")):
        with pytest.raises(ValueError, match=words) as error:
            start(latent, "--train", *argv, *wrong, "--out", tmp_path / "wrong")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="none for this autoencoder"):
        start(latent, "--search", "--images", "emoji", "--checkpoint", tmp_path / "a" / "checkpoint.pt", "--out",
              tmp_path / "s")


@pytest.mark.parametrize("module", MODULES)
def test_a_variant_is_its_script(module):
    """Its own name, folder and help; train and main are the script's; the script itself is as it was."""
    script, own = module.script, module.__name__
    assert script.SCRIPT == own and script.CONFIG["run"]["out"][0] == f"runs/{own}" and script.__doc__ == module.__doc__
    assert m.SCRIPT == "multistage" and m.CONFIG["run"]["out"][0] == "runs/multistage"
    assert script.train.__code__ == m.train.__code__ and script.main.__code__ == m.main.__code__
    assert sum(map(len, script.CONFIG.values())) <= 32
    assert m.CONFIG["network"]["mult"][0] == [1, 2, 4] and "order" in m.CONFIG["method"]
    assert Path(script.__file__).parent == ROOT
