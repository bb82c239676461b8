"""A run of CLIP for tests of code that reads such a run."""

from pathlib import Path

import pytest
from clip_run import fit_one_step, tiny_clip


@pytest.fixture(scope="session")
def siglip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of CLIP with the SigLIP loss, of images of 32 x 48 pixels."""
    return fit_one_step(tmp_path_factory.mktemp("clip"), tiny_clip(loss="siglip"))
