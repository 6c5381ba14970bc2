"""What a compiled program costs: seconds to compile, operations, bytes, memory, collectives.

Read from the program that XLA made, not from the model: what it recomputes counts, and so do the
forms that the layers choose by platform. Operations alone are, but on a CPU, those of the program
that XLA is given: of its own it counts none inside a library's call (cuDNN, cuBLAS), and of most
GPUs' programs nothing at all.
"""

import collections
import contextlib
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# A result's type, a tuple's in parentheses, then the operation: "f32[64]{0} all-reduce(".
_OPERATION = re.compile(rf"= (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
# A line of a program: its name, its result's type, the operation, its operands and the rest.
_LINE = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")
_NOT_RUN = ("parameter", "get-tuple-element", "bitcast", "tuple", "constant", "opt-barrier")


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Keep what is compiled inside from coming out of the persistent cache, or going into it."""
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # It remembers from its first use whether it is enabled.
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def compile_cold(function: Any, *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Compile a jitted function for arguments, the persistent cache off; also what it costs.

    Returns:
      The compiled function, which takes such arguments, and a dict: ``trace_seconds`` (Python to
      XLA's input), ``compile_seconds`` (XLA), and of one step on one device ``flops_per_device``
      (a multiply-add is two; what falls on a border's padding is none), ``bytes_per_device`` (what
      each of the program's fused operations reads and writes, as if nothing stayed in a cache;
      a loop's body counts once in both), ``memory`` (``program_memory``) and ``collectives`` (of
      that name).

    Example:
      >>> x = jax.numpy.ones((8, 8))
      >>> product, cost = compile_cold(jax.jit(lambda x: x @ x), x)
      >>> cost["flops_per_device"], cost["collectives"], float(product(x)[0, 0])
      (1024.0, {}, 8.0)
    """
    with no_compilation_cache():
        start = time.perf_counter()
        lowered = function.lower(*arguments)
        traced = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
    text = compiled.as_text()
    if jax.default_backend() == "cpu":
        counts = compiled.cost_analysis() or {}
        flops, moved = counts.get("flops"), counts.get("bytes accessed")
    else:
        flops, moved = given_flops(lowered) / _devices(compiled), kernels(text)[1]
    return compiled, {
        "trace_seconds": traced - start,
        "compile_seconds": end - traced,
        "flops_per_device": flops,
        "bytes_per_device": moved,
        "memory": program_memory(compiled),
        "collectives": collectives(text),
    }


def given_flops(lowered: Any) -> float:
    """Operations of the program that XLA is given, on all devices; a loop's body counts once.

    Example:
      >>> given_flops(jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), "float32")))
      1024.0
    """
    # Lowered.cost_analysis() has no answer on a plugin's backend (CUDA's is one): a CPU's counts.
    client = jax.local_devices(backend="cpu")[0].client
    program = lowered.compiler_ir("hlo").as_hlo_module()
    return _jax.hlo_module_cost_analysis(client, program)["flops"]


def _devices(compiled: Any) -> int:
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    return max(len(sharding.device_set) for sharding in shardings)


def kernels(text: str) -> tuple[int, int]:
    """Count the operations that a compiled program starts, and the bytes that they read and write.

    Each counts its operands, of one that it takes slices of these alone, and its results, as if
    nothing stayed in a cache; a loop counts once, as what it is given and gives back.

    Example:
      >>> kernels('''
      ... ENTRY %main (x: f32[64]) -> f32[64] {
      ...   %x = f32[64]{0} parameter(0)
      ...   ROOT %sine = f32[64]{0} fusion(%x), kind=kLoop
      ... }''')
      (1, 512)
    """
    start = text.index("\nENTRY ")
    sliced = _slices_of_fusions(text[:start])
    found = _lines(text[start:])
    sizes = {name: _all_bytes(result) for name, result, _, _ in found}
    count = moved = 0
    for name, _, operation, rest in found:
        if operation in _NOT_RUN or operation.endswith("-done"):
            continue
        count += 1
        moved += sizes[name]
        called = re.search(r"calls=%([\w.\-]+)", rest)
        read = sliced.get(called[1], {}) if called else {}
        operands = {operand: place for place, operand in enumerate(_operands(rest))}
        for operand, place in operands.items():
            size = sizes.get(operand, 0)
            moved += min(read.get(place, size), size)
    return count, moved


def _lines(text: str) -> list[tuple[str, ...]]:
    return [match.groups() for match in map(_LINE.match, text.splitlines()) if match]


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.split("), ")[0])


def _slices_of_fusions(text: str) -> dict[str, dict[int, int]]:
    """Bytes that a fusion reads of the operands of which it takes slices alone, by their place."""
    found = {}
    for computation in text.split("\n\n"):
        name = re.search(r"%([\w.\-]+) \(", computation)
        if name is not None:
            found[name[1]] = _slices(_lines(computation))
    return found


def _slices(lines: list[tuple[str, ...]]) -> dict[int, int]:
    places: dict[str, int] = {}  # Of parameters, and of what is one seen in another shape.
    read, whole = collections.Counter(), set()
    for name, result, operation, rest in lines:
        if operation == "parameter":
            places[name] = int(rest.split(")")[0])
        taken = {places[operand] for operand in _operands(rest) if operand in places}
        if operation == "bitcast" and taken:
            (places[name],) = taken
        elif operation == "slice":
            read.update(dict.fromkeys(taken, _all_bytes(result)))
        else:
            whole |= taken
    return {place: size for place, size in read.items() if place not in whole}


def program_memory(compiled: Any) -> dict[str, int] | None:
    """Bytes that a compiled program needs on one device, or None where the backend does not say.

    ``total`` is arguments, outputs and temporaries; outputs that take the place of donated
    arguments, ``donated``, count once.

    Example:
      >>> double = jax.jit(lambda x: 2 * x, donate_argnums=0)
      >>> memory = program_memory(double.lower(jax.numpy.ones(256)).compile())
      >>> memory["arguments"], memory["donated"], memory["total"]
      (1024, 1024, 1024)
    """
    found = compiled.memory_analysis()
    if found is None:
        return None
    memory = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "donated": found.alias_size_in_bytes,
    }
    used = memory["arguments"] + memory["outputs"] + memory["temporaries"]
    return memory | {"total": used - memory["donated"]}


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Count the operations between devices in a compiled program's text, and their bytes, by kind.

    ``bytes`` is the size of their results on one device, which is what an all-reduce reduces and
    an all-gather gathers; what travels over the wires depends on the algorithm. One in a loop
    counts once.

    Example:
      >>> collectives("%x = (f32[64]{0}, bf16[2,8]{1,0}) all-reduce(%y, %z), channel_id=4")
      {'all-reduce': {'count': 1, 'bytes': 288}}
    """
    found: dict[str, dict[str, int]] = {}
    for result, kind, started in _OPERATION.findall(text):
        sizes = [_bytes(bits, dims) for _, bits, dims in _ARRAY.findall(result)]
        if started and kind != "all-reduce":
            # Its type holds the operands before the results, and counters after them.
            sizes = sizes[1:2] if kind == "collective-permute" else sizes[len(sizes) // 2 :]
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += sum(sizes)
    return dict(sorted(found.items()))


def _all_bytes(result: str) -> int:
    return sum(_bytes(bits, dims) for _, bits, dims in _ARRAY.findall(result))


def _bytes(bits: str, dims: str) -> int:
    count = math.prod(int(size) for size in dims.split(",") if size)
    return math.ceil(count * int(bits or 8) / 8)
