from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.server.websocket import FrameReader, Violation, frame, masked

MASK = b"\x37\xfa\x21\x3d"


def sent(opcode: int, payload: bytes, *, final: bool = True, mask: bytes | None = MASK) -> bytes:
    """Return a frame as a client sends it: ours, masked byte by byte as the standard says."""
    head = bytearray(frame(opcode, payload)[: len(frame(opcode, payload)) - len(payload)])
    head[0] = opcode | (0x80 if final else 0)
    if mask is None:
        return bytes(head) + payload
    head[1] |= 0x80
    return bytes(head) + mask + bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))


def test_examples_of_the_standard() -> None:
    hello = bytes.fromhex("818537fa213d7f9f4d5158")  # RFC 6455, 5.7
    assert list(FrameReader(100).feed(hello)) == [(1, b"Hello")]
    assert frame(1, b"Hello") == bytes.fromhex("810548656c6c6f")
    assert frame(2, bytes(256))[:4] == bytes.fromhex("827e0100")
    assert frame(2, bytes(65536))[:10] == bytes.fromhex("827f0000000000010000")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([2, 9, 10]), st.binary(max_size=120)), max_size=6),
    st.binary(min_size=3, max_size=400),
    st.integers(1, 50),
)
def test_messages_do_not_depend_on_the_cuts(others: list[tuple[int, bytes]], text: bytes, size: int) -> None:
    wire = b"".join(sent(opcode, payload) for opcode, payload in others)
    # a message in three fragments, with a ping between them
    wire += sent(2, text[:1], final=False) + sent(0, text[1:2], final=False) + sent(9, b"p") + sent(0, text[2:])
    reader = FrameReader(1000)
    found = [each for at in range(0, len(wire), size) for each in reader.feed(wire[at : at + size])]
    assert found == [*others, (9, b"p"), (2, text)]


@given(st.binary(max_size=100), st.binary(min_size=4, max_size=4))
def test_a_mask_twice_is_none(payload: bytes, mask: bytes) -> None:
    assert masked(masked(payload, mask), mask) == payload
    assert masked(payload, mask) == bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (sent(1, b"x", mask=None), 1002),
        (b"\xc1" + sent(1, b"x")[1:], 1002),
        (sent(3, b"x"), 1002),
        (sent(9, b"x", final=False), 1002),
        (sent(9, bytes(126)), 1002),
        (sent(0, b"x"), 1002),
        (sent(1, b"x", final=False) + sent(1, b"y"), 1002),
        (sent(1, b"\xff"), 1007),
        (sent(2, bytes(101)), 1009),
        (sent(2, bytes(60), final=False) + sent(0, bytes(60)), 1009),
        (b"\x82\xff" + b"\xff" * 8 + MASK, 1009),
        (sent(2, b"", final=False) + sent(0, b"", final=False) * 1024, 1009),
    ],
)
def test_what_a_client_may_not_send(wire: bytes, code: int) -> None:
    with pytest.raises(Violation) as caught:
        list(FrameReader(100).feed(wire))
    assert caught.value.code == code


@given(st.binary(max_size=200))
def test_noise_is_a_violation_or_waits_for_more(data: bytes) -> None:
    reader = FrameReader(1000)
    try:
        found = list(reader.feed(data))
    except Violation as problem:
        assert problem.code in (1002, 1007, 1009)
    else:
        assert sum(len(payload) for _, payload in found) <= len(data)
