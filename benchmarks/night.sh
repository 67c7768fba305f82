#!/usr/bin/env bash
# The whole optimizer benchmark, in a night of two cores: the defaults with five seeds, then six learning rates tried and the
# tuned track with three, then the cost of steps, tables and pictures. Stopped and started again it goes on where it was.
#
#     benchmarks/night.sh [folder of the results]
set -eu
cd "$(dirname "$0")"
out=$(mkdir -p "${1:-results/night}" && cd "${1:-results/night}" && pwd)

part() { # file, problems
    local file=$1 chosen=()
    shift
    for problem in "$@"; do chosen+=(--problem "$problem"); done
    python optimizers.py --threads 1 --seeds 5 --trials 0 --out "$file" "${chosen[@]}"
    python optimizers.py --threads 1 --seeds 3 --trials 6 --out "$file" "${chosen[@]}"
}

part "$out/first.jsonl" digits logistic mlp 2c2d &
first=$!
part "$out/second.jsonl" autoencoder transformer gru resnet
wait "$first"
cat "$out/first.jsonl" "$out/second.jsonl" >"$out/optimizers.jsonl"
python report.py --runs "$out/optimizers.jsonl" --out "$out"
python step_cost.py --threads 1 --out "$out"
