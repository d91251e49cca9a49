"""errors.py: what its messages suggest."""

import pytest

from earthshine.errors import divisors, nearest


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


def test_divisors() -> None:
    assert [divisors(n) for n in (1, 12, 7)] == ["1", "1, 2, 3, 4, 6, 12", "1, 7"]
