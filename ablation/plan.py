"""Before anything starts: every variant validated, brought to equal cost and timed; what is done and what is left."""

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ablation.costs import Measured, Speed
from ablation.identity import changed_settings, keys_of, of_any_code
from ablation.match import resized
from ablation.stages import changes, done_stages, pictured
from ablation.study import AblationConfig
from ablation.variants import Run
from autoencoders.codec import create_codec
from checkpoints.checkpoint import open_checkpoint
from diffusion.samplers import num_calls
from evaluation.scoring import open_scorer
from evaluation.table import terminal
from experiment.backbones import model_spec
from experiment.datasets import open_cache, open_split
from experiment.diffusions import build_diffusion
from machine.checkpoint_folder import CheckpointError, list_checkpoints, newest_whole
from machine.whole_files import write_whole
from metrics.cost import Cost
from metrics.scores import check_metrics
from models import ModelSpec
from sampling.checks import resolve_sampling
from sampling.generation import resolve_classes
from training.optimizer import num_training_steps


@dataclass(frozen=True)
class Planned:
    """A run, what it costs, and which results are its own. `trained_in` is another run's folder where both differ in
    sampling or scoring alone."""

    run: Run
    spec: ModelSpec
    classes: tuple[str, ...]
    cost: Cost
    num_steps: int
    num_held_out: int
    num_samples: int  # of a trial
    num_trials: int
    keys: dict[str, str]  # of the stages
    trained_in: Path
    first: bool  # of the ablation: the one that baselines are scored with
    num_pictures: int
    identity: dict[str, dict[str, Any]]  # what autoencoder and splits are by their content; see `check_identity`
    speed: Speed | None = None
    start: float = 0.0  # seconds that a program takes until it does something

    @property
    def trains(self) -> bool:
        """Whether the training is its own."""
        return self.trained_in == self.run.folder

    @property
    def done(self) -> set[str]:
        """Stages whose results are there, and of this configuration, code and content. Where a run trains, what it had
        of another's training is none of its own."""
        stored = done_stages(self.run.folder)
        if self.changes or (self.trains and "began" not in stored):
            return set()
        return {name for name, key in stored.items() if self.keys.get(name) == key}

    @property
    def seconds(self) -> float | None:
        """What is left to do takes, by the short timing, with what a training looks at on the way; features are not in
        it."""
        if self.speed is None:
            return None
        speed, config, log = self.speed, self.run.config, self.run.config.log
        diffusion, num_guided = build_diffusion(config.diffusion), config.guided_classes(self.spec.num_classes)
        sampling = resolve_sampling(config.sampling, diffusion, num_guided)
        guided = 2 if sampling.guidance_scale != 1 else 1
        drawing = guided * num_calls(diffusion, sampling.sampler, sampling.num_steps) / speed.calls + 1 / speed.decoding
        steps = self.num_steps - self.step

        def times(every: int) -> int:
            return steps // every if every > 0 else 0

        training = steps * config.train.batch_size / speed.training
        training += times(log.validate_every) * min(log.num_validation, self.num_held_out) / speed.calls
        training += (times(log.sample_every) + 1) * 4 * min(10, self.spec.num_classes or 10) * drawing
        training += times(log.evaluate_every) * self.num_samples * drawing
        left = {"train": training, "score": self.num_trials * self.num_samples * drawing}
        left |= {"draw": self.num_pictures * drawing}
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
        """Files and settings that the training in the folder differs by from the plan's, or what lies at a path that it
        was trained with."""
        run, trains = self.run, self.trains
        if trains and (others := changes(run.folder, "began", self.keys["train"], run.config)):
            return others
        saved = list_checkpoints(self.trained_in / "checkpoints")
        if not saved or done_stages(self.trained_in).get("began") != self.keys["train"]:
            return []
        try:
            checkpoint = open_checkpoint(saved[-1])
        except CheckpointError:  # which going on with it will tell
            return []
        settings = changed_settings(checkpoint.config.to_dict(), run.config.to_dict())  # it may have gone on by hand
        if others := [name for name in settings if name.partition(".")[0] not in ("sampling", "evaluation")]:
            return others
        try:
            checkpoint.check_identity(**self.identity)
        except CheckpointError as error:
            return [f"content of {str(error).partition(':')[0]}"]
        return []

    @property
    def state(self) -> str:
        """What is done of it, or why not, in words."""
        if self.done.issuperset(self.keys):
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
    """Validated, matched, timed. What is measured is kept in `measured.json`, so that a later plan is the same. `start`
    is what each program takes to begin.

    Raises:
        ValueError: that names the variant that cannot be.
    """
    measured = Measured(folder / "measured.json", accelerator)
    specs = {run.folder: _named(run, lambda run=run: check(run, ablation)) for run in runs}
    unmatched = {run.folder: run for run in runs}
    if ablation.match is not None:
        runs = match(ablation, runs, specs, measured)

    plan: list[Planned] = []
    for run in runs:
        if run is not unmatched[run.folder]:  # match has changed it
            specs[run.folder] = _named(run, lambda run=run: check(run, ablation))
        spec, classes, num_images, num_reference, contents = specs[run.folder]
        scoring = {**asdict(ablation.scoring), "baselines": ablation.scoring.baselines and not plan}
        keys = keys_of(run.config, scoring, asdict(ablation.pictures))
        keys = {name: key for name, key in keys.items() if name != "draw" or ablation.pictures.num_per_class}
        planned = Planned(
            run,
            spec,
            classes,
            measured.cost(spec),
            num_training_steps(run.config.train, num_images),
            num_reference,
            run.config.evaluation.num_samples or num_reference,
            ablation.scoring.trials,
            of_any_code(keys, done_stages(run.folder)) if any_code else keys,
            run.folder,
            first=not plan,
            num_pictures=ablation.pictures.num_per_class * max(1, len(pictured(ablation.pictures.classes, classes))),
            identity=contents,
            speed=measured.speed(spec, run, _codec(run.config.autoencoder)) if timed else None,
            start=start,
        )
        plan.append(planned)
    plan = [replace(planned, trained_in=_owner(planned, plan)) for planned in plan]
    write_whole(folder / "plan.json", json.dumps(as_record(ablation, plan), indent=2) + "\n")
    return plan


def check(run: Run, ablation: AblationConfig) -> tuple[ModelSpec, tuple[str, ...], int, int, dict[str, dict[str, Any]]]:
    """What a run is of: backbone, classes, numbers of training and held-out images, and what these are.

    Raises:
        ValueError: for whatever could not be built.
    """
    config = run.config
    diffusion = build_diffusion(config.diffusion)
    images, held_out = _open_splits(config.data)
    codec = _codec(config.autoencoder)
    spec = model_spec(config, codec, diffusion, len(images.classes))
    spec.build_on_meta()
    num_guided = config.guided_classes(spec.num_classes)
    resolve_sampling(config.sampling, diffusion, num_guided)
    check_metrics(config.evaluation.metrics)
    resolve_classes(list(ablation.pictures.classes), images.classes)
    if ablation.scoring.trials < 1:
        raise ValueError(f"scoring.trials {ablation.scoring.trials} must be at least 1")
    contents = {"codec": codec.provenance, "train": images.describe(), "test": held_out.describe()}
    return spec, tuple(images.classes), len(images), len(held_out), contents


def prepare(plan: list[Planned], accelerator: Accelerator) -> None:
    """The latent caches and the references, once for all, so that runs side by side find them."""
    configs = [planned.run.config for planned in plan]
    for data, name in {repr((c.data, c.autoencoder)): (c.data, c.autoencoder) for c in configs}.values():
        codec = create_codec(name).to(accelerator.device)
        for split, flips in (("train", data.flip), ("test", False)):
            open_cache(data, codec, open_split(data, split), accelerator, flips=flips)
    for data, scoring in {repr((c.data, c.evaluation)): (c.data, c.evaluation) for c in configs}.values():
        open_scorer(data, accelerator, scoring)


def match(ablation: AblationConfig, runs: list[Run], specs: dict[Path, Any], measured: Measured) -> list[Run]:
    """The runs, at a width at which they cost what `match.to` does.

    Raises:
        ValueError: where there is none.
    """
    rule = ablation.match
    assert rule is not None
    (target, *_) = next(specs[run.folder] for run in runs if run.is_of(rule.to))

    def at_equal_cost(run: Run) -> Run:
        spec = specs[run.folder][0]
        if run.is_of(rule.to):
            return run

        def find() -> dict[str, Any]:
            cost_of = {
                "flops": lambda spec: measured.cost(spec).gflops,
                "params": lambda spec: float(measured.cost(spec).parameters),
                "time": lambda spec: 1 / measured.speed(spec, run, _codec(run.config.autoencoder)).training,
            }[rule.by]
            return resized(spec, cost_of(target), cost_of, rule.tolerance).args

        key = {"match": asdict(rule), "to": asdict(target), "spec": asdict(spec)}
        args = _named(run, lambda: measured.get(key, find))
        return replace(run, config=replace(run.config, model_args=args))

    return [at_equal_cost(run) for run in runs]


def table(plan: list[Planned]) -> str:
    """A row a run, to be read before the hours are spent."""
    rows = [["run", "parameters", "GFLOPs", "img/s", "steps", "left", "state"]]
    for planned in plan:
        cost = [f"{planned.cost.parameters / 1e6:.2f}M", f"{planned.cost.gflops:.3f}"]
        cost.append(f"{planned.speed.training:.1f}" if planned.speed else "-")
        left = [str(planned.num_steps), duration(planned.seconds), planned.state]
        rows.append([planned.run.name, *cost, *left])
    seconds = [planned.seconds for planned in plan]
    total = None if None in seconds else sum(filter(None, seconds))
    return f"{terminal(rows)}\nabout {duration(total)} to go, without features"


def refuse_changed(plan: list[Planned]) -> None:
    """Trainings of something else in the runs' folders are nothing to be moved unasked.

    Raises:
        ValueError: that names them, and what they differ by.
    """
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


def as_record(ablation: AblationConfig, plan: list[Planned]) -> dict[str, Any]:
    """What the report needs to know of the plan."""
    baseline = next((planned.run.variant for planned in plan if planned.run.is_of(ablation.baseline)), None)
    return {
        "ablation": {**asdict(ablation), "baseline": baseline},
        "runs": [
            {
                "variant": planned.run.variant,
                "point": planned.run.point,
                "seed": planned.run.seed,
                "folder": planned.run.folder.as_posix(),
                "trained_in": planned.trained_in.as_posix(),
                "parameters": planned.cost.parameters,
                "gflops": planned.cost.gflops,
                "num_steps": planned.num_steps,
                "batch_size": planned.run.config.train.batch_size,
                "classes": list(planned.classes),
                "model": planned.spec.name,
                "model_args": planned.spec.args,
                "keys": planned.keys,
            }
            for planned in plan
        ],
    }


def _owner(planned: Planned, plan: list[Planned]) -> Path:
    """The folder of the training that serves all that are equal up to sampling and scoring: where it began, or the
    first's."""
    key = planned.keys["train"]
    folders = [other.run.folder for other in plan if other.keys["train"] == key]
    return next((folder for folder in folders if done_stages(folder).get("began") == key), folders[0])


def _named(run: Run, action: Any) -> Any:
    """Errors that say whose they are."""
    try:
        return action()
    except (ValueError, OSError) as error:
        raise ValueError(f"variant {run.variant}: {error}") from error


@lru_cache
def _codec(name: str) -> Any:
    return create_codec(name)


_SPLITS: dict[str, Any] = {}


def _open_splits(config: Any) -> Any:
    name = json.dumps(asdict(config))
    if name not in _SPLITS:
        _SPLITS[name] = open_split(config, "train"), open_split(config, "test")
    return _SPLITS[name]
