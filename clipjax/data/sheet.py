"""Contact sheets: pictures in a grid, with text under each."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL, LINES = 148, 3  # pixels a cell, lines of a text
MARGIN = 8


@dataclass(frozen=True)
class Cell:
    picture: Image.Image
    texts: Sequence[tuple[str, str]]  # each with its colour


def contact_sheet(title: str, cells: Sequence[Cell], columns: int) -> Image.Image:
    """All cells, row by row. A text is cut to three lines."""
    font, heading = ImageFont.load_default(13), ImageFont.load_default(20)
    line = sum(font.getmetrics()) + 1
    texts = max((len(cell.texts) for cell in cells), default=1)
    width, height = columns * (CELL + MARGIN) + MARGIN, CELL + texts * LINES * line + 2 * MARGIN
    rows = -(-max(len(cells), 1) // columns)
    top = 30 + 2 * MARGIN
    sheet = Image.new("RGB", (width, top + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, "black", heading)
    for place, cell in enumerate(cells):
        x, y = MARGIN + place % columns * (CELL + MARGIN), top + place // columns * height
        draw.rectangle((x - 1, y - 1, x + CELL, y + CELL), outline="#dddddd")
        sheet.paste(ImageOps.pad(cell.picture, (CELL, CELL), color="white"), (x, y))
        written = [(words, colour) for text, colour in cell.texts for words in _wrap(text, font)]
        for n, (words, colour) in enumerate(written):
            draw.text((x, y + CELL + 3 + n * line), words, colour, font)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """At most LINES lines that fit a cell; what is left out ends in an ellipsis."""
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= CELL or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], lines[LINES - 1] + " ..."]
    return [_cut(line, font) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= CELL:
        return line
    while line and font.getlength(f"{line}...") > CELL:
        line = line[:-1]
    return f"{line.rstrip(' .')}..."
