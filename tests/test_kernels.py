"""The backward passes written by hand are those of autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mini_llm import kernels
from mini_llm.kernels import CausalAttention, head_cross_entropy
from model import ARCHS, GPT, IGNORE, GPTConfig, attend


def draw(*shape, dtype=torch.float64, seed=0):
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_()


@pytest.mark.skipif(not kernels.ONEDNN, reason="no oneDNN here that multiplies bf16")
@pytest.mark.parametrize("rows", [(7,), (3, 33), (2, 3, 8)], ids=str)
def test_a_large_linear_layer_has_the_bits_of_a_small_one(monkeypatch, rows):
    layer, x, dy = kernels.Linear(48, 80), draw(*rows, 48, dtype=torch.bfloat16), draw(*rows, 80, seed=1).bfloat16()
    torch.nn.Linear.reset_parameters(layer)  # GPT.init_weight does it else
    found = []
    for large in (1 << 40, 1):
        monkeypatch.setattr(kernels, "MIN_FUSED_OUTPUT", large)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert (type(y.grad_fn).__name__ == "LinearFunctionBackward") == (large == 1)
        found.append([y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)])
    for own, library in zip(*found, strict=True):
        assert own.dtype == library.dtype and torch.equal(own, library)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_gradient_of_attention_is_its_difference_quotient(dropout):
    def attention(q, k, v):
        torch.manual_seed(1)  # the same weights dropped each time
        return CausalAttention.apply(q, k, v, dropout)

    torch.autograd.gradcheck(attention, [draw(2, 3, 5, 4, seed=seed) for seed in range(3)])


def test_attention_is_that_of_the_fused_kernel_for_views_of_one_tensor():
    qkv = draw(2, 9, 3 * 2 * 4, dtype=torch.float32)
    results = []
    for function in (lambda *heads: CausalAttention.apply(*heads, 0.0),
                     lambda *heads: F.scaled_dot_product_attention(*heads, is_causal=True)):
        y = function(*(part.view(2, 9, 2, 4).transpose(1, 2) for part in qkv.split(8, dim=-1)))
        (gradient,) = torch.autograd.grad(y.sin().sum(), qkv)
        results.append((y, gradient))
    for own, library in zip(*results, strict=True):
        assert torch.allclose(own, library, atol=1e-6)


@pytest.mark.parametrize("dtype, T, learns", [
    (torch.float32, 64, True), (torch.bfloat16, kernels.MAX_EXPLICIT_CONTEXT + 1, True),
    (torch.bfloat16, 64, False), (torch.float32, 64, False)])
def test_attention_is_the_librarys_where_its_own_is_no_faster(monkeypatch, dtype, T, learns):
    monkeypatch.setattr(CausalAttention, "apply", lambda *_: pytest.fail("explicit products"))
    q, k, v = (draw(1, 1, T, 4, dtype=dtype, seed=seed).requires_grad_(learns) for seed in range(3))
    assert attend(q, k, v).shape == q.shape


@pytest.mark.parametrize("amp, chunked", [(True, False), (False, True)], ids=["attention", "loss"])
def test_second_derivatives_are_refused_where_they_would_be_wrong(amp, chunked):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layers=1, n_heads=2, d_model=32, vocab_size=1500, max_position_embeddings=16))
    tokens = torch.randint(0, 1500, (2, 17))
    x, y = tokens[:, :-1], tokens[:, 1:]
    weights = list(gpt.parameters())
    towards = [torch.randn_like(weight) for weight in weights]

    def along(gradients):
        return sum((one * other).sum() for one, other in zip(gradients, towards, strict=True))

    def curvature(amp, chunked):
        """vᵀHv, v being `towards`."""
        with torch.autocast("cpu", torch.bfloat16, enabled=amp), sdpa_kernel(SDPBackend.MATH):
            loss = gpt(x, y) if chunked else F.cross_entropy(gpt(x).flatten(0, 1), y.flatten())
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        bends = torch.autograd.grad(along(slopes), weights)
        return along(bends).item()

    def loss_at(distance):
        moved = {name: weight.double() + distance * v for (name, weight), v in zip(gpt.named_parameters(), towards,
                                                                                 strict=True)}
        with torch.no_grad():
            logits = torch.func.functional_call(gpt, moved, x)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()

    quotient = (loss_at(1e-3) - 2 * loss_at(0) + loss_at(-1e-3)) / 1e-6
    assert curvature(amp=False, chunked=False) == pytest.approx(quotient, rel=0.02)  # as the error advises
    with pytest.raises(RuntimeError, match="no second derivatives: differentiate"):
        curvature(amp, chunked)


def test_dropped_weights_keep_the_mean_of_attention():
    q, k, v = (draw(2, 4, 64, 16, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    dropped = attend(torch.zeros_like(q, requires_grad=True), k, torch.ones_like(v), dropout=0.5)
    assert dropped.float().mean().item() == pytest.approx(1.0, abs=0.1) and dropped.float().std() > 0.05


@pytest.mark.parametrize("chunk", [1, 300, 10**6])  # a row at a time, a few, all
def test_the_loss_in_chunks_is_the_loss(chunk, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    x, head = draw(13, 8, dtype=torch.float32), draw(101, 8, dtype=torch.float32, seed=1)
    targets = torch.arange(13) * 7
    targets[::4] = IGNORE
    share = torch.rand(13)  # what each token's loss is worth to the rest of the graph
    nats = head_cross_entropy(x, head, targets, IGNORE)
    exact = F.cross_entropy(x @ head.t(), targets, ignore_index=IGNORE, reduction="none")
    assert torch.allclose(nats, exact, atol=1e-5) and (nats[::4] == 0).all()
    with torch.no_grad():  # as in evaluation
        assert torch.equal(head_cross_entropy(x, head, targets, IGNORE), nats)
    for own, library in zip(*(torch.autograd.grad(share @ loss, (x, head)) for loss in (nats, exact)), strict=True):
        assert torch.allclose(own, library, atol=1e-5)


@pytest.mark.parametrize("target", [-2, 101])
def test_a_target_that_is_no_token_is_refused(target):
    x, head = draw(1, 8, dtype=torch.float32), draw(101, 8, dtype=torch.float32)
    with pytest.raises(RuntimeError):
        head_cross_entropy(x, head, torch.tensor([target]), IGNORE)


def test_a_head_that_learns_alone_gets_its_gradient():
    x, head = draw(13, 8, dtype=torch.float32).detach(), draw(101, 8, dtype=torch.float32, seed=1)
    targets = torch.arange(13)
    own, library = (torch.autograd.grad(loss, head)[0] for loss in (
        head_cross_entropy(x, head, targets, IGNORE).mean(), F.cross_entropy(x @ head.t(), targets)))
    assert torch.allclose(own, library, atol=1e-6)


def test_a_loss_beyond_the_range_of_a_probability_is_finite():
    x, head = torch.tensor([[500.0]]), torch.tensor([[1.0], [-1.0]])
    assert head_cross_entropy(x, head, torch.tensor([1]), IGNORE).item() == 1000


def test_the_loss_in_chunks_rounds_no_more_than_autograd():
    x, head, targets = draw(96, 32), draw(2000, 32, seed=1), torch.arange(96) * 20
    exact = torch.autograd.grad(F.cross_entropy(x @ head.t(), targets), (x, head))
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (x, head)]
    own = torch.autograd.grad(head_cross_entropy(*half, targets, IGNORE).mean(), half)
    library = torch.autograd.grad(F.cross_entropy((half[0] @ half[1].t()).float(), targets), half)
    for ours, theirs, true in zip(own, library, exact, strict=True):
        assert (ours - true).norm() < 1.1 * (theirs - true).norm()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_models_loss_and_gradients_are_the_same_in_chunks(arch, dtype, monkeypatch):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(arch=arch, n_layers=2, n_heads=2, d_model=32, vocab_size=1500, max_position_embeddings=16))
    x, y = torch.randint(0, 1500, (2, 3, 16))
    results = []
    for least in (1024, 10**9):
        monkeypatch.setattr(kernels, "MIN_CHUNKED_VOCABULARY", least)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = gpt(x, y)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in gpt.parameters()])))
        gpt.zero_grad()
    (own, gradient), (library, expected) = results
    assert own == pytest.approx(library, abs=1e-5 if dtype is None else 2e-3)
    assert (gradient - expected).norm() < (1e-5 if dtype is None else 2e-2) * expected.norm()


@pytest.mark.parametrize("vocab_size", [kernels.MIN_CHUNKED_VOCABULARY, 100])
def test_a_models_loss_is_reduced_as_asked(vocab_size):
    gpt = GPT(GPTConfig(n_layers=1, n_heads=2, d_model=16, vocab_size=vocab_size, max_position_embeddings=16))
    x, y = torch.randint(0, vocab_size, (2, 3, 16))
    y[0, :5] = IGNORE
    each, total, mean = (gpt(x, y, reduction=reduction) for reduction in ("none", "sum", "mean"))
    assert torch.allclose(each.sum(), total) and torch.allclose(total / 43, mean)
