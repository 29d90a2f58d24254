"""The grid of `grid.yaml` on this machine: `make grid` writes nbs/records/grid, which the page on benchmarks shows: the table, the plan, the seconds it took.

A run that was interrupted goes on; its seconds are then not those of the whole, which is said."""
import shutil
import sys
import time
from pathlib import Path

from seqtransfer.core import code_digest, digest, write_json
from seqtransfer.engine import cores, local_cluster, run_grid
from seqtransfer.grid import open_grid, plan_summary, read_grid
from seqtransfer.jobs import status
from seqtransfer.training import machine
from seqtransfer.zoo import write_zoo

HERE = Path(__file__).parent


def line(event):
    if event["what"] == "end": print(f"[{event['ended']}] {event['job'].id} {event['outcome']['state']}; {event['left']:.0f} s left", file=sys.stderr)


def main(out):
    workers = min(2, cores())
    out.mkdir(parents=True, exist_ok=True)
    zoo = write_zoo(out / f"zoo-{digest(code_digest('core', 'phantom', 'zoo'))}", "nnunet", 32, 12)
    file = Path(shutil.copy(HERE / "grid.yaml", out))
    file.write_text(file.read_text().replace("data: zoo", f"data: {zoo.name}"))
    start, begun = time.monotonic(), (out / "run" / "plan.json").exists()
    done = run_grid(open_grid(read_grid(file)), out / "run", local_cluster(1, workers), where=machine(1), show=line)
    seconds = time.monotonic() - start
    if len(done.failures): sys.exit(done.failures.to_string())
    shutil.rmtree(HERE / "grid", ignore_errors=True)
    (HERE / "grid").mkdir()
    shutil.copy(done.out / "table.parquet", HERE / "grid")
    jobs = status(done.out)
    write_json(HERE / "grid" / "run.json", {**plan_summary(done.plan, workers), "seconds": round(seconds), "in one go": not begun, "seconds in notebooks": round(jobs.seconds.sum()),
                                            "megabytes of stages": round(sum(f.stat().st_size for f in (done.out / "stages").rglob("*") if f.is_file()) / 1e6, 1),
                                            "megabytes": round(sum(f.stat().st_size for f in done.out.rglob("*") if f.is_file()) / 1e6, 1), "code": code_digest("training", "transfer", "grid", "jobs", "engine")})
    print((HERE / "grid" / "run.json").read_text())


if __name__ == "__main__": main(Path(sys.argv[1]).absolute())
