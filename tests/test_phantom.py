"End-to-end properties of the phantom zoo, on small grids."

import json
import os
from concurrent.futures import ProcessPoolExecutor

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqtransfer import zoo as module
from seqtransfer.core import InputError
from seqtransfer.phantom import DEMO, FETS, ISEG, WMH2017, grid_of, patient, smooth_noise
from seqtransfer.zoo import demo_zoo, write_zoo

sizes = st.sampled_from([16, 18, 20, (24, 20, 16)])
cohorts = st.sampled_from((*DEMO, FETS[0], FETS[3], *WMH2017, *ISEG))
seeds = st.integers(0, 2**31)


def bytes_of(folder):
    "Every file below `folder` by its relative path."
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder): p.read_bytes() for p in files}


def test_a_data_set_is_the_same_twice(tmp_path):
    a, b = (write_zoo(tmp_path / name, size=16, cases=1, seed=5) for name in "ab")
    assert bytes_of(a) == bytes_of(b)


@pytest.fixture(scope="module")
def small_zoo(tmp_path_factory):
    "One patient of each demonstration data set."
    return write_zoo(tmp_path_factory.mktemp("small") / "zoo", size=16, cases=1, seed=5)


@pytest.mark.parametrize("cohort", DEMO, ids=lambda cohort: cohort.site.name)
def test_a_data_set_is_readable(small_zoo, cohort):
    folder = small_zoo / cohort.key
    told = json.loads((folder / "dataset.json").read_text())
    label = nib.load(next((folder / "labelsTr").iterdir()))
    y = np.asanyarray(label.dataobj)
    assert label.get_data_dtype() == np.uint8
    assert nib.aff2axcodes(label.affine) == ("R", "A", "S")
    assert set(np.unique(y)) <= set(told["labels"].values())
    images = [nib.load(path) for path in sorted((folder / "imagesTr").iterdir())]
    assert len(images) == len(told["channel_names"])
    for image in images:
        assert image.shape == label.shape == (16, 16, 16)
        assert np.array_equal(image.affine, label.affine)


@pytest.mark.parametrize("cohort", DEMO, ids=lambda cohort: cohort.site.name)
def test_images_are_skull_stripped_and_labels_lie_inside_the_brain(small_zoo, cohort):
    folder = small_zoo / cohort.key
    y = nib.load(next((folder / "labelsTr").iterdir())).get_fdata()
    for path in sorted((folder / "imagesTr").iterdir()):
        x = nib.load(path).get_fdata()
        assert x.min() == 0
        assert (x[[0, -1]] == 0).all()
        assert (x[y > 0] > 0).all()


@settings(max_examples=6, deadline=None)
@given(cohort=cohorts, shape=sizes, seed=seeds)
def test_patients_modalities_and_seeds_differ(cohort, shape, seed):
    p = patient(cohort, 0, shape, seed)
    first, second = (p.image(modality) for modality in cohort.modalities[:2])
    assert first.shape == p.labels.shape == grid_of(shape).shape
    assert np.array_equal(first > 0, second > 0)
    assert not np.array_equal(first, second)
    for other in (patient(cohort, 1, shape, seed), patient(cohort, 0, shape, seed + 1)):
        assert not np.array_equal(p.fractions, other.fractions)


@settings(max_examples=6, deadline=None)
@given(cohort=cohorts, shape=sizes, seed=seeds)
def test_fractions_are_fractions_and_labels_those_of_the_cohort(cohort, shape, seed):
    p = patient(cohort, 0, shape, seed)
    assert p.fractions.min() > -1e-6
    assert p.fractions.sum(0).max() < 1 + 1e-5
    assert set(np.unique(p.labels)) <= {0, *(label.value for label in cohort.labels.values())}


@settings(max_examples=10, deadline=None)
@given(seed=seeds, h=st.floats(8, 60), fov=st.floats(100, 300))
def test_noise_is_the_same_field_on_every_grid(seed, h, fov):
    shapes = (17, 51, (51, 17, 51))
    coarse, fine, slab = (smooth_noise(np.random.default_rng(seed), grid_of(n, fov), h) for n in shapes)
    shared_centres = fine[1::3, 1::3, 1::3]
    assert np.allclose(coarse, shared_centres, atol=1e-4)
    assert np.allclose(slab, fine[:, 17:34], atol=1e-4)


VOXELS = {  # of each label in patient 0, 24 voxels a side, seed 0
    "Dataset601_TumourA": [10, 46, 49],
    "fets-16": [2, 30, 20],
    "wmh-Utrecht": [0, 9],
    "iseg": [236, 948, 498],
}


@pytest.mark.parametrize("key, expected", VOXELS.items())
def test_a_seed_gives_the_patient_that_it_always_gave(key, expected):
    "Records and published numbers refer to these patients: a changed recipe changes all of them."
    cohort = next(c for c in (*DEMO, *FETS, *WMH2017, *ISEG) if c.key == key)
    labels = patient(cohort, 0, 24).labels
    voxels = [np.count_nonzero(labels == label.value) for label in cohort.labels.values()]
    assert voxels == pytest.approx(expected, abs=1)  # another machine's rounding may move a voxel


def test_a_zoo_is_found_again(tmp_path):
    zoo = write_zoo(tmp_path / "zoo", size=16, cases=1, seed=3)
    before = bytes_of(zoo)
    assert write_zoo(zoo, size=16, cases=1, seed=3) == zoo
    for other in (dict(cases=2), dict(seed=4), dict(size=17)):
        asked = dict(size=16, cases=1, seed=3) | other
        with pytest.raises(InputError, match="zoo"):
            write_zoo(zoo, **asked)
    assert bytes_of(zoo) == before


def test_a_zoo_that_is_no_longer_complete_is_refused(tmp_path):
    zoo = write_zoo(tmp_path / "zoo", size=16, cases=1, seed=3)
    (zoo / DEMO[2].key / "dataset.json").unlink()
    with pytest.raises(InputError, match="zoo"):
        write_zoo(zoo, size=16, cases=1, seed=3)


def test_nothing_else_is_overwritten(tmp_path):
    thesis = tmp_path / "mine" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("precious")
    for path in (thesis.parent, thesis):
        with pytest.raises(InputError, match="mine"):
            write_zoo(path, size=16, cases=1)
    assert thesis.read_text() == "precious"


def test_an_interrupted_zoo_is_no_zoo_and_goes_on(tmp_path, monkeypatch):
    whole = write_zoo(tmp_path / "whole", size=16, cases=2)
    drawn, save = [], module.save_volume

    def stops(path, image):
        drawn.append(path)
        if len(drawn) == 8:
            raise KeyboardInterrupt
        return save(path, image)

    monkeypatch.setattr(module, "save_volume", stops)
    with pytest.raises(KeyboardInterrupt):
        write_zoo(tmp_path / "zoo", size=16, cases=2)
    assert not (tmp_path / "zoo").exists()
    write_zoo(tmp_path / "zoo", size=16, cases=2)
    files = sum(path.suffix == ".gz" for path in bytes_of(whole))
    again = 2  # files of the third patient, who was begun; the two that were complete are not drawn again
    assert len(drawn) == files + again
    assert bytes_of(tmp_path / "zoo") == bytes_of(whole)
    assert sorted(os.listdir(tmp_path)) == ["whole", "zoo"]


def test_processes_may_ask_for_the_demonstration_zoo_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQTRANSFER_CACHE", str(tmp_path))
    with ProcessPoolExecutor(2) as pool:
        asked = [pool.submit(demo_zoo, 16, 1) for _ in range(2)]
        a, b = (future.result() for future in asked)
    assert a == b
    assert (a / "zoo.json").is_file()
    assert set(os.listdir(tmp_path)) == {a.name, "locks"}


@pytest.mark.parametrize(
    "bad", [dict(like="dicom"), dict(size=15), dict(size=(48, 48)), dict(cases=0), dict(cases="paper")]
)
def test_impossible_parameters_are_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises(InputError):
        write_zoo(tmp_path / "zoo", **bad)
    assert not (tmp_path / "zoo").exists()
