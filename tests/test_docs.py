"""README and docs stay true: links, paths, commands and snippets in them, and the site that is built from them."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from torch import nn

import earthshine
from earthshine import run_folder

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
SITE_PAGES = sorted(DOCS.glob("*.md"))
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *SITE_PAGES]
MAX_README_WORDS = 1000
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    return _FENCE.sub("", text_of(page))


@cache
def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_are_kept_where_the_report_reads_them():
    shown = {run_folder.HELDOUT_BEFORE, run_folder.HELDOUT_AFTER, run_folder.SAMPLES_BEFORE, run_folder.SAMPLES_AFTER}
    for page in PAGES:
        for name in re.findall(r"(?:runs/\w+|RUN)/eval/([\w-]+\.json)", text_of(page)):
            assert name in shown or name.startswith("verify"), f"{page.name}: the report does not read eval/{name}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, and of the objects that mkdocstrings puts there."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    slugs = {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
    return slugs | set(re.findall(r"^::: ([\w.]+)$", text_of(page), re.MULTILINE))


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}, a heading that is not there"
        assert page.parent != DOCS or file.is_relative_to(DOCS), f"{target} is not a part of the site"


@every_page
def test_paths_exist(page):
    """A file that a page names in code marks is there, from the root of the repository or of the package."""
    roots = (REPOSITORY, REPOSITORY / "src" / "earthshine", REPOSITORY / "examples", REPOSITORY / "docs")
    for path in re.findall(r"`([\w./-]+\.(?:py|md|toml|yml))`", prose(page)):
        if "NAME" in path or path.startswith(("vllm/", "python/sglang", "models/auto/")) or path == "report.md":
            continue
        assert any((root / path).exists() for root in roots), f"{page.name} names {path}, which is not there"


@every_page
def test_commands_and_options_exist(page):
    cli_page = tool("cli_page")
    from earthshine.cli.main import COMMANDS

    for line in re.findall(r"^earthshine ([^\n#]+)", "\n".join(_FENCE.findall(text_of(page))), re.MULTILINE):
        words = line.split()
        if page.name == "cli.md" or words[0].startswith("-") or words[0].isupper():
            continue
        assert words[0] in COMMANDS, f"{page.name}: earthshine {line}"
        command = words[:2] if words[0] == "verify" else words[:1]
        known = cli_page.help_text(*command)
        for option in (word for word in words if word.startswith("--")):
            assert option in known, f"{page.name}: `earthshine {line}` has no option {option}"


def test_the_page_of_commands_is_current():
    cli_page = tool("cli_page")
    assert text_of(cli_page.PAGE) == cli_page.page(), "the help has changed: python tools/cli_page.py"


def test_the_steps_to_a_new_family_name_what_the_code_has():
    code = "".join(p.read_text(encoding="utf-8") for top in ("src", "tests") for p in (REPOSITORY / top).rglob("*.py"))
    names = set(re.findall(r"`(\w{5,})(?:\(\))?`", prose(DOCS / "add-a-model.md")))
    assert len(names) > 15
    assert {name for name in names if not re.search(rf"\b{name}\b", code)} == set()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_picture_of_the_floors_is_what_the_imports_obey(page):
    contracts = tomllib.loads(text_of(REPOSITORY / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    floors = [set(re.findall(r"\w+", layer)) for layer in contracts[0]["layers"]]
    (picture,) = (block for block in _FENCE.findall(text_of(REPOSITORY / page)) if block.startswith("cli "))
    lines = [line for line in picture.splitlines() if not line.startswith(" ")]
    assert len(lines) == len(floors)
    for line, floor in zip(lines, floors, strict=True):
        assert set(line.split()[: len(floor)]) == floor


def test_readme_is_short():
    assert len(text_of(REPOSITORY / "README.md").split()) <= MAX_README_WORDS


def test_readme_snippet_trains():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.lm_head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.lm_head(self.up(self.embed(tokens)))

    (snippet,) = re.findall(r"^```python\n(.*?)^```$", text_of(REPOSITORY / "README.md"), re.DOTALL | re.MULTILINE)
    torch.manual_seed(0)
    model = Net()
    before = model.up.weight.detach().clone()
    tokens = torch.randint(16, (2, 5))
    exec(compile(snippet, "README.md", "exec"), {"model": model, "batches": [(tokens[:, :-1], tokens[:, 1:])]})
    assert not torch.equal(model.up.weight, before)
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 12


def test_badges_and_citation_say_what_the_package_says():
    project = tomllib.loads(text_of(REPOSITORY / "pyproject.toml"))["project"]
    versions = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: \d\.\d+$", c)]
    assert text_of(DOCS / "assets" / "badge-python.svg").count(" | ".join(versions)) == 3
    assert text_of(DOCS / "assets" / "badge-license.svg").count(project["license"]) == 3
    citation = yaml.safe_load(text_of(REPOSITORY / "CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (earthshine.__version__, project["license"])
    readme = text_of(REPOSITORY / "README.md")
    for paper in citation["references"]:
        assert paper["identifiers"][0]["value"] in readme


def test_the_site_has_every_page_and_only_public_names():
    nav = yaml.safe_load(text_of(REPOSITORY / "mkdocs.yml"))["nav"]
    leaves = re.findall(r"[\w-]+\.md", str(nav))
    assert sorted(leaves) == [page.name for page in SITE_PAGES], "mkdocs.yml's nav is not what docs/ holds"
    shown = re.findall(r"^::: earthshine\.(\w+)", text_of(DOCS / "api.md"), re.MULTILINE)
    assert set(earthshine.__all__) <= set(shown)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: pip install 'earthshine[docs]'")
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    loads = re.compile(r"<(?:script|img|iframe|source)[^>]+src=\"?(?:https?:)?//|<link[^>]+href=\"?(?:https?:)?//")
    for page in (tmp_path / "site").rglob("*.html"):
        assert not loads.findall(text_of(page)), page.name
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", text_of(sheet)), sheet.name
