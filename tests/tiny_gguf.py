"""Writes a model as a GGUF file, as llama.cpp writes a Llama."""

from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import torch

from earthshine.model.transformer import Transformer

NAMES = {
    "attn_norm": "attn_norm", "attn.q_proj": "attn_q", "attn.k_proj": "attn_k", "attn.v_proj": "attn_v",
    "attn.o_proj": "attn_output", "ffn_norm": "ffn_norm", "ffn.gate_proj": "ffn_gate", "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}  # fmt: skip


def write(
    path: Path,
    model: Transformer,
    *,
    architecture: str = "llama",
    extra: bool = False,
    pre: str = "smollm",
    marks: Sequence[str] = ("<s>", "</s>", "<pad>"),
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """As llama.cpp writes a Llama: rows of q and k with rotary pairs side by side (its convert script's `permute`).

    pre: how texts are cut, "" to leave it out. marks: the special tokens, after the 256 bytes; the first two begin and
    end a text. more: writes further fields.
    """
    w = gguf.GGUFWriter(path, architecture)
    c = model.config
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_rope_freq_base(c.rope_theta)
    w.add_rope_dimension_count(c.head_dim)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_tokenizer_model("gpt2")
    if pre:
        w.add_tokenizer_pre(pre)
    more(w)
    alphabet = [chr(b) if 33 <= b < 127 else chr(256 + b) for b in range(256)]
    w.add_token_list([*alphabet, *marks, "ab"])
    w.add_token_types([1] * 256 + [3] * len(marks) + [1])
    w.add_token_merges(["a b"])
    w.add_bos_token_id(256)
    w.add_eos_token_id(257)
    for name, p in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            inner = NAMES[".".join(parts[2:-1])]
            target = f"blk.{parts[1]}.{inner}.weight"
            if inner in ("attn_q", "attn_k"):
                p = p.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        else:
            target = {"embed.weight": "token_embd.weight", "final_norm.weight": "output_norm.weight"}[name]
        w.add_tensor(target, p.contiguous().numpy())
    if extra:
        w.add_tensor("rope_freqs.weight", torch.ones(4).numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
