"The notebooks are the source: cleaning and exporting them changes nothing, and what was made from them is up to date."
import ast
import importlib
import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from fastcore.docments import docments

BIN = Path(sys.executable).parent
ORDER = ["core", "tasks", "datasets", "phantom", "zoo", "similarity.image", "similarity.label", "similarity.object", "similarity.signature", "affinity", "scores", "paths", "networks", "weights", "training", "evaluation",
         "transfer", "features", "calibration", "deploy", "notebooks", "runs", "jobs", "grid", "engine", "plots", "widgets", "cli", "all"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of everything from which the package and the README are made."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "seqtransfer"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_proc", "_docs"))
    for name in ("settings.ini", "setup.py", "Makefile", "README.md", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def contents(folder, *patterns):
    "Text of the files below `folder` by relative path."
    return {str(p.relative_to(folder)): p.read_bytes() for pattern in patterns for p in sorted(folder.glob(pattern)) if ".ipynb_checkpoints" not in str(p)}


def differing(before, after):
    "Names of files that are new, gone or changed."
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


def test_cleaning_leaves_no_difference(copy):
    subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True)
    assert differing(contents(ROOT, "nbs/**/*.ipynb"), contents(copy, "nbs/**/*.ipynb")) == [], "run nbdev_clean"


def test_export_and_readme_leave_no_difference(copy):
    # as `make export readme`, with the environment that runs this test
    (copy / ".venv").mkdir()
    (copy / ".venv" / "bin").symlink_to(BIN)
    (copy / ".venv" / ".ready").touch()
    subprocess.run(["make", "-s", "-o", ".venv/.ready", "export", "readme"], cwd=copy, check=True, capture_output=True)
    kinds = "seqtransfer/**/*.py", "seqtransfer/**/*.ipynb", "README.md", "nbs/images/*"
    assert differing(contents(ROOT, *kinds), contents(copy, *kinds)) == [], "run make export readme"


@pytest.mark.parametrize("notebook", sorted(p.relative_to(ROOT) for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in str(p)), ids=str)
def test_a_page_opens_with_a_title_and_a_claim_and_holds_no_error(notebook):
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    title, _, claim = "".join(cells[0]["source"]).split("\n")[:3]
    assert title.startswith("# ") and claim.startswith("> ")
    assert not any(o["output_type"] == "error" for c in cells for o in c.get("outputs", []))
    for c in cells:
        source = "".join(c["source"])
        if c["cell_type"] == "code" and any("image/png" in o.get("data", {}) for o in c["outputs"]) and notebook.name != "index.ipynb":
            assert "#| fig-cap:" in source, source[:80]


def modules_used(module):
    "The modules of the package that a module imports, anywhere in its code."
    tree = ast.parse((ROOT / "seqtransfer" / (module.replace(".", "/") + ".py")).read_text())
    here = ["seqtransfer", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(here[:len(here) - node.level + 1] + [node.module] if node.level and node.module else here[:len(here) - node.level + 1] if node.level else [node.module])
            for name in (base, *(f"{base}.{a.name}" for a in node.names)):
                if name.removeprefix("seqtransfer.") in ORDER: yield name.removeprefix("seqtransfer.")


@pytest.mark.parametrize("module", ORDER)
def test_data_flow_one_way(module):
    used = set(modules_used(module))
    assert all(ORDER.index(m) < ORDER.index(module) for m in used), used
    if module not in ("cli", "all"): assert not used & {"cli", "engine"}


@pytest.mark.parametrize("module", [m for m in ORDER if m not in ("all", "cli")])
def test_every_public_name_is_documented(module):
    m = importlib.import_module(f"seqtransfer.{module}")
    for name in m.__all__:
        thing = inspect.unwrap(getattr(m, name))
        if not callable(thing) or getattr(thing, "__module__", None) != m.__name__: continue
        assert thing.__doc__, name
        if inspect.isclass(thing) and not is_dataclass(thing): continue
        rest = {k for k, v in inspect.signature(thing).parameters.items() if v.kind is v.VAR_KEYWORD}  # whose comment docments does not read
        described = {k: v for k, v in docments(thing).items() if k not in rest}
        lacking = [k for k, v in described.items() if v is None and not (k == "return" and (inspect.isclass(thing) or inspect.signature(thing).return_annotation in (inspect.Signature.empty, None)))]
        assert not lacking, f"{name}: {lacking}"


def signatures(module):
    "Public functions and methods of a module's source with their parameters and what they return."
    tree = ast.parse((ROOT / "seqtransfer" / (module.replace(".", "/") + ".py")).read_text())
    public = {n for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for n in ast.literal_eval(node.value)}
    for node in tree.body:
        patched = isinstance(node, ast.FunctionDef) and any("patch" in ast.unparse(d) for d in node.decorator_list)
        if patched and not node.name.startswith("_"): yield f"{ast.unparse(node.args.args[0].annotation)}.{node.name}", node
        if patched or not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name not in public: continue
        inside = [node] if isinstance(node, ast.FunctionDef) else [f for f in node.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")]
        for f in inside: yield node.name if f is node else f"{node.name}.{f.name}", f


@pytest.mark.parametrize("module", [m for m in ORDER if m != "all"])
def test_every_public_function_states_its_types(module):
    for name, f in signatures(module):
        a = f.args
        untyped = [p.arg for p in a.posonlyargs + a.args + a.kwonlyargs if p.annotation is None and p.arg not in ("self", "cls")]
        assert not untyped and f.returns is not None, f"{name}: {untyped or 'what it returns'}"
        for p, value in [*zip(a.args[len(a.args) - len(a.defaults):], a.defaults), *zip(a.kwonlyargs, a.kw_defaults)]:
            if isinstance(value, ast.Constant) and value.value is None and module != "cli":  # whose options are named types
                assert any(t in ast.unparse(p.annotation) for t in ("None", "Optional", "object")), f"{name}: {p.arg} may be None"
