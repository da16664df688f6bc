"""eval.py: its answers are lm-evaluation-harness's own, and the same however they are batched."""

import json
import math
import os
import random
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Run, assert_refused, build, halfway_rule, logged, prose, train

from decode import Decoder
from model import Loop
from nanorecur.dataset import load_meta, open_split, write_dataset
from nanorecur.exit_rules import StateExit, exit_logits
from pretrained import load, tokenizer_of

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.evaluator")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.lm_eval

TASKS = "tiny_choice,tiny_rolling,tiny_generate"
CHOICES = ["ka lo", "min", "ter a sho", "unre"]


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        # simple_evaluate runs pip list, for a second
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        yield


# -----------------------------------------------------------------------------
# tasks on local files


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(count, seed):
    """Return questions of 3 to 40 words, each with four answers and a text to continue."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        text = prose(seed + i, draw.randint(3, 12))
        row = {"question": text, "choices": CHOICES, "gold": draw.randrange(4)}
        rows.append(row | {"text": prose(seed + i, draw.randint(5, 40))})
    return rows


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """A folder of three task files: multiple choice, perplexity, generation."""
    folder = tmp_path_factory.mktemp("tasks")
    test = write_lines(folder / "test.jsonl", questions(7, 10))
    examples = write_lines(folder / "train.jsonl", questions(5, 50))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": test}}}
    data |= {"test_split": "test", "doc_to_text": "{{question}}"}
    metrics = {
        "tiny_choice": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "tiny_rolling": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        "tiny_generate": [{"metric": "exact_match"}],
    }
    special = {
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "fewshot_split": "train",
            "dataset_kwargs": {"data_files": {"test": test, "train": examples}},
        },
        "tiny_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
        },
        "tiny_generate": {
            "output_type": "generate_until",
            "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["q"], "max_gen_toks": 9, "do_sample": False},
        },
    }
    for name, fields in special.items():
        content = {"task": name, **data, **fields, "metric_list": metrics[name]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def evaluate(source, task_folder, out, *arguments, tasks=TASKS):
    """Run eval.py and return {(task, depth): entry}."""
    options = ("--device=cpu", "--samples", f"--out={out}", f"--include_path={task_folder}")
    run = Run("eval.py", source, f"--tasks={tasks}", *options, *arguments)
    assert run.code == 0, run.err
    entries = json.loads(Path(out).read_text())["entries"]
    return {(entry["task"], tuple(entry["loops"])): entry for entry in entries}, run


def answers(samples):
    """Return the answers to each question: log-probabilities, whether greedy, texts."""
    return [json.loads(json.dumps(sample["resps"])) for sample in samples]


def assert_close(a, b, tolerance=1e-5):
    """Compare nested lists: numbers up to a share of their size, all else exactly."""
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_close(x, y, tolerance)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    else:
        assert a == b


# -----------------------------------------------------------------------------
# models of the transformers library, with tokenizers of their own


def trained_tokenizer(with_start):
    """Return a byte-level BPE trained on prose. with_start: it puts <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([prose(0, 2000)], trainer)
    names = {"eos_token": "</s>"}
    if with_start:
        names["bos_token"] = "<s>"
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def write_model(folder, family):
    """Write a tiny model with random weights and its tokenizer in Hugging Face's form."""
    import transformers

    torch.manual_seed(1)
    tokenizer = trained_tokenizer(with_start=family == "llama")
    ids = dict(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    if family == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            **ids,
        )
    else:
        config = transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **ids
        )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight[:2] *= 3  # some answers have <s>, or end by </s>
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def theirs(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


def test_answers_are_those_of_lm_evals_own_model(theirs, task_folder, tmp_path):
    """Choices with two examples each, whole texts longer than the window, greedy continuations."""
    pytest.importorskip("accelerate")
    from lm_eval.tasks import TaskManager

    expected = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(theirs), "dtype": "float32"},
        tasks=TASKS.split(","),
        num_fewshot=2,
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
    )
    found, run = evaluate(theirs, task_folder, tmp_path / "out.json", "--num_fewshot=2")
    for task in TASKS.split(","):
        entry = found[task, ()]
        samples = answers(entry["lm_eval"]["samples"][task])
        assert_close(samples, answers(expected["samples"][task]))
        assert len({json.dumps(sample) for sample in samples}) > 3
        for metric, value in expected["results"][task].items():
            if isinstance(value, float):
                assert_close(entry["results"][task][metric], float(value))
    accuracy = f"{expected['results']['tiny_choice']['acc,none']:.4f}"
    assert rows_of(run.out)["tiny_choice acc"][0] == accuracy


def rows_of(table):
    """Return {row: its cells} of the table that eval.py prints."""
    found = re.findall(r"^(.*?)((?: +[-+.e0-9*]+)+)$", table, re.M)
    return {row: cells.split() for row, cells in found}


# -----------------------------------------------------------------------------
# models of our own


def write_run(folder, **overrides):
    """Write the checkpoint of a looped model of bytes, in which every loop matters."""
    shape = dict(vocab_size=256, block_size=64, input_injection="add", spread=0.2)
    model = build(**shape | overrides)
    with torch.no_grad():
        model.lm_head.weight[ord("e")] *= 4  # often the likeliest
    folder.mkdir(exist_ok=True)
    ckpt = {"model": model.state_dict(), "model_args": vars(model.config)}
    torch.save({**ckpt, "tokenizer": {"tokenizer": "bytes"}}, folder / "ckpt.pt")
    return folder


@pytest.fixture(scope="module")
def looped(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("looped"))


@pytest.fixture(scope="module")
def together(looped, task_folder, tmp_path_factory):
    """What eval.py answers at 1, 2 and 4 loops at once."""
    out = tmp_path_factory.mktemp("together") / "out.json"
    return evaluate(looped, task_folder, out, "--loops=4,1,2", "--num_fewshot=1")[0]


def samples_of(entry):
    (samples,) = entry["lm_eval"]["samples"].values()
    return answers(samples)


@pytest.mark.parametrize("loops, batch_size", [(1, 1), (2, 3), (4, 100)])
def test_answers_depend_neither_on_the_batch_nor_on_other_depths(
    looped, task_folder, tmp_path, together, loops, batch_size
):
    options = (f"--loops={loops}", f"--batch_size={batch_size}", "--num_fewshot=1")
    alone, _ = evaluate(looped, task_folder, tmp_path / "out.json", *options)
    for task in TASKS.split(","):
        assert_close(samples_of(alone[task, (loops,)]), samples_of(together[task, (loops,)]))
        depths = [samples_of(together[task, (n,)]) for n in (1, 2, 4)]
        assert depths[0] != depths[1] != depths[2]


def test_depths_together_cost_as_much_as_the_deepest_alone(
    looped, task_folder, tmp_path, monkeypatch
):
    steps = []
    step = Loop.step
    monkeypatch.setattr(Loop, "step", lambda *arguments: steps.append(1) or step(*arguments))
    costs = []
    for loops in ("4", "1,2,3,4"):
        steps.clear()
        evaluate(looped, task_folder, tmp_path / "o.json", f"--loops={loops}", tasks="tiny_choice")
        costs.append(len(steps))
    batches, prelude, coda = 4, 1, 1
    assert costs == [batches * (4 + prelude + coda), batches * (4 + prelude + 4 * coda)]


def test_with_two_groups_each_depth_has_a_pass_of_its_own(task_folder, tmp_path):
    groups = dict(n_prelude=0, n_block=0, n_coda=0, n_layer=3, n_loop=1)
    groups |= dict(loop_groups=((0,), (2,)), loop_counts=(2, 3))
    run = write_run(tmp_path / "run", **groups)
    two, _ = evaluate(run, task_folder, tmp_path / "two.json", "--loops=2,3", tasks="tiny_choice")
    own, _ = evaluate(run, task_folder, tmp_path / "own.json", tasks="tiny_ch*")
    three, _ = evaluate(run, task_folder, tmp_path / "o.json", "--loops=3", tasks="tiny_choice")
    found = [samples_of(two["tiny_choice", (n, n)]) for n in (2, 3)]
    assert_close(found[1], samples_of(three["tiny_choice", (3, 3)]))
    assert samples_of(own["tiny_choice", (2, 3)]) not in found


def rolling_task(path):
    """Return a task file's content: bits per byte of the texts in a file."""
    return {
        "task": "rolling",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }


def test_rolling_is_our_own_evaluation_in_windows_of_block_size(tmp_path):
    """The byte before the text, NUL, is the separator, which lm-eval puts there too."""
    text = prose(3, 300) + " \u00e4\u20ac"
    data, out = tmp_path / "data", tmp_path / "run"
    splits = {"train": [prose(1, 3000)], "val": ["\0" + text]}
    write_dataset(data, {"tokenizer": "bytes"}, splits)
    run = train(data, out, "--eval_loops=1,3", "--eval_stride=16")
    assert run.code == 0, run.err
    write_lines(tmp_path / "text.jsonl", [{"text": text}])
    content = rolling_task(tmp_path / "text.jsonl")
    (tmp_path / "rolling.yaml").write_text(yaml.safe_dump(content))
    found, _ = evaluate(out, tmp_path, tmp_path / "o.json", "--loops=1,2,3", tasks="rolling")
    rows = [row for row in logged(out, "eval")[-1] if row["split"] == "val"]
    assert sorted(row["loops"][0] for row in rows) == [1, 2, 3]
    for row in rows:
        result = found["rolling", tuple(row["loops"])]["results"]["rolling"]
        assert result["bits_per_byte,none"] == pytest.approx(row["bits_per_byte"], rel=1e-5)


# -----------------------------------------------------------------------------
# exits and drafts


def test_scores_and_mean_loops_with_exit_are_those_of_each_text_alone(
    looped, task_folder, tmp_path
):
    model = load(looped)
    pairs = []
    for line in (task_folder / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        for choice in row["choices"]:
            pairs.append((list(row["question"].encode()), list(f" {choice}".encode())))
    context, continuation = max(pairs, key=lambda pair: sum(map(len, pair)))
    assert len(context + continuation) > 65  # longer than the window
    threshold = halfway_rule(model, torch.tensor([context[:60]]), n_loop=5).threshold
    options = (
        "--loops=5,3",
        "--automatic_loop_exit",
        f"--automatic_loop_exit_threshold={threshold}",
    )
    options += ("--min_loops=3",)
    found, run = evaluate(looped, task_folder, tmp_path / "o.json", *options, tasks="tiny_choice")
    assert re.search(
        r"^[1-9]\d* of 28 contexts were cut on the left: block_size=64$", run.err, re.M
    )
    for n in (3, 5):
        expected, used = [], []
        for context, continuation in pairs:
            row = torch.tensor([context + continuation])[:, -65:]
            logits, loops = exit_logits(model, row[:, :-1], StateExit(threshold), n, min_loops=3)
            log_p = logits.log_softmax(-1)[0].gather(-1, row[0, 1:, None])
            expected.append(log_p[-len(continuation) :].sum().item())
            used += loops[0, -len(continuation) :].tolist()
        entry = found["tiny_choice", (n,)]
        log_p = [resp[0] for sample in samples_of(entry) for (resp,) in sample]
        assert_close(log_p, expected)
        assert entry["mean_loops"] == pytest.approx(sum(used) / len(used), rel=1e-6)
        assert 3 < entry["mean_loops"] < 5 or n == entry["mean_loops"] == 3
        shown = rows_of(run.out)["tiny_choice mean loops"]
        assert f"{entry['mean_loops']:.4f}" in shown


def test_drafts_change_no_answer_and_exits_change_some(looped, task_folder, tmp_path, monkeypatch):
    rounds, draft = [], Decoder.draft
    monkeypatch.setattr(Decoder, "draft", lambda *asked: rounds.append(1) or draft(*asked))

    def answer(*arguments, folder=task_folder):
        path = tmp_path / "out.json"
        options = ("--loops=4", *arguments)
        found, _ = evaluate(looped, folder, path, *options, tasks="tiny_generate")
        entry = found["tiny_generate", (4,)]
        return samples_of(entry), entry["mean_loops"]

    plain, loops = answer()
    assert loops == 4
    assert len({json.dumps(text) for text in plain}) > 3
    assert not rounds
    assert answer("--draft_tokens=3", "--draft_loops=2") == (plain, 4)
    assert rounds
    silent = with_options(task_folder, tmp_path / "tasks", do_sample=None)
    assert answer(folder=silent) == (plain, 4)
    exits = ("--automatic_loop_exit", "--automatic_loop_exit_threshold=1.5")
    stopped, loops = answer(*exits)
    assert 1 <= loops < 4
    assert stopped != plain


# -----------------------------------------------------------------------------
# nanochat's CORE


def core_items(count=9):
    """Return items of each type of CORE's tasks, with words that are symbols of one byte."""
    draw = random.Random(5)
    items = {"choice": [], "schema": [], "words": []}
    for i in range(count):
        a, b, c = (prose(30 * i + j, draw.randint(1, 4)).rstrip(".") for j in range(3))
        gold = draw.randrange(2)
        items["choice"].append({"query": a, "choices": [b, f"{b} {c}", c], "gold": gold})
        items["schema"].append({"context_options": [a, b], "continuation": c, "gold": gold})
        items["words"].append({"context": f" {a} ", "continuation": "ee"[: 1 + i % 2]})
    return items


CORE = [  # label, type, examples, delimiter, baseline in percent
    ("choice", "multiple_choice", 2, "\nA: ", 33.3),
    ("schema", "schema", 1, " ", 50),
    ("words", "language_modeling", 0, "", 0),
]


@pytest.fixture
def bundle(tmp_path):
    """A folder of the form of nanochat's eval_bundle: a task of each type."""
    folder = tmp_path / "bundle"
    (folder / "eval_data").mkdir(parents=True)
    tasks, table = [], "Eval Task,Task Category,Random baseline\n"
    for label, kind, shots, delimiter, baseline in CORE:
        write_lines(folder / "eval_data" / f"{label}.jsonl", core_items()[label])
        task = {"label": label, "dataset_uri": f"{label}.jsonl", "num_fewshot": [shots]}
        task["icl_task_type"] = kind
        if delimiter != " ":
            task["continuation_delimiter"] = delimiter
        tasks.append(task)
        table += f"{label},symbols,{baseline}\n"
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks}))
    (folder / "eval_meta_data.csv").write_text(table)
    return folder


def log_p_of(model, text, n_last, n_loop):
    """Return the log-probabilities of the last bytes of a text behind NUL, cut to the window."""
    row = torch.tensor([list(b"\0" + text.encode())[-model.block_size :]])
    logits, _ = model(row[:, :-1], row[:, 1:], n_loop=n_loop)
    log_p = logits.log_softmax(-1)[0]
    right = log_p.argmax(-1) == row[0, 1:]
    return log_p.gather(-1, row[0, 1:, None])[-n_last:].mean().item(), right[-n_last:].all().item()


def accuracy_by_hand(model, label, kind, shots, delimiter, n_loop):
    items, n_right = core_items()[label], 0
    random.Random(1337).shuffle(items)
    for i, item in enumerate(items):
        others = [j for j in range(len(items)) if j != i]
        before = ""
        for j in random.Random(1234 + i).sample(others, shots):
            shot = items[j]
            if kind == "multiple_choice":
                before += f"{shot['query']}{delimiter}{shot['choices'][shot['gold']]}\n\n"
            else:
                option = shot["context_options"][shot["gold"]]
                before += f"{option}{delimiter}{shot['continuation']}\n\n"
        if kind == "multiple_choice":
            texts = [f"{before}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
            shared = len(os.path.commonprefix(texts))
            lengths = [len(text) - shared for text in texts]
        elif kind == "schema":
            end = f"{delimiter}{item['continuation']}"
            texts = [f"{before}{option}{end}" for option in item["context_options"]]
            shared = len(os.path.commonprefix([text[::-1] for text in texts]))
            lengths = [shared] * len(texts)
        else:
            context = item["context"].strip()
            texts = [f"{context}{delimiter}{item['continuation']}"]
            lengths = [len(delimiter + item["continuation"])]
            n_right += log_p_of(model, texts[0], lengths[0], n_loop)[1]
            continue
        means = []
        for text, length in zip(texts, lengths):
            mean = log_p_of(model, text, length, n_loop)[0] if length else -math.inf
            means.append(mean)
        n_right += means.index(max(means)) == item["gold"]
    return n_right / len(items)


def test_core_is_nanochats_definition(looped, bundle, tmp_path):
    model, out = load(looped), tmp_path / "out.json"
    options = (f"--core_bundle={bundle}", "--loops=1,3", "--device=cpu", f"--out={out}")
    run = Run("eval.py", looped, *options)
    assert run.code == 0, run.err
    entries = json.loads(out.read_text())["entries"]
    found = {(entry["task"], entry["loops"][0]): entry["results"] for entry in entries}
    accuracies = set()
    for n in (1, 3):
        total = 0
        for label, kind, shots, delimiter, baseline in CORE:
            accuracy = accuracy_by_hand(model, label, kind, shots, delimiter, n)
            centered = (accuracy - baseline / 100) / (1 - baseline / 100)
            expected = {"acc": pytest.approx(accuracy), "centered": pytest.approx(centered)}
            assert found[f"CORE {label}", n][f"CORE {label}"] == expected
            accuracies.add((label, accuracy))
            assert 0 < accuracy < 1
            total += centered / 3
        assert found["CORE", n]["CORE"]["centered"] == pytest.approx(total)
        assert f"{total:.4f}" in rows_of(run.out)["CORE centered"]
    assert len(accuracies) > 3  # they depend on the loops


# -----------------------------------------------------------------------------
# options and files


def test_a_group_is_one_row_and_results_lie_beside_the_checkpoint(task_folder, tmp_path):
    run_folder = write_run(tmp_path / "run")
    group = {"group": "tiny_group", "task": ["tiny_choice", "tiny_more"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    content = yaml.safe_load((task_folder / "tiny_choice.yaml").read_text())
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "tiny_group.yaml").write_text(yaml.safe_dump(group))
    for name in group["task"]:
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump({**content, "task": name}))
    options = ("--tasks=tiny_group", f"--include_path={tasks}", "--limit=3", "--device=cpu")
    run = Run("eval.py", run_folder, *options)
    assert run.code == 0, run.err
    assert list(rows_of(run.out)) == ["loops", "tiny_group acc"]
    (entry,) = json.loads((run_folder / "eval.json").read_text())["entries"]
    assert entry["loops"] == [3]  # the model's own
    of_tasks = [entry["lm_eval"]["results"][name]["acc,none"] for name in group["task"]]
    assert entry["results"]["tiny_group"]["acc,none"] == pytest.approx(sum(of_tasks) / 2)
    assert entry["lm_eval"]["n-samples"]["tiny_more"]["effective"] == 3


def with_options(task_folder, folder, **options):
    """Write a folder with the generation task and other generation_kwargs."""
    content = yaml.safe_load((task_folder / "tiny_generate.yaml").read_text())
    content["generation_kwargs"] |= options
    folder.mkdir()
    (folder / "tiny_generate.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_a_task_that_samples_draws_by_the_seed(looped, task_folder, tmp_path):
    sampling = dict(do_sample=True, temperature=1.0, top_k=20, max_gen_toks=70)  # beyond the window
    folder = with_options(task_folder, tmp_path / "tasks", **sampling)

    def answer(*arguments):
        path = tmp_path / "out.json"
        found, _ = evaluate(looped, folder, path, *arguments, "--limit=1", tasks="tiny_generate")
        return samples_of(found["tiny_generate", (3,)])

    first = answer()
    assert first == answer() != answer("--seed=2")
    assert all(len(text) > 0 and "q" not in text for ((text,),) in first)


def test_what_generation_cannot_do_is_refused(looped, task_folder, tmp_path):
    folder = with_options(task_folder, tmp_path / "tasks", num_beams=4)
    options = ("--tasks=tiny_generate", f"--include_path={folder}", f"--out={tmp_path / 'o.json'}")
    run = Run("eval.py", looped, "--device=cpu", *options)
    assert run.code == 2
    words = "generation_kwargs={'num_beams': 4}: must be of top_k, top_p, min_p, repetition_penalty"
    assert words in run.err


WRONG = {
    "": "tasks='': must be names such as hellaswag",
    "--tasks=a --include_path=nowhere": "include_path='nowhere': must be a folder",
    "--tasks=a --exit_rule=kl": "exit_rule='kl': must be left out, or with --automatic_loop_exit",
    "--tasks=a --draft_loops=1": "draft_loops=1: must be left out, or with --draft_tokens",
    "--tasks=a --draft_tokens=2 --draft_loops=2 --loops=1,3": "draft_loops=2: must be from 0 to",
    "--tasks=a --automatic_loop_exit --min_loops=2 --loops=1": "min_loops=2: must be at most the 1",
    "--tasks=a --loops=0": "n_loop=0: must be an int >= 1",
    "--core_bundle=nowhere": "core_bundle='nowhere': must be a folder that holds core.yaml",
    "--core_bundle=a --num_fewshot=1": "num_fewshot=1: must be left out, or with --tasks",
    "--tasks=a --batch_size=0": "batch_size=0: must be at least 1",
    "--tasks=a --source=nowhere": "nowhere: no such checkpoint",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_options_are_refused_in_one_line(looped, arguments):
    source = [] if "--source" in arguments else [looped]
    assert_refused(Run("eval.py", *source, "--device=cpu", *arguments.split()), WRONG[arguments])


def test_a_continuation_longer_than_the_window_is_refused(looped, task_folder, tmp_path):
    content = yaml.safe_load((task_folder / "tiny_choice.yaml").read_text())
    content["doc_to_choice"] = ["a", "b" * 99, "c", "d"]
    (tmp_path / "tiny_choice.yaml").write_text(yaml.safe_dump(content))
    options = ("--tasks=tiny_choice", f"--include_path={tmp_path}", "--device=cpu")
    run = Run("eval.py", looped, *options)
    assert run.code == 2
    assert "block_size=64: must be at least the 100 tokens of a task's continuation" in run.err


def test_a_model_without_loops_has_one_column(task_folder, tmp_path):
    run = write_run(tmp_path / "run", n_layer=1, n_prelude=0, n_block=0, n_coda=0, n_loop=1)
    options = ("--tasks=tiny_choice", f"--include_path={task_folder}", "--device=cpu")
    assert_refused(Run("eval.py", run, *options, "--loops=1,2"), "loops=(1, 2): must be ()")


def test_without_lm_eval_one_line_says_what_to_install(looped, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    run = Run("eval.py", looped, "--tasks=hellaswag")
    assert_refused(run, "or pip install -r requirements-eval.txt first")
    assert Run("eval.py", "-h").code == 0


@pytest.mark.slow
def test_a_task_that_nobody_has_is_refused(looped):
    run = Run("eval.py", looped, "--tasks=hellaswag,tinny_choice", "--device=cpu")
    assert run.code == 2
    assert "tasks='tinny_choice': must be names that lm-eval has" in run.err


def test_a_tokenizer_without_a_separator_begins_texts_with_a_newline(task_folder, tmp_path):
    folder = write_run(tmp_path / "run")
    ckpt = torch.load(folder / "ckpt.pt")
    ascii_chars = "".join(map(chr, range(128)))
    torch.save(
        {**ckpt, "tokenizer": {"tokenizer": "char", "chars": ascii_chars}}, folder / "ckpt.pt"
    )
    found, _ = evaluate(folder, task_folder, tmp_path / "o.json", tasks="tiny_rolling")
    texts = [json.loads(line)["text"] for line in open(task_folder / "test.jsonl")]
    i = min(range(len(texts)), key=lambda i: len(texts[i]))
    assert len(texts[i]) <= 64
    row = torch.tensor([list(f"\n{texts[i]}".encode())])
    _, loss = load(folder)(row[:, :-1], row[:, 1:])
    ((log_p,),) = samples_of(found["tiny_rolling", (3,)])[i]
    assert log_p == pytest.approx(-loss.item() * len(texts[i]), rel=1e-5)


# -----------------------------------------------------------------------------
# from somebody's model to one that loops: fold, heal, sample, evaluate, export

HEAL = """
    --n_prelude=2 --n_block=4 --n_coda=2 --n_loop=2 --max_loops=4 --block_size=64 --batch_size=4
    --gradient_accumulation_steps=2 --max_iters=60 --warmup_iters=5 --loop_warmup_iters=20
    --learning_rate=3e-3 --eval_interval=30 --eval_iters=5 --eval_loops=1,4 --compile=False
    --device=cpu
""".split()


@pytest.mark.slow
def test_a_folder_is_folded_healed_sampled_evaluated_and_opens_elsewhere(tmp_path, monkeypatch):
    """The five commands of config/heal_smollm2.py, with a tiny Llama of eight layers."""
    import transformers

    monkeypatch.chdir(tmp_path)
    source = write_model(tmp_path / "source", "llama")
    data, healed, exported = (tmp_path / name for name in ("data", "healed", "exported"))
    (tmp_path / "my.txt").write_text(prose(7, 6000))
    files = (f"--input_files={tmp_path / 'my.txt'}", f"--tokenizer=hf:{source}")
    run = Run("data/text/prepare.py", *files, f"--out_dir={data}")
    assert run.code == 0, run.err

    options = (f"--init_from={source}", f"--dataset={data}", f"--out_dir={healed}", *HEAL)
    run = Run("train.py", "config/heal_smollm2.py", *options)
    assert run.code == 0, run.err
    first, *_, last = logged(healed, "eval")
    losses = {row["loops"][0]: row["loss"] for row in first if row["split"] == "val"}
    unfolded = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    meta = load_meta(data)
    split = open_split(data, "val", meta, 64, meta["vocab_size"])
    x, y = (torch.from_numpy(part) for part in split.windows(split.spread(split.n_windows)))
    logits = unfolded(x).logits.flatten(0, 1)
    of_source = torch.nn.functional.cross_entropy(logits, y.flatten()).item()
    assert losses[1] == pytest.approx(of_source, rel=1e-4)  # at one loop it is the source
    losses = {row["loops"][0]: row["loss"] for row in last if row["split"] == "val"}
    assert losses.keys() == {1, 2, 4} and max(losses.values()) < of_source - 1

    texts = set()
    for n in (1, 2, 4):
        start = ("--start=Ka lo", "--num_samples=1", "--max_new_tokens=20", "--temperature=0")
        run = Run("sample.py", healed, *start, f"--n_loop={n}", "--device=cpu", "--jsonl")
        assert run.code == 0, run.err
        texts.add(json.loads(run.out)["text"])
    assert all("<" not in text for text in texts)

    (tmp_path / "tasks").mkdir()
    write_lines(tmp_path / "tasks" / "test.jsonl", [{"text": prose(8, 40)} for _ in range(3)])
    task = rolling_task(tmp_path / "tasks" / "test.jsonl")
    (tmp_path / "tasks" / "rolling.yaml").write_text(yaml.safe_dump(task))
    bits = {}
    for name in (source, healed):
        loops = ["--loops=1,2,4"] if name == healed else []
        found, _ = evaluate(name, tmp_path / "tasks", tmp_path / "o.json", *loops, tasks="rolling")
        for (_, depth), entry in found.items():
            bits[depth] = entry["results"]["rolling"]["bits_per_byte,none"]
    assert (
        bits.keys() == {(), (1,), (2,), (4,)} and max(bits[1,], bits[2,], bits[4,]) < bits[()] - 1
    )

    run = Run("pretrained.py", "export", healed, f"--to={exported}")
    assert run.code == 0, run.err
    assert tokenizer_of(exported)["tokenizer_sha256"] == meta["tokenizer_sha256"]
    ours = load(healed)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    idx = torch.tensor([transformers.AutoTokenizer.from_pretrained(exported).encode("Ka lo re")])
    for n in (1, 2, 4):
        expected = ours.logits(ours.hidden(idx, n))
        torch.testing.assert_close(load(exported).hidden(idx, n), ours.hidden(idx, n))
        torch.testing.assert_close(theirs(idx, n_loop=n).logits, expected)
