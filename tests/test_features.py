"""Features of source models against plain passes of the network, written out here.

Scores of a pool are compared with the scores of the arrays.
"""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import UNet
from safetensors.torch import load_file

from seqtransfer import features as module
from seqtransfer import scores
from seqtransfer.core import InputError, seed_for
from seqtransfer.datasets import read_pool
from seqtransfer.evaluation import predict
from seqtransfer.features import Drawn, SourceModel, default_layer, features, layers, score_matrix, score_pool
from seqtransfer.networks import NetworkPlan, build_network, device, prepare, save_network
from seqtransfer.paths import best_paths
from seqtransfer.protocol import protocol
from seqtransfer.tasks import Volume, read_case

PLAN = NetworkPlan((1.0, 1.0, 1.0), (16, 16, 16), (4, 8, 16))
SOURCES = "TumourA-FLAIR-ED", "LesionA-FLAIR-WMH", "Infant-T1-GM"


@pytest.fixture(scope="module")
def split(zoo):
    return protocol(read_pool(zoo), "TumourB-FLAIR-ED", shots=2)


@pytest.fixture(scope="module")
def plan(split):
    return NetworkPlan(tuple(read_case(split.train.cases[0]).spacing), (16, 16, 16), (4, 8, 16))


@pytest.fixture(scope="module")
def models(split, plan):
    nets = [build_network(plan, seed).to(device()) for seed in range(len(SOURCES))]
    return {n: SourceModel(net, split.sources[n]) for n, net in zip(SOURCES, nets)}


def refused(function, *args, says="", **kwargs):
    "Asserts that a call is refused with a sentence that says so."
    with pytest.raises(InputError, match=says):
        function(*args, **kwargs)


def made(monkeypatch, split, *volumes):
    "The target task with its cases replaced by volumes in memory."
    task = replace(split.train, cases=split.train.cases[: len(volumes)])
    of = dict(zip(task.cases, volumes))
    monkeypatch.setattr("seqtransfer.training.read_case", of.__getitem__)
    return task


def blob(size=(16, 16, 16), ignored=False, seed=0, mask=None):
    "Noise without margins, a box as object, perhaps with two ignored slabs."
    rng = np.random.default_rng(seed)
    if mask is None:
        mask = np.zeros(size, bool)
        mask[4:9, 5:11, 3:12] = True
    skip = None
    if ignored:
        skip = np.zeros(size, bool)
        skip[:2] = skip[6] = True
        mask = mask & ~skip
    return Volume(rng.uniform(1, 2, size).astype(np.float32), mask, np.eye(4), skip)


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def by_hand(net, volume):
    "(H, W, D, C + 1), from a plain pass over a volume of one window: the map before the head, and the probability."
    with torch.inference_mode():
        x = prepare(volume, PLAN)[0][None].as_tensor().to(device())
        first = net.eval().model[0](x)  # encoder, all that is below it, skip connection
        up = torch.cat([first, net.model[1].submodule(first)], 1)[0].cpu().numpy()
        p = torch.sigmoid(net(x))[0].cpu().numpy()
    for axis in (1, 2, 3):
        up = doubled(up, axis)
    return np.concatenate([up, p]).transpose(1, 2, 3, 0)


def doubled(values, axis):
    "Every second voxel has a value of its own and the others lie halfway; the last has no neighbour."
    following = np.take(values, range(1, values.shape[axis]), axis)
    after = np.concatenate([following, np.take(values, [-1], axis)], axis)
    shape = list(values.shape)
    shape[axis] *= 2
    return np.stack([values, (values + after) / 2], axis + 1).reshape(shape)


def position(net, volume, drawn):
    """The voxels that were drawn, told by all that the network computes there.

    With noise as image that is different everywhere.
    """
    there = by_hand(net, volume)
    computed = np.concatenate([drawn.features, drawn.softmax[:, 1:]], 1)
    away = np.abs(there.reshape(-1, 1, computed.shape[1]) - computed).max(-1)
    assert away.min(0).max() < 1e-5
    assert np.sort(away, 0)[1].min() > 1e-4  # the next best voxel is no match
    return np.stack(np.unravel_index(away.argmin(0), there.shape[:3]), 1)


def test_features_are_those_of_a_plain_pass(monkeypatch, split):
    volume = blob()
    net = build_network(PLAN, 0).to(device())
    drawn = features(net, made(monkeypatch, split, volume), PLAN, voxels=60)
    at = position(net, volume, drawn)
    assert default_layer(net) == "model.1"
    assert layers(net)["model.1"].channels == 8
    assert drawn.features.shape == (60, 8)
    assert len(np.unique(at, axis=0)) == 60
    assert np.array_equal(volume.mask[tuple(at.T)], drawn.labels == 1)
    assert len({tuple(a % 2) for a in at}) == 8  # on and between the values of the map


def test_a_full_resolution_layer_is_looked_up_exactly(monkeypatch, split):
    net = build_network(PLAN, 0).to(device())
    drawn = features(net, made(monkeypatch, split, blob()), PLAN, "model.2", voxels=60)
    logit = drawn.features[:, 0].astype(float)
    assert np.allclose(1 / (1 + np.exp(-logit)), drawn.softmax[:, 1], atol=1e-6)
    assert np.allclose(drawn.softmax.sum(1), 1, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(0, 2**16), st.tuples(*[st.integers(-3, 3)] * 3))
def test_a_ramp_is_taken_back_from_a_coarse_map(strides, seed, slope):
    middle = torch.nn.Conv3d(1, 1, 3, stride=2, padding=1, bias=False)
    torch.nn.init.zeros_(middle.weight).data[0, 0, 1, 1, 1] = 1
    size = 16, 24, 32
    last_value = np.array(size) - 2**strides
    voxels = torch.tensor(np.random.default_rng(seed).integers(0, last_value + 1, (20, 3)))
    slope = torch.tensor(slope)
    ramp = torch.tensor(np.indices(size)) * slope[:, None, None, None]
    maps = ramp.sum(0).float()[None, None]
    with torch.inference_mode():
        for _ in range(strides):
            maps = middle(maps)
    expected = (voxels * slope).sum(1).float()
    assert torch.allclose(module._values_at(maps, voxels, size)[:, 0], expected, atol=1e-3)


@pytest.mark.parametrize("size", [(16, 16, 16), (11, 13, 30), (37, 20, 9)])
def test_the_softmax_is_what_testing_predicts(monkeypatch, split, size):
    rng = np.random.default_rng(1)
    volume = blob(size, mask=rng.random(size) < 0.1)
    net = build_network(PLAN, 3).to(device())
    mask = predict(net, volume, PLAN)  # no margins and no resampling: the grids are the same
    assert 0 < mask.mean() < 1
    drawn = features(net, made(monkeypatch, split, volume), PLAN, voxels=volume.mask.size)
    assert len(drawn.labels) == volume.mask.size
    truth = volume.mask.ravel()
    rows = np.concatenate([np.flatnonzero(~truth), np.flatnonzero(truth)])
    object_probability = drawn.softmax[:, 1]
    sure = np.abs(object_probability - 0.5) > 1e-4
    assert np.array_equal((object_probability > 0.5)[sure], mask.ravel()[rows][sure])


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 900), seed=st.integers(0, 2**16))
def test_classes_are_balanced(n, seed):
    label = np.repeat([0, 1], [900, 100])
    counts = np.bincount(label[scores.balanced_sample(label, n, seed)], minlength=2)
    assert counts[1] == min(n // 2, 100)
    assert counts.sum() == n


def test_the_draw_is_balanced_over_the_task(models, split, plan):
    net = models[SOURCES[0]].net
    drawn = features(net, split.train, plan, voxels=40)
    assert np.bincount(drawn.labels).tolist() == [20, 20]
    assert set(drawn.cases) <= {0, 1}
    objects = [int((d["mask"] > 0).sum()) for d in module.prepare_task(split.train, plan)]
    every = features(net, split.train, plan, voxels=10**6)
    assert np.bincount(every.cases[every.labels == 1]).tolist() == objects


def test_ignored_voxels_are_never_drawn(monkeypatch, split):
    volume = blob(ignored=True)
    net = build_network(PLAN, 0).to(device())
    drawn = features(net, made(monkeypatch, split, volume), PLAN, voxels=10**6)
    assert len(drawn.labels) == (~volume.ignored).sum()
    assert drawn.labels.sum() == volume.mask.sum()
    for seed in range(20):
        drawn = features(net, made(monkeypatch, split, volume), PLAN, voxels=50, seed=seed)
        at = position(net, volume, drawn)
        assert not volume.ignored[tuple(at.T)].any()


def test_background_is_tissue_unless_air_is_asked_for(monkeypatch, split):
    volume = blob((16, 16, 32))
    volume.image[:, :, 20:26] = 0
    volume.image[4:9, 5:11, 3] = 0  # a hole, and a part of the object that is dark
    volume.image[0, :, :] = volume.image[:, 0, :] = 0
    net = build_network(PLAN, 0).to(device())
    task = made(monkeypatch, split, volume)
    inside = module.prepare_task(task, PLAN)[0]
    dark = (inside["image"] == 0).cpu().numpy()
    y = (inside["mask"] > 0).cpu().numpy()
    assert (dark & y).any()
    assert (dark & ~y).any()
    tissue = features(net, task, PLAN, voxels=10**6)
    air = features(net, task, PLAN, voxels=10**6, air=True)
    assert len(air.labels) == y.size
    assert len(tissue.labels) == y.size - (dark & ~y).sum()
    assert tissue.labels.sum() == air.labels.sum() == y.sum()


def test_the_same_seed_gives_the_same_bits(models, split, plan):
    net = models[SOURCES[0]].net
    a, b, c = (features(net, split.train, plan, voxels=50, seed=s) for s in (1, 1, 2))
    assert np.array_equal(a.labels, b.labels)
    assert np.array_equal(a.cases, b.cases)
    if device().type == "cpu":
        assert np.array_equal(a.features, b.features)
        assert np.array_equal(a.softmax, b.softmax)
    assert not np.array_equal(a.features, c.features)
    assert a.features.dtype == a.softmax.dtype == np.float32
    assert a.labels.dtype.kind == a.cases.dtype.kind == "i"


def test_the_network_is_left_as_it_was(models, split, plan, monkeypatch):
    net = build_network(plan, 0).to(device()).train()
    net.model[0].eval()
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]

    def as_before(hooked=0):
        return hooks(net) == hooked and [m.training for m in net.modules()] == modes

    features(net, split.train, plan, voxels=20)
    assert as_before()
    refused(features, net, split.train, plan, "nowhere", says="nowhere")
    assert as_before()

    def fails(*args):
        raise RuntimeError("in the middle of it")

    monkeypatch.setattr(module, "_values_at", fails)
    with pytest.raises(RuntimeError, match="middle"):
        features(net, split.train, plan, voxels=20)
    assert as_before()
    net.model[2].register_forward_hook(lambda *_: 1 / 0)  # someone else's stays
    with pytest.raises(ZeroDivisionError):
        features(net, split.train, plan, voxels=20)
    assert as_before(hooked=1)
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def input_of_the_last_convolution(net, x):
    "What the last convolution that runs is given."
    fed = []

    def see(m, x, y):
        if isinstance(m, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
            fed.append(x[0])

    handles = [m.register_forward_hook(see) for m in net.modules()]
    net.eval()(x)
    for handle in handles:
        handle.remove()
    return fed[-1]


@pytest.mark.parametrize("units, expected", [(0, "model.1"), (1, "model.2.0"), (2, None)])
def test_layers_and_the_one_before_the_head(units, expected):
    net = UNet(3, 1, 1, (4, 8, 16), strides=(2, 2), num_res_units=units, norm="instance")
    last = input_of_the_last_convolution(net, torch.zeros(1, 1, 16, 16, 16))
    found = layers(net)
    name = default_layer(net)
    assert found[name].channels == last.shape[1]
    assert found[name].step == tuple(16 // n for n in last.shape[2:])
    assert expected in (name, None)
    assert not any(n.endswith("adn.D") for n in found)  # it hands its input on
    assert hooks(net) == 0


def test_unknown_layers_and_unusable_tasks(models, split, plan, monkeypatch):
    net = models[SOURCES[0]].net
    empty = blob(mask=np.zeros((16,) * 3, bool))
    full = blob(mask=np.ones((16,) * 3, bool))
    rest_ignored = replace(blob(), ignored=~blob().mask)
    refused(features, net, split.train, plan, "model.1.submodul", says="model.1.submodule")
    refused(features, net, made(monkeypatch, split, empty), PLAN, says="holds its label")
    refused(features, net, made(monkeypatch, split, full), PLAN, says="no voxel outside its label")
    refused(features, net, made(monkeypatch, split, rest_ignored), PLAN, says="no voxel outside its label")
    refused(features, net, made(monkeypatch, split, blob()), PLAN, voxels=1, says="cannot hold 2 classes")


def test_a_case_without_object_is_legal(monkeypatch, split):
    task = made(monkeypatch, split, blob(), blob(seed=1, mask=np.zeros((16,) * 3, bool)))
    drawn = features(build_network(PLAN, 0), task, PLAN, voxels=100)
    assert set(drawn.cases[drawn.labels == 1]) == {0}
    assert set(drawn.cases[drawn.labels == 0]) == {0, 1}


def test_candidates_are_few_and_none_is_lost_below(monkeypatch, split):
    task = made(monkeypatch, split, blob(), blob(seed=1))
    few = module._candidates(task, PLAN, False, most=50)
    every = module._candidates(task, PLAN, False)
    of_image_and_class = np.bincount(2 * few.image + few.label)
    assert of_image_and_class.tolist() == [50] * 4
    assert len(every.label) == 2 * 16**3
    assert set(zip(few.image, few.place, few.label)) <= set(zip(every.image, every.place, every.label))


def expected(name, net, task, plan, r, own=None, **how):
    "A score of the arrays of one draw, by way of `features`."
    seed = seed_for(0, "draw", r)
    d = features(net, task, plan, seed=seed, **how)
    arrays = {"features": d.features, "softmax": d.softmax, "labels": d.labels, "cases": d.cases}
    if own is not None:
        s = features(net, own, plan, seed=seed, **how)
        arrays |= {"source_features": s.features, "source_labels": s.labels}
    function, needs = scores.SCORES[name]
    return function(**{k: arrays[k] for k in needs})


@pytest.mark.parametrize("name", list(scores.SCORES))
def test_a_pool_is_scored_as_its_arrays_are(models, split, plan, name):
    found = score_pool(name, models, split.train, plan, repeats=2, voxels=60)
    assert list(found.table.columns) == ["source", "score", "low", "high", "seconds"]
    assert tuple(found.table.source) == SOURCES
    assert found.draws.shape == (3, 2)
    for s, draws in zip(SOURCES, found.draws):
        m = models[s]
        own = m.task if name == "otce" else None
        wanted = [expected(name, m.net, split.train, plan, r, own, voxels=60) for r in range(2)]
        assert np.allclose(draws, wanted, rtol=1e-5, atol=1e-6)
    assert np.allclose(found.table.score, found.draws.mean(1))
    middle = np.percentile(found.draws, [2.5, 97.5], axis=1).T
    assert np.allclose(found.table[["low", "high"]], middle)
    assert (found.table.seconds > 0).all()


def test_leep_of_the_drawn_arrays(models, split, plan):
    found = score_pool("leep", models, split.train, plan, repeats=3, voxels=80, layer="model.0", seed=5)
    for s, draws in zip(SOURCES, found.draws):
        for r in range(3):
            d = features(models[s].net, split.train, plan, "model.0", voxels=80, seed=seed_for(5, "draw", r))
            joint = np.array([d.softmax[d.labels == label].sum(0) for label in (0, 1)], float)
            given = joint / joint.sum(0)  # of a label, given what the source's head says
            likelihood = (given[d.labels] * d.softmax).sum(1)
            assert np.isclose(draws[r], np.log(likelihood).mean(), atol=1e-6)


def test_networks_paths_and_bare_models_give_the_same(models, split, plan, tmp_path):
    files = {s: save_network(m.net, tmp_path / f"{s}.safetensors", plan) for s, m in models.items()}
    nets = {s: m.net for s, m in models.items()}
    a, b, c = (score_pool("h_score", m, split.train, plan, 2, 60).draws for m in (models, files, nets))
    assert np.allclose(a, b, rtol=1e-6)
    assert np.allclose(a, c, rtol=1e-6)
    assert set(load_file(files[SOURCES[0]])) == set(nets[SOURCES[0]].state_dict())
    refused(score_pool, "leep", {"a": tmp_path / "gone.safetensors"}, split.train, plan, says="gone")


@pytest.mark.parametrize("name", ["leep", "transrate"])
def test_the_affinity_leads_to_the_best_source(models, split, plan, name):
    found = score_pool(name, models, split.train, plan, repeats=2, voxels=60)
    A = found.affinity()
    order = found.table.sort_values("score", ascending=False)
    paths = best_paths(A, split.train.name, sources=1)
    assert [p.sources[0] for p in paths] == order.source.tolist()
    assert np.allclose([p.cost for p in paths], order.score.max() - order.score, atol=1e-9)
    assert paths[0].cost == 0
    assert paths[0].terms == ((name, 0.0),)
    refused(best_paths, A, split.train.name, sources=2, says="No path of 2")


def test_the_affinity_of_a_pool(models, split, plan):
    found = score_pool("leep", models, split.train, plan, repeats=2, voxels=60)
    A = found.affinity()
    assert A.names == (*SOURCES, split.train.name)
    assert not np.isnan(A.distance).any()
    assert (A.distance >= 0).all()
    assert (np.diag(A.distance) == 0).all()
    assert A.parameters["score"] == "leep"
    assert np.isclose(A.parameters["best"], found.table.score.max())
    assert found.affinity("mine").names[-1] == "mine"


@pytest.fixture(scope="module")
def matrix(models, split, plan):
    tasks = [*(m.task for m in models.values()), split.train]
    return score_matrix("leep", models, tasks, plan, repeats=2, voxels=60)


def test_the_matrix_holds_the_scores_of_every_pool(matrix, models, split, plan):
    table = {}
    for t in [*(m.task for m in models.values()), split.train]:
        others = {s: m for s, m in models.items() if s != t.name}
        found = score_pool("leep", others, t, plan, repeats=2, voxels=60).table
        table[t.name] = found.set_index("source").score
    best = max(score.max() for score in table.values())
    distance = pd.DataFrame(matrix.distance, matrix.names, matrix.names)
    for target, score in table.items():
        assert np.allclose(distance.loc[score.index, target], best - score, atol=1e-9)
    assert (np.diag(matrix.distance) == 0).all()
    assert np.isinf(distance.loc[split.train.name, list(SOURCES)]).all()


def test_the_matrix_is_asymmetric_and_drives_two_sources(matrix, split):
    inner = matrix.distance[:3, :3]
    assert (inner != inner.T)[~np.eye(3, dtype=bool)].all()
    cost = {}
    for i, j in permutations(range(3), 2):
        steps = matrix.distance[i, j] + matrix.distance[j, 3]
        cost[SOURCES[i], SOURCES[j]] = steps + matrix.distance[i, 3]
    found = best_paths(matrix, split.train.name, sources=2, top=6)
    assert len(found) == 6
    assert found[0].sources == min(cost, key=cost.get)
    assert np.allclose([p.cost for p in found], sorted(cost.values()))


def test_the_own_task_is_read_once_for_otce(models, split, plan, monkeypatch):
    read, plain = [], module.prepare_task

    def told(task, plan):
        read.append(task.name)
        return plain(task, plan)

    monkeypatch.setattr(module, "prepare_task", told)
    tasks = [*(m.task for m in models.values()), split.train]
    M = score_matrix("otce", models, tasks, plan, repeats=1, voxels=40, cases=2)
    assert np.isfinite(M.distance[:3]).all()
    as_target_and_as_source = [*SOURCES, *SOURCES]
    assert sorted(read) == sorted([*as_target_and_as_source, split.train.name])


def test_few_cases_stand_for_a_task(models, split, plan):
    task = split.sources[SOURCES[1]]
    few = module._few(task, 2, 0)
    assert len(few) == 2 < len(task)
    assert [c for c in task.cases if c in few.cases] == list(few.cases)
    assert module._few(task, 100, 0) == task
    net = models[SOURCES[0]].net
    found = score_pool("cc_fv", {"a": net}, task, plan, 1, 80, cases=2)
    assert np.isclose(found.draws[0, 0], expected("cc_fv", net, few, plan, 0, voxels=80), rtol=1e-5)


def test_what_a_score_refuses_stops_nobody_else(models, split, plan):
    dead = build_network(plan, 0).to(device())
    for p in dead.parameters():
        p.data.zero_()  # every voxel has the features 0
    pair = {"dead": dead, "alive": models[SOURCES[0]].net}
    with pytest.warns(UserWarning, match="cc_fv of dead for") as told:
        found = score_pool("cc_fv", pair, split.train, plan, 2, 60)
    ours = [w for w in told if "cc_fv" in str(w.message)]
    assert {w.filename for w in ours} == {__file__}  # the warning names the caller's line
    assert np.isnan(found.table.score[0])
    assert np.isfinite(found.table.score[1])
    A = found.affinity()
    assert A.distance[0, -1] == np.inf
    assert [p.sources for p in best_paths(A, split.train.name, 1)] == [("alive",)]
    with pytest.warns(UserWarning, match="dead"):
        nothing = score_pool("cc_fv", {"dead": dead}, split.train, plan, 1, 60)
    refused(nothing.affinity, says="No source has a score")


def test_mistakes_are_named(models, split, plan):
    net = models[SOURCES[0]].net
    target = split.train
    refused(score_pool, "lep", models, target, plan, says="leep")
    refused(score_pool, "leep", {}, target, plan, says="no source model")
    refused(score_pool, "leep", {target.name: net}, target, plan, says="both a source and the target")
    refused(score_pool, "otce", {"a": net}, target, plan, says="own task")
    refused(score_pool, "leep", models, target, plan, 0, says="repeats is 0")
    refused(score_pool, "leep", models, target, plan, cases=0, says="cases of a task is 0")
    refused(score_pool, "leep", models, target, plan, layer="no", says="layer 'no'")
    refused(score_matrix, "leep", models, [], plan, says="targets")
    refused(score_matrix, "leep", models, [target] * 2, plan, says="names")


def test_what_is_drawn_is_frozen(models, split, plan):
    d = features(models[SOURCES[0]].net, split.train, plan, voxels=20)
    assert isinstance(d, Drawn)
    with pytest.raises(AttributeError):
        d.labels = 0
