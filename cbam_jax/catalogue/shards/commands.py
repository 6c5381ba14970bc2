"""``cbam-jax embed --data ... --out DIR --shards N --shard i``: one part of a list, embedded."""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cbam_jax import InputError, command_line
from cbam_jax.catalogue import embedders, sources
from cbam_jax.catalogue.shards.files import (
    MOST_SHARDS,
    About,
    check_count,
    findings,
    list_digest,
    shard_about,
    shard_count,
)
from cbam_jax.catalogue.shards.making import make_shard, tell

# Set by a cluster's scheduler: which of the processes of a job this is.
_INDEX = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")


def main(argv: list[str] | None = None) -> int:
    """Embed shards, or say which are missing; 1 where some are."""
    options = command_line.parsed(_parser(), argv)
    if options.verify:
        return verify(options)
    if not options.data:
        raise InputError("nothing to embed: give --data=PHOTOS, folders or manifests, x.csv")
    command_line.keep_compiled_programs()
    return embed(options)


def embed(options: argparse.Namespace) -> int:
    """Embed this process's shards, one after another."""
    shards, mine = wanted(options.shards, options.shard, os.environ)
    sources.check(options.data)
    check_count(options.out, shards)
    _check_folder(options.out)
    photos, _, closed = sources.listed(options.data)
    if not photos:
        raise InputError(f"--data={shlex.join(map(str, options.data))} has no photos")
    source = options.model or embedders.installed(options.out)
    embedder = embedders.load_named(source)
    about = About(
        0, shards, 0, list_digest(photos), embedder.fingerprint, embedders.lasting(source),
        embedder.dimension,
    )  # fmt: skip
    for shard in mine:
        done = make_shard(options.out, embedder, photos, about._replace(shard=shard))
        tell(shard, shards, done)
    return int(bool(closed))


def verify(options: argparse.Namespace) -> int:
    """Say which shards of a folder are missing or damaged; 1 where some are."""
    shards = options.shards or shard_count(options.out)
    wrong = findings(options.out, shards)
    alike: dict[str, list[int]] = {}
    for shard, text in wrong.items():
        alike.setdefault(text, []).append(shard)
    for text, some in alike.items():
        print(f"shard{'s' * (len(some) > 1)} {ranges(some)} of {shards}: {text}")
    abouts = [shard_about(options.out, i, shards) for i in range(shards) if i not in wrong]
    photos = sum(about.count for about in abouts if about)
    print(f"{len(abouts)} of {shards} shards are whole, {photos} photos")
    if wrong:
        print(f"to make anew, as SLURM takes it: --array={ranges(list(wrong))}")
    return int(bool(wrong))


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as SLURM takes them.

    >>> ranges([3, 7, 8, 9, 11, 12])
    '3,7-9,11-12'
    """
    there = set(numbers)
    firsts = [i for i in numbers if i - 1 not in there]
    lasts = [i for i in numbers if i + 1 not in there]
    return ",".join(f"{i}-{j}" if i < j else f"{i}" for i, j in zip(firsts, lasts, strict=True))


def wanted(
    shards: int | None, shard: int | None, environment: Mapping[str, str]
) -> tuple[int, list[int]]:
    """Of how many shards which are to be made, in order.

    Args:
        shards: --shards, or None: of a SLURM array as many as it has tasks, else 1.
        shard: --shard, or None: that of the cluster's scheduler; where there is none, all.
        environment: of the process.

    Raises:
        InputError: there is no such shard, or it is not known of how many.

    >>> wanted(4, None, {}), wanted(4, None, {"JOB_COMPLETION_INDEX": "2"})
    ((4, [0, 1, 2, 3]), (4, [2]))
    """
    name = "--shard"
    if shard is None:
        name = next((name for name in _INDEX if environment.get(name)), name)
        shard = _number(name, environment[name]) if name in environment else None
    if shards is None:
        shards = _array_size(environment) if name == "SLURM_ARRAY_TASK_ID" else None
        if shards is None and shard is not None:
            raise InputError(f"{name}={shard} is one of how many: give --shards=N")
        shards = shards or 1
    if not 1 <= shards <= MOST_SHARDS:
        raise InputError(f"--shards={shards}: give at least 1 and at most {MOST_SHARDS}")
    if shard is not None and not 0 <= shard < shards:
        raise InputError(f"{name}={shard}: the shards of --shards={shards} are 0 to {shards - 1}")
    return shards, list(range(shards)) if shard is None else [shard]


def _array_size(environment: Mapping[str, str]) -> int | None:
    """Tasks of a SLURM array that is whole: one of some of its tasks does not say how many."""
    names = ("SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")
    if not all(environment.get(name) for name in names):
        return None
    count, least, most = (_number(name, environment[name]) for name in names)
    return count if (least, most) == (0, count - 1) else None


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{name}={text} is no number of a shard")
    return int(text)


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={folder}: {error.strerror}; name a folder") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--out={folder} may not be written to: name another folder")


def _parser() -> argparse.ArgumentParser:
    module = "python -m cbam_jax.catalogue.shards"
    parser = argparse.ArgumentParser(
        prog=None if sys.argv[0].startswith("cbam-jax") else module,
        description="Embed one part of a list of photos, for `cbam-jax catalogue add --from`.",
    )
    parser.add_argument(
        "--data", nargs="+", default=[], help="photos, folders or manifests, x.csv: the whole list"
    )
    parser.add_argument(
        "--out", required=True, type=command_line.path, metavar="DIR", help="a folder of all shards"
    )
    parser.add_argument(
        "--model", help="as of `cbam-jax catalogue add`; default: efficientnet_lite0"
    )
    parser.add_argument("--shards", type=int, metavar="N", help="parts of the list; default: 1")
    text = "which part, from 0; default: SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX, else all"
    parser.add_argument("--shard", type=int, metavar="I", help=text)
    text = "embed nothing: list the shards that are missing or damaged"
    parser.add_argument("--verify", action="store_true", help=text)
    return parser
