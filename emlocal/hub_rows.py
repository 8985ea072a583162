"""Rows of a dataset of the hub, through the package datasets where it is installed."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from emlocal.errors import EmlocalError


def hub_rows(
    name: str, split: str, limit: int | None = None, config: str | None = None
) -> list[Mapping[str, Any]]:
    """The first rows of ORG/NAME's split.

    Raises EmlocalError where the package is missing, or the hub or the dataset cannot be had.
    """
    try:
        from datasets import load_dataset
    except ImportError as why:
        raise EmlocalError(
            f"there is no file {name}, and datasets of the hub need the package datasets",
            "pip install datasets",
        ) from why
    try:
        rows: Iterable[Mapping[str, Any]] = load_dataset(name, config, split=split, streaming=True)
        return list(islice(rows, limit))
    except (OSError, ValueError, RuntimeError) as why:  # what the package raises for names and networks
        said = str(why).splitlines()[0][:200] if str(why) else type(why).__name__
        raise EmlocalError(f"the dataset {name}:{split} cannot be had: {said}") from why
