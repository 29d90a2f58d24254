"The heatmap without a browser: what its state accepts, what Python answers, what the page without Python holds."

import base64
import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traitlets import TraitError

from seqtransfer.affinity import Affinity, affinity
from seqtransfer.core import InputError
from seqtransfer.datasets import read_pool
from seqtransfer.paths import best_paths
from seqtransfer.widgets import AffinityExplorer, as_shown
from seqtransfer.zoo import write_zoo

TERMS = ("near", "far", "size")


STATE = re.compile(r'<script type="application/json" id="state">(.*?)</script>', re.S)
TITLE = re.compile("<title>(.*?)</title>", re.S)
TRAITS = ("target", "sources", "strategy", "weights", "path", "runners_up", "group", "order", "pair")


def made(n=7, seed=0, names=None):
    "A symmetric affinity of three terms with random distances."
    draws = np.random.default_rng(seed).uniform(0.1, 1, (len(TERMS), n, n))
    terms = {term: (d + d.T) * (1 - np.eye(n)) for term, d in zip(TERMS, draws)}
    return Affinity(tuple(names or (f"task-{i}" for i in range(n))), terms, dict.fromkeys(TERMS, 1.0))


def state_of(page):
    "What a page without Python was given."
    return json.loads(STATE.search(page).group(1))


def best_under(near, weights, target, sources):
    "The best paths by the search itself, as lists of sources."
    found = best_paths(as_shown(near).weighted(weights), target, sources, 6)
    return [list(path.sources) for path in found]


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    "All three data sets of the paper as phantoms: 108 tasks."
    return read_pool(write_zoo(tmp_path_factory.mktemp("paper") / "zoo", "all", size=32, cases=3))


@given(
    weights=st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(any),
    target=st.integers(0, 6),
    sources=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_whatever_is_set_the_path_is_the_one_that_the_search_finds(weights, target, sources, seed):
    near = made(seed=seed)
    w = AffinityExplorer(near)
    w.weights = dict(zip(TERMS, weights))
    w.target = near.names[target]
    w.sources = sources
    assert [w.path, *w.runners_up] == best_under(near, w.weights, w.target, sources)


@pytest.mark.parametrize(
    "trait, value, word",
    [
        ("target", "task-99", "task-"),
        ("target", "", "choose one of its 7"),
        ("weights", {"nearer": 1.0}, "near, far, size"),
        ("weights", {"near": -1.0}, "not negative"),
        ("weights", {"near": np.nan}, "not negative"),
        ("weights", {"near": np.inf}, "not negative"),
        ("weights", {"near": "1"}, "not negative"),
        ("group", "hospital", "none"),
        ("pair", ["task-1", "task-1"], "twice"),
        ("pair", ["task-1", "x"], "no task 'x'"),
        ("path", ["task-99"], "no task"),
        ("sources", 0, "less than 1"),
        ("strategy", "guess", "exact"),
        ("order", "size", "distance"),
    ],
)
def test_a_wrong_state_is_refused_and_nothing_changes(trait, value, word):
    w = AffinityExplorer(made())
    before = {name: getattr(w, name) for name in TRAITS}
    with pytest.raises((InputError, TraitError), match=word):
        setattr(w, trait, value)
    assert {name: getattr(w, name) for name in TRAITS} == before


def test_what_is_wrong_from_the_start_is_said_at_once():
    with pytest.raises(InputError, match="no task 'task-99'"):
        AffinityExplorer(made(), target="task-99")
    with pytest.raises(InputError, match="no term 'nearer'"):
        AffinityExplorer(made(), weights={"nearer": 1})


def test_who_observes_hears_each_path_once():
    near = made()
    w, heard = AffinityExplorer(near), []
    w.observe(lambda change: heard.append(list(change["new"])), "path")
    asked = [{"near": 1.0}, {"far": 1.0}, {"far": 1.0}, {"size": 1.0}]
    best = [best_under(near, weights, w.target, 2)[0] for weights in asked]
    expected = [path for path, before in zip(best, [w.path, *best]) if path != before]
    for weights in asked:
        w.weights = weights
    assert heard == expected
    assert len(heard) > 1


def test_terms_weighted_zero_and_holes_are_left_out():
    near = made()
    far = near.terms["far"]
    holes = np.where(far == far.max(), np.nan, far)
    w = AffinityExplorer(replace(near, terms=near.terms | {"far": holes}), weights={"near": 1.0})
    assert w.weights == {"near": 1.0, "far": 0.0, "size": 0.0}
    assert w.path == AffinityExplorer(replace(near, weights={"near": 1.0})).path


def test_a_path_that_does_not_exist_is_said_and_not_raised():
    w = AffinityExplorer(made(3))
    w.sources = 5
    assert w.path == []
    assert w.runners_up == []
    assert w._answer["said"]
    w.strategy, w.sources = "landmarks", 1
    assert "give the widget the pool" in w._answer["said"]
    w.strategy, w.weights = "exact", {}
    assert w.path == []
    assert "weighs no term" in w._answer["said"]


def test_two_tasks_are_the_least():
    w = AffinityExplorer(made(2))
    assert (w.sources, w.path, w.target) == (1, ["task-0"], "task-1")


PRINTED = st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"))
NAMES = st.text(PRINTED, min_size=1, max_size=30).filter(str.strip)


@given(names=st.lists(NAMES, min_size=3, max_size=3, unique=True))
def test_names_of_tasks_stay_text_in_the_page(names, tmp_path_factory):
    w = AffinityExplorer(made(3, names=names))
    file = w.save_html(tmp_path_factory.mktemp("names") / "page.html", title=names[0])
    page = file.read_text(encoding="utf-8")
    assert page.count("<script") == 3 == page.count("</script>")
    assert state_of(page)["_about"]["names"] == names
    assert html.unescape(TITLE.search(page).group(1)) == names[0]


def test_the_page_of_all_tasks_of_the_paper_is_small_and_whole(paper, tmp_path):
    near = affinity(paper, replicates=20)
    w = AffinityExplorer(near, paper, target="wmh-Utrecht-FLAIR-WMH", group="institution")
    file = w.save_html(tmp_path / "all.html")
    assert len(paper) == 108
    assert file.stat().st_size < 3e6
    page = file.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?https?:|@import|import\s*\(?[\"']https?:", page)
    state = state_of(page)
    about = state["_about"]
    assert about["pictures"].keys() == set(near.names)
    assert all("image" in picture for picture in about["pictures"].values())
    assert set(about["terms"]) == set(near.terms)
    terms = np.frombuffer(base64.b64decode(state["_terms"]), "<f4").reshape(-1, 108, 108)
    for term, d in zip(about["terms"], terms, strict=True):
        assert np.array_equal(d, np.asarray(near.terms[term], np.float32), equal_nan=True)
    assert state["path"] == w.path
    assert state["weights"] == w.weights
    assert state["group"] == "institution"
    assert not about["kernel"]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    w, file = AffinityExplorer(made()), tmp_path / "page.html"
    w.save_html(file)
    before = file.read_bytes()

    def full(self, text, **kwargs):
        self.write_bytes(text.encode()[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises((OSError, InputError), match="space"):
        w.save_html(file)
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["page.html"]


def test_a_file_of_one_task_that_cannot_be_read_hides_nothing_else(tmp_path):
    pool = read_pool(write_zoo(tmp_path / "zoo", size=24, cases=3))
    near = affinity(pool, replicates=0)
    a, b = near.names[0], near.names[-1]
    for case in pool[a].cases:
        case.image.write_bytes(case.image.read_bytes()[:200])
    w = AffinityExplorer(near, pool)
    w.pair = [a, b]
    assert "cannot be read" in w._detail["tasks"][a]["said"]
    assert w._detail["tasks"][b]["image"].startswith("data:image/")
