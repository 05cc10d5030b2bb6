"""Before anything starts: every variant validated, brought to equal cost and timed; what is done and what is left."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ablation.costs import Measured, Speed, resized
from ablation.identity import changed_settings, changes, done_stages, is_scored, keys_of, of_any_code
from ablation.study import AblationConfig, Run, pictured
from autoencoders.codec import create_codec
from checkpoints.checkpoint import open_checkpoint
from diffusion.samplers import num_calls
from evaluation.scoring import open_scorer
from evaluation.table import terminal
from experiment.build import build_diffusion, model_spec, open_cache, open_split
from experiment.config import SamplingConfig
from machine.checkpoint_folder import CheckpointError, list_checkpoints, newest_whole
from machine.whole_files import write_whole
from metrics.cost import Cost
from metrics.scores import check_metrics
from models import ModelSpec
from sampling.checks import resolve_sampling
from sampling.labels import resolve_classes
from training.optimizer import num_training_steps


@dataclass(frozen=True)
class Planned:
    """A run, what it is of, what it costs, and which results are its own."""

    run: Run
    ablation: AblationConfig
    spec: ModelSpec
    sampling: SamplingConfig
    classes: list[str]
    num_steps: int
    num_held_out: int
    identity: dict[str, dict[str, Any]]  # what autoencoder and splits are by their content; see `check_identity`
    cost: Cost
    trained_in: Path  # another run's folder where both differ in sampling or scoring alone
    first: bool  # of those with its images, autoencoder and scoring: the one that baselines are scored with
    keys: dict[str, str] = field(default_factory=dict)  # of the stages
    speed: Speed | None = None
    start: float = 0.0  # seconds that a program takes until it does something
    told: tuple[str, ...] = ()  # of settings that do nothing

    @property
    def trains(self) -> bool:
        return self.trained_in == self.run.folder

    @property
    def pictured(self) -> list[str]:
        return pictured(self.ablation.pictures.classes, self.classes)

    @property
    def num_samples(self) -> int:
        """Images that are scored in a trial."""
        return self.run.config.evaluation.num_samples or self.num_held_out

    @property
    def done(self) -> set[str]:
        """Stages whose results are there, of this configuration, code and content; another's training leaves none."""
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
        """Seconds that what is left to do takes, by the short timing, without features."""
        if self.speed is None:
            return None
        speed, config, log = self.speed, self.run.config, self.run.config.log
        calls = num_calls(build_diffusion(config.diffusion), self.sampling)
        calls *= 2 if self.sampling.guidance_scale != 1 else 1
        drawing = calls / speed.calls + 1 / speed.decoding  # an image
        steps = self.num_steps - self.step

        def times(every: int) -> int:
            return steps // every if every > 0 else 0

        training = steps * config.train.batch_size / speed.training
        training += times(log.validate_every) * min(log.num_validation, self.num_held_out) / speed.calls
        training += (times(log.sample_every) + 1) * 4 * min(10, self.spec.num_classes or 10) * drawing
        training += times(log.evaluate_every) * self.num_samples * drawing
        num_pictures = self.ablation.pictures.num_per_class * max(1, len(self.pictured))
        left = {
            "train": training,
            "score": self.ablation.scoring.trials * self.num_samples * drawing,
            "draw": num_pictures * drawing,
        }
        names = self.keys.keys() - self.done - (set() if self.trains else {"train"})
        return sum(left[name] + self.start for name in names)

    @property
    def step(self) -> int:
        """Of the newest whole checkpoint of this training."""
        if not self.trains or done_stages(self.run.folder).get("began") != self.keys["train"]:
            return 0
        newest = newest_whole(self.run.folder / "checkpoints", say=lambda _: None)
        return int(newest.name) if newest else 0

    @property
    def changes(self) -> list[str]:
        """By which files and settings the training there, or what lies at its paths, differs from the plan's."""
        config, key = self.run.config, self.keys["train"]
        if self.trains and (others := changes(self.run.folder, key, config)):
            return others
        saved = list_checkpoints(self.trained_in / "checkpoints")
        if not saved or done_stages(self.trained_in).get("began") != key:
            return []
        try:
            checkpoint = open_checkpoint(saved[-1])
        except CheckpointError:  # which going on with it will tell
            return []
        settings = changed_settings(checkpoint.config.to_dict(), config.to_dict())  # it may have gone on by hand
        if others := [name for name in settings if name.partition(".")[0] not in ("sampling", "evaluation")]:
            return others
        try:
            checkpoint.check_identity(**self.identity)
        except CheckpointError as error:
            return [f"content of {str(error).partition(':')[0]}"]
        return []

    @property
    def state(self) -> str:
        if self.all_done:
            return "done"
        if others := self.changes:
            return f"of other {', '.join(others)}"
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
) -> list[Planned]:
    """Validated, matched, timed; what is measured is kept in `measured.json`, so that a later plan is the same. Raises
    ValueError that names the variant that cannot be."""
    measured = Measured(folder / "measured.json", accelerator)
    firsts: dict[str, Run] = {}
    for run in runs:
        firsts.setdefault(repr((run.config.data, run.config.autoencoder, run.config.evaluation)), run)
    plan = [check(run, ablation, measured, first=run in firsts.values()) for run in runs]
    if ablation.match is not None:
        plan = matched(plan, measured)
    stored = [done_stages(planned.run.folder) for planned in plan]
    begun = [stages["began"] for stages in stored if "began" in stages]
    for number, planned in enumerate(plan):
        config, keys = planned.run.config, planned.keys
        if any_code:
            keys = of_any_code(keys, stored[number], begun)
        speed = measured.speed(planned.spec, config, _codec(config.autoencoder)) if timed else None
        plan[number] = replace(planned, keys=keys, speed=speed, start=start)
    plan = [replace(planned, trained_in=_owner(planned, plan)) for planned in plan]
    write_whole(folder / "plan.json", json.dumps(as_record(plan), indent=2) + "\n")
    return plan


def check(run: Run, ablation: AblationConfig, measured: Measured, *, first: bool) -> Planned:
    """A run with all that it is of, built and counted; a ValueError names the variant that cannot be."""
    config, told = run.config, list[str]()
    with _of_variant(run):
        diffusion, codec = build_diffusion(config.diffusion), _codec(config.autoencoder)
        images, held_out = _open_splits(config.data)
        spec = model_spec(config, codec, diffusion, len(images.classes))
        cost = measured.cost(spec)
        num_guided = config.guided_classes(spec.num_classes)
        sampling = resolve_sampling(config.sampling, diffusion, num_guided, say=told.append)
        check_metrics(config.evaluation.metrics)
        resolve_classes(list(ablation.pictures.classes), images.classes)
    scoring = {**asdict(ablation.scoring), "baselines": ablation.scoring.baselines and first}
    keys = keys_of(config, scoring, asdict(ablation.pictures))
    if not ablation.pictures.num_per_class:
        del keys["draw"]
    identity = {"codec": codec.provenance, "train": images.describe(), "test": held_out.describe()}
    of_images = list(images.classes), num_training_steps(config.train, len(images)), len(held_out), identity
    planned = Planned(run, ablation, spec, sampling, *of_images, cost, run.folder, first, keys)
    return replace(planned, told=tuple(f"variant {run.variant}: {words}" for words in told))


def matched(plan: list[Planned], measured: Measured) -> list[Planned]:
    """The runs, at a width at which they cost what `match.to` does. Raises ValueError where there is none."""
    rule = plan[0].ablation.match
    assert rule is not None
    target = next(planned.spec for planned in plan if planned.run.is_of(rule.to))

    def at_equal_cost(planned: Planned) -> Planned:
        run, spec = planned.run, planned.spec
        if run.is_of(rule.to):
            return planned

        def cost_of(spec: ModelSpec) -> float:
            if rule.by == "time":
                return 1 / measured.speed(spec, run.config, _codec(run.config.autoencoder)).training
            cost = measured.cost(spec)
            return cost.gflops if rule.by == "flops" else float(cost.parameters)

        key = {"match": asdict(rule), "to": asdict(target), "spec": asdict(spec)}
        with _of_variant(run):
            args = measured.get(key, lambda: resized(spec, cost_of(target), cost_of, rule.tolerance).args)
        run = replace(run, config=replace(run.config, model_args=args))
        return check(run, planned.ablation, measured, first=planned.first)

    return [at_equal_cost(planned) for planned in plan]


def prepare(plan: list[Planned], accelerator: Accelerator) -> None:
    """The latent caches and the references, once for all, so that runs side by side find them."""
    configs = [planned.run.config for planned in plan]
    for data, name in {repr((c.data, c.autoencoder)): (c.data, c.autoencoder) for c in configs}.values():
        codec = create_codec(name).to(accelerator.device)
        for split, flips in (("train", data.flip), ("test", False)):
            open_cache(data, codec, open_split(data, split, accelerator), accelerator, flips=flips)
    for data, scoring in {repr((c.data, c.evaluation)): (c.data, c.evaluation) for c in configs}.values():
        open_scorer(data, accelerator, scoring)


def table(plan: list[Planned]) -> str:
    """A row a run, to be read before the hours are spent."""
    rows = [["run", "parameters", "GFLOPs", "img/s", "steps", "left", "state"]]
    for planned in plan:
        speed = f"{planned.speed.training:.1f}" if planned.speed else "-"
        cost = [f"{planned.cost.parameters / 1e6:.2f}M", f"{planned.cost.gflops:.3f}", speed]
        rows.append([planned.run.name, *cost, str(planned.num_steps), duration(planned.seconds), planned.state])
    seconds = [planned.seconds for planned in plan]
    total = None if None in seconds else sum(filter(None, seconds))
    told = dict.fromkeys(words for planned in plan for words in planned.told)
    return "\n".join([terminal(rows), *told, f"about {duration(total)} to go, without features"])


def refuse_changed(plan: list[Planned]) -> None:
    """A ValueError names trainings of something else in the runs' folders: they are not moved unasked."""
    if changed := [planned for planned in plan if planned.changes]:
        folders = "; ".join(f"{planned.run.folder}: {', '.join(planned.changes)}" for planned in changed)
        raise ValueError(
            f"trained before with other {folders}: --redo true keeps that beside them and trains anew, --any_code true "
            "takes what differs by code alone for done, --name begins another study"
        )


def duration(seconds: float | None) -> str:
    """As h:mm, or in minutes or seconds where it is short."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f}"


def as_record(plan: list[Planned]) -> dict[str, Any]:
    ablation = plan[0].ablation
    baseline = next((planned.run.variant for planned in plan if planned.run.is_of(ablation.baseline)), None)

    def row(planned: Planned) -> dict[str, Any]:
        run, spec, cost = planned.run, planned.spec, planned.cost
        about = {"variant": run.variant, "point": run.point, "seed": run.seed, "folder": run.folder.as_posix()}
        about |= {"trained_in": planned.trained_in.as_posix(), "keys": planned.keys, "classes": planned.classes}
        values = run.config.to_dict()
        about["loss_of"] = {name: values[name] for name in ("autoencoder", "diffusion", "auxiliary", "alignment")}
        about |= {"model": spec.name, "model_args": spec.args, "parameters": cost.parameters, "gflops": cost.gflops}
        return {**about, "num_steps": planned.num_steps, "batch_size": run.config.train.batch_size}

    return {"ablation": {**asdict(ablation), "baseline": baseline}, "runs": [row(planned) for planned in plan]}


def _owner(planned: Planned, plan: list[Planned]) -> Path:
    """The folder of the training that serves all that are equal up to sampling: where it began, or the first's."""
    key = planned.keys["train"]
    folders = [other.run.folder for other in plan if other.keys["train"] == key]
    return next((folder for folder in folders if done_stages(folder).get("began") == key), folders[0])


@contextmanager
def _of_variant(run: Run) -> Iterator[None]:
    """Errors that say whose they are."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"variant {run.variant}: {error}") from error


@lru_cache
def _codec(name: str) -> Any:
    return create_codec(name)


_SPLITS: dict[str, Any] = {}


def _open_splits(config: Any) -> Any:
    name = repr(config)
    if name not in _SPLITS:
        _SPLITS[name] = open_split(config, "train"), open_split(config, "test")
    return _SPLITS[name]
