"""What becomes of the photos that a catalogue is given."""

import os
import shutil

import cv2
import numpy as np
import pytest
from fakes import FakeEmbedder, write_photo, write_photos

from cbam_jax import InputError
from cbam_jax.catalogue import Catalogue, indexing
from cbam_jax.datasets import open_dataset


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture
def shop(tmp_path):
    with Catalogue.open(tmp_path / "shop.db", FakeEmbedder()) as catalogue:
        yield catalogue


def content(shop):
    """Ids, paths, hashes, problems and embeddings."""
    return shop.store.rows("SELECT id, path, hash, problem, embedding FROM item ORDER BY id")


def add(shop, *sources, **options):
    added = shop.add(sources, progress=False, **options)
    return {kind: count for kind, count in added.counts.items() if count}, added.vanished


def test_a_folder_is_added_by_path_and_again_nothing_is_done(shop, photos):
    (photos / ".hidden.jpg").write_bytes(b"x")
    (photos / "notes.txt").write_text("x")
    assert add(shop, photos) == ({"new": 12}, [])
    items = list(shop.items())
    assert [item.path for item in items] == sorted(str(path) for path in photos.glob("*/*"))
    assert [item.payload["category"] for item in items] == ["dress"] * 6 + ["hat"] * 6
    embedded = np.frombuffer(content(shop)[3][4], np.float32)
    alone = shop.embedder.embed_files([items[3].path]).embeddings[0]
    np.testing.assert_array_equal(embedded, alone)
    count, before = shop.embedder.embedded, content(shop)
    assert add(shop, photos) == ({"unchanged": 12}, [])
    assert add(shop, photos, checksum=True) == ({"unchanged": 12}, [])
    assert shop.embedder.embedded == count
    assert content(shop) == before


def test_a_settled_file_is_not_read_again_unless_asked_for(shop, photos):
    files = sorted(photos.glob("*/*"))
    for file in files:
        os.utime(file, ns=(10**9, 10**9))
    add(shop, photos)
    write_photo(files[0], 99)
    size = files[0].stat().st_size
    shop.store.rows("UPDATE item SET size = ? WHERE id = 1", [size])
    os.utime(files[0], ns=(10**9, 10**9))
    assert add(shop, photos) == ({"unchanged": 12}, [])
    assert add(shop, photos, checksum=True) == ({"unchanged": 11, "changed": 1}, [])


def test_a_changed_photo_keeps_its_id_and_is_embedded_again(shop, photos):
    add(shop, photos)
    before = content(shop)
    file = sorted(photos.glob("*/*"))[4]
    write_photo(file, 77)
    assert add(shop, photos) == ({"unchanged": 11, "changed": 1}, [])
    after = content(shop)
    assert [row[:2] for row in after] == [row[:2] for row in before]
    assert [i for i in range(12) if after[i] != before[i]] == [4]
    assert shop.find(str(file), k=1)[0].distance == 0


def test_moved_photos_keep_their_ids_and_copies_are_told_from_them(shop, photos, tmp_path):
    add(shop, photos)
    before, count = content(shop), shop.embedder.embedded
    shutil.move(photos / "hat", tmp_path / "caps")
    assert add(shop, tmp_path / "caps", photos)[0] == {"unchanged": 6, "moved": 6}
    after = content(shop)
    assert [row[0] for row in after] == [row[0] for row in before]
    assert after[-1][1].startswith(str(tmp_path / "caps"))
    shutil.copytree(photos / "dress", tmp_path / "copies")
    assert add(shop, tmp_path / "copies") == ({"copies": 6}, [])
    assert [row[4] for row in content(shop)[12:]] == [row[4] for row in after[:6]]
    assert shop.embedder.embedded == count


def test_what_vanished_is_told_and_stays(shop, photos):
    add(shop, photos)
    gone = sorted(photos.glob("*/*"))[2]
    gone.unlink()
    assert add(shop, photos) == ({"unchanged": 11}, [str(gone)])
    assert len(shop) == 12
    # Also where a list still names it.
    assert add(shop, photos.parent / "photos" / "dress")[1] == [str(gone)]


def test_unreadable_photos_are_rows_with_the_reason(shop, photos):
    (photos / "a.jpg").write_bytes(b"no picture")
    (photos / "b.png").write_bytes(b"")
    os.mkfifo(photos / "c.jpg")  # In a folder it is passed over.
    assert add(shop, photos, photos / "c.jpg")[0] == {"new": 12, "unreadable": 3}
    problems = [item.problem for item in shop.items() if item.problem]
    assert problems == ["cannot be decoded (10 bytes)", "cannot be decoded (0 bytes)", "not a file"]
    count = shop.embedder.embedded
    assert add(shop, photos, photos / "c.jpg")[0] == {"unchanged": 12, "unreadable": 3}
    assert shop.embedder.embedded == count
    write_photo(photos / "a.jpg", 5)
    assert add(shop, photos)[0]["changed"] == 1
    assert len(shop) == 13


def test_a_name_that_is_not_utf_8_is_told(shop, photos):
    shutil.copy(next(photos.glob("*/*.jpg")), os.fsencode(photos) + b"/\xff.jpg")
    assert add(shop, photos)[0] == {"new": 12, "unreadable": 1}
    assert [item.problem for item in shop.items() if item.problem] == [
        "its name is not UTF-8: rename it"
    ]


def test_a_manifest_says_what_is_known_and_where_the_garment_is(shop, photos, tmp_path):
    files = sorted(photos.glob("*/*"))[:3]
    lines = ["path,category,price,article,x1,y1,x2,y2"]
    names = [file.relative_to(tmp_path) for file in files]
    lines += [f"{names[i]},dress,{9.5 + i},00{i},,,," for i in range(2)]
    lines += [f"{files[2]},hat,,7,4,6,30,28"]
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(lines))
    assert add(shop, manifest, payload={"shop": "north"}) == ({"new": 3}, [])
    payloads = [item.payload for item in shop.items()]
    assert payloads[1] == {"category": "dress", "price": 10.5, "article": "001", "shop": "north"}
    assert payloads[2] == {"category": "hat", "article": 7, "shop": "north"}
    boxed = shop.embedder.embed_files([files[2]], boxes=[[4, 6, 30, 28]]).embeddings[0]
    np.testing.assert_array_equal(np.frombuffer(content(shop)[2][4], np.float32), boxed)
    # Another price is written down and nothing is embedded; another box is.
    for file in files:
        os.utime(file, ns=(10**9, 10**9))
    add(shop, manifest)
    count = shop.embedder.embedded
    manifest.write_text("\n".join(lines).replace("10.5", "8").replace("30,28", "30,29"))
    assert add(shop, manifest)[0] == {"unchanged": 2, "changed": 1}
    assert next(shop.items("price<9")).id == 2
    assert shop.embedder.embedded == count + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label\nhat\n", "its first line must name the columns"),
        ("path,price\na.jpg\n", "row 2: it has 1 cells and the header 2"),
        ("path,price\n\n,3\n", "row 3: path is empty"),
        ("path,x1,y1,x2,y2\na.jpg,3,3,1,9\n", "row 2: --box=3,3,1,9 is empty"),
    ],
)
def test_a_manifest_that_cannot_be_is_told(shop, tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        add(shop, tmp_path / "list.csv")
    with pytest.raises(InputError, match="is not there"):
        add(shop, tmp_path / "none")


def test_all_mistakes_of_a_manifest_are_told_at_once(shop, photos, tmp_path, capsys):
    file = min(photos.glob("*/*")).relative_to(tmp_path)
    lines = ["path,price,size", f"{file},9.5,M", "nope.jpg,8,38", ",7,L", f"{file},abc,", "a.jpg"]
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        add(shop, manifest)
    assert str(caught.value) == (
        f"{manifest} has 3 mistakes: "
        "row 3: there is no file nope.jpg: correct it or remove the row; "
        "row 4: path is empty: fill it or remove the row; "
        "row 6: it has 1 cells and the header 3: fill it up or remove it, and put quotes around "
        "text that holds a comma"
    )
    # Sizes are numbers and letters; a price is a number.
    assert capsys.readouterr().err == (
        f"{manifest}: column price has 3 numbers, and texts: 'abc' in row 5\n"
    )
    manifest.write_text("\n".join(lines[:3]))  # Alone, a file that is not there is no mistake.
    assert add(shop, manifest)[0] == {"new": 1, "unreadable": 1}


def test_what_is_passed_over_is_told_as_in_a_dataset(shop, photos, capsys):
    hat = photos / "hat"
    for name in ("._IMG 1.jpg", ".DS_Store", "notes.txt"):
        (hat / name).write_bytes(b"x")
    (hat / "x.jpg").symlink_to("nowhere.jpg")
    (hat / ".thumbnails.jpg").mkdir()
    told = (
        f"{photos}: passed over: 1 .jpg that is a link to nothing (hat/x.jpg), 1 .txt, "
        "1 hidden .jpg (hat/._IMG 1.jpg)\n"
    )
    assert add(shop, photos) == ({"new": 12}, [])
    assert capsys.readouterr().err == told
    assert len(open_dataset(f"{photos}/", "all")) == 12
    assert capsys.readouterr().err == told


def test_batches_do_not_show(shop, photos, tmp_path, monkeypatch):
    add(shop, photos)
    monkeypatch.setattr(indexing, "BATCH", 5)
    with Catalogue.open(tmp_path / "other.db", FakeEmbedder()) as other:
        add(other, photos)
        assert content(other) == content(shop)


def test_an_ended_run_loses_the_batch_under_way_alone(shop, photos, tmp_path, monkeypatch):
    add(shop, photos)
    monkeypatch.setattr(indexing, "BATCH", 5)

    class Ends(FakeEmbedder):
        def embed_files(self, paths, **options):
            if self.embedded >= 5:
                raise KeyboardInterrupt
            return super().embed_files(paths, **options)

    path = tmp_path / "other.db"
    with Catalogue.open(path, Ends()) as other, pytest.raises(KeyboardInterrupt):
        add(other, photos)
    with Catalogue.open(path, FakeEmbedder()) as other:
        assert len(other) == 5
        assert add(other, photos)[0] == {"unchanged": 5, "new": 7}
        assert content(other) == content(shop)


def test_another_models_catalogue_is_refused(shop, photos, tmp_path):
    add(shop, photos)
    with pytest.raises(InputError, match="another model .* `cbam-jax catalogue rebuild"):
        Catalogue.open(tmp_path / "shop.db", FakeEmbedder("0" * 64))


def test_nearly_the_same_is_left_out_when_asked_for(shop, photos):
    add(shop, photos)
    image = cv2.imread(str(sorted(photos.glob("*/*"))[7]))
    smaller = cv2.resize(image, (33, 44), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(photos / "new.jpg"), smaller, [cv2.IMWRITE_JPEG_QUALITY, 80])
    shutil.copy(photos / "new.jpg", photos / "newer.jpg")
    counts = add(shop, photos, skip_near=True)[0]
    assert counts == {"unchanged": 12, "refused": 2}
    assert [item.problem.split(",")[0] for item in shop.items() if item.problem] == [
        "nearly the same as 8"
    ] * 2
    assert add(shop, photos, skip_near=True)[0] == counts
    assert add(shop, photos)[0] == {"unchanged": 12, "new": 2}
    assert len(shop) == 14


def test_embeddings_made_elsewhere_are_added_all_or_none(shop, photos, rng):
    add(shop, photos)
    first = str(sorted(photos.glob("*/*"))[0])
    rows = rng.random((2, 48), np.float32)
    assert shop.add_embeddings(["b", first], rows, [{"price": 5}, {}]) == 2
    assert [(n.id, n.distance) for n in shop.find(rows[0], k=1)] == [(13, 0.0)]
    assert [(n.id, n.distance) for n in shop.find(rows[1], k=1)] == [(1, 0.0)]
    assert shop.item(13).payload == {"price": 5}
    assert shop.item(1).payload == {"category": "dress"}
    for names, embeddings, message in (
        (["c"], rows, "expected float32 \\[1, 48\\]"),
        (["c", "d"], rows.astype(np.float64), "are float64"),
        (["c", "c"], rows, "once each"),
        (["c", "d"], rows * np.float32([[1], [np.nan]]), "NaN"),
    ):
        with pytest.raises(InputError, match=message):
            shop.add_embeddings(names, embeddings)
    assert len(shop) == 13
    assert shop.verify() == []
    assert add(shop, photos)[0] == {"unchanged": 11, "changed": 1}


def test_the_first_batch_is_small_and_what_is_slow_is_told(shop, photos, monkeypatch, capsys):
    monkeypatch.setattr(indexing, "_FIRST", 2)
    monkeypatch.setattr(indexing, "BATCH", 5)
    embed, sizes = shop.embedder.embed_files, []

    def embed_files(files, **options):
        sizes.append(len(files))
        if len(sizes) == 1:
            assert "preparing the model" in capsys.readouterr().err  # Before it is.
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return embed(files, **options)

    monkeypatch.setattr(shop.embedder, "embed_files", embed_files)
    with pytest.raises(KeyboardInterrupt):
        shop.add([photos])
    assert (sizes, len(shop)) == ([2, 5, 5], 7)
