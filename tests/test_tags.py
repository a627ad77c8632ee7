"""The knowledge graph as tags of the items: by hand, as vectors, and what they take."""

import numpy as np
import pytest
import torch

from recbole_slifmr.nn.tags import tag_factor, tag_vectors, unit_rows

# Items 1 to 4, entities 5 to 8. Of relation 1: items 1, 2 and 3 to 5, item 4 alone to 6. Of relation 2: entity 7 to
# items 1 and 2, entities 5 and 6 to 8.
TRIPLES = np.array([(1, 1, 5), (2, 1, 5), (3, 1, 5), (4, 1, 6), (7, 2, 1), (7, 2, 2), (5, 2, 8), (6, 2, 8), (3, 1, 5)])


def test_tags_are_scaled_by_how_few_items_have_them():
    tags = tag_factor(TRIPLES, 5).toarray()
    three, two = np.sqrt(np.log(1 + 4 / 3)), np.sqrt(np.log(1 + 4 / 2))
    assert tags.shape == (5, 2), "the tag of item 4 alone is left out"
    np.testing.assert_allclose(tags, [[0, 0], [three, two], [three, two], [three, 0], [0, 0]])


def test_direction_and_relation_tell_tags_apart():
    same = tag_factor(np.array([(1, 1, 3), (2, 1, 3)]), 3)
    assert same.shape == (3, 1)
    for other in ((3, 1, 2), (2, 2, 3)):
        assert tag_factor(np.array([(1, 1, 3), other]), 3).shape == (3, 0)


def test_the_ends_of_a_link_between_items_have_tags_in_common():
    cites = np.array([(1, 0, 2), (3, 0, 4), (5, 0, 4), (6, 0, 7), (7, 1, 6), (7, 1, 8)])
    tags = tag_factor(cites, 10).toarray()
    assert tags.shape == (10, 10), "to 2, 4 and 7 by relation 0 and from 1, 3, 5 and 6; to 6 and 8 by 1 and from 7"
    alike = (tags @ tags.T > 0) & ~np.eye(10, dtype=bool)
    expected = [[1, 2], [3, 4], [3, 5], [4, 5], [6, 7], [6, 8], [7, 8]]
    assert np.argwhere(np.triu(alike)).tolist() == expected
    two, three = np.sqrt(np.log(1 + 9 / np.array([2, 3])))
    np.testing.assert_allclose(sorted(tags[4][tags[4] > 0]), [three, two, two])
    np.testing.assert_array_equal(tags, tag_factor(np.concatenate([cites, cites, [(9, 0, 9)]]), 10).toarray())


def test_two_hops_reach_the_tags_of_the_neighbours():
    tags = tag_factor(TRIPLES, 5, n_hops=2).toarray()
    assert tags.shape == (5, 3)
    np.testing.assert_allclose(tags[1:, 2], np.sqrt(np.log(1 + 4 / 4)))  # all four items lead to 8 by 1, then 2


def test_without_triples_there_are_no_tags():
    assert tag_factor(np.zeros((0, 3), dtype=np.int64), 4).shape == (4, 0)


def test_tag_vectors_keep_the_inner_products_of_the_tags():
    rng = np.random.default_rng(0)
    triples = np.stack([rng.integers(1, 40, 200), rng.integers(0, 3, 200), rng.integers(40, 70, 200)], axis=1)
    rows = unit_rows(tag_factor(triples, 40))
    unit_tags = rows.toarray()
    np.testing.assert_allclose(np.linalg.norm(unit_tags[unit_tags.any(axis=1)], axis=1), 1)
    assert unit_tags.shape[1] > 39
    for size, tolerance in ((39, 1e-5), (1000, 1e-5)):
        vectors = tag_vectors(rows, size).numpy()
        np.testing.assert_allclose(vectors @ vectors.T, unit_tags @ unit_tags.T, atol=tolerance)
        assert not vectors[0].any()
    few = tag_vectors(rows, 5).numpy()
    values = np.linalg.svd(unit_tags, compute_uv=False)
    assert few.shape == (40, 5)
    np.testing.assert_allclose(np.linalg.svd(few, compute_uv=False), values[:5], rtol=1e-5)


@pytest.mark.parametrize("n_brands", [100, 2000])  # decomposed exactly and at random
def test_rounding_does_not_choose_the_vectors_of_brands_that_are_alike(n_brands):
    item = np.arange(1, 2 * n_brands + 1)  # every brand has two items: all singular values are equal
    triples = np.stack([item, np.zeros_like(item), 2 * n_brands + 1 + item % n_brands], axis=1)
    rows = unit_rows(tag_factor(triples, 2 * n_brands + 1))
    rounded = rows.copy()
    rounded.data *= 1 + 1e-14 * np.random.default_rng(0).normal(size=len(rounded.data))
    torch.testing.assert_close(tag_vectors(rounded, 30), tag_vectors(rows, 30), rtol=0, atol=1e-5)


def test_tags_take_memory_by_triples_and_not_by_relations_times_entities():
    triples = np.array([[1, 0, 100_000], [2, 0, 100_000], [1, 30_000, 2], [3, 7, 4]])
    for n_hops in (1, 2):
        tags = tag_factor(triples, 5, n_hops).toarray()
        assert tags.shape == (5, 5) and (tags[1] > 0).sum() == 3 and (tags[3] > 0).sum() == 2
        np.testing.assert_array_equal(tags[[1, 3]], tags[[2, 4]])
