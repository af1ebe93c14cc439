"""The commands of README.md, of results/*/README.md and of the docstrings: each parses, the files they name are
there, and those of the blocks marked `<!-- run -->` are really run, in a copy of the repository."""
import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run

import common

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("results/*/README.md"))]
sys.path.append(str(ROOT / "variants"))
pytestmark = pytest.mark.skipif(not README.exists(), reason="no README.md")


def split(text):
    """The commands of a block of shell lines, each a list of words."""
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("$ ")
        words = [[]]
        for word in shlex.split(line, comments=True):
            words[-1].append(word) if word not in ("&&", ";") else words.append([])
        for command in words:
            while command and re.match(r"\w+=", command[0]):                   # OMP_NUM_THREADS=1 ...
                command = command[1:]
            if command:
                yield command


def commands():
    """(where, command) for the READMEs' blocks and code in their text, and for the docstrings of the scripts."""
    if not README.exists():
        return
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
        inline = re.findall(r"(?<!`)`((?:\w+=\S+ )*(?:python|torchrun|sh) [^`\n]+)`", text)
        for code in blocks + inline:
            for command in split(code):
                yield str(page.relative_to(ROOT)), command
    for script in sorted(ROOT.glob("*.py")):
        doc = ast.get_docstring(ast.parse(script.read_text())) or ""
        for line in re.findall(r"^ +((?:python|torchrun) .*)$", doc, re.M):
            for command in split(line):
                yield script.name, command


def is_placeholder(word):
    return re.fullmatch(r"[A-Z_]+", word) is not None


def parse(name, argv):
    """A command line of a script as the script reads it; files that it names are there."""
    argv = [str(ROOT / "data") if word == "FOLDER" else word for word in argv]
    module = importlib.import_module(name)
    if not hasattr(module, "CONFIG"):
        return
    config = common.parse_config(name, module.CONFIG, module.__doc__, argv)
    for key in ("checkpoint", "init", "data"):
        value = config.get(key) or ""
        if "/" in value and not value.startswith(("runs/", "/")) and not is_placeholder(value):
            assert (ROOT / value).exists(), value


def evaluate_options(words):
    """Options of results/evaluate.py itself, and the rest, which are a script's."""
    values = ("--n", "--seeds", "--data", "--inception", "--extractor", "--against", "--experiment", "--arm",
              "--results")
    own, rest, i = [], [], 0
    while i < len(words):
        k = 2 if words[i] in values else 1
        (own if words[i] in (*values, "--per-class", "--speed") else rest).extend(words[i:i + k])
        i += k
    return own, rest


@pytest.mark.parametrize("where, command", list(commands()), ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_command(where, command):
    program, *words = command
    if program == "torchrun":                                        # as torchrun itself would read it
        parsed = torch.distributed.run.parse_args(words)
        program, words = "python", [parsed.training_script, *parsed.training_script_args]
    if program == "sh":
        assert (ROOT / words[0]).is_file()
    elif program == "pip":
        for name in words[words.index("-r") + 1:][:1] if "-r" in words else []:
            assert (ROOT / name).is_file()
    elif program == "python" and words[0] == "-m":
        assert words[1] in ("pytest", "pip", "venv")
    elif program == "python":
        script = ROOT / words[0]
        assert script.is_file()
        if script.parent in (ROOT, ROOT / "variants") and words[1:]:
            parse(script.stem, words[1:])
        elif words[0] == "results/evaluate.py":
            own, rest = evaluate_options(words[2:])
            parse(words[1], [*rest, "--sample"])
        elif words[0].endswith("experiments.py"):
            functions = re.findall(r"^def (\w+)", script.read_text(), re.M)
            assert set(words[1:]) <= set(functions)
        elif words[0] == "results/ledger.py":
            assert (ROOT / "results" / words[1] / "ledger.py").is_file()
    else:
        assert program in ("git", "cd", "mkdir", "curl", "apt", "grep"), f"what is {program}?"


def test_there_are_commands():
    found = [" ".join(command) for where, command in commands() if where == "README.md"]
    for action in ("--sample", "--train", "evaluate.py", "ledger.py", "-m pytest"):
        assert any(action in command for command in found), action
    with pytest.raises(ValueError, match="no-such-option"):
        parse("c2f_trd", ["--sample", "--no-such-option"])


def test_links():
    """Files that the READMEs link to or show are there."""
    for page in PAGES:
        links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text())
        assert links and not [link for link in links if not (page.parent / link).exists()]


def test_tables_are_what_the_report_makes(tmp_path):
    """Every table of the READMEs comes out of results.jsonl and the ledgers; an edited cell is put right."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    text = README.read_text()
    assert "| multistage | Table 5, 1: total: parameters, M | 237 |" in text
    (tmp_path / "README.md").write_text(text.replace("parameters, M | 237 |", "parameters, M | 238 |"))
    run = "import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", run, tmp_path / "results" / "report.py"], capture_output=True,
                            text=True, env=dict(os.environ, PYTHONPATH=str(tmp_path / "results")), timeout=300)
    assert result.returncode == 0, result.stderr
    for page in PAGES:
        assert (tmp_path / page.relative_to(ROOT)).read_text() == page.read_text(), page


def test_one_minute(tmp_path):
    blocks = re.findall(r"<!-- run -->\s*^```sh\n(.*?)^```", README.read_text(), re.M | re.S)
    assert blocks
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    shutil.copytree(ROOT / "weights", tmp_path / "weights")
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "README.md").symlink_to(README)
    for program, *words in (command for block in blocks for command in split(block)):
        if program in ("pip", "git", "cd") or words[:1] == ["-m"]:             # has been done, or is being done
            continue
        assert program == "python", program
        result = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True,
                                timeout=300)
        assert result.returncode == 0, result.stderr
        images = re.findall(r"\S+\.png", result.stdout)
        assert images or "--sample" not in words
        assert all((tmp_path / image).stat().st_size > 1000 for image in images)
