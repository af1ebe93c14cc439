"""Folders of images: each file is built by hand, its expected pixels are known without Pillow's help."""
import importlib
import importlib.util
import io
import json
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import load_images
from in_process import start_script

ROOT = Path(__file__).resolve().parent.parent
CORNERS = np.array([[10, 80], [150, 220]], np.uint8)         # top left, top right; bottom left, bottom right


def big(corners, times=32):
    return np.kron(corners, np.ones((times, times), corners.dtype))


def corners_of(x):
    """The value in the middle of each quarter of a grey image (C, R, R)."""
    r = x.shape[-1]
    return x[0, r // 4::r // 2, r // 4::r // 2].int().numpy()


def flat(folder, name, value, mode="L", size=(8, 8), **save):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(folder / name, **save)


def load(folder, res=8, **options):
    return load_images(str(folder), res, **options)


def png(width, height, depth, colour, rows, trns):
    """The bytes of a PNG, chunk by chunk."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"tRNS", trns) + chunk(b"IDAT", data)
            + chunk(b"IEND", b""))


def tiff(a, bits=None, data=None):
    """The bytes of a grey TIFF with the sample format of array a (data: its packed bytes)."""
    e = ">" if a.dtype.byteorder == ">" else "<"
    data = a.tobytes() if data is None else data
    data += b"\0" * (len(data) % 2)
    tags = {256: a.shape[1], 257: a.shape[0], 258: bits or 8 * a.itemsize, 259: 1, 262: 1, 273: 8, 277: 1,
            278: a.shape[0], 279: len(data), 339: {"u": 1, "i": 2, "f": 3}[a.dtype.kind]}
    entries = b"".join(struct.pack(e + "HHII", t, 4, 1, v) for t, v in tags.items())
    start = (b"MM\0*" if e == ">" else b"II*\0") + struct.pack(e + "I", 8 + len(data))
    return start + data + struct.pack(e + "H", len(tags)) + entries + b"\0\0\0\0"


TURNED = {1: [[10, 80], [150, 220]], 2: [[80, 10], [220, 150]], 3: [[220, 150], [80, 10]],       # EXIF 2.3, table
          4: [[150, 220], [10, 80]], 5: [[10, 150], [80, 220]], 6: [[150, 10], [220, 80]],       # of Orientation
          7: [[220, 80], [150, 10]], 8: [[80, 220], [10, 150]]}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_orientation(tmp_path, suffix, capsys):
    image = Image.fromarray(big(CORNERS))
    for k in TURNED:
        exif = Image.Exif()
        exif[274] = k
        image.save(tmp_path / f"{k}.{suffix}", exif=exif)
    x, _, _ = load(tmp_path, 32)
    for k, image in zip(TURNED, x):
        assert abs(corners_of(image) - TURNED[k]).max() <= 4, k
    assert x.shape == (8, 1, 32, 32) and capsys.readouterr().err == ""


def test_orientation_of_sixteen_bits_and_of_damaged_exif(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(big(CORNERS).astype(np.uint16) * 257).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(big(CORNERS).astype(np.uint16) * 257).save(tmp_path / "b.tif", exif=exif)
    Image.fromarray(big(CORNERS)).save(tmp_path / "c.jpg", quality=95, exif=b"Exif\0\0garbage!")
    x, _, _ = load(tmp_path, 64)
    assert corners_of(x[0]).tolist() == corners_of(x[1]).tolist() == TURNED[6]
    assert abs(corners_of(x[2]) - TURNED[1]).max() <= 4


def alpha_case(folder, kind):
    """Left half transparent over a strong colour, right half opaque; returns the right half's RGB."""
    half = np.zeros((8, 8), bool)
    half[:, :4] = True
    colour = np.where(half[..., None], (0, 255, 0), (200, 30, 40)).astype(np.uint8)
    grey = np.where(half, 0, 90).astype(np.uint8)
    opaque = np.where(half, 0, 255).astype(np.uint8)
    name = folder / (kind + (".gif" if kind == "gif" else ".webp" if kind == "webp" else ".png"))
    if kind in ("rgba", "webp"):
        options = {"lossless": True, "exact": True} if kind == "webp" else {}
        Image.fromarray(np.dstack([colour, opaque])).save(name, **options)
    elif kind == "la":
        Image.fromarray(np.dstack([grey, opaque])).save(name)
    elif kind in ("palette", "palette bytes", "gif"):
        image = Image.new("P", (8, 8))
        image.putdata((~half).astype(np.uint8).ravel().tolist())
        image.putpalette([0, 255, 0, 200, 30, 40])
        image.save(name, transparency=b"\0\xff" if kind == "palette bytes" else 0)
    elif kind == "grey key":
        name.write_bytes(png(8, 8, 8, 0, [r.tobytes() for r in grey], struct.pack(">H", 0)))
    elif kind == "grey 16 key":
        name.write_bytes(png(8, 8, 16, 0, [(r.astype(">u2") * 257).tobytes() for r in grey], struct.pack(">H", 0)))
    elif kind == "rgb key":
        name.write_bytes(png(8, 8, 8, 2, [r.tobytes() for r in colour], struct.pack(">HHH", 0, 255, 0)))
    return (90, 90, 90) if kind.startswith(("la", "grey")) else (200, 30, 40)


@pytest.mark.parametrize("kind", ["rgba", "webp", "la", "palette", "palette bytes", "gif", "grey key", "grey 16 key",
                                  "rgb key"])
def test_transparency_is_laid_on_white(tmp_path, kind):
    right = alpha_case(tmp_path, kind)
    x, _, _ = load(tmp_path, 8, channels=3)
    assert (x[0, :, :, :4] == 255).all()
    assert (x[0, :, :, 4:] == torch.tensor(right).view(3, 1, 1)).all()


def test_half_transparent(tmp_path):
    flat(tmp_path, "a.png", (0, 100, 200, 51), "RGBA")          # 51 / 255 = 1 / 5: 0.8 * 255 + 0.2 * value
    flat(tmp_path, "b.png", (50, 51), "LA")
    x, _, _ = load(tmp_path)
    assert x[0, :, 3, 3].tolist() == [204, 224, 244] and x[1, :, 3, 3].tolist() == [214] * 3


DEEP = {                                                        # array, corners expected, words in the message
    "u16": (np.array([[0, 257], [25700, 65535]], "<u2"), [[0, 1], [100, 255]], "0 .. 65535"),
    "u16 big-endian": (np.array([[0, 257], [25700, 65535]], ">u2"), [[0, 1], [100, 255]], "0 .. 65535"),
    "u16 dark": (np.array([[0, 2570], [5140, 7710]], "<u2"), [[0, 10], [20, 30]], "0 .. 65535"),
    "i16": (np.array([[-1000, 0], [1000, 1550]], "<i2"), [[0, 100], [200, 255]], "smallest"),
    "i32 small": (np.array([[0, 10], [100, 200]], "<i4"), [[0, 10], [100, 200]], "0 .. 255"),
    "i32": (np.array([[10 ** 6, 10 ** 6 + 100 * 255], [10 ** 6 + 1000 * 51, 10 ** 6 + 255000]], "<i4"),
            [[0, 26], [51, 255]], "smallest"),
    "u32": (np.array([[0, 10 ** 9], [2 * 10 ** 9, 4 * 10 ** 9]], "<u4"), [[0, 64], [128, 255]], "smallest"),
    "f32 0..1": (np.array([[0, .2], [.4, .6]], "<f4"), [[0, 51], [102, 153]], "0 .. 1"),
    "f32 0..255": (np.array([[0, 20], [100, 200]], "<f4"), [[0, 20], [100, 200]], "0 .. 255"),
    "f32 -1..1": (np.array([[-1, 0], [.2, 1]], "<f4"), [[0, 128], [153, 255]], "smallest"),
    "f32 kelvin": (np.array([[280, 290], [300, 305]], "<f4"), [[0, 102], [204, 255]], "smallest"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_images_are_scaled_and_it_is_said_once(tmp_path, kind, capsys):
    a, expected, words = DEEP[kind]
    for name in ("a.tif", "b.TIFF"):
        (tmp_path / name).write_bytes(tiff(big(a)))
    x, _, _ = load(tmp_path, 64)
    err = capsys.readouterr().err
    assert x.shape == (2, 1, 64, 64) and abs(corners_of(x[0]) - expected).max() <= 1 and (x[0] == x[1]).all()
    assert err.count("\n") == 1 and words in err and " 2 of" in err


def test_twelve_bits(tmp_path):
    packed = bytes([0x00, 0x0f, 0xff]) * 32                      # pairs 0, 4095
    (tmp_path / "a.tif").write_bytes(tiff(np.zeros((8, 8), np.uint16), bits=12, data=packed))
    x, _, _ = load(tmp_path)
    assert x[0, 0, 0, :4].tolist() == [0, 255, 0, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -3.0])
def test_floats_without_a_scale_are_refused_by_name(tmp_path, capsys, value):
    a = np.full((8, 8), .5, "<f4")
    a[3 if np.isinf(value) else slice(None)] = value             # -3 everywhere: no range
    (tmp_path / "strange.tif").write_bytes(tiff(a))
    flat(tmp_path, "good.png", 7)
    x, _, _ = load(tmp_path)
    err = capsys.readouterr().err
    assert len(x) == 1 and (x == 7).all()
    assert err.count("\n") == 1 and "strange.tif" in err and ("NaN" in err or "-3" in err)


def test_hidden_names_are_left_out(tmp_path):
    root = tmp_path / ".hidden parent"                           # only names below the folder count
    flat(root / "cats", "a.png", 1)
    flat(root / "cats", ".b.png", 2)
    flat(root / "cats", "._a.png", 3)
    flat(root / ".ipynb_checkpoints", "a.png", 4)
    flat(root / "cats" / ".thumbs" / "deep", "a.png", 5)
    x, y, captions = load(root)
    assert x[:, 0, 0, 0].tolist() == [1] and y.tolist() == [0] and captions == ["cats"]


def link(path, target):
    try:
        path.symlink_to(target, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = tmp_path / "root"
    flat(root / "cats", "a.png", 1)
    flat(tmp_path / "elsewhere" / "deep", "b.png", 2)
    flat(tmp_path / "single", "c.png", 3)
    link(root / "dogs", tmp_path / "elsewhere")                  # a class that is a link
    link(root / "cows", root / "cats")                           # two classes, one folder
    link(root / "cats" / "z.png", tmp_path / "single" / "c.png")
    link(root / "cats" / "up", root)                             # circles: to above, to itself, to each other
    link(root / "cats" / "self", root / "cats" / "self")
    link(tmp_path / "elsewhere" / "deep" / "back", tmp_path / "elsewhere")
    x, y, captions = load(root)
    assert captions == ["cats", "cows", "dogs"]
    assert sorted(zip(y.tolist(), x[:, 0, 0, 0].tolist())) == [(0, 1), (0, 3), (1, 1), (1, 3), (2, 2)]


def test_two_folders_that_link_to_each_other(tmp_path):
    for k, name in enumerate("ab"):
        flat(tmp_path / name, "x.png", k)
    link(tmp_path / "a" / "b", tmp_path / "b")
    link(tmp_path / "b" / "a", tmp_path / "a")
    x, y, _ = load(tmp_path)
    assert sorted(zip(y.tolist(), x[:, 0, 0, 0].tolist())) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_channels(tmp_path):
    flat(tmp_path, "a.png", 7)
    flat(tmp_path, "b.jpg", (90, 90, 90), "RGB", quality=95)     # grey, stored in colour
    flat(tmp_path, "c.png", 1, "1")
    flat(tmp_path, "d.png", (30, 255), "LA")
    assert load(tmp_path)[0][:, :, 3, 3].tolist() == [[7], [90], [255], [30]]
    assert load(tmp_path, channels=1)[0][:, :, 3, 3].tolist() == [[7], [90], [255], [30]]
    assert load(tmp_path, channels=3)[0][:, :, 3, 3].tolist() == [[7] * 3, [90] * 3, [255] * 3, [30] * 3]
    flat(tmp_path, "e.png", (255, 0, 0), "RGB")
    x = load(tmp_path)[0]
    assert x.shape == (5, 3, 8, 8) and x[0, :, 0, 0].tolist() == [7] * 3 and x[4, :, 0, 0].tolist() == [255, 0, 0]
    x = load(tmp_path, channels=1)[0]
    assert x.shape == (5, 1, 8, 8) and x[4, 0, 0, 0] == 76       # 0.299 * 255


@pytest.mark.parametrize("mode, value, expected", [
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("CMYK", (0, 0, 0, 255), (0, 0, 0)), ("P", 0, (0, 0, 0)),
    ("RGB", (1, 2, 3), (1, 2, 3)), ("1", 0, (0, 0, 0))])
def test_other_modes(tmp_path, mode, value, expected):
    flat(tmp_path, "a.tif", value, mode)
    assert load(tmp_path, channels=3)[0][0, :, 2, 2].tolist() == list(expected)


def test_damaged_files_are_named_up_to_five(tmp_path, capsys):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("1.jpg", "2.png", "3.webp"):
        out = io.BytesIO()
        noise.save(out, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[name[2:]])
        (tmp_path / name).write_bytes(out.getvalue()[:len(out.getvalue()) // 2])
    (tmp_path / "4.gif").write_bytes(b"")
    (tmp_path / "5.bmp").write_text("no image")
    flat(tmp_path / "cats", "good.png", 9)
    assert load(tmp_path)[0].shape == (1, 1, 8, 8)
    err = capsys.readouterr().err
    assert err.startswith("warning: 5 ") and err.count("\n") == 1 and "more" not in err
    assert all(name in err for name in ("1.jpg", "2.png", "3.webp", "4.gif", "5.bmp"))
    for k in range(6, 9):
        (tmp_path / "cats" / f"{k}.png").write_text("no image")
    x, y, captions = load(tmp_path)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and " 8 " in err and "and 3 more" in err and "cats" not in err
    assert (x == 9).all() and captions == ["cats"] and y.tolist() == [0]


@pytest.mark.parametrize("content", ["nothing", "text", "damaged", "hidden"])
def test_folder_without_images_says_what_is_read(tmp_path, content):
    if content != "nothing":
        name = {"text": "a.txt", "damaged": "a.png", "hidden": ".a.png"}[content]
        (tmp_path / name).write_text("no image")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    line = str(error.value)
    assert str(tmp_path) in line and ".jpeg" in line and ".webp" in line and "\n" not in line


@pytest.mark.parametrize("name", ["a.png", "notes.txt", "missing"])
def test_file_instead_of_a_folder(tmp_path, name):
    flat(tmp_path, "a.png", 1)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError) as error:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "folder" in str(error.value)
    assert "\n" not in str(error.value)


def test_captions_are_the_first_folders(tmp_path):
    flat(tmp_path, "a.png", 1)
    flat(tmp_path / "dogs" / "cats", "b.PNG", 2)
    flat(tmp_path / "birds.png", "c.jpeg", 3)                    # a folder that is called like a file
    x, y, captions = load(tmp_path)
    assert captions == ["", "birds.png", "dogs"] and y.dtype == torch.int64
    assert {captions[k]: v for k, v in zip(y.tolist(), x[:, 0, 0, 0].tolist())} == {"": 1, "birds.png": 3, "dogs": 2}


def test_animations_show_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for name in ("a.gif", "b.png", "c.webp", "d.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **(
            {"lossless": True} if name == "c.webp" else {}))
    x, _, _ = load(tmp_path)
    assert x[:, :, 4, 4].tolist() == [[255, 0, 0]] * 4


def test_sizes(tmp_path):
    flat(tmp_path, "a.png", (5, 6, 7), "RGB", (1, 1))
    flat(tmp_path, "b.png", (5, 6, 7), "RGB", (300, 1))
    flat(tmp_path, "c.png", (5, 6, 7), "RGB", (2, 90))
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = (5, 6, 7)                                   # the middle third is what stays
    Image.fromarray(wide).save(tmp_path / "d.png")
    for res in (1, 5, 64):
        x, _, _ = load(tmp_path, res)
        assert x.shape == (4, 3, res, res) and x.dtype == torch.uint8
        assert (x[:3] == torch.tensor([5, 6, 7]).view(3, 1, 1)).all()
        assert res == 1 or x[3, :, res // 2, res // 2].tolist() == [5, 6, 7]    # Pillow looks a bit beyond its box


def test_pixels_are_kept_where_nothing_is_to_do(tmp_path):
    a = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for k in range(2):
        Image.fromarray(a[k]).save(tmp_path / f"{k}.png")
    assert (load(tmp_path, 16)[0].numpy() == a.transpose(0, 3, 1, 2)).all()


def test_thousands_of_files_with_progress(tmp_path, monkeypatch):
    flat(tmp_path / "c0", "0.png", 3, size=(2, 2))
    content = (tmp_path / "c0" / "0.png").read_bytes()
    for k in range(1, 2000):
        (tmp_path / f"c{k % 4}").mkdir(exist_ok=True)
        (tmp_path / f"c{k % 4}" / f"{k}.png").write_bytes(content)
    calls = []
    monkeypatch.setattr(common, "progress", lambda items, title, *more, **options: calls.append(len(items)) or items)
    open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    x, y, captions = load(tmp_path, 4)
    assert x.shape == (2000, 1, 4, 4) and (x == 3).all() and calls == [2000]
    assert np.bincount(y).tolist() == [500] * 4 and captions == ["c0", "c1", "c2", "c3"]
    assert open_files is None or len(os.listdir("/proc/self/fd")) <= open_files + 1


def test_files_of_other_kinds_are_named(tmp_path, capsys):
    flat(tmp_path, "a.png", 1)
    flat(tmp_path, "b.jfif", 1)
    for name in ("notes.txt", "raw.NEF", "extractor.pt", ".hidden"):
        (tmp_path / name).write_text("no image")
    assert len(load(tmp_path)[0]) == 2
    err = capsys.readouterr().err
    assert ".txt" in err and ".NEF" in err and ".pt" not in err and "hidden" not in err


# ---------------------------------------------------------------------------------------------
# From a folder to a number
# ---------------------------------------------------------------------------------------------
@pytest.fixture
def photos(tmp_path):
    """300 images of mixed sizes, kinds and modes in three folders, called as a data set is."""
    rng = np.random.default_rng(0)
    for i in range(300):
        image = Image.fromarray(rng.integers(0, 256, (int(rng.integers(3, 40)), int(rng.integers(3, 40)), 3), np.uint8))
        image = image.convert(("RGB", "L", "P", "RGBA")[i % 4])
        path = tmp_path / "fashion_photos" / f"kind {i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return tmp_path / "fashion_photos"


@pytest.fixture
def train_extractor(monkeypatch):
    """weights/train_extractor.py of a few steps."""
    spec = importlib.util.spec_from_file_location("train_extractor", ROOT / "weights" / "train_extractor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER_STEPS", 1)
    return lambda *argv: module.start([str(v) for v in argv])


@pytest.mark.parametrize("classes", [True, False])
def test_a_folder_gets_an_extractor(photos, classes, train_extractor, tmp_path):
    """With classes, and without: there every image is its own. From it FD of a network's samples."""
    folder = photos if classes else photos / "kind 0"
    if not classes:
        for path in [*(photos / "kind 1").iterdir(), *(photos / "kind 2").iterdir()]:
            path.rename(folder / path.name)
    with pytest.raises(ValueError, match=re.escape(f"train_extractor.py {folder}")):
        common.load_extractor(str(folder), torch.device("cpu"))
    train_extractor(folder)
    extractor, name = common.load_extractor(str(folder), torch.device("cpu"))
    assert name == f"small-{folder.name}" and len(extractor.words) == (4 if classes else 300)
    report = json.loads((folder / "extractor.json").read_text())
    assert len(report["fd"]["blur"]) == 3 and report["fd_images"] == [150, 150]
    c2f_trd = importlib.import_module("c2f_trd")
    result = start_script(c2f_trd, "--train", "--ch", 8, "--mult", 1, 1, "--attention", -1, "--patch", 4, "--iters", 2,
                          "--batch", 4, "--data", folder, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    sys.path[:0] = [str(ROOT / "results")]
    importlib.import_module("evaluate").main([
        "c2f_trd", "--out", str(tmp_path / "run"), "--method", "base", "--solver", "ddim", "--steps", "1", "--n", "140",
        "--seeds", "1", "--results", str(tmp_path / "results.jsonl")])
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["extractor"] == name and row["fd"] > 0


def test_folders_too_small_for_a_distance(train_extractor, tmp_path):
    for k in range(128):
        flat(tmp_path / "few", f"{k}.png", k)
    with pytest.raises(ValueError, match="few has 128 images.*more than 128"):
        train_extractor(tmp_path / "few")
    assert not list((tmp_path / "few").glob("extractor*"))
    flat(tmp_path / "few", "more.png", 3)                        # 129: one reference, no halves to compare
    train_extractor(tmp_path / "few")
    assert "fd" not in json.loads((tmp_path / "few" / "extractor.json").read_text())


@pytest.mark.parametrize("argv", [[], ["--help"], ["a", "b"], ["a", "32", "c"], ["nowhere"]])
def test_wrong_use_of_the_extractors_training(train_extractor, argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError if argv == ["nowhere"] else SystemExit, match="nowhere|FOLDER"):
        train_extractor(*argv)
    assert not list(tmp_path.iterdir())
