"The recipes of CONTRIBUTING.md, followed to the letter in a copy of the notebooks; then what they promise."
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from zlib import crc32

import pytest
from conftest import ROOT

RECIPES = re.findall(r"^## (Add .+?)\n(.*?)(?=^## )", (ROOT / "CONTRIBUTING.md").read_text() + "\n## ", re.S | re.M)
STEP = re.compile(r"In `([\w.]+)`, (a new cell before the one that holds|below the line|in place of the line) `(.+?)`:\n\n```python\n(.*?)```", re.S)


def place(cells, text, line):
    "The one exported cell that has a line beginning with the text, or holds it."
    fits = (lambda src: any(x.strip().startswith(text) for x in src.splitlines())) if line else (lambda src: text in src)
    found = [i for i, c in enumerate(cells) if c["cell_type"] == "code" and "".join(c["source"]).startswith("#| export") and fits("".join(c["source"]))]
    assert len(found) == 1, f"{text!r} names {len(found)} places"
    return found[0]


def followed(folder, page, how, text, code):
    "One step, done in the notebook."
    path = folder / "nbs" / f"{page}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    if how.startswith("a new cell"):
        cells.insert(place(cells, text, False), {"cell_type": "code", "id": f"{crc32(code.encode()):08x}", "metadata": {}, "execution_count": None, "outputs": [], "source": code.strip().splitlines(keepends=True)})
    else:
        cell = cells[place(cells, text, True)]
        lines = "".join(cell["source"]).splitlines()
        at, = (i for i, x in enumerate(lines) if x.strip().startswith(text))
        lines[at + how.startswith("below"):at + 1] = code.rstrip().splitlines()
        cell["source"] = "\n".join(lines).splitlines(keepends=True)
    path.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    "The package after all recipes."
    folder = tmp_path_factory.mktemp("recipes")
    for name in ("nbs", "seqtransfer"): shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_proc", "_docs"))
    for name in ("settings.ini", "setup.py"): shutil.copy(ROOT / name, folder / name)
    for _, recipe in RECIPES:
        for step in STEP.findall(recipe): followed(folder, *step)
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=folder, check=True, capture_output=True)
    return folder


def holds(package, code):
    "Runs code with the package that the recipes made."
    done = subprocess.run([sys.executable, "-c", "import seqtransfer\n" + textwrap.dedent(code)], cwd=package, env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_every_block_of_code_is_part_of_a_step():
    assert [name for name, _ in RECIPES] == ["Add a reader", "Add a term to the affinity", "Add a score", "Add a network", "Add an arm"]
    for name, recipe in RECIPES: assert recipe.count("```python") == len(STEP.findall(recipe)) > 1, name


def test_a_reader(package):
    holds(package, """
        from pathlib import Path
        import nibabel as nib, numpy as np
        from seqtransfer.core import InputError
        from seqtransfer.datasets import read_pool
        from seqtransfer.validation import validate
        for i in range(3):
            folder = Path("data/ward") / f"p{i}"; folder.mkdir(parents=True)
            voxels = np.random.default_rng(i).normal(100, 10, (12, 12, 12)).astype("f4")
            for name, x in (("t1", voxels), ("flair", voxels), ("lesion", (voxels > 110).astype("u1"))): nib.Nifti1Image(x, np.eye(4)).to_filename(folder / f"{name}.nii.gz")
        pool = read_pool("data")
        assert sorted(pool.names) == ["ward-FLAIR-lesion", "ward-T1-lesion"] and [len(t) for t in pool] == [3, 3] and validate(pool).ok
        (folder / "flair.nii.gz").unlink()
        try: read_pool("data")
        except InputError as e: assert "p2/flair.nii.gz" in str(e)
        else: raise AssertionError("a missing file was not refused")
    """)


def test_a_term_and_a_score(package):
    holds(package, """
        import numpy as np
        from seqtransfer.affinity import affinity
        from seqtransfer.datasets import read_pool
        from seqtransfer.paths import best_paths, path_table
        from seqtransfer.scores import score_all
        from seqtransfer.similarity.label import label_signature
        from seqtransfer.zoo import demo_zoo
        low = np.zeros((16, 16, 16), bool); low[4:8, 4:8, :8] = True
        assert [label_signature(x, low.shape).height for x in (low, low[:, :, ::-1])] == [0.25, 0.75] and np.isnan(label_signature(low & False).height)
        near = affinity(read_pool(demo_zoo()), weights={"height": 1.0}, replicates=5)
        assert near.terms["height"].max() < 1 and near.interval("height") is not None and "height" in path_table(best_paths(near, near.names[0], 2))
        x, y = np.random.default_rng(0).normal(size=(50, 3)), np.arange(50) % 2
        found = score_all(features=x + 3 * y[:, None], labels=y)
        assert found["fisher"] > score_all(features=x, labels=y)["fisher"] > 0
        share = found["fisher"] / (1 + found["fisher"])  # between over total
        means = [(x + 3 * y[:, None])[y == c].mean(0) for c in (0, 1)]
        assert np.isclose(share, ((means[0] - means[1]) ** 2).sum() / 4 / (x + 3 * y[:, None]).var(0).sum())
    """)


def test_a_network_and_an_arm(package):
    holds(package, """
        from seqtransfer.datasets import read_pool
        import torch
        from seqtransfer.networks import build_network, load_network, parts, save_network
        from seqtransfer.plans import Plan
        from seqtransfer.plots import ARM_COLOURS
        from seqtransfer.arms import ARMS, arm_path, arm_sources
        from seqtransfer.results import arm_files
        from seqtransfer.study import Recipe
        from seqtransfer.transfer import compare
        from seqtransfer.zoo import demo_zoo
        plan = Plan((5.0,) * 3, (16,) * 3, network="resunet")
        part, net = parts(build_network(plan, 0)), build_network(plan, 0)
        assert set(ARM_COLOURS) == set(ARMS) and all(part.values()) and sum(p.numel() for p in net.parameters()) > sum(p.numel() for p in build_network(Plan((5.0,) * 3, (16,) * 3), 0).parameters())
        x = torch.randn(2, 1, 16, 16, 16)
        for _ in range(3): net(5 * x + 3)  # in training, where other norms would gather statistics
        assert torch.equal(load_network(save_network(net, "net.safetensors", plan)).eval()(x), net.eval()(x))
        path = ("LesionA-FLAIR-WMH", "LesionB-FLAIR-WMH")
        compare(read_pool(demo_zoo()), "LesionC-FLAIR-WMH", path, arms=("sequential", "sequential-backwards"), test=1, recipe=Recipe(4, 2, largest_patch=16, network="resunet"), out="arms")
        assert {p.name.split("-seed")[0].split(".")[0] for p in arm_files("arms")} == {"sequential", "sequential-backwards"}
        back = arm_sources("sequential-backwards", path, None)
        assert back == path[::-1] and arm_path("sequential-backwards", back, "T") == "LesionB-FLAIR-WMH -> LesionA-FLAIR-WMH -> T"
    """)
