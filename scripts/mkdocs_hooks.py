"""Adds the reports of benchmarks/ and the changelog, which lie beside docs/, to MkDocs' site.

In the repository, a page in docs/ links to them as `../benchmarks/..`. In the site they are in the
same folder as the pages, so each such link loses one `../`.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".md", ".toml", ".jsonl"}
# a link to a file beside docs/; the groups are the link without one `../`
OUTSIDE = re.compile(r"(\]\((?:\.\./)*)\.\./((?:benchmarks/|CHANGELOG\.md)[^)]*\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files beside docs/ to the site."""
    outside = [path for path in (ROOT / "benchmarks").rglob("*") if path.suffix in SUFFIXES]
    for path in sorted([*outside, ROOT / "CHANGELOG.md"]):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Corrects a page's links to the files beside docs/."""
    if page.file.src_uri.startswith("benchmarks/"):
        return markdown
    return OUTSIDE.sub(r"\1\2", markdown)
