"""Speed, measured: ``python -m cbam_jax.benchmark {train,embed,data,search}``.

Every run warms up first, apart from what is measured, and ends with one JSON document as the last
line on stdout. No dataset is needed.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from cbam_jax import InputError
from cbam_jax.benchmark import flags
from cbam_jax.benchmark.environment import machine
from cbam_jax.benchmark.search import benchmark_search
from cbam_jax.benchmark.step import benchmark_step


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one benchmark; prints what was found and then the JSON document."""
    parser = flags.make_parser(__doc__)
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    flags.check(parser, command, options)
    if command == "data":
        result = _run_data(parser, options)
    else:
        search = command == "search"
        result = _run_search(parser, options) if search else benchmark_step(command, **options)
        _tell(result)
    print(json.dumps(result))


def _run_data(parser: argparse.ArgumentParser, options: dict) -> dict:
    try:
        from cbam_jax.benchmark import data  # The others need no OpenCV.

        result = data.benchmark_data(**options)
    except (InputError, ModuleNotFoundError) as error:
        parser.error(str(error))
    for name in data.UNITS:
        print(name, *(f"{key} {number:.1f}" for key, number in result[name].items()))
    return result | machine()


def _run_search(parser: argparse.ArgumentParser, options: dict) -> dict:
    try:
        return benchmark_search(**options)
    except InputError as error:
        parser.error(str(error))


def _tell(result: dict[str, Any]) -> None:
    """Prints the seconds, and what else there is to read at a glance."""
    for name, value in result.items():
        if isinstance(value, dict) and "median" in value:
            print(name, *(f"{key} {number:.4f} s" for key, number in value.items()))
    for name in "proven", "proven_prepared":
        if shares := result.get(name):
            print(name, *(f"{key} {share:.1%}" for key, share in shares.items()))
    if (cost := result.get("attention_cost")) is not None:
        print(f"attention: {cost:+.1%} of the step of {result['plain']['model']}")
    if share := result.get("share_of_product"):
        print(f"{share:.1%} of the speed of a large matrix product")
    if "compile_seconds" in result:
        print(f"compiled in {result['compile_seconds']:.1f} s, no cache used")
        print(f"{result['peak_memory'] / 2**20:.0f} MiB at the peak")
        print(f"{result['images_per_second']:.2f} images/s")


if __name__ == "__main__":
    main()
