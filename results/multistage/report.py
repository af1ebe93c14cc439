"""Multistage's tables and figure from results.jsonl and the training logs, for results/report.py."""
import json
from pathlib import Path
from statistics import mean

from tables import groups, pm

FOLDER = Path(__file__).resolve().parent
ORDER = ("unified", "separate", "separate+ES", "separate+TP", "separate+ES+TP", "multistage")       # Table 3's
SOLVERS = dict(dpm3="DPM-Solver-3", heun="EDM, Heun", dpm2m="DPM-Solver++ 2M")


def load():
    """Lines of results.jsonl; of lines with the same conditions the newest counts."""
    rows = {}
    for line in (FOLDER / "results.jsonl").read_text().splitlines():
        r = json.loads(line)
        rows[json.dumps([r["experiment"], r["method"], r.get("training"), r["plan"], r["seed"], r["n"],
                         r["images_seen"]])] = r
    return list(rows.values())


def same(r):
    return [r[k] for k in ("experiment", "training", "plan", "n", "images_seen")]


def edges_of(r):
    return ", ".join(f"{edge:.3f}" for edge in r["edges"]) or "-"


def table_arms(found):
    """Arms, each a list of lines that differ in the seed, in Table 3's order."""
    if not found:
        return []
    r = found[0][0]
    out = [f"| method | solver | edges | decoders, widths | parameters | evaluations in each stage, from the data's | "
           f"MMAC / evaluation | FD[{r['extractor']}]@{r['n']} ↓ | class score ↑ | training images |",
           "| " + "--- | " * 10]
    best = min(mean(r["fd"] for r in g) for g in found)
    for g in sorted(found, key=lambda g: (ORDER.index(g[0]["method"].split(",")[0]), len(g[0]["edges"]))):
        r, fd = g[0], pm([r["fd"] for r in g])
        fd = f"**{fd}**" if mean(r["fd"] for r in g) == best else fd
        cluster = f" ({r['clustering']})" if r["edges"] else ""
        out.append(f"| {r['method']} | {SOLVERS[r['solver']]} | {edges_of(r)}{cluster} | "
                   f"{', '.join(map(str, r['widths']))} | {r['parameters']:,} | {' + '.join(map(str, r['nfe']))} | "
                   f"{r['macs_per_evaluation'] / 1e6:.1f} | {fd} | {pm([r['inception_score'] for r in g])} | "
                   f"{r['images_seen']:,} |")
    return out


def table_latent(found):
    """Arms in latents, and what none of them can be better than."""
    return table_arms(found) + [f"| images through the autoencoder | {'| ' * 6} {g[0]['decoded_fd']:.2f} | | |"
                                for g in found[:1]]


def table_clusterings(rows):
    """Edges by every clustering, before any training; of repeated ones the last."""
    out = ["| clustering | stages | images in | edges t | sigma |", "| " + "--- | " * 5]
    found = {(r["plan"]["n"], r["method"], r["plan"].get("unit_range")): r["plan"]
             for r in rows if r["experiment"] == "clustering"}
    for (n, method, unit), plan in sorted(found.items(), key=lambda item: (item[0][0], item[0][1], str(item[0][2]))):
        scale = "-" if unit is None or method in ("time", "snr") else "[0, 1]" if unit else "[-1, 1]"
        out.append(f"| {method} | {n} | {scale} | {', '.join(f'{t:.3f}' for t in plan['edges'])} | "
                   f"{', '.join(f'{s:.2f}' for s in plan['sigmas'])} |")
    return out


def curves():
    """{arm: [(training MACs, FD), ...]} of what was measured while training: Fig. 1(d)."""
    found = {}
    for r in sorted((r for r in load() if r["experiment"] == "curve"), key=lambda r: r["training_macs"]):
        found.setdefault(r["method"], []).append((r["training_macs"], r["fd"]))
    return found


def reached():
    """{arm: share of the unified model's training MACs at which its curve first reaches that model's last FD}, of the
    arms that reach it."""
    found, shares = curves(), {}
    total, goal = found["unified"][-1]
    for name, points in found.items():
        at = next((a + (b - a) * (u - goal) / (u - v) for (a, u), (b, v) in zip(points, points[1:]) if u > goal >= v),
                  points[0][0] if points[0][1] <= goal else None)
        if at is not None:
            shares[name] = at / total
    return shares


def table_compute():
    """Fig. 1(d) in numbers."""
    out = ["| arm | FD along the way (training MACs, 1e12: FD) | reaches unified's last FD at | "
           "share of unified's compute |", "| " + "--- | " * 4]
    shares, total = reached(), curves()["unified"][-1][0]
    for name, points in curves().items():
        steps = "; ".join(f"{macs / 1e12:.1f}: {fd:.2f}" for macs, fd in points)
        cells = [f"{shares[name] * total / 1e12:.1f}e12", f"{100 * shares[name]:.0f} %"] if name in shares else [
            "not reached", "-"]
        out.append(f"| {name} | {steps} | {' | '.join(cells)} |")
    return out


def table_losses():
    """stage_losses.json."""
    path = FOLDER / "stage_losses.json"
    out = ["| method | widths | training MACs | error next to the data | in the middle | next to the noise |",
           "| " + "--- | " * 6]
    return out + [f"| {r['method']} | {', '.join(map(str, r['widths']))} | {r['training_macs'] / 1e12:.0f}e12 | "
                  + " | ".join(f"{v:.4f}" for v in r["losses"]) + " |" for r in json.loads(path.read_text())]


def tables():
    """fig1d: arms of 30e12 training MACs; the others: 10e12."""
    rows = load()

    def arms(*experiments):
        return groups(rows, same, *experiments)

    def of(method):
        return [g for g in arms("table3", "variants") if g[0]["method"] == method and g[0]["widths"] in (
            [24], [36, 24, 8])]

    unified, mixed = of("unified"), of("multistage, mixed batches")
    return dict(
        multistage=table_arms(arms("fig1d")), multistage_table3=table_arms(arms("table3")),
        multistage_variants=table_arms(unified + of("multistage") + arms("variants")),
        multistage_table4=table_arms(mixed + arms("table4")),
        multistage_table7=table_arms(unified + mixed + arms("table7")),
        multistage_table1=table_arms(unified + mixed + arms("table1")),
        multistage_latent=table_latent(arms("table1 ldm")), multistage_clusterings=table_clusterings(rows),
        multistage_compute=table_compute(), multistage_losses=table_losses())


def figures(plt):
    """Fig. 1(d): FD against training compute."""
    if not curves():
        return
    fig, ax = plt.subplots(figsize=(6.5, 4))
    for name, points in curves().items():
        ax.plot([macs / 1e12 for macs, _ in points], [fd for _, fd in points], "o-", label=name)
    ax.axhline(curves()["unified"][-1][1], color="0.7", lw=1, zorder=0)
    r = next(r for r in load() if r["experiment"] == "curve")
    ax.set(xlabel="training MACs, backward included, 1e12", ylabel=f"FD[{r['extractor']}]@{r['n']}", yscale="log")
    ax.set_yticks([2, 3, 4, 5, 6, 8, 10], [2, 3, 4, 5, 6, 8, 10])
    ax.minorticks_off()
    ax.legend()
    fig.tight_layout()
    fig.savefig(FOLDER / "fig1d.png", dpi=110)
    plt.close(fig)
