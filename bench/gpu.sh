#!/usr/bin/env bash
# What a CUDA machine is to show, in calls meant for nine minutes each: none has run yet. Needs torch, transformers,
# accelerate, NumPy and pytest with its xdist and timeout; no network, no wandb, no datasets: the tokens are those of
# Python's own source files.
#
#   bench/gpu.sh check                         every test that needs a GPU
#   bench/gpu.sh speed 124m PATH/TO/nanoGPT    tokens/s and MFU, ours and nanoGPT's compiled; also 350m
#   bench/gpu.sh speed 124m PATH/TO/nanoGPT 32 the same with another batch: for each its best
#   bench/gpu.sh trainer 124m                  ours and the Hugging Face Trainer's, bf16, compiled; also 350m
#   bench/gpu.sh step 1.5b                     ours alone, without a checkpoint: where a step goes; also 124m, 350m
#   bench/gpu.sh loss PATH/TO/nanoGPT          time to the validation loss that nanoGPT reaches in 260 s; ours has two
#                                              thirds of that
#   bench/gpu.sh ddp 124m 8                    8 GPUs against one, the same global batch; also 350m
#   bench/gpu.sh fsdp 350m 8                   the same of shards
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1  # what was printed before a time limit is not lost
python=${PYTHON:-python3}
what=${1:?check, speed, trainer, step, loss, ddp or fsdp}
$python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("this PyTorch sees no CUDA device: see nvidia-smi")'
case $what in
check|ddp|fsdp) ;;  # with all GPUs
*) export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} ;;  # of several the Trainer would take all
esac
case $what in
check) TORCHINDUCTOR_COMPILE_THREADS=4 $python -m pytest -o addopts= -n 4 -v --durations=0 tests/test_gpu.py ;;
speed)
  $python bench/speed.py --device cuda --size "${2:?a size}" --nanogpt "${3:?a checkout of nanoGPT}" \
    --only nanoGPT mini-llm ${4:+--batch "$4"} --rounds 3 --limit 500 ;;
trainer) $python bench/speed.py --device cuda --size "${2:?a size}" --rounds 3 --limit 500 ;;
step) $python bench/step.py --device cuda --size "${2:?a size}" ;;
loss) $python bench/loss.py --device cuda --nanogpt "${2:?a checkout of nanoGPT}" --seconds 260 \
  --recipe configs/speedrun-gpu.toml ;;
ddp|fsdp) $python bench/ddp.py --mode "$what" --device cuda --size "${2:?a size}" --ranks "${3:?a number of GPUs}" \
  --rounds 2 ;;
*) echo "check, speed, trainer, step, loss, ddp or fsdp" >&2; exit 2 ;;
esac
