"""The data module of a run, built from the plain data of its config.yaml."""

from pathlib import Path
from typing import Any

import pytest

from ssmpretrain.commands.shared.evaluation_data import _of_run
from ssmpretrain.datamodules.decoding.photometric import Photometric
from ssmpretrain.datamodules.decoding.views import ViewGroup


def built(**arguments: Any) -> Any:
    data = {"class_path": "ssmpretrain.datamodules.ImageShards", "init_args": {"train": "a.tar", **arguments}}
    return _of_run(Path("config.yaml"), {"data": data}, [], {"num_workers": 0}, "knn", "--train and --val")


def test_options_of_training_become_the_objects_that_the_data_module_declares() -> None:
    colours = {"brightness": 0.4, "blur_sigma": [0.1, 2.0]}
    views = [{"count": 2, "photometric": colours}, {"count": 6, "size": 96, "crop_scale": [0.05, 0.4], "local": True}]
    module = built(views=views, image_size=[224, 224])
    assert module.views[0] == ViewGroup(2, photometric=Photometric(0.4))
    assert isinstance(module.views[1], ViewGroup) and module.views[1].local and module.image_size == (224, 224)
    assert built(photometric=colours).photometric == Photometric(0.4)


def test_wrong_options_are_refused_by_the_data_module() -> None:
    with pytest.raises(ValueError, match="ViewGroup: count is a whole number of at least 1"):
        built(views=[{"count": 0}])
