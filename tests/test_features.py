"Features of source models against plain passes of the network, written out here, and scores of a pool against the scores of the arrays."
import warnings
from dataclasses import replace

import numpy as np
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
from seqtransfer.networks import Plan, build_network, device, prepare, save_network
from seqtransfer.paths import best_paths
from seqtransfer.tasks import Volume, protocol, read_case

PLAN = Plan((1.0, 1.0, 1.0), (16, 16, 16), (4, 8, 16))
SOURCES = "TumourA-FLAIR-ED", "LesionA-FLAIR-WMH", "Infant-T1-GM"


@pytest.fixture(scope="module")
def split(zoo): return protocol(read_pool(zoo), "TumourB-FLAIR-ED", shots=2)


@pytest.fixture(scope="module")
def plan(split): return Plan(tuple(read_case(split.train.cases[0]).spacing), (16, 16, 16), (4, 8, 16))


@pytest.fixture(scope="module")
def models(split, plan): return {n: SourceModel(build_network(plan, seed).to(device()), split.sources[n]) for seed, n in enumerate(SOURCES)}


def made(monkeypatch, split, *volumes):
    "The target task with its cases replaced by volumes in memory."
    task = replace(split.train, cases=split.train.cases[:len(volumes)])
    of = dict(zip(task.cases, volumes))
    monkeypatch.setattr("seqtransfer.training.read_case", of.__getitem__)
    return task


def blob(size=(16, 16, 16), ignored=False, seed=0, mask=None):
    "Noise without margins, a box as object, perhaps with two ignored slabs."
    rng = np.random.default_rng(seed)
    if mask is None:
        mask = np.zeros(size, bool); mask[4:9, 5:11, 3:12] = True
    skip = None
    if ignored:
        skip = np.zeros(size, bool); skip[:2] = skip[6] = True
        mask = mask & ~skip
    return Volume(rng.uniform(1, 2, size).astype(np.float32), mask, np.eye(4), skip)


def hooks(net): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def by_hand(net, volume):
    "The last map before the head at every voxel of a volume of one window, and the probability, (H, W, D, C + 1), from a plain pass."
    with torch.inference_mode():
        x = prepare(volume, PLAN)[0][None].as_tensor().to(device())
        first = net.eval().model[0](x)  # encoder, all that is below it, skip connection
        up = torch.cat([first, net.model[1].submodule(first)], 1)[0].cpu().numpy()
        p = torch.sigmoid(net(x))[0].cpu().numpy()
    for axis in (1, 2, 3):  # every second voxel has a value of its own, the others lie halfway; the last has no neighbour
        after = np.concatenate([np.take(up, range(1, up.shape[axis]), axis), np.take(up, [-1], axis)], axis)
        shape = list(up.shape); shape[axis] *= 2
        up = np.stack([up, (up + after) / 2], axis + 1).reshape(shape)
    return np.concatenate([up, p]).transpose(1, 2, 3, 0)


def position(net, volume, drawn):
    "The voxels that were drawn, told by all that the network says there: with noise as image it is different everywhere."
    there = by_hand(net, volume)
    said = np.concatenate([drawn.features, drawn.softmax[:, 1:]], 1)
    away = np.abs(there.reshape(-1, 1, said.shape[1]) - said).max(-1)
    assert away.min(0).max() < 1e-5 and np.sort(away, 0)[1].min() > 1e-4
    return np.stack(np.unravel_index(away.argmin(0), there.shape[:3]), 1)


def test_features_are_those_of_a_plain_pass(monkeypatch, split):
    volume, net = blob(), build_network(PLAN, 0).to(device())
    drawn = features(net, made(monkeypatch, split, volume), PLAN, voxels=60)
    at = position(net, volume, drawn)
    assert default_layer(net) == "model.1" and drawn.features.shape == (60, layers(net)["model.1"][0]) == (60, 8)
    assert len(np.unique(at, axis=0)) == 60 and np.array_equal(volume.mask[tuple(at.T)], drawn.labels == 1)
    assert len({tuple(a % 2) for a in at}) == 8  # on and between the values of the map


def test_a_full_resolution_layer_is_looked_up_exactly(monkeypatch, split):
    volume, net = blob(), build_network(PLAN, 0).to(device())
    drawn = features(net, made(monkeypatch, split, volume), PLAN, "model.2", voxels=60)
    assert np.allclose(1 / (1 + np.exp(-drawn.features[:, 0].astype(float))), drawn.softmax[:, 1], atol=1e-6) and np.allclose(drawn.softmax.sum(1), 1, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(0, 2**16), st.tuples(*[st.integers(-3, 3)] * 3))
def test_a_ramp_is_taken_back_from_a_coarse_map(strides, seed, slope):
    middle = torch.nn.Conv3d(1, 1, 3, stride=2, padding=1, bias=False)
    torch.nn.init.zeros_(middle.weight).data[0, 0, 1, 1, 1] = 1
    size = 16, 24, 32
    voxels = torch.tensor(np.random.default_rng(seed).integers(0, np.array(size) - 2**strides + 1, (20, 3)))
    maps = (torch.tensor(np.indices(size)) * torch.tensor(slope)[:, None, None, None]).sum(0).float()[None, None]
    with torch.inference_mode():
        for _ in range(strides): maps = middle(maps)
    assert torch.allclose(module._at(maps, voxels, size)[:, 0], (voxels * torch.tensor(slope)).sum(1).float(), atol=1e-3)


@pytest.mark.parametrize("size", [(16, 16, 16), (11, 13, 30), (37, 20, 9)])
def test_the_softmax_is_what_testing_predicts(monkeypatch, split, size):
    rng = np.random.default_rng(1)
    volume = blob(size, mask=rng.random(size) < 0.1)
    net = build_network(PLAN, 3).to(device())
    mask = predict(net, volume, PLAN)  # no margins and no resampling: the grids are the same
    drawn = features(net, made(monkeypatch, split, volume), PLAN, voxels=volume.mask.size)
    order = np.arange(volume.mask.size)
    rows = np.concatenate([order[~volume.mask.ravel()], order[volume.mask.ravel()]])
    assert len(drawn.labels) == volume.mask.size and 0 < mask.mean() < 1
    sure = np.abs(drawn.softmax[:, 1] - 0.5) > 1e-4
    assert np.array_equal((drawn.softmax[:, 1] > 0.5)[sure], mask.ravel()[rows][sure])


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 900), seed=st.integers(0, 2**16))
def test_classes_are_balanced(n, seed):
    where = module._Voxels((torch.zeros(1, 16, 16, 16),), *(np.zeros(1000, int),) * 2, np.repeat([0, 1], [900, 100]), np.zeros(1000, int))
    counts = np.bincount(where.label[scores.balanced_sample(where.label, n, seed)], minlength=2)
    assert counts[1] == min(n // 2, 100) and counts.sum() == n


def test_the_draw_is_balanced_over_the_task(models, split, plan):
    net = models[SOURCES[0]].net
    drawn = features(net, split.train, plan, voxels=40)
    assert np.bincount(drawn.labels).tolist() == [20, 20] and set(drawn.cases) <= {0, 1}
    objects = [int((d["mask"] > 0).sum()) for d in module.prepare_task(split.train, plan)]
    every = features(net, split.train, plan, voxels=10**6)
    assert [int(((every.cases == i) & (every.labels == 1)).sum()) for i in range(2)] == objects


def test_ignored_voxels_are_never_drawn(monkeypatch, split):
    volume, net = blob(ignored=True), build_network(PLAN, 0).to(device())
    drawn = features(net, made(monkeypatch, split, volume), PLAN, voxels=10**6)
    assert len(drawn.labels) == (~volume.ignored).sum() and drawn.labels.sum() == volume.mask.sum()
    for seed in range(20):
        at = position(net, volume, features(net, made(monkeypatch, split, volume), PLAN, voxels=50, seed=seed))
        assert not volume.ignored[tuple(at.T)].any()


def test_background_is_tissue_unless_air_is_asked_for(monkeypatch, split):
    volume = blob((16, 16, 32))
    volume.image[:, :, 20:26] = 0; volume.image[4:9, 5:11, 3] = 0  # a hole, and a part of the object that is dark
    volume.image[0, :, :] = volume.image[:, 0, :] = 0
    net, inside = build_network(PLAN, 0).to(device()), module.prepare_task(made(monkeypatch, split, volume), PLAN)[0]
    dark = (inside["image"] == 0).cpu().numpy(); y = (inside["mask"] > 0).cpu().numpy()
    assert (dark & y).any() and (dark & ~y).any()
    tissue, air = (features(net, made(monkeypatch, split, volume), PLAN, voxels=10**6, air=a) for a in (False, True))
    assert len(air.labels) == y.size and len(tissue.labels) == y.size - (dark & ~y).sum() and tissue.labels.sum() == air.labels.sum() == y.sum()


def test_the_same_seed_gives_the_same_bits(models, split, plan):
    net = models[SOURCES[0]].net
    a, b, c = (features(net, split.train, plan, voxels=50, seed=s) for s in (1, 1, 2))
    assert np.array_equal(a.labels, b.labels) and np.array_equal(a.cases, b.cases)
    if device().type == "cpu": assert np.array_equal(a.features, b.features) and np.array_equal(a.softmax, b.softmax)
    assert not np.array_equal(a.features, c.features)
    assert a.features.dtype == a.softmax.dtype == np.float32 and a.labels.dtype.kind == a.cases.dtype.kind == "i"


def test_the_network_is_left_as_it_was(models, split, plan, monkeypatch):
    net = build_network(plan, 0).to(device()).train()
    net.model[0].eval()
    modes, weights = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    features(net, split.train, plan, voxels=20)
    assert hooks(net) == 0 and [m.training for m in net.modules()] == modes
    with pytest.raises(InputError): features(net, split.train, plan, "nowhere")
    def fails(*args): raise RuntimeError("in the middle of it")
    monkeypatch.setattr(module, "_at", fails)
    with pytest.raises(RuntimeError, match="middle"): features(net, split.train, plan, voxels=20)
    assert hooks(net) == 0 and [m.training for m in net.modules()] == modes
    net.model[2].register_forward_hook(lambda *_: 1 / 0)  # someone else's stays
    with pytest.raises(ZeroDivisionError): features(net, split.train, plan, voxels=20)
    assert hooks(net) == 1 and [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())


def test_layers_and_the_one_before_the_head():
    for units, expected in ((0, "model.1"), (1, "model.2.0"), (2, "model.2.1.conv.unit0")):
        net = UNet(3, 1, 1, (4, 8, 16), strides=(2, 2), num_res_units=units, norm="instance")
        found, last = layers(net), []
        def see(m, x, y):
            if isinstance(m, torch.nn.Conv3d | torch.nn.ConvTranspose3d): last[:] = [x[0]]
        handles = [m.register_forward_hook(see) for m in net.modules()]
        net.eval()(torch.zeros(1, 1, 16, 16, 16))
        for h in handles: h.remove()
        assert found[default_layer(net)][0] == last[0].shape[1] and found[default_layer(net)][1] == tuple(16 // n for n in last[0].shape[2:])
        if units < 2: assert default_layer(net) == expected
        assert not any(n.endswith("adn.D") for n in found) and hooks(net) == 0


def test_unknown_layers_and_unusable_tasks(models, split, plan, monkeypatch):
    net = models[SOURCES[0]].net
    with pytest.raises(InputError, match="model.1.submodule"): features(net, split.train, plan, "model.1.submodul")
    with pytest.raises(InputError, match="holds its label"): features(net, made(monkeypatch, split, blob(mask=np.zeros((16,) * 3, bool))), PLAN)
    full = blob(mask=np.ones((16,) * 3, bool))
    with pytest.raises(InputError, match="no voxel outside its label"): features(net, made(monkeypatch, split, full), PLAN)
    rest = replace(blob(), ignored=~blob().mask)  # what is not object is ignored
    with pytest.raises(InputError, match="no voxel outside its label"): features(net, made(monkeypatch, split, rest), PLAN)
    with pytest.raises(InputError): features(net, made(monkeypatch, split, blob()), PLAN, voxels=1)


def test_a_case_without_object_is_legal(monkeypatch, split):
    task = made(monkeypatch, split, blob(), blob(seed=1, mask=np.zeros((16,) * 3, bool)))
    drawn = features(build_network(PLAN, 0), task, PLAN, voxels=100)
    assert set(drawn.cases[drawn.labels == 1]) == {0} and set(drawn.cases[drawn.labels == 0]) == {0, 1}


def test_candidates_are_few_and_none_is_lost_below(monkeypatch, split):
    task = made(monkeypatch, split, blob(), blob(seed=1))
    few, every = module._voxels(task, PLAN, False, most=50), module._voxels(task, PLAN, False)
    assert [np.sum((few.image == i) & (few.label == k)) for i in (0, 1) for k in (0, 1)] == [50] * 4 and len(every.label) == 2 * 16**3
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
    assert list(found.table.columns) == ["source", "score", "low", "high", "seconds"] and tuple(found.table.source) == SOURCES and found.draws.shape == (3, 2)
    for s, draws in zip(SOURCES, found.draws):
        m = models[s]
        wanted = [expected(name, m.net, split.train, plan, r, m.task if name == "otce" else None, voxels=60) for r in range(2)]
        assert np.allclose(draws, wanted, rtol=1e-5, atol=1e-6)
    assert np.allclose(found.table.score, found.draws.mean(1)) and np.allclose(found.table[["low", "high"]], np.percentile(found.draws, [2.5, 97.5], axis=1).T)
    assert (found.table.seconds > 0).all()


def test_leep_of_the_drawn_arrays(models, split, plan):
    found = score_pool("leep", models, split.train, plan, repeats=3, voxels=80, layer="model.0", seed=5)
    for s, draws in zip(SOURCES, found.draws):
        for r in range(3):
            d = features(models[s].net, split.train, plan, "model.0", voxels=80, seed=seed_for(5, "draw", r))
            given = np.array([[d.softmax[d.labels == c, z].sum() for z in (0, 1)] for c in (0, 1)], float)
            given /= given.sum(0)
            assert np.isclose(draws[r], np.log((given[d.labels] * d.softmax).sum(1)).mean(), atol=1e-6)


def test_networks_paths_and_bare_models_give_the_same(models, split, plan, tmp_path):
    files = {s: save_network(m.net, tmp_path / f"{s}.safetensors", plan) for s, m in models.items()}
    a, b, c = (score_pool("h_score", m, split.train, plan, 2, 60).draws for m in (models, files, {s: m.net for s, m in models.items()}))
    assert np.allclose(a, b, rtol=1e-6) and np.allclose(a, c, rtol=1e-6)
    assert set(load_file(files[SOURCES[0]])) == set(models[SOURCES[0]].net.state_dict())
    with pytest.raises(InputError, match="gone"): score_pool("leep", {"a": tmp_path / "gone.safetensors"}, split.train, plan)


def test_the_affinity_leads_to_the_best_source(models, split, plan):
    for name in ("leep", "transrate"):
        found = score_pool(name, models, split.train, plan, repeats=2, voxels=60)
        A = found.affinity()
        order = found.table.sort_values("score", ascending=False)
        paths = best_paths(A, split.train.name, sources=1)
        assert [p.sources[0] for p in paths] == order.source.tolist()
        assert np.allclose([p.cost for p in paths], order.score.max() - order.score, atol=1e-9) and paths[0].cost == 0 and paths[0].terms == ((name, 0.0),)
        assert A.names == (*SOURCES, split.train.name) and not np.isnan(A.distance).any() and (A.distance >= 0).all() and (np.diag(A.distance) == 0).all()
        assert A.parameters["score"] == name and np.isclose(A.parameters["best"], order.score.max())
        with pytest.raises(InputError, match="No path of 2"): best_paths(A, split.train.name, sources=2)
        assert found.affinity("mine").names[-1] == "mine"


def test_the_matrix_is_asymmetric_and_drives_two_sources(models, split, plan):
    tasks = [*(m.task for m in models.values()), split.train]
    M = score_matrix("leep", models, tasks, plan, repeats=2, voxels=60)
    table = {t.name: score_pool("leep", {s: m for s, m in models.items() if s != t.name}, t, plan, repeats=2, voxels=60).table.set_index("source").score for t in tasks}
    best = max(s.max() for s in table.values())
    for b, t in enumerate(M.names):
        for a, s in enumerate(M.names):
            wanted = 0 if a == b else best - table[t][s] if s in models else np.inf
            assert M.distance[a, b] == pytest.approx(wanted, abs=1e-9)
    inner = M.distance[:3, :3]
    assert (inner != inner.T)[~np.eye(3, dtype=bool)].all()
    cost = {(a, b): M.distance[i, j] + M.distance[j, 3] + M.distance[i, 3] for i, a in enumerate(SOURCES) for j, b in enumerate(SOURCES) if i != j}
    found = best_paths(M, split.train.name, sources=2, top=6)
    assert found[0].sources == min(cost, key=cost.get) and len(found) == 6 and np.allclose([p.cost for p in found], sorted(cost.values()))


def test_the_own_task_is_read_once_for_otce(models, split, plan, monkeypatch):
    read, plain = [], module.prepare_task
    monkeypatch.setattr(module, "prepare_task", lambda task, plan: read.append(task.name) or plain(task, plan))
    M = score_matrix("otce", models, [*(m.task for m in models.values()), split.train], plan, repeats=1, voxels=40, cases=2)
    assert np.isfinite(M.distance[:3]).all() and sorted(read) == sorted([*SOURCES, *SOURCES, split.train.name])


def test_few_cases_stand_for_a_task(models, split, plan):
    task = split.sources[SOURCES[1]]
    few = module._few(task, 2, 0)
    assert len(few) == 2 < len(task) and [c for c in task.cases if c in few.cases] == list(few.cases) and module._few(task, 100, 0) == task
    found = score_pool("cc_fv", {"a": models[SOURCES[0]].net}, task, plan, 1, 80, cases=2)
    assert np.isclose(found.draws[0, 0], expected("cc_fv", models[SOURCES[0]].net, few, plan, 0, voxels=80), rtol=1e-5)


def test_what_a_score_refuses_stops_nobody_else(models, split, plan):
    dead = build_network(plan, 0).to(device())
    for p in dead.parameters(): p.data.zero_()  # every voxel has the features 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = score_pool("cc_fv", {"dead": dead, "alive": models[SOURCES[0]].net}, split.train, plan, 2, 60)
    assert np.isnan(found.table.score[0]) and np.isfinite(found.table.score[1]) and any("dead" in str(w.message) for w in said)
    A = found.affinity()
    assert A.distance[0, -1] == np.inf and [p.sources for p in best_paths(A, split.train.name, 1)] == [("alive",)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="No source has a score"): score_pool("cc_fv", {"dead": dead}, split.train, plan, 1, 60).affinity()


def test_mistakes_are_named(models, split, plan):
    net = models[SOURCES[0]].net
    for wrong, say in ((lambda: score_pool("lep", models, split.train, plan), "leep"), (lambda: score_pool("leep", {}, split.train, plan), "no source model"),
                       (lambda: score_pool("leep", {split.train.name: net}, split.train, plan), "both a source and the target"),
                       (lambda: score_pool("otce", {"a": net}, split.train, plan), "own task"), (lambda: score_pool("leep", models, split.train, plan, 0), "repeats is 0"),
                       (lambda: score_pool("leep", models, split.train, plan, cases=0), "cases of a task is 0"), (lambda: score_pool("leep", models, split.train, plan, layer="no"), "layer 'no'"),
                       (lambda: score_matrix("leep", models, [], plan), "targets"), (lambda: score_matrix("leep", models, [split.train] * 2, plan), "names")):
        with pytest.raises(InputError, match=say): wrong()


def test_what_is_drawn_is_frozen(models, split, plan):
    d = features(models[SOURCES[0]].net, split.train, plan, voxels=20)
    assert isinstance(d, Drawn)
    with pytest.raises(AttributeError): d.labels = 0
