"""F1 of the best unit for a concept, chosen on training rows and scored on held-out ones: values in closed form."""
import pytest
import torch

from lib.metrics.units import best_dimensions, best_latents, best_tokens, recovery, token_table, token_tables
from lib.sae import make_sae

IS_VAL = torch.arange(40) >= 20
CONCEPT = (torch.arange(40) % 4 == 0)[:, None]  # 5 of the 20 rows of each split


def test_the_latent_is_chosen_on_training_rows_and_scored_on_the_others():
    """Latent 0 is the concept in training, and fires on twice as many rows held out; latent 1 is it held out alone."""
    first, second = CONCEPT[:, 0].clone(), CONCEPT[:, 0] & IS_VAL
    first[IS_VAL] |= torch.arange(20) % 4 == 1
    codes = torch.stack([first, second], 1).float(), torch.arange(2).expand(40, 2)
    assert best_latents(codes, 2, CONCEPT, IS_VAL) == [
        {"unit": 0, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 * 5 / (10 + 5)), "f1_train": 1.0}]


def test_a_latent_counts_above_the_best_share_of_its_largest_code():
    """It fires on every row, twice as strongly on the concept; firing at all it finds 5 of 20."""
    codes = (1 + CONCEPT.float()), torch.zeros(40, 1, dtype=torch.long)
    assert best_latents(codes, 1, CONCEPT, IS_VAL)[0]["f1"] == 1.0
    assert best_latents(codes, 1, CONCEPT, IS_VAL, shares=(0.0,))[0]["f1"] == pytest.approx(2 * 5 / (20 + 5))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_dimension_tells_above_or_below_its_threshold(sign):
    """The concept is a tenth of the rows, the nearest quantile leaves an eighth: F1 2 * .1 / (.125 + .1)."""
    labels = (torch.arange(8000) % 10 == 0)[:, None]
    x = torch.zeros(8000, 3)
    x[:, 1] = sign * labels[:, 0] + 0.001 * torch.rand(8000, generator=torch.Generator().manual_seed(0))
    (found,) = best_dimensions(x, labels, torch.arange(8000) >= 4000)
    assert found["unit"] == 1 and found["f1"] == pytest.approx(8 / 9, abs=0.03)


def test_a_token_and_the_tables():
    """Token 7 is on half of its rows the concept: alone F1 2/3; the token before decides which half."""
    ids, before = torch.tensor([7, 7, 3, 3] * 10), torch.tensor([1, 2, 1, 2] * 10)
    labels = ((ids == 7) & (before == 1))[:, None]
    (token,) = best_tokens(ids, labels, IS_VAL)
    (table,), (pairs,) = token_tables(ids, before, labels, IS_VAL)
    assert (token["unit"], token["f1"]) == (7, pytest.approx(2 / 3))
    assert table["f1"] == pytest.approx(2 / 3) and pairs["f1"] == 1.0


def test_the_table_of_tokens_has_their_shares_of_concept_rows():
    """Ten training rows each of tokens 3 and 7, five of 7's with the concept, and token 9 on held-out rows alone."""
    ids = torch.where(IS_VAL, torch.tensor([9, 7, 3, 3] * 10), torch.tensor([7, 7, 3, 3] * 10))
    share, (found,) = token_table(ids, CONCEPT, IS_VAL)
    assert share[:, 0].tolist() == pytest.approx([0.25 / 11, 5.25 / 11, 0.25])  # of all training rows a quarter
    assert found["f1_train"] == pytest.approx(2 / 3) and found["f1"] == 0


def test_every_kind_is_scored_in_the_same_way():
    """Where the latents are the dimensions and the token is the concept, all of them find it."""
    eye = torch.eye(2)
    x = torch.cat([CONCEPT, ~CONCEPT], 1).float()
    sae = make_sae(eye, torch.zeros(2), eye, mean=torch.zeros(2), scale=1.0, top_k=1)
    (found,) = recovery({"latent": sae}, x, CONCEPT, IS_VAL, principal=eye, ids=CONCEPT[:, 0].long(),
                        before=torch.zeros(40, dtype=torch.long))
    assert {kind: of["f1"] for kind, of in found.items()} == dict.fromkeys(
        ("latent", "firing", "neuron", "pca", "token", "table", "pairs"), 1.0)
