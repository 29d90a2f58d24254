"Weights from elsewhere, as their user meets them: what is taken, what is said of it, and files that are refused."

import pickle
import tarfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from monai.networks.nets import DynUNet, SegResNet, UNet
from safetensors.torch import save_file
from torch import nn

from seqtransfer.core import InputError
from seqtransfer.networks import NETWORKS, NetworkPlan, build_network, load_network, save_network
from seqtransfer.weights import adapt, channels_of, check_limits, read_weights, what_was_loaded

PLANS = {
    "unet": NetworkPlan((1, 1, 1), (16, 16, 16)),
    "dynunet": NetworkPlan(
        (1, 1, 2),
        (32, 32, 16),
        (4, 8, 16, 16, 16),
        network="dynunet",
        kernels=((3, 3, 1),) + ((3, 3, 3),) * 4,
        strides=((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    ),
    "segresnet": NetworkPlan((1, 1, 1), (16, 16, 16), (8, 16, 32), network="segresnet"),
}


class Tiny(nn.Module):
    "Two convolutions whose weights can be written by hand."

    def __init__(self, inputs=1, outputs=1, kernel=3, dims=3, width=2):
        super().__init__()
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        self.first, self.head = conv(inputs, width, kernel, padding=kernel // 2), conv(width, outputs, 1)

    def forward(self, x):
        return self.head(self.first(x))


def loaded(net, state, *names):
    "The network with foreign weights, and the report by parameter."
    found, report = adapt(state, net, *names)
    missing = net.load_state_dict(found, strict=False).missing_keys
    assert not missing or isinstance(net, DynUNet)  # which knows its layers by several names
    return net, report.set_index("parameter")


def numbers(*shape):
    "0, 1, 2, ... in a shape."
    return torch.arange(float(np.prod(shape))).reshape(shape)


BRATS = ("FLAIR", "T1", "T1ce", "T2")


# --- by hand


def test_a_channel_is_taken_by_its_name():
    w, bias = numbers(2, 4, 3, 3, 3), torch.tensor([5.0, 6.0])
    state, report = adapt({"first.weight": w, "first.bias": bias}, Tiny(), BRATS, ("t1CE",))
    assert torch.equal(state["first.weight"], w[:, 2:3])
    assert torch.equal(state["first.bias"], bias)
    assert report.how.tolist() == ["channel t1CE of 4", "as it is", "fresh: not in the file", "fresh: not in the file"]
    assert report.given[0] == "2x4x3x3x3"
    assert report.wanted[0] == "2x1x3x3x3"
    assert report.weights.tolist() == [54, 2, 2, 1]


@pytest.mark.parametrize(
    "names, said",
    [
        ((), "mean of 4 channels, times 4/1"),
        ((("a", "b", "c", "d"), "T1"), "mean of 4 channels, times 4/1 (T1 is not among a, b, c, d)"),
        (((), "T1"), "mean of 4 channels, times 4/1"),
    ],
)
def test_channels_without_our_name_are_averaged_and_keep_the_scale(names, said):
    w = numbers(2, 4, 3, 3, 3)
    state, report = adapt({"first.weight": w}, Tiny(), *names)
    assert torch.allclose(state["first.weight"][:, 0], w[:, 0] + w[:, 1] + w[:, 2] + w[:, 3])
    assert report.how[0] == said


def test_a_kernel_is_cut_to_its_middle_and_padded_with_zeros():
    w = numbers(2, 1, 5, 5, 5)
    state, report = adapt({"first.weight": w}, Tiny())
    cut = state["first.weight"]
    assert torch.equal(cut, w[..., 1:4, 1:4, 1:4])
    assert report.how[0] == "kernel 5x5x5 cut to 3x3x3"
    back, report = adapt(state, Tiny(kernel=5))
    assert torch.equal(back["first.weight"][..., 1:4, 1:4, 1:4], cut)
    assert back["first.weight"].count_nonzero() == cut.count_nonzero()
    assert report.how[0] == "kernel 3x3x3 padded with zeros to 5x5x5"
    _, report = adapt({"first.weight": numbers(2, 1, 1, 5, 3)}, Tiny())
    assert report.how[0] == "kernel 1x5x3 padded with zeros and cut to 3x3x3"


def test_a_flat_kernel_is_inflated():
    w = numbers(2, 3, 5, 3)
    state, report = adapt({"first.weight": w, "head.weight": numbers(1, 2, 1, 1)}, Tiny())
    solid = state["first.weight"]
    assert torch.allclose(solid.sum(-1)[:, 0], w.sum(1)[:, 1:4])
    assert torch.equal(solid[..., 0], solid[..., 2])
    assert report.how[0] == "mean of 3 channels, times 3/1; 2-D kernel 5x3 cut and inflated to 3x3x3"
    assert torch.equal(state["head.weight"].flatten(), torch.tensor([0.0, 1.0]))


def test_a_flat_network_inflated_answers_as_before_to_what_is_constant_along_d():
    flat = Tiny(dims=2)
    solid, report = loaded(Tiny(), flat.state_dict())
    x = torch.randn(1, 1, 8, 8)
    answer = solid(x[..., None].repeat(1, 1, 1, 1, 5))
    assert torch.allclose(answer[..., 1:-1], flat(x)[..., None].repeat(1, 1, 1, 1, 3), atol=1e-5)
    assert not report.how.str.startswith("fresh").any()


def test_a_head_of_several_outputs_starts_fresh_and_says_so():
    ours = Tiny()
    state, report = adapt(Tiny(outputs=4).state_dict(), ours)
    assert torch.equal(state["head.weight"], ours.head.weight)
    assert torch.equal(state["head.bias"], ours.head.bias)
    assert report.how.tolist() == ["as it is", "as it is"] + ["fresh: the head has 4 outputs, this one 1"] * 2
    assert "fresh: the head has 4 outputs, this one 1 (head.weight, head.bias)" in what_was_loaded(report)


def test_what_fits_nowhere_is_named():
    first = numbers(2, 1, 3, 3, 3)
    foreign = {"first.weight": first, "head.weight": numbers(1, 2, 2, 2, 2)}
    _, report = adapt({**foreign, "extra.gain": numbers(7), "step": torch.tensor(3)}, Tiny())
    assert report.how[2] == "fresh: kernel 2x2x2 and 1x1x1 have no common middle"
    unused = report[report.parameter == ""]
    assert unused.source.tolist() == ["extra.gain", "step"]
    assert unused.weights.tolist() == [7, 1]
    assert (unused.how == "not used: no such place here").all()
    assert what_was_loaded(report).startswith("91 % of 59 weights loaded\n")
    assert "extra.gain, step" in what_was_loaded(report)


def test_whole_numbers_are_no_weights():
    head = torch.ones(1, 2, 1, 1, 1, dtype=torch.int8)
    _, report = adapt({"first.weight": numbers(2, 1, 3, 3, 3), "head.weight": head}, Tiny())
    assert report.how[2] == "fresh: the file holds int8"


def copied(state):
    "The same tensors in other memory."
    return {name: weights.clone() for name, weights in state.items()}


def the_same(state, other):
    "Whether two states hold the same names and bits."
    return state.keys() == other.keys() and all(torch.equal(weights, other[name]) for name, weights in state.items())


def test_neither_the_state_nor_the_network_is_changed():
    theirs, ours = Tiny(4, 3).state_dict(), Tiny()
    their_copy, our_copy = copied(theirs), copied(ours.state_dict())
    state, _ = adapt(theirs, ours)
    for weights in state.values():
        weights.zero_()
    assert the_same(theirs, their_copy)
    assert the_same(ours.state_dict(), our_copy)


def test_half_precision_is_brought_to_ours():
    theirs = {name: weights.half() for name, weights in Tiny(3).state_dict().items()}
    state, _ = adapt(theirs, Tiny())
    assert all(weights.dtype == torch.float32 for weights in state.values())
    assert torch.allclose(state["first.weight"][:, 0], theirs["first.weight"].float().sum(1), atol=1e-6)


# --- properties


@examples(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([1, 3, 5]), st.integers(0, 2**32 - 1))
def test_an_image_repeated_over_the_channels_gets_the_same_answer(theirs, ours, kernel, seed):
    torch.manual_seed(seed)
    foreign, net = Tiny(theirs, 1, kernel), Tiny(ours, 1, 5)
    net, _ = loaded(net, foreign.state_dict())
    x = torch.randn(1, 1, 6, 6, 6)
    assert torch.allclose(net(x.repeat(1, ours, 1, 1, 1)), foreign(x.repeat(1, theirs, 1, 1, 1)), atol=1e-4)


@examples(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.data())
def test_the_image_of_one_modality_gets_the_answer_of_its_channel(channels, data):
    k = data.draw(st.integers(0, channels - 1))
    foreign, x = Tiny(channels), torch.randn(1, 1, 6, 6, 6)
    alone = torch.zeros(1, channels, 6, 6, 6)
    alone[:, k] = x[:, 0]
    net, _ = loaded(Tiny(), foreign.state_dict(), [f"m{i}" for i in range(channels)], f"M{k}")
    assert torch.allclose(net(x), foreign(alone), atol=1e-5)


def test_every_network_is_tested_here():
    assert set(NETWORKS) <= set(PLANS)


@pytest.mark.parametrize("kind", PLANS)
def test_a_network_is_all_in_its_parameters(kind, tmp_path):
    "Nothing is gathered in training that a checkpoint would not hold."
    net, x = build_network(PLANS[kind], 0).train(), torch.randn(2, 1, *PLANS[kind].patch)
    for _ in range(3):
        net(5 * x + 3)
    path = save_network(net, tmp_path / "model.safetensors", PLANS[kind])
    assert torch.equal(load_network(path).eval()(x), net.eval()(x))


@pytest.mark.parametrize("kind", PLANS)
def test_a_network_given_its_own_weights_is_the_same_network(kind, tmp_path):
    net, other = build_network(PLANS[kind], 0).eval(), build_network(PLANS[kind], 1).eval()
    other, report = loaded(other, net.state_dict())
    x = torch.randn(1, 1, *PLANS[kind].patch)
    assert torch.equal(net(x), other(x))
    assert (report.how == "as it is").all()
    assert len(report) == len(list(net.parameters()))
    path = save_network(other, tmp_path / "model.safetensors", PLANS[kind])
    assert torch.equal(load_network(path).eval()(x), net(x))
    third, report = loaded(build_network(PLANS[kind], 2).eval(), read_weights(path))
    assert torch.equal(third(x), net(x))


# --- names and depth


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"network.module.{name}",
        lambda name: name.replace("model.", "model._orig_mod.", 1),
    ],
)
def test_wrappers_do_not_matter(wrap):
    net = build_network(PLANS["unet"], 0)
    wrapped = {wrap(name): weights for name, weights in net.state_dict().items()}
    state, report = adapt(wrapped, build_network(PLANS["unet"], 1))
    assert the_same(state, net.state_dict())
    assert (report.how == "as it is").all()
    assert report.source[0] == wrap(report.parameter[0])


def test_of_two_networks_in_one_file_the_other_is_reported():
    one = Tiny().state_dict()
    state = {f"{who}.{name}": weights for who in ("student", "teacher") for name, weights in one.items()}
    _, report = adapt(state, Tiny())
    assert report.source.str.startswith("student").tolist() == [True] * 4 + [False] * 4
    assert (report.how[4:] == "not used: no such place here").all()


def test_a_dynunet_known_by_its_second_names_alone():
    net, other = build_network(PLANS["dynunet"], 0), build_network(PLANS["dynunet"], 1)
    second = ("skip_layers", "output_block")  # the output block has no second name
    known = {name: weights for name, weights in net.state_dict().items() if name.startswith(second)}
    state, report = adapt(known, other)
    assert the_same(dict(net.named_parameters()), state)
    assert (report.how == "as it is").all()


def halving(levels):
    "A DynUNet of equal widths, where a decoder block would fit one level too deep."
    strides = [2] * (levels - 1)
    return DynUNet(3, 1, 1, [3] * levels, [1, *strides], strides, filters=[4] * levels)


def of_each_level(names):
    "The numbers in names such as `upsamples.2.conv`."
    return [int(name.split(".")[1]) for name in names]


@pytest.mark.parametrize("theirs, ours", [(6, 4), (4, 6)])
def test_levels_of_a_dynunet_are_counted_from_the_full_resolution(theirs, ours):
    _, report = adapt(halving(theirs).state_dict(), halving(ours))
    ups = report[report.parameter.str.startswith("upsamples") & (report.source != "")]
    assert len(ups) > 0
    assert of_each_level(ups.parameter) == [level + ours - theirs for level in of_each_level(ups.source)]


def test_levels_of_a_segresnet_are_counted_from_the_full_resolution():
    def network(levels):
        return SegResNet(3, 8, 1, 1, blocks_down=[1] * levels, blocks_up=[1] * (levels - 1))

    report = adapt(network(4).state_dict(), network(3))[1].set_index("parameter")
    assert report.source["up_layers.1.0.conv1.conv.weight"] == "up_layers.2.0.conv1.conv.weight"
    assert (report.how[report.index != ""] == "as it is").all()


def test_the_bottom_of_a_unet_is_the_block_above_the_bottom_of_a_deeper_one():
    def network(widths):
        return UNet(3, 1, 1, widths, strides=(2,) * (len(widths) - 1))

    report = adapt(network((8, 16, 32, 64)).state_dict(), network((8, 16, 32)))[1].set_index("parameter")
    bottom = "model.1.submodule.1.submodule.conv.weight"
    assert report.source[bottom] == "model.1.submodule.1.submodule.0.conv.weight"
    assert report.how[bottom] == "as it is"
    assert report.how["model.1.submodule.2.conv.weight"] == "fresh: other width 32x8 against 48x8"


def isotropic():
    "A DynUNet that halves every axis at every level, of four channels and three classes."
    strides = [2, 2, 2, 2]
    options = {"norm_name": ("instance", {"affine": True}), "deep_supervision": True, "deep_supr_num": 2}
    return DynUNet(3, 4, 3, [3] * 5, [1, *strides], strides, filters=(4, 8, 16, 16, 16), **options)


def test_blocks_that_do_not_overlap_are_averaged_or_repeated():
    iso, block = isotropic(), "upsamples.3.transp_conv.conv.weight"
    net, report = loaded(build_network(PLANS["dynunet"], 0), iso.state_dict())
    w, theirs = net.state_dict()[block], iso.state_dict()[block]
    assert torch.allclose(w[..., 0], (theirs[..., 0] + theirs[..., 1]) / 2)
    assert report.how[block] == "kernel 2x2x2 averaged to 2x2x1"
    first = "mean of 4 channels, times 4/1; kernel 3x3x3 cut to 3x3x1"
    assert report.how["input_block.conv1.conv.weight"] == first
    heads = [name for name, _ in iso.named_parameters() if name.startswith(("output_block", "deep_supervision_heads"))]
    assert sorted(report.index[report.how.str.startswith("fresh")]) == sorted(heads)
    again, _ = loaded(iso, net.state_dict())
    assert torch.equal(again.state_dict()[block], w.repeat(1, 1, 1, 1, 2))


def with_batch_norm(inputs):
    return UNet(3, inputs, 1, (4, 8, 16), strides=(2, 2), num_res_units=2, norm="batch")


def test_buffers_are_taken_too():
    theirs = with_batch_norm(2)
    theirs(torch.randn(4, 2, 16, 16, 16))
    ours, report = loaded(with_batch_norm(1), theirs.state_dict())
    running = {k: v for k, v in theirs.state_dict().items() if "running" in k or "tracked" in k}
    assert running
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in running.items())
    assert set(report.how) == {"as it is", "mean of 2 channels, times 2/1"}
    assert (report.how != "as it is").sum() == 2  # the convolution and the residual see the image


# --- what is refused


def refused(call, *parts):
    "Asserts that a call is refused in one line that holds the parts."
    with pytest.raises(InputError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said, said
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    "state, said",
    [
        ({"encoder.0.weight": torch.ones(2, 1, 3, 3, 3)}, "encoder.0.weight"),
        ({}, "no tensors"),
        ({"epoch": 3}, "no tensors"),
        ([1], "list"),
        (Tiny(width=7).state_dict(), "other width 7x1 against 2x1"),
        ({"first.bias": torch.ones(2)}, "no layers"),
        ({"first.weight": torch.full((2, 1, 3, 3, 3), torch.nan)}, "first.weight"),
    ],
)
def test_nothing_to_load_is_no_start(state, said):
    refused(lambda: adapt(state, Tiny()), said)


def test_limits_are_said_early_and_by_name():
    refused(lambda: adapt({}, Tiny(), (), ("FLAIR", "T1")), "one modality a task", "FLAIR, T1")
    four = Tiny(4).state_dict()
    refused(lambda: adapt(four, Tiny(), ("FLAIR", "T1"), "T1"), "2 modalities (FLAIR, T1)", "4 input channels")
    refused(lambda: check_limits(("T1", "T1"), "T1"), "T1, T1")


def test_what_will_not_be_kept_is_said():
    assert channels_of(Tiny(4, 3).state_dict(), Tiny()) == (4, 3)
    channels, classes = check_limits(BRATS, "T2", 4, 3)
    assert "only the kernels of T2" in channels
    assert "3 classes" in classes
    assert "fresh" in classes
    assert "mean" in check_limits((), (), 4)[0]
    assert check_limits("FLAIR", "T1", 1, 1) == []


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3, "optimizer_states": [{"state": {}}]},
        lambda s: {"network_weights": OrderedDict(s), "init_args": {"a": 1}},
        lambda s: {"anything": s},
    ],
)
@pytest.mark.parametrize("ending", ["pt", "pth", "ckpt"])
def test_a_file_of_weights_is_read(tmp_path, ending, wrapped):
    state = Tiny().state_dict()
    torch.save(wrapped(state), tmp_path / f"w.{ending}")
    found = read_weights(str(tmp_path / f"w.{ending}"))
    assert the_same(found, state)


def test_files_of_before_2020_are_read(tmp_path):
    torch.save(Tiny().state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "old.pth").keys() == Tiny().state_dict().keys()


class Program:
    "Makes a file when it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "write",
    [
        lambda p, x: torch.save(x, p),
        lambda p, x: torch.save(x, p, _use_new_zipfile_serialization=False),
        lambda p, x: p.write_bytes(pickle.dumps(x)),
    ],
    ids=["zip", "old", "plain"],
)
def test_nothing_in_a_file_is_ever_executed(tmp_path, write):
    write(tmp_path / "evil.pt", {"weight": torch.ones(1), "more": Program(tmp_path / "executed")})
    refused(lambda: read_weights(tmp_path / "evil.pt"), "evil.pt", "save_file")
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_archives_that_an_old_pytorch_would_run_are_not_opened(tmp_path, monkeypatch):
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)), tmp_path / "script.pt")
    (tmp_path / "pickle").write_bytes(pickle.dumps(1))
    torch.save(Tiny().state_dict(), tmp_path / "zip")
    for name in ("pickle", "zip"):  # one that holds a zip archive ends as a zip archive does
        with tarfile.open(tmp_path / f"tar of a {name}.pt", "w") as archive:
            archive.add(tmp_path / name, "pickle")
    monkeypatch.setattr(torch, "load", lambda *a, **kw: pytest.fail("the file was opened"))
    refused(lambda: read_weights(tmp_path / "script.pt"), "script.pt", "TorchScript")
    refused(lambda: read_weights(tmp_path / "tar of a pickle.pt"), "tar archive")
    refused(lambda: read_weights(tmp_path / "tar of a zip.pt"), "tar archive")


@pytest.mark.parametrize("ending", ["pt", "pth", "ckpt", "safetensors"])
@pytest.mark.parametrize(
    "content",
    [lambda b: b[: len(b) // 2], lambda b: b[:20], lambda b: b"", lambda b: b"<html>not found</html>"],
    ids=["half", "start", "empty", "page"],
)
def test_a_damaged_file_is_named(tmp_path, ending, content):
    path = tmp_path / f"w.{ending}"
    save = save_file if ending == "safetensors" else torch.save
    save(Tiny().state_dict(), path)
    path.write_bytes(content(path.read_bytes()))
    refused(lambda: read_weights(path), str(path))


def test_what_is_no_file_of_weights_is_named(tmp_path):
    w = torch.ones(1)
    torch.save([w], tmp_path / "list.pt")
    torch.save({"a": {"w": w}, "b": {"w": w}}, tmp_path / "two.pt")
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    (tmp_path / "w.h5").touch()
    (tmp_path / "folder.pt").mkdir()
    refused(lambda: read_weights(tmp_path / "list.pt"), "list.pt", "state_dict")
    refused(lambda: read_weights(tmp_path / "two.pt"), "two.pt", "under a, b")
    refused(lambda: read_weights(tmp_path / "none.pt"), "none.pt", "no tensors")
    refused(lambda: read_weights(tmp_path / "w.h5"), "w.h5", ".safetensors")
    for name in ("missing.pt", "folder.pt"):
        refused(lambda: read_weights(tmp_path / name), name)
