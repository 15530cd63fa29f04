import errno
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import zygote
from conftest import ROOT, TINY, environment
from test_generate import command, refused, shown

import evaluate as evaluate_module
from evaluate import figures, interval, main, open_data, own_validation_set, sliding_windows, window_batches
from export import export
from mini_llm.errors import UserError
from mini_llm.pretrained import load_run
from mini_llm.shards import Shard, ShardWriter, read_meta
from mini_llm.tokenizer import load_tokenizer, train_tokenizer
from model import IGNORE


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, text):
    """A run in fp32 with two validation texts, a.txt of short documents and b.txt of one, evaluated whole."""
    folder = tmp_path_factory.mktemp("run")
    lines = text.read_text().splitlines()
    (folder / "a.txt").write_text("<|endoftext|>".join(lines[:60]))
    (folder / "b.txt").write_text("\n".join(lines[60:90]) + "\nnaïve é")
    made = zygote.run([sys.executable, ROOT / "train.py", *TINY, "--train-data", text, "--val-data", "a.txt", "b.txt",
                       "--cache-dir", "cache", "--num-steps", 20, "--eval-steps", 0, "--eval-tokens", 0, "--no-amp",
                       "--checkpoint-path", "c.pt"], folder, environment())
    assert made.returncode == 0, made.stderr
    return folder


def evaluate(folder, *flags):
    return json.loads(shown(main, folder, "--checkpoint-path", "c.pt", "--no-amp", "--json", *flags))


def test_the_column_of_a_table_can_be_named(run_folder):
    rows = [dict(title="none of this", body=line) for line in (run_folder / "b.txt").read_text().splitlines()]
    (run_folder / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run_folder / "bodies.txt").write_text("<|endoftext|>".join(row["body"] for row in rows))
    assert (evaluate(run_folder, "--data", "b.jsonl", "--text-column", "body")["loss"]
            == evaluate(run_folder, "--data", "bodies.txt")["loss"])


def test_the_column_is_the_runs_if_none_is_named(run_folder, tmp_path):
    rows = [dict(title="none of this", body=f"a text of number {n}") for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, tokenizer, eos, saved = load_run(run_folder / "c.pt")
    saved["config"]["text_column"] = "body"
    shards, _ = open_data([str(tmp_path / "rows.jsonl")], "", 32, tokenizer, eos, saved, tmp_path)
    assert shards[""].count == sum(len(row["body"]) + 1 for row in rows)
    with pytest.raises(UserError, match="no column named other"):
        open_data([str(tmp_path / "rows.jsonl")], "other", 32, tokenizer, eos, saved, tmp_path)


def test_characters_without_a_token_are_left_out_and_told_of(tmp_path, capsys):
    tokenizer, saved = train_tokenizer("char", ["a line\n"], 0), dict(config={}, identity={"the tokenizer": ""})
    (tmp_path / "some.txt").write_text("a line\n" * 20 + "ß?")
    shards, per_token = open_data([str(tmp_path / "some.txt")], "", 32, tokenizer, None, saved, tmp_path)
    assert shards[""].count == 140 and per_token[""] == 1
    assert "2 characters are left out" in capsys.readouterr().err
    (tmp_path / "none.txt").write_text("ß?")
    with pytest.raises(UserError, match="knows none of this text"):
        open_data([str(tmp_path / "none.txt")], "", 32, tokenizer, None, saved, tmp_path)


@pytest.mark.parametrize("words, told", [("the king the", False), ("the old king", True)])
def test_a_tokenizer_that_changes_the_text_is_told_of(tmp_path, capsys, words, told):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "king": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "a.txt").write_text(words)
    saved = dict(config={}, identity={"the tokenizer": ""})
    open_data([str(tmp_path / "a.txt")], "", 32, tokenizer, None, saved, tmp_path)
    assert ("changes the text" in capsys.readouterr().err) == told


def test_damaged_shards_are_not_evaluated(run_folder, tmp_path):
    _, tokenizer, eos, saved = load_run(run_folder / "c.pt")
    saved["config"]["cache_dir"] = str(run_folder / "cache")
    shutil.copytree(own_validation_set(saved), tmp_path / "shards")
    assert open_data([str(tmp_path / "shards")], "", 32, tokenizer, eos, saved, tmp_path)
    with open(tmp_path / "shards" / "val.bin", "r+b") as file:
        file.seek(500)
        byte = file.read(1)
        file.seek(500)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match="is damaged"):
        open_data([str(tmp_path / "shards")], "", 32, tokenizer, eos, saved, tmp_path)


def test_the_documented_python_runs(trainer, text):
    shutil.copy(text, own := trainer.folder / "own.txt")
    flags = ["--num-steps", 5, "--train-data", own, "--tokenizer-name", "bpe", "--vocab-size", 300]
    assert trainer(*flags).code == 0
    own.write_text("Another text. " * 5000)  # whose own tokens the model does not know
    page = (ROOT / "docs" / "models.md").read_text()
    first, training, attention = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    flags = f"--num-steps 5 --n-layers 1 --n-heads 2 --d-model 16 --cache-dir {trainer.folder}"
    example = "\n".join([
        first.replace("checkpoints/minigpt.pt", "c.pt"), training.replace("--num-steps 50", flags), attention,
        "assert exit_code == 0 and str(corpus.folder) == saved['tokens']",
        "q, k, v = torch.randn(1, 4, 5, 8), *torch.randn(2, 1, 2, 5, 8)",
        "for last in q, q[:, :, -1:]:",
        "    assert torch.allclose(watched(last, k, v), maps[-1] @ v.repeat_interleave(2, dim=1), atol=1e-6)",
        "maps.clear()", "model(x)", "assert len(maps) == model.cfg.n_layers", "print(loss.item(), file=sys.stderr)"])
    # A notebook's stdout is no file.
    (trainer.folder / "example.py").write_text(f"import io, sys\nsys.stdout = io.StringIO()\n{example}")
    done = subprocess.run([sys.executable, "example.py"], cwd=trainer.folder, capture_output=True, text=True,
                          env=environment(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0 and 1 < float(done.stderr.split()[-1]) < 6, done.stderr


def test_another_tokenizer_beside_the_checkpoint_is_told(run_folder, tmp_path, capsys):
    shutil.copy(run_folder / "c.pt", tmp_path)
    shutil.copytree(run_folder / "c.tokenizer", tmp_path / "c.tokenizer")
    load_run(tmp_path / "c.pt")
    assert capsys.readouterr().err == ""
    file = tmp_path / "c.tokenizer" / "tokenizer.json"
    settings = json.loads(file.read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(settings))
    load_run(tmp_path / "c.pt")
    assert "c.tokenizer is not the tokenizer that" in capsys.readouterr().err


def test_want_of_memory_or_space_is_one_line(run_folder, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")

    monkeypatch.setattr("evaluate.token_nats", full)
    monkeypatch.chdir(run_folder)
    assert "2 TiB; lower --batch-size" in refused(main, ["--checkpoint-path", "c.pt"], monkeypatch, capsys)
    monkeypatch.setattr("evaluate.ShardWriter", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    flags = ["--checkpoint-path", "c.pt", "--data", "a.txt"]
    assert "No space left on device; make room there, or set TMPDIR" in refused(main, flags, monkeypatch, capsys)


def test_an_open_file_that_keeps_a_name_on_nfs_costs_no_figure(run_folder, tmp_path, monkeypatch):
    """TMPDIR is there on some clusters."""
    def unlink(name, dir_fd=None, real=os.unlink):
        if str(name).endswith(".bin"):
            return os.rename(name, f".nfs-{name}", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        return real(name, dir_fd=dir_fd)

    monkeypatch.setattr(evaluate_module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "unlink", unlink)
    assert evaluate(run_folder, "--data", "a.txt")["loss"] > 0
    assert [*tmp_path.rglob(".nfs-*")]


def encoded(folder, name):
    """The ids of a text as training has them: its documents, each with an end-of-text token after it."""
    _, tokenizer, eos, _ = load_run(folder / "c.pt")
    documents = (folder / name).read_text().split("<|endoftext|>")
    return [token for one in documents for token in [*tokenizer.encode(one).ids, eos]]


@torch.no_grad()
@torch.no_grad()
def brute_force(folder, ids, seq_len, stride):
    """(position, nats) of every token but the first, each predicted alone from all that its window has before it."""
    model, losses, end = load_run(folder / "c.pt")[0], {}, 0
    for begin in range(0, len(ids), stride):
        for at in range(end + 1, min(begin + seq_len, len(ids) - 1) + 1):
            # The last window is shifted back to be whole.
            context = ids[max(0, min(begin, len(ids) - 1 - seq_len)):at]
            losses[at] = -model(torch.tensor([context]))[0, -1].log_softmax(-1)[ids[at]].item()
        end = min(begin + seq_len, len(ids) - 1)
    return losses


def test_the_runs_own_validation_set_is_found_from_any_folder(run_folder, tmp_path):
    found = json.loads(shown(main, tmp_path, "--checkpoint-path", run_folder / "c.pt", "--no-amp", "--json"))
    assert found["loss"] == evaluate(run_folder)["loss"]


def test_the_command_repeats_the_runs_own_validation_loss(run_folder):
    rows = map(json.loads, (run_folder / "c.metrics.jsonl").read_text().splitlines())
    row = [row for row in rows if "val/loss" in row][-1]
    own, named = evaluate(run_folder), evaluate(run_folder, "--data", "a.txt", "b.txt", "--batch-size", 3)
    for found in (own, named):
        for name, value in (("loss", found["loss"]), ("ppl", found["ppl"]), ("bits_per_byte", found["bits_per_byte"]),
                            *((f"loss/{name}", found["sources"][name]["loss"]) for name in "ab")):
            assert value == pytest.approx(row[f"val/{name}"], rel=1e-6), name
    shards = next(run_folder.glob("cache/*/val.bin")).parent.rename(run_folder / "shards")
    try:  # of a run on token shards, which lie where it found them
        assert own_validation_set(dict(config=dict(cache_dir="none", train_data=[str(shards)]),
                                       identity={"the validation data": read_meta(shards)["fingerprint"]["val"]}))
    finally:
        shards.rename(run_folder / "cache" / "shards")
    for name, each in named["sources"].items():
        alone = evaluate(run_folder, "--data", f"{name}.txt")
        assert each == {figure: pytest.approx(alone[figure], rel=1e-6) for figure in ("loss", "ppl", "bits_per_byte")}
        assert own["sources"][name] == each | {"bits_per_byte": None}, "shards count only the bytes of all"
    assert own["step"] == 20 and own["seq_len"] == 32 and own["clusters"] == "60 documents"
    assert own["ci95"][0] < own["loss"] < own["ci95"][1]


@pytest.mark.parametrize("tokens", [64, 1024])
def test_of_some_windows_each_text_counts_by_its_own_size(run_folder, tokens):
    """Though a.txt has more of them; of 64 tokens there is one window of each."""
    found = evaluate(run_folder, "--data", "a.txt", "b.txt", "--eval-tokens", tokens)
    sizes = {name: (len(encoded(run_folder, f"{name}.txt")) - 1) // 32 for name in ("a", "b")}
    assert found["tokens"] == tokens and sizes["a"] > sizes["b"]
    assert tokens > 64 or found["clusters"] == "2 parts of the text"
    mean = sum(found["sources"][name]["loss"] * size for name, size in sizes.items()) / sum(sizes.values())
    assert found["loss"] == pytest.approx(mean, rel=1e-9)
    assert found["ci95"][0] < mean < found["ci95"][1]


@pytest.mark.parametrize("stride", [7, pytest.param(32, marks=pytest.mark.full)])
def test_stride_equals_a_loop_over_single_tokens(run_folder, stride):
    ids = encoded(run_folder, "b.txt")
    expected = brute_force(run_folder, ids, 32, stride)
    found = evaluate(run_folder, "--data", "b.txt", "--stride", stride)
    assert found["tokens"] == len(expected) == len(ids) - 1
    long = max(32, math.ceil(len(expected) / 30))
    nats = [[expected[at] for at in range(first, min(first + long, len(ids)))] for first in range(1, len(ids), long)]
    assert found["clusters"] == f"{len(nats)} parts of the text", "as many as without a stride"
    assert found["ci95"] == pytest.approx(interval(np.array([sum(part) for part in nats]),
                                                   np.array([len(part) for part in nats])), rel=1e-5)
    assert found["loss"] == pytest.approx(sum(expected.values()) / len(expected), rel=1e-5)
    n_bytes = len((run_folder / "b.txt").read_bytes())
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) * len(ids) / n_bytes, rel=1e-9)


def test_perplexity_equals_that_of_transformers_on_the_same_windows(run_folder):
    import transformers

    export(run_folder / "c.pt", run_folder / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run_folder / "hf").eval()
    ids = torch.tensor(encoded(run_folder, "b.txt"))
    with torch.no_grad():
        losses = [theirs(ids[None, i:i + 25], labels=ids[None, i:i + 25]).loss.item()
                  for i in range(0, len(ids) - 24, 24)]
    found = evaluate(run_folder, "--data", "b.txt", "--seq-len", 24)
    assert found["ppl"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5) and found["tokens"] == 24 * len(losses)


def test_as_many_texts_as_a_shell_gives_take_no_file_each(tmp_path):
    paths = [str(tmp_path / f"{i}.txt") for i in range(100)]
    for i, path in enumerate(paths):
        Path(path).write_text(f"text {i}")
    tokenizer, saved = load_tokenizer("byte"), dict(config={}, identity={"the tokenizer": ""})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, before[1]))
    try:
        shards, _ = open_data(paths, "", 4, tokenizer, None, saved, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert {name: tokenizer.decode(shard.read(0, shard.count)) for name, shard in shards.items()} == {
        str(i): f"text {i}" for i in range(100)}


def test_sliding_windows_cover_each_target_once_with_the_context_promised(tmp_path):
    writer = ShardWriter(tmp_path / "s.bin", 1000, None, bytes(32))
    writer.write(range(1000))
    writer.close()
    shard = Shard(tmp_path / "s.bin")
    for seq_len, stride in ((64, 64), (64, 13), (64, 1), (2000, 5)):
        seen = []
        for _, firsts, x, y in window_batches({"": shard}, seq_len, stride, 0, 8):
            assert np.array_equal(x[:, 0], firsts)
            row, column = np.nonzero(y != IGNORE)
            assert np.array_equal(y[row, column], x[row, column] + 1)
            seen += y[row, column].tolist()
            assert all(column[row == i].min() >= seq_len - stride for i in range(len(x)) if firsts[i])
        assert seen == list(range(1, 1000))
    assert list(sliding_windows(10, 4, 3)) == [(0, 4), (3, 3), (6, 3)]


def test_windows_of_a_small_stride_take_no_memory_before_they_are_computed(tmp_path):
    writer = ShardWriter(tmp_path / "s.bin", 256, None, bytes(32))
    writer.write(np.zeros(100_000))
    writer.close()
    shards = {"": Shard(tmp_path / "s.bin")}
    tracemalloc.start()
    try:
        next(window_batches(shards, 16, 1, 0, 4))
        assert tracemalloc.get_traced_memory()[1] < 10**5, "9 million bytes in a list"
    finally:
        tracemalloc.stop()


def test_the_interval_holds_the_truth_19_times_in_20():
    """Clusters of 1 to 40 tokens, the tokens of one alike: 300 draws of 200 clusters around a mean of 3."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        sizes = rng.integers(1, 40, 200)
        low, high = interval(rng.normal(3, 1, 200) * sizes, sizes)
        hits += low < 3 < high
    assert 0.91 < hits / 300 < 0.98


def test_the_interval_of_one_long_text_holds_its_truth(tmp_path, monkeypatch):
    """Losses that stay alike over some 100 tokens, as within a scene: 100 texts of 20,000 tokens, around a mean of 3.
    Clusters of --seq-len tokens hold it in 80 of them."""
    rng, hits, drawn = np.random.default_rng(0), 0, None
    shard = SimpleNamespace(count=20_001, eos=None, windows=lambda seq_len: 20_000 // seq_len)
    batch = np.arange(20_000).reshape(-1, 40)
    monkeypatch.setattr(evaluate_module, "window_batches", lambda *_: [("", batch[:, 0], batch, batch)])
    monkeypatch.setattr(evaluate_module, "token_nats", lambda *_: torch.from_numpy(drawn).view(-1, 40))
    cfg = evaluate_module.EvaluateConfig()
    for _ in range(100):
        drawn = 3 + np.repeat(rng.normal(0, 1, 200), 100) + rng.normal(0, 1, 20_000)
        found = evaluate_module.evaluate_text(None, {"": shard}, {"": 4.0}, cfg, 40, SimpleNamespace(name="off"))
        hits += found["ci95"][0] < 3 < found["ci95"][1]
    assert found["clusters"] == "30 parts of the text" and 88 <= hits <= 99, hits


def test_the_interval_of_few_clusters():
    assert interval(np.array([2.0, 5.0]), np.array([1, 1])) == pytest.approx([3.5 - 1.96 * 1.5, 3.5 + 1.96 * 1.5])
    assert interval(np.array([6.0]), np.array([6])) is None


def test_its_clusters_are_the_documents(run_folder, tmp_path):
    """Token by token: which document a target is in, and its loss."""
    model, tokenizer, eos, saved = load_run(run_folder / "c.pt")
    shards, _ = open_data([str(run_folder / "a.txt")], "", 32, tokenizer, eos, saved, tmp_path)
    ids = torch.from_numpy(shards[""].read(0, shards[""].count).astype(np.int64))
    nats, tokens = [0.0], [0]
    for first in range(0, len(ids) - 32, 32):
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids[None, first:first + 32])[0],
                                                       ids[first + 1:first + 33], reduction="none")
        for place, loss in enumerate(losses.tolist(), first + 1):
            if ids[place - 1] == eos:
                nats.append(0.0)
                tokens.append(0)
            nats[-1], tokens[-1] = nats[-1] + loss, tokens[-1] + 1
    found = evaluate(run_folder, "--data", "a.txt")
    assert found["clusters"] == f"{len(nats)} documents" and found["tokens"] == sum(tokens)
    expected = interval(np.array(nats), np.array(tokens))
    assert found["ci95"] == pytest.approx(expected) and np.diff(found["ci95"]) == pytest.approx(np.diff(expected), 1e-4)


def test_a_perplexity_beyond_all_numbers_is_infinite():
    assert figures(800.0, 4.0)["ppl"] == math.inf and figures(0.0, 4.0)["ppl"] == 1


def test_the_report_in_words(run_folder):
    done = command(run_folder, "--checkpoint-path", "c.pt", "--data", "a.txt", "--no-amp", script="evaluate.py")
    found = evaluate(run_folder, "--data", "a.txt")
    assert f"loss {found['loss']:.4f} nats per token (95 %: " in done.stdout
    assert f"over {found['clusters']})" in done.stdout
    figures = f"perplexity {found['ppl']:.2f}, {found['bits_per_byte']:.4f} bits per byte"
    assert f"\n{figures}\n" in done.stdout
    for flags, of_each in ((["--data", "a.txt", "b.txt"], figures), ([], figures.partition(",")[0])):
        words = shown(main, run_folder, "--checkpoint-path", "c.pt", "--no-amp", *flags)
        assert f"\nloss {found['loss']:.4f}, {of_each} on a\n" in words, words


@pytest.mark.parametrize("flags, words", [
    (["--data", "none.txt"], "--data none.txt: no such file"),
    (["--data", "empty.txt"], "--data empty.txt: the file is empty"),
    (["--data", "short.txt"], "6 tokens are fewer than one window of --seq-len 32 + 1"),
    (["--data", "a.txt", "--seq-len", "65"], "--seq-len 65 is above the model's 32 positions"),
    (["--data", "a.txt", "--stride", "33"], "--stride 33 is above --seq-len 32"),
    (["--data", "a.txt", "--stride", "3", "--eval-tokens", "64"], "leave out --eval-tokens"),
    (["--data", "a.txt", "--strid", "3"], "did you mean --stride?"),
    (["--data", "shards"], "shards of another tokenizer"),
    (["--data", "tokens.bin"], "--data tokens.bin: a token file of another tokenizer"),
    (["--checkpoint-path", "moved.pt"], "--data is missing")])
def test_a_mistake_gets_one_line(run_folder, flags, words, monkeypatch, capsys):
    (run_folder / "empty.txt").write_text("")
    (run_folder / "short.txt").write_text("short")
    (run_folder / "tokens.bin").write_bytes(bytes(1000))
    if flags[-1] == "shards" and not (run_folder / "shards").exists():
        shutil.copytree(next((run_folder / "cache").iterdir()), run_folder / "shards")
        meta = json.loads((run_folder / "shards" / "meta.json").read_text())
        (run_folder / "shards" / "meta.json").write_text(json.dumps(meta | {"tokenizer_hash": "0" * 64}))
    if flags[-1] == "moved.pt":  # a checkpoint without its cache
        from mini_llm.archive import save

        saved = load_run(run_folder / "c.pt")[3]
        save(run_folder / "moved.pt", saved | {"tokens": "gone", "config": saved["config"] | {"cache_dir": "gone"}})
        shutil.copytree(run_folder / "c.tokenizer", run_folder / "moved.tokenizer")
    path = [] if flags[0] == "--checkpoint-path" else ["--checkpoint-path", "c.pt"]
    monkeypatch.chdir(run_folder)
    assert words in refused(main, [*path, *flags], monkeypatch, capsys)


@pytest.mark.full
def test_lm_eval_scores_the_exported_folder_with_a_local_task(run_folder):
    """EleutherAI's harness, where it is installed: its log-likelihoods are ours."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    export(run_folder / "c.pt", run_folder / "lm")
    tasks = ROOT / "tests" / "lm_eval_task"
    shutil.copy(tasks / "next_word.jsonl", run_folder)
    done = subprocess.run([sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args",
                           "pretrained=lm,dtype=float32", "--tasks", "next_word", "--include_path", str(tasks),
                           "--device", "cpu", "--output_path", "out", "--log_samples"], cwd=run_folder,
                          capture_output=True, text=True,
                          env=environment(OMP_NUM_THREADS="1", HF_DATASETS_CACHE=str(run_folder / "datasets")))
    assert done.returncode == 0, done.stderr
    model, tokenizer, _, _ = load_run(run_folder / "c.pt")
    samples = [json.loads(line) for file in run_folder.glob("out/**/samples_*.jsonl") for line in open(file)]
    assert len(samples) == 3
    for sample in samples:
        for choice, theirs in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            context, whole = (tokenizer.encode(text).ids for text in (sample["doc"]["text"],
                                                                      f"{sample['doc']['text']} {choice}"))
            with torch.no_grad():
                logs = model(torch.tensor([whole[:-1]]))[0].log_softmax(-1)
            ours = sum(logs[at - 1, whole[at]].item() for at in range(len(context), len(whole)))
            assert float(theirs[0]) == pytest.approx(ours, abs=1e-3)


def test_a_hugging_face_folder_is_evaluated_as_the_checkpoint_it_was_made_of(run_folder, capsys, monkeypatch):
    export(run_folder / "c.pt", str(run_folder / "exported"))
    flags = ["--data", "a.txt", "b.txt", "--seq-len", "32"]
    ours, theirs = evaluate(run_folder, *flags), evaluate(run_folder, *flags, "--checkpoint-path", "exported")
    assert theirs.pop("checkpoint") == "exported" and theirs.pop("step") is None
    assert {name: theirs[name] for name in theirs} == {name: ours[name] for name in theirs}
    folder = ["--checkpoint-path", str(run_folder / "exported")]
    assert "--data is missing: a Hugging Face folder" in refused(main, folder, monkeypatch, capsys)
    (empty := run_folder / "empty").mkdir()
    said = refused(main, ["--checkpoint-path", str(empty), "--data", str(run_folder / "a.txt")], monkeypatch, capsys)
    assert f"error: --checkpoint-path {empty}: no config.json" in said
    with pytest.raises(UserError, match="give the .pt file"):
        export(run_folder / "exported", str(run_folder / "again"))
