"""All commands of the package: ``cbam-jax COMMAND ...``, or ``python -m cbam_jax COMMAND ...``."""

import importlib
import sys

from cbam_jax import InputError, __version__, command_line

# Each command's module, whose ``main`` reads the flags, and what it does.
COMMANDS = {
    "train": ("cbam_jax.training", "train an embedding model and evaluate it along the way"),
    "evaluate": ("cbam_jax.runs", "measure a trained run: metrics, figures, a page"),
    "export": ("cbam_jax.export_command", "write a model for others: weights, StableHLO, ONNX"),
    "catalogue": ("cbam_jax.catalogue.commands", "find the photos of a shop that look alike"),
    "embed": ("cbam_jax.catalogue.shards.commands", "embed one part of many photos, on a cluster"),
    "datasets": ("cbam_jax.datasets.__main__", "prepare, check or shrink a dataset"),
    "lookbench": ("cbam_jax.lookbench", "measure a model on a copy of LookBench"),
    "models": ("cbam_jax.model_list", "list the models, what each costs and its weights"),
    "pretrained": ("cbam_jax.pretrained.__main__", "convert and check pretrained weights"),
    "benchmark": ("cbam_jax.benchmark.__main__", "measure training, embedding, data and search"),
    "paper": ("cbam_jax.paper.__main__", "make the paper's tables and figures"),
}


def main() -> int:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        raise InputError(
            f"unknown command {name!r}: give one of {', '.join(COMMANDS)}"
            f"{command_line.closest(name, COMMANDS)}"
        )
    # So that each command's --help says how it was called.
    sys.argv = [f"cbam-jax {name}", *sys.argv[2:]]
    return importlib.import_module(COMMANDS[name][0]).main()


def usage() -> str:
    """Return the list of the commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            f"cbam_jax {__version__}: image retrieval in JAX",
            "",
            "usage: cbam-jax COMMAND ... (or: python -m cbam_jax COMMAND ...)",
            "",
            *lines,
            "",
            "cbam-jax COMMAND --help lists a command's flags.",
        ]
    )


def command() -> int:
    """Run a command, as the console script ``cbam-jax``."""
    return command_line.run(main)


if __name__ == "__main__":
    sys.exit(command())
