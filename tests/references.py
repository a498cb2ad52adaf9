"""Naive twins: the same results by loops that follow the definitions."""

import numpy as np


def attention_mask(valid: np.ndarray, ar: np.ndarray) -> np.ndarray:
    """Token i sees token j iff both are valid and no block starts after i and up to j."""
    batch, length = valid.shape
    mask = np.zeros((batch, length, length), bool)
    for b in range(batch):
        block = [int(ar[b, : i + 1].sum()) for i in range(length)]
        for i in range(length):
            for j in range(length):
                mask[b, i, j] = valid[b, i] and valid[b, j] and block[j] <= block[i]
    return mask


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Softmax attention, one query, one head at a time, in float64; rows that see nothing are NaN."""
    out = np.full(query.shape, np.nan)
    share = query.shape[2] // key.shape[2]
    for b, i, n in np.ndindex(*query.shape[:3]):
        seen = np.flatnonzero(mask[b, i])
        if seen.size:
            logits = key[b, seen, n // share].astype(np.float64) @ query[b, i, n].astype(np.float64)
            weights = np.exp(logits - logits.max())
            out[b, i, n] = weights / weights.sum() @ value[b, seen, n // share]
    return out


def text_loss(logits: np.ndarray, tokens: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
    """Per sample, mean over its targets of minus the log-probability that the position before gives; float64."""
    losses = np.zeros(len(tokens))
    for b in range(len(tokens)):
        terms = []
        for t in range(1, tokens.shape[1]):
            if loss_mask[b, t]:
                row = logits[b, t - 1].astype(np.float64)
                terms.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[b, t]])
        losses[b] = np.mean(terms) if terms else 0.0
    return losses


def token_nll(
    table: np.ndarray, hidden: np.ndarray, targets: np.ndarray, wanted: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each wanted position's minus log-probability, and the gradients of their weighted sum (table, hidden); float64."""
    table, hidden = table.astype(np.float64), hidden.astype(np.float64)
    nll, of_table, of_hidden = np.zeros(len(targets)), np.zeros(table.shape), np.zeros(hidden.shape)
    for i in np.flatnonzero(wanted):
        row = table @ hidden[i]
        shares = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        nll[i] = -np.log(shares[targets[i]])
        slope = weights[i] * (shares - (np.arange(len(table)) == targets[i]))
        of_table += np.outer(slope, hidden[i])
        of_hidden[i] = slope @ table
    return nll, of_table, of_hidden
