"""Bring docs/zoo.yaml and the table of docs/zoo.md up to date with the checkpoints that come with this repository.

python scripts/zoo.py            (after one of them was replaced; `images` and `images_per_second` are said by hand)
"""

import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import one_line_errors, run_program
from machine.whole_files import write_whole


def main() -> None:
    """Read the files and write both."""
    from sharing.zoo import DOCUMENT, INDEX, entry, filled_in  # with torch, for which --help does not wait

    index = {name: entry(by_hand) for name, by_hand in yaml.safe_load(INDEX.read_text()).items()}
    comment = (
        "# Written by scripts/zoo.py from each folder's files, but for folder, config, images, images_per_second.\n"
    )
    write_whole(INDEX, comment + yaml.safe_dump(index, sort_keys=False, width=120, allow_unicode=True))
    write_whole(DOCUMENT, filled_in(DOCUMENT.read_text(), index))


if __name__ == "__main__":
    with one_line_errors():
        run_program(main)
