"""The sides of `muon_step.py`: sets of matrices, what steps over them, and how good its update is."""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from earthshine.ops.newton_schulz_tables import Coefficients, coefficient_steps
from earthshine.ops.orthogonalize import newton_schulz
from earthshine.optim.muon import Muon

LR, MOMENTUM, DECAY = 1e-3, 0.95, 0.1
Shape = tuple[int, int]

# Moonlight's matrices; those of a small Mixtral and a small DeepSeek-V3 model (`train_step.py`); many small ones; wide.
SETS = {
    "a": "2048x2048*2,11264x2048*2,1408x2048*2",
    "b": "256x256*16,704x256*64,256x704*32",
    "c": "384x256*4,144x256*4,512x128*4,256x256*4,352x256*8,256x352*4,176x256*512,256x176*256",
    "d": "64x64*42,64x128*42,128x128*42",
    "e": "256x704*16,1024x256*16,352x1408*8,2048x512*4",
    # One layer of SmolLM2-135M: q and o, k and v, gate and up, down.
    "layer": "576x576*2,192x576*2,1536x576*2,576x1536",
}


@dataclass(frozen=True)
class Side:
    """build: parameters -> optimizer. dtype: of its Newton-Schulz. factor: what its update of a shape is multiplied by.

    installed: a peer as it comes from PyPI (or torch); patched peers and this package's own are not.
    """

    name: str
    build: Callable[[list[nn.Parameter]], Any]
    dtype: torch.dtype
    factor: Callable[[Shape], float]
    table: Coefficients = coefficient_steps("keller5")
    installed: bool = False
    ours: bool = False


def moonlight(shape: Shape) -> float:
    return 0.2 * math.sqrt(max(shape))


def original(shape: Shape) -> float:
    return math.sqrt(max(1.0, shape[0] / shape[1]))


class TorchLoop(torch.optim.Muon):
    """torch.optim.Muon's step on the matrices one by one, with Newton-Schulz in fp32: its own lines but the cast."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buf = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buf.lerp_(p.grad, 1 - group["momentum"])
                X = p.grad.lerp(buf, group["momentum"])
                tall = X.size(0) > X.size(1)
                X = X.T if tall else X
                X.div_(X.norm().clamp(min=group["eps"]))
                a, b, c = group["ns_coefficients"]
                for _ in range(group["ns_steps"]):
                    A = X @ X.T
                    X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(X.T if tall else X, alpha=-group["lr"] * moonlight(p.shape))


def parse_shapes(text: str) -> list[Shape]:
    """ "2x3*2,4x5" -> [(2, 3), (2, 3), (4, 5)]; a name of SETS is its shapes."""
    shapes = []
    for item in SETS.get(text, text).split(","):
        size, _, count = item.partition("*")
        rows, _, cols = size.partition("x")
        shapes += [(int(rows), int(cols))] * int(count or 1)
    return shapes


def gradients(shapes: Sequence[Shape], kind: str) -> list[Tensor]:
    """ "gaussian", or "tokens": sums of 24 outer products of unequal weight that have a direction in common."""
    g = torch.Generator().manual_seed(0)
    if kind == "gaussian":
        return [torch.randn(shape, generator=g) for shape in shapes]
    grads = []
    for shape in shapes:
        left, right = (torch.randn(n, 24, generator=g) + torch.randn(n, 1, generator=g) for n in shape)
        grads.append(left * torch.exp(1.5 * torch.randn(24, generator=g)) @ right.mT)
    return grads


def own_sides(dtypes: Sequence[torch.dtype]) -> list[Side]:
    """This package's Muon in each dtype: in the form that torch.optim.Muon computes, and by its own choice (auto)."""

    def side(dtype: torch.dtype, form: str) -> Side:
        name = str(dtype).removeprefix("torch.")
        return Side(
            f"earthshine {name} {form}",
            lambda params: Muon(params, lr=LR, weight_decay=DECAY, ns_dtype=name, ns_form=form),  # type: ignore[arg-type]
            dtype,
            moonlight,
            ours=True,
        )

    return [side(dtype, form) for dtype in dtypes for form in ("standard", "auto")]


def peer_sides() -> tuple[list[Side], list[str]]:
    """Every peer that is installed, and a line for each that is not, with the reason."""
    fp32, bf16 = torch.float32, torch.bfloat16
    common = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}
    sides = [
        Side(
            "torch.optim.Muon",
            lambda params: torch.optim.Muon(params, adjust_lr_fn="match_rms_adamw", **common),
            bf16,
            moonlight,
            installed=True,
        ),
        Side("torch's loop in fp32", lambda params: TorchLoop(params, **common), fp32, moonlight),
    ]
    missing = []
    for package, make in (("pytorch_optimizer", _pytorch_optimizer), ("muonium", _muonium), ("heavyball", _heavyball)):
        try:
            sides += make(importlib.import_module(package))
        except ImportError as e:
            needed = " ".join(dict.fromkeys([package, e.name or package]))
            missing.append(f"{package} is left out ({e}): pip install --no-deps {needed}")
    return sides, missing


def _version(package: str) -> str:
    return f"{package} {metadata.version(package.replace('_', '-'))}"


def _pytorch_optimizer(module: Any) -> list[Side]:
    matrix = importlib.import_module("pytorch_optimizer.optimizer.muon.base")
    given = matrix.zero_power_via_newton_schulz_5

    def build(params: list[nn.Parameter]) -> Any:
        group = {"params": params, "use_muon": True}
        return module.Muon([group], lr=LR, momentum=MOMENTUM, weight_decay=DECAY, use_adjusted_lr=True)

    class InFp32:
        """Its batches of one shape, in a dtype that its function takes but its optimizer does not pass on."""

        def __init__(self, params: list[nn.Parameter]) -> None:
            self.optimizer = build(params)

        def step(self) -> None:
            matrix.zero_power_via_newton_schulz_5 = lambda *args, **named: given(*args, **named, dtype=torch.float32)
            try:
                self.optimizer.step()
            finally:
                matrix.zero_power_via_newton_schulz_5 = given

    name = _version("pytorch_optimizer")
    return [
        Side(name, build, torch.bfloat16, moonlight, installed=True),
        Side(f"{name}, patched to fp32", InFp32, torch.float32, moonlight),
    ]


def _muonium(module: Any) -> list[Side]:
    def build(params: list[nn.Parameter]) -> Any:
        return module.Muon(
            params,
            lr=LR,
            wd=DECAY,
            use_cautious_wd=False,
            momentum=MOMENTUM,
            ns_steps=5,
            orthogonalization_strategy="newton_schulz",
        )

    return [Side(_version("muonium"), build, torch.bfloat16, original, installed=True)]


def _heavyball(module: Any) -> list[Side]:
    def build(params: list[nn.Parameter]) -> Any:
        return module.Muon(params, lr=LR, betas=(MOMENTUM, 0.99), weight_decay=DECAY)

    name = f"{_version('heavyball')} (its own table, you5)"
    return [Side(name, build, torch.bfloat16, original, coefficient_steps("you5"), installed=True)]


class Quality:
    """How good first updates are on the first matrix of each shape; what is exact is computed once."""

    def __init__(self, shapes: Sequence[Shape], grads: Sequence[Tensor]) -> None:
        self._first = {shape: i for i, shape in reversed(list(enumerate(shapes)))}
        self._grads, self._exact = grads, {}

    def of(self, side: Side, params: Sequence[nn.Parameter]) -> tuple[float, float]:
        """(relative Frobenius error to the polynomial in fp64, largest singular value), the worst over the shapes.

        The parameters were zero before the one step that they have taken.
        """
        error = largest = 0.0
        for shape, i in self._first.items():
            key = (shape, side.table)
            if key not in self._exact:
                exact = newton_schulz(self._grads[i].double(), side.table, dtype=torch.float64, form="auto")
                self._exact[key] = exact.float()
            O_MN = params[i].detach() / (-LR * side.factor(shape))
            difference = torch.linalg.vector_norm(O_MN - self._exact[key])
            error = max(error, float(difference / torch.linalg.vector_norm(self._exact[key])))
            O_SL = O_MN if shape[0] <= shape[1] else O_MN.mT
            gram_SS = (O_SL @ O_SL.mT).double()
            largest = max(largest, float(torch.linalg.eigvalsh(gram_SS)[-1].clamp(min=0).sqrt()))
        return error, largest
