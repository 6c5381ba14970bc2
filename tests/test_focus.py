"""The share of heat on the garment and the pointing game, against loops; whole datasets."""

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_data import make_dataset, png

from cbam_jax import InputError, data, focus, gradcam, steps
from cbam_jax.attention import CBAM


def slow_inside(heat, mask):
    inside = total = 0.0
    for i in np.ndindex(heat.shape):
        total += float(heat[i])
        inside += float(heat[i]) * bool(mask[i])
    return inside / total


def slow_hit(heat, mask, tolerance):
    best = max(np.ndindex(heat.shape), key=lambda i: (heat[i], -i[0], -i[1]))
    near = [(best[0] - y) ** 2 + (best[1] - x) ** 2 for y, x in np.argwhere(mask)]
    return float(min(near) ** 0.5 <= tolerance)


@pytest.fixture
def heat(rng):
    return rng.uniform(size=(40, 9, 13)).round(1)  # With several hottest pixels in most.


@pytest.fixture
def mask(rng):
    masks = np.zeros((40, 9, 13), bool)
    for one in masks:
        top, left = rng.integers(7), rng.integers(11)
        one[top : top + 2, left : left + 3] = rng.random((2, len(one[0, left : left + 3]))) < 0.7
        one[top, left] = True
    return masks


def test_share_of_heat_and_pointing_game(heat, mask):
    inside = [slow_inside(h, m) for h, m in zip(heat, mask, strict=True)]
    np.testing.assert_allclose(focus.heat_inside(heat.astype(np.float32), mask), inside, rtol=1e-6)
    rates = []
    for tolerance in (0, 2, 2.5, 5):
        expected = [slow_hit(h, m, tolerance) for h, m in zip(heat, mask, strict=True)]
        np.testing.assert_array_equal(focus.pointing_hits(heat, mask, tolerance), expected)
        rates.append(np.mean(expected))
    assert 0 < rates[0] < rates[1] < rates[2] < rates[3] < 1


def test_empty_maps_and_garments_out_of_view_have_no_value(heat, mask):
    heat[3], mask[5] = 0, False
    for values in (focus.heat_inside(heat, mask), focus.pointing_hits(heat, mask)):
        assert np.flatnonzero(np.isnan(values)).tolist() == [3, 5]


class Model(nnx.Module):
    """The pixels themselves, seen through a CBAM."""

    def __init__(self):
        rngs = nnx.Rngs(1)
        self.backbone = nnx.Sequential(
            nnx.Conv(3, 8, (3, 3), strides=2, padding=1, rngs=rngs), CBAM(8, 4, rngs=rngs)
        )

    def preprocess(self, images):
        return images.astype(jnp.float32) / 255 - 0.5

    def __call__(self, images):
        return jnp.mean(self.backbone(images), axis=(1, 2))


SIZE = 12
CUT = {"image_size": SIZE, "crop_fraction": 0.8}


@pytest.fixture
def garments(rng):
    """Images of unequal sizes; in the masks, the garment, which in the last is out of view."""
    images, masks = [], []
    for i in range(6):
        height, width = 20 + 5 * i, 40 - 3 * i
        mask = np.zeros((height, width), np.uint8)
        mask[2 + i : 12, 15 - i : 30] = 255
        images.append(rng.integers(256, size=(height, width, 3), dtype=np.uint8))
        masks.append(mask)
    masks[5][...] = 0
    masks[5][:, 0] = 255
    encoded = [cv2.imencode(".png", mask)[1].tobytes() for mask in masks]
    return make_dataset([0, 1] * 3, [png(image) for image in images], masks=encoded), masks


@pytest.mark.slow
def test_measured_over_a_dataset_as_image_by_image(garments, rng):
    dataset, _ = garments
    rows = np.array([5, 0, 2, 3, 1])
    references = rng.normal(size=(5, 8)).astype(np.float32)
    mesh = steps.data_mesh()
    model = Model()
    graph, state = nnx.split(model)
    replicated = nnx.merge(graph, steps.replicate(state, mesh))
    targets = {"energy": None, "other": references}
    # Eight at a time on eight devices: the batch is filled up.
    measured = focus.measure_focus(
        replicated, dataset, rows, targets, mesh=mesh, batch_size=8, **CUT
    )
    center = np.zeros((SIZE, SIZE))
    center[SIZE // 2, SIZE // 2] = 1
    for i, row in enumerate(rows):
        image = data.eval_image(dataset, row, **CUT)
        mask = data.eval_mask(dataset, row, **CUT)
        inputs = model.preprocess(jnp.asarray(image[None]))
        gate = gradcam.attention_gates(model, inputs)["backbone.layers.1.spatial"][0]
        gate = cv2.resize(np.asarray(gate), (SIZE, SIZE))
        expected = {
            "area": mask.mean() if mask.any() else np.nan,
            "pointing_center": slow_hit(center, mask, 15 * 12 / 224) if mask.any() else np.nan,
            "backbone.layers.1.spatial/inside": gate[mask].mean() if mask.any() else np.nan,
            "backbone.layers.1.spatial/outside": gate[~mask].mean(),
        }
        for name, target in (("energy", None), ("other", references[i])):
            heat = np.asarray(gradcam.grad_cam(model, inputs, target).heat[0])
            expected[f"{name}/empty"] = not heat.any()
            defined = heat.any() and mask.any()
            expected[f"{name}/heat_inside"] = slow_inside(heat, mask) if defined else np.nan
            hit = slow_hit(heat, mask, 15 * 12 / 224) if defined else np.nan
            expected[f"{name}/pointing"] = hit
        assert measured.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(measured[name][i], value, rtol=1e-3, err_msg=name)
    report = focus.summarize(measured, image_size=SIZE)
    assert (report["num_images"], report["num_left_out"]) == (5, 1)
    assert report["area"] == pytest.approx(np.nanmean(measured["area"]))
    inside = report["targets"]["other"]["heat_inside"]
    assert inside == pytest.approx(np.nanmean(measured["other/heat_inside"]))
    assert report["targets"]["energy"]["num_empty"] == measured["energy/empty"].sum()
    outside = report["gates"]["backbone.layers.1.spatial"]["outside"]
    assert outside == pytest.approx(measured["backbone.layers.1.spatial/outside"].mean())
    text = focus.format_report(report)
    assert f"{inside:.4f}" in text
    assert f"layers.1{'':22}" in text
    assert f"{outside:.4f}" in text
    assert max(map(len, text.splitlines())) <= 80
    for name, definition in focus.DEFINITIONS.items():
        assert f"{name} {definition}" in " ".join(text.split())


def test_a_mask_is_cut_as_its_image_is(garments):
    _, masks = garments
    white = [png(np.repeat(mask[..., None], 3, axis=2)) for mask in masks]
    encoded = [cv2.imencode(".png", mask)[1].tobytes() for mask in masks]
    boxes = np.array([[3.2, 1.0, 33.9, 17.5]] * 6, np.float32)
    dataset = make_dataset([0, 1] * 3, white, masks=encoded, bbox=boxes)
    for cut in (CUT, CUT | {"crop_to_box": True}):
        for i in range(6):
            image = data.eval_image(dataset, i, **cut)
            np.testing.assert_array_equal(data.eval_mask(dataset, i, **cut), image[..., 0] >= 128)


def test_a_box_is_a_mask_where_there_is_no_other(garments):
    dataset, _ = garments
    boxes = np.array([[3.2, -4.0, 9.0, 7.5]] * 6, np.float32)
    boxes[2, 1] = np.nan
    boxed = make_dataset(dataset.label, dataset.images, bbox=boxes)
    expected = np.zeros((25, 37), bool)
    expected[:8, 3:9] = True
    np.testing.assert_array_equal(boxed.mask(1), expected)
    assert not boxed.mask(2).any()
    with pytest.raises(InputError, match="toy has neither masks nor boxes"):
        make_dataset(dataset.label, dataset.images).mask(1)
