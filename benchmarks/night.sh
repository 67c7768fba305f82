#!/usr/bin/env bash
# The whole optimizer benchmark on two cores: the defaults with five seeds, then four learning rates tried and the tuned track
# with three, then the cost of steps, tables and pictures. Stopped and started again it goes on where it was.
#
#     benchmarks/night.sh [folder of the results [options of optimizers.py, as --busy]]
set -eu
cd "$(dirname "$0")"
out=$(mkdir -p "${1:-results/night}" && cd "${1:-results/night}" && pwd)
shift || true

# SGD without momentum and Adam without decoupled decay stand behind their successors, and the older libraries' rules in the
# results of the quick problems. SOAP costs up to twenty steps of SGD: three seeds on both tracks.
rivals=("SGD, momentum" AdamW "Muon + AdamW" "Distributed Shampoo" "curvopt DiagGGN" "curvopt Polar"
    "curvopt VarianceAdaptiveSGD")

train() { # file, seeds, rates tried, options
    local file=$1 seeds=$2 trials=$3
    shift 3
    python optimizers.py --threads 1 --seeds "$seeds" --trials "$trials" --out "$file" "$@"
}

part() { # file, options of the problems
    local file=$1 methods=()
    shift
    for method in "${rivals[@]}"; do methods+=(--method "$method"); done
    train "$file" 5 0 "$@" "${methods[@]}"
    train "$file" 3 4 "$@" "${methods[@]}"
    train "$file" 3 4 "$@" --method SOAP
}

part "$out/first.jsonl" "$@" --problem digits --problem logistic --problem 2c2d --problem resnet --problem gru &
first=$!
part "$out/second.jsonl" "$@" --problem autoencoder --problem mlp --problem transformer
wait "$first"
cat "$out/first.jsonl" "$out/second.jsonl" >"$out/optimizers.jsonl"
python report.py --runs "$out/optimizers.jsonl" --out "$out"
python step_cost.py --threads 1 --out "$out"
