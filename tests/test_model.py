import dataclasses
import math
import re

import pytest
import torch
from conftest import ROOT

from mini_llm.errors import UserError
from mini_llm.hugging_face import from_hugging_face, hugging_face_config, to_hugging_face
from model import ARCHS, GPT, IGNORE, GPTConfig, KVCache, attend

SMALL = dict(n_layers=2, n_heads=4, d_model=32, max_position_embeddings=48, vocab_size=97)


def build(arch="gpt2", seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(arch=arch, **SMALL | changes))


def randomized(model):
    """Weights that hide nothing: no zero projection, no unit gain, no zero bias."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model


def tokens(*shape, seed=1):
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"n_kv_heads": 2}, {"head_dim": 16}])
@pytest.mark.parametrize("arch", ARCHS)
def test_logits_equal_those_of_transformers_in_both_directions(arch, changes):
    import transformers

    if arch == "gpt2" and ("n_kv_heads" in changes or "head_dim" in changes):
        pytest.skip("transformers' GPT-2 has neither")
    ours = randomized(build(arch, **changes)).eval()
    torch.manual_seed(5)
    theirs = transformers.AutoModelForCausalLM.from_config(hugging_face_config(ours.cfg)).eval()
    x = tokens(3, 40)

    missing, unexpected = theirs.load_state_dict(to_hugging_face(ours.cfg, ours.state_dict()), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x).logits, atol=1e-4)

    randomized(theirs)
    back = build(arch, seed=9, **changes).eval()
    back.load_state_dict(from_hugging_face(back.cfg, theirs.state_dict()))
    with torch.no_grad():
        assert torch.allclose(back(x), theirs(x).logits, atol=1e-4)
        assert not torch.allclose(back(x), ours(x), atol=1e-2)  # it is other weights that agree


@pytest.mark.parametrize("arch", ARCHS)
def test_loss_at_initialization_is_that_of_a_uniform_guess(arch):
    loss = build(arch, vocab_size=5000)(tokens(4, 32), tokens(4, 32, seed=2))
    assert loss.item() == pytest.approx(math.log(5000), rel=0.02)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_token_changes_no_logit_before_it(arch):
    model = randomized(build(arch)).eval()
    x = tokens(1, 24)
    changed = x.clone()
    changed[0, 10] = (x[0, 10] + 1) % SMALL["vocab_size"]
    with torch.no_grad():
        before, after = model(x), model(changed)
    assert torch.equal(before[0, :10], after[0, :10])
    assert not torch.allclose(before[0, 10:], after[0, 10:])
    assert {name for name, _ in model.named_buffers()} <= {"rope"}, "no (T, T) mask in every layer"


@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_gets_a_gradient(arch):
    model = randomized(build(arch))
    model(tokens(2, 48), tokens(2, 48, seed=2)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("arch", ARCHS)
def test_one_batch_is_overfitted(arch):
    model = build(arch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    x, y = tokens(4, 24), tokens(4, 24, seed=2)
    for _ in range(300):
        if (loss := model(x, y)).item() < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_ignored_targets_carry_no_loss():
    model, x, y = randomized(build()), tokens(2, 16), tokens(2, 16, seed=2)
    masked = y.clone()
    masked[1] = IGNORE
    assert model(x, masked).item() == pytest.approx(model(x[:1], y[:1]).item(), rel=1e-6)
    each = model(x, masked, reduction="none").view(2, 16)
    assert (each[1] == 0).all() and each.sum().item() == pytest.approx(16 * model(x[:1], y[:1]).item(), rel=1e-6)


def test_activation_checkpointing_changes_no_gradient():
    x, y = tokens(2, 16), tokens(2, 16, seed=2)
    gradients = []
    for recompute in (False, True):
        model = randomized(build(use_activation_checkpoint=recompute))
        model(x, y).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_activation_checkpointing_computes_each_block_twice():
    model, calls = build(use_activation_checkpoint=True), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, *_: calls.append(module))
    model(tokens(2, 16), tokens(2, 16, seed=2)).backward()
    assert len(calls) == 2 * len(model.blocks)


def test_parameters_and_flops_are_those_of_gpt2():
    model = build(n_layers=12, n_heads=12, d_model=768, max_position_embeddings=1024, vocab_size=50257)
    assert model.num_params() == 124_439_808
    matmul = 124_439_808 - 1024 * 768
    assert model.flops_per_token(1024) == 6 * matmul + 12 * 12 * 768 * 1024


def test_an_embedding_that_is_only_looked_up_counts_no_flops():
    model = build("nanochat")
    assert model.num_params() - model.num_params(matmul=True) == 97 * 32


def test_residual_projections_start_smaller_with_depth():
    model = build(n_layers=8, d_model=256)
    assert model.blocks[0].attn.proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.blocks[0].mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_documented_architectures_are_those_that_are_trained():
    text = (ROOT / "docs" / "models.md").read_text()
    table = {name: row for name, row in re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.M) if name in ARCHS}
    assert len(table) >= 4
    norms = dict(layernorm="LayerNorm", rmsnorm="RMSNorm", plain_rmsnorm="RMSNorm without weights")
    for name, row in table.items():
        arch, (norm, positions, mlp, also, embeddings) = ARCHS[name], map(str.strip, row.split("|"))
        assert norm == f"{norms[arch.norm]}, {arch.norm_eps}" and arch.bias == (name == "gpt2")
        assert positions == (f"RoPE, base {arch.rope_theta:,.0f}" if arch.rope_theta else "learned")
        assert mlp == dict(gelu="GELU", swiglu="SwiGLU", relu2="squared ReLU")[arch.mlp]
        assert embeddings == ("tied" if arch.tie_embeddings else "untied")
        assert (f"{arch.qk_norm} RoPE" in also if arch.qk_norm != "no" else "RoPE" not in also), also
        assert ("of embeddings" in also) == arch.embed_norm
        assert (f"logits {arch.softcap:g} tanh(x / {arch.softcap:g})" in also) == (arch.softcap > 0)


def test_nanochats_initial_weights_are_as_init_weight_says():
    model = build("nanochat", d_model=256, vocab_size=1000)
    stds = {name: parameter.std().item() for name, parameter in model.named_parameters()}
    assert stds["tok_emb.weight"] == pytest.approx(1.0, rel=0.05)
    assert stds["head.weight"] == pytest.approx(0.001, rel=0.05)
    for name, std in stds.items():
        if name.startswith("blocks"):
            into_stream = name.endswith(("proj.weight", "down.weight"))
            assert std == pytest.approx(0.0 if into_stream else 256**-0.5, rel=0.05), name


@pytest.mark.parametrize("arch", ARCHS)
def test_weights_are_drawn_once_and_one_by_one(arch):
    """As train_fsdp.py draws them, of which no rank has them all."""
    model = build(arch, seed=5)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        assert torch.equal(model.init_weight(name, torch.empty(parameter.shape)), parameter), name
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in build(arch).parameters())
    with pytest.raises(AssertionError, match="blocks.0.scale: for train_fsdp.py, give its initial values here"):
        model.init_weight("blocks.0.scale", torch.empty(3))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_of_given_weights_has_these_and_no_copies(arch):
    model = build(arch)
    twin, x, y = GPT.of(model.cfg, model.state_dict()), tokens(2, 24), tokens(2, 24, seed=2)
    assert torch.equal(twin(x, y), model(x, y))
    assert all(one.data_ptr() == other.data_ptr() and one.requires_grad
               for one, other in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_autocast_loss_is_close_to_fp32(arch):
    model, x, y = build(arch), tokens(4, 40), tokens(4, 40, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, y)
    assert half.item() == pytest.approx(model(x, y).item(), abs=0.02)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2)])
def test_explicit_attention_is_the_fused_kernel(heads, kv_heads):
    torch.manual_seed(0)
    exact = [torch.randn(2, n, 64, 16, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    results = [(y, *torch.autograd.grad(y.float().square().sum(), inputs))
               for inputs in (exact, half) for y in [attend(*inputs)]]
    for fused, explicit in zip(*results, strict=True):
        assert explicit.dtype == torch.bfloat16 and explicit.shape == fused.shape
        assert (explicit.float() - fused).norm() < 0.01 * fused.norm()


def test_dropout_is_on_in_training_only():
    model, x = randomized(build(dropout=0.5)), tokens(1, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("place", ["embeddings", "attention weights", "residual branches"])
def test_dropout_is_in_each_of_its_places(place):
    model, x = randomized(build(dropout=0.5)), tokens(1, 8)
    for module, where in [(model, "embeddings"), *((block, "residual branches") for block in model.blocks)]:
        module.dropout.p = 0.5 if where == place else 0.0
    if place != "attention weights":
        for block in model.blocks:
            block.attn.cfg = dataclasses.replace(block.attn.cfg, dropout=0.0)
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_norms_epsilon_is_that_of_transformers(arch):
    """Activations so small that it counts."""
    import transformers

    ours = randomized(build(arch)).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "emb" in name:
                parameter.mul_(1e-3)
    theirs = transformers.AutoModelForCausalLM.from_config(hugging_face_config(ours.cfg)).eval()
    theirs.load_state_dict(to_hugging_face(ours.cfg, ours.state_dict()), strict=False)
    theirs.tie_weights()
    with torch.no_grad():
        assert torch.allclose(ours.hidden(tokens(2, 8)), theirs.base_model(tokens(2, 8)).last_hidden_state, atol=1e-4)


def test_a_prompt_in_two_parts_and_one_that_is_too_long_are_refused():
    model = build().eval()
    past = [KVCache(48) for _ in model.blocks]
    model.hidden(tokens(1, 5), past)
    with pytest.raises(AssertionError, match="the prompt whole"):
        model.hidden(tokens(1, 5), past)
    with pytest.raises(AssertionError, match="max_position_embeddings"):
        model(tokens(1, 49))


def test_heads_that_rope_cannot_rotate_are_refused():
    with pytest.raises(UserError, match="--head-dim 7 is odd"):
        build("llama", head_dim=7)


def test_the_cache_holds_no_more_heads_than_keys_have():
    model = randomized(build("qwen3", n_kv_heads=2)).eval()
    past = [KVCache(48) for _ in model.blocks]
    model.hidden(tokens(1, 5), past)
    assert past[0].buffer.shape == (2, 1, 2, 48, 8) and past[0].length == 5


@pytest.mark.parametrize("arch", ARCHS)
def test_forward_and_loss_are_one_graph_for_the_compiler(arch):
    model = build(arch)
    fast = torch.compile(model, fullgraph=True, backend="eager")
    tokens = torch.randint(0, model.cfg.vocab_size, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        loss, exact = fast(tokens, tokens), model(tokens, tokens)
    assert loss.item() == pytest.approx(exact.item(), abs=0.02)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
