"""The tables of `make evidence` grow from run to run: no cell is lost, none is doubled, and no patient is named."""

import shutil
import sys

import pandas as pd
import pytest
from conftest import ROOT

from seqtransfer.core import write_json


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    "The script, which keeps its tables in a folder of the test."
    monkeypatch.syspath_prepend(ROOT / "nbs" / "records")
    import evidence

    monkeypatch.setattr(evidence, "RECORDS", tmp_path / "records")
    (tmp_path / "records").mkdir()
    shutil.copy(ROOT / "nbs" / "records" / "evidence.yaml", tmp_path / "records")
    yield evidence
    sys.modules.pop("evidence", None)


def carried(evidence, asked, cell, out, dice):
    "What a finished cell leaves."
    about = {"pool": cell.pool, "target": cell.target, "seed": cell.seed, "code": "c"}
    row = pd.DataFrame([{"patient": "IBSR/name of a patient", "dice": dice, **about}])
    for file in evidence.parts_of(cell, asked, out).values():
        file.parent.mkdir(parents=True, exist_ok=True)
        row.to_parquet(file, index=False)


def kept(evidence):
    "Cell -> Dice, in the tables that were kept."
    table = pd.read_parquet(evidence.RECORDS / "evidence" / "runs.parquet")
    return dict(zip(evidence.cell_names(table), table.dice))


def test_tables_grow(evidence, tmp_path):
    asked, (first, second, *_) = evidence.read_asked(), evidence.cells_of(evidence.read_asked())
    cells = [first, second]
    carried(evidence, asked, first, tmp_path / "monday", 0.5)
    evidence.keep(cells, asked, tmp_path / "monday")
    assert kept(evidence) == {str(first): 0.5}
    carried(evidence, asked, second, tmp_path / "tuesday", 0.25)
    evidence.keep(cells, asked, tmp_path / "tuesday")
    assert kept(evidence) == {str(first): 0.5, str(second): 0.25}
    carried(evidence, asked, first, tmp_path / "wednesday", 0.75)  # asked for by name
    evidence.keep(cells, asked, tmp_path / "wednesday")
    assert kept(evidence) == {str(first): 0.75, str(second): 0.25}
    evidence.keep(cells, asked, tmp_path / "thursday")  # nothing was done
    assert kept(evidence) == {str(first): 0.75, str(second): 0.25}


def test_no_patient_is_named(evidence, tmp_path):
    asked = evidence.read_asked()
    cell = evidence.cells_of(asked)[0]
    carried(evidence, asked, cell, tmp_path / "out", 0.5)
    evidence.keep([cell], asked, tmp_path / "out")
    for file in (evidence.RECORDS / "evidence").glob("*.parquet"):
        assert "name of a patient" not in pd.read_parquet(file).to_csv()


def test_another_question_begins_anew(evidence, tmp_path):
    asked = evidence.read_asked()
    cell = evidence.cells_of(asked)[0]
    carried(evidence, asked, cell, tmp_path / "out", 0.5)
    evidence.keep([cell], asked, tmp_path / "out")
    assert set(evidence.kept_before(asked)) == set(evidence.TABLES)
    assert evidence.kept_before({**asked, "shots": 4}) == {}
    write_json(evidence.RECORDS / "evidence" / "run.json", {"asked": "something else"})
    assert evidence.kept_before(asked) == {}


def test_the_tables_that_are_committed_answer_what_is_asked(evidence, monkeypatch):
    monkeypatch.setattr(evidence, "RECORDS", ROOT / "nbs" / "records")
    before = evidence.kept_before(evidence.read_asked())
    wanted = set(map(str, evidence.cells_of(evidence.read_asked())))
    for table in before.values():
        assert set(evidence.cell_names(table)) <= wanted
    cells = {name: set(evidence.cell_names(table)) for name, table in before.items()}
    assert cells["runs"] == cells["distances"] >= cells["held-out"]
