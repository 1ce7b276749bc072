"""Digests, pinned for ever."""

from __future__ import annotations

import struct
import threading
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

import weightlab as wl
from weightlab.files.digest import Aborted, PartDigest, Turns, fingerprint, tensor_hasher

TENSOR = "3227f39f4fad002df591becd74bd6b5cb92fcc548616cd55ddd033cf7a0f83cb"
CHECKPOINT = "27d4be41f52ed5a254eb5d65b478401b84ef9d5037d89f12f334ae345db11a1d"


def digest(tensor: torch.Tensor, dtype: str) -> str:
    hasher = tensor_hasher(dtype, tuple(tensor.shape))
    hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return str(hasher.hexdigest())


def test_by_the_definition() -> None:
    tensor = torch.tensor([[1.0, -2.0, 0.5]])
    plain = (
        b"weightlab tensor 1\0"
        + b"F32".ljust(16, b"\0")
        + struct.pack("<QQQ", 2, 1, 3)
        + struct.pack("<3f", 1, -2, 0.5)
    )
    assert digest(tensor, "F32") == blake3(plain).hexdigest() == TENSOR
    empty = digest(torch.zeros(0, 3, dtype=torch.bfloat16), "BF16")
    assert fingerprint({"w": TENSOR, "b": empty}) == CHECKPOINT
    named = b"".join(
        struct.pack("<Q", len(n.encode())) + n.encode() + bytes([i]) * 32 for i, n in enumerate(("A", "a", "é"))
    )
    digests = {n: (bytes([i]) * 32).hex() for i, n in enumerate(("A", "a", "é"))}
    assert fingerprint(dict(reversed(digests.items()))) == blake3(b"weightlab fingerprint 1\0" + named).hexdigest()


def test_dtype_shape_and_bytes_all_count() -> None:
    values = torch.arange(4, dtype=torch.int32)
    found = {digest(values, "I32"), digest(values.view(torch.float32), "F32"), digest(values.reshape(2, 2), "I32")}
    found |= {digest(values.reshape(1, 4), "I32"), digest(values.flip(0), "I32")}
    assert len(found) == 5


def test_a_part_takes_its_shape_at_the_end_and_may_grow() -> None:
    one, two = PartDigest("U8"), PartDigest("U8")
    one.update(b"abcd")
    two.update(b"ab")
    half = two.hexdigest((2,))
    two.update(b"cd")
    assert one.hexdigest((4,)) == two.hexdigest((4,)) != half
    assert one.hexdigest((4,)) != one.hexdigest((2, 2))


def test_a_fingerprint_does_not_depend_on_how_tensors_lie_in_files(tmp_path: Path) -> None:
    state = {f"w{i}": torch.randn(3, i + 1) for i in range(5)}
    save_file(state, tmp_path / "one.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    shards = {"a.safetensors": ["w3", "w0"], "b.safetensors": ["w4", "w1", "w2"]}
    for file, names in shards.items():
        save_file({n: state[n] for n in names}, folder / file)
    index = {"weight_map": {n: f for f, names in shards.items() for n in names}}
    (folder / "model.safetensors.index.json").write_text(str(index).replace("'", '"'))
    torch.save(state, tmp_path / "pickled.pt")
    found = {wl.verify(tmp_path / n).identity for n in ("one.safetensors", "sharded", "pickled.pt")}
    assert len(found) == 1


def test_turns_are_in_order() -> None:
    turns, order = Turns(), []

    def take(index: int) -> None:
        with turns.turn(index):
            order.append(index)

    threads = [threading.Thread(target=take, args=(i,)) for i in (3, 1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3]


def test_whoever_waits_is_woken_by_a_failure() -> None:
    turns, ended = Turns(), []

    def wait() -> None:
        with pytest.raises(Aborted), turns.turn(1):
            pytest.fail("it was not its turn")
        ended.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    turns.abort()
    thread.join(10)
    assert ended == [True]
