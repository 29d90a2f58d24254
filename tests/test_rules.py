"""A path rule decides what may be last and what may be a source: wherever a path is chosen, the same one is."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import seqtransfer
from hypothesis import given
from hypothesis import strategies as st

from seqtransfer.affinity import Affinity, affinity
from seqtransfer.calibration import calibrate
from seqtransfer.datasets import read_pool
from seqtransfer.paths import anchored, best_paths, own_only, side_by_side
from seqtransfer.questions import candidate_paths, open_study
from seqtransfer.study import Study, identity
from seqtransfer.tasks import TaskPool

TARGET = "LesionC-FLAIR-WMH"
OWN = "LesionC-T1-WMH"  # the same patients in another modality


@pytest.fixture(scope="module")
def pool(zoo):
    return read_pool(zoo)


@st.composite
def matrices(draw):
    "An affinity of up to six sources, of which some hold nobody but the target's patients, and a number of sources."
    n = draw(st.integers(2, 6))
    numbers = st.integers(1, 50)
    d = np.array([[draw(numbers) / 10 for _ in range(n + 1)] for _ in range(n + 1)])
    np.fill_diagonal(d, 0)
    others = [draw(st.sampled_from([0, 3])) for _ in range(n)]
    names = (*(f"s{k}" for k in range(n)), "t")
    tasks = {name: {"others": k} for name, k in zip(names, [*others, 0])}
    return Affinity(names, {"fg_z": d}, {"fg_z": 1.0}, {"target": "t", "tasks": tasks}), draw(st.integers(1, n))


@given(matrices())
def test_the_last_source_is_the_best_single_one(case):
    near, n = case
    (single,) = best_paths(near, "t", 1, 1, **anchored(near, "t", 1))
    own = own_only(near, "t")
    allowed = [k for k, name in enumerate(near.names[:-1]) if name not in own]
    assert near.distance[near.names.index(single.sources[0]), -1] == near.distance[allowed, -1].min()
    paths = best_paths(near, "t", n, **anchored(near, "t", n))
    assert all(path.sources[-1] == single.sources[0] for path in (paths if n > 1 else paths[:1]))
    if len(allowed) >= n:
        assert not any(set(own) & set(path.sources) for path in paths)


@pytest.mark.parametrize("shots, sampled", [(3, 10), (3, 2), (2, 1)])
def test_own_patients_are_known_however_few_are_sampled(pool, shots, sampled):
    near = affinity(pool, target=TARGET, shots=shots, cases=sampled, replicates=0)
    assert own_only(near, TARGET) == (OWN,)
    assert own_only(near, "LesionA-FLAIR-WMH") == ()


def test_a_source_with_others_is_not_own(pool):
    mixed = replace(pool[OWN], cases=(*pool[OWN].cases, *pool["LesionA-T1-WMH"].cases))
    tasks = TaskPool(tuple(mixed if task.name == OWN else task for task in pool))
    assert own_only(affinity(tasks, target=TARGET, replicates=0), TARGET) == ()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_command_and_the_study_choose_the_same(zoo, pool, n):
    asked = ("paths", zoo, "--target", TARGET, "--sources", n, "--json")
    rows = json.loads(seqtransfer(*asked).stdout)
    first = {k: next(row["path"] for row in rows if row["sources"] == k) for k in (1, n)}
    (question,) = open_study(Study(pool, (TARGET,), n_sources=n)).questions
    assert first[n] == " -> ".join((*question.paths[0], TARGET))
    assert first[1] == f"{question.nearest} -> {TARGET}"
    shown = candidate_paths(question.near, TARGET, n)
    assert shown[0].sources == question.paths[0]
    assert not any(OWN in path.sources for path in shown)


def test_the_command_names_the_rule_and_the_own_patients(zoo):
    said = seqtransfer("paths", zoo, "--target", TARGET)
    assert f"Only your own labelled patients are left in {OWN}: not chosen." in said.stderr
    assert "in the last place" in said.stderr
    plain = seqtransfer("paths", zoo, "--target", TARGET, "--rule", "paper")
    assert "in the last place" not in plain.stderr
    typo = seqtransfer("paths", zoo, "--target", TARGET, "--rule", "nearest")
    assert typo.returncode == 2
    assert "anchored" in typo.stderr


def test_one_source_in_the_pool(pool):
    two = TaskPool((pool[TARGET], pool["LesionA-FLAIR-WMH"]))
    near = affinity(two, target=TARGET, replicates=0)
    assert [path.sources for path in candidate_paths(near, TARGET, 2)] == [("LesionA-FLAIR-WMH",)]
    assert [path.sources for path in side_by_side(near, TARGET, rule="anchored")] == [("LesionA-FLAIR-WMH",)]


def test_all_paths_and_the_one_that_is_judged(pool):
    names = ("LesionA-FLAIR-WMH", "LesionB-FLAIR-WMH", "TumourA-FLAIR-ED")
    asked = {"among": names, "arms": ("recommended",), "shots": 3}
    (every,) = open_study(Study(pool, (TARGET,), "all", **asked)).questions
    (chosen,) = open_study(Study(pool, (TARGET,), **asked)).questions
    assert len(every.paths) == 6
    assert every.candidates == chosen.candidates


def test_a_folder_knows_the_rule_and_the_distance():
    plain = Study("zoo", ("T",))
    assert identity(plain) == identity(replace(plain, rule="anchored"))
    assert identity(plain) != identity(replace(plain, rule="paper"))
    assert identity(plain)["distance"]["weights"] == {"fg_z": 1.0, "pca_z": 1.0, "same_label": 1.0, "few": 1.0}
    assert identity(replace(plain, mode="paper"))["rule"] == "paper"


def test_calibration_takes_the_default_of_equal_sizes(pool):
    near = affinity(pool, replicates=0)
    sources = [name for name in near.names if name not in (TARGET, "TumourA-FLAIR-ED")][:5]
    rng = np.random.default_rng(0)
    rows = [(t, s, float(rng.uniform())) for t in (TARGET, "TumourA-FLAIR-ED") for s in sources]
    fit = calibrate(near, pd.DataFrame(rows, columns=["target", "source", "dice"]), groups={})
    assert set(fit.weights) == {"fg_z", "pca_z", "same_label"}
