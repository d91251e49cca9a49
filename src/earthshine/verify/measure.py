"""What the proofs have in common: tokens to compare on, differences of logits, and rows of results."""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earthshine.errors import ConfigError
from earthshine.model.config import ModelConfig
from earthshine.model.transformer import Transformer

# Plain prose and code, so that a tokenizer of either kind meets ordinary input.
TEXT = (
    "The Moon has no light of its own. What we see of its night side, when it is a thin crescent, is sunlight that "
    "the Earth has reflected: earthshine. Leonardo da Vinci explained it about the year 1510, a century before the "
    "telescope, and measurements of it today tell how much sunlight our own planet sends back into space.\n\n"
    "def albedo(reflected: float, received: float) -> float:\n"
    '    """The share of the light that a body sends back."""\n'
    "    if received <= 0:\n        raise ValueError(received)\n    return reflected / received\n"
)


def comparison_tokens(directory: Path, config: ModelConfig, num_tokens: int) -> tuple[Tensor, str]:
    """`num_tokens` ids (1, S) for a comparison and what they are: English and code if the directory has a tokenizer
    for this vocabulary, else seeded random ids."""
    if num_tokens < 2 or num_tokens > config.max_position_embeddings:
        raise ConfigError(f"tokens={num_tokens} must be between 2 and the model's {config.max_position_embeddings}.")
    if (directory / "tokenizer.json").exists():
        from earthshine.data.tokenizer import load_tokenizer

        ids = load_tokenizer(directory).encode(TEXT)
        ids = (ids * (num_tokens // len(ids) + 1))[:num_tokens]
        if max(ids) < config.vocab_size:
            return torch.tensor([ids]), "English and code"
    seed = int.from_bytes(hashlib.sha256(b"earthshine verify").digest()[:4], "little")
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (1, num_tokens), generator=generator), "seeded random ids"


@torch.no_grad()
def logits_of(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """Logits (B, S, V), in float64 for exact differences."""
    return model.eval()(tokens_BS).double()


def in_float64(model: Transformer) -> Transformer:
    """The same model, parameters and arithmetic in float64 (in place)."""
    model.double()
    model.compute_dtype = torch.float64
    return model


def relative_difference(a_BSV: Tensor, b_BSV: Tensor) -> float:
    """max |a - b| / max(1, max |b|): the measure of the numeric bars for logits."""
    return float((a_BSV - b_BSV).abs().max()) / max(1.0, float(b_BSV.abs().max()))


def mean_kl(reference_BSV: Tensor, other_BSV: Tensor) -> float:
    """Mean over positions of KL(softmax(reference) || softmax(other)), in nats."""
    log_p, log_q = reference_BSV.log_softmax(-1), other_BSV.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def row(name: str, measured: float, tolerance: float, note: str = "") -> dict[str, Any]:
    """One line of a proof: it holds when measured <= tolerance, both of them finite.

    JSON writes what is not finite as null: the note then says what it was.
    """
    numbers = {"measured": measured, "tolerance": tolerance}
    wrong = [f"{what} is {value}, so nothing was shown" for what, value in numbers.items() if not math.isfinite(value)]
    ok = measured <= tolerance and not wrong
    return {"name": name, **numbers, "ok": ok, "note": "; ".join([*wrong, *([note] if note else [])])}


def result(check: str, subject: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A proof, JSON-ready: what was compared, its rows, and whether all of them hold."""
    return {"kind": "verify", "check": check, "subject": subject, "ok": all(r["ok"] for r in rows), "rows": rows}
