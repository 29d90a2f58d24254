"""The paper's affinity, transcribed, against the package on files the test writes; and what an affinity must do with bad input."""
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import wasserstein_distance
from skimage.transform import resize as sk_resize
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from seqtransfer import affinity as module
from seqtransfer.affinity import TERMS, Affinity, affinity, Sampled, compute_terms, draws, extend, sample, sampled, task_means
from seqtransfer.core import InputError
from seqtransfer.datasets import read_pool
from seqtransfer.paths import best_paths, explain
from seqtransfer.similarity.signature import signatures
from seqtransfer.tasks import TaskPool


def write_dataset(root, number, name, shape, channels, labels, cases, unit=1.0, mask=None, image=None):
    "One nnU-Net v2 data set; `mask(rng, k)` and `image(rng, k)` may replace the random contents."
    folder = root / f"Dataset{number:03d}_{name}"
    for sub in ("imagesTr", "labelsTr"): (folder / sub).mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {str(i): c for i, c in enumerate(channels)}, "labels": {"background": 0, **labels},
        "numTraining": cases, "file_ending": ".nii.gz"}))
    for k in range(cases):
        rng = np.random.default_rng((number, k))
        field = gaussian_filter(rng.normal(size=shape), 2)
        y = mask(rng, k) if mask else np.digitize(field, np.quantile(field, [0.8, 0.93])).astype(np.uint8)
        nib.save(nib.Nifti1Image(y, np.eye(4)), folder / "labelsTr" / f"c{k}.nii.gz")
        for i in range(len(channels)):
            x = image(rng, k) if image else unit * (gaussian_filter(rng.normal(size=shape), 1.5) * 50 + field * (i + 1) * 100 + 40)
            nib.save(nib.Nifti1Image(x.astype(np.float32), np.eye(4)), folder / "imagesTr" / f"c{k}_{i:04d}.nii.gz")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_core():
    "Small products from many threads are slow on a busy machine."
    with threadpool_limits(1, "blas"): yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Two data sets of unequal shape and unit: two modalities with two labels, and one modality with one."
    root = tmp_path_factory.mktemp("raw")
    write_dataset(root, 1, "Alpha", (20, 24, 18), ["T1", "T2"], {"core": 2, "rim": 1}, 3)
    write_dataset(root, 2, "Beta", (26, 15, 21), ["FLAIR"], {"lesion": [1, 2]}, 2, unit=7.0)
    return root


@pytest.fixture(scope="module")
def pool(root):
    return read_pool(root)


# --- the paper, from the files up: Yang et al. 2024 ---
CACHE = {}


def paper_sample(case):
    if case.image not in CACHE:
        x = np.asarray(nib.load(case.image).dataobj, float)
        small = sk_resize(x, (128, 128, 128), anti_aliasing=True).reshape(-1, 128)
        CACHE[case.image] = PCA(n_components=0.75, svd_solver="full").fit_transform(small).ravel()
    return CACHE[case.image]


def paper_mask(case):
    key = case.mask, case.labels
    if key not in CACHE:
        y = np.isin(np.asarray(nib.load(case.mask).dataobj), case.labels).astype(float)
        CACHE[key] = (sk_resize(y, (128, 128, 128), anti_aliasing=True) >= 0.5).astype(float)
    return CACHE[key]


def paper_r(a, b):
    n, c = a.size, 0.3**2
    ma, mb = a.mean(), b.mean()
    cov = (a * b).sum() / n - ma * mb
    va, vb = (a * a).sum() / n - ma**2, (b * b).sum() / n - mb**2
    return (2 * ma * mb + c) * (2 * cov + c) / ((ma**2 + mb**2 + c) * (va + vb + c))


def paper_distance(s, t):
    if s.dataset == t.dataset and s.site == t.site:
        pairs = [(a, b) for a in s.cases for b in t.cases if a.patient == b.patient]
    else:
        pairs = [(a, b) for a in s.cases for b in t.cases]
    h = np.mean([wasserstein_distance(paper_sample(a), paper_sample(b)) for a, b in pairs])
    r = np.mean([paper_r(paper_mask(a), paper_mask(b)) for a, b in pairs])
    return h, r, 0.0044 * h - 2.4756 * r + 2.4756


@pytest.fixture(scope="module")
def paper(pool):
    return affinity(pool, mode="paper")


def test_paper_mode_is_the_paper(pool, paper):
    assert len(pool) == 5
    frame = paper.frame()
    assert all(np.array_equal(m, m.T) for m in paper.terms.values())
    for _, row in frame[frame["Node A"] < frame["Node B"]].iterrows():
        h, r, d = paper_distance(pool[row["Node A"]], pool[row["Node B"]])
        assert row["ICA"] == pytest.approx(h, rel=1e-7, abs=1e-9)
        assert row["OCA"] == pytest.approx(r, abs=1e-6)
        assert row["Distance"] == pytest.approx(d, abs=1e-5)


def test_default_terms_are_means_of_exact_distances(pool):
    a = affinity(pool, explained=0.75, voxel=None)
    z = {}
    for t in pool:
        for c in t.cases:
            x, y = (np.asarray(nib.load(f).dataobj, float) for f in (c.image, c.mask))
            z[c] = ((x - x.mean()) / x.std())[np.isin(y, c.labels)]  # no constant background: all is foreground
    for i, s in enumerate(pool):
        for j, t in enumerate(pool):
            if i >= j: continue
            pairs = [(p, q) for p in s.cases for q in t.cases if p.patient != q.patient]
            exact = np.mean([wasserstein_distance(z[p], z[q]) for p, q in pairs])
            assert a.terms["fg_z"][i, j] == pytest.approx(exact, rel=0.02, abs=0.005)
            h = np.mean([wasserstein_distance(paper_sample(p), paper_sample(q)) for p, q in pairs])
            assert a.terms["ica"][i, j] == pytest.approx(h, rel=0.01)


def test_default_divides_by_the_median(pool):
    a = affinity(pool)
    off = ~np.eye(len(pool), dtype=bool)
    assert set(a.contributions()) == {"fg_z", "pca_z"}
    assert all(np.median(m[off]) == pytest.approx(1) for m in a.contributions().values())
    assert np.allclose(sum(a.contributions().values())[off], a.distance[off])


def test_default_ignores_the_unit_of_a_data_set(root, pool, tmp_path):
    write_dataset(tmp_path, 1, "Alpha", (20, 24, 18), ["T1", "T2"], {"core": 2, "rim": 1}, 3)
    write_dataset(tmp_path, 2, "Beta", (26, 15, 21), ["FLAIR"], {"lesion": [1, 2]}, 2, unit=280.0)
    one, two = affinity(pool), affinity(read_pool(tmp_path))
    assert np.allclose(one.distance, two.distance, rtol=1e-3)
    assert not np.allclose(one.terms["ica"], two.terms["ica"], rtol=0.1)


def test_table_and_round_trip(paper, tmp_path):
    path = paper.save(tmp_path / "out" / "affinity.csv")
    names = ["ICA", "OCA", *(t for t in TERMS if t not in ("ica", "oca")), "Distance"]
    assert path.read_text().splitlines()[0].split(",") == ["Node A", "Node B", *names, *(f"{n} {end}" for n in names for end in ("low", "high"))]
    assert len(pd.read_csv(path)) == 5 * 4
    again = Affinity.load(path)
    assert again.names == paper.names and again.weights == paper.weights
    assert np.abs(again.distance - paper.distance).max() <= 1e-12
    assert all(np.abs(again.terms[t] - m).max() <= 1e-12 for t, m in paper.terms.items())
    assert again.parameters == json.loads(json.dumps(paper.parameters))
    first = path.read_bytes(), path.with_suffix(".json").read_bytes()
    again.save(path)
    assert first == (path.read_bytes(), path.with_suffix(".json").read_bytes())


def test_a_missing_value_of_a_term_without_weight_survives(tmp_path):
    m = np.array([[0, np.nan], [np.nan, 0]])
    a = Affinity(("a", "b"), {"fg_z": m, "ica": np.ones((2, 2)) - np.eye(2)}, {"ica": 1.0})
    again = Affinity.load(a.save(tmp_path / "a.csv"))
    assert np.array_equal(again.terms["fg_z"], m, equal_nan=True) and again.distance[0, 1] == 1


def test_any_terms_and_asymmetric_distances_survive(tmp_path):
    m = np.array([[0, 1 / 3, 2], [0.1, 0, 4], [5, 6, 0]])
    a = Affinity(("NA", "b", "c"), {"leep": m}, {"leep": 2.0})
    again = Affinity.load(a.save(tmp_path / "a.csv"))
    assert np.array_equal(again.distance, 2 * m) and again.names == a.names
    assert a.frame().set_index(["Node A", "Node B"]).loc[("NA", "c"), "Distance"] == 4


@pytest.mark.parametrize("spoil", ["no json", "no csv", "other json", "edited", "cut"])
def test_load_refuses_what_does_not_belong_together(paper, tmp_path, spoil):
    path = paper.save(tmp_path / "a.csv")
    about = path.with_suffix(".json")
    if spoil == "no json": about.unlink()
    if spoil == "no csv": path.unlink()
    if spoil == "other json": about.write_text("[]")
    if spoil == "edited": path.write_text(path.read_text().replace("Alpha", "Gamma", 1))
    if spoil == "cut": path.write_text("\n".join(path.read_text().splitlines()[:4]))
    with pytest.raises(InputError, match="a.csv|a.json"):
        Affinity.load(path)


def test_weights_override(pool, paper):
    a = affinity(pool, mode="paper", weights={"ica": 0.5, "oca": 2})
    off = ~np.eye(len(pool), dtype=bool)
    assert np.allclose(a.distance[off], (0.5 * paper.terms["ica"] + 2 * (1 - paper.terms["oca"]))[off])
    with pytest.raises(InputError, match="fg_z"):
        affinity(pool, weights={"fgz": 1})
    with pytest.raises(InputError, match="mode"):
        affinity(pool, mode="published")


def test_target_keeps_test_patients_out(pool):
    target = next(t for t in pool if t.modality == "T1")
    a = affinity(pool, target=target.name, shots=1, seed=3)
    assert a.names[-1] == target.name and a.parameters["tasks"][target.name]["cases"] == 1
    shared = [t.name for t in pool if t.dataset == target.dataset and t.name != target.name]
    assert a.parameters["removed"] == dict.fromkeys(shared, 2) and a.parameters["test"] == 2
    assert all(a.parameters["tasks"][n]["cases"] == 1 for n in shared)


def test_samples_are_shared_by_tasks_of_one_domain_and_stable(pool):
    chosen = {tuple(c.patient for c in sample(t, 2, seed=5)) for t in pool if "Alpha" in t.cases[0].patient}
    assert len(chosen) == 1
    assert {c.patient for t in pool for s in range(9) for c in sample(t, 1, s)} == {c.patient for t in pool for c in t.cases}


def test_order_of_the_pool_does_not_matter(pool):
    forth, back = (compute_terms(order)[0] for order in (tuple(pool), tuple(pool)[::-1]))
    assert all(np.allclose(m, back[t][::-1, ::-1], rtol=1e-10) for t, m in forth.items())


def test_one_reading_serves_all_labels_of_an_image(pool, monkeypatch):
    from seqtransfer.similarity import signature as module
    opened = []
    for name in ("read_image", "read_labels"):
        f = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, *rest, f=f: (opened.append(getattr(x, "image", x)), f(x, *rest))[1])
    cases = [c for t in pool for c in t.cases]
    found = signatures(cases, keep=False)
    assert sorted(opened) == sorted({c.image for c in cases} | {c.mask for c in cases}) and len(cases) == len(found.objects) > len(found.images)


def test_one_task_is_refused(pool):
    with pytest.raises(InputError, match="two tasks"):
        affinity(TaskPool(pool.tasks[:1]))


def test_empty_masks_are_refused_by_task(root, tmp_path):
    write_dataset(tmp_path, 3, "Gamma", (12, 12, 12), ["T1"], {"core": 1, "rim": 2}, 2,
                  mask=lambda rng, k: (np.arange(12**3).reshape(12, 12, 12) < 200).astype(np.uint8))
    pool = read_pool(tmp_path)
    with pytest.raises(InputError, match=next(t.name for t in pool if t.label == "rim")):
        affinity(pool)


def test_one_empty_mask_is_left_out(tmp_path):
    "An empty mask is legal: `fg_z` is the mean over the others."
    mask = lambda rng, k: ((np.arange(12**3).reshape(12, 12, 12) < 200) & (k > 0)).astype(np.uint8)
    write_dataset(tmp_path, 3, "Gamma", (12, 12, 12), ["T1", "T2"], {"core": 1}, 3, mask=mask)
    a, b = read_pool(tmp_path)
    found = signatures([*a.cases, *b.cases])
    rows = [[found.objects[c.image_key, c.mask_key].fg_z for c in sorted(t.cases, key=lambda c: c.patient)] for t in (a, b)]
    assert not rows[0][0].size and not rows[1][0].size
    expected = np.mean([np.abs(rows[0][i] - rows[1][j]).mean() for i, j in ((1, 2), (2, 1))])  # pairs of two patients that have the object
    assert compute_terms([a, b])[0]["fg_z"][0, 1] == pytest.approx(expected)
    whole = affinity(TaskPool((a, b)))
    assert np.isfinite(whole.distance).all() and np.isfinite(whole.interval()).all()


def test_constant_volume_is_refused_by_file(tmp_path):
    write_dataset(tmp_path, 4, "Flat", (12, 12, 12), ["T1"], {"core": 1, "rim": 2}, 2, image=lambda rng, k: np.full((12, 12, 12), 5.0))
    with pytest.raises(InputError, match=r"c\d_0000.nii.gz.*constant"):
        affinity(read_pool(tmp_path))


def test_damaged_file_is_refused_by_file(tmp_path):
    folder = write_dataset(tmp_path, 5, "Torn", (12, 12, 12), ["T1"], {"core": 1, "rim": 2}, 2)
    path = folder / "imagesTr" / "c1_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="c1_0000"):
        affinity(read_pool(tmp_path))


# --- intervals, growth, choices ---
def weighted_mean(d, p, q, s, w, paired):
    "The mean of one pair of tasks under weights of patients, one pair of cases at a time."
    pairs = [(i, j) for i in range(len(s.cases[p])) for j in range(len(s.cases[q]))]
    same = lambda i, j: s.patients[p, i] == s.patients[q, j]
    within = paired and s.domains[p] == s.domains[q]
    wanted = [x for x in pairs if same(*x) == within] or pairs
    wanted = [x for x in wanted if not np.isnan(d[x])] or [x for x in pairs if not np.isnan(d[x])]
    once = within and all(same(*x) for x in wanted)  # a patient with himself is one patient
    weight = lambda i, j: w[s.patients[p, i]] * (1 if once else w[s.patients[q, j]])
    return sum(weight(*x) * d[x] for x in wanted) / sum(weight(*x) for x in wanted)


def apart(pool):
    "The pool with the patients of one task replaced, so that a domain has tasks without a common patient."
    first, *rest = pool
    return (replace(first, cases=tuple(replace(c, patient=f"other {c.patient}") for c in first.cases)), *rest)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("change", [tuple, apart])
@pytest.mark.parametrize("missing", [0, 0.5])
def test_means_under_weights_one_by_one(pool, paired, change, missing):
    s, rng = sampled(change(pool)), np.random.default_rng(0)
    items = np.arange(s.patients.size).reshape(s.patients.shape)
    D = rng.random((s.patients.size,) * 2); D[rng.random(D.shape) < missing] = np.nan; D = D + D.T
    drawn = draws(s, 3).astype(float)
    means = task_means(D, items, s, paired, drawn)
    for p in range(len(s.cases)):
        for q in range(p):
            if np.isnan(D[np.ix_(items[p], items[q])]).all(): continue
            expected = [weighted_mean(D[np.ix_(items[p], items[q])], p, q, s, w, paired) for w in drawn]
            assert means[:, p, q] == pytest.approx(expected) and np.array_equal(means[:, q, p], means[:, p, q])


def test_draws_belong_to_the_patient(pool):
    whole, part = sampled(pool), sampled(tuple(pool)[1:3])
    one, two = draws(whole, 2000, seed=1), draws(part, 2000, seed=1)
    assert np.array_equal(one[:, [whole.names.index(n) for n in part.names]], two)
    assert (one[0] == 1).all() and not np.array_equal(two, draws(part, 2000, seed=2))


@pytest.mark.parametrize("n", [3, 5, 10])
def test_weighted_means_vary_as_means_do(n):
    "The variance of a mean of n numbers is s2 / (n - 1), s2 with divisor n."
    s = Sampled((tuple(range(n)),), tuple(map(str, range(n))), np.arange(n)[None], np.array([0]))
    w, x = draws(s, 20000)[1:], np.random.default_rng(0).normal(size=n)
    means = (w * x).sum(1) / w.sum(1)
    assert means.mean() == pytest.approx(x.mean(), abs=0.03) and means.var() == pytest.approx(x.var() / (n - 1), rel=0.05)


def test_more_patients_make_shorter_intervals(tmp_path):
    "A real effect: means of 4 patients and of 16 of the same population; and both intervals hold the mean of all."
    write_dataset(tmp_path, 1, "Alpha", (16, 16, 12), ["T1"], {"core": 1}, 16)
    write_dataset(tmp_path, 2, "Beta", (16, 16, 12), ["T2"], {"core": 1}, 16)
    pool = read_pool(tmp_path)
    ends = {n: affinity(pool, cases=n).interval("pca_z")[:, 0, 1] for n in (4, 16)}
    whole = affinity(pool, cases=16).terms["pca_z"][0, 1]
    assert np.ptp(ends[16]) < np.ptp(ends[4]) and ends[16][0] < whole < ends[16][1]


@pytest.mark.parametrize("cases", [1, 2])
def test_one_or_two_cases_have_no_interval(tmp_path, cases):
    write_dataset(tmp_path, 1, "Alpha", (14, 14, 12), ["T1"], {"core": 1}, cases)
    write_dataset(tmp_path, 2, "Beta", (14, 14, 12), ["T2"], {"core": 1}, 4)
    write_dataset(tmp_path, 3, "Gamma", (14, 14, 12), ["T2"], {"core": 1}, 4)
    a = affinity(read_pool(tmp_path))
    assert np.isfinite(a.distance).all() and np.isnan(a.interval()[:, 0, 1:]).all() and np.isfinite(a.interval()[:, 1, 2]).all()
    again = Affinity.load(a.save(tmp_path / "a.csv"))
    assert np.isnan(again.interval()[:, 0, 1]).all() and np.allclose(again.interval()[:, 1, 2], a.interval()[:, 1, 2])


def test_the_interval_of_the_distance_follows_the_weights(pool):
    a = affinity(pool, weights={"fg_z": 1.0}, scaled=False)
    b = affinity(pool).weighted({"fg_z": 1.0})
    assert np.allclose(a.interval(), a.interval("fg_z"), equal_nan=True) and np.allclose(a.interval(), b.interval(), rtol=1e-4, equal_nan=True) and a.interval()[1, 0, 1] > 0
    assert Affinity(a.names, a.terms, a.weights).interval() is None


def test_a_term_that_does_not_count_may_be_missing(tmp_path):
    m = np.ones((2, 2)) - np.eye(2)
    a = Affinity(("a", "b"), {"x": m, "y": m * np.nan}, {"x": 1.0, "y": 0.0}, replicates={"x": m[None], "y": m[None] * np.nan})
    assert np.array_equal(a.distance, m) and np.array_equal(next(a.resampled()), m)


def test_a_path_is_explained_with_its_probability(pool):
    a = affinity(pool)
    best = best_paths(a, a.names[0], 2, 1)[0]
    why = explain(best, a)
    first = [best_paths(Affinity(a.names, {"d": d}, {"d": 1.0}), a.names[0], 2, 1)[0].sources for d in a.resampled()]
    assert why.probability == np.mean([f == best.sources for f in first]) and why.winners["probability"].sum() == pytest.approx(1)


def test_growth_computes_new_pairs_only(pool, monkeypatch):
    "A sixth task costs its own rows: rows of quantiles compared are counted."
    old = affinity(TaskPool(tuple(pool)[:-1]), mode="default")
    compared = []
    monkeypatch.setattr(module, "quantile_distance", lambda a, b, f=module.quantile_distance: (compared.append(len(a)), f(a, b))[1])
    grown = extend(old, pool)
    whole = affinity(pool)
    new, everything = compared[:4], compared[4:]  # `ica`, `fg_z`, `pca_z` and `brain_z`, each in one block
    assert new == [len(pool.tasks[-1])] * 4 and sum(everything) > sum(new)
    assert grown.names == whole.names and np.array_equal(grown.distance[:-1, :-1], old.distance) and grown.weights == old.weights
    assert all(np.allclose(grown.terms[t], whole.terms[t]) and np.allclose(grown.replicates[t], whole.replicates[t], rtol=1e-4, atol=1e-6) for t in TERMS)


def test_growth_with_a_target_in_the_papers_mode(pool, tmp_path):
    target = next(t.name for t in pool if t.modality == "T1")
    old = affinity(TaskPool(tuple(t for t in pool if t.label != "lesion")), mode="paper", target=target, shots=1)
    grown, whole = extend(old, pool), affinity(pool, mode="paper", target=target, shots=1)
    order = [grown.names.index(n) for n in whole.names]
    assert np.allclose(grown.distance[np.ix_(order, order)], whole.distance) and grown.names[-1] != target
    with pytest.raises(InputError, match="not in the pool"):
        extend(whole, TaskPool(tuple(t for t in pool if t.label != "lesion")))
    read = Affinity.load(old.save(tmp_path / "a.csv"))
    again = extend(read, pool)
    assert np.allclose(again.distance, grown.distance) and again.interval() is None
    with pytest.raises(InputError, match="how it was made"):
        extend(Affinity(("a", "b"), {}, {}), pool)


def test_growth_refuses_patients_that_changed(root, pool):
    "More patients in the pool: another split of the target, or other patients who stand for a task."
    fewer = read_pool(root, cases=2)
    target = next(t.name for t in pool if t.modality == "T1")
    for made in (affinity(fewer), affinity(fewer, target=target, shots=1, seed=1)):
        with pytest.raises(InputError, match="other patients"):
            extend(made, pool)


def test_only_one_shared_patient_has_the_object(tmp_path):
    "Where no pair of two patients has a distance, the pairs of one patient count; where none has, the task is named."
    mask = lambda rng, k: ((np.arange(12**3).reshape(12, 12, 12) < 200) & (k == 1)).astype(np.uint8)
    write_dataset(tmp_path, 3, "Gamma", (12, 12, 12), ["T1", "T2"], {"core": 1}, 3, mask=mask)
    assert np.isfinite(affinity(read_pool(tmp_path)).distance).all()
    everywhere = lambda rng, k: np.ones((12, 12, 12), np.uint8)  # nothing surrounds it
    write_dataset(tmp_path, 4, "Delta", (12, 12, 12), ["T1"], {"all": 1}, 2, mask=everywhere)
    assert np.isfinite(affinity(read_pool(tmp_path)).distance).all()
    with pytest.raises(InputError, match="contrast has no value between .*Delta-T1-all"):
        affinity(read_pool(tmp_path), weights={"contrast": 1.0})


def test_size_is_the_ratio_of_volumes(tmp_path):
    half = lambda n: lambda rng, k: (np.arange(12**3).reshape(12, 12, 12) < n).astype(np.uint8)
    write_dataset(tmp_path, 1, "One", (12, 12, 12), ["T1"], {"core": 1}, 2, mask=half(400))
    write_dataset(tmp_path, 2, "Two", (12, 12, 12), ["T1"], {"core": 1}, 2, mask=half(800))
    assert affinity(read_pool(tmp_path)).terms["size"][0, 1] == pytest.approx(np.log(2))


def test_a_table_does_not_replace_the_json_of_something_else(paper, root):
    kept = (root / "Dataset001_Alpha" / "dataset.json").read_bytes()
    with pytest.raises(InputError, match="dataset.json"):
        paper.save(root / "Dataset001_Alpha" / "dataset.csv")
    assert (root / "Dataset001_Alpha" / "dataset.json").read_bytes() == kept and not (root / "Dataset001_Alpha" / "dataset.csv").exists()


def test_parquet_is_the_csv(paper, tmp_path):
    a, b = (Affinity.load(paper.save(tmp_path / name)) for name in ("a.csv", "a.parquet"))
    assert a.names == b.names and a.weights == b.weights and a.parameters == b.parameters and np.array_equal(a.distance, b.distance)
    assert np.allclose(a.interval()[:, 0, 1], paper.interval()[:, 0, 1]) and a.frame(True).equals(b.frame(True))
    with pytest.raises(InputError, match="parquet"):
        paper.save(tmp_path / "a.xlsx")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match="b.parquet"):
        Affinity.load(tmp_path / "b.parquet")
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(InputError, match="c.parquet"):
        Affinity.load(tmp_path / "c.parquet")


def test_masks_empty_in_both_tasks_are_named_before_anything_is_compared(tmp_path):
    write_dataset(tmp_path, 3, "Gamma", (12, 12, 12), ["T1"], {"core": 1}, 2, mask=lambda rng, k: np.zeros((12, 12, 12), np.uint8))
    write_dataset(tmp_path, 4, "Delta", (12, 12, 12), ["T1"], {"core": 1}, 2, mask=lambda rng, k: np.zeros((12, 12, 12), np.uint8))
    with pytest.raises(InputError, match="Gamma-T1-core"):
        affinity(read_pool(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_voxel_that_is_no_number_is_refused_by_file(tmp_path, value):
    def image(rng, k):
        x = rng.normal(size=(12, 12, 12)); x[3, 4, 5] = value
        return x
    write_dataset(tmp_path, 5, "Holes", (12, 12, 12), ["T1"], {"core": 1, "rim": 2}, 2, image=image)
    with pytest.raises(InputError, match=r"c\d_0000.nii.gz"):
        affinity(read_pool(tmp_path))


def test_one_component_and_one_case_are_enough(tmp_path):
    "A volume whose columns are multiples of one profile has one component."
    image = lambda rng, k: np.outer(rng.random(144), np.arange(12)).reshape(12, 12, 12)
    write_dataset(tmp_path, 6, "Rank", (12, 12, 12), ["T1"], {"core": 1, "rim": 2}, 1, image=image)
    a = affinity(read_pool(tmp_path), mode="paper")
    assert np.isfinite(a.distance).all() and a.terms["ica"][0, 1] == 0  # two labels of one image


@pytest.mark.parametrize("wrong", [dict(signs="random"), dict(sings="loading"), dict(cases=0), dict(cases=2.5), dict(explained=0), dict(explained="x"), dict(explained=-1), dict(voxel=0), dict(voxel=0.001),
                                   dict(k=0.3), dict(k=(0.3, -1)), dict(exact=1), dict(replicates=-1), dict(weights={"fg_z": "1"}), dict(device="cuda:77"), dict(device="gpu")], ids=str)
def test_choices_that_do_not_exist(pool, wrong):
    with pytest.raises(InputError) as said:
        affinity(pool, **wrong)
    assert str(said.value).endswith(".") and ".nii" not in str(said.value)


def test_a_column_that_does_not_exist(paper):
    with pytest.raises(InputError, match="fg_z"):
        paper.interval("fgz")


def test_choices_are_the_same_in_any_type(pool):
    "A numpy number is the number that it is, in the cache too."
    a, b = affinity(pool, explained=np.int64(1), voxel=np.float32(2), replicates=0), affinity(pool, explained=1, voxel=2, replicates=0)
    assert np.array_equal(a.distance, b.distance) and a.parameters == b.parameters and json.dumps(a.parameters)
