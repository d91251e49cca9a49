"""Linear layers that hold several matrices in one weight, as far as names and shapes show it.

By name: two or more of q, k, v, or gate and up (`qkv_proj`, `Wqkv`, `query_key_value`, `gate_up_proj`, `in_proj_qkvz`),
and a few names of known families. By shape: of the two linear layers of a module the first makes two or three times
what the second takes, and this as much as the first was given (`Wi` and `Wo`). A name alone is not enough where the
rows are those of one projection, nor for the factors of latent attention (`kv_a_proj_with_mqa`, `kv_b_proj`), which
are stored and by default taken as one matrix each.
"""

import re
from dataclasses import dataclass

from torch import Tensor, nn

from earthshine.optim.logical_matrices import Spec
from earthshine.optim.output_layers import layer_name

_SPLIT = re.compile(r"[_\W]+|(?<=[a-z0-9])(?=[A-Z])")
_WORDS = {"query": "q", "queries": "q", "key": "k", "keys": "k", "value": "v", "values": "v", "q": "q", "k": "k"} | {
    "v": "v",
    "gate": "gate",
    "up": "up",
}
_TOGETHER = re.compile(r"w?(qkv|qvk|kqv|kvq|vqk|vkq|qk|kq|kv)[zg]?")
_GATE_UP = ("gateup", "upgate")
# GPT-BigCode and nanoGPT, OLMo, Baichuan, Qwen3-Next's two gates.
_KNOWN = {"c_attn": "q, k, v", "att_proj": "q, k, v", "ff_proj": "gate, up", "W_pack": "q, k, v", "in_proj_ba": "b, a"}
# Families of transformers whose heads each have their q, k, v, one head after the other.
_IN_TURNS = ("bloom", "falcon", "gpt_neox", "gpt_neox_japanese", "minimax", "persimmon")
# Words of a factor of latent attention beside k and v.
_LATENT = {"a", "b", "down", "up", "latent", "lora", "compress"}


@dataclass(frozen=True)
class Fused:
    """What a weight seems to hold, by its name or shape, and the specification of its parts as far as it is known.

    known: whether `spec` is how the family's code divides the rows; otherwise it is ("matrix",), all in one.
    """

    parts: str
    spec: Spec
    known: bool


def fused_layers(model: nn.Module) -> dict[int, Fused]:
    """id of the weight -> what it holds, of each linear layer that shows it."""
    fused: dict[int, Fused] = {}
    for path, module in model.named_modules():
        linears = {name: m for name, m in module.named_children() if isinstance(m, nn.Linear)}
        by_shape = _by_shape(list(linears.values()))
        for name, linear in linears.items():
            local_name = layer_name(f"{path}.{name}")
            parts = parts_of(local_name)
            if parts and _is_one_projection(module, parts, linear.out_features):
                continue
            parts = parts or by_shape.get(id(linear), "")
            if parts:
                spec = _known_layout(module, local_name, parts, linear)
                fused[id(linear.weight)] = Fused(parts, spec or ("matrix",), spec is not None)
    return fused


def parts_of(name: str) -> str:
    """The parts that a layer's own name lists, "q, k, v" or "gate, up"; "" where it lists fewer than two."""
    if name in _KNOWN:
        return _KNOWN[name]
    words = [word.lower() for word in _SPLIT.split(name)]
    listed = {_WORDS[word] for word in words if word in _WORDS}
    for word in words:
        if match := _TOGETHER.fullmatch(word):
            listed |= set(match[1])
        elif word in _GATE_UP:
            listed |= {"gate", "up"}
    heads = [part for part in ("q", "k", "v") if part in listed]
    if heads == ["k", "v"] and _LATENT & set(words):
        return ""
    if len(heads) > 1:
        return ", ".join(heads)
    return "gate, up" if {"gate", "up"} <= listed else ""


def _by_shape(linears: list[nn.Linear]) -> dict[int, str]:
    if len(linears) != 2:
        return {}
    first, second = linears
    for parts in (2, 3):
        if first.out_features == parts * second.in_features and second.out_features == first.in_features:
            return {id(first): f"{parts} parts"}
    return {}


def _is_one_projection(module: nn.Module, parts: str, rows: int) -> bool:
    """Whether the rows are those of one projection, shared by what the name lists: DeepSeek-V4's kv_proj, Reformer's
    query_key."""
    sizes = _Sizes(module)
    heads = sizes.heads if "q" in parts else sizes.key_heads
    return rows > 0 and rows in (heads * sizes.width, 0 if "q" in parts else sizes.width)


class _Sizes:
    """Numbers of heads and their width, of an attention module or its configuration; 0 where it does not say."""

    def __init__(self, module: nn.Module) -> None:
        self._sources = [module, getattr(module, "config", None)]
        self._sources += [getattr(self._sources[1], "attn_config", None)]
        self.heads = self("num_attention_heads", "num_heads", "n_heads", "n_head")
        self.key_heads = self("kv_heads", "num_key_value_heads", "num_kv_heads", "kv_n_heads") or self.heads
        self.width = self("head_dim", "head_size", "attention_head_size", "d_head")
        if not self.width and self.heads:
            self.width = self("hidden_size", "embed_dim", "d_model") // self.heads

    def __call__(self, *names: str) -> int:
        for source in self._sources:
            for name in names:
                if isinstance(value := getattr(source, name, None), int):
                    return value
        return 0


def _known_layout(module: nn.Module, name: str, parts: str, linear: nn.Linear) -> Spec | None:
    """How the code of transformers divides the rows; None for other modules, and where the sizes do not tell.

    Parts follow each other, but for the families where each head (or group of heads) has its own, in turns.
    """
    family = type(module).__module__.partition("transformers.models.")[2].partition(".")[0]
    rows, sizes = linear.out_features, _Sizes(module)
    if not family or family == "deepseek_v4":  # whose kv_proj is of two windows
        return None
    if family == "qwen3_next":
        return _qwen3_next(sizes, name)
    if family == "codegen":
        return ("interleaved", 4, (rows // 12,) * 3)  # in 4 groups, q, v, k
    if parts in ("gate, up", "2 parts", "3 parts") or name in ("kv_proj", "to_kv"):
        count = 3 if parts == "3 parts" else 2
        return ("rows", (rows // count,) * count) if rows % count == 0 else None
    if parts != "q, k, v":
        return None
    heads, key_heads, width = sizes.heads, sizes.key_heads, sizes.width
    if family == "falcon" and not sizes("new_decoder_architecture"):
        key_heads = 1 if sizes("multi_query") else heads
    in_turns = family in _IN_TURNS or (family == "gpt_bigcode" and key_heads == heads)
    for n in (key_heads, heads):  # a configuration may have a number of key heads that the code does not use
        if n and rows == (heads + 2 * n) * width:
            if in_turns:
                return ("interleaved", n, (heads // n * width, width, width))
            return ("rows", (heads * width, n * width, n * width))
    keys, values = sizes("key_dim"), sizes("value_dim")
    if keys and rows == 2 * keys + values:
        return ("rows", (keys, keys, values))
    return ("rows", (rows // 3,) * 3) if rows == 3 * linear.in_features and not in_turns else None


def _qwen3_next(sizes: _Sizes, name: str) -> Spec | None:
    """In turns per key head, whose values, and gates, are several."""
    groups = sizes("num_k_heads")
    if not groups or name not in ("in_proj_qkvz", "in_proj_ba"):
        return None
    per_group = sizes("num_v_heads") // groups
    if name == "in_proj_ba":
        return ("interleaved", groups, (per_group, per_group))
    keys, values = sizes("head_k_dim"), sizes("head_v_dim") * per_group
    return ("interleaved", groups, (keys, keys, values, values))


def layout_of(module: nn.Module, local: str, p: Tensor) -> Spec | None:
    """What a parameter of a well-known module other than a linear layer holds; None where it is not known."""
    kind, shape = type(module).__name__, tuple(p.shape)
    if isinstance(module, nn.MultiheadAttention) and local == "in_proj_weight":
        return ("rows", (module.embed_dim,) * 3)
    if kind == "Conv1D" and local == "weight" and p.ndim == 2:  # of transformers: [in, out]
        parts = shape[1] // shape[0]
        return ("cols", (shape[0],) * parts) if parts in (2, 3) and shape[1] % shape[0] == 0 else ("matrix",)
    return None


def expert_factors(model: nn.Module) -> dict[int, Spec]:
    """id of the weight -> one matrix per expert, of PEFT's low-rank factors of a stack of experts.

    A holds [experts * rank, in], expert by expert; B holds [out, rank * experts], rank by rank.
    """
    specs: dict[int, Spec] = {}
    for module in model.modules():
        experts, a, b = (getattr(module, name, None) for name in ("num_experts", "lora_A", "lora_B"))
        if isinstance(experts, int) and experts > 1 and isinstance(a, nn.ModuleDict) and isinstance(b, nn.ModuleDict):
            specs |= {id(factor.weight): ("heads", experts) for factor in a.values()}
            specs |= {id(factor.weight): ("interleaved_cols", experts) for factor in b.values()}
    return specs
