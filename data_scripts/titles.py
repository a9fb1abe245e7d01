"""Readable made-up film titles: seeded combinations of words, all different."""

from __future__ import annotations

import math

import numpy as np

ADJECTIVES = (
    "Amber", "Ancient", "Bitter", "Blue", "Borrowed", "Brave", "Bright", "Broken", "Burning", "Calm", "Careless",
    "Clever", "Cold", "Common", "Crimson", "Crooked", "Curious", "Dancing", "Daring", "Dark", "Deep", "Distant",
    "Dusty", "Early", "Electric", "Empty", "Endless", "Faithful", "Fallen", "Famous", "Fearless", "Final", "First",
    "Forgotten", "Fragile", "Frozen", "Gentle", "Gilded", "Golden", "Grand", "Green", "Hidden", "Hollow", "Honest",
    "Humble", "Hungry", "Iron", "Last", "Little", "Lonely", "Long", "Lost", "Lucky", "Marble", "Midnight", "Modern",
    "Narrow", "Northern", "Open", "Painted", "Pale", "Patient", "Perfect", "Proud", "Quiet", "Rapid", "Reckless",
    "Restless", "Rising", "Sacred", "Scarlet", "Second", "Secret", "Shining", "Silent", "Silver", "Simple", "Sleeping",
    "Slow", "Southern", "Stolen", "Stubborn", "Sudden", "Sunken", "Sweet", "Tender", "Thirteenth", "Twisted",
    "Unlikely", "Velvet", "Wandering", "Wicked", "Wild", "Winter", "Wooden", "Yellow",
)  # fmt: skip
NOUNS = (
    "Anchor", "Archive", "Arrow", "Bakery", "Ballad", "Bell", "Border", "Bridge", "Cabin", "Candle", "Captain",
    "Caravan", "Castle", "Cathedral", "Circus", "Clock", "Coast", "Comet", "Compass", "Corridor", "Crown", "Dancer",
    "Daughter", "Desert", "Diary", "Doctor", "Empire", "Engine", "Evening", "Ferry", "Field", "Fortune", "Fountain",
    "Garden", "Gate", "Ghost", "Glacier", "Guitar", "Harbour", "Harvest", "Highway", "Horizon", "House", "Hunter",
    "Island", "Journey", "Judge", "Kingdom", "Ladder", "Lantern", "Letter", "Library", "Lighthouse", "Machine", "Map",
    "Market", "Melody", "Messenger", "Mirror", "Mountain", "Museum", "Neighbour", "Night", "Ocean", "Orchard",
    "Orchestra", "Painter", "Palace", "Passage", "Pilot", "Planet", "Promise", "Queen", "Railway", "Rain", "Reef",
    "River", "Road", "Sailor", "Season", "Shadow", "Signal", "Sister", "Snow", "Soldier", "Song", "Station", "Stranger",
    "Summer", "Teacher", "Theatre", "Thief", "Tiger", "Tower", "Traveller", "Valley", "Voyage", "Whisper", "Window",
    "Witness",
)  # fmt: skip
PATTERNS = (
    "The {adjective} {noun}",
    "{adjective} {noun}",
    "{article} {adjective} {noun}",
    "{noun} of the {adjective} {other}",
)


def title_words(count: int, rng: np.random.Generator) -> list[str]:
    """Return ``count`` different titles such as "The Quiet Harbour", in an order drawn from ``rng``.

    The short patterns come first; when all combinations have been used, they start again as "..., Part 2".
    """
    short = 3 * len(ADJECTIVES) * len(NOUNS)
    long = len(ADJECTIVES) * len(NOUNS) * (len(NOUNS) - 1)
    walks = [_walk(short, rng), _walk(long, rng)]
    titles = []
    for number in range(count):
        part, within = divmod(number, short + long)
        is_long = within >= short
        start, step = walks[is_long]
        size, index = (long, within - short) if is_long else (short, within)
        title = _title((start + step * index) % size, is_long)
        titles.append(title if part == 0 else f"{title}, Part {part + 1}")
    return titles


def _walk(size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return start and step of a walk that visits 0..size-1 once each, without holding a permutation of them."""
    step = int(rng.integers(size // 4, size // 2))
    while math.gcd(step, size) != 1:
        step += 1
    return int(rng.integers(size)), step


def _title(position: int, is_long: bool) -> str:
    if not is_long:
        rest, pattern = divmod(position, 3)
        adjective, noun = divmod(rest, len(NOUNS))
        article = "An" if ADJECTIVES[adjective][0] in "AEIOU" else "A"
        return PATTERNS[pattern].format(article=article, adjective=ADJECTIVES[adjective], noun=NOUNS[noun])
    rest, other = divmod(position, len(NOUNS) - 1)
    adjective, noun = divmod(rest, len(NOUNS))
    other += other >= noun  # the same noun twice is no title
    return PATTERNS[3].format(adjective=ADJECTIVES[adjective], noun=NOUNS[noun], other=NOUNS[other])
