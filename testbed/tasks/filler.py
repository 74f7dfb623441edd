"""Plain sentences about nothing in particular, for contexts of any length.

The sentences are put together from patterns and words written for this project. They hold no digits and none of the words
that the needles are made of, so that what is looked for stands out by its meaning alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

_PATTERNS = (
    "{Someone} walked slowly along the {way} and stopped to look at the {sight}.",
    "{When} the {way} was full of {goods}, and nobody knew who had left them there.",
    "The {sight} could be seen from far away, even when it was {weather} over the {landscape}.",
    "{Someone} had planned to mend the {thing}, but the {weather} afternoon passed with other work.",
    "There was a smell of {smell} near the {place}, and {someone} liked it very much.",
    "{When} {someone} opened the window of the {place} and listened to the {sound}.",
    "It was {weather} for most of the week, so the {goods} were kept in the {place}.",
    "{Someone} liked to tell a long story about a {thing} that had once been lost in the {landscape}.",
    "Behind the {place} a small path leads through the {landscape} to the {sight}.",
    "The noise of {sound} near the {place} was louder than usual, and {someone} went outside to see what had happened.",
    "{Someone} carried a basket of {goods} to the {place} and came home with a {thing}.",
    "Most visitors remember the {sight} and the smell of {smell}, although the view over the {landscape} is far more beautiful.",
    "{When} everybody in the {place} talked about the {weather} season and the price of {goods}.",
    "A {thing} and some {goods} were all that {someone} needed for a day in the {landscape}.",
    "{Someone} said that {goods} are cheapest when it is {weather} outside.",
    "Years ago the {way} was only a track through the {landscape}, and people used it to carry {goods}.",
    "The door of the {place} was painted again {later}, because {someone} disliked the colour.",
    "{Someone} fell asleep beside the {sight} and dreamed of {sound} and {smell}.",
    "If it stays {weather}, {someone} will bring the {goods} down to the {way} {later}.",
    "The old {thing} in the {place} still works, but {someone} has to treat it with patience.",
    "{When} a stranger asked for the {sight}, and {someone} showed him the {way}.",
    "Nobody could explain the sound of {sound} that came from the {landscape} whenever it was {weather}.",
    "{Someone} wrote a letter about the {smell} in the {place} and never received a reply.",
    "Some of the {goods} were given away {later}, because there was no room in the {place}.",
)

_WORDS: dict[str, tuple[str, ...]] = {
    "someone": (
        "the neighbour", "a young painter", "the old gardener", "my aunt", "the miller", "a tired traveller", "the teacher's son",
        "a quiet musician", "the cook", "one of the cousins", "the tailor", "a student of botany", "our guide", "the carpenter",
    ),
    "way": ("lane", "gravel road", "river path", "main street", "footbridge", "stairway", "avenue of limes", "towpath"),
    "sight": (
        "crooked tower", "row of poplars", "waterwheel", "stone arch", "wide meadow", "fountain", "red roof", "chestnut tree",
        "little pond", "weathered statue",
    ),
    "when": (
        "In the morning", "After breakfast", "Towards evening", "During the holidays", "Once in a while", "Before the rain came",
        "On market days", "At the end of the month", "In early spring", "One quiet afternoon", "Long after supper",
    ),
    "goods": (
        "apples", "wool blankets", "wooden chairs", "onions", "baskets", "candles", "cherries", "pumpkins", "clay pots",
        "fresh rolls", "dried herbs", "old newspapers", "walnuts",
    ),
    "weather": ("rainy", "windy", "warm", "foggy", "cloudy", "bitterly cold", "sunny", "mild", "stormy"),
    "thing": (
        "ladder", "wheelbarrow", "fishing rod", "lantern", "sewing machine", "rowing boat", "kettle", "garden bench", "umbrella",
        "bicycle", "copper pan",
    ),
    "smell": ("cut grass", "fresh bread", "wet leaves", "wood smoke", "roses", "warm dust", "orange peel", "sawdust"),
    "place": (
        "bakery", "barn", "village hall", "stable", "greenhouse", "kitchen", "boathouse", "workshop", "cellar", "market hall",
        "inn",
    ),
    "sound": ("church bells", "laughter", "dripping water", "hammering", "birdsong", "distant thunder", "barking dogs"),
    "landscape": ("forest", "hills", "vineyards", "marshes", "orchards", "fields", "dunes", "valley", "heath"),
    "later": ("a few weeks later", "in the autumn", "the next day", "soon afterwards", "before winter", "in due course"),
}  # fmt: skip

#: Short sentences of different lengths, for the last few tokens of a context.
SHORT = (
    "It rained.", "Nobody answered.", "The tea was cold.", "Then it grew dark.", "The cat slept by the stove.",
    "A dog barked somewhere.", "The leaves had begun to fall.", "Everyone went home.", "The snow melted early that year.",
    "Someone laughed.", "The soup was too salty.", "There was no wind at all.", "They waited.", "A window stood open.",
)  # fmt: skip

_SLOT = re.compile(r"\{(\w+)\}")


def filler(rng: random.Random) -> Iterator[str]:
    """Sentences without end, in an order that `rng` draws; none comes twice within several thousand."""
    seen: set[str] = set()
    while True:
        patterns = list(_PATTERNS)
        rng.shuffle(patterns)
        for pattern in patterns:
            for _ in range(20):
                sentence = _SLOT.sub(lambda slot: _word(slot[1], rng), pattern)
                if sentence not in seen:
                    break
            seen.add(sentence)
            yield sentence


def _word(slot: str, rng: random.Random) -> str:
    word = rng.choice(_WORDS[slot.lower()])
    return word[0].upper() + word[1:] if slot[0].isupper() else word
