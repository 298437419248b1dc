"""The arms: every way to take a step that is timed, and what each side's step consists of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from privacy import FusedEngine, HookEngine, PrivacyPlan, PrivateGradient, SecureSource, StepKind
from task.adapters import adapter_parameters

from .step_models import SETS, Subject

BASELINE = "peft both"
FLOOR = "floor"
SIDES = ("peft", "private", "hooks", "opacus")
MAX_GRAD_NORM = 1.0
_NOISE_MULTIPLIER = 1.0
_LEARNING_RATE = 0.01
_DELTA = 1e-5
_MANY_STEPS = 10**6


class StepError(RuntimeError):
    """A step did not do what its name says."""


class Arm:
    """One way to take a step.

    Parameters
    ----------
    parameters : mapping of str to nn.Parameter
        Adapter and head of the arm's model, all of them.
    active : sequence of str
        Names of those that a step trains.
    autograd : bool
        Whether autograd shall form these tensors' gradients: then they require gradients.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], active: list[str], *, autograd: bool
    ) -> None:
        self.active = active
        self._parameters = parameters
        self._before = {name: p.detach().clone() for name, p in parameters.items()}
        self._requires = set(active) if autograd else set()

    def prepare(self) -> None:
        """Bring the model into the state that a step starts from; not timed."""
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in self._requires)
            parameter.grad = None

    def step(self) -> None:
        """Take the whole step; this is what is timed."""
        raise NotImplementedError

    def summed(self, max_grad_norm: float) -> dict[str, Tensor]:
        """The sum over records that a step would release, clipped, without noise."""
        raise NotImplementedError

    def settle(self) -> None:
        """Check that a step moved its tensors and no others; put all back; not timed.

        Raises
        ------
        StepError
            If it did not, or a weight is not finite.
        """
        for name, parameter in self._parameters.items():
            now, before = parameter.detach(), self._before[name]
            if not bool(torch.isfinite(now).all()):
                raise StepError(f"{name} is not finite after a step")
            if torch.equal(now, before) == (name in self.active):
                raise StepError(f"{name} {'did not move' if name in self.active else 'moved'}")
            now.copy_(before)


class PeftArm(Arm):
    """The step without privacy: PEFT, the mean loss, autograd, SGD."""

    def __init__(self, subject: Subject, trained: str, records: int) -> None:
        super().__init__(subject.adapter, subject.active(trained), autograd=True)
        self._subject, self._records = subject, records
        parameters = [subject.adapter[name] for name in self.active]
        self._optimizer = torch.optim.SGD(parameters, lr=_LEARNING_RATE)

    def step(self) -> None:
        """Forward, backward, update."""
        _backward(self._subject.losses(self._subject.model, self._records).mean())
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def summed(self, max_grad_norm: float) -> dict[str, Tensor]:
        """The mean gradient times the number of records; PEFT does not clip."""
        if max_grad_norm != float("inf"):
            raise ValueError("the step without privacy does not clip")
        self.prepare()
        _backward(self._subject.losses(self._subject.model, self._records).mean())
        total = {name: self._records * _gradient(self._parameters[name]) for name in self.active}
        self.prepare()
        return total


class PrivateArm(Arm):
    """The product's private step: what ``client_app.local_training`` does in each of its steps.

    The sampling rate is 1, so that every step sees the whole batch; one group of the optimizer per
    tensor, secure noise and the public normaliser are the product's.
    """

    def __init__(
        self, subject: Subject, trained: str, records: int, engine: type[HookEngine]
    ) -> None:
        super().__init__(subject.adapter, subject.active(trained), autograd=False)
        self.prepare()  # engines refuse parameters that require gradients
        self._records = records
        self._kind: StepKind = {"A": "A", "B": "B"}.get(trained, "mixed")  # type: ignore[assignment]
        self._engine = engine(subject.model, subject.adapter)
        self._losses: Callable[[], Tensor] = lambda: subject.losses(subject.model, records)
        plan = PrivacyPlan(
            sample_rate=1.0,
            expected_batch_size=records,
            max_grad_norm=MAX_GRAD_NORM,
            noise_multiplier=_NOISE_MULTIPLIER,
            steps=_MANY_STEPS,
            target_delta=_DELTA,
        )
        self._gradient = PrivateGradient(
            plan, self._engine, records, lambda indices: self._losses(), SecureSource(), _MANY_STEPS
        )
        groups = [{"params": [subject.adapter[name]]} for name in self.active]
        self._optimizer = torch.optim.SGD(groups, lr=_LEARNING_RATE)

    def step(self) -> None:
        """Draw, clipped sum, noise, update."""
        for name, value in self._gradient.step(self.active, self._kind).items():
            self._parameters[name].grad = value
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def summed(self, max_grad_norm: float) -> dict[str, Tensor]:
        """The engine's clipped sum."""
        self.prepare()
        return self._engine.clipped_sum(self.active, self._losses, self._records, max_grad_norm)

    def record_gradients(self) -> dict[str, Tensor]:
        """Each record's own gradient, (n, *shape)."""
        self.prepare()
        return self._engine.per_record_gradients(self.active, self._losses, self._records)


class OpacusArm(Arm):
    """Opacus as its users run it: wrapped once, its hooks and its optimizer.

    Only the set's tensors require gradients in the arm's own copy of the model, so that Opacus
    does no work for others.  Its noise is torch's, which is faster than secure noise.
    """

    def __init__(self, subject: Subject, trained: str, records: int) -> None:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        model = copy.deepcopy(subject.model)
        super().__init__(adapter_parameters(model), subject.active(trained), autograd=True)
        self.prepare()  # Opacus looks for tensors to train when it wraps a model
        self._wrapped = GradSampleModule(model, loss_reduction="sum")
        self._losses: Callable[[], Tensor] = lambda: subject.losses(self._wrapped, records)
        self._optimizer = DPOptimizer(
            torch.optim.SGD([self._parameters[n] for n in self.active], lr=_LEARNING_RATE),
            noise_multiplier=_NOISE_MULTIPLIER,
            max_grad_norm=MAX_GRAD_NORM,
            expected_batch_size=records,
        )

    def step(self) -> None:
        """Forward, backward with per-record gradients, clip, noise, update."""
        _backward(self._losses().sum())
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def summed(self, max_grad_norm: float) -> dict[str, Tensor]:
        """Opacus' own clipped sum."""
        self.prepare()
        _backward(self._losses().sum())
        self._optimizer.max_grad_norm = max_grad_norm
        self._optimizer.clip_and_accumulate()
        parameters: Mapping[str, Any] = self._parameters
        total = {name: parameters[name].summed_grad.clone() for name in self.active}
        self._optimizer.max_grad_norm = MAX_GRAD_NORM
        self._optimizer.zero_grad(set_to_none=True)
        return total


class FloorArm(Arm):
    """What no method can do without: the frozen backbone's forward and its input's gradient."""

    def __init__(self, subject: Subject, records: int) -> None:
        super().__init__({}, [], autograd=False)
        self._subject, self._records = subject, records
        self._backbone = subject.frozen_backbone()

    def step(self) -> None:
        """Forward, and backward to the first block's input."""
        _backward(self._subject.losses(self._backbone, self._records).mean())


def names_for(subject_suits_opacus: bool) -> list[str]:
    """Names of a model's arms."""
    sides = [side for side in SIDES if side != "opacus" or subject_suits_opacus]
    return [*(f"{side} {trained}" for side in sides for trained in SETS), FLOOR]


def make_arm(name: str, subject: Subject, records: int) -> Arm:
    """Make the arm called ``name``, whose steps take the first ``records`` records."""
    if name == FLOOR:
        return FloorArm(subject, records)
    side, trained = name.split()
    if side == "peft":
        return PeftArm(subject, trained, records)
    if side == "opacus":
        return OpacusArm(subject, trained, records)
    engine = {"private": FusedEngine, "hooks": HookEngine}[side]
    return PrivateArm(subject, trained, records, engine)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise StepError("autograd formed no gradient")
    return parameter.grad.detach().clone()


def _backward(loss: Tensor) -> None:
    with warnings.catch_warnings():
        # Opacus' hook on the first layers, whose input needs no gradient, which is right here.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        loss.backward()  # type: ignore[no-untyped-call]
