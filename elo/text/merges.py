"""Which tokens make an algorithm that merges any two neighbours that are a token together, the lowest rank first, give
the ids of one that merges listed pairs only, in their order.

The first is how tiktoken (on bytes) and SentencePiece (on characters) merge, the second Hugging Face's tokenizer.json.
"""

from collections.abc import Container, Iterable
from pathlib import Path

from elo.common.errors import UserError
from elo.text.byte_level_bpe import GPT2_PATTERN, ByteLevelBPE, token_bytes


def mergeable_ranks(
    vocab: dict[str, int],
    merges: Iterable[tuple[str, str]],
    source: Path,
    ignore_merges: bool = False,
    not_text: Container[str] = (),
) -> dict[bytes, int]:
    """The tokens (bytes -> id) with which tiktoken's rule gives the ids of the listed merges. UserError where none do.

    `ignore_merges`: a piece that is in the vocabulary is one token, however its merges end (Llama 3).
    `not_text`: the added tokens, which no piece may become by that rule.

    Why it is exact: in a stretch of text that no merge has crossed the ends of, merging goes as if it stood alone. So
    when neighbours x, y together have the bytes of a token t, then merging t's bytes alone arrives at [x, y] too, and
    no other pair ever makes t. We keep the tokens that their own bytes merge into: for them that pair is listed. No
    text merges into the others, so they are left out, or, with `ignore_merges`, checked not to be such a pair.
    """
    numbered = numbered_merges(merges, vocab, source, "its id")
    listed = {(x, y) for x, y, _ in numbered}
    bytes_of = {id: spelled for token, id in vocab.items() if (spelled := token_bytes(token))}
    single = {id for id, spelled in bytes_of.items() if len(spelled) == 1}
    if not single:
        raise UserError(f"{source}: no token is written in the byte-level alphabet")
    made = {id for _, _, id in numbered}
    tokens = {spelled: id for id, spelled in bytes_of.items() if id in single or id in made}
    if ignore_merges:
        tokens |= {bytes_of[id]: id for token, id in vocab.items() if id in bytes_of and token not in not_text}
        if _every_pair_is_listed(tokens, listed):
            return tokens

    left = first_parts(numbered, single)
    ranks = {spelled: id for spelled, id in tokens.items() if id in single or id in left}
    rest = {spelled: id for spelled, id in tokens.items() if spelled not in ranks}
    if rest:
        # Would the kept ones, after all, arrive at a pair that makes one of these?
        bpe = ByteLevelBPE(ranks, GPT2_PATTERN, source)
        for spelled, id in rest.items():
            end = bpe.merge(spelled)
            is_listed = tuple(end) in listed
            if len(end) == 2 and (ignore_merges or is_listed):
                why = "from a part with a larger id" if is_listed else "which is not a listed pair"
                raise UserError(
                    f"{source}: tiktoken cannot reproduce the merges: it would make token {id} ({spelled!r:.60}) of "
                    f"tokens {end[0]} and {end[1]}, {why}"
                )
    return ranks | rest if ignore_merges else ranks


def numbered_merges(
    merges: Iterable[tuple[str, str]], order: dict[str, int], source: Path, by: str
) -> list[tuple[int, int, int]]:
    """The merges as numbers (left, right, made), checked to make tokens in that order. `order`: of the vocabulary's
    tokens, the rank by which an algorithm merges; `by`: what that rank is, for errors."""
    numbered = []
    last = -1
    for number, (x, y) in enumerate(merges, 1):
        try:
            left, right, made = order[x], order[y], order[x + y]
        except KeyError as error:
            raise UserError(
                f"{source}: merge {number} needs {error.args[0]!r:.60}, which is not in the vocabulary"
            ) from error
        if made < last:
            raise UserError(
                f"{source}: merges out of order: by {by} the token {x + y!r:.60}, which merge {number} makes, comes "
                "before the one that the merge before it makes"
            )
        numbered.append((left, right, made))
        last = made
    return numbered


def _every_pair_is_listed(tokens: dict[bytes, int], listed: set[tuple[int, int]]) -> bool:
    """Whether any two tokens that make a third are a listed merge, so that tiktoken's rule is no other one.

    So it is in Llama 3's tokenizer.json, which was converted from tiktoken: about two merges for each token.
    """
    for spelled in tokens:
        for cut in range(1, len(spelled)):
            x = tokens.get(spelled[:cut])
            if x is not None and (y := tokens.get(spelled[cut:])) is not None and (x, y) not in listed:
                return False
    return True


def first_parts(merges: list[tuple[int, int, int]], single: set[int]) -> dict[int, int]:
    """The tokens that their own bytes merge into, with the left part of their last merge. `single`: those of one byte.

    Tokens arise in the order of their ids, each from smaller ones (a merge with a larger part is passed over). So two
    parts x, y arise and meet unless, before, something merges across the boundary between them. Which two tokens are
    at the boundary is known for every moment: going back in time from [x, y], always the later of the two is undone.
    """
    left: dict[int, int] = {}
    right: dict[int, int] = {}
    made_from: dict[tuple[int, int], int] = {}
    for x, y, made in merges:
        if not ((x in left or x in single) and (y in left or y in single)):
            continue
        at_left, at_right = x, y
        while True:
            undone_left, undone_right = right.get(at_left), left.get(at_right)
            # These two were neighbours until the later one's id; of equal merges the leftmost is first, hence + 1.
            if undone_left is not None and (undone_right is None or at_left > at_right):
                until, at_left = at_left, undone_left
            elif undone_right is not None:
                until, at_right = at_right + 1, undone_right
            else:
                left[made], right[made] = x, y
                made_from[x, y] = made
                break
            if made_from.get((at_left, at_right), until) < until:
                break
    return left
