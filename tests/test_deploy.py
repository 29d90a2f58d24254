"""Masks on the grid of the image they belong to, in every orientation and format, and bundles.

MONAI runs a bundle without this package.
"""

import gzip
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqtransfer.core import InputError
from seqtransfer.deploy import (
    bundle_metadata,
    export_bundle,
    mask_image,
    prediction_files,
    write_prediction,
    write_predictions,
)
from seqtransfer.evaluation import predict
from seqtransfer.networks import (
    NETWORKS,
    NetworkPlan,
    build_network,
    kernels_and_strides,
    load_network,
    parts,
    prepare,
    save_network,
)
from seqtransfer.tasks import Volume

SPACING, PATCH = (2.0, 2.0, 2.0), (16, 16, 16)
KERNELS, STRIDES = kernels_and_strides(SPACING, PATCH)
PLANS = {
    "unet": NetworkPlan(SPACING, PATCH, (4, 8, 16)),
    "segresnet": NetworkPlan(SPACING, PATCH, (8, 16), network="segresnet"),
    "dynunet": NetworkPlan(
        SPACING, PATCH, (4, 8, 16)[: len(STRIDES)], network="dynunet", kernels=KERNELS, strides=STRIDES
    ),
    "bfloat16": NetworkPlan(SPACING, PATCH, (4, 8, 16), precision="bfloat16"),
}
ABOUT = {"task": "LesionA-FLAIR-WMH", "modality": "FLAIR", "label": "WMH"}
GEOMETRY = ("dim", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "qoffset_x")
GEOMETRY += ("srow_x", "srow_y", "srow_z")
GRID = np.array([[2, 0, 0, -21], [0, 2, 0, -19], [0, 0, 2, -17], [0, 0, 0, 1.0]])


def head(shape=(22, 20, 18), background=0):
    "A textured ellipsoid with a bright blob, off centre so that no turn leaves it as it is."
    rng = np.random.default_rng(0)
    at = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    bright = np.linalg.norm(at - np.array([0.3, -0.2, 0.1]).reshape(3, 1, 1, 1), axis=0) < 0.35
    x = rng.normal(100, 15, shape) + 80 * bright
    return np.where(np.linalg.norm(at, axis=0) < 0.9, x, background).round().astype(np.float32)


def model(plan, folder):
    "A network of random weights whose head is shifted until it marks a tenth of the volume."
    net, x = build_network(plan, 0), head()
    image, _ = prepare(Volume(x, x > 1e9, GRID), plan)
    weights = dict(net.named_parameters())
    biases = [name for name in parts(net)["head"] if name.endswith("bias") and weights[name].numel() == 1]
    bias = weights[biases[0] if plan.network == "dynunet" else biases[-1]]
    with torch.no_grad():
        logits = net.eval()(image[None].as_tensor()[..., :16, :16, :16])
        bias.sub_(logits.quantile(0.9))
    return save_network(net, folder / f"{plan.network}-{plan.precision}.safetensors", plan, ABOUT)


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    return model(PLANS["unet"], tmp_path_factory.mktemp("model"))


def expected(model, x, affine):
    "The mask of an array in canonical orientation, without any file."
    return predict(load_network(model), Volume(x, np.zeros(x.shape, bool), affine), PLANS["unet"])


def turning(order, signs, shape):
    "(array -> turned array, matrix from its voxels to the old ones), by index arithmetic."
    to_old = np.zeros((4, 4))
    to_old[3, 3] = 1
    for new, (old, sign) in enumerate(zip(order, signs)):
        to_old[old, new] = sign
        if sign < 0:
            to_old[old, 3] = shape[old] - 1

    def turn(x):
        flips = tuple(slice(None, None, sign) for sign in signs)
        return x.transpose(order)[flips]

    return turn, to_old


def tilted(affine, degrees):
    "The grid, turned about the vertical axis."
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ affine


def written(path, x, affine, kind=nib.Nifti1Image, codes=(1, 2), units=("mm", "sec")):
    "Writes an array as an image of this kind; returns its path."
    image = kind(x, affine)
    if isinstance(image.header, nib.Nifti1Header):
        image.set_qform(affine, codes[0])
        image.set_sform(affine, codes[1])
        image.header.set_xyzt_units(*units)
    nib.save(image, path)
    return path


# the grid of the input


@given(
    order=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from((1, -1))] * 3),
    thick=st.sampled_from((1, 2, 0.75)),
    degrees=st.sampled_from((0, 12, -30)),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_mask_of_a_turned_file_is_the_turned_mask(unet, tmp_path, order, signs, thick, degrees):
    x, affine = head(), tilted(GRID @ np.diag([1, 1, thick, 1]), degrees)
    turn, to_old = turning(order, signs, x.shape)
    reference = turn(expected(unet, x, affine.astype(np.float32).astype(float)))  # as a file holds it
    file = written(tmp_path / "scan.nii.gz", turn(x), affine @ to_old)
    image, mask = nib.load(file), nib.load(write_prediction(unet, file, tmp_path / "masks"))
    assert mask.shape == image.shape
    assert np.array_equal(mask.affine, image.affine)
    assert 0 < reference.mean() < 0.5
    resampled = thick != 1 or degrees != 0  # which the file's float32 matrix moves
    assert (np.asarray(mask.dataobj) != reference).mean() <= (1e-3 if resampled else 0)


def as_pair(path, x, affine):
    return written(path.with_suffix(".hdr"), x[..., None], affine, nib.Nifti1Pair)


def as_plain(path, x, affine):
    return written(path.with_suffix(".nii"), x, affine, codes=(0, 4), units=("mm", "unknown"))


def as_packed(path, x, affine):
    return written(path.with_suffix(".nii.gz"), x[..., None, None], affine, codes=(2, 1))


def as_freesurfer(path, x, affine):
    return written(path.with_suffix(".mgz"), x, affine, nib.MGHImage)


def as_nifti2(path, x, affine):
    return written(path.with_suffix(".nii"), x, affine, nib.Nifti2Image)


def as_big_endian_scaled(path, x, affine):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(x, affine, header)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_slope_inter(0.5, -20)
    image.header["cal_max"] = 300
    image.header["descrip"] = b"Doe^Jane"
    image.header.set_intent("t test", (10,))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Doe^Jane" * 30))
    nib.save(image, path.with_suffix(".nii"))
    return path.with_suffix(".nii")


@pytest.mark.parametrize("store", [as_pair, as_plain, as_packed, as_freesurfer, as_nifti2, as_big_endian_scaled])
def test_every_format_gives_a_mask_on_its_own_grid(unet, tmp_path, store):
    x = head()
    turn, to_old = turning((2, 0, 1), (-1, 1, -1), x.shape)
    file = store(tmp_path / "sub.01_scan.nii", turn(x), GRID @ to_old)
    out = write_prediction(unet, file, tmp_path / "masks")
    assert out == tmp_path / "masks" / "sub.01_scan_WMH.nii.gz"
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    image, mask = nib.load(file), nib.load(out)
    assert mask.shape == image.shape
    assert np.allclose(mask.affine, image.affine, atol=1e-5)
    assert mask.get_data_dtype() == np.uint8
    assert (mask.dataobj.slope, mask.dataobj.inter) == (1, 0)
    voxels = np.asarray(mask.dataobj).reshape(turn(x).shape)
    assert np.array_equal(voxels, turn(expected(unet, x, GRID)))
    if isinstance(image.header, nib.Nifti1Header):
        same_geometry(mask, image)
    says_nothing_of_the_image(out)


def same_geometry(mask, image):
    "Every field of a NIfTI header that places voxels is the image's, and so is the kind of NIfTI."
    for field in GEOMETRY:
        assert np.array_equal(mask.header[field], image.header[field]), field
    assert np.array_equal(mask.affine, image.affine)
    assert isinstance(mask, nib.Nifti2Image) == isinstance(image, nib.Nifti2Image)


def says_nothing_of_the_image(file):
    "Nothing of the image's intensities, or of its patient, is in a mask."
    header = nib.load(file).header
    assert header["cal_max"] == 0
    assert header.get_intent()[0] == "none"
    assert not header.extensions
    assert header["descrip"].item().startswith(b"seqtransfer ")
    assert b"Doe" not in gzip.decompress(file.read_bytes())


def test_a_prediction_again_gives_the_same_bytes(unet, tmp_path):
    file = written(tmp_path / "scan.nii", head(), GRID)
    first = write_prediction(unet, file, tmp_path).read_bytes()
    assert write_prediction(unet, file, tmp_path).read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scan.nii", "scan_WMH.nii.gz"]


def test_masks_keep_what_a_mask_is_for():
    "Anisotropic, with left and right told apart by matrix alone: the set voxel stays where it was in the world."
    affine = np.array([[0, 0.5, 0, 3], [0, 0, -4, 30], [-0.5, 0, 0, 8], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.zeros((6, 8, 4), np.int16), affine)
    canonical = np.zeros((8, 4, 6), bool)
    canonical[1, 2, 3] = True
    (voxel,) = np.argwhere(np.asarray(mask_image(canonical, image).dataobj))
    in_the_world = nib.affines.apply_affine(nib.as_closest_canonical(image).affine, [1, 2, 3])
    assert np.allclose(nib.affines.apply_affine(affine, voxel), in_the_world)


# what is refused


def channels(d):
    file = written(d / "four.nii.gz", np.stack([head()] * 3, -1), GRID)
    return [file], "four.nii.gz holds 3 volumes and the model takes one modality (FLAIR)"


def colours(d):
    file = written(d / "vectors.nii.gz", np.stack([head()] * 3, -1)[..., None, :], GRID)
    return [file], "vectors.nii.gz holds 3 volumes"


def a_slice(d):
    return [written(d / "slice.nii.gz", head()[0], GRID)], "slice.nii.gz"


def missing(d):
    return [d / "gone.nii.gz"], "gone.nii.gz is missing"


def nrrd(d):
    return [d / "scan.nrrd"], "scan.nrrd is NRRD, which is not read"


def a_folder(d):
    return [d], f"{d} is a folder"


def nothing(d):
    return [], "no image"


def dicom(d):
    (d / "IM0001").write_bytes(bytes(128) + b"DICM" + bytes(100))
    return [d / "IM0001"], "IM0001 is DICOM, which is not read"


def text(d):
    (d / "text.nii.gz").write_text("this was a spreadsheet once")
    return [d / "text.nii.gz"], "text.nii.gz is not an image"


def same_names(d):
    (d / "other").mkdir()
    files = [written(d / "scan.nii.gz", head(), GRID), written(d / "other" / "scan.nii", head(), GRID)]
    return files, "scan_WMH.nii.gz: predict them one by one"


def over_an_input(d):
    (d / "masks").mkdir()
    files = [written(d / "scan.nii", head(), GRID), written(d / "masks" / "scan_WMH.nii.gz", head(), GRID)]
    return files, "would replace the image"


def over_by_hand(d):
    (d / "masks").mkdir()
    written(d / "masks" / "scan_WMH.nii.gz", head(), GRID)
    return [written(d / "scan.nii", head(), GRID)], "scan_WMH.nii.gz exists and was not written by a prediction"


def no_output(d):
    (d / "masks").write_text("in the way")
    return [written(d / "scan.nii", head(), GRID)], "masks cannot be written"


def cut(d):
    file = written(d / "cut.nii.gz", head(), GRID)
    file.write_bytes(file.read_bytes()[:-300])
    return [file], "cut.nii.gz cannot be read"


def not_a_number(d):
    return [written(d / "holes.nii.gz", np.where(head() > 150, np.nan, head()), GRID)], "holes.nii.gz holds"


IMAGES = [channels, colours, a_slice, missing, nrrd, a_folder, nothing, dicom, text, cut, not_a_number]
OUTPUTS = [same_names, over_an_input, over_by_hand, no_output]


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("wrong", [*IMAGES, *OUTPUTS], ids=lambda f: f.__name__)
def test_refused_in_one_sentence_and_nothing_changed(unet, tmp_path, wrong):
    images, words = wrong(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=re.escape(words)) as e:
        write_predictions(unet, images, tmp_path / "masks")
    assert "\n" not in str(e.value)
    assert contents(tmp_path) == before


def test_what_was_predicted_before_a_damaged_image_stays(unet, tmp_path):
    whole = written(tmp_path / "whole.nii.gz", head(), GRID)
    with pytest.raises(InputError, match="cut.nii.gz"):
        write_predictions(unet, [whole, *cut(tmp_path)[0]], tmp_path / "masks")
    assert [p.name for p in (tmp_path / "masks").iterdir()] == ["whole_WMH.nii.gz"]


def test_a_file_that_is_no_model(tmp_path):
    file = written(tmp_path / "scan.nii", head(), GRID)
    with pytest.raises(InputError, match="scan.nii"):
        write_prediction(file, file, tmp_path / "out")
    with pytest.raises(InputError, match="scan.nii"):
        export_bundle(file, tmp_path / "out")
    with pytest.raises(InputError, match="gone.safetensors"):
        export_bundle(tmp_path / "gone.safetensors", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["scan.nii"]


def test_a_model_that_does_not_say_its_label(unet, tmp_path):
    file = written(tmp_path / "scan.nii", head(), GRID)
    silent = save_network(load_network(unet), tmp_path / "silent.safetensors", PLANS["unet"])
    assert write_prediction(silent, file, tmp_path / "masks").name == "scan_mask.nii.gz"
    two_words = prediction_files([file], tmp_path, {"label": "enhancing tumour"})
    assert two_words[file].name == "scan_enhancing_tumour.nii.gz"
    assert "unknown label" in bundle_metadata(PLANS["unet"], {})["task"]


# the bundle


def inputs(folder):
    "Images of every kind that the preparation treats differently."
    folder.mkdir()
    x, thick = head(), head((22, 20, 9))
    turn, to_old = turning((1, 2, 0), (-1, 1, -1), x.shape)
    turn_thick, to_old_thick = turning((1, 2, 0), (-1, 1, -1), thick.shape)
    noise = np.random.default_rng(1).integers(0, 6, x.shape)
    written(folder / "plain.nii.gz", x, GRID)
    written(folder / "turned.nii", turn(x), GRID @ to_old)
    written(folder / "thick.nii.gz", turn_thick(thick), GRID @ np.diag([1, 1, 2, 1]) @ to_old_thick)
    written(folder / "nearly.nii.gz", x, GRID @ np.diag([1.01, 1, 1.019, 1]))  # within 2 %: not resampled
    written(folder / "oblique.nii.gz", x, tilted(GRID @ np.diag([1, 1, 1.5, 1]), 20))
    written(folder / "padded.nii.gz", head(background=7), GRID)  # an even background that is not 0
    written(folder / "noisy.nii.gz", np.where(x > 0, x, noise).astype(np.float32), GRID)  # Otsu
    written(folder / "cropped.nii.gz", x[6:-6, 6:-6, 5:-5], GRID)  # all foreground, smaller than the patch
    written(folder / "large.nii.gz", head((40, 36, 34)), GRID)  # several windows along each axis
    written(folder / "constant.nii.gz", np.full_like(x, 3), GRID)
    as_pair(folder / "pair.nii", x, GRID)
    return sorted(f for f in folder.iterdir() if f.suffix != ".img")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    "An environment in which this package cannot be imported."
    folder = tmp_path_factory.mktemp("stranger") / "seqtransfer"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('there is no seqtransfer here')")
    env = os.environ | {"PYTHONPATH": str(folder.parent)}
    tried = [sys.executable, "-c", "import seqtransfer"]
    done = subprocess.run(tried, env=env, cwd=folder.parent, capture_output=True)
    assert b"no seqtransfer" in done.stderr
    return env


def monai(*words, env, cwd, **options):
    "What `python -m monai.bundle` says, with `--name value` for each option."
    command = [sys.executable, "-m", "monai.bundle", *words]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_every_network_is_tested_here():
    assert set(NETWORKS) <= set(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_a_bundle_runs_by_itself_and_gives_the_same_masks(name, stranger, tmp_path):
    file, images = model(PLANS[name], tmp_path), inputs(tmp_path / "images")
    bundle = export_bundle(file, tmp_path / "exported").rename(tmp_path / "moved")
    if name == "unet":  # by the folders that the configuration expects, or by those that are given
        (tmp_path / "images").rename(bundle / "images")
        images, theirs = [bundle / "images" / f.name for f in images], bundle / "masks"
        monai("run", config_file="configs/inference.json", env=stranger, cwd=bundle)
    else:
        theirs = tmp_path / "theirs"
        folders = {"bundle_root": bundle, "dataset_dir": tmp_path / "images", "output_dir": theirs}
        config = bundle / "configs" / "inference.json"
        monai("run", config_file=config, **folders, env=stranger, cwd=tmp_path)
    shares = {}
    for ours in write_predictions(file, images, tmp_path / "ours"):
        a, b = nib.load(ours), nib.load(theirs / ours.name)
        assert np.allclose(a.affine, b.affine, atol=1e-4)
        assert b.get_data_dtype() == np.uint8
        a, b = (np.asarray(m.dataobj).squeeze() for m in (a, b))
        shares[ours.name] = (a != b).mean()
        assert a.any() and not a.all() or "constant" in ours.name
    assert len(shares) == 11
    assert max(shares.values()) < 1e-4, shares


def test_a_bundle_is_what_monai_expects(unet, stranger, tmp_path):
    bundle = export_bundle(unet, tmp_path / "bundle")
    assert sorted(str(f.relative_to(bundle)) for f in bundle.rglob("*") if f.is_file()) == [
        "configs/inference.json",
        "configs/metadata.json",
        "docs/README.md",
        "models/model.safetensors",
        "scripts/__init__.py",
        "scripts/preparation.py",
    ]
    assert (bundle / "models" / "model.safetensors").read_bytes() == unet.read_bytes()
    for f in bundle.rglob("*"):
        if f.suffix in (".json", ".md", ".py"):
            text = f.read_text()
            assert "import seqtransfer" not in text
            assert "from seqtransfer" not in text
            assert str(tmp_path) not in text
    configs = bundle / "configs"
    files = {"meta_file": configs / "metadata.json", "config_file": configs / "inference.json"}
    said = monai("verify_net_in_out", "network_def", **files, device="cpu", env=stranger, cwd=tmp_path)
    assert "verified with no error" in said


# the fields that MONAI's schema asks for, of a bundle and of each tensor
FIELDS = {"schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version"}
FIELDS |= {"required_packages_version", "task", "description", "authors", "copyright", "network_data_format"}
TENSOR = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def"}


def test_the_metadata_hold_what_the_schema_asks_for_and_the_plan():
    told = bundle_metadata(PLANS["unet"], ABOUT)
    assert told.keys() >= FIELDS
    for tensors in told["network_data_format"].values():
        for tensor in tensors.values():
            assert tensor.keys() >= TENSOR
            assert tensor["spatial_shape"] == list(PATCH)
    assert told["seqtransfer"]["plan"]["spacing"] == SPACING
    assert told["seqtransfer"]["about"] == ABOUT
    assert "FLAIR" in told["task"]
    assert "WMH" in told["task"]


def test_a_bundle_is_written_whole_or_not_at_all(unet, tmp_path):
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("in the way")
    assert export_bundle(unet, empty) == empty
    assert (empty / "configs").is_dir()
    for out, words in ((empty, "exists"), (file, "exists"), (file / "bundle", "cannot be written")):
        with pytest.raises(InputError, match=words):
            export_bundle(unet, out)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(unet.read_bytes()[:-200])
    narrow = replace(PLANS["unet"], channels=(4, 8))
    wrong = save_network(load_network(unet), tmp_path / "wrong.safetensors", narrow, ABOUT)
    for file in (cut, wrong):
        with pytest.raises(InputError, match=file.name):
            export_bundle(file, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.safetensors", "empty", "file", "wrong.safetensors"]
