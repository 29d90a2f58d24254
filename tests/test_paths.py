"""The search against enumeration: every ordered choice of sources, costed one by one in exact arithmetic, straight from the definition."""
import tracemalloc
from collections import Counter
from dataclasses import replace
from decimal import Context, Decimal
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from seqtransfer.affinity import Affinity
from seqtransfer.core import InputError
from seqtransfer.paths import (NUMBER_RULES, TransferPath, best_paths, busiest, communities, edges, explain, hop_table, landmark_communities, landmark_paths, landmarks,
                               path_cost, path_length, path_table, rank_sources, recommend, side_by_side, source_graph, steps_to_train, strained)
from seqtransfer.tasks import Case, Task

LAMS = st.sampled_from([0., .5, 1., 2.])


def made(distance, names=None):
    "An affinity of two terms, a third and two thirds of `distance`."
    names = names or [f"t{i:02d}" for i in range(len(distance))]
    return Affinity(tuple(names), {"a": distance / 3, "b": distance * 2 / 3}, {"a": 1., "b": 1.})


def definition(d, path, t, lam):
    "Cost and length, transcribed: sum d(v_j, v_j+1) + d(v_m, t) + lam * sum_{j<m} d(v_j, t). None where a summand is infinite."
    hops = [d[a, b] for a, b in zip(path, (*path[1:], t))]
    early = [d[v, t] for v in path[:-1]] if lam else []
    if not np.isfinite([*hops, *early]).all(): return None
    length = sum(Fraction(float(x)) for x in hops)
    return length + Fraction(lam) * sum(Fraction(float(x)) for x in early), length


def digits(x):
    "A fraction to twelve significant digits."
    return Context(prec=12).divide(Decimal(x.numerator), Decimal(x.denominator))


def ranked(d, t, m, lam=1., names=None, may=lambda path: True):
    "All paths that `may` be taken as (cost, length, names, positions), the best first, and how often each cost occurs."
    names = names or [f"t{i:02d}" for i in range(len(d))]
    every = [(p, definition(d, p, t, lam)) for p in permutations([v for v in range(len(d)) if v != t], m) if may(p)]
    found = sorted((*map(digits, x), tuple(names[v] for v in p), p) for p, x in every if x)
    return found, Counter(x[0] for x in found)


def same(found, expected, top):
    "Whether `best_paths` gave what enumeration gives."
    order, often = expected
    assert [p.sources for p in found] == [x[2] for x in order[:top]]
    for p, (cost, length, *_) in zip(found, order):
        assert p.cost == pytest.approx(float(cost), rel=1e-11, abs=1e-300) and p.length == pytest.approx(float(length), rel=1e-11, abs=1e-300)
        assert p.tied == (often[cost] > 1)


def search(d, t, m, top, may, **asked):
    "`best_paths` against enumeration, also where there is no path."
    expected = ranked(made(d).distance, t, m, asked.get("lam", 1.), may=may)
    if expected[0]: same(best_paths(made(d), f"t{t:02d}", m, top, **asked), expected, top)
    else:
        with pytest.raises(InputError): best_paths(made(d), f"t{t:02d}", m, top, **asked)


@st.composite
def pools(draw, symmetric=None, infinite=False, least=4, signed=True):
    "A small matrix of whole numbers (many exact ties), of tenths (ties up to rounding), or of random reals (none, unless symmetric)."
    n = draw(st.integers(least, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["whole", "tenths", "reals", "few"] + ["signed"] * signed))
    d = {"whole": lambda: rng.integers(0, 4, (n, n)).astype(float), "tenths": lambda: rng.integers(1, 9, (n, n)) / 10, "reals": lambda: rng.random((n, n)),
         "signed": lambda: rng.integers(-3, 4, (n, n)) / 4, "few": lambda: rng.choice([.1, .3, 1e6], (n, n))}[kind]()
    if draw(st.booleans()) if symmetric is None else symmetric:
        d = (d + d.T) / 2
    if infinite: d[rng.random((n, n)) < draw(st.sampled_from([0, .1, .4]))] = np.inf
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
@given(pools(infinite=True, least=2), st.integers(1, 4), st.integers(1, 5), LAMS)
def test_best_paths_are_those_of_enumeration(d, m, top, lam):
    t = len(d) - 1
    search(d, t, m, top, lambda p: True, lam=lam)
    if m > t or not ranked(d, t, m, lam)[0]: return
    for p in best_paths(made(d), f"t{t:02d}", sources=m, top=top, lam=lam):
        assert len(set(p.sources)) == m and p.target not in p.sources
        assert np.isclose(dict(p.terms)["b"], 2 * dict(p.terms)["a"]) and np.isclose(sum(dict(p.terms).values()), p.cost)


@settings(max_examples=80, deadline=None)
@given(pools(infinite=True), st.integers(1, 4), st.integers(1, 200), LAMS, st.integers(0, 2**32 - 1))
def test_forbidden_hops(d, m, top, lam, seed):
    "Hops between sources and to the target, and a table of allowed hops at the same time."
    n, rng = len(d), np.random.default_rng(seed)
    t, barred, table = int(rng.integers(n)), rng.random((n, n)) < .3, rng.random((n, n)) < .8
    name = lambda v: f"t{v:02d}"
    may = lambda p: not any(barred[a, b] for a, b in zip(p, (*p[1:], t))) and all(table[a, b] for a, b in zip(p, p[1:]))
    search(d, t, m, top, may, lam=lam, forbidden=[(name(a), name(b)) for a, b in np.argwhere(barred)],
           allowed=pd.DataFrame(table, [*map(name, range(n))], [*map(name, range(n))]))


@settings(max_examples=80, deadline=None)
@given(pools(infinite=True), st.integers(1, 4), st.integers(1, 50), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_a_budget_with_stages_already_trained(d, m, top, stages, seed):
    "Every stage counts that is no prefix of a trained path. Trained paths may come back to a source, pass the target or a hop that is forbidden."
    n, rng = len(d), np.random.default_rng(seed)
    trained = [tuple(map(int, rng.integers(0, n, rng.integers(1, 4)))) for _ in range(rng.integers(0, 9))]
    there = {p[:k] for p in trained for k in range(1, len(p) + 1)}
    need = lambda p: 700 * sum(p[:k] not in there for k in range(1, len(p) + 1))
    names = [tuple(f"t{v:02d}" for v in p) for p in trained]
    barred = {p[-2:] for p in trained[:2] if len(p) > 1}
    search(d, n - 1, m, top, lambda p: need(p) <= 700 * stages + 300 and not barred & set(zip(p, (*p[1:], n - 1))), budget=700 * stages + 300, steps=700,
           already_trained=names, forbidden=[(f"t{a:02d}", f"t{b:02d}") for a, b in barred])
    for p in list(permutations(range(n - 1), min(m, n - 1)))[:20]:
        assert steps_to_train([f"t{v:02d}" for v in p], names, 700) == need(p)
    assert best_paths(made(1 - np.eye(n)), "t00", already_trained=names) == best_paths(made(1 - np.eye(n)), "t00")  # without a budget nothing is restricted
    assert best_paths(made(1 - np.eye(n)), "t00", already_trained=names, budget=np.inf) == best_paths(made(1 - np.eye(n)), "t00")


def test_a_trained_path_that_may_not_be_taken():
    "Neither one that came back to a source, nor one over a forbidden hop, nor one over an excluded task, is gone on from."
    a, trained = made(1. - np.eye(6)), [("t01", "t01", "t02"), ("t02", "t03", "t04"), ("t03", "t05", "t01"), ("t04", "t01", "t02"), ("t01", "t03", "t01", "t04")]
    ask = dict(sources=3, budget=0, already_trained=trained)
    assert [p.sources for p in best_paths(a, "t00", forbidden=[("t02", "t03")], exclude="t05", **ask)] == [("t04", "t01", "t02")]
    with pytest.raises(InputError, match="and the budget"):
        best_paths(a, "t00", forbidden=[("t02", "t03"), ("t02", "t00")], exclude="t05", **ask)
    with pytest.raises(InputError, match="and the budget"): best_paths(a, "t00", **{**ask, "sources": 4})


@settings(max_examples=80, deadline=None)
@given(pools(infinite=True), st.integers(1, 4), st.integers(1, 50), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_everything_at_once(d, m, top, stages, seed):
    n, rng = len(d), np.random.default_rng(seed)
    t, group, barred, out = 0, rng.integers(-1, 2, n), rng.random((n, n)) < .15, int(rng.integers(1, n))
    name = lambda v: f"t{v:02d}"
    firsts = {k: int(rng.choice(np.flatnonzero(group == k))) for k in (0, 1) if (group == k).any()}
    trained = [tuple(map(int, rng.permutation(n)[:3])) for _ in range(3)]
    there = {p[:k] for p in trained for k in range(1, 4)}
    def may(p):
        return (p[0] in firsts.values() and len({group[v] for v in p}) == 1 and out not in p and not any(barred[a, b] for a, b in zip(p, (*p[1:], t)))
                and sum(p[:k] not in there for k in range(1, m + 1)) <= stages)
    search(d, t, m, top, may, landmarks={name(v): [name(x) for x in np.flatnonzero(group == k)] for k, v in firsts.items()}, budget=stages,
           already_trained=[[name(v) for v in p] for p in trained], forbidden=[(name(a), name(b)) for a, b in np.argwhere(barred)], exclude=name(out))


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
@given(pools(infinite=True), st.integers(1, 4), st.randoms())
def test_the_order_of_the_pool_does_not_matter(d, m, random):
    a = made(d)
    new = list(range(len(d)))
    random.shuffle(new)
    b = made(d[np.ix_(new, new)], [a.names[i] for i in new])
    try: expected = best_paths(a, "t00", sources=m)
    except InputError:
        with pytest.raises(InputError): best_paths(b, "t00", sources=m)
    else: assert expected == best_paths(b, "t00", sources=m)


@settings(max_examples=50, deadline=None)
@given(pools(), st.integers(1, 3))
def test_more_is_only_longer(d, m):
    "A shorter answer is the beginning of a longer one, and a longer list never changes who is tied."
    a = made(d)
    for top in range(1, 6):
        assert best_paths(a, "t00", sources=m, top=top) == best_paths(a, "t00", sources=m, top=1000)[:top]


@settings(max_examples=50, deadline=None)
@given(st.integers(4, 7), st.integers(1, 3), st.floats(-2, 2), LAMS, st.integers(0, 2**32 - 1))
def test_a_constant_added_to_all_distances_changes_no_order(n, m, shift, lam, seed):
    "So that a table of scores can be searched, whatever its zero."
    d = np.random.default_rng(seed).random((n, n))
    assert np.array_equal(rank_sources(d[:-1, :-1], d[:-1, -1], m, 10, lam)[0], rank_sources(d[:-1, :-1] + shift, d[:-1, -1] + shift, m, 10, lam)[0])


def test_rounding_does_not_hide_a_tie():
    d = np.zeros((3, 3))
    d[0, 1] = d[1, 0] = 0.1
    d[0, 2], d[1, 2] = 0.2, 0.3  # 0.1 + 0.2 + 0.3 differs from 0.1 + 0.3 + 0.2 in the last digit
    first, second = best_paths(made(d), "t02")
    assert first.tied and second.tied and first.sources == ("t01", "t00")


def test_constant_distances():
    "Ties beyond counting: 29! / 23! paths of six sources."
    d = 1. - np.eye(30)
    for m in range(1, 7):
        found = best_paths(made(d), "t29", sources=m, top=3)
        assert [p.cost for p in found] == [2 * m - 1] * 3 and all(p.tied for p in found)
        assert found[0].sources == tuple(f"t{i:02d}" for i in range(m))


@pytest.mark.parametrize("kind", ["reals", "whole", "single"])
def test_four_sources_out_of_many(kind):
    "A pool larger than any page's, against plain arithmetic on all of 30 * 29 * 28 * 27 orders."
    rng = np.random.default_rng(3)
    hop, last = (rng.random((30, 30)), rng.random(30)) if kind != "whole" else (rng.integers(1, 6, (30, 30)) * 1., rng.integers(1, 6, 30) * 1.)
    if kind == "single": hop, last = hop.astype(np.float32), last.astype(np.float32)
    p = np.array(list(permutations(range(30), 4)))
    length = sum(hop[p[:, j], p[:, j + 1]].astype(float) for j in range(3)) + last[p[:, 3]]
    cost = length + sum(last[p[:, j]].astype(float) for j in range(3))
    order = np.lexsort((*p.T[::-1], length, cost))[:50]
    choices, tied = rank_sources(hop, last, 4, 50)
    assert np.array_equal(choices, p[order]) and np.array_equal(tied, [np.isclose(cost, cost[i], rtol=1e-12).sum() > 1 for i in order])


def test_three_sources_out_of_many():
    "The best of 120 * 119 * 118 orders, against plain arithmetic on the whole cube."
    rng = np.random.default_rng(3)
    hop, last = rng.random((120, 120)), rng.random(120)
    cube = hop[:, :, None] + hop[None] + last + last[:, None, None] + last[None, :, None]
    u, v, w = np.ix_(*[range(120)] * 3)
    cube[(u == v) | (v == w) | (u == w)] = np.inf
    best = np.argsort(cube, axis=None)[:5]
    choices, _ = rank_sources(hop, last, 3, 5)
    assert np.array_equal(choices, np.stack(np.unravel_index(best, cube.shape), axis=1))


def test_tasks_that_all_but_coincide():
    "Triplets at equal distance from the target: every circle within one looks cheaper than any path of four."
    rng = np.random.default_rng(0)
    x = rng.random((10, 2)).repeat(3, 0)
    hop = np.linalg.norm(x[:, None] - x, axis=-1) + .001
    p = np.array(list(permutations(range(30), 4)))
    cost = sum(hop[p[:, j], p[:, j + 1]] for j in range(3))
    choices, tied = rank_sources(hop, np.ones(30), 4, 10)
    assert np.allclose([sum(hop[a, b] for a, b in zip(c, c[1:])) for c in choices], np.sort(cost)[:10]) and tied.all()


@settings(max_examples=50, deadline=None)
@given(pools(), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_the_edge_rule_is_kept_among_sources_only(d, m, seed):
    a, tasks = made(d), tasks_of(len(d), seed)
    t = len(d) - 1
    kept = lambda p: all(tasks[x].modality == tasks[y].modality or tasks[x].label == tasks[y].label for x, y in zip(p, p[1:]))
    if not any(map(kept, permutations(range(t), m))):
        if m <= t:
            with pytest.raises(InputError, match="allowed hops"): best_paths(a, a.names[t], sources=m, allowed=edges(tasks))
        return
    same(best_paths(a, a.names[t], sources=m, top=10_000, allowed=edges(tasks)), ranked(a.distance, t, m, may=kept), 10_000)


@settings(max_examples=30, deadline=None)
@given(pools(infinite=True, signed=False), st.integers(0, 2**32 - 1), st.randoms())
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
        for cut in (busiest, strained):
            parts = communities(graph, n, cut)
            assert parts == communities(other, n, cut) and len(parts) >= n
            assert sorted(x for part in parts for x in part) == sorted(graph)
            assert landmarks(graph, parts) == landmarks(other, parts)
            assert all(k in part for k, part in zip(landmarks(graph, parts), parts))


@settings(max_examples=30, deadline=None)
@given(pools(symmetric=True, signed=False), st.integers(0, 2**32 - 1), st.integers(1, 3), st.randoms())
def test_the_landmark_strategy_ignores_the_order_of_files(d, seed, n, random):
    "Tasks in another order, and an affinity with its rows in another order again, as from folders that list differently."
    a, tasks = made(d), tasks_of(len(d), seed)
    new = list(range(len(d)))
    random.shuffle(new)
    b = made(d[np.ix_(new, new)], [a.names[i] for i in new])
    other = random.sample(tasks, len(tasks))
    assert landmark_communities(a, tasks, "t00", n) == landmark_communities(b, other, "t00", n)
    try: expected = landmark_paths(a, tasks, "t00", n)
    except InputError:
        with pytest.raises(InputError): landmark_paths(b, other, "t00", n)
    else: assert expected == landmark_paths(b, other, "t00", n)


@settings(max_examples=40, deadline=None)
@given(pools(signed=False), st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([busiest, strained]))
def test_landmark_paths_are_those_of_the_paper(d, seed, n, cut):
    "k is a landmark, i another source of its community and joined to it; among these the cheapest."
    a, tasks = made(d), tasks_of(len(d), seed)
    n = min(n, len(d) - 1)
    graph = source_graph(a, tasks, "t00")
    parts = communities(graph, n, cut)
    at = lambda *names: tuple(a.names.index(x) for x in names)
    may = {at(k, i) for k, part in zip(landmarks(graph, parts), parts) for i in part if graph.has_edge(k, i)}
    try: restricted = landmark_paths(a, tasks, "t00", n_communities=n, top=100, cut=cut)
    except InputError as e:
        assert "allowed hops" in str(e) and not may
        return
    same(restricted, ranked(a.distance, 0, 2, may=may.__contains__), 100)
    least = best_paths(a, "t00", top=1)[0].cost
    assert restricted[0].cost >= least - 1e-11 * abs(least)


def test_rounding_does_not_hide_a_tie_of_landmarks():
    "The sums .1 + .2 + .3 and .3 + .2 + .1 differ in the last digit; the first name is the landmark all the same."
    graph = nx.Graph([("a", "x", {"d": .1}), ("a", "y", {"d": .2}), ("a", "z", {"d": .3}), ("b", "x", {"d": .3}), ("b", "y", {"d": .2}), ("b", "z", {"d": .1}), ("x", "y", {"d": 9})])
    graph.add_edge("y", "z", d=9)
    nx.set_node_attributes(graph, .5, "domain_cases")
    assert .1 + .2 + .3 > .3 + .2 + .1 and landmarks(graph, [tuple(graph)]) == ["a"]


def test_lengths_of_edges_that_are_none():
    "An infinite distance is no edge; one that is negative or not a number is refused by the names of its tasks."
    tasks, d = tasks_of(6, 0), np.random.default_rng(0).random((6, 6))
    for wrong in (np.nan, -.1):
        graph = nx.complete_graph(["a", "b", "c"])
        nx.set_edge_attributes(graph, 1., "d")
        graph.edges["a", "c"]["d"] = wrong
        with pytest.raises(InputError, match="between a and c") as e: communities(graph, 2)
        assert str(e.value).endswith(".") and ". " not in str(e.value).replace("-0.1", "")
        a, b, _ = next(iter(source_graph(made(d), tasks).edges(data="d")))
        bad, at = d.copy(), (int(a[1:]), int(b[1:]))
        bad[at] = bad[at[::-1]] = wrong
        with pytest.raises(InputError, match=f"between {a} and {b}"): source_graph(made(bad), tasks)
    far = d.copy()
    far[at] = np.inf
    assert not source_graph(made(far), tasks).has_edge(a, b) and len(source_graph(made(far), tasks)) == 6
    graph = nx.Graph([("a", "b", {"d": 1.}), ("b", "c", {"d": np.inf})])
    assert communities(graph, 1) == [("a", "b"), ("c",)]  # apart from the start


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
    (dict(target="t0l"), "no task t0l: choose one of its 5 names"), (dict(exclude=["nobody"]), "no task nobody"),
    (dict(sources=0), "0 sources: ask for at least one"), (dict(sources=5), "leaves 4 possible sources"),
    (dict(sources=3, exclude=["t01", "t02"]), "leaves 2 possible sources"), (dict(top=0), "at least one"), (dict(lam=-1), "not negative"), (dict(lam=np.nan), "not negative"),
    (dict(forbidden=["t01"]), "pairs of names"), (dict(forbidden=[("t01", "t9")]), "no task t9"), (dict(landmarks={"t1": []}), "no task t1"),
    (dict(landmarks={"t01": ["t02"], "t03": ["t02"]}), "t02 is in the communities of two landmarks"), (dict(landmarks={"t01": []}), "allowed hops"),
    (dict(budget=-1), "cannot be kept"), (dict(budget=np.nan), "cannot be kept"), (dict(budget=10, steps=0), "cannot be kept"), (dict(already_trained=["t9"]), "no task t9"),
    (dict(budget=999, steps=1000), "trains 0 of 2 sources on the way to t00, and no path of 2 is trained yet"),
    (dict(budget=0, already_trained=[("t01", "t00")]), "the allowed hops and the budget"),
    (dict(sources=2.0), "number of sources is 2.0"), (dict(sources="2"), "number of sources is '2'"), (dict(top=2.5), "number of paths is 2.5"), (dict(landmarks=["t01", "t02"]), "dict from each landmark"),
    (dict(allowed=np.ones((5, 5), bool)), "give a DataFrame"), (dict(allowed=pd.DataFrame(True, ["t01"] * 2, ["t01", "t02"])), "each name once")])
def test_mistakes_are_answered_in_one_sentence(ask, sentence):
    with pytest.raises(InputError, match=sentence):
        best_paths(made(1. - np.eye(5)), **{"target": "t00", **ask})


def test_a_missing_number_is_named():
    d = 1. - np.eye(4)
    d[2, 1] = d[1, 2] = np.nan
    with pytest.raises(InputError, match="from t01 to t02"):
        best_paths(made(d), "t00")
    assert len(best_paths(made(d), "t00", exclude="t02")) == 2
    np.fill_diagonal(d, np.nan)  # nobody's distance to itself is ever asked for
    assert best_paths(made(d), "t00", exclude="t02", sources=2)
    d[3, 0] = -np.inf
    with pytest.raises(InputError, match="from t03 to t00"):
        best_paths(made(d), "t00", exclude="t02")


def test_an_affinity_must_weigh_a_term_that_it_holds():
    d = 1. - np.eye(4)
    for weights, sentence in (({}, "weighs no term"), ({"a": 0.}, "weighs no term"), ({"b": 1.}, "weighs the term 'b' but does not hold it: its terms are a")):
        with pytest.raises(InputError, match=sentence): best_paths(Affinity(tuple("wxyz"), {"a": d}, weights), "w")


def test_a_term_without_weight_is_never_read():
    "Neither in the search, nor in the shares, nor in an explanation; whatever it holds."
    d = np.random.default_rng(0).random((6, 6))
    a = made(d)
    spoilt = replace(a, terms=a.terms | {"gone": np.full((6, 6), np.nan)}, weights=a.weights | {"gone": 0.})
    assert best_paths(spoilt, "t00", 3) == best_paths(a, "t00", 3) and str(explain(best_paths(a, "t00")[0], spoilt)) == str(explain(best_paths(a, "t00")[0], a))
    assert hop_table(best_paths(a, "t00")[0], spoilt).equals(hop_table(best_paths(a, "t00")[0], a))


@pytest.mark.parametrize("m", [2, 3, 4])
def test_the_terms_are_summed_once_into_one_matrix(m, monkeypatch):
    "Counted in entries, not in seconds: the search reads each term once, and holds one sum beside them."
    n, read, plain = 600, [], Affinity.contributions
    a = made(np.random.default_rng(0).random((n, n)))
    def counted(self):
        read.append(next(iter(self.terms.values())).size)
        return plain(self)
    monkeypatch.setattr(Affinity, "contributions", counted)
    tracemalloc.start()
    best_paths(a, a.names[0], m)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n * n <= sum(read) < 1.01 * n * n and peak < 2 * 8 * n * n + 8 * 2**20


def test_the_table_ranks_within_target_and_number():
    a = made(np.random.default_rng(0).random((6, 6)))
    joined = [p for m in (2, 1) for t in ("t00", "t01") for p in best_paths(a, t, sources=m, top=2)]
    table = path_table(joined)
    assert list(table) == ["rank", "path", "sources", "cost", "length", "a", "b", "tied"]
    assert table["rank"].tolist() == [1, 2] * 4 and table["sources"].tolist() == [2] * 4 + [1] * 4
    assert list(path_table([])) == ["rank", "path", "sources", "cost", "length", "tied"]


@settings(max_examples=40, deadline=None)
@given(pools(infinite=True, least=3))
def test_side_by_side_and_the_rule_for_the_number(d):
    a, found = made(d), []
    for m in (1, 2, 3):
        try: found += best_paths(a, "t00", sources=m, top=2)
        except InputError: pass
    if not found:
        with pytest.raises(InputError): side_by_side(a, "t00", top=2)
        return
    beside = side_by_side(a, "t00", top=2)
    assert beside == found
    numbers = [len(p.sources) for p in found]
    if 1 in numbers: assert recommend(beside) == found[numbers.index(2 if 2 in numbers else 1)]
    assert recommend(beside, lambda paths: max(len(p.sources) for p in paths)) == found[numbers.index(max(numbers))]
    for wrong in ("no such rule", lambda paths: 9):
        with pytest.raises(InputError, match="rule"): recommend(beside, wrong)


def test_side_by_side_takes_one_number_too():
    a = made(np.random.default_rng(0).random((5, 5)))
    assert side_by_side(a, "t00", sources=2, top=3) == best_paths(a, "t00", 2, 3) == side_by_side(a, "t00", sources=np.int64(2), top=3)
    with pytest.raises(InputError, match="number of sources is 2.0"): side_by_side(a, "t00", sources=2.0)


def test_landmarks_with_a_community_of_one_name():
    a = made(np.random.default_rng(0).random((5, 5)))
    assert [p.sources for p in best_paths(a, "t00", landmarks={"t01": "t02"})] == [("t01", "t02")]


@pytest.mark.parametrize("score", ["leep", "h_score"])
def test_a_score_drives_the_search_with_its_sign_turned(score):
    "The best path is that of the highest scores; positive scores make negative distances, with which more sources cost less until they are shifted."
    table = np.random.default_rng(0).random((6, 6)) - (score == "leep")
    names = tuple(f"t{i:02d}" for i in range(6))
    turned, shifted = (Affinity(names, {score: m}, {score: 1.}) for m in (-table, table.max() - table))
    for m in (1, 2, 3):
        highest = max(permutations(range(1, 6), m), key=lambda p: sum(table[x, y] for x, y in zip(p, (*p[1:], 0))) + sum(table[v, 0] for v in p[:-1]))
        assert best_paths(turned, "t00", m)[0].sources == best_paths(shifted, "t00", m)[0].sources == tuple(names[v] for v in highest)
    costs = lambda a: [p.cost for p in side_by_side(a, "t00")]
    assert costs(shifted) == sorted(costs(shifted)) and costs(turned) == sorted(costs(turned), reverse=score == "h_score")


def test_a_rule_of_ones_own_has_a_name(monkeypatch):
    monkeypatch.setitem(NUMBER_RULES, "direct", lambda paths: 1)
    assert len(recommend(side_by_side(made(1 - np.eye(5)), "t00"), "direct").sources) == 1


@settings(max_examples=60, deadline=None)
@given(pools(infinite=True), st.integers(1, 3), LAMS, st.integers(0, 2**32 - 1), st.booleans())
def test_probabilities_against_a_recount(d, m, lam, seed, restricted):
    "Each replicate is searched by enumeration under the same restrictions; shares, interval and runner-up are counted by hand."
    a, rng, n = made(d), np.random.default_rng(seed), len(d)
    barred = np.argwhere(rng.random((n, n)) < .2) if restricted else []
    may = lambda p: not any((x, y) in set(map(tuple, barred)) for x, y in zip(p, (*p[1:], 0)))
    asked = dict(lam=lam, forbidden=[(f"t{x:02d}", f"t{y:02d}") for x, y in barred])
    order, _ = ranked(a.distance, 0, m, lam, may=may)
    if not order: return
    replicates = np.stack([d + rng.integers(0, 2, d.shape) / 2 for _ in range(9)])
    best = best_paths(a, "t00", m, 1, **asked)[0]
    why = explain(best, a, replicates, **asked)
    winners = [ranked(x, 0, m, lam, may=may)[0][0][2] for x in replicates]
    assert {tuple(row.path.split(" -> ")[:-1]): round(9 * row.probability) for row in why.winners.itertuples()} == Counter(winners)
    assert why.probability == winners.count(best.sources) / 9 and why.path.sources == best.sources and str(why).count("\n") >= 1
    assert why.winners["probability"].is_monotonic_decreasing and why.winners["probability"].sum() == pytest.approx(1)
    if len(order) == 1:
        assert why.runner_up is None and why.lacks is None and why.interval is None
        return
    assert why.any_order == sum(set(w) == set(best.sources) for w in winners) / 9
    other = next((x for x in order if set(x[2]) != set(best.sources)), order[1])
    assert why.runner_up.sources == other[2]
    gaps = [float(definition(x, other[3], 0, lam)[0] - definition(x, order[0][3], 0, lam)[0]) for x in replicates]
    assert why.interval == pytest.approx(tuple(np.quantile(gaps, (.05, .95))), abs=1e-9)
    assert why.lacks.at["cost", "difference"] == pytest.approx(float(other[0] - order[0][0]), abs=1e-9, rel=1e-9)
    assert why.lacks.loc[["a", "b"], "difference"].sum() == pytest.approx(why.lacks.at["cost", "difference"], abs=1e-9, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(pools(), st.integers(1, 4), LAMS)
def test_the_summands_are_those_of_the_cost(d, m, lam):
    if m >= len(d): return
    a = made(d)
    path = best_paths(a, "t00", m, 1, lam=lam)[0]
    table = hop_table(path, a, lam)
    assert len(table) == m + (m - 1) * (lam > 0) and table["cost"].sum() == pytest.approx(path.cost)
    assert table.loc[table["kind"] == "hop", "cost"].sum() == pytest.approx(path.length)
    assert table[["a", "b"]].sum().to_dict() == pytest.approx(dict(path.terms))


def test_explaining_a_path_that_is_not_the_best():
    a = made(np.random.default_rng(0).random((6, 6)))
    best, *_, other = best_paths(a, "t00")
    why = explain(other, a)
    assert why.runner_up.sources == best.sources and why.lacks.at["cost", "difference"] < 0 and "less" in str(why)
    assert why.winners is None and why.probability is None and why.interval is None
    free = TransferPath(other.sources, "t00", np.nan, np.nan)  # costs are taken from the affinity
    assert explain(free, a).path == replace(why.path, tied=False)


def test_an_affinity_with_replicates_explains_itself():
    "As with the same matrices handed over; and matrices that are handed over come first."
    rng = np.random.default_rng(0)
    a = made(rng.random((5, 5)))
    terms = {t: (m + rng.random((20, 5, 5)) / 9).astype(np.float32) for t, m in a.terms.items()}
    held = replace(a, replicates=terms)
    best = best_paths(a, "t00")[0]
    why = explain(best, held)
    by_hand = explain(best, a, [terms["a"][b].astype(float) + terms["b"][b] for b in range(20)])
    assert why.probability == by_hand.probability is not None and why.winners.equals(by_hand.winners) and "resampled" in str(why)
    assert explain(best, a).probability is None and explain(best, held, np.stack([a.distance] * 3)).probability == 1
    light = replace(held, weights={"a": 1., "b": 0.})  # under the current weights
    assert explain(best, light).winners.equals(explain(best, replace(light, replicates={}), terms["a"].astype(float)).winners)


def test_an_explanation_says_that_the_cost_did_not_decide():
    said = "Another path costs the same; the shorter length decided, not the cost."
    tied, single = made(1. - np.eye(4)), made(np.random.default_rng(0).random((4, 4)))
    for a in (tied, single):
        best = best_paths(a, "t00")[0]
        assert (said in str(explain(best, a)).split("\n")) == best.tied == (a is tied)


@pytest.mark.parametrize("sources, extra, sentence", [(("t01", "t01"), {}, "meets one task twice"), (("t00", "t01"), {}, "meets one task twice"),
                                                      (("t01", "t02"), {"top": 3}, "leave top out"), (("t01", "t02"), {"sources": 2, "top": 3}, "leave sources and top out")])
def test_what_cannot_be_explained(sources, extra, sentence):
    with pytest.raises(InputError, match=sentence): explain(TransferPath(sources, "t00", 1., 1.), made(1. - np.eye(4)), **extra)


def test_replicates_that_do_not_fit_are_named():
    a = made(np.random.default_rng(0).random((5, 5)))
    best = best_paths(a, "t00")[0]
    with pytest.raises(InputError, match=r"Replicate 0 .* shape \(4, 4\)"): explain(best, a, np.ones((2, 4, 4)))
    with pytest.raises(InputError, match="Replicate 1 .* from t01 to t02 is not a number"):
        bad = np.ones((2, 5, 5))
        bad[1, 1, 2] = np.nan
        explain(best, a, bad)
    with pytest.raises(InputError, match="at least one"): explain(best, a, np.ones((0, 5, 5)))
    assert explain(best, a, np.stack([a.distance, np.full((5, 5), np.inf), a.distance])).probability == 2 / 3  # no path is the best where there is none
    none = explain(best, a, np.full((3, 5, 5), np.inf))
    assert none.probability == 0 and none.winners.empty and none.interval is None


def test_what_an_oca_similarity_contributes():
    "A term that is a similarity enters as 1 - R, in the search as in the affinity's own distance."
    rng = np.random.default_rng(1)
    a = Affinity(tuple(f"t{i:02d}" for i in range(6)), {"oca": rng.random((6, 6)), "ica": 100 * rng.random((6, 6))}, {"oca": 2.4756, "ica": .0044})
    same(best_paths(a, "t00", 3, 200), ranked(a.distance, 0, 3), 200)


def test_single_precision_is_searched_exactly():
    rng = np.random.default_rng(2)
    a = Affinity(tuple(f"t{i:02d}" for i in range(7)), {"d": rng.random((7, 7), dtype=np.float32)}, {"d": 1.})
    for m in (2, 3, 4): same(best_paths(a, "t00", m, 400), ranked(a.distance, 0, m), 400)


def test_lengths_and_costs_do_not_depend_on_the_order_of_summation():
    x = [.1, .2, .3, .4, .5, .7]
    d = np.zeros((4, 4))
    results = set()
    for p in permutations(x):
        d[0, 1], d[1, 2], d[2, 3], d[0, 3], d[1, 3] = p[:5]
        results.add((path_cost(d, [0, 1, 2], 3), sum(Fraction(v) for v in p[:5])))
        assert path_length(d, [0, 1, 2], 3) == float(Fraction(p[0]) + Fraction(p[1]) + Fraction(p[2]))
    assert len(results) == 6
