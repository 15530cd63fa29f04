"""Text to token shards, as training would make them, without training: for a machine that has the text and the network.

    python prepare.py --config configs/gpt2-124m.toml --train-data 'fineweb/*.parquet'

It takes train.py's flags. The same flags then find the tokens in the cache; or copy the folder that it names to another
machine, and name that as --train-data.
"""

from config import one_line_errors, parse
from data import Corpus
from pretrained import resolve_init
from tracking import setup_logging
from train import Config


class Preparation(Config):
    """Tokenize what train.py with these flags would train on, and say where the tokens are."""


@one_line_errors()
def main():
    cfg = parse(Preparation)
    setup_logging(is_main=True)
    model, _ = resolve_init(cfg, None)
    corpus = Corpus(cfg.data, model.vocab_size)
    tokens = corpus.meta["tokens"]
    print(f"{corpus.folder}: {tokens['train']:,} tokens to train on, {tokens['val']:,} to validate on")


if __name__ == "__main__":
    main()
