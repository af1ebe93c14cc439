"""`python SCRIPT ARGV` in the tests' own process. The module is imported once for all calls, so that what it counts on
the meta device is counted once; what a test has put into common is put where the script imports it, for the call."""
import ast
import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import common


def start_script(module, *argv):
    """What the script does under `if __name__ == "__main__":` with these arguments: exit code, stdout, stderr."""
    source = Path(module.__file__)
    body = ast.parse(source.read_text()).body
    names = [alias.name for node in body if isinstance(node, ast.ImportFrom) and node.module == "common"
             for alias in node.names]
    guarded = ast.Module(body[-1].body, type_ignores=[])
    out, err, code = io.StringIO(), io.StringIO(), 0
    torch.manual_seed(67280421310721)                                # torch's own, that of a new process
    changed = {name: getattr(common, name) for name in names if name != "HERE"}
    with mock.patch.multiple(module, **changed), mock.patch.object(sys, "argv", [str(source), *map(str, argv)]):
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                exec(compile(guarded, str(source), "exec"), vars(module))
        except SystemExit as error:
            code = error.code or 0
            if isinstance(code, str):                                # what the interpreter does with it
                code = print(code, file=err) or 1
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())
