#!/usr/bin/env bash
# Everything that a GPU should be asked, in one command and at most nine minutes:
#
#   benchmarks/gpu_check.sh
#
# Speed of training and embedding beside PyTorch, what each costs, the search and its peer, and the
# tests of the numerics on the GPU itself, the most important first. Needs jax with CUDA, flax, optax
# and orbax-checkpoint; and torch, torchvision (timm does not replace it), timm and pytest, without
# which the parts that need them fail, and the rest goes on. Datasets, grain and ml_collections are
# not needed, nor a network.
#
# Each part leaves OUT/PART.json (the tests: tests.xml) and OUT/PART.log. A part that fails or runs
# out of time is named at the end, and the exit status is then 1.
#
#   OUT=DIR      where to; default: benchmarks/results/gpu
#   PYTHON=FILE  the interpreter; default: python
#   SECONDS_IN_ALL=N  default: 530
#   SMOKE=1      sizes that a CPU can do, one file of tests, and no limit for a single part: to see
#                that all parts run
#
# XLA_FLAGS is added to by one: what one part has autotuned, the next reads from OUT/autotune.
# Autotuning is on by default, and the latency hiding scheduler moves collectives, of which one GPU
# has none.
set -u
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-benchmarks/results/gpu}
PYTHON=${PYTHON:-python}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-530}))
failed=()
mkdir -p "$OUT/autotune" || exit 1
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_per_fusion_autotune_cache_dir=$OUT/autotune"
# The checkout is used as it lies there, installed or not.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [[ -n ${SMOKE:-} ]]; then
    step=(--model=resnet18_cbam --image_size=32 --batch_size=16 --repeats=2)
    compared=("${step[@]}")
    search=(--queries=50 --gallery=3000 --dim=32 --repeats=2)
    peer=(--case=tiny --repeats=2)
    tests=(tests/test_distances.py)
else
    step=(--batch_size=256 --dtype=bfloat16)
    compared=()
    search=(--queries=10000 --gallery=1000000 --dim=512)
    peer=(--case=gpu --repeats=3)
    tests=(tests/test_attention.py tests/test_distances.py tests/losses)
fi

# part NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, and no longer than there is time;
# the last line of what it prints is its JSON.
part() {
    local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) status
    shift 2
    rm -f "$OUT/$name.json" # Of a run before.
    if ((limit > left)) || [[ -n ${SMOKE:-} ]]; then
        limit=$left
    fi
    if ((limit < 1)); then
        echo "== $name: no time left"
        failed+=("$name (no time left)")
        return
    fi
    echo "== $name: $*"
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    tail -n 3 "$OUT/$name.log" | cut -c 1-200
    if ((status)); then
        echo "== $name: failed with status $status after $((SECONDS - start)) s, see $OUT/$name.log"
        failed+=("$name (status $status)")
        return
    fi
    # A JSON document, or nothing.
    grep '^{' "$OUT/$name.log" | tail -n 1 >"$OUT/$name.partial"
    if [[ -s $OUT/$name.partial ]]; then
        mv "$OUT/$name.partial" "$OUT/$name.json"
    else
        rm "$OUT/$name.partial"
    fi
    echo "== $name: $((SECONDS - start)) s"
}

part compare_train 200 "$PYTHON" benchmarks/compare.py train "${compared[@]}"
part compare_embed 110 "$PYTHON" benchmarks/compare.py embed "${compared[@]}"
part train 140 "$PYTHON" -m cbam_jax.benchmark train "${step[@]}" --trace="$OUT/trace"
part embed 80 "$PYTHON" -m cbam_jax.benchmark embed "${step[@]}"
part search 90 "$PYTHON" -m cbam_jax.benchmark search "${search[@]}"
part torch_search 120 "$PYTHON" benchmarks/torch_peer.py search "${peer[@]}"
# On the device at hand, where conftest.py would take a CPU, and in float32 proper: what needs
# neither datasets nor several devices. Without setup.cfg's options, which other plugins bring.
part tests 120 env JAX_PLATFORMS= JAX_DEFAULT_MATMUL_PRECISION=highest "$PYTHON" -m pytest -q \
    -o addopts= -p no:cacheprovider --junitxml="$OUT/tests.xml" "${tests[@]}"

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all parts ended well; results in $OUT"
