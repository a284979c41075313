"""Texts as a figure's labels."""

from collections.abc import Sequence
from itertools import chain, count

from matplotlib import font_manager

from elo.common.terminal import note


class Labels:
    """Texts of others as labels: no mathematics in dollars, and no boxes where no font has a character.

    Long ones are cut in their middle. What is different stays different, by a number if nothing else is left.
    """

    def __init__(self, fonts: Sequence[str]) -> None:
        self.known = set().union(*(font_manager.get_font(font_manager.findfont(name)).get_charmap() for name in fonts))
        self.unknown: set[str] = set()
        self.shown: dict[str, str] = {}  # each text's label

    def __call__(self, text: str) -> str:
        if text not in self.shown:
            first = self._label(text)
            later = (f"{first} ({number})" for number in count(2))
            self.shown[text] = next(label for label in chain([first], later) if label not in self.shown.values())
        return self.shown[text]

    def _label(self, text: str) -> str:
        unknown = {character for character in text if ord(character) not in self.known and not character.isspace()}
        self.unknown |= unknown
        shown = "".join("?" if character in unknown else character for character in " ".join(text.split()))
        return (shown if len(shown) <= 48 else shown[:22] + "..." + shown[-23:]).replace("$", r"\$")

    def complain(self) -> None:
        if self.unknown:
            missing = "".join(sorted(self.unknown)[:10])
            note(f"no installed font has {missing}, drawn as ?; one that has: Noto Sans CJK")
