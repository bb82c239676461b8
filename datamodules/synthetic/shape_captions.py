"""Captions of scenes of shapes."""

from itertools import product

from ssmpretrain.datamodules.synthetic.shape_scenes import CLASSES, Scene

TEMPLATES = ["a {}", "a picture of a {}", "there is a {}"]  # for the names of the classes
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_CONVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def full_captions(scene: Scene) -> list[str]:
    """Return captions that distinguish a scene from all other scenes; the first one is the simplest."""
    first, last = (CLASSES[label] for label in (scene.objects[0], scene.objects[-1]))
    if scene.relation:
        return [f"a {first} {scene.relation} a {last}", f"a {last} {_CONVERSE[scene.relation]} a {first}"]
    if scene.place:
        return [f"a {scene.size} {first} {_where(scene.place)}"]
    return [f"{_NUMBERS[len(scene.objects)]} {_plural(first)}"]


def captions(scene: Scene) -> list[str]:
    """Return true captions of a scene, short and long, in several wordings."""
    said = full_captions(scene)
    if scene.place:
        name, where = CLASSES[scene.objects[0]], _where(scene.place)
        said += [f"a {name}", f"a {scene.size} {name}", f"a {name} {where}"]
    is_plural = len(scene.objects) > 1 and not scene.relation
    openings = ["{}", "a picture of {}", "there are {}" if is_plural else "there is {}"]
    return [opening.format(phrase) for opening, phrase in product(openings, said)]


def _where(place: str) -> str:
    return "in the centre" if place == "centre" else f"at the {place}"


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")
