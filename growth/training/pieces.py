"""What a checkpoint in pieces says of them, .metadata of torch.distributed.checkpoint, which is a pickle.

Here it is read as what torch writes there, and nothing else: no function that it names is called.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

METADATA = ".metadata"
OURS = "torch.distributed.checkpoint.metadata"
KNOWN = {
    *((OURS, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((OURS, name) for name in ("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
    (OURS, "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


class Pieces(FileSystemReader):
    """Reads tensors alone: other entries are pickles too, which nothing here asks for.

    Raises UnpicklingError, or what a damaged pickle raises, where .metadata is none of torch's, and where it
    names files of other folders.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            found = _Torchs(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"a {type(found).__name__}, not a checkpoint's metadata")
        for piece in found.storage_data.values():
            if Path(piece.relative_path).name != piece.relative_path:
                raise pickle.UnpicklingError(f"{piece.relative_path}, a file of another folder")
        entries = found.state_dict_metadata.items()
        found.state_dict_metadata = {name: x for name, x in entries if isinstance(x, TensorStorageMetadata)}
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Torchs(pickle.Unpickler):
    """Of classes and functions, those that torch names there."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name}, which torch does not write there")
        return super().find_class(module, name)
