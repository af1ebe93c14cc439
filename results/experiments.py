"""What the files results/SCRIPT/experiments.py share: each of their functions makes one table or figure.

    python results/c2f_trd/experiments.py                      # what there is
    python results/c2f_trd/experiments.py headline steps       # these: lines of results/c2f_trd/results.jsonl
    python results/report.py                                   # then the tables and figures

A line has an experiment (the function) and an arm; beside what evaluate.py measures it may have `cells`, further
columns of its table. Networks are the shipped ones, or trained under runs/ when a function asks for them.
"""
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "results")) if p not in sys.path]
from evaluate import append_row, compared_with, cost_of, load_all, load_script, measure  # noqa: E402
from common import count_macs, parse_config, run_main, save_grid, sha256_of  # noqa: E402

ABLATION = 2.4e13              # forward MACs that train an arm of a table, where nothing else is said
COUNTED = 16, 32               # steps and images of them from which the MACs of a training are known


def opened(script, argv):
    """Module, network, configuration, plan and device of a command line. script: a name, or a changed copy of its
    module. Plans that it has to search go to a folder of that very network."""
    module, words = load_script(script) if isinstance(script, str) else script, shlex.split(argv)
    if "--out" not in words:
        words += ["--out", f"runs/plans/{sha256_of(words[words.index('--checkpoint') + 1])[:12]}"]
    return module, *load_all(module, words)


def record(script, experiment, argv, arm="", seeds=3, n=2000, change=None, cells=None, folder=None, **fields):
    """Measures a command line of a script, a variant or a changed copy for some seeds, and appends the lines to the
    tracked results of the script, or of another folder, but for those that they have already: what was broken off goes
    on, what another experiment measured is copied. change(plan): another plan than the command line's. cells: further
    columns of the table, or a function of (net, config, plan, device) that gives them. Returns the lines."""
    module, net, config, plan, device = opened(script, argv)
    plan, rows = change(plan) if change else plan, []
    path, own = folder_of(folder or module.SCRIPT) / "results.jsonl", dict(experiment=experiment, arm=arm or argv)
    lines = [dict(json.loads(line), path=p) for p in sorted(ROOT.glob("results/*/results.jsonl"))
             for line in p.read_text().splitlines()]
    known = dict(n=n, weights_sha256=sha256_of(config["checkpoint"]), data=compared_with(config, fields.get("data")))
    lines = [row for row in lines if all(row.get(k) == v for k, v in known.items()) and "fd" in row
             and untimed(row["plan"]) == untimed(json.loads(json.dumps(plan)))
             and row["extractor"].startswith(fields.get("extractor", "small").partition(":")[0])
             and "pool" not in fields]                         # whose features are wanted, not only the line
    there = {row["seed"]: row for row in lines if row.pop("path") == path and all(row[k] == v for k, v in own.items())}
    same = {row["seed"]: row for row in lines}                 # of any folder
    cells = {} if len(there) >= seeds else cells(net, config, plan, device) if callable(cells) else cells or {}
    for seed in range(seeds):
        if seed in there:
            rows.append(there[seed])
            continue
        told = {**own, "cells": cells, "method": config.get("method", module.SCRIPT), **fields}
        row = {**same[seed], **told} if seed in same else measure(module, net, config, plan, n, seed, **told)
        print(f"{experiment}, {arm or argv}, seed {seed}: FD[{row['extractor']}]@{n} {row['fd']:.3f}, "
              f"{row['macs_per_image'] / 1e6:,.0f} MMACs an image", flush=True)
        append_row(path, row)
        rows.append(row)
    return rows


def untimed(plan):
    """A plan without the seconds of its search, which differ when it is found again."""
    return {k: v for k, v in plan.items() if k != "seconds"}


def macs_of(script, argv):
    """MACs of an image of a command line of a script."""
    module, _, config, plan, _ = opened(script, argv)
    return cost_of(module, config, plan)["macs_per_image"]


def note(script, experiment, arm, cells, **fields):
    """Appends a line of what is no FD: cells {column: value}, and what only a figure needs."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    row = dict(experiment=experiment, arm=arm, cells=cells, **fields, device=device, torch=torch.__version__,
               source_sha256=sha256_of(load_script(script).SOURCE))
    print(f"{experiment}, {arm}: {cells}", flush=True)
    append_row(folder_of(script) / "results.jsonl", row)
    return row


def grid(script, name, lines, n=16):
    """results/SCRIPT/NAME.png: a row of n images, of the same seeds, of each command line of the script."""
    rows = []
    for argv in lines:
        module, net, config, plan, device = opened(script, argv)
        rows.append(module.sample(net, config, plan, range(n), device))
    save_grid(folder_of(script) / f"{name}.png", torch.cat(rows), columns=n)


def folder_of(script):
    """results/SCRIPT of a script or of a variant of it."""
    folders = sorted((f for f in (ROOT / "results").iterdir() if f.is_dir()), reverse=True)
    return next(f for f in folders if script.startswith(f.name))


def timed(*calls, rounds=5):
    """Median seconds of each call; they take turns, the first round warms up."""
    def seconds(call):
        begun = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begun
    return [median(column[1:]) for column in zip(*([seconds(call) for call in calls] for _ in range(rounds + 1)))]


def parameters(net):
    """Their number."""
    return sum(p.numel() for p in net.parameters())


def training_macs(module, config):
    """Forward MACs of the training of a configuration, an image: of batches that it would draw, on the CPU."""
    steps, batch = COUNTED
    config = dict(config, batch=batch)
    x, y = module.load_data(config)
    net, state = module.build_net(config), torch.get_rng_state()
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):                         # the fused attention of a CPU counts as nothing
        macs = sum(count_macs(module.training_loss, net, config, *module.draw_batch(config, x, y, step))
                   for step in range(steps))
    torch.set_rng_state(state)
    return macs / (steps * batch)


def iters_for(module, argv, macs):
    """Steps of a training, with these options, that takes `macs` forward MACs."""
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(module.SCRIPT, module.CONFIG, module.__doc__, ["--train", *shlex.split(argv)])
        config, _ = module.begin_run(module.SCRIPT, dict(config, out=f"{folder}/new"), module.CONFIG,
                                     torch.device("cpu"), 1)
        return max(1, round(macs / (training_macs(module, config) * config["batch"])))


def trained(script, name, argv, macs=None):
    """The checkpoint of the run runs/NAME, which is trained now, or further, if it is not finished, or the averaged
    weights that alone were kept of it. macs: its forward MACs, in place of --iters."""
    module, out, old = load_script(script), Path("runs") / name, sys.argv
    if (out / "weights.pt").exists() and not (out / "checkpoint.pt").exists():
        return out / "weights.pt"
    words = ["--resume"] if (out / "checkpoint.pt").exists() else shlex.split(argv)
    words += ["--iters", str(iters_for(module, argv, macs))] if macs and words != ["--resume"] else []
    sys.argv = [script, "--train", "--out", str(out), *words]
    try:
        module.main()
    except ValueError as error:
        if "is finished" not in str(error):
            raise
    finally:
        sys.argv = old
    return out / "checkpoint.pt"


def main(functions, argv=None):
    """Runs the functions that the command line names; without names says which there are."""
    functions = {f.__name__: f for f in functions}
    names = sys.argv[1:] if argv is None else argv
    unknown = [name for name in names if name not in functions]
    if unknown or not names:
        for name, function in functions.items():
            print(f"{name:14} {function.__doc__.splitlines()[0]}")
        if unknown:
            raise ValueError(f"no experiment '{unknown[0]}': choose from the list")
    os.chdir(ROOT)
    for name in names:
        functions[name]()


def start(functions):
    """The command line of a results/SCRIPT/experiments.py."""
    run_main(lambda: main(functions), "experiments")
