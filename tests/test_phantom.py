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
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_data_set_is_readable_and_the_same_twice(tmp_path):
    a, b = (write_zoo(tmp_path / name, size=16, cases=1, seed=5) for name in "ab")
    assert bytes_of(a) == bytes_of(b)
    for cohort in DEMO:
        told = json.loads((a / cohort.key / "dataset.json").read_text())
        label = nib.load(next((a / cohort.key / "labelsTr").iterdir()))
        y = np.asanyarray(label.dataobj)
        assert label.get_data_dtype() == np.uint8 and nib.aff2axcodes(label.affine) == ("R", "A", "S")
        assert set(np.unique(y)) <= set(told["labels"].values())
        images = sorted((a / cohort.key / "imagesTr").iterdir())
        assert len(images) == len(told["channel_names"])
        for path in images:
            image = nib.load(path)
            x = np.asanyarray(image.dataobj)
            assert image.shape == label.shape == (16, 16, 16) and np.array_equal(image.affine, label.affine)
            assert x.min() == 0 and (x[y > 0] > 0).all() and (x[[0, -1]] == 0).all()  # skull-stripped, labels inside the brain


@settings(max_examples=6, deadline=None)
@given(cohort=cohorts, shape=sizes, seed=seeds)
def test_patients_modalities_and_seeds_differ(cohort, shape, seed):
    p = patient(cohort, 0, shape, seed)
    first, second = (p.image(m) for m in cohort.modalities[:2])
    assert first.shape == p.labels.shape == grid_of(shape).shape
    assert np.array_equal(first > 0, second > 0) and not np.array_equal(first, second)
    assert p.fractions.min() > -1e-6 and p.fractions.sum(0).max() < 1 + 1e-5
    assert set(np.unique(p.labels)) <= {0, *(value for value, _ in cohort.labels.values())}
    for other in (patient(cohort, 1, shape, seed), patient(cohort, 0, shape, seed + 1)):
        assert not np.array_equal(p.fractions, other.fractions)


@settings(max_examples=10, deadline=None)
@given(seed=seeds, h=st.floats(8, 60), fov=st.floats(100, 300))
def test_noise_is_the_same_field_on_every_grid(seed, h, fov):
    coarse, fine, slab = (smooth_noise(np.random.default_rng(seed), grid_of(n, fov), h) for n in (17, 51, (51, 17, 51)))
    assert np.allclose(coarse, fine[1::3, 1::3, 1::3], atol=1e-4)  # the centres of the coarse voxels are centres of fine ones
    assert np.allclose(slab, fine[:, 17:34], atol=1e-4)


def test_a_zoo_is_found_again_and_nothing_else_is_overwritten(tmp_path):
    zoo = write_zoo(tmp_path / "zoo", size=16, cases=1, seed=3)
    before = bytes_of(zoo)
    assert write_zoo(zoo, size=16, cases=1, seed=3) == zoo
    for other in (dict(cases=2), dict(seed=4), dict(size=17)):
        with pytest.raises(InputError, match="zoo"):
            write_zoo(zoo, **(dict(size=16, cases=1, seed=3) | other))
    assert bytes_of(zoo) == before
    (zoo / DEMO[2].key / "dataset.json").unlink()
    with pytest.raises(InputError, match="zoo"):  # no longer complete
        write_zoo(zoo, size=16, cases=1, seed=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(InputError, match="mine"):
            write_zoo(path, size=16, cases=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_an_interrupted_zoo_is_no_zoo_and_goes_on(tmp_path, monkeypatch):
    whole = write_zoo(tmp_path / "whole", size=16, cases=2)
    drawn, save = [], module.save_volume

    def stops(path, image):
        drawn.append(path)
        if len(drawn) == 8: raise KeyboardInterrupt
        return save(path, image)
    monkeypatch.setattr(module, "save_volume", stops)
    with pytest.raises(KeyboardInterrupt):
        write_zoo(tmp_path / "zoo", size=16, cases=2)
    assert not (tmp_path / "zoo").exists()
    write_zoo(tmp_path / "zoo", size=16, cases=2)
    files = sum(path.suffix == ".gz" for path in bytes_of(whole))
    assert len(drawn) == files + 2  # the two patients that were complete are not drawn again, the third begins anew with its two
    assert bytes_of(tmp_path / "zoo") == bytes_of(whole) and sorted(os.listdir(tmp_path)) == ["whole", "zoo"]


def test_processes_may_ask_for_the_demonstration_zoo_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQTRANSFER_CACHE", str(tmp_path))
    with ProcessPoolExecutor(2) as pool:
        a, b = (f.result() for f in [pool.submit(demo_zoo, 16, 1) for _ in range(2)])
    assert a == b and (a / "zoo.json").is_file()
    assert set(os.listdir(tmp_path)) == {a.name, "locks"}


@pytest.mark.parametrize("bad", [dict(like="dicom"), dict(size=15), dict(size=(48, 48)), dict(cases=0), dict(cases="paper")])
def test_impossible_parameters_are_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises(InputError):
        write_zoo(tmp_path / "zoo", **bad)
    assert not (tmp_path / "zoo").exists()
