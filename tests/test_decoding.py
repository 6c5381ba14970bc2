"""Files of many formats against the pixels written, turned and laid over white by hand."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from cbam_jax import InputError
from cbam_jax.datasets import decode_image, decoding, jpeg_size
from cbam_jax.datasets.decoding import is_decodable


def jpeg(rng, height=24, width=20) -> bytes:
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", image)[1].tobytes()


def encode_pil(image, file_format, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def test_decode_image_png_is_exact_and_rgb(rng):
    pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    decoded = decode_image(encode_pil(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(decoded, pixels)


def test_decode_image_jpeg_equals_pillow(rng):
    encoded = jpeg(rng)
    expected = np.asarray(Image.open(io.BytesIO(encoded)))
    np.testing.assert_allclose(decode_image(encoded).astype(int), expected, atol=1)


def test_decode_image_grey_is_repeated(rng):
    pixels = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    decoded = decode_image(encode_pil(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(decoded, np.stack([pixels] * 3, -1))


def test_decode_image_cmyk_equals_pillow(rng):
    image = Image.open(io.BytesIO(jpeg(rng))).convert("CMYK")
    encoded = encode_pil(image, "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_allclose(decode_image(encoded).astype(int), expected, atol=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_image_turns_by_exif(rng, orientation):
    image = Image.open(io.BytesIO(jpeg(rng)))
    exif = Image.Exif()
    exif[274] = orientation
    encoded = encode_pil(image, "JPEG", exif=exif, quality=100, subsampling=0)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))
    np.testing.assert_allclose(decode_image(encoded).astype(int), expected, atol=1)
    assert jpeg_size(encoded) == expected.shape[:2]


def test_jpeg_size_is_that_of_the_decoded_image_or_none(rng):
    encoded = jpeg(rng, 33, 47)
    exif = b"Exif\0\0II*\0" + b"\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"

    def with_segment(body, marker=b"\xff\xe1"):
        return encoded[:2] + marker + (len(body) + 2).to_bytes(2, "big") + body + encoded[2:]

    for changed in (with_segment(exif), with_segment(exif[:10]), with_segment(exif[:22])):
        assert jpeg_size(changed) == decode_image(changed).shape[:2]
    assert jpeg_size(with_segment(b"http://ns.adobe.com/xap", b"\xff\xff\xe1")) == (33, 47)
    for broken in (
        b"",
        encoded[:20],
        encoded[:2] + encoded[3:],
        encode_pil(Image.new("L", (2, 3)), "PNG"),
    ):
        assert jpeg_size(broken) is None


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_decode_image_lays_transparency_over_white(rng, file_format):
    pixels = rng.integers(0, 256, (6, 8, 4), dtype=np.uint8)
    pixels[:, :2, 3] = 0
    image = Image.fromarray(pixels)
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    decoded = decode_image(encode_pil(image, file_format, **options)).astype(int)
    np.testing.assert_allclose(decoded, np.asarray(white)[..., :3], atol=1)
    assert (decoded[:, :2] == 255).all()


def test_decode_image_palette_with_and_without_transparency(rng):
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode_image(encode_pil(image, "PNG")), expected)
    clear = np.asarray(image) == 3
    decoded = decode_image(encode_pil(image, "PNG", transparency=3))
    np.testing.assert_array_equal(decoded, np.where(clear[..., None], 255, expected))


def test_decode_image_reduces_16_bits(rng):
    pixels = rng.integers(0, 1 << 16, (5, 7, 4), dtype=np.uint16)
    pixels[..., 3] = 65535
    encoded = cv2.imencode(".png", pixels)[1].tobytes()
    np.testing.assert_array_equal(decode_image(encoded), pixels[..., 2::-1] >> 8)


def test_decode_image_says_which_image_and_what_to_do(rng):
    encoded = jpeg(rng)
    for broken in (b"", b"not an image", encoded[: len(encoded) // 2], encoded[:-8]):
        assert not is_decodable(broken)
        with pytest.raises(InputError, match=r"^hat\.jpg cannot be decoded .*leave it out$"):
            decode_image(broken, name="hat.jpg")
    assert is_decodable(encoded)
    tiny = cv2.imencode(".png", rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))[1].tobytes()
    assert is_decodable(tiny)


# Every format by one rule: what it is saved with, and by how much its pixels then differ.
FORMATS = {
    "PNG": ({}, 0),
    "WEBP": ({"lossless": True, "exact": True}, 0),
    "TIFF": ({}, 0),
    "JPEG2000": ({}, 0),
    "AVIF": ({"quality": 100, "subsampling": "4:4:4"}, 4),
}


def patches(rng, channels) -> np.ndarray:
    """Random pixels of 24 x 32 in patches of 8 x 8, which lossy formats keep, none like another."""
    return np.kron(rng.integers(0, 256, (3, 4, channels), np.uint8), np.ones((8, 8, 1), np.uint8))


def turned(pixels, orientation):
    """As EXIF means it: 2 is mirrored, 3 turned by half, 5 transposed, 6 turned right."""
    columns, rows = pixels[:, ::-1], pixels[::-1]
    return {
        1: pixels,
        2: columns,
        3: columns[::-1],
        4: rows,
        5: pixels.swapaxes(0, 1),
        6: rows.swapaxes(0, 1),
        7: columns[::-1].swapaxes(0, 1),
        8: columns.swapaxes(0, 1),
    }[orientation]


def over_white(pixels):
    color, alpha = pixels[..., :3].astype(np.float64), pixels[..., 3:] / 255
    return color * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_is_laid_over_white(rng, file_format):
    options, tolerance = FORMATS[file_format]
    pixels = patches(rng, 4)
    pixels[:8, :, 3], pixels[8:16, :, 3] = 0, 255  # below that a random alpha
    decoded = decode_image(encode_pil(Image.fromarray(pixels), file_format, **options))
    np.testing.assert_allclose(decoded, over_white(pixels), atol=tolerance + 0.51)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_every_format_is_turned_by_exif(rng, file_format, orientation, channels):
    options, tolerance = FORMATS[file_format]
    pixels = patches(rng, channels)
    exif = Image.Exif()
    exif[274] = orientation
    encoded = encode_pil(Image.fromarray(pixels), file_format, exif=exif, **options)
    expected = turned(over_white(pixels) if channels == 4 else pixels, orientation)
    np.testing.assert_allclose(decode_image(encoded), expected, atol=tolerance + 0.51)


@pytest.mark.parametrize(("mode", "clear"), [("RGB", (9, 80, 7)), ("L", 80), ("1", 0)])
def test_a_png_without_alpha_may_name_a_transparent_colour(mode, clear):
    image = Image.new(mode, (6, 4), 255 if mode == "1" else clear)
    image.putpixel((2, 1), 0 if mode == "1" else (1, 2, 3) if mode == "RGB" else 5)
    decoded = decode_image(encode_pil(image, "PNG", transparency=clear))
    expected = np.full((4, 6, 3), 255)
    if mode != "1":
        expected[1, 2] = (1, 2, 3) if mode == "RGB" else 5
    np.testing.assert_array_equal(decoded, expected)


def test_a_gifs_hidden_colour_is_not_seen():
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 250, 10, 20, 30, 40, 50])
    image.putpixel((2, 1), 2)
    expected = np.full((4, 6, 3), 255)
    expected[1, 2] = (30, 40, 50)
    decoded = decode_image(encode_pil(image, "GIF", transparency=1, optimize=False))
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("file_format", [*FORMATS, "GIF", "BMP"])
def test_what_is_cut_off_is_refused_in_every_format(rng, file_format):
    pixels = patches(rng, 3 if file_format == "BMP" else 4)
    encoded = encode_pil(Image.fromarray(pixels), file_format, **FORMATS.get(file_format, ({},))[0])
    assert is_decodable(encoded)
    for end in (-9, len(encoded) // 2, len(encoded) // 10):
        assert not is_decodable(encoded[:end]), end


def test_cmyk_and_deep_images_of_rare_formats(rng):
    pixels = rng.integers(0, 1 << 16, (5, 7), np.uint16)
    for suffix in (".png", ".tiff"):
        decoded = decode_image(cv2.imencode(suffix, pixels)[1].tobytes())
        np.testing.assert_allclose(decoded, np.repeat(pixels[..., None] / 257, 3, -1), atol=1)
    inks = Image.fromarray(rng.integers(0, 256, (5, 7, 4), np.uint8), "CMYK")
    light = 255 - np.asarray(inks).astype(int)
    decoded = decode_image(encode_pil(inks, "TIFF"))
    np.testing.assert_allclose(decoded, light[..., :3] * light[..., 3:] / 255, atol=1)


def test_heic_is_read_or_named_with_the_remedy(rng, monkeypatch):
    heic = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(60)
    assert decoding.image_format(heic) == "HEIC"
    monkeypatch.setattr(decoding, "_reads_heic", lambda: False)
    with pytest.raises(InputError, match=r"^a\.jpg is HEIC, .*pip install 'cbam_jax\[heic\]'$"):
        decode_image(heic, name="a.jpg")
    monkeypatch.undo()
    heif = pytest.importorskip("pillow_heif")
    pixels = patches(rng, 4)
    buffer = io.BytesIO()
    heif.from_pillow(Image.fromarray(pixels)).save(buffer, quality=-1)
    np.testing.assert_allclose(decode_image(buffer.getvalue()), over_white(pixels), atol=12)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif", "AVIF"),  # its compatible brands tell
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", None),  # a film
        (b"P6\n12 10\n255\n", "PNM"),
        (b"P7\nWIDTH 12\n", "PNM"),
        (b"#?RADIANCE\n", "Radiance"),
        (b"#!/bin/sh\n", None),
        (b"\x59\xa6\x6a\x95\0\0\0\x0c", "Sun raster"),
        (b"RIFF\x24\0\0\0WAVEfmt ", None),
        (b"", None),
    ],
)
def test_the_format_is_told_by_the_first_bytes(head, expected):
    assert decoding.image_format(head) == expected


def is_cut_off(encoded):
    return decoding.is_cut_off(io.BytesIO(encoded))


def test_a_file_that_goes_on_behind_its_end_is_looked_into(rng):
    whole = jpeg(rng)
    assert is_cut_off(whole) is False
    assert is_cut_off(whole[:-9]) is None
    film = whole + b"\0\0\0\x18ftypmp42" + bytes(80)  # as phones add one to a photo
    assert is_cut_off(film) is None
    assert is_decodable(film)


@pytest.mark.parametrize("file_format", ["WEBP", "BMP", "AVIF", "PNG", "GIF"])
def test_half_copied_files_are_told_by_their_ends(rng, file_format):
    options = {"quality": 90} if file_format == "AVIF" else {}
    encoded = encode_pil(Image.fromarray(patches(rng, 3)), file_format, **options)
    assert is_cut_off(encoded) is False
    for end in (-1, len(encoded) // 2):
        # None where something else may be meant: such a file is decoded.
        expected = None if file_format in ("PNG", "GIF") else True
        assert is_cut_off(encoded[:end]) is expected
