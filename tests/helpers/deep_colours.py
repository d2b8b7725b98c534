"""Colours of 16 bits a channel, which Pillow reads and does not write."""

import struct
import zlib

import numpy as np

GREYS = np.arange(256, dtype="uint8").reshape(16, 16)
COLOURS = np.stack([GREYS, GREYS.T, 255 - GREYS], -1)


def save_deep_colours(file):
    """Writes a PNG or TIFF, and returns its values."""
    values = (COLOURS.astype("uint16") * 257) ^ 5
    if file.suffix == ".png":

        def chunk(kind, body):
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
        header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
        file.write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
        )
    else:
        import tifffile

        tifffile.imwrite(file, values, photometric="rgb")
    return values
