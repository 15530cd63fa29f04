import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zygote
from conftest import ROOT, environment
from test_faults import SMALL_FILES

import export
import model
from generate import generate
from mini_llm.errors import UserError
from mini_llm.hugging_face import hugging_face_config, to_hugging_face
from mini_llm.pretrained import load_model, load_run
from model import ARCHS, GPTConfig

PROMPT = "The king sings"


def greedy_ids(model, prompt):
    """The 32 ids that continue the prompt."""
    return [token for token, in generate(model, [prompt], 32, temperature=0)]


# Runs where nothing of ours can be imported: loads folders with transformers, and notes what it computes.
STRANGER = """
import importlib.util, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for name in ("checkpoint", "model", "pretrained", "tokenizer", "train"):
    assert importlib.util.find_spec(name) is None, name
windows, prompt, found, *folders = sys.argv[1:]
windows, results = torch.load(windows), {}
for folder in folders:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
        greedy = model.generate(**ids, do_sample=False, max_new_tokens=32)[0]
        drawn = model.generate(**ids, max_new_tokens=8)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    results[folder] = dict(logits=logits[:4].clone(), loss=loss.item(), greedy=greedy, text=tokenizer.decode(greedy),
                           sampling=[model.generation_config.temperature, model.generation_config.top_k],
                           eos=[model.generation_config.eos_token_id, tokenizer.eos_token_id])
torch.save(results, found)
"""


def command(*flags, cwd):
    return zygote.run([sys.executable, ROOT / "export.py", *flags], cwd, environment())


@pytest.fixture(scope="module")
def exported(tuned, tmp_path_factory):
    """arch → (folder that export.py wrote, checkpoint): gpt2's by the command, the others by its function."""
    parent, found = tmp_path_factory.mktemp("exported"), {}
    for arch, (_, run) in tuned.items():
        found[arch] = parent / arch, run.checkpoint
        if arch != "gpt2":
            export.export(run.checkpoint, str(parent / arch))
            continue
        done = command("--checkpoint-path", run.checkpoint, "--output", parent / arch, cwd=parent)
        assert done.returncode == 0 and done.stdout == f"wrote {parent / arch}\n" and not done.stderr, done.stderr
    return found


@pytest.fixture(scope="module")
def stranger(exported, val_windows, tmp_path_factory):
    """arch → what a process without our modules computes from its folder."""
    folder = tmp_path_factory.mktemp("stranger")
    torch.save(val_windows, folder / "windows.pt")
    (folder / "stranger.py").write_text(STRANGER)
    done = subprocess.run([sys.executable, "-I", "stranger.py", "windows.pt", PROMPT, "found.pt",
                           *(str(output) for output, _ in exported.values())], cwd=folder, capture_output=True,
                          text=True, env=environment(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    results = torch.load(folder / "found.pt")
    return {arch: results[str(output)] for arch, (output, _) in exported.items()}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_process_without_our_modules_computes_the_same(stranger, exported, tuned, val_windows, arch):
    from tokenizers import Tokenizer

    theirs, (folder, checkpoint) = stranger[arch], exported[arch]
    ours, _ = load_model(checkpoint)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.no_grad():
        assert torch.allclose(ours(val_windows[:4, :-1]), theirs["logits"], atol=1e-4)
    # The perplexity is the one that the run itself reported at its end, over its whole validation set.
    reported = tuned[arch][1].rows[40]["val/loss"]
    assert torch.tensor(theirs["loss"]).exp().item() == pytest.approx(torch.tensor(reported).exp().item(), rel=1e-4)
    prompt = tokenizer.encode(PROMPT).ids
    greedy = prompt + greedy_ids(ours, prompt)
    assert greedy == theirs["greedy"].tolist() and tokenizer.decode(greedy) == theirs["text"]
    assert theirs["text"].startswith(PROMPT) and len(theirs["text"]) > len(PROMPT) + 20
    assert theirs["sampling"] == [0.8, 50] and theirs["eos"] == [256, 256]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "who may read one file may read all"


def test_every_loader_finds_ropes_base_and_what_an_empty_prompt_is(exported):
    config = json.loads((exported["llama"][0] / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    for folder, checkpoint in exported.values():
        assert load_run(folder)[3]["start"] == load_run(checkpoint)[3]["start"]


def test_a_model_that_transformers_cannot_hold_is_refused():
    odd = dict(d_model=256, n_heads=6, head_dim=64, vocab_size=300)
    with pytest.raises(UserError, match="holds no --d-model 256 that --n-heads 6"):
        hugging_face_config(GPTConfig(arch="llama", **odd))
    assert hugging_face_config(GPTConfig(arch="qwen3", **odd)).head_dim == 64
    for changes in dict(n_kv_heads=2), dict(head_dim=32):
        with pytest.raises(UserError, match="GPT-2 has as many key/value heads as query heads, of d_model / n_heads"):
            hugging_face_config(GPTConfig(arch="gpt2", d_model=256, n_heads=4, vocab_size=300, **changes))


def test_what_the_code_has_been_changed_to_and_transformers_has_not_is_refused(exported, tmp_path, monkeypatch):
    attend = model.attend
    with monkeypatch.context() as changed, pytest.raises(UserError, match="gives other logits than model.py"):
        changed.setattr(model, "attend", lambda q, k, v, dropout: attend(q, k, v.roll(1, dims=2), dropout))
        export.export(exported["qwen3"][1], tmp_path / "out")
    with monkeypatch.context() as changed, pytest.raises(UserError, match="differ in model.norm.weight: it cannot"):
        changed.setattr(export, "to_hugging_face", lambda cfg, state: to_hugging_face(
            cfg, {name: tensor for name, tensor in state.items() if name != "norm.weight"}))
        export.export(exported["qwen3"][1], tmp_path / "out")
    with pytest.raises(UserError, match="--arch qwen3: transformers' class has no blocks.0.mlp.router.weight, and"):
        to_hugging_face(GPTConfig(arch="qwen3"), {"blocks.0.mlp.router.weight": torch.zeros(4, 256)})
    assert not list(tmp_path.iterdir())


def test_a_model_is_compared_on_one_document():
    class Model:
        cfg = GPTConfig(vocab_size=257)

        def __call__(self, tokens):
            assert tokens.shape[1] in (1, 300) and 256 not in tokens, "an end of text, after which it may begin anew"
            return torch.ones(1, 1)

    for length in (1, 300):
        export._require_same_model(Model(), lambda tokens: SimpleNamespace(logits=torch.ones(1, 1)), length, eos=256)


def test_ids_without_a_token_are_never_drawn(exported):
    qwen3, gpt2 = (json.loads((exported[arch][0] / "generation_config.json").read_text()) for arch in ("qwen3", "gpt2"))
    assert qwen3["suppress_tokens"] == [257, 258, 259] and "suppress_tokens" not in gpt2


def test_the_card_says_what_was_trained_on_what(exported, tuned, text, tmp_path):
    card = (exported["qwen3"][0] / "README.md").read_text()
    run = tuned["qwen3"][1]
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n---\n\n# qwen3\n" in card
    saved = torch.load(run.checkpoint, weights_only=True)
    tokens = re.search(r"total tokens: (\S+) train, (\S+) val", run.out)
    for word in (f"`{text}` | {tokens[1]} | `{saved['identity']['the training data']}`", tokens[2], "base model",
                 f"{saved['state']['tokens']:,} tokens", "257 tokens, and 3 ids without meaning", "lr = 0.01",
                 f"training loss: {run.rows[40]['train/loss']:.4f}", f"validation loss: {run.rows[40]['val/loss']:.4f}",
                 f"started from | `{tuned['qwen3'][0]}`"):
        assert word in card, word
    assert "Weights & Biases" not in card
    for file in run.checkpoint.parent.glob("qwen3.*"):  # without metrics the checkpoint says what it knows
        if file.suffix != ".jsonl":
            (shutil.copytree if file.is_dir() else shutil.copy)(file, tmp_path / file.name)
    with open(tmp_path / "qwen3.log", "a") as log:
        for run_id in "old", "abc":  # it has been sent as a new run since
            log.write(f"[2026-01-01 00:00:00] wandb: run {run_id} (swift-sun-3) at https://wandb.ai/me/p/runs/{run_id}\n")
    export.export(tmp_path / "qwen3.pt", str(tmp_path / "out"), "bfloat16")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"best validation loss so far: {saved['state']['best_val']:.4f}" in card and "(bfloat16)" in card
    assert re.findall("https://wandb.ai.*", card) == ["https://wandb.ai/me/p/runs/abc"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_card_of_a_run_with_histograms_takes_no_memory_for_them(tuned, tmp_path):
    run = tuned["qwen3"][1]
    trained, _, _, saved = load_run(run.checkpoint)
    row = {"step": 1, "time": 1.0, "val/loss": 2.5, "gradients/x": dict(counts=list(range(1000, 11_000)))}
    (tmp_path / "qwen3.metrics.jsonl").write_text((json.dumps(row) + "\n") * 50)
    tracemalloc.start()
    card = export.model_card(tmp_path / "qwen3.pt", trained, saved, 257, "float32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "best validation loss so far: 2.5" in card
    assert peak < 5e6, "a row has 0.4 MB, all together 18"


@pytest.mark.parametrize("flags, words", [
    (["--output", "there"], ["--output there", "--overwrite"]), ([], ["--output is missing"]),
    (["--output", "file", "--overwrite"], ["--output file", "is a file"]),
    (["--output", "/proc/no"], ["--output /proc/no", "can be written"]),
    (["--output", "out", "--checkpoint-path", "nowhere.pt"], ["nowhere.pt is missing"]),
    (["--output", "out", "--dtype", "float8"], ["--dtype float8", "bfloat16"])])
def test_wrong_input_gets_one_line_that_names_it(tuned, tmp_path, monkeypatch, capsys, flags, words):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export.py", "--checkpoint-path", str(tuned["gpt2"][1].checkpoint), *flags])
    with pytest.raises(SystemExit) as end:
        export.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
    assert all(word in error for word in words), error


def test_a_full_disk_leaves_the_folder_as_it_was(tuned, tmp_path):
    (script := tmp_path / "small_files.py").write_text(SMALL_FILES)
    (folder := tmp_path / "here").mkdir()
    limited = [sys.executable, script, ROOT / "export.py", "--checkpoint-path", tuned["gpt2"][1].checkpoint, "--output",
               "out"]
    run = zygote.run(limited, folder, environment())
    assert run.returncode == 2 and run.stderr.startswith("error: --output out: ") and run.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []
    (folder / "out").mkdir()
    (folder / "out" / "config.json").write_text("another's")
    run = zygote.run([*limited, "--overwrite"], folder, environment())
    assert run.returncode == 2 and [path.name for path in folder.rglob("*")] == ["out", "config.json"]
    assert (folder / "out" / "config.json").read_text() == "another's"


def test_a_file_system_without_rights_is_exported_to(tuned, tmp_path, monkeypatch):
    def chmod(path, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(export.Path, "chmod", chmod)
    export.export(tuned["gpt2"][1].checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_export_is_on_the_disk_before_it_replaces_another(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "sync_path", (synced := []).append)
    export.export(tuned["gpt2"][1].checkpoint, folder := tmp_path / "out")
    *drafts, last = synced
    assert {path.name for path in drafts} == {path.name for path in folder.iterdir()} and last == folder
    assert folder not in {path.parent for path in drafts}


def test_a_disk_on_which_macos_keeps_a_second_file_for_each_is_exported_to(tuned, tmp_path, monkeypatch):
    """Such as exFAT: ._NAME appears with NAME, and goes where that goes."""
    def write(*args):
        write_tokenizer(*args)
        for file in list(args[-1].iterdir()):
            file.with_name(f"._{file.name}").touch()

    def replace(file, target):
        os.replace(file, target)
        with contextlib.suppress(FileNotFoundError):
            os.replace(file.with_name(f"._{file.name}"), target.with_name(f"._{target.name}"))

    write_tokenizer = export._write_tokenizer
    monkeypatch.setattr(export, "_write_tokenizer", write)
    monkeypatch.setattr(export.Path, "replace", replace)
    export.export(tuned["gpt2"][1].checkpoint, folder := tmp_path / "out")
    assert (folder / "model.safetensors").exists() and (folder / "._model.safetensors").exists()


def test_an_earlier_export_leaves_nothing_that_would_be_loaded(tuned, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, folder = tuned["gpt2"][1], tmp_path / "out"
    folder.mkdir()
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (folder / "model-00001-of-00002.safetensors").write_text("of a larger model")
    (folder / "pytorch_model-00001-of-00002.bin").write_text("of a larger model")
    kept = "notes.txt", "vocab.py", "model-before.safetensors", "pytorch_model.bin.old", "tokenizer-before.json"
    for name in kept:
        (folder / name).write_text("kept")
    export.export(run.checkpoint, folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == load_model(run.checkpoint)[0].num_params()
    assert not list(folder.glob("*-00001-of-*")) and {(folder / name).read_text() for name in kept} == {"kept"}


@pytest.mark.full
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_ctranslate2_computes_the_same(exported, tmp_path, arch):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="pip install ctranslate2: an engine of its own")
    from tokenizers import Tokenizer

    folder, checkpoint = exported[arch]
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / arch))
    engine = ctranslate2.Generator(str(tmp_path / arch), device="cpu", compute_type="float32")
    prompt, (ours, _) = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT), load_model(checkpoint)
    with torch.no_grad():
        expected = ours(torch.tensor([prompt.ids]))
    logits = torch.tensor(np.array(engine.forward_batch([prompt.tokens])))
    assert torch.allclose(logits, expected, atol=1e-4)
    greedy = engine.generate_batch([prompt.tokens], max_length=32, sampling_topk=1, include_prompt_in_result=False)
    assert greedy[0].sequences_ids[0] == greedy_ids(ours, prompt.ids)


def test_the_exported_tokenizer_puts_nothing_around_a_text(tuned, tmp_path):
    """As training had it, though Llama's and BERT's do."""
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    shutil.copy(tuned["qwen3"][1].checkpoint, tmp_path / "c.pt")
    shutil.copytree(tuned["qwen3"][1].checkpoint.with_suffix(".tokenizer"), tmp_path / "c.tokenizer")
    file = tmp_path / "c.tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    bare = tokenizer.encode(PROMPT).ids
    tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", pair=None,
                                                             special_tokens=[("<|endoftext|>", 256)])
    tokenizer.save(str(file))
    assert tokenizer.encode(PROMPT).ids == [256, *bare]
    export.export(tmp_path / "c.pt", str(tmp_path / "hf"))
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(PROMPT)["input_ids"] == bare


def test_a_tokenizer_that_does_not_encode_every_text_is_exported(tuned, tmp_path):
    """Of words, say: it raises an error for one that it does not know."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    shutil.copy(tuned["qwen3"][1].checkpoint, tmp_path / "c.pt")
    shutil.copytree(tuned["qwen3"][1].checkpoint.with_suffix(".tokenizer"), tmp_path / "c.tokenizer")
    words = Tokenizer(models.WordLevel({"the": 0, "king": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "c.tokenizer" / "tokenizer.json"))
    export.export(tmp_path / "c.pt", str(tmp_path / "hf"))
    assert Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).encode("the king").ids == [0, 1]
    assert load_run(tmp_path / "hf")[3]["prefix"] == []
    (tmp_path / "c.tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="tokenizer_config.json is damaged: no such file"):
        export.export(tmp_path / "c.pt", str(tmp_path / "again"))
