"""Adam's state grown with its model: gradients under the dual maps, next steps, a Trainer that goes on."""

import json
import shutil

import pytest
import torch
from checkpoints import ALL, inputs
from exact import exact
from grown_gradients import recipes, scalar
from torch import distributed
from train_ranks import started
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.families import model_of
from growth.loading import load_model, quiet
from growth.methods import Lemon, Net2Net, Upcycle
from growth.optimizing.carried import Carried
from growth.optimizing.duals import Moment
from growth.optimizing.saved import OPTIMIZER, SCHEDULER, STATE, grouped, parts, read_saved
from growth.optimizing.shares import recorded_shares
from growth.plan import Source
from growth.sizes import Sizes, resized
from growth.training.moments import moments_in_memory
from growth.training.rates import with_rates
from growth.training.sharded import begin_with
from growth.training.trainer import train
from growth.training.warming import WarmNewUnits, new_entries

LR = 1e-3
TEXT = "".join(chr(97 + i * i % 23) + ("\n" if i % 31 == 30 else "") for i in range(6000))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> the folder of such a checkpoint, in float64."""
    found = {}

    def make(name):
        if name not in found:
            with quiet():
                found[name] = ALL[name](tmp_path_factory.mktemp("source") / "src", torch.float64)
        return found[name]

    return make


# ---- states


def adam(network, shares=None, decay=0.1, eps=1e-30):
    groups = [
        {"params": [dict(network.named_parameters())[x] for x in part], "weight_decay": d}
        for part, d in zip(grouped(network), (decay, 0.0), strict=True)
    ]
    made = torch.optim.AdamW(groups, LR, betas=(0.9, 0.99), eps=eps)
    return with_rates(made, network, shares, keep_decay=True) if shares else made


def step(network, optimizer, batch, seed):
    loss = scalar(network, batch, seed)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def save(folder, optimizer, steps=4):
    torch.save(optimizer.state_dict(), folder / OPTIMIZER)
    torch.save({"last_epoch": steps, "base_lrs": [LR, LR], "_step_count": steps + 1}, folder / SCHEDULER)
    (folder / STATE).write_text(json.dumps({"global_step": steps, "stateful_callbacks": {}}))
    return folder


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """name -> a checkpoint of a run of four steps, with its optimizer's state, in float64."""
    found = {}

    def make(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("trained") / "run"
            with quiet():
                network = exact(load_model(made(name), torch.float64))
                shutil.copytree(made(name), folder)
                optimizer, batch = adam(network), inputs(Checkpoint(folder).config)
                for i in range(4):
                    step(network, optimizer, batch, i)
                network.save_pretrained(folder)
            found[name] = save(folder, optimizer)
        return found[name]

    return make


def begun(folder, **options):
    """The model in a folder and Adam with the state beside it."""
    network = exact(load_model(folder, torch.float64))
    optimizer = adam(network, **options)
    begin_with(moments_in_memory(network, Checkpoint(folder)), network, optimizer)
    return network, optimizer


def next_losses(folder, **options):
    """Of this step and, after it, of the next one."""
    network, optimizer = begun(folder, **options)
    batch = inputs(Checkpoint(folder).config)
    return step(network, optimizer, batch, 7), scalar(network, batch, 8).item()


@pytest.mark.parametrize("method", [Net2Net(noise=0.0), Lemon(noise=0.0)], ids=str)
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama with biases, tied", "gemma2", "lci learned ARM"])
def test_the_next_step_of_a_grown_model_is_its_source_s_next_step(trained, tmp_path, name, method):
    """Twice as wide, with the recorded shares of the rate and the same decay a step; and not without them."""
    src = trained(name)
    growth.grow(src, tmp_path / "dst", Sizes(hidden=128), method, optimizer=src)
    want = next_losses(src)
    shares = in_memory(tmp_path / "dst", recorded_shares(tmp_path / "dst"))
    assert next_losses(tmp_path / "dst", shares=shares) == pytest.approx(want, abs=1e-9)
    other = next_losses(tmp_path / "dst")
    assert other[0] == pytest.approx(want[0], abs=1e-9) and abs(other[1] - want[1]) > 1e-5


def saved(folder):
    checkpoint = Checkpoint(folder)
    return read_saved(folder, model_of(checkpoint.config, checkpoint.names))


def in_memory(folder, by_table):
    network, checkpoint = load_model(folder), Checkpoint(folder)
    known = parts(network, model_of(checkpoint.config, checkpoint.names))
    return {name: by_table[known[name][0]] for name in known if known[name][0] in by_table}


def test_without_shares_readers_of_k_copies_move_k_times_as_fast(trained, tmp_path):
    """What they read of the narrow wire: the sum over a unit's copies."""
    src, name = trained("llama"), "model.layers.1.mlp.up_proj.weight"
    growth.grow(src, tmp_path / "dst", Sizes(hidden=192), Net2Net(noise=0.0), optimizer=src)
    moved = []
    for folder, copies in ((src, 1), (tmp_path / "dst", 3)):
        network, optimizer = begun(folder, decay=0.0)
        weight = dict(network.named_parameters())[name]
        before = weight.detach().clone()
        step(network, optimizer, inputs(Checkpoint(folder).config), 7)
        moved.append((weight.detach() - before)[:96].unflatten(1, (copies, 64)).sum(1))
    assert torch.allclose(moved[1], 3 * moved[0], atol=1e-9 * LR)


def test_the_old_units_entries_are_as_before_and_new_ones_begin_anew(trained, tmp_path):
    src = trained("phi3")  # fused on disk
    growth.grow(
        src, tmp_path / "dst", Sizes(hidden=128, layers=5), Lemon(), optimizer=src, policy="asymmetric-reset"
    )
    old, new = saved(src), saved(tmp_path / "dst")
    record = json.loads((tmp_path / "dst/growth.json").read_text())
    assert record["optimizer"] == str(src) and record["policy"] == "asymmetric-reset"
    assert record["new"]["layers"] == {"": [2, 4]}
    fresh = new_entries(tmp_path / "dst")
    for name, state in new.states.items():
        was = name.replace("layers.3", "layers.2")
        mask = fresh.get(name, torch.zeros_like(state["exp_avg"], dtype=torch.bool))
        assert mask.any() and not mask.all() and state["step"] == old.states[was]["step"] == 4
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key][~mask], old.states[was][key].flatten())
        assert (state["exp_avg"][mask] == 0).all()
        assert (state["exp_avg_sq"][mask] > 0).all() or "embed" in name  # words that the batch lacks
    without = set(model_of(Checkpoint(tmp_path / "dst").config, ()).table()) - set(new.states)
    assert {name.split(".")[2] for name in without} == {"2", "4"} and len(without) == 12


def test_a_new_column_takes_no_larger_first_step_than_an_old_one(trained, tmp_path):
    """With v = 0 and the old count of steps it would be (1 - b1) / sqrt(1 - b2) = 1 here, 3.16 at 0.999."""
    src = trained("llama")
    growth.grow(src, tmp_path / "dst", Sizes(hidden=160, layers=4), Lemon(), optimizer=src)
    network, optimizer = begun(tmp_path / "dst", decay=0.0)
    before = {name: x.detach().clone() for name, x in network.named_parameters()}
    for state in optimizer.state.values():
        state["step"].fill_(10**4)
    step(network, optimizer, inputs(network.config), 7)
    name = "model.layers.1.mlp.up_proj.weight"
    (moved,) = (x.detach() - before[name] for n, x in network.named_parameters() if n == name)
    old, new = moved[:, :64].abs(), moved[:, 128:].abs()
    assert new.max() < 2 * old.max() and new.mean() < old.mean() and new.mean() > 0
    added = dict(network.named_parameters())["model.layers.3.mlp.down_proj.weight"]
    assert optimizer.state[added]["step"] == 1
    largest = (added.detach() - before["model.layers.3.mlp.down_proj.weight"]).abs().max()
    assert largest == pytest.approx(LR)


def test_moments_of_rows_that_nothing_old_tells_of_are_means(trained):
    src = trained("llama")
    source, made = recipes(src, Lemon(noise=0.0), Sizes(hidden=160), power=2)
    squares = {name: state["exp_avg_sq"] for name, state in saved(src).states.items()}
    got = made["model.layers.0.mlp.up_proj.weight"].made(Moment(source, squares), filled=True)
    assert torch.allclose(got[:, 128:], got[:, :128].mean(1, keepdim=True).expand(-1, 32))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_layer_between_two_has_the_mean_of_their_moments(trained, tmp_path, name):
    """In proportion; of squares, in proportion squared."""
    src = trained(name)
    growth.grow(src, tmp_path / "dst", Sizes(layers=5), growth.Fine(added="linear"), optimizer=src)
    old, new = saved(src).states, saved(tmp_path / "dst").states
    assert len(new) * 3 > len(old) * 4
    (weight,) = (x for x in old if ".1." in x and x.endswith(("up_proj.weight", "mlp.c_fc.weight")))
    for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        below, above = (old[weight.replace(".1.", f".{j}.")][key] for j in (1, 2))
        mixed = (below + above) / 2**power
        assert torch.allclose(new[weight.replace(".1.", ".3.")][key], mixed, rtol=1e-9, atol=0)


# ---- a Trainer goes on


def arguments(folder, steps):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        save_steps=4,
        logging_steps=1,
        learning_rate=LR,
        weight_decay=0.1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )


class Seen(Trainer):
    """Remembers what it trains on."""

    def training_step(self, model, inputs, *rest):
        self.__dict__.setdefault("ids", []).append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, *rest)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A plain Trainer's run of eight steps, and its checkpoint of the fourth."""
    folder = tmp_path_factory.mktemp("trainer")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 61, (64, 16), generator=generator)
    data = [{"input_ids": x, "labels": x} for x in rows]
    with quiet():
        network = AutoModelForCausalLM.from_pretrained(ALL["llama"](folder / "src"))
        trainer = Seen(network, arguments(folder / "out", 8), train_dataset=data)
        trainer.train()
    return folder / "out/checkpoint-4", data, trainer


@pytest.mark.parametrize("policy", ["copy-scaled", "asymmetric-reset", "reset"])
def test_a_plain_trainer_goes_on_from_a_grown_checkpoint(run, tmp_path, policy):
    checkpoint, data, before = run
    how = {"optimizer": checkpoint, "policy": policy}
    with quiet():
        growth.grow(checkpoint, tmp_path / "dst", Sizes(hidden=128, layers=5), **how)
        network = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
        trainer = Seen(network, arguments(tmp_path / "out", 8), train_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "dst"))
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert trainer.state.global_step == 8 and [x["step"] for x in logs] == [*range(1, 9)]
    assert [x["learning_rate"] for x in logs] == [x["learning_rate"] for x in before.state.log_history[:8]]
    assert logs[4]["loss"] == pytest.approx(
        before.state.log_history[4]["loss"], abs=1e-4
    )  # the same function
    assert all(torch.equal(*pair) for pair in zip(trainer.ids, before.ids[4:], strict=True))
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == ({4} if policy == "reset" else {4, 8})


def test_a_state_whose_groups_have_rates_of_their_own_is_read_by_names(trained, tmp_path):
    src = shutil.copytree(trained("llama"), tmp_path / "src")
    network = exact(load_model(src, torch.float64))
    optimizer = adam(network, {"*.mlp.*": 0.3, "*embed*": 0.5})
    step(network, optimizer, inputs(network.config), 0)
    save(src, optimizer, 1)
    growth.grow(src, tmp_path / "dst", Sizes(hidden=128, layers=5), optimizer=src)
    old, new = saved(src), saved(tmp_path / "dst")
    assert [g["lr"] for g in new.groups] == [g["lr"] for g in old.groups] == [LR, LR, 0.5 * LR, 0.3 * LR]
    slow = new.names[3]
    assert len(slow) == 15 and all(".mlp." in name for name in slow)
    assert sum(map(len, new.names)) == len(set().union(*new.names)) == 3 + 5 * 9


def test_experts_begin_with_the_moments_of_the_block_that_they_copy(run, tmp_path):
    """They are joined in memory, and the router has none; a Trainer goes on from what is written."""
    checkpoint, data, _ = run
    with quiet():
        method = Upcycle(experts=3, top_k=2)
        growth.grow(checkpoint, tmp_path / "dst", method=method, optimizer=checkpoint)
        network = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
        trainer = Trainer(network, arguments(tmp_path / "out", 5), train_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "dst"))
    old, new = saved(checkpoint), saved(tmp_path / "dst")
    table = model_of(Checkpoint(tmp_path / "dst").config, ()).table()
    assert all(".gate.weight" in name for name in table.keys() - new.states.keys())
    moment = old.states["model.layers.1.mlp.up_proj.weight"]["exp_avg"]
    found = [new.states[f"model.layers.1.block_sparse_moe.experts.{e}.w3.weight"] for e in range(3)]
    assert all(torch.equal(x["exp_avg"], moment) for x in found) and trainer.state.global_step == 5


@pytest.mark.parametrize(
    "change, said",
    {
        "missing": "expected optimizer.pt, scheduler.pt and trainer_state.json, got no scheduler.pt",
        "none": "expected a folder, got none",
        "fsdp": "expected a state in one piece, got FSDP's \\(optimizer_0\\)",
        "deepspeed": "expected a state in one piece, got DeepSpeed's \\(global_step4\\)",
        "damaged": "expected an optimizer's state as torch saves it, got",
        "adafactor": "expected Adam or AdamW, got Adafactor",
        "muon": "expected Adam or AdamW, got Muon or SGD",
        "bits": "expected Adam or AdamW, got an optimizer in 8 bits",
        "count": "a state of this model's 30 parameters, 23 and 7 in the Trainer's groups, got 22 and 7",
        "shapes": "model.norm.weight: expected moments of shape \\(64,\\), got \\(65,\\)",
    }.items(),
)
def test_other_states_are_refused_in_one_line_with_nothing_written(trained, tmp_path, change, said):
    folder = shutil.copytree(trained("llama"), tmp_path / "src")
    state = torch.load(folder / OPTIMIZER)
    moments = state["state"]
    others = {
        "adafactor": {"step": 1, "exp_avg_sq_row": torch.ones(1), "exp_avg_sq_col": torch.ones(1)},
        "muon": {"momentum_buffer": torch.ones(1)},
        "bits": {"step": 1, "state1": torch.ones(1), "state2": torch.ones(1), "absmax1": torch.ones(1)},
    }
    if change == "missing":
        (folder / SCHEDULER).unlink()
    elif change == "none":
        folder = tmp_path / "none"
    elif change in ("fsdp", "deepspeed"):
        (folder / {"fsdp": "optimizer_0", "deepspeed": "global_step4"}[change]).mkdir()
    elif change == "count":
        state["param_groups"][0]["params"].pop()
        moments.pop(22)
    elif change == "shapes":
        number = state["param_groups"][1]["params"][-1]
        moments[number]["exp_avg"] = torch.ones(65)
    else:
        moments |= dict.fromkeys(moments, others.get(change))
    torch.save(state, folder / OPTIMIZER) if folder.exists() else None
    if change == "damaged":
        (folder / OPTIMIZER).write_bytes(b"no state")
    with pytest.raises(Refusal, match=f"{said}.*; .*") as refusal:
        growth.grow(trained("llama"), tmp_path / "dst", Sizes(hidden=128), optimizer=folder)
    assert "\n" not in str(refusal.value) and not (tmp_path / "dst").exists()
    if change in ("adafactor", "muon", "bits"):
        growth.grow(trained("llama"), tmp_path / "dst", Sizes(hidden=128), optimizer=folder, policy="reset")
        assert torch.load(tmp_path / "dst" / OPTIMIZER)["state"] == {}


def test_a_state_that_lies_beside_other_weights_is_refused_and_another_dtype_is_not(trained, tmp_path):
    run = trained("llama")
    for name, change in (("other", lambda x: x + 1e-3), ("same", lambda x: x)):
        source = shutil.copytree(run, tmp_path / name)
        network = load_model(source, torch.float64)
        with torch.no_grad():
            network.model.norm.weight.copy_(change(network.model.norm.weight))
        network.to(torch.bfloat16).save_pretrained(source)
    with pytest.raises(Refusal, match=r"got that of other weights \(model.norm.weight\); grow the model in"):
        growth.grow(tmp_path / "other", tmp_path / "dst", Sizes(hidden=128), optimizer=run)
    assert not (tmp_path / "dst").exists()
    report = growth.grow(tmp_path / "same", tmp_path / "dst", Sizes(hidden=128), optimizer=run)
    assert (
        f"{run}, after 4 steps, grows too (copy-scaled): `growth train {tmp_path / 'dst'}" in report.lines[-1]
    )
    assert "with its source's optimizer state, copy-scaled" in (tmp_path / "dst" / "README.md").read_text()


def test_policies_that_do_not_fit_are_refused(trained, tmp_path):
    src = trained("llama")
    for said, how in {
        "policy: expected one of copy-scaled, .*, got double": {"policy": "double", "optimizer": src},
        "policy: expected none without an optimizer's state, got reset": {"policy": "reset"},
    }.items():
        with pytest.raises(Refusal, match=said):
            growth.grow(src, tmp_path / "dst", Sizes(hidden=128), **how)
    with pytest.raises(Refusal, match="policy copy-scaled: expected a method whose maps are known before"):
        method = growth.Ligo(data=str(src))
        growth.grow(src, tmp_path / "dst", Sizes(hidden=128), method, optimizer=src)


# ---- growth train


STEPS = {"batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def annealed(tmp_path_factory):
    """What `growth train` leaves of eight steps at a constant rate; beside it, grown with its state."""
    root = tmp_path_factory.mktemp("recipe")
    (root / "text.txt").write_text(TEXT)
    with quiet():
        src = ALL["gpt_neox"](root / "src", vocab_size=256)
    report = train(src, root / "text.txt", root / "out", steps=8, schedule="constant", **STEPS)
    assert report.settings["keep_optimizer"]
    growth.grow(root / "out", root / "grown", Sizes(hidden=128, layers=4), optimizer=root / "out")
    return root


def steps_of(folder):
    found = saved(folder)
    return {int(state["step"]) for state in found.states.values()}, found


def test_growth_trains_on_with_the_grown_moments_and_no_warm_up(annealed, tmp_path, capsys):
    file = annealed / "text.txt"
    train(annealed / "grown", file, tmp_path / "fresh", steps=20, keep_optimizer=True, **STEPS)
    assert "an optimizer's state lies there, which --resume begins with" in capsys.readouterr().err
    again = train(
        annealed / "grown", file, tmp_path / "out", steps=20, resume=True, keep_optimizer=True, **STEPS
    )
    assert "lies there" not in capsys.readouterr().err
    assert again.settings["warmup"] == 0 and "after 8 steps" in again.settings["moments"]
    assert steps_of(tmp_path / "fresh")[0] == {20}
    assert steps_of(tmp_path / "out")[0] == {28, 20}  # added layers begin at 0
    assert steps_of(tmp_path / "out")[1].steps == 20


def test_an_interrupted_run_wins_over_the_state_beside_the_model(annealed, tmp_path, monkeypatch):
    """And ends where an unbroken one does, with the state that it keeps."""
    file, how = annealed / "text.txt", {"steps": 6, "save_every": 2, "keep_optimizer": True, **STEPS}
    train(annealed / "grown", file, tmp_path / "whole", resume=True, **how)
    from growth.training import session

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(session, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(annealed / "grown", file, tmp_path / "out", resume=True, **how)
    shutil.rmtree(tmp_path / "out.unfinished/checkpoint-6")
    train(annealed / "grown", file, tmp_path / "out", resume=True, **how)
    (_, a), (_, b) = steps_of(tmp_path / "whole"), steps_of(tmp_path / "out")
    assert a.states.keys() == b.states.keys()
    for name, state in a.states.items():
        assert all(torch.equal(x, b.states[name][key]) for key, x in state.items())


def test_a_run_that_only_had_to_be_saved_keeps_its_state_too(annealed, tmp_path, monkeypatch):
    from growth.training import session

    file, how = annealed / "text.txt", {"steps": 4, "save_every": 2, "keep_optimizer": True, **STEPS}
    train(annealed / "src", file, tmp_path / "whole", **how)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(session, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(annealed / "src", file, tmp_path / "out", **how)
    train(annealed / "src", file, tmp_path / "out", resume=True, **how)
    (_, a), (_, b) = steps_of(tmp_path / "whole"), steps_of(tmp_path / "out")
    assert all(torch.equal(a.states[x]["exp_avg"], b.states[x]["exp_avg"]) for x in a.states)


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("fsdp", [False, True])
def test_several_processes_begin_with_the_same_moments(annealed, tmp_path, fsdp):
    paths = {"model": annealed / "grown", "data": annealed / "text.txt"}
    how = {"steps": 2, "learning_rate": 1e-2, "resume": True, "eval_every": 1}
    one = train(**paths, out=tmp_path / "one", batch_size=4, **how)
    settings = {"out": tmp_path / "two", "batch_size": 2, "fsdp": fsdp} | paths | how
    assert started(2, tmp_path / "io", settings).codes == [0, 0]
    found = json.loads((tmp_path / "two/training.json").read_text())
    assert [x["loss"] for x in found["curve"]] == pytest.approx([x.loss for x in one.curve], abs=1e-3)


# ---- new units


def test_new_units_warm_up_while_old_ones_train_at_the_full_rate(trained, tmp_path):
    growth.grow(trained("phi3"), tmp_path / "dst", Sizes(hidden=128, layers=4), Lemon(noise=0.0))
    fresh = new_entries(tmp_path / "dst")
    warm, moved = WarmNewUnits(tmp_path / "dst", steps=4), {}
    state = type("State", (), {"global_step": 0, "stateful_callbacks": {}})()
    for warming in (False, True):
        network = exact(load_model(tmp_path / "dst", torch.float64))
        optimizer, before = adam(network), {n: x.detach().clone() for n, x in network.named_parameters()}
        scalar(network, inputs(network.config)).backward()
        if warming:
            warm.on_train_begin(None, state, None, model=network)
            warm.on_pre_optimizer_step(None, state, None)
        optimizer.step()
        if warming:
            warm.on_optimizer_step(None, state, None)
        moved[warming] = {name: x.detach() - before[name] for name, x in network.named_parameters()}
    for name, x in moved[False].items():
        mask = fresh[name]
        assert torch.equal(moved[True][name][~mask], x[~mask])
        assert torch.allclose(moved[True][name][mask], x[mask] / 4, atol=1e-12)
        assert mask.all() == (".layers.3." in name)
    assert [warm.share(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_run_that_warms_new_units_resumes_where_it_was(annealed, tmp_path, monkeypatch):
    file, how = annealed / "text.txt", {"steps": 6, "save_every": 2, "warm_new": 6, **STEPS}
    train(annealed / "grown", file, tmp_path / "whole", **how)
    from growth.training import session

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(session, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(annealed / "grown", file, tmp_path / "out", **how)
    shutil.rmtree(tmp_path / "out.unfinished/checkpoint-6")
    train(annealed / "grown", file, tmp_path / "out", resume=True, **how)
    a, b = (Checkpoint(tmp_path / x) for x in ("whole", "out"))
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.names)


def test_what_growing_did_not_tell_is_refused(annealed, tmp_path):
    for said, how in {
        "warm-new .*: expected a checkpoint with new units in its growth.json": {"warm_new": 2},
        "scaled-rates .*: expected a checkpoint with shares in its growth.json": {"scaled_rates": True},
        "scaled-rates, copied-rate: expected one of them": {"scaled_rates": True, "copied_rate": 0.3},
        "warm new: expected at least 0, got -1": {"warm_new": -1},
    }.items():
        with pytest.raises(Refusal, match=said):
            train(annealed / "src", annealed / "text.txt", tmp_path / "out", steps=4, **how, **STEPS)
    assert not any(tmp_path.iterdir())


def test_moments_lie_in_a_file_until_they_are_saved(trained, tmp_path):
    src, method = trained("llama"), Lemon()
    source = Source(Checkpoint(src))
    target = source.family.model(resized(source.model, Sizes(hidden=128), method.layers), source.model.parts)
    maps = method.maps(source.model.architecture, target.architecture, 0)
    carried = Carried.of(src, source, target, maps, "copy-scaled", learned=False)
    (tmp_path / "room").mkdir()
    found = carried.state_dict(tmp_path / "room")
    files = sum(file.stat().st_size for file in (tmp_path / "room").iterdir())
    held = sum(x.nbytes for state in found["state"].values() for key, x in state.items() if key != "step")
    assert files == held == carried.bytes // 2 * 2  # float64 here, and `bytes` reckons with float32 twice
