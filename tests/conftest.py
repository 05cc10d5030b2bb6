"""Shapes in public signatures are checked while testing: jaxtyping reads them, beartype verifies them."""

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook(["models", "diffusion", "data", "metrics", "experiment"], "beartype.beartype")

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def root() -> Path:
    """The repository."""
    return Path(__file__).parent.parent
