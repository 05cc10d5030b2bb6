"""How far the runs of an ablation have come, as their folders say, and what is left to do."""

from dataclasses import dataclass

from ablation.identity import changed_settings, done_stages, find_changes, is_scored
from ablation.plan import PlannedRun
from checkpoints.checkpoint import open_checkpoint
from diffusion.samplers import num_evaluations
from evaluation.table import terminal
from experiment.build import build_diffusion
from machine.checkpoint_folder import CheckpointError, list_checkpoints, newest_intact


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Args:
        changes: how the training in its folder differs from the planned one: names of settings, files of code, or
            content; the run is then not done, and its results have to be moved away
        done: stages whose results were made by this configuration, code and data, as was their training
        step: step of the newest complete checkpoint of its training; 0 if there is none, or if another run trains
        left: stages that have to run
    """

    changes: list[str]
    done: set[str]
    step: int
    left: list[str]


def read_progress(planned: PlannedRun) -> Progress:
    """Read from a run's folder how far it has come."""
    changes = find_changed(planned)
    done = set() if changes else _find_done(planned)
    return Progress(changes, done, _find_step(planned), [stage for stage in planned.keys if stage not in done])


def find_changed(planned: PlannedRun) -> list[str]:
    """How the training in the run's folder differs from the planned one, see `Progress`."""
    config, key = planned.run.config, planned.keys["train"]
    if planned.trains and (names := find_changes(planned.run.folder, key, config)):
        return names
    saved = list_checkpoints(planned.trained_in / "checkpoints")
    if not saved or done_stages(planned.trained_in).get("began") != key:
        return []
    try:
        checkpoint = open_checkpoint(saved[-1])
    except CheckpointError:  # resuming the training reports it
        return []
    # Somebody may have resumed the training by hand, with other settings.
    settings = changed_settings(checkpoint.config.to_dict(), config.to_dict())
    if names := [name for name in settings if name.partition(".")[0] not in ("sampling", "evaluation")]:
        return names
    try:
        checkpoint.check_identity(**planned.identity)
    except CheckpointError as error:
        return [f"content of {str(error).partition(':')[0]}"]
    return []


def refuse_changed(plan: list[PlannedRun]) -> None:
    """Raise ValueError where a run's folder holds another training, as it is moved away only on request."""
    changed = [(planned.run.folder, names) for planned in plan if (names := find_changed(planned))]
    if changed:
        folders = "; ".join(f"{folder}: {', '.join(names)}" for folder, names in changed)
        raise ValueError(
            f"trained before with other {folders}: --redo true keeps the old runs and trains again, --any_code true "
            "accepts runs that differ only in code, --name starts another study"
        )


def format_plan(plan: list[PlannedRun]) -> str:
    """Format the plan as a table: cost, remaining time and state of each run."""
    rows, seconds = [["run", "parameters", "GFLOPs", "img/s", "steps", "left", "state"]], list[float | None]()
    for planned in plan:
        progress = read_progress(planned)
        seconds.append(remaining_seconds(planned, progress))
        speed = f"{planned.speed.training:.1f}" if planned.speed else "-"
        cost = [f"{planned.cost.parameters / 1e6:.2f}M", f"{planned.cost.gflops:.3f}", speed, str(planned.num_steps)]
        rows.append([planned.run.name, *cost, format_duration(seconds[-1]), describe_state(planned, progress)])
    total = None if None in seconds else sum(filter(None, seconds))
    warnings = dict.fromkeys(warning for planned in plan for warning in planned.warnings)
    return "\n".join([terminal(rows), *warnings, f"about {format_duration(total)} to go, without features"])


def describe_state(planned: PlannedRun, progress: Progress) -> str:
    """The state of a run in words, for the table of the plan."""
    if not progress.left:
        return "done"
    if progress.changes:
        return f"of other {', '.join(progress.changes)}"
    if "train" in progress.done:
        return "trained"
    if not planned.trains:
        return f"trained with {planned.trained_in.parent.name}"
    return f"at step {progress.step} of {planned.num_steps}" if progress.step else "to do"


def remaining_seconds(planned: PlannedRun, progress: Progress) -> float | None:
    """Estimated seconds of the stages that are left, without feature extraction; None if nothing was timed."""
    if planned.speed is None:
        return None
    speed, config, log = planned.speed, planned.run.config, planned.run.config.log
    num_calls = num_evaluations(build_diffusion(config.diffusion), planned.sampling)
    per_sample = num_calls / speed.calls + 1 / speed.decoding
    num_steps = planned.num_steps - progress.step

    def count(every: int) -> int:
        return num_steps // every if every > 0 else 0

    training = num_steps * config.train.batch_size / speed.training
    training += count(log.validate_every) * min(log.num_validation, planned.num_held_out) / speed.calls
    training += (count(log.sample_every) + 1) * 4 * min(10, planned.spec.num_classes or 10) * per_sample
    training += count(log.evaluate_every) * planned.num_samples * per_sample
    num_pictures = planned.ablation.pictures.num_per_class * max(1, len(planned.pictured))
    seconds = {
        "train": training,
        "score": planned.ablation.scoring.trials * planned.num_samples * per_sample,
        "draw": num_pictures * per_sample,
    }
    return sum(seconds[stage] + planned.startup for stage in progress.left if planned.trains or stage != "train")


def format_duration(seconds: float | None) -> str:
    """Format seconds as hours and minutes, or in minutes or seconds alone where short; None gives `-`."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f}"


def _find_done(planned: PlannedRun) -> set[str]:
    stored = done_stages(planned.run.folder)
    if planned.trains and "began" not in stored:
        return set()
    done = {name for name, key in stored.items() if planned.keys.get(name) == key}
    return done if is_scored(planned.run.folder, planned.keys["score"]) else done - {"score"}


def _find_step(planned: PlannedRun) -> int:
    if not planned.trains or done_stages(planned.run.folder).get("began") != planned.keys["train"]:
        return 0
    newest = newest_intact(planned.run.folder / "checkpoints", say=lambda _: None)
    return int(newest.name) if newest else 0
