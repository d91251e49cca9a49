"""Proof that a Hugging Face directory means the same to transformers as to us."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch

from earthshine.checkpoint.hf import load_model
from earthshine.errors import MissingDependencyError
from earthshine.verify.measure import comparison_tokens, in_float64, logits_of, relative_difference, result, row

RELATIVE = 1e-5
OWN_ERROR_FACTOR = 3.0


def verify_huggingface(path: str | Path, *, tokens: int = 128) -> dict[str, Any]:
    """Load `path` with transformers' own class and with ours, in float32, and compare the logits.

    The rows are those of `verify.upcycled`: relative to the largest logit, and to our own float32 error. Eager
    attention and eager experts on their side, so that their reference arithmetic is the judge.

    Raises MissingDependencyError without transformers, WeightsError for damaged weights.
    """
    path = Path(path)
    ours = load_model(path)
    tokens_BS, kind = comparison_tokens(path, ours.config, tokens)
    theirs, cls = _their_logits(path, tokens_BS)
    ours32 = logits_of(ours, tokens_BS)
    own_error = relative_difference(ours32, logits_of(in_float64(ours), tokens_BS))
    difference = relative_difference(ours32, theirs)
    note = f"3 x our own float32 error, {own_error:.2e}"
    rows = [
        row("logits, relative", difference, RELATIVE, f"largest logit {float(theirs.abs().max()):.1f}"),
        row("logits, against own error", difference, OWN_ERROR_FACTOR * own_error, note),
    ]
    subject = {"model": str(path), "class": cls, "tokens": tokens, "text": kind}
    return result("huggingface", subject, rows)


def _their_logits(path: Path, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, str]:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as e:
        raise MissingDependencyError("transformers is not installed: pip install 'earthshine[hf]'.") from e
    logging.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
        ).eval()
    with torch.no_grad():
        return model(tokens_BS).logits.double(), type(model).__name__
