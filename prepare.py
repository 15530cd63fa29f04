"""Tokenize text into shards as training would, but without training: for a machine with the text and network access.

    python prepare.py --config configs/gpt2-124m.toml --train-data 'fineweb/*.parquet'

It takes train.py's flags. Training with the same flags then finds the shards in the cache; or copy the folder, which is
the last line that it prints, to another machine, and pass that as --train-data.
"""

import logging

from data import Corpus
from mini_llm.config import parse
from mini_llm.errors import UserError, one_line_errors
from mini_llm.pretrained import resolve_init
from mini_llm.tracking import setup_logging
from train import Config

log = logging.getLogger("mini_llm")


class Preparation(Config):
    """Tokenize what train.py with these flags would train on, and say where the tokens are."""

    def validate(self):
        if self.batch.dry_run:
            raise UserError("--dry-run: this only tokenizes; leave it out, or give it to train.py")


@one_line_errors()
def main():
    cfg = parse(Preparation)
    setup_logging(is_main=True)
    model, _, data = resolve_init(cfg, None)
    corpus = Corpus(data, model.vocab_size)
    tokens = corpus.meta["tokens"]
    log.info("%s tokens to train on, %s to validate on", f"{tokens['train']:,}", f"{tokens['val']:,}")
    print(corpus.folder)


if __name__ == "__main__":
    main()
