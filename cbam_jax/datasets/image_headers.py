"""What an image file's header says: its format, and how many pixels it claims to have.

Both are read before anything is decoded, and one table says how, for each format. A file of a few
hundred bytes can claim a billion pixels, and a decoder makes room for what is claimed before it
finds that nothing follows.
"""

import contextlib
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from cbam_jax import InputError

# Of photos, 2**27 are 134 megapixels: such an image takes 0.4 GB, and up to 1.1 GB meanwhile.
MOST_PIXELS = 1 << 27
_COMMON_SCANS = 20
# Within a scan's data a 0xFF is followed by zero, or by what says where to begin anew.
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
MOST_PIXELS_VARIABLE = "CBAM_JAX_MAX_PIXELS"
# Of a PNG, beside those that none can do without: transparency, orientation, other frames.
_OF_PIXELS = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
# Not at all, fax, LZW, JPEG old and new, Deflate twice, PackBits, LZMA, Zstandard and WebP.
_TIFF_PACKED = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 32946, 32773, 34925, 50000, 50001))


def check_pixels(sizes: Iterable[tuple[int, int]], name: str, most: int) -> None:
    """Raise InputError where one of the sizes that an image claims is more than is decoded.

    Args:
        sizes: height and width.
        name: of the image, for the message.
        most: pixels that are decoded of its kind.
    """
    for height, width in sizes:
        if height * width > most:
            raise InputError(
                f"{name} claims {width} x {height} pixels, more than the {most} of its kind that "
                f"are decoded: shrink it, leave it out, or set {MOST_PIXELS_VARIABLE}"
            )


def most_pixels() -> int:
    """Return how many pixels of a usual image are decoded at most.

    2**27, or ``$CBAM_JAX_MAX_PIXELS``.
    """
    text = os.environ.get(MOST_PIXELS_VARIABLE, str(MOST_PIXELS))
    if not re.fullmatch(r"[1-9]\d{0,11}", text):
        raise InputError(f"{MOST_PIXELS_VARIABLE}={text}: give a number of pixels, or unset it")
    return int(text)


def holds_less_than_it_claims(encoded: bytes) -> bool:
    """Whether a PNG is shorter than any of its size, or than one of its chunks says.

    Deflate makes of a byte 1,032 at most. OpenCV makes room for a chunk of 2 GB before it sees that
    the file ends, and takes ten seconds for it. False for what is no PNG.
    """
    if not encoded.startswith(b"\x89PNG\r\n\x1a\n") or len(encoded) < 26:
        return False
    width, height, depth, colour = struct.unpack_from(">IIBB", encoded, 16)
    bits = width * height * depth * {2: 3, 4: 2, 6: 4}.get(colour, 1)
    return bits > 8 * 1032 * len(encoded) or not _ends_with_its_chunks(encoded)


def _ends_with_its_chunks(encoded: bytes) -> bool:
    place = 8
    while place + 12 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, place)
        place += 12 + length
        if kind == b"IEND":
            return place <= len(encoded)
    return False


def png_of_pixels_alone(encoded: bytes) -> bytes | None:
    """A PNG without what is no pixel, None where a checksum differs.

    libpng compares the checksums too, and tells on stderr, without a name, what it dislikes of a
    profile, a date or a text.
    """
    place, kind, kept = 8, b"", [encoded[:8]]
    while kind != b"IEND" and place + 12 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, place)
        chunk = encoded[place : place + 12 + length]
        place += len(chunk)
        if kind[:1].isupper() or kind in _OF_PIXELS:
            if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
                return None
            kept.append(chunk)
    return b"".join(kept)


def has_too_many_scans(encoded: bytes, height: int, width: int) -> bool:
    """Whether a progressive JPEG goes over its pixels so often that decoding would take for ever.

    Common ones have ten scans; a scan can be a few bytes long, and takes as long as any.
    """
    if encoded.count(b"\xff\xda") <= _COMMON_SCANS:  # Fast; elsewhere it may stand by chance.
        return False
    scans = scan_count(encoded)
    return scans > _COMMON_SCANS and scans * height * width > MOST_PIXELS


def scan_count(encoded: bytes) -> int:
    """Count the scans of a progressive JPEG; of another one it is 1."""
    place, progressive, scans = 2, False, 0
    while found := _MARKER.search(encoded, place):
        kind, place = found[1], found.end()
        scans += kind == b"\xda"
        if kind == b"\xd9" or (scans and not progressive):
            break
        progressive = progressive or kind in b"\xc2\xc6\xca\xce"
        place += int.from_bytes(encoded[place : place + 2])  # The segment, or a scan's header.
    return scans


def keeps_coefficients(encoded: bytes) -> bool:
    """Whether a decoder of a JPEG holds all its coefficients: no scan has all of a part of it.

    A progressive one's have a part of the numbers, and other ones' may have one colour each.
    """
    place, colours = 2, 0
    while found := _MARKER.search(encoded, place):
        kind, place = found[1][0], found.end()
        if kind == 0xDA:
            return encoded[place + 2 : place + 3] != bytes([colours])
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            colours = (encoded[place + 7 : place + 8] or b"\0")[0]
            if kind & 3 == 2:
                return True
        place += int.from_bytes(encoded[place : place + 2])
    return True  # Damaged.


def claimed_sizes(encoded: bytes) -> Iterator[tuple[int, int]]:
    """Yield each height and width that the headers of an image file claim, by its kind.

    Of a JPEG only where headers are damaged, so that it is to be searched: ``jpeg_size`` reads the
    others. Of kinds that are not known nothing.

    >>> import cv2, numpy as np
    >>> png = cv2.imencode(".png", np.zeros((4, 6), np.uint8))[1].tobytes()
    >>> list(claimed_sizes(png))
    [(4, 6)]
    """
    if found := _format(encoded):
        # Cut off, or with offsets that lead nowhere: a decoder finds nothing either.
        with contextlib.suppress(struct.error, ValueError, OverflowError):
            yield from found.sizes(encoded)


def image_format(head: bytes) -> str | None:
    """What kind of image a file's first 64 bytes are the beginning of; None: none that is known.

    >>> image_format(b"GIF89a..."), image_format(b"path,label")
    ('GIF', None)
    """
    found = _format(head)
    if found and found.name == "boxes":
        brands = {head[place : place + 4] for place in range(8, min(head[3], len(head)), 4)}
        return next((name for name, known in _BRANDS.items() if brands & known), None)
    return found.name if found else None


def _at(form: str, place: int) -> Callable[[bytes], Iterator[tuple[int, int]]]:
    """A reader of width and height at one place."""

    def sizes(encoded: bytes) -> Iterator[tuple[int, int]]:
        width, height = struct.unpack_from(form, encoded, place)
        yield abs(height), abs(width)

    return sizes


def _bmp(encoded: bytes) -> Iterator[tuple[int, int]]:
    (header,) = struct.unpack_from("<I", encoded, 14)
    yield from _at("<HH" if header == 12 else "<ii", 18)(encoded)


def _jpeg(encoded: bytes) -> Iterator[tuple[int, int]]:
    """Every frame's header; a table or a thumbnail may hold what looks like one, and is small."""
    for frame in re.finditer(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]..\x08(....)[\x01-\x04]",
                             encoded, re.DOTALL):  # fmt: skip
        yield struct.unpack(">HH", frame[1])


def _gif(encoded: bytes) -> Iterator[tuple[int, int]]:
    """Of the screen, and of the first frame, which may be larger."""
    yield from _at("<HH", 6)(encoded)
    palette = int.from_bytes(encoded[10:11])
    place = 13 + (3 << (palette & 7) + 1 if palette & 0x80 else 0)
    while encoded[place : place + 1] == b"!":  # Extensions, of blocks that begin with their length.
        place += 2
        while length := int.from_bytes(encoded[place : place + 1]):
            place += 1 + length
        place += 1
    if encoded[place : place + 1] == b",":
        yield from _at("<HH", place + 5)(encoded)


def _webp(encoded: bytes) -> Iterator[tuple[int, int]]:
    kind = encoded[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(encoded[i : i + 3], "little") + 1 for i in (24, 27))
        yield height, width
    elif kind == b"VP8L":
        bits = int.from_bytes(encoded[21:25], "little")
        yield (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    else:
        width, height = struct.unpack_from("<HH", encoded, 26)
        yield height & 0x3FFF, width & 0x3FFF


def _tiff(encoded: bytes) -> Iterator[tuple[int, int]]:
    """Of the first page, and of its tiles, one of which may be larger."""
    found = _tiff_tags(encoded)
    yield max(found.get(257, [0])), max(found.get(256, [0]))
    if {322, 323} <= found.keys():
        yield max(found[323]), max(found[322])


def is_packed_otherwise(encoded: bytes) -> bool:
    """Whether a TIFF is compressed as OpenCV does not read: it makes black pixels of it."""
    if image_format(encoded[:64]) != "TIFF":
        return False
    try:
        return not _TIFF_PACKED.issuperset(_tiff_tags(encoded).get(259, ()))
    except (struct.error, OverflowError):  # Cut off, or its tags lie beyond all files.
        return True


def _tiff_tags(encoded: bytes) -> dict[int, list[int]]:
    """The first page's tags of one number; decoders differ in which of two of a kind they take.

    43 in place of 42 is BigTIFF, whose numbers have eight bytes.
    """
    order = "<" if encoded[:2] == b"II" else ">"
    big = struct.unpack_from(f"{order}H", encoded, 2) == (43,)
    start, count, entry = ("Q", "Q", "HHQ") if big else ("I", "H", "HHI")
    (place,) = struct.unpack_from(order + start, encoded, 8 if big else 4)
    (number,) = struct.unpack_from(order + count, encoded, place)
    found: dict[int, list[int]] = {}
    place += struct.calcsize(order + count)
    width = struct.calcsize(order + entry)
    for _ in range(min(number, 4096)):
        tag, kind, _ = struct.unpack_from(order + entry, encoded, place)
        form = {3: "H", 4: "I", 16: "Q"}.get(kind)
        if form:
            found.setdefault(tag, []).extend(
                struct.unpack_from(order + form, encoded, place + width)
            )
        place += width + (8 if big else 4)
    return found


def _boxes(encoded: bytes) -> Iterator[tuple[int, int]]:
    """AVIF, HEIC and JPEG 2000: boxes with a size, wherever they stand, and codestreams."""
    for box in re.finditer(rb"ispe....(........)", encoded, re.DOTALL):
        width, height = struct.unpack(">II", box[1])
        yield height, width
    for box in re.finditer(rb"ihdr(........)", encoded, re.DOTALL):
        yield struct.unpack(">II", box[1])
    for stream in re.finditer(rb"\xff\x4f\xff\x51....(........)", encoded, re.DOTALL):
        width, height = struct.unpack(">II", stream[1])
        yield height, width


def _netpbm(encoded: bytes) -> Iterator[tuple[int, int]]:
    words = re.sub(rb"#[^\n]*", b" ", encoded[:65536]).split(maxsplit=12)
    if words[0] == b"P7":  # Of names and numbers.
        fields = dict(zip(words[1::2], words[2::2], strict=False))
        yield int(fields.get(b"HEIGHT", 0)), int(fields.get(b"WIDTH", 0))
    elif len(words) > 2:
        yield int(words[2]), int(words[1])


def _radiance(encoded: bytes) -> Iterator[tuple[int, int]]:
    for line in re.finditer(rb"\n[-+]Y (\d{1,9}) [-+]X (\d{1,9})", encoded[:65536]):
        yield int(line[1]), int(line[2])


class _Format(NamedTuple):
    name: str
    beginning: bytes  # A regular expression of the first bytes.
    sizes: Callable[[bytes], Iterator[tuple[int, int]]]


_FORMATS = (
    _Format("JPEG", rb"\xff\xd8", _jpeg),
    _Format("PNG", rb"\x89PNG\r\n\x1a\n", _at(">II", 16)),
    _Format("WebP", rb"RIFF....WEBP", _webp),
    _Format("GIF", rb"GIF8", _gif),
    _Format("BMP", rb"BM", _bmp),
    _Format("TIFF", rb"II[*+]\0|MM\0[*+]", _tiff),
    _Format("JPEG 2000", rb"\0\0\0\x0cjP|\xff\x4f\xff\x51", _boxes),
    _Format("boxes", rb"....ftyp", _boxes),  # Which of _BRANDS the boxes say.
    _Format("PNM", rb"P[1-7Ff]\s", _netpbm),
    _Format("Radiance", rb"#\?RGBE|#\?RADIANCE", _radiance),
    _Format("Sun raster", rb"\x59\xa6\x6a\x95", _at(">II", 4)),
)
_BRANDS = {"AVIF": {b"avif", b"avis"}, "HEIC": {b"heic", b"heix", b"heim", b"heis", b"mif1"}}


def _format(head: bytes) -> _Format | None:
    found = (one for one in _FORMATS if re.match(one.beginning, head[:16], re.DOTALL))
    return next(found, None)
