"""Carries out one of the studies beside this file and keeps what the pages show of it.

`make compare`, `make grid` and `make transfer` call it. A study that was interrupted goes on. Its seconds are then
not those of the whole, and the record says so."""

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from seqtransfer.clusters import cores, local_cluster
from seqtransfer.core import code_digest, digest, write_json
from seqtransfer.executors.dask import Dask
from seqtransfer.executors.notebooks import JobPlan, measured, plan_jobs, plan_summary
from seqtransfer.jobs import status
from seqtransfer.questions import open_study
from seqtransfer.results import results_table
from seqtransfer.study import read_study
from seqtransfer.training import machine
from seqtransfer.transfer import Run, run_study
from seqtransfer.zoo import write_zoo

RECORDS = Path(__file__).parent
ZOOS = {
    "compare": {"like": "nnunet", "size": 48, "cases": 16},
    "grid": {"like": "nnunet", "size": 32, "cases": 12},
    "transfer": {"like": "all", "size": 48, "cases": 24},
}


class Made(NamedTuple):
    "A study that was carried out."

    done: Run  # its folder and its results
    todo: JobPlan  # what was planned
    seconds: float  # wall clock
    in_one_go: bool  # whether it was begun now


def show(event: dict) -> None:
    "A line for each notebook that ends, on standard error."
    if event["what"] == "end":
        left = "?" if event["left"] is None else f"{event['left']:.0f}"
        ended = f"[{event['ended']}] {event['job'].id} {event['outcome']['state']}"
        print(f"{ended}; {left} s left", file=sys.stderr)


def size(files) -> float:
    "Megabytes."
    return round(sum(f.stat().st_size for f in files if f.is_file()) / 1e6, 1)


def emptied(name: str) -> Path:
    "The record's folder, without what an earlier run left."
    folder = RECORDS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def keep_compare(made: Made) -> None:
    "All that `read_results` reads."
    done = made.done
    record = emptied("compare")
    for part in ("arms", "overlays"):
        shutil.copytree(done.out / part, record / part)
    for slices in record.glob("overlays/direct-each*"):
        slices.unlink()
    for file in done.out.glob("protocol-seed*.json"):
        shutil.copy(file, record)
    code = {"code of training and testing": code_digest("training", "executors.here")}
    runs = {"seconds": round(made.seconds), "in one go": made.in_one_go, "runs": len(made.todo.plan.runs)}
    write_json(record / "run.json", {**runs, **code})


def keep_grid(made: Made) -> None:
    "The table, and the plan in numbers."
    done = made.done
    record = emptied("grid")
    shutil.copy(done.out / "table.parquet", record)
    took = {"seconds": round(made.seconds), "in one go": made.in_one_go}
    worked = {"seconds in notebooks": round(status(done.out).seconds.sum())}
    room = {"megabytes of stages": size(done.out.glob("stages/**/*")), "megabytes": size(done.out.rglob("*"))}
    code = {"code": code_digest("training", "executors.here", "executors.notebooks", "executors.dask", "jobs")}
    write_json(record / "run.json", {**plan_summary(made.todo, min(2, cores())), **took, **worked, **room, **code})


def keep_transfer(made: Made) -> None:
    "The mean Dice of each run, by its source."
    table = results_table(made.done.out)
    source = table.path.str.split(" -> ").str[0].where(table.arm == "sequential", "scratch")
    means = table.assign(source=source).groupby(["target", "source", "seed"], sort=False).dice.mean()
    means.round(4).reset_index().to_csv(RECORDS / "transfer.csv", index=False)
    code = {"code of phantom, zoo and training": code_digest("phantom", "zoo", "training")}
    write_json(RECORDS / "transfer.json", code)


KEEP = {"compare": keep_compare, "grid": keep_grid, "transfer": keep_transfer}


def main(name: str, out: Path) -> None:
    "Carries a study out with a worker for each of two cores."
    out.mkdir(parents=True, exist_ok=True)
    zoo = write_zoo(out / f"zoo-{digest(code_digest('core', 'phantom', 'zoo'))}", **ZOOS[name])
    start, begun = time.monotonic(), (out / "run" / "plan.json").exists()
    opened = open_study(replace(read_study(RECORDS / f"{name}.yaml"), data=zoo))
    times = measured(opened)
    todo = plan_jobs(opened, out / "run", machine(1), 1, times)
    cluster = local_cluster(1, min(2, cores()))
    done = run_study(opened, out / "run", Dask(cluster, 1, machine(1), times=times), show)
    if done.failures:
        sys.exit(done.failed().to_string())
    KEEP[name](Made(done, todo, time.monotonic() - start, not begun))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).absolute())
