"""c2f_trd.py by its command line, with the preset tiny: train, kill, resume, search, sample, evaluate;
two processes; every bad input ends in one line.

Where no process of its own is needed, the script runs in this one (start), as `python c2f_trd.py` would.
"""
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

import numpy as np
import pytest
import torch
from PIL import Image

import c2f_trd
import common
from in_process import start_script

ROOT = Path(common.__file__).resolve().parent
SCRIPT = ROOT / "c2f_trd.py"
TINY = "--preset tiny --precision fp32 --batch 8 --iters 20 --finetune-iters 20 --save-every 5".split()
SEARCH = "--pca 64 --low-steps 3 --steps 3 --sweeps 2".split()
BASE = "--method base --solver ddim --steps 4".split()


def start(*argv):
    """`python c2f_trd.py ARGV` in this process: exit code, stdout, stderr."""
    return start_script(c2f_trd, *argv)


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


def only(folder, pattern):
    """The one file that fits the pattern."""
    found = list(Path(folder).glob(pattern))
    assert len(found) == 1, (pattern, sorted(map(str, Path(folder).rglob("*"))))
    return found[0]


def equal(a, b):
    """Are two checkpoints, or parts of them, equal bit for bit?"""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def finite(path):
    saved = load(path)
    return all(v.isfinite().all() for part in ("net", "ema") for v in saved[part].values())


def one_line(result, *words):
    """The result of a bad input: exit code 1, one line of the script's, with these words in it."""
    lines = [s for s in result.err.splitlines() if not re.match(r"(train|sample|TRD)\b.* left ", s)]
    assert result.code == 1 and len(lines) == 1, result
    assert lines[0].startswith("c2f_trd: error: ") and "Traceback" not in result.err + result.out
    for word in words:
        assert str(word) in lines[0], (word, lines[0])
    return lines[0]


def tiles(path, n, columns=8, side=32):
    """The first n images of a grid, pixel by pixel (each is drawn at twice its size)."""
    a = np.asarray(Image.open(path))
    k = 2 * side + 2
    return [a[i // columns * k + 1:, i % columns * k + 1:][:2 * side:2, :2 * side:2] for i in range(n)]


@pytest.fixture(scope="module", autouse=True)
def repository_is_left_alone(tmp_path_factory):
    """No test may write into the results of the repository."""
    yield
    for path in (ROOT / "results").rglob("*.jsonl"):
        assert str(tmp_path_factory.getbasetemp()) not in path.read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that nothing interrupts, with its search and six samples."""
    out, notes, progress = tmp_path_factory.mktemp("trained"), [], common.progress

    def noted(items, title, unit=1, every=15.0, note=lambda: ""):
        for item in progress(items, title, unit, every, note):
            yield item
            notes.append((title, note()))

    common.progress = noted
    try:
        result = start("--train", "--search", "--sample", "--n", 6, *TINY, *SEARCH, "--out", out,
                       "--results", out / "results.jsonl")
    finally:
        common.progress = progress
    assert result.code == 0, result.err
    checkpoint = only(out, "*/checkpoint.pt")
    return SimpleNamespace(out=out, checkpoint=checkpoint, run=checkpoint.parent, result=result, notes=notes)


# ---------------------------------------------------------------------------------------------
# Train, search, sample
# ---------------------------------------------------------------------------------------------
def test_train(trained):
    saved = load(trained.checkpoint)
    assert saved["script"] == "c2f_trd" and saved["phase"] == "finetune" and saved["step"] == 40
    assert saved["images_seen"] == 320 and saved["channels"] == 1
    assert {"net", "ema", "base", "optimizer", "args"} <= saved.keys()
    assert finite(trained.checkpoint) and not equal(saved["net"], saved["ema"])
    log = lines_of(trained.run / "log.jsonl")
    assert [line["step"] for line in log] == list(range(5, 45, 5))
    assert [line["phase"] for line in log] == ["base"] * 4 + ["finetune"] * 4
    assert [line["images_seen"] for line in log] == list(range(40, 360, 40))
    assert 0 < log[3]["loss"] < log[0]["loss"] < 2                   # it learns; noise predicted as 0 costs 1
    assert not list(trained.out.rglob("*.part"))


def test_progress_shows_a_loss_at_every_step(trained):
    shown = [note for title, note in trained.notes if title.startswith("train")]
    assert len(shown) == 40
    assert not [note for note in shown if float(note.split()[1]) == 0]       # also just after a save


def test_the_seed_decides_the_first_weights(tmp_path):
    """--lr 0 leaves them as they were: equal for equal seeds, whatever has been drawn before."""
    nets = []
    for i, seed in enumerate((0, 0, 1)):
        torch.rand(7 + i)
        result = start("--train", *TINY, "--iters", 1, "--finetune-iters", 1, "--lr", 0, "--seed", seed, "--out",
                       tmp_path / str(i))
        assert result.code == 0, result.err
        nets.append(load(only(tmp_path / str(i), "*/checkpoint.pt"))["base"]["conv_in.weight"])
    assert nets[0].equal(nets[1]) and not nets[0].equal(nets[2])


def test_search(trained):
    transition = json.loads((trained.run / "transition.json").read_text())
    ranks = dict(transition["ranks"])
    assert len(ranks) == 100 and max(ranks) == 999 and min(ranks) == 0 and transition["samples"] == 64
    assert transition["t_star"] == max(t for t in ranks if ranks[t] == min(ranks.values()))
    assert 1 <= min(ranks.values()) and max(ranks.values()) <= 63    # 64 samples: at most 63 components
    plan = json.loads((trained.run / "plan_c2f+trd_dpm2_3.json").read_text())
    assert (plan["method"], plan["solver"]) == ("c2f+trd", "dpm2")
    for taus in (plan["low_taus"], plan["high_taus"]):
        assert len(taus) == 3 and taus == sorted(set(taus), reverse=True) and 0 <= taus[-1] <= taus[0] < 1000
    assert plan["high_taus"][0] <= transition["t_star"]
    assert plan["loss"] == sorted(plan["loss"], reverse=True)
    for taus in (plan["low_taus"], plan["high_taus"]):               # --sample says what it runs
        assert str(taus) in trained.result.out
    line, = lines_of(trained.out / "results.jsonl")
    assert line["experiment"] == "search" and line["plan"]["high_taus"] == plan["high_taus"]
    assert line["nfe"] == [3, 3] and line["evaluations"][1] > 0


def test_sample(trained, tmp_path):
    image = Image.open(trained.out / "samples.png")
    assert image.size == (8 * 66, 66) and image.mode == "L"
    assert str(trained.out / "samples.png") in trained.result.out
    before = tiles(trained.out / "samples.png", 6)
    assert len({tile.tobytes() for tile in before}) == 6
    # Seed i makes image i: fewer of them, from another first seed, from the checkpoint by name.
    shutil.copytree(trained.run, tmp_path / "run")
    result = start("--sample", "--n", 3, "--seed", 2, "--steps", 3, "--precision", "fp32", "--out", tmp_path,
                   "--checkpoint", tmp_path / "run" / "checkpoint.pt")
    assert result.code == 0 and f"checkpoint: {tmp_path / 'run' / 'checkpoint.pt'}" in result.out
    for a, b in zip(tiles(tmp_path / "samples.png", 3), before[2:]):
        assert abs(a.astype(int) - b).max() <= 1


def test_plans_side_by_side(trained, tmp_path):
    """The newest run under --out is found; one row per plan; uniform steps of the off switch."""
    shutil.copytree(trained.run, tmp_path / "run")
    result = start("--sample", "--n", 2, "--method", "base", "c2f", "--solver", "ddim", "--steps", 4, 5,
                   "--low-steps", 3, "--transition", 600, "--out", tmp_path)
    assert result.code == 0, result.err
    assert f"checkpoint: {tmp_path / 'run' / 'checkpoint.pt'}" in result.out
    for taus in ("base ddim: high [999, 666, 333, 0]", "base ddim: high [999, 749, 500, 250, 0]",
                 "c2f ddim: low [999, 500, 0] high [600, 400, 200, 0]",
                 "c2f ddim: low [999, 500, 0] high [600, 450, 300, 150, 0]"):
        assert taus in result.out
    assert Image.open(tmp_path / "samples.png").size == (2 * 66, 4 * 66)
    assert len({tile.tobytes() for tile in tiles(tmp_path / "samples.png", 8, columns=2)}) == 8


def test_a_plan_by_hand(trained, tmp_path):
    plan = dict(method="base", solver="ddim", low_taus=[], high_taus=[999, 666, 333, 0])
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    images = []
    for argv in (BASE, ["--plan", tmp_path / "plan.json"]):
        result = start("--sample", "--n", 2, *argv, "--out", tmp_path, "--checkpoint", trained.checkpoint)
        assert result.code == 0, result.err
        images.append((tmp_path / "samples.png").read_bytes())
    assert images[0] == images[1]


def test_weights_to_ship(trained, tmp_path):
    """The small file beside the checkpoint gives the same images, but for half precision."""
    files = []
    for name in ("checkpoint.pt", "weights.pt"):
        result = start("--sample", "--n", 2, "--method", "c2f", "--transition", 500, "--low-steps", 3,
                       "--steps", 3, "--precision", "fp32", "--out", tmp_path, "--checkpoint", trained.run / name)
        assert result.code == 0, result.err
        files.append(np.stack(tiles(tmp_path / "samples.png", 2)).astype(float))
    assert 0 < files[0].std() and abs(files[0] - files[1]).mean() < 1
    size = {name: (trained.run / name).stat().st_size for name in ("checkpoint.pt", "weights.pt")}
    assert size["weights.pt"] < size["checkpoint.pt"] / 3


# ---------------------------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------------------------
KEYS = ("experiment method solver data preset seed n extractor fd nfe macs_per_image seconds_per_image device "
        "torch images_seen source_sha256 args plan").split()


@pytest.fixture
def few_images(monkeypatch):
    """1,000 of the 10,000 images as the reference: a tenth of the time."""
    load_images = common.load_images
    monkeypatch.setattr(common, "load_images", lambda *args: tuple(
        part[:1000] if torch.is_tensor(part) else part for part in load_images(*args)))


def test_evaluate(trained, tmp_path, few_images):
    options = (*BASE, "--n", 150, "--precision", "fp32", "--checkpoint", trained.checkpoint, "--out", tmp_path)
    results = tmp_path / "new folder" / "results.jsonl"
    result = start("--evaluate", "--sample", *options, "--results", results)
    assert result.code == 0, result.err
    line, = lines_of(results)
    assert not set(KEYS) - line.keys()
    expected = dict(experiment="evaluate", method="base", solver="ddim", data="fashion10k", preset="tiny",
                    seed=0, n=150, extractor="small-fashion", torch=torch.__version__, images_seen=320,
                    source_sha256=common.sha256_of(SCRIPT))
    assert {k: line[k] for k in expected} == expected
    assert line["plan"]["high_taus"] == [999, 666, 333, 0] and sum(line["nfe"]) == 4
    assert line["args"]["steps"] == [4] and line["args"]["checkpoint"] == str(trained.checkpoint)
    assert line["relative_macs"] == pytest.approx(0.04) and line["macs_per_image"] > 4e5
    assert 0 < line["seconds_per_image"] < 10 and "CPU" in line["device"]
    assert re.search(rf"FD\[small-fashion\]@150 {line['fd']:.1f}", result.out)

    # The same distance from the pixels of the grid, by NumPy: with centred features X and Y, tr (AB)^(1/2)
    # is the sum of the singular values of X Y^T, up to the counts.
    pixels = torch.tensor(np.stack(tiles(tmp_path / "samples.png", 150)))[:, None]
    extractor, _ = common.load_extractor("fashion10k", torch.device("cpu"))
    x, y, _ = common.load_images("fashion10k")
    features = [common.extract(extractor, part)[0].numpy() for part in (pixels, x)]
    mu_a, mu_b = (f.mean(0) for f in features)
    X, Y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in features)
    fd = ((mu_a - mu_b) ** 2).sum() + (X ** 2).sum() + (Y ** 2).sum() \
        - 2 * np.linalg.svd(X @ Y.T, compute_uv=False).sum()
    assert line["fd"] == pytest.approx(fd, rel=1e-4)

    # Another seed is other images, and a second line
    result = start("--evaluate", *options, "--results", results, "--seed", 1, "--experiment", "Table 9",
                   "--per-class")
    assert result.code == 0, result.err
    lines = [s for s in lines_of(results) if s["experiment"] != "per class"]
    assert len(lines) == 2 and lines[0] == line and lines[1]["experiment"] == "Table 9"
    assert lines[1]["seed"] == 1 and lines[1]["fd"] != line["fd"]
    classes = next(s[key] for s in reversed(lines_of(results)) for key in ("classes", "per_class") if key in s)
    assert len(classes) == 10 and sum(c["n"] for c in classes) == 150
    for c, real in zip(classes, y.bincount().tolist()):              # too few of either: no number
        assert (c["fd"] is not None) == (min(c["n"], real) > 128), (c, real)


# ---------------------------------------------------------------------------------------------
# Kill and resume
# ---------------------------------------------------------------------------------------------
def resumed_equals(trained, out, steps_before):
    """--resume goes on from the checkpoint and ends where the uninterrupted run does."""
    checkpoint = only(out, "*/checkpoint.pt")
    result = start("--train", "--resume", "--save-every", 5, "--precision", "fp32", "--out", out)
    assert result.code == 0, result.err
    assert only(out, "*/checkpoint.pt") == checkpoint                          # no second run
    steps = [line["step"] for line in lines_of(checkpoint.parent / "log.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 40                     # not from the start again
    assert set(range(steps_before + 5, 45, 5)) <= set(steps)
    a, b = load(checkpoint), load(trained.checkpoint)
    for key in ("net", "ema", "base", "optimizer", "step", "phase", "images_seen", "args"):
        assert equal(a[key], b[key]), key


def test_kill_in_the_base_phase_and_resume(trained, tmp_path):
    for attempt in range(3):
        out = tmp_path / str(attempt)
        process = spawn(SCRIPT, "--train", *TINY, "--out", out)
        deadline = time.time() + 120
        while not list(out.glob("*/log.jsonl")) and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        saved = load(only(out, "*/checkpoint.pt"))                             # never half a file
        if saved["phase"] == "base" and saved["step"] < 20:
            break
    else:
        pytest.fail("the run was over before it was killed")
    assert process.returncode == -signal.SIGKILL, err
    resumed_equals(trained, out, saved["step"])


KILLED_WHILE_WRITING = """
import io, os, runpy, signal, sys, torch
save, calls = torch.save, []
def killed(value, path):
    calls.append(path)
    if len(calls) == 6:                                       # steps 5, 10, 15, 20 (base), 25, 30
        whole = io.BytesIO()
        save(value, whole)
        with open(path, "wb") as file:
            file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    save(value, path)
torch.save = killed
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_kill_in_the_fine_tuning_while_writing_and_resume(trained, tmp_path):
    process = spawn("-c", KILLED_WHILE_WRITING, SCRIPT, "--train", *TINY, "--out", tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, err
    saved = load(only(tmp_path, "*/checkpoint.pt"))
    assert (saved["phase"], saved["step"]) == ("finetune", 25)
    resumed_equals(trained, tmp_path, 25)
    # A finished run has nothing left to do.
    before = only(tmp_path, "*/checkpoint.pt").read_bytes()
    assert start("--train", "--resume", "--out", tmp_path).code == 0
    assert only(tmp_path, "*/checkpoint.pt").read_bytes() == before


def test_fine_tuning_anew(trained, tmp_path):
    """--train --checkpoint: the base model stays, the checkpoint decides the architecture."""
    result = start("--train", "--checkpoint", trained.checkpoint, *TINY, "--finetune-iters", 5, "--strategy",
                   "xy", "--out", tmp_path)
    assert result.code == 0, result.err
    saved, before = load(only(tmp_path, "*/checkpoint.pt")), load(trained.checkpoint)
    assert equal(saved["base"], before["base"]) and saved["args"]["strategy"] == "xy"
    assert saved["net"]["conv_in.weight"].shape[1] == before["net"]["conv_in.weight"].shape[1] + 8
    assert load(trained.checkpoint)["step"] == 40


def test_ctrl_c_in_an_empty_folder(tmp_path):
    """The script and common.py alone, a folder of colour images, the default --out; then Ctrl-C."""
    for file in (SCRIPT, ROOT / "common.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "images" / "cats").mkdir(parents=True)
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 33, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "cats" / f"{i}.png")
    process = spawn("c2f_trd.py", "--train", "--data", "images", *TINY, "--iters", 2000, cwd=tmp_path)
    deadline = time.time() + 120
    while not list(tmp_path.glob("runs/c2f_trd/*/log.jsonl")) and process.poll() is None:
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None) and "Traceback" not in err, err
    lines = [line for line in err.splitlines() if not line.startswith("train ")]
    assert len(lines) == 1 and lines[0].startswith("c2f_trd: interrupted"), err
    saved = load(only(tmp_path, "runs/c2f_trd/*/checkpoint.pt"))
    assert saved["channels"] == 3 and saved["step"] % 5 == 0 and not list(tmp_path.rglob("*.part"))


# ---------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------
# Each rank keeps its networks. Rank 1's clock is 5 s fast (the folder of a run is named after the time)
# and rank 0's disk slow (nobody may read the checkpoint before it is there).
TWO_PROCESSES = """
import copy, os, runpy, sys, time, torch
out, script = sys.argv[1:3]
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(script))
import common
rank, kept = int(os.environ["RANK"]), []
deepcopy, save, strftime, load_images, loads = copy.deepcopy, torch.save, time.strftime, common.load_images, []
def keep(net):
    kept[:] = [net, deepcopy(net)]
    return kept[1]
def slow(*args, **options):
    time.sleep(1)
    save(*args, **options)
def fewer(*args):                          # evaluate's reference: 1,000 images, as few_images does
    loads.append(args)
    parts = load_images(*args)
    return parts if len(loads) == 1 else tuple(p[:1000] if torch.is_tensor(p) else p for p in parts)
copy.deepcopy, common.load_images = keep, fewer
if rank == 0:
    torch.save = slow
else:
    time.strftime = lambda f, t=None: strftime(f, t or time.localtime(time.time() + 5))
runpy.run_path(script, run_name="__main__")
save({k: net.state_dict() for k, net in zip(("net", "ema"), kept)}, f"{out}/rank{rank}.pt")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes(trained, tmp_path, few_images):
    driver = tmp_path / "driver.py"
    driver.write_text(TWO_PROCESSES)
    out, options = tmp_path / "out", ("--method c2f --transition 600 --low-steps 3 --steps 3 "
                                      "--precision fp32").split()
    process = spawn("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", driver, tmp_path,
                    SCRIPT, "--train", "--sample", "--evaluate", "--n", 151, *TINY, "--save-every", 20,
                    *options, "--device", "cpu", "--out", out, "--results", tmp_path / "two.jsonl")
    printed, err = process.communicate(timeout=300)
    assert process.returncode == 0, printed + err
    ranks = [load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert equal(*ranks)                                                       # same weights on both
    run, one = only(out, "*/checkpoint.pt"), load(trained.checkpoint)          # and one run folder
    two = load(run)
    assert equal(two["net"], ranks[0]["net"]) and equal(two["ema"], ranks[0]["ema"])
    assert two["images_seen"] == one["images_seen"] == 320
    for part in ("base", "net", "ema"):                                        # as with one process
        assert two[part].keys() == one[part].keys()
        for k in one[part]:
            assert torch.allclose(two[part][k], one[part][k], atol=3e-4), (part, k)
    result = start("--sample", "--evaluate", "--n", 151, *options, "--checkpoint", run, "--out", tmp_path,
                   "--results", tmp_path / "one.jsonl")
    assert result.code == 0, result.err
    assert (out / "samples.png").read_bytes() == (tmp_path / "samples.png").read_bytes()
    (a,), (b,) = lines_of(tmp_path / "one.jsonl"), lines_of(tmp_path / "two.jsonl")
    assert (a["processes"], b["processes"]) == (1, 2) and a["plan"] == b["plan"]
    for key in ("fd", "inception_score"):
        assert a[key] == pytest.approx(b[key], rel=1e-4), key


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------
def test_bad_input_in_a_process(tmp_path):
    process = spawn(SCRIPT, "--sample", "--checkpoint", tmp_path / "none.pt", "--out", tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith(f"c2f_trd: error: no checkpoint {tmp_path / 'none.pt'}") and err.count("\n") == 1


def test_bad_checkpoints(trained, tmp_path):
    content, path = trained.checkpoint.read_bytes(), tmp_path / "checkpoint.pt"
    saved = load(trained.checkpoint)
    for damaged in (content[:len(content) // 2], content[:-100], content[:100], b"", b"text\n" * 50):
        path.write_bytes(damaged)
        for action in (["--sample", *BASE], ["--train"], ["--train", "--resume"]):
            one_line(start(*action, *TINY, "--checkpoint", path, "--out", tmp_path / "out"), path)
    for value, word in ((dict(saved, script="lowdiff"), "lowdiff"), ({"a": torch.zeros(2)}, "c2f_trd"),
                        (torch.zeros(3), "c2f_trd"), ([1, 2], "c2f_trd")):
        torch.save(value, path)
        for action in (["--sample", *BASE], ["--train", *TINY]):
            one_line(start(*action, "--checkpoint", path, "--out", tmp_path / "out"), path, word)
    one_line(start("--sample", "--checkpoint", tmp_path, "--out", tmp_path / "out"), tmp_path)
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def base_only(trained, tmp_path_factory):
    """A checkpoint of a run that was stopped before the fine-tuning."""
    path, saved = tmp_path_factory.mktemp("base") / "run" / "checkpoint.pt", load(trained.checkpoint)
    path.parent.mkdir()
    torch.save(dict(saved, phase="base", step=10, images_seen=80, ema=saved["base"], net=saved["base"],
                    base=None), path)
    return path


def test_stopped_before_the_fine_tuning(base_only, tmp_path):
    options = ("--checkpoint", base_only, "--out", tmp_path, "--results", tmp_path / "results.jsonl")
    assert start("--sample", "--n", 1, *BASE, *options).code == 0
    (tmp_path / "samples.png").unlink()
    one_line(start("--sample", "--n", 1, "--method", "c2f", "--transition", 500, *options), "fine-tun")
    one_line(start("--search", *SEARCH, *options), "fine-tun")
    assert not list(tmp_path.iterdir())
    # --train --checkpoint fine-tunes what there is, and counts the steps that were taken, not those planned.
    result = start("--train", *TINY, *options)
    assert result.code == 0, result.err
    saved, before = load(only(tmp_path, "*/checkpoint.pt")), load(base_only)
    assert saved["phase"] == "finetune" and equal(saved["base"], before["ema"])
    assert saved["images_seen"] == (10 + 20) * 8 and saved["args"]["iters"] == 10


def test_weights_cannot_be_resumed(trained, tmp_path):
    shutil.copy(trained.run / "weights.pt", tmp_path)
    one_line(start("--train", "--resume", "--checkpoint", tmp_path / "weights.pt", "--out", tmp_path),
             "weights.pt")
    assert os.listdir(tmp_path) == ["weights.pt"]


@pytest.mark.parametrize("name, change", [
    ("rising", dict(high_taus=[0, 500, 999])), ("repeated", dict(high_taus=[999, 500, 500, 0])),
    ("repeated low", dict(low_taus=[999, 999])), ("too large", dict(high_taus=[1000, 500, 0])),
    ("negative", dict(high_taus=[999, 500, -1])), ("no number", dict(high_taus=[999, "500", 0])),
    ("half", dict(high_taus=[999, 500.5, 0])), ("none", dict(high_taus=[])), ("no list", dict(high_taus=999)),
    ("missing", dict(low_taus=None)), ("solver", dict(solver="euler")), ("method", dict(method="x"))])
def test_bad_plans(trained, tmp_path, name, change):
    plan = dict(method="c2f+trd", solver="ddim", low_taus=[999, 500, 0], high_taus=[500, 300, 0])
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(dict(plan, **change)))
    one_line(start("--sample", "--n", 2, "--plan", path, "--checkpoint", trained.checkpoint, "--out", tmp_path),
             path)
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"3", b"null", b"\xff\xfe\x00", None])
def test_no_plan(trained, tmp_path, content):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    line = one_line(start("--sample", "--n", 2, "--plan", path, "--checkpoint", trained.checkpoint,
                          "--out", tmp_path))
    assert "plan.json" in line or content == b"\xff\xfe\x00"


@pytest.mark.parametrize("argv, words", [
    ("--evaluate --method base --n 100", ["--n 100", "128"]),
    ("--evaluate --method base --n 128", ["--n 128", "128"]),
    ("--evaluate --method base --data nonexist", ["nonexist"]),
    ("--evaluate --method base --inception /nope/inception.pth", ["/nope/inception.pth"]),
    ("--sample --method base --steps 2000", ["2000"]),
    ("--sample --method base --resume", ["--resume goes with --train"]),
    ("--sample --method base --steps 0", ["0"]),
    ("--sample --method base --steps -3", ["-3"]),
    ("--sample --method c2f --transition 500 --steps 502", ["502", "500"]),
    ("--sample --method c2f --transition 500 --low-steps 2000", ["2000"]),
    ("--sample --method c2f --transition 5000", ["5000"]),
    ("--sample --method c2f --transition 1000", ["1000"]),
    ("--sample --method c2f --transition -1", ["-1"]),
    ("--search --pca 8 --transition 5000", ["5000"]),
    ("--sample --method trd --steps 7", ["plan_trd_dpm2_7.json", "--search"]),
    ("--sample --method c2f+trd --solver dpm3 --steps 3", ["plan_c2f+trd_dpm3_3.json", "--search"]),
    ("--evaluate --method c2f+trd --steps 4 --n 150", ["--search"]),
    ("--sample --n 0", ["--n"]), ("--sample --n -5", ["--n"]),
    ("--search --calibration 0", ["--calibration"]), ("--search --pca 0", ["--pca"]),
    ("--sample --method base --plans /nope --steps 2000", ["2000"])])
def test_bad_sampling(trained, tmp_path, few_images, argv, words):
    one_line(start(*argv.split(), "--checkpoint", trained.checkpoint, "--out", tmp_path, "--results",
                   tmp_path / "results.jsonl"), *words)
    assert not list(tmp_path.iterdir()) and not list(trained.out.rglob("*.part"))


def test_no_transition_step(trained, tmp_path):
    shutil.copy(trained.checkpoint, tmp_path)
    one_line(start("--sample", "--method", "c2f", "--checkpoint", tmp_path / "checkpoint.pt", "--out", tmp_path),
             "transition.json", "--search", "--transition")


@pytest.mark.parametrize("argv, words", [
    ("--low 24", ["--low 24", "32"]), ("--low 32", ["--low 32"]), ("--low 64", ["--low 64"]),
    ("--low 1", ["1", "4"]), ("--low 2", ["2", "4"]), ("--low 0", ["--low"]),
    ("--data nonexist", ["nonexist", "fashion10k"]), ("--batch 0", ["--batch"]), ("--iters 0", ["--iters"]),
    ("--finetune-iters -4", ["--finetune-iters"]), ("--save-every 0", ["--save-every"]),
    ("--lr -1", ["-1"]), ("--resume", ["--resume"])])
def test_bad_training(tmp_path, argv, words):
    """Found out before the first step: nothing is trained, nothing written but arguments."""
    one_line(start("--train", *TINY, *argv.split(), "--out", tmp_path / "out"), *words)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".part", ".jsonl")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_no_cuda(tmp_path):
    one_line(start("--sample", "--device", "cuda", "--out", tmp_path), "--device cpu")


def test_out_that_cannot_be_written(trained, tmp_path):
    (tmp_path / "file").write_text("a file, no folder")
    for out in (tmp_path / "file", tmp_path / "file" / "folder", "/proc/nope"):
        for argv in (["--sample", "--n", 1, *BASE, "--checkpoint", trained.checkpoint], ["--train", *TINY]):
            one_line(start(*argv, "--out", out), "cannot write", out)
    assert os.listdir(tmp_path) == ["file"]


def test_data_of_other_channels_than_the_checkpoint(trained, tmp_path, monkeypatch):
    """The small extractor would compare any sizes: the mistake must be told, not measured."""
    extractor = common.Extractor(3, ["a"]).eval()
    monkeypatch.setattr(common, "load_extractor", lambda *args: (extractor, "small"))
    for channels, side in (3, 32), (1, 64):
        x = torch.randint(256, (140, channels, side, side), dtype=torch.uint8)
        extractor.image[0] = torch.nn.Conv2d(channels, 32, 3, padding=1, bias=False)
        monkeypatch.setattr(common, "load_images", lambda *args, x=x: (x, torch.zeros(140).long(), ["a"]))
        one_line(start("--evaluate", "--data", "emoji", "--n", 130, *BASE, "--checkpoint", trained.checkpoint,
                       "--out", tmp_path, "--results", tmp_path / "results.jsonl"), "emoji")


@pytest.mark.parametrize("argv, words", [("", "nothing to do"), ("--sample --preset huge", "huge"),
                                         ("--sample --steps ten", "ten"), ("--sample --nope", "--nope"),
                                         ("--sample --method ddim", "ddim")])
def test_bad_options(argv, words):
    result = start(*argv.split())
    assert result.code == 2 and words in result.err.splitlines()[-1] and "Traceback" not in result.err


def test_help():
    result = start("--help")
    assert result.code == 0 and result.err == ""
    for option in ("--data --preset --iters --batch --lr --seed --n --steps --out --checkpoint --resume --device "
                   "--precision --train --search --sample --evaluate --ledger").split():
        assert f"{option} " in result.out or f"{option}\n" in result.out


# ---------------------------------------------------------------------------------------------
# Not a number
# ---------------------------------------------------------------------------------------------
def test_a_learning_rate_that_explodes(tmp_path):
    line = one_line(start("--train", *TINY, "--lr", 1e30, "--out", tmp_path), "not finite", "step 5", "--lr")
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("*.pt"))                          # not one good step was saved
    assert "checkpoint.pt" not in line                               # so none is promised


def test_weights_that_explode_at_a_save(tmp_path, monkeypatch):
    """The loss of step k is of the weights before it: finite, while the weights to be saved may not be."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def explode(parameters, *args):
        parameters = list(parameters)
        clip(parameters, *args)
        calls.append(1)
        if len(calls) >= 10:
            parameters[-1].grad.fill_(float("nan"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", explode)
    result = start("--train", *TINY, "--out", tmp_path)
    checkpoint = only(tmp_path, "*/checkpoint.pt")
    one_line(result, "not finite", "step 1", checkpoint)
    assert load(checkpoint)["step"] == 5 and finite(checkpoint)


def test_nan_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    add_noise, calls = common.add_noise, []

    def broken(*args):
        calls.append(1)
        return add_noise(*args) * (float("nan") if len(calls) > 7 else 1)

    monkeypatch.setattr(common, "add_noise", broken)
    result = start("--train", *TINY, "--out", tmp_path)
    checkpoint = only(tmp_path, "*/checkpoint.pt")
    one_line(result, "not finite", checkpoint)
    assert re.search(r"step (8|9|10)\b", result.err)
    assert load(checkpoint)["step"] == 5 and finite(checkpoint) and not list(tmp_path.rglob("*.part"))
