"""The changes that docs/extending.md proposes: each is applied to a copy of the code, which then trains."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zygote
from conftest import ROOT, Run, environment

from data import Corpus, DataConfig, permute
from mini_llm.config import part_of
from mini_llm.pretrained import load_run
from mini_llm.shards import read_windows
from mini_llm.tokenizer import open_tokenizer
from model import GPT, GPTConfig

PAGE = (ROOT / "docs/extending.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
DIFFS = {title: diff for title, body in SECTIONS.items() for diff in re.findall(r"```diff\n(.*?)```", body, re.S)}
# Reports at every step, in fp32.
EVERY = "--num-steps", 12, "--warmup-steps", 2, "--log-steps", 1, "--eval-steps", 6, "--no-amp"

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git apply is not there")


@pytest.fixture
def changed(trainer, tmp_path):
    """`changed(title, *flags, ranks=None, …)` trains with the code as changed by the diff under that title."""
    def run(title, *flags, checkpoint="changed.pt", **options):
        code = tmp_path / "code"
        if not code.exists():
            code.mkdir()
            for file in ROOT.glob("*.py"):
                shutil.copy(file, code)
            shutil.copytree(ROOT / "mini_llm", code / "mini_llm")
            patch = dict(input=DIFFS[title], text=True, cwd=code, capture_output=True)
            if subprocess.run(["git", "apply", "--reverse", "--check"], **patch).returncode:
                done = subprocess.run(["git", "apply"], **patch)  # unless the change has been taken up
                assert done.returncode == 0, done.stderr
        command = trainer.arguments([*EVERY, *flags], checkpoint=checkpoint, **options)
        command = [part.replace(str(ROOT), str(code)) for part in command]
        done = zygote.run(command, tmp_path, environment())
        assert done.returncode == 0, done.stdout + done.stderr
        return Run(done, tmp_path, checkpoint)

    return run


@pytest.fixture
def as_it_is(trainer):
    return lambda *flags, **options: trainer(*EVERY, *flags, checkpoint="plain.pt", **options)


def branched(changed, title, *flags, **options):
    """(a run, one that was resumed from its checkpoint of step 6)"""
    whole = changed(title, *flags, "--save-steps", 6, "--keep-every", 6, **options)
    resumed = changed(title, *flags, "--resume", "changed.kept-00000006.pt", checkpoint="resumed.pt", **options)
    assert "Resumed at step 6" in resumed.out
    return whole, resumed


def decode(corpus, ids):
    return open_tokenizer(corpus.folder / "tokenizer").decode(ids.tolist())


def first_batch(run):
    """The initial weights of a run, and inputs and targets of its first step."""
    saved = torch.load(run.checkpoint, weights_only=True)
    corpus = Corpus(part_of(DataConfig, saved["config"]))
    torch.manual_seed(1337)
    model = GPT(part_of(GPTConfig, saved["config"] | dict(vocab_size=257)))
    return model, corpus, *map(torch.from_numpy, corpus.batch(step=0, batch_size=4))


def test_every_diff_is_tested():
    tests = (ROOT / "tests/test_extending.py").read_text()
    assert all(f'"{title}"' in tests for title in DIFFS) and len(DIFFS) == PAGE.count("```diff")


def test_schedule(changed):
    run = changed("A learning rate schedule", "--lr-scheduler", "sqrt", "--decay-steps", 4, "--num-steps", 20,
                  "--lr", 1, "--min-lr", 0)
    decay = [row["lr"] for step, row in run.rows.items() if step > 15]
    assert decay == pytest.approx([1.0] + [1 - (step / 4) ** 0.5 for step in range(1, 5)])


@pytest.mark.parametrize("options", [{}, dict(ranks=2, script="train_fsdp.py")], ids=["one", "shards"])
def test_metric(changed, options):
    run = changed("A number in the reports", **options)
    norm = torch.stack([weight.norm() for weight in run.weights().values()]).norm()
    assert run.rows[12]["train/weight_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert f"weight norm {norm:.1f}" in run.out


def test_term_of_the_loss(changed, as_it_is):
    run, plain = changed("A term in the loss", "--z-loss", 0.01), as_it_is()
    model, _, x, y = first_batch(plain)
    logits = model(x)
    expected = F.cross_entropy(logits.flatten(0, 1), y.flatten()) + 0.01 * logits.logsumexp(-1).square().mean()
    assert run.rows[1]["train/loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert run.rows[0]["val/loss"] == plain.rows[0]["val/loss"]
    assert run.rows[12]["val/loss"] != plain.rows[12]["val/loss"]


def test_architecture(changed, tmp_path):
    run = changed("An architecture", "--arch", "parallel", "--n-kv-heads", 1)
    assert run.rows[12]["train/loss"] < run.rows[1]["train/loss"]
    assert not any("mlp_norm" in name for name in run.weights())
    for script, flags, code, said in (("generate.py", ["--prompt", "the king"], 0, "the king"),
                                      ("export.py", ["--output", "out"], 2, "transformers has no such model")):
        command = sys.executable, tmp_path / "code" / script, "--checkpoint-path", "changed.pt", *flags
        done = zygote.run(command, tmp_path, environment())
        assert done.returncode == code and said in done.stdout + done.stderr, done.stderr


def test_optimizer(changed):
    whole, resumed = branched(changed, "An optimizer", "--optimizer", "nadam")
    assert whole.rows[12]["train/loss"] < whole.rows[1]["train/loss"]
    assert same(whole.weights(), resumed.weights())


def test_optimizer_sharded(changed):
    title, flags = "An optimizer", ["--optimizer", "nadam", "--batch-size", 2]
    sharded = changed(title, *flags, ranks=2, script="train_fsdp.py")
    replicas = changed(title, *flags, ranks=2, checkpoint="replicas.pt")
    assert sharded.losses() == pytest.approx(replicas.losses(), abs=1e-5)


def test_frozen(changed, as_it_is):
    initial = as_it_is("--num-steps", 1).weights()
    whole, resumed = branched(changed, "Training only some of the weights", "--init-from", "plain.pt",
                              "--weight-decay", 1, ranks=2, script="train_fsdp.py")
    for name, weight in whole.weights().items():
        trained = name.startswith(("blocks.1.", "norm."))
        assert torch.equal(weight, initial[name][:len(weight)]) is not trained, name
    assert same(whole.weights(), resumed.weights())


@pytest.mark.parametrize("options", [{}, dict(ranks=2), dict(ranks=2, script="train_fsdp.py")],
                         ids=["one", "replicas", "shards"])
def test_state(changed, options):
    # An embedding so large that ranks get it by itself (DDPWorld.SENT_LATER).
    whole, resumed = branched(changed, "Something with state: an average of the weights", "--vocab-size", 2048,
                              **options)
    averages = [torch.load(run.checkpoint, weights_only=True)["ema"] for run in (whole, resumed)]
    assert same(*averages) and not same(whole.weights(), averages[0])
    row = whole.rows[12]
    assert row["val/ema_loss"] == resumed.rows[12]["val/ema_loss"] > row["val/loss"]  # as yet it lags behind


@pytest.mark.parametrize("options", [{}, dict(ranks=2, script="train_fsdp.py")], ids=["one", "shards"])
def test_the_best_by_an_average_of_the_weights(changed, tmp_path, options):
    """What the page says in brackets."""
    title = "Something with state: an average of the weights"
    changed(title, "--num-steps", 1, "--warmup-steps", 0)
    said = re.sub(r"\s+", " ", SECTIONS[title])
    for name, was, now in (("train.py", r"found = evaluate\(fast.*?\n +return [^\n]*", r"`(evaluate\(ema.*?)`"),
                           ("mini_llm/pretrained.py", r'weights = saved\["model"\]', r"`(weights = .*?)`")):
        (new,) = re.findall(now, said)
        code, new = (tmp_path / "code" / name).read_text(), "return " * (name == "train.py") + new
        code, n = re.subn(was, lambda _, new=new: new, code, flags=re.S)
        assert n == 1
        (tmp_path / "code" / name).write_text(code)
    flags = "--overwrite", "--lr", 0.01, "--batch-size", 2, "--eval-tokens", 0
    whole, resumed = branched(changed, title, *flags, **options)
    best = torch.load(tmp_path / "changed.best.pt", weights_only=True)
    assert same(*(torch.load(run.checkpoint, weights_only=True)["ema"] for run in (whole, resumed)))
    assert same(whole.weights(), resumed.weights()) and not same(best["model"], best["ema"])
    assert best["state"]["best_val"] == whole.rows[12]["val/loss"] == resumed.rows[12]["val/loss"]
    command = [sys.executable, tmp_path / "code/evaluate.py", "--checkpoint-path", "changed.best.pt"]
    done = zygote.run([*command, "--no-amp", "--json"], tmp_path, environment())
    assert json.loads(done.stdout)["loss"] == pytest.approx(whole.rows[12]["val/loss"], abs=1e-4), done.stderr


def test_evaluation(changed, tmp_path):
    questions = [dict(context="the king of", endings=[" and", " the sea", "zqj"], label=label) for label in (0, 1, 1)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    flags = "--choices", "questions.jsonl"
    run = changed("An evaluation", *flags)
    ranks = changed("An evaluation", *flags, "--batch-size", 2, ranks=2, script="train_fsdp.py", checkpoint="ranks.pt")
    model, tokenizer, *_ = load_run(run.checkpoint)
    context, losses = tokenizer.encode(questions[0]["context"]).ids, []
    for ending in questions[0]["endings"]:
        ending = tokenizer.encode(ending).ids
        nats = model(torch.tensor([context + ending])[:, :-1]).log_softmax(-1)[0, -len(ending):]
        losses.append(-nats[range(len(ending)), ending].mean().item())
    best = losses.index(min(losses))
    assert run.rows[12]["val/accuracy"] == sum(question["label"] == best for question in questions) / 3
    assert ranks.rows[12]["val/accuracy"] == run.rows[12]["val/accuracy"]
    assert ranks.rows[0]["val/accuracy"] == run.rows[0]["val/accuracy"]


def test_targets(changed, as_it_is, tmp_path):
    (tmp_path / "documents.txt").write_text("<|endoftext|>".join(["a king sings under the sea", "night"] * 400))
    flags = "--train-data", tmp_path / "documents.txt"
    run, plain = changed("Which tokens count", *flags), as_it_is(*flags)
    model, corpus, x, y = first_batch(plain)
    nats = model(x, y, reduction="none").view_as(y)
    counted = x != corpus.eos
    assert 0 < counted.sum() < counted.numel()
    assert run.rows[1]["train/loss"] == pytest.approx(nats[counted].mean().item(), abs=1e-5)
    assert plain.rows[1]["train/loss"] == pytest.approx(nats.mean().item(), abs=1e-5)
    assert run.rows[0]["val/loss"] == plain.rows[0]["val/loss"]


def test_documents(changed, as_it_is, tmp_path):
    """A window's loss is that of its documents, each by itself; a token of one changes no loss of the next."""
    (tmp_path / "documents.txt").write_text("<|endoftext|>".join(["a king sings under the sea", "night"] * 400))
    flags = "--train-data", tmp_path / "documents.txt", "--arch", "qwen3", "--n-kv-heads", 1
    plain = as_it_is(*flags)
    model, corpus, x, y = first_batch(plain)
    run = changed("Attention within documents", *flags, "--document-end", corpus.eos)
    nats = []
    for tokens, targets in zip(x, y, strict=True):
        ends = [0, *(tokens == corpus.eos).nonzero().flatten().tolist(), len(tokens)]
        nats += [model(tokens[None, a:b], targets[None, a:b], reduction="none") for a, b in pairwise(ends) if a < b]
    assert len(nats) > 8
    assert run.rows[1]["train/loss"] == pytest.approx(torch.cat(nats).mean().item(), abs=1e-5)
    assert abs(run.rows[1]["train/loss"] - plain.rows[1]["train/loss"]) > 1e-4
    ranks = changed("Attention within documents", *flags, "--document-end", corpus.eos, "--batch-size", 2, "--compile",
                    "--use-activation-checkpoint", ranks=2, script="train_fsdp.py", checkpoint="ranks.pt")
    assert ranks.losses() == pytest.approx(run.losses(), abs=1e-4)


def test_data(trainer, tmp_path):
    rows = "".join(f'{number},"a ""king"", and\nnight {number}"\n' for number in range(200))
    (tmp_path / "reviews.csv").write_text("id,review\n" + rows)
    [script] = re.findall(r"```python\n(.*?)```", SECTIONS["Data"], re.S)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    first, *others = map(json.loads, open(tmp_path / "reviews.jsonl"))
    assert first == {"text": 'a "king", and\nnight 0'} and len(others) == 199
    run = trainer("--train-data", "reviews.jsonl", "--num-steps", 2)
    assert run.code == 0, run.out + run.err


def test_data_made_when_read(changed, tmp_path):
    texts = [f"{a:03}+{b:03}={a + b:04}\n" for a in range(0, 1000, 40) for b in range(0, 1000, 7)]
    (tmp_path / "sums.txt").write_text("".join(texts))
    whole, resumed = branched(changed, "Data", "--train-data", tmp_path / "sums.txt", "--sums")
    assert same(whole.weights(), resumed.weights())
    assert torch.load(whole.checkpoint, weights_only=True)["identity"]["the training data"] == "sums"
    spec = importlib.util.spec_from_file_location("sums", tmp_path / "code/sums.py")
    spec.loader.exec_module(sums := importlib.util.module_from_spec(spec))
    model, corpus, *_ = first_batch(whole)
    shard = sums.Sums(1337, corpus.folder / "tokenizer")
    for a, b, c in re.findall(r"^(\d+)\+(\d+)=(\d+)$", corpus_text := decode(corpus, shard.read(0, 13 * 99)), re.M):
        assert int(a) + int(b) == int(c)
    assert decode(corpus, shard.read(500, 100)) == corpus_text[500:600] and corpus_text.count("=") == 99
    starts = permute(np.arange(4), shard.windows(32), 1337 * 1_000_003) * 32
    x, y = map(torch.from_numpy, read_windows(shard, starts, 32))
    assert whole.rows[1]["train/loss"] == pytest.approx(model(x, y).item(), abs=1e-5)


def test_mode(changed, as_it_is):
    flags = "--batch-size", 2
    run = changed("A mode", *flags, ranks=2, script="train_compressed.py")
    plain = as_it_is(*flags, ranks=2)
    assert run.losses() == pytest.approx(plain.losses(), abs=1e-3)
    assert not same(run.weights(), plain.weights())
    assert "through shared memory" not in run.out, "they have a hook of their own"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
