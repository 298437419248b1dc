"""Which LoRA layers are fused, which are not, and that both give right gradients."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from privacy import EngineError, FusedEngine, HookEngine, per_record_gradients_by_autograd
from privacy import fused_lora as fused_module
from tests.privacy.test_engines import traces
from tests.privacy.test_hook_engine import relative_error

RECORDS, POSITIONS, WIDTH = 4, 6, 24


class Net(nn.Module):
    """Tokens or vectors (n, T, 24) through two layers that LoRA adapts, then a head."""

    def __init__(self, *, patches: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(11, WIDTH)
            self.patch = nn.Conv2d(1, WIDTH, 4, stride=4) if patches else None
            self.first = nn.Linear(WIDTH, 10)
            self.second = nn.Linear(10, 10, bias=False)
            self.head = nn.Linear(10, 3)
        self.twist = ""

    def forward(self, x):
        if self.patch is not None:
            x = self.patch(x).flatten(2).transpose(1, 2).contiguous()
        elif not x.is_floating_point():
            x = self.embed(x)
        x = x.to(self.first.weight.dtype)
        if self.twist == "in place":
            x = x.clone()
        y = self.first(x)
        if self.twist == "in place":
            x.mul_(2.0)
        y = self.second(torch.tanh(y))
        if self.twist == "twice":
            y = self.second(y)
        return self.head(y.mean(dim=1).float())


def adapted(targets=("first", "second"), *, dtype=None, patches=False, **lora):
    """A PEFT model in eval mode with non-zero factors, and its adapter's linear tensors."""
    net = Net(patches=patches)
    if dtype is not None:
        net.first.to(dtype)
        net.second.to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(
            net, LoraConfig(r=2, lora_alpha=6, target_modules=list(targets), **lora)
        )
        stir(model)
    return model.requires_grad_(False).eval(), tensors_of(model)


def stir(model) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name and "magnitude" not in name:
                p.copy_(0.3 * torch.randn(p.shape))


def tensors_of(model) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{kind}".removeprefix("base_model.model."): p
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and (".lora_" in path or path.endswith("head"))
        for kind, p in module.named_parameters()
    }


def inputs(kind="vectors"):
    generator = torch.Generator().manual_seed(2)
    if kind == "tokens":
        return torch.randint(0, 11, (RECORDS, POSITIONS), generator=generator)
    shape = (RECORDS, 1, 8, 12) if kind == "images" else (RECORDS, POSITIONS, WIDTH)
    return torch.randn(shape, generator=generator)


def losses_of(model, x):
    return lambda rows=slice(None): model(x[rows]).square().sum(dim=1)


def check_rows(engine, model, adapter, x, *, tolerance=1e-5, sets=("lora_A", "lora_B", "")):
    """Compare an engine's rows with autograd's for A, B and everything."""
    losses = losses_of(model, x)
    for mark in sets:
        active = {n: p for n, p in adapter.items() if mark in n}
        got = engine.per_record_gradients(list(active), losses, RECORDS)
        expected = per_record_gradients_by_autograd(
            active, lambda j: losses(slice(j, j + 1)), RECORDS
        )
        assert all(expected[name].any() for name in active)
        assert relative_error(got, expected) < tolerance


def test_plain_layers_are_all_fused_and_not_a_word_is_logged(caplog):
    model, adapter = adapted()
    with caplog.at_level(logging.DEBUG, logger="privacy"):
        engine = FusedEngine(model, adapter)
        check_rows(engine, model, adapter, inputs())
    assert engine.num_fused == 2 and engine.not_fused == {} and caplog.records == []


@pytest.mark.parametrize("kind", ["vit", "swin", "roberta", "bert", "llama"])
def test_every_lora_layer_of_every_family_is_fused(model_of, kind):
    task_model = model_of(kind)
    engine = FusedEngine(task_model.model, task_model.adapter)
    assert engine.num_fused == sum(n.endswith(".lora_A.weight") for n in task_model.adapter) > 0
    assert engine.not_fused == {}


GENERAL = {
    "dropout": ({"lora_dropout": 0.5}, "it has adapter dropout"),
    "dora": ({"use_dora": True}, "it is a variant of LoRA (DoraLinearVariant)"),
    "bias": ({"lora_bias": True}, "its factors are not plain matrices"),
    "bfloat16": ({"dtype": torch.bfloat16}, "its base weight is a Parameter of torch.bfloat16"),
}


@pytest.mark.filterwarnings("ignore:`lora_bias")
@pytest.mark.parametrize("case", GENERAL)
def test_layers_that_cannot_be_fused_are_right_by_the_general_path(caplog, case):
    lora, reason = GENERAL[case]
    model, adapter = adapted(**lora)
    engine = FusedEngine(model, adapter)
    assert engine.num_fused == 0
    assert set(engine.not_fused.values()) == {reason}
    check_rows(engine, model, adapter, inputs(), tolerance=2e-2 if case == "bfloat16" else 1e-5)
    (record,) = caplog.records  # once per engine, not per layer and not per step
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("2 of 2 LoRA layers take the general path")
    assert f"base_model.model.first ({reason})" in record.getMessage()
    assert traces(model) == []


def test_adapter_dropout_drops_in_training_mode():
    """Mistake: a fused layer that forgets dropout.  The masks are PEFT's, so seeds decide."""
    model, adapter = adapted(lora_dropout=0.5)
    model.train()
    x, names = inputs(), list(adapter)
    engines = FusedEngine(model, adapter), HookEngine(model, adapter)

    def rows(engine, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return engine.per_record_gradients(names, losses_of(model, x), RECORDS)

    fused, hooks = (rows(engine, 3) for engine in engines)
    assert relative_error(fused, hooks) < 1e-6
    assert relative_error(rows(engines[0], 4), fused) > 0.01
    masks = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for mask in masks:
        mask.p = 0.0
    engine = FusedEngine(model, adapter)
    assert engine.num_fused == 2  # nothing is dropped, so nothing stands in the way
    check_rows(engine, model, adapter, x)
    for mask in masks:
        mask.p = 0.5
    assert relative_error(rows(engine, 3), hooks) < 1e-6  # switched on later


@pytest.mark.parametrize(("kind", "layer"), [("tokens", "embed"), ("images", "patch")])
def test_lora_on_another_kind_of_layer_stays_peft_s(kind, layer):
    model, adapter = adapted(("first", "second", layer), patches=kind == "images")
    adapter = {n: p for n, p in adapter.items() if not n.startswith(layer)}
    engine = FusedEngine(model, adapter)
    assert engine.num_fused == 2
    assert list(engine.not_fused) == [f"base_model.model.{layer}"]
    check_rows(engine, model, adapter, inputs(kind))


def test_two_adapters():
    model, _ = adapted()
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=3, target_modules=["first", "second"]))
    stir(model)
    adapter = tensors_of(model.requires_grad_(False))
    engine = FusedEngine(model, adapter)
    assert engine.num_fused == 2  # one of the two is active
    active = {n: p for n, p in adapter.items() if ".other." not in n}
    check_rows(engine, model, active, inputs())
    with pytest.raises(EngineError, match="took no part"):
        engine.clipped_sum(list(adapter), losses_of(model, inputs()), RECORDS, 1.0)
    model.base_model.set_adapter(["default", "other"])
    model.requires_grad_(False)
    engine = FusedEngine(model, adapter)
    assert engine.num_fused == 0
    assert "its active adapters are ['default', 'other']" in engine.not_fused.values()
    check_rows(engine, model, adapter, inputs())


def change(model, how: str) -> None:
    """Change a model between two steps of one engine."""
    first = model.base_model.model.first
    if how == "adapter":
        model.base_model.set_adapter("other")
        model.requires_grad_(False)
    elif how == "both adapters":
        model.base_model.set_adapter(["default", "other"])
        model.requires_grad_(False)
    elif how == "hook":
        first.base_layer.register_forward_hook(lambda module, args, output: 2 * output)
    elif how == "forward":  # as accelerate does it
        first.forward = lambda x: 2 * type(first).forward(first, x)
    elif how == "forward inside":
        base = first.base_layer
        base.forward = lambda x: 2 * type(base).forward(base, x)
    elif how == "scale":
        first.set_scale("default", 0.5)
    elif how == "base":
        first.base_layer.weight.data.mul_(1.5)


CHANGES = ("adapter", "both adapters", "hook", "forward", "forward inside", "scale", "base")


@pytest.mark.parametrize("how", CHANGES)
def test_a_change_after_the_engine_was_made_is_seen(how):
    """Mistake: a layer judged once, and computed as it was then."""
    model, _ = adapted()
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=3, target_modules=["first", "second"]))
    stir(model)
    adapter = tensors_of(model.requires_grad_(False))
    engine = FusedEngine(model, adapter)
    x = inputs()
    engine.clipped_sum(["head.weight"], losses_of(model, x), RECORDS, 1.0)
    change(model, how)
    unused = {"adapter": ".default.", "both adapters": "nothing"}.get(how, ".other.")
    check_rows(engine, model, {n: p for n, p in adapter.items() if unused not in n}, x)
    assert ("forward" in vars(model.base_model.model.first)) == (how == "forward")


def test_merged_and_disabled_adapters_are_refused_and_the_head_still_trains():
    model, adapter = adapted()
    engine = FusedEngine(model, adapter)
    losses, head = losses_of(model, inputs()), {n: p for n, p in adapter.items() if "head" in n}

    def refused_but_for_the_head():
        with pytest.raises(EngineError, match=r"lora_.*took no part"):
            engine.clipped_sum(list(adapter), losses, RECORDS, 1.0)
        check_rows(engine, model, head, inputs(), sets=("",))

    model.merge_adapter()
    refused_but_for_the_head()
    model.unmerge_adapter()
    check_rows(engine, model, adapter, inputs())
    with model.disable_adapter():
        refused_but_for_the_head()
    model.requires_grad_(False)  # PEFT switches adapters on as trainable
    check_rows(engine, model, adapter, inputs())


def test_hooks_on_a_base_layer_are_kept():
    model, adapter = adapted()
    seen = []
    model.base_model.model.first.base_layer.register_forward_hook(lambda *_: seen.append(1))
    engine = FusedEngine(model, adapter)
    assert engine.num_fused == 1
    assert engine.not_fused == {"base_model.model.first": "hooks are registered inside it"}
    check_rows(engine, model, adapter, inputs(), sets=("",))
    assert len(seen) == 1 + RECORDS


@pytest.mark.parametrize("mark", ["lora_A", "lora_B", "first", "second.lora_A"])
def test_a_part_of_the_factors_can_be_trained(mark):
    """A frozen A (FFA-LoRA), or LoRA trained in some layers only."""
    model, adapter = adapted()
    part = {n: p for n, p in adapter.items() if mark in n or "head" in n}
    engine = FusedEngine(model, part)
    layers = {name.split(".")[0] for name in part if ".lora_" in name}
    assert engine.num_fused == len(layers)
    check_rows(engine, model, part, inputs(), sets=("lora_", "head", ""))
    missing = next(name for name in adapter if name not in part)
    with pytest.raises(KeyError):
        engine.clipped_sum([missing], losses_of(model, inputs()), RECORDS, 1.0)


# --- the fused operation itself -----------------------------------------------------------------


def test_a_step_on_b_does_not_keep_the_layer_s_input():
    model, adapter = adapted()
    engine = FusedEngine(model, adapter)
    x = inputs()

    def saved(mark):
        shapes = []

        def losses():
            pack = lambda t: shapes.append(tuple(t.shape)) or t  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                return losses_of(model, x)()

        names = [n for n in adapter if mark in n]
        engine.clipped_sum(names, losses, RECORDS, 1.0)
        return shapes

    wide = (RECORDS * POSITIONS, WIDTH)
    assert wide in saved("lora_A")
    shapes = saved("lora_B")
    assert (RECORDS * POSITIONS, 2) in shapes  # x A', of width r
    assert all(shape[-1:] != (WIDTH,) for shape in shapes)


def test_merged_weights_and_thin_products_agree(monkeypatch):
    assert not fused_module._merging_pays(torch.float32, 3, 64, 64)
    assert fused_module._merging_pays(torch.float32, 64, 64, 64)
    assert not fused_module._merging_pays(torch.bfloat16, 10**6, 64, 64)
    model, adapter = adapted()
    x = inputs()
    outputs, rows = [], []
    for pays in (True, False):
        monkeypatch.setattr(fused_module, "_merging_pays", lambda *_, pays=pays: pays)
        engine = FusedEngine(model, adapter)
        check_rows(engine, model, adapter, x)

        def losses():
            outputs.append(model(x))
            return outputs[-1].square().sum(dim=1)

        rows.append(engine.per_record_gradients(list(adapter), losses, RECORDS))
    assert relative_error(*rows) < 1e-5
    own = model(x)
    for output in outputs:
        torch.testing.assert_close(output, own, rtol=1e-5, atol=1e-5)


def test_between_steps_the_model_is_peft_s_own_bit_for_bit_and_can_be_copied():
    model, adapter = adapted()
    x = inputs()
    before = model(x)
    engine = FusedEngine(model, adapter)
    assert torch.equal(model(x), before)
    first = engine.clipped_sum(list(adapter), losses_of(model, x), RECORDS, 1.0)
    assert torch.equal(model(x), before) and traces(model) == []
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        tensors_of(twin)["first.lora_B.default.weight"].zero_()
    assert torch.equal(model(x), before) and not torch.equal(twin(x), before)
    again = engine.clipped_sum(list(adapter), losses_of(model, x), RECORDS, 1.0)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_shared_layer_is_refused():
    model, adapter = adapted()
    model.base_model.model.twist = "twice"
    engine = FusedEngine(model, adapter)
    for mark in ("lora_A", "lora_B"):
        names = [n for n in adapter if mark in n]
        with pytest.raises(EngineError, match=r"second\.lora_.*ran twice"):
            engine.clipped_sum(names, losses_of(model, inputs()), RECORDS, 1.0)
    # Shared, but not trained in this step: nothing is split.
    first = {n: p for n, p in adapter.items() if n.startswith("first")}
    check_rows(engine, model, first, inputs())


def test_an_input_changed_in_place_is_noticed_where_it_is_needed():
    model, adapter = adapted()
    model.base_model.model.twist = "in place"
    engine = FusedEngine(model, adapter)
    names = [n for n in adapter if "first.lora_A" in n]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.clipped_sum(names, losses_of(model, inputs()), RECORDS, 1.0)
    assert traces(model) == []
    rows = engine.per_record_gradients(
        ["first.lora_B.default.weight"], losses_of(model, inputs()), RECORDS
    )
    model.base_model.model.twist = ""
    plain = engine.per_record_gradients(
        ["first.lora_B.default.weight"], losses_of(model, inputs()), RECORDS
    )
    assert relative_error(rows, plain) < 1e-6


class InPlace(nn.Module):
    """A layer whose output is changed in place, as many models do with their activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu_(self.first(x)))


def test_an_output_may_be_changed_in_place():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(InPlace(), LoraConfig(r=2, target_modules=["first"]))
    stir(model)
    adapter = tensors_of(model.requires_grad_(False))
    engine = FusedEngine(model, adapter)
    assert engine.num_fused == 1
    x = torch.randn(RECORDS, 5, 6, generator=torch.Generator().manual_seed(3))
    names = [name for name in adapter if "lora_" in name]
    got = engine.per_record_gradients(names, lambda: model(x).square().sum((1, 2)), RECORDS)
    slow = per_record_gradients_by_autograd(
        {name: adapter[name] for name in names},
        lambda j: model(x[j : j + 1]).square().sum((1, 2)),
        RECORDS,
    )
    assert relative_error(got, slow) < 1e-5
