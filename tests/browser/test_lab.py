"The tutorial on heatmaps in JupyterLab, as somebody works with it: what the page shows is what the kernel knows."

import json
import shutil

import pytest
from conftest import ROOT
from jupyter_client import BlockingKernelClient

from .conftest import CHROMIUM, FLAGS, kernels

TUTORIAL, TARGET = "03_read_a_heatmap.ipynb", "TumourB-FLAIR-ED"
# JupyterLab sends what widgets say to a subshell of the kernel, another thread than the one that is asked here:
# a state counts once its question is answered.
STATE = """
import json

traits = ("target", "sources", "strategy", "weights", "path", "pair", "group")
state = {name: getattr(w, name) for name in traits}
asked = w._answer.get("asked") == [w.target, w.sources, w.strategy, w.weights]
state["answered"] = asked and w.path == (w._answer["paths"] or [[]])[0]
print(json.dumps(state))
"""
BY_LANDMARKS = """
import json

from seqtransfer.landmarks import landmark_paths

tasks = [t for t in pool if t.name in near.names]
print(json.dumps(landmark_paths(near, tasks, w.target)[0].sources))
"""
NOTEBOOK = "window.jupyterapp.shell.currentWidget"
CODE_CELLS = f"{NOTEBOOK}.content.widgets.filter(cell => cell.model.type === 'code')"
HAS_KERNEL = f"window.jupyterapp && {NOTEBOOK} && {NOTEBOOK}.sessionContext?.session?.kernel"
ALL_HAVE_RUN = f"{CODE_CELLS}.every(cell => cell.model.executionCount)"
IS_IDLE = f"{NOTEBOOK}.sessionContext.session.kernel.status === 'idle'"
RUN_ALL = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }"
FAILED = f"""() => {{
  const failed = cell => cell.model.sharedModel.getOutputs().some(output => output.output_type === 'error')
  return {CODE_CELLS}.filter(failed).map(cell => cell.model.sharedModel.getSource())
}}"""
SHOW_WIDGET = f"""() => {{
  const notebook = {NOTEBOOK}.content
  const shows = cell => cell.model.sharedModel.getSource().trim().endsWith('\\nw')
  notebook.activeCellIndex = notebook.widgets.findIndex(shows)
  return notebook.scrollToItem(notebook.activeCellIndex, 'start')
}}"""


class Kernel:
    "The kernel of the notebook that is open, asked from outside the browser."

    def __init__(self, address, runtime):
        (running,) = kernels(address)
        (file,) = runtime.rglob(f"kernel-{running['id']}.json")
        self.client = BlockingKernelClient(connection_file=str(file))
        self.client.load_connection_file()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def __call__(self, code):
        "Runs code in the kernel; returns what it prints."
        said = []

        def hear(message):
            said.append(message["content"].get("text", ""))

        done = self.client.execute_interactive(code, timeout=60, output_hook=hear, store_history=False)
        assert done["content"]["status"] == "ok", done["content"]
        return "".join(said)

    def json(self, code):
        "What code prints last, read as JSON."
        return json.loads(self(code).strip().splitlines()[-1])

    def state(self):
        return self.json(STATE)


@pytest.fixture(scope="module")
def page(playwright, lab, tmp_path_factory):
    "JupyterLab with the tutorial, all of whose cells have run."
    address, folder = lab
    shutil.copy(ROOT / "nbs" / "tutorials" / TUTORIAL, folder)
    profile, size = str(tmp_path_factory.mktemp("profile")), {"width": 1500, "height": 1100}
    launch = playwright.chromium.launch_persistent_context
    context = launch(profile, executable_path=CHROMIUM, args=FLAGS, viewport=size)
    page = context.pages[0]
    page.set_default_timeout(60000)
    page.goto(f"{address}/lab/tree/{TUTORIAL}")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function(HAS_KERNEL)
    page.evaluate(RUN_ALL)
    page.wait_for_function(ALL_HAVE_RUN, timeout=150000)
    page.wait_for_function(IS_IDLE)
    yield page
    context.close()


@pytest.fixture(scope="module")
def kernel(page, lab):
    found = Kernel(lab[0], lab[1].parent)
    yield found
    found.client.stop_channels()


@pytest.fixture
def widget(page):
    "The widget, scrolled into sight."
    page.evaluate(SHOW_WIDGET)
    page.wait_for_selector("[data-name=matrix]")
    return page


def stops(page):
    return page.locator("[data-name=path] .stop").all_inner_texts()


def agrees(page, kernel, **wanted):
    "Waits until the kernel's state is what was asked for; then page and kernel say the same."
    for _ in range(100):
        state, shown = kernel.state(), stops(page)
        as_wanted = {name: state[name] for name in wanted} == wanted
        if state["answered"] and as_wanted and shown == [*state["path"], state["target"]]:
            break
        page.wait_for_timeout(100)
    assert state["answered"]
    assert {name: state[name] for name in wanted} == wanted
    assert shown == [*state["path"], state["target"]]
    assert page.input_value("[data-name=target]") == state["target"]
    assert page.input_value("[data-name=group]") == state["group"]
    scales = kernel.json("print(json.dumps(w._about['scales']))")
    for term, weight in state["weights"].items():
        number = page.locator(f"label:has([data-name=weight-{term}]) output").inner_text()
        assert number == f"{weight * scales[term]:.2f}"
    return state


def test_every_cell_of_the_tutorial_runs(page):
    assert page.evaluate(FAILED) == []


def test_weights_and_target_by_keyboard(widget, kernel):
    before = kernel.state()["weights"]
    widget.focus("[data-name=weight-fg_z]")
    for key in ("Home", *["ArrowRight"] * 7):
        widget.keyboard.press(key)
    widget.select_option("[data-name=target]", TARGET)
    after = agrees(widget, kernel, target=TARGET)["weights"]
    assert after["fg_z"] != before["fg_z"]
    assert after["pca_z"] == before["pca_z"]


def test_a_cell_is_clicked(widget, kernel):
    matrix = widget.locator("[data-name=matrix]")
    box = matrix.bounding_box()
    matrix.click(position={"x": 0.45 * box["width"], "y": 0.2 * box["height"]})
    widget.wait_for_function("document.querySelectorAll('[data-name=detail] img').length === 4")
    clicked = kernel.state()["pair"]
    assert len(clicked) == 2
    for name in clicked:
        assert name in widget.inner_text("[data-name=detail]")
    widget.keyboard.press("ArrowDown")
    widget.keyboard.press("Enter")
    for _ in range(100):
        if kernel.state()["pair"] != clicked:
            break
        widget.wait_for_timeout(100)
    source, target = kernel.state()["pair"]
    assert target == clicked[1]
    assert source not in clicked


def test_python_sets_and_the_page_follows(widget, kernel):
    kernel("w.target, w.sources, w.weights = 'LesionB-FLAIR-WMH', 1, near.weights")
    agrees(widget, kernel, target="LesionB-FLAIR-WMH", sources=1)
    assert widget.input_value("[data-name=sources]") == "1"


def test_what_the_browser_does_not_search_python_answers(widget, kernel):
    widget.fill("[data-name=sources]", "4")
    widget.keyboard.press("Tab")
    assert len(agrees(widget, kernel, sources=4)["path"]) == 4
    widget.fill("[data-name=sources]", "2")
    widget.keyboard.press("Tab")
    widget.select_option("[data-name=strategy]", "landmarks")
    state = agrees(widget, kernel, sources=2, strategy="landmarks")
    assert state["path"] == kernel.json(BY_LANDMARKS)
