"""Which linear layers make the model's output: those that are known to, and those that may.

Known are what the model itself names as its output, an adaptive softmax, and a linear layer of a head's name. May be
output layers, by shape and place: others with as many rows as the vocabulary or more that are in no block and have no
layer beside them that leads back; those at the end of a branch, or of a model without blocks whose layers follow each
other, whose output no other layer takes (classifiers, further heads); and the last of a block with a row per token.

A *block* is what a ModuleList, or two or more of what a ModuleDict or a Sequential, holds: a child with two or more
matrices. Not so a whole model with a table of tokens of its own, nor a small network at whose end such an output layer
stands, as multi-token heads do that have a hidden layer each.
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor, nn

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
ROUTER_NAMES = ("gate", "router")
_HEAD_NAMES = ("head", "lm_head", "unembed", "embed_out", "output_projection")
_PARALLEL = (nn.ModuleList, nn.ModuleDict)
# What PEFT puts into the name of a layer that it copies or wraps.
_PEFT = re.compile(r"\.(?:modules_to_save\.[^.]+|original_module|base_layer)(?=\.|$)")
# A table of fewer rows holds positions, segments or the like rather than a vocabulary.
_SMALLEST_VOCABULARY = 17
# A layer that takes fewer features takes coordinates or the like, not what a hidden layer makes.
_SMALLEST_WIDTH = 4


def layer_name(path: str) -> str:
    """The layer's own name: the last part of its path, without what PEFT adds."""
    return _PEFT.sub("", f".{path}").rpartition(".")[2]


def is_router(module: nn.Module) -> bool:
    """A router says so by `is_router = True`, or by its class's name."""
    return getattr(module, "is_router", False) is True or type(module).__name__.endswith("Router")


def head_weights(model: nn.Module) -> set[int]:
    """ids of the weights that make the output: of what a model names by `get_output_embeddings()`, of a linear layer of
    a head's name, of an adaptive softmax, and the `head_weight_VD` of our own models, which is the embedding where they
    are tied."""
    heads: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and layer_name(path) in _HEAD_NAMES:
            heads.add(id(module.weight))
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            heads |= {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
        if isinstance(weight := getattr(module, "head_weight_VD", None), Tensor):
            heads.add(id(weight))
        for part in _answer(module, "get_output_embeddings") or ():
            if isinstance(part, nn.Linear | nn.Embedding):
                heads.add(id(part.weight))
    return heads


def possible_heads(model: nn.Module, heads: set[int]) -> dict[int, str]:
    """id of the weight -> why it may belong to an output layer, of each linear layer that is not among `heads`."""
    survey = _Survey(model)
    reasons = {id(linear.weight): "nothing in the model takes its output" for linear in survey.ends()}
    if rows := survey.vocabulary:
        large = [linear for linear in survey.outside() if linear.out_features >= rows and not survey.returns(linear)]
        large += survey.ends_of_blocks()
        reasons |= {id(linear.weight): f"it has no fewer rows than an embedding, {rows}" for linear in large}
    known = heads | {id(m.weight) for m in model.modules() if isinstance(m, EMBEDDINGS)}
    known |= {
        id(m.weight)
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear) and (is_router(m) or layer_name(path) in ROUTER_NAMES)
    }
    return {weight: reason for weight, reason in reasons.items() if weight not in known}


def _answer(module: nn.Module, question: str) -> list[nn.Module] | None:
    """The layers that transformers' get_..._embeddings() names, also where PEFT wraps them; None where it does not."""
    ask = getattr(module, question, None)
    try:
        answer = ask() if callable(ask) else None
    except (AttributeError, NotImplementedError):  # transformers' default, and models without the part that they ask
        return None
    if not isinstance(answer, nn.Module):
        return None
    several = isinstance(answer, nn.ModuleList) or hasattr(answer, "base_layer") or hasattr(answer, "original_module")
    return list(answer.modules()) if several else [answer]


class _Survey:
    """The linear layers of a model by place: in a block or not, followed by others or not."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.taken = Counter(m.in_features for m in _takers(model))
        self.beside = {id(linear): group for m in model.modules() if (group := _beside(m)) for linear in group}
        known = (nn.Linear, *EMBEDDINGS, nn.modules.conv._ConvNd)
        bare = [p for m in model.modules() if not isinstance(m, known) for p in m.parameters(recurse=False)]
        self.taken.update(size for p in bare if p.ndim > 1 for size in p.shape[-2:])
        tables = self._tables()
        self.vocabulary = min((m.num_embeddings for m in tables), default=0)
        self._tables_of_tokens = {id(m) for m in tables}
        self.blocks = {id(child) for m in model.modules() for child in self._blocks(m)}
        self._with_blocks = {
            id(m) for m in model.modules() if any(id(inner) in self.blocks for inner in m.modules() if inner is not m)
        }

    def _tables(self) -> list[nn.Embedding]:
        """The embeddings of tokens: what the model names, else those with rows enough that some layer takes.

        Not what a ModuleList repeats: positions in attention.
        """
        answers = [named for m in self.model.modules() if (named := _answer(m, "get_input_embeddings")) is not None]
        if answers:
            return [m for named in answers for m in named if isinstance(m, nn.Embedding)]
        repeated = {
            id(inner)
            for m in self.model.modules()
            if isinstance(m, nn.ModuleList)
            for child in m.children()
            for inner in child.modules()
            if inner is not child
        }
        tables = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and id(m) not in repeated]
        return [m for m in tables if m.num_embeddings >= _SMALLEST_VOCABULARY and self.taken[m.embedding_dim]]

    def _blocks(self, parent: nn.Module) -> list[nn.Module]:
        if not isinstance(parent, (*_PARALLEL, nn.Sequential)):
            return []
        several = [child for child in parent.children() if sum(p.ndim > 1 for p in child.parameters()) > 1]
        if len(several) < 2 and not isinstance(parent, nn.ModuleList):
            return []
        return [child for child in several if self._is_block(child)]

    def _is_block(self, child: nn.Module) -> bool:
        if any(id(m) in self._tables_of_tokens for m in child.modules()):
            return False
        linears = _linears(child)
        if len(linears) < sum(p.ndim > 1 for p in child.parameters()):
            return True
        first, last = linears[0], linears[-1]
        chain = all(a.out_features == b.in_features for a, b in pairwise(linears))
        large = 0 < self.vocabulary <= last.out_features
        ends = last.out_features != first.in_features and (large or not self._is_taken(last))
        return not (chain and ends)

    def _is_taken(self, linear: nn.Linear) -> bool:
        """Whether another layer takes as many features as this one makes."""
        itself = linear.in_features == linear.out_features
        return self.taken[linear.out_features] > itself or self.returns(linear)

    def outside(self) -> list[nn.Linear]:
        """The linear layers that no block contains."""
        return list(self._walk(self.model))

    def _walk(self, module: nn.Module) -> Iterator[nn.Linear]:
        if isinstance(module, nn.Linear):
            yield module
        for child in module.children():
            if id(child) not in self.blocks:
                yield from self._walk(child)

    def returns(self, linear: nn.Linear) -> bool:
        """Whether a layer beside it takes its output and makes as many features as it was given: up, and down again."""
        return any(
            other is not linear and (other.in_features, other.out_features) == (linear.out_features, linear.in_features)
            for other in self.beside.get(id(linear), ())
        )

    def ends(self) -> list[nn.Linear]:
        """The last linear layers of each branch whose output no other layer takes.

        A branch is what stands beside the blocks; without blocks, the whole model where it is one network.
        """
        if id(self.model) in self._with_blocks:
            return [linear for branch in self._branches(self.model) for linear in self._ends_of(branch)]
        return list(self._ends_of(self.model)) if self._is_network() else []

    def ends_of_blocks(self) -> list[nn.Linear]:
        """The last linear layers of blocks, of a row per token, that nothing takes: heads of further tokens."""
        blocks = (_linears(m) for m in self.model.modules() if id(m) in self.blocks)
        ends = (next((m for m in reversed(linears) if m.out_features > 1), None) for linears in blocks)
        return [m for m in ends if m is not None and m.out_features == self.vocabulary and not self._is_taken(m)]

    def _is_network(self) -> bool:
        """Whether the linear layers follow each other, or other ones, and then may part: not a collection of any."""
        linears = _linears(self.model)
        others = any(
            p.ndim > 1
            for m in self.model.modules()
            if not isinstance(m, (nn.Linear, *EMBEDDINGS))
            for p in m.parameters(recurse=False)
        )
        hidden = [m for m in linears if self._is_taken(m)]
        follow = all(a.out_features == b.in_features > 1 for a, b in pairwise(hidden))
        last = hidden[-1].out_features if hidden else 0
        part = all(m.in_features == (last or linears[0].in_features) for m in linears if not self._is_taken(m))
        return (bool(hidden) or others) and follow and part

    def _branches(self, module: nn.Module) -> Iterator[nn.Module]:
        children = dict(module.named_children())
        for child in children.values():
            if id(child) in self._with_blocks:
                if id(child) not in self.blocks:
                    yield from self._branches(child)
            elif id(child) not in self.blocks and "experts" not in children:
                yield child

    def _ends_of(self, branch: nn.Module) -> Iterator[nn.Linear]:
        if isinstance(branch, _PARALLEL):
            for child in branch.children():
                yield from self._ends_of(child)
            return
        for linear in reversed(list(self._walk(branch))):
            if min(linear.in_features, linear.out_features) == 1:
                continue  # of a value, a gate: no matrix
            if self._is_taken(linear):
                return
            yield linear


def _takers(model: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers that may take what stands outside their block: not the way back of up and down again."""
    for path, module in model.named_modules():
        linears = _beside(module)
        for i, m in enumerate(linears):
            back = any((a.out_features, a.in_features) == (m.in_features, m.out_features) for a in linears[:i])
            if not back and not path.endswith(".lora_B") and m.in_features >= _SMALLEST_WIDTH:
                yield m


def _beside(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.children() if isinstance(m, nn.Linear)]


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]
