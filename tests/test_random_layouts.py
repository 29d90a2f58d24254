"Random valid folders of each layout hold exactly what was written into them; damage to one file of them is named, or stray files change nothing."
import csv
import gzip
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from seqtransfer.core import InputError
from seqtransfer.datasets import read_fets, read_manifest, read_pool, validate
from seqtransfer.tasks import Case, read_case

# What names become in a task's name, by hand: all but letters, digits and dots is an underscore, none at the ends.
WORDS = {"Ulm": "Ulm", "São Paulo": "S_o_Paulo", "Philips_VU .PETMR_01.": "Philips_VU_.PETMR_01", "Amsterdam/GE3T": "Amsterdam_GE3T",
         "Amsterdam/GE1T5": "Amsterdam_GE1T5",
         "Amsterdam/Philips_VU .PETMR_01.": "Amsterdam_Philips_VU_.PETMR_01", "16": "16", "NA": "NA", "Lyon, north": "Lyon_north", "": ""}
MODALITIES = {"T1": "T1", "T1 (Gd)": "T1_Gd", "FLAIR": "FLAIR", "b=1000": "b_1000"}
LABELS = {"lesion": "lesion", "grey-matter": "grey_matter", "1st core": "1st_core", "Ödem 2": "dem_2"}
PATIENTS = ["7", "007", "p 1", "sub-02", "x.y", "a_0000", "NaN", "1e3"]
FETS = {"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "FLAIR"}
WMH = ["Utrecht", "Singapore", "Amsterdam/GE3T", "Amsterdam/GE1T5", "Amsterdam/Philips_VU .PETMR_01."]


@dataclass
class Study:
    "What was written: the voxels of each case by where its image lies, and what each file is."
    root: Path
    layout: str
    tasks: dict = field(default_factory=dict)  # (site, modality, label) -> {(image file, channel or None): (patient, image, label map, values)}
    ignore: int | None = None
    kinds: dict = field(default_factory=dict)  # file -> image, mask or table


def orient(x, rng):
    "The array of a volume in a random storage order and the matrix that says so; `x` lies in canonical order."
    grid = np.array([[2.0, 0, 0, -9], [0, 1.5, 0, -5], [0, 0, 3, 4], [0, 0, 0, 1]])
    axes = [*rng.permutation(3)]
    x, grid = x.transpose(*axes, *range(3, x.ndim)), grid[:, [*axes, 3]]
    for a in np.flatnonzero(rng.integers(2, size=3)):
        grid[:3, 3] += grid[:3, a] * (x.shape[a] - 1)
        grid[:3, a] *= -1
        x = np.flip(x, a)
    return x, grid


def write(study, file, x, kind, rng):
    file.parent.mkdir(parents=True, exist_ok=True)
    stored, grid = orient(x, rng)
    if rng.integers(2) and x.ndim == 3: stored = stored[..., None]  # a trailing axis of 1
    (nib.Nifti1Pair if file.suffix == ".hdr" else nib.Nifti1Image)(stored, grid).to_filename(file)
    for f in (file, *[file.with_suffix(".img")] * (file.suffix == ".hdr")): study.kinds[f] = kind


def label_map(shape, values, rng):
    "Background in the first corner, every value somewhere."
    y = rng.choice([0, *values], shape)
    y.flat[:len(values) + 1] = [0, *values]
    return y.astype(rng.choice([np.float32, np.int16]))


def written(study, masks, images, labels, rng, shape):
    "Writes a patient's files: `masks` (patient, site, file), `images` {modality: file}, `labels` {name: values, empty for all but 0}."
    patient, site, mask = masks
    values = {v for some in labels.values() for v in some} or {1, 3}
    y = label_map(shape, sorted(values | ({study.ignore} if study.ignore else set())), rng)
    write(study, mask, y, "mask", rng)
    channels = len(set(images.values())) < len(images)
    xs = {m: rng.integers(1, 4000, shape).astype(rng.choice([np.float32, np.int16])) for m in images}
    if channels: write(study, next(iter(images.values())), np.stack([*xs.values()], -1), "image", rng)
    for i, (m, file) in enumerate(images.items()):
        if not channels: write(study, file, xs[m], "image", rng)
        for name, some in labels.items():
            study.tasks.setdefault((site, m, name), {})[file, i if channels else None] = (patient, xs[m], y, some)


def table(study, file, text):
    file.write_bytes(text.encode())
    study.kinds[file] = "table"


def fets(study, draw, rng, shape):
    folder = study.root / "MICCAI_FeTS2022_TrainingData"
    numbers = draw(st.lists(st.integers(0, 99999), min_size=1, max_size=4, unique=True))
    rows = [(draw(st.sampled_from([1, 4, 16, 23])), f"FeTS2022_{n:05}") for n in numbers]
    for site, p in rows:
        written(study, (p, str(site), folder / p / f"{p}_seg.nii.gz"), {to: folder / p / f"{p}_{m}.nii.gz" for m, to in FETS.items()},
                {"NCR": (1,), "ED": (2,), "ET": (4,)}, rng, shape)
    table(study, folder / "partitioning_1.csv", "Partition_ID,Subject_ID\r\n" + "".join(f"{site},{p}\r\n" for site, p in rows))


def iseg(study, draw, rng, shape):
    folder, end = study.root / "iSeg-2019-Training", draw(st.sampled_from([".hdr", ".nii", ".nii.gz"]))
    for n in draw(st.lists(st.integers(1, 23), min_size=1, max_size=4, unique=True)):
        written(study, (f"subject-{n}", "", folder / f"subject-{n}-label{end}"), {m: folder / f"subject-{n}-{m}{end}" for m in ("T1", "T2")},
                {"CSF": (10,), "GM": (150,), "WM": (250,)}, rng, shape)


def wmh(study, draw, rng, shape):
    study.ignore = 2
    for part in draw(st.sampled_from([("training",), ("training", "test")])):
        for site in draw(st.lists(st.sampled_from(WMH), min_size=1, max_size=3, unique=True)):
            for n in draw(st.lists(st.integers(0, 160), min_size=1, max_size=2, unique=True)):
                folder = study.root / part / site / str(n)
                written(study, (str(folder), site, folder / "wmh.nii.gz"), {m: folder / "pre" / f"{m}.nii.gz" for m in ("T1", "FLAIR")},
                        {"WMH": (1,)}, rng, shape)


def named_labels(draw):
    names = draw(st.lists(st.sampled_from([*LABELS]), min_size=1, max_size=3, unique=True))
    return {name: (i + 1,) for i, name in enumerate(names)}


def drawn(draw, names, most):
    return draw(st.lists(st.sampled_from([*names]), min_size=1, max_size=most, unique=True))


def nnunet(study, draw, rng, shape):
    folder, end = study.root / "Dataset042_My-Brain", draw(st.sampled_from([".nii.gz", ".nii"]))
    labels, modalities = named_labels(draw), drawn(draw, MODALITIES, 3)
    told = {"background": 0, **{k: v[0] for k, v in labels.items()}}
    if draw(st.booleans()): labels["whole"] = told["whole"] = [*range(1, len(labels) + 1)]
    if draw(st.booleans()): study.ignore = told["ignore"] = max(map(np.max, told.values())).item() + 1
    for p in drawn(draw, PATIENTS, 4):
        written(study, (p, "", folder / "labelsTr" / f"{p}{end}"), {m: folder / "imagesTr" / f"{p}_{i:04}{end}" for i, m in enumerate(modalities)},
                labels, rng, shape)
    table(study, folder / "dataset.json", json.dumps({"channel_names": {str(i): m for i, m in enumerate(modalities)}, "labels": told, "file_ending": end}))


def msd(study, draw, rng, shape):
    folder = study.root / "Task07_My-Brain"
    labels, modalities, patients = named_labels(draw), drawn(draw, MODALITIES, 3), drawn(draw, PATIENTS, 4)
    for p in patients:
        written(study, (p, "", folder / "labelsTr" / f"{p}.nii.gz"), {m: folder / "imagesTr" / f"{p}.nii.gz" for m in modalities}, labels, rng, shape)
    table(study, folder / "dataset.json", json.dumps({
        "modality": {str(i): m for i, m in enumerate(modalities)}, "labels": {"0": "background", **{str(v[0]): k for k, v in labels.items()}},
        "training": [{"image": f"./imagesTr/{p}.nii.gz", "label": f"./labelsTr/{p}.nii.gz"} for p in patients]}))


def manifest(study, draw, rng, shape):
    labels, modalities = named_labels(draw), drawn(draw, MODALITIES, 2)
    valued = len(labels) > 1 or draw(st.booleans())
    if not valued: labels = {k: () for k in labels}
    rows = []
    for p in drawn(draw, PATIENTS, 4):
        site = draw(st.sampled_from([*WORDS]))
        images = {m: study.root / "scans" / f"{p} {i}.nii.gz" for i, m in enumerate(modalities)}
        mask = study.root / "masks" / f"{p}.nii.gz"
        written(study, (p, site, mask), images, labels, rng, shape)
        rows += [[p, f.relative_to(study.root), mask.relative_to(study.root), m, site, name, "+".join(map(str, some))]
                 for m, f in images.items() for name, some in labels.items()]
    head = ["patient", "image", "mask", "modality", "site", "label", "value"]
    order = rng.permutation(6 + valued)
    file = study.root / "manifest.csv"
    with open(file, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([[row[i] for i in order] for row in [head, *[rows[i] for i in rng.permutation(len(rows))]]])
    study.kinds[file] = "table"


LAYOUTS = {f.__name__: f for f in (fets, iseg, wmh, nnunet, msd, manifest)}


def make(data, layout, root):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    study = Study(root, layout)
    LAYOUTS[layout](study, data.draw, rng, tuple(data.draw(st.tuples(*[st.integers(3, 6)] * 3), "shape")))
    return study, rng


def words(site, modality, label):
    return tuple({**WORDS, **MODALITIES, **LABELS}.get(x, x) for x in (site, modality, label))


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_what_was_written_is_read(layout, tmp_path_factory, data):
    study, _ = make(data, layout, tmp_path_factory.mktemp(layout))
    pool = read_pool(study.root)
    site = (lambda t: str(int(t.site))) if layout == "fets" else lambda t: t.site  # 01 and 1 are one institution
    expected = {words(*key): cases for key, cases in study.tasks.items()}
    found = {(site(t), t.modality, t.label): t for t in pool}
    assert set(found) == set(expected) and len(pool) == len(expected)
    known = {}  # a patient has one name, and no two patients share it
    for key, task in found.items():
        assert {(c.image, c.channel) for c in task.cases} == set(expected[key]) or {c.image for c in task.cases} == {f for f, _ in expected[key]}
        assert len(task) == len(task.patients) == len(expected[key])
        for case in task.cases:
            patient, x, y, values = next(v for (file, c), v in expected[key].items() if file == case.image)
            assert known.setdefault(patient, case.patient) == case.patient
            v = read_case(case)
            assert np.array_equal(v.image, x) and np.array_equal(v.mask, np.isin(y, values) if values else y != 0)
            assert np.array_equal(v.ignored, y == study.ignore) if study.ignore else v.ignored is None or not v.ignored.any()
    assert len(set(known.values())) == len(known)
    checked = validate(pool)
    assert checked.ok, checked.problems.to_string()


# --- damage

def change(file, alter, shift=0.0):
    "Writes the volume anew as float32."
    pair = file.with_suffix(".hdr") if file.suffix == ".img" else file
    img = nib.load(pair)
    x = np.asarray(img.dataobj).astype(np.float32)
    alter(x)
    grid = img.affine.copy()
    grid[:3, 3] += shift
    (nib.Nifti1Pair if pair.suffix == ".hdr" else nib.Nifti1Image)(x, grid).to_filename(pair)


def at_zero(value):
    "Puts `value` on one voxel of the background."
    def alter(x): x.flat[np.flatnonzero(x == 0)[0]] = value
    return alter


def header_only(file):
    if file.suffix in (".hdr", ".img"): file.with_suffix(".img").write_bytes(b"")
    elif file.suffix == ".gz": file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:352]))
    else: file.write_bytes(file.read_bytes()[:352])


def truncate(file): file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
def nan(file): change(file, lambda x: x.flat.__setitem__(x.size // 2, np.nan))
def shifted(file): change(file, lambda x: None, 500.0)
def other_value(file): change(file, at_zero(9))
def halves(file): change(file, at_zero(0.5))
def emptied(file): file.write_bytes(b"")


def flipped_bit(file):
    "Flips a bit near the middle; not one of the few that unpack to the same bytes (a copy from elsewhere in a run of zeros)."
    raw = file.read_bytes()
    whole = gzip.decompress(raw)
    for at in range(len(raw) // 2, len(raw) - 8):
        damaged = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:]
        try: same = gzip.decompress(damaged) == whole
        except (OSError, EOFError, zlib.error): same = False
        if not same: return file.write_bytes(damaged)
    raise AssertionError(f"no bit of {file} matters")


def flipped_checksum(file):
    raw = bytearray(file.read_bytes())
    raw[-7] ^= 1
    file.write_bytes(raw)


DAMAGES = {Path.unlink: ("image", "mask", "table"), truncate: ("image", "mask"), nan: ("image", "mask"), shifted: ("image", "mask"),
           other_value: ("mask",), halves: ("mask",), header_only: ("image", "mask"), emptied: ("image", "mask", "table"),
           flipped_bit: ("image", "mask"), flipped_checksum: ("image", "mask")}
PACKED = flipped_bit, flipped_checksum  # damage that a checksum shows, and nothing else


def said_of(root):
    "The words in which the one or the other refuses or reports it; none if nothing is wrong."
    try:
        checked = validate(read_pool(root))
    except InputError as e:
        return str(e)
    return " | ".join(checked.problems["problem"][checked.problems["severity"] == "error"])


def names_of(file):
    "The damaged file; of a pair, either half."
    return {str(file), str(file.with_suffix({".hdr": ".img", ".img": ".hdr"}.get(file.suffix, file.suffix)))}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_damage_is_named(layout, damage, tmp_path_factory, data):
    study, _ = make(data, layout, tmp_path_factory.mktemp(layout))
    files = sorted(f for f, kind in study.kinds.items() if kind in DAMAGES[damage] and (damage not in PACKED or f.suffix == ".gz"))
    assume(files)
    file = data.draw(st.sampled_from(files), "file")
    damage(file)
    said = said_of(study.root)
    if damage is other_value and layout == "manifest": assert said == ""  # a manifest does not say what else a mask may hold
    else: assert any(name in said for name in names_of(file)) and "\n" not in said, f"{file}: {said!r}"


STRAY = [".DS_Store", "._{name}", "notes.txt", "Thumbs.db", "desktop.ini", "README.md"]


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_stray_files_change_nothing(layout, tmp_path_factory, data):
    study, rng = make(data, layout, tmp_path_factory.mktemp(layout))
    before = read_pool(study.root)
    for file in data.draw(st.lists(st.sampled_from(sorted(study.kinds)), min_size=1, max_size=3)):
        (file.parent / data.draw(st.sampled_from(STRAY)).format(name=file.name)).write_bytes(rng.bytes(300))
    after = read_pool(study.root)
    assert after.tasks == before.tasks and validate(after).ok


leaf = st.one_of(st.none(), st.booleans(), st.integers(-3, 12), st.floats(allow_nan=False), st.sampled_from(["", "0", "a", "..", ".nii"]))
keys = st.sampled_from(["0", "1", "image", "label", "ignore", "x"])
anything = st.recursive(leaf, lambda x: st.lists(x, max_size=2) | st.dictionaries(keys, x, max_size=2), max_leaves=4)


@pytest.mark.parametrize("name, told", [
    ("Dataset001_X", {"channel_names": {"0": "T2"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz", "training": []}),
    ("Task01_X", {"modality": {"0": "T2"}, "labels": {"0": "background", "1": "lesion"},
                  "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]}),
], ids=["nnunet", "msd"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_description_of_anything_is_read_or_refused(name, told, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("told") / name
    for file in ("imagesTr/a.nii.gz", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    key = data.draw(st.sampled_from([None, *told]), "key")
    value = data.draw(anything, "value")
    (folder / "dataset.json").write_text(json.dumps(value if key is None else {**told, key: value}))
    try: assert len(read_pool(folder)) > 0
    except InputError as e: assert str(folder) in str(e) and "\n" not in str(e)


ROWS = [b"1,FeTS2022_00001", b"1.5,FeTS2022_00001", b"99999999999999999999,FeTS2022_00001", b"a,a.nii.gz,a.nii.gz,T1,,x,1", b"a,.,.,T1,,x,1",
        b"a,a.nii.gz,a.nii.gz,-,,x,1", b"a,\0.nii.gz,a.nii.gz,T1,,x,1", b"a,a.nii.gz,a.nii.gz,T1,,x,1+1"]


@pytest.mark.parametrize("name, head", [("partitioning_1.csv", b"Partition_ID,Subject_ID\r\n"),
                                        ("manifest.csv", b"patient,image,mask,modality,site,label,value\n")], ids=["fets", "manifest"])
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.binary(max_size=60), st.text("a1-+;,.\"\n\r\0é ", max_size=60).map(str.encode), st.sampled_from(ROWS)), headed=st.booleans())
def test_a_table_of_anything_is_read_or_refused(name, head, tmp_path_factory, text, headed):
    folder = tmp_path_factory.mktemp("table")
    (folder / "FeTS2022_00001").mkdir()
    for m in ("t1", "t1ce", "t2", "flair", "seg"): (folder / "FeTS2022_00001" / f"FeTS2022_00001_{m}.nii.gz").touch()
    (folder / "a.nii.gz").touch()
    (folder / name).write_bytes(head * headed + text)
    try: assert len((read_manifest if name == "manifest.csv" else read_fets)(folder)) > 0
    except InputError as e: assert str(folder) in str(e)


SIZES_HIGH = {*range(41, 56, 2)}  # the high bytes of the axes' lengths: gigabytes to read, for nothing
spoilt = st.lists(st.tuples(st.sampled_from([i for i in range(348) if i not in SIZES_HIGH]), st.integers(0, 255)), min_size=1, max_size=3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=60, deadline=None)
@given(spoilt=spoilt, role=st.sampled_from(["image", "mask"]), length=st.sampled_from([None, 200, 348, 400]))
@example(spoilt=[(315, 234)], role="image", length=None)  # a direction of 1e25 mm
def test_a_spoilt_header_is_read_or_refused(tmp_path_factory, spoilt, role, length):
    folder = tmp_path_factory.mktemp("header")
    files = {name: folder / f"{name}.nii" for name in ("image", "mask")}
    for file in files.values(): nib.Nifti1Image(np.eye(5, dtype=np.int16)[..., None] + np.zeros((1, 1, 4), np.int16), np.diag([2.0, 2, 3, 1])).to_filename(file)
    raw = bytearray(files[role].read_bytes())
    for i, byte in spoilt: raw[i] = byte
    files[role].write_bytes(raw[:length])
    try:
        v = read_case(Case("p", files["image"], files["mask"], (1,)))
        assert v.image.shape == v.mask.shape and v.image.dtype == np.float32 and np.isfinite(v.image).all()
    except InputError as e:
        assert str(files[role]) in str(e) and "\n" not in str(e)
