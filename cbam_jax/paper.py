"""The paper's tables and figures on any dataset: ``python -m cbam_jax.paper {tables,figures}``.

Each row is a config of the checkout, trained and measured by its ``train.py`` and ``evaluate.py``
in processes of their own, once a seed. The same command again goes on where it was interrupted,
however that was: finished rows are kept, and an unfinished one resumes from its checkpoint.
WORKDIR gets ``table1.md``, ``.csv``, ``.json`` and ``.png``, likewise ``table2``, and the runs
themselves under ``runs/``; ``figures`` then draws Figures 4 and 5 from these runs.
"""

import argparse
import contextlib
import fcntl
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbam_jax import InputError, command_line
from cbam_jax.datasets import open_dataset
from cbam_jax.tables import READING, ROWS, TABLES, csv_text, make_table, markdown

CHECKOUT = Path(__file__).resolve().parent.parent
# Fields that the command has flags of its own for.
_OWN_FLAGS = {
    "seed": "--seeds",
    "data.name": "--data",
    "model.name": "the rows, which --table chooses",
}
_EPILOG = """\
--config.FIELD=VALUE sets a field of every row, as for train.py. On two CPU cores, without
pretrained weights, which is no test of the paper but of the command:

  python -m cbam_jax.paper tables --workdir=runs/tables --config=configs/clothing.py \\
      --config.data.image_size=32 --config.train.steps=50
"""


def make_tables(
    workdir: Path,
    numbers: Sequence[int],
    *,
    seeds: int,
    split: str,
    settings: Mapping[str, str],
    command: str,
) -> list[dict[str, Any]]:
    """Train and measure what is missing in ``workdir``, write the tables, return their documents.

    Seed by seed, all rows in each, so that a mistake that meets only one of the rows shows early,
    and tables can be written after each seed.

    Args:
        workdir: of an earlier call with the same settings, or a new one.
        numbers: of the tables.
        seeds: how many; 0 to ``seeds - 1``.
        split: that is measured.
        settings: ``config``, a file that stands in for each row's own, and fields of the config.
        command: that repeats it, for the tables.

    Raises:
        InputError: a mistake, or a row that failed.
    """
    rows = list(dict.fromkeys(name for number in numbers for name in TABLES[number]))
    jobs = [(row, seed) for seed in range(seeds) for row in rows]
    documents = []
    with locked(workdir):
        check_settings(workdir, settings)
        if not all(read_result(workdir, row, seed, split) for row, seed in jobs):
            check_split(row_config(rows[0], settings), split, settings)
        for i, (row, seed) in enumerate(jobs):
            print(progress(workdir, jobs, i, split), flush=True)
            new = run_row(workdir, row, seed, split=split, settings=settings)
            if (new and row == rows[-1]) or i == len(jobs) - 1:
                documents = write_tables(workdir, numbers, seed + 1, split, command)
    return documents


def make_figures(workdir: Path, *, seed: int, split: str, queries: Sequence[str]) -> dict[str, Any]:
    """Draw Figure 4 of each row and Figure 5 of all, from the finished runs of one seed.

    Args:
        workdir: of ``make_tables``.
        seed: of the runs.
        split: whose queries are drawn.
        queries: their ids; without any, six that are spread evenly over the split.

    Raises:
        InputError: there is no such run, or a query is none of the split's.
    """
    from cbam_jax import figures

    with locked(workdir):
        rows = [row for row in ROWS if read_result(workdir, row, seed, split)]
        if not rows:
            raise InputError(
                f"no finished row of seed {seed}, split {split}, in {workdir}: make the tables "
                "first, or check --workdir, --seed and --split"
            )
        folder = workdir / "figures"
        folder.mkdir(exist_ok=True)
        queries = queries or sample_queries(run_folder(workdir, rows[0], seed) / "eval" / split)
        written, heats = [], {}
        for i, row in enumerate(rows):
            print(f"[{i + 1}/{len(rows)}] {ROWS[row].title}, seed {seed}", flush=True)
            run = run_folder(workdir, row, seed)
            arguments = [f"--workdir={run}", f"--split={split}", f"--queries={','.join(queries)}"]
            call(workdir, f"{row}-figures", [script("evaluate.py"), "--figures", *arguments])
            for source, name in {"results": f"figure4-{row}", "worst": f"worst-{row}"}.items():
                written.append(folder / f"{name}.png")
                shutil.copyfile(run / "eval" / split / f"{source}.png", written[-1])
            heats[row] = dict(np.load(run / "eval" / split / "heat.npz"))
        drawn = heats[rows[0]]
        figure = figures.heat_rows(
            list(drawn["image"]),
            {ROWS[row].title: heat["heat"] for row, heat in heats.items()},
            titles=drawn["title"].tolist(),
        )
        written.append(folder / "figure5.png")
        figures.save(figure, written[-1])
    return {"queries": list(queries), "figures": [str(path) for path in written]}


def sample_queries(evaluated: Path, number: int = 6) -> list[str]:
    """Return ids of queries spread evenly over an evaluation's ``embeddings.npz``."""
    with np.load(evaluated / "embeddings.npz") as saved:
        label, is_query, ids = saved["label"], saved["is_query"], saved["id"]
    # Alone in its category, a query has nothing to find; a comma parts the ids of --queries.
    alone = np.bincount(label)[label] < 2
    usable = [name for name in ids[is_query & ~alone].tolist() if "," not in name]
    places = np.linspace(0, len(usable) - 1, min(number, len(usable))).astype(int)
    return [usable[place] for place in places]


def run_folder(workdir: Path, row: str, seed: int) -> Path:
    """Where a row's run of one seed lies; a run of train.py like any other."""
    return workdir / "runs" / f"{row}-seed{seed}"


def read_result(workdir: Path, row: str, seed: int, split: str) -> dict[str, Any] | None:
    """Return what a finished run measured, or None while it is unfinished."""
    path = run_folder(workdir, row, seed) / f"result-{split}.json"
    return json.loads(path.read_text()) if path.exists() else None


def row_config(row: str, settings: Mapping[str, str]) -> str:
    """Return the path of the config that a row is trained with."""
    return settings.get("config") or script("configs", f"{row}.py")


def run_row(workdir: Path, row: str, seed: int, *, split: str, settings: Mapping[str, str]) -> bool:
    """Train and measure one row with one seed, unless that is done: whether it was not."""
    if read_result(workdir, row, seed, split):
        return False
    start, name, folder = time.monotonic(), f"{row}-seed{seed}", run_folder(workdir, row, seed)
    fields = {**settings, "model.name": row, "seed": str(seed)}
    fields.pop("config", None)
    arguments = [f"--config={row_config(row, settings)}", f"--workdir={folder}"]
    arguments += [f"--config.{field}={value}" for field, value in fields.items()]
    if not call(workdir, name, [script("train.py"), *arguments])["finished"]:
        raise KeyboardInterrupt
    call(workdir, name, [script("evaluate.py"), f"--workdir={folder}", f"--split={split}"])
    config = json.loads((folder / "config.json").read_text())
    if not cost_path(workdir, row).exists():
        measure_cost(workdir, row, config)
    result = {
        "row": row,
        "seed": seed,
        "config_file": settings.get("config", f"configs/{row}.py"),
        "seconds": round(time.monotonic() - start, 1),
        "config": config,
        "report": json.loads((folder / "eval" / split / "metrics.json").read_text()),
    }
    # Last, so that whoever finds it finds all of the row.
    command_line.write_json(folder / f"result-{split}.json", result)
    return True


def cost_path(workdir: Path, row: str) -> Path:
    """Where a row's parameters, operations and speed are kept."""
    return workdir / "runs" / f"{row}-cost.json"


def measure_cost(workdir: Path, row: str, config: Mapping[str, Any]) -> None:
    """Measure a row's embedding in a process of its own, as the runs' config has it."""
    fields = {name: config["model"][name] for name in ("embedding_dim", "pooling", "dtype")}
    fields |= {"model": config["model"]["name"], "image_size": config["data"]["image_size"]}
    fields |= {"batch_size": config["eval"]["batch_size"]}
    arguments = [f"--{name}={value}" for name, value in fields.items() if value is not None]
    command = ["-m", "cbam_jax.benchmark", "embed", "--no_plain", *arguments]
    cost = call(workdir, f"{row}-cost", command)
    command_line.write_json(cost_path(workdir, row), cost)


def write_tables(
    workdir: Path, numbers: Sequence[int], seeds: int, split: str, command: str
) -> list[dict[str, Any]]:
    """Write each table of the runs with seeds below ``seeds``; return their documents."""
    documents = []
    for number in numbers:
        results = {
            row: [
                result
                for seed in range(seeds)
                if (result := read_result(workdir, row, seed, split))
            ]
            for row in TABLES[number]
        }
        costs = {row: json.loads(cost_path(workdir, row).read_text()) for row in TABLES[number]}
        table = make_table(number, results, costs, command=command)
        path = workdir / f"table{number}.json"
        command_line.write_json(path, table)
        command_line.write_text(path.with_suffix(".md"), markdown(table))
        command_line.write_text(path.with_suffix(".csv"), csv_text(table))
        draw_table(path.with_suffix(".png"), table)
        print(f"\n{markdown(table)}\nwrote {path.with_suffix('.*')}", flush=True)
        documents.append(table)
    return documents


def draw_table(path: Path, table: Mapping[str, Any]) -> None:
    """Draw a table's mAP@K as bars."""
    from cbam_jax import figures

    metrics = [f"map@{k}" for k in table["ks"]]
    rows = {row["title"]: [row["metrics"][name] for name in metrics] for row in table["rows"]}
    several = len(table["seeds"]) > 1
    bars = "means of seeds" if several else "seed"
    line = "; lines: 95 % interval (Student's t over the seeds)" if several else ""
    caption = (
        f"{table['title']}, {table['data']}, split {table['split']}, {table['num_queries']} "
        f"queries ({table['num_left_out']} left out). map@K as the paper defines it. Bars: {bars} "
        f"{', '.join(map(str, table['seeds']))}; dots: each seed{line}. Red diamonds: the paper's "
        "figures, of DeepFashion."
    )
    figure = figures.metric_bars(
        metrics,
        {
            title: [[100 * value for value in m["values"]] for m in row]
            for title, row in rows.items()
        },
        {
            title: [(100 * low, 100 * high) for low, high in (m["interval"] for m in row)]
            for title, row in rows.items()
        },
        marks={
            title: [None if m["paper"] is None else 100 * m["paper"] for m in row]
            for title, row in rows.items()
        },
        ylabel="mAP@K (%)",
        caption=caption,
    )
    figures.save(figure, path)


def progress(workdir: Path, jobs: Sequence[tuple[str, int]], position: int, split: str) -> str:
    """Say which row is next, how many there are, and about how long they will take."""
    row, seed = jobs[position]
    line = f"[{position + 1}/{len(jobs)}] {ROWS[row].title}, seed {seed}"
    results = {job: read_result(workdir, *job, split) for job in jobs}
    if results[row, seed]:
        return f"{line}: finished before"
    seconds = {job: result["seconds"] for job, result in results.items() if result}
    if not seconds:
        return line
    overall = sum(seconds.values()) / len(seconds)
    left = 0.0
    for name, _ in (job for job in jobs if job not in seconds):
        same = [value for (other, _), value in seconds.items() if other == name]
        left += sum(same) / len(same) if same else overall
    return f"{line}; about {max(left / 60, 0.1):.1f} min left"


def check_settings(workdir: Path, settings: Mapping[str, str]) -> None:
    """Keep the settings of a workdir's runs; InputError where they were made with others."""
    path = workdir / "settings.json"
    kept = {name: value for name, value in settings.items() if name not in READING}
    # train.py writes it when all its checks have passed: before that, settings can be mended.
    if path.exists() and any(workdir.glob("runs/*/config.json")):
        saved = json.loads(path.read_text())
        for name in sorted(kept.keys() | saved.keys()):
            if kept.get(name) != saved.get(name):
                raise InputError(
                    f"{workdir} holds rows with {name}={saved.get(name, '(as in the config)')}, "
                    f"not {kept.get(name, '(as in the config)')}: use those settings, or a new "
                    "--workdir"
                )
    command_line.write_json(path, kept)


def check_split(config_path: str, split: str, settings: Mapping[str, str]) -> None:
    """Open the split that will be measured; InputError where there is none."""
    fields = {
        name: settings.get(f"data.{name}", value)
        for name, value in _load_config(config_path)["data"].items()
        if name in ("name", "label", "data_dir", "manual_dir", "on_bad_image")
    }
    open_dataset(fields.pop("name"), split, **fields)


def _load_config(path: str) -> Mapping[str, Any]:
    """Return a config file's fields, without overrides."""
    spec = importlib.util.spec_from_file_location("row_config", path)
    if spec is None or spec.loader is None or not os.path.exists(path):
        raise InputError(f"--config={path}: no such file")
    module = importlib.util.module_from_spec(spec)
    if str(CHECKOUT) not in sys.path:  # Configs import one another.
        sys.path.insert(0, str(CHECKOUT))
    spec.loader.exec_module(module)
    return module.get_config()


def script(*parts: str) -> str:
    """Return the path of a script or config of the checkout that this package is part of."""
    path = CHECKOUT.joinpath(*parts)
    if not path.exists():
        raise InputError(
            f"{path} is missing: rows are trained by the train.py of a checkout; clone the "
            "repository and run the command in its root"
        )
    return str(path)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold a workdir's lock; wait where another command, or what it left behind, has it.

    Processes that are started inherit it: one whose parent was killed ends at its next line of
    output, and until then nobody else may write to its run.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is at work in {workdir}: waiting for it to end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        os.set_inheritable(file.fileno(), True)
        yield


def call(workdir: Path, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run Python with arguments; return the JSON document of the last line of its output.

    What it says is shown, and kept in ``WORKDIR/logs/NAME.log`` with its errors.

    Raises:
        InputError: it failed; with its own line where it told one.
    """
    path = workdir / "logs" / f"{name}.log"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as log:
        log.write(f"$ {shlex.join(['python', *arguments])}\n")
        log.flush()
        begin = path.stat().st_size
        # A session of its own: Ctrl-C in a terminal would reach it beside the signal of _follow,
        # and the second signal keeps train.py from saving.
        with subprocess.Popen(
            [sys.executable, *arguments],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            close_fds=False,
            start_new_session=True,
        ) as process:
            last = _follow(process, log)
    if process.returncode:
        with path.open() as log:
            log.seek(begin)
            raise InputError(_failure(name, process.returncode, log.read(), path))
    return json.loads(last)


def _environment() -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH")
    path = str(CHECKOUT) if not inherited else f"{CHECKOUT}{os.pathsep}{inherited}"
    return {**os.environ, "PYTHONPATH": path}


def _follow(process: subprocess.Popen, log: Any) -> str:
    """Show and keep a process's output to its end; its last line is only returned."""
    last, stopped = "", False
    while process.stdout is not None:
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if last:
                    print(f"    {last}", flush=True)
                last = line.rstrip("\n")
            process.wait()
            break
        except KeyboardInterrupt:
            if stopped:  # The second time it is meant.
                process.kill()
                raise
            stopped = True
            print("stopping: the step under way is saved first", flush=True)
            process.terminate()
    if stopped:
        raise KeyboardInterrupt
    return last


def _failure(name: str, status: int, errors: str, path: Path) -> str:
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    if told:
        return f"{name}: {told[-1].removeprefix('error: ')}"
    cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return f"{name} ended with {cause}: see {path}; the same command goes on from there"


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Read ``--config.field=value`` flags, which train.py checks.

    >>> parse_overrides(["--config.train.steps=20"])
    {'train.steps': '20'}
    """
    fields = {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise InputError(
                f"unknown argument {argument!r}: fields are set as --config.train.steps=500; see "
                "python -m cbam_jax.paper tables --help"
            )
        if name in _OWN_FLAGS:
            raise InputError(f"{argument}: {name} is set by {_OWN_FLAGS[name]}")
        fields[name] = value
    return fields


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m cbam_jax.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tables = commands.add_parser(
        "tables",
        help="train and measure the rows of Table 1 and 2",
        description="Train and measure the rows of the paper's tables; goes on where it stopped.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tables.add_argument("--workdir", required=True, type=Path, help="gets tables and runs")
    tables.add_argument("--data", help="a dataset, photos.csv or ./photos/; default: the configs'")
    tables.add_argument(
        "--config",
        help="in place of each row's own config, its model aside; default: configs/ROW.py",
    )
    tables.add_argument("--table", type=int, choices=TABLES, help="default: both")
    tables.add_argument("--seeds", type=int, default=3, help="number of seeds, 0 to N - 1")
    drawing = commands.add_parser(
        "figures",
        help="draw Figures 4 and 5 from the tables' runs",
        description="Draw what each row finds (Figure 4), what it finds worst, and where the rows "
        "look (Figure 5, Grad-CAM), into WORKDIR/figures.",
        allow_abbrev=False,
    )
    drawing.add_argument("--workdir", required=True, type=Path, help="of the tables")
    drawing.add_argument("--queries", help="ids, ID,ID; default: six spread over the split")
    drawing.add_argument("--seed", type=int, default=0, help="whose runs are drawn")
    for command in (tables, drawing):
        command.add_argument("--split", default="test", help="split that is measured")
    return parser


def run_tables(flags: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """Make the tables that the flags ask for."""
    if flags.seeds < 1:
        raise InputError(f"--seeds={flags.seeds}: give at least 1")
    settings = parse_overrides(rest)
    own = {"data.name": flags.data, "config": flags.config}
    settings |= {name: value for name, value in own.items() if value is not None}
    documents = make_tables(
        flags.workdir,
        [flags.table] if flags.table else list(TABLES),
        seeds=flags.seeds,
        split=flags.split,
        settings=settings,
        command=shlex.join(["python", "-m", "cbam_jax.paper", *sys.argv[1:]]),
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
    queries = flags.queries.split(",") if flags.queries else []
    drawn = make_figures(flags.workdir, seed=flags.seed, split=flags.split, queries=queries)
    return {"workdir": str(flags.workdir), **drawn}


def main() -> int:
    """Run one command; the last line on stdout is one JSON document."""
    flags, rest = _parser().parse_known_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        document = {"tables": run_tables, "figures": run_figures}[flags.command](flags, rest)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    print(command_line.to_json(document))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
