"""The search against enumeration: every ordered choice of sources, costed one by one straight from the definition."""
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from seqtransfer.core import InputError
from seqtransfer.paths import best_paths, communities, edges, landmark_paths, landmarks, path_cost, path_table, rank_sources, source_graph
from seqtransfer.tasks import Case, Task


def made(distance, names=None):
    "An affinity of two terms, a third and two thirds of `distance`."
    names = names or [f"t{i:02d}" for i in range(len(distance))]
    return SimpleNamespace(names=tuple(names), distance=distance, contributions=lambda: {"a": distance / 3, "b": distance * 2 / 3})


def definition(d, path, t, lam):
    "Cost and length, transcribed: sum d(v_j, v_j+1) + d(v_m, t) + lam * sum_{j<m} d(v_j, t)."
    length = d[path[-1], t]
    for j in range(len(path) - 1):
        length = length + d[path[j], path[j + 1]]
    return length + lam * sum(d[path[j], t] for j in range(len(path) - 1)), length


@st.composite
def pools(draw, symmetric=None):
    "A small matrix of whole numbers (many exact ties) or of random reals (none, unless symmetric)."
    n = draw(st.integers(4, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    d = rng.integers(0, 4, (n, n)).astype(float) if draw(st.booleans()) else rng.random((n, n))
    if draw(st.booleans()) if symmetric is None else symmetric:
        d = (d + d.T) / 2
    np.fill_diagonal(d, 0)
    return d


def tasks_of(n, seed):
    "`n` tasks in a few domains, modalities and labels."
    rng = np.random.default_rng(seed)
    size = {"x": 3, "y": 11, "z": 40}
    return [Task(f"t{i:02d}", "made", site, modality, label,
                 tuple(Case(f"made/{site}{j}", Path("i"), Path("m"), (1,)) for j in range(size[site])))
            for i in range(n) for site, modality, label in [(rng.choice(list(size)), rng.choice(["T1", "T2"]), rng.choice(["ED", "ET"]))]]


@settings(max_examples=150, deadline=None)
@given(pools(), st.integers(1, 3), st.integers(1, 5), st.sampled_from([0., .5, 1., 2.]))
def test_best_paths_are_those_of_enumeration(d, m, top, lam):
    a, t = made(d), len(d) - 1
    every = {p: definition(d, p, t, lam) for p in permutations(range(t), m)}
    order = sorted(every, key=lambda p: (round(every[p][0], 9), round(every[p][1], 9), p))[:top]
    found = best_paths(a, a.names[t], sources=m, top=top, lam=lam)
    assert [p.sources for p in found] == [tuple(a.names[i] for i in p) for p in order]
    for p, q in zip(found, order):
        assert np.isclose(p.cost, every[q][0]) and np.isclose(p.length, every[q][1])
        assert p.tied == (sum(np.isclose(cost, every[q][0], rtol=1e-12, atol=0) for cost, _ in every.values()) > 1)
        assert len(set(p.sources)) == m and p.target not in p.sources
        assert np.isclose(dict(p.terms)["b"], 2 * dict(p.terms)["a"]) and np.isclose(sum(dict(p.terms).values()), p.cost)


@settings(max_examples=50, deadline=None)
@given(pools(symmetric=False))
def test_the_papers_cost(d):
    for k, i, t in permutations(range(len(d)), 3):
        assert path_cost(d, [k, i], t) == pytest.approx(d[k, t] + d[k, i] + d[i, t])


@settings(max_examples=50, deadline=None)
@given(pools(symmetric=True))
def test_a_symmetric_pair_is_tied_and_ends_with_the_nearer_source(d):
    a, t = made(d), len(d) - 1
    best = best_paths(a, a.names[t], top=1)[0]
    k, i = (a.names.index(s) for s in best.sources)
    assert best.tied and d[i, t] <= d[k, t] + 1e-12


@settings(max_examples=50, deadline=None)
@given(pools(), st.integers(1, 3), st.randoms())
def test_the_order_of_the_pool_does_not_matter(d, m, random):
    a = made(d)
    new = list(range(len(d)))
    random.shuffle(new)
    b = made(d[np.ix_(new, new)], [a.names[i] for i in new])
    assert best_paths(a, "t00", sources=m) == best_paths(b, "t00", sources=m)


@settings(max_examples=50, deadline=None)
@given(pools(), st.integers(1, 3))
def test_more_is_only_longer(d, m):
    "A shorter answer is the beginning of a longer one, and a longer list never changes who is tied."
    a = made(d)
    for top in range(1, 6):
        assert best_paths(a, "t00", sources=m, top=top) == best_paths(a, "t00", sources=m, top=1000)[:top]


def test_rounding_does_not_hide_a_tie():
    d = np.zeros((3, 3))
    d[0, 1] = d[1, 0] = 0.1
    d[0, 2], d[1, 2] = 0.2, 0.3  # 0.1 + 0.2 + 0.3 differs from 0.1 + 0.3 + 0.2 in the last digit
    first, second = best_paths(made(d), "t02")
    assert first.tied and second.tied and first.sources == ("t01", "t00")


def test_constant_distances():
    d = 1. - np.eye(30)
    for m, cost in ((1, 1), (2, 3), (3, 5)):
        found = best_paths(made(d), "t29", sources=m, top=3)
        assert [p.cost for p in found] == [cost] * 3 and all(p.tied for p in found)
        assert found[0].sources == ("t00", "t01", "t02")[:m]


@settings(max_examples=50, deadline=None)
@given(pools(), st.integers(2, 3), st.integers(0, 2**32 - 1))
def test_the_edge_rule_is_kept_among_sources_only(d, m, seed):
    a, tasks = made(d), tasks_of(len(d), seed)
    rule = edges(tasks)
    t = len(d) - 1
    ok = [p for p in permutations(range(t), m)
          if all(tasks[x].modality == tasks[y].modality or tasks[x].label == tasks[y].label for x, y in zip(p, p[1:]))]
    if not ok:
        with pytest.raises(InputError, match="allowed hops"):
            best_paths(a, a.names[t], sources=m, allowed=rule)
        return
    found = best_paths(a, a.names[t], sources=m, top=10_000, allowed=rule)
    assert {p.sources for p in found} == {tuple(a.names[i] for i in p) for p in ok}
    assert found[0].cost == pytest.approx(min(definition(d, p, t, 1)[0] for p in ok))


@settings(max_examples=30, deadline=None)
@given(pools(), st.integers(0, 2**32 - 1), st.randoms())
def test_graph_communities_and_landmarks_ignore_order(d, seed, random):
    a, tasks = made(d), tasks_of(len(d), seed)
    graph = source_graph(a, tasks)
    random.shuffle(tasks)
    nodes, links = list(graph.nodes(data=True)), [(v, u, x) for u, v, x in graph.edges(data=True)]
    random.shuffle(nodes), random.shuffle(links)
    other = nx.Graph()
    other.add_nodes_from(nodes), other.add_edges_from(links)
    assert nx.utils.graphs_equal(graph, source_graph(a, tasks)) and nx.utils.graphs_equal(graph, other)
    for n in range(1, len(d) + 1):
        parts = communities(graph, n)
        assert parts == communities(other, n) and len(parts) >= n
        assert sorted(x for part in parts for x in part) == sorted(graph)
        assert landmarks(graph, parts) == landmarks(other, parts)
        assert all(k in part for k, part in zip(landmarks(graph, parts), parts))


@settings(max_examples=40, deadline=None)
@given(pools(), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_landmarks_never_beat_the_search_everywhere(d, seed, n):
    a, tasks = made(d), tasks_of(len(d), seed)
    try:
        restricted = landmark_paths(a, tasks, "t00", n_communities=min(n, len(d) - 1))
    except InputError as e:
        assert "allowed hops" in str(e)
        return
    assert restricted[0].cost >= best_paths(a, "t00", top=1)[0].cost
    graph = source_graph(a, tasks, "t00")
    parts = communities(graph, min(n, len(d) - 1))
    firsts = landmarks(graph, parts)
    for p in restricted:
        k, i = p.sources
        assert k in firsts and i in parts[firsts.index(k)] and graph.has_edge(k, i)


def test_a_domain_counts_each_patient_once():
    tasks = tasks_of(12, 0)
    graph = source_graph(made(1. - np.eye(12)), tasks)
    assert all(graph.nodes[x.name]["domain_cases"] == {"x": 3, "y": 11, "z": 40}[x.site] for x in tasks)


def test_exclude():
    rng = np.random.default_rng(0)
    a = made(rng.random((6, 6)))
    for m in (1, 2, 3):
        every = best_paths(a, "t00", sources=m, top=1000)
        assert [p.sources for p in best_paths(a, "t00", sources=m, top=1000, exclude=("t03", "t05"))] == [
            p.sources for p in every if not {"t03", "t05"} & set(p.sources)]
    assert best_paths(a, "t00", exclude="t03") == best_paths(a, "t00", exclude=["t03"])


@pytest.mark.parametrize("ask, sentence", [
    (dict(target="t0l"), "no task t0l: choose one of its 5 names"), (dict(target="t00", exclude=["nobody"]), "no task nobody"),
    (dict(target="t00", sources=0), "1, 2 or 3"), (dict(target="t00", sources=4), "1, 2 or 3"),
    (dict(target="t00", sources=3, exclude=["t01", "t02"]), "leaves 2 possible sources"),
    (dict(target="t00", top=0), "at least one")])
def test_mistakes_are_answered_in_one_sentence(ask, sentence):
    with pytest.raises(InputError, match=sentence):
        best_paths(made(1. - np.eye(5)), **ask)


def test_a_missing_number_is_named():
    d = 1. - np.eye(4)
    d[2, 1] = np.nan
    with pytest.raises(InputError, match="from t02 to t01"):
        best_paths(made(d), "t00")
    assert best_paths(made(d), "t00", exclude="t02")
    np.fill_diagonal(d, np.nan)  # nobody's distance to itself is ever asked for
    assert best_paths(made(d), "t00", exclude="t02", sources=2)


def test_the_table_ranks_within_target_and_number():
    a = made(np.random.default_rng(0).random((6, 6)))
    joined = [p for m in (2, 1) for t in ("t00", "t01") for p in best_paths(a, t, sources=m, top=2)]
    table = path_table(joined)
    assert list(table) == ["rank", "path", "sources", "cost", "length", "a", "b", "tied"]
    assert table["rank"].tolist() == [1, 2] * 4 and table["sources"].tolist() == [2] * 4 + [1] * 4
    assert list(path_table([])) == ["rank", "path", "sources", "cost", "length", "tied"]


def test_three_sources_out_of_many():
    "A pool larger than any page's: the best of 120 * 119 * 118 orders, against plain arithmetic on the whole cube."
    rng = np.random.default_rng(3)
    hop, last = rng.random((120, 120)), rng.random(120)
    cube = hop[:, :, None] + hop[None] + last + last[:, None, None] + last[None, :, None]
    u, v, w = np.ix_(*[range(120)] * 3)
    cube[(u == v) | (v == w) | (u == w)] = np.inf
    best = np.argsort(cube, axis=None)[:5]
    choices, _ = rank_sources(hop, last, 3, 5)
    assert np.array_equal(choices, np.stack(np.unravel_index(best, cube.shape), axis=1))
