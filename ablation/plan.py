"""The plan of an ablation: every variant validated, brought to equal cost and timed before any run starts."""

import json
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ablation.costs import Measurements, Speed, resize_to_cost
from ablation.identity import accept_other_code, done_stages, stage_keys
from ablation.study import AblationConfig, Run, classes_to_draw, naming_variant
from autoencoders.codec import create_codec
from data.image_set import ImageSet
from evaluation.scoring import open_scorer
from experiment.build import build_diffusion, model_spec, open_cache, open_split
from experiment.config import DataConfig, ExperimentConfig, SamplingConfig
from machine.atomic_files import write_atomic
from metrics.cost import Cost
from metrics.scores import check_metrics, check_per_image
from models import ModelSpec
from sampling.checks import resolve_sampling
from sampling.labels import resolve_classes
from training.optimizer import num_training_steps

LOSS_SETTINGS = ("autoencoder", "diffusion", "auxiliary", "alignment")  # that the kind of a loss depends on
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

    def current_keys(self) -> dict[str, str]:
        """Keys of all stages by what the files that its settings name hold now, see `ablation.identity.stage_keys`."""
        scoring = asdict(self.ablation.scoring)
        scoring |= {"baselines": scoring["baselines"] and self.scores_baselines}
        return stage_keys(self.run.config, scoring, asdict(self.ablation.pictures))


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
        images, held_out = _open_splits(json.dumps(asdict(config.data)))
        spec = model_spec(config, codec, diffusion, len(images.classes))
        cost = measurements.cost(spec)
        num_guided = config.guided_classes(spec.num_classes)
        sampling = resolve_sampling(config.sampling, diffusion, num_guided, say=warnings.append)
        check_metrics(config.evaluation.metrics)
        if ablation.scoring.memorisation:
            check_per_image("scoring.memorisation", config.evaluation.metrics)
        resolve_classes(list(ablation.pictures.classes), images.classes)
    identity = {"codec": codec.provenance, "train": images.describe(), "test": held_out.describe()}
    data = list(images.classes), num_training_steps(config.train, len(images)), len(held_out), identity
    named = tuple(f"variant {run.variant}: {warning}" for warning in warnings)
    planned = PlannedRun(run, ablation, spec, sampling, *data, cost, run.folder, scores_baselines, warnings=named)
    keys = planned.current_keys()
    if not ablation.pictures.num_per_class or run.seed != (ablation.grid.get("seed") or [run.seed])[0]:
        del keys["draw"]  # the report shows samples of each variant's first seed
    return replace(planned, keys=keys)


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


@lru_cache
def _open_splits(settings: str) -> tuple[ImageSet, ImageSet]:
    """Open the images to train on and those held out, given the data's settings as JSON; once for all runs."""
    config = DataConfig(**json.loads(settings))
    return open_split(config, "train"), open_split(config, "test")
