"""`make bench`: how long the affinity of the paper's sources takes, against reading files and the paper's own loop.

Everything is measured in one run with the same cores, on phantom volumes of the size of FeTS 2022
(SEQTRANSFER_BENCH_SIZE for another). What is printed are ratios. Nothing is asserted."""

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
    "Images and masks."
    cases = {c for t in pool for c in t.cases}
    return sorted({c.image for c in cases}), sorted({c.mask for c in cases})


def read(file):
    return np.asanyarray(nib.load(file).dataobj).shape


@pytest.mark.parametrize("way", ["threads", "processes"])
def test_nibabel_reads_the_files(benchmark, pool, way):
    files = [f for part in files_of(pool) for f in part]

    def all_of_them():
        if way == "processes":
            return Parallel(cpu_count(), batch_size=8)(delayed(read)(f) for f in files)
        with ThreadPoolExecutor(cpu_count()) as threads:
            return list(threads.map(read, files))

    all_of_them()  # every file is in the memory of the operating system from here on, and processes are up
    measured(benchmark, f"nibabel reads the files, {way}", all_of_them, rounds=3)


DEVICES = ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]  # on a GPU, the same rows


def seconds_again(folder, mode, device):
    "How long another process takes, which finds everything in the cache."
    command = [sys.executable, "-c", AGAIN, folder, mode, str(CASES), device]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode,name", [("default", "affinity, quantiles"), ("paper", "affinity, exact")])
def test_affinity_from_the_files(benchmark, pool, cold, mode, name, device):
    name += "" if device == "cpu" else f", {device}"
    rounds = 3 if mode == "default" else 1

    def computed():
        affinity(pool, mode, cases=CASES, device=device)

    measured(benchmark, name, computed, rounds, setup=cold)
    folder = next(p for p in pool.tasks[0].cases[0].image.parents if (p / "zoo.json").exists())
    SECONDS[f"{name}, from the cache, another process"] = seconds_again(folder, mode, device)


def paper_image_pair(a, b):
    "One pair of volumes, as published: both are read, resized and decomposed for it (Yang et al. 2024, section 3.1)."
    scores = []
    for f in (a, b):
        volume = np.asanyarray(nib.load(f).dataobj).astype(float)
        small = sk_resize(volume, (128,) * 3, anti_aliasing=True).reshape(-1, 128)
        scores.append(PCA(n_components=0.75, svd_solver="full").fit_transform(small).ravel())
    return wasserstein_distance(*scores)


def paper_mask_pair(a, b, value):
    "One pair of masks, as published (section 3.2)."
    grids = []
    for f in (a, b):
        mask = (np.asanyarray(nib.load(f).dataobj) == value).astype(float)
        grids.append((sk_resize(mask, (128,) * 3, anti_aliasing=True) >= 0.5).astype(float))
    x, y = grids
    c, cov = 0.09, ((x - x.mean()) * (y - y.mean())).mean()
    numerator = (2 * x.mean() * y.mean() + c) * (2 * cov + c)
    return numerator / ((x.mean() ** 2 + y.mean() ** 2 + c) * (x.var() + y.var() + c))


def pairs_in_all(sites, each):
    "Pairs of cases in the paper's way, of `each` groups of cases a site: same patients within it, all pairs across."
    groups = sorted(site for site in set(sites) for _ in range(each))
    return sum(CASES if a == b else CASES**2 for a, b in combinations(groups, 2))


def seconds_of_pairs(pair, files, *more):
    "How long a loop over some pairs of files takes on all cores, for one pair."
    rng = np.random.default_rng(0)
    some = [rng.choice(files, 2, replace=False) for _ in range(PAIRS)]
    warm_up = [some[0]] * cpu_count()  # processes are up and have imported
    Parallel(cpu_count())(delayed(pair)(*files, *more) for files in warm_up)
    start = perf_counter()
    Parallel(cpu_count())(delayed(pair)(*files, *more) for files in some)
    return (perf_counter() - start) / PAIRS


def test_the_loop_over_pairs(benchmark, pool):
    images, masks = files_of(pool)
    sites = [t.site for t in pool]

    def loop():
        with threadpool_limits(1):
            image, mask = seconds_of_pairs(paper_image_pair, images), seconds_of_pairs(paper_mask_pair, masks, 2)
        PARTS["the paper's loop, a pair of images (core seconds)"] = image * cpu_count()
        PARTS["the paper's loop, a pair of masks (core seconds)"] = mask * cpu_count()
        whole = image * pairs_in_all(sites, 4) + mask * pairs_in_all(sites, 3)  # modalities and labels
        SECONDS["the paper's loop over pairs, extrapolated"] = whole

    benchmark.pedantic(loop, rounds=1, iterations=1)


def steps_of(group):
    "Seconds that each step takes for the cases of one label map."
    took = {}

    def step(name, work, *args, **kwargs):
        start = perf_counter()
        out = work(*args, **kwargs)
        took[name] = took.get(name, 0) + perf_counter() - start
        return out

    labels, affine = step("read the label map", read_labels, group[0].mask)
    masks = {c.labels: c for c in group}.values()
    around = [step("masks: box, shell, common grid", mask_parts, c, labels, affine) for c in masks]
    images = {}
    for c in group:
        images.setdefault(c.image, c)
    for case in images.values():
        x = step("read the images", read_image, case, labels, affine)
        t = step("images: foreground", tissue, x)
        step("images: resize, components, quantiles", image_signature, x, part=t)
        for found in around:
            step("objects: intensities in mask and shell", object_signature, t, found)
    return took


def test_where_the_time_goes(benchmark, pool):
    s = sampled(pool, 1)
    group = [c for chosen in s.cases for c in chosen if c.mask == s.cases[0][0].mask]

    def parts():
        for name, seconds in steps_of(group).items():
            PARTS[name] = min(PARTS.get(name, np.inf), seconds)

    with threadpool_limits(1):
        benchmark.pedantic(parts, rounds=5, iterations=1)


def mask_parts(case, labels, affine):
    "What surrounds a mask; its signature is made on the way."
    mask, ignored = case_masks(case, labels)
    found = shell(mask, ignored, spacing_of(affine))
    label_signature(found.mask, box=found.box, size=mask.shape)
    return found


def machine():
    "The names of what everything ran on."
    return f"{processor()}, and {torch.cuda.get_device_name(0)}" if len(DEVICES) > 1 else processor()


def test_ratios():
    "Prints the table and keeps it for the page on benchmarks."
    table = pd.Series(SECONDS, name="seconds").to_frame()
    reading = table.seconds.filter(like="nibabel").min()  # the faster way of it
    loop = table.seconds.filter(like="loop").min()
    table["over reading"], table["loop over it"] = table.seconds / reading, loop / table.seconds
    table["volumes"], table["cores"], table["processor"] = "x".join(map(str, SIZE)), cpu_count(), machine()
    parts = pd.Series(PARTS, name="seconds")
    print("", table.drop(columns="processor").round(3).to_string(), "", sep="\n")
    print("one patient, four modalities, three labels, one core:", parts.round(4).to_string(), sep="\n")
    keep(table.rename_axis("what").reset_index().round(4), "bench_affinity")
    keep(parts.rename_axis("what").reset_index().round(5), "bench_affinity_parts")


def keep(table, name):
    """Writes a table for the page on benchmarks if that is asked for: RECORD=1 for the page's own machine, RECORD=h200,
    say, for the tables of another beside it."""
    of = os.environ.get("SEQTRANSFER_BENCH_RECORD")
    if of:
        ending = "" if of == "1" else f"_{of}"
        table.to_csv(RECORDS / f"{name}{ending}.csv", index=False)


def processor():
    "The name of the processor, where the system tells it."
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
