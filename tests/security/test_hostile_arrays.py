"""Archives of arrays: prepared galleries, embeddings to compare or to measure on, a check."""

import io
import json
import os
import random
import zipfile

import numpy as np
import pytest
from cost import cheap  # noqa: F401, all is measured

from cbam_jax import InputError
from cbam_jax.benchmark.galleries import of_file
from cbam_jax.foreign_files import read_arrays
from cbam_jax.loss_comparison import read_embeddings, read_kept
from cbam_jax.search import load_prepared, prepare, prepared_files, save_prepared
from cbam_jax.trec import read_qrels, read_run


def written(shape, dtype, content=b"", header=b"\x93NUMPY\x01\x00"):
    """A ``.npy`` whose header may say what its content is not."""
    file = io.BytesIO()
    fields = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return header + file.getvalue()[8:] + content


def archive(content, name="x.npy", kind=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as members:
        members.writestr(name, content)
    return file.getvalue()


def encrypted():
    content = bytearray(archive(written((2,), "<f4", bytes(8))))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


# What is in the place of an archive, and a part of the line that refuses it.
ARRAYS = {
    "an empty file of arrays": (b"", "not a zip file"),
    "arrays cut off": (archive(written((2,), "<f4", bytes(8)))[:90], "not a zip file"),
    "arrays that are packed": (
        archive(written((1 << 24,), "<f4", bytes(1 << 26)), kind=zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "an array of 256 GiB": (archive(written((1 << 36,), "<f4", bytes(8))), "larger than its part"),
    "an array of nothing, 2**60 times": (archive(written((1 << 60,), "|V0")), "larger than its"),
    "an array with less than nothing": (archive(written((-4,), "<f4", bytes(8))), "."),
    "an array cut off in an archive": (archive(written((2,), "<f4", bytes(4))), "expected 8 bytes"),
    "an array of objects": (archive(written((2,), "|O", bytes(16))), "Object arrays|allow_pickle"),
    "an array's header nested deep": (
        archive(b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000),
        ".",
    ),
    "an array of a format to come": (
        archive(written((2,), "<f4", bytes(8), b"\x93NUMPY\x09\x00")),
        r"\(9, 0\)",
    ),
    "an array that is a text": (archive(b"abc"), "."),
    "arrays that are encrypted": (encrypted(), "encrypted"),
}  # fmt: skip


@pytest.fixture
def put(tmp_path):
    def put(content):
        path = tmp_path / "x.npz"
        path.write_bytes(content)
        return path

    return put


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name, put):
    content, words = ARRAYS[name]
    path = put(content)
    with pytest.raises(ValueError, match=words):
        read_arrays(path)
    with pytest.raises(InputError, match="is no embeddings.npz of evaluate.py"):
        read_embeddings(path)
    with pytest.raises(InputError, match="no embeddings: give|it is compressed: write it anew"):
        of_file(str(path), None)
    with pytest.raises(ValueError, match="is damaged: save_prepared writes it anew"):
        load_prepared(path, np.zeros((2, 2), np.float32))


def test_arrays_come_back_as_numpy_has_them(rng, tmp_path):
    arrays = {
        "numbers": rng.normal(size=(3, 4)),
        "texts": np.array(["x", "yz"]),
        "other": np.array(5, ">i2"),
        "none": np.zeros((0, 7), np.float16),
        "columns": np.asfortranarray(np.ones((2, 3), bool)),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    found = read_arrays(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as expected:
        assert list(found) == expected.files
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name])
            assert array.dtype == expected[name].dtype


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for read in (
        read_embeddings,
        lambda path: load_prepared(path, np.zeros((2, 2), np.float32)),
        lambda path: read_kept(path, {}),
        read_run,
        read_qrels,
    ):
        with pytest.raises(InputError, match="a pipe, not a regular file"):
            read(path)
    with pytest.raises(InputError, match="no embeddings: give|it is compressed: write it anew"):
        of_file(str(path), None)


@pytest.mark.parametrize("array", [np.array([[1j]]), np.array([["a"]]), np.array([[None]])])
def test_embeddings_that_are_no_numbers(array, tmp_path):
    np.savez(tmp_path / "x.npz", embedding=array, label=np.array([0]))
    with pytest.raises(InputError, match="--embeddings="):
        read_embeddings(tmp_path / "x.npz")
    with pytest.raises(InputError, match="no embeddings: give|it is compressed: write it anew"):
        of_file(str(tmp_path / "x.npz"), None)


@pytest.mark.parametrize("text", ["[]", "{}", "[" * 100_000, '{"settings": {}}', "\ud800"])
def test_kept_trials_that_are_damaged(text, tmp_path):
    path = tmp_path / "triplet.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match="is damaged: delete it"):
        read_kept(path, {})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    gallery = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    path = tmp_path_factory.mktemp("prepared") / "gallery"
    save_prepared(path, prepare(gallery, first_pass="bfloat16"))
    return gallery, path.read_bytes()


def damages(whole, count):
    """Copies with a changed bit or a hole, which leaves parts that begin before the file does."""
    draw = random.Random(0)
    for number in range(count):
        content = bytearray(whole)
        place = draw.randrange(len(content))
        if number % 2:
            del content[place : place + draw.choice((1, 16, 200))]
        else:
            content[place] ^= 1 << draw.randrange(8)
        yield bytes(content)


def test_damages_of_a_prepared_gallery_are_noticed(prepared, put):
    gallery, whole = prepared
    expected, noticed = load_prepared(put(whole), gallery), 0
    for content in damages(whole, 100):
        path = put(content)
        try:
            kept = load_prepared(path, gallery)
        except ValueError as error:
            noticed += f"{path} is damaged: save_prepared writes it anew" == str(error)
            continue
        # Bytes that mean nothing, such as a member's time.
        noticed += kept.preparation == expected.preparation
        np.testing.assert_array_equal(kept.sides[0].rows, expected.sides[0].rows)
        np.testing.assert_array_equal(kept.sides[0].squares, expected.sides[0].squares)
    assert noticed == 100


def test_a_prepared_gallery_of_fewer_rows(prepared, put):
    gallery, whole = prepared
    arrays = read_arrays(put(whole))
    about = json.loads(arrays.pop("about").item())
    arrays["share"] = arrays["share"][:-1]
    about["content"] = {name: prepared_files._digest([array]) for name, array in arrays.items()}
    file = io.BytesIO()
    np.savez(file, about=np.array(json.dumps(about)), **arrays)
    with pytest.raises(ValueError, match="is damaged"):
        load_prepared(put(file.getvalue()), gallery)
