"""Groups of settings that come in several kinds: recipes name the kind by its class, checkpoints by a word."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from inspect import isabstract
from typing import Any, ClassVar

from typing_extensions import Self

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.wording import nearest

_KIND = "kind"


@dataclass
class Settings(metaclass=ABCMeta):  # noqa: B024  (its groups have the abstract methods)
    """Base class of a group of settings with several kinds, such as a schedule or a head.

    A group is an abstract subclass, and an argument of an objective is annotated with it. A kind is a dataclass of
    plain data derived from the group. Kinds may be in any package. A recipe names the kind as
    `{class_path: package.Kind, init_args: {...}}`; options without a class path are those of the argument's default.

    Attributes:
        unnamed: Kind of settings in checkpoints that name none, because they are older than the group.
    """

    unnamed: ClassVar[str] = ""

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """Build settings from the plain data that `plain` returned. Only kinds that are imported are found.

        Raises:
            UserError: If this group has no kind of that name.
        """
        values = dict(values)
        name = values.pop(_KIND, cls.unnamed)
        kinds = {kind.__name__: kind for kind in cls._kinds() if not isabstract(kind)}
        if name not in kinds:
            raise UserError(
                f"{cls.__name__}: no kind is called {name!r:.60}. {nearest(str(name), list(kinds), 'Known kinds')} "
                "Import the module of a kind of your own first."
            )
        return kinds[name](**values)

    @classmethod
    def _kinds(cls) -> Iterator[type[Self]]:
        yield cls
        for kind in cls.__subclasses__():
            yield from kind._kinds()


def plain(value: Any) -> Any:
    """Return a dataclass as a dictionary of plain data, with the name of its kind; return any other value unchanged."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return ({_KIND: type(value).__name__} if isinstance(value, Settings) else {}) | asdict(value)
