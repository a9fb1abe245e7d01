"""The world that the simulated clicks come from: items, users, what they are shown and what they click.

The model, for user u, item i and time t in [0, 1]:

* items belong to niches, niches to genres; ``v_i`` = genre direction + niche direction + noise, unit length;
* ``u_t = (1 - drift t) u_0 + drift t u_1``: taste moves from one mixture of genres and niches towards another;
* exposure: in visits; with probability ``exposure_bias`` a visit's niche is drawn from a softmax over what the
  older recommender believes the user likes (``u_0`` plus noise: it never learns of the drift), otherwise an item is
  drawn from all; items within a niche and over all follow Zipf's law with exponent ``popularity_bias``;
* click: probability ``sigmoid(sharpness <u_t, v_i> + quality_i + intercept)``, the intercept set such that the mean
  over the exposures is ``click_rate``. A user clicks an item at most once.

Reference: the exposure view of implicit feedback: Liang, Charlin, McInerney and Blei (2016), "Modeling User Exposure
in Recommendation"; uniform logs for evaluation: Marlin and Zemel (2009), Schnabel et al. (2016).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kdcore.config import UserError

GROUP = 256  # users that share one random stream; a constant, since the data depend on it
GENRES = (
    "Action", "Adventure", "Animation", "Biography", "Comedy", "Crime", "Documentary", "Drama", "Family", "Fantasy",
    "History", "Horror", "Music", "Mystery", "Nature", "Noir", "Romance", "Science Fiction", "Sport", "Thriller",
    "Travel", "War", "Western",
)  # fmt: skip
AGE_GROUPS = ("18-24", "25-34", "35-44", "45-54", "55-64", "65+")
DEVICES = ("phone", "tablet", "television", "computer")
EPOCH = 1_577_836_800  # 2020-01-01, where the simulated time begins
SPAN = 2 * 365 * 86_400  # seconds: two years
VISIT = 6  # exposures in a visit
EXPOSURES_PER_CLICK = 4.0  # exposures drawn, over those needed at the mean click rate; users differ in theirs
MAX_EXPOSURES = 20_000  # of a user on average: a group of users is drawn at a time, and that is some 100 bytes each
STREAM_ITEMS, STREAM_CALIBRATION, STREAM_USERS, STREAM_UNIFORM = range(4)


@dataclass(frozen=True)
class Simulation:
    """Parameters of the simulation.

    ``interactions_per_user`` mean clicks wanted (5 plus a log-normal, at most a third of the items; users who like
    little of what they are shown stay below); ``dimension`` of the latent factors; ``popularity_bias`` Zipf exponent
    of exposure, 0 (items alike) to 5; ``exposure_bias`` share of visits that the older recommender fills, 0 to 1;
    ``drift`` how far taste has moved at the end of the two simulated years, 0 to 1 (another taste); ``click_rate``
    mean click probability over the biased exposures; ``sharpness`` weight of taste in the log-odds of a click;
    ``uniform_fraction`` rows of the uniform log as a share of the interactions, or ``uniform_log_size`` their number;
    ``ratings`` adds a rating of 1 to 5 to each click. A value out of range raises ``UserError``.

    The defaults leave room between models: with 2,000 users and 1,000 items a linear autoencoder and matrix
    factorisation of 32 or more dimensions find clearly more than 8 dimensions do, and all beat popularity.
    """

    n_users: int = 2000
    n_items: int = 1000
    interactions_per_user: float = 40.0
    dimension: int = 32
    n_genres: int = 12
    popularity_bias: float = 0.7
    exposure_bias: float = 0.5
    drift: float = 0.4
    click_rate: float = 0.2
    sharpness: float = 10.0
    uniform_fraction: float = 0.05
    uniform_log_size: int | None = None
    ratings: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("n_users", 1, 2**31 - 1),
            ("n_items", 2, 2**31 - 1),
            ("interactions_per_user", 1.0, 1e6),
            ("dimension", 1, 4096),
            ("n_genres", 1, len(GENRES)),
            ("popularity_bias", 0.0, 5.0),
            ("exposure_bias", 0.0, 1.0),
            ("drift", 0.0, 1.0),
            ("click_rate", 0.001, 0.999),
            ("sharpness", 0.0, 1000.0),
            ("uniform_fraction", 0.0, 1.0),
            ("seed", 0, 2**63),
        ):
            value = getattr(self, name)
            whole = isinstance(low, int) and isinstance(high, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise UserError(f"{name}: got {value!r}, wanted a {'whole ' if whole else ''}number")
            if not low <= value <= high:
                raise UserError(f"{name}: got {value}, wanted a value from {low} to {high}")
        size = self.uniform_log_size
        if size is not None and (not isinstance(size, int) or size < 0):
            raise UserError(f"uniform_log_size: got {size!r}, wanted a whole number, 0 or more")
        if self.exposures_per_user > MAX_EXPOSURES:
            raise UserError(
                f"interactions_per_user / click_rate: {self.exposures_per_user:.0f} exposures of a user are needed, "
                f"more than {MAX_EXPOSURES}"
            )

    @property
    def exposures_per_user(self) -> float:
        """Mean number of exposures drawn for a user."""
        return EXPOSURES_PER_CLICK * self.interactions_per_user / self.click_rate

    @property
    def uniform_rows(self) -> int:
        """Rows of the uniformly exposed log."""
        if self.uniform_log_size is not None:
            return self.uniform_log_size
        return round(self.uniform_fraction * self.n_users * self.interactions_per_user)


@dataclass(frozen=True)
class World:
    """The items and the directions of taste; everything here grows with the items, nothing with the users."""

    vectors: np.ndarray  # float32 [n_items, D], unit rows
    quality: np.ndarray  # float32 [n_items]
    genre_centres: np.ndarray  # float32 [n_genres, D]
    niche_centres: np.ndarray  # float32 [n_niches, D]
    niche_genre: np.ndarray  # int64 [n_niches]
    all_cdf: np.ndarray  # float64 [n_items], the popularity of items in order of id
    niche_items: np.ndarray  # int32 [n_items], items grouped by niche
    niche_cdf: np.ndarray  # float64 [n_items], within niche k it climbs from k to k + 1
    niche_share: np.ndarray  # float64 [n_niches], the popularity of whole niches
    genre_lists: list[list[str]]
    year: np.ndarray  # int32 [n_items]


@dataclass(frozen=True)
class Group:
    """A group of users: where their taste starts, where it goes, what the old recommender believes."""

    start: np.ndarray  # float32 [U, D]
    end: np.ndarray  # float32 [U, D]
    believed: np.ndarray  # float32 [U, D]
    segment: np.ndarray  # int64 [U], the genre they like most
    interactions: np.ndarray  # int64 [U], wanted clicks
    joined: np.ndarray  # float64 [U], share of the simulated time at which they come
    attributes: dict[str, np.ndarray]


def random_stream(settings: Simulation, stream: int, index: int = 0) -> np.random.Generator:
    """Return the generator of one purpose and, for those that users share, one group of users."""
    return np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(stream, index)))


def _unit(rows: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(rows, axis=-1, keepdims=True)
    return (rows / np.maximum(norm, 1e-12)).astype(np.float32)


def build_world(settings: Simulation) -> World:
    """Draw the items: niches of about 20 items, at least one a genre and at most 1,024, Zipf popularity."""
    rng = random_stream(settings, STREAM_ITEMS)
    n, dimension = settings.n_items, settings.dimension
    n_niches = int(np.clip(n // 20, settings.n_genres, 1024))
    genre_centres = _unit(rng.standard_normal((settings.n_genres, dimension)))
    niche_genre = np.arange(n_niches) % settings.n_genres
    niche_centres = _unit(rng.standard_normal((n_niches, dimension)))
    niche = rng.integers(n_niches, size=n)
    noise = _unit(rng.standard_normal((n, dimension)))
    vectors = _unit(0.6 * genre_centres[niche_genre[niche]] + 1.0 * niche_centres[niche] + 0.5 * noise)
    quality = (0.5 * rng.standard_normal(n)).astype(np.float32)
    # better items tend to be the popular ones, but only tend to
    rank = np.empty(n, dtype=np.int64)
    rank[np.argsort(-(quality + rng.standard_normal(n)))] = np.arange(n)
    popularity = (rank + 1.0) ** -settings.popularity_bias
    popularity /= popularity.sum()
    order = np.argsort(niche, kind="stable")
    share = np.bincount(niche, weights=popularity, minlength=n_niches)
    before = np.cumsum(share) - share
    sorted_niche = niche[order]
    within = (np.cumsum(popularity[order]) - before[sorted_niche]) / share[sorted_niche]
    niche_cdf = sorted_niche + np.clip(within, 0.0, 1.0)
    genre_lists = _genre_lists(settings, rng, niche_genre[niche])
    year = (2020 - np.minimum(rng.exponential(14.0, n), 70.0)).astype(np.int32)
    return World(
        vectors, quality, genre_centres, niche_centres, niche_genre, np.cumsum(popularity), order.astype(np.int32),
        niche_cdf, share, genre_lists, year,
    )  # fmt: skip


def _genre_lists(settings: Simulation, rng: np.random.Generator, main: np.ndarray) -> list[list[str]]:
    """Return one to three genre names of every item, the true one first."""
    extra = rng.integers(settings.n_genres, size=(len(main), 2))
    shown = rng.random((len(main), 2)) < (0.45, 0.2)
    lists = []
    for genre, others, keep in zip(main.tolist(), extra.tolist(), shown.tolist(), strict=True):
        names = dict.fromkeys([genre, *(other for other, kept in zip(others, keep, strict=True) if kept)])
        lists.append([GENRES[name] for name in names])
    return lists


def _tastes(settings: Simulation, world: World, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw tastes, float32 [count, D] unit rows, and the genre each likes most: two genres and five niches, noise."""
    n_niches = len(world.niche_centres)
    genres = rng.integers(settings.n_genres, size=(count, 2))
    # niches are chosen in proportion to a flattened popularity: everybody knows the big ones
    share = np.sqrt(world.niche_share)
    niches = np.searchsorted(np.cumsum(share / share.sum()), rng.random((count, 5)), side="right").clip(0, n_niches - 1)
    weights = np.array([1.0, 0.6], dtype=np.float32)
    taste = 0.6 * np.einsum("k,ukd->ud", weights, world.genre_centres[genres])
    taste += 0.8 * np.einsum("uk,ukd->ud", rng.uniform(0.5, 1.5, (count, 5)), world.niche_centres[niches])
    taste += 0.3 * _unit(rng.standard_normal((count, settings.dimension)))
    return _unit(taste), genres[:, 0]


def draw_group(settings: Simulation, world: World, rng: np.random.Generator, count: int = GROUP) -> Group:
    """Draw the users of a group."""
    start, segment = _tastes(settings, world, rng, count)
    end, _ = _tastes(settings, world, rng, count)
    believed = _unit(start + 0.7 * _unit(rng.standard_normal(start.shape)))
    spread = 0.9
    least = min(5.0, settings.interactions_per_user)
    tail = np.exp(spread * rng.standard_normal(count) - spread**2 / 2)  # mean 1
    counts = least + (settings.interactions_per_user - least) * tail
    interactions = np.clip(np.rint(counts), 1, max(settings.n_items // 3, 1)).astype(np.int64)
    joined = 0.8 * rng.random(count)
    # age follows the favourite genre loosely, so that it says something about taste
    age = (segment * len(AGE_GROUPS) // settings.n_genres + rng.integers(-1, 2, count)).clip(0, len(AGE_GROUPS) - 1)
    attributes = {"age_group": age, "device": rng.integers(len(DEVICES), size=count)}
    return Group(start, end, believed, segment, interactions, joined, attributes)


def _log_odds(
    settings: Simulation, world: World, group: Group, user: np.ndarray, item: np.ndarray, when: np.ndarray
) -> np.ndarray:
    """Return the log-odds of a click before the intercept, float64 [n]; ``when`` is the share of the time, 0 to 1."""
    vectors = world.vectors[item]
    moved = settings.drift * when
    affinity = (1.0 - moved) * np.einsum("nd,nd->n", group.start[user], vectors)
    affinity += moved * np.einsum("nd,nd->n", group.end[user], vectors)
    return settings.sharpness * affinity + world.quality[item]


def _exposures(
    settings: Simulation, world: World, group: Group, rng: np.random.Generator, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw what users are shown: user and item, int64 [n], and share of the time, float64 [n]; by user, then time.

    ``count`` int64 [U] is rounded up to whole visits. A visit that the old recommender fills stays in one niche.
    """
    visits = -(-count // VISIT)
    owner = np.repeat(np.arange(len(visits)), visits)
    when = group.joined[owner] + (1.0 - group.joined[owner]) * rng.random(len(owner))
    when = when[np.lexsort((when, owner))]
    # the old recommender prefers niches near what it believes, among those it has ever seen sell
    scores = 8.0 * group.believed @ world.niche_centres.T + 0.5 * np.log(world.niche_share + 1e-12)
    chance = np.exp(scores - scores.max(axis=1, keepdims=True))
    climb = np.cumsum(chance, axis=1, dtype=np.float64)
    climb = climb / climb[:, -1:] + np.arange(len(climb))[:, None]  # one increasing table for all users
    niche = np.searchsorted(climb.ravel(), owner + rng.random(len(owner)), side="right") - owner * climb.shape[1]
    niche = niche.clip(0, climb.shape[1] - 1)
    recommended = rng.random(len(owner)) < settings.exposure_bias

    user, niche, recommended = (np.repeat(column, VISIT) for column in (owner, niche, recommended))
    position = np.tile(np.arange(VISIT), len(owner))
    where = rng.random(len(user))
    last = settings.n_items - 1
    anything = np.searchsorted(world.all_cdf, where, side="right").clip(0, last)
    within = world.niche_items[np.searchsorted(world.niche_cdf, niche + where, side="right").clip(0, last)]
    item = np.where(recommended, within, anything)
    return user, item, np.repeat(when, VISIT) + position * (45.0 / SPAN)


def calibrate(settings: Simulation, world: World) -> float:
    """Return the intercept that makes the mean click probability over exposures ``click_rate``, by bisection."""
    rng = random_stream(settings, STREAM_CALIBRATION)
    group = draw_group(settings, world, rng)
    user, item, when = _exposures(settings, world, group, rng, np.full(GROUP, 20 * VISIT))
    odds = _log_odds(settings, world, group, user, item, when)
    low, high = -settings.sharpness - 50.0, settings.sharpness + 50.0
    for _ in range(60):
        middle = (low + high) / 2
        if _sigmoid(odds + middle).mean() < settings.click_rate:
            low = middle
        else:
            high = middle
    return low


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x.clip(-60.0, 60.0)))


def draw_clicks(
    settings: Simulation, world: World, group: Group, rng: np.random.Generator, intercept: float
) -> pa.Table:
    """Draw the clicks of a group, sorted by user and time; user_id is the position in the group."""
    shown = np.ceil(group.interactions * EXPOSURES_PER_CLICK / settings.click_rate).astype(np.int64)
    user, item, when = _exposures(settings, world, group, rng, shown)
    odds = _log_odds(settings, world, group, user, item, when) + intercept
    clicked = np.flatnonzero(rng.random(len(odds)) < _sigmoid(odds))
    # the first click on an item counts
    _, first = np.unique(user[clicked] * settings.n_items + item[clicked], return_index=True)
    kept = clicked[np.sort(first)]
    start = np.searchsorted(user[kept], np.arange(len(group.joined)))
    kept = kept[np.arange(len(kept)) - start[user[kept]] < group.interactions[user[kept]]]
    seconds = EPOCH + np.rint(when[kept] * SPAN).astype(np.int64)
    order = np.lexsort((seconds, user[kept]))  # two visits may overlap
    kept, seconds = kept[order], seconds[order]
    columns = {"user_id": user[kept], "item_id": item[kept].astype(np.int64) + 1, "timestamp": seconds}
    if settings.ratings:
        satisfaction = odds[kept] + rng.logistic(size=len(kept))
        columns["rating"] = np.clip(np.rint(3.5 + 0.5 * satisfaction), 1, 5).astype(np.float32)
    return pa.table(columns)


def draw_uniform(
    settings: Simulation, world: World, group: Group, rng: np.random.Generator, count: np.ndarray, intercept: float
) -> pa.Table:
    """Draw uniformly exposed items, ``count`` int64 [U] for each user, and whether they were clicked."""
    user = np.repeat(np.arange(len(count)), count)
    item = rng.integers(settings.n_items, size=len(user))
    when = group.joined[user] + (1.0 - group.joined[user]) * rng.random(len(user))
    odds = _log_odds(settings, world, group, user, item, when) + intercept
    clicked = rng.random(len(odds)) < _sigmoid(odds)
    seconds = EPOCH + np.rint(when * SPAN).astype(np.int64)
    order = np.lexsort((seconds, user))
    columns = {"user_id": user, "item_id": item + 1, "timestamp": seconds, "clicked": clicked}
    return pa.table({name: column[order] for name, column in columns.items()})
