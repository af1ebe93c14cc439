"""Makes emoji.png and emoji.txt from two npm packages (numpy and Pillow; half a minute):

    npm pack emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0
    python3 make_emoji.py FOLDER     # FOLDER holds the two .tgz files; writes beside this script

emoji.png  palette PNG of 64x64 tiles, 64 tiles a row, on white; the last row is filled with white
emoji.txt  a line per tile in the same order: source, code points, caption, with tabs between
Tiles are base emoji (no skin-tone variants), from the sheets without fallback images.
"""
import json
import re
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, COLUMNS, COLOURS = 64, 64, 256
WRONG = {("google", "1F1E8-1F1F6")}              # Sark: the sheet shows the flag of Saudi Arabia


def caption_of(name):
    """'MAN: RED HAIR' -> 'man red hair': lower case, words of [a-z0-9], accents dropped."""
    plain = unicodedata.normalize("NFKD", name.replace("*", "asterisk"))
    plain = re.sub("[.'\u2019\u0300-\u036f]", "", plain.lower())           # st. lucia -> st lucia
    return " ".join(re.findall("[a-z0-9]+", plain))


def load_tiles(folder, source):
    """Tiles (RGB images on white) and lines of text for one source, ordered as in emoji.json."""
    with tarfile.open(Path(folder) / f"emoji-datasource-{source}-16.0.0.tgz") as tar:
        emoji = json.load(tar.extractfile("package/emoji.json"))
        png = tar.extractfile(f"package/img/{source}/sheets-clean/{SIDE}.png")
        sheet = Image.open(png).convert("RGBA")
    sheet = Image.alpha_composite(Image.new("RGBA", sheet.size, "white"), sheet).convert("RGB")
    tiles, lines = [], []
    for e in emoji:
        caption = caption_of(e["name"] or "")
        if e[f"has_img_{source}"] and caption and (source, e["unified"]) not in WRONG:
            x, y = (e[k] * (SIDE + 2) + 1 for k in ("sheet_x", "sheet_y"))    # 1 pixel of padding
            tiles.append(sheet.crop((x, y, x + SIDE, y + SIDE)))
            lines.append(f"{source}\t{e['unified']}\t{caption}")
    return tiles, lines


def nearest(colours, palette):
    """Index of the palette colour nearest to each colour, in chunks that fit in little memory."""
    chunks, bias = np.array_split(colours, len(colours) // 20000 + 1), (palette ** 2).sum(1)
    return np.concatenate([(bias - 2 * c @ palette.T).argmin(1) for c in chunks])


def to_palette(image, steps=20):
    """The image with 256 colours from k-means, no dithering; entry 0 is white and stays exact."""
    pixels = np.asarray(image).astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    keys, index, counts = np.unique(pixels.ravel(), return_inverse=True, return_counts=True)
    colours = np.stack([keys >> 16, keys >> 8 & 255, keys & 255], 1).astype(np.float32)
    start = image.quantize(COLOURS, Image.Quantize.FASTOCTREE).getpalette()
    palette = np.resize(np.float32(start), (COLOURS, 3))
    for _ in range(steps):
        near = nearest(colours, palette)
        weight = np.maximum(np.bincount(near, counts, COLOURS), 1)
        sums = [np.bincount(near, counts * colours[:, k], COLOURS) for k in range(3)]
        palette = (np.stack(sums, 1) / weight[:, None]).round().astype(np.float32)
        palette[0] = 255
    near = nearest(colours, palette)[index].reshape(image.height, image.width)
    result = Image.fromarray(near.astype(np.uint8))
    result.putpalette(palette.astype(np.uint8).tobytes())
    return result


if __name__ == "__main__":
    pairs = [load_tiles(sys.argv[1], source) for source in ("twitter", "google")]
    tiles, lines = (sum(column, []) for column in zip(*pairs))
    sheet = Image.new("RGB", (COLUMNS * SIDE, -(-len(tiles) // COLUMNS) * SIDE), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
    to_palette(sheet).save(Path(__file__).with_name("emoji.png"), optimize=True)
    Path(__file__).with_name("emoji.txt").write_text("\n".join(lines) + "\n")
