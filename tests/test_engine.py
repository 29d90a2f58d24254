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

from seqtransfer import cli, engine
from seqtransfer.core import InputError
from seqtransfer.datasets import read_pool
from seqtransfer.grid import open_grid, plan_grid, read_grid
from seqtransfer.folders import read_plan
from seqtransfer.jobs import at_work, job_done, status
from seqtransfer.notebooks import _own_kernel, execute, read_result
from seqtransfer.training import machine
from seqtransfer.study import Recipe
from seqtransfer.transfer import compare

TARGET, A, B, C = "TumourB-FLAIR-ED", "TumourA-FLAIR-ED", "LesionA-FLAIR-WMH", "LesionB-FLAIR-WMH"
GRID = {"targets": [TARGET], "among": [A, B, C], "paths": [[A, B], [A, C], [C, B]], "arms": ["scratch", "direct-choice", "sequential"], "shots": 2,
        "recipe": {"source_steps": 24, "target_steps": 8}}

# Imported by whatever kernel starts, through a start-up file of IPython. What it counts is written by the kernel itself, after each optimiser step; the product knows nothing of it.
COUNTING = '''
import json, os, signal, time
from pathlib import Path
from seqtransfer import training
here, at, train, step_function = Path(os.environ["IPYTHONDIR"]), [], training.train, training.step_function

def say(file, text):
    fd = os.open(here / file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (text + "\\n").encode())
    os.close(fd)

def counted_train(net, data, stage, plan, keep=None, log=None):
    at.append(Path(keep).parent.name)
    return train(net, data, stage, plan, keep, log)

def counted_step_function(*args):
    step, stage = step_function(*args), at[-1]
    def counted(x, y):
        trouble = json.loads((here / "trouble.json").read_text())
        if stage in trouble.get("raises", []): raise ZeroDivisionError("one by nought")
        if stage in trouble.get("dies", []): os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600 if stage in trouble.get("hangs", []) else trouble.get("slow", 0))
        loss = step(x, y)
        say("steps", f"{stage} {os.getpid()}")
        return loss
    return counted

training.train, training.step_function = counted_train, counted_step_function
say("kernels", f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}")
'''


class Counted:
    "A folder for IPython in which the kernels count optimiser steps, and are told to get into trouble."
    def __init__(self, folder):
        self.folder = folder
        (folder / "profile_default" / "startup").mkdir(parents=True)
        (folder / "counting.py").write_text(COUNTING)  # a module keeps its names when a kept kernel is emptied
        (folder / "profile_default" / "startup" / "00-count.py").write_text(f"import sys; sys.path.insert(0, {str(folder)!r}); import counting; del sys.path[0]")
        self.trouble()

    def trouble(self, **what):
        part = self.folder / "trouble.part"
        part.write_text(json.dumps(what))
        part.replace(self.folder / "trouble.json")

    def _lines(self, file): return (self.folder / file).read_text().splitlines() if (self.folder / file).exists() else []

    @property
    def steps(self): return Counter(name for name, _ in map(str.split, self._lines("steps")))

    def trained_by(self, pid): return list(dict.fromkeys(name for name, by in map(str.split, self._lines("steps")) if by == pid))

    @property
    def kernels(self): return [line.split(" ") for line in self._lines("kernels")]

    @property
    def env(self): return {"IPYTHONDIR": str(self.folder), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def counted(tmp_path): return Counted(tmp_path / "ipython")


def grid_file(folder, data, **other):
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({"data": str(data), **GRID, **other}))
    return file


@pytest.fixture(scope="module")
def file(zoo, tmp_path_factory): return grid_file(tmp_path_factory.mktemp("file"), zoo)


@pytest.fixture(scope="module")
def reference(file, tmp_path_factory):
    "The grid, finished undisturbed: its folder, what it said, the optimiser steps that were counted."
    here = tmp_path_factory.mktemp("reference")
    counted = Counted(here / "ipython")
    done = seqtransfer("grid", file, "--out", here / "grid", **counted.env)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=here / "grid", done=done, counted=counted)


@pytest.fixture
def command(monkeypatch, capsys):
    "Calls the command line in this process; returns exit code and what it said on standard output and standard error."
    def call(*args):
        monkeypatch.setattr("sys.argv", ["seqtransfer", *map(str, args)])
        with pytest.raises(SystemExit) as end: cli.main()
        return end.value.code or 0, *capsys.readouterr()
    return call


def start(*args, **env):
    return subprocess.Popen([*COMMAND, *map(str, args)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "COLUMNS": "200", **env})


def until(true, alive=None, seconds=240):
    "Waits for something; that a process ends before is an error."
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline and (alive is None or alive.poll() is None), alive and alive.communicate()
        time.sleep(0.05)


def table(out): return pd.read_parquet(out / "table.parquet")


def finished(out): return {f.parent.name for f in out.glob("stages/*/stage.json")}


def job(out, part): return next(j for j in read_plan(out)["jobs"] if part in j["id"])


def files(out): return {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name not in ("lock", "lock.json", "plan.json")}


def nothing_is_half_written(out):
    for f in out.rglob("[!.]*.json"): json.loads(f.read_text())
    for f in out.rglob("[!.]*.ipynb"): nbformat.validate(nbformat.read(f, 4))


def same_as(reference, out):
    "A grid, the same or a part of it, is finished, with the same table and the same models, byte for byte."
    found = table(out)
    expected = table(reference.out).merge(found[["arm", "path"]].drop_duplicates()).reindex(columns=found.columns)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    plan = read_plan(out)
    assert found.groupby(["arm", "path"]).ngroups == sum(j["template"] == "transfer_path" for j in plan["jobs"]) and status(out).state.eq("done").all()
    assert finished(out) == {s for j in plan["jobs"] for s in j["stages"]} and not list(out.rglob("unfinished.safetensors")) and not list(out.rglob("*.failed.ipynb"))
    for name in finished(out): assert (out / "stages" / name / "model.safetensors").read_bytes() == (reference.out / "stages" / name / "model.safetensors").read_bytes()
    nothing_is_half_written(out)


def polite(*said):
    "What users are told is no traceback."
    for text in said: assert "Traceback" not in text and 'File "' not in text, text


# ---------------------------------------------------------------- undisturbed

def test_each_stage_is_trained_once_and_every_step_is_counted(reference):
    polite(reference.done.stdout, reference.done.stderr)
    plan = read_plan(reference.out)
    steps = {f.parent.name: json.loads(f.read_text())["steps"] for f in reference.out.glob("stages/*/stage.json")}
    assert reference.counted.steps == steps and sum(steps.values()) == sum(j["steps"] for j in plan["jobs"]) == plan["named_steps"] - 12  # A -> ... begins two paths
    assert job(reference.out, "stages/")["steps"] == 12 and len(job(reference.out, "stages/")["stages"]) == 1
    t = table(reference.out)
    assert len(t) == 5 * 3 and t.dice.between(0, 1).all() and t.groupby("arm").path.nunique().to_dict() == {"scratch": 1, "direct-choice": 1, "sequential": 3}
    assert "7 notebooks were executed now" in reference.done.stdout and (reference.out / "report.html").exists()
    nothing_is_half_written(reference.out)
    assert not list(reference.out.rglob(".part-*"))
    assert len({pid for pid, _ in reference.counted.kernels}) == 3  # two workers keep one each, and the report has its own


def test_the_table_says_what_compare_finds(reference, zoo, tmp_path):
    pool, threads, choice = read_pool(zoo), torch.get_num_threads(), json.loads((reference.out / "targets" / TARGET / "affinity-seed0" / "path.json").read_text())["choice"]
    torch.set_num_threads(1)
    try: found = compare(pool, TARGET, (A, C), choice, ("scratch", "direct-choice", "sequential"), shots=2, recipe=Recipe(24, 8), out=tmp_path)
    finally: torch.set_num_threads(threads)
    t = table(reference.out)
    for arm, cases in found.cases.groupby("arm"):
        path = found.arms.set_index("arm").path[arm]
        of = t[(t.arm == arm) & (t.path == path)].set_index("patient")
        for score in ("dice", "hd95", "surface_dice"): pd.testing.assert_series_equal(of[score].sort_index(), cases.set_index("patient")[score].sort_index(), check_exact=True)


def test_a_finished_grid_executes_nothing(reference, file, command):
    before, kernels = files(reference.out), len(reference.counted.kernels)
    code, out, err = command("grid", file, "--out", reference.out)
    assert code == 0 and "0 notebooks were executed now" in out and "dashboard" not in err and files(reference.out) == before and len(reference.counted.kernels) == kernels


def test_another_recipe_is_refused_in_the_same_folder(reference, zoo, tmp_path, command):
    before = files(reference.out)
    code, _, err = command("grid", grid_file(tmp_path, zoo, recipe={"source_steps": 25, "target_steps": 8}), "--out", reference.out)
    said = [line for line in err.splitlines() if line.startswith("seqtransfer:")]
    assert code == 2 and len(said) == 1 and "source_steps" in said[0] and str(reference.out) in said[0] and files(reference.out) == before
    polite(err)


def test_reports_of_the_grid_and_of_one_of_its_targets(reference, command):
    folder, page, expected = reference.out / "targets" / TARGET, reference.out / "report.html", table(reference.out)
    for gone in (page, reference.out / "table.parquet", reference.out / "table.csv"): gone.unlink()
    code, out, err = command("report", reference.out, "--json")
    assert code == 0 and page.exists() and table(reference.out).equals(expected)
    means = expected.groupby("arm").dice.mean()
    assert {r["arm"]: r["dice"] for r in json.loads(out)} == pytest.approx(means.to_dict())
    code, out, err = command("report", folder)
    assert code == 0 and (folder / "report.html").exists() and all(arm in out for arm in ("scratch", "direct-choice", "sequential via"))
    assert len(pd.read_csv(folder / "dice.csv")) == 5 and len(pd.read_csv(folder / "cases.csv")) == 15
    code, _, err = command("report", reference.out, "--anonymise")
    assert code == 2 and "targets" in err


def test_the_status_of_a_finished_grid(reference, command):
    code, out, _ = command("status", reference.out, "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) == 7 and {r["state"] for r in rows} == {"done"} and all(r["attempts"] == 1 and r["seconds"] > 0 and (reference.out / r["notebook"]).exists() for r in rows)
    code, out, _ = command("status", reference.out)
    assert "Nobody is at work on it; 7 of 7 notebooks are done." in out


def test_a_failure_without_a_notebook_is_told(reference, tmp_path, command):
    out = shutil.copytree(reference.out, tmp_path / "grid")
    file = next((out / "jobs").glob("*scratch*"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"state": "failed", "error": "its worker died each time"}))
    code, told, err = command("status", out)
    assert code == 0 and "scratch-seed0: its worker died each time\n" in told and "Traceback" not in err, told + err


def test_a_changed_source_repeats_what_read_it_and_nothing_else(reference, file, zoo):
    grid = read_grid(file)
    image = read_pool(zoo)[C].cases[0].image
    kept, about = image.read_bytes(), image.stat()
    try:
        scan = nib.load(image)
        nib.Nifti1Image(np.asarray(scan.dataobj) * 1.5 + 1, scan.affine).to_filename(image)
        changed = plan_grid(open_grid(grid), reference.out, machine(1), keep=False)
    finally:
        image.write_bytes(kept)
        os.utime(image, ns=(about.st_atime_ns, about.st_mtime_ns))
    same = plan_grid(open_grid(grid), reference.out, machine(1), keep=False)
    assert all(job_done(reference.out, j) for j in same.jobs)
    # what is not done is what the engine executes
    left = {j.id for j in changed.jobs if not job_done(reference.out, j)}
    assert left == {j.id for j in changed.jobs if j.template == "affinity" or C in j.parameters["sources"] and j.template == "transfer_path"} and len(left) == 3
    before, after = ({s for j in p.jobs for s in j.stages} for p in (same, changed))
    assert len(after - before) == 5  # C in the middle and what follows it, C at the beginning and what follows it


# ---------------------------------------------------------------- killed

def running(client, what):
    "Processes below a client: its kernels, or its workers."
    below = [(p, " ".join(p.cmdline())) for p in psutil.Process(client.pid).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    if what == "kernel": return [p for p, line in below if "ipykernel_launcher" in line]
    kept = {p.ppid() for p, line in below if "ipykernel_launcher" in line}
    return [p for p, line in below if "spawn_main" in line and (p.pid in kept)]


def shoot(client, what, chance):
    "kill -9 of one of them, as soon as there is one."
    def victims():
        try: return running(client, what)
        except psutil.NoSuchProcess: return []
    until(victims, client)
    chance.choice(victims()).kill()


class Watch:
    "Looks at a grid while it runs: which states its jobs were in, how many steps each stage had when it was first seen finished."
    def __init__(self, out, counted): self.out, self.counted, self.states, self.finished = out, counted, set(), {}

    def __call__(self):
        for name in finished(self.out) - self.finished.keys(): self.finished[name] = self.counted.steps[name]
        if (self.out / "plan.json").exists() and at_work(self.out): self.states |= set(status(self.out).state)
        return self.counted.steps.total()


@pytest.fixture(scope="module", params=[3])
def survivor(request, file, tmp_path_factory):
    "A grid of which a kernel, a worker and at last the client are killed at random; then a kernel and a worker of the same command again."
    here, chance = tmp_path_factory.mktemp("survivor"), random.Random(request.param)
    counted, out = Counted(here / "ipython"), here / "grid"
    watch, args = Watch(out, counted), ("grid", file, "--out", out)
    env = {**counted.env, "SEQTRANSFER_KEEP_EVERY": "0"}  # the state of a stage is written down after each step
    counted.trouble(slow=0.1)
    first, shots = start(*args, **env), chance.sample(["kernel", "worker"], 2)
    until(lambda: (out / "lock.json").exists() and at_work(out), first)
    second = seqtransfer(*args, **env)
    for what, low in zip(shots, (5, 25)):
        moment = chance.randrange(low, low + 15)
        until(lambda: watch() >= moment, first)
        shoot(first, what, chance)
    moment = chance.randrange(50, 65)
    until(lambda: watch() >= moment, first)
    told = seqtransfer("status", out, "--json")
    family = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    _, left = psutil.wait_procs(family, timeout=20)
    watch()
    dead = SimpleNamespace(left=left, busy=at_work(out), states=set(status(out).state), finished=dict(watch.finished), said=first.communicate())
    third = start(*args, **env)
    for what, low in zip(chance.sample(["kernel", "worker"], 2), (75, 95)):
        moment = chance.randrange(low, low + 15)
        until(lambda: watch() >= moment, third)
        shoot(third, what, chance)
    stdout, stderr = third.communicate(timeout=240)
    return SimpleNamespace(out=out, counted=counted, watch=watch, first=first, second=second, told=told, dead=dead, args=args, env=env, third=SimpleNamespace(returncode=third.returncode, stdout=stdout, stderr=stderr))


def test_whatever_is_killed_it_ends_with_the_same_table(reference, survivor):
    polite(*survivor.dead.said, survivor.third.stdout, survivor.third.stderr)
    assert survivor.third.returncode == 0, survivor.third.stderr
    same_as(reference, survivor.out)


def test_no_step_of_a_finished_stage_is_made_again(reference, survivor):
    steps, seen = survivor.counted.steps, survivor.watch.finished
    assert len(survivor.dead.finished) >= 2 and all(steps[name] == n for name, n in seen.items())
    # of an unfinished stage at most the step is lost that was being made when it was killed; five were killed
    lost = {name: steps[name] - n for name, n in reference.counted.steps.items()}
    assert steps.keys() == reference.counted.steps.keys() and all(-5 <= n <= 5 for n in lost.values()) and sum(map(abs, lost.values())) <= 6, lost


def test_nothing_outlives_a_client_that_is_killed(survivor):
    assert survivor.first.returncode == -signal.SIGKILL and not survivor.dead.left and not survivor.dead.busy and "interrupted" in survivor.dead.states and "running" not in survivor.dead.states


def test_a_second_client_is_refused_while_the_first_is_at_work(survivor):
    assert survivor.second.returncode == 2 and f"process {survivor.first.pid} on " in survivor.second.stderr and survivor.second.stderr.splitlines()[-1].startswith("seqtransfer: ")
    polite(survivor.second.stderr)


def test_the_status_tells_of_work_while_it_is_done(survivor):
    assert {"left", "running", "done"} <= survivor.watch.states and "interrupted" not in survivor.watch.states
    rows = json.loads(survivor.told.stdout)
    assert survivor.told.returncode == 0 and {r["state"] for r in rows} <= {"left", "running", "done"} and all(r["host"] and r["since"] and r["attempts"] for r in rows if r["state"] == "running")


# ---------------------------------------------------------------- failures

@pytest.fixture
def dask_cluster(tmp_path, counted):
    "A Dask cluster of one worker that somebody else started; yields the file of its scheduler."
    file, begun = tmp_path / "scheduler.json", []
    def begin(module, *args):
        begun.append(subprocess.Popen([sys.executable, "-m", f"distributed.cli.{module}", "--scheduler-file", str(file), "--no-dashboard", *args], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                      env={**os.environ, **counted.env}))
    begin("dask_scheduler", "--host", "127.0.0.1", "--port", "0")
    begin("dask_worker", "--nthreads", "1")
    yield file
    for p in reversed(begun):
        p.terminate()
        p.wait(30)


def test_failures_are_listed_and_the_rest_is_done(reference, file, tmp_path, monkeypatch, counted, dask_cluster, command):
    out, of = tmp_path / "grid", lambda part: job(reference.out, part)["stages"]
    counted.trouble(raises=of("stages/"), hangs=of("/scratch"), dies=of(f"via.{C}.{B}")[1:2])
    failed = seqtransfer("grid", file, "--out", out, "--limit", "0.5", **counted.env)
    polite(failed.stdout, failed.stderr)
    assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith("seqtransfer: 5 of 7 notebooks were not done")
    states = status(out).set_index("job")
    shared, scratch, killed = (next(i for i in states.index if part in i) for part in ("stages/", "/scratch", f"via.{C}.{B}"))
    waiting = [i for i in states.index if f"via.{A}" in i]
    assert states.state.to_dict() == {i: "failed" if i in (shared, scratch, killed) else "waiting" if i in waiting else "done" for i in states.index}
    told = {line.split(": ")[1]: line for line in failed.stderr.splitlines() if line.startswith("failed: ")}
    assert told.keys() == {shared, scratch, killed} and "ZeroDivisionError: one by nought" in told[shared] and "took longer than the 30 seconds" in told[scratch] and "died" in told[killed]
    assert states.attempts[killed] == 2 and states.attempts[shared] == states.attempts[scratch] == 1  # a kernel that dies has a second chance
    for i in (shared, scratch, killed): assert nbformat.read(out / states.notebook[i], 4).cells
    broken, = (c for c in nbformat.read(out / states.notebook[shared], 4).cells if c.get("execution_count") == states.cell[shared])  # the number that stands beside it
    assert any(o.output_type == "error" and o.ename == "ZeroDivisionError" for o in broken.outputs)
    assert table(out).arm.unique().tolist() == ["direct-choice"] and table(out).equals(table(reference.out).query("arm == 'direct-choice'").reset_index(drop=True)) and "ZeroDivisionError" in (out / "report.html").read_text()
    before = counted.steps
    counted.trouble()
    for name, value in counted.env.items(): monkeypatch.setenv(name, value)
    # what is left is done by a cluster that was there already, and stays
    code, said, err = command("grid", file, "--out", out, "--scheduler-file", dask_cluster)
    polite(said, err)
    assert code == 0 and "2 of 7 notebooks were done before, 5 are left" in err, err
    same_as(reference, out)
    assert counted.steps == reference.counted.steps and all(before[name] == counted.steps[name] for name in of("direct-choice"))
    with Client(scheduler_file=str(dask_cluster)) as client:
        pid, = client.run(os.getpid).values()
    assert not any("ipykernel_launcher" in p.cmdline() for p in psutil.Process(pid).children())  # its kernel was stopped
    assert sum(json.loads(f.read_text()).get("pid") == pid for f in (out / "jobs").glob("*.json")) == 5


def test_a_scheduler_that_is_not_there(file, tmp_path, command):
    code, _, err = command("grid", file, "--out", tmp_path / "grid", "--scheduler-file", tmp_path / "nobody.json")
    assert code == 2 and "nobody.json" in err and not (tmp_path / "grid" / "jobs").exists()
    polite(err)


@pytest.fixture
def disk(tmp_path):
    "A disk of its own with room for two models, and a function that changes its size."
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = sys.platform == "linux" and os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", folder], capture_output=True).returncode == 0
    if not mounted: pytest.skip("only root of a machine may mount a small disk")
    yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_said_and_with_more_room_it_goes_on(reference, zoo, tmp_path, disk, counted):
    (folder, resize), out = disk, disk[0] / "grid"
    half = grid_file(tmp_path, zoo, paths=GRID["paths"][:2], arms=["sequential"])
    full = seqtransfer("grid", half, "--out", out, **counted.env)
    polite(full.stdout, full.stderr)
    assert full.returncode != 0 and "No space left on device" in full.stderr, full.stderr
    # nothing but what failed and how far it is; lines of progress (reading: 3/6) come when something takes two seconds
    assert all(re.match(r"failed: |seqtransfer: |\[|dashboard: |report|0 of 4 notebooks|[^:]+: \d+/\d+$", line) for line in full.stderr.splitlines()), full.stderr
    nothing_is_half_written(out)
    assert not list(out.rglob(".part-*"))
    done = {name: counted.steps[name] for name in finished(out)}
    assert 0 < len(done) < 5
    resize("64m")
    more = seqtransfer("grid", half, "--out", out, **counted.env)
    assert more.returncode == 0, more.stderr
    same_as(reference, out)
    assert all(counted.steps[name] == n for name, n in done.items())


# ---------------------------------------------------------------- workers

def test_a_worker_holds_one_gpu(reference, file, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "gpus", lambda: ["3", "GPU-7"])
    with pytest.raises(InputError, match="2 GPUs"), engine.local_cluster(1, 3): pass
    log, plan = tmp_path / "log", plan_grid(open_grid(read_grid(file)), reference.out, machine(1), keep=False)

    def hold(i):
        for what in "be":
            with open(log, "a") as f: f.write(f"{os.environ['CUDA_VISIBLE_DEVICES']} {what}\n")
            time.sleep(0.2)

    def seen_by_a_kernel():
        manager, client = start_new_kernel(kernel_name=_own_kernel())
        try: return client.execute_interactive("import os; assert os.environ['CUDA_VISIBLE_DEVICES'] in ('3', 'GPU-7'); raise KeyError(os.environ['CUDA_VISIBLE_DEVICES'])", output_hook=lambda m: None)["content"]["evalue"]
        finally: manager.shutdown_kernel(now=True)

    with engine.local_cluster(1) as client:
        said = client.run(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]))
        assert sorted(said.values()) == [("3", "1"), ("GPU-7", "1")]
        assert all(w["resources"] == {"GPU": 1} and w["nthreads"] == 1 for w in client.scheduler_info()["workers"].values())
        assert {w: v.strip("'") for w, v in client.run(seen_by_a_kernel).items()} == {w: gpu for w, (gpu, _) in said.items()}
        client.gather(client.map(hold, range(6), resources={"GPU": 1}, pure=False))
        jobs = engine._submitted(client, plan.jobs, reference.out, None)
        assert all(o["state"] == "done" and not o["fresh"] for o in client.gather(list(jobs.values())))
        wanted = client.run_on_scheduler(lambda dask_scheduler, keys: [dask_scheduler.tasks[k].resource_restrictions for k in keys], keys=[f.key for f in jobs.values()])
        assert all(w == {"GPU": 1} for w in wanted)
    by = defaultdict(str)
    for line in log.read_text().splitlines(): by[line.split()[0]] += line.split()[1]
    assert by.keys() == {"3", "GPU-7"} and all(set(text[i:i + 2] for i in range(0, len(text), 2)) == {"be"} for text in by.values())  # the next begins when the one before has ended


SBATCH = '''#!/bin/sh
cp "$1" "$(dirname "$0")/submitted"
setsid sh "$(dirname "$0")/submitted" > "$(dirname "$0")/log" 2>&1 &
echo "Submitted batch job $!"
'''
SCANCEL = '''#!/bin/sh
echo "$1" >> "$(dirname "$0")/cancelled"
kill -- -"$1"
'''


def test_slurm_jobs_do_a_grid(zoo, tmp_path, monkeypatch, counted, command):
    stub = tmp_path / "bin"
    stub.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (stub / name).write_text(text)
        (stub / name).chmod(0o755)
    slurm = tmp_path / "slurm.yaml"
    slurm.write_text(yaml.safe_dump({"workers": 1, "memory": "2GB", "walltime": "1:00:00", "queue": "gpu", "account": "ours", "job_script_prologue": ["export FROM_THE_PROLOGUE=1"]}))
    small, out = grid_file(tmp_path, zoo, arms=["scratch"], recipe={"source_steps": 0, "target_steps": 2}), tmp_path / "grid"
    code, _, err = command("grid", small, "--out", out, "--slurm", slurm)
    assert code == 2 and "sbatch" in err
    polite(err)
    for name, value in {**counted.env, "PATH": f"{stub}:{os.environ['PATH']}"}.items(): monkeypatch.setenv(name, value)
    code, _, err = command("grid", small, "--out", out, "--slurm", slurm)
    polite(err)
    assert code == 0, err
    script = (stub / "submitted").read_text()
    for line in ("-J seqtransfer", "-p gpu", "-A ours", "-t 01:00:00", "--gres=gpu:1", "--mem=2G"): assert f"#SBATCH {line}\n" in script, script
    assert "export FROM_THE_PROLOGUE=1\n" in script and "--nthreads 1" in script and "--resources GPU=1" in script and f"{sys.executable} -m distributed.cli.dask_worker tcp://" in script
    assert status(out).state.eq("done").all() and counted.steps.total() == 2
    assert (stub / "cancelled").exists()
    worker = json.loads(next((out / "jobs").glob("*scratch*")).read_text())["pid"]
    until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE, seconds=30)


def test_notebooks_in_a_kept_kernel_give_the_bits_of_kernels_of_their_own(reference, tmp_path, monkeypatch, counted):
    "The workers of the reference kept theirs: here what came late in one of them is done in a new one."
    late = max((reference.counted.trained_by(pid) for pid, _ in reference.counted.kernels), key=len)
    of = next(j for j in reversed(read_plan(reference.out)["jobs"]) if late[-1] in j["stages"])
    assert set(late) - set(of["stages"]) and of["template"] == "transfer_path"
    for name, value in counted.env.items(): monkeypatch.setenv(name, value)
    said, _ = execute("transfer_path", tmp_path / "own.ipynb", {**of["parameters"], "stages": str(tmp_path / "stages"), "out": str(tmp_path)}, show=lambda line: None)
    kept = read_result(reference.out / of["notebook"])
    assert said["cases"] == kept["cases"] and said["curve"] == kept["curve"] and late[-1] in finished(tmp_path)
    for name in finished(tmp_path): assert (tmp_path / "stages" / name / "model.safetensors").read_bytes() == (reference.out / "stages" / name / "model.safetensors").read_bytes()
