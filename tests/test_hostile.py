"""Files made to do harm, or put where others belong: nothing of them is run, nothing waits for them, and nothing beside
what was named is read or written. One line says what is wrong, or the work is right."""

import contextlib
import filecmp
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
import zygote
from conftest import PEAK_MB, PUT, ROOT, SHARED, TINY, environment

import evaluate
import export
import generate
import report
import train
import wandb_tools
from data import Corpus, DataConfig, prepare
from mini_llm import archive, resume, token_cache
from mini_llm.config import parse
from mini_llm.errors import UserError
from mini_llm.files import tokenizer_files
from mini_llm.pretrained import load_initial, resolve_init
from mini_llm.text import find_sources
from mini_llm.tokenizer import load_tokenizer, open_tokenizer

pytestmark = pytest.mark.timeout(120)  # what hangs fails


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(program, *flags)` runs its main in this process: (exit code, stderr, stdout)."""
    def call(program, *flags):
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, flags)])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        capsys.readouterr()
        try:
            program.main()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        captured = capsys.readouterr()
        return code, captured.err, captured.out

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as `finished` was trained: sums in another order would be other weights
    yield call
    torch.set_num_threads(before)


def refused(outcome, *words):
    code, err, _ = outcome
    assert code == 2 and len(err.strip().splitlines()) == 1 and err.startswith("error: "), err
    assert all(word in err for word in words), err


# Checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text, cache):
    """The folder and flags of a run of 12 steps: c.pt is of the last, c.prev.pt of the eighth."""
    folder = tmp_path_factory.mktemp("finished")
    flags = [*TINY, "--train-data", text, "--cache-dir", cache, "--num-steps", 12, "--save-steps", 4, "--eval-steps", 0]
    done = zygote.run([sys.executable, ROOT / "train.py", *flags, "--checkpoint-path", "c.pt"], folder, environment())
    assert done.returncode == 0, done.stderr
    return folder, flags


@pytest.fixture
def again(finished, tmp_path):
    """A copy of that run: its folder, and the flags that go on with it."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, [*finished[1], "--checkpoint-path", tmp_path / "c.pt"]


def weights(file):
    return torch.load(file, weights_only=True)["model"]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Evil:
    """Pickled, it makes a file when it is loaded by what runs code."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def evil(kind, file, marker):
    thing = {"format": resume.FORMAT, "model": Evil(marker), "config": {}, "identity": {}, "state": {}}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(thing))
    elif kind == "signed":
        archive.save(file, thing)
    else:
        torch.save(thing, file, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy", "signed"])
def test_no_program_runs_the_code_of_a_checkpoint(run, again, kind):
    folder, flags = again
    marker, file = folder / "ran", folder / "evil.pt"
    evil(kind, file, marker)
    for program, more in ((generate, []), (evaluate, []), (export, ["--output", folder / "out"])):
        refused(run(program, "--checkpoint-path", file, *more), "evil.pt")
    refused(run(train, *flags, "--checkpoint-path", folder / "new.pt", "--init-from", file), "--init-from", "evil.pt")
    refused(run(train, *flags, "--checkpoint-path", folder / "new.pt", "--resume", file), "--resume", "evil.pt")
    for name in ("c.pt", "c.prev.pt"):
        shutil.copy(file, folder / name)
    refused(run(train, *flags, "--resume"), "c.pt is ", "c.prev.pt is ")
    assert not marker.exists() and not (folder / "out").exists() and not (folder / "new.pt").exists()
    with contextlib.suppress(RuntimeError):  # of the plain pickle, once it has run
        torch.load(file, weights_only=False)
    assert marker.exists(), "it would not have run anywhere"


def in_the_place_of(file, kind):
    content = file.read_bytes()
    file.unlink()
    if kind in PUT:
        PUT[kind](file)
    elif kind in ("pickle", "signed"):
        evil(kind, file, file.parent / "ran")
    elif kind == "another archive":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("data.pkl", "x")
    else:
        file.write_bytes({"half": content[:len(content) // 2], "empty": b"", "text": b"not a checkpoint\n",
                          "zeros": bytes(len(content)), "random": random.Random(1).randbytes(5000),
                          "a bit": content[:9999] + bytes([content[9999] ^ 1]) + content[10_000:]}[kind])


DAMAGED = ["half", "empty", "a bit", "zeros", "random", "text", "another archive", "pickle", "signed", "a pipe",
           "a device", "nothing"]


@pytest.mark.parametrize("kind", DAMAGED)
def test_whatever_is_in_place_of_the_newest_the_one_before_ends_as_if_it_had_not_been(run, finished, again, kind):
    folder, flags = again
    in_the_place_of(folder / "c.pt", kind)
    code, err, out = run(train, *flags, "--resume")
    assert code == 0 and "falling back to" in out and "c.prev.pt" in out and "Resumed at step 8" in out, out + err
    assert equal(weights(folder / "c.pt"), weights(finished[0] / "c.pt")) and not (folder / "ran").exists()


def test_a_dry_run_says_so_and_mends_nothing(run, again):
    folder, flags = again
    in_the_place_of(folder / "c.pt", "half")
    before = (folder / "c.pt").read_bytes()
    code, err, out = run(train, *flags, "--resume", "--dry-run")
    assert code == 0 and "falling back to" in out and (folder / "c.pt").read_bytes() == before, out + err


@pytest.mark.parametrize("kind", DAMAGED)
def test_without_one_before_it_is_refused_and_left_as_it_is(run, again, kind):
    folder, flags = again
    in_the_place_of(folder / "c.pt", kind)
    if kind == "nothing":
        in_the_place_of(folder / "c.prev.pt", "half")
        refused(run(train, *flags, "--resume"), "c.prev.pt is", "--overwrite")
        return
    (folder / "c.prev.pt").unlink()
    before = sorted(folder.rglob("*"))
    refused(run(train, *flags, "--resume"), "c.pt is", "--overwrite")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("put", ["a folder", "a circle"])
def test_a_folder_in_its_place_is_refused_and_a_circle_of_links_replaced(run, again, put):
    folder, flags = again
    in_the_place_of(folder / "c.pt", put)
    if put == "a folder":
        refused(run(train, *flags, "--resume"), "c.pt: is a folder")
    else:
        code, err, out = run(train, *flags, "--resume")
        assert code == 0 and "Resumed at step 8" in out, out + err


def test_the_one_before_of_another_run_is_refused_by_its_name(run, again):
    folder, flags = again
    saved = torch.load(folder / "c.prev.pt", weights_only=True)
    saved["identity"]["the training data"] = "another's"
    archive.save(folder / "c.prev.pt", saved)
    (folder / "c.pt").unlink()
    refused(run(train, *flags, "--resume"), "c.prev.pt is of another run", "the training data is another")
    archive.save(folder / "c.prev.pt", [1, 2])
    refused(run(train, *flags, "--resume"), "c.prev.pt is not a checkpoint")


@pytest.mark.parametrize("change", [
    {"model": {"w": torch.zeros(1)}}, {"config": {}}, {"config": {"n_layers": "two"}}, {"identity": {}}, {"state": []},
    {"config": {"d_model": 1 << 62}}, {"config": {"n_layers": 10**7}}, {"config": {"arch": "../x"}},
    {"state": {"step": "x"}}, {"state": {"more": 1}},
    {"optimizer": {"state": 3}}, {"optimizer": []}, {"meter": {"loss_sum": "x"}}, {"scaler": {"scale": "x"}}], ids=str)
def test_a_signed_checkpoint_of_other_parts_is_refused_in_one_line(run, again, change):
    folder, flags = again
    saved = torch.load(folder / "c.pt", weights_only=True)
    archive.save(folder / "c.pt", saved | {name: part if part in ({}, []) or name == "model" else saved[name] | part
                                              for name, part in change.items()})
    needed = {train: {"model", "identity", "state", "optimizer", "meter"}, generate: {"model", "identity", "config"},
              export: {"model", "identity", "config"}}
    for program, more in ((generate, ["--max-new-tokens", 1]), (export, ["--output", folder / "out"]),
                          (train, [*flags, "--resume"])):
        code, err, _ = run(program, "--checkpoint-path", folder / "c.pt", *more)
        refused = code == 2 and len(err.strip().splitlines()) == 1
        assert refused or code == 0 and not change.keys() & needed[program], err


def test_paths_that_a_checkpoint_names_are_neither_read_nor_written(run, finished, again):
    folder, flags = again
    (folder / "outside").mkdir()
    os.mkfifo(folder / "outside" / "pipe.txt")
    saved = torch.load(folder / "c.prev.pt", weights_only=True)
    names = dict.fromkeys(("checkpoint_path", "cache_dir", "wandb_dir", "resume"), str(folder / "outside" / "c.pt"))
    saved["config"] |= names | {name: [str(folder / "outside" / "pipe.txt")] for name in ("train_data", "val_data")}
    archive.save(folder / "c.pt", saved)
    code, err, out = run(train, *flags, "--resume")
    assert code == 0 and "Resumed at step 8" in out, out + err
    assert equal(weights(folder / "c.pt"), weights(finished[0] / "c.pt"))
    for tokens in (str(folder / "outside"), ["a", 1], "a\0b", None):
        archive.save(folder / "c.pt", saved | dict(tokens=tokens))
        code, err, out = run(train, *flags, "--resume")
        assert code == 0 and "Resumed at step 8" in out, out + err
        archive.save(folder / "c.pt", saved | dict(tokens=tokens))
        refused(run(evaluate, "--checkpoint-path", folder / "c.pt"), "--data is missing")
    saved["config"]["val_data"] = ["$(touch ran)", "a;b"]
    archive.save(folder / "c.pt", saved | dict(tokens=""))
    refused(run(evaluate, "--checkpoint-path", folder / "c.pt"), "such as the run's '$(touch ran)' 'a;b'")
    assert run(generate, "--checkpoint-path", folder / "c.pt", "--max-new-tokens", 1)[0] == 0
    assert run(export, "--checkpoint-path", folder / "c.pt", "--output", folder / "out")[0] == 0
    assert os.listdir(folder / "outside") == ["pipe.txt"]


def test_links_and_pipes_beside_a_checkpoint_lead_nowhere(run, again):
    """A run that came as an archive, of someone who has put links and pipes under its files' names."""
    folder, flags = again
    (folder / "outside.txt").write_text("mine\n")
    for name in ("c.log", "c.tokenizer/notes.json"):
        (folder / name).unlink(missing_ok=True)
        os.symlink(folder / "outside.txt", folder / name)
    (folder / "c.metrics.jsonl").unlink()
    os.mkfifo(folder / "c.metrics.jsonl")
    os.mkfifo(folder / "c.wandb.json")
    assert "c.wandb.json: damaged" in line_of(wandb_tools.memories, folder / "c.pt")
    assert run(export, "--checkpoint-path", folder / "c.pt", "--output", folder / "out")[0] == 0
    assert not (folder / "out" / "notes.json").exists()
    refused(run(report, folder), "is a folder without runs")
    code, err, out = run(train, *flags, "--resume", "--num-steps", 13, "--use-wandb", "--wandb-mode", "disabled")
    assert code == 0 and "Resumed at step 12" in out, out + err
    assert (folder / "outside.txt").read_text() == "mine\n" and "Resumed at step 12" in (folder / "c.log").read_text()
    (folder / "c.log").unlink()
    os.mkfifo(folder / "c.log")
    code, err, out = run(train, *flags, "--resume", "--num-steps", 14)
    assert code == 0 and "Resumed at step 13" in (folder / "c.log").read_text(), out + err


def test_shards_of_others_beside_the_runs_own_are_passed_over(run, again, tmp_path):
    folder, _ = again
    saved = torch.load(folder / "c.pt", weights_only=True)
    saved["config"]["cache_dir"] = str(folder / "cache")
    archive.save(folder / "c.pt", saved | dict(tokens=str(folder / "cache" / "a")))
    for name, content in (("a", "[]"), ("b", ""), ("c", '{"fingerprint": 1}')):
        (folder / "cache" / name).mkdir(parents=True)
        (folder / "cache" / name / "meta.json").write_text(content)
    (folder / "cache" / "d").mkdir()
    os.mkfifo(folder / "cache" / "d" / "meta.json")
    refused(run(evaluate, "--checkpoint-path", folder / "c.pt"), "--data is missing")


# Weights and tokenizers of others


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    import transformers

    config = transformers.GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    folder = tmp_path_factory.mktemp("gpt2")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def theirs(gpt2_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Path(shutil.copytree(gpt2_folder, tmp_path / "theirs"))


def start_from(folder):
    cfg = parse(train.Config, ["--init-from", str(folder), "--tokenizer-name", "byte", "--seq-len", "32"])
    cfg.model, cfg.init, cfg.data = resolve_init(cfg, None)
    raw = train.GPT(cfg.model)
    load_initial(raw, None, cfg.init, {}, train.World(cfg))
    return raw


def line_of(call, *args):
    """What the UserError says that the call raises."""
    with pytest.raises(UserError) as error:
        call(*args)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("name", ["../secret.safetensors", "{outside}/secret.safetensors",
                                  "a/../../secret.safetensors"])
def test_an_index_loads_nothing_outside_of_its_folder(theirs, name):
    assert start_from(theirs)
    outside = theirs.parent
    (theirs / "model.safetensors").rename(outside / "secret.safetensors")
    (theirs / "other.safetensors").write_bytes((outside / "secret.safetensors").read_bytes())
    name = name.format(outside=outside)
    keys = ["transformer.wte.weight", "transformer.wpe.weight"]
    (theirs / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
    assert f"names {name}" in line_of(start_from, theirs)
    for content in ("[]", "", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (theirs / "model.safetensors.index.json").write_text(content)
        assert "model.safetensors.index.json is damaged" in line_of(start_from, theirs)


def test_what_macos_leaves_in_a_folder_is_none_of_its_files(theirs):
    """Beside each file on a disk of another system, and in archives, what such a disk has no place for: ._NAME."""
    for name in ("model.safetensors.index.json", "model.safetensors", "tokenizer.json"):
        (theirs / f"._{name}").write_bytes(b"\x00\x05\x16\x07")
    (theirs / ".DS_Store").write_bytes(b"names of other files")
    assert start_from(theirs) and not [file for file in tokenizer_files(theirs) if file.name[0] == "."]
    (theirs / "model.safetensors").unlink()
    assert "no config.json with *.safetensors there" in line_of(start_from, theirs)


@pytest.mark.parametrize("put", PUT)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_what_is_no_file_in_a_folder_of_weights_is_not_waited_for(theirs, name, put):
    (theirs / name).unlink(missing_ok=True)
    PUT[put](theirs / name)
    if (name, put) != ("model.safetensors.index.json", "nothing"):
        assert "--init-from" in line_of(start_from, theirs)


CODE = "import os\nos.mkdir({marker!r})\nclass Evil:\n    pass\n"


def test_code_in_a_folder_of_weights_is_not_run(theirs, tmp_path):
    marker = tmp_path / "ran"
    (theirs / "evil.py").write_text(CODE.format(marker=str(marker)))
    auto = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")}
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | auto))
    line = None
    try:
        start_from(theirs)  # it is a GPT-2, whatever more it offers
    except UserError as error:
        line = str(error)
    assert line is None or "auto_map" in line
    for name in ("attn_implementation", "_attn_implementation"):  # a kernel of the Hub, which transformers would run
        (theirs / "config.json").write_text(json.dumps(config | {name: "someone/kernel"}))
        assert "attn_implementation is someone/kernel" in line_of(start_from, theirs)
    (theirs / "config.json").write_text(json.dumps(config | auto | {"model_type": "evil"}))
    assert "--init-from" in line_of(start_from, theirs)
    (theirs / "config.json").write_text(json.dumps(config))
    (theirs / "model.safetensors").rename(theirs / "other.safetensors")
    evil("zip", theirs / "pytorch_model.bin", marker)
    assert "--init-from" in line_of(start_from, theirs)
    assert not marker.exists()


def test_code_in_a_tokenizers_folder_is_not_run(run, again, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run the code"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    marker, folder = tmp_path / "ran", tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "evil"}))
    assert "no tokenizer found there" in line_of(load_tokenizer, str(folder))
    own = again[0] / "c.tokenizer"
    (own / "evil.py").write_text(CODE.format(marker=str(marker)))
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    for program, more in ((generate, ["--max-new-tokens", 1]), (export, ["--output", tmp_path / "out"])):
        assert run(program, "--checkpoint-path", again[0] / "c.pt", *more)[0] == 0
    assert not marker.exists()


@pytest.mark.parametrize("put", PUT)
def test_what_is_no_file_in_a_tokenizers_folder_is_not_waited_for(text, tmp_path, put, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "t").mkdir()
    PUT[put](tmp_path / "t" / "tokenizer.json")
    assert "tokenizer" in line_of(load_tokenizer, str(tmp_path / "t"))


@pytest.mark.parametrize("content", [b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"eos_token": [1]}',
                                     b'{"eos_token": {}}'])
def test_a_tokenizer_config_that_is_odd_is_refused_or_does_no_harm(text, tmp_path, content):
    folder = prepare(DataConfig(train_data=[str(text)], tokenizer_name="byte", cache_dir=str(tmp_path / "c")))
    (folder / "tokenizer" / "tokenizer_config.json").write_bytes(content)
    try:
        corpus = Corpus(DataConfig(train_data=[str(text)], tokenizer_name=str(folder / "tokenizer"), seq_len=8,
                                   cache_dir=str(tmp_path / "other")))
        assert corpus.eos == 256
    except UserError as error:
        assert "tokenizer_config.json is damaged" in str(error)
        assert not (tmp_path / "other").exists()


# Numbers


@pytest.mark.parametrize("flags", [["--n-layers", 1 << 62], ["--d-model", 1 << 40], ["--vocab-size", 1 << 62],
                                   ["--max-position-embeddings", 1 << 62], ["--d-ff", 1 << 50],
                                   ["--arch", "qwen3", "--head-dim", 1 << 50],
                                   ["--n-layers", 10_000, "--d-model", 65536]])
def test_a_model_that_no_machine_holds_is_refused_at_once(flags):
    def settled():
        return resolve_init(parse(train.Config, list(map(str, flags))), None)

    assert str(flags[-1]) in line_of(settled)


def test_a_step_and_a_name_that_no_machine_holds_are_refused(run, again):
    folder, flags = again
    refused(run(train, *flags, "--checkpoint-path", folder / "n.pt", "--batch-size", 1 << 50), "--batch-size", "most")
    for length in (240, 300):
        refused(run(train, *flags, "--checkpoint-path", folder / f"{'n' * length}.pt"), "File name too long")


# Texts and caches


@pytest.mark.parametrize("put", ["a pipe", "a device", "a circle"])
def test_a_text_that_is_no_file_is_not_waited_for(tmp_path, put):
    PUT[put](tmp_path / "a.txt")
    for path in (tmp_path / "a.txt", tmp_path, tmp_path / "*.txt", tmp_path / "**" / "*.txt"):
        assert "--train-data" in line_of(find_sources, [str(path)])


def test_links_that_lead_round_in_circles_give_each_file_once(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("text")
    for name in ("one", "two", "sub/three", "sub/four"):  # followed, they are 4 ** 40 folders
        os.symlink(tmp_path, tmp_path / name)
    for pattern in ("", "**/*.txt", "**", "s*/**/*.txt", "**/sub/*"):
        files = [source.path for source in find_sources([str(tmp_path / pattern)])]
        assert files == [str(tmp_path / "sub" / "a.txt")], pattern


def test_two_stars_find_what_they_always_did(tmp_path, monkeypatch):
    import glob

    for name in ("a.txt", "sub/b.txt", "sub/deep/c.md", ".hidden/d.txt", "sub/.e.txt", "x[1]/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)
    for pattern in ("**", "**/*.txt", "sub/**", "*/**/*.md", "./**/b*", f"{tmp_path}/**/*.txt", "sub/**/**.md"):
        want = {os.path.realpath(file) for file in glob.glob(pattern, recursive=True) if os.path.isfile(file)}
        assert {os.path.realpath(source.path) for source in find_sources([pattern])} == want, pattern


def test_a_draft_that_is_a_link_is_not_emptied(tmp_path, text):
    cfg = DataConfig(train_data=[str(text)], tokenizer_name="byte", cache_dir=str(tmp_path / "cache"), seq_len=8)
    folder = prepare(cfg)
    shutil.rmtree(folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    os.symlink(tmp_path / "mine", f"{folder}.draft")
    assert "is a link" in line_of(prepare, cfg)
    assert os.listdir(tmp_path / "mine") == ["letter.txt"]


def test_a_device_or_a_link_beside_shards_is_not_copied(tmp_path, text):
    folder = prepare(DataConfig(train_data=[str(text)], tokenizer_name="byte", cache_dir=str(tmp_path), seq_len=8))
    os.symlink("/dev/zero", folder / "tokenizer" / "vocab.json")
    os.mkfifo(folder / "tokenizer" / "merges.txt")
    os.symlink(text, folder / "tokenizer" / "notes.json")
    Corpus(DataConfig(train_data=[str(folder)], seq_len=8)).export_tokenizer(tmp_path / "copy")
    assert sorted(os.listdir(tmp_path / "copy")) == ["tokenizer.json", "tokenizer_config.json"]


def test_of_links_to_a_tokenizers_files_what_they_lead_to_is_copied_and_nothing_else(tmp_path, text):
    """As in a snapshot of the Hub, or where large files are kept elsewhere."""
    folder = prepare(DataConfig(train_data=[str(text)], tokenizer_name="byte", cache_dir=str(tmp_path), seq_len=8))
    for name in "tokenizer.json", "tokenizer_config.json":
        os.rename(folder / "tokenizer" / name, tmp_path / name)
        os.symlink(tmp_path / name, folder / "tokenizer" / name)
    corpus = Corpus(DataConfig(train_data=[str(folder)], seq_len=8))
    corpus.export_tokenizer(tmp_path / "copy")
    for name in "tokenizer.json", "tokenizer_config.json":
        assert not (tmp_path / "copy" / name).is_symlink()
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / name).read_bytes()
    (tmp_path / "tokenizer_config.json").write_text('{"auths": "secret"}')
    corpus.export_tokenizer(tmp_path / "other")
    assert os.listdir(tmp_path / "other") == ["tokenizer.json"]


def test_shards_without_their_tokenizer_do_not_leave_that_of_a_run_before(tmp_path, text):
    def corpus(name):
        folder = prepare(DataConfig(train_data=[str(text)], tokenizer_name=name, cache_dir=str(tmp_path), seq_len=8))
        return folder, Corpus(DataConfig(train_data=[str(folder)], seq_len=8))

    (folder, byte), (_, char) = corpus("byte"), corpus("char")
    char.export_tokenizer(tmp_path / "c.tokenizer")
    shutil.rmtree(folder / "tokenizer")
    byte.export_tokenizer(tmp_path / "c.tokenizer")
    assert not (tmp_path / "c.tokenizer").exists()
    shutil.copytree(char.folder / "tokenizer", tmp_path / "c.tokenizer")
    shutil.rmtree(char.folder / "tokenizer")
    char.export_tokenizer(tmp_path / "c.tokenizer")  # its own, put there by hand
    assert (tmp_path / "c.tokenizer" / "tokenizer.json").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_cache_that_may_not_be_looked_into_is_refused_in_a_line():
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is for its owner alone
        (closed := Path(folder) / "closed").mkdir(mode=0o700)
        (text := Path(folder) / "text.txt").write_text("some text\n" * 1000)
        os.chmod(folder, 0o755)
        cfg = DataConfig(train_data=[str(text)], tokenizer_name="byte", cache_dir=str(closed / "cache"), seq_len=8)
        os.seteuid(65534)
        try:
            assert f"--cache-dir {closed / 'cache'}: Permission denied" in line_of(prepare, cfg)
        finally:
            os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_folder_whose_text_may_not_be_read_is_refused_and_not_left_out():
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is for its owner alone
        (closed := Path(folder) / "closed").mkdir()
        for text in (Path(folder) / "a.txt", closed / "b.txt"):
            text.write_text("some text")
        for concerns_nobody in (".hidden", "lost+found"):
            (Path(folder) / concerns_nobody).mkdir(mode=0o700)
        closed.chmod(0o700)
        os.chmod(folder, 0o755)
        os.seteuid(65534)
        try:
            for path in (folder, closed):
                line = line_of(find_sources, [str(path)])
                assert f"--train-data {closed}" in line and "Permission denied; make it readable" in line
            os.seteuid(0)
            closed.chmod(0o755)
            os.seteuid(65534)
            assert len(find_sources([folder])) == 2
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("limit", [0, 100, 50_000, 200_000])
def test_a_full_disk_while_tokenizing_is_one_line_and_no_cache(tmp_path, text, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    cfg = DataConfig(train_data=[str(text)], tokenizer_name="byte", cache_dir=str(tmp_path / "cache"), seq_len=8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        line = line_of(prepare, cfg)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in line and "--cache-dir" in line and not (tmp_path / "cache").exists()
    assert Corpus(cfg).train.count > 0


PREPARE = ("import sys; sys.path.insert(0, {root!r}); from mini_llm import token_cache; from data import *; "
           "token_cache.SAVE_SECONDS, token_cache.BATCH = 0, 1 << 18; "
           "prepare(DataConfig(train_data=[{text!r}], cache_dir={cache!r}, tokenizer_name='byte'))")


def test_a_preparation_killed_at_any_moment_leaves_nothing_that_is_used(tmp_path, text, monkeypatch):
    """Nor what the next one, which goes on from it, makes otherwise than one that was never killed."""
    monkeypatch.setattr(token_cache, "BATCH", 1 << 18)  # that of the killed ones
    rng, big, cache = random.Random(5), tmp_path / "big.txt", tmp_path / "cache"
    big.write_text(text.read_text() * 60)
    began = time.monotonic()
    whole = prepare(DataConfig(train_data=[str(big)], cache_dir=str(tmp_path / "whole"), tokenizer_name="byte"))
    seconds = time.monotonic() - began
    kills = 0
    while kills < 5:
        process = subprocess.Popen([sys.executable, "-c", PREPARE.format(root=str(ROOT), text=str(big),
                                                                         cache=str(cache))])
        while not list(cache.glob("*.draft")) and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert [path.name for path in cache.iterdir()] in ([f"{whole.name}.draft"], [whole.name])
        if (cache / whole.name).exists():  # it was done before the kill
            shutil.rmtree(cache / whole.name)
    again = prepare(DataConfig(train_data=[str(big)], cache_dir=str(cache), tokenizer_name="byte"))
    files = [str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file()]
    assert list(cache.iterdir()) == [again] and again.name == whole.name
    assert filecmp.cmpfiles(whole, again, files, shallow=False) == (files, [], [])
    assert sorted(files) == sorted(str(file.relative_to(again)) for file in again.rglob("*") if file.is_file())


# Size

TOKENIZE = ("import sys; sys.path.insert(0, sys.argv[1]); from data import *; "
            "c = Corpus(DataConfig(train_data=[sys.argv[2]], cache_dir=sys.argv[3], tokenizer_name=sys.argv[4], "
            f"seq_len=8)); print(c.train.count, c.val.count, {PEAK_MB})")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no peak memory to read here")
@pytest.mark.parametrize("tokenizer, megabytes", [
    ("byte", 10), ("gpt2", 10), ("bpe", 2), pytest.param("byte", 100, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["a line", "a letter"])
def test_one_line_of_any_length_costs_neither_memory_nor_time(tmp_path, tokenizer, megabytes, kind):
    if tokenizer == "gpt2" and not (SHARED / "hf-home").exists():
        pytest.skip("no local Hugging Face cache with gpt2 in it")
    rng = random.Random(1)
    words = " ".join("".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(170_000))
    with open(tmp_path / "line.txt", "w") as file:
        for _ in range(megabytes):
            file.write(words.ljust(1_000_000)[:1_000_000] if kind == "a line" else "a" * 1_000_000)
    size, began = os.path.getsize(tmp_path / "line.txt"), time.monotonic()
    done = subprocess.run([sys.executable, "-c", TOKENIZE, ROOT, tmp_path / "line.txt", tmp_path / "cache", tokenizer],
                          capture_output=True, text=True, env=environment(HF_HOME=str(SHARED / "hf-home")))
    assert done.returncode == 0, done.stderr
    train_count, val_count, peak_mb = map(int, done.stdout.split())
    print(f"{megabytes} MB in {time.monotonic() - began:.1f} s, peak {peak_mb} MB")
    assert peak_mb < 700, "380 as it is, of 10 MB and of 100"
    if tokenizer == "byte":
        assert train_count + val_count == size + 2
    tokens = open_tokenizer(next((tmp_path / "cache").iterdir()) / "tokenizer")
    assert tokens.get_vocab_size() > 256
