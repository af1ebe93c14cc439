"""The house's rules (budgets, shared text, imports) on the real files, and each rule on a file that breaks it."""
import ast
import difflib
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from in_process import SCRIPTS, TINY, start_script

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("c2f_trd", "lowdiff", "multistage", "postdiff")
SAME = ("timestep_embedding", "ResBlock", "Attention", "down", "up", "sample", "train", "load_net", "main")
# Lines, bytes. Where a file is above its aim (c2f_trd.py 600 lines; common.py 520, 27,000 bytes) it may not grow.
BUDGETS = {"c2f_trd": (641, 36_000), "lowdiff": (600, 36_000), "multistage": (650, 36_000), "postdiff": (650, 36_000),
           "common": (742, 41_300), "a variant": (350, 18_000)}
BANNERS = ["Network", "Method", "Data and loss", "Samplers", "Search", "Train", "Main"]
RULE = "# " + 93 * "-"


def read(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


SOURCES = {name: read(name) for name in NAMES}
PAIRS = list(itertools.combinations(NAMES, 2))


# ---------------------------------------------------------------------------------------------
# The rules: each returns what is wrong, one line each
# ---------------------------------------------------------------------------------------------
def over_budget(source, lines, size):
    found = len(source.splitlines()), len(source.encode())
    wrong = [f"{n} {unit}, at most {most}" for n, most, unit in zip(found, (lines, size), ("lines", "bytes"))
             if n > most]
    return wrong + [f"line {i}: {len(line)} columns, at most 120" for i, line in enumerate(source.splitlines(), 1)
                    if len(line) > 120]


def long_docstring(source):
    n = ast.parse(source).body[0].end_lineno
    return [f"docstring of {n} lines, below 25"] if n >= 25 else []


def config_of(source):
    """{group: {option: its text in the source}} of CONFIG."""
    value = next(node.value for node in ast.parse(source).body
                 if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONFIG")
    return {group.value: {key.value: ast.unparse(option) for key, option in zip(keys.keys, keys.values)}
            for group, keys in zip(value.keys, value.values)}


def bad_options(sources):
    """More than 30; other groups; group "run" that differs but for the folder's name."""
    wrong, runs = [], {}
    for name, source in sources.items():
        groups = config_of(source)
        n = sum(map(len, groups.values()))
        wrong += [f"{name}: {n} options, at most 30"] if n > 30 else []
        usual = ["run", "network", "training", "method"]       # and, multistage's, search
        wrong += [f"{name}: groups {list(groups)}"] if list(groups) not in (usual, [*usual, "search"]) else []
        runs[name] = str({k: v.replace(f"runs/{name}", "") for k, v in groups["run"].items()})
    return wrong + ([f"the options of group run differ: {', '.join(runs)}"] if len(set(runs.values())) > 1 else [])


def definitions(source):
    """{name: text} of the functions and classes at top level, decorators and comments included; "end": the guard."""
    lines, found = source.split("\n"), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            found[node.name] = "\n".join(lines[first:node.end_lineno])
        elif isinstance(node, ast.If):
            found["end"] = "\n".join(lines[node.lineno - 1:])
    return found


def different_text(sources):
    """Of SAME and the last lines."""
    found, wrong = {name: definitions(source) for name, source in sources.items()}, []
    for key in (*SAME, "end"):
        lacking = [name for name in found if key not in found[name]]
        wrong += [f"{key}: not in {', '.join(lacking)}"] if lacking else []
        if len({found[name][key] for name in found if name not in lacking}) > 1:
            wrong.append(f"{key}: its text differs between {', '.join(n for n in found if n not in lacking)}")
    return wrong


def network(source):
    """The lines of the network section, without the docstrings of its classes: each says what it is."""
    section = re.search(r"\n# Network: .*?\n# -+\n(.*?)\n# -{9,}\n# ", source, re.S)[1]
    lines, classes = section.split("\n"), [node for node in ast.parse(section).body if isinstance(node, ast.ClassDef)]
    texts = [node.body[0] for node in classes if ast.get_docstring(node)]
    return [line for i, line in enumerate(lines, 1) if not any(t.lineno <= i <= t.end_lineno for t in texts)]


def different_networks(a, b):
    """Places of two network sections that differ without a METHOD tag."""
    a, b = network(a), network(b)
    hunks = [(a[i:j], b[k:m]) for op, i, j, k, m in difflib.SequenceMatcher(None, a, b, False).get_opcodes()
             if op != "equal"]
    return [" / ".join([*mine, "->", *theirs]) for mine, theirs in hunks
            if not any("METHOD" in line for line in [*mine, *theirs])]


def too_far(a, b):
    """Less than half of the shorter file identical, or more than 650 changed lines."""
    a, b = a.splitlines(), b.splitlines()
    same = sum(block.size for block in difflib.SequenceMatcher(None, a, b, False).get_matching_blocks())
    share, changed = same / min(len(a), len(b)), len(a) + len(b) - 2 * same
    return ([f"{100 * share:.0f} % in common, at least 50"] if share < 0.5 else []) + (
        [f"{changed} changed lines, at most 650"] if changed > 650 else [])


def banners(source):
    return [title.split(":")[0] for title in re.findall(rf"^{RULE[:20]}-*\n# (.*)\n{RULE[:20]}-*$", source, re.M)]


def imports(source):
    """Names of all modules that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            found |= set((node.module or "").split(".")) | ({a.name for a in node.names} if node.level or
                                                            node.module in ("variants", "results") else set())
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and \
                isinstance(node.args[0], ast.Constant):
            found |= set(node.args[0].value.split("."))
    return found - {""}


def bad_imports(sources, variants):
    """sources: {path: text}. common and a script import no script; a variant is for its experiments, its
    tests and another variant only."""
    wrong = []
    for path, source in sources.items():
        found, path = imports(source), Path(path)
        if path.stem in (*NAMES, "common") and len(path.parts) == 1:
            wrong += [f"{path} imports {name}" for name in sorted(found & {*NAMES, "results", "variants"})]
            wrong += [f"{path} imports {name}" for name in ("diffusers", "scipy", "matplotlib") if name in found]
        if path.parts[0] not in ("tests", "variants") and path.name != "experiments.py":
            wrong += [f"{path} imports the variant {name}" for name in sorted(found & set(variants))]
    return wrong


# ---------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------
VARIANTS = sorted(p.stem for p in (ROOT / "variants").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", [*NAMES, "common", *(f"variants/{name}" for name in VARIANTS)])
def test_budget(name):
    assert over_budget(read(name), *BUDGETS.get(name, BUDGETS["a variant"])) == []


@pytest.mark.parametrize("name", NAMES)
def test_docstring_and_banners(name):
    assert long_docstring(SOURCES[name]) == [] and banners(SOURCES[name]) == BANNERS


def test_options():
    assert bad_options(SOURCES) == []


def test_shared_text():
    assert different_text(SOURCES) == []


@pytest.mark.parametrize("a, b", PAIRS)
def test_networks(a, b):
    assert different_networks(SOURCES[a], SOURCES[b]) == []


@pytest.mark.parametrize("a, b", PAIRS)
def test_distance(a, b):
    assert too_far(SOURCES[a], SOURCES[b]) == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_common_is_repeated(name):
    assert not set(definitions(read("common"))) & set(definitions(SOURCES[name]))


def test_imports():
    skip = {".git", "runs", ".venv", "venv"}
    files = [p.relative_to(ROOT) for p in ROOT.rglob("*.py")]
    sources = {p: (ROOT / p).read_text(encoding="utf-8") for p in files if not skip & set(p.parts)}
    assert bad_imports(sources, VARIANTS) == []


def test_each_script_samples_in_an_empty_folder(tmp_path):
    """With common.py alone beside it, from a checkpoint. One process for all: each gets its own common.py."""
    for name in NAMES:
        (tmp_path / name).mkdir()
        for file in (f"{name}.py", "common.py"):
            shutil.copy(ROOT / file, tmp_path / name)
        argv = [*TINY, *SCRIPTS[name]["train"].split(), "--iters", 1, "--out", tmp_path / "runs" / name]
        result = start_script(importlib.import_module(name), "--train", *argv)
        assert result.code == 0, result.err
        (tmp_path / "runs" / name / "weights.pt").rename(tmp_path / name / "weights.pt")
    code = ("import os, runpy, sys\n"
            "for name, options in " + repr({name: SCRIPTS[name]["sample"].split() for name in NAMES}) + ".items():\n"
            f"    os.chdir(os.path.join({str(tmp_path)!r}, name))\n"
            "    sys.modules.pop('common', None)\n"
            "    sys.path[0] = os.getcwd()\n"
            "    sys.argv = [name + '.py', '--sample', '--checkpoint', 'weights.pt', '--n', '2', *options]\n"
            "    runpy.run_path(name + '.py', run_name='__main__')\n"
            "    assert sys.modules['common'].__file__.startswith(os.getcwd())\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True,
                         timeout=300)
    assert run.returncode == 0, run.stderr
    for name in NAMES:
        found = {p.name for p in (tmp_path / name).iterdir()} - {"__pycache__"}
        assert found == {f"{name}.py", "common.py", "weights.pt", "runs"}
        assert (tmp_path / name / "runs" / name / "samples.png").is_file()


# ---------------------------------------------------------------------------------------------
# The rules on files that break them
# ---------------------------------------------------------------------------------------------
GOOD = SOURCES["c2f_trd"]


def edited(old, new, source=GOOD):
    assert source.count(old) >= 1, old
    return source.replace(old, new, 1)


@pytest.mark.parametrize("source, told", [
    (620 * "x\n" + "y\n", "621 lines, at most 620"), (300 * (119 * "x" + "\n") + "y\n", "36002 bytes, at most 36000"),
    ("x = 1\n" + 121 * "y" + "\n", "line 2: 121 columns"), (619 * "x\n" + "é" * 34_763, "bytes")])
def test_a_file_over_its_budget(source, told):
    assert any(told in line for line in over_budget(source, 620, 36_000))


def test_a_long_docstring():
    assert long_docstring('"""' + 24 * "\n" + '"""') == ["docstring of 25 lines, below 25"]
    assert long_docstring('"""' + 23 * "\n" + '"""') == []


def test_too_many_options():
    more = "".join(f'"more{i}": (0, (0, 1), "more"), ' for i in range(30))
    wrong = bad_options({"a": edited('"method": {', '"method": {' + more)})
    assert any("options, at most 30" in line for line in wrong)
    assert bad_options({"a": edited('"training": {', '"other": {')}) != []
    assert bad_options({"a": GOOD, "b": edited('"images of --sample"', '"pictures of --sample"')}) == [
        "the options of group run differ: a, b"]
    assert bad_options({"a": GOOD, "b": GOOD}) == []


@pytest.mark.parametrize("old, new, told", [
    ("x = self.conv1(F.silu(", "x = self.conv1(F.relu(", "ResBlock: its text differs between a, b"),
    ("loss.backward()", "loss.backward()  # why", "train: its text differs"),       # comments count
    ("def main():", "@torch.no_grad()\ndef main():", "main: its text differs"),     # decorators count
    ("def up(", "def rise(", "up: not in b"),
    ("    run_main(main, SCRIPT)", "    main()", "end: its text differs")])
def test_a_bad_copy(old, new, told):
    wrong = different_text({"a": GOOD, "b": edited(old, new)})
    assert len(wrong) == 1 and wrong[0].startswith(told), wrong
    assert different_text({"a": GOOD, "b": GOOD}) == []


def test_networks_that_differ_without_a_tag():
    line = "        emb = F.silu(emb)\n"
    assert different_networks(GOOD, GOOD) == []
    assert different_networks(GOOD, edited(line, line + "        emb = 2 * emb\n")) == ["-> /         emb = 2 * emb"]
    assert different_networks(GOOD, edited(line, line + "        emb = 2 * emb  # METHOD: louder\n")) == []
    assert len(different_networks(GOOD, edited(line, "        emb = F.relu(emb)\n"))) == 1
    assert different_networks(GOOD, edited(line, "        emb = F.relu(emb)  # METHOD\n")) == []
    assert different_networks(GOOD, edited("    begun, B, S = time", "    B, begun, S = time")) == []        # not here


def test_files_that_are_too_far_apart():
    a = "".join(f"{i}\n" for i in range(400))
    assert too_far(a, a) == [] and too_far(a, a[:a.index("200\n")] + 199 * "new\n") == []
    assert too_far(a, a[:a.index("199\n")] + 201 * "new\n") == ["50 % in common, at least 50"]
    b = "".join(f"{i}\n" for i in range(700))
    assert too_far(b, b[:b.index("374\n")] + 326 * "new\n") == ["652 changed lines, at most 650"]


def test_banners_in_another_order():
    block = re.search(rf"{RULE[:20]}-*\n# Train\n{RULE[:20]}-*\n", GOOD)[0]
    assert banners(GOOD.replace(block, "")) != BANNERS and banners(block + GOOD.replace(block, "")) != BANNERS


@pytest.mark.parametrize("path, source, told", [
    ("common.py", "import lowdiff\n", "common.py imports lowdiff"),
    ("lowdiff.py", "def f():\n    from c2f_trd import train\n", "lowdiff.py imports c2f_trd"),
    ("lowdiff.py", "import importlib\nimportlib.import_module('postdiff')\n", "lowdiff.py imports postdiff"),
    ("lowdiff.py", "from results import evaluate\n", "lowdiff.py imports results"),
    ("lowdiff.py", "import diffusers\n", "lowdiff.py imports diffusers"),
    ("lowdiff.py", "from variants.dit import x\n", "lowdiff.py imports the variant dit"),
    ("results/lowdiff/ledger.py", "import dit\n", "results/lowdiff/ledger.py imports the variant dit")])
def test_a_bad_import(path, source, told):
    assert told in bad_imports({path: source}, ["dit"])


@pytest.mark.parametrize("path, source", [
    ("common.py", "import torch.nn as nn\nfrom PIL import Image\n"), ("lowdiff.py", "from common import f\n"),
    ("variants/dit.py", "import lowdiff\n"), ("variants/other.py", "from variants.dit import f\n"),
    ("results/lowdiff/experiments.py", "from variants import dit\n"),
    ("tests/test_dit.py", "import dit\n"), ("results/ledger.py", "import lowdiff\n")])
def test_a_good_import(path, source):
    assert bad_imports({path: source}, ["dit"]) == []


def test_no_folder_stands_in_for_a_package():
    """results/ is on the path: a folder there would be imported in place of an optional package of its name."""
    found = {f.name: importlib.util.find_spec(f.name) for f in (ROOT / "results").iterdir() if f.is_dir()}
    assert [name for name, spec in found.items()
            if spec and spec.origin and not Path(spec.origin).is_relative_to(ROOT)] == []
