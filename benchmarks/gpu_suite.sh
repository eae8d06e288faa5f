#!/usr/bin/env bash
# All that a GPU can prove, in one call of less than ten minutes on a bare machine: build, tests,
# compute-sanitizer, benchmarks, and one file with the results.
#
#     benchmarks/gpu_suite.sh [--dry-run] [FOLDER]
#
# Needs a Python with torch, triton, pytest, pybind11 and ninja (PYTHON=... names it), nvcc, and, to
# compare with them, x-transformers, Liger (0.8.2 or newer) and CCE. Logs go to FOLDER (gpu_suite_out),
# the results to results.json in it. A step that fails does not stop the others; the exit status tells.
# What a step may take is cut down to what is left of the ten minutes. --dry-run walks through every
# step without a GPU: tests are collected and not run, benchmarks are tiny and emulated.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DRY_RUN=
if [[ ${1-} == --dry-run ]]; then
    DRY_RUN=1
    shift
fi
OUT=${1:-gpu_suite_out}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
rm -f "$OUT"/*.log "$OUT"/*.json "$OUT"/steps.tsv
export PYTHONUNBUFFERED=1

# step NAME SECONDS COMMAND...: one line of output, the rest in NAME.log.
step() {
    local name=$1 limit=$2 start=$SECONDS left=$((570 - SECONDS)) status=0
    shift 2
    if [[ -z $DRY_RUN ]] && ((left < limit)); then
        limit=$((left > 1 ? left : 1))  # 0 would be no limit
    fi
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 </dev/null || status=$?
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$OUT/steps.tsv"
    printf '%-16s exit %-3s %4d s  %s\n' "$name" "$status" "$((SECONDS - start))" \
        "$(grep -v '^[[:space:]]*$' "$OUT/$name.log" | tail -n 1 | cut -c 1-150)"
}

pytest_() {
    "$PYTHON" -m pytest -q -p no:cacheprovider ${DRY_RUN:+--collect-only} "$@"
}

# Files whose packages are not there cannot be collected.
tests() {
    local ignored=()
    if ! "$PYTHON" -c 'import x_transformers' 2>/dev/null; then
        mapfile -t ignored < <(grep -lE '^(from|import) x_transformers' tests/*.py)
        printf 'x-transformers is not installed: not run: %s\n' "${ignored[*]}"
    fi
    pytest_ tests "${ignored[@]/#/--ignore=}"
}

# sanitize_kernel TOOL KERNEL TESTS...: what torch launches is not looked at.
sanitize_kernel() {
    local tool=$1 kernel=$2 command=()
    shift 2
    if command -v compute-sanitizer >/dev/null; then
        command=(compute-sanitizer --tool "$tool" --error-exitcode 99
            --kernel-name "kernel_substring=$kernel")
    elif [[ -z $DRY_RUN ]]; then
        echo "compute-sanitizer is not on PATH"
        return 1
    else
        echo "compute-sanitizer is not on PATH; a real run would fail here"
    fi
    # Without torch's own allocator an access outside of a tensor is one outside of an allocation.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "${command[@]}" "$PYTHON" -m pytest -q -p no:cacheprovider ${DRY_RUN:+--collect-only} "$@"
}

# Kernels of both languages are called corrupt_kernel.
sanitize() {
    local status=0
    if [[ -n $DRY_RUN && $1 != memcheck ]]; then
        echo "looks at the same tests as memcheck"
        return
    fi
    sanitize_kernel "$1" nll_kernel tests/test_gpu.py -k "masked_nll_equals and 300" || status=$?
    sanitize_kernel "$1" unmask_kernel tests/test_gpu.py -k "unmask_equals and 4099" || status=$?
    sanitize_kernel "$1" corrupt_kernel tests/test_corrupt.py -k \
        "(cuda or triton) and (equals_reference or replaced or step) and not 65536 and not 70001" ||
        status=$?
    return "$status"
}

environment() {
    if [[ -z $DRY_RUN ]]; then
        nvidia-smi || return 1
    fi
    nvcc --version
    "$PYTHON" - <<'END'
import json, platform, sys
import torch, triton
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
    "cuda": torch.version.cuda,
    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    "capability": torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
}))
END
}

build() {
    if [[ -n $DRY_RUN ]] && ! command -v nvcc >/dev/null; then
        echo "nvcc is not on PATH; a real run would fail here"
        return
    fi
    local capability=90 where=(--build-lib "$OUT/lib" --build-temp "$OUT/temp")
    if [[ -z $DRY_RUN ]]; then  # else the build that is there stays as it is
        capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
        where=(--inplace)
    fi
    NAR_KERNELS_REQUIRE_CPP=1 NAR_KERNELS_REQUIRE_CUDA=1 NAR_KERNELS_CUDA_ARCHS=${capability/./} \
        "$PYTHON" setup.py --quiet build_ext "${where[@]}"
}

# Of those benchmarks that compare with x-transformers.
bench_net() {
    if "$PYTHON" -c 'import x_transformers' 2>/dev/null; then
        "$PYTHON" "benchmarks/$1.py" --device cuda ${DRY_RUN:+--dry-run} --json "$OUT/$1.json"
    else
        echo "x-transformers is not installed: there is no net"
    fi
}

results() {
    "$PYTHON" - "$OUT" <<'END'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
lines = [line.split("\t") for line in (out / "steps.tsv").read_text().splitlines()]
steps = {
    name: {
        "exit": int(status),
        "seconds": int(seconds),
        "last_lines": (out / f"{name}.log").read_text().splitlines()[-3:],
    }
    for name, status, seconds in lines
}
environment = (out / "environment.log").read_text().splitlines()[-1:]
record = {
    "environment": json.loads(environment[0]) if steps["environment"]["exit"] == 0 else None,
    "steps": steps,
}
for path in sorted(out.glob("bench_*.json")):
    record[path.stem] = json.loads(path.read_text())
(out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
END
}

export -f pytest_ tests sanitize sanitize_kernel environment build bench_net
export DRY_RUN OUT PYTHON

step environment 60 bash -c environment
step build 200 bash -c build
# Together, since each of them leaves the GPU idle most of the time; nothing here is timed.
step tests 280 bash -c tests &
for tool in memcheck racecheck initcheck synccheck; do
    step "$tool" 280 bash -c "sanitize $tool" &
done
wait
step bench_corrupt 200 "$PYTHON" benchmarks/bench_corrupt_gpu.py ${DRY_RUN:+--dry-run} \
    --json "$OUT/bench_corrupt.json"
step bench_masked_nll 100 "$PYTHON" benchmarks/bench_masked_nll.py --device cuda \
    ${DRY_RUN:+--dry-run} --json "$OUT/bench_masked_nll.json"
for bench in bench_train_step bench_generate; do
    step "$bench" 150 bash -c "bench_net $bench"
done
results
echo "results: $OUT/results.json"
! cut -f 2 "$OUT/steps.tsv" | grep -qv '^0$'
