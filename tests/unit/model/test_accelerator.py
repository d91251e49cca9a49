"""What a model asks of an accelerator, where there is none: "meta" stands for one, whose kernels only know shapes.

Nothing in a forward or backward pass waits for the device, the mask of a forward is made once, rotary tables stay where
they are, and attention of variable length gives what the CPU's attention gives.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from earthshine.model import attention as model_attention
from earthshine.model.attention import RopeTables, rope_table
from earthshine.model.config import ModelConfig
from earthshine.model.training_options import BalanceConfig, CapacityConfig, TrainingOptions
from earthshine.model.transformer import Transformer, initialize
from earthshine.ops import attention
from earthshine.ops.grouped_experts import choose_backend

META = torch.device("meta")
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 11 + [2] * 8, [0] + [1] * 23], dtype=torch.int32)
FAMILIES = ("llama", "qwen2", "mixtral", "qwen2_moe", "deepseek_v3", "deepseek_v3, q LoRA")
every_family = pytest.mark.parametrize("architecture", FAMILIES, indirect=True)


def on_meta(config: ModelConfig, **options: Any) -> Transformer:
    with META:
        return Transformer(config, torch.bfloat16, training=TrainingOptions(**options)).train()


@every_family
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recompute": True, "balance": BalanceConfig(z_coefficient=0.1)},
        {"capacity": CapacityConfig(factor=1.0), "balance": BalanceConfig(loss="switch", scope="micro_batch")},
        {"capacity": CapacityConfig(factor=1.0, drop="position")},
    ],
    ids=["plain", "recomputed", "dropping", "dropping by position"],
)
def test_nothing_in_a_pass_waits_for_the_device(
    architecture: ModelConfig, options: dict[str, Any], waits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documents come from the host, as the loader makes them. Rotary tables are made once."""
    made, frequencies = [], model_attention.rope_frequencies
    monkeypatch.setattr(model_attention, "rope_frequencies", lambda config: made.append(1) or frequencies(config))
    model = on_meta(architecture, **options)
    tokens = torch.zeros(DOCUMENTS.shape, dtype=torch.int64, device=META)
    with waits:
        for documents in (DOCUMENTS, DOCUMENTS // 2, None):
            losses = model.losses(tokens, tokens, documents)
            torch.autograd.backward(losses.nll + losses.balance + losses.z)
    assert (waits.transfers, waits.uploads, len(made)) == (0, [], 1)
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
@every_family
def test_nothing_in_evaluation_and_decoding_waits_for_the_device(architecture: ModelConfig, waits: Any) -> None:
    model = on_meta(architecture).eval()
    cache = model.new_cache(2, 24)
    tokens = torch.zeros(DOCUMENTS.shape, dtype=torch.int64, device=META)
    with waits:
        model(tokens, DOCUMENTS)
        for length in (5, 3, 1, 1):
            model.next_token_logits(tokens[:, :length], cache)
    assert (waits.transfers, waits.uploads, cache.length) == (0, [], 10)


@pytest.mark.parametrize(
    "capability, dtype, backend",
    [
        ((9, 0), torch.bfloat16, "grouped"),
        ((10, 0), torch.bfloat16, "grouped"),
        ((8, 0), torch.bfloat16, "loop"),
        ((12, 0), torch.bfloat16, "loop"),
        ((9, 0), torch.float32, "loop"),
        ((9, 0), torch.float16, "loop"),
    ],
)
def test_grouped_products_only_where_they_have_a_kernel(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    """Elsewhere torch copies the counts to the host in each call: nine times a layer. A capacity needs none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        rows, weights = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((4, 64), (2, 64, 64)))
    assert choose_backend(rows, weights, 0)[0] == backend
    assert choose_backend(rows, weights, 3)[0] == "padded"


def test_the_loop_reads_its_counts_once_for_both_passes(waits: Any) -> None:
    from earthshine.ops.grouped_experts import swiglu_experts

    class Counts(Tensor):
        reads = 0

        def tolist(self) -> list[int]:
            Counts.reads += 1
            return [3, 0, 2]

    counts = torch.tensor([3, 0, 2], device=META).as_subclass(Counts)
    x = torch.randn(5, 8, requires_grad=True, device=META)
    weights = [torch.randn(3, *s, requires_grad=True, device=META) for s in ((8, 8), (8, 8), (8, 8))]
    with waits:
        swiglu_experts(x, *weights, counts).sum().backward()
    assert (Counts.reads, waits.transfers) == (1, 0)


def model_of(config: ModelConfig, **options: Any) -> tuple[Transformer, Tensor]:
    model = Transformer(config, training=TrainingOptions(**options))
    initialize(model, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.ndim > 1 else 1)  # attention that is not nearly uniform
    return model, torch.randint(0, config.vocab_size, DOCUMENTS.shape, generator=torch.Generator().manual_seed(0))


def gradients(model: Transformer, tokens: Tensor, documents: Tensor | None) -> list[Tensor]:
    model.zero_grad()
    loss = model.train().losses(tokens, tokens.roll(-1, 1), documents).nll
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@every_family
@pytest.mark.parametrize("recompute", [False, True])
def test_variable_length_attention_gives_the_loss_and_gradients_of_the_cpus(
    architecture: ModelConfig, recompute: bool, flash: Callable[[], list[Any]]
) -> None:
    """2e-5 of each gradient's largest element: the same sums of float32 terms in another order."""
    model, tokens = model_of(architecture, recompute=recompute)
    wanted = gradients(model, tokens, DOCUMENTS)
    alone = gradients(model, tokens, None)
    calls = flash()
    for got, want in zip(gradients(model, tokens, DOCUMENTS), wanted, strict=True):
        assert float((got - want).abs().max()) <= 2e-5 * float(want.abs().max())
    assert len(calls) == architecture.num_hidden_layers * (2 if recompute else 1)
    assert not torch.allclose(wanted[0], alone[0], rtol=1e-3)  # the documents do matter here


@torch.no_grad()
@every_family
def test_decoding_in_chunks_gives_the_logits_of_one_pass(
    architecture: ModelConfig, flash: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latent attention is made to expand its cache, as it does for long chunks."""
    model, tokens = model_of(architecture)
    model.eval()
    for block in model.blocks:
        monkeypatch.setattr(block.attn, "_absorbing_is_cheaper", lambda *_: False, raising=False)
    whole = model(tokens)
    calls = flash()
    cache, parts = model.new_cache(2, 24), []
    for start, end in ((0, 4), (4, 5), (5, 15), (15, 24)):
        parts.append(model(tokens[:, start:end], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5 * float(whole.abs().max()), rtol=0)
    assert len(calls) == 2 * architecture.num_hidden_layers


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"], indirect=True)
@pytest.mark.parametrize("kind", ["varlen", "sdpa"])
def test_the_mask_is_made_once_for_all_layers(
    architecture: ModelConfig, kind: str, flash: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = model_of(architecture)
    if kind == "varlen":
        flash()
    else:
        monkeypatch.setattr(attention, "choose_backend", lambda *args, **options: ("sdpa", "as beyond 1,024 positions"))
    made: list[str] = []
    for name in ("_visible", "_starts"):
        make = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *args, make=make, name=name: made.append(name) or make(*args))
    model(tokens, DOCUMENTS)
    assert made == [{"varlen": "_starts", "sdpa": "_visible"}[kind]]


@pytest.mark.filterwarnings("default")  # torch's compiler warns itself, and hides that where warnings are no errors
@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3"], indirect=True)
def test_compiled_blocks_take_documents_of_any_number(
    architecture: ModelConfig, flash: Callable[[], list[Any]]
) -> None:
    """One graph for each block's parts, whatever the number of documents: it is data."""
    model, tokens = model_of(architecture)
    wanted = [gradients(model, tokens, d) for d in (DOCUMENTS, DOCUMENTS // 2, DOCUMENTS * 0)]
    flash()
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="eager", dynamic=False)
    for i, documents in enumerate((DOCUMENTS, DOCUMENTS // 2, DOCUMENTS * 0)):
        again = torch._dynamo.config.patch(error_on_recompile=True) if i else nullcontext()
        with again:
            for got, want in zip(gradients(model, tokens, documents), wanted[i], strict=True):
                assert float((got - want).abs().max()) <= 2e-5 * float(want.abs().max())
    torch._dynamo.reset()


def test_rotary_tables_are_made_once_and_are_those_of_each_forward(architecture: ModelConfig) -> None:
    tables, like = RopeTables(architecture), torch.zeros(1)
    first = tables.rows(3, 100, like)
    for got, want in zip(first, rope_table(architecture, torch.arange(3, 100)), strict=True):
        assert torch.equal(got, want)
    cached = tables._tables
    for position in range(100, 128):  # a decoded token each
        for got, want in zip(
            tables.rows(position, position + 1, like), rope_table(architecture, torch.tensor([position])), strict=True
        ):
            assert torch.equal(got, want)
    assert tables._tables is cached and tables.rows(0, 129, like)[0].shape[0] == 129
    assert tables.rows(0, 2, like.to("meta"))[0].is_meta and not tables.rows(0, 2, like)[0].is_meta


@pytest.mark.parametrize("architecture", ["llama"], indirect=True)
def test_tables_made_in_inference_mode_serve_training(architecture: ModelConfig) -> None:
    model, tokens = model_of(replace(architecture, num_hidden_layers=1))
    with torch.inference_mode():
        model(tokens)
    assert gradients(model, tokens, None)
    assert "rope" not in " ".join(model.state_dict())
