"One study, three executors: the same table to the bit, and each goes on with what another began."

import itertools
import json

import pandas as pd
import pytest
import torch

from seqtransfer import transfer
from seqtransfer.clusters import local_cluster
from seqtransfer.core import InputError
from seqtransfer.datasets import read_pool
from seqtransfer.executors.dask import Dask
from seqtransfer.executors.here import here
from seqtransfer.executors.notebooks import Notebooks
from seqtransfer.folders import read_asked
from seqtransfer.questions import open_study
from seqtransfer.results import read_results, results_table
from seqtransfer.study import Recipe, Study
from seqtransfer.training import machine
from seqtransfer.transfer import carry_out, compare, grid, run

TARGET, FAR, NEAR = "TumourB-FLAIR-ED", "LesionA-FLAIR-WMH", "TumourA-FLAIR-ED"
FEW = {"labels": ["ED", "WMH"], "modalities": ["FLAIR"]}
ARMS = ("scratch", "direct-choice", "sequential", "recommended")
BY = {
    "here": lambda: here,
    "notebooks": lambda: Notebooks(threads=1, keep=True),
    "dask": lambda: Dask(local_cluster(1, 2), where=machine(1)),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "The number of threads decides the last bits, and workers have one."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def opened(zoo):
    "A study with two seeds, whose paths the affinity chooses."
    asked = {"arms": ARMS, "seeds": (0, 1), "shots": 3, "recipe": Recipe(24, 8), "wanted": FEW}
    return open_study(Study(zoo, (TARGET,), **asked))


@pytest.fixture(scope="module")
def folders(opened, tmp_path_factory):
    "The study, carried out by each executor into a folder of its own."
    made = {}
    for name, by in BY.items():
        made[name] = tmp_path_factory.mktemp(name)
        assert carry_out(opened, made[name], by()).failures == ()
    return made


def models(out):
    "The bytes of every trained stage."
    return {f.parent.name: f.read_bytes() for f in out.glob("stages/*/model.safetensors")}


@pytest.mark.parametrize("one, other", list(itertools.combinations(BY, 2)))
def test_executors_give_the_same_table_to_the_bit(folders, one, other):
    pd.testing.assert_frame_equal(results_table(folders[one]), results_table(folders[other]), check_exact=True)
    assert models(folders[one]) == models(folders[other])


@pytest.mark.parametrize("one, other", list(itertools.combinations(BY, 2)))
def test_executors_leave_the_same_folder(folders, one, other):
    a, b = folders[one], folders[other]
    assert read_asked(a) == read_asked(b)
    decided = ("protocol-seed0.json", "protocol-seed1.json", "affinity-seed1/path.json", "affinity-seed0/affinity.csv")
    for name in decided:
        assert (a / name).read_bytes() == (b / name).read_bytes()
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (a, b)]
    assert plans[0]["runs"] == plans[1]["runs"]
    assert plans[0]["stages"] == plans[1]["stages"]
    results = [sorted(f.name for f in (folder / "arms").iterdir()) for folder in (a, b)]
    assert results[0] == results[1]


@pytest.mark.parametrize("first, then", list(itertools.permutations(BY, 2)))
def test_an_executor_goes_on_with_what_another_began(folders, opened, tmp_path, first, then):
    "The first does the arms of one seed, the other the rest; no stage is trained twice."
    study = opened.study
    begun = open_study(Study(**{**vars(study), "seeds": (0,), "arms": ("scratch", "sequential")}))
    carry_out(begun, tmp_path, BY[first]())
    kept = {f: f.stat().st_mtime_ns for f in tmp_path.glob("stages/*/model.safetensors")}
    assert carry_out(opened, tmp_path, BY[then]()).failures == ()
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    pd.testing.assert_frame_equal(results_table(tmp_path), results_table(folders["here"]), check_exact=True)
    assert models(tmp_path) == models(folders["here"])


def test_compare_run_and_grid_ask_the_same(zoo, folders, tmp_path):
    asked = {"arms": ARMS, "seeds": (0, 1), "shots": 3, "recipe": Recipe(24, 8)}
    found = compare(read_pool(zoo, **FEW), TARGET, out=tmp_path / "compare", **asked)
    done = run(zoo, TARGET, tmp_path / "run", wanted=FEW, **asked)
    (tmp_path / "grid.yaml").write_text(f"""data: {zoo}
targets: [{TARGET}]
seeds: [0, 1]
arms: [{", ".join(ARMS)}]
shots: 3
wanted: {{labels: [ED, WMH], modalities: [FLAIR]}}
recipe: {{source_steps: 24, target_steps: 8}}
""")
    many = grid(tmp_path / "grid.yaml", tmp_path / "grid", BY["dask"]())
    expected = results_table(folders["here"])
    for out in (tmp_path / "compare", done.out, many.out):
        pd.testing.assert_frame_equal(results_table(out), expected, check_exact=True)
    columns = ["arm", "seed", "patient", "dice", "hd95", "surface_dice"]
    for other in (done.comparison, many.comparison, read_results(folders["dask"])):
        pd.testing.assert_frame_equal(found.cases[columns], other.cases[columns], check_exact=True)
    assert done.report.exists()
    assert many.report.exists()


def test_what_another_study_began_is_refused_whoever_comes(folders, opened):
    other = open_study(Study(**{**vars(opened.study), "recipe": Recipe(25, 8)}))
    for name, by in BY.items():
        before = models(folders[name])
        with pytest.raises(InputError, match="source_steps"):
            carry_out(other, folders[name], by())
        assert models(folders[name]) == before


def test_modes_and_weights_decide_the_path_of_every_executor(zoo, tmp_path):
    "Weights that leave one term reverse the order of sources by it, and the folder belongs to them."
    asked = {"arms": ("direct-choice",), "n_sources": 1, "shots": 2, "recipe": Recipe(4, 2), "wanted": FEW}
    default, weighed = (open_study(Study(zoo, (TARGET,), weights=w, **asked)) for w in (None, {"oca": 1.0}))
    near, other = default.questions[0].near, weighed.questions[0].near
    assert other.weights == {"oca": 1.0}
    assert not (near.distance == other.distance).all()
    carry_out(weighed, tmp_path)
    assert read_asked(tmp_path)["weights"] == {"oca": 1.0}
    with pytest.raises(InputError, match="weights"):
        carry_out(default, tmp_path)
    paper = open_study(Study(zoo, (TARGET,), mode="paper", **asked))
    assert set(paper.questions[0].near.weights) == {"ica", "oca"}


def test_a_study_in_memory_cannot_be_notebooks(zoo, tmp_path):
    study = Study(read_pool(zoo, **FEW), (TARGET,), ((NEAR,),), arms=("scratch",), shots=2, recipe=Recipe(4, 2))
    for by in (Notebooks(1), Dask(None, 1)):
        with pytest.raises(InputError, match="not a pool in memory"):
            carry_out(study, tmp_path, by)


def test_a_failure_of_one_notebook_leaves_the_others_alone(zoo, tmp_path):
    "A label of one source becomes unreadable between the plan and the training."
    copied = tmp_path / "zoo"
    import shutil

    shutil.copytree(zoo, copied)
    arms = ("scratch", "direct-first")
    study = Study(copied, (TARGET,), ((NEAR,),), arms=arms, shots=2, recipe=Recipe(4, 2), wanted=FEW)
    opened = open_study(study)
    for case in opened.questions[0].split.sources[NEAR].cases:
        case.mask.write_bytes(b"no volume")
    done = transfer.run_study(opened, tmp_path / "out", Notebooks(threads=1, keep=True))
    (failure,) = done.failures
    assert "direct-first" in failure.job
    assert failure.state == "failed"
    assert (tmp_path / "out" / failure.notebook).exists()
    assert done.comparison.arms.arm.tolist() == ["scratch"]
