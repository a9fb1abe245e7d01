"""The attention teacher: padding, what its decoder learns, and frame targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apps.speech.distill import Optimization, SpeechStep
from apps.speech.fitting import ask, attention_targets
from apps.speech.models import new_model
from apps.speech.models.attention import AttentionCtc
from kdcore.trainer import Trainer
from kdcore.trainer_config import TrainerConfig
from tests.speech.made import SYMBOLS, store, utterances

TINY = {
    **{"channels": (2, 4), "width": 16, "hidden": 16, "layers": 1, "dropout": 0.0},
    **{"embedding": 8, "decoder": 24, "filters": 4, "kernel": 5},
}


def model() -> AttentionCtc:
    torch.manual_seed(0)
    made = new_model("attention", SYMBOLS + 1, TINY)
    assert isinstance(made, AttentionCtc)
    made.set_statistics(torch.full((80,), -12.0), torch.full((80,), 4.0))
    return made.eval()


def test_attention_is_a_share_of_the_frames_within_a_length() -> None:
    made = model()
    encoded, lengths = torch.randn(2, 9, 32), torch.tensor([9, 5])
    logits, attention = made.attend(encoded, lengths, torch.tensor([[0, 1, 2], [3, 3, 0]]))
    assert logits.shape == (2, 3, SYMBOLS + 1)
    torch.testing.assert_close(attention.sum(2), torch.ones(2, 3))
    assert not attention[1, :, 5:].any()
    alone = made.attend(encoded[1:, :5], lengths[1:], torch.tensor([[3, 3, 0]]))
    torch.testing.assert_close(logits[1:], alone[0], atol=1e-5, rtol=1e-5)


def test_padding_and_unlabelled_rows_add_nothing_to_the_loss() -> None:
    made = model()
    encoded, lengths = torch.randn(3, 9, 32), torch.tensor([9, 5, 7])
    labels, sizes = torch.tensor([[0, 1, 2], [3, 0, 0], [1, 1, 1]]), torch.tensor([3, 1, 0])
    mask = torch.tensor([True, True, False])
    both = made.decoder_loss(encoded, lengths, labels, sizes, mask=mask, reduction="sum")
    each = [
        made.decoder_loss(
            encoded[row : row + 1],
            lengths[row : row + 1],
            labels[row : row + 1, : sizes[row]],
            sizes[row : row + 1],
            mask=torch.tensor([True]),
            reduction="sum",
        )
        for row in (0, 1)
    ]
    torch.testing.assert_close(both, sum(each), atol=1e-5, rtol=1e-5)
    nothing = made.decoder_loss(encoded, lengths, labels, sizes, mask=torch.zeros(3, dtype=torch.bool))
    assert float(nothing) == 0.0


def test_targets_are_the_attention_by_symbol_with_the_rest_on_the_blank() -> None:
    made = model()
    encoded, lengths = torch.randn(2, 9, 32), torch.tensor([9, 5])
    texts = [[0, 1, 0], [2]]
    found = [each.exp() for each in made.frame_targets(encoded, lengths, texts)]
    assert [tuple(each.shape) for each in found] == [(9, SYMBOLS + 1), (5, SYMBOLS + 1)]
    for each in found:
        torch.testing.assert_close(each.sum(1), torch.ones(len(each)))
    _, attention = made.attend(encoded[:1], lengths[:1], torch.tensor([[0, 1, 0]]))
    summed = attention[0, 0] + attention[0, 2]
    scale = (attention[0].sum(0)).clamp(min=1.0)
    torch.testing.assert_close(found[0][:, 0], summed / scale, atol=1e-6, rtol=1e-5)
    assert not found[0][:, 3].any()


def looks_where_it_sounds(made: AttentionCtc) -> float:
    """Return for how many symbols of held-out texts the frame with the most attention is where their tone sounds."""
    held, labels = store(20, seed=7)
    features = [held[row] for row in range(len(held))]
    targets = attention_targets(made.eval(), features, labels)
    assert [len(each) for each in targets] == [len(each) for each in ask(made, features)["log_probs"]]
    near = []
    for row, log_q in enumerate(targets):
        # the ten bins of a tone stand out
        loud = np.stack([features[row][:, 10 + 15 * symbol : 20 + 15 * symbol].mean(1) for symbol in range(SYMBOLS)])
        for symbol in set(labels[row]):
            frame = int(log_q[:, symbol].argmax()) * 4
            near.append(bool(loud[symbol, max(0, frame - 8) : frame + 12].max() > -4))
    return float(np.mean(near))


def test_the_decoder_learns_where_symbols_are() -> None:
    made = model()
    assert looks_where_it_sounds(made) < 0.6
    last: dict[str, torch.Tensor] = {}

    def keep(student: torch.nn.Module) -> dict[str, float]:
        last.update({name: value.clone() for name, value in student.state_dict().items()})
        return {"cer": 0.5}

    step = SpeechStep(
        made,
        utterances(100),
        keep,
        epochs=16,
        terms=made.own_terms(),
        optimization=Optimization(learning_rate=0.01, batch_frames=300),
        taps={"encoder": "encoder"},
    )
    config = TrainerConfig(
        max_epochs=16, patience=0, monitor="cer", mode="min", gradient_clip=5.0, threads=1, tensorboard=False
    )
    Trainer(config, seed=0, quiet=True).fit(step)
    made.load_state_dict(last)
    assert looks_where_it_sounds(made) > 0.75


@pytest.mark.parametrize(
    "wrong",
    [
        *({"hidden": 0}, {"dropout": 1.0}, {"embedding": 0}, {"decoder": 0}, {"filters": 0}, {"kernel": 0}),
        *({"kernel": 4}, {"weight": -1.0}),
    ],
)
def test_sizes_out_of_range(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"options: {name}: got {value}, wanted"):
        new_model("attention", 5, {**TINY, **wrong})
