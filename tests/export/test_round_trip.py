"""Every kind of saved folder through every reader: the vectors are those of the training forward.

    python -m pytest tests/export/test_round_trip.py

Full, adapter, merged and cut are the kinds; Transformers, Sentence Transformers, PEFT and mteb the readers here. A
server, the fifth, is asked in tests/serving/test_server.py, which needs an environment of its own.
"""

import mteb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from model_folders import (
    LIMIT,
    TEXTS,
    as_sentence_transformers_reads,
    assert_same_vectors,
    facts,
    make_adapted,
    training_vectors,
)
from mteb.models import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from peft import PeftConfig, PeftModel
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from export import model_folder
from modeling.backbone import load_backbone
from modeling.versions import embedding_width, in_dtype
from retrieval.encode import DecoderEncoder
from tools import export

KINDS = ("full", "adapter", "merged", "cut")
CUT = 8
QUERIES = as_sentence_transformers_reads([model_folder.query_prompt("Find it.") + text for text in TEXTS])


@pytest.fixture(scope="module")
def folders(toy_world, tokenizer, tmp_path_factory):
    """Kind -> its folder, as training or tools/export.py wrote it."""
    root = tmp_path_factory.mktemp("kinds")
    backbone = load_backbone(str(toy_world.backbone), torch.float32).eval()
    dims = facts(matryoshka_dims=[8, 16, 32])
    model_folder.save(root / "full", backbone, tokenizer, dims, torch.float32)
    model_folder.save(root / "adapter", make_adapted(toy_world.backbone), tokenizer, dims, torch.float32)
    assert export.main(["--model", str(root / "adapter"), "--output", str(root / "merged")]) == 0
    words = ["--model", str(root / "full"), "--output", str(root / "cut"), "--dimension", str(CUT)]
    assert export.main(words) == 0
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def expected(toy_world, tokenizer):
    """Kind -> what the training forward makes of the texts without and with the query's prompt, [n, d] each."""
    backbone = load_backbone(str(toy_world.backbone), torch.float32).eval()
    adapted = make_adapted(toy_world.backbone)
    full = [training_vectors(backbone, tokenizer, texts) for texts in (TEXTS, QUERIES)]
    lora = [training_vectors(adapted, tokenizer, texts) for texts in (TEXTS, QUERIES)]
    assert (full[0] - lora[0]).abs().max() > 0.05  # the adapters do something
    cut = [F.normalize(vectors[:, :CUT], dim=-1) for vectors in full]
    return {"full": full, "adapter": lora, "merged": lora, "cut": cut}


# ---------------------------------------------------------------------------------------- Transformers


@pytest.mark.parametrize("kind", KINDS)
def test_transformers(folders, expected, kind):
    """It reads the decoder alone: pooling, cut and length one are the caller's."""
    model = AutoModel.from_pretrained(folders[kind]).eval()
    read = AutoTokenizer.from_pretrained(folders[kind])
    batch = read(TEXTS, padding=True, truncation=True, max_length=LIMIT, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state  # [n, L, d]
    pooled = states[torch.arange(len(TEXTS)), batch["attention_mask"].sum(1) - 1]
    width = CUT if kind == "cut" else None
    assert_same_vectors(F.normalize(pooled[:, :width], dim=-1), expected[kind][0])


def test_transformers_is_told_by_the_config_where_to_cut(folders):
    assert max(AutoModel.from_pretrained(folders["cut"]).config.matryoshka_dimensions) == CUT


# ------------------------------------------------------------------------------- Sentence Transformers


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers(folders, expected, kind):
    model = SentenceTransformer(str(folders[kind]), device="cpu")
    assert_same_vectors(model.encode(TEXTS, convert_to_tensor=True), expected[kind][0])
    assert_same_vectors(model.encode_document(TEXTS, convert_to_tensor=True), expected[kind][0])
    assert_same_vectors(model.encode_query(TEXTS, convert_to_tensor=True), expected[kind][1])
    assert embedding_width(model) == expected[kind][0].shape[1]


def test_sentence_transformers_own_cut_is_not_of_length_one(folders):
    """Why a cut folder has a Dense module: `truncate_dim` cuts behind Normalize."""
    model = SentenceTransformer(str(folders["full"]), device="cpu", truncate_dim=CUT)
    assert np.linalg.norm(model.encode(TEXTS), axis=1).max() < 0.99


def test_a_cut_folder_in_bf16_gives_vectors_of_length_one(folders, expected):
    model = SentenceTransformer(str(folders["cut"]), device="cpu", model_kwargs=in_dtype(torch.bfloat16))
    vectors = model.encode(TEXTS, convert_to_tensor=True).float()
    assert (vectors.norm(dim=-1) - 1).abs().max() < 1e-2  # bf16 has three digits
    assert F.cosine_similarity(vectors, expected["cut"][0]).min() > 0.999


# ------------------------------------------------------------------------------------------------ PEFT


def test_peft_reads_the_adapter(folders, expected, tokenizer):
    base = load_backbone(PeftConfig.from_pretrained(folders["adapter"]).base_model_name_or_path, torch.float32)
    model = PeftModel.from_pretrained(base, folders["adapter"])
    assert_same_vectors(training_vectors(model, tokenizer, TEXTS), expected["adapter"][0])


@pytest.mark.parametrize("kind", ["full", "merged", "cut"])
def test_peft_says_that_a_whole_model_is_no_adapter(folders, kind):
    """These cells of the matrix have no meaning: such a folder has whole weights, and nothing that PEFT reads."""
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftConfig.from_pretrained(folders[kind])


# ------------------------------------------------------------------------------------------------ mteb


@pytest.mark.parametrize("kind", KINDS)
def test_mteb(folders, expected, kind):
    """Its own wrapper, with the folder's prompts."""
    model = SentenceTransformerEncoderWrapper(str(folders[kind]), device="cpu")

    def encode(side: PromptType) -> torch.Tensor:
        batches = DataLoader(Dataset.from_dict({"text": TEXTS}), batch_size=2)
        task = mteb.get_task("SciFact").metadata  # any retrieval task; nothing of it is read
        found = model.encode(batches, task_metadata=task, hf_split="test", hf_subset="default", prompt_type=side)
        return torch.as_tensor(found)

    assert_same_vectors(encode(PromptType.document), expected[kind][0])
    assert_same_vectors(encode(PromptType.query), expected[kind][1])


# ---------------------------------------------------------------------------------------- this project


@pytest.mark.parametrize("kind", ["full", "merged", "cut"])
def test_the_packed_encoder_of_this_project(folders, expected, kind):
    vectors, cut_texts = DecoderEncoder(folders[kind], LIMIT).encode(TEXTS)
    assert_same_vectors(torch.from_numpy(vectors), expected[kind][0])
    assert cut_texts == 1
