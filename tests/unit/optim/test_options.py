"""optim/options.py and optim/config.py: every option is declared once, in GroupOptions."""

import inspect
import pickle

import pytest
import torch
from torch import nn

from earthshine.errors import CheckpointError, ConfigError
from earthshine.optim.config import GroupOptions, OptimizerConfig
from earthshine.optim.groups import param_groups
from earthshine.optim.muon import Muon
from earthshine.optim.options import DEFAULTS


def test_the_keywords_of_muon_are_the_group_options_with_their_defaults() -> None:
    """Written out in Muon.__init__, for editors and type checkers; this holds the two together."""
    keywords = dict(inspect.signature(Muon).parameters)
    shared = {"params", "lr", "process_group", "reduce_gradients", "max_bucket_bytes"}  # lr has no default there
    assert {name: p.default for name, p in keywords.items() if name not in shared} == {
        name: default for name, default in DEFAULTS.items() if name != "lr"
    }
    assert all(p.kind is p.KEYWORD_ONLY for name, p in keywords.items() if name not in ("params", "lr"))


def test_options_of_a_group_and_of_a_config_are_one_another() -> None:
    values = {"betas": (0.8, 0.9), "ns_coefficients": ((2.0, -1.5, 0.5),), "lr": 0.5, "rounding_seed": 7}
    options = GroupOptions.of_group(DEFAULTS | values)
    assert options == GroupOptions(
        lr=0.5, beta1=0.8, beta2=0.9, ns_coefficients="table", ns_table=((2.0, -1.5, 0.5),), rounding_seed=7
    )
    assert options.as_group() == DEFAULTS | values
    assert OptimizerConfig(momentum=0.5, non_matrix="scion").as_group() == DEFAULTS | {"momentum": 0.5}


# ------------------------------------------------------------------------------- options by the names they had before


def linear() -> nn.Linear:
    return nn.Linear(3, 2)


def test_keywords_and_groups_are_read_by_their_old_names() -> None:
    """A FutureWarning each, as every user has something to change; nothing is read under both names."""
    said = "payload_dtype is called comm_dtype now"
    with pytest.warns(FutureWarning, match=said):
        optimizer = Muon([linear().weight], lr=0.1, payload_dtype="bfloat16")  # type: ignore[call-arg]
    assert optimizer.param_groups[0]["comm_dtype"] == "bfloat16"
    assert "payload_dtype" not in optimizer.param_groups[0] | optimizer.defaults
    with pytest.warns(FutureWarning, match=said):
        optimizer.add_param_group({"params": [linear().weight], "payload_dtype": "float32"})
    assert optimizer.param_groups[1]["comm_dtype"] == "float32"
    with pytest.warns(FutureWarning, match="rest is called non_matrix now"):
        groups = param_groups(linear(), rest="scion")  # type: ignore[call-arg]
    assert [group["algorithm"] for group in groups] == ["muon", "scion"]
    with pytest.warns(FutureWarning, match="rest is called non_matrix now"):
        assert OptimizerConfig(rest="scion") == OptimizerConfig(non_matrix="scion")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="payload_dtype is the old name of comm_dtype: give one of them"):
        Muon([linear().weight], lr=0.1, payload_dtype="auto", comm_dtype="auto")  # type: ignore[call-arg]


def test_what_was_saved_under_old_names_is_loaded_without_a_word() -> None:
    """Its owner cannot change it. A value that differs is still refused."""

    def older(comm_dtype: str) -> Muon:
        optimizer = Muon([("w", linear().weight)], lr=0.1, momentum=0.5, comm_dtype=comm_dtype)
        for options in (*optimizer.param_groups, optimizer.defaults):
            options["payload_dtype"] = options.pop("comm_dtype")
        return optimizer

    saved = torch.optim.Optimizer.state_dict(older("bfloat16"))
    assert "payload_dtype" in saved["param_groups"][0]
    Muon([("w", linear().weight)], lr=0.1, momentum=0.5, comm_dtype="bfloat16").load_state_dict(saved)
    with pytest.raises(CheckpointError, match=r"group 0 comm_dtype: bfloat16 \(saved\) -> auto"):
        Muon([("w", linear().weight)], lr=0.1, momentum=0.5).load_state_dict(saved)
    loaded: Muon = pickle.loads(pickle.dumps(older("bfloat16")))
    assert loaded.param_groups[0]["comm_dtype"] == loaded.defaults["comm_dtype"] == "bfloat16"
    loaded.add_param_group({"params": [("v", linear().weight)]})
    assert [group.get("payload_dtype") for group in loaded.param_groups] == [None, None]
