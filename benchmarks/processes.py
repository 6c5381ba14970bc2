"""The same run by 1, 2 and 4 processes of 1 to 8 devices in all: losses and metrics, side by side.

python benchmarks/processes.py --out=benchmarks/results/processes_cpu.json

Twenty steps of the tests' tiny model on drawn photos, whose processes are of this machine; it needs
the repository. The greatest difference is relative, over the losses, gradient norms and metrics.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from test_processes import Starter, curve, finish, together

from cbam_jax.benchmark import machine

# Processes, and devices of each.
RUNS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 4), (4, 1), (4, 2))


def run(start, workdir, processes, devices):
    """Train; the run's curve."""
    flag = "--config.model.embedding_dim=16"
    if processes == 1:
        began = [start(workdir, flag, devices=devices)]
    else:
        began = together(start, workdir, processes, flag, devices=devices)
    for status, _, stderr in finish(*began, within=600):
        if status:
            sys.exit(stderr)
    return curve(workdir)


def row(found, expected, processes, devices):
    """What a run gave, beside one process with one device."""
    losses = [found[step, "loss"] for step in (1, 5, 10, 20)]
    apart = max(abs(found[key] - value) / abs(value) for key, value in expected.items() if value)
    return {
        "processes": processes,
        "devices": processes * devices,
        "loss_at_1_5_10_20": losses,
        "validation_map@10": found[20, "validation/map@10"],
        "greatest_difference": apart,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        start, expected = Starter(Path(folder)), {}
        for number, fields in enumerate(RUNS):
            found = run(start, Path(folder, str(number)), *fields)
            expected = expected or found
            rows.append(row(found, expected, *fields))
            print(json.dumps(rows[-1]), flush=True)
            options.out.write_text(json.dumps({"rows": rows, **machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
