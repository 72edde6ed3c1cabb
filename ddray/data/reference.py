"""What a dataset is opened by: a name or a folder, with the options that change how it is read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode

from ddray.data.catalog import ALIASES, KNOWN
from ddray.errors import InputError
from ddray.system.options import ContentOptions


class DatasetRef(ContentOptions):
    """A dataset and how it is read, written `cifar10?can_flip=false&image_size=64`.

    Everything that reopens a dataset by its name (artifacts, bench units, workers, reports) so reads it the
    same way.
    """

    base: str
    """Its name or folder."""

    @classmethod
    def parse(cls, values: Mapping[str, Any] | str, *, prefix: str = "", source: str = "") -> Self:
        """Return the reference that a text stands for; a text with `?` that is a path is only that.

        `imagenet224` stands for `imagenet?image_size=224`; an option after the name wins.

        Raises:
            InputError: an option is unknown or has a bad value.
        """
        if not isinstance(values, str):
            return super().parse(values, prefix=prefix, source=source)
        base, mark, query = values.rpartition("?")
        if not mark or os.path.exists(os.path.expanduser(values)):
            return cls(**ALIASES.get(values, {"base": values}))
        try:
            pairs = parse_qsl(query, strict_parsing=True)
        except ValueError:
            pairs = []
        options = dict(pairs)
        if not pairs or len(options) < len(pairs) or "base" in options:
            raise InputError(
                f"a dataset's options must be distinct name=value after '?', joined by '&', got {values!r}"
            )
        return super().parse({**ALIASES.get(base, {"base": base}), **options}, prefix=prefix, source=values)

    def __str__(self) -> str:
        """Return the text that `parse` reads, the options sorted."""
        options = sorted(self.content().items())
        text = urlencode([(k, str(v).lower() if isinstance(v, bool) else v) for k, v in options])
        return f"{self.base}?{text}" if text else self.base

    def with_options(self, **content: Any) -> Self:
        """Return the reference with further options of content; those that are None change nothing.

        Raises:
            InputError: an option is unknown or has a bad value.
        """
        changes = {name: value for name, value in content.items() if value is not None}
        return self.parse({**self.model_dump(exclude_none=True), **changes}, prefix="--")

    def absolute(self) -> Self:
        """Return the reference with an absolute path, if it is a path."""
        path = Path(self.base).expanduser()
        if self.base in KNOWN or not path.exists():
            return self
        return self.model_copy(update={"base": str(path.absolute())})
