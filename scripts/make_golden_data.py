#!/usr/bin/env python3
"""Writes tests/golden/data/*: records in every format, and what other programs read from them.

    "$(scripts/python_env data scripts/data-requirements.txt)" scripts/make_golden_data.py [DIR]

The files `pairs.*` hold the same records with a `prompt` and a `completion`, as CSV and TSV by
Python's `csv`, as a JSON array, and as Parquet by `pyarrow` with each compression of the Hub's data
sets, in several row groups and pages, with and without dictionaries. `quoted.csv` is written by hand,
with what `csv` writes in no file. `messages.parquet` and `conversations.parquet` hold lists of
structs. `expected.json` has what `csv`, `json` and `pyarrow` read from each file, as an index into
`contents`, and their versions.
The same versions write the same bytes.
"""

import csv
import json
import platform
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

ROOT = Path(__file__).resolve().parent.parent

PAIRS = [
    ("What is 2 + 2?", "4"),
    ("A comma, a tab\tand a \"quote\"", "\"\"\"three\"\"\""),
    ("Two\nlines", "and\r\nthree\n\nmore"),
    ("Würde, 人 and 😀", " a space in front and behind "),
    ("It's 'single'", ";semicolons;"),
    ("ends with a quote\"", "\"begins with one"),
    ("x" * 300, "y" * 300),
    ("=1+1", "-"),
]
# another id in each row, so that pages and row groups differ
PAIRS += [(f"Question {i}?", f"Answer {i * i}.") for i in range(40)]

QUOTED = (
    "\ufeffprompt,\"completion\",note\r\n"
    "\r\n"
    "plain \"inner\" quotes,\"quoted\",\r\n"
    "\"\"\"all\"\" \",\"x\ny\",\"a,b\"\n"
    "no note,last,\n"
    "\"\",\"empty prompt\",\"\"\n"
    "no line end,here,z"
)

MESSAGES = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"},
     {"role": "assistant", "content": "Hello."}],
    [{"role": "user", "content": "Naïve?\n"}, {"role": "assistant", "content": "Yes: 人."}],
]
CONVERSATIONS = [
    [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"},
     {"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"}],
    [{"from": "human", "value": "Three?"}, {"from": "gpt", "value": "3"}],
]


def read_table(path, delimiter):
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    return [dict(zip(rows[0], row)) for row in rows[1:]]


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests/golden/data"
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for suffix, delimiter in [("csv", ","), ("tsv", "\t")]:
        path = folder / f"pairs.{suffix}"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["id", "prompt", "completion"])
            writer.writerows([i, *pair] for i, pair in enumerate(PAIRS))
        expected[path.name] = read_table(path, delimiter)
    (folder / "quoted.csv").write_bytes(QUOTED.encode())
    expected["quoted.csv"] = read_table(folder / "quoted.csv", ",")

    records = [{"id": i, "prompt": p, "completion": c} for i, (p, c) in enumerate(PAIRS)]
    for name, indent in [("pairs.json", 1), ("one_line.json", None)]:
        text = json.dumps(records, indent=indent, ensure_ascii=indent is None)
        (folder / name).write_text(text, encoding="utf-8")
        expected[name] = json.loads((folder / name).read_text(encoding="utf-8"))

    table = pyarrow.Table.from_pylist(records)
    large = table.schema.set(1, pyarrow.field("prompt", pyarrow.large_string()))
    for name, options in [
        ("none", {"compression": "none", "use_dictionary": False, "row_group_size": 7}),
        ("snappy", {"compression": "snappy", "row_group_size": 1000, "data_page_size": 64}),
        ("zstd", {"compression": "zstd", "data_page_version": "2.0", "row_group_size": 30}),
        ("gzip", {"compression": "gzip", "column_encoding": {"completion": "DELTA_BYTE_ARRAY"},
                  "use_dictionary": False}),
    ]:
        path = folder / f"pairs.{name}.parquet"
        pyarrow.parquet.write_table(table.cast(large) if name == "zstd" else table, path, **options)
        expected[path.name] = pyarrow.parquet.read_table(path).to_pylist()
    for name, lists in [("messages", MESSAGES), ("conversations", CONVERSATIONS)]:
        path = folder / f"{name}.parquet"
        # as data sets of the Hub have them: a struct has the fields of all messages
        table = pyarrow.Table.from_pylist([{"id": i, name: of} for i, of in enumerate(lists)])
        pyarrow.parquet.write_table(table, path, compression="snappy")
        expected[path.name] = pyarrow.parquet.read_table(path).to_pylist()

    # most files hold the same
    contents, files = [], {}
    for name, rows in expected.items():
        key = next(iter(set(rows[0]) & {"messages", "conversations"}), None)
        content = [row[key] if key else [row["prompt"], row["completion"]] for row in rows]
        if content not in contents:
            contents.append(content)
        files[name] = contents.index(content)
    versions = {"python": platform.python_version(), "pyarrow": pyarrow.__version__}
    result = {"versions": versions, "files": files, "contents": contents}
    text = json.dumps(result, ensure_ascii=False)
    (folder / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
