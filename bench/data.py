"""Tokenization: MB/s from text to token shards, ours and as nanoGPT prepares OpenWebText: `datasets.map` with tiktoken.

    python bench/data.py --text FILE --tokenizer gpt2        (pip install tiktoken; GPT-2's tokenizer in HF_HOME)

Both read the same file of documents (one a line here, blank lines dropped), make the same ids with an end-of-text token
after each document, and write them to disk as uint16. Whole processes are timed, in turn, with caches of their own.
"""

import json
import sys
import tempfile
from pathlib import Path

from peers import ROOT, benchmark_parser, machine, run, spread

MAP = '''
import sys, json, numpy as np, tiktoken, os
from datasets import load_dataset
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
source, target, name = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
back = {char: byte for byte, char in bytes_to_unicode().items()}
ranks = {bytes(back[c] for c in token): i for token, i in tokenizer.get_vocab().items() if token != "<|endoftext|>"}
pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\\p{L}++| ?\\p{N}++| ?[^\\s\\p{L}\\p{N}]++|\\s++$|\\s+(?!\\S)|\\s"""
encoding = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
def process(example):
    ids = encoding.encode_ordinary(example["text"]) + [encoding.eot_token]
    return {"ids": ids, "len": len(ids)}
data = load_dataset("json", data_files=source, split="train", cache_dir=target + "/hf")
data = data.map(process, remove_columns=["text"], num_proc=os.cpu_count())
out = np.memmap(target + "/train.bin", dtype=np.uint16, mode="w+", shape=(sum(data["len"]),))
at = 0
for shard in range(min(64, len(data))):
    batch = data.shard(num_shards=min(64, len(data)), index=shard, contiguous=True).with_format("numpy")
    block = np.concatenate(batch["ids"])
    out[at:at + len(block)] = block
    at += len(block)
out.flush()
print("tokens", at)
'''


def one_step(source, tokenizer, cache, checkpoint):
    """The command that tokenizes and takes one step of the smallest model."""
    return [sys.executable, ROOT / "train.py", "--train-data", source, "--tokenizer-name", tokenizer, "--num-steps", 1,
            "--n-layers", 1, "--n-heads", 1, "--d-model", 8, "--eval-tokens", 256, "--cache-dir", cache,
            "--checkpoint-path", cache / checkpoint]


def main():
    parser = benchmark_parser(__doc__, device=False, rounds=3)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--megabytes", type=float, default=30, help="of text, repeated or cut to this")
    options = parser.parse_args()

    text = options.text.read_text()
    text = (text * (int(options.megabytes * 1e6 / len(text)) + 1))[:int(options.megabytes * 1e6)]
    documents = [part for part in text.split("\n\n") if part.strip()]
    rates = {"mini-llm": [], "datasets.map + tiktoken": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text.jsonl"
        source.write_text("".join(json.dumps({"text": part}) + "\n" for part in documents))
        size = sum(len(part.encode()) for part in documents)
        for number in range(options.rounds):
            for name, found in rates.items():
                target = Path(folder) / f"{name.split()[0]}{number}"
                target.mkdir()
                command = (one_step(source, options.tokenizer, target, "c.pt") if name == "mini-llm" else
                           [sys.executable, "-c", MAP, source, target, options.tokenizer])
                found.append(size / 1e6 / run(folder, command)[0])
        again, *_ = run(folder, one_step(source, options.tokenizer, Path(folder) / "mini-llm0", "again.pt"))
    print(f"{size / 1e6:.1f} MB in {len(documents):,} documents, {options.tokenizer}; {machine('cpu')}")
    for name, found in rates.items():
        print(f"{name}: {spread(found, '.2f')} MB/s, the whole process from its start")
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    print(f"ratio {spread(ratios, '.2f')}; a second start, from the cache, to the end of one step: {again:.1f} s")


if __name__ == "__main__":
    main()
