"""``cbam-jax catalogue {add,find,list,remove,verify,...} CATALOGUE ...``: flags in, answers out."""

import argparse
import importlib.util
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cbam_jax import InputError, command_line
from cbam_jax.catalogue import (
    contact_sheets,
    doctor,
    embedders,
    indexing,
    printing,
    reranking,
    shards,
    sources,
)
from cbam_jax.catalogue.catalogue import Catalogue
from cbam_jax.catalogue.gallery import open_gallery
from cbam_jax.catalogue.indexing import KINDS, Added
from cbam_jax.catalogue.milvus import FORMS, INDEXES, did_you_mean, is_address
from cbam_jax.catalogue.queries import Part, part_of
from cbam_jax.catalogue.store import Store, check_place
from cbam_jax.datasets.image_files import SUFFIXES
from cbam_jax.foreign_files import expanded, is_gone, map_array, shown
from cbam_jax.whole_files import written_whole

_SHOWN = 10  # Lines of what may be many.


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, or 1 where it found something wrong."""
    parser, commands = _parser()
    options = command_line.parsed(parser, argv, commands)
    if isinstance(options.catalogue, str):
        _check_copy(options)
    else:
        _check_catalogue(options.catalogue)
    command_line.keep_compiled_programs()
    try:
        return options.run(options)
    except KeyboardInterrupt:
        writes = options.run in (add, rebuild, sync)
        kept = "; what was written before is kept" if writes else ""
        print(f"stopped{kept}", file=sys.stderr)
        return 130


def _check_copy(options: argparse.Namespace) -> None:
    """Refuse to change or check a copy in Milvus, and to ask it what it does not hold."""
    address = options.catalogue
    if is_address(address) and options.run not in (find, list_, serve):
        raise InputError(
            f"{shown(address)} is a copy, for find, list and serve alone: give the catalogue's "
            f"file, then `cbam-jax catalogue sync CATALOGUE {shlex.quote(address)}`"
        )
    if options.run is list_ and (options.problems or options.duplicates):
        flag = "--problems" if options.problems else f"--duplicates={options.duplicates}"
        raise InputError(
            f"{shown(address)} is a copy, which holds the photos that can be found, and neither "
            "the others nor how photos look: ask the catalogue's file, by `cbam-jax catalogue "
            f"list CATALOGUE {flag}`"
        )


def _check_catalogue(path: Path | None) -> None:
    """Refuse what is a source of photos: they are given after the catalogue."""
    if path is None:
        return
    ending = path.suffix.lower()
    is_folder = os.path.isdir(path)  # Not `Path.is_dir`, which raises where it may not look.
    if is_folder and ending == ".db":  # As Milvus Lite makes.
        raise InputError(f"{path} is a folder, no catalogue's file{did_you_mean(path)}")
    what = "a folder" if is_folder else f"named {ending}"
    if is_folder or ending in (*SUFFIXES, ".csv"):
        raise InputError(
            f"the first argument is the catalogue's file, such as shop.db, and "
            f"{shlex.quote(str(path))} is {what}: give the catalogue before it"
        )


def add(options: argparse.Namespace) -> int:
    """Add photos."""
    check_place(options.catalogue)
    if options.from_:
        return _add_shards(options)
    if not options.photos:
        raise InputError("nothing to add: give photos, folders, manifests, or --from=DIR")
    payload = dict(_pair(text) for text in options.set)
    listed = sources.listed(options.photos, payload or None)  # Refused, it leaves no file.
    model = embedders.choose(options.model, options.catalogue)
    if line := embedders.told(model) if model else None:
        print(line, file=sys.stderr)
    with Catalogue.open(options.catalogue, model) as catalogue:
        added = catalogue.add_listed(listed, skip_near=options.skip_near, checksum=options.checksum)
        _tell_added(added, catalogue)
    _tell_vanished(added.vanished, listed.folders, options.catalogue)
    return int(bool(listed.closed))


def _add_shards(options: argparse.Namespace) -> int:
    """Add what `cbam-jax embed` made."""
    if options.photos or options.set or options.model or options.skip_near or options.checksum:
        raise InputError(f"--from={options.from_} says all of its photos: give it alone")
    # Refused, it leaves no file.
    shards.check_whole(options.from_)
    with Catalogue.open(options.catalogue) as catalogue:
        _tell_added(catalogue.add_shards(options.from_), catalogue)
    return 0


def _tell_added(added: Added, catalogue: Catalogue) -> None:
    counts = added.counts
    names = {"copies": "copy"} if counts["copies"] == 1 else {}
    told = ", ".join(f"{counts[kind]} {names.get(kind, kind)}" for kind in KINDS if counts[kind])
    print(f"{told or 'no photos'}; {added.seconds:.1f} s; {len(catalogue)} can be found")
    if counts["unreadable"] or counts["refused"]:
        name = shlex.quote(str(catalogue.store.path))
        print(f"which and why: cbam-jax catalogue list {name} --problems")


def find(options: argparse.Namespace) -> int:
    """Find the photos that look most like others."""
    _one_answer(options)
    steps = reranking.parsed(options.rerank)
    asked, names = _asked(options)
    with Catalogue.open(options.catalogue, options.model, create=False) as catalogue:
        if catalogue.index != "flat":
            print(f"approximate: {options.catalogue} is searched by {catalogue.index}, and not all "
                  "that is near is found", file=sys.stderr)  # fmt: skip
        found = catalogue.find_all(
            asked,
            options.k,
            where=options.where or None,
            boxes=[[sources.parse_box(options.box)]] if options.box else None,
            unlike=[part_of(text) for text in options.unlike],
            max_distance=options.max_distance,
            copies=options.copies,
            rerank=options.rerank,
        )
        photos = [_photos(catalogue, parts) for parts in asked]
    box = sources.parse_box(options.box) if options.box else None
    told = reranking.told(steps) if steps else ""
    if told:
        print(told, file=sys.stderr)
    answers = [contact_sheets.Shown(*a, box) for a in zip(names, photos, found, strict=True)]
    _draw(options, answers, told)
    print(_printer(options, "answers")(list(zip(names, found, strict=True))))
    return 0


def _photos(catalogue: Catalogue, parts: Sequence[Part]) -> list[str]:
    """The paths of a query's photos."""
    known = [catalogue.item(part).path if isinstance(part, int) else part for part in parts]
    return [str(expanded(part)) for part in known if isinstance(part, str)]


def _draw(options: argparse.Namespace, answers: Sequence[contact_sheets.Shown], told: str) -> None:
    """Write the contact sheets that were asked for."""
    try:
        if options.html:
            command_line.write_text(options.html, contact_sheets.page(answers, told))
        if options.png:
            pixels = cv2.cvtColor(contact_sheets.sheet(answers), cv2.COLOR_RGB2BGR)
            with written_whole(options.png) as partial:
                partial.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    except OSError as error:
        path = options.html or options.png
        raise InputError(f"cannot write {path}: {error.strerror}; name another file") from error


def list_(options: argparse.Namespace) -> int:
    """List the photos."""
    with Catalogue.open(options.catalogue, create=False) as catalogue:
        if options.duplicates:
            groups = catalogue.duplicates(near=options.duplicates == "near")
            print(_printer(options, "groups")(groups))
            return 0
        items = [
            item
            for item in catalogue.items(options.where or None)
            if not options.problems or item.problem
        ]
        filled = bool(items) or next(catalogue.items(), None) is not None
    text = _printer(options, "items")(items)
    if text:
        print(text)
    elif not filled:
        print(f"{options.catalogue} is empty", file=sys.stderr)
    elif options.problems:
        print("no problems")
    return 0


def remove(options: argparse.Namespace) -> int:
    """Forget photos; their files stay."""
    if bool(options.ids) + bool(options.where) + options.missing != 1:
        raise InputError("give ids, --where=NAME=VALUE, or --missing: one of the three")
    with Catalogue.open(options.catalogue, create=False) as catalogue:
        ids = options.ids
        if not ids:
            items = catalogue.items(options.where or None)
            ids = [item.id for item in items if not options.missing or is_gone(item.path)]
        print(f"{catalogue.remove(ids)} removed; {len(catalogue)} can be found")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Say what is wrong with a catalogue; 1 where something is."""
    with Catalogue.open(options.catalogue, options.model, create=False) as catalogue:
        found = catalogue.verify(options.sample)
        count = len(catalogue)
    for line in found[: None if options.all else _SHOWN]:
        print(shown(line))
    more = f" (the first {_SHOWN}; all by --all)" if len(found) > _SHOWN and not options.all else ""
    print(f"{len(found)} findings{more}; {count} photos can be found")
    return int(bool(found))


def rebuild(options: argparse.Namespace) -> int:
    """Embed all photos anew by another model."""
    count = Catalogue.rebuild(options.catalogue, options.model)
    print(f"embedded anew by {options.model}; {count} can be found")
    return 0


def sync(options: argparse.Namespace) -> int:
    """Bring a copy in Milvus up to a catalogue, or a catalogue up to the shards of a folder."""
    other = options.other
    if isinstance(other, Path):
        if not other.is_dir() or (other.suffix == ".db" and not any(other.glob("*-of-*"))):
            raise InputError(f"{other} is no folder of shards{did_you_mean(other)}")
        if options.index:
            raise InputError(f"--index={options.index} is of a copy in Milvus, {other} is a folder")
        options.from_, options.photos, options.set = other, [], []
        options.skip_near = options.checksum = options.model = None
        return _add_shards(options)
    with Catalogue.open(options.catalogue, create=False) as catalogue:
        done = catalogue.sync(other, options.index)
    exact = f"recall@10 {done.recall:.3f} of exact search" if done.recall is not None else "exact"
    print(
        f"{done.new} new, {done.changed} changed, {done.removed} removed; {done.count} can be "
        f"found; {done.index}, {exact}"
    )
    return 0


def serve(options: argparse.Namespace) -> int:
    """Serve a catalogue until the process is told to end."""
    for name in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"serve needs {name}: pip install 'cbam_jax[serve]'")
    from cbam_jax.catalogue import server

    if isinstance(options.catalogue, Path):
        with Store(options.catalogue) as store:
            store.check_pages()
            open_gallery(store)
    with Catalogue.open(options.catalogue, create=False) as catalogue:
        listening = server.bound(options.host, options.port)
        embedder = embedders.load_embedder(options.model, catalogue.store, server.TOGETHER)
    server.serve(options.catalogue, embedder, listening)
    return 0


def doctor_(options: argparse.Namespace) -> int:
    """Say what is installed and would be used; 1 where the catalogue is missing or damaged."""
    wrong = False
    for line in doctor.doctor(options.catalogue, options.model):
        wrong |= line.startswith(doctor.WRONG)
        print(shown(line, 1000))
    return int(wrong)


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of all, and that of each command."""
    parser = argparse.ArgumentParser(
        prog=None if sys.argv[0].startswith("cbam-jax") else "python -m cbam_jax.catalogue",
        description="Photos that can be searched by photos, in one file.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[Any], int], text: str, nargs: str | None = None
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        what = "the file, such as shop.db; find, list and serve also take milvus://HOST:PORT/COLLECTION"
        made.add_argument("catalogue", type=_catalogue, nargs=nargs, help=what)
        made.set_defaults(run=run)
        return made

    _add_flags(command("add", add, "add photos: what is new of files, folders and manifests"))
    _find_flags(command("find", find, "find the photos that look most like others"))
    _list_flags(command("list", list_, "list the photos, or what could not be read"))
    _remove_flags(command("remove", remove, "forget photos; their files stay"))
    _verify_flags(command("verify", verify, "say what is wrong with a catalogue, if anything"))
    made = command("rebuild", rebuild, "embed all photos anew, by another model")
    made.add_argument("--model", required=True, help="a run, a folder or a hub id")
    _sync_flags(command("sync", sync, "bring a copy in Milvus up to a catalogue"))
    made = command("serve", serve, "serve a page and JSON, on this machine alone by default")
    _model_flag(made)
    made.add_argument("--host", default="127.0.0.1", help="0.0.0.0 is all networks")
    made.add_argument("--port", type=int, default=8000, help="default: 8000; 0 is any that is free")
    _model_flag(command("doctor", doctor_, "say what is installed and would be used", "?"))
    return parser, commands.choices


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="*", help="photos, folders, or manifests: photos.csv")
    parser.add_argument(
        "--from", dest="from_", type=command_line.path, metavar="DIR",
        help="instead of photos: what `cbam-jax embed --out=DIR` made of them",
    )  # fmt: skip
    _model_flag(parser)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="known of all of them; NAME= forgets it",
    )
    parser.add_argument(
        "--skip-near", action="store_true", help="leave out what is nearly the same as another"
    )
    parser.add_argument(
        "--checksum", action="store_true", help="read files whose size and time are as before, too"
    )


def _find_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("queries", nargs="*", help="photos, or ids; each is a query")
    _model_flag(parser)
    parser.add_argument("-k", type=int, default=12, help="photos to find; default: 12")
    parser.add_argument("--together", action="store_true", help="all queries are one garment")
    parser.add_argument("--embedding", type=command_line.path, help="queries [d] or [q, d], x.npy")
    _repeated(parser, "--like", "PHOTO|ID", "more like this, beside each query")
    _repeated(parser, "--unlike", "PHOTO|ID", "less like that")
    _where_flag(parser)
    parser.add_argument("--box", metavar="X1,Y1,X2,Y2", help="the garment in the query, in pixels")
    parser.add_argument("--max-distance", type=float, help="leave out what is farther")
    text = "each copy of a photo as a photo of its own; else copies are one"
    parser.add_argument("--copies", action="store_true", help=text)
    text = "rank again: aqe, k_reciprocal, or both, with options as in aqe:k=5:alpha=2"
    parser.add_argument("--rerank", metavar="STEP,STEP", help=text)
    _format_flags(parser)
    _sheet_flags(parser)


def _sheet_flags(parser: argparse.ArgumentParser) -> None:
    text = "also write a page with the photos, one file"
    parser.add_argument("--html", type=command_line.path, metavar="FILE", help=text)
    text = "also write a picture of them"
    parser.add_argument("--png", type=command_line.path, metavar="FILE", help=text)


def _list_flags(parser: argparse.ArgumentParser) -> None:
    _where_flag(parser)
    parser.add_argument("--problems", action="store_true", help="only what has no embedding")
    parser.add_argument(
        "--duplicates",
        nargs="?",
        const="near",
        choices=["near", "exact"],
        help="groups of photos that are nearly the same (near, default), or the same (exact)",
    )
    _format_flags(parser)


def _remove_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", type=int, help="of the photos")
    _where_flag(parser)
    parser.add_argument("--missing", action="store_true", help="all whose file is not there")


def _verify_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    text = "photos to embed again; 0 needs no model; default: 16"
    parser.add_argument("--sample", type=int, default=16, help=text)
    parser.add_argument("--all", action="store_true", help="print every finding, not ten")


def _sync_flags(parser: argparse.ArgumentParser) -> None:
    text = f"the copy: {FORMS}; or a folder that `cbam-jax embed` made, to be added"
    parser.add_argument("other", type=_catalogue, metavar="COPY|DIR", help=text)
    text = "how the copy is searched: flat, exact (default), or hnsw or ivf, approximate and faster"
    parser.add_argument("--index", choices=list(INDEXES), help=text)


def _catalogue(text: str) -> Path | str:
    """The path of a file, or an address as it is; one that is wrong is told where it is opened."""
    try:
        return text if is_address(text) else command_line.path(text)
    except InputError:  # Argparse would tell it as its own.
        return text


def _model_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="a run, a folder, a hub id, or a backbone with ImageNet weights, such as resnet50; "
        "default: what the catalogue was made with, at first efficientnet_lite0",
    )


def _where_flag(parser: argparse.ArgumentParser) -> None:
    text = "only those, such as category=dress or price<50; again for more"
    _repeated(parser, "--where", "CONDITION", text)


def _repeated(parser: argparse.ArgumentParser, flag: str, metavar: str, text: str) -> None:
    parser.add_argument(flag, action="append", default=[], metavar=metavar, help=text)


def _format_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="answer in JSON")
    group.add_argument("--csv", action="store_true", help="answer in CSV")


def _printer(options: argparse.Namespace, what: str) -> Callable[[Any], str]:
    kind = "json" if options.json else "csv" if options.csv else "text"
    made = getattr(printing, f"{what}_{kind}")
    # Into a file the cells of a table go as they are; on a terminal they would move its cursor.
    shown = options.csv and sys.stdout.isatty()
    return (lambda found: printing.on_a_terminal(made(found))) if shown else made


def _pair(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise InputError(f"--set={text}: give NAME=VALUE")
    return name, sources.value_of(value)


def _one_answer(options: argparse.Namespace) -> None:
    """Refuse flags that do not fit each other."""
    if not (options.queries or options.like or options.embedding):
        raise InputError("no query: give photos or ids, --like=PHOTO, or --embedding=x.npy")
    if options.box and (len(options.queries) != 1 or options.like or options.embedding):
        raise InputError(f"--box={options.box} is of one photo: give that alone")
    for flag, file in (("--html", options.html), ("--png", options.png)):
        if file and is_gone(file.parent):
            raise InputError(
                f"{flag}={file}: the folder {file.parent} is not there: make it, or name another"
            )


def _asked(options: argparse.Namespace) -> tuple[list[list[Part]], list[str]]:
    """The parts of each query, and what it is called."""
    like: list[Part] = [part_of(text) for text in options.like]
    parts: list[Part] = [part_of(text) for text in options.queries]
    names = list(options.queries)
    if options.embedding:
        rows = _embedding(options.embedding)
        parts += rows
        names += [f"{options.embedding}[{row}]" for row in range(len(rows))]
    if options.together or not parts:
        return [[*parts, *like]], [" + ".join([*names, *options.like])]
    return [[part, *like] for part in parts], [" + ".join([name, *options.like]) for name in names]


def _embedding(path: Path) -> list[np.ndarray]:
    try:
        array = map_array(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--embedding={path}: cannot be read as x.npy ({error})") from None
    if array.ndim not in (1, 2) or not array.size:
        raise InputError(f"--embedding={path}: give an array [d] or [q, d] in a .npy file")
    return list(np.atleast_2d(array))


def _tell_vanished(paths: Sequence[str], folders: Sequence[str], name: Path) -> None:
    """Say what is gone, and how to forget it unless a folder is: its disk may be away."""
    away = {path: indexing.lost_folder(path, folders) for path in paths}
    lost = Counter(folder for folder in away.values() if folder)
    for folder, count in lost.items():
        print(
            f"{shown(folder)} is not there, or empty; of its photos the catalogue has {count}, "
            "and keeps them: is its disk connected?"
        )
    gone = [path for path in paths if not away[path]]
    for path in gone[:_SHOWN]:
        print(f"not there any more: {shown(path)}")
    more = f"... {len(gone) - _SHOWN} more" if len(gone) > _SHOWN else ""
    forget = f"to forget them: cbam-jax catalogue remove {shlex.quote(str(name))} --missing"
    if last := "; ".join(filter(None, [more, forget if gone and not lost else ""])):
        print(last)
