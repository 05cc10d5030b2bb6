"""From command line and YAML to a configuration, and from that to objects."""

import sys

if sys.platform == "win32":  # whose folders cannot be synced, nor files be locked and replaced while they are read
    raise SystemExit("Windows itself is not supported: use its Linux (wsl --install), GPUs included")
