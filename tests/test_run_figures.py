"""What an evaluation draws: photos at the size that they are shown at, and nothing of nothing."""

import re
import tracemalloc

import cv2
import numpy as np
import pytest
from tiny_run import make_config

from cbam_jax import InputError, run_figures, runs
from cbam_jax.datasets.retrieval import RetrievalDataset
from cbam_jax.evaluation import evaluate_embeddings, make_protocol

# ml_collections loads configs by a method that Python means to remove.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def make_dataset(images, label, ids, is_query=None):
    n = len(label)
    return RetrievalDataset(
        name="/home/someone/photos.csv", split="test", label=np.array(label, np.int32),
        label_names=tuple(f"class {i}" for i in range(max(label) + 1)), id=np.array(ids),
        is_query=np.ones(n, bool) if is_query is None else np.array(is_query),
        is_gallery=np.ones(n, bool), item=None, series=None, bbox=None, images=images,
    )  # fmt: skip


def jpeg(image):
    return cv2.imencode(".jpg", image)[1].tobytes()


def test_photos_are_read_at_the_size_that_is_shown(rng):
    coarse = rng.integers(60, 200, (6, 8, 3), np.uint8)
    photo = np.repeat(np.repeat(coarse, 500, axis=0), 500, axis=1)
    encoded = jpeg(photo)
    dataset = make_dataset([encoded] * 12, [0] * 12, [f"{i}.jpg" for i in range(12)])
    expected = cv2.resize(photo[..., ::-1], (256, 192), interpolation=cv2.INTER_AREA)
    tracemalloc.start()
    shown = [run_figures.shown_image(dataset, i, 256) for i in range(12)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A decoded photo has 36 MB; at an eighth of its sides 0.6 MB.
    assert peak < 4e6
    assert {image.shape for image in shown} == {(192, 256, 3)}
    assert np.abs(shown[5].astype(float) - expected).mean() < 2


def test_small_images_are_not_enlarged_and_strips_keep_a_pixel(rng):
    small = rng.integers(0, 256, (21, 34, 3), np.uint8)
    encoded = cv2.imencode(".png", small[..., ::-1])[1].tobytes()
    strip = jpeg(np.full((2, 3000, 3), 99, np.uint8))
    dataset = make_dataset([encoded, strip, b"no image"], [0, 0, 1], ["a", "b", "c"])
    np.testing.assert_array_equal(run_figures.shown_image(dataset, 0, 256), small)
    assert run_figures.shown_image(dataset, 1, 256).shape == (1, 256, 3)
    with pytest.raises(InputError, match="c of /home/someone/photos.csv cannot be decoded"):
        run_figures.shown_image(dataset, 2, 256)


@pytest.fixture
def measured(rng, tmp_path):
    """A split of two images of a category, and five categories of one image each."""
    images = [jpeg(rng.integers(0, 256, (20, 30, 3), np.uint8)) for _ in range(7)]
    ids = [f"/home/someone/{i}.jpg" for i in range(7)]
    dataset = make_dataset(images, [0, 1, 2, 3, 4, 5, 5], ids)
    protocol = make_protocol(dataset.is_query, dataset.is_gallery, ks=(5,))
    embeddings = rng.normal(size=(7, 3)).astype(np.float32)
    result = evaluate_embeddings(embeddings, dataset.label, dataset.label_names, protocol, ks=(5,))
    report = {"dataset": dataset.name, "split": "test", "step": 3, **result.report}
    config = make_config("photos.csv", **{"eval.ks": (5,)})
    return run_figures.Measured(
        config, tmp_path, tmp_path, dataset, None, None, result, embeddings, report
    )


def test_a_chosen_query_with_nothing_to_find_is_shown_and_called_so(measured, tmp_path):
    run_figures.save_result_rows(measured, np.array([4]), "red")
    run_figures.save_page(measured, {"Chosen queries": np.array([4])}, [])
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"results.png", "worst.png", "report.html"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("There is no other image of its category to find.") == 1
    assert not re.search(r"\bnan\b", re.sub(r"data:image/[^\"]*", "", page))


def test_the_page_has_short_names_and_what_was_found(measured, tmp_path):
    run_figures.save_page(measured, {}, [])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "someone" not in page
    assert "<small><bdi>5.jpg</bdi></small>" in page
    query = run_figures.describe_query(measured, 6, list("abcdefg"))
    assert (query.id, query.category) == ("g", "class 5")
    assert query.hits == measured.result.match[6, :5].sum()
    found = [neighbour.id for neighbour in query.neighbours]
    assert found == ["abcdefg"[i] for i in measured.result.neighbour[6]]


IDS = ["c0/a,b.png", "c0/c.png", "it's 連.png", "gallery.png"]


def test_queries_are_found_by_ids_with_commas_and_quotes():
    dataset = make_dataset([b""] * 4, [0] * 4, IDS, [True, True, True, False])
    assert runs.find_queries(dataset, [IDS[2], IDS[0], IDS[2]]) == [2, 0]
    for name, expected in (
        ("c0/a", "--query=c0/a is no query of /home/someone/photos.csv, split test"),
        ("gallery.png", "--query=gallery.png is only searched among, and no query"),
    ):
        with pytest.raises(InputError) as raised:
            runs.find_queries(dataset, [name])
        assert str(raised.value).startswith(expected)
        # As the user would type it.
        hint = """give such as --query=c0/a,b.png --query=c0/c.png --query='it'"'"'s 連.png'"""
        assert hint in str(raised.value)
        assert "np.str_" not in str(raised.value)
    with pytest.raises(InputError, match="--query names 51 images: a figure holds 50"):
        runs.find_queries(dataset, [IDS[0]] * 51)
