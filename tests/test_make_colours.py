"""data/make_colours.py: emoji in other colours, with colorsys as the oracle."""
import colorsys
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import make_colours as m  # noqa: E402
from common import load_images  # noqa: E402


def square(*colours):
    """An image of vertical stripes of equal width."""
    return np.repeat(np.array([colours], np.uint8), 4, axis=0).repeat(6, axis=1)


def hues(image):
    """Hues in degrees of the stripes' first pixels; None of greys."""
    found = [colorsys.rgb_to_hsv(*(image[0, i] / 255)) for i in range(0, image.shape[1], 6)]
    return [360 * h if s else None for h, s, _ in found]


@pytest.mark.parametrize("hue", m.HUES.values())
def test_the_dominant_hue_is_turned_and_all_else_stays(hue):
    yellow, amber, blue = (250, 220, 20), (250, 180, 20), (20, 40, 250)
    image = square(yellow, yellow, yellow, amber, blue, (90, 90, 90), (255, 255, 255))
    before, after = hues(image), hues(m.recolour(image, hue))
    assert m.apart(np.array(after[:4]), np.array(before[:4]) - m.dominant(image)[0] + hue) == pytest.approx(0, abs=7)
    assert m.apart(after[4], before[4]) == pytest.approx(0, abs=2) and after[5:] == [None, None]
    values = image.max(-1)
    assert np.abs(m.recolour(image, hue).max(-1).astype(int) - values).max() <= 1


def test_captions():
    captions, apple = {"red apple", "green apple", "dog"}, square((220, 30, 30), (220, 40, 30), (255, 255, 255))
    assert not list(m.copies(apple, "red apple", captions))    # four unseen, two there
    assert [new for new, _ in m.copies(apple, "dog", captions)] == [
        f"{name} dog" for name in m.HUES if name != "purple"]
    assert [new for new, _ in m.copies(apple, "red shoe", {*captions, "red shoe"})] == [
        f"{name} shoe" for name in m.HUES if name != "red"]
    grey = square((200, 200, 200), (255, 255, 255))
    assert not list(m.copies(grey, "spoon", captions)) and not list(m.copies(apple, "flag of a land", captions))
    assert not list(m.copies(apple, "red and blue pin", captions))


def test_folder(tmp_path, monkeypatch, capsys):
    """What the folder holds is read as it was written, and nothing of UNSEEN is in it."""
    x, y, captions = load_images("twemoji")
    monkeypatch.setattr(m, "load_images", lambda name: (x[:40], y[:40], captions))
    m.main(tmp_path / "f")
    got, classes, names = load_images(str(tmp_path / "f"), 64)
    assert capsys.readouterr().out.startswith(f"{len(got)} images") and len(got) > 40 * m.REPEATS
    assert not set(names) & m.UNSEEN and {captions[i] for i in y[:40].tolist()} <= set(names)
    of_first = got[classes == names.index(captions[y[0]])]
    assert len(of_first) == m.REPEATS and all((tile == x[0]).all() for tile in of_first)
