"""Files that are no checkpoint of this run end in an error that names them."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from strategies import (
    ROUND_PLAN_KEY,
    Checkpoint,
    CheckpointError,
    FFALoRA,
    RoLoRA,
    RoundPlan,
    read_checkpoint,
    receive_adapter,
    update_records,
)
from tests.fake_grid import FakeGrid

SHAPES = {"m.q.lora_A.weight": (2, 3), "m.q.lora_B.weight": (4, 2), "m.head.bias": (2,)}


def adapter(**other) -> ArrayRecord:
    shapes = {**SHAPES, **other}
    return ArrayRecord({n: Array(np.full(s, 0.5, np.float32)) for n, s in shapes.items()})


def handle(message: Message, context) -> Message:
    held = receive_adapter(message, context.state)
    names = RoundPlan.from_record(message.content[ROUND_PLAN_KEY]).uploaded(held)
    update = {n: np.full_like(held[n], 0.25) for n in names}
    rng = np.random.default_rng(0)
    return Message(
        RecordDict(update_records(message, context.state, update, rng)), reply_to=message
    )


def go(path, strategy=None, arrays=None, rounds: int = 2, **options):
    one = strategy or RoLoRA(local_steps=2)
    checkpoint = Checkpoint(path, **options)
    return one.start(
        FakeGrid([handle] * 2), arrays or adapter(), num_rounds=rounds, checkpoint=checkpoint
    )


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run.npz"
    go(path)
    return path


def rewrite(path, **changes) -> None:
    """Write the file's state again, changed; ``None`` takes a key away."""
    with np.load(path) as archive:
        members = {name: archive[name] for name in archive.files}
    state = {**json.loads(members["state"].tobytes()), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    members["state"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    np.savez(path, **members)


def test_the_checkpoint_that_the_others_spoil_is_a_good_one(saved):
    assert read_checkpoint(saved).state["round"] == 2
    assert max(go(saved, rounds=3).train_metrics_clientapp) == 3


def test_a_cut_file_is_refused(saved):
    data = saved.read_bytes()
    for length in range(0, len(data), 7):
        saved.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"run\.npz"):
            read_checkpoint(saved)


def test_a_changed_byte_is_refused_or_changes_nothing(saved):
    """Mistake: some damage raises what nobody expected, such as NotImplementedError."""
    data = saved.read_bytes()
    whole = read_checkpoint(saved)
    reasons = []
    for place in range(len(data)):
        for flip in (0x01, 0xFF):
            saved.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            try:
                read = read_checkpoint(saved)
            except CheckpointError as error:
                reasons.append(str(error))
            else:
                assert read.state == whole.state
                for name, array in read.arrays.items():
                    assert array.data == whole.arrays[name].data
    assert len(reasons) > len(data)
    assert all("run.npz" in reason for reason in reasons)


class Touch:
    """Unpickling this leaves a file behind."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def object_array(path, mark) -> None:
    members = {"state": np.array([Touch(mark)], dtype=object)}
    np.savez(path, allow_pickle=True, **members)


def object_tensor(path, mark) -> None:
    with np.load(path) as archive:
        members = {name: archive[name] for name in archive.files}
    members["tensor:m.head.bias"] = np.array([Touch(mark), None], dtype=object)
    np.savez(path, allow_pickle=True, **members)


def bare_pickle(path, mark) -> None:
    path.write_bytes(pickle.dumps(Touch(mark)))


def pickled_member(path, mark) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("state.npy", pickle.dumps(Touch(mark)))


@pytest.mark.parametrize("make", [object_array, object_tensor, bare_pickle, pickled_member])
def test_no_pickle_is_ever_loaded(make, saved, tmp_path):
    mark = tmp_path / "mark"
    make(saved, mark)
    with pytest.raises(CheckpointError, match=r"run\.npz"):
        go(saved)
    assert not mark.exists()


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**members) -> bytes:
    file = io.BytesIO()
    np.savez(file, **members)
    return file.getvalue()


def as_state(value) -> bytes:
    return npz(state=np.frombuffer(json.dumps(value).encode(), np.uint8))


FOREIGN = {
    "nothing": b"",
    "text": b"hello\n",
    "zip magic": b"PK\x03\x04" + b"\0" * 60,
    "array": npy(np.zeros(3)),
    "another archive": npz(x=np.zeros(3)),
    "not JSON": npz(state=np.frombuffer(b"{", np.uint8)),
    "not UTF-8": npz(state=np.frombuffer(b"\xff\xfe\xfd", np.uint8)),
    "floats": npz(state=np.zeros(5)),
    "a list": as_state([1]),
    "no format": as_state({"round": 3}),
    "another format": as_state({"format": 2, "companions": {}}),
    "nothing but the format": as_state({"format": 1}),
    "no method": as_state({"format": 1, "companions": {}}),
    "deep JSON": npz(state=np.frombuffer(b"[" * 200_000, np.uint8)),
}


@pytest.mark.parametrize("case", sorted(FOREIGN))
def test_a_foreign_file_is_refused_and_left_alone(case, tmp_path):
    path = tmp_path / "run.npz"
    path.write_bytes(FOREIGN[case])
    with pytest.raises(CheckpointError, match=r"run\.npz"):
        go(path)
    assert path.read_bytes() == FOREIGN[case]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=tmp_path.name):
        go(tmp_path)


@pytest.mark.parametrize("key", ["method", "round", "strategy", "metrics", "companions"])
def test_a_state_without_a_part_is_refused(key, saved):
    rewrite(saved, **{key: None})
    with pytest.raises(CheckpointError, match=r"run\.npz"):
        go(saved)


def test_another_methods_run_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"run\.npz is of a run with 'ro-lora'.*'ffa-lora'"):
        go(saved, FFALoRA(local_steps=2))


def test_another_adapters_run_is_refused(saved):
    for other in ({"m.q.lora_A.weight": (3, 3)}, {"m.k.lora_A.weight": (2, 3)}):
        with pytest.raises(CheckpointError, match=r"run\.npz is of a run with another adapter"):
            go(saved, arrays=adapter(**other))


def test_tensors_of_another_round_than_the_state_are_refused(saved):
    other = saved.with_name("other.npz")
    go(other, rounds=1)
    with np.load(saved) as later, np.load(other) as earlier:
        members = {n: earlier[n] for n in earlier.files} | {"state": later["state"]}
    members["tensor:m.head.bias"] = members["tensor:m.head.bias"] + 1
    np.savez(saved, **members)
    with pytest.raises(CheckpointError, match=r"run\.npz does not fit this run"):
        go(saved)


class Account:
    """Something with a state beside the strategy's."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self):
        self.value += 1
        return {"value": self.value}

    def load_state_dict(self, state) -> None:
        self.value = state["value"]


def test_companions_go_on_where_they_stopped(tmp_path):
    path = tmp_path / "run.npz"
    go(path, companions={"account": Account()})
    account = Account()
    go(path, companions={"account": account}, rounds=3)
    # The start and two rounds, the state saved again as soon as it was taken up, the third round.
    assert account.value == 5
    with pytest.raises(CheckpointError, match=r"run\.npz holds the states of \['account'\]"):
        go(path)
    with pytest.raises(CheckpointError, match=r"this run has \['account', 'more'\]"):
        go(path, companions={"account": Account(), "more": Account()})
