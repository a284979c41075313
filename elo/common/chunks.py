"""Equal parts of something that is too much at once."""

import math
from collections.abc import Sequence

from torch import Tensor


def even_chunk(count: int, most: int, multiple: int = 1) -> int:
    """The size of the fewest chunks of at most `most`, none of them much smaller than the others.

    It may exceed `most` to be a `multiple`.
    """
    size = math.ceil(count / math.ceil(count / max(1, most))) if count else 1
    return math.ceil(size / multiple) * multiple


def row_chunks(count: int, size: int, places: Tensor | None = None) -> Sequence[slice | Tensor]:
    """Indices of `size` rows at a time, of `count` in all: the first ones, or those at `places`."""
    chunks = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return chunks if places is None else [places[chunk] for chunk in chunks]
