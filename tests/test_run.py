"Runs as a user starts them: real processes, real kernels, killed and started again."

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import COMMAND, ROOT, seqtransfer

from seqtransfer.datasets import read_pool
from seqtransfer.notebooks import TEMPLATES, read_result
from seqtransfer.protocol import protocol
from seqtransfer.results import best_arm, read_results

TARGET = "TumourB-FLAIR-ED"
ARMS = ["scratch", "direct-choice", "sequential"]
SPLIT = ("--target", TARGET, "--shots", "2")
ARGS = (*SPLIT, "--steps", "60", "--target-steps", "20", "--arms", ",".join(ARMS))
FEW = (*SPLIT, "--steps", "10", "--target-steps", "5")


@pytest.fixture(scope="module")
def finished(zoo, tmp_path_factory):
    "A run from beginning to end."
    out = tmp_path_factory.mktemp("finished") / "run"
    done = seqtransfer("run", zoo, "--out", out, *ARGS)
    assert done.returncode == 0, done.stderr
    return out, done


def state(out):
    "What must not be touched again: finished stages and arms with their times."
    stages = [f for p in out.glob("stages/*/stage.json") for f in (p, p.with_name("model.safetensors"))]
    return {p: p.stat().st_mtime_ns for p in (*stages, *out.glob("arms/*.json"))}


def arm_result(out, arm, seed=0):
    "What a run of an arm left in `arms`."
    return json.loads((out / "arms" / f"{arm}-seed{seed}.json").read_text())


# ---------------------------------------------------------------- what a run leaves


def test_progress_is_a_line_for_each_notebook(finished):
    _, done = finished
    told = done.stderr.splitlines()
    assert "0 of 4 notebooks were done before, 4 are left" in told
    lines = [line for line in told if line.startswith("[")]
    ended = [line.split(";")[0] for line in lines]
    jobs = [f"{TARGET}/{name}-seed0" for name in ("affinity", *ARMS)]
    assert ended == [f"[{place}/4] {job} done" for place, job in enumerate(jobs, 1)]
    assert lines[-1].endswith("6 of 6 stages")  # one of scratch, two of the nearest source, three of the path


def test_the_table_holds_every_arm(finished):
    out, done = finished
    table = pd.read_csv(out / "dice.csv")
    assert table.arm.tolist() == ARMS
    assert table.steps.tolist() == [20, 80, 80]
    assert table.cases.eq(3).all()
    assert table.dice.between(0, 1).all()
    assert (table.low <= table.dice).all()
    assert all(arm in done.stdout for arm in ARMS)


@pytest.mark.parametrize("arm", ARMS)
def test_table_notebook_and_result_say_the_same(finished, arm):
    out, _ = finished
    result = read_result(out / "notebooks" / f"{arm}-seed0.ipynb")
    assert result == arm_result(out, arm)
    mean = sum(c["dice"] for c in result["cases"]) / 3
    assert pd.read_csv(out / "dice.csv").set_index("arm").dice[arm] == pytest.approx(mean)


def test_the_report_shows_its_figures(finished):
    html = (finished[0] / "report.html").read_text()
    assert html.count("data:image/png;base64") >= 4
    assert TARGET in html


def test_the_end_says_where_everything_is(finished):
    out, done = finished
    assert "report.html" in done.stdout
    for arm in ARMS:
        assert str(out / arm_result(out, arm)["model"]) in done.stdout
    table = pd.read_csv(out / "dice.csv")
    best = table[table.arm != "scratch"].set_index("arm").dice.idxmax()
    assert f"seqtransfer predict {out / arm_result(out, best)['model']} " in done.stdout
    assert f"tensorboard --logdir {out / 'stages'}" in done.stdout


def test_everything_of_one_target_lies_in_the_folder_itself(finished):
    out, _ = finished
    written = (
        *("run.json", "plan.json", "protocol-seed0.json", "report.html", "dice.csv", "cases.csv"),
        *("table.parquet", "table.csv", "jobs.csv"),
        *(f"affinity-seed0/{name}" for name in ("affinity.csv", "affinity.json", "paths.csv", "path.json")),
        *(f"overlays/{arm}-seed0.npz" for arm in ARMS),
    )
    assert [name for name in written if not (out / name).exists()] == []
    assert not (out / "targets").exists()


def test_the_protocol_is_kept(finished, zoo):
    out, _ = finished
    split = protocol(read_pool(zoo), TARGET, 2)
    said = json.loads((out / "protocol-seed0.json").read_text())
    assert said["test patients"] == list(split.test.patients)
    assert said["removed cases"] == split.removed
    others = [(m, x) for m in ("FLAIR", "T2") for x in ("NCR", "ED", "ET") if (m, x) != ("FLAIR", "ED")]
    assert split.removed == {f"TumourB-{m}-{x}": 3 for m, x in others}
    for arm in ARMS:
        assert {c["patient"] for c in arm_result(out, arm)["cases"]} == set(split.test.patients)
    near = json.loads((out / "affinity-seed0" / "affinity.json").read_text())["parameters"]
    assert near["tasks"][TARGET]["cases"] == 2


def test_every_executed_notebook_shows_its_figures(finished):
    out, _ = finished
    overlays = len({"sequential", best_arm(read_results(out))})
    figures = {"affinity-seed0": 2, "scratch-seed0": 2, "sequential-seed0": 2, "report": 5 + overlays}
    for name, n in figures.items():
        nb = nbformat.read(out / "notebooks" / f"{name}.ipynb", 4)
        outputs = [o for c in nb.cells for o in c.get("outputs", [])]
        assert sum("image/png" in o.get("data", {}) for o in outputs) == n, name


# ---------------------------------------------------------------- the same folder again


def test_the_same_command_again_trains_nothing(finished, zoo):
    out, _ = finished
    before = state(out)
    again = seqtransfer("run", zoo, "--out", out, *ARGS, "--json")
    assert again.returncode == 0, again.stderr
    assert "4 of 4 notebooks were done before, 0 are left" in again.stderr
    assert state(out) == before
    assert [r["arm"] for r in json.loads(again.stdout)] == ARMS


@pytest.mark.parametrize(
    "option, value, said", [("--shots", 3, "shots = 2, and 3 was asked for"), ("--steps", 61, "'source_steps': 61")]
)
def test_another_run_is_refused_in_the_same_folder(finished, zoo, option, value, said):
    out, _ = finished
    before = state(out)
    other = seqtransfer("run", zoo, "--out", out, *ARGS, option, value)
    assert other.returncode == 2
    assert said in other.stderr
    assert "choose another output folder" in other.stderr
    assert "Traceback" not in other.stderr
    assert state(out) == before


def test_a_report_can_be_written_again(finished):
    out, first = finished
    written = out / "dice.csv", out / "cases.csv", out / "report.html", out / "figures" / "dice.png"
    for p in written:
        p.unlink()
    again = seqtransfer("report", out)
    assert again.returncode == 0
    assert again.stdout == first.stdout
    assert all(p.exists() for p in written)


def test_more_seeds_and_arms_join_a_run_and_find_its_stages(zoo, tmp_path):
    out = tmp_path / "run"
    first = seqtransfer("run", zoo, "--out", out, *FEW, "--arms", "sequential")
    assert first.returncode == 0, first.stderr
    before = state(out)
    assert len(before) == 3 * 2 + 1  # three stages of two files, a result
    asked = ("--arms", "sequential,averaged", "--seeds", "0,1", "--json")
    more = seqtransfer("run", zoo, "--out", out, *FEW, *asked, timeout=900)
    assert more.returncode == 0, more.stderr
    assert "2 of 8 notebooks were done before, 6 are left" in more.stderr
    assert {p: t for p, t in state(out).items() if p in before} == before
    seeds = pd.read_csv(out / "cases.csv").groupby("arm").seed.unique().map(list).to_dict()
    assert seeds == {"sequential": [0, 1], "averaged": [0, 1]}
    shared = list((out / "notebooks" / "stages").glob("*.ipynb"))
    assert len(shared) == 2  # under each seed the stage on the first source, which both arms begin with
    said = json.loads((out / "run.json").read_text())
    assert said["seeds"] == [0, 1]
    assert said["arms"] == ["sequential", "averaged"]


def test_killed_and_started_again_it_ends_with_the_same_bits(finished, zoo, tmp_path):
    expected, _ = finished
    out, args = tmp_path / "run", (*ARGS[:-1], "sequential")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = subprocess.Popen([*COMMAND, "run", zoo, "--out", out, *args], start_new_session=True, **quiet)
    deadline = time.monotonic() + 240
    while not list(out.glob("stages/*/stage.json")):  # the first of three stages: killed in the middle of the arm
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert not (out / "arms" / "sequential-seed0.json").exists()
    assert not (out / "dice.csv").exists()
    before = state(out)
    resumed = seqtransfer("run", zoo, "--out", out, *args)
    assert resumed.returncode == 0, resumed.stderr
    assert "1 of 2 notebooks were done before, 1 are left" in resumed.stderr
    assert {p: t for p, t in state(out).items() if p in before} == before  # no finished stage was trained again
    a, b = arm_result(expected, "sequential"), arm_result(out, "sequential")
    assert a["cases"] == b["cases"]
    assert a["stages"] == b["stages"]
    assert (expected / a["model"]).read_bytes() == (out / b["model"]).read_bytes()


# ---------------------------------------------------------------- elsewhere


def outside():
    "The environment of somebody who does not know of this checkout."
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter")}


def pip(*args):
    subprocess.run([sys.executable, "-m", "pip", *args], check=True, capture_output=True, env=outside())


def installed(wheel, folder):
    "The programs of an environment in which the wheel is installed; its dependencies are those of this test."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    programs = folder / "bin"
    pip("--python", programs / "python", "install", "-q", "--no-deps", wheel)
    (site,) = (folder / "lib").glob("python*/site-packages")
    here = Path(nbformat.__file__).parent.parent
    (site / "dependencies.pth").write_text(f"{here}\n")  # found after the packages beside it, so after the wheel
    return programs


def test_the_wheel_runs_elsewhere(zoo, tmp_path):
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("seqtransfer-*.whl")
    templates = {f"seqtransfer/experiments/{name}.ipynb" for name in TEMPLATES}
    assert templates <= set(zipfile.ZipFile(wheel).namelist())
    programs = installed(wheel, tmp_path / "env")
    there = {"cwd": tmp_path, "env": outside(), "capture_output": True, "text": True, "timeout": 300}
    asked = [programs / "python", "-c", "import seqtransfer; print(seqtransfer.__file__)"]
    where = subprocess.run(asked, **there).stdout
    assert Path(where.strip()).is_relative_to(tmp_path / "env")
    command = [programs / "seqtransfer", "run", zoo, "--out", "run", *FEW, "--arms", "sequential"]
    done = subprocess.run(command, **there)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()
    nb = nbformat.read(tmp_path / "run" / "notebooks" / "sequential-seed0.ipynb", 4)
    assert nb.metadata["seqtransfer"]["fingerprint"]
