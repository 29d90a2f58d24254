"The look-alikes as a user meets them: written, listed, checked, killed, and trained on, whatever their layout."

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import COMMAND, seqtransfer

from seqtransfer.affinity import affinity
from seqtransfer.core import InputError
from seqtransfer.datasets import read_manifest, read_pool
from seqtransfer.validation import validate
from seqtransfer.paths import best_paths
from seqtransfer.protocol import protocol
from seqtransfer.tasks import TaskPool, read_case
from seqtransfer.training import data_digest
from seqtransfer.study import Recipe
from seqtransfer.transfer import compare
from seqtransfer.zoo import write_zoo

MODALITIES = ("FLAIR", "T1", "T1ce", "T2")
GLIOMA = ("ED", "ET", "NCR")
INSTITUTIONS = ("01", "04", "06", "13", "16", "18", "20", "21")
FETS = {f"fets-{i}-{m}-{y}" for i in INSTITUTIONS for m in MODALITIES for y in GLIOMA}
ISEG = {f"iseg-{m}-{y}" for m in ("T1", "T2") for y in ("CSF", "GM", "WM")}
WMH = {f"wmh-{s}-{m}-WMH" for s in ("Utrecht", "Singapore", "Amsterdam_GE3T") for m in ("FLAIR", "T1")}
QUIET = dict(stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    "All look-alikes, four patients at each institution or site, 24 voxels a side, written by the command line."
    folder = tmp_path_factory.mktemp("look-alikes") / "zoo"
    done = seqtransfer("phantom", folder, "--like", "all", "--size", 24, "--cases", 4)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "folder, names",
    [(".", FETS | ISEG | WMH), ("fets2022", FETS), ("iseg2019", ISEG), ("wmh2017", WMH), ("wmh2017/training", WMH)],
)
def test_the_command_line_lists_exactly_the_tasks_expected(everything, folder, names):
    listed = seqtransfer("tasks", everything / folder, "--json")
    rows = json.loads(listed.stdout)
    assert {row["task"] for row in rows} == names
    assert len(rows) == len(names)
    assert {row["patients"] for row in rows} == {4}


def test_a_part_can_be_asked_for(everything):
    part = ("--sites", "16,utrecht", "--modalities", "t2,flair", "--labels", "NCR,WMH", "--cases", 2)
    listed = seqtransfer("tasks", everything, *part, "--json")
    found = {row["task"]: row["patients"] for row in json.loads(listed.stdout)}
    assert found == {"fets-16-FLAIR-NCR": 2, "fets-16-T2-NCR": 2, "wmh-Utrecht-FLAIR-WMH": 2}


def test_a_part_that_is_not_there_is_refused(everything):
    refused = seqtransfer("tasks", everything, "--sites", "Utrehct")
    assert refused.returncode == 2
    assert "Utrecht" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_whole_zoo_is_sound(everything):
    found = validate(read_pool(everything))
    assert found.ok
    assert set(found.problems["kind"]) <= {"shared patients", "empty masks"}


@pytest.mark.parametrize("k", [1, 2])
def test_the_tables_of_fets_have_the_line_ends_of_windows(everything, k):
    table = everything / "fets2022" / "MICCAI_FeTS2022_TrainingData" / f"partitioning_{k}.csv"
    head, *rows, rest = table.read_bytes().split(b"\r\n")
    assert head == b"Partition_ID,Subject_ID"
    assert rest == b""
    assert len(rows) == 4 * len(INSTITUTIONS)
    assert not any(b"\n" in row or b"\r" in row for row in rows)


def bytes_of(folder):
    "Every file below `folder` by its relative path."
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder): p.read_bytes() for p in files}


def killed_while_drawing(folder, args, patients):
    "Kills the command line's drawing once so many patients are complete; returns the hidden folder."
    process = subprocess.Popen([*COMMAND, "phantom", str(folder), *args], **QUIET)
    part = folder.parent / f".{folder.name}.part"
    while process.poll() is None and len(list(part.glob(".drawn/*"))) < patients:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return part


def test_two_processes_write_the_same_bytes_and_a_killed_one_goes_on(tmp_path):
    args = "--like", "wmh2017", "--size", "20", "--cases", "6"
    whole = write_zoo(tmp_path / "whole", "wmh2017", 20, 6, jobs=2)
    part = killed_while_drawing(tmp_path / "zoo", args, patients=5)
    assert not (tmp_path / "zoo").exists(), "the machine drew 13 patients within a hundredth of a second"
    complete = len(list(part.glob(".drawn/*")))
    assert complete >= 5
    kept = {p.relative_to(part): p.stat().st_ino for p in part.rglob("wmh.nii.gz")}
    done = seqtransfer("phantom", tmp_path / "zoo", *args)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "zoo") == bytes_of(whole)
    assert sorted(os.listdir(tmp_path)) == ["whole", "zoo"]
    same = sum((tmp_path / "zoo" / p).stat().st_ino == inode for p, inode in kept.items())
    assert same >= complete  # what was complete was not drawn again


@pytest.mark.parametrize("target", ["iseg-T1-GM", "wmh-Utrecht-FLAIR-WMH"])
def test_pairs_and_ignored_voxels_are_trained_on_and_tested(everything, tmp_path, target):
    adults = read_pool(everything, sites=["Utrecht", "Singapore"], modalities="FLAIR")
    infants = read_pool(everything / "iseg2019", modalities="T1", labels=["GM", "WM"])
    pool = TaskPool((*adults, *infants))
    path = best_paths(affinity(pool, target=target, shots=2), target, sources=1)[0]
    recipe = Recipe(source_steps=3, target_steps=3)
    result = compare(pool, target, path, arms=("scratch", "sequential"), shots=2, recipe=recipe, out=tmp_path)
    assert sorted(result.cases.groupby("arm").patient.nunique()) == [2, 2]
    assert result.cases.dice.between(0, 1).all()


def test_tasks_of_one_subject_are_removed_by_their_images(everything):
    "The headers of all subjects are equal, their images are not."
    infants = read_pool(everything / "iseg2019", modalities="T1", labels=["GM", "WM"])
    assert protocol(infants, "iseg-T1-GM", shots=2).removed == {"iseg-T1-WM": 2}


def test_a_process_that_waits_and_is_killed_leaves_the_lock_to_the_one_that_draws(tmp_path):
    asked = ("--like", "wmh2017", "--size", "24", "--cases", "8", "--jobs", "1")
    args = [*COMMAND, "phantom", str(tmp_path / "zoo"), *asked]
    first = subprocess.Popen(args, **QUIET)
    while first.poll() is None and not list(tmp_path.glob(".zoo.part/.drawn/*")):
        time.sleep(0.01)
    second = subprocess.Popen(args, **QUIET)
    time.sleep(1)
    second.kill()
    third = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert (first.wait(), third.returncode) == (0, 0), third.stderr
    assert sorted(os.listdir(tmp_path)) == ["zoo"]


def with_cases(task, **change):
    "A task whose cases are changed."
    return replace(task, cases=tuple(replace(case, **change) for case in task.cases))


def test_names_by_content_see_pairs_channels_and_ignored_values(everything, tmp_path):
    task = read_pool(shutil.copytree(everything / "iseg2019", tmp_path / "iseg"))["iseg-T1-GM"]
    before = data_digest(task)
    others = [with_cases(task, ignore=(10,)), with_cases(task, channel=0)]
    assert len({before, *map(data_digest, others)}) == 3
    body = task.cases[0].image.with_suffix(".img")
    raw = bytearray(body.read_bytes())
    raw[len(raw) // 2] ^= 1
    body.write_bytes(raw)
    assert data_digest(task) != before


def save_block(path, affine, n):
    "A mask whose middle half along each axis is 1."
    y = np.zeros((n, n, n), np.uint8)
    middle = slice(n // 4, 3 * n // 4)
    y[middle, middle, middle] = 1
    nib.Nifti1Image(y, affine).to_filename(path)


@pytest.fixture
def masks_on_two_grids(tmp_path):
    "Four patients, each with one image and a mask on its grid and one on a grid half as fine."
    rng = np.random.default_rng(0)
    fine, coarse = np.diag([2.0, 2, 2, 1]), np.diag([4.0, 4, 4, 1])
    coarse[:3, 3] = 1
    rows = ["patient,image,mask,modality,site,label"]
    for i in range(4):
        x = rng.normal(100, 5, (16, 16, 16)).astype(np.float32)
        x[4:12, 4:12, 4:12] += 60 + 10 * i
        nib.Nifti1Image(x, fine).to_filename(tmp_path / f"{i}.nii.gz")
        for name, affine, n in (("fine", fine, 16), ("coarse", coarse, 8)):
            save_block(tmp_path / f"{i}-{name}.nii.gz", affine, n)
            rows.append(f"p{i},{i}.nii.gz,{i}-{name}.nii.gz,T1,,{name}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    return read_manifest(tmp_path / "manifest.csv")


def test_one_image_may_have_masks_on_several_grids(masks_on_two_grids):
    a, b = (read_case(task.cases[0]) for task in masks_on_two_grids)
    assert (a.image.shape, b.image.shape) == ((16,) * 3, (8,) * 3)
    assert np.isclose(a.image[a.mask].mean(), b.image[b.mask].mean(), rtol=0.15)
    assert np.isfinite(affinity(masks_on_two_grids).distance).all()


def test_a_mask_on_another_grid_is_noted(masks_on_two_grids):
    problems = validate(masks_on_two_grids).problems
    of_grids = problems[problems["kind"] == "grid"]
    assert set(of_grids["severity"]) == {"note"}
    assert of_grids["problem"].str.contains("coarse").all()


def test_a_patient_twice_in_the_target_is_refused_by_its_file(everything, tmp_path):
    sites = read_pool(everything / "wmh2017")
    task = sites["wmh-Utrecht-FLAIR-WMH"]
    copy = Path(shutil.copy(task.cases[0].image, tmp_path / "copy.nii.gz"))
    twin = replace(task.cases[0], patient="wmh/another", image=copy)
    pool = TaskPool((replace(task, cases=(*task.cases, twin)), sites["wmh-Singapore-FLAIR-WMH"]))
    found = validate(pool)
    assert "copies" in set(found.problems["kind"])
    assert not found.ok
    with pytest.raises(InputError, match="nii.gz"):
        for seed in range(8):
            protocol(pool, task.name, shots=2, seed=seed)
