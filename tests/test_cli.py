"""Every script by its command line, as a user runs it: train, kill, resume, search, sample, two processes, wrong use.

Where no process of its own is needed, the script runs in this one (start), as `python SCRIPT.py` would. A new script is
a line in in_process.SCRIPTS.
"""
import contextlib
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import common
from in_process import SCRIPTS, TINY, first_images, start_script

ROOT = Path(common.__file__).resolve().parent
each_script = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(scope="module", autouse=True)
def few_images_read_once():
    with mock.patch.object(common, "load_images", first_images):
        yield


@pytest.fixture(scope="module", autouse=True)
def tracked_files_are_left_alone():
    """No test may write into the repository."""
    files = [p for folder in ("results", "weights") for p in (ROOT / folder).rglob("*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in files if p.suffix in (".json", ".jsonl", ".pt")}
    yield
    assert before == {p: p.stat().st_mtime_ns for p in before}


def start(name, *argv, preview=False):
    """`python NAME.py ARGV` in this process: exit code, stdout, stderr. preview: draw the real one at each save."""
    module = importlib.import_module(name)
    with contextlib.ExitStack() as stack:
        if not preview:
            stack.enter_context(mock.patch.object(module, "preview", lambda *args: torch.zeros(1, 1, 4, 4)))
        return start_script(module, *argv)


def good(name, *argv, **options):
    result = start(name, *argv, **options)
    assert result.code == 0, result.err
    return result


def train_options(name, *more):
    return ["--train", *TINY, *SCRIPTS[name]["train"].split(), *more]


def sample_options(name, *more):
    return ["--sample", "--n", 6, *SCRIPTS[name]["sample"].split(), *more]


def spawn(*command, **options):
    """A process with the same number of threads (for equal bits), stopped by Ctrl-C even if pytest's own
    shell ignores it."""
    env = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()))
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def load(path):
    return torch.load(path, weights_only=True)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def equal(a, b):
    """Are two checkpoints, or parts of them, equal bit for bit?"""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def different(name, a, b):
    """The keys in which two checkpoints differ; --out, --n and the like are not of the training."""
    a, b = load(a), load(b)
    groups = importlib.import_module(name).CONFIG
    for saved in (a, b):
        saved["config"] = {k: v for k, v in saved["config"].items() if k not in {**groups["run"], **groups["method"]}
                           or k in ("seed", "precision")}
    return [key for key in a.keys() | b.keys() if not equal(a.get(key), b.get(key))]


def finite(path):
    saved = load(path)
    return all(v.isfinite().all() for part in ("net", "ema") for v in saved[part].values())


def one_line(name, result, *words):
    """The result of wrong use: exit status 1, one line of the script's, with these words in it."""
    lines = [s for s in result.err.splitlines() if " left " not in s]            # progress
    assert result.code == 1 and len(lines) == 1, result
    assert lines[0].startswith(f"{name}: ") and "Traceback" not in result.err + result.out
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


def tiles(path, n, columns=8, side=32):
    """The first n images of a grid, pixel by pixel (each is drawn at twice its size)."""
    a = np.asarray(Image.open(path)).astype(int)
    k = 2 * side + 2
    return [a[i // columns * k + 1:, i % columns * k + 1:][:2 * side:2, :2 * side:2] for i in range(n)]


@functools.cache
def trained(name, folder):
    """A run that nothing interrupts, and six images of it."""
    out = folder / name
    result = good(name, *train_options(name), *sample_options(name), "--out", out, preview=True)
    return SimpleNamespace(out=out, checkpoint=out / "checkpoint.pt", result=result)


@pytest.fixture
def run(name, tmp_path_factory):
    return trained(name, tmp_path_factory.getbasetemp())


# ---------------------------------------------------------------------------------------------
# Train, sample, search
# ---------------------------------------------------------------------------------------------
@each_script
def test_train_and_sample(name, run, tmp_path):
    saved = load(run.checkpoint)
    assert saved["script"] == name and saved["step"] == 12 and saved["config"]["channels"] == 1
    assert finite(run.checkpoint) and not equal(saved["net"], saved["ema"])
    log = lines_of(run.out / "log.jsonl")
    assert [(line["step"], line["images"]) for line in log] == [(k, 8 * k) for k in (6, 12)]
    assert all(0 < line["loss"] < 100 for line in log)
    assert Image.open(run.out / "preview.png").size == (8 * 66, 4 * 66)
    before = tiles(run.out / "samples.png", 6)
    assert len({tile.tobytes() for tile in before}) == 6
    for words in (f"checkpoint: {run.checkpoint}, 12 steps", "plan: ", "6 images", str(run.out / "samples.png")):
        assert words in run.result.out
    # Seed i makes image i: fewer of them, from another first seed, from the run in --out.
    shutil.copytree(run.out, tmp_path / "run")
    good(name, *sample_options(name, "--n", 3, "--seed", 2, "--out", tmp_path / "run"))
    for a, b in zip(tiles(tmp_path / "run" / "samples.png", 3), before[2:]):
        assert abs(a - b).max() <= 1
    # The small file beside the checkpoint gives the same images, but for half precision.
    good(name, *sample_options(name, "--out", tmp_path, "--checkpoint", run.out / "weights.pt"))
    assert 0 < np.mean([abs(a - b).mean() for a, b in zip(tiles(tmp_path / "samples.png", 6), before)]) + 1e-9 < 2
    assert (run.out / "weights.pt").stat().st_size < run.checkpoint.stat().st_size / 3
    assert not list(run.out.rglob("*.part"))


@each_script
def test_search(name, run, tmp_path):
    shutil.copytree(run.out, tmp_path / "run")
    module, before = importlib.import_module(name), set(os.listdir(run.out))
    with mock.patch.multiple(module, **SCRIPTS[name]["quick"]):
        result = good(name, "--search", *SCRIPTS[name]["search"].split(), "--out", tmp_path / "run")
        assert result.out.count("plan: ") == 1 and "images" not in result.out.splitlines()[-1]
        new = sorted(set(os.listdir(tmp_path / "run")) - before)
        assert len(new) == 1 and re.fullmatch("plan.*.json", new[0]), new
        assert isinstance(json.loads((tmp_path / "run" / new[0]).read_text()), dict)


@each_script
def test_another_seed_is_another_run(name, run, tmp_path):
    good(name, *train_options(name, "--seed", 1, "--out", tmp_path))
    a, b = load(tmp_path / "checkpoint.pt"), load(run.checkpoint)
    assert not equal(a["net"], b["net"]) and a["config"]["seed"] == 1


@each_script
def test_precision(name, tmp_path, monkeypatch):
    """auto: bf16 in training only, if the hardware has it; samples are of fp32."""
    monkeypatch.setattr(common, "has_fast_bf16", lambda device: True)
    asked, autocast = [], common.autocast
    monkeypatch.setattr(common, "autocast", lambda device, precision: asked.append(precision) or
                        autocast(device, precision))
    good(name, *train_options(name, "--precision", "auto", "--iters", 1, "--out", tmp_path))
    assert "bf16" in asked and load(tmp_path / "checkpoint.pt")["config"]["precision"] == "bf16"
    asked.clear()
    good(name, *sample_options(name, "--n", 1, "--out", tmp_path))
    assert set(asked) == {"fp32"}


def test_the_paper_from_a_base_model(tmp_path):
    """c2f_trd: fine-tuning on two resolutions, t*, TRD and images, in one command."""
    base = trained("c2f_trd", tmp_path.parent).checkpoint
    import c2f_trd
    with mock.patch.multiple(c2f_trd, REFERENCE_STEPS=10, CALIBRATION=4, PCA=32):
        result = good("c2f_trd", "--train", "--init", base, "--low", 16, "--batch", 8, "--iters", 5, "--precision",
                      "fp32", "--search", "--sample", "--n", 2, "--steps", 2, "--low-steps", 3, "--out", tmp_path)
    saved, before = load(tmp_path / "checkpoint.pt"), load(base)
    assert saved["net"].keys() - before["net"].keys() == {"label.weight"} and saved["config"]["ch"] == 8
    plan = json.loads((tmp_path / "plan_c2f+trd_dpm2_inclusive_2_3_0.json").read_text())
    assert len(plan["low_taus"]) == 3 and len(plan["high_taus"]) == 2 and f"high {plan['high_taus']}" in result.out
    mild = {k: (v - before["ema"][k]).abs().max() for k, v in saved["net"].items() if k in before["ema"]}
    assert max(mild.values()) < 0.01                                             # from its averaged weights
    again = good("c2f_trd", "--sample", "--n", 2, "--steps", 2, "--low-steps", 3, "--out", tmp_path)
    assert "TRD: loss" in result.out and "TRD" not in again.out                  # the plan is found again


# ---------------------------------------------------------------------------------------------
# Kill and resume
# ---------------------------------------------------------------------------------------------
# Each script is killed while it writes its second checkpoint. One process imports torch, a fork of it runs the script.
KILLED_WHILE_WRITING = """
import io, os, runpy, signal, sys, torch, common, in_process
common.load_images, save = in_process.first_images, torch.save
def killed(value, path):
    if "optimizer" in value and value["step"] == 12:
        whole = io.BytesIO()
        save(value, whole)
        with open(path, "wb") as file:
            file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    save(value, path)
torch.save = killed
torch.optim.Adam([torch.zeros(1, requires_grad=True)])         # what it imports, once for all forks
for script, *argv in JOBS:
    if not os.fork():
        sys.argv = [script, *argv]
        runpy.run_path(script, run_name="__main__")
        os._exit(0)
    print(os.WTERMSIG(os.wait()[1]), flush=True)
"""


def driver(code, jobs):
    """The code of a process for several scripts, with JOBS: [script, argument, ...] of each."""
    jobs = [[str(ROOT / f"{name}.py"), *map(str, argv)] for name, argv in jobs]
    return f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\nJOBS = {jobs}\n{code}"


@functools.cache
def killed(folder):
    jobs = [(name, train_options(name, "--out", folder / "killed" / name)) for name in SCRIPTS]
    out, err = spawn("-c", driver(KILLED_WHILE_WRITING, jobs)).communicate(timeout=300)
    assert out.split() == [str(int(signal.SIGKILL))] * len(jobs), out + err
    return folder / "killed"


@each_script
def test_kill_and_resume(name, run, tmp_path_factory):
    """kill -9 while a checkpoint is being written: the one before is whole, and the resumed run ends where the
    uninterrupted one does, bit for bit."""
    out = killed(tmp_path_factory.getbasetemp()) / name
    assert load(out / "checkpoint.pt")["step"] == 6
    good(name, "--train", "--resume", "--out", out)
    assert [line["step"] for line in lines_of(out / "log.jsonl")] == [6, 12]
    assert not different(name, out / "checkpoint.pt", run.checkpoint)


@each_script
def test_resume(name, run, tmp_path):
    """A finished run says so; it can be made longer, with what may change beside --resume and nothing else."""
    out = tmp_path / "run"
    shutil.copytree(run.out, out)
    resume, before = ("--train", "--resume", "--out", out), (out / "checkpoint.pt").read_bytes()
    one_line(name, start(name, *resume), "finished", "12 steps", "--iters")
    one_line(name, start(name, *resume, "--iters", 10), "finished")
    for option in (["--ch", 16], ["--batch", 4], ["--ema", 0.5], ["--seed", 5], ["--init", run.checkpoint]):
        one_line(name, start(name, *resume, "--iters", 30, *option), option[0], "--resume")
    one_line(name, start(name, *resume, "--iters", 30, "--data", "/nope/nope"), "/nope/nope")
    one_line(name, start(name, *train_options(name), "--out", out), "--resume", out)     # not over it
    assert (out / "checkpoint.pt").read_bytes() == before
    good(name, *resume, "--iters", 16, "--lr", 1e-4, "--save-every", 3)
    saved = load(out / "checkpoint.pt")
    config = dict(load(run.checkpoint)["config"], iters=16, lr=1e-4, save_every=3, out=str(out))
    of_sampling = importlib.import_module(name).CONFIG["method"]               # which a training does not keep
    assert saved["step"] == 16 and all(saved["config"][key] == config[key] for key in config if key not in of_sampling)
    assert [line["step"] for line in lines_of(out / "log.jsonl")] == [6, 12, 15, 16]


@each_script
def test_a_learning_rate_that_explodes(name, tmp_path):
    """Not a number: training stops with one line, the last good checkpoint stays, and --resume with a lower --lr works,
    as the line says."""
    step = torch.optim.Adam.step

    def explode(optimizer, *args):
        step(optimizer, *args)
        if optimizer.param_groups[0]["lr"] > 0.03:             # of step 7 on, by the warm-up of --lr 1
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    with mock.patch.object(torch.optim.Adam, "step", explode):
        result = start(name, *train_options(name, "--lr", 1, "--out", tmp_path))
        one_line(name, result, "not finite at step 12", tmp_path, "--resume", "--lr")
        assert load(tmp_path / "checkpoint.pt")["step"] == 6 and finite(tmp_path / "checkpoint.pt")
        assert not list(tmp_path.rglob("*.part"))
        good(name, "--train", "--resume", "--lr", 1e-3, "--out", tmp_path)
    saved = load(tmp_path / "checkpoint.pt")
    assert saved["step"] == 12 and saved["config"]["lr"] == 1e-3 and finite(tmp_path / "checkpoint.pt")


@each_script
def test_interrupted(name, tmp_path):
    """Ctrl-C: one line, and --resume goes on."""
    def interrupted(*args):
        raise KeyboardInterrupt

    with mock.patch.object(common, "save_grid", interrupted):
        one_line(name, start(name, *train_options(name, "--out", tmp_path)), "interrupted", "--resume")
    assert load(tmp_path / "checkpoint.pt")["step"] == 6 and not list(tmp_path.rglob("*.part"))
    good(name, "--train", "--resume", "--out", tmp_path)
    assert load(tmp_path / "checkpoint.pt")["step"] == 12


def test_ctrl_c_of_a_process_in_an_empty_folder(tmp_path):
    """A script and common.py alone, a folder of colour images, the default --out; then Ctrl-C."""
    for file in ("c2f_trd.py", "common.py"):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "images" / "cats").mkdir(parents=True)
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 33, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "cats" / f"{i}.png")
    process = spawn("c2f_trd.py", "--train", *TINY, "--data", "images", "--iters", 100000, cwd=tmp_path)
    out, deadline = tmp_path / "runs" / "c2f_trd", time.time() + 300
    while not (out / "log.jsonl").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if not line.startswith("train ")]
    assert process.returncode == 1 and len(lines) == 1 and lines[0].startswith("c2f_trd: interrupted"), err
    saved = load(out / "checkpoint.pt")
    assert saved["config"]["channels"] == 3 and saved["step"] % 6 == 0 and not list(tmp_path.rglob("*.part"))


# ---------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------
TWO_PROCESSES = """
import runpy, sys, torch.distributed as dist, common, in_process
common.load_images, stdout, end = in_process.first_images, sys.stdout, dist.destroy_process_group
dist.destroy_process_group = lambda: None                          # one group for all scripts
for script, *argv in JOBS:
    sys.argv, sys.stdout = [script, *argv], stdout
    runpy.run_path(script, run_name="__main__")
end()
"""


@functools.cache
def two_processes(folder):
    """All scripts, in turn, in the same two processes of torchrun."""
    (folder / "two").mkdir(exist_ok=True)
    jobs = [(name, [*train_options(name), *sample_options(name), "--device", "cpu", "--out", folder / "two" / name])
            for name in SCRIPTS]
    (folder / "two" / "driver.py").write_text(driver(TWO_PROCESSES, jobs))
    process = spawn("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", folder / "two" / "driver.py")
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.terminate()                                                    # torchrun ends its workers
    assert process.returncode == 0, out + err
    assert out.count("plan: ") == len(jobs), out                               # rank 1 is silent
    return folder / "two"


@each_script
def test_two_processes(name, run, tmp_path, tmp_path_factory):
    """As with one process, up to rounding: weights, images and their order; rank 1 writes nothing."""
    out = two_processes(tmp_path_factory.getbasetemp()) / name
    assert len(lines_of(out / "log.jsonl")) == 2
    one, two = load(run.checkpoint), load(out / "checkpoint.pt")
    assert two["step"] == 12 and sorted(os.listdir(out)) == sorted(os.listdir(run.out))
    for part in ("net", "ema"):
        assert two[part].keys() == one[part].keys()
        for k in one[part]:
            assert torch.allclose(two[part][k], one[part][k], atol=3e-4), (part, k)
    good(name, *sample_options(name, "--checkpoint", out / "checkpoint.pt", "--out", tmp_path))
    for a, b in zip(tiles(tmp_path / "samples.png", 6), tiles(out / "samples.png", 6)):
        assert abs(a - b).max() <= 1


# ---------------------------------------------------------------------------------------------
# Wrong use
# ---------------------------------------------------------------------------------------------
@each_script
def test_two_runs_in_one_folder(name, run, tmp_path):
    """The second is refused and leaves the first alone, whether it begins or resumes."""
    with common.locked(tmp_path / "new"):
        result = start(name, *train_options(name, "--out", tmp_path / "new"))
        one_line(name, result, f"process {os.getpid()}", tmp_path / "new", "--out")
    assert os.listdir(tmp_path / "new") == ["lock"]
    shutil.copytree(run.out, tmp_path / "run")
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    with common.locked(tmp_path / "run"):
        one_line(name, start(name, "--train", "--resume", "--iters", 30, "--out", tmp_path / "run"), "process")
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    assert load(tmp_path / "run" / "checkpoint.pt")["step"] == 12


@each_script
def test_out_that_cannot_be_written(name, run, tmp_path):
    (tmp_path / "file").write_text("a file, no folder")
    for out in (tmp_path / "file", tmp_path / "file" / "folder", "/proc/nope"):
        for argv in (sample_options(name, "--n", 1, "--checkpoint", run.checkpoint), train_options(name)):
            one_line(name, start(name, *argv, "--out", out), out)
    assert os.listdir(tmp_path) == ["file"]


@each_script
@pytest.mark.parametrize("argv, words", [
    ("", "nothing to do"), ("--sample --nope 3", "--nope"), ("--sample --n 0", "--n 0"), ("--sample --n ten", "ten"),
    ("--sample --ch 16", "--ch goes with --train"), ("--sample --resume", "--resume goes with --train"),
    ("--sample --seed 1" + 30 * "0", "--seed"), ("--sample --device tpu", "--device tpu"),
    ("--sample --checkpoint {tmp}/none.pt", "no checkpoint {tmp}/none.pt"),
    ("--sample --checkpoint {tmp}", "{tmp} is damaged or no checkpoint"),
    ("--train --resume", "no run in {tmp}/out"), ("--train --lr 0", "--lr"),
    ("--train --lr nan", "--lr"), ("--train --data nonexist", "nonexist"), ("--train --patch 3", "multiple"),
    ("--train --init {tmp}/none.pt", "{tmp}/none.pt"), ("--train --checkpoint a.pt", "--checkpoint"),
    ("--train --sample --batch 0", "--batch 0")])
def test_wrong_use(name, tmp_path, argv, words):
    """One line, exit status 1, nothing written."""
    argv = argv.format(tmp=tmp_path).split()
    tiny = train_options(name)[1:] if "--train" in argv and "--resume" not in argv else []
    one_line(name, start(name, argv[0] if argv else "--out", *([] if argv else [tmp_path / "out"]), *tiny, *argv[1:],
                         *(["--out", tmp_path / "out"] if argv else [])), words.format(tmp=tmp_path))
    assert not list(tmp_path.iterdir())


@each_script
def test_checkpoints_of_no_use(name, run, tmp_path):
    weights = run.out / "weights.pt"
    path, content, saved = tmp_path / "a.pt", weights.read_bytes(), load(weights)
    other = next(k for k in SCRIPTS if k != name) if len(SCRIPTS) > 1 else "other"
    nan = {k: v * float("nan") for k, v in saved["ema"].items()}
    part = dict(list(saved["ema"].items())[:-1])
    for value, word in ((content[:len(content) // 2], "damaged"), (dict(saved, script=other), f"'{other}'"),
                        ({k: v for k, v in saved.items() if k != "config"}, "older"), (dict(saved, ema=nan), "finite"),
                        (dict(saved, config=dict(saved["config"], ch=16)), "do not fit"),
                        (dict(saved, ema=dict(saved["ema"], more=torch.zeros(1))), "more"),
                        (dict(saved, ema=part), "do not fit")):
        path.write_bytes(value) if isinstance(value, bytes) else torch.save(value, path)
        one_line(name, start(name, *sample_options(name, "--checkpoint", path, "--out", tmp_path / "out")), path, word)
    one_line(name, start(name, *train_options(name, "--init", run.checkpoint, "--ch", 16), "--out", tmp_path / "out"),
             "do not fit")
    assert os.listdir(tmp_path) == ["a.pt"]


DAMAGED = {                    # what a hand may do to a checkpoint's configuration
    "all": [dict(mult="ab"), dict(mult=[1, 1.5]), dict(ch="8"), dict(ch=0), dict(attention=1), dict(blocks=None),
            dict(channels="3"), dict(patch=1.5), dict(batch=-1), dict(ema=float("nan"))],
    "c2f_trd": [dict(res=33), dict(low=5), dict(low="8"), dict(low=64)],
    "lowdiff": [dict(stages=[]), dict(stages=32), dict(stages=[16.0, 32.0]), dict(labels=5), dict(captions=None)],
    "multistage": [dict(edges=[0.5, 0.6]), dict(edges=[]), dict(edges=[float("nan")]), dict(edges=["a"]),
                   dict(widths=8), dict(res=33)],
    "postdiff": [dict(words=None), dict(words=[1, 2]), dict(captions="ab"), dict(low_share="x"), dict(res="32")]}


@each_script
def test_damaged_configurations(name, run, tmp_path):
    saved, path = load(run.out / "weights.pt"), tmp_path / "a.pt"
    network = list(importlib.import_module(name).CONFIG["network"])
    gone = [{k: v for k, v in saved["config"].items() if k != key} for key in ("mult", network[-1], "channels")]
    changed = [dict(saved["config"], **change) for change in DAMAGED["all"] * (name == "c2f_trd") + DAMAGED[name]]
    others = [dict(saved, config=None), dict(saved, config=[]), dict(saved, ema=None), dict(saved, ema=dict(a=1)),
              dict(saved, step="x")] * (name == "c2f_trd")     # common.py's, the same for all
    for value in [*(dict(saved, config=config) for config in gone + changed), *others]:
        torch.save(value, path)
        result = start(name, *sample_options(name, "--checkpoint", path, "--out", tmp_path / "out"))
        one_line(name, result, path, "damaged")
    assert os.listdir(tmp_path) == ["a.pt"]


@each_script
def test_resuming_what_is_no_run(name, run, tmp_path):
    """weights.pt under the name of a checkpoint; a checkpoint with a NaN, which a lower --lr does not mend."""
    saved = load(run.checkpoint)
    nan = {k: v * float("nan") for k, v in saved["net"].items()}
    for value, words in ((load(run.out / "weights.pt"), "--init"), (dict(saved, net=nan), "not finite"),
                         ({k: v for k, v in saved.items() if k != "optimizer"}, "--init")):
        torch.save(value, tmp_path / "checkpoint.pt")
        one_line(name, start(name, "--train", "--resume", "--iters", 30, "--out", tmp_path), tmp_path, words)


UNUSED = [("c2f_trd", "--sample --method base --low-steps 5", "--low-steps"),
          ("c2f_trd", "--search --method trd --t-star 300", "--t-star"),
          ("postdiff", "--sample --method base --k 3", "--k"), ("postdiff", "--sample --method mixed --m 0.5", "--m"),
          ("postdiff", "--sample --method cache --beta 0.5", "--beta"), ("postdiff", "--search --steps 9", "--search"),
          ("postdiff", "--search --s 0.2", "--search"), ("postdiff", "--sample --steps 0 --s 0.2", "--search"),
          ("postdiff", "--sample --n 1 --prompt cat dog", "--n 1"), ("multistage", "--sample --stages 4", "--search"),
          ("postdiff", "--train --iters 1 --sample --method base --beta 0.5", "--beta"),         # before the training
          ("multistage", "--train --iters 1 --sample --images emoji", "--search"),
          *((name, "--search --n 5", "--n goes with --sample") for name in SCRIPTS)]


@pytest.mark.parametrize("name, argv, words", UNUSED, ids=[f"{name} {argv}" for name, argv, _ in UNUSED])
def test_options_that_are_not_used(name, argv, words, tmp_path):
    if name in SCRIPTS:
        one_line(name, start(name, *argv.split(), "--out", tmp_path / "out"), words)
        assert not list(tmp_path.iterdir())


@each_script
def test_attention_beyond_the_levels(name, tmp_path):
    result = start(name, *train_options(name, "--attention", 2, "--out", tmp_path / "out"))
    one_line(name, result, "--attention 2", "0 to 1")
    good(name, *train_options(name, "--attention", -1, "--iters", 1, "--out", tmp_path / "out"))
    weights = load(tmp_path / "out" / "weights.pt")["ema"]
    assert [key for key in weights if "qkv.weight" in key] == ["encoder.mid.1.qkv.weight"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@each_script
def test_no_cuda(name, tmp_path):
    one_line(name, start(name, "--sample", "--device", "cuda", "--out", tmp_path), "--device cpu")


@each_script
def test_help(name):
    """On one screen: every option once, with its default."""
    result = good(name, "--help")
    config = importlib.import_module(name).CONFIG
    assert result.err == "" and len(result.out.splitlines()) < 60
    for key in [key for keys in config.values() for key in keys] + ["train", "search", "sample", "resume"]:
        assert re.search(rf"^  --{key.replace('_', '-')} ", result.out, re.M), key
