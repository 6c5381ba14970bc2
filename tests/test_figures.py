import subprocess
import sys

import cv2
import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgba

from cbam_jax import figures, fonts

TITLES = ["a dress that costs $5 or $", "coat", "t_shirt with very long sleeves and a hood"]


@pytest.fixture(scope="module")
def drawn():
    """Three queries with 5, 2 and 0 neighbours, portrait and landscape."""
    rng = np.random.default_rng(2022)

    def image(height, width):
        # Grey, so that all red in the figure is a frame's.
        return np.repeat(rng.integers(0, 256, (height, width, 1), np.uint8), 3, axis=2)

    neighbours = [
        [image(40, 20 + 10 * i) for i in range(5)],
        [image(20, 60), image(60, 20)],
        [],
    ]
    matches = np.array([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    distances = np.sort(rng.uniform(size=(3, 5)), axis=1)
    queries = [image(30, 30), image(70, 20), image(20, 70)]
    figure = figures.result_rows(queries, neighbours, matches, distances=distances, titles=TITLES)
    return figure, queries, neighbours, matches, distances


def test_every_cell_shows_its_image_its_text_and_its_frame(drawn):
    figure, queries, neighbours, matches, distances = drawn
    cells = iter(figure.axes)
    for row, query in enumerate(queries):
        cell = next(cells)
        np.testing.assert_array_equal(cell.images[0].get_array(), query)
        assert cell.get_title() == "query"
        assert cell.get_xlabel().replace("\n", " ") == TITLES[row]
        for rank, image in enumerate(neighbours[row]):
            cell = next(cells)
            np.testing.assert_array_equal(cell.images[0].get_array(), image)
            assert cell.get_title() == f"{rank + 1}{' ✓' * int(matches[row, rank])}"
            assert float(cell.get_xlabel()) == pytest.approx(distances[row, rank], abs=5e-4)
            frame = cell.spines["left"]
            green = to_rgba(figures.HIT_COLORS["green"])
            assert (frame.get_edgecolor() == green) == matches[row, rank]
            assert (frame.get_linewidth() > 2) == matches[row, rank]
    assert next(cells, None) is None


def test_the_caption_explains_frame_and_number(drawn):
    caption = drawn[0].get_suptitle().replace("\n", " ")
    assert "Green frame and tick: same category as the query" in caption
    assert "Number: Euclidean distance" in caption


def texts(figure):
    return [text for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


@pytest.fixture(scope="module")
def heat_figures():
    """Heat rows, pairs and gates of three images; the second has an empty map."""
    rng = np.random.default_rng(2022)
    images = [rng.integers(0, 256, (12, 16, 3), np.uint8) for _ in range(3)]
    heat = rng.uniform(size=(3, 12, 16)).astype(np.float32)
    heat[1] = 0
    gates = rng.uniform(0.2, 0.7, size=(3, 4, 5)).astype(np.float32)
    drawn = {
        "heat": figures.heat_rows(images, {"resnet50": heat[::-1], "cbam": heat}, titles=TITLES),
        "pairs": figures.pair_rows(
            images, images[::-1], heat, heat[::-1], titles=TITLES, distances=np.array([0.5, 1, 2])
        ),
        "gates": figures.gate_rows(images, {"last_attention": gates}, titles=TITLES),
    }
    return drawn, images, heat, gates


def blend(image, heat):
    """Half the image, half the colours of the heat, in float64."""
    return (matplotlib.colormaps["turbo"](heat)[..., :3] * 255 + image) / 2


def test_heat_is_laid_over_its_image_and_an_empty_map_is_called_so(heat_figures):
    drawn, images, heat, _ = heat_figures
    for name, columns in {
        "heat": {1: heat[::-1], 2: heat},
        "pairs": {1: heat, 2: heat[::-1]},
    }.items():
        grid = np.array(drawn[name].axes).reshape(3, -1)
        for column, heats in columns.items():
            for row in range(3):
                image = images[2 - row] if (name, column) == ("pairs", 2) else images[row]
                axes = grid[row, column]
                shown = np.asarray(axes.images[0].get_array())
                assert axes.get_xlabel() == ("" if heats[row].any() else "empty map")
                if heats[row].any():
                    np.testing.assert_allclose(shown, blend(image, heats[row]), atol=1.01)
                else:
                    np.testing.assert_allclose(shown, image / 2 + 128, atol=1)


def test_titles_and_numbers_of_the_heat_figures(heat_figures):
    drawn, images, _, gates = heat_figures
    grids = {name: np.array(figure.axes).reshape(3, -1) for name, figure in drawn.items()}
    for name, grid in grids.items():
        for row in range(3):
            np.testing.assert_array_equal(grid[row, 0].images[0].get_array(), images[row])
            assert grid[row, 0].get_xlabel().replace("\n", " ") == TITLES[row], name
    assert [axes.get_title() for axes in grids["heat"][1]] == ["image", "resnet50", "cbam"]
    pairs = grids["pairs"]
    assert [axes.get_xlabel() for axes in pairs[:, 3]] == ["0.500", "1.000", "2.000"]
    np.testing.assert_array_equal(pairs[0, 3].images[0].get_array(), images[2])
    np.testing.assert_array_equal(grids["gates"][2, 1].images[0].get_array(), gates[2])
    low, high = grids["gates"][2, 1].get_xlabel().split(" to ")
    assert float(low) == pytest.approx(gates[2].min(), abs=5e-4)
    assert float(high) == pytest.approx(gates[2].max(), abs=5e-4)


def test_maps_of_another_number_of_images_are_named(heat_figures):
    _, images, heat, gates = heat_figures
    with pytest.raises(ValueError, match=r"images, titles, cbam have lengths \[3, 3, 2\]"):
        figures.heat_rows(images, {"cbam": heat[:2]}, titles=TITLES)
    with pytest.raises(ValueError, match="at least 1"):
        figures.gate_rows([], {"last": gates[:0]}, titles=[])


@pytest.mark.parametrize("name", ["results", "heat", "pairs", "gates"])
def test_no_text_is_clipped_or_covered(name, drawn, heat_figures):
    figure = ({"results": drawn[0]} | heat_figures[0])[name]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts(figure)]
    # Half a pixel of slack for antialiasing.
    for box in boxes:
        assert box.x0 >= -0.5
        assert box.y0 >= -0.5
        assert box.x1 <= figure.bbox.width + 0.5
        assert box.y1 <= figure.bbox.height + 0.5
    for i, first in enumerate(boxes):
        for j, second in enumerate(boxes[:i]):
            overlap = matplotlib.transforms.Bbox.intersection(first, second)
            empty = overlap is None or min(overlap.width, overlap.height) < 0.5
            assert empty, [texts(figure)[k].get_text() for k in (i, j)]


def test_saved_png_is_green_only_where_a_hit_is(drawn, tmp_path):
    figure, queries, neighbours, matches, distances = drawn
    none = matches & False
    without = figures.result_rows(queries, neighbours, none, distances=distances, titles=TITLES)

    def green(figure):
        figures.save(figure, tmp_path / "drawn.png")
        assert [path.name for path in tmp_path.iterdir()] == ["drawn.png"]
        blue, green, red = cv2.split(cv2.imread(str(tmp_path / "drawn.png")).astype(int))
        return int(np.sum((green > 120) & (red < 60) & (blue < 90)))

    assert green(figure) > 1000
    assert green(without) == 0


def test_the_papers_frames_are_red(rng):
    image = rng.integers(0, 256, (8, 6, 3), np.uint8)
    figure = figures.result_rows(
        [image], [[image] * 2], np.array([[False, True]]), distances=np.zeros((1, 2)), titles=["a"],
        frames="red",
    )  # fmt: skip
    red = [axes.spines["top"].get_edgecolor() == to_rgba("red") for axes in figure.axes]
    assert red == [False, False, True]
    assert "Red frame and tick" in figure.get_suptitle().replace("\n", " ")


SCRIPTS = [
    "连衣裙",
    "ワンピース",
    "فستان",
    "платье",
    "कपड़े",
    "👗",
    "ex\u0301te\u0301",
    "\udce9t\xe9",
    "a\x07",
]


def test_class_names_in_any_script_are_drawn(rng, tmp_path, capsys):
    image = rng.integers(0, 256, (8, 6, 3), np.uint8)
    n = len(SCRIPTS)
    figure = figures.result_rows(
        [image] * n, [[]] * n, np.zeros((n, 0), bool), distances=np.zeros((n, 0)), titles=SCRIPTS
    )
    # A glyph that is missing would be a warning, an error here.
    figures.save(figure, tmp_path / "drawn.png")
    shown = [axes.get_xlabel() for axes in figure.axes]
    assert shown[3] == "платье"
    assert shown[7] == "□t\xe9"
    for title, label in zip(SCRIPTS, shown, strict=True):
        assert len(label) == len(title)
        assert {a for a, b in zip(label, title, strict=True) if a != b} <= {"□"}


def test_a_font_that_has_the_characters_is_found():
    # Of matplotlib's own fonts the default has none of these, its monospaced one has the first two.
    families, missing = fonts._fonts_for(frozenset(map(ord, "⌒⌓\udfff")))
    assert missing == {0xDFFF}
    assert {ord("⌒"), ord("⌓")} <= set().union(*(fonts._system_fonts()[f] for f in families))


def test_a_character_that_no_font_has_is_told_once(rng, capsys, monkeypatch):
    monkeypatch.setattr(fonts, "_told", set())
    image = rng.integers(0, 256, (8, 6, 3), np.uint8)
    for title in ("t\udfff", "\udffft\udfff"):
        figure = figures.heat_rows([image], {"a": np.ones((1, 8, 6))}, titles=[title])
        assert figure.axes[0].get_xlabel() == title.replace("\udfff", "□")
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith("no font of this system draws '?': figures show squares instead;")


def test_a_name_without_end_takes_three_lines(rng):
    image = rng.integers(0, 256, (8, 6, 3), np.uint8)
    for title in ("x" * 500, "so many words " * 50, "界" * 300):
        figure = figures.heat_rows([image], {"a": np.ones((1, 8, 6))}, titles=[title])
        [lines] = [axes.get_xlabel().split("\n") for axes in figure.axes[:1]]
        assert len(lines) == 3
        assert lines[2].endswith("…")


def test_lengths_that_differ_are_named():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"lengths \[1, 1, 1, 1, 2\]"):
        figures.result_rows(
            [image], [[]], np.zeros((1, 0), bool), distances=np.zeros((1, 0)), titles=["a", "b"]
        )
    with pytest.raises(ValueError, match="at least 1"):
        figures.result_rows([], [], np.zeros((0, 5)), distances=np.zeros((0, 5)), titles=[])


def lines(axes):
    return {line.get_label(): np.array(line.get_data()) for line in axes.lines}


def test_training_curve_draws_each_record_where_it_belongs():
    records = [
        {"step": 0, "validation/map@10": 0.8, "validation/mrr": 0.1},
        {"step": 5, "loss": 0.7},
        {"step": 10, "loss": 0.5},
        {"step": 10, "validation/map@10": 0.3},
        {"step": 20, "loss": 0.6},
        {"step": 20, "validation/map@10": 0.4},
        {"step": 30, "validation/map@10": float("nan")},
    ]
    figure = figures.training_curve(records, metric="validation/map@10")
    above, below = figure.axes
    np.testing.assert_array_equal(lines(above)["training loss"], [[5, 10, 20], [0.7, 0.5, 0.6]])
    drawn = lines(below)
    np.testing.assert_array_equal(
        drawn["validation/map@10"], [[0, 10, 20, 30], [0.8, 0.3, 0.4, np.nan]]
    )
    np.testing.assert_array_equal(drawn["untrained: 0.8000"][1], [0.8, 0.8])
    np.testing.assert_array_equal(drawn["best after training: 0.4000 at step 20"], [[20.0], [0.4]])


def test_training_curve_of_a_run_that_has_only_begun(tmp_path):
    figure = figures.training_curve([{"step": 0, "test/map@10": 0.2}], metric="test/map@10")
    assert "untrained: 0.2000" in lines(figure.axes[1])
    figures.save(figure, tmp_path / "curve.png")
    assert cv2.imread(str(tmp_path / "curve.png")).shape[2] == 3


def test_matplotlib_is_imported_when_drawing_and_pyplot_never():
    code = (
        "import sys, numpy as np; from cbam_jax import figures; "
        "assert 'matplotlib' not in sys.modules; "
        "figures.training_curve([{'step': 1, 'loss': 2.0}], metric='a/b'); "
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
