#!/usr/bin/env python3
"""Prints the licences of the crates that are part of the binary, each with its text.

    scripts/crate_licences.py    needs cargo, and the crates of Cargo.lock
"""

import json
import subprocess
from pathlib import Path

TARGET = "x86_64-unknown-linux-gnu"
NAMES = ("licen", "copying", "copyright", "notice", "unlicense")


def packages():
    """The packages that the binary contains, without those that only its build or tests use."""
    command = ["cargo", "metadata", "--locked", "--format-version=1", f"--filter-platform={TARGET}"]
    metadata = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    root = metadata["resolve"]["root"]
    found, open_ids = set(), [root]
    while open_ids:
        for dependency in nodes[open_ids.pop()]["deps"]:
            is_part = any(kind["kind"] is None for kind in dependency["dep_kinds"])
            if is_part and dependency["pkg"] not in found:
                found.add(dependency["pkg"])
                open_ids.append(dependency["pkg"])
    chosen = [package for package in metadata["packages"] if package["id"] in found]
    return sorted(chosen, key=lambda package: (package["name"], package["version"]))


def texts(package):
    """The texts of a package's licence files."""
    folder = Path(package["manifest_path"]).parent
    files = [file for file in folder.iterdir() if file.name.lower().startswith(NAMES)]
    return [file.read_text(errors="replace").strip() for file in sorted(files) if file.is_file()]


def main():
    print("The dylora binary contains these crates. The text of a licence stands below once, after")
    print("the names of all crates that have it.\n")
    crates_of = {}
    for package in packages():
        name = f"{package['name']} {package['version']}"
        print(f"{name}: {package['license'] or 'see below'}")
        for text in texts(package):
            crates_of.setdefault(text, []).append(name)
    for text, names in crates_of.items():
        print(f"\n{'-' * 80}\n{', '.join(names)}\n\n{text}")


if __name__ == "__main__":
    main()
