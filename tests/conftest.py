"""The scripts lie in the folder above. The whole suite runs in two processes, a half of the files each: tests use
tensors so small that one thread is fastest."""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")                # for the processes that tests start, too
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "variants")]           # variants import each other by their bare names
OTHER = {}                                                   # the process of the other half, and the file of its output


def cost(file):
    """About the time that a test file takes: its bytes; those of the command lines count twice."""
    return file.stat().st_size * (2 if file.name == "test_cli.py" else 1)


def halves(files):
    """Two lists of test files, of about the same cost."""
    parts = [[], []]
    for file in sorted(files, key=cost, reverse=True):
        min(parts, key=lambda part: sum(map(cost, part))).append(file)
    return parts


def pytest_collection_modifyitems(config, items):
    files = {item.path for item in items}
    whole = all(Path(arg).is_dir() for arg in config.args)     # a file may be skipped as a whole
    if not whole or config.option.collectonly or "HALF_OF_THE_TESTS" in os.environ or config.option.keyword:
        return
    mine, others = halves(files)
    OTHER["output"] = tempfile.TemporaryFile("w+")
    OTHER["process"] = subprocess.Popen([sys.executable, "-m", "pytest", "-q", *map(str, others)], cwd=config.rootpath,
                                        env={**os.environ, "HALF_OF_THE_TESTS": "1"}, stdout=OTHER["output"],
                                        stderr=subprocess.STDOUT)
    config.hook.pytest_deselected(items=[item for item in items if item.path not in mine])
    items[:] = [item for item in items if item.path in mine]


def pytest_sessionfinish(session, exitstatus):
    if OTHER:
        stopped = exitstatus == 2                            # Ctrl-C
        OTHER["process"].kill() if stopped else None
        if OTHER["process"].wait() and not stopped:
            session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    if OTHER:
        OTHER["output"].seek(0)
        terminalreporter.section("the other half of the tests, in a process of its own")
        terminalreporter.write(OTHER["output"].read())
