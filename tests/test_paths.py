"""The search against enumeration.

Every ordered choice of sources is costed one by one in exact arithmetic, straight from the definition.
"""

import tracemalloc
from collections import Counter
from dataclasses import replace
from decimal import Context, Decimal
from fractions import Fraction
from itertools import chain, pairwise, permutations, product
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from seqtransfer.affinity import Affinity
from seqtransfer.core import InputError
from seqtransfer.landmarks import (
    busiest,
    communities,
    edges,
    landmark_communities,
    landmark_paths,
    landmarks,
    source_graph,
    strained,
)
from seqtransfer.paths import (
    NUMBER_RULES,
    TransferPath,
    best_paths,
    explain,
    hop_table,
    path_table,
    recommend,
    side_by_side,
    steps_to_train,
)
from seqtransfer.search import path_cost, path_length, rank_sources
from seqtransfer.tasks import Case, Task

LAMS = st.sampled_from([0.0, 0.5, 1.0, 2.0])
SEEDS = st.integers(0, 2**32 - 1)


def name(v):
    "The name of the task at position `v`."
    return f"t{v:02d}"


def names_of(path):
    "The names of the tasks at several positions."
    return tuple(name(v) for v in path)


def hops_of(path, target):
    "All hops of a path as pairs, the last to the target."
    return list(pairwise((*path, target)))


def made(distance, names=None):
    "An affinity of two terms, a third and two thirds of `distance`."
    names = names or names_of(range(len(distance)))
    return Affinity(tuple(names), {"a": distance / 3, "b": distance * 2 / 3}, {"a": 1.0, "b": 1.0})


def definition(d, path, t, lam):
    """Cost and length, transcribed: sum d(v_j, v_j+1) + d(v_m, t) + lam * sum_{j<m} d(v_j, t).
    None where a summand is infinite."""
    hops = [d[a, b] for a, b in hops_of(path, t)]
    early = [d[v, t] for v in path[:-1]] if lam else []
    if not np.isfinite([*hops, *early]).all():
        return None
    length = sum(Fraction(float(x)) for x in hops)
    cost = length + Fraction(lam) * sum(Fraction(float(x)) for x in early)
    return cost, length


def digits(x):
    "A fraction to twelve significant digits."
    return Context(prec=12).divide(Decimal(x.numerator), Decimal(x.denominator))


class Ranked(NamedTuple):
    "A path of the enumeration; sorts as the search should."

    cost: Decimal
    length: Decimal
    names: tuple[str, ...]
    path: tuple[int, ...]


def any_path(path):
    "The rule that allows every path."
    return True


def ranked(d, t, m, lam=1.0, may=any_path):
    "All paths that `may` be taken, the best first, and how often each cost occurs."
    others = [v for v in range(len(d)) if v != t]
    found = []
    for path in filter(may, permutations(others, m)):
        sums = definition(d, path, t, lam)
        if sums is not None:
            found.append(Ranked(*map(digits, sums), names_of(path), path))
    return sorted(found), Counter(x.cost for x in found)


def same(found, expected, top):
    "Asserts that `best_paths` gave what enumeration gives."
    order, often = expected
    assert [p.sources for p in found] == [x.names for x in order[:top]]
    for p, x in zip(found, order):
        assert p.cost == pytest.approx(float(x.cost), rel=1e-11, abs=1e-300)
        assert p.length == pytest.approx(float(x.length), rel=1e-11, abs=1e-300)
        assert p.tied == (often[x.cost] > 1)


def search(d, t, m, top, may=any_path, **asked):
    "`best_paths` against enumeration, also where there is no path."
    expected = ranked(made(d).distance, t, m, asked.get("lam", 1.0), may)
    if expected[0]:
        same(best_paths(made(d), name(t), m, top, **asked), expected, top)
    else:
        with pytest.raises(InputError):
            best_paths(made(d), name(t), m, top, **asked)


@st.composite
def pools(draw, symmetric=None, infinite=False, least=4, signed=True):
    """A small matrix of whole numbers (many exact ties), of tenths (ties up to rounding), or of random reals.
    These have no ties, unless symmetric."""
    n = draw(st.integers(least, 7))
    rng = np.random.default_rng(draw(SEEDS))
    kinds = {
        "whole": lambda: rng.integers(0, 4, (n, n)).astype(float),
        "tenths": lambda: rng.integers(1, 9, (n, n)) / 10,
        "reals": lambda: rng.random((n, n)),
        "few": lambda: rng.choice([0.1, 0.3, 1e6], (n, n)),
        "signed": lambda: rng.integers(-3, 4, (n, n)) / 4,
    }
    if not signed:
        del kinds["signed"]
    d = kinds[draw(st.sampled_from(list(kinds)))]()
    if symmetric is None:
        symmetric = draw(st.booleans())
    if symmetric:
        d = (d + d.T) / 2
    if infinite:
        d[rng.random((n, n)) < draw(st.sampled_from([0, 0.1, 0.4]))] = np.inf
    np.fill_diagonal(d, 0)
    return d


PATIENTS = {"x": 3, "y": 11, "z": 40}  # of each site


def tasks_of(n, seed):
    "`n` tasks in a few domains, modalities and labels."
    rng = np.random.default_rng(seed)
    tasks = []
    for i in range(n):
        site, modality, label = (rng.choice(among) for among in (list(PATIENTS), ["T1", "T2"], ["ED", "ET"]))
        cases = tuple(Case(f"made/{site}{j}", Path("i"), Path("m"), (1,)) for j in range(PATIENTS[site]))
        tasks.append(Task(name(i), "made", site, modality, label, cases))
    return tasks


@settings(max_examples=150, deadline=None)
@given(pools(infinite=True, least=2), st.integers(1, 4), st.integers(1, 5), LAMS)
def test_best_paths_are_those_of_enumeration(d, m, top, lam):
    t = len(d) - 1
    search(d, t, m, top, lam=lam)
    if m > t or not ranked(d, t, m, lam)[0]:
        return
    for p in best_paths(made(d), name(t), sources=m, top=top, lam=lam):
        assert len({*p.sources, p.target}) == m + 1
        shares = dict(p.terms)
        assert np.isclose(shares["b"], 2 * shares["a"])
        assert np.isclose(sum(shares.values()), p.cost)


@settings(max_examples=80, deadline=None)
@given(pools(infinite=True), st.integers(1, 4), st.integers(1, 200), LAMS, SEEDS)
def test_forbidden_hops(d, m, top, lam, seed):
    "Hops between sources and to the target, and a table of allowed hops at the same time."
    n, rng = len(d), np.random.default_rng(seed)
    t = int(rng.integers(n))
    barred, table = rng.random((n, n)) < 0.3, rng.random((n, n)) < 0.8

    def may(path):
        free = not any(barred[hop] for hop in hops_of(path, t))
        return free and all(table[hop] for hop in pairwise(path))

    every = names_of(range(n))
    forbidden = [names_of(hop) for hop in np.argwhere(barred)]
    search(d, t, m, top, may, lam=lam, forbidden=forbidden, allowed=pd.DataFrame(table, every, every))


@settings(max_examples=80, deadline=None)
@given(pools(infinite=True), st.integers(1, 4), st.integers(1, 50), st.integers(0, 5), SEEDS)
def test_a_budget_with_stages_already_trained(d, m, top, stages, seed):
    """Every stage counts that is no prefix of a trained path.
    Trained paths may come back to a source, pass the target or a hop that is forbidden."""
    n, rng = len(d), np.random.default_rng(seed)
    trained = [tuple(map(int, rng.integers(0, n, rng.integers(1, 4)))) for _ in range(rng.integers(0, 9))]
    there = {p[:k] for p in trained for k in range(1, len(p) + 1)}
    barred = {p[-2:] for p in trained[:2] if len(p) > 1}
    budget = 700 * stages + 300

    def need(path):
        return 700 * sum(path[:k] not in there for k in range(1, len(path) + 1))

    def may(path):
        return need(path) <= budget and barred.isdisjoint(hops_of(path, n - 1))

    names = [names_of(p) for p in trained]
    forbidden = [names_of(hop) for hop in barred]
    search(d, n - 1, m, top, may, budget=budget, steps=700, already_trained=names, forbidden=forbidden)
    for p in list(permutations(range(n - 1), min(m, n - 1)))[:20]:
        assert steps_to_train(names_of(p), names, 700) == need(p)


def test_without_a_budget_trained_paths_restrict_nothing():
    a, trained = made(1 - np.eye(5)), [("t03", "t04"), "t02"]
    free = best_paths(a, "t00")
    assert best_paths(a, "t00", already_trained=trained) == free
    assert best_paths(a, "t00", already_trained=trained, budget=np.inf) == free


def test_a_trained_path_that_may_not_be_taken():
    "Not one that came back to a source, nor one over a forbidden hop or an excluded task, is gone on from."
    trained = [
        ("t01", "t01", "t02"),
        ("t02", "t03", "t04"),
        ("t03", "t05", "t01"),
        ("t04", "t01", "t02"),
        ("t01", "t03", "t01", "t04"),
    ]
    a = made(1.0 - np.eye(6))
    ask = dict(sources=3, budget=0, already_trained=trained)
    found = best_paths(a, "t00", forbidden=[("t02", "t03")], exclude="t05", **ask)
    assert [p.sources for p in found] == [("t04", "t01", "t02")]
    with pytest.raises(InputError, match="and the budget"):
        best_paths(a, "t00", forbidden=[("t02", "t03"), ("t02", "t00")], exclude="t05", **ask)
    with pytest.raises(InputError, match="and the budget"):
        best_paths(a, "t00", **{**ask, "sources": 4})


@settings(max_examples=80, deadline=None)
@given(pools(infinite=True), st.integers(1, 4), st.integers(1, 50), st.integers(0, 3), SEEDS)
def test_everything_at_once(d, m, top, stages, seed):
    n, rng = len(d), np.random.default_rng(seed)
    group, barred, out = rng.integers(-1, 2, n), rng.random((n, n)) < 0.15, int(rng.integers(1, n))
    members = {k: np.flatnonzero(group == k) for k in (0, 1) if (group == k).any()}
    firsts = {k: int(rng.choice(of)) for k, of in members.items()}
    trained = [tuple(map(int, rng.permutation(n)[:3])) for _ in range(3)]
    there = {p[:k] for p in trained for k in range(1, 4)}

    def may(path):
        in_one_community = path[0] in firsts.values() and len({group[v] for v in path}) == 1
        free = out not in path and not any(barred[hop] for hop in hops_of(path, 0))
        missing = sum(path[:k] not in there for k in range(1, m + 1))
        return in_one_community and free and missing <= stages

    search(
        d,
        0,
        m,
        top,
        may,
        landmarks={name(firsts[k]): names_of(of) for k, of in members.items()},
        budget=stages,
        already_trained=[names_of(p) for p in trained],
        forbidden=[names_of(hop) for hop in np.argwhere(barred)],
        exclude=name(out),
    )


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
    assert best.tied
    assert d[i, t] <= d[k, t] + 1e-12


@settings(max_examples=50, deadline=None)
@given(pools(infinite=True), st.integers(1, 4), st.randoms())
def test_the_order_of_the_pool_does_not_matter(d, m, random):
    a = made(d)
    new = list(range(len(d)))
    random.shuffle(new)
    b = made(d[np.ix_(new, new)], [a.names[i] for i in new])
    try:
        expected = best_paths(a, "t00", sources=m)
    except InputError:
        with pytest.raises(InputError):
            best_paths(b, "t00", sources=m)
    else:
        assert expected == best_paths(b, "t00", sources=m)


@settings(max_examples=50, deadline=None)
@given(pools(), st.integers(1, 3))
def test_more_is_only_longer(d, m):
    "A shorter answer is the beginning of a longer one, and a longer list never changes who is tied."
    a = made(d)
    for top in range(1, 6):
        assert best_paths(a, "t00", sources=m, top=top) == best_paths(a, "t00", sources=m, top=1000)[:top]


@settings(max_examples=50, deadline=None)
@given(st.integers(4, 7), st.integers(1, 3), st.floats(-2, 2), LAMS, SEEDS)
def test_a_constant_added_to_all_distances_changes_no_order(n, m, shift, lam, seed):
    "So that a table of scores can be searched, whatever its zero."
    d = np.random.default_rng(seed).random((n, n))
    hop, last = d[:-1, :-1], d[:-1, -1]
    plain, _ = rank_sources(hop, last, m, 10, lam)
    shifted, _ = rank_sources(hop + shift, last + shift, m, 10, lam)
    assert np.array_equal(plain, shifted)


def test_rounding_does_not_hide_a_tie():
    d = np.zeros((3, 3))
    d[0, 1] = d[1, 0] = 0.1
    d[0, 2], d[1, 2] = 0.2, 0.3  # 0.1 + 0.2 + 0.3 differs from 0.1 + 0.3 + 0.2 in the last digit
    first, second = best_paths(made(d), "t02")
    assert first.tied and second.tied
    assert first.sources == ("t01", "t00")


def test_constant_distances():
    "Ties beyond counting: 29! / 23! paths of six sources."
    d = 1.0 - np.eye(30)
    for m in range(1, 7):
        found = best_paths(made(d), "t29", sources=m, top=3)
        assert [p.cost for p in found] == [2 * m - 1] * 3
        assert all(p.tied for p in found)
        assert found[0].sources == names_of(range(m))


@pytest.mark.parametrize("kind", ["reals", "whole", "single"])
def test_four_sources_out_of_many(kind):
    "A pool larger than any page's, against plain arithmetic on all of 30 * 29 * 28 * 27 orders."
    rng = np.random.default_rng(3)
    if kind == "whole":
        hop, last = rng.integers(1, 6, (30, 30)) * 1.0, rng.integers(1, 6, 30) * 1.0
    else:
        hop, last = rng.random((30, 30)), rng.random(30)
    if kind == "single":
        hop, last = hop.astype(np.float32), last.astype(np.float32)
    p = np.array(list(permutations(range(30), 4)))
    length = sum(hop[p[:, j], p[:, j + 1]].astype(float) for j in range(3)) + last[p[:, 3]]
    cost = length + sum(last[p[:, j]].astype(float) for j in range(3))
    order = np.lexsort((*p.T[::-1], length, cost))[:50]
    choices, tied = rank_sources(hop, last, 4, 50)
    assert np.array_equal(choices, p[order])
    assert np.array_equal(tied, [np.isclose(cost, cost[i], rtol=1e-12).sum() > 1 for i in order])


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
    hop = np.linalg.norm(x[:, None] - x, axis=-1) + 0.001
    p = np.array(list(permutations(range(30), 4)))
    cost = sum(hop[p[:, j], p[:, j + 1]] for j in range(3))
    choices, tied = rank_sources(hop, np.ones(30), 4, 10)
    found = [sum(hop[a, b] for a, b in pairwise(c)) for c in choices]
    assert np.allclose(found, np.sort(cost)[:10])
    assert tied.all()


@settings(max_examples=50, deadline=None)
@given(pools(), st.integers(2, 4), SEEDS)
def test_the_edge_rule_is_kept_among_sources_only(d, m, seed):
    a, tasks = made(d), tasks_of(len(d), seed)
    t = len(d) - 1

    def joined(x, y):
        return tasks[x].modality == tasks[y].modality or tasks[x].label == tasks[y].label

    def kept(path):
        return all(joined(x, y) for x, y in pairwise(path))

    ask = dict(affinity=a, target=name(t), sources=m, top=10_000, allowed=edges(tasks))
    if any(map(kept, permutations(range(t), m))):
        same(best_paths(**ask), ranked(a.distance, t, m, may=kept), 10_000)
    elif m <= t:
        with pytest.raises(InputError, match="allowed hops"):
            best_paths(**ask)


@settings(max_examples=30, deadline=None)
@given(pools(infinite=True, signed=False), SEEDS, st.randoms())
def test_graph_communities_and_landmarks_ignore_order(d, seed, random):
    a, tasks = made(d), tasks_of(len(d), seed)
    graph = source_graph(a, tasks)
    random.shuffle(tasks)
    nodes = list(graph.nodes(data=True))
    links = [(v, u, x) for u, v, x in graph.edges(data=True)]
    random.shuffle(nodes)
    random.shuffle(links)
    other = nx.Graph()
    other.add_nodes_from(nodes)
    other.add_edges_from(links)
    assert nx.utils.graphs_equal(graph, source_graph(a, tasks))
    assert nx.utils.graphs_equal(graph, other)
    for n, cut in product(range(1, len(d) + 1), (busiest, strained)):
        parts = communities(graph, n, cut)
        assert parts == communities(other, n, cut)
        assert len(parts) >= n
        assert sorted(chain.from_iterable(parts)) == sorted(graph)
        firsts = landmarks(graph, parts)
        assert firsts == landmarks(other, parts)
        assert all(first in part for first, part in zip(firsts, parts))


@settings(max_examples=30, deadline=None)
@given(pools(symmetric=True, signed=False), SEEDS, st.integers(1, 3), st.randoms())
def test_the_landmark_strategy_ignores_the_order_of_files(d, seed, n, random):
    "Tasks in another order, and the affinity's rows in a third, as from folders that list differently."
    a, tasks = made(d), tasks_of(len(d), seed)
    new = list(range(len(d)))
    random.shuffle(new)
    b = made(d[np.ix_(new, new)], [a.names[i] for i in new])
    other = random.sample(tasks, len(tasks))
    assert landmark_communities(a, tasks, "t00", n) == landmark_communities(b, other, "t00", n)
    try:
        expected = landmark_paths(a, tasks, "t00", n)
    except InputError:
        with pytest.raises(InputError):
            landmark_paths(b, other, "t00", n)
    else:
        assert expected == landmark_paths(b, other, "t00", n)


@settings(max_examples=40, deadline=None)
@given(pools(signed=False), SEEDS, st.integers(1, 4), st.sampled_from([busiest, strained]))
def test_landmark_paths_are_those_of_the_paper(d, seed, n, cut):
    "k is a landmark, i another source of its community and joined to it; among these the cheapest."
    a, tasks = made(d), tasks_of(len(d), seed)
    n = min(n, len(d) - 1)
    graph = source_graph(a, tasks, "t00")
    parts = communities(graph, n, cut)
    may = set()
    for first, part in zip(landmarks(graph, parts), parts):
        joined = set(part) & set(graph[first])
        may |= {(a.names.index(first), a.names.index(second)) for second in joined}
    try:
        restricted = landmark_paths(a, tasks, "t00", n_communities=n, top=100, cut=cut)
    except InputError as e:
        assert "allowed hops" in str(e)
        assert not may
        return
    same(restricted, ranked(a.distance, 0, 2, may=may.__contains__), 100)
    least = best_paths(a, "t00", top=1)[0].cost
    assert restricted[0].cost >= least - 1e-11 * abs(least)


def test_rounding_does_not_hide_a_tie_of_landmarks():
    "The sums .1 + .2 + .3 and .3 + .2 + .1 differ in the last digit; the first name is the landmark all the same."
    graph = nx.Graph()
    for hub, lengths in {"a": (0.1, 0.2, 0.3), "b": (0.3, 0.2, 0.1)}.items():
        graph.add_weighted_edges_from(((hub, other, d) for other, d in zip("xyz", lengths)), weight="d")
    graph.add_weighted_edges_from([("x", "y", 9), ("y", "z", 9)], weight="d")
    nx.set_node_attributes(graph, 0.5, "domain_cases")
    assert 0.1 + 0.2 + 0.3 > 0.3 + 0.2 + 0.1
    assert landmarks(graph, [tuple(graph)]) == ["a"]


def test_lengths_of_edges_that_are_none():
    "An infinite distance is no edge; one that is negative or not a number is refused by the names of its tasks."
    tasks, d = tasks_of(6, 0), np.random.default_rng(0).random((6, 6))
    for wrong in (np.nan, -0.1):
        graph = nx.complete_graph(["a", "b", "c"])
        nx.set_edge_attributes(graph, 1.0, "d")
        graph.edges["a", "c"]["d"] = wrong
        with pytest.raises(InputError, match="between a and c") as e:
            communities(graph, 2)
        assert str(e.value).endswith(".")
        assert ". " not in str(e.value).replace("-0.1", "")
        a, b, _ = next(iter(source_graph(made(d), tasks).edges(data="d")))
        bad, at = d.copy(), (int(a[1:]), int(b[1:]))
        bad[at] = bad[at[::-1]] = wrong
        with pytest.raises(InputError, match=f"between {a} and {b}"):
            source_graph(made(bad), tasks)
    far = d.copy()
    far[at] = np.inf
    graph = source_graph(made(far), tasks)
    assert not graph.has_edge(a, b)
    assert len(graph) == 6
    graph = nx.Graph([("a", "b", {"d": 1.0}), ("b", "c", {"d": np.inf})])
    assert communities(graph, 1) == [("a", "b"), ("c",)]  # apart from the start


def test_a_domain_counts_each_patient_once():
    tasks = tasks_of(12, 0)
    graph = source_graph(made(1.0 - np.eye(12)), tasks)
    assert all(graph.nodes[x.name]["domain_cases"] == PATIENTS[x.site] for x in tasks)


def test_exclude():
    rng = np.random.default_rng(0)
    a = made(rng.random((6, 6)))
    for m in (1, 2, 3):
        every = best_paths(a, "t00", sources=m, top=1000)
        left = best_paths(a, "t00", sources=m, top=1000, exclude=("t03", "t05"))
        assert [p.sources for p in left] == [p.sources for p in every if not {"t03", "t05"} & set(p.sources)]
    assert best_paths(a, "t00", exclude="t03") == best_paths(a, "t00", exclude=["t03"])


@pytest.mark.parametrize(
    "ask, sentence",
    [
        (dict(target="t0l"), "no task t0l: choose one of its 5 names"),
        (dict(exclude=["nobody"]), "no task nobody"),
        (dict(sources=0), "0 sources: ask for at least one"),
        (dict(sources=5), "leaves 4 possible sources"),
        (dict(sources=3, exclude=["t01", "t02"]), "leaves 2 possible sources"),
        (dict(top=0), "at least one"),
        (dict(lam=-1), "not negative"),
        (dict(lam=np.nan), "not negative"),
        (dict(forbidden=["t01"]), "pairs of names"),
        (dict(forbidden=[("t01", "t9")]), "no task t9"),
        (dict(landmarks={"t1": []}), "no task t1"),
        (dict(landmarks={"t01": ["t02"], "t03": ["t02"]}), "t02 is in the communities of two landmarks"),
        (dict(landmarks={"t01": []}), "allowed hops"),
        (dict(budget=-1), "cannot be kept"),
        (dict(budget=np.nan), "cannot be kept"),
        (dict(budget=10, steps=0), "cannot be kept"),
        (dict(already_trained=["t9"]), "no task t9"),
        (dict(budget=999, steps=1000), "trains 0 of 2 sources on the way to t00, and no path of 2 is trained yet"),
        (dict(budget=0, already_trained=[("t01", "t00")]), "the allowed hops and the budget"),
        (dict(sources=2.0), "number of sources is 2.0"),
        (dict(sources="2"), "number of sources is '2'"),
        (dict(top=2.5), "number of paths is 2.5"),
        (dict(landmarks=["t01", "t02"]), "dict from each landmark"),
        (dict(allowed=np.ones((5, 5), bool)), "give a DataFrame"),
        (dict(allowed=pd.DataFrame(True, ["t01"] * 2, ["t01", "t02"])), "each name once"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(ask, sentence):
    with pytest.raises(InputError, match=sentence):
        best_paths(made(1.0 - np.eye(5)), **{"target": "t00", **ask})


def test_a_missing_number_is_named():
    d = 1.0 - np.eye(4)
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
    d = 1.0 - np.eye(4)
    for weights, sentence in (
        ({}, "weighs no term"),
        ({"a": 0.0}, "weighs no term"),
        ({"b": 1.0}, "weighs the term 'b' but does not hold it: its terms are a"),
    ):
        with pytest.raises(InputError, match=sentence):
            best_paths(Affinity(tuple("wxyz"), {"a": d}, weights), "w")


def test_a_term_without_weight_is_never_read():
    "Neither in the search, nor in the shares, nor in an explanation; whatever it holds."
    a = made(np.random.default_rng(0).random((6, 6)))
    spoilt = replace(a, terms=a.terms | {"gone": np.full((6, 6), np.nan)}, weights=a.weights | {"gone": 0.0})
    assert best_paths(spoilt, "t00", 3) == best_paths(a, "t00", 3)
    best = best_paths(a, "t00")[0]
    assert str(explain(best, spoilt)) == str(explain(best, a))
    assert hop_table(best, spoilt).equals(hop_table(best, a))


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
    assert n * n <= sum(read) < 1.01 * n * n
    assert peak < 2 * 8 * n * n + 8 * 2**20


def test_the_table_ranks_within_target_and_number():
    a = made(np.random.default_rng(0).random((6, 6)))
    joined = []
    for m, target in product((2, 1), ("t00", "t01")):
        joined += best_paths(a, target, sources=m, top=2)
    table = path_table(joined)
    assert table.equals(path_table(iter(joined)))
    assert list(table) == ["rank", "path", "sources", "cost", "length", "a", "b", "tied"]
    assert table["rank"].tolist() == [1, 2] * 4
    assert table["sources"].tolist() == [2] * 4 + [1] * 4
    assert list(path_table([])) == ["rank", "path", "sources", "cost", "length", "tied"]


@settings(max_examples=40, deadline=None)
@given(pools(infinite=True, least=3))
def test_side_by_side_and_the_rule_for_the_number(d):
    a, found = made(d), []
    for m in (1, 2, 3):
        try:
            found += best_paths(a, "t00", sources=m, top=2)
        except InputError:
            pass
    if not found:
        with pytest.raises(InputError):
            side_by_side(a, "t00", top=2)
        return
    beside = side_by_side(a, "t00", top=2)
    assert beside == found
    numbers = [len(p.sources) for p in found]
    if 1 in numbers:
        paper = 2 if 2 in numbers else 1
        assert recommend(beside) == found[numbers.index(paper)]

    def as_many_as_possible(paths):
        return max(len(p.sources) for p in paths)

    assert recommend(beside, as_many_as_possible) == found[numbers.index(max(numbers))]
    for wrong in ("no such rule", lambda paths: 9):
        with pytest.raises(InputError, match="rule"):
            recommend(beside, wrong)


def test_side_by_side_takes_one_number_too():
    a = made(np.random.default_rng(0).random((5, 5)))
    for number in (2, np.int64(2)):
        assert side_by_side(a, "t00", sources=number, top=3) == best_paths(a, "t00", 2, 3)
    with pytest.raises(InputError, match="number of sources is 2.0"):
        side_by_side(a, "t00", sources=2.0)


def test_landmarks_with_a_community_of_one_name():
    a = made(np.random.default_rng(0).random((5, 5)))
    assert [p.sources for p in best_paths(a, "t00", landmarks={"t01": "t02"})] == [("t01", "t02")]


@pytest.mark.parametrize("score", ["leep", "h_score"])
def test_a_score_drives_the_search_with_its_sign_turned(score):
    """The best path is that of the highest scores. Positive scores make negative distances,
    with which more sources cost less until they are shifted."""
    table = np.random.default_rng(0).random((6, 6)) - (score == "leep")
    names = names_of(range(6))
    turned, shifted = (Affinity(names, {score: m}, {score: 1.0}) for m in (-table, table.max() - table))

    def total(path):
        return sum(table[hop] for hop in hops_of(path, 0)) + sum(table[v, 0] for v in path[:-1])

    for m in (1, 2, 3):
        highest = max(permutations(range(1, 6), m), key=total)
        assert best_paths(turned, "t00", m)[0].sources == names_of(highest)
        assert best_paths(shifted, "t00", m)[0].sources == names_of(highest)
    growing = [p.cost for p in side_by_side(shifted, "t00")]
    assert growing == sorted(growing)
    plain = [p.cost for p in side_by_side(turned, "t00")]
    assert plain == sorted(plain, reverse=score == "h_score")


def test_a_rule_of_ones_own_has_a_name(monkeypatch):
    monkeypatch.setitem(NUMBER_RULES, "direct", lambda paths: 1)
    assert len(recommend(side_by_side(made(1 - np.eye(5)), "t00"), "direct").sources) == 1


@settings(max_examples=60, deadline=None)
@given(pools(infinite=True), st.integers(1, 3), LAMS, SEEDS, st.booleans())
def test_probabilities_against_a_recount(d, m, lam, seed, restricted):
    """Each replicate is searched by enumeration under the same restrictions.
    Shares, interval and runner-up are counted by hand."""
    a, rng, n = made(d), np.random.default_rng(seed), len(d)
    drawn = rng.random((n, n)) < 0.2 if restricted else np.zeros((n, n), bool)
    barred = set(map(tuple, np.argwhere(drawn).tolist()))

    def may(path):
        return barred.isdisjoint(hops_of(path, 0))

    asked = dict(lam=lam, forbidden=[names_of(hop) for hop in barred])
    order, _ = ranked(a.distance, 0, m, lam, may)
    if not order:
        return
    replicates = np.stack([d + rng.integers(0, 2, d.shape) / 2 for _ in range(9)])
    best = best_paths(a, "t00", m, 1, **asked)[0]
    why = explain(best, a, replicates, **asked)
    winners = [ranked(x, 0, m, lam, may)[0][0].names for x in replicates]
    said = {tuple(row.path.split(" -> ")[:-1]): row.probability for row in why.winners.itertuples()}
    assert {path: round(9 * share) for path, share in said.items()} == Counter(winners)
    assert why.path.sources == best.sources
    assert why.probability == winners.count(best.sources) / 9
    assert why.any_order == sum(set(w) == set(best.sources) for w in winners) / 9
    assert str(why).count("\n") >= 1
    assert why.winners["probability"].is_monotonic_decreasing
    assert sum(said.values()) == pytest.approx(1)
    check_runner_up(why, order, replicates, lam)


def check_runner_up(why, order, replicates, lam):
    "The runner-up of an explanation and what it lacks, against the enumerated `order`."
    if len(order) == 1:
        assert why.runner_up is None
        assert why.lacks is None
        assert why.interval is None
        return
    best = order[0]
    elsewhere = [x for x in order if set(x.names) != set(best.names)]
    other = elsewhere[0] if elsewhere else order[1]
    assert why.runner_up.sources == other.names
    gaps = []
    for x in replicates:
        more, _ = definition(x, other.path, 0, lam)
        less, _ = definition(x, best.path, 0, lam)
        gaps.append(float(more - less))
    assert why.interval == pytest.approx(tuple(np.quantile(gaps, (0.05, 0.95))), abs=1e-9)
    difference = why.lacks["difference"]
    assert difference["cost"] == pytest.approx(float(other.cost - best.cost), abs=1e-9, rel=1e-9)
    assert difference[["a", "b"]].sum() == pytest.approx(difference["cost"], abs=1e-9, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(pools(), st.integers(1, 4), LAMS)
def test_the_summands_are_those_of_the_cost(d, m, lam):
    if m >= len(d):
        return
    a = made(d)
    path = best_paths(a, "t00", m, 1, lam=lam)[0]
    table = hop_table(path, a, lam)
    assert len(table) == m + (m - 1) * (lam > 0)
    assert table["cost"].sum() == pytest.approx(path.cost)
    assert table.loc[table["kind"] == "hop", "cost"].sum() == pytest.approx(path.length)
    assert table[["a", "b"]].sum().to_dict() == pytest.approx(dict(path.terms))


def test_explaining_a_path_that_is_not_the_best():
    a = made(np.random.default_rng(0).random((6, 6)))
    best, *_, other = best_paths(a, "t00")
    why = explain(other, a)
    assert why.runner_up.sources == best.sources
    assert why.lacks.at["cost", "difference"] < 0
    assert "less" in str(why)
    for part in (why.winners, why.probability, why.any_order, why.interval):
        assert part is None
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
    assert why.probability is not None
    assert why.probability == by_hand.probability
    assert why.winners.equals(by_hand.winners)
    assert "resampled" in str(why)
    assert explain(best, a).probability is None
    assert explain(best, held, np.stack([a.distance] * 3)).probability == 1
    light = replace(held, weights={"a": 1.0, "b": 0.0})  # under the current weights
    alone = explain(best, replace(light, replicates={}), terms["a"].astype(float))
    assert explain(best, light).winners.equals(alone.winners)


def test_an_explanation_says_that_the_cost_did_not_decide():
    said = "Another path costs the same; the shorter length decided, not the cost."
    tied, single = made(1.0 - np.eye(4)), made(np.random.default_rng(0).random((4, 4)))
    for a in (tied, single):
        best = best_paths(a, "t00")[0]
        assert best.tied == (a is tied)
        assert (said in str(explain(best, a)).split("\n")) == best.tied


@pytest.mark.parametrize(
    "sources, extra, sentence",
    [
        (("t01", "t01"), {}, "meets one task twice"),
        (("t00", "t01"), {}, "meets one task twice"),
        (("t01", "t02"), {"top": 3}, "leave top out"),
        (("t01", "t02"), {"sources": 2, "top": 3}, "leave sources and top out"),
    ],
)
def test_what_cannot_be_explained(sources, extra, sentence):
    with pytest.raises(InputError, match=sentence):
        explain(TransferPath(sources, "t00", 1.0, 1.0), made(1.0 - np.eye(4)), **extra)


def test_replicates_that_do_not_fit_are_named():
    a = made(np.random.default_rng(0).random((5, 5)))
    best = best_paths(a, "t00")[0]
    with pytest.raises(InputError, match=r"Replicate 0 .* shape \(4, 4\)"):
        explain(best, a, np.ones((2, 4, 4)))
    bad = np.ones((2, 5, 5))
    bad[1, 1, 2] = np.nan
    with pytest.raises(InputError, match="Replicate 1 .* from t01 to t02 is not a number"):
        explain(best, a, bad)
    with pytest.raises(InputError, match="at least one"):
        explain(best, a, np.ones((0, 5, 5)))


def test_no_path_is_the_best_where_there_is_none():
    a = made(np.random.default_rng(0).random((5, 5)))
    best, nowhere = best_paths(a, "t00")[0], np.full((5, 5), np.inf)
    assert explain(best, a, [a.distance, nowhere, a.distance]).probability == 2 / 3
    none = explain(best, a, [nowhere] * 3)
    assert none.probability == 0
    assert none.winners.empty
    assert none.interval is None


def test_what_an_oca_similarity_contributes():
    "A term that is a similarity enters as 1 - R, in the search as in the affinity's own distance."
    rng = np.random.default_rng(1)
    terms = {"oca": rng.random((6, 6)), "ica": 100 * rng.random((6, 6))}
    a = Affinity(names_of(range(6)), terms, {"oca": 2.4756, "ica": 0.0044})
    same(best_paths(a, "t00", 3, 200), ranked(a.distance, 0, 3), 200)


def test_single_precision_is_searched_exactly():
    rng = np.random.default_rng(2)
    a = Affinity(names_of(range(7)), {"d": rng.random((7, 7), dtype=np.float32)}, {"d": 1.0})
    for m in (2, 3, 4):
        same(best_paths(a, "t00", m, 400), ranked(a.distance, 0, m), 400)


def test_lengths_and_costs_do_not_depend_on_the_order_of_summation():
    x = [0.1, 0.2, 0.3, 0.4, 0.5, 0.7]
    d = np.zeros((4, 4))
    results = set()
    for p in permutations(x):
        d[0, 1], d[1, 2], d[2, 3], d[0, 3], d[1, 3] = p[:5]
        results.add((path_cost(d, [0, 1, 2], 3), sum(Fraction(v) for v in p[:5])))
        assert path_length(d, [0, 1, 2], 3) == float(Fraction(p[0]) + Fraction(p[1]) + Fraction(p[2]))
    assert len(results) == 6
