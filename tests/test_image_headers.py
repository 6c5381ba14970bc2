"""What image files claim to be, and how much is decoded of those that claim too much."""

import io
import json
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import cost
import cv2
import numpy as np
import pytest
from PIL import Image

from cbam_jax import InputError
from cbam_jax.datasets import decode_image, decoding, jpeg_size
from cbam_jax.datasets.decoding import is_decodable
from cbam_jax.datasets.image_headers import (
    check_pixels,
    claimed_sizes,
    holds_less_than_it_claims,
    keeps_coefficients,
    png_of_pixels_alone,
    scan_count,
)

PILLOW = ("PNG", "GIF", "BMP", "WEBP", "TIFF", "JPEG2000", "PPM", "AVIF")
OPENCV = ("hdr", "ras", "pam", "pfm", "pgm", "tiff", "webp", "jp2")


def drawn(rng, height, width):
    return rng.integers(0, 255, (height, width, 3), np.uint8)


@pytest.mark.parametrize("kind", PILLOW)
def test_sizes_are_those_that_pillow_reads(kind, rng):
    height, width = rng.integers(9, 90, 2)
    buffer = io.BytesIO()
    try:
        Image.fromarray(drawn(rng, height, width)).save(buffer, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    assert (height, width) in set(claimed_sizes(buffer.getvalue()))
    assert len(set(claimed_sizes(buffer.getvalue()))) == 1


@pytest.mark.parametrize("kind", OPENCV)
def test_sizes_are_those_that_opencv_decodes(kind, rng):
    image = drawn(rng, *rng.integers(64, 150, 2))
    if kind in ("hdr", "pfm"):
        image = image.astype(np.float32)
    image = image[..., 0] if kind == "pgm" else image
    encoded = cv2.imencode(f".{kind}", image)[1].tobytes()
    assert set(claimed_sizes(encoded)) == {image.shape[:2]}


@pytest.mark.parametrize(("mode", "options"), [
    ("lossless", {"lossless": True}), ("alpha", {}), ("lossless alpha", {"lossless": True}),
])  # fmt: skip
def test_each_form_of_webp(mode, options, rng):
    image = Image.fromarray(drawn(rng, 31, 57))
    if "alpha" in mode:
        image.putalpha(99)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **options)
    assert set(claimed_sizes(buffer.getvalue())) == {(31, 57)}


def test_big_tiff(rng):
    buffer = io.BytesIO()
    Image.fromarray(drawn(rng, 31, 57)).save(buffer, "TIFF", big_tiff=True)
    assert buffer.getvalue()[2] == 43
    assert set(claimed_sizes(buffer.getvalue())) == {(31, 57)}


def test_a_jpeg_is_searched_where_its_headers_are_damaged(rng):
    encoded = jpeg(rng, 40, 24)
    assert list(claimed_sizes(encoded)) == [(40, 24)]
    damaged = encoded[:2] + b"\0" + encoded[2:]
    assert jpeg_size(damaged) is None
    assert list(claimed_sizes(damaged)) == [(40, 24)]


@pytest.mark.parametrize("encoded", [
    b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF1234WEBPVP8X", b"GIF89a", b"BM", b"II*\0",
    b"MM\0*\0\0\0\x08\xff\xff", b"II+\0\x08\0\0\0" + b"\xff" * 16, b"1234ftypavif", b"P6 x y",
    b"P7\nWIDTH\n", b"P6 " + b"9" * 5_000 + b" 1", b"P5", b"#?", b"\x59\xa6\x6a\x95", b"hello",
])  # fmt: skip
def test_what_is_cut_off_claims_little(encoded):
    assert all(height * width < 2**27 for height, width in claimed_sizes(encoded))


def jpeg(rng, height, width):
    return cv2.imencode(".jpg", drawn(rng, height, width))[1].tobytes()


def claiming(rng, height, width, kind):
    """An image file of a few hundred bytes that claims to be larger."""
    if kind == "png":
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = zlib.compress(bytes(1000))
        chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d))
            for name, d in chunks
        )
    options = [cv2.IMWRITE_WEBP_QUALITY, 80] if kind == "webp" else []
    encoded = bytearray(cv2.imencode(f".{kind}", drawn(rng, 8, 8), options)[1].tobytes())
    place, form, sides = {
        "jpg": (encoded.find(b"\xff\xc0") + 5, ">HH", (height, width)),
        "bmp": (18, "<ii", (width, -height)),
        "gif": (6, "<HH", (width, height)),
        "webp": (26, "<HH", (width, height)),
    }[kind]
    struct.pack_into(form, encoded, place, *sides)
    return bytes(encoded)


@pytest.mark.parametrize("kind", ["jpg", "png", "bmp", "gif", "webp"])
def test_what_claims_too_much_is_not_decoded(kind, rng):
    side = 16_000 if kind == "webp" else 32_000
    encoded = claiming(rng, side, side, kind)
    tracemalloc.start()
    with pytest.raises(InputError, match=f"a.x claims {side} x {side} pixels, more than the "):
        decode_image(encoded, name="a.x")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert not is_decodable(encoded)


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 1), (np.uint16, 3), (np.uint8, 4)])
def test_a_png_that_holds_nothing_of_what_it_claims_is_damaged(dtype, channels):
    """However even a picture is, it takes more than that."""
    even = np.zeros((1_500, 1_000, channels), dtype)
    encoded = cv2.imencode(".png", even, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()
    assert not holds_less_than_it_claims(encoded)
    assert decode_image(encoded).shape == (1_500, 1_000, 3)
    header = bytearray(encoded[12:29])
    struct.pack_into(">II", header, 4, 4_000, 4_000)
    claims = encoded[:12] + header + struct.pack(">I", zlib.crc32(header)) + encoded[33:]
    assert holds_less_than_it_claims(claims)
    with pytest.raises(InputError, match="cannot be decoded"):
        decode_image(claims)


@pytest.mark.parametrize("reduction", [1, 2, 8])
def test_a_jpeg_that_holds_nothing_of_what_it_claims_is_damaged(reduction, rng):
    encoded = claiming(rng, 4_000, 4_000, "jpg")
    with pytest.raises(InputError, match="cannot be decoded"):
        decode_image(encoded, reduction=reduction)
    assert not is_decodable(encoded)


def test_a_jpeg_that_repeats_its_scans_is_damaged(rng):
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    image = cv2.resize(drawn(rng, 40, 50), (2_000, 1_600))
    encoded = cv2.imencode(".jpg", image, options)[1].tobytes()
    scans = scan_count(encoded)
    assert 5 < scans <= 12
    assert scan_count(jpeg(rng, 40, 50)) == 1
    last = encoded[encoded.rindex(b"\xff\xda") : -2]
    repeated = encoded[:-2] + 90 * last + encoded[-2:]
    assert scan_count(repeated) == scans + 90
    with pytest.raises(InputError, match="cannot be decoded"):
        decode_image(repeated)
    behind = encoded + 90 * b"\xff\xda"  # As a film behind a photo may have it.
    assert scan_count(behind) == scans
    assert decode_image(behind).shape == (1_600, 2_000, 3)


def test_a_jpeg_of_one_colour_is_whole_however_small():
    for progressive in (0, 1):
        options = [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
        encoded = cv2.imencode(".jpg", np.full((2000, 2000), 90, np.uint8), options)[1].tobytes()
        assert decode_image(encoded).shape == (2000, 2000, 3)
        assert is_decodable(encoded)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_transparency_is_laid_over_white_in_parts(dtype, rng, monkeypatch):
    monkeypatch.setattr(decoding, "_AT_ONCE", 100)  # Three rows at a time.
    image = rng.integers(0, np.iinfo(dtype).max, (31, 37, 4), dtype, endpoint=True)
    encoded = cv2.imencode(".png", image)[1].tobytes()
    pixels = (image >> (8 if dtype == np.uint16 else 0)).astype(np.float64)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., 2::-1] * alpha + 255 * (1 - alpha)
    assert np.abs(decode_image(encoded) - expected).max() <= 0.5 + 1e-4


def test_the_limit_can_be_set(rng, monkeypatch):
    encoded = jpeg(rng, 40, 24)
    monkeypatch.setenv("CBAM_JAX_MAX_PIXELS", "960")
    assert decode_image(encoded).shape == (40, 24, 3)
    monkeypatch.setenv("CBAM_JAX_MAX_PIXELS", "959")
    with pytest.raises(InputError, match="claims 24 x 40 pixels, more than the 959"):
        decode_image(encoded)
    monkeypatch.setenv("CBAM_JAX_MAX_PIXELS", "much")
    with pytest.raises(InputError, match="CBAM_JAX_MAX_PIXELS=much: give a number"):
        decode_image(encoded)


def test_what_decoding_holds_is_what_is_allowed_for(tmp_path):
    encoded = zlib.compress(bytes(8 * 1000 * 1000 + 1000))
    header = struct.pack(">IIBBBBB", 1000, 1000, 16, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", encoded), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d))
        for name, d in chunks
    )
    assert decoding.affordable(png, 1000) == 800
    with pytest.raises(InputError, match="1000 x 1000 pixels, more than the 960000 of its kind"):
        check_pixels([(1000, 1000)], "a.png", decoding.affordable(png, 1_200_000))


@pytest.mark.slow
@pytest.mark.skipif(not cost.STATUS.exists(), reason="no account of a process, as Linux has it")
def test_no_kind_of_image_takes_more_memory_than_is_allowed_for(tmp_path):
    script = Path(__file__).with_name("decoding_memory.py")
    lines = subprocess.run(
        [sys.executable, "-W", "ignore", script, tmp_path / "image"],
        capture_output=True, check=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    measured = [json.loads(line) for line in lines]
    assert len(measured) > 35
    assert [one for one in measured if not one.get("held", 99) <= one.get("allowed", 0)] == []


def test_a_decoder_keeps_what_several_scans_hold_parts_of(rng):
    image = np.ascontiguousarray(drawn(rng, 40, 50))
    for options, keeps in (([], False), ([cv2.IMWRITE_JPEG_PROGRESSIVE, 1], True)):
        encoded = cv2.imencode(".jpg", image, options)[1].tobytes()
        assert keeps_coefficients(encoded) == keeps
        scan = encoded.index(b"\xff\xda")
        of_one_colour = encoded[:scan] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + encoded[scan + 14 :]
        assert keeps_coefficients(of_one_colour)
        assert keeps_coefficients(encoded[:scan])


def test_a_frame_and_a_tile_may_be_larger_than_the_image():
    frame = b"!\xf9\4\0\0\0\0\0" + b"," + struct.pack("<HHHH", 0, 0, 60_000, 50_000)
    gif = b"GIF89a" + struct.pack("<HH", 8, 9) + b"\x80\0\0" + bytes(6) + frame
    assert list(claimed_sizes(gif)) == [(9, 8), (50_000, 60_000)]
    tags = [(256, 20), (257, 30), (322, 40_000), (323, 50_000)]
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in tags)
    assert list(claimed_sizes(b"II*\0" + struct.pack("<IH", 8, 4) + listed + bytes(4))) == [
        (30, 20), (50_000, 40_000)
    ]  # fmt: skip


CHUNKS = {"text": (b"tEXt", b"a\0b"), "a profile of another's": (b"iCCP", b"x"),
          "a date that is none": (b"tIME", b"\xff" * 7)}  # fmt: skip


@pytest.mark.parametrize("what", CHUNKS)
def test_what_is_no_pixel_of_a_png_is_passed_over_in_silence(what, rng, capfd):
    name, data = CHUNKS[what]
    image = drawn(rng, 20, 30)
    whole = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    damaged = struct.pack(">I", len(data)) + name + data + b"none"  # Its checksum.
    more = whole[:33] + damaged + whole[33:]
    assert png_of_pixels_alone(more) == png_of_pixels_alone(whole)
    np.testing.assert_array_equal(decode_image(more), image)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [".png", ".webp", ".gif", ".jp2", ".avif", ".ppm", ".bmp"])
def test_decoders_say_nothing_of_a_damaged_image(kind, rng, capfd):
    whole = cv2.imencode(kind, drawn(rng, 40, 50))[1].tobytes()
    for _ in range(40):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        is_decodable(bytes(data[: rng.integers(len(data) // 2, len(data) + 1)]))
    assert capfd.readouterr() == ("", "")
