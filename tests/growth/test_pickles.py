"""No pickle is ever run, under any verb, whatever lies in a checkpoint, a run or an optimizer's state."""

import os
import pickle
import shutil

import pytest
import torch
from checkpoints import neox
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import growth
from growth.errors import Refusal
from growth.inspection import inspect
from growth.optimizing.saved import STATE
from growth.training import session
from growth.training.pieces import METADATA, Pieces
from growth.training.run import damage

NAMES = """pytorch_model.bin pytorch_model-00001-of-00001.bin optimizer.pt optimizer.bin scheduler.pt
    scaler.pt rng_state.pth rng_state_0.pth training_args.bin vocab.pkl tokenizer.pkl model.pt
    consolidated.00.pth""".split()
TRAIN = {"steps": 2, "batch_size": 1, "sequence_length": 16, "save_every": 1, "keep_optimizer": True}


class Evil:
    """Makes a folder as soon as it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """The folder that stays unmade; the pickles do work."""
    made = tmp_path / "ran"
    pickle.loads(pickle.dumps(Evil(made)))
    assert made.exists()
    made.rmdir()
    yield made
    assert not made.exists()


@pytest.fixture
def evil(marker):
    """name -> the bytes of a pickle: as torch saves one now, as it once did, and bare."""
    return {"zip": saved(marker, True), "legacy": saved(marker, False), "bare": pickle.dumps(Evil(marker))}


def saved(marker, zipped):
    file = marker.parent / "evil"
    found = {"state": {0: {"step": Evil(marker)}}, "param_groups": [{"params": [0]}], "x": Evil(marker)}
    torch.save(found, file, _use_new_zipfile_serialization=zipped)
    data = file.read_bytes()
    file.unlink()
    return data


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained checkpoint with its optimizer's state, and the text."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    growth.train(neox(folder / "src", num_hidden_layers=2), folder / "text.txt", folder / "model", **TRAIN)
    return folder


def refused(call, message=""):
    with pytest.raises(Refusal, match=message) as refusal:
        call()
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_every_verb_leaves_the_pickles_of_a_checkpoint_alone(trained, tmp_path, marker, evil, kind):
    src, text = shutil.copytree(trained / "src", tmp_path / "src"), trained / "text.txt"
    for name in NAMES:
        (src / name).write_bytes(evil[kind])
    [*inspect(src).lines()]
    growth.grow(src, tmp_path / "grown", method="lemon", num_layers=3)
    growth.shrink(src, tmp_path / "shrunk", num_layers=1)
    growth.transfer(src, tmp_path / "moved")
    growth.train(src, text, tmp_path / "trained", teacher=src, **TRAIN)
    growth.check(trained / "src", src)
    for out in ("grown", "shrunk", "moved"):
        assert not {*NAMES} & {file.name for file in (tmp_path / out).iterdir()}
    shutil.copy(trained / "model" / STATE, src)
    refused(lambda: growth.grow(src, tmp_path / "out", num_layers=3, optimizer=src), "as torch saves it")
    refused(lambda: growth.train(src, text, tmp_path / "out", resume=True, **TRAIN), "as torch saves it")
    (src / "model.safetensors").unlink()
    for verb in (inspect, lambda src: growth.grow(src, tmp_path / "out", num_layers=3), growth.recipe_of):
        refused(lambda verb=verb: verb(src), "a safetensors file, got .* save it with save_pretrained")


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_resumed_run_passes_over_a_checkpoint_with_a_pickle(
    trained, tmp_path, marker, evil, monkeypatch, capfd, name, kind
):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    src, text, out = trained / "src", trained / "text.txt", tmp_path / "out"
    if not (cut := trained / "cut.unfinished").exists():
        with monkeypatch.context() as patch:
            patch.setattr(session, "save", full)
            refused(lambda: growth.train(src, text, trained / "cut", **TRAIN), "pass --resume")
    shutil.copytree(cut, f"{out}.unfinished")
    (tmp_path / "out.unfinished/checkpoint-2" / name).write_bytes(evil[kind])
    assert damage(tmp_path / "out.unfinished/checkpoint-1") == ""
    growth.train(src, text, out, resume=True, **TRAIN)
    assert f"checkpoint-2: passed over, {name} is damaged" in capfd.readouterr().err


class Metadata:
    """What torch writes of a checkpoint in pieces, and a pickle in it."""

    def __init__(self, found, marker):
        self.found, self.marker = found, marker

    def __reduce__(self):
        return dict, ({"found": self.found, "evil": Evil(self.marker)},)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_checkpoint_in_pieces_is_read_as_tensors_alone(tmp_path, marker):
    """.metadata is a pickle, and so is each entry that is no tensor."""
    want, folder = torch.randn(5, dtype=torch.bfloat16), tmp_path / "pieces"
    dcp.save({"x": want, "other": [1, 2]}, checkpoint_id=folder, no_dist=True)
    got = {"x": torch.zeros_like(want)}
    dcp.load(got, storage_reader=Pieces(folder), no_dist=True)
    assert torch.equal(got["x"], want) and [*Pieces(folder).read_metadata().state_dict_metadata] == ["x"]
    whole = (folder / METADATA).read_bytes()

    def changed(change):
        found = pickle.loads(whole)
        change(found)
        (folder / METADATA).write_bytes(pickle.dumps(found))

    changed(lambda found: found.state_dict_metadata.update(x=BytesStorageMetadata()))
    piece = next(folder.glob("*.distcp"))
    piece.write_bytes(pickle.dumps(Evil(marker)).ljust(piece.stat().st_size, b"\0"))
    with pytest.raises(CheckpointException, match="Missing key"):
        dcp.load(got, storage_reader=Pieces(folder), no_dist=True)
    changed(
        lambda found: [
            setattr(x, "relative_path", f"../{folder.name}/x") for x in found.storage_data.values()
        ]
    )
    with pytest.raises(pickle.UnpicklingError, match="a file of another folder"):
        Pieces(folder).read_metadata()
    for found in (Evil(marker), Metadata(pickle.loads(whole), marker)):
        (folder / METADATA).write_bytes(pickle.dumps(found))
        with pytest.raises(pickle.UnpicklingError, match="posix.mkdir|builtins.dict"):
            Pieces(folder).read_metadata()
