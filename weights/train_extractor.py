"""Trains the small contrastive extractor of common.py and measures whether FD in its features can be trusted.

    python weights/train_extractor.py fashion      # trains on the 60,000, tests on fashion10k
    python weights/train_extractor.py emoji        # trains on 9 of 10 captions, tests on the others
    python weights/train_extractor.py FOLDER       # of images: FOLDER/extractor.pt, which FD of --data FOLDER then uses
    python weights/train_extractor.py FOLDER 64    # of a network with --res 64

Writes weights/extractor_NAME.pt (fp16) and results/extractor/NAME.json, or extractor.pt and extractor.json into FOLDER.

Loss: cross-entropy of the scaled cosines between the images and the captions of a batch, both ways; images with equal
captions share the target. Captions of a folder are the names of its sub-folders; without any every image is its own.
Images are shifted by up to 2 pixels, so that a caption cannot be told by position alone.
"""
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "results")]
from common import (EMOJI, Extractor, check_folder, extract, feature_stats, frechet_distance, load_images,  # noqa: E402
                    progress, run_main, save_json, write_atomically)
from inception import class_logits  # noqa: E402

BATCH, FOLDER_STEPS = 128, 400         # of a training; of a folder's, at least


def shift(x, pad, g):
    """Random shift of a whole batch by up to `pad` pixels, one shift per batch."""
    dx, dy = torch.randint(0, 2 * pad + 1, (2,), generator=g).tolist()
    full = F.pad(x, (pad,) * 4, mode="replicate")
    return full[..., dy:dy + x.shape[-2], dx:dx + x.shape[-1]]


def train(x, y, captions, epochs, batch=BATCH, lr=2e-3, seed=0):
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    words = sorted({w for s in captions for w in s.split()})
    net = Extractor(x.shape[1], words, patch=max(1, x.shape[-1] // 32)).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * len(x) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    loss = torch.zeros(())
    for _ in progress(range(steps), "extractor", batch, note=lambda: f"loss {loss:.3f}"):
        i = torch.randint(0, len(x), (batch,), generator=g)
        _, image = net(shift(x[i].float(), 2, g))
        text = net.embed_text([captions[k] for k in y[i]])
        logits = image @ text.T * net.log_scale.exp().clamp(max=100)
        same = (y[i][:, None] == y[i][None]).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def damaged(x, y, kind, level):
    """x with a known damage of growing level, to see whether FD grows with it."""
    if kind == "blur":
        k = 2 * level + 1
        h = F.avg_pool2d(F.pad(x.float(), (level,) * 4, mode="replicate"), k, 1)
        return h.round().to(torch.uint8)
    if kind == "noise":
        eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return (x.float() + 8 * level * eps).round().clamp(0, 255).to(torch.uint8)
    gone = y.unique()[:level] if len(y.unique()) <= 10 else y.unique()[:level * len(y.unique()) // 10]
    return x[~torch.isin(y, gone)]                                             # missing classes


def split(name, res):
    """Images, classes and captions to train on; images and classes to test on; epochs; images and classes whose
    halves show what FD makes of damage. Raises ValueError if a folder has too few images."""
    if name == "fashion":
        x, y, captions = load_images("fashion")
        x_test, y_test, _ = load_images("fashion10k")
        return x, y, captions, x_test, y_test, 3, x_test, y_test
    x, y, captions = load_images(name, res)
    if name in EMOJI or name == "cifar10":
        test = (torch.arange(len(captions)) % 10 == 9)[y] if name in EMOJI else torch.arange(len(y)) % 10 == 9
        return x[~test], y[~test], captions, x[test], y[test], 30 if name in EMOJI else 3, x, y
    if len(x) <= Extractor.width:
        raise ValueError(f"{name} has {len(x)} images: a Frechet distance takes more than {Extractor.width}")
    epochs = max(3, FOLDER_STEPS * BATCH // len(x))
    if len(captions) == 1:                                     # every image is a class of its own
        y, captions = torch.arange(len(x)), [str(i) for i in range(len(x))]
        return x, y, captions, x, y, epochs, x, y
    test = torch.arange(len(x)) % 10 == 9
    return x[~test], y[~test], captions, x[test], y[test], epochs, x, y


def main(name, res):
    begun, folder = time.time(), Path(name) if name not in (*EMOJI, "fashion", "cifar10") else None
    if folder:
        check_folder(folder)
    x, y, captions, x_test, y_test, epochs, xs, ys = split(name, res)
    net = train(x, y, captions, epochs)
    features, embeddings = extract(net, x_test)
    shown = sorted(set(y_test.tolist()))
    logits = class_logits(net, embeddings, [captions[k] for k in shown])
    target = torch.tensor([shown.index(k) for k in y_test.tolist()])
    rank = (logits >= logits.gather(1, target[:, None])).sum(1)
    report = dict(data=name, images=len(x), epochs=epochs, held_out=len(x_test), captions=len(shown),
                  top1=float((rank <= 1).float().mean()), top5=float((rank <= 5).float().mean()))
    half = torch.randperm(len(xs), generator=torch.Generator().manual_seed(0))
    a, b = half[:len(half) // 2], half[len(half) // 2:]
    if len(a) > net.width:                                     # else a half is too few images for FD
        reference = feature_stats(extract(net, xs[a])[0])
        report["fd"] = {"none": frechet_distance(feature_stats(extract(net, xs[b])[0]), reference)}
        for kind in ("blur", "noise", "missing classes"):
            worse = [extract(net, damaged(xs[b], ys[b], kind, k))[0] for k in (1, 2, 3)]
            report["fd"][kind] = [frechet_distance(feature_stats(f), reference) for f in worse if len(f) > net.width]
        report["fd_images"] = [len(a), len(b)]
    report["minutes"] = round((time.time() - begun) / 60, 1)
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    saved = dict(channels=x.shape[1], words=list(net.words), patch=net.patch, state=state)
    path = folder / "extractor.pt" if folder else HERE / f"extractor_{name}.pt"
    write_atomically(path, lambda part: torch.save(saved, part))
    save_json(folder / "extractor.json" if folder else HERE.parent / "results" / "extractor" / f"{name}.json", report)
    print(f"{report}\n{path}")


def start(argv):
    if len(argv) not in (1, 2) or argv[0].startswith("-") or not "".join(argv[1:] or "32").isdigit():
        sys.exit(__doc__)
    main(argv[0], int("".join(argv[1:] or "32")))


if __name__ == "__main__":
    run_main(lambda: start(sys.argv[1:]), "train_extractor")
