"""The site up to Quarto: pages are processed as nbdev does it, and pandoc reads them without a warning.

Links and anchors lead somewhere, and the sidebar names every page once.
"""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from configparser import ConfigParser
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlparse

import nbformat
import pypandoc
import pytest
import yaml
from bs4 import BeautifulSoup
from conftest import ROOT
from nbconvert import MarkdownExporter
from test_gates import ORDER

NBS = ROOT / "nbs"
PAGES = sorted(str(p.relative_to(NBS)) for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in str(p))
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini")
HOST = SETTINGS["DEFAULT"]["doc_host"] + SETTINGS["DEFAULT"]["doc_baseurl"]

# In a process of its own: nbdev runs imports and exported cells of each page, to show the signatures in them.
PROCESS = """
import sys
from pathlib import Path
from nbdev.processors import FilterDefaults
from nbdev.serve_drv import exec_nb
out = Path(sys.argv[1])
for name in sys.argv[2:]:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    exec_nb(Path("nbs") / name, out / name, FilterDefaults)
"""


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    "The pages as Quarto would get them."
    out = tmp_path_factory.mktemp("proc")
    command = [sys.executable, "-c", PROCESS, str(out), *PAGES]
    env = os.environ | {"IN_TEST": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


class Page(NamedTuple):
    "A page as pandoc reads it."

    tree: BeautifulSoup
    said: str  # what pandoc says about it


PANDOC = [pypandoc.get_pandoc_path(), *"-f markdown -t html --mathjax --syntax-highlighting=none".split()]
PANDOC += ["--standalone", "--metadata", "title=page", "--verbose"]


def read(file):
    "A processed page as pandoc reads it."
    notebook = nbformat.reads(file.read_text(), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an output that only a program reads cannot be shown
        text, _ = MarkdownExporter().from_notebook_node(notebook)
    done = subprocess.run(PANDOC, input=text, capture_output=True, text=True)
    return Page(BeautifulSoup(done.stdout, "html.parser"), done.stderr)


@pytest.fixture(scope="module")
def html(processed):
    "Of each page what pandoc makes of it, and what pandoc says about it."
    return {name: read(processed / name) for name in PAGES}


def cells_of(file):
    return json.loads(file.read_text())["cells"]


def address(name, processed):
    "Where a page is on the site: by its front matter, or by its own name."
    first = cells_of(processed / name)[0]
    told = re.search(r"output-file: (\S+)", "".join(first["source"])) if first["cell_type"] == "raw" else None
    return str(Path(name).with_name(told[1] if told else Path(name).stem + ".html"))


@pytest.fixture(scope="module")
def addresses(processed):
    "Name of the page by the address that it has on the site."
    return {address(name, processed): name for name in PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_pandoc_reads_the_page_without_a_warning(html, name):
    page, said = html[name]
    assert page.find(["h1", "h2", "p"])
    assert "WARNING" not in said
    assert "ERROR" not in said


def links(page):
    "Addresses of a page's links and pictures, without those to other sites and pictures of its own."
    found = [tag["href"] for tag in page.find_all("a") if tag.get("href")]
    pictures = [tag["src"] for tag in page.find_all("img") if tag.get("src")]
    found += [link for link in pictures if not re.fullmatch(r"output_\d+_\d+\.png", link)]  # nbconvert's names
    return [link for link in found if not urlparse(link).scheme or link.startswith(HOST)]


def leads_to(link, name, addresses):
    "The page that a link on a page leads to; None where there is none."
    path = urlparse(link).path
    if link.startswith(HOST):
        return addresses.get(path.removeprefix(urlparse(HOST).path).lstrip("/") or "index.html")
    if not path:
        return name
    target = ((NBS / name).parent / unquote(path)).resolve()
    other = str(target.relative_to(NBS)) if target.is_relative_to(NBS) else None
    return other if other in addresses.values() else None


def is_a_file(link, name):
    "Whether a link leads to a file of the site that is no page: a picture or a record."
    target = ((NBS / name).parent / unquote(urlparse(link).path)).resolve()
    return not link.startswith(HOST) and target.exists() and target.is_relative_to(NBS)


def ids(page):
    return {tag["id"] for tag in page.find_all(id=True)}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(html, addresses, name):
    lost = []
    for link in links(html[name].tree):
        other, anchor = leads_to(link, name, addresses), urlparse(link).fragment
        if other is None and is_a_file(link, name):
            continue
        if other is None or (anchor and anchor not in ids(html[other].tree)):
            lost.append(link)
    assert not lost


@pytest.mark.parametrize("name", PAGES)
def test_figures_that_are_referred_to_exist(name):
    source = "\n".join("".join(c["source"]) for c in cells_of(NBS / name))
    assert set(re.findall(r"@(fig-[\w-]+)", source)) <= set(re.findall(r"#\| label: (fig-[\w-]+)", source))


def listed(contents):
    "The pages of a sidebar, section after section."
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        else:
            yield from listed(entry["contents"])


def test_the_sidebar_names_every_page_once():
    site = yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]
    assert sorted(listed(site["sidebar"]["contents"])) == PAGES


def test_the_navigation_names_pages_that_exist():
    site = yaml.safe_load((NBS / "_quarto.yml").read_text())
    assert {entry["href"] for entry in site["website"]["navbar"]["left"]} <= set(PAGES)
    for file in (site["format"]["html"]["css"], *site["metadata-files"], *site["project"]["resources"]):
        assert (NBS / file).exists(), file
    assert yaml.safe_load((ROOT / "_quarto.yml").read_text())["project"]["pre-render"] == "nbdev_docs"
    assert yaml.safe_load((NBS / "nbdev.yml").read_text())["website"]["site-url"] == HOST


def page_of(module):
    "The page that a module is exported from."
    head = f"#| default_exp {module}"
    (page,) = [p for p in PAGES if any("".join(c["source"]).strip() == head for c in cells_of(NBS / p)[:3])]
    return page


def own_names(module):
    "What a module defines for everybody: public functions and classes by name."
    things = {name: inspect.unwrap(getattr(module, name)) for name in module.__all__}
    return {
        name: thing
        for name, thing in things.items()
        if callable(thing) and getattr(thing, "__module__", None) == module.__name__
    }


@pytest.mark.parametrize("module", [m for m in ORDER if m != "all"])
def test_every_public_name_is_on_its_page_with_its_parameters(html, module):
    page = html[page_of(module)].tree
    titles = {tag.get_text().strip() for tag in page.find_all(["h2", "h3", "h4"])}
    signatures = [tag.get_text() for tag in page.find_all("pre")]
    for name, thing in own_names(importlib.import_module(f"seqtransfer.{module}")).items():
        assert name in titles, name
        if is_dataclass(thing):
            for field in fields(thing):
                assert field.name in page.get_text(), (name, field.name)
        elif inspect.isfunction(thing):
            told = next(text for text in signatures if text.startswith(f"def {name}("))
            for parameter in inspect.signature(thing).parameters:
                assert re.search(rf"\b{parameter}\b", told), (name, parameter)


def test_the_readme_leads_somewhere():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if urlparse(link).scheme:
            continue
        assert (ROOT / link).exists(), link


def test_the_citation_is_complete_and_up_to_date():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "authors", "license"} <= said.keys()
    assert said["version"] == SETTINGS["DEFAULT"]["version"]
    assert "2410.06892" in json.dumps(said["references"])


def test_workflows_and_forms_are_yaml():
    for file in (*(ROOT / ".github").rglob("*.yml"), ROOT / "environment.yml"):
        assert yaml.safe_load(file.read_text()), file
