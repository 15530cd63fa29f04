#!/usr/bin/env bash
# What a CUDA machine is to show, in calls of at most nine minutes each. Needs torch, transformers and NumPy; no network,
# no wandb, no datasets: the tokens are those of Python's standard library.
#
#   bench/gpu.sh check                        every test that needs a GPU
#   bench/gpu.sh speed 124m [PATH/TO/nanoGPT] tokens/s and MFU against the peers; also 350m, 1.5b
#   bench/gpu.sh best 124m PATH/TO/nanoGPT    the same with larger batches
#   bench/gpu.sh loss PATH/TO/nanoGPT         time to the validation loss that nanoGPT reaches in five minutes
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:?check, speed, best or loss}
case $what in
check) python -m pytest -o addopts= tests/test_gpu.py ;;  # one at a time, and without the plugins that CI has
speed) python bench/speed.py --device cuda --size "${2:-124m}" --rounds 2 ${3:+--nanogpt "$3"} --limit 540 ;;
best)
  for batch in 48 64; do
    python bench/speed.py --device cuda --size "${2:-124m}" --rounds 1 --no-trainer --nanogpt "$3" --batch "$batch" --limit 270
  done ;;
loss) python bench/loss.py --device cuda --nanogpt "${2:?a checkout of nanoGPT}" --seconds 300 \
  --recipe configs/speedrun-gpu.toml ;;
*) echo "check, speed, best or loss" >&2; exit 2 ;;
esac
