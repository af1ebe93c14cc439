"""The tables and figures of results/c2f_trd: Fig. 5 to 7, Tables I and II of the paper, and what lies beside them.

    python results/c2f_trd/experiments.py headline starts      # these; then python results/report.py
"""
import itertools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import grid, macs_of, note, opened, parameters, record, start, timed, trained  # noqa: E402
import c2f_trd as c2f  # noqa: E402
from lowdiff import noise_levels  # noqa: E402
from common import linear_alpha_bar  # noqa: E402
from inception import class_distances  # noqa: E402

S = "c2f_trd"
BASE, WEIGHTS = (f"--checkpoint weights/c2f_trd/{name}.pt" for name in ("base", "weights"))
NAMES = {"base": "uniform", "trd": "TRD", "c2f": "C2F", "c2f+trd": "C2F+TRD"}
SOLVERS = {"ddim": "DDIM", "dpm2": "2M"}
STEPS = 5                              # where the paper's claims are boldest
AIM = dict(method="c2f+trd", solver="dpm2", steps=10, more="--t-star 706 --start best")    # what the headline measures
COARSE = "--method c2f --t-star 706"   # where the search for t* would hide what is compared
FINETUNE = "--data fashion --batch 64 --lr 3e-4 --init weights/c2f_trd/base.pt"
TUNE = 6e12                            # forward MACs of the fine-tunings of Table I
QUICK = dict(n=1000, seeds=1)          # of tables with many rows
HELD_OUT = 32                          # samples beside the 16 of the search


def command(method, solver, steps, more=""):
    """The command line of a method on the shipped networks."""
    return f"{WEIGHTS if 'c2f' in method else BASE} --method {method} --solver {solver} --steps {steps} {more}"


def facts(method, solver, steps):
    """Columns: what is run."""
    return {"solver": SOLVERS[solver], "steps": f"10 + {steps}" if "c2f" in method else str(steps)}


def held_out(net, config, plan, device):
    """Mean squared error to the reference of the search, on other samples than the search's."""
    all_steps, coarse = c2f.uniform_steps(c2f.T - 1, c2f.REFERENCE_STEPS), bool(plan["low_taus"])
    reference = dict(solver="ddim", low_taus=all_steps if coarse else [],
                     high_taus=[t for t in all_steps if not coarse or t <= plan["t_star"]])
    first = c2f.CALIBRATION_SEED + c2f.CALIBRATION
    x, x_ref = (c2f.generate(net, config, p, range(first, first + HELD_OUT), device) for p in (plan, reference))
    return float((x - x_ref).square().mean())


def plain(fine_tuned, solver, steps, first):
    """What `record` is told of a network at full resolution alone: the base model, or the fine-tuned network."""
    argv = command("base", solver, steps, f"--start {first}")
    if not fine_tuned:
        return dict(argv=argv)
    high_taus = opened(S, argv)[3]["high_taus"]
    return dict(argv=f"{WEIGHTS} {COARSE} --solver {solver} --start {first} --steps {steps}",
                change=lambda plan: dict(plan, low_taus=[], high_taus=high_taus))


def headline():
    """Results at a glance: 100-step DDIM, the best plain sampler of either network at no fewer MACs than the
    method's, by FD of 1,000 samples, C2F+TRD."""
    off = command("base", "ddim", 100)
    method = record(S, "headline", command(**AIM), "method", cells=dict(what="C2F+TRD from t* 706, 2M, 10 + 10 steps"))
    K, tried = math.ceil(100 * method[0]["macs_per_image"] / macs_of(S, off) - 1e-9), {}
    for fine_tuned, (solver, first) in itertools.product((False, True), (
            ("dpm2", "inclusive"), ("dpm2", "exclusive"), ("dpm2", "best"), ("ddim", "best"))):
        told, what = plain(fine_tuned, solver, K, first), f"{SOLVERS[solver]}, {K} steps, {first}"
        what += ", fine-tuned network" if fine_tuned else ""
        row, = record(S, "plain", arm=what, **told, **QUICK)
        tried[row["fd"]] = what, told
    what, told = tried[min(tried)]
    record(S, "headline", arm="best plain", cells=dict(what=what), **told)
    record(S, "headline", off, "off switch", cells=dict(what="DDIM, 100 steps"))


def opinion():
    """A second opinion on the headline: FD in the features of EfficientNet-Lite0, which were not trained here."""
    for arm, told in (("C2F+TRD from t* 706, 2M, 10 + 10 steps", dict(argv=command(**AIM))),
                      ("2M, 11 steps, best, fine-tuned network", plain(True, "dpm2", 11, "best")),
                      (f"C2F+TRD, 2M, 10 + {STEPS} steps", dict(argv=command("c2f+trd", "dpm2", STEPS))),
                      ("2M, 6 steps, inclusive", plain(False, "dpm2", 6, "inclusive")),
                      ("DDIM, 100 steps", dict(argv=command("base", "ddim", 100)))):
        record(S, "opinion", arm=arm, extractor="efficientnet-lite0", **told)


def steps():
    """Fig. 6: fewer steps, lower resolution, better steps, for both solvers, against 100-step DDIM."""
    record(S, "steps", command("base", "ddim", 100), "uniform, DDIM, 100", cells=facts("base", "ddim", 100))
    for K, solver, method in itertools.product((5, 6, 10, 11, 19, 20), SOLVERS, NAMES):
        if K not in (6, 11, 20) or "c2f" not in method:        # those: C2F's low steps, spent at full resolution
            record(S, "steps", command(method, solver, K), f"{NAMES[method]}, {SOLVERS[solver]}, {K}",
                   cells=facts(method, solver, K))


def starts():
    """Table II, and our remedy: TRD from the paper's steps and from the best usual schedule."""
    def searched(net, config, plan, device):
        loss = plan.get("loss", [])
        return {**known, "loss on 16, before": loss[0] if loss else "", "after": loss[-1] if loss else "",
                f"on {HELD_OUT} others": held_out(net, config, plan, device),
                "evaluations a sample": " + ".join(map(str, plan.get("evaluations", [])))}

    for first, solver, method in itertools.product(("inclusive", "best"), ("dpm2", "ddim"), ("trd", "c2f+trd")):
        known = facts(method, solver, STEPS)
        record(S, "starts", command(method, solver, STEPS, f"--start {first}"),
               f"{NAMES[method]}, {SOLVERS[solver]}, {'paper' if first == 'inclusive' else first}", cells=searched,
               **QUICK)


def schedules():
    """D12: usual schedules by the loss of TRD's search: those that --start best compares, even log SNR, Karras's."""
    _, net, config, _, device = opened(S, f"{BASE} --method base")
    alpha_bar, first = linear_alpha_bar(c2f.T), c2f.CALIBRATION_SEED
    seeds = range(first, first + c2f.CALIBRATION)
    (stage,), _ = c2f.stages_of(net, config, dict(low_taus=[], high_taus=[0]), seeds, device)
    x_ref = c2f.dpm_solver_pp_sample(*stage, c2f.uniform_steps(c2f.T - 1, c2f.REFERENCE_STEPS), alpha_bar, order=1)
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()[:c2f.T]
    for (solver, name), K in itertools.product(SOLVERS.items(), (STEPS, 2 * STEPS)):
        chosen = {"inclusive": None, "exclusive, trailing": 1, **{f"p = {p:g}": p for p in c2f.BEST_OF[2:]}}
        chosen = {key: c2f.uniform_steps(c2f.T - 1, K, p) for key, p in chosen.items()}
        for key, levels in (("even log SNR", torch.linspace(*sigma[[-1, 0]].log().tolist(), K).exp()),
                            ("Karras", torch.tensor(noise_levels(K, *sigma[[0, -1]].tolist())[:-1]))):
            chosen[key] = [int((sigma.log() - v.log()).abs().argmin()) for v in levels]
        found = {key: float((c2f.dpm_solver_pp_sample(*stage, taus, alpha_bar, c2f.ORDER[solver]) - x_ref
                             ).square().mean()) for key, taus in chosen.items()}
        note(S, "schedules", f"{name}, {K} steps", found, taus=chosen)


def transition():
    """Fig. 5(a): FD against the step of the transition, and the step that the PCA finds."""
    for t in (0, *c2f.uniform_steps(c2f.T - 1, c2f.REFERENCE_STEPS)[5:95:18]):
        record(S, "transition", command("c2f", "ddim", 10, f"--t-star {t}"), f"t* = {t or 'PCA'}",
               cells=lambda net, config, plan, device: {"t*": plan["t_star"]}, **QUICK)


def high():
    """Where C2F falls short of 100-step DDIM: the fine-tuned network or the 8x8 stage; an earlier t*. With the MACs of
    the headline, and with more."""
    for K, first in ((STEPS + 1, "inclusive"), (2 * STEPS, "best"), (2 * STEPS + 1, "best")):
        for fine_tuned, name in ((False, "base"), (True, "fine-tuned")):
            record(S, "high", arm=f"{name} alone, {K} steps", **plain(fine_tuned, "dpm2", K, first), **QUICK)
    record(S, "high", command("c2f+trd", "dpm2", STEPS), f"C2F+TRD, t* 525, 10 + {STEPS} steps", **QUICK)
    for t, low_steps, K in ((706, 10, 5), (525, 10, 10), (706, 10, 10), (525, 20, 10), (706, 20, 10), (850, 20, 10),
                            (950, 20, 10)):
        record(S, "high", f"{WEIGHTS} --method c2f --start best --t-star {t} --low-steps {low_steps} --steps {K}",
               f"C2F, t* {t}, {low_steps} + {K} steps", **QUICK)
    for K in (STEPS, 2 * STEPS):
        record(S, "high", command(**dict(AIM, steps=K)), f"C2F+TRD, t* 706, 10 + {K} steps", **QUICK)
        record(S, "high", command(**dict(AIM, steps=K)), f"its {K} high steps alone, from noise", **QUICK,
               change=lambda plan: dict(plan, low_taus=[]))


def label16():
    """The network of 16 -> 32 that is told the resolution by a label."""
    return f"--checkpoint {trained(S, 'c2f_trd-label', f'{FINETUNE} --low 16', TUNE)}"


def ranks():
    """Fig. 5(b, c): rank of the predicted images along 100 steps, and the error of eps_hat where it is known."""
    alpha_bar, hundred = linear_alpha_bar(c2f.T), c2f.uniform_steps(c2f.T - 1, c2f.REFERENCE_STEPS)
    for arm, argv in (("C2F, 8x8", f"{WEIGHTS} {COARSE}"), ("C2F, 16x16", f"{label16()} {COARSE}")):
        _, net, config, _, device = opened(S, argv)
        plan = dict(low_taus=hundred, high_taus=hundred)
        (eps_model, z), *_ = c2f.stages_of(net, config, plan, range(c2f.PCA_SEED, c2f.PCA_SEED + c2f.PCA), device)[0]
        t_star, found = c2f.transition_step(eps_model, z, hundred, alpha_bar)
        with torch.no_grad():                                  # at T - 1 xt is all noise
            error = eps_model(z, torch.full((len(z),), c2f.T - 1, device=device)) - z
        error = float(error.square().mean().sqrt())
        note(S, "ranks", arm, {"lowest at t": t_star, "error of eps_hat at t = 999": error}, ranks=found)


def full_resolution(plan):
    """The network's full resolution alone: 10 steps."""
    return dict(plan, low_taus=[], high_taus=c2f.uniform_steps(c2f.T - 1, 10))


def strategies():
    """Table I: how one network is told its resolution, or two networks; uniform steps of 2M. What fine-tuning costs."""
    runs = [("label, 16 -> 32", S, label16())]
    for name in ("xy", "2T", "2dms"):
        path = trained("c2f_trd_strategies", f"c2f_trd-{name}", f"{FINETUNE} --low 16 --strategy {name}", TUNE)
        runs.append((f"{name}, 16 -> 32", "c2f_trd_strategies", f"--checkpoint {path}"))
    runs.append(("label, 8 -> 32", S, WEIGHTS))
    for name, script, checkpoint in runs:
        record(script, "strategies", f"{checkpoint} {COARSE} --solver dpm2 --steps 10", f"{name}, 10 + 10",
               cells=facts("c2f", "dpm2", 10), **QUICK)
    runs = [run for run in runs if "2dms" not in run[0]]       # whose high model is the base
    for name, script, checkpoint in [*runs, ("base", S, BASE)]:
        record(script, "strategies", f"{checkpoint} {COARSE if name != 'base' else '--method base'}",
               f"{name}, full resolution alone", change=full_resolution, cells=facts("base", "dpm2", 10), **QUICK)


def classes():
    """Where it fails: FD class by class, 100-step DDIM and C2F+TRD."""
    for arm, argv in (("DDIM, 100 steps", command("base", "ddim", 100)),
                      (f"C2F+TRD, 2M, 10 + {STEPS} steps", command("c2f+trd", "dpm2", STEPS))):
        pool = []
        record(S, "all classes", argv, arm, pool=pool)
        network, reference = pool[0][:2]
        found = class_distances(network, reference, *(torch.cat(part) for part in list(zip(*pool))[2:]))
        note(S, "classes", arm, {c["caption"]: f"{'-' if c['fd'] is None else format(c['fd'], '.2f')} ({c['n']})"
                                 for c in found}, classes=found)


def naive_trd(eps_model, noise, taus, x_ref, alpha_bar):
    """TRD as one would write it first: every candidate is sampled anew, one after the other. The steps found."""
    def loss(steps):
        return float((c2f.dpm_solver_pp_sample(eps_model, noise, steps, alpha_bar, order=1) - x_ref).square().mean())

    taus, best, changed = list(taus), loss(taus), True
    while changed:
        changed = False
        for i in reversed(range(len(taus))):
            tried = {loss(s): s for s in ([*taus[:i], t, *taus[i + 1:]] for t in c2f.candidate_steps(taus, i))}
            if tried and min(tried) < best * (1 - 1e-6):
                best, taus, changed = min(tried), tried[min(tried)], True
    return taus


def speed():
    """Seconds side by side: the U-Net and diffusers' UNet2DModel of the same widths; TRD and naive TRD."""
    from diffusers import UNet2DModel
    _, net, config, _, device = opened(S, f"{BASE} --method base")
    widths, last, g = [config["ch"] * m for m in config["mult"]], len(config["mult"]) - 1, torch.manual_seed(0)
    theirs = UNet2DModel(
        sample_size=config["res"], in_channels=config["channels"], out_channels=config["channels"],
        block_out_channels=widths, layers_per_block=1, down_block_types=["DownBlock2D"] * last + ["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * last, downsample_padding=0, norm_eps=1e-6,
        norm_num_groups=config["ch"] // 4, attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1).to(device)
    x = torch.randn(64, config["channels"], config["res"], config["res"], generator=g).to(device)
    t = torch.arange(64, device=device)

    def train(net, loss):
        net.requires_grad_(True)
        return lambda: (net.zero_grad(), loss().square().mean().backward())

    def row(arm, ours, other, **cells):
        note(S, "speed", arm, {"ours, s": ours, "theirs, s": other, "times": other / ours, **cells})
    mine = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        row("U-Net", *timed(lambda: net(mine, t), lambda: theirs(x, t)), parameters=parameters(net))
    row("U-Net, training", *timed(train(net, lambda: net(mine, t)), train(theirs, lambda: theirs(x, t).sample)))
    net.requires_grad_(False)
    alpha_bar, begin, same = linear_alpha_bar(c2f.T), c2f.uniform_steps(c2f.T - 1, 5), []
    (stage,), _ = c2f.stages_of(net, config, dict(low_taus=[], high_taus=begin), range(c2f.CALIBRATION), device)
    x_ref = c2f.dpm_solver_pp_sample(*stage, c2f.uniform_steps(c2f.T - 1, c2f.REFERENCE_STEPS), alpha_bar, order=1)
    seconds = timed(lambda: same.append(c2f.trd_search([stage], [begin], x_ref, alpha_bar)[0][0]),
                    lambda: same.append(naive_trd(*stage, begin, x_ref, alpha_bar)), rounds=1)
    row("TRD, 5 steps of DDIM", *seconds, **{"same steps": "yes" if same[0] == same[1] else "no"})


def samples():
    """Fig. 7: rows.png: DDIM 100; C2F and C2F+TRD with 10 + 5 steps of DDIM, of 2M; C2F+TRD of the headline; plain 2M,
    its best 6 steps."""
    fast = [command(method, solver, STEPS) for solver in SOLVERS for method in ("c2f", "c2f+trd")]
    fast.append(command(**AIM))
    grid(S, "rows", [command("base", "ddim", 100), *fast, command("base", "dpm2", STEPS + 1, "--start best")])


FUNCTIONS = (headline, opinion, steps, high, schedules, starts, transition, ranks, strategies, classes, speed, samples)

if __name__ == "__main__":
    start(FUNCTIONS)
