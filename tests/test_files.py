import errno
import json
import math
import os
import shlex

import pytest
from conftest import PUT

from mini_llm import files
from mini_llm.files import beside_run, command, exists, matching_files, read_json, read_records, without_infinity


def test_only_what_is_surely_not_there_does_not_exist(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    os.symlink(tmp_path / "circle", tmp_path / "circle")
    os.symlink(tmp_path / "nowhere", tmp_path / "broken")
    assert exists(tmp_path) and exists(tmp_path / "file")
    assert not any(exists(tmp_path / name) for name in ("gone", "gone/file", "file/below", "circle", "broken"))
    for code in errno.EACCES, errno.EIO, errno.ESTALE:
        def stat(path, code=code):
            raise OSError(code, "of a network")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="of a network"):
            patch.setattr(files.os, "stat", stat)
            exists(tmp_path / "file")


@pytest.mark.parametrize("put", PUT)
def test_what_is_no_file_of_a_json_object_is_an_error_at_once(tmp_path, put):
    PUT[put](tmp_path / "a.json")
    with pytest.raises(ValueError, match="no such file"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content, read", [
    (b'{"a": "\xc3\xa9"}', {"a": "é"}), (b"[1]", None), (b"{", None), (b"\xff", None), (b"[" * 200_000, None)],
    ids=range(5))
def test_a_json_object_is_read_and_anything_else_refused(tmp_path, content, read):
    (tmp_path / "a.json").write_bytes(content)
    if read:
        assert read_json(tmp_path / "a.json") == read
    else:
        with pytest.raises(ValueError):
            read_json(tmp_path / "a.json")


def test_no_infinity_is_left_at_any_depth():
    assert without_infinity([math.inf, {"a": [math.nan, 1.5, "inf", None]}]) == [None, {"a": [None, 1.5, "inf", None]}]


@pytest.mark.parametrize("name", ["c.pt", "c.best.pt", "c.best-of-100.pt", "c.prev.pt", "c.nonfinite.pt",
                                  "c.step-00000005.pt", "c.kept-00000100.pt", "c.metrics.jsonl"])
def test_all_files_of_a_run_have_one_tokenizer(name):
    assert str(beside_run(f"runs/{name}", ".tokenizer")) == "runs/c.tokenizer"


@pytest.mark.parametrize("stem", ["c.best.model", "c.step-one", "c.prev2", "best", "c.metrics"])
def test_a_name_that_is_like_another_is_a_runs_own(stem):
    assert str(beside_run(f"runs/{stem}.pt", ".tokenizer")) == f"runs/{stem}.tokenizer"


def test_files_are_found_by_their_whole_names(tmp_path):
    for name in ("a[1]-2.pt", "a[1]-10.pt", "a[1]-2.pt.tmp", "a1-2.pt", "a[1]-.pt", "b-2.pt"):
        (tmp_path / name).touch()
    assert [file.name for file in matching_files(tmp_path / "a[1]", r"-\d+\.pt")] == ["a[1]-10.pt", "a[1]-2.pt"]


GOOD = [dict(step=0, time=1.5), dict(step=1 << 62, time=0, x=None, histogram={"counts": []}, loss=2),
        dict(step=1, time=1, event="config", config={}), dict(step=1, time=1, event="sample", text=""),
        dict(step=1, time=1, event="alert", title="a", text="b"), dict(step=1, time=1, event="exit", code=0),
        dict(step=1, time=1, event="of a later version", anything=[1])]
BAD = [dict(step=-1, time=1), dict(step=1 << 63, time=1), dict(step=True, time=1), dict(step=1.0, time=1), dict(step=1),
       dict(step=1, time=-1), dict(step=1, time=1 << 37), dict(step=1, time="1"), dict(step=1, time=1, x="text"),
       dict(step=1, time=1, event=1), dict(step=1, time=1, event="config", config=1),
       dict(step=1, time=1, event="sample"), dict(step=1, time=1, event="exit", code="0"),
       dict(step=1, time=1, event="alert", title="a"), dict(step=1, time=1, event="alert", text="b"), [1],
       None]


def test_records_are_those_that_a_run_writes(tmp_path):
    lines = [json.dumps(record).encode() for record in [*BAD[:8], *GOOD, *BAD[8:]]]
    (tmp_path / "m.jsonl").write_bytes(b"\n".join([*lines, b"\xff", b"[" * 100_000, b'{"step": 1, "time": 1']))
    assert list(read_records(tmp_path / "m.jsonl")) == GOOD


def test_a_command_is_told_as_it_is_typed_in_the_working_folder(tmp_path, monkeypatch):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    words = shlex.split(command("report.py", "of me.pt"))
    assert words[::2] == ["python", "of me.pt"] and not os.path.isabs(words[1]) and os.path.isfile(words[1])
    gone.rmdir()
    assert os.path.isfile(shlex.split(command("report.py", "c.pt"))[1])
