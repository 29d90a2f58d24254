"The tutorial on heatmaps in JupyterLab, as somebody works with it: what the page shows is what the kernel knows."
import json
import shutil

import pytest
from conftest import ROOT
from jupyter_client import BlockingKernelClient

from .conftest import CHROMIUM, FLAGS, kernels

TUTORIAL, TARGET = "03_read_a_heatmap.ipynb", "TumourB-FLAIR-ED"
# JupyterLab sends what widgets say to a subshell of the kernel, a thread beside the one that is asked here: a state counts once its question is answered.
STATE = """import json; print(json.dumps({n: getattr(w, n) for n in ('target', 'sources', 'strategy', 'weights', 'path', 'pair', 'group')}
    | {'answered': w._answer.get('asked') == [w.target, w.sources, w.strategy, w.weights] and w.path == (w._answer['paths'] or [[]])[0]}))"""


class Kernel:
    "The kernel of the notebook that is open, asked from outside the browser."
    def __init__(self, address, runtime):
        running, = kernels(address)
        self.client = BlockingKernelClient(connection_file=str(next(runtime.rglob(f"kernel-{running['id']}.json"))))
        self.client.load_connection_file()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def __call__(self, code):
        said = []
        done = self.client.execute_interactive(code, timeout=60, output_hook=lambda m: said.append(m["content"].get("text", "")), store_history=False)
        assert done["content"]["status"] == "ok", done["content"]
        return "".join(said)

    def state(self): return json.loads(self(STATE).strip().splitlines()[-1])


@pytest.fixture(scope="module")
def page(playwright, lab, tmp_path_factory):
    "JupyterLab with the tutorial, all of whose cells have run."
    address, folder = lab
    shutil.copy(ROOT / "nbs" / "tutorials" / TUTORIAL, folder)
    context = playwright.chromium.launch_persistent_context(str(tmp_path_factory.mktemp("profile")), executable_path=CHROMIUM, args=FLAGS, viewport={"width": 1500, "height": 1100})
    page = context.pages[0]
    page.set_default_timeout(60000)
    page.goto(f"{address}/lab/tree/{TUTORIAL}")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function("window.jupyterapp && window.jupyterapp.shell.currentWidget && window.jupyterapp.shell.currentWidget.sessionContext?.session?.kernel")
    page.evaluate("(() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); })()")
    page.wait_for_function("(() => { const cells = window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code'); return cells.every(c => c.model.executionCount); })()", timeout=150000)
    page.wait_for_function("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
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
    page.evaluate("""(() => { const notebook = window.jupyterapp.shell.currentWidget.content, at = notebook.widgets.findIndex(c => c.model.sharedModel.getSource().trim().endsWith('\\nw')); notebook.activeCellIndex = at; return notebook.scrollToItem(at, 'start'); })()""")
    page.wait_for_selector("[data-name=matrix]")
    return page


def stops(page): return page.locator("[data-name=path] .stop").all_inner_texts()


def agrees(page, kernel, **wanted):
    "Waits until the kernel's state is what was asked for; then page and kernel say the same."
    for _ in range(100):
        state, shown = kernel.state(), stops(page)
        if state["answered"] and all(state[k] == v for k, v in wanted.items()) and shown == [*state["path"], state["target"]]: break
        page.wait_for_timeout(100)
    assert state["answered"] and {k: state[k] for k in wanted} == wanted and shown == [*state["path"], state["target"]]
    assert page.input_value("[data-name=target]") == state["target"] and page.input_value("[data-name=group]") == state["group"]
    scales = json.loads(kernel("print(json.dumps(w._about['scales']))").strip().splitlines()[-1])
    for term, w in state["weights"].items(): assert page.locator(f"label:has([data-name=weight-{term}]) output").inner_text() == f"{w * scales[term]:.2f}"
    return state


def test_every_cell_of_the_tutorial_runs(page):
    failed = page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code' && c.model.sharedModel.getOutputs().some(o => o.output_type === 'error')).map(c => c.model.sharedModel.getSource())")
    assert failed == []


def test_weights_and_target_by_keyboard(widget, kernel):
    before = kernel.state()
    widget.focus("[data-name=weight-fg_z]")
    for key in ("Home", *["ArrowRight"] * 7): widget.keyboard.press(key)
    widget.select_option("[data-name=target]", TARGET)
    state = agrees(widget, kernel, target=TARGET)
    assert state["weights"]["fg_z"] != before["weights"]["fg_z"] and state["weights"]["pca_z"] == before["weights"]["pca_z"]


def test_a_cell_is_clicked(widget, kernel):
    box = widget.locator("[data-name=matrix]").bounding_box()
    widget.locator("[data-name=matrix]").click(position={"x": 0.45 * box["width"], "y": 0.2 * box["height"]})
    widget.wait_for_function("document.querySelectorAll('[data-name=detail] img').length === 4")
    clicked = kernel.state()["pair"]
    assert len(clicked) == 2 and all(name in widget.inner_text("[data-name=detail]") for name in clicked)
    widget.keyboard.press("ArrowDown"); widget.keyboard.press("Enter")
    for _ in range(100):
        if kernel.state()["pair"] != clicked: break
        widget.wait_for_timeout(100)
    assert kernel.state()["pair"][1] == clicked[1] != kernel.state()["pair"][0]


def test_python_sets_and_the_page_follows(widget, kernel):
    kernel("w.target, w.sources, w.weights = 'LesionB-FLAIR-WMH', 1, near.weights")
    agrees(widget, kernel, target="LesionB-FLAIR-WMH", sources=1)
    assert widget.input_value("[data-name=sources]") == "1"


def test_what_the_browser_does_not_search_python_answers(widget, kernel):
    widget.fill("[data-name=sources]", "4"); widget.keyboard.press("Tab")
    assert len(agrees(widget, kernel, sources=4)["path"]) == 4
    widget.fill("[data-name=sources]", "2"); widget.keyboard.press("Tab")
    widget.select_option("[data-name=strategy]", "landmarks")
    state = agrees(widget, kernel, sources=2, strategy="landmarks")
    assert state["path"] == json.loads(kernel(f"from seqtransfer.paths import landmark_paths; print(json.dumps(list(landmark_paths(near, [t for t in pool if t.name in near.names], '{state['target']}')[0].sources)))").strip().splitlines()[-1])
