"""The scripts stay equal where they repeat each other, and each stands alone with common.py."""
import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("c2f_trd", "lowdiff", "multistage", "postdiff")
SCRIPTS = [name for name in NAMES if (ROOT / f"{name}.py").is_file()]
TAG = "# differs: "


def definitions(source):
    """{name: (text, reason of the tag above it or None)} of the functions and classes at top level, and the
    numbers of the lines that hold a tag of none of them."""
    lines, found = source.split("\n"), {}
    tags = {i for i, line in enumerate(lines) if line.lstrip().startswith(TAG.strip())}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            above = lines[first - 1] if first > 0 else ""
            reason = above[len(TAG):].strip() if above.startswith(TAG) else None
            tags -= {first - 1} if reason else set()
            found[node.name] = "\n".join(lines[first:node.end_lineno]), reason
    return found, [i + 1 for i in sorted(tags)]


def complaints(sources):
    """What is wrong with the copies in {file: source}: one line each."""
    found, wrong = {}, []
    for file, source in sources.items():
        found[file], loose = definitions(source)
        wrong += [f"{file}:{line}: a tag without a reason, or not right above a top-level name" for line in loose]
    for name in dict.fromkeys(name for names in found.values() for name in names):
        copies = {file: names[name] for file, names in found.items() if name in names}
        plain = {file: text for file, (text, reason) in copies.items() if reason is None}
        tagged = {file: text for file, (text, reason) in copies.items() if reason is not None}
        if len(set(plain.values())) > 1:
            wrong.append(f"{name}: differs between {', '.join(plain)} without '{TAG}why' above it")
        if len(copies) == 1 and tagged:
            wrong.append(f"{name}: stale tag in {', '.join(tagged)}: no other file has this name")
        elif tagged and not plain:
            wrong.append(f"{name}: tagged in every file: one of them must be the original")
        wrong += [f"{name}: stale tag in {file}: its text is that of the others" for file, text in tagged.items()
                  if text in plain.values()]
    return wrong


def imports(source):
    """Names of all modules that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names} if node.level else {node.module.split(".")[0]}
    return found


def read(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def test_scripts_are_here():
    assert "c2f_trd" in SCRIPTS


def test_copies_are_equal():
    assert complaints({name: read(name) for name in SCRIPTS}) == []


def test_common_is_not_repeated():
    """Nothing of common.py is defined again in a script."""
    common, _ = definitions(read("common"))
    for name in SCRIPTS:
        assert not set(common) & set(definitions(read(name))[0]), name


# ---------------------------------------------------------------------------------------------
# The machine itself
# ---------------------------------------------------------------------------------------------
ONE = "import torch\n\n\ndef f(x):\n    return x  # why\n\n\nclass A:\n    def g(self):\n        return 1\n"
OTHER = ONE.replace("return x ", "return -x ")


def tagged(source, above, reason="its loss has a sign"):
    return source.replace(above, f"{TAG}{reason}\n{above}")


@pytest.mark.parametrize("sources, told", [
    ([ONE, OTHER], "f: differs between a, b"),
    ([ONE, ONE.replace("# why", "# because")], "f: differs"),                 # comments count
    ([ONE, ONE.replace("return 1", "return 2")], "A: differs"),
    ([ONE, ONE, OTHER], "f: differs between a, b, c"),
    ([ONE, ONE.replace("def f", "@torch.no_grad()\ndef f")], "f: differs"),   # decorators count
    ([ONE, tagged(ONE, "def f")], "f: stale tag in b: its text"),
    ([ONE, OTHER, tagged(OTHER, "def f")], "f: differs between a, b"),        # the tag is for one copy only
    ([ONE, tagged(OTHER, "def f"), OTHER], "f: differs between a, c"),
    ([tagged(ONE, "def f"), tagged(OTHER, "def f")], "f: tagged in every file"),
    ([tagged(ONE, "def f"), ONE.replace("def f", "def h")], "f: stale tag in a: no other file"),
    ([tagged(ONE, "def f")], "f: stale tag in a: no other file"),
    ([ONE, tagged(OTHER, "def f", "")], "b:4: a tag without a reason"),
    ([ONE, OTHER.replace("def f", f"{TAG}why\n\ndef f")], "b:4: a tag"),      # not right above
    ([ONE, ONE.replace("    def g", f"    {TAG}why\n    def g")], "b:9: a tag")])
def test_a_bad_copy_is_seen(sources, told):
    wrong = complaints(dict(zip("abc", sources)))
    assert any(told in line for line in wrong), wrong


@pytest.mark.parametrize("sources", [
    [ONE], [ONE, ONE], [ONE, ONE.replace("import torch", "import math")], [ONE, tagged(OTHER, "def f")],
    [ONE, tagged(OTHER, "def f"), ONE], [ONE, tagged(OTHER, "def f"), tagged(OTHER, "def f")],
    [ONE, tagged(ONE.replace("def f", "@torch.no_grad()\ndef f"), "@torch")],
    [ONE, tagged(ONE.replace("return 1", "return 2"), "class A")],
    [ONE, ONE.replace("def f", "def f2").replace("class A", "class B").replace("x", "y")]])
def test_good_copies_pass(sources):
    assert complaints(dict(zip("abc", sources))) == []


def test_an_edited_script_is_seen():
    """The real file against itself with one character changed in the middle."""
    source = read("c2f_trd")
    assert complaints({"a": source, "b": source}) == []
    broken = source.replace("1 - a_next", "1 + a_next", 1)
    assert broken != source and len(complaints({"a": source, "b": broken})) == 1


def test_imports_are_found():
    source = "import a.b, c\nfrom d.e import f\ndef g():\n    import h\n    from . import i\n"
    assert imports(source) == {"a", "c", "d", "h", "i"}


# ---------------------------------------------------------------------------------------------
# Each script stands alone
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_no_other(name):
    found = imports(read(name))
    assert not found & set(NAMES)
    optional = {"diffusers"} if name == "postdiff" else set()                 # its pipelines; inside functions only
    assert found <= {*sys.stdlib_module_names, "torch", "numpy", "common", *optional}, "what design.md allows"
    top = [n for n in ast.parse(read(name)).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert not imports("\n".join(map(ast.unparse, top))) & {"diffusers"}


def test_common_imports_no_script():
    found = imports(read("common"))
    assert not found & set(NAMES)
    assert found <= {*sys.stdlib_module_names, "torch", "numpy", "PIL", "scipy"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_starts_in_an_empty_folder(name, tmp_path):
    for file in (name, "common"):
        shutil.copy(ROOT / f"{file}.py", tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=tmp_path, env=env, capture_output=True,
                         text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage:") and "--train" in run.stdout
    left = {p.name for p in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {f"{name}.py", "common.py"}                                # it leaves nothing behind
