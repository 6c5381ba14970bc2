"""Whether a model looks at the garment: the share of heat inside it, and the pointing game.

Both need to know where the garment is, from a dataset's masks or boxes, and are read beside what an
even map and the image's centre would score: garments are large and stand in the middle.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax import data, gradcam, steps
from cbam_jax.datasets import RetrievalDataset
from cbam_jax.progress import progress
from cbam_jax.report_text import gate_name, wrapped

DEFINITIONS = {
    "area": "share of the image's pixels that the garment covers: heat_inside of an even map",
    "pointing_center": "pointing of the image's centre",
    "heat_inside": "sum of the heat on the garment's pixels, divided by the sum of all heat",
    "pointing": "1 where the pixel of most heat lies at most `tolerance` pixels from the garment",
    "num_empty": "images whose map is empty, left out of the target's means",
    "inside": "mean of the spatial gate over the garment's pixels",
    "outside": "mean of the spatial gate over all other pixels",
}


def heat_inside(heat: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the share of each image's heat that lies inside its mask, float64 [b].

    NaN for an empty map and for an empty mask.

    Args:
        heat: [b, h, w], not negative.
        mask: bool [b, h, w].

    >>> heat_inside(np.array([[[3.0, 1.0]]]), np.array([[[True, False]]])).tolist()
    [0.75]
    """
    inside = np.sum(heat, axis=(1, 2), where=mask, dtype=np.float64)
    total = np.sum(heat, axis=(1, 2), dtype=np.float64)
    defined = (total > 0) & mask.any(axis=(1, 2))
    return np.where(defined, inside, np.nan) / np.where(defined, total, 1)


def pointing_hits(heat: np.ndarray, mask: np.ndarray, tolerance: float = 15.0) -> np.ndarray:
    """Return the pointing game's hits: 1 where the hottest pixel is in the mask or near it, else 0.

    NaN for an empty map and for an empty mask. Of several hottest pixels the first counts, by row.
    Zhang et al.: Top-down Neural Attention by Excitation Backprop, ECCV 2016, whose tolerance of
    15 pixels is the usual one, for images whose short side is some 224 pixels or more.

    Args:
        heat: [b, h, w], not negative.
        mask: bool [b, h, w].
        tolerance: greatest distance from the hottest pixel to one of the mask, in pixels.

    Returns:
        float64 [b].

    >>> heat, mask = np.eye(5)[None, ::-1] * np.arange(5), np.zeros((1, 5, 5), bool)
    >>> mask[0, 3, 3] = True
    >>> [pointing_hits(heat, mask, tolerance).item() for tolerance in (3, 3.2)]
    [0.0, 1.0]
    """
    hits = np.full(len(heat), np.nan)
    for i in np.flatnonzero(heat.any(axis=(1, 2)) & mask.any(axis=(1, 2))):
        point = np.unravel_index(np.argmax(heat[i]), heat[i].shape)
        distance = np.sum(np.square(np.argwhere(mask[i]) - point), axis=1).min()
        hits[i] = distance <= tolerance**2
    return hits


def scaled_tolerance(image_size: int) -> float:
    """Return the pointing game's 15 pixels at 224, in pixels of another size."""
    return 15 * image_size / 224


def measure_focus(
    model: Any,
    dataset: RetrievalDataset,
    rows: np.ndarray,
    targets: Mapping[str, np.ndarray | None],
    *,
    mesh: Any,
    image_size: int,
    batch_size: int,
    layer: str = "backbone",
    **geometry: Any,
) -> dict[str, np.ndarray]:
    """Measure a model's heat maps and spatial gates against the garments of some images.

    Args:
        model: an ``EmbeddingModel`` with its arrays on ``mesh``.
        dataset: with masks or boxes; see ``RetrievalDataset.mask``.
        rows: of the dataset, the n images to look at.
        targets: the maps' names and targets of ``gradcam.grad_cam``: None, or an embedding for
            each image, [n, d].
        mesh: from ``steps.data_mesh``.
        image_size: pixels, as in ``data.eval_batches``, as is ``geometry``.
        batch_size: images at a time; a multiple of the mesh's devices.
        layer: of ``gradcam.grad_cam``.
        **geometry: ``crop_to_box`` and fields of ``Preprocessing``.

    Returns:
        By name an array [n] each: ``area`` and ``pointing_center``; ``TARGET/heat_inside`` and
        ``TARGET/pointing``, NaN for an empty map or a garment out of view, and ``TARGET/empty``;
        of each spatial gate ``GATE/inside`` and ``GATE/outside``.

    Raises:
        InputError: the dataset has neither masks nor boxes, or an image cannot be read.
    """
    geometry["image_size"] = image_size
    parts = []
    starts = range(0, len(rows), batch_size)
    for start in progress(starts, "measuring focus", total=len(starts)):
        # The last batch is filled up by repeating its rows, so that all have one shape.
        batch = np.resize(np.arange(start, min(start + batch_size, len(rows))), batch_size)
        masks = np.stack([data.eval_mask(dataset, i, **geometry) for i in rows[batch]])
        images = np.stack([data.eval_image(dataset, i, **geometry) for i in rows[batch]])
        (sharded,) = steps.to_devices([{"image": images}], mesh)
        images = model.preprocess(sharded["image"])
        part = _baselines(masks)
        for name, target in targets.items():
            target = None if target is None else target[batch]
            maps = jax.device_get(gradcam.grad_cam(model, images, target, layer=layer))
            part |= {f"{name}/{key}": value for key, value in _measures(maps, masks).items()}
        part |= _gate_means(gradcam.attention_gates(model, images), masks)
        parts.append({name: value[: len(rows) - start] for name, value in part.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _baselines(masks: np.ndarray) -> dict[str, np.ndarray]:
    size = masks.shape[1]
    center = np.zeros(masks.shape, np.float32)
    center[:, size // 2, size // 2] = 1
    return {
        "area": heat_inside(np.ones_like(center), masks),
        "pointing_center": pointing_hits(center, masks, scaled_tolerance(size)),
    }


def _measures(maps: gradcam.HeatMaps, masks: np.ndarray) -> dict[str, np.ndarray]:
    heat = np.asarray(maps.heat)
    return {
        "heat_inside": heat_inside(heat, masks),
        "pointing": pointing_hits(heat, masks, scaled_tolerance(masks.shape[1])),
        "empty": np.asarray(maps.empty),
    }


def _gate_means(gates: Mapping[str, jax.Array], masks: np.ndarray) -> dict[str, np.ndarray]:
    means = {}
    for name, gate in gates.items():
        if name.endswith(".spatial"):
            gate = np.asarray(jax.image.resize(gate.astype(jnp.float32), masks.shape, "linear"))
            means[f"{name}/inside"] = _masked_mean(gate, masks)
            means[f"{name}/outside"] = _masked_mean(gate, ~masks)
    return means


def _masked_mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    count = mask.sum(axis=(1, 2))
    total = np.sum(values, axis=(1, 2), where=mask, dtype=np.float64)
    return np.where(count > 0, total, np.nan) / np.maximum(count, 1)


def summarize(measured: Mapping[str, np.ndarray], *, image_size: int) -> dict[str, Any]:
    """Average what ``measure_focus`` gave into a JSON document, with every definition.

    An image whose garment is out of view, or whose box is missing, counts as left out; a mean over
    nothing is NaN.
    """
    report: dict[str, Any] = {
        "num_images": len(measured["area"]),
        "num_left_out": int(np.isnan(measured["area"]).sum()),
        "tolerance": scaled_tolerance(image_size),
        "targets": {},
        "gates": {},
    }
    for name, values in measured.items():
        group, _, key = name.rpartition("/")
        if key == "empty":
            report["targets"][group]["num_empty"] = int(values.sum())
        elif not group:
            report[key] = _mean(values)
        else:
            kind = "gates" if group.endswith(".spatial") else "targets"
            report[kind].setdefault(group, {})[key] = _mean(values)
    return report | {"definitions": DEFINITIONS}


def _mean(values: np.ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")


def format_report(report: Mapping[str, Any]) -> str:
    """Lay a report out as text of at most 80 columns, with its definitions."""
    told = (
        f"focus on the garment, {report['num_images']} images, {report['num_left_out']} left out "
        f"for having it out of view; tolerance {report['tolerance']:.1f} px"
    )
    lines = [
        *wrapped(told),
        f"{'heat of':30}{'heat_inside':>12}{'pointing':>12}{'empty':>8}",
        f"{'an even map; the center':30}{report['area']:12.4f}{report['pointing_center']:12.4f}",
    ]
    for name, means in report["targets"].items():
        values = f"{means['heat_inside']:12.4f}{means['pointing']:12.4f}{means['num_empty']:8d}"
        lines.append(f"{name:30}{values}")
    if report["gates"]:
        lines.append(f"{'spatial gate':30}{'inside':>12}{'outside':>12}")
    for name, means in report["gates"].items():
        lines.append(f"{gate_name(name):30}{means['inside']:12.4f}{means['outside']:12.4f}")
    for name, definition in report["definitions"].items():
        lines += wrapped(f"{name:17}{definition}", 17)
    return "\n".join(lines)
