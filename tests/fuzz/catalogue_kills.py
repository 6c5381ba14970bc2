"""Kills `add` at random moments: ``python tests/fuzz/catalogue_kills.py --kills=50 --seed=0``."""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "catalogue"))

from killing import campaign

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=1.0, help="seconds until a kill, at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rounds = campaign(Path(folder), options.kills, options.seed, options.longest)
    print(f"{options.kills} kills in {rounds} catalogues: each ended as the uninterrupted one")
