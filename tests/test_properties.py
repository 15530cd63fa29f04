"""Whatever is put in: correct work, or one line that says what is wrong. Here in-process, on inputs made up by the
hundred; MINI_LLM_EXAMPLES=50 makes fifty times as many."""

import datetime
import io
import json
import os
import shutil
import zipfile

import pytest
import torch
from conftest import PUT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_config import Car

import evaluate
import generate
import train
from data import Corpus, DataConfig
from mini_llm import archive as archive_module
from mini_llm.archive import DamagedCheckpoint
from mini_llm.config import flag, flag_fields, parse, to_toml
from mini_llm.errors import UserError
from mini_llm.shards import HEADER, Shard
from mini_llm.text import text_pieces
from mini_llm.tokenizer import END_OF_TEXT, open_tokenizer


def examples(n):
    """The same on every machine, so that a failure is one of the code that was changed."""
    return settings(max_examples=n * int(os.environ.get("MINI_LLM_EXAMPLES", "1")), derandomize=True, deadline=None,
                    database=None, suppress_health_check=list(HealthCheck))


def one_line(call, *args):
    """What the call returns, or None where it refused in one line that can be printed."""
    try:
        return call(*args)
    except UserError as error:
        assert str(error) and str(error).isprintable() and len(str(error)) < 3000
        return None


def scratch(folder):
    """An empty folder for one example."""
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    (folder / "scratch").mkdir()
    return folder / "scratch"


# Flags and TOML

PROGRAMS = [Car, train.Config, generate.Config, evaluate.Config]
ODD = ["", "-1", "0", "1", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 5000, "0x10", "1_0", "١٢", "½", "\0",
       "\ud800", "\udcff", "a\nb", "\x1b[31m", "\x7f", "\u2028", "--", "-", "=", "..", "/", "~", "a" * 5000, "true",
       "None", "9223372036854775808", "*", "[", "**/**", "{}", "%s", "%(prog)s", "qwen3", "auto", "1.0", "latest"]
VALUES = st.sampled_from(ODD) | st.text(st.characters(), max_size=20)


@st.composite
def argvs(draw):
    cls = draw(st.sampled_from(PROGRAMS))
    names = [flag(name) for name in flag_fields(cls)]
    word = st.sampled_from(names) | st.sampled_from(names).map(lambda name: "--no-" + name[2:]) | VALUES \
        | st.builds("{}={}".format, st.sampled_from([*names, "--config"]), VALUES) \
        | st.builds("{}{}".format, st.sampled_from(names), VALUES) \
        | st.sampled_from(names).map(lambda name: name.replace("-", "_")[2:].join(["--", ""]))
    return cls, [one for one in draw(st.lists(word, max_size=6)) if one not in ("-h", "--help")]


def parse_and_back(cls, argv, folder):
    cfg = one_line(parse, cls, argv)
    if cfg is not None:
        file = folder / "back.toml"
        file.write_text(to_toml(cfg), "utf-8")
        assert parse(cls, ["--config", str(file)]) == cfg
    return cfg


@examples(400)
@given(argvs())
@example((train.Config, ["--train-data", "a\x7fb", "--tokenizer-name", ""]))
@example((train.Config, ["--config="]))
def test_flags_of_any_kind_are_refused_in_a_line_or_survive_a_round_trip(tmp_path_factory, argv):
    parse_and_back(*argv, tmp_path_factory.getbasetemp())


def toml(value):
    """Any Python value as TOML, as strictly as TOML has it and no more so."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, str):
        return json.dumps(value).replace("\x7f", "\\u007f")
    return hex(value) if isinstance(value, int) and value >= 1 << 64 else str(value).lower()


TOML_VALUES = st.recursive(
    st.booleans() | st.integers() | st.integers(1 << 63, 1 << 40_000) | st.floats() | st.dates() | st.datetimes()
    | st.times() | st.text(max_size=10) | st.sampled_from([text for text in ODD if text.isascii()]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)


@st.composite
def toml_tables(draw):
    cls = draw(st.sampled_from(PROGRAMS))
    fields = flag_fields(cls)
    sections = [f"[{name}]" for name in {group for group, _, _ in fields.values()}] + ["[other]", "[[model]]", "[a.b]"]
    lines = st.builds("{} = {}".format, st.sampled_from(list(fields)) | st.text(max_size=5).map(json.dumps),
                      TOML_VALUES.map(toml)) | st.sampled_from(sections)
    return cls, "\n".join(draw(st.lists(lines, max_size=5))).encode("utf-8", "replace")


@examples(400)
@given(toml_tables() | st.tuples(st.sampled_from(PROGRAMS), st.binary(max_size=60)))
@example((Car, b"cylinders = " + b"9" * 5000))
@example((Car, b"cylinders = 0x1" + b"0" * 5000))
@example((Car, b"stops = [0x1" + b"0" * 5000 + b"]"))
@example((Car, b"stops = " + b"[" * 100_000))
@example((Car, b"stops = [1979-05-27, {a = 1}]"))
@example((train.Config, b'checkpoint_path = "a\\u0000b"'))
def test_toml_of_any_kind_is_refused_in_a_line_or_survives_a_round_trip(tmp_path_factory, case):
    cls, content = case
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.toml").write_bytes(content)
    parse_and_back(cls, ["--config", str(folder / "any.toml")], folder)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path),
                                  lambda path: os.symlink(path, path)])
def test_a_config_that_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "c.toml")
    with pytest.raises(UserError, match="c.toml"):
        parse(Car, ["--config", str(tmp_path / "c.toml")])


# Text

TEXTS = st.lists(st.sampled_from([
    b"a", b"word ", b"\n", b"\r\n", b"\r", b"\0", b"\xef\xbb\xbf", b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98\x80",
    b"\xed\xa0\x80", b"\xc0\x80", b"\x80" * 9, b"\xc2\x85", b"\xe2\x80\xa8", b" " * 40, b"x" * 300, b"<|endoftext|>",
    b"<|endo", b"ftext|>", b"line\n" * 30, "é漢字\u0301".encode()]) | st.binary(max_size=8), max_size=40).map(b"".join)
LONG = st.builds(lambda part, n: (part * n)[:200_000], TEXTS, st.just(5000))


@pytest.mark.parametrize("name", ["byte", "char"])
@examples(150)
@given(content=TEXTS | LONG)
@example(content=b"\n" * 5000)
@example(content=b"\xef\xbb\xbf" + b"x" * 2_500_000 + "é".encode() * 300_000)
@example(content=b"<|endoftext|>")
@example(content=b"a" * 100 + b"<|endoftext|>" + b"b" * 9)
@example(content=b"a" * ((1 << 20) - 5) + b"<|endoftext|>" + b"b" * 100_000)
def test_the_tokens_of_any_text_give_it_back(tmp_path_factory, name, content):
    """As the README says: documents in order, each followed by the end-of-text token; what is not UTF-8 is U+FFFD."""
    folder = scratch(tmp_path_factory.getbasetemp())
    (folder / "any.txt").write_bytes(content)
    corpus = one_line(Corpus, DataConfig(train_data=[str(folder / "any.txt")], cache_dir=str(folder / "cache"),
                                         tokenizer_name=name, seq_len=1))
    if corpus is None:
        assert list(folder.iterdir()) == [folder / "any.txt"], "something was left in the cache"
        return
    tokenizer = open_tokenizer(corpus.folder / "tokenizer")
    found = "".join(tokenizer.decode(shard.read(0, shard.count).tolist(), skip_special_tokens=False)
                    for shard in (corpus.train, corpus.val))
    want = content.decode("utf-8-sig", "replace")
    documents = [document for document in want.split(END_OF_TEXT) if document]
    assert found.endswith(END_OF_TEXT)
    # Where the validation text begins, a document of one file is cut in two.
    assert found.replace(END_OF_TEXT, "") == "".join(documents)
    assert len(documents) <= found.count(END_OF_TEXT) <= len(documents) + 1


@examples(200)
@given(TEXTS, st.integers(0, 12))
def test_a_text_cut_anywhere_at_a_character_is_read_whole(tmp_path_factory, content, cut):
    """BOM, CRLF and broken bytes included: nothing is lost or read twice between the two parts of a file."""
    file = tmp_path_factory.getbasetemp() / "cut.txt"
    content = content.replace(b"\xef\xbb\xbf", b"") + b"\n" + content
    file.write_bytes(content)
    at = content.index(b"\n") + 1
    parts = [text for span in ((0, at), (at, len(content))) for text, _ in text_pieces(file, *span)]
    assert "".join(parts) == content.decode("utf-8", "replace").replace(END_OF_TEXT, "")


@examples(60)
@given(st.lists(st.recursive(st.none() | st.booleans() | st.floats() | st.text(st.characters(), max_size=9),
                             lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
                             max_leaves=3), max_size=4) | st.binary(max_size=40),
       st.sampled_from(["jsonl", "parquet", "json"]))
@example([{"text": "\ud800"}] * 9, "jsonl")
@example([{"text": 5}] * 9, "jsonl")
@example([{"text": "some words"}] * 9 + [{"text": None}, None], "jsonl")
@example([None, {"text": "a"}], "jsonl")
@example([[]] * 3, "jsonl")
def test_tables_of_any_kind_are_refused_in_a_line_or_read(tmp_path_factory, rows, kind):
    folder = scratch(tmp_path_factory.getbasetemp())
    file = folder / f"[any]*.{kind}"  # a name, and no pattern
    file.write_bytes(rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode())
    one_line(Corpus, DataConfig(train_data=[str(file)], cache_dir=str(folder / "cache"), tokenizer_name="byte",
                                seq_len=1))


# Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    (folder / "a.txt").write_text("some words in a row\n" * 40)
    return Corpus(DataConfig(train_data=[str(folder / "a.txt")], cache_dir=str(folder / "cache"), seq_len=8,
                             tokenizer_name="byte")).folder


def everything(folder):
    """All that a run reads of a folder of shards; None where it is refused."""
    corpus = one_line(Corpus, DataConfig(train_data=[str(folder)], seq_len=8))
    return corpus and (corpus.train.read(0, corpus.train.count).tolist(), corpus.val_bytes_per_token, corpus.eos,
                       corpus.val.read(0, corpus.val.count).tolist(), corpus.vocab_size, corpus.meta["tokenizer_hash"],
                       [[x.tolist() for _, x, _, _ in corpus.val_batches(0, 4)]])


DAMAGE = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 10_000)), st.tuples(st.just("flip"), st.integers(0, 1 << 20)),
    st.tuples(st.just("zero"), st.integers(0, 1 << 12)), st.tuples(st.just("more"), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("other"), st.binary(max_size=200)))


def damaged(content, damage):
    kind, how = damage
    if kind == "cut":
        return content[:how % len(content)]
    if kind == "flip":
        at, bit = how // 8 % len(content), how % 8
        return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:]
    if kind == "zero":  # as a disk leaves what it had not written yet
        return content[:how % len(content)] + bytes(len(content) - how % len(content))
    return content + how if kind == "more" else how


@examples(300)
@given(name=st.sampled_from(["train.bin", "val.bin"]), damage=DAMAGE)
@example(name="train.bin", damage=("flip", 8 * 12))  # bytes an id
@example(name="val.bin", damage=("flip", 8 * HEADER.size + 3))
def test_a_damaged_shard_is_refused_or_gives_the_same(tmp_path_factory, shards, name, damage):
    folder = scratch(tmp_path_factory.getbasetemp()) / "s"
    shutil.copytree(shards, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(damaged(content, damage))
    assert everything(folder) is None or damaged(content, damage) == content


META = st.recursive(st.none() | st.booleans() | st.integers(-9, 1 << 70) | st.floats() | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["train", "val", "a"]), inner, max_size=3), max_leaves=4)


@examples(300)
@given(st.dictionaries(st.sampled_from(["tokens", "bytes", "vocab_size", "eos", "tokenizer", "tokenizer_hash",
                                        "entropy_rate", "val_sources", "fingerprint"]), META, min_size=1, max_size=2)
       | META | DAMAGE)
@example([])
@example({"val_sources": {"a": [0, 1 << 62]}})
@example({"val_sources": {"a": [-1, 5]}})
@example({"bytes": {"train": 1, "val": 1}, "tokens": {"train": 1, "val": 0}})
@example(("other", b"[" * 100_000))
def test_a_foreign_meta_json_is_refused_in_a_line_or_does_no_harm(tmp_path_factory, shards, meta):
    folder = scratch(tmp_path_factory.getbasetemp()) / "s"
    shutil.copytree(shards, folder)
    content = (folder / "meta.json").read_bytes()
    if isinstance(meta, tuple):
        (folder / "meta.json").write_bytes(damaged(content, meta))
    else:
        (folder / "meta.json").write_text(json.dumps(json.loads(content) | meta if isinstance(meta, dict) else meta))
    everything(folder)


@pytest.mark.parametrize("put", PUT)
@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_what_is_no_file_is_not_waited_for(tmp_path, shards, name, put):
    folder = tmp_path / "s"
    shutil.copytree(shards, folder)
    (folder / name).unlink()
    PUT[put](folder / name)
    if name != "train.bin":
        assert everything(folder) is None
    assert one_line(Shard, folder / name) is None


# Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "c.pt"
    archive_module.save(file, {"format": 1, "w": torch.arange(50.0), "n": 7, "name": "x", "config": {"a": [1]}})
    return file.read_bytes()


def archive(**files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as target:
        for name, text in files.items():
            target.writestr(name, text)
    return content.getvalue()


@examples(400)
@given(DAMAGE)
@example(("flip", -8))
@example(("other", b"PK\x05\x06" + bytes(18)))
@example(("other", archive(data="x", version="3")))
@example(("other", b"plain text\n"))
@example(("other", archive(data="x") + b"sha256:" + b"0" * 64))
def test_a_damaged_checkpoint_is_refused_in_a_line_or_gives_the_same(tmp_path_factory, saved, damage):
    file = tmp_path_factory.getbasetemp() / "damaged.pt"
    file.write_bytes(damaged(saved, damage))
    try:
        found = archive_module.load(file)
    except DamagedCheckpoint as error:
        assert str(file) in str(error) and "\n" not in str(error)
        return
    assert torch.equal(found["w"], torch.arange(50.0)) and (found["n"], found["config"]) == (7, {"a": [1]})


def test_every_length_short_of_the_whole_is_refused(tmp_path, saved):
    for length in range(0, len(saved), 7):
        (tmp_path / "c.pt").write_bytes(saved[:length])
        with pytest.raises(DamagedCheckpoint):
            archive_module.load(tmp_path / "c.pt")


@pytest.mark.parametrize("put", PUT)
def test_a_checkpoint_that_is_no_file_is_not_waited_for(tmp_path, put):
    PUT[put](tmp_path / "c.pt")
    with pytest.raises(DamagedCheckpoint):
        archive_module.load(tmp_path / "c.pt")
