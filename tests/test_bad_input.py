"What users get wrong or what happens to their files: one sentence that names the file or the task, no traceback, nothing half-written."
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from seqtransfer import cli

SOURCE, TARGET = "Dataset603_LesionA", "Dataset604_LesionB"


@pytest.fixture
def data(zoo, tmp_path):
    "Two data sets of the zoo, to be damaged."
    for name in (SOURCE, TARGET): shutil.copytree(zoo / name, tmp_path / "data" / name)
    return tmp_path / "data"


@pytest.fixture
def command(monkeypatch, capsys):
    "Calls the command line; returns exit code and what it said on standard error."
    def call(*args):
        monkeypatch.setattr("sys.argv", ["seqtransfer", *map(str, args)])
        with pytest.raises(SystemExit) as end: cli.main()
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return end.value.code, " ".join(said.split())
    return call


def rewrite(path, change, affine=None):
    img = nib.load(path)
    nib.Nifti1Image(change(np.asarray(img.dataobj).astype(np.float32)), img.affine if affine is None else affine).to_filename(path)


def truncated(data):
    file = data / SOURCE / "imagesTr" / "lesiona_001_0001.nii.gz"
    file.write_bytes(file.read_bytes()[:-500])
    return file.name


def no_image(data):
    file = data / SOURCE / "labelsTr" / "lesiona_002.nii.gz"
    file.write_text("this was a spreadsheet once")
    return file.name


def other_grid(data):
    file = data / TARGET / "labelsTr" / "lesionb_000.nii.gz"
    far = nib.load(file).affine.copy()
    far[0, 3] += 500  # as of another patient; a mask that is only cropped has its image brought to its grid
    rewrite(file, lambda y: y, far)
    return file.name


def not_a_number(data):
    file = data / TARGET / "imagesTr" / "lesionb_003_0001.nii.gz"
    rewrite(file, lambda x: np.where(x > x.mean(), np.nan, x))
    return file.name


def nobody_has_the_label(data):
    file = data / SOURCE / "dataset.json"
    told = json.loads(file.read_text()); told["labels"]["WMH"] = 7
    file.write_text(json.dumps(told))
    return "LesionA-T1-WMH"


def image_is_gone(data):
    file = data / SOURCE / "imagesTr" / "lesiona_004_0000.nii.gz"
    file.unlink()
    return file.name


def description_is_cut(data):
    file = data / TARGET / "dataset.json"
    file.write_text(file.read_text()[:50])
    return str(file)


def file_ending_is_wrong(data):
    file = data / TARGET / "dataset.json"
    file.write_text(file.read_text().replace(".nii.gz", ".nrrd"))
    return "file_ending"


DAMAGES = [truncated, no_image, other_grid, not_a_number, nobody_has_the_label, image_is_gone, description_is_cut, file_ending_is_wrong]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_is_named_by_the_affinity(data, command, damage, tmp_path):
    named = damage(data)
    code, said = command("affinity", data, "--out", tmp_path / "affinity.csv")
    assert code == 2 and named in said and said.count("seqtransfer: ") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize("damage", DAMAGES[:5], ids=lambda f: f.__name__)
def test_damage_is_found_by_a_check(data, command, damage):
    named = damage(data)
    code, said = command("tasks", data, "--check")
    assert code == 1 and "error: " in said and named in said


@pytest.mark.parametrize("args, words", [
    (("--target", "LesionB-FLAIR-WHM"), "LesionB-FLAIR-WMH"),
    (("--target", "LesionB-FLAIR-WMH", "--shots", "5"), "5 patients"),
    (("--target", "LesionB-FLAIR-WMH", "--shots", "0"), "at least one"),
    (("--target", "LesionB-FLAIR-WMH", "--sources", "0"), "at least one"),
    (("--target", "LesionB-FLAIR-WMH", "--shots", "2", "--mode", "papre"), "papre"),
], ids=str)
def test_impossible_questions(zoo, command, args, words):
    code, said = command("paths", zoo, *args)
    assert code == 2 and words in said


def test_a_pool_of_one_task(data, command, tmp_path):
    alone = tmp_path / "alone" / SOURCE
    shutil.copytree(data / SOURCE, alone)
    told = json.loads((alone / "dataset.json").read_text()); told["channel_names"] = {"0": "T1"}
    (alone / "dataset.json").write_text(json.dumps(told))
    for args in (("affinity", alone, "--out", tmp_path / "a.csv"), ("run", alone, "--target", "LesionA-T1-WMH", "--out", tmp_path / "run")):
        code, said = command(*args)
        assert code == 2 and ("needs two tasks" in said or "No source is left" in said)
    assert not (tmp_path / "a.csv").exists() and not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written(zoo, command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for args in (("run", zoo, "--target", "LesionB-FLAIR-WMH", "--out", tmp_path / "file" / "run"),
                 ("affinity", zoo, "--out", tmp_path / "file" / "a.csv"), ("phantom", tmp_path / "file" / "zoo", "--size", "16", "--cases", "1")):
        code, said = command(*args)
        assert code == 2 and "cannot be written" in said and "choose another" in said


def test_unknown_arms_and_reports_of_nothing(zoo, command, tmp_path):
    code, said = command("run", zoo, "--target", "LesionB-FLAIR-WMH", "--shots", 2, "--out", tmp_path / "run", "--arms", "scratch,sequental")
    assert code == 2 and "sequental" in said and "sequential" in said and not (tmp_path / "run").exists()
    code, said = command("report", tmp_path)
    assert code == 2 and "no finished arm" in said
