"""A GGUF file of a Llama -> a Hugging Face directory.

Weights are dequantized to float32 by the `gguf` package; the tokenizer is rebuilt by transformers.
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
from earthshine.checkpoint.safetensors_store import check_fits
from earthshine.console import log
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


ROPE_FACTORS = "rope_freqs.weight"  # one number per rotary frequency: how Llama 3.1's scaling is stored

# `tokenizer.ggml.pre`: how a text is cut before its merges, where transformers' table does not have the name and would
# take GPT-2's rule. By llama.cpp's src/llama-vocab.cpp these cut GPT-2's way ...
_AS_GPT2 = ("gpt-2", "phi-2", "jais", "mpt", "olmo", "trillion", "granite-docling", "exaone4", "roberta-bpe")
# ... and these so after every digit stands alone.
_DIGITS_ALONE = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# A piece that is a token is that token, whatever the merges make of it.
_IGNORE_MERGES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
_END_TOKENS = ("eos", "eot", "eom")  # of a text, of a turn, of a message


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
    with tempfile.TemporaryDirectory() as scratch:
        _write_tokenizer(path, Path(scratch), dict(reader.fields), config)
        state = dict(_tensors(path, reader, config))
        save_model(state, config, out_dir, torch.float32, tokenizer_dir=scratch)
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
    if get("llama.rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError(f"{path}: partial rotary positions are not converted from GGUF.")
    kind, factor = get("llama.rope.scaling.type", "none"), get("llama.rope.scaling.factor", 1.0)
    if ROPE_FACTORS in names or (kind != "none" and not (kind == "linear" and factor == 1)):
        what = f"the tensor {ROPE_FACTORS}" if ROPE_FACTORS in names else f"llama.rope.scaling.type={kind!r}"
        raise UnsupportedModelError(
            f"{path}: scaled rotary positions (Llama 3.1 and later; here {what}) are not converted from GGUF: "
            f"take the model's safetensors."
        )
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
        try:
            is_float64 = tensor.data.dtype == np.float64  # which dequantize does not know
            stored = torch.from_numpy(
                np.array(tensor.data if is_float64 else dequantize(tensor.data, tensor.tensor_type))
            )
        except NotImplementedError as e:
            raise UnsupportedModelError(f"{path}: tensor {tensor.name} cannot be read: {e}.") from e
        if not stored.isfinite().all():
            raise WeightsError(f"{path}: tensor {tensor.name} holds a NaN or an infinity.")
        check_fits(tensor.name, stored, torch.float32)
        value = stored.float()
        if pattern.endswith(("attn_q.weight", "attn_k.weight")):
            value = value.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        yield _NAMES[pattern].format(l=number), value


def _write_tokenizer(path: Path, directory: Path, fields: dict[str, Any], config: ModelConfig) -> None:
    """tokenizer.json, its config and the chat template, and the generation config, into `directory`.

    Raises UnsupportedModelError for a way to cut texts that is not known: the tokens would be other ones.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about fields of the file that only llama.cpp reads
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            if _text(fields, "tokenizer.ggml.model") == "gpt2":
                _cut_as_named(path, tokenizer.backend_tokenizer, _text(fields, "tokenizer.ggml.pre"))
            tokenizer.save_pretrained(directory)
    finally:
        logging.set_verbosity(verbosity)
    keys = [key for end in _END_TOKENS if (key := f"tokenizer.ggml.{end}_token_id") in fields]
    ends = list(dict.fromkeys(int(fields[key].contents()) for key in keys))
    if max(ends, default=0) >= config.vocab_size:
        raise WeightsError(f"{path}: one of {', '.join(keys)} is not in its vocabulary of {config.vocab_size} tokens.")
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": config.pad_token_id,
    }
    text = json.dumps({k: v for k, v in generation.items() if v != -1}, indent=2) + "\n"
    (directory / "generation_config.json").write_text(text)


def _text(fields: dict[str, Any], key: str) -> str:
    return str(fields[key].contents()) if key in fields else ""


def _cut_as_named(path: Path, tokenizer: Any, name: str) -> None:
    """Make a byte-level tokenizer cut texts as the file's `tokenizer.ggml.pre` says."""
    from tokenizers import pre_tokenizers

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known = json.loads(tokenizer.to_str())["pre_tokenizer"]
    if name in _DIGITS_ALONE:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif name in _AS_GPT2:
        tokenizer.pre_tokenizer = gpt2
    elif name in ("", "default"):
        log(
            f"warning: {path} does not say how texts are cut before their merges (tokenizer.ggml.pre): GPT-2's way is "
            f"taken. If the model has a tokenizer.json elsewhere, use that one."
        )
    elif known.get("type") == "ByteLevel":  # what transformers takes for a name that it does not have
        raise UnsupportedModelError(
            f"{path}: tokenizer.ggml.pre={name!r} is not known: texts would be cut into other tokens than those the "
            f"model has learned. Take the model's safetensors and tokenizer.json."
        )
    if name in _IGNORE_MERGES:
        tokenizer.model.ignore_merges = True
