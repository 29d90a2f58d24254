"""The published scores against slow transcriptions of their definitions that use nothing of the package."""

import itertools
import json
import os
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from scipy.special import softmax
from sklearn.covariance import ledoit_wolf
from sklearn.datasets import load_iris, load_wine
from threadpoolctl import threadpool_limits

from seqtransfer import scores
from seqtransfer.core import InputError
from seqtransfer.scores import (
    SCORES,
    balanced_sample,
    cc_fv,
    class_consistency,
    feature_variety,
    gaussian_w2,
    gbc,
    h_score,
    h_score_shrunk,
    leep,
    logme,
    nce,
    otce,
    score_all,
    transport,
    transrate,
)

IRIS, KIND = load_iris(return_X_y=True)
FEATURE_SCORES = "h_score", "h_score_shrunk", "gbc", "gbc_spherical", "transrate", "logme"
OF_FEATURES = [name for name, (_, needs) in SCORES.items() if "features" in needs]


@pytest.fixture(scope="module", autouse=True)
def one_core():
    "Small products from many threads are slow on a busy machine."
    with threadpool_limits(1, "blas"):
        yield


def voxels(seed, n=40, d=4, c=3, spread=1.0):
    "All arrays a score may need: every class and case is there, features follow the labels a little."
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % c)
    source = rng.permutation(np.arange(n + 5) % 2)
    mixing = np.eye(d) + 0.3 * rng.normal(size=(d, d))
    features = (rng.normal(size=(n, d)) + spread * rng.normal(size=(c, d))[labels]) @ mixing
    return {
        "features": features,
        "labels": labels,
        "softmax": softmax(rng.normal(size=(n, 4)), axis=1),
        "cases": np.arange(n) % 3,
        "source_features": rng.normal(size=(n + 5, d)) @ mixing,
        "source_labels": source,
    }


def some(given, *names):
    "The arrays of these names."
    return [given[name] for name in names]


def computed(name, given):
    "One score of the package."
    function, needs = SCORES[name]
    return function(*some(given, *needs))


def literal(name, given):
    "The same score by its definition, as written down below."
    _, needs = SCORES[name]
    return LITERAL[name](*some(given, *needs))


# The definitions, written down once more.
def literal_nce(theta, y):
    z, n, total = [int(np.argmax(t)) for t in theta], len(y), 0.0
    for a in set(z):
        inside = [y[i] for i in range(n) if z[i] == a]
        for c in set(inside):
            total += inside.count(c) / n * np.log(inside.count(c) / len(inside))
    return total


def literal_leep(theta, y):
    total = 0.0
    for n in range(len(y)):
        expected = 0.0
        for z in range(theta.shape[1]):
            joint = mass = 0.0
            for m in range(len(y)):
                mass += theta[m, z]
                joint += theta[m, z] * (y[m] == y[n])
            if mass > 0:
                expected += joint / mass * theta[n, z]
        total += np.log(expected)
    return total / len(y)


def covariance_of(f):
    "A matrix also for one feature."
    return np.atleast_2d(np.cov(f.T))


def replaced_by_mean(f, y):
    "Each row replaced by the mean of its class."
    return np.array([f[y == c].mean(0) for c in y])


def literal_h_score(f, y):
    inverse = np.linalg.pinv(covariance_of(f), rcond=1e-12)
    return np.trace(inverse @ covariance_of(replaced_by_mean(f, y)))


def literal_h_score_shrunk(f, y):
    covariance, alpha = ledoit_wolf(f)
    return (1 - alpha) * np.trace(np.linalg.pinv(covariance) @ covariance_of(replaced_by_mean(f, y)))


def gaussian_of(f, spherical):
    "Mean and diagonal covariance of the rows of a class."
    variances = [max(1e-4, np.mean((feature - np.mean(feature)) ** 2)) for feature in f.T]
    if spherical:
        variances = [np.mean(variances)] * len(variances)
    return f.mean(0), np.diag(variances)


def bhattacharyya(m, s, n, t):
    "The distance of two Gaussians by matrices, as it is defined."
    middle = (s + t) / 2
    apart = (m - n) @ np.linalg.inv(middle) @ (m - n) / 8
    unlike = np.log(np.linalg.det(middle) / np.sqrt(np.linalg.det(s) * np.linalg.det(t))) / 2
    return apart + unlike


def literal_gbc(f, y, spherical=False):
    total = 0.0
    for a in set(y):
        for b in set(y) - {a}:
            one, other = gaussian_of(f[y == a], spherical), gaussian_of(f[y == b], spherical)
            total -= np.exp(-bhattacharyya(*one, *other))
    return total


def literal_transrate(f, y):
    "By N x N determinants, which are those of D x D."

    def rate(g):
        return np.linalg.slogdet(np.eye(len(g)) + g @ g.T / (len(g) * 1e-4))[1] / 2

    f = f - f.mean(0)
    return rate(f) - sum(np.mean(y == c) * rate(f[y == c]) for c in set(y))


def minus_log_p(log_precisions, f, target):
    "Minus the evidence of N labels from their N x N covariance."
    n = len(f)
    covariance = f @ f.T * np.exp(-log_precisions[0]) + np.eye(n) * np.exp(-log_precisions[1])
    sign, size = np.linalg.slogdet(covariance)
    if sign <= 0:
        return np.inf
    return (n * np.log(2 * np.pi) + size + target @ np.linalg.solve(covariance, target)) / 2


def literal_logme(f, y):
    "Climbed in both precisions from several starts."
    options = {"xatol": 1e-7, "fatol": 1e-10, "maxiter": 2000}
    starts = ((0.0, 0.0), (5.0, 2.0), (-3.0, 3.0))
    evidence = []
    for c in set(y):
        of_class = (f, (y == c).astype(float))
        found = [minimize(minus_log_p, start, of_class, method="Nelder-Mead", options=options) for start in starts]
        evidence.append(-min(end.fun for end in found) / len(f))
    return np.mean(evidence)


def literal_transport(f, y, fs, ys):
    "The linear programme itself: its cost, and the mean log probability of target given source classes."
    n, m = len(fs), len(f)
    cost = np.array([[((fs[i] - f[j]) ** 2).sum() for j in range(m)] for i in range(n)])
    masses_of_source = [np.kron(np.eye(n)[i], np.ones(m)) for i in range(n)]
    masses_of_target = [np.kron(np.ones(n), np.eye(m)[j]) for j in range(m)]
    equal = np.array(masses_of_source + masses_of_target)
    found = linprog(cost.ravel(), A_eq=equal, b_eq=[1 / n] * n + [1 / m] * m, method="highs")
    plan, total = found.x.reshape(n, m), 0.0
    for a in set(ys):
        for c in set(y):
            p, given = plan[ys == a][:, y == c].sum(), plan[ys == a].sum()
            if p > 1e-12:
                total += p * np.log(p / given)
    return found.fun, total


def literal_w2(a, b):
    "tr (S^1/2 T S^1/2)^1/2 is the sum of the roots of the eigenvalues of S T."
    s, t = covariance_of(a), covariance_of(b)
    overlap = np.sqrt(np.linalg.eigvals(s @ t).real.clip(0)).sum()
    return np.sqrt(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t) - 2 * overlap)


def literal_consistency(f, y, cases):
    w2, people = [], sorted(set(cases))
    for c in set(y):
        of_cases = [f[(y == c) & (cases == i)] for i in people]
        w2.append(np.mean([literal_w2(a, b) for a, b in itertools.combinations(of_cases, 2)]))
    return np.mean(w2)


def literal_variety(f, cases):
    variety = []
    for i in set(cases):
        directions = [row / np.sqrt((row**2).sum()) for row in f[cases == i]]
        pairs = itertools.combinations(directions, 2)
        energies = [((u - v) @ (u - v) + 1e-3) ** -0.5 for u, v in pairs]
        variety.append(1 / np.mean(energies))
    return np.mean(variety)


def literal_cc_fv(f, y, cases):
    return np.log(literal_variety(f, cases) / literal_consistency(f, y, cases))


def literal_otce(f, y, fs, ys):
    _, entropy = literal_transport(f, y, fs, ys)
    return entropy


LITERAL = {
    "nce": literal_nce,
    "leep": literal_leep,
    "h_score": literal_h_score,
    "h_score_shrunk": literal_h_score_shrunk,
    "gbc": literal_gbc,
    "gbc_spherical": partial(literal_gbc, spherical=True),
    "transrate": literal_transrate,
    "logme": literal_logme,
    "otce": literal_otce,
    "cc_fv": literal_cc_fv,
}


@pytest.mark.parametrize(
    "name, value",
    [
        ("leep", -0.9855696),
        ("h_score", 1.1918988),
        ("h_score_shrunk", 1.1778425),
        ("gbc", -0.2306856),
        ("gbc_spherical", -0.3300882),
        ("transrate", 0.5894054),
        ("logme", -0.1600602),
    ],
)
def test_check_values(name, value):
    "Seven decimals, of the score and of its transcription here."
    given = {"features": IRIS, "labels": KIND, "softmax": softmax(IRIS, axis=1)}
    assert computed(name, given) == pytest.approx(value, abs=5e-8)
    assert literal(name, given) == pytest.approx(value, abs=5e-8)


def test_check_value_of_entropy():
    assert nce(np.full((150, 5), 0.2), KIND) == pytest.approx(-1.0986123, abs=5e-8)


def test_check_values_of_transport():
    x, kind = load_wine(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    halves = x[1::2], kind[1::2], x[::2], kind[::2]
    published = pytest.approx((5.7022904, -0.2309804), abs=5e-8)
    assert literal_transport(*halves) == published
    assert (transport(*halves)[0], otce(*halves)) == published


def test_check_value_of_gaussians():
    published = pytest.approx(3.2337353, abs=5e-8)
    assert gaussian_w2(IRIS[:50], IRIS[50:100]) == published
    assert literal_w2(IRIS[:50], IRIS[50:100]) == published


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("seed, n, d, c", [(0, 40, 4, 3), (1, 25, 1, 2), (2, 24, 6, 2), (3, 36, 9, 4)])
def test_scores_are_their_definitions(name, seed, n, d, c):
    given = voxels(seed, n, d, c)
    assert computed(name, given) == pytest.approx(literal(name, given), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("name", ["h_score", "h_score_shrunk", "transrate", "logme"])
def test_more_features_than_voxels(name):
    given = voxels(5, n=15, d=22, c=2)
    assert computed(name, given) == pytest.approx(literal(name, given), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("spread", [0.0, 0.5, 20.0])
def test_logme_finds_the_highest_evidence(scale, spread):
    "Labels without any relation to the features, some, and nearly determined by them; in units large and small."
    f, y = some(voxels(11, n=30, d=5, c=2, spread=spread), "features", "labels")
    assert logme(scale * f, y) == pytest.approx(logme(f, y), abs=1e-9)
    assert logme(f, y) == pytest.approx(literal_logme(f, y), abs=1e-7)


def evidence_by_iteration(s2, z2, rest, n):
    "MacKay's fixed point, the way the authors climb, to a change below 1e-10."
    alpha = beta = 1.0
    for _ in range(200):
        t = alpha / beta
        gamma = (s2 / (s2 + t)).sum()
        m2 = (s2 * z2 / (s2 + t) ** 2).sum()
        error = (z2 / (1 + s2 / t) ** 2).sum() + rest
        alpha, beta = gamma / m2, (n - gamma) / error
    scale = len(s2) * np.log(alpha) + n * np.log(beta / 2 / np.pi) - np.log(alpha + beta * s2).sum()
    return (scale - beta * error - alpha * m2) / 2


@pytest.mark.parametrize("c", range(3))
def test_logme_where_the_published_iteration_ends(c):
    target = (KIND == c).astype(float)
    u, s, _ = np.linalg.svd(IRIS, full_matrices=False)
    z2 = (u.T @ target) ** 2
    rest = target @ target - z2.sum()
    evidence = evidence_by_iteration(s**2, z2, rest, n=150)
    assert scores._log_evidence(150, s**2, z2, rest) == pytest.approx(evidence, abs=1e-8)


@pytest.mark.parametrize("d, n", [(1, 5), (3, 9), (12, 6)])  # the last with covariances of rank 5
def test_w2_is_a_metric_of_gaussians(d, n):
    rng = np.random.default_rng(0)
    a, b, c = (rng.normal(size=(n + k, d)) * rng.uniform(0.2, 3, d) for k in range(3))
    assert gaussian_w2(a, b) == pytest.approx(literal_w2(a, b), rel=1e-6)
    assert gaussian_w2(b, a) == pytest.approx(gaussian_w2(a, b), rel=1e-9)
    assert gaussian_w2(a, c) <= gaussian_w2(a, b) + gaussian_w2(b, c)
    assert gaussian_w2(a, a) < 1e-6


def test_w2_of_points_is_their_distance():
    assert gaussian_w2(np.zeros((2, 3)), np.full((4, 3), 2.0)) == pytest.approx(12**0.5)


def test_w2_refusals():
    with pytest.raises(InputError, match="two rows"):
        gaussian_w2(IRIS[:1], IRIS)
    with pytest.raises(InputError, match="same features"):
        gaussian_w2(IRIS, IRIS[:, :2])


@pytest.mark.parametrize("name", SCORES)
@given(seed=st.integers(0, 10**6), c=st.integers(2, 4), d=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_neither_order_nor_names_matter(name, seed, c, d):
    given, rng = voxels(seed, n=30, d=d, c=c), np.random.default_rng(seed)
    value = computed(name, given)
    order, other = rng.permutation(30), rng.permutation(35)
    moved = {k: v[other if k.startswith("source") else order] for k, v in given.items()}
    moved["labels"] = np.array(["tumour", "a", "oedema", "b"])[moved["labels"]]
    moved["source_labels"] = 7 - moved["source_labels"]
    moved["cases"] = moved["cases"] * 2.5
    moved["softmax"] = moved["softmax"][:, ::-1]
    assert computed(name, moved) == pytest.approx(value, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("name", ["nce", "leep", "h_score", "gbc", "gbc_spherical", "transrate", "otce"])
@given(seed=st.integers(0, 10**6), times=st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_every_row_several_times_is_the_same_distribution(name, seed, times):
    given = voxels(seed, n=20, d=3, c=2)
    repeated = {k: np.repeat(v, times, axis=0) for k, v in given.items()}
    assert computed(name, repeated) == pytest.approx(computed(name, given), rel=1e-7, abs=1e-7)


def test_more_rows_make_shrinkage_less_and_evidence_more():
    "The three scores that do depend on the number of voxels, in the direction they should."
    f, y, cases = some(voxels(1, n=30, d=6, c=2), "features", "labels", "cases")
    many, many_y, many_cases = np.tile(f, (50, 1)), np.tile(y, 50), np.tile(cases, 50)
    assert h_score_shrunk(f, y) < h_score_shrunk(many, many_y) < h_score(f, y)
    assert logme(many, many_y) > logme(f, y)
    of_many = class_consistency(many, many_y, many_cases)
    assert of_many == pytest.approx(class_consistency(f, y, cases), rel=0.1)


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_leep_nce_and_entropy(seed, c, sources):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(50) % c)
    hard = np.eye(sources)[rng.integers(0, sources, 50)]
    soft = softmax(3 * rng.normal(size=(50, sources)), axis=1)
    p = np.bincount(y) / 50
    entropy = -(p * np.log(p)).sum()
    assert leep(hard, y) == pytest.approx(nce(hard, y), abs=1e-12)
    assert leep(np.full((50, sources), 1 / sources), y) == pytest.approx(-entropy, abs=1e-12)
    assert -entropy - 1e-12 <= nce(soft, y) <= 0
    assert leep(soft, y) <= 1e-12
    assert leep(soft, y) >= nce(soft, y) + np.log(soft.max(1)).mean() - 1e-12  # property 2 of Nguyen et al.
    assert leep(np.c_[soft, np.zeros(50)], y) == pytest.approx(leep(soft, y), abs=1e-12)


of_any_spread = given(
    seed=st.integers(0, 10**6),
    c=st.integers(2, 4),
    d=st.integers(1, 6),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
)


@of_any_spread
@settings(max_examples=40, deadline=None)
def test_bounds(seed, c, d, spread):
    f, y = some(voxels(seed, n=40, d=d, c=c, spread=spread), "features", "labels")
    assert 0 <= h_score(f, y) <= min(d, c - 1) + 1e-9
    assert -1e-12 <= h_score_shrunk(f, y) <= h_score(f, y) * 40 / 39 + 1e-9
    assert transrate(f, y) > -1e-9
    for spherical in (False, True):
        assert -c * (c - 1) - 1e-12 <= gbc(f, y, spherical) <= 0


@of_any_spread
@settings(max_examples=40, deadline=None)
def test_invariances(seed, c, d, spread):
    f, y = some(voxels(seed, n=40, d=d, c=c, spread=spread), "features", "labels")
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d, d)) + 3 * np.eye(d)
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    assert h_score(f @ mixing + 5, y) == pytest.approx(h_score(f, y), abs=1e-6)
    assert h_score(np.hstack([f, f]), y) == pytest.approx(h_score(f, y), abs=1e-6)
    assert gbc(f + 7, y, True) == pytest.approx(gbc(f, y, True), abs=1e-9)
    assert transrate(f @ rotation - 3, y) == pytest.approx(transrate(f, y), abs=1e-8)
    assert logme(np.c_[f, np.zeros(40)] * 50, y) == pytest.approx(logme(f, y), abs=1e-8)
    assert logme(f @ rotation, y) == pytest.approx(logme(f, y), abs=1e-8)


def test_gbc_variances_have_a_floor():
    "Two constant classes 0.02 apart: B = 0.02^2 / 1e-4 / 8 = 1/2. The floor comes before the mean over features."
    f, y = np.array([[0.0], [0.0], [0.02], [0.02]]), np.array([0, 0, 1, 1])
    assert gbc(f, y) == pytest.approx(-2 * np.exp(-0.5))
    assert gbc(f, y, spherical=True) == pytest.approx(-2 * np.exp(-0.5))
    wide = np.c_[f, [-1, 1, -1, 1]]
    mean_variance = (1 + 1e-4) / 2
    assert gbc(wide, y, spherical=True) == pytest.approx(-2 * np.exp(-(0.02**2) / mean_variance / 8), rel=1e-12)


@pytest.mark.parametrize("n, d", [(12, 4), (30, 30), (200, 5), (2000, 3)])
def test_shrinkage_of_noise_is_scikit_learns(n, d):
    rng = np.random.default_rng(n)
    spherical = rng.normal(size=(n, d))
    y = np.arange(n) % 2
    for f in (spherical, rng.normal(size=(n, d)) * np.linspace(1, 2, d)):
        covariance, alpha = ledoit_wolf(f)
        mine, my_alpha = scores._shrunk_covariance(f)
        assert my_alpha == pytest.approx(alpha, abs=1e-10)
        assert np.allclose(mine, covariance, rtol=1e-10)
        assert h_score_shrunk(f, y) == pytest.approx(literal_h_score_shrunk(f, y), abs=1e-9)


def test_features_that_are_sums_of_others_are_rounding():
    "Many voxels in single precision, far from 0, with every direction twice."
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 30_000)
    f = (rng.normal(size=(30_000, 6)) + 0.3 * y[:, None] + 50).astype(np.float32)
    twice = np.hstack([f, f[:, ::-1]])
    assert h_score(twice, y) == pytest.approx(h_score(f, y), abs=1e-9)
    assert logme(twice, y) == pytest.approx(logme(f, y), abs=1e-3)
    assert gaussian_w2(twice, twice + 1) == pytest.approx(12**0.5, rel=1e-6)


@pytest.mark.parametrize("n, d, c", [(60, 5, 2), (100, 30, 3)])
def test_h_score_of_chance(n, d, c):
    rng = np.random.default_rng(0)
    values = [h_score(rng.normal(size=(n, d)), np.arange(n) % c) for _ in range(300)]
    assert np.mean(values) == pytest.approx(d * (c - 1) / (n - 1), abs=5 * np.std(values) / 300**0.5)


def test_transrate_cannot_see_mirror_images():
    f = np.random.default_rng(0).normal(size=(50, 3)) + 10
    assert transrate(np.r_[f, -f], np.repeat([0, 1], 50)) == pytest.approx(0, abs=1e-9)
    assert transrate(np.r_[f, -f[:25]], np.repeat([0, 1], [50, 25])) > 0.1


@given(st.lists(st.integers(0, 4), min_size=2, max_size=200), st.integers(5, 60), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_balanced_sample(labels, n, seed):
    labels = np.array(labels)
    rows = balanced_sample(labels, n, seed)
    assert len(rows) == min(n, len(labels))
    assert (np.diff(rows) > 0).all()
    taken, there = np.bincount(labels[rows], minlength=5), np.bincount(labels, minlength=5)
    cut = taken < there  # no class that lost voxels is more than one behind another
    assert not cut.any() or taken[cut].min() >= taken.max() - 1


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_transport_keeps_the_masses(seed):
    given = voxels(seed, n=30, d=3, c=3)
    _, needs = SCORES["otce"]
    cost, joint = transport(*some(given, *needs))
    assert np.allclose(joint.sum(0), np.bincount(given["labels"]) / 30)
    assert np.allclose(joint.sum(1), np.bincount(given["source_labels"]) / 35)
    expected, entropy = literal_transport(*some(given, *needs))
    assert cost == pytest.approx(expected, rel=1e-9)
    assert computed("otce", given) == pytest.approx(entropy, abs=1e-9)


@pytest.fixture
def uneven():
    "Features of 4000 voxels and their classes, one of which is rare; and the features of another 4000."
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [3900, 100])
    return *(rng.normal(size=(4000, 3)) + 2 * y[:, None] for _ in range(2)), y


def test_otce_of_a_sample_is_balanced(uneven):
    f, _, y = uneven
    cost, joint = transport(f, y, f, y, sample=300)
    assert np.allclose(joint, np.diag([2 / 3, 1 / 3]))
    assert cost < 1e-12


def test_otce_of_a_sample_depends_on_the_seed_alone(uneven):
    f, other, y = uneven
    first = otce(f, y, other, y, sample=300)
    assert otce(f, y, other, y, sample=300) == first
    assert otce(f, y, other, y, sample=300, seed=1) != first


def test_otce_of_too_small_a_sample(uneven):
    f, _, y = uneven
    with pytest.raises(InputError, match="A sample of 1 voxels cannot hold 2 classes"):
        otce(f, y, f, y, sample=1)


@pytest.fixture
def three_classes():
    "Features, labels and cases of 60 voxels."
    return some(voxels(3, n=60, d=4, c=3), "features", "labels", "cases")


def test_consistency_is_a_mean_over_classes(three_classes):
    f, y, cases = three_classes
    each = []
    for c, background in ((0, 1), (1, 2), (2, 0)):
        two = np.isin(y, [c, background])
        each.append(class_consistency(f[two], y[two], cases[two], background=background))
    assert class_consistency(f, y, cases) == pytest.approx(np.mean(each))
    without_0 = np.log(feature_variety(f, cases) / np.mean(each[1:]))
    assert cc_fv(f, y, cases, background=0) == pytest.approx(without_0)


def test_a_class_with_one_voxel_has_no_gaussian(three_classes):
    f, y, cases = three_classes
    with_one_more = np.r_[f, f[:1]], np.r_[y, 9], np.r_[cases, 0]
    assert class_consistency(*with_one_more) == pytest.approx(class_consistency(f, y, cases))


def test_variety_is_that_of_directions(three_classes):
    f, _, cases = three_classes
    variety = feature_variety(f, cases)
    with_zeros = np.r_[f, np.zeros((3, 4))], np.r_[cases, cases[:3]]
    assert feature_variety(*with_zeros) == pytest.approx(variety)
    assert feature_variety(3 * f, cases) == pytest.approx(variety, abs=1e-12)


def test_variety_of_a_sample():
    ring, cases = np.random.default_rng(0).normal(size=(4000, 30)), np.arange(4000) % 2
    sampled, whole = (feature_variety(ring, cases, sample=n) for n in (200, 2000))
    assert sampled == pytest.approx(whole, rel=0.01)
    assert whole < 2**0.5
    assert feature_variety(ring, cases, sample=200) == sampled


def test_cc_fv_refusals():
    f, y, cases = IRIS, KIND, np.arange(150) % 5
    with pytest.raises(InputError, match="All 150 cases are 0"):
        cc_fv(f, y, 0 * cases)
    with pytest.raises(InputError, match="No class has two voxels"):
        cc_fv(f, y, KIND)
    with pytest.raises(InputError, match="same features in all cases"):
        cc_fv(np.ones((150, 4)), y, cases)
    with pytest.raises(InputError, match="Case 4 has fewer than two"):
        cc_fv(f * (cases < 4)[:, None], y, cases)


def test_degenerate_features():
    "Constant features separate nothing; they are not an error."
    f, y = np.ones((30, 3)), np.arange(30) % 3
    assert h_score(f, y) == h_score_shrunk(f, y) == transrate(f, y) == 0
    assert gbc(f, y) == gbc(f, y, True) == pytest.approx(-6)
    assert logme(0 * f, y) == pytest.approx(-(1 + np.log(2 * np.pi * 10 / 30)) / 2)
    assert logme(f, y) == pytest.approx(literal_logme(f, y), abs=1e-8)


def test_features_that_determine_a_class():
    telling = np.arange(8) > 4
    with pytest.raises(InputError, match="determine class object exactly"):
        logme(telling[:, None], np.where(telling, "object", "rest"))


@pytest.mark.parametrize("name", SCORES)
def test_sums_over_blocks(name, monkeypatch):
    given = voxels(2, n=50, d=4, c=3)
    whole = computed(name, given)
    monkeypatch.setattr(scores, "BLOCK", 7)
    assert computed(name, given) == pytest.approx(whole, rel=1e-10)


def as_list(v):
    return v.tolist()


def as_strided(v):
    return np.repeat(v, 2, axis=0)[::2]


def as_float(v, kind):
    return v.astype(kind) if v.dtype == float else v


KINDS = {  # how an array is given, and how exact the score then is
    "float32": (partial(as_float, kind="float32"), 1e-4),
    "float16": (partial(as_float, kind="float16"), 0.05),
    "list": (as_list, 1e-12),
    "strided": (as_strided, 1e-12),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_arrays(name, kind):
    given = voxels(4, n=40, d=3, c=2)
    before = {k: v.copy() for k, v in given.items()}
    change, loose = KINDS[kind]
    changed = {k: change(v) for k, v in given.items()}
    assert computed(name, changed) == pytest.approx(computed(name, given), rel=loose, abs=loose)
    assert all(np.array_equal(before[k], given[k]) for k in given)


def holding(v, value):
    "A copy in which one number is another."
    changed = v.copy()
    changed.flat[3] = value
    return changed


SPOILT = {
    "nan": lambda v: holding(v, np.nan),
    "inf": lambda v: holding(v, np.inf),
    "shorter": lambda v: v[:-1],
    "empty": lambda v: v[:0],
    "flat": lambda v: v.ravel(),
    "one class": lambda v: 0 * v,
    "words": lambda v: v.astype(str),
    "objects": lambda v: np.array([{}] * len(v)),
    "off": lambda v: v * 1.1,
    "negative": lambda v: v + [[-1.5, 1.5, 0, 0]],
}
WAYS = {
    "features": ("nan", "inf", "empty", "flat", "words"),
    "softmax": ("nan", "inf", "empty", "flat", "off", "negative", "words"),
    "source_features": ("nan", "empty", "shorter"),
    "labels": ("shorter", "one class", "objects", "empty"),
    "source_labels": ("shorter", "one class"),
    "cases": ("shorter", "one class", "objects"),
}
BAD = [(name, array, how) for name, (_, needs) in SCORES.items() for array in needs for how in WAYS[array]]


@pytest.mark.parametrize("name, array, how", BAD)
def test_what_cannot_be_scored_is_said_in_one_sentence(name, array, how):
    given = voxels(0)
    with pytest.raises(InputError) as e:
        computed(name, given | {array: SPOILT[how](given[array])})
    sentence = str(e.value)
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    assert ". " not in sentence
    assert "\n" not in sentence
    assert len(sentence) < 250


def test_labels_with_nan():
    f, y = some(voxels(0), "features", "labels")
    with pytest.raises(InputError, match="labels are of type float64 or hold NaN"):
        h_score(f, np.where(y == 0, np.nan, 1))


def test_features_of_another_layer():
    given = voxels(0)
    given["source_features"] = given["source_features"][:, :3]
    with pytest.raises(InputError, match="The source has 3 features and the target 4"):
        computed("otce", given)


def test_score_all():
    given = voxels(0)
    everything = score_all(**given)
    assert list(everything) == list(SCORES)
    assert all(type(value) is float for value in everything.values())
    assert all(np.isfinite(value) for value in everything.values())
    assert set(score_all(features=given["features"], labels=given["labels"])) == set(FEATURE_SCORES)


def test_score_all_refuses_an_array_that_no_score_needs():
    theta, y = some(voxels(0), "softmax", "labels")
    with pytest.raises(InputError, match="No score needs 'soft_max': try softmax"):
        score_all(soft_max=theta, labels=y)


def test_a_score_that_refuses_its_arrays_does_not_take_the_others_with_it():
    given = voxels(0)
    wrong = given | {"softmax": 1.1 * given["softmax"], "cases": np.zeros(len(given["labels"]))}
    refused = ["nce", "leep", "cc_fv"]
    with pytest.warns(UserWarning) as said:
        found = score_all(**wrong)
    assert [name for name, value in found.items() if np.isnan(value)] == refused
    assert [str(w.message).split(": ")[0] for w in said] == refused
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = score_all(**given)
    for name in SCORES.keys() - refused:
        assert found[name] == plain[name]


def scaled(given, scale):
    "The arrays with features in another unit."
    return {k: scale * v if k.endswith("features") else v for k, v in given.items()}


@pytest.mark.parametrize("name", OF_FEATURES)
@pytest.mark.parametrize("scale", [1e160, 1e100, 1e-100, 1e-160])
def test_features_of_a_size_that_has_no_powers(name, scale):
    with pytest.raises(InputError, match="rescale"):
        computed(name, scaled(voxels(0), scale))


@pytest.mark.parametrize("name", OF_FEATURES)
@pytest.mark.parametrize("scale", [1e60, 1e-60])
def test_large_and_small_features_are_scored(name, scale):
    "As far as a score does not depend on the unit, it is the one of the features as they are."
    given = voxels(0)
    value = computed(name, scaled(given, scale))
    assert np.isfinite(value)
    if name in ("h_score", "h_score_shrunk", "logme", "otce"):
        assert value == pytest.approx(computed(name, given), abs=1e-6)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(sample=-1), "sample of a case is -1"),
        (dict(sample=1), "2 or more"),
        (dict(sample=2.5), "sample of a case is 2.5"),
        (dict(seed=-1), "seed is -1"),
    ],
)
def test_samples_that_cannot_be_drawn(wrong, says):
    f, y, cases = some(voxels(0), "features", "labels", "cases")
    with pytest.raises(InputError, match=says):
        feature_variety(f, cases, **wrong)
    with pytest.raises(InputError, match=says):
        cc_fv(f, y, cases, **wrong)


@pytest.mark.parametrize("n, seed", [(-1, 0), (1, 0), (2.5, 0), (20, -1)])
def test_balanced_samples_that_cannot_be_drawn(n, seed):
    with pytest.raises(InputError):
        balanced_sample(voxels(0)["labels"], n, seed)


LARGE = """
import json, resource, time
import numpy as np
from seqtransfer.scores import SCORES

rng = np.random.default_rng(0)
n = 100_000
labels = np.arange(n) % 3 // 2
features = rng.standard_normal((n, 512))
features[:, :8] += labels[:, None]
given = {
    "features": features,
    "labels": labels,
    "softmax": np.c_[0.2 + 0.6 * labels, 0.8 - 0.6 * labels],
    "cases": np.arange(n) % 4,
    "source_features": features[::-1],
    "source_labels": labels,
}
found = {}
for name, (function, needs) in SCORES.items():
    start = time.perf_counter()
    value = function(**{k: given[k] for k in needs})
    found[name] = value, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(found))
"""


def test_a_hundred_thousand_voxels_with_512_features_fit_in_two_gigabytes():
    """In double precision (410 MB), with the interpreter and all libraries counted.
    The peak is that of the whole process so far."""
    pytest.importorskip("resource")
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # two threads on a busy machine are slower
    command = [sys.executable, "-c", LARGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **one})
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    found = json.loads(done.stdout)
    for name, (value, seconds, rss) in found.items():
        print(f"{name}: {value:.4f}, {seconds:.1f} s, peak {rss * unit / 1e6:.0f} MB")
    assert all(np.isfinite(value) for value, _, _ in found.values())
    assert max(rss for _, _, rss in found.values()) * unit < 2e9
