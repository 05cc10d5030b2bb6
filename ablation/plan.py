"""The plan of an ablation: every variant validated, brought to equal cost and timed before any run starts."""

import json
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ablation.costs import Measurements, Speed, resize_to_cost
from ablation.identity import accept_other_code, changed_settings, done_stages, find_changes, is_scored, stage_keys
from ablation.study import AblationConfig, Run, classes_to_draw, naming_variant
from autoencoders.codec import create_codec
from checkpoints.checkpoint import open_checkpoint
from diffusion.samplers import num_evaluations
from evaluation.scoring import open_scorer
from evaluation.table import terminal
from experiment.build import build_diffusion, model_spec, open_cache, open_split
from experiment.config import ExperimentConfig, SamplingConfig
from machine.atomic_files import write_atomic
from machine.checkpoint_folder import CheckpointError, list_checkpoints, newest_intact
from metrics.cost import Cost
from metrics.scores import check_metrics
from models import ModelSpec
from sampling.checks import resolve_sampling
from sampling.labels import resolve_classes
from training.optimizer import num_training_steps

shared_codec = lru_cache(create_codec)  # of one name once for all runs


@dataclass(frozen=True)
class PlannedRun:
    """A run with what was resolved from its configuration, its cost, and the keys of its results.

    Args:
        identity: content of the autoencoder and the data splits, as `Checkpoint.check_identity` takes it
        trained_in: folder of the run that trains; another run's where they differ only in sampling or scoring
        scores_baselines: whether the floor and ceiling may be scored with this run: the first of those that share
            images, autoencoder and scoring
        keys: key of each stage's results, see `ablation.identity`
        startup: seconds until a program of this project begins its work
    """

    run: Run
    ablation: AblationConfig
    spec: ModelSpec
    sampling: SamplingConfig
    classes: list[str]
    num_steps: int
    num_held_out: int
    identity: dict[str, dict[str, Any]]
    cost: Cost
    trained_in: Path
    scores_baselines: bool
    keys: dict[str, str] = field(default_factory=dict)
    speed: Speed | None = None
    startup: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether this run trains, rather than using the weights of another run."""
        return self.trained_in == self.run.folder

    @property
    def pictured(self) -> list[str]:
        """Names of the classes that samples are drawn of."""
        return classes_to_draw(self.ablation.pictures.classes, self.classes)

    @property
    def num_samples(self) -> int:
        """Number of samples that are scored in each trial."""
        return self.run.config.evaluation.num_samples or self.num_held_out

    @property
    def validated_on(self) -> dict[str, Any]:
        """The held-out images that held-out losses are of. If they are not all, classes decide which of them."""
        num, images = min(self.run.config.log.num_validation, self.num_held_out), self.identity["test"]
        names = [name for name in images if name not in ("source", "classes")]
        chosen = "all" if num == self.num_held_out else f"{num}, by class: {bool(self.classes)}"
        return {"images": {name: images[name] for name in names}, "num_validation": chosen}

    @property
    def done(self) -> set[str]:
        """Stages whose results exist and were made by this configuration, code and data, as was their training."""
        stored = done_stages(self.run.folder)
        if self.changes or (self.trains and "began" not in stored):
            return set()
        done = {name for name, key in stored.items() if self.keys.get(name) == key}
        return done if is_scored(self.run.folder, self.keys["score"]) else done - {"score"}

    @property
    def all_done(self) -> bool:
        return self.done.issuperset(self.keys)

    @property
    def seconds(self) -> float | None:
        """Estimated seconds of the stages that are left, without feature extraction; None if nothing was timed."""
        if self.speed is None:
            return None
        speed, config, log = self.speed, self.run.config, self.run.config.log
        num_calls = num_evaluations(build_diffusion(config.diffusion), self.sampling)
        per_sample = num_calls / speed.calls + 1 / speed.decoding
        num_steps = self.num_steps - self.step

        def count(every: int) -> int:
            return num_steps // every if every > 0 else 0

        training = num_steps * config.train.batch_size / speed.training
        training += count(log.validate_every) * min(log.num_validation, self.num_held_out) / speed.calls
        training += (count(log.sample_every) + 1) * 4 * min(10, self.spec.num_classes or 10) * per_sample
        training += count(log.evaluate_every) * self.num_samples * per_sample
        num_pictures = self.ablation.pictures.num_per_class * max(1, len(self.pictured))
        seconds = {
            "train": training,
            "score": self.ablation.scoring.trials * self.num_samples * per_sample,
            "draw": num_pictures * per_sample,
        }
        remaining = self.keys.keys() - self.done - (set() if self.trains else {"train"})
        return sum(seconds[stage] + self.startup for stage in remaining)

    @property
    def step(self) -> int:
        """Step of the newest complete checkpoint of this training; 0 if there is none, or if another run trains."""
        if not self.trains or done_stages(self.run.folder).get("began") != self.keys["train"]:
            return 0
        newest = newest_intact(self.run.folder / "checkpoints", say=lambda _: None)
        return int(newest.name) if newest else 0

    @property
    def changes(self) -> list[str]:
        """How the existing training differs from the planned one: names of settings, files of code, or content."""
        config, key = self.run.config, self.keys["train"]
        if self.trains and (names := find_changes(self.run.folder, key, config)):
            return names
        saved = list_checkpoints(self.trained_in / "checkpoints")
        if not saved or done_stages(self.trained_in).get("began") != key:
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
            checkpoint.check_identity(**self.identity)
        except CheckpointError as error:
            return [f"content of {str(error).partition(':')[0]}"]
        return []

    @property
    def state(self) -> str:
        """State of the run in words, for the table of the plan."""
        if self.all_done:
            return "done"
        if names := self.changes:
            return f"of other {', '.join(names)}"
        if "train" in self.done:
            return "trained"
        if not self.trains:
            return f"trained with {self.trained_in.parent.name}"
        return f"at step {self.step} of {self.num_steps}" if self.step else "to do"


def make_plan(
    ablation: AblationConfig,
    runs: list[Run],
    folder: Path,
    accelerator: Accelerator,
    *,
    timed: bool,
    any_code: bool,
    start: float = 0.0,
) -> list[PlannedRun]:
    """Validate all runs, match and time their backbones, and write `plan.json`. Measurements are kept in
    `measured.json`, so that a later plan is the same. `start` is the seconds until a program of this project begins its
    work.

    Raises ValueError naming the variant that cannot be run.
    """
    measurements = Measurements(folder / "measured.json", accelerator)
    firsts: dict[str, Run] = {}
    for run in runs:
        firsts.setdefault(repr((run.config.data, run.config.autoencoder, run.config.evaluation)), run)
    plan = [plan_run(run, ablation, measurements, scores_baselines=run in firsts.values()) for run in runs]
    if ablation.match is not None:
        plan = match_costs(plan, measurements)
    stored = [done_stages(planned.run.folder) for planned in plan]
    begun = [stages["began"] for stages in stored if "began" in stages]
    for index, planned in enumerate(plan):
        config, keys = planned.run.config, planned.keys
        if any_code:
            keys = accept_other_code(keys, stored[index], begun)
        speed = measurements.speed(planned.spec, config, shared_codec(config.autoencoder)) if timed else None
        plan[index] = replace(planned, keys=keys, speed=speed, startup=start)
    plan = [replace(planned, trained_in=_training_folder(planned, plan)) for planned in plan]
    write_atomic(folder / "plan.json", json.dumps(plan_to_dict(plan), indent=2) + "\n")
    return plan


def plan_run(run: Run, ablation: AblationConfig, measurements: Measurements, *, scores_baselines: bool) -> PlannedRun:
    """Validate a run and count the cost of its backbone. Raises ValueError naming the variant that cannot be run."""
    config, warnings = run.config, list[str]()
    with naming_variant(run.variant):
        diffusion, codec = build_diffusion(config.diffusion), shared_codec(config.autoencoder)
        images, held_out = _open_splits(config.data)
        spec = model_spec(config, codec, diffusion, len(images.classes))
        cost = measurements.cost(spec)
        num_guided = config.guided_classes(spec.num_classes)
        sampling = resolve_sampling(config.sampling, diffusion, num_guided, say=warnings.append)
        check_metrics(config.evaluation.metrics)
        resolve_classes(list(ablation.pictures.classes), images.classes)
    scoring = {**asdict(ablation.scoring), "baselines": ablation.scoring.baselines and scores_baselines}
    keys = stage_keys(config, scoring, asdict(ablation.pictures))
    if not ablation.pictures.num_per_class or run.seed != (ablation.grid.get("seed") or [run.seed])[0]:
        del keys["draw"]  # the report shows samples of each variant's first seed
    identity = {"codec": codec.provenance, "train": images.describe(), "test": held_out.describe()}
    data = list(images.classes), num_training_steps(config.train, len(images)), len(held_out), identity
    named = tuple(f"variant {run.variant}: {warning}" for warning in warnings)
    return PlannedRun(run, ablation, spec, sampling, *data, cost, run.folder, scores_baselines, keys, warnings=named)


def match_costs(plan: list[PlannedRun], measurements: Measurements) -> list[PlannedRun]:
    """Change the width of all other variants to the cost of `match.to`; raise ValueError where no width has it."""
    rule = plan[0].ablation.match
    assert rule is not None
    targets = [planned for planned in plan if planned.run.is_of(rule.to)]

    def cost_of(spec: ModelSpec, config: ExperimentConfig) -> float:
        if rule.by == "time":
            return 1 / measurements.speed(spec, config, shared_codec(config.autoencoder)).training
        cost = measurements.cost(spec)
        return cost.gflops if rule.by == "flops" else float(cost.parameters)

    def match_cost(planned: PlannedRun) -> PlannedRun:
        run, spec = planned.run, planned.spec
        if run.is_of(rule.to):
            return planned
        target = next((other for other in targets if other.run.is_beside(run)), targets[0])
        key = {"match": asdict(rule), "to": asdict(target.spec), "spec": asdict(spec)}
        if rule.by == "time":  # which depends on more than the backbone
            both = target.run.config, run.config
            key |= {"trained as": [{"diffusion": asdict(c.diffusion), "batch_size": c.train.batch_size} for c in both]}

        def match() -> dict[str, Any]:
            target_cost = cost_of(target.spec, target.run.config)
            return resize_to_cost(spec, target_cost, lambda spec: cost_of(spec, run.config), rule.tolerance).args

        with naming_variant(run.variant):
            args = measurements.get(key, match)
        run = replace(run, config=replace(run.config, model_args=args))
        return plan_run(run, planned.ablation, measurements, scores_baselines=planned.scores_baselines)

    return [match_cost(planned) for planned in plan]


def prepare(plan: list[PlannedRun], accelerator: Accelerator) -> None:
    """Make the latent caches and references that the runs share, before runs side by side would each make them."""
    configs = [planned.run.config for planned in plan]
    for data, name in {repr((c.data, c.autoencoder)): (c.data, c.autoencoder) for c in configs}.values():
        codec = create_codec(name).to(accelerator.device)
        for split, flips in (("train", data.flip), ("test", False)):
            open_cache(data, codec, open_split(data, split, accelerator), accelerator, flips=flips)
    for data, scoring in {repr((c.data, c.evaluation)): (c.data, c.evaluation) for c in configs}.values():
        open_scorer(data, accelerator, scoring)


def format_plan(plan: list[PlannedRun]) -> str:
    """Format the plan as a table: cost, remaining time and state of each run."""
    rows = [["run", "parameters", "GFLOPs", "img/s", "steps", "left", "state"]]
    for planned in plan:
        speed = f"{planned.speed.training:.1f}" if planned.speed else "-"
        cost = [f"{planned.cost.parameters / 1e6:.2f}M", f"{planned.cost.gflops:.3f}", speed]
        rows.append([planned.run.name, *cost, str(planned.num_steps), format_duration(planned.seconds), planned.state])
    seconds = [planned.seconds for planned in plan]
    total = None if None in seconds else sum(filter(None, seconds))
    warnings = dict.fromkeys(warning for planned in plan for warning in planned.warnings)
    return "\n".join([terminal(rows), *warnings, f"about {format_duration(total)} to go, without features"])


def refuse_changed(plan: list[PlannedRun]) -> None:
    """Raise ValueError where a run's folder holds another training, as it is moved away only on request."""
    if changed := [planned for planned in plan if planned.changes]:
        folders = "; ".join(f"{planned.run.folder}: {', '.join(planned.changes)}" for planned in changed)
        raise ValueError(
            f"trained before with other {folders}: --redo true keeps that beside them and trains anew, --any_code true "
            "takes what differs by code alone for done, --name begins another study"
        )


def format_duration(seconds: float | None) -> str:
    """Format seconds as hours and minutes, or in minutes or seconds alone where short; None gives `-`."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f}"


def plan_to_dict(plan: list[PlannedRun]) -> dict[str, Any]:
    """The plan as JSON values, for `plan.json`, which the report is made from."""
    ablation = plan[0].ablation
    baseline = next((planned.run.variant for planned in plan if planned.run.is_of(ablation.baseline)), None)

    def row(planned: PlannedRun) -> dict[str, Any]:
        run, spec, cost = planned.run, planned.spec, planned.cost
        config = run.config.to_dict()
        return {
            "variant": run.variant,
            "point": run.point,
            "seed": run.seed,
            "folder": run.folder.as_posix(),
            "trained_in": planned.trained_in.as_posix(),
            "keys": planned.keys,
            "classes": planned.classes,
            "loss_of": {**{name: config[name] for name in LOSS_SETTINGS}, **planned.validated_on},
            "model": spec.name,
            "model_args": spec.args,
            "parameters": cost.parameters,
            "gflops": cost.gflops,
            "num_forward_passes": build_diffusion(run.config.diffusion).num_forward_passes,
            "num_steps": planned.num_steps,
            "batch_size": run.config.train.batch_size,
        }

    return {"ablation": {**asdict(ablation), "baseline": baseline}, "runs": [row(planned) for planned in plan]}


def _training_folder(planned: PlannedRun, plan: list[PlannedRun]) -> Path:
    """Choose which of the runs with the same training trains: the one that has begun it, else the first."""
    key = planned.keys["train"]
    folders = [other.run.folder for other in plan if other.keys["train"] == key]
    return next((folder for folder in folders if done_stages(folder).get("began") == key), folders[0])


LOSS_SETTINGS = ("autoencoder", "diffusion", "auxiliary", "alignment")  # that the kind of a loss depends on
_SPLITS: dict[str, Any] = {}


def _open_splits(config: Any) -> Any:
    name = repr(config)
    if name not in _SPLITS:
        _SPLITS[name] = open_split(config, "train"), open_split(config, "test")
    return _SPLITS[name]
