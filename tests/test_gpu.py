"""What only a CUDA device can show: `pytest -m gpu`. Without one, see tests/emulated_cuda."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment
from test_train import same

pytestmark = pytest.mark.gpu
CUDA = ["--device", "cuda", "--log-steps", 5, "--eval-steps", 10]


@pytest.mark.parametrize("flags", [
    ["--no-amp"], ["--amp-dtype", "bf16"], ["--amp-dtype", "fp16"], ["--use-activation-checkpoint"], ["--no-compile"],
    ["--grad-accum-steps", 4]], ids=str)
def test_training_on_the_gpu_is_training_on_the_cpu(trainer, flags):
    batch = flags if "--grad-accum-steps" in flags else []
    exact = trainer("--num-steps", 20, "--log-steps", 5, "--eval-steps", 10, "--no-amp", *batch, checkpoint="cpu.pt")
    run = trainer("--num-steps", 20, *CUDA, *flags, checkpoint="gpu.pt")
    assert run.code == 0, run.err
    for key, value in exact.losses().items():
        assert run.losses()[key] == pytest.approx(value, abs=4e-3), key  # one micro-batch of four: up to 0.02 off
    assert "gpu/peak_gb" in run.rows[20]


@pytest.mark.parametrize("precision", [
    ["--no-amp"], ["--amp-dtype", "bf16"], ["--amp-dtype", "fp16"],
    ["--use-activation-checkpoint", "--grad-accum-steps", 2]], ids=str)
def test_resume_is_bit_for_bit_under_deterministic(trainer, precision):
    flags = [*CUDA, *precision, "--deterministic", "--dropout", 0.2, "--lr-scheduler", "none"]
    straight = trainer(*flags, "--num-steps", 23, checkpoint="straight.pt")
    first = trainer(*flags, "--num-steps", 17, checkpoint="resumed.pt")
    second = trainer(*flags, "--num-steps", 23, "--resume", checkpoint="resumed.pt")
    assert straight.code == first.code == second.code == 0, straight.err + first.err + second.err
    assert same(second, straight) and "sample at step 23" in second.out


@pytest.mark.parametrize("how", [
    ["--no-compile", "--optimizer", "muon", "--skip-loss-spikes", 6, "--dropout", 0.1],
    ["--grad-accum-steps", 2]], ids=str)
def test_between_reports_no_step_waits_for_the_gpu(trainer, how):
    flags = [*CUDA, *how, "--log-steps", 100, "--eval-steps", 0, "--no-save-best", "--save-steps", 0, "--overwrite"]
    code = (f"import runpy, sys, torch; torch.cuda.set_sync_debug_mode('warn'); sys.path.insert(0, {str(ROOT)!r}); "
            f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')")
    waits = []
    for steps in (4, 12):
        _, _, *args = trainer.arguments([*flags, "--num-steps", steps])
        run = subprocess.run([sys.executable, "-W", "always", "-c", code, *args], cwd=trainer.folder, text=True,
                             capture_output=True, env=environment())
        assert run.returncode == 0, run.stderr
        # Sampling, at the end, reads every token, up to the first that ends a text; the compiler reads its constants
        # (_inductor/fx_passes/joint_graph.py), unless the graph is in its cache, as in the second run.
        waits.append(len(re.findall(r"^(?!\S*(?:/generate\.py|/torch/_inductor/\S+):\d).*:\d+: UserWarning: called a "
                                    r"synchronizing CUDA", run.stderr, re.MULTILINE)))
    assert waits[0] == waits[1] > 0


two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("how", [
    ["--no-amp", "--no-compile"], ["--no-amp", "--compile", "--use-activation-checkpoint"],
    ["--amp-dtype", "fp16", "--grad-accum-steps", 2], ["--no-amp", "--compile", "--grad-accum-steps", 2],
    # More than one bucket of gradients, between which DDP cuts the graph.
    ["--compile", "--use-activation-checkpoint", "--grad-accum-steps", 2, "--d-model", 256]], ids=str)
def test_nccl_with_one_rank_is_train_py(trainer, how):
    flags = [*CUDA, "--num-steps", 10, *how]
    alone, launched = trainer(*flags, checkpoint="a.pt"), trainer(*flags, ranks=1, checkpoint="b.pt")
    assert launched.code == 0, launched.err
    for key, value in alone.losses().items():
        assert launched.losses()[key] == pytest.approx(value, abs=1e-3 if "--no-amp" in how else 3e-3)


@pytest.mark.parametrize("how", [
    ["--no-amp", "--no-compile", "--grad-accum-steps", 2],
    ["--compile", "--use-activation-checkpoint", "--n-layers", 12],
    ["--arch", "nanochat", "--optimizer", "muon", "--async-save", "--save-steps", 2]], ids=str)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=two)])
def test_shards_train_as_replicas_do_and_each_goes_on_from_the_other(trainer, ranks, how):
    flags = [*CUDA, "--lr-scheduler", "none", *how]
    modes = dict(whole={}, sharded=dict(script="train_fsdp.py"))
    runs = {name: trainer(*flags, "--num-steps", 10, ranks=ranks, checkpoint=f"{name}.pt", **mode)
            for name, mode in modes.items()}
    assert runs["sharded"].code == 0, runs["sharded"].err
    for key, value in runs["whole"].losses().items():
        assert runs["sharded"].losses()[key] == pytest.approx(value, abs=1e-3 if "--no-amp" in how else 5e-3)
    on = [trainer(*flags, "--num-steps", 14, "--resume", ranks=ranks, checkpoint=f"{name}.pt", **mode)
          for name, mode in zip(modes, reversed(modes.values()), strict=True)]
    assert all(run.code == 0 and "Resumed at step 10" in run.out for run in on), on[0].err + on[1].err
    assert on[0].losses()[14, "train/loss"] == pytest.approx(on[1].losses()[14, "train/loss"], abs=5e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_replicas_of_shards_train_as_replicas_do(trainer):
    flags = [*CUDA, "--num-steps", 10, "--grad-accum-steps", 2, "--optimizer", "muon", "--check-replicas", 1]
    whole = trainer(*flags, ranks=4, checkpoint="whole.pt")
    hybrid = trainer(*flags, "--shard-ranks", 2, ranks=4, checkpoint="hybrid.pt", script="train_fsdp.py")
    assert whole.code == hybrid.code == 0, whole.err + hybrid.err
    for key, value in whole.losses().items():
        assert hybrid.losses()[key] == pytest.approx(value, abs=5e-3)


@two
@pytest.mark.parametrize("how", [
    ["--no-amp", "--no-compile"], ["--compile", "--grad-accum-steps", 2], ["--optimizer", "muon", "--d-model", 256],
    ["--amp-dtype", "fp16", "--use-activation-checkpoint"]], ids=str)
def test_replicas_on_two_gpus_stay_equal_and_train_as_one(trainer, how):
    flags = [*CUDA, "--num-steps", 10, "--global-batch-tokens", 512 if "--grad-accum-steps" in how else 256]
    flags += [flag for flag in how if flag not in ("--grad-accum-steps", 2)]
    alone = trainer(*flags, checkpoint="a.pt")
    both = trainer(*flags, "--check-replicas", 1, ranks=2, checkpoint="b.pt")
    assert alone.code == both.code == 0, alone.err + both.err
    for key, value in alone.losses().items():
        assert both.losses()[key] == pytest.approx(value, abs=1e-3 if "--no-amp" in how else 5e-3)
    on = trainer(*flags, "--num-steps", 14, "--resume", checkpoint="b.pt")
    assert on.code == 0 and "Resumed at step 10" in on.out, on.err


@pytest.mark.parametrize("arch", ["gpt2", "qwen3", "nanochat"])
def test_forward_and_loss_are_one_graph(arch):
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(arch=arch, n_layers=2, n_heads=2, d_model=64, vocab_size=97, max_position_embeddings=32))
    fast = torch.compile(model.cuda(), fullgraph=True)
    tokens = torch.randint(0, 97, (4, 32), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        fast(tokens, tokens).backward()


@pytest.mark.parametrize("arch", ["gpt2", "nanochat"])
def test_a_padded_vocabulary_changes_neither_loss_nor_gradient(arch):
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(arch=arch, n_layers=1, n_heads=2, d_model=64, vocab_size=97, max_position_embeddings=32))
    x = torch.randint(0, 97, (4, 33))
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        twin = GPT(model.cfg).to(device)
        twin.load_state_dict(model.state_dict())
        loss = twin(x[:, :-1].to(device), x[:, 1:].to(device))
        loss.backward()
        losses.append(loss.item())
        gradients.append(twin.tok_emb.weight.grad.cpu())
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert torch.allclose(*gradients, atol=1e-3)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.float16, 64), (torch.bfloat16, 320)])
def test_grouped_queries_take_a_fused_kernel_where_flash_attention_is_missing(dtype, width):
    """Else they take one that holds the (T, T) scores of every head."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from model import attend

    q, k, v = (torch.randn(2, heads, 128, width) for heads in (8, 2, 2))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # fails if that one cannot
        y = attend(*(x.to("cuda", dtype) for x in (q, k, v))).float().cpu()
    assert torch.allclose(y, attend(q, k, v), atol=1e-2 if dtype == torch.float32 else 5e-2)  # products may be TF32


def test_saving_from_a_copy_changes_no_bit(trainer):
    flags = [*CUDA, "--num-steps", 30, "--save-steps", 3, "--keep-last", 20, "--deterministic", "--skip-loss-spikes", 6]
    waiting = trainer(*flags, checkpoint="waiting.pt")
    copied = trainer(*flags, "--async-save", checkpoint="copied.pt")
    assert copied.code == 0 and same(copied, waiting), copied.err
    for step in range(3, 30, 3):
        a, b = (torch.load(run.checkpoint.with_suffix(f".step-{step:08d}.pt"), weights_only=True)
                for run in (waiting, copied))
        assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"]), step


def test_a_digest_is_the_same_on_either_device():
    from mini_llm.ranks import digest

    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        tensor = torch.randn(1000, 777).mul(100).to(dtype)
        assert digest(tensor.cuda()) == digest(tensor)
