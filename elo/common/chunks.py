"""Equal parts of something that is too much at once."""

import math


def even_chunk(count: int, most: int, multiple: int = 1) -> int:
    """The size of the fewest chunks of at most `most`, none of them much smaller than the others.

    It may exceed `most` to be a `multiple`.
    """
    size = math.ceil(count / math.ceil(count / max(1, most))) if count else 1
    return math.ceil(size / multiple) * multiple
