"""Fine-tunes one set of source models under several recipes and keeps the mean Dice of each run.

`make recipes` calls it: recipes.py DATA OUT, where DATA holds `realdata` and `realpool`. A run that was interrupted
goes on."""

import os
import sys
from pathlib import Path

import pandas as pd
import yaml

from seqtransfer.datasets import read_pool
from seqtransfer.plans import Plan
from seqtransfer.results import results_table
from seqtransfer.study import Recipe, Study
from seqtransfer.tasks import TaskPool
from seqtransfer.transfer import carry_out

RECORDS = Path(__file__).parent
ARMS = ("scratch", "direct-choice", "sequential")


def linked_pool(folder: Path, out: Path) -> TaskPool:
    "The data sets of both real collections as one pool."
    here, datasets = out / "data", sorted(folder.glob("real*/Dataset*"))
    here.mkdir(parents=True, exist_ok=True)
    if len({dataset.name for dataset in datasets}) < max(len(datasets), 1):
        sys.exit(f"{folder} holds no data sets in realdata and realpool, or two of one name: give the folder of both.")
    for dataset in datasets:
        link = here / dataset.name
        link.unlink(missing_ok=True)
        link.symlink_to(dataset.absolute(), target_is_directory=True)
    return read_pool(here)


def variant_study(pool: TaskPool, target: str, asked: dict, options: dict) -> Study:
    "One target under one recipe, with given sources."
    shots, far, near = asked["cells"][target]
    options = {**asked["usual"], **options}
    seeds = tuple(options.pop("seeds", (0, 1)))
    given = {"paths": ((far, near),), "choice": near, "arms": ARMS}
    return Study(pool, (target,), **given, seeds=seeds, shots=shots, test=asked["test"], recipe=Recipe(**options))


def carried_out(study: Study, here: Path, stages: Path) -> Plan:
    "Carries a study out; its stages lie with those of all others."
    here.mkdir(parents=True, exist_ok=True)
    link = here / "stages"
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(stages, here), target_is_directory=True)
    return carry_out(study, here).plan


def means(here: Path) -> pd.DataFrame:
    "The mean Dice of each run of a study."
    return results_table(here).groupby(["target", "seed", "arm"], sort=False).dice.mean().round(4).reset_index()


def main(folder: Path, out: Path) -> None:
    "Every variant on every target."
    asked = yaml.safe_load((RECORDS / "recipes.yaml").read_text())
    pool, stages, found = linked_pool(folder, out), out / "stages", []
    stages.mkdir(exist_ok=True)
    for place, (variant, options) in enumerate(asked["variants"].items()):
        for target in asked["cells"]:
            study = variant_study(pool, target, asked, options)
            here = out / f"{place}-{target}"
            carried_out(study, here, stages)
            found.append(means(here).assign(variant=variant))
            print(f"{variant}, {target}: done", flush=True)
    pd.concat(found).to_csv(RECORDS / "recipes.csv", index=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
