"""Export of the embedded model, with untrained networks."""

import json

import pytest
import torch
from transformers import CLIPModel

from lightning_prompts.backbones import EMOJI, load_backbone
from lightning_prompts.emoji.tokenizer import train_tokenizer
from tools.train_emoji import networks
from tools.train_emoji.export import export

pytestmark = pytest.mark.filterwarnings("ignore")


def test_exported_folders_have_the_layout_of_the_shipped_model(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    tokenizer = train_tokenizer(["a red circle on a blue background"], 5, work / "tokenizer")
    networks.clip(tokenizer, vision=(32, 1), text=(32, 1)).save_pretrained(work / "clip")
    networks.clip(tokenizer, vision=(64, 1), text=(32, 1)).save_pretrained(work / "scorer")
    networks.autoencoder().save_pretrained(work / "autoencoder")
    networks.denoiser(32).save_pretrained(work / "denoiser")
    export(work, out)
    files, shipped = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for folder in (out, EMOJI.parent)
    )
    assert {file for file in shipped if file.startswith(("model/", "scorer/"))} - files == {"model/README.md"}
    assert not any("_name_or_path" in json.loads(path.read_text()) for path in out.rglob("config.json"))
    backbone = load_backbone(str(out / "model"))
    assert (backbone.default_steps, backbone.default_guidance) == (25, 3.0)
    assert backbone.metadata.scorer == str(out / "scorer")
    assert CLIPModel.from_pretrained(out / "scorer").dtype == torch.float32
