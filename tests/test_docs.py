"""The documentation says what is there: generated pages are current, links lead somewhere, names exist."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest
import settings_page
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dera_peft"
LINK = re.compile(r"\]\(([^)\s]+)\)")
# pages of the repository that people read there; the site's own links are checked by `make docs`
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_page_of_settings_is_current():
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        settings_page.main()
    file = ROOT / "docs" / "reference" / "settings.md"
    assert file.read_text(encoding="utf-8") == text.getvalue(), (
        "run: python tests/settings_page.py > docs/reference/settings.md"
    )


@pytest.mark.parametrize("page", [*PAGES, *(str(file.relative_to(ROOT)) for file in ROOT.glob("docs/**/*.md"))])
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = {target.partition("#")[0] for target in LINK.findall(text) if "://" not in target}
    site_pages = {"contributing.md", "changelog.md"}  # made of the files above
    missing = {target for target in targets - site_pages if not ((ROOT / page).parent / target).exists()}
    assert missing == set()


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entry) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(pages, entry.values() if isinstance(entry, dict) else entry))

    found = {str(file.relative_to(ROOT / "docs")) for file in ROOT.glob("docs/**/*.md")}
    assert pages(config["nav"]) == found | {"contributing.md", "changelog.md"}


# -- docs/architecture.md ----------------------------------------------------------------------------------------------


def test_the_tree_names_every_file_of_the_package():
    (tree,) = re.findall(r"```text\n(.*?)```", ARCHITECTURE, flags=re.DOTALL)
    folders: list[str] = []
    named = set()
    for line in filter(None, tree.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split(" "):
            folders = folders[:depth]
            if name.endswith("/"):
                folders.append(name.rstrip("/"))
            else:
                named.add("/".join([*folders, name]))
    files = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*.py")}
    files = {file for file in files if file == "dera_peft/__init__.py" or not file.endswith("/__init__.py")}
    assert (files - named, named - files) == (set(), set()), "mend the tree in docs/architecture.md"


def test_names_that_stand_with_a_file_are_defined_there():
    pairs = re.findall(r"`([\w/]+\.py): (?:\w+\.)?(\w+)`", ARCHITECTURE)
    assert len(pairs) > 5
    for file, name in pairs:
        nodes = ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
        defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert name in defined, f"{file} has no {name}"


def test_every_name_in_code_is_a_name_of_the_package():
    words = set(re.findall(r"\w+", "\n".join(file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))))
    prose = re.sub(r"```.*?```", "", ARCHITECTURE, flags=re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", prose):
        if re.fullmatch(r"_?[A-Za-z]\w*(\.\w+)*", code) and not code.endswith((".py", ".md", ".html", ".json")):
            assert set(code.split(".")) <= words, code
