"""One site: train messages as the server sends them, contexts as Flower gives them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client_app.session import forget
from federation.messages import FINGERPRINT_KEY, TRAINING_KEY
from federation.settings import Settings
from strategies import ROUND_PLAN_KEY, WIRE_KEY, RoundPlan
from strategies.versions import version_of
from task.data import num_labels, simulation_cache
from task.model import TaskModel, build_task_model
from tests.fake_grid import stamp
from tests.federation.tiny import RunConfig, changed, make_tiny

PLAN = RoundPlan(
    server_round=1, mode="alternate", local_steps=2, lr_a=0.5, lr_b=0.5, lr_head=0.5, low_pass=True
)
TRAINING = "0123456789abcdef"


@dataclasses.dataclass(frozen=True)
class Site:
    """Makes what a client is given."""

    config: RunConfig
    server_model: TaskModel
    run_ids: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))

    def settings(self, **changes) -> Settings:
        return Settings.from_run_config(changed(self.config, **changes))

    def context(self, partition: int = 0, *, node_config=None, **changes) -> Context:
        """A client that nothing was asked of yet: a run, and so a ledger, of its own."""
        place = {"partition-id": partition, "num-partitions": 3}
        return Context(
            run_id=next(self.run_ids),
            node_id=partition + 1,
            node_config=place if node_config is None else node_config,
            state=RecordDict(),
            run_config=changed(self.config, **changes),
        )

    def content(self, **plan_changes) -> RecordDict:
        state = self.server_model.adapter_state()
        plan = dataclasses.replace(PLAN, **plan_changes)
        arrays = ArrayRecord({n: Array(value.numpy()) for n, value in state.items()})
        return RecordDict(
            {
                "arrays": arrays,
                WIRE_KEY: everything(arrays),
                "config": ConfigRecord(
                    {FINGERPRINT_KEY: self.server_model.fingerprint, TRAINING_KEY: TRAINING}
                ),
                ROUND_PLAN_KEY: plan.to_record(),
            }
        )

    def message(self, content: RecordDict | None = None, **plan_changes) -> Message:
        content = self.content(**plan_changes) if content is None else content
        return stamp(Message(content=content, message_type="train", dst_node_id=1), 0, 1)


def everything(arrays: ArrayRecord) -> ConfigRecord:
    """What a message says that carries the whole adapter."""
    return ConfigRecord({"base": "", "version": version_of(arrays), "rank": 0, "dtype": "float32"})


def forget_process() -> None:
    """Make this process as good as new."""
    forget()
    simulation_cache.clear()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    config = make_tiny(tmp_path_factory.mktemp("site"))
    config["output-dir"] = str(tmp_path_factory.mktemp("runs"))
    settings = Settings.from_run_config(config)
    model = build_task_model(
        settings.model, settings.lora, num_labels(settings.data), seed=settings.seed
    )
    return Site(config, model)


@pytest.fixture(autouse=True)
def _fresh_process() -> Iterator[None]:
    forget_process()
    yield
    forget_process()
