"The notebooks are the source: cleaning and exporting them changes nothing, and they are written as the project writes."

import ast
import importlib
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
from collections import defaultdict
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from fastcore.docments import docments

from seqtransfer.arms import ARMS

BIN = Path(sys.executable).parent
ORDER = [
    *("core", "tasks", "datasets", "protocol", "phantom", "zoo", "validation"),
    *("similarity.image", "similarity.label", "similarity.object", "similarity.signature", "similarity.task"),
    *("affinity", "scores"),
    *("search", "paths", "landmarks"),
    *("networks", "weights", "training", "evaluation", "features", "calibration", "deploy", "verdict"),
    *("arms", "folders", "study", "questions", "plans", "results", "notebooks", "jobs", "plots", "widgets"),
    *("anonymise", "report", "clusters", "executors.here", "executors.notebooks", "executors.dask", "transfer"),
    *("cli", "all"),
]
ENDS = ("transfer", "cli", "all")  # what may import executors
NOTEBOOKS = sorted(p.relative_to(ROOT) for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in str(p))
SCRIPTS = sorted(p.relative_to(ROOT) for folder in ("tests", "nbs/records") for p in (ROOT / folder).rglob("*.py"))


def module_source(module):
    return (ROOT / "seqtransfer" / (module.replace(".", "/") + ".py")).read_text()


def cells(notebook):
    return json.loads((ROOT / notebook).read_text())["cells"]


def code_cells(notebook):
    "The sources of the code cells of a page."
    return ["".join(c["source"]) for c in cells(notebook) if c["cell_type"] == "code"]


# ---------------------------------------------------------------- cleaning and exporting


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of everything from which the package and the README are made."
    folder = tmp_path_factory.mktemp("copy")
    left_out = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_proc", "_docs")
    for name in ("nbs", "seqtransfer"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    for name in ("settings.ini", "setup.py", "Makefile", "README.md", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def contents(folder, *patterns):
    "The bytes of the files below `folder` by relative path."
    files = [p for pattern in patterns for p in sorted(folder.glob(pattern))]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if ".ipynb_checkpoints" not in str(p)}


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
    command = ["make", "-s", "-o", ".venv/.ready", "export", "readme"]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    kinds = "seqtransfer/**/*.py", "seqtransfer/**/*.ipynb", "README.md", "nbs/images/*"
    exported = contents(copy, "seqtransfer/**/*.py")
    subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True, capture_output=True)
    assert differing(exported, contents(copy, "seqtransfer/**/*.py")) == [], "make export does more than nbdev_export"
    assert differing(contents(ROOT, *kinds), contents(copy, *kinds)) == [], "run make export readme"


# ---------------------------------------------------------------- pages


def shows_picture(cell):
    return any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_a_page_opens_with_a_title_and_a_claim_and_holds_no_error(notebook):
    page = cells(notebook)
    title, _, claim = "".join(page[0]["source"]).split("\n")[:3]
    assert title.startswith("# ")
    assert claim.startswith("> ")
    assert not any(o["output_type"] == "error" for c in page for o in c.get("outputs", []))
    for cell in page:
        if shows_picture(cell) and notebook.name != "index.ipynb":
            assert "#| fig-cap:" in "".join(cell["source"])


def wide_lines(source):
    "Lines of over 120 columns; a caption is one line by the rules of Quarto."
    return [x for x in source.splitlines() if len(x) > 120 and not x.startswith("#| fig-cap:")]


def semicolons(source):
    "Lines that hold two statements."
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except tokenize.TokenError:  # a cell with a command of the shell
        return []
    return [t.line for t in tokens if t.type == tokenize.OP and t.string == ";"]


def parsed(source):
    "A cell's tree, empty where it holds commands of the shell."
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.Module([], [])


def is_ellipsis(statement):
    return isinstance(statement, ast.Expr) and getattr(statement.value, "value", None) is ...


def bodies_on_a_head(source):
    "Lines on which a body follows its head, and names given to a lambda."
    found = []
    for node in ast.walk(parsed(source)):
        body = getattr(node, "body", None)
        if isinstance(node, ast.stmt) and isinstance(body, list):
            found += [node.lineno for b in body if b.lineno == node.lineno and not is_ellipsis(b)]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            found.append(node.lineno)
    return found


def joined_promises(source):
    "Asserts that join three or more promises."
    asserts = [n for n in ast.walk(parsed(source)) if isinstance(n, ast.Assert) and isinstance(n.test, ast.BoolOp)]
    return [n.lineno for n in asserts if isinstance(n.test.op, ast.And) and len(n.test.values) > 2]


@pytest.mark.parametrize("file", [*NOTEBOOKS, *SCRIPTS], ids=str)
def test_one_idea_a_line(file):
    sources = code_cells(file) if file.suffix == ".ipynb" else [(ROOT / file).read_text()]
    for source in sources:
        assert wide_lines(source) == []
        assert semicolons(source) == []
        assert bodies_on_a_head(source) == []
        assert joined_promises(source) == []


PLACES = re.compile(r"(?<![\w.])/(?:tmp|home|root|work|Users)/\w")  # of somebody's machine


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_outputs_name_no_place_of_a_machine(notebook):
    outputs = [output for cell in cells(notebook) for output in cell.get("outputs", [])]
    told = [PLACES.findall(json.dumps(without_pictures(output))) for output in outputs]
    assert not any(told), "run make notebooks, or nbs/records/tidy.py"


def without_pictures(output):
    data = {kind: value for kind, value in output.get("data", {}).items() if kind != "image/png"}
    return {**output, "data": data}


LIST_OF_NAMES = re.compile(r"^__all__ = \[.*?\]$", re.DOTALL | re.MULTILINE)  # nbdev's, which wraps it as it likes


def test_the_package_keeps_to_120_columns():
    for file in (ROOT / "seqtransfer").rglob("*.py"):
        if file.name != "_modidx.py":
            assert wide_lines(LIST_OF_NAMES.sub("", file.read_text())) == [], file.name


# ---------------------------------------------------------------- modules


def imported_from(node, here):
    "The module that a `from` names, relative to where it is written."
    up = here[: len(here) - node.level + 1] if node.level else []
    return ".".join([*up, node.module] if node.module else up)


def modules_used(module):
    "The modules of the package that a module imports, anywhere in its code."
    here = ["seqtransfer", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(module_source(module))):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = imported_from(node, here)
        for name in (base, *(f"{base}.{a.name}" for a in node.names)):
            if name.removeprefix("seqtransfer.") in ORDER:
                yield name.removeprefix("seqtransfer.")


@pytest.mark.parametrize("module", ORDER)
def test_data_flow_one_way(module):
    used = set(modules_used(module))
    assert all(ORDER.index(m) < ORDER.index(module) for m in used), used
    if module not in ENDS:
        assert not used & {"cli", "transfer", "widgets"}
    if not module.startswith("executors") and module not in ENDS:
        assert not any(m.startswith("executors") for m in used)


def test_every_module_has_its_place():
    names = {str(p.relative_to(ROOT / "seqtransfer"))[:-3] for p in (ROOT / "seqtransfer").rglob("*.py")}
    modules = {name.replace("/", ".") for name in names if not name.endswith("__init__") and name != "_modidx"}
    assert modules == set(ORDER)


def names_defined(tree):
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not patched(node):
            yield node.name
        if isinstance(node, ast.Assign):
            yield from (n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))


def test_a_name_has_one_home():
    "The commands are called by their names, which functions of the package have too."
    homes = defaultdict(set)
    for module in ORDER:
        if module not in ("cli", "all"):
            for name in names_defined(ast.parse(module_source(module))):
                homes[name].add(module)
    several = {name: modules for name, modules in homes.items() if len(modules) > 1 and name != "__all__"}
    assert several == {}


def compared_with(tree):
    "The texts that anything is compared with, or asked to begin with."
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("startswith"):
            sides = node.args
        else:
            continue
        yield from (side.value for side in sides if isinstance(side, ast.Constant))


@pytest.mark.parametrize("module", [m for m in ORDER if m != "arms"])
def test_arms_are_told_apart_in_their_table_alone(module):
    assert not set(compared_with(ast.parse(module_source(module)))) & set(ARMS)


def returns_something(thing):
    return inspect.signature(thing).return_annotation not in (inspect.Signature.empty, None)


@pytest.mark.parametrize("module", [m for m in ORDER if m not in ("all", "cli")])
def test_every_public_name_is_documented(module):
    m = importlib.import_module(f"seqtransfer.{module}")
    for name in m.__all__:
        thing = inspect.unwrap(getattr(m, name))
        if not callable(thing) or getattr(thing, "__module__", None) != m.__name__:
            continue
        assert thing.__doc__, name
        if inspect.isclass(thing) and not is_dataclass(thing):
            continue
        parameters = inspect.signature(thing).parameters
        rest = {k for k, v in parameters.items() if v.kind is v.VAR_KEYWORD}  # docments does not read their comment
        described = {k: v for k, v in docments(thing).items() if k not in rest}
        free = {"return"} if inspect.isclass(thing) or not returns_something(thing) else set()
        lacking = [k for k, v in described.items() if v is None and k not in free]
        assert not lacking, f"{name}: {lacking}"


def patched(node):
    "Whether a function is a method written on its own."
    return isinstance(node, ast.FunctionDef) and any("patch" in ast.unparse(d) for d in node.decorator_list)


def public_names(tree):
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def methods(node):
    return [f for f in node.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")]


def signatures(module):
    "Public functions and methods of a module's source."
    tree = ast.parse(module_source(module))
    public = set(public_names(tree))
    for node in tree.body:
        if patched(node) and not node.name.startswith("_"):
            yield f"{ast.unparse(node.args.args[0].annotation)}.{node.name}", node
        elif isinstance(node, ast.FunctionDef) and node.name in public:
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and node.name in public:
            yield from ((f"{node.name}.{f.name}", f) for f in methods(node))


def with_defaults(arguments):
    "The parameters that have a default, each with it."
    places = arguments.args[len(arguments.args) - len(arguments.defaults) :]
    return [*zip(places, arguments.defaults), *zip(arguments.kwonlyargs, arguments.kw_defaults)]


@pytest.mark.parametrize("module", [m for m in ORDER if m != "all"])
def test_every_public_function_states_its_types(module):
    for name, function in signatures(module):
        arguments = function.args
        every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
        untyped = [p.arg for p in every if p.annotation is None and p.arg not in ("self", "cls")]
        assert not untyped, f"{name}: {untyped}"
        assert function.returns is not None, f"{name}: what it returns"
        assert ast.unparse(function.returns) not in ("tuple", "list"), f"{name}: of what"
        for parameter, value in with_defaults(arguments):
            optional = isinstance(value, ast.Constant) and value.value is None
            if optional and module != "cli":  # whose options are named types
                kinds = ast.unparse(parameter.annotation)
                assert any(t in kinds for t in ("None", "Optional", "object")), f"{name}: {parameter.arg} may be None"


# ---------------------------------------------------------------- literate pages

CHECKS = ("test_", "raises", "assert_", "refuses", "ExceptionExpected")  # how calls that check are named, in any module


def called(node):
    "The last part of the name of what is called."
    return ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""


def asserts(tree):
    nodes = list(ast.walk(tree))
    return any(isinstance(n, ast.Assert) or called(n).startswith(CHECKS) for n in nodes)


def shows(tree):
    "Whether a cell ends in a value, prints, or draws."
    last = tree.body[-1] if tree.body else None
    ends_in_value = isinstance(last, ast.Expr) and not asserts(ast.Module([last], []))
    return ends_in_value or any(called(n) in ("print", "display", "show") for n in ast.walk(tree))


def defines(tree):
    return any(isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)) for n in tree.body)


def exported_cells(notebook):
    "Each exported cell that defines something, and the cells that follow it up to the next one."
    sources = code_cells(notebook)
    exported = [k for k, source in enumerate(sources) if source.startswith("#| export")]
    for k, end in zip(exported, [*exported[1:], len(sources)]):
        if defines(parsed(sources[k])):
            yield sources[k], [parsed(source) for source in sources[k + 1 : end]]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_an_exported_cell_is_shown_in_one_cell_and_asserted_in_another(notebook):
    lacking = []
    for source, after in exported_cells(notebook):
        shown = {k for k, tree in enumerate(after) if shows(tree)}
        asserted = {k for k, tree in enumerate(after) if asserts(tree)}
        if not shown or not asserted or len(shown | asserted) < 2:
            lacking.append(source)
    assert lacking == []
