"""Which device a client computes on, with GPUs that are not there, and how many threads."""

from __future__ import annotations

import pytest
import torch

from client_app.placement import choose_device, set_threads
from federation.settings import SettingsError


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that this process sees so many GPUs."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [
        (0, "auto", "cpu"),
        (1, "auto", "cuda:0"),
        (2, "auto", "cuda:0"),
        (0, "cpu", "cpu"),
        (2, "cpu", "cpu"),
        (1, "cuda:0", "cuda:0"),
        (2, "cuda:0", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_the_wanted_device_is_chosen(gpus, count, wanted, expected):
    gpus(count)
    assert choose_device(wanted, {}) == torch.device(expected)


@pytest.mark.parametrize(("count", "wanted"), [(0, "cuda:0"), (1, "cuda:1"), (2, "cuda:2")])
def test_a_gpu_that_is_not_there_is_refused_naming_those_that_are(gpus, count, wanted):
    gpus(count)
    with pytest.raises(SettingsError) as refused:
        choose_device(wanted, {})
    text = str(refused.value)
    assert "device" in text and repr(wanted) in text and f"{count} GPUs" in text
    assert "auto" in text and "cpu" in text
    assert [f"cuda:{n}" in text.split("accepted")[1] for n in range(3)] == [
        n < count for n in range(3)
    ]


@pytest.mark.parametrize("wanted", ["gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "mps", "", "CPU"])
def test_no_device_at_all_is_refused_naming_the_forms(gpus, wanted):
    gpus(2)
    with pytest.raises(SettingsError, match=r"device: got .*accepted are auto, cpu and cuda:N"):
        choose_device(wanted, {})


@pytest.mark.parametrize("wanted", ["cuda:²", "cuda:01"])
def test_odd_digits_are_refused_like_any_other_text(gpus, wanted):
    gpus(4)
    try:
        choose_device(wanted, {})
    except SettingsError:
        return
    pytest.fail("accepted")


def test_the_sites_own_device_overrides_the_runs(gpus):
    gpus(2)
    assert choose_device("cpu", {"device": "cuda:1"}) == torch.device("cuda:1")
    assert choose_device("cuda:7", {"device": "auto"}) == torch.device("cuda:0")
    assert choose_device("auto", {"device": "cpu", "partition-id": 1}) == torch.device("cpu")
    with pytest.raises(SettingsError, match="cuda:2"):
        choose_device("cpu", {"device": "cuda:2"})


def test_a_share_of_the_second_gpu_is_cuda_0_of_its_worker(gpus, monkeypatch):
    """Ray hides all GPUs but the worker's own, which is number 0 there, whatever its number is."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    gpus(1)
    node_config = {"partition-id": 3, "num-partitions": 5}
    assert choose_device("auto", node_config) == torch.device("cuda:0")
    with pytest.raises(SettingsError, match=r"1 GPUs are visible here.*cuda:0"):
        choose_device("cuda:1", node_config)


def test_a_worker_without_a_share_computes_on_the_cpu(gpus):
    gpus(0)
    assert choose_device("auto", {"partition-id": 0, "num-partitions": 2}) == torch.device("cpu")


# How many threads.


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_site_says_how_many_threads(threads):
    own = set_threads({})
    assert set_threads({"threads": own + 1}) == torch.get_num_threads() == own + 1
    # The next client of this process is not concerned.
    assert set_threads({}) == torch.get_num_threads() == own


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True, 2**40])
def test_threads_that_cannot_be_are_refused(threads, wrong):
    with pytest.raises(SettingsError, match="node config threads: got"):
        set_threads({"threads": wrong})
