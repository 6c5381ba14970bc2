"""An evaluation as one HTML page that opens from disk: no script, nothing fetched.

Images are data URIs, text is escaped, and a content security policy in the page itself forbids
everything else. Readable on light and dark screens; what a colour says is said in words too.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from cbam_jax import __version__

_HEIGHT = 140  # Pixels of a thumbnail.
_LEGEND = (
    "Each query and the images found nearest to it. A hit, framed in red, is of the query's "
    "category; the number is the Euclidean distance of the embeddings."
)


class Neighbour(NamedTuple):
    """A retrieved image, uint8 [h, w, 3], its category, id, distance, and whether it is a hit."""

    image: np.ndarray
    category: str
    id: str
    distance: float
    relevant: bool


class Query(NamedTuple):
    """A query's image, uint8 [h, w, 3], its category, id, and what was found, nearest first.

    ``value`` is its part in the metric that the report has an interval of.
    """

    image: np.ndarray
    category: str
    id: str
    value: float
    neighbours: Sequence[Neighbour]


class Picture(NamedTuple):
    """A figure: a PNG file's bytes, its caption, and what it shows for those who can't see it."""

    png: bytes
    caption: str
    alt: str


def evaluation_page(
    report: Mapping[str, Any],
    *,
    model: str,
    config: Mapping[str, Mapping[str, Any]],
    queries: Mapping[str, Sequence[Query]],
    pictures: Sequence[Picture] = (),
) -> str:
    """Return the page: metrics with their definitions, categories, queries, figures, config.

    Args:
        report: an evaluation's ``metrics.json``.
        model: its name, for the title.
        config: of the run: section -> field -> value.
        queries: heading -> queries with their nearest images, such as the best and the worst.
        pictures: figures, below.

    >>> pixel = np.zeros((1, 1, 3), np.uint8)
    >>> metrics = {"num_queries": 1.0, "num_left_out": 0.0, "map@1": 1.0}
    >>> report = {"dataset": "<mine>", "split": "test", "step": 5, "ks": [1], "num_gallery": 2,
    ...     "protocol": "leave one out", "metrics": metrics, "definitions": {"map@K": "mean"},
    ...     "interval": {"metric": "map@1", "of": [0.5, 1.0]}, "per_category": {"hat": metrics}}
    >>> page = evaluation_page(report, model="resnet18", config={}, queries={})
    >>> "<mine>" in page, "&lt;mine&gt;" in page
    (False, True)
    """
    title = f"{model} on {report['dataset']}, split {report['split']}"
    figures = [_section("Figures", *map(_picture, pictures))] if pictures else []
    body = [
        _tag("h1", title),
        _summary(report),
        _section("Metrics", _metrics(report), _interval(report)),
        _section("Categories", _categories(report)),
        *(
            _section(
                heading,
                _tag("p", _LEGEND),
                *(_query(query, report["interval"]["metric"]) for query in shown),
            )
            for heading, shown in queries.items()
        ),
        *figures,
        _section("Config", *(_fields(name, fields) for name, fields in config.items())),
        _tag("footer", f"cbam_jax {__version__}"),
    ]
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(body))


def _summary(report: Mapping[str, Any]) -> str:
    metrics = report["metrics"]
    return _tag(
        "p",
        f"Checkpoint of step {report['step']}. {metrics['num_queries']:.0f} queries, "
        f"{report['num_gallery']} gallery images ({report['protocol']}); "
        f"{metrics['num_left_out']:.0f} queries left out of all means for having no relevant item.",
    )


def _metrics(report: Mapping[str, Any]) -> str:
    """One table of the metrics at each K, one line a family, and below it the others."""
    metrics, ks, definitions = report["metrics"], report["ks"], report["definitions"]
    families = {
        name[:-2]: text
        for name, text in definitions.items()
        if name.endswith("@K") and f"{name[:-2]}@{ks[0]}" in metrics
    }
    rows = [
        [family, *(_number(metrics[f"{family}@{k}"]) for k in ks), html.escape(text)]
        for family, text in families.items()
    ]
    counts = ("num_queries", "num_left_out")
    single = [name for name in definitions if name in metrics and name not in counts]
    rows += [
        [name, _number(metrics[name]), *[""] * (len(ks) - 1), html.escape(definitions[name])]
        for name in single
    ]
    return _table(["metric", *(f"@{k}" for k in ks), "definition"], rows, len(ks))


def _interval(report: Mapping[str, Any]) -> str:
    low, high = report["interval"]["of"]
    return _tag(
        "p",
        f"95 % bootstrap interval of {report['interval']['metric']} over queries: {_number(low)} "
        f"to {_number(high)}.",
    )


def _categories(report: Mapping[str, Any]) -> str:
    """Bars of one metric, one line a category, the best first."""
    ks, categories = report["ks"], report["per_category"]
    name = f"map@{10 if 10 in ks else max(ks)}"
    share = {category: values[name] or 0.0 for category, values in categories.items()}
    rows = []
    for category in sorted(categories, key=lambda category: -share[category]):
        values = categories[category]
        bar = f'<div class="bar" style="width:{100 * share[category]:.1f}%"></div>'
        cells = [html.escape(category), f"{values['num_queries']:.0f}", _number(values[name]), bar]
        rows.append(cells)
    return _table(["category", "queries", name, f"{name}, full width is 1"], rows, numbers=2)


def _query(query: Query, metric: str) -> str:
    """One line of a query and what was found."""
    asked = _cell(query.image, f"Query: {query.category}", "query", query.category, query.id)
    found = [
        _cell(
            neighbour.image,
            f"Rank {rank}: {neighbour.category}, {'a hit' if neighbour.relevant else 'no hit'}",
            f"{rank}, hit" if neighbour.relevant else f"{rank}",
            f"{neighbour.category}, {neighbour.distance:.3f}",
            neighbour.id,
            "hit" if neighbour.relevant else "",
        )
        for rank, neighbour in enumerate(query.neighbours, start=1)
    ]
    value = _tag("p", f"{metric} of this query: {query.value:.3f}")
    return f'{value}<div class="row">{asked}{"".join(found)}</div>'


def _cell(image: np.ndarray, alt: str, above: str, below: str, name: str, class_: str = "") -> str:
    return (
        f'<figure class="{class_}" title="{html.escape(name)}"><span>{html.escape(above)}</span>'
        f'<img src="{thumbnail(image)}" alt="{html.escape(alt)}">'
        f"{_tag('figcaption', below)}</figure>"
    )


def thumbnail(image: np.ndarray) -> str:
    """Return a data URI of an image, uint8 [h, w, 3] RGB, at most 140 pixels high, as JPEG.

    >>> thumbnail(np.zeros((300, 200, 3), np.uint8))[:23]
    'data:image/jpeg;base64,'
    """
    height, width = image.shape[:2]
    if height > _HEIGHT:
        size = max(1, round(width * _HEIGHT / height)), _HEIGHT
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return _data_uri("image/jpeg", encoded.tobytes())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _picture(picture: Picture) -> str:
    source = _data_uri("image/png", picture.png)
    return (
        f'<figure class="picture"><img src="{source}" alt="{html.escape(picture.alt)}">'
        f"{_tag('figcaption', picture.caption)}</figure>"
    )


def _fields(section: str, fields: Any) -> str:
    named = fields.items() if isinstance(fields, Mapping) else [("", fields)]
    rows = [[html.escape(f"{section}.{name}".strip(".")), html.escape(f"{v}")] for name, v in named]
    return _table(["field", "value"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A table whose rows' cells are HTML; ``numbers`` columns after the first are numbers."""
    head = "".join(_tag("th", text, 'scope="col"') for text in header)
    lines = []
    for first, *rest in rows:
        cells = "".join(
            f'<td class="number">{cell}</td>' if i < numbers else f"<td>{cell}</td>"
            for i, cell in enumerate(rest)
        )
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    body = "\n".join(lines)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _section(heading: str, *parts: str) -> str:
    return f"<section>{_tag('h2', heading)}{''.join(parts)}</section>"


def _tag(name: str, text: str, attributes: str = "") -> str:
    return f"<{f'{name} {attributes}'.strip()}>{html.escape(text)}</{name}>"


def _number(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.4f}"


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
_STYLE = """
:root { color-scheme: light dark; --line: #bbb; --bar: #2a6fb0; --hit: #d00000; }
@media (prefers-color-scheme: dark) { :root { --line: #555; --bar: #6aa9e0; --hit: #ff5a5a; } }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0; text-align: left;
  vertical-align: top; }
tbody th { font-weight: normal; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.bar { background: var(--bar); height: 1rem; margin-top: .2rem; min-width: 1px; }
td:has(.bar) { min-width: 20rem; }
.row { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-end; margin-bottom: 1rem; }
figure { margin: 0; font-size: .8rem; }
.row figure { max-width: 12rem; }
figure span { display: block; }
.row img { border: 4px solid var(--line); max-width: 100%; }
.row .hit img { border-color: var(--hit); }
.picture { margin: 1rem 0; font-size: .9rem; }
.picture img { max-width: min(100%, 48rem); background: #fff; }
figcaption { overflow-wrap: anywhere; }
footer { margin: 2rem 0; font-size: .8rem; }
"""
