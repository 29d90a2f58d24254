"""Does transfer between phantom tasks look like transfer? `make transfer` writes nbs/records/transfer.csv, which the page on the zoo shows, and beside it, in transfer.json, with which code.

Every source is trained once for each seed under one plan, then fine-tuned on few cases of each target and tested on the others. A run that was interrupted goes on."""
import sys
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed

from seqtransfer.core import code_digest, progress, read_json, write_json
from seqtransfer.datasets import read_pool
from seqtransfer.evaluation import evaluate
from seqtransfer.networks import Plan, load_network
from seqtransfer.protocol import protocol
from seqtransfer.training import Stage, run_stage
from seqtransfer.zoo import write_zoo

TARGETS = ("fets-16-FLAIR-ED", "fets-16-T2-NCR", "fets-16-T1ce-ET", "wmh-Amsterdam_GE3T-FLAIR-WMH")
SOURCES = ("fets-01-FLAIR-ED", "fets-18-FLAIR-NCR", "fets-13-FLAIR-ED", "fets-18-T2-NCR", "fets-20-T2-ED", "fets-06-T2-NCR", "fets-01-T1-ED", "fets-04-T1-NCR",
           "fets-18-T1ce-ET", "fets-21-T1ce-NCR", "fets-13-T1ce-ET", "wmh-Utrecht-FLAIR-WMH", "wmh-Singapore-FLAIR-WMH", "wmh-Utrecht-T1-WMH", "iseg-T1-CSF", "iseg-T2-GM")
SEEDS, SHOTS, SOURCE_STEPS, TARGET_STEPS = (0, 1, 2, 3, 4), 3, 300, 100
PLAN = Plan((5.0, 5.0, 5.0), (32, 40, 32))


def one(pool, out, source, target, seed):
    "Dice on the target's test cases after fine-tuning `source`, or after training from scratch where it is None."
    torch.set_num_threads(1)
    path = out / "results" / f"{target}.{source}.{seed}.json"
    if not path.exists():
        split = protocol(pool, target, SHOTS, seed)
        first = run_stage(Stage(split.sources[source], SOURCE_STEPS, 5e-3, seed), PLAN, out / "stages") if source else None
        last = run_stage(Stage(split.train, TARGET_STEPS, 5e-4 if source else 5e-3, seed), PLAN, out / "stages", first)
        write_json(path, {"target": target, "source": source or "scratch", "seed": seed,
                          "dice": float(evaluate(load_network(last.model, PLAN), split.test, PLAN).dice.mean())})
    return read_json(path)


def main(out):
    rows, pool = [], read_pool(write_zoo(out / "zoo", "all", 48, 24))
    # a source is trained for the first target and found by the others, so the first target goes first
    for targets in (TARGETS[:1], TARGETS[1:]):
        jobs = [(pool, out, source, target, seed) for target in targets for seed in SEEDS for source in (None, *SOURCES)]
        rows += progress(Parallel(-1, return_as="generator")(delayed(one)(*job) for job in jobs), f"transfer to {', '.join(targets)}", len(jobs))
    pd.DataFrame(rows).round(4).to_csv(Path(__file__).parent / "transfer.csv", index=False)
    write_json(Path(__file__).parent / "transfer.json", {"code of phantom, zoo and training": code_digest("phantom", "zoo", "training")})


if __name__ == "__main__": main(Path(sys.argv[1]).absolute())
