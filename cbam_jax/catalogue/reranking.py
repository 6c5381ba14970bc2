"""An answer ranked again by what is near what is near: of one query at a time, as a shop's are.

`parsed` reads what is asked for, and `ranked_again` does it. Nothing is compiled, whatever sizes
answers have.
"""

from collections.abc import Callable, Sequence

import numpy as np

from cbam_jax import InputError
from cbam_jax.catalogue.items import Neighbour
from cbam_jax.catalogue.nearest import nearest, squared_norms
from cbam_jax.rerank_steps import Step, parse_steps

_WIDE = 10  # The nearest that k_reciprocal ranks, in k1.
_MOST = 50  # Neighbours that a server is asked to look at.
_REFUSED = {
    "whiten": "a catalogue has no training split to fit it on",
    "dba": "each photo added would change the others",
}
_TOLD = {
    "aqe": "distances are to the mean of the query and its neighbours",
    "k_reciprocal": "distances are of k-reciprocal re-ranking, from 0 to 1, of the nearest",
}
# Of queries [q, d] the k nearest photos.
Look = Callable[..., list[list[Neighbour]]]


def parsed(text: str | None) -> list[Step]:
    """The steps of ``--rerank``; none of None.

    Raises:
        InputError: as `parse_steps`, or a step that a catalogue has no use for.

    >>> [str(step) for step in parsed("aqe:k=5")]
    ['aqe:k=5:alpha=3']
    """
    steps = [] if text is None else parse_steps(text)
    for name in (step.name for step in steps if step.name in _REFUSED):
        raise InputError(
            f"--rerank={text}: {name} is for evaluate.py alone, since {_REFUSED[name]}; give aqe, "
            "k_reciprocal, or aqe,k_reciprocal"
        )
    return steps


def check_effort(text: str | None) -> None:
    """InputError for steps that are none, or would take a server's thread for seconds."""
    steps = parsed(text)
    counts = [step.options[name] for step in steps for name in ("k", "k1") if name in step.options]
    if len(steps) > 2 or max(counts, default=0) > _MOST:
        raise InputError(
            f"--rerank={text}: a server takes two steps, and k and k1 up to {_MOST}; for more use "
            "`cbam-jax catalogue find`"
        )


def told(steps: Sequence[Step]) -> str:
    """What the distances of an answer are.

    >>> told(parsed("aqe:k=5"))
    're-ranked by aqe:k=5:alpha=3: distances are to the mean of the query and its neighbours'
    """
    return f"re-ranked by {','.join(map(str, steps))}: {_TOLD[steps[-1].name]}"


def ranked_again(
    look: Look,
    embeddings_of: Callable[[Sequence[int]], np.ndarray],
    queries: np.ndarray,
    steps: Sequence[Step],
    k: int,
    *,
    max_distance: float | None,
    copies: bool,
) -> list[list[Neighbour]]:
    """The neighbours of each query after some steps; each query alone has a part in its answer.

    Args:
        look: of queries [q, d] and a k their neighbours, with max_distance and copies as given.
        embeddings_of: the embeddings [n, d] of ids.
        queries: [q, d] float32.
        steps: of `parsed`.
        k: photos to find, as in `Catalogue.find`, which says the rest.
        max_distance: of the distances after the last step.
        copies: each copy is a photo of its own; an expansion takes each photo once, in any case.
    """
    for name, options in steps:
        if name == "k_reciprocal":  # It comes last.
            wide = look(queries, max(k, _WIDE * int(options["k1"])), copies=copies)
            pairs = zip(queries, wide, strict=True)
            again = [_reciprocal(q, found, embeddings_of, options, k) for q, found in pairs]
            return [[n for n in found if _within(n, max_distance)] for found in again]
        near = look(queries, int(options["k"]))
        pairs = zip(queries, near, strict=True)
        queries = np.array(
            [_expanded(q, found, embeddings_of, options["alpha"]) for q, found in pairs]
        )
    return look(queries, k, max_distance=max_distance, copies=copies)


def _expanded(
    query: np.ndarray,
    found: Sequence[Neighbour],
    embeddings_of: Callable[[Sequence[int]], np.ndarray],
    alpha: float,
) -> np.ndarray:
    """A query [d] by alpha expansion, as long as it was; its own photos are not its neighbours."""
    from cbam_jax.rerank import expand_by_neighbours  # Late: JAX takes a second.

    near = embeddings_of([n.id for n in found if not n.same])
    length = np.linalg.norm(query.astype(np.float64))  # Squares of 1e-23 are 0 in float32.
    moved = expand_by_neighbours(query[None], near[None], alpha)[0]
    return (moved * length).astype(np.float32)


def _reciprocal(
    query: np.ndarray,
    found: Sequence[Neighbour],
    embeddings_of: Callable[[Sequence[int]], np.ndarray],
    options: dict[str, float],
    k: int,
) -> list[Neighbour]:
    """The k first of what was found, ranked among themselves; the query's own photos before."""
    from cbam_jax.rerank import k_reciprocal

    own, others = [n for n in found if n.same], [n for n in found if not n.same]
    if not others:
        return own
    points = np.concatenate([query[None], embeddings_of([n.id for n in others])])
    k1, k2 = int(options["k1"]), int(options["k2"])
    lists = nearest(points, points, k1 + 1, squares=squared_norms(points))
    distances, indices = k_reciprocal(
        points[:1],
        points[1:],
        min(k, len(others)),
        k1=k1,
        k2=k2,
        lambda_=options["lambda_"],
        lists=np.array([places for _, places in lists]),
    )
    pairs = zip(distances[0].tolist(), indices[0].tolist(), strict=True)
    return own + [others[i]._replace(distance=distance) for distance, i in pairs]


def _within(n: Neighbour, max_distance: float | None) -> bool:
    return max_distance is None or n.distance <= max_distance
