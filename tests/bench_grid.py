"""`make bench`: what notebooks and workers cost over the function they call, and what a kept kernel saves.

Small runs on small phantom volumes, where notebooks weigh most; one run on one machine, all on one thread each. Nothing
is asserted about time."""

from dataclasses import asdict, replace
from time import perf_counter

import pandas as pd
import pytest
import torch
from bench_affinity import keep, processor

from seqtransfer.clusters import cores, local_cluster
from seqtransfer.executors.dask import Dask
from seqtransfer.executors.here import here
from seqtransfer.executors.notebooks import measured, plan_jobs
from seqtransfer.jobs import do_job
from seqtransfer.notebooks import stop_kernels
from seqtransfer.questions import open_study
from seqtransfer.study import Recipe, Study
from seqtransfer.training import machine
from seqtransfer.transfer import run_study
from seqtransfer.zoo import write_zoo

SEEDS = tuple(range(6))
ROWS = []


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    "Six direct transfers that share nothing: one target, six seeds."
    zoo = write_zoo(tmp_path_factory.mktemp("grid") / "zoo", "nnunet", 32, 8)
    asked = {"arms": ("direct-first",), "seeds": SEEDS, "test": 4, "recipe": Recipe(100, 50)}
    target, path = "LesionC-FLAIR-WMH", ("LesionA-FLAIR-WMH",)
    return open_study(Study(zoo, (target,), (path,), **asked, wanted={"modalities": ["FLAIR"]}))


def note(way, seconds):
    ROWS.append({"way": way, "runs": len(SEEDS), "seconds": seconds, "seconds a run": seconds / len(SEEDS)})


def test_the_function_alone(opened, tmp_path):
    "Training and test in this process, without any notebook; imports and the first step left out."
    torch.set_num_threads(1)
    warm = replace(opened, questions=opened.questions[:1])
    here(warm, tmp_path / "warm")
    start = perf_counter()
    here(opened, tmp_path / "alone")
    note("function alone", perf_counter() - start)


@pytest.mark.parametrize("kept", [False, True])
def test_by_hand(opened, tmp_path, kept):
    "The task function, one notebook after the other."
    todo = plan_jobs(opened, tmp_path, machine(1), 1, measured(opened)).jobs
    start = perf_counter()
    for job in todo:
        ended = do_job({**asdict(job), "keep": kept}, tmp_path, show=lambda line: None)
        assert ended["state"] == "done"
    note(f"notebooks by hand, {'one kernel' if kept else 'a kernel each'}", perf_counter() - start)
    stop_kernels()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers(opened, tmp_path, workers):
    "Lock, plan, workers, table, report: from beginning to end, and from the first notebook to the last."
    if workers > cores():
        pytest.skip(f"{cores()} core")
    ends = []

    def show(event):
        if event["what"] in ("begin", "end"):
            ends.append(perf_counter())

    start = perf_counter()
    done = run_study(opened, tmp_path, Dask(local_cluster(1, workers), where=machine(1)), show)
    who = f"engine, {workers} worker{'s' if workers > 1 else ''}"
    note(f"{who}, all of it", perf_counter() - start)
    note(f"{who}, notebooks", ends[-1] - ends[0])
    assert done.failures == ()


def test_table():
    "Prints the table and keeps it for the page on benchmarks."
    table = pd.DataFrame(ROWS)
    alone = table.set_index("way")["seconds a run"].get("function alone")
    table["times the function"] = table["seconds a run"] / alone
    table["device"] = f"{processor()}, {cores()} cores"
    print(f"\n{table.round(2).to_string()}")
    keep(table.round(4), "bench_grid")
