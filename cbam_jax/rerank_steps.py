"""What ``--rerank`` is given, of `evaluate.py` and of a catalogue's ``find`` alike: its grammar."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from cbam_jax import InputError

# Names of the steps, their options with defaults, and what each does, for the report.
STEPS: Mapping[str, tuple[Mapping[str, float], str]] = {
    "whiten": (
        {"power": 0.5, "dim": 0},
        "PCA whitening fitted on the training split (dim=0: all axes that vary)",
    ),
    "dba": (
        {"k": 10, "alpha": 3.0},
        "each gallery item becomes the mean of itself and its k nearest, weighted by cosine^alpha",
    ),
    "aqe": (
        {"k": 10, "alpha": 3.0},
        "each query becomes the mean of itself and its k nearest, weighted by cosine^alpha",
    ),
    "k_reciprocal": (
        {"k1": 20, "k2": 6, "lambda_": 0.3},
        "Jaccard distance of k1-reciprocal encodings, mean of k2, and lambda_ of the distance",
    ),
}


class Step(NamedTuple):
    """A step and its options, all of them."""

    name: str
    options: dict[str, float]

    def __str__(self) -> str:
        """As it is typed."""
        return ":".join([self.name, *(f"{key}={value:g}" for key, value in self.options.items())])


def parse_steps(text: str) -> list[Step]:
    """Read steps parted by commas, each a name with options: ``whiten,aqe:k=5:alpha=2``.

    Raises:
        InputError: for a step, an option or a value that is none, or k_reciprocal before another.

    >>> [str(step) for step in parse_steps("dba,aqe:k=5")]
    ['dba:k=10:alpha=3', 'aqe:k=5:alpha=3']
    """
    steps = [_parse_step(part, text) for part in text.split(",")]
    if "k_reciprocal" in [step.name for step in steps[:-1]]:
        raise InputError(f"--rerank={text}: k_reciprocal ranks, so it comes last")
    return steps


def _parse_step(part: str, text: str) -> Step:
    name, *given = part.split(":")
    if name not in STEPS:
        raise InputError(
            f"--rerank={text}: {name!r} is no step; give {', '.join(STEPS)}, such as "
            "--rerank=aqe:k=5 or --rerank=whiten,k_reciprocal"
        )
    options = dict(STEPS[name][0])
    for pair in given:
        key, _, value = pair.partition("=")
        if key not in options:
            raise InputError(f"--rerank={text}: {name} has {', '.join(options)}, no {key!r}")
        options[key] = _number(value, type(options[key]), f"--rerank={text}: {key}={value}")
    if min(options.values()) < 0 or min(options.get("k", 1), options.get("k1", 1)) < 1:
        raise InputError(f"--rerank={text}: {name} needs options from 0 up, k and k1 from 1")
    if name == "k_reciprocal" and not (
        1 <= options["k2"] <= options["k1"] + 1 and options["lambda_"] <= 1
    ):
        raise InputError(f"--rerank={text}: k2 is from 1 to k1 + 1, lambda_ from 0 to 1")
    if options.get("power", 0) > 0.5:
        raise InputError(f"--rerank={text}: power is from 0 (a rotation) to 0.5 (whitening)")
    return Step(name, options)


def _number(value: str, kind: Callable[[str], float], told: str) -> float:
    try:
        number = kind(value)
    except ValueError as error:
        raise InputError(f"{told} is no {'number' if kind is float else 'whole number'}") from error
    if not abs(number) < 2**31:
        raise InputError(f"{told} is not finite, or too large")
    return number
