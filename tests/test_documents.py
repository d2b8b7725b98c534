"""What the documents say is so: their links, imports, commands and arguments lead to what is there."""

import ast
import re
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

import metalr_hf.compare  # noqa: F401 (registers the strategies)
from metalr_hf import MetaLRTrainingArguments
from metalr_hf.compare.strategies import strategies_table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("notebooks/*.md"),
    *ROOT.glob("notebooks/*.ipynb"),
    *ROOT.glob("notebooks/results/*.md"),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
ONE_SITTING = 220
# From the ground up, as tests/test_import.py wants the imports.
FOLDERS = ["layers", "tuning", "models", "plots", "data", "tasks", "hub", "trainer", "compare", "benchmark", "cli"]


def markdown(path):
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def headings(path):
    """The anchors that GitHub gives to the headings of a document."""
    titles = re.findall(r"^#+ (.+)$", markdown(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_are_there(path):
    for link in LINK.findall(re.sub(r"```.*?```", "", markdown(path), flags=re.DOTALL)):
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target), link


def test_the_table_of_strategies_is_that_of_the_code():
    assert strategies_table() in markdown(ROOT / "notebooks" / "results" / "README.md")


def test_contributing_names_every_folder_from_the_ground_up():
    named = re.findall(r"^\| `(\w+)/` \|", markdown(ROOT / "CONTRIBUTING.md"), re.MULTILINE)
    assert named == FOLDERS
    assert set(named) == {path.parent.name for path in (ROOT / "metalr_hf").glob("*/__init__.py")}


def test_contributing_names_the_folders_in_the_row_of_their_folder():
    rows = dict(re.findall(r"^\| `(\w+)/` \|(.*)$", markdown(ROOT / "CONTRIBUTING.md"), re.MULTILINE))
    inner = [path.parent for path in (ROOT / "metalr_hf").glob("*/*/__init__.py")]
    assert inner
    assert not [path for path in inner if f"`{path.name}/`" not in rows[path.parent.name]]


def test_readme_is_read_in_one_sitting():
    assert len(markdown(README).splitlines()) <= ONE_SITTING


def test_readme_has_the_arguments_and_defaults_of_the_code():
    defaults = {field.name: field.default for field in fields(MetaLRTrainingArguments) if field.default is not MISSING}
    table = re.search(r"^\| argument \| default \| \|\n\|[-|]+\n((?:\|.*\n)+)", markdown(README), re.MULTILINE)
    assert table
    for row in table.group(1).splitlines():
        name, default = re.match(r"\| `(\w+)` \| (.+?) \|", row).groups()
        # A default that is decided when the run starts is told in a word.
        assert default == f"`{defaults[name]}`" if defaults[name] is not None else "`" not in default, row


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_in_documents_find_what_they_name(path):
    for block in re.findall(r"```python\n(.*?)```", markdown(path), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("metalr_hf"):
                module = import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_tests_that_are_there(path):
    for name in re.findall(r"\btests/[\w/]+\.py", markdown(path)):
        assert (ROOT / name).is_file(), name
