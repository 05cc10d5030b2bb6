"""Small ablations: their plans, and their runs with a script in the place of the three commands."""

from pathlib import Path

from processes import TINY

from ablation.executors import EXECUTORS, jobs_of
from ablation.plan import make_plan
from ablation.runner import Runner
from ablation.study import AblationConfig, ClusterConfig
from ablation.variants import expand
from machine.accelerator import open_accelerator

BASE = {**TINY, "evaluation": {"extractor": "colors.pt", "num_samples": 12, "metrics": ["fid", "precision"]}}


def plan_of(variants, **settings):
    ablation = AblationConfig(base=BASE, variants=variants, **settings)
    folder = Path("runs/t")
    runs = expand(ablation, "t")
    return ablation, make_plan(ablation, runs, folder, open_accelerator("fp32"), timed=False, any_code=False)


def execute(ablation, plan, deadline=None, workers=1):
    runner = Runner(ablation, deadline, workers=workers)
    outcomes = EXECUTORS["local"](jobs_of(plan), runner, ClusterConfig(), Path("jobs"))
    return {outcome.run.partition(",")[0]: (outcome.status, outcome.why) for outcome in outcomes}
