"""MkDocs hook: pages of the site that are files of the repository outside docs/."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {
    "reference/measurements.md": "benchmarks/RESULTS.md",
    "reference/contributing.md": "CONTRIBUTING.md",
    "reference/changelog.md": "CHANGELOG.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for page, source in PAGES.items():
        text = (root / source).read_text()
        text = re.sub(r"\]\(docs/", "](../", text)  # in the repository, links begin at its root
        files.append(File.generated(config, page, content=text))
    return files
