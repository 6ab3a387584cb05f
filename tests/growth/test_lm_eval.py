"""lm-evaluation-harness reads what transfer writes, by its ordinary `hf` model, and finds what it should.

In an interpreter of its own, where nobody imports this package: the model comes by the lines in its folder.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import neox
from transformers import AutoModelForCausalLM, AutoTokenizer

import growth
from growth.demo.corpus import byte_tokenizer

END, POSITIONS, NEW = 256, 32, 6
DOCUMENTS = [
    {"question": "one two", "choices": ["three", "four"], "answer": 0},
    {"question": "a longer question", "choices": ["x", "yz", "."], "answer": 1},
    {"question": "b", "choices": ["three", "four"], "answer": 1},
]
TEXTS = [{"text": "the quick brown fox jumps over the lazy dog, and again, and again"}, {"text": "short"}]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
WHERE = """task: {}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {}}}}}
test_split: test"""
RUN = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
assert not {"lcikernels", "growth"} & set(sys.modules)
found = simple_evaluate(
    model="hf",
    model_args=f"pretrained={sys.argv[1]},trust_remote_code=True",
    device="cpu",
    batch_size=2,
    bootstrap_iters=0,
    tasks=sys.argv[3:],
    task_manager=TaskManager(include_path=sys.argv[2], include_defaults=False),
)
assert any(name.endswith(".modeling_lci") for name in sys.modules)
assert "lcikernels" in sys.modules and "growth" not in sys.modules
print(json.dumps({name: [found["results"][name], found["samples"][name]] for name in sys.argv[3:]}))
"""


@pytest.fixture(scope="module")
def transferred(tmp_path_factory) -> Path:
    """A model of retention, Mamba, Mamba-2 and attention, whose tokenizer ends texts with token 256."""
    folder = tmp_path_factory.mktemp("transferred")
    sizes = {"num_hidden_layers": 4, "max_position_embeddings": POSITIONS}
    source = neox(folder / "source", vocab_size=END + 1, **sizes)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>", "bos_token": "<end>"})
    tokenizer.save_pretrained(source)
    growth.transfer(source, folder / "out", pattern="RMSA")
    return folder / "out"


@pytest.fixture(scope="module")
def evaluated(transferred, tmp_path_factory) -> dict[str, tuple[dict, list[dict]]]:
    """A task's name -> its results, and what was answered to each document, in their order."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, lines in {"choice": DOCUMENTS, "writing": DOCUMENTS, "rolling": TEXTS}.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (folder / f"{name}.yaml").write_text(WHERE.format(name, data) + TASKS[name])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, transferred, folder, *TASKS],
        capture_output=True,
        text=True,
        cwd=Path(growth.__file__).parents[1],
        env={"PATH": "", "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(transferred):
    return AutoModelForCausalLM.from_pretrained(transferred).eval()


@torch.no_grad()
def log_likelihood(model, ids: list[int], last: int) -> float:
    """Of the last tokens after those before them."""
    losses = model(torch.tensor([ids[:-1]])).logits.log_softmax(-1)[0, -last:]
    return losses.gather(1, torch.tensor(ids[-last:])[:, None]).sum().item()


def test_choices_are_as_likely_as_the_model_says(evaluated, model):
    results, samples = evaluated["choice"]
    right = []
    for document, sample in zip(DOCUMENTS, samples, strict=True):
        wanted = []
        for choice in document["choices"]:
            words = f" {choice}".encode()
            wanted.append(log_likelihood(model, [*document["question"].encode(), *words], len(words)))
        got = [likelihood for ((likelihood, _),) in sample["resps"]]
        assert got == pytest.approx(wanted, rel=1e-5)
        right.append(max(range(len(wanted)), key=wanted.__getitem__) == document["answer"])
    assert results["acc,none"] == pytest.approx(sum(right) / len(right))


def test_a_text_longer_than_the_positions_is_as_likely_as_its_windows(evaluated, model):
    """Each window has as many tokens as there are positions, so the last repeats some of the one before."""
    results, samples = evaluated["rolling"]
    total = 0.0
    for document, sample in zip(TEXTS, samples, strict=True):
        row = [END, *document["text"].encode()]
        wanted, N = 0.0, len(row) - 1
        for start in range(0, N, POSITIONS):
            end = min(start + POSITIONS, N)
            wanted += log_likelihood(model, row[max(0, end - POSITIONS) : end + 1], end - start)
        assert sample["resps"] == [[pytest.approx(wanted, rel=1e-5)]]
        total += wanted
    count = sum(len(document["text"].encode()) for document in TEXTS)
    assert len(TEXTS[0]["text"]) > 2 * POSITIONS
    assert results["byte_perplexity,none"] == pytest.approx(torch.tensor(-total / count).exp().item())


def test_what_is_written_after_a_prompt_is_what_the_model_writes(evaluated, model, transferred):
    """Alone and without a cache, where lm_eval pads rows on the left and uses one."""
    tokenizer = AutoTokenizer.from_pretrained(transferred)
    for document, sample in zip(DOCUMENTS, evaluated["writing"][1], strict=True):
        ids = torch.tensor([list(document["question"].encode())])
        with torch.no_grad():
            for _ in range(NEW):
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        words = tokenizer.decode(ids[0, -NEW:]).partition("<end>")[0].partition("\n")[0]
        assert sample["resps"] == [[words]] and words
