"""Download of one file: resumed where it was interrupted, and quick to say that it can't."""

import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from cbam_jax import InputError

_CHUNK = 1 << 20
_LOG_EVERY = 16 << 20
_TIMEOUT_S = 30


def download(url: str, path: Path, *, remedy: str) -> None:
    """Downloads ``url`` to ``path`` unless it is there. Progress goes to stderr.

    Bytes are gathered in ``<path>.part``, renamed when complete. Another call continues the part
    with an HTTP range where the server supports it, and starts over where not. The content is
    not verified: that is for the caller, who knows the checksum.

    Args:
        url: the address.
        path: the file to write; its folder is made.
        remedy: what the user can do instead, for the error message.

    Raises:
        InputError: names the URL, the cause, and the remedy. There are no retries.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        _fetch(url, part)
    except urllib.error.HTTPError as error:
        raise InputError(
            f"cannot download {url} (HTTP {error.code} {error.reason}): {remedy}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        raise InputError(
            f"cannot download {url} ({cause}): run again to resume, or {remedy}"
        ) from error
    part.replace(path)


def _fetch(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the range begins at or beyond the end: the part is stale
            raise
        error.close()
        part.unlink()
        return _fetch(url, part)
    with response:
        have = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if have else "wb") as file:
            for chunk in _progress(response, url, have, total):
                file.write(chunk)
    size = part.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"the connection ended after {size} of {total} bytes")


def _progress(response, url: str, have: int, total: int | None) -> Iterator[bytes]:
    terminal = sys.stderr.isatty()
    print(f"downloading {url}" + (f", resumed at {have} bytes" if have else ""), file=sys.stderr)
    bar = tqdm(initial=have, total=total, unit="B", unit_scale=True, disable=not terminal)
    with bar:
        while chunk := response.read1(_CHUNK):
            yield chunk
            bar.update(len(chunk))
            before, have = have, have + len(chunk)
            if not terminal and before // _LOG_EVERY != have // _LOG_EVERY:
                of = f" of {total / 1e6:.0f}" if total else ""
                print(f"downloaded {have / 1e6:.0f}{of} MB", file=sys.stderr, flush=True)
