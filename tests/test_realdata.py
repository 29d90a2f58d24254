"Real labelled MRI, read where it lies; skipped where it is not."
import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import seqtransfer

from seqtransfer.affinity import affinity
from seqtransfer.core import InputError
from seqtransfer.datasets import read_pool, validate
from seqtransfer.paths import best_paths
from seqtransfer.tasks import Case, TaskPool, foreground, open_volume, protocol, read_case
from seqtransfer.transfer import Recipe, compare

TARGET = "Hippocampus-T1-posterior"
NAMES = {"Hippocampus-T1-anterior", TARGET, "MSLesion-FLAIR-lesion", "MSLesion-T1-lesion", "WMHVentricle-FLAIR-WMH", "WMHVentricle-FLAIR-ventricle"}


@pytest.fixture(scope="module")
def pool(realdata):
    return read_pool(realdata)


def test_six_tasks_and_two_folders_skipped_by_name(realdata):
    listed = seqtransfer("tasks", realdata, "--json")
    rows = {r["task"]: r for r in json.loads(listed.stdout)}
    assert listed.returncode == 0 and set(rows) == NAMES
    assert "skipped odd" in listed.stderr and "skipped fets2022_csv" in listed.stderr
    assert {n: rows[n]["patients"] for n in NAMES} == {**{n: 60 for n in NAMES if "Hipp" in n}, **{n: 3 for n in NAMES if "MS" in n}, **{n: 5 for n in NAMES if "Ven" in n}}
    assert rows["MSLesion-T1-lesion"]["shape"] == "182x218x182"


def test_the_data_are_sound(pool):
    found = validate(pool)
    assert found.ok and (found.tasks["least cm3"] > 0).all()


def test_flipped_and_other_grids(realdata):
    odd = realdata / "odd"
    flair, t1, mask = (odd / f"flipped_{n}.nii.gz" for n in ("FLAIR", "T1_to_FLAIR", "WMHmask"))
    a, b = (read_case(Case("p", image, mask, (1,))) for image in (flair, t1))  # the arrays are flipped against each other, the brains are not
    assert np.array_equal(a.mask, b.mask) and a.mask.any()
    head_a, head_b = foreground(a.image), foreground(b.image)
    assert 2 * (head_a & head_b).sum() / (head_a.sum() + head_b.sum()) > 0.8
    coarse = read_case(Case("p", odd / "othergrid_flair.nii.gz", odd / "othergrid_msk.nii.gz", (1,)))
    dwi = read_case(Case("p", odd / "othergrid_dwi.nii.gz", odd / "othergrid_msk.nii.gz", (1,)))
    assert coarse.image.shape == dwi.image.shape == (112, 112, 73) and np.array_equal(coarse.mask, dwi.mask)
    head_a, head_b = (u.image > np.percentile(u.image, 75) for u in (coarse, dwi))  # one head, FLAIR brought to the grid of the DWI
    assert 2 * (head_a & head_b).sum() / (head_a.sum() + head_b.sum()) > 0.7
    with pytest.raises(InputError, match="ras.hdr"):  # a small part of another head
        read_case(Case("p", odd / "ras.hdr", odd / "othergrid_msk.nii.gz", (1,)))
    assert open_volume(odd / "ras.hdr").shape == (62, 41, 34) and open_volume(odd / "norm.mgz").shape == (256, 256, 256)


def test_both_labels_of_a_hippocampus_share_patients(pool):
    split = protocol(pool, TARGET, shots=4, test=20)
    assert split.removed == {"Hippocampus-T1-anterior": 20} and len(split.test) == 20 and len(split.train) == 4
    assert not set(split.test.patients) & {p for t in split.sources for p in t.patients}


def test_a_path_is_chosen_trained_by_patches_and_tested(pool, tmp_path):
    some = TaskPool(tuple(t if "Hipp" in t.name else replace(t, cases=t.cases[:2]) for t in pool))
    near = affinity(some, target=TARGET, shots=4, test=20, cases=3)
    path = best_paths(near, TARGET, sources=2)[0]
    assert near.distance.shape == (6, 6) and set(path.sources) < NAMES - {TARGET}
    result = compare(some, TARGET, path, arms=("scratch", "sequential"), shots=4, test=20,
                     recipe=Recipe(source_steps=60, target_steps=60), out=tmp_path)
    dice = result.cases.groupby("arm").dice.mean()
    assert result.cases.groupby("arm").patient.nunique().eq(20).all()
    assert (tmp_path / "stages").is_dir() and len(list((tmp_path / "stages").iterdir())) == 4 and dice["sequential"] > 0
    assert dice["scratch"] > 0.3  # a posterior hippocampus fills a fiftieth of its crop: chance is below 0.05
