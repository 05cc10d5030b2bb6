"""Configurations: parsed from the command line and YAML, and turned into objects."""

import sys

if sys.platform == "win32":  # which cannot sync folders, nor lock files or replace open ones
    raise SystemExit("Windows itself is not supported: use its Linux (wsl --install), GPUs included")
