"""Loading batches beside PyTorch's DataLoader, with the same augmentations.

    python benchmarks/torch_data.py --data ./photos/ [--workers 0 2] [--output FILE]

Needs ``pip install torch torchvision``. The peers are what its users write: a Dataset that decodes
an image and applies torchvision's transforms (v2), RandomResizedCrop with our scale and ratio,
RandomHorizontalFlip and, with ``--color_jitter``, ColorJitter without hue.

* torch_pillow: decoded by Pillow, cropped and resized there, then PILToTensor
* torch_opencv: decoded by OpenCV, as here, cropped and resized as a uint8 tensor

All deliver shuffled uint8 batches of the same size from the same files, and neither OpenCV nor
torch uses threads of its own. Loaders take turns within each repeat and rest while another is
measured. ``images_per_second_per_core`` divides by the CPU seconds of the process and its workers,
which other programs disturb less than the wall clock. With no workers ours loads in threads, one a
core, and the DataLoader in the process that asks: compare them by core then, and by the wall clock
with workers. ``speed_over`` is ours over theirs within a repeat. The last line on stdout is JSON.
"""

import argparse
import datetime
import importlib
import io
import itertools
import json
import os
import pathlib
import platform
import sys
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.torchvision_stubs import import_torchvision
from cbam_jax import InputError, benchmark
from cbam_jax.datasets import RetrievalDataset, decode_image

torchvision = import_torchvision()
v2 = importlib.import_module("torchvision.transforms.v2")


class Photos(torch.utils.data.Dataset):
    """The dataset that a user of torchvision writes."""

    def __init__(self, dataset: RetrievalDataset, decoder: str, size: int, jitter: float) -> None:
        self.dataset, self.decoder = dataset, decoder
        transforms = [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), antialias=True),
            v2.RandomHorizontalFlip(),
        ]
        if jitter:
            transforms.append(v2.ColorJitter(jitter, jitter, jitter))
        if decoder == "pillow":
            transforms.append(v2.PILToTensor())
        self.transform = v2.Compose(transforms)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        encoded = self.dataset.encoded(index)
        if self.decoder == "pillow":
            image = Image.open(io.BytesIO(encoded)).convert("RGB")
        else:
            image = torch.from_numpy(decode_image(encoded)).permute(2, 0, 1)
        return self.transform(image), int(self.dataset.label[index])


def torch_batches(photos: Photos, batch_size: int, workers: int) -> Iterator:
    sampler = torch.utils.data.RandomSampler(photos, replacement=True, num_samples=10**7)
    return iter(
        torch.utils.data.DataLoader(
            photos, batch_size, sampler=sampler, num_workers=workers, drop_last=True
        )
    )


def compare(dataset: RetrievalDataset, options: argparse.Namespace, workers: int) -> dict:
    size, batch_size, jitter = options.image_size, options.batch_size, options.color_jitter
    ours = benchmark.our_batches(
        dataset, image_size=size, batch_size=batch_size, workers=workers, color_jitter=jitter
    )
    # The peers first: their workers are forked, which is no good beside running threads.
    loaders: dict[str, Iterator] = {
        f"torch_{decoder}": torch_batches(
            Photos(dataset, decoder, size, jitter), batch_size, workers
        )
        for decoder in ("pillow", "opencv")
    } | {"ours": ours}
    for loader in loaders.values():
        next(loader)
    times: dict[str, list] = {name: [] for name in loaders}
    ahead = benchmark.lie_ready(workers)
    for _, (name, loader) in itertools.product(range(options.repeats), loaders.items()):
        times[name].append(benchmark.loading(loader, options.count, ahead))
    ours.close()
    peers = [name for name in loaders if name != "ours"]
    return {
        **{name: benchmark.loading_rates(times[name], batch_size) for name in loaders},
        "speed_over": {
            name: {
                "per_core": ratios(times, name, "cpu_ms"),
                "by_the_wall_clock": ratios(times, name, "wall_ms"),
            }
            for name in peers
        },
    }


def ratios(times: dict[str, list], peer: str, clock: str) -> dict[str, float]:
    pairs = zip(times[peer], times["ours"], strict=True)
    return benchmark.spread([theirs[clock] / ours[clock] for theirs, ours in pairs])


def describe(dataset: RetrievalDataset) -> dict:
    some = range(0, len(dataset), max(1, len(dataset) // 200))
    sizes = np.array([decode_image(dataset.encoded(index)).shape[:2] for index in some])
    return {
        "source": "/".join(pathlib.Path(dataset.name).parts[-2:]),
        "split": dataset.split,
        "count": len(dataset),
        "median_height": int(np.median(sizes[:, 0])),
        "median_width": int(np.median(sizes[:, 1])),
        "median_bytes": int(np.median([len(dataset.encoded(index)) for index in some])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", metavar="NAME", help="as data.name; default: synthetic photos")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="processes")
    parser.add_argument("--color_jitter", type=float, default=0.0, help="strength")
    parser.add_argument("--count", type=int, default=4, help="batches of each loader in a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--machine", default=f"{os.cpu_count()}-core {platform.machine()} CPU")
    parser.add_argument("--output", type=pathlib.Path, help="write the JSON document here too")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        dataset = benchmark.photo_dataset(options.data, options.split)
        results = {str(workers): compare(dataset, options, workers) for workers in options.workers}
    except InputError as error:
        parser.error(str(error))
    report = {
        "benchmark": "torch_data",
        "date": datetime.date.today().isoformat(),
        "machine": options.machine,
        "versions": {
            "python": platform.python_version(),
            "opencv": cv2.__version__,
            "numpy": np.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": Image.__version__,
        },
        "images": describe(dataset),
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "color_jitter": options.color_jitter,
        "count": options.count,
        "repeats": options.repeats,
        "by_workers": results,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
