"What a study expands to, counted independently; study files that cannot be understood; plans that write nothing."

import json
from dataclasses import replace
from functools import cache
from itertools import permutations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from seqtransfer import cli
from seqtransfer.arms import ARMS, TABLE
from seqtransfer.core import InputError
from seqtransfer.datasets import read_pool
from seqtransfer.executors.notebooks import Times, duration, jobs_of, with_times
from seqtransfer.plans import plan
from seqtransfer.protocol import protocol
from seqtransfer.questions import OpenStudy, Question, network_plan
from seqtransfer.study import Recipe, Study, read_study

TARGETS = ("TumourB-FLAIR-ED", "LesionC-FLAIR-WMH")
SOURCES = ("TumourA-FLAIR-ED", "LesionA-FLAIR-WMH", "LesionB-FLAIR-WMH", "TumourB-T2-ED")
WHERE = "cpu, 1 thread"


@pytest.fixture(scope="module")
def opened(zoo):
    "Opens a study without an affinity, which decides nothing here; one network for all, so that targets share stages."
    pool = read_pool(zoo, labels=["ED", "WMH"], modalities=["FLAIR", "T2"])
    split = cache(lambda target, seed: protocol(pool, target, 2, seed))
    network = network_plan(split(TARGETS[0], 0), Recipe())

    def call(study):
        pairs = [(t, s) for t in study.targets for s in study.seeds]
        return OpenStudy(study, tuple(question(study, t, s) for t, s in pairs), {})

    def question(study, target, seed):
        "A target takes those of the study's paths that do not lead through it."
        paths = tuple(p for p in study.paths if target not in p) or (SOURCES[: study.n_sources],)
        return Question(study, split(target, seed), network, paths, study.choice)

    return call


@st.composite
def studies(draw):
    def some(values):
        return tuple(draw(st.lists(st.sampled_from(values), min_size=1, max_size=len(values), unique=True)))

    n = draw(st.integers(1, 3))
    every = sorted(permutations(SOURCES, n))
    paths = tuple(draw(st.lists(st.sampled_from(every), min_size=1, max_size=5, unique=True)))
    recipe = Recipe(draw(st.integers(n, 20)), draw(st.integers(1, 9)))
    planned = [arm for arm in ARMS if TABLE[arm].origin != "candidates"]  # whose stages the plan alone decides
    asked = {"arms": some(planned), "seeds": some((0, 1, 2)), "shots": 2, "recipe": recipe}
    return Study("data", some(TARGETS), paths, n, **asked, choice=draw(st.sampled_from(SOURCES)))


def shares(steps, n):
    return [steps // n + (i < steps % n) for i in range(n)]


class Literal:
    "What arms train, written down once more: of each stage all that decides it, and its steps."

    def __init__(self, split, recipe):
        self.split, self.recipe, self.seed = split, recipe, split.seed

    def stage(self, before, names, steps):
        cases = tuple((n, c.patient) for n in names for c in self.split.sources[n].cases)
        return before, cases, steps, self.recipe.source_lr, self.seed

    def last(self, before, more=0):
        cases = tuple((self.split.train.name, c.patient) for c in self.split.train.cases)
        rate = self.recipe.target_lr if before else self.recipe.source_lr
        return before, cases, self.recipe.target_steps + more, rate, self.seed

    def chain(self, names, steps):
        found = [()]
        for name, n in zip(names, steps):
            found.append(self.stage(found[-1], (name,), n))
        return found[1:]

    def one(self, name):
        found = self.chain((name,), (self.recipe.source_steps,))
        return [*found, self.last(found[-1])]

    def of(self, arm, path, choice, each):
        steps = shares(self.recipe.source_steps, len(path))
        if arm == "scratch":
            return [self.last(())]
        if arm == "scratch-total":
            return [self.last((), self.recipe.source_steps)]
        if arm == "direct-last-hop":
            found = self.chain(path[-1:], steps[-1:])
            return [*found, self.last(found[-1])]
        single = {"direct-choice": choice, "direct-first": path[0], "direct-last": path[-1], "direct-each": each}
        if arm in single:
            return self.one(single[arm])
        if arm == "joint":
            found = self.stage((), path, self.recipe.source_steps)
            return [found, self.last(found)]
        if arm == "averaged":
            ends = [self.stage((), (s,), n) for s, n in zip(path, steps)]
            return [*ends, self.last(ends[0] if len(ends) == 1 else tuple(ends))]
        found = self.chain(path, steps)
        return [*found, self.last(found[-1])]


def leads(run, path):
    "Whether a run is its arm along this path."
    if run.arm.startswith("scratch") or run.arm in ("direct-each", "direct-choice"):
        return True
    picked = {"direct-first": path[:1], "direct-last": path[-1:]}
    return run.sources == picked.get(run.arm, path)


def waited_for(jobs):
    "All that each job waits for, directly or not, itself included."
    before = {}
    for job in jobs:
        before[job.id] = {job.id}.union(*(before[a] for a in job.after))
    return before


@given(studies())
@settings(max_examples=100, deadline=None)
def test_every_distinct_stage_has_one_owner_for_which_all_others_wait(opened, tmp_path_factory, study):
    planned = plan(opened(study), WHERE)
    jobs = jobs_of(planned, tmp_path_factory.getbasetemp() / "nowhere", 1)
    owner = {name: job for job in jobs for name in job.stages}
    place = {job.id: i for i, job in enumerate(jobs)}
    assert len(place) == len(jobs)
    assert len({job.notebook for job in jobs}) == len(jobs)
    assert sum(len(job.stages) for job in jobs) == len(owner)
    assert owner.keys() == planned.by_name.keys()
    assert all(place[a] < place[job.id] for job in jobs for a in job.after)
    before = waited_for(jobs)
    ids = {j.id for j in jobs if j.template == "transfer_path"}
    assert len(ids) == len(planned.runs)
    for job in jobs:
        for name in job.stages:
            needed = {owner[n].id for n in planned.by_name[name].after}
            assert needed <= before[job.id]


@given(studies())
@settings(max_examples=100, deadline=None)
def test_a_plan_trains_what_arms_are_said_to_train(opened, study):
    planned = plan(opened(study), WHERE)
    trained, named = set(), 0
    for run in planned.runs:
        question = planned.question(run)
        path = next(p for p in question.paths if leads(run, p))
        each = run.sources[0] if run.sources else None
        found = Literal(question.split, study.recipe).of(run.arm, path, study.choice, each)
        assert [stage[2] for stage in found] == [planned.by_name[n].stage.steps for n in run.stages]
        trained |= set(found)
        named += len(found)
    assert len(trained) == len(planned.stages)
    assert sum(stage[2] for stage in trained) == planned.steps
    assert named == sum(len(run.stages) for run in planned.runs)


@given(studies())
@settings(max_examples=50, deadline=None)
def test_runs_are_told_apart_by_their_labels(opened, study):
    planned = plan(opened(study), WHERE)
    assert len({(run.target, run.seed, run.label) for run in planned.runs}) == len(planned.runs)
    assert len({(run.target, run.seed, run.arm, run.sources) for run in planned.runs}) == len(planned.runs)
    for run in planned.runs:
        assert TABLE[run.arm].origin != "nothing" or run.sources == ()


@given(studies(), st.integers(1, 16))
@settings(max_examples=20, deadline=None)
def test_the_time_a_study_takes_lies_between_its_bounds(opened, tmp_path_factory, study, workers):
    one = replace(study, targets=TARGETS[:1], seeds=(0,))
    planned = plan(opened(one), WHERE)
    jobs = with_times(jobs_of(planned, tmp_path_factory.getbasetemp(), 1), {TARGETS[0]: Times(1.0, 10.0)})
    work = planned.steps + 10 * sum(job.cases for job in jobs)
    assert sum(job.seconds for job in jobs) == pytest.approx(work)
    assert max(job.seconds for job in jobs) <= duration(jobs, workers) <= work + 1e-6
    assert duration(jobs, 1) == pytest.approx(work)
    assert duration(jobs, workers + 1) <= duration(jobs, workers)


@pytest.mark.parametrize("seconds, shared", [(0.001, True), (1000.0, False)])
def test_short_notebooks_share_a_kernel(opened, tmp_path, seconds, shared):
    planned = plan(opened(Study("zoo", TARGETS[:1], paths=(SOURCES[:2],), choice=SOURCES[0])), WHERE)
    jobs = with_times(jobs_of(planned, tmp_path, 1), {TARGETS[0]: Times(seconds, seconds)})
    assert {job.keep for job in jobs if job.steps or job.cases} == {shared}


ASKED = "data: zoo\ntargets: [a]\n"
WRONG = {
    "": "holds no entries",
    "- a": "holds no entries",
    "data: [": "is not YAML",
    "data: zoo": "does not say targets",
    "targets: [a]": "does not say data",
    "data: 3\ntargets: [a]": "a folder with data sets",
    "data: zoo\ntargets: a": "a list of names",
    "data: zoo\ntargets: []": "a list of names",
    "data: zoo\ntargets: [1]": "a list of names",
    f"{ASKED}sources: 0": "a number of sources",
    f"{ASKED}sources: true": "a number of sources",
    f"{ASKED}path: all": "did you mean paths?",
    f"{ASKED}paths: some": "chosen, all, or a list",
    f"{ASKED}paths: [a, b]": "a list of lists",
    f"{ASKED}paths: []": "a list of lists",
    f"{ASKED}seeds: [0.5]": "whole numbers",
    f"{ASKED}seeds: 3": "whole numbers",
    f"{ASKED}shots: many": "a number of patients",
    f"{ASKED}test: 0": "null for all others",
    f"{ASKED}arms: [direct]": "There is no arm 'direct'",
    f"{ASKED}arms: [direct-oracle]": "ask for direct-each",
    f"{ASKED}mode: fast": "affinity mode",
    f"{ASKED}weights: {{fg: 1}}": "affinity term",
    f"{ASKED}weights: none.json": "none.json",
    f"{ASKED}choice: A": "without a path",
    f"{ASKED}recipe: fast": "options of the recipe",
    f"{ASKED}recipe: {{steps: 3}}": "an option of the recipe called 'steps'",
    f"{ASKED}recipe: {{optimiser: adam}}": "There is no optimiser 'adam'",
    f"{ASKED}recipe: {{source_lr: -1}}": "above 0",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_study_file_that_cannot_be_understood_is_refused_with_the_way_out(text, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError) as e:
        read_study(tmp_path / "s.yaml")
    said = str(e.value)
    assert WRONG[text] in said
    assert "\n" not in said
    assert str(tmp_path) in said


NAMES = ["data", "targets", "paths", "sources", "among", "arms", "seeds", "shots", "test", "recipe", "wanted"]
LEAVES = st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=False) | st.sampled_from(["all", "a", ""])
VALUES = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from("ab"), x, max_size=2), max_leaves=5
)
ENTRIES = st.sampled_from([*NAMES, "mode", "weights", "choice", "else"])


@given(st.dictionaries(ENTRIES, VALUES))
@settings(max_examples=300, deadline=None)
def test_whatever_a_study_file_says_it_is_read_or_refused_in_one_sentence(tmp_path_factory, said):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(said))
    try:
        study = read_study(file)
    except InputError as e:
        assert "\n" not in str(e)
    else:
        assert {"data", "targets"} <= said.keys()
        assert isinstance(hash((study.targets, study.paths, study.arms, study.seeds)), int)


@pytest.fixture
def command(monkeypatch, capsys):
    "Calls the command line; returns exit code and what it said on standard output and standard error."

    def call(*args):
        monkeypatch.setattr("sys.argv", ["seqtransfer", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return end.value.code or 0, out, err

    return call


def written(folder, zoo, **other):
    file = folder / "grid.yaml"
    asked = {"data": str(zoo), "targets": [TARGETS[0]], "among": list(SOURCES[:3]), "paths": "all", "shots": 2}
    recipe = {"source_steps": 20, "target_steps": 10}
    file.write_text(yaml.safe_dump({**asked, "recipe": recipe, **other}))
    return file


def test_a_dry_run_shows_the_plan_and_writes_nothing(zoo, tmp_path, command):
    file = written(tmp_path, zoo)
    code, out, _ = command("grid", file, "--out", tmp_path / "grid", "--dry-run", "--json")
    s = json.loads(out)
    assert code == 0
    # scratch and the nearest source, and six pairs of three; each pair begins with one of three half stages
    assert s["runs"] == 1 + 1 + 6
    assert s["stages named"] == 1 + 2 + 18
    assert s["stages"] == 1 + 2 + 3 + 12
    assert s["optimiser steps named"] == 10 + 30 * 7
    assert s["optimiser steps"] == s["optimiser steps named"] - 3 * 10
    assert s["notebooks"] == 1 + 3 + 8
    assert s["test cases"] == 8 * 3
    code, out, _ = command("grid", file, "--out", tmp_path / "grid", "--dry-run", "--workers", "3")
    assert code == 0
    assert "8 runs in 12 notebooks" in out
    assert "(30 saved)" in out
    assert "on 3 workers" in out
    assert [p.name for p in tmp_path.iterdir()] == ["grid.yaml"]


REFUSED = [
    ({"targets": ["TumourB-FLAIR-ET ED"]}, "TumourB-FLAIR-E"),
    ({"among": ["TumourA-FLAIR-EDD"]}, "did you mean TumourA-FLAIR-ED?"),
    ({"paths": [["LesionC-FLAIR-WMH"]]}, "LesionC-FLAIR-WMH"),
    ({"arms": ["sequentiel"]}, "did you mean sequential?"),
    ({"sources": 4}, "1 to 3 sources"),
    ({"recipe": {"source_steps": 1, "target_steps": 10}}, "no step"),
    ({"test": 9}, "9"),
    ({"data": "nowhere"}, "nowhere"),
    ({"paths": [["TumourA-FLAIR-ED", "TumourA-FLAIR-ED"]]}, "twice"),
    ({"recipe": {"source_steps": 20, "target_steps": 10, "start": "nobody.pt"}}, "nobody.pt"),
]


@pytest.mark.parametrize("other, said", REFUSED)
def test_a_grid_that_cannot_be_run_is_refused_before_anything_is_written(zoo, tmp_path, command, other, said):
    code, _, err = command("grid", written(tmp_path, zoo, **other), "--out", tmp_path / "grid")
    assert code == 2
    assert said in err
    assert err.splitlines()[-1].startswith("seqtransfer: ")
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    "options, said",
    [
        (("--workers", 0), "at least one"),
        (("--scheduler-file", "s.json", "--slurm", "s.yaml"), "one of the two"),
        (("--workers", 2, "--slurm", "s.yaml"), "--workers are workers on this machine"),
        (("--slurm", "nobody.yaml"), "nobody.yaml"),
    ],
)
def test_workers_that_cannot_be_had_are_refused_before_anything_is_written(zoo, tmp_path, command, options, said):
    code, _, err = command("grid", written(tmp_path, zoo), "--out", tmp_path / "grid", *options)
    assert code == 2
    assert said in err
    assert not (tmp_path / "grid").exists()


def test_a_folder_without_a_study_has_no_status(tmp_path, command):
    code, _, err = command("status", tmp_path)
    assert code == 2
    assert "holds no study" in err
    assert not list(tmp_path.iterdir())
