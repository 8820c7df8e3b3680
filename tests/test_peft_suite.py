"""PEFT's own tests: what is run of them here, and that the runner neither loses nor excuses a failure.

`tests/run_peft_suite.py` runs them all.
"""

import pytest
from peft import BOFTConfig, LoraConfig, OFTConfig
from peft_suite.report import markdown, summarize
from peft_suite.sources import SourcesUnavailableError, fetch_tests
from peft_suite.twins import twins
from run_peft_suite import prepare, run_file

from poet_peft import POETConfig


@pytest.mark.slow
def test_pefts_tests_of_custom_models_pass(tmp_path):
    """About 700 tests of every operation, on a model of two linear layers."""
    try:
        tests = fetch_tests()
    except SourcesUnavailableError as error:
        pytest.skip(str(error))
    prepare(tmp_path)
    outcomes = run_file(tests, tmp_path, "test_custom_models", "not Conv2d and not Embedding and not MHA")
    assert summarize(outcomes)["unexplained"] == {}
    assert sum(outcome == "passed" for outcome, _ in outcomes.values()) > 600


def test_twin_has_the_arguments_of_its_row():
    row = ("MLP 1 OFT", "MLP", OFTConfig, {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False, "coft": True})
    rows, names = twins([row])
    expected = {"block_size": 5, "orthogonal_map": "cayley"}
    assert rows[0] == ("MLP 1 POET", "MLP", POETConfig, expected)
    one_block = {**expected, "variant": "fully_stochastic", "block_size": 0.5}
    assert rows[1] == ("MLP 1 POET", "MLP", POETConfig, one_block)
    assert names == ["MLP 1 POET", "MLP 1 POET fully stochastic"]


def test_twin_of_a_finished_configuration():
    rows, _ = twins([OFTConfig(oft_block_size=4, target_modules=["lin0"], bias="oft_only")])
    assert rows == [POETConfig(block_size=4, target_modules=["lin0"], bias="poet_only")]


def test_rows_of_other_methods_have_no_twin():
    rows, _ = twins([(LoraConfig, {"r": 2}), (OFTConfig, {"oft_block_size": 2}), (BOFTConfig, {})])
    assert {row[0] for row in rows} == {POETConfig}
    assert all(row[1]["block_size"] == 2 for row in rows)


def test_twin_of_lora():
    row = (
        LoraConfig,
        {"r": 2, "lora_alpha": 8, "target_parameters": ["experts.down_proj"], "init_lora_weights": False},
    )
    rows, _ = twins([row], beside="LoRA")
    assert rows[0] == (POETConfig, {"target_parameters": ["experts.down_proj"], "init_weights": False})


def test_row_about_attention_has_a_twin_of_lora_beside_those_of_oft():
    rows, names = twins(
        [
            ("MLP 1 LoRA", "MLP", LoraConfig, {"r": 2}),
            ("MHA 1 LoRA", "MHA", LoraConfig, {"target_modules": ["mha"]}),
            ("MLP 1 OFT", "MLP", OFTConfig, {"oft_block_size": 2}),
        ]
    )
    assert names[:2] == ["MHA 1 POET", "MHA 1 POET fully stochastic"]
    assert rows[0] == ("MHA 1 POET", "MHA", POETConfig, {"target_modules": ["mha"]})
    assert {row[1] for row in rows} == {"MHA", "MLP"}


def test_table_without_configurations_is_left_alone():
    assert twins([1, ("a", {"b": 2})]) is None


def test_unknown_argument_is_not_dropped():
    with pytest.raises(KeyError, match="'new_argument'"):
        twins([(OFTConfig, {"new_argument": 1})])


def test_another_error_in_a_test_with_a_meant_failure_is_unexplained():
    test = "TestPeftFsdpStateDict::test_save_load_roundtrip_fsdp_wrapped_learnable_bias[bias_all-MLP 1 POET]"
    meant = summarize({test: ["failed", "poet_peft.errors.POETCheckpointError: the adapter file has tensors"]})
    other = summarize({test: ["failed", "AssertionError: outputs differ\nassert False"]})
    assert (len(meant["meant"]), meant["unexplained"]) == (1, {})
    assert other["unexplained"] == {test: "AssertionError: outputs differ"}


def test_page_names_every_unexplained_failure():
    summary = summarize({"TestA::test_b[POET]": ["failed", "ValueError: c"], "TestA::test_d": ["passed", ""]})
    page = markdown({"versions": {"peft": "0.0"}, "files": {"test_a": summary}})
    assert "| test_a | 1 | 0 | 1 | 0 |" in page
    assert "- test_a, `TestA::test_b[POET]`: `ValueError: c`" in page
