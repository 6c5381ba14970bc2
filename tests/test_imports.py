"""Imports go one way, and the small parts stay small to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cbam_jax"

# Which of our modules each may import, also late; below those that it stands on. Everyone may
# import cbam_jax.InputError.
MAY_IMPORT = {
    "platforms": set(),
    "sharding": set(),
    "attention": {"platforms", "sharding"},
    "compiler_options": set(),
    "distances": {"sharding"},
    "relevance": {"sharding"},
    "metrics": {"relevance"},
    "model_state": set(),
    "gradcam": {"attention", "model_state"},
    "whole_files": set(),
    "foreign_files": set(),
    "trec": {"foreign_files", "whole_files"},
    "file_locks": set(),
    "progress": set(),
    "command_line": {"foreign_files", "whole_files"},
    "distributed": {"command_line"},
    "checkpoint": {"foreign_files", "sharding"},
    "fonts": set(),
    "report_text": {"foreign_files"},
    "figures": {"fonts", "report_text", "whole_files"},
    "pages": set(),
    "report": {"pages", "report_text"},
    "forecast": set(),
    "stopping": set(),
    "runlog": {"command_line", "forecast", "foreign_files", "whole_files"},
    "optimizers": set(),
    "train_state": {"model_state", "sharding"},
    "remat": {"sharding"},
    "steps": {
        "compiler_options",
        "model_state",
        "optimizers",
        "remat",
        "sharding",
        "train_state",
    },
    "datasets": {"file_locks", "foreign_files", "progress", "whole_files"},
    "preprocessing": {"foreign_files"},
    "data": {"datasets", "preprocessing"},
    "losses": {"distances", "sharding"},
    "search": {"compiler_options", "distances", "foreign_files", "sharding", "whole_files"},
    "rerank": {"search"},
    "evaluation": {"metrics", "search", "whole_files"},
    "rerank_steps": set(),
    "reranked": {"evaluation", "metrics", "rerank", "rerank_steps", "search"},
    "backbones": {"attention", "platforms", "remat", "sharding"},
    "named_parts": {"foreign_files"},
    "models": {"attention", "backbones", "distances", "named_parts", "preprocessing"},
    # Weights are read from a run's checkpoint or a download; its command checks them on photos.
    "pretrained": {
        "backbones",
        "checkpoint",
        "command_line",
        "datasets",
        "foreign_files",
        "models",
        "preprocessing",
        "progress",
        "whole_files",
    },
    "model_list": {"command_line", "models", "pretrained"},
    "__main__": {"command_line"},
    "configs": set(),
    "config_files": {"foreign_files"},
    "linear_heads": {"distances", "losses"},
    "loss_comparison": {
        "command_line",
        "foreign_files",
        "linear_heads",
        "metrics",
        "rerank",
        "search",
    },
    # Runs train.py and evaluate.py in processes of their own, and reads what they wrote.
    "paper": {
        "command_line",
        "config_files",
        "datasets",
        "figures",
        "file_locks",
        "foreign_files",
        "loss_comparison",
        "metrics",
        "stopping",
    },
    "focus": {"data", "datasets", "gradcam", "progress", "report_text", "steps"},
    "saved_config": {"config_files", "configs", "datasets", "foreign_files"},
    # What a config means, then what a run does and is; the commands stand on top.
    "experiment": {
        "config_files",
        "data",
        "datasets",
        "evaluation",
        "foreign_files",
        "losses",
        "models",
        "named_parts",
        "preprocessing",
        "pretrained",
        "steps",
    },
    "config_checks": {
        "config_files",
        "datasets",
        "experiment",
        "foreign_files",
        "losses",
        "models",
        "named_parts",
        "pretrained",
        "remat",
        "steps",
    },
    "workdirs": {"config_files", "experiment", "file_locks", "foreign_files"},
    "run_figures": {
        "command_line",
        "config_files",
        "data",
        "datasets",
        "evaluation",
        "experiment",
        "figures",
        "gradcam",
        "models",
        "report",
        "report_text",
        "runlog",
        "whole_files",
    },
    "run_results": {
        "command_line",
        "evaluation",
        "experiment",
        "focus",
        "report_text",
        "rerank_steps",
        "reranked",
        "run_figures",
        "trec",
        "whole_files",
    },
    "runs": {
        "checkpoint",
        "command_line",
        "config_checks",
        "config_files",
        "data",
        "datasets",
        "evaluation",
        "experiment",
        "figures",
        "foreign_files",
        "model_state",
        "models",
        "pretrained",
        "rerank_steps",
        "reranked",
        "run_figures",
        "run_results",
        "runlog",
        "saved_config",
        "sharding",
        "steps",
        "stopping",
        "workdirs",
    },
    "run_summary": {
        "checkpoint",
        "config_files",
        "datasets",
        "evaluation",
        "experiment",
        "named_parts",
        "runlog",
        "runs",
    },
    "hub_config": {"foreign_files"},
    "hub": {
        "command_line",
        "evaluation",
        "experiment",
        "foreign_files",
        "hub_config",
        "metrics",
        "model_state",
        "models",
        "preprocessing",
        "pretrained",
        "runlog",
        "runs",
        "steps",
        "whole_files",
    },
    # What loads a program needs none of the layers, which its writing asks for late.
    "export": {"foreign_files", "model_state", "platforms", "preprocessing", "whole_files"},
    "embedder": {
        "data",
        "datasets",
        "export",
        "foreign_files",
        "hub",
        "model_state",
        "models",
        "preprocessing",
        "pretrained",
        "progress",
        "runs",
        "steps",
    },
    "lookbench": {"command_line", "datasets", "embedder", "metrics", "progress", "search"},
    "export_command": {
        "command_line",
        "export",
        "foreign_files",
        "hub",
        "pretrained",
        "runs",
    },
    "training": {
        "checkpoint",
        "command_line",
        "config_checks",
        "config_files",
        "datasets",
        "distributed",
        "evaluation",
        "experiment",
        "foreign_files",
        "forecast",
        "models",
        "pretrained",
        "run_summary",
        "runlog",
        "runs",
        "steps",
        "stopping",
        "workdirs",
    },
    "catalogue": {
        "command_line",
        "data",
        "datasets",
        "embedder",
        "foreign_files",
        "gradcam",
        "pages",
        "pretrained",
        "progress",
        "rerank",
        "rerank_steps",
        "whole_files",
    },
    # It measures what the others do.
    "benchmark": {
        "data",
        "datasets",
        "foreign_files",
        "losses",
        "model_state",
        "models",
        "search",
        "steps",
    },
}
# These use numpy and jax alone, so that they can be taken out and used elsewhere.
WITHOUT_INPUT_ERROR = (
    "attention",
    "distances",
    "metrics",
    "relevance",
    "gradcam",
    "losses",
    "steps",
    "models",
)


def modules():
    """Our modules by the first part of their name: a package counts as one."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(part, []).append(path)
    return {name: paths for name, paths in found.items() if name != "__init__"}


def imported(path):
    """Full dotted names that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(name):
    """What ``name`` imports of ours: modules, and names of the package itself."""
    names = {part for path in modules()[name] for part in imported(path)}
    found = {part.split(".")[1] for part in names if part.startswith("cbam_jax.")}
    return found - {name}


@pytest.mark.parametrize("name", sorted(modules()))
def test_layers(name):
    assert name in MAY_IMPORT, f"put {name} into the layers"
    allowed = MAY_IMPORT[name] | {"InputError", "__version__"}
    assert ours(name) <= allowed
    if name in WITHOUT_INPUT_ERROR:
        assert "InputError" not in ours(name)


def test_the_layers_have_no_cycle():
    below = []
    for name, allowed in MAY_IMPORT.items():
        assert allowed <= set(below), name
        below.append(name)


# These know what a config is; to all others its fields are arguments.
WITH_CONFIG = (
    "configs",
    "config_checks",
    "config_files",
    "experiment",
    "runs",
    "run_figures",
    "run_summary",
    "saved_config",
    "training",
    "workdirs",
)


def test_the_library_never_imports_the_scripts_or_their_config():
    for name, paths in modules().items():
        for path in paths:
            roots = {part.split(".")[0] for part in imported(path)}
            assert not roots & {"train", "evaluate", "configs", "tensorflow", "torch"}, path
            assert name in ("benchmark", *WITH_CONFIG) or "ml_collections" not in roots, path


HEAVY = ("flax", "grain", "orbax", "tensorstore", "tensorflow_datasets", "matplotlib", "cv2")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        pytest.param("losses", HEAVY[1:], marks=pytest.mark.slow),
        pytest.param("search", HEAVY, marks=pytest.mark.slow),
        ("metrics", (*HEAVY, "jax")),
        pytest.param(
            "models",
            ("grain", "orbax", "tensorflow_datasets", "matplotlib", "cv2"),
            marks=pytest.mark.slow,
        ),
        pytest.param("figures", ("matplotlib", "jax"), marks=pytest.mark.slow),
        # Each room of it is loaded when it is asked for.
        pytest.param("benchmark", (*HEAVY, "jax", "ml_collections"), marks=pytest.mark.slow),
        # A machine where speed is measured may lack what reads datasets and configs.
        pytest.param(
            "benchmark.__main__",
            (*(name for name in HEAVY if name != "flax"), "ml_collections"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "benchmark.data",
            (*(name for name in HEAVY if name != "cv2"), "jax"),
            marks=pytest.mark.slow,
        ),
        # A catalogue is listed, and searched by id, without a model; a server is an extra.
        ("catalogue.commands", (*(name for name in HEAVY if name != "cv2"), "jax", "fastapi")),
        # A program runs where there is no Flax, and no model's code.
        pytest.param("export", HEAVY, marks=pytest.mark.slow),
        # A GPU is for the processes that it starts.
        pytest.param("paper", (*HEAVY, "jax"), marks=pytest.mark.slow),
    ],
)
def test_importing_a_part_does_not_load_the_rest(module, absent):
    code = f"import sys, cbam_jax.{module}; print(*sorted({set(absent)!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []
