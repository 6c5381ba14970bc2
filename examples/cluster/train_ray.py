"""Train by several workers of Ray, one process of JAX in each.

    pip install 'ray[train]'
    python examples/cluster/train_ray.py --workers=2 --gpus=8 \\
        --config=clothing --workdir=/mnt/runs/clothing

Ray Train's JaxTrainer starts the workers where the cluster has room and joins them as the processes
of one run. Where one is lost it starts all of them again, and they go on from the last checkpoint.
The workdir, and --storage for Ray's own records, are on a file system that all nodes see. With
--gpus=0 the workers train on CPUs. For TPUs give ScalingConfig use_tpu, topology and
accelerator_type in place of use_gpu, and leave jax_config out.
"""

import argparse
import logging
import sys

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.jax import JaxConfig, JaxTrainer

from cbam_jax import command_line, config_files


def train(run):
    """Train in one of the workers, which Ray has joined; the summary."""
    from cbam_jax import config_files, distributed, training

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of each of its files.
    print(distributed.topology(), flush=True)
    config = config_files.read_config_file(run["config"], run["overrides"])
    return training.train_and_evaluate(config, run["workdir"])


def flags():
    """What is asked for, and the flags that change the config."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, required=True, help="processes of the run")
    parser.add_argument("--gpus", type=int, default=1, help="of each worker; 0: train on CPUs")
    parser.add_argument("--cpus", type=int, default=1, help="of each worker")
    parser.add_argument("--restarts", type=int, default=3, help="after as many lost workers")
    parser.add_argument("--storage", help="folder for Ray's records; else ~/ray_results")
    parser.add_argument("--config", required=True, help="as of cbam-jax train")
    parser.add_argument("--workdir", required=True, help="folder of the run")
    return parser.parse_known_args()


def main():
    """Train, and print the summary as one line of JSON."""
    options, overrides = flags()
    config_files.read_config_file(options.config, overrides)  # A mistake is told before Ray starts.
    gpus = options.gpus
    trainer = JaxTrainer(
        train,
        train_loop_config={**vars(options), "overrides": overrides},
        # On CPUs too: without it Ray leaves each worker by itself. It goes by JAX_PLATFORMS then.
        jax_config=JaxConfig(use_gpu=True),
        scaling_config=ScalingConfig(
            num_workers=options.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": options.cpus} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            storage_path=options.storage,
            failure_config=FailureConfig(max_failures=options.restarts),
            worker_runtime_env={"env_vars": {} if gpus else {"JAX_PLATFORMS": "cpu"}},
        ),
    )
    print(command_line.to_json(trainer.fit().return_value))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
