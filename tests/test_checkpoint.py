import contextlib
import errno
import hashlib
import math
import os
import pickle
import stat
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import PEAK_MB, ROOT

from mini_llm import archive, checkpoint, files, resume, saver
from mini_llm.archive import DamagedCheckpoint, load, save
from mini_llm.checkpoint import CheckpointConfig, State, plan
from mini_llm.config import flatten, parse
from mini_llm.errors import UserError
from mini_llm.resume import load_latest
from mini_llm.saver import Saver, save_run
from train import Config, World

PAYLOAD = {"model": {"w": torch.arange(1000.0), "b": torch.zeros(3, dtype=torch.bfloat16)}, "step": 7, "name": "x"}


def config(folder, **changes):
    return CheckpointConfig(**dict(checkpoint_path=str(folder / "c.pt")) | changes)


def payload(step):
    return {"step": step, "w": torch.full((100,), float(step))}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    save(tmp_path / "new" / "c.pt", PAYLOAD)
    back = load(tmp_path / "new" / "c.pt")
    assert torch.equal(back["model"]["w"], PAYLOAD["model"]["w"]) and back["step"] == 7
    assert back["model"]["b"].dtype == torch.bfloat16


def test_a_checkpoint_is_plain_torch_and_zip(tmp_path):
    save(tmp_path / "c.pt", PAYLOAD)
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == 7
    with zipfile.ZipFile(tmp_path / "c.pt") as whole_file:
        assert whole_file.testzip() is None and whole_file.comment.startswith(b"sha256:")


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="only Linux names an open file")
def test_to_use_a_model_takes_no_memory_for_its_optimizer(tmp_path):
    path, used = tmp_path / "c.pt", torch.arange(1000.0)
    save(path, dict(used=used, other=torch.ones(75_000_000)))
    code = (f"import os, sys, torch; sys.path.insert(0, {str(ROOT)!r}); from mini_llm import archive\n"
            f"before = {PEAK_MB}\n"
            f"found = archive.load({str(path)!r}, mapped=True); os.replace(sys.argv[1], {str(path)!r})\n"
            f"assert found['used'].equal(torch.arange(1000.0)) and found['other'][-1] == 1, 'replaced meanwhile'\n"
            f"print({PEAK_MB} - before)")
    save(tmp_path / "next.pt", dict(used=used + 1))
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "next.pt"], capture_output=True, text=True)
    assert run.returncode == 0 and int(run.stdout) < 100, run.stderr
    assert load(path, mapped=True)["used"].equal(used + 1)
    path.write_bytes(path.read_bytes()[:-200] + bytes(100) + path.read_bytes()[-100:])
    with pytest.raises(DamagedCheckpoint, match="SHA-256"):
        load(path, mapped=True)


@pytest.mark.parametrize("damage", [
    lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b[:-1], lambda b: b"not a checkpoint at all",
    lambda b: b[:1500] + bytes([b[1500] ^ 1]) + b[1501:], lambda b: bytes([b[0] ^ 1]) + b[1:],
    lambda b: b[:-10] + b"0123456789",
])
def test_damage_of_any_kind_is_found(tmp_path, damage):
    save(tmp_path / "c.pt", PAYLOAD)
    (tmp_path / "c.pt").write_bytes(damage((tmp_path / "c.pt").read_bytes()))
    with pytest.raises(DamagedCheckpoint, match="c.pt"):
        load(tmp_path / "c.pt")


def test_every_single_bit_counts(tmp_path):
    save(tmp_path / "c.pt", {"x": 1})
    whole = (tmp_path / "c.pt").read_bytes()
    for position in range(0, len(whole) - 75, 17):
        (tmp_path / "c.pt").write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1:])
        with pytest.raises(DamagedCheckpoint):
            load(tmp_path / "c.pt")


def test_a_pickle_that_runs_code_does_not_run_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    save(tmp_path / "zip.pt", {"x": Evil()})  # with the right digest
    for name in ("plain.pt", "zip.pt"):
        with pytest.raises(DamagedCheckpoint):
            load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("there", ["another call", "no other call", "another call that this file system lacks"])
def test_a_file_is_synced_to_the_disk_itself_where_that_is_another_call(monkeypatch, there):
    def full(fd, what):
        assert what == 51
        if "lacks" in there:
            raise OSError(errno.ENOTSUP, "not supported")
        calls.append("full")

    calls = []
    monkeypatch.setattr(files.os, "fsync", lambda fd: calls.append("fsync"))
    monkeypatch.setattr(files.fcntl, "fcntl", full)
    if there == "no other call":
        monkeypatch.delattr(files.fcntl, "F_FULLFSYNC", raising=False)
    else:  # macOS
        monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    files.sync(7)
    assert calls == ["full" if there == "another call" else "fsync"]


def test_a_sync_that_failed_is_not_tried_again(monkeypatch):
    """The kernel then takes what could not be written for written: the second call would succeed."""
    def full(fd, what):
        raise OSError(errno.EIO, "the disk failed")

    monkeypatch.setattr(files.fcntl, "fcntl", full)
    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.os, "fsync", lambda fd: pytest.fail("called"))
    with pytest.raises(OSError, match="the disk failed"):
        files.sync(7)


@pytest.mark.parametrize("failing", ["file", "folder"])
def test_a_checkpoint_that_a_disk_did_not_take_does_not_count_as_saved(tmp_path, monkeypatch, failing):
    def sync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode) == (failing == "folder"):
            raise OSError(errno.EIO, "the disk failed")

    save(tmp_path / "c.pt", payload(1))
    for module in archive, files:
        monkeypatch.setattr(module, "sync", sync)
    with pytest.raises(OSError, match="the disk failed"):
        save(tmp_path / "c.pt", payload(2), tmp_path / "c.prev.pt")
    assert load_latest(tmp_path / "c.pt", config(tmp_path))[0]["step"] == (2 if failing == "folder" else 1)


def test_a_copy_in_place_of_a_link_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "a file system without links")

    (tmp_path / "a").write_bytes(b"1")
    monkeypatch.setattr(archive.os, "link", no_links)
    with synced_files(monkeypatch) as synced:
        archive.link(tmp_path / "a", tmp_path / "b")
    assert synced == [os.stat(tmp_path / "b").st_ino]


def test_new_folders_are_on_the_disk_with_those_above_them(tmp_path, monkeypatch):
    with synced_files(monkeypatch) as synced:
        save(tmp_path / "a" / "b" / "c.pt", PAYLOAD)
    assert synced == [os.stat(tmp_path / path).st_ino for path in (".", "a", "a/b/c.pt", "a/b")]


def test_metrics_are_on_the_disk_before_a_checkpoint_that_does_not_write_them_again(tmp_path, monkeypatch, caplog):
    def sync_path(path):
        assert path == tmp_path / "c.metrics.jsonl" and load(tmp_path / "c.pt")["step"] == 1
        raise OSError(errno.EIO, "the disk failed")

    cfg = config(tmp_path)
    save_run(cfg, payload(1), 1, newest=True, best=False)
    caplog.clear()
    monkeypatch.setattr(saver, "sync_path", sync_path)
    save_run(cfg, payload(2), 2, newest=True, best=False)
    assert load(tmp_path / "c.pt")["step"] == 2 and "a power cut may take rows from" in caplog.text


@contextlib.contextmanager
def synced_files(monkeypatch):
    """The inodes of the files and folders that are synced to the disk."""
    found = []
    with monkeypatch.context() as patch:
        for module in archive, files:
            patch.setattr(module, "sync", lambda fd: found.append(os.fstat(fd).st_ino))
        yield found


def test_a_checkpoint_is_on_the_disk_whole_before_it_has_its_name_and_then_that_is(tmp_path, monkeypatch):
    def sync(fd):
        found = os.fstat(fd)
        synced.append((found.st_ino, path.exists() or found.st_size, fd))
        if path.exists():
            raise OSError(errno.EINVAL, "a file system without it, of folders")

    path, synced = tmp_path / "c.pt", []
    for module in archive, files:
        monkeypatch.setattr(module, "sync", sync)
    save(path, PAYLOAD)
    assert [what[:2] for what in synced] == [(path.stat().st_ino, path.stat().st_size), (tmp_path.stat().st_ino, True)]
    for *_, fd in synced:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_what_is_hashed_does_not_depend_on_the_blocks_that_are_written(tmp_path):
    content = bytes(range(40))
    for sizes in [40], [1] * 40, [2, 1, 0, 1, 20, 1, 15], [0, 39, 1]:
        with open(tmp_path / "file", "wb") as file:
            writer, left = archive._HashingFile(file), content
            for size in sizes:
                assert writer.write(memoryview(left)[:size]) == size
                left = left[size:]
        assert (tmp_path / "file").read_bytes() == content
        assert writer.hash.digest() == hashlib.sha256(content[:-2]).digest(), sizes


def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_draft(tmp_path):
    save(tmp_path / "c.pt", payload(1))
    with pytest.raises(Exception, match="pickle|local object"):
        save(tmp_path / "c.pt", {"w": torch.zeros(10), "bad": lambda: 0})
    assert load(tmp_path / "c.pt")["step"] == 1
    assert os.listdir(tmp_path) == ["c.pt"]


def test_the_checkpoint_before_the_newest_is_kept_and_used_when_the_newest_is_damaged(tmp_path, caplog):
    cfg = config(tmp_path)
    for step in (1, 2, 3):
        save_run(cfg, payload(step), step, newest=True, best=step == 2)
    assert [load(tmp_path / name)["step"] for name in ("c.pt", "c.prev.pt", "c.best.pt")] == [3, 2, 2]
    (tmp_path / "c.pt").write_bytes(b"")
    assert load_latest(tmp_path / "c.pt", cfg)[0]["step"] == 2
    (tmp_path / "c.pt").unlink()
    assert load_latest(tmp_path / "c.pt", cfg)[0]["step"] == 2
    (tmp_path / "c.prev.pt").write_bytes(b"")
    with pytest.raises(UserError, match="c.pt.*c.prev.pt"):
        load_latest(tmp_path / "c.pt", cfg)


def test_keep_last_keeps_that_many_by_step(tmp_path):
    cfg = config(tmp_path, keep_last=2)
    for step in (5, 10, 15, 20):
        save_run(cfg, payload(step), step, newest=True, best=False)
    assert sorted(path.name for path in tmp_path.glob("c.step-*")) == ["c.step-00000015.pt", "c.step-00000020.pt"]
    assert load(tmp_path / "c.step-00000015.pt")["step"] == 15
    assert len(list(tmp_path.iterdir())) == 4 and load(tmp_path / "c.prev.pt")["step"] == 15
    for step in (99_999_990, 100_000_000, 100_000_010):  # as names, those of nine digits come before those of eight
        save_run(cfg, payload(step), step, newest=True, best=False)
    assert sorted(path.name for path in tmp_path.glob("c.step-*")) == ["c.step-100000000.pt", "c.step-100000010.pt"]


def test_plan_decides_from_flags_and_files(tmp_path):
    path = tmp_path / "c.pt"
    assert plan(config(tmp_path)) is None
    assert plan(config(tmp_path, resume="auto")) is None
    with pytest.raises(UserError, match="no checkpoint at"):
        plan(config(tmp_path, resume="latest"))
    save(path, PAYLOAD)
    assert plan(config(tmp_path, resume="latest")) == plan(config(tmp_path, resume="auto")) == path
    with pytest.raises(UserError, match="--resume to go on, --overwrite"):
        plan(config(tmp_path))
    assert plan(config(tmp_path, overwrite=True)) is None
    save(tmp_path / "other.pt", PAYLOAD)
    with pytest.raises(UserError, match="branches off"):
        plan(config(tmp_path, resume=str(tmp_path / "other.pt")))
    assert plan(config(tmp_path, resume=str(tmp_path / "other.pt"), overwrite=True)).name == "other.pt"
    with pytest.raises(UserError, match=f"no such file; --resume alone takes {path}"):
        plan(config(tmp_path, resume=str(tmp_path / "nowhere.pt")))


@pytest.mark.parametrize("cfg, words", [
    (CheckpointConfig(resume="auto", overwrite=True), "give only one of them"),
    (CheckpointConfig(checkpoint_path="/tmp"), "is a folder"),
])
def test_flags_that_contradict_are_refused(cfg, words):
    with pytest.raises(UserError, match=words):
        cfg.validate()


def test_a_bare_file_name_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = CheckpointConfig(checkpoint_path="bare.pt")
    assert plan(cfg) is None
    save_run(cfg, payload(1), 1, newest=True, best=True)
    assert cfg.files() == ["bare.pt", "bare.best.pt"]


def test_a_flag_of_another_run_is_found_before_any_text_is_tokenized(trainer, tmp_path):
    assert trainer("--num-steps", 2).code == 0
    (tmp_path / "other.txt").write_text("Another text, of which no tokens are cached. " * 100)
    kept, anew = "--init-from c.pt --keep-optimizer", "start anew"  # also where GPT-2 has too few positions
    for flags, words, advice in ((["--n-layers", 3], "--n-layers was 2, is 3", anew),
                                 (["--seq-len", 16], "--seq-len was 32, is 16", kept),
                                 (["--seq-len", 64], "--seq-len was 32, is 64", anew),
                                 (["--batch-size", 8], "sequences in a step was 4, is 8", kept)):
        run = trainer("--num-steps", 4, "--resume", "--train-data", "other.txt", *flags)
        assert run.code == 2 and run.err.count("\n") == 1 and words in run.err, run.err
        assert "tokenized" not in run.out
        assert f"{advice} with another --checkpoint-path" in run.err, run.err


def test_a_foreign_checkpoint_is_not_resumed(tmp_path):
    save(tmp_path / "c.pt", {"model": {}})
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        resume.load_for_resume(tmp_path / "c.pt", config(tmp_path), {}, {})


def test_a_large_tensor_written_in_one_block_is_hashed_right(tmp_path):
    save(tmp_path / "c.pt", {"w": torch.randn(3_000_001)})
    with open(tmp_path / "c.pt", "rb") as file:
        assert archive.read_digest(file) == archive.file_digest(file)


def test_a_save_writes_into_no_checkpoint_that_a_killed_link_left_under_its_draft(tmp_path):
    cfg = config(tmp_path)
    save_run(cfg, payload(1), 1, newest=True, best=False)
    os.link(tmp_path / "c.pt", tmp_path / "c.best.pt.tmp")  # killed before it became c.best.pt
    save_run(cfg, payload(2), 2, newest=False, best=True)
    assert [load(tmp_path / name)["step"] for name in ("c.pt", "c.best.pt")] == [1, 2]
    os.link(tmp_path / "c.best.pt", tmp_path / "c.pt.tmp")
    save_run(cfg, payload(3), 3, newest=True, best=False)
    assert [load(tmp_path / name)["step"] for name in ("c.pt", "c.prev.pt", "c.best.pt")] == [3, 1, 2]
    save_run(cfg, payload(4), 4, newest=False, best=True)
    assert [load(tmp_path / name)["step"] for name in ("c.pt", "c.prev.pt", "c.best.pt")] == [3, 1, 4]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(6))
def test_a_kill_in_a_save_leaves_the_newest_before_and_no_best_behind_it(tmp_path, monkeypatch, moment):
    """Else a resumed run takes an older model for the best, and the better one is gone."""
    cfg, calls = config(tmp_path, keep_last=2), []
    save_run(cfg, payload(1), 1, newest=True, best=True)

    def dies(do):
        def call(*paths):
            calls.append(paths)
            if len(calls) == moment + 1:
                raise Killed
            return do(*paths)
        return call

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(os, "link", dies(os.link))
        patch.setattr(os, "replace", dies(os.replace))
        save_run(cfg, payload(2), 2, newest=True, best=True)
    newest, best = (load(tmp_path / name)["step"] for name in ("c.pt", "c.best.pt"))
    assert 1 <= newest <= best <= 2 and (moment or best == 1)


def test_where_there_is_no_room_for_a_copy_the_newest_is_saved_all_the_same(tmp_path, monkeypatch):
    cfg = config(tmp_path)
    save_run(cfg, payload(1), 1, newest=True, best=True)

    copy = archive.shutil.copyfile

    def no_link(source, target):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    def copy_all_but_the_best(source, target):
        if "best" in target.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "link", no_link)
        patch.setattr(archive.shutil, "copyfile", copy_all_but_the_best)
        save_run(cfg, payload(2), 2, newest=True, best=True)
    assert [load(tmp_path / name)["step"] for name in ("c.pt", "c.prev.pt", "c.best.pt")] == [2, 1, 1]


def test_drafts_of_a_killed_save_are_removed_and_no_other_runs(tmp_path):
    for name in ("c.pt.tmp", "c.best.pt.tmp", "c.step-00000008.pt.tmp", "cat.pt.tmp", "c.cat.pt.tmp"):
        (tmp_path / name).touch()
    resume.remove_stale_files(config(tmp_path), None, 0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.cat.pt.tmp", "cat.pt.tmp"]


def test_a_checkpoint_that_is_older_than_a_flag_goes_on(tmp_path):
    save(tmp_path / "c.pt", whole(1) | {"identity": {"--arch": "llama"}})
    identity = {"--arch": "llama", "--rope-theta": 0.0}
    newer = identity | {"--window": None, "--scaled": False}  # flags that it did not have, unset
    assert resume.load_for_resume(tmp_path / "c.pt", config(tmp_path), newer, {"window": 5})["step"] == 1
    with pytest.raises(UserError, match="--rope-theta was None, is 5e5"):
        resume.load_for_resume(tmp_path / "c.pt", config(tmp_path), identity | {"--rope-theta": "5e5"}, {})


@pytest.mark.parametrize("was, said", [
    ({}, "the checkpoint does not say which ones wrote it"),  # from before versions were noted
    ({"versions": {"git_commit": "a", "version/torch": "2"}}, "git_commit was a, is b"),
    ({"versions": {"git_commit": "b", "version/torch": "2", "version/wandb": "1"}}, None)], ids=str)
def test_a_resume_with_another_version_is_said(caplog, was, said):
    with caplog.at_level("INFO"):
        resume.log_versions(was, {"git_commit": "b", "version/torch": "2"})
    expected = [f"resumed with other versions, which may give other losses: {said}"] if said else []
    assert caplog.messages == expected


@pytest.mark.parametrize("start", [True, False])
def test_a_run_of_other_flags_is_told_of_a_file_of_its_flags_only_if_there_is_one(tmp_path, start):
    """A checkpoint that was copied alone, or by a version that wrote none, has no such file."""
    save(tmp_path / "c.pt", whole(1) | {"identity": {"--arch": "llama"}})
    if start:
        (tmp_path / "c.config.toml").touch()
    with pytest.raises(UserError) as error:
        resume.load_for_resume(tmp_path / "c.pt", config(tmp_path), {"--arch": "gpt2"}, {})
    assert ("(--config " in str(error.value)) == start, error.value


def test_other_data_may_be_trained_on_with_the_weights_and_the_optimizers_state(tmp_path):
    was, now = ({"--arch": "llama", "the training data": data} for data in "ab")
    save(tmp_path / "c.pt", whole(1) | {"identity": was})
    with pytest.raises(UserError, match=r"the training data is another; .* new run: --init-from \S+ --keep-optimizer"):
        resume.load_for_resume(tmp_path / "c.pt", config(tmp_path), now, {})


@pytest.mark.parametrize("flag, advice", [
    ({"tokenizer_name": "char"}, "start anew"), ({"vocab_size": 999}, "start anew"),
    ({"train_data": ["shards"]}, "start anew"), ({"train_data": ["text"]}, r"--init-from \S+ --keep-optimizer"),
    ({}, r"--init-from \S+ --keep-optimizer")], ids=str)
def test_weights_are_offered_for_text_that_their_own_tokenizer_encodes(tmp_path, monkeypatch, flag, advice):
    """One that is learned from other text is another, too, but gives way to that of the weights."""
    monkeypatch.chdir(tmp_path)
    for name in "shards", "text":
        (tmp_path / name).mkdir()
    (tmp_path / "shards" / "meta.json").touch()
    flags = {"eval_tokens": EVAL_TOKENS, "tokenizer_name": "bpe", "vocab_size": 0}
    save(tmp_path / "c.pt", whole(1) | {"identity": {"the tokenizer": "a", "--vocab-size": 4096}, "config": flags})
    with pytest.raises(UserError, match=f"or .*{advice} with another --checkpoint-path"):
        resume.load_for_resume(tmp_path / "c.pt", config(tmp_path), {"the tokenizer": "b", "--vocab-size": 999},
                               flags | flag)


def test_a_checkpoint_with_a_flag_that_this_code_lacks_goes_on_if_it_is_unset(tmp_path):
    save(tmp_path / "c.pt", whole(1) | {"identity": {"--arch": "llama", "--scaled": False, "--window": 8}})
    with pytest.raises(UserError, match="another run: --window was 8, is None;"):
        resume.load_for_resume(tmp_path / "c.pt", config(tmp_path), {"--arch": "llama"}, {})
    again = {"--arch": "llama", "--window": 8}
    assert resume.load_for_resume(tmp_path / "c.pt", config(tmp_path), again, {})["step"] == 1


def test_a_run_that_trains_on_may_replace_a_checkpoint_while_it_is_read(tmp_path, monkeypatch):
    save(tmp_path / "c.pt", payload(1))
    digest = archive.file_digest

    def slow(file):
        save(tmp_path / "c.pt", payload(2) | {"more": torch.zeros(999)})
        return digest(file)

    monkeypatch.setattr(archive, "file_digest", slow)
    assert load(tmp_path / "c.pt")["step"] == 1


EVAL_TOKENS = 100


def whole(step):
    return payload(step) | {"format": resume.FORMAT, "identity": {}, "config": {"eval_tokens": EVAL_TOKENS},
                            "model": {}, "state": {"step": step, "best_val": 1.5}}


def test_a_fallback_mends_the_newest_so_that_a_kill_in_the_next_save_loses_nothing(tmp_path, monkeypatch):
    cfg = config(tmp_path)
    for step in (1, 2):
        save_run(cfg, whole(step), step, newest=True, best=False)
    (tmp_path / "c.pt").write_bytes(b"damaged")
    assert resume.load_for_resume(tmp_path / "c.pt", cfg, {}, {})["step"] == 1

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(saver, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save_run(cfg, whole(3), 3, newest=True, best=False)
    assert load_latest(tmp_path / "c.pt", cfg)[0]["step"] == 1


def test_overwrite_says_whether_it_rolls_a_run_back_or_replaces_it(tmp_path):
    cfg = config(tmp_path, keep_last=2)
    for step in (1, 2):
        save_run(cfg, whole(step), step, newest=True, best=False)
    save(tmp_path / "copy.pt", whole(1))
    for name, words in (("c.step-00000001.pt", "--overwrite rolls it back to that file"),
                        ("copy.pt", "--overwrite replaces that run and its metrics")):
        with pytest.raises(UserError, match=words):
            plan(config(tmp_path, resume=str(tmp_path / name)))


def test_a_checkpoint_of_another_program_is_not_called_damaged(tmp_path):
    torch.save({"model": {}, "config": {"init_from": "scratch"}}, tmp_path / "ckpt.pt")  # as nanoGPT's
    with pytest.raises(DamagedCheckpoint, match="is not a checkpoint of mini-llm"):
        load(tmp_path / "ckpt.pt")
    assert resume.is_of_another_program(tmp_path / "ckpt.pt")
    save(tmp_path / "other.pt", {"model": {}})  # what damage may leave of ours: its SHA-256, or its parts
    save(tmp_path / "c.pt", whole(1))
    own = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(own[:-70] + b"!" + own[-69:])
    for damaged in "other.pt", "c.pt", "missing.pt":
        assert not resume.is_of_another_program(tmp_path / damaged)


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), PermissionError(errno.EACCES, "denied"),
                                   MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: not enough")])
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch, error):
    cfg = config(tmp_path)
    for step in (1, 2):
        save_run(cfg, whole(step), step, newest=True, best=False)

    def fail(path):
        raise error

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"c\.pt cannot be read now"):
        patch.setattr(archive, "file_digest", fail)
        resume.load_for_resume(tmp_path / "c.pt", cfg, {}, {})
    assert resume.load_for_resume(tmp_path / "c.pt", cfg, {}, {})["step"] == 2


def test_the_old_run_is_gone_from_the_disk_before_rows_of_the_new_one_are_there(tmp_path, monkeypatch):
    save(tmp_path / "c.pt", PAYLOAD)
    with synced_files(monkeypatch) as synced:
        resume.remove_stale_files(config(tmp_path, overwrite=True), None, 0)
    assert synced == [os.stat(tmp_path).st_ino] and os.listdir(tmp_path) == []


def test_starting_over_leaves_nothing_of_the_old_run_in_force(tmp_path):
    cfg = config(tmp_path, keep_last=2, overwrite=True)
    for step in (900, 1000):
        save_run(cfg, whole(step), step, newest=True, best=True)
    for name in ("c.best-of-64.pt", "c.wandb.json", "c.rank1.wandb.json", "c.rank1.metrics.jsonl"):
        (tmp_path / name).touch()
    resume.remove_stale_files(cfg, None, 0)
    assert resume.loss_to_beat(cfg, State(), EVAL_TOKENS) == math.inf
    assert os.listdir(tmp_path) == []
    assert plan(config(tmp_path, resume="auto")) is None


@pytest.mark.parametrize("best_at, back_to, least", [
    (30, "c.step-00000020.pt", math.inf), (10, "c.step-00000020.pt", 1.5), (20, "c.best.pt", 1.5)])
def test_rolling_back_makes_the_file_the_newest_at_once_and_keeps_a_best_one_that_it_knows(tmp_path, best_at, back_to,
                                                                                             least):
    cfg = config(tmp_path, keep_last=3, overwrite=True)
    for step in (10, 20, 30):
        save_run(cfg, whole(step), step, newest=True, best=step == best_at)
    resume.remove_stale_files(cfg, tmp_path / back_to, 20)
    assert resume.loss_to_beat(cfg, State(step=20, best_val=1.5), EVAL_TOKENS) == least
    assert load(tmp_path / "c.pt")["state"]["step"] == 20
    best = {"c.best.pt"} if least < math.inf else set()
    assert set(os.listdir(tmp_path)) == {"c.pt", "c.step-00000010.pt", "c.step-00000020.pt"} | best
    assert not best or load(tmp_path / "c.best.pt")["state"]["step"] == best_at


@pytest.mark.parametrize("name", ["c.pt", "c.prev.pt", "c.step-00000010.pt"])
def test_rolling_back_to_a_symbolic_link_takes_what_it_leads_to(tmp_path, name):
    cfg = config(tmp_path, keep_last=3, overwrite=True)
    for step in (10, 20):
        save_run(cfg, whole(step), step, newest=True, best=False)
    step = load(tmp_path / name)["state"]["step"]
    (tmp_path / "latest.pt").symlink_to(name)
    resume.remove_stale_files(cfg, tmp_path / "latest.pt", step)
    assert not (tmp_path / "c.pt").is_symlink() and load(tmp_path / "c.pt")["state"]["step"] == step


def test_from_the_plan_to_resume_on_no_other_run_may_write(tmp_path):
    cfg = config(tmp_path, resume="latest")
    save_run(cfg, whole(5), 5, newest=True, best=False)
    (tmp_path / "c.lock").touch()
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from mini_llm.checkpoint import CheckpointConfig, plan; "
            f"plan(CheckpointConfig({str(tmp_path / 'c.pt')!r}, overwrite=True))")
    assert plan(cfg) == tmp_path / "c.pt"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode == 1 and "another run writes there now" in other.stderr
    checkpoint.claim(Config(checkpoint=cfg), tmp_path / "c.pt", 1, 0)


@pytest.mark.parametrize("source, kept", [("a.pt", False), ("c.prev.pt", True)])
def test_a_branch_does_not_take_up_the_wandb_run_of_what_it_replaces(tmp_path, source, kept):
    (tmp_path / "c.wandb.json").touch()
    save_run(config(tmp_path, checkpoint_path=str(tmp_path / source)), whole(5), 5, newest=True, best=False)
    resume.remove_stale_files(config(tmp_path, resume=source), tmp_path / source, 5)
    assert (tmp_path / "c.wandb.json").exists() == kept


def test_a_resumed_run_knows_its_least_loss():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    saved = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), state=dict(step=5, best_val=1.5))
    restored = resume.restore(saved, dict(model=model, optimizer=optimizer), True, World.__new__(World))
    assert restored.best_val == 1.5


@pytest.mark.parametrize("error, raised", [(torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
                                           (KeyError("norms"), UserError)])
def test_a_checkpoint_that_does_not_fit_into_memory_is_not_called_another_runs(error, raised):
    class Part:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise error

    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    saved = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), state={}, guard=dict(norms=1))
    with pytest.raises(raised, match="out of memory" if raised is not UserError else "not those of this run"):
        resume.restore(saved, dict(model=model, optimizer=optimizer, guard=Part()), True, World.__new__(World))


def test_a_part_that_the_checkpoint_lacks_is_not_left_as_it_is():
    """An average of weights that are not drawn before a resume would be one of whatever the memory had."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    saved = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), state={})
    with pytest.raises(UserError, match="not those of this run .*'ema'"):
        resume.restore(saved, dict(model=model, optimizer=optimizer, ema=model), True, World.__new__(World))


def test_no_parameter_gets_the_moments_of_another():
    model = torch.nn.Linear(3, 3)
    forward, backward = (torch.optim.AdamW(list(model.named_parameters())[::order]) for order in (1, -1))
    model(torch.ones(3)).sum().backward()
    forward.step()
    saved = dict(model=model.state_dict(), optimizer=forward.state_dict(), state={})
    with pytest.raises(UserError, match="the optimizer has other parameters, or in another order"):
        resume.restore(saved, dict(model=model, optimizer=backward), True, World.__new__(World))


def test_a_best_checkpoint_alone_is_one_and_is_gone_on_from(tmp_path):
    """All that a run leaves that was killed before its first --save-steps."""
    save_run(config(tmp_path), whole(20), 20, newest=False, best=True)
    with pytest.raises(UserError, match="there is a checkpoint already"):
        plan(config(tmp_path))
    for wanted in ("auto", "latest"):
        cfg = config(tmp_path, resume=wanted)
        assert plan(cfg) == tmp_path / "c.best.pt" and cfg.continues(plan(cfg))
    save_run(config(tmp_path), whole(30), 30, newest=True, best=False)
    assert plan(config(tmp_path, resume="auto")) == tmp_path / "c.pt"
    (tmp_path / "c.pt").rename(tmp_path / "c.step-00000030.pt")
    assert plan(config(tmp_path, resume="auto")) == tmp_path / "c.step-00000030.pt"


def test_after_falling_back_the_new_checkpoints_are_kept_and_not_the_old(tmp_path):
    cfg = config(tmp_path, keep_last=2)
    for step in (10, 20, 12, 14, 16):
        save_run(cfg, whole(step), step, newest=True, best=False)
    assert [file.name[-5:-3] for file in cfg.numbered()] == ["14", "16", "20"]


def test_another_name_of_the_newest_checkpoint_goes_on_from_it(tmp_path):
    save_run(config(tmp_path), whole(5), 5, newest=True, best=False)
    os.link(tmp_path / "c.pt", tmp_path / "backup.pt")
    cfg = config(tmp_path, resume=str(tmp_path / "backup.pt"))
    assert plan(cfg) == tmp_path / "backup.pt" and cfg.continues(plan(cfg))


def test_a_checkpoint_on_another_node_alone_is_not_passed_over(tmp_path):
    world = SimpleNamespace(from_main=lambda make: make(), max=lambda values: [1])  # another rank has one
    with pytest.raises(UserError, match="--resume auto: another node has .* storage that all nodes share"):
        checkpoint.plan_together(config(tmp_path, resume="auto"), world)
    save_run(config(tmp_path), whole(5), 5, newest=True, best=False)
    assert checkpoint.plan_together(config(tmp_path, resume="auto"), world) == tmp_path / "c.pt"


def test_a_run_that_goes_on_from_before_its_best_checkpoint_has_that_to_beat(tmp_path):
    cfg = config(tmp_path, resume="latest")
    for step, loss, best in ((60, 3.2, False), (100, 3.1, True)):
        saved = whole(step) | {"state": dict(step=step, best_val=loss)}
        save_run(cfg, saved, step, newest=not best, best=best)
    assert resume.loss_to_beat(cfg, State(step=60, best_val=3.2), EVAL_TOKENS) == 3.1
    assert resume.loss_to_beat(cfg, State(step=60, best_val=3.2), 0) == math.inf  # of another set
    assert load(tmp_path / f"c.best-of-{EVAL_TOKENS}.pt")["state"]["step"] == 100
    (tmp_path / "c.best.pt").write_bytes(b"damaged")  # there are no best weights: the next evaluation makes some
    assert resume.loss_to_beat(cfg, State(step=60, best_val=3.2), 0) == math.inf


def test_a_best_checkpoint_that_cannot_be_read_for_a_moment_is_not_written_over(tmp_path, monkeypatch):
    cfg = config(tmp_path, resume="latest")
    save_run(cfg, whole(100) | {"state": dict(step=100, best_val=3.1)}, 100, newest=False, best=True)
    monkeypatch.setattr(resume, "peek", lambda path: {})  # as on a file system without mmap
    assert resume.loss_to_beat(cfg, State(step=60), EVAL_TOKENS) == 3.1
    assert resume.loss_to_beat(cfg, State(step=60), 7) == math.inf
    assert resume.loss_to_beat(cfg, State(step=60), EVAL_TOKENS) == 3.1, "back from .best-of-N.pt"

    def fail(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(archive, "file_digest", fail)
    with pytest.raises(UserError, match=r"c\.best\.pt cannot be read now"):
        resume.loss_to_beat(cfg, State(step=60), EVAL_TOKENS)


def test_the_best_over_some_tokens_is_the_best_again_when_they_are_those_again(tmp_path):
    def best_of(eval_tokens, loss, step):
        """A start with so many --eval-tokens → the loss to beat; then a best checkpoint, if `loss` is below that."""
        to_beat = resume.loss_to_beat(cfg, State(step=60), eval_tokens)
        if loss < to_beat:
            saved = whole(step) | dict(state=dict(step=step, best_val=loss), config=dict(eval_tokens=eval_tokens))
            save_run(cfg, saved, step, newest=False, best=True)
        return to_beat, load(tmp_path / "c.best.pt")["state"]["step"]

    cfg = config(tmp_path, resume="latest")
    save_run(cfg, whole(60), 60, newest=True, best=False)
    assert best_of(512, 3.3, 70) == (math.inf, 70)
    assert best_of(1024, 3.2, 80) == (math.inf, 80)
    assert best_of(512, 3.6, 90) == (3.3, 70)  # the worse one does not replace the first
    assert best_of(1024, 3.1, 100) == (3.2, 100)
    assert best_of(512, 3.0, 110) == (3.3, 110)
    assert [file.name for file in cfg.matching(resume.OTHER_BEST)] == ["c.best-of-1024.pt"]
    back = config(tmp_path, overwrite=True)
    resume.remove_stale_files(back, tmp_path / "c.pt", 60)  # a rollback: of later steps there is no best
    assert not back.matching(r"\.best.*\.pt")


def test_the_tokens_of_a_run_are_found_where_it_left_them_or_in_a_cache_that_has_been_moved(tmp_path):
    def find(*flags):
        return resume.earlier_shards(tmp_path / "c.pt", parse(Config, [*here, *flags]))

    here = "--checkpoint-path", str(tmp_path / "c.pt"), "--cache-dir", str(tmp_path / "cache")
    saved = whole(1) | dict(config=flatten(parse(Config, here)), tokens=str(tmp_path / "then" / "name"))
    save_run(config(tmp_path), saved, 1, newest=True, best=False)
    assert find() is None
    (tmp_path / "cache" / "name").mkdir(parents=True)
    assert find() == str(tmp_path / "cache" / "name") and find("--max-tokens", "9") is None
    (tmp_path / "then" / "name").mkdir(parents=True)
    assert find() == str(tmp_path / "then" / "name")


def test_a_damaged_checkpoint_leaves_with_all_its_names(tmp_path):
    cfg = config(tmp_path, keep_last=2, keep_every=20, resume="latest")
    for step in (30, 40):
        save_run(cfg, whole(step), step, newest=True, best=step == 40, kept=step == 40)
    with open(tmp_path / "c.pt", "r+b") as file:  # in place, as a bad sector would
        file.seek(500)
        file.write(b"damaged")
    os.link(tmp_path / "c.pt", tmp_path / "c.best-of-1.pt")
    assert resume.load_for_resume(tmp_path / "c.pt", cfg, {}, {})["step"] == load(tmp_path / "c.pt")["step"] == 30
    assert sorted(file.name for file in tmp_path.glob("*.pt")) == ["c.prev.pt", "c.pt", "c.step-00000030.pt"]


def test_files_of_a_run_whose_name_begins_alike_are_left_alone(tmp_path):
    foreign = {"c.step-final.pt", "c.rank-metrics.jsonl", "c.rankx.metrics.jsonl", "c.upload-final.pt", "cc.step-1.pt"}
    for name in foreign:
        (tmp_path / name).touch()
    cfg = config(tmp_path, keep_last=1, overwrite=True)
    for step in (1, 2):
        save_run(cfg, whole(step), step, newest=True, best=False)
    assert [file.name for file in cfg.numbered()] == ["c.step-00000002.pt"]
    resume.remove_stale_files(cfg, None, 0)
    assert set(os.listdir(tmp_path)) == foreign
    for name in ("c.step-final.pt", "c.rank3.pt", "c.upload-x.pt"):
        with pytest.raises(UserError, match="which are names of a run's other files"):
            CheckpointConfig(str(tmp_path / name)).validate()


def test_a_branch_begins_without_the_history_of_the_run_that_was_there(tmp_path):
    for name in ("a", "b"):
        save_run(CheckpointConfig(str(tmp_path / f"{name}.pt"), keep_last=1), whole(5), 5, newest=True, best=False)
    (tmp_path / "a.metrics.jsonl").write_text('{"step": 3}\n')
    (tmp_path / "a.log").write_text("of the run that was there\n")
    (tmp_path / "a.tensorboard").mkdir()
    for name in ("a.upload-3.pt", "a.upload-5.best.pt", "a.rank1.upload-5.pt"):  # which it could not send
        (tmp_path / name).touch()
    cfg = CheckpointConfig(str(tmp_path / "a.pt"), resume=str(tmp_path / "b.pt"), overwrite=True, keep_last=1)
    resume.remove_stale_files(cfg, tmp_path / "b.pt", 5)
    # Nor is the source's checkpoint put there: a kill before the first save would leave one of the source's W&B run.
    assert {path.name for path in tmp_path.iterdir()} == {"b.pt", "b.step-00000005.pt"}


def test_a_checkpoint_that_came_while_this_run_tokenized_is_not_written_over(tmp_path):
    cfg = config(tmp_path)
    assert plan(cfg) is None
    save_run(cfg, whole(5), 5, newest=True, best=False)
    with pytest.raises(UserError, match="another run writes there"):
        checkpoint.claim(Config(checkpoint=cfg), None, 1, 0)
    (tmp_path / "file").touch()  # where its folder would be made
    with pytest.raises(UserError, match="file/c.pt: .*; give another path"):
        checkpoint.claim(Config(checkpoint=config(tmp_path / "file")), None, 1, 0)


def test_a_store_that_does_not_append_is_refused_before_anything_is_replaced(tmp_path, monkeypatch):
    """As metrics and log are written; object stores mounted as a folder take whole files only."""
    def opened(path, flags, *mode, real=os.open):
        if flags & os.O_APPEND:
            raise OSError(errno.ENOTSUP, "Operation not supported")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(UserError, match="c.pt: Operation not supported; give another path"):
        checkpoint.claim(Config(checkpoint=config(tmp_path)), None, 1, 0)


def test_a_flag_that_says_the_default_is_no_difference():
    def identity(*flags):
        return resume.identity_of_flags(parse(Config, ["--arch", "qwen3", *flags]), 8)

    assert identity() == identity("--rope-theta", "1e6") != identity("--rope-theta", "5e5")


def test_where_the_newest_are_damaged_the_error_names_one_that_is_whole(tmp_path):
    tmp_path = tmp_path / "a folder"  # its name as a shell takes it
    cfg = config(tmp_path, keep_last=2)
    for step in (10, 20, 30):
        save_run(cfg, whole(step), step, newest=True, best=step == 10)
    for name in ("c.pt", "c.prev.pt"):
        (tmp_path / name).unlink()  # the file of that name alone: others are second names of it
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError) as error:
        load_latest(tmp_path / "c.pt", cfg)
    assert f"--resume '{tmp_path / 'c.step-00000030.pt'}' --overwrite goes back to that one" in str(error.value)
    for file in cfg.numbered():
        file.unlink()
    with pytest.raises(UserError, match=r"--resume '.+c\.best\.pt' --overwrite"):
        load_latest(tmp_path / "c.pt", cfg)
    (tmp_path / "c.best.pt").unlink()
    with pytest.raises(UserError, match=r"c\.pt is .*c\.prev\.pt is .*no other checkpoint .*--overwrite instead of"):
        load_latest(tmp_path / "c.pt", cfg)
    (tmp_path / "x.pt").write_bytes(b"damaged")
    save(tmp_path / "c.pt", whole(3))
    with pytest.raises(UserError, match=r"x\.pt is .*--resume .*c\.pt'? --overwrite goes back to that one"):
        load_latest(tmp_path / "x.pt", cfg)


def test_a_path_spelled_otherwise_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = CheckpointConfig(checkpoint_path="c.pt")
    assert cfg.continues(tmp_path / "c.pt") and not cfg.continues(tmp_path / "other.pt")


def test_milestones_are_kept_for_good_beside_the_newest_few(tmp_path):
    def names():
        return [file.suffixes[0] for file in cfg.numbered()]

    cfg, state = config(tmp_path, keep_last=2, keep_every=30), State()
    saver = Saver(cfg, World.__new__(World), state, SimpleNamespace(saved=lambda *_: None))
    bad = (62, 93)  # asked for while steps were not finite

    def now():
        return payload(state.step) | dict(meter=dict(skipped=[9, int(state.step in bad)]))

    for state.step in (10, 25, 40, 50, 55, 62, 93, 95):  # 30, 60 and 90 were not saved themselves
        saver.save(now, newest=state.step != 50, best=state.step == 50, last=False)
    assert names() == [".kept-00000040", ".step-00000055", ".kept-00000095", ".step-00000095"]
    state.step = 97
    again = Saver(cfg, World.__new__(World), state, SimpleNamespace(saved=lambda *_: None))
    again.save(now, newest=True, best=False, last=False)
    assert names() == [".kept-00000040", ".kept-00000095", ".step-00000095", ".step-00000097"]
    cfg.keep_every = 0  # as at a resume without the flag
    for step in (100, 110):
        save_run(cfg, payload(step), step, newest=True, best=False)
    assert names() == [".kept-00000040", ".kept-00000095", ".step-00000100", ".step-00000110"]
    cfg.keep_every, state.step = 1, 111
    again.save(now, newest=True, best=False, last=False)
    assert ".kept-00000111" in names()


def test_a_save_reads_no_folder_for_names_that_it_does_not_give(tmp_path, monkeypatch):
    """There may be thousands of files, on a network file system."""
    saver = Saver(config(tmp_path), World.__new__(World), State(step=10), SimpleNamespace(saved=lambda *_: None))
    monkeypatch.setattr(CheckpointConfig, "matching", lambda *_: pytest.fail("the folder was read"))
    saver.save(lambda: payload(10), newest=True, best=True, last=True)
    assert (tmp_path / "c.best.pt").exists()


def test_no_good_checkpoint_goes_for_two_of_steps_that_are_not_finite(tmp_path):
    cfg = config(tmp_path)
    for step, in_row in ((10, 0), (20, 0), (25, 3), (27, 5), (30, 0), (40, 0)):
        saved = whole(step) | dict(meter=dict(skipped=[in_row, in_row]))
        save_run(cfg, saved, step, newest=True, best=False)
        before = {10: None, 20: 10, 25: 20, 27: 20, 30: 20, 40: 30}[step]
        assert before is None or load(tmp_path / "c.prev.pt")["state"]["step"] == before, step


def test_a_run_without_a_finite_loss_is_told_the_newest_checkpoint_from_before(tmp_path):
    cfg = config(tmp_path, keep_last=9)
    for step in (1, 5, 8, 12):
        save_run(cfg, whole(step), step, newest=True, best=False)
    for at, way in ((13, "--resume"), (12, f"--resume {tmp_path}/c.prev.pt --overwrite"),
                    (8, f"--resume {tmp_path}/c.step-00000005.pt --overwrite"),
                    (2, f"--resume {tmp_path}/c.step-00000001.pt --overwrite"), (1, None)):
        last = whole(at + 3) | dict(config=dict(optimizer="muon"), meter=dict(skipped=[3, 3]))
        way = f"; {way} with a lower --lr and --muon-lr goes on" if way else "no checkpoint is from before step 1"
        with pytest.raises(saver.NonFinite, match=f"not finite in 3 steps .* at step {at + 3}, .*{way}"):
            saver.raise_nonfinite(cfg, last, World.saving, [])
        assert load(tmp_path / "c.nonfinite.pt")["state"]["step"] == at + 3


def test_saving_again_leaves_no_draft_behind(tmp_path):
    cfg = config(tmp_path)
    for _ in range(3):
        save_run(cfg, payload(1), 1, newest=True, best=True)
        os.link(tmp_path / "c.pt", tmp_path / "same")
        os.replace(tmp_path / "same", tmp_path / "c.prev.pt")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_dry_run_needs_no_folder_that_can_be_written(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", refuse)
    assert checkpoint.plan(config(tmp_path), locks=False) is None
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.plan(config(tmp_path))
