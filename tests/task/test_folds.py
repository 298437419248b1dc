"""Folds in the frozen weights: bit-identity, refusals, and exports that need no folds."""

from __future__ import annotations

import json
import math

import pytest
import torch

from task.errors import ModelError
from task.folds import is_fold, pair_folds
from task.model import build_task_model
from task.settings import LoRASettings
from tests.task.test_lora_model import fresh_base, stir

KINDS = ("vit", "roberta", "bert")


@pytest.fixture
def built(settings_of, lora):
    return build_task_model(settings_of("vit"), lora, 3, seed=5)


def lora_layers(model):
    """Give the LoRA modules by the names that folds use."""
    ending = ".lora_A.weight"
    names = [name.removesuffix(ending) for name in model.adapter if name.endswith(ending)]
    return {name: model.model.get_submodule(name) for name in names}


def make_folds(model, numbers, rank=2, *, seed=0, layers=None, scale=0.1):
    """Draw one term per layer and number; a number's terms do not depend on the others."""
    folds = {}
    for number in numbers:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        for layer, module in lora_layers(model).items():
            m, n = module.weight.shape
            for side, shape in (("A", (rank, n)), ("B", (m, rank))):
                drawn = torch.randn(shape, generator=generator) * scale
                if layers is None or layer in layers:
                    folds[f"{layer}.fold_{side}.{number:06d}.weight"] = drawn
    return folds


def weights(model):
    return {name: m.weight.detach().clone() for name, m in lora_layers(model).items()}


def bits(model):
    """Give every bit of the model."""
    return {n: t.detach().clone().view(torch.uint8) for n, t in model.model.state_dict().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def logits(model, batch):
    model.model.eval()
    with torch.no_grad():
        return model.logits(batch)


def test_unset_restores_every_bit(built):
    before, parameters = bits(built), dict(built.model.named_parameters())
    built.set_folds(make_folds(built, [1, 2]))
    assert not equal(bits(built), before)
    built.set_folds({})
    assert equal(bits(built), before)
    now = dict(built.model.named_parameters())
    assert all(now[name] is parameters[name] for name in parameters)


def test_weights_are_the_sum_by_ascending_number(built):
    before, fingerprint = weights(built), built.fingerprint
    # The mapping's own order is another one, and 10 comes after 9.
    folds = make_folds(built, [10, 9, 2])
    built.set_folds(folds)
    for layer, weight in weights(built).items():
        expected = before[layer]
        for number in (2, 9, 10):
            a, b = (folds[f"{layer}.fold_{side}.{number:06d}.weight"] for side in "AB")
            expected = expected + 3.0 * (b @ a)
        assert torch.equal(weight, expected)
    assert built.fingerprint == fingerprint


def test_history_does_not_matter(settings_of, lora):
    one, two = (build_task_model(settings_of("roberta"), lora, 3, seed=5) for _ in range(2))
    names = list(lora_layers(one))
    first = make_folds(one, [1, 5], seed=1, scale=10)
    second = make_folds(one, [1, 2], seed=2, layers=names[1:])
    one.set_folds(first)
    one.set_folds(second)
    two.set_folds(second)
    assert equal(bits(one), bits(two))


def test_incremental_numbers(settings_of, lora):
    one, two = (build_task_model(settings_of("vit"), lora, 3, seed=5) for _ in range(2))
    for last in (1, 2, 3):
        one.set_folds(make_folds(one, range(1, last + 1)))
    two.set_folds(make_folds(two, [3, 2, 1]))
    assert equal(bits(one), bits(two))
    one.set_folds(make_folds(one, [2]))
    two.set_folds({})
    two.set_folds(make_folds(two, [2]))
    assert equal(bits(one), bits(two))


def test_the_same_folds_again_are_not_computed_again(built):
    parameters = [module.weight for module in lora_layers(built).values()]
    names = list(lora_layers(built))
    folds = make_folds(built, [1])
    built.set_folds(folds)
    places = [p.data_ptr() for p in parameters]
    built.set_folds({name: tensor.clone() for name, tensor in folds.items()})
    assert [p.data_ptr() for p in parameters] == places
    # A change in place is seen, as copies are kept, and concerns only its own layer.
    folds[f"{names[0]}.fold_A.000001.weight"][0, 0] += 1
    built.set_folds(folds)
    assert [p.data_ptr() != old for p, old in zip(parameters, places, strict=True)] == [
        name == names[0] for name in names
    ]


def test_products_are_float32_under_autocast_and_from_other_dtypes(built):
    folds = make_folds(built, [1])
    built.set_folds(folds)
    expected = bits(built)
    built.set_folds({})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        built.set_folds({name: t.double().requires_grad_() for name, t in folds.items()})
    assert equal(bits(built), expected)
    assert not any(p.requires_grad for p in built.model.parameters())


def test_half_precision_backbones_are_restored(built):
    layer, module = next(iter(lora_layers(built).items()))
    module.get_base_layer().to(torch.bfloat16)
    before = module.weight.detach().clone()
    folds = make_folds(built, [1, 2], layers=[layer])
    built.set_folds(folds)
    (_, b1, a1), (_, b2, a2) = pair_folds(folds)[layer]
    expected = (before.float() + 3.0 * (b1 @ a1) + 3.0 * (b2 @ a2)).bfloat16()
    assert torch.equal(module.weight, expected)
    built.set_folds({})
    assert module.weight.dtype == torch.bfloat16 and torch.equal(module.weight, before)


def test_load_adapter_state_sets_and_unsets(built):
    before = bits(built)
    state, folds = built.adapter_state(), make_folds(built, [4])
    changed = {name: tensor + 1 for name, tensor in state.items()}
    built.load_adapter_state({**folds, **changed})
    assert equal(built.adapter_state(), changed)
    after = weights(built)
    built.load_adapter_state(state)
    assert equal(bits(built), before)
    built.set_folds(folds)
    assert equal(weights(built), after)
    assert built.to("cpu") is built


def but(folds, **changes):
    """Give the folds with other tensors under A's or B's name; None takes the tensor out."""
    names = {"a": QKV.format("A"), "b": QKV.format("B")}
    new = {**folds, **{names[side]: change for side, change in changes.items()}}
    return {name: tensor for name, tensor in new.items() if tensor is not None}


def called(folds, name):
    """Give the folds with B under another name."""
    return {**but(folds, b=None), name: folds[QKV.format("B")]}


QKV = "base_model.model.blocks.1.attn.qkv.fold_{}.000002.weight"
B = QKV.format("B")
REFUSED = {
    "no B": (lambda f, a, b: but(f, b=None), "no partner"),
    "no A": (lambda f, a, b: but(f, a=None), "no partner"),
    "other number": (lambda f, a, b: called(f, B.replace("02.", "03.")), "no partner"),
    "short number": (lambda f, a, b: called(f, B.replace("000002", "2")), r"\.2\.weight does not"),
    "long number": (lambda f, a, b: called(f, B.replace("000", "0000")), "does not name"),
    "no number": (lambda f, a, b: called(f, B.replace("000002", "last")), "does not name"),
    "ending": (lambda f, a, b: called(f, B.replace("weight", "bias")), "does not name"),
    "unknown layer": (
        lambda f, a, b: {**f, "x.y.fold_A.000001.weight": a, "x.y.fold_B.000001.weight": b},
        r"no LoRA layer is called x\.y",
    ),
    "layer without LoRA": (
        lambda f, a, b: {
            QKV.format(side).replace("attn.qkv", "mlp.fc1"): t for side, t in (("A", a), ("B", b))
        },
        "no LoRA layer is called",
    ),
    "inner ranks": (lambda f, a, b: but(f, b=b[:, :1]), "accepted are"),
    "rows": (lambda f, a, b: but(f, b=b[1:]), r"fold_B\.000002\.weight is"),
    "columns": (lambda f, a, b: but(f, a=a[:, 1:]), r"fold_A\.000002\.weight is"),
    "rank 0": (lambda f, a, b: but(f, a=a[:0], b=b[:, :0]), "not empty"),
    "vector": (lambda f, a, b: but(f, a=a[0]), "matrix"),
    "integers": (lambda f, a, b: but(f, a=a.long()), "int64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folds_that_do_not_fit_change_nothing(case, built):
    change, message = REFUSED[case]
    built.set_folds(make_folds(built, [1], seed=7))
    before, good = bits(built), make_folds(built, [1, 2])
    bad = change(good, good[QKV.format("A")], good[B])
    with pytest.raises(ModelError, match=message):
        built.set_folds(bad)
    state = {name: tensor + 1 for name, tensor in built.adapter_state().items()}
    with pytest.raises(ModelError, match=message):
        built.load_adapter_state({**state, **bad})
    assert equal(bits(built), before)


def test_good_folds_with_a_bad_adapter_change_nothing(built):
    before, state = bits(built), built.adapter_state()
    last = list(state)[-1]
    folds = make_folds(built, [1])
    bad = ({k: v for k, v in state.items() if k != last}, {**state, last: state[last][:1]})
    for adapter in (*bad, {**state, "extra": torch.zeros(1)}):
        with pytest.raises(ModelError, match="accepted"):
            built.load_adapter_state({**adapter, **folds})
        with pytest.raises(ModelError, match="does not name"):
            built.set_folds(adapter)
    assert equal(bits(built), before)


def test_a_shared_weight_is_refused(built):
    folds = make_folds(built, [1])
    one, two = list(lora_layers(built).values())[0:3:2]
    two.get_base_layer().weight = one.get_base_layer().weight
    before = bits(built)
    with pytest.raises(ModelError, match="shares its weight"):
        built.set_folds(folds)
    assert equal(bits(built), before)


def test_names():
    assert is_fold("x.fold_A.000001.weight") and is_fold("x.fold_B.000001.weight")
    assert not is_fold("x.lora_A.weight") and not is_fold("fold_A.weight")
    tensors = {
        f"x.fold_{side}.{number}.weight": torch.ones(shape)
        for number in ("1000000", "000009")
        for side, shape in (("B", (3, 2)), ("A", (2, 4)))
    }
    assert [number for number, _, _ in pair_folds(tensors)["x"]] == [9, 1000000]
    assert pair_folds({}) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_merged_weights(kind, settings_of, lora):
    one, two = (build_task_model(settings_of(kind), lora, 3, seed=5) for _ in range(2))
    stir(one)
    stir(two)
    batch = one.made_up_batch(4)
    plain = logits(one, batch)
    folds = make_folds(one, [1, 2])
    one.set_folds(folds)
    with torch.no_grad():
        for layer, module in lora_layers(two).items():
            for _, b, a in pair_folds(folds)[layer]:
                module.weight.add_(6 / 2 * b @ a)
    folded = logits(one, batch)
    torch.testing.assert_close(folded, logits(two, batch), rtol=1e-5, atol=1e-6)
    assert (folded - plain).abs().max() > 1e-3
    one.set_folds({})
    assert torch.equal(logits(one, batch), plain)


def reload(kind, folder, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(fresh_base(kind, folder, 3), adapter).eval()


def compare(kind, built, loaded):
    """Compare the logits, and every layer's scaling with the built model's."""
    batch = built.made_up_batch(4)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    ours = logits(built, batch)
    with torch.no_grad():
        theirs = loaded(inputs["pixel_values"]) if kind == "vit" else loaded(**inputs).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=3e-6)
    for layer, module in lora_layers(built).items():
        got = loaded.get_submodule(layer).scaling["default"]
        assert math.isclose(got, module.scaling["default"], rel_tol=1e-14)


# The layers' min(m, n) is 32: 2 + 3 * 2 lies below, 2 + 3 * 10 on it, 2 + 3 * 40 above.
@pytest.mark.parametrize(("rank", "exported"), [(2, 8), (10, 32), (40, 32)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error:.*did not match any targeted module")
def test_export_needs_no_folds(kind, rank, exported, settings_of, folder_of, lora, tmp_path):
    built = build_task_model(settings_of(kind), lora, 3, seed=5)
    stir(built)
    plain = logits(built, built.made_up_batch(4))
    built.set_folds(make_folds(built, [1, 2, 7], rank))
    before = bits(built)
    built.save_adapter(tmp_path / "adapter")
    assert equal(bits(built), before)
    loaded = reload(kind, folder_of(kind), tmp_path / "adapter")
    compare(kind, built, loaded)
    assert (logits(built, built.made_up_batch(4)) - plain).abs().max() > 1e-3
    for layer in lora_layers(built):
        assert loaded.get_submodule(layer).lora_A["default"].weight.shape[0] == exported


def test_export_with_folds_in_some_layers_and_an_uneven_scaling(settings_of, folder_of, tmp_path):
    lora = LoRASettings(r=7, lora_alpha=5)
    built = build_task_model(settings_of("vit"), lora, 3, seed=5)
    stir(built)
    names = list(lora_layers(built))
    low = make_folds(built, [1], 1, layers=names[:1])
    # Twice the same directions: the sum has rank 7 + 20, although R' is 47.
    high = make_folds(built, [1], 20, layers=names[1:2])
    high |= {name.replace("000001", "000002"): tensor for name, tensor in high.items()}
    built.set_folds({**low, **high})
    built.save_adapter(tmp_path / "adapter")
    loaded = reload("vit", folder_of("vit"), tmp_path / "adapter")
    compare("vit", built, loaded)
    got = [loaded.get_submodule(name).r["default"] for name in names]
    assert got == [8, 27, *[7] * (len(names) - 2)]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["rank_pattern"])) == (7, 5, 2)


def test_export_without_folds_is_as_before(built, lora, tmp_path):
    from safetensors.torch import load_file

    stir(built)
    built.save_adapter(tmp_path / "before")
    built.set_folds(make_folds(built, [1]))
    built.save_adapter(tmp_path / "folded")
    built.set_folds({})
    built.save_adapter(tmp_path / "after")
    # By tensors: the file's header names its metadata in a random order.
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors")
                     for f in ("before", "after"))  # fmt: skip
    assert equal(before, after)
    assert equal(after, built.adapter_state())
    texts = [(tmp_path / f / "adapter_config.json").read_text() for f in ("before", "after")]
    assert texts[0] == texts[1]
    config = json.loads(texts[1])
    assert (config["r"], config["lora_alpha"]) == (lora.r, lora.lora_alpha)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_a_compressed_export_must_be_finite(built, tmp_path):
    folds = make_folds(built, [1], 40)
    next(iter(folds.values()))[0, 0] = math.nan
    built.set_folds(folds)
    with pytest.raises(ModelError, match="not finite"):
        built.save_adapter(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
