"""The table under "Copying" in README.md: what a row names, pasted with its imports and nothing else into an empty
module, computes what it should; no name of it is missing or superfluous."""
import ast
import builtins
import dis
import functools
import importlib.util
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("c2f_trd", "lowdiff", "multistage", "postdiff")
# What a user of diffusers has, DDPM's alphas_cumprod in float32, with the 1 that the README says to append.
TABLE = torch.cat([(1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0), torch.ones(1)])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def near(found, expected):
    return float((found - expected).norm() / expected.norm())


# ---------------------------------------------------------------------------------------------
# The table and the paste
# ---------------------------------------------------------------------------------------------
def names_in(cell):
    """Names in backticks and plain CONSTANTS, in order."""
    return [a or b for a, b in re.findall(r"`(\w+)`|\b([A-Z][A-Z_]*)\b", cell)]


def table(readme):
    """{script: (functions to take, names to take with them, those of the latter that are said to be common.py's)}."""
    section = re.search(r"^## Copying\n(.*?)^## ", readme, re.M | re.S)[1]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    return {re.search(r"\((\w+)\.py\)", first)[1]: (names_in(first), names_in(also), names_in(
        also.partition("of common.py")[2])) for first, also in rows}


@functools.cache
def definitions(file):
    """{name: (the text of its statement, decorators included, whether it is a constant)} of a file's top level."""
    source, found = (ROOT / f"{file}.py").read_text(encoding="utf-8"), {}
    lines = source.splitlines()
    for node in ast.parse(source).body:
        first = min(n.lineno for n in (node, *getattr(node, "decorator_list", ())))
        text = "\n".join(lines[first - 1:node.end_lineno])
        targets = [n for target in getattr(node, "targets", ()) for n in ast.walk(target) if isinstance(n, ast.Name)]
        for name in [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [n.id for n in targets]:
            found[name] = text, bool(targets)
    return found


@functools.cache
def imports(*files):
    """{name: its import statement} of the files' top level, without what they take from common.py."""
    found = {}
    for node in (n for file in files for n in ast.parse((ROOT / f"{file}.py").read_text(encoding="utf-8")).body):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "common":
            for alias in node.names:
                one = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], 0)
                found[alias.asname or alias.name.partition(".")[0]] = ast.unparse(one)
    return found


def globals_of(code):
    """The names that code, and the code in it, looks up outside of itself."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(globals_of(c) for c in code.co_consts if hasattr(c, "co_consts")))


@functools.cache
def needs(text):
    """The names that a statement takes from its module."""
    return globals_of(compile(text, "paste", "exec")) - set(vars(builtins))


def faults(script, taken, also, of_common):
    """What is wrong with a row, one line each."""
    here, common, names = definitions(script), definitions("common"), [*taken, *also]
    texts = {name: text for name, (text, _) in {**common, **here}.items() if name in names}
    wrong = [f"{name} is in no file" for name in names if name not in texts]
    wrong += [f"{name} is named twice" for name in set(names) if names.count(name) > 1]
    wrong += [f"{n} is not in the file named" for n in texts if n not in (common if n in of_common else here)]
    known = {*texts, *imports(script, "common")}
    wrong += [f"{name} lacks {lack}" for name, text in texts.items() for lack in sorted(needs(text) - known)]
    used, new = set(), set(taken)
    while new:
        used |= new
        new = set().union(*(needs(texts[name]) for name in new if name in texts)) - used
    return wrong + [f"{name} is not used" for name in also if name not in used]


def paste(script, taken, also, of_common):
    """The source of a module: the imports that it needs, constants, then functions, in the order of the table."""
    found = {**definitions("common"), **definitions(script)}
    texts = sorted((found[name] for name in [*taken, *also] if name in found), key=lambda d: not d[1])
    texts = list(dict.fromkeys(text for text, _ in texts))     # A, B = 1, 2: once
    known, needed = imports(script, "common"), set().union(*map(needs, texts))
    return "\n".join(known[name] for name in sorted(known.keys() & needed)) + "\n\n\n" + "\n\n\n".join(texts) + "\n"


@pytest.fixture
def pasted(tmp_path):
    """pasted(script): the module of a row, imported from an empty folder."""
    def load(script):
        path = tmp_path / f"pasted_{script}.py"
        path.write_text(paste(script, *table(TEXT)[script]), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


def test_rows():
    assert set(table(TEXT)) == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_names(script):
    assert faults(script, *table(TEXT)[script]) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_names(script):
    """Each name left out, each misspelt, one too many, one in the wrong file."""
    taken, also, of_common = table(TEXT)[script]
    for name in also:
        assert any(line.endswith(f"lacks {name}") for line in faults(
            script, taken, [n for n in also if n != name], of_common)), name
        assert f"{name}_ is in no file" in faults(script, taken, [n.replace(name, f"{name}_") for n in also], of_common)
    for name in ("SCRIPT", "timestep_embedding"):
        assert faults(script, taken, [*also, name], of_common) == [f"{name} is not used"]
    assert faults(script, taken, [*also, "to_float"], [*of_common, "to_float"]) == ["to_float is not used"]
    assert faults(script, taken, also, [*of_common, also[0]]) == [f"{also[0]} is not in the file named"]
    assert faults(script, taken, [*also, also[0]], of_common) == [f"{also[0]} is named twice"]


def test_table_by_hand():
    rows = "| a | b |\n| --- | --- |\n| `f`, `g` (a.py) | T, MANY_WORDS, `h`; of common.py `i`, EMOJI |\n"
    assert table(f"# A\n## Copying\n\nText `x`\n\n{rows}\nB\n\n## C\n{rows.replace('a.py', 'z.py')}") == {
        "a": (["f", "g"], ["T", "MANY_WORDS", "h", "i", "EMOJI"], ["i", "EMOJI"])}


# ---------------------------------------------------------------------------------------------
# What the rows compute
# ---------------------------------------------------------------------------------------------
def plain(eps_model, x, taus, order=1):
    """DDIM or DPM-Solver++ 2M, written with lambda = log(alpha / sigma): first and last step of order 1."""
    rows, past = [(t, float(TABLE[t]) ** 0.5, (1 - float(TABLE[t])) ** 0.5) for t in taus], None
    for k, (t, alpha, sigma) in enumerate(rows):
        x0 = (x - sigma * eps_model(x, torch.full((len(x),), t))) / alpha
        if k == len(rows) - 1:
            return x0
        _, alpha_next, sigma_next = rows[k + 1]
        h = math.log(alpha_next / sigma_next * sigma / alpha)
        D = x0 + h / (2 * past[1]) * (x0 - past[0]) if past and order == 2 else x0
        x, past = sigma_next / sigma * x - alpha_next * math.expm1(-h) * D, (x0, h)


def mixture(mu, std=0.3):
    """The exact eps_model of a mixture of the Gaussians N(mu[i], std^2)."""
    def eps_model(xt, t):
        a = TABLE[t].view(-1, 1, 1, 1, 1)
        gap, v = xt[:, None] - a.sqrt() * mu, a * std ** 2 + 1 - a
        weight = (-gap.square().sum((2, 3, 4), keepdim=True) / (2 * v)).softmax(1)
        return (weight * gap * (1 - a).sqrt() / v).sum(1)      # each one's eps_hat; weighted
    return eps_model


@pytest.mark.parametrize("order", [1, 2])
def test_trd_search(pasted, order):
    """The losses that TRD reports are those of a plain sampler at its steps; they fall; a second search is at rest."""
    search, mu = pasted("c2f_trd").trd_search, randn(5, 1, 4, 4, seed=1)
    low, high = mixture(F.avg_pool2d(mu, 2)), mixture(mu)
    z_low, z_high = randn(12, 1, 2, 2, seed=2), randn(12, 1, 4, 4, seed=3)

    def both(low_taus, high_taus, order=order):
        up = F.interpolate(plain(low, z_low, low_taus, order), scale_factor=2, mode="bilinear", align_corners=False)
        a = TABLE[high_taus[0]]
        return plain(high, a.sqrt() * up + (1 - a).sqrt() * z_high, high_taus, order)

    def one(taus, order=order):
        return plain(high, z_high, taus, order)

    for stages, start, run, fine in (
            ([(high, z_high)], [[999, 749, 499, 249, 0]], one, [range(999, 0, -20)]),
            ([(low, z_low), (high, z_high)], [[999, 799, 599], [599, 399, 199, 0]], both,
             [range(999, 0, -20), range(599, 0, -20)])):
        x_ref = run(*fine, order=1)
        found, report = search(stages, start, x_ref, TABLE, order)
        assert [len(taus) for taus in found] == [len(taus) for taus in start]
        assert all(a > b >= 0 for taus in found for a, b in itertools.pairwise(taus))
        for taus, loss in ((start, report["loss"][0]), (found, report["loss"][-1])):
            assert loss == pytest.approx(float((run(*taus) - x_ref).square().mean()), rel=1e-3)
        assert report["loss"] == sorted(report["loss"], reverse=True) and report["loss"][-1] < 0.7 * report["loss"][0]
        assert search(stages, found, x_ref, TABLE, order)[0] == found
    x_ref = one(range(999, 0, -20))                            # a single step: the best of 0 .. 1000 in six
    best = min((166, 333, 500, 666, 833), key=lambda t: float((one([t]) - x_ref).square().mean()))
    assert search([(high, z_high)], [[1]], x_ref, TABLE, order, sweeps=1)[0] == [[best]]


def test_cascade_sample(pasted):
    """Two Gaussian stages with exact denoisers: every sample where the exact flow takes it, truncated by an even and an
    odd number of evaluations, and the right deviations in the end."""
    m, v, d, n = pasted("lowdiff"), 0.25, 0.3, 2000            # low: N(0, v); high: four times that, plus N(0, d^2)
    ladder = [(20 ** (1 / 5) * (1 - i / 60) + 0.002 ** (1 / 5) * i / 60) ** 5 for i in range(61)] + [0.0]
    z_low, z_high = randn(n, 1, 2, 2, seed=1, dtype=torch.float64), randn(n, 1, 4, 4, seed=2, dtype=torch.float64)

    def low(xt, sigma, z, s):
        assert z is None and s is None
        return v / (v + sigma ** 2) * xt

    def parts(s):                                              # of x given z: shrinkage of the mean, two variances
        return v / (v + s ** 2), d ** 2 + 4 * v * s ** 2 / (v + s ** 2), d ** 2

    def four(x):                                               # every pixel four times
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def apart(x):
        return (mean := four(F.avg_pool2d(x, 2))), x - mean

    def high(xt, sigma, z, s):
        shrink, along, across = parts(s)
        mean, rest = apart(xt - shrink * z)
        return shrink * z + along / (along + sigma ** 2) * mean + across / (across + sigma ** 2) * rest

    def flow(x, v, sigma, end):                                # N(0, v) from level sigma to `end`
        return x * math.sqrt((v + end ** 2) / (v + sigma ** 2))

    for K, at in ((60, 30), (61, 31)):
        first, x = m.cascade_sample([(low, z_low, ladder, K), (high, z_high, ladder, None)])
        assert near(first, flow(ladder[0] * z_low, v, ladder[0], ladder[at])) < 0.01
        shrink, along, across = parts(ladder[at])
        condition = shrink * four(first)
        mean, rest = apart(ladder[0] * z_high - condition)
        exact = condition + flow(mean, along, ladder[0], 0) + flow(rest, across, ladder[0], 0)
        assert near(x, exact) < 0.01
        assert float(x.std()) == pytest.approx(math.sqrt(v + d ** 2), rel=0.03)
        assert float(F.avg_pool2d(x, 2).std()) == pytest.approx(math.sqrt(v + d ** 2 / 4), rel=0.03)
    alone = m.heun_sample(lambda xt, sigma: low(xt, sigma, None, None), z_low, ladder)
    assert near(alone, flow(ladder[0] * z_low, v, ladder[0], 0)) < 0.01
    assert torch.equal(m.cascade_sample([(low, z_low, ladder, None)])[0], alone)


def sigma_at(t):
    return torch.expm1(19.9 * t ** 2 / 2 + 0.1 * t).sqrt()


def test_optimal_denoiser(pasted):
    m, data, xt = pasted("multistage"), randn(30, 2, 3, 3, dtype=torch.float64), randn(8, 2, 3, 3, dtype=torch.float64)
    scale, sigma = torch.linspace(0.2, 1, 8).double(), torch.linspace(0.5, 3, 8).double()
    for x, s, b, found in zip(xt, scale, sigma, m.optimal_denoiser(xt, scale, sigma, data)):
        weights = torch.stack([(-(x - s * y).square().sum() / (2 * (s * b) ** 2)).exp() for y in data])
        x0 = sum(w * y for w, y in zip(weights, data)) / weights.sum()
        assert near(found, (x - s * x0) / (s * b)) < 1e-6


def test_cluster_two_points(pasted):
    """Algorithm 1 on the two images +a and -a of one pixel, by quadrature of its closed form."""
    a, t = 0.5, torch.linspace(1e-3, 1, 1000).double()
    z = torch.special.ndtri((torch.arange(1000).double() + 0.5) / 1000)
    sigma = sigma_at(t)[:, None]
    x0_hat = a * (a * (a + sigma * z) / sigma ** 2).tanh()     # of +a
    similar = [(error.abs() / sigma <= 2 / 256).double().mean(1) for error in (x0_hat - a, x0_hat)]

    def crossing(s):
        return int((s.cumsum(0) / torch.arange(1, 1001) < 0.9).int().argmax())

    expected = [float(t[crossing(similar[0])]), float(t[-1 - crossing(similar[1].flip(0))])]
    edges, report = pasted("multistage").cluster_timesteps(
        "optimal", 3, a * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1), samples=20_000)
    assert edges == pytest.approx(expected, abs=0.015)
    assert report["edges"] == edges and 0 < edges[0] < edges[1] < 1


def test_cluster_images(pasted):
    """Both algorithms: edges that rise, sooner where the contrast is lower; Algorithm 2's are the best of all cuts."""
    m, data = pasted("multistage"), 0.4 * randn(20, 1, 4, 4).clamp(-2, 2)
    for method, n in (("optimal", 3), ("optimal2", 3), ("optimal", 4)):
        edges, report = m.cluster_timesteps(method, n, data, samples=400)
        faint, _ = m.cluster_timesteps(method, n, data / 4, samples=400)
        assert len(edges) == n - 1 and all(a < b for a, b in itertools.pairwise([0, *edges, 1]))
        assert all(a <= b for a, b in zip(faint, edges)) and faint != edges
        if "map" in report:
            far, nodes = 1 - torch.tensor(report["map"]).double(), report["nodes"]

            def cost(cuts, far=far):
                return float(sum(far[a:b, a:b].sum() for a, b in itertools.pairwise([0, *cuts, len(far)])))

            best = min(itertools.combinations(range(1, len(nodes)), n - 1), key=cost)
            assert edges == pytest.approx([(nodes[c - 1] + nodes[c]) / 2 for c in best], abs=1e-4)


def tiny_net():
    """A text-to-image network of the contract of cached_eps: a layer that always runs, a deep one that may be given,
    and two that listen to the text (B, L, 4), whose outputs may be given, too. Also the list of its calls."""
    w_in, w_deep, w_out = (0.4 * randn(*c, 3, 3, seed=i) for i, c in enumerate(((4, 1), (4, 4), (1, 4))))
    calls = []

    def net(xt, t, text, deep=None, cross=None, depth=1):
        calls.append((len(xt), xt.shape[-1], "F" if deep is None else "c", len(cross or ())))
        used = {}

        def listen(name, h):
            used[name] = (cross or {}).get(name, h * text.mean(1)[:, :, None, None])
            return h + used[name]

        h = (F.conv2d(xt, w_in, padding=1) + t.view(-1, 1, 1, 1) / 1000).tanh()
        if deep is None:
            deep = F.conv2d(listen("deep", h), w_deep, padding=1).sin()
        return F.conv2d(listen("shallow", h + deep), w_out, padding=1), deep, used
    return net, calls


TAUS, TEXT_IN, NULL, W = [999, 874, 749, 624, 499, 374, 249, 124], randn(3, 5, 4, seed=7), torch.zeros(3, 5, 4), 3.0
NOISE, LOW = randn(3, 1, 8, 8, seed=8), randn(3, 1, 4, 4, seed=9)


@pytest.mark.parametrize("order", [1, 2])
def test_postdiff_off(pasted, order):
    """Everything off: plain classifier-free guidance in the plain sampler; without guidance: the text's half alone."""
    net, calls = tiny_net()
    sampler = pasted("postdiff").mixed_resolution_sample

    def guided(xt, t):
        null, text = net(xt, t, NULL)[0], net(xt, t, TEXT_IN)[0]
        return null + W * (text - null)

    found = sampler(net, NOISE, TAUS, TABLE, TEXT_IN, NULL, W, order=order)
    assert calls == 8 * [(6, 8, "F", 0)]
    assert near(found, plain(guided, NOISE, TAUS, order)) < 1e-4
    alone = plain(lambda xt, t: net(xt, t, TEXT_IN)[0], NOISE, TAUS, order)
    assert near(sampler(net, NOISE, TAUS, TABLE, TEXT_IN, NULL, W, n_guided=0, order=order), alone) < 1e-4


@pytest.mark.parametrize("choice", ["cond", "uncond", "ave", "cfg", "none"])
def test_postdiff_on(pasted, choice):
    """Everything on, step by step: three low steps, every second pass full, guidance in the first five."""
    net, _ = tiny_net()
    x, deep, frozen, latest = LOW, None, {}, {}
    for i, kind in enumerate("FcF" "Fc" "FcF"):                # the size changes, guidance ends
        t = torch.full((3,), TAUS[i])
        deep = None if kind == "F" else deep
        if i < 5:
            eps, deep, used = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([NULL, TEXT_IN]), deep)
            latest.update(used)
            eps = (1 - W) * eps[:3] + W * eps[3:]
        else:
            if i == 5 and choice != "none":
                share = dict(cond=1, uncond=0, ave=0.5, cfg=W)[choice]
                frozen = {name: (1 - share) * out[:3] + share * out[3:] for name, out in latest.items()}
            eps, deep, _ = net(x, t, TEXT_IN, deep, frozen)
        a, b = TABLE[TAUS[i]], TABLE[[*TAUS, -1][i + 1]]
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        if i == 2:
            x0, eps = F.interpolate(x0, scale_factor=2, mode="bilinear", align_corners=False), NOISE
        x = b.sqrt() * x0 + (1 - b).sqrt() * eps

    other, calls = tiny_net()
    found = pasted("postdiff").mixed_resolution_sample(
        other, NOISE, TAUS, TABLE, TEXT_IN, NULL, W, n_low=3, low_noise=LOW, k=2, n_guided=5, choice=choice)
    f = 2 * (choice != "none")
    assert calls == [(6, 4, "F", 0), (6, 4, "c", 0), (6, 4, "F", 0), (6, 8, "F", 0), (6, 8, "c", 0), (3, 8, "F", f),
                     (3, 8, "c", f), (3, 8, "F", f)]
    assert near(found, x) < 1e-4
