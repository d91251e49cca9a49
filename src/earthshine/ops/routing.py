"""Which experts a token goes to and with what weight, and what keeps the experts evenly loaded.

Shapes: T tokens, E experts, K experts per token, R = T*K choices; B sequences of S positions; G groups of experts.
Choices have no gradient, only the weights that go with them. Nothing here waits for the device.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

_TINY = 1e-20  # DeepSeek's floor of a sum of sigmoids, as in transformers' modeling_deepseek_v3.py


class RoutingStats(NamedTuple):
    """What one training forward of an MoE layer reports: sums, so that micro-batches and ranks add up.

    balance: 0-d, the sum over the call's sequences of the balance loss, each 1 at uniform routing; 0 without a loss.
    z: 0-d, the sum over tokens of the squared logsumexp of the router's logits; 0 when not asked for.
    counts_E: int64, how many choices fell on each expert, dropped ones included.
    dropped: int64, 0-d, how many choices exceeded their expert's capacity.
    """

    balance: Tensor
    z: Tensor
    counts_E: Tensor
    dropped: Tensor


# ---- gates ----------------------------------------------------------------------------------------------------------


def topk_softmax(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Mixtral's gate: the `top_k` largest logits, then their softmax (arXiv:2401.04088, section 2.1).

    Equal to a softmax over all experts, renormalized over the chosen ones (as in transformers' modeling_mixtral.py),
    except that logits are compared: different logits can round to equal probabilities. Of equal logits the smaller
    index is taken.

    Args:
        logits_TE: router logits, at least float32.
        top_k: experts per token, 1 <= top_k <= E.

    Returns:
        weights_TK in the dtype of the logits, summing to 1 over K, and expert_TK, int64, by descending logit.
    """
    expert_TK = _largest(logits_TE, top_k)
    return logits_TE.gather(-1, expert_TK).softmax(-1), expert_TK


def softmax_topk(logits_TE: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """A softmax over all experts, then its `top_k` largest values (Switch Transformer, arXiv:2101.03961, eq. 1 and 2).

    Without renormalization this is transformers' modeling_qwen2_moe.py with norm_topk_prob=False; with it, it equals
    `topk_softmax`. The choice is on logits here too. Arguments and results as there.
    """
    if renormalize:
        return topk_softmax(logits_TE, top_k)
    expert_TK = _largest(logits_TE, top_k)
    return (logits_TE.gather(-1, expert_TK) - logits_TE.logsumexp(-1, keepdim=True)).exp(), expert_TK


def sigmoid_bias(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, renormalize: bool, num_groups: int = 1, top_k_groups: int = 1
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's gate: choice by sigmoid plus bias, weight by the sigmoid alone (arXiv:2412.19437, eqs 12 to 16).

    With several groups, only experts of the `top_k_groups` groups whose two best biased scores have the largest sum can
    be chosen, as in transformers' modeling_deepseek_v3.py. Of equal biased scores, and of equal groups, the smaller
    index is taken. The bias gets no gradient.

    Args:
        logits_TE: router logits, at least float32.
        bias_E: float32, added to the scores for the choice only.
        renormalize: divide the chosen sigmoids by their sum.
        num_groups, top_k_groups: G consecutive groups of E/G experts, and how many of them are open to a token.

    Returns:
        weights_TK in the dtype of the logits and expert_TK, int64, by descending biased score.
    """
    scores_TE = logits_TE.sigmoid()
    biased_TE = scores_TE.detach() + bias_E
    if top_k_groups < num_groups:
        biased_TGM = biased_TE.unflatten(-1, (num_groups, -1))  # M experts of each group
        best_TG1, index_TG1 = biased_TGM.max(-1, keepdim=True)
        second_TG1 = biased_TGM.scatter(-1, index_TG1, -torch.inf).amax(
            -1, keepdim=True
        )  # 2 to 8 times as fast as topk
        open_TG = _largest((best_TG1 + second_TG1).squeeze(-1), top_k_groups)
        closed_TG = torch.ones_like(biased_TGM[..., 0], dtype=torch.bool).scatter_(-1, open_TG, False)
        biased_TE = biased_TGM.masked_fill(closed_TG.unsqueeze(-1), -torch.inf).flatten(-2)
    expert_TK = _largest(biased_TE, top_k)
    weights_TK = scores_TE.gather(-1, expert_TK)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _TINY)
    return weights_TK, expert_TK


def _largest(x_TE: Tensor, k: int) -> Tensor:
    """The k largest of each row, in order, ties to the smaller index: int64 (T, k).

    torch.topk promises nothing about ties, and a stable sort of whole rows takes a CPU 2 to 4 times as long (8 to 256
    experts). `max` is specified to return the first of equal maxima, and k rounds of it take the time of one topk.
    """
    remaining_TE = x_TE.detach().clone()
    chosen = []
    for _ in range(k):
        chosen.append(remaining_TE.max(-1, keepdim=True).indices)
        remaining_TE.scatter_(-1, chosen[-1], -torch.inf)
    return torch.cat(chosen, -1)


# ---- losses ---------------------------------------------------------------------------------------------------------


def probabilities(logits_TE: Tensor, gate: Literal["topk_softmax", "softmax_topk", "sigmoid_bias"]) -> Tensor:
    """What the balance losses average: the softmax over all experts or, for "sigmoid_bias", the sigmoids divided by
    their sum (arXiv:2412.19437, eq. 19). Rows sum to one.
    """
    if gate != "sigmoid_bias":
        return logits_TE.softmax(-1)
    scores_TE = logits_TE.sigmoid()
    return scores_TE / (scores_TE.sum(-1, keepdim=True) + _TINY)


def sequence_balance(probabilities_BSE: Tensor, expert_BSK: Tensor) -> Tensor:
    """DeepSeek-V3's balance of every sequence by itself (arXiv:2412.19437, eqs 17 to 20, without alpha): (B,).

        sum_i f_i P_i,   f_i = E / (K S) * number of choices of expert i,   P_i = 1/S * sum_t p_ti

    1 at uniform routing, at most E/K. Differentiable through P only. Its sum over sequences does not depend on how a
    step is cut into micro-batches.
    """
    counts_BE = _count(expert_BSK.flatten(1), probabilities_BSE.shape[-1])
    return _balance(probabilities_BSE, counts_BE)


def switch_balance(probabilities_TE: Tensor, counts_E: Tensor) -> Tensor:
    """The Switch Transformer's balance (arXiv:2101.03961, eqs 4 to 6, without alpha), divided by K: 0-d.

        1/K * E * sum_i f_i P_i,   f_i = 1/T' * number of choices of expert i,   P_i = 1/T * sum_t p_ti

    1 at uniform routing. Differentiable through P only. `counts_E` are the choices that f is taken of: those of these T
    tokens, as published, or of the T' of a whole step. transformers' load_balancing_loss_func is K times this.
    """
    return _balance(probabilities_TE.unsqueeze(0), counts_E.unsqueeze(0)).squeeze(0)


def _balance(probabilities_BSE: Tensor, counts_BE: Tensor) -> Tensor:
    """E * sum_i (fraction of choices that fell on i) * (mean probability of i), (B,); 0 without tokens."""
    fraction_BE = counts_BE.to(probabilities_BSE.dtype) / counts_BE.sum(-1, keepdim=True).clamp(min=1)
    mean_BE = probabilities_BSE.sum(1) / max(probabilities_BSE.shape[1], 1)
    return counts_BE.shape[-1] * (fraction_BE * mean_BE).sum(-1)


def z_loss(logits_TE: Tensor) -> Tensor:
    """The sum over tokens of the squared logsumexp of their logits, 0-d (ST-MoE, arXiv:2202.08906, eq. 5, times T)."""
    return logits_TE.logsumexp(-1).square().sum()


# ---- loads ----------------------------------------------------------------------------------------------------------


def count_tokens(expert_TK: Tensor, num_experts: int) -> Tensor:
    """How many choices fell on each expert: int64 of shape (E,)."""
    return _count(expert_TK.flatten().unsqueeze(0), num_experts).squeeze(0)


def _count(expert_BR: Tensor, num_experts: int) -> Tensor:
    """Counts of each row, int64 (B, E). Not torch.bincount, which waits for a GPU to learn the largest index."""
    counts_BE = torch.zeros(expert_BR.shape[0], num_experts, dtype=torch.int64, device=expert_BR.device)
    return counts_BE.scatter_add_(1, expert_BR, torch.ones_like(expert_BR))


def bias_update(bias_E: Tensor, counts_E: Tensor, rate: float, rule: Literal["deepseek", "moonlight"]) -> Tensor:
    """The bias of a "sigmoid_bias" gate after a step in which `counts_E` choices fell on each expert: float32 (E,).

    With e = mean(counts) - counts, positive where an expert got too little:
    "deepseek" is b + rate * sign(e) (arXiv:2408.15664, algorithm 1); "moonlight" is
    b + rate * (sign(e) - mean(sign(e))) (arXiv:2502.16982, appendix C), which leaves the mean bias where it is.
    """
    # E times e, in integers, so that an even load is exactly 0.
    sign_E = (counts_E.sum() - counts_E.numel() * counts_E).sign().to(torch.float32)
    if rule == "moonlight":
        sign_E = sign_E - sign_E.mean()
    return bias_E + rate * sign_E


def keep_within_capacity(
    weights_TK: Tensor, expert_TK: Tensor, num_experts: int, capacity: int, drop: Literal["probability", "position"]
) -> Tensor:
    """Which choices stay when an expert takes at most `capacity` of them: bool (T, K).

    Args:
        weights_TK: the gate's weights; not differentiated.
        expert_TK: int64; the experts of one token differ.
        drop: an expert keeps the choices with the largest weights, of equal ones the earlier token's ("probability",
            Megatron-LM's `moe_token_drop_policy="probs"`), or those of the first tokens ("position", as the Switch
            Transformer).
    """
    flat_R = expert_TK.flatten()
    if drop == "probability":
        by_weight_R = weights_TK.detach().flatten().argsort(descending=True, stable=True)
        order_R = by_weight_R[flat_R[by_weight_R].argsort(stable=True)]
    else:
        order_R = flat_R.argsort(stable=True)
    counts_E = count_tokens(expert_TK, num_experts)
    start_E = counts_E.cumsum(0) - counts_E
    rank_R = torch.arange(flat_R.numel(), device=flat_R.device) - start_E[flat_R[order_R]]
    keep_R = torch.empty_like(flat_R, dtype=torch.bool)
    keep_R[order_R] = rank_R < capacity
    return keep_R.view_as(expert_TK)
