"""The budgets of the house: sizes, where `print` and accelerator names may stand, how soon the command line answers."""

import ast
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from earthshine.cli.main import COMMANDS

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_HELP_SECONDS = 0.5

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "src" / "earthshine"
FILES = sorted(
    p for folder in ("src", "tests", "benchmarks", "examples", "tools") for p in (REPOSITORY / folder).rglob("*.py")
)


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def test_files_are_short():
    lengths = {name_of(p): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    assert len(lengths) > 50, "the files were not found"
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_shared_test_modules_have_names_of_their_own():
    """They are imported by their bare names, and all tests are collected in one process."""
    shared = [p.stem for p in (REPOSITORY / "tests").rglob("*.py") if not p.name.startswith(("test_", "conftest"))]
    assert sorted(shared) == sorted(set(shared))


def test_functions_are_short():
    too_long = {
        f"{name_of(p)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for p in FILES
        for node in nodes(p)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert too_long == {}


def test_only_the_command_line_prints():
    allowed = {PACKAGE / "console.py", *(PACKAGE / "cli").glob("*.py")}
    prints = [
        f"{name_of(p)}:{node.lineno}"
        for p in sorted(PACKAGE.rglob("*.py"))
        if p not in allowed
        for node in nodes(p)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == []


def test_only_device_and_parallel_name_an_accelerator():
    """Neither as a string nor as `torch.cuda`: everything else must run wherever its tensors are."""
    allowed = {PACKAGE / "device.py", *(PACKAGE / "parallel").rglob("*.py")}
    named = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path in allowed:
            continue
        for node in nodes(path):
            word = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            if isinstance(word, str) and word.partition(":")[0] == "cuda":
                named.append(f"{name_of(path)}:{getattr(node, 'lineno', 0)}")
    assert named == []


def test_inits_below_the_top_are_empty():
    """A re-export there would load a folder's every dependency with its smallest module."""
    full = [name_of(p) for p in PACKAGE.glob("*/**/__init__.py") if p.read_text(encoding="utf-8").strip()]
    assert full == []


# Runs the command line in a new interpreter and tells, on stderr's last line, what it had loaded at the end.
PROBE = """
import json, sys
from earthshine.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as e:
    code = e.code or 0
print(json.dumps({"code": code, "torch": "torch" in sys.modules}), file=sys.stderr)
"""


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def probe(args: list[str], env: dict[str, str]) -> tuple[dict, float, str]:
    """What was loaded, the seconds of processor time (which other work on the machine adds little to), and stdout."""
    start = cpu_seconds_of_children()
    process = subprocess.run([sys.executable, "-c", PROBE, *args], capture_output=True, text=True, env=env)
    seconds = cpu_seconds_of_children() - start
    assert process.stderr, "the interpreter died"
    return json.loads(process.stderr.splitlines()[-1]), seconds, process.stdout


HELPS = [
    ["--help"],
    *([name, "--help"] for name in COMMANDS),
    *(["verify", name, "--help"] for name in ("upcycle", "hf", "checkpoint")),
]


@pytest.mark.parametrize("args", HELPS, ids=" ".join)
def test_help_is_quick_and_leaves_torch_alone(args, earthshine_env):
    """The best of three: caches that other work has emptied are not the program's doing."""
    best = float("inf")
    for _ in range(3):
        seen, seconds, out = probe(args, earthshine_env)
        assert seen == {"code": 0, "torch": False}
        assert "usage: earthshine" in out
        best = min(best, seconds)
        if best < MAX_HELP_SECONDS:
            break
    assert best < MAX_HELP_SECONDS


@pytest.mark.parametrize(
    "args",
    [
        ["ls", "recipes"],
        ["ls", "presets"],
        ["ls", "presets", "--json"],
        ["show", "tiny_moe"],
        ["show", "smollm2_135m_e8t2", "--json"],
    ],
    ids=" ".join,
)
def test_looking_around_leaves_torch_alone(args, earthshine_env):
    seen, _, out = probe(args, earthshine_env)
    assert seen == {"code": 0, "torch": False}
    assert out


def test_every_recipe_is_shown_without_torch(earthshine_env):
    _, _, listing = probe(["ls", "recipes", "--json"], earthshine_env)
    names = [row["name"] for row in json.loads(listing)]
    assert names
    for name in names:
        assert probe(["show", name, "--json"], earthshine_env)[0] == {"code": 0, "torch": False}


def test_import_is_instant(earthshine_env):
    """`import earthshine` loads nothing heavy; its names come when they are asked for."""
    code = "import sys, earthshine; print('torch' in sys.modules, 'numpy' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=earthshine_env, check=True
    )
    assert process.stdout.split() == ["False", "False"]
