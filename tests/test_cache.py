"""The cache of signatures: nothing but time depends on it, whatever happens to it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from conftest import COMMAND, seqtransfer

from seqtransfer.affinity import Affinity, affinity
from seqtransfer.datasets import read_pool
from seqtransfer.similarity import signature


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A cache of its own."
    monkeypatch.setenv("SEQTRANSFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "signatures"


@pytest.fixture(scope="module")
def expected(zoo):
    return affinity(read_pool(zoo), keep=False)


def same(a, b):
    "Whether two affinities have the same terms to the last bit, under resampled patients too."
    for t in a.terms:
        if not np.array_equal(a.terms[t], b.terms[t], equal_nan=True):
            return False
        if not np.array_equal(a.replicates[t], b.replicates[t], equal_nan=True):
            return False
    return True


def files(folder):
    return sorted(f for f in folder.rglob("*") if f.is_file())


def unread(monkeypatch):
    "From here on no volume can be opened."
    monkeypatch.setattr(signature, "read_labels", lambda path: pytest.fail(f"{path} was read"))


def test_the_second_time_nothing_is_read(zoo, folder, expected, monkeypatch):
    assert same(affinity(read_pool(zoo)), expected)
    unread(monkeypatch)
    assert same(affinity(read_pool(zoo)), expected)
    assert not list(zoo.rglob("*.safetensors"))


def test_a_changed_file_is_read_again(zoo, folder, tmp_path, monkeypatch):
    import shutil
    import nibabel as nib

    copied = shutil.copytree(zoo, tmp_path / "zoo")
    first = affinity(read_pool(copied))
    file = next(copied.rglob("*_0000.nii.gz"))
    img = nib.load(file)
    when = file.stat()
    nib.save(nib.Nifti1Image(np.asanyarray(img.dataobj)[::-1].copy(), img.affine), file)
    os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns + 1))
    second = affinity(read_pool(copied))
    assert not same(second, first)
    assert same(second, affinity(read_pool(copied), keep=False))


def test_a_pair_is_known_by_header_and_voxels_whichever_is_named(folder, tmp_path):
    import nibabel as nib
    from seqtransfer.similarity.signature import Manner, signature_name, signatures
    from seqtransfer.tasks import Case

    x = np.zeros((12, 12, 12))
    x[3:9, 3:9, 3:9] = np.random.default_rng(0).random((6, 6, 6))
    volumes = {}
    for spacing in (1, 2):
        for name, data in (("image", x.astype(np.float32)), ("mask", (x > 0).astype(np.uint8))):
            nib.save(nib.Nifti1Pair(data, np.diag([spacing] * 3 + [1.0])), tmp_path / f"{name}.img")
        case = Case("p", tmp_path / "image.img", tmp_path / "mask.img", (1,))
        assert {f.name for f in case.files} == {"image.hdr", "image.img", "mask.hdr", "mask.img"}
        volumes[spacing] = signatures([case]).labels[case.mask_key].volume
    assert volumes == {1: 216, 2: 8 * 216}


def spoiled(content, harm, folder):
    "What is left of a file of the cache after some harm."
    version = signature.SignatureCache().version.encode()
    contents = [f.read_bytes() for f in files(folder)]
    ways = {
        "cut": content[: len(content) // 2],
        "emptied": b"",
        "garbage": os.urandom(4000),
        "version": content.replace(version, b"0" * 16),
        "other kind": next(other for other in contents if len(other) != len(content)),
    }
    return ways[harm]


@pytest.mark.parametrize("harm", ["cut", "emptied", "garbage", "version", "other kind"])
def test_a_file_that_is_no_use_is_named_and_made_again(zoo, folder, expected, monkeypatch, harm):
    affinity(read_pool(zoo))
    one = files(folder)[0]
    content = one.read_bytes()
    one.write_bytes(spoiled(content, harm, folder))
    assert one.read_bytes() != content
    with pytest.warns(UserWarning, match=one.name):
        assert same(affinity(read_pool(zoo)), expected)
    assert one.read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unread(monkeypatch)
        affinity(read_pool(zoo))


def test_a_cache_that_cannot_be_written_is_said_and_done_without(zoo, folder, tmp_path, expected, monkeypatch):
    folder.parent.mkdir()
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="not kept"):
        assert same(affinity(read_pool(zoo)), expected)
    monkeypatch.setenv("SEQTRANSFER_CACHE", str(folder / "deeper"))
    with pytest.warns(UserWarning, match="not kept"):
        assert same(affinity(read_pool(zoo)), expected)


def _work(zoo, queue):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        queue.put(affinity(read_pool(zoo)).distance)


def test_two_processes_write_one_cache(zoo, folder, expected, monkeypatch):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    both = [context.Process(target=_work, args=(zoo, queue)) for _ in range(2)]
    for p in both:
        p.start()
    results = [queue.get(timeout=120) for _ in both]
    for p in both:
        p.join()
    assert all(np.array_equal(r, expected.distance) for r in results)
    unread(monkeypatch)
    assert same(affinity(read_pool(zoo)), expected)
    assert not list(folder.rglob(".part-*"))


def whole_files(folder):
    "The signatures that are complete."
    return [f for f in files(folder) if f.suffix == ".safetensors" and not f.name.startswith(".part")]


def killed_after_the_first_file(command, folder):
    "kill -9 once a whole file is in a folder."
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    deadline = time.monotonic() + 120
    while not whole_files(folder) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_and_started_again(zoo, folder, expected, tmp_path):
    "The same command goes on with the signatures that are there and ends with the same table."
    table = tmp_path / "a.csv"
    killed_after_the_first_file([*COMMAND, "affinity", str(zoo), "--out", str(table)], folder)
    before = {f: f.stat().st_mtime_ns for f in whole_files(folder)}
    assert before
    assert seqtransfer("affinity", zoo, "--out", table).returncode == 0
    assert all(f.stat().st_mtime_ns == when for f, when in before.items())
    assert np.array_equal(Affinity.load(table).distance, expected.distance)


def test_the_command_shows_it(zoo, folder):
    affinity(read_pool(zoo))
    shown = seqtransfer("cache", "--json")
    rows = {r["what"]: r for r in json.loads(shown.stdout)}
    row = rows["signatures of volumes"]
    assert row["files"] == len(files(folder))
    assert row["MB"] == pytest.approx(sum(f.stat().st_size for f in files(folder)) / 1e6)


def test_the_command_empties_it_and_leaves_the_rest(zoo, folder):
    affinity(read_pool(zoo))
    (folder.parent / "mine.txt").write_text("not a part of it")
    cleared = seqtransfer("cache", "--clear")
    assert cleared.returncode == 0
    assert "deleted" in cleared.stderr
    assert not files(folder)
    assert (folder.parent / "mine.txt").exists()
