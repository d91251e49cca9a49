"""Upcycle a dense checkpoint to an MoE and check that nothing changed: python examples/upcycle_and_check.py

The dense Llama is tiny and random, so that nothing is downloaded. For your own Hugging Face directory:
python examples/upcycle_and_check.py models/llama
"""

import sys
import tempfile
from pathlib import Path

import torch

from earthshine import UpcycleConfig, load_model, upcycle
from earthshine.checkpoint.hf import save_model
from earthshine.model.presets import llama3_tiny
from earthshine.model.transformer import Transformer, initialize


def make_dense(folder: Path) -> Path:
    """A random Llama of half a million parameters, as a Hugging Face directory."""
    model = Transformer(llama3_tiny())
    initialize(model, seed=0)
    save_model(model, model.config, folder)
    return folder


def main(dense_dir: Path | None = None) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        dense_dir = dense_dir or make_dense(Path(scratch) / "dense")
        moe_dir = Path(scratch) / "moe"

        plan = upcycle(dense_dir, moe_dir, UpcycleConfig(experts=8, top_k=2))
        print(plan.table())  # parameters, and the ledger: what every tensor is made of

        # At step 0 every expert is a copy of the dense network, and the gate's weights sum to one: the same function.
        dense, moe = load_model(dense_dir), load_model(moe_dir)
        tokens = torch.randint(dense.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected, logits = dense.eval()(tokens), moe.eval()(tokens)
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1))
    print(f"\nlargest difference of the logits, relative: {difference:.1e} (bar 1e-5)")
    assert difference <= 1e-5
    return difference


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
