"""Drawn garments before real backgrounds, with their boxes: for where a model looks.

python benchmarks/garments_on_photos.py PHOTOS.csv FOLDER [--number=96] [--size=192]

For each photo that is drawn, a garment of `synthetic_garments` (the 16 categories in turn, laid out
as for a shop) is cut out along its outline and laid at a random place over a corner of a test photo
of PHOTOS.csv, two fifths of the photo's sides, enlarged: floors, walls and beds rather than the
garment in the middle. FOLDER gets the images and manifest.csv with the boxes, all in the split
test, for `python evaluate.py --workdir=RUN --data=FOLDER/manifest.csv --focus`.
"""

import argparse
import csv
import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from cbam_jax import command_line
from cbam_jax.datasets import decode_image, open_dataset
from cbam_jax.datasets.garments import CATEGORIES, draw_garment

_CORNER = 0.4  # of the photo's sides
_GARMENT = (0.6, 0.85)  # side of the drawing over the image's


def background(photo: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A corner of a photo, uint8 [size, size, 3]."""
    side = int(_CORNER * min(photo.shape[:2]))
    top, left = (rng.choice([0, length - side]) for length in photo.shape[:2])
    return cv2.resize(photo[top : top + side, left : left + side], (size, size))


def lay(
    behind: np.ndarray, category: str, item: int, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Lay a drawn garment over a background; the image and the garment's box."""
    size = behind.shape[0]
    side = int(size * rng.uniform(*_GARMENT))
    drawn = draw_garment(seed=0, category=category, item=item, view=0, image_size=side)
    top, left = rng.integers(0, size - side + 1, 2)
    image = behind.copy()
    image[top : top + side, left : left + side][drawn["mask"]] = drawn["image"][drawn["mask"]]
    x1, y1, x2, y2 = drawn["bbox"].astype(int).tolist()
    return image, (left + x1, top + y1, left + x2, top + y2)


def main() -> int:
    """Draw the images and write the manifest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos")
    parser.add_argument("folder", type=command_line.path)
    parser.add_argument("--number", type=int, default=96)
    parser.add_argument("--size", type=int, default=192)
    flags = parser.parse_args()
    photos, rng = open_dataset(flags.photos, "test"), np.random.default_rng(0)
    flags.folder.mkdir(parents=True)
    chosen = rng.choice(len(photos), flags.number, replace=flags.number > len(photos))
    with (flags.folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "x1", "y1", "x2", "y2"])
        for number, row in enumerate(chosen):
            category = CATEGORIES[number % len(CATEGORIES)]
            behind = background(decode_image(photos.encoded(row)), flags.size, rng)
            image, box = lay(behind, category, number // len(CATEGORIES), rng)
            name = f"{category}-{number:04d}.jpg"
            cv2.imwrite(str(flags.folder / name), image[..., ::-1])
            writer.writerow([name, category, "test", *box])
    print(
        command_line.to_json({"images": flags.number, "manifest": f"{flags.folder}/manifest.csv"})
    )
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
