"""A GGUF file of a Llama -> a Hugging Face directory.

Weights are de-quantised to float32 by the `gguf` package; the tokenizer is rebuilt by transformers.
"""

import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from earthshine.checkpoint.hf import save_model
from earthshine.errors import MissingDependencyError, UnsupportedModelError, WeightsError
from earthshine.model.config import ModelConfig

_NAMES = {
    "token_embd.weight": "embed.weight",
    "output_norm.weight": "final_norm.weight",
    "output.weight": "head.weight",
    "blk.{l}.attn_norm.weight": "blocks.{l}.attn_norm.weight",
    "blk.{l}.attn_q.weight": "blocks.{l}.attn.q_proj.weight",
    "blk.{l}.attn_k.weight": "blocks.{l}.attn.k_proj.weight",
    "blk.{l}.attn_v.weight": "blocks.{l}.attn.v_proj.weight",
    "blk.{l}.attn_output.weight": "blocks.{l}.attn.o_proj.weight",
    "blk.{l}.ffn_norm.weight": "blocks.{l}.ffn_norm.weight",
    "blk.{l}.ffn_gate.weight": "blocks.{l}.ffn.gate_proj.weight",
    "blk.{l}.ffn_up.weight": "blocks.{l}.ffn.up_proj.weight",
    "blk.{l}.ffn_down.weight": "blocks.{l}.ffn.down_proj.weight",
}


def convert_gguf(gguf_path: str | Path, out_dir: str | Path) -> ModelConfig:
    """Write the Llama of a GGUF file as a Hugging Face directory in float32, with its tokenizer and chat template.

    llama.cpp stores the rows of q and k with rotary pairs side by side; they are put back into halves.

    Raises UnsupportedModelError for another architecture, WeightsError for a tensor that is unknown, missing or not
    finite, OutputExistsError, MissingDependencyError without the extra `hf`.
    """
    path = Path(gguf_path)
    try:
        import gguf
        import transformers  # noqa: F401  (the tokenizer needs it: say so before the work)
    except ImportError as e:
        raise MissingDependencyError(f"{e.name} is not installed: pip install 'earthshine[hf]'.") from e
    if not path.is_file():
        raise WeightsError(f"{path} is not a file: give the path of a .gguf file.")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, UnicodeDecodeError) as e:
        raise WeightsError(f"{path} is not a readable GGUF file: {e}.") from e
    config = _config(path, dict(reader.fields), {t.name for t in reader.tensors})
    state = dict(_tensors(path, reader, config))
    with tempfile.TemporaryDirectory() as scratch:
        _write_tokenizer(path, Path(scratch), config)
        save_model(state, config, out_dir, torch.float32, companions=scratch)
    return config


def _config(path: Path, fields: dict[str, Any], names: set[str]) -> ModelConfig:
    architecture = fields["general.architecture"].contents()
    if architecture != "llama":
        raise UnsupportedModelError(f"{path}: architecture={architecture!r}; only 'llama' is converted from GGUF.")

    def get(key: str, default: Any = None) -> Any:
        if key not in fields:
            if default is None:
                raise WeightsError(f"{path} has no field {key}, which a Llama needs.")
            return default
        return fields[key].contents()

    heads, hidden = get("llama.attention.head_count"), get("llama.embedding_length")
    head_dim = get("llama.attention.key_length", hidden // heads)
    if get("llama.rope.dimension_count", head_dim) != head_dim or any(
        k.startswith("llama.rope.scaling") for k in fields
    ):
        raise UnsupportedModelError(f"{path}: partial or scaled rotary positions are not converted from GGUF.")
    return ModelConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"].data),
        hidden_size=hidden,
        intermediate_size=get("llama.feed_forward_length"),
        num_hidden_layers=get("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=get("llama.context_length"),
        rms_norm_eps=_as_written(get("llama.attention.layer_norm_rms_epsilon")),
        rope_theta=_as_written(get("llama.rope.freq_base", 10000.0)),
        tie_word_embeddings="output.weight" not in names,
        bos_token_id=get("tokenizer.ggml.bos_token_id", -1),
        eos_token_ids=(get("tokenizer.ggml.eos_token_id"),),
        pad_token_id=get("tokenizer.ggml.padding_token_id", -1),
    )


def _as_written(x: float) -> float:
    """1e-05 for the float32 9.999999747378752e-06 that GGUF stores: the shortest number with the same float32."""
    return float(str(np.float32(x)))


def _tensors(path: Path, reader: Any, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        number = layer.group(1) if layer else ""
        pattern = tensor.name.replace(f"blk.{number}.", "blk.{l}.") if layer else tensor.name
        if pattern not in _NAMES:
            raise WeightsError(f"{path} holds the tensor {tensor.name}, which nothing in a Llama consumes.")
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        if not value.isfinite().all():
            raise WeightsError(f"{path}: tensor {tensor.name} holds a NaN or an infinity.")
        if pattern.endswith(("attn_q.weight", "attn_k.weight")):
            value = value.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        yield _NAMES[pattern].format(l=number), value


def _write_tokenizer(path: Path, directory: Path, config: ModelConfig) -> None:
    """tokenizer.json, its config and the chat template, and the generation config, into `directory`."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about fields of the file that only llama.cpp reads
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(directory)
    finally:
        logging.set_verbosity(verbosity)
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0],
        "pad_token_id": config.pad_token_id,
    }
    text = json.dumps({k: v for k, v in generation.items() if v >= 0}, indent=2) + "\n"
    (directory / "generation_config.json").write_text(text)
