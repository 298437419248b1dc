"""Calibrations kept on disk: found again, never trusted."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import math
import multiprocessing
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from privacy import accounting, calibration_cache
from privacy.accounting import AccountingError, calibrate_noise_multiplier, pld_epsilon

WISHES = {"target_epsilon": 8.0, "target_delta": 1e-5, "sample_rate": 1.0, "steps": 4}
LIMITS = {"smallest": 0.15, "largest": 1e5}
INPUTS = {"algorithm": 1, "sample-rate": (0.2).hex(), "steps": 7}

not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for kept calibrations, not made yet."""
    path = tmp_path / "above" / "calibrations"
    monkeypatch.setenv("FLOWER_DP_LORA_CALIBRATIONS", str(path))
    return path


@pytest.fixture(autouse=True)
def searches(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What was searched for.  A search of the same is done once for all tests: it takes seconds."""
    done = []

    def counted(**wishes: float) -> float:
        done.append(wishes)
        return search_once(**wishes)

    monkeypatch.setattr(accounting, "_search_noise_multiplier", counted)
    return done


@pytest.fixture(autouse=True)
def _new_process():
    forget()
    yield
    forget()


search_once = functools.lru_cache(accounting._search_noise_multiplier)


def forget() -> None:
    """Make this process as good as new."""
    calibrate_noise_multiplier.cache_clear()
    pld_epsilon.cache_clear()
    calibration_cache._warn_once.cache_clear()


def in_a_new_process(**changes: float) -> float:
    forget()
    return calibrate_noise_multiplier(**{**WISHES, **changes})


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def kept_number(folder: Path) -> float:
    return json.loads(only_file(folder).read_bytes())["noise-multiplier"]


def write_number(folder: Path, number: object) -> None:
    content = json.loads(only_file(folder).read_bytes())
    only_file(folder).write_text(json.dumps({**content, "noise-multiplier": number}))


def test_a_second_process_does_not_search(folder, searches, monkeypatch):
    first = in_a_new_process()
    assert searches == [WISHES]
    assert kept_number(folder) == first
    asked = []
    pld = accounting.pld_epsilon

    def counted(**numbers):
        asked.append(numbers)
        return pld(**numbers)

    monkeypatch.setattr(accounting, "prv_epsilon", lambda **_: pytest.fail("PRV was asked"))
    monkeypatch.setattr(counted, "cache_clear", pld.cache_clear, raising=False)
    monkeypatch.setattr(accounting, "pld_epsilon", counted)
    assert in_a_new_process() == first
    assert len(searches) == 1
    # The check of what was read: once, on the coarse grid.
    assert [(one["noise_multiplier"], one["interval"]) for one in asked] == [(first, 1e-3)]


def test_a_real_second_process_uses_what_the_first_kept(folder):
    first = in_a_new_process()
    code = (
        "import sys; from privacy import accounting\n"
        "accounting._search_noise_multiplier = lambda **_: sys.exit('searched')\n"
        f"print(accounting.calibrate_noise_multiplier(**{WISHES!r}))\n"
        "sys.exit('opacus was loaded' if 'opacus' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout) == first


def test_in_one_process_the_disk_is_asked_once(folder, searches):
    first = calibrate_noise_multiplier(**WISHES)
    only_file(folder).unlink()
    assert calibrate_noise_multiplier(**WISHES) == first
    assert len(searches) == 1
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"target_epsilon": math.nextafter(8.0, 9.0)},
        {"target_delta": math.nextafter(1e-5, 1.0)},
        {"sample_rate": math.nextafter(1.0, 0.0)},
        {"steps": 5},
    ],
)
def test_every_input_counts_to_the_last_bit(folder, searches, monkeypatch, changes):
    def made_up(**wishes):
        searches.append(wishes)
        return 2.0

    monkeypatch.setattr(accounting, "_search_noise_multiplier", made_up)
    in_a_new_process()
    in_a_new_process(**changes)
    assert len(searches) == 2
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("package", ["dp-accounting", "opacus"])
def test_another_version_of_an_accountant_begins_anew(folder, searches, monkeypatch, package):
    in_a_new_process()
    version = calibration_cache.importlib.metadata.version
    monkeypatch.setattr(
        calibration_cache.importlib.metadata,
        "version",
        lambda name: "99.0" if name == package else version(name),
    )
    in_a_new_process()
    assert len(searches) == 2


def test_another_version_of_the_search_begins_anew(folder, searches, monkeypatch):
    in_a_new_process()
    monkeypatch.setattr(accounting, "_ALGORITHM", accounting._ALGORITHM + 1)
    in_a_new_process()
    assert len(searches) == 2


def test_without_a_version_nothing_is_kept(folder, searches, monkeypatch):
    def unknown(name):
        raise calibration_cache.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(calibration_cache.importlib.metadata, "version", unknown)
    in_a_new_process()
    in_a_new_process()
    assert len(searches) == 2
    assert not folder.exists()


def test_a_refusal_is_not_kept(folder, monkeypatch):
    search_once.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(accounting, "prv_epsilon", lambda **_: 1.0)
        with pytest.raises(AccountingError, match="disagree"):
            in_a_new_process()
    assert not folder.exists()


@pytest.mark.parametrize("factor", [0.5, 0.97, 0.999])
def test_too_little_noise_is_refused_and_found_again(folder, searches, caplog, factor):
    right = in_a_new_process()
    write_number(folder, factor * right)
    assert in_a_new_process() == right
    assert len(searches) == 2
    assert caplog.text.count("does not meet its budget") == 1
    assert kept_number(folder) == right


def test_an_accountant_that_fails_over_a_kept_number_refuses_it(folder, searches, monkeypatch):
    right = in_a_new_process()
    write_number(folder, 0.15)
    pld = accounting.pld_epsilon

    def fails(*, noise_multiplier, **others):
        if noise_multiplier == 0.15:
            raise OverflowError
        return pld(noise_multiplier=noise_multiplier, **others)

    monkeypatch.setattr(accounting, "pld_epsilon", fails)
    calibrate_noise_multiplier.cache_clear()
    assert calibrate_noise_multiplier(**WISHES) == right
    assert len(searches) == 2


def test_too_much_noise_costs_accuracy_not_privacy(folder, searches):
    right = in_a_new_process()
    write_number(folder, 2 * right)
    more = in_a_new_process()
    assert more == 2 * right
    numbers = {"sample_rate": WISHES["sample_rate"], "steps": WISHES["steps"], "delta": 1e-5}
    assert pld_epsilon(noise_multiplier=more, **numbers) < WISHES["target_epsilon"]


def test_the_fine_grid_may_say_yes_where_the_coarse_one_says_no(monkeypatch):
    """The search ends on the coarse grid to a tolerance, so its answer may lie just above there."""
    spent = {1e-3: 8.00001, 1e-4: 7.9999}
    monkeypatch.setattr(accounting, "pld_epsilon", lambda *, interval, **_: spent[interval])
    assert accounting._meets_budget(2.0, **WISHES)
    spent[1e-4] = 8.000001
    assert not accounting._meets_budget(2.0, **WISHES)


@pytest.mark.parametrize(
    "number", [math.nan, math.inf, -1.0, 0.0, 0.149, 1e6, 2, True, "2.0", None]
)
def test_a_number_that_no_calibration_gives_is_damage(folder, searches, caplog, number):
    right = in_a_new_process()
    write_number(folder, number)
    assert in_a_new_process() == right
    assert len(searches) == 2
    assert caplog.text.count("is damaged") == 1
    assert in_a_new_process() == right
    assert len(searches) == 2  # what was found replaced the damage


@pytest.mark.parametrize("damage", ["half", "empty", "zeros", "list", "nested", "other", "more"])
def test_a_damaged_file_is_ignored(folder, searches, caplog, damage):
    right = in_a_new_process()
    file = only_file(folder)
    whole = file.read_bytes()
    other = json.loads(whole)
    other["inputs"]["steps"] = 3  # another calibration's content under this name
    contents = {
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "zeros": bytes(len(whole)),
        "list": b"[2.0]",
        "nested": b"[" * 100_000,
        "other": json.dumps(other).encode(),
        "more": json.dumps({**json.loads(whole), "more": 1}).encode(),
    }
    file.write_bytes(contents[damage])
    assert in_a_new_process() == right
    assert len(searches) == 2
    assert caplog.text.count("is damaged") == 1


@pytest.mark.parametrize("mode", [0o750, 0o770, 0o707, 0o777, 0o755])
def test_a_folder_open_to_others_is_not_used(folder, searches, caplog, mode):
    in_a_new_process()
    folder.chmod(mode)
    in_a_new_process()
    calibrate_noise_multiplier.cache_clear()
    calibrate_noise_multiplier(**WISHES)
    assert len(searches) == 3
    assert caplog.text.count("mode 0700") == 1


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o644])
def test_a_file_open_to_others_is_not_used_and_replaced(folder, searches, caplog, mode):
    in_a_new_process()
    only_file(folder).chmod(mode)
    in_a_new_process()
    assert len(searches) == 2
    assert caplog.text.count("mode 0600") == 1
    assert stat.S_IMODE(only_file(folder).stat().st_mode) == 0o600


def test_what_belongs_to_somebody_else_is_not_used(folder, searches, caplog, monkeypatch):
    in_a_new_process()
    somebody_else = os.geteuid() + 1
    monkeypatch.setattr(calibration_cache.os, "geteuid", lambda: somebody_else)
    in_a_new_process()
    assert len(searches) == 2
    assert "must belong to the user" in caplog.text


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_plain_file_is_not_read(folder, searches, tmp_path, kind):
    in_a_new_process()
    file = only_file(folder)
    if kind == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.unlink()
        os.mkfifo(file, 0o600) if kind == "pipe" else file.mkdir(0o700)
    in_a_new_process()
    assert len(searches) == 2


def test_a_link_is_no_folder(folder, searches, tmp_path):
    in_a_new_process()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    in_a_new_process()
    assert len(searches) == 2


def test_what_is_kept_is_closed_to_others(folder):
    old = os.umask(0)
    try:
        in_a_new_process()
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(only_file(folder).stat().st_mode) == 0o600


@pytest.mark.parametrize("place", ["/dev/null", "/dev/null/below", "/proc/self/nothing"])
def test_a_place_that_cannot_be_written_is_no_error(searches, caplog, monkeypatch, place):
    monkeypatch.setenv("FLOWER_DP_LORA_CALIBRATIONS", place)
    assert in_a_new_process() > 0
    assert calibrate_noise_multiplier(**WISHES) > 0
    assert len(searches) == 1
    assert not caplog.records  # debug only: a read-only home is no fault


@not_as_root
def test_a_read_only_home_is_no_error(folder, searches, caplog):
    folder.parent.mkdir()
    folder.parent.chmod(0o500)
    assert in_a_new_process() > 0
    assert not caplog.records
    folder.parent.chmod(0o700)


def test_a_full_disk_is_no_error_and_leaves_nothing(folder, searches, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibration_cache.os, "fsync", full)
    assert in_a_new_process() > 0
    assert not list(folder.iterdir())


def test_no_home_is_no_error(searches, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FLOWER_DP_LORA_CALIBRATIONS", "FLOWER_DP_LORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(calibration_cache.Path, "home", homeless)
    assert in_a_new_process() > 0
    assert len(searches) == 1


def _keep_and_read(path: str, number: float) -> set[float | None]:
    os.environ["FLOWER_DP_LORA_CALIBRATIONS"] = path
    seen = set()
    for _ in range(50):
        calibration_cache.store(INPUTS, number)
        seen.add(calibration_cache.load(INPUTS, **LIMITS))
    return seen


def test_processes_that_write_at_once_see_whole_files_only(folder):
    numbers = {1.0, 12345.6789}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(numbers), mp_context=context) as pool:
        paths = [str(folder)] * len(numbers)
        for seen in pool.map(_keep_and_read, paths, sorted(numbers)):
            assert seen <= numbers
    assert kept_number(folder) in numbers  # and nothing half-written lies beside it


def test_threads_that_write_at_once_see_whole_files_only(folder):
    numbers = {1.0, 12345.6789, 0.5}
    with concurrent.futures.ThreadPoolExecutor(len(numbers)) as pool:
        for seen in pool.map(_keep_and_read, [str(folder)] * len(numbers), sorted(numbers)):
            assert seen <= numbers
    assert kept_number(folder) in numbers


@pytest.mark.parametrize(
    ("own", "project", "shared", "expected"),
    [
        ("{0}/own", "{0}/project", "{0}/xdg", "{0}/own"),
        ("", "{0}/project", "{0}/xdg", "{0}/project/calibrations"),
        ("", "", "{0}/xdg", "{0}/xdg/flower-dp-lora/calibrations"),
        ("", "", "relative", "{0}/home/.cache/flower-dp-lora/calibrations"),
        ("", "", "", "{0}/home/.cache/flower-dp-lora/calibrations"),
    ],
)
def test_the_folder_follows_the_environment(own, project, shared, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLOWER_DP_LORA_CALIBRATIONS", own.format(tmp_path))
    monkeypatch.setenv("FLOWER_DP_LORA_CACHE", project.format(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", shared.format(tmp_path))
    assert calibration_cache.calibration_folder() == Path(expected.format(tmp_path))


def test_the_folder_is_beside_the_backbones(monkeypatch, tmp_path):
    from task.embedded import cache_folder

    monkeypatch.delenv("FLOWER_DP_LORA_CALIBRATIONS")
    for name in ("FLOWER_DP_LORA_CACHE", "XDG_CACHE_HOME"):
        assert calibration_cache.calibration_folder().parent == cache_folder()
        monkeypatch.setenv(name, str(tmp_path / name))
        assert calibration_cache.calibration_folder().parent == cache_folder()
        monkeypatch.delenv(name)


def test_tests_leave_the_users_own_calibrations_alone():
    assert "pytest" in str(calibration_cache.calibration_folder())
