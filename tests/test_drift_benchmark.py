"""What benchmarks/drift.py measures."""

from benchmarks.drift import measure


def test_residual_keeps_the_singular_values_of_16_bit_weights():
    drift = {name: measure(name, 3, [3], seed=0)["drift"]["3"] for name in ("bf16, with residual", "bf16, without")}
    assert 0 < drift["bf16, with residual"] < 1e-5
    assert drift["bf16, without"] > 1e-4


def test_drift_is_measured_when_asked_and_grows():
    drift = measure("fp32", 6, [1, 6], seed=0)["drift"]
    assert 0 < drift["1"] < drift["6"] < 1e-5
