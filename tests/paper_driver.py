"""cbam_jax.paper on rows small enough for a test.

python paper_driver.py '{"rows": ["resnet18", "resnet18_cbam"]}' tables --workdir=...
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from cbam_jax import command_line
from cbam_jax.paper import __main__ as command
from cbam_jax.paper import tables


def main():
    options = json.loads(sys.argv.pop(1))
    tables.ROWS |= {row: tables.Row(row, (0.5, 0.25, 0.125)) for row in options["rows"]}
    tables.TABLES.clear()
    tables.TABLES[1] = tuple(options["rows"])
    return command_line.run(command.main)


if __name__ == "__main__":
    sys.exit(main())
