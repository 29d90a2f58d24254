"""The procedural brain against the ICBM152 template, warped alike.

`pip install nilearn && python nbs/records/template.py` writes nbs/records/template.csv.
nilearn carries the template's grey- and white-matter maps inside its package. Nothing else here needs it.
Both brains are drawn for six subjects on 96³ voxels of 2.5 mm with the same random stretch and warp.
Overlaps are compared on voxels of 5 mm, with the stretch and warp and without."""

import itertools
import time
from pathlib import Path

import numpy as np
import pandas as pd
from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template
from scipy import ndimage

from seqtransfer import phantom

SUBJECTS = 6
ADULT, GRID = phantom.POPULATIONS["adult"], phantom.grid_of(96)
GREY = load_mni152_gm_template(resolution=2)
GM, WM = GREY.get_fdata(), load_mni152_wm_template(resolution=2).get_fdata()
BRAIN = load_mni152_brain_mask(resolution=2).get_fdata()
MAPS = np.stack([np.clip(BRAIN - GM - WM, 0, 1), GM, WM])  # what is neither grey nor white counts as fluid
TO_VOXEL = np.linalg.inv(GREY.affine)
MIDDLE = np.array([[0.0], [-18.0], [8.0]])  # of the template's brain, mm


def straight(rng, grid, population):
    "In place of `phantom.bent_grid`: the population's size, but no stretch and no warp."
    return (np.stack(np.meshgrid(*grid.axes, indexing="ij")) / population.scale).astype(np.float32)


def template(rng):
    "CSF, GM and WM fractions of the template, bent as the phantom bends its patients."
    at = phantom.bent_grid(rng, GRID, ADULT).reshape(3, -1) + MIDDLE
    voxel = TO_VOXEL[:3, :3] @ at + TO_VOXEL[:3, 3:]
    maps = [ndimage.map_coordinates(m, voxel, order=1) for m in MAPS]
    return np.stack(maps).reshape(3, *GRID.shape)


def procedural(rng):
    "CSF, GM (with the deep nuclei) and WM fractions of the phantom."
    csf, grey, white, deep = phantom.anatomy(rng, 96).fractions
    return np.stack([csf, grey + deep, white])


def drawn(draw):
    "The fractions of all subjects."
    return [draw(np.random.default_rng(100 + i)) for i in range(SUBJECTS)]


def drawn_straight(draw):
    "The fractions of all subjects without stretch and warp."
    bent = phantom.bent_grid
    phantom.bent_grid = straight
    try:
        return drawn(draw)
    finally:
        phantom.bent_grid = bent


def dice(a, b):
    "The overlap of two masks."
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def overlap(brains, tissue):
    "The mean Dice of one tissue over all pairs of brains."
    masks = [phantom.coarser(brain, 2)[tissue] > 0.5 for brain in brains]
    return np.mean([dice(a, b) for a, b in itertools.combinations(masks, 2)])


def compared(name, draw):
    "One row of the table: a brain's volumes, how they vary, and how much its subjects overlap."
    start = time.perf_counter()
    brains = drawn(draw)
    seconds = (time.perf_counter() - start) / SUBJECTS
    ml = np.array([brain.sum((1, 2, 3)) for brain in brains]) * GRID.voxel**3 / 1000
    csf, gm, wm = 100 * ml.std(0, ddof=1) / ml.mean(0)
    ratio = ml[:, 1] / ml[:, 2]
    return {
        "brain": name,
        "GM/WM": f"{ratio.min():.2f} to {ratio.max():.2f}",
        "CSF varies by (%)": csf,
        "GM varies by (%)": gm,
        "WM varies by (%)": wm,
        "GM overlap, bent (Dice)": overlap(brains, 1),
        "GM overlap, not bent (Dice)": overlap(drawn_straight(draw), 1),
        "s a subject": seconds,
    }


if __name__ == "__main__":
    rows = [compared("procedural", procedural), compared("ICBM152 template", template)]
    table = pd.DataFrame(rows).round(2)
    table.to_csv(Path(__file__).parent / "template.csv", index=False)
    print(table.T)
