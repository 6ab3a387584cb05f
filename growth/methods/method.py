"""What every method is: a paper's way to a larger model, its fields what it can be told."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from growth.architecture import Architecture
from growth.maps import Maps

if TYPE_CHECKING:
    from growth.growing import Growth
    from growth.plan import Recipe


class Learner(Protocol):
    """What finds weights from data: planned first, then fitted, then asked for them."""

    def recipe(self, name: str) -> "Recipe | None":
        """What makes the tensor of that name on disk, once `fit` is over; None where the maps do."""

    def fit(self) -> tuple[int, dict[str, Any]]:
        """The operations that took, and what growth.json tells of it."""


class Method(ABC):
    """name: on the command line. lossless: does it promise to preserve the function, where that is possible?
    learned: does it learn from data? sparse: does it make a mixture of experts? grows: the sizes, by their
    flags, that it can change. As a string it is what reports call it."""

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    sparse: ClassVar[bool] = False
    grows: ClassVar[frozenset[str]] = frozenset(
        ("hidden-size", "num-layers", "num-heads", "num-kv-heads", "ffn-size")
    )

    def __str__(self) -> str:
        return self.name

    @property
    def needs_head(self) -> bool:
        """Does it learn by a loss, which takes a head?"""
        return self.learned

    def told(self, old: Architecture) -> Self:
        """With what follows from the source where it is not said."""
        return self

    def layers(self, old: int, new: int) -> tuple[int, ...]:
        """The old layer that each of `new` layers takes its inside from."""
        return tuple(range(new))

    def depth(self, wanted: int | None, old: int) -> int | None:
        """The layers of the target of a source of `old`, where these are not said."""
        return wanted

    @abstractmethod
    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`; those that learning starts from."""

    def learner(self, growth: "Growth") -> Learner | None:
        """What learns, of a method that does. Raises Refusal where the data do not fit."""
        return None

    def lines(self, old: Architecture, new: Architecture) -> Iterable[str]:
        """What else a report says of what was made."""
        return ()
