"""The tables and figures of results/multistage: Tables 1, 3, 4, 7, Fig. 1(d) of the paper, and what lies beside them.

    python results/multistage/experiments.py headline fig1d    # these; then python results/report.py
"""
import copy
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from experiments import (grid, load_script, note, opened, parameters, record, start, trained,  # noqa: E402
                         training_macs)
import multistage as stages  # noqa: E402
from common import load_images, noise_for, start_device, to_float  # noqa: E402

S, SEPARATE = "multistage", "multistage_separate"
UNIFIED, THIRDS, FIRST, WEIGHTS = (f"--checkpoint weights/multistage/{name}.pt" for name in (
    "unified", "thirds", "first", "weights"))
NET = "--data fashion --batch 256"
SIXTY, HALF, NARROW_MACS = 1.73e14, 1.48e14, 1.32e14           # forward MACs: 60, 51, 46 % of the unified network's
ALIKE = "--edges 0.485 0.7062"         # the edges of the shipped network: Algorithm 1, of the 60,000 images
NARROW = f"{ALIKE} --widths 32 24 12"
SMALL = "--data fashion --ch 16 --patch 2"                     # tables of many trainings: 24 MMACs,
MACS = 4e12                                                    # 146,000 to 172,000 images, 12 to 30 minutes of a core
PLAIN, EQUAL, TAILORED = "--widths 16", "--widths 16 16 16", "--widths 24 16 8"        # D13: 1.5, 1, 1/2
QUICK = dict(n=1000)
FURTHER = (f"{ALIKE} --widths 40 24 12 --shares 0.8 0.1 0.1 --batch 64 --lr 3e-4 --save-every 100 "
           "--init weights/multistage/thirds.pt")
FURTHER_ARM = "three decoders, then most draws next to the data"
FIRST_ARM = "three decoders, narrower, most draws next to the data"
SHIPPED = f"{FIRST_ARM}, trained further"                      # first.pt, to 60 %
EDGES = [0.485, 0.7062]                                        # of the stages whose losses are compared
SHARES = (0.25, 0.5, 1)                # of MACS: Fig. 1(d)


def run(name, options, script=S, macs=MACS, net=SMALL):
    """--checkpoint of a network, trained now if need be; of a small one, if not told otherwise, equal MACs for all."""
    return f"--checkpoint {trained(script, f'multistage-{name}', f'{net} {options}', macs)}"


def three(name="three", script=S, options="", macs=MACS, widths=TAILORED):
    """--checkpoint of a small network of three stages, with the paper's clustering."""
    return run(name, f"{ALIKE} {widths} {options}", script, macs)


def facts(net, config, plan, device=None):
    """Columns: what is run."""
    return {"widths": ", ".join(map(str, config["widths"])), "edges": ", ".join(f"{t:.3f}" for t in config["edges"]),
            "evaluations in each stage": " + ".join(map(str, plan["by_stage"])), "parameters": parameters(net)}


def spent(argv):
    """Forward MACs of a network's training, with those of the network that it went on from (--init)."""
    module, _, config, *_ = opened(S, argv)
    before = spent(f"--checkpoint {config['init']}") if config["init"] else 0
    return before + training_macs(module, config) * config["step"] * config["batch"]


def headline():
    """Results at a glance: one decoder, three decoders; the forward MACs that trained them."""
    for argv, arm, what in ((UNIFIED, "off switch", "one decoder"), (WEIGHTS, "method", "three decoders")):
        record(S, "headline", argv, arm, cells=dict(what=what), training_macs=spent(argv))


def opinion():
    """A second opinion on the headline: FD in the features of EfficientNet-Lite0, which were not trained here."""
    for argv, arm in ((UNIFIED, "one decoder"), (WEIGHTS, "three decoders")):
        record(S, "opinion", argv, arm, extractor="efficientnet-lite0")


def share():
    """How many MACs of training three decoders need for one decoder's FD: widths, edges; each a training to its end."""
    whole = None
    for arm, argv in (
            ("one decoder", UNIFIED),
            ("one decoder, three fifths of the training", run("sixty-one", "--widths 32", macs=SIXTY, net=NET)),
            ("three decoders", THIRDS), ("three decoders, wider", run("60", ALIKE, macs=SIXTY, net=NET)),
            ("three decoders, narrower", run("narrow", NARROW, macs=NARROW_MACS, net=NET)),
            ("three decoders, edges of equal SNR",
             run("snr-half", "--edges 0.348 0.709 --widths 40 24 12", macs=HALF, net=NET)),
            (FURTHER_ARM, towards()), (FIRST_ARM, FIRST), (SHIPPED, WEIGHTS)):
        macs = spent(argv)
        whole = whole or macs                                  # of the first arm
        words = {"training MACs": f"{100 * macs / whole:.0f} %"}
        record(S, "share", argv, arm, cells=lambda *plan: {**facts(*plan), **words}, training_macs=macs)


def towards():
    """--checkpoint of three decoders trained further, to 60 % of one decoder's MACs, most draws next to the data."""
    return run("towards", FURTHER, macs=SIXTY - spent(THIRDS), net=NET)


def exchange():
    """Which stage loses what: FD of three decoders with one decoder's network in one of the stages, or in two."""
    model_of, opening = stages.model_of, {"one": opened(S, UNIFIED), "three": opened(S, THIRDS)}

    def models(net, config):
        device = next(net.parameters()).device                 # meta, where MACs are counted
        found = {name: model_of(copy.deepcopy(opening[name][1]).to(device), opening[name][2]) for name in opening}
        return lambda xt, t: found[networks[stages.stage_of(t, config["edges"])]](xt, t)

    for arm, networks in (("three decoders", ("three", "three", "three")),
                          ("one decoder next to the data", ("one", "three", "three")),
                          ("one decoder in the other two", ("three", "one", "one")),
                          ("one decoder", ("one", "one", "one"))):
        whole = len(set(networks)) == 1                        # of one network: measured already
        with mock.patch.object(stages, "model_of", model_of if whole else models):
            record(S, "exchange", UNIFIED if set(networks) == {"one"} else THIRDS, arm, seeds=1,
                   change=None if whole else lambda plan: dict(plan, networks=networks))


def fig1d():
    """Fig. 1(d): FD against training MACs; every point is a training of its own, to its end."""
    for share in SHARES:
        macs, words = share * MACS, "" if share == 1 else f"-{100 * share:.0f}"
        for arm, script, argv in (
                ("unified", S, run(f"unified{words}", PLAIN, macs=macs)),
                ("multistage", S, three(f"three{words}", macs=macs)),
                ("separate", SEPARATE, three(f"separate{words}", SEPARATE, macs=macs, widths=EQUAL))):
            record(script, "fig1d", argv, f"{arm}, {100 * share:.0f} %", cells={"training MACs": f"{macs:.2g}"},
                   curve=arm, training_macs=macs, **QUICK)


def table3():
    """Table 3: separate networks, early stopping (ES), tailored widths (TP), multistage."""
    stop = "--early-stopping 1 --save-every 100"
    for arm, script, argv in (
            ("unified", S, run("unified", PLAIN)), ("separate", SEPARATE, three("separate", SEPARATE, widths=EQUAL)),
            ("separate + ES", SEPARATE, three("separate-es", SEPARATE, stop, widths=EQUAL)),
            ("separate + TP", SEPARATE, three("separate-tp", SEPARATE)),
            ("separate + ES + TP", SEPARATE, three("separate-es-tp", SEPARATE, stop)), ("multistage", S, three())):
        record(script, "table3", argv, arm, cells=facts, **QUICK)


def of_one_stage(config, x, y, step, draw=stages.draw_batch):
    """draw_batch as the official code has it: each batch of one stage, any with probability 1 / n."""
    n = len(config["widths"])
    shares = torch.eye(n)[torch.randint(n, ())].tolist()
    return draw(dict(config, shares=shares), x, y, step)


def batches():
    """Beside Table 3: batches of one stage, as the paper's code has them, or mixed; equal widths."""
    with mock.patch.object(stages, "draw_batch", of_one_stage):
        one_stage = three("by-stage")
    for arm, argv in (("unified", run("unified", PLAIN)), ("one stage a batch", one_stage),
                      ("mixed batches", three()), ("mixed batches, equal widths", three("equal", widths=EQUAL))):
        record(S, "batches", argv, arm, cells=facts, **QUICK)


def images(data="fashion"):
    """A data set as the clustering takes it."""
    return to_float(load_images(data)[0]).to(start_device()[0])


def edges_of(method, n, x):
    """Edges of n stages by one of the clusterings."""
    if method.startswith("optimal"):
        return stages.cluster_timesteps(method, n, x)[0]
    other, affinity = load_script("multistage_clusterings"), None
    if method == "gradient":
        _, net, config, *_ = opened(S, UNIFIED)
        net.requires_grad_(True)
        affinity = other.gradient_affinity(net, lambda *batch: stages.training_loss(net, config, *batch), x)
    return other.cluster(method, n, x, affinity=affinity)[0]


def table4():
    """Table 4: stages by the optimal denoiser, by time, by signal-to-noise ratio, by gradients."""
    x = images()
    record(S, "table4", three(), "optimal", cells=facts, **QUICK)
    for method in ("time", "snr", "gradient"):
        edges = " ".join(map(str, edges_of(method, 3, x)))
        record(S, "table4", run(method, f"--edges {edges} {TAILORED}"), method, cells=facts, **QUICK)


def table7():
    """Table 7: numbers of stages, edges by Algorithm 2, widths by Eq. 23; of one and three the networks of Table 3."""
    x, widths = images(), tuple(map(int, TAILORED.split()[1:]))
    for n in range(1, 6):
        argv = run("unified", PLAIN) if n == 1 else three() if n == 3 else ""
        if n in (2, 4, 5):
            edges = edges_of("optimal2", n, x)
            found = load_script("multistage_clusterings").tailored_widths(edges, widths)
            argv = run(f"stages-{n}", f"--edges {' '.join(map(str, edges))} --widths {' '.join(map(str, found))}")
        record(S, "table7", argv, f"{n} stage{'s' * (n > 1)}", cells=facts, **QUICK)


def table1():
    """Table 1: DPM-Solver, EDM, latents (LDM): one decoder and three."""
    latent = "--autoencoder runs/multistage-autoencoder.pt"
    record(S, "table1", run("unified", PLAIN), "DPM-Solver-3, unified", cells=facts, **QUICK)
    record(S, "table1", three(), "DPM-Solver-3, multistage", cells=facts, **QUICK)
    for arm, script, name, options in (
            ("EDM, unified", "multistage_edm", "edm", PLAIN),
            ("EDM, multistage", "multistage_edm", "edm-three", TAILORED),
            ("latents, unified", "multistage_latent", "latent", f"{latent} {PLAIN}"),
            ("latents, multistage", "multistage_latent", "latent-three", f"{latent} {TAILORED}")):
        record(script, "table1", run(name, options, script), arm, cells=facts, **QUICK)


def clusterings():
    """Edges of the clusterings that need no network, of 10,000 images in [-1, 1], and in [0, 1] as in the paper's
    code."""
    x = images("fashion10k")
    sets = {"images in [-1, 1]": x, "images in [0, 1]": (x + 1) / 2 - 1e-6,    # 0 to 1 itself is refused
            "the 60,000 training images in [-1, 1]": images()}
    chosen = [(method, 3) for method in ("optimal", "time", "snr")]            # by gradients: Table 4
    for method, n in [*chosen, *(("optimal2", n) for n in range(2, 6))]:
        for which in list(sets)[:{"optimal": 3, "optimal2": 2}.get(method, 1)]:
            try:
                edges = edges_of(method, n, sets[which])
                cells = {"edges t": ", ".join(f"{t:.3f}" for t in edges),
                         "sigma": ", ".join(f"{float(stages.sigma_of(t)):.2f}" for t in edges)}
            except ValueError as error:                                        # a stage too short (D20)
                cells = {"edges t": f"refused: {error}", "sigma": ""}
            note(S, "clusterings", f"{method}, {n} stages, {which}", cells)


@torch.no_grad()
def stage_losses():
    """Where the error is: the loss of networks in each of three stages; same images, noises and levels for all."""
    x0, where = images("fashion10k")[:1000], ("next to the data", "in the middle", "next to the noise")
    n = len(x0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))      # any level for any image
    for arm, argv in (
            ("one decoder", UNIFIED),
            ("one decoder, three fifths", run("sixty-one", "--widths 32", macs=SIXTY, net=NET)),
            ("three decoders", THIRDS), ("three decoders, wider", run("60", ALIKE, macs=SIXTY, net=NET)),
            (FURTHER_ARM, towards()), (FIRST_ARM, FIRST), (SHIPPED, WEIGHTS),
            ("small, one decoder", run("unified", PLAIN)), ("small, three decoders", three())):
        _, net, config, _, device = opened(S, argv)
        eps, found = noise_for(range(n), x0.shape[1:]), {}
        for name, first, last in zip(where, (stages.T_TRAIN, *EDGES), (*EDGES, 1.0)):
            t = first + (last - first) * (order + 0.5) / n
            parts = [float(stages.training_loss(net, config, *(v.to(device) for v in part))) * len(part[0])
                     for part in zip(x0.split(250), t.split(250), eps.split(250))]
            found[name] = sum(parts) / n
        note(S, "stage_losses", arm, {"widths": ", ".join(map(str, config["widths"])), **found},
             images_seen=config["step"] * config["batch"])


def loop_denoiser(xt, scale, sigma, data, batch=1024):
    """eps* of each sample by two passes over the data, as the official code goes: largest exponent, weighted sum."""
    out = []
    for x, s, g in zip(xt, scale.tolist(), sigma.tolist()):
        exponents = [-(x - s * y).square().flatten(1).sum(1).double() / (2 * s * s * g * g) for y in data.split(batch)]
        largest, total, weighted = max(float(e.max()) for e in exponents), 0.0, 0.0
        for y in data.split(batch):
            w = (-(x - s * y).square().flatten(1).sum(1).double() / (2 * s * s * g * g) - largest).exp()
            total, weighted = total + float(w.sum()), weighted + (w.view(-1, 1, 1, 1) * y).sum(0)
        out.append(((x - s * weighted / total) / (s * g)).float())
    return torch.stack(out)


def cluster_speed(K=500, N=2000):
    """The optimal denoiser, batched, against a loop over samples and batches of the data, CPU seconds."""
    def seconds(call):
        begun = time.process_time()
        return call(), time.process_time() - begun

    data, g = F.avg_pool2d(to_float(load_images("emoji")[0][:N]), 2), torch.Generator().manual_seed(0)
    sigma = stages.sigma_of(1e-3 + (1 - 1e-3) * torch.rand(K, generator=g, dtype=torch.float64))
    scale, x0 = stages.scale_of(sigma), data[torch.randint(0, len(data), (K,), generator=g)]
    xt = x0 + sigma.view(-1, 1, 1, 1) * torch.randn(x0.shape, generator=g)
    xt = (scale.view(-1, 1, 1, 1) * xt).float()
    (fast, ours), (slow, loop) = (seconds(lambda f=f: f(xt, scale, sigma, data)) for f in (
        stages.optimal_denoiser, loop_denoiser))
    note(S, "cluster_speed", f"{K} samples, {len(data)} images of 3072 numbers", {
        "loop, s": loop, "batched, s": ours, "times": loop / ours,
        "largest difference": float((fast - slow).abs().max())})


def samples():
    """rows.png: 20 evaluations from the same seeds: one decoder, three decoders."""
    grid(S, "rows", [UNIFIED, WEIGHTS])


FUNCTIONS = (headline, opinion, share, exchange, fig1d, table1, table3, table4, table7, batches, clusterings,
             stage_losses, cluster_speed, samples)

if __name__ == "__main__":
    start(FUNCTIONS)
