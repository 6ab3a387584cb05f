"""GradMax: the function stays, and no other directions of one length have a larger gradient."""

import pytest
import torch
from checkpoints import ALL, VOCAB, inputs, saved
from exact import exact
from tokenizers import AddedToken
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, ViTConfig, ViTForImageClassification

import growth
from growth.checkpoint import Checkpoint
from growth.demo.corpus import byte_tokenizer
from growth.errors import Refusal
from growth.learned.gradients import TOKENS, Outgoing
from growth.learned.neurons import neurons
from growth.loading import load_model, quiet
from growth.plan import Source
from growth.training.data import Windows
from growth.training.images import Images

HEADS = ("headless", "classifier", "answers", "t5")
LEARNING = [name for name in ALL if not any(word in name for word in HEADS)]
IMAGES = {"image_size": 12, "patch_size": 4, "num_labels": 5, "hidden_size": 32, "num_hidden_layers": 2}
IMAGES |= {"num_attention_heads": 4, "intermediate_size": 48}
MORE = 20


def windows():
    return Windows(torch.randint(3, VOCAB, (320,), generator=torch.Generator().manual_seed(0)), 20)


def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(16, 3, 12, 12, generator=generator)
    return Images(pixels, torch.randint(5, (16,), generator=generator))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    def make(name, dtype=torch.float64):
        folder = tmp_path_factory.mktemp("source") / "src"
        with quiet():
            if name == "vit":
                return saved(ViTForImageClassification, ViTConfig(**IMAGES), folder, dtype)
            ALL[name](folder, dtype)
        if "bert" in name:
            mask = AddedToken("<mask>", special=True)
            tokenizer = byte_tokenizer()
            tokenizer.add_special_tokens({"mask_token": mask})
            tokenizer.save_pretrained(folder)
        return folder

    return make
