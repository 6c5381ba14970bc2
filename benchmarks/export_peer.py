"""A program beside ONNX Runtime and OpenVINO: ``python benchmarks/export_peer.py``.

Needs ``pip install --no-deps jax2onnx==0.17.1 && pip install onnx onnx-ir onnxruntime equinox
dm-pix openvino``. Each model, drawn at random, is exported as StableHLO and as ONNX; all take turns
in one process on the same images, float32. Images a second by the clock, and seconds of the
processors an image, which other programs disturb less; largest difference of the embeddings,
relative. The last line on stdout is JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import onnxruntime
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent))

from cbam_jax import export
from cbam_jax.benchmark.environment import machine
from cbam_jax.models import create_model
from cbam_jax.preprocessing import Preprocessing


def exported(name, size, folder):
    """Both forms of a model, as functions of images."""
    model = create_model(name, rngs=nnx.Rngs(0))
    cut = Preprocessing(size, mean=model.mean, std=model.std)
    for to in export.FORMATS:
        options = {"preprocessing": cut, "arguments": {"name": name}, "platforms": ["cpu"]}
        export.save(model, folder / to, to=to, **options)
    functions = {"ours": export.load(folder / "stablehlo")}
    functions["onnxruntime"] = in_onnxruntime(folder / "onnx" / "model.onnx")
    try:
        functions["openvino"] = in_openvino(folder / "onnx" / "model.onnx")
    except ImportError:
        print("openvino is not installed", flush=True)
    return functions


def in_onnxruntime(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    return lambda images: session.run(["embeddings"], {"images": images})[0]


def in_openvino(path):
    import openvino

    options = {"INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0))}
    options["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.compile_model(path, "CPU", options)
    return lambda images: compiled([images])[0].copy()


def take_turns(functions, images, repeats):
    """Seconds of each function in each round, by the clock and of the processors."""
    found = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter(), time.process_time()
            function(images)
            if turn:  # The first compiles.
                found[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: np.median(times, axis=0) for name, times in found.items()}


def measure(functions, images, repeats):
    expected = functions["ours"](images)
    differences = {
        name: float(np.max(np.abs(function(images) - expected)) / np.max(np.abs(expected)))
        for name, function in functions.items()
    }
    return {
        name: {
            "images_per_second": float(len(images) / clock),
            "processor_seconds_per_image": float(processors / len(images)),
            "difference": differences[name],
        }
        for name, (clock, processors) in take_turns(functions, images, repeats).items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="resnet50_cbam,efficientnet_lite0", help="by commas")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--repeats", type=int, default=6)
    flags = parser.parse_args()
    size = flags.image_size
    shape = (flags.batch_size, size, size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    document = {"batch_size": flags.batch_size, "image_size": size, **machine()}
    document |= {"jax": jax.__version__, "onnxruntime": onnxruntime.__version__, "models": {}}
    for name in flags.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            functions = exported(name, size, Path(folder))
            document["models"][name] = measure(functions, images, flags.repeats)
        print(name, document["models"][name], flush=True)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
