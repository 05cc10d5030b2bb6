"""Small ablations for tests: their plans, and their execution."""

from pathlib import Path
from unittest import mock

from processes import TINY

from ablation import costs
from ablation.plan import make_plan
from ablation.runner import Runner, group_into_jobs, run_here
from ablation.study import AblationConfig, expand_runs
from machine.accelerator import open_accelerator

BASE = {**TINY, "evaluation": {"extractor": "colors.pt", "num_samples": 12, "metrics": ["fid", "precision"]}}


def plan_of(variants, **settings):
    """Plan an ablation of tiny runs with these variants."""
    ablation = AblationConfig(base=BASE, variants=variants, **settings)
    folder = Path("runs/t")
    runs = expand_runs(ablation, "t")
    with mock.patch.object(costs, "count_cost", counted):
        return make_plan(ablation, runs, folder, open_accelerator("fp32"), timed=False, any_code=False)


def counted(spec, cache={}, count=costs.count_cost):  # noqa: B006  (the cache is meant to be shared)
    """Count the cost of a backbone once for all tests."""
    return cache.setdefault(repr(spec), cache.get(repr(spec)) or count(spec))


def execute(plan, deadline=None, workers=1):
    """Execute a plan; returns status and reason by variant."""
    outcomes = run_here(group_into_jobs(plan), Runner(deadline), workers)
    return {outcome.run.partition(",")[0]: (outcome.status, outcome.why) for outcome in outcomes}
