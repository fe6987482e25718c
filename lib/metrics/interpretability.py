"""How selective units and latents are for labels: U, CSI, their support, and first-letter absorption.

Labels y are int64 [N] in 0..C-1. A latent "fires" where its code is above zero, a base unit where it exceeds a
threshold from training rows. All entropies are in nats, so a perfect feature scores U = 1.
"""
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import one_hot

MIN_SUPPORT = 20  # examples a latent must fire on, and be silent on: with fewer, plug-in U and CSI are mostly noise
MIN_POSITIVES = 10  # training tokens a letter needs for an absorption probe
# letters and test tokens below which an absorption score is noise (.62 ± 1.34 over 2 letters)
MIN_LETTERS, MIN_TOKENS = 5, 100


def base_threshold(h_train: Tensor) -> Tensor:
    """The 75th percentile of each unit over training rows: [N, D] -> [D]. A base unit fires above it."""
    return torch.from_numpy(np.quantile(h_train.double().numpy(), 0.75, axis=0))


def uncertainty(fired: Tensor, y: Tensor, n_classes: int) -> dict[str, Tensor]:
    """The uncertainty coefficient of each column of `fired` (bool [N, F]) with y, float64 [F] each.

    u = I(b;y)/H(b), u_label = I(b;y)/H(y), and u_adj = (I - E[I])/(H(b) - E[I]), where E[I] is the exact
    expectation over all permutations of y. Columns with H(b) = 0 score 0.
    Range: 0 to 1; u_adj 0 on average where b and y are independent. Source: Vinh, Epps and Bailey (2010).
    """
    information, fires, sizes = _information(fired, y, n_classes)
    h_b = _entropy(fires / len(y))
    q = sizes / len(y)
    h_y = -torch.special.xlogy(q, q).sum()
    return {
        "u": _share(information, h_b),
        "u_label": information / h_y if h_y > 0 else torch.zeros_like(information),
        "u_adj": _above_chance(information, h_b, _expected_information(fires, sizes)),
    }


def uncertainty_given(
    fired: Tensor, attribute: Tensor, n_values: int, *, y: Tensor, n_classes: int
) -> dict[str, Tensor]:
    """What each column of `fired` (bool [N, F]) tells of an attribute beyond the label y, float64 [F] each.

    u = I(b;attribute|y)/H(b), and u_adj = (I - E[I])/(H(b) - E[I]) with E[I] over all permutations of the attribute
    within each class of y; information = I(b;attribute|y) in nats, which a unit can't raise by firing rarely. Where the
    attribute decides the label (digit and parity), u is U(attribute) - U(label).
    Range: 0 to 1; information 0 to ln 2; u_adj as for U. Source: the chain rule of mutual information.
    """
    information, chance = torch.zeros(2, fired.shape[1], dtype=torch.float64)
    for c in range(n_classes):
        rows = y == c
        if rows.any():
            inside, fires, sizes = _information(fired[rows], attribute[rows], n_values)
            share = float(rows.double().mean())
            information = information + share * inside
            chance = chance + share * _expected_information(fires, sizes)
    h_b = _entropy(fired.double().mean(0))
    return {"u": _share(information, h_b), "u_adj": _above_chance(information, h_b, chance),
            "information": information}


def _information(fired: Tensor, y: Tensor, n_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """I(b;y) in nats of each column of `fired` [N, F] and how often it fires, float64 [F]; the class sizes [C]."""
    n = len(y)
    labels = one_hot(y, n_classes).double()
    sizes = labels.sum(0)
    fires_in = labels.T @ fired.double()  # [C, F]
    fires = fires_in.sum(0)
    information = torch.zeros_like(fires)
    for joint, margin in ((fires_in, fires), (sizes[:, None] - fires_in, n - fires)):
        expected = (sizes[:, None] * margin).clamp(min=1e-12)
        information += torch.special.xlogy(joint, joint * n / expected).sum(0) / n
    return information.clamp(min=0), fires, sizes


def _entropy(p: Tensor) -> Tensor:
    """Entropy in nats of firing with probability p."""
    return -torch.special.xlogy(p, p) - torch.special.xlogy(1 - p, 1 - p)


def _share(information: Tensor, h_b: Tensor) -> Tensor:
    return torch.where(h_b > 0, information / h_b.clamp(min=1e-12), torch.zeros_like(h_b))


def _above_chance(information: Tensor, h_b: Tensor, chance: Tensor) -> Tensor:
    return torch.where(h_b - chance > 1e-9, (information - chance) / (h_b - chance).clamp(min=1e-9),
                       torch.zeros_like(h_b))


def _expected_information(fires: Tensor, sizes: Tensor) -> Tensor:
    """E[I] in nats for columns that fire `fires` [F] times when the labels (class sizes [C]) are permuted."""
    n = int(sizes.sum())
    log_factorial = torch.lgamma(torch.arange(n + 1, dtype=torch.float64) + 1)
    unique, inverse = fires.long().unique(return_inverse=True)
    a, expected = unique[:, None], torch.zeros(len(unique), dtype=torch.float64)
    for size, classes in zip(*(column.tolist() for column in sizes.long().unique(return_counts=True))):
        lowest, highest = (a + size - n).clamp(min=0), a.clamp(max=size)  # how many of the class may fire
        both = lowest + torch.arange(int((highest - lowest).max()) + 1)
        possible, both = both <= highest, both.minimum(highest)
        silent = size - both
        log_p = (
            log_factorial[size] - log_factorial[both] - log_factorial[silent]
            + log_factorial[n - size] - log_factorial[a - both] - log_factorial[n - a - silent]
            - log_factorial[n] + log_factorial[a] + log_factorial[n - a]
        )
        terms = sum(torch.special.xlogy(x, x * n / (of * size).clamp(min=1).double())
                    for x, of in ((both.double(), a), (silent.double(), n - a)))
        expected += classes * torch.where(possible, log_p.exp() * terms, 0.0).sum(1) / n
    return expected[inverse]


def csi(values: Tensor, y: Tensor, n_classes: int) -> Tensor:
    """Class selectivity index of each column of `values` [N, F]: float64 [F] in 0..1.

    (mu_max - mu_oth)/(mu_max + mu_oth) with a = max(0, value), mu_max the largest class mean and mu_oth the
    unweighted mean of the other class means; 0 if both are 0. Empty classes are left out.
    Range: 0 to 1. Source: Morcos et al. (2018).
    """
    labels = one_hot(y, n_classes).double()
    sizes = labels.sum(0)
    means = (labels.T @ values.double().clamp(min=0))[sizes > 0] / sizes[sizes > 0, None]
    top = means.max(0).values
    other = (means.sum(0) - top) / max(1, len(means) - 1)
    return torch.where(top > 0, (top - other) / (top + other).clamp(min=1e-300), torch.zeros_like(top))


def selectivity(
    values: Tensor, fired: Tensor, y: Tensor, n_classes: int, min_support: int = MIN_SUPPORT
) -> dict[str, float]:
    """Means of CSI and U over the columns of `values` [N, F], which fire where `fired` [N, F] holds.

    Keys: u_weighted over all columns, each weighted by how often it fires, so that arms need not have the same columns
    alive; csi, csi_std, u, u_std, u_label, u_adj over supported columns (0 where there are none); csi_all, u_all,
    u_label_all over all columns, dead ones counting 0; and n_supported.
    Range: as U and CSI; n_supported 0 to F. Source: this project.
    """
    fires = fired.sum(0)
    supported = (fires >= min_support) & (len(y) - fires >= min_support)
    scores = uncertainty(fired, y, n_classes) | {"csi": csi(values, y, n_classes)}
    result = {"u_weighted": _by_firing(scores["u"], fires)}
    for name, score in scores.items():
        some = score[supported]
        result[name] = float(some.mean()) if len(some) else 0.0
        if name in ("csi", "u"):
            result[f"{name}_std"] = float(some.std(correction=0)) if len(some) else 0.0
        if name != "u_adj":
            result[f"{name}_all"] = float(score.mean())
    return result | {"n_supported": int(supported.sum())}


def selectivity_given(
    fired: Tensor, attribute: Tensor, n_values: int, *, y: Tensor, n_classes: int
) -> dict[str, float]:
    """uncertainty_given over the columns of `fired` [N, F]: u_weighted and u_adj_weighted count each column as often
    as it fires; information is the sum over all columns, in nats.
    Range: as uncertainty_given; information 0 to F ln 2. Source: this project.
    """
    fires = fired.sum(0)
    found = uncertainty_given(fired, attribute, n_values, y=y, n_classes=n_classes)
    total = float(found.pop("information").sum())
    return {f"{name}_weighted": _by_firing(score, fires) for name, score in found.items()} | {"information": total}


def _by_firing(scores: Tensor, fires: Tensor) -> float:
    """Mean of the columns' scores [F], each counted as often as its column fires; 0 if none does."""
    return float((scores * fires).sum() / fires.sum().clamp(min=1))


def absorption(
    x: Tensor, values: Tensor, indices: Tensor, dictionary: Tensor, letters: Tensor, splits: Tensor, seed: int = 0
) -> dict[str, float]:
    """First-letter feature absorption, a simplified form of SAEBench's (Chanin et al. 2024).

    x [N, D] raw activations of tokens; values, indices [N, k] codes in raw units (code * scale); dictionary
    [F, D] unit rows; letters [N] in 0..25; splits [N] with 0 train, 1 validation, 2 test, chosen by token type.
    Each letter has a balanced logistic probe p of unit norm, and main latents, whose firing tells the letter. Scored
    are the test tokens that begin with the letter, that the probe calls positive, and whose projection
    q = <x - mu, p> is positive: by the share of q that other latents carry in place of the main ones (0 where those
    carry all of it).

    Returns n_letters and n_tokens and, from 5 letters and 100 tokens, score (mean over tokens, then letters).
    Range: 0 to 1, higher is worse. Source: Chanin et al. (2024).
    """
    mu = x[splits == 0].double().mean(0)
    centred = x.double() - mu
    fired = torch.zeros(len(x), len(dictionary)).scatter_add_(1, indices.long(), (values > 0).float()) > 0
    per_letter, n_tokens = [], 0
    for letter in range(26):
        is_letter = letters == letter
        if is_letter[splits == 0].sum() < MIN_POSITIVES or is_letter[splits == 0].all():
            continue
        probe = LogisticRegression(class_weight="balanced", max_iter=1000, random_state=seed)
        probe.fit(centred[splits == 0].numpy(), is_letter[splits == 0].numpy())
        direction = torch.from_numpy(probe.coef_[0])
        direction = direction / direction.norm()
        q = centred @ direction
        called = torch.from_numpy(probe.predict(centred.numpy()))
        rows = (splits == 2) & is_letter & called & (q > 0)
        main = _main_latents(fired, is_letter, splits)
        if not main or not rows.any():
            continue
        share = values[rows].double() * (dictionary.double() @ direction)[indices[rows].long()]
        per_letter.append(_absorbed(share, torch.isin(indices[rows].long(), torch.tensor(main)), q[rows]).mean())
        n_tokens += int(rows.sum())
    size: dict[str, float] = {"n_letters": len(per_letter), "n_tokens": n_tokens}
    if len(per_letter) < MIN_LETTERS or n_tokens < MIN_TOKENS:
        return size
    return {"score": float(torch.stack(per_letter).mean()), **size}


def _absorbed(share: Tensor, is_main: Tensor, q: Tensor, n_top: int = 5, least: float = 0.1) -> Tensor:
    """Absorption of each token [B], from its codes' contributions [B, k] to the projection q [B]."""
    main = torch.where(is_main, share, 0.0).sum(1)
    others = torch.where(is_main, 0.0, share).clamp(min=0)
    top = others.topk(min(n_top, share.shape[1]), dim=1).values.sum(1)
    rate = top / (top + main.clamp(min=0)).clamp(min=1e-12)
    return torch.where((main >= q) | (top < least * q), torch.zeros_like(rate), rate)


def _main_latents(
    fired: Tensor, is_letter: Tensor, splits: Tensor, most: int = 5, least_gain: float = 0.03
) -> list[int]:
    """Latents that predict the letter when any of them fires, chosen greedily.

    The candidate has the best training F1; it joins if the validation F1 rises by more than least_gain.
    """
    chosen: list[int] = []
    any_fires = torch.zeros(len(fired), dtype=torch.bool)
    best = 0.0
    train, val = splits == 0, splits == 1
    for _ in range(most):
        new = fired[train] & ~any_fires[train, None]
        hits = (any_fires & is_letter)[train].sum() + new[is_letter[train]].sum(0)
        f1 = 2 * hits / (any_fires[train].sum() + new.sum(0) + is_letter[train].sum())
        candidate = int(f1.argmax())
        together = any_fires | fired[:, candidate]
        total = together[val].sum() + is_letter[val].sum()
        score = float(2 * (together & is_letter)[val].sum() / total) if total else 0.0
        if score - best <= least_gain:
            break
        chosen.append(candidate)
        any_fires, best = together, score
    return chosen
