"""What the four scripts share, as plain functions: data, noise schedule, MAC counting, features and
metrics, per-image seeds, progress, image grids. No network of a method, no sampler, no training loop.

Copy this file together with the script that you need; the two alone run in an empty folder
(with `--data FOLDER`, or the files of data/ beside them).

Conventions: images are uint8 (N, C, R, R) on disk and float in [-1, 1] in networks; a class or caption
is an index y into a list of captions. Errors that a user can cause are ValueError or OSError with one line
that says what to do; the scripts print that line and exit with status 1.
"""
import contextlib
import gzip
import hashlib
import json
import math
import os
import sys
import tarfile
import time
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------
FASHION_CLASSES = ("t-shirt top", "trouser", "pullover", "dress", "coat", "sandal", "shirt",
                   "sneaker", "bag", "ankle boot")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                   "truck")
FASHION_URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = {
    "emoji.png": "f7f08942c45183fa716b2c65a0b308b7685af4c2998f56c8ac13fe8a2c8c88c6",
    "emoji.txt": "a4f62a72cee23ee7b28e689949fe099edf52ae90365400a95e1fa1b4749d0a30",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
}


def sha256_of(path):
    """Hex SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def find_data_file(name, url=None, root=HERE / "data"):
    """Path of data file `name`: in `root`, in the folder of Debian's dataset-fashion-mnist, else
    downloaded from `url` into `root`; its SHA-256 is checked every time. Raises OSError."""
    folders = [Path(root), Path("/usr/share/datasets/fashion-mnist")]
    path = next((f / name for f in folders if (f / name).is_file()), None)
    if path is None:
        if url is None:
            raise OSError(f"{folders[0] / name} is missing: restore it with `git checkout -- data`")
        print(f"downloading {url}", file=sys.stderr)
        path = folders[0] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=SHA256[name])
        except (OSError, RuntimeError) as error:
            raise OSError(f"no {name}: download it from {url} to {path} ({error})") from None
    if name in SHA256 and sha256_of(path) != SHA256[name]:
        raise OSError(f"{path} is damaged (its SHA-256 is not {SHA256[name][:12]}...): delete it "
                      "and restore it with `git checkout -- data`, or let it download again")
    return path


def load_idx(path):
    """The array in a gzipped IDX file (the MNIST format), uint8."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()


def load_images(name, res=32, root=HERE / "data"):
    """A data set by name, or a folder of images.

    name: fashion10k | fashion | cifar10 | emoji | a folder (sub-folders are its classes).
    res: side R to which a folder's images are centre-cropped and resized; the others have their own.
    Returns x uint8 (N, C, R, R), y int64 (N,), captions (list of str): image i shows captions[y[i]].
    Raises OSError if a file is missing or damaged, ValueError if the name or folder is of no use.
    """
    if name in ("fashion10k", "fashion"):
        part, url = ("t10k", None) if name == "fashion10k" else ("train", FASHION_URL)
        files = [f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"]
        x, y = (load_idx(find_data_file(f, url and url + f, root)) for f in files)
        x = np.pad(x, ((0, 0), (2, 2), (2, 2)))[:, None]                       # 28 -> 32
        captions = list(FASHION_CLASSES)
    elif name == "cifar10":
        with tarfile.open(find_data_file("cifar-10-binary.tar.gz", CIFAR10_URL, root)) as tar:
            batches = sorted(m for m in tar.getnames() if "data_batch" in m)
            raw = b"".join(tar.extractfile(m).read() for m in batches)
        rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)                  # label, RRR GGG BBB
        x, y, captions = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0], list(CIFAR10_CLASSES)
    elif name == "emoji":
        sheet, text = (find_data_file(f, None, root) for f in ("emoji.png", "emoji.txt"))
        lines = [s.split("\t")[-1] for s in text.read_text().splitlines()]
        tiles = np.asarray(Image.open(sheet).convert("RGB"))
        rows, cols = tiles.shape[0] // 64, tiles.shape[1] // 64
        x = tiles.reshape(rows, 64, cols, 64, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 64, 64)
        captions = sorted(set(lines))
        x, y = x[:len(lines)], np.array([captions.index(s) for s in lines])
    elif Path(name).is_dir():
        x, y, captions = load_folder(Path(name), res)
    else:
        raise ValueError(f"no data set or folder '{name}': use fashion10k, fashion, cifar10, emoji "
                         "or the path of a folder of images")
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64)), captions


def load_folder(folder, res):
    """Images under `folder`, centre-cropped to a square and resized to res x res, RGB; damaged files
    are named and left out. Returns x, y, captions as arrays; captions are the sub-folders' names."""
    kinds = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds)
    x, names, damaged = [], [], []
    for p in paths:
        try:
            image = Image.open(p)
            if image.mode.startswith("I;16"):                    # 16-bit grey, which convert would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):   # Pillow's for bad files
            damaged.append(p.name)
            continue
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        x.append(np.asarray(image.resize((res, res), Image.LANCZOS, box)).transpose(2, 0, 1))
        parent = p.relative_to(folder).parent
        names.append(parent.parts[0] if parent.parts else "")
    if damaged:
        print(f"warning: {len(damaged)} damaged images left out: {', '.join(damaged[:5])}",
              file=sys.stderr)
    if not x:
        raise ValueError(f"no readable images in {folder} ({', '.join(sorted(kinds))})")
    captions = sorted(set(names))
    return np.stack(x), np.array([captions.index(s) for s in names]), captions


def to_float(x):
    """uint8 images -> float32 in [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x):
    """Float images in [-1, 1] (clipped) -> uint8."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------
# Noise schedule and seeds
# ---------------------------------------------------------------------------------------------
def linear_alpha_bar(T=1000, beta_first=1e-4, beta_last=0.02):
    """DDPM's linear schedule: float64 (T + 1,) with alpha_bar[t] = prod_{s<=t} (1 - beta_s) and one
    more entry, 1, at the end: the index -1 means clean data (t = -1)."""
    beta = torch.linspace(beta_first, beta_last, T, dtype=torch.float64)
    return torch.cat([(1 - beta).cumprod(0), torch.ones(1, dtype=torch.float64)])


def add_noise(x0, eps, t, alpha_bar):
    """q(xt | x0) sampled with eps: sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps; t int64 (B,)."""
    a = alpha_bar.to(x0.device)[t].view(-1, 1, 1, 1)
    return a.sqrt().to(x0.dtype) * x0 + (1 - a).sqrt().to(x0.dtype) * eps


def noise_for(seeds, *shapes):
    """Standard normal noise, seed by seed, so that seed i makes image i at any batch size, on any
    device and in any process. shapes: one or more (C, H, W), drawn in this order from each seed.
    Returns a CPU float32 tensor (len(seeds), C, H, W), or a list of them for several shapes."""
    rows = []
    for seed in seeds:
        g = torch.Generator().manual_seed(int(seed))
        rows.append([torch.randn(shape, generator=g) for shape in shapes])
    noise = [torch.stack(column) for column in zip(*rows)]
    return noise[0] if len(shapes) == 1 else noise


# ---------------------------------------------------------------------------------------------
# Devices, processes, progress, files
# ---------------------------------------------------------------------------------------------
def start_device(name="auto"):
    """Returns (device, rank, world). Under torchrun, joins the process group (NCCL on CUDA, gloo on
    CPU). name: auto (CUDA if there is one, else CPU), cpu or cuda."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device: use --device cpu")
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(days=1))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name), rank, world


def gather(part, world):
    """All processes' shares (n, ...), on the CPU, put back in order: share r holds items r, r + world, ..."""
    parts = [part] * world
    if world > 1:
        dist.all_gather_object(parts, part)
    order = torch.cat([torch.arange(sum(map(len, parts)))[r::world] for r in range(world)]).argsort()
    return torch.cat(parts)[order]


def has_fast_bf16(device):
    """Does bfloat16 arithmetic run in hardware? (Emulated on a CPU it is ten times slower.)"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def progress(items, title, unit=1, every=15.0, note=lambda: ""):
    """Yields from the sequence `items`; prints rate and time left to stderr: one line that renews
    itself on a terminal, a plain line every `every` seconds in a log. unit: images per item;
    note: called when a line is printed."""
    tty, total, start = sys.stderr.isatty(), len(items), time.time()
    shown, quiet = start, dist.is_initialized() and dist.get_rank() > 0
    for done, item in enumerate(items, 1):
        yield item
        now = time.time()
        if not quiet and (now - shown > (0.5 if tty else every) or (done == total and now - start > 2)):
            rate, shown = done / (now - start), now
            left = str(timedelta(seconds=int((total - done) / rate))).rjust(8, "0")
            line = f"{title} {done}/{total}  {rate * unit:.1f} images/s  {left} left  {note()}"
            end = "\r" if tty and done < total else "\n"
            print(line.ljust(78) if tty else line, end=end, file=sys.stderr, flush=True)


def write_atomically(path, write):
    """Calls write(temporary path), then renames it to `path`: a reader or a kill at any moment finds
    the old file or the new one. Raises OSError with a line that names the file (disk full, ...)."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except BaseException as error:                     # also Ctrl-C
        with contextlib.suppress(OSError):
            part.unlink()
        if not isinstance(error, (OSError, RuntimeError)):     # torch.save: a full disk is a RuntimeError
            raise
        raise OSError(f"cannot write {path}: {' '.join(str(error).split())}") from None


def save_json(path, value):
    """A dict or list as JSON, one entry a line; written atomically."""
    named = isinstance(value, dict)
    rows = [json.dumps(k) + ": " + json.dumps(v) for k, v in value.items()] if named else map(json.dumps, value)
    first, last = "{}" if named else "[]"
    text = first + "\n " + ",\n ".join(rows) + "\n" + last + "\n"
    write_atomically(path, lambda part: part.write_text(text))


def save_grid(path, x, columns=8, scale=2):
    """PNG of the images x (N, C, H, W), float in [-1, 1] or uint8, row by row, `columns` a row."""
    x = x if x.dtype == torch.uint8 else to_uint8(x)
    x = x.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, c, h, w = x.shape
    x = F.pad(x, (1, 1, 1, 1), value=255)                                      # a white line between
    x = torch.cat([x, x.new_full((-n % columns, *x.shape[1:]), 255)])
    x = x.view(-1, columns, c, h + 2, w + 2).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    image = Image.fromarray(x.squeeze(-1).numpy())
    write_atomically(path, lambda part: image.save(part, "PNG"))


def save_curves(path, rows, names, marks=()):
    """PNG of curves over t = 0 .. 1 with values 0 .. 1: rows of (t, a value for each name); marks: vertical lines."""
    image = Image.new("RGB", (760, 440), "white")
    draw, colours = ImageDraw.Draw(image), ("black", "crimson", "steelblue", "seagreen")

    def at(t, v):                                                              # a point's position in pixels
        return 50 + 680 * t, 400 - 370 * v

    for k in (0, 0.2, 0.4, 0.6, 0.8, 1):
        draw.line([at(k, 0), at(k, 1)], "gainsboro")
        draw.line([at(0, k), at(1, k)], "gainsboro")
        draw.text(at(k, -0.01), f"{k:g}", "black", anchor="mt")
        draw.text(at(-0.01, k), f"{k:g}", "black", anchor="rm")
    for t in marks:
        draw.line([at(t, 0), at(t, 1)], "darkorange", width=2)
        draw.text(at(t, 1.01), f"{t:.3f}", "darkorange", anchor="mb")
    t, *values = zip(*rows)
    for i, (name, colour, curve) in enumerate(zip(names, colours, values)):
        draw.line([at(*point) for point in zip(t, curve)], colour, width=2)
        draw.text(at(0.02, 0.6 - 0.05 * i), name, colour, anchor="lm")
    write_atomically(path, lambda part: image.save(part, "PNG"))


# ---------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------
def macs_by_operator(fn, *inputs):
    """Multiply-accumulates of the call fn(*inputs) as {name of torch's operator: MACs}, executed under torch's
    own counter; see count_macs. On the meta device attention's products are aten.bmm."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fn(*inputs)
    counts = counter.get_flop_counts().get("Global", {})                       # none, if nothing was counted
    return {str(op): n // 2 for op, n in counts.items()}                       # 2 FLOPs a MAC


def count_macs(fn, *inputs):
    """Multiply-accumulates of the call fn(*inputs), executed under torch's own counter: convolutions,
    linear layers, attention products. Build fn and inputs on the meta device: nothing is computed, and
    attention counts exactly (on CPU tensors the fused attention kernel reads 0)."""
    return sum(macs_by_operator(fn, *inputs).values())


# ---------------------------------------------------------------------------------------------
# Inception-v3 of FID and inception score (the TF-slim graph of 2015-12-05)
# ---------------------------------------------------------------------------------------------
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")   # ends in the first digits of its SHA-256
INCEPTION_STEM = (      # name, channels in, channels out, kernel, stride, padding; or max pooling
    ("Conv2d_1a_3x3", 3, 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 32, 3, 1, 0),
    ("Conv2d_2b_3x3", 32, 64, 3, 1, 1), ("MaxPool_1",),
    ("Conv2d_3b_1x1", 64, 80, 1, 1, 0), ("Conv2d_4a_3x3", 80, 192, 3, 1, 0), ("MaxPool_2",))
# A block's branches, one a line: name, then convolutions in order as kernel:channels; 1x3|3x1 are
# two convolutions of one input, and the branch puts out both.
BLOCK_A = """branch1x1     1x1:64
             branch5x5     1x1:48  5x5:64
             branch3x3dbl  1x1:64  3x3:96  3x3:96
             branch_pool   1x1:{c}"""
BLOCK_B = """branch3x3     3x3:384
             branch3x3dbl  1x1:64  3x3:96  3x3:96
             branch_pool"""
BLOCK_C = """branch1x1     1x1:192
             branch7x7     1x1:{c}  1x7:{c}  7x1:192
             branch7x7dbl  1x1:{c}  7x1:{c}  1x7:{c}  7x1:{c}  1x7:192
             branch_pool   1x1:192"""
BLOCK_D = """branch3x3     1x1:192  3x3:320
             branch7x7x3   1x1:192  1x7:192  7x1:192  3x3:192
             branch_pool"""
BLOCK_E = """branch1x1     1x1:320
             branch3x3     1x1:384  1x3|3x1:384
             branch3x3dbl  1x1:448  3x3:384  1x3|3x1:384
             branch_pool   1x1:192"""
INCEPTION_BLOCKS = (    # name, channels in, branches, c in them, pooling ("avg"), stride (1)
    ("Mixed_5b", 192, BLOCK_A, 32), ("Mixed_5c", 256, BLOCK_A, 64), ("Mixed_5d", 288, BLOCK_A, 64),
    ("Mixed_6a", 288, BLOCK_B, 0, "max", 2),
    ("Mixed_6b", 768, BLOCK_C, 128), ("Mixed_6c", 768, BLOCK_C, 160),
    ("Mixed_6d", 768, BLOCK_C, 160), ("Mixed_6e", 768, BLOCK_C, 192),
    ("Mixed_7a", 768, BLOCK_D, 0, "max", 2),
    ("Mixed_7b", 1280, BLOCK_E, 0), ("Mixed_7c", 2048, BLOCK_E, 0, "max"))  # max: as in the graph


def conv_bn_relu(c_in, c_out, kernel, stride, padding):
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(c_out, eps=1e-3), relu=nn.ReLU(inplace=True)))


class InceptionBlock(nn.Module):
    """Branches side by side, their outputs concatenated. With stride 2 the last step of each branch
    (which may be the pooling) has stride 2 and no padding; every other step keeps the size."""

    def __init__(self, c_in, branches, c, pool="avg", stride=1):
        super().__init__()
        self.pool, self.stride, self.branches = pool, stride, {}       # name: [names of each step]
        for branch, *steps in map(str.split, branches.format(c=c).splitlines()):
            self.branches[branch], width = [], c_in
            for i, step in enumerate(steps, 1):
                kernels, c_out = step.split(":")
                name = f"{branch}_{i}" if len(steps) > 1 else branch
                names = [name + "a", name + "b"] if "|" in kernels else [name]
                for name, kernel in zip(names, kernels.split("|")):
                    k, s = [int(n) for n in kernel.split("x")], stride if i == len(steps) else 1
                    padding = [n // 2 for n in k] if s == 1 else 0
                    self.add_module(name, conv_bn_relu(width, int(c_out), k, s, padding))
                self.branches[branch].append(names)
                width = int(c_out)

    def forward(self, x):
        pooled = (F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False) if self.pool == "avg"
                  else F.max_pool2d(x, 3, self.stride, padding=2 - self.stride))
        outputs = []
        for branch, steps in self.branches.items():
            y = [pooled if branch == "branch_pool" else x]
            for names in steps:
                y = [self.get_submodule(name)(y[0]) for name in names]
            outputs += y
        return torch.cat(outputs, 1)


def resize_tf1(x, size=299):
    """Bilinear as in TensorFlow 1: output i lies at input i * n / size (no half-pixel centres), no
    antialiasing. F.interpolate places the pixels differently, which changes an FID."""
    for dim in (3, 2):
        n = x.shape[dim]
        at = torch.arange(size, dtype=x.dtype, device=x.device) * (n / size)
        low = at.long()
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * (at - low).view(-1, *[1] * (3 - dim))
    return x


class Inception(nn.Module):
    """uint8 images (B, 1 or 3, H, W) -> features (B, 2048) for FID, and logits without their bias
    (B, 1008), which torch-fidelity's inception score takes."""

    width = 2048

    def __init__(self):
        super().__init__()
        for name, *conv in INCEPTION_STEM:
            self.add_module(name, conv_bn_relu(*conv) if conv else nn.MaxPool2d(3, 2))
        for name, *block in INCEPTION_BLOCKS:
            self.add_module(name, InceptionBlock(*block))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        if x.dtype != torch.uint8:
            raise ValueError(f"Inception takes uint8 images, not {x.dtype}")
        x = ((resize_tf1(x.float()) - 128) / 128).expand(-1, 3, -1, -1)
        for layer in list(self.children())[:-1]:
            x = layer(x)
        x = x.mean((2, 3))
        return x, x @ self.fc.weight.T


def load_inception(path=None):
    """The frozen network with the public weights: from the file `path`, else from torch.hub's cache
    or the internet (91 MB). Raises OSError with a line that says where to get the file."""
    with torch.device("meta"):                                # no random weights to be overwritten
        net = Inception()
    name = INCEPTION_URL.rsplit("/", 1)[1]
    file = Path(path or f"{torch.hub.get_dir()}/checkpoints/{name}")
    options = dict(map_location="cpu", weights_only=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):          # torch.hub prints "Downloading"
            weights = torch.load(file, **options) if path else torch.hub.load_state_dict_from_url(
                INCEPTION_URL, check_hash=True, **options)
        net.load_state_dict(weights, assign=True)
        if file.name == name and sha256_of(file)[:8] != name[-12:-4]:
            raise ValueError("its SHA-256 does not fit its name")
    except Exception as error:                                # a damaged pickle can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise OSError(f"no Inception weights in {file} ({reason}): delete it if it is there, then "
                      f"download {INCEPTION_URL} and pass --inception PATH") from None
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# Features and metrics
# ---------------------------------------------------------------------------------------------
class Extractor(nn.Module):
    """A miniature CLIP for data sets on which no large network is at hand: an image encoder and a
    caption encoder (mean of word vectors) trained contrastively (weights/train_extractor.py). Its
    pooled features (width 128) give FD, its cosine the caption score, its nearest caption the class.
    patch: pixels per side that are folded into channels first (2 for 64x64 images)."""

    width = 128

    def __init__(self, channels, words, patch=1, embedding=64):
        super().__init__()
        self.words, self.patch = {word: i for i, word in enumerate(words)}, patch
        layers = []
        for c_in, c_out, stride in ((channels * patch ** 2, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2),
                                    (128, 128, 1), (128, 128, 2)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.image = nn.Sequential(*layers)
        self.head = nn.Linear(self.width, embedding)
        self.text = nn.EmbeddingBag(len(words), embedding, mode="mean")
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, x):
        """x uint8 (B, C, R, R) -> features (B, 128), unit image embeddings (B, 64)."""
        h = self.image(F.pixel_unshuffle(x.float() / 127.5 - 1, self.patch)).mean(dim=(2, 3))
        return h, F.normalize(self.head(h), dim=1)

    def embed_text(self, captions):
        """list of str -> unit embeddings (N, 64); words that it does not know are left out. A caption
        of unknown words only is a zero vector."""
        rows = [[self.words[w] for w in s.split() if w in self.words] for s in captions]
        offsets = torch.tensor([0] + [len(r) for r in rows[:-1]]).cumsum(0)
        index = torch.tensor([i for r in rows for i in r], dtype=torch.long)
        device = self.text.weight.device
        return F.normalize(self.text(index.to(device), offsets.to(device)), dim=1)


def load_extractor(data, device, inception=None, root=HERE / "weights"):
    """The feature extractor for a data set and its name in results. inception: None for the small
    one shipped for `data`; a path, or "download", for the FID Inception-v3. Raises OSError/ValueError."""
    if inception is not None:
        return load_inception(None if inception == "download" else inception).to(device), "inception"
    name = "fashion" if data.startswith("fashion") else data
    path = Path(root) / f"extractor_{name}.pt"
    if not path.is_file():
        raise ValueError(f"no small extractor for '{data}' ({path.name}): name the Inception weights "
                         "with --inception PATH, or train one with weights/train_extractor.py")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                # torch raises many kinds for a damaged file
        raise OSError(f"{path} is damaged ({type(error).__name__}): restore it with `git checkout -- weights`"
                      ) from None
    extractor = Extractor(saved["channels"], saved["words"], saved["patch"])
    extractor.load_state_dict({k: v.float() if v.is_floating_point() else v
                               for k, v in saved["state"].items()})
    return extractor.to(device).eval().requires_grad_(False), f"small-{name}"


@torch.no_grad()
def extract(extractor, x, batch=250):
    """uint8 images (N, C, R, R) -> features float64 (N, width) and second outputs (N, ...), on CPU."""
    device = next(extractor.parameters()).device
    parts = [extractor(part.to(device)) for part in x.split(batch)]
    return torch.cat([p[0] for p in parts]).double().cpu(), torch.cat([p[1] for p in parts]).cpu()


def feature_stats(features):
    """Mean (D,) and covariance (D, D) of features (N, D), float64. Raises ValueError if N <= D: the
    covariance would be singular and the distance meaningless."""
    n, width = features.shape
    if n <= width:
        raise ValueError(f"{n} images are too few for FD with {width} features: use --n above {width}")
    return features.mean(0), features.T.cov()


def frechet_distance(stats_a, stats_b):
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two (mean, covariance) pairs, in float64.

    tr (A B)^(1/2) is the sum of the square roots of the eigenvalues of R^T B R, which is symmetric, for any R with
    R R^T = A: its Cholesky factor, or, if A is singular, its root by eigh. No complex numbers, and singular
    covariances do no harm."""
    (mu_a, cov_a), (mu_b, cov_b) = stats_a, stats_b
    root, failed = torch.linalg.cholesky_ex(cov_a.double())
    if failed:
        values, vectors = torch.linalg.eigh(cov_a.double())
        root = vectors * values.clamp(min=0).sqrt()
    inner = torch.linalg.eigvalsh(root.T @ cov_b.double() @ root).clamp(min=0).sqrt().sum()
    gap = (mu_a - mu_b).double().square().sum()
    return float(gap + cov_a.trace() + cov_b.trace() - 2 * inner)


def inception_score(logits, splits=10):
    """exp E_x KL(p(y|x) || p(y)) over `splits` parts of logits (N, classes); returns mean, std."""
    scores = []
    for part in logits.double().log_softmax(1).chunk(splits):
        p = part.exp()
        scores.append((p * (part - p.mean(0).clamp(min=1e-300).log())).sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


def class_logits(extractor, embeddings, captions):
    """Scaled cosine of image embeddings (N, 64) with each of the captions: (N, len(captions))."""
    text = extractor.embed_text(captions).cpu()
    return embeddings @ text.T * float(extractor.log_scale.exp())


def caption_score(extractor, embeddings, captions):
    """Mean cosine between image embeddings (N, 64) and those of their N captions, in [-1, 1]."""
    return float((embeddings * extractor.embed_text(captions).cpu()).sum(1).mean())
