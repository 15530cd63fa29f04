import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from conftest import ROOT

from mini_llm.errors import UserError
from model import GPT, GPTConfig
from optim import MuonAdamW, OptimConfig, StepGuard, lr_at, make_optimizer, orthogonalize, set_lr, state_sizes

OPTIMIZERS = OptimConfig.__dataclass_fields__["optimizer"].metadata["choices"]


def rates(**changes):
    cfg = OptimConfig(**dict(num_steps=100, lr=1.0, min_lr=0.1, warmup_steps=10) | changes)
    return [lr_at(step, cfg) for step in range(cfg.num_steps)]


@pytest.mark.parametrize("scheduler", ["cosine", "wsd", "linear"])
def test_schedules_rise_to_the_peak_and_end_at_the_floor(scheduler):
    lr = rates(lr_scheduler=scheduler)
    assert lr[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert lr[-1] == pytest.approx(0.1) and max(lr) == lr[9] == 1.0
    assert all(a >= b for a, b in zip(lr[9:], lr[10:], strict=False))
    assert lr[54] == pytest.approx(1.0 if scheduler == "wsd" else 0.55), "halfway"


def test_wsd_is_constant_until_its_last_fifth():
    lr = rates(lr_scheduler="wsd")
    assert set(lr[9:80]) == {1.0} and lr[80] < 1.0
    assert rates(lr_scheduler="wsd", num_steps=4, warmup_steps=0) == pytest.approx([1.0, 1.0, 1.0, 0.1])


@pytest.mark.parametrize("scheduler", ["cosine", "wsd", "linear"])
def test_the_decay_may_have_a_length_of_its_own(scheduler):
    lr = rates(lr_scheduler=scheduler, decay_steps=30)
    assert set(lr[9:70]) == {1.0} and lr[70] < 1.0 and lr[-1] == pytest.approx(0.1)
    short = rates(lr_scheduler=scheduler, decay_steps=30, num_steps=80)  # of the same run, ended earlier
    assert short[:50] == lr[:50] and short[50:] == lr[70:]
    assert rates(lr_scheduler=scheduler, decay_steps=95) == rates(lr_scheduler=scheduler, decay_steps=90)


def test_a_schedule_without_a_decay_has_no_length_of_it():
    with pytest.raises(UserError, match="--decay-steps 10: --lr-scheduler none has no decay"):
        OptimConfig(decay_steps=10, lr_scheduler="none").validate()


def test_none_is_constant_after_the_warm_up():
    assert set(rates(lr_scheduler="none")[9:]) == {1.0}


def test_a_run_shorter_than_its_warm_up_only_rises():
    assert rates(num_steps=5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_min_lr_defaults_to_a_tenth():
    assert rates(min_lr=None, lr=2.0)[-1] == pytest.approx(0.2) and rates(min_lr=0.0)[-1] == 0
    with pytest.raises(UserError, match="--min-lr"):
        OptimConfig(lr=1e-3, min_lr=1e-2).validate()


def tiny(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(n_layers=3, n_heads=2, d_model=16, vocab_size=11, max_position_embeddings=8) | changes))


def draw_gradients(*models):
    for twins in zip(*(model.parameters() for model in models), strict=True):
        twins[0].grad = torch.randn_like(twins[0]) * 10 ** torch.empty(()).uniform_(-3, 1)
        for twin in twins[1:]:
            twin.grad = twins[0].grad.clone()


def test_the_optimizer_is_torchs_adamw_step_for_step():
    model, twin = tiny(), tiny()
    cfg = OptimConfig(lr=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.9)
    ours = make_optimizer(model, cfg, torch.device("cpu"))
    theirs = torch.optim.AdamW([
        {"params": [p for p in twin.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=1e-2, betas=(0.8, 0.9))
    for _ in range(5):
        draw_gradients(model, twin)
        ours.step()
        theirs.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["gpt2", "qwen3", "nanochat"])
def test_muon_is_torchs_muon_and_adamw_step_for_step(arch, dtype, tolerance, monkeypatch):
    if dtype is torch.float32:  # torch's iterates in what Tensor.bfloat16() gives
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    ours, theirs = (tiny(arch=arch, n_kv_heads=1) for _ in range(2))
    cfg = OptimConfig(optimizer="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.3, beta1=0.8, beta2=0.9)
    optimizer = make_optimizer(ours, cfg, torch.device("cpu"), dtype)
    inside = [p for p in theirs.blocks.parameters() if p.ndim == 2]
    others = [p for p in theirs.parameters() if all(p is not q for q in inside)]
    oracles = [torch.optim.Muon(inside, lr=0.02, weight_decay=0.3),
               torch.optim.AdamW([dict(params=[p for p in others if p.ndim >= 2], weight_decay=0.3),
                                  dict(params=[p for p in others if p.ndim < 2], weight_decay=0.0)], lr=1e-3,
                                 betas=(0.8, 0.9))]
    for _ in range(6):
        draw_gradients(ours, theirs)
        set_lr(optimizer, 1e-3)
        optimizer.step()
        for oracle in oracles:
            oracle.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=tolerance if "weight" in name and name.startswith("blocks") else 1e-6), name


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (1, 8)])
def test_matrices_are_orthogonalized_together_as_one_by_one(shape):
    matrices = torch.randn(5, *shape) * torch.tensor([1e-6, 1e-3, 1, 1e3, 1e6]).view(5, 1, 1)
    together = orthogonalize(matrices)
    alone = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    assert together.shape == matrices.shape and torch.allclose(together, alone, atol=1e-5)
    if shape[0] != shape[1]:  # of a square one the least singular values may be too near 0
        values = torch.linalg.svdvals(together)
        assert values.min() > 0.65 and values.max() < 1.25
    assert torch.equal(orthogonalize(torch.zeros(2, *shape)), torch.zeros(2, *shape))


def test_muons_rate_follows_the_schedule_of_adamws():
    cfg = OptimConfig(optimizer="muon", lr=1e-3, muon_lr=0.04)
    optimizer = make_optimizer(tiny(), cfg, torch.device("cpu"))
    assert {group["lr"]: group["rule"] for group in optimizer.param_groups} == {0.04: "muon", 1e-3: "adamw"}
    set_lr(optimizer, 5e-4)
    assert {group["lr"]: group["rule"] for group in optimizer.param_groups} == {0.02: "muon", 5e-4: "adamw"}


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_muon_has_the_matrices_of_the_blocks_only_matrices_decay_and_each_is_in_one_group(arch, optimizer_name):
    model = tiny(arch=arch)
    optimizer = make_optimizer(model, OptimConfig(optimizer=optimizer_name, weight_decay=0.3), torch.device("cpu"))
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        matrix = not name.endswith("bias") and "norm" not in name
        muons = optimizer_name == "muon" and matrix and name.startswith("blocks.")
        assert (group_of[parameter]["rule"] == "muon") == muons, name
        assert group_of[parameter]["weight_decay"] == (0.3 if matrix else 0.0), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_take_no_state(name):
    model = tiny().requires_grad_(False)
    model.blocks[2].requires_grad_()
    optimizer = make_optimizer(model, OptimConfig(optimizer=name), torch.device("cpu"))
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == set(model.blocks[2].parameters())
    moments = {"muon": 1, "adamw": 2}
    assert sum(state_sizes(optimizer)) == 4 * sum(moments[group["rule"]] * p.numel()
                                                  for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_without_a_gradient_are_left_alone(name):
    model = tiny()
    optimizer, before = make_optimizer(model, OptimConfig(optimizer=name), torch.device("cpu")), deepcopy(model)
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    optimizer.step()
    assert {name for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True)
            if not torch.equal(a, b)} == {"norm.weight"}


def test_muon_goes_on_from_its_state_as_if_it_had_never_stopped(tmp_path):
    model, cfg = tiny(), OptimConfig(optimizer="muon")
    optimizer = make_optimizer(model, cfg, torch.device("cpu"))
    draw_gradients(model)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin = deepcopy(model)
    resumed = make_optimizer(twin, cfg, torch.device("cpu"))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    draw_gradients(model, twin)
    optimizer.step()
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    optimizer.zero_grad()
    assert isinstance(optimizer, MuonAdamW) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("device", ["cpu", "mps"])  # on Metal AdamW is not fused, and reads no flag
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_in_fp16_changes_nothing_but_the_scale(name, device):
    model = tiny()
    optimizer = make_optimizer(model, OptimConfig(optimizer=name), torch.device(device))
    scaler, before = torch.amp.GradScaler("cpu", init_scale=8.0), deepcopy(model.state_dict())
    for spoil in (True, False):
        draw_gradients(model)
        if spoil:
            model.norm.weight.grad[0] = torch.inf
        scaler.scale(torch.zeros(()))  # which makes the scale, as the loss does
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(value, before[key]) for key, value in model.state_dict().items()]
        assert all(same) if spoil else not any(same)
        assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_guarded_step_is_the_same_whether_the_host_reads_the_flag_or_the_kernels_do(name):
    models, cfg = [tiny(), tiny()], OptimConfig(optimizer=name)
    optimizers = [make_optimizer(model, cfg, torch.device(device))
                  for model, device in zip(models, ("cpu", "mps"), strict=True)]
    guards = [StepGuard(cfg, optimizer, torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu"))
              for optimizer in optimizers]
    for norm in (1.0, torch.nan, 1.0):
        before = deepcopy(models[0].state_dict())
        draw_gradients(*models)
        assert all(guard.step(torch.tensor(norm), 0).item() == (norm == 1.0) for guard in guards)
        for (key, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
            assert torch.allclose(a, b, atol=1e-6) and torch.equal(a, before[key]) == (norm != 1.0), key


@pytest.mark.parametrize("dtype, expected", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
                                             (None, torch.float32)], ids=str)
def test_muon_multiplies_in_bf16_where_the_model_does(dtype, expected):
    def identity(matrices, _, dtype):
        found.append(dtype)
        return matrices.to(dtype)

    model, found = tiny(), []
    optimizer = make_optimizer(model, OptimConfig(optimizer="muon"), torch.device("cpu"), dtype, identity)
    draw_gradients(model)
    optimizer.step()
    assert set(found) == {expected}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_takes_the_bytes_that_are_reserved_for_it(name):
    model = tiny()
    optimizer = make_optimizer(model, OptimConfig(optimizer=name), torch.device("cpu"))
    draw_gradients(model)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert sorted(state_sizes(optimizer)) == sorted(value.nbytes for value in moments)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_imports_no_compiler(name):
    """It would be a second of every start."""
    subprocess.run([sys.executable, "-c", f"""
import sys, torch
from optim import OptimConfig, make_optimizer
model = torch.nn.Module()
model.blocks = torch.nn.Linear(2, 2)
optimizer = make_optimizer(model, OptimConfig(optimizer={name!r}), torch.device("cpu"))
model.blocks(torch.ones(2)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
from mini_llm.hardware import allow_nondeterministic
with allow_nondeterministic():  # of a sample
    pass
assert "torch._dynamo" not in sys.modules
"""], cwd=ROOT, check=True)
