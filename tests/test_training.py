"""A stage as its user meets it: patches where they belong."""
import numpy as np
import torch
from test_affinity import write_dataset

from seqtransfer.datasets import read_pool
from seqtransfer.networks import Plan
from seqtransfer.training import patch_transform, prepare_task

PLAN = Plan((1.0, 1.0, 1.0), (5, 5, 5))


def test_patches_are_centred_on_voxels_that_count(tmp_path):
    "Of a task with ignored voxels: two thirds on the label, the rest on background, none on what is ignored."
    def mask(rng, k):
        y = np.zeros((24, 24, 24), np.uint8); y[4:7, 4:7, 4:7], y[12:20, 12:20, 12:20] = 1, 2
        return y
    folder = write_dataset(tmp_path, 1, "Marked", (24, 24, 24), ["T1"], {"core": 1, "ignore": 2}, 2, mask=mask)
    task = read_pool(folder).tasks[0]
    assert task.cases[0].ignore == (2,)
    data = prepare_task(task, PLAN)
    assert all((d["mask"].flatten()[d["mask_fg"]] == 1).all() and (d["mask"].flatten()[d["mask_bg"]] == 0).all() for d in data)
    draw = patch_transform(PLAN, seed=0)
    centres = torch.tensor([int(draw(data[i % 2])[0]["mask"][0, 2, 2, 2]) for i in range(300)])
    assert (centres >= 0).all() and 0.6 < (centres == 1).float().mean() < 0.73
