"""Tables and figures of the READMEs from results.jsonl; nothing is typed by hand.

    python results/report.py           # writes results/*/*.png and the tables in README.md and results/*/README.md

Figures need matplotlib (pip install matplotlib); without it only the tables are made.
"""
import importlib.util
import json
import re
from pathlib import Path
from statistics import mean, stdev

from tables import groups, pm

ROOT = Path(__file__).resolve().parent.parent
OTHERS = ("lowdiff", "multistage", "postdiff")          # scripts with a results/SCRIPT/report.py
FOLDER = ROOT / "results" / "c2f_trd"
NAMES = {"base": "uniform", "trd": "TRD", "c2f": "C2F", "c2f+trd": "C2F+TRD"}
SOLVER = {"ddim": "DDIM", "dpm2": "DPM-Solver++ 2M", "dpm3": "DPM-Solver++ 3M"}


def load():
    """Lines of results.jsonl; of lines with the same conditions the newest counts."""
    rows = {}
    for line in (FOLDER / "results.jsonl").read_text().splitlines():
        r = json.loads(line)
        if r["preset"] != "small":
            continue
        key = [r[k] for k in ("experiment", "method", "solver", "low", "strategy", "nfe")]
        key += [r.get("seed"), r.get("n"), r.get("t_star"), r["plan"].get("spacing")]
        key += [r["plan"].get(k) for k in ("calibration", "ends", "two_phase")]
        rows[json.dumps(key)] = r
    return list(rows.values())


def pick(rows, experiment, method, solver, steps=None, **more):
    return [r for r in rows if (r["experiment"], r["method"], r["solver"]) == (experiment, method, solver)
            and steps in (None, r["nfe"][1]) and all(r["plan"].get(k) == v for k, v in more.items())]


def table_fig6(rows):
    first = pick(rows, "fig6", "base", "ddim", 100)
    out = ["| steps | method | MACs of 100-step DDIM | DDIM | DPM-Solver++ 2M |", "| " + "--- | " * 5]
    if first:
        out.append(f"| 100 | uniform | 100 % | **{pm([r['fd'] for r in first], 3)}** | |")
    for steps in (5, 6, 10, 11, 20, 21, 40):
        for method in NAMES:
            cells = [pick(rows, "fig6", method, s, steps) for s in ("ddim", "dpm2")]
            if not any(cells):
                continue
            macs = 100 * next(c for c in cells if c)[0]["relative_macs"]
            low = "10 + " if "c2f" in method else ""
            fds = [pm([r["fd"] for r in c], 3) if c else "" for c in cells]
            out.append(f"| {low}{steps} | {NAMES[method]} | {macs:.1f} % | {fds[0]} | {fds[1]} |")
    return out


def table_spacing(rows):
    """FD of seed 0: uniform spacings, TRD as in the paper, TRD with its options."""
    out = ["| steps | solver | method | inclusive (paper) | exclusive | trailing | TRD (paper) | TRD, 64 samples | "
           "TRD, exclusive and bounded |", "| " + "--- | " * 9]
    rows = [r for r in rows if r.get("seed") == 0]
    for solver in ("ddim", "dpm2"):
        for method in ("base", "c2f"):
            for steps in (5, 10):
                trd = "trd" if method == "base" else "c2f+trd"
                cells = [pick(rows, "fig6", method, solver, steps)]
                cells += [pick(rows, "spacing", method, solver, steps, spacing=s) for s in ("exclusive", "trailing")]
                cells += [pick(rows, "fig6", trd, solver, steps)]
                cells += [pick(rows, "options", trd, solver, steps, spacing="inclusive", calibration=64),
                          pick(rows, "options", trd, solver, steps, spacing="exclusive", calibration=16)]
                fds = [c[0]["fd"] if c else None for c in cells]
                best = min(v for v in fds if v is not None)
                text = ["" if v is None else f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in fds]
                out.append(f"| {steps} | {SOLVER[solver]} | {NAMES[method]} | {' | '.join(text)} |")
    return out


def table_phases(rows):
    """Joint search of both sequences, as in the paper, against one after the other (16 samples)."""
    out = ["| solver | steps | search | evaluations/sample | seconds | loss on 16 | held out | FD |",
           "| " + "--- | " * 8]
    for solver in ("ddim", "dpm2"):
        for steps in (5, 10):
            for two, experiment in ((False, "fig6"), (True, "options")):
                key = dict(spacing="inclusive", ends="paper", calibration=16, two_phase=two)
                found = pick(rows, "search", "c2f+trd", solver, steps, **key)
                fds = [r["fd"] for r in pick(rows, experiment, "c2f+trd", solver, steps, **key)]
                if found and fds:
                    r = found[0]
                    out.append(f"| {SOLVER[solver]} | {steps} | {'two-phase' if two else 'joint'} | "
                               f"{' + '.join(map(str, r['evaluations']))} | {r['seconds']:.0f} | {r['loss'][-1]:.2e} | "
                               f"{r['held_out']['trd']:.2e} | {pm(fds, 3)} |")
    return out


def table_1(rows):
    """Table I: FD of the fine-tuning strategies beside the base model, DPM-Solver++ 2M, uniform steps."""
    out = ["| strategy | networks | C2F, 10 + 10 steps | C2F, 10 + 20 steps | "
           "its high-resolution network alone, 10 steps |", "| " + "--- | " * 5]
    alone = {r["low"]: r["fd"] for r in json.loads((FOLDER / "finetuned.json").read_text())}     # None: the base
    found = lambda *which: [[r["fd"] for r in pick(rows, *which, "dpm2", k)] for k in (10, 20)]  # noqa: E731
    lines = [("none: the base model", 1, [[], []], alone.get(None)),
             ("label, 8 -> 32", 1, found("fig6", "c2f"), alone.get(8))]
    for strategy in ("2dms", "label", "xy", "2T"):
        some = [r for r in rows if r["strategy"] == strategy]
        fds = [[r["fd"] for r in pick(some, "table1", "c2f", "dpm2", k)] for k in (10, 20)]
        same = {"label": alone.get(16), "2dms": alone.get(None)}.get(strategy)
        lines.append((f"{strategy}, 16 -> 32", 2 if strategy == "2dms" else 1, fds, same))
    for name, networks, fds, high in lines:
        cells = [pm(v, 3) if v else "" for v in (*fds, high)]
        out.append(f"| {name} | {networks} | {' | '.join(cells)} |")
    return out


def table_search(rows, options=False):
    """Searches as in the paper (from 15 steps on two-phase), or those with its options."""
    out = ["| method | solver | steps | search | sweeps | seconds | evaluations/sample | calls | loss on 16: "
           "uniform → TRD | held out: inclusive | exclusive | leading | trailing | TRD |",
           "| " + " --- |" * 14]
    for r in sorted((r for r in rows if r["experiment"] == "search"),
                    key=lambda r: (r["solver"], r["method"], r["nfe"][1], r["calibration"])):
        as_paper = r["plan"]["spacing"] == "inclusive" and r["calibration"] == 16 and (
            r["nfe"][1] > 15 or not r["plan"]["two_phase"])
        if options == as_paper:
            continue
        kind = ("two-phase" if r["plan"]["two_phase"] else "joint") if "c2f" in r["method"] else "single"
        kind += f", {r['calibration']} samples" if r["calibration"] != 16 else ""
        kind += ", from exclusive, bounded ends" if r["plan"]["ends"] == "bounded" else ""
        h, best = r["held_out"], min(r["held_out"].values())
        cells = [f"**{v:.2e}**" if v == best else f"{v:.2e}" for v in
                 (h["inclusive"], h["exclusive"], h["leading"], h["trailing"], h["trd"])]
        out.append(f"| {NAMES[r['method']]} | {SOLVER[r['solver']]} | {r['nfe'][1]} | {kind} | "
                   f"{len(r['loss']) - 1} | {r['seconds']:.0f} | "
                   f"{' + '.join(map(str, r['evaluations']))} | {r['calls']} | "
                   f"{r['loss'][0]:.2e} → {r['loss'][-1]:.2e} | {' | '.join(cells)} |")
    return out


def per_class(rows):
    """Classes of 100-step DDIM and of C2F+TRD with 10 + 5 steps of 2M, if both were measured."""
    found = {(r["method"], r["solver"], r["nfe"][1]): r["classes"]
             for r in rows if r["experiment"] == "per class"}
    return found.get(("base", "ddim", 100)), found.get(("c2f+trd", "dpm2", 5))


def table_class(rows):
    base, fast = per_class(rows)
    if not base or not fast:
        return ["(not measured)"]
    out = ["| class | n, base | FD, base | n, C2F+TRD | FD, C2F+TRD |", "| --- | --- | --- | --- | --- |"]
    show = lambda v: "too few" if v is None else f"{v:.3f}"  # noqa: E731
    for a, b in zip(base, fast):
        out.append(f"| {a['caption']} | {a['n']} | {show(a['fd'])} | {b['n']} | {show(b['fd'])} |")
    return out


def table_ledgers():
    """The cells of the ledgers that say most; the ledger.json of each script has them all."""
    chosen = (("c2f_trd", "", "CIFAR10: parameters"), ("c2f_trd", "", "CIFAR10 8->32, T_f=10: relative MACs, %"),
              ("lowdiff", "", "CIFAR10 lowdiff 8-16-32: parameters"), ("lowdiff", "", "CIFAR10 cdm 16-32: parameters"),
              ("lowdiff", "", "FFHQ lowdiff 8-16-32-64: parameters"), ("lowdiff", "", "CIFAR10 8-16-32: effective NFE"),
              ("lowdiff", "", "CIFAR10 8-16-32: throughput gain, %"),
              ("multistage", "Table 5, 1", "total: parameters, M"), ("multistage", "Table 5, 1", "stage 1: GFLOPs"),
              ("multistage", "Table 5, 1", "total: GFLOPs by length"),
              ("multistage", "Table 6, 4", "total: parameters, M"),
              ("multistage", "Table 5, 4", "total: GFLOPs by length"), ("multistage", "Table 4", "snr: t1"),
              ("postdiff", "Table 1", "DC"), ("postdiff", "Table 2", "SD v1.5, mix"),
              ("postdiff", "Table 2", "SD v1.5, PostDiff: the cell's accounting"),
              ("postdiff", "Table 2", "SD v1.5, PostDiff: executed"), ("postdiff", "Table 2", "SDXL, PostDiff"),
              ("postdiff", "Table 2", "PixArt, PostDiff"))
    out = ["| script | cell | paper | ours | note |", "| " + "--- | " * 5]
    for script, table, cell in chosen:
        r = next(r for r in json.loads((ROOT / "results" / script / "ledger.json").read_text())
                 if r["cell"] == cell and r["table"].startswith(table))
        values = ["-" if v is None else v if isinstance(v, str) else f"{v:,.0f}" if v >= 1e6
                  else f"{v:.3f}".rstrip("0").rstrip(".") for v in (r["paper"], r["ours"])]
        where = f"Table {r['table']}" if r["table"][0].isdigit() else r["table"]
        out.append(f"| {script} | {where}: {cell} | {values[0]} | {values[1]} | {r['note']} |")
    return out


def table_summary(rows):
    """Per paper: without the method, with it, and what we set out to see."""
    def fd(found):
        return f"FD {pm([r['fd'] for r in found])}"

    def line(script, without, method, cost, aim, met):
        return f"| {script} | {without} | {method}; {cost} | {aim} | {'**yes**' if met else 'no'} |"

    def average(found, key="fd"):
        return mean(r[key] for r in found)

    out = ["| script | off switch | with the method | the aim | met |", "| " + "--- | " * 5]
    a, b = pick(rows, "fig6", "base", "ddim", 100), pick(rows, "fig6", "c2f+trd", "dpm2", 5)
    out.append(line("c2f_trd.py", f"DDIM, 100 steps: {fd(a)}", f"C2F+TRD, 2M, 10 + 5 steps: {fd(b)}",
                    f"{100 * b[0]['relative_macs']:.1f} % of the MACs", "FD within 10 % at a fifth of the MACs",
                    average(b) <= 1.1 * average(a)))
    low = report_of("lowdiff")
    found = {(r[0]["method"], len(r[0]["stages"])): r for r in groups(low.load(), low.same, "tables 2 5 6 8")
             if r[0]["cond"]}
    a, b = found["edm", 1], found["lowdiff", 3]
    faster = next(r["speedup"] for r in json.loads((ROOT / "results/lowdiff/speed.json").read_text())
                  if r["preset"] == "small" and len(r["stages"]) == 3)
    out.append(line("lowdiff.py", f"EDM, 35 evaluations: {fd(a)}", f"8-16-32: {fd(b)}",
                    f"{faster:.2f} times the images/s", "1.55 times the images/s, FD no worse",
                    faster >= 1.55 and average(b) <= average(a)))
    many = report_of("multistage")
    found = {r[0]["method"]: r for r in groups(many.load(), many.same, "fig1d")}
    a = f"unified, 20 evaluations: {fd(found['unified'])}"
    for name, key in (("3 decoders", "multistage"), ("3 decoders, mixed batches", "multistage, mixed batches")):
        share = many.reached().get(key)
        cost = f"the unified FD at {100 * share:.0f} % of the training MACs" if share else "equal training MACs"
        out.append(line("multistage.py", a, f"{name}: {fd(found[key])}", cost,
                        "the unified FD at 60 % of the training MACs", bool(share) and share <= 0.6))
    post = report_of("postdiff")
    found = groups(post.load(), post.same, "main", "aim")
    a, paper, b = (next(r for r in found if (r[0]["method"], r[0]["solver"], *r[0]["nfe"]) == key) for key in (
        ("base", "ddim", 0, 20), ("postdiff", "ddim", 10, 10), ("mixed", "ddim", 2, 6)))
    for name, r in (("as in the paper", paper), ("8 steps, 2 at 16x16", b)):
        met = average(r) <= average(a) and r[0]["relative_macs"] <= 0.4 and (
            average(r, "caption_score") >= 0.98 * average(a, "caption_score"))
        out.append(line("postdiff.py", f"DDIM, 20 steps: {fd(a)}, caption score {average(a, 'caption_score'):.3f}",
                        f"{name}: {fd(r)}, {average(r, 'caption_score'):.3f}",
                        f"{100 * r[0]['relative_macs']:.1f} % of the MACs",
                        "60 % fewer MACs, FD no worse, score within 2 %", met))
    return out


def table_extractor():
    out = ["| extractor | held-out images | captions | top-1 | top-5 | FD: undamaged | blur 1, 2, 3 px | "
           "noise 8, 16, 24 / 255 | 10, 20, 30 % of the classes missing |", "| " + "--- | " * 9]
    for path in sorted((ROOT / "results" / "extractor").glob("*.json")):
        r = json.loads(path.read_text())
        damage = [", ".join(f"{v:.2f}" for v in r["fd"][k]) for k in ("blur", "noise", "missing classes")]
        out.append(f"| small-{r['data']} | {r['held_out']} | {r['captions']} | {100 * r['top1']:.1f} % | "
                   f"{100 * r['top5']:.1f} % | {r['fd']['none']:.3f} | {' | '.join(damage)} |")
    return out


def report_of(script):
    """results/SCRIPT/report.py as a module."""
    spec = importlib.util.spec_from_file_location(f"report_{script}", ROOT / "results" / script / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(rows):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    styles = {"base": "o-", "trd": "s-", "c2f": "o--", "c2f+trd": "s--"}
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for ax, solver in zip(axes, ("ddim", "dpm2")):
        for method, style in styles.items():
            points = {}
            for r in pick(rows, "fig6", method, solver):
                if r["nfe"][1] in (5, 10, 20, 40):
                    points.setdefault(100 * r["relative_macs"], []).append(r["fd"])
            x = sorted(points)
            ax.errorbar(x, [mean(points[k]) for k in x], fmt=style, capsize=3, label=NAMES[method],
                        yerr=[stdev(points[k]) if len(points[k]) > 1 else 0 for k in x])
        full = [r["fd"] for r in pick(rows, "fig6", "base", "ddim", 100)]
        if full:
            ax.axhline(mean(full), color="grey", label="100-step DDIM")
            ax.axhline(1.1 * mean(full), color="grey", ls=":", label="+10 %")
        ax.set(xlabel="MACs, % of 100-step DDIM", title=SOLVER[solver], xscale="log", yscale="log")
        ax.set_xticks([5, 10, 20, 40], ["5", "10", "20", "40"])
        ax.set_yticks([1, 2, 3, 5], ["1", "2", "3", "5"])
        ax.minorticks_off()
        ax.legend(fontsize=8)
    axes[0].set_ylabel("FD[small-fashion]@2000")
    fig.tight_layout()
    fig.savefig(FOLDER / "fig6.png", dpi=110)

    fig, axes = plt.subplots(1, 2, figsize=(11, 4))
    for r in json.loads((FOLDER / "ranks.json").read_text()):
        name = f"C2F-DM {r['res']} -> 32" if r["model"] == "low" else f"base, {r['res']}x{r['res']}"
        line, = axes[0].plot(*zip(*r["ranks"]), label=f"{name}: lowest at t = {r['t_star']}")
        axes[0].axvline(r["t_star"], color=line.get_color(), ls=":", lw=0.8)
    axes[0].set(ylabel="cut index (99 % of the variance)", yscale="log", title="Rank of x0_hat")
    for low, experiment in ((8, "sweep"), (16, "sweep16")):
        points = sorted((r["t_star"], r["fd"]) for r in rows if r["experiment"] == experiment)
        if points:
            axes[1].plot(*zip(*points), "o-", label=f"C2F-DM {low} -> 32")
    axes[1].set(ylabel="FD[small-fashion]@2000", yscale="log", title="Transition at t, DDIM, 20 steps each")
    axes[1].set_yticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
    axes[1].minorticks_off()
    for ax in axes:
        ax.set(xlabel="t", xlim=(1010, -10))
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(FOLDER / "fig5.png", dpi=110)

    base, fast = per_class(rows)
    if base and fast:
        fig, ax = plt.subplots(figsize=(8, 3.6))
        at = range(len(base))
        ax.bar([i - 0.2 for i in at], [c["fd"] or 0 for c in base], 0.4, label="DDIM, 100 steps")
        ax.bar([i + 0.2 for i in at], [c["fd"] or 0 for c in fast], 0.4, label="C2F+TRD, 2M, 10 + 5 steps")
        ax.set_xticks(at, [c["caption"] for c in base], rotation=30, ha="right")
        ax.set(ylabel="FD of the class")
        ax.legend()
        fig.tight_layout()
        fig.savefig(FOLDER / "classes.png", dpi=110)
    for script in OTHERS:
        report_of(script).figures(plt)


def main():
    rows = load()
    tables = dict(summary=table_summary(rows), fig6=table_fig6(rows), spacing=table_spacing(rows),
                  search=table_search(rows), phases=table_phases(rows), strategies=table_1(rows),
                  options=table_search(rows, options=True),
                  classes=table_class(rows), extractor=table_extractor(), ledgers=table_ledgers())
    for script in OTHERS:
        tables.update(report_of(script).tables())
    for path in (ROOT / "README.md", *sorted(ROOT.glob("results/*/README.md"))):
        text = path.read_text()
        for name, lines in tables.items():
            pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda m, lines=lines: m[1] + "\n".join(lines) + "\n" + m[2], text, flags=re.S)
        path.write_text(text)
    try:
        figures(rows)
    except ImportError:
        print("no matplotlib: tables only")


if __name__ == "__main__":
    main()
