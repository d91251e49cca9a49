"""QK-Clip on the attention modules of `model.attention`: every logit of a head becomes gamma_h times what it was.

Everything in float64; 1e-12: logits of some tens, of sums of tens of terms.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import earthshine.model.attention as attention_module
from earthshine.errors import ConfigError, TrainingDivergedError
from earthshine.model.attention import make_attention, rope_table
from earthshine.model.config import MLAConfig, ModelConfig
from earthshine.model.transformer import Transformer, initialize
from earthshine.ops.attention import causal_attention
from earthshine.optim.groups import param_groups
from earthshine.optim.muon import Muon
from earthshine.optim.qk_clip import QKClip, _scale_rows

P = 9
_MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "one key each": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4},
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4},
    "one key, biased": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6, "qkv_bias": True},
    "latent": {"num_attention_heads": 3, "head_dim": 10, "mla": MLAConfig(**_MLA)},
    "latent, queries too": {"num_attention_heads": 3, "head_dim": 10, "mla": MLAConfig(**_MLA, q_lora_rank=7)},
}
every_kind = pytest.mark.parametrize("name", CONFIGS)


def config(name: str, **options: Any) -> ModelConfig:
    sizes = CONFIGS[name]
    sizes = {"num_key_value_heads": sizes["num_attention_heads"], "num_hidden_layers": 1} | sizes | options
    return ModelConfig(vocab_size=8, hidden_size=24, intermediate_size=8, **sizes)


def build(name: str) -> nn.Module:
    """An attention in float64, its heads of very different sizes."""
    attention = make_attention(config(name), 0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in attention.parameters():
            p.normal_(0.5, 1, generator=generator)
        for local, (n, _) in attention.query_key_heads()["rows"].items():
            p = attention.get_parameter(local)
            p.mul_(
                torch.linspace(0.2, 1.5, n, dtype=p.dtype)
                .repeat_interleave(p.shape[0] // n)
                .view(-1, *[1] * (p.ndim - 1))
            )
    return attention


@contextmanager
def scores_of_each_forward() -> Iterator[list[Tensor]]:
    """scale * q k^T of every head and pair of positions, (B, H, P, P), in the order of the layers' forwards."""
    scores: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, scale: float | None = None, **kwargs: Any) -> Tensor:
        each_k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores.append((q.shape[-1] ** -0.5 if scale is None else scale) * q.detach() @ each_k.detach().mT)
        return causal_attention(q, k, v, *args, scale=scale, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "causal_attention", spy)
        yield scores


def logits(attention: nn.Module, name: str, seed: int = 0) -> Tensor:
    """The plain definition; -inf where a key lies after its query."""
    x = torch.randn(2, P, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), scores_of_each_forward() as scores:
        attention(x, rope_table(config(name), torch.arange(P)), None, None)
    return scores[0].masked_fill(torch.ones(P, P, dtype=torch.bool).triu(1), -math.inf)


def largest(scores_BHSS: Tensor) -> Tensor:
    return scores_BHSS.amax((0, 2, 3))


def threshold_between(maxima: Tensor) -> float:
    """A threshold that half of the heads are above, those at all extremes on their side."""
    ordered = maxima.sort().values
    return float(ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2


@every_kind
@pytest.mark.parametrize("alpha", [0.5, 0.2, 0.0, 1.0])
def test_every_logit_of_a_head_is_scaled_by_its_gamma(name: str, alpha: float) -> None:
    attention = build(name)
    before = logits(attention, name)
    tau = threshold_between(largest(before))
    gamma = (tau / largest(before)).clamp(max=1)
    assert 0 < (gamma < 1).sum() < len(gamma)
    clip = QKClip(attention, tau, alpha)
    found = clip.clip({"": largest(before)})
    torch.testing.assert_close(found[""], gamma, rtol=1e-14, atol=0)
    after = logits(attention, name)
    torch.testing.assert_close(after, before * gamma.view(-1, 1, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(largest(after), largest(before) * gamma, rtol=1e-12, atol=0)


def test_one_key_each_is_the_papers_rule() -> None:
    """W_q^h and W_k^h times sqrt(gamma_h); values are not touched, nor heads below the threshold, not by a bit."""
    attention, before = build("one key each"), build("one key each")
    maxima = torch.tensor([50.0, 100.0, 250.0, 400.0], dtype=torch.float64)
    QKClip(attention).clip({"": maxima})
    for h, gamma in enumerate([1, 1, 100 / 250, 100 / 400]):
        rows = slice(4 * h, 4 * h + 4)
        for proj in ("q_proj", "k_proj"):
            got, old = getattr(attention, proj).weight[rows], getattr(before, proj).weight[rows]
            torch.testing.assert_close(got, old * math.sqrt(gamma), rtol=1e-15, atol=0)
            assert torch.equal(got, old) == (gamma == 1)
    assert torch.equal(attention.v_proj.weight, before.v_proj.weight)


@pytest.mark.parametrize("name", ["latent", "latent, queries too"])
def test_latent_attention_is_the_papers_rule(name: str) -> None:
    """q_C and k_C times sqrt(gamma), q_R times gamma, the shared k_R and the values as they were."""
    attention, before = build(name), build(name)
    maxima = torch.tensor([90.0, 120.0, 300.0], dtype=torch.float64)
    QKClip(attention).clip({"": maxima})
    expected = {local: p.detach().clone() for local, p in before.named_parameters()}
    queries = "q_proj.weight" if name == "latent" else "q_b_proj.weight"
    for h, gamma in enumerate([1, 100 / 120, 100 / 300]):
        expected[queries][10 * h : 10 * h + 6] *= math.sqrt(gamma)
        expected[queries][10 * h + 6 : 10 * h + 10] *= gamma
        expected["kv_b_proj.weight"][14 * h : 14 * h + 6] *= math.sqrt(gamma)
    torch.testing.assert_close(dict(attention.named_parameters()), expected, rtol=1e-15, atol=0)


def test_rows_that_heads_declare_cover_their_parameters() -> None:
    for name in CONFIGS:
        attention = build(name)
        parameters = dict(attention.named_parameters())
        declared = attention.query_key_heads()["rows"]
        assert {local: n * sum(sizes) for local, (n, sizes) in declared.items()} == {
            local: parameters[local].shape[0] for local in declared
        }
        assert all(
            n.partition(".")[0] in {d.partition(".")[0] for d in declared} for n in parameters if n.endswith("bias")
        )


def test_low_precision_weights_are_rounded_once() -> None:
    attention = build("one key each").bfloat16()
    before = attention.q_proj.weight.detach().clone()
    QKClip(attention).clip({"": torch.tensor([101.0, 1, 1, 1])})
    expected = (before.double() * math.sqrt(100 / 101)).bfloat16()
    assert torch.equal(attention.q_proj.weight[:4], expected[:4])


# ------------------------------------------------------------------------------------------------- recording and hook


def model_of(name: str) -> Transformer:
    model = Transformer(config(name, num_hidden_layers=2), compute_dtype=torch.float64)
    initialize(model, seed=0)
    return model.double()


def tokens(seed: int) -> Tensor:
    return torch.randint(8, (2, P), generator=torch.Generator().manual_seed(seed))


def plain_maxima(model: Transformer, batches: list[Tensor], documents: Tensor | None = None) -> dict[str, Tensor]:
    """By the plain definition, outside of QKClip; also of packed documents."""
    hidden = torch.ones(P, P, dtype=torch.bool).triu(1)
    if documents is not None:
        hidden = hidden | (documents[:, None, :, None] != documents[:, None, None, :])
    with torch.no_grad(), scores_of_each_forward() as scores:
        for batch in batches:
            model(batch, documents_BS=documents)
    maxima = torch.stack([largest(s.masked_fill(hidden, -math.inf)) for s in scores])
    layers = [name for name, module in model.named_modules() if hasattr(module, "max_logits_H")]
    return dict(zip(layers, maxima.unflatten(0, (len(batches), len(layers))).amax(0), strict=True))


@pytest.mark.parametrize("name", ["grouped", "latent"])
@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_are_recorded_as_one_maximum_and_evaluation_is_not(name: str, packed: bool) -> None:
    model = model_of(name).train()
    documents = torch.tensor([[0] * 4 + [1] * 5] * 2) if packed else None
    clip = QKClip(model)
    alone = [model(tokens(seed), documents_BS=documents) for seed in (1, 2)]
    with clip.recording():
        for seed, expected in zip((1, 2), alone, strict=True):
            assert torch.equal(model(tokens(seed), documents_BS=documents), expected)
        with torch.no_grad():
            model(tokens(3))
        model.eval()
        model(tokens(3))
    before = copy.deepcopy(model.state_dict())
    clip.clip_recorded()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    expected = plain_maxima(model, [tokens(1), tokens(2)], documents)
    assert list(clip.last_max_logits) == list(expected)
    torch.testing.assert_close(clip.last_max_logits, expected, rtol=1e-12, atol=0)
    assert clip.measure().values == [[float(torch.cat(list(clip.last_max_logits.values())).max())], [0]]


def test_the_hook_clips_after_the_step_by_what_the_forwards_before_it_saw() -> None:
    model, twin = model_of("grouped").train(), model_of("grouped").train()
    expected = plain_maxima(model, [tokens(1), tokens(2)])
    tau = threshold_between(torch.cat(list(expected.values())))
    optimizers = [Muon(param_groups(m), lr=0.01) for m in (model, twin)]
    clip, twin_clip = QKClip(model, tau), QKClip(twin, tau)
    optimizers[0].register_step_post_hook(clip)
    with clip.recording():
        for seed in (1, 2):
            model(tokens(seed)).square().mean().backward()
        optimizers[0].step()
        for seed in (1, 2):
            twin(tokens(seed)).square().mean().backward()
        optimizers[1].step()
        gamma = torch.cat(list(twin_clip.clip(expected).values()))
        assert clip.measure().values[1] == twin_clip.measure().values[1] == [(gamma < 1).sum()] != [0]
        torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-12, atol=0)
        before = copy.deepcopy(twin.state_dict())
        optimizers[0].step()  # no forward since: nothing is clipped
        optimizers[1].step()
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-12, atol=0)
    assert any(not torch.equal(before[n], p) for n, p in twin.named_parameters())
    assert all(m.max_logits_H is None for m in model.modules() if hasattr(m, "max_logits_H"))


# ------------------------------------------------------------------------------------------------------------ refusals


def test_normalized_queries_and_keys_are_refused() -> None:
    normalized = ModelConfig(
        vocab_size=8, hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=4, qk_norm=True,
    )  # fmt: skip
    attention = make_attention(normalized, 0)
    with pytest.raises(ConfigError, match="normalizes queries and keys.*cannot lower them. Leave QKClip out"):
        QKClip(attention)


def test_maxima_that_do_not_fit_are_refused() -> None:
    clip = QKClip(build("grouped"))
    with pytest.raises(ConfigError, match="max_logits of 'elsewhere': not one of the layers"):
        clip.clip({"elsewhere": torch.zeros(6)})
    for shape in ((7,), (6, 1)):
        with pytest.raises(ConfigError, match=r"not \[6\], one per query head"):
            clip.clip({"": torch.zeros(shape)})


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_maximum_that_is_not_finite_stops_before_anything_changes(value: float) -> None:
    attention = build("one key each")
    before = copy.deepcopy(attention.state_dict())
    with pytest.raises(TrainingDivergedError, match="not finite"):
        QKClip(attention).clip({"": torch.tensor([500.0, 1, value, 1])})
    assert all(torch.equal(before[name], p) for name, p in attention.state_dict().items())


@pytest.mark.parametrize("name", ["grouped", "latent"])
def test_layers_with_frozen_queries_or_keys_are_left_out(name: str) -> None:
    model = model_of(name).train()
    queries, keys = ("q_proj.weight", "k_proj.weight") if name == "grouped" else ("q_proj.weight", "kv_b_proj.weight")
    model.blocks[0].attn.get_parameter(keys).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    clip = QKClip(model, threshold=1e-9)
    with clip.recording():
        model(tokens(1)).sum().backward()
        clip.clip_recorded()
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == {f"blocks.1.attn.{queries}", f"blocks.1.attn.{keys}"}
    assert clip.frozen == ("blocks.0.attn",)
    model.blocks[1].attn.get_parameter(queries).requires_grad_(False)
    with pytest.raises(ConfigError, match="every attention layer are frozen: QK-Clip has nothing to scale"):
        QKClip(model)


class Foreign(nn.Module):
    """Somebody else's attention, that says nothing of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(6, 8, dtype=torch.float64), nn.Linear(6, 4, dtype=torch.float64)


HEADS = {
    "kind": "gqa", "heads": 4, "key_heads": 2,
    "query": ("to_q.weight", "to_q.bias"), "key": ("to_k.weight", "to_k.bias"),
    "rows": {"to_q.weight": (4, (2,)), "to_q.bias": (4, (2,)), "to_k.weight": (2, (2,)), "to_k.bias": (2, (2,))},
}  # fmt: skip


def test_other_modules_are_described_by_the_caller() -> None:
    model = nn.Sequential(Foreign(), Foreign())
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def scores() -> Tensor:
        q, k = model[1].to_q(x).view(3, 4, 2), model[1].to_k(x).view(3, 2, 2)
        return torch.einsum("shc,thc->hst", q, k.repeat_interleave(2, 1))

    before, clip = scores(), QKClip(model, heads={"[01]": HEADS})
    clip.clip({"1": torch.tensor([400.0, 200.0, 1.0, 150.0])})
    gamma = torch.tensor([0.25, 0.5, 1, 2 / 3], dtype=torch.float64).view(4, 1, 1)
    torch.testing.assert_close(scores(), before * gamma, rtol=1e-6, atol=1e-12)  # float32 maxima
    with pytest.raises(ConfigError, match=r"0 \(Foreign\) cannot be recorded.*max_logits"), clip.recording():
        pass


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({}, "no module of the model has query_key_heads"),
        ({"nowhere": HEADS}, "'nowhere' matches no module"),
        ({"0": {"kind": "gqa"}}, "heads of 0: needs kind, heads, key_heads, rows, query, key"),
        ({"0": HEADS | {"kind": "mha"}}, "with kind 'gqa' or 'mla'"),
        ({"0": HEADS | {"key_heads": 3}}, "4 query heads cannot share 3 key heads evenly"),
        ({"0": HEADS | {"query": ("to_p.weight",)}}, "query 'to_p.weight' must be a parameter"),
        ({"0": HEADS | {"heads": 8}}, "8 rows of to_q.weight are not 8 query heads"),
        ({"0": HEADS | {"normalized": True}}, "normalizes queries and keys"),
        ({"0": HEADS | {"normalised": True}}, "'normalised' is not a known key. Did you mean 'normalized'"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(heads: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QKClip(nn.Sequential(Foreign()), heads=heads)


def test_weights_that_layers_share_are_refused() -> None:
    model = nn.Sequential(Foreign(), Foreign())
    model[1].to_k = model[0].to_k
    with pytest.raises(ConfigError, match=r"1.to_k.weight is shared with 0"):
        QKClip(model, heads={"[01]": HEADS})


@pytest.mark.parametrize(("threshold", "alpha"), [(0.0, 0.5), (math.nan, 0.5), (100.0, 1.5), (100.0, -0.1)])
def test_options_out_of_range_are_refused(threshold: float, alpha: float) -> None:
    with pytest.raises(ConfigError, match="must be"):
        QKClip(build("grouped"), threshold, alpha)


# ----------------------------------------------------------------------------------------------------- sharded weights


@pytest.fixture
def rank_of_four(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process that believes to be one of four; its collectives do nothing."""
    dist.init_process_group("fake", rank=request.param, world_size=4, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


WAYS: dict[str, tuple[tuple[int, int], tuple[Placement, ...], Callable[[int, int], range]]] = {
    # FSDP2 cuts in two what tensor parallelism has cut in two.
    "tp x fsdp": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0)), lambda i, j: range(24)[12 * j + 6 * i :][:6]),
    "uneven": ((4, 1), (Shard(0), Replicate()), lambda i, _: range(26)[7 * i : 7 * i + 7]),
    "columns": ((2, 2), (Replicate(), Shard(1)), lambda *_: range(26)),
}  # fmt: skip


@pytest.mark.parametrize("rank_of_four", range(4), indirect=True)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_a_shard_get_their_own_factors(rank_of_four: int, way: str, bias: bool) -> None:
    mesh_shape, placements, held = WAYS[way]
    if bias:
        placements = tuple(Replicate() if placement == Shard(1) else placement for placement in placements)
    i, j = divmod(rank_of_four, mesh_shape[1])
    n = 26 if way == "uneven" else 24  # 7, 7, 7, 5
    rows = list(range(n)[held(i, j).start : held(i, j).stop])
    shape = (n,) if bias else (n, 4)
    local = torch.ones(len(rows)) if bias else torch.ones(len(rows), 2 if way == "columns" else 4)
    stride = (1,) if bias else (4, 1)
    weight = DTensor.from_local(
        local, init_device_mesh("cpu", mesh_shape), placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    _scale_rows("weight", weight, torch.arange(n, dtype=torch.float64))
    expected = torch.tensor(rows, dtype=torch.float32).view(-1, *[1] * (len(shape) - 1)).expand_as(local)
    assert torch.equal(local, expected)


@pytest.mark.parametrize("rank_of_four", [1], indirect=True)
def test_a_forward_of_some_heads_records_those(rank_of_four: int) -> None:
    """As under tensor parallelism; the fake collective leaves this process's maxima, the others' heads at -inf."""
    clip = QKClip(build("grouped"), first_head=2)
    clip.clip({"": torch.tensor([7.0, 9.0])})
    expected = torch.tensor([-math.inf, -math.inf, 7, 9, -math.inf, -math.inf], dtype=torch.float64)
    assert torch.equal(clip.last_max_logits[""], expected)
