"""Vision transformers against golden outputs of the libraries that publish them."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden.make_vit import GOLDEN, SIDES, VARIANTS, images, parameter
from tiny_run import drawn_model

import cbam_jax
from cbam_jax import InputError, gradcam, hub, optimizers, steps
from cbam_jax.backbones.vit import VisionTransformer, resize_matrix
from cbam_jax.backbones.vit_published import PUBLISHED, published_name
from cbam_jax.losses import triplet_loss
from cbam_jax.models import create_model
from cbam_jax.pretrained import describe, load_pretrained

SLOW = pytest.mark.slow
FILE = Path(__file__).parent / "golden" / "vit.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as file:
        return dict(file)


def their_arrays(golden, name):
    """A library's tensors, drawn again by the names and shapes in the file."""
    arrays = {}
    for line in golden[f"{name}/names"]:
        key, _, shape = str(line).partition(" ")
        arrays[key] = parameter(key, tuple(json.loads(shape)))
    return arrays


def loaded(name, arrays):
    model = nnx.eval_shape(lambda: VisionTransformer(VARIANTS[name], rngs=nnx.Rngs(0)))
    assert not load_pretrained(model, arrays).fresh
    return model


@pytest.mark.parametrize(
    "name",
    [n if n in ("hf_siglip", "hf_dinov3") else pytest.param(n, marks=SLOW) for n in GOLDEN],
)
def test_tokens_and_embedding_of_other_libraries(name, golden):
    graph, state = nnx.split(loaded(name, their_arrays(golden, name)))

    @jax.jit
    def run(state, pixels):
        model = nnx.merge(graph, state)
        return model.tokens(pixels), model(pixels)

    height, width = SIDES[1]
    tokens, embedding = map(np.asarray, run(state, images(height, width)))
    found = {"embedding": embedding, "tokens": tokens[:, :7]}
    for part, ours in found.items():
        key = f"{name}/{height}x{width}/{part}"
        if key in golden:
            scale = np.abs(golden[key]).max()
            np.testing.assert_allclose(ours / scale, golden[key] / scale, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bicubic_antialias"])
def test_a_position_embedding_stretched_to_its_own_size_is_itself(interpolation):
    np.testing.assert_allclose(resize_matrix(5, 5, interpolation), np.eye(5), atol=1e-12)


def test_antialias_is_jaxs_and_shows_where_there_are_fewer_patches(rng):
    row = rng.normal(size=9).astype(np.float32)
    ours = resize_matrix(9, 4, "bicubic_antialias") @ row
    np.testing.assert_allclose(ours, jax.image.resize(row, (4,), "cubic"), atol=1e-5)
    assert np.abs(resize_matrix(9, 4, "bicubic") @ row - ours).max() > 1e-2


def test_what_does_not_fit_is_told_by_ranges(golden):
    arrays = their_arrays(golden, "hf_siglip")
    for i in range(2):
        del arrays[f"encoder.layers.{i}.self_attn.k_proj.weight"]
    arrays["stray.0.weight"] = np.ones(2, np.float32)
    with pytest.raises(InputError) as error:
        loaded("hf_siglip", arrays)
    assert "missing: blocks.0..1.attn.qkv.weight" in str(error.value)
    assert "unexpected: stray.0.weight" in str(error.value)
    assert "unexpected: blocks.0..1.attn.v.weight" in str(error.value)
    assert "unexpected: stray.0.weight" in str(error.value)
    assert len(str(error.value).splitlines()) < 8


@pytest.mark.parametrize("lost", [[1], [0, 1]])
def test_a_wholly_missing_block_is_one_line(lost, golden):
    arrays = their_arrays(golden, "hf_siglip")
    for name in list(arrays):
        if any(f".layers.{i}." in name for i in lost):
            arrays[name.replace("layers", "strange")] = arrays.pop(name)
    with pytest.raises(InputError) as error:
        loaded("hf_siglip", arrays)
    span, each = ("0..1", " each") if len(lost) > 1 else ("1", "")
    first, *lines = str(error.value).splitlines()
    assert f"({12 * len(lost)} missing, {16 * len(lost)} unexpected)" in first
    assert lines == [
        f"  missing: blocks.{span}.*: 12 keys{each}",
        f"  unexpected: encoder.strange.{span}.*: 16 keys{each}",
    ]


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "module.", "vision_model."])
def test_a_prefix_of_all_names_is_no_part_of_them(prefix, golden):
    arrays = their_arrays(golden, "hf_siglip")
    plain = loaded("hf_siglip", arrays)
    model = loaded("hf_siglip", {prefix + name: array for name, array in arrays.items()})
    jax.tree.map(np.testing.assert_array_equal, nnx.state(plain), nnx.state(model))


def test_the_tower_for_text_is_left_over(golden):
    arrays = their_arrays(golden, "hf_siglip")
    whole = {f"vision_model.{name}": array for name, array in arrays.items()}
    whole |= {f"text_model.{name}": 2 * array for name, array in arrays.items()}
    whole["logit_scale"] = np.float32(3)
    plain, model = loaded("hf_siglip", arrays), loaded("hf_siglip", whole)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(plain), nnx.state(model))


# Folders as other libraries write them, of the tiny model.


_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
    "image_size": 32, "intermediate_size": 64,
}  # fmt: skip


def write_folder(folder, arrays, config, preprocessor=None, name="config.json"):
    import safetensors.numpy

    folder.mkdir(exist_ok=True)
    arrays = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    (folder / name).write_text(json.dumps(config))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture
def siglip_folder(tmp_path, golden):
    arrays = {f"vision_model.{k}": a for k, a in their_arrays(golden, "hf_siglip").items()}
    config = {"model_type": "siglip", "text_config": {}, "architectures": ["SiglipModel"]}
    config["vision_config"] = {"model_type": "siglip_vision_model", **_VISION}
    half = [0.5, 0.5, 0.5]
    cut = {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": half}
    return write_folder(tmp_path / "siglip", arrays, config, cut | {"image_std": half})


def _changed(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_how_photos_are_cut_is_read_from_what_transformers_5_writes(siglip_folder):
    expected = describe(siglip_folder)
    path = siglip_folder / "preprocessor_config.json"
    whole = {"processor_class": "SiglipProcessor", "image_processor": json.loads(path.read_text())}
    path.unlink()
    (siglip_folder / "processor_config.json").write_text(json.dumps(whole))
    assert describe(siglip_folder) == expected
    (siglip_folder / "processor_config.json").write_text('{"processor_class": "SiglipProcessor"}')
    with pytest.raises(InputError, match="nor a processor_config.json with an image_processor"):
        describe(siglip_folder)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"do_normalize": False}, "do_normalize is false"),
        ({"do_rescale": False}, "do_rescale is false"),
        ({"do_resize": False}, "do_resize is false"),
        ({"size": {"height": 40, "width": 40}, "crop_size": 32}, "squashed to 40 and cut to 32"),
        ({"resample": 1}, "resample 1: 2"),
    ],
)
def test_preparing_photos_in_another_way_is_refused_by_its_name(siglip_folder, fields, told):
    _changed(siglip_folder / "preprocessor_config.json", **fields)
    with pytest.raises(InputError, match=told):
        describe(siglip_folder)


def test_a_whole_clips_projection_is_its_own_not_its_towers_default(siglip_folder):
    tower = {"model_type": "clip_vision_model", **_VISION, "projection_dim": 512}
    config = {"model_type": "clip", "projection_dim": 24, "vision_config": tower}
    (siglip_folder / "config.json").write_text(json.dumps(config))
    variant = describe(siglip_folder).variant
    assert variant.projection == 24


@SLOW
def test_a_folder_of_transformers_embeds_as_it_is(siglip_folder, golden, rng):
    embedder = cbam_jax.load(siglip_folder)
    assert embedder.model.backbone.variant == VARIANTS["hf_siglip"]
    assert embedder.preprocessing.resize == "squash"
    assert embedder.preprocessing.interpolation == "bicubic"
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    model = loaded("hf_siglip", their_arrays(golden, "hf_siglip"))
    expected = model(jnp.asarray(image[None] / np.float32(127.5) - np.float32(1)))[0]
    np.testing.assert_allclose(embedder.embed_images([image])[0], expected, rtol=1e-4, atol=1e-5)


def test_what_is_saved_of_such_a_folder_is_the_same_model(siglip_folder, tmp_path):
    model, document = hub.from_pretrained(siglip_folder)
    parts = {"config": document["model"], "preprocessing": document["preprocessing"]}
    hub.save_pretrained(model, tmp_path / "ours", **parts)
    again, found = hub.from_pretrained(tmp_path / "ours")
    assert found["preprocessing"] == json.loads(json.dumps(document["preprocessing"]))
    assert again.backbone.variant == model.backbone.variant
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_open_clips_files_say_which_gelu(tmp_path, golden):
    vision = {"width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 2, "patch_size": 8}
    model = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision | {"image_size": 32}}
    cut = {"resize_mode": "squash", "interpolation": "bicubic", "mean": [0.5] * 3}
    config = {"model_cfg": model, "preprocess_cfg": cut | {"std": [0.5] * 3}}
    arrays = their_arrays(golden, "open_clip")
    folder = write_folder(tmp_path / "clip", arrays, config, name="open_clip_config.json")
    description = describe(folder)
    assert description.variant == VARIANTS["open_clip"]
    assert description.preprocessing.resize == "squash"
    del config["model_cfg"]["quick_gelu"]
    write_folder(folder, arrays, config, name="open_clip_config.json")
    assert describe(folder).variant.activation == "gelu"
    built, _ = hub.from_pretrained(folder)
    np.testing.assert_array_equal(built.backbone.proj.kernel[...], arrays["visual.proj"])


def test_timms_files_say_the_architecture(tmp_path):
    cut = {"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9}
    cut |= {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "center"}
    config = {"architecture": "vit_base_patch16_siglip_224", "pretrained_cfg": cut}
    (tmp_path / "config.json").write_text(json.dumps(config))
    description = describe(tmp_path)
    assert description.variant == PUBLISHED["marqo_fashion_siglip"].variant
    assert description.preprocessing.short_side == 248  # Of 224 / 0.9, what timm keeps.


def test_weights_without_files_beside_them_are_asked_about(siglip_folder):
    (siglip_folder / "config.json").unlink()
    with pytest.raises(
        InputError, match="no config.json.*which says what the model is: its shape, GELU"
    ) as error:
        cbam_jax.load(siglip_folder)
    assert "--config" not in str(error.value)


@pytest.mark.parametrize(("config", "told"), [
    ({"model_type": "vit", "hidden_act": "gelu"}, "of transformers' 'vit', .*: clip, clip_v.* are"),
    ({"architecture": "resnet50"}, "of timm's 'resnet50', .*: its vit_ of SigLIP.* are"),
])  # fmt: skip
def test_a_model_of_another_kind_is_told_by_its_kind(config, told, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=told) as error:
        cbam_jax.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_folder_without_weights_is_told_what_it_has(siglip_folder, tmp_path):
    (siglip_folder / "model.safetensors").rename(siglip_folder / "weights.gguf")
    with pytest.raises(InputError, match=r"'weights.gguf'\]\) has no weights that") as error:
        cbam_jax.load(siglip_folder)
    assert "those are model.safetensors, " in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty \(empty\) is neither the workdir of a run"):
        cbam_jax.load(tmp_path / "empty")


def test_another_gelu_than_the_folders_is_refused(siglip_folder):
    model = nnx.eval_shape(lambda: VisionTransformer(VARIANTS["timm_siglip"], rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="--config.model.activation=gelu_tanh"):
        load_pretrained(model, siglip_folder)


def test_a_pointer_of_git_lfs_is_told(siglip_folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (siglip_folder / "model.safetensors").write_text(pointer)
    with pytest.raises(InputError, match="Git LFS pointer.*git lfs pull"):
        cbam_jax.load(siglip_folder)


def split_in_shards(folder):
    """As transformers saves large models; returns the index."""
    import safetensors.numpy

    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(arrays), {}
    for i in range(3):
        shard = f"model-{i + 1:05}-of-00003.safetensors"
        part = {name: arrays[name] for name in names[i::3]}
        safetensors.numpy.save_file(part, folder / shard)
        places |= dict.fromkeys(part, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_weights_in_several_files_are_those_in_one(siglip_folder):
    whole = hub.from_pretrained(siglip_folder)[0]
    index = split_in_shards(siglip_folder)
    parts = hub.from_pretrained(siglip_folder)[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(whole), nnx.state(parts))
    assert not load_pretrained(whole, index).fresh


@pytest.mark.parametrize("problem", ["missing", "other", "outside", "no map", "too few"])
def test_files_that_do_not_fit_their_index_are_refused_in_one_line(problem, siglip_folder):
    index = split_in_shards(siglip_folder)
    document = json.loads(index.read_text())
    places, second = document["weight_map"], "model-00002-of-00003.safetensors"
    if problem == "missing":
        (siglip_folder / second).unlink()
    if problem == "other":
        (siglip_folder / second).write_bytes(
            (siglip_folder / "model-00001-of-00003.safetensors").read_bytes()
        )
    if problem == "outside":
        places[min(places)] = f"../siglip/{second}"
    if problem == "no map":
        document["weight_map"] = [second]
    if problem == "too few":
        del places[min(places)]
    index.write_text(json.dumps(document))
    expected = {
        "missing": "no weights at .*00002-of-00003.safetensors",
        "other": "00002-of-00003.safetensors and model.safetensors.index.json disagree on vision",
        "too few": "00001-of-00003.safetensors and model.safetensors.index.json disagree on vision",
    }
    with pytest.raises(InputError, match=expected.get(problem, "index.json is damaged")) as error:
        cbam_jax.load(siglip_folder)
    assert len(str(error.value).splitlines()) == 1


def test_of_dinos_training_the_teacher_is_taken(golden):
    arrays = their_arrays(golden, "hf_dinov2")
    teacher = {f"backbone.{name}": array for name, array in arrays.items()}
    student = {name: 2 * array for name, array in teacher.items()}
    teacher["dino_head.mlp.0.weight"] = np.ones((2, 2), np.float32)
    plain = loaded("hf_dinov2", arrays)
    model = loaded("hf_dinov2", {"student": student, "teacher": teacher, "iteration": 3})
    jax.tree.map(np.testing.assert_array_equal, nnx.state(plain), nnx.state(model))


def test_marqos_models_are_known_by_name(monkeypatch):
    asked = []

    def fetch(source, revision=None):
        asked.append(source)
        raise InputError("no network")

    monkeypatch.setattr(hub, "fetch_repository", fetch)
    for name in ("Marqo-FashionSigLIP", "marqo_fashion_clip", "hf:a/b"):
        with pytest.raises(InputError, match="no network"):
            cbam_jax.load(name)
    assert asked == ["Marqo/marqo-fashionSigLIP", "Marqo/marqo-fashionCLIP", "hf:a/b"]
    assert published_name("facebook") is None


# They are models like any other.


FIELDS = {
    "width": 32, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32, "mlp_width": 48,
    "activation": "gelu", "epsilon": 1e-6, "interpolation": "bicubic", "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
}  # fmt: skip


class Scaled(nnx.Module):
    """Stands in the token grid's place: each patch's token times a number of its own."""

    def __init__(self, factors):
        self.factors = nnx.data(jnp.asarray(factors, jnp.float32)[..., None])

    def __call__(self, x):
        return x * self.factors


@SLOW
@pytest.mark.parametrize("name", ["hf_siglip", "hf_dinov2"])
def test_heat_is_on_the_grid_of_tokens(name, golden, rng):
    model = loaded(name, their_arrays(golden, name))
    pixels = jnp.asarray(rng.normal(size=(1, 40, 56, 3)), jnp.float32)
    maps = gradcam.grad_cam(model, pixels, layer="grid", method="hires_cam")
    assert maps.raw.shape == (1, 5, 7)
    assert not maps.empty[0]
    # A token times its gradient is what the target rises by as the token alone is scaled up.
    step = 0.01 * np.eye(35, dtype=np.float32).reshape(35, 5, 7)
    model.grid = Scaled(1 + np.concatenate([step, -step]))
    embed = jax.jit(lambda images: model(jnp.repeat(images, 70, axis=0)))
    energy = np.square(np.asarray(embed(pixels), np.float64)).sum(1) / 2
    slopes = ((energy[:35] - energy[35:]) / 0.02).reshape(5, 7)
    np.testing.assert_allclose(maps.raw[0], slopes, atol=0.01 * np.abs(slopes).max())
    assert maps.heat[0].max() == pytest.approx(1)
    path = gradcam.find_layer(
        nnx.eval_shape(lambda: create_model("vit", transformer=FIELDS, rngs=nnx.Rngs(0))),
        "backbone",
    )
    assert path == ("backbone", "grid")


@pytest.mark.slow
def test_blocks_learn_slower_towards_the_images_and_frozen_ones_not():
    tiny = drawn_model(lambda: create_model("vit", transformer=FIELDS, rngs=nnx.Rngs(0)))
    params = nnx.state(tiny, nnx.Param)
    rates = dict(
        nnx.to_flat_state(optimizers.block_rates(params, layer_decay=0.5, frozen_blocks=0))
    )
    found = {".".join(map(str, path[1:3])): rate for path, rate in rates.items()}
    assert found["blocks.1"] == found["norm.scale"] == 1.0
    assert (found["blocks.0"], found["pos_embed"], found["patch_embed.kernel"]) == (0.5, 0.25, 0.25)
    optimizer = steps.create_optimizer("sgd", 0.1, weight_decay=0.1, frozen_blocks=1)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.ones_like, params), optimizer.init(params), params
    )
    new = optax.apply_updates(params, updates)
    for (path, before), (_, after) in zip(
        nnx.to_flat_state(params), nnx.to_flat_state(new), strict=True
    ):
        frozen = path[1] in ("patch_embed", "pos_embed", "cls_token") or path[1:3] == ("blocks", 0)
        assert np.array_equal(before[...], after[...]) == frozen, path


@SLOW
def test_it_trains_with_drop_path_and_a_frozen_block(rng):
    tiny = create_model("vit", transformer=FIELDS, drop_path=0.5, rngs=nnx.Rngs(0))
    optimizer = steps.create_optimizer("sgd", 0.01, layer_decay=0.75, frozen_blocks=1)
    mesh = steps.data_mesh()
    state = steps.create_train_state(tiny, optimizer, mesh)
    step = steps.make_train_step(tiny, optimizer, partial(triplet_loss, margin=0.2), mesh=mesh)
    embed = steps.make_embed_step(tiny, mesh)
    pixels = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    batch = {"image": pixels, "label": np.arange(8, dtype=np.int32) // 2}
    before = jax.tree.map(np.array, state.params["backbone"]["blocks"])
    for _ in range(3):
        state, scalars = step(state, batch)
    assert np.isfinite(scalars["loss"])
    after = state.params["backbone"]["blocks"]
    jax.tree.map(np.testing.assert_array_equal, before[0], jax.tree.map(np.array, after[0]))
    moved = np.abs(before[1]["mlp"]["fc1"]["kernel"][...] - after[1]["mlp"]["fc1"]["kernel"][...])
    assert moved.max() > 0
    # Nothing is left out of an embedding.
    first, second = (embed(state.params, state.batch_stats, batch)["embedding"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_a_transformer_pools_itself():
    with pytest.raises(ValueError, match="a transformer pools itself"):
        nnx.eval_shape(lambda: create_model("dinov2_s14", pooling="gem", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="resnet18 has no drop_path"):
        create_model("resnet18", drop_path=0.1, rngs=nnx.Rngs(0))
