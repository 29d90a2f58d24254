"""All arms of the protocol on a phantom target with three seeds: `make compare` writes nbs/records/compare, which the page on transfer shows, and in run.json with which code and how long it took.

Seeds run beside each other, one thread each. A run that was interrupted goes on."""
import shutil
import sys
import time
from pathlib import Path

import torch
from joblib import Parallel, delayed

from seqtransfer.core import code_digest, digest, read_json, write_json
from seqtransfer.datasets import read_pool
from seqtransfer.arms import ARMS
from seqtransfer.study import Recipe
from seqtransfer.transfer import compare
from seqtransfer.zoo import write_zoo

TARGET, SEEDS, RECIPE = "LesionC-FLAIR-WMH", (0, 1, 2), Recipe(source_steps=300, target_steps=100)
RECORD = Path(__file__).parent / "compare"


def one(zoo, out, seed):
    "All arms of one seed; the path is chosen from that seed's three labelled cases."
    torch.set_num_threads(1)
    return compare(read_pool(zoo, modalities=["FLAIR"]), TARGET, arms=ARMS, seeds=(seed,), recipe=RECIPE, out=out)


def main(out):
    start = time.monotonic()
    zoo = write_zoo(out / f"zoo-{digest(code_digest('core', 'phantom', 'zoo'))}", "nnunet", 48, 16)
    Parallel(len(SEEDS))(delayed(one)(zoo, out / "run", seed) for seed in SEEDS)
    seconds = time.monotonic() - start
    shutil.rmtree(RECORD, ignore_errors=True)
    for part in ("arms", "overlays"): shutil.copytree(out / "run" / part, RECORD / part, ignore=shutil.ignore_patterns("oracle"))
    for file in (out / "run").glob("protocol-seed*.json"): shutil.copy(file, RECORD)
    write_json(RECORD / "run.json", {**read_json(out / "run" / "run.json"), "seconds": round(seconds), "code of training and transfer": code_digest("training", "transfer")})


if __name__ == "__main__": main(Path(sys.argv[1]).absolute())
