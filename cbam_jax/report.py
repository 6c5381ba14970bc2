"""An evaluation as one HTML page that opens from disk: no script, nothing fetched.

Images are data URIs, text is escaped, and a content security policy in the page itself forbids
everything else. Readable on light and dark screens and on a phone; what a colour says is said in
words too, and no folder of the machine that made the page is named in it.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from cbam_jax import __version__, pages
from cbam_jax.report_text import (
    counts,
    first_k,
    gate_name,
    is_number,
    plain_words,
    shown_categories,
    told_categories,
)

_CATEGORIES = 40  # Of more the best and the worst half of that are shown.
_LEGEND = (
    "Each query and the images found nearest to it. A hit, with a green frame and a tick, is of "
    "the query's category; the number is the Euclidean distance of the embeddings. A click "
    "enlarges a picture, another one closes it."
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

    ``value`` is its part in the metric that the report has an interval of, NaN where there is
    nothing to find for it; ``hits`` is the number of hits among the first K, of which not all need
    be ``neighbours``.
    """

    image: np.ndarray
    category: str
    id: str
    value: float
    hits: int
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
    """Return the page: plain words, metrics, categories, queries, focus, figures, config.

    Args:
        report: an evaluation's ``metrics.json``, and under ``focus`` its ``focus.json``.
        model: its name, for the title.
        config: of the run: section -> field -> value.
        queries: heading -> queries with their nearest images, such as the best and the worst.
        pictures: figures, below.

    >>> pixel = np.zeros((1, 1, 3), np.uint8)
    >>> metrics = {"num_queries": 1.0, "num_left_out": 0.0, "map@1": 1.0, "precision@1": 1.0,
    ...     "recall@1": 1.0}
    >>> report = {"dataset": "<mine>", "split": "test", "step": 5, "ks": [1], "num_gallery": 2,
    ...     "protocol": "leave one out", "metrics": metrics, "definitions": {"map@K": "mean"},
    ...     "interval": {"metric": "map@1", "of": [0.5, 1.0]}, "per_category": {"hat": metrics}}
    >>> page = evaluation_page(report, model="resnet18", config={}, queries={})
    >>> "<mine>" in page, "&lt;mine&gt;" in page
    (False, True)
    """
    title = f"{model} on {without_folder(report['dataset'])}, split {report['split']}"
    body = [
        _tag("h1", title),
        _tag("p", plain_words(report), 'class="plain"'),
        _tag("p", f"Checkpoint of step {report['step']}. {counts(report)}."),
        _section("Metrics", _metrics(report), _interval(report)),
        _section("Categories", _categories(report)),
        *(_queries(heading, shown, report) for heading, shown in queries.items() if shown),
        *([_section("Focus", _focus(report["focus"]))] if "focus" in report else []),
        *([_section("Figures", *map(_picture, pictures))] if pictures else []),
        _section("Config", *(_fields(name, fields) for name, fields in config.items())),
        _tag("footer", f"cbam_jax {__version__}"),
    ]
    page = pages.whole_page(html.escape(title), _STYLE, "\n".join(body))
    return page.encode(errors="replace").decode()  # Names of files may be no UTF-8.


def without_folder(value: Any) -> str:
    """Write a value, of a path from the root the last part alone.

    >>> without_folder("/home/me/photos.csv"), without_folder("/home/me/photos/")
    ('photos.csv', 'photos/')
    """
    text = f"{value}"
    for path in (PurePosixPath(text), PureWindowsPath(text)):
        if path.is_absolute() and path.name:
            return path.name + "/" * text.endswith(("/", "\\"))
    return text


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
    return _table(["metric", *(f"@{k}" for k in ks), "definition"], rows, len(ks), "metrics")


def _interval(report: Mapping[str, Any]) -> str:
    low, high = report["interval"]["of"]
    if not is_number(low):
        return ""
    return _tag(
        "p",
        f"95 % bootstrap interval of {report['interval']['metric']} over queries: {_number(low)} "
        f"to {_number(high)}.",
    )


def _categories(report: Mapping[str, Any]) -> str:
    """Bars of one metric, one line a category."""
    k, categories = first_k(report["ks"]), report["per_category"]
    name = f"map@{k}"
    shown = shown_categories(categories, name, _CATEGORIES)
    rows = [_category(category, categories[category], k) for category in shown[0] + shown[1]]
    head = ["category", "queries", f"alike of {k}", name, f"{name}, full width is 1"]
    alike = f"alike of {k}: how many of the first {k} images found are of the query's category."
    return _tag("p", f"{told_categories(categories, shown)} {alike}") + _table(
        head, rows, 3, "bars"
    )


def _category(category: str, values: Mapping[str, float | None], k: int) -> list[str]:
    value, share = values[f"map@{k}"], values[f"precision@{k}"]
    width = 100 * value if value is not None and is_number(value) else 0.0
    alike = f"{k * share:.1f}" if share is not None and is_number(share) else ""
    bar = f'<div class="bar" style="width:{width:.1f}%"></div>'
    return [html.escape(category), f"{values['num_queries']:.0f}", alike, _number(value), bar]


def _focus(focus: Mapping[str, Any]) -> str:
    """Where the model looks: its heat on the garments, and beside it what says nothing scores."""
    even = [_number(focus["area"]), _number(focus["pointing_center"]), ""]
    rows = [["an even map; the centre", *even]]
    for name, means in focus["targets"].items():
        values = [_number(means["heat_inside"]), _number(means["pointing"])]
        rows.append([html.escape(f"heat of {name}"), *values, f"{means['num_empty']}"])
    gates = [
        [html.escape(gate_name(name)), _number(means["inside"]), _number(means["outside"])]
        for name, means in focus["gates"].items()
    ]
    told = (
        f"{focus['num_images']} images, {focus['num_left_out']} left out for having the garment "
        f"out of view; tolerance {focus['tolerance']:.1f} pixels."
    )
    tables = [_table(["what", "heat_inside", "pointing", "num_empty"], rows, 3)]
    if gates:
        tables.append(_table(["spatial gate", "inside", "outside"], gates, 2))
    definitions = [[html.escape(word) for word in pair] for pair in focus["definitions"].items()]
    return _tag("p", told) + "".join(tables) + _table(["word", "definition"], definitions)


def _queries(heading: str, shown: Sequence[Query], report: Mapping[str, Any]) -> str:
    k, metric = first_k(report["ks"]), report["interval"]["metric"]
    return _section(heading, _tag("p", _LEGEND), *(_query(query, k, metric) for query in shown))


def _query(query: Query, k: int, metric: str) -> str:
    """One line of a query and what was found."""
    asked = _cell(query.image, f"Query: {query.category}", "query", [query.category], query.id)
    found = [
        _cell(
            neighbour.image,
            f"Rank {rank}: {neighbour.category}, {'a hit' if neighbour.relevant else 'no hit'}",
            f"{rank} ✓ hit" if neighbour.relevant else f"{rank}",
            [neighbour.category, f"{neighbour.distance:.3f}"],
            neighbour.id,
            "hit" if neighbour.relevant else "",
        )
        for rank, neighbour in enumerate(query.neighbours, start=1)
    ]
    told = f"{query.hits} of the first {k} are of its category; {metric} {query.value:.3f}"
    if not is_number(query.value):
        told = "There is no other image of its category to find."
    return f'{_tag("p", told)}<div class="row">{asked}{"".join(found)}</div>'


def _cell(
    image: np.ndarray, alt: str, above: str, below: Sequence[str], name: str, class_: str = ""
) -> str:
    # Each by itself: the letters of a name may run from right to left.
    told = ", ".join(_tag("bdi", part) for part in below)
    file = f"<small>{_tag('bdi', name)}</small>"
    picture = _enlarging(pages.jpeg_uri(image), alt, f"{told}, {file}")
    return (
        f'<figure class="{class_}">{_tag("span", above)}{picture}'
        f"<figcaption><div>{told}</div> {file}</figcaption></figure>"
    )


def _enlarging(source: str, alt: str, told: str = "") -> str:
    """A picture that a click enlarges, and another one closes, without a script; told is HTML."""
    image = f'<img src="{source}" alt="{html.escape(alt)}">'
    return f'<details name="enlarged"><summary>{image}</summary><p>{told}</p></details>'


def _picture(picture: Picture) -> str:
    image = _enlarging(pages.data_uri("image/png", picture.png), picture.alt)
    return f'<figure class="picture">{image}{_tag("figcaption", picture.caption)}</figure>'


def _fields(section: str, fields: Any) -> str:
    named = fields.items() if isinstance(fields, Mapping) else [("", fields)]
    rows = [
        [html.escape(f"{section}.{name}".strip(".")), html.escape(without_folder(value))]
        for name, value in named
    ]
    return _table(["field", "value"], rows)


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0, class_: str = ""
) -> str:
    """A table whose rows' cells are HTML; ``numbers`` columns after the first are numbers."""
    head = "".join(
        _tag("th", text, 'scope="col" class="number"' if 0 < i <= numbers else 'scope="col"')
        for i, text in enumerate(header)
    )
    lines = []
    for first, *rest in rows:
        cells = "".join(
            f'<td class="number">{cell}</td>' if i < numbers else f"<td>{cell}</td>"
            for i, cell in enumerate(rest)
        )
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    body = "\n".join(lines)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide {class_}">{table}</div>'


def _section(heading: str, *parts: str) -> str:
    return f"<section>{_tag('h2', heading)}{''.join(parts)}</section>"


def _tag(name: str, text: str, attributes: str = "") -> str:
    return f"<{f'{name} {attributes}'.strip()}>{html.escape(text)}</{name}>"


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and is_number(value) else ""


_STYLE = """
:root { color-scheme: light dark; --line: #bbb; --bar: #2a6fb0; --hit: #1a8a3c; --soft: #555;
  --sheet: #fff; }
@media (prefers-color-scheme: dark) { :root { --line: #555; --bar: #6aa9e0; --hit: #4cc36a;
  --soft: #aaa; --sheet: #111; } }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.plain { font-size: 1.25rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
tbody th { font-weight: normal; overflow-wrap: break-word; max-width: 20rem; }
thead th { overflow-wrap: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.wide { overflow-x: auto; }
.bar { background: var(--bar); height: 1rem; margin-top: .2rem; min-width: 1px; }
td:has(.bar) { width: 24rem; min-width: 4rem; }
.row { display: flex; flex-wrap: wrap; gap: .8rem .6rem; margin-bottom: 2rem; }
.row figure { width: calc((100% - 5 * .6rem) / 6); }
figure { margin: 0; font-size: .85rem; }
figure span { display: block; }
.row img { border: 4px solid var(--line); height: 10rem; width: 100%; object-fit: contain;
  box-sizing: border-box; }
.row .hit img { border-color: var(--hit); }
.row .hit span { color: var(--hit); font-weight: bold; }
figcaption { overflow-wrap: anywhere; }
small { color: var(--soft); }
.picture { margin: 1rem 0 2rem; font-size: .9rem; }
.picture img { max-width: min(100%, 48rem); background: #fff; }
summary { display: block; cursor: zoom-in; }
details > p { display: none; }
details[open] > summary { position: fixed; inset: 0; z-index: 1; cursor: zoom-out;
  background: var(--sheet); display: grid; place-items: center; padding: 1rem 1rem 4rem; }
details[open] > summary img { max-width: 100%; max-height: 100%; width: 100%; height: 100%;
  min-height: 0; object-fit: contain; }
.row details[open] > summary img { max-width: 60rem; border: 0; }
details[open] > p { display: block; position: fixed; inset: auto 1rem .5rem; z-index: 2; margin: 0;
  text-align: center; overflow-wrap: anywhere; pointer-events: none; }
/* A figure's text is small: it may be larger than the screen. */
.picture details[open] > summary { overflow: auto; place-items: start; }
.picture details[open] > summary img { width: max(100%, 60rem); max-width: none; height: auto;
  max-height: none; }
footer { margin: 2rem 0; font-size: .8rem; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; }
  th, td { padding-right: .5rem; }
  table { font-size: .9rem; }
  tbody th { max-width: 7rem; }
  .row figure { width: calc((100% - 2 * .6rem) / 3); }
  .row img { height: 8rem; }
  td:has(.bar) { width: 5rem; }
  .bars thead th:last-child { font-size: 0; }
  /* A metric's definition goes below its numbers. */
  .metrics thead th:last-child { display: none; }
  .metrics tr { display: flex; flex-wrap: wrap; border-bottom: 1px solid var(--line); }
  .metrics th, .metrics td { border: 0; }
  .metrics tr > :first-child { flex: 1 0 6rem; }
  .metrics .number { flex: 0 0 3.4rem; }
  .metrics td:last-child { flex: 1 0 100%; font-size: .85rem; color: var(--soft); }
}
"""
