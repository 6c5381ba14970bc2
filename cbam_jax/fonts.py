"""Text of figures in any script: a font of this system that has it, or a mark in its place."""

import functools
import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARK = "\N{WHITE SQUARE}"  # In matplotlib's own font, which is always there.
_told: set[int] = set()


def fit_fonts(figure: "Figure") -> None:
    """Give the texts of a figure fonts that have their characters.

    matplotlib's default font has Latin, Greek, Cyrillic, Arabic and Hebrew letters; others come
    from the fonts of this system. A character that none has becomes a square, and one line on
    stderr says so.
    """
    from matplotlib.text import Text

    texts = [text for text in figure.findobj(Text) if text.get_text()]  # type: ignore[attr-defined]
    unknown = {ord(c) for text in texts for c in text.get_text() if c != "\n"} - _default_font()[1]
    if not unknown:
        return
    families, missing = _fonts_for(frozenset(unknown))
    _tell(missing)
    marks = dict.fromkeys(missing, _MARK)
    for text in texts:
        text.set_fontfamily([_default_font()[0], *families])
        text.set_text(text.get_text().translate(marks))


def _tell(missing: frozenset[int]) -> None:
    """Say once of each character that no font draws it."""
    new = sorted(missing - _told)
    if new:
        _told.update(new)
        text = "".join(map(chr, new[:20])).encode(errors="replace").decode()
        print(
            f"no font of this system draws {text!r}: figures show squares instead; install one, "
            "such as Debian's fonts-noto-cjk for Chinese, Japanese and Korean",
            file=sys.stderr,
        )


def _default_font() -> tuple[str, frozenset[int]]:
    from matplotlib.font_manager import FontProperties, findfont

    return _font(findfont(FontProperties()))


@functools.lru_cache
def _font(path: str) -> tuple[str, frozenset[int]]:
    """The name of a font's family and the characters that it can draw, none of a damaged one."""
    from matplotlib.font_manager import get_font

    try:
        font = get_font(path)
        return font.family_name, frozenset(font.get_charmap() if font.scalable else ())
    except (OSError, RuntimeError):
        return "", frozenset()


@functools.lru_cache
def _fonts_for(unknown: frozenset[int]) -> tuple[list[str], frozenset[int]]:
    """Families that draw some characters, and those that none draws."""
    families, missing = [], unknown
    while missing:
        name, drawn = max(_system_fonts().items(), key=lambda font: len(font[1] & missing))
        if not drawn & missing:
            break
        families.append(name)
        missing -= drawn
    return families, missing


@functools.lru_cache
def _system_fonts() -> dict[str, frozenset[int]]:
    """By the name of each family the characters of the font that texts of it are drawn with."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    # Of families without a regular weight it says at each use which one it takes.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    names = sorted({entry.name for entry in fontManager.ttflist})
    # matplotlib's last resort has a box for each character that there is.
    usable = [name for name in names if not name.startswith("Last Resort")]
    return {name: _font(findfont(FontProperties(family=[name])))[1] for name in usable}
