"""PostDiff's tables and figures from results.jsonl and profile.json, for results/report.py."""
import json
from pathlib import Path
from statistics import mean

from tables import groups, pm

FOLDER = Path(__file__).resolve().parent
NAMES = {"base": "plain", "mixed": "mixed resolution", "cache": "hybrid cache", "postdiff": "PostDiff"}


def load():
    """Lines of results.jsonl; of lines with the same conditions the newest counts."""
    rows, path = {}, FOLDER / "results.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        r = json.loads(line)
        if "fd" in r:                                                  # a calibration has its own lines
            if r["method"] == "mixed" and r["plan"]["n_low"] == 0:     # that is plain sampling
                r["method"], r["plan"] = "base", dict(r["plan"], method="base", low=32)
            key = [r.get(k) for k in ("experiment", "seed", "n", "data", "images_seen", "phase")]
            rows[json.dumps([*key, r["plan"]])] = r
    return list(rows.values())


def same(r):
    return [r["phase"], r["plan"]]


def table(found, plain=()):
    """One line a plan; MACs are bold where, against plain 20 steps with the same seeds, FD is no worse and the caption
    score within 2 %."""
    out = ["| method | steps, low + full | low resolution | full pass every | guided steps | cache of | "
           "MACs of 20 guided steps | MMAC / image | s / image | FD ↓ | plain 20's | caption score ↑ | plain 20's | "
           "seeds |",
           "| " + "--- | " * 14]
    for g in found:
        r, plan = g[0], g[0]["plan"]
        K, seeds = len(plan["taus"]), {r["seed"] for r in g}
        equal = [p for p in plain if p["seed"] in seeds]
        share, goal = f"{100 * r['relative_macs']:.1f} %", ["", ""]
        if len(equal) == len(g):
            fd, score = mean(p["fd"] for p in equal), mean(p["caption_score"] for p in equal)
            goal = [f"{fd:.3f}", f"{score:.4f}"]
            if mean(r["fd"] for r in g) <= fd and mean(r["caption_score"] for r in g) >= 0.98 * score and (
                    r["relative_macs"] < 1):
                share = f"**{share}**"
        out.append(f"| {name_of(r)}, {r['solver']} | {plan['n_low']} + {K - plan['n_low']} | "
                   f"{plan['low'] if plan['n_low'] else '-'} | {plan['k']} | {plan['n_guided']} | "
                   f"{plan['choice'] if plan['n_guided'] < K else '-'} | {share} | {r['macs_per_image'] / 1e6:.0f} | "
                   f"{pm([r['seconds_per_image'] for r in g], 3)} | {pm([r['fd'] for r in g], 3)} | {goal[0]} | "
                   f"{pm([r['caption_score'] for r in g], 4)} | {goal[1]} | {len(g)} |")
    return out


def name_of(r):
    if r["method"] == "cache" and r["plan"]["choice"] == "none":
        return "guidance dropped" if r["plan"]["n_guided"] < len(r["plan"]["taus"]) else "DeepCache alone"
    return NAMES[r["method"]]


def tables():
    rows = load()
    main = groups(rows, same, "main")
    plain = next((g for g in main if g[0]["method"] == "base" and len(g[0]["plan"]["taus"]) == 20), ())
    parts = dict(fewer=("fig4", "aim"), cache=("table1",), km=("table5",), solver=("solver",), finetune=("table7",))
    return dict(postdiff=table(main, plain), **{
        f"postdiff_{name}": table(groups(rows, same, *experiments), plain) for name, experiments in parts.items()})


def draw_profile(plt, found):
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
    save(plt, figure, "fig7")


def draw_trade_off(plt, rows):
    """Figs. 4, 5: FD and caption score against relative MACs; a line a family of plans, seed 0."""
    def usual(plan):
        return 2 * plan["n_low"] == len(plan["taus"]) and plan["k"] == 2

    families = (("plain, fewer steps", lambda p: p["method"] == "base"),
                *((f"mixed, {K} steps", lambda p, K=K: p["method"] == "mixed" and p["n_low"] and len(p["taus"]) == K)
                  for K in (20, 16, 12, 8)),
                ("PostDiff, fewer steps", lambda p: p["method"] == "postdiff" and usual(p)),
                ("PostDiff, other settings", lambda p: p["method"] == "postdiff" and not usual(p)),
                ("hybrid cache", lambda p: p["method"] == "cache"))
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    found = [g for g in groups(rows, same, "main", "fig4", "aim") if g[0]["solver"] == "ddim"
             and g[0]["seed"] == 0]
    for axis, key in zip(axes, ("fd", "caption_score")):
        for name, of in families:
            line = sorted((100 * g[0]["relative_macs"], g[0][key]) for g in found if of(g[0]["plan"]))
            if line:
                style = "k-o" if name.startswith("plain") else "o-" if "steps" in name else "x"
                axis.plot(*zip(*line), style, markersize=5, label=name)
        axis.set(xlabel="MACs, % of 20 guided steps", ylabel="caption score" if key != "fd" else
                 f"FD[{found[0][0]['extractor']}]@{found[0][0]['n']}, seed 0")
    axes[0].legend(fontsize=7)
    save(plt, figure, "fig4")


def save(plt, figure, name):
    figure.tight_layout()
    figure.savefig(FOLDER / f"{name}.png", dpi=110)
    plt.close(figure)


def figures(plt):
    if (FOLDER / "profile.json").is_file():
        draw_profile(plt, json.loads((FOLDER / "profile.json").read_text()))
    rows = load()
    if groups(rows, same, "main", "fig4"):
        draw_trade_off(plt, rows)
