import numpy as np
import pytest
from PIL import Image

from clipjax.export.compare.opening import notes
from tests.data.test_image import encoded

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def test_images_alike_everywhere_need_no_note():
    plain, opaque = Image.fromarray(PIXELS), Image.fromarray(PIXELS)
    opaque.putalpha(255)
    assert notes([encoded(plain), encoded(plain, "jpeg"), encoded(opaque)], 8, "squash") == []


def test_differences_are_counted_by_kind(tmp_path):
    exif = Image.Exif()
    exif[274] = 3
    halves = Image.fromarray(np.repeat(np.array([[0], [100]], np.uint8), [4, 4], 0).repeat(8, 1)).convert("RGB")
    clear = Image.new("RGBA", (8, 8), (155, 155, 155, 0))
    half_clear = clear.copy()
    half_clear.paste((0, 0, 0, 255), (0, 0, 8, 4))
    deep = Image.fromarray(np.full((8, 8), 155 * 256, np.uint16))
    (tmp_path / "turned.png").write_bytes(encoded(halves, exif=exif))
    stored = [encoded(halves), tmp_path / "turned.png", encoded(clear), encoded(half_clear), encoded(deep)]
    opened = "opened without clipjax, their pixels differ by"
    assert notes(stored, 8, "crop") == [
        f"1 of 5 images are rotated by EXIF; {opened} 100 of 255 on average (at most 100 in one image)",
        f"2 of 5 images are transparent; {opened} 75 of 255 on average (at most 100 in one image)",
        f"1 of 5 images are of more than 8 bits a channel; {opened} 100 of 255 on average (at most 100 in one image)",
    ]


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_sideways_image_has_other_sides(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    stored = encoded(Image.fromarray(PIXELS[:5]), exif=exif)
    assert len(notes([stored], 8, "crop")) == 1
