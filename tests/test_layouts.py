"""Layouts written by hand from the data sets' own descriptions, never by the phantom's writer: what is listed, what is
read, what is refused."""

import gzip
import json
import re
import shlex
import shutil
import struct
from collections import Counter
from itertools import product

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nibabel.processing import resample_from_to
from scipy.ndimage import gaussian_filter

from seqtransfer.core import InputError
from seqtransfer.datasets import read_fets, read_iseg, read_manifest, read_msd, read_nnunet, read_pool, read_wmh
from seqtransfer.protocol import protocol, twins
from seqtransfer.tasks import (
    Case,
    foreground,
    open_volume,
    read_case,
    read_task,
    slug,
    task_name,
    task_parts,
    unread_format,
)
from seqtransfer.validation import validate

SHAPE = (6, 7, 8)
GRID = np.array([[2.0, 0, 0, -9], [0, 2, 0, -5], [0, 0, 3, 4], [0, 0, 0, 1]])
MODALITIES = ("t1", "t1ce", "t2", "flair")
TUMOUR = {"NCR": 1, "ED": 2, "ET": 4}
PATIENTS = (511, 6, 15, 47, 22, 34, 12, 8, 4, 8, 14, 11, 35, 6, 13, 30, 9, 382, 4, 33, 35, 7, 5)
SIZES = dict(enumerate(PATIENTS, start=1))  # patients of each institution
SOURCES = 1, 4, 6, 13, 18, 20, 21


def save(path, voxels, affine=GRID, kind=nib.Nifti1Image):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind(voxels, affine).to_filename(path)
    return path


def image(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(500, 100, shape).astype(np.float32)


def label_map(*values, dtype=np.uint8, shape=SHAPE):
    "Each value on two voxels of its own, the i-th in the i-th plane from the second on."
    y = np.zeros(shape, dtype)
    for i, value in enumerate(values):
        y[1 + i, 2:4, 3] = value
    return y


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def parts(pool):
    "What tells the tasks apart."
    return {(task.site, task.modality, task.label) for task in pool}


def sizes(pool):
    "The number of patients of each task."
    return {task.name: len(task.patients) for task in pool}


def institutions(pool):
    "The number of cases of each institution's tasks."
    return {int(task.site): len(task) for task in pool}


def skipped(pool):
    "Where something was passed over."
    return [str(where) for where, _ in pool.skipped]


def errors(checked):
    "The problems that are errors."
    return checked.problems.query("severity == 'error'")


def refused(call, *words):
    "The sentence with which a call is refused, in which the words are."
    with pytest.raises(InputError) as e:
        call()
    said = str(e.value)
    assert all(str(word) in said for word in words), said
    return said


def redescribe(folder, change):
    "Changes the `dataset.json` of a data set."
    file = folder / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def flip_bit(file, at):
    "Flips the lowest bit of the byte at a place of a file."
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


# --- FeTS 2022


def partition(folder, rows, name="partitioning_1.csv"):
    "Writes a table of (institution, subject), with the line ends of the real one."
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["Partition_ID,Subject_ID", *(f"{site},{subject}" for site, subject in rows)]
    (folder / name).write_bytes("".join(f"{line}\r\n" for line in lines).encode())


def fets(root, rows, empty=False):
    "Patients of institutions; `rows` of (institution, number)."
    folder = root / "MICCAI_FeTS2022_TrainingData"
    rows = [(site, f"FeTS2022_{n:05}") for site, n in rows]
    partition(folder, rows)
    for i, (_, subject) in enumerate(rows):
        for j, m in enumerate((*MODALITIES, "seg")):
            file = folder / subject / f"{subject}_{m}.nii.gz"
            if empty:
                touch(file)
            elif m == "seg":
                save(file, label_map(1, 2, 4))
            else:
                save(file, image(10 * i + j))
    return folder


ROWS = [(3, 12), (16, 3), (1, 7), (16, 1), (1, 2)]


def test_fets_reads_institutions_from_the_table(tmp_path):
    folder = fets(tmp_path, ROWS)
    pool = read_fets(folder)
    expected = product((1, 3, 16), ("T1", "T1ce", "T2", "FLAIR"), TUMOUR)
    assert {(int(task.site), task.modality, task.label) for task in pool} == set(expected)
    assert len(pool) == 36
    assert all(len(task) == {1: 2, 3: 1, 16: 2}[int(task.site)] for task in pool)
    task = pool["fets-16-T2-NCR"]
    assert [case.image.name for case in task.cases] == ["FeTS2022_00001_t2.nii.gz", "FeTS2022_00003_t2.nii.gz"]
    read = read_case(pool["fets-16-FLAIR-ET"].cases[0])
    assert np.array_equal(read.image, image(33))
    assert np.array_equal(read.mask, label_map(1, 2, 4) == 4)
    assert read.image.dtype == np.float32
    assert pool["fets-16-T2-NCR"].patients == pool["fets-16-FLAIR-ET"].patients
    assert read_pool(tmp_path).names == read_pool(folder).names == pool.names
    assert validate(pool).ok


def test_fets_reads_another_partition(tmp_path):
    folder = fets(tmp_path, ROWS, empty=True)
    sites = {12: 1, 3: 1, 7: 1, 1: 2, 2: 3}
    partition(folder, [(site, f"FeTS2022_{n:05}") for n, site in sites.items()], "partitioning_2.csv")
    assert institutions(read_fets(folder, partition="partitioning_2.csv")) == {1: 3, 2: 1, 3: 1}


def test_fets_options(tmp_path):
    folder = fets(tmp_path, ROWS, empty=True)
    for one in ([16], ["16"], (16,)):
        assert set(institutions(read_fets(folder, institutions=one))) == {16}
    assert set(institutions(read_fets(folder, institutions=["01", 3]))) == {1, 3}
    some = read_fets(folder, modalities=["T2", "T1ce"], labels=["ED"])
    assert {(task.modality, task.label) for task in some} == {("T2", "ED"), ("T1ce", "ED")}
    assert institutions(read_fets(folder, cases=1)) == {1: 1, 3: 1, 16: 1}
    refused(lambda: read_fets(folder, institutions=[99]), "99")
    refused(lambda: read_fets(folder, modalities=["T3"]), "T3")
    refused(lambda: read_fets(folder, labels=["NRC"]), "NRC", "NCR")
    refused(lambda: read_fets(folder, partition="partitioning_7.csv"), "partitioning_7.csv")


def test_fets_with_a_part_of_the_patients(tmp_path):
    folder = fets(tmp_path, ROWS, empty=True)
    for subject in ("FeTS2022_00012", "FeTS2022_00007"):
        shutil.rmtree(folder / subject)
    pool = read_fets(folder)
    assert institutions(pool) == {1: 1, 16: 2}
    assert len(pool) == 24
    refused(lambda: read_fets(folder, institutions=[3]), "3")
    (folder / "FeTS2022_00003" / "FeTS2022_00003_t1ce.nii.gz").unlink()
    refused(lambda: read_fets(folder), "FeTS2022_00003_t1ce.nii.gz")


def test_fets_validation_has_no_labels(tmp_path):
    fets(tmp_path, ROWS[:1], empty=True)
    held_out = tmp_path / "MICCAI_FeTS2022_ValidationData"
    partition(held_out, [(-1, "FeTS2022_01718")], "validation.csv")
    for m in MODALITIES:
        touch(held_out / "FeTS2022_01718" / f"FeTS2022_01718_{m}.nii.gz")
    pool = read_pool(tmp_path)
    assert len(pool) == 12
    assert any("MICCAI_FeTS2022_ValidationData" in where for where in skipped(pool))


def shuffled(rows):
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def test_the_whole_of_fets_is_listed_without_opening_a_volume(tmp_path):
    assert sum(SIZES.values()) == 1251
    sites = np.repeat(list(SIZES), list(SIZES.values()))
    rows = shuffled([(site, 3 * i) for i, site in enumerate(sites)])
    folder = fets(tmp_path, rows, empty=True)  # no file holds a byte: opening one would fail
    pool = read_fets(folder)
    assert len(pool) == 23 * 12
    assert all(len(task) == len(task.patients) == SIZES[int(task.site)] for task in pool)
    sources = read_fets(folder, institutions=SOURCES)
    assert len(sources) == 84
    assert len(read_fets(folder, institutions=(*SOURCES, 16))) == 96
    assert min(map(len, sources)) >= 30
    assert set(institutions(sources)) == set(SOURCES)


def read_partition(file):
    "The rows (institution, subject) of a partition table, read without the package."
    rows = [line.split(",") for line in file.read_text().split()[1:]]
    return [(int(site), subject) for site, subject in rows]


def test_the_real_partition_tables(realdata, tmp_path):
    tables = realdata / "fets2022_csv"
    rows = read_partition(tables / "partitioning_1.csv")
    assert Counter(site for site, _ in rows) == SIZES
    here = []  # four patients of each institution
    for site in SIZES:
        here += [(site, int(subject[-5:])) for at, subject in rows if at == site][:4]
    folder = fets(tmp_path, here, empty=True)
    for table in tables.iterdir():
        shutil.copy(table, folder)
    pool = read_fets(folder)
    assert institutions(pool) == {site: min(n, 4) for site, n in SIZES.items()}
    assert len(pool) == 276
    subjects = {case.image.parent.name for case in pool["fets-16-T2-NCR"].cases}
    assert subjects == {f"FeTS2022_{n:05}" for site, n in here if site == 16}
    finer = {subject: site for site, subject in read_partition(tables / "partitioning_2.csv")}
    split = {finer[f"FeTS2022_{n:05}"] for _, n in here}
    assert set(institutions(read_fets(folder, partition="partitioning_2.csv"))) == split


# --- iSeg-2019

TISSUES = {"CSF": 10, "GM": 150, "WM": 250}


def iseg_images(seed):
    "T1, T2 and label; the label can be told from either image, voxel by voxel, whatever the axes."
    y = np.random.default_rng(seed).choice([0, 10, 150, 250], SHAPE).astype(np.int16)
    texture = np.arange(y.size).reshape(SHAPE) % 7
    return {"T1": (y + 1000 + texture).astype(np.int16), "T2": (5000 - y).astype(np.int16), "label": y}


def iseg(root, subjects, ending=".hdr", kind=nib.Nifti1Pair, trailing=True):
    folder = root / "iSeg-2019-Training"
    for n in subjects:
        for what, x in iseg_images(n).items():
            save(folder / f"subject-{n}-{what}{ending}", x[..., None] if trailing else x, np.eye(4), kind)
    return folder


KINDS = {
    "NIfTI pair": (".hdr", nib.Nifti1Pair),
    "Analyze 7.5": (".hdr", nib.AnalyzeImage),
    "SPM99": (".hdr", nib.Spm99AnalyzeImage),
    "nii": (".nii", nib.Nifti1Image),
    "nii.gz": (".nii.gz", nib.Nifti1Image),
}


@pytest.mark.parametrize("trailing", [True, False], ids=["4-D", "3-D"])
@pytest.mark.parametrize("kind", KINDS)
def test_iseg_in_every_format(tmp_path, kind, trailing):
    folder = iseg(tmp_path, (1, 2, 10), *KINDS[kind], trailing=trailing)
    pool = read_iseg(folder)
    assert set(pool.names) == {f"iseg-{m}-{y}" for m in ("T1", "T2") for y in TISSUES}
    assert set(sizes(pool).values()) == {3}
    for n, case in zip((1, 2, 10), pool["iseg-T1-GM"].cases):  # subject-2 before subject-10
        assert case.image.name.startswith(f"subject-{n}-T1")
        assert case.mask.name.startswith(f"subject-{n}-label")
    case = pool["iseg-T2-WM"].cases[2]
    read, written = read_case(case), iseg_images(10)
    assert read.image.shape == read.mask.shape == SHAPE
    assert np.array_equal(read.mask, read.image == 5000 - 250)
    assert np.array_equal(np.sort(read.image, axis=None), np.sort(written["T2"], axis=None))
    if kind != "Analyze 7.5":  # without an origin and a direction in its header, left and right are a convention
        assert np.array_equal(read.image, written["T2"])
        assert np.array_equal(read.mask, written["label"] == 250)
    assert validate(pool).ok
    assert read_pool(tmp_path).names == pool.names


def test_iseg_validation_is_skipped_by_name_and_options(tmp_path):
    iseg(tmp_path, (1, 2, 3))
    for n, m in product((11, 12), ("T1", "T2")):
        file = tmp_path / "iSeg-2019-Validation" / f"subject-{n}-{m}.hdr"
        save(file, iseg_images(n)[m][..., None], np.eye(4), nib.Nifti1Pair)
    pool = read_pool(tmp_path)
    assert len(pool) == 6
    assert set(sizes(pool).values()) == {3}
    assert any("iSeg-2019-Validation" in where for where in skipped(pool))
    folder = tmp_path / "iSeg-2019-Training"
    some = read_iseg(folder, modalities=["T2"], labels=["CSF", "WM"], cases=2)
    assert sizes(some) == {"iseg-T2-CSF": 2, "iseg-T2-WM": 2}
    refused(lambda: read_iseg(folder, labels=["GW"]), "GW")
    for file in (folder / "subject-2-T2.hdr", folder / "subject-2-T2.img"):
        file.unlink()
    refused(lambda: read_iseg(folder), "subject-2-T2")


# --- WMH 2017

OTHER_GRID = np.diag([1.0, 1, 1, 1])
TRAINING = ["Utrecht/0", "Utrecht/2", "Singapore/50", "Amsterdam/GE3T/100", "Amsterdam/GE3T/101", "Amsterdam/GE3T/102"]
TEST = [
    "Utrecht/1",
    "Singapore/51",
    "Amsterdam/GE3T/103",
    "Amsterdam/GE1T5/150",
    "Amsterdam/Philips_VU .PETMR_01./160",
]


TURNED = GRID + 2e-5 * np.array([[0, 1, 0, 0], [-1, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 0]])
WMH_GRIDS = {"3DT1": OTHER_GRID, "FLAIR": GRID, "T1": TURNED}


def wmh_volumes(i):
    "The voxels and the grid of each file of the i-th patient: orig and pre differ, 3DT1 lies on a grid of its own."
    files = {
        "orig/3DT1_mask.nii.gz": (np.ones((9, 9, 9), np.uint8), OTHER_GRID),
        "wmh.nii.gz": (label_map(1, 2, dtype=np.float32), GRID),
    }
    for (j, where), (k, m) in product(enumerate(("orig", "pre")), enumerate(WMH_GRIDS)):
        shape = (9, 9, 9) if m == "3DT1" else SHAPE
        files[f"{where}/{m}.nii.gz"] = image(100 * i + 10 * j + k, shape), WMH_GRIDS[m]
    return files


def wmh(root, subjects, empty=False):
    "Patients as `site/number`."
    for i, subject in enumerate(subjects):
        for name, (voxels, grid) in wmh_volumes(i).items():
            if empty:
                touch(root / subject / name)
            else:
                save(root / subject / name, voxels, grid)
    return root


def test_wmh_lists_its_sites(tmp_path):
    wmh(tmp_path / "training", TRAINING, empty=True)
    pool = read_wmh(tmp_path)
    assert len(pool) == 6
    assert {(task.modality, task.label) for task in pool} == {("FLAIR", "WMH"), ("T1", "WMH")}
    patients = sizes(pool)
    assert patients["wmh-Utrecht-FLAIR-WMH"] == 2
    assert patients["wmh-Singapore-T1-WMH"] == 1
    assert sorted(patients.values()) == [1, 1, 2, 2, 3, 3]
    assert pool["wmh-Utrecht-FLAIR-WMH"].patients == pool["wmh-Utrecht-T1-WMH"].patients
    assert sizes(read_wmh(tmp_path, sites=["Utrecht"], modalities=["T1"], cases=1)) == {"wmh-Utrecht-T1-WMH": 1}
    refused(lambda: read_wmh(tmp_path, sites=["Utrect"]), "Utrect", "Utrecht")
    refused(lambda: read_wmh(tmp_path, modalities=["3DT1"]), "3DT1")
    assert read_pool(tmp_path).names == pool.names


def test_wmh_training_and_test_are_one_data_set(tmp_path):
    wmh(tmp_path / "training", TRAINING, empty=True)
    wmh(tmp_path / "test", TEST, empty=True)
    pool = read_wmh(tmp_path)
    counts = {task.site: len(task.patients) for task in pool}
    assert len(pool) == 10
    assert counts["Utrecht"] == 3
    assert counts["Singapore"] == 2
    assert sorted(counts.values()) == [1, 1, 2, 3, 4]
    philips = next(task for task in pool if "Philips" in task.site and task.modality == "FLAIR")
    assert re.fullmatch(r"[A-Za-z0-9._-]+", philips.name)
    assert " " not in philips.site
    subject = tmp_path / "test" / "Amsterdam" / "Philips_VU .PETMR_01." / "160"
    assert philips.cases[0].image == subject / "pre" / "FLAIR.nii.gz"
    assert len(read_pool(tmp_path / "training")) == 6


def test_wmh_one_number_in_training_and_test_is_two_patients(tmp_path):
    wmh(tmp_path / "training", ["Utrecht/0"], empty=True)
    wmh(tmp_path / "test", ["Utrecht/0"], empty=True)
    assert sizes(read_wmh(tmp_path)) == {"wmh-Utrecht-FLAIR-WMH": 2, "wmh-Utrecht-T1-WMH": 2}


def test_wmh_older_copies(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    wmh(new, TRAINING, empty=True)
    wmh(old, [s.removeprefix("Amsterdam/") for s in TRAINING], empty=True)
    assert sizes(read_wmh(old)) == sizes(read_wmh(new))
    assert parts(read_pool(old)) == parts(read_wmh(new))


def test_wmh_ignores_other_pathology_and_resamples_no_t1(tmp_path):
    wmh(tmp_path / "training", TRAINING[:2])
    pool = read_wmh(tmp_path)
    y = label_map(1, 2, dtype=np.float32)
    for modality, seed in (("FLAIR", 11), ("T1", 12)):
        read = read_case(pool[f"wmh-Utrecht-{modality}-WMH"].cases[0])
        assert np.array_equal(read.mask, y == 1)
        assert np.array_equal(read.ignored, y == 2)
        # A header that differs by 2e-5 is the same grid: not one voxel is interpolated.
        assert np.array_equal(read.image, image(seed))
    original = read_wmh(tmp_path, images="orig")
    assert np.array_equal(read_case(original["wmh-Utrecht-T1-WMH"].cases[1]).image, image(102))
    assert np.array_equal(read_case(pool["wmh-Utrecht-T1-WMH"].cases[1]).image, image(112))
    refused(lambda: read_wmh(tmp_path, images="post"), "post")
    assert validate(pool).ok


def test_a_folder_among_the_subjects_of_wmh_is_skipped_by_name(tmp_path):
    wmh(tmp_path / "training", TRAINING, empty=True)
    before = sizes(read_wmh(tmp_path))
    touch(tmp_path / "training" / "Utrecht" / "notes" / "todo.txt")
    (tmp_path / "training" / "Amsterdam" / "GE3T" / "0 old").mkdir()
    for read in (read_wmh, read_pool):
        pool = read(tmp_path)
        assert sizes(pool) == before
        assert set(skipped(pool)) == {"training/Utrecht/notes", "training/Amsterdam/GE3T/0 old"}
    (tmp_path / "training" / "Utrecht" / "33").mkdir()  # a number is a subject, and this one is incomplete
    refused(lambda: read_wmh(tmp_path), "Utrecht/33")


def test_the_three_data_sets_hold_108_tasks(tmp_path):
    fets(tmp_path, [(site, site) for site in (*SOURCES, 16)], empty=True)
    for n, what, end in product(range(1, 11), ("T1", "T2", "label"), (".hdr", ".img")):
        touch(tmp_path / "iSeg-2019-Training" / f"subject-{n}-{what}{end}")
    wmh(tmp_path / "WMH" / "training", TRAINING, empty=True)
    pool = read_pool(tmp_path)
    assert len(pool) == len(set(pool.names)) == 108
    assert Counter(task.dataset for task in pool) == {"fets": 96, "iseg": 6, "wmh": 6}
    assert {"fets-16-T2-NCR", "iseg-T1-GM", "wmh-Utrecht-FLAIR-WMH"} <= set(pool.names)
    for task in pool:
        assert task_parts(task.name) == (task.dataset, task.site, task.modality, task.label)


# --- nnU-Net v2 raw and the Medical Segmentation Decathlon


TWO_LABELS = {"background": 0, "lesion": 1, "other": 2}


def nnunet(root, labels, channels=("T2",), values=(1, 2), cases="ab", name="Dataset042_Brain", **more):
    "A data set of nnU-Net v2, whose label maps hold the values."
    folder = root / name
    for i, case in enumerate(cases):
        for c in range(len(channels)):
            save(folder / "imagesTr" / f"{case}_{c:04}.nii.gz", image(10 * i + c))
        save(folder / "labelsTr" / f"{case}.nii.gz", label_map(*values))
    names = {str(i): channel for i, channel in enumerate(channels)}
    told = {"channel_names": names, "labels": labels, "numTraining": len(cases), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(told | more))
    return folder


def test_nnunet_regions_and_a_label_to_ignore(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "ignore": 4}
    folder = nnunet(tmp_path, labels, ("T2", "T1"), (1, 2, 3, 4), regions_class_order=[1, 2])
    pool = read_nnunet(folder)
    assert set(pool.names) == {"Brain-T1-whole", "Brain-T2-whole", "Brain-T1-core", "Brain-T2-core"}
    y = label_map(1, 2, 3, 4)
    read = read_case(pool["Brain-T1-core"].cases[1])
    assert np.array_equal(read.image, image(11))
    assert np.array_equal(read.mask, (y == 2) | (y == 3))
    assert np.array_equal(read.ignored, y == 4)
    assert np.array_equal(read_case(pool["Brain-T2-whole"].cases[0]).mask, (y > 0) & (y < 4))
    assert validate(pool).ok
    assert sizes(read_nnunet(folder, modalities=["T2"], labels=["core"], cases=1)) == {"Brain-T2-core": 1}


def test_a_label_map_that_holds_what_no_table_names(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1}, values=(1, 5))
    said = validate(read_nnunet(folder)).problems.to_string()
    assert "a.nii.gz holds 5 besides" in said


@pytest.mark.parametrize(
    "told, word",
    [
        ({"channel_names": ["T2"]}, "channel_names"),
        ({"channel_names": []}, "channel_names"),
        ({"channel_names": {"0": ["T2"]}}, "channel_names"),
        ({"channel_names": {"0": ""}}, "dataset.json"),
        ({"channel_names": {"T2": 0}}, "channel_names"),
        ({"labels": {"病变": 1}}, "病变"),
        ({"labels": {"lesion": 1.5}}, "labels"),
        ({"labels": {"background": 0}}, "label"),
        ({"labels": [0, 1]}, "labels"),
        ({"file_ending": 3}, "file_ending"),
        ({"file_ending": ".nii"}, ".nii"),
        ({"file_ending": "nii.gz"}, "dot"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "the labels a and b"),
        ({"labels": {"l": 1, "ignore": 1}}, "ignored and belongs to l"),
        ({"labels": {"l": [1, 2], "ignore": 2}}, "ignored and belongs to l"),
        ({"channel_names": {"0": "T2", "1": "T2"}}, "2 channels are called T2"),
        ({"labels": {"white matter": 1, "white-matter": 2}}, "'white matter' and the label 'white-matter'"),
        ({"channel_names": {"0": "T2 a", "1": "T2-a"}}, "'T2 a' and the modality 'T2-a'"),
    ],
    ids=str,
)
def test_a_description_that_is_wrong_is_named(tmp_path, told, word):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1})
    redescribe(folder, told)
    refused(lambda: read_pool(tmp_path), word, folder, "dataset.json")


def test_a_region_of_one_label_is_no_second_label_of_its_value(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1, "whole": [1], "ignore": 2})
    assert set(read_nnunet(folder).names) == {"Brain-T2-lesion", "Brain-T2-whole"}


def test_a_data_set_of_nnunet_without_its_description_says_what_must_be_in_it(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1})
    (folder / "dataset.json").unlink()
    for read in (read_pool, read_nnunet):
        refused(lambda: read(folder), folder / "dataset.json", "is missing", "channel_names", "labels", "file_ending")


BRATS = ("BRATS_001", "BRATS_002")


def msd(root, entries=None):
    "A data set of the Decathlon with three channels, which lists its own cases or the entries."
    folder = root / "Task01_BrainTumour"
    for i, case in enumerate(BRATS):
        save(folder / "imagesTr" / f"{case}.nii.gz", np.stack([image(10 * i + c) for c in range(3)], -1))
        save(folder / "labelsTr" / f"{case}.nii.gz", label_map(1, 2))
    own = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in BRATS]
    told = {
        "modality": {"0": "FLAIR", "1": "T1w", "2": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "core"},
        "numTraining": 2,
        "training": entries or own,
        "test": ["./imagesTs/BRATS_003.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(told))
    return folder


def test_msd_reads_the_channel_that_is_asked_for(tmp_path):
    folder = msd(tmp_path)
    pool = read_msd(folder)
    assert set(pool.names) == {f"BrainTumour-{m}-{y}" for m in ("FLAIR", "T1w", "T2w") for y in ("edema", "core")}
    for c, m in enumerate(("FLAIR", "T1w", "T2w")):
        read = read_case(pool[f"BrainTumour-{m}-core"].cases[1])
        assert np.array_equal(read.image, image(10 + c))
        assert np.array_equal(read.mask, label_map(1, 2) == 2)
    assert validate(pool).ok
    assert read_pool(tmp_path).names == pool.names
    assert sizes(read_msd(folder, modalities=["T1w"], labels=["edema"], cases=1)) == {"BrainTumour-T1w-edema": 1}


@pytest.mark.parametrize(
    "told, word",
    [
        ({"modality": ["T1w"]}, "modality"),
        ({"modality": [1]}, "modality"),
        ({"modality": {"0": ["T1w"]}}, "modality"),
        ({"labels": {"1": "tumour", "2": "tumour"}}, "labels"),
        ({"modality": {"0": "T1w", "1": "T1w", "2": "T2w"}}, "two modalities of one name"),
        ({"labels": {"1": "tumour a", "2": "tumour-a"}}, "'tumour a' and the label 'tumour-a'"),
        ({"training": {}}, "training"),
        ({"training": ["imagesTr/BRATS_001.nii.gz"]}, "training"),
        ({"labels": {"one": "edema"}}, "labels"),
    ],
    ids=str,
)
def test_a_decathlon_description_that_is_wrong_is_named(tmp_path, told, word):
    folder = msd(tmp_path)
    redescribe(folder, told)
    refused(lambda: read_pool(tmp_path), word, folder)


@pytest.mark.parametrize("named", [1, 2])
def test_a_file_with_more_channels_than_modalities_are_named_is_a_problem(tmp_path, named):
    folder = msd(tmp_path)
    assert validate(read_msd(folder, modalities="T1w")).ok  # a part of the modalities is no fault
    redescribe(folder, {"modality": {str(i): f"M{i}" for i in range(named)}})
    problems = errors(validate(read_msd(folder)))
    assert set(problems["file"]) == {str(folder / "imagesTr" / f"{case}.nii.gz") for case in BRATS}
    if named == 2:
        assert set(problems["kind"]) == {"channels"}
        assert problems["problem"].str.contains("3 channels and its data set names 2 modalities").all()


OUTSIDE = ["../elsewhere/x.nii.gz", "./imagesTr/../../elsewhere/x.nii.gz", "{root}/elsewhere/x.nii.gz"]


@pytest.mark.parametrize("where", OUTSIDE)
@pytest.mark.parametrize("key", ["image", "label"])
def test_msd_paths_do_not_leave_the_folder(tmp_path, key, where):
    where = where.format(root=tmp_path)
    save(tmp_path / "elsewhere" / "x.nii.gz", image())
    entry = {"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz", key: where}
    folder = msd(tmp_path, entries=[entry])
    refused(lambda: read_msd(folder), where, "dataset.json")
    refused(lambda: read_pool(folder), where)


# --- a manifest


COLUMNS = "patient,image,mask,modality,site,label"


def manifest(folder, rows, columns=COLUMNS, encode=str.encode):
    "Writes a table and returns its file."
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cohort.csv"
    file.write_bytes(encode("\n".join([columns, *rows]) + "\n"))
    return file


def manifest_files(folder, values=(1, 2, 3)):
    "Writes the files of two patients, whose label maps hold the values, and returns the folder."
    for i, p in enumerate("ab"):
        for m in ("T1", "T2"):
            save(folder / "scans" / f"{p}-{m}.nii.gz", image(10 * i + int(m[1])))
        save(folder / "masks" / f"{p}.nii.gz", label_map(*values))
    return folder


def entry(patient, site, modality):
    "A row of the table."
    return f"{patient},scans/{patient}-{modality}.nii.gz,masks/{patient}.nii.gz,{modality},{site},lesion"


ENTRIES = [entry(*who, modality) for who, modality in product((("a", "Ulm"), ("b", "Bonn")), ("T1", "T2"))]


def with_crlf(text):
    return text.replace("\n", "\r\n").encode()


def with_mark(text):
    return text.encode("utf-8-sig")


def with_semicolons(text):
    return text.replace(",", ";").replace("\n", "\r\n").encode("utf-8-sig")


@pytest.mark.parametrize("encode", [str.encode, with_crlf, with_mark, with_semicolons])
def test_a_manifest_as_spreadsheets_write_it(tmp_path, encode):
    file = manifest(manifest_files(tmp_path / "study"), ENTRIES, encode=encode)
    pool = read_manifest(file)
    assert parts(pool) == set(product(("Ulm", "Bonn"), ("T1", "T2"), ["lesion"]))
    assert set(sizes(pool).values()) == {1}
    read = read_case(pool["cohort-Bonn-T2-lesion"].cases[0])
    assert np.array_equal(read.image, image(12))
    assert np.array_equal(read.mask, label_map(1, 1, 1) == 1)
    assert validate(pool).ok
    assert read_manifest(file, sites=["Ulm"], modalities=["T2"]).names == ("cohort-Ulm-T2-lesion",)


def test_a_manifest_says_which_values_make_a_label(tmp_path):
    values = {"core": "2", "whole": "1+2", "all": ""}
    rows = [f"{p},scans/{p}-T1.nii.gz,masks/{p}.nii.gz,T1,,{label},{values[label]}" for p in "ab" for label in values]
    pool = read_manifest(manifest(manifest_files(tmp_path), rows, f"{COLUMNS},value"))
    held = {task.label: read_case(task.cases[0]).mask for task in pool}
    y = label_map(1, 2, 3)
    assert np.array_equal(held["core"], y == 2)
    assert np.array_equal(held["whole"], (y == 1) | (y == 2))
    assert np.array_equal(held["all"], y > 0)
    assert {task.site for task in pool} == {""}
    assert set(sizes(pool).values()) == {2}
    rows[1] = rows[1].replace("1+2", "one")
    file = manifest(tmp_path, rows, f"{COLUMNS},value")
    refused(lambda: read_manifest(file), "cohort.csv, row 3", "one")


def test_a_mask_of_0_and_255(tmp_path):
    pool = read_manifest(manifest(manifest_files(tmp_path, values=(255,)), ENTRIES))
    for task in pool:
        for case in task.cases:
            assert np.array_equal(read_case(case).mask, label_map(255) == 255)
    assert validate(pool).ok


def test_a_manifest_that_is_incomplete_is_refused_by_row(tmp_path):
    manifest_files(tmp_path)

    def broken(i, old, new):
        "Reads the table after a change to its i-th row, of which the header is the first."
        rows = list(ENTRIES)
        rows[i - 2] = rows[i - 2].replace(old, new, 1)
        return read_manifest(manifest(tmp_path, rows))

    file = manifest(tmp_path, ["a,scans/a-T1.nii.gz,masks/a.nii.gz"], "patient,image,masks")
    refused(lambda: read_manifest(file), "cohort.csv", "mask", "modality", "label")
    refused(lambda: broken(4, "b,", ","), "cohort.csv, row 4", "patient")
    refused(lambda: broken(3, "masks/a.nii.gz", ""), "cohort.csv, row 3", "mask")
    refused(lambda: broken(5, "b-T2", "c-T2"), "cohort.csv, row 5", "c-T2.nii.gz")
    refused(lambda: read_manifest(manifest(tmp_path, [])), "cohort.csv")
    refused(lambda: read_manifest(tmp_path / "nothing.csv"), "nothing.csv")


def test_two_words_of_a_manifest_that_become_one_are_named(tmp_path):
    rows = [row.replace("Ulm", "Ulm north").replace("Bonn", "Ulm-north") for row in ENTRIES]
    file = manifest(manifest_files(tmp_path), rows)
    refused(lambda: read_manifest(file), file, "'Ulm north' and the site 'Ulm-north'", "Ulm_north")


def test_a_home_folder_in_a_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(manifest_files(tmp_path / "home")))
    rows = [row.replace("scans/", "~/scans/").replace("masks/", "~/masks/") for row in ENTRIES]
    pool = read_manifest(manifest(tmp_path / "tables", rows))
    assert read_case(pool.tasks[0].cases[0]).mask.any()


def test_a_file_that_is_no_table_is_no_folder(tmp_path):
    file = save(tmp_path / "study" / "x.nii.gz", image())
    for read in (read_pool, read_fets, read_nnunet):
        refused(lambda: read(file), f"{file} is a file", f"its folder {file.parent}")


@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_an_image_in_the_place_of_a_mask_is_a_problem(tmp_path, kind):
    manifest_files(tmp_path)
    # Also where image and mask are on two grids.
    save(tmp_path / "scans" / "b-T1.nii.gz", image(11, (9, 9, 9)), OTHER_GRID)
    save(tmp_path / "masks" / "b.nii.gz", image(5).astype(kind))
    problems = errors(validate(read_manifest(manifest(tmp_path, ENTRIES))))
    assert problems["kind"].tolist() == ["label values"]
    assert problems["file"].tolist() == [str(tmp_path / "masks" / "b.nii.gz")]
    assert "looks like an image" in problems["problem"].item()


def test_an_atlas_of_which_one_value_is_taken_is_none(tmp_path):
    manifest_files(tmp_path)
    atlas = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    for p, y in (("a", atlas), ("b", atlas[::-1])):
        save(tmp_path / "masks" / f"{p}.nii.gz", y)
    file = manifest(tmp_path, [f"{row},17" for row in ENTRIES], f"{COLUMNS},value")
    assert validate(read_manifest(file)).ok


def test_a_manifest_in_an_old_encoding_is_named(tmp_path):
    rows = [row.replace("Ulm", "Köln") for row in ENTRIES]
    old = manifest(manifest_files(tmp_path), rows, encode=lambda text: text.encode("cp1252"))
    refused(lambda: read_manifest(old), "cohort.csv", "UTF-8")
    assert {task.site for task in read_manifest(manifest(tmp_path, rows))} == {"K_ln", "Bonn"}


@pytest.mark.parametrize("column, text", [("site", "北京"), ("modality", "--"), ("label", "病变")])
def test_a_name_without_a_letter_is_named_with_its_row(tmp_path, column, text):
    cells = [row.split(",") for row in ENTRIES]
    cells[2][COLUMNS.split(",").index(column)] = text
    file = manifest(manifest_files(tmp_path), [",".join(row) for row in cells])
    refused(lambda: read_manifest(file), "cohort.csv, row 4", text)


# --- folders, and what is wrong in them


def test_data_sets_are_found_three_folders_down(tmp_path):
    for depth in range(5):
        nnunet(tmp_path / "/".join("abcd"[:depth]) / "here", TWO_LABELS, name=f"Dataset00{depth}_D{depth}")

    def found(below):
        return {task.dataset for task in read_pool(tmp_path / below)}

    assert found("here") == {"D0"}
    assert found("") == {"D0", "D1"}  # here/Dataset000_D0 and a/here/Dataset001_D1
    assert found("a/b/c/d/here/Dataset004_D4") == {"D4"}
    assert found("a/b/c") == {"D3", "D4"}


def test_folders_without_data_are_refused_or_skipped(tmp_path):
    refused(lambda: read_pool(tmp_path / "nowhere"), "nowhere")
    (tmp_path / "notes").mkdir()
    refused(lambda: read_pool(tmp_path), str(tmp_path))
    nnunet(tmp_path, TWO_LABELS)
    pool = read_pool(tmp_path)
    assert len(pool) == 2
    assert skipped(pool) == ["notes"]


def test_an_image_without_a_label_map_is_not_passed_over(tmp_path):
    folder = nnunet(tmp_path, TWO_LABELS)
    (folder / "labelsTr" / "b.nii.gz").unlink()
    refused(lambda: read_nnunet(folder), "b.nii.gz")


def test_an_empty_mask_is_legal_and_a_label_nobody_has_is_not(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1, "core": 2}, values=(1,))
    checked = validate(read_nnunet(folder, labels=["core"]))
    assert not checked.ok
    assert "Brain-T2-core" in " ".join(checked.problems["problem"])
    save(folder / "labelsTr" / "b.nii.gz", label_map())
    pool = read_nnunet(folder, labels=["lesion"])
    checked = validate(pool)
    assert checked.ok
    assert "b.nii.gz" in " ".join(checked.problems["problem"])
    assert checked.tasks["empty masks"].tolist() == [1]
    assert not read_case(pool["Brain-T2-lesion"].cases[1]).mask.any()


def test_a_patient_who_is_there_twice(tmp_path):
    folder = nnunet(tmp_path, TWO_LABELS, cases="abcdef")
    assert validate(read_nnunet(folder), target="Brain-T2-lesion", shots=2).ok
    shutil.copy(folder / "imagesTr" / "a_0000.nii.gz", folder / "imagesTr" / "d_0000.nii.gz")
    said = " ".join(errors(validate(read_nnunet(folder)))["problem"])
    assert "a_0000.nii.gz" in said
    assert "d_0000.nii.gz" in said
    refused(lambda: validate(read_nnunet(folder), target="Brain-T2-lesoin"), "Brain-T2-lesoin", "Brain-T2-lesion")


def test_a_split_that_parts_a_patient_who_is_there_twice(tmp_path):
    folder = nnunet(tmp_path, TWO_LABELS, cases="abcdef")
    shutil.copy(folder / "imagesTr" / "a_0000.nii.gz", folder / "imagesTr" / "d_0000.nii.gz")
    pool = read_nnunet(folder)
    checked = [validate(pool, target="Brain-T2-lesion", shots=2, seed=seed) for seed in range(8)]
    splits = [errors(one).query("kind == 'split'") for one in checked]
    assert 0 < sum(map(len, splits)) < 8  # only where one of the two is tested and the other trained on
    for split in splits:
        assert (split["file"] + split["problem"]).str.contains("[ad]_0000.nii.gz").all()


def repacked(file):
    "What is packed in a file, packed in another way."
    return gzip.compress(gzip.decompress(file.read_bytes()), 0, mtime=9)


def test_a_copy_that_is_compressed_in_another_way_is_a_copy(tmp_path):
    folder = nnunet(tmp_path, TWO_LABELS, cases="abcdef")
    a, d = (folder / "imagesTr" / f"{c}_0000.nii.gz" for c in "ad")
    d.write_bytes(repacked(a))
    assert a.stat().st_size != d.stat().st_size
    assert twins([d, a, folder / "imagesTr" / "b_0000.nii.gz"]) == {a: d, d: d}
    said = " ".join(validate(read_nnunet(folder)).problems.query("kind == 'copies'")["problem"])
    assert "a_0000.nii.gz" in said
    assert "d_0000.nii.gz" in said


def test_a_source_that_is_a_copy_of_the_target_is_known_whatever_packed_it(tmp_path):
    folder = nnunet(tmp_path, TWO_LABELS, cases="bcef")
    other = shutil.copytree(folder, tmp_path / "two" / "Dataset043_Again")
    for file in other.rglob("*.gz"):
        file.write_bytes(repacked(file))
    split = protocol(read_pool(tmp_path), "Brain-T2-lesion", shots=1)
    assert split.removed["Again-T2-lesion"] == split.removed["Brain-T2-other"] == 3


def test_twins_look_into_files_that_are_damaged_or_empty(tmp_path):
    whole = gzip.compress(image().tobytes())
    a, b, c, d, e = (tmp_path / f"{name}.gz" for name in "abcde")
    for file, content in {a: whole[:-20], b: whole[:-20], c: b"", d: b"", e: whole}.items():
        file.write_bytes(content)
    assert twins([a, b, c, d, e]) == {a: a, b: a, c: c, d: c}


def unpacked(path, voxels):
    "A `.nii.gz` of blocks that are only stored, so that a bit that flips changes one voxel and nothing else."
    save(path, voxels)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 0))
    return path


@pytest.mark.parametrize("where", ["imagesTr/a_0000", "labelsTr/b"])
@pytest.mark.parametrize("at", [400, -100, -6, -2], ids=["first voxels", "last voxels", "checksum", "length"])
def test_a_flipped_bit_is_found(tmp_path, where, at):
    folder = nnunet(tmp_path, TWO_LABELS)
    file = unpacked(folder / f"{where}.nii.gz", image() if "images" in where else label_map(1, 2))
    pool = read_nnunet(folder)
    assert validate(pool).ok
    flip_bit(file, at)
    problems = errors(validate(pool))
    assert problems["kind"].tolist() == ["file"]
    assert str(file) in problems["problem"].item()
    refused(lambda: read_task(pool["Brain-T2-lesion"]), file)


def test_a_flipped_bit_in_another_channel_is_found(tmp_path):
    folder = msd(tmp_path)
    file = unpacked(folder / "imagesTr" / "BRATS_001.nii.gz", np.stack([image(c) for c in range(3)], -1))
    flip_bit(file, -100)
    problems = errors(validate(read_msd(folder, modalities="FLAIR")))
    assert problems["file"].tolist() == [str(file)]


COLOUR = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize("dtype, word", [(np.complex64, "complex64"), (COLOUR, "RGB")], ids=["complex", "RGB"])
def test_voxels_that_are_no_numbers(tmp_path, dtype, word):
    folder = nnunet(tmp_path, TWO_LABELS)
    file = save(folder / "imagesTr" / "a_0000.nii.gz", np.zeros(SHAPE, dtype))
    pool = read_nnunet(folder)
    said = errors(validate(pool))["problem"].item()
    assert said == refused(lambda: read_case(pool.tasks[0].cases[0]), file, word, "an image holds numbers")


def test_a_constant_image_is_noted(tmp_path):
    folder = msd(tmp_path)
    save(folder / "imagesTr" / "BRATS_001.nii.gz", np.stack([image(), np.full(SHAPE, 7, np.float32), image(2)], -1))
    checked = validate(read_msd(folder))
    note = checked.problems.query("kind == 'constant image'")
    assert checked.ok
    assert note["severity"].tolist() == ["note"]
    said = note["problem"].item()
    assert "The channel 1" in said
    assert "BRATS_001.nii.gz holds 7 in every voxel" in said
    assert "constant image" not in set(validate(read_msd(folder, modalities="FLAIR")).problems["kind"])


def test_masks_that_are_empty_are_said_once(tmp_path):
    labels = {"background": 0, "lesion": 1, "core": 2, "rim": 3}
    folder = nnunet(tmp_path, labels, ("T1", "T2", "FLAIR"), cases="abc")
    save(folder / "labelsTr" / "b.nii.gz", label_map())
    empty = validate(read_nnunet(folder)).problems.query("kind == 'empty masks'")
    note = empty.query("severity == 'note'")["problem"].item()
    error = empty.query("severity == 'error'")["problem"].item()
    assert note.startswith(
        "1 of 3 masks of Brain-T1-lesion, Brain-T1-core, Brain-T2-lesion and 3 more is empty, that is"
    )
    assert "b.nii.gz" in note
    assert error.startswith("No mask of Brain-T1-rim, Brain-T2-rim, Brain-FLAIR-rim holds its label (value 3)")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", [b"", b"abc" * 300], ids=["empty", "text"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".hdr", ".img", ".mgz", ".gii", ".mnc", ".PAR", ".txt"])
def test_a_file_that_is_no_volume(tmp_path, ending, content):
    file = tmp_path / f"x{ending}"
    file.write_bytes(content)
    assert "\n" not in refused(lambda: open_volume(file), file.name)


# --- names


def test_names_as_they_are_written_down():
    assert task_name("fets", "16", "T2", "NCR") == "fets-16-T2-NCR"
    assert task_name("iseg", "", "T1", "GM") == "iseg-T1-GM"
    assert task_name("wmh", "Utrecht", "FLAIR", "WMH") == "wmh-Utrecht-FLAIR-WMH"
    assert task_name("MSLesion", "", "FLAIR", "lesion") == "MSLesion-FLAIR-lesion"
    assert task_parts("fets-16-T2-NCR") == ("fets", "16", "T2", "NCR")
    assert task_parts("iseg-T1-GM") == ("iseg", "", "T1", "GM")
    assert task_name("wmh", "Philips_VU .PETMR_01.", "FLAIR", "white-matter lesion").count("-") == 3


text = st.text(min_size=1, max_size=12).filter(lambda s: any(c.isascii() and c.isalnum() for c in s))
four = st.tuples(text, st.one_of(st.just(""), text), text, text)


@settings(max_examples=60, deadline=None)
@given(text)
def test_a_slug_of_a_slug_is_itself_and_a_file_name(s):
    once = slug(s)
    assert slug(once) == once
    assert re.fullmatch(r"[A-Za-z0-9._]+", once)
    assert once[0] not in "."
    assert once[-1] not in "."


@settings(max_examples=60, deadline=None)
@given(four, four)
def test_names_are_read_back_and_distinct(a, b):
    a, b = (tuple(slug(word) if word else "" for word in words) for words in (a, b))
    assert task_parts(task_name(*a)) == a
    assume(a != b)
    assert task_name(*a) != task_name(*b)


@pytest.mark.parametrize("second", ["Dataset043_White_Matter", "Dataset043_White matter", "Dataset043_white_matter"])
def test_names_that_collide_are_refused(tmp_path, second):
    nnunet(tmp_path, {"background": 0, "a": 1, "b": 2}, name="Dataset042_White_matter")
    nnunet(tmp_path, {"background": 0, "a": 1, "b": 2}, name=second)
    assert "white_matter" in refused(lambda: read_pool(tmp_path)).lower()
    shutil.rmtree(tmp_path / second)
    assert len(read_pool(tmp_path)) == 2


# --- geometry


def a_case(tmp_path, x, y, grid=GRID, mask_grid=GRID, **more):
    "A case of two volumes with their grids, written first."
    image = save(tmp_path / "image.nii.gz", x, grid)
    mask = save(tmp_path / "mask.nii.gz", y, mask_grid)
    return Case("p", image, mask, (1,), **more)


def voxels(file):
    "The voxels of a file as they are stored."
    return np.asarray(nib.load(file).dataobj)


def test_a_flipped_t1(realdata):
    names = ("FLAIR", "T1_to_FLAIR", "WMHmask")
    flair, t1, mask = (realdata / "odd" / f"flipped_{name}.nii.gz" for name in names)
    from_las, from_lps = (read_case(Case("p", image, mask, (1,))) for image in (flair, t1))
    assert np.allclose(from_las.image, voxels(flair)[::-1])
    assert np.array_equal(from_las.mask, voxels(mask)[::-1] == 1)
    assert np.allclose(from_lps.image, voxels(t1)[::-1, ::-1])
    assert np.array_equal(from_lps.mask, from_las.mask)


def test_a_flair_on_another_grid_comes_to_its_masks_grid(realdata):
    odd = realdata / "odd"
    read = read_case(Case("p", odd / "othergrid_flair.nii.gz", odd / "othergrid_msk.nii.gz", (1,)))
    mask = nib.as_closest_canonical(nib.load(odd / "othergrid_msk.nii.gz"))
    assert read.image.shape == read.mask.shape == mask.shape == (112, 112, 73)
    assert np.allclose(read.affine, mask.affine)
    assert read.mask.sum() == mask.get_fdata().sum()
    flair = nib.load(odd / "othergrid_flair.nii.gz")
    sharp = flair.get_fdata(dtype=np.float32)
    smooth = gaussian_filter(sharp, [2 / side / 2.355 for side in flair.header.get_zooms()])
    seen = [resample_from_to(nib.Nifti1Image(x, flair.affine), mask, order=1).get_fdata() for x in (sharp, smooth)]
    # With or without a filter against aliasing.
    assert max(np.corrcoef(read.image.ravel(), x.ravel())[0, 1] for x in seen) > 0.99
    assert 0.9 < read.image.mean() / seen[0].mean() < 1.1


def ramp(grid, shape):
    "A linear function of the position in mm, at the voxels of a grid."
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    world = nib.affines.apply_affine(grid, at)
    return (100 + world @ [3, -2, 1]).astype(np.float32)


@pytest.mark.parametrize("step", [0.5, 1.0, 1.5, 3.0])
def test_a_ramp_is_resampled_to_the_ramp(tmp_path, step):
    "Linear interpolation, with or without a symmetric filter before it, leaves a linear function of position alone."
    c, s = np.cos(0.1), np.sin(0.1)
    grid, mask_grid = np.eye(4), np.diag([2.0, 2, 3, 1])
    grid[:3, :3] = step * np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    grid[:3, 3] = -22
    y = label_map(1)
    read = read_case(a_case(tmp_path, ramp(grid, (int(60 / step),) * 3), y, grid, mask_grid))
    assert np.allclose(read.image, ramp(mask_grid, SHAPE), atol=0.05)
    assert np.array_equal(read.mask, y == 1)
    assert np.allclose(read.affine, mask_grid)


def test_an_image_that_does_not_cover_its_mask_is_refused(tmp_path):
    far = GRID.copy()
    far[:3, 3] += 200
    case = a_case(tmp_path, image(), label_map(1), far)
    refused(lambda: read_case(case), "image.nii.gz", "mask.nii.gz")


@pytest.mark.parametrize("axis", range(3))
def test_an_image_that_misses_a_labelled_voxel_is_refused(tmp_path, axis):
    "A slab of the grid is enough for a label inside it, and is refused when the label reaches out of it."
    x, y = image(), np.zeros(SHAPE, np.uint8)
    slab = np.delete(x, -1, axis=axis)  # without the last plane
    y[2:4, 2:4, 2:4] = 1
    read = read_case(a_case(tmp_path, slab, y))
    assert np.allclose(np.delete(read.image, -1, axis=axis), slab, rtol=1e-5)
    assert np.array_equal(read.mask, y == 1)
    np.moveaxis(y, axis, 0)[-1] = 1
    case = a_case(tmp_path, slab, y)
    refused(lambda: read_case(case), "image.nii.gz", "mask.nii.gz")


def test_masks_are_rounded(tmp_path):
    y = label_map(1)
    case = a_case(tmp_path, image(), y * 0.99999997)  # float64: what a scale factor leaves of 1
    assert np.array_equal(read_case(case).mask, y == 1)
    scaled = save(tmp_path / "scaled.nii", (y * 200).astype(np.uint8))
    with open(scaled, "r+b") as f:
        f.seek(112)
        f.write(struct.pack("<f", 0.005 * (1 - 1e-7)))  # the slope of the header: 200 is 0.9999999
    assert np.array_equal(read_case(Case("p", case.image, scaled, (1,))).mask, y == 1)


def test_a_mask_of_halves_is_a_problem(tmp_path):
    manifest_files(tmp_path)
    save(tmp_path / "masks" / "b.nii.gz", label_map(1) * np.float32(0.5))
    checked = validate(read_manifest(manifest(tmp_path, ENTRIES)))
    assert not checked.ok
    assert "b.nii.gz" in checked.problems.to_string()


def test_a_background_that_is_a_negative_constant(tmp_path):
    x = np.full((12, 12, 12), -3.25, np.float32)
    x[3:9, 3:9, 3:9] = image(1, (6, 6, 6))
    read = read_case(a_case(tmp_path, x, label_map(1, shape=x.shape)))
    assert np.array_equal(read.image, x)
    assert np.array_equal(foreground(read.image), x != -3.25)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_every_storage_order_reads_as_one_volume(tmp_path, axes, flips):
    x, grid = image(), GRID[:, [*axes, 3]].copy()
    stored, y = x.transpose(axes), label_map(1, 2)
    for a, sign in enumerate(flips):
        if sign < 0:
            grid[:3, 3] += grid[:3, a] * (stored.shape[a] - 1)
            grid[:3, a] *= -1
            stored = np.flip(stored, a)
    read = read_case(a_case(tmp_path, stored, y, grid))
    assert np.array_equal(read.image, x)
    assert np.array_equal(read.mask, y == 1)
    assert np.allclose(read.affine, GRID)
    assert np.allclose(read.spacing, (2, 2, 3))


# --- formats that are not read


BEGINNINGS = {"x.nrrd": b"NRRD0004\n", "IM_0001": bytes(128) + b"DICM"}


@pytest.mark.parametrize("name", ["x.mha", "x.mhd", "x.nrrd", "x.nhdr", "x.dcm", "IM_0001"])
def test_formats_that_are_not_read(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(BEGINNINGS.get(name, b"ObjectType = Image\n"))
    said = refused(lambda: open_volume(file), name)
    command = "dcm2niix" if name in ("x.dcm", "IM_0001") else "SimpleITK"
    assert command in said
    told = unread_format(file)
    assert told
    assert told in said
    manifest_files(tmp_path)
    table = manifest(tmp_path, [f"a,{name},masks/a.nii.gz,T1,,lesion"])
    refused(lambda: read_manifest(table), name, command)


def test_the_converting_command_can_be_pasted(tmp_path):
    series = tmp_path / "Philips_VU .PETMR_01." / "160"
    for name, word in (("x.dcm", series), ("x.mha", series / "x.mha")):
        said = refused(lambda: open_volume(touch(series / name)), name)
        command = said[re.search(r" (dcm2niix|pip|python) ", said).start() :]
        assert str(word) in shlex.split(command)


def test_formats_that_are_read_are_not_refused():
    assert all(unread_format(f"x{end}") is None for end in (".nii", ".nii.gz", ".hdr", ".img", ".mgz"))


def test_a_folder_of_another_format_says_so(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1})
    for file in [*folder.rglob("*.nii.gz")]:
        file.rename(file.with_name(file.name.replace(".nii.gz", ".nrrd")))
    redescribe(folder, {"file_ending": ".nrrd"})
    refused(lambda: read_pool(tmp_path), ".nrrd", "SimpleITK")


# --- real data

REAL = {
    **{f"Hippocampus-T1-{y}": 60 for y in ("anterior", "posterior")},
    **{f"MSLesion-{m}-lesion": 3 for m in ("FLAIR", "T1")},
    **{f"WMHVentricle-FLAIR-{y}": 5 for y in ("WMH", "ventricle")},
}


def test_real_data_are_listed_and_sound(realdata):
    pool = read_pool(realdata)
    assert sizes(pool) == REAL
    for name in ("odd", "fets2022_csv"):
        assert any(name in where for where in skipped(pool))
    checked = validate(read_pool(realdata, cases=2))
    assert checked.ok
    assert set(checked.tasks["task"]) == set(REAL)


def test_a_manifest_over_odd_files(realdata, tmp_path):
    odd = realdata / "odd"
    rows = [
        f"one,{odd}/flipped_{n}.nii.gz,{odd}/flipped_WMHmask.nii.gz,{m},,WMH"
        for n, m in (("FLAIR", "FLAIR"), ("T1_to_FLAIR", "T1"))
    ]
    rows += [
        f"two,{odd}/othergrid_{n}.nii.gz,{odd}/othergrid_msk.nii.gz,{n.upper()},,stroke"
        for n in ("dwi", "adc", "flair")
    ]
    pool = read_manifest(manifest(tmp_path, rows))
    assert {(t.modality, t.label) for t in pool} == {
        ("FLAIR", "WMH"),
        ("T1", "WMH"),
        ("DWI", "stroke"),
        ("ADC", "stroke"),
        ("FLAIR", "stroke"),
    }
    held = {(t.modality, t.label): read_case(t.cases[0]) for t in pool}
    for label, name in (("WMH", "flipped_WMHmask"), ("stroke", "othergrid_msk")):
        assert len({v.mask.tobytes() for (_, y), v in held.items() if y == label}) == 1
        assert held["FLAIR", label].mask.sum() == (np.asarray(nib.load(odd / f"{name}.nii.gz").dataobj) > 0).sum()
    assert held["FLAIR", "stroke"].image.shape == held["DWI", "stroke"].image.shape == (112, 112, 73)
    assert validate(pool).ok
    assert open_volume(odd / "ras.hdr").shape == (62, 41, 34)
    assert open_volume(odd / "norm.mgz").shape == (
        256,
        256,
        256,
    )
