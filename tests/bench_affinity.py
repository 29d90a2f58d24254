"""`make bench`: how long the affinity of the paper's sources takes, against reading their files and against the paper's own loop over pairs.

Everything is measured in one run with the same cores, on phantom volumes of the size of FeTS 2022 (SEQTRANSFER_BENCH_SIZE for another); what is printed are ratios. Nothing is asserted."""
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from time import perf_counter

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from joblib import Parallel, cpu_count, delayed
from scipy.stats import wasserstein_distance
from skimage.transform import resize as sk_resize
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from seqtransfer import tasks
from seqtransfer.affinity import affinity, sampled
from seqtransfer.core import cache_folder, code_digest, digest
from seqtransfer.datasets import FETS_SOURCES, read_fets
from seqtransfer.similarity.image import image_signature, tissue
from seqtransfer.similarity.label import label_signature
from seqtransfer.similarity.object import object_signature, shell
from seqtransfer.tasks import case_masks, read_image, read_labels, spacing_of
from seqtransfer.zoo import write_zoo

SIZE = tuple(map(int, os.environ.get("SEQTRANSFER_BENCH_SIZE", "240x240x155").split("x")))
CASES, PAIRS = 10, 8  # of each institution; pairs of the literal loop that are timed
RECORDS = Path(__file__).parent.parent / "nbs" / "records"
KEPT = cache_folder()  # the user's own, where the volumes wait for the next run; tests have another
SECONDS, PARTS = {}, {}


@pytest.fixture(scope="module")
def pool():
    "84 tasks of seven institutions."
    name = f"phantom-bench-{digest(SIZE, CASES, code_digest('core', 'phantom', 'zoo'))}"
    return read_fets(write_zoo(KEPT / name, "fets2022", SIZE, CASES), FETS_SOURCES)


def measured(benchmark, name, f, rounds=1, setup=None):
    "Times `f` and keeps the shortest round."
    benchmark.pedantic(f, setup=setup, rounds=rounds, iterations=1)
    SECONDS[name] = benchmark.stats.stats.min


@pytest.fixture
def cold(monkeypatch):
    "An empty cache before each round, and no digest of a file remembered."
    def setup():
        monkeypatch.setenv("SEQTRANSFER_CACHE", tempfile.mkdtemp())
        tasks._whole.cache_clear()
    return setup


AGAIN = """
import sys, time
from seqtransfer.affinity import affinity
from seqtransfer.datasets import FETS_SOURCES, read_fets
pool = read_fets(sys.argv[1], FETS_SOURCES)
start = time.perf_counter()
affinity(pool, sys.argv[2], cases=int(sys.argv[3]), device=sys.argv[4])
print(time.perf_counter() - start)
"""


def files_of(pool):
    cases = {c for t in pool for c in t.cases}
    return sorted({c.image for c in cases}), sorted({c.mask for c in cases})


def read(file): return np.asanyarray(nib.load(file).dataobj).shape


@pytest.mark.parametrize("way", ["threads", "processes"])
def test_nibabel_reads_the_files(benchmark, pool, way):
    files = [f for part in files_of(pool) for f in part]
    def all_of_them():
        if way == "processes": return Parallel(cpu_count(), batch_size=8)(delayed(read)(f) for f in files)
        with ThreadPoolExecutor(cpu_count()) as threads: return list(threads.map(read, files))
    all_of_them()  # every file is in the memory of the operating system from here on, and processes are up
    measured(benchmark, f"nibabel reads the files, {way}", all_of_them, rounds=3)


DEVICES = ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]  # on a GPU, the same rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode,name", [("default", "affinity, quantiles"), ("paper", "affinity, exact")])
def test_affinity_from_the_files(benchmark, pool, cold, mode, name, device):
    name += "" if device == "cpu" else f", {device}"
    measured(benchmark, name, lambda: affinity(pool, mode, cases=CASES, device=device), rounds=3 if mode == "default" else 1, setup=cold)
    folder = next(p for p in pool.tasks[0].cases[0].image.parents if (p / "zoo.json").exists())
    again = subprocess.run([sys.executable, "-c", AGAIN, folder, mode, str(CASES), device], check=True, capture_output=True, text=True)  # the last round has filled the cache
    SECONDS[f"{name}, from the cache, another process"] = float(again.stdout.splitlines()[-1])


def paper_image_pair(a, b):
    "One pair of volumes, as published: both are read, resized and decomposed for it (Yang et al. 2024, section 3.1)."
    scores = []
    for f in (a, b):
        small = sk_resize(np.asanyarray(nib.load(f).dataobj).astype(float), (128,) * 3, anti_aliasing=True)
        scores.append(PCA(n_components=0.75, svd_solver="full").fit_transform(small.reshape(-1, 128)).ravel())
    return wasserstein_distance(*scores)


def paper_mask_pair(a, b, value):
    "One pair of masks, as published (section 3.2)."
    x, y = (sk_resize((np.asanyarray(nib.load(f).dataobj) == value).astype(float), (128,) * 3, anti_aliasing=True) >= 0.5 for f in (a, b))
    x, y = x.astype(float), y.astype(float)
    c, cov = 0.09, ((x - x.mean()) * (y - y.mean())).mean()
    return (2 * x.mean() * y.mean() + c) * (2 * cov + c) / ((x.mean()**2 + y.mean()**2 + c) * (x.var() + y.var() + c))


def pairs_in_all(groups):
    "Pairs of cases in the paper's way: same patients within an institution, all pairs across."
    return sum(CASES if a == b else CASES**2 for a, b in combinations(groups, 2))


def test_the_loop_over_pairs(benchmark, pool):
    images, masks = files_of(pool)
    rng = np.random.default_rng(0)
    sites = [t.site for t in pool]
    wanted = {"images": (images, pairs_in_all(sorted(s for s in set(sites) for _ in range(4))), delayed(paper_image_pair), ()),
              "masks": (masks, pairs_in_all(sorted(s for s in set(sites) for _ in range(3))), delayed(paper_mask_pair), (2,))}
    def loop():
        SECONDS["the paper's loop over pairs, extrapolated"] = 0.0
        with threadpool_limits(1):
            for kind, (files, count, pair, more) in wanted.items():
                some = [rng.choice(files, 2, replace=False) for _ in range(PAIRS)]
                Parallel(cpu_count())(pair(*some[0], *more) for _ in range(cpu_count()))  # processes are up and have imported
                start = perf_counter()
                Parallel(cpu_count())(pair(*p, *more) for p in some)
                PARTS[f"the paper's loop, a pair of {kind} (core seconds)"] = (perf_counter() - start) / PAIRS * cpu_count()
                SECONDS["the paper's loop over pairs, extrapolated"] += (perf_counter() - start) / PAIRS * count
    benchmark.pedantic(loop, rounds=1, iterations=1)


def test_where_the_time_goes(benchmark, pool):
    s = sampled(pool, 1)
    group = [c for chosen in s.cases for c in chosen if c.mask == s.cases[0][0].mask]
    def parts():
        took = {}
        def step(name, f):
            start = perf_counter(); out = f(); took[name] = took.get(name, 0) + perf_counter() - start
            return out
        labels, affine = step("read the label map", lambda: read_labels(group[0].mask))
        masks = {c.labels: c for c in group}
        around = {v: step("masks: box, shell, common grid", lambda: mask_parts(c, labels, affine)) for v, c in masks.items()}
        for image in dict.fromkeys(c.image for c in group):
            x = step("read the images", lambda: read_image(next(c for c in group if c.image == image), labels, affine))
            t = step("images: foreground", lambda: tissue(x))
            step("images: resize, components, quantiles", lambda: image_signature(x, part=t))
            for found in around.values(): step("objects: intensities in mask and shell", lambda: object_signature(t, found))
        for k, v in took.items(): PARTS[k] = min(PARTS.get(k, np.inf), v)
    with threadpool_limits(1): benchmark.pedantic(parts, rounds=5, iterations=1)


def mask_parts(case, labels, affine):
    mask, ignored = case_masks(case, labels)
    found = shell(mask, ignored, spacing_of(affine))
    label_signature(found[1], box=found[0], size=mask.shape)
    return found


def test_ratios():
    "Prints the table and keeps it for the page on benchmarks."
    table = pd.Series(SECONDS, name="seconds").to_frame()
    read, loop = table.seconds.filter(like="nibabel").min(), table.seconds.filter(like="loop").min()  # the faster way of reading
    table["over reading"], table["loop over it"] = table.seconds / read, loop / table.seconds
    table["volumes"], table["cores"], table["processor"] = "x".join(map(str, SIZE)), cpu_count(), ", ".join([processor(), *(["and " + torch.cuda.get_device_name(0)] if len(DEVICES) > 1 else [])])
    parts = pd.Series(PARTS, name="seconds")
    print(f"\n{table.drop(columns='processor').round(3).to_string()}\n\none patient, four modalities, three labels, one core:\n{parts.round(4).to_string()}")
    keep(table.rename_axis("what").reset_index().round(4), "bench_affinity")
    keep(parts.rename_axis("what").reset_index().round(5), "bench_affinity_parts")


def keep(table, name):
    "Writes a table for the page on benchmarks if that is asked for: RECORD=1 for the page's own machine, RECORD=h200, say, for the tables of another beside it."
    of = os.environ.get("SEQTRANSFER_BENCH_RECORD")
    if of: table.to_csv(RECORDS / f"{name}{'' if of == '1' else '_' + of}.csv", index=False)


def processor():
    "The name of the processor, where the system tells it."
    try: return next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration): return platform.processor() or platform.machine()
