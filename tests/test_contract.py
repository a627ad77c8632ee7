"""The contract that every model of the package keeps."""

import itertools

import numpy as np
import pytest
import torch
from conftest import all_scores, batch_of, write_table
from recbole.data.interaction import Interaction

from recbole_slifmr.model import MODELS


@pytest.fixture(params=MODELS)
def model_name(request):
    return request.param


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


def test_predict_equals_full_sort_predict(fresh):
    scores = all_scores(fresh)
    assert scores.shape == (fresh.dataset.user_num - 1, fresh.dataset.item_num)
    user, item = torch.cartesian_prod(torch.arange(1, fresh.dataset.user_num), torch.arange(fresh.dataset.item_num)).T
    pairs = fresh.model.predict(Interaction({"user_id": user, "item_id": item}))
    torch.testing.assert_close(pairs, scores.flatten())


def peak_at(run, best_epoch, monkeypatch):
    """Make validation prefer one epoch; return a list that fills with the scores as each epoch is validated."""
    seen, valid = [], run.trainer._valid_epoch

    def prefer(*args, **kwargs):
        result = valid(*args, **kwargs)[1]
        seen.append(all_scores(run))
        return 1.0 - 0.1 * abs(run.trainer._epoch - best_epoch), result

    monkeypatch.setattr(run.trainer, "_valid_epoch", prefer)
    return seen


def test_save_and_load_give_equal_scores(tiny, build, model_name, monkeypatch):
    """The best epoch is the first of three: its parameters and graphs come back, not the last ones."""
    run = build(tiny, model_name, epochs=3, learning_rate=0.01)
    seen = peak_at(run, 0, monkeypatch)
    run.trainer.fit(run.train, run.valid, show_progress=False)
    assert len(seen) == 3 and not torch.allclose(seen[0], seen[2])
    run.trainer.evaluate(run.test, load_best_model=True)
    assert torch.equal(all_scores(run), seen[0])
    other = build(tiny, model_name)
    other.trainer.evaluate(other.test, load_best_model=True, model_file=run.trainer.saved_model_file)
    assert torch.equal(all_scores(other), seen[0])


def test_a_resumed_run_gives_what_the_uninterrupted_one_gives(tiny, build, model_name, monkeypatch):
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
    assert torch.equal(seen[1], expected[3])


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


def test_checkerboard_ranks_the_held_out_item_of_the_group_first(tmp_path, build, model_name):
    """Two groups of users and items; every user's one held-out item is the only in-group item not seen.

    The features are noise: the groups show in the interactions only.
    """
    root = tmp_path / "board"
    root.mkdir()
    pairs = [(g, u, i) for g in range(2) for u, i in itertools.product(range(8), range(8))]
    held_out = [(g, u, i) for g, u, i in pairs if u == i]
    for name, part in (("train", [p for p in pairs if p not in held_out]), ("valid", held_out), ("test", held_out)):
        rows = [(f"u{g}{u}", f"i{g}{i}") for g, u, i in part]
        write_table(root / f"board.{name}.inter", "user_id:token\titem_id:token", rows)
    tokens = [f"i{g}{i}" for g in range(2) for i in range(8)]
    (root / "items.txt").write_text("\n".join(tokens) + "\n")
    np.save(root / "text.npy", np.random.default_rng(0).normal(size=(len(tokens), 64)))
    run = build(
        root, model_name, benchmark_filename=["train", "valid", "test"], topk=[1], valid_metric="Recall@1",
        epochs=20, learning_rate=0.01,
    )  # fmt: skip
    run.trainer.fit(run.train, run.valid, show_progress=False)
    assert run.trainer.evaluate(run.test, load_best_model=True)["recall@1"] == 1.0


def test_moving_and_casting_forget_the_final_embeddings(fresh):
    expected = all_scores(fresh)
    assert fresh.model.double()._final_embeddings()[0].dtype == torch.float64
    torch.testing.assert_close(all_scores(fresh).float(), expected)
    fresh.model.float()
    torch.testing.assert_close(all_scores(fresh), expected)


def test_printing_the_model_shows_its_parameters(fresh):
    assert "Trainable parameters" in str(fresh.model)
