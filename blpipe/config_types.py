"""Kinds of sections and values in a config, each with what must hold of it."""

import os
import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from blpipe.errors import printable


class Section(BaseModel):
    """A group of keys; unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ByName(Section):
    """A section for which a plain string stands for `{name: …}`."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Named(ByName):
    """A part, by name (built in, or registered by a package) or as `target: package.module:function`, and its args."""

    default: ClassVar[str | None] = None  # the name where neither name nor target is given

    name: str | None = None
    target: str | None = None
    args: dict[str, Any] = {}

    @property
    def called(self) -> str:
        """The name, or the target."""
        called = self.name or self.target
        assert called is not None
        return called

    @model_validator(mode="before")
    @classmethod
    def _fill_name(cls, value: Any) -> Any:
        if cls.default and isinstance(value, dict):
            return {"name": None if "target" in value else cls.default} | value
        return value

    @model_validator(mode="after")
    def _one_of_name_and_target(self) -> "Named":
        if self.name is not None and self.target is not None:
            raise ValueError(f"has the name {printable(self.name)} and the target {printable(self.target)}; leave one "
                             "out, or set it to null")
        if self.name is None and self.target is None:
            raise ValueError("give a name or a target (package.module:function)")
        return self


Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
WirePrecision = Literal["full", "bf16"]  # the precision of what stages send each other
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

Processes = Annotated[int, Field(ge=0, le=4096)]  # or threads, of one machine


def _path(value: str) -> str:
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise ValueError("holds a character that no path can")
    if len(encoded) > 2000 or any(len(part) > 255 for part in encoded.split(b"/")):
        raise ValueError("is longer than a path can be")
    return os.path.expanduser(value)


PathText = Annotated[str, AfterValidator(_path)]

T = TypeVar("T")


def _some(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values:
        raise ValueError("give at least one")
    return values


Some = Annotated[tuple[T, ...], Field(strict=False), AfterValidator(_some)]
"""A list with something in it."""

ONE, EACH = "<one>", "<each>"  # which pydantic puts into the path of what it finds wrong
Each = Annotated[
    Annotated[T, Tag(ONE)] | Annotated[Some[T], Tag(EACH)],
    Discriminator(lambda value: EACH if isinstance(value, list | tuple) else ONE)]
"""One value for all stages, or a list with one for each."""


def _block_name(value: Any) -> Any:
    return str(value) if type(value) is int else value  # an nn.Sequential's own names are numbers


BlockName = Annotated[str, BeforeValidator(_block_name)]


def bytes_of(text: str) -> int:
    """The number of bytes that a text such as 16GiB says. Raises ValueError."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ValueError("must be a number of bytes, or such as 500MB or 16GiB") from None


Bytes = Annotated[Positive | None, BeforeValidator(lambda value: bytes_of(value) if isinstance(value, str) else value)]


def folder_name(value: str) -> str:
    """`value`, if a run's folder can have that name. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", value):
        raise ValueError("must be the name of a folder: letters, digits, '_', '-' and '.', 200 at most")
    return value


FolderName = Annotated[str, AfterValidator(folder_name)]
