import dataclasses
import json
import pickle
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TUNED

from data import DataConfig, prepare
from mini_llm import pretrained
from mini_llm.archive import save
from mini_llm.checkpoint import plan
from mini_llm.config import parse
from mini_llm.errors import UserError
from mini_llm.hugging_face import gpt_config, hugging_face_config
from mini_llm.pretrained import SIZES, load_initial, load_model, load_run, resolve_init
from mini_llm.resume import FORMAT
from model import ARCHS, GPT, GPTConfig
from train import Config, World


@pytest.mark.parametrize("arch", ARCHS)
def test_the_first_loss_is_that_of_transformers_on_the_same_windows(tuned, val_windows, arch):
    import transformers

    folder, run = tuned[arch]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = theirs(val_windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), val_windows[:, 1:].flatten()).item()
    assert run.rows[0]["val/loss"] == pytest.approx(loss, abs=1e-4)
    assert run.rows[40]["val/loss"] < loss - 0.5  # and it is these weights that are trained


def test_the_resolved_configuration_has_the_sizes_of_the_weights(tuned):
    folder, run = tuned["qwen3"]
    resolved = run.checkpoint.with_name("qwen3.config.toml").read_text()
    logged = next(record for record in run.records if record.get("event") == "config")["config"]
    sizes = dict(arch="qwen3", n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ff=56, head_dim=16,
                 max_position_embeddings=64, vocab_size=260, tie_embeddings=False, init_from=str(folder))
    for name, value in sizes.items():
        assert f"{name} = {json.dumps(value)}\n" in resolved and logged[name] == value


def test_a_resumed_run_needs_the_folder_no_more(trainer, tuned):
    for file in tuned["gpt2"][1].checkpoint.parent.glob("gpt2.*"):
        (shutil.copytree if file.is_dir() else shutil.copy)(file, trainer.folder / file.name)
    config, gone = trainer.folder / "gpt2.config.toml", {"init_from", *SIZES}
    config.write_text("\n".join(line for line in config.read_text().splitlines() if line.split(" =")[0] not in gone))
    flags = ["--config", config, "--checkpoint-path", trainer.folder / "gpt2.pt", "--resume"]  # all but the model's
    without = parse(Config, list(map(str, flags)))
    model, init, _ = resolve_init(without, without.checkpoint.checkpoint_path)
    assert (model.n_heads, model.d_model) == (4, 32) and init.init_from == str(tuned["gpt2"][0])
    run = trainer(*flags, "--num-steps", 42, "--init-from", "gone", checkpoint="gpt2.pt", tiny=False, data=False,
                  env=dict(OMP_NUM_THREADS="1"))
    assert run.code == 0 and "Resumed at step 40" in run.out and run.rows[42], run.out + run.err
    assert "--init-from gone is not read" in run.out
    assert f'init_from = "{tuned["gpt2"][0]}"' in config.read_text() and "n_heads = 4\n" in config.read_text()


WRONG = {
    "layers": (["--n-layers", "3"], ["--n-layers 3", "have 2"]),
    "architecture": (["--arch", "qwen3"], ["--arch qwen3", "have gpt2"]),
    "heads alone": (["--n-heads", "6"], ["--n-heads 6", "have 4"]),
    "tied": (["--no-tie-embeddings"], ["--tie-embeddings False", "have True"]),
    "vocabulary": (["--vocab-size", "512"], ["--vocab-size 512", "have 257"]),
    "window above positions": (["--seq-len", "65"], ["--seq-len 65", "64 of --init-from"]),
    "tokenizer of the text": (["--tokenizer-name", "bpe"], ["--tokenizer-name", "they were trained with"]),
    "itself": (["--init-from", "x/c.best.pt", "--checkpoint-path", "x/c.pt", "--overwrite"],
               ["x/c.best.pt", "--overwrite would remove it", "another --checkpoint-path"]),
    "unknown name, to replace a run": (["--init-from", "no/such", "--checkpoint-path", "{file}.pt", "--overwrite"],
                                       ["no/such", "cannot be reached"]),
    "no weights": (["--init-from", "{empty}"], ["{empty}", "no config.json with *.safetensors"]),
    "unknown name offline": (["--init-from", "no/such"], ["no/such", "cannot be reached"]),
    "other model": (["--init-from", "{other}"], ["{other}", "model_type mistral"]),
    "no moments": (["--keep-optimizer"], ["--keep-optimizer", "no optimizer state; give a checkpoint"]),
    "moments of before --optimizer": (["--init-from", "{early}", "--keep-optimizer", "--seq-len", "8"],
                                      ["--keep-optimizer", "no optimizer state that this version can take"]),
    "no checkpoint": (["--init-from", "{file}"], ["--init-from", "{file}", "not a checkpoint of mini-llm"]),
}


@pytest.fixture
def argv(tuned, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {name: str(tmp_path / name) for name in ("empty", "other", "file", "early")}
    (tmp_path / "empty").mkdir()
    shutil.copytree(tuned["gpt2"][0], names["other"])
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "file").write_bytes(b"no checkpoint")
    (tmp_path / "file.pt").write_bytes(b"of a run before")
    gpt = GPTConfig(n_layers=1, n_heads=2, d_model=16, vocab_size=257, max_position_embeddings=8)
    save(tmp_path / "early", dict(format=FORMAT, model=GPT(gpt).state_dict(), state=dict(step=1),
                                  identity={"--vocab-size": 257},
                                  config=dataclasses.asdict(gpt) | dict(seq_len=8, tokenizer_name="byte")))
    base = ["--init-from", str(tuned["gpt2"][0]), "--tokenizer-name", "byte", "--seq-len", "32"]
    return lambda *flags: [*base, *(flag.format(**names) for flag in flags)], names


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_with_the_weights_is_refused_by_name(argv, case):
    (make, names), (flags, words) = argv, WRONG[case]
    cfg = parse(Config, make(*flags))
    with pytest.raises(UserError) as error:
        resolve_init(cfg, None)
    assert all(word.format(**names) in str(error.value) for word in words) and "\n" not in str(error.value)


def test_resuming_from_nanogpts_checkpoint_is_refused_before_any_text_is_read(tmp_path):
    torch.save({"model": {}, "config": {"init_from": "scratch", "dataset": "openwebtext"}}, tmp_path / "ckpt.pt")
    cfg = parse(Config, ["--resume", str(tmp_path / "ckpt.pt"), "--checkpoint-path", str(tmp_path / "new.pt")])
    with pytest.raises(UserError, match=r"is not a checkpoint of mini-llm .*; docs/coming-from\.md says how"):
        resolve_init(cfg, tmp_path / "ckpt.pt")


def test_what_the_trainer_has_saved_is_told_from_a_checkpoint(tmp_path):
    (tmp_path / "out" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-500" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is a folder; give a checkpoint in it or, .* --init-from"):
        plan(parse(Config, ["--resume", f"{tmp_path}/out", "--checkpoint-path", f"{tmp_path}/c.pt"]).checkpoint)
    with pytest.raises(UserError, match=f"save_pretrained has written, such as {tmp_path}/out/checkpoint-500, or"):
        resolve_init(parse(Config, ["--init-from", f"{tmp_path}/out"]), None)


def nanogpt_logits(weights, n_heads, tokens):
    """The logits of nanoGPT's model.py, with its GELU, for a state dict with its names."""
    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"), 1e-5)

    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][:tokens.shape[1]]  # (B, T, C)
    for i in range(sum(name.endswith("ln_1.weight") for name in weights)):
        block = f"transformer.h.{i}"
        q, k, v = (part.unflatten(2, (n_heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
                   for part in linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{block}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return linear(norm(x, "transformer.ln_f"), "lm_head")


@pytest.mark.parametrize("bias, prefix", [(False, "_orig_mod."), (True, "")])
def test_the_documented_conversion_of_nanogpts_checkpoint_gives_its_logits(tmp_path, monkeypatch, bias, prefix):
    characters = {character: i for i, character in enumerate("\n !abcdefgh")}
    args = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=len(characters), bias=bias, dropout=0.0)
    sizes = dict(wte=(len(characters), 32), wpe=(16, 32), ln_f=(32,))
    for i in range(2):
        sizes |= {f"h.{i}.{name}": size for name, size in {
            "ln_1": (32,), "ln_2": (32,), "attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32),
            "mlp.c_proj": (32, 128)}.items()}
    torch.manual_seed(0)
    weights = {f"transformer.{name}.weight": torch.randn(size) * 0.2 for name, size in sizes.items()}
    if bias:
        weights |= {f"transformer.{name}.bias": torch.randn(size[0]) * 0.2 for name, size in sizes.items()
                    if name not in ("wte", "wpe")}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    monkeypatch.chdir(tmp_path)
    for folder in "out", "data/shakespeare_char":
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "shakespeare_char" / "meta.pkl").write_bytes(pickle.dumps(dict(stoi=characters)))
    torch.save(dict(model={prefix + name: weight for name, weight in weights.items()}, model_args=args, iter_num=5,
                    best_val_loss=torch.tensor(1.0), config=dict(init_from="scratch")), "out/ckpt.pt")
    exec(*re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "coming-from.md").read_text(), re.DOTALL), {})
    model, tokenizer, _, _ = load_run(tmp_path / "export" / "nano")
    ids = tokenizer.encode("ab had\na bad egg!").ids[:16]
    assert ids == [characters[character] for character in "ab had\na bad egg"] and tokenizer.decode(ids)[5:8] == "d\na"
    with torch.no_grad():
        theirs, ours = nanogpt_logits(weights, 4, torch.tensor([ids])), model(torch.tensor([ids]))
    assert theirs.std() > 0.2 and torch.allclose(ours, theirs, atol=2e-3), (ours - theirs).abs().max()


def test_a_file_of_another_program_is_answered_with_what_to_do(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for file in (theirs / "ckpt.pt", theirs / "model.bin"):
        torch.save({"model": {}, "model_args": {}}, file)
    for file in theirs.iterdir():
        with pytest.raises(UserError, match=r"not a checkpoint of .*; docs/coming-from\.md converts nanoGPT's"):
            load_model(file)
    (theirs / "config.json").write_text("{}")
    (theirs / "model.safetensors").write_bytes(bytes(100))
    for file in theirs.glob("model.*"):  # one of a Hugging Face folder
        with pytest.raises(UserError, match=f"; give its folder, {theirs}$"):
            load_model(file)


def test_flags_that_agree_with_the_weights_are_fine(argv):
    make, _ = argv
    cfg = parse(Config, make("--arch", "gpt2", "--n-heads", "4", "--d-ff", "0", "--tie-embeddings", "--dropout", "0.1"))
    model, init, _ = resolve_init(cfg, None)
    assert (model.d_model, model.d_ff, model.vocab_size, model.dropout) == (32, 128, 257, 0.1) and init == cfg.init


def test_a_model_in_the_local_cache_needs_no_hub(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "hub_problem", None)
    copy = tmp_path / "models--a--b"
    shutil.copytree(tuned["gpt2"][0], copy / "snapshots" / "main")
    (copy / "refs").mkdir()
    (copy / "refs" / "main").write_text("main")
    cfg = parse(Config, ["--init-from", "a/b", "--tokenizer-name", "byte", "--seq-len", "32"])
    assert resolve_init(cfg, None)[0].vocab_size == TUNED["gpt2"]


def test_data_that_has_its_tokenizer_needs_none_named(tuned, text, cache):
    folder = prepare(DataConfig(train_data=[str(text)], cache_dir=str(cache), tokenizer_name="byte", seq_len=32))
    cfg = parse(Config, ["--init-from", str(tuned["gpt2"][0]), "--seq-len", "32", "--train-data", str(folder)])
    assert resolve_init(cfg, None)[0].vocab_size == TUNED["gpt2"]


@pytest.mark.parametrize("arch, field, value", [
    ("qwen3", "rms_norm_eps", 1e-5), ("qwen3", "hidden_act", "gelu"), ("qwen3", "attention_bias", True),
    ("llama", "rms_norm_eps", 1e-6), ("llama", "mlp_bias", True), ("llama", "rope_parameters.rope_type", "llama3"),
    ("qwen3", "rope_parameters.rope_type", "yarn"),
    ("qwen3", "sliding_window", 32), ("nanochat", "final_logit_softcapping", 30.0),
    ("nanochat", "rope_parameters.factor", 2.0), ("gpt2", "activation_function", "relu"),
    ("gpt2", "layer_norm_epsilon", 1e-6), ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "add_cross_attention", True), ("gpt2", "quantization_config", {"quant_method": "gptq"}),
    ("gpt2", "auto_map", {"AutoModelForCausalLM": "theirs.GPT"})])
def test_what_our_architecture_is_not_is_refused_by_its_field(arch, field, value):
    theirs = hugging_face_config(dataclasses.replace(Config().model, arch=arch, vocab_size=300))
    assert gpt_config(theirs, "DIR").vocab_size == 300
    name, _, key = field.partition(".")
    setattr(theirs, name, theirs.rope_parameters | {key: value} if key else value)
    with pytest.raises(UserError, match=f"--init-from DIR: {field} "):
        gpt_config(theirs, "DIR")


# What published configurations state besides, and no logit depends on; the last is not even known.
BESIDES = dict(_name_or_path="x", architectures=["Their"], dtype="bfloat16", transformers_version="4.0", bos_token_id=1,
               eos_token_id=[2, 3], pad_token_id=4, initializer_range=0.5, use_cache=False, id2label={0: "a"},
               label2id={"a": 0}, problem_type="regression", return_dict=False, output_attentions=True,
               chunk_size_feed_forward=1, attention_dropout=0.3, task_specific_params={"text-generation": {}},
               auto_map={"AutoTokenizer": "theirs.T", "AutoProcessor": "theirs.P"})
OF_ARCH = {"gpt2": dict(resid_pdrop=0.3, summary_type="mean", reorder_and_upcast_attn=True, n_inner=None),
           "qwen3": dict(max_window_layers=7)}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_configuration_that_transformers_has_is_read_back(arch):
    shape = dict(n_layers=3, n_heads=4, n_kv_heads=4, d_model=48, d_ff=80, head_dim=12, vocab_size=300,
                 max_position_embeddings=96, tie_embeddings=True)
    shape |= {} if arch == "gpt2" else dict(n_kv_heads=2, head_dim=16, rope_theta=7e5, tie_embeddings=False)
    theirs = hugging_face_config(GPTConfig(arch=arch, dropout=0.2, **shape), eos=256)
    assert {getattr(theirs, f"{part}_pdrop") for part in ("resid", "embd", "attn")} == {0.2} if arch == "gpt2" else (
        theirs.attention_dropout == 0.2)
    assert theirs.bos_token_id == theirs.eos_token_id == 256, "a text begins as the one before has ended"
    assert theirs.pad_token_id is None, "no token is without meaning"
    found = gpt_config(theirs, "DIR")
    assert {name: getattr(found, name) for name in shape} == shape
    for name, value in (BESIDES | OF_ARCH.get(arch, {})).items():
        setattr(theirs, name, value)
    assert gpt_config(theirs, "DIR") == dataclasses.replace(found, d_ff=4 * 48 if arch == "gpt2" else 80)
    theirs.num_attention_heads = 5
    with pytest.raises(UserError, match="does not divide|d_model / n_heads each"):
        gpt_config(theirs, "DIR")


def test_one_of_our_own_checkpoints_will_do_too(tuned):
    run = tuned["nanochat"][1]
    cfg = parse(Config, ["--init-from", str(run.checkpoint), "--tokenizer-name", "byte", "--seq-len", "32"])
    model, *_ = resolve_init(cfg, None)
    assert (model.arch, model.d_ff, model.n_kv_heads, model.vocab_size) == ("nanochat", 56, 2, TUNED["nanochat"])
    raw = GPT(model)
    load_initial(raw, None, cfg.init, {}, World(cfg))
    assert all(torch.equal(tensor, raw.state_dict()[name]) for name, tensor in run.weights().items())


def test_weights_of_a_model_from_before_its_code_changed_are_refused_by_name(tuned):
    cfg = parse(Config, ["--init-from", str(tuned["nanochat"][1].checkpoint), "--tokenizer-name", "byte"])
    model, *_ = resolve_init(cfg, None)
    changed = GPT(model)
    changed.register_parameter("temperature", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(UserError, match=r"--init-from .*do not fit this code's model .*temperature"):
        load_initial(changed, None, cfg.init, {}, World(cfg))


def test_positions_that_no_step_has_trained_do_not_come_back(trainer):
    """64 positions, 32 of them trained; a run that begins with those; and one that trains on 16 of them."""
    shape = ["--num-steps", 2, "--tokenizer-name", "byte", "--lr", 1e-9, "--weight-decay", 0]
    first = trainer(*shape, "--seq-len", 32, "--max-position-embeddings", 64, checkpoint="a.pt")
    then = trainer(*shape, "--seq-len", 16, "--init-from", "a.pt", checkpoint="b.pt", tiny=False)
    assert first.code == then.code == 0, first.err + then.err
    (trained, _), (kept, _) = (load_model(trainer.folder / name) for name in ("a.pt", "b.pt"))
    assert trained.cfg.max_position_embeddings == kept.cfg.max_position_embeddings == 32
    assert torch.allclose(trained.pos_emb.weight, kept.pos_emb.weight, atol=1e-6)


def test_a_run_starts_from_a_checkpoint_with_the_flags_of_its_own(trainer):
    shape = ["--num-steps", 2, "--tokenizer-name", "byte", "--seq-len", 32, "--max-position-embeddings", 64]
    assert trainer(*shape, checkpoint="a.pt").code == 0
    start = "--config", "a.config.toml", "--init-from", "a.pt", "--tokenizer-name", "a.tokenizer", "--resume", "auto"
    run = trainer(*start, tiny=False, checkpoint="b.pt")
    assert run.code == 0 and load_model(trainer.folder / "b.pt")[0].cfg.max_position_embeddings == 32, run.err
    restarted = trainer(*start, "--num-steps", 3, tiny=False, checkpoint="b.pt")
    assert restarted.code == 0 and "Resumed at step 2" in restarted.out, restarted.err
    assert "--max-position-embeddings 64 does not count: the weights of b.pt have 32" in restarted.out
    other = trainer("--config", "a.config.toml", "--init-from", "a.pt", "--tokenizer-name", "a.tokenizer",
                    "--max-position-embeddings", 128, tiny=False, checkpoint="c.pt")
    assert other.code == 2 and "--max-position-embeddings 128" in other.err and "have 32" in other.err, other.err


def test_rope_goes_as_far_as_it_was_trained_and_may_be_trained_further(tmp_path):
    shape = dict(arch="llama", n_layers=1, n_heads=2, d_model=16, max_position_embeddings=64)
    raw = GPT(GPTConfig(**shape, vocab_size=300))
    save(tmp_path / "c.pt", dict(format=FORMAT, model=raw.state_dict(), state=dict(step=1),
                                 identity={"--vocab-size": 300}, config=shape | dict(seq_len=32, vocab_size=0)))
    assert load_model(tmp_path / "c.pt")[0].cfg.max_position_embeddings == 32
    cfg = parse(Config, ["--init-from", str(tmp_path / "c.pt"), "--tokenizer-name", "byte", "--seq-len", "48"])
    model, *_ = resolve_init(cfg, None)
    assert model.max_position_embeddings == 48
    load_initial(GPT(model), None, cfg.init, {}, World(cfg))


def test_weights_that_are_not_whole_are_refused(tuned, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "part"
    shutil.copytree(tuned["gpt2"][0], folder)
    cfg = parse(Config, ["--init-from", str(folder), "--tokenizer-name", "byte", "--seq-len", "32"])
    raw = GPT(resolve_init(cfg, None)[0])
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "h.1.mlp.c_fc.bias" not in name},
              folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing, such as transformer.h.1.mlp.c_fc.bias"):
        load_initial(raw, None, cfg.init, {}, World(cfg))
    save_file(tensors | {"transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}, folder / "model.safetensors",
              metadata={"format": "pt"})  # as transformers did before 4.27
    load_initial(raw, None, cfg.init, {}, World(cfg))
    save_file(tensors | {"transformer.h.1.more": torch.ones(2)}, folder / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are unexpected, such as transformer.h.1.more"):
        load_initial(raw, None, cfg.init, {}, World(cfg))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="^--init-from [^\n]+$"):
        load_initial(raw, None, cfg.init, {}, World(cfg))


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused_in_one_line(trainer, tuned, tmp_path):
    from tokenizers import Tokenizer

    wide = Tokenizer.from_file(str(tuned["gpt2"][1].checkpoint.with_name("gpt2.tokenizer") / "tokenizer.json"))
    wide.add_tokens(["one", "more"])
    (tmp_path / "wide").mkdir()
    wide.save(str(tmp_path / "wide" / "tokenizer.json"))
    (tmp_path / "other.txt").write_text("A text of which no tokens are cached. " * 100)
    run = trainer("--init-from", tuned["gpt2"][0], "--tokenizer-name", "wide", "--train-data", "other.txt", tiny=False)
    assert run.code == 2 and len(run.err.strip().splitlines()) == 1 and "tokenized" not in run.out, run.err
    assert all(word in run.err for word in ("error: --init-from", "257 tokens", "259 tokens", "wide"))


STEADY = ["--max-tokens", 1600, "--lr-scheduler", "none", "--warmup-steps", 0, "--no-amp", "--log-steps", 1,
          "--save-steps", 0, "--seed", 3]
ANEW = ["--batch-size", 4, "--eval-tokens", 512, "--device", "cpu", "--init-from", "first.pt",
        "--keep-optimizer", *STEADY]


@pytest.fixture
def first(trainer):
    """A run of 16 steps, in the second epoch at its end (49 windows, 4 a step), and the same one of 8 steps."""
    def make(*flags):
        runs = [trainer(*STEADY, *flags, "--num-steps", steps, checkpoint=f"{name}.pt")
                for name, steps in (("straight", 16), ("first", 8))]
        assert not any(run.code for run in runs), runs[0].err + runs[1].err
        return runs
    return make


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_with_its_optimizer_state_a_run_trains_on_as_if_it_had_not_ended(trainer, first, optimizer):
    """Positions 32 to 63 are without training, and the new run has none of them."""
    straight, _ = first("--optimizer", optimizer)
    then = trainer(*ANEW, "--optimizer", optimizer, "--num-steps", 8, tiny=False, checkpoint="then.pt")
    assert then.code == 0 and "it is read on from sample 32" in then.out, then.out + then.err
    weights, expected = then.weights(), straight.weights()
    assert weights["pos_emb.weight"].shape == (32, 32) and expected["pos_emb.weight"].shape == (64, 32)
    assert all(torch.equal(weights[name], expected[name][:len(weights[name])]) for name in expected)
    assert [then.rows[step]["train/loss"] for step in range(1, 9)] == [
        straight.rows[step]["train/loss"] for step in range(9, 17)]
    assert then.rows[8]["train/epoch"] == straight.rows[16]["train/epoch"] == 64 / 49
    assert then.rows[8]["train/tokens"] == 1024

    parts = [trainer(*ANEW, "--optimizer", optimizer, "--num-steps", steps, *flags, tiny=False, checkpoint="parts.pt")
             for steps, flags in ((3, []), (8, ["--resume"]))]
    assert "Resumed at step 3" in parts[1].out and "another --keep-optimizer" not in parts[1].out, parts[1].out
    assert all(torch.equal(weights[name], tensor) for name, tensor in parts[1].weights().items())
    onward = trainer(*ANEW, "--optimizer", optimizer, "--init-from", "parts.pt", "--num-steps", 1, tiny=False,
                     checkpoint="onward.pt")
    assert "read on from sample 64" in onward.out, onward.out + onward.err
    saved = torch.load(then.checkpoint, weights_only=True)["optimizer"]["state"].values()
    tensors = [value for state in saved for value in state.values()]
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in tensors), "what was cut off is gone"


def test_another_batch_goes_on_in_the_data_and_other_data_begins_at_its_first_sample(trainer, first, text):
    straight, _ = first("--lr", 1e-9)
    wider = trainer(*ANEW, "--lr", 1e-9, "--batch-size", 8, "--num-steps", 1, tiny=False, checkpoint="wider.pt")
    assert "sample 32" in wider.out and wider.rows[1]["train/loss"] == pytest.approx(
        straight.rows[9]["train/loss"] / 2 + straight.rows[10]["train/loss"] / 2, abs=1e-5)
    for flags in ["--data-seed", 5], ["--seq-len", 16], ["--max-tokens", 3200]:
        other = trainer(*ANEW, *flags, "--num-steps", 1, tiny=False, checkpoint=f"other{flags[0]}.pt")
        assert other.code == 0 and "it is read from its first sample" in other.out, other.out + other.err


@pytest.mark.parametrize("flags, words", [
    (["--optimizer", "muon"], "of --optimizer adamw; give this, too"),
    (["--init-from", "{folder}"], "has no optimizer state; give a checkpoint, or leave"),
    (["--init-from", "gone.pt"], "--init-from gone.pt: no such file"),
    (["--init-from", "reversed.pt"], "no tokenizer can be read at reversed.tokenizer; name the one"),
    (["--init-from", "reversed.pt", "--tokenizer-name", "byte"], "leave it out")])
def test_optimizer_state_that_does_not_fit_is_refused(trainer, tuned, flags, words):
    trainer(*STEADY, "--num-steps", 1, checkpoint="first.pt")
    other = torch.load(trainer.folder / "first.pt", weights_only=True)
    other["optimizer"]["param_groups"][0]["param_names"].reverse()
    save(trainer.folder / "reversed.pt", other)
    flags = [flag.format(folder=tuned["gpt2"][0]) for flag in flags]
    run = trainer(*ANEW, *flags, tiny=False, checkpoint="x/then.pt")
    assert run.code == 2 and words in run.err and run.err.count("\n") == 1, run.err
    assert not (trainer.folder / "x").exists()


def test_tokens_of_another_tokenizer_are_told(trainer):
    trainer("--num-steps", 1, checkpoint="first.pt")
    for flags in ["--use-toy-data"], []:
        run = trainer("--init-from", "first.pt", *flags, "--num-steps", 1, "--seq-len", 16, tiny=False,
                      data="--use-toy-data" not in flags, checkpoint=f"{len(flags)}.pt")
        assert run.code == 0, run.err
        assert ("not of the tokenizer that first.pt was trained with" in run.out) == ("--use-toy-data" in flags)


def test_there_is_no_optimizer_state_without_weights():
    with pytest.raises(UserError, match="--keep-optimizer goes with --init-from"):
        parse(Config, ["--keep-optimizer"])


def test_sequences_and_tokens_are_those_of_the_weights_unless_given(tuned, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, run = tuned["llama"]  # 64 positions, of which the run trained on 32
    for source, given, expected in ((folder, [], 64), (run.checkpoint, [], 32), (folder, ["--seq-len", "80"], 80)):
        cfg = parse(Config, ["--init-from", str(source), "--tokenizer-name", "byte", *given])
        assert resolve_init(cfg, None)[2].seq_len == expected
    _, _, data = resolve_init(parse(Config, []), run.checkpoint)
    assert (data.seq_len, data.tokenizer_name) == (32, "byte"), "resumed without either"
    _, _, data = resolve_init(parse(Config, ["--init-from", str(run.checkpoint)]), None)
    assert data.tokenizer_name == str(run.checkpoint.with_name("llama.tokenizer"))
    for bare in folder, tuned["gpt2"][0]:  # without a tokenizer: for GPT-2, transformers makes one of one token
        with pytest.raises(UserError, match=f"^--init-from {bare}: no tokenizer can be read at {bare}; "):
            resolve_init(parse(Config, ["--init-from", str(bare)]), None)


def test_a_resumed_run_has_a_copy_of_the_tokenizer(trainer):
    trainer("--num-steps", 1, checkpoint="first.pt")
    flags = "--init-from", "first.pt", "--seq-len", 16, "--batch-size", 4, "--device", "cpu"
    assert trainer(*flags, "--num-steps", 1, tiny=False, checkpoint="second.pt").code == 0
    shutil.move(trainer.folder / "first.tokenizer", trainer.folder / "elsewhere")
    (trainer.folder / "first.pt").unlink()
    run = trainer(*flags[2:], "--num-steps", 2, "--resume", tiny=False, checkpoint="second.pt")
    assert run.code == 0 and "Resumed at step 1" in run.out, run.err
    named = trainer(*flags, "--tokenizer-name", "first.tokenizer", "--num-steps", 3, "--resume", tiny=False,
                    checkpoint="second.pt")
    assert named.code == 0 and "Resumed at step 2" in named.out, named.err


def test_a_run_that_began_without_weights_learns_its_tokenizer_though_some_are_named_at_its_resume(trainer, text):
    flags = "--tokenizer-name", "bpe", "--vocab-size", 300, "--train-data", text
    assert trainer(*flags, "--num-steps", 1).code == 0
    run = trainer(*flags, "--num-steps", 2, "--resume", "--init-from", "gone.pt")
    assert run.code == 0 and "Resumed at step 1" in run.out and "another --tokenizer-name" not in run.out, run.err


def test_the_flags_of_the_source_name_its_tokenizer(trainer, text):
    flags = "--tokenizer-name", "bpe", "--vocab-size", 300, "--train-data", text
    assert trainer(*flags, "--num-steps", 1, checkpoint="a.pt").code == 0
    run = trainer("--config", "a.config.toml", "--init-from", "a.pt", tiny=False, data=False, checkpoint="b.pt")
    assert run.code == 0 and 'tokenizer_name = "a.tokenizer"' in (trainer.folder / "b.config.toml").read_text(), run.err
    other = trainer("--init-from", "a.pt", "--tokenizer-name", "char", tiny=False, checkpoint="c.pt")
    assert other.code == 2 and "leave it out, to take that" in other.err, other.err
