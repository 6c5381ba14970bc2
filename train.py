"""Train an embedding model: config -> data -> model -> loss -> step -> checkpoint.

python train.py --config=configs/quickstart.py --workdir=RUN [--config.data.image_size=160 ...]

The flags are read here; the loop is ``cbam_jax.training.train_and_evaluate``, and what the config
means is in ``cbam_jax.experiment``. An installed package has it as ``cbam-jax train``.
"""

import sys

from cbam_jax import command_line

try:  # Importing takes seconds, in which Ctrl-C is no mistake either.
    from cbam_jax.training import main, train_and_evaluate
except KeyboardInterrupt:
    sys.exit(130)

__all__ = ["main", "train_and_evaluate"]

if __name__ == "__main__":
    sys.exit(command_line.run(main))
