"""A stage as its user meets it: it learns, with every network; killed, it goes on to the same bits; patches where they belong."""
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
from seqtransfer.networks import NETWORKS, Plan, build_network, device, load_network, plan_for, prepare, read_about
from seqtransfer.tasks import read_case, read_task
from seqtransfer.training import Pretrained, Stage, patch_transform, prepare_task, run_stage
from seqtransfer.study import Recipe
from seqtransfer.transfer import compare

PLAN = Plan((1.0, 1.0, 1.0), (5, 5, 5))


def test_patches_are_centred_on_voxels_that_count(tmp_path):
    "Of a task with ignored voxels: two thirds on the label, the rest on background, none on what is ignored."
    def mask(rng, k):
        y = np.zeros((24, 24, 24), np.uint8); y[4:7, 4:7, 4:7], y[12:20, 12:20, 12:20] = 1, 2
        return y
    folder = write_dataset(tmp_path, 1, "Marked", (24, 24, 24), ["T1"], {"core": 1, "ignore": 2}, 2, mask=mask)
    task = read_pool(folder).tasks[0]
    assert task.cases[0].ignore == (2,)
    data = prepare_task(task, replace(PLAN, patch=(16, 16, 16)))  # a patch that a network could be trained on, which a GPU's memory is counted for
    assert all((d["mask"].flatten()[d["mask_fg"]] == 1).all() and (d["mask"].flatten()[d["mask_bg"]] == 0).all() for d in data)
    draw = patch_transform(PLAN, seed=0)
    centres = torch.tensor([int(draw(data[i % 2])[0]["mask"][0, 2, 2, 2]) for i in range(300)])
    assert (centres >= 0).all() and 0.6 < (centres == 1).float().mean() < 0.73


TASK = "LesionA-FLAIR-WMH"


def plan_of(zoo, network="unet"):
    return plan_for(read_task(read_pool(zoo)[TASK]), network=network, largest=32)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("options", [{}, {"optimiser": "sgd", "augmentation": "nnunet"}], ids=["adamw", "nnunet"])
def test_a_stage_is_learned(zoo, tmp_path, network, options):
    "Dice of the cases that were trained on rises above 0.3 from below 0.15, with each network and in nnU-Net's way of training."
    task, plan = read_pool(zoo)[TASK], plan_of(zoo, network)
    plan = replace(plan, channels=tuple(c // min(2, plan.channels[0] // 8) for c in plan.channels))  # a small one is enough
    lr = 1e-2 if "optimiser" in options else 5e-3 if NETWORKS[network] == 8 else 2e-3  # narrow ones take a higher rate
    done = run_stage(Stage(task, 300 if options else 150, lr, 0, **options), plan, tmp_path)
    before, after = (evaluate(net, task, plan).dice.mean() for net in (build_network(plan, 0), load_network(done.model)))
    assert before < 0.15 and after > 0.3 and done.curve.loss.iloc[-1] < 0.8 * done.curve.loss.iloc[0]


@pytest.mark.parametrize("way", [{"precision": "bfloat16"}, {"channels_last": True}, {"compiled": True}], ids=str)
def test_ways_of_computing_learn_the_same(zoo, tmp_path, way):
    "Within what the precision allows; the checkpoint is that of the same network."
    if "compiled" in way and not (shutil.which("g++") or shutil.which("clang")): pytest.skip("torch.compile needs a C++ compiler on the CPU")
    task, plan = read_pool(zoo)[TASK], replace(plan_of(zoo), patch=(24, 24, 24), precision="float32", channels_last=False)
    plain, other = (run_stage(Stage(task, 40, 5e-3, 0), p, tmp_path) for p in (plan, replace(plan, **way)))
    assert np.allclose(other.curve.loss, plain.curve.loss, rtol=0.1) and plain.name != other.name
    assert load_network(other.model).state_dict().keys() == load_network(plain.model).state_dict().keys()


SCRIPT = """
import sys
from pathlib import Path
from seqtransfer.datasets import read_pool
from seqtransfer.networks import plan_for
from seqtransfer.tasks import read_case, read_task
from seqtransfer.training import Stage, run_stage
task = read_pool(sys.argv[1])["LesionA-FLAIR-WMH"]
plan = plan_for(read_task(task), network=sys.argv[3], largest=32)
done = run_stage(Stage(task, int(sys.argv[4]), 5e-3, 0, augmentation="nnunet", optimiser="sgd"), plan, sys.argv[2])
print(done.executed, done.model)
"""


def trained(zoo, out, network, steps, **env):
    run = subprocess.run([sys.executable, "-c", SCRIPT, zoo, out, network, str(steps)], capture_output=True, text=True, env={**os.environ, **env}, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()[-1]


@pytest.mark.skipif(device().type != "cpu", reason="a GPU may differ in the last digits")
def test_the_same_seed_gives_the_same_bits_in_another_process(zoo, tmp_path):
    first, second = (open(trained(zoo, tmp_path / name, "dynunet", 4), "rb").read() for name in "ab")
    assert first == second


@pytest.mark.skipif(device().type != "cpu", reason="a GPU may differ in the last digits")
def test_killed_in_the_middle_of_a_stage_it_goes_on_to_the_same_bits(zoo, tmp_path):
    whole = open(trained(zoo, tmp_path / "whole", "unet", 400), "rb").read()
    env = {**os.environ, "SEQTRANSFER_KEEP_EVERY": "0.05"}
    started = subprocess.Popen([sys.executable, "-c", SCRIPT, zoo, tmp_path / "cut", "unet", "400"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (kept := list((tmp_path / "cut").glob("*/unfinished.safetensors"))):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGKILL); started.wait()
    assert not (kept[0].parent / "stage.json").exists()
    resumed = trained(zoo, tmp_path / "cut", "unet", 400)
    assert open(resumed, "rb").read() == whole and not kept[0].exists() and not list(kept[0].parent.glob(".part-*"))


def test_a_damaged_state_on_the_way_counts_for_nothing(zoo, tmp_path):
    task, plan = read_pool(zoo)[TASK], plan_of(zoo)
    stage = Stage(task, 20, 5e-3, 0)
    whole = run_stage(stage, plan, tmp_path / "whole")
    state = tmp_path / "cut" / whole.name / "unfinished.safetensors"
    state.parent.mkdir(parents=True); state.write_bytes(b"half a file")
    again = run_stage(stage, plan, tmp_path / "cut")
    assert again.executed == 20 and not state.exists()
    if device().type == "cpu": assert again.model.read_bytes() == whole.model.read_bytes()


def test_what_arms_share_is_trained_once(zoo, tmp_path):
    "Counted steps of every optimiser: a first hop in common, a whole arm in common, nothing again the second time."
    pool, steps = read_pool(zoo), []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        def count(*arms, path=("TumourA-FLAIR-ED", "LesionA-FLAIR-WMH")):
            steps.clear()
            compare(pool, "LesionC-FLAIR-WMH", path, path[-1], arms, shots=2, recipe=Recipe(20, 6), out=tmp_path)
            return len(steps)
        assert count("sequential") == 26
        assert count("direct-last-hop") == 16 and count("averaged") == 6  # both halves are there, the mean takes no step
        assert count("direct-last") == 26 and count("direct-choice") == 0 and count("sequential", "direct-last") == 0
    finally: handle.remove()


def test_training_can_begin_with_a_model_from_elsewhere(zoo, tmp_path, capsys):
    "All transfer arms begin with it and say what was loaded; a longer way to the same loss is not asserted, a lower first loss is."
    pool, plan = read_pool(zoo), plan_of(zoo)
    first = run_stage(Stage(pool[TASK], 150, 5e-3, 0), plan, tmp_path / "elsewhere")
    stage = Stage(pool["LesionB-FLAIR-WMH"], 20, 1e-4, 0)
    fresh, started = (run_stage(stage, plan, tmp_path, init) for init in (None, Pretrained(first.model, ("FLAIR",))))
    assert "100 % of" in capsys.readouterr().out and started.curve.loss.iloc[0] < 0.8 * fresh.curve.loss.iloc[0]
    out = compare(pool, "LesionC-FLAIR-WMH", (TASK,), None, ("scratch", "sequential"), shots=2, recipe=Recipe(20, 6, start=str(first.model)), out=tmp_path / "run")
    assert len(out.arms) == 2 and "model.safetensors: 100 %" in capsys.readouterr().out


def test_the_plan_of_the_target_is_forced_on_every_hop(zoo, tmp_path):
    "A source of another spacing is brought to the target's, and every stage's file says the same plan."
    pool, target = read_pool(zoo), TASK
    spacing = {t.name: read_case(t.cases[0]).spacing for t in pool}
    other = next(n for n, s in spacing.items() if not np.allclose(s, spacing[target], rtol=0.05) and not n.startswith("LesionA"))
    compare(pool, target, (other, "LesionC-FLAIR-WMH"), None, ("sequential",), shots=2, recipe=Recipe(4, 2), out=tmp_path)
    plans = [read_json(f)["plan"] for f in tmp_path.glob("stages/*/stage.json")]
    assert len(plans) == 3 and plans[0] == plans[1] == plans[2]
    image, _ = prepare(read_case(pool[other].cases[0]), load_plan(tmp_path))
    assert np.allclose(image.pixdim, spacing[target], rtol=0.02) and not np.allclose(spacing[other], spacing[target], rtol=0.05)


def load_plan(out): return read_about(next(out.glob("stages/*/model.safetensors")))[0]
