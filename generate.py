"""Generate text with a model: `python generate.py --checkpoint-path checkpoints/minigpt.pt --prompt "def main"`.

A base model only continues its prompt. An empty prompt starts from the end-of-text token or, if training had no text
after one, from a newline.
"""

import math
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile

import numpy as np
import torch

from mini_llm import hardware
from mini_llm.config import arg, parse
from mini_llm.errors import UserError, one_line_errors, print_any_character, visible
from mini_llm.pretrained import load_run
from mini_llm.tokenizer import encode, id_count, known_characters, open_tokenizer
from model import KVCache

RULE = "-" * 15  # separates two texts
TEMPERATURE, TOP_K, SAMPLE_TOKENS = 0.8, 50, 128  # also for samples during training, and in exported folders
COLD = 1e-6  # below this temperature decoding is greedy: dividing logits by it would overflow


@dataclass
class GenerateConfig:
    """Generate"""

    checkpoint_path: str = arg("checkpoints/minigpt.pt", "the checkpoint to generate with, or a Hugging Face folder "
                                                         "(GPT-2, Llama, Qwen3, NanoChat)", metavar="FILE.pt|DIR")
    prompt: list[str] = arg([], "texts to continue, which may be empty; none: one empty text")
    prompt_file: str = arg("", "more texts to continue, one a line; -: standard input", metavar="FILE|-")
    num_samples: int = arg(1, "continuations of each prompt", ge=1, le=10**6)
    max_new_tokens: int = arg(256, "tokens of a continuation at most; an end-of-text token ends it sooner", ge=1,
                              le=10**7)
    temperature: float = arg(TEMPERATURE, "lower: less random; 0: always the likeliest token", ge=0)
    top_k: int = arg(TOP_K, "sample from this many likeliest tokens; 0: from all", ge=0)
    top_p: float = arg(1.0, "nucleus: sample from the fewest tokens whose probability reaches this", ge=1e-6, le=1)
    seed: int = arg(1337, "seed; each continuation has its own stream, by the place of its prompt and its number", ge=0)
    stop: list[str] = arg([], "texts that end a continuation, and are left out of it")
    batch_size: int = arg(32, "continuations computed at once, at most", ge=1)
    device: str = arg("auto", "auto: cuda, else mps, else cpu", choices=("auto", "cuda", "cpu", "mps"))

    def validate(self):
        if "" in self.stop:
            raise UserError("--stop '': an empty text matches everywhere; leave it out")

    def prompts(self):
        """All prompts, in order. Raises UserError if the file cannot be read."""
        if not self.prompt_file:
            return self.prompt or [""]
        try:
            with open(0 if self.prompt_file == "-" else self.prompt_file, encoding="utf-8-sig") as file:
                lines = [line.removesuffix("\n") for line in file]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(f"--prompt-file {self.prompt_file}: {reason}; give text, one prompt a line") from None
        if not lines:
            raise UserError(f"--prompt-file {self.prompt_file}: no prompt in it; an empty line is an empty prompt")
        return self.prompt + lines


@dataclass
class Config:
    """Continue texts with a trained model."""

    generate: GenerateConfig = field(default_factory=GenerateConfig)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seeds=None, vocab_size=None,
             context=math.inf):
    """Continue `prompts`, B lists of at least one id each. Each step yields a list of B ids, with None for a row whose
    prompt is still being read or that already has its `max_new_tokens`. Ids are below `vocab_size`, if given.

    All rows are at the same position, so nothing is padded or masked: the rest of a longer prompt is fed in token by
    token. Row i samples with `seeds[i]` (as for numpy's default_rng), whatever the other rows are. A context that
    outgrows the model's positions, or `context` tokens, is cut to its last half."""
    device, training = next(model.parameters()).device, model.training
    limit = min(context, model.cfg.max_position_embeddings)
    prompts = [prompt[-limit:] for prompt in prompts]
    seeds = range(len(prompts)) if seeds is None else seeds
    lengths = [len(prompt) for prompt in prompts]
    shortest, total = min(lengths), max(lengths) + max_new_tokens
    tokens = torch.zeros(len(prompts), total, dtype=torch.long)
    noise = torch.zeros(len(prompts), total)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.tensor(prompt)
        draws = np.random.default_rng(seeds[row]).random(max_new_tokens, dtype=np.float32)
        noise[row, len(prompt):len(prompt) + max_new_tokens] = torch.from_numpy(draws)
    tokens, noise, starts = tokens.to(device), noise.to(device), torch.tensor(lengths, device=device)
    model.eval()
    try:
        past, fresh = [KVCache(min(limit, total)) for _ in model.blocks], tokens[:, :shortest]
        for position in range(shortest, total):
            if past[0].length + fresh.shape[1] > limit:
                past, fresh = [KVCache(limit) for _ in model.blocks], tokens[:, position - (limit // 2 or 1):position]
            logits = model.logits(model.hidden(fresh, past)[:, -1])[:, :vocab_size].float()  # (B, V)
            fresh = sample(logits, noise[:, position:position + 1], temperature, top_k, top_p)  # (B, 1)
            fresh = torch.where(starts[:, None] > position, tokens[:, position:position + 1], fresh)
            tokens[:, position:position + 1] = fresh
            yield [token if 0 <= position - start < max_new_tokens else None
                   for token, start in zip(fresh[:, 0].tolist(), lengths, strict=True)]
    finally:
        model.train(training)


def sample(logits, noise, temperature=1.0, top_k=0, top_p=1.0):
    """(B, V) logits and (B, 1) uniform numbers in [0, 1) → (B, 1) token ids, by inverse transform sampling. top_k keeps
    the k most likely tokens (0: all), top_p the fewest whose probability reaches p (Holtzman et al. 2019)."""
    if temperature < COLD:
        return logits.argmax(dim=-1, keepdim=True)
    order = None
    if 0 < top_k < logits.shape[-1] or top_p < 1:
        logits, order = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # most likely first
    probs = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)  # the token that reaches p is kept
    reached = probs.cumsum(dim=-1)
    chosen = torch.searchsorted(reached, noise * reached[:, -1:], right=True)
    chosen.clamp_(max=reached.shape[-1] - 1)  # NaN logits give an index past the end, which ends a CUDA process
    return chosen if order is None else order.gather(-1, chosen)


class Continuation:
    """The text of one row as it grows. The strings that `add` and `finish` return concatenate to the text: whole
    characters only, up to the end-of-text token or the first of `stops`, which may span several tokens."""

    def __init__(self, tokenizer, eos, prompt=(), stops=()):
        self.tokenizer, self.eos, self.stops, self.done = tokenizer, eos, stops, False
        # Decoded with what stands before: some tokenizers emit a space only after another token, others decode the
        # bytes of a character only together. A special token decodes to nothing: what stands before it is still needed.
        self.ids, self.n_before = list(prompt), len(prompt)
        self.shown = len(self._decode())
        self.held = ""  # what may be the beginning of a stop string

    def add(self, token):
        if token == self.eos:
            return self.finish()
        self.ids.append(token)
        text = self._decode()
        whole = text.rstrip("\ufffd")  # how a character decodes until all its bytes are there
        new, self.shown = whole[self.shown:], max(self.shown, len(whole))
        if whole == text and new:
            self.ids, self.n_before = self.ids[self.n_before:], len(self.ids) - self.n_before
            self.shown = len(self._decode())
        return self._before_stop(new) if self.stops else new

    def finish(self):
        """Ends the row and returns the text that was held back."""
        if self.done:
            return ""
        text = self._before_stop(self._decode()[self.shown:]) + self.held  # empty if a stop string was found
        self.done = True
        return text

    def _before_stop(self, new):
        text = self.held + new
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.done, self.held = True, ""
            return text[:min(found)]
        n = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - n:]
        return text[:len(text) - n]

    def _decode(self):
        return self.tokenizer.decode(self.ids)


def batches(lengths, batch_size, max_new_tokens):
    """Prompt lengths, one per row → lists of rows to compute together. Feeding in the end of a longer prompt costs a
    step per token, another batch `max_new_tokens` steps: lengths in a batch may differ by up to that many tokens."""
    found = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not found or len(found[-1]) == batch_size or lengths[row] - lengths[found[-1][0]] > max_new_tokens:
            found.append([])
        found[-1].append(row)
    return found


def prompt_ids(tokenizer, start, prompt, prefix=(), given="--prompt"):
    """The ids of a prompt, after those of `prefix`; [start] if there are none. `given`: the flag that it is from."""
    (ids,) = encode(tokenizer, [prompt])
    if prompt and not ids:
        raise UserError(f"{given} {prompt!r}: the tokenizer knows none of these characters; give another")
    known = known_characters(tokenizer)
    if known is not None and (unknown := "".join(sorted(set(prompt) - known))):
        warn_once(f"warning: the tokenizer has no token for {unknown!r}: left out of {given} {prompt!r}")
    return [*prefix, *ids] or [start]


@cache
def warn_once(text):
    """On stderr, and not again: a run encodes its --sample-prompt for each sample."""
    print(text, file=sys.stderr)


def write_texts(model, tokenizer, eos, saved, cfg):
    """Print what `cfg` asks for: a single text as it grows, several in order → the number of generated tokens."""
    prompts = cfg.prompts()
    texts = [text for text in prompts for _ in range(cfg.num_samples)]
    start, prefix = saved.get("start", eos or 0), saved.get("prefix", [])
    encoded = [prompt_ids(tokenizer, start, text, prefix) for text in prompts]
    ids = [tokens for tokens in encoded for _ in range(cfg.num_samples)]
    seeds = [[cfg.seed, *divmod(row, cfg.num_samples)] for row in range(len(texts))]
    outputs, n_tokens, n_written = {}, 0, 0  # the text of each row so far, until it is written
    on_terminal = sys.stdout.isatty()

    def shown(text):  # a model may write what acts on a terminal; of Windows' line ends, the \n alone is shown there
        return visible(text.replace("\r", "")) if on_terminal else text

    def emit(row, new):
        outputs[row] += new
        if len(texts) == 1 and new:
            print(shown(new), end="", flush=True)

    for rows in batches([len(tokens) for tokens in ids], cfg.batch_size, cfg.max_new_tokens):
        growing = {row: Continuation(tokenizer, eos, ids[row] if texts[row] else [], cfg.stop) for row in rows}
        for row in rows:
            outputs[row] = ""
            emit(row, texts[row])
        for step in generate(model, [ids[row] for row in rows], cfg.max_new_tokens, cfg.temperature, cfg.top_k,
                             cfg.top_p, [seeds[row] for row in rows], id_count(tokenizer)):
            for (row, continuation), token in zip(growing.items(), step, strict=True):
                if token is not None and not continuation.done:
                    emit(row, continuation.add(token))
                    n_tokens += 1
            if all(continuation.done for continuation in growing.values()):
                break
        for row, continuation in growing.items():
            emit(row, continuation.finish())
        while len(texts) > 1 and n_written in outputs:
            print(*([RULE] if n_written else []), shown(outputs.pop(n_written)), sep="\n", flush=True)
            n_written += 1
    if len(texts) == 1:
        print(flush=True)
    return n_tokens


def require_prompt(prompt, tokenizer_folder):
    """Raises UserError if the tokenizer cannot encode --sample-prompt: not hours later, at the first sample."""
    if prompt:
        prompt_ids(open_tokenizer(tokenizer_folder), 0, prompt, given="--sample-prompt")


def sample_text(model, tokenizer_folder, corpus, prompt=""):
    """`prompt` and what `model` makes of it; without one, a text that it generates from `corpus.start`."""
    tokenizer = open_tokenizer(tokenizer_folder)
    ids = prompt_ids(tokenizer, corpus.start, prompt, given="--sample-prompt")
    steps = generate(model, [ids], SAMPLE_TOKENS, TEMPERATURE, TOP_K, seeds=[1337],
                     # Beyond the tokenizer's ids (--vocab-size) and the length trained on, the model is untrained.
                     vocab_size=id_count(tokenizer), context=corpus.seq_len)
    with hardware.allow_nondeterministic():  # a GPU has no deterministic cumulative sum
        new = takewhile(lambda token: token != corpus.eos, (token for token, in steps))
        return tokenizer.decode([*(ids if prompt else []), *new])


@one_line_errors()
def main():
    cfg = parse(Config).generate
    device = hardware.choose_device(cfg.device)
    print_any_character()
    model, tokenizer, eos, saved = load_run(cfg.checkpoint_path)
    began = time.perf_counter()
    with hardware.enough_memory():
        n_tokens = write_texts(model.to(device), tokenizer, eos, saved, cfg)
    seconds = time.perf_counter() - began
    print(f"{n_tokens:,} tokens in {seconds:.2f} s: {n_tokens / seconds:,.0f} tokens/s on {device.type}",
          file=sys.stderr)


if __name__ == "__main__":
    main()
