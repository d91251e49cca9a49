"""A checkpoint of one layout resumes on another: the gathered state is bit-equal, and so are the next five steps."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from harness import Worlds
from layouts import LAYOUTS, build, differences, inject
from tasks import OneProcess, Options, Outcome, muon, outcome, whole, whole_gradients
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from earthshine import Muon

SAVED_AT, END = 3, 8


def checkpoint(model: nn.Module, opt: Muon) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}


@contextlib.contextmanager
def one_process_is_meant() -> Iterator[None]:
    """torch asks back, by a warning, where there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def save(layout: str, options: Options, folder: str) -> Outcome:
    model = build(layout)
    opt = muon(model, layout, **options)
    for step in range(SAVED_AT):
        inject(model, whole_gradients(layout, step))
        opt.step()
    with one_process_is_meant():
        dcp.save(checkpoint(model, opt), checkpoint_id=folder)
    return outcome(model, opt)


def resume(layout: str, options: Options, folder: str) -> tuple[Outcome, Outcome]:
    """A fresh model and optimizer that took another step before they are loaded, so that nothing is right by chance."""
    model = build(layout)
    opt = muon(model, layout, **options)
    inject(model, whole_gradients(layout, 77))
    opt.step()
    state = checkpoint(model, opt)
    with one_process_is_meant():
        dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, opt, state["optimizer"])
    loaded = outcome(model, opt)
    for step in range(SAVED_AT, END):
        inject(model, whole_gradients(layout, step))
        opt.step()
    return loaded, outcome(model, opt)


PAIRS = [
    ("fsdp-4", "plain"),
    ("plain-halves", "tp-2-fsdp-2"),
    ("ep-2", "ep-4"),
    ("fsdp-4", "hsdp-2x2"),
    ("zero1-4", "fsdp-4"),
    ("tp-column-4", "plain-even"),
    ("tp-2-fsdp-2", "ep-2-fsdp-2-dim1"),
]
MORE = [
    ("fsdp-4", "zero1-4"),
    ("zero1-4", "plain"),
    ("plain", "zero1-2"),
    ("zero1-4", "zero1-2"),
    ("fsdp-4", "fsdp-2"),
    ("fsdp-2", "ep-4"),
    ("ep-4", "ep-2"),
    ("ep-2-fsdp-2-dim1", "tp-2-fsdp-2"),
    ("ep-2-fsdp-2-dim0", "tp-row-4"),
    ("tp-row-4", "tp-column-2"),
    ("hsdp-2x2", "ddp-4"),
    ("ddp-2", "fsdp-4"),
]


@pytest.mark.parametrize("first, second", [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)])
def test_save_here_resume_there(
    worlds: Worlds, one_process: OneProcess, tmp_path: Path, first: str, second: str
) -> None:
    check(worlds, one_process, tmp_path, first, second, {})


@pytest.mark.parametrize(
    "first, second",
    [("fsdp-4", "plain"), ("plain-halves", "tp-2-fsdp-2"), pytest.param("zero1-4", "fsdp-4", marks=pytest.mark.slow)],
)
def test_state_of_options(worlds: Worlds, one_process: OneProcess, tmp_path: Path, first: str, second: str) -> None:
    """NorMuon's moment per row, and momentum in bf16."""
    options = {"normuon_beta2": 0.95, "momentum_dtype": "bfloat16"}
    check(worlds, one_process, tmp_path, first, second, options)


def check(
    worlds: Worlds, one_process: OneProcess, folder: Path, first: str, second: str, options: dict[str, Any]
) -> None:
    saved = whole(worlds.run(LAYOUTS[first].world, save, first, options, str(folder)))
    ranks = worlds.run(LAYOUTS[second].world, resume, second, options, str(folder))
    loaded, ended = (whole([rank[i] for rank in ranks]) for i in range(2))
    assert not differences(loaded, saved)
    assert not differences(ended, one_process(first, options, range(END)))
