"""The tables and figures of results/lowdiff: Tables 4, 5, 8 to 12 of the paper, and what lies beside them.

    python results/lowdiff/experiments.py headline where       # these; then python results/report.py
"""
import itertools
import math
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import (folder_of, note, opened, parameters, record, start, timed, trained,  # noqa: E402
                         training_macs)
import lowdiff as low  # noqa: E402
from common import load_images, noise_for, save_grid, to_float  # noqa: E402
from evaluate import cost_of, measure_speed  # noqa: E402

S = "lowdiff"
EDM, WEIGHTS, TWO = (f"--checkpoint weights/lowdiff/{name}.pt" for name in ("edm", "weights", "two"))
OURS = f"{WEIGHTS} --steps 18 12 5 --truncate 18 13 --sigma-min 0 0 0.3"        # D23
NET = "--data fashion --batch 256 --ch 48 --mult 1 1 1"
THIRD = 9.34e13                        # forward MACs: a third of what trained the shipped networks
SMALL = "--data fashion --ch 32 --mult 1 1 1 --patch 2"        # tables of many trainings: EDM has 31
MACS = 3e12                                                    # MMACs then, and sees 95,000 images
QUICK = dict(n=1000, seeds=1)          # of tables with many rows


def run(name, options, script=S, macs=MACS, net=SMALL):
    """--checkpoint of a network, trained now if need be; of a small one, if not told otherwise, equal MACs for all."""
    return f"--checkpoint {trained(script, f'lowdiff-{name}', f'{net} {options}', macs)}"


def facts(net, config, plan, device=None):
    """Columns: what is run."""
    stops = [f"{stop:.3g}" for stop in low.stops_of(plan)[:-1]] if "sigma_max" in plan else []
    return {"NFE": " + ".join(map(str, plan["evaluations"])), "stops at sigma": ", ".join(stops),
            "parameters": parameters(net)}


def headline():
    """Results at a glance: EDM; EDM with the remedy, with no fewer MACs than LowDiff's; LowDiff with the remedy of D23;
    the last beside EDM by the clock."""
    module, net, config, plan, device = opened(S, EDM)
    speed = measure_speed(module, opened(S, OURS)[1:4], (net, config, plan), device)
    method = record(S, "headline", OURS, "method", cells=dict(what="LowDiff 8-16-32, last stage to sigma .3"),
                    **speed)[0]
    off = record(S, "headline", EDM, "off switch", cells=dict(what="EDM, 35 evaluations"))[0]
    K, tried = math.ceil(method["macs_per_image"] / off["macs_per_image"] * sum(plan["evaluations"])), {}
    N = K // 2 + 1                                             # the fewest steps with K evaluations or more
    for sigma_min in (0.002, 0.05, 0.1, 0.3):
        argv = f"{EDM} --steps {N} --sigma-min {sigma_min}"
        row, = record(S, "last", argv, f"EDM, {N} steps, 80 to {sigma_min:g}", seeds=1, cells=facts)
        tried[row["fd"]] = argv, f"EDM, {2 * N - 1} evaluations, sigma from 80 to {sigma_min:g}"
    argv, what = tried[min(tried)]
    record(S, "headline", argv, "best plain", cells=dict(what=what))


def paper():
    """The paper's own comparison: its plan beside EDM, and beside EDM with no fewer MACs."""
    for argv, arm in ((EDM, "EDM, 35 evaluations"), (f"{EDM} --steps 12", "EDM, 23 evaluations"),
                      (WEIGHTS, "LowDiff 8-16-32")):
        record(S, "paper", argv, arm, cells=facts)


def stage_seconds(net, config, device):
    """Seconds of an evaluation of the network, of 64 images, at each of its resolutions, low to high."""
    y, sigma = torch.zeros(64, dtype=torch.int64, device=device), torch.ones(64, device=device)

    def call(r):
        xt = torch.zeros(64, config["channels"], r, r, device=device)
        z = None if r == config["stages"][0] else xt
        return lambda: low.denoise(net, xt, sigma, z, None if z is None else sigma, y if config["labels"] else None)

    with torch.no_grad():
        return timed(*map(call, config["stages"]))


def table5():
    """Tables 1 and 5: images/s beside EDM, in turn; effective NFE by the clock; MACs of sampling and of training."""
    module, *edm, device = opened(S, EDM)
    train = training_macs(module, edm[1])
    for arm, argv in (("LowDiff 8-16-32", WEIGHTS), ("LowDiff 16-32", TWO)):
        _, net, config, plan, _ = opened(S, argv)
        speed, macs = measure_speed(module, (net, config, plan), edm, device), cost_of(module, config, plan)
        note(S, "table5", arm, {
            **facts(net, config, plan), "effective NFE": low.effective_nfe(
                plan["evaluations"], stage_seconds(net, config, device)),
            "images/s": speed["images_per_s"], "EDM's": speed["against_images_per_s"], "times": speed["speedup"],
            "range": "{:.2f} to {:.2f}".format(*speed["speedup_range"]),
            "by MACs": speed["against"]["macs_per_image"] / macs["macs_per_image"],
            "training MACs an image, of EDM's": training_macs(module, config) / train}, **speed)


def table8():
    """Tables 2, 6, 8: EDM, LowDiff of three and of two stages, CDM; with labels and without; equal training MACs."""
    for labels, words in ((1, "labels"), (0, "no labels")):
        for name, arm, script, stages in (
                ("edm", "EDM", S, "32"), ("three", "LowDiff 8-16-32", S, "8 16 32"),
                ("two", "LowDiff 16-32", S, "16 32"), ("cdm", "CDM 16-32", "lowdiff_cdm", "16 32")):
            options = f"--stages {stages}" + ("" if labels else " --labels 0")
            argv = run(name + ("" if labels else "-free"), options, script)
            record(script, "table8", argv, f"{arm}, {words}", n=1000, cells=facts)


def table4():
    """Table 4: latents, LightningDiT and LowDiff on the same ones; FD of the decoded images."""
    shared = "--autoencoder runs/lowdiff-autoencoder.pt"
    dit, latent = (run(name, f"{shared} --stages {stages}", "lowdiff_latent", net="--data fashion")
                   for name, stages in (("dit", "8"), ("latent", "4 8")))
    for arm, argv in (("LightningDiT, 100", dit), ("LightningDiT, 50", f"{dit} --steps 50"), ("LowDiff 4-8", latent)):
        record("lowdiff_latent", "table4", argv, arm, cells=facts)


def table9():
    """Tables 3, 7, 9: emoji at 64x64: EDM, LowDiff of four and of two stages, CDM."""
    net = "--data emoji --ch 32 --mult 1 1 1 1 --attention 3 --patch 2"
    for name, arm, script, stages in (
            ("emoji-edm", "EDM", S, "64"), ("emoji-four", "LowDiff 8-16-32-64", S, "8 16 32 64"),
            ("emoji-two", "LowDiff 32-64", S, "32 64"), ("emoji-cdm", "CDM 32-64", "lowdiff_cdm", "32 64")):
        record(script, "table9", run(name, f"--labels 0 --stages {stages}", script, net=net), arm, cells=facts)


def ranges(*pairs):
    """A change of a plan's noise range, of each stage."""
    return lambda plan: dict(plan, sigma_min=[a for a, _ in pairs], sigma_max=[b for _, b in pairs])


def table10():
    """Table 10: the noise range of the first stage and of the conditioned one."""
    for first, other in ((low.SIGMA_RANGE, low.COND_RANGE), (low.COND_RANGE, low.COND_RANGE),
                         (low.SIGMA_RANGE, low.SIGMA_RANGE), (low.SIGMA_RANGE, (0.002, 20.0)),
                         (low.SIGMA_RANGE, (0.002, 15.0))):
        record(S, "table10", TWO, f"first {first}, then {other}", change=ranges(first, other), **QUICK)


def table11():
    """Table 11: FD against the truncation point of the stage before the last."""
    for arm, argv, counts, options in (
            ("16-32", TWO, (13, 17, 19, 21, 25), "--steps 18 9 --truncate {}"),
            ("8-16-32", WEIGHTS, (7, 11, 13, 15, 19), "--steps 18 12 9 --truncate 18 {}")):
        for K in counts:
            record(S, "table11", f"{argv} {options.format(K)}", f"{arm}, K = {K}", cells=facts, **QUICK)


def table12():
    """Table 12: the steps of the first stage, at about the same truncation level."""
    for N, K in ((14, 15), (18, 19), (23, 25)):
        record(S, "table12", f"{TWO} --steps {N} 9 --truncate {K}", f"N = {N}, K = {K}", cells=facts, **QUICK)


def given_real(level):
    """A generate whose last stage is conditioned on real images, of the class, with noise of that level."""
    x, y, _ = load_images("fashion10k")

    def generate(net, config, plan, seeds, device):
        g, r, classes = torch.Generator().manual_seed(seeds[0]), plan["stages"][-1], low.classes_of(config, seeds)
        found = [(y == c).nonzero().flatten() for c in classes]
        small = low.downsample(to_float(x[torch.stack([i[torch.randint(len(i), (), generator=g)] for i in found])]))
        z = low.upsample(small + level * torch.randn(small.shape, generator=g)).to(device)

        def denoiser(xt, sigma):
            sigma, s = (torch.full((len(xt),), v, device=device) for v in (sigma, level))
            return low.denoise(net, xt, sigma, z, s, classes.to(device))

        noise = noise_for(seeds, (config["channels"], r, r)).to(device)
        return low.heun_sample(denoiser, noise, low.levels_of(plan)[-1])

    return generate


def where():
    """Which stage loses what: more steps of either; conditions of real images in place of the first stage's."""
    for arm, argv in (("LowDiff 16-32", TWO), ("twice the steps at 32x32", f"{TWO} --steps 18 18 --truncate 19"),
                      ("first stage to its end", f"{TWO} --steps 18 9 --truncate 35")):
        record(S, "where", argv, arm, cells=facts, **QUICK)
    for level in (round(low.stops_of(low.paper_plan([16, 32]))[0], 3), 0.14, 0.01):
        with mock.patch.object(low, "generate", given_real(level)):
            record(S, "where", TWO, f"real images with noise {level}",
                   change=lambda plan: dict(plan, condition=level), cells={"NFE": "17"}, **QUICK)


def last_range(sigma_min, sigma_max):
    """A change of a plan: the noise range of its last stage."""
    return lambda plan: dict(plan, sigma_min=[*plan["sigma_min"][:-1], sigma_min],
                             sigma_max=[*plan["sigma_max"][:-1], sigma_max])


def last():
    """Beside Table 10, the remedy: the noise range of LowDiff's last stage; of EDM, whose only stage it is."""
    for N, top, bottom in itertools.product((9, 5), (50.0, 32.0, 20.0), (0.01, 0.05, 0.1, 0.2, 0.3)):
        record(S, "last", f"{WEIGHTS} --steps 18 12 {N} --truncate 18 13", f"LowDiff, {N} steps, {top:g} to {bottom:g}",
               change=last_range(bottom, top), seeds=1, cells=facts)
    for N, bottom in itertools.product((12, 8), (0.002, 0.05, 0.1, 0.3)):
        record(S, "last", f"{EDM} --steps {N} --sigma-min {bottom}", f"EDM, {N} steps, 80 to {bottom:g}", seeds=1,
               cells=facts)


def quieter():
    """D3, a remedy: two stages trained for conditions of less noise, which the first stage then hands on; each with the
    paper's noise range of the last stage, and with a narrower one. A third of the training of the shipped networks."""
    quiet = run("two-quiet", "--stages 16 32 --s-mean -1.97", macs=THIRD, net=NET)
    for argv, level, K in ((TWO, "1.09", 19), (quiet, ".14", 25)):
        for bottom, top in ((0.01, 50.0), (0.2, 32.0)):
            record(S, "quieter", f"{argv} --steps 18 9 --truncate {K}", f"noise of {level}, then {top:g} to {bottom:g}",
                   change=last_range(bottom, top), cells=facts, **QUICK)


def opinion():
    """A second opinion on the headline: FD in the features of EfficientNet-Lite0, which were not trained here."""
    for argv, arm in ((EDM, "EDM, 35 evaluations"), (f"{EDM} --steps 12", "EDM, 23 evaluations"),
                      (f"{EDM} --steps 8 --sigma-min 0.1", "EDM, 15 evaluations, sigma from 80 to 0.1"),
                      (WEIGHTS, "LowDiff 8-16-32, the paper's plan"), (OURS, "LowDiff 8-16-32, D23")):
        record(S, "opinion", argv, arm, extractor="efficientnet-lite0")


def choices():
    """D3: the distribution of the condition's noise level in training: deviation, and EDM's own."""
    for name, key, options in (
            ("deviation .3 (default)", "two-3", ""), ("deviation .15", "two-15", "--s-std 0.15"),
            ("deviation .6", "two-6", "--s-std 0.6"), ("EDM's", "two-edm", "--s-mean -1.2 --s-std 1.2")):
        record(S, "choices", run(key, f"--stages 16 32 {options}"), name, n=1000)


def samples():
    """stages.png: x0_hat at the end of the 8x8, the 16x16 and the 32x32 stage, from the same seeds; below them EDM."""
    seen, cascade = [], low.cascade_sample

    def watched(stages):
        last = [None] * len(stages)                            # of each stage; the images handed on are still noisy

        def watch(i, denoiser):
            def call(*args):
                last[i] = denoiser(*args)
                return last[i]
            return call

        images = cascade([(watch(i, denoiser), *rest) for i, (denoiser, *rest) in enumerate(stages)])
        seen.extend(last)
        return images

    with mock.patch.object(low, "cascade_sample", watched):
        for argv in (WEIGHTS, EDM):
            module, net, config, plan, device = opened(S, argv)
            module.generate(net, config, plan, range(16), device)
    save_grid(folder_of(S) / "stages.png", torch.cat([
        F.interpolate(x, size=config["res"], mode="nearest").clamp(-1, 1).float() for x in seen]), columns=16)


FUNCTIONS = (headline, paper, last, quieter, opinion,
             table4, table5, table8, table9, table10, table11, table12, where, choices, samples)

if __name__ == "__main__":
    start(FUNCTIONS)
