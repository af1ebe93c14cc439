"""Makes a folder of Twemoji in other colours, on which a network learns that "blue" is a colour of anything:

    python data/make_colours.py runs/colours         # a minute; numpy, Pillow and common.py
    python postdiff.py --train --data runs/colours --init weights/postdiff/weights.pt --lr 5e-4 --out runs/coloured

runs/colours/CAPTION/*.png: each emoji as it is, REPEATS times, and, if most of what is coloured in it has one hue, in
the other hues, captioned "blue mushroom"; a colour that a caption names is replaced. Flags, lettered signs and what is
black, white, brown or pink by name (SKIPPED) stay as they are. UNSEEN captions are never made: what a network draws
for them it has put together itself.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import load_images  # noqa: E402

HUES = dict(red=0, orange=28, yellow=50, green=115, blue=215, purple=280)      # degrees
REPEATS = 4
SKIPPED = {"flag", "squared", "cjk", "keycap", "black", "white", "brown", "pink", "rainbow"}
UNSEEN = {
    "yellow apple", "blue apple", "purple apple", "orange apple", "red book", "yellow book", "purple book",
    "large red diamond", "large green diamond", "large purple diamond", "large yellow diamond", "blue mushroom",
    "green mushroom", "blue cat", "purple dog", "green rocket", "blue rose", "purple banana", "red frog",
    "yellow elephant", "green umbrella", "purple fish", "orange turtle", "blue strawberry", "red tree", "yellow snake",
    "purple guitar", "blue pig face", "green bell"}


def hsv_of(image):
    """Hue in degrees, saturation and value in [0, 1] of an RGB image (H, W, 3), uint8."""
    h, s, v = np.moveaxis(np.asarray(Image.fromarray(image).convert("HSV"), np.float32), -1, 0)
    return h * 360 / 255, s / 255, v / 255


def apart(hue, other):
    """Signed angle between hues, -180 .. 180."""
    return (hue - other + 180) % 360 - 180


def dominant(image):
    """The hue around which most colour lies, and its amount: mean of saturation times value within 45 degrees."""
    h, s, v = hsv_of(image)
    weight = s * v * (s > 0.2) * (v > 0.15)
    histogram, _ = np.histogram(h, 36, (0, 360), weights=weight)
    hue = 10 * (histogram + np.roll(histogram, 1) + np.roll(histogram, -1)).argmax() + 5
    near = weight * (abs(apart(h, hue)) < 45)
    return hue + (apart(h, hue) * near).sum() / max(near.sum(), 1e-6), near.mean()


def recolour(image, hue):
    """The image with its dominant hue, and what lies within 60 degrees of it, turned to another; greys stay."""
    h, s, _ = hsv_of(image)
    turn = apart(h, dominant(image)[0])
    old, *rest = Image.fromarray(image).convert("HSV").split()
    moved = (abs(turn) < 60) & (s > 0.1)
    new = np.where(moved, np.round((hue + turn / 2) % 360 * 255 / 360), old).astype(np.uint8)
    return np.asarray(Image.merge("HSV", [Image.fromarray(new), *rest]).convert("RGB"))


def copies(image, caption, captions):
    """Caption and image of each copy in another colour of an emoji."""
    words = caption.split()
    named = [word for word in words if word in HUES]
    if dominant(image)[1] < 0.06 or SKIPPED & set(words) and not named or len(named) > 1 or len(words) > 8:
        return
    for name, hue in HUES.items():
        new = caption.replace(named[0], name) if named else f"{name} {caption}"
        if new not in captions and new not in UNSEEN:
            yield new, recolour(image, hue)


def main(folder):
    x, y, captions = load_images("twemoji")
    made = 0
    for i, (image, c) in enumerate(zip(x.permute(0, 2, 3, 1).numpy(), y.tolist())):
        plain = [(captions[c], image)] * REPEATS
        for k, (caption, picture) in enumerate([*plain, *copies(image, captions[c], captions)]):
            path = Path(folder) / caption / f"{i}-{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
            made += 1
    print(f"{made} images in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python data/make_colours.py FOLDER")
    main(sys.argv[1])
