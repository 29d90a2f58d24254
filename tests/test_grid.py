"What a grid expands to, counted independently; grid files that cannot be understood; plans that write nothing."
import json
from functools import cache
from itertools import permutations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from seqtransfer import cli
from seqtransfer.core import InputError
from seqtransfer.datasets import read_pool
from seqtransfer.grid import Grid, Question, arm_runs, duration, jobs_of, read_grid, with_times
from seqtransfer.protocol import protocol
from seqtransfer.arms import ARMS
from seqtransfer.study import Recipe
from seqtransfer.transfer import recipe_plan

TARGETS, SOURCES = ("TumourB-FLAIR-ED", "LesionC-FLAIR-WMH"), ("TumourA-FLAIR-ED", "LesionA-FLAIR-WMH", "LesionB-FLAIR-WMH", "TumourB-T2-ED")
WHERE = "cpu, 1 thread"


@pytest.fixture(scope="module")
def question(zoo):
    "Opens a target and a seed without an affinity, which is expensive and decides nothing here; one plan for all, so that targets can share stages."
    pool = read_pool(zoo, labels=["ED", "WMH"], modalities=["FLAIR", "T2"])
    split = cache(lambda target, seed: protocol(pool, target, 2, seed))
    plan = recipe_plan(split(TARGETS[0], 0), Recipe())
    return lambda target, seed, paths, choice: Question(split(target, seed), plan, paths, choice, {})


@st.composite
def grids(draw):
    some = lambda of: tuple(draw(st.lists(st.sampled_from(of), min_size=1, max_size=len(of), unique=True)))
    n = draw(st.integers(1, 3))
    paths = tuple(draw(st.lists(st.sampled_from(sorted(permutations(SOURCES, n))), min_size=1, max_size=5, unique=True)))
    steps = draw(st.integers(n, 20)), draw(st.integers(1, 9))
    return Grid("data", some(TARGETS), paths, n, arms=some(ARMS), seeds=some((0, 1, 2)), shots=2, recipe=Recipe(*steps)), draw(st.sampled_from(SOURCES))


def shares(steps, n): return [steps // n + (i < steps % n) for i in range(n)]


def prefixes(arm, path, choice, split, recipe):
    "What an arm trains, written down again: of each stage all that decides it (what came before, cases, steps, rate, seed), and its steps."
    def stage(before, names, steps, lr=recipe.source_lr):
        cases = tuple((n, c.patient) for n in names for c in split.sources[n].cases)
        return before, cases, steps, lr, split.seed
    def last(before, steps=recipe.target_steps):
        return before, tuple((split.train.name, c.patient) for c in split.train.cases), steps, recipe.target_lr if before else recipe.source_lr, split.seed
    def chain(names, steps):
        found = [()]
        for n, k in zip(names, steps): found.append(stage(found[-1], (n,), k))
        return found[1:]
    each = shares(recipe.source_steps, len(path))
    one = lambda s: (c := chain((s,), (recipe.source_steps,))) + [last(c[-1])]
    if arm == "scratch": return [last(())]
    if arm == "scratch-total": return [last((), recipe.source_steps + recipe.target_steps)]
    if arm == "direct-oracle": return [p for s in split.sources.names for p in one(s)]
    if arm.startswith("direct-") and arm != "direct-last-hop": return one({"direct-choice": choice, "direct-first": path[0], "direct-last": path[-1]}[arm])
    if arm == "direct-last-hop": return (c := chain(path[-1:], each[-1:])) + [last(c[-1])]
    if arm == "joint": return [(c := stage((), path, recipe.source_steps)), last(c)]
    if arm == "averaged":
        ends = [stage((), (s,), k) for s, k in zip(path, each)]
        return [*ends, last(ends[0] if len(ends) == 1 else tuple(ends))]
    return (c := chain(path, each)) + [last(c[-1])]


@given(grids())
@settings(max_examples=150, deadline=None)
def test_every_distinct_stage_has_one_owner_for_which_all_others_wait(question, tmp_path_factory, asked):
    grid, choice = asked
    paths = lambda target: tuple(p for p in grid.paths if target not in p) or (SOURCES[:grid.sources],)
    questions = [question(t, s, paths(t), choice) for t in grid.targets for s in grid.seeds]
    plan = jobs_of(grid, questions, tmp_path_factory.getbasetemp() / "nowhere", WHERE, 1)
    owner = {s: j for j in plan.jobs for s in j.stages}
    place = {j.id: i for i, j in enumerate(plan.jobs)}
    assert len(place) == len(plan.jobs) == len({j.notebook for j in plan.jobs}) and sum(len(j.stages) for j in plan.jobs) == len(owner) == plan.stages
    before = {}  # all that a job waits for, directly or not
    for j in plan.jobs:
        assert all(place[a] < place[j.id] for a in j.after)
        before[j.id] = {j.id}.union(*(before[a] for a in j.after))
    runs = {r.id: r for q in questions for r in arm_runs(grid, q, WHERE)}
    assert runs.keys() == {j.id for j in plan.jobs if j.template == "transfer_path"}
    for r in runs.values():
        for name, after, *_ in r.stages:
            assert {owner[n].id for n in (name, *after)} <= before[r.id]
            if owner[name].template == "stage": assert {owner[n].id for n in after} <= before[owner[name].id]
    of = {(q.split.test.name, q.split.seed): q for q in questions}
    trained, named = set(), 0
    for r in runs.values():
        q = of[r.target, r.seed]
        path = next(p for p in q.paths if _leads(r, p, choice))
        found = prefixes(r.arm, path, choice, q.split, grid.recipe)
        assert [p[2] for p in found] == [steps for _, _, steps, _ in r.stages]
        trained |= set(found)
        named += len(found)
    assert len(trained) == plan.stages and sum(p[2] for p in trained) == plan.steps and named == plan.named
    assert plan.named_steps == sum(steps for r in runs.values() for _, _, steps, _ in r.stages)


def _leads(run, path, choice) -> bool:
    "Whether a run is the arm along this path."
    if run.arm.startswith("scratch") or run.arm in ("direct-oracle", "direct-choice"): return True
    return run.sources == {"direct-first": path[:1], "direct-last": path[-1:]}.get(run.arm, path)


@given(grids(), st.integers(1, 16))
@settings(max_examples=20, deadline=None)
def test_the_time_a_grid_takes_lies_between_its_bounds(question, tmp_path_factory, asked, workers):
    grid, choice = asked
    grid = Grid("data", TARGETS[:1], tuple(p for p in grid.paths if TARGETS[0] not in p) or (SOURCES[:1],), grid.sources, arms=grid.arms, shots=2, recipe=grid.recipe)
    plan = with_times(jobs_of(grid, [question(TARGETS[0], 0, grid.paths, choice)], tmp_path_factory.getbasetemp(), WHERE, 1), {TARGETS[0]: (1.0, 10.0)})
    work = plan.steps + 10 * sum(j.cases for j in plan.jobs)
    assert sum(j.seconds for j in plan.jobs) == pytest.approx(work) and max(j.seconds for j in plan.jobs) <= duration(plan.jobs, workers) <= work
    assert duration(plan.jobs, 1) == pytest.approx(work) and duration(plan.jobs, workers + 1) <= duration(plan.jobs, workers)
    assert all(j.keep == (j.seconds < 60) for j in plan.jobs)


WRONG = {
    "": "holds no entries", "- a": "holds no entries", "data: [": "is not YAML", "data: zoo": "does not say targets", "targets: [a]": "does not say data", "data: 3\ntargets: [a]": "a folder with data sets",
    "data: zoo\ntargets: a": "a list of names", "data: zoo\ntargets: []": "a list of names", "data: zoo\ntargets: [1]": "a list of names", "data: zoo\ntargets: [a]\nsources: 0": "a number of sources",
    "data: zoo\ntargets: [a]\nsources: true": "a number of sources", "data: zoo\ntargets: [a]\npath: all": "did you mean paths?", "data: zoo\ntargets: [a]\npaths: some": "chosen, all, or a list",
    "data: zoo\ntargets: [a]\npaths: [a, b]": "a list of lists", "data: zoo\ntargets: [a]\npaths: []": "a list of lists", "data: zoo\ntargets: [a]\nseeds: [0.5]": "whole numbers", "data: zoo\ntargets: [a]\nseeds: 3": "whole numbers",
    "data: zoo\ntargets: [a]\nshots: many": "a number of patients", "data: zoo\ntargets: [a]\ntest: 0": "null for all others", "data: zoo\ntargets: [a]\nrecipe: fast": "options of the recipe",
    "data: zoo\ntargets: [a]\nrecipe: {steps: 3}": "an option of the recipe called 'steps'", "data: zoo\ntargets: [a]\nrecipe: {optimiser: adam}": "There is no optimiser 'adam'", "data: zoo\ntargets: [a]\nrecipe: {source_lr: -1}": "above 0"}


@pytest.mark.parametrize("text", WRONG)
def test_a_grid_file_that_cannot_be_understood_is_refused_with_the_way_out(text, tmp_path):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(InputError) as e: read_grid(tmp_path / "g.yaml")
    assert WRONG[text] in str(e.value) and "\n" not in str(e.value)
    assert str(tmp_path / "g.yaml") in str(e.value) or "recipe" in text


@given(st.dictionaries(st.sampled_from(["data", "targets", "paths", "sources", "among", "arms", "seeds", "shots", "test", "recipe", "wanted", "else"]),
                       st.recursive(st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=False) | st.sampled_from(["all", "chosen", "a", ""]), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from("ab"), x, max_size=2), max_leaves=5)))
@settings(max_examples=300, deadline=None)
def test_whatever_a_grid_file_says_it_is_read_or_refused_in_one_sentence(tmp_path_factory, said):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(said))
    try: grid = read_grid(file)
    except InputError as e: assert "\n" not in str(e)
    else: assert {"data", "targets"} <= said.keys() and isinstance(hash(grid.targets), int) and isinstance(hash(grid.paths), int)


@pytest.fixture
def command(monkeypatch, capsys):
    "Calls the command line; returns exit code and what it said on standard output and standard error."
    def call(*args):
        monkeypatch.setattr("sys.argv", ["seqtransfer", *map(str, args)])
        with pytest.raises(SystemExit) as end: cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return end.value.code or 0, out, err
    return call


def written(folder, zoo, **other):
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({"data": str(zoo), "targets": [TARGETS[0]], "among": list(SOURCES[:3]), "paths": "all", "shots": 2, "recipe": {"source_steps": 20, "target_steps": 10}, **other}))
    return file


def test_a_dry_run_shows_the_plan_and_writes_nothing(zoo, tmp_path, command):
    file = written(tmp_path, zoo)
    code, out, _ = command("grid", file, "--out", tmp_path / "grid", "--dry-run", "--json")
    s = json.loads(out)
    # scratch and the nearest source, and six pairs of three; each pair begins with one of three half stages
    assert code == 0 and s["runs"] == 1 + 1 + 6 and s["stages named"] == 1 + 2 + 18 and s["stages"] == 1 + 2 + 3 + 12
    assert s["optimiser steps named"] == 10 + 30 * 7 and s["optimiser steps"] == s["optimiser steps named"] - 3 * 10 and s["notebooks"] == 1 + 3 + 8 and s["test cases"] == 8 * 3
    code, out, _ = command("grid", file, "--out", tmp_path / "grid", "--dry-run", "--workers", "3")
    assert code == 0 and "8 runs in 12 notebooks" in out and "(30 saved)" in out and "on 3 workers" in out
    assert [p.name for p in tmp_path.iterdir()] == ["grid.yaml"]


@pytest.mark.parametrize("other, said", [
    ({"targets": ["TumourB-FLAIR-ET ED"]}, "TumourB-FLAIR-E"), ({"among": ["TumourA-FLAIR-EDD"]}, "did you mean TumourA-FLAIR-ED?"), ({"paths": [["LesionC-FLAIR-WMH"]]}, "LesionC-FLAIR-WMH"),
    ({"arms": ["sequentiel"]}, "did you mean sequential?"), ({"sources": 4}, "1 to 3 sources"), ({"recipe": {"source_steps": 1, "target_steps": 10}}, "no step"), ({"test": 9}, "9"), ({"data": "nowhere"}, "nowhere"),
    ({"paths": [["TumourA-FLAIR-ED", "TumourA-FLAIR-ED"]]}, "twice"), ({"recipe": {"source_steps": 20, "target_steps": 10, "start": "nobody.pt"}}, "nobody.pt")])
def test_a_grid_that_cannot_be_run_is_refused_before_anything_is_written(zoo, tmp_path, command, other, said):
    code, _, err = command("grid", written(tmp_path, zoo, **other), "--out", tmp_path / "grid")
    assert code == 2 and said in err and err.splitlines()[-1].startswith("seqtransfer: ") and not (tmp_path / "grid").exists()


@pytest.mark.parametrize("options, said", [
    (("--workers", 0), "at least one"), (("--scheduler-file", "s.json", "--slurm", "s.yaml"), "one of the two"), (("--workers", 2, "--slurm", "s.yaml"), "--workers are workers on this machine"), (("--slurm", "nobody.yaml"), "nobody.yaml")])
def test_workers_that_cannot_be_had_are_refused_before_anything_is_written(zoo, tmp_path, command, options, said):
    code, _, err = command("grid", written(tmp_path, zoo), "--out", tmp_path / "grid", *options)
    assert code == 2 and said in err and not (tmp_path / "grid").exists()


def test_a_folder_without_a_grid_has_no_status(tmp_path, command):
    code, _, err = command("status", tmp_path)
    assert code == 2 and "holds no grid" in err and not list(tmp_path.iterdir())
