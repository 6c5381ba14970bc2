"""train.py, told to write down its batches and to fail at a given step.

python train_driver.py '{"record": FILE, "kill": 4, ...}' --config=... --workdir=...
"""

import atexit
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
import pytest
from tiny_run import patch_tiny_models

import train
from cbam_jax import command_line, steps
from cbam_jax.checkpoint import Checkpoints
from cbam_jax.runlog import StepMonitor


def wait_for_every_save():
    save = Checkpoints.save

    def saved(self, *args, **kwargs):
        save(self, *args, **kwargs)
        self.wait()

    Checkpoints.save = saved


def follow_steps(record, signals):
    """Append each step's rows to ``record``; send this process the signal of its step."""
    step_done = StepMonitor.step_done

    def followed(self, step, scalars, index):
        step_done(self, step, scalars, index)
        if record:
            rows = np.concatenate([np.asarray(part.data) for part in index.addressable_shards])
            with open(record, "a") as file:
                file.write(json.dumps({"step": step, "rows": rows.tolist()}) + "\n")
        if step in signals:
            os.kill(os.getpid(), signals[step])

    StepMonitor.step_done = followed


def poison_parameters(at):
    """Turn the parameters into NaN before step ``at``."""
    make_train_step = steps.make_train_step

    def poisoned(*args, **kwargs):
        train_step = make_train_step(*args, **kwargs)

        def step(state, batch):
            if int(state.step) + 1 == at:
                state = state._replace(params=jax.tree.map(lambda a: a * np.nan, state.params))
            return train_step(state, batch)

        return step

    steps.make_train_step = poisoned


def main():
    options = json.loads(sys.argv.pop(1))
    patch_tiny_models(pytest.MonkeyPatch())
    # Whatever is started in the background of a script ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kinds = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
    signals = {options[name]: number for name, number in kinds.items() if name in options}
    wait_for_every_save()
    follow_steps(options.get("record"), signals)
    if "poison" in options:
        poison_parameters(options["poison"])
    return command_line.run(train.main)


def forked(streams, environment, settings, arguments):
    """``main`` in a process forked with everything imported, as if it had been started."""
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)  # XLA reads its flags with the first device.
    for name, value in settings.items():
        jax.config.update(name, value)
    sys.argv = ["train_driver.py", *arguments]
    try:
        sys.exit(main())
    finally:
        atexit._run_exitfuncs()  # By which JAX takes leave of the others; multiprocessing does not.


if __name__ == "__main__":
    sys.exit(main())
