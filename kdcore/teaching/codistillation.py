"""Codistillation: processes train replicas of their own and teach each other through stale copies."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kdcore.run import atomic_path
from kdcore.teaching.registry import teaching
from kdcore.teaching.schedules import Schedule
from kdcore.teaching.step import DistillationStep, Learning, Validate, labels_term
from kdcore.teaching.terms import Term
from kdcore.trainer import Batch


@teaching(
    "codistillation",
    "step",
    "processes that share a folder; labels",
    "Anil et al., Large Scale Distributed Neural Network Training through Online Distillation, ICLR 2018",
)
class CodistillationStep(DistillationStep):
    """Teach a replica by what its peers were some epochs ago.

    Every process runs its own trainer (``solo_fabric``) on its own rows. Every ``exchange_every`` epochs it writes its
    weights to ``folder``, which is this run's alone, and reads the newest of each peer: no barrier, no gradients
    exchanged, a peer that is slow or dead is only more stale (torchrun itself ends all if one fails). The stale copies
    are part of the checkpoint. The teacher is the mean of the peers' tempered answers; until one has been read the term
    is 0.
    """

    known: Tensor

    def __init__(
        self,
        make: Callable[[], nn.Module],
        data: Mapping[str, Tensor],
        *,
        folder: str | os.PathLike[str],
        rank: int,
        peers: int,
        validate: Validate,
        exchange_every: int = 1,
        weight: float | Schedule = 1.0,
        temperature: float = 1.0,
        learning: Learning | None = None,
    ) -> None:
        terms = [labels_term(), Term("peers", "soft_targets", options={"temperature": temperature}, weight=weight)]
        super().__init__(make(), data, terms, validate=validate, learning=learning)
        if peers < 2 or not 0 <= rank < peers or exchange_every < 1:
            raise ValueError(
                f"rank, peers, exchange_every: wanted 0 <= rank < peers, peers >= 2, exchange_every >= 1, "
                f"got {rank}, {peers} and {exchange_every}"
            )
        self.folder, self.rank, self.exchange_every = Path(folder), rank, exchange_every
        self.temperature = temperature
        self.others = [each for each in range(peers) if each != rank]
        self.stale = nn.ModuleList(copy.deepcopy(self.student).requires_grad_(False) for _ in self.others)
        self.register_buffer("known", torch.zeros(len(self.others), dtype=torch.bool))

    def train(self, mode: bool = True) -> CodistillationStep:
        """Set the mode of the replica; stale copies stay in evaluation mode."""
        super().train(mode)
        self.stale.eval()
        return self

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Set the weights, and exchange if it is time."""
        super().begin_epoch(epoch, generator)
        if epoch % self.exchange_every == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            # copies: safetensors refuses weights that are tied
            state = {
                name: value.detach().to("cpu", copy=True).contiguous()
                for name, value in self.student.state_dict().items()
            }
            with atomic_path(self._file(self.rank)) as temporary:
                temporary.write_bytes(save(state))
            for place, peer in enumerate(self.others):
                if self._file(peer).exists():
                    self._read(place, peer)

    def _file(self, rank: int) -> Path:
        return self.folder / f"peer-{rank}.safetensors"

    def _read(self, place: int, peer: int) -> None:
        try:
            self.stale[place].load_state_dict(load_file(self._file(peer)))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{self._file(peer)}: not a peer's weights ({' '.join(str(error).split())})") from None
        self.known[place] = True

    def values(self, batch: Batch) -> dict[str, Tensor]:
        """Return the values of a batch with ``teacher`` the mean of the peers known, or the student itself."""
        found = super().values(batch)
        known = [peer for peer, read in zip(self.stale, self.known.tolist(), strict=True) if read]
        if not known:
            found["teacher"] = found["student"].detach()
            return found
        with torch.no_grad():
            parts = [torch.log_softmax(peer(batch["inputs"]).float() / self.temperature, 1) for peer in known]
        mean = torch.logsumexp(torch.stack(parts), 0) - torch.tensor(len(parts)).log()
        found["teacher"] = mean * self.temperature
        return found


def solo_fabric(**options: Any) -> Any:
    """Return a Fabric of this process alone, however many torchrun started: give it to the Trainer as ``fabric``."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    fabric = Fabric(accelerator="cpu", devices=1, strategy="auto", plugins=[LightningEnvironment()], **options)
    fabric.launch()
    return fabric
