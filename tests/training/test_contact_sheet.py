import numpy as np
import pytest
from emu35.training.contact_sheet import contact_sheet
from PIL import Image


def test_shows_every_image_enlarged_and_marks_wrong_sentences_red(tmp_path):
    colors = [(10, 20, 30), (40, 50, 60), (70, 80, 90)]
    images = [Image.new("RGB", (48, 48), color) for color in colors]
    contact_sheet([*images, None], ["a", "b c d", "e", "missing"], [True, True, False, True], tmp_path / "page.png", 3)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3)
    for color in colors:
        assert (pixels == color).all(1).sum() == (48 * 4) ** 2
    # Letters are anti-aliased, so their colour is a direction rather than a value.
    red, green, blue = pixels.astype(int).T
    assert ((red > green + 60) & (red > blue + 60)).any()
    assert ((green > red + 40) & (green > blue + 20)).any()


def test_lengths_must_agree(tmp_path):
    with pytest.raises(ValueError, match="of one length and not empty, got 1, 2 and 1"):
        contact_sheet([None], ["a", "b"], [True], tmp_path / "page.png")
