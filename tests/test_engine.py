"Grids as a user runs them: real clusters, real kernels; killed, starved of disk, told to hurry, and started again."

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import nbformat
import nibabel as nib
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from conftest import COMMAND, seqtransfer
from dask.distributed import Client
from jupyter_client.manager import start_new_kernel

from seqtransfer import cli, clusters
from seqtransfer.anonymise import PUBLIC
from seqtransfer.core import InputError
from seqtransfer.datasets import read_pool
from seqtransfer.executors.dask import submitted
from seqtransfer.executors.notebooks import Times, plan_jobs
from seqtransfer.folders import read_plan
from seqtransfer.jobs import at_work, job_done, status
from seqtransfer.notebooks import _own_kernel, execute, read_result
from seqtransfer.questions import open_study
from seqtransfer.study import Recipe, read_study
from seqtransfer.training import machine
from seqtransfer.transfer import compare

TARGET, A, B, C = "TumourB-FLAIR-ED", "TumourA-FLAIR-ED", "LesionA-FLAIR-WMH", "LesionB-FLAIR-WMH"
GRID = {
    "targets": [TARGET],
    "among": [A, B, C],
    "paths": [[A, B], [A, C], [C, B]],
    "arms": ["scratch", "direct-choice", "sequential"],
    "shots": 2,
    "recipe": {"source_steps": 24, "target_steps": 8},
}
SCORES = ("dice", "hd95", "surface_dice")

# Imported by whatever kernel starts, through a start-up file of IPython. What it counts is written by the kernel
# itself, after each optimiser step; the product knows nothing of it.
COUNTING = """
import json, os, signal, time
from pathlib import Path
from seqtransfer import training

here, at = Path(os.environ["IPYTHONDIR"]), []
train, step_function = training.train, training.step_function


def say(file, text):
    fd = os.open(here / file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (text + "\\n").encode())
    os.close(fd)


def get_into_trouble(stage):
    trouble = json.loads((here / "trouble.json").read_text())
    if stage in trouble.get("raises", []):
        raise ZeroDivisionError("one by nought")
    if stage in trouble.get("dies", []):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600 if stage in trouble.get("hangs", []) else trouble.get("slow", 0))


def counted_train(net, data, stage, plan, keep=None, log=None):
    at.append(Path(keep).parent.name)
    return train(net, data, stage, plan, keep, log)


def counted_step_function(*args):
    step, stage = step_function(*args), at[-1]

    def counted(x, y):
        get_into_trouble(stage)
        loss = step(x, y)
        say("steps", f"{stage} {os.getpid()}")
        return loss

    return counted


training.train, training.step_function = counted_train, counted_step_function
say("kernels", f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}")
"""
BEGIN = "import sys; sys.path.insert(0, {!r}); import counting; del sys.path[0]"


class Counted:
    "A folder for IPython in which the kernels count optimiser steps, and are told to get into trouble."

    def __init__(self, folder):
        self.folder = folder
        startup = folder / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (folder / "counting.py").write_text(COUNTING)  # a module keeps its names when a kept kernel is emptied
        (startup / "00-count.py").write_text(BEGIN.format(str(folder)))
        self.trouble()

    def trouble(self, **what):
        "Stages that raise, die or hang, and the seconds by which each step is slower."
        part = self.folder / "trouble.part"
        part.write_text(json.dumps(what))
        part.replace(self.folder / "trouble.json")

    def _lines(self, file):
        file = self.folder / file
        return [line.split(" ") for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def steps(self):
        "Name of a stage -> steps that were made."
        return Counter(name for name, _ in self._lines("steps"))

    def trained_by(self, pid):
        "Names of the stages that a kernel trained, in order."
        return list(dict.fromkeys(name for name, by in self._lines("steps") if by == pid))

    @property
    def kernels(self):
        "Process and GPUs of every kernel that was started."
        return self._lines("kernels")

    @property
    def env(self):
        return {"IPYTHONDIR": str(self.folder), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def counted(tmp_path):
    return Counted(tmp_path / "ipython")


def grid_file(folder, data, **other):
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({"data": str(data), **GRID, **other}))
    return file


@pytest.fixture(scope="module")
def file(zoo, tmp_path_factory):
    return grid_file(tmp_path_factory.mktemp("file"), zoo)


@pytest.fixture(scope="module")
def reference(file, tmp_path_factory):
    "The grid, finished undisturbed: its folder, what it said, the optimiser steps that were counted."
    here = tmp_path_factory.mktemp("reference")
    counted = Counted(here / "ipython")
    done = seqtransfer("grid", file, "--out", here / "grid", timeout=900, **counted.env)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=here / "grid", done=done, counted=counted)


@pytest.fixture
def command(monkeypatch, capsys):
    "Calls the command line in this process; returns exit code, standard output, standard error."

    def call(*args):
        monkeypatch.setattr("sys.argv", ["seqtransfer", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        polite(out, err)
        return end.value.code or 0, out, err

    return call


@pytest.fixture
def one_thread():
    "The number of threads decides the last bits, and workers have one."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(*args, **env):
    "Starts the command line in a process of its own."
    piped = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *map(str, args)], env={**os.environ, "COLUMNS": "200", **env}, **piped)


def until(true, alive=None, seconds=600):
    "Waits for something; that a process ends before is an error."
    deadline = time.monotonic() + seconds
    while not true():
        assert alive is None or alive.poll() is None, alive.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read(file):
    "What a JSON file holds."
    return json.loads(Path(file).read_text())


def table(out):
    return pd.read_parquet(out / "table.parquet")


def finished(out):
    "Names of the stages that are finished."
    return {f.parent.name for f in out.glob("stages/*/stage.json")}


def model(out, stage):
    "The bytes of a trained stage."
    return (out / "stages" / stage / "model.safetensors").read_bytes()


def job(out, part):
    "The first job of the plan whose id holds `part`."
    return next(j for j in read_plan(out)["jobs"] if part in j["id"])


def plan_of(file, out):
    "The jobs of a study file, planned for a folder without writing into it."
    return plan_jobs(open_study(read_study(file)), out, machine(1), 1, {TARGET: Times(0.1, 0.1)}).jobs


PLANNED = re.compile(r"run\.json|protocol-seed0\.json|affinity-seed0/[^/]+\.(csv|json)")


def files(out):
    "Time of change of every file; the content of those that each plan writes again."
    found = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file()}
    other = ("lock", "lock.json", "plan.json")  # a plan says what a step takes, which is measured again
    kept = {name: p for name, p in found.items() if name not in other}
    return {name: p.read_bytes() if PLANNED.fullmatch(name) else p.stat().st_mtime_ns for name, p in kept.items()}


def nothing_is_half_written(out):
    for f in out.rglob("[!.]*.json"):
        json.loads(f.read_text())
    for f in out.rglob("[!.]*.ipynb"):
        nbformat.validate(nbformat.read(f, 4))


def same_models(expected, out):
    "What is trained in a folder is the same as in another, byte for byte."
    for name in finished(out):
        assert model(out, name) == model(expected, name)


def same_table(expected, found, **known):
    "A table holds, bit for bit, what another says of the same runs; `known` are columns that differ."
    runs = found[["arm", "path"]].drop_duplicates()
    expected = expected.merge(runs).reindex(columns=found.columns).assign(**known)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def same_as(reference, out, **known):
    "A grid, the same or a part of it, is finished, with the same table and the same models, byte for byte."
    same_table(table(reference.out), table(out), **known)
    plan = read_plan(out)
    assert table(out).groupby(["arm", "path"]).ngroups == len(plan["runs"])
    assert status(out).state.eq("done").all()
    assert finished(out) == {stage["name"] for stage in plan["stages"]}
    assert finished(out) == {name for j in plan["jobs"] for name in j["stages"]}
    assert not list(out.rglob("unfinished.safetensors"))
    assert not list(out.rglob("*.failed.ipynb"))
    same_models(reference.out, out)
    nothing_is_half_written(out)


def polite(*said):
    "What users are told is no traceback."
    for text in said:
        assert "Traceback" not in text, text
        assert 'File "' not in text, text


# ---------------------------------------------------------------- undisturbed


def test_each_stage_is_trained_once_and_every_step_is_counted(reference):
    polite(reference.done.stdout, reference.done.stderr)
    plan = read_plan(reference.out)
    steps = {f.parent.name: read(f)["steps"] for f in reference.out.glob("stages/*/stage.json")}
    assert reference.counted.steps == steps
    assert sum(steps.values()) == sum(j["steps"] for j in plan["jobs"])
    assert sum(steps.values()) == plan["named_steps"] - 12  # A -> ... begins two paths
    shared = job(reference.out, "stages/")
    assert shared["steps"] == 12
    assert len(shared["stages"]) == 1


def test_a_finished_grid_holds_every_run(reference):
    t = table(reference.out)
    assert len(t) == 5 * 3
    assert t.dice.between(0, 1).all()
    assert t.groupby("arm").path.nunique().to_dict() == {"scratch": 1, "direct-choice": 1, "sequential": 3}
    assert "7 notebooks were executed now" in reference.done.stdout
    assert (reference.out / "report.html").exists()
    nothing_is_half_written(reference.out)
    assert not list(reference.out.rglob(".part-*"))


def test_workers_keep_their_kernels(reference):
    started = {pid for pid, _ in reference.counted.kernels}
    workers = len(clusters.local_workers(clusters.gpus(), clusters.cores()))
    assert len(started) <= workers + 1  # each worker keeps one, and the report has its own
    assert len(started) < len(read_plan(reference.out)["jobs"])


def test_the_table_says_what_compare_finds(reference, zoo, tmp_path, one_thread):
    choice = read(reference.out / "affinity-seed0" / "path.json")["choice"]
    asked = {"arms": tuple(GRID["arms"]), "shots": 2, "recipe": Recipe(24, 8), "out": tmp_path}
    found = compare(read_pool(zoo), TARGET, (A, C), choice, **asked)
    t, paths = table(reference.out), found.arms.set_index("arm").path
    for arm, cases in found.cases.groupby("arm"):
        of = t[(t.arm == arm) & (t.path == paths[arm])].set_index("patient").sort_index()
        cases = cases.set_index("patient").sort_index()
        for score in SCORES:
            pd.testing.assert_series_equal(of[score], cases[score], check_exact=True)


def test_a_finished_grid_executes_nothing(reference, file, command):
    before, kernels = files(reference.out), len(reference.counted.kernels)
    code, out, err = command("grid", file, "--out", reference.out)
    assert code == 0
    assert "0 notebooks were executed now" in out
    assert "dashboard" not in err
    assert files(reference.out) == before
    assert len(reference.counted.kernels) == kernels


def test_a_dry_run_writes_nothing(file, tmp_path, command):
    code, out, _ = command("grid", file, "--out", tmp_path / "grid", "--dry-run", "--json")
    assert code == 0
    said = json.loads(out)
    assert (said["runs"], said["notebooks"], said["stages"]) == (5, 7, 11)
    assert said["optimiser steps named"] - said["optimiser steps"] == 12
    assert not (tmp_path / "grid").exists()


def test_another_recipe_is_refused_in_the_same_folder(reference, zoo, tmp_path, command):
    before = files(reference.out)
    other = grid_file(tmp_path, zoo, recipe={"source_steps": 25, "target_steps": 8})
    code, _, err = command("grid", other, "--out", reference.out)
    assert code == 2
    (said,) = (line for line in err.splitlines() if line.startswith("seqtransfer:"))
    assert "source_steps" in said
    assert str(reference.out) in said
    assert files(reference.out) == before


def test_the_report_of_a_grid_of_one_target_is_that_of_the_target(reference, command):
    out, page, expected = reference.out, reference.out / "report.html", table(reference.out)
    for gone in (page, out / "table.parquet", out / "table.csv", out / "jobs.csv"):
        gone.unlink()
    code, said, _ = command("report", out, "--json")
    assert code == 0
    assert page.exists()
    assert table(out).equals(expected)
    told = {r["arm"]: r["dice"] for r in json.loads(said)}
    assert {label.split(" via ")[0] for label in told} == set(expected.arm)
    by_path = {(r["path"], r["arm"].split(" via ")[0]): r["dice"] for r in json.loads(said)}
    means = expected.groupby(["path", "arm"]).dice.mean()
    assert by_path == pytest.approx(means.to_dict())
    assert len(pd.read_csv(out / "dice.csv")) == 5
    assert len(pd.read_csv(out / "cases.csv")) == 15
    assert len(pd.read_csv(out / "jobs.csv")) == 7
    assert not (out / "targets").exists()


def test_a_grid_of_one_target_can_be_reported_without_names(reference, command):
    out = reference.out
    code, said, _ = command("report", out, "--anonymise")
    assert code == 0
    assert "can be published whole" in said
    public = out / "anonymous"
    assert sorted(p.name for p in public.iterdir()) == sorted(PUBLIC)
    html = (public / "report.html").read_text()
    assert "case 00" in (public / "cases.csv").read_text()
    for patient in read(out / "protocol-seed0.json")["test patients"]:
        assert patient not in html
    assert str(out) not in html


def test_the_status_of_a_finished_grid(reference, command):
    code, out, _ = command("status", reference.out, "--json")
    assert code == 0
    rows = json.loads(out)
    assert len(rows) == 7
    assert {r["state"] for r in rows} == {"done"}
    assert {r["attempts"] for r in rows} == {1}
    assert all(r["seconds"] > 0 for r in rows)
    assert all((reference.out / r["notebook"]).exists() for r in rows)
    code, out, _ = command("status", reference.out)
    assert "Nobody is at work on it; 7 of 7 notebooks are done." in out


def test_a_failure_without_a_notebook_is_told(reference, tmp_path, command):
    out = shutil.copytree(reference.out, tmp_path / "grid")
    file = next((out / "jobs").glob("*scratch*"))
    file.write_text(json.dumps(read(file) | {"state": "failed", "error": "its worker died each time"}))
    code, told, err = command("status", out)
    assert code == 0
    assert "scratch-seed0: its worker died each time\n" in told, told + err


def changed_plan(file, out, image):
    "The jobs of a study file while one of its images holds other values."
    kept, about = image.read_bytes(), image.stat()
    try:
        scan = nib.load(image)
        nib.Nifti1Image(np.asarray(scan.dataobj) * 1.5 + 1, scan.affine).to_filename(image)
        return plan_of(file, out)
    finally:
        image.write_bytes(kept)
        os.utime(image, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_a_changed_source_repeats_what_read_it_and_nothing_else(reference, file, zoo):
    changed = changed_plan(file, reference.out, read_pool(zoo)[C].cases[0].image)
    same = plan_of(file, reference.out)
    assert all(job_done(reference.out, j) for j in same)
    left = {j.id for j in changed if not job_done(reference.out, j)}  # what an executor does
    reading = [j.id for j in changed if j.template == "transfer_path" and C in j.parameters["sources"]]
    assert left == {f"{TARGET}/affinity-seed0", *reading}
    assert len(left) == 3
    before, after = ({s for j in jobs for s in j.stages} for jobs in (same, changed))
    assert len(after - before) == 5  # C in the middle and what follows it, C at the beginning and what follows it


# ---------------------------------------------------------------- several targets


@pytest.fixture(scope="module")
def two_targets(zoo, tmp_path_factory):
    "A grid of two targets, done by one worker."
    here, both = tmp_path_factory.mktemp("two"), [TARGET, B]
    asked = {"targets": both, "among": [A, C], "paths": [[A]], "arms": ["scratch", "direct-first"]}
    file = grid_file(here, zoo, **asked, recipe={"source_steps": 4, "target_steps": 2})
    done = seqtransfer("grid", file, "--out", here / "grid", "--workers", 1, timeout=900)
    assert done.returncode == 0, done.stderr
    return here / "grid"


def test_each_of_several_targets_has_a_folder(two_targets):
    out = two_targets
    assert {p.name for p in (out / "targets").iterdir()} == {TARGET, B}
    for folder in (out / "targets").iterdir():
        assert {p.name for p in (folder / "arms").iterdir()} == {"scratch-seed0.json", "direct-first-seed0.json"}
        assert (folder / "protocol-seed0.json").exists()
        assert (folder / "notebooks" / "scratch-seed0.ipynb").exists()
    assert not (out / "arms").exists()
    assert finished(out) == {stage["name"] for stage in read_plan(out)["stages"]}
    assert table(out).groupby("target").arm.unique().map(len).to_dict() == {TARGET: 2, B: 2}


def test_the_report_of_several_targets_is_made_again(two_targets, command):
    page, expected = two_targets / "report.html", table(two_targets)
    page.unlink()
    code, said, _ = command("report", two_targets, "--json")
    assert code == 0
    assert page.exists()
    means = expected.groupby(["target", "arm"]).dice.mean()
    assert {(r["target"], r["arm"]): r["dice"] for r in json.loads(said)} == pytest.approx(means.to_dict())


def test_one_of_several_targets_is_reported_alone(two_targets, command):
    folder = two_targets / "targets" / TARGET
    code, said, _ = command("report", folder)
    assert code == 0
    assert "direct-first" in said
    assert len(pd.read_csv(folder / "cases.csv")) == 6
    assert command("report", folder, "--anonymise")[0] == 0
    assert (folder / "anonymous" / "report.html").exists()


@pytest.mark.parametrize("option", ["--anonymise", "--no-images"])
def test_what_shows_patients_is_asked_of_one_target(two_targets, command, option):
    code, _, err = command("report", two_targets, option)
    assert code == 2
    assert str(two_targets / "targets") in err


# ---------------------------------------------------------------- killed


def running(client, what):
    "Processes below a client: its kernels, or its workers."
    alive = [p for p in psutil.Process(client.pid).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    lines = [(p, " ".join(p.cmdline())) for p in alive]
    kernels = [p for p, line in lines if "ipykernel_launcher" in line]
    if what == "kernel":
        return kernels
    parents = {p.ppid() for p in kernels}
    return [p for p, line in lines if "spawn_main" in line and p.pid in parents]


def shoot(client, what, chance):
    "kill -9 of one of them, as soon as there is one."

    def killed():
        try:
            chance.choice(running(client, what)).kill()
        except (psutil.NoSuchProcess, IndexError):  # it has ended meanwhile, or there is none yet
            return False
        return True

    until(killed, client)


@dataclass
class Watch:
    "Looks at a grid while it runs."

    out: Path  # folder of the grid
    counted: Counted  # its kernels count
    states: set = field(default_factory=set)  # in which its jobs were seen
    finished: dict = field(default_factory=dict)  # stage -> steps that were made when it was first seen finished

    def __call__(self):
        "Looks; returns how many steps were made."
        for name in finished(self.out) - self.finished.keys():
            self.finished[name] = self.counted.steps[name]
        if (self.out / "plan.json").exists() and at_work(self.out):
            self.states |= set(status(self.out).state)
        return self.counted.steps.total()

    def shoot(self, client, chance, moments):
        "Kills a kernel and a worker, in either order, each at a random number of steps."
        for what, low in zip(chance.sample(["kernel", "worker"], 2), moments):
            self.wait(client, chance, low)
            shoot(client, what, chance)

    def wait(self, client, chance, low):
        "Waits for a random number of steps, `low` or up to 14 more."
        moment = chance.randrange(low, low + 15)
        until(lambda: self() >= moment, client)


def slay(client, watch):
    "Kills a client; what is left of it and what its folder says."
    family = psutil.Process(client.pid).children(recursive=True)
    client.kill()
    _, left = psutil.wait_procs(family, timeout=20)
    watch()
    out = watch.out
    return SimpleNamespace(
        left=left,
        busy=at_work(out),
        states=set(status(out).state),
        finished=dict(watch.finished),
        said=client.communicate(),
    )


@pytest.fixture(scope="module", params=[3])
def survivor(request, file, tmp_path_factory):
    """A grid of which a kernel, a worker and at last the client are killed at random; then a kernel and a worker of
    the same command again."""
    here, chance = tmp_path_factory.mktemp("survivor"), random.Random(request.param)
    counted, out = Counted(here / "ipython"), here / "grid"
    watch, args = Watch(out, counted), ("grid", file, "--out", out)
    env = {**counted.env, "SEQTRANSFER_KEEP_EVERY": "0"}  # the state of a stage is written down after each step
    counted.trouble(slow=0.1)
    first = start(*args, **env)
    until(lambda: (out / "lock.json").exists() and at_work(out), first)
    second = seqtransfer(*args, **env)
    watch.shoot(first, chance, (5, 25))
    watch.wait(first, chance, 50)
    told = seqtransfer("status", out, "--json")
    dead = slay(first, watch)
    third = start(*args, **env)
    watch.shoot(third, chance, (75, 95))
    stdout, stderr = third.communicate(timeout=900)
    last = SimpleNamespace(returncode=third.returncode, stdout=stdout, stderr=stderr)
    return SimpleNamespace(
        out=out, counted=counted, watch=watch, first=first, second=second, told=told, dead=dead, third=last
    )


def test_whatever_is_killed_it_ends_with_the_same_table(reference, survivor):
    polite(*survivor.dead.said, survivor.third.stdout, survivor.third.stderr)
    assert survivor.third.returncode == 0, survivor.third.stderr
    same_as(reference, survivor.out)


def test_no_step_of_a_finished_stage_is_made_again(survivor):
    assert len(survivor.dead.finished) >= 2
    steps, seen = survivor.counted.steps, survivor.watch.finished
    assert {name: steps[name] for name in seen} == seen


def test_of_an_unfinished_stage_at_most_the_step_is_lost_that_was_being_made(reference, survivor):
    steps = survivor.counted.steps
    assert steps.keys() == reference.counted.steps.keys()
    lost = {name: steps[name] - n for name, n in reference.counted.steps.items()}
    assert all(-5 <= n <= 5 for n in lost.values()), lost  # five were killed
    assert sum(map(abs, lost.values())) <= 6, lost


def test_nothing_outlives_a_client_that_is_killed(survivor):
    assert survivor.first.returncode == -signal.SIGKILL
    assert survivor.dead.left == []
    assert not survivor.dead.busy
    assert "interrupted" in survivor.dead.states
    assert "running" not in survivor.dead.states


def test_a_second_client_is_refused_while_the_first_is_at_work(survivor):
    assert survivor.second.returncode == 2
    last = survivor.second.stderr.splitlines()[-1]
    assert last.startswith("seqtransfer: ")
    assert f"process {survivor.first.pid} on " in last
    polite(survivor.second.stderr)


def test_the_status_tells_of_work_while_it_is_done(survivor):
    assert {"left", "running", "done"} <= survivor.watch.states
    assert "interrupted" not in survivor.watch.states
    assert survivor.told.returncode == 0
    rows = json.loads(survivor.told.stdout)
    assert {r["state"] for r in rows} <= {"left", "running", "done"}
    for row in (r for r in rows if r["state"] == "running"):
        assert row["host"]
        assert row["since"]
        assert row["attempts"]


# ---------------------------------------------------------------- failures


@pytest.fixture
def dask_cluster(tmp_path, counted):
    "A Dask cluster of one worker that somebody else started; yields the file of its scheduler."
    file, begun = tmp_path / "scheduler.json", []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def begin(module, *args):
        program = [sys.executable, "-m", f"distributed.cli.{module}", "--scheduler-file", str(file), "--no-dashboard"]
        env = {**os.environ, **counted.env}
        begun.append(subprocess.Popen([*program, *args], cwd=tmp_path, env=env, **quiet))

    begin("dask_scheduler", "--host", "127.0.0.1", "--port", "0")
    until(file.exists, begun[0])
    begin("dask_worker", "--nthreads", "1")
    yield file
    for p in reversed(begun):
        p.terminate()
        p.wait(30)


@dataclass
class Failed:
    "A grid in which a stage raised, a stage hung and a kernel died."

    out: Path  # its folder
    said: subprocess.CompletedProcess  # what the command said
    counted: Counted  # its kernels count
    raised: str  # ids of jobs
    hung: str
    died: str
    waiting: list  # ids of the jobs that wait for the one that raised


@pytest.fixture(scope="module")
def failed(reference, file, tmp_path_factory):
    "The grid in trouble."
    here = tmp_path_factory.mktemp("failed")
    counted, out = Counted(here / "ipython"), here / "grid"
    raised, hung, died = (job(reference.out, part) for part in ("stages/", "/scratch", f"via.{C}.{B}"))
    counted.trouble(raises=raised["stages"], hangs=hung["stages"], dies=died["stages"][1:2])
    said = seqtransfer("grid", file, "--out", out, "--limit", 1, timeout=900, **counted.env)
    waiting = [j["id"] for j in read_plan(out)["jobs"] if raised["id"] in j["after"]]
    return Failed(out, said, counted, raised["id"], hung["id"], died["id"], waiting)


def test_failures_are_listed_with_their_causes(failed):
    polite(failed.said.stdout, failed.said.stderr)
    assert failed.said.returncode == 1
    lines = failed.said.stderr.splitlines()
    assert lines[-1].startswith("seqtransfer: 5 of 7 notebooks were not done")
    told = {line.split(": ")[1]: line for line in lines if line.startswith("failed: ")}
    assert told.keys() == {failed.raised, failed.hung, failed.died}
    assert "ZeroDivisionError: one by nought" in told[failed.raised]
    assert "took longer than the 60 seconds" in told[failed.hung]
    assert "The kernel of" in told[failed.died]
    assert "signal 9 (SIGKILL)" in told[failed.died]


def test_the_rest_is_done_when_something_fails(reference, failed):
    states = status(failed.out).set_index("job").state
    trouble = [failed.raised, failed.hung, failed.died]
    assert len(failed.waiting) == 2
    expected = {**dict.fromkeys(states.index, "done"), **dict.fromkeys(trouble, "failed")}
    assert states.to_dict() == {**expected, **dict.fromkeys(failed.waiting, "waiting")}
    assert table(failed.out).arm.unique().tolist() == ["direct-choice"]
    same_table(table(reference.out), table(failed.out))


def test_a_kernel_that_dies_has_a_second_chance(failed):
    attempts = status(failed.out).set_index("job").attempts
    assert attempts[failed.died] == 2
    assert attempts[failed.raised] == 1
    assert attempts[failed.hung] == 1


def test_notebooks_that_failed_can_be_read(failed):
    states = status(failed.out).set_index("job")
    cells = {
        j: nbformat.read(failed.out / states.notebook[j], 4).cells for j in states.index[states.state == "failed"]
    }
    assert all(cells.values())
    number = states.cell[failed.raised]  # it stands beside the cell
    (broken,) = (c for c in cells[failed.raised] if c.get("execution_count") == number)
    errors = [o.ename for o in broken.outputs if o.output_type == "error"]
    assert errors == ["ZeroDivisionError"]


def test_the_report_says_what_failed(failed):
    assert "ZeroDivisionError" in (failed.out / "report.html").read_text()


def test_what_failed_is_done_by_a_cluster_that_was_there_already(
    reference, file, failed, tmp_path, monkeypatch, counted, dask_cluster, command
):
    "The cluster stays, and its kernel is stopped."
    out = failed.out
    for name, value in counted.env.items():
        monkeypatch.setenv(name, value)
    code, _, err = command("grid", file, "--out", out, "--scheduler-file", dask_cluster)
    assert code == 0, err
    assert "2 of 7 notebooks were done before, 5 are left" in err
    same_as(reference, out)
    assert failed.counted.steps + counted.steps == reference.counted.steps
    choice = job(out, "direct-choice")["stages"]
    assert not counted.steps.keys() & set(choice)
    with Client(scheduler_file=str(dask_cluster)) as client:
        (pid,) = client.run(os.getpid).values()
    assert not any("ipykernel_launcher" in p.cmdline() for p in psutil.Process(pid).children())
    assert sum(read(f).get("pid") == pid for f in (out / "jobs").glob("*.json")) == 5


def test_a_scheduler_that_is_not_there(file, tmp_path, command):
    code, _, err = command("grid", file, "--out", tmp_path / "grid", "--scheduler-file", tmp_path / "nobody.json")
    assert code == 2
    assert "nobody.json" in err
    assert not (tmp_path / "grid").exists()


def mounted(folder):
    "Whether a disk of 1.4 MB could be mounted at a folder."
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    mount = ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", folder]
    return subprocess.run(mount, capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    "A disk of its own with room for two models, and a function that changes its size."
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mounted(folder):
        pytest.skip("only root of a machine may mount a small disk")
    yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


# lines of progress (reading: 3/6) come when something takes two seconds
EXPECTED = re.compile(r"(failed: |seqtransfer: |\[|dashboard: |report|0 of 3 notebooks|[^:]+: \d+/\d+$)")


def test_a_full_disk_is_said_and_with_more_room_it_goes_on(reference, zoo, tmp_path, disk, counted):
    folder, resize = disk
    out, half = folder / "grid", grid_file(tmp_path, zoo, paths=GRID["paths"][:2], arms=["sequential"])
    full = seqtransfer("grid", half, "--out", out, timeout=900, **counted.env)
    polite(full.stdout, full.stderr)
    assert full.returncode != 0
    assert "No space left on device" in full.stderr, full.stderr
    assert [line for line in full.stderr.splitlines() if not EXPECTED.match(line)] == []
    nothing_is_half_written(out)
    assert not list(out.rglob(".part-*"))
    done = {name: counted.steps[name] for name in finished(out)}
    assert 0 < len(done) < 5
    resize("64m")
    more = seqtransfer("grid", half, "--out", out, timeout=900, **counted.env)
    assert more.returncode == 0, more.stderr
    same_as(reference, out, cost=np.nan)  # no arm of it asks the affinity
    assert {name: counted.steps[name] for name in done} == done


# ---------------------------------------------------------------- workers

TELL = """
import os
assert os.environ["CUDA_VISIBLE_DEVICES"] in ("3", "GPU-7")
raise KeyError(os.environ["CUDA_VISIBLE_DEVICES"])
"""


def seen_by_a_kernel():
    "What a kernel that is started here sees of GPUs."
    manager, client = start_new_kernel(kernel_name=_own_kernel())
    try:
        reply = client.execute_interactive(TELL, output_hook=lambda message: None)
        return reply["content"]["evalue"].strip("'")
    finally:
        manager.shutdown_kernel(now=True)


@pytest.fixture
def two_gpus(monkeypatch):
    "A client of workers on a machine with two GPUs."
    monkeypatch.setattr(clusters, "gpus", lambda: ["3", "GPU-7"])
    with clusters.local_cluster(1) as client:
        yield client


def test_more_workers_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(clusters, "gpus", lambda: ["3", "GPU-7"])
    with pytest.raises(InputError, match="2 GPUs"), clusters.local_cluster(1, 3):
        pass


def test_a_worker_and_its_kernels_see_one_gpu(two_gpus):
    said = two_gpus.run(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]))
    assert sorted(said.values()) == [("3", "1"), ("GPU-7", "1")]
    workers = two_gpus.scheduler_info()["workers"].values()
    assert all(w["resources"] == {"GPU": 1} for w in workers)
    assert all(w["nthreads"] == 1 for w in workers)
    see = seen_by_a_kernel
    see.__module__ = "__main__"  # sent whole: workers do not know this file
    assert two_gpus.run(see) == {worker: gpu for worker, (gpu, _) in said.items()}


def test_a_worker_holds_its_gpu_until_a_task_has_ended(two_gpus, tmp_path):
    log = tmp_path / "log"

    def hold(i):
        for what in "be":
            with open(log, "a") as f:
                f.write(f"{os.environ['CUDA_VISIBLE_DEVICES']} {what}\n")
            time.sleep(0.2)

    two_gpus.gather(two_gpus.map(hold, range(6), resources={"GPU": 1}, pure=False))
    by = defaultdict(str)
    for line in log.read_text().splitlines():
        gpu, what = line.split()
        by[gpu] += what
    assert by.keys() == {"3", "GPU-7"}
    assert all(re.fullmatch("(be)+", text) for text in by.values())  # the next begins when the one before has ended


def test_every_job_asks_for_a_gpu(two_gpus, reference, file):
    def wanted(dask_scheduler, keys):
        return [dask_scheduler.tasks[key].resource_restrictions for key in keys]

    jobs = submitted(two_gpus, plan_of(file, reference.out), reference.out, None)
    outcomes = two_gpus.gather(list(jobs.values()))
    assert {o["state"] for o in outcomes} == {"done"}
    assert not any(o["fresh"] for o in outcomes)
    keys = [f.key for f in jobs.values()]
    assert two_gpus.run_on_scheduler(wanted, keys=keys) == [{"GPU": 1}] * 7


SBATCH = """#!/bin/sh
cp "$1" "$(dirname "$0")/submitted"
setsid sh "$(dirname "$0")/submitted" > "$(dirname "$0")/log" 2>&1 &
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
echo "$1" >> "$(dirname "$0")/cancelled"
kill -- -"$1"
"""
ASKED = {
    "workers": 1,
    "memory": "2GB",
    "walltime": "1:00:00",
    "queue": "gpu",
    "account": "ours",
    "job_script_prologue": ["export FROM_THE_PROLOGUE=1"],
}


@pytest.fixture
def slurm(tmp_path):
    "A folder of programs that do as SLURM's, and a file that asks for a worker."
    stub, file = tmp_path / "bin", tmp_path / "slurm.yaml"
    stub.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (stub / name).write_text(text)
        (stub / name).chmod(0o755)
    file.write_text(yaml.safe_dump(ASKED))
    return stub, file


@pytest.fixture
def small(zoo, tmp_path):
    "A grid of two steps."
    return grid_file(tmp_path, zoo, arms=["scratch"], recipe={"source_steps": 0, "target_steps": 2})


def test_without_slurm_nothing_begins(small, slurm, tmp_path, command):
    code, _, err = command("grid", small, "--out", tmp_path / "grid", "--slurm", slurm[1])
    assert code == 2
    assert "sbatch" in err
    assert not (tmp_path / "grid").exists()


def test_slurm_jobs_do_a_grid(small, slurm, tmp_path, monkeypatch, counted, command):
    (stub, file), out = slurm, tmp_path / "grid"
    for name, value in {**counted.env, "PATH": f"{stub}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = command("grid", small, "--out", out, "--slurm", file)
    assert code == 0, err
    script = (stub / "submitted").read_text()
    for line in ("-J seqtransfer", "-p gpu", "-A ours", "-t 01:00:00", "--gres=gpu:1", "--mem=2G"):
        assert f"#SBATCH {line}\n" in script, script
    worker = f"{sys.executable} -m distributed.cli.dask_worker tcp://"
    for part in ("export FROM_THE_PROLOGUE=1\n", "--nthreads 1", "--resources GPU=1", worker):
        assert part in script, script
    assert status(out).state.eq("done").all()
    assert counted.steps.total() == 2
    assert (stub / "cancelled").exists()
    pid = read(next((out / "jobs").glob("*scratch*")))["pid"]
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, seconds=30)


def test_notebooks_in_a_kept_kernel_give_the_bits_of_kernels_of_their_own(reference, tmp_path, monkeypatch, counted):
    "The workers of the reference kept theirs: here what came late in one of them is done in a new one."
    trained = [reference.counted.trained_by(pid) for pid, _ in reference.counted.kernels]
    late = max(trained, key=len)
    of = next(j for j in reversed(read_plan(reference.out)["jobs"]) if late[-1] in j["stages"])
    assert of["template"] == "transfer_path"
    assert set(late) - set(of["stages"])
    for name, value in counted.env.items():
        monkeypatch.setenv(name, value)
    parameters = {**of["parameters"], "stages": str(tmp_path / "stages"), "out": str(tmp_path)}
    said, _ = execute("transfer_path", tmp_path / "own.ipynb", parameters, show=lambda line: None)
    kept = read_result(reference.out / of["notebook"])
    assert said["cases"] == kept["cases"]
    assert said["curve"] == kept["curve"]
    assert late[-1] in finished(tmp_path)
    same_models(reference.out, tmp_path)
