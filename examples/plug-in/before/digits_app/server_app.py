"""her-digits: the server."""

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits_app.task import build_model, get_weights, load_test_data, set_weights, test

# Flower ServerApp
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation."""
    num_rounds = context.run_config["num-server-rounds"]
    model = build_model()

    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_weights(model)),
        num_rounds=num_rounds,
        train_config=ConfigRecord({"lr": context.run_config["lr"]}),
        evaluate_fn=evaluate,
    )

    accuracy = result.evaluate_metrics_serverapp[num_rounds]["accuracy"]
    print(f"final accuracy {accuracy:.2f}")


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Test the global model on images that no node has."""
    model = build_model()
    set_weights(model, arrays.to_torch_state_dict())
    return MetricRecord({"accuracy": test(model, load_test_data())})
