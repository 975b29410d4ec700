"""No system and no training mixes tensors of CPU and GPU: checked without a GPU, on the stand-in of placement.py."""
import pandas as pd
import pytest
import torch
from placement import DEVICE, Placed, on_another_device
from test_systems import WAYS, shortly, ways

from latentrefine.registry import SYSTEMS, load_chapters
from latentrefine.study import Study
from latentrefine.systems import cola_study

load_chapters()


@pytest.fixture(scope="module")
def drafts(trained): return trained.drafts(.10, count=2)


@pytest.fixture(scope="module")
def placed(trained, tiny_preset):
    "The trained study, read on the stand-in."
    with on_another_device():
        study = Study(tiny_preset, out=str(trained.out))
        assert study.encoder.word_embeddings.device == DEVICE
    study.batches = trained.batches
    return study


def test_the_stand_in_refuses_what_a_gpu_refuses():
    with on_another_device():
        here, there = torch.arange(4.), torch.arange(4.).to(DEVICE)
        assert there.is_cuda and isinstance(there * 2, Placed) and (there + torch.tensor(1.)).sum().item() == 10
        assert torch.equal(there.cpu(), here) and there[here.long()].tolist() == [0, 1, 2, 3]
        assert not isinstance(here.to("cpu"), Placed) and there.new_tensor([1.]).tolist() == [1]
        for made in (torch.zeros(2, device=DEVICE), torch.tensor([1.], device=DEVICE), there.add_(0)): assert isinstance(made, Placed)
        for wrong in (lambda: here + there, lambda: here[there.long()], lambda: torch.where(here > 1, there, 0.),
                      lambda: there.masked_fill(here > 1, 0.), lambda: torch.cat([here, there]), lambda: there.gather(0, here.long()),
                      lambda: torch.rand(2, device=DEVICE, generator=torch.Generator()), lambda: here.add_(there)):
            with pytest.raises(RuntimeError, match="GPU"): wrong()
        with pytest.raises(TypeError): there.numpy()
        net = torch.nn.Linear(4, 1).to(DEVICE)
        net(there[None]).sum().backward()
        assert isinstance(net.weight.grad, Placed) and net.weight.grad.cpu().tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("name", [name for name, entry in SYSTEMS.items() if not entry.encoder])
def test_a_system_keeps_to_one_device(trained, placed, drafts, name):
    "Its logits are those of the CPU."
    expected = trained.open(name).slot_logits(drafts, 2, 1)
    with on_another_device():
        found = placed.open(name).slot_logits(drafts, 2, 1)
        logits = found.logits.cpu()
    assert isinstance(found.logits, Placed) and found.nfe == expected.nfe
    assert torch.allclose(logits, expected.logits, atol=1e-3), (logits - expected.logits).abs().max()


def one_step(study, folder):
    "The study with one step for each model; thresholds and scales are chosen on two validation stories."
    one = shortly(study, 1, folder)
    one.batches = {**study.batches, "validation": study.batches["validation"].rows(slice(0, 2))}
    return one


ONE_OF_EACH = {way.split()[0]: way for way in reversed(WAYS)}      # of the variants of a training the first


@pytest.mark.parametrize("way", ONE_OF_EACH.values())
def test_a_training_keeps_to_one_device(placed, tmp_path, monkeypatch, way):
    monkeypatch.setattr(cola_study, "choose_guidance", lambda *_: (1., []))        # many calls of a system
    model = ways(placed.preset)[way]
    with on_another_device(): curve = model.train(one_step(placed, tmp_path), tmp_path / "model", **model.parameters)
    assert pd.DataFrame(curve).loss.notna().all()
