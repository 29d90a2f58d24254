"What a run leaves for others: the report in all its forms, masks, bundles; and the options that say how to train."

import base64
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import seqtransfer
from safetensors.torch import load_file

from seqtransfer import cli
from seqtransfer.anonymise import PUBLIC
from seqtransfer.arms import ARMS
from seqtransfer.datasets import read_pool
from seqtransfer.networks import load_network, parts
from seqtransfer.report import report
from seqtransfer.results import best_arm, read_results
from seqtransfer.study import Recipe
from seqtransfer.transfer import compare

TARGET = "LesionB-FLAIR-WMH"
FEW = ("--target", TARGET, "--shots", "2", "--steps", "40", "--target-steps", "10")
ARGS = (*FEW, "--arms", "scratch,direct-choice,sequential")


@pytest.fixture(scope="module")
def data(zoo, tmp_path_factory):
    "The zoo at a place whose name would tell something."
    return Path(shutil.copytree(zoo, tmp_path_factory.mktemp("ward-seven") / "jane doe" / "zoo"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    "A run, in a folder with a blank in its name."
    out = tmp_path_factory.mktemp("ward-eight") / "john doe" / "run"
    done = seqtransfer("run", data, "--out", out, *ARGS)
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.fixture
def command(monkeypatch, capfd):
    "Calls the command line in this process; returns exit code, standard output, standard error."

    def call(*args):
        monkeypatch.setattr("sys.argv", ["seqtransfer", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return end.value.code, said.out, said.err

    return call


def patients(data):
    "Every name of a patient, with and without that of the data set."
    full = {c.patient for t in read_pool(data) for c in t.cases}
    return full | {p.split("/")[-1] for p in full}


def pictures(file):
    "The PNG pictures that a page or a notebook holds, in base64."
    return re.findall(rb"iVBORw0KGgo[A-Za-z0-9+/=\\n]+", file.read_bytes())


def held(folder):
    "Every byte of a folder, names of files included, and what its embedded pictures hold."
    files = [p for p in folder.rglob("*") if p.is_file()]
    pages = [p for p in files if p.suffix in (".html", ".ipynb")]
    inside = [base64.b64decode(x.replace(b"\\n", b"")) for p in pages for x in pictures(p)]
    names = [str(p.relative_to(folder)).encode() for p in files]
    return b"\0".join([*names, *(p.read_bytes() for p in files), *inside])


def slices(folder):
    "Names of the pictures of patients."
    return sorted(p.name for p in (folder / "figures").glob("overlays-*.png"))


def read(file):
    "What a JSON file holds."
    return json.loads(Path(file).read_text())


# ---------------------------------------------------------------- the report


def test_the_report_holds_every_case(finished):
    out, _ = finished
    told = pd.read_csv(out / "cases.csv")
    assert list(told) == ["arm", "seed", "patient", "dice", "hd95", "surface_dice"]
    assert len(told) == 9
    for (arm, seed), rows in told.groupby(["arm", "seed"]):
        kept = read(out / "arms" / f"{arm}-seed{seed}.json")["cases"]
        assert rows.patient.tolist() == [c["patient"] for c in kept]
        assert np.allclose(rows.dice, [c["dice"] for c in kept])


def test_the_report_says_who_was_removed_and_shows_its_figures(finished):
    out, _ = finished
    html = (out / "report.html").read_text()
    split = read(out / "protocol-seed0.json")
    assert f"{sum(split['removed cases'].values())} of their cases were removed" in html
    assert "HD95 is undefined" in html
    best = best_arm(read_results(out))
    assert slices(out) == sorted({"overlays-sequential.png", f"overlays-{best}.png"})
    drawn = {p.name for p in (out / "figures").iterdir()}
    assert drawn >= {"dice.png", "pairs.png", "curves.png", "affinity.png"}
    assert {p.name for p in (out / "affinity-seed0" / "figures").iterdir()} == {"paths.png", "affinity.png"}


def test_without_images_no_picture_of_a_patient_is_left(finished, command):
    out, _ = finished
    n, before = len(slices(out)), len(pictures(out / "report.html"))
    assert command("report", out, "--no-images")[0] == 0
    assert slices(out) == []
    assert len(pictures(out / "report.html")) == before - n  # one of them belongs to the style of the page
    assert len(pictures(out / "notebooks" / "report.ipynb")) == 5
    assert (out / "figures" / "dice.png").exists()
    assert "Pictures of patients were left out" in (out / "report.html").read_text()
    assert command("report", out)[0] == 0
    assert len(slices(out)) == n
    assert len(pictures(out / "report.html")) == before


# ---------------------------------------------------------------- without names and places


def places(out, data):
    "What would tell where a run was made, and by whom."
    names = {"jane doe", "john doe", "ward-seven", "ward-eight"}
    paths = {str(p) for p in (out, data, out.parent, data.parent)}
    return names | paths | {sys.prefix, str(Path.home() / ".cache")}


def escaped(texts):
    "The texts, and how pages and JSON write them."
    return texts | {s.replace("/", "\\/") for s in texts} | {s.replace(" ", "%20") for s in texts}


@pytest.mark.parametrize("more", [(), ("--no-images",)], ids=["with images", "without images"])
def test_an_anonymous_report_names_nobody_and_no_place(finished, data, more):
    out, _ = finished
    before = (out / "report.html").read_bytes()
    done = seqtransfer("report", out, "--anonymise", *more)
    assert done.returncode == 0, done.stderr
    assert "can be published whole" in done.stdout
    public = out / "anonymous"
    assert sorted(p.name for p in public.iterdir()) == sorted(PUBLIC)
    assert (out / "report.html").read_bytes() == before
    everything = held(public)
    forbidden = escaped(patients(data) | places(out, data))
    assert [s for s in forbidden if s.lower().encode() in everything.lower()] == []
    assert bool(slices(public)) != bool(more)
    assert not list(out.glob(".anonymous-*"))
    assert TARGET.encode() in everything
    assert b"case 00" in everything


def test_the_same_search_finds_what_is_in_the_run_itself(finished, data):
    out, _ = finished
    whole = held(out / "notebooks") + held(out / "arms")
    there = (str(out), str(data), *read(out / "protocol-seed0.json")["test patients"])
    assert [s for s in there if s.encode() not in whole] == []


def test_the_key_tells_who_is_who_and_stays(finished, command):
    out, _ = finished
    assert command("report", out, "--anonymise")[0] == 0
    key, told = pd.read_csv(out / "anonymous-key.csv"), pd.read_csv(out / "anonymous" / "cases.csv")
    assert key.patient.is_unique
    assert set(key.case) == {f"case {i:03d}" for i in range(1, 6)}
    named = told.assign(patient=told.patient.map(key.set_index("case").patient))
    pd.testing.assert_frame_equal(named, pd.read_csv(out / "cases.csv"))
    assert command("report", out, "--anonymise")[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv(out / "anonymous" / "cases.csv"), told)
    notebook = nbformat.read(out / "anonymous" / "report.ipynb", 4)
    assert not any(o.output_type == "stream" for c in notebook.cells for o in c.get("outputs", []))


def test_a_folder_to_be_published_holds_nothing_else(finished, command):
    out, _ = finished
    notes = out / "anonymous" / "notes.txt"
    notes.parent.mkdir(exist_ok=True)
    notes.write_text("Mrs Doe")
    code, _, said = command("report", out, "--anonymise")
    assert code == 2
    assert "notes.txt" in said
    assert notes.exists()
    notes.unlink()


# ---------------------------------------------------------------- mistakes and losses


def test_folders_without_a_report(tmp_path, command):
    "Missing, empty, of an older version, damaged."
    old, damaged, empty = (tmp_path / name for name in ("old", "damaged", "empty"))
    for folder in (old / "arms", damaged / "arms", empty):
        folder.mkdir(parents=True)
    (old / "arms" / "scratch.json").write_text("{}")
    (old / "protocol.json").write_text("{}")
    (damaged / "arms" / "scratch-seed0.json").write_text("{}")
    problems = {
        tmp_path / "none": "There is no folder",
        empty: "no finished arm",
        old: "older version",
        damaged: "cannot read",
    }
    for folder, words in problems.items():
        for options in ((), ("--anonymise",)):
            code, _, said = command("report", folder, *options)
            assert code == 2
            assert words in said
            assert said.count("\n") == 1, said
    assert not (old / "report.html").exists()


def test_a_damaged_key_and_lost_slices(finished, tmp_path, command):
    out = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (out / "anonymous-key.csv").write_text("who,what\n")
    code, _, said = command("report", out, "--anonymise")
    assert code == 2
    assert "anonymous-key.csv" in said
    shutil.rmtree(out / "overlays")
    assert command("report", out)[0] == 0
    assert "not there any more" in (out / "report.html").read_text()


def test_a_lost_protocol_is_said(finished, tmp_path, command):
    out = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (out / "protocol-seed0.json").unlink()
    for options in ((), ("--anonymise",)):
        code, _, said = command("report", out, *options)
        assert code == 2
        assert "protocol-seed0.json is missing" in said


# ---------------------------------------------------------------- masks and bundles


@pytest.fixture(scope="module")
def predicted(finished, data, tmp_path_factory):
    "The best transfer arm, its model, the test cases, and the masks that `predict` writes of them."
    out, folder = finished[0], tmp_path_factory.mktemp("predicted") / "masks"
    results = read_results(out)
    arm = best_arm(results, transfer=True)
    model = results.arms.set_index("arm").model[arm]
    tested = set(results.cases.patient)
    cases = [c for c in read_pool(data)[TARGET].cases if c.patient in tested]
    done = seqtransfer("predict", model, *(c.image for c in cases), "--out", folder)
    assert done.returncode == 0, done.stderr
    return arm, model, cases, [Path(line) for line in done.stdout.splitlines()]


def test_the_end_of_a_run_names_the_model_to_predict_with(finished, predicted):
    _, model, _, _ = predicted
    (line,) = (x for x in finished[1].stdout.splitlines() if x.strip().startswith("seqtransfer predict"))
    assert f"'{model}'" in line  # quoted: there is a blank in it


def test_masks_lie_on_the_grid_of_their_images(predicted):
    _, _, cases, masks = predicted
    assert len(masks) == 3
    assert {m.parent.name for m in masks} == {"masks"}
    assert all(m.name.endswith("_WMH.nii.gz") for m in masks)
    for mask, case in zip(masks, cases):
        image, found = nib.load(case.image), nib.load(mask)
        assert found.shape == image.shape
        assert np.array_equal(found.affine, image.affine)
        assert set(np.unique(np.asarray(found.dataobj))) <= {0, 1}


def test_predicting_a_test_patient_gives_the_dice_of_the_report(finished, predicted):
    arm, _, cases, masks = predicted
    dice = pd.read_csv(finished[0] / "cases.csv").query("arm == @arm").set_index("patient").dice
    for mask, case in zip(masks, cases):
        p = np.asarray(nib.load(mask).dataobj)
        r = np.isin(np.asarray(nib.load(case.mask).dataobj), case.labels)
        overlap = 2 * (p * r).sum() / max(p.sum() + r.sum(), 1)
        assert overlap == pytest.approx(dice[case.patient], abs=1e-6)


def test_predicting_again_writes_the_same_bytes(predicted, command):
    _, model, cases, masks = predicted
    before = masks[0].read_bytes()
    code, said, _ = command("predict", model, cases[0].image, "--out", masks[0].parent)
    assert code == 0
    assert said.strip() == str(masks[0])
    assert masks[0].read_bytes() == before


def test_mistakes_of_predict_and_export(finished, data, tmp_path, command):
    model = read_results(finished[0]).arms.model.iloc[0]
    image = read_pool(data)[TARGET].cases[0].image
    masks, bundle, full = (tmp_path / name for name in ("masks", "bundle", "full"))
    full.mkdir()
    (full / "file").write_text("")
    mistakes = (
        ("predict", tmp_path / "none.safetensors", image, "--out", masks),
        ("predict", image, image, "--out", masks),
        ("predict", model, tmp_path / "none.nii.gz", "--out", masks),
        ("predict", model, model, "--out", masks),
        ("predict", model, tmp_path, "--out", masks),
        ("export", image, "--out", bundle),
        ("export", model, "--out", full),
    )
    for args in mistakes:
        code, _, said = command(*args)
        assert code == 2, args
        assert said.startswith("seqtransfer: "), said
    assert not masks.exists()
    assert not bundle.exists()
    assert command("predict", model, "--out", masks)[0] == 2


def test_export_writes_a_bundle(finished, tmp_path, command):
    model = read_results(finished[0]).arms.model.iloc[0]
    bundle = tmp_path / "bundle"
    code, said, _ = command("export", model, "--out", bundle)
    assert code == 0
    assert str(bundle) in said
    assert "monai.bundle run" in said
    assert read(bundle / "configs" / "metadata.json")["seqtransfer"]["about"]["label"] == "WMH"
    assert (bundle / "models" / "model.safetensors").read_bytes() == model.read_bytes()


# ---------------------------------------------------------------- how to train


@pytest.fixture(scope="module")
def tuned(finished, data, tmp_path_factory):
    "A run with every option that says how to train: its folder, and what the arm `sequential` left."
    out = tmp_path_factory.mktemp("tuned") / "run"
    start = read_results(finished[0]).arms.model.iloc[-1]
    options = {
        "--arms": "sequential,joint",
        "--optimiser": "sgd",
        "--augmentation": "nnunet",
        "--head": "reset",
        "--freeze": "encoder",
        "--validation": 1,
        "--lr": 0.002,
        "--target-lr": 0.001,
        "--memory": 4,
        "--start": start,
        "--start-modalities": "FLAIR",
    }
    done = seqtransfer("run", data, "--out", out, *FEW, *(x for pair in options.items() for x in pair))
    assert done.returncode == 0, done.stderr
    return out, read(out / "arms" / "sequential-seed0.json")


def test_how_to_train_reaches_every_stage(tuned):
    out, arm = tuned
    stages = [read(out / "stages" / name / "stage.json") for name in arm["stages"]]
    for option, value in (("optimiser", "sgd"), ("augmentation", "nnunet"), ("head", "reset")):
        assert [stage[option] for stage in stages] == [value] * 3
    assert [stage["lr"] for stage in stages] == [0.002, 0.002, 0.001]
    assert [stage["frozen"] for stage in stages] == [[], [], ["encoder"]]
    assert [stage["validation"] for stage in stages] == [0, 0, 1]


def test_only_the_first_source_starts_from_foreign_weights(tuned):
    out, arm = tuned
    first, second, _ = (read(out / "stages" / name / "stage.json") for name in arm["stages"])
    assert "model.safetensors" in first["begins with"]
    assert "model.safetensors" not in second["begins with"]


def test_frozen_parts_hold_still(tuned):
    out, arm = tuned
    before, after = (load_file(out / "stages" / name / "model.safetensors") for name in arm["stages"][1:])
    held_still = {k for k in before if np.array_equal(before[k], after[k])}
    assert set(parts(load_network(out / arm["model"]))["encoder"]) == held_still


@pytest.mark.parametrize(
    "args, words",
    [
        (("--network", "vnet"), "segresnet"),
        (("--optimiser", "adam"), "adamw"),
        (("--augmentation", "heavy"), "nnunet"),
        (("--head", "lose"), "reset"),
        (("--freeze", "middle"), "middle"),
        (("--freeze", ","), "--freeze"),
        (("--freeze", "encoder,decoder,head"), "freeze less"),
        (("--validation", "2"), "hold out fewer"),
        (("--lr", "0"), "above 0"),
        (("--target-lr", "nan"), "above 0"),
        (("--memory", "0.0001"), "more memory"),
        (("--start", "none.pt"), "none.pt"),
        (("--start-modalities", "T1"), "--start"),
        (("--steps", "1"), "more steps"),
        (("--target-steps", "0"), "target-steps"),
        (("--validation", "-1"), "validation"),
        (("--arms", "direct-oracle"), "ask for direct-each"),
        (("--seeds", "one"), "whole numbers"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_said_before_it_begins(zoo, tmp_path, command, args, words):
    code, _, said = command("run", zoo, "--out", tmp_path / "run", "--target", TARGET, "--shots", "2", *args)
    assert code == 2
    assert words in said, said
    assert not (tmp_path / "run").exists()


def help_of(*command):
    "What `--help` says, on one line."
    return " ".join(seqtransfer(*command, "--help").stdout.replace("│", " ").split())


def test_the_help_names_all_arms_and_options():
    said = help_of("run")
    assert [arm for arm in ARMS if arm not in said] == []
    assert "How to train" in said
    options = ("network", "optimiser", "augmentation", "head", "freeze", "validation", "lr", "target-lr", "memory")
    assert [o for o in (*options, "start", "start-modalities", "seeds") if f"--{o}" not in said] == []


def test_the_help_says_what_leaves_the_house():
    said = help_of("report")
    for words in ("--no-images", "published whole", "Names of tasks stay"):
        assert words in said


@pytest.mark.parametrize("name", ["predict", "export"])
def test_the_help_names_what_a_model_is_for(name):
    assert name in help_of()
    assert "model.safetensors" in help_of(name)


# ---------------------------------------------------------------- several seeds


@pytest.fixture(scope="module")
def several(zoo, tmp_path_factory):
    "Two seeds of `scratch` and of every source: the folder, and what `compare` returned."
    out = tmp_path_factory.mktemp("several") / "run"
    pool = read_pool(zoo, sites=None, modalities=["FLAIR"], labels=["WMH"])
    recipe = Recipe(source_steps=10, target_steps=5)
    asked = {"seeds": (0, 1), "shots": 2, "recipe": recipe, "sources": 1}
    return out, compare(pool, TARGET, arms=("scratch", "direct-each"), out=out, **asked)


def test_a_report_of_several_seeds(several):
    out, result = several
    html = report(out).read_text()
    assert all(f"seed {s}: 2 labelled patients, 3 test patients" in html for s in (0, 1))
    assert len(pd.read_csv(out / "cases.csv")) == len(result.cases) == 12


def test_the_best_of_every_source_is_shown_and_is_no_method(several):
    out, result = several
    assert dict.fromkeys(result.arms.arm) == dict.fromkeys(["scratch", "direct-oracle"])
    assert "chosen on the test cases" in report(out).read_text()
    for seed in (0, 1):
        each = [read(f)["cases"] for f in out.glob(f"arms/direct-each*-seed{seed}.json")]
        assert len(each) == 2
        best = max(np.mean([c["dice"] for c in cases]) for cases in each)
        shown = result.cases.query("arm == 'direct-oracle' and seed == @seed").dice.mean()
        assert shown == pytest.approx(best)
    assert best_arm(result) == "scratch"
    assert best_arm(result, transfer=True) == "scratch"


def test_an_anonymous_report_of_several_seeds_names_nobody(several, zoo):
    out, _ = several
    assert report(out, anonymise=True) == out / "anonymous" / "report.html"
    assert [p for p in patients(zoo) if p.encode() in held(out / "anonymous")] == []
