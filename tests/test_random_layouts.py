"""Random valid folders of each layout hold exactly what was written into them. Damage to one file is named, stray
files change nothing."""

import csv
import gzip
import json
import zlib
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from seqtransfer.core import InputError
from seqtransfer.datasets import read_fets, read_manifest, read_pool
from seqtransfer.tasks import Case, read_case
from seqtransfer.validation import validate

# What names become in a task's name, by hand: all but letters, digits and dots is an underscore, none at the ends.
WORDS = {
    "Ulm": "Ulm",
    "São Paulo": "S_o_Paulo",
    "Philips_VU .PETMR_01.": "Philips_VU_.PETMR_01",
    "Amsterdam/GE3T": "Amsterdam_GE3T",
    "Amsterdam/GE1T5": "Amsterdam_GE1T5",
    "Amsterdam/Philips_VU .PETMR_01.": "Amsterdam_Philips_VU_.PETMR_01",
    "16": "16",
    "NA": "NA",
    "Lyon, north": "Lyon_north",
    "": "",
}
MODALITIES = {"T1": "T1", "T1 (Gd)": "T1_Gd", "FLAIR": "FLAIR", "b=1000": "b_1000"}
LABELS = {"lesion": "lesion", "grey-matter": "grey_matter", "1st core": "1st_core", "Ödem 2": "dem_2"}
PATIENTS = ["7", "007", "p 1", "sub-02", "x.y", "a_0000", "NaN", "1e3"]
FETS = {"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "FLAIR"}
WMH = ["Utrecht", "Singapore", "Amsterdam/GE3T", "Amsterdam/GE1T5", "Amsterdam/Philips_VU .PETMR_01."]


@dataclass(frozen=True)
class Written:
    "A case as it was written."

    patient: str
    image: np.ndarray
    labels: np.ndarray  # the label map
    values: tuple  # that make the label; empty for all but 0


@dataclass
class Study:
    "What was written: the cases of each task, and what each file is."

    root: Path
    layout: str
    tasks: dict = field(default_factory=dict)  # (site, modality, label) -> {(image file, channel or None): Written}
    ignore: int | None = None
    kinds: dict = field(default_factory=dict)  # file -> image, mask or table


def orient(x, rng):
    "The array of a volume in a random storage order and the matrix that says so; `x` lies in canonical order."
    grid = np.array([[2.0, 0, 0, -9], [0, 1.5, 0, -5], [0, 0, 3, 4], [0, 0, 0, 1]])
    axes = [*rng.permutation(3)]
    x = x.transpose(*axes, *range(3, x.ndim))
    grid = grid[:, [*axes, 3]]
    for a in np.flatnonzero(rng.integers(2, size=3)):
        grid[:3, 3] += grid[:3, a] * (x.shape[a] - 1)
        grid[:3, a] *= -1
        x = np.flip(x, a)
    return x, grid


def nifti(file, x, grid):
    "Writes a NIfTI file or pair."
    kind = nib.Nifti1Pair if file.suffix == ".hdr" else nib.Nifti1Image
    kind(x, grid).to_filename(file)


def write(study, file, x, kind, rng):
    "Writes a volume in a random storage order, with or without a trailing axis of 1."
    file.parent.mkdir(parents=True, exist_ok=True)
    stored, grid = orient(x, rng)
    if rng.integers(2) and x.ndim == 3:
        stored = stored[..., None]
    nifti(file, stored, grid)
    study.kinds[file] = kind
    if file.suffix == ".hdr":
        study.kinds[file.with_suffix(".img")] = kind


def label_map(shape, values, rng):
    "Background in the first corner, every value somewhere."
    y = rng.choice([0, *values], shape)
    y.flat[: len(values) + 1] = [0, *values]  # so that none is missing
    return y.astype(rng.choice([np.float32, np.int16]))


def written(study, masks, images, labels, rng, shape):
    """Writes a patient's files: `masks` (patient, site, file), `images` {modality: file}, `labels` {name: values, empty
    for all but 0}."""
    patient, site, mask = masks
    values = set().union(*labels.values()) or {1, 3}
    if study.ignore:
        values.add(study.ignore)
    y = label_map(shape, sorted(values), rng)
    write(study, mask, y, "mask", rng)
    in_one_file = len(set(images.values())) < len(images)
    xs = {m: rng.integers(1, 4000, shape).astype(rng.choice([np.float32, np.int16])) for m in images}
    if in_one_file:
        file = next(iter(images.values()))
        write(study, file, np.stack([*xs.values()], -1), "image", rng)
    for i, (modality, file) in enumerate(images.items()):
        if not in_one_file:
            write(study, file, xs[modality], "image", rng)
        for name, some in labels.items():
            cases = study.tasks.setdefault((site, modality, name), {})
            cases[file, i if in_one_file else None] = Written(patient, xs[modality], y, tuple(some))


def table(study, file, text):
    "Writes a table or a description."
    file.write_bytes(text.encode())
    study.kinds[file] = "table"


def fets(study, draw, rng, shape):
    folder = study.root / "MICCAI_FeTS2022_TrainingData"
    numbers = draw(st.lists(st.integers(0, 99999), min_size=1, max_size=4, unique=True))
    rows = [(draw(st.sampled_from([1, 4, 16, 23])), f"FeTS2022_{n:05}") for n in numbers]
    labels = {"NCR": (1,), "ED": (2,), "ET": (4,)}
    for site, p in rows:
        mask = folder / p / f"{p}_seg.nii.gz"
        images = {to: folder / p / f"{p}_{m}.nii.gz" for m, to in FETS.items()}
        written(study, (p, str(site), mask), images, labels, rng, shape)
    lines = ["Partition_ID,Subject_ID", *(f"{site},{p}" for site, p in rows)]
    table(study, folder / "partitioning_1.csv", "".join(f"{line}\r\n" for line in lines))


def iseg(study, draw, rng, shape):
    folder, end = study.root / "iSeg-2019-Training", draw(st.sampled_from([".hdr", ".nii", ".nii.gz"]))
    labels = {"CSF": (10,), "GM": (150,), "WM": (250,)}
    for n in draw(st.lists(st.integers(1, 23), min_size=1, max_size=4, unique=True)):
        mask = folder / f"subject-{n}-label{end}"
        images = {m: folder / f"subject-{n}-{m}{end}" for m in ("T1", "T2")}
        written(study, (f"subject-{n}", "", mask), images, labels, rng, shape)


def wmh(study, draw, rng, shape):
    study.ignore = 2
    for part in draw(st.sampled_from([("training",), ("training", "test")])):
        for site in draw(st.lists(st.sampled_from(WMH), min_size=1, max_size=3, unique=True)):
            for n in draw(st.lists(st.integers(0, 160), min_size=1, max_size=2, unique=True)):
                folder = study.root / part / site / str(n)
                mask = folder / "wmh.nii.gz"
                images = {m: folder / "pre" / f"{m}.nii.gz" for m in ("T1", "FLAIR")}
                written(study, (str(folder), site, mask), images, {"WMH": (1,)}, rng, shape)


def named_labels(draw):
    names = draw(st.lists(st.sampled_from([*LABELS]), min_size=1, max_size=3, unique=True))
    return {name: (i + 1,) for i, name in enumerate(names)}


def drawn(draw, names, most):
    return draw(st.lists(st.sampled_from([*names]), min_size=1, max_size=most, unique=True))


def nnunet(study, draw, rng, shape):
    folder, end = study.root / "Dataset042_My-Brain", draw(st.sampled_from([".nii.gz", ".nii"]))
    labels, modalities = named_labels(draw), drawn(draw, MODALITIES, 3)
    told = {"background": 0, **{k: v[0] for k, v in labels.items()}}
    if draw(st.booleans()):
        labels["whole"] = told["whole"] = [*range(1, len(labels) + 1)]
    if draw(st.booleans()):
        study.ignore = told["ignore"] = max(map(np.max, told.values())).item() + 1
    for p in drawn(draw, PATIENTS, 4):
        mask = folder / "labelsTr" / f"{p}{end}"
        images = {m: folder / "imagesTr" / f"{p}_{i:04}{end}" for i, m in enumerate(modalities)}
        written(study, (p, "", mask), images, labels, rng, shape)
    channels = {str(i): m for i, m in enumerate(modalities)}
    description = {"channel_names": channels, "labels": told, "file_ending": end}
    table(study, folder / "dataset.json", json.dumps(description))


def msd(study, draw, rng, shape):
    folder = study.root / "Task07_My-Brain"
    labels, modalities, patients = named_labels(draw), drawn(draw, MODALITIES, 3), drawn(draw, PATIENTS, 4)
    for p in patients:
        mask, image = (folder / sub / f"{p}.nii.gz" for sub in ("labelsTr", "imagesTr"))
        written(study, (p, "", mask), {m: image for m in modalities}, labels, rng, shape)
    description = {
        "modality": {str(i): m for i, m in enumerate(modalities)},
        "labels": {"0": "background", **{str(value): name for name, (value,) in labels.items()}},
        "training": [{"image": f"./imagesTr/{p}.nii.gz", "label": f"./labelsTr/{p}.nii.gz"} for p in patients],
    }
    table(study, folder / "dataset.json", json.dumps(description))


def manifest(study, draw, rng, shape):
    labels, modalities = named_labels(draw), drawn(draw, MODALITIES, 2)
    valued = len(labels) > 1 or draw(st.booleans())
    if not valued:
        labels = {k: () for k in labels}
    rows = []
    for p in drawn(draw, PATIENTS, 4):
        site = draw(st.sampled_from([*WORDS]))
        images = {m: study.root / "scans" / f"{p} {i}.nii.gz" for i, m in enumerate(modalities)}
        mask = study.root / "masks" / f"{p}.nii.gz"
        written(study, (p, site, mask), images, labels, rng, shape)
        for (modality, image), (name, some) in product(images.items(), labels.items()):
            paths = image.relative_to(study.root), mask.relative_to(study.root)
            rows.append([p, *paths, modality, site, name, "+".join(map(str, some))])
    head = ["patient", "image", "mask", "modality", "site", "label", "value"]
    order = rng.permutation(6 + valued)
    lines = [head, *(rows[i] for i in rng.permutation(len(rows)))]
    file = study.root / "manifest.csv"
    with open(file, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([row[i] for i in order] for row in lines)
    study.kinds[file] = "table"


LAYOUTS = {f.__name__: f for f in (fets, iseg, wmh, nnunet, msd, manifest)}


def make(data, layout, root):
    "A study of random content in a layout, and the generator that drew it."
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    study = Study(root, layout)
    shape = tuple(data.draw(st.tuples(*[st.integers(3, 6)] * 3), "shape"))
    LAYOUTS[layout](study, data.draw, rng, shape)
    return study, rng


def words(site, modality, label):
    "What the three become in a task's name."
    known = {**WORDS, **MODALITIES, **LABELS}
    return tuple(known.get(word, word) for word in (site, modality, label))


def site_of(task, layout):
    "The site of a task as it was written: 01 and 1 are one institution."
    return str(int(task.site)) if layout == "fets" else task.site


def check_case(case, written, ignore):
    "Asserts that a case reads as it was written."
    read = read_case(case)
    assert np.array_equal(read.image, written.image)
    labels = written.labels
    assert np.array_equal(read.mask, np.isin(labels, written.values) if written.values else labels != 0)
    if ignore:
        assert np.array_equal(read.ignored, labels == ignore)
    else:
        assert read.ignored is None or not read.ignored.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_what_was_written_is_read(layout, tmp_path_factory, data):
    study, _ = make(data, layout, tmp_path_factory.mktemp(layout))
    pool = read_pool(study.root)
    expected = {words(*key): cases for key, cases in study.tasks.items()}
    found = {(site_of(task, layout), task.modality, task.label): task for task in pool}
    assert set(found) == set(expected)
    assert len(pool) == len(expected)
    known = {}  # a patient has one name, and no two patients share it
    for key, task in found.items():
        by_file = {file: written for (file, _), written in expected[key].items()}
        assert {case.image for case in task.cases} == set(by_file)
        assert len(task) == len(task.patients) == len(expected[key])
        for case in task.cases:
            written = by_file[case.image]
            assert known.setdefault(written.patient, case.patient) == case.patient
            check_case(case, written, study.ignore)
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
    nifti(pair, x, grid)


def at_zero(value):
    "Puts `value` on one voxel of the background."

    def alter(x):
        x.flat[np.flatnonzero(x == 0)[0]] = value

    return alter


def header_only(file):
    if file.suffix in (".hdr", ".img"):
        file.with_suffix(".img").write_bytes(b"")
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:352]))
    else:
        file.write_bytes(file.read_bytes()[:352])


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def nan(file):
    def alter(x):
        x.flat[x.size // 2] = np.nan

    change(file, alter)


def shifted(file):
    change(file, lambda x: None, shift=500.0)


def other_value(file):
    change(file, at_zero(9))


def halves(file):
    change(file, at_zero(0.5))


def emptied(file):
    file.write_bytes(b"")


def flipped_bit(file):
    """Flips a bit near the middle, not one of the few that unpack to the same bytes (a copy from elsewhere in a run of
    zeros)."""
    raw = file.read_bytes()
    whole = gzip.decompress(raw)

    def flipped(at):
        return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]

    def matters(at):
        try:
            return gzip.decompress(flipped(at)) != whole
        except (OSError, EOFError, zlib.error):
            return True

    at = next(filter(matters, range(len(raw) // 2, len(raw) - 8)))
    file.write_bytes(flipped(at))


def flipped_checksum(file):
    raw = bytearray(file.read_bytes())
    raw[-7] ^= 1
    file.write_bytes(raw)


DAMAGES = {
    Path.unlink: ("image", "mask", "table"),
    truncate: ("image", "mask"),
    nan: ("image", "mask"),
    shifted: ("image", "mask"),
    other_value: ("mask",),
    halves: ("mask",),
    header_only: ("image", "mask"),
    emptied: ("image", "mask", "table"),
    flipped_bit: ("image", "mask"),
    flipped_checksum: ("image", "mask"),
}
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
    other_half = {".hdr": ".img", ".img": ".hdr"}.get(file.suffix, file.suffix)
    return {str(file), str(file.with_suffix(other_half))}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_damage_is_named(layout, damage, tmp_path_factory, data):
    study, _ = make(data, layout, tmp_path_factory.mktemp(layout))
    files = sorted(file for file, kind in study.kinds.items() if kind in DAMAGES[damage])
    if damage in PACKED:
        files = [file for file in files if file.suffix == ".gz"]
    assume(files)
    file = data.draw(st.sampled_from(files), "file")
    damage(file)
    said = said_of(study.root)
    if damage is other_value and layout == "manifest":
        assert said == ""  # a manifest does not say what else a mask may hold
    else:
        assert any(name in said for name in names_of(file)), f"{file}: {said!r}"
        assert "\n" not in said


STRAY = [".DS_Store", "._{name}", "notes.txt", "Thumbs.db", "desktop.ini", "README.md"]


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_stray_files_change_nothing(layout, tmp_path_factory, data):
    study, rng = make(data, layout, tmp_path_factory.mktemp(layout))
    before = read_pool(study.root)
    for file in data.draw(st.lists(st.sampled_from(sorted(study.kinds)), min_size=1, max_size=3)):
        stray = data.draw(st.sampled_from(STRAY)).format(name=file.name)
        (file.parent / stray).write_bytes(rng.bytes(300))
    after = read_pool(study.root)
    assert after.tasks == before.tasks
    assert validate(after).ok


leaf = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.floats(allow_nan=False),
    st.sampled_from(["", "0", "a", "..", ".nii"]),
)
keys = st.sampled_from(["0", "1", "image", "label", "ignore", "x"])
anything = st.recursive(leaf, lambda x: st.lists(x, max_size=2) | st.dictionaries(keys, x, max_size=2), max_leaves=4)


NNUNET_TOLD = {
    "channel_names": {"0": "T2"},
    "labels": {"background": 0, "lesion": 1},
    "file_ending": ".nii.gz",
    "training": [],
}
MSD_TOLD = {
    "modality": {"0": "T2"},
    "labels": {"0": "background", "1": "lesion"},
    "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
}
DESCRIPTIONS = [("Dataset001_X", NNUNET_TOLD), ("Task01_X", MSD_TOLD)]


@pytest.mark.parametrize("name, told", DESCRIPTIONS, ids=["nnunet", "msd"])
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
    try:
        assert len(read_pool(folder)) > 0
    except InputError as e:
        assert str(folder) in str(e)
        assert "\n" not in str(e)


ROWS = [
    b"1,FeTS2022_00001",
    b"1.5,FeTS2022_00001",
    b"99999999999999999999,FeTS2022_00001",
    b"a,a.nii.gz,a.nii.gz,T1,,x,1",
    b"a,.,.,T1,,x,1",
    b"a,a.nii.gz,a.nii.gz,-,,x,1",
    b"a,\0.nii.gz,a.nii.gz,T1,,x,1",
    b"a,a.nii.gz,a.nii.gz,T1,,x,1+1",
]


HEADS = [
    ("partitioning_1.csv", b"Partition_ID,Subject_ID\r\n"),
    ("manifest.csv", b"patient,image,mask,modality,site,label,value\n"),
]
characters = st.text('a1-+;,."\n\r\0é ', max_size=60).map(str.encode)
content = st.one_of(st.binary(max_size=60), characters, st.sampled_from(ROWS))


@pytest.mark.parametrize("name, head", HEADS, ids=["fets", "manifest"])
@settings(max_examples=60, deadline=None)
@given(text=content, headed=st.booleans())
def test_a_table_of_anything_is_read_or_refused(name, head, tmp_path_factory, text, headed):
    folder = tmp_path_factory.mktemp("table")
    (folder / "FeTS2022_00001").mkdir()
    for m in ("t1", "t1ce", "t2", "flair", "seg"):
        (folder / "FeTS2022_00001" / f"FeTS2022_00001_{m}.nii.gz").touch()
    (folder / "a.nii.gz").touch()
    (folder / name).write_bytes(head * headed + text)
    read = read_manifest if name == "manifest.csv" else read_fets
    try:
        assert len(read(folder)) > 0
    except InputError as e:
        assert str(folder) in str(e)


SIZES_HIGH = {*range(41, 56, 2)}  # the high bytes of the axes' lengths: gigabytes to read, for nothing
places = st.sampled_from([i for i in range(348) if i not in SIZES_HIGH])
spoilt = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=60, deadline=None)
@given(spoilt=spoilt, role=st.sampled_from(["image", "mask"]), length=st.sampled_from([None, 200, 348, 400]))
@example(spoilt=[(315, 234)], role="image", length=None)  # a direction of 1e25 mm
def test_a_spoilt_header_is_read_or_refused(tmp_path_factory, spoilt, role, length):
    folder = tmp_path_factory.mktemp("header")
    files = {name: folder / f"{name}.nii" for name in ("image", "mask")}
    voxels = np.repeat(np.eye(5, dtype=np.int16)[..., None], 4, axis=-1)
    for file in files.values():
        nifti(file, voxels, np.diag([2.0, 2, 3, 1]))
    raw = bytearray(files[role].read_bytes())
    for i, byte in spoilt:
        raw[i] = byte
    files[role].write_bytes(raw[:length])
    try:
        read = read_case(Case("p", files["image"], files["mask"], (1,)))
        assert read.image.shape == read.mask.shape
        assert read.image.dtype == np.float32
        assert np.isfinite(read.image).all()
    except InputError as e:
        assert str(files[role]) in str(e)
        assert "\n" not in str(e)
