"""What was found, to be looked at: one HTML page that opens from disk, or one picture.

The page needs no script and fetches nothing; its photos are in it. It is read on a phone and on a
wide screen, light and dark. A photo whose file is not there any more has its place, empty.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbam_jax import InputError, __version__, pages
from cbam_jax.catalogue.items import Neighbour
from cbam_jax.catalogue.printing import payload_text, ranked, remark
from cbam_jax.catalogue.reading import LARGEST
from cbam_jax.datasets import decode_image
from cbam_jax.datasets.looks import shrunk, small_image
from cbam_jax.foreign_files import escaped, read_file

_LONGEST = 200  # Letters of a text, of which as many are drawn as there is room for.
_SIDE = 240  # Pixels of a thumbnail's longer side.
_GAP, _TEXT = 12, 44  # Pixels between pictures, and below each for two lines.


class Shown(NamedTuple):
    """A query as it is shown: its name, its photos' paths (some may be none), and what was found.

    ``box`` is the part of its photo that was asked for, ``x1, y1, x2, y2`` in pixels, or None.
    """

    name: str
    photos: Sequence[str]
    found: Sequence[Neighbour]
    box: Sequence[float] | None = None


def thumbnail(path: str, box: Sequence[float] | None = None) -> np.ndarray | None:
    """A photo of at most 240 pixels a side, uint8 [h, w, 3]; None where it cannot be read.

    >>> thumbnail("/nowhere/a.jpg") is None
    True
    """
    try:
        content = read_file(path, LARGEST)
        # A box is in pixels of the whole: nothing is lost before it is cut out.
        image = small_image(content, _SIDE) if box is None else decode_image(content)
    except (InputError, OSError):
        return None
    if box is not None:
        x1, y1, x2, y2 = (max(0, int(edge)) for edge in box)
        image = image[y1:y2, x1:x2]
    return shrunk(image, _SIDE) if image.size else None


def page(answers: Sequence[Shown], reranked: str = "") -> str:
    """The HTML page of some queries and what was found for each.

    ``reranked`` says what the distances are, where they are not those of the embeddings.

    >>> text = page([Shown("<b>", [], [Neighbour(7, "/nowhere.jpg", {"price": 5}, 0.25)])])
    >>> "&lt;b&gt;" in text, "price=5" in text, "<script" in text
    (True, True, False)
    """
    sections = "\n".join(_section(answer) for answer in answers)
    told = html.escape(reranked) or _EUCLIDEAN
    body = _BODY.format(distance=told, sections=sections, version=__version__)
    return pages.whole_page("What looks alike", _STYLE, body)


def sheet(answers: Sequence[Shown]) -> np.ndarray:
    """A picture of the same, a row a query: its photos, then what was found; uint8 [h, w, 3]."""
    rows = [
        [(thumbnail(path, a.box), "query", a.name) for path in a.photos or [""]]
        + [
            (
                thumbnail(n.path),
                f"{rank or '='}   {n.distance:.4f}",
                f"{payload_text(n.payload) or n.id} {remark(n)}",
            )
            for rank, n in ranked(a.found)
        ]
        for a in answers
    ]
    cell = _SIDE + _GAP
    height, width = len(rows) * (cell + _TEXT) + _GAP, max(map(len, rows)) * cell + _GAP
    picture = np.full((height, width, 3), 255, np.uint8)
    for row, cells in enumerate(rows):
        for column, (image, *_) in enumerate(cells):
            top, left = _GAP + row * (cell + _TEXT), _GAP + column * cell
            _put(picture, image, top, left)
    texts = [
        ((_GAP + column * cell, row * (cell + _TEXT) + cell), lines)
        for row, cells in enumerate(rows)
        for column, (_, *lines) in enumerate(cells)
    ]
    return _written(picture, texts)


def _put(picture: np.ndarray, image: np.ndarray | None, top: int, left: int) -> None:
    """Lay an image into the middle of its place, or grey where there is none."""
    if image is None:
        image = np.full((_SIDE // 2, _SIDE // 2, 3), 220, np.uint8)
    height, width = image.shape[:2]
    top, left = top + (_SIDE - height) // 2, left + (_SIDE - width) // 2
    picture[top : top + height, left : left + width] = image


def _written(picture: np.ndarray, texts: Sequence[tuple[tuple[int, int], list[str]]]) -> np.ndarray:
    """The picture with two lines of text below each place, cut to its width."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 14)
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for (left, top), lines in texts:
        for number, line in enumerate(escaped(line)[:_LONGEST] for line in lines):
            while draw.textlength(line, font) > _SIDE:
                line = line[: -2 - line.endswith("…")] + "…"
            draw.text((left, top + 2 + 18 * number), line, fill=(40, 40, 40), font=font)
    return np.array(image)


def _section(answer: Shown) -> str:
    asked = "".join(
        _figure(thumbnail(path, answer.box), "The query", ["query"], path) for path in answer.photos
    )
    found = "".join(
        _figure(
            thumbnail(n.path),
            f"{f'Number {rank}' if rank else 'This photo'}: {payload_text(n.payload) or n.id}",
            [f"{rank or '='}, distance {n.distance:.4f}", payload_text(n.payload), remark(n)],
            f"{n.id}: {n.path}",
        )
        for rank, n in ranked(answer.found)
    )
    nothing = "" if found else "<p>Nothing was found.</p>"
    heading = f"<h2>{html.escape(answer.name)}</h2>"
    asked = f'<div class="row query">{asked}</div>' if asked else ""
    return f'<section>{heading}{asked}<div class="row">{found}</div>{nothing}</section>'


def _figure(image: np.ndarray | None, alt: str, lines: Sequence[str], title: str) -> str:
    if image is None:
        picture = '<div class="none">the photo cannot be read</div>'
    else:
        picture = f'<img src="{pages.jpeg_uri(image, quality=82)}" alt="{html.escape(alt)}">'
    text = "<br>".join(html.escape(line) for line in lines if line)
    name = html.escape(Path(title).name)
    return (
        f'<figure title="{name}">{picture}<figcaption>{text}<br><small>{name}'
        "</small></figcaption></figure>"
    )


_EUCLIDEAN = "the distance is the Euclidean one of the embeddings"
_BODY = """\
<h1>What looks alike</h1>
<p>Below each query the photos found, nearest first; {distance}, smaller is nearer.</p>
{sections}
<footer>cbam_jax {version}</footer>"""
_STYLE = """
:root { color-scheme: light dark; --line: #ccc; --mark: #2a6fb0; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --mark: #6aa9e0; } }
body { font: 16px/1.4 system-ui, sans-serif; max-width: 80rem;
  margin: 1rem auto; padding: 0 .8rem; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.1rem; overflow-wrap: anywhere; margin: 2rem 0 .5rem; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; }
.query { margin-bottom: .8rem; }
figure { margin: 0; font-size: .85rem; }
img, .none { width: 100%; aspect-ratio: 3 / 4; object-fit: contain; border: 1px solid var(--line);
  border-radius: .3rem; box-sizing: border-box; }
.none { display: grid; place-items: center; text-align: center; color: GrayText; }
.query img { border: 3px solid var(--mark); }
figcaption { overflow-wrap: anywhere; }
small { color: GrayText; }
footer { margin: 2rem 0; font-size: .8rem; }
"""
