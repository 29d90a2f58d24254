"End-to-end properties of the phantom zoo, on small grids."
import json
import os
from concurrent.futures import ProcessPoolExecutor

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqtransfer import phantom
from seqtransfer.core import InputError
from seqtransfer.phantom import COHORTS, demo_zoo, patient, smooth_noise, write_cohort, write_zoo

sizes = st.sampled_from([16, 18, 20, 24])
cohorts = st.sampled_from(COHORTS)
seeds = st.integers(0, 2**31)


def bytes_of(folder):
    "Every file below `folder` by its relative path."
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@settings(max_examples=8, deadline=None)
@given(cohort=cohorts, size=sizes, seed=seeds)
def test_a_data_set_is_readable_and_the_same_twice(tmp_path_factory, cohort, size, seed):
    a, b = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    for folder in (a, b):
        assert list(write_cohort(folder, cohort, size, 1, seed)) == [cohort.case(0)]
    assert bytes_of(a) == bytes_of(b)
    told = json.loads((a / cohort.folder / "dataset.json").read_text())
    label = nib.load(a / cohort.folder / "labelsTr" / f"{cohort.case(0)}.nii.gz")
    assert label.get_data_dtype() == np.uint8 and nib.aff2axcodes(label.affine) == ("R", "A", "S")
    y = np.asanyarray(label.dataobj)
    assert set(np.unique(y)) <= set(told["labels"].values())
    for channel in told["channel_names"]:
        image = nib.load(a / cohort.folder / "imagesTr" / f"{cohort.case(0)}_{int(channel):04d}.nii.gz")
        x = np.asanyarray(image.dataobj)
        assert image.shape == label.shape == (size,) * 3 and np.array_equal(image.affine, label.affine)
        assert x.min() == 0 and (x[y > 0] > 0).all() and (x[[0, -1]] == 0).all()  # skull-stripped, labels inside the brain


@settings(max_examples=6, deadline=None)
@given(cohort=cohorts, seed=seeds)
def test_patients_modalities_and_seeds_differ(cohort, seed):
    images, labels, fractions = patient(cohort, 0, 16, seed)
    first, second = images.values()
    assert np.array_equal(first > 0, second > 0) and not np.array_equal(first, second)
    assert fractions.min() > -1e-6 and fractions.sum(0).max() < 1 + 1e-5
    for other in (patient(cohort, 1, 16, seed), patient(cohort, 0, 16, seed + 1)):
        assert not np.array_equal(fractions, other[2])


@settings(max_examples=10, deadline=None)
@given(seed=seeds, h=st.floats(8, 60), fov=st.floats(100, 300))
def test_noise_is_the_same_field_on_every_grid(seed, h, fov):
    coarse, fine = (smooth_noise(np.random.default_rng(seed), n, fov, h) for n in (9, 27))
    assert np.allclose(coarse, fine[1::3, 1::3, 1::3], atol=1e-4)  # the centres of the coarse voxels are centres of fine ones


def test_a_zoo_is_found_again_and_nothing_else_is_overwritten(tmp_path):
    zoo = write_zoo(tmp_path / "zoo", size=16, cases=1, seed=3)
    before = bytes_of(zoo)
    assert write_zoo(zoo, size=16, cases=1, seed=3) == zoo
    for other in (dict(cases=2), dict(seed=4), dict(size=17)):
        with pytest.raises(InputError, match="zoo"):
            write_zoo(zoo, **(dict(size=16, cases=1, seed=3) | other))
    assert bytes_of(zoo) == before
    (zoo / COHORTS[2].folder / "dataset.json").unlink()
    with pytest.raises(InputError, match="zoo"):  # no longer complete
        write_zoo(zoo, size=16, cases=1, seed=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(InputError, match="mine"):
            write_zoo(path, size=16, cases=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_an_interrupted_zoo_leaves_nothing(tmp_path, monkeypatch):
    drawn = []

    def stops(case_of):
        def save(path, *rest):
            drawn.append(path)
            if len(drawn) > 4: raise KeyboardInterrupt
            return case_of(path, *rest)
        return save
    monkeypatch.setattr(phantom, "save_volume", stops(phantom.save_volume))
    with pytest.raises(KeyboardInterrupt):
        write_zoo(tmp_path / "zoo", size=16, cases=2)
    assert drawn and os.listdir(tmp_path) == []


def test_processes_may_ask_for_the_demonstration_zoo_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQTRANSFER_CACHE", str(tmp_path))
    with ProcessPoolExecutor(2) as pool:
        a, b = (f.result() for f in [pool.submit(demo_zoo, 16, 1) for _ in range(2)])
    assert a == b and (a / "zoo.json").is_file()
    assert os.listdir(tmp_path) == [a.name]


@pytest.mark.parametrize("bad", [dict(like="dicom"), dict(size=15), dict(cases=0)])
def test_impossible_parameters_are_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises(InputError):
        write_zoo(tmp_path / "zoo", **bad)
    assert not (tmp_path / "zoo").exists()
