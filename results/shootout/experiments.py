"""The shoot-out: all four papers and the usual samplers, on Fashion-MNIST, networks of equal training MACs: one table,
one figure, one grid. None of the papers has it.

    python results/shootout/experiments.py plain trd            # these lines; then python results/report.py
"""
import itertools
import shlex
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import folder_of, opened, record, start  # noqa: E402
import c2f_trd as c2f  # noqa: E402
import lowdiff as low  # noqa: E402
import multistage  # noqa: E402, F401
import postdiff  # noqa: E402
from common import linear_alpha_bar, noise_for, save_grid  # noqa: E402

S = "shootout"
BASE, COARSE, EDM, LOW, TWO, UNIFIED, STAGES = (f"--checkpoint weights/{path}.pt" for path in (
    "c2f_trd/base", "c2f_trd/weights", "lowdiff/edm", "lowdiff/weights", "lowdiff/two",
    "multistage/unified", "multistage/weights"))
SOLVERS = {"ddim": "DDIM", "dpm2": "2M"}
STARTS = {"inclusive": "paper's start", "best": "best start"}
SIGMAS, ROUNDS = 12, 4                 # candidates of a noise level, sweeps: of the search for LowDiff's last stage


def line(method, arm, script, argv, generate=None, change=None, experiment=S, **more):
    """A line of the table for three seeds. generate: in place of the script's. more: of record."""
    with mock.patch.object(sys.modules[script], "generate", generate or sys.modules[script].generate):
        record(script, experiment, argv, arm, change=change, folder=S, method=method, **more)


def plain():
    """DDIM, DPM-Solver++ 2M from the best usual steps, DPM-Solver-3 (on the unified network): fewer and fewer steps."""
    for solver, K in (*itertools.product(SOLVERS, (5, 10, 20)), ("ddim", 50)):
        line(SOLVERS[solver], f"{SOLVERS[solver]}, {K} steps", "c2f_trd",
             f"{BASE} --method base --solver {solver} --steps {K} --start best")
    for K in (5, 6):
        line("2M, uniform steps", f"2M, {K} uniform steps", "c2f_trd",
             f"{BASE} --method base --solver dpm2 --steps {K}")
    line("DDIM", "DDIM, 100 steps", "c2f_trd", f"{BASE} --method base --solver ddim --steps 100")
    for nfe in (6, 9, 12, 20):
        line("DPM-Solver-3", f"DPM-Solver-3, {nfe} evaluations", "multistage", f"{UNIFIED} --nfe {nfe}")


def edm():
    """EDM's Heun, with labels: fewer and fewer steps."""
    for N in (4, 7, 12, 18):
        line("EDM", f"EDM, {2 * N - 1} evaluations", "lowdiff", f"{EDM} --steps {N}")
    line("EDM, ends at sigma .1", "EDM, 15 evaluations, ends at sigma .1", "lowdiff",
         f"{EDM} --steps 8 --sigma-min 0.1")


def trd():
    """TRD alone and C2F+TRD, from the paper's steps and from the best usual ones; C2F alone; C2F+TRD from an earlier
    transition than the paper's rule finds, and its network at full resolution alone."""
    for solver, K, first, methods in (
            ("dpm2", 5, "inclusive", ("trd", "c2f+trd")), ("dpm2", 5, "best", ("trd", "c2f", "c2f+trd")),
            ("ddim", 5, "inclusive", ("trd", "c2f", "c2f+trd")), ("dpm2", 6, "inclusive", ("trd",)),
            ("ddim", 6, "inclusive", ("trd",)), ("dpm2", 10, "best", ("trd",))):
        for method in methods:
            name = f"{method.upper()}, {SOLVERS[solver]}"
            line(f"{name}, {STARTS[first]}",
                 f"{name}, {f'10 + {K}' if 'c2f' in method else K} steps, {STARTS[first]}", "c2f_trd",
                 f"{COARSE if 'c2f' in method else BASE} --method {method} --solver {solver} --steps {K} "
                 f"--start {first}")
    late = "--method c2f+trd --solver dpm2 --steps 10 --start best --t-star 706"
    line("C2F+TRD, 2M, from t* 706", "C2F+TRD, 2M, 10 + 10 steps, from t* 706", "c2f_trd", f"{COARSE} {late}")
    options = "--solver dpm2 --steps 11 --start best"
    taus = opened("c2f_trd", f"{BASE} --method base {options}")[3]["high_taus"]
    line("2M, C2F's network", "2M, 11 steps, C2F's network alone", "c2f_trd",
         f"{COARSE} --method c2f --t-star 706 {options}", change=lambda plan: dict(plan, low_taus=[], high_taus=taus))


def lowdiff():
    """LowDiff of three stages: the paper's plan, and shorter ones; of two, which had a third of the training."""
    for plan in ("18 12 9 18 13", "18 12 6 18 13", "12 9 5 12 10"):
        *steps, a, b = plan.split()
        line("LowDiff 8-16-32", f"LowDiff, {a} + {b} + {2 * int(steps[-1]) - 1} evaluations", "lowdiff",
             f"{LOW} --steps {' '.join(steps)} --truncate {a} {b}")
    line("LowDiff, ends at sigma .3", "LowDiff, 18 + 13 + 9 evaluations, ends at sigma .3", "lowdiff",
         f"{LOW} --steps 18 12 5 --truncate 18 13 --sigma-min 0 0 0.3")
    line("LowDiff 16-32", "LowDiff 16-32, 19 + 17 evaluations", "lowdiff", TWO)


def stages():
    """Multistage: a decoder for each stage of the noise, trained with 60 % of the unified one's MACs."""
    for nfe in (6, 9, 12, 20):
        line("Multistage", f"Multistage, {nfe} evaluations", "multistage", f"{STAGES} --nfe {nfe}")


def cached_forward(net):
    """c2f_trd's network as postdiff's samplers call theirs: eps_hat, what DeepCache keeps, no cross-attentions."""
    def forward(xt, t, text, deep=None, cross=None, depth=1):
        emb, enc, dec = F.silu(net.emb(c2f.timestep_embedding(t, net.ch))), net.encoder, net.decoder
        x = xt.contiguous(memory_format=torch.channels_last)
        skips = [enc.conv_in(F.pixel_unshuffle(x, enc.patch))]
        for layers in enc.down if deep is None else enc.down[:depth]:
            skips.append(c2f.run_layers(layers, skips[-1], emb))
        h = c2f.run_layers(enc.mid, skips[-1], emb) if deep is None else deep
        for layers, skip in zip(dec.up[-len(skips):], reversed(skips)):
            if layers is dec.up[-1 - depth]:
                deep = h
            h = c2f.run_layers(layers, torch.cat([h, skip], dim=1), emb)
        v_hat = F.pixel_shuffle(dec.conv_out(F.silu(dec.norm_out(h))), dec.patch)
        return c2f.eps_of_v(v_hat.float(), xt, t, linear_alpha_bar(c2f.T)), deep, {}
    return forward


def generate_postdiff(net, config, plan, seeds, device):
    """Images of PostDiff without text on c2f_trd's base network: n_low of the steps at half the side, a full pass at
    every k-th step."""
    noise, low_noise = noise_for(seeds, *((config["channels"], r, r) for r in (config["res"], config["res"] // 2)))
    with mock.patch.object(net, "forward", cached_forward(net)):
        return postdiff.mixed_resolution_sample(
            net, noise.to(device), plan["high_taus"], linear_alpha_bar(c2f.T), None, None, None, plan["n_low"],
            low_noise.to(device), plan["k"], n_guided=0, choice="none", order=c2f.ORDER[plan["solver"]])


def post():
    """PostDiff's mixed resolution and caching on the base network, without training; TRD's steps with caching."""
    for name, s, k in (("mixed resolution", 0.5, 1), ("caching", 0, 2), ("both", 0.5, 2)):
        for solver, K in (("ddim", 20), ("dpm2", 10)):
            line(f"PostDiff, {name}", f"PostDiff, {name}, {SOLVERS[solver]}, {K} steps", "c2f_trd",
                 f"{BASE} --method base --solver {solver} --steps {K} --start best", generate_postdiff,
                 lambda plan: dict(plan, n_low=int(s * K), k=k))
    line("TRD with caching", "TRD with caching, 2M, 5 steps", "c2f_trd", f"{BASE} --method trd --solver dpm2 --steps 5",
         generate_postdiff, lambda plan: dict(plan, n_low=0, k=2))


def sigma_search(denoiser, noise, sigmas, x_ref):
    """TRD's idea for EDM's steps: one noise level after the other is replaced by the best of SIGMAS between its
    neighbours, by the error to x_ref, until a sweep changes nothing. Returns the levels, with the 0 at their end."""
    def loss(levels):
        return float((low.heun_sample(denoiser, noise, levels) - x_ref).square().mean())

    sigmas, best, changed, sweeps = list(sigmas), loss(sigmas), True, 0
    while changed and sweeps < ROUNDS:
        changed, sweeps = False, sweeps + 1
        for i in reversed(range(len(sigmas) - 1)):
            above = sigmas[i - 1] if i else 2 * sigmas[0]
            below = sigmas[i + 1] or sigmas[i] / 4
            tried = {loss(levels): levels for levels in (
                [*sigmas[:i], above * (below / above) ** ((j + 1) / (SIGMAS + 1)), *sigmas[i + 1:]]
                for j in range(SIGMAS))}
            if min(tried) < best * (1 - 1e-6):
                best, sigmas, changed = min(tried), tried[min(tried)], True
    return sigmas


def last_stage(net, config, plan, seeds, device):
    """LowDiff's last stage for its images of the stages below, or EDM's only one: denoiser(xt, sigma), noise,
    sigmas."""
    found, cascade = [], low.cascade_sample

    def stop(stages):
        *below, (denoiser, noise, sigmas, _) = stages
        z = low.upsample(cascade(below)[-1]).to(noise.dtype) if below else None
        s = low.stops_of(plan)[-2] if below else None
        found.append((lambda xt, sigma: denoiser(xt, sigma, z, s), noise, sigmas))
        return [noise]

    with mock.patch.object(low, "cascade_sample", stop):
        low.generate(net, config, plan, seeds, device)
    return found[0]


def combined():
    """LowDiff whose last stage takes searched noise levels, TRD's idea at EDM's steps, on 16 samples; EDM with searched
    levels."""
    levels_of = low.levels_of
    with mock.patch.object(low, "levels_of", lambda plan: [*levels_of(plan)[:-1], plan["sigmas"]] if "sigmas" in plan
                           else levels_of(plan)):
        for N, (name, argv) in itertools.product((5, 9), (("LowDiff", f"{LOW} --steps 18 12 {{}} --truncate 18 13"),
                                                          ("EDM", f"{EDM} --steps {{}}"))):
            _, net, config, plan, device = opened("lowdiff", argv.format(N))
            seeds = range(c2f.CALIBRATION_SEED, c2f.CALIBRATION_SEED + c2f.CALIBRATION)
            denoiser, noise, sigmas = last_stage(net, config, plan, seeds, device)
            x_ref = low.heun_sample(denoiser, noise, low.noise_levels(40, plan["sigma_min"][-1], plan["sigma_max"][-1]))
            found = [round(float(v), 5) for v in sigma_search(denoiser, noise, sigmas, x_ref)]
            words = "18 + 13 + " if name == "LowDiff" else ""
            line(f"{name}, searched steps", f"{name}, {words}{2 * N - 1} evaluations, searched", "lowdiff",
                 argv.format(N), change=lambda plan: dict(plan, sigmas=found))


SECOND = (                             # 100-step DDIM, what costs about a tenth of it, or a twentieth
    "DDIM, 100 steps", "2M, 11 steps, C2F's network alone", "EDM, 15 evaluations, ends at sigma .1",
    "C2F+TRD, 2M, 10 + 10 steps, from t* 706", "LowDiff, 18 + 13 + 9 evaluations, ends at sigma .3", "2M, 10 steps",
    "Multistage, 12 evaluations", "DPM-Solver-3, 12 evaluations", "DDIM, 10 steps",
    "PostDiff, caching, 2M, 10 steps", "2M, 6 uniform steps", "C2F+TRD, 2M, 10 + 5 steps, paper's start",
    "TRD, 2M, 6 steps, paper's start", "TRD, 2M, 5 steps, paper's start")


def opinion():
    """A second opinion on some of these lines: FD in EfficientNet-Lite0's features, which were not trained here."""
    first = line

    def second(method, arm, *args, **more):
        if arm in SECOND:
            first(method, arm, *args, **more, experiment="opinion", seeds=1, extractor="efficientnet-lite0")

    with mock.patch.dict(globals(), line=second):
        for function in (plain, edm, trd, lowdiff, stages, post):
            function()


PROMPTS = ("cat face", "Rainbow flag!", "red heart", "slice of pizza", "dog face", "rocket", "japan flag", "clown face",
           "banana", "police car", "ghost", "snowman",
           "purple dog", "green umbrella", "blue strawberry", "blue mushroom")     # these four: in no training caption
GRID = tuple((script, f"{checkpoint} {options}") for script, checkpoint, options in (
    ("c2f_trd", BASE, "--method base --solver ddim --steps 100"),
    ("c2f_trd", BASE, "--method base --solver ddim --steps 5 --start best"),   # a twentieth of its MACs
    ("c2f_trd", BASE, "--method base --solver dpm2 --steps 5"),
    ("c2f_trd", BASE, "--method trd --solver dpm2 --steps 5"),
    ("c2f_trd", COARSE, "--method c2f+trd --solver dpm2 --steps 5"),
    ("lowdiff", EDM, "--steps 4"),
    ("c2f_trd", BASE, "--method base --solver ddim --steps 10 --start best"),  # a tenth
    ("c2f_trd", BASE, "--method base --solver dpm2 --steps 10 --start best"),
    ("c2f_trd", COARSE, "--method c2f+trd --solver dpm2 --steps 10 --start best --t-star 706"),
    ("lowdiff", EDM, "--steps 8 --sigma-min 0.1"),
    ("lowdiff", LOW, "--steps 18 12 5 --truncate 18 13 --sigma-min 0 0 0.3"),
    ("multistage", UNIFIED, "--nfe 12"),
    ("multistage", STAGES, "--nfe 12")))


def samples(n=12):
    """samples.png: 100-step DDIM; then about a twentieth, then a tenth of its MACs: a row for each line of GRID, and
    PostDiff's caching."""
    rows = []
    for script, argv in GRID:
        module, net, config, plan, device = opened(script, argv)
        rows.append(module.sample(net, config, plan, range(n), device))
    _, net, config, plan, device = opened("c2f_trd", f"{BASE} --method base --solver ddim --steps 20 --start best")
    with mock.patch.object(c2f, "generate", generate_postdiff):
        rows.append(c2f.sample(net, config, dict(plan, n_low=0, k=2), range(n), device))
    save_grid(folder_of(S) / "samples.png", torch.cat(rows), columns=n)


def front(n=16):
    """results/samples.png: what --sample makes, a row for each script: C2F-TRD from the transition of its headline, the
    others by default; PostDiff's with its prompts below."""
    more = {"c2f_trd": " --t-star 706 --start best --steps 10", "postdiff": f" --prompt {shlex.join(PROMPTS)}"}
    parts, path = [], folder_of(S).parent / "samples.png"
    for script in ("c2f_trd", "lowdiff", "multistage", "postdiff"):
        argv = f"--checkpoint weights/{script}/weights.pt" + more.get(script, "")
        module, net, config, plan, device = opened(script, argv)
        save_grid(path, module.sample(net, config, plan, range(n), device), columns=n,
                  captions=PROMPTS[:n] if script == "postdiff" else ())
        parts.append(np.asarray(Image.open(path).convert("RGB")))
    Image.fromarray(np.concatenate(parts)).save(path)


FUNCTIONS = (plain, edm, trd, lowdiff, stages, post, combined, opinion, samples, front)

if __name__ == "__main__":
    start(FUNCTIONS)
