"""A stage as its user meets it: it learns, with every network; killed, it goes on to the same bits; patches where they
belong."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_affinity import write_dataset
from torch.optim.optimizer import register_optimizer_step_post_hook

from seqtransfer.core import read_json
from seqtransfer.datasets import read_pool
from seqtransfer.evaluation import evaluate
from seqtransfer.networks import (
    NETWORKS,
    NetworkPlan,
    build_network,
    device,
    load_network,
    plan_for,
    prepare,
    read_about,
)
from seqtransfer.tasks import read_case, read_task
from seqtransfer.training import Pretrained, Stage, patch_transform, prepare_task, run_stage
from seqtransfer.study import Recipe
from seqtransfer.transfer import compare

PLAN = NetworkPlan((1.0, 1.0, 1.0), (5, 5, 5))
TASK = "LesionA-FLAIR-WMH"
ON_CPU = device().type == "cpu"
SAME_BITS = pytest.mark.skipif(not ON_CPU, reason="a GPU may differ in the last digits")


# --- patches


def marked(rng, k):
    "A label map with a small cube of label and a larger one that is ignored."
    values = np.zeros((24, 24, 24), np.uint8)
    values[4:7, 4:7, 4:7] = 1
    values[12:20, 12:20, 12:20] = 2
    return values


def test_patches_are_centred_on_voxels_that_count(tmp_path):
    "Of a task with ignored voxels: two thirds on the label, the rest on background, none on what is ignored."
    shape, labels = (24, 24, 24), {"core": 1, "ignore": 2}
    folder = write_dataset(tmp_path, 1, "Marked", shape, ["T1"], labels, 2, mask=marked)
    task = read_pool(folder).tasks[0]
    assert task.cases[0].ignore == (2,)
    trainable = replace(PLAN, patch=(16, 16, 16))  # a network could take it, which a GPU's memory is counted for
    data = prepare_task(task, trainable)
    for case in data:
        voxels = case["mask"].flatten()
        assert (voxels[case["mask_fg"]] == 1).all()
        assert (voxels[case["mask_bg"]] == 0).all()
    draw = patch_transform(PLAN, seed=0)
    centres = torch.tensor([int(draw(data[i % 2])[0]["mask"][0, 2, 2, 2]) for i in range(300)])
    assert (centres >= 0).all()
    assert 0.6 < (centres == 1).float().mean() < 0.73


# --- learning


def plan_of(zoo, network="unet"):
    "A plan for the task of these tests."
    return plan_for(read_task(read_pool(zoo)[TASK]), network=network, largest=32)


def narrow(plan):
    "The plan with half the features where it has many: a small network is enough."
    divisor = min(2, plan.channels[0] // 8)
    return replace(plan, channels=tuple(width // divisor for width in plan.channels))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("options", [{}, {"optimiser": "sgd", "augmentation": "nnunet"}], ids=["adamw", "nnunet"])
def test_a_stage_is_learned(zoo, tmp_path, network, options):
    """Dice of the cases that were trained on rises above 0.3 from below 0.15, with each network and in nnU-Net's way of
    training."""
    task, plan = read_pool(zoo)[TASK], narrow(plan_of(zoo, network))
    steps, lr = 150, 2e-3
    if options:
        steps, lr = 300, 1e-2
    elif NETWORKS[network] == 8:
        lr = 5e-3  # narrow ones take a higher rate
    done = run_stage(Stage(task, steps, lr, 0, **options), plan, tmp_path)
    before = evaluate(build_network(plan, 0), task, plan).dice.mean()
    after = evaluate(load_network(done.model), task, plan).dice.mean()
    assert before < 0.15
    assert after > 0.3
    assert done.curve.loss.iloc[-1] < 0.8 * done.curve.loss.iloc[0]


@pytest.mark.parametrize("way", [{"precision": "bfloat16"}, {"channels_last": True}, {"compiled": True}], ids=str)
def test_ways_of_computing_learn_the_same(zoo, tmp_path, way):
    "Within what the precision allows; the checkpoint is that of the same network."
    if "compiled" in way and not (shutil.which("g++") or shutil.which("clang")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    task = read_pool(zoo)[TASK]
    plan = replace(plan_of(zoo), patch=(24, 24, 24), precision="float32", channels_last=False)
    plain = run_stage(Stage(task, 40, 5e-3, 0), plan, tmp_path)
    other = run_stage(Stage(task, 40, 5e-3, 0), replace(plan, **way), tmp_path)
    assert np.allclose(other.curve.loss, plain.curve.loss, rtol=0.1)
    assert plain.name != other.name
    assert load_network(other.model).state_dict().keys() == load_network(plain.model).state_dict().keys()


# --- the same bits

SCRIPT = """
import sys
from seqtransfer.datasets import read_pool
from seqtransfer.networks import plan_for
from seqtransfer.tasks import read_task
from seqtransfer.training import Stage, run_stage
_, zoo, out, network, steps = sys.argv
task = read_pool(zoo)["LesionA-FLAIR-WMH"]
plan = plan_for(read_task(task), network=network, largest=32)
done = run_stage(Stage(task, int(steps), 5e-3, 0, augmentation="nnunet", optimiser="sgd"), plan, out)
print(done.executed, done.model)
"""


def command(zoo, out, network, steps):
    "The command that trains a stage in a process of its own."
    return [sys.executable, "-c", SCRIPT, zoo, out, network, str(steps)]


def trained(zoo, out, network, steps):
    "The bytes of the model of a stage that another process has trained."
    run = subprocess.run(command(zoo, out, network, steps), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    path = run.stdout.split()[-1]
    with open(path, "rb") as file:
        return file.read()


@SAME_BITS
def test_the_same_seed_gives_the_same_bits_in_another_process(zoo, tmp_path):
    first = trained(zoo, tmp_path / "a", "dynunet", 4)
    second = trained(zoo, tmp_path / "b", "dynunet", 4)
    assert first == second


def killed_on_the_way(zoo, out):
    "Kills a stage when its state has been written down; returns the file of the state."
    often = {**os.environ, "SEQTRANSFER_KEEP_EVERY": "0.05"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = subprocess.Popen(command(zoo, out, "unet", 400), env=often, start_new_session=True, **silent)
    deadline = time.monotonic() + 120
    kept = []
    while not kept:
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
        kept = list(out.glob("*/unfinished.safetensors"))
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    return kept[0]


@SAME_BITS
def test_killed_in_the_middle_of_a_stage_it_goes_on_to_the_same_bits(zoo, tmp_path):
    whole = trained(zoo, tmp_path / "whole", "unet", 400)
    state = killed_on_the_way(zoo, tmp_path / "cut")
    assert not (state.parent / "stage.json").exists()
    assert trained(zoo, tmp_path / "cut", "unet", 400) == whole
    assert not state.exists()
    assert not list(state.parent.glob(".part-*"))


def test_a_damaged_state_on_the_way_counts_for_nothing(zoo, tmp_path):
    task, plan = read_pool(zoo)[TASK], plan_of(zoo)
    stage = Stage(task, 20, 5e-3, 0)
    whole = run_stage(stage, plan, tmp_path / "whole")
    state = tmp_path / "cut" / whole.name / "unfinished.safetensors"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"half a file")
    again = run_stage(stage, plan, tmp_path / "cut")
    assert again.executed == 20
    assert not state.exists()
    if ON_CPU:
        assert again.model.read_bytes() == whole.model.read_bytes()


# --- stages of a path


@pytest.fixture
def steps():
    "A list that grows with each step of any optimiser."
    made = []
    handle = register_optimizer_step_post_hook(lambda *_: made.append(1))
    yield made
    handle.remove()


def test_what_arms_share_is_trained_once(zoo, tmp_path, steps):
    "Counted steps of every optimiser: a first hop in common, a whole arm in common, nothing again the second time."
    pool, path = read_pool(zoo), ("TumourA-FLAIR-ED", TASK)

    def made_for(*arms):
        steps.clear()
        compare(pool, "LesionC-FLAIR-WMH", path, path[-1], arms, shots=2, recipe=Recipe(20, 6), out=tmp_path)
        return len(steps)

    assert made_for("sequential") == 26
    assert made_for("direct-last-hop") == 16
    assert made_for("averaged") == 6  # both halves are there, the mean takes no step
    assert made_for("direct-last") == 26
    assert made_for("direct-choice") == 0
    assert made_for("sequential", "direct-last") == 0


def test_training_can_begin_with_a_model_from_elsewhere(zoo, tmp_path, capsys):
    "What was loaded is said, and the first loss is lower."
    pool, plan = read_pool(zoo), plan_of(zoo)
    first = run_stage(Stage(pool[TASK], 150, 5e-3, 0), plan, tmp_path / "elsewhere")
    stage = Stage(pool["LesionB-FLAIR-WMH"], 20, 1e-4, 0)
    fresh = run_stage(stage, plan, tmp_path)
    started = run_stage(stage, plan, tmp_path, Pretrained(first.model, ("FLAIR",)))
    assert "100 % of" in capsys.readouterr().out
    assert started.curve.loss.iloc[0] < 0.8 * fresh.curve.loss.iloc[0]


def test_the_arms_of_a_comparison_begin_with_a_model_from_elsewhere(zoo, tmp_path, capsys):
    pool, target, arms = read_pool(zoo), "LesionC-FLAIR-WMH", ("scratch", "sequential")
    first = run_stage(Stage(pool[TASK], 1, 5e-3, 0), plan_of(zoo), tmp_path / "elsewhere")
    recipe = Recipe(20, 6, start=str(first.model))
    out = compare(pool, target, (TASK,), None, arms, shots=2, recipe=recipe, out=tmp_path / "run")
    assert len(out.arms) == 2
    assert "model.safetensors: 100 %" in capsys.readouterr().out


def of_another_spacing(pool, target):
    "A task whose spacing is not that of the target, from another data set."
    wanted = read_case(pool[target].cases[0]).spacing
    others = [task for task in pool if not task.name.startswith("LesionA")]
    return next(task for task in others if not np.allclose(read_case(task.cases[0]).spacing, wanted, rtol=0.05))


def test_the_plan_of_the_target_is_forced_on_every_hop(zoo, tmp_path):
    "A source of another spacing is brought to the target's, and every stage's file says the same plan."
    pool = read_pool(zoo)
    other = of_another_spacing(pool, TASK)
    path = (other.name, "LesionC-FLAIR-WMH")
    compare(pool, TASK, path, None, ("sequential",), shots=2, recipe=Recipe(4, 2), out=tmp_path)
    plans = [read_json(file)["plan"] for file in tmp_path.glob("stages/*/stage.json")]
    assert len(plans) == 3
    assert plans[0] == plans[1] == plans[2]
    plan, _ = read_about(next(tmp_path.glob("stages/*/model.safetensors")))
    image, _ = prepare(read_case(other.cases[0]), plan)
    assert np.allclose(image.pixdim, read_case(pool[TASK].cases[0]).spacing, rtol=0.02)
