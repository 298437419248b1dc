"""The benchmark of a private step on tiny models: its checks, its bars and its forms."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks import private_step, step_checks, step_memory, step_table
from benchmarks.step_arms import FLOOR, StepError, make_arm, names_for
from benchmarks.step_models import MODELS, SETS, ModelSpec, Subject
from privacy import FusedEngine
from tests.models import TINY_TEXT

RECORDS = 3


def _tiny(name: str, size: int, **arguments: object) -> ModelSpec:
    spec = MODELS[name]
    return dataclasses.replace(spec, size=size, arguments={**spec.arguments, **arguments})


TINY = {
    "vit-tiny": _tiny(
        "vit-tiny", 16, img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ),
    "swin-tiny": _tiny(
        "swin-tiny", 32, img_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2]
    ),
    "roberta-small": _tiny("roberta-small", 24, vocab_size=60, **TINY_TEXT),
    "minilm": _tiny("minilm", 24, vocab_size=60, **TINY_TEXT),
}


@pytest.fixture(scope="module", params=list(TINY))
def subject(request: pytest.FixtureRequest) -> Subject:
    return _subject(request.param)


def _subject(name: str, dtype: str = "float32") -> Subject:
    return Subject(TINY[name], RECORDS, 0, "cpu", dtype)


def _arms(subject: Subject) -> dict:
    names = names_for(subject.spec.suits_opacus)
    return {name: make_arm(name, subject, RECORDS) for name in names}


def test_all_arms_compute_the_same_and_move_what_they_train(subject):
    arms = _arms(subject)
    assert len(arms) == (13 if subject.spec.suits_opacus else 10)
    rows = step_checks.same_thing(arms, "float32")
    assert len(rows) == (15 if subject.spec.suits_opacus else 9)
    start = {name: p.detach().clone() for name, p in subject.adapter.items()}
    for arm in arms.values():
        for _ in range(2):
            arm.prepare()
            arm.step()
            arm.settle()
    assert all(torch.equal(start[name], p) for name, p in subject.adapter.items())
    # Layers that PEFT computes would be timed under the fused engine's name.
    assert not arms["private B"]._engine.not_fused


def test_half_precision_passes_its_own_limits():
    subject = _subject("vit-tiny", "bfloat16")
    rows = step_checks.same_thing(_arms(subject), "bfloat16")
    assert max(row["error"] for row in rows) > step_checks.SUM_ERROR["float32"]


def test_equal_seeds_make_equal_subjects_and_texts_have_padding():
    one, other = _subject("minilm"), _subject("minilm")
    records = range(RECORDS)
    losses = [each.losses(each.model, RECORDS).tolist() for each in (one, other)]
    assert losses[0] == losses[1]
    lengths = [int(one._inputs["attention_mask"][record].sum()) for record in records]
    assert lengths[0] == 24 and min(lengths) < 24
    assert float(one._inputs["input_ids"][one._inputs["attention_mask"] == 0].max()) == 0


def test_the_floor_goes_back_to_the_first_block_and_no_further(subject):
    seen = {}
    arm = make_arm(FLOOR, subject, RECORDS)
    path = {"vit": "blocks.0", "swin": "layers.0"}.get(
        subject.spec.family, f"{subject.spec.family}.encoder.layer.0"
    )
    block = arm._backbone.get_submodule(path)
    block.register_forward_pre_hook(lambda _, args: seen.update(leaf=args[0]))
    arm.prepare()
    arm.step()
    assert seen["leaf"].is_leaf and seen["leaf"].grad.abs().sum() > 0
    assert all(p.grad is None for p in arm._backbone.parameters())


@pytest.mark.parametrize(("what", "factor"), [("unclipped", 1.01), ("clipped", 1.0001)])
def test_an_arm_that_computes_another_sum_is_found(what, factor):
    arms = _arms(_subject("vit-tiny"))
    arm = arms["private A"]
    honest = arm.summed

    def tampered(norm: float) -> dict[str, torch.Tensor]:
        total = honest(norm)
        if (norm == float("inf")) == (what == "unclipped"):
            total = {name: factor * value for name, value in total.items()}
        return total

    arm.summed = tampered
    with pytest.raises(StepError, match=f"private A.*{what}.*not the same sum"):
        step_checks.same_thing(arms, "float32")


def test_a_step_that_moves_nothing_or_too_much_is_found():
    subject = _subject("vit-tiny")
    arm = make_arm("private B", subject, RECORDS)
    with pytest.raises(StepError, match="did not move"):
        arm.settle()
    for name, fault in (("lora_A", 1.0), ("lora_B", float("nan"))):
        subject = _subject("vit-tiny")
        arm = make_arm("private B", subject, RECORDS)
        arm.prepare()
        arm.step()
        with torch.no_grad():
            next(p for key, p in subject.adapter.items() if name in key).add_(fault)
        with pytest.raises(StepError, match="moved" if fault == 1 else "not finite"):
            arm.settle()


def test_live_memory_is_counted_exactly():
    values = torch.ones(1000)

    class Steps:
        def prepare(self) -> None: ...

        settle = prepare

        def step(self) -> None:
            for _ in range(3):
                two = torch.cat([values, values])  # 8 kB
                del two
            first, second = values.clone(), values.clone()  # 4 kB each, both alive
            del first, second

    assert step_memory.live_peak(Steps()) == 8000


def test_the_whole_command_prints_every_row(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(private_step, "MODELS", TINY)
    _no_bars(monkeypatch)
    arguments = ["--models", "vit-tiny", "--batch", str(RECORDS), "--repeats", "2"]
    arguments += ["--warmup", "0", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(step_memory, "child", _without_a_process)
    assert private_step.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"machine", "rows", "bars"}
    assert not any(isinstance(v, dict | list) for row in result["rows"] for v in row.values())
    # The text is made of the same rows.
    text = step_table.table(result["rows"], result["bars"])
    assert text.count("| vit-tiny | ") == 13 + 9 + 6
    assert "the usual allocator" in text and "Batch 3, float32 on cpu." in text
    by_kind = {kind: [r for r in result["rows"] if r["kind"] == kind] for kind in KINDS}
    assert {row["arm"] for row in by_kind["time"]} == set(names_for(True))
    expected = {f"{side} {s}" for side in ("peft", "private", "opacus") for s in SETS}
    assert {row["arm"] for row in by_kind["memory"]} == expected
    assert all(row["ms"] > 0 for row in by_kind["time"])
    assert all(row["live_mb"] > 0 for row in by_kind["memory"])
    assert len(by_kind["alternation"]) == 6 and len(by_kind["check"]) == 15


def test_a_process_of_its_own_measures_memory():
    options = {"records": RECORDS, "seed": 0, "device": "cpu", "dtype": "float32", "threads": 1}
    here = step_memory.live_peak(make_arm("private B", _subject("vit-tiny"), RECORDS))
    row = step_memory.child(TINY["vit-tiny"], "private B", "returning", options)
    assert set(row) == {"rss_mb", "live_mb"}
    assert row["live_mb"] == pytest.approx(here / 1e6, rel=0.01)


def test_arms_that_differ_end_the_command_and_are_named(capsys, monkeypatch):
    monkeypatch.setattr(private_step, "MODELS", TINY)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    honest = FusedEngine.clipped_sum

    def doubled(self, *arguments):
        return {name: 2 * value for name, value in honest(self, *arguments).items()}

    monkeypatch.setattr(FusedEngine, "clipped_sum", doubled)
    threads = str(torch.get_num_threads())
    arguments = ["--models", "vit-tiny", "--batch", "2", "--threads", threads]
    assert private_step.main(arguments) == 1
    output = capsys.readouterr()
    assert not output.out
    assert "vit-tiny: private B, unclipped, and peft: not the same sum" in output.err


def test_a_slow_or_a_large_arm_fails_the_command(capsys, monkeypatch):
    monkeypatch.setattr(private_step, "measure", lambda spec, model, options: _rows())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = str(torch.get_num_threads())
    arguments = ["--models", "vit-tiny", "--threads", threads]
    assert private_step.main(arguments) == 0
    text = capsys.readouterr().out
    assert "| vit-tiny | private B | 80.0 | 0.800 (0.800 to 0.800) |" in text
    assert "vit-tiny, time: private B over peft both: 0.800 (limit 0.95): holds" in text
    assert "| vit-tiny | private | time | 1.000 (1.000 to 1.000) | 0.57 / 0.5 |" in text
    assert text.count("holds") == 8
    faults = {
        "time: private A over peft both": {"seconds": {"private A": 0.096, "opacus A": 0.12}},
        "time: private B over opacus B": {"seconds": {"opacus B": 0.085}},
        "peak RSS: private A over peft both": {"memory": {"private A": 76.0}},
        "peak RSS: private B over opacus B": {"memory": {"opacus B": 60.0}},
    }
    for failing, fault in faults.items():
        monkeypatch.setattr(
            private_step, "measure", lambda spec, model, options, f=fault: _rows(**f)
        )
        assert private_step.main(arguments) == 1
        lines = capsys.readouterr().out.splitlines()
        assert (
            [line for line in lines if "FAILS" in line]
            == [line for line in lines if line.startswith(f"vit-tiny, {failing}: ")]
            != []
        )


def test_ratios_are_taken_within_repetitions():
    seconds = {name: [1.0, 2.0, 4.0] for name in names_for(True)}
    seconds["private B"] = [0.5, 1.0, 4.0]
    rows = {row.get("arm"): row for row in private_step.summarise(seconds)}
    row = rows["private B"]
    assert (row["over_peft_both_low"], row["over_peft_both"]) == (0.5, 0.5)
    assert row["over_peft_both_high"] == 0.75
    assert row["ms"] == 1000
    assert private_step.references(FLOOR).keys() == {"peft_both"}


KINDS = ("check", "time", "memory", "alternation")
_LIMITS = ("TIME_LIMITS", "TIME_LIMITS_OPACUS", "MEMORY_LIMITS", "MEMORY_LIMITS_OPACUS")


def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time and memory of tiny models are not what is promised."""
    for name in _LIMITS:
        monkeypatch.setattr(private_step, name, {})


def _without_a_process(
    spec: ModelSpec, arm: str, allocator: str, settings: dict
) -> dict[str, float]:
    subject = Subject(spec, settings["records"], 0, "cpu", "float32")
    peak = step_memory.live_peak(make_arm(arm, subject, settings["records"]))
    return {"rss_mb": 2 * peak / 1e6, "live_mb": peak / 1e6}


def _rows(seconds: dict | None = None, memory: dict | None = None) -> list[dict]:
    """What ``measure`` gives where private steps take 0.8 of the time and 0.6 of the memory."""
    names = names_for(True)
    times = {name: 0.08 if "private" in name else 0.1 for name in names} | (seconds or {})
    peaks = {name: 60.0 if "private" in name else 100.0 for name in names[:-1]} | (memory or {})
    check = {"kind": "check", "error": 1e-7, "limit": 1e-5}
    rows = [
        *({**check, "check": f"one and other, {what}"} for what in ("unclipped", "clipped")),
        *private_step.summarise({name: [value] * 3 for name, value in times.items()}),
        *private_step.compare_memory(
            {name: {"rss_mb": peak, "live_mb": peak} for name, peak in peaks.items()}
        ),
    ]
    return [
        {**row, "device": "cpu", "dtype": "float32", "batch": 32, "allocator": "usual"}
        for row in rows
    ]
