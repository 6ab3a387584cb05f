"""What a model's wires carry on some windows of text: one run serves every target.

    square   E[x^2]   of each entry of a wire, where a matrix or a norm reads it
    mean     E[x]
    chosen   of a router's experts, the share of the tokens that choose each; its neurons see these alone
    moments  E[x x^T], which merging and correlations take: 8 S^2 bytes a place that is read, on disk

All windows go through together, so each layer is read once, and what is told of it is written before the next
one. The folder of the cache is keyed by the fingerprints of the source and of the windows.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.activations import ACT2FN

from growth.architecture import Experts, Linear, Tied
from growth.errors import reason, refuse
from growth.folders import hidden_in, of_disk, refuse_too_large
from growth.jsonfile import read_object
from growth.loading import load_tokenizer
from growth.plan import Source
from growth.shrinking.bonds import Bonds, Site, site_name
from growth.shrinking.likeness import likeness
from growth.shrinking.streaming import Done, Streamed
from growth.training.data import Data, examples_of, window_length
from growth.training.examples import Examples
from growth.training.images import Images
from growth.training.progress import RunProgress

LENGTH = 512  # tokens of a window, unless asked otherwise
WINDOWS = 32
ROWS = 4096  # tokens whose products are summed at once
TOLD, VECTORS = "calibration.json", "vectors.safetensors"
KEYS = ("data", "windows", "tokens", "layers", "moments", "alone")
FORMAT = 2  # of what lies in a cache


@dataclass(frozen=True)
class Calibration:
    """What was found. told: data, tokens and, of each stack, a row for each layer, see likeness."""

    folder: Path
    told: dict[str, Any]
    vectors: dict[str, Tensor]
    cached: bool

    @property
    def layers(self) -> dict[str, list[dict[str, float]]]:
        return self.told["layers"]

    def square(self, site: Site) -> Tensor:
        return self.vectors[f"{site.name} square"]

    def mean(self, site: Site) -> Tensor:
        return self.vectors[f"{site.name} mean"]

    def chosen(self, router: Linear, layer: int) -> Tensor | None:
        """The share of the tokens that choose each expert."""
        return self.vectors.get(f"{site_name(router, layer)} chosen")

    def __contains__(self, site: Site) -> bool:
        return f"{site.name} square" in self.vectors

    def alone(self, site: Site) -> bool:
        """Is what lies there all that its module reads? Not so of a gated norm."""
        return site.name in self.told["alone"]

    def moments(self, site: Site) -> Tensor:
        """[S, S], float64."""
        return load_file(self.folder / self.told["moments"][site.name])["moments"]


def windows_for(
    source: Source,
    data: Data | None,
    count: int,
    length: int | None,
    what: str,
    seed: int,
    field: str = "text",
) -> Examples:
    """`count` windows of text, or images, that calibration runs on; all where there are fewer.

    Raises Refusal where there are none, or they do not fit the model.
    """
    sees = source.family.probe == "images"
    if count < 1:
        raise refuse("windows", "at least 1", count, "choose a larger number")
    if data is None or sees is not isinstance(data, Images):
        got = "none" if data is None else "text" if sees else "Images"
        remedy = "pass a file or a folder of text"
        if sees:
            remedy = "call it from Python, with growth.training.images.Images"
        raise refuse("data", f"{'Images' if sees else 'text'} for {what}", got, remedy)
    length = window_length(source.config, data, None, length, usual=LENGTH)
    if not isinstance(data, Examples):
        tokenizer = load_tokenizer(source.checkpoint.path)
        data = examples_of(data, tokenizer, length, field=field, windows=count, seed=seed)
    data.refuse_foreign(source.config)
    return data.sample(count, seed)


def calibrated(
    source: Source, bonds: Bonds, windows: Examples, moments: bool, cache: str | Path | None = None
) -> Calibration:
    """From the cache where that has it, else from a run of the model; in the cache afterwards.

    moments: keep E[x x^T] too. cache: a folder; default: growth's in that of the Hub. Raises Refusal where it
    cannot be written, or has no room for these.
    """
    text = f"{FORMAT} {source.checkpoint.fingerprint()} {windows.fingerprint()} {windows.length}"
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    home = Path(cache) if cache is not None else Path(constants.HF_HOME) / "growth"
    wanted = [home / f"{key}-moments", *([] if moments else [home / key])]
    for folder in wanted:
        if found := _read(folder):
            return found
    folder = wanted[-1]
    if moments:
        refuse_too_large(folder, sum(8 * bonds.model.wires[site.wire].size ** 2 for site in bonds.sites))
    try:
        home.mkdir(parents=True, exist_ok=True)
        with hidden_in(home) as scratch:
            whole = scratch / "whole"
            whole.mkdir()
            _Watch(source, bonds, whole if moments else None).write(whole, windows)
            if not _read(folder):  # else another process was faster, and may be reading it
                shutil.rmtree(folder, ignore_errors=True)  # what could not be read
                whole.rename(folder)
    except Exception as error:
        if not of_disk(error):
            raise
        why = getattr(error, "strerror", None) or reason(error)
        raise refuse(str(home), "a folder for the cache", why, "make room, or name another") from error
    return Calibration(*_parts(folder), cached=False)


def _read(folder: Path) -> Calibration | None:
    if not os.path.isfile(folder / TOLD):  # false, too, where the folder may not be entered
        return None
    with suppress(SafetensorError, OSError, ValueError):  # damaged: it is made again
        found = Calibration(*_parts(folder), cached=True)
        for file in found.told["moments"].values():
            with safe_open(folder / file, "pt") as opened:  # which looks at its header and length
                opened.get_slice("moments")
        return found
    return None


def _parts(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    return folder, read_object(folder / TOLD, *KEYS), load_file(folder / VECTORS)


class _Watch:
    """Listens at the sites of a model while it runs."""

    def __init__(self, source: Source, bonds: Bonds, folder: Path | None):
        self.source, self.bonds, self.folder = source, bonds, folder
        self.vectors: dict[str, Tensor] = {}
        self.moments: dict[str, str] = {}
        self.alone: list[str] = []
        self.layers: dict[str, list[dict[str, float]]] = {}

    def write(self, folder: Path, windows: Examples) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        streamed = Streamed(self.source, device)
        works = {module: partial(self._look, site) for site, module in self._placed(streamed)}
        head = streamed.model.get_output_embeddings()
        if head is not None:  # logits of all windows would be the largest tensor
            works[head] = partial(self._last, works.get(head))
        behind = {}
        for prefix, modules in streamed.layers.items():
            self.layers[prefix] = [{} for _ in modules]
            behind |= {m: partial(self._compare, prefix, i) for i, m in enumerate(modules)}
        with RunProgress("calibration", len(behind)) as self.progress, streamed.watched(works, behind):
            streamed.run(self._inputs(windows))
        save_file(self.vectors, folder / VECTORS)
        told = {"data": windows.fingerprint(), "windows": len(windows), "tokens": windows.length}
        told |= {"layers": self.layers, "moments": self.moments, "alone": self.alone}
        (folder / TOLD).write_text(json.dumps(told, indent=1))

    def _placed(self, streamed: Streamed) -> Iterator[tuple[Site, Any]]:
        for site in self.bonds.sites:
            if isinstance(site.op, Tied):
                yield site, streamed.model.get_output_embeddings()
            else:
                name = self.source.place[f"{site.op.name}.weight", site.layer][0]
                if name in streamed.modules:
                    yield site, streamed.modules[name]

    def _inputs(self, windows: Examples) -> dict[str, Tensor]:
        batch = windows.batch(range(len(windows)))
        kind = self.source.family.probe
        if kind == "images":
            return {"pixel_values": batch["pixel_values"]}
        ids = batch["input_ids"]
        return {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "pairs" else {})

    def _last(self, work: Callable | None, x: Tensor, alone: bool) -> None:
        if work:
            work(x, alone)
        raise Done

    def _compare(self, prefix: str, layer: int, x: Tensor, y: Tensor) -> None:
        self.layers[prefix][layer] = likeness(x, y)
        self.progress.advance()
        self.progress.say(f"{prefix}layer {layer} of {len(self.layers[prefix])}")

    def _look(self, site: Site, x: Tensor, alone: bool) -> None:
        if f"{site.name} square" in self.vectors:  # some norms over all heads call themselves
            return
        S = self.bonds.model.wires[site.wire].size
        x = x.reshape(-1, S)
        exact = {"dtype": torch.float64, "device": x.device}
        square, mean = torch.zeros(S, **exact), torch.zeros(S, **exact)
        total = None if self.folder is None else torch.zeros(S, S, **exact)
        for rows in x.split(ROWS):
            rows = rows.double()  # products in float32 make 1e-7 of a variance where there is none
            square += rows.square().sum(0)
            mean += rows.sum(0)
            if total is not None:
                total += rows.T @ rows
        self.vectors[f"{site.name} square"] = (square / len(x)).cpu()
        self.vectors[f"{site.name} mean"] = (mean / len(x)).cpu()
        if alone:
            self.alone.append(site.name)
        if total is not None:
            file = f"moments-{len(self.moments)}.safetensors"
            save_file({"moments": (total / len(x)).cpu()}, self.folder / file)
            self.moments[site.name] = file
        if experts := self.bonds.mixture(site.op):
            weight = self.source.read(f"{site.op.name}.weight", site.layer).to(x)
            chosen = (x @ weight.T).topk(experts.top_k).indices
            share = torch.bincount(chosen.flatten(), minlength=len(weight)).double() / len(x)
            self.vectors[f"{site.name} chosen"] = share.cpu()
            self._inside(experts, site.layer, x, chosen)

    def _inside(self, experts: Experts, layer: int, x: Tensor, chosen: Tensor) -> None:
        """The neurons of experts, which have no module in memory, on the tokens [N, D] that choose them."""
        sites = {site.name: site for site in self.bonds.sites}
        active = ACT2FN[self.source.config.hidden_act]
        for e in range(len(experts.neurons)):
            name = f"{experts.name}.{e}"
            rows = x[(chosen == e).any(1)]
            if len(rows):  # else nothing is known of them
                gate, up = (
                    rows @ self.source.read(f"{name}.{part}.weight", layer).to(x).T for part in ("gate", "up")
                )
                self._look(sites[f"{name}.down.weight".format(layer)], active(gate) * up, False)
