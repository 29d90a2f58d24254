"""Takes the places of this machine out of the outputs of all pages. `make notebooks` calls it."""

import json
import re
import tempfile
from pathlib import Path

from seqtransfer.core import replacing

ROOT = Path(__file__).parents[2]
PLACES = (
    (re.compile(re.escape(f"{tempfile.gettempdir()}/tmp") + r"\w+"), "WORK"),
    (re.compile(re.escape(str(ROOT)) + r"(?=/(?:seqtransfer|nbs)/)"), "REPOSITORY"),
    (re.compile(r"/[\w./-]*/\.venv/(?:cache|pages)|/[\w./-]*/\.cache/seqtransfer"), "CACHE"),
)


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


def tidy_pages() -> None:
    "Rewrites each page whose outputs name a place of this machine."
    for file in (ROOT / "nbs").rglob("*.ipynb"):
        page = json.loads(file.read_text())
        tidied = {**page, "cells": [without_outputs_places(cell) for cell in page["cells"]]}
        if tidied != page:
            with replacing(file) as part:
                Path(part).write_text(json.dumps(tidied, sort_keys=True, indent=1, ensure_ascii=False) + "\n")


def without_outputs_places(cell: dict) -> dict:
    "A cell whose outputs name no place of this machine."
    return {**cell, "outputs": without_places(cell["outputs"])} if "outputs" in cell else cell


if __name__ == "__main__":
    tidy_pages()
