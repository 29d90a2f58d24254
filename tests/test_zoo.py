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
from seqtransfer.datasets import read_manifest, read_pool, validate
from seqtransfer.paths import best_paths
from seqtransfer.tasks import TaskPool, protocol, read_case
from seqtransfer.training import data_digest
from seqtransfer.transfer import Recipe, compare
from seqtransfer.zoo import write_zoo

MODALITIES, GLIOMA, INSTITUTIONS = ("FLAIR", "T1", "T1ce", "T2"), ("ED", "ET", "NCR"), ("01", "04", "06", "13", "16", "18", "20", "21")
FETS = {f"fets-{i}-{m}-{y}" for i in INSTITUTIONS for m in MODALITIES for y in GLIOMA}
ISEG = {f"iseg-{m}-{y}" for m in ("T1", "T2") for y in ("CSF", "GM", "WM")}
WMH = {f"wmh-{s}-{m}-WMH" for s in ("Utrecht", "Singapore", "Amsterdam_GE3T") for m in ("FLAIR", "T1")}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    "All look-alikes, four patients at each institution or site, 24 voxels a side, written by the command line."
    folder = tmp_path_factory.mktemp("look-alikes") / "zoo"
    done = seqtransfer("phantom", folder, "--like", "all", "--size", 24, "--cases", 4)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("folder, names", [(".", FETS | ISEG | WMH), ("fets2022", FETS), ("iseg2019", ISEG), ("wmh2017", WMH), ("wmh2017/training", WMH)])
def test_the_command_line_lists_exactly_the_tasks_expected(everything, folder, names):
    listed = seqtransfer("tasks", everything / folder, "--json")
    rows = json.loads(listed.stdout)
    assert {r["task"] for r in rows} == names and len(rows) == len(names) and {r["patients"] for r in rows} == {4}


def test_a_part_can_be_asked_for_and_a_part_that_is_not_there_is_refused(everything):
    listed = seqtransfer("tasks", everything, "--sites", "16,utrecht", "--modalities", "t2,flair", "--labels", "NCR,WMH", "--cases", 2, "--json")
    assert {r["task"]: r["patients"] for r in json.loads(listed.stdout)} == {"fets-16-FLAIR-NCR": 2, "fets-16-T2-NCR": 2, "wmh-Utrecht-FLAIR-WMH": 2}
    refused = seqtransfer("tasks", everything, "--sites", "Utrehct")
    assert refused.returncode == 2 and "Utrecht" in refused.stderr and "Traceback" not in refused.stderr


def test_a_whole_zoo_is_sound(everything):
    found = validate(read_pool(everything))
    assert found.ok and set(found.problems["kind"]) <= {"shared patients", "empty masks"}


def test_the_tables_of_fets_have_the_line_ends_of_windows(everything):
    folder = everything / "fets2022" / "MICCAI_FeTS2022_TrainingData"
    for k in (1, 2):
        head, *rows, rest = (folder / f"partitioning_{k}.csv").read_bytes().split(b"\r\n")
        assert head == b"Partition_ID,Subject_ID" and rest == b"" and len(rows) == 4 * len(INSTITUTIONS) and not any(b"\n" in row or b"\r" in row for row in rows)


def test_two_processes_write_the_same_bytes_and_a_killed_one_goes_on(tmp_path):
    args = "--like", "wmh2017", "--size", "20", "--cases", "6"
    bytes_of = lambda folder: {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    whole = write_zoo(tmp_path / "whole", "wmh2017", 20, 6, jobs=2)
    process = subprocess.Popen([*COMMAND, "phantom", str(tmp_path / "zoo"), *args], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    parts = lambda: [p for p in tmp_path.glob(".zoo.part") if p.is_dir()]
    while process.poll() is None and not (parts() and len(list(parts()[0].glob(".drawn/*"))) >= 5): time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "zoo").exists(), "the machine drew 13 patients within a hundredth of a second"
    oldest = {p: p.stat().st_mtime_ns for p in parts()[0].glob(".drawn/*")}
    assert len(oldest) >= 5
    kept = {p.relative_to(parts()[0]): p.stat().st_ino for p in parts()[0].rglob("wmh.nii.gz")}
    done = seqtransfer("phantom", tmp_path / "zoo", *args)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "zoo") == bytes_of(whole) and sorted(os.listdir(tmp_path)) == ["whole", "zoo"]
    same = sum((tmp_path / "zoo" / p).stat().st_ino == inode for p, inode in kept.items())
    assert same >= len(oldest)  # what was complete was not drawn again


def test_pairs_and_ignored_voxels_are_trained_on_and_tested(everything, tmp_path):
    pool = read_pool(everything, sites=["Utrecht", "Singapore"], modalities="FLAIR")
    infants = read_pool(everything / "iseg2019", modalities="T1", labels=["GM", "WM"])
    pool = TaskPool((*pool, *infants))
    for target in ("iseg-T1-GM", "wmh-Utrecht-FLAIR-WMH"):
        path = best_paths(affinity(pool, target=target, shots=2), target, sources=1)[0]
        result = compare(pool, target, path, arms=("scratch", "sequential"), shots=2, recipe=Recipe(source_steps=3, target_steps=3), out=tmp_path / target)
        assert sorted(result.cases.groupby("arm").patient.nunique()) == [2, 2] and result.cases.dice.between(0, 1).all()
    split = protocol(pool, "iseg-T1-GM", shots=2)
    assert split.removed == {"iseg-T1-WM": 2}  # the headers of all subjects are equal, their images are not


def test_a_process_that_waits_and_is_killed_leaves_the_lock_to_the_one_that_draws(tmp_path):
    args = [*COMMAND, "phantom", str(tmp_path / "zoo"), "--like", "wmh2017", "--size", "24", "--cases", "8", "--jobs", "1"]
    quiet = dict(stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    first = subprocess.Popen(args, **quiet)
    while first.poll() is None and not list(tmp_path.glob(".zoo.part/.drawn/*")): time.sleep(0.01)
    second = subprocess.Popen(args, **quiet)
    time.sleep(1)
    second.kill()
    third = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert (first.wait(), third.returncode) == (0, 0), third.stderr
    assert sorted(os.listdir(tmp_path)) == ["zoo"]


def test_names_by_content_see_pairs_channels_and_ignored_values(everything, tmp_path):
    task = read_pool(shutil.copytree(everything / "iseg2019", tmp_path / "iseg"))["iseg-T1-GM"]
    before = data_digest(task)
    others = [replace(task, cases=tuple(replace(c, **change) for c in task.cases)) for change in (dict(ignore=(10,)), dict(channel=0))]
    assert len({before, *map(data_digest, others)}) == 3
    body = task.cases[0].image.with_suffix(".img")
    raw = bytearray(body.read_bytes())
    raw[len(raw) // 2] ^= 1
    body.write_bytes(raw)
    assert data_digest(task) != before


def test_one_image_may_have_masks_on_several_grids(tmp_path):
    rng = np.random.default_rng(0)
    fine, coarse = np.diag([2.0, 2, 2, 1]), np.diag([4.0, 4, 4, 1])
    coarse[:3, 3] = 1
    rows = ["patient,image,mask,modality,site,label"]
    for i in range(4):
        x = rng.normal(100, 5, (16, 16, 16)).astype(np.float32)
        x[4:12, 4:12, 4:12] += 60 + 10 * i
        nib.Nifti1Image(x, fine).to_filename(tmp_path / f"{i}.nii.gz")
        for name, affine, n in (("fine", fine, 16), ("coarse", coarse, 8)):
            y = np.zeros((n, n, n), np.uint8)
            y[n // 4:3 * n // 4, n // 4:3 * n // 4, n // 4:3 * n // 4] = 1
            nib.Nifti1Image(y, affine).to_filename(tmp_path / f"{i}-{name}.nii.gz")
            rows.append(f"p{i},{i}.nii.gz,{i}-{name}.nii.gz,T1,,{name}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    pool = read_manifest(tmp_path / "manifest.csv")
    a, b = (read_case(t.cases[0]) for t in pool)
    assert a.image.shape == (16,) * 3 and b.image.shape == (8,) * 3
    assert np.isclose(a.image[a.mask].mean(), b.image[b.mask].mean(), rtol=0.15)
    assert np.isfinite(affinity(pool).distance).all()
    notes = validate(pool).problems
    assert set(notes[notes["kind"] == "grid"]["severity"]) == {"note"} and notes[notes["kind"] == "grid"]["problem"].str.contains("coarse").all()


def test_a_patient_twice_in_the_target_is_refused_by_its_file(everything, tmp_path):
    task = read_pool(everything / "wmh2017")["wmh-Utrecht-FLAIR-WMH"]
    copy = Path(shutil.copy(task.cases[0].image, tmp_path / "copy.nii.gz"))
    again = replace(task, cases=(*task.cases, replace(task.cases[0], patient="wmh/another", image=copy)))
    pool = TaskPool((again, read_pool(everything / "wmh2017")["wmh-Singapore-FLAIR-WMH"]))
    assert "copies" in set(validate(pool).problems["kind"]) and not validate(pool).ok
    with pytest.raises(InputError, match="nii.gz"):
        for seed in range(8): protocol(pool, task.name, shots=2, seed=seed)
