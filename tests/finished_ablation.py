"""The folder of an ablation that has finished, with made-up results and its report."""

import json

import numpy as np

from ablation.report import write_report

CLASSES = ["stop_sign", "butterfly", "sunflower", "soccer_ball"]
VARIANTS = {"DiT": 0.0, "UViT": -6.0, "USwin": -7.0, "XSwin with a long name": -9.0}  # and what it gains
METRICS = {
    "frechet_distance[colors]": (60, 1),
    "precision": (0.4, -0.01),
    "spatial_frechet_distance[colors]": (None, 0),
}
CLAIMS = {
    "skips help": ["XSwin with a long name", "DiT"],
    "tokens win": ["DiT", "USwin"],
    "two are alike": ["UViT", "USwin"],
}
SEEDS, TRIALS = (0, 1, 2), 2


def score(value):
    return {"value": value, "std": None, "reason": None if value is not None else "Inception has it"}


def finished_ablation(work):
    """Finished runs of four variants under three seeds, and one that is not finished."""
    folder = work / "runs" / "fake"
    rng = np.random.default_rng(0)
    runs = []
    for place, (variant, gain) in enumerate(VARIANTS.items()):
        for seed in SEEDS:
            path = folder / str(place) / f"seed{seed}"
            path.mkdir(parents=True)
            run = {
                "variant": variant,
                "seed": seed,
                "folder": str(path),
                "trained_in": str(path),
                "keys": {"score": "k", "draw": "k"},
            }
            run |= {"parameters": 10**6 * (place + 1), "gflops": 0.3 + place, "num_steps": 200, "batch_size": 8}
            runs.append({**run, "model": variant, "model_args": {}, "classes": CLASSES})
            if (variant, seed) == ("UViT", 2):
                continue
            trials = [
                {
                    name: score(None if base is None else base + gain * sign + rng.normal() * 0.01 * base)
                    for name, (base, sign) in METRICS.items()
                }
                for _ in range(TRIALS)
            ]
            rows = [{"name": variant, "scores": trials[0], "trials": trials}]
            if not place and not seed:
                ceiling, floor = ({"precision": score(value)} for value in (0.7, 0.9))
                rows.append({"name": "training images", "scores": floor, "trials": []})
                rows.append({"name": "reconstructions", "scores": ceiling, "trials": []})
            samples = {"sampler": "ddim", "num_steps": 9, "guidance_scale": 2.0, "labels": "balanced", "seed": 0}
            record = {
                "rows": rows,
                "num_samples": 10,
                "num_reference": 10,
                "extractor": "colors",
                "extractor_sha256": "0" * 64,
            }
            record |= {
                "samples": {**samples, "trained_at_commit": "abc"},
                "reference": {"source": "shapes", "split": "test"},
            }
            record |= {
                "versions": {"torch": "2"},
                "per_class": {name: score(50 + gain + rng.normal()) for name in CLASSES},
            }
            (path / "scores.json").write_text(json.dumps(record))
            (path / "stages.json").write_text(json.dumps({"score": "k", "draw": "k"}))
            loss = [1 / (1 + step / 20) + gain / 100 + rng.normal() * 0.03 for step in range(200)]
            events = [
                {"step": s, "loss": v, "images_per_second": 50.0 + place, "memory_gb": 2.0} for s, v in enumerate(loss)
            ]
            events += [
                {"step": s, "frechet_distance[colors]": 80 - s / 10, "validation_loss": 1 - s / 300} for s in (100, 200)
            ]
            (path / "log.jsonl").write_text("\n".join(map(json.dumps, events)))
            np.savez(path / "pictures.npz", arr_0=rng.integers(0, 256, (4 * len(CLASSES), 32, 32, 3), dtype=np.uint8))
    about = {"title": "A <fake> ablation", "description": "Four variants & three seeds.", "baseline": "DiT"}
    plan = {"ablation": {**about, "claims": CLAIMS, "pictures": {"classes": [], "num_per_class": 4}}, "runs": runs}
    (folder / "plan.json").write_text(json.dumps(plan))
    write_report(folder)
    return folder
