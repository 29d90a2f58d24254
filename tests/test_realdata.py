"Real labelled MRI, read where it lies; skipped where it is not."

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import seqtransfer

from seqtransfer.affinity import affinity
from seqtransfer.core import InputError
from seqtransfer.datasets import read_pool
from seqtransfer.paths import best_paths
from seqtransfer.protocol import protocol
from seqtransfer.tasks import Case, TaskPool, foreground, open_volume, read_case
from seqtransfer.study import Recipe
from seqtransfer.transfer import compare
from seqtransfer.validation import validate

TARGET = "Hippocampus-T1-posterior"
PATIENTS = {
    "Hippocampus-T1-anterior": 60,
    TARGET: 60,
    "MSLesion-FLAIR-lesion": 3,
    "MSLesion-T1-lesion": 3,
    "WMHVentricle-FLAIR-WMH": 5,
    "WMHVentricle-FLAIR-ventricle": 5,
}


def overlap(a, b):
    "The Dice of two masks."
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.fixture(scope="module")
def pool(realdata):
    return read_pool(realdata)


def test_six_tasks_and_two_folders_skipped_by_name(realdata):
    listed = seqtransfer("tasks", realdata, "--json")
    assert listed.returncode == 0
    rows = {row["task"]: row for row in json.loads(listed.stdout)}
    assert {name: row["patients"] for name, row in rows.items()} == PATIENTS
    assert "skipped odd" in listed.stderr
    assert "skipped fets2022_csv" in listed.stderr
    assert rows["MSLesion-T1-lesion"]["shape"] == "182x218x182"


def test_the_data_are_sound(pool):
    found = validate(pool)
    assert found.ok
    assert (found.tasks["least cm3"] > 0).all()


def test_arrays_that_are_flipped_against_each_other_show_one_brain(realdata):
    odd = realdata / "odd"
    flair, t1, mask = (odd / f"flipped_{name}.nii.gz" for name in ("FLAIR", "T1_to_FLAIR", "WMHmask"))
    a, b = (read_case(Case("p", image, mask, (1,))) for image in (flair, t1))
    assert np.array_equal(a.mask, b.mask)
    assert a.mask.any()
    assert overlap(foreground(a.image), foreground(b.image)) > 0.8


def test_images_on_another_grid_come_to_that_of_the_mask(realdata):
    odd = realdata / "odd"
    mask = odd / "othergrid_msk.nii.gz"
    coarse = read_case(Case("p", odd / "othergrid_flair.nii.gz", mask, (1,)))
    dwi = read_case(Case("p", odd / "othergrid_dwi.nii.gz", mask, (1,)))
    assert coarse.image.shape == dwi.image.shape == (112, 112, 73)
    assert np.array_equal(coarse.mask, dwi.mask)
    bright = [volume.image > np.percentile(volume.image, 75) for volume in (coarse, dwi)]
    assert overlap(*bright) > 0.7  # one head
    with pytest.raises(InputError, match="ras.hdr"):  # a small part of another head
        read_case(Case("p", odd / "ras.hdr", mask, (1,)))


def test_other_formats_open(realdata):
    assert open_volume(realdata / "odd" / "ras.hdr").shape == (62, 41, 34)
    assert open_volume(realdata / "odd" / "norm.mgz").shape == (256, 256, 256)


def test_both_labels_of_a_hippocampus_share_patients(pool):
    split = protocol(pool, TARGET, shots=4, test=20)
    assert split.removed == {"Hippocampus-T1-anterior": 20}
    assert (len(split.test), len(split.train)) == (20, 4)
    assert not set(split.test.patients) & {patient for task in split.sources for patient in task.patients}


def test_a_path_is_chosen_trained_by_patches_and_tested(pool, tmp_path):
    some = TaskPool(tuple(task if "Hipp" in task.name else replace(task, cases=task.cases[:2]) for task in pool))
    near = affinity(some, target=TARGET, shots=4, test=20, cases=3)
    path = best_paths(near, TARGET, sources=2)[0]
    assert near.distance.shape == (6, 6)
    assert set(path.sources) < PATIENTS.keys() - {TARGET}
    recipe, arms = Recipe(source_steps=60, target_steps=60), ("scratch", "sequential")
    result = compare(some, TARGET, path, arms=arms, shots=4, test=20, recipe=recipe, out=tmp_path)
    by_arm = result.cases.groupby("arm")
    assert by_arm.patient.nunique().eq(20).all()
    assert len(list((tmp_path / "stages").iterdir())) == 4
    dice = by_arm.dice.mean()
    assert dice["sequential"] > 0
    assert dice["scratch"] > 0.3  # a posterior hippocampus fills a fiftieth of its crop: chance is below 0.05
