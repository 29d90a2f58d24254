"""Weights fitted to measured transfers.

What was planted is found, what is left out stays out, and what cannot be used is refused in a sentence.
"""

import json
import sys
from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, pearsonr, spearmanr, weightedtau

from seqtransfer import calibration
from seqtransfer.affinity import Affinity
from seqtransfer.calibration import (
    Calibration,
    agreement,
    calibrate,
    costs,
    rank_correlations,
    regret,
    resampled_correlations,
    transfers,
    unit_of,
)
from seqtransfer.core import InputError
from seqtransfer.paths import TransferPath
from seqtransfer.search import path_cost

LEFT_OUT, GIVEN = "calibrated, target left out", "weights as given"
FROM_FACTS = {"data-set size", "same modality and label"}


def random_terms(names, n, rng):
    "Distances drawn at random, and similarities where the term is one."
    terms = {}
    for t in names:
        matrix = rng.uniform(0.1, 0.9, (n, n)) if t == "oca" else rng.gamma(2, size=(n, n))
        np.fill_diagonal(matrix, 1.0 if t == "oca" else 0.0)
        terms[t] = matrix
    return terms


def about_task(name, cases):
    dataset, modality, label = name.split("-")
    return {"dataset": dataset, "site": "", "modality": modality, "label": label, "cases": cases}


def planted(weights, n=10, targets=4, noise=0.0, seed=0, sources=1, sign=1):
    """An affinity of random terms, and Dice that fall (`sign` 1) with the weighted sum of its terms.

    Each term counts in units of its median.
    """
    rng = np.random.default_rng(seed)
    names = tuple(f"set{i}-T{i % 2}-L{i % 3}" for i in range(n))
    terms = random_terms(weights, n, rng)
    about = {name: about_task(name, int(rng.integers(4, 60))) for name in names}
    A = Affinity(names, terms, dict.fromkeys(weights, 1.0), {"tasks": about})
    total = sum(w * m / unit_of(m) for w, m in zip(weights.values(), A.contributions().values()))
    rows = []
    for j in range(targets):
        paths = [(i,) for i in range(n) if i != j]
        if sources > 1:
            paths = [tuple(rng.permutation([i for (i,) in paths])[:sources]) for _ in range(14)]
        for p in dict.fromkeys(paths):
            dice = 0.1 * j - sign * 0.05 * path_cost(total, p, j) + noise * rng.normal()
            rows.append({"target": names[j], "path": tuple(names[i] for i in p), "dice": dice})
    table = pd.DataFrame(rows)
    if sources > 1:
        return A, table
    return A, table.assign(source=[p[0] for p in table.path]).drop(columns="path")


def shares(fit, weights=None):
    "Weights in units of the medians; they sum to 1."
    return {t: w * fit.parameters["units"][t] for t, w in (weights or fit.weights).items()}


def fold(fit, target):
    "What was fitted without a target."
    return next(f for f in fit.folds if f["target"] == target)


def score(fit, predictor, measure, target="mean"):
    return fit.frame().set_index(["predictor", "target", "measure"]).value[predictor, target, measure]


@pytest.fixture
def few(monkeypatch):
    "A short Bayesian optimisation: most properties do not depend on its length."
    monkeypatch.setattr(calibration, "EVALUATIONS", 13)


# --- measures of one target ---


def test_correlations_are_scipys_with_the_sign_turned():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost, dice = rng.integers(0, 6, 12).astype(float), rng.integers(0, 8, 12) / 10
        expected = {
            "tau": kendalltau(-cost, dice).statistic,
            "weighted_tau": weightedtau(-cost, dice).statistic,
            "pearson": pearsonr(-cost, dice).statistic,
            "spearman": spearmanr(-cost, dice).statistic,
        }
        assert rank_correlations(cost, dice) == pytest.approx(expected)


def test_correlations_of_known_orders():
    assert rank_correlations([1, 2, 3], [0.9, 0.5, 0.1]) == pytest.approx(
        dict(tau=1, weighted_tau=1, pearson=1, spearman=1)
    )
    assert rank_correlations([1, 2, 3], [0.1, 0.5, 0.9])["tau"] == pytest.approx(-1)
    weighted = 1 - 2 * (1 / 2 + 1 / 3) / (2 * (1 + 1 / 2 + 1 / 3))  # the pair of ranks 1 and 2 is wrong
    assert rank_correlations([1, 3, 2], [0.9, 0.5, 0.1]) == pytest.approx(
        dict(tau=1 / 3, weighted_tau=weighted, pearson=0.5, spearman=0.5)
    )


def test_a_silent_predictor_scores_zero_and_silent_dice_nothing():
    assert set(rank_correlations([2, 2, 2], [0.1, 0.2, 0.3]).values()) == {0.0}
    assert all(np.isnan(v) for v in rank_correlations([1, 2, 3], [0.3, 0.3, 0.3]).values())


def one_by_one(cost, dice, k):
    "Regret by going through all orders of the transfers; equal costs keep the order they have."
    lost = []
    for order in permutations(range(len(cost))):
        tried = sorted(order, key=lambda i: cost[i])[:k]
        lost.append(max(dice) - max(dice[i] for i in tried))
    return np.mean(lost)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=6), st.integers(1, 7))
def test_regret_is_the_mean_over_all_ways_to_break_ties(pairs, k):
    cost, dice = (np.array(x, float) for x in zip(*pairs))
    assert regret(cost, dice, k) == pytest.approx(one_by_one(cost, dice, k), abs=1e-9)


def test_regret_closed_forms():
    dice = [0.9, 0.7, 0.4, 0.2]
    reversed_order = [4, 3, 2, 1]
    assert regret([1, 2, 3, 4], dice, 1) == 0
    assert regret(reversed_order, dice, 1) == pytest.approx(0.7)
    assert regret(reversed_order, dice, 3) == pytest.approx(0.2)
    assert regret(reversed_order, dice, 4) == 0
    assert regret(reversed_order, dice, 99) == 0
    assert regret([0] * 4, dice, 1) == pytest.approx(0.9 - np.mean(dice))
    assert regret([0] * 4, dice, 3) == pytest.approx(0.9 - (3 * 0.9 + 0.7) / 4)
    assert regret([0.3, 0.1], [0.5, 0.5], 1) == 0
    assert regret([1], [0.5], 1) == 0


@pytest.mark.parametrize(
    "cost, dice, k",
    [
        ([1, 2], [0.1], 1),
        ([1, np.nan], [0.1, 0.2], 1),
        ([1, 2], [0.1, np.inf], 1),
        ([], [], 1),
        ([1, 2], [0.1, 0.2], 0),
    ],
)
def test_measures_refuse_what_is_no_number(cost, dice, k):
    with pytest.raises(InputError):
        regret(cost, dice, k)
    if k:
        with pytest.raises(InputError):
            rank_correlations(cost, dice)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=8), st.integers(0, 2**31))
def test_resampled_correlations_are_those_of_the_copies_written_out(pairs, seed):
    cost, dice = (np.array(x, float) for x in zip(*pairs))
    draws = np.random.default_rng(seed).integers(len(cost), size=(10, len(cost)))
    counts = np.stack([np.bincount(d, minlength=len(cost)) for d in draws])
    slow = pd.DataFrame([rank_correlations(cost[d], dice[d]) for d in draws])
    assert np.allclose(pd.DataFrame(resampled_correlations(cost, dice, counts)), slow, atol=1e-9, equal_nan=True)


@given(st.permutations(range(7)))
def test_measures_do_not_depend_on_the_order_of_the_transfers(order):
    cost, dice = np.array([1, 1, 2, 3, 3, 3, 5.0]), np.array([0.5, 0.2, 0.7, 0.1, 0.6, 0.3, 0.3])
    order = list(order)
    assert rank_correlations(cost[order], dice[order]) == pytest.approx(rank_correlations(cost, dice))
    for k in (1, 2, 3):
        assert regret(cost[order], dice[order], k) == pytest.approx(regret(cost, dice, k))


# --- the fit ---


@pytest.mark.parametrize("degrees", [0, 20, 45, 70, 90])
def test_planted_angle_is_recovered_on_the_grid(degrees):
    w = {"fg_z": np.cos(np.deg2rad(degrees)), "pca_z": np.sin(np.deg2rad(degrees))}
    A, table = planted(w)
    fit = calibrate(A, table)
    found = shares(fit)
    assert np.degrees(np.arctan2(found["pca_z"], found["fg_z"])) == pytest.approx(degrees, abs=0.01)
    assert fit.parameters["search"] == "grid"
    assert sum(found.values()) == pytest.approx(1)
    for f in fit.folds:
        assert shares(fit, f["weights"]) == pytest.approx(found)
    assert all(score(fit, LEFT_OUT, m) == pytest.approx(1) for m in ("tau", "weighted_tau", "pearson", "spearman"))
    assert score(fit, LEFT_OUT, "regret@1") == pytest.approx(0, abs=1e-12)


def test_planted_weights_are_found_under_noise():
    A, table = planted({"fg_z": 0.7, "pca_z": 0.3}, n=30, targets=8, noise=0.02)
    fit = calibrate(A, table)
    assert shares(fit)["fg_z"] == pytest.approx(0.7, abs=0.06)
    assert score(fit, LEFT_OUT, "pearson") > max(score(fit, t, "pearson") for t in ("fg_z", "pca_z", "random"))


def test_planted_weights_of_three_terms_by_gaussian_process():
    A, table = planted({"a": 0.6, "b": 0.3, "c": 0.1}, n=14, targets=3)
    rows = costs(transfers(table), A.names, A.contributions())
    search = calibration.SEARCHES["bayes"]  # one of the fits that `calibrate` makes, at full length
    found = search(rows, ["a", "b", "c"], 0)
    assert found == pytest.approx([0.6, 0.3, 0.1], abs=0.05)
    assert agreement(rows, ["a", "b", "c"], found).mean() > 0.995


def test_similarity_of_masks_counts_as_a_distance():
    A, table = planted({"ica": 0.4, "oca": 0.6})
    assert shares(calibrate(A, table)) == pytest.approx({"ica": 0.4, "oca": 0.6}, abs=0.01)


def test_planted_weights_of_paths():
    A, table = planted({"a": 0.3, "b": 0.7}, sources=2, n=12)
    fit = calibrate(A, table)
    assert shares(fit) == pytest.approx({"a": 0.3, "b": 0.7}, abs=0.01)
    assert score(fit, LEFT_OUT, "tau") > 0.97


def test_the_weight_of_the_early_sources_reaches_the_costs():
    A, table = planted({"a": 0.3, "b": 0.7}, sources=2, n=12)
    rows = costs(transfers(table), A.names, A.contributions(), lam=0.5)
    at = {n: i for i, n in enumerate(A.names)}
    for r in rows.itertuples():
        expected = path_cost(A.terms["a"], [at[x] for x in r.path], at[r.target], 0.5)
        assert r.a * unit_of(A.terms["a"]) == pytest.approx(expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_weights_are_never_negative_and_the_grid_is_as_good_as_any_weights(seed):
    A, table = planted({"a": 1.0, "b": 1.0}, n=6, targets=3, noise=1.0, seed=seed)
    fit = calibrate(A, table)
    for weights in (fit.weights, *(f["weights"] for f in fit.folds)):
        assert min(weights.values()) >= 0
    rows = costs(transfers(table), A.names, A.contributions())
    at_random = np.random.default_rng(seed).random((200, 2))
    reached = agreement(rows, ["a", "b"], list(shares(fit).values())).mean()
    assert reached >= agreement(rows, ["a", "b"], at_random).mean(axis=1).max() - 0.002


def test_higher_cost_means_lower_dice_and_a_term_that_runs_the_wrong_way_gets_nothing():
    A, table = planted({"a": 0.5, "b": 0.5})
    at = {n: i for i, n in enumerate(A.names)}
    rises_with_b = A.terms["b"] - A.terms["a"]
    up = table.assign(dice=[rises_with_b[at[s], at[t]] for s, t in zip(table.source, table.target)])
    fit = calibrate(A, up)
    assert fit.weights["b"] == 0
    assert fit.weights["a"] > 0
    assert score(fit, LEFT_OUT, "pearson") > 0
    A, against = planted({"a": 0.5, "b": 0.5}, sign=-1)
    assert score(calibrate(A, against), LEFT_OUT, "tau") < 0  # nothing can be fitted, and the number says so


def test_gaussian_process_keeps_the_signs_and_never_returns_no_weights(monkeypatch):
    monkeypatch.setattr(calibration, "EVALUATIONS", 25)
    A, against = planted({"a": 0.4, "b": 0.3, "c": 0.3}, sign=-1, n=7, targets=2)
    fit = calibrate(A, against, seed=3)
    assert fit.parameters["search"] == "bayes"
    assert min(fit.weights.values()) >= 0
    assert sum(shares(fit).values()) == pytest.approx(1)


def test_same_seed_same_result_and_optuna_is_left_as_it_was(few):
    import optuna

    told = optuna.logging.get_verbosity()
    A, table = planted({"a": 0.4, "b": 0.3, "c": 0.3}, noise=0.05)
    assert calibrate(A, table, seed=1) == calibrate(A, table, seed=1)
    assert optuna.logging.get_verbosity() == told


def test_papers_mode_takes_the_gaussian_process(few):
    A, table = planted({"ica": 0.4, "oca": 0.6})
    paper = replace(A, parameters=A.parameters | {"mode": "paper"})
    assert calibrate(paper, table).parameters["search"] == "bayes"
    assert calibrate(paper, table, search="grid").parameters["search"] == "grid"


def test_without_optuna_nothing_else_is_put_in_its_place(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    A, table = planted({"a": 0.4, "b": 0.3, "c": 0.3})
    with pytest.raises(InputError, match="optuna 4 or later"):
        calibrate(A, table)
    assert calibrate(A, table, terms=["a", "b"]).parameters["search"] == "grid"


# --- what is left out stays out ---


@pytest.mark.parametrize("search", ["grid", "bayes"])
def test_dice_of_a_target_never_reach_its_own_weights(few, search):
    A, table = planted({"a": 0.3, "b": 0.7}, noise=0.2)
    target, another = A.names[1], A.names[0]
    at_random = np.random.default_rng(5).random(len(table))
    other = table.assign(dice=np.where(table.target == target, at_random, table.dice))
    one, two = calibrate(A, table, search=search), calibrate(A, other, search=search)
    assert fold(one, target) == fold(two, target)
    assert fold(one, another)["weights"] != fold(two, another)["weights"]
    assert target not in fold(one, target)["fitted_on"]


def test_transfers_from_a_target_and_from_its_group_stay_out_too():
    A, table = planted({"a": 0.3, "b": 0.7}, noise=0.2)
    held, kin = A.names[0], A.names[7]  # one is a target, the other only a source

    def weights(measured, groups=None):
        return fold(calibrate(A, measured, groups=groups), held)["weights"]

    touched = table.assign(dice=np.where(table.source == held, 0.99, table.dice))
    assert weights(touched) == weights(table)
    touched = table.assign(dice=np.where(table.source == kin, 0.99, table.dice))
    alone, together = {}, {held: "one site", kin: "one site"}
    assert weights(touched, together) == weights(table, together)
    assert weights(touched, alone) != weights(table, alone)


def test_tasks_of_one_data_set_and_site_are_left_out_together():
    A, table = planted({"a": 0.3, "b": 0.7}, noise=0.2)
    about = {x: a | {"dataset": "fets", "site": str(int(x[3]) // 2)} for x, a in A.parameters["tasks"].items()}
    fit = calibrate(replace(A, parameters={"tasks": about}), table)
    assert [f["fitted_on"] for f in fit.folds] == [list(A.names[2:4])] * 2 + [list(A.names[:2])] * 2
    one_site = {x: a | {"dataset": "fets", "site": "16"} for x, a in about.items()}
    with pytest.raises(InputError, match="share"):
        calibrate(replace(A, parameters={"tasks": one_site}), table)
    assert calibrate(replace(A, parameters={"tasks": one_site}), table, groups={}).folds


# --- order, ties, units ---


def test_order_of_rows_tasks_and_terms_does_not_matter(few):
    A, table = planted({"a": 0.2, "b": 0.5, "c": 0.3}, noise=0.1)
    table = pd.concat([table.assign(seed=s, dice=table.dice + 0.01 * s) for s in (0, 1, 2)])
    fit = calibrate(A, table)
    assert calibrate(A, table.sample(frac=1, random_state=1), terms=["c", "a", "b"]) == fit
    order = np.random.default_rng(0).permutation(len(A.names))
    names = tuple(A.names[i] for i in order)
    terms = {t: A.terms[t][np.ix_(order, order)] for t in "cba"}
    again = calibrate(Affinity(names, terms, A.weights, A.parameters), table)
    assert again.weights == fit.weights
    one, two = (c.frame().set_index(["predictor", "target", "measure"]).sort_index() for c in (again, fit))
    assert one.index.equals(two.index)
    assert np.allclose(one, two)


def test_units_of_a_term_or_of_the_dice_change_nothing():
    A, table = planted({"a": 0.2, "b": 0.8}, noise=0.1)
    fit = calibrate(A, table)
    other_unit = replace(A, terms={"a": 1000 * A.terms["a"], "b": A.terms["b"]})
    percent = calibrate(other_unit, table.assign(dice=100 * table.dice))
    assert shares(percent) == pytest.approx(shares(fit))
    assert percent.weights["a"] == pytest.approx(fit.weights["a"] / 1000)
    assert score(percent, LEFT_OUT, "tau") == pytest.approx(score(fit, LEFT_OUT, "tau"))
    assert score(percent, LEFT_OUT, "regret@1") == pytest.approx(100 * score(fit, LEFT_OUT, "regret@1"))


def test_a_path_and_its_reverse_cost_the_same():
    A, _ = planted({"a": 0.3, "b": 0.7}, n=8)
    A = replace(A, terms={t: (m + m.T) / 3 for t, m in A.terms.items()})
    pairs = list(permutations(A.names[1:], 2))
    measured = pd.DataFrame({"target": A.names[0], "path": pairs, "dice": 0.5})
    rows = costs(measured, A.names, A.contributions()).set_index("path")
    for p in pairs:
        assert rows.a[p] == rows.a[p[::-1]]
        assert rows.b[p] == rows.b[p[::-1]]


def test_seeds_are_averaged_and_scratch_is_left_out():
    A, table = planted({"a": 0.3, "b": 0.7}, noise=0.1)
    many = pd.concat([table.assign(seed=s, dice=table.dice + d) for s, d in ((0, -0.02), (1, 0.02))])
    scratch = pd.DataFrame({"target": A.names[:4], "source": "scratch", "seed": 0, "dice": np.nan})
    rows = transfers(pd.concat([many, scratch]))
    assert np.allclose(rows.dice, transfers(table).dice)
    assert "scratch" not in {p[0] for p in rows.path}


def test_rows_may_be_missing():
    A, table = planted({"a": 0.3, "b": 0.7}, noise=0.1)
    ragged = table.drop(index=[0, 1, 2, 13, 22, 30])
    fit = calibrate(A, ragged)
    assert fit.parameters["transfers"] == len(ragged)
    assert fit.frame()[["value", "low", "high"]].notna().all(axis=None)
    part = ragged[ragged.target == A.names[0]]
    cost = [A.terms["a"][A.names.index(s), 0] for s in part.source]
    assert score(fit, "a", "tau", A.names[0]) == pytest.approx(rank_correlations(cost, part.dice)["tau"])
    assert score(fit, "a", "regret@3", A.names[0]) == pytest.approx(regret(cost, part.dice, 3))


def test_ways_to_write_a_path():
    A, table = planted({"a": 0.3, "b": 0.7}, sources=2, n=12)
    text = table.assign(path=[" -> ".join(p) for p in table.path])
    printed = table.assign(path=[str(TransferPath(p, t, 0.0, 0.0)) for p, t in zip(table.path, table.target)])
    assert transfers(table).equals(transfers(text))
    assert transfers(table).equals(transfers(printed))


# --- what it is compared with ---


def test_the_larger_source_and_the_same_modality_and_label():
    A, table = planted({"a": 0.5, "b": 0.5}, noise=0.2)
    about = A.parameters["tasks"]
    larger = table.assign(dice=[about[s]["cases"] / 100 for s in table.source])
    assert score(calibrate(A, larger), "data-set size", "tau") > 0.99

    def same(what):
        return np.array([about[s][what] == about[t][what] for s, t in zip(table.source, table.target)], int)

    alike = table.assign(dice=same("modality") + same("label"))
    assert score(calibrate(A, alike), "same modality and label", "tau") == pytest.approx(1)
    silent = calibrate(replace(A, parameters={}), table).table().index
    assert "data-set size" not in silent
    assert "random" in silent


def test_a_random_choice_and_the_weights_as_given():
    A, table = planted({"a": 0.5, "b": 0.5}, noise=0.2)
    fit = calibrate(A, table)
    dice = transfers(table).groupby("target").dice
    assert score(fit, "random", "tau") == 0
    assert score(fit, "random", "regret@1") == pytest.approx((dice.max() - dice.mean()).mean())
    d = pd.DataFrame(A.distance, A.names, A.names)
    given = [rank_correlations(d.loc[part.source, t], part.dice)["tau"] for t, part in table.groupby("target")]
    assert score(fit, GIVEN, "tau") == pytest.approx(np.mean(given))
    gain = score(fit, LEFT_OUT, "tau") - score(fit, GIVEN, "tau")
    assert score(fit, "left out minus as given", "tau") == pytest.approx(gain)
    assert {"calibrated, in sample", LEFT_OUT, "a", "b"} <= set(fit.table().index)


def test_intervals_hold_their_values():
    A, table = planted({"a": 0.5, "b": 0.5}, noise=0.1, n=14)
    rows = calibrate(A, table, k=(2,)).frame()
    assert (rows.low <= rows.high).all()
    plain = rows[~rows.measure.str.startswith("regret") & ~rows.predictor.str.contains("minus")]
    held = (plain.low <= plain.value + 1e-9) & (plain.value <= plain.high + 1e-9)
    assert held.mean() > 0.95
    assert set(rows.measure) == {"tau", "weighted_tau", "pearson", "spearman", "regret@2"}
    assert set(rows.target) == {"mean", *A.names[:4]}


def test_the_table_reads_the_scores():
    A, table = planted({"a": 0.5, "b": 0.5}, noise=0.1, n=14)
    fit = calibrate(A, table, k=(2,))
    of_target = fit.frame().query("target == @A.names[0]").set_index(["predictor", "measure"])
    one = of_target.loc[("a", "tau")]
    assert fit.table(A.names[0]).loc["a", "tau"] == f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"
    with pytest.raises(InputError, match="nobody"):
        fit.table("nobody")


def test_more_targets_and_sources_make_shorter_intervals():
    def width(**size):
        fit = calibrate(*planted({"a": 0.5, "b": 0.5}, noise=0.1, **size))
        rows = fit.frame().set_index(["predictor", "target", "measure"])
        return (rows.high - rows.low)[LEFT_OUT, "mean", "tau"]

    assert width(n=30, targets=12) < width(n=8, targets=3)


def test_saved_and_read_again(tmp_path):
    A, table = planted({"a": 0.5, "b": 0.5}, noise=0.1)
    fit = calibrate(A, table)
    file = fit.save(tmp_path / "fit.json")
    assert Calibration.load(file) == fit
    assert set(json.loads(file.read_text())) == {"weights", "folds", "scores", "parameters"}
    with pytest.raises(AttributeError):
        fit.weights = {}


def test_the_saved_weights_multiply_the_terms_as_they_are(tmp_path):
    A, table = planted({"a": 0.5, "b": 0.5}, noise=0.1)
    weights = json.loads(calibrate(A, table).save(tmp_path / "fit.json").read_text())["weights"]
    expected = sum(weights[t] * A.terms[t] for t in "ab")
    assert np.allclose(A.weighted(weights).distance, expected)


def test_another_file_is_no_calibration(tmp_path):
    with pytest.raises(InputError, match="gone.json"):
        Calibration.load(tmp_path / "gone.json")
    for held in ({"weights": {}}, [1, 2], "text"):
        (tmp_path / "other.json").write_text(json.dumps(held))
        with pytest.raises(InputError, match="other.json"):
            Calibration.load(tmp_path / "other.json")


# --- what cannot be used ---

A, TABLE = planted({"a": 0.5, "b": 0.5}, noise=0.1)
FIRST = TABLE.target == A.names[0]
SPOILT = {t: m.copy() for t, m in A.terms.items()}
SPOILT["b"][5, 0] = np.nan
FLAT = 1.0 - np.eye(len(A.names))
PATHS = TABLE.assign(path=[(s,) for s in TABLE.source])
ONE_LONGER = PATHS.assign(path=[("set8-T0-L2", "set9-T1-L0"), *PATHS.path[1:]])


def lacking(column, row):
    "The table without one value."
    return TABLE.assign(**{column: TABLE[column].where(TABLE.index != row)})


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(measured=TABLE[FIRST]), "two measured targets.*set0-T0-L0"),
        (dict(measured=TABLE[:0]), "two measured targets.*none"),
        (dict(measured=TABLE.assign(source="scratch")), "two measured targets"),
        (dict(measured=TABLE.drop(columns=["dice", "target"])), "no column target and no column dice"),
        (dict(measured=TABLE.drop(columns="source")), "no column source"),
        (dict(measured=lacking("dice", 3)), "Dice of set4-T0-L1 -> set0-T0-L0 is not a number"),
        (dict(measured=TABLE.assign(dice="good")), "not a number"),
        (dict(measured=TABLE.assign(dice=TABLE.dice.replace(TABLE.dice[0], np.inf))), "not a number"),
        (dict(measured=TABLE.replace({"source": {A.names[9]: "set9-T1-L9"}})), "no task set9-T1-L9.*set9-T1-L0"),
        (dict(measured=TABLE.replace({"target": {A.names[0]: "elsewhere"}})), "no task elsewhere"),
        (dict(measured=lacking("source", 0).fillna(A.names[0])), "meets one task twice"),
        (dict(measured=PATHS.assign(path=[p * 2 for p in PATHS.path])), "meets one task twice"),
        (dict(measured=PATHS.assign(path=[() for _ in PATHS.path])), "transfer to set0-T0-L0 has no source"),
        (dict(measured=lacking("source", 4)), "transfer to set0-T0-L0 has no source"),
        (dict(measured=ONE_LONGER), "different numbers of sources"),
        (dict(measured=TABLE.drop(index=TABLE.index[FIRST][2:])), "set0-T0-L0 was reached from 2"),
        (dict(measured=TABLE.assign(dice=TABLE.dice.where(~FIRST, 0.0))), "to set0-T0-L0 have the same Dice"),
        (dict(affinity=replace(A, terms=SPOILT)), "term b is not a number for set5-T1-L2 -> set0-T0-L0"),
        (dict(affinity=replace(A, terms=A.terms | {"b": FLAT})), "term b is the same for all sources"),
        (dict(affinity=replace(A, terms=dict.fromkeys("ab", FLAT))), "the same for all sources"),
        (dict(terms=["a"]), "a alone"),
        (dict(terms=[]), "no term alone"),
        (dict(terms=["a", "fgz"]), "no term 'fgz'"),
        (dict(search="guess"), "no search 'guess'.*grid, bayes"),
        (dict(groups=dict.fromkeys(A.names, "here")), "all share its patients .here."),
        (dict(k=(0,)), "at least one"),
        (dict(k=0), "the 0 nearest.*at least one"),
        (dict(k=(1, 1.5)), "the 1.5 nearest.*at least one"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=0.5), "seed is 0.5"),
        (dict(lam=-1), "lam of the early sources is -1"),
        (dict(lam=np.nan), "not negative"),
        (dict(terms="a"), "weights of a alone"),
        (dict(measured=lacking("target", 3)), "Row 3 of the measured transfers has no target"),
        (dict(measured=lacking("target", 30).fillna("")), "Row 30 of the measured transfers has no target"),
    ],
)
def test_what_cannot_be_used_is_said(wrong, says):
    with pytest.raises(InputError, match=says) as e:
        calibrate(**{"affinity": A, "measured": TABLE} | wrong)
    assert "\n" not in str(e.value)


def test_one_number_of_tries():
    assert calibrate(A, TABLE, k=2) == calibrate(A, TABLE, k=(2,)) == calibrate(A, TABLE, k=np.array([2]))


@pytest.mark.parametrize(
    "gone, left",
    [
        ("cases", {"same modality and label"}),
        ("label", {"data-set size"}),
        ("modality", {"data-set size"}),
        ("dataset", {"data-set size", "same modality and label"}),
    ],
)
def test_what_is_not_known_of_every_task_makes_no_baseline_and_no_group(gone, left):
    about = {n: dict(a) for n, a in A.parameters["tasks"].items()}
    del about[A.names[2]][gone]
    fit = calibrate(replace(A, parameters={"tasks": about}), TABLE)
    assert FROM_FACTS & set(fit.table().index) == left
    each_by_itself = calibrate(replace(A, parameters={"tasks": {}}), TABLE)
    assert fit.folds == each_by_itself.folds  # every data set here has one task


def test_what_is_known_of_a_few_tasks_makes_no_baseline():
    about = dict(list(A.parameters["tasks"].items())[:4]) | {A.names[4]: None}
    fit = calibrate(replace(A, parameters={"tasks": about}), TABLE)
    assert not FROM_FACTS & set(fit.table().index)


def test_a_grid_of_three_terms_is_refused():
    B, table = planted({"a": 0.4, "b": 0.3, "c": 0.3})
    with pytest.raises(InputError, match="grid is for two terms, 3"):
        calibrate(B, table, search="grid")


def test_a_term_that_is_constant_only_without_a_target_leaves_the_weights_even():
    terms = {"a": A.terms["a"], "b": FLAT.copy()}
    terms["b"][:, 0] = A.terms["b"][:, 0]
    fit = calibrate(replace(A, terms=terms), TABLE)
    found = shares(fit, fold(fit, A.names[0])["weights"])
    assert found == pytest.approx({"a": 0.5, "b": 0.5})


def test_a_broken_term_that_is_not_asked_for_does_no_harm():
    fit = calibrate(replace(A, terms=A.terms | {"c": SPOILT["b"]}), TABLE)
    assert fit.weights == calibrate(A, TABLE).weights
