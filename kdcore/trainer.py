"""The one training loop: Lightning Fabric, early stopping, exact resume, several processes.

What is trained is a ``TeachingStep``: a module that holds the student and the losses that teach it, and whose
forward pass returns *sums* of loss terms. The trainer divides by the number of items the whole global batch holds,
so one process, two processes and accumulated batches give the same gradient.

Resume is exact on a CPU: batches are a function of seed and epoch, and everything else that moves (weights,
optimiser, random state, early stopping) stands in the checkpoint. A run killed at any moment and started again ends
with the same bits as one that was never killed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcore.checkpoint import load_state, save_state
from kdcore.progress import EpochProgress
from kdcore.run import EventLog

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TrainerConfig:
    """How a student is trained; what it learns is the teaching step's business."""

    max_epochs: int = 100
    # stop after this many validations without improvement; 0 never stops early
    patience: int = 10
    # the validation metric that decides which weights are kept, and its direction
    monitor: str = "ndcg@10"
    mode: str = "max"
    validate_every: int = 1
    # largest norm of the gradient; 0 leaves it alone
    gradient_clip: float = 0.0
    # batches whose gradients are added up before one update
    accumulate: int = 1
    # Fabric's names: 32-true, bf16-mixed, ...
    precision: str = "32-true"
    accelerator: str = "auto"
    # CPU threads; 0 leaves torch's choice
    threads: int = 0
    # at most this many seconds of work are lost when the process is killed
    checkpoint_seconds: float = 30.0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("max_epochs", "validate_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}: got {getattr(self, name)}, wanted at least 1")
        if self.mode not in ("max", "min"):
            raise ValueError(f"trainer.mode: got {self.mode!r}, wanted 'max' or 'min'")
        for name in ("patience", "gradient_clip", "threads", "checkpoint_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"trainer.{name}: got {getattr(self, name)}, wanted 0 or more")


class TeachingStep(nn.Module):
    """What the trainer trains: a student and the losses that teach it.

    A subclass sets ``weights`` (term name -> weight) and defines the methods below. State that ``begin_epoch``
    computes from the model must live in registered buffers: a resumed run does not compute it again.
    """

    student: nn.Module
    weights: Mapping[str, float]

    def optimizer(self) -> torch.optim.Optimizer:
        """Return a fresh optimiser over this module's parameters."""
        raise TypeError(f"{type(self).__name__} does not define optimizer()")

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Prepare an epoch (refresh ranks, anneal a temperature); called once an epoch, not again on resume."""

    def batches(self, epoch: int, generator: torch.Generator) -> Iterable[Batch]:
        """Yield the global batches of an epoch, a function of the generator alone."""
        raise TypeError(f"{type(self).__name__} does not define batches()")

    def batch_count(self) -> int:
        """Return the number of batches of an epoch."""
        raise TypeError(f"{type(self).__name__} does not define batch_count()")

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Return how many valid items each loss term sums over in a batch."""
        raise TypeError(f"{type(self).__name__} does not define counts()")

    def shard(self, batch: Batch, rank: int, world_size: int) -> Batch:
        """Return this process's part of a global batch: every ``world_size``-th row of every tensor."""
        return {name: rows[rank::world_size] for name, rows in batch.items()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the *sum* of every loss term over the batch's valid items."""
        raise TypeError(f"{type(self).__name__} does not define forward()")

    def validate(self) -> dict[str, float]:
        """Return the validation metrics of the student as it is now."""
        raise TypeError(f"{type(self).__name__} does not define validate()")


@dataclass
class FitResult:
    """What came of a training run; the student holds its best weights."""

    best_epoch: int = -1
    best_metrics: dict[str, float] = field(default_factory=dict)
    epochs: int = 0
    steps: int = 0
    # wall and CPU seconds spent in training and validation, over all starts of a resumed run
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass
class _Progress:
    """Where training stands: saved with every checkpoint."""

    epoch: int = 0
    batch: int = 0
    done: bool = False
    since_best: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    log_position: int = 0
    result: FitResult = field(default_factory=FitResult)


def make_fabric(config: TrainerConfig) -> Fabric:
    """Return a launched Fabric: one process, or as many as torchrun started (gloo on CPU, NCCL on GPUs)."""
    from lightning_fabric import Fabric

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // local
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=local,
        num_nodes=nodes,
        strategy="ddp" if local * nodes > 1 else "auto",
        precision=config.precision,
    )
    fabric.launch()
    return fabric


class Trainer:
    """Trains a teaching step; see the module's text for what it guarantees.

    ``folder`` takes ``last.safetensors`` (everything needed to go on), ``best.safetensors`` (the student's best
    weights), ``log.jsonl`` (one line an epoch, with ``context`` in each) and TensorBoard's files. ``key`` names the
    data, configuration and seed, so that a checkpoint of another run is never continued.
    """

    def __init__(
        self,
        config: TrainerConfig,
        *,
        seed: int,
        folder: str | os.PathLike[str] | None = None,
        key: str = "",
        context: Mapping[str, Any] | None = None,
        fabric: Fabric | None = None,
        description: str = "training",
    ) -> None:
        self.config = config
        self.seed = seed
        self.folder = Path(folder) if folder is not None else None
        self.key = key
        self.log = EventLog(self.folder / "log.jsonl", context) if self.folder is not None else None
        self.fabric = fabric if fabric is not None else make_fabric(config)
        self.description = description
        self._best: dict[str, Tensor] = {}
        self._last_save = time.monotonic()

    def fit(self, step: TeachingStep) -> FitResult:
        """Train until the epochs or the patience run out; leave the best weights in ``step.student``.

        Raises FloatingPointError, naming term and epoch, when a loss is no longer finite.
        """
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        torch.manual_seed(self.seed + 7919 * self.fabric.global_rank)
        progress = _Progress()
        module, optimizer = self.fabric.setup(step, step.optimizer())
        self._resume(step, optimizer, progress)
        started = time.perf_counter(), time.process_time()
        before = progress.result.seconds, progress.result.cpu_seconds
        writer = self._summary_writer()

        def clock() -> None:
            progress.result.seconds = before[0] + time.perf_counter() - started[0]
            progress.result.cpu_seconds = before[1] + time.process_time() - started[1]

        with EpochProgress(
            self.description, self.config.max_epochs, step.batch_count(), enabled=self.fabric.is_global_zero
        ) as bar:
            while not progress.done:
                self._epoch(module, step, optimizer, progress, bar, clock)
                clock()
                self._finish_epoch(step, progress, bar, writer)
                clock()
                self._save(step, optimizer, progress, force=progress.done)
        if writer is not None:
            writer.close()
        step.student.load_state_dict(self._best)
        return progress.result

    def _generator(self, epoch: int, stream: int) -> torch.Generator:
        """Return the generator of an epoch: the same for every process, independent of what ran before."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 2 + stream)

    def _epoch(
        self,
        module: nn.Module,
        step: TeachingStep,
        optimizer: torch.optim.Optimizer,
        progress: _Progress,
        bar: EpochProgress,
        clock: Any,
    ) -> None:
        if progress.batch == 0:
            step.train()
            step.begin_epoch(progress.epoch, self._generator(progress.epoch, 1))
            progress.sums = {}
        batches = iter(step.batches(progress.epoch, self._generator(progress.epoch, 0)))
        for _ in islice(batches, progress.batch):  # resumed inside an epoch: pass over what was learned already
            pass
        bar.begin_epoch(progress.epoch, progress.batch)
        step.train()
        while group := list(islice(batches, self.config.accumulate)):
            terms = self._update(module, step, optimizer, group)
            for name, value in terms.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + value * len(group)
            progress.batch += len(group)
            progress.result.steps += 1
            bar.advance(len(group), {name: total / progress.batch for name, total in progress.sums.items()})
            if time.monotonic() - self._last_save >= self.config.checkpoint_seconds:
                clock()
                self._save(step, optimizer, progress)

    def _update(
        self, module: nn.Module, step: TeachingStep, optimizer: torch.optim.Optimizer, group: list[Batch]
    ) -> dict[str, float]:
        """Make one update from a group of global batches and return the mean of every term."""
        world = self.fabric.world_size
        totals: dict[str, int] = {}
        for batch in group:
            for name, count in step.counts(batch).items():
                totals[name] = totals.get(name, 0) + count
        means: dict[str, Tensor] = {}
        optimizer.zero_grad()
        for index, batch in enumerate(group):
            local = batch if world == 1 else step.shard(batch, self.fabric.global_rank, world)
            local = {name: rows.to(self.fabric.device) for name, rows in local.items()}
            syncing = index == len(group) - 1
            with self.fabric.no_backward_sync(module, enabled=not syncing and world > 1):
                terms = {name: value / max(totals[name], 1) for name, value in module(local).items()}
                # DDP averages gradients over processes; each holds its share of a global mean, so scale back up
                loss = torch.stack([terms[name] * step.weights[name] for name in terms]).sum() * world
                self.fabric.backward(loss)
            for name, value in terms.items():
                means[name] = means.get(name, torch.zeros((), device=value.device)) + value.detach()
        if self.config.gradient_clip:
            self.fabric.clip_gradients(module, optimizer, max_norm=self.config.gradient_clip)
        optimizer.step()
        if world > 1:
            means = {name: self.fabric.all_reduce(value, reduce_op="sum") for name, value in means.items()}
        values = {name: float(value) for name, value in means.items()}
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise FloatingPointError(f"{self.description}: loss term {broken[0]!r} became {values[broken[0]]}")
        return values

    def _finish_epoch(self, step: TeachingStep, progress: _Progress, bar: EpochProgress, writer: Any) -> None:
        """Validate, keep the best weights, decide whether to stop, and write the log."""
        config, result = self.config, progress.result
        terms = {name: total / max(progress.batch, 1) for name, total in progress.sums.items()}
        progress.epoch += 1
        progress.batch = 0
        result.epochs = progress.epoch
        validation: dict[str, float] = {}
        if progress.epoch % config.validate_every == 0 or progress.epoch == config.max_epochs:
            validation = self._validate(step)
            if config.monitor not in validation:
                raise ValueError(f"trainer.monitor: got {config.monitor!r}, wanted one of {', '.join(validation)}")
            if self._better(validation[config.monitor], result.best_metrics):
                result.best_metrics, result.best_epoch = validation, progress.epoch - 1
                self._best = {name: value.detach().clone() for name, value in step.student.state_dict().items()}
                progress.since_best = 0
            else:
                progress.since_best += 1
        stopped = config.patience and progress.since_best >= config.patience
        progress.done = progress.epoch >= config.max_epochs or bool(stopped)
        bar.end_epoch(terms, validation, result.best_metrics.get(config.monitor))
        if self.log is not None and self.fabric.is_global_zero:
            self.log.write(
                "epoch",
                epoch=progress.epoch - 1,
                step=result.steps,
                terms={name: round(value, 6) for name, value in terms.items()},
                validation={name: round(value, 6) for name, value in validation.items()},
            )
            progress.log_position = self.log.position()
        if writer is not None:
            for group, values in (("loss", terms), ("validation", validation)):
                for name, value in values.items():
                    writer.add_scalar(f"{group}/{name.replace('@', '_at_')}", value, progress.epoch - 1)

    def _validate(self, step: TeachingStep) -> dict[str, float]:
        """Validate on the first process and tell the others."""
        metrics: dict[str, float] | None = None
        if self.fabric.is_global_zero:
            step.eval()
            with torch.no_grad():
                metrics = step.validate()
            step.train()
        return self.fabric.broadcast(metrics) if self.fabric.world_size > 1 else metrics or {}

    def _better(self, value: float, best: Mapping[str, float]) -> bool:
        if not math.isfinite(value):
            raise FloatingPointError(f"{self.description}: validation {self.config.monitor} became {value}")
        if not best:
            return True
        reference = best[self.config.monitor]
        return value > reference if self.config.mode == "max" else value < reference

    def _summary_writer(self) -> Any:
        if not (self.config.tensorboard and self.folder is not None and self.fabric.is_global_zero):
            return None
        from torch.utils.tensorboard import SummaryWriter  # seconds to import: only when it is asked for

        return SummaryWriter(str(self.folder / "tensorboard"))

    def _save(
        self, step: TeachingStep, optimizer: torch.optim.Optimizer, progress: _Progress, force: bool = False
    ) -> None:
        """Write the best weights, then the state that refers to them."""
        due = force or time.monotonic() - self._last_save >= self.config.checkpoint_seconds
        if self.fabric.world_size > 1:
            due = self.fabric.broadcast(due)  # clocks differ; every process must take part or none
        if self.folder is None or not due:
            return
        random_state = _random_state(self.fabric)
        if self.fabric.is_global_zero:
            if self._best:
                save_state(self.folder / "best.safetensors", {"epoch": progress.result.best_epoch, "model": self._best})
            state = {
                "key": self.key,
                "progress": {**vars(progress), "result": vars(progress.result)},
                "module": step.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random": random_state,
            }
            save_state(self.folder / "last.safetensors", state)
        self._last_save = time.monotonic()
        self.fabric.barrier()

    def _resume(self, step: TeachingStep, optimizer: torch.optim.Optimizer, progress: _Progress) -> None:
        """Load the last checkpoint, if there is one of this very run, and cut the log back to it."""
        file = self.folder / "last.safetensors" if self.folder is not None else None
        state = load_state(file) if file is not None and file.exists() else None
        if state is not None and state["key"] == self.key:
            step.load_state_dict(state["module"])
            optimizer.load_state_dict(state["optimizer"])
            saved = dict(state["progress"])
            progress.result = FitResult(**saved.pop("result"))
            for name, value in saved.items():
                setattr(progress, name, value)
            if progress.result.best_epoch >= 0:
                self._best = load_state(self.folder / "best.safetensors")["model"]  # type: ignore[operator]
            _set_random_state(self.fabric, state["random"])
        if self.log is not None and self.fabric.is_global_zero:
            self.log.truncate(progress.log_position)


def _random_state(fabric: Fabric) -> dict[str, Tensor]:
    """Return the random states of all processes, one row each."""
    state = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(fabric.device)
    if fabric.world_size == 1:
        return {name: value[None] for name, value in state.items()}
    gathered = {name: fabric.all_gather(value) for name, value in state.items()}
    return {name: value.cpu() for name, value in gathered.items()}


def _set_random_state(fabric: Fabric, state: Mapping[str, Tensor]) -> None:
    """Restore this process's random state; with another number of processes there is none to restore."""
    if len(state["cpu"]) != fabric.world_size:
        return
    torch.set_rng_state(state["cpu"][fabric.global_rank].contiguous())
    if "cuda" in state and fabric.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][fabric.global_rank].contiguous(), fabric.device)


def iterate_rows(order: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield consecutive slices of ``order`` int64 [n] of ``batch_size`` rows, the last one shorter."""
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
