#!/usr/bin/env bash
# What a machine with an accelerator can tell, in eight minutes at most: whether it computes what the CPU does, what quantities
# cost, what a private step costs (of a GPT-2-sized model too), and every optimizer's step, eager and compiled. Each part has a
# limit of its own; one that fails or takes too long leaves the others alone. Results carry the card's name.
#
#     benchmarks/device.sh [folder of the results]     # on a GPU
#     benchmarks/device.sh --smoke [folder]            # on a CPU, small: whether the script works
set -u
here=$(cd "$(dirname "$0")" && pwd)
smoke=
if [ "${1:-}" = --smoke ]; then smoke=1 && shift; fi
name=$(python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "cpu")')
out=$(mkdir -p "${1:-$here/results/$name}" && cd "${1:-$here/results/$name}" && pwd)
cd "$here" || exit 1

failed=0
part() { # seconds, script, options
    local limit=$1
    shift
    echo "== $*"
    if ! timeout "$limit" python "$@" --out "$out"; then
        echo "FAILED: $*" | tee -a "$out/failed.txt"
        failed=1
    fi
}

rm -f "$out/failed.txt"
if [ -n "$smoke" ]; then
    common=(--device cpu --threads 1 --rounds 1)
    part 300 on_device.py "${common[@]}"
    part 180 quantities.py "${common[@]}" --problem mlp --quantity Variance
    part 180 private_step.py "${common[@]}" --problem mlp
    part 600 compiled.py "${common[@]}" --problem tiny --optimizer "VarianceAdaptiveSGD" --unchecked
    exit $failed
fi
common=(--device cuda --quick)
part 110 on_device.py "${common[@]}"
part 60 quantities.py "${common[@]}"
part 60 private_step.py "${common[@]}" --problem mlp --problem 2c2d --problem transformer
part 60 private_step.py "${common[@]}" --problem gpt2-124m --name private_step_large
part 190 compiled.py "${common[@]}" --unchecked --problem mlp --problem transformer
exit $failed
