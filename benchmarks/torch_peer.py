"""PyTorch, measured: ``python benchmarks/torch_peer.py {search,train,embed}``.

Needs ``pip install torch`` and, but for the search, torchvision. ``train`` and ``embed`` run the
model that ours is measured against, alone; ``compare.py`` alternates the two. ``search`` takes
turns with ours in one process: PyTorch's matrix product with topk and its cdist with topk, both in
blocks of the gallery with a running top-k, which is what its users write, on the same arrays.

Each in its best setting: one thread a core, channels_last, fused AdamW, no denormal numbers; on a
GPU bfloat16 autocast, torch.compile and cuDNN's search for the fastest kernels. The last line on
stdout is JSON.
"""

import argparse
import functools
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.search_cases import CASES
from benchmarks.step_flags import add_step_flags, complete
from benchmarks.torchvision_stubs import import_torchvision
from cbam_jax.benchmark import embeddings, machine, random_batch, seconds
from cbam_jax.models import IMAGENET_MEAN, IMAGENET_STD


class CBAM(nn.Module):
    """The paper's form: a shared MLP without bias, [mean, max] over channels, a 7 x 7 convolution.

    Submodules are named as ours are, so that weights can be handed over.
    """

    def __init__(self, features: int, reduction: int = 16):
        super().__init__()
        self.channel, self.spatial = nn.Module(), nn.Module()
        self.channel.fc1 = nn.Linear(features, features // reduction, bias=False)
        self.channel.fc2 = nn.Linear(features // reduction, features, bias=False)
        self.spatial.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Refine [b, c, h, w]."""
        mlp = lambda v: self.channel.fc2(functional.relu(self.channel.fc1(v)))  # noqa: E731
        gate = torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))
        x = x * gate[:, :, None, None]
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.spatial.conv(pooled))


class Embedder(nn.Module):
    """torchvision's ResNet with CBAM after its first and its last convolution, and the L2 norm."""

    def __init__(self, name: str):
        super().__init__()
        backbone = getattr(import_torchvision().models, name.removesuffix("_cbam"))(weights=None)
        width = backbone.fc.in_features
        for child, module in backbone.named_children():
            if child not in ("avgpool", "fc"):
                self.add_module(child, module)
        with_cbam = name.endswith("_cbam")
        self.stem_attention = CBAM(64) if with_cbam else nn.Identity()
        self.last_attention = CBAM(width) if with_cbam else nn.Identity()
        mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("pixel_scale", 1 / (255 * std), persistent=False)
        self.register_buffer("pixel_shift", mean / std, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed uint8 images [b, 3, h, w] as [b, d] float32."""
        x = images.float() * self.pixel_scale - self.pixel_shift
        x = self.stem_attention(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(self.maxpool(x)))
        x = self.last_attention(self.layer4(self.layer3(x)))
        return functional.normalize(x.float().mean((2, 3)))


def batch_hard_loss(embeddings: torch.Tensor, labels: torch.Tensor, margin: float = 0.2):
    """Mean over the anchors of relu(margin + farthest positive - nearest negative)."""
    distances = torch.cdist(embeddings, embeddings)
    same = labels[:, None] == labels[None, :]
    farthest = distances.masked_fill(~same, 0.0).amax(1)
    nearest = distances.masked_fill(same, torch.inf).amin(1)
    return functional.relu(margin + farthest - nearest).mean()


def create_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as our benchmark has it: no weight decay of biases and BatchNorm."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-4, fused=True)


def best_setting() -> str:
    """Set PyTorch up as fast as it goes; return the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_flush_denormal(True)  # As XLA does.
    torch.backends.cudnn.benchmark = True
    return device


def create_step(
    kind: str, model: nn.Module, batch: dict[str, np.ndarray], dtype: str, device: str
) -> Callable[[int], Any]:
    """``run(n)`` takes n steps and waits for them, the images on the device already.

    It returns the loss, or the embeddings, of the last.
    """
    model = model.to(device, memory_format=torch.channels_last)
    # [b, h, w, 3] seen as [b, 3, h, w] is what channels_last means.
    images = torch.from_numpy(batch["image"]).to(device).permute(0, 3, 1, 2)
    labels = torch.from_numpy(batch["label"]).to(device)
    narrow = dtype == "bfloat16"
    context = lambda: torch.autocast(device, torch.bfloat16) if narrow else nullcontext()  # noqa: E731
    forward = torch.compile(model) if device == "cuda" else model
    model.train(kind == "train")
    step = (
        functools.partial(train_step, forward, create_optimizer(model), context, images, labels)
        if kind == "train"
        else functools.partial(embed_step, forward, context, images)
    )

    def run(count: int) -> Any:
        output = None
        for _ in range(count):
            output = step()
        if device == "cuda":
            torch.cuda.synchronize()
        return output

    return run


def train_step(forward, optimizer, context, images, labels) -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    with context():
        embedded = forward(images)
    loss = batch_hard_loss(embedded, labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.inference_mode()
def embed_step(forward, context, images) -> torch.Tensor:
    with context():
        return forward(images)


def matrix_product(dtype: str, device: str) -> tuple[Callable[[int], None], float]:
    """``run(n)`` for a large matrix product, and the operations of one; as ours."""
    size = 8192 if device == "cuda" else 2048
    kind = getattr(torch, dtype) if device == "cuda" else torch.float32
    x = torch.randn(size, size, device=device, dtype=kind)

    def run(count: int) -> None:
        for _ in range(count):
            x @ x
        if device == "cuda":
            torch.cuda.synchronize()

    return run, 2.0 * size**3


def peak_memory(device: str) -> int:
    """Bytes: the most that tensors took on the GPU, or that the process has held."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def torch_machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": import_torchvision().__version__,
        "python": platform.python_version(),
    }


def prepare(
    kind: str, *, model: str, image_size: int, batch_size: int, dtype: str, images_per_class: int
) -> tuple[dict[str, Callable[[int], Any]], dict[str, Any]]:
    """The step and the large product as functions of how many, and what is known of them."""
    device = best_setting()
    batch = random_batch(batch_size, image_size, images_per_class)
    run = create_step(kind, Embedder(model), batch, dtype, device)
    start = time.perf_counter()
    run(1)
    first, memory = time.perf_counter() - start, peak_memory(device)
    product, flops = matrix_product(dtype, device)
    return {"step": run, "product": product}, {
        "first_step_seconds": first,
        "peak_memory": memory,
        "product_flops": flops,
        "platform": "gpu" if device == "cuda" else device,
        **torch_machine(device),
    }


def benchmark_step(
    kind: str, *, repeats: int, steps_per_repeat: int, **options: Any
) -> dict[str, Any]:
    """Seconds of a step, alone."""
    runs, facts = prepare(kind, **options)
    times = seconds({"step": lambda: runs["step"](steps_per_repeat)}, repeats)["step"]
    step = {name: value / steps_per_repeat for name, value in times.items()}
    return {
        "benchmark": f"torch_{kind}",
        **options,
        "repeats": repeats,
        "steps_per_repeat": steps_per_repeat,
        **facts,
        "step": step,
        "step_ms": 1e3 * step["median"],
        "images_per_second": options["batch_size"] / step["median"],
    }


def streamed(distances: Callable, x: np.ndarray, y: torch.Tensor, k: int):
    """The k lowest of ``distances`` over blocks of ``y``, and their indices, in NumPy."""
    block = 8192 if y.device.type == "cpu" else 65536
    queries = torch.from_numpy(x).to(y.device)
    best = torch.full((len(x), k), torch.inf, device=y.device)
    found = torch.full((len(x), k), -1, device=y.device)
    for start in range(0, len(y), block):
        new = distances(queries, y[start : start + block])
        index = torch.arange(start, start + new.shape[1], device=y.device).expand(len(x), -1)
        best, order = torch.cat([best, new], 1).topk(k, largest=False)
        found = torch.cat([found, index], 1).gather(1, order)
    return best.cpu().numpy(), found.cpu().numpy()


def product_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None, :]
    return torch.addmm(squares, x, y.T, alpha=-2).clamp_(min=0).sqrt_()


def compare_search(queries: int, gallery: int, dim: int, k: int, repeats: int) -> dict[str, Any]:
    """Both searches and ours, in turns."""
    import jax

    from cbam_jax.search import search

    # Of a GPU that both use, jax would take three quarters at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    x, y = embeddings(queries, dim, seed=1), embeddings(gallery, dim, seed=2)
    device = best_setting()
    on_device = jax.block_until_ready(jax.device_put(y, jax.local_devices()[0]))
    tensor = torch.from_numpy(y).to(device)
    functions = {
        "search": functools.partial(search, x, on_device, k),
        "torch_product_topk": functools.partial(streamed, product_distances, x, tensor, k),
        "torch_cdist_topk": functools.partial(streamed, torch.cdist, x, tensor, k),
    }
    ours = functions["search"]()[1]
    times = seconds(functions, repeats)
    peers = [name for name in functions if name != "search"]
    return {
        "benchmark": "torch_search",
        "queries": queries,
        "gallery": gallery,
        "dim": dim,
        "k": k,
        "repeats": repeats,
        **times,
        "speed_over": {n: times[n]["median"] / times["search"]["median"] for n in peers},
        # float32 distances of neighbours that are nearly equally far may change their order.
        "same_indices": {n: float(np.mean(ours == functions[n]()[1])) for n in peers},
        **machine(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    search = commands.add_parser("search", help="beside ours")
    search.add_argument("--case", choices=CASES, default="a")
    search.add_argument("--k", type=int, default=20)
    search.add_argument("--repeats", type=int, default=5)
    for kind in ("train", "embed"):
        add_step_flags(
            commands.add_parser(kind, help="a step of the peer's model, alone"), repeats=5
        )
    options = vars(parser.parse_args())
    command = options.pop("command")
    if command == "search":
        case = CASES[options.pop("case")]
        result = compare_search(*case, **options)
    else:
        on_cpu = not torch.cuda.is_available()
        result = benchmark_step(command, **complete(parser, options, on_cpu=on_cpu))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
