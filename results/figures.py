"""The figures of results/*/README.md, drawn by results/report.py from the same lines as its tables. A figure is a
function of the lines and of two axes, which draws what there is and says whether there was anything.
"""
import json
from statistics import stdev

import matplotlib

from report import ROOT, average, fd_label, groups, load

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def lines_of(ax, curves, x, y="fd", **labels):
    """A line with deviations for each curve {name: groups}; x(row) -> abscissa."""
    for name, found in curves.items():
        found = sorted(found, key=lambda g: x(g[-1]))
        spread = [stdev(r[y] for r in g) if len(g) > 1 else 0 for g in found]
        ax.errorbar([x(g[-1]) for g in found], [average(g, y) for g in found], spread, fmt="o-", capsize=2, label=name)
    ax.set(**labels)
    if curves:
        ax.legend(fontsize=7)
    return bool(curves)


def sort(found, key):
    """{key(row): groups}."""
    curves = {}
    for g in found:
        curves.setdefault(key(g[-1]), []).append(g)
    return curves


def mmacs(row):
    return row["macs_per_image"] / 1e6


def doubling(axis, least, n):
    """Ticks of a logarithmic axis: n, each twice the one before."""
    ticks = [least * 2 ** i for i in range(n)]
    axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_ticks([], minor=True)


def fig_steps(rows, axes):
    found, drawn = groups(rows, "steps"), False
    for ax, solver in zip(axes, ("DDIM", "2M")):
        some = [g for g in found if g[-1]["cells"]["solver"] == solver]
        drawn |= lines_of(ax, sort(some, lambda r: r["arm"].split(",")[0]), mmacs, title=solver, xscale="log",
                          yscale="log", xlim=(1500, 45000), ylim=(0.2, 4), xlabel="MMACs an image",
                          ylabel=fd_label(found))
        doubling(ax.xaxis, 2000, 5)
        doubling(ax.yaxis, 0.2, 5)
    return drawn


def fig_transition(rows, axes):
    found, ranks = groups(rows, "transition"), groups(rows, "ranks")
    for r in (g[-1] for g in ranks):
        axes[0].plot(*zip(*r["ranks"]), label=f"{r['arm']}: lowest at t = {r['cells']['lowest at t']}")
        axes[0].legend(fontsize=7)
    axes[0].set(xlabel="t", ylabel="cut index (99 % of the variance)", yscale="log", title="rank of x0_hat")
    curves = {"C2F, DDIM, 10 + 10 steps": found} if found else {}
    return lines_of(axes[1], curves, lambda r: r["cells"]["t*"], xlabel="t*", ylabel=fd_label(found)) or bool(ranks)


def fig_truncation(rows, axes):
    found = groups(rows, "table11")
    curves = sort(found, lambda r: r["arm"].split(",")[0])
    lines_of(axes[0], curves, lambda r: int(r["arm"].split("= ")[1]), xlabel="evaluations K", ylabel=fd_label(found))
    drawn = lines_of(axes[1], curves, lambda r: float(r["cells"]["stops at sigma"].split(", ")[-1]), xscale="log",
                     xlabel="sigma where the stage before the last stops", ylabel=fd_label(found))
    doubling(axes[1].xaxis, 0.125, 7)
    return drawn


def fig_fig1d(rows, axes):
    found = groups(rows, "fig1d")
    drawn = lines_of(axes[0], sort(found, lambda r: r["curve"]), lambda r: r["training_macs"] / 1e12, yscale="log",
                     xlabel="forward MACs of the training, 1e12", ylabel=fd_label(found))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    return drawn


def fig_fig4(rows, axes):
    found, drawn = groups(rows, "fig4"), False
    for ax, key in zip(axes, ("fd", "caption_score")):
        drawn |= lines_of(ax, sort(found, lambda r: r["family"]), mmacs, key, xlabel="MMACs an image",
                          ylabel=fd_label(found) if key == "fd" else "caption score")
    return drawn


def fig_fig7(rows, axes):
    found = groups(rows, "fig7")
    for r in (g[-1] for g in found):
        names = [name for part in ("down", "mid", "up") for name in r["blocks"] if name.startswith(part)]
        image = axes[0].imshow([r["blocks"][name] for name in names], aspect="auto", vmin=0)
        axes[0].figure.colorbar(image, ax=axes[0])
        axes[0].set_yticks(range(len(names)), names, fontsize=6)
        axes[0].set(xlabel="step", title="relative L1 distance of a block's outputs")
        for kind, values in r["kinds"].items():
            axes[1].plot(range(1, len(values) + 1), values, label=kind)
        axes[1].set(xlabel="step", title="root mean square distance, by kind of layer")
        axes[1].legend(fontsize=7)
    return bool(found)


def fig_similarity(rows, axes):
    path = ROOT / "results" / "multistage" / "plan_optimal_3.json"
    plan = json.loads(path.read_text()) if path.is_file() else {}
    for i, name in ((1, "S0: agrees with eps"), (2, "S1: agrees with the denoiser of pure noise")) if plan else ():
        axes[0].plot([c[0] for c in plan["curves"]], [c[i] for c in plan["curves"]], label=name)
    for edge in plan.get("edges", ()):
        axes[0].axvline(edge, color="0.5", ls=":")
    axes[0].set(xlabel="t", ylabel="share of the pixels")
    return bool(plan) and bool(axes[0].legend(fontsize=7))


def fig_classes(rows, axes):
    found = groups(rows, "classes")
    for i, r in enumerate(g[-1] for g in found):
        axes[0].bar([k + 0.4 * i for k in range(len(r["classes"]))], [c["fd"] or 0 for c in r["classes"]], 0.4,
                    label=r["arm"])
        axes[0].set_xticks(range(len(r["classes"])), [c["caption"] for c in r["classes"]], rotation=40, ha="right")
        axes[0].legend(fontsize=7)
    axes[0].set_ylabel("FD of the class")
    return bool(found)


COLORS = {"DDIM": "0.6", "2M": "black", "TRD": "tab:blue", "C2F": "tab:red", "PostDiff": "tab:brown",       # by idea
          "DPM": "tab:olive", "EDM": "tab:orange", "LowDiff": "tab:green", "Multi": "tab:purple"}


def fig_shootout(rows, axes):
    """Left what runs on c2f_trd's networks, right the others; the same axes; dotted: 100-step DDIM."""
    found, used = groups(rows, "shootout"), {}
    curves = sort(found, lambda r: r["method"])
    first = [g for g in found if g[-1]["arm"] == "DDIM, 100 steps"]
    titles = "c2f_trd's networks: samplers, C2F-TRD, PostDiff", "other networks: DPM-Solver-3, EDM, LowDiff, Multistage"
    for ax, words, title in zip(axes, (list(COLORS)[:5], list(COLORS)[5:]), titles):
        for name, g in sorted(curves.items(), key=lambda c: -min(map(average, c[1]))):
            idea = next((w for w in words if name.startswith(w)), None)
            if idea:
                mark = "osD^v<>pX"[used.setdefault(idea, 0) % 9]
                used[idea] += 1
                g = sorted(g, key=lambda g: mmacs(g[-1]))
                ax.errorbar([mmacs(h[-1]) for h in g], [average(h) for h in g],
                            [stdev(r["fd"] for r in h) if len(h) > 1 else 0 for h in g], fmt=f"{mark}-", ms=5,
                            color=COLORS[idea], capsize=2, label=name)
        if ax.has_data():
            ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        for g in first:
            ax.axhline(average(g), color="0.6", ls=":", lw=1)
            ax.text(44000, 1.04 * average(g), "DDIM, 100 steps", fontsize=6, ha="right")
        ax.set(xscale="log", yscale="log", xlim=(1200, 45000), ylim=(0.05, 4.5), xlabel="MMACs an image",
               ylabel=fd_label(found), title=title)
        ax.title.set_size(9)
        doubling(ax.xaxis, 2000, 5)
        doubling(ax.yaxis, 0.05, 7)
    return bool(found)


FIGURES = dict(
    c2f_trd=dict(fig6=fig_steps, fig5=fig_transition, classes=fig_classes), lowdiff=dict(truncation=fig_truncation),
    multistage=dict(fig1d=fig_fig1d, plan_optimal_3=fig_similarity), postdiff=dict(fig4=fig_fig4, fig7=fig_fig7),
    shootout=dict(shootout=fig_shootout))


def draw():
    """results/SCRIPT/NAME.png of all FIGURES that have rows."""
    for script, figures in FIGURES.items():
        for name, draw_into in figures.items():
            figure, axes = plt.subplots(1, 2, figsize=(11, 4))
            if draw_into(load(ROOT / "results" / script), axes):
                for ax in axes:
                    ax.set_visible(ax.has_data())
                figure.tight_layout()
                figure.savefig(ROOT / "results" / script / f"{name}.png", dpi=110, bbox_inches="tight")
            plt.close(figure)
