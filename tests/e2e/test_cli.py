"""The command line as people meet it: help, results, exit codes, and one clear line for everything that goes wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from earthshine.cli.main import COMMANDS

# ---- help and usage


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_everything(run, name):
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: earthshine {name}")
    assert out.count(f"  earthshine {name} ") + out.count(f"  earthshine {name}\n") == 3, "three worked examples"
    assert "--json" in out or name in ("quickstart", "verify")  # verify's three have it


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name):
    """Every worked example is a command line that the command accepts."""
    import importlib
    import shlex

    from earthshine.cli.arguments import parse

    command = importlib.import_module(f"earthshine.cli.{name}")
    assert len(command.EXAMPLES) == 3
    for _, line in command.EXAMPLES:
        words = shlex.split(line.partition(" >")[0])
        assert words[:2] == ["earthshine", name]
        assert parse(command, name, words[2:])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name):
    """Each field of each command's options has a text below it in the source."""
    import ast
    import importlib
    import inspect

    tree = ast.parse(inspect.getsource(importlib.import_module(f"earthshine.cli.{name}")))
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    assert classes
    for node in (n for c in classes for n in c.body if isinstance(n, ast.AnnAssign)):
        siblings = next(c.body for c in classes if node in c.body)
        after = siblings[siblings.index(node) + 1 :][:1]
        documented = after and isinstance(after[0], ast.Expr) and isinstance(after[0].value, ast.Constant)
        assert documented, f"{name}: {ast.unparse(node.target)} has no text"


def test_overview_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)


def test_no_command_is_a_usage_error(run):
    code, out, err = run()
    assert (code, out) == (2, "")
    assert "usage: earthshine COMMAND" in err
    code, out, err = run("verify")
    assert (code, out) == (2, "")
    assert all(f"\n  {name} " in err for name in ("upcycle", "hf", "checkpoint"))


@pytest.mark.parametrize("width", [60, 100, 200])
def test_help_is_as_wide_as_the_terminal_and_no_wider_than_100(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for command in ([], *([name] for name in COMMANDS), ["verify", "hf"]):
        _, out, _ = run(*command, "--help")
        text, _, _ = out.partition("\nexamples:")  # command lines are not broken
        lines = [line for line in text.splitlines() if not line.startswith("usage: ")]
        assert max(map(len, lines)) <= min(width, 100)
        assert not any(noise in out for noise in ("None", "(default: False)", "(default: )", "(default: '')"))


def test_version(run):
    import earthshine

    assert run("--version") == (0, f"earthshine {earthshine.__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["upcicle"], "there is no command 'upcicle'. Did you mean 'upcycle'?"),
        (["--verison"], "there is no option '--verison'. Did you mean '--version'?"),
        (["show", "lama_tiny"], "recipe or preset 'lama_tiny' is not known. Did you mean 'llama3_tiny'?"),
        (["train", "tinny", "--dry-run"], "recipe 'tinny' is not known, nor is it the path of a .json file."),
        (["train", "tinny", "--dry-run"], "Did you mean 'tiny'?"),
        (["train", "tiny", "optimizer.lrr=1", "--dry-run"], "Did you mean 'lr'?"),
        (["train", "tiny", "num_steps=many", "--dry-run"], "num_steps='many' must be of type int"),
        (["train", "missing.json"], "missing.json is not a readable JSON config: No such file or directory."),
        (["train", "tiny"], "add --data DIR"),
        (["report"], "report needs RUN. See earthshine report --help."),
        (["ls", "recipe"], "Did you mean 'recipes'? See earthshine ls --help."),
        (["ls", "recipes", "presets"], "there is no place for 'presets'. See earthshine ls --help."),
        (["upcycle", "a", "b", "--expert", "4"], "upcycle has no option '--expert'. Did you mean '--experts'?"),
        (["upcycle", "a", "--tpo-k=4"], "upcycle has no option '--tpo-k'. Did you mean '--top-k'?"),
        (["upcycle", "a", "b", "-x"], "there is no option '-x'."),
        (["verify", "upcycled", "a", "b"], "verify has no subcommand 'upcycled'. Did you mean 'upcycle'?"),
        (["verify", "--out", "a"], "verify needs a subcommand before '--out': upcycle, hf, checkpoint. See"),
        (["quickstart", "--steps", "0"], "steps=0 must be at least 1."),
        (["prepare", "a.txt"], "prepare needs --tokenizer, --out. See earthshine prepare --help."),
        (["generate"], "generate needs MODEL, --prompt. See"),
        (["upcycle", "a"], "upcycle needs OUT_DIR. See"),
        (["eval", "a", "--shards", "b", "--seq-len", "few"], "--seq-len: 'few' is not an integer."),
        (["eval", "a", "--shards"], "--shards: expected one argument; "),
        (["export", "a", "b", "--dtype", "float8"], "Did you mean 'float32'?"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_usage_errors_exit_2_and_say_what_was_meant(run, args, said):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("earthshine: ") and err.count("\n") == 1


def test_traceback_only_when_asked(run):
    code, _, err = run("show", "nothing", "--traceback")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("earthshine: recipe or preset 'nothing' is not known.")


def test_a_defect_is_one_line_and_exit_1(run, monkeypatch):
    import earthshine.cli.ls as ls

    def broken(options: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(ls, "run", broken)
    code, _, err = run("ls", "presets")
    assert code == 1
    rest = "This looks like a bug in Earthshine; re-run with --traceback and report it."
    assert err == f"earthshine: KeyError: 'oops'. {rest}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("EarthshineError", 1),
        ("WeightsError", 1),
        ("DiskFullError", 1),
        ("ConfigError", 2),
        ("CheckFailedError", 3),
        ("InterruptedRunError", 75),
    ],
)
def test_errors_carry_their_exit_code(run, monkeypatch, error, code):
    import earthshine.cli.ls as ls
    from earthshine import errors

    def failing(options: object) -> None:
        raise getattr(errors, error)("the reason.")

    monkeypatch.setattr(ls, "run", failing)
    assert run("ls", "presets") == (code, "", "earthshine: the reason.\n")


# ---- looking around


@pytest.mark.parametrize("what", ["recipes", "presets"])
def test_ls(run, what):
    code, out, _ = run("ls", what, "--json")
    names = [row["name"] for row in json.loads(out)]
    assert code == 0
    code, out, _ = run("ls", what)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == names


def test_ls_lists_everything(run):
    code, out, _ = run("ls")
    assert code == 0
    assert "\ntiny_moe  " in out and "\nllama3_8b  " in out
    assert set(json.loads(run("ls", "--json")[1])) == {"recipes", "presets"}


def test_show_prints_what_a_recipe_and_a_preset_change(run):
    _, out, _ = run("show", "tiny_switch")
    assert '#   balance.scope: "none" -> "step"' in out.partition("# changes to tiny_moe:")[2]
    _, out, _ = run("show", "mixtral_8x7b")
    assert "#   vocab_size: 128256 -> 32000" in out.partition("# changes to llama3_8b:")[2]
    assert "changes" not in run("show", "tiny")[1]


def test_show_prints_a_preset_with_its_size(run):
    code, out, _ = run("show", "smollm2_135m_e8t2")
    assert code == 0
    assert "def smollm2_135m_e8t2() -> ModelConfig:" in out
    assert "692,036,928 parameters" in out
    assert "214,279,488 active" in out


def test_a_shown_recipe_is_a_job_file(run, tmp_path):
    _, recipe, _ = run("show", "tiny", "--json")
    (tmp_path / "job.json").write_text(recipe)
    code, plan, _ = run("train", tmp_path / "job.json", "num_steps=3", "--dry-run", "--json", "schedule.warmup_steps=1")
    assert code == 0
    assert json.loads(plan)["job"]["num_steps"] == json.loads(plan)["derived"]["num_steps"] == 3


def test_a_dry_run_prints_the_job_and_what_follows_from_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("train", "tiny_moe", "--data", "somewhere", "--dry-run", "optimizer.lr=0.25")
    assert code == 0
    table, _, changes = out.partition("changes to the recipe tiny_moe")
    assert "active per token" in table and "GFLOP/s (lower bound)" in table
    assert [line.partition(":")[0].strip() for line in changes.splitlines()[1:]] == ["data.sources", "optimizer.lr"]
    assert "0.003 -> 0.25" in changes and '"path": "somewhere"' in changes
    assert list(tmp_path.iterdir()) == []


def test_what_balances_experts_is_set_like_any_field(run):
    switch = ("train", "tiny_moe", "--dry-run", "--json", "balance.loss=switch", "capacity.factor=4")
    code, _, err = run(*switch)
    assert code == 2 and "balance.loss='switch' needs balance.scope" in err
    code, out, err = run(*switch, "balance.scope=step", "recompute=block", "compile=true")
    plan = json.loads(out)
    assert code == 0 and plan["job"]["balance"]["scope"] == "step" and plan["job"]["recompute"] == "block"
    assert plan["derived"]["repeated_forward_flops_per_step"] > 0
    assert "warning: capacity.factor=4 can never drop a token" in err
    code, _, err = run("train", "tiny", "--dry-run", "capacity.factor=1")
    assert code == 2 and "the model is dense, and capacity.factor is for models with experts" in err


def test_doctor(run, tmp_path):
    code, out, _ = run("doctor", "--path", tmp_path, "--json")
    measured = json.loads(out)
    assert code == 0
    assert measured["gemm_flops"]["float32"] > 1e6 and measured["disk"]["write_bytes_per_second"] > 0
    assert measured["attention"]["backend"] and measured["attention"]["reason"]
    assert list(tmp_path.iterdir()) == []
    code, out, _ = run("doctor", "--path", tmp_path)
    assert code == 0
    assert "compute dtype" in out


# ---- as a process


def earthshine(*args: object, env: dict[str, str], **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "earthshine.cli.main", *map(str, args)]
    return subprocess.run(command, text=True, env=env, stderr=subprocess.PIPE, **options)


def test_a_full_disk_for_the_results_is_an_error(earthshine_env):
    with open("/dev/full", "w") as full:
        process = earthshine("ls", "presets", env=earthshine_env, stdout=full)
    assert process.returncode == 1
    assert "No space left on device" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_reader_that_leaves_is_not_an_error(earthshine_env):
    command = f"{sys.executable} -m earthshine.cli.main show llama3_8b | head -c 1 > /dev/null"
    process = subprocess.run(["bash", "-c", command], text=True, env=earthshine_env, capture_output=True)
    assert process.stderr == ""


def test_the_console_script_is_the_same_program(earthshine_env):
    script = Path(sys.executable).with_name("earthshine")
    process = subprocess.run([script, "--version"], text=True, env=earthshine_env, capture_output=True)
    assert (process.returncode, process.stdout.split()[0]) == (0, "earthshine")
