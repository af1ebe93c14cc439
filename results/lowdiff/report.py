"""LowDiff's tables and figure from results.jsonl and speed.json, for results/report.py."""
import json
from pathlib import Path
from statistics import mean

from tables import groups, pm

FOLDER = Path(__file__).resolve().parent
NAMES = {"edm": "EDM", "dit": "LightningDiT", "lowdiff": "LowDiff", "cdm": "CDM"}


def load():
    """Lines of results.jsonl; of lines with the same conditions the newest counts."""
    rows = {}
    for line in (FOLDER / "results.jsonl").read_text().splitlines():
        r = json.loads(line)
        key = [r.get(k) for k in ("experiment", "variant", "method", "space", "data", "stages", "cond", "up", "told")]
        rows[json.dumps([*key, r["cond_scale"], r["seed"], r["n"], r["plan"]])] = r
    return list(rows.values())


def same(r):
    return [r["method"], r["stages"], r["cond"], r["plan"], r.get("variant")]


def name_of(r):
    stages = "-".join(map(str, r["stages"]))
    return f"{NAMES[r['method']]} {stages}" if len(r["stages"]) > 1 else NAMES[r["method"]]


def table_lowdiff(rows):
    """Tables 2, 5, 6, 8: equal training MACs."""
    out = ["| labels | method | parameters | NFE at each resolution | stops at sigma | effective NFE | FD ↓ | IS ↑ | "
           "MMAC / image | training images |", "| " + "--- | " * 10]
    found = groups(rows, same, "tables 2 5 6 8", "later truncation", "edm, fewer steps")
    for cond in (True, False):
        for g in sorted((g for g in found if g[0]["cond"] == cond), key=lambda g: (
                ["edm", "lowdiff", "cdm"].index(g[0]["method"]), -len(g[0]["stages"]), -g[0]["nfe"][-1], g[0]["nfe"])):
            r, stops = g[0], [f"{p['sigma_stop']:.2g}" for p in g[0]["plan"]["stages"][:-1]]
            out.append(f"| {'yes' if cond else 'no'} | {name_of(r)} | {r['parameters']:,} | "
                       f"{' + '.join(map(str, r['nfe']))} | {', '.join(stops)} | {r['effective_nfe']} | "
                       f"{pm([r['fd'] for r in g])} | {pm([r['inception_score'] for r in g])} | "
                       f"{r['macs_per_image'] / 1e6:.0f} | {r['images_seen']:,} |")
    return out


def table_speed():
    """Table 5: images/s beside EDM in one run; Tables 3, 7, 9 as throughput and MACs."""
    out = ["| preset | method | parameters (off switch's) | NFE at each resolution | effective NFE | "
           "images/s (off switch's) | times as many (range) | by MACs | training MACs / image, times as many |",
           "| " + "--- | " * 9]
    rows = json.loads((FOLDER / "speed.json").read_text())
    edm = {r["space"] + r["preset"]: r["edm_macs_per_image"] / (100 if r["space"] == "latent" else 35 if r["preset"] ==
                                                               "small" else 79) for r in rows}
    for r in rows:
        space = " (latent)" if r["space"] == "latent" else ""
        spread = " ({:.2f} to {:.2f})".format(*r["speedup_range"]) if "speedup_range" in r else ""
        out.append(f"| {r['preset']}{space} | {name_of(r)} | {r['parameters']:,} ({r['edm_parameters']:,}) | "
                   f"{' + '.join(map(str, r['nfe']))} | {r['effective_nfe']} | {r['images_per_s']:.1f} "
                   f"({r['edm_images_per_s']:.1f}) | **{r['speedup']:.2f}**{spread} | "
                   f"{r['edm_macs_per_image'] / r['macs_per_image']:.2f} | "
                   f"{r['train_macs_per_image'] / edm[r['space'] + r['preset']]:.2f} |")
    return out


def table_ablations(rows):
    """Tables 10, 11, 12: around the plan of two and of three stages."""
    out = ["| sweep | stages | plan | stops at sigma | NFE | FD ↓ |", "| " + "--- | " * 6]
    for sweep in ("truncation", "steps", "range"):
        found = [g for g in groups(rows, same, sweep) if g[0]["space"] == "pixel"]
        for stages in sorted({tuple(g[0]["stages"]) for g in found}, key=len):
            some = [g for g in found if tuple(g[0]["stages"]) == stages]
            best = min(mean(r["fd"] for r in g) for g in some)
            for g in some:
                r, fd = g[0], mean(r["fd"] for r in g)
                text = pm([r["fd"] for r in g])
                out.append(f"| {sweep} | {'-'.join(map(str, stages))} | {r['variant']} | "
                           f"{r['plan']['stages'][-2]['sigma_stop']:.3g} | {' + '.join(map(str, r['nfe']))} | "
                           f"{f'**{text}**' if fd == best else text} |")
    return out


def table_latent(rows):
    """Table 4's form."""
    out = ["| method | parameters | NFE at each resolution | effective NFE | FD ↓ | FD of the images, decoded | IS ↑ | "
           "MMAC / image | training images |", "| " + "--- | " * 9]
    for g in groups(rows, same, "table 4"):
        r = g[0]
        out.append(f"| {name_of(r)} | {r['parameters']:,} | {' + '.join(map(str, r['nfe']))} | {r['effective_nfe']} | "
                   f"{pm([r['fd'] for r in g])} | {r['decoded_fd']:.2f} | {pm([r['inception_score'] for r in g])} | "
                   f"{r['macs_per_image'] / 1e6:.0f} | {r['images_seen']:,} |")
    return out


def table_where():
    """where.py's rows."""
    out = ["| model | what | NFE at each resolution | FD ↓ | IS ↑ |", "| " + "--- | " * 5]
    path = FOLDER / "where.json"
    for r in json.loads(path.read_text()) if path.is_file() else ():
        name = {"edm-cond": "EDM", "two-cond": "LowDiff 16-32", "cdm-cond": "CDM 16-32"}[r["checkpoint"]]
        out.append(f"| {name} | {r['what']} | {' + '.join(map(str, r['nfe']))} | {r['fd']:.2f} | "
                   f"{r['inception_score']:.2f} |")
    return out


def tables():
    rows = load()
    return dict(lowdiff=table_lowdiff(rows), lowdiff_speed=table_speed(), lowdiff_ablations=table_ablations(rows),
                lowdiff_latent=table_latent(rows), lowdiff_where=table_where())


def figures(plt):
    """FD against the truncation point of the last truncated stage (Table 11 as a figure)."""
    rows = load()
    fig, axes = plt.subplots(1, 2, figsize=(11, 4))
    for stages in ([16, 32], [8, 16, 32]):
        found = [g for g in groups(rows, same, "truncation") if g[0]["stages"] == stages and g[0]["space"] == "pixel"]
        points = sorted((g[0]["plan"]["stages"][-2]["evaluations"], g[0]["plan"]["stages"][-2]["sigma_stop"],
                         mean(r["fd"] for r in g)) for g in found)
        if points:
            K, sigma, fd = zip(*points)
            label = "-".join(map(str, stages))
            axes[0].plot(K, fd, "o-", label=label)
            axes[1].plot(sigma, fd, "o-", label=label)
    for ax, name in zip(axes, ("evaluations K at 16x16", "sigma where 16x16 stops")):
        ax.set(xlabel=name, ylabel="FD[small-fashion]@1000")
        ax.legend(fontsize=8)
    axes[1].set_xscale("log")
    fig.tight_layout()
    fig.savefig(FOLDER / "truncation.png", dpi=110)
