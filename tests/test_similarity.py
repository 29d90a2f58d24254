"""The terms of the affinity against a transcription of their definitions that uses nothing of the package."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import binary_dilation, gaussian_filter
from scipy.stats import wasserstein_distance
from skimage.transform import resize as sk_resize
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from seqtransfer.core import InputError
from seqtransfer.similarity.image import (
    bounds,
    image_signature,
    pca_scores,
    quantile_distance,
    quantiles,
    resize,
    resize_matrix,
    tissue,
    wasserstein,
    wasserstein_matrix,
)
from seqtransfer.similarity.label import LabelSignature, label_signature, on_grid, overlaps, ssim, ssim_matrix
from seqtransfer.similarity.object import object_signature, shell

SHAPES = [(20, 31, 17), (24, 24, 24), (40, 12, 150)]


@pytest.fixture(scope="module", autouse=True)
def one_core():
    "Small products from many threads are slow on a busy machine."
    with threadpool_limits(1, "blas"):
        yield


def smooth(seed, shape):
    "A volume with structure, in odd units."
    rng = np.random.default_rng(seed)
    coarse = gaussian_filter(rng.normal(size=shape), 2)
    fine = gaussian_filter(rng.normal(size=shape), 0.7)
    return coarse * 300 + fine * 5 + 100


# Yang et al. 2024, sections 3.1 and 3.2, written down once more.
def paper_scores(volume):
    small = sk_resize(volume.astype(float), (128, 128, 128), anti_aliasing=True)
    return PCA(n_components=0.75, svd_solver="full").fit_transform(small.reshape(128 * 128, 128)).ravel()


def paper_ssim(a, b, k1=0.3, k2=0.3):
    a, b = a.astype(float).ravel(), b.astype(float).ravel()
    n, ma, mb = len(a), a.mean(), b.mean()
    va, vb = ((a - ma) ** 2).sum() / n, ((b - mb) ** 2).sum() / n
    cov = ((a - ma) * (b - mb)).sum() / n
    return ((2 * ma * mb + k1**2) * (2 * cov + k2**2)) / ((ma**2 + mb**2 + k1**2) * (va + vb + k2**2))


@pytest.mark.parametrize("shape", SHAPES)
def test_resize_is_scikit_image(shape):
    x = smooth(1, shape)
    for grid in ((128, 128, 128), (30, 16, 64)):
        assert np.abs(resize(x, grid) - sk_resize(x, grid, anti_aliasing=True)).max() < 1e-12 * np.abs(x).max()


def test_resize_keeps_integers_unscaled():
    x = np.arange(8**3, dtype=np.uint8).reshape(8, 8, 8)
    assert np.abs(resize(x, (8, 8, 8)) - x).max() == 0


@given(st.integers(2, 60), st.integers(2, 60))
@settings(max_examples=40, deadline=None)
def test_resize_matrix_averages(n, m):
    M = resize_matrix(n, m)
    assert M.shape == (m, n)
    assert np.allclose(M.sum(1), 1)
    assert M.min() >= 0
    assert np.allclose(M, M[::-1, ::-1])  # an axis has no direction


@pytest.mark.parametrize("seed", range(3))
def test_ica_is_the_papers(seed):
    a, b = smooth(seed, SHAPES[seed]), smooth(10 + seed, SHAPES[seed - 1]) * 2
    mine, theirs = [pca_scores(resize(v)) for v in (a, b)], [paper_scores(v) for v in (a, b)]
    for s, t in zip(mine, theirs):
        assert s.shape == t.shape
        assert np.abs(s - t).max() < 1e-8 * np.abs(t).max()
    assert wasserstein(*mine) == pytest.approx(wasserstein_distance(*theirs), rel=1e-8)
    rows = [quantiles(s)[None] for s in mine]
    assert quantile_distance(*rows)[0, 0] == pytest.approx(wasserstein_distance(*theirs), rel=0.01)


def test_threshold_must_be_exceeded():
    "Two equal components out of four explain exactly one half: for 0.5 a third is needed, as in scikit-learn."
    x = np.zeros((4, 2, 4))
    x.reshape(8, 4)[np.arange(8), np.repeat(np.arange(4), 2)] = np.tile([1, -1], 4)
    assert pca_scores(x, 0.5).size == 8 * PCA(0.5, svd_solver="full").fit(x.reshape(8, 4)).n_components_ == 24


@given(st.integers(0, 10**6), st.floats(0.1, 50), st.floats(-100, 100))
@settings(max_examples=20, deadline=None)
def test_scores_ignore_offset_and_follow_unit(seed, unit, offset):
    x = np.random.default_rng(seed).normal(size=(9, 8, 7))
    assert np.allclose(pca_scores(unit * x + offset), unit * pca_scores(x), atol=1e-7 * unit)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, np.nan])
def test_constant_volume_is_refused(value):
    with pytest.raises(InputError, match="constant"):
        pca_scores(resize(np.full((10, 11, 12), value)))


sample = arrays(np.float64, st.integers(1, 60), elements=st.floats(-1e3, 1e3, width=32))


@given(sample, sample, sample, st.floats(-100, 100))
@settings(max_examples=60, deadline=None)
def test_wasserstein_is_a_metric(x, y, z, c):
    assert wasserstein(x, x) == 0
    assert wasserstein(x, x + c) == pytest.approx(abs(c), abs=1e-9)
    assert wasserstein(x, y) == pytest.approx(wasserstein(y, x), abs=1e-9)
    assert wasserstein(x, z) <= wasserstein(x, y) + wasserstein(y, z) + 1e-9


@given(sample, sample)
@settings(max_examples=60, deadline=None)
def test_quantile_distance_errs_by_less_than_the_range_over_n(x, y):
    "Each sample of k values is misread on k cells of width 1/n at most."
    bound = (len(x) + len(y)) / 1024 * (np.ptp(np.concatenate([x, y])) + 1e-9)
    assert abs(quantile_distance(quantiles(x)[None], quantiles(y)[None])[0, 0] - wasserstein(x, y)) <= bound + 1e-9


@given(sample)
@settings(max_examples=40, deadline=None)
def test_quantiles_of_as_many_as_there_are_is_the_sorted_sample(x):
    assert np.array_equal(quantiles(x, len(x)), np.sort(x))


@given(st.lists(sample, min_size=1, max_size=5), st.lists(sample, min_size=1, max_size=3), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_all_pairs_are_the_exact_distance(xs, ys, chunk):
    xs, ys = [np.sort(x) for x in xs], [np.sort(y) for y in ys]
    for others in (None, ys):
        expected = [[wasserstein_distance(x, y) for y in (others or xs)] for x in xs]
        assert np.allclose(wasserstein_matrix(xs, others, chunk=chunk), expected, rtol=1e-6, atol=1e-9)


def test_all_pairs_of_scores_are_exact():
    "Scores of volumes with two, three and more components, to a millionth of SciPy's distance."
    scores = []
    for k, explained in enumerate((1, 2, 0.75, 0.9)):
        volume = resize(smooth(k, SHAPES[k % 3]))
        scores.append(np.sort(pca_scores(volume, explained)))
    assert len({len(s) for s in scores}) > 2
    expected = [[wasserstein_distance(a, b) for b in scores] for a in scores]
    assert np.allclose(wasserstein_matrix(scores, threads=2), expected, rtol=1e-6, atol=1e-12)


def test_full_scores_are_sorted_and_quantiles_are_theirs():
    x = smooth(0, (20, 20, 20))
    short, full = image_signature(x), image_signature(x, exact=True)
    assert short.ica.shape == short.pca_z.shape == (1024,)
    assert np.allclose(full.ica, np.sort(pca_scores(resize(x))), rtol=0, atol=1e-9 * np.ptp(full.ica))
    single_precision = 1e-5 * np.ptp(full.ica)
    assert np.abs(quantiles(full.ica) - short.ica).max() < single_precision


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("turn", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_memory_order_and_torch_change_nothing(turn, exact):
    x = np.pad(smooth(4, (20, 24, 18)), ((3, 2), (0, 5), (4, 4)))
    stored = np.ascontiguousarray(x.transpose(turn)).transpose(np.argsort(turn))
    assert np.array_equal(stored, x)
    assert bounds(stored != 0) == (slice(3, 23), slice(0, 24), slice(4, 22))
    ours = image_signature(x, exact)
    theirs = image_signature(stored[::-1, ::-1][::-1, ::-1], exact)
    on_torch = image_signature(stored, exact, device="cpu:0")
    for term in ("ica", "pca_z"):
        expected = getattr(ours, term)
        rounding = (1e-9 if exact else 1e-5) * np.ptp(expected)
        for other in (theirs, on_torch):
            assert np.allclose(getattr(other, term), expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("background", [0.0, -37.5, 1000.0])
def test_margins_change_nothing_but_the_grid(background):
    """A brain on a constant background: what is cut off, single precision and another constant leave the scores of
    scikit-image and scikit-learn."""
    x = np.full((40, 36, 30), background, np.float32)
    x[9:31, 4:30, 5:22] += 50 + smooth(3, (22, 26, 17)).astype(np.float32)
    mask = np.zeros(x.shape, bool)
    mask[10:14, 0:8, 6:10] = True  # half of it in the margin
    ours, exact = (image_signature(x, exact) for exact in (False, True))
    grid = sk_resize(x.astype(np.float64), (128,) * 3, anti_aliasing=True)
    theirs = np.sort(PCA(0.75).fit_transform(grid.reshape(-1, 128)).ravel())
    assert np.abs(exact.ica - theirs).max() < 1e-6 * np.ptp(theirs)
    assert np.abs(ours.ica - quantiles(theirs)).max() < 1e-5 * np.ptp(theirs)
    brain = x[x != background]
    z = np.where(x != background, (x - brain.mean()) / brain.std(), 0)
    found = object_signature(tissue(x), shell(mask, None, (1, 1, 1)))
    assert np.abs(found.fg_z - quantiles(z[mask])).max() < 1e-3


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("exact", [False, True])
def test_a_volume_that_varies_along_one_axis_only_has_no_components(order, exact):
    profile = np.random.default_rng(0).normal(300, 100, 40)
    with pytest.raises(InputError, match="constant"):
        image_signature(np.array(np.broadcast_to(profile, (50, 50, 40)), order=order), exact)


@pytest.mark.parametrize("value", [5.1, -2000.0])
def test_tissue_without_contrast_has_no_components(value):
    "A foreground of one value: its raw volume has components, its normalised one has none."
    x = np.zeros((20, 20, 20))
    x[4:9, 5:11, 6:12] = value
    assert tissue(x).sd == 0
    with pytest.raises(InputError, match="constant"):
        image_signature(x)


@pytest.mark.parametrize("shape", [(12, 10, 8), (64, 64, 64)])
def test_brain_z_is_the_histogram_of_the_foreground(shape):
    "Exact where all voxels are taken; on a grid whose sides have factors in common with any even step, close."
    x = np.pad(smooth(5, shape), 2)
    z = (x - x[x != 0].mean()) / x[x != 0].std()
    found, expected = image_signature(x).brain_z, quantiles(z[x != 0])
    assert np.abs(found - expected).mean() < (1e-4 if shape[0] == 12 else 0.01)


def test_shell_is_a_dilation_without_mask_and_ignored():
    rng = np.random.default_rng(0)
    mask = rng.random((20, 18, 16)) > 0.99
    ignored = rng.random((20, 18, 16)) > 0.9
    box, inner, near = shell(mask, ignored & ~mask, (2.0, 5.0, 9.0))
    whole = np.zeros_like(mask)
    whole[box] = near
    expected = binary_dilation(mask, np.ones((5, 3, 3)), iterations=1) & ~mask & ~ignored
    assert np.array_equal(whole, expected)
    assert np.array_equal(mask[box], inner)


def test_contrast_by_hand():
    x = np.zeros((24, 24, 24))
    x[2:22, 2:22, 2:22] = 10 + np.arange(20)[:, None, None] % 2  # alternating, mean 10.5, sd 0.5
    mask = np.zeros(x.shape, bool)
    mask[10:14, 10:14, 10:14] = True
    x[mask] += 5
    s = object_signature(tissue(x), shell(mask, None, (5.0, 5.0, 5.0)))
    around = np.zeros_like(mask)
    around[9:15, 9:15, 9:15] = True
    difference = x[mask].mean() - x[around & ~mask].mean()
    assert s.contrast == pytest.approx(difference / x[x != 0].std(), abs=1e-5)


masks = arrays(bool, (6, 5, 4))


@given(masks, masks, st.sampled_from([(0.3, 0.3), (0.01, 0.03)]))
@settings(max_examples=60, deadline=None)
def test_ssim_is_the_papers(a, b, k):
    assert ssim(a, b, *k) == pytest.approx(paper_ssim(a, b, *k), abs=1e-12)
    assert ssim(a, a, *k) == pytest.approx(1, abs=1e-12)
    assert ssim(a, b, *k) <= 1 + 1e-12
    assert ssim(a, b, *k) == pytest.approx(ssim(b, a, *k), abs=1e-12)


@given(st.lists(masks, min_size=1, max_size=5), st.integers(1, 50))
@settings(max_examples=40, deadline=None)
def test_gram_matrix_is_the_definition(ms, block):
    signatures = [LabelSignature(np.flatnonzero(m).astype(np.int32), m.size) for m in ms]
    assert np.array_equal(overlaps(signatures, block), [[(a & b).sum() for b in ms] for a in ms])
    assert np.abs(ssim_matrix(signatures) - [[paper_ssim(a, b) for b in ms] for a in ms]).max() < 1e-9


@pytest.mark.parametrize(
    "share,k,expected",
    [(0.001, (0.3, 0.3), 0.978), (0.01, (0.3, 0.3), 0.818), (0.001, (0.01, 0.03), 0.310), (0.01, (0.01, 0.03), 0.034)],
)
def test_disjoint_masks(share, k, expected):
    i = np.arange(1_000_000).reshape(100, 100, 100)
    assert round(ssim(i < share * i.size, i >= (1 - share) * i.size, *k), 3) == expected


def test_masks_of_unequal_shape_compare_on_the_grid():
    a, b = [smooth(i, s) > 130 for i, s in enumerate(SHAPES[:2])]
    grids = [sk_resize(m.astype(float), (128, 128, 128), anti_aliasing=True) >= 0.5 for m in (a, b)]
    for m, g in zip((a, b), grids):
        assert (on_grid(m) != g).sum() <= 1e-5 * g.size  # rounding may decide a tie
    assert ssim_matrix([label_signature(a), label_signature(b)])[0, 1] == pytest.approx(paper_ssim(*grids), abs=1e-6)
