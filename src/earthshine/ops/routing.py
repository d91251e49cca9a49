"""Which experts a token goes to, and with what weight. Shapes: T tokens, E experts, K experts per token."""

import torch
from torch import Tensor


def topk_softmax(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Mixtral's gate: the `top_k` largest logits, then their softmax (arXiv:2401.04088, section 2.1).

    Algebraically equal to a softmax over all experts, renormalised over the chosen ones, but chosen on logits: two
    probabilities can round to equality where their logits differ. Equal logits go to the smaller index.

    Args:
        logits_TE: router logits, at least float32.
        top_k: experts per token, 1 <= top_k <= E.

    Returns:
        weights_TK in the dtype of the logits, summing to 1 over K, and expert_TK, int64, by descending logit.
    """
    order_TE = logits_TE.detach().argsort(dim=-1, descending=True, stable=True)
    expert_TK = order_TE[:, :top_k]
    return logits_TE.gather(-1, expert_TK).softmax(-1), expert_TK


def count_tokens(expert_TK: Tensor, num_experts: int) -> Tensor:
    """How many rows go to each expert: int64 of shape (E,)."""
    return torch.bincount(expert_TK.flatten(), minlength=num_experts)
