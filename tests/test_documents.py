"""What the documents say is so: their links lead somewhere, and their tables are those of the code."""

import re
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest

from metalr_hf import MetaLRTrainingArguments

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("notebooks/*.ipynb")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def markdown(path):
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def headings(path):
    """The anchors that GitHub gives to the headings of a document."""
    titles = re.findall(r"^#+ (.+)$", markdown(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_are_there(path):
    for link in LINK.findall(re.sub(r"```.*?```", "", markdown(path), flags=re.DOTALL)):
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target), link


def test_contributing_names_every_folder_and_no_other():
    named = set(re.findall(r"^\| `(\w+)/` \|", markdown(ROOT / "CONTRIBUTING.md"), re.MULTILINE))
    assert named == {path.parent.name for path in (ROOT / "metalr_hf").glob("*/__init__.py")}


def arguments_table():
    """What `MetaLRTrainingArguments` adds to `TrainingArguments`, and the default that it changes."""
    own = MetaLRTrainingArguments.__annotations__
    rows = ["| argument | default | |", "|---|---|---|"]
    for field in fields(MetaLRTrainingArguments):
        if field.name in own:
            default = "" if field.default is None else f"`{field.default}`"
            rows.append(f"| `{field.name}` | {default} | {field.metadata['help']} |")
    return "\n".join(rows)


TABLE = re.compile(r"^\| argument \| default \| \|\n(\|.*\n)*", re.MULTILINE)


def test_readme_lists_the_arguments_as_they_are():
    """`python tests/test_documents.py` writes the table anew."""
    found = TABLE.search(markdown(ROOT / "README.md"))
    assert found
    assert found.group().splitlines() == arguments_table().splitlines()


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(TABLE.sub(lambda _: arguments_table() + "\n", markdown(readme)), encoding="utf-8")
