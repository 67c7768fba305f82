#!/usr/bin/env bash
# The whole optimizer benchmark on two cores, in three hours: learning rates tried and both tracks with three seeds, two more
# seeds of the defaults, then the cost of steps, tables and pictures. Stopped and started again it goes on where it was.
#
#     benchmarks/night.sh [folder of the results [options of optimizers.py, as --busy]]
set -eu
cd "$(dirname "$0")"
out=$(mkdir -p "${1:-results/night}" && cd "${1:-results/night}" && pwd)
shift || true
options=("$@")

# SGD without momentum and Adam without decoupled decay are left to their successors, and so are the older libraries' rules.
rivals=("SGD, momentum" AdamW "Muon + AdamW" "Distributed Shampoo" "curvopt DiagGGN" "curvopt Polar"
    "curvopt VarianceAdaptiveSGD")
methods=()
for method in "${rivals[@]}"; do methods+=(--method "$method"); done

train() { # file, problem, points of a curve, seeds, rates tried, methods
    local file=$1 problem=$2 points=$3 seeds=$4 trials=$5
    shift 5
    python optimizers.py --threads 1 --out "$out/$file" --problem "$problem" --evaluations "$points" \
        --seeds "$seeds" --trials "$trials" "${options[@]}" "$@"
}

whole() { # file, problem, points of a curve, rates tried: three seeds of everybody, two more of the defaults
    train "$1" "$2" "$3" 3 "$4" "${methods[@]}"
    train "$1" "$2" "$3" 5 0 "${methods[@]}"
}

first() {
    whole first.jsonl digits 20 4
    whole first.jsonl logistic 20 4
    whole first.jsonl gru 16 4
    whole first.jsonl resnet 12 4
    whole first.jsonl 2c2d 10 3
    for problem in digits logistic; do train first.jsonl "$problem" 20 3 4 --method SOAP; done
    train first.jsonl gru 16 3 4 --method SOAP
    train first.jsonl resnet 12 3 4 --method SOAP
}

second() {
    whole second.jsonl autoencoder 20 4
    whole second.jsonl transformer 16 4
    whole second.jsonl mlp 20 4
    train second.jsonl transformer 16 3 4 --method SOAP
    # A step of SOAP's costs twenty of SGD's here.
    for problem in mlp autoencoder; do train second.jsonl "$problem" 20 3 2 --method SOAP; done
}

first &
other=$!
second
wait "$other"
cat "$out/first.jsonl" "$out/second.jsonl" >"$out/optimizers.jsonl"
python report.py --runs "$out/optimizers.jsonl" --out "$out"
python step_cost.py --threads 1 --out "$out" "${methods[@]}" --method SOAP
