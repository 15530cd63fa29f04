"""GPT-2 under the Hugging Face Trainer on a file of tokens: a peer of the benchmarks (pip install accelerate)."""

import argparse

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed


class Windows(torch.utils.data.Dataset):
    def __init__(self, path, context):
        self.ids, self.context = np.memmap(path, np.uint16, mode="r"), context

    def __len__(self):
        return (len(self.ids) - 1) // self.context

    def __getitem__(self, index):
        ids = torch.from_numpy(self.ids[index * self.context:(index + 1) * self.context].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


parser = argparse.ArgumentParser()
parser.add_argument("--tokens", required=True)
parser.add_argument("--device", default="cpu")
for name in ("vocab", "layers", "heads", "width", "context", "batch", "steps"):
    parser.add_argument(f"--{name}", type=int, required=True)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--compile", action="store_true")
options = parser.parse_args()

set_seed(1337)
model = GPT2LMHeadModel(GPT2Config(
    vocab_size=options.vocab, n_layer=options.layers, n_head=options.heads, n_embd=options.width,
    n_positions=options.context, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
model.loss_type = "ForCausalLM"  # what it takes anyway, with a warning that cuts torch.compile's graph in two
Trainer(model=model, train_dataset=Windows(f"{options.tokens}/train.bin", options.context), args=TrainingArguments(
    output_dir="trainer", max_steps=options.steps, per_device_train_batch_size=options.batch, learning_rate=1e-3,
    warmup_steps=100, lr_scheduler_type="cosine", weight_decay=0.1, adam_beta2=0.99, max_grad_norm=1.0,
    bf16=options.bf16, torch_compile=options.compile, use_cpu=options.device == "cpu", logging_steps=10,
    save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=options.device != "cpu")).train()
