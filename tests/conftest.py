"What several tests share: a small phantom zoo, the real data where they are, the command line as a stranger uses it."

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent
COMMAND = sys.executable, "-c", "from seqtransfer.cli import main; main()"

# The same examples at every run, so that what passes here passes elsewhere;
# `--hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    "Tests neither use nor fill the user's cache."
    os.environ["SEQTRANSFER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    "Six data sets of five phantom patients, 24 voxels a side."
    from seqtransfer.zoo import write_zoo

    return write_zoo(tmp_path_factory.mktemp("phantom") / "zoo", size=24, cases=5)


@pytest.fixture(scope="session")
def realdata():
    "The folder of real MRI, named by SEQTRANSFER_REALDATA."
    folder = Path(os.environ.get("SEQTRANSFER_REALDATA", ROOT.parent / "shared" / "realdata"))
    if not folder.is_dir():
        pytest.skip(f"no real MRI at {folder}: set SEQTRANSFER_REALDATA to a folder of nnU-Net data sets")
    return folder.resolve()


def seqtransfer(*args, cwd=None, timeout=300, **env):
    "Runs the command line in a process of its own."
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout,
        env={**os.environ, "COLUMNS": "200", **env},
    )
