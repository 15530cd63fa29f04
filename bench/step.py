"""Where the time of a training step goes, and what its matrix products would take at their peak.

    python bench/step.py --size A B

The step is made of the loop's own parts, on random tokens: forward and backward under autocast, clipping, AdamW. What
torch.profiler gives to each kind of operation is scaled to the step's own time without it, which is a good deal less
where operations are small.
"""

import statistics
import time
from collections import Counter

import torch
from peers import SIZES, benchmark_parser, machine
from speed import matmul_peak
from torch.profiler import ProfilerActivity, profile

from mini_llm import hardware
from mini_llm.hardware import SpeedConfig
from optim import OptimConfig, StepGuard, make_optimizer

KINDS = {  # the first whose word is in the name of an operation, on a GPU of a kernel
    "fused by torch.compile": ("triton_",),
    "optimizer": ("adam", "_foreach_", "linalg_vector_norm", "optimizer", "multi_tensor"),
    "attention": ("attention", "flash", "fmha"),
    "matrix products": ("mm", "linear", "matmul", "nvjet", "cutlass"),
    "GELU": ("gelu",),
    "softmax, cross-entropy": ("softmax", "nll_loss"),
    "norms": ("layer_norm", "rms_norm"),
    "casts, copies": ("copy_", "_to_copy", "clone", "cat", "memcpy"),
    "additions, products": ("add", "mul", "div", "sum"),
}


def kind_of(name):
    return next((kind for kind, words in KINDS.items() if any(word in name.lower() for word in words)), "all else")


def measure(name, options):
    """Print where the time of a step of this size goes."""
    size, cfg = SIZES[name], SpeedConfig(device=options.device)
    device = hardware.choose_device(options.device)
    hardware.configure(cfg, device)
    precision = hardware.choose_precision(cfg, device)
    model = size.model(size.vocab or 65).to(device)
    optimizer = make_optimizer(model, OptimConfig(), device)
    guard = StepGuard(OptimConfig(), optimizer, precision.scaler(), device)
    fast = torch.compile(model) if hardware.should_compile(cfg, device) else model
    tokens, targets = torch.randint(0, model.cfg.vocab_size, (2, size.batch, size.context), device=device)

    def step():
        began = time.perf_counter()
        with precision.autocast():
            loss = fast(tokens, targets)
        loss.backward()
        guard.step(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), 0)
        optimizer.zero_grad(set_to_none=True)
        hardware.synchronize(device)
        return time.perf_counter() - began

    for _ in range(max(3, options.steps // 4)):
        step()
    plain = [step() for _ in range(options.steps)]
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        for _ in range(options.steps):
            step()
    spent, calls = Counter(), Counter()
    for event in trace.key_averages():
        if on_gpu and event.device_type == torch.autograd.DeviceType.CPU:
            continue  # the host's calls
        spent[kind_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        calls[kind_of(event.key)] += event.count
    median, whole = statistics.median(plain), sum(spent.values())
    peak = matmul_peak(options.device, precision.dtype or torch.float32)
    flops = model.flops_per_token(size.context) * size.tokens
    print(f"\nsize {name}, amp {precision.name}: {median * 1e3:.4g} ms a step, median of {options.steps} (least "
          f"{min(plain) * 1e3:.4g}); its {flops / 1e9:.3g} GFLOP at the peak of {peak / 1e12:.3g} TFLOP/s: "
          f"{flops / peak * 1e3:.4g} ms\n\n| | ms | of the step | calls |\n|---|---|---|---|")
    for kind, seconds in spent.most_common():
        print(f"| {kind} | {seconds / whole * median * 1e3:.3g} | {seconds / whole:.0%} | "
              f"{calls[kind] / options.steps:.0f} |")


def main():
    parser = benchmark_parser(__doc__, size=["A", "B"])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    print(machine(options.device))
    for name in options.size:
        measure(name, options)


if __name__ == "__main__":
    main()
