"""common.py against closed forms, SciPy, and files made by hand."""
import errno
import gzip
import io
import itertools
import math
import os
import re
import resource
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
from common import (Extractor, add_noise, caption_score, class_logits, count_macs, extract,
                    feature_stats, find_data_file, frechet_distance, inception_score,
                    linear_alpha_bar, load_extractor, load_images, noise_for, progress, save_curves,
                    save_grid, save_json, sha256_of, start_device, to_float, to_uint8, write_atomically)

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
    root = scipy.linalg.sqrtm(a.numpy() @ b.numpy()).real
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
# Inception score
# ---------------------------------------------------------------------------------------------
def test_inception_score_closed_forms():
    uniform = torch.randn(100, 1, generator=gen()).expand(100, 10)
    assert inception_score(uniform) == pytest.approx((1, 0), abs=1e-12)
    sharp = 100 * torch.eye(10).repeat(20, 1)                                  # balanced in each part
    assert inception_score(sharp) == pytest.approx((10, 0), abs=1e-9)
    assert inception_score(sharp + 7)[0] == pytest.approx(10)                  # logits have no origin
    assert inception_score(torch.cat([sharp[:1]] * 50))[0] == pytest.approx(1)   # sharp, one class
    # Classes 0-4 with equal chance, the others never; a sample is sure of its own with p = 0.9
    p = torch.full((200, 10), 1e-30)
    p[:, :5] = 0.025
    p[torch.arange(200), torch.arange(200) % 5] = 0.9
    expected = math.exp(0.9 * math.log(0.9 * 5) + 4 * 0.025 * math.log(0.025 * 5))
    assert inception_score(p.log())[0] == pytest.approx(expected, rel=1e-6)


def test_inception_score_splits():
    a, b = 100 * torch.eye(8).repeat(4, 1), torch.zeros(32, 8)
    assert inception_score(torch.cat([a, b]), splits=2) == pytest.approx((4.5, 3.5))
    assert inception_score(a, splits=1) == pytest.approx((8, 0))


def test_inception_score_of_a_class_with_probability_zero():
    logits = 1e4 * torch.eye(10)[:5].repeat(20, 1)          # exp(-1e4) is 0: 0 log 0 must be 0
    assert inception_score(logits) == pytest.approx((5, 0))


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


def test_folder(tmp_path, capsys):
    (tmp_path / "dogs").mkdir()
    (tmp_path / "cats" / "old").mkdir(parents=True)
    # Wide: the middle is red between blue bars. Tall: the middle is green between white bars.
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[..., 2], wide[:, 20:60] = 255, (255, 0, 0)
    tall = np.full((90, 30, 3), 255, np.uint8)
    tall[30:60] = (0, 255, 0)
    Image.fromarray(wide).save(tmp_path / "dogs" / "wide.png")
    Image.fromarray(tall).save(tmp_path / "cats" / "old" / "tall.PNG")
    Image.fromarray(np.full((20, 20), 77, np.uint8)).save(tmp_path / "cats" / "grey.bmp")
    Image.fromarray(np.full((20, 20, 4), 200, np.uint8)).save(tmp_path / "dogs" / "alpha.png")
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    x, y, captions = load_images(str(tmp_path), res=16)
    assert x.shape == (4, 3, 16, 16) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert captions == ["cats", "dogs"] and sorted(y.tolist()) == [0, 0, 1, 1]
    pixels = {tuple(image[:, 8, 8].tolist()): (image, captions[k]) for image, k in zip(x, y)}
    red, green, grey = pixels[255, 0, 0], pixels[0, 255, 0], pixels[77, 77, 77]
    assert (red[1], green[1], grey[1]) == ("dogs", "cats", "cats")
    assert (grey[0] == 77).all()
    for image, c in ((red[0], 0), (green[0], 1)):                              # the bars are cut off
        inner = image[:, 2:-2, 2:-2]                        # Pillow's filter looks a bit beyond its box
        assert (inner[c] >= 254).all() and (inner[[k for k in range(3) if k != c]] <= 1).all()
        assert (image[c] > 200).all()
    assert capsys.readouterr().err == ""


def test_folder_keeps_up_up_and_left_left(tmp_path):
    a = np.zeros((32, 32, 3), np.uint8)
    a[:16, :16], a[16:, :16] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(a).save(tmp_path / "a.png")
    x, y, captions = load_images(str(tmp_path), res=8)
    assert (x[0] > 128)[:, 1, 1].tolist() == [True, False, False]
    assert (x[0] > 128)[:, 6, 1].tolist() == [False, False, True]
    assert (x[0] < 20)[:, 1, 6].all() and captions == [""] and y.tolist() == [0]
    x, _, _ = load_images(str(tmp_path), res=32)
    assert (x[0].permute(1, 2, 0).numpy() == a).all()


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)).save(tmp_path / "a.png")
    assert (load_images(str(tmp_path), res=8)[0].float() - 100).abs().max() <= 1


def bad_images(folder):
    """Images that cannot be read, of several kinds."""
    good = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png", "cut.webp"):        # a valid header, then half of the data
        good.save(folder / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:len(content) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    good.save(folder / "chunk.png")                        # Pillow: SyntaxError, broken PNG file
    content = bytearray((folder / "chunk.png").read_bytes())
    content[37:41] = b"\x00\x01\x02\x03"
    (folder / "chunk.png").write_bytes(content)
    good.save(folder / "huge.bmp")                         # a damaged header: 64 x 2^30 pixels
    content = bytearray((folder / "huge.bmp").read_bytes())
    content[25] = 0x40
    (folder / "huge.bmp").write_bytes(content)
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "cut.webp", "empty.png", "text.jpg", "chunk.png",
                                  "huge.bmp"])
def test_damaged_image_among_good_ones(tmp_path, capsys, name):
    assert name in bad_images(tmp_path)
    for p in tmp_path.iterdir():
        if p.name != name:
            p.unlink()
    for i in range(3):
        Image.fromarray(np.full((20, 20, 3), 50 + i, np.uint8)).save(tmp_path / f"good{i}.png")
    x, y, _ = load_images(str(tmp_path), res=8)
    assert x[:, 0, 0, 0].tolist() == [50, 51, 52] and len(y) == 3
    err = capsys.readouterr().err
    assert err.startswith("warning:") and name in err and err.count("\n") == 1


def test_no_image_left(tmp_path, capsys):
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
            load_images(str(tmp_path))
        one_line(error)
        (tmp_path / "text.jpg").write_text("no image")      # second: only a damaged one
    assert "text.jpg" in capsys.readouterr().err


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


def test_count_macs_on_the_cpu():
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8, requires_grad=True)
    assert count_macs(conv, x) == 4 * 36 * 27                                  # and no backward pass


# ---------------------------------------------------------------------------------------------
# Images to files
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


def test_curves_go_through_their_points(tmp_path):
    """Black for the first curve, crimson for the second, orange for the mark; where neither is, white."""
    save_curves(tmp_path / "a.png", [(0, 1, 0.25), (0.5, 1, 0.25), (1, 1, 0.25)], ("up", "down"), [0.3])
    image = Image.open(tmp_path / "a.png")
    assert image.getpixel((50 + 340, 400 - 370)) == (0, 0, 0)
    assert image.getpixel((50 + 340, round(400 - 370 * 0.25))) == (220, 20, 60)
    assert image.getpixel((50 + 204, 400 - 185)) == (255, 140, 0)
    assert image.getpixel((50 + 340, 400 - 185)) == (255, 255, 255)


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
    assert text.count("\r") == 9 and text.count("\n") == 1 and text.endswith("\n")
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


def test_caption_score_and_class_logits(extractor):
    captions = ["red box", "green ball", "blue box"]
    text = extractor.embed_text(captions)
    assert caption_score(extractor, text, captions) == pytest.approx(1, abs=1e-6)
    assert caption_score(extractor, -text, captions) == pytest.approx(-1, abs=1e-6)
    half = torch.cat([text[:1], -text[1:2]])
    assert caption_score(extractor, half, captions[:2]) == pytest.approx(0, abs=1e-6)
    logits = class_logits(extractor, text[[2, 0]], captions)
    assert logits.shape == (2, 3) and logits.argmax(1).tolist() == [2, 0]
    assert logits[0, 2].item() == pytest.approx(10, rel=1e-5)                  # exp(log_scale) * cosine
    assert logits[0, 0].item() == pytest.approx(10 * (text[2] @ text[0]).item(), abs=1e-5)


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
    with pytest.raises(OSError, match="nope.pth"):
        load_extractor("fashion", cpu, inception=str(tmp_path / "nope.pth"))
