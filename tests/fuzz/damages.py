"""Damage runs, exported models, datasets and catalogues at random, and see whether it is noticed.

Not a test: it runs as long as it is told to.

    python tests/fuzz/damages.py --count=200 --seed=0

Each damage is of one file: a bit flipped, bytes overwritten, the end cut off, the file lost, or
another's in its place. Then the thing is read as a user would, and the outcome is one of: the same
as before; the same as before, and a line that says what was passed over; one line that refuses it;
and what must not be: other content in silence, or a traceback. The last line on stdout is JSON.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "catalogue"), str(HERE.parent.parent)]

# ruff: noqa: E402
from fakes import FakeEmbedder
from tiny_run import drawn_model, make_config, patch_tiny_models, write_photos, write_run

from cbam_jax import InputError, hub, runs
from cbam_jax.catalogue import Catalogue
from cbam_jax.checkpoint import Checkpoints
from cbam_jax.datasets import open_dataset
from cbam_jax.experiment import build_model
from cbam_jax.runlog import read_log

RECORDS = [{"step": step, "test/map@10": step / 10} for step in range(5)]


def flip(path, rng, _):
    data = bytearray(path.read_bytes())
    if data:
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def overwrite(path, rng, _):
    data = bytearray(path.read_bytes())
    start = rng.integers(len(data) + 1)
    data[start : start + 16] = rng.bytes(len(data[start : start + 16]))
    path.write_bytes(data)


def cut(path, rng, _):
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size + 1)])


def lose(path, rng, _):
    path.unlink()


def swap(path, rng, others):
    path.write_bytes(others[rng.integers(len(others))].read_bytes())


DAMAGES = (flip, flip, overwrite, cut, lose, swap)


class Run:
    """A workdir with two checkpoints; a reader takes the last one that is whole."""

    def make(self, folder, data):
        config = make_config(write_photos(data))
        self.model = write_run(folder, config)
        model = drawn_model(lambda: build_model(config), seed=10)
        _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        with Checkpoints(folder / "checkpoints", best_metric="map@10") as checkpoints:
            checkpoints.save(
                4,
                model={"params": params, "batch_stats": batch_stats},
                optimizer={"step": np.int32(4)},
                data={"seed": 0, "next_step": 4},
                config=config.to_dict(),
            )
            checkpoints.add_metrics(4, {"map@10": 0.4})
        lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
        (folder / "metrics.jsonl").write_text(lines)

    def read(self, folder):
        config = runs.read_config(folder)
        with Checkpoints(
            folder / "checkpoints", best_metric="map@10", read_only=True
        ) as checkpoints:
            last, best = checkpoints.restore("last"), checkpoints.best_step()
        log = read_log(folder)
        return {
            "config": config.to_dict(),
            "last": (last.step, arrays_of(last.model), arrays_of(last.optimizer), last.data),
            "best": best,
            "log": log,
        }

    def same(self, before, after, told):
        """Nothing is other in silence: a step before is told, a log loses lines.

        A record of the log may be another one, where a digit became another digit.
        """
        last = after["last"] == before["last"] or (after["last"][0] == 3 and "damaged" in told)
        best = after["best"] == before["best"] or "metrics of checkpoint" in told
        new = [record for record in after["log"] if record not in before["log"]]
        return after["config"] == before["config"] and last and best and len(new) <= 1


class Exported:
    """A folder of save_pretrained."""

    def make(self, folder, data):
        config = make_config(write_photos(data))
        arguments = {"name": "tiny_cbam", "embedding_dim": 16}
        model = drawn_model(lambda: build_model(config))
        hub.save_pretrained(
            model, folder, config=arguments, preprocessing={"image_size": 32}, metrics={"a": 0.5}
        )

    def read(self, folder):
        model, document = hub.from_pretrained(folder)
        weights = {name: np.asarray(v[...]) for name, v in hub._arrays(model).items()}
        parts = {name: document.get(name) for name in ("model", "preprocessing")}
        return {"weights": arrays_of(weights), **parts}

    def same(self, before, after, told):
        return after == before


class Prepared:
    """A prepared dataset, with the columns kept beside it."""

    def make(self, folder, data):
        open_dataset("synthetic_garments/quickstart", "test", data_dir=folder)

    def read(self, folder):
        if not list(folder.rglob("dataset_info.json")):
            raise InputError("it would be prepared anew")
        dataset = open_dataset("synthetic_garments/quickstart", "test", data_dir=folder)
        images = [bytes(dataset.encoded(i)) for i in range(len(dataset))]
        columns = [dataset.label.tolist(), dataset.id.tolist(), dataset.label_names]
        return {"images": images, "columns": columns}

    def same(self, before, after, told):
        return after == before


class Shop:
    """A catalogue, with the copy of its embeddings for searches."""

    def make(self, folder, data):
        folder.mkdir()
        embeddings = np.random.default_rng(3).random((300, 48), np.float32)
        names = [f"/photos/{number:03}.jpg" for number in range(300)]
        known = [{"category": "dress", "price": number} for number in range(300)]
        with Catalogue.open(folder / "shop.db", FakeEmbedder()) as shop:
            shop.add_embeddings(names, embeddings, known)

    def read(self, folder):
        with Catalogue.open(folder / "shop.db", FakeEmbedder(), create=False) as shop:
            items = [tuple(item) for item in shop.items()]
            found = [shop.find(number, 5) for number in range(1, 301, 10)]
            embeddings = shop.gallery.embeddings.tobytes()
            near = [[(one.id, one.distance) for one in answer] for answer in found]
            return {"near": near, "items": items, "embeddings": embeddings}

    def same(self, before, after, told):
        return after == before


def arrays_of(arrays):
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


def outcome(kind, folder, before):
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            after = kind.read(folder)
        except InputError as error:
            return "refused" if len(str(error)) < 2_000 else "a long refusal"
        except Exception:
            return "TRACEBACK\n" + traceback.format_exc()
    if not kind.same(before, after, told.getvalue()):
        return "SILENTLY OTHER"
    return "whole, and told" if told.getvalue().strip() else "whole"


def campaign(kind, count, rng):
    counts = Counter()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "data").mkdir()
        kind.make(root / "thing", root / "data")
        before = kind.read(root / "thing")
        for number in range(count):
            copy = root / f"copy-{number}"
            shutil.copytree(root / "thing", copy)
            files = sorted(path for path in copy.rglob("*") if path.is_file())
            path = files[rng.integers(len(files))]
            damage = DAMAGES[rng.integers(len(DAMAGES))]
            damage(path, rng, files)
            found = outcome(kind, copy, before)
            counts[found.splitlines()[0]] += 1
            if found[0].isupper():
                print(f"{type(kind).__name__} {number}: {damage.__name__} of "
                      f"{path.relative_to(copy)}: {found}", flush=True)  # fmt: skip
            shutil.rmtree(copy)
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="damages of each kind of thing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["Run", "Exported", "Prepared", "Shop"])
    flags = parser.parse_args()
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch_tiny_models(patch)
        for kind in (Run(), Exported(), Prepared(), Shop()):
            if flags.only in (None, type(kind).__name__):
                rng = np.random.default_rng(flags.seed)
                results[type(kind).__name__] = campaign(kind, flags.count, rng)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
