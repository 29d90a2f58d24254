"""What nbdev and Jupyter leave untidy: lists of names wider than 120 columns, and places of this machine in outputs.

`make export` calls it for the package and `make notebooks` for the pages too. Usage: tidy.py package | pages"""

import json
import re
import sys
from pathlib import Path
from textwrap import fill

ROOT = Path(__file__).parents[2]
NAMES = re.compile(r"^__all__ = \[(.*?)\]$", re.DOTALL | re.MULTILINE)
PLACES = (
    (re.compile(r"/tmp/tmp\w+"), "WORK"),  # folders of `tempfile`
    (re.compile(r"/[\w./-]*/\.venv/(?:cache|pages)|/[\w./-]*/\.cache/seqtransfer"), "CACHE"),
)


def rewrapped(names: re.Match) -> str:
    "A list of names in lines of at most 120 columns."
    words = " ".join(names[1].split())
    return fill(f"__all__ = [{words}]", 120, subsequent_indent=" " * 11, break_long_words=False)


def without_places(value: object) -> object:
    "An output with words in the place of folders of this machine, at any depth."
    if isinstance(value, str):
        for place, word in PLACES:
            value = place.sub(word, value)
        return value
    if isinstance(value, list):
        return [without_places(part) for part in value]
    if isinstance(value, dict):
        return {key: part if key == "image/png" else without_places(part) for key, part in value.items()}
    return value


def tidy_package() -> None:
    "Wraps the lists of names of the package's modules."
    for file in (ROOT / "seqtransfer").rglob("*.py"):
        source = file.read_text()
        tidied = NAMES.sub(rewrapped, source)
        if tidied != source:
            file.write_text(tidied)


def tidy_pages() -> None:
    "Takes the places of this machine out of the outputs of all pages."
    for file in (ROOT / "nbs").rglob("*.ipynb"):
        page = json.loads(file.read_text())
        tidied = {**page, "cells": [without_outputs_places(cell) for cell in page["cells"]]}
        if tidied != page:
            file.write_text(json.dumps(tidied, sort_keys=True, indent=1, ensure_ascii=False) + "\n")


def without_outputs_places(cell: dict) -> dict:
    "A cell whose outputs name no place of this machine."
    return {**cell, "outputs": without_places(cell["outputs"])} if "outputs" in cell else cell


if __name__ == "__main__":
    {"package": tidy_package, "pages": tidy_pages}[sys.argv[1]]()
