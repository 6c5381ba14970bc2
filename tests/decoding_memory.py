"""What decoding takes of memory, in bytes a pixel by kind of file: a line of JSON each.

Each file is made and decoded in processes of their own, forked from this one.
"""

import io
import json
import os
import struct
import sys
import zlib

import cv2
import numpy as np
from cost import forget_peak, memory
from PIL import Image

from cbam_jax.datasets import decode_image, decoding

SIDE = 2000
PALETTE, TRANSPARENT = (b"PLTE", bytes(range(6))), (b"tRNS", b"\0")
# Of an interlaced PNG: where its seven images begin, and their steps.
PASSES = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # fmt: skip


def png(depth, colour, *extra, interlaced=False):
    """Zeros, which a few kilobytes hold."""
    bits = depth * {2: 3, 4: 2, 6: 4}.get(colour, 1)
    packer, data = zlib.compressobj(), []
    for x, y, dx, dy in PASSES if interlaced else [(0, 0, 1, 1)]:
        row = bytes(1 + -(-(-(-(SIDE - x) // dx) * bits) // 8))
        data += [packer.compress(row) for _ in range(y, SIDE, dy)]
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour, 0, 0, interlaced)
    body = b"".join([*data, packer.flush()])
    chunks = ((b"IHDR", header), *extra, (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d))
        for name, d in chunks
    )


def pixels(channels, dtype=np.uint8):
    image = np.zeros((SIDE, SIDE, channels), dtype)
    image[..., 0], image[..., 1] = np.arange(SIDE)[:, None] % 251, np.arange(SIDE) % 241
    return image


def pil(kind, mode="RGB", **options):
    image = Image.fromarray(pixels(4 if mode == "RGBA" else 3))
    more = [Image.new(mode, image.size, 9)] if options.get("save_all") else []
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, append_images=more, **options)
    return buffer.getvalue()


def opencv(ending, channels=3, dtype=np.uint8, *options):
    return cv2.imencode(ending, pixels(channels, dtype), options)[1].tobytes()


FAST = {"speed": 10, "quality": 30}
WIDE = (cv2.IMWRITE_TIFF_ROWSPERSTRIP, SIDE)  # One strip, which a decoder reads as a whole.
KINDS = {
    "PNG, 1 bit": lambda: png(1, 0),
    "PNG, 8 bits grey": lambda: png(8, 0),
    "PNG, 16 bits grey": lambda: png(16, 0),
    "PNG, 8 bits": lambda: png(8, 2),
    "PNG, 16 bits": lambda: png(16, 2),
    "PNG, 16 bits, interlaced": lambda: png(16, 2, interlaced=True),
    "PNG, palette": lambda: png(8, 3, PALETTE),
    "PNG, palette of 1 bit with transparency": lambda: png(1, 3, PALETTE, TRANSPARENT),
    "PNG, grey and alpha of 16 bits": lambda: png(16, 4),
    "PNG, RGBA of 8 bits": lambda: png(8, 6),
    "PNG, RGBA of 16 bits": lambda: png(16, 6),
    "PNG, RGBA of 16 bits, interlaced": lambda: png(16, 6, interlaced=True),
    "WebP": lambda: pil("WEBP", method=0),
    "WebP, lossless": lambda: pil("WEBP", lossless=True, method=0, quality=0),
    "WebP, RGBA": lambda: pil("WEBP", "RGBA", method=0),
    "WebP, RGBA, lossless": lambda: pil("WEBP", "RGBA", lossless=True, method=0, quality=0),
    "WebP, animation": lambda: pil("WEBP", save_all=True, method=0),
    "JPEG": lambda: pil("JPEG"),
    "JPEG, progressive": lambda: pil("JPEG", progressive=True, subsampling=0),
    "JPEG, CMYK": lambda: pil("JPEG", "CMYK"),
    "JPEG, CMYK, progressive": lambda: pil("JPEG", "CMYK", progressive=True),
    "TIFF": lambda: pil("TIFF", strip_size=1 << 30),
    "TIFF, LZW": lambda: pil("TIFF", compression="tiff_lzw", strip_size=1 << 30),
    "TIFF, RGBA of 16 bits": lambda: opencv(".tiff", 4, np.uint16, *WIDE),
    "TIFF, CMYK": lambda: pil("TIFF", "CMYK", compression="tiff_lzw", strip_size=1 << 30),
    "TIFF, fax": lambda: pil("TIFF", "1", compression="group4"),
    "GIF": lambda: pil("GIF", "P", transparency=0),
    "GIF, animation": lambda: pil("GIF", "P", save_all=True),
    "BMP, 1 bit": lambda: pil("BMP", "1"),
    "BMP": lambda: pil("BMP"),
    "AVIF": lambda: pil("AVIF", subsampling="4:4:4", **FAST),
    "AVIF, RGBA": lambda: pil("AVIF", "RGBA", **FAST),
    "HEIC": lambda: pil("HEIF", quality=30),
    "HEIC, RGBA": lambda: pil("HEIF", "RGBA", quality=30),
    "JPEG 2000": lambda: pil("JPEG2000"),
    "JPEG 2000, RGBA": lambda: pil("JPEG2000", "RGBA"),
    "JPEG 2000, 16 bits": lambda: opencv(".jp2", 3, np.uint16),
    "PPM, 16 bits": lambda: opencv(".ppm", 3, np.uint16),
    "PFM": lambda: opencv(".pfm", 3, np.float32),
    "Radiance": lambda: opencv(".hdr", 3, np.float32),
    "Sun raster": lambda: opencv(".ras"),
}


def apart(function, *arguments):
    pid = os.fork()
    if not pid:
        try:
            function(*arguments)
        except BaseException as error:
            print(json.dumps({"kind": arguments[0], "error": repr(error)}), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)


def make(kind, path):
    with open(path, "wb") as file:
        file.write(KINDS[kind]())


def measure(kind, path):
    with open(path, "rb") as file:
        encoded = file.read()
    decode_image(cv2.imencode(".bmp", np.zeros((2, 2), np.uint8))[1].tobytes())
    forget_peak()
    before = memory()[0]
    shape = decode_image(encoded).shape
    held = (memory()[1] - before) * 2**20 / SIDE**2
    allowed = 8e12 / decoding.affordable(encoded, 10**12)
    print(json.dumps({"kind": kind, "shape": shape, "held": held, "allowed": allowed}), flush=True)


if __name__ == "__main__":
    decoding._reads_heic()
    for kind in KINDS:
        apart(make, kind, sys.argv[1])
        apart(measure, kind, sys.argv[1])
