"Layouts written by hand from the data sets' own descriptions, never by the phantom's writer: what is listed, what is read, what is refused."
import gzip
import json
import re
import shlex
import shutil
import struct

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nibabel.processing import resample_from_to
from scipy.ndimage import gaussian_filter

from seqtransfer.core import InputError
from seqtransfer.datasets import read_fets, read_iseg, read_manifest, read_msd, read_nnunet, read_pool, read_wmh, validate
from seqtransfer.tasks import Case, foreground, open_volume, protocol, read_case, slug, task_name, task_parts, twins, unread_format

SHAPE, GRID = (6, 7, 8), np.array([[2.0, 0, 0, -9], [0, 2, 0, -5], [0, 0, 3, 4], [0, 0, 0, 1]])
MODALITIES, TUMOUR = ("t1", "t1ce", "t2", "flair"), {"NCR": 1, "ED": 2, "ET": 4}
SIZES = {1: 511, 2: 6, 3: 15, 4: 47, 5: 22, 6: 34, 7: 12, 8: 8, 9: 4, 10: 8, 11: 14, 12: 11, 13: 35, 14: 6, 15: 13, 16: 30, 17: 9, 18: 382, 19: 4,
         20: 33, 21: 35, 22: 7, 23: 5}
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
    for i, value in enumerate(values): y[1 + i, 2:4, 3] = value
    return y


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def parts(pool):
    return {(t.site, t.modality, t.label) for t in pool}


def sizes(pool):
    return {t.name: len(t.patients) for t in pool}


def refused(call, *words):
    with pytest.raises(InputError) as e: call()
    said = str(e.value)
    assert all(str(w) in said for w in words), said
    return said


# --- FeTS 2022

def partition(folder, rows, name="partitioning_1.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes("".join(f"{a},{b}\r\n" for a, b in [("Partition_ID", "Subject_ID"), *rows]).encode())


def fets(root, rows, empty=False):
    "Patients of institutions; `rows` of (institution, number)."
    folder = root / "MICCAI_FeTS2022_TrainingData"
    rows = [(site, f"FeTS2022_{n:05}") for site, n in rows]
    partition(folder, rows)
    for i, (_, subject) in enumerate(rows):
        for j, m in enumerate((*MODALITIES, "seg")):
            file = folder / subject / f"{subject}_{m}.nii.gz"
            if empty: touch(file)
            elif m == "seg": save(file, label_map(1, 2, 4))
            else: save(file, image(10 * i + j))
    return folder


ROWS = [(3, 12), (16, 3), (1, 7), (16, 1), (1, 2)]


def test_fets_reads_institutions_from_the_table(tmp_path):
    folder = fets(tmp_path, ROWS)
    partition(folder, [(n, s) for n, s in zip((1, 1, 1, 2, 3), ("FeTS2022_00012", "FeTS2022_00003", "FeTS2022_00007", "FeTS2022_00001", "FeTS2022_00002"))],
              "partitioning_2.csv")
    pool = read_fets(folder)
    assert {(int(t.site), t.modality, t.label) for t in pool} == {(s, m, y) for s in (1, 3, 16) for m in ("T1", "T1ce", "T2", "FLAIR") for y in TUMOUR}
    assert len(pool) == 36 and all(len(t) == {1: 2, 3: 1, 16: 2}[int(t.site)] for t in pool)
    task = pool["fets-16-T2-NCR"]
    assert [c.image.name for c in task.cases] == ["FeTS2022_00001_t2.nii.gz", "FeTS2022_00003_t2.nii.gz"]
    v = read_case(pool["fets-16-FLAIR-ET"].cases[0])
    assert np.array_equal(v.image, image(33)) and np.array_equal(v.mask, label_map(1, 2, 4) == 4) and v.image.dtype == np.float32
    assert pool["fets-16-T2-NCR"].patients == pool["fets-16-FLAIR-ET"].patients
    other = read_fets(folder, partition="partitioning_2.csv")
    assert {int(t.site): len(t) for t in other} == {1: 3, 2: 1, 3: 1}
    assert read_pool(tmp_path).names == read_pool(folder).names == pool.names
    assert validate(pool).ok


def test_fets_options(tmp_path):
    folder = fets(tmp_path, ROWS, empty=True)
    for one in ([16], ["16"], (16,)): assert {int(t.site) for t in read_fets(folder, institutions=one)} == {16}
    assert {int(t.site) for t in read_fets(folder, institutions=["01", 3])} == {1, 3}
    assert {(t.modality, t.label) for t in read_fets(folder, modalities=["T2", "T1ce"], labels=["ED"])} == {("T2", "ED"), ("T1ce", "ED")}
    assert {int(t.site): len(t) for t in read_fets(folder, cases=1)} == {1: 1, 3: 1, 16: 1}
    refused(lambda: read_fets(folder, institutions=[99]), "99")
    refused(lambda: read_fets(folder, modalities=["T3"]), "T3")
    refused(lambda: read_fets(folder, labels=["NRC"]), "NRC", "NCR")
    refused(lambda: read_fets(folder, partition="partitioning_7.csv"), "partitioning_7.csv")


def test_fets_with_a_part_of_the_patients(tmp_path):
    folder = fets(tmp_path, ROWS, empty=True)
    for subject in ("FeTS2022_00012", "FeTS2022_00007"): shutil.rmtree(folder / subject)
    pool = read_fets(folder)
    assert {int(t.site): len(t) for t in pool} == {1: 1, 16: 2} and len(pool) == 24
    refused(lambda: read_fets(folder, institutions=[3]), "3")
    (folder / "FeTS2022_00003" / "FeTS2022_00003_t1ce.nii.gz").unlink()
    refused(lambda: read_fets(folder), "FeTS2022_00003_t1ce.nii.gz")


def test_fets_validation_has_no_labels(tmp_path):
    fets(tmp_path, ROWS[:1], empty=True)
    held_out = tmp_path / "MICCAI_FeTS2022_ValidationData"
    partition(held_out, [(-1, "FeTS2022_01718")], "validation.csv")
    for m in MODALITIES: touch(held_out / "FeTS2022_01718" / f"FeTS2022_01718_{m}.nii.gz")
    pool = read_pool(tmp_path)
    assert len(pool) == 12 and any("MICCAI_FeTS2022_ValidationData" in str(where) for where, _ in pool.skipped)


def shuffled(rows):
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def test_the_whole_of_fets_is_listed_without_opening_a_volume(tmp_path):
    assert sum(SIZES.values()) == 1251
    sites = [site for site, n in SIZES.items() for _ in range(n)]
    folder = fets(tmp_path, shuffled([(site, 3 * i) for i, site in enumerate(sites)]), empty=True)  # no file holds a byte: opening one would fail
    pool = read_fets(folder)
    assert len(pool) == 23 * 12 and all(len(t) == len(t.patients) == SIZES[int(t.site)] for t in pool)
    sources = read_fets(folder, institutions=SOURCES)
    assert len(sources) == 84 and len(read_fets(folder, institutions=(*SOURCES, 16))) == 96
    assert min(len(t) for t in sources) >= 30 and {int(t.site) for t in sources} == set(SOURCES)


def test_the_real_partition_tables(realdata, tmp_path):
    tables = realdata / "fets2022_csv"
    read = lambda name: [(int(site), subject) for site, subject in (line.split(",") for line in (tables / name).read_text().split()[1:])]  # noqa: E731
    rows, finer = read("partitioning_1.csv"), dict((subject, site) for site, subject in read("partitioning_2.csv"))
    assert {site: sum(s == site for s, _ in rows) for site, _ in rows} == SIZES
    here = [(site, int(subject[-5:])) for i, (site, subject) in enumerate(rows) if sum(s == site for s, _ in rows[:i]) < 4]  # four patients of each institution
    folder = fets(tmp_path, here, empty=True)
    for table in tables.iterdir(): shutil.copy(table, folder)
    pool = read_fets(folder)
    assert {int(t.site): len(t) for t in pool} == {site: min(n, 4) for site, n in SIZES.items()} and len(pool) == 276
    assert {c.image.parent.name for c in pool["fets-16-T2-NCR"].cases} == {f"FeTS2022_{n:05}" for site, n in here if site == 16}
    split = {finer[f"FeTS2022_{n:05}"] for _, n in here}
    assert {int(t.site) for t in read_fets(folder, partition="partitioning_2.csv")} == split


# --- iSeg-2019

TISSUES = {"CSF": 10, "GM": 150, "WM": 250}


def iseg_images(seed):
    "T1, T2 and label; the label can be told from either image, voxel by voxel, whatever the axes."
    y = np.random.default_rng(seed).choice([0, 10, 150, 250], SHAPE).astype(np.int16)
    return {"T1": (y + 1000 + np.arange(y.size).reshape(SHAPE) % 7).astype(np.int16), "T2": (5000 - y).astype(np.int16), "label": y}


def iseg(root, subjects, ending=".hdr", kind=nib.Nifti1Pair, trailing=True):
    folder = root / "iSeg-2019-Training"
    for n in subjects:
        for what, x in iseg_images(n).items():
            save(folder / f"subject-{n}-{what}{ending}", x[..., None] if trailing else x, np.eye(4), kind)
    return folder


KINDS = {"NIfTI pair": (".hdr", nib.Nifti1Pair), "Analyze 7.5": (".hdr", nib.AnalyzeImage), "SPM99": (".hdr", nib.Spm99AnalyzeImage),
         "nii": (".nii", nib.Nifti1Image), "nii.gz": (".nii.gz", nib.Nifti1Image)}


@pytest.mark.parametrize("trailing", [True, False], ids=["4-D", "3-D"])
@pytest.mark.parametrize("kind", KINDS)
def test_iseg_in_every_format(tmp_path, kind, trailing):
    folder = iseg(tmp_path, (1, 2, 10), *KINDS[kind], trailing=trailing)
    pool = read_iseg(folder)
    assert set(pool.names) == {f"iseg-{m}-{y}" for m in ("T1", "T2") for y in TISSUES} and set(sizes(pool).values()) == {3}
    for n, case in zip((1, 2, 10), pool["iseg-T1-GM"].cases):  # subject-2 before subject-10
        assert case.image.name.startswith(f"subject-{n}-T1") and case.mask.name.startswith(f"subject-{n}-label")
    case = pool["iseg-T2-WM"].cases[2]
    v, whole = read_case(case), iseg_images(10)
    assert v.image.shape == v.mask.shape == SHAPE and np.array_equal(v.mask, v.image == 5000 - 250)
    assert np.array_equal(np.sort(v.image, axis=None), np.sort(whole["T2"], axis=None))
    if kind != "Analyze 7.5":  # without an origin and a direction in its header, left and right are a convention
        assert np.array_equal(v.image, whole["T2"]) and np.array_equal(v.mask, whole["label"] == 250)
    assert validate(pool).ok and read_pool(tmp_path).names == pool.names


def test_iseg_validation_is_skipped_by_name_and_options(tmp_path):
    iseg(tmp_path, (1, 2, 3))
    for n in (11, 12):
        for m in ("T1", "T2"): save(tmp_path / "iSeg-2019-Validation" / f"subject-{n}-{m}.hdr", iseg_images(n)[m][..., None], np.eye(4), nib.Nifti1Pair)
    pool = read_pool(tmp_path)
    assert len(pool) == 6 and set(sizes(pool).values()) == {3} and any("iSeg-2019-Validation" in str(where) for where, _ in pool.skipped)
    folder = tmp_path / "iSeg-2019-Training"
    some = read_iseg(folder, modalities=["T2"], labels=["CSF", "WM"], cases=2)
    assert sizes(some) == {"iseg-T2-CSF": 2, "iseg-T2-WM": 2}
    refused(lambda: read_iseg(folder, labels=["GW"]), "GW")
    for file in (folder / "subject-2-T2.hdr", folder / "subject-2-T2.img"): file.unlink()
    refused(lambda: read_iseg(folder), "subject-2-T2")


# --- WMH 2017

OTHER_GRID = np.diag([1.0, 1, 1, 1])
TRAINING = ["Utrecht/0", "Utrecht/2", "Singapore/50", "Amsterdam/GE3T/100", "Amsterdam/GE3T/101", "Amsterdam/GE3T/102"]
TEST = ["Utrecht/1", "Singapore/51", "Amsterdam/GE3T/103", "Amsterdam/GE1T5/150", "Amsterdam/Philips_VU .PETMR_01./160"]


def wmh(root, subjects, empty=False):
    "Patients as `site/number`; orig and pre differ, 3DT1 lies on a grid of its own, T1 and FLAIR headers by 2e-5."
    turned = GRID.copy()
    turned[:3, :3] += 2e-5 * np.array([[0, 1, 0], [-1, 0, 1], [0, -1, 0]])
    for i, subject in enumerate(subjects):
        files = {f"{where}/{m}.nii.gz": image(100 * i + 10 * j + k, (9, 9, 9) if m == "3DT1" else SHAPE)
                 for j, where in enumerate(("orig", "pre")) for k, m in enumerate(("3DT1", "FLAIR", "T1"))}
        for name, x in files.items():
            if empty: touch(root / subject / name)
            else: save(root / subject / name, x, OTHER_GRID if "3DT1" in name else turned if "/T1" in name else GRID)
        for name in ("orig/3DT1_mask.nii.gz", "wmh.nii.gz"):
            if empty: touch(root / subject / name)
            elif name == "wmh.nii.gz": save(root / subject / name, label_map(1, 2, dtype=np.float32))
            else: save(root / subject / name, np.ones((9, 9, 9), np.uint8), OTHER_GRID)
    return root


def test_wmh_lists_its_sites(tmp_path):
    wmh(tmp_path / "training", TRAINING, empty=True)
    pool = read_wmh(tmp_path)
    assert len(pool) == 6 and {(t.modality, t.label) for t in pool} == {("FLAIR", "WMH"), ("T1", "WMH")}
    assert sizes(pool)["wmh-Utrecht-FLAIR-WMH"] == 2 and sizes(pool)["wmh-Singapore-T1-WMH"] == 1 and sorted(sizes(pool).values()) == [1, 1, 2, 2, 3, 3]
    assert pool["wmh-Utrecht-FLAIR-WMH"].patients == pool["wmh-Utrecht-T1-WMH"].patients
    assert sizes(read_wmh(tmp_path, sites=["Utrecht"], modalities=["T1"], cases=1)) == {"wmh-Utrecht-T1-WMH": 1}
    refused(lambda: read_wmh(tmp_path, sites=["Utrect"]), "Utrect", "Utrecht")
    refused(lambda: read_wmh(tmp_path, modalities=["3DT1"]), "3DT1")
    assert read_pool(tmp_path).names == pool.names


def test_wmh_training_and_test_are_one_data_set(tmp_path):
    wmh(tmp_path / "training", TRAINING, empty=True)
    wmh(tmp_path / "test", TEST, empty=True)
    pool = read_wmh(tmp_path)
    counts = {t.site: len(t.patients) for t in pool}
    assert len(pool) == 10 and counts["Utrecht"] == 3 and counts["Singapore"] == 2 and sorted(counts.values()) == [1, 1, 2, 3, 4]
    philips = next(t for t in pool if "Philips" in t.site and t.modality == "FLAIR")
    assert re.fullmatch(r"[A-Za-z0-9._-]+", philips.name) and " " not in philips.site
    assert philips.cases[0].image == tmp_path / "test" / "Amsterdam" / "Philips_VU .PETMR_01." / "160" / "pre" / "FLAIR.nii.gz"
    assert read_pool(tmp_path / "training").names != pool.names and len(read_pool(tmp_path / "training")) == 6


def test_wmh_one_number_in_training_and_test_is_two_patients(tmp_path):
    wmh(tmp_path / "training", ["Utrecht/0"], empty=True)
    wmh(tmp_path / "test", ["Utrecht/0"], empty=True)
    assert sizes(read_wmh(tmp_path)) == {"wmh-Utrecht-FLAIR-WMH": 2, "wmh-Utrecht-T1-WMH": 2}


def test_wmh_older_copies(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    wmh(new, TRAINING, empty=True)
    wmh(old, [s.removeprefix("Amsterdam/") for s in TRAINING], empty=True)
    assert sizes(read_wmh(old)) == sizes(read_wmh(new)) and parts(read_pool(old)) == parts(read_wmh(new))


def test_wmh_ignores_other_pathology_and_resamples_no_t1(tmp_path):
    wmh(tmp_path / "training", TRAINING[:2])
    pool = read_wmh(tmp_path)
    y = label_map(1, 2, dtype=np.float32)
    for modality, seed in (("FLAIR", 11), ("T1", 12)):
        v = read_case(pool[f"wmh-Utrecht-{modality}-WMH"].cases[0])
        assert np.array_equal(v.mask, y == 1) and np.array_equal(v.ignored, y == 2)
        assert np.array_equal(v.image, image(seed))  # a header that differs by 2e-5 is the same grid: not one voxel is interpolated
    assert np.array_equal(read_case(read_wmh(tmp_path, images="orig")["wmh-Utrecht-T1-WMH"].cases[1]).image, image(102))
    assert np.array_equal(read_case(pool["wmh-Utrecht-T1-WMH"].cases[1]).image, image(112))
    refused(lambda: read_wmh(tmp_path, images="post"), "post")
    assert validate(pool).ok


def test_a_folder_beside_the_subjects_of_wmh_is_skipped_by_name(tmp_path):
    wmh(tmp_path / "training", TRAINING, empty=True)
    before = sizes(read_wmh(tmp_path))
    touch(tmp_path / "training" / "Utrecht" / "notes" / "todo.txt")
    (tmp_path / "training" / "Amsterdam" / "GE3T" / "0 old").mkdir()
    for read in (read_wmh, read_pool):
        pool = read(tmp_path)
        assert sizes(pool) == before and {"training/Utrecht/notes", "training/Amsterdam/GE3T/0 old"} == {where for where, _ in pool.skipped}
    (tmp_path / "training" / "Utrecht" / "33").mkdir()  # a number is a subject, and this one is incomplete
    refused(lambda: read_wmh(tmp_path), "Utrecht/33")


def test_the_three_data_sets_hold_108_tasks(tmp_path):
    fets(tmp_path, [(site, site) for site in (*SOURCES, 16)], empty=True)
    for n in range(1, 11):
        for what in ("T1", "T2", "label"):
            for end in (".hdr", ".img"): touch(tmp_path / "iSeg-2019-Training" / f"subject-{n}-{what}{end}")
    wmh(tmp_path / "WMH" / "training", TRAINING, empty=True)
    pool = read_pool(tmp_path)
    assert len(pool) == len(set(pool.names)) == 108
    assert {d: sum(t.dataset == d for t in pool) for d in {t.dataset for t in pool}} == {"fets": 96, "iseg": 6, "wmh": 6}
    assert {"fets-16-T2-NCR", "iseg-T1-GM", "wmh-Utrecht-FLAIR-WMH"} <= set(pool.names)
    assert all(task_parts(t.name) == (t.dataset, t.site, t.modality, t.label) for t in pool)


# --- nnU-Net v2 raw and the Medical Segmentation Decathlon

def nnunet(root, labels, channels=("T2",), values=(1, 2), cases=("a", "b"), name="Dataset042_Brain", ending=".nii.gz", **more):
    folder = root / name
    for i, case in enumerate(cases):
        for c in range(len(channels)): save(folder / "imagesTr" / f"{case}_{c:04}{ending}", image(10 * i + c))
        save(folder / "labelsTr" / f"{case}{ending}", label_map(*values))
    told = {"channel_names": {str(i): c for i, c in enumerate(channels)}, "labels": labels, "numTraining": len(cases), "file_ending": ending, **more}
    (folder / "dataset.json").write_text(json.dumps(told))
    return folder


def test_nnunet_regions_and_a_label_to_ignore(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "ignore": 4}, ("T2", "T1"), (1, 2, 3, 4), regions_class_order=[1, 2])
    pool = read_nnunet(folder)
    assert set(pool.names) == {"Brain-T1-whole", "Brain-T2-whole", "Brain-T1-core", "Brain-T2-core"}
    y = label_map(1, 2, 3, 4)
    v = read_case(pool["Brain-T1-core"].cases[1])
    assert np.array_equal(v.image, image(11)) and np.array_equal(v.mask, (y == 2) | (y == 3)) and np.array_equal(v.ignored, y == 4)
    assert np.array_equal(read_case(pool["Brain-T2-whole"].cases[0]).mask, (y > 0) & (y < 4))
    assert validate(pool).ok and len(read_nnunet(folder, modalities=["T2"], labels=["core"], cases=1)["Brain-T2-core"]) == 1


def test_a_label_map_that_holds_what_no_table_names(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1}, values=(1, 5))
    problems = validate(read_nnunet(folder)).problems
    assert "a.nii.gz" in problems.to_string() and "5" in problems.to_string()


@pytest.mark.parametrize("told, word", [
    ({"channel_names": ["T2"]}, "channel_names"), ({"channel_names": []}, "channel_names"), ({"channel_names": {"0": ["T2"]}}, "channel_names"),
    ({"channel_names": {"0": ""}}, "dataset.json"), ({"channel_names": {"T2": 0}}, "channel_names"), ({"labels": {"病变": 1}}, "病变"),
    ({"labels": {"lesion": 1.5}}, "labels"),
    ({"labels": {"background": 0}}, "label"), ({"labels": [0, 1]}, "labels"), ({"file_ending": 3}, "file_ending"), ({"file_ending": ".nii"}, ".nii"),
    ({"file_ending": "nii.gz"}, "dot"), ({"labels": {"background": 0, "a": 1, "b": 1}}, "the labels a and b"), ({"labels": {"l": 1, "ignore": 1}}, "ignored and belongs to l"),
    ({"labels": {"l": [1, 2], "ignore": 2}}, "ignored and belongs to l"), ({"channel_names": {"0": "T2", "1": "T2"}}, "2 channels are called T2"),
    ({"labels": {"white matter": 1, "white-matter": 2}}, "'white matter' and the label 'white-matter'"), ({"channel_names": {"0": "T2 a", "1": "T2-a"}}, "'T2 a' and the modality 'T2-a'")], ids=str)
def test_a_description_that_is_wrong_is_named(tmp_path, told, word):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1})
    (folder / "dataset.json").write_text(json.dumps(json.loads((folder / "dataset.json").read_text()) | told))
    refused(lambda: read_pool(tmp_path), word, folder, "dataset.json")


def test_a_region_of_one_label_is_no_second_label_of_its_value(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1, "whole": [1], "ignore": 2})
    assert set(read_nnunet(folder).names) == {"Brain-T2-lesion", "Brain-T2-whole"}


def test_a_data_set_of_nnunet_without_its_description_says_what_must_be_in_it(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1})
    (folder / "dataset.json").unlink()
    for read in (read_pool, read_nnunet): refused(lambda: read(folder), folder / "dataset.json", "is missing", "channel_names", "labels", "file_ending")


def msd(root, name="Task01_BrainTumour", entries=None):
    folder = root / name
    for i, case in enumerate(("BRATS_001", "BRATS_002")):
        save(folder / "imagesTr" / f"{case}.nii.gz", np.stack([image(10 * i + c) for c in range(3)], -1))
        save(folder / "labelsTr" / f"{case}.nii.gz", label_map(1, 2))
    told = {"modality": {"0": "FLAIR", "1": "T1w", "2": "T2w"}, "labels": {"0": "background", "1": "edema", "2": "core"}, "numTraining": 2,
            "training": entries or [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in ("BRATS_001", "BRATS_002")],
            "test": ["./imagesTs/BRATS_003.nii.gz"]}
    (folder / "dataset.json").write_text(json.dumps(told))
    return folder


def test_msd_reads_the_channel_that_is_asked_for(tmp_path):
    folder = msd(tmp_path)
    pool = read_msd(folder)
    assert set(pool.names) == {f"BrainTumour-{m}-{y}" for m in ("FLAIR", "T1w", "T2w") for y in ("edema", "core")}
    for c, m in enumerate(("FLAIR", "T1w", "T2w")):
        v = read_case(pool[f"BrainTumour-{m}-core"].cases[1])
        assert np.array_equal(v.image, image(10 + c)) and np.array_equal(v.mask, label_map(1, 2) == 2)
    assert validate(pool).ok and read_pool(tmp_path).names == pool.names
    assert sizes(read_msd(folder, modalities=["T1w"], labels=["edema"], cases=1)) == {"BrainTumour-T1w-edema": 1}


@pytest.mark.parametrize("told, word", [
    ({"modality": ["T1w"]}, "modality"), ({"modality": [1]}, "modality"), ({"modality": {"0": ["T1w"]}}, "modality"),
    ({"labels": {"1": "tumour", "2": "tumour"}}, "labels"), ({"modality": {"0": "T1w", "1": "T1w", "2": "T2w"}}, "two modalities of one name"),
    ({"labels": {"1": "tumour a", "2": "tumour-a"}}, "'tumour a' and the label 'tumour-a'"),
    ({"training": {}}, "training"), ({"training": ["imagesTr/BRATS_001.nii.gz"]}, "training"), ({"labels": {"one": "edema"}}, "labels")], ids=str)
def test_a_decathlon_description_that_is_wrong_is_named(tmp_path, told, word):
    folder = msd(tmp_path)
    (folder / "dataset.json").write_text(json.dumps(json.loads((folder / "dataset.json").read_text()) | told))
    refused(lambda: read_pool(tmp_path), word, folder)


@pytest.mark.parametrize("named", [1, 2])
def test_a_file_with_more_channels_than_modalities_are_named_is_a_problem(tmp_path, named):
    folder = msd(tmp_path)
    told = json.loads((folder / "dataset.json").read_text())
    assert validate(read_msd(folder, modalities="T1w")).ok  # a part of the modalities is no fault
    (folder / "dataset.json").write_text(json.dumps(told | {"modality": {str(i): f"M{i}" for i in range(named)}}))
    problems = validate(read_msd(folder)).problems.query("severity == 'error'")
    assert set(problems["file"]) == {str(folder / "imagesTr" / f"BRATS_00{i}.nii.gz") for i in (1, 2)}
    if named == 2: assert set(problems["kind"]) == {"channels"} and problems["problem"].str.contains("3 channels and its data set names 2 modalities").all()


@pytest.mark.parametrize("where", ["../elsewhere/x.nii.gz", "./imagesTr/../../elsewhere/x.nii.gz", "{root}/elsewhere/x.nii.gz"])
@pytest.mark.parametrize("key", ["image", "label"])
def test_msd_paths_do_not_leave_the_folder(tmp_path, key, where):
    where = where.format(root=tmp_path)
    save(tmp_path / "elsewhere" / "x.nii.gz", image())
    entry = {"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz", key: where}
    folder = msd(tmp_path, entries=[entry])
    refused(lambda: read_msd(folder), where, "dataset.json")
    refused(lambda: read_pool(folder), where)


# --- a manifest

def manifest(folder, rows, columns="patient,image,mask,modality,site,label", name="cohort.csv", encode=lambda s: s.encode()):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(encode("\n".join([columns, *rows]) + "\n"))
    return folder / name


def manifest_files(folder, values=(1, 2, 3)):
    for i, p in enumerate("ab"):
        for m in ("T1", "T2"): save(folder / "scans" / f"{p}-{m}.nii.gz", image(10 * i + int(m[1])))
        save(folder / "masks" / f"{p}.nii.gz", label_map(*values))
    return folder


ENTRIES = [f"{p},scans/{p}-{m}.nii.gz,masks/{p}.nii.gz,{m},{site},lesion" for p, site in (("a", "Ulm"), ("b", "Bonn")) for m in ("T1", "T2")]


@pytest.mark.parametrize("encode", [lambda s: s.encode(), lambda s: s.replace("\n", "\r\n").encode(), lambda s: s.encode("utf-8-sig"),
                                    lambda s: s.replace(",", ";").replace("\n", "\r\n").encode("utf-8-sig")], ids=["plain", "CRLF", "BOM", "semicolons"])
def test_a_manifest_as_spreadsheets_write_it(tmp_path, encode):
    file = manifest(manifest_files(tmp_path / "study"), ENTRIES, encode=encode)
    pool = read_manifest(file)
    assert {(t.site, t.modality, t.label): len(t) for t in pool} == {(s, m, "lesion"): 1 for s in ("Ulm", "Bonn") for m in ("T1", "T2")}
    task = next(t for t in pool if t.site == "Bonn" and t.modality == "T2")
    v = read_case(task.cases[0])
    assert np.array_equal(v.image, image(12)) and np.array_equal(v.mask, label_map(1, 1, 1) == 1)
    assert validate(pool).ok and [t.site for t in read_manifest(file, sites=["Ulm"], modalities=["T2"])] == ["Ulm"]


def test_a_manifest_says_which_values_make_a_label(tmp_path):
    rows = [f"{p},scans/{p}-T1.nii.gz,masks/{p}.nii.gz,T1,,{label},{value}" for p in "ab" for label, value in (("core", "2"), ("whole", "1+2"), ("all", ""))]
    pool = read_manifest(manifest(manifest_files(tmp_path), rows, "patient,image,mask,modality,site,label,value"))
    held = {t.label: read_case(t.cases[0]).mask for t in pool}
    y = label_map(1, 2, 3)
    assert np.array_equal(held["core"], y == 2) and np.array_equal(held["whole"], (y == 1) | (y == 2)) and np.array_equal(held["all"], y > 0)
    assert {t.site for t in pool} == {""} and {len(t) for t in pool} == {2}
    rows[1] = rows[1].replace("1+2", "one")
    refused(lambda: read_manifest(manifest(tmp_path, rows, "patient,image,mask,modality,site,label,value")), "one", "3", "cohort.csv")


def test_a_mask_of_0_and_255(tmp_path):
    pool = read_manifest(manifest(manifest_files(tmp_path, values=(255,)), ENTRIES))
    assert all(np.array_equal(read_case(c).mask, label_map(255) == 255) for t in pool for c in t.cases) and validate(pool).ok


def test_a_manifest_that_is_incomplete_is_refused_by_row(tmp_path):
    manifest_files(tmp_path)
    broken = lambda i, change: [change(row) if j == i else row for j, row in enumerate(ENTRIES)]  # noqa: E731
    refused(lambda: read_manifest(manifest(tmp_path, ["a,scans/a-T1.nii.gz,masks/a.nii.gz"], "patient,image,masks")), "cohort.csv", "mask", "modality", "label")
    refused(lambda: read_manifest(manifest(tmp_path, broken(2, lambda r: r.replace("b,", ",", 1)))), "cohort.csv", "patient", "4")  # row 1 is the header
    refused(lambda: read_manifest(manifest(tmp_path, broken(1, lambda r: r.replace("masks/a.nii.gz", "")))), "cohort.csv", "mask", "3")
    refused(lambda: read_manifest(manifest(tmp_path, broken(3, lambda r: r.replace("b-T2", "c-T2")))), "c-T2.nii.gz")
    refused(lambda: read_manifest(manifest(tmp_path, [])), "cohort.csv")
    refused(lambda: read_manifest(tmp_path / "nothing.csv"), "nothing.csv")


def test_two_words_of_a_manifest_that_become_one_are_named(tmp_path):
    rows = [row.replace("Ulm", "Ulm north") for row in ENTRIES[:2]] + [row.replace("Bonn", "Ulm-north") for row in ENTRIES[2:]]
    refused(lambda: read_manifest(manifest(manifest_files(tmp_path), rows)), tmp_path / "cohort.csv", "'Ulm north' and the site 'Ulm-north'", "Ulm_north")


def test_a_home_folder_in_a_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(manifest_files(tmp_path / "home")))
    rows = [row.replace("scans/", "~/scans/").replace("masks/", "~/masks/") for row in ENTRIES]
    assert read_case(read_manifest(manifest(tmp_path / "tables", rows)).tasks[0].cases[0]).mask.any()


def test_a_file_that_is_no_table_is_no_folder(tmp_path):
    file = save(tmp_path / "study" / "x.nii.gz", image())
    for read in (read_pool, read_fets, read_nnunet): refused(lambda: read(file), f"{file} is a file", f"its folder {file.parent}")


@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_an_image_in_the_place_of_a_mask_is_a_problem(tmp_path, kind):
    manifest_files(tmp_path)
    save(tmp_path / "scans" / "b-T1.nii.gz", image(11, (9, 9, 9)), OTHER_GRID)  # also where image and mask are on two grids
    save(tmp_path / "masks" / "b.nii.gz", image(5).astype(kind))
    problems = validate(read_manifest(manifest(tmp_path, ENTRIES))).problems.query("severity == 'error'")
    assert problems["kind"].tolist() == ["label values"] and problems["file"].tolist() == [str(tmp_path / "masks" / "b.nii.gz")] and "looks like an image" in problems["problem"].item()


def test_an_atlas_of_which_one_value_is_taken_is_none(tmp_path):
    manifest_files(tmp_path)
    atlas = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    for p, y in (("a", atlas), ("b", atlas[::-1])): save(tmp_path / "masks" / f"{p}.nii.gz", y)
    assert validate(read_manifest(manifest(tmp_path, [f"{row},17" for row in ENTRIES], "patient,image,mask,modality,site,label,value"))).ok


def test_a_manifest_in_an_old_encoding_is_named(tmp_path):
    rows = [row.replace("Ulm", "Köln") for row in ENTRIES]
    refused(lambda: read_manifest(manifest(manifest_files(tmp_path), rows, encode=lambda s: s.encode("cp1252"))), "cohort.csv", "UTF-8")
    assert {t.site for t in read_manifest(manifest(tmp_path, rows))} == {"K_ln", "Bonn"}


@pytest.mark.parametrize("column, text", [("site", "北京"), ("modality", "--"), ("label", "病变")])
def test_a_name_without_a_letter_is_named_with_its_row(tmp_path, column, text):
    head = ["patient", "image", "mask", "modality", "site", "label"]
    cells = [row.split(",") for row in ENTRIES]
    cells[2][head.index(column)] = text
    refused(lambda: read_manifest(manifest(manifest_files(tmp_path), [",".join(c) for c in cells])), text, "cohort.csv", "4")


# --- folders, and what is wrong in them

def test_data_sets_are_found_three_folders_down(tmp_path):
    for depth in range(5): nnunet(tmp_path / "/".join("abcd"[:depth]) / "here", {"background": 0, "lesion": 1, "other": 2}, name=f"Dataset00{depth}_D{depth}")
    found = lambda folder: {t.dataset for t in read_pool(folder)}  # noqa: E731
    assert found(tmp_path / "here") == {"D0"} and found(tmp_path) == {"D0", "D1"}  # here/Dataset000_D0 and a/here/Dataset001_D1
    assert found(tmp_path / "a" / "b" / "c" / "d" / "here" / "Dataset004_D4") == {"D4"} and found(tmp_path / "a" / "b" / "c") == {"D3", "D4"}


def test_folders_without_data_are_refused_or_skipped(tmp_path):
    refused(lambda: read_pool(tmp_path / "nowhere"), "nowhere")
    (tmp_path / "notes").mkdir()
    refused(lambda: read_pool(tmp_path), str(tmp_path))
    nnunet(tmp_path, {"background": 0, "lesion": 1, "other": 2})
    pool = read_pool(tmp_path)
    assert len(pool) == 2 and ["notes"] == [where for where, _ in pool.skipped]


def test_an_image_without_a_label_map_is_not_passed_over(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1, "other": 2})
    (folder / "labelsTr" / "b.nii.gz").unlink()
    refused(lambda: read_nnunet(folder), "b.nii.gz")


def test_an_empty_mask_is_legal_and_a_label_nobody_has_is_not(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1, "core": 2}, values=(1,))
    checked = validate(read_nnunet(folder, labels=["core"]))
    assert not checked.ok and "Brain-T2-core" in " ".join(checked.problems["problem"])
    save(folder / "labelsTr" / "b.nii.gz", label_map())
    pool = read_nnunet(folder, labels=["lesion"])
    checked = validate(pool)
    assert checked.ok and "b.nii.gz" in " ".join(checked.problems["problem"]) and checked.tasks["empty masks"].tolist() == [1]
    assert not read_case(pool["Brain-T2-lesion"].cases[1]).mask.any()


def test_a_patient_who_is_there_twice(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1, "other": 2}, cases="abcdef")
    assert validate(read_nnunet(folder), target="Brain-T2-lesion", shots=2).ok
    shutil.copy(folder / "imagesTr" / "a_0000.nii.gz", folder / "imagesTr" / "d_0000.nii.gz")
    said = " ".join(validate(read_nnunet(folder)).problems.query("severity == 'error'")["problem"])
    assert "a_0000.nii.gz" in said and "d_0000.nii.gz" in said
    problems = [validate(read_nnunet(folder), target="Brain-T2-lesion", shots=2, seed=seed).problems for seed in range(8)]
    splits = [row for p in problems for row in p[(p["kind"] == "split") & (p["severity"] == "error")].itertuples()]  # only where one of the two is tested and the other trained on
    assert splits and all(re.search("[ad]_0000.nii.gz", f"{row.file} {row.problem}") for row in splits)
    refused(lambda: validate(read_nnunet(folder), target="Brain-T2-lesoin"), "Brain-T2-lesoin", "Brain-T2-lesion")


def test_a_copy_that_is_compressed_in_another_way_is_a_copy(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1, "other": 2}, cases="abcdef")
    a, d = (folder / "imagesTr" / f"{c}_0000.nii.gz" for c in "ad")
    d.write_bytes(gzip.compress(gzip.decompress(a.read_bytes()), 0, mtime=9))
    assert a.stat().st_size != d.stat().st_size and twins([d, a, folder / "imagesTr" / "b_0000.nii.gz"]) == {a: d, d: d}
    said = " ".join(validate(read_nnunet(folder)).problems.query("kind == 'copies'")["problem"])
    assert "a_0000.nii.gz" in said and "d_0000.nii.gz" in said
    (tmp_path / "two").mkdir()
    other = shutil.copytree(folder, tmp_path / "two" / "Dataset043_Again")
    for file in other.rglob("*.gz"): file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), 0, mtime=9))
    for file in (a, d): file.unlink(), (folder / "labelsTr" / file.name.replace("_0000", "")).unlink()
    split = protocol(read_pool(tmp_path), "Brain-T2-lesion", shots=1)
    assert split.removed["Again-T2-lesion"] == split.removed["Brain-T2-other"] == 3


def test_twins_look_into_files_that_are_damaged_or_empty(tmp_path):
    whole = gzip.compress(image().tobytes())
    for name, content in {"a": whole[:-20], "b": whole[:-20], "c": b"", "d": b"", "e": whole}.items(): (tmp_path / f"{name}.gz").write_bytes(content)
    a, b, c, d, e = (tmp_path / f"{name}.gz" for name in "abcde")
    assert twins([a, b, c, d, e]) == {a: a, b: a, c: c, d: c}


def unpacked(path, voxels):
    "A `.nii.gz` of blocks that are only stored, so that a bit that flips changes one voxel and nothing else."
    save(path, voxels)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 0))
    return path


@pytest.mark.parametrize("where", ["imagesTr/a_0000", "labelsTr/b"])
@pytest.mark.parametrize("at", [400, -100, -6, -2], ids=["first voxels", "last voxels", "checksum", "length"])
def test_a_flipped_bit_is_found(tmp_path, where, at):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1, "other": 2})
    file = unpacked(folder / f"{where}.nii.gz", image() if "images" in where else label_map(1, 2))
    pool = read_nnunet(folder)
    assert validate(pool).ok
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)
    problems = validate(pool).problems.query("severity == 'error'")
    assert problems["kind"].tolist() == ["file"] and str(file) in problems["problem"].item()
    refused(lambda: [read_case(c) for c in pool["Brain-T2-lesion"].cases], file)


def test_a_flipped_bit_in_another_channel_is_found(tmp_path):
    folder = msd(tmp_path)
    file = unpacked(folder / "imagesTr" / "BRATS_001.nii.gz", np.stack([image(c) for c in range(3)], -1))
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(raw)
    assert validate(read_msd(folder, modalities="FLAIR")).problems.query("severity == 'error'")["file"].tolist() == [str(file)]


@pytest.mark.parametrize("dtype, word", [(np.complex64, "complex64"), (np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), "RGB")], ids=["complex", "RGB"])
def test_voxels_that_are_no_numbers(tmp_path, dtype, word):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1, "other": 2})
    file = save(folder / "imagesTr" / "a_0000.nii.gz", np.zeros(SHAPE, dtype))
    pool = read_nnunet(folder)
    said = validate(pool).problems.query("severity == 'error'")["problem"].item()
    assert said == refused(lambda: read_case(pool.tasks[0].cases[0]), file, word, "an image holds numbers")


def test_a_constant_image_is_noted(tmp_path):
    folder = msd(tmp_path)
    save(folder / "imagesTr" / "BRATS_001.nii.gz", np.stack([image(), np.full(SHAPE, 7, np.float32), image(2)], -1))
    checked = validate(read_msd(folder))
    note = checked.problems.query("kind == 'constant image'")
    assert checked.ok and note["severity"].tolist() == ["note"] and "The channel 1" in note["problem"].item() and "BRATS_001.nii.gz holds 7 in every voxel" in note["problem"].item()
    assert "constant image" not in set(validate(read_msd(folder, modalities="FLAIR")).problems["kind"])


def test_masks_that_are_empty_are_said_once(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1, "core": 2, "rim": 3}, ("T1", "T2", "FLAIR"), cases="abc")
    save(folder / "labelsTr" / "b.nii.gz", label_map())
    problems = validate(read_nnunet(folder)).problems
    notes, errors = (problems[(problems["kind"] == "empty masks") & (problems["severity"] == s)]["problem"].tolist() for s in ("note", "error"))
    assert len(notes) == len(errors) == 1
    assert notes[0].startswith("1 of 3 masks of Brain-T1-lesion, Brain-T1-core, Brain-T2-lesion and 3 more is empty, that is") and "b.nii.gz" in notes[0]
    assert errors[0].startswith("No mask of Brain-T1-rim, Brain-T2-rim, Brain-FLAIR-rim holds its label (value 3)")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", [b"", b"abc" * 300], ids=["empty", "text"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".hdr", ".img", ".mgz", ".gii", ".mnc", ".PAR", ".txt"])
def test_a_file_that_is_no_volume(tmp_path, ending, content):
    (tmp_path / f"x{ending}").write_bytes(content)
    assert "\n" not in refused(lambda: open_volume(tmp_path / f"x{ending}"), f"x{ending}")


# --- names

def test_names_as_they_are_written_down():
    assert task_name("fets", "16", "T2", "NCR") == "fets-16-T2-NCR" and task_name("iseg", "", "T1", "GM") == "iseg-T1-GM"
    assert task_name("wmh", "Utrecht", "FLAIR", "WMH") == "wmh-Utrecht-FLAIR-WMH" and task_name("MSLesion", "", "FLAIR", "lesion") == "MSLesion-FLAIR-lesion"
    assert task_parts("fets-16-T2-NCR") == ("fets", "16", "T2", "NCR") and task_parts("iseg-T1-GM") == ("iseg", "", "T1", "GM")
    assert task_name("wmh", "Philips_VU .PETMR_01.", "FLAIR", "white-matter lesion").count("-") == 3


text = st.text(min_size=1, max_size=12).filter(lambda s: any(c.isascii() and c.isalnum() for c in s))
four = st.tuples(text, st.one_of(st.just(""), text), text, text)


@settings(max_examples=60, deadline=None)
@given(text)
def test_a_slug_of_a_slug_is_itself_and_a_file_name(s):
    once = slug(s)
    assert slug(once) == once and re.fullmatch(r"[A-Za-z0-9._]+", once) and once[0] not in "." and once[-1] not in "."


@settings(max_examples=60, deadline=None)
@given(four, four)
def test_names_are_read_back_and_distinct(a, b):
    a, b = (tuple(slug(p) if p else "" for p in parts_) for parts_ in (a, b))
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
    return Case("p", save(tmp_path / "image.nii.gz", x, grid), save(tmp_path / "mask.nii.gz", y, mask_grid), (1,), **more)


def test_a_flipped_t1(realdata):
    odd = realdata / "odd"
    flair, t1 = (read_case(Case("p", odd / f"flipped_{n}.nii.gz", odd / "flipped_WMHmask.nii.gz", (1,))) for n in ("FLAIR", "T1_to_FLAIR"))
    raw = {n: np.asarray(nib.load(odd / f"flipped_{n}.nii.gz").dataobj) for n in ("FLAIR", "T1_to_FLAIR", "WMHmask")}
    assert np.allclose(flair.image, raw["FLAIR"][::-1]) and np.array_equal(flair.mask, raw["WMHmask"][::-1] == 1)  # LAS to RAS
    assert np.allclose(t1.image, raw["T1_to_FLAIR"][::-1, ::-1]) and np.array_equal(t1.mask, flair.mask)  # LPS to RAS


def test_a_flair_on_another_grid_comes_to_its_masks_grid(realdata):
    odd = realdata / "odd"
    v = read_case(Case("p", odd / "othergrid_flair.nii.gz", odd / "othergrid_msk.nii.gz", (1,)))
    mask = nib.as_closest_canonical(nib.load(odd / "othergrid_msk.nii.gz"))
    assert v.image.shape == v.mask.shape == mask.shape == (112, 112, 73) and np.allclose(v.affine, mask.affine) and v.mask.sum() == mask.get_fdata().sum()
    flair = nib.load(odd / "othergrid_flair.nii.gz")
    smooth = gaussian_filter(flair.get_fdata(dtype=np.float32), [2 / s / 2.355 for s in flair.header.get_zooms()])
    seen = [resample_from_to(nib.Nifti1Image(x, flair.affine), mask, order=1).get_fdata() for x in (flair.get_fdata(dtype=np.float32), smooth)]
    assert max(np.corrcoef(v.image.ravel(), x.ravel())[0, 1] for x in seen) > 0.99  # with or without a filter against aliasing
    assert not np.array_equal(v.image, np.zeros_like(v.image)) and 0.9 < v.image.mean() / seen[0].mean() < 1.1


@pytest.mark.parametrize("step", [0.5, 1.0, 1.5, 3.0])
def test_a_ramp_is_resampled_to_the_ramp(tmp_path, step):
    "Linear interpolation, with or without a symmetric filter before it, leaves a linear function of position what it is."
    c, s = np.cos(0.1), np.sin(0.1)
    grid = np.eye(4)
    grid[:3, :3], grid[:3, 3] = step * np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]), -22
    n = int(60 / step)
    world = nib.affines.apply_affine(grid, np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), -1))
    mask_grid = np.diag([2.0, 2, 3, 1])
    y = label_map(1)
    v = read_case(a_case(tmp_path, (100 + world @ [3, -2, 1]).astype(np.float32), y, grid, mask_grid))
    target = nib.affines.apply_affine(mask_grid, np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1))
    assert np.allclose(v.image, 100 + target @ [3, -2, 1], atol=0.05) and np.array_equal(v.mask, y == 1) and np.allclose(v.affine, mask_grid)


def test_an_image_that_does_not_cover_its_mask_is_refused(tmp_path):
    far = GRID.copy(); far[:3, 3] += 200
    case = a_case(tmp_path, image(), label_map(1), far)
    refused(lambda: read_case(case), "image.nii.gz", "mask.nii.gz")


@pytest.mark.parametrize("axis", range(3))
def test_an_image_that_misses_a_labelled_voxel_is_refused(tmp_path, axis):
    "A slab of the grid is enough for a label inside it, and is refused when the label reaches out of it."
    slab, lost = [slice(None)] * 3, [slice(None)] * 3
    slab[axis], lost[axis] = slice(0, SHAPE[axis] - 1), slice(SHAPE[axis] - 1, None)
    y = np.zeros(SHAPE, np.uint8)
    y[2:4, 2:4, 2:4] = 1
    v = read_case(a_case(tmp_path, image()[tuple(slab)], y))
    assert np.allclose(v.image[tuple(slab)], image()[tuple(slab)], rtol=1e-5) and np.array_equal(v.mask, y == 1)
    y[tuple(lost)] = 1
    case = a_case(tmp_path, image()[tuple(slab)], y)
    refused(lambda: read_case(case), "image.nii.gz", "mask.nii.gz")


def test_masks_are_rounded(tmp_path):
    y = label_map(1)
    case = a_case(tmp_path, image(), y * 0.99999997)  # float64: what a scale factor leaves of 1
    assert np.array_equal(read_case(case).mask, y == 1)
    scaled = save(tmp_path / "scaled.nii", (y * 200).astype(np.uint8))
    with open(scaled, "r+b") as f: f.seek(112), f.write(struct.pack("<f", 0.005 * (1 - 1e-7)))  # the slope of the header: 200 is 0.9999999
    assert np.array_equal(read_case(Case("p", case.image, scaled, (1,))).mask, y == 1)


def test_a_mask_of_halves_is_a_problem(tmp_path):
    manifest_files(tmp_path)
    save(tmp_path / "masks" / "b.nii.gz", label_map(1) * np.float32(0.5))
    checked = validate(read_manifest(manifest(tmp_path, ENTRIES)))
    assert not checked.ok and "b.nii.gz" in checked.problems.to_string()


def test_a_background_that_is_a_negative_constant(tmp_path):
    x = np.full((12, 12, 12), -3.25, np.float32)
    x[3:9, 3:9, 3:9] = image(1, (6, 6, 6))
    v = read_case(a_case(tmp_path, x, label_map(1, shape=x.shape)))
    assert np.array_equal(v.image, x) and np.array_equal(foreground(v.image), x != -3.25)


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
    v = read_case(a_case(tmp_path, stored, y, grid))
    assert np.array_equal(v.image, x) and np.array_equal(v.mask, y == 1) and np.allclose(v.affine, GRID) and np.allclose(v.spacing, (2, 2, 3))


# --- formats that are not read

@pytest.mark.parametrize("name", ["x.mha", "x.mhd", "x.nrrd", "x.nhdr", "x.dcm", "IM_0001"])
def test_formats_that_are_not_read(tmp_path, name):
    (tmp_path / name).write_bytes({"x.nrrd": b"NRRD0004\n", "IM_0001": bytes(128) + b"DICM"}.get(name, b"ObjectType = Image\n"))
    said = refused(lambda: open_volume(tmp_path / name), name)
    command = "dcm2niix" if name in ("x.dcm", "IM_0001") else "sitk|SimpleITK|c3d|ConvertImage|medconv|nrrd2nifti"
    assert re.search(command, said), said
    if name != "IM_0001":
        told = unread_format(tmp_path / name)
        assert told and told in said
        manifest_files(tmp_path)
        rows = [f"a,{name},masks/a.nii.gz,T1,,lesion"]
        assert re.search(command, refused(lambda: read_pool_or_case(manifest(tmp_path, rows)), name))


def read_pool_or_case(file):
    for t in read_manifest(file):
        for c in t.cases: read_case(c)


def test_the_converting_command_can_be_pasted(tmp_path):
    series = tmp_path / "Philips_VU .PETMR_01." / "160"
    for name, word in (("x.dcm", str(series)), ("x.mha", None)):
        said = refused(lambda: open_volume(touch(series / name)), name)
        command = shlex.split(said[re.search(r" (dcm2niix|pip|python) ", said).start():])
        assert (word or str(series / name)) in (command if word else " ".join(command)), command


def test_formats_that_are_read_are_not_refused():
    assert all(unread_format(f"x{end}") is None for end in (".nii", ".nii.gz", ".hdr", ".img", ".mgz"))


def test_a_folder_of_another_format_says_so(tmp_path):
    folder = nnunet(tmp_path, {"background": 0, "lesion": 1})
    for file in [*folder.rglob("*.nii.gz")]: file.rename(file.with_name(file.name.replace(".nii.gz", ".nrrd")))
    told = json.loads((folder / "dataset.json").read_text()) | {"file_ending": ".nrrd"}
    (folder / "dataset.json").write_text(json.dumps(told))
    assert re.search("sitk|SimpleITK|c3d|ConvertImage", refused(lambda: read_pool(tmp_path), ".nrrd"))


# --- real data

REAL = {**{f"Hippocampus-T1-{y}": 60 for y in ("anterior", "posterior")}, **{f"MSLesion-{m}-lesion": 3 for m in ("FLAIR", "T1")},
        **{f"WMHVentricle-FLAIR-{y}": 5 for y in ("WMH", "ventricle")}}


def test_real_data_are_listed_and_sound(realdata):
    pool = read_pool(realdata)
    assert sizes(pool) == REAL
    for name in ("odd", "fets2022_csv"): assert any(name in str(where) for where, _ in pool.skipped)
    some = read_pool(realdata, cases=2)
    checked = validate(some)
    assert checked.ok and set(checked.tasks.iloc[:, 0]) == set(REAL)


def test_a_manifest_over_odd_files(realdata, tmp_path):
    odd = realdata / "odd"
    rows = [f"one,{odd}/flipped_{n}.nii.gz,{odd}/flipped_WMHmask.nii.gz,{m},,WMH" for n, m in (("FLAIR", "FLAIR"), ("T1_to_FLAIR", "T1"))]
    rows += [f"two,{odd}/othergrid_{n}.nii.gz,{odd}/othergrid_msk.nii.gz,{n.upper()},,stroke" for n in ("dwi", "adc", "flair")]
    pool = read_manifest(manifest(tmp_path, rows))
    assert {(t.modality, t.label) for t in pool} == {("FLAIR", "WMH"), ("T1", "WMH"), ("DWI", "stroke"), ("ADC", "stroke"), ("FLAIR", "stroke")}
    held = {(t.modality, t.label): read_case(t.cases[0]) for t in pool}
    for label, name in (("WMH", "flipped_WMHmask"), ("stroke", "othergrid_msk")):
        assert len({v.mask.tobytes() for (_, y), v in held.items() if y == label}) == 1
        assert held["FLAIR", label].mask.sum() == (np.asarray(nib.load(odd / f"{name}.nii.gz").dataobj) > 0).sum()
    assert held["FLAIR", "stroke"].image.shape == held["DWI", "stroke"].image.shape == (112, 112, 73)
    assert validate(pool).ok
    assert open_volume(odd / "ras.hdr").shape == (62, 41, 34) and open_volume(odd / "norm.mgz").shape == (256, 256, 256)
