"""The orientation of an image: how EXIF says that it is to be turned or mirrored to be upright (tag 274, values 1 to 8)."""

from PIL import ExifTags, Image

from clipjax.data.images.resize import Box

Turn = Image.Transpose
TURNS = {
    2: Turn.FLIP_LEFT_RIGHT,
    3: Turn.ROTATE_180,
    4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE,
    6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE,
    8: Turn.ROTATE_90,
}
SIDEWAYS = (Turn.TRANSPOSE, Turn.ROTATE_270, Turn.TRANSVERSE, Turn.ROTATE_90)  # width becomes height
FROM_RIGHT = (Turn.FLIP_LEFT_RIGHT, Turn.ROTATE_180, Turn.TRANSVERSE, Turn.ROTATE_90)  # the stored x is counted from the right
FROM_BOTTOM = (Turn.FLIP_TOP_BOTTOM, Turn.ROTATE_180, Turn.TRANSVERSE, Turn.ROTATE_270)  # the stored y from the bottom


def turn_of(image: Image.Image) -> Turn | None:
    """What makes the image upright; None: it is. Broken metadata say nothing. TIFFs are turned by Pillow when they are loaded."""
    try:
        return TURNS.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
    except Exception:  # a parser of foreign bytes may raise anything
        return None


def turned(image: Image.Image, turn: Turn | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def turned_size(width: int, height: int, turn: Turn | None) -> tuple[int, int]:
    """The size of the upright image, of the stored one's."""
    return (height, width) if turn in SIDEWAYS else (width, height)


def stored_box(box: Box, width: int, height: int, turn: Turn | None) -> Box:
    """A box of the upright image in the stored one, whose size is given."""
    left, top, right, bottom = (box[1], box[0], box[3], box[2]) if turn in SIDEWAYS else box
    if turn in FROM_RIGHT:
        left, right = width - right, width - left
    if turn in FROM_BOTTOM:
        top, bottom = height - bottom, height - top
    return left, top, right, bottom
