"""The contract that every model of the package keeps; closed forms have no gradients, epochs or embeddings.

A test without a mark is for both kinds of models.
"""

import functools
import inspect
import re

import numpy as np
import pytest
import torch
from conftest import BOARD, QUIET, all_scores, batch_of
from recbole.data.interaction import Interaction
from recbole.utils import ModelType, get_model

from recbole_slifmr.errors import DataError
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.model import MODELS
from recbole_slifmr.training.experiment import run

WITHOUT_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

CLOSED_FORMS = [name for name in MODELS if get_model(name).type == ModelType.TRADITIONAL]
of_trained_models = pytest.mark.parametrize("model_name", [name for name in MODELS if name not in CLOSED_FORMS])
of_closed_forms = pytest.mark.parametrize("model_name", CLOSED_FORMS)


@pytest.fixture(params=MODELS)
def model_name(request):
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=WITHOUT_GPU)])
def device(request):
    return request.param


@pytest.fixture
def build(build, device):
    """What conftest's builds, on the device."""
    return functools.partial(build, use_gpu=device == "cuda")


@pytest.fixture
def same(device):
    """Return whether two tensors are equal; on a GPU, where gradients are added up in no fixed order, nearly so."""
    return torch.equal if device == "cpu" else functools.partial(torch.allclose, rtol=1e-3, atol=1e-4)


def test_every_model_cites_its_source(model_name):
    source = inspect.getmodule(get_model(model_name)).__doc__
    assert re.search(r"arXiv\s+\d{4}\.\d{5}|DOI\s+10\.\d{4,}/\S+", source)


@of_trained_models
def test_loss_is_finite_and_reaches_every_parameter(fresh):
    for name, parameter in fresh.model.named_parameters():
        if name.endswith("fusion.query"):  # at 0, as it starts, no gradient reaches what comes before it
            torch.nn.init.normal_(parameter, std=0.1)
    if hasattr(fresh.model, "refresh_graphs"):
        fresh.model.refresh_graphs()
    losses = fresh.model.calculate_loss(batch_of(fresh))
    assert len(losses) == len(fresh.model.loss_names)
    assert all(torch.isfinite(term) and term.shape == () for term in losses)
    sum(losses).backward()
    for name, parameter in fresh.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert torch.isfinite(parameter.grad).all(), name


@of_closed_forms
def test_a_closed_form_has_a_loss_of_zero_that_can_be_stepped_on(fresh):
    loss = fresh.model.calculate_loss(batch_of(fresh))
    loss.backward()
    assert loss == 0 and all(not parameter.grad.any() for parameter in fresh.model.parameters())


def test_predict_equals_full_sort_predict(fresh):
    scores = all_scores(fresh)
    assert scores.shape == (fresh.dataset.user_num - 1, fresh.dataset.item_num)
    user, item = torch.cartesian_prod(torch.arange(1, fresh.dataset.user_num), torch.arange(fresh.dataset.item_num)).T
    pairs = fresh.model.predict(Interaction({"user_id": user, "item_id": item}))
    rounding = 2e-6 * max(scores.abs().max().item(), 1.0)  # sums in another order
    torch.testing.assert_close(pairs, scores.flatten(), rtol=0, atol=rounding)


def peak_at(run, best_epoch, monkeypatch):
    """Make validation prefer one epoch; return a list that fills with the scores as each epoch is validated."""
    seen, valid = [], run.trainer._valid_epoch

    def prefer(*args, **kwargs):
        result = valid(*args, **kwargs)[1]
        seen.append(all_scores(run))
        return 1.0 - 0.1 * abs(run.trainer._epoch - best_epoch), result

    monkeypatch.setattr(run.trainer, "_valid_epoch", prefer)
    return seen


def test_save_and_load_give_equal_scores(tiny, build, model_name, same):
    run, other = build(tiny, model_name), build(tiny, model_name)
    run.trainer.fit(run.train, run.valid, show_progress=False)
    run.trainer.evaluate(run.test, load_best_model=True)
    other.trainer.evaluate(other.test, load_best_model=True, model_file=run.trainer.saved_model_file)
    assert same(all_scores(other), all_scores(run))


@of_trained_models
def test_the_best_epoch_comes_back(tiny, build, model_name, monkeypatch, same):
    """The best epoch is the first of three: its parameters and graphs come back, not the last ones."""
    run = build(tiny, model_name, epochs=3, learning_rate=0.01)
    seen = peak_at(run, 0, monkeypatch)
    run.trainer.fit(run.train, run.valid, show_progress=False)
    assert len(seen) == 3 and not torch.allclose(seen[0], seen[2])
    run.trainer.evaluate(run.test, load_best_model=True)
    assert same(all_scores(run), seen[0])
    other = build(tiny, model_name)
    other.trainer.evaluate(other.test, load_best_model=True, model_file=run.trainer.saved_model_file)
    assert same(all_scores(other), seen[0])


@of_trained_models
def test_a_resumed_run_gives_what_the_uninterrupted_one_gives(tiny, build, model_name, monkeypatch, same):
    whole = build(tiny, model_name, epochs=4)
    expected = peak_at(whole, 3, monkeypatch)
    whole.trainer.fit(whole.train, whole.valid, show_progress=False)
    first = build(tiny, model_name, epochs=2)
    peak_at(first, 1, monkeypatch)
    first.trainer.fit(first.train, first.valid, show_progress=False)
    second = build(tiny, model_name, epochs=4)
    second.trainer.resume_checkpoint(first.trainer.saved_model_file)
    seen = peak_at(second, 3, monkeypatch)
    second.trainer.fit(second.train, second.valid, show_progress=False)
    assert len(seen) == 2
    assert same(seen[1], expected[3])


@of_trained_models
def test_final_embeddings_are_cached_until_training_or_loading(fresh):
    model = fresh.model
    for action in (
        lambda: model.calculate_loss(batch_of(fresh)),
        lambda: model.load_state_dict(model.state_dict()),
    ):
        first = model._final_embeddings()
        assert model._final_embeddings() is first
        action()
        assert model._final_embeddings() is not first


def test_checkerboard_ranks_the_held_out_item_of_the_group_first(board, build, model_name):
    is_trained = model_name not in CLOSED_FORMS
    run = build(board, model_name, **{name: BOARD[name] for name in BOARD if name != "learning_rate" or is_trained})
    run.trainer.fit(run.train, run.valid, show_progress=False)
    assert run.trainer.evaluate(run.test, load_best_model=True)["recall@1"] == 1.0


@of_trained_models
def test_moving_and_casting_forget_the_final_embeddings(fresh):
    expected = all_scores(fresh)
    assert fresh.model.double()._final_embeddings()[0].dtype == torch.float64
    torch.testing.assert_close(all_scores(fresh).float(), expected)
    fresh.model.float()
    torch.testing.assert_close(all_scores(fresh), expected)


def test_printing_the_model_shows_its_parameters(fresh):
    assert "Trainable parameters" in str(fresh.model)


# -- edges of the data -----------------------------------------------------------------------------------------------


@of_trained_models
def test_a_batch_of_one_user_and_item_repeated_trains(fresh):
    one = batch_of(fresh)[torch.zeros(64, dtype=torch.long)]
    losses = fresh.model.calculate_loss(one)
    sum(losses).backward()
    assert all(torch.isfinite(term) for term in losses)
    assert all(torch.isfinite(p.grad).all() for p in fresh.model.parameters() if p.grad is not None)


def test_items_without_any_view_are_scored(tiny, build, model_name):
    """Items i1 and i14 have neither features nor an entity."""
    for name, lost in (("kg", ("e1\t", "e14\t")), ("link", ("i1\t", "i14\t"))):
        lines = (tiny / f"tiny.{name}").read_text().splitlines()
        (tiny / f"tiny.{name}").write_text("\n".join(line for line in lines if not line.startswith(lost)) + "\n")
    tokens = (tiny / "items.txt").read_text().split()
    for name in ("text", "image"):
        values = np.load(tiny / f"{name}.npy")
        values[tokens.index("i14")] = 0
        np.save(tiny / f"{name}.npy", values)
    run = build(tiny, model_name)
    run.trainer.fit(run.train, run.valid, show_progress=False, saved=False)
    assert torch.isfinite(all_scores(run)).all()


def test_a_user_who_has_seen_everything_is_refused_in_one_line(tiny, model_name):
    """RecBole draws no negative items for such a user."""
    inter = tiny / "tiny.inter"
    known = inter.read_text().splitlines()
    inter.write_text("\n".join([*known, *(row for i in range(15) if (row := f"u0\ti{i}") not in known)]) + "\n")
    with pytest.raises(DataError, match=r"users have interacted with all items.*user_inter_num_interval") as error:
        run(model_name, "tiny", settings={**QUIET, "data_path": str(tiny.parent)})
    assert "\n" not in str(error.value)


@of_trained_models
def test_memory_is_estimated_from_the_sizes(fresh, model_name):
    """What grows with the dimension grows with it; features and graphs are counted where the model has them."""
    small, large = (
        get_model(model_name).estimate_memory(
            make_config(model_name, "tiny", settings={**fresh.config.external_config_dict, "embedding_size": size}),
            fresh.train._dataset,
        )
        for size in (64, 64_000)
    )
    table = 4 * 4 * 64_000 * (fresh.dataset.user_num + fresh.dataset.item_num) / 1e6
    assert large["parameters and Adam"] >= table > small["parameters and Adam"]
    assert all(value >= 0 for value in small.values()) and small["process"] > 50
