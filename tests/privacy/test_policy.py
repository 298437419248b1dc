"""A site's policy file: every key, every refusal."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from privacy import AskedFor, BudgetLimit, DatasetRules, PolicyError, PolicyRefusal, SitePolicy

GOOD = """
[ledger]
path = "/var/lib/dp/ledger"
head = "/mnt/other/head.json"

[datasets.scans]
data-paths = ["/data/scans.npz"]
max-epsilon = 8.0
max-delta = 1e-5
tasks = ["image-classification"]
"""
ASKED = AskedFor(
    task="image-classification",
    columns=(),
    mode="record",
    seeded_noise=False,
    target_epsilon=8.0,
    target_delta=5e-6,
    tells_count="",
)


def load(folder: Path, text: str = GOOD, mode: int = 0o600) -> SitePolicy:
    path = folder / "policy.toml"
    path.write_text(text)
    path.chmod(mode)
    return SitePolicy.load(path)


def rules(**changes: object) -> DatasetRules:
    values = {
        "data-paths": ["/data/scans.npz"],
        "max-epsilon": 8.0,
        "max-delta": 1e-5,
        "tasks": ["image-classification"],
    }
    return DatasetRules.model_validate(
        {**values, **{key.replace("_", "-"): value for key, value in changes.items()}}
    )


def test_a_policy_is_read_and_its_defaults_are_strict(tmp_path):
    policy = load(tmp_path)
    (scans,) = policy.datasets.values()
    assert policy.ledger.path == "/var/lib/dp/ledger"
    assert scans.only_privatised and scans.min_records == 100
    assert scans.columns == [] and scans.public_records == 0 and scans.reply_at == 0
    assert policy.limits() == {"scans": BudgetLimit(8.0, 1e-5)}
    assert policy.dataset_of("/data/scans.npz") == "scans"


def test_every_key_can_be_set(tmp_path):
    text = (
        GOOD
        + """
        min-records = 500
        columns = ["text", "label"]
        only-privatised = false
        public-records = 1000
        reply-at = 60
    """
    )
    scans = load(tmp_path, text.replace("8.0", "8")).datasets["scans"]
    assert (scans.min_records, scans.columns) == (500, ["text", "label"])
    assert not scans.only_privatised
    assert (scans.public_records, scans.reply_at, scans.max_epsilon) == (1000, 60.0, 8.0)


SET = "datasets.scans"


@pytest.mark.parametrize(
    ("old", "new", "key", "says"),
    [
        ("[ledger]", "[ledgers]", "ledger", "is missing"),
        ("[ledger]", "[ledger]\nold = 1", "ledger.old", "no such key"),
        ("head = ", "haed = ", "ledger.head", "is missing"),
        ('"/var/lib/dp/ledger"', '""', "ledger.path", "at least 1 character"),
        ('"/var/lib/dp/ledger"', '"ledger"', "ledger", "must be absolute, got ledger"),
        ('"/mnt/other/head.json"', '"head.json"', "ledger", "must be absolute"),
        ('"/mnt/other/head.json"', '"/var/lib/dp/ledger/head"', "ledger", "must lie outside"),
        ('"/mnt/other/head.json"', '"/var/lib/dp/x/../ledger/head"', "ledger", "must lie outside"),
        ("[datasets.scans]", "[datasets]", "datasets.data-paths", ""),
        ("[datasets.scans]", '[datasets."a b"]', "datasets.a b", "should match pattern"),
        ("[datasets.scans]", "[datasets.-x]", "datasets.-x", "should match pattern"),
        ('["/data/scans.npz"]', "[]", f"{SET}.data-paths", "at least 1 item"),
        ('["/data/scans.npz"]', '"/data/scans.npz"', f"{SET}.data-paths", "valid list"),
        ('["/data/scans.npz"]', '["scans.npz"]', SET, "must be absolute, got 'scans.npz'"),
        ("max-epsilon = 8.0", "", f"{SET}.max-epsilon", "is missing"),
        ("8.0", "0", f"{SET}.max-epsilon", "got 0; Input should be greater than 0"),
        ("8.0", "-1.0", f"{SET}.max-epsilon", "got -1.0"),
        ("8.0", "nan", f"{SET}.max-epsilon", "got nan"),
        ("8.0", "inf", f"{SET}.max-epsilon", "got inf"),
        ("8.0", '"8"', f"{SET}.max-epsilon", "got '8'; Input should be a valid number"),
        ("8.0", "true", f"{SET}.max-epsilon", "got True"),
        ("1e-5", "0.0", f"{SET}.max-delta", "got 0.0"),
        ("1e-5", "1.0", f"{SET}.max-delta", "got 1.0"),
        ("1e-5", "0.01", SET, "below 1 / min-records (or public-records) = 1.00e-02, got 0.01"),
        ("1e-5", "1e-5\nmin-records = 100000", SET, "got 1e-05"),
        ("1e-5", "0.03\nmin-records = 100\npublic-records = 50", SET, "= 2.00e-02, got 0.03"),
        ("1e-5", "1e-5\nmin-records = 0", f"{SET}.min-records", "got 0"),
        ("1e-5", "1e-5\nmin-records = 5.0", f"{SET}.min-records", "got 5.0"),
        ("1e-5", "1e-5\npublic-records = -1", f"{SET}.public-records", "got -1"),
        ("1e-5", "1e-5\nreply-at = -1", f"{SET}.reply-at", "got -1"),
        ("1e-5", "1e-5\nreply-at = inf", f"{SET}.reply-at", "less than or equal to 86400"),
        ("1e-5", "1e-5\nreply-at = 86401", f"{SET}.reply-at", "got 86401"),
        ("1e-5", '1e-5\nonly-privatised = "no"', f"{SET}.only-privatised", "valid boolean"),
        ("1e-5", '1e-5\ncolumns = "text"', f"{SET}.columns", "valid list"),
        ("1e-5", "1e-5\nmax-epsilom = 1", f"{SET}.max-epsilom", "no such key"),
        ("1e-5", "1e-5\nmax_delta = 1e-5", f"{SET}.max_delta", ""),
        ('["image-classification"]', "[]", f"{SET}.tasks", "at least 1 item"),
        ('["image-classification"]', '[""]', f"{SET}.tasks.0", "at least 1 character"),
        ('["image-classification"]', "[1]", f"{SET}.tasks.0", "got 1"),
    ],
)
def test_a_wrong_key_is_refused_by_file_and_name(tmp_path, old, new, key, says):
    assert old in GOOD
    with pytest.raises(PolicyError) as refused:
        load(tmp_path, GOOD.replace(old, new))
    text = str(refused.value)
    assert text.startswith(f"policy {tmp_path / 'policy.toml'}")
    assert f"  {key}: " in text and says in text


@pytest.mark.parametrize("content", [b"[ledger", b"\xff\xfe", b"a = 1\na = 2", b""])
def test_what_is_no_policy_is_refused(tmp_path, content):
    path = tmp_path / "policy.toml"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(PolicyError, match=r"policy\.toml"):
        SitePolicy.load(path)


def test_a_policy_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(PolicyError, match="cannot be read"):
            SitePolicy.load(path)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o777])
def test_a_policy_that_others_could_change_is_refused(tmp_path, mode):
    with pytest.raises(PolicyError, match=rf"others could change it, its mode is {mode:04o}; acc"):
        load(tmp_path, mode=mode)


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o400, 0o444])
def test_a_policy_that_others_may_read_is_accepted(tmp_path, mode):
    assert load(tmp_path, mode=mode).datasets


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_policy_of_another_user_is_refused(tmp_path):
    load(tmp_path)
    os.chown(tmp_path / "policy.toml", 4711, 4711)
    with pytest.raises(PolicyError, match="it belongs to another user"):
        SitePolicy.load(tmp_path / "policy.toml")


def two_sets(first: str, second: str) -> str:
    other = GOOD[GOOD.index("[datasets") :].replace("scans]", "texts]")
    return GOOD.replace("/data/scans.npz", first) + other.replace("/data/scans.npz", second)


def test_one_path_is_of_one_data_set(tmp_path):
    file = tmp_path / "data.npz"
    file.write_bytes(b"x")
    (tmp_path / "link.npz").symlink_to(file)
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path)
    for same in (file, tmp_path / "link.npz", f"{tmp_path}/folder/../data.npz",
                 f"{tmp_path}//data.npz", tmp_path / "linked" / "data.npz"):  # fmt: skip
        with pytest.raises(PolicyError, match="belongs to both scans and texts"):
            load(tmp_path, two_sets(str(file), str(same)))
    assert len(load(tmp_path, two_sets(str(file), f"{file}2")).datasets) == 2


def test_a_path_is_found_however_it_is_written(tmp_path, monkeypatch):
    file = tmp_path / "data.npz"
    file.write_bytes(b"x")
    (tmp_path / "link.npz").symlink_to(file)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    monkeypatch.setenv("HOME", str(tmp_path))
    for declared in (str(file), str(tmp_path / "link.npz"), "~/data.npz"):
        policy = load(tmp_path, GOOD.replace("/data/scans.npz", declared))
        for asked in (str(file), f"{tmp_path}/link.npz", "../data.npz", "~/data.npz"):
            assert policy.dataset_of(asked) == "scans"
        for other in (str(tmp_path), f"{file}2", "data.npz", "/", ""):
            with pytest.raises(PolicyRefusal, match="names it in no data set"):
                policy.dataset_of(other)


@pytest.mark.parametrize(
    ("changes", "asked", "says"),
    [
        ({}, {"task": "text-classification"},
         "the task is 'text-classification'; accepted: image-classification"),
        ({"columns": ["text"]}, {"columns": ("text", "name")},
         "a data column is 'name'; accepted: text"),
        ({}, {"mode": "none"}, "privacy.mode is 'none'; accepted: record"),
        ({}, {"seeded_noise": True}, "privacy.insecure-test-seed is 'a seed'; accepted: -1"),
        ({}, {"tells_count": "strategy.weighting = 'public-counts'"},
         "a setting that tells the record count is"),
        ({}, {"target_epsilon": 8.1}, "privacy.target-epsilon is 8.1; accepted: 8 at most"),
        ({}, {"target_delta": 5.1e-6}, "privacy.target-delta is 5.1e-06; accepted: 5e-06 at most"),
        ({"only_privatised": False}, {"target_epsilon": 9.0}, "privacy.target-epsilon is 9.0"),
        ({"public_records": 200}, {"target_delta": 1e-5}, "privacy.target-delta is 1e-05"),
    ],
)  # fmt: skip
def test_a_run_that_asks_for_more_is_refused(changes, asked, says):
    with pytest.raises(PolicyRefusal) as refused:
        rules(**changes).check(dataclasses.replace(ASKED, **asked))
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, {}),
        ({}, {"target_epsilon": 0.1, "target_delta": 1e-9}),
        ({"columns": ["text", "label"]}, {"columns": ("text", "label")}),
        ({}, {"columns": ("any",)}),
        ({"public_records": 200}, {"tells_count": "strategy.weighting = 'public-counts'"}),
        ({"only_privatised": False}, {"tells_count": "x"}),
        ({"only_privatised": False}, {"mode": "none"}),
        ({"only_privatised": False}, {"seeded_noise": True}),
        ({"tasks": ["text-classification", "image-classification"]}, {}),
    ],
)
def test_a_run_that_asks_for_less_is_allowed(changes, asked):
    one = rules(**changes)
    assert one.check(dataclasses.replace(ASKED, **asked)) is None
    with pytest.raises(PolicyRefusal, match="the task"):  # the very same run, for another task
        one.check(dataclasses.replace(ASKED, **asked, task="mind-reading"))


def test_few_records_are_refused_without_saying_how_few():
    rules(min_records=50).check_count(50)
    with pytest.raises(PolicyRefusal, match=r"min-records is 50; the data set has fewer records$"):
        rules(min_records=50).check_count(49)


def test_a_delta_that_allows_publishing_a_record_is_refused():
    """Also where a smaller public figure hides how many there are."""
    one_in_a_hundred = rules(max_delta=0.0099, min_records=10, public_records=50)
    one_in_a_hundred.check_count(101)
    with pytest.raises(PolicyRefusal, match=r"max-delta is 0\.0099; accepted .* 1 / records"):
        one_in_a_hundred.check_count(102)


def test_the_public_figure_stands_for_the_count():
    assert rules().counts(123) == 123
    assert rules(public_records=200).counts(123) == 200


def test_a_run_without_a_guarantee_is_bound_by_those_that_protect_their_records(tmp_path):
    """Its own data set allows it; one that shares records with it may not."""
    text = two_sets("/data/a.npz", "/data/b.npz") + "only-privatised = false\n"
    policy = load(tmp_path, text)
    free = dataclasses.replace(ASKED, mode="none")
    assert set(policy.limits()) == set(policy.limits(ASKED)) == {"scans", "texts"}
    assert set(policy.limits(free)) == {"scans"}
    seeded = dataclasses.replace(ASKED, seeded_noise=True)
    assert set(policy.limits(seeded)) == {"scans"}


def test_the_pages_example_is_a_policy(tmp_path):
    """docs/site.md, copied as it stands."""
    page = Path(__file__).resolve().parents[2] / "docs" / "site.md"
    example = page.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0]
    file = tmp_path / "policy.toml"
    file.write_text(example, encoding="utf-8")
    file.chmod(0o600)
    one = SitePolicy.load(file).datasets["radiology"]
    assert one.only_privatised
    asked = dataclasses.replace(ASKED, task="text-classification", columns=("text", "label"))
    one.check(asked)
    table = page.read_text(encoding="utf-8").split("| key | says |")[1].split("\n\n")[0]
    keys = {key.replace("_", "-") for key in DatasetRules.model_fields}
    assert keys <= set(re.findall(r"`([a-z-]+)`", table))
