import pytest
import torch

from config import UserError
from model import GPT, GPTConfig
from optim import OptimConfig, lr_at, make_optimizer


def rates(**changes):
    cfg = OptimConfig(**dict(num_steps=100, lr=1.0, min_lr=0.1, warmup_steps=10) | changes)
    return [lr_at(step, cfg) for step in range(cfg.num_steps)]


@pytest.mark.parametrize("scheduler", ["cosine", "wsd", "linear"])
def test_schedules_rise_to_the_peak_and_end_at_the_floor(scheduler):
    lr = rates(lr_scheduler=scheduler)
    assert lr[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert lr[-1] == pytest.approx(0.1) and max(lr) == lr[9] == 1.0
    assert all(a >= b for a, b in zip(lr[9:], lr[10:], strict=False))


def test_wsd_is_constant_until_its_last_fifth():
    lr = rates(lr_scheduler="wsd")
    assert set(lr[9:80]) == {1.0} and lr[80] < 1.0


def test_none_is_constant_after_the_warm_up():
    assert set(rates(lr_scheduler="none")[9:]) == {1.0}


def test_a_run_shorter_than_its_warm_up_only_rises():
    assert rates(num_steps=5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_min_lr_defaults_to_a_tenth():
    assert rates(min_lr=None, lr=2.0)[-1] == pytest.approx(0.2)
    with pytest.raises(UserError, match="--min-lr"):
        OptimConfig(lr=1e-3, min_lr=1e-2).validate()


def test_decay_is_on_matrices_only():
    model = GPT(GPTConfig(n_layers=1, n_heads=2, d_model=8, vocab_size=11, max_position_embeddings=8))
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.3), torch.device("cpu"))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (not name.endswith("bias") and "norm" not in name), name


def test_the_optimizer_is_torchs_adamw_step_for_step():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layers=1, n_heads=2, d_model=8, vocab_size=11, max_position_embeddings=8))
    torch.manual_seed(0)
    twin = GPT(GPTConfig(n_layers=1, n_heads=2, d_model=8, vocab_size=11, max_position_embeddings=8))
    cfg = OptimConfig(lr=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.9)
    ours = make_optimizer(model, cfg, torch.device("cpu"))
    theirs = torch.optim.AdamW([
        {"params": [p for p in twin.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=1e-2, betas=(0.8, 0.9))
    for _ in range(5):
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
