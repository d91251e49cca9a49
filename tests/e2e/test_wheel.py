"""The wheel, used as an installation would use it: nothing of the checkout is on the path."""

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(repository)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel installed in it, alone."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    process = subprocess.run([*pip, str(wheel)], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return target


def python(site: Path, code: str, *args: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """Run code with the wheel's folder and this environment's packages on the path.

    -S leaves out the `.pth` files, and with them an editable installation's way to the checkout.
    """
    folders = [str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {folders!r}\n{code}", *map(str, args)]
    env = {k: v for k, v in env.items() if k != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


CLI = "from earthshine.cli.main import main\nsys.exit(main(sys.argv[1:]))"


def test_the_wheel_holds_the_package_and_nothing_else(wheel, repository):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {n for n in names if not n.split("/")[0].endswith(".dist-info")}
    source = repository / "src"
    expected = {
        str(p.relative_to(source))
        for p in (source / "earthshine").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert package == expected
    assert "earthshine/py.typed" in package
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)


def test_it_comes_from_the_wheel(site, tmp_path, earthshine_env):
    process = python(site, "import earthshine; print(earthshine.__file__)", cwd=tmp_path, env=earthshine_env)
    assert process.stdout.strip() == str(site / "earthshine" / "__init__.py")


@pytest.mark.parametrize("args", [["--help"], ["upcycle", "--help"], ["ls", "presets"], ["show", "tiny"]], ids=" ".join)
def test_looking_around(site, tmp_path, earthshine_env, args):
    process = python(site, CLI, *args, cwd=tmp_path, env=earthshine_env)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout


def test_the_console_script_starts(site, tmp_path, earthshine_env):
    script = site / "bin" / "earthshine"
    process = subprocess.run(
        [script, "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=earthshine_env | {"PYTHONPATH": str(site)},
    )
    assert (process.returncode, process.stdout.split()[0]) == (0, "earthshine")


DENSE = """
import torch
from earthshine.checkpoint.hf import save_model
from earthshine.model.config import ModelConfig
from earthshine.model.transformer import Transformer, initialize

config = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, max_position_embeddings=128,
)
model = Transformer(config)
initialize(model, seed=0)
save_model(model, config, sys.argv[1])
"""


def test_a_conversion_from_the_wheel(site, tmp_path, earthshine_env):
    process = python(site, DENSE, "dense", cwd=tmp_path, env=earthshine_env)
    assert process.returncode == 0, process.stderr
    arguments = ["upcycle", "dense", "moe", "--experts", 4, "--top-k", 2]
    process = python(site, CLI, *arguments, cwd=tmp_path, env=earthshine_env)
    assert process.returncode == 0, process.stderr
    process = python(site, CLI, "verify", "upcycle", "dense", "moe", "--json", cwd=tmp_path, env=earthshine_env)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["ok"] is True
