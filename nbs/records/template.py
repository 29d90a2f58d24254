"""The procedural brain against the ICBM152 template, warped alike: `pip install nilearn && python nbs/records/template.py` writes nbs/records/template.csv.

nilearn carries the template's grey- and white-matter maps inside its package; it is not needed for anything else here. Both brains are drawn
for six subjects on 96³ voxels of 2.5 mm with the same random stretch and warp; overlaps are compared on voxels of 5 mm, with and without it."""
import itertools
import time
from pathlib import Path

import numpy as np
import pandas as pd
from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template
from scipy import ndimage

from seqtransfer import phantom

ADULT, GRID = phantom.POPULATIONS["adult"], phantom.grid_of(96)
gm, wm, mask = (f(resolution=2) for f in (load_mni152_gm_template, load_mni152_wm_template, load_mni152_brain_mask))
GM, WM = gm.get_fdata(), wm.get_fdata()
MAPS = np.stack([np.clip(mask.get_fdata() - GM - WM, 0, 1), GM, WM])  # what is neither grey nor white counts as fluid
TO_VOXEL = np.linalg.inv(gm.affine)
MIDDLE = np.array([[0.0], [-18.0], [8.0]])  # of the template's brain, mm
straight = lambda rng, grid, population: (np.stack(np.meshgrid(*grid.axes, indexing="ij")) / population.scale).astype(np.float32)


def template(rng):
    "CSF, GM and WM fractions of the template, bent as the phantom bends its patients."
    at = phantom.bent_grid(rng, GRID, ADULT).reshape(3, -1) + MIDDLE
    voxel = TO_VOXEL[:3, :3] @ at + TO_VOXEL[:3, 3:]
    return np.stack([ndimage.map_coordinates(m, voxel, order=1) for m in MAPS]).reshape(3, *GRID.shape)


def procedural(rng):
    "CSF, GM (with the deep nuclei) and WM fractions of the phantom."
    csf, grey, white, deep = phantom.anatomy(rng, 96).fractions
    return np.stack([csf, grey + deep, white])


def overlap(brains, tissue):
    "The mean Dice of one tissue over all pairs of brains."
    masks = [phantom.coarser(b, 2)[tissue] > 0.5 for b in brains]
    return np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in itertools.combinations(masks, 2)])


rows, bent = [], phantom.bent_grid
for name, draw in (("procedural", procedural), ("ICBM152 template", template)):
    start = time.perf_counter()
    brains = [draw(np.random.default_rng(100 + i)) for i in range(6)]
    seconds = (time.perf_counter() - start) / 6
    phantom.bent_grid = straight
    unbent = [draw(np.random.default_rng(100 + i)) for i in range(6)]
    phantom.bent_grid = bent
    ml = np.array([b.sum((1, 2, 3)) for b in brains]) * GRID.voxel**3 / 1000
    vary = 100 * ml.std(0, ddof=1) / ml.mean(0)
    rows.append({"brain": name, "GM/WM": f"{(ml[:, 1] / ml[:, 2]).min():.2f} to {(ml[:, 1] / ml[:, 2]).max():.2f}", "CSF varies by (%)": vary[0], "GM varies by (%)": vary[1], "WM varies by (%)": vary[2],
                 "GM overlap, bent (Dice)": overlap(brains, 1), "GM overlap, not bent (Dice)": overlap(unbent, 1), "s a subject": seconds})
pd.DataFrame(rows).round(2).to_csv(Path(__file__).parent / "template.csv", index=False)
print(pd.DataFrame(rows).round(2).T)
