"""The tables and figures of results/postdiff: Tables 1, 2, 5, 7, Figs. 4, 5, 7 to 9 of the paper, and more beside them.

    python results/postdiff/experiments.py headline fig4       # these; then python results/report.py
"""
import itertools
import math
import sys
from pathlib import Path
from statistics import mean

import torch

RESULTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(RESULTS), str(RESULTS.parent / "data")]
from experiments import (ABLATION, folder_of, grid, load_script, note, opened, record, start, timed,  # noqa: E402
                         trained)
import postdiff  # noqa: E402
from common import caption_score, save_grid  # noqa: E402
from make_colours import UNSEEN  # noqa: E402

S = "postdiff"
WEIGHTS = "--checkpoint weights/postdiff/weights.pt"
NET = "--data twemoji --batch 256"
LCM_STEPS, TUNED_STEPS = 2000, 2000    # of the distillation; of Appendix F
QUICK = dict(n=500, seeds=1)           # of tables with many rows
PAIRS = sorted(UNSEEN)                 # in no caption, never made
PAPER = {"SD": (768, 2.57), "SDXL": (1024, 2.09), "PixArt": (1024, 1.49)}      # Table 2: side, times faster


def facts(net, config, plan, device=None):
    """Columns: what is run."""
    K, high = len(plan["taus"]), config["res"]
    return {"solver": plan["solver"], "steps, low + full": f"{plan['n_low']} + {K - plan['n_low']}",
            "low resolution": plan["low"] if plan["n_low"] else high, "full pass every": plan["k"],
            "guided steps": plan["n_guided"], "cache of": plan["choice"] if plan["n_guided"] < K else "-"}


def row(experiment, options, arm, argv=WEIGHTS, script=S, **fields):
    """A line of a table."""
    return record(script, experiment, f"{argv} {options}", arm, cells=facts, **fields)


def headline():
    """Results at a glance: 20 guided steps, the best plain sampler at no fewer MACs than the method's, PostDiff."""
    def line(options, arm, what):
        return record(S, "headline", f"{WEIGHTS} {options}", arm, cells=dict(what=what))[0]

    method = line("--solver dpm2", "method", "PostDiff, 20 steps of 2M: s .5, k 2, m .75")
    off = line("--method base", "off switch", "DDIM, 20 guided steps")
    K, tried = math.ceil(20 * method["macs_per_image"] / off["macs_per_image"] - 1e-9), {}
    for solver in postdiff.ORDER:
        options = f"--method base --solver {solver} --steps {K}"
        tried[row("plain", options, f"{solver}, {K} steps", seeds=1)[0]["fd"]] = options, f"{solver}, {K} guided steps"
    line(tried[min(tried)][0], "best plain", tried[min(tried)][1])


def opinion():
    """A second opinion on the headline: FD in the features of EfficientNet-Lite0, which were not trained here."""
    for options, arm in (("--method base", "DDIM, 20 guided steps"), ("", "PostDiff, 20 steps: s .5, k 2, m .75"),
                         ("--solver dpm2", "PostDiff, 20 steps of 2M: s .5, k 2, m .75"),
                         ("--method base --steps 7", "ddim, 7 guided steps"),
                         ("--method base --solver dpm2 --steps 7", "dpm2, 7 guided steps")):
        row("opinion", options, arm, extractor="efficientnet-lite0")


def table1():
    """Table 1: which half of the cross-attention is cached, DeepCache alone, guidance dropped from the start."""
    row("table1", "--method base", "plain", **QUICK)
    row("table1", "--method cache --k 1 --m 0 --choice none", "no guidance", **QUICK)
    row("table1", "--method cache --m 1", "DeepCache alone", **QUICK)
    for m, choice in itertools.product((0.25, 0.75), ("ave", "cond", "uncond", "cfg")):
        row("table1", f"--method cache --m {m} --choice {choice}", f"hybrid cache, {choice}, m = {m}", **QUICK)


def table2():
    """Table 2's kinds in small: the U-Net, an LCM distilled from it, a DiT; plain, mixed resolution, PostDiff."""
    lcm = trained("postdiff_lcm", "postdiff-lcm", f"{NET} --init weights/postdiff/weights.pt --iters {LCM_STEPS}")
    dit = trained("postdiff_dit", "postdiff-dit", NET, ABLATION)
    for kind, script, argv in (("U-Net", S, WEIGHTS), ("LCM", "postdiff_lcm", f"--checkpoint {lcm}"),
                               ("DiT", "postdiff_dit", f"--checkpoint {dit}")):
        for method in ("base", "mixed", "cache", "postdiff"):
            row("table2", f"--method {method}", f"{kind}, {method}", argv, script)
    row("table2", "--method base --steps 4", "LCM, base, 4 steps", f"--checkpoint {lcm}", "postdiff_lcm")
    row("table2", "--method mixed --s 0.25", "LCM, mixed, s .25", f"--checkpoint {lcm}", "postdiff_lcm")


def table5():
    """Table 5: how often a full pass (k), how long guidance (m)."""
    row("table5", "--method base", "plain, 20 steps", **QUICK)
    for name, value in (*(("k", k) for k in range(1, 6)), *(("m", m) for m in (0.45, 0.6, 0.9, 1))):
        row("table5", f"--{name} {value}", f"PostDiff, {name} = {value}", **QUICK)


def remedies():
    """FD at a third of the MACs: guidance that ends earlier, more steps, or fewer without shallow passes (k = 1)."""
    for options in ("--method base", "", "--m 0.6", "--steps 23", "--k 1 --steps 15", "--k 1 --steps 16 --beta 0.375",
                    "--k 1 --steps 14 --s 0.4", "--k 1 --steps 16 --m 0.6"):
        row("remedies", options, options.replace("--", "") or "PostDiff: steps 20, s 0.5, k 2, m 0.75", **QUICK)


def aim():
    """The remedies that keep FD, by as many samples as the headline has."""
    for options in ("--method base", "", "--method mixed --steps 8", "--m 0.6", "--k 1 --steps 15", "--solver dpm2"):
        row("aim", options, options.replace("--", "") or "PostDiff: steps 20, s 0.5, k 2, m 0.75")


def fig4():
    """Figs. 4 and 5: fewer steps or cheaper steps: plain, mixed, PostDiff from 4 to 20 steps."""
    for method, K in itertools.product(("base", "mixed", "cache", "postdiff"), (4, 8, 12, 20)):
        row("fig4", f"--method {method} --steps {K}", f"{method}, {K} steps", family=method, **QUICK)
    for method, K in itertools.product(("mixed", "postdiff"), (12, 20)):
        row("fig4", f"--method {method} --steps {K} --s 0.25", f"{method}, {K} steps, s .25", family=f"{method}, s .25",
            **QUICK)


def fig8():
    """Fig. 8: the low resolution (beta), mixed resolution, half of the steps."""
    for beta in (0.375, 0.5, 0.625, 0.75, 0.875):
        row("fig8", f"--method mixed --steps 12 --beta {beta}", f"12 steps, beta = {beta}", **QUICK)
    row("fig8", "--method base --steps 12", "12 steps, full resolution", **QUICK)


def fig9():
    """Fig. 9: do 250 or 500 images rank settings as 1,000 do? Caption scores."""
    for K, s in itertools.product((4, 6, 8), (0, 0.5)):
        pool, arm = [], f"{K} steps, s = {s}"
        row("scores", f"--method mixed --steps {K} --s {s}", arm, n=1000, seeds=1, pool=pool)
        network, _, _, second = pool[0]
        captions, N = postdiff.captions_of(opened(S, WEIGHTS)[2], range(len(second))), len(second)
        parts = {n: caption_score(network, second[:n], captions[:n]) for n in (N // 4, N // 2, N)}
        note(S, "fig9", arm, {f"score, {n} images": score for n, score in parts.items()}, scores=list(parts.values()))


def calibration():
    """Sec. 2.4, App. D: what the paper's calibration chooses within 40 % of the MACs of 20 guided steps."""
    for method in ("base", "mixed", "cache", "postdiff"):
        module, net, config, _, device = opened(S, f"{WEIGHTS} --method {method}")
        module.search(net, config, device)
        row("calibration", f"--method {method} --steps 0", method, **QUICK)


def solver():
    """DPM-Solver++ 2M in place of DDIM."""
    for options, K in itertools.product(("--method base", "--method mixed --s 0.25", "--method postdiff"), (8, 20)):
        row("solver", f"{options} --steps {K} --solver dpm2", f"{options.split()[1]}, {K} steps", **QUICK)


def guidance():
    """What the weight w does to plain sampling."""
    for w in (1, 2, 3, 5):
        row("guidance", f"--method base --w {w}", f"w = {w}", **QUICK)


def table7():
    """Appendix F, Table 7: fine-tuned on the fixed resolution schedule, and as long without it, as a control."""
    tuned = [("before", WEIGHTS)]
    for name, share in (("schedule", 0.5), ("control", 0)):
        options = f"{NET} --lr 3e-4 --init weights/postdiff/weights.pt --low-share {share} --iters {TUNED_STEPS}"
        path = trained(S, f"postdiff-{name}", options)
        tuned.append((name, f"--checkpoint {path}"))
    for (name, argv), method in itertools.product(tuned, ("base", "mixed", "postdiff")):
        row("table7", f"--method {method}", f"{method}, {name}", argv)


def profile(net, run):
    """Appendix A: distances of outputs in consecutive steps while run() samples: {"blocks": {name: [relative L1, ...]},
    "kinds": {kind of layer: [root mean square, ...]}} (D11)."""
    stages = [(f"{part} {i}", stage[-1]) for part, found in (("down", net.encoder.down), ("up", net.decoder.up))
              for i, stage in enumerate(found)] + [("mid", net.encoder.mid[-1])]
    kinds = {postdiff.ResBlock: "convolution", postdiff.Attention: "self-attention",
             postdiff.CrossAttention: "cross-attention"}
    layers = [(kinds[type(m)], layer) for m in net.modules() if type(m) in kinds for layer in (
        (m.conv1, m.conv2) if type(m) is postdiff.ResBlock else (m.out,))]
    last, rows = {}, {}

    def watch(key):
        def hook(module, inputs, output):
            if key in last:
                gap, before = output - last[key], last[key].abs().sum()
                rows.setdefault(key, []).append((float(gap.abs().sum() / before), float(gap.square().mean().sqrt())))
            last[key] = output
        return hook

    named = [(("block", name), m) for name, m in stages] + [((kind, i), m) for i, (kind, m) in enumerate(layers)]
    handles = [m.register_forward_hook(watch(key)) for key, m in named]
    run()
    for handle in handles:
        handle.remove()
    return dict(blocks={key[1]: [a for a, _ in found] for key, found in rows.items() if key[0] == "block"},
                kinds={kind: [mean(b for _, b in step) for step in zip(*(
                    found for key, found in rows.items() if key[0] == kind))] for kind in kinds.values()})


def fig7(n=64):
    """Fig. 7, Appendix A: what changes from step to step, by block and by kind of layer."""
    module, net, config, plan, device = opened(S, f"{WEIGHTS} --method base")
    found = profile(net, lambda: module.generate(net, config, plan, range(n), device))
    note(S, "fig7", "20 guided steps", {kind: f"{mean(v):.4f}" for kind, v in found["kinds"].items()}, **found)


def latency(sides=None):
    """Table 2's latencies: random-weight pipelines of diffusers at the paper's sizes; wants a GPU with 16 GB."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from pipelines import pipeline
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    for kind, (side, paper) in (sides or PAPER).items():
        torch.manual_seed(0)
        pipe, call = pipeline(kind, device, dtype)
        call.update(height=side, width=side, num_inference_steps=20, output_type="pt")
        plain, = timed(lambda: pipe(**call, generator=torch.Generator().manual_seed(0)))
        handle = load_script("postdiff_diffusers").apply_postdiff(pipe)
        fast, = timed(lambda: pipe(**call, generator=torch.Generator().manual_seed(0)))
        handle.remove()
        note(S, "latency", f"{kind}, {side}x{side}, 20 steps", {
            "plain, s": plain, "PostDiff, s": fast, "times": plain / fast, "paper's": paper})


def samples():
    """rows.png: same prompts and seeds: 20 guided steps; 8; mixed resolution, 20; PostDiff, 20 steps. pairs.png: things
    in colours of which no training caption speaks, by PostDiff."""
    options = "--method base", "--method base --steps 8", "--method mixed", "--method postdiff"
    grid(S, "rows", [f"{WEIGHTS} {more}" for more in options])
    prompts = " ".join(f"'{prompt}'" for prompt in PAIRS)
    module, net, config, plan, device = opened(S, f"{WEIGHTS} --prompt {prompts}")
    images = module.sample(net, config, plan, range(len(PAIRS)), device)
    save_grid(folder_of(S) / "pairs.png", images, columns=10, captions=PAIRS)


FUNCTIONS = (headline, opinion, table1, table2, table5, table7, remedies, aim, fig4, fig7, fig8, fig9, calibration,
             solver, guidance, latency, samples)

if __name__ == "__main__":
    start(FUNCTIONS)
