"""What a shift of place costs a run on emoji: recalls and exact captions of the 363 held-out images, drawn at other places.

    python benchmarks/shift.py RUN [--captions]

Each image, 136 x 128, is drawn on a white square of 136: 0, 4 (the middle) and 8 pixels lower, which is 6 % of the side, and in
the middle 8 pixels to the left and to the right. docs/your-data.md has the figures.
"""

import argparse

import numpy as np
from PIL import Image

import clipjax
from clipjax import config
from clipjax.data.faults import shown
from clipjax.data.sources import open_source

SIDE = 136
PLACES = {"top": (0, 0), "middle": (0, 4), "bottom": (0, 8), "left": (-8, 4), "right": (8, 4)}  # of the upper left corner


def drawn(image: Image.Image, place: tuple[int, int]) -> Image.Image:
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(image, place)
    return square


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--captions", action="store_true", help="also the share of exact captions, of a run with a decoder")
    args = parser.parse_args()
    source = open_source(config.Data(spec="emoji", split="test"))
    examples = list(shown(source, range(len(source))))
    images, names = [e.image.convert("RGB") for e in examples], [e.record.captions[0] for e in examples]
    model = clipjax.load(args.run)
    texts, own = model.encode_text(names), np.arange(len(names))
    versions = {"as it is": images} | {place: [drawn(image, xy) for image in images] for place, xy in PLACES.items()}
    for place, moved in versions.items():
        cosines = texts @ model.encode_image(moved).T
        figures = {"text to image": (cosines.argmax(1) == own).mean(), "image to text": (cosines.argmax(0) == own).mean()}
        if args.captions:
            figures["exact"] = np.mean([c.strip() == name for c, name in zip(model.caption(moved), names, strict=True)])
        print(f"{place:9}", "  ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
