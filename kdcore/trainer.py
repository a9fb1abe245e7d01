"""The one training loop: Lightning Fabric, early stopping, exact resume, several processes.

What is trained is a ``TeachingStep``: a module that holds the student and the losses that teach it, and whose
forward pass returns *sums* of loss terms. The trainer divides by the number of items the whole global batch holds,
so one process, two processes and accumulated batches give the same gradient.

Resume is exact on a CPU: batches are a function of seed and epoch, and everything else that moves (weights,
optimiser, random state, early stopping) stands in the checkpoint. A run killed at any moment and started again ends
with the same bits as one that was never killed. One atomic rename decides between two checkpoints: the best weights
stand in the checkpoint that first refers to them, and in a file of their own only after it.
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

from kdcore import processes
from kdcore.checkpoint import Checkpoints, random_states, set_random_state
from kdcore.config import UserError
from kdcore.progress import EpochProgress, stderr_console
from kdcore.run import EventLog
from kdcore.trainer_config import TrainerConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer

Batch = dict[str, Tensor]


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
    # wall and CPU seconds spent in training and validation, over all starts of a resumed run; CPU of all processes
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
    """Return a launched Fabric: one process, or as many as torchrun started (gloo on CPU, NCCL on GPUs).

    Raises UserError if the machine lacks what ``accelerator`` asks for.
    """
    from lightning_fabric import Fabric

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = processes.world_size()
    processes.connect()
    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=local,
            num_nodes=world // local,
            strategy="ddp" if world > 1 else "auto",
            precision=config.precision,
        )
        fabric.launch()
    except RuntimeError as error:  # Fabric's misconfigurations are RuntimeErrors
        reason = " ".join(str(error).split())
        raise UserError(f"trainer.accelerator {config.accelerator} with {local} processes: {reason}") from None
    return fabric


@dataclass
class _Training:
    """What moves while a step is trained, and what watches it."""

    step: TeachingStep
    module: _FabricModule
    optimizer: _FabricOptimizer
    progress: _Progress
    # the clocks (wall, CPU) when this start of the run began, and what earlier starts took
    began: tuple[float, float] = (0.0, 0.0)
    before: tuple[float, float] = (0.0, 0.0)
    # the student's best weights, and whether no checkpoint holds them yet
    best: dict[str, Tensor] = field(default_factory=dict)
    best_is_new: bool = False
    last_save: float = field(default_factory=time.monotonic)
    writer: Any = None

    def start_clock(self) -> None:
        """Count seconds on from those of earlier starts."""
        self.began = time.perf_counter(), time.process_time()
        self.before = self.progress.result.seconds, self.progress.result.cpu_seconds

    def read_clock(self, *, together: bool) -> None:
        """Note the seconds so far; those of CPUs are of all processes that train ``together`` and all call this."""
        result, own = self.progress.result, time.process_time() - self.began[1]
        result.seconds = self.before[0] + time.perf_counter() - self.began[0]
        result.cpu_seconds = self.before[1] + (processes.total(own) if together else own)


class Trainer:
    """Trains a teaching step; see the module's text for what it guarantees.

    ``folder`` takes ``last.safetensors`` (everything needed to go on), ``best.safetensors`` (the student's best
    weights), ``log.jsonl`` (one line an epoch, with ``context`` in each) and TensorBoard's files. ``key`` names the
    data, configuration and seed: a checkpoint of another key is never continued, it is thrown away with a notice.
    ``quiet`` shows no progress.
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
        quiet: bool = False,
    ) -> None:
        self.config = config
        self.seed = seed
        self.folder = Path(folder) if folder is not None else None
        self.checkpoints = Checkpoints(self.folder, key) if self.folder is not None else None
        self.log = EventLog(self.folder / "log.jsonl", context) if self.folder is not None else None
        self.fabric = fabric if fabric is not None else make_fabric(config)
        self.description = description
        self.quiet = quiet

    def fit(self, step: TeachingStep) -> FitResult:
        """Train until the epochs or the patience run out; leave the best weights in ``step.student``.

        A run that is done already loads its best weights and trains no more.

        Raises:
            FloatingPointError: a loss, the gradient or the monitored metric is no longer finite; the text says which
                and when.
            UserError: the checkpoint is damaged or of another model, or ``monitor`` is no validation metric.
        """
        threads = torch.get_num_threads()
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        try:
            return self._fit(step)
        finally:
            torch.set_num_threads(threads)

    def _fit(self, step: TeachingStep) -> FitResult:
        torch.manual_seed(self.seed + 7919 * self.fabric.global_rank)
        module, optimizer = self.fabric.setup(step, step.optimizer())
        training = _Training(step, module, optimizer, _Progress())
        self._resume(training)
        progress, batches = training.progress, step.batch_count()
        training.start_clock()
        if not progress.done:
            training.writer = self._summary_writer(progress.epoch)
        with EpochProgress(
            self.description,
            self.config.max_epochs,
            batches,
            start=progress.epoch * batches + progress.batch,
            enabled=self.fabric.is_global_zero and not self.quiet,
        ) as bar:
            while not progress.done:
                self._epoch(training, bar)
                self._finish_epoch(training, bar)
                due = progress.done or self._due(training)
                # clocks differ, but every process that trains with this one must take part in a checkpoint, or none
                if due if self.fabric.world_size == 1 else processes.agree(due):
                    self._save(training)
        if training.writer is not None:
            training.writer.close()
        step.student.load_state_dict(training.best)
        return progress.result

    def _generator(self, epoch: int, stream: int) -> torch.Generator:
        """Return the generator of an epoch: the same for every process, independent of what ran before."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 2 + stream)

    def _epoch(self, training: _Training, bar: EpochProgress) -> None:
        step, progress = training.step, training.progress
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
            terms, due = self._update(training, group)
            for name, value in terms.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + value * len(group)
            progress.batch += len(group)
            progress.result.steps += 1
            bar.advance(len(group), {name: total / progress.batch for name, total in progress.sums.items()})
            if due:
                self._save(training)

    def _update(self, training: _Training, group: list[Batch]) -> tuple[dict[str, float], bool]:
        """Make one update from a group of global batches; return the mean of every term and if a checkpoint is due."""
        step, module, world = training.step, training.module, self.fabric.world_size
        totals: dict[str, int] = {}
        for batch in group:
            for name, count in step.counts(batch).items():
                totals[name] = totals.get(name, 0) + count
        means: dict[str, Tensor] = {}
        training.optimizer.zero_grad()
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
                means[name] = means[name] + value.detach() if name in means else value.detach()
        values, due = self._reduce(training, means)
        where = f"in epoch {training.progress.epoch}, step {training.progress.result.steps}"
        for name, number in values.items():
            if not math.isfinite(number):
                raise FloatingPointError(f"{self.description}: loss term {name!r} became {number} {where}")
        if self.config.gradient_clip:
            norm = self.fabric.clip_gradients(
                module, training.optimizer, max_norm=self.config.gradient_clip, error_if_nonfinite=False
            )
            if norm is not None and not bool(torch.isfinite(norm)):
                raise FloatingPointError(f"{self.description}: the gradient's norm became {float(norm)} {where}")
        training.optimizer.step()
        return values, due

    def _due(self, training: _Training) -> bool:
        """Return whether the first process wants a checkpoint."""
        waited = time.monotonic() - training.last_save
        return self.folder is not None and self.fabric.is_global_zero and waited >= self.config.checkpoint_seconds

    def _reduce(self, training: _Training, means: Mapping[str, Tensor]) -> tuple[dict[str, float], bool]:
        """Add up the terms over all processes; the first one's wish for a checkpoint travels with them."""
        values = list(means.values())
        packed = torch.stack([*values, values[0].new_tensor(float(self._due(training)))])
        if self.fabric.world_size > 1:
            torch.distributed.all_reduce(packed)
        *numbers, due = packed.tolist()
        return dict(zip(means, numbers, strict=True)), bool(due)

    def _finish_epoch(self, training: _Training, bar: EpochProgress) -> None:
        """Validate, keep the best weights, decide whether to stop, and write the log."""
        config, progress = self.config, training.progress
        result = progress.result
        terms = {name: total / max(progress.batch, 1) for name, total in progress.sums.items()}
        progress.epoch += 1
        progress.batch = 0
        result.epochs = progress.epoch
        validation: dict[str, float] = {}
        if progress.epoch % config.validate_every == 0 or progress.epoch == config.max_epochs:
            validation = self._validate(training.step)
            if self._better(validation, result.best_metrics):
                result.best_metrics, result.best_epoch = validation, progress.epoch - 1
                weights = training.step.student.state_dict()
                training.best = {name: value.detach().clone() for name, value in weights.items()}
                training.best_is_new = True
                progress.since_best = 0
            else:
                progress.since_best += 1
        stopped = config.patience and progress.since_best >= config.patience
        progress.done = progress.epoch >= config.max_epochs or bool(stopped)
        bar.end_epoch(terms, validation, result.best_metrics.get(config.monitor))
        self._record(training, terms, validation)

    def _record(self, training: _Training, terms: Mapping[str, float], validation: Mapping[str, float]) -> None:
        """Write an epoch to the log and to TensorBoard."""
        progress = training.progress
        if self.log is not None and self.fabric.is_global_zero:
            self.log.write(
                "epoch",
                epoch=progress.epoch - 1,
                step=progress.result.steps,
                terms={name: round(value, 6) for name, value in terms.items()},
                validation={name: round(value, 6) for name, value in validation.items()},
            )
            progress.log_position = self.log.position()
        if training.writer is not None:
            for group, values in (("loss", terms), ("validation", validation)):
                for name, value in values.items():
                    training.writer.add_scalar(f"{group}/{name.replace('@', '_at_')}", value, progress.epoch - 1)

    def _validate(self, step: TeachingStep) -> dict[str, float]:
        """Validate on the first process and tell the others."""
        metrics: dict[str, float] = {}
        if self.fabric.is_global_zero:
            step.eval()
            with torch.no_grad():
                metrics = step.validate()
            step.train()
        return self.fabric.broadcast(metrics) if self.fabric.world_size > 1 else metrics

    def _better(self, metrics: Mapping[str, float], best: Mapping[str, float]) -> bool:
        monitor = self.config.monitor
        if monitor not in metrics:
            raise UserError(f"trainer.monitor: got {monitor!r}, wanted one of {', '.join(metrics)}")
        if not math.isfinite(metrics[monitor]):
            raise FloatingPointError(f"{self.description}: validation {monitor} became {metrics[monitor]}")
        if not best:
            return True
        return metrics[monitor] > best[monitor] if self.config.mode == "max" else metrics[monitor] < best[monitor]

    def _summary_writer(self, epoch: int) -> Any:
        """Return TensorBoard's writer; what a killed start wrote about ``epoch`` and later is struck out."""
        if not (self.config.tensorboard and self.folder is not None and self.fabric.is_global_zero):
            return None
        from torch.utils.tensorboard import SummaryWriter  # seconds to import: only when it is asked for

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=epoch)

    def _save(self, training: _Training) -> None:
        training.read_clock(together=self.fabric.world_size > 1)
        if self.checkpoints is None:
            return
        random_state = random_states(self.fabric)
        if self.fabric.is_global_zero:
            # what the state takes for written must be on disk before it
            if self.log is not None:
                self.log.sync()
            if training.writer is not None:
                training.writer.flush()
            progress = training.progress
            state = {
                "progress": {**vars(progress), "result": vars(progress.result)},
                "module": training.step.state_dict(),
                "optimizer": training.optimizer.state_dict(),
                "random": random_state,
            }
            self.checkpoints.save(state, training.best, progress.result.best_epoch, best_is_new=training.best_is_new)
        training.best_is_new = False
        training.last_save = time.monotonic()
        self.fabric.barrier()

    def _resume(self, training: _Training) -> None:
        """Load the last checkpoint, if there is one of this very run, and cut the log back to it."""
        if self.checkpoints is None:
            return
        state = self.checkpoints.load()
        if state is not None:
            try:
                training.step.load_state_dict(state["module"])
                training.optimizer.load_state_dict(state["optimizer"])
                saved = state["progress"]
                training.progress = _Progress(**{**saved, "result": FitResult(**saved["result"])})
                training.best = state["best"]["model"]
                set_random_state(self.fabric, state["random"])
            except (KeyError, TypeError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{self.checkpoints.last}: a checkpoint of another model or version ({reason}); "
                    "delete it to start again"
                ) from None
        self.fabric.barrier()  # all have read what the first may now take away
        if self.fabric.is_global_zero:
            if self.checkpoints.settle(state):
                stderr_console().print(
                    f"{self.checkpoints.last}: of other data or settings, thrown away; training starts again",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
            if self.log is not None:
                self.log.truncate(training.progress.log_position)


def iterate_rows(order: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield consecutive slices of ``order`` int64 [n] of ``batch_size`` rows, the last one shorter."""
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
