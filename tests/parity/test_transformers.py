"""Our model against transformers' own classes on random tiny configs: logits, loss and every gradient."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from earthshine.model.config import ModelConfig, MoEConfig, RopeScaling
from earthshine.model.hf_config import to_hf
from earthshine.model.transformer import Transformer, initialize

# One fp32 rounding is 6e-8; a few hundred of them compound over tiny models. Measured: logits 3e-7, gradients 2e-6.
LOGITS_ATOL, GRAD_RTOL = 1e-5, 1e-5


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    heads_per_kv, kv = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    layers = draw(st.integers(1, 3))
    family = draw(st.sampled_from(["llama", "mixtral", "qwen2_moe"]))
    experts = draw(st.integers(1, 6))
    moe = MoEConfig()
    if family != "llama":
        some = tuple(sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1))))
        moe = MoEConfig(
            num_experts=experts,
            top_k=draw(st.integers(1, experts)),
            intermediate_size=20 if family == "qwen2_moe" else 24,
            layers=some if family == "qwen2_moe" else tuple(range(layers)),
            shared_intermediate_size=8 if family == "qwen2_moe" else 0,
        )
    scaling = RopeScaling(kind=draw(st.sampled_from(["none", "llama3"])), original_max_position_embeddings=8)
    return ModelConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=kv * heads_per_kv,
        num_key_value_heads=kv,
        head_dim=8,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_scaling=scaling,
        tie_word_embeddings=draw(st.booleans()),
        moe=moe,
        init_std=0.2,
    )


def their_tensors(theirs: torch.nn.Module, config: ModelConfig, grads: bool = False) -> dict[str, torch.Tensor]:
    """transformers' parameters (or gradients) under our names: its experts are fused gate-first, ours are not."""
    out = {}
    for name, p in theirs.named_parameters():
        t = p.grad if grads else p.detach()
        n = name.removeprefix("model.").replace("embed_tokens", "embed").replace("layers.", "blocks.")
        n = n.replace("self_attn", "attn").replace("input_layernorm", "attn_norm")
        n = n.replace("post_attention_layernorm", "ffn_norm").replace("lm_head", "head")
        n = "final_norm.weight" if n == "norm.weight" else n
        if ".mlp." in n and int(n.split(".")[1]) in config.moe.layers:
            n = n.replace(".mlp.gate.", ".moe.router.").replace(".mlp.shared_expert_gate", ".moe.shared_gate")
            n = n.replace(".mlp.shared_expert.", ".moe.shared.").replace(".mlp.", ".moe.")
        n = n.replace(".mlp.", ".ffn.")
        if n.endswith("experts.gate_up_proj"):
            stem = n.removesuffix("gate_up_proj")
            out[stem + "w_gate_EFD"], out[stem + "w_up_EFD"] = t.chunk(2, 1)
        elif n.endswith("experts.down_proj"):
            out[n.removesuffix("down_proj") + "w_down_EDF"] = t
        else:
            out[n] = t
    return out


def build_pair(config: ModelConfig) -> tuple[Transformer, torch.nn.Module]:
    hf = to_hf(config)
    cls = getattr(transformers, hf["architectures"][0])
    hf_config = cls.config_class(**hf, attn_implementation="eager", experts_implementation="eager")
    torch.manual_seed(0)
    theirs = cls(hf_config).eval()
    ours = Transformer(config)
    initialize(ours, seed=1)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0.0, 0.3)
    ours.load_state_dict(their_tensors(theirs, config))
    return ours, theirs


@settings(max_examples=12, deadline=None, derandomize=True)
@given(configs())
def test_logits_and_every_gradient_equal_transformers(config: ModelConfig) -> None:
    ours, theirs = build_pair(config)
    tokens = torch.randint(0, config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(3))
    logits = ours(tokens)
    expected = theirs(tokens).logits
    scale = max(1.0, expected.abs().max().item())
    assert (logits - expected).abs().max().item() <= LOGITS_ATOL * scale
    loss = ours.loss_sum(tokens[:, :-1], tokens[:, 1:])
    torch.nn.functional.cross_entropy(
        theirs(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    ).backward()
    loss.backward()
    reference = their_tensors(theirs, config, grads=True)
    whole = torch.stack([g.norm() for g in reference.values()]).norm()
    for name, p in ours.named_parameters():
        want = reference[name]
        # The floor is for gradients that are zero but for rounding, as a router's is when top_k=1.
        error = (p.grad - want).norm() / want.norm().clamp_min(1e-3 * whole)
        assert error <= GRAD_RTOL, f"{name}: relative gradient error {error:.2e}"


@settings(max_examples=6, deadline=None, derandomize=True)
@given(configs(), st.integers(1, 9))
def test_cached_decoding_equals_one_pass(config: ModelConfig, split: int) -> None:
    ours, _ = build_pair(config)
    tokens = torch.randint(0, config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        whole = ours(tokens)
        cache = ours.new_cache(2, 11)
        parts = [ours(tokens[:, :split], cache=cache), ours(tokens[:, split : split + 2], cache=cache)]
        parts += [ours(tokens[:, i : i + 1], cache=cache) for i in range(split + 2, 11)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5 * max(1.0, whole.abs().max().item()), rtol=0)


@pytest.mark.parametrize("kind", ["none", "llama3"])
def test_rope_tables_equal_transformers(kind: str) -> None:
    from earthshine.model.attention import rope_frequencies

    config = ModelConfig(
        vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64, rope_theta=5e5, rope_scaling=RopeScaling(kind=kind),
    )  # fmt: skip
    theirs = transformers.LlamaModel(transformers.LlamaConfig(**to_hf(config)))
    assert torch.equal(rope_frequencies(config), theirs.rotary_emb.inv_freq)
