"""Tokenizers, all of one type: `tokenizers.Tokenizer`, which underlies every fast Hugging Face tokenizer."""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import threading
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path

import numpy as np

from mini_llm.config import switched_on
from mini_llm.errors import UserError
from mini_llm.files import read_json

END_OF_TEXT = "<|endoftext|>"
OWN = ("bpe", "byte", "char")
LEARNED = ("bpe", "char")  # from the text
EOS_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")  # may name it; in older folders only the second does


def load_tokenizer(name):
    """The tokenizer with that name or in that folder; None for one that is trained on the text (bpe, char). Raises
    UserError, within seconds if the Hub is needed but unreachable."""
    if name in LEARNED:
        return None
    return _byte_tokenizer() if name == "byte" else _pretrained(name)


def train_tokenizer(name, texts, vocab_size):
    """`bpe`: GPT-2's byte-level BPE (Sennrich et al. 2016) of `vocab_size` tokens. `char`: one per character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if name == "char":
        alphabet = set()
        for text in texts:  # not set().union(*texts), which holds a set for each of millions of documents
            alphabet.update(text)
        if not alphabet:
            raise UserError("--tokenizer-name char: the text has no characters; give --train-data with text in it")
        # BPE without merges is a character tokenizer that every Hugging Face tool understands.
        tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(sorted(alphabet))}, merges=[]))
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens([END_OF_TEXT])
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if vocab_size < len(alphabet) + 1:
            raise UserError(f"--vocab-size {vocab_size}: bpe needs at least {len(alphabet) + 1} tokens, "
                            f"the bytes and {END_OF_TEXT}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def save_tokenizer(tokenizer, folder, name):
    """Write a folder that `transformers.AutoTokenizer` can load; returns the id of the end-of-text token, or None."""
    folder.mkdir()
    # Not tokenizer.save(), whose errors are not OSErrors.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    eos = end_of_text(tokenizer, name)
    config = dict(tokenizer_class="PreTrainedTokenizerFast")
    if eos is not None:
        config["eos_token"] = config["bos_token"] = tokenizer.id_to_token(eos)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return eos


def open_tokenizer(folder):
    """The tokenizer that `save_tokenizer` wrote. Raises UserError if it is damaged."""
    from tokenizers import Tokenizer

    try:
        return _unbounded(Tokenizer.from_file(str(Path(folder) / "tokenizer.json")))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{folder}: not a tokenizer ({error}); copy the one that the model was trained with") from None


def tokenizer_hash(tokenizer):
    """A digest of 32 bytes, equal only for tokenizers that give the same ids for the same text."""
    return hashlib.blake2b(tokenizer.to_str().encode(), digest_size=32).digest()


def id_count(tokenizer):
    """The vocabulary size that the tokenizer needs: its highest id + 1, more than it has tokens if ids are left out."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def encode(tokenizer, texts):
    """The ids of each text. Raises UserError for a part without a token, if the tokenizer has none for the unknown."""
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"the tokenizer cannot encode this text ({error}); train with one that encodes any text, such "
                        f"as --tokenizer-name bpe, byte or gpt2") from None


def end_of_text(tokenizer, name):
    """The id of the end-of-text token: the one that the config of the tokenizer's folder or Hub `name` states, else the
    first of EOS_NAMES that it has; None if it has none."""
    names = []
    for config in CONFIGS if name not in OWN else ():
        file = os.path.join(name, config) if os.path.isdir(name) else _hub_file(name, config, local_files_only=True)
        if not file or not os.path.exists(file):
            continue
        try:
            stated = read_json(file).get("eos_token")
        except ValueError as error:
            raise UserError(f"--tokenizer-name {name}: {file} is damaged: {error}") from None
        stated = stated.get("content") if isinstance(stated, dict) else stated
        if isinstance(stated, str):
            names.append(stated)
    names += EOS_NAMES
    return next((eos for eos in map(tokenizer.token_to_id, names) if eos is not None), None)


def gives_back(tokenizer, pieces):
    """Whether the tokens of a few of the pieces decode to their text, apart from white space at either end. BERT's, for
    one, lose capitals and line ends. Always True of a char tokenizer, of which `encode_pieces` counts the losses."""
    texts = [piece.content for piece in pieces if isinstance(piece.content, str)]
    texts = texts[::max(1, len(texts) // 8)]
    return known_characters(tokenizer) is not None or all(
        tokenizer.decode(ids, skip_special_tokens=False).strip() == text.strip()
        for ids, text in zip(encode(tokenizer, texts), texts, strict=True))


@functools.lru_cache(maxsize=1)
def known_characters(tokenizer):
    """The characters that a char tokenizer has tokens for; None for others, which are assumed to encode any text."""
    if tokenizer.pre_tokenizer:
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    return None if max(map(len, vocabulary), default=0) > 1 else vocabulary.keys()


def encode_pieces(tokenizer, pieces, eos):
    """Pieces of text or of token files → for each (piece, its ids, bytes of its text without the characters that have
    no token, the number of those). A document's ids end in `eos` unless that is None."""
    texts = [piece.content for piece in pieces if isinstance(piece.content, str)]
    blocks = [piece.content for piece in pieces if not isinstance(piece.content, str)]
    encoded = iter(encode(tokenizer, texts))
    sizes = iter(count_bytes(tokenizer, blocks))
    known = known_characters(tokenizer) if texts else None
    for piece in pieces:
        if isinstance(piece.content, str):
            text = piece.content
            if known is not None and (unknown := set(text) - known):
                text = text.translate(dict.fromkeys(map(ord, unknown)))
            ids = next(encoded) + ([eos] if piece.ends_document and eos is not None else [])
            yield piece, ids, len(text.encode("utf-8", "replace")), len(piece.content) - len(text)
        else:
            yield piece, piece.content, next(sizes), 0


def count_bytes(tokenizer, blocks):
    """Bytes of the text of each array of ids, without special tokens; up to 3 too many if ids must be decoded and begin
    or end within a character."""
    if blocks and (table := _bytes_of_tokens(tokenizer)) is not None:  # ids outside of it are refused when written
        return [int(np.take(table, ids, mode="clip").sum()) for ids in blocks]
    return [len(text.encode("utf-8", "replace")) for text in tokenizer.decode_batch([ids.tolist() for ids in blocks])]


@functools.lru_cache(maxsize=1)
def _bytes_of_tokens(tokenizer):
    """Bytes of each id's text, (vocabulary,), of a byte-level tokenizer, else None: ten times as fast as decoding."""
    from tokenizers import decoders

    if not isinstance(tokenizer.decoder, decoders.ByteLevel) or getattr(tokenizer.model, "end_of_word_suffix", None):
        return None
    vocab, added = tokenizer.get_vocab(with_added_tokens=False), tokenizer.get_added_tokens_decoder()
    table = np.zeros(max([0, *vocab.values(), *added]) + 1, dtype=np.int64)
    for token, i in vocab.items():
        table[i] = len(token)  # one character of a token is one byte of text
    for i, token in added.items():
        table[i] = 0 if token.special else len(token.content.encode())
    return table


def _byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _pretrained(name):
    """A folder's or the Hub's tokenizer: from the local cache if it is there, else from the Hub if it is reachable."""
    from tokenizers import Tokenizer

    if name.endswith(".json") and os.path.isfile(name):
        raise UserError(f"--tokenizer-name {name}: a file; give the folder of a tokenizer.json")
    offline = f"offline choices: {', '.join(OWN)}, or a tokenizer's folder"
    if os.path.isdir(name):
        file = os.path.join(name, "tokenizer.json")
    elif not (file := _hub_file(name, "tokenizer.json", local_files_only=True)):
        files = "tokenizer.json", "tokenizer_config.json"
        if problem := hub_problem(*(f"{name}/resolve/main/{wanted}" for wanted in files)):
            raise UserError(f"--tokenizer-name {name}: no such folder, not in the local cache (HF_HOME), and "
                            f"{problem}; {offline}")
        # Cached for the end-of-text lookup, and before tokenizer.json, whose presence other ranks check for.
        _hub_file(name, "tokenizer_config.json")
        file = _hub_file(name, "tokenizer.json")
    if file and os.path.exists(file):
        if not os.path.isfile(file):
            raise UserError(f"--tokenizer-name {name}: {file} is not a file")
        try:
            tokenizer = Tokenizer.from_file(file)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"--tokenizer-name {name}: {file} is not a tokenizer: {error}") from None
    elif _is_sentencepiece(os.path.join(name, "tokenizer.model")) and not importlib.util.find_spec("sentencepiece"):
        raise UserError(f"--tokenizer-name {name}: to read its tokenizer.model, pip install sentencepiece")
    elif not (tokenizer := _slow_pretrained(name)):
        raise UserError(f"--tokenizer-name {name}: no tokenizer found there; {offline}")
    return _unbounded(tokenizer)


def _unbounded(tokenizer):
    """Turns off truncation and padding: some tokenizers come truncating to their model's context length."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _is_sentencepiece(file):
    """Whether a tokenizer.model is SentencePiece's, a protobuf message; tiktoken's is text."""
    if os.path.isfile(file):  # a named pipe would block
        with contextlib.suppress(OSError), open(file, "rb") as opened:
            return opened.read(1) == b"\n"
    return False


def _slow_pretrained(name):
    """A tokenizer without a tokenizer.json, converted by transformers; None if there is none."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False).backend_tokenizer
        # From a folder without a vocabulary, it makes a tokenizer of special tokens alone for GPT-2 and Qwen3.
        return tokenizer if tokenizer.get_vocab_size() > len(tokenizer.get_added_tokens_decoder()) else None
    except Exception:  # an unexpected file can make it raise anything
        return None


def _hub_file(name, file, local_files_only=False):
    """The path of a file of the Hub in the local cache, downloaded unless `local_files_only`; None if there is none."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(name, file, local_files_only=local_files_only)
    except Exception:  # many types, of httpx and XET as well: a connection lost midway is not an OSError
        return None


def hub_problem(*pages, seconds=3.0):
    """Why the Hugging Face Hub will not serve these pages, with which a download begins; "" if it answers, even that
    there are none. Takes at most `seconds` for each: the Hub's own clients try for minutes."""
    if switched_on("HF_HUB_OFFLINE"):
        return "the hub cannot be reached (HF_HUB_OFFLINE is set)"
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    found = []  # the problem, or "", of the page that has just answered

    def probe(page):
        try:
            urllib.request.urlopen(f"{hub}/{urllib.parse.quote(page)}", timeout=seconds).close()
            found.append("")
        except urllib.request.HTTPError as error:  # a 404, for one, is an answer, which the clients report better
            failed = error.code >= 500 or error.code in (407, 429)
            found.append(f"the hub answered {error.code}" if failed else "")
        except (OSError, ValueError, HTTPException):  # ValueError if HF_ENDPOINT is not a URL
            pass

    for page in pages:
        # In a thread, because a DNS lookup that hangs ignores the timeout.
        thread = threading.Thread(target=probe, args=[page], daemon=True)
        thread.start()
        thread.join(seconds)
        if problem := found.pop() if found else "the hub cannot be reached":
            return problem
    return ""
