"""Figures of results/postdiff from profile.json and results.jsonl; nothing is typed by hand. Needs matplotlib.

    python results/postdiff/figures.py      # fig7.png; fig4.png, fig5.png, fig8.png as far as measured
"""
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent


def draw_profile(found):
    """Fig. 7 (Appendix A)."""
    figure, (a, b) = plt.subplots(1, 2, figsize=(11, 4))
    names = [name for part in ("down", "mid", "up") for name in found["blocks"] if name.startswith(part)]
    image = a.imshow([found["blocks"][name] for name in names], aspect="auto", vmin=0)
    a.set_yticks(range(len(names)), names, fontsize=6)
    a.set(xlabel="step", title="(a) relative L1 distance of a block's outputs, step to step")
    figure.colorbar(image, ax=a)
    for kind, row in found["kinds"].items():
        b.plot(range(1, len(row) + 1), row, label=kind)
    b.set(xlabel="step", ylabel="root mean square", title="(b) distance by kind of layer", ylim=(0, None))
    b.legend()
    save(figure, "fig7")


def draw_trade_off(rows, experiment):
    """FD and caption score against relative MACs: one line for each number of steps, the mean of the seeds."""
    points = defaultdict(list)
    for r in rows:
        plan = {k: v for k, v in r["plan"].items() if k != "taus"}
        points[len(r["plan"]["taus"]), json.dumps(plan)].append(r)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, key in zip(axes, ("fd", "caption_score")):
        for steps in sorted({steps for steps, _ in points}):
            line = sorted((100 * p[0]["relative_macs"], mean(r[key] for r in p)) for (k, _), p in points.items()
                          if k == steps)
            axis.plot(*zip(*line), "o-", markersize=4, label=f"{steps} steps")
        axis.set(xlabel="MACs, % of 20 guided steps", ylabel=key if key != "fd" else
                 f"FD[{rows[0]['extractor']}]@{rows[0]['n']}")
    axes[0].legend(fontsize=7)
    save(figure, experiment)


def save(figure, name):
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.png", dpi=120)
    plt.close(figure)
    print(HERE / f"{name}.png")


if __name__ == "__main__":
    if (HERE / "profile.json").is_file():
        draw_profile(json.loads((HERE / "profile.json").read_text()))
    if (HERE / "results.jsonl").is_file():
        lines = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
        for experiment in ("fig4", "fig5", "fig8"):
            rows = [r for r in lines if r["experiment"] == experiment]
            if rows:
                draw_trade_off(rows, experiment)
