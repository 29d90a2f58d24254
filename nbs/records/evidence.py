"""Carries out the studies of `evidence.yaml`, one cell (a target and a seed) after the other, and keeps tidy tables.

`make evidence` calls it: evidence.py DATA OUT [CELL ...], where DATA holds `realdata` and `realpool`. A run that was
interrupted goes on: what is finished is found again, in OUT or in the tables beside this file. With cells, e.g.
`real.IBSR-T1-CSF.0`, it does these alone."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import yaml
from joblib import Parallel, delayed
from recipes import carried_out, linked_pool

from seqtransfer.clusters import cores
from seqtransfer.core import InputError, code_digest, digest, read_json, replacing, write_json
from seqtransfer.datasets import read_pool
from seqtransfer.evaluation import evaluate
from seqtransfer.features import score_pool
from seqtransfer.folders import result_file
from seqtransfer.networks import load_network
from seqtransfer.plans import ArmRun, Plan
from seqtransfer.results import results_table
from seqtransfer.study import Study
from seqtransfer.tasks import TaskPool
from seqtransfer.training import mean_dice, prepare_task
from seqtransfer.zoo import write_zoo

RECORDS = Path(__file__).parent
SCORES = ("leep", "logme")  # of source models
TABLES = ("runs", "held-out", "distances")


@dataclass(frozen=True)
class Cell:
    "One target under one seed."

    pool: str  # real or zoo
    target: str  # name of the task
    seed: int  # of split and training

    def __str__(self) -> str:
        return f"{self.pool}.{self.target}.{self.seed}"


def read_asked() -> dict:
    "What `evidence.yaml` says."
    return yaml.safe_load((RECORDS / "evidence.yaml").read_text())


def cells_of(asked: dict) -> list[Cell]:
    "All cells, the first seed of every target before the second."
    seeds, pools = asked["seeds"], asked["pools"].items()
    return [Cell(name, target, seed) for seed in seeds for name, pool in pools for target in pool["targets"]]


def open_pool(name: str, data: Path, out: Path) -> TaskPool:
    "The tasks of a pool; phantoms are drawn when they are not there."
    if name == "real":
        return linked_pool(data, out)
    drawn = out / f"zoo-{digest(code_digest('core', 'phantom', 'zoo'))}"
    return read_pool(write_zoo(drawn, like="fets2022", size=48, cases="paper/10"))


def cell_study(cell: Cell, pool: TaskPool, asked: dict, options: dict) -> Study:
    "One of the studies on one cell."
    among = tuple(asked["pools"][cell.pool]["among"])
    options = {**options, "arms": tuple(options["arms"])}
    given = {"among": among, "seeds": (cell.seed,), "shots": asked["shots"], "test": asked["test"]}
    return Study(pool, (cell.target,), **given, **options)


def judged_run(planned: Plan) -> ArmRun | None:
    "The run that chose among candidates."
    return next((run for run in planned.runs if run.tried), None)


def candidate_scores(planned: Plan, run: ArmRun, stages: Path) -> pd.DataFrame:
    "Each candidate on the test patients: what would have come of another choice."
    question, found = planned.question(run), []
    for tried in run.tried:
        net = load_network(stages / tried.stages[-1] / "model.safetensors", question.network)
        scores = evaluate(net, question.split.test, question.network)
        kept = scores[["patient", "dice", "hd95", "surface_dice"]]
        found.append(kept.assign(arm="candidate", path=tried.name, steps=tried.steps, sources=len(tried.sources)))
    return pd.concat(found)


def held_out(run: ArmRun, here: Path) -> pd.DataFrame:
    "Dice of each candidate on each labelled patient who was held out, and which was chosen."
    said = read_json(result_file(here, run.label, run.seed))["verdict"]
    scores = pd.DataFrame(said["scores"], columns=["patient", *(tried.name for tried in run.tried)])
    scores = scores.melt("patient", var_name="candidate", value_name="dice")
    return scores.assign(chosen=scores.candidate == said["chosen"])


def source_models(planned: Plan, stages: Path) -> dict[str, Path]:
    "The checkpoint of each source alone."
    runs = [run for run in planned.runs if run.arm == "direct-each"]
    return {run.sources[0]: stages / run.stages[0] / "model.safetensors" for run in runs}


def zero_shot(models: dict[str, Path], planned: Plan) -> pd.Series:
    "Mean Dice of each source model on the labelled patients, before it is fine-tuned."
    (question,) = planned.opened.questions
    data = prepare_task(question.split.train, question.network)
    found = {}
    for name, file in models.items():
        found[name] = mean_dice(load_network(file, question.network), data, question.network)
    return pd.Series(found)


def distances(cell: Cell, planned: Plan, published: Plan, stages: Path) -> pd.DataFrame:
    "From each source to the target: each term, the published affinity, what source models say. Lower is closer."
    (question,) = planned.opened.questions
    (as_published,) = published.opened.questions
    names = question.near.names[:-1]
    columns = {term: values[:-1, -1] for term, values in question.near.terms.items()}
    columns["oca"] = 1 - columns["oca"]
    columns["published"] = as_published.near.distance[:-1, -1]
    table = pd.DataFrame(columns, index=names)
    models = source_models(planned, stages)
    table["zero-shot"] = -zero_shot(models, planned)
    for name in SCORES:
        scores = score_pool(name, models, question.split.train, question.network, seed=cell.seed)
        table[name] = -scores.table.set_index("source").score
    table["patients"] = [len(question.split.sources[name].patients) for name in names]
    return table.rename_axis("source").reset_index()


CODE = ("training", "affinity", "similarity.task", "paths", "arms", "study", "verdict", "questions", "executors.here")


def state(asked: dict) -> str:
    "A name for what is asked and for the code that answers, so that no table of another version is taken for this."
    return digest(asked, code_digest(*CODE))


def parts_of(cell: Cell, asked: dict, out: Path) -> dict[str, Path]:
    "Where the tables of a cell lie."
    return {name: out / state(asked) / f"{cell}.{name}.parquet" for name in TABLES}


def do_cell(cell: Cell, pool: TaskPool, asked: dict, out: Path) -> None:
    "Carries all studies of a cell out and keeps its tables."
    torch.set_num_threads(1)
    files = parts_of(cell, asked, out)
    if all(file.exists() for file in files.values()):
        return
    stages, plans, runs = out / "stages", {}, []
    for name, options in asked["studies"].items():
        here = out / state(asked) / str(cell) / name.replace(" ", "-")
        plans[name] = carried_out(cell_study(cell, pool, asked, options), here, stages)
        runs.append(results_table(here).assign(study=name))
    planned, here = plans["chosen"], out / state(asked) / str(cell) / "chosen"
    judged = judged_run(planned)
    runs.append(candidate_scores(planned, judged, stages).assign(study="chosen", target=cell.target, seed=cell.seed))
    tables = {
        "runs": pd.concat(runs),
        "held-out": held_out(judged, here),
        "distances": distances(cell, planned, plans["published"], stages),
    }
    for name, file in files.items():
        about = {"pool": cell.pool, "target": cell.target, "seed": cell.seed, "code": code_digest(*CODE)}
        with replacing(file) as part:
            tables[name].assign(**about).to_parquet(part, index=False)
    print(f"{cell} is done", file=sys.stderr, flush=True)


def try_cell(cell: Cell, pool: TaskPool, asked: dict, out: Path) -> None:
    "A cell that cannot be done leaves the others alone."
    try:
        do_cell(cell, pool, asked, out)
    except InputError as e:
        print(f"{cell} is not done: {e}", file=sys.stderr, flush=True)


def without_names(table: pd.DataFrame) -> pd.DataFrame:
    "The table with numbers in the place of patients, the same for one patient wherever he is met."
    return table.assign(patient=table.patient.map(digest)) if "patient" in table else table


def kept_before(asked: dict) -> dict[str, pd.DataFrame]:
    """The tables beside this file where the same was asked, else none. The code may have been another: each row says
    which. To ask all of it again, remove the folder."""
    said = RECORDS / "evidence" / "run.json"
    if not said.exists() or read_json(said)["asked"] != digest(asked):
        return {}
    return {name: pd.read_parquet(RECORDS / "evidence" / f"{name}.parquet") for name in TABLES}


def cell_names(table: pd.DataFrame) -> pd.Series:
    "The name of the cell of each row."
    return table.pool + "." + table.target + "." + table.seed.astype(str)


def merged(name: str, done: list[Cell], before: pd.DataFrame | None, asked: dict, out: Path) -> pd.DataFrame:
    "One table of all cells: those that are done here, and those that were kept before."
    parts = [without_names(pd.read_parquet(parts_of(cell, asked, out)[name])) for cell in done]
    if before is not None:
        parts.insert(0, before[~cell_names(before).isin(map(str, done))])
    table = pd.concat(parts)
    numbers = table.select_dtypes("float").columns
    table[numbers] = table[numbers].round(5)
    return table


def keep(cells: list[Cell], asked: dict, out: Path) -> None:
    "The tables of the cells that are done as three files beside this one, and what made them."
    done = [cell for cell in cells if all(file.exists() for file in parts_of(cell, asked, out).values())]
    if not done:
        print("No cell was done here, and the tables are as they were.", file=sys.stderr)
        return
    before, folder = kept_before(asked), RECORDS / "evidence"
    folder.mkdir(exist_ok=True)
    for name in TABLES:
        with replacing(folder / f"{name}.parquet") as part:
            merged(name, done, before.get(name), asked, out).to_parquet(part, index=False)
    write_json(folder / "run.json", {"asked": digest(asked)})


def main(data: Path, out: Path, wanted: list[str]) -> None:
    "A process for each core, each with cells of its own."
    asked = read_asked()
    cells = cells_of(asked)
    unknown = set(wanted) - set(map(str, cells))
    if unknown:
        sys.exit(f"There is no cell {min(unknown)}: give e.g. {cells[0]}.")
    for folder in (state(asked), "stages"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    before = kept_before(asked)
    have = set(cell_names(before["runs"])) if before else set()
    todo = [cell for cell in cells if str(cell) in wanted or not (wanted or str(cell) in have)]
    pools = {name: open_pool(name, data, out) for name in {cell.pool for cell in todo}}
    Parallel(cores())(delayed(try_cell)(cell, pools[cell.pool], asked, out) for cell in todo)
    keep(cells, asked, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute(), sys.argv[3:])
