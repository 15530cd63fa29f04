"""What a model writes."""

import torch

from tokenizer import open_tokenizer


def sample_text(model, tokenizer_folder, eos, max_new_tokens=128, temperature=0.8, top_k=50, seed=1337):
    """Text that `model` continues from nothing: from the end-of-text token, or where there is none from token 0."""
    device = next(model.parameters()).device
    tokenizer, generator = open_tokenizer(tokenizer_folder), torch.Generator(device).manual_seed(seed)
    start = torch.tensor([[eos or 0]], device=device)  # (1, 1)
    tokens = model.generate(start, max_new_tokens, temperature, top_k, generator=generator)[0, 1:].tolist()
    # A model may be wider than its tokenizer (--vocab-size), and its spare ids mean nothing.
    return tokenizer.decode([token for token in tokens if token < tokenizer.get_vocab_size()])
