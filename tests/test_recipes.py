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
HOW = r"a new cell before the one that holds|below the line|in place of the line"
STEP = re.compile(rf"In `([\w.]+)`, ({HOW}) `(.+?)`:\n\n```python\n(.*?)```", re.S)
UNWANTED = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_proc", "_docs")


def begins(source, text):
    "Whether a line of a cell begins with a text."
    return any(line.strip().startswith(text) for line in source.splitlines())


def place(cells, text, fits):
    "The one exported cell that a text fits."
    sources = {i: "".join(cell["source"]) for i, cell in enumerate(cells) if cell["cell_type"] == "code"}
    found = [i for i, source in sources.items() if source.startswith("#| export") and fits(source, text)]
    assert len(found) == 1, f"{text!r} names {len(found)} places"
    return found[0]


def new_cell(code):
    "A cell of code that was not executed."
    made = {"cell_type": "code", "id": f"{crc32(code.encode()):08x}", "metadata": {}}
    return {**made, "execution_count": None, "outputs": [], "source": code.strip().splitlines(keepends=True)}


def changed(source, how, text, code):
    "The source of a cell with code below, or in place of, the one line that begins with a text."
    lines = source.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.strip().startswith(text))
    first = at + 1 if how.startswith("below") else at
    lines[first : at + 1] = code.rstrip().splitlines()
    return "\n".join(lines).splitlines(keepends=True)


def follow(folder, page, how, text, code):
    "Does one step in the notebook."
    path = folder / "nbs" / f"{page}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    if how.startswith("a new cell"):
        cells.insert(place(cells, text, str.__contains__), new_cell(code))
    else:
        cell = cells[place(cells, text, begins)]
        cell["source"] = changed("".join(cell["source"]), how, text, code)
    path.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    "The package after all recipes."
    folder = tmp_path_factory.mktemp("recipes")
    for name in ("nbs", "seqtransfer"):
        shutil.copytree(ROOT / name, folder / name, ignore=UNWANTED)
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, folder / name)
    for _, recipe in RECIPES:
        for step in STEP.findall(recipe):
            follow(folder, *step)
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=folder, check=True, capture_output=True)
    return folder


def holds(package, code):
    "Runs code with the package that the recipes made."
    program = [sys.executable, "-c", "import seqtransfer\n" + textwrap.dedent(code)]
    env = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=package, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_every_block_of_code_is_part_of_a_step():
    wanted = ["a reader", "a term to the affinity", "a score", "a network", "an arm"]
    assert [name for name, _ in RECIPES] == [f"Add {what}" for what in wanted]
    for name, recipe in RECIPES:
        steps = STEP.findall(recipe)
        assert len(steps) > 1, name
        assert recipe.count("```python") == len(steps), name


def test_the_code_of_recipes_has_120_columns_at_most():
    for name, recipe in RECIPES:
        assert max(len(line) for *_, code in STEP.findall(recipe) for line in code.splitlines()) <= 120, name


def test_a_reader(package):
    holds(
        package,
        """
        from pathlib import Path

        import nibabel as nib
        import numpy as np

        from seqtransfer.core import InputError
        from seqtransfer.datasets import read_pool
        from seqtransfer.validation import validate

        for i in range(3):
            folder = Path("data/ward") / f"p{i}"
            folder.mkdir(parents=True)
            voxels = np.random.default_rng(i).normal(100, 10, (12, 12, 12)).astype("f4")
            for name, x in (("t1", voxels), ("flair", voxels), ("lesion", (voxels > 110).astype("u1"))):
                nib.Nifti1Image(x, np.eye(4)).to_filename(folder / f"{name}.nii.gz")
        pool = read_pool("data")
        assert sorted(pool.names) == ["ward-FLAIR-lesion", "ward-T1-lesion"]
        assert [len(task) for task in pool] == [3, 3]
        assert validate(pool).ok
        (folder / "flair.nii.gz").unlink()
        try:
            read_pool("data")
        except InputError as e:
            assert "p2/flair.nii.gz" in str(e)
        else:
            raise AssertionError("a missing file was not refused")
    """,
    )


def test_a_term(package):
    holds(
        package,
        """
        import numpy as np

        from seqtransfer.affinity import affinity
        from seqtransfer.datasets import read_pool
        from seqtransfer.paths import best_paths, path_table
        from seqtransfer.similarity.label import label_signature
        from seqtransfer.zoo import demo_zoo

        low = np.zeros((16, 16, 16), bool)
        low[4:8, 4:8, :8] = True
        assert label_signature(low, low.shape).height == 0.25
        assert label_signature(low[:, :, ::-1], low.shape).height == 0.75
        assert np.isnan(label_signature(low & False).height)
        near = affinity(read_pool(demo_zoo()), weights={"height": 1.0}, replicates=5)
        assert near.terms["height"].max() < 1
        assert near.interval("height") is not None
        assert "height" in path_table(best_paths(near, near.names[0], 2))
    """,
    )


def test_a_score(package):
    holds(
        package,
        """
        import numpy as np

        from seqtransfer.scores import score_all

        x, y = np.random.default_rng(0).normal(size=(50, 3)), np.arange(50) % 2
        apart = x + 3 * y[:, None]
        found = score_all(features=apart, labels=y)["fisher"]
        assert found > score_all(features=x, labels=y)["fisher"] > 0
        zero, one = (apart[y == c].mean(0) for c in (0, 1))
        between = ((zero - one) ** 2).sum() / 4
        assert np.isclose(found / (1 + found), between / apart.var(0).sum())
    """,
    )


def test_a_network(package):
    holds(
        package,
        """
        import torch

        from seqtransfer.networks import NetworkPlan, build_network, load_network, parts, save_network

        def size(network):
            return sum(p.numel() for p in network.parameters())

        plan = NetworkPlan((5.0,) * 3, (16,) * 3, network="resunet")
        net = build_network(plan, 0)
        assert all(parts(net).values())
        assert size(net) > size(build_network(NetworkPlan((5.0,) * 3, (16,) * 3), 0))
        x = torch.randn(2, 1, 16, 16, 16)
        for _ in range(3):
            net(5 * x + 3)  # in training, where other norms would gather statistics
        again = load_network(save_network(net, "net.safetensors", plan))
        assert torch.equal(again.eval()(x), net.eval()(x))
    """,
    )


def test_an_arm_and_a_network_in_a_comparison(package):
    holds(
        package,
        """
        from seqtransfer.arms import ARMS, Choice, arm_path, arm_sources
        from seqtransfer.datasets import read_pool
        from seqtransfer.plots import ARM_COLOURS
        from seqtransfer.study import Recipe
        from seqtransfer.transfer import compare
        from seqtransfer.zoo import demo_zoo

        assert set(ARMS) <= set(ARM_COLOURS)
        path = ("LesionA-FLAIR-WMH", "LesionB-FLAIR-WMH")
        arms = ("sequential", "sequential-backwards")
        recipe = Recipe(4, 2, largest_patch=16, network="resunet")
        target = "LesionC-FLAIR-WMH"
        found = compare(read_pool(demo_zoo()), target, path, arms=arms, test=1, recipe=recipe, out="arms")
        assert found.arms.path.tolist() == [" -> ".join([*way, target]) for way in (path, path[::-1])]
        assert arm_sources("sequential-backwards", Choice(path)) == (path[::-1],)
        assert arm_path("sequential-backwards", path[::-1], "T") == "LesionB-FLAIR-WMH -> LesionA-FLAIR-WMH -> T"
    """,
    )
