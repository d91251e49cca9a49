"""Our model against transformers' own classes, on random tiny configs of every family: logits, every gradient, cached
decoding; and weights that go from their files to ours and back."""

import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from earthshine.checkpoint.hf import save_model
from earthshine.checkpoint.load import load_model
from earthshine.checkpoint.name_tables import entries
from earthshine.model.config import MLAConfig, ModelConfig, MoEConfig, RopeScaling
from earthshine.model.hf_config import to_hf
from earthshine.model.hf_families import FAMILIES, Family
from earthshine.model.transformer import Transformer

# One fp32 rounding is 6e-8; some hundreds compound over tiny models. Seen in 480 draws: logits 2e-6, gradients 5e-6.
RELATIVE = 1e-5
LENGTH = 11


@st.composite
def ropes(draw: st.DrawFn) -> RopeScaling:
    kind = draw(st.sampled_from(["none", "llama3", "yarn"]))
    if kind == "none":
        return RopeScaling()
    scales = {name: draw(st.sampled_from([0.0, 0.7, 1.0])) for name in ("mscale", "mscale_all_dim")}
    return RopeScaling(kind=kind, factor=4.0, original_max_position_embeddings=16, **(scales if kind == "yarn" else {}))


@st.composite
def moes(draw: st.DrawFn, family: Family, layers: int) -> MoEConfig:
    """Experts, k, and what the family leaves free: partial layers, gate, shared width, groups."""
    if family == "deepseek_v3":
        groups, per_group = draw(st.sampled_from([(1, 5), (2, 2), (2, 3), (3, 2), (4, 2)]))
        chosen = draw(st.integers(1, groups))
        width, first = draw(st.sampled_from([4, 12])), draw(st.integers(0, layers - 1))
        return MoEConfig(
            num_experts=groups * per_group,
            top_k=draw(st.integers(1, chosen * per_group)),
            intermediate_size=width,
            layers=tuple(range(first, layers)),
            gate="sigmoid_bias",
            renormalize=draw(st.booleans()),
            routed_scaling=draw(st.sampled_from([1.0, 2.446])),
            num_groups=groups,
            top_k_groups=chosen,
            shared_intermediate_size=width * draw(st.integers(1, 2)),
            shared_gated=False,
        )
    experts = draw(st.integers(1, 6))
    free = family != "mixtral"
    some = tuple(sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1))))
    renormalize = draw(st.booleans()) or not free
    return MoEConfig(
        num_experts=experts,
        top_k=draw(st.integers(1, experts)),
        intermediate_size=20 if free else 24,
        layers=some if free else tuple(range(layers)),
        gate="topk_softmax" if renormalize and draw(st.booleans()) else "softmax_topk",
        renormalize=renormalize,
        shared_intermediate_size=draw(st.sampled_from([4, 12])) if family == "qwen2_moe" else 0,
    )


@st.composite
def configs(draw: st.DrawFn, family: Family) -> ModelConfig:
    layers, kv, heads_per_kv = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    mla, head_dim = MLAConfig(), draw(st.sampled_from([6, 8]))
    if family == "deepseek_v3":
        mla = MLAConfig(
            kv_lora_rank=draw(st.sampled_from([6, 12])),
            q_lora_rank=draw(st.sampled_from([0, 10])),
            qk_nope_head_dim=draw(st.sampled_from([4, 6])),
            qk_rope_head_dim=draw(st.sampled_from([2, 8])),
            v_head_dim=draw(st.sampled_from([5, 8])),
            rope_interleaved=draw(st.booleans()),
        )
        heads_per_kv, head_dim = 1, mla.qk_nope_head_dim + mla.qk_rope_head_dim
    sparse = family.endswith("_moe") or family == "mixtral" or (family == "deepseek_v3" and draw(st.integers(0, 3)))
    return ModelConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=kv * heads_per_kv,
        num_key_value_heads=kv,
        head_dim=head_dim,
        max_position_embeddings=64,
        rope_scaling=draw(ropes()),
        tie_word_embeddings=draw(st.booleans()),
        qkv_bias=family == "qwen2" or (family == "qwen2_moe" and draw(st.booleans())),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        mla=mla,
        moe=draw(moes(family, layers)) if sparse else MoEConfig(),
        model_type="mistral" if family == "mistral" else "",
    )


def build_theirs(config: ModelConfig) -> nn.Module:
    """Their model in eager mode, with random numbers in everything that is saved."""
    hf = to_hf(config)
    cls = getattr(transformers, hf["architectures"][0])
    theirs = cls(cls.config_class(**hf, attn_implementation="eager", experts_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.normal_(0.0, 0.3, generator=generator)
    return theirs


def under_our_names(config: ModelConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, whose experts are stacked, as ours. `entries` knows both; that it is right is what is tested."""
    found: dict[str, list[Tensor]] = {}
    for entry in entries(config):
        place = next(p for p in entry.locations if p.name in theirs)
        rows = theirs[place.name][place.within([slice(0, entry.shape[0])])]
        found.setdefault(entry.ours, []).append(rows if place.expert < 0 else rows[0])
    return {ours: torch.stack(parts) if ours.endswith(("EFD", "EDF")) else parts[0] for ours, parts in found.items()}


def build_pair(config: ModelConfig) -> tuple[Transformer, nn.Module]:
    theirs, ours = build_theirs(config), Transformer(config).eval()
    ours.load_state_dict(under_our_names(config, theirs.state_dict()))
    return ours, theirs


def tokens_BS(config: ModelConfig) -> Tensor:
    return torch.randint(0, config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def assert_equal_logits(got: Tensor, want: Tensor, what: str) -> None:
    error = float((got - want).detach().abs().max()) / max(1.0, float(want.detach().abs().max()))
    assert error <= RELATIVE, f"{what}: relative difference {error:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_logits_and_every_gradient_equal_transformers(family: Family, data: st.DataObject) -> None:
    config = data.draw(configs(family))
    assert config.family == family
    ours, theirs = build_pair(config)
    tokens = tokens_BS(config)
    expected = theirs(tokens).logits
    assert_equal_logits(ours(tokens), expected, "logits")
    nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    ours.losses(tokens[:, :-1], tokens[:, 1:]).nll.backward()
    gradients = {name: torch.zeros_like(t) for name, t in theirs.state_dict().items()}  # 0 for what has none: the bias
    gradients |= {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    reference = under_our_names(config, gradients)
    whole = torch.stack([g.norm() for g in reference.values()]).norm()
    for name, p in ours.named_parameters():
        assert p.grad is not None
        # The floor is for gradients that are zero but for rounding, as a router's is when its weights always sum to 1.
        error = float((p.grad - reference[name]).norm() / reference[name].norm().clamp_min(1e-3 * whole))
        assert error <= RELATIVE, f"{name}: relative gradient error {error:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.data())
def test_cached_decoding_equals_transformers(family: Family, data: st.DataObject) -> None:
    """A first part at once, then two positions, then one by one: against their cache, and against one pass."""
    config = data.draw(configs(family))
    ours, theirs = build_pair(config)
    first = data.draw(st.integers(1, LENGTH - 2))
    parts = tokens_BS(config).split([first, 2, *[1] * (LENGTH - first - 2)], 1)
    cache, their_cache, got = ours.new_cache(2, LENGTH), None, []
    with torch.no_grad():
        for part in parts:
            expected = theirs(part, past_key_values=their_cache, use_cache=True)
            their_cache = expected.past_key_values
            got.append(ours(part, cache=cache))
            assert_equal_logits(got[-1], expected.logits, f"after {cache.length} positions")
        assert_equal_logits(torch.cat(got, 1), ours(torch.cat(parts, 1)), "one pass")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(st.data())
def test_weights_come_back_bit_for_bit(family: Family, data: st.DataObject) -> None:
    """Their files, per expert and with stacked experts, through our model into files that they read again."""
    config = data.draw(configs(family))
    theirs = build_theirs(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        theirs.save_pretrained(folder / "theirs")
        theirs.save_pretrained(folder / "stacked", save_original_format=False)
        for source in ("theirs", "stacked"):
            model = load_model(folder / source)
            assert model.config.family == family
            save_model(model, model.config, folder / f"from-{source}")
        saved = load_file(folder / "theirs" / "model.safetensors")
        assert config.is_moe == (set(saved) != set(load_file(folder / "stacked" / "model.safetensors")))
        for source in ("theirs", "stacked"):
            ours = load_file(folder / f"from-{source}" / "model.safetensors")
            assert set(ours) == set(saved)
            assert all(torch.equal(ours[name], tensor) for name, tensor in saved.items())
        again, report = type(theirs).from_pretrained(folder / "from-theirs", output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        assert again.config.tie_word_embeddings == config.tie_word_embeddings
        state = again.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
