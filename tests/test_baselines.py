"""The baselines with item features: what all of them keep to, and VBPR."""

import numpy as np
import pytest
import torch
from conftest import all_scores, batch_of

from recbole_slifmr.errors import DataError, SettingError

BASELINES = ("LATTICE", "VBPR", "FREEDOM", "BM3", "MSCA", "MGCN", "SMORE")


@pytest.fixture(params=BASELINES)
def model_name(request):
    return request.param


@pytest.mark.parametrize(
    "settings, fix", [({"modalities": {}}, "put .npy files"), ({"use_features": False}, "set use_features to True")]
)
def test_no_modality_is_refused(tiny, build, model_name, settings, fix):
    with pytest.raises(DataError, match=f"{model_name} needs item features and 'tiny' has none: {fix}") as error:
        build(tiny, model_name, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, setting, value",
    [
        ("LATTICE", "prune_ratio", 0.5),
        ("BM3", "prune_ratio", 0.5),
        ("FREEDOM", "self_loop", True),
        ("XSimGCL", "self_loop", True),
        ("LightKG", "prune_ratio", 0.5),
        ("AdaKG", "self_loop", True),
    ],
)
def test_what_the_trainer_cannot_ask_of_the_model_is_refused(tiny, build, name, setting, value):
    with pytest.raises(SettingError, match=f"{name} cannot do what {setting} asks for"):
        build(tiny, name, **{setting: value})


@pytest.mark.parametrize("n_modalities", [1, 3])
def test_any_number_of_modalities_moves_the_scores(tiny, build, model_name, n_modalities):
    """An item without a modality (i1 has none at all, i2 lacks the first) is ranked like the others."""
    tokens = (tiny / "items.txt").read_text().split()
    for name in ("text.npy", "image.npy"):
        (tiny / name).unlink()
    scores = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        for m in range(n_modalities):
            values = rng.normal(size=(len(tokens), 3 + m))
            if m == 0:
                values[tokens.index("i2")] = 0
            np.save(tiny / f"m{m}.npy", values)
        run = build(tiny, model_name)
        assert list(run.dataset.item_features) == [f"m{m}" for m in range(n_modalities)]
        assert (~run.dataset.item_features["m0"].mask).sum() == 3, "the padding item, i1 and i2"
        run.trainer.fit(run.train, run.valid, saved=False, show_progress=False)
        scores.append(all_scores(run))
        assert torch.isfinite(scores[-1]).all()
    assert not torch.allclose(*scores)


# -- VBPR --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_bias", [True, False])
def test_vbpr_scores_equal_the_formula(tiny, build, feature_bias):
    run = build(tiny, "VBPR", embedding_size=5, feature_embedding_size=3, feature_bias=feature_bias)
    for parameter in run.model.parameters():
        torch.nn.init.normal_(parameter)
    p = {name: value.detach().numpy() for name, value in run.model.named_parameters()}
    assert ("feature_bias.weight" in p) == feature_bias
    features = []
    for values, mask in run.dataset.item_features.values():
        norm = np.linalg.norm(values.numpy(), axis=1, keepdims=True)
        features.append(np.where(mask.numpy()[:, None], values.numpy() / np.where(norm > 0, norm, 1), 0))
    f = np.concatenate(features, axis=1)
    assert f.shape == (run.dataset.item_num, 6 + 4)
    expected = np.empty((run.dataset.user_num, run.dataset.item_num))
    for u, i in np.ndindex(*expected.shape):
        expected[u, i] = p["item_bias.weight"][i, 0] + p["user_embedding.weight"][u] @ p["item_embedding.weight"][i]
        expected[u, i] += p["user_taste.weight"][u] @ (p["projection.weight"] @ f[i])
        if feature_bias:
            expected[u, i] += p["feature_bias.weight"][0] @ f[i]
    np.testing.assert_allclose(all_scores(run).numpy(), expected[1:], rtol=1e-4, atol=1e-4)
    batch = batch_of(run)
    user, pos, neg = (batch[key].numpy() for key in ("user_id", "item_id", "neg_item_id"))
    loss = np.log1p(np.exp(expected[user, neg] - expected[user, pos])).mean()
    assert run.model.calculate_loss(batch)[0].item() == pytest.approx(loss, rel=1e-4)
    rows = [p["user_embedding.weight"][user], p["user_taste.weight"][user]]
    rows += [p[f"item_{name}.weight"][item] for name in ("embedding", "bias") for item in (pos, neg)]
    norm = sum((array**2).sum() for array in rows) / (2 * len(user))
    assert run.model.calculate_loss(batch)[1].item() == pytest.approx(run.config["reg_weight"] * norm, rel=1e-4)
