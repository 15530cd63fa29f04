import contextlib
import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import zygote
from conftest import ROOT, environment
from test_model import build, randomized

from data import DataConfig, prepare
from evaluate import open_data
from export import export
from generate import Continuation, GenerateConfig, batches, generate, main, prompt_ids, sample, sample_text
from mini_llm.errors import UserError
from mini_llm.pretrained import load_run
from mini_llm.tokenizer import END_OF_TEXT, load_tokenizer, open_tokenizer, train_tokenizer
from model import ARCHS, GPT, GPTConfig


def continued(model, prompts, n, **options):
    """The ids that each prompt is continued with."""
    found = [[] for _ in prompts]
    for step in generate(model, prompts, n, **options):
        for row, token in zip(found, step, strict=True):
            row += [] if token is None else [token]
    return found


def prompts_of(*lengths, seed=1):
    return [row[:n].tolist() for row, n in zip(np.random.default_rng(seed).integers(0, 97, (len(lengths), 99)), lengths,
                                               strict=True)]


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_with_the_cache_equals_whole_forward_passes(arch):
    model = randomized(build(arch)).eval()
    prompt, = prompts_of(7)
    x = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(30):
            x = torch.cat([x, model(x)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert continued(model, [prompt], 30, temperature=0)[0] == x[0, 7:].tolist()


@pytest.mark.parametrize("options", [dict(temperature=0), dict(top_k=20), dict(top_p=0.9)])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_prompt_among_others_is_continued_as_it_is_alone(arch, options):
    """Prompts of all lengths, also longer than the 48 positions, and past the last of them."""
    model, prompts = randomized(build(arch)), prompts_of(3, 60, 1, 11, 3)
    together = continued(model, prompts, 60, seeds=range(5), **options)
    assert together == [continued(model, [prompt], 60, seeds=[i], **options)[0] for i, prompt in enumerate(prompts)]
    assert [len(row) for row in together] == [60] * 5 and model.training


def test_positions_beyond_the_context_are_not_used(run_folder):
    model = randomized(build("gpt2")).eval()
    with torch.no_grad():
        model.pos_emb.weight[20:] = math.nan
    (free,), (kept,) = (continued(model, prompts_of(3), 40, temperature=0, context=context) for context in (48, 20))
    short = GPT(dataclasses.replace(model.cfg, max_position_embeddings=20))
    short.load_state_dict(model.state_dict() | {"pos_emb.weight": model.pos_emb.weight[:20]})
    assert kept == continued(short, prompts_of(3), 40, temperature=0)[0] != free
    model, tokenizer = load_run(run_folder / "c.pt")[0], run_folder / "c.tokenizer"
    whole = sample_text(model, tokenizer, SimpleNamespace(start=0, eos=None, seq_len=1000))
    ids = load_run(run_folder / "c.pt")[1].encode(whole).ids
    ended = sample_text(model, tokenizer, SimpleNamespace(start=0, eos=ids[5], seq_len=1000))
    assert len(ended) < len(whole) and whole.startswith(ended)
    assert len(whole) > 100 and whole != sample_text(model, tokenizer, SimpleNamespace(start=0, eos=None, seq_len=8))


def test_a_sample_begins_with_its_prompt(run_folder):
    model, tokenizer, *_ = load_run(run_folder / "c.pt")
    corpus = SimpleNamespace(start=0, eos=None, seq_len=32)
    text = sample_text(model, run_folder / "c.tokenizer", corpus, prompt := "the naïve é ")
    ids = tokenizer.encode(prompt).ids
    new = continued(model, [ids], 128, temperature=0.8, top_k=50, seeds=[1337],
                    vocab_size=tokenizer.get_vocab_size(), context=32)[0]
    assert len(text) > len(prompt) and text.startswith(prompt) and text == tokenizer.decode([*ids, *new])


def test_a_sample_has_no_ids_that_the_tokenizer_lacks(run_folder):
    """Of a model with more of them (--vocab-size); here two of those are the likeliest, one or the other."""
    model = randomized(GPT(dataclasses.replace(load_run(run_folder / "c.pt")[0].cfg, vocab_size=300)))
    with torch.no_grad():
        model.tok_emb.weight[298:] = torch.stack([one := 1e4 * torch.randn(32), -one])
    assert max(continued(model, [[0]], 20, seeds=[1])[0]) >= 298
    assert sample_text(model, run_folder / "c.tokenizer", SimpleNamespace(start=0, eos=None, seq_len=32))


def test_seeds_decide_and_ids_stay_below_the_tokenizers():
    model = randomized(build())
    first, again, other = (continued(model, prompts_of(4), 40, seeds=[seed])[0] for seed in (1, 1, 2))
    assert first == again != other
    assert max(continued(model, prompts_of(4), 200, temperature=9.0, seeds=[0], vocab_size=31)[0]) == 30


def test_choose_draws_from_the_distribution_that_top_k_and_top_p_leave():
    logits = torch.log(torch.tensor([[0.15, 0.5, 0.05, 0.3]])).repeat(4000, 1)
    noise = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    noise[0], noise[1] = 0, 1 - 2**-24

    def shares(**options):
        return torch.bincount(sample(logits, noise, **options).flatten(), minlength=4).div(4000).tolist()

    def near(*expected):
        return pytest.approx(list(expected), abs=0.03)

    assert shares() == near(0.15, 0.5, 0.05, 0.3)
    assert shares(top_k=2) == near(0, 0.625, 0, 0.375) and shares(top_k=99) == shares()
    assert shares(top_p=0.7) == near(0, 0.625, 0, 0.375)
    assert shares(top_p=0.81) == near(0.158, 0.526, 0, 0.316)
    assert shares(temperature=0) == shares(temperature=1e-30) == [0, 1, 0, 0]
    assert shares(temperature=0.5) == near(0.0616, 0.684, 0.0068, 0.2466)
    logits = torch.full((4000, 4), math.nan)  # of a model that has diverged
    assert all(len(shares(**options)) == 4 for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0}))


def test_batches_hold_every_row_once_and_lengths_that_are_near():
    lengths = [5, 900, 7, 5, 30, 899]
    assert batches(lengths, 8, 10) == [[0, 3, 2], [4], [5, 1]]
    assert batches(lengths, 2, 10) == [[0, 3], [2], [4], [5, 1]]


def test_without_seeds_every_text_has_one_of_its_own():
    model = GPT(GPTConfig(n_layers=1, n_heads=1, d_model=16, vocab_size=50, max_position_embeddings=16))
    steps = list(generate(model, [[1], [1]], 12))
    assert steps == list(generate(model, [[1], [1]], 12, seeds=[0, 1]))
    assert [a for a, _ in steps] != [b for _, b in steps]
    assert model.training, "as before: a sample turns no dropout off"


@pytest.fixture(scope="module")
def bpe(text, cache):
    return open_tokenizer(prepare(DataConfig(train_data=[str(text)], cache_dir=str(cache)), 300) / "tokenizer")


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_characters_come_whole_and_add_up_to_the_text(kind, bpe):
    tokenizer = load_tokenizer("byte") if kind == "byte" else bpe
    text = "naïve 🦜🦜 日本語\n é"
    ids = tokenizer.encode(text).ids
    one = Continuation(tokenizer, None, ids[:1])
    parts = [one.add(token) for token in ids[1:]]
    assert not any("\ufffd" in part for part in parts) and one.finish() == ""
    assert text[:1] + "".join(parts) == text
    cut = Continuation(tokenizer, None)  # an end amid the first parrot's four bytes
    assert "".join([*map(cut.add, ids[:ids.index(tokenizer.encode("🦜").ids[0]) + 2]), cut.finish()]) == "naïve \ufffd"


@pytest.fixture(scope="module")
def byte_fallback():
    """A tokenizer of Llama 2's kind: what is no token is bytes, which decode only if all that stand together are whole
    characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>",
                                     fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return tokenizer


@pytest.mark.parametrize("text", ["日本語", "ab 日本語🦜🦜 cd", "é é日 a"])
def test_characters_of_bytes_that_follow_each_other_are_whole(byte_fallback, text):
    ids = byte_fallback.encode(text).ids
    assert byte_fallback.decode(ids) == text
    ends = [n for n in range(1, len(ids)) if "\ufffd" not in byte_fallback.decode(ids[:n])]
    for n in ends:
        one = Continuation(byte_fallback, None, ids[:n])
        assert byte_fallback.decode(ids[:n]) + "".join(map(one.add, ids[n:])) + one.finish() == text, n


def test_bytes_that_are_no_characters_add_up_to_what_the_tokenizer_makes_of_them():
    tokenizer, rng = load_tokenizer("byte"), np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(0, 256, 30).tolist()
        one = Continuation(tokenizer, None)
        assert "".join([*map(one.add, ids), one.finish()]) == tokenizer.decode(ids)


def test_a_word_after_a_special_token_keeps_its_space():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "king": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>"])
    ids = tokenizer.encode("the old grey king the").ids
    one = Continuation(tokenizer, None, ids[:1])
    assert ids == [1, 0, 0, 2, 1] and "".join(map(one.add, ids[1:])) + one.finish() == " king the"


@pytest.mark.parametrize("stops, expected", [(["cd"], "ab"), (["d", "bcd"], "a"), (["ef!"], "abcdef"), (["abcdef"], ""),
                                             (["é"], "abcdef")])
def test_a_stop_text_ends_the_text_wherever_its_tokens_part(stops, expected):
    tokenizer = load_tokenizer("byte")
    one, shown = Continuation(tokenizer, 256, stops=stops), ""
    for token in tokenizer.encode("abcdef").ids:
        if not one.done:
            shown += one.add(token)
        assert expected.startswith(shown)  # nothing is shown that has to be taken back
    assert shown + one.finish() == expected
    ended = Continuation(tokenizer, 256, stops=["cd"])
    assert [ended.add(tokenizer.encode("c").ids[0]), ended.add(256), ended.done] == ["", "c", True]


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, text, cache):
    """A trained checkpoint, c.pt, of a byte tokenizer."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("run")
    made = zygote.run([sys.executable, ROOT / "train.py", *TINY, "--train-data", text, "--cache-dir", cache,
                       "--num-steps", 30, "--eval-steps", 0, "--checkpoint-path", "c.pt"], folder, environment())
    assert made.returncode == 0, made.stderr
    return folder


def command(folder, *flags, script="generate.py", stdin=None):
    return zygote.run([sys.executable, ROOT / script, *flags], folder, environment(), stdin)


def shown(main, folder, *flags):
    """What a command's main prints on stdout: as `command`, without the start of a process, as in a notebook."""
    with (contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out,
          mock.patch("sys.argv", ["command", *map(str, flags)])):
        main()
    return out.getvalue()


def refused(main, flags, monkeypatch, capsys):
    """The one line with which the command's main refuses flags."""
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    with pytest.raises(SystemExit) as left:
        main()
    shown = capsys.readouterr()
    assert left.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1, shown
    assert shown.err.startswith("error: ")
    return shown.err


def test_the_command_continues_prompts_as_transformers_does_on_the_exported_folder(run_folder):
    import transformers

    prompts = ["The old", "king and the bright", ""]
    ours = command(run_folder, "--checkpoint-path", "c.best.pt", "--prompt", *prompts[:1], "--prompt-file", "-",
                   "--temperature", 0, "--max-new-tokens", 12, stdin="\n".join(prompts[1:]) + "\n")
    assert ours.returncode == 0, ours.stderr
    export(run_folder / "c.best.pt", run_folder / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run_folder / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_folder / "hf")
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"] if prompt else None  # none: from its bos_token_id
        out = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(out[0][not prompt:], skip_special_tokens=True))
    assert ours.stdout == "\n---------------\n".join(texts) + "\n"
    assert "36 tokens in" in ours.stderr and "tokens/s on cpu" in ours.stderr


def test_characters_of_a_prompt_without_a_token_are_named(capsys):
    known = train_tokenizer("char", ["abc"], 0)
    for _ in range(2):  # a run encodes its --sample-prompt for each sample
        assert prompt_ids(known, 0, "abca") == prompt_ids(known, 0, "a—bçca")
    assert capsys.readouterr().err == ("warning: the tokenizer has no token for 'ç—': left out of --prompt 'a—bçca'\n")


def test_samples_repeat_and_do_not_depend_on_their_number(run_folder):
    flags = ["--checkpoint-path", "c.pt", "--prompt", "The", "--max-new-tokens", 24]
    one, four, other = (shown(main, run_folder, *flags, *more) for more in (
        [], ["--num-samples", 4, "--batch-size", 3], ["--seed", 5]))
    texts = four.split("\n---------------\n")
    assert texts[0] + "\n" == one != other and len(set(texts)) == 4


def test_one_text_comes_as_it_is_written(run_folder):
    """The first characters arrive while the rest is still being computed."""
    command = [sys.executable, str(ROOT / "generate.py"), "--checkpoint-path", "c.pt", "--prompt", "é",
               "--max-new-tokens", "3000", "--temperature", "0"]
    process = zygote.Popen(command, cwd=run_folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                           env=environment())
    head, began = process.stdout.read(12), time.perf_counter()
    more, took = process.stdout.read(1000), time.perf_counter() - began  # not to its end, which takes as long
    process.stdout.read()
    assert process.wait() == 0 and took > 0.1 and head.startswith("é".encode()) and len(more) == 1000


def test_no_text_acts_on_the_terminal(run_folder, monkeypatch):
    monkeypatch.chdir(run_folder)
    for number in 1, 2:
        flags = ["--checkpoint-path", "c.pt", "--prompt", "\x1b[31m\r\n", "--num-samples", str(number)]
        for terminal, told in (True, "\\x1b[31m\n"), (False, "\x1b[31m\r\n"):
            out = io.StringIO()
            out.isatty = lambda terminal=terminal: terminal
            with contextlib.redirect_stdout(out), mock.patch("sys.argv", ["generate.py", *flags]):
                main()
            assert out.getvalue().startswith(told) and ("\x1b" in out.getvalue()) != terminal


def test_the_command_stops_where_it_is_told(run_folder):
    flags = ["--checkpoint-path", "c.pt", "--prompt", "The", "--max-new-tokens", 40]
    whole = shown(main, run_folder, *flags)
    stop = whole[12:15]
    assert shown(main, run_folder, *flags, "--stop", stop) == whole[:whole.index(stop, 3)] + "\n"


@pytest.mark.parametrize("flags, words", [
    (["--checkpoint-path", "none.pt"], "none.pt is missing"),
    (["--checkpoint-path", "damaged.pt"], "damaged.pt is damaged"),
    (["--checkpoint-path", "words.pt"], "words.pt is cut short, or not a checkpoint of mini-llm"),
    (["--checkpoint-path", "alone.pt"], "alone.tokenizer, is missing"),
    (["--top-p", "0"], "--top-p 0: must be at least 1e-06"),
    (["--topk", "3"], "--topk is not known; did you mean --top-k?"),
    (["--prompt-file", "none.txt"], "--prompt-file none.txt: No such file"),
    (["--stop", ""], "--stop '': an empty text")])
def test_a_mistake_gets_one_line(run_folder, flags, words, monkeypatch, capsys):
    whole = (run_folder / "c.pt").read_bytes()
    (run_folder / "damaged.pt").write_bytes(whole[:5000] + b"x" + whole[5001:])
    (run_folder / "alone.pt").write_bytes(whole)
    (run_folder / "words.pt").write_text("no checkpoint")
    monkeypatch.chdir(run_folder)
    path = [] if flags[0] == "--checkpoint-path" else ["--checkpoint-path", "c.pt"]
    assert words in refused(main, [*path, *flags], monkeypatch, capsys)


def test_a_tokenizer_of_another_model_is_refused(run_folder, tmp_path):
    (tmp_path / "c.pt").write_bytes((run_folder / "c.pt").read_bytes())
    (tmp_path / "c.tokenizer").mkdir()
    theirs = json.loads((run_folder / "c.tokenizer" / "tokenizer.json").read_text())
    theirs["model"]["vocab"] |= {f"more{i}": 300 + i for i in range(9)}
    for content, words in (("{", "not a tokenizer"), (json.dumps(theirs), "309 tokens, the model 257")):
        (tmp_path / "c.tokenizer" / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=words):
            load_run(tmp_path / "c.pt")


def test_prompts_come_from_flags_and_files(tmp_path):
    (tmp_path / "p.txt").write_text("a b\n\nc")
    assert GenerateConfig(prompt=["x"], prompt_file=str(tmp_path / "p.txt")).prompts() == ["x", "a b", "", "c"]
    assert GenerateConfig().prompts() == [""]
    for content, words in (b"\xff\xfe", "not UTF-8"), (b"", "no prompt in it"):
        (tmp_path / "p.txt").write_bytes(content)
        with pytest.raises(UserError, match=words):
            GenerateConfig(prompt_file=str(tmp_path / "p.txt")).prompts()


def test_a_folders_prompts_begin_as_its_tokenizer_begins_them(tuned, tmp_path, capsys):
    """Llama's do with <s>, which its weights expect, and an empty one is that alone."""
    import transformers
    from tokenizers import processors

    folder = tmp_path / "llama"
    shutil.copytree(tuned["llama"][0], folder)
    tokenizer = load_tokenizer("byte")
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(str(folder / "tokenizer.json"))
    _, ours, eos, saved = load_run(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in ("The king", ""):
        assert prompt_ids(ours, 0, prompt, saved["prefix"]) == theirs(prompt).input_ids
    (stock := tmp_path / "gpt2").mkdir()
    for file in tuned["gpt2"][0].iterdir():
        shutil.copy(file, stock)
    with pytest.raises(UserError, match="no tokenizer in it that can be read"):
        load_run(stock)
    load_tokenizer("byte").save(str(stock / "tokenizer.json"))
    assert json.loads((stock / "generation_config.json").read_text())["bos_token_id"] == 50256
    assert load_run(stock)[3]["prefix"] == [] and "start" not in load_run(stock)[3], "an id that it does not have"
    for start in 0, 256, 257, -1:
        (stock / "generation_config.json").write_text(json.dumps({"bos_token_id": start}))
        assert load_run(stock)[3].get("start") == (start if 0 <= start < 257 else None)
    gappy = json.loads((stock / "tokenizer.json").read_text())  # an id that no token has
    gappy["model"]["vocab"] = {token: i for token, i in gappy["model"]["vocab"].items() if i != 7} | {END_OF_TEXT: 256}
    (stock / "tokenizer.json").write_text(json.dumps(gappy))
    (stock / "generation_config.json").write_text(json.dumps({"bos_token_id": 256}))
    assert load_run(stock)[3]["start"] == 256
    (tmp_path / "a.txt").write_text("The king sings.")
    open_data([str(tmp_path / "a.txt")], "", 8, ours, eos, saved, tmp_path)
    assert "warning: the tokenizer puts <s> before a text, and here no document has it" in capsys.readouterr().err
