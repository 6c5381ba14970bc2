"""The addresses: the page, searches, photos and what is known of them.

No answer holds a path of this machine; a photo is served by its id alone, decoded and encoded anew,
so that nothing of its file but the pixels goes out.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cbam_jax import InputError, __version__
from cbam_jax.catalogue.catalogue import Catalogue
from cbam_jax.catalogue.items import Item, Neighbour
from cbam_jax.catalogue.reading import LARGEST
from cbam_jax.catalogue.reranking import check_effort
from cbam_jax.catalogue.server.asking import Busy
from cbam_jax.catalogue.server.explaining import Explainer, Pair
from cbam_jax.catalogue.server.finding import Finder, Search
from cbam_jax.catalogue.server.uploads import Guard, check_photo
from cbam_jax.catalogue.sources import parse_box
from cbam_jax.command_line import to_json
from cbam_jax.datasets.looks import shrunk, small_image
from cbam_jax.foreign_files import read_file
from cbam_jax.pages import encode_jpeg

# FastAPI is an extra: it is imported where it is used.
# pyright: reportMissingImports=false
if TYPE_CHECKING:
    from fastapi import FastAPI, Request

    from cbam_jax.embedder import Embedder

_PAGE = {
    "page.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
_SECONDS = 60  # That an answer may take.
_COMPILING = 120  # That the first heat maps may take, whose programs are compiled.
_CATEGORIES = 200  # In the page's list, at most.


def create_app(
    path: str | os.PathLike, embedder: "Embedder", *, hosts: set[str] | None = None
) -> Any:
    """The server's ASGI app.

    Args:
        path: of the catalogue.
        embedder: its model.
        hosts: names that it answers to, None: any.

    Raises:
        InputError: no catalogue, or one of another model.
    """
    from fastapi import FastAPI

    with Catalogue.open(path, embedder, create=False):
        pass
    finder, explainer = Finder(path, embedder), Explainer(path, embedder)

    @asynccontextmanager
    async def life(_: Any) -> AsyncIterator[None]:
        yield
        finder.close()
        explainer.close()

    # The pages of documentation would fetch scripts from elsewhere; /openapi.json is enough.
    app = FastAPI(
        title="cbam_jax catalogue",
        version=__version__,
        lifespan=life,
        default_response_class=_strict_json(),
        docs_url=None,
        redoc_url=None,
    )
    _add_errors(app, path)
    _add_page(app)
    _add_search(app, finder)
    _add_why(app, explainer)
    _add_items(app, path)
    return Guard(app, hosts)


def _strict_json() -> type:
    """Answers that every parser reads, whatever a payload holds: NaN, or half of a letter."""
    from fastapi.responses import JSONResponse

    class Strict(JSONResponse):
        def render(self, content: Any) -> bytes:
            return to_json(content).encode()

    return Strict


def _add_errors(app: "FastAPI", path: str | os.PathLike) -> None:
    """Every mistake is one line of JSON, without a path of this machine."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    async def mistake(_: Request, error: Any) -> JSONResponse:
        text = str(error).replace(str(path), "the catalogue").removeprefix("--")
        return JSONResponse({"error": text}, 400)

    async def invalid(_: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        where = " ".join(map(str, first["loc"]))
        return JSONResponse({"error": f"{where}: {first['msg']}"}, 422)

    async def http(request: Request, error: Any) -> JSONResponse:
        text = str(error.detail).lower()
        if error.status_code == 405:
            text += f": use {_used(error.headers['Allow'], request.url.path)}"
        return JSONResponse({"error": text}, error.status_code, error.headers)

    async def busy(_: Request, error: Any) -> JSONResponse:
        return JSONResponse({"error": "too many searches wait: try again"}, 503)

    async def bug(_: Request, error: Any) -> JSONResponse:
        return JSONResponse({"error": "a mistake of the server's: see its log"}, 500)

    app.add_exception_handler(InputError, mistake)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Busy, busy)
    app.add_exception_handler(TimeoutError, busy)
    app.add_exception_handler(Exception, bug)


def _used(methods: str, address: str) -> str:
    """How an address is asked.

    >>> _used("POST", "/items/1/why")
    'POST /items/1/why?query=ID'
    """
    parameters = {"search": "?id=ID", "why": "?query=ID"}
    return f"{methods} {address}{parameters.get(address.rpartition('/')[2], '')}"


def _add_page(app: "FastAPI") -> None:
    from fastapi import Response

    folder = Path(__file__).parent

    def add(address: str, name: str) -> None:
        content = (folder / name).read_bytes()

        @app.get(address, include_in_schema=False)
        async def file() -> Response:
            return Response(content, media_type=_PAGE[name])

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)

    add("/", "page.html")
    add("/page.css", "page.css")
    add("/page.js", "page.js")


def _add_search(app: "FastAPI", finder: Finder) -> None:
    from fastapi import Query, Request

    @app.post("/search", response_model=None)  # Of names in a payload FastAPI's model takes UTF-8.
    async def search(
        request: Request,
        id: Annotated[int | None, Query(description="of a photo; else send one", ge=1)] = None,
        k: Annotated[int, Query(ge=1, le=500)] = 12,
        where: Annotated[list[str] | None, Query(description="category=dress, price<50")] = None,
        box: Annotated[str | None, Query(description="x1,y1,x2,y2 in pixels")] = None,
        copies: Annotated[bool, Query(description="each copy as a photo of its own")] = False,
        rerank: Annotated[str | None, Query(description="aqe, k_reciprocal, aqe:k=5")] = None,
    ) -> dict[str, Any]:
        """Find the photos most like one: that of an id, or the image file in the body.

        Photos with the same content are one, which has the others as ``copies``; the photo that was
        sent, where the catalogue has it, is told as the ``same``, beside the ``k``. With ``rerank``
        the distances are those of the last step.
        """
        check_effort(rerank)
        photo = None if id is not None else await _sent(request, "id")
        place = parse_box(box) if box else None
        future = finder.find(Search(photo, id, k, tuple(where or ()), place, copies, rerank))
        found = await asyncio.wait_for(asyncio.wrap_future(future), _SECONDS)
        return {"neighbours": [_told(neighbour) for neighbour in found]}


async def _sent(request: "Request", instead: str) -> bytes:
    """The photo in the body; ``instead`` names the parameter that could have named one."""
    content = await request.body()
    check_photo(content, request.headers.get("content-type", ""), instead)
    return content


def _told(n: Neighbour) -> dict[str, Any]:
    """A neighbour without paths."""
    copies = [{"id": c.id, "name": os.path.basename(c.path)} for c in n.copies]
    about = {"id": n.id, "distance": n.distance, "same": n.same, "copy_of": n.copy_of}
    return {**about, "copies": copies, "name": os.path.basename(n.path), "payload": n.payload}


def _add_why(app: "FastAPI", explainer: Explainer) -> None:
    from fastapi import Path as InPath
    from fastapi import Query, Request

    @app.post("/items/{id}/why")
    async def why(
        request: Request,
        id: Annotated[int, InPath(ge=1, lt=2**63)],
        query: Annotated[int | None, Query(description="its id", ge=1, lt=2**63)] = None,
        box: Annotated[str | None, Query(description="x1,y1,x2,y2 of what is sent")] = None,
    ) -> dict[str, Any]:
        """Show where a photo is like another, that of an id or the image file in the body.

        ``query`` and ``result`` are JPEG in base64, each photo with its heat laid over it, from
        blue, which counts little, to red; ``empty`` says that no place stands out.
        """
        photo = query if query is not None else await _sent(request, "query")
        future = explainer.explain(Pair(photo, parse_box(box) if box else None, id))
        return await asyncio.wait_for(asyncio.wrap_future(future), _COMPILING)


def _add_items(app: "FastAPI", path: str | os.PathLike) -> None:
    """What is read from the catalogue without its model; each request opens it for itself."""
    from fastapi import Path as InPath
    from fastapi import Query, Response
    from starlette.exceptions import HTTPException

    @app.get("/health")
    def health() -> dict[str, Any]:
        """Whether the catalogue can be read, and how many photos can be found."""
        with Catalogue.open(path, create=False) as catalogue:
            return {"status": "ok", "photos": len(catalogue)}

    @app.get("/categories")
    def categories() -> dict[str, list[str]]:
        """The values of ``category``."""
        with Catalogue.open(path, create=False) as catalogue:
            return {"categories": catalogue.categories(_CATEGORIES)}

    @app.get("/items/{id}", response_model=None)
    def item(id: Annotated[int, InPath(ge=1, lt=2**63)]) -> dict[str, Any]:
        """What is known of a photo."""
        found = _item(path, id)
        name = os.path.basename(found.path)
        return {"id": id, "name": name, "payload": found.payload, "problem": found.problem}

    @app.get("/items/{id}/photo", response_class=Response)
    def photo(
        id: Annotated[int, InPath(ge=1, lt=2**63)],
        size: Annotated[int, Query(ge=16, le=1600)] = 320,
    ) -> Response:
        """A photo of at most ``size`` pixels a side, JPEG, its pixels alone."""
        found = _item(path, id)
        try:
            content = read_file(found.path, LARGEST)
        except (InputError, OSError):
            raise HTTPException(404, "the photo's file cannot be read") from None
        headers = {"cache-control": "private, max-age=300"}
        return Response(_jpeg(content, size), media_type="image/jpeg", headers=headers)


def _item(path: str | os.PathLike, number: int) -> Item:
    from starlette.exceptions import HTTPException

    with Catalogue.open(path, create=False) as catalogue:
        try:
            return catalogue.item(number)
        except InputError:
            raise HTTPException(404, f"no photo {number}") from None


def _jpeg(content: bytes, size: int) -> bytes:
    from starlette.exceptions import HTTPException

    try:
        image = small_image(content, size)
    except InputError:
        raise HTTPException(404, "the photo's file cannot be decoded") from None
    return encode_jpeg(shrunk(image, size), quality=88)
