"The site up to Quarto: pages are processed as nbdev does it, pandoc reads them without a warning, links and anchors lead somewhere, the sidebar names every page once."
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

# In a process of its own: nbdev runs imports and exported cells of each page, to show the signatures of what they define.
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
    done = subprocess.run([sys.executable, "-c", PROCESS, str(out), *PAGES], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "IN_TEST": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def html(processed):
    "Of each page what pandoc makes of it, and what pandoc says about it."
    def read(name):
        notebook = nbformat.reads((processed / name).read_text(), 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an output that only a program reads cannot be shown
            text, _ = MarkdownExporter().from_notebook_node(notebook)
        done = subprocess.run([pypandoc.get_pandoc_path(), "-f", "markdown", "-t", "html", "--mathjax", "--syntax-highlighting=none", "--standalone", "--metadata", "title=page", "--verbose"], input=text, capture_output=True, text=True)
        return BeautifulSoup(done.stdout, "html.parser"), done.stderr
    return {name: read(name) for name in PAGES}


@pytest.fixture(scope="module")
def addresses(processed):
    "Name of the page by the address that it has on the site."
    def address(name):
        cells = json.loads((processed / name).read_text())["cells"]
        told = re.search(r"output-file: (\S+)", "".join(cells[0]["source"])) if cells and cells[0]["cell_type"] == "raw" else None
        return str(Path(name).with_name(told[1] if told else Path(name).stem + ".html"))
    return {address(name): name for name in PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_pandoc_reads_the_page_without_a_warning(html, name):
    page, said = html[name]
    assert page.find(["h1", "h2", "p"]) and not [line for line in said.splitlines() if "WARNING" in line or "ERROR" in line]


def ids(page): return {t["id"] for t in page.find_all(id=True)}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(html, addresses, name):
    page, here, lost = html[name][0], NBS / name, []
    for tag, key in (("a", "href"), ("img", "src")):
        for link in (t[key] for t in page.find_all(tag) if t.get(key)):
            to, inside = urlparse(link), link.startswith(HOST)
            if to.scheme in ("data", "mailto") or (to.scheme and not inside): continue
            if inside: other = addresses.get(to.path.removeprefix(urlparse(HOST).path).lstrip("/") or "index.html")
            elif not to.path: other = name
            else:
                target = (here.parent / unquote(to.path)).resolve()
                other = str(target.relative_to(NBS)) if target.is_relative_to(NBS) else None
                if other not in html and target.exists() and target.is_relative_to(NBS): continue  # a picture or a record
                if tag == "img" and re.fullmatch(r"output_\d+_\d+\.png", to.path): continue  # nbconvert's name for a picture of the page
            if other not in html or (to.fragment and to.fragment not in ids(html[other][0])): lost.append(link)
    assert not lost


@pytest.mark.parametrize("name", PAGES)
def test_figures_that_are_referred_to_exist(name):
    cells = json.loads((NBS / name).read_text())["cells"]
    source = "\n".join("".join(c["source"]) for c in cells)
    assert set(re.findall(r"@(fig-[\w-]+)", source)) <= set(re.findall(r"#\| label: (fig-[\w-]+)", source))


def listed(contents):
    for entry in contents:
        if isinstance(entry, str): yield entry
        else: yield from listed(entry["contents"])


def test_the_sidebar_names_every_page_once():
    pages = list(listed(yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]))
    assert sorted(pages) == PAGES


def test_the_navigation_names_pages_that_exist():
    site = yaml.safe_load((NBS / "_quarto.yml").read_text())
    names = [e["href"] for e in site["website"]["navbar"]["left"]]
    assert set(names) <= set(PAGES) and all((NBS / f).exists() for f in (site["format"]["html"]["css"], *site["metadata-files"], *site["project"]["resources"]))
    assert yaml.safe_load((ROOT / "_quarto.yml").read_text())["project"]["pre-render"] == "nbdev_docs"
    assert yaml.safe_load((NBS / "nbdev.yml").read_text())["website"]["site-url"] == HOST


def page_of(module): return next(p for p in PAGES if any("".join(c["source"]).startswith(f"#| default_exp {module}") for c in json.loads((NBS / p).read_text())["cells"][:3]))


@pytest.mark.parametrize("module", [m for m in ORDER if m != "all"])
def test_every_public_name_stands_on_its_page_with_its_parameters(html, module):
    page, m = html[page_of(module)][0], importlib.import_module(f"seqtransfer.{module}")
    titles, signatures = {t.get_text().strip() for t in page.find_all(["h2", "h3", "h4"])}, [t.get_text() for t in page.find_all("pre")]
    for name in m.__all__:
        thing = inspect.unwrap(getattr(m, name))
        if not callable(thing) or getattr(thing, "__module__", None) != m.__name__: continue
        assert name in titles, name
        if is_dataclass(thing): assert all(f.name in page.get_text() for f in fields(thing)), name
        elif inspect.isfunction(thing):
            told = next(t for t in signatures if t.startswith(f"def {name}("))
            assert all(re.search(rf"\b{p}\b", told) for p in inspect.signature(thing).parameters), name


def test_the_readme_leads_somewhere():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if urlparse(link).scheme: continue
        assert (ROOT / link).exists(), link


def test_the_citation_is_complete_and_up_to_date():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "authors", "license"} <= said.keys() and said["version"] == SETTINGS["DEFAULT"]["version"] and "2410.06892" in json.dumps(said["references"])


def test_workflows_and_forms_are_yaml():
    for file in (*(ROOT / ".github").rglob("*.yml"), ROOT / "environment.yml"): assert yaml.safe_load(file.read_text()), file
