"""What the four scripts share, as plain functions: data, noise schedule, MAC counting, features and Frechet
distance, per-image seeds, progress, files, the command line.

Copy this file together with the script that you need; the two alone run in an empty folder
(with `--data FOLDER`, or the files of data/ beside them).

Conventions: images are uint8 (N, C, R, R) on disk and float in [-1, 1] in networks; a class or caption
is an index y into a list of captions. Errors that a user can cause are ValueError or OSError with one line
that says what to do; the scripts print that line and exit with status 1.
"""
import argparse
import contextlib
import gzip
import hashlib
import json
import math
import os
import sys
import tarfile
import tempfile
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.flop_counter import FlopCounterMode

try:
    import fcntl
except ImportError:                                            # Windows
    fcntl = None

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------
ACTIONS = dict(train="train a network into --out", search="the paper's search: writes a plan into --out",
               sample="images into --out/samples.png", resume="with --train: go on with the run in --out")
GOES_WITH = dict(network=("train",), training=("train",), method=("search", "sample"), search=("search",))
CHANGEABLE = ("data", "lr", "iters", "save_every")             # beside --resume; all else is the run's own


def parse_config(script, groups, doc, argv=None):
    """The command line as a dict {option: value}, with `given`, the set of options that it names.

    groups: a script's CONFIG, {group: {option: (default, allowed, help)}}; the default decides the type; allowed: a
    tuple of words, or the lowest and the highest number. Groups go with GOES_WITH's actions. Raises ValueError."""
    parser = argparse.ArgumentParser(script, description=" ".join(doc.split("\n\n")[0].split()), allow_abbrev=False,
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 26, 118))

    def fail(message):
        raise ValueError(f"{message} (python {script}.py --help)")

    parser.error = fail
    for name, text in ACTIONS.items():
        parser.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)
    options = {key: (*option, group) for group, keys in groups.items() for key, option in keys.items()}
    for key, (default, _, text, group) in options.items():
        many = isinstance(default, list)
        shown = " ".join(map(str, default)) if many else default
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(default[0] if many else default), metavar="X",
                            nargs="+" if many else None, default=argparse.SUPPRESS,
                            help=f"{group}: {text}" + (f" [{shown}]" if shown != "" else ""))
    given = vars(parser.parse_args(argv))
    config = {**dict.fromkeys(ACTIONS, False), **{key: option[0] for key, option in options.items()}, **given}
    for key in given.keys() & options.keys():
        (default, allowed, _, group), option = options[key], f"--{key.replace('_', '-')}"
        try:
            check_option(option, given[key], default, allowed)
        except ValueError as error:
            fail(error)
        actions = GOES_WITH.get(group, ())
        if actions and not any(config[action] for action in actions):
            own = ": a checkpoint has its own" if "train" in actions else ""
            fail(f"{option} goes with --{' or --'.join(actions)}{own}")
        if config["resume"] and (group in ("network", "training") and key not in CHANGEABLE or key == "seed"):
            fail(f"{option} cannot change in a run: leave it out beside --resume, or train anew")
    if not (config["train"] or config["search"] or config["sample"]):
        fail("nothing to do: give --train, --search or --sample")
    for key, action in ("resume", "train"), ("n", "sample"):
        if key in given and not config[action]:
            fail(f"--{key} goes with --{action}")
    if config["train"] and "checkpoint" in given:
        fail("--checkpoint is what is searched and sampled: to train on from it give --init, to go on --resume")
    return {**config, "given": set(given)}


def alike(value, like):
    """Is a value of the kind of `like`: a text, a whole number, a number, a list of such?"""
    if isinstance(like, list):
        return isinstance(value, list) and all(alike(v, w) for v in value for w in like[:1])
    return isinstance(value, (int, float) if isinstance(like, float) else type(like))


def check_option(name, value, default, allowed):
    """Raises ValueError if the value of an option is not of its default's kind, or not allowed."""
    values = value if isinstance(value, list) else [value]
    if allowed and isinstance(allowed[0], str) and not (alike(value, default) and set(values) <= set(allowed)):
        raise ValueError(f"{name} {value}: choose from {', '.join(allowed)}")
    if allowed and not isinstance(allowed[0], str) and not (
            alike(value, default) and all(allowed[0] <= v <= allowed[1] for v in values)):
        raise ValueError(f"{name} {' '.join(map(str, values))}: must be in {allowed[0]:g} .. {allowed[1]:g}")


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------
FASHION_CLASSES = ("t-shirt top", "trouser", "pullover", "dress", "coat", "sandal", "shirt",
                   "sneaker", "bag", "ankle boot")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
EMOJI = {"emoji": ("twitter", "google"), "twemoji": ("twitter",), "noto": ("google",)}         # by their drawers
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


def load_images(name, res=32, root=HERE / "data", channels=None):
    """A data set by name, or a folder of images.

    name: fashion10k | fashion | cifar10 | emoji | twemoji | noto | a folder (sub-folders are its classes).
    res: side R to which a folder's images are centre-cropped and resized; the others have their own. channels: 1 or
    3 of a folder's images; None: 1 if all of them are grey.
    Returns x uint8 (N, C, R, R), y int64 (N,), captions (list of str): image i shows captions[y[i]].
    Raises OSError if a file is missing or damaged, ValueError if the name or folder is of no use.
    """
    if name in ("fashion10k", "fashion"):
        part, url = ("t10k", None) if name == "fashion10k" else ("train", FASHION_URL)
        files = [f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"]
        x, y = (gzip.decompress(find_data_file(f, url and url + f, root).read_bytes()) for f in files)
        x, y = np.frombuffer(x, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(y, np.uint8, offset=8)
        x = np.pad(x, ((0, 0), (2, 2), (2, 2)))[:, None]                       # 28 -> 32
        captions = list(FASHION_CLASSES)
    elif name == "cifar10":
        with tarfile.open(find_data_file("cifar-10-binary.tar.gz", CIFAR10_URL, root)) as tar:
            batches = sorted(m for m in tar.getnames() if "data_batch" in m)
            raw = b"".join(tar.extractfile(m).read() for m in batches)
        rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)                  # label, RRR GGG BBB
        x, y, captions = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0], list(CIFAR10_CLASSES)
    elif name in EMOJI:
        sheet, text = (find_data_file(f, None, root) for f in ("emoji.png", "emoji.txt"))
        lines = [s.split("\t") for s in text.read_text().splitlines()]
        keep, lines = zip(*((i, s[2]) for i, s in enumerate(lines) if s[0] in EMOJI[name]))
        tiles = np.asarray(Image.open(sheet).convert("RGB"))
        rows, cols = tiles.shape[0] // 64, tiles.shape[1] // 64
        x = tiles.reshape(rows, 64, cols, 64, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 64, 64)
        captions = sorted(set(lines))
        x, y = x[list(keep)], np.array([captions.index(s) for s in lines])
    elif Path(name).is_dir():
        x, y, captions = load_folder(Path(name), res, channels)
    else:
        raise ValueError(f"no data set or folder '{name}' (moved? give --data): use fashion10k, fashion, cifar10, "
                         "emoji, twemoji, noto or the path of a folder of images")
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64)), captions


IMAGE_KINDS = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def file_paths(folder, above=()):
    """The files under `folder` in order: links are followed (not in circles), hidden names left out."""
    here = folder.resolve()
    for p in sorted(folder.iterdir()) if here not in above else ():
        if p.name.startswith("."):
            continue
        yield from file_paths(p, (*above, here)) if p.is_dir() else [p]


def open_image(path):
    """An image as a viewer shows it, in RGB: turned as its EXIF data says, on white where transparent, and
    if deeper than 8 bits scaled from a range that the second value names (else "")."""
    with Image.open(path) as image:
        tags, scaled = getattr(image, "tag_v2", {}), ""             # TIFF: 258 is bits, 339 == 1 unsigned
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":                                       # convert would clip these
        v = np.asarray(image)
        v = (v.view(np.uint32) if image.mode == "I" and tags.get(339) == (1,) else v).astype(np.float64)
        low, high, end = v.min(), v.max(), 2 ** tags.get(258, (16,))[0] - 1
        if not np.isfinite(low + high):
            raise ValueError("has NaN or infinite values")
        ends = (end,) if ";" in image.mode else (1, 255)            # the type's range, or else the image's own
        end = next((e for e in ends if low >= 0 and high <= e), None)
        scaled = f"{image.mode} from {'its smallest .. largest value' if end is None else f'0 .. {end}'}"
        low, high = (low, high) if end is None else (0, end)
        if low == high:
            raise ValueError(f"has only the value {low:g}, on no known scale")
        v[v == image.info.get("transparency")] = high
        image = Image.fromarray(((v - low) * (255 / (high - low))).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB"), scaled


def load_folder(folder, res, channels=None):
    """Images under `folder`, centre-cropped to a square and resized; damaged ones are named and left out.
    channels: 1, 3 or None: 1 if all images are grey. Returns x, y, captions (names of the sub-folders)."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name one that holds images")
    files = list(file_paths(folder))
    paths = [p for p in files if p.suffix.lower() in IMAGE_KINDS]
    if others := sorted({p.suffix or p.name for p in files} - {p.suffix for p in paths} - {".pt", ".json"}):
        print(f"no images by their names, left out: {', '.join(others[:5])}", file=sys.stderr)
    x, names, scaled, bad = np.empty((len(paths), channels or 3, res, res), np.uint8), [], [], []
    for p in progress(paths, f"load {folder}"):
        name = p.relative_to(folder)
        try:
            image, note = open_image(p)
        except Exception as error:                                  # Pillow's are of all kinds
            bad.append(f"{name} ({' '.join(str(error).partition(chr(39))[0].split())})")
            continue
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((res, res), Image.LANCZOS, (left, top, left + side, top + side))
        x[len(names)] = np.atleast_3d(image.convert("L") if channels == 1 else image).transpose(2, 0, 1)
        names.append(name.parts[0] if len(name.parts) > 1 else "")
        scaled += [note] if note else []
    if scaled:
        notes = (f"{scaled.count(s)} of mode {s}" for s in sorted(set(scaled)))
        print(f"images scaled to 0 .. 255: {', '.join(notes)}", file=sys.stderr)
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        print(f"warning: {len(bad)} images that cannot be read left out: {', '.join(bad[:5])}{more}", file=sys.stderr)
    if not names:
        raise ValueError(f"no readable images in {folder} (read are {', '.join(IMAGE_KINDS)})")
    x, captions = x[:len(names)], sorted(set(names))
    if channels is None and all((image == image[:1]).all() for image in x):
        x = x[:, :1]
    return x, np.array([captions.index(s) for s in names]), captions


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


def scale_and_sigma(t, alpha_bar, like):
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), (B, 1, 1, 1), as `like` in device and type; t int64 (B,)."""
    return [v.to(like.dtype).to(t.device)[t].view(-1, 1, 1, 1).to(like.device)     # float64 stays on the CPU
            for v in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt())]


def add_noise(x0, eps, t, alpha_bar):
    """q(xt | x0) sampled with eps: sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps; t int64 (B,), on any device."""
    scale, sigma = scale_and_sigma(t, alpha_bar, x0)
    return scale * x0 + sigma * eps


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
    """Returns (device, rank, world). Under torchrun, joins the process group (NCCL on CUDA, gloo on CPU); all
    processes but the first are silent. name: auto (CUDA if there is one, else CPU), cpu, cuda or mps."""
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    name = ("cuda" if there["cuda"] else "cpu") if name == "auto" else name
    if not there[name]:
        raise ValueError(f"--device {name}, but torch sees no such device: use --device cpu")
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(days=1))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return torch.device(name), rank, world


def run_main(main, script):
    """main(), with what a user can cause said in one line; exit status 1, or 0."""
    try:
        main()
    except (ValueError, OSError) as error:
        if int(os.environ.get("RANK", 0)) == 0:                # the other processes meet the same error
            print(f"{script}: error: {error}", file=sys.stderr, flush=True)
        os._exit(1) if dist.is_initialized() else sys.exit(1)          # no farewell to processes that are gone
    except KeyboardInterrupt:
        sys.exit(f"{script}: interrupted; what a training saved goes on with --train --resume")
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(part, world):
    """All processes' shares (n, ...), on the CPU, put back in order: share r holds items r, r + world, ..."""
    parts = [part] * world
    if world > 1:
        dist.all_gather_object(parts, part)
    order = torch.cat([torch.arange(sum(map(len, parts)))[r::world] for r in range(world)]).argsort()
    return torch.cat(parts)[order]


def has_fast_bf16(device):
    """Does bfloat16 run in hardware? (Emulated: ten times slower.)"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(device, precision):
    """Context of bfloat16 arithmetic, if precision is "bf16"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


class LossModule(nn.Module):
    """training_loss(net, config, *batch) as a module: DistributedDataParallel wants one forward call a step."""

    def __init__(self, net, config, training_loss):
        super().__init__()
        self.net, self.config, self.training_loss = net, config, training_loss

    def forward(self, *batch):
        return self.training_loss(self.net, self.config, *batch)


def progress(items, title, unit=1, every=15.0, note=lambda: ""):
    """Yields `items`, a sequence; prints rate and time left to stderr: one line that renews
    itself on a terminal, a line every `every` seconds in a log. unit: images per item;
    note: called for each line."""
    tty, total, start = sys.stderr.isatty(), len(items), time.time()
    shown, quiet = start, dist.is_initialized() and dist.get_rank() > 0
    if tty and not quiet:
        print(f"{title} 0/{total}".ljust(78), end="\r", file=sys.stderr, flush=True)
    for done, item in enumerate(items, 1):
        yield item
        now = time.time()
        if not quiet and (now - shown > (0.5 if tty else every) or (done == total and now - start > 2)):
            rate, shown = done / (now - start), now
            left = str(timedelta(seconds=int((total - done) / rate))).rjust(8, "0")
            line = f"{title} {done}/{total}  {rate * unit:.1f}{' images' if unit > 1 else ''}/s  {left} left  {note()}"
            end = "\r" if tty and done < total else "\n"
            print(line.ljust(78) if tty else line, end=end, file=sys.stderr, flush=True)


def write_atomically(path, write):
    """Calls write(temporary path), then renames it to `path`: a reader or a kill finds the old file or
    the new one. Raises OSError with a line that names the file (disk full, ...)."""
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
        hint = "" if isinstance(error, OSError) else "is the disk full? "
        raise OSError(f"cannot write {path}: {hint}{' '.join(str(error).split())}") from None


def check_folder(folder):
    """Raises OSError with one line if no file can be written into a folder, or the folder not be made. Makes none."""
    folder = Path(folder).absolute()
    try:
        tempfile.TemporaryFile(dir=next(p for p in (folder, *folder.parents) if p.exists())).close()
    except OSError as error:
        raise OSError(f"cannot write into {folder} ({error.strerror}): choose another --out") from None


def save_json(path, value):
    """A dict or list as JSON, one entry a line; written atomically."""
    named = isinstance(value, dict)
    rows = [json.dumps(k) + ": " + json.dumps(v) for k, v in value.items()] if named else map(json.dumps, value)
    first, last = "{}" if named else "[]"
    text = first + "\n " + ",\n ".join(rows) + "\n" + last + "\n"
    write_atomically(path, lambda part: part.write_text(text))


def find_plan(config, name, like):
    """The plan NAME that was searched with this network, from --out or from beside the checkpoint; None if there is
    none. like: a plan, whose keys and their kinds it must have. Raises ValueError if one is damaged."""
    for path in (Path(config["out"]) / name, Path(config["checkpoint"]).parent / name):
        if path.is_file():
            try:
                plan = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:                                 # not UTF-8, not JSON
                plan = None
            if not isinstance(plan, dict) or not all(alike(plan.get(key), like[key]) for key in like):
                raise ValueError(f"{path} is damaged or no plan: delete it, and --search anew")
            if (plan.get("step"), plan.get("network")) == (config["step"], config.get("digest")):
                return plan
            print(f"{path} was searched with another network: left alone")
    return None


@contextlib.contextmanager
def locked(folder, rank=0):
    """Holds FOLDER/lock while a run's first process writes there; the system frees it when that ends, however it does.
    Raises ValueError if another process holds it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / "lock", "a+") as file:
        if fcntl and rank == 0:                                # not on Windows
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise ValueError(f"process {file.read()} is writing to {folder}: choose another --out") from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def load_checkpoint(path, script):
    """A checkpoint or shipped weights of `script`, a dict on the CPU, floats as float32. Raises OSError or ValueError
    with one line if it is missing, damaged, old or of another script."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise OSError(f"no checkpoint {path}: run --train first, or name one with --checkpoint") from None
    except Exception as error:                                 # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from None
    if not isinstance(saved, dict) or saved.get("script", script) != script:
        other = saved["script"] if isinstance(saved, dict) else "unknown"
        raise ValueError(f"{path} is a checkpoint of '{other}', not of '{script}'")
    if not {"script", "config", "ema", "step"} <= set(saved):
        raise ValueError(f"{path} is of no or an older {script}.py: train anew, or take that version of the file")
    saved.setdefault("net", {})
    if not (all(isinstance(saved[key], dict) for key in ("net", "ema", "config")) and alike(saved["step"], 1)
            and all(torch.is_tensor(v) and not v.isnan().any() for k in ("net", "ema") for v in saved[k].values())):
        raise ValueError(f"{path} is damaged: it holds weights that are not finite, or none")
    for key in ("net", "ema"):
        saved[key] = {k: v.float() if v.is_floating_point() else v for k, v in saved[key].items()}
    return saved


def restore(script, groups, config, check_config, build_net, shipped):
    """The averaged network, on the CPU, of --checkpoint, else of the run in --out, else of weights/SCRIPT; and the
    configuration: the network's and the training's from the checkpoint (of training, newer ones: default), the rest
    from the command line. Raises OSError or ValueError if it is of no use, or --out."""
    check_folder(config["out"])
    path = Path(config["checkpoint"] or Path(config["out"]) / "checkpoint.pt")
    if not config["checkpoint"] and not path.exists():
        path = HERE / "weights" / script / shipped.get(config.get("method"), "weights.pt")
        print(f"no run in {config['out']}: the shipped weights")
    saved = load_checkpoint(path, script)
    theirs = groups["network"].keys() | groups["training"].keys() & saved["config"]
    config = {**saved["config"], **{k: v for k, v in config.items() if k not in theirs}, "checkpoint": str(path),
              "step": saved["step"], "digest": digest(saved["ema"])}
    config["precision"] = "bf16" if config["precision"] == "bf16" else "fp32"
    try:
        for key, (default, allowed, _) in (groups["network"] | groups["training"]).items():
            check_option(key, config[key], default, allowed)
        if not all(alike(config.get(key, [""]), [""]) for key in ("captions", "words")):
            raise ValueError("captions and words must be lists of texts")
        check_config(config)
        net = build_net(config)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its configuration makes no network ({error!r})") from None
    load_weights(net, saved["ema"], path)
    print(f"checkpoint: {path}, {saved['step']} steps")
    return net, config


def load_weights(net, state, path, partial=False):
    """Loads a state dict into net. partial: what it lacks stays as the network began (--init: a new embedding). Raises
    ValueError if it does not fit."""
    try:
        missing, unexpected = net.load_state_dict(state, strict=False)
        unfit = [*unexpected, *([] if partial else missing)]
    except RuntimeError:
        unfit = ["their sizes"]
    if unfit:
        whose = "this network (other --data, or options that shape it)" if partial else "their own configuration"
        raise ValueError(f"{path}: weights that do not fit {whose}: {unfit[0]}")


def digest(state):
    """A short name of a state dict's tensors, the same in half precision: by it a plan knows its network."""
    content = hashlib.sha256()
    for value in state.values():
        content.update((value.half() if value.is_floating_point() else value).cpu().numpy().tobytes())
    return content.hexdigest()[:12]


def begin_run(script, config, groups, device, world):
    """What a training begins with: the configuration and the checkpoint's dict: of the run in --out (--resume), of
    --init, or {}. An option beside --resume wins over the run's; those of the network come with --init."""
    out, given = Path(config["out"]), config["given"]
    check_folder(out)
    there = (out / "checkpoint.pt").exists()
    if config["resume"]:
        if not there:
            raise ValueError(f"--resume: no run in {out}")
        saved = load_checkpoint(out / "checkpoint.pt", script)
        if not saved["net"] or "optimizer" not in saved:
            raise ValueError(f"{out}/checkpoint.pt is no training's state: train on from it with --init")
        old = {k: v for k, v in saved["config"].items() if k not in groups["method"]}
        config = {**config, **old, **{k: config[k] for k in given | {"out"}}}
        if saved["step"] >= config["iters"]:
            raise ValueError(f"--resume: {out} is finished, {saved['step']} steps: give more --iters to go on")
    elif there:
        raise ValueError(f"{out} holds a run already: go on with --resume, or choose another --out")
    else:
        saved = load_checkpoint(config["init"], script) if config["init"] else {}
        first = saved.get("config", {})
        config = {**config, **{k: first[k] for k in groups["network"] if k in first and k not in given}}
    if config["ch"] % 2 or config["ch"] % min(32, config["ch"] // 4):
        raise ValueError(f"--ch {config['ch']} must be a multiple of 4, above 128 of 32")
    if "attention" in given and max(config["attention"]) >= len(config["mult"]):
        raise ValueError(f"--attention {max(config['attention'])}: --mult has levels 0 to {len(config['mult']) - 1}")
    if config["batch"] % world:
        raise ValueError(f"--batch {config['batch']} does not divide among {world} processes")
    if config["precision"] == "auto":
        config["precision"] = "bf16" if has_fast_bf16(device) else "fp32"
    return config, saved


def save_run(script, config, step, net, ema, optimizer, losses, begun, rank):
    """Writes checkpoint.pt (all that --resume needs), weights.pt (averaged weights, half precision) and a line of
    log.jsonl into --out: of the losses since `begun`. Raises ValueError if they or the weights are not finite."""
    out, loss = Path(config["out"]), float(torch.stack(losses).mean())
    rate = len(losses) * config["batch"] / (time.time() - begun)
    if not math.isfinite(loss + float(sum(w.detach().sum() for w in net.parameters()))):
        there = (out / "checkpoint.pt").exists()
        raise ValueError(f"the loss of {out} is not finite at step {step}: "
                         f"{'go on with --train --resume and' if there else 'train anew with'} a lower --lr")
    if rank > 0:
        return
    keep = {k: v for k, v in config.items() if k != "given" and k not in ACTIONS}
    state = dict(script=script, config=keep, step=step)
    half = {k: v.half() if v.is_floating_point() else v for k, v in ema.state_dict().items()}
    write_atomically(out / "weights.pt", lambda part: torch.save(dict(state, ema=half), part))
    state.update(ema=ema.state_dict(), net=net.state_dict(), optimizer=optimizer.state_dict())
    write_atomically(out / "checkpoint.pt", lambda part: torch.save(state, part))
    line = dict(step=step, images=step * config["batch"], loss=round(loss, 5), images_per_s=round(rate, 1))
    with open(out / "log.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")


def captions_of(config, seeds):
    """What each seed is to show: the prompts in turn, else the data's captions, in strides; [] of a network without
    text (no "words" in its configuration)."""
    prompts = [prompt for prompt in config.get("prompt", ()) if prompt]
    captions, stride = (prompts, 1) if prompts else (config["captions"] if "words" in config else [], 1009)
    return [captions[stride * i % len(captions)] for i in seeds if captions]


def text_strip(text, channels, width, lines=3):
    """uint8 (C, 11 lines, W): a text in black on white, broken into lines."""
    image = Image.new("RGB" if channels == 3 else "L", (width, 11 * lines), "white")
    for i, line in enumerate(textwrap.wrap(text, width // 6)[:lines]):
        ImageDraw.Draw(image).text((1, 11 * i), line, "black", ImageFont.load_default_imagefont())
    return torch.from_numpy(np.array(image)).view(11 * lines, width, channels).permute(2, 0, 1)


def save_samples(config, images, seeds, seconds):
    """--sample's last lines and picture, samples.png: with captions, if the network has any."""
    path, captions = Path(config["out"]) / "samples.png", captions_of(config, seeds)
    save_grid(path, images, captions=captions)
    for i in range(0, len(captions), 8):                       # a line for a row of the picture
        print("; ".join(captions[i:i + 8]))
    print(f"{len(images)} images, {seconds:.1f} s: {path}")


def save_grid(path, x, columns=8, scale=2, captions=()):
    """PNG of the images x (N, C, H, W), float in [-1, 1] or uint8, row by row, `columns` a row, with captions below."""
    x = x if x.dtype == torch.uint8 else to_uint8(x)
    x = x.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    if captions:
        x = torch.cat([x, torch.stack([text_strip(s, x.shape[1], x.shape[3]) for s in captions])], dim=2)
    n, c, h, w = x.shape
    x = F.pad(x, (1, 1, 1, 1), value=255)                                      # a white line between
    x = torch.cat([x, x.new_full((-n % columns, *x.shape[1:]), 255)])
    x = x.view(-1, columns, c, h + 2, w + 2).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    image = Image.fromarray(x.squeeze(-1).numpy())
    write_atomically(path, lambda part: image.save(part, "PNG"))


# ---------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------
def count_macs(fn, *inputs):
    """Multiply-accumulates of the call fn(*inputs), under torch's counter: convolutions, linear
    layers, attention products. Build fn and inputs on the meta device: nothing is computed, and
    attention counts exactly (on a CPU the fused attention kernel reads 0)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fn(*inputs)
    return counter.get_total_flops() // 2                                      # 2 FLOPs a MAC


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


def load_extractor(data, device, root=HERE / "weights"):
    """The small feature extractor of a data set or folder, and its name in results. Raises OSError or ValueError."""
    name = dict(fashion10k="fashion", fashion="fashion", cifar10="cifar10", **dict.fromkeys(EMOJI, "emoji")).get(data)
    path = Path(root) / f"extractor_{name}.pt" if name else Path(data) / "extractor.pt"
    if not path.is_file():
        raise ValueError(f"no small extractor for '{data}': make it, `python weights/train_extractor.py {data}`, or "
                         "give results/evaluate.py --inception PATH")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                # torch raises many kinds for a damaged file
        raise OSError(f"{path} is damaged ({type(error).__name__}): restore it with `git checkout -- weights`"
                      ) from None
    extractor = Extractor(saved["channels"], saved["words"], saved["patch"])
    extractor.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in saved["state"].items()})
    return extractor.to(device).eval().requires_grad_(False), f"small-{name or Path(data).name}"


@torch.no_grad()
def extract(extractor, x, batch=250):
    """uint8 images (N, C, R, R) -> features float64 (N, width) and second outputs (N, ...), on CPU."""
    device = next(extractor.parameters()).device
    parts = [extractor(part.to(device)) for part in x.split(batch)]
    return torch.cat([p[0] for p in parts]).cpu().double(), torch.cat([p[1] for p in parts]).cpu()


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


def caption_score(extractor, embeddings, captions):
    """Mean cosine between image embeddings (N, 64) and those of their N captions, in [-1, 1]."""
    return float((embeddings * extractor.embed_text(captions).cpu()).sum(1).mean())
