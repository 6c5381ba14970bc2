"""Whether a catalogue is as it should be, another model, and duplicates."""

import os
import shutil

import cv2
import numpy as np
import pytest
from fakes import FakeEmbedder, write_photo, write_photos

from cbam_jax import InputError
from cbam_jax.catalogue import Catalogue, embedders, indexing
from cbam_jax.catalogue.doctor import doctor
from cbam_jax.catalogue.gallery import cache_path


@pytest.fixture
def photos(tmp_path):
    """The twelve photos of a folder, in its order."""
    write_photos(tmp_path / "photos")
    return sorted((tmp_path / "photos").glob("*/*"))


@pytest.fixture
def shop(tmp_path, photos):
    with Catalogue.open(tmp_path / "shop.db", FakeEmbedder()) as catalogue:
        catalogue.add(tmp_path / "photos", progress=False)
        yield catalogue


def content(shop):
    return shop.store.rows("SELECT id, path, hash, payload, problem, embedding FROM item")


def set_row(shop, number, **values):
    with shop.store.transaction():
        for name, value in values.items():
            shop.store.run(f"UPDATE item SET {name} = ? WHERE id = ?", [value, number])


def test_verify_finds_nothing_where_all_is_well(shop, tmp_path):
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"x")
    shop.add(tmp_path / "photos", progress=False)
    count = shop.embedder.embedded
    assert shop.verify() == []
    assert shop.embedder.embedded == count + 12
    assert shop.verify(sample=0) == []
    assert shop.verify(sample=3) == []
    assert shop.embedder.embedded == count + 12 + 3


def test_verify_names_what_is_wrong_with_photos_and_embeddings(shop, photos):
    photos[1].unlink()
    write_photo(photos[2], 99)
    row = np.frombuffer(content(shop)[4][5], np.float32)
    set_row(shop, 5, embedding=(row * np.float32(1.01)).tobytes())
    set_row(shop, 6, embedding=row[:-1].tobytes())
    set_row(shop, 7, embedding=np.full(48, np.nan, np.float32).tobytes())
    set_row(shop, 8, embedding=None)
    assert shop.verify() == [
        "photo 6: 188 bytes of embedding, not 192",
        "photo 7: its embedding has numbers that are none",
        "photo 8: neither an embedding nor a reason, or both",
        f"photo 2: no such file: {photos[1]}",
        f"photo 3: changed since it was added: {photos[2]}",
        "photo 5: embedded again it is another one (numbers)",
        "photo 6: embedded again it is another one (numbers)",
        "photo 7: embedded again it is another one (numbers)",
    ]


def test_verify_finds_a_damaged_copy_of_the_embeddings_and_a_damaged_file(shop, tmp_path):
    shop.find(1)
    kept = cache_path(tmp_path / "shop.db")
    whole = kept.read_bytes()
    for place in (4096, 8192 + 3, 4 * 4096 + 5):  # An id, a squared norm, an embedding.
        damaged = bytearray(whole)
        damaged[place] ^= 64
        kept.write_bytes(damaged)
        assert shop.verify(sample=0) == [f"{kept} is damaged: the next search makes it anew"]
    shop.store.rows("PRAGMA writable_schema = 1")
    shop.store.rows("UPDATE sqlite_master SET rootpage = 2 WHERE name = 'item_hash'")
    with Catalogue.open(tmp_path / "shop.db") as again:
        assert again.verify()[0].startswith("the file: ")


def test_rebuild_embeds_all_by_another_model(shop, photos, tmp_path):
    before, other = content(shop), FakeEmbedder("0" * 64, power=2.0)
    photos[3].unlink()
    write_photo(photos[4], 99)
    assert Catalogue.rebuild(tmp_path / "shop.db", other, progress=False) == 11
    after = content(shop)
    assert [row[:2] for row in after] == [row[:2] for row in before]
    assert after[3][4:] == ("no such file", None)
    for row in (0, 4, 11):
        expected = other.embed_files([photos[row]]).embeddings[0]
        np.testing.assert_array_equal(np.frombuffer(after[row][5], np.float32), expected)
    with Catalogue.open(tmp_path / "shop.db", other) as again:
        assert again.find(photos[0], k=1)[0].distance == 0
        assert again.add(tmp_path / "photos", progress=False).counts["unchanged"] == 11
        assert [f for f in again.verify() if "photo 4" not in f] == []
    write_photo(tmp_path / "photos" / "new.png", 5)
    with pytest.raises(InputError, match="another model"):  # Opened before, by the old one.
        shop.add(tmp_path / "photos", progress=False)


def test_a_rebuild_that_was_ended_goes_on_and_changes_nothing_until_then(
    shop, tmp_path, monkeypatch
):
    monkeypatch.setattr(indexing, "BATCH", 5)
    before = content(shop)

    class Ends(FakeEmbedder):
        def embed_files(self, paths, **options):
            if self.embedded >= 5:
                raise KeyboardInterrupt
            return super().embed_files(paths, **options)

    with pytest.raises(KeyboardInterrupt):
        Catalogue.rebuild(tmp_path / "shop.db", Ends("0" * 64), progress=False)
    assert content(shop) == before
    assert shop.verify() == []
    other = FakeEmbedder("0" * 64)
    assert Catalogue.rebuild(tmp_path / "shop.db", other, progress=False) == 12
    assert other.embedded == 7


def test_what_another_process_added_during_a_rebuild_is_embedded_when_added_again(shop, tmp_path):
    late = tmp_path / "late.png"

    class Adds(FakeEmbedder):
        def embed_files(self, paths, **options):
            if not late.exists():
                write_photo(late, 50)
                shop.add(late, progress=False)
            return super().embed_files(paths, **options)

    other = Adds("0" * 64)
    assert Catalogue.rebuild(tmp_path / "shop.db", other, progress=False) == 12
    with Catalogue.open(tmp_path / "shop.db", other) as again:
        assert again.item(13).problem == "of another model: add it again"
        again.add(late, progress=False)
        assert again.find(late, k=1)[0].id == 13
        assert again.verify() == []


def test_an_add_that_a_rebuild_overtakes_writes_no_embedding_of_the_old_model(shop, tmp_path):
    class Overtaken(FakeEmbedder):
        def embed_files(self, paths, **options):
            other = FakeEmbedder("0" * 64)
            Catalogue.rebuild(tmp_path / "shop.db", other, progress=False)
            return super().embed_files(paths, **options)

    write_photo(tmp_path / "new.png", 5)
    with Catalogue.open(tmp_path / "shop.db", Overtaken()) as late:
        with pytest.raises(InputError, match="another model"):
            late.add(tmp_path / "new.png", progress=False)
        assert len(late) == 12


def test_duplicates_are_listed_exact_and_near(shop, photos, tmp_path):
    assert shop.duplicates() == []
    shutil.copy(photos[2], tmp_path / "photos" / "x_copy.png")
    image = cv2.imread(str(photos[9]))
    smaller = cv2.resize(image, (33, 44), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(tmp_path / "photos" / "x_small.jpg"), smaller)
    shop.add(tmp_path / "photos", progress=False)
    ids = {os.path.basename(item.path): item.id for item in shop.items()}
    exact, near = [3, ids["x_copy.png"]], [10, ids["x_small.jpg"]]
    assert [[item.id for item in group] for group in shop.duplicates()] == [exact, near]
    assert [[item.id for item in group] for group in shop.duplicates(near=False)] == [exact]


def test_doctor_says_in_ten_lines_what_there_is(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(embedders, "default_is_installed", lambda: True)
    lines = list(doctor(tmp_path / "shop.db", None))
    assert len(lines) == 10
    text = "\n".join(lines)
    assert "photos: 12, of which 12 can be found" in lines
    set_row(shop, 3, embedding=None, problem="nearly the same as 2")
    path = tmp_path / "shop.db"
    assert (
        "photos: 12, of which 11 can be found; why not the others: "
        f"cbam-jax catalogue list {path} --problems"
    ) in list(doctor(path, None))
    assert "embeddings: 48 numbers, of the model ffffffffffff" in text
    assert "model: none was named" in text
    assert "is not there" in list(doctor(tmp_path / "none.db", None))[-1]
    assert list(doctor(None, None))[-1].startswith("model: efficientnet_lite0, which a new cat")
    monkeypatch.setattr(embedders, "default_is_installed", lambda: False)
    assert "none was named" in list(doctor(None, None))[-1]
