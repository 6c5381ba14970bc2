"""Images that may be shrunk in any way, and the means that they are then compared with."""

import numpy as np


def smooth(rng, height, width):
    """An image whose detail is coarse against 8 x 8 blocks, so that all ways to shrink agree."""
    y, x = np.mgrid[:height, :width]
    waves = [rng.uniform(0, 6.28) + y * a + x * b for a, b in rng.uniform(-0.015, 0.015, (3, 2))]
    return np.rint(127 + 100 * np.sin(np.stack(waves, -1))).astype(np.uint8)


def area_means(image, height, width):
    """The mean over exactly the area that each pixel covers, in float64."""

    def weights(old, new):
        edges = np.clip(np.arange(old + 1) * (new / old), 0, new)
        low, high = np.arange(new)[:, None], np.arange(1, new + 1)[:, None]
        return np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None)

    rows, columns = weights(image.shape[0], height), weights(image.shape[1], width)
    return np.einsum("ij,jkc,lk->ilc", rows, image.astype(float), columns, optimize=True)
