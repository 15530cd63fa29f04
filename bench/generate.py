"""Tokens per second of generation, ours and transformers', run in turn on the same weights, prompts and threads.

    python bench/generate.py --checkpoint-path checkpoints/minigpt.pt

The folder that transformers loads is exported from the checkpoint first. Both keep keys and values, both in fp32, and
neither stops before --max-new-tokens; texts are not decoded. Each round times every program once, after one that does
not count, and ratios are taken within a round.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from peers import ROOT, benchmark_parser, machine, run, spread

MODES = {"greedy": dict(temperature=0), "sampled": dict(temperature=0.8, top_k=50),
         "sampled, top-p 0.9": dict(temperature=0.8, top_k=0, top_p=0.9)}


def main():
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--checkpoint-path", required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()
    import transformers

    from generate import generate
    from mini_llm.pretrained import load_model

    model = load_model(options.checkpoint_path)[0].to(options.device)
    with tempfile.TemporaryDirectory() as folder:
        run(".", [sys.executable, ROOT / "export.py", "--checkpoint-path", options.checkpoint_path, "--output",
                  Path(folder) / "hf"])
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "hf").to(options.device).eval()
    generator = torch.Generator().manual_seed(1)
    n = options.max_new_tokens

    def ours_once(prompts, mode):
        return list(generate(model, prompts, n, **mode))

    def theirs_once(prompts, mode):
        sampling = {name: value for name, value in mode.items() if mode["temperature"]}
        ids = torch.tensor(prompts, device=options.device)
        with torch.no_grad():
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                                  do_sample=bool(sampling), pad_token_id=0, **sampling)
        return out[:, ids.shape[1]:].T.tolist()

    print(f"{model.cfg.arch}, {model.num_params():,} parameters, {options.prompt_tokens} + {n} tokens, "
          f"{options.rounds} rounds; {machine(options.device)}")
    print("\n| batch | choice | transformers, tokens/s, median (min–max) | ours | ours ÷ transformers, median of "
          "rounds (min–max) |\n|---|---|---|---|---|")
    for batch in options.batch:
        prompts = torch.randint(0, model.cfg.vocab_size, (batch, options.prompt_tokens), generator=generator).tolist()
        for name, mode in MODES.items():
            speeds = {theirs_once: [], ours_once: []}
            for number in range(options.rounds + 1):
                for once, found in speeds.items():
                    began = time.perf_counter()
                    assert len(once(prompts, mode)) == n
                    if number:
                        found.append(batch * n / (time.perf_counter() - began))
            ratios = [b / a for a, b in zip(*speeds.values(), strict=True)]
            print(f"| {batch} | {name} | {spread(speeds[theirs_once])} | {spread(speeds[ours_once])} "
                  f"| {spread(ratios, '.2f')} |", flush=True)


if __name__ == "__main__":
    main()
