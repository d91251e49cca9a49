"""Copies of `Muon`, and checkpoints of it: in memory, on disk, by names, and in another process."""

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small import LR, Small, assert_same, muon, train
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from earthshine.errors import CheckpointError
from earthshine.optim import rules
from earthshine.optim.muon import Muon
from earthshine.optim.rules import register_scale


def one_matrix(**options: Any) -> tuple[nn.Parameter, Muon]:
    g = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(4, 6, generator=g))
    p.grad = torch.randn(4, 6, generator=g)
    return p, Muon([p], **{"lr": LR, "ns_dtype": "float32"} | options)


def test_copies_have_rates_and_state_of_their_own() -> None:
    p, optimizer = one_matrix(lr=torch.tensor(LR))
    twin = copy.deepcopy(optimizer)
    optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(1.0)
    (q,) = twin.param_groups[0]["params"]
    assert not torch.equal(p, q)
    assert not twin.state[q]["momentum_sum"].any()
    assert float(twin.param_groups[0]["lr"]) == pytest.approx(LR)


def test_a_copy_takes_groups_and_checkpoints_like_the_original() -> None:
    _, optimizer = one_matrix()
    twin = pickle.loads(pickle.dumps(optimizer))
    later = torch.ones(2, 3)
    for o in (optimizer, twin):
        o.add_param_group({"params": [nn.Parameter(later.clone())]})
    optimizer.load_state_dict(twin.state_dict())
    assert [len(o.param_groups) for o in (optimizer, twin)] == [2, 2]
    for o in (optimizer, twin):
        for group in o.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        o.step()
    for ours, copied in zip(optimizer.param_groups, twin.param_groups, strict=True):
        assert torch.equal(ours["params"][0], copied["params"][0])


def test_an_optimizer_with_a_registered_function_is_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_REGISTERED", {})
    half = lambda rows, cols: 0.5  # noqa: E731 - which pickle cannot find again
    register_scale("half", half)
    p, optimizer = one_matrix(scale=half)
    twin = pickle.loads(pickle.dumps(optimizer))
    (q,) = twin.param_groups[0]["params"]
    q.grad = p.grad
    for o in (optimizer, twin):
        o.step()
    assert torch.equal(p, q)


def test_torch_save_of_the_whole_optimizer() -> None:
    model = Small()
    optimizer = muon(model)
    train(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    other, loaded = torch.load(file, weights_only=False)
    train(model, optimizer, range(2, 4))
    train(other, loaded, range(2, 4))
    assert_same(model, other)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_to_disk_without_processes(tmp_path: Path, flatten: bool) -> None:
    """By names, as torchtitan (flattened) and torch's tutorials do; hyper-parameters among them."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    a, b = Small(), Small()
    opt_a, opt_b = muon(a, normuon_beta2=0.9), muon(b, normuon_beta2=0.9)
    train(a, opt_a, range(2))
    model_state, optimizer_state = get_state_dict(a, opt_a, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    model_state, optimizer_state = get_state_dict(b, opt_b, options=options)
    loaded = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(
        b,
        opt_b,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        for key, value in opt_a.state[p].items():
            assert torch.equal(value, opt_b.state[q][key]), key
    train(a, opt_a, range(2, 4))
    train(b, opt_b, range(2, 4))
    assert_same(a, b)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_that_lacks_an_option_is_loaded_in_part(tmp_path: Path, flatten: bool) -> None:
    """As docs/muon.md has it: an older one, from before `payload_dtype` was called `comm_dtype`."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    a, b = Small(), Small()
    opt_a, opt_b = muon(a, comm_dtype="float32"), muon(b, comm_dtype="float32")
    train(a, opt_a, range(2))
    model_state, saved = get_state_dict(a, opt_a, options=options)
    for part in [saved] if flatten else saved["param_groups"]:
        for key in [key for key in part if key.endswith("comm_dtype")]:
            part[key.replace("comm_dtype", "payload_dtype")] = part.pop(key)
    dcp.save({"model": model_state, "optimizer": saved}, checkpoint_id=tmp_path)
    model_state, optimizer_state = get_state_dict(b, opt_b, options=options)
    loaded = {"model": model_state, "optimizer": optimizer_state}
    with pytest.raises(dcp.api.CheckpointException, match="Missing key in checkpoint state_dict: .*comm_dtype"):
        dcp.load(loaded, checkpoint_id=tmp_path)
    dcp.load(loaded, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(b, opt_b, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options)
    train(a, opt_a, range(2, 4))
    train(b, opt_b, range(2, 4))
    assert_same(a, b)


@pytest.mark.parametrize("flatten", [False, True])
def test_a_hyper_parameter_that_differs_is_refused_from_a_distributed_checkpoint(flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    a, b = Small(), Small()
    model_state, optimizer_state = get_state_dict(a, muon(a, momentum=0.9), options=options)
    with pytest.raises(CheckpointError, match=r"group 0 momentum: 0\.9 \(saved\) -> 0\.95"):
        set_state_dict(b, muon(b), model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)


def test_another_process_resumes_from_a_file_of_weights_only(tmp_path: Path) -> None:
    """Everything a state dict can hold: every algorithm, tables, names, a rate as a tensor."""
    script = textwrap.dedent(
        """
        import sys, torch
        from torch import nn
        from earthshine import Muon

        def build():
            g = torch.Generator().manual_seed(0)
            shapes = {"w": (4, 6), "stack": (2, 3, 5), "table": (7, 5), "v": (5,)}
            ps = {n: nn.Parameter(torch.randn(s, generator=g)) for n, s in shapes.items()}
            return ps, Muon(
                [
                    {"params": [(n, ps[n]) for n in ("w", "stack")], "matrices": [("rows", (3, 1)), ("batch",)],
                     "normuon_beta2": 0.9, "ns_coefficients": [[2.0, -1.5, 0.5]], "ns_steps": 6},
                    {"params": [("table", ps["table"])], "algorithm": "scion", "lmo": ["row_rms"]},
                    {"params": [("v", ps["v"])], "algorithm": "adamw"},
                ],
                lr=torch.tensor(0.05), ns_dtype="float32", momentum_dtype="bfloat16",
            )

        def run(ps, optimizer, steps):
            for step in steps:
                for p in ps.values():
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                optimizer.step()

        if __name__ == "__main__":
            ps, optimizer = build()
            saved = torch.load(sys.argv[1], weights_only=True)
            for n, p in ps.items():
                p.data.copy_(saved["weights"][n])
            optimizer.load_state_dict(saved["optimizer"])
            run(ps, optimizer, range(2, 4))
            torch.save({n: p.detach() for n, p in ps.items()}, sys.argv[2])
        """
    )
    there: dict[str, Any] = {"__name__": "here"}
    exec(script, there)
    ps, optimizer = there["build"]()
    there["run"](ps, optimizer, range(2))
    file, result = tmp_path / "saved.pt", tmp_path / "result.pt"
    torch.save({"weights": {n: p.detach() for n, p in ps.items()}, "optimizer": optimizer.state_dict()}, file)
    there["run"](ps, optimizer, range(2, 4))
    (tmp_path / "other.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "other.py", file, result], check=True)
    for n, value in torch.load(result, weights_only=True).items():
        assert torch.equal(value, ps[n]), n


@pytest.mark.filterwarnings("default")  # torch warns of itself when dynamo is imported
def test_a_wrapped_models_checkpoint_is_the_bare_ones() -> None:
    """torch.compile puts _orig_mod. before every name; nothing is compiled before a forward."""
    bare, wrapped = Small(), torch.compile(Small())
    one, other = muon(bare), muon(wrapped)
    assert other.param_groups[0]["param_names"] == one.param_groups[0]["param_names"] == ["up.weight", "down.weight"]
    one.load_state_dict(other.state_dict())
