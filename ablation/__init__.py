"""Ablations: from one YAML of variants to runs, scores and a report. `scripts/ablate.py` is the command."""
