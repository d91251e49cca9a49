"""A Hugging Face directory or a run's checkpoint as a model."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from earthshine.checkpoint.accounting import check_tied_copies, log_unused, match_tensors
from earthshine.checkpoint.hf import read_blocks, read_config
from earthshine.checkpoint.safetensors_store import Store, check_finite, check_fits
from earthshine.model.config import ModelConfig
from earthshine.model.training_options import TrainingOptions
from earthshine.run_folder import is_run

if TYPE_CHECKING:
    from earthshine.model.transformer import Transformer


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
    *,
    trust: bool = False,
    training: TrainingOptions | None = None,
) -> "Transformer":
    """A Hugging Face directory or a run's latest checkpoint as a model; `model(tokens_BS) -> logits_BSV`.

    Args:
        dtype: of the parameters; a router's bias is float32 in any model.
        compute_dtype: of activations and matmuls; `dtype` when None.
        trust: read a run's checkpoint that was not made on this machine.
        training: for a model that will be trained.
    Raises ConfigError or UnsupportedModelError for the config, WeightsError for any tensor that is missing, extra,
    misshapen or not finite, or whose values `dtype` cannot hold; CheckpointError for a damaged checkpoint.
    """
    from earthshine.model.transformer import Transformer  # here, so that reading configs and weights builds no model

    path = Path(path)
    config: ModelConfig

    def build() -> Transformer:
        with torch.device(device):
            return Transformer(config, compute_dtype or dtype, training=training).to(dtype)

    if is_run(path):
        from earthshine.checkpoint.run_store import load_model_state

        config, state = load_model_state(path, trust=trust)
        model = build()
        dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        for name, tensor in state.items():
            check_finite(name, tensor)
            check_fits(name, tensor, dtypes.get(name, tensor.dtype))
        model.load_state_dict(state)
        return model
    config, store = read_config(path), Store(path)
    match = match_tensors(store, config)  # before memory is taken for what the config claims
    check_tied_copies(store, match.unused)
    model = build()
    log_unused(path, match.unused)
    state = model.state_dict()  # shares the memory of parameters and buffers
    assert set(state) == {e.ours for e in match.entries}, "the name tables do not cover the model"
    for entry in match.entries:
        target = state[entry.ours] if entry.expert < 0 else state[entry.ours][entry.expert]
        for rows, part in read_blocks(store, entry, match.locations[entry.hf]):
            check_fits(entry.hf, part, target.dtype)
            target[rows].copy_(part)
    return model
