"""How long a run will take, what memory it holds, and what would make it shorter."""

import psutil

_LONG = 2 * 3600  # Seconds from which on a run on a CPU is told what to change.


def seconds_left(
    step: int,
    total: int,
    *,
    seconds_per_step: float,
    eval_every: int,
    evaluation_seconds: float | None,
) -> float:
    """Return the seconds from ``step`` to the end, evaluations along the way included.

    >>> seconds_left(3, 10, seconds_per_step=2.0, eval_every=4, evaluation_seconds=5.0)
    29.0
    """
    evaluations = -(-total // eval_every) - step // eval_every
    return (total - step) * seconds_per_step + evaluations * (evaluation_seconds or 0.0)


def duration(seconds: float) -> str:
    """Say a duration as people do.

    >>> duration(8.4), duration(700), duration(11_100), duration(200_000)
    ('8 s', '12 min', '3 h 5 min', '2 d 7 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} d {minutes // 60 % 24} h"


def resident_bytes() -> int:
    """Return the memory that this process and those it started hold."""
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.Error:  # It has ended since.
            continue
    return total


def advice(seconds: float, *, image_size: int, model: str, steps: int) -> str | None:
    """Say what would make a run on a CPU shorter, None where it is short enough.

    >>> advice(3000, image_size=224, model="resnet50_cbam", steps=5000)
    >>> print(advice(90_000, image_size=224, model="vgg16_bn_se", steps=5000).replace(", ", ",\\n"))
    that is long for a CPU. Shorter: --config.data.image_size=96 (a fifth of the time),
    --config.model.name=resnet18_se (about a third),
    --config.train.steps=500; each needs a new --workdir. Or in parts: --stop_after=45m,
    and the same command goes on
    """
    if seconds <= _LONG:
        return None
    flags = []
    if image_size > 96:
        flags.append(f"--config.data.image_size=96 ({_share((96 / image_size) ** 2)} of the time)")
    backbone, _, attention = model.partition("_")
    if backbone not in ("resnet10", "resnet18", "tiny"):
        name = "_".join(filter(None, ("resnet18", attention.removeprefix("bn").strip("_"))))
        flags.append(f"--config.model.name={name} (about a third)")
    flags.append(f"--config.train.steps={max(steps // 10, 1)}")
    return (
        f"that is long for a CPU. Shorter: {', '.join(flags)}; each needs a new --workdir. "
        "Or in parts: --stop_after=45m, and the same command goes on"
    )


def _share(part: float) -> str:
    words = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}
    parts = round(1 / part)
    return words.get(parts, f"1/{parts}")
