"""config.py: what is wrong with a JSON config is said, whatever it is."""

from pathlib import Path

import pytest

from earthshine.config import decode, encode, load_json
from earthshine.errors import ConfigError
from earthshine.recipes.registry import recipe
from earthshine.train.job import TrainJob


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """JSON parsers take the last one; whoever wrote the first meant it."""
    path = tmp_path / "job.json"
    path.write_text('{"seed": 1, "name": "a", "seed": 2}')
    with pytest.raises(ConfigError, match="the key 'seed' stands twice"):
        load_json(TrainJob, path)


@pytest.mark.parametrize("kind", [[], {}, None, 1], ids=str)
def test_a_kind_of_any_type_is_refused(kind: object) -> None:
    with pytest.raises(ConfigError, match=r"init.kind=.* is not one of checkpoint, huggingface, scratch"):
        decode(TrainJob, encode(recipe("tiny")) | {"init": {"kind": kind}})
