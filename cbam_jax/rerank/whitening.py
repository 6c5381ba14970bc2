"""PCA whitening, to be fitted on the training split."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cbam_jax.rerank.expansion import unit_rows


class Whitening(NamedTuple):
    """``mean`` [d] and ``components`` [d, m], whose columns are scaled, both float64."""

    mean: np.ndarray
    components: np.ndarray


def fit_whitening(
    embeddings: ArrayLike, dim: int | None = None, *, power: float = 0.5
) -> Whitening:
    """The principal axes of embeddings, each divided by its variance to a power.

    With covariance C = U diag(v) U^T (n - 1 in its divisor) the map is (x - mean) U diag(v^-power),
    the ``dim`` largest variances first: power 0.5 is PCA whitening (Jegou and Chum 2012;
    scikit-learn's ``PCA(whiten=True)``), 0 a rotation, 0.25 between them. Fit it on embeddings of
    the training split: fitted on what is measured, it has seen the test.

    Args:
      embeddings: ``[n, d]`` float, as they are searched.
      dim: Width of the result; None: all axes that vary. At most min(n - 1, d).
      power: From 0 to 0.5.

    Returns:
      A `Whitening`.

    Raises:
      ValueError: For embeddings that are not a matrix of finite numbers, a dim above the number of
        axes that vary, or a power out of range.

    Example:
      >>> fitted = fit_whitening(np.float32([[0, 0], [4, 1], [8, -1], [12, 0]]))
      >>> np.cov(np.float32([[0, 0], [4, 1], [8, -1], [12, 0]]).dot(fitted.components).T).round(6)
      array([[1., 0.],
             [0., 1.]])
    """
    x = np.asarray(embeddings, np.float64)
    if x.ndim != 2 or len(x) < 2 or not np.isfinite(x).all() or not 0 <= power <= 0.5:
        raise ValueError(
            f"fit_whitening: embeddings of shape {x.shape}, power {power}; expected [n, d], n at "
            "least 2, finite, and a power from 0 to 0.5"
        )
    mean = x.mean(axis=0)
    variance, axes = np.linalg.eigh(np.cov(x, rowvar=False).reshape(x.shape[1], -1))
    variance, axes = variance[::-1], axes[:, ::-1]
    varying = int(np.sum(variance > variance[0] * x.shape[1] * np.finfo(np.float64).eps))
    dim = varying if dim is None else dim
    if not 1 <= dim <= min(varying, len(x) - 1):
        raise ValueError(
            f"dim is {dim}, but {len(x)} embeddings of {x.shape[1]} numbers vary along {varying} "
            "axes; dim is from 1 to that"
        )
    return Whitening(mean, axes[:, :dim] * variance[:dim] ** -power)


def apply_whitening(embeddings: ArrayLike, whitening: Whitening) -> np.ndarray:
    """Embeddings [n, d] on the axes of a whitening, of unit length, [n, m] float32.

    Raises:
      ValueError: For embeddings of another width.

    Example:
      >>> fitted = Whitening(np.array([1.0, 0.0]), np.array([[0.5], [0.0]]))
      >>> apply_whitening(np.float32([[3, 9], [0, 2]]), fitted).tolist()
      [[1.0], [-1.0]]
    """
    x = np.asarray(embeddings, np.float64)
    if x.ndim != 2 or x.shape[1] != len(whitening.mean):
        raise ValueError(
            f"embeddings have shape {x.shape}, expected [n, {len(whitening.mean)}], of which the "
            "whitening was fitted"
        )
    return unit_rows((x - whitening.mean) @ whitening.components)
