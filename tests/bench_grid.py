"""`make bench`: what the engine costs beside calling the task function, what a kept kernel saves, what a second worker brings.

Small runs on small phantom volumes, where the engine weighs most; one run on one machine, all on one thread each. Nothing is asserted."""
from dataclasses import asdict
from time import perf_counter

import pandas as pd
import pytest
import torch
from bench_affinity import keep, processor

from seqtransfer.datasets import read_pool
from seqtransfer.engine import cores, local_cluster, run_grid
from seqtransfer.grid import Grid, open_grid, plan_grid
from seqtransfer.jobs import do_job
from seqtransfer.notebooks import stop_kernels
from seqtransfer.protocol import protocol
from seqtransfer.training import machine
from seqtransfer.study import Recipe
from seqtransfer.transfer import recipe_plan, run_arm
from seqtransfer.zoo import write_zoo

RECIPE, SEEDS, ROWS = Recipe(source_steps=100, target_steps=50), tuple(range(6)), []


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    "Six direct transfers that share nothing: one target, six seeds."
    zoo = write_zoo(tmp_path_factory.mktemp("grid") / "zoo", "nnunet", 32, 8)
    return Grid(zoo, ("LesionC-FLAIR-WMH",), (("LesionA-FLAIR-WMH",),), 1, arms=("direct-first",), seeds=SEEDS, test=4, recipe=RECIPE, wanted={"modalities": ["FLAIR"]})


@pytest.fixture(scope="module")
def opened(grid):
    return open_grid(grid)


def jobs_of(opened, out):
    return [asdict(j) for j in plan_grid(opened, out).jobs if j.template == "transfer_path"]


def note(way, seconds):
    ROWS.append({"way": way, "runs": len(SEEDS), "seconds": seconds, "seconds a run": seconds / len(SEEDS)})


def test_the_function_alone(grid, tmp_path):
    "Protocol, training and test in this process, without any notebook; imports and the first step left out."
    torch.set_num_threads(1)
    def one(seed):
        split = protocol(read_pool(grid.data, **grid.wanted), grid.targets[0], grid.shots, seed, grid.test)
        run_arm("direct-first", grid.paths[0], split, recipe_plan(split, RECIPE), RECIPE, tmp_path / "alone")
    one(99)
    start = perf_counter()
    for seed in SEEDS: one(seed)
    note("function alone", perf_counter() - start)


@pytest.mark.parametrize("keep", [False, True])
def test_by_hand(opened, tmp_path, keep):
    "The task function, one notebook after the other."
    todo = [{**j, "keep": keep} for j in jobs_of(opened, tmp_path)]
    start = perf_counter()
    for job in todo: assert do_job(job, tmp_path, show=lambda line: None)["state"] == "done"
    note(f"notebooks by hand, {'one kernel' if keep else 'a kernel each'}", perf_counter() - start)
    stop_kernels()


@pytest.mark.parametrize("workers", [1, 2])
def test_engine(opened, tmp_path, workers):
    "The whole command: lock, plan, workers, table, report; from its beginning to its end, and from the first notebook to the last."
    if workers > cores(): pytest.skip(f"{cores()} core")
    ends = []
    for job in plan_grid(opened, tmp_path).jobs:  # the notebooks of the affinity are no part of the runs
        if job.template == "affinity": do_job(asdict(job), tmp_path, show=lambda line: None)
    stop_kernels()
    start = perf_counter()
    done = run_grid(opened, tmp_path, local_cluster(1, workers), where=machine(1), show=lambda e: ends.append(perf_counter()) if e["what"] in ("begin", "end") else None)
    note(f"engine, {workers} worker{'s' * (workers > 1)}, all of it", perf_counter() - start)
    note(f"engine, {workers} worker{'s' * (workers > 1)}, notebooks", ends[-1] - ends[0])
    assert not len(done.failures)


def test_table():
    "Prints the table and keeps it for the page on benchmarks."
    table = pd.DataFrame(ROWS)
    alone = table.set_index("way")["seconds a run"].get("function alone")
    table["times the function"] = table["seconds a run"] / alone
    table["device"] = f"{processor()}, {cores()} cores"
    print(f"\n{table.round(2).to_string()}")
    keep(table.round(4), "bench_grid")
