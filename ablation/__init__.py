"""From one YAML of variants to the runs, their scores and the report: `scripts/ablate.py` is the command."""
