"""Inception against torch-fidelity's, with random weights; what load_inception says of bad files.

The comparison needs `pip install --no-deps torch-fidelity` and is skipped without it.
"""
import importlib
import importlib.util
import sys
import types
import urllib.error
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
from inception import INCEPTION_URL, Inception, load_inception  # noqa: E402


def random_weights(seed=0):
    """A state dict whose activations neither die out nor explode, so that every layer matters."""
    g = torch.Generator().manual_seed(seed)
    weights = Inception().state_dict()
    for name, w in weights.items():
        if w.ndim > 1:                                                         # He's scale
            w.normal_(0, (2 / w[0].numel()) ** 0.5, generator=g)
        elif name.endswith(("bias", "running_mean")):
            w.normal_(0, 0.2, generator=g)
        elif w.is_floating_point():                                  # bn.weight, running_var
            w.uniform_(0.1, 1.5, generator=g)
    return weights


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Random weights in the file format of 2019, that of the public file."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_weights(), path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture
def fidelity(monkeypatch):
    """torch-fidelity's module of the network alone: a bare package stands in for the package, whose
    own __init__ imports torchvision and all metrics."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("no torch_fidelity: pip install --no-deps torch-fidelity")
    before = set(sys.modules)
    package = types.ModuleType("torch_fidelity")
    package.__path__ = spec.submodule_search_locations
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    yield pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    for name in set(sys.modules) - before:
        if name.startswith("torch_fidelity."):
            del sys.modules[name]


def images(h, w, channels=3):
    return torch.randint(256, (2, channels, h, w), generator=torch.Generator().manual_seed(h),
                         dtype=torch.uint8)


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_equals_torch_fidelity(fidelity, weights_file):
    theirs = fidelity.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights_file))
    ours = load_inception(weights_file)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for x in (images(32, 32), images(64, 48)):
        for a, b in zip(ours(x), theirs(x)):
            assert a.shape == b.shape and difference(a, b) < 1e-5
            assert difference(b[:1], b[1:]) > 0.01                             # the images matter


def test_grey_is_repeated_and_floats_are_refused(weights_file):
    net, x = load_inception(weights_file), images(28, 28, channels=1)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    for a, b in zip(net(x), net(x.repeat(1, 3, 1, 1))):
        assert difference(a, b) < 1e-6
    with pytest.raises(ValueError, match="uint8"):
        net(x.float())


def bad_files(folder, good):
    """(path, what is wrong) for files that load_inception must refuse."""
    yield folder / "none.pth", "missing"
    yield folder, "a folder"
    for name, content in {"empty": b"", "text": b"not weights", "cut": good.read_bytes()[:10 ** 7],
                          INCEPTION_URL.split("/")[-1]: good.read_bytes()}.items():
        (folder / name).write_bytes(content)
        yield folder / name, name
    torch.save({"fc.bias": torch.zeros(1008)}, folder / "other")
    yield folder / "other", "another network's"


def test_bad_files_and_no_network_give_one_line(tmp_path, monkeypatch, weights_file):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for path, what in [(None, "no network"), *bad_files(tmp_path, weights_file)]:
        with pytest.raises(OSError) as e:
            load_inception(path)
        line = str(e.value)
        assert "\n" not in line and INCEPTION_URL in line and "--inception PATH" in line, what
