"""Pages of the site that are files of the project's root, with links that fit the site."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for name, page in PAGES.items():
        text = (root / name).read_text(encoding="utf-8")
        text = re.sub(r"\]\((docs/)?([^)#]+)", lambda found: f"]({PAGES.get(found[2], found[2])}", text)
        files.append(File.generated(config, page, content=text))
    return files
