"""Run an ablation: train, score and sample every variant of a YAML file, and write a report.

python scripts/ablate.py configs/ablations/table1_small.yaml --set '{data.path: caltech101.zip}'
python scripts/ablate.py configs/ablations/skip.yaml --only plan            (what it would do, and how long it takes)
python scripts/ablate.py configs/ablations/skip.yaml --max_hours 2          (repeat the command to continue)
python scripts/ablate.py configs/ablations/table1.yaml --executor slurm --cluster.partition gpu
"""

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

from ablation.study import AblationConfig, check_inputs_of, expand_runs, read_ablation
from experiment.cli import run_main
from machine.atomic_files import join_inside
from machine.children import EXIT_CODE
from machine.cluster import ClusterConfig
from machine.stopping import without_garbage_collection
from settings import reads, within

STARTED = time.time()


@dataclass(frozen=True)
class AblateConfig:
    """Train, score and sample every variant, and report. Finished work is skipped, interrupted trainings resume.

    Args:
        ablation: YAML file (see docs/ablations.md); the flag's name may be left out
        set: settings of all variants, in addition to the YAML's: '{data.path: images.zip, train.num_steps: 100}'
        only: 'plan' shows what would be done; 'report' writes the report of finished work; null does everything
        executor: 'local' (`workers` runs at a time on the CPU, or one per visible GPU), 'slurm' (a job per
            training, through submitit) or 'submitit' (the same, as processes on this machine)
        workers: runs at a time on a CPU, which share its cores; faster for small batches
        cluster: resources of a SLURM job
        max_hours: after this time, start nothing and stop a running training, which saves; repeat the command to
            continue
        launcher: a configuration of `accelerate launch`, for several processes per run; null: one process
        any_code: also accept results of other versions of the code
        redo: rename training runs of another configuration or code to seed<n>.before-<time>, and train again
        imports: modules or .py files with custom backbones etc., in addition to the YAML's (docs/extending.md)
        name: name of the folder in runs/; by default that of the YAML file
    """

    ablation: str = reads("file")
    set: dict[str, Any] = field(default_factory=dict)
    only: Literal["plan", "report"] | None = None
    executor: Literal["local", "slurm", "submitit"] = "local"
    workers: int = within("[1, inf)", 1)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    max_hours: float | None = within("(0, inf)", None)
    launcher: str | None = reads("file", None)
    any_code: bool = False
    redo: bool = False
    imports: list[str] = field(default_factory=list)
    name: str | None = None


def main(config: AblateConfig) -> int:
    """Plan, run and report; return the exit status."""
    path = Path(config.ablation)
    folder = join_inside(Path("runs"), config.name or path.stem, "--name")
    if (folder / "config.yaml").exists() or (folder / "checkpoints").exists():
        raise ValueError(f"--name {folder.name}: {folder} holds a training; give the ablation another name")
    ablation = read_ablation(path, {**config.set, **({"imports": config.imports} if config.imports else {})})
    try:
        return report(folder, ablation) if config.only == "report" else run(config, ablation, folder)
    except KeyboardInterrupt:  # before or after the runs, which handle it themselves
        print("stopped; repeat the command to continue", file=sys.stderr)
        return 130


def report(folder: Path, ablation: AblationConfig) -> int:
    from ablation.report import write_report
    from ablation.tables import check_columns

    check_columns(ablation.columns)
    baselines = (run.variant for run in expand_runs(ablation, folder.name) if run.is_of(ablation.baseline))
    print(write_report(folder, replace(ablation, baseline=next(baselines, None))))
    return 0


def run(config: AblateConfig, ablation: AblationConfig, folder: Path) -> int:
    runs = expand_runs(ablation, folder.name)
    check_inputs_of(runs, scores=config.only != "plan")
    with without_garbage_collection():
        from ablation.plan import make_plan, prepare
        from ablation.progress import format_plan, read_progress, refuse_changed
        from ablation.runner import Runner, group_into_jobs, run_here, submit, worker_slots
        from ablation.tables import check_columns
        from machine.accelerator import open_accelerator
        from machine.lock import Lock

    # Plan.
    deadline = None if config.max_hours is None else time.time() + 3600 * config.max_hours
    check_columns(ablation.columns)
    worker_slots(config.workers)  # raises if there are not enough cores, before anything is written
    with Lock(folder / "lock", waits=True):  # as other processes may plan the same study
        start = time.time() - STARTED
        accelerator = open_accelerator(runs[0].config.train.precision)
        plan = make_plan(ablation, runs, folder, accelerator, timed=True, any_code=config.any_code, start=start)
        print(format_plan(plan), flush=True)
        if config.only == "plan":
            return 0

        if not config.redo:
            refuse_changed(plan)
        prepare([planned for planned in plan if read_progress(planned).left], accelerator)
    jobs, runner = group_into_jobs(plan), Runner(deadline, config.launcher)
    if config.executor == "local":
        outcomes = run_here(jobs, runner, config.workers)
    else:
        scheduler = "slurm" if config.executor == "slurm" else "local"
        outcomes = submit(jobs, runner, config.cluster, folder / "jobs", scheduler)

    # Report.
    for outcome in outcomes:
        if outcome.status != "done":
            print(f"{outcome.status}: {outcome.run}: {outcome.why}")
    if any("score" in read_progress(planned).done for planned in plan):
        with Lock(folder / "lock", waits=True):
            report(folder, ablation)
    statuses = {outcome.status for outcome in outcomes}
    return 1 if "failed" in statuses else EXIT_CODE if "stopped" in statuses else 0


if __name__ == "__main__":
    run_main(main, AblateConfig, first="ablation")
