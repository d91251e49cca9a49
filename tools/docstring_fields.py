"""Griffe extension of the documentation site: a docstring's `name: what it is` lines become a Markdown list.

Our docstrings list fields and parameters without a heading, a deeper indent continues an entry. Markdown would run
these lines together into one paragraph.
"""

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"((?:\w+, )*\w+): (\S.*)")


def listed(text: str, names: set[str]) -> str:
    """The docstring with an item for each line that begins with some of these names and a colon."""
    lines: list[str] = []
    in_list = False
    for line in text.splitlines():
        match = _ENTRY.fullmatch(line)
        if match and set(match[1].split(", ")) <= names:
            if not in_list:
                lines.append("")
            lines.append(f"- {', '.join(f'`{name}`' for name in match[1].split(', '))}: {match[2]}")
            in_list = True
            continue
        if in_list and line and not line.startswith("    "):
            lines.append("")
            in_list = False
        lines.append(line)
    return "\n".join(lines)


class DocstringFields(griffe.Extension):
    """Rewrites the docstrings of classes and functions as they are loaded, and shows an option's default alone."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "_option":  # optim.config's field with limits
            attr.value = value.arguments[0]

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        init = cls.members.get("__init__")
        names = set(cls.members) | ({p.name for p in init.parameters} if isinstance(init, griffe.Function) else set())
        self._rewrite(cls, names)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        self._rewrite(func, {p.name for p in func.parameters})

    def _rewrite(self, owner: griffe.Object, names: set[str]) -> None:
        if owner.docstring is not None:
            owner.docstring.value = listed(owner.docstring.value, names)
