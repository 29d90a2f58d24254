"The page that `save_html` writes, opened from a file with the network cut off; and the search of paths in the browser against Python's."
import json

import numpy as np
import pytest

from seqtransfer.affinity import Affinity, affinity
from seqtransfer.core import InputError
from seqtransfer.datasets import read_pool
from seqtransfer.paths import best_paths
from seqtransfer.widgets import AffinityExplorer, as_shown

TARGET, OTHER = "LesionC-FLAIR-WMH", "TumourB-FLAIR-ED"


@pytest.fixture(scope="module")
def near(zoo): return affinity(read_pool(zoo))


@pytest.fixture(scope="module")
def file(near, zoo, tmp_path_factory): return AffinityExplorer(near, read_pool(zoo), target=TARGET).save_html(tmp_path_factory.mktemp("page") / "affinity.html")


def state(page, name): return page.evaluate(f"window.model.get({json.dumps(name)})")


def stops(page): return page.locator("[data-name=path] .stop").all_inner_texts()


def settled(page): page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def expected(near, weights, target, sources): return [*best_paths(as_shown(near).weighted(weights), target, sources)[0].sources, target]


def test_weights_target_and_number_by_keyboard(open_file, file, near):
    page, said = open_file(file)
    assert stops(page) == expected(near, near.weights, TARGET, 2)
    page.focus("[data-name=weight-pca_z]")
    page.keyboard.press("Home")
    page.focus("[data-name=weight-size]")
    for _ in range(30): page.keyboard.press("ArrowRight")
    settled(page)
    weights = state(page, "weights")
    assert weights["pca_z"] == 0 and np.isclose(weights["size"] * near_scale(page, "size"), 1.5)
    assert stops(page) == expected(near, weights, TARGET, 2) and state(page, "path") == stops(page)[:-1]
    page.select_option("[data-name=target]", OTHER)
    for sources in (1, 3):
        page.fill("[data-name=sources]", str(sources))
        page.keyboard.press("Tab")
        settled(page)
        assert stops(page) == expected(near, weights, OTHER, sources) and state(page, "sources") == sources
    rows = page.locator("[data-name=runners-up] button").all_inner_texts()
    assert rows == [" → ".join(p.sources) for p in best_paths(as_shown(near).weighted(weights), OTHER, 3, 6)]
    page.locator("[data-name=runners-up] button").nth(1).click()
    settled(page)
    assert stops(page) == [*rows[1].split(" → "), OTHER]
    assert said == []


def near_scale(page, term): return state(page, "_about")["scales"][term]


def test_a_cell_by_keyboard_and_by_mouse(open_file, file, near):
    page, said = open_file(file)
    page.focus("[data-name=matrix]")
    for key in ("ArrowDown", "ArrowDown", "ArrowLeft"): page.keyboard.press(key)
    told = page.inner_text("[data-name=readout]")
    page.keyboard.press("Enter")
    pair = state(page, "pair")
    assert told.startswith(" → ".join(pair)) and pair[0] != pair[1]
    detail = page.inner_text("[data-name=detail]")
    assert all(name in detail for name in (*pair, *near.terms)) and page.locator("[data-name=detail] img").count() == 4
    i, j = map(near.names.index, pair)
    low, high = near.interval("fg_z")[:, i, j]
    row = next(line for line in page.locator("[data-name=detail] tr").all_inner_texts() if line.startswith("fg_z"))
    shown = [float(x) for x in row.replace("to", " ").split()[1:4]] if "none" not in row else None
    assert shown is None and np.isnan(low) or np.allclose(shown, [near.terms["fg_z"][i, j], low, high], rtol=0.006)
    box = page.locator("[data-name=matrix]").bounding_box()
    page.mouse.click(box["x"] + 220, box["y"] + 300)
    assert state(page, "pair") != pair and len(state(page, "pair")) == 2
    assert said == []


def test_what_needs_python_is_said(open_file, file):
    page, said = open_file(file)
    page.select_option("[data-name=strategy]", "landmarks")
    settled(page)
    assert "needs Python" in page.inner_text("[data-name=said]")
    for name in state(page, "_about")["terms"]:
        page.focus(f"[data-name=weight-{name}]"); page.keyboard.press("Home")
    settled(page)
    assert "No term has a weight" in page.inner_text("[data-name=said]") and said == []


def test_groups_move_rows_and_nothing_else(open_file, file, near):
    page, said = open_file(file)
    before = stops(page)
    for group in state(page, "_about")["groups"]:
        page.select_option("[data-name=group]", group)
        for order in ("name", "distance"):
            page.select_option("[data-name=order]", order)
            settled(page)
            assert stops(page) == before
            page.focus("[data-name=matrix]"); page.keyboard.press("ArrowUp")
            text = page.inner_text("[data-name=readout]")
            if "→" in text:
                source, rest = text.split(" → ")
                target, d = rest.split(": distance ")
                assert np.isclose(float(d), near.distance[near.names.index(source), near.names.index(target)], rtol=0.006)
    assert said == []


LUMINANCE = """name => {
  const parse = c => c.match(/[\\d.]+/g).map(Number), lum = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((s, v, k) => s + v * [0.2126, 0.7152, 0.0722][k], 0);
  const e = document.querySelector(name), ink = lum(parse(getComputedStyle(e).color)), paper = lum(parse(getComputedStyle(document.querySelector('.sq')).backgroundColor));
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(open_file, file, scheme):
    page, said = open_file(file, color_scheme=scheme)
    page.focus("[data-name=matrix]"); page.keyboard.press("ArrowDown"); page.keyboard.press("Enter")
    for name in (".sq h4", ".sq label", ".sq .readout", ".sq .hop", ".sq td", ".sq button[aria-pressed=true]", ".sq .note"): assert page.evaluate(LUMINANCE, name) >= 4.5, name
    assert page.evaluate("document.querySelector('.sq').classList.contains('dark')") == (scheme == "dark") and said == []


def test_everything_is_reached_by_tab_and_has_a_name(open_file, file):
    page, said = open_file(file)
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, seen = page.evaluate("[document.activeElement.dataset.name || document.activeElement.type || '', getComputedStyle(document.activeElement).outlineStyle]")
        if name == "" or name in reached and name != "button": break  # once round
        reached.append(name)
        assert seen != "none", name
    wanted = page.evaluate("[...document.querySelectorAll('select, input, canvas')].map(e => e.dataset.name)")
    assert set(wanted) <= set(reached) and "button" in reached
    unnamed = page.evaluate("[...document.querySelectorAll('select, input, canvas, img')].filter(e => !(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.hasAttribute('alt')).length")
    assert unnamed == 0 and said == []


def test_names_are_text(open_file, tmp_path):
    names = ("</script><img src=x onerror=alert(1)>", "b & c", "d")
    page, said = open_file(AffinityExplorer(Affinity(names, {"x": 1 - np.eye(3)}, {"x": 1.0}), target=names[0]).save_html(tmp_path / "odd.html"))
    assert names[0] in stops(page) and page.locator("img").count() == 0 and said == []


def question(rng, q):
    "A random matrix: small integers, which make ties; tenths, whose sums only nearly do; any numbers. Some hops may not be made."
    n = int(rng.integers(3, 13))
    d = (rng.integers(1, 4, (n, n)).astype(float), rng.integers(0, 30, (n, n)) / 10, rng.random((n, n)))[q % 3]
    if q % 4 == 0: d[rng.random((n, n)) < 0.2] = np.inf
    np.fill_diagonal(d, 0)
    return {"d": d, "n": n, "t": int(rng.integers(n)), "k": int(rng.integers(1, min(4, n))), "top": int(rng.integers(1, 9)), "names": [f"t{i}" for i in rng.permutation(n)]}


def asked(q):
    try: found = best_paths(Affinity(tuple(q["names"]), {"x": q["d"]}, {"x": 1.0}), q["names"][q["t"]], q["k"], q["top"])
    except InputError: return []
    return [([q["names"].index(s) for s in p.sources], p.cost, p.tied) for p in found]


SEARCH = """async ([code, questions]) => {
  const { search } = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  return questions.map(q => search(Float64Array.from(q.d, x => x === null ? Infinity : x), q.n, q.t, q.k, q.top, q.names).map(p => [p.path, p.cost, p.tied])); }"""


def test_the_browser_finds_the_paths_that_python_finds(open_file, file):
    from importlib.resources import files
    rng = np.random.default_rng(0)
    questions = [question(rng, q) for q in range(600)]
    page, said = open_file(file)
    plain = [{**q, "d": [None if np.isinf(x) else float(x) for x in q["d"].ravel()]} for q in questions]
    found = page.evaluate(SEARCH, [(files("seqtransfer") / "static" / "explorer.js").read_text(), plain])
    for q, browser in zip(questions, found):
        python = asked(q)
        assert [p[0] for p in browser] == [p[0] for p in python] and [p[2] for p in browser] == [p[2] for p in python], q
        assert np.allclose([p[1] for p in browser], [p[1] for p in python], rtol=1e-12)
    assert said == []
