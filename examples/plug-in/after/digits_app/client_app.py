"""her-digits: what a node does."""

from dp_lora.strategies import active_factors, freeze_inactive
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_app.task import build_model, get_weights, load_data, set_weights
from digits_app.task import train as train_fn

# Flower ClientApp
app = ClientApp(mods=[active_factors])


@app.train()
def train(msg: Message, context: Context):
    """Train on this node's images."""
    # Load the model with the received weights
    model = build_model()
    set_weights(model, msg.content["arrays"].to_torch_state_dict())

    # Load the data
    loader = load_data(
        context.node_config["partition-id"],
        context.node_config["num-partitions"],
        context.run_config["batch-size"],
    )

    # Train
    freeze_inactive(model, msg)
    train_fn(model, loader, context.run_config["local-epochs"], msg.content["config"]["lr"])

    # Reply
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_weights(model)),
            "metrics": MetricRecord({"num-examples": len(loader.dataset)}),
        }
    )
    return Message(content=content, reply_to=msg)
