"""Measure a trained run: embed a split, search, and print every metric with its definition.

python evaluate.py --workdir=RUN [--split=test] [--checkpoint=best|last|STEP|untrained]
    [--data=PATH] [--out=DIR] [--figures] [--query=ID]... [--html] [--focus]
    [--rerank=STEP,STEP] [--trec]

``cbam_jax.runs.evaluate`` does it. An installed package has it as ``cbam-jax evaluate``.
"""

import sys

from cbam_jax import command_line

try:  # Importing takes seconds, in which Ctrl-C is no mistake either.
    from cbam_jax.runs import evaluate, main
except KeyboardInterrupt:
    sys.exit(130)

__all__ = ["evaluate", "main"]

if __name__ == "__main__":
    sys.exit(command_line.run(main))
