"""The catalogue's commands: ``python -m cbam_jax.catalogue COMMAND CATALOGUE ...``."""

import sys

from cbam_jax import command_line
from cbam_jax.catalogue.commands import main

if __name__ == "__main__":
    sys.exit(command_line.run(main))
