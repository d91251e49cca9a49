"""errors.py: what was meant by a name that is not known."""

import pytest

from earthshine.errors import nearest


@pytest.mark.parametrize(
    ("name", "choices", "hint"),
    [
        ("momentm", ["nesterov", "momentum"], " Did you mean 'momentum'?"),
        ("xyz", ["nesterov", "momentum"], " Known: momentum, nesterov."),
        ("xyz", [], ""),
        ("", ["lr"], " Known: lr."),
    ],
)
def test_a_near_name_is_suggested_and_else_all_are_listed(name: str, choices: list[str], hint: str) -> None:
    assert nearest(name, iter(choices)) == hint
