"""The papers' efficiency cells (parameters, MACs, evaluations) beside ours, counted now on the meta device.

    python results/ledger.py c2f_trd                 # or lowdiff, multistage, postdiff; seconds on a CPU

prints a line a cell (table, cell, printed value, ours, note) and writes results/SCRIPT/ledger.json. What is counted
is in results/SCRIPT/ledger.py: the paper's own network, run by the sampler of SCRIPT.py. Its `rows()` returns
[{table, cell, paper, ours, note}, ...]: paper is None where nothing is printed, ours None where we cannot tell.
"""
import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("c2f_trd", "lowdiff", "multistage", "postdiff")


def load(script):
    """The module results/SCRIPT/ledger.py; it imports SCRIPT.py and common.py from the folder above results/."""
    if sys.path[0] != str(ROOT):
        sys.path.insert(0, str(ROOT))
    path = ROOT / "results" / script / "ledger.py"
    spec = importlib.util.spec_from_file_location(f"ledger_of_{script}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(value):
    """A number as it is printed: at most four decimals, thousands apart; None as -."""
    if isinstance(value, float):
        return f"{value:,.4f}".rstrip("0").rstrip(".")
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def show(rows):
    """Prints a line a cell."""
    table, cell = (max(len(row[key]) for row in rows) for key in ("table", "cell"))
    for row in rows:
        print(f"{row['table']:{table}} {row['cell']:{cell}} {text(row['paper']):>15} {text(row['ours']):>17}  "
              f"{row['note']}".rstrip())


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.error = lambda message: sys.exit(f"ledger: error: {message}")                 # one line, exit status 1
    p.add_argument("script", choices=SCRIPTS)
    p.add_argument("--out", type=Path, help="folder of ledger.json (default: results/SCRIPT)")
    args = p.parse_args(argv)
    rows = load(args.script).rows()
    show(rows)
    from common import save_json                                                    # load has found its folder
    save_json((args.out or ROOT / "results" / args.script) / "ledger.json", rows)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"ledger: error: {error}")
