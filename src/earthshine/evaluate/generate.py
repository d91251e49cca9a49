"""Sampling text with a cache of keys and values."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from earthshine.config import read_json
from earthshine.data.tokenizer import MORE_IDS_THAN_ROWS
from earthshine.errors import ConfigError, TrainingDivergedError
from earthshine.model.config import ModelConfig
from earthshine.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
) -> list[int]:
    """The new token ids after `prompt_ids`, without the end-of-sequence token that stopped them.

    Args:
        temperature: 0 takes the most likely token (ties: the smallest id); otherwise logits are divided by it.
        top_k: sample among the k most likely tokens only; 0 for all.
        seed: sampling seed; the same seed gives the same text on the same machine.
        eos_ids: ids that end the text; default: those of the model's config.

    Raises ConfigError for an empty prompt, an id outside the vocabulary, or more positions than the model has;
    TrainingDivergedError, naming the position, for logits that are not finite: they choose nothing.
    """
    config = model.config
    if not prompt_ids:
        raise ConfigError("prompt: it has no tokens; give at least one.")
    outside = [i for i in prompt_ids if not 0 <= i < config.vocab_size]
    if outside:
        raise ConfigError(
            f"prompt: token id {outside[0]} is outside the model's vocabulary of {config.vocab_size}. If the "
            f"model's own tokenizer gave it, it has more ids than the model has rows: {MORE_IDS_THAN_ROWS}"
        )
    room = config.max_position_embeddings - len(prompt_ids)
    if room < 1:
        raise ConfigError(
            f"prompt: its {len(prompt_ids)} tokens leave no room for a new one in the model's "
            f"{config.max_position_embeddings} positions; shorten it to at most {config.max_position_embeddings - 1}."
        )
    if max_new_tokens > room:
        raise ConfigError(
            f"prompt of {len(prompt_ids)} tokens and max_new_tokens={max_new_tokens} exceed the model's "
            f"{config.max_position_embeddings} positions; lower max_new_tokens to at most {room}."
        )
    total = len(prompt_ids) + max_new_tokens
    if not 0 <= temperature < math.inf or top_k < 0 or max_new_tokens < 1:
        raise ConfigError(
            f"temperature={temperature} must be a finite number of at least 0, top_k={top_k} at least 0 and "
            f"max_new_tokens={max_new_tokens} at least 1."
        )
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed} must be between 0 and 2**63 - 1.")
    stop = set(config.eos_token_ids if eos_ids is None else eos_ids)
    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    cache = model.new_cache(1, total)
    tokens_BS = torch.tensor([list(prompt_ids)], device=device)
    out: list[int] = []
    try:
        for _ in range(max_new_tokens):
            logits_V = model.next_token_logits(tokens_BS, cache)[0].cpu()
            if not bool(logits_V.isfinite().all()):
                raise TrainingDivergedError(
                    f"the logits after position {len(prompt_ids) + len(out)} ({len(prompt_ids)} tokens of the prompt "
                    f"and {len(out)} new ones) are not finite: the weights are damaged or have diverged, or the "
                    f"compute dtype {model.compute_dtype} is too narrow for them."
                )
            chosen = _choose(logits_V, temperature, top_k, generator)
            if chosen in stop:
                break
            out.append(chosen)
            tokens_BS = torch.tensor([[chosen]], device=device)
    finally:
        model.train(was_training)
    return out


def stop_ids(model_dir: str | Path, config: ModelConfig) -> tuple[int, ...]:
    """The ids that end a text: those of the model's config, and those that its `generation_config.json` adds.

    Chat models end a turn with a token that only the latter names. Raises ConfigError when that file is not JSON.
    """
    path = Path(model_dir) / "generation_config.json"
    if not path.is_file():
        return config.eos_token_ids
    try:
        more = read_json(path).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as e:
        raise ConfigError(f"{path} is not a readable generation config: {e}.") from e
    more = [] if more is None else more if isinstance(more, list) else [more]
    if not all(type(i) is int and i >= 0 for i in more):
        raise ConfigError(f"{path}: eos_token_id={more} must be a token id or a list of them, each an integer from 0.")
    return tuple(dict.fromkeys((*config.eos_token_ids, *more)))


def _choose(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = (logits_V - logits_V.max()).double() / temperature  # the largest is 0, however cold
    if top_k:
        floor = logits_V.topk(min(top_k, logits_V.numel())).values[-1]
        logits_V = logits_V.where(logits_V >= floor, -torch.inf)
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))
