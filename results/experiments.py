"""What the files results/SCRIPT/experiments.py share: each of their functions makes one table or figure.

    python results/c2f_trd/experiments.py                      # what there is
    python results/c2f_trd/experiments.py headline steps       # these; lines are appended to results/c2f_trd/results.jsonl
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "results")) if p not in sys.path]
from evaluate import append_row, load_all, load_script, measure  # noqa: E402
from common import run_main  # noqa: E402


def record(script, experiment, argv="", arm="", seeds=3, n=2000, change=None, **fields):
    """Measures a command line of a script (or variant) for some seeds and appends the lines to the tracked results of
    the script. change(plan): another plan than the command line's. Returns the lines."""
    module = load_script(script)
    net, config, plan, device = load_all(module, argv.split())
    plan, rows = change(plan) if change else plan, []
    for seed in range(seeds):
        row = measure(module, net, config, plan, n, seed, experiment=experiment, arm=arm, **fields)
        print(f"{experiment} {arm or argv}, seed {seed}: FD[{row['extractor']}]@{n} {row['fd']:.3f}, "
              f"{row['macs_per_image'] / 1e6:,.0f} MMACs an image", flush=True)
        append_row(folder_of(script) / "results.jsonl", row)
        rows.append(row)
    return rows


def folder_of(script):
    """results/SCRIPT of a script or of a variant of it."""
    return next(f for f in sorted((ROOT / "results").iterdir(), reverse=True) if f.is_dir() and script.startswith(f.name))


def trained(script, name, argv):
    """The checkpoint of the run runs/NAME, which is trained now, or further, if it is not finished."""
    module, out, old = load_script(script), ROOT / "runs" / name, sys.argv
    resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
    sys.argv = [script, "--train", "--out", str(out), *(resume or argv.split())]
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
    for name in names:
        functions[name]()


def start(functions):
    """The command line of a results/SCRIPT/experiments.py."""
    run_main(lambda: main(functions), "experiments")
