"""Contact sheets: images in a grid, with text under each."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL, LINES = 148, 3  # pixels a cell, lines of a text
MARGIN = 8


@dataclass(frozen=True)
class Cell:
    image: Image.Image
    texts: Sequence[tuple[str, str]]  # each text with its colour


def contact_sheet(title: str, cells: Sequence[Cell], columns: int) -> Image.Image:
    """All cells, row by row. A text that needs more than three lines is shortened."""
    font, heading = _font(13), _font(20)
    line = sum(font.getmetrics()) + 1
    texts = max((len(cell.texts) for cell in cells), default=1)
    width, height = columns * (CELL + MARGIN) + MARGIN, CELL + texts * LINES * line + 2 * MARGIN
    rows = -(-max(len(cells), 1) // columns)
    top = 30 + 2 * MARGIN
    sheet = Image.new("RGB", (width, top + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, "black", heading)
    for i, cell in enumerate(cells):
        x, y = MARGIN + i % columns * (CELL + MARGIN), top + i // columns * height
        draw.rectangle((x - 1, y - 1, x + CELL, y + CELL), outline="#dddddd")
        sheet.paste(ImageOps.pad(cell.image, (CELL, CELL), color="white"), (x, y))
        lines = [(words, colour) for text, colour in cell.texts for words in _wrap(text, font)]
        for n, (words, colour) in enumerate(lines):
            draw.text((x, y + CELL + 3 + n * line), words, colour, font)
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # a font of a given size always is
    return font


def _wrap(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """At most LINES lines that fit a cell. If text is left out, the last line ends in an ellipsis."""
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= CELL or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], lines[LINES - 1] + " ..."]
    return [_shorten(line, font) for line in lines]


def _shorten(line: str, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= CELL:
        return line
    while line and font.getlength(f"{line}...") > CELL:
        line = line[:-1]
    return f"{line.rstrip(' .')}..."
