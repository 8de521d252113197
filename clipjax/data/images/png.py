"""A PNG without its metadata, for those whose metadata Pillow refuses: damaged, or texts that are too large."""

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # the chunks that hold the first image
ORIENTATION = b"eXIf"


def bare(stored: bytes) -> bytes:
    """The chunks of a PNG that hold its pixels, as they are, and its EXIF block if that is whole. A cut file stays cut."""
    kept, start = [SIGNATURE], len(SIGNATURE)
    while start + 8 <= len(stored):
        length, kind = struct.unpack(">I4s", stored[start : start + 8])
        end = start + 12 + length
        chunk = stored[start:end]
        whole = chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if kind in PIXELS or (kind == ORIENTATION and whole):
            kept.append(chunk)
        start = end
    return b"".join(kept)
