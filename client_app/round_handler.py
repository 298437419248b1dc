"""From a train message to its reply."""

from __future__ import annotations

import logging
import re

from flwr.app import ConfigRecord, Context, Message, RecordDict

from federation.messages import FINGERPRINT_KEY, TRAINING_KEY
from federation.settings import Settings
from privacy import PrivacyPlan, Request
from strategies import ROUND_PLAN_KEY, NeedFull, RoundPlan, ask_for_everything, receive_adapter
from task.backbones import backbone_loads
from task.data import Records, data_stamp, load_client_records
from task.errors import DataError

from .client_level import secure_answer
from .failures import BackboneDiffers, MessageError, failure_of, log_text
from .placement import choose_device, choose_rank, set_threads
from .private_round import PaidRound, random_source
from .replay import inputs_hash, pack_reply, unpack_reply
from .reply_time import ReplyClock
from .session import Session, open_session
from .site import Site, open_site, who
from .trace import MessageTrace, traced_message

_LOGGER = logging.getLogger(__name__)
_TRAINING_ID = re.compile(r"[0-9A-Za-z]{8,64}")


def handle_train(message: Message, context: Context) -> Message:
    """Train on a message and reply; every failure becomes a reply with a fixed code.

    Nothing is raised: Flower would forward the exception's text to the server, and its two
    engines differ in what they keep of ``context.state`` after an exception.
    """
    clock = ReplyClock()
    try:
        if (answer := secure_answer(message, context)) is not None:
            return Message(content=answer, reply_to=message)
        with traced_message() as trace:
            reply = Message(content=_train(message, context, trace, clock), reply_to=message)
    except Exception as error:
        _LOGGER.error("This client takes no part in the round: %s", log_text(error))
        reply = Message(failure_of(error).to_error(), reply_to=message)
    clock.wait()
    return reply


def _train(
    message: Message, context: Context, trace: MessageTrace, clock: ReplyClock
) -> RecordDict:
    settings = Settings.from_run_config(context.run_config)
    site = open_site(settings, context)
    clock.period = site.reply_at
    plan, fingerprint, training = _unpack(message)
    if plan.scores != "none" and settings.strategy.score != "client":
        raise MessageError("the round plan asks for scores, strategy.score does not")
    rank = choose_rank(settings, context.node_config)
    wire_rank = rank if settings.strategy.method == "flex-lora" else 0
    try:
        adapter = receive_adapter(message, context.state, rank=wire_rank)
    except NeedFull:  # nothing was trained, so nothing is charged
        return ask_for_everything(context.state, rank=wire_rank)
    device = choose_device(settings.device, context.node_config)
    threads = set_threads(context.node_config)
    with trace.span("session"):
        session = open_session(settings, device, rank)
    if fingerprint != session.task_model.fingerprint:
        raise BackboneDiffers(
            f"the server's backbone has fingerprint {fingerprint[:16]}..., this client's "
            f"{session.task_model.fingerprint[:16]}...: the frozen weights (model.name, "
            "model.revision, or the cached embedded backbone) must be the same on all machines"
        )
    with trace.span("records"):
        records, admitted = _records(settings, context, session, site)
    counted = site.public_records(len(records))
    with trace.span("calibration"):
        privacy_plan = PrivacyPlan.for_client(
            settings.privacy,
            num_records=counted,
            steps=settings.total_steps,
            rounds=settings.strategy.num_rounds,
        )
    source = random_source(settings, context, plan.server_round)
    request = Request(
        dataset=site.dataset,
        training=training,
        server_round=plan.server_round,
        inputs=inputs_hash(message, fingerprint),
        plan=privacy_plan,
        secure_noise=source.secure,
        steps=plan.local_steps,
        records=admitted,
    )
    with trace.span("ledger"):
        earlier = site.ledger.find(request)
        if earlier is not None and (repeated := unpack_reply(earlier)) is not None:
            _LOGGER.info("Round %d was answered before: the same reply again", plan.server_round)
            return repeated
        # Charged before the first step: a crash from here on costs budget, never privacy.
        charge = site.ledger.charge(request, site.limits)
    paid = PaidRound(settings, session, records, counted, plan, privacy_plan, charge, source)
    reply = paid.train(message, context, adapter, trace)
    with trace.span("ledger"):
        site.ledger.keep(charge, pack_reply(reply))  # on disk before it leaves
    trace.values.update(
        round=plan.server_round,
        node=who(context),
        steps=charge.steps,
        threads=threads,
        backbone_loads=backbone_loads(),
    )
    return reply


def _unpack(message: Message) -> tuple[RoundPlan, str, str]:
    config = message.content.get("config")
    plan = message.content.get(ROUND_PLAN_KEY)
    if not isinstance(config, ConfigRecord) or not isinstance(plan, ConfigRecord):
        raise MessageError(f"the train message lacks its config or its {ROUND_PLAN_KEY}")
    try:
        unpacked = RoundPlan.from_record(plan)
        fingerprint, training = config[FINGERPRINT_KEY], config[TRAINING_KEY]
    except (KeyError, ValueError, TypeError) as error:
        raise MessageError(f"the train message cannot be read: {error}") from error
    if not isinstance(training, str) or not _TRAINING_ID.fullmatch(training):
        raise MessageError(f"{TRAINING_KEY} must be 8 to 64 letters and digits")
    return unpacked, str(fingerprint), training


def _records(
    settings: Settings, context: Context, session: Session, site: Site
) -> tuple[Records, str]:
    """The client's records, and what the ledger, which has seen them, calls them."""
    data, encoder = settings.data, session.task_model.encoder
    stamp = data_stamp(data, context.node_config, seed=settings.seed)
    records = load_client_records(
        data,
        encoder,
        context.node_config,
        seed=settings.seed,
        public_records=site.stated_records,
    )

    def refuse_if_changed() -> None:
        if data_stamp(data, context.node_config, seed=settings.seed) != stamp:
            raise DataError("the data's files changed while they were read: ask again")

    def digests() -> list[bytes]:
        found = records.digests()
        refuse_if_changed()  # the ledger keeps what it is told under this stamp
        return found

    admitted = site.ledger.admit(site.dataset, stamp, digests)
    refuse_if_changed()
    return records, admitted
