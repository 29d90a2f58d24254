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
from seqtransfer.datasets import read_pool
from seqtransfer.runs import PUBLIC, best_arm, report
from seqtransfer.networks import load_network, parts
from seqtransfer.arms import ARMS
from seqtransfer.results import read_results
from seqtransfer.study import Recipe
from seqtransfer.transfer import compare

TARGET = "LesionB-FLAIR-WMH"
ARGS = ("--target", TARGET, "--shots", "2", "--steps", "40", "--target-steps", "10", "--arms", "scratch,direct-choice,sequential")


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
        with pytest.raises(SystemExit) as end: cli.main()
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return end.value.code, said.out, said.err
    return call


def patients(data):
    "Every name of a patient, with and without that of the data set."
    full = {c.patient for t in read_pool(data) for c in t.cases}
    return full | {p.split("/")[-1] for p in full}


def pictures(file):
    return re.findall(rb"iVBORw0KGgo[A-Za-z0-9+/=\\n]+", file.read_bytes())


def held(folder):
    "Every byte of a folder, names of files included, and what its embedded pictures hold."
    files = [p for p in folder.rglob("*") if p.is_file()]
    inside = [base64.b64decode(x.replace(b"\\n", b"")) for p in files if p.suffix in (".html", ".ipynb") for x in pictures(p)]
    return b"\0".join([*(str(p.relative_to(folder)).encode() for p in files), *(p.read_bytes() for p in files), *inside])


def slices(folder):
    return sorted(p.name for p in (folder / "figures").glob("overlays-*.png"))


def test_the_report_holds_every_case(finished):
    out, _ = finished
    told = pd.read_csv(out / "cases.csv")
    assert list(told) == ["arm", "seed", "patient", "dice", "hd95", "surface_dice"] and len(told) == 9
    for (arm, seed), rows in told.groupby(["arm", "seed"]):
        kept = json.loads((out / "arms" / f"{arm}-seed{seed}.json").read_text())["cases"]
        assert rows.patient.tolist() == [c["patient"] for c in kept] and np.allclose(rows.dice, [c["dice"] for c in kept])
    html = (out / "report.html").read_text()
    split = json.loads((out / "protocol-seed0.json").read_text())
    assert f"{sum(split['removed cases'].values())} of their cases were removed" in html and "HD95 is undefined" in html
    assert slices(out) == sorted({"overlays-sequential.png", f"overlays-{best_arm(read_results(out))}.png"})
    assert {p.name for p in (out / "figures").iterdir()} >= {"dice.png", "pairs.png", "curves.png", "paths.png", "affinity.png"}


def test_without_images_no_picture_of_a_patient_is_left(finished, command):
    out, _ = finished
    n, before = len(slices(out)), len(pictures(out / "report.html"))
    assert command("report", out, "--no-images")[0] == 0
    assert slices(out) == [] and len(pictures(out / "report.html")) == before - n  # one of them belongs to the style of the page
    assert len(pictures(out / "notebooks" / "report.ipynb")) == 5
    assert (out / "figures" / "dice.png").exists() and "Pictures of patients were left out" in (out / "report.html").read_text()
    assert command("report", out)[0] == 0 and len(slices(out)) == n and len(pictures(out / "report.html")) == before


@pytest.mark.parametrize("more", [(), ("--no-images",)], ids=["with images", "without images"])
def test_an_anonymous_report_names_nobody_and_no_place(finished, data, more):
    out, _ = finished
    before = (out / "report.html").read_bytes()
    done = seqtransfer("report", out, "--anonymise", *more)
    assert done.returncode == 0 and "can be published whole" in done.stdout, done.stderr
    public = out / "anonymous"
    assert sorted(p.name for p in public.iterdir()) == sorted(PUBLIC) and (out / "report.html").read_bytes() == before
    everything = held(public)
    forbidden = patients(data) | {str(out), str(data), str(out.parent), str(data.parent), "jane doe", "john doe", "ward-seven", "ward-eight", sys.prefix, str(Path.home() / ".cache")}
    escaped = {s.replace("/", "\\/") for s in forbidden} | {s.replace(" ", "%20") for s in forbidden}
    assert [s for s in forbidden | escaped if s.lower().encode() in everything.lower()] == []
    whole = held(out / "notebooks") + held(out / "arms")  # the same search finds what is there
    assert all(s.encode() in whole for s in (str(out), str(data), *json.loads((out / "protocol-seed0.json").read_text())["test patients"]))
    assert bool(slices(public)) != bool(more) and not list(out.glob(".anonymous-*"))
    assert TARGET.encode() in everything and b"case 00" in everything


def test_the_key_tells_who_is_who_and_stays(finished, command):
    out, _ = finished
    assert command("report", out, "--anonymise")[0] == 0
    key, told = pd.read_csv(out / "anonymous-key.csv"), pd.read_csv(out / "anonymous" / "cases.csv")
    assert key.patient.is_unique and set(key.case) == {f"case {i:03d}" for i in range(1, 6)}
    named = told.assign(patient=told.patient.map(key.set_index("case").patient))
    pd.testing.assert_frame_equal(named, pd.read_csv(out / "cases.csv"))
    assert command("report", out, "--anonymise")[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv(out / "anonymous" / "cases.csv"), told)
    notebook = nbformat.read(out / "anonymous" / "report.ipynb", 4)
    assert not any(o.output_type == "stream" for c in notebook.cells for o in c.get("outputs", []))


def test_a_folder_to_be_published_holds_nothing_else(finished, command):
    out, _ = finished
    (out / "anonymous").mkdir(exist_ok=True)
    (out / "anonymous" / "notes.txt").write_text("Mrs Doe")
    code, _, said = command("report", out, "--anonymise")
    assert code == 2 and "notes.txt" in said and (out / "anonymous" / "notes.txt").exists()
    (out / "anonymous" / "notes.txt").unlink()


def test_folders_without_a_report(tmp_path, command):
    "Missing, empty, of an older version, damaged."
    (tmp_path / "old" / "arms").mkdir(parents=True); (tmp_path / "old" / "arms" / "scratch.json").write_text("{}"); (tmp_path / "old" / "protocol.json").write_text("{}")
    (tmp_path / "damaged" / "arms").mkdir(parents=True); (tmp_path / "damaged" / "arms" / "scratch-seed0.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, words in (("none", "There is no folder"), ("empty", "no finished arm"), ("old", "older version"), ("damaged", "cannot read")):
        for options in ((), ("--anonymise",)):
            code, _, said = command("report", tmp_path / name, *options)
            assert code == 2 and words in said and said.count("\n") == 1, said
    assert not (tmp_path / "old" / "report.html").exists()


def test_a_damaged_key_and_lost_slices(finished, tmp_path, command):
    out = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (out / "anonymous-key.csv").write_text("who,what\n")
    code, _, said = command("report", out, "--anonymise")
    assert code == 2 and "anonymous-key.csv" in said
    shutil.rmtree(out / "overlays")
    assert command("report", out)[0] == 0 and "not there any more" in (out / "report.html").read_text()


def test_predicting_a_test_patient_gives_the_dice_of_the_report(finished, data, tmp_path, command):
    out, done = finished
    line, = (x for x in done.stdout.splitlines() if x.strip().startswith("seqtransfer predict"))
    arm = best_arm(read_results(out), transfer=True)
    model = read_results(out).arms.set_index("arm").model[arm]
    assert f"'{model}'" in line  # quoted: there is a blank in it
    dice = pd.read_csv(out / "cases.csv").query("arm == @arm").set_index("patient").dice
    cases = {c.patient: c for c in read_pool(data)[TARGET].cases if c.patient in dice}
    images = [c.image for c in cases.values()]
    done = seqtransfer("predict", model, *images, "--out", tmp_path / "masks")
    assert done.returncode == 0, done.stderr
    masks = [Path(x) for x in done.stdout.splitlines()]
    assert len(masks) == 3 and all(m.parent == tmp_path / "masks" and m.name.endswith("_WMH.nii.gz") for m in masks)
    for mask, (patient, case) in zip(masks, cases.items()):
        image, reference, found = (nib.load(f) for f in (case.image, case.mask, mask))
        assert found.shape == image.shape and np.array_equal(found.affine, image.affine)
        p, r = np.asarray(found.dataobj), np.isin(np.asarray(reference.dataobj), case.labels)
        assert set(np.unique(p)) <= {0, 1}
        assert 2 * (p * r).sum() / max(p.sum() + r.sum(), 1) == pytest.approx(dice[patient], abs=1e-6)
    again = masks[0].read_bytes()
    code, said, _ = command("predict", model, images[0], "--out", tmp_path / "masks")
    assert code == 0 and said.strip() == str(masks[0]) and masks[0].read_bytes() == again


def test_mistakes_of_predict_and_export(finished, data, tmp_path, command):
    model = read_results(finished[0]).arms.model.iloc[0]
    image = read_pool(data)[TARGET].cases[0].image
    (tmp_path / "full").mkdir(); (tmp_path / "full" / "file").write_text("")
    for args in (("predict", tmp_path / "none.safetensors", image, "--out", tmp_path / "masks"), ("predict", image, image, "--out", tmp_path / "masks"), ("predict", model, tmp_path / "none.nii.gz", "--out", tmp_path / "masks"),
                 ("predict", model, model, "--out", tmp_path / "masks"), ("predict", model, tmp_path, "--out", tmp_path / "masks"), ("export", image, "--out", tmp_path / "bundle"), ("export", model, "--out", tmp_path / "full")):
        code, _, said = command(*args)
        assert code == 2 and said.startswith("seqtransfer: "), said
    assert not (tmp_path / "masks").exists() and not (tmp_path / "bundle").exists()
    assert command("predict", model, "--out", tmp_path / "masks")[0] == 2


def test_export_writes_a_bundle(finished, tmp_path, command):
    model = read_results(finished[0]).arms.model.iloc[0]
    code, said, _ = command("export", model, "--out", tmp_path / "bundle")
    assert code == 0 and str(tmp_path / "bundle") in said and "monai.bundle run" in said
    assert json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())["seqtransfer"]["about"]["label"] == "WMH"
    assert (tmp_path / "bundle" / "models" / "model.safetensors").read_bytes() == model.read_bytes()


def test_how_to_train_reaches_every_stage(finished, data, tmp_path):
    start = read_results(finished[0]).arms.model.iloc[-1]
    done = seqtransfer("run", data, "--out", tmp_path / "run", *ARGS[:-1], "sequential,joint", "--optimiser", "sgd", "--augmentation", "nnunet", "--head", "reset", "--freeze", "encoder", "--validation", 1,
                       "--lr", 0.002, "--target-lr", 0.001, "--memory", 4, "--start", start, "--start-modalities", "FLAIR")
    assert done.returncode == 0, done.stderr
    arm = json.loads((tmp_path / "run" / "arms" / "sequential-seed0.json").read_text())
    first, second, last = (json.loads((tmp_path / "run" / "stages" / s / "stage.json").read_text()) for s in arm["stages"])
    assert {s["optimiser"] for s in (first, second, last)} == {"sgd"} and {s["augmentation"] for s in (first, second, last)} == {"nnunet"} and {s["head"] for s in (first, second, last)} == {"reset"}
    assert (first["lr"], second["lr"], last["lr"]) == (0.002, 0.002, 0.001) and (last["frozen"], last["validation"], first["frozen"], first["validation"]) == (["encoder"], 1, [], 0)
    assert "model.safetensors" in first["begins with"] and "model.safetensors" not in second["begins with"]
    before, after = (load_file(tmp_path / "run" / "stages" / s / "model.safetensors") for s in arm["stages"][1:])
    held_still = {k for k in before if np.array_equal(before[k], after[k])}
    assert set(parts(load_network(tmp_path / "run" / arm["model"]))["encoder"]) == held_still


@pytest.mark.parametrize("args, words", [
    (("--network", "vnet"), "segresnet"), (("--optimiser", "adam"), "adamw"), (("--augmentation", "heavy"), "nnunet"), (("--head", "lose"), "reset"), (("--freeze", "middle"), "middle"), (("--freeze", ","), "--freeze"),
    (("--freeze", "encoder,decoder,head"), "freeze less"), (("--validation", "2"), "hold out fewer"), (("--lr", "0"), "above 0"), (("--target-lr", "nan"), "above 0"), (("--memory", "0.0001"), "more memory"),
    (("--start", "none.pt"), "none.pt"), (("--start-modalities", "T1"), "--start"), (("--steps", "1"), "more steps"), (("--target-steps", "0"), "target-steps"), (("--validation", "-1"), "validation")], ids=str)
def test_what_cannot_be_trained_is_said_before_it_begins(zoo, tmp_path, command, args, words):
    code, _, said = command("run", zoo, "--out", tmp_path / "run", "--target", TARGET, "--shots", "2", *args)
    assert code == 2 and words in said, said
    assert not (tmp_path / "run").exists()


def test_the_help_names_all_arms_and_options():
    said = seqtransfer("run", "--help").stdout
    assert all(arm in said for arm in ARMS) and "How to train" in said
    assert all(f"--{o}" in said for o in ("network", "optimiser", "augmentation", "head", "freeze", "validation", "lr", "target-lr", "memory", "start", "start-modalities"))
    said = " ".join(seqtransfer("report", "--help").stdout.replace("│", " ").split())
    assert "--no-images" in said and "published whole" in said and "Names of tasks stay" in said
    for name in ("predict", "export"): assert name in seqtransfer("--help").stdout and "model.safetensors" in seqtransfer(name, "--help").stdout


def test_a_report_of_several_seeds(zoo, tmp_path):
    pool = read_pool(zoo, sites=None, modalities=["FLAIR"], labels=["WMH"])
    result = compare(pool, TARGET, arms=("scratch", "direct-oracle"), seeds=(0, 1), shots=2, recipe=Recipe(source_steps=10, target_steps=5), sources=1, out=tmp_path / "run")
    html = report(tmp_path / "run").read_text()
    assert all(f"seed {s}: 2 labelled patients, 3 test patients" in html for s in (0, 1)) and "chosen on the test cases" in html
    assert len(pd.read_csv(tmp_path / "run" / "cases.csv")) == len(result.cases) == 12
    assert best_arm(result) == "scratch" == best_arm(result, transfer=True)  # the oracle is no method
    assert report(tmp_path / "run", anonymise=True) == tmp_path / "run" / "anonymous" / "report.html"
    assert [p for p in patients(zoo) if p.encode() in held(tmp_path / "run" / "anonymous")] == []
