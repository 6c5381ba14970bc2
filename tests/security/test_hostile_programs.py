"""Folders of programs that someone damaged, or made to do harm."""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from cost import cheap  # noqa: F401, all is measured
from test_hostile_models import sparse

from cbam_jax import InputError
from cbam_jax.export import contract, load

pytest.importorskip("flatbuffers", reason="programs are written and read by it")

GOLDEN = Path(__file__).parent.parent / "golden" / "program_1"
DOCUMENT = json.loads((GOLDEN / "contract.json").read_text())
WEIGHTS = safetensors.numpy.load_file(GOLDEN / "weights.safetensors")
PROGRAM, CHECK = "program.cpu.stablehlo", "check.npz"


def changed(field, value, *, seal=True):
    """The contract with another value, and its own checksum unless the damage is to be seen."""
    document = json.loads(json.dumps(DOCUMENT))
    *path, last = field.split("/")
    place = document
    for name in path:
        place = place[name]
    place[last] = value
    if seal:
        document["checksum"] = contract.checksum(document)
    return {"contract.json": json.dumps(document).encode()}


def replaced(name, data):
    """A file in another's place, which the contract vouches for."""
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {name: data, **changed(f"files/{name}", entry)}


def reaching(call):
    """A program that calls what is not its own."""

    def program(weights, images):
        return call(jnp.zeros((images.shape[0], 16)) + sum(w.sum() for w in weights.values()))

    (batch,) = jax.export.symbolic_shape("b")
    shapes = {n: jax.ShapeDtypeStruct(w.shape, w.dtype) for n, w in WEIGHTS.items()}
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.uint8)
    checks = [jax.export.DisabledSafetyCheck.custom_call("run_me")]
    with jax.numpy_rank_promotion("allow"):
        exported = jax.export.export(jax.jit(program), platforms=["cpu"], disabled_checks=checks)(
            shapes, images
        )
    return bytes(exported.serialize())


def custom(x):
    return jax.ffi.ffi_call("run_me", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def other_weights():
    arrays = WEIGHTS | {"projection.bias": np.zeros(17, np.float32)}
    return replaced("weights.safetensors", safetensors.numpy.save(arrays))


def named(name):
    arrays = dict(WEIGHTS)
    arrays[name] = arrays.pop("projection.bias")
    return replaced("weights.safetensors", safetensors.numpy.save(arrays))


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return replaced(CHECK, file.getvalue())


OBJECTS = np.array([{}], object)
OTHER = "of other weights or images than contract.json tells of"
PROGRAMS = {
    "an empty contract": (lambda: {"contract.json": b""}, "contract.json is damaged"),
    "a contract that is a list": (lambda: {"contract.json": b"[]"}, "it is no object"),
    "a contract nested 100,000 deep": (
        lambda: {"contract.json": b'{"to":' * 100_000},
        "nested too deeply",
    ),
    "a contract of 2 MB": (lambda: {"contract.json": bytes(2 << 20)}, "has 2097152 bytes"),
    "a contract without a version": (lambda: changed("format_version", None), "is None"),
    "a contract to come": (lambda: changed("format_version", 2), "has format 2, .*upgrade"),
    "a contract of a model to come": (lambda: changed("to", 3), "to is 3"),
    "a contract of no files": (lambda: changed("files", []), "files is \\[\\]"),
    "a program of 10**9 pixels": (
        lambda: changed("preprocessing/image_size", 10**9),
        "image_size 1000000000",
    ),
    "a program of a mean of text": (
        lambda: changed("preprocessing/mean", ["a", 1, 1]),
        "could not convert string",
    ),
    "a program of no numbers": (lambda: changed("embedding_dim", 0), "embedding_dim is 0"),
    "a program of a dtype to come": (lambda: changed("model/dtype", "os"), "the dtype 'os'"),
    "a program elsewhere": (
        lambda: changed("programs/cpu", "../../program.cpu.stablehlo"),
        "programs names 'cpu': '../../program",
    ),
    "a program for another platform": (
        lambda: changed("programs", {"tpu": "program.tpu.stablehlo"}),
        "none for cpu: export it again with --platforms=cpu",
    ),
    "a changed contract": (lambda: changed("license", "MIT", seal=False), "its checksum differs"),
    "a changed program": (lambda: {PROGRAM: b"x" * 12872}, "is damaged"),
    "a program cut off": (lambda: {PROGRAM: b"x"}, "it is not the file"),
    "changed weights": (lambda: {"weights.safetensors": bytes(8904)}, "it is not the file"),
    "a program that is none": (
        lambda: replaced(PROGRAM, b"StableHLO"),
        "exported with jax .* cannot read it",
    ),
    "a program of nothing": (lambda: replaced(PROGRAM, b""), "exported with jax"),
    "a program without a size": (
        lambda: changed(f"files/{PROGRAM}", {"bytes": "many"}),
        "files has no size and hash of program.cpu.stablehlo",
    ),
    "a program that calls": (
        lambda: replaced(PROGRAM, reaching(custom)),
        "has a program that calls run_me, not computation alone",
    ),
    "weights that are none": (
        lambda: replaced("weights.safetensors", bytes(100)),
        "weights.safetensors: damaged",
    ),
    "weights of another shape": (other_weights, OTHER),
    "weights named as a method": (lambda: named("preprocess"), OTHER),
    "a check of objects": (lambda: npz(images=OBJECTS, embeddings=OBJECTS), "check.npz is damaged"),
    "a check of nothing": (lambda: npz(images=np.zeros(3)), "check.npz is damaged"),
    "a check that is none": (lambda: replaced(CHECK, b"PK"), "check.npz is damaged"),
    "a program of a terabyte of nothing": (
        lambda: {**changed(f"files/{PROGRAM}/bytes", 1 << 40), PROGRAM: sparse},
        "has 1099511627776 bytes",
    ),
    "a pipe for weights of a program": (
        lambda: {"weights.safetensors": os.mkfifo},
        "is a pipe, not a regular file",
    ),
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_a_program_is_refused_in_one_line(what, tmp_path):
    make, message = PROGRAMS[what]
    folder = tmp_path / "program"
    shutil.copytree(GOLDEN, folder)
    for name, data in make().items():
        (folder / name).unlink()
        data(folder / name) if callable(data) else (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load(folder, check=True)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


def test_a_folder_that_is_no_program_is_told(tmp_path):
    with pytest.raises(InputError, match=r"contract.json is missing: .*\(empty\) is no program"):
        load(tmp_path)


def test_each_damaged_byte_of_a_contract_is_noticed(tmp_path, rng):
    whole = (GOLDEN / "contract.json").read_bytes()
    for place in range(0, len(whole), 11):
        data = bytearray(whole)
        data[place] ^= 1 << rng.integers(8)
        (tmp_path / "contract.json").write_bytes(data)
        try:
            assert contract.read(tmp_path) == DOCUMENT  # White space.
        except InputError:
            continue
