"""What importing the package costs, and that timm learns of our encoders whatever the order."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssmpretrain

ROOT = Path(ssmpretrain.__file__).parents[1]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_importing_the_package_brings_nothing_heavy_along():
    heavy = ["torch", "timm", "lightning", "open_clip", "webdataset", "numpy"]
    done = run(f"import sys, ssmpretrain; dir(ssmpretrain); print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_building_an_encoder_brings_no_trainer_along():
    done = run(
        "import sys, ssmpretrain; ssmpretrain.create_encoder('test_vim')\n"
        "print([name for name in ('lightning', 'open_clip', 'webdataset') if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import ssmpretrain, timm",
        "import timm, ssmpretrain",
        "import ssmpretrain; from timm.models import create_model",
    ],
)
def test_timm_knows_our_names_whatever_the_order_of_imports(imports):
    done = run(
        f"{imports}\nimport sys, timm\n"
        "print(type(timm.create_model('test_vim')).__name__, timm.list_models('vim_tiny*'))\n"
        "print(type(timm.__spec__.loader).__name__, any('Timm' in type(f).__name__ for f in sys.meta_path))"
    )
    assert done.stdout.splitlines() == [
        "Vim ['vim_tiny_patch16_224', 'vim_tiny_patch16_pyramid_224', 'vim_tiny_patch16_reg12_224', "
        "'vim_tiny_patch16_scannorm_224', 'vim_tiny_patch16_stride8_224']",
        "SourceFileLoader False",  # the finder has left and timm's own loader is what it always was
    ], done.stdout + done.stderr
    assert not done.stderr


def test_timm_stays_usable_when_our_encoders_cannot_be_imported():
    done = run(
        "import sys, ssmpretrain\nsys.modules['ssmpretrain.encoders'] = None\n"
        "import timm\nprint(timm.is_model('resnet18'), timm.is_model('test_vim'))"
    )
    assert done.stdout.strip() == "True False"
    assert "ssmpretrain: its encoders are not known to timm" in done.stderr


def test_the_package_offers_its_three_functions_and_nothing_made_up():
    assert {"create_encoder", "load_encoder", "list_encoders"} <= set(dir(ssmpretrain))
    assert ssmpretrain.list_encoders("test_v*") == ["test_vim", "test_vim2", "test_vmamba", "test_vmamba2"]
    with pytest.raises(AttributeError, match="no attribute 'creat_encoder'"):
        ssmpretrain.creat_encoder  # noqa: B018


def test_the_version_is_the_project_files():
    project_file = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', project_file, re.MULTILINE)[1] == ssmpretrain.__version__
