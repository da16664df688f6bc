"""The tables of other families' fields and tensors: what is written is what is read."""

import pytest
import torch
from conftest import build

from model import TABLES, GPTConfig
from nanorecur import families
from nanorecur.families import EXPORTED, GPT2, HUGINN, NANBEIGE, OURO, PARCAE, RETROFITTED

NAMES = {id(family): family.demands["model_type"] for family in EXPORTED}
NAMES |= {id(family): f"retrofitted {name}" for name, family in RETROFITTED.items()}
every_family = pytest.mark.parametrize("family", EXPORTED, ids=lambda family: NAMES[id(family)])


def config_of(family, **overrides):
    """Return a tiny config of a family; of four blocks, two in a loop where it has one."""
    looped = "n_block" in family.fields
    shape = dict(n_prelude=1, n_block=2, n_coda=1, n_loop=3) if looped else dict(n_layer=4)
    if family in (OURO, NANBEIGE):
        shape = dict(n_block=4, n_loop=3)
    if family is NANBEIGE:
        shape |= dict(loop_norm="rmsnorm", final_norm=False)
    sizes = dict(block_size=16, vocab_size=61, n_embd=32, n_head=4, n_hidden=48)
    return GPTConfig(**{**family.defaults, **family.fixed, **sizes, **shape, **overrides})


@every_family
def test_tables_name_fields_and_values_of_gptconfig(family):
    fields = GPTConfig.__dataclass_fields__
    for table in (family.fields, family.fixed, family.defaults):
        assert not table.keys() - fields.keys()
    assert not family.defaults.keys() - family.fields.keys(), "a default of what is never read"
    for name, values in families.VALUES.items():
        assert name in fields and set(values.values()) <= set(TABLES[name])
    assert not families.DROPPED.keys() & fields.keys()


@every_family
def test_a_config_that_is_written_is_read_again(family):
    config = config_of(family)
    config_json = families.write_config(family, config)
    assert families.family_of(config_json) is family
    again = GPTConfig(**families.read_config(family, config_json))
    assert families.explicit_fields(again, ()) == families.explicit_fields(config, ())
    assert families.family_to_export(config) is family


@every_family
def test_every_value_of_ours_is_stored_once(family):
    """Stored tensors are filled by their pieces, each value with its number, without overlap."""
    config = config_of(family)
    state = {name: tensor for name, tensor in build(**vars(config)).state_dict().items()}
    if config.tie_weights:
        del state["lm_head.weight"]
    count, numbered = 0, {}
    for name, tensor in state.items():
        numbered[name] = torch.arange(count, count + tensor.numel()).view(tensor.shape)
        count += tensor.numel()
    stored = {}
    for piece in families.pieces(family, config, numbered, range(4)):
        filled = stored.setdefault(piece.theirs, torch.full(piece.shape, -1))
        rows = filled[piece.first_row : piece.first_row + len(piece.view)]
        assert (rows == -1).all(), f"{piece.theirs} is filled twice"
        rows.copy_(piece.view)
    values = torch.cat([tensor.flatten() for tensor in stored.values()])
    assert torch.equal(values.sort().values, torch.arange(count))


@pytest.mark.parametrize("family, n_kv_head", [(HUGINN, 4), (PARCAE, 2)], ids=["Huginn", "Parcae"])
def test_to_theirs_undoes_to_ours(family, n_kv_head):
    config = config_of(family, n_kv_head=n_kv_head, input_injection="inject")
    changed = set()
    for name, tensor in build(spread=1.0, **vars(config)).state_dict().items():
        ours = families.to_ours(family, config, name, tensor)
        assert torch.equal(families.to_theirs(family, config, name, ours), tensor)
        if not torch.equal(ours, tensor):
            changed.add(families.split_name(name)[1])
    biases = {"attn.q_bias.bias", "attn.k_bias.bias"} if family is HUGINN else set()
    assert changed == {"attn.c_attn.weight", "transformer.loops.0.inject.weight"} | biases


def test_interleaved_channels_of_a_head_become_halves():
    config = GPTConfig(n_layer=1, n_embd=12, n_head=2)
    heads = torch.tensor([[0, 3, 1, 4, 2, 5], [6, 9, 7, 10, 8, 11]]).flatten()  # pairs (i, i + 3)
    stored = torch.cat([heads, heads + 12, torch.arange(24, 36)])  # queries, keys, values
    name = "transformer.h.0.attn.c_attn.bias"
    assert torch.equal(families.to_ours(HUGINN, config, name, stored), torch.arange(36))


BROKEN = [[], [[]], ["x"], {}, {"a": [1]}, "x", 1, -1, 1.5, True, 10**12, None]


@every_family
def test_any_value_of_a_field_is_read_or_refused_in_one_line(family):
    config_json = families.write_config(family, config_of(family))
    for name in config_json:
        for value in BROKEN:
            broken = {**config_json, name: value}
            try:
                GPTConfig(**families.read_config(families.family_of(broken), broken))
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 400


def test_layers_of_a_family_are_numbered_by_the_source():
    config = config_of(GPT2)
    names = families.stored_names(GPT2, config, "transformer.h.1.ln_1.weight", (0, 7, 9, 11))
    assert names == ("transformer.h.7.ln_1.weight",)
