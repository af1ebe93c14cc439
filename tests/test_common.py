"""common.py against closed forms, SciPy, and files made by hand."""
import errno
import gzip
import io
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
from common import (Extractor, add_noise, begin_run, caption_score, count_macs, extract, feature_stats,
                    find_data_file, frechet_distance, gather, linear_alpha_bar, load_checkpoint, load_extractor,
                    load_images, load_weights, locked, noise_for, parse_config, progress,
                    run_main, save_grid, save_json, save_run, sha256_of, start_device, to_float, to_uint8,
                    write_atomically)

DATA = Path(common.__file__).parent / "data"


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def one_line(error):
    """The message of a pytest.raises, which must be one line that a user can read."""
    line = str(error.value)
    assert line and "\n" not in line
    return line


# ---------------------------------------------------------------------------------------------
# Frechet distance
# ---------------------------------------------------------------------------------------------
def gaussian(width, seed, rank=None):
    """A random mean and covariance, of full rank by default."""
    g = gen(seed)
    a = torch.randn(width, rank or 2 * width, generator=g, dtype=torch.float64)
    return torch.randn(width, generator=g, dtype=torch.float64), a @ a.T / width


def test_fd_closed_forms():
    mu, cov = gaussian(16, 0)
    assert abs(frechet_distance((mu, cov), (mu, cov))) < 1e-10
    shift = torch.arange(16).double()
    assert frechet_distance((mu, cov), (mu + shift, cov)) == pytest.approx(1240, rel=1e-12)
    # A covariance scaled by c^2: (c - 1)^2 tr A
    assert frechet_distance((mu, cov), (mu, 9 * cov)) == pytest.approx(4 * cov.trace().item(), rel=1e-10)
    # Diagonal covariances: sum of (sigma_a - sigma_b)^2
    a, b = torch.tensor([1.0, 2, 0, 5]).double(), torch.tensor([3.0, 2, 1, 0]).double()
    zero = torch.zeros(4).double()
    assert frechet_distance((zero, (a ** 2).diag()), (zero, (b ** 2).diag())) == pytest.approx(30, rel=1e-10)
    # The same in another basis
    q = torch.linalg.qr(torch.randn(4, 4, generator=gen(), dtype=torch.float64))[0]
    stats = [(zero, q @ (s ** 2).diag() @ q.T) for s in (a, b)]
    assert frechet_distance(*stats) == pytest.approx(30, rel=1e-7)


def test_fd_of_singular_covariances():
    mu, cov = gaussian(32, 1, rank=5)
    assert abs(frechet_distance((mu, cov), (mu, cov))) < 1e-6
    assert frechet_distance((mu, cov), (mu, 4 * cov)) == pytest.approx(cov.trace().item(), rel=1e-6)
    u, v = torch.eye(32).double()[:2]                       # orthogonal lines: tr (AB)^(1/2) = 0
    stats = [(mu, torch.outer(w, w)) for w in (u, v)]
    assert frechet_distance(*stats) == pytest.approx(2, abs=1e-7)
    assert math.isfinite(frechet_distance((mu, cov), gaussian(32, 2)))


@pytest.mark.parametrize("seed", range(4))
def test_fd_equals_scipys_sqrtm(seed):
    (mu_a, a), (mu_b, b) = gaussian(64, seed), gaussian(64, seed + 100)
    linalg = pytest.importorskip("scipy.linalg")
    root = linalg.sqrtm(a.numpy() @ b.numpy()).real
    expected = float(((mu_a - mu_b) ** 2).sum() + (a + b).trace()) - 2 * np.trace(root)
    for pair in ((mu_a, a), (mu_b, b)), ((mu_b, b), (mu_a, a)):                # symmetric
        assert frechet_distance(*pair) == pytest.approx(expected, rel=1e-8)


def test_feature_stats():
    x = torch.randn(50, 7, generator=gen(), dtype=torch.float64) @ torch.randn(7, 7).double() + 3
    mu, cov = feature_stats(x)
    assert np.allclose(mu, x.numpy().mean(0)) and np.allclose(cov, np.cov(x.numpy(), rowvar=False))
    assert cov.dtype == torch.float64
    for n in (7, 6, 1):
        with pytest.raises(ValueError, match="7"):
            feature_stats(x[:n])
    feature_stats(x[:8])


# ---------------------------------------------------------------------------------------------
# Schedule and noise
# ---------------------------------------------------------------------------------------------
def test_noise_of_seed_i_is_image_i():
    shape = (3, 8, 8)
    whole = noise_for(range(10, 22), shape)
    assert whole.shape == (12, 3, 8, 8) and whole.dtype == torch.float32
    for i, seed in enumerate(range(10, 22)):
        assert whole[i].equal(torch.randn(shape, generator=gen(seed)))
    for batch in (1, 5, 7):
        parts = [noise_for(range(10, 22)[k:k + batch], shape) for k in range(0, 12, batch)]
        assert whole.equal(torch.cat(parts))
    assert whole[[11, 0, 4]].equal(noise_for([21, 10, 14], shape))             # any order
    assert whole[1::2].equal(noise_for(range(10, 22)[1::2], shape))            # a process's share
    assert noise_for(torch.tensor([10, 11]), shape).equal(whole[:2])
    assert len({z[0, 0, 0].item() for z in whole}) == 12


def test_noise_of_several_shapes():
    shapes = (3, 8, 8), (3, 4, 4), (1, 2, 2)
    noise = noise_for([5, 6, 7], *shapes)
    assert isinstance(noise, list)
    assert [z.shape for z in noise] == [(3, *shape) for shape in shapes]
    assert noise[0].equal(noise_for([5, 6, 7], shapes[0]))              # not changed by the later ones
    assert noise_for([5, 6, 7], shapes[0], (1, 16, 16))[0].equal(noise[0])
    assert not noise[1].flatten().equal(noise[0].flatten()[:noise[1].numel()])


def test_noise_ignores_the_global_generator():
    torch.manual_seed(1)
    a, state = noise_for([3], (3, 8, 8)), torch.get_rng_state()
    torch.manual_seed(2)
    assert noise_for([3], (3, 8, 8)).equal(a)
    torch.manual_seed(1)
    assert torch.get_rng_state().equal(state)


def test_noise_is_standard_normal():
    z = noise_for(range(400), (3, 16, 16)).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / n ** 0.5 and abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z ** 4).mean() - 3) < 5 * (96 / n) ** 0.5
    neighbours = (z[:-1] * z[1:]).mean((1, 2, 3)) * 768 ** 0.5                 # seeds i and i + 1
    assert neighbours.abs().max() < 5


def test_linear_alpha_bar():
    expected, product = [], np.longdouble(1)
    for t in range(1000):
        product *= 1 - (np.longdouble(1e-4) + (np.longdouble(0.02) - np.longdouble(1e-4)) * t / 999)
        expected.append(float(product))
    alpha_bar = linear_alpha_bar()
    assert alpha_bar.shape == (1001,) and alpha_bar.dtype == torch.float64
    assert np.allclose(alpha_bar[:1000], expected, rtol=1e-12, atol=0)
    assert alpha_bar[-1] == 1 and alpha_bar[0] == pytest.approx(0.9999, rel=1e-12)
    assert alpha_bar[999] == pytest.approx(4.0358e-5, rel=1e-4)                # DDPM's
    short = linear_alpha_bar(4, 0.1, 0.4)
    assert short.tolist() == pytest.approx([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7, 0.9 * 0.8 * 0.7 * 0.6, 1])


def test_add_noise():
    alpha_bar = linear_alpha_bar()
    x0, eps = torch.randn(4, 3, 64, 64, generator=gen()), torch.randn(4, 3, 64, 64, generator=gen(1))
    t = torch.tensor([0, 300, 999, -1])
    xt = add_noise(x0, eps, t, alpha_bar)
    assert xt.dtype == torch.float32
    for i, a in enumerate((0.9999, alpha_bar[300].item(), alpha_bar[999].item(), 1.0)):
        assert torch.allclose(xt[i], a ** 0.5 * x0[i] + (1 - a) ** 0.5 * eps[i], atol=1e-6)
        assert xt[i].var().item() == pytest.approx(1, abs=0.05)                # variance-preserving
    assert xt[3].equal(x0[3])
    constant = add_noise(torch.zeros(1, 1, 200, 200), torch.randn(1, 1, 200, 200, generator=gen(2)),
                         torch.tensor([300]), alpha_bar)
    assert constant.var().item() == pytest.approx(1 - alpha_bar[300].item(), rel=0.03)


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------
def raw_bytes(name, header):
    return np.frombuffer(gzip.decompress((DATA / name).read_bytes())[header:], np.uint8)


def test_fashion10k():
    x, y, captions = load_images("fashion10k")
    assert x.shape == (10000, 1, 32, 32) and x.dtype == torch.uint8
    assert y.shape == (10000,) and y.dtype == torch.int64 and y.bincount().tolist() == [1000] * 10
    assert y[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]                   # as published
    assert len(captions) == 10 and captions[9] == "ankle boot" and captions[1] == "trouser"
    inner = x[:, :, 2:30, 2:30]
    assert x.long().sum() == inner.long().sum() > 0                            # the padding is black
    assert (inner.reshape(-1).numpy() == raw_bytes("t10k-images-idx3-ubyte.gz", 16)).all()
    assert (y.numpy() == raw_bytes("t10k-labels-idx1-ubyte.gz", 8)).all()


def test_emoji():
    x, y, captions = load_images("emoji")
    lines = [line.split("\t") for line in (DATA / "emoji.txt").read_text().splitlines()]
    assert x.shape == (len(lines), 3, 64, 64) and x.dtype == torch.uint8 and len(lines) > 3000
    assert y.dtype == torch.int64 and len(y) == len(x)
    assert captions == sorted(set(captions)) and all(captions)
    assert [captions[k] for k in y] == [line[-1] for line in lines]
    sheet = Image.open(DATA / "emoji.png").convert("RGB")
    columns = sheet.width // 64
    for i in (0, 1, columns - 1, columns, len(x) - 1):
        left, top = i % columns * 64, i // columns * 64
        tile = np.asarray(sheet.crop((left, top, left + 64, top + 64)))
        assert (x[i].permute(1, 2, 0).numpy() == tile).all()
    assert (x.float().std((1, 2, 3)) > 1).all()                                # no empty tile
    assert (x[:, :, 0, 0] > 250).all(1).float().mean() > 0.8                   # on white


def fake_cifar10(root):
    """The binary archive in small: batches out of order, a test batch, a text file."""
    root.mkdir(parents=True, exist_ok=True)
    g, rows = np.random.default_rng(0), {}
    with tarfile.open(root / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name in ("data_batch_2.bin", "readme.html", "data_batch_1.bin", "test_batch.bin"):
            rows[name] = g.integers(0, 256, (5, 3073), dtype=np.uint8)
            rows[name][:, 0] %= 10
            content = b"text" if "html" in name else rows[name].tobytes()
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return np.concatenate([rows["data_batch_1.bin"], rows["data_batch_2.bin"]])


def test_cifar10(tmp_path, monkeypatch):
    rows = fake_cifar10(tmp_path)
    with pytest.raises(OSError, match="cifar-10-binary.tar.gz.*SHA-256") as error:
        load_images("cifar10", root=tmp_path)
    one_line(error)
    name = "cifar-10-binary.tar.gz"
    monkeypatch.setitem(common.SHA256, name, sha256_of(tmp_path / name))
    x, y, captions = load_images("cifar10", root=tmp_path)
    assert x.shape == (10, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert y.tolist() == rows[:, 0].tolist()
    for i, c, row, column in itertools.product((0, 4, 9), range(3), (0, 1, 31), (0, 17)):
        assert x[i, c, row, column] == rows[i, 1 + 1024 * c + 32 * row + column]
    assert captions[0] == "airplane" and captions[9] == "truck" and len(captions) == 10


@pytest.mark.parametrize("name", ["fashoin", "", "/nope/nope", "cifar100"])
def test_unknown_data(name):
    if name == "":
        name = "no such folder"
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        load_images(name)
    assert "fashion10k" in one_line(error)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def test_missing_data(tmp_path, no_network):
    for data, name in ("fashion10k", "t10k-images-idx3-ubyte.gz"), ("emoji", "emoji.png"), \
                      ("cifar10", "cifar-10-binary.tar.gz"), ("fashion", "train-images-idx3-ubyte.gz"):
        if Path("/usr/share/datasets/fashion-mnist", name).exists():
            continue
        with pytest.raises(OSError, match=name) as error:
            load_images(data, root=tmp_path / "data")
        line = one_line(error)
        assert ("http" if data in ("cifar10", "fashion") else "git checkout") in line
        assert not list(tmp_path.rglob("*.gz"))


@pytest.mark.parametrize("damage", ["cut", "one byte", "empty"])
@pytest.mark.parametrize("data, name", [("fashion10k", "t10k-images-idx3-ubyte.gz"),
                                        ("fashion10k", "t10k-labels-idx1-ubyte.gz"),
                                        ("emoji", "emoji.png"), ("emoji", "emoji.txt")])
def test_damaged_data(tmp_path, no_network, data, name, damage):
    for file in DATA.glob("t10k*" if data == "fashion10k" else "emoji.*"):
        (tmp_path / file.name).symlink_to(file)
    content = (DATA / name).read_bytes()
    (tmp_path / name).unlink()
    middle = len(content) // 2
    (tmp_path / name).write_bytes({"cut": content[:middle], "empty": b"", "one byte":
                                   content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]
                                   }[damage])
    with pytest.raises(OSError, match=name) as error:
        load_images(data, root=tmp_path)
    one_line(error)


def test_find_data_file(tmp_path, monkeypatch):
    (tmp_path / "free.bin").write_bytes(b"abc")                                # no hash on record
    assert find_data_file("free.bin", root=tmp_path) == tmp_path / "free.bin"
    assert sha256_of(tmp_path / "free.bin") == \
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"     # FIPS 180
    monkeypatch.setitem(common.SHA256, "free.bin", sha256_of(tmp_path / "free.bin"))
    assert find_data_file("free.bin", root=tmp_path) == tmp_path / "free.bin"

    def download(url, path, hash_prefix=None):
        assert hash_prefix == common.SHA256["free.bin"]
        Path(path).write_bytes(b"abc" if "good" in url else b"abd")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    path = find_data_file("free.bin", "https://good", root=tmp_path / "new" / "folder")
    assert path.read_bytes() == b"abc"
    with pytest.raises(OSError, match="free.bin"):
        find_data_file("free.bin", "https://bad", root=tmp_path / "other")


def test_uint8_and_float():
    x = torch.arange(256, dtype=torch.uint8)
    f = to_float(x)
    assert f.dtype == torch.float32 and f[0] == -1 and f[255] == 1
    assert torch.allclose(f, torch.linspace(-1, 1, 256), atol=1e-6)
    assert to_uint8(f).equal(x) and to_uint8(f.double()).equal(x)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0])).tolist() == [0, 255, 128]
    near = to_uint8(f + 0.49 / 127.5)                                          # rounds to nearest
    assert near.equal(x) and to_uint8(f - 0.49 / 127.5).equal(x)


# ---------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------
def test_count_macs_by_hand():
    with torch.device("meta"):
        conv, x = nn.Conv2d(6, 8, 3, stride=2, padding=1), torch.zeros(2, 6, 16, 12)
        grouped = nn.Conv2d(6, 8, (1, 5), padding=(0, 2), groups=2)
        linear, v = nn.Linear(20, 30), torch.zeros(4, 7, 20)
        q, k = torch.zeros(2, 3, 10, 16), torch.zeros(2, 3, 24, 16)
    assert count_macs(conv, x) == 2 * 8 * 8 * 6 * (6 * 9)
    assert count_macs(grouped, x) == 2 * 8 * 16 * 12 * (3 * 5)
    assert count_macs(linear, v) == 4 * 7 * 20 * 30
    attention = 2 * 3 * 10 * 24 * 16 * 2                                       # q k^T and its product with v
    assert count_macs(F.scaled_dot_product_attention, q, k, k) == attention
    assert count_macs(lambda a, b: (conv(a), conv(a), linear(b)), x, v) == 2 * 41472 + 16800
    assert count_macs(nn.GroupNorm(2, 6, device="meta"), x) == 0
    both = count_macs(lambda: (conv(x), F.scaled_dot_product_attention(q, k, k), linear(v)))
    assert both == 41472 + attention + 16800


def test_count_macs_on_the_cpu():
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8, requires_grad=True)
    assert count_macs(conv, x) == 4 * 36 * 27                                  # and no backward pass


# ---------------------------------------------------------------------------------------------
# Images and other files
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n, columns", [(6, 3), (7, 3), (2, 4), (1, 1)])
@pytest.mark.parametrize("scale", [1, 2])
def test_save_grid(tmp_path, channels, n, columns, scale):
    h, w = 5, 4
    x = torch.randint(250, (n, channels, h, w), generator=gen(), dtype=torch.uint8)
    path = tmp_path / "new folder" / "grid.png"
    save_grid(path, x, columns, scale)
    assert os.listdir(path.parent) == ["grid.png"]
    image = Image.open(path)
    rows, H, W = -(-n // columns), scale * h, scale * w
    assert image.format == "PNG" and image.mode == ("L" if channels == 1 else "RGB")
    assert image.size == (columns * (W + 2), rows * (H + 2))
    pixels = np.asarray(image).reshape(rows * (H + 2), columns * (W + 2), channels).copy()
    for i in range(n):
        top, left = i // columns * (H + 2) + 1, i % columns * (W + 2) + 1
        tile = pixels[top:top + H, left:left + W]
        expected = x[i].permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
        assert (tile == expected).all()
        tile[:] = 255
    assert (pixels == 255).all()                                               # lines, empty places


def test_save_grid_of_floats(tmp_path):
    x = torch.randint(256, (4, 3, 6, 6), generator=gen(), dtype=torch.uint8)
    save_grid(tmp_path / "a.png", x)
    save_grid(tmp_path / "b.png", to_float(x))
    save_grid(tmp_path / "c.png", to_float(x) * torch.tensor([1, 1, 1, 50.0]).view(4, 1, 1, 1))
    a, b, c = (np.asarray(Image.open(tmp_path / f"{k}.png")) for k in "abc")
    assert (a == b).all() and (a[:, :42] == c[:, :42]).all()
    last, sharp = a[1:13, 43:55], c[1:13, 43:55]                               # clipped, not wrapped
    assert (sharp[last < 124] == 0).all() and (sharp[last > 131] == 255).all()


def test_write_atomically(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    seen = []

    def write(part):
        seen.append((part, path.exists() and path.read_text()))
        part.write_text("new")

    write_atomically(path, lambda part: part.write_text("old"))
    write_atomically(str(path), write)
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file.txt"]
    assert seen[0][0] != path and seen[0][0].parent == path.parent and seen[0][1] == "old"
    assert seen[0][0].name.endswith(".part")                                   # in .gitignore


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("PytorchStreamWriter failed writing file data/0"),
                                   ValueError("nan"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_a_write_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file.pt"
    path.write_text("old")

    def write(part):
        part.write_text("half")
        raise error

    told = isinstance(error, (OSError, RuntimeError))
    with pytest.raises(OSError if told else type(error)) as raised:
        write_atomically(path, write)
    if told:
        assert str(path) in one_line(raised) and str(error.args[-1]) in str(raised.value)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.pt"]


def test_disk_full(tmp_path):
    """A real full disk, as a limit on the size of files: torch.save fails in the middle."""
    path = tmp_path / "file.pt"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 16, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            write_atomically(path, lambda part: torch.save({"a": torch.zeros(2 ** 16)}, part))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in one_line(error)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.pt"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("a file, no folder")
    for path in (tmp_path / "file" / "a.png", tmp_path / "file" / "b" / "a.png", Path("/proc/nope/a.png"),
                 Path("/proc/a.png")):
        with pytest.raises(OSError, match=f"cannot write {path}") as error:
            write_atomically(path, lambda part: part.write_text("new"))
        one_line(error)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OSError, match="cannot write"):
        save_json(tmp_path / "folder.json", [])
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.json"]


def test_save_json(tmp_path):
    value = dict(low_taus=[999, 500, 0], loss=1.5e-9, nested=[dict(a=[1, 2.5]), "text"], none=None)
    save_json(tmp_path / "plan.json", value)
    assert common.json.loads((tmp_path / "plan.json").read_text()) == value


def test_a_list_of_rows_as_json(tmp_path):
    rows = [dict(table="1", ours=2.5), dict(table="2", ours=None)]
    save_json(tmp_path / "rows.json", rows)
    text = (tmp_path / "rows.json").read_text()
    assert json.loads(text) == rows and text.count("\n") == 4                  # one entry a line


LIKE = dict(solver="", w=1.0, high_taus=[0])


def test_find_plan(tmp_path, capsys):
    config = dict(out=str(tmp_path / "out"), checkpoint=str(tmp_path / "run" / "weights.pt"), step=7, digest="abc")
    found = dict(solver="ddim", w=1, high_taus=[999, 0], loss=[1e-3], step=7, network="abc")
    assert common.find_plan(config, "plan.json", LIKE) is None
    save_json(tmp_path / "run" / "plan.json", found)
    assert common.find_plan(config, "plan.json", LIKE) == found and common.find_plan(config, "other.json", LIKE) is None
    for other in (dict(step=8), dict(digest="abd")):
        assert common.find_plan(dict(config, **other), "plan.json", LIKE) is None
        assert str(tmp_path / "run" / "plan.json") in capsys.readouterr().out
    save_json(tmp_path / "out" / "plan.json", dict(found, solver="dpm2"))                  # --out comes first
    assert common.find_plan(config, "plan.json", LIKE)["solver"] == "dpm2"


@pytest.mark.parametrize("content", [
    b"", b"{", b"[1]", b"3", b"null", b'"plan"', b"\xff\xfe\x00", b'{"solver": "ddim"}',
    b'{"solver": "ddim", "w": null, "high_taus": [9]}', b'{"solver": 3, "w": 1, "high_taus": [9]}',
    b'{"solver": "ddim", "w": 1, "high_taus": "9"}', b'{"solver": "ddim", "w": 1, "high_taus": [9.5]}',
    b'{"solver": "ddim", "w": 1, "high_taus": ["9"]}', b'{"solver": "ddim", "w": 1, "high_taus": null}'])
def test_damaged_plans(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    config = dict(out=str(tmp_path), checkpoint=str(tmp_path / "weights.pt"), step=7)
    with pytest.raises(ValueError, match="plan.json") as error:
        common.find_plan(config, "plan.json", LIKE)
    assert "--search" in one_line(error)


# ---------------------------------------------------------------------------------------------
# Runs: lock, checkpoints, --resume, --init
# ---------------------------------------------------------------------------------------------
HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
file.truncate(0)
file.write(str(os.getpid()))
file.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_in_one_folder(tmp_path):
    """The second is told which process is there; a killed one leaves nothing that has to be removed."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {holder.pid}.*{tmp_path}.*--out"):
            with locked(tmp_path):
                pytest.fail("both hold it")
        with locked(tmp_path / "other" / "run"):                               # another folder is free
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with locked(tmp_path):
        assert (tmp_path / "lock").read_text() == str(os.getpid())
        with pytest.raises(ValueError, match=f"process {os.getpid()} "):
            locked(tmp_path).__enter__()
    with pytest.raises(KeyError):
        with locked(tmp_path):
            raise KeyError
    with locked(tmp_path):                                                     # freed by an error as well
        pass


def saved_state(**changes):
    ema = {"weight": torch.randn(2, 3, generator=gen()).half(), "steps": torch.tensor(3)}
    return {**dict(script="c2f_trd", config=dict(ch=8), step=5, ema=ema), **changes}


def test_load_checkpoint(tmp_path):
    path = tmp_path / "weights.pt"
    state = saved_state()
    torch.save(state, path)
    saved = load_checkpoint(path, "c2f_trd")
    assert saved["config"] == dict(ch=8) and saved["step"] == 5 and saved["net"] == {}
    assert saved["ema"]["weight"].dtype == torch.float32 and saved["ema"]["steps"].dtype == torch.int64
    assert saved["ema"]["weight"].equal(state["ema"]["weight"].float())


def test_checkpoints_that_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(OSError, match="no checkpoint .*--train.*--checkpoint") as error:
        load_checkpoint(path, "c2f_trd")
    assert str(path) in one_line(error)
    with pytest.raises(ValueError, match="damaged or no checkpoint"):          # a folder
        load_checkpoint(tmp_path, "c2f_trd")
    torch.save(saved_state(), path)
    content = path.read_bytes()
    for damaged in (content[:len(content) // 2], content[:-100], content[:100], b"", b"text\n" * 50):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or no checkpoint") as error:
            load_checkpoint(path, "c2f_trd")
        assert str(path) in one_line(error)
    old = {k: v for k, v in saved_state(args=dict(ch=8)).items() if k != "config"}
    nan = dict(weight=torch.tensor([1.0, float("nan")]))
    for value, words in ((saved_state(script="lowdiff"), "of 'lowdiff', not of 'c2f_trd'"), ([1, 2], "'unknown'"),
                         (torch.zeros(3), "'unknown'"), (dict(a=1), "no or an older"), (old, "older.*train anew"),
                         (saved_state(ema=nan), "damaged.*not finite")):
        torch.save(value, path)
        with pytest.raises(ValueError, match=words) as error:
            load_checkpoint(path, "c2f_trd")
        assert str(path) in one_line(error)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save(saved_state(extra=Evil()), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.pt", "c2f_trd")
    assert not (tmp_path / "made").exists()


def test_load_weights():
    net, state = nn.Linear(3, 2), nn.Linear(3, 2).state_dict()
    load_weights(net, state, "a.pt")
    assert net.weight.equal(state["weight"]) and net.bias.equal(state["bias"])
    for wrong, word in ((dict(state, label=torch.zeros(1)), "label"), (dict(state, weight=torch.zeros(3, 3)), "sizes")):
        with pytest.raises(ValueError, match=f"a.pt: .*{word}") as error:
            load_weights(net, wrong, "a.pt")
        one_line(error)


GROUPS = {
    "run": {"out": ("runs/x", None, "folder"), "checkpoint": ("", None, "weights"),
            "precision": ("auto", ("auto", "fp32", "bf16"), "of numbers"), "seed": (0, (0, 10 ** 12), "of images"),
            "n": (64, (1, 1000), "images")},
    "network": {"ch": (32, (4, 64), "width"), "mult": ([1, 2, 4], (1, 64), "widths"), "low": (0, (0, 64), "side")},
    "training": {"data": ("fashion10k", None, "images"), "init": ("", None, "a checkpoint"),
                 "batch": (8, (1, 100), "a step"), "lr": (1e-3, (1e-9, 1), "rate"), "iters": (10, (1, 1000), "steps"),
                 "save_every": (5, (1, 1000), "steps")},
    "method": {"solver": ("dpm2", ("ddim", "dpm2"), "solver"), "steps": (5, (1, 1000), "steps")},
    "search": {"images": ("", None, "to search in")},
}
CPU = torch.device("cpu")


def parse(line, doc="A paper.\nIn two lines.\n\nMore."):
    return parse_config("x", GROUPS, doc, line.split())


def begin(line, world=1):
    return begin_run("x", parse(line), GROUPS, CPU, world)


def save(config, step=5, losses=(1.0, 2.0), net=None, rank=0, **changes):
    """What train does at a save, with a network of one layer."""
    torch.manual_seed(step)
    net, ema = net or nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_run("x", dict(config, **changes), step, net, ema, optimizer, list(map(torch.tensor, losses)), 0.0, rank)
    return net, ema, optimizer


def test_save_run(tmp_path):
    config, saved = begin(f"--train --out {tmp_path} --ch 16 --precision fp32")
    assert saved == {} and config["ch"] == 16
    net, ema, optimizer = save(config, channels=3)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "log.jsonl", "weights.pt"]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved.keys() == {"script", "config", "step", "net", "ema", "optimizer"} and saved["step"] == 5
    expected = {k: v for k, v in config.items() if k not in ("given", "train", "search", "sample", "resume")}
    assert saved["config"] == dict(expected, channels=3)
    for part, module in (("net", net), ("ema", ema)):
        assert all(saved[part][k].equal(v) for k, v in module.state_dict().items())
    assert saved["optimizer"]["state"][0]["exp_avg"].equal(optimizer.state_dict()["state"][0]["exp_avg"])
    small = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert small.keys() == {"script", "config", "step", "ema"}
    assert small["ema"]["weight"].dtype == torch.float16
    assert torch.allclose(small["ema"]["weight"].float(), ema.weight, atol=1e-3)
    save(config, step=10, losses=(3.0,))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["images"], line["loss"]) for line in lines] == [(5, 40, 1.5), (10, 80, 3.0)]
    (tmp_path / "log.jsonl").unlink()
    save(config, step=15, rank=1)                                              # only the first process writes
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 10
    assert not (tmp_path / "log.jsonl").exists()


def test_what_is_not_finite_is_not_saved(tmp_path):
    config, _ = begin(f"--train --out {tmp_path} --precision fp32")
    save(config)
    broken = nn.Linear(3, 2)
    broken.weight.data[0, 0] = float("inf")
    for options in (dict(losses=(1.0, float("nan"))), dict(net=broken), dict(losses=(float("inf"),), rank=1)):
        with pytest.raises(ValueError, match="not finite at step 10.*--resume.*--lr") as error:
            save(config, step=10, **options)
        one_line(error)
    assert load_checkpoint(tmp_path / "checkpoint.pt", "x")["step"] == 5


def test_disk_full_at_a_save(tmp_path):
    """The old checkpoint stays, and no half line in the log."""
    config, _ = begin(f"--train --out {tmp_path} --precision fp32")
    save(config)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {tmp_path}") as error:
            save(config, step=10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_line(error)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_resume_is_with_the_configuration_of_the_run(tmp_path):
    config, _ = begin(f"--train --out {tmp_path} --ch 16 --lr 0.01 --batch 4 --save-every 3 --seed 7 --precision fp32")
    save(config, channels=3)
    config, saved = begin(f"--train --resume --out {tmp_path}")
    assert saved["step"] == 5 and config["resume"] and config["channels"] == 3
    assert [config[k] for k in ("ch", "lr", "batch", "save_every", "seed", "iters", "precision")] == \
        [16, 0.01, 4, 3, 7, 10, "fp32"]
    config, _ = begin(f"--train --resume --out {tmp_path} --lr 0.001 --iters 20 --save-every 9 --data emoji")
    assert [config[k] for k in ("ch", "lr", "iters", "save_every", "data")] == [16, 0.001, 20, 9, "emoji"]
    config, _ = begin(f"--train --sample --solver ddim --out {tmp_path / 'b'} --precision fp32")
    save(config)
    config, _ = begin(f"--train --resume --sample --steps 7 --out {tmp_path / 'b'}")
    assert (config["solver"], config["steps"]) == ("dpm2", 7)  # sampling is this command line's, not the run's
    with pytest.raises(ValueError, match="finished, 5 steps.*--iters") as error:
        begin(f"--train --resume --out {tmp_path} --iters 5")
    one_line(error)
    with pytest.raises(ValueError, match="holds a run already.*--resume"):
        begin(f"--train --out {tmp_path}")
    with pytest.raises(ValueError, match="no run in .*none"):
        begin(f"--train --resume --out {tmp_path / 'none'}")


@pytest.mark.parametrize("ch, fits", [(4, True), (24, True), (128, True), (160, True), (5, False), (9, False),
                                      (25, False), (132, False), (150, False)])
def test_widths_that_the_norms_cannot_divide(tmp_path, ch, fits):
    """What begin_run lets pass is what GroupNorm and the time embedding can do."""
    import c2f_trd
    config = dict(out=str(tmp_path), given=set(), resume=False, init="", batch=4, precision="fp32", ch=ch, channels=1,
                  mult=[1, 2], blocks=1, attention=[1], patch=1, low=0)

    def works():
        c2f_trd.build_net(config)(torch.zeros(1, 1, 8, 8), torch.zeros(1))
        return begin_run("x", config, dict(network={}, training={}), torch.device("cpu"), 1)

    if fits:
        assert works()[0]["ch"] == ch
    else:
        with pytest.raises(ValueError, match=f"--ch {ch} must be"):
            begin_run("x", config, dict(network={}, training={}), torch.device("cpu"), 1)
        with pytest.raises((ValueError, RuntimeError)):
            works()


def test_a_run_that_was_moved_is_resumed_where_it_is(tmp_path):
    config, _ = begin(f"--train --out {tmp_path / 'a'} --precision fp32")
    save(config)
    (tmp_path / "a").rename(tmp_path / "b")
    groups = {**GROUPS, "run": {**GROUPS["run"], "out": (str(tmp_path / "b"), None, "folder")}}      # the default
    config, _ = begin_run("x", parse_config("x", groups, "A paper.", ["--train", "--resume"]), groups, CPU, 1)
    assert config["out"] == str(tmp_path / "b")


def test_init_brings_its_network(tmp_path):
    config, _ = begin(f"--train --out {tmp_path / 'a'} --ch 16 --mult 1 2 --batch 4 --precision fp32")
    save(config)
    init = tmp_path / "a" / "checkpoint.pt"
    config, saved = begin(f"--train --out {tmp_path / 'b'} --init {init} --low 8")
    assert [config[k] for k in ("ch", "mult", "low", "batch")] == [16, [1, 2], 8, 8]
    assert saved["step"] == 5 and config["out"] == str(tmp_path / "b")
    with pytest.raises(OSError, match="nope.pt"):
        begin(f"--train --out {tmp_path / 'b'} --init {tmp_path / 'nope.pt'}")


@pytest.mark.parametrize("fast, expected", [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_decided_once(tmp_path, monkeypatch, fast, expected):
    """In training only, and a run goes on in what it began with."""
    monkeypatch.setattr(common, "has_fast_bf16", lambda device: fast)
    config, _ = begin(f"--train --out {tmp_path}")
    assert config["precision"] == expected
    save(config)
    monkeypatch.setattr(common, "has_fast_bf16", lambda device: not fast)
    assert begin(f"--train --resume --out {tmp_path}")[0]["precision"] == expected


def test_a_batch_that_does_not_divide(tmp_path):
    assert begin(f"--train --out {tmp_path} --batch 9", world=3)
    with pytest.raises(ValueError, match="--batch 8 .* 3 processes") as error:
        begin(f"--train --out {tmp_path}", world=3)
    one_line(error)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------
def test_parse_config():
    config = parse("--train --mult 1 3 --lr 1e-4 --search --sample --steps 1000 --data a/b --save-every 7")
    assert config["given"] == {"train", "mult", "lr", "search", "sample", "steps", "data", "save_every"}
    assert config["mult"] == [1, 3] and config["lr"] == 1e-4 and config["steps"] == 1000 and config["data"] == "a/b"
    assert config["train"] and config["search"] and config["sample"] and not config["resume"]
    assert config["save_every"] == 7 and config["ch"] == 32 and config["solver"] == "dpm2"       # the defaults
    config["mult"].append(9)
    assert parse("--sample")["mult"] == [1, 2, 4] and parse("--sample")["given"] == {"sample"}


@pytest.mark.parametrize("line, words", [
    ("", "nothing to do.*--train"), ("--resume", "nothing to do"), ("--sample --resume", "--resume goes with --train"),
    ("--sample --nope 3", "--nope"), ("--sample extra", "extra"), ("--sample --step 5", "--step"),   # no abbreviations
    ("--sample --steps ten", "steps.*ten"), ("--sample --steps 5.5", "5.5"), ("--sample --steps", "steps"),
    ("--sample --steps 5 6", "6"), ("--train --mult 1 x", "mult.*x"), ("--train --mult", "mult"),
    ("--sample --steps 0", "--steps 0: must be in 1 .. 1000"), ("--sample --steps 1001", "1001.*1 .. 1000"),
    ("--sample --n -5", "--n.*1 .. 1000"), ("--train --mult 1 0 2", "--mult 1 0 2.*1 .. 64"),
    ("--train --lr 0", "--lr.*1e-09 .. 1"), ("--train --lr nan", "--lr nan"), ("--train --lr inf", "--lr inf"),
    ("--sample --solver euler", "--solver euler: choose from ddim, dpm2"),
    ("--sample --seed 1" + 30 * "0", "--seed.*0 .. 1e.12"), ("--sample --seed -1", "--seed"),
    ("--sample --ch 16", "--ch goes with --train"), ("--search --lr 0.1", "--lr goes with --train"),
    ("--train --steps 5", "--steps goes with --search or --sample"),
    ("--train --sample --images a", "--images goes with --search"),
    ("--train --resume --ch 16", "--ch cannot change"), ("--train --resume --batch 16", "--batch cannot change"),
    ("--train --resume --init a.pt", "--init cannot change"), ("--train --resume --mult 1", "--mult cannot change"),
    ("--train --resume --seed 5", "--seed cannot change"),
    ("--train --checkpoint a.pt", "--checkpoint.*--init.*--resume")])
def test_wrong_use_is_one_line(line, words):
    with pytest.raises(ValueError, match=words) as error:
        parse(line)
    assert "python x.py --help" in one_line(error)


def test_what_may_change_beside_resume():
    config = parse("--train --resume --lr 0.1 --iters 20 --save-every 5 --data b --out c --precision bf16")
    assert config["given"] == {"train", "resume", "lr", "iters", "save_every", "data", "out", "precision"}


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as error:
        parse("--help")
    text = capsys.readouterr().out
    assert not error.value.code and "A paper. In two lines." in text and "More" not in text
    for key in ["train", "search", "sample", "resume", *(key for keys in GROUPS.values() for key in keys)]:
        assert f"--{key.replace('_', '-')} " in text
    assert "network: widths [1 2 4]" in text and "run: weights\n" in text      # no empty default


# ---------------------------------------------------------------------------------------------
# Progress, devices
# ---------------------------------------------------------------------------------------------
class Clock:
    """Stands in for the module time: moves only when told."""

    def __init__(self):
        self.now = 1e9

    def __getattr__(self, name):
        return getattr(__import__("time"), name)

    def time(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(common, "time", clock)
    return clock


def test_progress_in_a_log(clock, capsys):
    items = []
    for item in progress(range(5, 15), "train", unit=4, every=0, note=lambda: f"loss {len(items)}"):
        clock.now += 2
        items.append(item)
    assert items == list(range(5, 15))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 10 and "\r" not in err
    for done, line in enumerate(lines, 1):
        left = 2 * (10 - done)
        assert line.startswith(f"train {done}/10") and "2.0 images/s" in line
        assert f"0:00:{left:02d} left" in line and f"loss {done}" in line


def test_progress_every_so_often(clock, capsys):
    for _ in progress(range(100), "sample", every=15):
        clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["16/100", "32/100", "48/100", "64/100", "80/100",
                                                   "96/100", "100/100"]
    for _ in progress([1, 2, 3], "short"):                                     # over at once: silent
        clock.now += 0.1
    assert list(progress([], "nothing")) == [] and capsys.readouterr().err == ""


def test_progress_of_several_days(clock, capsys):
    generator = progress(range(3), "train", every=0)
    next(generator)
    clock.now += 15 * 3600
    next(generator)                                                            # 15 h done, 30 h to go
    line = capsys.readouterr().err
    assert re.search(r"\b30:00:00 left|1 day, 6:00:00 left|1-06:00:00 left|1d 0?6:00:00 left", line), line


def test_progress_on_a_terminal(clock, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(common.sys, "stderr", screen)
    for _ in progress(range(10), "train"):
        clock.now += 1
    text = screen.getvalue()
    assert text.startswith("train 0/10 ")                      # at once: a first item may take minutes
    assert text.count("\r") == 10 and text.count("\n") == 1 and text.endswith("\n")
    assert len({len(line) for line in re.split("[\r\n]", text)[:-1]}) == 1     # no rest of a longer line


def test_progress_only_on_the_first_process(clock, monkeypatch, capsys):
    monkeypatch.setattr(common, "dist", types.SimpleNamespace(is_initialized=lambda: True,
                                                              get_rank=lambda: 1))
    for _ in progress(range(3), "train", every=0):
        clock.now += 5
    assert capsys.readouterr().err == ""


def test_start_device(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert start_device("cpu") == (torch.device("cpu"), 0, 1)
    if torch.cuda.is_available():
        assert start_device("auto")[0].type == "cuda"
    else:
        assert start_device("auto")[0].type == "cpu"
        with pytest.raises(ValueError, match="--device cpu") as error:
            start_device("cuda")
        one_line(error)


def test_fast_bf16_is_read_from_the_flags(monkeypatch):
    for flags, expected in (("sse avx2", False), ("avx512_bf16 fma", True), ("avx2 amx_bf16", True)):
        monkeypatch.setattr(Path, "read_text", lambda path, flags=flags: flags)
        assert common.has_fast_bf16(CPU) == expected or not Path("/proc/cpuinfo").exists()
    monkeypatch.setattr(Path, "exists", lambda path: False)                    # macOS, Windows
    assert not common.has_fast_bf16(CPU)


def test_autocast():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4, generator=gen())
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with common.autocast(CPU, precision):
            assert layer(x).dtype == dtype
    with common.autocast(torch.device("meta"), "fp32"):                        # where MACs are counted
        assert nn.Linear(4, 4, device="meta")(x.to("meta")).dtype == torch.float32


@pytest.mark.parametrize("n, world", [(7, 1), (7, 2), (8, 2), (7, 3), (1, 2)])
def test_gather_puts_shares_back(monkeypatch, n, world):
    x = torch.arange(n)[:, None] * torch.ones(1, 3)

    def all_gather_object(parts, part):
        parts[:] = [x[r::world] for r in range(world)]

    monkeypatch.setattr(common.dist, "all_gather_object", all_gather_object)
    assert gather(x[0::world], world).equal(x)


def test_run_main_says_what_a_user_can_mend_in_one_line(capsys):
    for error in (ValueError("--lr is wrong"), OSError("no file a.pt")):
        with pytest.raises(SystemExit) as stopped:
            run_main(mock.Mock(side_effect=error), "x")
        assert stopped.value.code == 1 and capsys.readouterr().err == f"x: error: {error}\n"
    with pytest.raises(SystemExit, match="x: interrupted.*--resume"):
        run_main(mock.Mock(side_effect=KeyboardInterrupt), "x")
    with pytest.raises(TypeError):                                             # a mistake of ours shows itself
        run_main(mock.Mock(side_effect=TypeError), "x")
    run_main(lambda: None, "x")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------
# Extractor
# ---------------------------------------------------------------------------------------------
WORDS = ("red", "green", "blue", "box", "ball")


@pytest.fixture(scope="module")
def extractor():
    """Random weights, with statistics that are not those of any batch."""
    torch.manual_seed(0)
    net = Extractor(3, WORDS)
    with torch.no_grad():
        for name, value in net.named_buffers():
            if "running" in name:
                value.uniform_(0.3, 1.3) if "var" in name else value.normal_(0, 0.2)
        for layer in net.image:
            if isinstance(layer, nn.Conv2d):                                   # He's scale: nothing dies out
                layer.weight.normal_(0, (2 / layer.weight[0].numel()) ** 0.5)
    return net.eval().requires_grad_(False)


def test_embed_text(extractor):
    w = extractor.text.weight

    def mean(*words):
        return F.normalize(torch.stack([w[WORDS.index(k)] for k in words]).mean(0), dim=0)

    captions = ["red box", "ball", "a green  ball", "box red", "red red box"]
    expected = [mean("red", "box"), mean("ball"), mean("green", "ball"), mean("red", "box"),
                mean("red", "red", "box")]
    e = extractor.embed_text(captions)
    assert torch.allclose(e, torch.stack(expected), atol=1e-6)
    assert e.norm(dim=1).tolist() == pytest.approx([1] * 5, abs=1e-5)


@pytest.mark.parametrize("captions", [["red", "", "ball"], ["", "red", "ball"], ["red", "ball", ""],
                                      ["", ""], ["unknown words"]])
def test_embed_text_of_nothing(extractor, captions):
    e = extractor.embed_text(captions)
    assert e.shape == (len(captions), 64) and e.isfinite().all()
    for caption, row in zip(captions, e):
        if caption in WORDS:
            assert torch.allclose(row, F.normalize(extractor.text.weight[WORDS.index(caption)], dim=0))
        else:
            assert row.norm() == 0


def test_features_do_not_depend_on_the_batch(extractor):
    x = torch.randint(256, (23, 3, 16, 24), generator=gen(), dtype=torch.uint8)
    features, embeddings = extract(extractor, x)
    assert features.shape == (23, 128) == (23, extractor.width) and features.dtype == torch.float64
    assert embeddings.shape == (23, 64)
    assert embeddings.norm(dim=1).tolist() == pytest.approx([1] * 23, abs=1e-5)
    assert features.std(0).mean() > 1e-3                                       # the images matter
    for batch in (1, 4, 23):
        f, e = extract(extractor, x, batch)
        assert torch.allclose(f, features, atol=1e-5) and torch.allclose(e, embeddings, atol=1e-5)
    order = torch.randperm(23, generator=gen())
    assert torch.allclose(extract(extractor, x[order], 5)[0], features[order], atol=1e-5)


def test_fd_does_not_depend_on_the_batch(extractor):
    x = torch.randint(256, (300, 3, 8, 8), generator=gen(), dtype=torch.uint8)
    x[150:] //= 2                                                              # two different halves
    fd = []
    for batch in (7, 150):
        a, b = (feature_stats(extract(extractor, part, batch)[0]) for part in x.split(150))
        fd.append(frechet_distance(a, b))
    assert fd[0] > 0.01 and fd[0] == pytest.approx(fd[1], rel=1e-4)


def test_caption_score(extractor):
    captions = ["red box", "green ball", "blue box"]
    text = extractor.embed_text(captions)
    assert caption_score(extractor, text, captions) == pytest.approx(1, abs=1e-6)
    assert caption_score(extractor, -text, captions) == pytest.approx(-1, abs=1e-6)
    half = torch.cat([text[:1], -text[1:2]])
    assert caption_score(extractor, half, captions[:2]) == pytest.approx(0, abs=1e-6)


def test_patches_are_pixels_folded_into_channels():
    net = Extractor(3, WORDS, patch=2).eval()
    x = torch.randint(256, (2, 3, 64, 64), generator=gen(), dtype=torch.uint8)
    with torch.no_grad():
        assert net.image[0].weight.shape[1] == 12 and net(x)[0].shape == (2, 128)
        folded = x.view(2, 3, 32, 2, 32, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 32, 32)
        net.patch = 1
        features = net(folded)[0]
        net.patch = 2
        assert torch.allclose(net(x)[0], features, atol=1e-6)


@pytest.mark.parametrize("patch", [1, 2])
def test_load_extractor(tmp_path, patch):
    cpu, extractor = torch.device("cpu"), Extractor(3, WORDS, patch)
    state = {k: v.half() if v.is_floating_point() else v for k, v in extractor.state_dict().items()}
    saved = dict(channels=3, words=list(WORDS), patch=patch, state=state)
    torch.save(saved, tmp_path / "extractor_fashion.pt")
    net, name = load_extractor("fashion10k", cpu, root=tmp_path)
    assert name == "small-fashion" and not net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert net.patch == patch and net.words == extractor.words
    for a, b in zip(net.state_dict().values(), extractor.state_dict().values()):
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=1e-3)
    with pytest.raises(ValueError, match="--inception PATH") as error:
        load_extractor("emoji", cpu, root=tmp_path)
    one_line(error)
    content = (tmp_path / "extractor_fashion.pt").read_bytes()
    for damaged in (content[:len(content) // 2], b"text", b""):
        (tmp_path / "extractor_fashion.pt").write_bytes(damaged)
        with pytest.raises((ValueError, OSError), match="extractor_fashion.pt") as error:
            load_extractor("fashion", cpu, root=tmp_path)
        one_line(error)
