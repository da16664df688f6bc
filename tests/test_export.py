"""
Exports: a looped model unrolled into a plain one, a folder with its own code, tokenizers, cards.
What opens them in transformers computes what the model does.
"""

import ast
import json
import string

import pytest
import torch
from conftest import ROOT, Run, assert_refused, build, log, prose, tokens, without_clock
from safetensors.torch import load_file
from test_pretrained import (
    LLAMA_BLOCKS,
    assert_close,
    assert_same_state,
    logits,
    reference,
    reference_logits,
)

from model import GPT
from nanorecur import exports
from nanorecur.tokenizer import byte_alphabet, make_tokenizer
from pretrained import export, load, tokenizer_of

OFF = dict(input_injection="passthrough", loop_norm="none")  # a loop of blocks alone
LLAMA = dict(**LLAMA_BLOCKS, **OFF, n_kv_head=2, n_hidden=48)


def opened(folder, **options):
    """Return transformers' model of a folder, which must hold all its tensors and no others."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem], problem
    return model.eval()


# -----------------------------------------------------------------------------
# a loop of blocks alone, unrolled

UNROLLED = {  # {name: (format, options, loops of each group)}
    "core": ("llama", LLAMA, (3,)),
    "whole": ("qwen3", LLAMA | dict(n_prelude=0, n_coda=0, qk_norm="head", head_size=16), (3,)),
    "post norm": ("olmo2", LLAMA | dict(qk_norm="width", norm_place="post"), (3,)),
    "two groups": (
        "gpt2",
        OFF | dict(n_layer=5, loop_groups=((0, 1), (3,)), loop_counts=(2, 3)),
        (2, 3),
    ),
    "sampled depth": ("llama", LLAMA | dict(loop_sampling="poisson", dropout=0.1), (3,)),
}


@pytest.mark.parametrize("n_loop", [0, 4])
@pytest.mark.parametrize("name", UNROLLED)
def test_unrolled_is_looped_at_any_depth(name, n_loop, tmp_path):
    to_format, options, counts = UNROLLED[name]
    model, idx = build(spread=0.2, **options), tokens()
    exported = export(model, tmp_path, to_format=to_format, n_loop=n_loop)
    expected = logits(model, idx, n_loop=n_loop or counts)
    scale = expected.abs().max()
    assert_close(reference_logits(opened(tmp_path), idx) / scale, expected / scale)
    plain = load(tmp_path)
    assert torch.equal(logits(plain, idx), expected)
    n_blocks = model.config.n_physical
    for group, count in zip(model.config.groups, counts):
        n_blocks += len(group) * ((n_loop or count) - 1)
    assert plain.config.n_layer == n_blocks and not plain.config.groups
    assert exports.describe(exported).startswith(
        f"{exported.family.name}'s format unrolled, {model.config.n_physical} blocks as {n_blocks}"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(input_injection="inject"), "input_injection='inject': must be passthrough to be un"),
        (dict(loop_norm="rmsnorm"), "loop_norm='rmsnorm': must be none to be unrolled"),
        (dict(loop_embedding="learned"), "loop_embedding='learned': must be none to be unrolled"),
        (dict(loop_entry="rmsnorm"), "loop_entry='rmsnorm': must be none to be unrolled"),
        (dict(loop_exit="linear"), "loop_exit='linear': must be none to be unrolled"),
        (dict(exit_gate="state"), "exit_gate='state': must be none where nothing is looped"),
        (dict(n_ahead=2), "n_ahead=2: must be 1"),
        (dict(mlp="relu2"), "mlp='relu2': must be 'swiglu'"),
        (dict(logit_softcap=5.0), "logit_softcap=5.0: must be 0.0"),
        (dict(document_separator=3), "document_separator=3: must be -1"),
        (dict(value_embedding=True), "value_embedding=True: must be False"),
        (dict(norm="layernorm"), "norm='layernorm': must be 'rmsnorm'"),
    ],
    ids=str,
)
def test_what_is_not_exact_is_refused_by_name(options, message, tmp_path):
    model = build(**LLAMA | dict(n_kv_head=0) | options)
    with pytest.raises(ValueError) as error:
        export(model, tmp_path / "a", to_format="llama")
    assert str(error.value).startswith(f"as=llama: not exact with {message}")
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()


def test_a_folded_llama_goes_out_in_each_format_that_is_exact_for_it(tmp_path):
    source, idx = reference("llama"), tokens()
    source.save_pretrained(tmp_path / "source")
    fold = dict(n_prelude=1, n_block=2, n_coda=1, n_loop=2)
    model = load(tmp_path / "source", input_injection="passthrough", **fold)
    expected = logits(model, idx)
    scale = expected.abs().max()
    for to_format in ("llama", "nanorecur"):
        export(model, tmp_path / to_format, to_format=to_format)
        assert_close(reference_logits(opened(tmp_path / to_format), idx) / scale, expected / scale)
        assert torch.equal(logits(load(tmp_path / to_format), idx), expected)
    whole = load(tmp_path / "source", input_injection="passthrough", n_block=4, n_loop=2)
    export(whole, tmp_path / "nanbeige", to_format="nanbeige")
    assert_same_state(whole, load(tmp_path / "nanbeige"))
    for to_format in ("huginn", "ouro", "parcae", "gpt2", "qwen3", "olmo2", "nanbeige"):
        with pytest.raises(ValueError, match=f"as={to_format}: not exact with "):
            export(model, tmp_path / to_format, to_format=to_format)


def test_a_format_can_be_pinned_where_another_would_be_chosen(tmp_path):
    model, idx = build(n_layer=2, spread=0.2), tokens()
    assert export(model, tmp_path / "chosen").family.name == "GPT-2"
    assert export(model, tmp_path / "pinned", to_format="nanorecur").family.name == "nanoRecur"
    assert torch.equal(reference_logits(opened(tmp_path / "pinned"), idx), logits(model, idx))


# -----------------------------------------------------------------------------
# any other shape: a folder with its own code

SHAPES = {
    "learned positions": dict(),
    "rotary, noise": dict(**LLAMA_BLOCKS, state_init="noise", input_injection="diagonal"),
    "two groups": dict(n_layer=4, loop_groups=((0, 1), (3,)), loop_counts=(2, 3)),
    "mla, documents": dict(attention="mla", position="rope", document_separator=3),
    "token before, gate, heads": dict(
        predict_ahead=True,
        tie_weights=False,
        loop_embedding="learned",
        exit_gate="mean_state",
        n_ahead=2,
        loop_exit="linear",
    ),
}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """A model, its folder, and transformers' model of it."""
    model = build(spread=0.2, **SHAPES[request.param])
    folder = tmp_path_factory.mktemp("folder") / "model"
    export(model, folder, {"tokenizer": "bytes"}, to_format="nanorecur")
    return model, folder, opened(folder)


@torch.no_grad()
def test_a_folder_with_code_computes_the_same_bits_at_any_depth(pair):
    model, folder, theirs = pair
    idx = tokens()
    assert isinstance(theirs.gpt, torch.nn.Module) and not isinstance(theirs.gpt, GPT)
    assert torch.equal(theirs(idx).logits, logits(model, idx))
    for n_loop in (1, 2, 4):
        assert torch.equal(theirs(idx, n_loop=n_loop).logits, logits(model, idx, n_loop=n_loop))
    deeper = opened(folder, n_loop=4)
    assert torch.equal(deeper(idx).logits, logits(model, idx, n_loop=4))
    assert torch.equal(theirs(idx, logits_to_keep=2).logits, logits(model, idx)[:, -2:])
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert tied == model.config.tie_weights
    assert_same_state(model, load(folder))
    assert load(folder).config == model.config


@torch.no_grad()
def test_generate_continues_by_the_models_logits_and_beyond_its_context(pair):
    model, _, theirs = pair
    idx = tokens(2, 9)
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True)
    out = theirs.generate(idx, max_new_tokens=12, n_loop=4, **options)  # of 16 that fit
    expected = idx
    for _ in range(12):
        last, _ = model(expected[:, -16:], n_loop=4)
        expected = torch.cat((expected, last[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(out, expected)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(pair):
    _, _, theirs = pair
    long, short = tokens(1, 9), tokens(1, 5, seed=2)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), short), dim=1)
    idx, mask = torch.cat((long, padded)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    both = theirs(idx, attention_mask=mask).logits
    assert_close(both[0], theirs(long).logits[0])
    assert_close(both[1, 4:], theirs(short).logits[0])
    labels = idx.clone()
    labels[1, :5] = -100  # nothing predicts the first token behind the padding
    loss = theirs(idx, attention_mask=mask, labels=labels).loss
    parts = [theirs(row, labels=row).loss * (row.size(1) - 1) for row in (long, short)]
    assert_close(loss, sum(parts) / 12)


def test_the_code_in_a_folder_needs_torch_and_transformers_alone():
    imported = set()
    for path in exports.CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add("." * node.level + node.module.split(".")[0])
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    standard = {"math", "collections", "dataclasses", "functools", "itertools", "typing"}
    assert imported - standard == {"torch", "transformers", ".model"}


def test_saved_by_transformers_and_read_by_us_it_is_the_same_model(pair, tmp_path):
    model, folder, theirs = pair
    theirs.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), tokens()), logits(model, tokens()))


def test_a_folder_of_an_earlier_version_still_opens(tmp_path):
    """Fields of GPTConfig stood at the top of config.json, and names began without gpt."""
    from safetensors.torch import save_file

    model = build(spread=0.2)
    export(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("gpt.") for name in weights)
    flat = {name.removeprefix("gpt."): tensor for name, tensor in weights.items()}
    save_file(flat, tmp_path / "model.safetensors")
    config_json = {"model_type": "nanorecur", **vars(model.config)}
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    again = load(tmp_path)
    assert again.config == model.config
    assert_same_state(model, again)


# -----------------------------------------------------------------------------
# tokenizers


def assert_same_tokenizer(fields, texts, tmp_path):
    """Export a model with a tokenizer and compare what transformers makes of it."""
    from transformers import AutoTokenizer

    export(build(n_layer=1), tmp_path, fields)
    ours, theirs = make_tokenizer(fields), AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ids == list(ours.encode(text))
        assert theirs.decode(ids) == text
    assert theirs.model_max_length == 16
    assert tokenizer_of(tmp_path) == fields
    return theirs


def test_bytes_and_characters_are_tokenizers_of_transformers(tmp_path):
    texts = ["a\n b\tc  d", "\u0100\x00é漢🙂 'll <|endoftext|>", " ", prose(1, 30)]
    theirs = assert_same_tokenizer({"tokenizer": "bytes"}, texts, tmp_path / "bytes")
    assert theirs.eos_token_id == 0 and len(theirs) == 256
    kept = json.loads((tmp_path / "bytes" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == 0
    chars = "".join(sorted(string.printable)) + "é漢"
    texts = ["a\n b\r\n\tc  d é漢", prose(2, 30)]
    assert_same_tokenizer({"tokenizer": "char", "chars": chars}, texts, tmp_path / "char")
    kept = json.loads((tmp_path / "char" / "generation_config.json").read_text())
    assert "eos_token_id" not in kept


class Table:
    """A tokenizer known by its table alone, as tiktoken's gpt2 is."""

    def __init__(self, table):
        self.bytes_of_ids = table

    def table(self):
        return dict(self.bytes_of_ids)


def test_merges_are_found_again_in_the_ranks_of_byte_level_pieces(monkeypatch):
    """GPT-2's pieces need a download: here they are trained on made-up text."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([prose(1, 4000)], vocab_size=400, show_progress=False)
    alphabet, end = byte_alphabet(), b"<|endoftext|>"
    table = {}
    for piece, i in trained.get_vocab().items():
        table[i] = bytes(alphabet[char] for char in piece)
    assert len(table) > 300
    monkeypatch.setattr(exports, "make_tokenizer", lambda fields: Table({**table, 400: end}))
    again = Tokenizer.from_str(exports.gpt2_json({"tokenizer": "gpt2"}))
    for text in (prose(2, 500), "é漢🙂  \n\n x", "it's 123 times"):
        assert again.encode(text).ids == trained.encode(text).ids
        assert again.decode(again.encode(text).ids) == text
    assert again.encode("a<|endoftext|>").ids[-1] == 400


def test_an_unknown_encoding_has_no_file_and_an_earlier_one_goes(tmp_path):
    export(build(), tmp_path, {"tokenizer": "bytes"})
    assert (tmp_path / "tokenizer.json").exists()
    export(build(n_layer=1), tmp_path, {"tokenizer": "cl100k_base"})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}


# -----------------------------------------------------------------------------
# the command, the model card


def test_the_card_tells_how_to_open_the_model_and_what_its_run_knows(corpus, plain_run, tmp_path):
    folder, _ = plain_run
    run = Run("pretrained.py", "export", folder, f"--to={tmp_path / 'named'}")
    assert run.code == 0, run.err
    card = (tmp_path / "named" / "README.md").read_text()
    assert "# named\n" in card and 'from_pretrained("named", trust_remote_code=True' in card
    assert "1,024 tokens of `corpus" in card
    for row in [entry for entry in log(folder) if "eval" in entry][-1]["eval"]:
        assert f"{row['loss']:.4f}" in card
    command = json.loads((folder / "sessions.jsonl").read_text().splitlines()[-1])["command"]
    assert command in card
    assert json.loads(card.split("```json\n")[1].split("\n```")[0])["n_embd"] == 32
    assert without_clock(folder)  # the run is as it was
    scope = {}
    code = card.split("```python\n")[1].split("\n```")[0].replace('"named"', "folder")
    exec(code, {"folder": tmp_path / "named"}, scope)
    idx = tokens()
    assert torch.equal(reference_logits(scope["model"], idx), logits(load(folder), idx))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--as=gguf"], "as='gguf': must be one of gpt2, llama"),
        (["--as=llama"], "as=llama: not exact with input_injection="),
        (["--as=llama", "--n_loop=-1"], "n_loop=-1: must be from 0 to 9999"),
    ],
)
def test_a_format_that_cannot_be_is_one_line(words, message, plain_run, tmp_path):
    folder, _ = plain_run
    assert_refused(Run("pretrained.py", "export", folder, f"--to={tmp_path}/a", *words), message)
    assert not (tmp_path / "a").exists()


def test_the_command_unrolls_a_model_to_a_depth(tmp_path):
    model, idx = build(spread=0.2, **LLAMA), tokens()
    export(model, tmp_path / "source")
    words = [tmp_path / "source", f"--to={tmp_path / 'plain'}", "--as=llama", "--n_loop=4"]
    run = Run("pretrained.py", "export", *words)
    assert run.code == 0, run.err
    assert run.out == (
        f"{tmp_path / 'plain'}: Llama's format unrolled, 4 blocks as 10; transformers and"
        " pretrained.load open it\n"
    )
    assert torch.equal(logits(load(tmp_path / "plain"), idx), logits(model, idx, n_loop=4))
    run = Run("pretrained.py", "export", ROOT / "nowhere", "--to=x", "--as=llama")
    assert_refused(run, "no such checkpoint")
