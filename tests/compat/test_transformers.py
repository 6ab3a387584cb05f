"""transformers' models with and without `patch()`: the same outputs, gradients and texts."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compat.families import CONFIGS, PACKED, build, randomise
from tolerance import Float64Kept, assert_agrees
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from lcikernels.compat import transformers as compat

IDS = torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_fill(1, torch.arange(4), 0)  # 4 places of padding in front of the first row
MASK[1] = 1
BATCHES = {"whole": {"input_ids": IDS}, "padded": {"input_ids": IDS, "attention_mask": MASK}}


@pytest.fixture(autouse=True)
def unpatched_after():
    yield
    compat.unpatch()


def logits(model: PreTrainedModel, batch: dict):
    """A function of the model's parameters, p0, p1, ..., and these by those names."""
    names = [name for name, _ in model.named_parameters()]

    def run(**parameters):
        out = functional_call(
            model, dict(zip(names, parameters.values())), kwargs=batch | {"use_cache": False}
        )
        kept = batch.get("attention_mask")
        return out.logits if kept is None else out.logits * kept[..., None]

    return run, {f"p{i}": p for i, p in enumerate(model.parameters())}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", CONFIGS)
def test_outputs_and_gradients_are_those_of_the_unpatched_model(family, batch):
    model = build(family).train()
    run, parameters = logits(model, BATCHES[batch])

    def unpatched(**parameters):
        with Float64Kept():
            return run(**parameters)

    def patched(**parameters):
        with compat.patch():
            return run(**parameters)

    assert_agrees(patched, unpatched, **parameters)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_text_is_the_same_and_so_are_its_logits(family):
    """Greedy, from a padded batch, in float64: a prefill, then tokens one by one from the cache."""
    model = build(family).double()
    options = dict(BATCHES["padded"], max_new_tokens=6, do_sample=False, eos_token_id=None)
    options |= dict(output_logits=True, return_dict_in_generate=True)
    with Float64Kept():
        theirs = model.generate(**options)
        with compat.patch():
            ours = model.generate(**options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_cache_goes_on_where_it_ended(family):
    model = build(family).double()

    def halves():
        first = model(input_ids=IDS[:, :7], use_cache=True)
        return model(input_ids=IDS[:, 7:], cache=first.cache).logits

    with Float64Kept(), torch.no_grad():
        theirs = halves()
        with compat.patch():
            ours = halves()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", PACKED)
def test_packed_sequences_give_what_each_gives_alone(family, training):
    """With the arguments that DataCollatorWithFlattening makes; unpatched these models refuse them.

    Without their heads: Mamba2ForCausalLM keeps what it does not know from its layers.
    """
    model = build(family).double().base_model.train(training)
    lengths = [5, 8]
    row = IDS[:1]
    packed = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int(),
    }
    if family == "granitemoehybrid":  # asks flash attention alone to keep them apart
        apart = packed["seq_idx"][:, None, :, None] == packed["seq_idx"][:, None, None]
        packed["attention_mask"] = {"full_attention": apart.tril(), "linear_attention": None}
    with Float64Kept(), compat.patch():
        got = model(input_ids=row, **packed, use_cache=False).last_hidden_state
        alone = [
            model(input_ids=part, use_cache=False).last_hidden_state for part in row.split(lengths, dim=1)
        ]
        grads = [torch.autograd.grad(x.square().sum(), list(model.parameters()), allow_unused=True) for x in (
            got, torch.cat(alone, dim=1))]  # fmt: skip
    torch.testing.assert_close(got, torch.cat(alone, dim=1), rtol=0, atol=1e-9)
    for ours, truth in zip(*grads):
        if truth is not None:
            torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_model_loads_and_runs_patched(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    with compat.patch(), torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def everything() -> dict:
    """What every module of transformers holds, and what every wrapper's cells do."""
    held = {
        (name, key): value
        for name, module in sys.modules.items()
        if name.startswith("transformers")
        for key, value in vars(module).items()
    }
    for (module, name), value in list(held.items()):
        if isinstance(value, type) and "forward" in vars(value):
            held[module, name, "forward"] = vars(value)["forward"]
    for function in compat.wrappers():
        held |= {(id(function), name): cell.cell_contents for name, cell in compat.parts(function).items()}
    return held


def test_unpatching_restores_every_object():
    build("mamba"), build("mamba2"), build("lfm2")
    compat.patch()  # what is imported for it stays
    compat.unpatch()
    before = everything()
    compat.patch()
    assert sum(now is not before[key] for key, now in everything().items()) > 10
    compat.unpatch()
    after = everything()
    assert after.keys() == before.keys()
    assert all(after[key] is value for key, value in before.items())
    assert not compat.is_patched()


def test_calls_nest_and_repeat():
    compat.unpatch()
    with compat.patch():
        with compat.patch():
            compat.patch()
        assert compat.is_patched()
    assert not compat.is_patched()
    compat.patch()
    with compat.patch():
        pass
    assert compat.is_patched()
    compat.unpatch()
    compat.unpatch()
    assert not compat.is_patched()


LATER = """
import sys, torch
from compat.families import PACKED, build
from lcikernels.compat import transformers as compat
with compat.patch():
    from transformers.models.lfm2 import modeling_lfm2 as model
    ours = compat.parts(model.causal_conv1d_fn)["implementation"].cell_contents
    assert ours is compat.SERVED["causal_conv1d_fn"], ours
    for name in sorted(set(PACKED) - {"lfm2"}):
        assert f"transformers.models.{name}.modeling_{name}" not in sys.modules
        build(name)(torch.tensor([[3, 4]]))
        names = vars(sys.modules[f"transformers.models.{name}.modeling_{name}"])
        (norm,) = [x for key, x in names.items() if key.endswith("RMSNormGated")]
        assert hasattr(norm.forward, "__wrapped__"), name
assert not hasattr(norm.forward, "__wrapped__")
parts = {name: cell.cell_contents for name, cell in compat.parts(model.causal_conv1d_fn).items()}
assert parts["implementation"] is parts["torch_function"] and not parts["is_new_implementation"], parts
from transformers.integrations import hub_kernels
assert getattr(model, compat.DECORATOR) is getattr(hub_kernels, compat.DECORATOR)
assert getattr(hub_kernels, compat.DECORATOR).__module__ == hub_kernels.__name__
assert not hasattr(getattr(hub_kernels, compat.DECORATOR), "__wrapped__")
"""


def test_modules_that_are_imported_later_are_patched_and_restored():
    subprocess.run([sys.executable, "-c", LATER], check=True, cwd=Path(__file__).parents[1])


def test_another_transformers_is_left_alone(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "5.31.0")
    before = everything()
    with pytest.warns(UserWarning, match=r"left alone: it is 5.31.0, tested are 5.24 and later, before 5.25"):
        compat.patch()
    assert not compat.is_patched()
    assert all(value is before[key] for key, value in everything().items())


def test_the_tested_range_is_the_one_that_is_installed():
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    first, end = compat.TESTED
    assert f"transformers>={first},<{end}" in pyproject


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by place"])
def test_an_activation_that_is_applied_outside_leaves_the_other_arguments(by_name):
    update = compat.SERVED["causal_conv1d_update"]
    x, state, weight, bias = torch.randn(2, 3), torch.randn(4, 3, 5), torch.randn(3, 4), torch.randn(3)
    others = {"cache_seqlens": torch.tensor([3, 7]), "conv_state_indices": torch.tensor([2, 0])}
    other = state.clone()
    expected = torch.relu(update(x, other, weight, bias, None, **others))
    if by_name:
        got = update(x, state, weight, bias, activation="relu", **others)
    else:
        got = update(x, state, weight, bias, "relu", *others.values())
    assert torch.equal(got, expected) and torch.equal(state, other)


def test_export_gets_plain_torch_and_compile_gets_ours():
    model = build("mamba2")
    with compat.patch(), torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False})
        assert "lcikernels" not in program.graph_module.code
        assert "lcikernels.retention" in printed(model)
        expected = model(IDS, use_cache=False).logits
        model.compile(backend="aot_eager", fullgraph=True)
        got = model(IDS, use_cache=False).logits
    torch.testing.assert_close(got, expected)


def test_a_function_that_was_compiled_before_is_compiled_anew():
    model = build("mamba2")
    run = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="eager")
    with torch.no_grad():
        run(IDS)
        with compat.patch():
            assert torch.equal(run(IDS), model(IDS, use_cache=False).logits)
        assert torch.equal(run(IDS), model(IDS, use_cache=False).logits)


def printed(model: PreTrainedModel) -> str:
    """The ops that a call runs."""
    with torch.profiler.profile() as profile:
        model(IDS, use_cache=False)
    return " ".join(event.key for event in profile.key_averages()).replace("::", ".")


def test_the_kernels_library_is_offered_ours(monkeypatch):
    """Its mapping has them for the CPU and for CUDA; a layer of it computes by the wrapper."""
    from transformers.integrations import hub_kernels
    from transformers.models.mamba import modeling_mamba

    mapping = {"causal_conv1d_fn": {"cuda": "the Hub's"}, "RMSNorm": {"cuda": "the Hub's"}}
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel_mapping_transformers", lambda: mapping, raising=False)
    with compat.patch():
        assert set(mapping) == {*compat.SERVED, "RMSNorm"}
        for name in compat.SERVED:
            assert {"cpu", "cuda"} <= set(mapping[name])
        layer = mapping["causal_conv1d_fn"]["cuda"].load()

        class Function(torch.nn.Module):
            def forward(self, *args, **kwargs):
                return modeling_mamba.causal_conv1d_fn(*args, **kwargs)

        module = Function()
        x, weight = torch.randn(1, 3, 5), torch.randn(3, 4)
        expected = module(x, weight, activation="silu")
        module.forward = layer.forward.__get__(module)
        assert torch.equal(module(x, weight, activation="silu"), expected)
        assert len(inspect.signature(layer.forward).parameters) == 6
    assert mapping == {"causal_conv1d_fn": {"cuda": "the Hub's"}, "RMSNorm": {"cuda": "the Hub's"}}


def test_the_command_lists_every_function_that_transformers_looks_up(capsys):
    compat.main()
    said = capsys.readouterr().out
    for name, models in compat.models().items():
        assert name in compat.SERVED or name in compat.LEFT, name
        assert all(model in said for model in (name, *models))
    assert set(compat.SERVED) <= set(compat.models())


@pytest.mark.parametrize("family", CONFIGS)
def test_in_16_bits_it_is_as_exact_as_the_unpatched_model(family):
    """Within twice its error, root mean square over four models: both round states and outputs as often."""
    model = build(family)
    errors = torch.zeros(2, dtype=torch.float64)
    for _ in range(4):
        randomise(model.bfloat16())
        with torch.no_grad():
            theirs = model(IDS, use_cache=False).logits
            with compat.patch():
                ours = model(IDS, use_cache=False).logits
        with Float64Kept(), torch.no_grad():
            truth = model.double()(IDS, use_cache=False).logits
        assert ours.dtype == theirs.dtype
        errors += torch.stack([(x.double() - truth).square().mean() for x in (theirs, ours)])
    theirs, ours = errors.sqrt()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_runs_on_our_ops(family):
    model = build(family)
    with compat.patch(), torch.no_grad():
        assert "lcikernels." in printed(model)
    assert "lcikernels." not in printed(model)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_generating_compiles_into_one_graph(family):
    model = build(family)
    options = dict(input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    with compat.patch(), torch.no_grad():
        expected = model.generate(**options)
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        assert torch.equal(model.generate(**options), expected)
