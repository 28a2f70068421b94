"""Units of values: they change with the returns, and no value does; a file from before there were any is read."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from trl_ext.critic.files import VALUE_HEAD_FILE, load_value_head, save_value_head
from trl_ext.critic.heads import UNITS, ActionValueHead, Decisions, ValueHead


HIDDEN, VOCAB = 6, 11
kinds = pytest.mark.parametrize("kind", ["V", "Q"])


def a_head(kind, seed=0):
    """A head with weights of its own, and others in its target."""
    head = ValueHead(HIDDEN) if kind == "V" else ActionValueHead(ValueHead(HIDDEN), VOCAB, rank=3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in head.state_dict().items():
            if name != "temperature":
                weight.normal_(generator=generator)
    return head


@torch.no_grad()
def values_of(head):
    """Everything that a head says of some states: `(B, S)`, or all four estimates, `(B, S, 4)`."""
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(4, 5, HIDDEN, generator=generator)
    lm_head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    lm_head.weight.data.normal_(generator=generator)
    policy = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: None), get_output_embeddings=lambda: lm_head
    )
    actions, mask = torch.randint(VOCAB, (4, 5), generator=generator), torch.ones(4, 5, dtype=torch.bool)
    return head(hidden_states, Decisions(policy, hidden_states, actions, mask))


@kinds
def test_units_change_and_no_value_does(kind):
    head = a_head(kind)
    head.take_units(torch.tensor(3.0), torch.tensor(4.0))
    start, units = values_of(head), set()
    for mean, var in ((100.0, 0.01), (-7.0, 1e4), (2.0, 0.0), (-0.5, 2.0)):
        head.take_units(torch.tensor(mean), torch.tensor(var))
        units.add((head.mean.item(), head.std.item()))
        torch.testing.assert_close(values_of(head), start, atol=1e-3, rtol=1e-4)
    assert len(units) == 4 and start.std() > 1


@kinds
def test_the_first_units_are_those_of_the_first_rollout_that_varies(kind):
    head = a_head(kind)
    before = values_of(head)
    for mean, var, expected in ((5.0, 0.0, 5.0 + before), (3.0, 4.0, 3.0 + 2.0 * before)):
        head.take_units(torch.tensor(mean), torch.tensor(var))
        torch.testing.assert_close(values_of(head), expected, atol=1e-4, rtol=1e-5)
        assert head.has_units == (var > 0)


@kinds
def test_files_hold_units_and_older_ones_are_read(kind, tmp_path):
    head, again, old = a_head(kind), a_head(kind, seed=1), a_head(kind, seed=2)
    head.take_units(torch.tensor(3.0), torch.tensor(4.0))
    save_value_head(head, head.state_dict(), tmp_path)
    load_value_head(again, tmp_path)
    assert torch.equal(values_of(again), values_of(head)) and again.has_units
    file = tmp_path / VALUE_HEAD_FILE
    weights = {name: weight for name, weight in load_file(file).items() if name not in UNITS}
    save_file(weights, file)
    load_value_head(old, tmp_path)
    # It says what it said, and goes on doing so when it takes units
    plain = (values_of(head) - head.mean) / head.std
    torch.testing.assert_close(values_of(old), plain, atol=1e-5, rtol=1e-5)
    old.take_units(torch.tensor(30.0), torch.tensor(400.0))
    torch.testing.assert_close(values_of(old), plain, atol=1e-4, rtol=1e-4)
