"""The page that `save_html` writes, opened from a file with the network cut off.

The search of paths in the browser is held against Python's.
"""

import json
from importlib.resources import files

import numpy as np
import pytest

from seqtransfer.affinity import Affinity, affinity
from seqtransfer.core import InputError
from seqtransfer.datasets import read_pool
from seqtransfer.paths import best_paths
from seqtransfer.widgets import AffinityExplorer, as_shown

TARGET, OTHER = "LesionC-FLAIR-WMH", "TumourB-FLAIR-ED"


@pytest.fixture(scope="module")
def near(zoo):
    return affinity(read_pool(zoo))


@pytest.fixture(scope="module")
def file(near, zoo, tmp_path_factory):
    w = AffinityExplorer(near, read_pool(zoo), target=TARGET)
    return w.save_html(tmp_path_factory.mktemp("page") / "affinity.html")


def state(page, name):
    return page.evaluate(f"window.model.get({json.dumps(name)})")


def stops(page):
    return page.locator("[data-name=path] .stop").all_inner_texts()


def settled(page):
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def expected(near, weights, target, sources):
    return [*best_paths(as_shown(near).weighted(weights), target, sources)[0].sources, target]


def test_weights_target_and_number_by_keyboard(open_file, file, near):
    page, said = open_file(file)
    assert stops(page) == expected(near, near.weights, TARGET, 2)
    page.focus("[data-name=weight-pca_z]")
    page.keyboard.press("Home")
    page.focus("[data-name=weight-size]")
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    settled(page)
    weights, scales = state(page, "weights"), state(page, "_about")["scales"]
    assert weights["pca_z"] == 0
    assert np.isclose(weights["size"] * scales["size"], 1.5)
    assert stops(page) == expected(near, weights, TARGET, 2)
    assert state(page, "path") == stops(page)[:-1]
    page.select_option("[data-name=target]", OTHER)
    for sources in (1, 3):
        page.fill("[data-name=sources]", str(sources))
        page.keyboard.press("Tab")
        settled(page)
        assert stops(page) == expected(near, weights, OTHER, sources)
        assert state(page, "sources") == sources
    buttons = page.locator("[data-name=runners-up] button")
    rows = buttons.all_inner_texts()
    best = best_paths(as_shown(near).weighted(weights), OTHER, 3, 6)
    assert rows == [" → ".join(path.sources) for path in best]
    buttons.nth(1).click()
    settled(page)
    assert stops(page) == [*rows[1].split(" → "), OTHER]
    assert said == []


def numbers_of(row):
    "Value, low and high in a row of the detail; None where there is no interval."
    return None if "none" in row else [float(x) for x in row.replace("to", " ").split()[1:4]]


def test_a_cell_by_keyboard_and_by_mouse(open_file, file, near):
    page, said = open_file(file)
    page.focus("[data-name=matrix]")
    for key in ("ArrowDown", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    told = page.inner_text("[data-name=readout]")
    page.keyboard.press("Enter")
    pair = state(page, "pair")
    assert told.startswith(" → ".join(pair))
    assert pair[0] != pair[1]
    detail = page.inner_text("[data-name=detail]")
    assert all(name in detail for name in (*pair, *near.terms))
    assert page.locator("[data-name=detail] img").count() == 4
    i, j = map(near.names.index, pair)
    low, high = near.interval("fg_z")[:, i, j]
    (row,) = [row for row in page.locator("[data-name=detail] tr").all_inner_texts() if row.startswith("fg_z")]
    shown = numbers_of(row)
    assert shown is None and np.isnan(low) or np.allclose(shown, [near.terms["fg_z"][i, j], low, high], rtol=0.006)
    box = page.locator("[data-name=matrix]").bounding_box()
    page.mouse.click(box["x"] + 220, box["y"] + 300)
    assert state(page, "pair") != pair
    assert len(state(page, "pair")) == 2
    assert said == []


def test_what_needs_python_is_said(open_file, file):
    page, said = open_file(file)
    page.select_option("[data-name=strategy]", "landmarks")
    settled(page)
    assert "needs Python" in page.inner_text("[data-name=said]")
    for name in state(page, "_about")["terms"]:
        page.focus(f"[data-name=weight-{name}]")
        page.keyboard.press("Home")
    settled(page)
    assert "No term has a weight" in page.inner_text("[data-name=said]")
    assert said == []


def distance_of(readout):
    "Source, target and distance as the readout says them; None where no pair is marked."
    if "→" not in readout:
        return None
    source, rest = readout.split(" → ")
    target, distance = rest.split(": distance ")
    return source, target, float(distance)


def test_groups_move_rows_and_nothing_else(open_file, file, near):
    page, said = open_file(file)
    before = stops(page)
    for group in state(page, "_about")["groups"]:
        page.select_option("[data-name=group]", group)
        for order in ("name", "distance"):
            page.select_option("[data-name=order]", order)
            settled(page)
            assert stops(page) == before
            page.focus("[data-name=matrix]")
            page.keyboard.press("ArrowUp")
            marked = distance_of(page.inner_text("[data-name=readout]"))
            if marked:
                source, target, d = marked
                i, j = near.names.index(source), near.names.index(target)
                assert np.isclose(d, near.distance[i, j], rtol=0.006)
    assert said == []


# the contrast of an element's text with the background, as WCAG 2 defines it
CONTRAST = """name => {
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
  const luminance = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(v => linear(Number(v) / 255))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const ink = luminance(getComputedStyle(document.querySelector(name)).color)
  const paper = luminance(getComputedStyle(document.querySelector('.sq')).backgroundColor)
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)
}"""
TEXTS = (".sq h4", ".sq label", ".sq .readout", ".sq .hop", ".sq td", ".sq button[aria-pressed=true]", ".sq .note")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(open_file, file, scheme):
    page, said = open_file(file, color_scheme=scheme)
    page.focus("[data-name=matrix]")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    for name in TEXTS:
        assert page.evaluate(CONTRAST, name) >= 4.5, name
    assert page.evaluate("document.querySelector('.sq').classList.contains('dark')") == (scheme == "dark")
    assert said == []


FOCUSED = """() => {
  const element = document.activeElement
  return [element.dataset.name || element.type || '', getComputedStyle(element).outlineStyle]
}"""
CONTROLS = "[...document.querySelectorAll('select, input, canvas')].map(e => e.dataset.name)"
UNNAMED = """() => {
  const named = e => e.labels?.length || e.getAttribute('aria-label') || e.hasAttribute('alt')
  return [...document.querySelectorAll('select, input, canvas, img')].filter(e => !named(e)).length
}"""


def test_everything_is_reached_by_tab_and_has_a_name(open_file, file):
    page, said = open_file(file)
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(FOCUSED)
        if name == "" or name in reached and name != "button":
            break  # once round
        reached.append(name)
        assert outline != "none", name
    assert set(page.evaluate(CONTROLS)) <= set(reached)
    assert "button" in reached
    assert page.evaluate(UNNAMED) == 0
    assert said == []


def test_names_are_text(open_file, tmp_path):
    names = ("</script><img src=x onerror=alert(1)>", "b & c", "d")
    odd = Affinity(names, {"x": 1 - np.eye(3)}, {"x": 1.0})
    page, said = open_file(AffinityExplorer(odd, target=names[0]).save_html(tmp_path / "odd.html"))
    assert names[0] in stops(page)
    assert page.locator("img").count() == 0
    assert said == []


def question(rng, q):
    """A random matrix: small integers, which make ties; tenths, whose sums only nearly do; any numbers. Some hops may
    not be made."""
    n = int(rng.integers(3, 13))
    integers = rng.integers(1, 4, (n, n)).astype(float)
    tenths = rng.integers(0, 30, (n, n)) / 10
    d = (integers, tenths, rng.random((n, n)))[q % 3]
    if q % 4 == 0:
        d[rng.random((n, n)) < 0.2] = np.inf
    np.fill_diagonal(d, 0)
    return {
        "d": d,
        "n": n,
        "t": int(rng.integers(n)),
        "k": int(rng.integers(1, min(4, n))),
        "top": int(rng.integers(1, 9)),
        "names": [f"t{i}" for i in rng.permutation(n)],
    }


def answered(q):
    "What Python answers to a question: places of the sources, cost, and whether another path is as good."
    names = q["names"]
    near = Affinity(tuple(names), {"x": q["d"]}, {"x": 1.0})
    try:
        found = best_paths(near, names[q["t"]], q["k"], q["top"])
    except InputError:
        return []
    return [([names.index(s) for s in path.sources], path.cost, path.tied) for path in found]


def as_json(q):
    "A question in which None means infinite."
    return {**q, "d": [None if np.isinf(x) else float(x) for x in q["d"].ravel()]}


SEARCH = """async ([code, questions]) => {
  const { search } = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })))
  const answer = q => {
    const d = Float64Array.from(q.d, x => x === null ? Infinity : x)
    return search(d, q.n, q.t, q.k, q.top, q.names).map(p => [p.path, p.cost, p.tied])
  }
  return questions.map(answer)
}"""


def test_the_browser_finds_the_paths_that_python_finds(open_file, file):
    rng = np.random.default_rng(0)
    questions = [question(rng, q) for q in range(600)]
    page, said = open_file(file)
    code = (files("seqtransfer") / "static" / "explorer.js").read_text()
    found = page.evaluate(SEARCH, [code, [as_json(q) for q in questions]])
    for q, browser in zip(questions, found, strict=True):
        python = answered(q)
        assert [path for path, _, _ in browser] == [path for path, _, _ in python], q
        assert [tied for _, _, tied in browser] == [tied for _, _, tied in python], q
        assert np.allclose([cost for _, cost, _ in browser], [cost for _, cost, _ in python], rtol=1e-12)
    assert said == []
