"""What users get wrong or what happens to their files.

The answer is one sentence that names the file or the task: no traceback, nothing half-written.
"""

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
    for name in (SOURCE, TARGET):
        shutil.copytree(zoo / name, tmp_path / "data" / name)
    return tmp_path / "data"


@pytest.fixture
def command(monkeypatch, capsys):
    "Calls the command line; returns exit code and what it said on standard error."

    def call(*args):
        monkeypatch.setattr("sys.argv", ["seqtransfer", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return end.value.code, " ".join(said.split())

    return call


@pytest.fixture
def refused(command):
    "Calls the command line, which must refuse; returns the sentence."

    def call(*args):
        code, said = command(*args)
        assert code == 2
        return said

    return call


def rewrite(path, change, affine=None):
    "Writes changed voxels into an image file, with its matrix or another one."
    image = nib.load(path)
    voxels = change(np.asarray(image.dataobj).astype(np.float32))
    nib.Nifti1Image(voxels, image.affine if affine is None else affine).to_filename(path)


def rewrite_json(path, **changed):
    "Changes some keys of a JSON file."
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


# Each damage returns what the sentence has to name.


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
    rewrite(file, lambda labels: labels, far)
    return file.name


def not_a_number(data):
    file = data / TARGET / "imagesTr" / "lesionb_003_0001.nii.gz"
    rewrite(file, lambda x: np.where(x > x.mean(), np.nan, x))
    return file.name


def nobody_has_the_label(data):
    rewrite_json(data / SOURCE / "dataset.json", labels={"background": 0, "WMH": 7})
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
    rewrite_json(data / TARGET / "dataset.json", file_ending=".nrrd")
    return "file_ending"


IN_VOLUMES = [truncated, no_image, other_grid, not_a_number, nobody_has_the_label]
IN_FOLDERS = [image_is_gone, description_is_cut, file_ending_is_wrong]


def name_of(damage):
    return damage.__name__


@pytest.mark.parametrize("damage", IN_VOLUMES + IN_FOLDERS, ids=name_of)
def test_damage_is_named_by_the_affinity(data, refused, damage, tmp_path):
    named = damage(data)
    said = refused("affinity", data, "--out", tmp_path / "affinity.csv")
    assert named in said
    assert said.count("seqtransfer: ") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize("damage", IN_VOLUMES, ids=name_of)
def test_damage_is_found_by_a_check(data, command, damage):
    named = damage(data)
    code, said = command("tasks", data, "--check")
    assert code == 1
    assert "error: " in said
    assert named in said


QUESTIONS = [  # what is asked, a word of the answer
    ("--target LesionB-FLAIR-WHM", "LesionB-FLAIR-WMH"),
    ("--target LesionB-FLAIR-WMH --shots 5", "5 patients"),
    ("--target LesionB-FLAIR-WMH --shots 0", "at least one"),
    ("--target LesionB-FLAIR-WMH --sources 0", "at least one"),
    ("--target LesionB-FLAIR-WMH --shots 2 --mode papre", "papre"),
]


@pytest.mark.parametrize("question, answer", QUESTIONS)
def test_impossible_questions(zoo, refused, question, answer):
    assert answer in refused("paths", zoo, *question.split())


@pytest.fixture
def alone(data, tmp_path):
    "A folder with one task."
    folder = tmp_path / "alone" / SOURCE
    shutil.copytree(data / SOURCE, folder)
    rewrite_json(folder / "dataset.json", channel_names={"0": "T1"})
    return folder


def test_one_task_has_no_affinity(alone, refused, tmp_path):
    assert "needs two tasks" in refused("affinity", alone, "--out", tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()


def test_one_task_has_no_source(alone, refused, tmp_path):
    assert "No source is left" in refused("run", alone, "--target", "LesionA-T1-WMH", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written(zoo, refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    commands = [
        ("run", zoo, "--target", "LesionB-FLAIR-WMH", "--out", file / "run"),
        ("affinity", zoo, "--out", file / "a.csv"),
        ("phantom", file / "zoo", "--size", "16", "--cases", "1"),
    ]
    for args in commands:
        said = refused(*args)
        assert "cannot be written" in said
        assert "choose another" in said
    assert file.read_text() == "in the way"


def test_an_unknown_arm_is_answered_with_the_nearest(zoo, refused, tmp_path):
    asked = "--target LesionB-FLAIR-WMH --shots 2 --arms scratch,sequental"
    said = refused("run", zoo, *asked.split(), "--out", tmp_path / "run")
    assert "sequental" in said
    assert "sequential" in said
    assert not (tmp_path / "run").exists()


def test_a_report_of_nothing(refused, tmp_path):
    assert "no finished arm" in refused("report", tmp_path)
