"""QK-Clip over processes: maxima are taken together, and every rank scales the rows it holds by the same factors."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Worlds
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from earthshine.model.attention import make_attention
from earthshine.model.config import MLAConfig, ModelConfig
from earthshine.model.transformer import Transformer, initialize
from earthshine.optim.qk_clip import QKClip

# 2 layers, 3 query heads on one key: neither FSDP2's rows nor its columns fall on heads.
SIZES: dict[str, Any] = {
    "vocab_size": 8, "hidden_size": 10, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 3,
}  # fmt: skip
CONFIGS = {
    "grouped": ModelConfig(**SIZES, num_key_value_heads=1, head_dim=6, qkv_bias=True),
    "latent": ModelConfig(
        **SIZES,
        num_key_value_heads=3,
        head_dim=6,
        mla=MLAConfig(kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4, q_lora_rank=5),
    ),
}


def forward_and_clip(name: str, way: str, batches: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters after one clip of what each rank saw of the batches, and the maxima."""
    model = Transformer(CONFIGS[name])
    initialize(model, seed=0)
    with torch.no_grad():
        for p in model.parameters():  # logits of some size, and different ones per head
            if p.ndim == 2:
                p.mul_(torch.linspace(5, 20, len(p)).unsqueeze(1))
    if way == "fsdp":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    clip = QKClip(model, threshold=0.5)
    with clip.recording():
        for seed in range(rank, batches, world):
            tokens = torch.randint(8, (1, 7), generator=torch.Generator().manual_seed(seed))
            model(tokens).sum().backward()
        clip(None, (), {})  # type: ignore[arg-type]
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {n: p.detach() for n, p in whole.items()}, clip.last_max_logits


@pytest.mark.parametrize("name", CONFIGS)
def test_the_clip_of_spread_batches_is_that_of_one_process(worlds: Worlds, name: str) -> None:
    """To the bit: each sequence's logits are computed alone in both. Of four ranks one has seen nothing."""
    for world, way, batches in ((2, "plain", 3), (4, "plain", 3), (2, "fsdp", 4)):
        [(expected, maxima)] = worlds.run(1, forward_and_clip, name, "plain", batches)
        for got, seen in worlds.run(world, forward_and_clip, name, way, batches):
            assert all(torch.equal(seen[layer], maxima[layer]) for layer in maxima)
            assert all(torch.equal(got[n], p) for n, p in expected.items())
    [(unclipped, _)] = worlds.run(1, forward_and_clip, name, "plain", 0)
    changed = {n for n, p in expected.items() if not torch.equal(p, unclipped[n])}
    assert changed
    assert all(".attn.q" in n or ".attn.k" in n for n in changed)


def sharded_clip(name: str) -> dict[str, Tensor]:
    """Given maxima, on projections cut column-wise by tensor parallelism and then by FSDP2."""
    torch.manual_seed(0)
    attention = make_attention(CONFIGS[name], 0)
    for p in attention.parameters():
        nn.init.normal_(p)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        rows = {n: ColwiseParallel() for n, m in attention.named_children() if isinstance(m, nn.Linear)}
        parallelize_module(attention, mesh["tp"], rows)  # type: ignore[arg-type]
        fully_shard(attention, mesh=mesh["dp"])
    QKClip(attention).clip({"": torch.tensor([400.0, 1.0, 150.0])})
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in attention.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_cut_by_tensor_parallelism_and_fsdp_are_scaled_as_whole_ones(worlds: Worlds, name: str) -> None:
    [expected] = worlds.run(1, sharded_clip, name)
    for got in worlds.run(4, sharded_clip, name):
        assert all(torch.equal(got[n], p) for n, p in expected.items())
