"""results/ledger.py: the papers' efficiency cells, counted anew, are those in the repository; the command line."""
import functools
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("results_ledger", ROOT / "results" / "ledger.py")
ledger = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ledger)
each_script = pytest.mark.parametrize("script", ledger.SCRIPTS)


@functools.cache
def rows_of(script):
    """The rows, counted once for all tests, as they come back from JSON."""
    return json.loads(json.dumps(ledger.load(script).rows()))


@each_script
def test_rows_are_the_tracked_ones(script):
    tracked = json.loads((ROOT / "results" / script / "ledger.json").read_text())
    rows = rows_of(script)
    if any("pip install diffusers" in row["note"] for row in rows):
        pytest.importorskip("diffusers")                               # optional: networks of SDXL and PixArt
    assert [row | dict(ours=None) for row in rows] == [row | dict(ours=None) for row in tracked]
    for row, old in zip(rows, tracked):
        ours = pytest.approx(old["ours"], rel=1e-9) if isinstance(old["ours"], float) else old["ours"]
        assert row["ours"] == ours, row


def agrees(paper, ours):
    """Within 1 % or half of the last printed digit; "< x" is a bound. None: cannot be compared."""
    if isinstance(paper, str) and paper.startswith("< "):
        return ours < float(paper.removeprefix("< "))
    if not all(isinstance(value, (int, float)) for value in (paper, ours)):
        return False
    return abs(ours - paper) <= max(0.01 * abs(paper), 0.5 * 10 ** -len(str(paper).partition(".")[2]))


@each_script
def test_what_is_off_says_why(script):
    rows = rows_of(script)
    assert all(set(row) >= {"table", "cell", "paper", "ours", "note"} for row in rows)
    printed = [row for row in rows if row["paper"] is not None]
    assert printed and not [row for row in printed if not row["note"] and not agrees(row["paper"], row["ours"])]


def test_sizes_of_the_papers_networks():
    """To the last printed digit; DDPM and EDM to the integer. Evaluations are the printed ones."""
    sizes = {row["cell"]: row["ours"] for row in rows_of("c2f_trd") + rows_of("lowdiff") if "parameters" in row["cell"]}
    assert sizes["CIFAR10: parameters"] == 35_746_307 and sizes["LSUN-Church: parameters"] == 113_673_219
    assert sizes["CIFAR10 edm 32: parameters"] == 55_733_891 and sizes["FFHQ edm 64: parameters"] == 61_805_571
    for row in rows_of("lowdiff"):
        if "parameters" in row["cell"]:
            assert row["note"] or abs(row["ours"] - row["paper"]) <= 10_000, row
        if ": NFE" in row["cell"]:
            assert row["ours"] == row["paper"], row


@each_script
def test_command_line_writes(script, tmp_path, monkeypatch, capsys):
    rows = rows_of(script)
    monkeypatch.setattr(ledger, "load", lambda name: SimpleNamespace(rows=lambda: rows_of(name)))
    ledger.main([script, "--out", str(tmp_path / "new")])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ledger.json"]           # and nothing half written
    assert json.loads((tmp_path / "new" / "ledger.json").read_text()) == rows
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows) and all(row["cell"] in line for row, line in zip(rows, printed))


def test_numbers_are_printed_short():
    assert [ledger.text(value) for value in (None, 35_746_307, 10.613532, 90.0, 1.5e6, "< 10")] == [
        "-", "35,746,307", "10.6135", "90", "1,500,000", "< 10"]


def run(*argv, script=ROOT / "results" / "ledger.py", cwd=ROOT):
    return subprocess.run([sys.executable, script, *argv], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("argv, word", [
    (["nonexist"], "nonexist"), ([], "script"), (["c2f_trd", "--outt", "x"], "--outt")])
def test_bad_command_line(argv, word):
    result = run(*argv)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and word in result.stderr and not result.stdout


def test_elsewhere_and_errors(tmp_path):
    """From any folder, a copy imports its own neighbours; what fails is one line and leaves the file alone."""
    folder = tmp_path / "repository" / "results" / "lowdiff"
    folder.mkdir(parents=True)
    for name in ("common.py", "results/ledger.py"):
        shutil.copy(ROOT / name, tmp_path / "repository" / name)
    (tmp_path / "repository" / "lowdiff.py").write_text("NFE = 35\n")
    (folder / "ledger.py").write_text("from lowdiff import NFE\n\n\ndef rows():\n"
                                      "    return [dict(table='2', cell='NFE', paper=35, ours=NFE, note='')]\n")
    script = folder.parent / "ledger.py"
    result = run("lowdiff", script=script, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.split() == ["2", "NFE", "35", "35"], result.stderr
    before = (folder / "ledger.json").read_text()
    for error in ("ValueError('no such cell')", "ModuleNotFoundError('no such cell')"):
        (folder / "ledger.py").write_text(f"def rows():\n    raise {error}\n")
        result = run("lowdiff", script=script, cwd=tmp_path)
        assert result.returncode == 1 and result.stderr == "ledger: error: no such cell\n"
        assert (folder / "ledger.json").read_text() == before
