import pytest
@pytest.mark.parametrize("lr", [0.02,0.05,0.1,0.2])
@pytest.mark.parametrize("seed", [1,2])
def test_x(federate, lr, seed):
    f,_=federate(privacy__mode="none", privacy__insecure_test_seed=seed, strategy__num_rounds=10, strategy__local_steps=4, strategy__lr_a=lr,strategy__lr_b=lr,strategy__lr_head=lr)
    with open("/tmp/lr.txt","a") as o: print(lr, seed,[round(r["accuracy"],2) for r in f.read_metrics()], file=o)
