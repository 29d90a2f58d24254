"""The paper's affinity, transcribed, against the package on files that the test writes; and bad input."""

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
from seqtransfer.affinity import (
    TERMS,
    Affinity,
    affinity,
    Sampled,
    compute_terms,
    draws,
    extend,
    sample,
    sampled,
    task_means,
)
from seqtransfer.core import InputError
from seqtransfer.datasets import read_pool
from seqtransfer.paths import best_paths, explain
from seqtransfer.similarity.signature import signatures
from seqtransfer.tasks import TaskPool


def write_description(folder, channels, labels, cases):
    "What nnU-Net v2 wants to know of a data set."
    about = {
        "channel_names": {str(i): channel for i, channel in enumerate(channels)},
        "labels": {"background": 0, **labels},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(about))


def write_dataset(root, number, name, shape, channels, labels, cases, unit=1.0, mask=None, image=None):
    "One nnU-Net v2 data set; `mask(rng, k)` and `image(rng, k)` may replace the random contents."
    folder = root / f"Dataset{number:03d}_{name}"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    write_description(folder, channels, labels, cases)
    for k in range(cases):
        rng = np.random.default_rng((number, k))
        field = gaussian_filter(rng.normal(size=shape), 2)
        y = mask(rng, k) if mask else np.digitize(field, np.quantile(field, [0.8, 0.93])).astype(np.uint8)
        nib.save(nib.Nifti1Image(y, np.eye(4)), folder / "labelsTr" / f"c{k}.nii.gz")
        for i in range(len(channels)):
            x = image(rng, k) if image else random_image(rng, field, i, unit)
            nib.save(nib.Nifti1Image(x.astype(np.float32), np.eye(4)), folder / "imagesTr" / f"c{k}_{i:04d}.nii.gz")
    return folder


def random_image(rng, field, channel, unit):
    "A volume that knows of the object, in the unit of a scanner."
    noise = gaussian_filter(rng.normal(size=field.shape), 1.5)
    return unit * (noise * 50 + field * (channel + 1) * 100 + 40)


CUBE = (12, 12, 12)


def write_cube(root, number, name, channels, labels, cases, **contents):
    "A data set of small cubes."
    return write_dataset(root, number, name, CUBE, channels, labels, cases, **contents)


def first_voxels(n):
    "A mask of so many voxels of a cube."
    return (np.arange(12**3).reshape(CUBE) < n).astype(np.uint8)


@pytest.fixture(scope="module", autouse=True)
def one_core():
    "Small products from many threads are slow on a busy machine."
    with threadpool_limits(1, "blas"):
        yield


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
    va = (a * a).sum() / n - ma**2
    vb = (b * b).sum() / n - mb**2
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
    assert all(np.array_equal(m, m.T) for term, m in paper.terms.items() if term != "few")
    for _, row in frame[frame["Node A"] < frame["Node B"]].iterrows():
        h, r, d = paper_distance(pool[row["Node A"]], pool[row["Node B"]])
        assert row["ICA"] == pytest.approx(h, rel=1e-7, abs=1e-9)
        assert row["OCA"] == pytest.approx(r, abs=1e-6)
        assert row["Distance"] == pytest.approx(d, abs=1e-5)


def z_inside(case):
    "z-scored intensities inside the mask; there is no constant background, so that all is foreground."
    x = np.asarray(nib.load(case.image).dataobj, float)
    y = np.asarray(nib.load(case.mask).dataobj)
    return ((x - x.mean()) / x.std())[np.isin(y, case.labels)]


def mean_distance(values, s, t):
    "The mean over pairs of two different patients."
    pairs = [(p, q) for p in s.cases for q in t.cases if p.patient != q.patient]
    return np.mean([wasserstein_distance(values(p), values(q)) for p, q in pairs])


def test_default_terms_are_means_of_exact_distances(pool):
    a = affinity(pool, explained=0.75, voxel=None)
    for i, s in enumerate(pool):
        for j, t in list(enumerate(pool))[i + 1 :]:
            assert a.terms["fg_z"][i, j] == pytest.approx(mean_distance(z_inside, s, t), rel=0.02, abs=0.005)
            assert a.terms["ica"][i, j] == pytest.approx(mean_distance(paper_sample, s, t), rel=0.01)


def test_default_divides_by_the_median(pool):
    a = affinity(pool)
    off = ~np.eye(len(pool), dtype=bool)
    assert set(a.contributions()) == {"fg_z", "pca_z", "same_label", "few"}
    assert all(np.median(m[off]) == pytest.approx(1) for m in a.contributions().values())
    assert np.allclose(sum(a.contributions().values())[off], a.distance[off])


def test_default_ignores_the_unit_of_a_data_set(root, pool, tmp_path):
    write_dataset(tmp_path, 1, "Alpha", (20, 24, 18), ["T1", "T2"], {"core": 2, "rim": 1}, 3)
    write_dataset(tmp_path, 2, "Beta", (26, 15, 21), ["FLAIR"], {"lesion": [1, 2]}, 2, unit=280.0)
    one, two = affinity(pool), affinity(read_pool(tmp_path))
    assert np.allclose(one.distance, two.distance, rtol=1e-3)
    assert not np.allclose(one.terms["ica"], two.terms["ica"], rtol=0.1)


def test_the_columns_of_the_table(paper, tmp_path):
    path = paper.save(tmp_path / "out" / "affinity.csv")
    names = ["ICA", "OCA", *(t for t in TERMS if t not in ("ica", "oca")), "Distance"]
    ends = [f"{name} {end}" for name in names for end in ("low", "high")]
    assert path.read_text().splitlines()[0].split(",") == ["Node A", "Node B", *names, *ends]
    assert len(pd.read_csv(path)) == 5 * 4


def test_round_trip(paper, tmp_path):
    path = paper.save(tmp_path / "affinity.csv")
    again = Affinity.load(path)
    assert again.names == paper.names
    assert again.weights == paper.weights
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
    assert np.array_equal(again.terms["fg_z"], m, equal_nan=True)
    assert again.distance[0, 1] == 1


def test_any_terms_and_asymmetric_distances_survive(tmp_path):
    m = np.array([[0, 1 / 3, 2], [0.1, 0, 4], [5, 6, 0]])
    a = Affinity(("NA", "b", "c"), {"leep": m}, {"leep": 2.0})
    again = Affinity.load(a.save(tmp_path / "a.csv"))
    assert np.array_equal(again.distance, 2 * m)
    assert again.names == a.names
    assert a.frame().set_index(["Node A", "Node B"]).loc[("NA", "c"), "Distance"] == 4


@pytest.mark.parametrize("spoil", ["no json", "no csv", "other json", "edited", "cut"])
def test_load_refuses_what_does_not_belong_together(paper, tmp_path, spoil):
    path = paper.save(tmp_path / "a.csv")
    about = path.with_suffix(".json")
    if spoil == "no json":
        about.unlink()
    if spoil == "no csv":
        path.unlink()
    if spoil == "other json":
        about.write_text("[]")
    if spoil == "edited":
        path.write_text(path.read_text().replace("Alpha", "Gamma", 1))
    if spoil == "cut":
        path.write_text("\n".join(path.read_text().splitlines()[:4]))
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
    assert a.names[-1] == target.name
    assert a.parameters["tasks"][target.name]["cases"] == 1
    shared = [t.name for t in pool if t.dataset == target.dataset and t.name != target.name]
    assert a.parameters["removed"] == dict.fromkeys(shared, 2)
    assert a.parameters["test"] == 2
    assert all(a.parameters["tasks"][n]["cases"] == 1 for n in shared)


def test_samples_are_shared_by_tasks_of_one_domain(pool):
    chosen = {tuple(c.patient for c in sample(t, 2, seed=5)) for t in pool if "Alpha" in t.cases[0].patient}
    assert len(chosen) == 1


def test_some_seed_chooses_each_patient(pool):
    chosen = [c.patient for t in pool for seed in range(9) for c in sample(t, 1, seed)]
    assert set(chosen) == {c.patient for t in pool for c in t.cases}


def test_order_of_the_pool_does_not_matter(pool):
    forth, back = (compute_terms(order).terms for order in (tuple(pool), tuple(pool)[::-1]))
    assert all(np.allclose(m, back[t][::-1, ::-1], rtol=1e-10) for t, m in forth.items())


def test_one_reading_serves_all_labels_of_an_image(pool, monkeypatch):
    from seqtransfer.similarity import signature

    opened = []

    def counting(read):
        def counted(x, *rest):
            opened.append(getattr(x, "image", x))
            return read(x, *rest)

        return counted

    for name in ("read_image", "read_labels"):
        monkeypatch.setattr(signature, name, counting(getattr(signature, name)))
    cases = [c for t in pool for c in t.cases]
    found = signatures(cases, keep=False)
    assert sorted(opened) == sorted({c.image for c in cases} | {c.mask for c in cases})
    assert len(cases) == len(found.objects) > len(found.images)


def test_one_task_is_refused(pool):
    with pytest.raises(InputError, match="two tasks"):
        affinity(TaskPool(pool.tasks[:1]))


def test_empty_masks_are_refused_by_task(root, tmp_path):
    write_cube(tmp_path, 3, "Gamma", ["T1"], {"core": 1, "rim": 2}, 2, mask=lambda rng, k: first_voxels(200))
    pool = read_pool(tmp_path)
    with pytest.raises(InputError, match=next(t.name for t in pool if t.label == "rim")):
        affinity(pool)


def test_one_empty_mask_is_left_out(tmp_path):
    "An empty mask is legal: `fg_z` is the mean over the others."
    write_cube(tmp_path, 3, "Gamma", ["T1", "T2"], {"core": 1}, 3, mask=lambda rng, k: first_voxels(200 * (k > 0)))
    a, b = read_pool(tmp_path)
    found = signatures([*a.cases, *b.cases])

    def samples(task):
        ordered = sorted(task.cases, key=lambda c: c.patient)
        return [found.objects[c.image_key, c.mask_key].fg_z for c in ordered]

    ours, theirs = samples(a), samples(b)
    assert not ours[0].size and not theirs[0].size
    two_patients = [np.abs(ours[1] - theirs[2]).mean(), np.abs(ours[2] - theirs[1]).mean()]
    assert compute_terms([a, b]).terms["fg_z"][0, 1] == pytest.approx(np.mean(two_patients))
    whole = affinity(TaskPool((a, b)))
    assert np.isfinite(whole.distance).all()
    assert np.isfinite(whole.interval()).all()


def test_constant_volume_is_refused_by_file(tmp_path):
    write_cube(tmp_path, 4, "Flat", ["T1"], {"core": 1, "rim": 2}, 2, image=lambda rng, k: np.full(CUBE, 5.0))
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

    def same(i, j):
        return s.patients[p, i] == s.patients[q, j]

    pairs = [(i, j) for i in range(len(s.cases[p])) for j in range(len(s.cases[q]))]
    within = paired and s.domains[p] == s.domains[q]
    wanted = [at for at in pairs if same(*at) == within] or pairs
    counted = [at for at in wanted if not np.isnan(d[at])] or [at for at in pairs if not np.isnan(d[at])]
    once = within and all(same(*at) for at in counted)  # a patient with himself is one patient
    total, weights = 0, 0
    for i, j in counted:
        weight = w[s.patients[p, i]] * (1 if once else w[s.patients[q, j]])
        total += weight * d[i, j]
        weights += weight
    return total / weights


def apart(pool):
    "The pool with the patients of one task replaced, so that a domain has tasks without a common patient."
    first, *rest = pool
    others = tuple(replace(c, patient=f"other {c.patient}") for c in first.cases)
    return (replace(first, cases=others), *rest)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("change", [tuple, apart])
@pytest.mark.parametrize("missing", [0, 0.5])
def test_means_under_weights_one_by_one(pool, paired, change, missing):
    s, rng = sampled(change(pool)), np.random.default_rng(0)
    items = np.arange(s.patients.size).reshape(s.patients.shape)
    D = rng.random((s.patients.size,) * 2)
    D[rng.random(D.shape) < missing] = np.nan
    D = D + D.T
    drawn = draws(s, 3).astype(float)
    means = task_means(D, items, s, paired, drawn)
    for p in range(len(s.cases)):
        for q in range(p):
            d = D[np.ix_(items[p], items[q])]
            if np.isnan(d).all():
                continue
            expected = [weighted_mean(d, p, q, s, w, paired) for w in drawn]
            assert means[:, p, q] == pytest.approx(expected)
            assert np.array_equal(means[:, q, p], means[:, p, q])


def test_draws_belong_to_the_patient(pool):
    whole, part = sampled(pool), sampled(tuple(pool)[1:3])
    one, two = draws(whole, 2000, seed=1), draws(part, 2000, seed=1)
    assert np.array_equal(one[:, [whole.names.index(n) for n in part.names]], two)
    assert (one[0] == 1).all()
    assert not np.array_equal(two, draws(part, 2000, seed=2))


@pytest.mark.parametrize("n", [3, 5, 10])
def test_weighted_means_vary_as_means_do(n):
    "The variance of a mean of n numbers is s2 / (n - 1), s2 with divisor n."
    s = Sampled((tuple(range(n)),), tuple(map(str, range(n))), np.arange(n)[None], np.array([0]))
    w, x = draws(s, 20000)[1:], np.random.default_rng(0).normal(size=n)
    means = (w * x).sum(1) / w.sum(1)
    assert means.mean() == pytest.approx(x.mean(), abs=0.03)
    assert means.var() == pytest.approx(x.var() / (n - 1), rel=0.05)


def test_more_patients_make_shorter_intervals(tmp_path):
    "A real effect: means of 4 patients and of 16 of the same population; and both intervals hold the mean of all."
    write_dataset(tmp_path, 1, "Alpha", (16, 16, 12), ["T1"], {"core": 1}, 16)
    write_dataset(tmp_path, 2, "Beta", (16, 16, 12), ["T2"], {"core": 1}, 16)
    pool = read_pool(tmp_path)
    ends = {n: affinity(pool, cases=n).interval("pca_z")[:, 0, 1] for n in (4, 16)}
    whole = affinity(pool, cases=16).terms["pca_z"][0, 1]
    assert np.ptp(ends[16]) < np.ptp(ends[4])
    assert ends[16][0] < whole < ends[16][1]


@pytest.mark.parametrize("cases", [1, 2])
def test_one_or_two_cases_have_no_interval(tmp_path, cases):
    write_dataset(tmp_path, 1, "Alpha", (14, 14, 12), ["T1"], {"core": 1}, cases)
    write_dataset(tmp_path, 2, "Beta", (14, 14, 12), ["T2"], {"core": 1}, 4)
    write_dataset(tmp_path, 3, "Gamma", (14, 14, 12), ["T2"], {"core": 1}, 4)
    a = affinity(read_pool(tmp_path))
    assert np.isfinite(a.distance).all()
    assert np.isnan(a.interval()[:, 0, 1:]).all()
    assert np.isfinite(a.interval()[:, 1, 2]).all()
    again = Affinity.load(a.save(tmp_path / "a.csv"))
    assert np.isnan(again.interval()[:, 0, 1]).all()
    assert np.allclose(again.interval()[:, 1, 2], a.interval()[:, 1, 2])


def test_the_interval_of_the_distance_follows_the_weights(pool):
    a = affinity(pool, weights={"fg_z": 1.0}, scaled=False)
    b = affinity(pool).weighted({"fg_z": 1.0})
    assert np.allclose(a.interval(), a.interval("fg_z"), equal_nan=True)
    assert np.allclose(a.interval(), b.interval(), rtol=1e-4, equal_nan=True)
    assert a.interval()[1, 0, 1] > 0
    assert Affinity(a.names, a.terms, a.weights).interval() is None


def test_a_term_that_does_not_count_may_be_missing(tmp_path):
    m = np.ones((2, 2)) - np.eye(2)
    replicates = {"x": m[None], "y": m[None] * np.nan}
    a = Affinity(("a", "b"), {"x": m, "y": m * np.nan}, {"x": 1.0, "y": 0.0}, replicates=replicates)
    assert np.array_equal(a.distance, m)
    assert np.array_equal(next(a.resampled()), m)


def test_a_path_is_explained_with_its_probability(pool):
    a = affinity(pool)
    target = a.names[0]
    best = best_paths(a, target, 2, 1)[0]
    why = explain(best, a)
    resampled = [Affinity(a.names, {"d": d}, {"d": 1.0}) for d in a.resampled()]
    first = [best_paths(one, target, 2, 1)[0].sources for one in resampled]
    assert why.probability == np.mean([sources == best.sources for sources in first])
    assert why.winners["probability"].sum() == pytest.approx(1)


def test_growth_computes_new_pairs_only(pool, monkeypatch):
    "A sixth task costs its own rows: rows of quantiles compared are counted."
    old = affinity(TaskPool(tuple(pool)[:-1]), mode="default")
    compared, compare = [], module.quantile_distance

    def counted(a, b):
        compared.append(len(a))
        return compare(a, b)

    monkeypatch.setattr(module, "quantile_distance", counted)
    grown = extend(old, pool)
    whole = affinity(pool)
    new, everything = compared[:4], compared[4:]  # `ica`, `fg_z`, `pca_z` and `brain_z`, each in one block
    assert new == [len(pool.tasks[-1])] * 4
    assert sum(everything) > sum(new)
    assert grown.names == whole.names
    assert grown.weights == old.weights
    assert np.array_equal(grown.distance[:-1, :-1], old.distance)
    for t in TERMS:
        assert np.allclose(grown.terms[t], whole.terms[t])
        assert np.allclose(grown.replicates[t], whole.replicates[t], rtol=1e-4, atol=1e-6)


def test_growth_with_a_target_in_the_papers_mode(pool, tmp_path):
    target = next(t.name for t in pool if t.modality == "T1")
    smaller = TaskPool(tuple(t for t in pool if t.label != "lesion"))
    old = affinity(smaller, mode="paper", target=target, shots=1)
    grown, whole = extend(old, pool), affinity(pool, mode="paper", target=target, shots=1)
    order = [grown.names.index(n) for n in whole.names]
    assert np.allclose(grown.distance[np.ix_(order, order)], whole.distance)
    assert grown.names[-1] != target
    with pytest.raises(InputError, match="not in the pool"):
        extend(whole, smaller)
    again = extend(Affinity.load(old.save(tmp_path / "a.csv")), pool)
    assert np.allclose(again.distance, grown.distance)
    assert again.interval() is None


def test_growth_needs_to_know_how_an_affinity_was_made(pool):
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
    write_cube(tmp_path, 3, "Gamma", ["T1", "T2"], {"core": 1}, 3, mask=lambda rng, k: first_voxels(200 * (k == 1)))
    assert np.isfinite(affinity(read_pool(tmp_path)).distance).all()
    everywhere = np.ones(CUBE, np.uint8)  # nothing surrounds it
    write_cube(tmp_path, 4, "Delta", ["T1"], {"all": 1}, 2, mask=lambda rng, k: everywhere)
    assert np.isfinite(affinity(read_pool(tmp_path)).distance).all()
    with pytest.raises(InputError, match="contrast has no value between .*Delta-T1-all"):
        affinity(read_pool(tmp_path), weights={"contrast": 1.0})


def test_size_is_the_ratio_of_volumes(tmp_path):
    write_cube(tmp_path, 1, "One", ["T1"], {"core": 1}, 2, mask=lambda rng, k: first_voxels(400))
    write_cube(tmp_path, 2, "Two", ["T1"], {"core": 1}, 2, mask=lambda rng, k: first_voxels(800))
    assert affinity(read_pool(tmp_path)).terms["size"][0, 1] == pytest.approx(np.log(2))


def test_a_table_does_not_replace_the_json_of_something_else(paper, root):
    folder = root / "Dataset001_Alpha"
    kept = (folder / "dataset.json").read_bytes()
    with pytest.raises(InputError, match="dataset.json"):
        paper.save(folder / "dataset.csv")
    assert (folder / "dataset.json").read_bytes() == kept
    assert not (folder / "dataset.csv").exists()


def test_parquet_is_the_csv(paper, tmp_path):
    a, b = (Affinity.load(paper.save(tmp_path / name)) for name in ("a.csv", "a.parquet"))
    assert (a.names, a.weights, a.parameters) == (b.names, b.weights, b.parameters)
    assert np.array_equal(a.distance, b.distance)
    assert np.allclose(a.interval()[:, 0, 1], paper.interval()[:, 0, 1])
    assert a.frame(True).equals(b.frame(True))


def test_what_is_no_table_is_refused(paper, tmp_path):
    with pytest.raises(InputError, match="parquet"):
        paper.save(tmp_path / "a.xlsx")
    whole = paper.save(tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-20])
    with pytest.raises(InputError, match="b.parquet"):
        Affinity.load(tmp_path / "b.parquet")
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(InputError, match="c.parquet"):
        Affinity.load(tmp_path / "c.parquet")


def test_masks_empty_in_both_tasks_are_named_before_anything_is_compared(tmp_path):
    for number, name in ((3, "Gamma"), (4, "Delta")):
        write_cube(tmp_path, number, name, ["T1"], {"core": 1}, 2, mask=lambda rng, k: first_voxels(0))
    with pytest.raises(InputError, match="Gamma-T1-core"):
        affinity(read_pool(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_voxel_that_is_no_number_is_refused_by_file(tmp_path, value):
    def image(rng, k):
        x = rng.normal(size=CUBE)
        x[3, 4, 5] = value
        return x

    write_cube(tmp_path, 5, "Holes", ["T1"], {"core": 1, "rim": 2}, 2, image=image)
    with pytest.raises(InputError, match=r"c\d_0000.nii.gz"):
        affinity(read_pool(tmp_path))


def test_one_component_and_one_case_are_enough(tmp_path):
    "A volume whose columns are multiples of one profile has one component."

    def image(rng, k):
        return np.outer(rng.random(144), np.arange(12)).reshape(CUBE)

    write_cube(tmp_path, 6, "Rank", ["T1"], {"core": 1, "rim": 2}, 1, image=image)
    a = affinity(read_pool(tmp_path), mode="paper")
    assert np.isfinite(a.distance).all()
    assert a.terms["ica"][0, 1] == 0  # two labels of one image


WRONG = [
    dict(signs="random"),
    dict(sings="loading"),
    dict(cases=0),
    dict(cases=2.5),
    dict(explained=0),
    dict(explained="x"),
    dict(explained=-1),
    dict(voxel=0),
    dict(voxel=0.001),
    dict(k=0.3),
    dict(k=(0.3, -1)),
    dict(exact=1),
    dict(replicates=-1),
    dict(weights={"fg_z": "1"}),
    dict(device="cuda:77"),
    dict(device="gpu"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_choices_that_do_not_exist(pool, wrong):
    with pytest.raises(InputError) as said:
        affinity(pool, **wrong)
    assert str(said.value).endswith(".")
    assert ".nii" not in str(said.value)


def test_a_column_that_does_not_exist(paper):
    with pytest.raises(InputError, match="fg_z"):
        paper.interval("fgz")


def test_choices_are_the_same_in_any_type(pool):
    "A numpy number is the number that it is, in the cache too."
    a = affinity(pool, explained=np.int64(1), voxel=np.float32(2), replicates=0)
    b = affinity(pool, explained=1, voxel=2, replicates=0)
    assert np.array_equal(a.distance, b.distance)
    assert a.parameters == b.parameters
    assert json.loads(json.dumps(a.parameters))["explained"] == 1
