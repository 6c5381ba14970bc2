"""From photos, ids and embeddings to neighbours, beside loops in float64."""

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from brute_force import brute_force
from fakes import FakeEmbedder, write_photo, write_photos

from cbam_jax import InputError
from cbam_jax.catalogue import Catalogue
from cbam_jax.catalogue.gallery import Gallery, cache_path, open_gallery
from cbam_jax.data.images import Preprocessing, cut_file


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The twelve photos of a folder, in its order."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return sorted(folder.glob("*/*"))


@pytest.fixture(scope="module")
def embeddings(photos):
    return FakeEmbedder().embed_files(photos).embeddings


@pytest.fixture
def shop(photos, tmp_path):
    with Catalogue.open(tmp_path / "shop.db", FakeEmbedder()) as catalogue:
        catalogue.add(photos[0].parent.parent, progress=False)
        yield catalogue


def pairs(found):
    return [(n.id, n.distance) for n in found]


def expected(query, embeddings, k, left=range(12)):
    left = np.array(left)
    distances, places = brute_force([query], embeddings[left], k)
    return list(zip((left[places[0]] + 1).tolist(), distances[0].tolist(), strict=True))


def test_by_file_bytes_and_embedding(shop, photos, embeddings):
    wanted = expected(embeddings[3], embeddings, 6)  # The own photo is beside the 5.
    assert pairs(shop.find(str(photos[3]), k=5, copies=True)) == wanted
    assert pairs(shop.find(photos[3].read_bytes(), k=5, copies=True)) == wanted
    assert pairs(shop.find(embeddings[3], k=6)) == wanted
    assert len(shop.find(photos[3], k=99)) == 12


def test_what_is_asked_for_by_id_is_left_out_and_needs_no_model(shop, embeddings):
    left = [i for i in range(12) if i != 6]
    count = shop.embedder.embedded
    assert pairs(shop.find(7, k=5)) == expected(embeddings[6], embeddings, 5, left)
    assert len(shop.find(7, k=12)) == 11
    assert shop.embedder.embedded == count


def test_only_what_a_filter_passes_exactly(shop, embeddings):
    hats = range(6, 12)
    for where in ("category=hat", ["category!=dress"], {"category": "hat"}):
        assert pairs(shop.find(embeddings[0], k=4, where=where)) == expected(
            embeddings[0], embeddings, 4, hats
        )
    with pytest.raises(InputError, match=r"category=coat: no photo has that; .*dress.*hat"):
        shop.find(embeddings[0], where="category=coat")
    assert shop.find(embeddings[0], where=["category=hat", "category=dress"]) == []
    with pytest.raises(InputError, match=r"no photo has 'price'; there are .*category"):
        shop.find(embeddings[0], where=["category=hat", "price!=5"])


def test_a_box_and_a_distance(shop, photos, embeddings):
    boxed = FakeEmbedder().embed_files([photos[2]], boxes=[[5, 5, 30, 20]]).embeddings[0]
    found = shop.find(photos[2], k=12, box=[5, 5, 30, 20], copies=True)
    assert pairs(found) == expected(boxed, embeddings, 12)
    limit = found[4].distance
    near = shop.find(photos[2], k=12, box=[5, 5, 30, 20], max_distance=limit, copies=True)
    assert pairs(near) == pairs(found)[:5]


def test_several_photos_as_one_query_and_what_it_is_to_be_unlike(shop, photos, embeddings):
    x = embeddings.astype(np.float64)
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    length = np.linalg.norm(x[[1, 4]], axis=1).mean()
    for unlike, away in (([], 0.0), ([9, photos[10]], 0.5 * (units[8] + units[10]) / 2)):
        direction = (units[1] + units[4]) / 2 - away
        query = (direction * length / np.linalg.norm(direction)).astype(np.float32)
        left = [i for i in range(12) if i not in (1, 4) and (i != 8 or not unlike)]
        found = shop.find([2, photos[4]], k=6, unlike=unlike, copies=True)
        others = [n.id for n in found if not n.same]
        assert others == [i for i, _ in expected(query, embeddings, 6, left)]
        assert {n.id for n in found if n.same} <= {5}


def test_several_queries_at_once_are_each_alone(shop, photos):
    asked = [[photos[0]], [5], [photos[3], 8]]
    assert shop.find_all(asked, k=4) == [shop.find(parts, k=4) for parts in asked]
    # More photos are embedded as a batch, those with a box apart.
    asked = [[photo] for photo in photos]
    boxes = [[[4, 4, 30, 20]] if row % 3 else None for row in range(12)]
    alone = [shop.find(photo, k=4, box=box and box[0]) for photo, box in
             zip(photos, boxes, strict=True)]  # fmt: skip
    assert shop.find_all(asked, k=4, boxes=boxes) == alone
    with pytest.raises(InputError, match="nowhere.jpg"):
        shop.find_all([*asked, ["nowhere.jpg"]], k=4)


def test_ties_come_by_id(shop, photos, tmp_path):
    shutil.copytree(photos[0].parent, tmp_path / "copies")
    shop.add([tmp_path / "copies"], progress=False)
    found = shop.find(photos[2], k=2, copies=True)
    assert [(n.id, n.distance, n.same) for n in found[:2]] == [(3, 0, True), (15, 0, True)]
    assert [n.same for n in found[2:]] == [False, False]  # Both are beside the two.


def test_of_copies_the_path_that_is_asked_for_is_told(shop, photos, tmp_path, monkeypatch):
    for name in "abc":
        shutil.copy(photos[2], tmp_path / f"{name}.png")
        shop.add([tmp_path / f"{name}.png"], {"name": name}, progress=False)
    first = shop.find(photos[2], k=1)
    assert first[0][:4] == (3, str(photos[2]), {"category": "dress"}, 0.0)
    monkeypatch.chdir(tmp_path)
    for query in ("b.png", "../" + tmp_path.name + "/b.png", Path("b.png")):
        found = shop.find(query, k=1)
        assert found[0][:4] == (14, str(tmp_path / "b.png"), {"name": "b"}, 0.0)
        assert found[0].same
        assert [copy.id for copy in found[0].copies] == [3, 13, 15]
        assert found[1:] == first[1:]
    # One that a filter leaves out is not told, and bytes have no path.
    assert shop.find("b.png", k=1, where="category=dress")[0].id == 3
    assert shop.find(Path("b.png").read_bytes(), k=1) == first
    assert [n.id for n in shop.find("b.png", k=1, copies=True)[:4]] == [3, 13, 14, 15]


def folded(rows, embeddings, query, own, k, shown):
    """Of what brute force finds the first of each content; own is told and not counted."""
    answer, seen = [], set()
    for number, distance in expected(query, embeddings, len(embeddings), range(len(embeddings))):
        content = rows[number - 1]
        if content in seen or number not in shown:
            continue
        seen.add(content)
        same = content == own
        others = [i for i in shown if rows[i - 1] == content and i != number]
        answer.append((number, distance, others, same))
        if sum(not row[3] for row in answer) == k:
            break
    return answer


def told(found):
    return [(n.id, n.distance, [copy.id for copy in n.copies], n.same) for n in found]


def test_copies_are_one_and_the_own_photo_is_told_beside_k(shop, photos, tmp_path):
    rng = np.random.default_rng(4)
    (tmp_path / "copies").mkdir()
    for i, row in enumerate(rng.integers(0, 6, 40)):
        shutil.copy(photos[row], tmp_path / "copies" / f"{i:02}{photos[row].suffix}")
    shop.add([tmp_path / "copies"], {"season": "old"}, progress=False)
    rows = [Path(item.path).read_bytes() for item in shop.items()]
    made = FakeEmbedder().embed_files(rows).embeddings
    every, old = list(range(1, 53)), list(range(13, 53))
    outside = write_photo(tmp_path / "outside.png", 77)
    for query in (photos[1], photos[8], outside):
        content = query.read_bytes()
        embedding = FakeEmbedder().embed_file(query)
        for k in (1, 3, 11, 99):
            wanted = folded(rows, made, embedding, content, k, every)
            assert told(shop.find(query, k=k)) == told(shop.find(content, k=k)) == wanted
        wanted = folded(rows, made, embedding, content, 4, old)
        assert told(shop.find(query, k=4, where="season=old")) == wanted
    # By id: itself is told where it has copies, and only then.
    first = next(i for i in old if rows[i - 1] == rows[0])
    found = shop.find(1, k=3)
    assert (found[0].id, found[0].same, 1 in [c.id for c in found[0].copies]) == (
        1,
        True,
        False,
    )
    assert first in [c.id for c in found[0].copies]
    assert len(found) == 4
    assert not any(n.same for n in found[1:])
    # Several at once, of which some have to look farther than others.
    asked = [[1], [photos[8]], [3], [outside], [14, 30]]
    for options in ({"k": 3}, {"k": 2, "where": "season=old"}):
        at_once = shop.find_all(asked, **options)
        assert at_once == [shop.find(parts, **options) for parts in asked]
    assert len(shop.find_all(asked, k=3)[1]) == 4


def test_what_is_told_of_all_results_is_asked_at_once(shop, embeddings, monkeypatch):
    assert len(shop.gallery) == 12  # Opened.
    asked, rows = [], shop.store.rows
    monkeypatch.setattr(shop.store, "rows", lambda sql, *a: asked.append(sql) or rows(sql, *a))
    counts = []
    for queries in (embeddings[:1], embeddings):
        asked.clear()
        assert all(len(found) == 5 for found in shop.find_all([[one] for one in queries], k=5))
        counts.append(sum("FROM item" in sql for sql in asked))
    assert counts == [2, 2]  # The rows and their copies.


@pytest.mark.parametrize("copies", [0, 3])
def test_one_search_is_enough_where_the_querys_own_photo_is_there(
    shop, photos, tmp_path, monkeypatch, copies
):
    for i in range(copies):
        shutil.copy(photos[2], tmp_path / f"{i}.png")
        shop.add(tmp_path / f"{i}.png", progress=False)
    asked, nearest = [], Gallery.nearest
    monkeypatch.setattr(Gallery, "nearest", lambda *a: asked.append(a[2]) or nearest(*a))
    for query in (str(photos[2]), photos[2].read_bytes(), 3):
        for told_apart in (False, True):
            asked.clear()
            found = shop.find(query, k=4, copies=told_apart)
            assert asked == [5 + copies]
            assert sum(not n.same for n in found) == 4
    asked.clear()
    shop.find_all([[str(photos[2])], [3], [3, photos[2]]], k=4)
    assert asked == [5 + copies]


def test_a_part_of_the_querys_photo_is_the_same_photo(shop, photos, tmp_path):
    table = tmp_path / "parts.csv"
    copy = shutil.copy(photos[0], tmp_path / "copy.png")
    table.write_text(f"path,x1,y1,x2,y2\n{copy},5,6,30,31\n")
    shop.add(table, progress=False)
    found = shop.find(photos[0], k=99)
    assert [n.id for n in found if n.same] == [1, 13]
    assert not any(n.copies for n in found)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (99, "no photo 99"),
        ("nowhere.jpg", "nowhere.jpg"),
        (b"no picture", "cannot be decoded"),
        (np.zeros(7, np.float32), "float32 \\[48\\]"),
        (np.full(48, np.nan, np.float32), "NaN"),
        (1.5, "is no query"),
        ([1, np.float32([0] * 48)], None),
    ],
)
def test_a_query_that_cannot_be_is_told(shop, query, message):
    if message is None:
        assert len(shop.find(query)) == 11
        return
    with pytest.raises(InputError, match=message):
        shop.find(query)


def test_the_embeddings_are_kept_beside_and_made_anew_when_they_are_others(shop, photos, tmp_path):
    before = shop.find(2, k=3)
    kept = cache_path(tmp_path / "shop.db")
    assert isinstance(open_gallery(shop.store).embeddings, np.memmap)
    state = kept.stat().st_mtime_ns
    assert shop.find(2, k=3) == before
    assert kept.stat().st_mtime_ns == state
    with Catalogue.open(tmp_path / "shop.db") as other:
        other.remove([before[0].id])
    assert pairs(shop.find(2, k=2)) == pairs(before)[1:]
    # As many photos, and another embedding.
    other = FakeEmbedder().embed_files([photos[0]]).embeddings
    with Catalogue.open(tmp_path / "shop.db", FakeEmbedder()) as fresh:
        fresh.add_embeddings([before[1].path], other)
    assert shop.find(before[1].id, k=1)[0].distance == 0
    after = pairs(shop.find(2, k=2))
    for damaged in (b"", b"{}", kept.read_bytes()[:-4], os.urandom(9000)):
        kept.write_bytes(damaged)
        assert pairs(Catalogue(shop.store).find(2, k=2)) == after
    assert sorted(file.name for file in tmp_path.glob("*-emb*")) == [kept.name]


def test_where_the_embeddings_cannot_be_kept_they_are_read(shop, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cbam_jax.catalogue.gallery._keep", full)
    assert len(shop.find(2, k=3)) == 3
    assert not cache_path(tmp_path / "shop.db").exists()


def test_an_empty_catalogue_says_how_to_fill_it(tmp_path):
    with Catalogue.open(tmp_path / "shop.db", FakeEmbedder()) as shop:
        with pytest.raises(InputError, match="cbam-jax catalogue add"):
            shop.find(1)
        cv2.imwrite(str(tmp_path / "one.png"), np.zeros((9, 9, 3), np.uint8))
        shop.add(tmp_path / "one.png", progress=False)
        assert [n.id for n in shop.find(tmp_path / "one.png")] == [1]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e17, 3e38])
def test_embeddings_that_no_model_makes_are_a_damage(shop, number):
    row = np.full(48, 0.5, np.float32)
    row[7] = number
    with shop.store.transaction():
        shop.store.run("UPDATE item SET embedding = ? WHERE id = 5", [row.tobytes()])
    told = pytest.raises(InputError, match=r"damaged .*the embedding of photo 5 is none.*a copy")
    with told:
        shop.find(1)
    with pytest.raises(InputError, match="beyond 1e"):
        shop.add_embeddings(["x"], row[None])


def test_a_photo_that_is_lost_though_nobody_removed_it_is_a_damage(shop):
    shop.find(1)
    with shop.store.transaction(revised=False):
        shop.store.run("DELETE FROM item WHERE id = 5")
    with pytest.raises(InputError, match="damaged"):
        shop.find(1)
    with shop.store.transaction(revised=False):
        shop.store.run("UPDATE item SET payload = '{' WHERE id = 2")
    with pytest.raises(InputError, match="what is known of photo 2 is no JSON"):
        shop.item(2)


def test_a_box_outside_its_photo_is_told_with_the_photos_size(shop, photos, tmp_path):
    class Cuts(FakeEmbedder):
        def embed_file(self, path, *, box=None):
            return cut_file(Path(path).read_bytes(), Preprocessing(14), box=box, name="image 0")

    with Catalogue.open(tmp_path / "shop.db", Cuts()) as cutting:
        told = r"\[900.0, .* no pixel of an image of 40 x 52; give another --box"
        with pytest.raises(InputError, match=told):
            cutting.find(photos[0], box=[900, 900, 950, 950])
