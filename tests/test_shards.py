"""Token files of llm.c and nanoGPT are trained on as if the text had been given."""

import errno
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import zygote
from conftest import ROOT, environment

from data import DataConfig, prepare
from mini_llm.errors import UserError
from mini_llm.shards import HEADER, MAGIC, Shard, ShardWriter, read_token_file
from mini_llm.text import find_sources
from mini_llm.tokenizer import count_bytes, encode, load_tokenizer, train_tokenizer


def llm_c(ids, magic=20240520, version=1, dtype=np.uint16):
    """A token file as llm.c and modded-nanogpt write it."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids)
    return header.tobytes() + np.asarray(ids, dtype).tobytes()


def nanogpt(ids):
    return np.asarray(ids, np.uint16).tobytes()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, text, cache):
    """A folder of texts to train and validate on, each of two documents, their tokens, and their bpe tokenizer."""
    folder, whole = tmp_path_factory.mktemp("tokens"), text.read_text()
    parts = {"train": [whole[:30_000], whole[30_000:60_000]], "val": [whole[60_000:70_000], whole[70_000:80_000]]}
    for split, documents in parts.items():
        (folder / f"{split}.txt").write_text("<|endoftext|>".join(documents), "utf-8")
    shards = prepare(DataConfig(train_data=[str(folder / "train.txt")], val_data=[str(folder / "val.txt")], seq_len=32,
                                cache_dir=str(cache)), 300)
    (folder / "tokenizer").symlink_to(shards / "tokenizer")
    for split in parts:
        shard = Shard(shards / f"{split}.bin")
        np.save(folder / f"{split}.npy", shard.read(0, shard.count))
    return folder


def test_token_files_give_the_run_of_their_text(trainer, prepared, cache):
    flags = ["--num-steps", 6, "--log-steps", 2, "--eval-tokens", 0, "--cache-dir", cache, "--tokenizer-name",
             prepared / "tokenizer"]
    of_text = trainer(*flags, "--train-data", prepared / "train.txt", "--val-data", prepared / "val.txt", data=False)
    assert of_text.code == 0 and of_text.losses(), of_text.err
    train, val = (np.load(prepared / f"{split}.npy") for split in ("train", "val"))
    for name, written in ("llm_c", llm_c), ("nanogpt", nanogpt):
        (trainer.folder / f"{name}_0.bin").write_bytes(written(train[:7001]))  # several, cut anywhere
        (trainer.folder / f"{name}_1.bin").write_bytes(written(train[7001:]))
        (trainer.folder / "val.bin").write_bytes(written(val))
        run = trainer(*flags, "--train-data", f"{name}_*.bin", "--val-data", "val.bin", data=False,
                      checkpoint=f"{name}.pt")
        assert run.losses() == of_text.losses(), run.err
        for step in (0, 6):
            assert run.rows[step]["val/bits_per_byte"] == of_text.rows[step]["val/bits_per_byte"]

    found = [zygote.run([sys.executable, ROOT / "evaluate.py", "--checkpoint-path", "c.pt", "--data", path],
                        trainer.folder, environment()) for path in ("val.bin", prepared / "val.txt")]
    assert found[0].returncode == found[1].returncode == 0, found[0].stderr + found[1].stderr
    assert "bits per byte" in found[0].stdout and found[0].stdout == found[1].stdout


def test_ids_of_32_bits_and_a_file_longer_than_a_block(tmp_path):
    ids = np.random.default_rng(0).integers(0, 128_256, 70_000)
    (tmp_path / "a.bin").write_bytes(llm_c(ids, 20240801, 7, np.uint32))
    assert np.concatenate(list(read_token_file(tmp_path / "a.bin"))).tolist() == ids.tolist()
    (tmp_path / "b.bin").write_bytes(nanogpt(ids % 50_257))
    assert np.concatenate(list(read_token_file(tmp_path / "b.bin"))).tolist() == (ids % 50_257).tolist()


@pytest.mark.parametrize("name", ["bpe", "byte", "char"])  # char: not byte-level, and so decoded
def test_bytes_of_a_token_file_are_those_of_its_text(text, name):
    parts = [text.read_text()[:5_000], "ein Geräusch, 音 und 🎵\n" * 20, "\x00\t", "end"]
    tokenizer = load_tokenizer(name) or train_tokenizer(name, parts, 400)
    tokenizer.add_tokens(["Geräusch"])  # not a special token, and so text
    ids = np.array(encode(tokenizer, ["<|endoftext|>".join(parts)])[0], np.uint16)
    assert tokenizer.token_to_id("<|endoftext|>") in ids and tokenizer.token_to_id("Geräusch") in ids
    size = len("".join(parts).encode())
    assert count_bytes(tokenizer, [ids]) == [size]
    if name != "char":  # cut anywhere, within characters, too
        assert sum(count_bytes(tokenizer, np.array_split(ids, 997))) == size


WRONG = {
    "cut off": (llm_c(range(100))[:-2], {}, "1,222 bytes are not the 100 tokens that its header says"),
    "odd": (b"abc", {}, "--train-data {file}: 3 bytes cannot be 16-bit token ids"),
    "of 32 bits": (np.arange(300, dtype=np.int32).tobytes(), {}, "{file}: its ids seem to have 32 bits each"),
    "ours, cut off": (MAGIC + bytes(HEADER.size), {}, "{file}: not of format 1, or not as long as its header says"),
    "empty": (b"", {}, "the file is empty"),
    "of a larger vocabulary": (nanogpt([65_000] * 100), {}, "none of the tokenizer's 300 tokens has the id 65,000"),
    "no tokenizer": (nanogpt(range(100)), {"tokenizer_name": "bpe"}, "bpe: name the tokenizer that made"),
    "nothing to validate on": (nanogpt(range(100)), {"val_data": []}, "give --val-data, too"),
}


def test_several_folders_of_token_shards_are_one_corpus(trainer, prepared, cache):
    """Each has the tokens of one document; with weights, as with their texts."""
    texts = {}
    for split in ("train", "val"):
        for part, document in enumerate((prepared / f"{split}.txt").read_text().split("<|endoftext|>")):
            texts[split, part] = trainer.folder / f"{split}{part}.txt"
            texts[split, part].write_text(document)
    flags = ["--num-steps", 4, "--log-steps", 2, "--eval-tokens", 0, "--cache-dir", cache, "--tokenizer-name",
             prepared / "tokenizer", "--train-weights", 0.3, 0.7]
    of_texts = trainer(*flags, "--train-data", texts["train", 0], texts["train", 1], "--val-data", texts["val", 0],
                       texts["val", 1], data=False)
    for part in range(2):
        shards = prepare(DataConfig(train_data=[str(texts["train", part])], val_data=[str(texts["val", part])],
                                    tokenizer_name=str(prepared / "tokenizer"), cache_dir=str(cache)))
        shutil.copytree(shards, trainer.folder / f"part{part}")
    folders = ["--train-data", "part0", "part1", "--val-data", "part0", "part1"]
    run = trainer(*flags, *folders, "--tokenizer-name", "part1/tokenizer", data=False, checkpoint="shards.pt")
    assert of_texts.code == run.code == 0 and run.losses() == of_texts.losses(), run.err
    assert run.rows[4]["val/loss/part0"] == of_texts.rows[4]["val/loss/val0"]
    for name, says in ("byte", "made the tokens of part0/train.bin, such as part0/tokenizer"), ("part0/tokenizer", ""):
        refused = trainer(*flags, *folders[:3], *folders[3:] * bool(says), "--tokenizer-name", name, data=False,
                          checkpoint="x.pt")
        assert refused.code == 2 and (says or "give the folders as --val-data, too") in refused.err, refused.err
    found = [zygote.run([sys.executable, ROOT / "evaluate.py", "--checkpoint-path", "c.pt", "--data", *paths],
                        trainer.folder, environment()).stdout
             for paths in (["part0", "part1"], [texts["val", 0], texts["val", 1]])]
    assert "bits per byte on part1" in found[0] and found[0].splitlines()[:3] == found[1].splitlines()[:3]
    with open(trainer.folder / "part1" / "train.bin", "r+b") as file:
        file.seek(HEADER.size + 200)
        file.write(bytes(8))
    damaged = trainer(*flags, *folders, "--tokenizer-name", "part0/tokenizer", data=False, checkpoint="x.pt")
    assert damaged.code == 2 and "part1/train.bin is damaged" in damaged.err, damaged.err
    (trainer.folder / "part1" / "val.bin").unlink()
    with pytest.raises(UserError, match="--val-data .*part1: a folder of token shards without val.bin"):
        find_sources([str(trainer.folder / "part1")], "--val-data")


def test_a_folder_of_nanogpts_beside_another_path_is_read_as_text(tmp_path):
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (tmp_path / name).write_bytes(nanogpt(range(100)))
    (tmp_path / "input.txt").write_text("text")
    assert [source.path for source in find_sources([str(tmp_path)])] == [str(tmp_path / "input.txt")]


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_token_file_is_refused(tmp_path, prepared, case):
    content, changes, words = WRONG[case]
    (tmp_path / "a.bin").write_bytes(content)
    given = dict(train_data=[str(tmp_path / "a.bin")], val_data=[str(prepared / "val.txt")], seq_len=32,
                 tokenizer_name=str(prepared / "tokenizer"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError) as error:
        prepare(DataConfig(**given | changes))
    assert words.format(file=tmp_path / "a.bin") in str(error.value) and not (tmp_path / "cache").exists()


def test_a_folder_of_nanogpts_says_how_to_name_its_files(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(nanogpt(range(100)))
    with pytest.raises(UserError, match=f"{tmp_path}/train.bin and {tmp_path}/val.bin$"):
        prepare(DataConfig(train_data=[str(tmp_path)], cache_dir=str(tmp_path / "cache")))


def test_a_shard_in_another_process_reads_its_own_file(tmp_path):
    writer = ShardWriter(tmp_path / "train.bin", 100, None, bytes(32))
    writer.write(range(100))
    writer.close()
    whole = Shard(tmp_path / "train.bin")
    parts = pickle.loads(pickle.dumps([whole.part(5, 20), whole.part(25, 20)]))  # as for a DataLoader's workers
    with open(__file__) as other:
        os.dup2(other.fileno(), whole.fd)  # a file with this number there
    assert [part.read(0, 3).tolist() for part in parts] == [[5, 6, 7], [25, 26, 27]]
    assert parts[0].fd is parts[1].fd
    for shard in whole, parts[0]:
        os.close(shard.fd)


def test_tokens_that_a_network_does_not_give_now_are_not_called_damaged(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path / "train.bin", 100, None, bytes(32))
    writer.write(range(100))
    writer.close()
    shard = Shard(tmp_path / "train.bin")

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "pread", stale)
    for read in lambda: Shard(tmp_path / "train.bin"), lambda: shard.read(0, 3):
        with pytest.raises(UserError, match="train.bin cannot be read now .Stale file handle.; try again"):
            read()
    os.close(shard.fd)
