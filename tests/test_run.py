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

from seqtransfer.notebooks import read_result
from seqtransfer.runs import best_arm
from seqtransfer.protocol import protocol
from seqtransfer.datasets import read_pool
from seqtransfer.results import read_results

ARGS = ("--target", "TumourB-FLAIR-ED", "--shots", "2", "--steps", "60", "--target-steps", "20", "--arms", "scratch,direct-choice,sequential")


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


def test_a_run_leaves_what_it_says(finished):
    out, done = finished
    arms = ["scratch", "direct-choice", "sequential"]
    assert all(arm in done.stdout for arm in arms) and "report.html" in done.stdout and "[5/5]" in done.stderr
    table = pd.read_csv(out / "dice.csv")
    assert table.arm.tolist() == arms and table.cases.eq(3).all() and table.dice.between(0, 1).all() and (table.low <= table.dice).all()
    assert table.steps.tolist() == [20, 80, 80]
    for arm in arms:
        result = read_result(out / "notebooks" / f"arm-{arm}.ipynb")
        assert result == json.loads((out / "arms" / f"{arm}-seed0.json").read_text())
        assert table.set_index("arm").dice[arm] == pytest.approx(sum(c["dice"] for c in result["cases"]) / 3)
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64") >= 4 and "TumourB-FLAIR-ED" in html
    for arm in arms: assert str(out / json.loads((out / "arms" / f"{arm}-seed0.json").read_text())["model"]) in done.stdout
    best = table[table.arm != "scratch"].set_index("arm").dice.idxmax()
    assert f"seqtransfer predict {out / json.loads((out / 'arms' / f'{best}-seed0.json').read_text())['model']} " in done.stdout and f"tensorboard --logdir {out / 'stages'}" in done.stdout


def test_the_protocol_is_kept(finished, zoo):
    out, _ = finished
    split = protocol(read_pool(zoo), "TumourB-FLAIR-ED", 2)
    said = json.loads((out / "protocol-seed0.json").read_text())
    assert said["test patients"] == list(split.test.patients) and said["removed cases"] == split.removed
    assert split.removed == {f"TumourB-{m}-{x}": 3 for m in ("FLAIR", "T2") for x in ("NCR", "ED", "ET") if (m, x) != ("FLAIR", "ED")}
    for arm in ("direct-choice", "sequential"):
        result = json.loads((out / "arms" / f"{arm}-seed0.json").read_text())
        assert {c["patient"] for c in result["cases"]} == set(split.test.patients)
    near = json.loads((out / "affinity.json").read_text())["parameters"]
    assert near["tasks"]["TumourB-FLAIR-ED"]["cases"] == 2


def test_every_executed_notebook_shows_its_figures(finished):
    out, _ = finished
    overlays = len({"sequential", best_arm(read_results(out))})
    figures = {"affinity": 2, "arm-scratch": 2, "arm-sequential": 2, "report": 5 + overlays}
    for name, n in figures.items():
        nb = nbformat.read(out / "notebooks" / f"{name}.ipynb", 4)
        assert sum("image/png" in o.get("data", {}) for c in nb.cells for o in c.get("outputs", [])) == n, name


def test_the_same_command_again_trains_nothing(finished, zoo):
    out, _ = finished
    before = state(out)
    again = seqtransfer("run", zoo, "--out", out, *ARGS, "--json")
    assert again.returncode == 0 and again.stderr.count("was done before") == 4 and state(out) == before
    assert [r["arm"] for r in json.loads(again.stdout)] == ["scratch", "direct-choice", "sequential"]


def test_another_run_is_refused_in_the_same_folder(finished, zoo):
    out, _ = finished
    other = seqtransfer("run", zoo, "--out", out, *ARGS, "--seed", 1)
    assert other.returncode == 2 and "seed = 0" in other.stderr and "Traceback" not in other.stderr


def test_a_report_can_be_written_again(finished):
    out, first = finished
    written = out / "dice.csv", out / "cases.csv", out / "report.html", out / "figures" / "dice.png"
    for p in written: p.unlink()
    again = seqtransfer("report", out)
    assert again.returncode == 0 and again.stdout == first.stdout
    assert all(p.exists() for p in written)


def test_killed_and_started_again_it_ends_with_the_same_bits(finished, zoo, tmp_path):
    expected, _ = finished
    out, args = tmp_path / "run", (*ARGS[:-1], "sequential")
    started = subprocess.Popen([*COMMAND, "run", str(zoo), "--out", str(out), *args], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(out.glob("stages/*/stage.json")):  # the first of three stages is on disk: it is killed in the middle of the arm
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert not (out / "arms" / "sequential-seed0.json").exists() and not (out / "dice.csv").exists()
    before = state(out)
    resumed = seqtransfer("run", zoo, "--out", out, *args)
    assert resumed.returncode == 0 and resumed.stderr.count("was done before") == 1
    assert {p: t for p, t in state(out).items() if p in before} == before  # no finished stage was trained again
    a, b = (json.loads((folder / "arms" / "sequential-seed0.json").read_text()) for folder in (expected, out))
    assert a["cases"] == b["cases"] and a["stages"] == b["stages"]
    assert (expected / a["model"]).read_bytes() == (out / b["model"]).read_bytes()


def test_the_wheel_runs_elsewhere(zoo, tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path / "dist", ROOT], check=True, capture_output=True)
    wheel, = (tmp_path / "dist").glob("seqtransfer-*.whl")
    assert {f"seqtransfer/experiments/{n}.ipynb" for n in ("affinity", "transfer_path", "report")} <= set(zipfile.ZipFile(wheel).namelist())
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel], check=True, capture_output=True)
    # the dependencies come from the environment of this test; its own packages stand first, so the wheel is what is imported
    site, = (tmp_path / "env" / "lib").glob("python*/site-packages")
    here = Path(nbformat.__file__).parent.parent
    (site / "dependencies.pth").write_text(f"{here}\n")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter")}
    where = subprocess.run([python, "-c", "import seqtransfer; print(seqtransfer.__file__)"], cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    assert Path(where.strip()).is_relative_to(tmp_path / "env")
    done = subprocess.run([tmp_path / "env" / "bin" / "seqtransfer", "run", zoo, "--out", "run", "--target", "TumourB-FLAIR-ED", "--shots", "2", "--steps", "10",
                           "--target-steps", "5", "--arms", "sequential"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()
    nb = nbformat.read(tmp_path / "run" / "notebooks" / "arm-sequential.ipynb", 4)
    assert nb.metadata["seqtransfer"]["fingerprint"]
