"""Keys and token buckets."""

from __future__ import annotations

import pytest

from apps.recsys.serve.guard import Guard, read_admin_key, read_keys
from apps.recsys.serve.schema import ServiceError
from kdcore.config import UserError

KEY, OTHER = "k" * 20, "o" * 20


def keys(tmp_path, text=f"shop {KEY}\napp {OTHER}\n"):
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    return read_keys(path)


def test_a_key_has_a_name_and_no_other_key_has_one(tmp_path):
    guard = Guard(keys(tmp_path))
    assert guard.caller(KEY.encode(), "1.2.3.4") == "shop"
    assert guard.caller(OTHER.encode(), "") == "app"
    for wrong in (None, b"", b"k" * 19, b"k" * 21, KEY.upper().encode()):
        with pytest.raises(ServiceError) as caught:
            guard.caller(wrong, "")
        assert caught.value.status == 401
    assert Guard().caller(None, "1.2.3.4") == "1.2.3.4"


def test_keys_are_kept_as_hashes(tmp_path):
    guard = Guard(keys(tmp_path))
    assert KEY not in repr(vars(guard))


def test_a_bucket_holds_a_second_and_fills_again():
    now = [0.0]
    guard = Guard(rate=10, clock=lambda: now[0])

    def admitted(caller, count):
        done = 0
        for _ in range(count):
            try:
                guard.admit(caller)
                done += 1
            except ServiceError as error:
                assert error.status == 429
                assert int(error.headers["retry-after"]) >= 1
        return done

    assert admitted("a", 30) == 10
    assert admitted("b", 30) == 10  # each caller has its own
    now[0] = 0.55
    assert admitted("a", 30) == 5
    now[0] = 100.0
    assert admitted("a", 30) == 10


def test_a_rate_below_one_a_second_admits_one_now_and_then():
    now = [0.0]
    guard = Guard(rate=0.5, clock=lambda: now[0])
    guard.admit("a")
    with pytest.raises(ServiceError) as caught:
        guard.admit("a")
    now[0] += int(caught.value.headers["retry-after"])
    guard.admit("a")


def test_callers_without_end_take_no_memory_without_end():
    guard = Guard(rate=1, clock=lambda: 0.0)
    for number in range(30_000):
        guard.admit(str(number))
    assert len(guard._buckets) <= 10_000


def test_the_admin_key(tmp_path):
    path = tmp_path / "admin"
    path.write_text(KEY + "\n", encoding="utf-8")
    guard = Guard(admin=read_admin_key(path))
    guard.admin(KEY.encode())
    for wrong in (None, b"", OTHER.encode()):
        with pytest.raises(ServiceError) as caught:
            guard.admin(wrong)
        assert caught.value.status == 401
    with pytest.raises(ServiceError) as caught:
        Guard().admin(KEY.encode())
    assert caught.value.status == 403


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "holds no keys"),
        ("# only a comment\n", "holds no keys"),
        ("shop\n", "row 1: wanted a name and a key"),
        (f"\nshop {KEY} extra\n", "row 2: wanted a name and a key"),
        ("shop short\n", "at least 16 characters"),
        (f"a {KEY}\na {OTHER}\n", "row 2: the name 'a' stands there twice"),
    ],
)
def test_a_bad_key_file_is_refused_with_its_row(tmp_path, text, wanted):
    with pytest.raises(UserError, match=wanted) as caught:
        keys(tmp_path, text)
    assert KEY not in str(caught.value)
    assert OTHER not in str(caught.value)


def test_unreadable_key_files(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, wanted in ((tmp_path / "binary", "not UTF-8"), (tmp_path / "none", "No such file")):
        with pytest.raises(UserError, match=wanted):
            read_keys(path)
        with pytest.raises(UserError, match=wanted):
            read_admin_key(path)
