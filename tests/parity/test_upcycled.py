"""transformers loads what is written, and it computes the dense model's function."""

import pytest
import torch

from dense_dir import dense_dir
from earthshine.checkpoint.load import load_model
from earthshine.upcycle.config import UpcycleConfig
from earthshine.upcycle.convert import upcycle

__all__ = ["dense_dir"]  # a fixture

CASES = [  # options, transformers' class
    (UpcycleConfig(experts=8, top_k=2), "MixtralForCausalLM"),
    (UpcycleConfig(experts=4, top_k=3, router_std=1.0, seed=3), "MixtralForCausalLM"),
    (UpcycleConfig(experts=3, top_k=3, layers=(1,)), "Qwen2MoeForCausalLM"),
    (UpcycleConfig(experts=4, top_k=2, layers=(0, 2), shared_intermediate_size=8), "Qwen2MoeForCausalLM"),
]


def tokens_BS() -> torch.Tensor:
    return torch.randint(0, 64, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("options", "cls"), CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_the_dense_models(dense_dir, tmp_path, options, cls, tied):
    """<= 1e-5 absolute on tiny random models (the design's bar); seen: a few 1e-7. Both libraries, both models."""
    from transformers import AutoModelForCausalLM

    source, out = dense_dir(tie_word_embeddings=tied), tmp_path / "out"
    upcycle(source, out, options)
    theirs_dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    theirs, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert type(theirs).__name__ == cls
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        expected = theirs_dense(tokens_BS()).logits
        assert expected.std() > 0.1, "logits too small for an absolute bar to mean anything"
        assert (theirs(tokens_BS()).logits - expected).abs().max() <= 1e-5
        assert (load_model(out)(tokens_BS()) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("fields", "layers", "cls"),
    [
        ({"model_type": "mistral"}, (), "MixtralForCausalLM"),
        ({"qkv_bias": True}, (), "Qwen2MoeForCausalLM"),
        ({"qkv_bias": True}, (1,), "Qwen2MoeForCausalLM"),
        ({"qk_norm": True}, (), "Qwen3MoeForCausalLM"),
        ({"qk_norm": True, "tie_word_embeddings": True}, (0, 2), "Qwen3MoeForCausalLM"),
    ],
)
def test_every_dense_family_keeps_its_function(dense_dir, tmp_path, fields, layers, cls):
    """The same bar, through both libraries."""
    from transformers import AutoModelForCausalLM

    source, out = dense_dir(**fields), tmp_path / "out"
    upcycle(source, out, UpcycleConfig(experts=4, layers=layers))
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(theirs).__name__ == cls
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(tokens_BS()).logits
        assert (theirs(tokens_BS()).logits - expected).abs().max() <= 1e-5
        assert (load_model(out)(tokens_BS()) - expected).abs().max() <= 1e-5
