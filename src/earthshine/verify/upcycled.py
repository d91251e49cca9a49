"""Proof that an upcycled model is the dense one at step 0."""

from pathlib import Path
from typing import Any

import torch

from earthshine.checkpoint.load import load_model
from earthshine.console import counted
from earthshine.errors import ConfigError, WeightsError
from earthshine.model.moe import Experts
from earthshine.run_folder import UPCYCLING
from earthshine.upcycle.convert import check_upcycled_files
from earthshine.verify.measure import (
    comparison_tokens,
    in_float64,
    logits_of,
    mean_kl,
    relative_difference,
    result,
    row,
)

RELATIVE = 1e-5  # a bar for fp32 logits; transformers' own two attention paths differ by 2e-6 on SmolLM2
OWN_ERROR_FACTOR = 3.0  # the bar follows what fp32 can give on these very tokens
FP64 = 1e-9
BF16_FACTOR = 2.0


def verify_upcycle(
    dense_dir: str | Path, moe_dir: str | Path, *, tokens: int = 128, fp64: bool = False, bf16: bool = False
) -> dict[str, Any]:
    """Compare logits of a dense model and of the MoE made from it, on the same tokens.

    The rows: the largest difference relative to the largest logit, against 1e-5 and against three times the dense
    model's own float32 error (its distance from its float64 self). `fp64` adds both models in float64, against 1e-9;
    `bf16` adds the mean KL divergence with bfloat16 compute, against twice that of the dense model alone. Last, where
    there is an earthshine.json, whether every file is as the conversion wrote it: a few tokens do not reach every
    expert.

    Raises WeightsError for damaged weights, ConfigError when the two models do not fit each other.
    """
    dense_dir, moe_dir = Path(dense_dir), Path(moe_dir)
    dense, moe = load_model(dense_dir), load_model(moe_dir)
    if not moe.config.is_moe or dense.config.is_moe:
        raise ConfigError(f"verify upcycle takes a dense model and an MoE; got {dense_dir} and {moe_dir}.")
    if dense.config.vocab_size != moe.config.vocab_size:
        raise ConfigError(
            f"{moe_dir} has vocabulary {moe.config.vocab_size}, {dense_dir} has {dense.config.vocab_size}: "
            "it was not made from this model."
        )
    tokens_BS, kind = comparison_tokens(dense_dir, dense.config, tokens)
    dense32, moe32 = logits_of(dense, tokens_BS), logits_of(moe, tokens_BS)
    rows = []
    if bf16:
        dense.compute_dtype = moe.compute_dtype = torch.bfloat16
        dense_kl = mean_kl(dense32, logits_of(dense, tokens_BS))
        kl = mean_kl(dense32, logits_of(moe, tokens_BS))
        rows.append(
            row("mean KL in bfloat16", kl, BF16_FACTOR * dense_kl, f"twice the dense model's own, {dense_kl:.2e}")
        )
        dense.compute_dtype = moe.compute_dtype = torch.float32
    dense64 = logits_of(in_float64(dense), tokens_BS)
    own_error = relative_difference(dense32, dense64)
    difference = relative_difference(moe32, dense32)
    peak = float(dense32.abs().max())
    rows.insert(0, row("logits, relative", difference, RELATIVE, f"largest logit {peak:.1f}"))
    note = f"3 x the dense model's own float32 error, {own_error:.2e}"
    rows.insert(1, row("logits, against own error", difference, OWN_ERROR_FACTOR * own_error, note))
    if fp64:
        for module in moe.modules():
            if isinstance(module, Experts):
                module.backend = "loop"
        moe64 = logits_of(in_float64(moe), tokens_BS)
        rows.append(row("logits in float64, relative", relative_difference(moe64, dense64), FP64, "loop backend"))
    if (moe_dir / UPCYCLING).exists():  # what the tokens did not reach is at least what was written
        rows.append(_files_row(moe_dir))
    subject = {"dense": str(dense_dir), "moe": str(moe_dir), "tokens": tokens, "text": kind}
    return result("upcycle", subject, rows)


def _files_row(moe_dir: Path) -> dict[str, Any]:
    try:
        return row("files that differ from their record", 0, 0, counted(check_upcycled_files(moe_dir), "file"))
    except WeightsError as e:
        return row("files that differ from their record", 1, 0, str(e))
