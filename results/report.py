"""Tables and figures from results/*/results.jsonl; nothing is typed by hand.

    python results/report.py           # fills <!-- table: NAME --> in README.md and results/*/README.md; draws *.png

In results/SCRIPT/README.md NAME is a function of results/SCRIPT/experiments.py; in README.md it is summary, ledgers or
extractor. Of lines with equal conditions the newest counts; lines that differ in the seed only are one row, mean ±
standard deviation. Figures (figures.py) need matplotlib (pip install matplotlib); without it there are only tables.
"""
import json
import re
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("c2f_trd", "lowdiff", "multistage", "postdiff")
SAME = ("experiment", "arm", "data", "n", "extractor")         # equal conditions, beside the seed
ARMS = ("off switch", "best plain", "method")                  # of a headline
LEDGERS = (                    # the cells of the ledgers that say most; the ledger.json of each script has them all
    ("c2f_trd", "", "CIFAR10: parameters"), ("c2f_trd", "", "CIFAR10 8->32, T_f=10: relative MACs, %"),
    ("lowdiff", "", "CIFAR10 lowdiff 8-16-32: parameters"), ("lowdiff", "", "CIFAR10 cdm 16-32: parameters"),
    ("lowdiff", "", "FFHQ lowdiff 8-16-32-64: parameters"), ("lowdiff", "", "CIFAR10 8-16-32: effective NFE"),
    ("lowdiff", "", "CIFAR10 8-16-32: throughput gain, %"), ("multistage", "Table 5, 1", "total: parameters, M"),
    ("multistage", "Table 5, 1", "stage 1: GFLOPs"), ("multistage", "Table 5, 1", "total: GFLOPs by length"),
    ("multistage", "Table 6, 4", "total: parameters, M"), ("multistage", "Table 5, 4", "total: GFLOPs by length"),
    ("multistage", "Table 4", "snr: t1"), ("postdiff", "Table 1", "DC"), ("postdiff", "Table 2", "SD v1.5, mix"),
    ("postdiff", "Table 2", "SD v1.5, PostDiff: the cell's accounting"),
    ("postdiff", "Table 2", "SD v1.5, PostDiff: executed"), ("postdiff", "Table 2", "SDXL, PostDiff"),
    ("postdiff", "Table 2", "PixArt, PostDiff"))


# ---- Lines -----------------------------------------------------------------------------------
def load(folder):
    """Lines of a folder's results.jsonl, a list of dicts in the order of their first appearance."""
    path, rows = folder / "results.jsonl", {}
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else ()):
        row = dict(json.loads(line), number=number)
        rows[json.dumps([row.get(key) for key in (*SAME, "seed")])] = row
    return list(rows.values())


def groups(rows, experiment):
    """Rows of an experiment that differ in the seed only, as lists, the newest last; those of another network or plan
    than the newest are left out."""
    found = {}
    for row in rows:
        if row["experiment"] == experiment:
            found.setdefault(json.dumps([row.get(key) for key in SAME]), []).append(row)
    found = [sorted(g, key=lambda r: r["number"]) for g in found.values()]
    return [[r for r in g if all(r.get(k) == g[-1].get(k) for k in ("plan", "images_seen"))] for g in found]


def average(group, key="fd"):
    return mean(r[key] for r in group)


def pm(values, digits=2):
    """mean ± standard deviation of the seeds; of one seed its value."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def text_of(value):
    """A cell: numbers with thousands apart or three to four digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.{'4g' if abs(value) >= 1e-3 else '2e'}}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# ---- Tables: lists of lines ------------------------------------------------------------------
def fd_label(found):
    return f"FD[{found[0][0]['extractor']}]@{found[0][0]['n']}" if found else ""


def as_table(head, lines):
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(cells)} |" for cells in lines)]


def to_do(script, experiment):
    return f"not measured yet with these networks: `python results/{script}/experiments.py {experiment}`"


def table(folder, experiment):
    """The table of an experiment: its own columns, then what was measured. The lowest FD is bold."""
    found = groups(load(folder), experiment)
    if not found:
        return [to_do(folder.name, experiment)]
    found.sort(key=lambda g: ARMS.index(g[-1]["arm"]) if g[-1]["arm"] in ARMS else 0)
    if folder.name == "shootout":
        found.sort(key=lambda g: -g[-1]["macs_per_image"])     # 100-step DDIM is the first
    own = list(dict.fromkeys(key for g in found for key in g[-1].get("cells", {})))
    measured = [g for g in found if "fd" in g[0]]
    labels = {fd_label([g]) for g in measured}
    scores = [key for key in ("inception_score", "caption_score") if any(key in g[0] for g in measured)]
    head, lines, rows = ["arm", *own], [], [r for g in measured for r in g]
    timed = len({r.get("device") for r in rows}) == 1 and all("seconds_per_image" in r for r in rows)
    clock = ["s / image"] * timed                              # seconds of different machines: none
    if measured:
        head += ["MMAC / image", "of the first", *clock, labels.pop() + " ↓" if len(labels) == 1 else "FD ↓",
                 *(f"{key.replace('_', ' ')} ↑" for key in scores), "training images", "seeds"]
    for g in found:
        r, known = g[-1], {key for key in scores if all(key in r for r in g)}
        cells = [r["arm"], *(text_of(r.get("cells", {}).get(key, "")) for key in own)]
        if "fd" in r:
            fd = pm([r["fd"] for r in g], 3) + (f" @{r['n']}, {r['extractor']}" if labels else "")
            best = not labels and len(found) > 2 and average(g) == min(map(average, measured))
            share = 100 * r["macs_per_image"] / measured[0][0]["macs_per_image"]
            cells += [f"{r['macs_per_image'] / 1e6:,.0f}", f"{share:.1f} %",
                      *(f"{average(g, 'seconds_per_image'):.4f}" for _ in clock),
                      f"**{fd}**" if best else fd, *(pm([r[k] for r in g], 3) if k in known else "" for k in scores),
                      f"{r['images_seen']:,}", str(len(g))]
        lines.append(cells + [""] * (len(head) - len(cells)))
    return as_table(head, lines)


def verdict(script, arms):
    """What was aimed at, and whether the headline's arms (off switch, method, perhaps best plain) meet it."""
    off, plain, method = (arms.get(name) for name in ARMS)
    share = method[-1]["macs_per_image"] / off[-1]["macs_per_image"]
    if script == "c2f_trd":
        ahead = bool(plain) and average(method) < average(plain)
        return ("FD within 10 % at a fifth of the MACs, ahead of the best plain sampler",
                average(method) <= 1.1 * average(off) and share <= 0.2 and ahead)
    if script == "lowdiff":
        return ("1.55 times the images/s, FD within 10 %",
                average(method) <= 1.1 * average(off) and method[-1]["speedup"] >= 1.55)
    if script == "multistage":
        trained = method[-1]["training_macs"] / off[-1]["training_macs"]
        return "its FD at 60 % of the training MACs", average(method) <= average(off) and trained <= 0.605
    return ("60 % fewer MACs, FD no worse, caption score within 2 %", average(method) <= average(off) and share <= 0.4
            and average(method, "caption_score") >= 0.98 * average(off, "caption_score"))


def summary():
    """Per paper: the method, its off switch, the best plain sampler at no fewer MACs; what we set out to see."""
    def cell(g):
        score = f", caption score {average(g, 'caption_score'):.3f}" if g and "caption_score" in g[0] else ""
        return f"{g[-1]['cells']['what']}: FD {pm([r['fd'] for r in g], 3)}{score}" if g else "-"

    lines = []
    for script in SCRIPTS:
        rows = load(ROOT / "results" / script)
        arms = {g[-1]["arm"]: g for g in groups(rows, "headline") if g[-1]["extractor"].startswith("small")}
        if not {"off switch", "method"} <= set(arms):
            measured = map(cell, map(arms.get, ARMS)) if arms else [""] * 3
            lines.append([f"{script}.py", *measured, "", to_do(script, "headline"), ""])
            continue
        aim, met = verdict(script, arms)
        off, method = arms["off switch"][-1], arms["method"][-1]
        macs = f"{100 * method['macs_per_image'] / off['macs_per_image']:.1f} %"
        macs += f"; {method['speedup']:.2f} times the images/s" if "speedup" in method else ""
        if "training_macs" in method:
            macs += f"; training {100 * method['training_macs'] / off['training_macs']:.0f} %"
        lines.append([f"{script}.py", *map(cell, map(arms.get, ARMS)), macs,
                      aim, "**yes**" if met else "no"])
    return as_table("script|off switch|best plain|method|MACs of the off switch's|the aim|met".split("|"), lines)


def ledgers():
    """The cells of LEDGERS."""
    lines = []
    for script, start, cell in LEDGERS:
        r = next(r for r in json.loads((ROOT / "results" / script / "ledger.json").read_text())
                 if r["cell"] == cell and r["table"].startswith(start))
        values = ["-" if v is None else v if isinstance(v, str) else f"{v:,.0f}" if v >= 1e6
                  else f"{v:.3f}".rstrip("0").rstrip(".") for v in (r["paper"], r["ours"])]
        where = f"Table {r['table']}" if r["table"][0].isdigit() else r["table"]
        lines.append([script, f"{where}: {cell}", *values, r["note"]])
    return as_table(["script", "cell", "paper", "ours", "note"], lines)


def extractor():
    """How good the small extractors are, and how FD in their features answers to damage."""
    lines = []
    for path in sorted((ROOT / "results" / "extractor").glob("*.json")):
        r = json.loads(path.read_text())
        damage = [", ".join(f"{v:.2f}" for v in r["fd"][k]) for k in ("blur", "noise", "missing classes")]
        lines.append([f"small-{r['data']}", str(r["held_out"]), str(r["captions"]), f"{100 * r['top1']:.1f} %",
                      f"{100 * r['top5']:.1f} %", f"{r['fd']['none']:.3f}", *damage])
    return as_table(("extractor|held-out images|captions|top-1|top-5|FD: undamaged|blur 1, 2, 3 px|"
                     "noise 8, 16, 24 / 255|10, 20, 30 % of the classes missing").split("|"), lines)


def fill(page):
    """Puts the tables of a page's markers into it."""
    own = dict(summary=summary, ledgers=ledgers, extractor=extractor)

    def put(match):
        name = match[2]
        lines = own[name]() if page.parent == ROOT else table(page.parent, name)
        return "\n".join([match[1], *lines, match[3]])

    text = page.read_text(encoding="utf-8")
    new = re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", put, text, flags=re.S)
    if new != text:
        page.write_text(new, encoding="utf-8")


def main():
    for page in (ROOT / "README.md", *sorted(ROOT.glob("results/*/README.md"))):
        fill(page)
    try:
        from figures import draw
    except ImportError:
        print("no matplotlib: tables only")
        return
    draw()


if __name__ == "__main__":
    main()
