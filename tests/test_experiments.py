"""results/*/experiments.py and results/report.py. Every experiment runs on tiny random networks: loading, plans,
searches and what is computed beside FD are real, sampling for FD and training are stubs; and that the tables are what
the report makes of the tracked lines."""
import contextlib
import copy
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

import common

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))
import evaluate  # noqa: E402
import experiments  # noqa: E402
import report  # noqa: E402

SCRIPTS = ("c2f_trd", "lowdiff", "multistage", "postdiff")
SHIPPED = {"c2f_trd": {"base": "", "weights": "--low 8"},
           "lowdiff": {"edm": "--stages 32", "weights": "", "two": "--stages 16 32"},
           "multistage": {"unified": "--widths 8", "thirds": "", "first": "", "weights": ""},
           "postdiff": {"weights": ""}}
VARIANTS = ("c2f_trd_strategies", "lowdiff_cdm", "lowdiff_latent", "multistage_separate", "multistage_edm",
            "multistage_latent", "postdiff_lcm", "postdiff_dit")
TINY = dict(ch=8, mult="1 1", attention=1, patch=4, batch=4, ae_iters=1, blocks=1, heads=2)
SIZES = dict(lowdiff=dict(mult="1 1 1", patch=2), lowdiff_cdm=dict(mult="1 1 1", patch=2), postdiff=dict(patch=2))
FIELDS = ("experiment arm method solver data seed n extractor fd nfe macs_per_image seconds_per_image device precision "
          "torch images_seen source_sha256 config plan").split()


def module_of(script):
    """results/SCRIPT/experiments.py as a module."""
    path = ROOT / "results" / script / "experiments.py"
    spec = importlib.util.spec_from_file_location(f"experiments_of_{script}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {script: module_of(script) for script in (*SCRIPTS, "shootout")}
CLUSTERINGS, *_ = map(experiments.load_script, ("multistage_clusterings", *VARIANTS))
IMAGES, NETWORKS, READ, FEW = {}, {}, common.load_images, 40


def few_images(name, res=32, *args, **kwargs):
    """FEW images of a data set, of 8 classes."""
    if (name, FEW) not in IMAGES:
        x, y, captions = READ("fashion10k" if name == "fashion" else name, res)
        IMAGES[name, FEW] = x[:FEW].clone(), y[:FEW] % 8, captions[:8]
    return IMAGES[name, FEW]


def tiny(script, argv, path):
    """The path of a checkpoint of a random network of the script's options, cut down, which are checked."""
    if (script, argv) not in NETWORKS:
        module, options = experiments.load_script(script), {**TINY, **SIZES.get(script, {})}
        known = {key for group in ("network", "training") for key in module.CONFIG[group]}
        words = argv + "".join(f" --{key.replace('_', '-')} {options[key]}" for key in options if key in known)
        words += " --mult 1 1 1 1" * argv.endswith(" 64")
        config = common.parse_config(module.SCRIPT, module.CONFIG, "", ["--train", *words.split()])
        if "widths" in config:
            n = len(config["widths"])
            config.update(widths=[8] * n, edges=[(i + 1) / n for i in range(n - 1)])
        config = {"low_share": 0, "mult": [1], **config, "out": str(path.parent), "init": ""}      # of a begin_run
        config.update({"autoencoder": str(path.parent / "autoencoder.pt")} if "autoencoder" in config else {})
        path.parent.mkdir(parents=True, exist_ok=True)
        module.load_data(config)
        torch.manual_seed(0)
        NETWORKS[script, argv] = dict(script=module.SCRIPT, step=3, ema=module.build_net(config).state_dict(), config={
            k: v for k, v in config.items() if k not in ("given", *common.ACTIONS)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([script, argv]))                # which load_checkpoint, a stub, looks up
    return path


def load_checkpoint(path, script):
    saved = NETWORKS[tuple(json.loads(path.read_text()))]
    assert saved["script"] == script
    return copy.deepcopy(saved)


def fake_trained(script, name, argv, macs=None):
    tiny(script, argv, Path("runs") / name / "weights.pt")
    return tiny(script, argv, Path("runs") / name / "checkpoint.pt")


def cost_of(plan):
    """Something like the MACs of a plan."""
    if "evaluations" in plan and "stages" in plan:
        return sum(plan["evaluations"])
    return len(plan.get("high_taus", plan.get("taus", [0]))) + len(plan.get("low_taus", [])) / 20


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A copy of the folders in which experiments work, tiny networks in them; what would take long is cut or a stub.
    The plans that are measured."""
    measured = []

    def measure(module, net, config, plan, n=2000, seed=0, data=None, extractor="small", pool=None, **fields):
        module.describe(plan)
        measured.append(plan)
        if pool is not None:
            data = "emoji" if module.SCRIPT == "postdiff" else "fashion10k"
            reference = dict(features=torch.randn(400, 128).double(), y=torch.arange(400) % 10,
                             captions=list(common.FASHION_CLASSES))
            pool.append((common.load_extractor(data, torch.device("cpu"))[0], reference,
                         torch.randn(400, 128).double(), torch.randn(400, 64)))
        row = dict(fields, n=n, seed=seed, data=evaluate.compared_with(config, data), extractor="small-fashion",
                   fd=1 + seed / 10,
                   macs_per_image=1e6 * cost_of(plan), seconds_per_image=0.1, images_seen=12, plan=plan,
                   config=evaluate.short(config), inception_score=5.0, caption_score=0.3)
        return {**dict.fromkeys(FIELDS, ""), **row}

    monkeypatch.setattr(common, "load_checkpoint", load_checkpoint)            # of changed copies
    for name in (*SCRIPTS, *VARIANTS):
        monkeypatch.setattr(experiments.load_script(name), "load_images", few_images)
        monkeypatch.setattr(experiments.load_script(name), "load_checkpoint", load_checkpoint, raising=False)
        if hasattr(sys.modules[name], "load_images"):
            monkeypatch.setattr(sys.modules[name], "load_images", few_images)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "measure", measure)
    monkeypatch.setattr(experiments, "cost_of", lambda module, config, plan: dict(macs_per_image=1e6 * cost_of(plan)))
    monkeypatch.chdir(tmp_path)
    for script, module in MODULES.items():
        (tmp_path / "results" / script).mkdir(parents=True)
        (tmp_path / "results" / script / "results.jsonl").touch()
        stubs = dict(trained=fake_trained, load_images=few_images, HELD_OUT=2, training_macs=lambda module, config: 1e6,
                     sigma_search=lambda denoiser, noise, sigmas, x_ref: sigmas,
                     PROMPTS=few_images("emoji")[2][:1] * 16, PAIRS=few_images("emoji")[2][:1] * 2,
                     cost_of=lambda *_: dict(macs_per_image=1e6),
                     timed=lambda *calls, **_: [(call(), 0.5)[1] for call in calls],
                     measure_speed=lambda *_: dict(images_per_s=2.0, against_images_per_s=1.0, speedup=2.0,
                                                   speedup_range=[1.0, 3.0], against=dict(macs_per_image=1e6)))
        for name, stub in stubs.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stub)
        for name, options in SHIPPED.get(script, {}).items():
            tiny(script, options, Path("weights") / script / f"{name}.pt")
    c2f, _, many, post = (experiments.load_script(script) for script in SCRIPTS)
    for module, constants in ((c2f, dict(REFERENCE_STEPS=12, CALIBRATION=1, PCA=4, BEST_OF=c2f.BEST_OF[:1])),
                              (post, dict(CALIBRATION=2, STEPS=(2,), REFERENCE_STEPS=3, BUDGET=1,
                                          count_macs=lambda fn: 1))):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(c2f.trd_search.__wrapped__, "__defaults__", (1, None, 1, 1))
    monkeypatch.setattr(CLUSTERINGS.gradient_affinity, "__defaults__", (9, 2, 0))
    monkeypatch.setattr(experiments.grid, "__defaults__", (1,))
    monkeypatch.setattr(MODULES["postdiff"].fig7, "__defaults__", (1,))
    monkeypatch.setattr(MODULES["multistage"].cluster_speed, "__defaults__", (20, 30))
    monkeypatch.setattr(many, "cluster_timesteps", lambda method, n, x: ([(i + 1) / n for i in range(n - 1)], {}))
    return measured


class Sampled(torch.nn.Conv2d):
    """In place of diffusers' UNet2DModel, whose import takes seconds."""

    def __init__(self, in_channels, out_channels, block_out_channels, **options):
        assert len(block_out_channels) == len(options["down_block_types"]) == len(options["up_block_types"])
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x, t):
        return types.SimpleNamespace(sample=super().forward(x))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


SLOW = {("c2f_trd", "steps"), ("c2f_trd", "starts")}           # searches of many plans: a few of them
CASES = [(script, f.__name__) for script in MODULES for f in MODULES[script].FUNCTIONS]


@pytest.mark.parametrize("script, name", CASES)
def test_experiment(lab, script, name, monkeypatch, tmp_path):
    module, n = MODULES[script], 0
    if (script, name) in SLOW:
        few = types.SimpleNamespace(product=lambda *args: list(itertools.product(*args))[1::14])
        monkeypatch.setattr(module, "itertools", few)
    if name == "latency":
        pytest.importorskip("diffusers")
        monkeypatch.setattr(module, "timed", lambda call: [2.0])
        pipe = mock.Mock(**{"to.return_value": None})
        monkeypatch.setitem(sys.modules, "pipelines", mock.Mock(pipeline=lambda *args: (pipe, {})))
        monkeypatch.setattr(module, "load_script", lambda name: mock.Mock())
        monkeypatch.setattr(experiments, "load_script", lambda name: mock.Mock(SOURCE=__file__))
    if (script, name) == ("c2f_trd", "speed"):
        monkeypatch.setitem(sys.modules, "diffusers", mock.Mock(UNet2DModel=Sampled))
    with contextlib.redirect_stdout(None):
        experiments.main(module.FUNCTIONS, [name])
    if name in ("samples", "front"):
        assert any((tmp_path / "results" / (script if name == "samples" else "")).glob("*.png"))
        return
    rows, plans = rows_of(tmp_path / "results" / script), set()
    name = "shootout" if script == "shootout" and name != "opinion" else name
    assert any(row["experiment"] == name for row in rows)
    if (script, name) == ("shootout", "opinion"):
        assert {row["arm"] for row in rows} == set(module.SECOND)
    for row in rows:
        assert row["arm"] and isinstance(row["cells"], dict), row
        if "fd" in row:
            assert set(FIELDS) <= set(row) and json.dumps(row["plan"])
            plans.add((row["experiment"], row["arm"], json.dumps(row["plan"])))
            n += 1
    arms = [plan[:2] for plan in plans]
    assert len(arms) == len(set(arms)), "an arm with two plans: the newer would hide the older"
    assert n == len(lab)
    (tmp_path / "README.md").write_text("")
    page = tmp_path / "results" / script / "README.md"
    page.write_text(f"<!-- table: {name} -->\n<!-- end -->\n")
    with mock.patch.object(report, "ROOT", tmp_path):
        report.fill(page)
    assert "not measured" not in page.read_text() and page.read_text().count("\n| ") >= 2
    if name == "headline":
        arms = ["off switch", "method"] + ["best plain"] * (script != "multistage")
        assert sorted({row["arm"] for row in rows if row["experiment"] == "headline"}) == sorted(arms)
        with mock.patch.object(report, "ROOT", tmp_path):
            line = next(line for line in report.summary() if line.startswith(f"| {script}.py"))
        assert "FD 1.100 ± 0.100" in line and line.split("|")[-2].strip() in ("no", "**yes**")


def test_postdiff_on_the_base_network(lab):
    """The shoot-out's caching with every pass full is c2f_trd's own sampler; a pass that is not full is cheaper."""
    module, c2f = MODULES["shootout"], experiments.load_script("c2f_trd")
    _, net, config, plan, device = experiments.opened("c2f_trd", f"{module.BASE} --method base --steps 4")
    ours, macs = c2f.generate(net, config, plan, range(2), device), []
    for k in (1, 2):
        plan = dict(plan, n_low=0, k=k)
        images = module.generate_postdiff(net, config, plan, range(2), device)
        macs.append(common.count_macs(lambda p=plan: module.generate_postdiff(net, config, p, range(2), device)))
        assert torch.allclose(images, ours, atol=1e-5) == (k == 1)
    assert macs[1] < macs[0] == common.count_macs(lambda: c2f.generate(net, config, plan, range(2), device))
    images = module.generate_postdiff(net, config, dict(plan, n_low=2, k=1), range(2), device)
    assert images.shape == ours.shape and not torch.allclose(images, ours)


def test_searched_noise_levels():
    """Against a denoiser whose exact answer is known: the error to it falls, the levels stay in order."""
    module, low = MODULES["shootout"], experiments.load_script("lowdiff")

    def denoiser(xt, sigma):                                   # of data that is normal with deviation .5
        return xt * 0.25 / (0.25 + sigma ** 2)

    noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    begin, x_ref = low.noise_levels(4, 0.01, 50.0), 0.5 * noise
    found = module.sigma_search(denoiser, noise, begin, x_ref)
    errors = [float((low.heun_sample(denoiser, noise, levels) - x_ref).square().mean()) for levels in (begin, found)]
    assert errors[1] < errors[0] / 2 and len(found) == 5 and all(a > b for a, b in zip(found, found[1:]))
    assert found[-1] == 0


def test_real_conditions_are_real_images(lab):
    """where: with next to no noise, what conditions the last stage are reduced images of the data, of the class."""
    module, seen = MODULES["lowdiff"], []
    low = experiments.load_script("lowdiff")
    _, net, config, plan, device = experiments.opened("lowdiff", module.EDM)
    net.forward = lambda x, t, y: seen.append((x, y)) or torch.zeros_like(x[:, :1])
    plan = dict(low.paper_plan([16, 32], [3, 2], [3]))
    module.given_real(1e-9)(net, dict(config, labels=1), plan, [0, 1, 2], device)
    x, y, _ = low.load_images("fashion10k")
    small = low.upsample(low.downsample(common.to_float(x)))
    for z, c in zip(seen[0][0][:, 1:], seen[0][1]):
        assert min(float((z / 2 - v).abs().max()) for v in small[y == c]) < 1e-4   # scaled by 1 / sqrt(.25)


def test_record_measures(lab, tmp_path, monkeypatch):
    """Nothing is a stub but the data: the line has what evaluate.py measures, the arm, the cells, another plan."""
    monkeypatch.setattr(experiments, "measure", evaluate.measure)
    monkeypatch.setitem(globals(), "FEW", 140)                 # more than the extractor's 128 features
    for name, value in dict(load_images=few_images, REFERENCES={}, COUNTED={}).items():
        monkeypatch.setattr(evaluate, name, value)
    with contextlib.redirect_stdout(None):
        rows = experiments.record("c2f_trd", "x", MODULES["c2f_trd"].command("base", "ddim", 3), "arm", seeds=2, n=140,
                                  change=lambda plan: dict(plan, high_taus=[900]),
                                  cells=lambda net, config, plan, device: dict(K=len(plan["high_taus"])), more=5)
    assert rows_of(tmp_path / "results" / "c2f_trd") == json.loads(json.dumps(rows))
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        assert set(FIELDS) <= set(row) and (row["arm"], row["cells"], row["more"]) == ("arm", {"K": 1}, 5)
        assert row["nfe"] == 1 and row["fd"] > 0 and row["config"]["checkpoint"] == "weights/c2f_trd/base.pt"


def test_training_macs(lab):
    """Against a count on the meta device by hand; iters_for divides a budget by them."""
    low = experiments.load_script("lowdiff")
    argv = "--stages 32 --ch 8 --mult 1 1 1 --batch 4 --data fashion10k"
    config = common.parse_config("lowdiff", low.CONFIG, "", ["--train", *argv.split()])
    low.load_data(config)
    with torch.device("meta"):
        net = low.build_net(config)
        macs = common.count_macs(net, torch.zeros(1, 1, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with mock.patch.object(experiments, "COUNTED", (2, 3)):
        assert experiments.training_macs(low, config) == pytest.approx(macs)
        assert experiments.iters_for(low, argv, 40 * macs) == 10


def test_trained(tmp_path, monkeypatch):
    """Trains once, under runs/, for the MACs; finds a finished run; goes on with an unfinished one."""
    monkeypatch.setattr(experiments, "COUNTED", (1, 2))
    monkeypatch.chdir(tmp_path)
    argv = ("--ch 8 --mult 1 1 --attention 1 --patch 4 --batch 4 --data fashion10k --save-every 2 --precision fp32")
    low = experiments.load_script("c2f_trd")
    macs = 12 * experiments.training_macs(low, {**common.parse_config(
        "c2f_trd", low.CONFIG, "", ["--train", *argv.split()])} | {"channels": 1})
    with contextlib.redirect_stderr(io.StringIO()):
        path = experiments.trained("c2f_trd", "x", argv, macs)
        assert torch.load(path, weights_only=True)["step"] == 3
        before = path.read_bytes()
        assert experiments.trained("c2f_trd", "x", argv, macs) == path and path.read_bytes() == before
        saved = torch.load(path, weights_only=True)
        saved["config"]["iters"] = 5
        torch.save(saved, path)
        experiments.trained("c2f_trd", "x", argv, macs)
        assert torch.load(path, weights_only=True)["step"] == 5
        (path.parent / "checkpoint.pt").unlink()               # of which the averaged weights alone were kept
        kept = (path.parent / "weights.pt").read_bytes()
        assert experiments.trained("c2f_trd", "x", argv, macs) == path.parent / "weights.pt"
        assert (path.parent / "weights.pt").read_bytes() == kept and not path.exists()
    with pytest.raises(ValueError, match="--ch"):
        experiments.trained("c2f_trd", "y", "--ch 1")


def test_command_line(capsys):
    def one():
        """First."""
    experiments.main((one,), [])
    assert capsys.readouterr().out.split() == ["one", "First."]
    with pytest.raises(ValueError, match="no experiment 'two'"):
        experiments.main((one,), ["one", "two"])
    capsys.readouterr()
    for script in SCRIPTS:
        experiments.main(MODULES[script].FUNCTIONS, [])
        lines = capsys.readouterr().out.splitlines()
        assert [text.split()[0] for text in lines] == [f.__name__ for f in MODULES[script].FUNCTIONS]
    run = subprocess.run([sys.executable, ROOT / "results" / "c2f_trd" / "experiments.py", "x"], capture_output=True,
                         text=True, cwd="/")
    assert run.returncode == 1 and run.stderr == "experiments: error: no experiment 'x': choose from the list\n"
    assert "headline" in run.stdout


# ---------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------
def line(arm="a", seed=0, fd=1.0, **fields):
    return dict(dict(experiment="steps", arm=arm, data="d", n=2000, extractor="small-d", seed=seed, fd=fd, plan=[1],
                     images_seen=1, macs_per_image=2e6, seconds_per_image=0.5, cells={"K": 1234}), **fields)


def folder(tmp_path, rows):
    path = tmp_path / "results" / "c2f_trd"
    path.mkdir(parents=True)
    (path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_newest_lines_and_seeds(tmp_path):
    path = folder(tmp_path, [line(fd=9.0), line(seed=1, fd=3.0), line("b", fd=2.5, macs_per_image=1e6), line(fd=1.0),
                             line("c", fd=7.0, plan=[0]), line("c", seed=1, fd=8.0)])
    text = report.table(path, "steps")
    assert text[0].startswith("| arm | K |") and "FD[small-d]@2000 ↓" in text[0]
    assert "| a | 1,234 | 2 | 100.0 % | 0.5000 | **2.000 ± 1.414** | 1 | 2 |" in text
    assert "| b | 1,234 | 1 | 50.0 % | 0.5000 | 2.500 | 1 | 1 |" in text
    assert "| c | 1,234 | 2 | 100.0 % | 0.5000 | 8.000 | 1 | 1 |" in text                  # another plan: left out
    assert report.table(path, "other") == [
        "not measured yet with these networks: `python results/c2f_trd/experiments.py other`"]


def test_seconds_of_several_machines_are_left_out(tmp_path):
    for i, (one, other, there) in enumerate(((dict(device="a"), dict(device="a"), True),
                                             (dict(device="a"), dict(device="b"), False))):
        text = report.table(folder(tmp_path / str(i), [line(**one), line("b", **other)]), "steps")
        assert ("s / image" in text[0]) == there and len({row.count("|") for row in text}) == 1
    rows = [line(), line("b")]
    del rows[1]["seconds_per_image"]                           # of a line from a log
    text = report.table(folder(tmp_path / "2", rows), "steps")
    assert "s / image" not in text[0] and len({row.count("|") for row in text}) == 1


def test_what_another_experiment_measured_is_copied(lab, tmp_path):
    """Of the same network and plan, into another folder, too; with the arm and cells of the one that asks."""
    argv = "--checkpoint weights/c2f_trd/base.pt --method base --steps 4"
    experiments.record("c2f_trd", "one", argv, "A", seeds=2)
    path = experiments.folder_of("c2f_trd") / "results.jsonl"
    sha = common.sha256_of("weights/c2f_trd/base.pt")
    path.write_text("".join(json.dumps(dict(json.loads(row), weights_sha256=sha, fd=7.5)) + "\n"
                            for row in path.read_text().splitlines()))
    n = len(lab)
    rows = experiments.record("c2f_trd", "two", argv, "B", folder="shootout", method="M", cells={"K": 1})
    assert len(lab) == n + 1 and [row["fd"] for row in rows] == [7.5, 7.5, 1.2]            # the third seed is new
    assert rows_of(tmp_path / "results" / "shootout") == json.loads(json.dumps(rows))
    assert {(row["experiment"], row["arm"], row["method"], row["cells"]["K"]) for row in rows} == {("two", "B", "M", 1)}
    experiments.record("c2f_trd", "two", argv.replace("4", "3"), "C", folder="shootout")   # another plan
    experiments.record("c2f_trd", "one", argv, "A", seeds=2, folder="shootout")            # of the very same names
    assert len(lab) == n + 4 and len(rows_of(tmp_path / "results" / "shootout")) == 8


def test_a_plan_found_again_is_the_same(lab):
    """Its search took another time: what was measured is not measured again; of other steps it is."""
    argv = "--checkpoint weights/c2f_trd/base.pt --method base --steps 4"
    experiments.record("c2f_trd", "one", argv, "A", seeds=2)
    path, sha = experiments.folder_of("c2f_trd") / "results.jsonl", common.sha256_of("weights/c2f_trd/base.pt")
    lines = [dict(json.loads(row), weights_sha256=sha) for row in path.read_text().splitlines()]
    for changed, more in ((dict(seconds=7.0), 0), (dict(high_taus=[9, 3]), 2)):
        path.write_text("".join(json.dumps(dict(row, plan=dict(row["plan"], **changed))) + "\n" for row in lines))
        n = len(lab)
        experiments.record("c2f_trd", "one", argv, "A", seeds=2)
        assert len(lab) == n + more


def test_several_extractors(tmp_path):
    text = report.table(folder(tmp_path, [line(), line(extractor="efficientnet-lite0")]), "steps")
    assert "| FD ↓ |" in text[0] and "1.000 @2000, efficientnet-lite0" in text[3]


def test_cells_without_fd(tmp_path):
    cells = {"t": 5, "error": 0.000123456, "s": 12345.6, "w": "q"}
    path = folder(tmp_path, [dict(experiment="ranks", arm="x", cells=cells)])
    assert report.table(path, "ranks")[2] == "| x | 5 | 1.23e-04 | 12,346 | q |"


def arms(off, method, plain=None, **fields):
    rows = [("off switch", off, 100), ("method", method, 10)] + ([("best plain", plain, 10)] if plain else [])
    return {arm: [dict(line(arm, fd=fd), macs_per_image=m, speedup=1.6, caption_score=.4, **fields)]
            for arm, fd, m in rows}


def trained(share, fd):
    found = arms(1, fd, training_macs=1)
    found["method"][0]["training_macs"] = share
    return found


@pytest.mark.parametrize("script, found, met", [
    ("c2f_trd", arms(1, 1.09, 1.1), True), ("c2f_trd", arms(1, 1.11, 1.2), False),
    ("c2f_trd", arms(1, 1.0, 0.9), False), ("c2f_trd", arms(1, 1.0), False), ("lowdiff", arms(1, 1.09), True),
    ("lowdiff", arms(1, 1.2), False), ("multistage", arms(1, 0.9, training_macs=1), False),
    ("multistage", trained(0.6, 1), True), ("multistage", trained(0.6, 1.01), False),
    ("postdiff", arms(1, 1), True), ("postdiff", arms(1, 1.1), False)])
def test_verdict(script, found, met):
    assert report.verdict(script, found)[1] == met


def test_figures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import figures
    path = folder(tmp_path, [line("TRD, 2M, 5", cells={"solver": "2M"}),
                             line("t", experiment="transition", cells={"t*": 9})])
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    figures.draw()
    assert sorted(p.name for p in path.glob("*.png")) == ["fig5.png", "fig6.png"]


def test_markers():
    """Each table of a page is an experiment's; the experiments without one are in its list of these."""
    for script in SCRIPTS:
        text = (ROOT / "results" / script / "README.md").read_text()
        names = re.findall(r"<!-- table: (\w+) -->", text)
        known = {f.__name__ for f in MODULES[script].FUNCTIONS} - {"samples"}
        later = {*re.findall(r"`(\w+)`", text.partition("\n## Ready to run")[2].partition("\n## ")[0])}
        assert len(names) == len(set(names)) and set(names) <= known and known - set(names) <= later
        assert text.count("<!-- end -->") == len(names)


def test_tables_are_what_the_report_makes(tmp_path):
    """A run of the report on the tracked lines changes no page; an edited table is put right."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    page = tmp_path / "results" / "c2f_trd" / "README.md"
    text = page.read_text()
    page.write_text(text.replace("<!-- table: headline -->\n", "<!-- table: headline -->\nwrong\n"))
    assert page.read_text() != text
    names = ("summary", "ledgers", "extractor")
    (tmp_path / "README.md").write_text("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in names))
    run = "import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", run, tmp_path / "results" / "report.py"], capture_output=True,
                            text=True, env=dict(os.environ, PYTHONPATH=str(tmp_path / "results")), timeout=100)
    assert result.returncode == 0, result.stderr
    for page in ROOT.glob("results/*/README.md"):
        assert (tmp_path / page.relative_to(ROOT)).read_text() == page.read_text(), page
    assert (tmp_path / "README.md").read_text().count("\n| ") > 20


def test_lines_are_of_the_shipped_weights():
    """A network that was replaced leaves no line behind."""
    for path in ROOT.glob("results/*/results.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            checkpoint = row.get("config", {}).get("checkpoint", "")
            if checkpoint.startswith("weights/"):
                assert row["weights_sha256"] == common.sha256_of(ROOT / checkpoint), f"{path}: {row['arm']}"


def test_what_is_measured_is_not_measured_again(lab, monkeypatch):
    """Lines that are there already are taken as they are; a new seed, plan or network is measured."""
    argv = "--checkpoint weights/c2f_trd/base.pt --method base --steps 4"
    first = experiments.record("c2f_trd", "other", argv, seeds=2)
    path, n = experiments.folder_of("c2f_trd") / "results.jsonl", len(lab)
    sha = common.sha256_of("weights/c2f_trd/base.pt")
    rows = [dict(json.loads(line), weights_sha256=sha) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = experiments.record("c2f_trd", "other", argv, seeds=3)
    assert len(lab) == n + 1 and [row["seed"] for row in again] == [0, 1, 2] and len(first) == 2
    for more in ({}, dict(extractor="efficientnet-lite0"), dict(data="emoji"), dict(pool=[])):
        n = len(lab)
        experiments.record("c2f_trd", "other", argv + " --start exclusive" * (not more), arm=argv, seeds=1, **more)
        assert len(lab) == n + 1, more
