"""multistage.py against independent oracles: closed forms, loops, brute force, diffusers; and what is its own at the
command line (the rest of which is test_cli.py's)."""
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import c2f_trd
import common
import multistage as m
from in_process import start_script

ROOT = Path(common.__file__).resolve().parent


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny(**changes):
    config = {key: option[0] for group in m.CONFIG.values() for key, option in group.items()}
    config.update(ch=8, widths=[12, 8, 4], mult=[1, 2], attention=[1], patch=2, edges=[0.4, 0.6], channels=1, res=16,
                  batch=16, precision="fp32", given=set(), search=False)
    return dict(config, **changes)


def net_of(config, seed=0):
    torch.manual_seed(seed)
    return m.build_net(config).eval()


@pytest.fixture(scope="module")
def garments():
    return common.to_float(common.load_images("fashion10k")[0])


# ---------------------------------------------------------------------------------------------
# Network and stages
# ---------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("ch, mult, attention, patch", [
    (8, [1, 2, 2], [1, 2], 2), (32, [1, 2, 4], [2], 1), (36, [1], [], 1)])
def test_one_width_is_the_plain_network(ch, mult, attention, patch):
    """Off switch: with c2f_trd.py's weights it gives c2f_trd.py's tensors, bit for bit."""
    config = tiny(ch=ch, widths=[ch], edges=[], mult=mult, attention=attention, patch=patch)
    torch.manual_seed(0)
    other = c2f_trd.build_net(dict(config, low=0)).eval()
    net = m.build_net(config).eval()
    theirs, ours = list(other.state_dict().values()), net.state_dict()
    assert [v.shape for v in theirs] == [v.shape for v in ours.values()]       # in the same order
    net.load_state_dict(dict(zip(ours, theirs)))
    x, t = randn(3, 1, 16, 16, dtype=torch.float32), torch.tensor([0.0, 500.0, 999.0])
    assert torch.equal(net(x, t), other(x, t))
    assert torch.equal(net(x, t, torch.zeros(3, dtype=torch.int64)), other(x, t))

    def eps_model(xt, t):                                      # of the plain network, which predicts v
        sigma = float(m.sigma_of(t))
        return m.scale_of(sigma) * (other(xt, torch.full((3,), 999 * t)) + sigma * xt)
    noise = common.noise_for(range(3), (1, 16, 16))
    assert torch.equal(m.generate(net, config, dict(nfe=5, order=3), range(3), "cpu"),
                       m.dpm_solver_sample(eps_model, noise, 5))


def test_decoders():
    """Each as wide as it is told, on one encoder; groups as a plain U-Net of its width."""
    net = net_of(tiny(ch=32, widths=[48, 32, 12], mult=[1, 2, 4], attention=[2], patch=1))
    for decoder, width, groups in zip(net.decoders, (48, 32, 12), (8, 8, 2)):
        assert decoder.conv_out.in_channels == width and decoder.norm_out.num_groups == groups
        assert {r[0].conv1.out_channels for r in decoder.up} == {width, 2 * width, 4 * width}
        assert {r[0].emb.in_features for r in decoder.up} == {4 * 32}
        assert decoder.up[0][0].conv1.in_channels == 32 * 4 + 32 * 4           # the first layer adapts the widths
    for ch, width in itertools.product((4, 6, 24, 32, 128, 224), (4, 8, 12, 30, 36, 48, 192)):
        g = m.common_groups(ch, width)
        assert ch % g == width % g == 0 and (g == 1 or min(ch, width) >= 4 * g) and g <= 32
    assert [m.common_groups(ch, ch) for ch in (4, 8, 32, 64, 128, 256)] == [1, 2, 8, 16, 32, 32]


@pytest.mark.parametrize("order", ["sorted", "unsorted"])
def test_mixed_batches(order):
    """Each sample gets its own stage's decoder: as one stage at a time, also for gradients."""
    net, x = net_of(tiny()), randn(7, 1, 16, 16, dtype=torch.float32)
    t = torch.tensor([0.5, 0.05, 0.99, 0.39, 0.61, 0.1, 0.45])
    t = t.sort().values if order == "sorted" else t
    stage = m.stage_of(t, [0.4, 0.6])
    assert stage.tolist() == ([0, 0, 0, 1, 1, 2, 2] if order == "sorted" else [1, 0, 2, 0, 2, 0, 1])
    mixed = net(x, 999 * t, stage)
    alone = torch.cat([net(x[i:i + 1], 999 * t[i:i + 1], int(stage[i])) for i in range(7)])
    assert torch.allclose(mixed, alone, atol=1e-5)
    assert not torch.allclose(mixed, net(x, 999 * t, 0), atol=1e-3)
    mixed.square().sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    alone.square().sum().backward()
    assert all(torch.allclose(a, p.grad, rtol=1e-3, atol=1e-3) for a, p in zip(grads, net.parameters()))


def test_by_stage():
    """Any order, any subset of the stages, several inputs; sorted stages are handed on without a copy."""
    a, b = torch.arange(6).float(), randn(6, 2)
    for stages in itertools.product(range(3), repeat=6):
        seen, stage = [], torch.tensor(stages)

        def run(s, x, y, seen=seen):
            seen.append((s, x))
            return (s + 1) * x[:, None] * y
        out = m.by_stage(stage, 3, run, a, b)
        assert torch.equal(out, (stage[:, None] + 1) * a[:, None] * b)
        assert [s for s, _ in seen] == sorted(set(stages))
        if list(stages) == sorted(stages):
            assert all(x.untyped_storage().data_ptr() == a.untyped_storage().data_ptr() for _, x in seen)
    assert m.by_stage(2, 3, lambda s, x: x + s, a).tolist() == [2, 3, 4, 5, 6, 7]


def test_only_the_stage_of_the_batch_is_trained():
    net, x = net_of(tiny()), randn(4, 1, 16, 16, dtype=torch.float32)
    m.training_loss(net, tiny(), x, torch.full((4,), 0.5), randn(*x.shape, seed=1, dtype=torch.float32)).backward()
    for s, decoder in enumerate(net.decoders):
        assert all((p.grad is not None) == (s == 1) for p in decoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.encoder.parameters())


@pytest.mark.parametrize("stage", [-1, 3, torch.tensor([0, 3]), torch.tensor([-1, 0])])
def test_a_stage_without_decoder(stage):
    with pytest.raises(ValueError, match="no decoder for stage"):
        net_of(tiny())(torch.zeros(2, 1, 16, 16), torch.zeros(2), stage)


def test_stage_of():
    edges = [0.25, 0.5, 0.9]
    for t, stage in ((0, 0), (0.2499, 0), (0.25, 1), (0.4999, 1), (0.5, 2), (0.9, 3), (1, 3)):
        assert m.stage_of(t, edges) == stage == int(m.stage_of(torch.tensor([t], dtype=torch.float64), edges))
    assert m.stage_of(0.7, []) == 0 and m.stage_of(torch.tensor([0.7]), []).tolist() == [0]
    with pytest.raises(ValueError, match="as a float"):
        m.stage_of(torch.tensor([442]), edges)


def test_the_official_code_misroutes_batches():
    """It compares 999 t with 1000 t_1, strictly, and takes the stage of the whole batch from its first sample."""
    edges = [0.442, 0.631]
    for stage, share in ((1, 0.00225), (2, 0.00178)):          # measured on 600,000 draws of the official code
        t = torch.linspace(edges[stage - 1], [*edges, 1][stage], 200_002, dtype=torch.float64)[1:-1]
        official = sum((999 * t > 1000 * edge).long() for edge in edges)
        assert float((official < stage).double().mean()) == pytest.approx(share, rel=0.1)
        assert (m.stage_of(t, edges) == stage).all()
    assert m.stage_of(0.0, edges) == 0                         # official: no stage at all


# ---------------------------------------------------------------------------------------------
# Noise levels, batches, loss
# ---------------------------------------------------------------------------------------------
def test_schedule():
    """Against the integral of beta, and a table of equal signal-to-noise ratios."""
    for t in (1e-3, 0.2, 0.7, 1.0):
        u = (np.arange(100_000) + 0.5) / 100_000 * t
        log_s = -0.5 * (0.1 + 19.9 * u).mean() * t
        assert float(m.scale_of(m.sigma_of(t))) == pytest.approx(math.exp(log_s), rel=1e-9)
        assert float(m.t_of(m.sigma_of(t))) == pytest.approx(t, rel=1e-9)
    for t, sigma in ((0.442, 2.51027), (0.631, 7.41412), (0.636, 7.65771), (1, 152.167), (1e-3, 0.01049)):
        assert float(m.sigma_of(t)) == pytest.approx(sigma, rel=1e-3)
    assert m.sigma_of(torch.rand(3)).dtype == torch.float64


@pytest.mark.parametrize("edges, shares", [([0.4, 0.6], [1.0]), ([0.1], [1.0]), ([], [1.0]),
                                           ([0.4, 0.6], [0.7, 0.2, 0.1]), ([0.4, 0.6], [0.0, 1.0, 0.0])])
def test_draw_batch(edges, shares):
    """Every stage has its share of the images, t is even in it, images and noise know nothing of t."""
    x = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    config, n, all_t, all_x = tiny(batch=64, edges=edges, shares=shares), len(edges) + 1, [], []
    for step in range(200):
        torch.manual_seed(step)
        x0, t, eps = m.draw_batch(config, x, None, step)
        assert x0.shape == eps.shape == (64, 1, 4, 4) and t.shape == (64,) and torch.equal(t, t.sort().values)
        assert (len(m.stage_of(t, edges).unique()) > 1) == (n > 1 and 0 not in shares)
        all_t.append(t)
        all_x.append(x0[:, 0, 0, 0])
    t, x0, bounds = torch.cat(all_t), torch.cat(all_x), [0.0, *edges, 1.0]
    assert 1e-5 <= t.min() and t.max() < 1
    for s in range(n):
        mine, share = t[m.stage_of(t, edges) == s], 1 / n if shares == [1.0] else shares[s]
        assert abs(len(mine) / len(t) - share) <= 4 * (share * (1 - share) / len(t)) ** 0.5
        if not len(mine):
            continue
        u = ((mine.double() - bounds[s]) / (bounds[s + 1] - bounds[s])).sort().values          # Kolmogorov-Smirnov
        assert float((u - (torch.arange(len(u)) + 0.5) / len(u)).abs().max()) < 1.95 / len(u) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack([t.sort().values, x0]))[0, 1])) < 0.03
    assert len(x0.unique()) == 256


def test_v_prediction():
    """A network that knows v exactly (D19): no loss, and eps comes out; one that gives 0: the mean square of v."""
    x0, eps, t = randn(3, 1, 8, 8), randn(3, 1, 8, 8, seed=1), torch.tensor([1e-4, 0.4, 1.0]).double()
    a = torch.exp(-19.9 * t ** 2 / 4 - 0.1 * t / 2).view(-1, 1, 1, 1)          # alpha, of the definition
    v, xt, seen = a * eps - (1 - a ** 2).sqrt() * x0, a * x0 + (1 - a ** 2).sqrt() * eps, []

    def exact(x, label, stage):
        seen.append((x, label, stage))
        return v
    assert float(m.training_loss(exact, tiny(), x0, t, eps)) < 1e-9
    (x, label, stage), = seen
    assert torch.allclose(x, xt) and torch.allclose(label, 999 * t) and stage.tolist() == [0, 1, 2]
    loss = m.training_loss(lambda *_: torch.zeros_like(v), tiny(), x0, t, eps)
    assert float(loss) == pytest.approx(float(v.square().mean()), rel=1e-4)
    for i in range(3):                                         # the samplers' eps_model
        model = m.model_of(lambda x, label, stage, i=i: v[i:i + 1].float(), tiny())
        assert torch.allclose(model(xt[i:i + 1].float(), float(t[i])), eps[i:i + 1].float(), atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Optimal denoiser and clustering
# ---------------------------------------------------------------------------------------------
def naive_denoiser(xt, s, sigma, data):
    """Proposition 1 as printed, one sample at a time, Gaussian densities in float64 up to a factor."""
    out = []
    for x, a, b in zip(xt.double(), s, sigma):
        log_p = torch.stack([-((x - a * y.double()) ** 2).sum() / (2 * a ** 2 * b ** 2) for y in data])
        w = (log_p - log_p.max()).exp()
        mean = sum(wi * y.double() for wi, y in zip(w, data)) / w.sum()
        out.append((x - a * mean) / (a * b))
    return torch.stack(out)


@pytest.mark.parametrize("kernel", ["vp", "ve"])
def test_optimal_denoiser(garments, kernel):
    data = garments[:60]
    t = torch.tensor([1e-3, 0.02, 0.1, 0.3, 0.45, 0.6, 0.8, 1.0]).double()
    sigma = m.sigma_of(t)
    s = m.scale_of(sigma) if kernel == "vp" else torch.ones(8).double()
    x0, eps = data[:8], randn(8, 1, 32, 32, dtype=torch.float32)
    xt = (s.view(-1, 1, 1, 1) * (x0 + sigma.view(-1, 1, 1, 1) * eps)).float()
    expected = naive_denoiser(xt, s, sigma, data)
    for part in (2 ** 22, 150):                                # all at once; two samples at a time
        found = m.optimal_denoiser(xt, s, sigma, data, part=part)
        assert float((found - expected).abs().max()) < 1e-4
    assert torch.allclose(found[0], eps[0], atol=1e-4)         # only the own image is left
    mean = (xt[-1] / s[-1] - data.mean(0)) / sigma[-1]
    assert torch.allclose(found[-1], mean.float(), atol=0.02)  # only the mean is left
    assert torch.allclose(found[2:3], m.optimal_denoiser(xt[2:3], float(s[2]), float(sigma[2]), data), atol=1e-5)


def test_optimal_denoiser_between_near_images(garments):
    """Where the softmax decides between images that are alike, at small sigma, in float32."""
    g = torch.Generator().manual_seed(0)
    data = garments[:1] + 0.003 * torch.randn(40, 1, 32, 32, generator=g)
    sigma = m.sigma_of(torch.tensor([0.004, 0.008, 0.02])).double()
    xt = data[:3] + sigma.float().view(-1, 1, 1, 1) * torch.randn(3, 1, 32, 32, generator=g)
    expected = naive_denoiser(xt, torch.ones(3), sigma, data)
    assert float((m.optimal_denoiser(xt, 1.0, sigma, data) - expected).abs().max()) < 2e-3


def test_optimal_denoiser_is_optimal():
    """No other function of xt predicts eps better: its error is orthogonal to what it could be improved by."""
    data, n = randn(5, 1, 1, 2), 200_000
    g = torch.Generator().manual_seed(1)
    x0 = data[torch.randint(0, 5, (n,), generator=g)]
    eps = torch.randn(n, 1, 1, 2, generator=g, dtype=torch.float64)
    xt = x0 + 0.7 * eps
    error = eps - m.optimal_denoiser(xt, 1, 0.7, data)
    for f in (torch.ones_like(xt), xt, xt ** 2, xt.sin(), xt.flip(-1)):
        assert abs(float((error * f).mean())) < 0.01
    assert float(error.square().mean()) < float((eps - xt / 1.2).square().mean())


def test_first_crossing():
    """Eq. 7 by loops (D2): the largest tau up to which no running mean is below alpha."""
    t = torch.linspace(0.001, 1, 400).double()
    for seed, shape in enumerate((lambda t: 1 - t, lambda t: 1 - 2 * t * (t < 0.5), lambda t: t * 0 + 1,
                                  lambda t: t * 0)):
        s = (shape(t) + 0.05 * randn(400, seed=seed)).clamp(0, 1).tolist()
        means = [sum(s[:k + 1]) / (k + 1) for k in range(400)]
        first = next((k for k, v in enumerate(means) if v < 0.9), 400) - 1
        assert m.first_crossing(t, torch.tensor(s).double(), 0.9) == pytest.approx(float(t[max(first, 0)]))
    dip = torch.where((t > 0.3) & (t < 0.4), 0.0, 1.0).double()                # the mean falls to .75 and rises again
    assert m.first_crossing(t, dip) == pytest.approx(1 / 3, abs=0.01)


def test_similarity_by_definition(garments):
    data = garments[:40]
    t, s0, s1 = m.similarity_to_ends(data, 30, seed=3)
    g = torch.Generator().manual_seed(3)                       # the same draws
    index = torch.randint(0, 40, (30,), generator=g)
    levels = (1e-3 + (1 - 1e-3) * torch.rand(30, generator=g, dtype=torch.float64)).sort().values
    eps = torch.randn(30, 1, 32, 32, generator=g)
    assert torch.equal(levels, t)
    for k in range(0, 30, 7):
        sigma = m.sigma_of(t[k:k + 1])
        s = m.scale_of(sigma)
        xt = s * (data[index[k]] + sigma * eps[k])
        eps_t = naive_denoiser(xt[None], s, sigma, data)
        eps_1 = (xt - s * data.mean(0)) / (s * sigma)          # knows the mean of the data only (D3)
        for value, other in ((s0, eps[k]), (s1, eps_1)):
            share = ((eps_t - other).abs() <= 2 / 256).double().mean()
            assert float(value[k]) == pytest.approx(float(share), abs=0.01)
    assert s0[0] == 1 and s1[-1] > 0.9


def test_algorithm1(garments):
    """The edges are the first crossings, the second one seen from t = 1, and those of the shipped plan."""
    edges, plan = m.cluster_timesteps("optimal", 3, garments[:500], samples=400)
    t, s0, s1 = m.similarity_to_ends(garments[:500], 400)
    back = m.first_crossing(torch.arange(400).double(), s1.flip(0))            # how many samples, from t = 1 on
    assert edges == pytest.approx([m.first_crossing(t, s0), float(t[399 - int(back)])], abs=1e-4)
    assert plan["edges"] == edges and plan["n"] == 3 and plan["samples"] == 400 and len(plan["curves"]) == 100
    for column, v in enumerate((t, s0, s1)):
        assert [row[column] for row in plan["curves"]] == pytest.approx(v.view(100, 4).mean(1).tolist(), abs=1e-4)


def test_edges_of_fashion10k(garments):
    """With all 10,000 samples .5169 and .7062, in 10 s; with a fifth of them nearly."""
    assert m.cluster_timesteps("optimal", 3, garments, samples=2000)[0] == pytest.approx([0.5169, 0.7062], abs=0.01)


def test_scale_and_number_of_images(garments):
    """The edges depend on the range of the pixels (D3) and on how near the images are to each other."""
    wide, narrow = (m.cluster_timesteps("optimal", 3, x, 400)[0] for x in (garments[:500], garments[:500] / 2))
    assert all(b < a - 0.05 for a, b in zip(wide, narrow))
    assert m.cluster_timesteps("optimal", 3, garments[:2000], 400)[0][0] < wide[0]


def test_similarity_map(garments):
    data = garments[:30]
    nodes = torch.tensor([0.01, 0.3, 0.5, 0.8]).double()
    g = torch.Generator().manual_seed(1)
    x0, eps = data[torch.randint(0, 30, (6,), generator=g)], torch.randn(6, 1, 32, 32, generator=g)
    s = m.similarity_map(data, 6, nodes, seed=1)
    assert torch.equal(s, s.T) and torch.equal(s.diagonal(), torch.ones(4).double())
    assert 0 <= s.min() and s[0, 1] > s[0, 3]
    both = [naive_denoiser((x0 + sigma * eps).double(), torch.ones(6), torch.full((6,), sigma).double(), data)
            for sigma in m.sigma_of(nodes[1:3]).tolist()]      # the entry (1, 2) by its definition
    near = ((both[0] - both[1]).abs() <= 2 / 256).double().mean()
    assert 0.05 < near < 0.95 and abs(float(s[1, 2] - near)) < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_partition_is_the_best(seed):
    """Dynamic programming against all partitions."""
    root = randn(9, 3, seed=seed)
    similarity = (root @ root.T).tanh().abs()
    similarity.fill_diagonal_(1)
    for n in (1, 2, 3, 4, 9):
        options = {cuts: sum(float((1 - similarity[a:b, a:b]).sum()) for a, b in itertools.pairwise([0, *cuts, 9]))
                   for cuts in itertools.combinations(range(1, 9), n - 1)}
        assert options[tuple(m.best_partition(similarity, n))] == pytest.approx(min(options.values()))


@pytest.mark.parametrize("method, n", [("optimal2", 2), ("optimal2", 3), ("optimal", 4), ("optimal", 2)])
def test_algorithm2_by_brute_force(garments, method, n):
    """Of all ways to cut the 21 levels of the reported map, the edges are midway between the levels of the best."""
    edges, plan = m.cluster_timesteps(method, n, garments[:50], samples=200)
    away, t = 1 - torch.tensor(plan["map"]).double(), plan["nodes"]
    best = min(itertools.combinations(range(1, 21), n - 1), key=lambda cuts: sum(
        float(away[a:b, a:b].sum()) for a, b in itertools.pairwise([0, *cuts, 21])))
    assert edges == pytest.approx([(t[c - 1] + t[c]) / 2 for c in best], abs=1e-4)
    assert t == pytest.approx([*(0.001 + 0.05 * k for k in range(20)), 1]) and plan["samples"] == 10


FLOATS = "floats in .-1, 1"


@pytest.mark.parametrize("data, words", [
    (torch.zeros(9, 1, 8, 8, dtype=torch.uint8), FLOATS), (torch.full((9, 1, 8, 8), 255.0), FLOATS),
    (torch.full((9, 1, 8, 8), math.nan), FLOATS), (torch.zeros(9, 1, 8, 8, dtype=torch.int64), FLOATS),
    ((torch.arange(576.0) / 576).view(9, 1, 8, 8), "0.0 .. 0.99.*floats in .-1, 1., not .0, 1"),       # of ToTensor
    (torch.full((1, 1, 8, 8), -1.0), "at least two images")])
@pytest.mark.parametrize("method", ["optimal", "optimal2"])
def test_data_that_cannot_be_clustered(data, words, method):
    with pytest.raises(ValueError, match=words) as error:
        m.cluster_timesteps(method, 3, data, 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("n", [5, 20])
def test_too_few_images(garments, n):
    """A few images are so far apart that the stages nearly touch, or cross: told, with what to do."""
    with pytest.raises(ValueError, match="more images, fewer stages.*--edges"):
        m.cluster_timesteps("optimal", 3, garments[:n], 1000)


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------
EVALUATIONS = [1, .9473, .8915, .8320, .7681, .6985, .6220, .5367, .4418, .3393, .2389, .1548, .0946, .0557, .0318,
               .0174, .0090, .0043, .00185, .00045]            # of the official code, float32, cut off


def test_evaluation_times():
    """Singlestep, order 3, even in log SNR, 20 evaluations: the official solver's times, and whose decoder."""
    config = tiny(edges=[0.442, 0.631], nfe=20, order=3)
    plan = m.make_plan(None, config, "cpu")
    assert plan["by_stage"] == [12, 2, 6] and m.solver_orders(20, 3) == [3] * 6 + [2] and plan["nfe"] == 20
    assert plan["taus"] == pytest.approx(EVALUATIONS, abs=1.3e-4)
    assert [m.stage_of(t, config["edges"]) for t in plan["taus"]][6:9] == [1, 1, 0]      # a step across an edge
    assert "12 + 2 + 6" in m.describe(plan) and str(plan["taus"]) in m.describe(plan)
    for nfe, order in itertools.product(range(1, 13), (1, 2, 3)):
        assert sum(m.solver_orders(nfe, order)) == nfe
        assert len(m.make_plan(None, tiny(nfe=nfe, order=order), "cpu")["taus"]) == nfe
    with pytest.raises(ValueError, match="at least one"):
        m.solver_orders(0, 3)


def gaussian_error(order, nfe, t_end=0.01, std=0.5):
    """Error of DPM-Solver for data N(0, std^2), whose exact path is xt ~ its own standard deviation."""
    def eps_model(xt, t):
        sigma = float(m.sigma_of(t))
        return xt / m.scale_of(sigma) * sigma / (std ** 2 + sigma ** 2)

    def spread(t):
        sigma = float(m.sigma_of(t))
        return m.scale_of(sigma) * math.hypot(std, sigma)
    exact = spread(t_end) / spread(1.0)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return abs(float(m.dpm_solver_sample(eps_model, x, nfe, order, t_end)) - exact) / exact


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_dpm_solver(order):
    """Halving the steps divides the error by 2^order."""
    coarse, fine = (gaussian_error(order, order * k + (2 if order == 3 else 0)) for k in (40, 80))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def plain_dpm3(eps_model, x, nfe, t_end):
    """DPM-Solver-3 and -2 in the paper's form, with alpha and sigma, in Python floats."""
    def parts(lam):
        alpha = math.sqrt(1 / (1 + math.exp(-2 * lam)))
        sd = math.sqrt(1 / (1 + math.exp(2 * lam)))
        return alpha, sd, float(m.t_of(sd / alpha))
    lams = np.linspace(-math.log(m.sigma_of(1.0)), -math.log(m.sigma_of(t_end)), nfe // 3 + 2)
    for k, (a, b) in enumerate(zip(lams, lams[1:])):
        h, (al, _, t) = b - a, parts(a)
        e = eps_model(x, t)
        if k < nfe // 3:
            (al1, sd1, t1), (al2, sd2, t2), (alb, sdb, _) = parts(a + h / 3), parts(a + 2 * h / 3), parts(b)
            u = al1 / al * x - sd1 * math.expm1(h / 3) * e
            d1 = eps_model(u, t1) - e
            u = al2 / al * x - sd2 * math.expm1(2 * h / 3) * e \
                - sd2 * 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * d1
            d2 = eps_model(u, t2) - e
            x = alb / al * x - sdb * math.expm1(h) * e - sdb * 1.5 * (math.expm1(h) / h - 1) * d2
        else:
            (al1, sd1, t1), (alb, sdb, _) = parts(a + h / 2), parts(b)
            e1 = eps_model(al1 / al * x - sd1 * math.expm1(h / 2) * e, t1)
            x = alb / al * x - sdb * math.expm1(h) * e1
    return x


def some_model(xt, t):
    return torch.tanh(0.7 * xt + t) * 0.9


def test_dpm_solver_as_published():
    x = randn(4, 1, 3, 3)
    ours, theirs = m.dpm_solver_sample(some_model, x, 20, 3, 1e-3), plain_dpm3(some_model, x, 20, 1e-3)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order, nfe", [(1, 7), (2, 8), (2, 9), (3, 18), (3, 19), (3, 20)])
def test_dpm_solver_is_diffusers(order, nfe):
    """Against DPMSolverSinglestepScheduler on the same levels. Its middle evaluation of a third-order step is the
    paper's with solver_type "heun", its steps with "midpoint"."""
    diffusers = pytest.importorskip("diffusers")
    t_end, orders = 1e-3, m.solver_orders(nfe, order)
    ends = np.linspace(-math.log(m.sigma_of(1.0)), -math.log(m.sigma_of(t_end)), len(orders) + 1)
    lams = [a + (b - a) * i / p for p, a, b in zip(orders, ends, ends[1:]) for i in range(p)] + [ends[-1]]
    scheduler = diffusers.DPMSolverSinglestepScheduler(algorithm_type="dpmsolver", solver_order=order,
                                                       final_sigmas_type="sigma_min", lower_order_final=True)
    scheduler.set_timesteps(nfe)
    scheduler.sigmas = torch.tensor([math.exp(-v) for v in lams], dtype=torch.float64)
    scheduler.order_list = [i + 1 for p in orders for i in range(p)]
    x = randn(4, 1, 3, 3)
    ours = m.dpm_solver_sample(some_model, x, nfe, order, t_end)
    for k, number in enumerate((i, p) for p in orders for i in range(p)):
        scheduler.register_to_config(solver_type="heun" if number == (1, 3) else "midpoint")
        eps_hat = some_model(x, min(float(m.t_of(math.exp(-lams[k]))), 1.0))
        x = scheduler.step(eps_hat, scheduler.timesteps[k], x).prev_sample
    assert torch.allclose(ours, x, rtol=1e-6, atol=1e-6)


def test_exact_denoiser_returns_to_the_data(garments):
    """DPM-Solver with the optimal denoiser ends at images of the data set."""
    data = garments[:30]

    def eps_model(xt, t):
        sigma = float(m.sigma_of(t))
        return m.optimal_denoiser(xt, m.scale_of(sigma), sigma, data)
    x = m.dpm_solver_sample(eps_model, randn(6, 1, 32, 32, dtype=torch.float32), 60)
    assert float((x[:, None] - data).square().mean((2, 3, 4)).min(1).values.max()) < 1e-3


@torch.no_grad()
def test_each_evaluation_has_its_own_decoder():
    """The MACs of the executed sampler are those of the decoders that the plan names; on the meta device as well."""
    config, seen = tiny(), []
    net, plan = net_of(config), m.make_plan(None, tiny(), "cpu")
    hooks = [d.register_forward_hook(lambda *_, s=s: seen.append(s)) for s, d in enumerate(net.decoders)]
    m.generate(net, config, plan, range(2), "cpu")
    assert seen == [m.stage_of(t, config["edges"]) for t in plan["taus"]] and set(seen) == {0, 1, 2}
    for hook in hooks:
        hook.remove()
    meta = m.build_net(config).to("meta")
    x, t = torch.zeros(1, 1, 16, 16, device="meta"), torch.zeros(1, device="meta")
    each = [common.count_macs(meta, x, t, s) for s in range(3)]
    assert each[0] > each[1] > each[2] > 0
    assert common.count_macs(m.generate, meta, config, plan, [0], "meta") == sum(
        n * macs for n, macs in zip(plan["by_stage"], each))


@torch.no_grad()
def test_a_seed_is_an_image():
    """In any batch, up to the rounding of convolutions."""
    net, config, plan = net_of(tiny()), tiny(), dict(nfe=4, order=3)
    x = m.generate(net, config, plan, [7, 8, 9], "cpu")
    assert torch.allclose(x[1:2], m.generate(net, config, plan, [8], "cpu"), atol=2e-3)


def test_samplers_keep_no_graph():
    net = net_of(tiny())
    assert not m.generate(net, tiny(), dict(nfe=2, order=3), [0], "cpu").requires_grad
    x = torch.zeros(3, 1, 4, 4, requires_grad=True)
    assert not m.optimal_denoiser(x, 1, 0.5, x).requires_grad
    assert not m.similarity_map(x, 2, torch.ones(1)).requires_grad


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------
TINY = "--ch 8 --widths 12 8 4 --mult 1 2 --attention 1 --patch 2 --precision fp32 --batch 4 --iters 2 --out".split()


def start(*argv):
    """`python multistage.py ARGV` in this process: exit code, stdout, stderr."""
    return start_script(m, *argv)


def one_line(result, *words):
    lines = [s for s in result.err.splitlines() if not s.startswith(("cluster ", "similarity "))]
    assert result.code == 1 and len(lines) == 1 and lines[0].startswith("multistage: error: "), result
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


@pytest.fixture
def few_images(monkeypatch):
    load_images = common.load_images
    monkeypatch.setattr(common, "load_images", lambda *args: tuple(
        part[:500] if torch.is_tensor(part) else part for part in load_images(*args)))
    monkeypatch.setattr(m, "cluster_timesteps", lambda method, n, data, f=m.cluster_timesteps: f(method, n, data, 400))


def config_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["config"]


def test_cluster_then_train(tmp_path, few_images):
    """Without edges, --train clusters first and prints them; --search does so again; the network keeps its own."""
    result = start("--train", "--sample", "--n", 2, "--nfe", 4, *TINY, tmp_path)
    assert result.code == 0, result.err
    plan = json.loads((tmp_path / "plan_optimal_3.json").read_text())
    assert config_of(tmp_path)["edges"] == plan["edges"] and f"edges {plan['edges']}" in result.out
    assert (plan["data"], plan["images"]) == ("fashion10k", 500)
    assert plan["sigmas"] == pytest.approx([float(m.sigma_of(e)) for e in plan["edges"]], abs=1e-3)
    assert Image.open(tmp_path / "samples.png").size[1] > 32 and (tmp_path / "preview.png").exists()
    result = start("--search", "--stages", 4, "--out", tmp_path)
    assert result.code == 0, result.err
    four = json.loads((tmp_path / "plan_optimal_4.json").read_text())
    assert len(four["edges"]) == 3 and f"edges {four['edges']}" in result.out
    assert f"edges {plan['edges']}" in result.out.splitlines()[-1]             # what samples
    result = start("--train", "--resume", "--iters", 3, "--out", tmp_path)     # does not cluster again
    assert result.code == 0 and "stages of" not in result.out
    assert config_of(tmp_path)["edges"] == plan["edges"]


@pytest.mark.parametrize("argv, edges", [("--widths 8", []), ("--edges 0.3 0.7", [0.3, 0.7]),
                                         ("--widths 8 8 --edges 0.5 --shares 0.9 0.1", [0.5])])
def test_given_edges(tmp_path, few_images, argv, edges):
    result = start("--train", *TINY, tmp_path, *argv.split())
    assert result.code == 0, result.err
    assert config_of(tmp_path)["edges"] == edges and not list(tmp_path.glob("plan*"))


@pytest.mark.parametrize("argv, words", [
    ("--edges 0.6 0.4", ["--edges", "rise"]), ("--edges 0.4 1.2", ["--edges", "0 .. 1"]),
    ("--edges 0.4 0.4", ["--edges", "rise"]), ("--edges nan 0.5", ["--edges"]), ("--edges 0 0.5", ["--edges", "rise"]),
    ("--edges 0.5 1", ["--edges", "rise"]), ("--edges 0.4", ["--edges", "3 decoders", "2 edges"]),
    ("--edges 0.2 0.4 0.6", ["--edges", "3 decoders", "2 edges"]), ("--edges a b", ["--edges"]),
    ("--widths 8 --edges 0.4", ["1 decoders", "0 edges"]), ("--widths 1 2 3", ["--widths"]),
    ("--shares 0.7 0.3", ["--shares", "3 decoders"]), ("--shares 0 0 0", ["--shares", "not all 0"]),
    ("--shares 0.5", ["--shares", "3 decoders"]), ("--shares 2 1 1", ["--shares", "0 .. 1"]),
    ("--widths 8 --shares 0.5", ["--shares", "several"]),
    ("--stages 4", ["--stages"]), ("--nfe 4", ["--nfe"]),
    ("--mult 1 2 2 2 2 2 2", ["multiple of 128"])])
def test_bad_training(tmp_path, argv, words):
    one_line(start("--train", *TINY, tmp_path / "out", *argv.split()), *words)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_older_than_an_option(tmp_path, few_images):
    """It has the option's default; what is left out of its network makes another one, and is refused."""
    assert start("--train", *TINY, tmp_path, "--edges", 0.4, 0.6).code == 0
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del saved["config"]["shares"]
    torch.save(saved, tmp_path / "checkpoint.pt")
    result = start("--sample", "--n", 1, "--nfe", 1, "--out", tmp_path)
    assert result.code == 0, result.err
    assert start("--train", "--resume", "--iters", 3, "--out", tmp_path).code == 0
    assert config_of(tmp_path)["shares"] == [1.0]
    del saved["config"]["ch"]
    torch.save(saved, tmp_path / "checkpoint.pt")
    one_line(start("--sample", "--out", tmp_path), "checkpoint.pt")


def test_bad_sampling(tmp_path, few_images):
    assert start("--train", *TINY, tmp_path, "--edges", 0.4, 0.6).code == 0
    for argv, words in (("--sample --nfe 0", ["--nfe"]), ("--sample --order 4", ["--order"]),
                        ("--sample --stages 4", ["--stages", "--search"]), ("--search --stages 1", ["--stages"]),
                        ("--sample --images emoji", ["--images", "--search"]), ("--sample --edges 0.5", ["--edges"]),
                        ("--search --images /nope", ["/nope"])):
        one_line(start(*argv.split(), "--out", tmp_path), *words)


@pytest.mark.parametrize("n, words", [(1, ["two images"]), (5, ["5 images", "--edges"])])
def test_small_folders(tmp_path, monkeypatch, garments, n, words):
    """Too few images to cluster: what to do is told, and with --edges they train."""
    monkeypatch.setattr(m, "cluster_timesteps", lambda method, n, data, f=m.cluster_timesteps: f(method, n, data, 400))
    (tmp_path / "images").mkdir()
    for i in range(n):
        Image.fromarray(common.to_uint8(garments[i, 0]).numpy()).save(tmp_path / "images" / f"{i}.png")
    argv = ["--train", "--data", tmp_path / "images", *TINY, tmp_path / "out"]
    one_line(start(*argv), *words)
    assert not (tmp_path / "out").exists()
    assert start(*argv, "--edges", 0.442, 0.631).code == 0
