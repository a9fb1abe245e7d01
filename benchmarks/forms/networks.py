"""The pair of networks: two convolutions, attention over the places left, an embedding and a classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TEACHER, STUDENT = (32, 64, 64), (8, 16, 32)
HEADS = 2


class Mixer(nn.Module):
    """Self-attention over places [B, T, D], added to its input; its parts are modules, so that they can be tapped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.weights = nn.Softmax(-1)

    def forward(self, places: Tensor) -> Tensor:
        """Return the mixed places [B, T, D]; ``weights`` puts out [B, heads, T, T]."""
        b, t, d = places.shape
        query, key, value = (
            layer(places).view(b, t, HEADS, d // HEADS).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        weights = self.weights(query @ key.transpose(2, 3) * (d // HEADS) ** -0.5)
        return places + (weights @ value).transpose(1, 2).reshape(b, t, d)


class Network(nn.Module):
    """An image [B, 1, H, W] to logits [B, classes]; with ``columns`` a strip to logits [B, W / 4, classes]."""

    def __init__(self, sizes: tuple[int, int, int], classes: int = 10, *, columns: bool = False) -> None:
        super().__init__()
        first, second, width = sizes
        self.columns = columns
        self.block1 = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.block2 = nn.Sequential(
            nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.mixer = Mixer(second)
        self.embedding = nn.Sequential(nn.Linear(second, width), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        maps = self.block2(self.block1(inputs))
        b, c, h, w = maps.shape
        places = self.mixer(maps.flatten(2).transpose(1, 2))
        pooled = places.view(b, h, w, c).mean(1) if self.columns else places.mean(1)
        logits: Tensor = self.head(self.embedding(pooled))
        return logits


def network(sizes: tuple[int, int, int], seed: int, classes: int = 10, *, columns: bool = False) -> Network:
    """Return a network whose first weights are a function of the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network(sizes, classes, columns=columns)


def accuracy(model: nn.Module, part: dict[str, Tensor]) -> float:
    """Return the share of rows a network gets right, 0..1."""
    training = model.training
    model.eval()
    with torch.no_grad():
        right = [
            (model(inputs).argmax(-1) == labels).float()
            for inputs, labels in zip(part["inputs"].split(1000), part["labels"].split(1000), strict=True)
        ]
    model.train(training)
    return float(torch.cat(right).mean())


def strip_accuracy(model: nn.Module, part: dict[str, Tensor]) -> float:
    """Return the share of strips whose best path (repeats and blanks collapsed) is the label sequence, 0..1."""
    training = model.training
    model.eval()
    with torch.no_grad():
        paths = torch.cat([model(inputs).argmax(-1) for inputs in part["inputs"].split(1000)])
    model.train(training)
    right = 0
    for path, labels in zip(paths.tolist(), part["labels"].tolist(), strict=True):
        said = [symbol for place, symbol in enumerate(path) if symbol and (place == 0 or symbol != path[place - 1])]
        right += said == labels
    return right / len(paths)
