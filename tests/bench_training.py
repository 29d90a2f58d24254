"""`make bench`: the training loop against its forward and backward passes alone, what the ways of computing bring,
memory, time to the first step, inference.

Everything is measured in one run on one device, on phantom volumes of the size of FeTS 2022. What carries over are
ratios. Nothing is asserted."""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter

import pandas as pd
import pytest
import torch
from bench_affinity import CASES, KEPT, SIZE, keep, processor

from seqtransfer.core import code_digest, digest
from seqtransfer.datasets import read_fets
from seqtransfer.evaluation import predict
from seqtransfer.networks import NETWORKS, NetworkPlan, _with_patch, build_network, device, training_memory
from seqtransfer.tasks import read_case
from seqtransfer.training import (
    IgnoringLoss,
    Stage,
    batches,
    deep_loss,
    optimiser_for,
    prepare_task,
    ready,
    step_function,
    train,
)
from seqtransfer.zoo import write_zoo

ON_GPU = device().type == "cuda"
PATCH = (128, 160, 112) if ON_GPU else (48, 48, 48)
USUAL = {"precision": "bfloat16" if ON_GPU else "float32", "channels_last": ON_GPU}
PLANS = {name: _with_patch(NetworkPlan((1.0, 1.0, 1.0), (), network=name, **USUAL), PATCH) for name in NETWORKS}
WAYS = {
    "float32": {"precision": "float32", "channels_last": False},
    "bfloat16": {"precision": "bfloat16", "channels_last": False},
    "channels last": {"precision": "float32", "channels_last": True},
    "bfloat16, channels last": {"precision": "bfloat16", "channels_last": True},
    "bfloat16, channels last, compiled": {"precision": "bfloat16", "channels_last": True, "compiled": True},
    "float32, compiled": {"precision": "float32", "channels_last": False, "compiled": True},
}
LOOP, WAY = [], []


@pytest.fixture(scope="module")
def task():
    "Ten patients of 240x240x155 voxels."
    name = f"phantom-bench-{digest(SIZE, CASES, code_digest('core', 'phantom', 'zoo'))}"
    return read_fets(write_zoo(KEPT / name, "fets2022", SIZE, CASES), (1,))["fets-01-FLAIR-ED"]


@pytest.fixture(scope="module")
def data(task):
    return prepare_task(task, PLANS["unet"])


def wait_for_gpu():
    "Until all that was asked of a GPU is done."
    if ON_GPU:
        torch.cuda.synchronize()


def seconds(call, n):
    "Seconds for each of `n` calls, all of it done when the time is taken; the first two calls do not count."
    for _ in range(2):
        call()
    wait_for_gpu()
    start = perf_counter()
    for _ in range(n):
        call()
    wait_for_gpu()
    return (perf_counter() - start) / n


def forward_backward(plan, x, y):
    "One step without data and optimiser, as a function."
    net, criterion = ready(build_network(plan, 0), plan), IgnoringLoss(2.0)
    reduced = plan.precision == "bfloat16"

    def passes():
        with torch.autocast(device().type, torch.bfloat16) if reduced else nullcontext():
            out = net(x)
        deep_loss(criterion, out, y).backward()

    return passes


def first_batch(task, data, plan):
    "Images and masks of the first step."
    return next(batches(data, Stage(task, 1, 1e-3, 0), plan))


def steps_of_the_loop(network):
    "How many steps are timed: enough for a rate that does not depend on the first."
    if ON_GPU:
        return 1000 if network == "unet" else 200
    return 60 if network == "unet" else 12


def rate_of_the_loop(task, data, stage, plan):
    "Steps a second of a stage, from the third time that it tells its loss to the last."
    told = []

    def log(name, value, step):
        if name == "loss":
            told.append((perf_counter(), step))

    train(build_network(plan, 0), data, stage, plan, log=log)
    (start, first), (end, last) = told[2], told[-1]
    return (last - first) / (end - start)


@pytest.mark.parametrize("augmentation", ["light", "nnunet"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_loop(benchmark, task, data, network, augmentation):
    plan, n = PLANS[network], steps_of_the_loop(network)
    stage = Stage(task, n, 1e-3, 0, augmentation=augmentation)

    def alone():
        return seconds(forward_backward(plan, *first_batch(task, data, plan)), max(n // 2, 5))

    def measure():
        before = alone()
        loop = rate_of_the_loop(task, data, stage, plan)
        after = alone()  # before and after, since clocks drift
        rates = {"loop, steps/s": loop, "forward + backward alone, steps/s": 2 / (before + after)}
        LOOP.append({"network": network, "augmentation": augmentation, **rates})

    benchmark.pedantic(measure, rounds=1, iterations=1)


def seconds_to_first_step(task, plan):
    "From files to the loss of the first step."
    start = perf_counter()
    data = prepare_task(task, plan)
    net = ready(build_network(plan, 0), plan)
    step = step_function(net, optimiser_for(net, Stage(task, 1, 1e-3, 0)), IgnoringLoss(2.0), plan)
    float(step(*first_batch(task, data, plan)))
    return perf_counter() - start


def seconds_of_inference(task, plan):
    "For a whole volume."
    net, volume = ready(build_network(plan, 0), plan), read_case(task.cases[0])
    if ON_GPU:
        predict(net, volume, plan)  # the first call compiles and chooses kernels
    start = perf_counter()
    predict(net, volume, plan)
    return perf_counter() - start


@pytest.mark.parametrize("network", NETWORKS)
def test_memory_first_step_inference(benchmark, task, network):
    plan = PLANS[network]

    def measure():
        found = {"memory of a step, GB": memory(network), "planned, GB": training_memory(plan)}
        found["first step, s"] = seconds_to_first_step(task, plan)
        found["inference, s/volume"] = seconds_of_inference(task, plan)
        for row in LOOP:
            if row["network"] == network:
                row.update(found)

    benchmark.pedantic(measure, rounds=1, iterations=1)


def memory(network):
    "What three steps take at most above what was there before, GB; on a CPU in a process of its own."
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        three_steps(PLANS[network])
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    code = f"from bench_training import *; three_steps({PLANS[network]!r})"
    here = os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here)
    return float(done.stdout.split()[-1])


def peak():
    "The most memory that this process has had so far, kB; of Linux alone."
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1])


def three_steps(plan):
    "Makes three steps, and prints on a CPU how many GB they took above what was there before."
    x = torch.randn(plan.batch, 1, *plan.patch, device=device())
    passes = forward_backward(plan, x, (x > 2).float())
    before = 0 if ON_GPU else peak()
    for _ in range(3):
        passes()
    if not ON_GPU:
        print((peak() - before) * 1024 / 1e9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", ["unet", "dynunet"])
def test_ways_of_computing(benchmark, task, data, network, way):
    plan = replace(PLANS[network], **WAYS[way])
    n = 30 if network == "unet" or ON_GPU else 6

    def measure():
        passes = forward_backward(plan, *first_batch(task, data, plan))
        WAY.append({"network": network, "way": way, "seconds": seconds(passes, n)})

    benchmark.pedantic(measure, rounds=1, iterations=1)


def test_table():
    "Prints the tables and keeps them for the page on benchmarks."
    loop, way = pd.DataFrame(LOOP), pd.DataFrame(WAY)
    loop.insert(4, "loop / alone", loop["loop, steps/s"] / loop["forward + backward alone, steps/s"])
    way["speed over float32"] = way.groupby("network").seconds.transform("first") / way.seconds
    on_cpu = f"{processor()}, {torch.get_num_threads()} threads"
    loop["device"] = torch.cuda.get_device_name(0) if ON_GPU else on_cpu
    loop["patch"], loop["batch"] = "x".join(map(str, PATCH)), PLANS["unet"].batch
    print(f"\n{loop.round(3).T.to_string()}\n\n{way.round(4).to_string()}")
    keep(loop.round(4), "bench_training")
    keep(way.round(4), "bench_training_ways")
