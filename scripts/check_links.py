#!/usr/bin/env python3
"""Checks every relative link and anchor in the pages at the top, in docs/ and in benchmarks/.

    scripts/check_links.py

A link must lead to a file or folder of the repository, and an anchor to a heading of its page, by
GitHub's rule for anchors. MkDocs checks the site's anchors by its own rule. Links in code are
ignored, and so are links to other sites: the script does not use the network.
"""

import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CHANGELOG.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/**/*.md", "benchmarks/*.md"]
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
# [text](target "title") and [name]: target
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)
ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:|^//", re.IGNORECASE)


def blanked(pattern: re.Pattern[str], text: str) -> str:
    """The text without the pattern's matches. Their line breaks stay, to keep the line numbers."""
    return pattern.sub(lambda match: "\n" * match.group().count("\n"), text)


def links(text: str) -> list[tuple[int, str]]:
    """The targets of a page's links, with their lines."""
    text = blanked(CODE, blanked(COMMENT, blanked(FENCE, text)))
    found = []
    for match in LINK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append((line, match.group(1) or match.group(2)))
    return found


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives a page's headings."""
    seen: dict[str, int] = {}
    names = set()
    for heading in HEADING.findall(blanked(FENCE, page.read_text())):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        count = seen.get(name, 0)
        seen[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return frozenset(names)


def fault(page: Path, target: str) -> str | None:
    """What is wrong with a link, or None."""
    if ELSEWHERE.match(target):
        return None
    path, _, anchor = target.partition("#")
    if path.startswith("/"):
        return "is absolute"
    linked = (page.parent / path).resolve() if path else page
    if not linked.is_relative_to(ROOT):
        return "leads out of the repository"
    if not linked.exists():
        return "leads to nothing"
    if anchor and linked.suffix == ".md" and anchor not in anchors(linked):
        return f"names no heading of {linked.relative_to(ROOT)}"
    return None


def main() -> None:
    """Checks all pages, and fails with all faults."""
    pages = sorted({page for pattern in PAGES for page in ROOT.glob(pattern)})
    faults, count = [], 0
    for page in pages:
        for line, target in links(page.read_text()):
            count += 1
            if what := fault(page, target):
                faults.append(f"{page.relative_to(ROOT)}:{line}: `{target}` {what}")
    if faults:
        sys.exit("\n".join(faults))
    print(f"{count} links of {len(pages)} pages lead somewhere")


if __name__ == "__main__":
    main()
