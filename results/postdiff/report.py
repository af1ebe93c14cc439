"""PostDiff's tables and figures from results.jsonl and profile.json, for results/report.py."""
import json
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

from tables import groups, pm

FOLDER = Path(__file__).resolve().parent
NAMES = {"base": "plain", "mixed": "mixed resolution", "cache": "hybrid cache", "postdiff": "PostDiff"}


def lines():
    path = FOLDER / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def load():
    """Lines of results.jsonl with an FD; of lines with the same conditions the newest counts."""
    rows = {}
    for r in lines():
        if "fd" in r:                                                  # a calibration has its own lines
            if r["method"] == "mixed" and r["plan"]["n_low"] == 0:     # that is plain sampling
                r["method"], r["plan"] = "base", dict(r["plan"], method="base", low=32)
            key = [r.get(k) for k in ("experiment", "seed", "n", "data", "images_seen", "phase")]
            rows[json.dumps([*key, r["plan"]])] = r
    return list(rows.values())


def same(r):
    return [r["phase"], r["plan"]]


def table(found, plain=()):
    """One line a plan; MACs are bold where, against `plain` with the same seeds, FD is no worse and the caption score
    within 2 %."""
    out = ["| method | steps, low + full | low resolution | full pass every | guided steps | cache of | "
           "MACs of 20 guided steps | MMAC / image | s / image | FD ↓ | plain's | caption score ↑ | plain's | "
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
                    r["relative_macs"] < plain[0]["relative_macs"]):
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


def table_guidance(rows):
    """What the weight w does to plain sampling; the model's own is 3."""
    out = ["| guidance w | FD ↓ | caption score ↑ | seeds |", "| " + "--- | " * 4]
    found = [g for g in groups(rows, same, "main", "guidance") if g[0]["method"] == "base" and
             len(g[0]["plan"]["taus"]) == 20]
    for g in sorted(found, key=lambda g: g[0]["plan"]["w"]):
        out.append(f"| {g[0]['plan']['w']:g} | {pm([r['fd'] for r in g], 3)} | "
                   f"{pm([r['caption_score'] for r in g], 4)} | {len(g)} |")
    return out


def table_fig9():
    """Caption scores of the first part of a calibration set, and the share of pairs that it ranks as all do."""
    found = {json.dumps(r["plan"]): r for r in lines() if r["experiment"] == "fig9"}.values()
    if not found:
        return []
    sizes = list(next(iter(found))["scores"])
    out = ["| steps, low + full | MACs of 20 guided steps | " + " | ".join(f"score, {n} images" for n in sizes) + " |",
           "| " + "--- | " * (2 + len(sizes))]
    scores = [[r["scores"][n] for r in found] for n in sizes]
    for i, r in enumerate(found):
        best = [f"**{column[i]:.4f}**" if column[i] == max(column) else f"{column[i]:.4f}" for column in scores]
        out.append(f"| {r['nfe'][0]} + {r['nfe'][1]} | {100 * r['relative_macs']:.1f} % | {' | '.join(best)} |")
    pairs = list(combinations(range(len(found)), 2))
    alike = [mean((a[i] - a[j]) * (scores[-1][i] - scores[-1][j]) > 0 for i, j in pairs) for a in scores]
    out.append(f"| pairs ranked as by all | | {' | '.join(f'{100 * share:.0f} %' for share in alike)} |")
    return out


def tables():
    rows = load()
    main = groups(rows, same, "main")
    plain = next((g for g in main if g[0]["method"] == "base" and len(g[0]["plan"]["taus"]) == 20), ())
    parts = dict(fewer=("fig4", "aim", "fig8"), cache=("table1",), km=("table5",), solver=("solver",),
                 finetune=("table7",))
    kinds = {kind: groups(rows, same, f"table2 {kind}") for kind in ("lcm", "dit")}
    return dict(postdiff=table(main, plain), postdiff_guidance=table_guidance(rows), postdiff_fig9=table_fig9(),
                **{f"postdiff_{name}": table(groups(rows, same, *names), plain) for name, names in parts.items()},
                **{f"postdiff_{kind}": table(found, next((g for g in found if g[0]["method"] == "base"), ()))
                   for kind, found in kinds.items()})


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
    """Figs. 4, 5, 8: FD and caption score against relative MACs, mean and deviation of 3 seeds (plans that have all
    three); a line a family of plans."""
    def usual(plan):
        return 2 * plan["n_low"] == len(plan["taus"]) and plan["k"] == 2

    families = (("plain, fewer steps", lambda p: p["method"] == "base"),
                *((f"mixed, {K} steps", lambda p, K=K: p["method"] == "mixed" and p["n_low"] and len(p["taus"]) == K and
                   p["low"] == 16) for K in (20, 16, 12, 8)),
                ("mixed, beta = 3/4", lambda p: p["method"] == "mixed" and p["low"] == 24),
                ("PostDiff, fewer steps", lambda p: p["method"] == "postdiff" and usual(p)),
                ("PostDiff, other settings", lambda p: p["method"] == "postdiff" and not usual(p)),
                ("hybrid cache", lambda p: p["method"] == "cache"))
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    found = [list({r["seed"]: r for r in g}.values()) for g in groups(rows, same, "main", "fig4", "aim", "fig8")
             if g[0]["solver"] == "ddim" and {r["seed"] for r in g} >= {0, 1, 2}]
    for axis, key in zip(axes, ("fd", "caption_score")):
        for name, of in families:
            line = sorted((100 * g[0]["relative_macs"], mean(r[key] for r in g), stdev(r[key] for r in g))
                          for g in found if of(g[0]["plan"]))
            if line:
                style = "k-o" if name.startswith("plain") else "o-" if "steps" in name else "x"
                x, y, spread = zip(*line)
                axis.errorbar(x, y, spread, fmt=style, markersize=5, capsize=2, elinewidth=0.7, label=name)
        axis.set(xlabel="MACs, % of 20 guided steps", ylabel="caption score" if key != "fd" else
                 f"FD[{found[0][0]['extractor']}]@{found[0][0]['n']}")
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
