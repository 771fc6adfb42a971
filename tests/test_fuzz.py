"""Short forms of the fuzzers: `python tests/fuzz_config.py` and `tests/fuzz_data.py`."""

import fuzz_config
import fuzz_data
import pytest

from supmim_jax.data import source

CASES = [("arrayrecord", True), ("arrayrecord", False), ("cache", True)]


def test_random_configs_are_refused_by_name_or_can_be_traced():
    counts, violations = fuzz_config.fuzz(examples=25, number=5)
    assert not violations, violations
    assert counts["accepted and traced"] > 3 and counts["refused by the schema"] > 3


@pytest.mark.parametrize(("what", "sealed"), CASES)
def test_damaged_data_are_read_right_or_refused_by_name(what, sealed, monkeypatch):
    monkeypatch.setattr(fuzz_data.output, "RECORDS_PER_SHARD", 12)
    monkeypatch.setattr(source, "SHARD_END", fuzz_data.SHARD_END)
    found, violations = fuzz_data.fuzz(what, mutations=30, number=7, sealed=sealed)
    assert not violations, violations
    outcomes = {outcome for _, outcome in found}
    assert fuzz_data.REFUSED in outcomes and fuzz_data.RIGHT in outcomes
