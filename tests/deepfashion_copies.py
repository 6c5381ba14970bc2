"""Tiny copies of DeepFashion's three benchmarks: drawn images, lists with every quirk.

python tests/deepfashion_copies.py FOLDER

Nothing in them is DeepFashion's but the format: headers, padding with spaces and zeros, ragged
landmarks, ``comsumer`` and the names of a few categories.
"""

import io
import sys
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

# What the copies hold; tests compare with these.
INSHOP_ROWS = (
    # Path without img/, status, type of clothes. Of the items in train, 3 has one image.
    ("WOMEN/Dresses/id_00000001/02_1_front.jpg", "train", 3),
    ("WOMEN/Dresses/id_00000001/02_3_back.jpg", "train", 3),
    ("WOMEN/Dresses/id_00000001/03_1_front.jpg", "train", 3),
    ("MEN/Tees_Tanks/id_00000002/01_1_front.jpg", "train", 1),
    ("MEN/Tees_Tanks/id_00000002/01_2_side.jpg", "train", 1),
    ("WOMEN/Denim/id_00000003/01_4_full.jpg", "train", 2),
    ("MEN/Denim/id_00000004/01_1_front.jpg", "train", 2),
    ("MEN/Denim/id_00000004/02_7_additional.jpg", "train", 2),
    ("WOMEN/Dresses/id_00000005/01_1_front.jpg", "query", 3),
    ("WOMEN/Dresses/id_00000005/01_2_side.jpg", "gallery", 3),
    ("MEN/Tees_Tanks/id_00000006/01_1_front.jpg", "query", 1),
    ("MEN/Tees_Tanks/id_00000006/04_3_back.jpg", "gallery", 1),
    ("WOMEN/Denim/id_00000007/01_6_flat.jpg", "gallery", 2),
    ("WOMEN/Denim/id_00000007/01_1_front.jpg", "query", 2),
    ("MEN/Denim/id_00000008/01_1_front.jpg", "query", 2),
    ("MEN/Denim/id_00000008/01_3_back.jpg", "gallery", 2),
)
PAIRS = (
    # Two consumers share a shop's image; a row is there twice; item 3 has two shop images.
    ("TOPS/T_Shirt/id_00000001", "comsumer_01", "shop_01", "train"),
    ("TOPS/T_Shirt/id_00000001", "comsumer_02", "shop_01", "train"),
    ("TOPS/T_Shirt/id_00000001", "comsumer_02", "shop_01", "train"),
    ("DRESSES/Dress/id_00000002", "comsumer_01", "shop_01", "train"),
    ("TROUSERS/Jeans/id_00000003", "comsumer_01", "shop_01", "val"),
    ("TROUSERS/Jeans/id_00000003", "comsumer_01", "shop_02", "val"),
    ("DRESSES/Dress/id_00000004", "comsumer_01", "shop_01", "test"),
    ("DRESSES/Dress/id_00000004", "comsumer_02", "shop_01", "test"),
)
CATEGORIES = (("Blouse", 1), ("Cape", 3), ("Jeans", 2))  # Cape is empty, as Cape is
ATTRIBUTES = (("abstract chevron print", 1), ("cotton", 2), ("a-line", 3), ("cotton", 5))
FOLDERS = {"Sheer_Pleated-Front_Blouse": 1, "Slim_Jeans": 3, "Paisley_Blouse": 1}
CLOTHES = {1: 6, 2: 4, 3: 8}  # type: number of landmarks

LOW, HIGH = 256, (750, 1101)
GARMENT, GROUND = (30, 60, 200), (235, 235, 225)  # RGB


def drawn(width, height, box, number):
    """RGB [h, w, 3]: a garment of one colour that fills ``box``, and a ground with its number."""
    image = np.full((height, width, 3), GROUND, np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = GARMENT
    # Bars in a corner, so that no two images are the same.
    for bit in range(9):
        if number >> bit & 1:
            image[2:8, 2 + 6 * bit : 6 + 6 * bit] = 0
    return image


def save(path, image, quality=95):
    path.parent.mkdir(parents=True, exist_ok=True)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    path.write_bytes(cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), options)[1])


def padded(image, side=LOW):
    """Shrunk into a square and centred on white, as In-shop's low resolution is."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = round(width * scale), round(height * scale)
    square = np.full((side, side, 3), 255, np.uint8)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    square[top : top + size[1], left : left + size[0]] = small
    return square


def write_list(path, rows, columns, announced=None):
    """A list: its count, its columns, rows padded to 70 characters with spaces at their ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [str(len(rows) if announced is None else announced), *([columns] if columns else [])]
    lines += [f"{row[0]:<70} {'  '.join(map(str, row[1:]))}      " for row in rows]
    path.write_text("\n".join(lines) + "\n")


def low_box(box, size, side=LOW):
    """In pixels of the padded image, rounded outwards by less than one."""
    scale = side / max(size)
    offset = [(side - length * scale) / 2 for length in size]
    return [round(value * scale + offset[i % 2]) for i, value in enumerate(box)]


def landmarks(kind, box):
    """Triples of visibility, x and y: 4, 6 or 8 of them, by the type of clothes."""
    x1, y1, x2, y2 = box
    points = [(x1 + i * (x2 - x1) // 8, y1 + i * (y2 - y1) // 8) for i in range(CLOTHES[kind])]
    return [f"{i % 3} {x:03d} {y:03d}" for i, (x, y) in enumerate(points)]


LANDMARK_COLUMNS = "image_name clothes_type variation_type " + " ".join(
    f"landmark_visibility_{i} landmark_location_x_{i} landmark_location_y_{i}" for i in range(1, 9)
)


def inshop_box(number):
    """The garment in pixels of the high resolution."""
    return 150 + 20 * number, 100 + 10 * number, 620, 1000 - 15 * number


def write_inshop(root, highres=True):
    """16 images of 8 items, 256 x 256 and 750 x 1101."""
    boxes, marks, partition = [], [], []
    for number, (name, status, kind) in enumerate(INSHOP_ROWS):
        high = drawn(*HIGH, inshop_box(number), number + 1)
        save(root / "Img" / "img" / name, padded(high))
        if highres:
            save(root / "Img" / "img_highres" / name, high)
        box = low_box(inshop_box(number), HIGH)
        boxes.append((f"img/{name}", kind, 1, *(f"{value:03d}" for value in box)))
        marks.append((f"img/{name}", kind, 1, *landmarks(kind, box)))
        partition.append((f"img/{name}", name.split("/")[2], status))
    # One box leaves the image; one is empty.
    boxes[1] = (*boxes[1][:3], "-04", "010", "300", "250")
    boxes[4] = (*boxes[4][:3], "100", "020", "100", "200")
    columns = "image_name  clothes_type  pose_type  x_1  y_1  x_2  y_2"
    write_list(root / "Anno" / "list_bbox_inshop.txt", boxes, columns)
    write_list(root / "Anno" / "list_landmarks_inshop.txt", marks, LANDMARK_COLUMNS)
    items = sorted({(row[1],) for row in partition})
    write_list(root / "Anno" / "list_item_inshop.txt", items, "")
    columns = "image_name item_id evaluation_status"
    write_list(root / "Eval" / "list_eval_partition.txt", partition, columns)


def write_consumer2shop(root):
    """11 images of 4 items in 8 rows of pairs; long side 300."""
    names = {}
    for folder, consumer, shop, _ in PAIRS:
        names |= {f"img/{folder}/{consumer}.jpg": 2, f"img/{folder}/{shop}.jpg": 1}
    boxes, marks = [], []
    for number, (name, source) in enumerate(names.items()):
        box = 40 + number, 50, 150, 260 - number
        save(root / "Img" / name, drawn(200, 300, box, number + 101))
        kind = {"TOPS": 1, "TROUSERS": 2, "DRESSES": 3}[name.split("/")[1]]
        boxes.append((name, kind, source, *(f"{value:03d}" for value in box)))
        marks.append((name, kind, 1, *landmarks(kind, box)))
    columns = "image_name clothes_type source_type x_1 y_1 x_2 y_2"
    write_list(root / "Anno" / "list_bbox_consumer2shop.txt", boxes, columns)
    write_list(root / "Anno" / "list_landmarks_consumer2shop.txt", marks, LANDMARK_COLUMNS)
    items = sorted({(folder.split("/")[2],) for folder, *_ in PAIRS})
    write_list(root / "Anno" / "list_item_consumer2shop.txt", items, "")
    pairs = [
        (f"img/{folder}/{consumer}.jpg", f"img/{folder}/{shop}.jpg", folder.split("/")[2], status)
        for folder, consumer, shop, status in PAIRS
    ]
    columns = "image_pair_name_1 image_pair_name_2 item_id evaluation_status"
    write_list(root / "Eval" / "list_eval_partition.txt", pairs, columns)


def write_category(root, folders=FOLDERS, statuses=("train", "train", "val", "test")):
    """12 images in 3 folders, of 3 categories of which one is empty; long side 300."""
    boxes, marks, labels, attributes, partition = [], [], [], [], []
    number = 200
    for folder, category in folders.items():
        for index, status in enumerate(statuses, 1):
            number += 1
            name = f"img/{folder}/img_{index:08d}.jpg"
            box = 30, 20 + number % 9, 170, 280
            image = drawn(200, 300, box, number)
            save(root / "Img" / name, image)
            if index == 2:  # grey blouses, CMYK jeans
                encoding = "L" if category == 1 else "CMYK"
                file = io.BytesIO()
                Image.fromarray(image).convert(encoding).save(file, "JPEG", quality=95)
                (root / "Img" / name).write_bytes(file.getvalue())
            kind = 2 if category == 3 else 1
            boxes.append((name, *(f"{value:03d}" for value in box)))
            marks.append((name, kind, 1, *landmarks(kind, box)))
            labels.append((name, category))
            attributes.append((name, *(f"{1 if number >> i & 1 else -1:2d}" for i in range(4))))
            partition.append((name, status))
    anno = root / "Anno_coarse"
    write_list(anno / "list_category_cloth.txt", CATEGORIES, "category_name  category_type")
    write_list(anno / "list_category_img.txt", labels, "image_name  category_label")
    write_list(anno / "list_attr_cloth.txt", ATTRIBUTES, "attribute_name  attribute_type")
    write_list(anno / "list_attr_img.txt", attributes, "image_name  attribute_labels")
    write_list(anno / "list_bbox.txt", boxes, "image_name  x_1  y_1  x_2  y_2")
    write_list(anno / "list_landmarks.txt", marks, LANDMARK_COLUMNS)
    columns = "image_name  evaluation_status"
    write_list(root / "Eval" / "list_eval_partition.txt", partition, columns)
    # The fine lists have the same names; whoever reads them here gets nonsense.
    for name in ("list_category_img.txt", "list_attr_img.txt", "list_bbox.txt"):
        write_list(
            root / "Anno_fine" / name, [("img/fine/img_00000001.jpg", 7)], "image_name  fine"
        )


WRITERS = {
    "In-shop Clothes Retrieval Benchmark": write_inshop,
    "Consumer-to-shop Clothes Retrieval Benchmark": write_consumer2shop,
    "Category and Attribute Prediction Benchmark": write_category,
}

if __name__ == "__main__":
    for title, write in WRITERS.items():
        write(Path(sys.argv[1]) / title)
