"""Configurations explain each field once, in `--help`, and repeat that in their docstrings."""

import pytest

from trl_ext import RankingDPOConfig, RankingRewardConfig


@pytest.mark.parametrize("config_class, own", [(RankingDPOConfig, "truncate"), (RankingRewardConfig, "bare_texts")])
def test_a_docstring_says_what_help_says(config_class, own):
    docstring = " ".join(config_class.__doc__.split())
    for name in ("ranking_model", "log_tie", "overlong", "shared_prefix"):
        field = config_class.__dataclass_fields__[name]
        assert f"{name} (`" in docstring and field.metadata["help"] in docstring
    assert "tie_learning_rate (`float`, *optional*, defaults to `0.01`): Learning rate of the tie" in docstring
    assert "max_tie_order (`int`, *optional*): D of" in docstring and own in docstring
    assert "hub_model_id" not in docstring  # TRL explains its own
