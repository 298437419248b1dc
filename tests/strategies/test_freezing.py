"""``freeze_inactive`` on a PEFT model: what a round trains requires gradients, the rest not."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from strategies import ROUND_PLAN_KEY, WIRE_KEY, FFALoRA, LALoRA, RoLoRA, RoundPlan, freeze_inactive
from strategies.round_plan import Mode
from task.torchvision_ops import declare_missing_torchvision_ops

declare_missing_torchvision_ops()

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict  # noqa: E402


class Net(torch.nn.Module):
    """Two blocks of one adapted layer each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"q": torch.nn.Linear(3, 3)}) for _ in range(2)
        )
        self.norm = torch.nn.LayerNorm(3)
        self.head = torch.nn.Linear(3, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block["q"](x)
        return self.head(self.norm(x))


@pytest.fixture
def model():
    return get_peft_model(Net(), LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"]))


def trains(factors: tuple[str, str], head: bool) -> set[str]:
    """Live names of what should train, written out: the factors of both blocks, and the head."""
    start = "base_model.model"
    names = {
        f"{start}.blocks.{block}.q.lora_{factor}.default.weight"
        for block, letters in enumerate(factors)
        for factor in letters
    }
    heads = {f"{start}.head.modules_to_save.default.{part}" for part in ("weight", "bias")}
    return names | (heads if head else set())


def message_for(model, plan: RoundPlan) -> Message:
    tensors = get_peft_model_state_dict(model)
    arrays = ArrayRecord({name: Array(value.detach().numpy()) for name, value in tensors.items()})
    content = RecordDict({"arrays": arrays, ROUND_PLAN_KEY: plan.to_record()})
    return Message(content, dst_node_id=1, message_type=MessageType.TRAIN)


def plan_of(mode: Mode, *, head: bool = True, **layer_modes: Mode) -> RoundPlan:
    modes = {f"base_model.model.blocks.{n[-1]}.q": m for n, m in layer_modes.items()}
    return RoundPlan(
        server_round=1, mode=mode, local_steps=2, lr_a=1.0, lr_b=1.0, lr_head=1.0,
        train_head=head, layer_modes=modes,
    )  # fmt: skip


PLANS = {
    "ffa-lora": (FFALoRA(local_steps=2).plan(1), ("B", "B"), True),
    "ro-lora, B": (RoLoRA(local_steps=2).plan(1), ("B", "B"), True),
    "ro-lora, A": (RoLoRA(local_steps=2).plan(2), ("A", "A"), True),
    "ro-lora, A, no head": (RoLoRA(local_steps=2, train_head=False).plan(2), ("A", "A"), False),
    "la-lora": (LALoRA(local_steps=2).plan(1), ("AB", "AB"), True),
    "as-lora, A and B": (plan_of("B", block_0="A"), ("A", "B"), True),
    "as-lora, B and A": (plan_of("B", block_1="A", head=False), ("B", "A"), False),
    "both": (plan_of("both", head=False), ("AB", "AB"), False),
}


@pytest.mark.parametrize("case", sorted(PLANS))
def test_exactly_what_is_active_requires_gradients(case, model):
    plan, factors, head = PLANS[case]
    saved = {n.replace(".modules_to_save", "") for n in trains(factors, head)}
    names = freeze_inactive(model, message_for(model, plan))
    assert sorted(names) == sorted(name.replace(".default", "") for name in saved)
    live = {name for name, value in model.named_parameters() if value.requires_grad}
    assert live == trains(factors, head)


def test_one_round_after_another_leaves_nothing_of_the_one_before(model):
    for case in [*PLANS, *reversed(PLANS)]:
        plan, factors, head = PLANS[case]
        freeze_inactive(model, message_for(model, plan))
        live = {name for name, value in model.named_parameters() if value.requires_grad}
        assert live == trains(factors, head), case


def test_training_moves_exactly_what_it_names(model):
    plan, factors, head = PLANS["as-lora, A and B"]
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.fill_(0.5)
    freeze_inactive(model, message_for(model, plan))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.nn.functional.cross_entropy(model(torch.eye(3)), torch.tensor([0, 1, 0])).backward()
    optimizer.step()
    moved = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
    assert moved == trains(factors, head)


def test_parameters_that_are_not_of_the_adapter_are_left_as_they_are(model):
    norm = next(value for name, value in model.named_parameters() if "norm.weight" in name)
    norm.requires_grad_(True)
    freeze_inactive(model, message_for(model, PLANS["ffa-lora"][0]))
    assert norm.requires_grad


def test_a_message_without_a_plan_is_refused(model):
    message = message_for(model, PLANS["ffa-lora"][0])
    del message.content[ROUND_PLAN_KEY]
    with pytest.raises(ValueError, match="no 'round-plan': it is not from a strategy"):
        freeze_inactive(model, message)


def test_a_plan_of_another_version_is_refused(model):
    message = message_for(model, PLANS["ffa-lora"][0])
    record = dict(message.content[ROUND_PLAN_KEY])
    message.content[ROUND_PLAN_KEY] = ConfigRecord({**record, "momentum": 0.9})
    with pytest.raises(ValueError, match="momentum"):
        freeze_inactive(model, message)


def test_a_model_without_the_adapter_is_refused(model):
    message = message_for(model, PLANS["ffa-lora"][0])
    with pytest.raises(ValueError, match="none of the adapter tensors"):
        freeze_inactive(Net(), message)
    message.content[WIRE_KEY] = ConfigRecord({})
    del message.content["arrays"]  # not one tensor was sent
    with pytest.raises(ValueError, match="none of the adapter tensors"):
        freeze_inactive(model, message)
