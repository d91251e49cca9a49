"""Proof that a Hugging Face directory means the same to transformers as to us."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch

from earthshine.checkpoint.load import load_model
from earthshine.console import log
from earthshine.errors import MissingDependencyError
from earthshine.model.hf_families import HF_CLASSES
from earthshine.verify.measure import comparison_tokens, in_float64, logits_of, relative_difference, result, row
from earthshine.verify.tokenizers import tokenizer_rows

RELATIVE = 1e-5
OWN_ERROR_FACTOR = 3.0


def verify_huggingface(path: str | Path, *, tokens: int = 128) -> dict[str, Any]:
    """Load `path` with transformers' own class and with ours, in float32, and compare the logits; then the tokenizer.

    The rows are those of `verify.upcycled`: relative to the largest logit, and to our own float32 error. Eager
    attention and eager experts on their side, so that their reference arithmetic is the judge. When transformers cannot
    load or run the model, that is the result, in its words, and does not hold.

    Raises MissingDependencyError without transformers, WeightsError for damaged weights.
    """
    path = Path(path)
    ours = load_model(path)
    tokens_BS, kind = comparison_tokens(path, ours.config, tokens)
    subject = {"model": str(path), "class": HF_CLASSES[ours.config.family], "tokens": tokens, "text": kind}
    try:
        theirs, subject["class"] = _their_logits(path, tokens_BS)
    except TransformersError as e:
        log(f"{path}: {e}")
        return result("huggingface", subject, [row("errors of transformers", 1, 0, str(e)), *tokenizer_rows(path)])
    ours32 = logits_of(ours, tokens_BS)
    own_error = relative_difference(ours32, logits_of(in_float64(ours), tokens_BS))
    difference = relative_difference(ours32, theirs)
    note = f"3 x our own float32 error, {own_error:.2e}"
    rows = [
        row("logits, relative", difference, RELATIVE, f"largest logit {float(theirs.abs().max()):.1f}"),
        row("logits, against own error", difference, OWN_ERROR_FACTOR * own_error, note),
        *tokenizer_rows(path),
    ]
    return result("huggingface", subject, rows)


class TransformersError(Exception):
    """What transformers raised."""


def _their_logits(path: Path, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, str]:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as e:
        raise MissingDependencyError("transformers is not installed: pip install 'earthshine[hf]'.") from e
    logging.disable_progress_bar()
    try:
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
    except Exception as e:  # anything: its configs and models raise whatever they like
        raise TransformersError(f"transformers cannot run it: {type(e).__name__}: {' '.join(str(e).split())}") from e
