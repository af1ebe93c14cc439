"""`python SCRIPT ARGV` in the tests' own process. The module is imported once for all calls, so that what it counts on
the meta device is counted once; what a test has put into common is put where the script imports it, for the call."""
import ast
import contextlib
import functools
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import common

# A network and a training of a second, in fp32 on every machine. For each script: what else its training, sampling
# and search are given, and the constants that the search is cut down to.
TINY = ("--ch 8 --mult 1 2 --attention 1 --patch 2 --data fashion10k --batch 8 --iters 12 --save-every 6 "
        "--precision fp32").split()
SCRIPTS = {
    "c2f_trd": dict(train="", sample="--method base --solver ddim --steps 4", search="--method trd --steps 3",
                    quick=dict(REFERENCE_STEPS=10, CALIBRATION=4)),
    "lowdiff": dict(train="--stages 16 32", sample="--steps 3 3 --truncate 2", search="--steps 3 3 --truncate 3",
                    quick=dict(SEARCH_N=140, REFERENCE_N=300, SHIFTS=(-1, 0))),
    "multistage": dict(train="--widths 12 8 --edges 0.5", sample="--nfe 6", search="--stages 2 --nfe 6",
                       quick=dict(cluster_timesteps=lambda *args: ([0.4], dict(edges=[0.4])))),
    "postdiff": dict(train="", sample="--steps 4", search="--steps 0",
                     quick=dict(CALIBRATION=2, REFERENCE_STEPS=4, STEPS=(2,), SHARES=(0, 0.5), BUDGET=1)),
}


@functools.cache
def first_images(*args, load_images=common.load_images):
    """load_images, but 500 images at most: what the tests put in its place, here and in processes of their own."""
    x, y, captions = load_images(*args)
    return x[:500], y[:500], captions


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
