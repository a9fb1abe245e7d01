"""The embedded default data set: clicks of simulated users, with the biases a real log has.

Who likes what is a latent-factor model (``latent_world`` states it); what is clicked depends on what was shown, and
what was shown depends on popularity and on the taste an older recommender had recorded. So the log has the two biases
that off-line evaluation suffers from, and a small log of uniformly random exposures shows them. ``dataset.json`` says
that the data are simulated.

Users are written a block at a time, which bounds memory. Random numbers belong to fixed groups of users, never to a
block, so that the data do not depend on the block size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from apps.recsys.data.dataset import Dataset
from data_scripts.entry import Entry
from data_scripts.latent_world import (
    AGE_GROUPS,
    DEVICES,
    GROUP,
    STREAM_ITEMS,
    STREAM_UNIFORM,
    STREAM_USERS,
    Simulation,
    World,
    build_world,
    calibrate,
    draw_clicks,
    draw_group,
    draw_uniform,
    random_stream,
)
from data_scripts.names import nearest
from data_scripts.prepared import is_prepared, preparing
from data_scripts.titles import title_words
from kdcore.config import UserError

VERSION = 1  # of the generator: raised when the same parameters give other data


def simulate(out: Path, *, block_users: int = 8192, progress: bool = False, **parameters: Any) -> Path:
    """Write a simulated data set to the folder ``out`` and return it; complete output of the same parameters is kept.

    Files: ``interactions.parquet`` (user_id, item_id, timestamp in seconds, rating if asked for), ``items.parquet``
    (item_id, title, genres, year), ``users.parquet`` (user_id, age_group, device), ``uniform.parquet`` (user_id,
    item_id, timestamp, clicked: items shown uniformly at random) and ``dataset.json`` with ``"simulated": true`` and
    every parameter. ``load_dataset`` reads the folder.

    Options:
        block_users: users written at a time, which bounds memory; the data do not depend on it.
        progress: shows a bar.
        parameters: fields of ``Simulation``, such as ``n_users``, ``n_items`` and ``seed``.

    Raises:
        UserError: a parameter is unknown or out of range, or ``out`` holds something that is not a prepared data set.
    """
    settings = simulation(parameters)
    if block_users < 1:
        raise UserError(f"block_users: got {block_users}, wanted 1 or more")
    record: dict[str, Any] = {"name": "simulated", "simulated": True, "generator_version": VERSION}
    record["parameters"] = asdict(settings)
    if not is_prepared(out, record):
        with preparing(out, record) as (folder, details):
            world = build_world(settings)
            pq.write_table(_item_table(settings, world), folder / "items.parquet")
            details["uniform"] = _write_users(settings, world, folder, block_users, progress)
            details.update(_describe(folder))
    return Path(out)


def simulation(parameters: Mapping[str, Any]) -> Simulation:
    """Return the parameters as a ``Simulation``; raise ``UserError`` for a name that is not one of its fields."""
    known = [field.name for field in fields(Simulation)]
    for name in parameters:
        if name not in known:
            raise UserError(f"the simulation has no parameter {name!r}{nearest(name, known)}")
    return Simulation(**parameters)


def prepare(out: Path, source: Path | None, options: Mapping[str, Any]) -> Path:
    """Simulate from the catalogue: the options are the parameters, and there is nothing to read them from."""
    if source is not None:
        raise UserError("simulated: is made, not read; --from does not apply")
    return simulate(out, **{"progress": True, **options})


def _item_table(settings: Simulation, world: World) -> pa.Table:
    words = title_words(settings.n_items, random_stream(settings, STREAM_ITEMS, 1))
    titles = [f"{words_} ({year})" for words_, year in zip(words, world.year.tolist(), strict=True)]
    return pa.table(
        {
            "item_id": pa.array(np.arange(1, settings.n_items + 1, dtype=np.int64)),
            "title": pa.array(titles, pa.string()),
            "genres": pa.array(world.genre_lists, pa.list_(pa.string())),
            "year": pa.array(world.year),
        }
    )


def _groups(settings: Simulation, world: World, intercept: float) -> Iterator[tuple[int, dict[str, pa.Table]]]:
    """Yield for each group of users its size and its rows of the three files that grow with the users."""
    rows, n = settings.uniform_rows, settings.n_users
    for index, first in enumerate(range(0, n, GROUP)):
        size = min(GROUP, n - first)
        rng = random_stream(settings, STREAM_USERS, index)
        group = draw_group(settings, world, rng)
        clicks = draw_clicks(settings, world, group, rng, intercept)
        # the uniform rows are spread evenly over the users, so that their number is exact
        bounds = [(first + offset) * rows // n for offset in range(size + 1)]
        count = np.zeros(GROUP, dtype=np.int64)
        count[:size] = np.diff(bounds)
        uniform = draw_uniform(settings, world, group, random_stream(settings, STREAM_UNIFORM, index), count, intercept)
        user_id = np.arange(first + 1, first + size + 1, dtype=np.int64)
        users = {"user_id": user_id}
        for name, names in (("age_group", AGE_GROUPS), ("device", DEVICES)):
            users[name] = pa.array(np.array(names, dtype=object)[group.attributes[name][:size]], pa.string())
        yield (
            size,
            {
                "interactions": _number_users(clicks, first, size),
                "uniform": _number_users(uniform, first, size),
                "users": pa.table(users),
            },
        )


def _number_users(table: pa.Table, first: int, size: int) -> pa.Table:
    """Turn positions in the group into user ids; a last group that is not full loses its surplus users."""
    local = table.column("user_id").to_numpy()
    table = table.slice(0, int(np.searchsorted(local, size)))
    return table.set_column(0, "user_id", pa.array(local[: len(table)] + first + 1))


def _write_users(settings: Simulation, world: World, folder: Path, block_users: int, progress: bool) -> int:
    """Write the three files that grow with the users, a block of users at a time; return the rows of uniform."""
    groups = _groups(settings, world, calibrate(settings, world))
    total = -(-settings.n_users // GROUP)
    if progress:
        console = Console(stderr=True)
        groups = iter(track(groups, "Simulating users", total, console=console, disable=not console.is_terminal))
    uniform_rows = pending = 0
    waiting: dict[str, list[pa.Table]] = {}
    with ExitStack() as stack:
        writers: dict[str, pq.ParquetWriter] = {}
        for number, (size, tables) in enumerate(groups, start=1):
            pending += size
            for name, table in tables.items():
                waiting.setdefault(name, []).append(table)
            if pending < block_users and number < total:
                continue
            uniform_rows += sum(len(table) for table in waiting["uniform"])
            for name, parts in waiting.items():
                block = pa.concat_tables(parts)
                if name not in writers:
                    writers[name] = stack.enter_context(pq.ParquetWriter(folder / f"{name}.parquet", block.schema))
                writers[name].write_table(block)
            waiting.clear()
            pending = 0
    return uniform_rows


def _describe(folder: Path) -> dict[str, Any]:
    """Return what ``dataset.json`` says of every prepared data set: counts and the fingerprint of the content.

    The columns are laid out in files and mapped, so that a log larger than memory has its fingerprint, too.
    """
    log = pq.ParquetFile(folder / "interactions.parquet")
    if not log.metadata.num_rows:
        raise UserError("the simulation gave no interactions; raise n_users, interactions_per_user or click_rate")
    kinds = {"user_id": np.int32, "item_id": np.int32, "timestamp": np.float64, "rating": np.float32}
    kinds = {name: kind for name, kind in kinds.items() if name in log.schema_arrow.names}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(Path(scratch) / name, "wb")) for name in kinds}
            for batch in log.iter_batches(batch_size=1 << 18):
                for name, kind in kinds.items():
                    column = batch.column(name).to_numpy() - (1 if name.endswith("_id") else 0)
                    column.astype(kind).tofile(files[name])
        columns = {
            name: np.memmap(Path(scratch) / name, dtype=kind, mode="r", shape=(log.metadata.num_rows,))
            for name, kind in kinds.items()
        }
        users, items = (pq.read_table(folder / f"{side}.parquet").combine_chunks() for side in ("users", "items"))
        dataset = Dataset(
            name="simulated",
            user=columns["user_id"],
            item=columns["item_id"],
            timestamp=columns["timestamp"],
            rating=columns.get("rating"),
            user_ids=users.column(0).chunk(0),
            item_ids=items.column(0).chunk(0),
            user_features=users.drop_columns(["user_id"]),
            item_features=items.drop_columns(["item_id"]),
            has_timestamp=True,
            dropped={},
        )
        return {
            "users": dataset.n_users,
            "items": dataset.n_items,
            "interactions": len(dataset),
            "has_timestamp": True,
            "dropped": {},
            "fingerprint": dataset.fingerprint,
        }


ENTRIES = (
    Entry(
        name="simulated",
        what="clicks of simulated users with popularity and exposure bias, drift and a uniformly exposed log",
        size="2,000 users, 1,000 items, 78 thousand clicks; any other size by kd data simulate interactions",
        licence="made on this machine, free of any licence",
        citation="none: the model is stated in data_scripts/latent_world.py",
        url="",
        prepare=prepare,
        simulated=True,
    ),
)
