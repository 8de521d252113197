"""Milliseconds of CPU that one training image takes: decoding a JPEG, a random crop, resizing to 224 pixels.

Run:   python benchmarks/images.py [--repeats 5] [--images 40]
Input: JPEGs like photographs (smoothed noise over several scales, quality 85), of 500 x 375 pixels and about 54 kB, and of 1024 x
       768 and about 176 kB; data.augment.crop 0.9, process time, the median of the repeats
Seen:  on a core of a shared machine, medians of nine, in turns with the code as it was before ("before"):
         500 x 375   before 2.10 ms   pillow 2.15 ms   fast 1.15 ms
       1024 x 768   before 7.03 ms   pillow 3.67 ms   fast 2.66 ms
"""

import argparse
import io
import statistics
import time

import numpy as np
from PIL import Image

from clipjax.config import Augment, Data
from clipjax.data.images import image

SIZE = 224
SHAPES = ((500, 375, 54_000), (1024, 768, 176_000))


def photo(width, height, size, seed):
    """A JPEG of about `size` bytes: noise whose amplitude falls with its frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    cells = 4
    while cells < width:
        coarse = Image.fromarray(rng.integers(0, 256, (max(cells * height // width, 1), cells, 3), np.uint8))
        pixels += (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) - 128) * 8 / cells**0.5
        cells *= 2
    strength, stored = 1.0, b""
    for _ in range(8):  # fine noise, as strong as the size of the file asks for
        noisy = pixels + rng.normal(0, 12, pixels.shape[:2])[..., None] * strength
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=85)
        stored = file.getvalue()
        strength *= (size / len(stored)) ** 1.5
    return stored


def milliseconds(files, data, repeats):
    times = []
    for _ in range(repeats):
        start = time.process_time()
        for i, stored in enumerate(files):
            image.training(stored, SIZE, data, np.random.default_rng(i))
        times.append((time.process_time() - start) / len(files) * 1000)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=40)
    args = parser.parse_args()
    for width, height, size in SHAPES:
        files = [photo(width, height, size, seed) for seed in range(args.images)]
        print(f"{width} x {height}, {np.mean([len(f) for f in files]) / 1000:.0f} kB:", end="")
        for resizer in ("pillow", "fast"):
            data = Data(spec="emoji", resizer=resizer, augment=Augment(crop=0.9))
            print(f"  {resizer} {milliseconds(files, data, args.repeats):.2f} ms", end="")
        print()


if __name__ == "__main__":
    main()
